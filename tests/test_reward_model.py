"""reward_model.py against TRL, PEFT, transformers' own pooling and closed forms."""

import itertools
import json
import math

import datasets
import peft
import pytest
import safetensors
import tokenizers
import torch
import transformers
import trl
from conftest import TINY, read_metrics, write_rows
from pairs import (
    CPU,
    KINDS,
    PAIRS,
    RANKED,
    WAYS,
    arguments,
    assert_same_gradients,
    attention_of,
    documents,
    examples_of,
    one_pass,
)
from safetensors.torch import load_file, save_file

import common
import reward_model

MARGINS = [row | {"margin": n / 2} if n else row for n, row in enumerate(PAIRS[:4])]
ROWS = [*MARGINS, RANKED]
TURNS = [[("user", "Hi"), ("assistant", "Hello there.")], [("user", "2?"), ("assistant", "4")]]
TURNS = [[{"role": role, "content": text} for role, text in turns] for turns in TURNS]


@pytest.fixture
def train(random_model, tmp_path):
    """name, more flags -> the output folder of two steps"""

    def run(name, *more, rows=ROWS):
        data = write_rows(tmp_path / "rows.jsonl", rows)
        model = [] if "--model" in more else ["--model", random_model]
        two = "--max-steps 2 --eval-data 0 --samples 0 --lr 0.003 --batch-size 5".split()
        output = ["--data", data, "--output", str(tmp_path / name)]
        reward_model.main([*model, *output, *two, *map(str, more)])
        return tmp_path / name

    return run


@pytest.fixture
def score(tmp_path):
    """rows, flags -> the rewards of every row's answers, less the offset of the folder"""

    def run(rows, folder, *flags):
        args = arguments(reward_model, tmp_path, ROWS, *flags)
        tokenizer, encoded = common.load_tokenizer(args), []
        for row in rows:
            turns, answers, tools, _ = common.parse_row(row)
            if not answers:
                *turns, answers = *turns[:-1], turns[-1:]
            answers = common.encode_answers(tokenizer, turns, answers, tools, whole=True)
            encoded.append(common.share_prompt(answers))
        examples = dict(zip(("input_ids", "is_target", "stretches"), zip(*encoded)))
        values = reward_model.score(load(args), examples, args, CPU)
        return [[value - offset_of(folder) for value in answers] for answers in values]

    return run


def load(args):
    return reward_model.load_reward_model(args, torch.float32, CPU)[0]


def sequence_model(folder):
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)


def offset_of(folder) -> float:
    if (folder / "config.json").exists():
        return json.loads((folder / "config.json").read_text())["reward_offset"]
    with safetensors.safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return float(file.metadata()["reward_offset"])


# --------------------------------------------------------------------------------- the loss


def test_pairwise_loss_is_its_equation():
    draw = torch.Generator().manual_seed(0)
    chosen, rejected, margin = 3 * torch.randn(3, 7, generator=draw)
    losses = reward_model.pairwise_loss(chosen, rejected, margin)
    for w, y, m, loss in zip(*(x.tolist() for x in (chosen, rejected, margin, losses))):
        assert loss == pytest.approx(math.log1p(math.exp(-(w - y - m))), rel=1e-5)
    far = torch.tensor([1000.0], requires_grad=True)  # finite where exp would overflow
    reward_model.pairwise_loss(-far, far).backward()
    assert far.grad.item() == 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [*KINDS, "margins"])
def test_shared_prompts_change_no_loss_and_no_gradient(kind, way, tmp_path, train):
    """Against every answer alone with its prompt, through transformers' own class in float64,
    pair by pair: the loss to 1e-6 and gradients to 1e-5."""
    more = ["--no-packing"] if way == "padded" else []
    rows = KINDS.get(kind, ROWS)
    args = arguments(reward_model, tmp_path, rows, "--model", train("base"), *more)
    examples, ours = examples_of(args, "whole pairs"), load(args)
    theirs = sequence_model(args.model).double()
    total = 0.0
    for answers, margin in zip(documents(examples), examples["margin"]):
        r = [theirs(input_ids=ids[None]).logits[0, 0] for ids, _ in answers]
        pairs = itertools.combinations(r, 2)
        losses = [reward_model.pairwise_loss(w, y, float(margin)) for w, y in pairs]
        total = total + torch.stack(losses).mean()
    total.backward()
    with attention_of(way):
        figures = reward_model.pair_figures(ours, one_pass(examples, way))
        figures["loss"].backward()
    assert figures["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    assert_same_gradients(ours, theirs)


def test_loss_gradients_and_tokens_equal_trls(train, tmp_path):
    folder = train("base", rows=MARGINS)
    args = arguments(reward_model, tmp_path, MARGINS, "--model", folder)
    rows, roles = [], {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    for row in MARGINS:
        turns = {key: [{"role": role, "content": row[key]}] for key, role in roles.items()}
        rows.append(turns | {"margin": row.get("margin", 0.0)})
    theirs, tokenizer = sequence_model(folder), common.load_tokenizer(args)
    config = trl.RewardConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    table = datasets.Dataset.from_list(rows)
    trainer = trl.RewardTrainer(theirs, config, train_dataset=table, processing_class=tokenizer)
    inputs = trainer.data_collator(list(trainer.train_dataset))
    examples = examples_of(args, "whole pairs")
    answers = [*zip(*documents(examples))]
    for ids, mask, (expected, _) in zip(
        inputs["input_ids"], inputs["attention_mask"], [*answers[0], *answers[1]]
    ):
        assert torch.equal(ids[mask.bool()], expected)
    expected = trainer.compute_loss(theirs.train(), dict(inputs))
    expected.backward()
    ours = load(args)
    figures = reward_model.pair_figures(ours, one_pass(examples, "loop"))
    (figures["loss"] / 4).backward()
    assert figures["loss"].item() / 4 == pytest.approx(expected.item(), rel=1e-6)
    for name in ("accuracy", "margin"):
        theirs_of = trainer._metrics["train"][name][0]
        assert figures[name].item() / 4 == pytest.approx(theirs_of, abs=1e-6)
    assert_same_gradients(ours, theirs)


# ----------------------------------------------------------------------- head, files, others


def test_the_head_at_the_start(tmp_path):
    """N(0, 1 / (d + 1)), one row, no bias, float32, from the seed alone."""
    flags = ("--seed", 0), ("--seed", 0, "--lora-rank", 4), ("--seed", 1)
    one, same, other = (load(arguments(reward_model, tmp_path, ROWS, *f)).score for f in flags)
    assert one.weight.shape == (1, 128) and one.bias is None
    assert one.weight.dtype == torch.float32
    assert one.weight.std().item() == pytest.approx(1 / 129**0.5, rel=0.2)
    assert torch.equal(one.weight, same.weight) and not torch.equal(one.weight, other.weight)


def test_only_the_adapter_and_the_head_get_gradients(tmp_path):
    args = arguments(reward_model, tmp_path, PAIRS[:3], "--lora-rank", 4)
    model, batch = load(args), one_pass(examples_of(args, "whole pairs"), "loop")
    reward_model.pair_figures(model, batch)["loss"].backward()
    assert sum(isinstance(x, reward_model.LoRALinear) for x in model.modules()) == 28
    for name, p in model.named_parameters():
        trains = "lora_" in name or name == "score.weight"
        assert trains == p.requires_grad == (p.grad is not None), name


def bare_tokenizer(special):
    """The bundled tokenizer with eos and these special tokens, but no pad token."""
    tiny = transformers.AutoTokenizer.from_pretrained(TINY)
    bare = tokenizers.Tokenizer(tiny.backend_tokenizer.model)
    bare.pre_tokenizer = tiny.backend_tokenizer.pre_tokenizer
    bare.decoder = tiny.backend_tokenizer.decoder
    bare.add_special_tokens(list(special))
    kind = transformers.PreTrainedTokenizerFast
    template = tiny.chat_template
    return kind(tokenizer_object=bare, eos_token="<|im_end|>", chat_template=template)


PADS = {"as it is": "<|pad|>", "pad is eos": "<|im_start|>", "no pad token": "<|pad|>"}


@pytest.mark.parametrize("kind", PADS)
def test_transformers_pools_our_scores_from_the_folder(kind, train, score, random_model, tmp_path):
    """Padded on either side by the saved tokenizer, with one in a batch that ends with eos as a
    last token: transformers' own class gives our rewards."""
    base = tmp_path / "base"
    model = transformers.AutoModelForCausalLM.from_pretrained(random_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(random_model)
    if kind == "pad is eos":
        tokenizer = bare_tokenizer(["<|im_start|>", "<|im_end|>"])
        tokenizer.pad_token = "<|im_end|>"
    elif kind == "no pad token":
        tokenizer = bare_tokenizer(["<|im_end|>"])
        model.config.pad_token_id = None
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    folder = train("run", "--model", base, "--template", "none")
    theirs, tokenizer = sequence_model(folder), transformers.AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert theirs.score.weight.shape == (1, 64) and tokenizer.pad_token == PADS[kind]
    assert theirs.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    texts = [{"prompt": r["prompt"], "response": r[k]} for r in PAIRS for k in roles_of_answers]
    expected = torch.tensor(score(texts, folder, "--model", folder, "--template", "none"))[:, 0]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        strings = [row["prompt"] + row["response"] + tokenizer.eos_token for row in texts]
        inputs = tokenizer(strings, padding=True, return_tensors="pt")
        assert (inputs["attention_mask"] == 0).any()
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with torch.no_grad():
            found = theirs(input_ids=ids, attention_mask=mask).logits[:, 0]
        torch.testing.assert_close(found - offset_of(folder), expected, rtol=0, atol=1e-5)


roles_of_answers = ("chosen", "rejected")


@pytest.mark.parametrize("four_bits", [[], ["--load-in-4bit"]])
def test_peft_loads_the_adapter_and_gives_our_scores(four_bits, train, score, random_model):
    """Of conversations, padded on either side. PEFT has the base in 16 bits."""
    folder = train("run", "--lora-rank", 4, *four_bits)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and "reward_offset" not in config
    assert config["modules_to_save"] == ["classifier", "score"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    kind = peft.AutoPeftModelForSequenceClassification
    theirs = kind.from_pretrained(folder, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    flags = "--model", random_model, "--adapter", folder
    scored = score([{"messages": turns} for turns in TURNS], folder, *flags)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        inputs = tokenizer.apply_chat_template(
            TURNS, padding=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            found = theirs.eval()(**inputs).logits[:, 0] - offset_of(folder)
        expected = torch.tensor(scored)[:, 0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_training_continues_from_reward_models_and_adapters(train, random_model, tmp_path):
    """Their head is kept, ours or PEFT's; an adapter without one, as of sft.py, gets a random
    one."""
    data = write_rows(tmp_path / "held_out.jsonl", PAIRS)
    held_out = ["--eval-data", data]
    for flags in ([], ["--lora-rank", 4]):
        first = train("first", *held_out, "--overwrite", *flags)
        more = ["--adapter", first] if flags else ["--model", first]
        second = train("second", *held_out, "--overwrite", "--max-steps", 0, *more)
        last, again = (read_metrics(x)[-2]["eval_loss"] for x in (first, second))
        assert again == pytest.approx(last, abs=1e-6)
        assert offset_of(second) != 0
    tensors = load_file(first / "adapter_model.safetensors")
    again = load_file(second / "adapter_model.safetensors")
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)

    base = sequence_model(random_model)
    lora = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"])
    theirs = peft.get_peft_model(base, lora)
    theirs.save_pretrained(tmp_path / "theirs")
    args = arguments(reward_model, tmp_path, ROWS, "--model", random_model)
    args.adapter = str(tmp_path / "theirs")
    head = theirs.base_model.model.score.modules_to_save["default"].weight
    assert torch.equal(load(args).score.weight, head)

    headless = {name: tensor for name, tensor in tensors.items() if "score" not in name}
    save_file(headless, first / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((first / "adapter_config.json").read_text()) | {"modules_to_save": None}
    (first / "adapter_config.json").write_text(json.dumps(config))
    args.adapter = str(first)
    fresh = load(args).score.weight
    args.adapter = None
    assert torch.equal(fresh, load(args).score.weight)


def test_a_reward_adapter_is_not_for_other_scripts(train, random_model, tmp_path):
    import dpo

    folder = train("run", "--lora-rank", 2)
    flags = "--model", random_model, "--data", str(tmp_path / "rows.jsonl"), "--adapter", folder
    with pytest.raises(common.UserError, match="modules_to_save"):
        dpo.main([*map(str, flags), "--output", str(tmp_path / "dpo")])


def test_the_offset_is_the_mean_reward_of_the_best_training_answers(train, score):
    folder = train("run")
    scored = score(ROWS, folder, "--model", folder)
    assert len(scored[4]) == 5 and abs(offset_of(folder)) > 1e-3
    assert sum(answers[0] for answers in scored) / 5 == pytest.approx(0, abs=1e-5)


def test_a_model_that_cannot_keep_answers_apart_is_refused(random_model, tmp_path):
    """BLOOM's positions are those of the whole sequence."""
    config = transformers.BloomConfig(vocab_size=320, hidden_size=64, n_layer=2, n_head=4)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    transformers.AutoTokenizer.from_pretrained(random_model).save_pretrained(tmp_path / "bloom")
    args = arguments(reward_model, tmp_path, ROWS, "--model", tmp_path / "bloom")
    with pytest.raises((common.UserError, NotImplementedError, TypeError)):
        load(args)
    args.no_packing = True
    load(args)


# -------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("more", [[], ["--lora-rank", 8, "--lr", 0.01]])
def test_it_learns_five_prompts_by_heart(more, train):
    folder = train("run", "--max-steps", 20, *more)
    last = [entry for entry in read_metrics(folder) if "loss" in entry][-1]
    assert last["accuracy"] == pytest.approx(1) and last["loss"] < 0.1 and last["margin"] > 2


def test_dropout_of_the_base_is_off(train, random_model, tmp_path):
    """The loss of the first step is that of the evaluation before it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(random_model)
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(random_model).save_pretrained(tmp_path / "base")
    held_out = write_rows(tmp_path / "held_out.jsonl", MARGINS)
    flags = ["--model", tmp_path / "base", "--eval-data", held_out, "--batch-size", 4]
    entries = read_metrics(train("run", *flags, rows=MARGINS))
    before, first = (next(e[k] for e in entries if k in e) for k in ("eval_loss", "loss"))
    assert first == pytest.approx(before, abs=1e-6)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["attention_dropout"] == 0.5


@pytest.mark.parametrize("more", [[], ["--lora-rank", 4]])
def test_losses_do_not_depend_on_the_passes(more, train):
    runs = []
    for n, flags in enumerate(([], ["--micro-batch-tokens", 100], ["--no-packing"])):
        folder = train(f"run{n}", "--lr", 1e-5, *flags, *more)
        runs.append((read_metrics(folder)[1:-1], offset_of(folder)))
    for other, offset in runs[1:]:
        assert offset == pytest.approx(runs[0][1], abs=1e-5)
        for a, b in zip(runs[0][0], other, strict=True):
            for key in a.keys() - {"tokens_per_second", "peak_memory_gib"}:
                assert b[key] == pytest.approx(a[key], rel=1e-5, abs=2e-6), key


def test_the_samples_are_on_the_screen(train, capsys):
    train("run", "--samples", 1)
    printed = capsys.readouterr().out
    assert "--- rewards before training -> after ---" in printed and " -> " in printed

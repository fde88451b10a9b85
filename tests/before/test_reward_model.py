"""reward_model.py against TRL's RewardTrainer, PEFT, transformers' own pooling and float64 closed forms."""

import json
import math
import os
import re
import shlex
import subprocess
import sys

import datasets
import peft
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
import trl
from before import ROOT, read_metrics, run_script, write_rows
from safetensors.torch import load_file

import common_before as common
import reward_model

CPU = torch.device("cpu")
PAIRS = [
    {"prompt": "Hi", "chosen": "Hello there.", "rejected": "What?"},
    {"prompt": "2+2?", "chosen": "4", "rejected": "I think that it may be five, or six.", "margin": 0.5},
    {"prompt": "你好", "chosen": "你好！", "rejected": "Hi"},
    {"prompt": "A colour?", "chosen": "Red.", "rejected": "Seven.", "margin": 1.0},
]
RANKED = {"prompt": "Name a fruit.", "responses": ["A pear.", "It might be a pear, I think.", "A carrot.", "No."]}
ANSWERS = [{"prompt": "Hi", "response": "Hello there."}, {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}]


def arguments(*flags):
    """The arguments of reward_model.py, by way of its own parser."""
    seen, before = [], reward_model.train
    reward_model.train = seen.append
    try:
        reward_model.main(["--output", "unused", "--eval-fraction", "0", *map(str, flags)])
    finally:
        reward_model.train = before
    return seen[0]


def train(folder, *flags, rows=(*PAIRS, RANKED)):
    """A short run of reward_model.py in this process. -> its output folder"""
    folder.parent.mkdir(exist_ok=True)
    data = ["--data", write_rows(folder.parent / "rows.jsonl", list(rows))]
    quick = ["--max-steps", "2", "--eval-fraction", "0", "--samples", "0", "--max-length", "128", "--lr", "0.003", "--log-every", "1"]
    reward_model.main([*data, "--output", str(folder), *quick, *map(str, flags)])
    return folder


def score(folder, rows, *flags):
    """--score in this process -> the rows that it writes."""
    source = write_rows(folder.parent / "to_score.jsonl", rows)
    reward_model.main(["--score", source, "--output", str(folder.parent / "scores"), *map(str, flags or ["--model", folder])])
    return [json.loads(line) for line in (folder.parent / "scores" / "scores.jsonl").read_text(encoding="utf-8").splitlines()]


def load(*flags):
    args = arguments(*flags)
    return reward_model.load_reward_model(args, torch.float32, CPU, torch.float32)


def batch_of(rows, path, *flags):
    args = arguments("--data", write_rows(path / "batch.jsonl", rows), "--batch-size", len(rows), *flags)
    corpus, _ = common.load_data(args, common.tiny_tokenizer(), 320, kind="preferences")
    corpus.order = lambda epoch: corpus.sources[0][0]
    return next(iter(corpus.deal(corpus.rows())))


def save_base(folder, tokenizer, **config):
    """The tiny model with another configuration and tokenizer, as a causal LM on disk."""
    base = common.tiny_model()
    base.config.update(config)
    base.padded_attention = "sdpa"
    common.save_model(folder, base, tokenizer)
    if config.get("pad_token_id", 0) is None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": None}))
    return folder


def without_pad_token(special=("<|im_start|>", "<|im_end|>")):
    """The tiny tokenizer with eos and these special tokens, but no pad token."""
    tokenizer = common.tiny_tokenizer()
    bare = tokenizers.Tokenizer(tokenizer.backend_tokenizer.model)
    bare.pre_tokenizer, bare.decoder = tokenizer.backend_tokenizer.pre_tokenizer, tokenizer.backend_tokenizer.decoder
    bare.add_special_tokens(list(special))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|im_end|>", chat_template=common.CHATML)


def test_pairwise_loss_is_its_equation():
    chosen, rejected, margin = (torch.randn(7, generator=torch.Generator().manual_seed(n)) * 3 for n in range(3))
    expected = [math.log1p(math.exp(-(w - l - m))) for w, l, m in zip(chosen.tolist(), rejected.tolist(), margin.tolist())]
    torch.testing.assert_close(reward_model.pairwise_loss(chosen, rejected, margin, reduction="none"), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert reward_model.pairwise_loss(chosen, rejected, margin).item() == pytest.approx(sum(expected) / 7, rel=1e-6)
    assert reward_model.pairwise_loss(chosen, chosen).item() == pytest.approx(math.log(2), rel=1e-6)
    far = torch.tensor([1000.0], requires_grad=True)  # finite where exp would overflow
    reward_model.pairwise_loss(-far, far).backward()
    assert far.grad.item() == 2


def test_ranked_answers_in_one_step_are_the_mean_over_all_pairs_of_each_prompt(tmp_path):
    """A step over four pairs and a ranking of four: each prompt counts once. Float64, pair by pair, from scored answers."""
    rows = [*PAIRS, RANKED]
    folder = train(tmp_path / "run", "--max-steps", "1", "--batch-size", "5", "--lr", "0")
    scored = {row["prompt"]: row["rewards"] for row in score(folder, rows)}
    means = []
    for row in rows:
        r, m = scored[row["prompt"]], row.get("margin", 0.0)
        pairs = [(r[i], r[j]) for i in range(len(r)) for j in range(i + 1, len(r))]
        losses = [math.log1p(math.exp(-(w - l - m))) for w, l in pairs]
        means.append([sum(values) / len(pairs) for values in (losses, [w > l for w, l in pairs], [w - l for w, l in pairs])])
    logged = next(entry for entry in read_metrics(folder) if "loss" in entry)
    assert len(scored["Name a fruit."]) == 4
    for name, values in zip(("loss", "accuracy", "margin"), zip(*means)):
        assert logged[name] == pytest.approx(sum(values) / 5, abs=1e-5), name


def test_packed_padded_and_alone_are_the_same_rewards(tmp_path):
    model = load("--max-length", "128")
    rows = [*PAIRS, RANKED]
    packed, padded = batch_of(rows, tmp_path), batch_of(rows, tmp_path, "--no-packing")
    with torch.no_grad():
        ours = model.rewards(**packed)
        with common.attention(model, "sdpa"):
            torch.testing.assert_close(model.rewards(**padded), ours, rtol=0, atol=1e-5)
        documents = [ids.tolist() for ids in packed["input_ids"][0].split(packed["documents"][0])]
        alone = [reward_model.score(model, [document], 1, CPU)[0] for document in documents]
        together = reward_model.score(model, documents, 3, CPU)
    torch.testing.assert_close(torch.tensor(alone), ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(together), ours, rtol=0, atol=1e-5)
    assert ours.dtype == torch.float32 and len(ours) == 12 and ours.std() > 0.05


def test_loss_gradients_and_tokens_equal_trls(tmp_path):
    """TRL's RewardTrainer tokenises the same rows, and on the same weights has our loss, accuracy, margin and gradients."""
    folder = train(tmp_path / "run", rows=PAIRS)
    rows = []
    for row in PAIRS:
        turn = {"chosen": "assistant", "rejected": "assistant", "prompt": "user"}
        rows.append({key: [{"role": turn[key], "content": row[key]}] for key in turn} | {"margin": row.get("margin", 0.0)})
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    settings = trl.RewardConfig(output_dir=str(tmp_path / "trl"), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    trainer = trl.RewardTrainer(theirs, settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    inputs = trainer.data_collator(list(trainer.train_dataset))
    batch = batch_of(PAIRS, tmp_path)
    documents = batch["input_ids"][0].split(batch["documents"][0])
    for n in range(8):
        kept = inputs["input_ids"][n][inputs["attention_mask"][n].bool()]
        assert torch.equal(kept, documents[2 * n if n < 4 else 2 * (n - 4) + 1])

    expected = trainer.compute_loss(theirs.train(), dict(inputs))
    expected.backward()
    ours = load("--model", folder)
    part = reward_model.figures(batch, ours.train().rewards(**batch))
    (part["loss"] / 4).backward()
    torch.testing.assert_close(part["loss"] / 4, expected, rtol=0, atol=1e-6)
    for name in ("accuracy", "margin"):
        assert part[name].item() / 4 == pytest.approx(trainer._metrics["train"][name][0], abs=1e-6)
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name].grad, rtol=1e-4, atol=1e-6, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["as it is", "pad is eos", "no pad token, no unused special token", "the same, and no room"])
def test_transformers_pools_our_scores_from_the_folder(kind, tmp_path):
    """Padded on either side by the saved tokenizer, transformers' own class gives the rewards of --score, plus the offset. Texts
    end with eos (--template none), so that padding with eos would read the token before."""
    flags, tokenizer = ["--template", "none"], common.tiny_tokenizer()
    if kind == "pad is eos":
        tokenizer = without_pad_token(["<|im_start|>", "<|im_end|>", "<|spare|>"])
        tokenizer.pad_token = "<|im_end|>"
        flags += ["--model", save_base(tmp_path / "base", tokenizer, pad_token_id=257)]
    elif kind != "as it is":
        tokenizer = without_pad_token(["<|im_end|>"] + ["<|im_end|>"] * 63)
        if kind == "the same, and no room":
            tokenizer.add_tokens([f"word{n}" for n in range(320 - len(tokenizer))])
        flags += ["--model", save_base(tmp_path / "base", tokenizer, eos_token_id=256, pad_token_id=None)]
    folder = train(tmp_path / "run", *flags)
    config = json.loads((folder / "config.json").read_text())
    theirs, tokenizer = transformers.AutoModelForSequenceClassification.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert config["architectures"] == ["LlamaForSequenceClassification"] and theirs.config.num_labels == 1 and theirs.score.weight.shape == (1, 128)
    assert theirs.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.pad_token == {"as it is": "<|pad|>", "pad is eos": "<|im_start|>"}.get(kind, "<|pad|>")
    assert theirs.get_input_embeddings().weight.shape[0] == (321 if kind == "the same, and no room" else 320)

    texts = [{"prompt": row["prompt"], "response": answer} for row in PAIRS for answer in (row["chosen"], row["rejected"])]
    scored = score(folder, texts, "--model", folder, "--template", "none")
    expected = torch.tensor([row["reward"] for row in scored])
    for side in ("left", "right"):
        tokenizer.padding_side = side
        inputs = tokenizer([row["prompt"] + row["response"] + tokenizer.eos_token for row in texts], padding=True, return_tensors="pt")
        assert (inputs["attention_mask"] == 0).any()
        with torch.no_grad():
            found = theirs(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0]
        torch.testing.assert_close(found - config["reward_offset"], expected, rtol=0, atol=1e-5)


def test_an_adapter_that_could_not_bring_its_pad_token_is_refused(tmp_path):
    tokenizer = without_pad_token(["<|im_end|>"])
    tokenizer.add_tokens([f"word{n}" for n in range(320 - len(tokenizer))])
    base = save_base(tmp_path / "base", tokenizer, eos_token_id=256, pad_token_id=None)
    with pytest.raises(common.UserError, match="no unused special token"):
        train(tmp_path / "run", "--model", base, "--template", "none", "--lora-rank", "2")


def test_the_head_at_the_start():
    """N(0, 1 / (d + 1)), one row, no bias, float32, from the seed alone."""
    one, same, other = (load("--seed", seed, "--lora-rank", rank).score for seed, rank in ((0, 0), (0, 4), (1, 0)))
    assert one.weight.shape == (1, 128) and one.bias is None and one.weight.dtype == torch.float32
    assert one.weight.std().item() == pytest.approx(1 / 129**0.5, rel=0.2)
    assert torch.equal(one.weight, same.weight) and not torch.equal(one.weight, other.weight)


def test_training_goes_on_from_a_reward_model(tmp_path):
    """The head on disk is kept, with every parameter and with a LoRA, in place of a random one."""
    first = train(tmp_path / "first")
    head = load_file(first / "model.safetensors")["score.weight"]
    for flags in ([], ["--lora-rank", "2"]):
        assert torch.equal(load("--model", first, "--seed", "5", *flags).score.weight, head)


def test_only_the_adapter_and_the_head_get_gradients(tmp_path):
    model, batch = load("--lora-rank", "4"), batch_of(PAIRS, tmp_path)
    assert "score" not in " ".join(reward_model.lora_layers(model)) and len(reward_model.lora_layers(model)) == 28
    assert torch.equal(model.rewards(**batch), load().rewards(**batch))  # B is zero: the model at the start is the base
    reward_model.figures(batch, model.rewards(**batch))["loss"].backward()
    for name, p in model.named_parameters():
        assert ("lora_" in name or name == "score.weight") == p.requires_grad == (p.grad is not None), name


def test_peft_loads_the_adapter_and_gives_our_scores(tmp_path):
    folder = train(tmp_path / "run", "--lora-rank", "4")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier", "score"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=tokenizer.pad_token_id).eval()
    scored = score(folder, ANSWERS, "--model", folder / "base", "--adapter", folder)
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in (("Hi", "Hello there."), ("2+2?", "4"))]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        inputs = tokenizer.apply_chat_template(turns, padding=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            found = theirs(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0] - config["reward_offset"]
        torch.testing.assert_close(found, torch.tensor([row["reward"] for row in scored]), rtol=0, atol=1e-5)


def test_training_goes_on_from_adapters(tmp_path):
    """Ours, and PEFT's own of the same form, keep their head; one without a head, as from sft.py, gets a random one."""
    first = train(tmp_path / "a" / "run", "--lora-rank", "4", "--eval-data", write_rows(tmp_path / "held_out.jsonl", PAIRS))
    second = train(tmp_path / "b" / "run", "--adapter", first, "--max-steps", "0", "--eval-data", tmp_path / "held_out.jsonl")
    assert read_metrics(second)[-1]["eval_loss"] == pytest.approx(read_metrics(first)[-1]["eval_loss"], abs=1e-6)
    ours, again = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)

    base = transformers.AutoModelForSequenceClassification.from_pretrained(first / "base", num_labels=1)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "theirs")
    model, head = load("--adapter", tmp_path / "theirs"), theirs.base_model.model.score.modules_to_save["default"].weight
    assert torch.equal(model.score.weight, head) and len(reward_model.lora_layers(model)) == 4
    ids = torch.randint(0, 256, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(reward_model.score(model, ids.tolist(), 1, CPU)), theirs.eval()(ids).logits[0], rtol=0, atol=1e-5)

    headless = {name: tensor for name, tensor in ours.items() if "score" not in name}
    safetensors.torch.save_file(headless, first / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((first / "adapter_config.json").read_text()) | {"modules_to_save": None, "task_type": "CAUSAL_LM"}
    (first / "adapter_config.json").write_text(json.dumps(config))
    assert torch.equal(load("--adapter", first).score.weight, load().score.weight)
    with pytest.raises(common.UserError, match="has no head"):
        score(first, ANSWERS, "--adapter", first)


def test_the_offset_is_the_mean_reward_of_the_best_training_answers(tmp_path):
    rows = [*PAIRS, RANKED]
    folder = train(tmp_path / "run", rows=rows)
    scored = score(folder, rows)
    assert sum(row["rewards"][0] for row in scored) / 5 == pytest.approx(0, abs=1e-5)
    offset = json.loads((folder / "config.json").read_text())["reward_offset"]
    best = [row["rewards"][0] + offset for row in scored]
    assert abs(offset) > 1e-3 and offset == pytest.approx(sum(best) / 5, abs=1e-6)


def test_scores_stand_beside_their_rows_in_order(tmp_path, capsys):
    """Any row with a prompt and an answer, and preference rows; an answer that is cut has a reward, one that is gone has none."""
    folder = train(tmp_path / "run")
    odd = [{"prompt": "x" * 200, "response": "y"}, {"prompt": "x", "response": "y" * 200}, {"prompt": "x", "response": ""}]
    rows = [*ANSWERS, PAIRS[1], RANKED, *odd]
    scored = score(folder, rows, "--model", folder, "--max-length", "128")
    assert [{key: row[key] for key in row if key not in ("reward", "rewards")} for row in scored] == rows
    assert isinstance(scored[0]["reward"], float) and len(scored[2]["rewards"]) == 2 and len(scored[3]["rewards"]) == 4
    assert scored[1]["reward"] == pytest.approx(scored[2]["rewards"][0], abs=1e-6)  # the same prompt and answer
    assert scored[4]["reward"] is None and scored[5]["reward"] is not None and scored[6]["reward"] is not None
    assert "7 rows" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == ["scores.jsonl"]


@pytest.mark.parametrize("row, flags, match", [
    ({"prompt": "Hi"}, [], r"to_score.jsonl:1: no answer"),
    ({"text": "Hi"}, [], r"to_score.jsonl:1: raw text"),
    ({"prompt": "Hi", "response": None}, [], r"to_score.jsonl:1: field 'response' is null"),
    ({"prompt": "Hi", "response": "Ho"}, ["--model", "random"], "random has no head"),
])  # fmt: skip
def test_what_cannot_be_scored_is_an_error(row, flags, match, tmp_path):
    with pytest.raises(common.UserError, match=match):
        score(tmp_path / "run", [row], *(flags or ["--model", "random"]))
    assert not (tmp_path / "scores").exists()


def test_a_classifier_of_several_labels_is_no_reward_model(tmp_path):
    config = common.tiny_model().config.to_dict() | {"num_labels": 3}
    transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**config)).save_pretrained(tmp_path / "base")
    with pytest.raises(common.UserError, match="3 labels"):
        load("--model", tmp_path / "base")


def test_an_identical_pair_teaches_nothing_and_a_cut_one_is_read_at_the_cut(tmp_path):
    """Loss ln 2 and no gradient for answers that are the same, at once or after --max-length."""
    same = {"prompt": "Hi", "chosen": "yes", "rejected": "yes"}
    cut = {"prompt": "Hi", "chosen": "a" * 60 + "b", "rejected": "a" * 60 + "c"}
    for row, flags in ((same, []), (cut, ["--max-length", "50"])):
        model, batch = load(), batch_of([row], tmp_path, *flags)
        assert max(batch["documents"][0]) <= 50 and batch["last"].tolist() == [batch["documents"][0][0] - 1, sum(batch["documents"][0]) - 1]
        part = reward_model.figures(batch, model.rewards(**batch))
        part["loss"].backward()
        assert part["loss"].item() == pytest.approx(math.log(2), abs=1e-6)
        assert max(p.grad.abs().max() for p in model.parameters()) < 1e-5


def test_dropout_is_off_while_training(tmp_path):
    """A base whose attention drops half: the loss of the first step is that of the evaluation before it."""
    base = save_base(tmp_path / "base", common.tiny_tokenizer(), attention_dropout=0.5)
    data = write_rows(tmp_path / "held_out.jsonl", PAIRS)
    folder = train(tmp_path / "run", "--model", base, "--eval-data", data, "--max-steps", "1", rows=PAIRS)
    entries = read_metrics(folder)
    assert transformers.AutoConfig.from_pretrained(folder).attention_dropout == 0.5
    before, logged = (next(entry[name] for entry in entries if name in entry) for name in ("eval_loss", "loss"))
    assert logged == pytest.approx(before, abs=1e-6)


@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
def test_4x1_equals_1x4(packing, tmp_path):
    """The same gradient to float32's precision, with rankings among the pairs: read from Adam's first moment after one step."""

    def gradients(size, accum):
        flags = ["--max-steps", "1", packing, "--max-grad-norm", "0", "--batch-size", size, "--grad-accum", accum]
        folder = train(tmp_path / size, *flags, rows=[*PAIRS[:3], RANKED])
        saved = torch.load(folder / "checkpoint" / "step-00000001" / "optimizer.pt", weights_only=True)
        return {name: state["exp_avg"] for name, state in saved["optimizer"].items()}

    whole, split = gradients("4", "1"), gradients("1", "4")
    assert "score.weight" in whole
    for name in whole:
        torch.testing.assert_close(whole[name], split[name], rtol=0, atol=1e-5 * float(whole[name].abs().max()))


def test_two_ranks_equal_one(tmp_path):
    """Every parameter (FSDP2) and LoRA, over gloo, in one launch; five rows, so that a rank runs out of them."""
    data = write_rows(tmp_path / "rows.jsonl", [*PAIRS, RANKED])
    flags = ["--model", "random", "--data", data, "--eval-data", data, "--samples", "1", "--max-steps", "3", "--log-every", "1"]
    flags += ["--lr", "0.00002", "--max-length", "128"]
    runs = {"full": flags, "lora": [*flags, "--lora-rank", "4"]}
    for name, others in runs.items():
        reward_model.main([*others, "--output", str(tmp_path / "one" / name), "--batch-size", "2", "--grad-accum", "2"])
    halves = ["--batch-size", "1", "--grad-accum", "2"]
    lines = [f"reward_model.main({[*others, '--output', str(tmp_path / 'two' / name), *halves]})" for name, others in runs.items()]
    driver = tmp_path / "driver.py"
    driver.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport reward_model\n" + "\n".join(lines))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(driver)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-3000:]
    for name, file in (("full", "model.safetensors"), ("lora", "adapter_model.safetensors")):
        one, two = load_file(tmp_path / "one" / name / file), load_file(tmp_path / "two" / name / file)
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-6, msg=lambda text: f"{key}: {text}")
        for a, b in zip(read_metrics(tmp_path / "one" / name)[1:-1], read_metrics(tmp_path / "two" / name)[1:-1]):
            assert a["step"] == b["step"] and a.keys() == b.keys()
            for key in a.keys() - {"tokens_per_second", "peak_memory_gib"}:
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
        config = "config.json" if name == "full" else "adapter_config.json"
        offsets = [json.loads((tmp_path / ranks / name / config).read_text())["reward_offset"] for ranks in ("one", "two")]
        assert offsets[0] == pytest.approx(offsets[1], abs=1e-5)


def test_overfits_one_batch(tmp_path):
    """A method that cannot learn five prompts by heart has a bug."""
    folder = train(tmp_path / "run", "--max-steps", "15", "--batch-size", "5", "--lr", "0.001")
    last = [entry for entry in read_metrics(folder) if "loss" in entry][-1]
    assert last["accuracy"] == pytest.approx(1) and last["loss"] < 0.05 and last["margin"] > 3


def test_as_a_newcomer_runs_it(tmp_path, capsys):
    """No flags but a smaller budget: what is promised is on the screen and on the disk, and the printed commands work."""
    output = tmp_path / "runs" / "reward_model"
    run = run_script("reward_model.py", "--output", output, "--max-steps", "4", "--log-every", "2", "--lora-rank", "4")
    assert run.returncode == 0, run.stderr
    promises = ("parameters train", "step 0: held-out loss", "accuracy", "--- before ---", "--- after ---", "answer 2:", "reward_offset")
    for promised in (*promises, str(output)):
        assert promised in run.stdout
    metrics = read_metrics(output)
    logged = next(entry for entry in metrics if "loss" in entry)
    assert logged.keys() == {"step", "epoch", "loss", "accuracy", "margin", "lr", "grad_norm", "tokens", "tokens_per_second", "peak_memory_gib"}
    assert [entry.keys() for entry in metrics if "eval_accuracy" in entry] == [{"step", "eval_loss", "eval_accuracy", "eval_margin"}] * 2
    scoring, peeking = re.findall(r"^  (python .*)$", run.stdout, re.MULTILINE)
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Hello", "response": "Hi."}])
    reward_model.main([data if word == "rows.jsonl" else word for word in shlex.split(scoring)[2:]])
    ours = json.loads((tmp_path / "runs" / "reward_model-scores" / "scores.jsonl").read_text())["reward"]
    capsys.readouterr()
    exec(shlex.split(peeking)[2], {})
    theirs = float(re.search(r"tensor\(\[\[(\S+?)\]\]", capsys.readouterr().out).group(1))
    assert theirs - json.loads((output / "adapter_config.json").read_text())["reward_offset"] == pytest.approx(ours, abs=2e-4)

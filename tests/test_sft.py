"""sft.py: its docstring's example, TRL's SFTTrainer, NEFTune, and both ways to train."""

import json
import math

import datasets
import peft
import pytest
import torch
import transformers
import trl
from conftest import TINY, read_metrics, run_script, write_rows
from safetensors import safe_open
from safetensors.torch import load_file

import common
import sft

CONVERSATIONS = [{"prompt": "Hi", "completion": "Yo"}, {"prompt": "2+2?", "completion": "4"}]
ROWS = [{"prompt": f"Say {c} {n}.", "completion": c * n} for c in "abcdef" for n in (1, 3, 5)]
CPU = torch.device("cpu")


@pytest.fixture
def train(random_model, tmp_path):
    """name, more flags -> the output folder of three steps"""
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    three = "--max-steps 3 --batch-size 6 --lr 0.002 --samples 0 --eval-data 0.2".split()

    def run(name, *more):
        start = ["--model", random_model, "--data", data, "--output", str(tmp_path / name)]
        sft.main([*start, *three, *map(str, more)])
        return tmp_path / name

    return run


@pytest.fixture
def arguments(monkeypatch, tmp_path):
    """rows, more flags -> what sft.train gets from the command line"""

    def parse(rows, *more):
        seen, data = [], write_rows(tmp_path / "some.jsonl", rows)
        with monkeypatch.context() as patch:
            patch.setattr(sft, "train", seen.append)
            sft.main(["--model", TINY, "--data", data, "--eval-data", "0", *map(str, more)])
        return seen[0]

    return parse


def examples_of(args) -> dict:
    return common.load_data(args, common.load_tokenizer(args))[0][:]


def one_pass(args) -> dict:
    """All rows in one forward pass, in the order of the file."""
    columns = examples_of(args)
    rows = range(len(columns["input_ids"]))
    examples = [{name: column[i] for name, column in columns.items()} for i in rows]
    return common.collate(examples, args.no_packing, CPU)


# ------------------------------------------------------------------------------------ masks


def worked_example(batch) -> str:
    """The table of sft.py's docstring, from the batch that the model gets."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    ids, positions = batch["input_ids"][0].tolist(), batch["position_ids"][0].tolist()
    documents = (torch.tensor(positions) == 0).cumsum(0).tolist()
    target = [i - 1 in batch["target_index"].tolist() for i in range(len(ids))]
    lines, start = ["    document  positions  target  text"], 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or (documents[i], target[i]) != (documents[start], target[start]):
            span = f"{positions[start]:2} .. {positions[i - 1]:2}"
            text = tokenizer.decode(ids[start:i]).replace("\n", "\\n")
            is_target = "yes" if target[start] else "no"
            lines.append(f"    {documents[start]:8}  {span:9}  {is_target:6}  {text}")
            start = i
    return "\n".join(lines) + "\n"


def test_the_worked_example_is_what_the_code_makes(arguments):
    batch = one_pass(arguments(CONVERSATIONS))
    assert worked_example(batch) in sft.__doc__
    assert batch["targets"].tolist() == batch["input_ids"][0, batch["target_index"] + 1].tolist()
    assert batch["stretches"].lengths == [24, 25]


@pytest.mark.parametrize("more", [[], ["--no-packing"]])
def test_loss_on_all_takes_every_token_but_the_first(more, arguments):
    args = arguments(CONVERSATIONS, "--loss-on", "all", *more)
    documents = examples_of(args)["input_ids"]
    batch = one_pass(args)
    assert batch["targets"].tolist() == [int(x) for ids in documents for x in ids[1:]]
    width = max(map(len, documents)) if more else None
    starts = [0, width or len(documents[0])]
    expected = [start + i for start, ids in zip(starts, documents) for i in range(len(ids) - 1)]
    assert batch["target_index"].tolist() == expected


# -------------------------------------------------------------------------------- the judge

# ChatML, with the targets marked for TRL.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def trl_trainer(rows, folder, tokenizer, **settings):
    config = trl.SFTConfig(
        str(folder), per_device_train_batch_size=len(rows), report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, max_length=512, **settings,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    table = datasets.Dataset.from_list(rows)
    return trl.SFTTrainer(model, config, train_dataset=table, processing_class=tokenizer)


def assert_same_loss_and_gradient(batch, trainer, args):
    ours = common.load_model(args, torch.float32, CPU, torch.float32)
    loss = -ours.target_logps(**batch).mean()
    inputs = trainer.data_collator(list(trainer.train_dataset))
    expected = trainer.compute_loss(trainer.model.train(), inputs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    theirs = dict(trainer.model.named_parameters())
    for name, p in ours.named_parameters():
        scale = theirs[name].grad.abs().max().item()
        torch.testing.assert_close(
            p.grad, theirs[name].grad, rtol=0, atol=1e-5 * scale, msg=lambda text, n=name: n + text
        )


JUDGED = [{"prompt": f"Say {c}: ", "completion": c * n + "!"} for c in "ab" for n in (1, 7)]


@pytest.mark.parametrize("packing", [[], ["--no-packing"]])
@pytest.mark.parametrize("loss_on", ["answers", "all"])
def test_loss_and_gradient_are_those_of_trls_trainer(loss_on, packing, arguments, tmp_path):
    """On conversations, with the answers marked by the template."""
    args = arguments(JUDGED, "--loss-on", loss_on, *packing)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = MARKED
    roles = ("prompt", "user"), ("completion", "assistant")
    rows = [
        {"messages": [{"role": role, "content": row[key]} for key, role in roles]} for row in JUDGED
    ]
    trainer = trl_trainer(rows, tmp_path, tokenizer, assistant_only_loss=loss_on == "answers")
    batch = one_pass(args)
    if loss_on == "all":  # TRL also predicts the line break that the template writes at the end
        inputs = trainer.data_collator(list(trainer.train_dataset))
        ends = inputs["attention_mask"].sum(1) - 1
        inputs["labels"][range(len(ends)), ends] = -100
        trainer.data_collator = lambda rows: inputs
    assert_same_loss_and_gradient(batch, trainer, args)


def test_prompt_and_completion_rows_are_those_of_trls_trainer(arguments, tmp_path):
    """Without a template, strings are joined and eos follows the completion."""
    args = arguments(JUDGED, "--template", "none")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = None
    trainer = trl_trainer(JUDGED, tmp_path, tokenizer)
    assert_same_loss_and_gradient(one_pass(args), trainer, args)


# ---------------------------------------------------------------------------------- NEFTune


@pytest.mark.parametrize("packing", [[], ["--no-packing"]])
def test_neftune_is_uniform_with_each_documents_own_length_and_only_in_training(packing, arguments):
    """Of a size that falls with the square root of length times width."""
    args = arguments([{"prompt": "a", "completion": "b" * n} for n in (1, 300)], *packing)
    batch, model = one_pass(args), common.load_model(args, torch.float32, CPU)
    seen, plain = [], model.eval().target_logps(**batch)
    sft.add_neftune(model, alpha=5.0)
    assert torch.equal(plain, model.target_logps(**batch))
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    noisy = model.train().target_logps(**batch)
    noise = (seen[0] - model.get_input_embeddings()(batch["input_ids"])).detach()  # (B, T, d)
    if packing:
        lengths = batch["attention_mask"].sum(1).tolist()
        parts = [row[:length] for row, length in zip(noise, lengths)]
    else:
        lengths = batch["stretches"].lengths
        parts = noise[0].split(lengths)
    assert len(lengths) == 2 and max(lengths) > 10 * min(lengths)
    for length, part in zip(lengths, parts):
        bound = 5 / math.sqrt(length * 128)
        assert 0.99 * bound < part.abs().max() <= bound * 1.0001
        assert part.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert part.mean().abs() < 0.05 * bound
    assert not torch.equal(plain, noisy) and noisy.requires_grad


def test_neftune_reaches_no_evaluation(train):
    """The first held-out loss is that of a run without it; the first training loss is not."""
    plain, noisy = (
        {key: x for line in reversed(read_metrics(folder)) for key, x in line.items()}
        for folder in (train("plain"), train("noisy", "--neftune", 20))
    )
    assert plain["eval_loss"] == noisy["eval_loss"] and plain["loss"] != noisy["loss"]


# ------------------------------------------------------------------------------ both results


@torch.no_grad()
def logits(model):
    return model.eval()(torch.arange(40)[None]).logits


def test_a_whole_model_is_saved_as_transformers_loads_it(train, random_model):
    folder = train("run", "--neftune", 5)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(random_model)
    assert model.config.architectures == ["LlamaForCausalLM"] and model.dtype == torch.float32
    assert (logits(model) - logits(base)).abs().max() > 1e-3
    weights, before = load_file(folder / "model.safetensors"), base.state_dict()
    assert [name for name, x in weights.items() if torch.equal(x, before[name])] == []
    assert (folder / "chat_template.jinja").exists()


def test_lora_rank_saves_what_peft_loads_and_an_adapter_continues(train, random_model):
    first = train("a", "--lora-rank", 4, "--lora-alpha", 6, "--targets", "q_proj,up_proj",
                  "--lr", 0.01)  # fmt: skip
    config = json.loads((first / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    base = transformers.AutoModelForCausalLM.from_pretrained(random_model)
    before = logits(base)
    model = peft.PeftModel.from_pretrained(base, first)
    assert (logits(model) - before).abs().max() > 1e-3
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 4
    with safe_open(first / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["base_fingerprint"]

    second = train("b", "--adapter", first)  # --lora-rank is the adapter's own
    config = json.loads((second / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (4, ["q_proj", "up_proj"])
    old, new = (
        [line["eval_loss"] for line in read_metrics(folder) if "eval_loss" in line]
        for folder in (first, second)
    )
    assert new[0] == pytest.approx(old[-1], abs=1e-6)
    saved = load_file(second / "adapter_model.safetensors").values()
    assert sum(x.numel() for x in saved) == 4 * (2 * 128 + 2 * 192)


def test_offload_equals_the_plain_run(train):
    plain, offloaded = (
        load_file(train(name, *more, "--lr", 0.0005) / "model.safetensors")
        for name, more in (("a", []), ("b", ["--offload"]))
    )
    for name, tensor in plain.items():
        torch.testing.assert_close(tensor, offloaded[name], rtol=0, atol=1e-6, msg=name)


def test_as_a_newcomer_runs_it(tmp_path):
    run = run_script("sft.py", "--max-steps", 2, "--samples", 1, "--lora-rank", 2, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    folder = tmp_path / "runs" / "demo" / "sft"
    assert (folder / "adapter_model.safetensors").exists() and read_metrics(folder)[-1]["done"]
    assert "--- before training ---" in run.stdout and "Traceback" not in run.stderr

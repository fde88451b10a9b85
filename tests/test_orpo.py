"""orpo.py: its loss against closed forms and TRL, shared prompts, whole runs."""

import itertools
import math
import types

import numpy as np
import pytest
import torch
import transformers
from conftest import TINY, read_metrics, write_rows
from pairs import (
    CPU,
    KINDS,
    PAIRS,
    WAYS,
    arguments,
    assert_same_gradients,
    attention_of,
    documents,
    examples_of,
    one_pass,
    own_logps,
)
from trl.experimental.orpo import ORPOTrainer

import common
import orpo


def load(args):
    return common.load_model(args, torch.float32, CPU, torch.float32)


def test_the_loss_is_the_closed_form():
    draw = torch.Generator().manual_seed(0)
    pw, pl = -3 * torch.rand(2, 9, generator=draw, dtype=torch.float64) - 1e-3
    losses = orpo.orpo_loss(pw, pl, chosen_nll=-pw, lambda_=0.3)
    for n in range(9):
        odds = [math.exp(p[n]) / (1 - math.exp(p[n])) for p in (pw, pl)]
        expected = -pw[n].item() - 0.3 * math.log(1 / (1 + odds[1] / odds[0]))
        assert losses[n].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("p", [0.0, -1e-9, -1e-4, -math.log(2), -1.0, -50.0, -1e4])
def test_log1mexp_is_right_from_certain_to_impossible_and_its_gradient_finite(p):
    x = torch.tensor(p, requires_grad=True)
    orpo.log1mexp(x).backward()
    expected = math.log(-math.expm1(min(p, -1e-6)))
    assert orpo.log1mexp(x).item() == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert math.isfinite(x.grad.item())


def test_loss_and_gradients_of_an_answer_that_is_certain_are_finite():
    chosen = torch.tensor([0.0, -1e-8], requires_grad=True)
    rejected = torch.tensor([-700.0, 0.0], requires_grad=True)
    orpo.orpo_loss(chosen, rejected).sum().backward()
    assert chosen.grad.isfinite().all() and rejected.grad.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss_on", ["all", "answers"])
def test_shared_prompts_change_no_loss_and_no_gradient(loss_on, kind, way, tmp_path):
    """Against every answer alone with its prompt, through transformers' own forward pass in
    float64: the loss to 1e-6 and gradients to 1e-5. The NLL is that of prompt and best answer."""
    more = ["--no-packing"] if way == "padded" else []
    args = arguments(orpo, tmp_path, KINDS[kind], "--loss-on", loss_on, *more)
    examples, ours = examples_of(args), load(args)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float64)
    odds, nll, count = 0.0, 0.0, 0
    for answers in documents(examples):
        logps = [own_logps(theirs, *answer) for answer in answers]
        p = [x.mean() for x in logps]
        pairs = [orpo.orpo_loss(a, b) for a, b in itertools.combinations(p, 2)]
        odds = odds + torch.stack(pairs).mean()
        best = own_logps(theirs, answers[0][0]) if loss_on == "all" else logps[0]
        nll, count = nll - best.sum(), count + len(best)
    expected = nll / count + odds / len(examples["prompt"])
    expected.backward()
    with attention_of(way):
        batch, scale = one_pass(examples, way), orpo.prompts_per_token(examples)
        figures = orpo.pair_figures(ours, batch, scale, args)
        loss = figures["loss"] / len(examples["prompt"])
        loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("way", ["loop", "padded"])
def test_loss_and_gradients_are_trls_on_the_same_rows(way, tmp_path):
    args = arguments(orpo, tmp_path, PAIRS[:6], *["--no-packing"] * (way == "padded"))
    examples, model = examples_of(args), load(args)
    batch, scale = one_pass(examples, way), orpo.prompts_per_token(examples)
    figures = {k: x / 6 for k, x in orpo.pair_figures(model, batch, scale, args).items()}
    figures["loss"].backward()

    trainer = ORPOTrainer.__new__(ORPOTrainer)  # its loss, on our token ids and labels
    trainer.beta, trainer.is_encoder_decoder = 0.1, False
    trainer.padding_value, trainer.aux_loss_enabled = 258, False
    gather = lambda x: x  # noqa: E731
    trainer.accelerator = types.SimpleNamespace(device=CPU, gather_for_metrics=gather)
    theirs, pairs = {}, list(documents(examples))
    for n, side in enumerate(("chosen", "rejected")):
        ids, starts = zip(*(pair[n] for pair in pairs))
        labels = [torch.cat([torch.full((s,), -100), x[s:]]) for x, s in zip(ids, starts)]
        masks = [torch.ones_like(x) for x in ids]
        for name, values, fill in (
            ("input_ids", ids, 258),
            ("attention_mask", masks, 0),
            ("labels", labels, -100),
        ):
            padded = torch.nn.utils.rnn.pad_sequence(values, True, fill)
            theirs[f"{side}_{name}"] = padded
    other = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    loss, metrics = trainer.get_batch_loss_metrics(other, theirs)
    loss.backward()
    assert figures["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for ours, name in (("log_odds", "log_odds_chosen"), ("chosen_logps", "logps/chosen")):
        assert figures[ours].item() == pytest.approx(float(metrics[name]), rel=1e-3, abs=1e-5)
    assert_same_gradients(model, other, rel=3e-5)


@pytest.fixture
def run(random_model, tmp_path):
    """name, more flags -> the output folder of three steps"""
    data = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    three = "--max-steps 3 --batch-size 4 --lr 0.001 --samples 0 --eval-data 0.3".split()

    def start(name, *more):
        output = ["--model", random_model, "--data", data, "--output", str(tmp_path / name)]
        orpo.main([*output, *three, *map(str, more)])
        return tmp_path / name

    return start


WHOLE = {
    "full": [], "LoRA": ["--lora-rank", 4], "answers": ["--no-packing", "--loss-on", "answers"],
    "4 bits": ["--load-in-4bit", "--lora-rank", 4],
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_a_run_raises_the_chosen_over_the_rejected(name, run):
    entries = read_metrics(run("run", "--max-steps", 25, "--lambda", 1, *WHOLE[name]))
    logged = [entry for entry in entries if "loss" in entry]
    names = {"nll", "odds_loss", "log_odds", "accuracy", "chosen_logps", "rejected_logps"}
    assert all(names <= entry.keys() for entry in logged)
    for entry in logged:
        assert entry["loss"] == pytest.approx(entry["nll"] + entry["odds_loss"], rel=1e-5)
    before, after = (entry for entry in entries if "eval_accuracy" in entry)
    assert logged[-1]["nll"] < logged[0]["nll"]
    assert after["eval_log_odds"] > before["eval_log_odds"]


@pytest.mark.parametrize("more", [[], ["--lora-rank", 4]])
def test_losses_do_not_depend_on_the_passes(more, run):
    runs = []
    for n, flags in enumerate(([], ["--micro-batch-tokens", 100], ["--no-packing"])):
        runs.append(read_metrics(run(f"run{n}", "--lr", 1e-5, *flags, *more))[1:-1])
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            for key in a.keys() - {"tokens_per_second", "peak_memory_gib"}:
                rel = 1e-6 if a["step"] < 2 else 1e-5
                assert b[key] == pytest.approx(a[key], rel=rel, abs=2e-6), key


def test_the_held_out_nll_is_the_mean_over_all_its_tokens(run, random_model):
    """Not a mean of means: the held-out prompts differ in length."""
    rows = [{"prompt": "a" * n, "chosen": "b", "rejected": "c"} for n in (1, 90)]
    data = write_rows(run("first").parent / "held_out.jsonl", rows)
    folder = run("run", "--eval-data", data, "--max-steps", 0)
    (entry,) = [entry for entry in read_metrics(folder) if "eval_nll" in entry]
    model = transformers.AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(random_model)
    nll = count = 0
    for row in rows:
        text = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
        with torch.no_grad():
            logps = own_logps(model, torch.tensor(tokenizer(text).input_ids))
        nll, count = nll - logps.sum().item(), count + len(logps)
    assert entry["eval_nll"] == pytest.approx(nll / count, rel=1e-6)
    assert np.isfinite(entry["eval_loss"])

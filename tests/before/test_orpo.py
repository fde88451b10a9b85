"""orpo.py: its loss against TRL's and closed forms, stable at both ends, and whole runs."""

import math
import types

import numpy as np
import pytest
import torch
from before import read_metrics, write_rows
from safetensors.torch import load_file
from test_dpo import PAIRS, arguments, one_batch
from trl.experimental.orpo import ORPOTrainer

import common_before as common
import orpo

FEW = ["--max-steps", "3", "--batch-size", "2", "--samples", "0", "--log-every", "1", "--lr", "1e-3", "--eval-fraction", "0.3"]


def flags(tmp_path, name, *more):
    return ["--data", write_rows(tmp_path / "pairs.jsonl", PAIRS), "--output", str(tmp_path / name), *FEW, *map(str, more)]


def ready(tmp_path, rows, *more, nll_on="all"):
    args = arguments(tmp_path, rows, *more)
    args.lambda_, args.nll_on = 0.1, nll_on
    return args, common.load_model(args, torch.float32, torch.device("cpu")), one_batch(args)


def test_the_loss_is_the_closed_form():
    pw, pl = -3 * torch.rand(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1e-3
    losses = orpo.orpo_loss(pw, pl, chosen_nll=-pw, lambda_=0.3)
    for n in range(9):
        odds = [math.exp(p[n]) / (1 - math.exp(p[n])) for p in (pw, pl)]
        expected = -pw[n].item() - 0.3 * math.log(1 / (1 + odds[1] / odds[0]))
        assert losses[n].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("p", [0.0, -1e-9, -1e-4, -math.log(2), -1.0, -50.0, -1e4])
def test_log1mexp_is_finite_and_right_from_certain_to_impossible_with_its_gradient(p):
    x = torch.tensor(p, requires_grad=True)
    orpo.log1mexp(x).backward()
    exact = min(p, -1e-6)
    assert orpo.log1mexp(x).item() == pytest.approx(math.log(-math.expm1(exact)), rel=1e-5, abs=1e-12)
    assert math.isfinite(x.grad.item())


def test_loss_and_gradients_of_an_answer_that_is_certain_are_finite():
    chosen, rejected = torch.tensor([0.0, -1e-8], requires_grad=True), torch.tensor([-700.0, 0.0], requires_grad=True)
    orpo.orpo_loss(chosen, rejected).sum().backward()
    assert chosen.grad.isfinite().all() and rejected.grad.isfinite().all()


@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
def test_loss_and_gradients_are_trls_on_the_same_rows(packing, tmp_path):
    args, model, batch = ready(tmp_path, PAIRS[:6], packing)
    per_token = 6 / orpo.nll_tokens(args, [batch])
    sums = orpo.figures(args, model, batch, per_token)
    (sums["loss"] / 6).backward()

    trainer = ORPOTrainer.__new__(ORPOTrainer)  # its loss, on token ids and labels that stand still
    trainer.beta, trainer.is_encoder_decoder, trainer.padding_value, trainer.aux_loss_enabled = 0.1, False, 258, False
    trainer.accelerator = types.SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x)
    corpus, _ = common.load_data(args, common.tiny_tokenizer(), 320, kind="preferences")
    theirs = {}
    for n, side in enumerate(("chosen", "rejected")):
        documents = [corpus.table[int(best) + n] for best in np.flatnonzero(corpus.answers)]
        width = max(len(d["input_ids"]) for d in documents)
        pad = lambda values, fill: torch.tensor([list(v) + [fill] * (width - len(v)) for v in values])  # noqa: E731
        theirs[f"{side}_input_ids"] = pad([d["input_ids"] for d in documents], 258)
        theirs[f"{side}_attention_mask"] = pad([[1] * len(d["input_ids"]) for d in documents], 0)
        theirs[f"{side}_labels"] = pad([np.where(d["is_target"], d["input_ids"], -100) for d in documents], -100)
    other = common.tiny_model()
    loss, metrics = trainer.get_batch_loss_metrics(other, theirs)
    loss.backward()
    assert (sums["loss"] / 6).item() == pytest.approx(loss.item(), rel=1e-5)
    assert (sums["log_odds"] / 6).item() == pytest.approx(float(metrics["log_odds_chosen"]), rel=1e-3, abs=1e-5)
    assert (sums["chosen_logps"] / 6).item() == pytest.approx(float(metrics["logps/chosen"]), rel=1e-5)
    assert (sums["margin"] / 6).item() == pytest.approx(float(metrics["rewards/margins"]), rel=1e-3, abs=1e-6)
    for ours, his in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(ours.grad, his.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("nll_on", ["all", "answers"])
def test_nll_is_that_of_transformers_on_the_chosen_rows(nll_on, tmp_path):
    rows = [*PAIRS[:3], {"prompt": "q", "responses": ["aa", "b", "cccc"]}]
    args, model, batch = ready(tmp_path, rows, nll_on=nll_on)
    per_token = 4 / orpo.nll_tokens(args, [batch])
    ours = orpo.figures(args, model, batch, per_token)["nll"].item() / 4
    corpus, _ = common.load_data(args, common.tiny_tokenizer(), 320, kind="preferences")
    total = count = 0
    with torch.no_grad(), common.attention(model, model.padded_attention):
        for best in np.flatnonzero(corpus.answers):
            document = corpus.table[int(best)]
            ids = torch.from_numpy(document["input_ids"]).long()[None]
            labels = ids if nll_on == "all" else ids.masked_fill(~torch.from_numpy(document["is_target"].astype(bool))[None], -100)
            targets = int((labels[:, 1:] != -100).sum())
            total, count = total + model(input_ids=ids, labels=labels).loss.item() * targets, count + targets
    assert ours == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("more", [(), ("--lora-rank", 4), ("--no-packing", "--nll-on", "answers")])
def test_a_run_raises_the_chosen_over_the_rejected(more, tmp_path):
    orpo.main(flags(tmp_path, "run", "--max-steps", 25, "--lambda", 1, *more))
    entries = read_metrics(tmp_path / "run")
    logged = [entry for entry in entries if "loss" in entry]
    names = {"nll", "odds_loss", "log_odds", "accuracy", "margin", "chosen_logps", "rejected_logps"}
    assert all(names <= entry.keys() for entry in logged)
    for entry in logged:
        assert entry["loss"] == pytest.approx(entry["nll"] + entry["odds_loss"], rel=1e-5)
    held_out = [entry for entry in entries if "eval_accuracy" in entry]
    assert logged[-1]["nll"] < logged[0]["nll"] and held_out[-1]["eval_log_odds"] > held_out[0]["eval_log_odds"]


def test_the_split_into_micro_batches_changes_no_gradient(tmp_path):
    for name, size, accum in (("a", 4, 1), ("b", 1, 4), ("c", 2, 2)):
        orpo.main([*flags(tmp_path, name), "--batch-size", str(size), "--grad-accum", str(accum), "--max-steps", "2", "--lr", "1e-5"])
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-6)
        torch.testing.assert_close(a[key], c[key], rtol=0, atol=1e-6)

"""dpo.py: its losses against TRL and closed forms, the reference in its three places, and whole runs."""

import math
import types

import datasets
import numpy as np
import pytest
import torch
import trl
from before import read_metrics, write_rows
from safetensors.torch import load_file
from trl.experimental.cpo import CPOTrainer

import common_before as common
import dpo

PAIRS = [{"prompt": f"Say {c}.", "chosen": c * n, "rejected": "no " * n + c} for n in (1, 2, 5) for c in "abcd"]
# no line break behind the end of turn: TRL would make it a target
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")  # fmt: skip
FEW = ["--max-steps", "3", "--batch-size", "2", "--samples", "0", "--log-every", "1", "--lr", "1e-3", "--eval-fraction", "0.3"]


def flags(tmp_path, name, *more):
    return ["--data", write_rows(tmp_path / "pairs.jsonl", PAIRS), "--output", str(tmp_path / name), *FEW, *map(str, more)]


def arguments(tmp_path, rows, *more):
    parser = common.make_parser("doc")
    dpo.add_training_flags(parser)
    parser.set_defaults(data=[write_rows(tmp_path / "rows.jsonl", rows)], eval_fraction=0.0, output=str(tmp_path / "out"), batch_size=len(rows))
    parser.set_defaults(beta=0.1, loss="sigmoid", label_smoothing=0.0, gamma=1.0, reference=None)
    return parser.parse_args(list(map(str, more)))


def one_batch(args, tokenizer=None):
    """All rows of --data in their order, as one micro-batch."""
    tokenizer = tokenizer or common.tiny_tokenizer()
    corpus, _ = common.load_data(args, tokenizer, 320, kind="preferences")
    corpus.order = lambda epoch: np.flatnonzero(corpus.answers)
    return next(corpus.deal(corpus.rows()))


def models(args):
    """A policy some way off the reference, and the reference."""
    reference, policy = (common.load_model(args, torch.float32, torch.device("cpu")) for _ in range(2))
    torch.manual_seed(1)
    for p in policy.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return policy, reference


# ------------------------------------------------------------------------------------------------------ the losses


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_closed_form_and_ln_2_where_policy_and_reference_agree(smoothing):
    draw = torch.Generator().manual_seed(0)
    pc, pr, rc, rr = 30 * torch.randn(4, 7, generator=draw, dtype=torch.float64)
    losses = dpo.dpo_loss(pc, pr, rc, rr, 0.1, smoothing)
    for n in range(7):
        h = 0.1 * ((pc[n] - rc[n]) - (pr[n] - rr[n])).item()
        expected = -(1 - smoothing) * math.log(1 / (1 + math.exp(-h))) - smoothing * math.log(1 / (1 + math.exp(h)))
        assert losses[n].item() == pytest.approx(expected, rel=1e-12)
    assert dpo.dpo_loss(pc, pr, pc, pr, 0.1, smoothing).tolist() == pytest.approx([math.log(2)] * 7, rel=1e-12)


def test_a_hopeless_pair_has_a_finite_loss_and_gradient():
    pc = torch.tensor([-1e4], requires_grad=True)
    loss = dpo.dpo_loss(pc, *torch.zeros(3, 1), beta=1.0).sum()
    loss.backward()
    assert loss.item() == pytest.approx(1e4) and pc.grad.item() == pytest.approx(-1.0)


def test_ipo_wants_a_log_ratio_of_one_half_over_beta():
    zero = torch.zeros(1)
    assert dpo.ipo_loss(zero + 5.0, zero, zero, zero, 0.1).item() == 0
    assert dpo.ipo_loss(zero, zero, zero, zero, 0.1).item() == pytest.approx(25)


def test_simpo_is_that_of_trls_cpo_trainer():
    chosen, rejected = torch.randn(2, 5) - 2
    theirs = CPOTrainer.__new__(CPOTrainer)
    theirs.beta, theirs.simpo_gamma, theirs.alpha, theirs.label_smoothing, theirs.loss_type = 2.0, 1.2, 0.0, 0.0, "simpo"
    theirs.accelerator = types.SimpleNamespace(device=torch.device("cpu"))
    torch.testing.assert_close(dpo.simpo_loss(chosen, rejected, 2.0, 1.2), theirs.cpo_loss(chosen, rejected)[0])


@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_loss_and_gradients_are_trls_on_the_same_rows(kind, packing, tmp_path):
    args = arguments(tmp_path, PAIRS[:5], packing)
    args.loss = kind
    tokenizer = common.tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    batch, (policy, reference) = one_batch(args, tokenizer), models(args)
    with torch.no_grad():
        start = dpo.answer_logps(reference, batch)[0]
    sums = dpo.figures(args, batch, *dpo.answer_logps(policy, batch), start)
    (sums["loss"] / 5).backward()

    def turns(text, role):
        return [{"role": role, "content": text}]

    rows = [{"prompt": turns(row["prompt"], "user")} | {key: turns(row[key], "assistant") for key in ("chosen", "rejected")} for row in PAIRS[:5]]
    config = trl.DPOConfig(str(tmp_path), loss_type=[kind], beta=0.1, per_device_train_batch_size=5, report_to=[], use_cpu=True,
                           disable_dropout=True, bf16=False, gradient_checkpointing=False, max_length=None)  # fmt: skip
    theirs, fixed = common.tiny_model(), common.tiny_model()
    theirs.load_state_dict(policy.state_dict())
    fixed.load_state_dict(reference.state_dict())
    trainer = trl.DPOTrainer(theirs, fixed, config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    loss = trainer.compute_loss(theirs, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    assert (sums["loss"] / 5).item() == pytest.approx(loss.item(), rel=1e-5)
    for ours, other in zip(policy.parameters(), theirs.parameters()):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_ranked_answers_are_all_their_pairs_and_count_as_one_prompt(tmp_path):
    args = arguments(tmp_path, [{"prompt": "q", "responses": ["aa", "b", "cccc"]}, {"prompt": "r", "chosen": "x", "rejected": "y"}])
    batch, (policy, reference) = one_batch(args), models(args)
    with torch.no_grad():
        now, start = dpo.answer_logps(policy, batch)[0], dpo.answer_logps(reference, batch)[0]
        h = (now - start).double().tolist()
        total = dpo.figures(args, batch, *dpo.answer_logps(policy, batch), start)
    minus_log_sigmoid = lambda x: math.log(1 + math.exp(-x))  # noqa: E731
    ranked = [minus_log_sigmoid(0.1 * (h[i] - h[j])) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert total["loss"].item() == pytest.approx(sum(ranked) / 3 + minus_log_sigmoid(0.1 * (h[3] - h[4])), rel=1e-6)
    right = [(h[i] > h[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert total["accuracy"].item() == pytest.approx(sum(right) / 3 + (h[3] > h[4]))


def test_both_answers_carry_the_same_prompt_tokens_and_only_answers_are_targets(tmp_path):
    rows = [*PAIRS[:3], {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "猫🐈"}],
                         "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "no"}]}]  # fmt: skip
    for template in (None, "none"):
        args = arguments(tmp_path, rows)
        args.template = template
        corpus, _ = common.load_data(args, common.tiny_tokenizer(), 320, kind="preferences")
        for row in corpus.rows():
            documents = [corpus.table[n] for n in row]
            starts = [int(d["is_target"].argmax()) for d in documents]
            assert starts[0] == starts[1]
            assert documents[0]["input_ids"][: starts[0]].tolist() == documents[1]["input_ids"][: starts[1]].tolist()
            for document in documents:
                ids = document["input_ids"][document["is_target"].astype(bool)]
                assert ids[-1] == common.tiny_tokenizer().eos_token_id


# --------------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("more", [(), ("--lora-rank", 4), ("--no-packing",), ("--label-smoothing", 0.2)])
def test_a_run_begins_at_ln_2_and_learns_its_pairs(more, tmp_path):
    dpo.main(flags(tmp_path, "run", "--max-steps", 20, *more))
    entries = read_metrics(tmp_path / "run")
    logged = [entry for entry in entries if "loss" in entry]
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and logged[-1]["loss"] < 0.6
    names = {"accuracy", "margin", "chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards"}
    assert all(names <= entry.keys() for entry in logged) and logged[-1]["accuracy"] >= 0.5
    held_out = [entry for entry in entries if "eval_accuracy" in entry]
    assert held_out[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-4) and held_out[0]["eval_margin"] == 0
    assert held_out[-1]["eval_accuracy"] == 1.0
    assert abs(logged[-1]["chosen_rewards"] - logged[-1]["rejected_rewards"] - logged[-1]["margin"]) < 1e-5


def test_the_three_references_give_the_same_losses_where_they_are_the_same_model(tmp_path):
    """A fresh adapter switched off, a frozen copy of an adapter that does nothing, and another name for the base."""
    dpo.main(flags(tmp_path, "none", "--lora-rank", 4, "--max-steps", 0))
    dpo.main(flags(tmp_path, "fresh", "--lora-rank", 4))
    dpo.main(flags(tmp_path, "copy", "--adapter", tmp_path / "none"))
    dpo.main(flags(tmp_path, "named", "--lora-rank", 4, "--reference", "random"))
    losses = [[entry["loss"] for entry in read_metrics(tmp_path / name) if "loss" in entry] for name in ("fresh", "copy", "named")]
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], abs=1e-5) and losses[0][-1] != losses[0][0]


def test_a_trained_adapter_is_its_own_reference_and_stays_frozen(tmp_path):
    dpo.main(flags(tmp_path, "first", "--lora-rank", 4))
    dpo.main(flags(tmp_path, "second", "--adapter", tmp_path / "first"))
    logged = [entry["loss"] for entry in read_metrics(tmp_path / "second") if "loss" in entry]
    assert logged[0] == pytest.approx(math.log(2), abs=1e-4) and logged[-1] < logged[0]
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_full_parameter_log_probabilities_are_kept_on_disk_and_used_again(tmp_path, monkeypatch):
    dpo.main(flags(tmp_path, "run"))
    kept = load_file(tmp_path / "run" / "reference.safetensors")["logps"]
    args = arguments(tmp_path, PAIRS)
    with torch.no_grad():
        expected = dpo.answer_logps(common.load_model(args, torch.float32, torch.device("cpu")), one_batch(args))[0]
    known = kept != 0
    assert known.sum() >= 12
    torch.testing.assert_close(kept[known], expected[known], rtol=1e-5, atol=1e-4)

    model, (corpus, evaluation) = common.load_model(args, torch.float32, torch.device("cpu")), common.load_data(
        args, common.tiny_tokenizer(), 320, kind="preferences")  # fmt: skip
    dpo.kept_reference(args, model, corpus, evaluation, torch.float32)
    monkeypatch.setattr(dpo, "answer_logps", lambda *_: pytest.fail("computed again"))
    dpo.kept_reference(args, model, corpus, evaluation, torch.float32)
    args.max_steps, corpus.rows_per_step = 1, 4  # fewer rows are needed: not the same file
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        dpo.kept_reference(args, model, corpus, evaluation, torch.float32)


def test_a_policy_that_is_not_its_reference_is_refused_at_step_0(tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "kept_reference", lambda *_: lambda batch: torch.zeros(len(batch["last"])))
    with pytest.raises(common.UserError, match="not ln 2"):
        dpo.main(flags(tmp_path, "run"))


def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path, monkeypatch):
    more = ("--max-steps", 6, "--save-every", 2, "--eval-every", 3)
    dpo.main(flags(tmp_path, "whole", *more))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        original = common.Run.end_step
        patch.setattr(common.Run, "end_step", lambda self, *a: original(self, *a) if self.step < 5 else (_ for _ in ()).throw(KeyboardInterrupt))
        dpo.main(flags(tmp_path, "parts", *more))
    dpo.main(flags(tmp_path, "parts", *more, "--resume"))
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_dropout_is_off(tmp_path):
    args = arguments(tmp_path, PAIRS[:2])
    model = common.load_model(args, torch.float32, torch.device("cpu"))
    model.model.layers[0].self_attn.attention_dropout = 0.5
    model.model.layers[1].mlp.add_module("drop", torch.nn.Dropout(0.5))
    common.disable_dropout(model)
    model.train()
    batch = one_batch(args)
    assert torch.equal(dpo.answer_logps(model, batch)[0], dpo.answer_logps(model, batch)[0])
    assert model.model.layers[1].mlp.drop.p == 0


@pytest.mark.parametrize("more, message", [
    (["--loss", "ipo", "--label-smoothing", "0.1"], "--label-smoothing is for"),
    (["--gamma", "1"], "SimPO's alone"),
    (["--beta", "0"], "--beta"),
    (["--loss", "simpo", "--reference", "random"], "no --reference"),
    (["--offload", "--lora-rank", "4"], "--offload is for"),
])  # fmt: skip
def test_flags_that_would_do_nothing_are_refused(more, message, tmp_path):
    with pytest.raises(common.UserError, match=message):
        dpo.main(flags(tmp_path, "run", *more))

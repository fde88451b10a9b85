"""dpo.py: its losses against closed forms and TRL, shared prompts, the reference, whole runs."""

import itertools
import math
import types

import datasets
import numpy as np
import pytest
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
    own_logps,
    perturbed,
)  # fmt: skip
from safetensors.torch import load_file
from trl.experimental.cpo import CPOTrainer

import common
import dpo

# no line break after the end of turn: TRL would make it a target
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def run(random_model, tmp_path):
    """name, more flags -> the output folder of three steps"""
    data = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    three = "--max-steps 3 --batch-size 4 --lr 0.001 --samples 0 --eval-data 0.3".split()

    def start(name, *more):
        model = [] if "--model" in more else ["--model", random_model]
        output = ["--data", data, "--output", str(tmp_path / name)]
        dpo.main([*model, *output, *three, *map(str, more)])
        return tmp_path / name

    return start


def losses_of(folder) -> list[float]:
    return [entry["loss"] for entry in read_metrics(folder) if "loss" in entry]


# ------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_closed_form(smoothing):
    h = 30 * torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = dpo.preference_loss(h, "sigmoid", 0.3, smoothing)
    for x, loss in zip(h.tolist(), losses.tolist()):
        right, wrong = (-math.log(1 / (1 + math.exp(-y))) for y in (0.3 * x, -0.3 * x))
        assert loss == pytest.approx((1 - smoothing) * right + smoothing * wrong, rel=1e-12)
    assert dpo.preference_loss(torch.zeros(1), "sigmoid", 0.3, smoothing) == math.log(2)


def test_a_hopeless_pair_has_a_finite_loss_and_gradient():
    h = torch.tensor([-1e4], requires_grad=True)
    loss = dpo.preference_loss(h, beta=1.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(1e4) and h.grad.item() == pytest.approx(-1.0)


def test_ipo_wants_a_log_ratio_of_one_half_over_beta():
    losses = dpo.preference_loss(torch.tensor([5.0, 0.0]), "ipo", 0.1)
    assert losses.tolist() == pytest.approx([0, 25])


def test_simpo_is_that_of_trls_cpo_trainer():
    chosen, rejected = torch.randn(2, 5) - 2
    theirs = CPOTrainer.__new__(CPOTrainer)
    theirs.beta, theirs.simpo_gamma, theirs.alpha, theirs.label_smoothing = 2.0, 1.2, 0.0, 0.0
    theirs.loss_type, theirs.accelerator = "simpo", types.SimpleNamespace(device=CPU)
    ours = dpo.preference_loss(chosen - rejected, "simpo", 2.0, gamma=1.2)
    torch.testing.assert_close(ours, theirs.cpo_loss(chosen, rejected)[0])


# ----------------------------------------------------------------- shared prompts, and the judge


def load(args, seed=None):
    model = common.load_model(args, torch.float32, CPU, torch.float32)
    return perturbed(model, seed) if seed else model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", [(), ("--loss", "ipo"), ("--loss", "simpo", "--beta", 2)])
def test_shared_prompts_change_no_loss_and_no_gradient(flags, kind, way, tmp_path):
    """Against every answer alone with its prompt, through transformers' own forward pass, pair by
    pair: the loss to 1e-6 and gradients to 1e-5."""
    more = ["--no-packing"] if way == "padded" else []
    args = arguments(dpo, tmp_path, KINDS[kind], *flags, *more)
    examples, ours = examples_of(args), load(args)
    lengths = examples["stretches"]
    rng, sizes = np.random.default_rng(0), [len(x) for x in lengths]
    noise = [rng.normal(0, 3, size) for size in sizes]  # how far the policy is from the reference

    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float64)
    total, reference = 0.0, []
    for answers, away in zip(documents(examples), noise):
        logps = [own_logps(theirs, *answer) for answer in answers]
        policy = torch.stack([x.sum() for x in logps])
        start = policy.detach() + torch.tensor(away[1:])
        start = torch.zeros_like(policy) if args.loss == "simpo" else start
        reference.append(np.array([0.0, *start]))
        ratio = policy - start
        if args.loss != "sigmoid":
            ratio = ratio / torch.tensor([len(x) for x in logps])
        pairs = [ratio[i] - ratio[j] for i, j in itertools.combinations(range(len(ratio)), 2)]
        losses = [dpo.preference_loss(h, args.loss, args.beta) for h in pairs]
        total = total + torch.stack(losses).mean()
    total.backward()
    with attention_of(way):
        batch = one_pass(examples | {"reference": reference}, way)
        figures = dpo.pair_figures(ours, batch, [], args)
        figures["loss"].backward()
    assert figures["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    assert_same_gradients(ours, theirs)


def test_prompts_are_shared(tmp_path):
    """Every token of a prompt once; the cut answers, and those that are one's beginning."""
    examples = examples_of(arguments(dpo, tmp_path, [*KINDS["pairs"], RANKED]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    for row, ids, marks, lengths in zip(
        [*KINDS["pairs"], RANKED],
        *(examples[key] for key in ("input_ids", "is_target", "stretches")),
    ):
        prompt, *answers = np.split(ids, np.cumsum(lengths)[:-1])
        texts = row.get("responses") or [row["chosen"], row["rejected"]]
        expected = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(prompt) == expected
        for answer, text in zip(answers, texts, strict=True):
            assert tokenizer.decode(answer) == (text + "<|im_end|>")[: 100 - len(prompt)]
        assert not marks[: lengths[0]].any() and marks[lengths[0] :].all()


@pytest.mark.parametrize("way", ["loop", "padded"])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_loss_and_gradients_are_trls_on_the_same_rows(kind, way, tmp_path, monkeypatch):
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    more = ["--loss", kind, "--template", template, *["--no-packing"] * (way == "padded")]
    args = arguments(dpo, tmp_path, PAIRS[:5], *more)
    train_set, _ = common.load_data(args, common.load_tokenizer(args), "pairs")
    policy = load(args, seed=1)
    examples = dpo.add_reference(load(args), train_set, [range(5)], args, CPU)[:]
    batch = one_pass(examples, way)
    loss = dpo.pair_figures(policy, batch, [], args)["loss"] / 5
    loss.backward()

    def turns(text, role):
        return [{"role": role, "content": text}]

    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    rows = [{key: turns(row[key], role) for key, role in roles.items()} for row in PAIRS[:5]]
    config = trl.DPOConfig(
        str(tmp_path), loss_type=[kind], beta=0.1, per_device_train_batch_size=5, report_to=[],
        use_cpu=True, disable_dropout=True, bf16=False, gradient_checkpointing=False,
        max_length=None,
    )  # fmt: skip
    theirs, fixed = (
        transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32) for _ in "ab"
    )
    theirs.load_state_dict(policy.state_dict())
    table, tokenizer = datasets.Dataset.from_list(rows), common.load_tokenizer(args)
    trainer = trl.DPOTrainer(theirs, fixed, config, train_dataset=table, processing_class=tokenizer)
    expected = trainer.compute_loss(theirs, next(iter(trainer.get_train_dataloader())))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(policy, theirs, rel=3e-5)


# ---------------------------------------------------------------------------- the reference


WHOLE = {
    "full": [], "LoRA": ["--lora-rank", 4], "padded": ["--no-packing"],
    "recomputed": ["--gradient-checkpointing"], "4 bits": ["--load-in-4bit", "--lora-rank", 4],
    "cDPO": ["--label-smoothing", 0.2], "LoRA, padded": ["--lora-rank", 4, "--no-packing"],
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_a_run_begins_at_ln_2_and_learns_its_pairs(name, run):
    folder = run("run", "--max-steps", 20, *WHOLE[name])
    entries = read_metrics(folder)
    losses = losses_of(folder)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] < 0.62
    names = {"loss", "accuracy", "margin", "chosen_logps", "rejected_logps"}
    assert all(names <= entry.keys() for entry in entries if "loss" in entry)
    before, after = (entry for entry in entries if "eval_accuracy" in entry)
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert before["eval_accuracy"] == 0.5 and before["eval_margin"] == pytest.approx(0, abs=1e-5)
    assert after["eval_accuracy"] == 1.0 and after["eval_margin"] > 0.1


@pytest.mark.parametrize("more", [[], ["--load-in-4bit"]])
def test_the_reference_of_lora_is_where_training_started(more, run, random_model):
    """A fresh adapter's is the base, an adapter's a copy that stays as it was."""
    first = run("first", "--lora-rank", 4, *more)
    second = run("second", "--adapter", first, "--max-steps", 6, *more)
    assert losses_of(second)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses_of(second)[-1] < losses_of(second)[0]
    one, two = (load_file(x / "adapter_model.safetensors") for x in (first, second))
    assert one.keys() == two.keys() and all(not torch.equal(one[key], two[key]) for key in one)


def test_the_reference_does_not_move_with_the_policy(tmp_path):
    args = arguments(dpo, tmp_path, PAIRS[:4], "--lora-rank", 4)
    model = common.load_model(args, torch.float32, CPU)
    batch = {x: y for x, y in one_pass(examples_of(args), "loop").items() if x != "examples"}
    base = model.target_logps(**batch)
    for adapter in (None, "a folder"):
        if adapter is None:
            common.add_adapter(model, args, dpo.LoRALinear, CPU)
        args.adapter = adapter
        before, layers = model.target_logps(**batch), dpo.reference_layers(model, args)
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p) * p.requires_grad
        moved = model.target_logps(**batch)
        with dpo.as_reference(layers):
            reference = model.target_logps(**batch)
        torch.testing.assert_close(reference, before, rtol=1e-6, atol=1e-6)
        assert not reference.requires_grad
        assert not torch.isclose(moved, before, rtol=1e-2).all()
        assert torch.equal(model.target_logps(**batch), moved) and moved.requires_grad
        if adapter is None:
            torch.testing.assert_close(before, base, rtol=1e-6, atol=1e-6)


def test_where_all_parameters_train_the_reference_is_that_of_the_start(tmp_path, random_model):
    """Each answer alone, through transformers; also of answers that come up in a later epoch."""
    rows = [*PAIRS, RANKED]
    args = arguments(dpo, tmp_path, rows, "--epochs", 2, "--batch-size", 5)
    train_set, _ = common.load_data(args, common.load_tokenizer(args), "pairs")
    args.micro_batch_tokens, model = 200, load(args)
    steps = common.plan_steps(train_set, args)
    with_reference = dpo.add_reference(model, train_set, steps, args, CPU)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    examples = with_reference[:]
    for answers, found in zip(documents(examples), examples["reference"]):
        with torch.no_grad():
            expected = [own_logps(theirs, *answer).sum().item() for answer in answers]
        assert found[0] == 0 and found[1 : 1 + len(answers)] == pytest.approx(expected, rel=1e-5)


def test_lora_and_all_parameters_have_the_same_first_steps(run):
    """The two ways to the reference: a run of LoRA whose adapter adds nothing yet has, with a rate
    of 0, the held-out figures of the other."""
    figures = []
    for name in ("full", "LoRA"):
        entries = read_metrics(run(name, "--lr", 0, *WHOLE[name]))
        figures.append([x for x in entries if "eval_loss" in x])
    for one, other in zip(*figures, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_dropout_of_the_base_is_off(tmp_path):
    args = arguments(dpo, tmp_path, PAIRS[:2])
    model = load(args)
    model.model.layers[0].self_attn.attention_dropout = 0.5
    model.model.layers[1].mlp.add_module("drop", torch.nn.Dropout(0.5))
    model.model.layers[1].mlp.register_forward_hook(lambda mlp, _, out: mlp.drop(out))
    batch = one_pass(examples_of(args), "loop")
    batch.pop("examples")
    assert not torch.equal(model.target_logps(**batch), model.target_logps(**batch))
    common.disable_dropout(model)
    assert model.training
    assert torch.equal(model.target_logps(**batch), model.target_logps(**batch))


# -------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("more", [[], ["--lora-rank", 4]])
def test_losses_do_not_depend_on_the_passes(more, run):
    """--micro-batch-tokens and padding, with rankings among the pairs."""
    runs = []
    for n, flags in enumerate(([], ["--micro-batch-tokens", 100], ["--no-packing"])):
        runs.append(read_metrics(run(f"run{n}", "--lr", 1e-5, *flags, *more))[1:-1])
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            for key in a.keys() - {"tokens_per_second", "peak_memory_gib"}:
                rel = 1e-6 if a["step"] < 2 else 1e-5
                assert b[key] == pytest.approx(a[key], rel=rel, abs=2e-6), key


def test_an_adapter_that_all_parameters_would_need_is_asked_for(run):
    with pytest.raises(common.UserError, match="4 bits needs an adapter"):
        run("run", "--load-in-4bit")


def test_the_samples_are_on_the_screen(run, capsys):
    run("run", "--samples", 1)
    printed = capsys.readouterr().out
    for title in ("prompt", "before training", "after", "chosen", "rejected"):
        assert f"--- {title} ---" in printed

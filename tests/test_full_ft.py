"""full_ft.py against transformers' Trainer, and each of its modes against the plain one."""

import json
import re
import shutil
import types
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TINY, read_metrics, write_rows
from safetensors import safe_open
from safetensors.torch import load_file

import common
import full_ft

ROWS = [
    {"prompt": f"Say {word} {n} times.", "completion": " ".join([word] * n)}
    for n in range(1, 7)
    for word in ("yes", "no", "maybe", "好", "never", "now")
]
IN_BACKWARD = ["--step-in-backward", "--max-grad-norm", "0"]
OFFLOAD = ["--offload"]


@pytest.fixture
def train(random_model, tmp_path):
    """name, more flags -> the saved tensors of a short run"""
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    short = ["--eval-data", "0", "--samples", "0", "--lr", "0.002", "--batch-size", "6"]

    def run(name, *more, model=random_model):
        start = ["--model", str(model), "--data", data, "--output", str(tmp_path / name)]
        full_ft.main([*start, *short, *map(str, more)])
        return load_file(tmp_path / name / "model.safetensors")

    return run


@pytest.fixture
def start(random_model):
    return load_file(Path(random_model) / "model.safetensors")


def assert_same(ours, theirs, atol):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


def kept(monkeypatch, name):
    """What the function common.NAME returns during the test."""
    original, seen = getattr(common, name), []
    monkeypatch.setattr(common, name, lambda *a, **b: seen.append(original(*a, **b)) or seen[-1])
    return seen


# -------------------------------------------------------------------------------- the update

SIX = "--max-steps 6 --warmup-ratio 0.3 --weight-decay 0.1 --max-grad-norm 0.5 --lr 0.0005".split()


@pytest.mark.parametrize("more", [["--micro-batch-tokens", "200"], ["--no-packing"]])
def test_six_steps_equal_the_trainers(more, train, start, random_model, tmp_path, monkeypatch):
    """Accumulation over unequal target counts, clipping, warmup and cosine, decay groups:
    transformers' Trainer ends with the same weights. It is given our schedule, since its own
    wastes the first update at a rate of 0."""
    sets, plans = kept(monkeypatch, "load_data"), kept(monkeypatch, "plan_steps")
    ours = train("ours", *SIX, *more)
    rows = []
    for n in (n for step in plans[0] for n in step):
        ids, marks = sets[0][0][n]["input_ids"].tolist(), sets[0][0][n]["is_target"].tolist()
        labels = [token if mark else -100 for token, mark in zip(ids, marks)]
        rows.append({"input_ids": ids, "labels": labels})
    assert len(rows) == 36 and len({sum(x != -100 for x in row["labels"]) for row in rows}) > 5

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(rows)

    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path / "theirs"), max_steps=6, per_device_train_batch_size=3,
        gradient_accumulation_steps=2, learning_rate=0.0005, weight_decay=0.1, max_grad_norm=0.5,
        report_to=[], save_strategy="no", use_cpu=True, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(random_model)
    args = types.SimpleNamespace(warmup_ratio=0.3, lr=1.0)
    trainer = InOrder(
        model,
        settings,
        train_dataset=rows,
        data_collator=transformers.DataCollatorForSeq2Seq(
            transformers.AutoTokenizer.from_pretrained(random_model), padding=True
        ),
    )
    trainer.create_optimizer()  # its own decay groups
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda step: common.learning_rate(step + 1, 6, args)
    )
    trainer.train()
    theirs = {name: x for name, x in model.state_dict().items() if name in ours}
    assert_same(ours, theirs, atol=1e-6)
    assert max((ours[name] - start[name]).abs().max() for name in ours) > 1e-3
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    metrics = [entry for entry in read_metrics(tmp_path / "ours") if "loss" in entry]
    for entry, other in zip(metrics, logged, strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], rel=1e-4)  # theirs is rounded
        assert entry["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_every_parameter_moves(train, start):
    ours = train("run", "--max-steps", 1)
    assert ours.keys() == start.keys() and len(ours) == 20
    assert [name for name in ours if torch.equal(ours[name], start[name])] == []


# ------------------------------------------------------------------------------- the modes


def test_step_in_backward_equals_the_plain_step(train):
    flags = ["--max-steps", 4, "--weight-decay", 0.1, "--l2-sp", 0.1, "--max-grad-norm", 0]
    assert_same(train("a", *flags), train("b", *flags, *IN_BACKWARD), atol=1e-6)


def test_step_in_backward_holds_one_gradient_at_a_time(train, monkeypatch):
    """After the backward pass, no parameter has a gradient."""
    models, left = kept(monkeypatch, "load_model"), []
    step_done = common.Log.step_done
    monkeypatch.setattr(
        common.Log,
        "step_done",
        lambda *args: (
            left.append([p for p in models[0].parameters() if p.grad is not None])
            or step_done(*args)
        ),
    )
    train("run", *IN_BACKWARD, "--max-steps", 2)
    assert left == [[], []]


def test_step_in_backward_needs_steps_of_one_pass(train, tmp_path):
    """The refusal names a --batch-size that fits, and leaves nothing that would be in its way."""
    limit = ["--micro-batch-tokens", 200, *IN_BACKWARD, "--max-steps", 3]
    with pytest.raises(common.UserError, match=r"--step-in-backward.*--batch-size \d+") as refused:
        train("run", *limit)
    fits = int(re.search(r"--batch-size (\d+)", str(refused.value))[1])
    assert 1 <= fits < 6
    train("other", *limit, "--batch-size", fits)
    assert not (tmp_path / "run").exists()


def test_l2_sp_is_the_gradient_of_its_equation():
    torch.manual_seed(0)
    p, p0 = torch.nn.Parameter(torch.randn(4, 3)), torch.randn(4, 3)
    p.grad = torch.ones_like(p)
    full_ft.add_l2_sp([p], [p0], 0.3)
    (expected,) = torch.autograd.grad(0.3 * (p - p0).square().sum(), p)
    torch.testing.assert_close(p.grad, 1 + expected)


def test_l2_sp_is_added_before_clipping_and_keeps_weights_near_the_start(train, start, tmp_path):
    def drift(name, *more):
        weights = train(name, "--max-steps", 12, *more)
        return sum((weights[name] - start[name]).square().sum().item() for name in weights)

    plain, pulled = drift("plain"), drift("pulled", "--l2-sp", 1)
    assert pulled < 0.7 * plain
    first, second = (
        [x for x in read_metrics(tmp_path / name) if "loss" in x] for name in ("plain", "pulled")
    )
    assert first[0]["grad_norm"] == second[0]["grad_norm"]  # at the start the penalty is flat
    assert first[1]["loss"] == second[1]["loss"]  # which is logged without it
    assert first[1]["grad_norm"] != second[1]["grad_norm"]


def test_masters_move_where_pure_bfloat16_does_not(train, monkeypatch, tmp_path):
    """At a rate of 1e-5 most updates of a bfloat16 weight round to nothing."""
    models = kept(monkeypatch, "load_model")
    flags = ["--max-steps", 1, "--lr", "1e-5", "--dtype", "bfloat16"]
    saved = [train("masters", *flags), train("pure", *flags, "--pure-bfloat16")]
    masters, pure = (dict(model.named_parameters()) for model in models)
    before = transformers.AutoModelForCausalLM.from_pretrained(
        Path(read_metrics(tmp_path / "pure")[0]["run"]["args"]["model"])
    ).state_dict()
    name = "model.layers.0.mlp.down_proj.weight"
    assert masters[name].dtype == torch.float32 and pure[name].dtype == torch.bfloat16
    assert (masters[name] != before[name]).float().mean() > 0.99
    assert (pure[name] != before[name].bfloat16()).float().mean() < 0.9
    for weights, run in zip(saved, ("masters", "pure")):
        assert {x.dtype for x in weights.values()} == {torch.bfloat16}
        assert json.loads((tmp_path / run / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("more", [[], IN_BACKWARD])
@pytest.mark.parametrize("kind", ["adamw8bit", "paged_adamw8bit"])
def test_8_bit_states_follow_the_plain_ones(kind, more, train, start):
    pytest.importorskip("bitsandbytes")
    plain = train("plain", "--max-steps", 8, *more)
    rounded = train("rounded", "--max-steps", 8, "--optimizer", kind, *more)
    name = "model.layers.1.mlp.up_proj.weight"  # large enough for 8 bits
    moved, apart = (plain[name] - start[name]).norm(), (plain[name] - rounded[name]).norm()
    assert 0 < apart < 0.2 * moved


def test_the_8_bit_optimizers_are_those_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    p = torch.nn.Parameter(torch.zeros(2, 2))
    for name, kind in (("adamw8bit", "AdamW8bit"), ("paged_adamw8bit", "PagedAdamW8bit")):
        args = types.SimpleNamespace(optimizer=name, lr=0.5)
        optimizer = full_ft.make_optimizer([{"params": [p], "weight_decay": 0.25}], args)
        assert type(optimizer) is getattr(bitsandbytes.optim, kind)
        group = optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)


@pytest.mark.parametrize("more", [[], ["--l2-sp", "0.1"], ["--gradient-checkpointing"]])
def test_offload_equals_the_plain_run(more, train, tmp_path):
    flags = ["--max-steps", 3, "--weight-decay", 0.1, "--lr", 0.0005, "--samples", 1, *more]
    assert_same(train("a", *flags), train("b", *flags, *OFFLOAD), atol=1e-6)
    for one, two in zip(read_metrics(tmp_path / "a")[1:], read_metrics(tmp_path / "b")[1:]):
        for key in one.keys() - {"tokens_per_second", "peak_memory_gib"}:
            assert one[key] == pytest.approx(two[key], rel=1e-5), key


@pytest.mark.parametrize(
    "more, match",
    [
        (["--step-in-backward"], "--step-in-backward needs --max-grad-norm 0"),
        ([*IN_BACKWARD, "--offload"], "--step-in-backward.*--offload"),
        (["--optimizer", "adamw8bit", "--offload"], "--optimizer adamw8bit.*--offload"),
        (["--pure-bfloat16", "--offload"], "--pure-bfloat16.*--offload"),
    ],
)
def test_modes_that_exclude_each_other_are_refused(more, match, train, tmp_path):
    with pytest.raises(common.UserError, match=match):
        train("run", *more)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------- --train


@pytest.fixture
def with_biases(tmp_path):
    """A folder with a small random Qwen2: biases of queries, keys and values."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320}
    config = transformers.Qwen2Config(**sizes, tie_word_embeddings=True, eos_token_id=257)
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen2")
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "qwen2")
    return tmp_path / "qwen2"


@pytest.mark.parametrize("more", [[], ["--dtype", "bfloat16"], IN_BACKWARD, OFFLOAD])
def test_bitfit_trains_the_biases_alone(more, train, with_biases, tmp_path):
    """What matches moves, nothing else does, and the file of what trained has exactly that: on
    the base it gives the result."""
    flags = ["--train", "bias$", "--max-steps", 3, "--l2-sp", 0.1, *more]
    ours = train("run", *flags, model=with_biases)
    base = load_file(with_biases / "model.safetensors")
    base = {name: x.to(ours[name].dtype) for name, x in base.items()}
    changed = {name for name in ours if not torch.equal(ours[name], base[name])}
    assert changed == {name for name in base if name.endswith("bias")} and len(changed) == 6
    alone = load_file(tmp_path / "run" / "trained.safetensors")
    assert alone.keys() == changed and all(torch.equal(alone[n], ours[n]) for n in changed)
    model = transformers.AutoModelForCausalLM.from_pretrained(with_biases, dtype=torch.float32)
    with safe_open(tmp_path / "run" / "trained.safetensors", "pt") as file:
        assert file.metadata()["base_fingerprint"] == common.fingerprint(model)
    assert not model.load_state_dict(alone, strict=False).unexpected_keys
    if more in (IN_BACKWARD, OFFLOAD):
        plain = train("plain", *flags[:6], "--max-grad-norm", 0 if more == IN_BACKWARD else 1,
                      model=with_biases)  # fmt: skip
        assert_same(ours, plain, atol=1e-6)


def test_a_trained_part_moves_as_an_optimizer_of_it_moves_it(train, start, monkeypatch):
    """One step of Adam at the first rate: each element moves by the rate, but for its gradient's
    clipping, so the change is that of a run in which all train."""
    flags = ["--max-steps", 1, "--warmup-ratio", 0, "--max-grad-norm", 0]
    models = kept(monkeypatch, "load_model")
    part, every = train("part", "--train", r"layers\.1\.mlp", *flags), train("every", *flags)
    for name in start:
        expected = every if "layers.1.mlp" in name else start
        # where a gradient is as small as Adam's eps, its rounding counts: in one element of 8,192
        difference = (part[name] - expected[name]).abs()
        assert (difference > 5e-6).sum() <= 1 and difference.max() < 2e-5, name
    trained = {name for name, p in models[0].named_parameters() if p.requires_grad}
    assert trained == {name for name in start if "layers.1.mlp" in name} and len(trained) == 3


def test_what_does_not_train_is_kept_in_the_compute_dtype(train, monkeypatch):
    models = kept(monkeypatch, "load_model")
    train("run", "--train", "norm", "--dtype", "bfloat16", "--max-steps", 1)
    kinds = {name: p.dtype for name, p in models[0].named_parameters()}
    assert all((kinds[name] == torch.float32) == ("norm" in name) for name in kinds)


def test_a_pattern_that_matches_nothing_is_refused(train, tmp_path):
    """A Llama has no biases. The parameters that there are, are named."""
    with pytest.raises(common.UserError, match="--train bias.*q_proj.weight") as refused:
        train("run", "--train", "bias")
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_a_result_without_train_leaves_no_file_of_a_part(train, tmp_path):
    train("run", "--train", "norm", "--max-steps", 1)
    assert (tmp_path / "run" / "trained.safetensors").exists()
    train("run", "--max-steps", 1, "--overwrite")
    assert not (tmp_path / "run" / "trained.safetensors").exists()


# -------------------------------------------------------------------------------- the result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_result_is_a_hugging_face_folder(dtype, train, tmp_path):
    """In the dtype of the forward pass, with its own attention, its head tied and its stops."""
    weights = train("run", "--max-steps", 1, "--dtype", dtype, model=TINY)
    assert {x.dtype for x in weights.values()} == {getattr(torch, dtype)}
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["dtype"] == dtype and config["architectures"] == ["LlamaForCausalLM"]
    assert "stretches" not in json.dumps(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 257
    assert tokenizer.chat_template == transformers.AutoTokenizer.from_pretrained(TINY).chat_template
    ids = torch.arange(20)[None]
    assert model.dtype == getattr(torch, dtype) and model(ids).logits.isfinite().all()


def test_a_result_stops_where_the_template_ends_a_turn(train, tmp_path):
    """Though its base stops elsewhere, and samples, which needs do_sample."""
    shutil.copytree(TINY, tmp_path / "base")
    path = tmp_path / "base" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 256, "temperature": 0.7}))
    train("run", "--max-steps", 0, model=tmp_path / "base")
    config = transformers.GenerationConfig.from_pretrained(tmp_path / "run")
    assert set(config.eos_token_id) == {256, 257} and config.temperature == 0.7


def test_training_continues_from_a_result(train, tmp_path):
    train("a", "--max-steps", 3, "--eval-data", 0.2)
    train("b", "--max-steps", 0, "--eval-data", 0.2, model=tmp_path / "a")
    before, after = (
        [x["eval_loss"] for x in read_metrics(tmp_path / n) if "eval_loss" in x] for n in "ab"
    )
    assert after[0] == pytest.approx(before[-1], rel=1e-6) and before[-1] < before[0]


def test_it_learns_four_rows_by_heart(train, tmp_path):
    words = zip("abcd", ("eins", "zwei", "drei", "四"))
    four = [{"prompt": f"What is {c}?", "completion": word} for c, word in words]
    data = ["--data", write_rows(tmp_path / "four.jsonl", four), "--batch-size", 4]
    train("run", *data, "--max-steps", 60, "--lr", 0.002, "--samples", 4, model=TINY)
    metrics = read_metrics(tmp_path / "run")
    assert [x["loss"] for x in metrics if "loss" in x][-1] < 0.02
    assert [x["eval_exact_match"] for x in metrics if "eval_exact_match" in x] == [0.0, 1.0]

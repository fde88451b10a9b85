"""adalora.py against PEFT's AdaLoRA: layer, training, allocation of ranks, folders."""

import dataclasses
import json

import peft
import pytest
import torch
import transformers
from conftest import TINY, read_metrics, run_script, write_rows
from safetensors.torch import load_file
from test_model import build, make_args, packed_batch
from torch import nn

import adalora
import common
import lora

CPU = torch.device("cpu")
ROWS = [{"prompt": f"Repeat {c}.", "completion": c * n} for n in range(1, 7) for c in "abcde"]
EIGHT = """--max-steps 8 --batch-size 6 --lr 0.01 --samples 0 --eval-data 0.2 --rank 4
--target-rank 2 --t-init 0.25 --t-final 0.25"""
FIELDS = {"init_r": 4, "target_r": 2, "total_step": 8}
PREFIX = "base_model.model."


@pytest.fixture
def flags(tmp_path, random_model):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)

    def make(name, *more):
        start = ["--model", random_model, "--data", data, "--output", str(tmp_path / name)]
        return [*start, *EIGHT.split(), *map(str, more)]

    return make


def from_folder(base, adapter):
    """The model as the script has it with --adapter. -> model, layers by name"""
    args = make_args("--model", base, "--adapter", str(adapter))
    vars(args).update(target_rank=8, orthogonality=0.5)
    model = common.load_model(args, torch.float32, CPU)
    return model, adalora.add_adapter(model, args, CPU)[0]


def base_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def peft_model(folder, **fields):
    fields = (
        FIELDS
        | {"tinit": 2, "tfinal": 2, "lora_alpha": 32, "target_modules": "all-linear"}
        | fields
    )
    config = peft.AdaLoraConfig(**fields, task_type="CAUSAL_LM")
    return peft.get_peft_model(base_model(folder), config)


def padded(examples: list[dict]) -> dict:
    """Inputs of transformers' own forward pass, whose loss is a mean over all targets."""
    width = max(len(x["input_ids"]) for x in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for n, x in enumerate(examples):
        size, marks = len(x["input_ids"]), torch.tensor(x["is_target"]).bool()
        ids[n, :size] = torch.tensor(x["input_ids"])
        labels[n, :size] = ids[n, :size].where(marks, -100)
    return {"input_ids": ids, "labels": labels}


@torch.no_grad()
def logits(model):
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(3))
    if hasattr(model, "target_logps"):
        with common.own_attention(model.eval()):
            return model(input_ids=ids, use_cache=False).logits
    return model.eval()(input_ids=ids).logits


def tensors(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


# ------------------------------------------------------------------- the layer and the penalty


def test_the_layer_and_the_penalty_are_the_equations():
    """y = W0 x + s P diag(e) Q x and the mean of norms, in float64, with their gradients."""
    torch.manual_seed(0)
    layer = adalora.AdaLoRALinear(nn.Linear(6, 5).requires_grad_(False), 3, scaling=1.5).double()
    nn.init.normal_(layer.lora_E)
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    ours = (layer.lora_B, layer.lora_E, layer.lora_A, x)
    P, e, Q, z = (p.detach().clone().requires_grad_() for p in ours)
    y = z @ (layer.base.weight + 1.5 * P @ torch.diag(e[:, 0]) @ Q).T + layer.base.bias
    torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-14)
    eye = torch.eye(3)
    squares = [((M - eye) ** 2).sum() for M in (P.T @ P, Q @ Q.T)]
    penalty = adalora.orthogonality([layer])
    expected = (squares[0].sqrt() + squares[1].sqrt()) / 2
    torch.testing.assert_close(penalty, expected, rtol=0, atol=1e-14)
    (layer(x).sin().sum() + penalty).backward()
    (y.sin().sum() + expected).backward()
    for p, other in zip(ours, (P, e, Q, z)):
        torch.testing.assert_close(p.grad, other.grad, rtol=0, atol=1e-13)
    assert layer.base.weight.grad is None


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox"])
def test_the_start_is_the_base_and_only_adapters_get_gradients(name):
    model, batch, args = build(name), packed_batch([20, 10]), make_args()
    vars(args).update(target_rank=8, orthogonality=0.5)
    before = model.target_logps(**batch)
    layers, _ = adalora.add_adapter(model, args, CPU)
    torch.testing.assert_close(model.target_logps(**batch), before, rtol=0, atol=1e-5)
    model.target_logps(**batch).sum().backward()
    for key, p in model.named_parameters():
        is_new = key.endswith((".lora_A", ".lora_B", ".lora_E"))
        assert is_new == p.requires_grad == (p.grad is not None), key
        assert p.grad is None or key.endswith("lora_E") == bool(p.grad.any()), key  # e is zero
    A = torch.cat([layer.lora_A.flatten() for layer in layers.values()])
    assert A.dtype == torch.float32 and A.std().item() == pytest.approx(0.02, rel=0.03)


# ---------------------------------------------------------------------- training and allocation


def test_training_and_allocation_equal_pefts(flags, random_model, tmp_path, monkeypatch):
    """Eight steps from one start, as PEFT's documentation has them: the loss, importance, kept
    triplets and weights of every step, and at the end the same folder."""
    ours, plan = [], {}
    allocate, plan_steps = adalora.allocate, common.plan_steps
    parts = "lora_A", "lora_E", "lora_B", "sensitivity", "uncertainty", "kept"

    def record(layers, *others):
        allocate(layers, *others)
        ours.append([{n: getattr(x, n).detach().clone() for n in parts} for x in layers])

    def planned(train_set, args):
        plan.update(rows=train_set, steps=plan_steps(train_set, args))
        return plan["steps"]

    adalora.main(flags("start", "--max-steps", 0))
    with monkeypatch.context() as patch:
        patch.setattr(adalora, "allocate", record)
        patch.setattr(common, "plan_steps", planned)
        adalora.main(flags("ours", "--adapter", tmp_path / "start"))

    theirs, start = peft_model(random_model), tensors(tmp_path / "start")
    named = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
    for name, p in named.items():
        p.data.copy_(start.pop(name))
    assert not start
    layers = [name.removesuffix(".lora_E") for name in named if name.endswith(".lora_E")]
    optimizer = torch.optim.AdamW(named.values(), weight_decay=0.0)
    allocator, losses = theirs.base_model.rankallocator, []
    for step, numbers in enumerate(plan["steps"], 1):
        inputs = padded([plan["rows"][n] for n in numbers])
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, 8, make_args("--lr", "0.01"))
        with torch.no_grad():
            losses.append(theirs.base_model.model(**inputs).loss.item())  # without the penalty
        theirs(**inputs).loss.backward()
        nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        for name, layer in zip(layers, ours[step - 1], strict=True):
            for part in parts[:3]:
                expected = named[f"{name}.{part}"].detach()
                torch.testing.assert_close(layer[part], expected, rtol=1e-4, atol=1e-5)
            if step < 6:  # PEFT forgets the averages when pruning ends
                key = f"{name.removeprefix(PREFIX)}.lora_%s.default"
                for average, mine in ((allocator.exp_avg_ipt, "sensitivity"),
                                      (allocator.exp_avg_unc, "uncertainty")):  # fmt: skip
                    e, q, p = (average[key % x] for x in "EAB")
                    expected = torch.cat([e, q, p.T], dim=1)
                    torch.testing.assert_close(layer[mine], expected, rtol=1e-3, atol=1e-9)
        for layer, before in zip(ours[step - 1], ours[4]):
            assert step < 6 or torch.equal(layer["sensitivity"], before["sensitivity"])
        kept = sum(int(layer["kept"].sum()) for layer in ours[step - 1])
        assert (
            kept == allocator.budget_schedule(step)[0] == [56, 56, 39, 31, 28, 28, 28, 28][step - 1]
        )
    found = [x["loss"] for x in read_metrics(tmp_path / "ours") if "loss" in x]
    assert found == pytest.approx(losses, rel=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    a, b = config_of(tmp_path / "ours"), config_of(tmp_path / "theirs")
    fields = ("rank_pattern", *FIELDS, "lora_alpha", "beta1", "peft_type")
    known = {field.name for field in dataclasses.fields(peft.AdaLoraConfig)}
    assert a.keys() <= known and {n: a.get(n, b[n]) for n in fields} == {n: b[n] for n in fields}
    a, b = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert a.keys() == b.keys() and min(map(len, a.values())) == 0  # some layers have rank 0
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=name)


# ------------------------------------------------------------------------------------- folders


def test_peft_loads_the_adapter_gives_our_logits_and_merges_alike(flags, random_model, tmp_path):
    """Of layers with ranks from 0 to 4."""
    adalora.main(flags("run", "--lr", 0.05))
    ranks = {len(x) for name, x in tensors(tmp_path / "run").items() if "lora_E" in name}
    assert ranks >= {0, 4} and len(ranks) > 3
    theirs = peft.PeftModel.from_pretrained(base_model(random_model), tmp_path / "run")
    expected = logits(theirs)
    with theirs.disable_adapter():
        assert (logits(theirs) - expected).abs().max() > 0.01
    model, _ = from_folder(random_model, tmp_path / "run")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    merge = ["--merge-only", "--model", random_model, "--adapter", str(tmp_path / "run")]
    adalora.main([*merge, "--output", str(tmp_path / "merged")])
    merged = base_model(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=2e-5)
    unloaded = theirs.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, unloaded[name], rtol=0, atol=1e-6, msg=name)


def test_training_continues_from_pefts_and_our_adapter(flags, random_model, tmp_path):
    """PEFT's is not pruned, ours is. Its scale is that of its first rank."""
    torch.manual_seed(0)
    fields = {"lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "init_r": 5}
    theirs = peft_model(random_model, **fields, init_lora_weights=False)
    theirs.save_pretrained(tmp_path / "theirs")
    model, layers = from_folder(random_model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-5)
    assert len(layers) == 4
    adalora.main(flags("a", "--adapter", tmp_path / "theirs"))
    adalora.main(flags("b", "--adapter", tmp_path / "a", "--target-rank", 1))
    a, b = ([x["eval_loss"] for x in read_metrics(tmp_path / n) if "eval_loss" in x] for n in "ab")
    assert b[0] == pytest.approx(a[-1], abs=1e-6)
    for name, rank in (("a", 2), ("b", 1)):
        saved, config = tensors(tmp_path / name), config_of(tmp_path / name)
        assert sum(len(x) for key, x in saved.items() if "lora_E" in key) == 4 * rank
        assert sum(map(sum, config["rank_pattern"].values())) == 4 * rank
        assert {len(x) for x in config["rank_pattern"].values()} == {5}
        assert (config["init_r"], config["lora_alpha"]) == (5, 6)
        loaded = peft.PeftModel.from_pretrained(base_model(random_model), tmp_path / name)
        model, _ = from_folder(random_model, tmp_path / name)
        torch.testing.assert_close(logits(model), logits(loaded), rtol=0, atol=1e-5)


def test_lora_and_adalora_refuse_each_others_adapters(flags, tmp_path):
    adalora.main(flags("adalora", "--max-steps", 0))
    shared = [x for x in flags("lora") if x not in EIGHT.split()[10:]]
    lora.main([*shared, "--max-steps", "0"])
    with pytest.raises(common.UserError, match="is ADALORA, not LORA"):
        lora.main(
            [*shared[:4], "--output", str(tmp_path / "x"), "--adapter", str(tmp_path / "adalora")]
        )
    with pytest.raises(common.UserError, match="is LORA, not ADALORA"):
        adalora.main(flags("again", "--adapter", tmp_path / "lora"))


def test_as_a_user_runs_it(tmp_path):
    done = run_script("adalora.py", "--output", tmp_path / "run", "--max-steps", 4, "--samples", 0)
    assert done.returncode == 0, done.stderr
    assert "rank of model.layers.*.self_attn.q_proj: " in done.stdout
    assert "the adapter is in" in done.stdout
    ranks = [len(x) for name, x in tensors(tmp_path / "run").items() if "lora_E" in name]
    assert len(ranks) == 28 and sum(ranks) == 28 * 8 and len(set(ranks)) > 1
    assert peft.PeftModel.from_pretrained(base_model(TINY), tmp_path / "run")

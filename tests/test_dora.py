"""dora.py against PEFT's DoRA, and against the equation in float64."""

import json

import peft
import pytest
import torch
import transformers
from conftest import TINY, read_metrics, run_script, write_rows
from safetensors.torch import load_file
from test_model import build, make_args, own, packed_batch
from torch import nn

import common
import dora
import lora

CPU = torch.device("cpu")
ROWS = [{"prompt": f"Repeat {c}.", "completion": c * n} for n in range(1, 7) for c in "abcde"]
SIX = "--max-steps 6 --batch-size 8 --lr 0.01 --samples 0 --eval-data 0.2".split()


@pytest.fixture
def flags(tmp_path, random_model):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)

    def make(name, *more):
        start = ["--model", random_model, "--data", data, "--output", str(tmp_path / name)]
        return [*start, *SIX, *map(str, more)]

    return make


def random_layer(bias=True):
    torch.manual_seed(0)
    layer = dora.DoRALinear(nn.Linear(6, 5, bias=bias).requires_grad_(False), rank=2, alpha=3.0)
    nn.init.normal_(layer.lora_B.weight)
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(torch.rand(5) + 0.5)
    return layer


def trained(layer):
    return layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector


# -------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_is_the_equation(bias):
    """y = m V / ||V|| x + bias in float64 with ||V|| a constant: values, and gradients of A, B,
    m and x. A gradient through ||V|| would be clearly another."""
    layer, x = random_layer(bias), torch.randn(2, 4, 6, requires_grad=True)
    layer(x).square().sum().backward()
    for detached in (True, False):
        A, B, m, z = (p.detach().double().requires_grad_() for p in (*trained(layer), x))
        V = layer.base.weight.double() + 1.5 * B @ A
        norm = V.norm(dim=1, keepdim=True)
        W = m[:, None] * V / (norm.detach() if detached else norm)
        y = z @ W.T + (layer.base.bias.double() if bias else 0)
        y.square().sum().backward()
        torch.testing.assert_close(layer(x).double(), y, rtol=0, atol=1e-5)
        if not detached:
            assert (layer.lora_B.weight.grad - B.grad).norm() > 0.1 * B.grad.norm()
            continue
        for ours, expected in zip((*trained(layer), x), (A, B, m, z)):
            torch.testing.assert_close(ours.grad.double(), expected.grad, rtol=1e-4, atol=1e-4)
    assert layer.base.weight.grad is None


def test_the_norm_needs_no_V():
    layer = random_layer()
    A, B, _ = (p.double() for p in trained(layer))
    V = layer.base.weight.double() + 1.5 * B @ A
    torch.testing.assert_close(layer.direction_norm().double(), V.norm(dim=1), rtol=1e-5, atol=0)


def test_no_tensor_of_the_weights_size_is_made():
    """Neither in the forward pass nor in the backward pass."""
    layer = dora.DoRALinear(nn.Linear(300, 200).requires_grad_(False), rank=2, alpha=4)
    kinds = {"activities": [torch.profiler.ProfilerActivity.CPU], "profile_memory": True}
    with torch.profiler.profile(**kinds) as profile:
        layer(torch.randn(3, 300)).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 3 * 200 * 4 <= largest < 200 * 300 * 4


def test_dropout_reaches_the_update_alone():
    torch.manual_seed(0)
    layer = dora.DoRALinear(nn.Linear(64, 8), rank=4, alpha=4, dropout=0.5)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), layer.base(x), rtol=0, atol=1e-5)  # B is zero
    nn.init.normal_(layer.lora_B.weight)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    A, B, m = trained(layer)
    update = nn.functional.dropout(x, 0.5) @ A.T @ B.T
    expected = m / layer.direction_norm() * (x @ layer.base.weight.T + update) + layer.base.bias
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    assert (layer.eval()(x) - y).abs().max() > 0.1


def test_a_bfloat16_base_gives_bfloat16_outputs_near_the_float32_ones():
    torch.manual_seed(0)
    narrow = dora.DoRALinear(nn.Linear(64, 8, dtype=torch.bfloat16), rank=2, alpha=4)
    wide = dora.DoRALinear(nn.Linear(64, 8), rank=2, alpha=4)
    with torch.no_grad():
        nn.init.normal_(narrow.lora_B.weight)
        narrow.lora_magnitude_vector.mul_(1.3)
        wide.load_state_dict(narrow.state_dict())
        wide.base_norm.copy_(narrow.base_norm)
    x = torch.randn(50, 64)
    y = narrow(x.bfloat16())
    assert y.dtype == torch.bfloat16 and narrow.lora_magnitude_vector.dtype == torch.float32
    torch.testing.assert_close(y.float(), wide(x), rtol=0.02, atol=0.05)


def test_a_weight_row_of_zeros_gives_no_nan():
    base = nn.Linear(6, 5).requires_grad_(False)
    base.weight[2] = 0
    layer = dora.DoRALinear(base, rank=2, alpha=4)
    layer(torch.randn(3, 6)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in trained(layer))
    assert layer.merged().weight.isfinite().all() and not base.weight[2].any()


# -------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt_neox"])
def test_the_start_is_the_base_and_only_adapters_get_gradients(name):
    model, batch = build(name), packed_batch([20, 10])
    before = model.target_logps(**batch)
    common.add_adapter(model, make_args(), dora.DoRALinear, CPU)
    torch.testing.assert_close(model.target_logps(**batch), before, rtol=0, atol=1e-5)
    model.target_logps(**batch).sum().backward()
    parts = {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"}
    for key, p in model.named_parameters():
        is_new = any(key.endswith(part) for part in parts)
        assert is_new == p.requires_grad == (p.grad is not None), key


def test_gradients_equal_pefts():
    """The same A, B and m in PEFT's model and ours: same loss, same gradients. Of a model with
    biases, which are not scaled."""
    config = peft.LoraConfig(
        r=16, lora_alpha=32, use_dora=True, target_modules="all-linear", init_lora_weights=False
    )
    ours, theirs = build("qwen2"), peft.get_peft_model(own("qwen2"), config)
    common.add_adapter(ours, make_args(), dora.DoRALinear, CPU)
    other = {n.replace(".default", "").removeprefix("base_model.model."): p
             for n, p in theirs.named_parameters() if p.requires_grad}  # fmt: skip
    pairs = []
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if p.requires_grad:
                is_m = name.endswith("magnitude_vector")
                twin = other.pop(f"{name}.weight" if is_m else name)
                twin.mul_(torch.rand(twin.shape) * 0.2 + 0.9 if is_m else 1)
                p.copy_(twin)
                pairs.append((name, p, twin))
    assert not other and len(pairs) == 3 * 14
    batch = packed_batch([30])
    loss = -ours.target_logps(**batch).mean()
    expected = theirs(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    loss.backward(), expected.backward()
    for name, a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_parameter_count_of_llama_7b(capsys):
    with torch.device("meta"):
        config = transformers.LlamaConfig(intermediate_size=11008)
        model = transformers.LlamaForCausalLM(config)
    targets = "q_proj,k_proj,v_proj,up_proj,down_proj"
    args = make_args("--rank", "32", "--targets", targets)
    common.add_adapter(model, args, dora.DoRALinear, torch.device("meta"))
    assert "56,975,360 of 6,795,390,976 parameters train" in capsys.readouterr().out


# ------------------------------------------------------------------------------- whole runs


@torch.no_grad()
def logits(model):
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(3))
    return model.eval()(input_ids=ids, use_cache=False).logits


def test_peft_loads_the_adapter_gives_our_logits_and_merges_alike(flags, random_model, tmp_path):
    dora.main(flags("run", "--targets", "q_proj,down_proj,up_proj"))
    base = transformers.AutoModelForCausalLM.from_pretrained
    theirs = peft.PeftModel.from_pretrained(base(random_model), tmp_path / "run")
    expected = logits(theirs)
    with theirs.disable_adapter():
        assert (logits(theirs) - expected).abs().max() > 1e-2
    args = make_args("--model", random_model, "--adapter", str(tmp_path / "run"))
    model = common.load_model(args, torch.float32, CPU)
    common.add_adapter(model, args, dora.DoRALinear, CPU)
    with common.own_attention(model):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5)
    merge = ["--merge-only", "--model", random_model, "--adapter", str(tmp_path / "run")]
    dora.main([*merge, "--output", str(tmp_path / "m")])
    merged = base(tmp_path / "m")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=5e-5)
    unloaded = theirs.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, unloaded[name], rtol=0, atol=2e-6, msg=name)
    losses = [e["eval_loss"] for e in read_metrics(tmp_path / "run") if "eval_loss" in e]
    assert losses[-1] < losses[0]


def test_training_continues_from_pefts_and_our_adapter(flags, random_model, tmp_path):
    """Its magnitudes too: the first held-out loss is PEFT's, or that which our run ended with."""
    torch.manual_seed(0)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "use_dora": True}
    config = peft.LoraConfig(**fields, init_lora_weights=False, task_type="CAUSAL_LM")
    base = transformers.AutoModelForCausalLM.from_pretrained(random_model)
    theirs = peft.get_peft_model(base, config)
    for name, p in theirs.named_parameters():
        if "magnitude" in name:
            p.data *= torch.rand(p.shape) + 0.5
    theirs.save_pretrained(tmp_path / "theirs")
    args = make_args("--model", random_model, "--adapter", str(tmp_path / "theirs"))
    model = common.load_model(args, torch.float32, CPU)
    common.add_adapter(model, args, dora.DoRALinear, CPU)
    with common.own_attention(model):
        torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=2e-5)
    dora.main(flags("a", "--adapter", tmp_path / "theirs"))
    dora.main(flags("b", "--adapter", tmp_path / "a"))
    a, b = ([e["eval_loss"] for e in read_metrics(tmp_path / x) if "eval_loss" in e] for x in "ab")
    assert b[0] == pytest.approx(a[-1], abs=1e-6) and a[0] > a[-1] > b[-1]
    kept = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert kept["use_dora"] is True and (kept["r"], kept["lora_alpha"]) == (4, 8)


def test_lora_and_dora_refuse_each_others_adapters(flags, tmp_path):
    lora.main(flags("lora"))
    dora.main(flags("dora", "--max-steps", 0))
    for script, other in ((lora, "dora"), (dora, "lora")):
        with pytest.raises(common.UserError, match="does not fit.*lora_magnitude_vector"):
            script.main(flags("again", "--adapter", tmp_path / other))
    assert not (tmp_path / "again").exists()


def test_as_a_user_runs_it(tmp_path):
    done = run_script("dora.py", "--output", tmp_path / "run", "--max-steps", 4, "--samples", 2)
    assert done.returncode == 0, done.stderr
    assert "the adapter is in" in done.stdout and "--- after ---" in done.stdout
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert sum(x.numel() for x in tensors.values()) == 160_768
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY)
    assert peft.PeftModel.from_pretrained(base, tmp_path / "run")

"""dora.py against PEFT's DoRA, and the closed form in float64."""

import json

import peft
import pytest
import torch
import transformers
from before import read_metrics, run_script
from torch import nn

import common_before as common
import dora
from before import LLAMA_7B, from_peft
from test_common_before import build, packed_batch


def random_layer(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    layer = dora.DoRALinear(nn.Linear(6, 5, bias=bias, dtype=dtype), rank=2, alpha=3.0)
    nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        layer.magnitude.mul_(torch.rand(5) + 0.5)
    return layer


@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_gradients_are_the_equation(bias):
    """y = m V / ||V|| x + bias in float64 with ||V|| a constant: same values, same gradients of A, B, m and x."""
    layer, x = random_layer(bias), torch.randn(2, 4, 6, requires_grad=True)
    layer(x).square().sum().backward()
    A, B, m, z = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B, layer.magnitude, x))
    V = layer.base.weight.double() + 1.5 * B @ A
    y = z @ (m[:, None] * V / V.norm(dim=1, keepdim=True).detach()).T + (layer.base.bias.double() if bias else 0)
    y.square().sum().backward()
    torch.testing.assert_close(layer(x).double(), y, rtol=0, atol=1e-5)
    for ours, theirs in ((layer.lora_A, A), (layer.lora_B, B), (layer.magnitude, m), (x, z)):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)


def test_a_gradient_through_the_norm_would_be_another():
    """What the test above would see if ||V|| were not detached: B's gradient differs clearly."""
    layer, x = random_layer(), torch.randn(3, 6)
    grads = []
    for detach in (True, False):
        B = layer.lora_B.detach().requires_grad_()
        V = layer.base.weight.detach() + 1.5 * B @ layer.lora_A.detach()
        norm = V.norm(dim=1, keepdim=True)
        (x @ (layer.magnitude.detach()[:, None] * V / (norm.detach() if detach else norm)).T).square().sum().backward()
        grads.append(B.grad)
    layer(x).sub(layer.base.bias).square().sum().backward()
    torch.testing.assert_close(layer.lora_B.grad, grads[0], rtol=1e-4, atol=1e-4)
    assert (grads[0] - grads[1]).norm() > 0.1 * grads[0].norm()


def test_the_norm_needs_no_V():
    layer = random_layer()
    V = layer.base.weight.double() + 1.5 * layer.lora_B.double() @ layer.lora_A.double()
    torch.testing.assert_close(layer.direction_norm().double(), V.norm(dim=1), rtol=1e-5, atol=0)


def test_no_tensor_of_the_weights_size_is_made():
    """Neither forward nor backward makes an (out, in) tensor."""
    torch.manual_seed(0)
    layer = dora.DoRALinear(nn.Linear(300, 200), rank=2, alpha=4)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and function._schema.name not in ("aten::t", "aten::detach", "aten::view", "aten::transpose"):
                sizes.append(out.numel())
            return out

    with Watch():
        layer(torch.randn(3, 300)).sum().backward()
    assert sizes and max(sizes) < 200 * 300


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt_neox"])
def test_identity_at_the_start_and_only_adapters_get_gradients(name):
    model, batch = build(name), packed_batch([20, 10]) | {"documents": None}
    before = model.target_logps(**batch)
    dora.add_dora(model, "all-linear", 4, 8)
    torch.testing.assert_close(model.target_logps(**batch), before, rtol=0, atol=1e-5)
    model.target_logps(**batch).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"lora_A", "lora_B", "magnitude"}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}


def test_a_bfloat16_base_gives_bfloat16_outputs_near_the_float32_ones():
    torch.manual_seed(0)
    wide = dora.DoRALinear(nn.Linear(64, 8), rank=2, alpha=4)
    narrow = dora.DoRALinear(nn.Linear(64, 8, dtype=torch.bfloat16), rank=2, alpha=4)
    with torch.no_grad():
        nn.init.normal_(wide.lora_B)
        wide.base.weight.copy_(narrow.base.weight), wide.base.bias.copy_(narrow.base.bias)
        wide.base_norm.copy_(narrow.base_norm), narrow.lora_B.copy_(wide.lora_B), narrow.lora_A.copy_(wide.lora_A)
        wide.magnitude.copy_(1.3 * narrow.magnitude), narrow.magnitude.mul_(1.3)
    x = torch.randn(50, 64)
    assert narrow(x.bfloat16()).dtype == torch.bfloat16 and narrow.magnitude.dtype == torch.float32
    torch.testing.assert_close(narrow(x.bfloat16()).float(), wide(x), rtol=0.02, atol=0.05)


def test_a_weight_row_of_zeros_gives_no_nan():
    layer = dora.DoRALinear(nn.Linear(6, 5), rank=2, alpha=4)
    with torch.no_grad():
        layer.base.weight[2] = 0
    layer = dora.DoRALinear(layer.base, rank=2, alpha=4)
    layer(torch.randn(3, 6)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in (layer.lora_A, layer.lora_B, layer.magnitude))
    assert layer.merged().weight.isfinite().all() and not layer.base.weight[2].any()


def test_gradients_equal_pefts():
    """The same A, B and m in PEFT's model and ours: same loss, same gradients."""
    ours, base = build("qwen2"), build("qwen2")  # with biases, which are not scaled
    config = peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(base, config)
    dora.add_dora(ours, "all-linear", 4, 8)
    pairs = []
    with torch.no_grad():
        for name, layer in dora.dora_layers(ours).items():
            other = theirs.get_submodule(f"base_model.model.{name}")
            theirs_m = other.lora_magnitude_vector["default"].weight
            theirs_m.mul_(torch.rand(theirs_m.shape) * 0.2 + 0.9)
            pairs += [(layer.lora_A, other.lora_A["default"].weight), (layer.lora_B, other.lora_B["default"].weight), (layer.magnitude, theirs_m)]
        for a, b in pairs:
            a.copy_(b)
    batch = packed_batch([30])
    loss = -ours.target_logps(**batch | {"documents": None}).mean()
    expected = theirs(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    loss.backward(), expected.backward()
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)


def test_parameter_count_of_llama_7b():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_7B))
        dora.add_dora(model, "q_proj,k_proj,v_proj,up_proj,down_proj", 32, 64)
    assert common.count_parameters(model)[0] == 56_975_360


def test_peft_loads_the_adapter_gives_our_logits_and_merges_alike(tmp_path):
    flags = ["--max-steps", "6", "--batch-size", "1", "--max-length", "256", "--samples", "0", "--lr", "0.01"]
    dora.main(["--output", str(tmp_path / "run"), "--merge", *flags])
    theirs = from_peft(tmp_path / "run")
    seen, original = [], dora.train
    dora.train = seen.append
    try:
        dora.main(["--model", str(tmp_path / "run" / "base"), "--adapter", str(tmp_path / "run")])
    finally:
        dora.train = original
    model = common.load_model(seen[0], torch.float32, torch.device("cpu"))
    dora.load_dora(model, seen[0])
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), common.attention(model, "sdpa"):
        expected = theirs(input_ids=ids).logits
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected, rtol=0, atol=2e-5)
        with theirs.disable_adapter():
            assert (theirs(input_ids=ids).logits - expected).abs().max() > 1e-2
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=0, atol=5e-5)
        for (name, a), b in zip(merged.named_parameters(), theirs.merge_and_unload().parameters()):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6, msg=name)
    evaluations = [entry["eval_loss"] for entry in read_metrics(tmp_path / "run") if "eval_loss" in entry]
    assert evaluations[-1] < evaluations[0]


def test_a_lora_adapter_is_refused(tmp_path):
    flags = ["--max-steps", "0", "--samples", "0"]
    dora.main(["--output", str(tmp_path), *flags])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    with pytest.raises(common.UserError, match="without magnitudes"):
        dora.main(["--output", str(tmp_path / "b"), "--adapter", str(tmp_path), *flags])


def test_as_a_user_runs_it(tmp_path):
    run = run_script("dora.py", "--output", tmp_path / "run", "--max-steps", "4", "--log-every", "2")
    assert run.returncode == 0, run.stderr
    assert "python dora.py" in run.stdout and "--- after ---" in run.stdout and (tmp_path / "run" / "base").exists()

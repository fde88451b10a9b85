"""qlora.py: NF4 against bitsandbytes to the last bit, adapters against PEFT on a base that
transformers quantised."""

import math

import bitsandbytes
import bitsandbytes.functional as reference
import peft
import pytest
import torch
import transformers
from conftest import TINY, read_metrics, run_script, write_rows
from safetensors.torch import load_file
from test_model import build, load, make_args, own, packed_batch
from torch import nn
from two_ranks import run

import common
import qlora

CPU = torch.device("cpu")
ROWS = [{"prompt": f"Repeat {c}.", "completion": c * n} for n in range(1, 7) for c in "abcde"]
SIX = "--max-steps 6 --batch-size 8 --lr 0.01 --samples 0 --eval-data 0.2 --dropout 0.1".split()


@pytest.fixture
def flags(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)

    def make(name, *more):
        start = ["--model", TINY, "--data", data, "--output", str(tmp_path / name)]
        return [*start, *SIX, *map(str, more)]

    return make


def quantized(name="llama", **extra):
    return load(own(name, **extra), load_in_4bit=True)


def bitsandbytes_state(weight):
    kind = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": True}
    return reference.quantize_4bit(weight, **kind)


# ------------------------------------------------------------------------------ quantisation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(128, 192), (7, 64), (5, 33), (1, 1), (200,)])
def test_packed_bytes_and_absmax_are_bitsandbytes_to_the_last_bit(shape, dtype):
    torch.manual_seed(sum(shape))
    weight = (0.05 * torch.randn(shape)).to(dtype)
    weight.view(-1)[: min(64, weight.numel() // 2)] = 0  # a block of zeros among them
    packed, state = reference.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours, absmax = qlora.nf4_quantize(weight)
    assert torch.equal(ours, packed.flatten()) and torch.equal(absmax, state.absmax)
    theirs = reference.dequantize_4bit(packed, state).float().flatten()
    ours = qlora.nf4_dequantize(ours, absmax)[: weight.numel()]
    assert torch.equal(ours.to(dtype).float(), theirs)


def test_a_tie_goes_to_the_lower_code():
    middle = (qlora.NF4[9] + qlora.NF4[10]) / 2
    packed, _ = qlora.nf4_quantize(torch.tensor([1.0, middle]))
    assert packed.tolist() == [15 << 4 | 9]


def test_the_codes_are_normal_quantiles():
    quantile = torch.special.ndtri
    positive = quantile(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -quantile(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    codes = torch.cat([positive, negative, torch.zeros(1)]).sort().values / positive.max()
    torch.testing.assert_close(codes.float(), qlora.NF4, rtol=0, atol=1e-6)


def test_double_quantisation_is_bitsandbytes():
    """Map, scales and mean to the last bit. Codes: ours are the nearest; bitsandbytes' CPU kernel
    looks them up in a table and is one step off for about one in a thousand."""
    torch.manual_seed(0)
    weight = 0.05 * torch.randn(512, 512)
    _, state = bitsandbytes_state(weight)
    absmax = qlora.nf4_quantize(weight)[1]
    codes, scale, mean = qlora.double_quantize(absmax)
    assert torch.equal(qlora.dynamic_map(), state.state2.code)
    assert torch.equal(scale, state.state2.absmax) and torch.equal(mean, state.offset)
    off = (codes.int() - state.absmax.int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.003
    theirs = qlora.double_dequantize(state.absmax, state.state2.absmax, state.offset) - absmax
    ours = qlora.double_dequantize(codes, scale, mean) - absmax
    assert ours.abs().sum() <= theirs.abs().sum() and ours.abs().max() < 0.02 * absmax.max()


def test_a_weight_costs_4_127_bits():
    theory = 4 + 8 / 64 + 32 / (64 * 256)
    assert theory == pytest.approx(4.127, abs=1e-3)
    model = quantized(hidden_size=512, intermediate_size=1024)
    assert qlora.bits_per_weight(model) == pytest.approx(theory, rel=2e-4)


# --------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_4_bit_layer_is_its_dequantised_weight(bias, dtype):
    """As bitsandbytes dequantises, in training and in evaluation; the gradient too."""
    torch.manual_seed(0)
    base, x = nn.Linear(192, 96, bias=bias, dtype=dtype), torch.randn(5, 192, dtype=dtype)
    weight = reference.dequantize_4bit(*bitsandbytes_state(base.weight.data))
    layer, x = common.Linear4bit(base, CPU), x.requires_grad_()
    torch.testing.assert_close(qlora.dequantized(layer).to(dtype), weight, rtol=0, atol=0)
    expected = nn.functional.linear(x, weight, base.bias)
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.02}
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected, **tolerance)
    y = layer.train()(x)
    torch.testing.assert_close(y, expected, **tolerance)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, weight.sum(0).expand(5, -1), **tolerance)
    assert layer.state_dict().keys() == ({"weight", "bias"} if bias else {"weight"})


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox"])
def test_every_layer_but_the_head_is_quantised_and_the_rest_stays(name):
    base, model = build(name), quantized(name)
    linear = [n for n, m in base.named_modules() if isinstance(m, nn.Linear)]
    assert [*qlora.quantized_layers(model), "lm_head"] == linear
    assert common.fingerprint(model) == common.fingerprint(base)
    theirs = dict(base.named_parameters())
    for key, p in model.named_parameters():
        assert p.dtype == torch.uint8 or torch.equal(p, theirs[key])
    batch = packed_batch([20, 10])
    difference = model.target_logps(**batch) - base.target_logps(**batch)
    assert 1e-3 < difference.abs().mean() < 0.5


def test_the_start_is_the_4_bit_base_and_only_adapters_get_gradients(capsys):
    """Also after evaluating and generating. The base is counted by its weights, not its bytes."""
    model, batch = quantized().train(), packed_batch([20, 10])
    before, total = model.target_logps(**batch), sum(p.numel() for p in own("llama").parameters())
    common.add_adapter(model, make_args(), qlora.LoRALinear, CPU)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{count:,} of {total + count:,} parameters train" in capsys.readouterr().out
    torch.testing.assert_close(before, model.target_logps(**batch), rtol=1e-6, atol=0)
    with common.evaluating(model), common.own_attention(model):
        model.generate(input_ids=batch["input_ids"][:, :5], max_new_tokens=3)
    model.target_logps(**batch).sum().backward()
    for name, p in model.named_parameters():
        assert ("lora_" in name) == p.requires_grad == (p.grad is not None), name
        assert "lora_B" not in name or p.grad.any(), name


def test_what_bitsandbytes_gets_wrong_on_a_cpu_is_refused():
    with pytest.raises(common.UserError, match="96 inputs are no multiple of 64"):
        quantized(intermediate_size=96)


def test_a_4_bit_base_is_not_sharded():
    with pytest.raises(common.UserError, match="--shard"):
        load(own("llama"), load_in_4bit=True, shard=True)


# ------------------------------------------------------------------------------- whole runs


def loaded(model, folder):
    """Our 4-bit base with the adapter of a folder."""
    seen, original = [], qlora.train
    qlora.train = seen.append
    try:
        qlora.main(["--model", str(model), "--data", "unused", "--adapter", str(folder)])
    finally:
        qlora.train = original
    model = common.load_model(seen[0], torch.float32, CPU, load_in_4bit=True)
    common.add_adapter(model, seen[0], qlora.LoRALinear, CPU)
    return model


def test_peft_on_a_base_that_transformers_quantised_gives_our_logits_and_gradients(flags, tmp_path):
    qlora.main(flags("run"))
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    base = transformers.AutoModelForCausalLM.from_pretrained
    theirs = base(TINY, quantization_config=config, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "run", is_trainable=True)
    theirs.train()  # in eval mode, bitsandbytes' own layer computes in bfloat16 on a CPU
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ours = loaded(TINY, tmp_path / "run")
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(3))
    with common.own_attention(ours):
        found = ours(input_ids=ids, use_cache=False).logits
    expected = theirs(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    found.sin().mean().backward(), expected.sin().mean().backward()
    grads = {n.replace(".default", "").removeprefix("base_model.model."): p.grad
             for n, p in theirs.named_parameters() if p.requires_grad}  # fmt: skip
    ours = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert ours.keys() == grads.keys() and len(ours) == 56
    for name, gradient in ours.items():
        size = grads[name].abs().max().item()
        torch.testing.assert_close(gradient, grads[name], rtol=1e-4, atol=1e-4 * size, msg=name)
    plain = peft.PeftModel.from_pretrained(base(TINY, dtype=torch.float32), tmp_path / "run")
    with torch.no_grad():  # the original base gives other logits
        assert (plain.eval()(input_ids=ids).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["dequantized", "original"])
def test_merging_adds_in_float32_and_rounds_once(kind, flags, tmp_path, capsys):
    """To every adapted layer; the others are the base's."""
    qlora.main(flags("run", "--targets", "gate_proj,q_proj"))
    capsys.readouterr()
    merge = ["--merge-only", "--model", TINY, "--adapter", str(tmp_path / "run")]
    qlora.main([*merge, "--merge-base", kind, "--output", str(tmp_path / "m")])
    printed = capsys.readouterr().out
    assert f"merged into the {kind} weights" in printed and "top tokens are the same" in printed
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).state_dict()
    merged = load_file(tmp_path / "m" / "model.safetensors")
    changed = 0
    for name, tensor in merged.items():
        expected = base[name].double()
        if "_proj" in name and kind == "dequantized":
            expected = reference.dequantize_4bit(*bitsandbytes_state(base[name])).double()
        if f"base_model.model.{name[:-6]}lora_A.weight" in adapter:
            A, B = (adapter[f"base_model.model.{name[:-6]}lora_{x}.weight"].double() for x in "AB")
            expected += 2 * B @ A
            changed += 1
        assert tensor.dtype == torch.bfloat16
        half_a_step = 2 ** (expected.abs().log2().floor() - 8)  # bfloat16 keeps 8 bits
        assert ((tensor.double() - expected).abs() <= half_a_step + 1e-8).all(), name
    assert changed == 8
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    assert not hasattr(config, "quantization_config") and config.dtype == torch.bfloat16
    moved = float(printed.split("logits change by ")[1].split()[0])
    ids = transformers.AutoTokenizer.from_pretrained(TINY)(qlora.__doc__).input_ids[:128]
    args = make_args()
    args.model, args.no_packing, args.gradient_checkpointing = str(tmp_path / "m"), False, 0
    with torch.no_grad():
        drift = qlora.logits(common.load_model(args, torch.bfloat16, CPU), torch.tensor([ids]))
        drift -= qlora.logits(loaded(TINY, tmp_path / "run"), torch.tensor([ids]))
    assert moved == pytest.approx(drift.abs().mean().item(), rel=0.02)


def test_paged_8_bit_states_train_as_well(flags, tmp_path):
    qlora.main(flags("a", "--max-steps", 8))
    qlora.main(flags("b", "--max-steps", 8, "--optimizer", "paged_adamw8bit"))
    a, b = ([e["loss"] for e in read_metrics(tmp_path / x) if "loss" in e] for x in "ab")
    assert a[-1] == pytest.approx(b[-1], rel=0.02) and a != b and a[-1] < 0.5 * a[0]


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw8bit"])
def test_a_resumed_run_equals_one_that_was_never_stopped(optimizer, flags, tmp_path):
    """The checkpoint has the adapter and its states, and nothing of the 4-bit base."""
    run("qlora", flags("whole", "--optimizer", optimizer))
    run("qlora", flags("parts", "--optimizer", optimizer), stop=3)
    (path,) = (tmp_path / "parts" / "checkpoint").iterdir()
    assert all("lora_" in key for key in torch.load(path, weights_only=True)["model"])
    run("qlora", flags("parts", "--optimizer", optimizer, "--resume"))
    whole, parts = (
        [
            (e.get("loss"), e.get("grad_norm"), e.get("eval_loss"))
            for e in read_metrics(tmp_path / x)
        ]
        for x in ("whole", "parts")
    )
    assert whole == parts and sum(loss is not None for loss, *_ in whole) == 6
    a, b = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resumed_states_are_paged_again(flags, tmp_path, monkeypatch):
    """On a GPU, get_state_buffer gives memory that can move to the host; here, one with a mark."""

    def get_state_buffer(optimizer, p, dtype=torch.float32):
        buffer = torch.zeros_like(p, dtype=dtype)
        buffer.is_marked = True
        return buffer

    paged, read = [], common.read_checkpoint

    def read_checkpoint(args, name, model, optimizer, fixed):
        found = read(args, name, model, optimizer, fixed)
        for state in optimizer.state.values():
            paged.extend(hasattr(state[key], "is_marked") for key in ("state1", "state2"))
        return found

    monkeypatch.setattr(bitsandbytes.optim.PagedAdamW8bit, "get_state_buffer", get_state_buffer)
    monkeypatch.setattr(common, "read_checkpoint", read_checkpoint)
    run("qlora", flags("run", "--optimizer", "paged_adamw8bit"), stop=3)
    run("qlora", flags("run", "--optimizer", "paged_adamw8bit", "--resume"))
    assert len(paged) > 8 and all(paged)


def test_as_a_user_runs_it(tmp_path):
    flags = ["--output", tmp_path / "run", "--max-steps", 4, "--samples", 2]
    done = run_script("qlora.py", *flags)
    assert done.returncode == 0, done.stderr
    assert "linear layers take 4.128 bits per weight" in done.stdout
    assert "the adapter is in" in done.stdout and "kernels" not in done.stdout + done.stderr
    assert read_metrics(tmp_path / "run")[0]["run"]["args"]["optimizer"] == "adamw"
    assert math.isfinite(read_metrics(tmp_path / "run")[-2]["eval_exact_match"])


@pytest.mark.cuda
def test_on_cuda_the_packed_bytes_are_the_same():
    torch.manual_seed(0)
    weight = (0.05 * torch.randn(512, 512, device="cuda")).bfloat16()
    packed, state = reference.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours, absmax = qlora.nf4_quantize(weight)
    assert torch.equal(ours, packed.flatten()) and torch.equal(absmax, state.absmax)

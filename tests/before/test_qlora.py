"""qlora.py: its NF4 against bitsandbytes to the last bit, its adapter against PEFT on a base that transformers quantised."""

import math

import bitsandbytes.functional as reference
import pytest
import torch
import transformers
from before import read_metrics, run_script
from safetensors.torch import load_file
from torch import nn

import common_before as common
import qlora
from before import from_peft
from test_common_before import build, packed_batch
from before import Killed, flags, kill_after, without_times


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
    assert torch.equal(qlora.nf4_dequantize(ours, absmax)[: weight.numel()].to(dtype).float(), theirs)


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


def test_the_error_of_a_normal_weight_is_what_four_bits_allow():
    torch.manual_seed(0)
    weight = torch.randn(256, 256)
    packed, absmax = qlora.nf4_quantize(weight)
    error = (qlora.nf4_dequantize(packed, absmax).view(256, 256) - weight).square().mean()
    assert 0.005 < error < 0.012  # of a variance of 1


def test_double_quantisation_is_bitsandbytes():
    """Map, scales and mean to the last bit. Codes: ours are the nearest; bitsandbytes' CPU kernel looks them up in a table and
    is one step off for about one in a thousand."""
    torch.manual_seed(0)
    weight = 0.05 * torch.randn(512, 512)
    _, state = reference.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    absmax = qlora.nf4_quantize(weight)[1]
    codes, scale, mean = qlora.double_quantize(absmax)
    assert torch.equal(qlora.dynamic_map(), state.state2.code)
    assert torch.equal(scale, state.state2.absmax) and torch.equal(mean, state.offset)
    off = (codes.int() - state.absmax.int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.003
    theirs = qlora.double_dequantize(state.absmax, state.state2.absmax, state.offset)
    ours = qlora.double_dequantize(codes, scale, mean)
    assert (ours - absmax).abs().sum() <= (theirs - absmax).abs().sum() and (ours - absmax).abs().max() < 0.02 * absmax.max()


def quantised(name="llama", dtype=torch.float32, **extra):
    model = build(name, num_key_value_heads=4, **extra)
    qlora.quantize(model, dtype, torch.device("cpu"))
    return model


def test_a_weight_costs_4_127_bits():
    theory = 4 + 8 / 64 + 32 / (64 * 256)
    assert theory == pytest.approx(4.127, abs=1e-3)
    assert qlora.bits_per_weight(quantised(hidden_size=512, intermediate_size=1024)) == pytest.approx(theory, rel=1e-3)


def test_a_4_bit_layer_is_its_dequantised_weight():
    model = quantised()
    layer = qlora.quantized_layers(model)["model.layers.0.mlp.up_proj"]
    weight, x = qlora.dequantized(layer), torch.randn(3, 64)
    assert torch.equal(weight, reference.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float())
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=0, atol=1e-5)
    assert len(qlora.quantized_layers(model)) == 14 and isinstance(model.lm_head, nn.Linear) and type(model.lm_head) is nn.Linear


def test_norms_are_float32_and_the_stream_is_not():
    model = build("llama", num_key_value_heads=4).to(torch.bfloat16)
    qlora.quantize(model, torch.bfloat16, torch.device("cpu"))
    assert model.model.norm.weight.dtype == model.model.layers[0].input_layernorm.weight.dtype == torch.float32
    assert model.get_input_embeddings().weight.dtype == model.lm_head.weight.dtype == torch.bfloat16
    assert model.model(input_ids=torch.tensor([[5, 6]])).last_hidden_state.dtype == torch.bfloat16


def test_a_layer_norm_gets_and_gives_one_dtype():
    """CUDA's kernel refuses a bfloat16 input with float32 weights, which a CPU's takes."""
    model = build("gpt_neox").to(torch.bfloat16)
    qlora.quantize(model, torch.bfloat16, torch.device("cpu"))
    norms, seen = [module for module in model.modules() if isinstance(module, nn.LayerNorm)], []
    for norm in norms:
        norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    assert model.base_model(input_ids=torch.tensor([[5, 6]])).last_hidden_state.dtype == torch.bfloat16
    assert seen == [torch.float32] * len(norms) and norms[0].weight.dtype == torch.float32


def test_identity_at_the_start_and_gradients_after_evaluation_and_generation():
    """On a CPU one forward in eval mode would repack the 4-bit weights, and no gradient would come back: they never leave
    train mode."""
    model, batch = quantised(), packed_batch([20, 10]) | {"documents": None}
    before = model.target_logps(**batch)
    qlora.add_lora(model, "all-linear", 4, 8)
    assert torch.equal(before, model.target_logps(**batch))
    with common.evaluating(model):
        model.target_logps(**batch)
        model.generate(input_ids=batch["input_ids"][:, :5], max_new_tokens=3)
    model.target_logps(**batch).sum().backward()
    assert all(("lora_" in name) == p.requires_grad == (p.grad is not None) for name, p in model.named_parameters())
    assert all(p.grad.any() for name, p in model.named_parameters() if "lora_B" in name)


def test_layers_that_bitsandbytes_gets_wrong_on_a_cpu_are_refused():
    with pytest.raises(common.UserError, match="multiples of 64"):
        quantised(intermediate_size=96)


def short_run(folder, *more):
    settings = ["--max-steps", "6", "--batch-size", "1", "--max-length", "256", "--samples", "0", "--lr", "0.01", "--log-every", "2"]
    qlora.main(["--output", str(folder), *settings, *more])


def test_peft_on_a_base_that_transformers_quantised_gives_our_logits(tmp_path):
    short_run(tmp_path / "run")
    base = tmp_path / "run" / "base"
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    theirs = from_peft(tmp_path / "run", theirs).train()  # see above: no eval mode on a CPU; dropout is 0
    args = arguments("--model", str(base), "--adapter", str(tmp_path / "run"))
    ours = common.load_model(args, torch.float32, torch.device("cpu"))
    qlora.quantize(ours, torch.float32, torch.device("cpu"))
    qlora.load_lora(ours, args)
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), common.attention(ours, "sdpa"):
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=0, atol=2e-5)
    plain = from_peft(tmp_path / "run")
    with torch.no_grad():
        assert (plain(input_ids=ids).logits - theirs(input_ids=ids).logits).abs().max() > 1e-3  # the base is not the same


def arguments(*given):
    seen, original = [], qlora.train
    qlora.train = seen.append
    try:
        qlora.main(list(given))
    finally:
        qlora.train = original
    return seen[0]


@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_merging_adds_in_float32_and_rounds_once(base, tmp_path, capsys):
    short_run(tmp_path, "--merge", "--merge-base", base)
    printed = capsys.readouterr().out
    assert f"merged onto the {base} weights" in printed and "greedy choices stay" in printed
    merged, adapter = load_file(tmp_path / "merged" / "model.safetensors"), load_file(tmp_path / "adapter_model.safetensors")
    name = "model.layers.1.mlp.gate_proj"
    weight = common.tiny_model().get_submodule(name).weight.detach()  # on a CPU the base is quantised from float32
    if base == "original":
        weight = weight.to(torch.bfloat16)
    else:
        packed, absmax = qlora.nf4_quantize(weight)
        codes = reference.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)[1]
        absmax = qlora.double_dequantize(codes.absmax, codes.state2.absmax, codes.offset)
        weight = qlora.nf4_dequantize(packed, absmax).view(weight.shape)
    A, B = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    expected = (weight.double() + 2 * B.double() @ A.double()).to(torch.bfloat16)
    assert merged[f"{name}.weight"].dtype == torch.bfloat16
    assert (merged[f"{name}.weight"] != expected).float().mean() < 0.01  # a float32 sum may round to the other neighbour
    torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=0.01, atol=1e-6)
    assert not hasattr(transformers.AutoConfig.from_pretrained(tmp_path / "merged"), "quantization_config")
    evaluations = [entry["eval_loss"] for entry in read_metrics(tmp_path) if "eval_loss" in entry]
    assert evaluations[-1] < evaluations[0]


def test_paged_8_bit_states_train_as_well(tmp_path):
    short_run(tmp_path / "a", "--max-steps", "8")
    short_run(tmp_path / "b", "--max-steps", "8", "--optimizer", "paged_adamw8bit")
    losses = [[e["eval_loss"] for e in read_metrics(tmp_path / name) if "eval_loss" in e][-1] for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]


def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path, monkeypatch):
    qlora.main(flags(tmp_path, "whole"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 7)
        qlora.main(flags(tmp_path, "parts"))
    qlora.main(flags(tmp_path, "parts", "--resume"))
    assert without_times(read_metrics(tmp_path / "whole")) == without_times(read_metrics(tmp_path / "parts"))


def test_the_whole_base_is_counted_not_its_bytes():
    model = build("llama", num_key_value_heads=4)
    before = common.count_parameters(model)[1]
    qlora.quantize(model, torch.float32, torch.device("cpu"))
    assert common.count_parameters(model) == (common.count_parameters(model)[0], before)
    assert math.prod(model.model.layers[0].mlp.up_proj.weight.shape) < 64 * 128


def test_as_a_user_runs_it(tmp_path):
    run = run_script("qlora.py", "--output", tmp_path / "run", "--max-steps", "4", "--log-every", "2", "--merge")
    assert run.returncode == 0, run.stderr
    assert "bits a weight" in run.stdout and "optimizer: adamw" in run.stdout and "python qlora.py" in run.stdout
    assert (tmp_path / "run" / "merged" / "model.safetensors").exists()


@pytest.mark.cuda
def test_on_cuda_the_packed_bytes_are_the_same():
    torch.manual_seed(0)
    weight = (0.05 * torch.randn(512, 512, device="cuda")).bfloat16()
    packed, state = reference.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours, absmax = qlora.nf4_quantize(weight)
    assert torch.equal(ours, packed.flatten()) and torch.equal(absmax, state.absmax)

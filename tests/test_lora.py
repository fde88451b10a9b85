"""lora.py against PEFT, and as a user runs it."""

import json
import re
import shlex
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from conftest import ROOT, read_metrics, run_script, write_rows
from torch import nn

import common
import lora
from test_model import build, packed_batch

LLAMA_7B = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)


def train(tmp_path, *flags):
    """A short run of lora.py in this process. -> its output folder"""
    folder = tmp_path / "run"
    lora.main(["--output", str(folder), "--max-steps", "3", "--batch-size", "1", "--max-length", "256", "--samples", "0", "--lr", "0.01", *flags])
    return folder


def from_peft(folder, base=None):
    return peft.PeftModel.from_pretrained(base or transformers.AutoModelForCausalLM.from_pretrained(folder / "base"), folder).eval()


def test_the_update_is_the_equation():
    """h = W0 x + s B A x in float64, and its gradients."""
    torch.manual_seed(0)
    layer = lora.LoRALinear(nn.Linear(6, 5), rank=2, alpha=3.0)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 4, 6)
    layer(x).square().sum().backward()
    A, B, W, b = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B, layer.base.weight, layer.base.bias))
    h = x.double() @ W.T + b + 1.5 * x.double() @ A.T @ B.T
    h.square().sum().backward()
    torch.testing.assert_close(layer(x).double(), h, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.lora_A.grad.double(), A.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.lora_B.grad.double(), B.grad, rtol=1e-4, atol=1e-4)
    assert layer.base.weight.grad is None


def test_rslora_scales_by_the_square_root_of_the_rank():
    assert lora.LoRALinear(nn.Linear(4, 4), rank=16, alpha=8, rslora=True).scaling == 2
    assert lora.LoRALinear(nn.Linear(4, 4), rank=16, alpha=8).scaling == 0.5


def test_initial_values():
    """A ~ U(-1/sqrt(in), 1/sqrt(in)) in float32, which is kaiming_uniform(a=sqrt 5); B = 0. float32 beside a bfloat16 base."""
    layer = lora.LoRALinear(nn.Linear(400, 30, dtype=torch.bfloat16), rank=16, alpha=32)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32 and not layer.lora_B.any()
    assert 0.04 < layer.lora_A.abs().max() <= 1 / 400**0.5 and layer.lora_A.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.05)
    assert layer(torch.randn(3, 400, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt_neox"])
def test_identity_at_the_start_and_only_adapters_get_gradients(name):
    model, batch = build(name), packed_batch([20, 10]) | {"documents": None}
    before = model.target_logps(**batch)
    lora.add_lora(model, "all-linear", 4, 8)
    names = lora.lora_layers(model)
    assert torch.equal(before, model.target_logps(**batch))
    assert len(names) == {"gpt_neox": 4}.get(name, 7) * 2 and not any("lm_head" in n or "embed_out" in n for n in names)
    model.target_logps(**batch).sum().backward()
    assert all(("lora_" in n) == p.requires_grad == (p.grad is not None) for n, p in model.named_parameters())
    common.check_gradients(model)


def test_dropout_reaches_the_update_alone():
    torch.manual_seed(0)
    layer, x = lora.LoRALinear(nn.Linear(64, 8), rank=4, alpha=4, dropout=0.5), torch.randn(3, 64)
    assert torch.equal(layer.train()(x), layer.base(x))  # B is zero, so dropout on A's input shows nowhere
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("rank, targets, expected", [
    (8, "q_proj,v_proj", 4_194_304),
    (16, "q_proj,k_proj,v_proj,o_proj", 16_777_216),
    (64, "all-linear", 159_907_840),
    (32, "q_proj,k_proj,v_proj,up_proj,down_proj", 56_098_816),
])  # fmt: skip
def test_parameter_counts_of_llama_7b(rank, targets, expected):
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_7B))
        assert common.count_parameters(model)[1] == 6_738_415_616
        lora.add_lora(model, targets, rank, 16)
    assert common.count_parameters(model) == (expected, 6_738_415_616 + expected)


@pytest.mark.parametrize("flags", [[], ["--targets", "q_proj,v_proj", "--rank", "4"], ["--rslora", "--alpha", "8"]])
def test_peft_loads_the_adapter_gives_our_logits_and_merges_alike(flags, tmp_path):
    folder = train(tmp_path, "--merge", *flags)
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(3))
    theirs = from_peft(folder)
    assert sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n) == read_metrics(folder)[0]["run"]["trainable_parameters"]

    model = common.load_model(lora_args(folder / "base"), torch.float32, torch.device("cpu"))
    lora.load_lora(model, lora_args(folder / "base", "--adapter", str(folder)))
    base_logits = model.eval()  # ours, through the same code path as training
    with torch.no_grad(), common.attention(model, "sdpa"):
        ours, expected = base_logits(input_ids=ids).logits, theirs(input_ids=ids).logits
        with theirs.disable_adapter():
            assert (theirs(input_ids=ids).logits - expected).abs().max() > 1e-2  # the adapter does something
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)
        merged = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged")
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=0, atol=5e-5)
        for (name, a), b in zip(merged.named_parameters(), theirs.merge_and_unload().parameters()):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)


def lora_args(model, *flags):
    """The arguments of lora.py, by way of its own parser."""
    seen = []
    original, lora.train = lora.train, seen.append
    try:
        lora.main(["--model", str(model), *flags])
    finally:
        lora.train = original
    return seen[0]


def test_gradients_equal_pefts():
    """The same A and B in PEFT's model and ours: same loss, same gradients."""
    ours, base = build("llama"), build("llama")
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))
    lora.add_lora(ours, "all-linear", 4, 8)
    names = layers = lora.lora_layers(ours)
    with torch.no_grad():
        for name in names:
            other = theirs.get_submodule(f"base_model.model.{name}")
            layers[name].lora_A.copy_(other.lora_A["default"].weight)
            layers[name].lora_B.copy_(other.lora_B["default"].weight)
    batch = packed_batch([30])
    loss = -ours.target_logps(**batch | {"documents": None}).mean()
    expected = theirs(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    loss.backward(), expected.backward()
    for name in names:
        other = theirs.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(layers[name].lora_A.grad, other.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layers[name].lora_B.grad, other.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-6)


def test_a_single_layer_is_named_so_that_peft_adapts_it_alone(tmp_path):
    folder = train(tmp_path, "--targets", "layers.0.self_attn.q_proj")
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert sum("lora_A" in name for name, _ in from_peft(folder).named_parameters()) == 1


def test_an_adapter_of_pefts_own_is_taken_up(tmp_path, capsys):
    base = common.tiny_model()
    config = peft.LoraConfig(r=4, lora_alpha=12, use_rslora=True, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(tmp_path)
    args = lora_args("random", "--adapter", str(tmp_path))
    model = common.load_model(args, torch.float32, torch.device("cpu"))
    lora.load_lora(model, args)
    ids = torch.randint(0, 256, (1, 30))
    with torch.no_grad(), common.attention(model, "sdpa"):
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits, rtol=0, atol=2e-5)
    assert "on trust" in capsys.readouterr().out


def test_training_goes_on_from_an_adapter(tmp_path):
    first = train(tmp_path / "a")
    with pytest.raises(common.UserError, match="^--rank: the folder of --adapter has its own"):
        train(tmp_path / "b", "--adapter", str(first), "--rank", "99")
    with pytest.raises(common.UserError, match="would replace --adapter"):
        train(tmp_path / "a", "--adapter", str(first), "--max-steps", "0")
    second = train(tmp_path / "b", "--adapter", str(first))
    assert json.loads((second / "adapter_config.json").read_text())["r"] == 16
    losses = [next(e["eval_loss"] for e in read_metrics(folder) if "eval_loss" in e) for folder in (first, second)]
    assert losses[1] == pytest.approx([e["eval_loss"] for e in read_metrics(first) if "eval_loss" in e][-1], abs=1e-6) != losses[0]


def damage(folder, **changes):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("changes, match", [
    ({"base_fingerprint": "0" * 32}, "another base"),
    ({"peft_type": "IA3"}, "not a LORA"),
    ({"use_dora": True}, "use_dora"),
    ({"bias": "all"}, "bias"),
    ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
    ({"init_lora_weights": "pissa"}, "pissa"),
    ({"r": 8}, "does not fit"),
])  # fmt: skip
def test_adapters_that_do_not_fit_are_refused(changes, match, tmp_path):
    folder = train(tmp_path, "--max-steps", "0")
    damage(folder, **changes)
    with pytest.raises(common.UserError, match=match):
        train(tmp_path / "again", "--adapter", str(folder))


@pytest.mark.parametrize("targets, match", [("no_such", "matches no linear layer.*q_proj"), ("lm_head", "matches no")])
def test_targets_that_match_nothing_are_refused(targets, match):
    with pytest.raises(common.UserError, match=match):
        lora.add_lora(build("llama"), targets, 4, 8)


def test_gpt2_gets_a_clear_error():
    with pytest.raises(common.UserError, match="Conv1D"):
        lora.add_lora(build("gpt2"), "all-linear", 4, 8)


def test_merging_rounds_once_in_float32():
    torch.manual_seed(0)
    layer = lora.LoRALinear(nn.Linear(64, 64, dtype=torch.bfloat16), rank=4, alpha=8)
    nn.init.normal_(layer.lora_B, std=0.01)
    expected = (layer.base.weight.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()).to(torch.bfloat16)
    assert torch.equal(layer.merged().weight, expected)


def test_overfits_one_batch(tmp_path):
    """A method that cannot learn four rows by heart has a bug. The tiny model's frozen head is too flat for a low loss (its
    logits stay below 2.6), so it is made five times steeper here."""
    base, tokenizer = common.tiny_model(), common.tiny_tokenizer()
    base.padded_attention = "sdpa"
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(5)
    common.save_model(tmp_path / "base", base, tokenizer)
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": c * 3, "completion": c * 5} for c in "abcd"])
    flags = ["--model", str(tmp_path / "base"), "--eval-fraction", "0", "--max-steps", "100", "--lr", "0.01", "--samples", "0"]
    lora.main(["--data", data, "--output", str(tmp_path / "run"), *flags])
    losses = [entry["loss"] for entry in read_metrics(tmp_path / "run") if "loss" in entry]
    assert losses[-1] < 0.05


def test_as_a_newcomer_runs_it(tmp_path):
    """No flags but a smaller budget: everything the first run promises is on the screen and on the disk, and the commands
    that it prints work as they stand."""
    output = tmp_path / "runs" / "lora"
    run = run_script("lora.py", "--output", output, "--max-steps", "8", "--log-every", "2")
    assert run.returncode == 0, run.stderr
    for promised in ("parameters train", "step 0: held-out loss", "step 8: held-out loss", "--- before ---", "--- after ---", str(output)):
        assert promised in run.stdout
    assert "8/8" in run.stderr  # the progress bar
    for name in ("adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "checkpoint", "base/model.safetensors", "tokenizer.json"):
        assert (output / name).exists(), name
    metrics = read_metrics(output)
    assert {"script", "args", "versions", "device", "git_commit", "trainable_parameters", "total_parameters"} <= metrics[0]["run"].keys()
    assert [entry["step"] for entry in metrics if "loss" in entry] == [2, 4, 6, 8]
    logged = next(entry for entry in metrics if "loss" in entry)
    assert logged.keys() == {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "peak_memory_gib"}
    evaluations = [entry for entry in metrics if "eval_loss" in entry and "done" not in entry]
    assert evaluations[0].keys() == {"step", "eval_loss", "perplexity"} and evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert metrics[-1]["done"] is True

    commands = re.findall(r"^  (python .*)$", run.stdout, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        words = [sys.executable, *shlex.split(command)[1:]]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "lora-merged" / "merged" / "model.safetensors").exists()
    assert read_metrics(output)[-1]["step"] == 8  # using the adapter leaves its run as it was


def test_inspect_writes_nothing(tmp_path):
    run = run_script("lora.py", "--inspect", "--output", tmp_path / "out")
    assert run.returncode == 0 and "TARGET" in run.stdout and "context" in run.stdout and not (tmp_path / "out").exists()

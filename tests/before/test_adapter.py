"""adapter.py against float64 closed forms, blocks written out by hand, and greedy decoding token by token."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
import transformers
from before import ROOT, read_metrics, run_script, write_rows
from safetensors.torch import load_file
from torch import nn

import adapter
import common_before as common
from before import LLAMA_7B
from test_common_before import build, packed_batch
from before import Killed, flags, kill_after, without_times


def randomize(model, std=0.3):
    """Adapters and norms far from where they start, so that a wrong place or a lost one shows. -> the model"""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adapter.adapter_tensors(model).values():
            p.add_(torch.randn(p.shape, generator=generator).to(p.device) * std)
    return model


def adapted(name, **options):
    model = build(name)
    adapter.add_adapters(model, 8, **options)
    return randomize(model)


def train(folder, *more):
    options = ["--max-steps", "3", "--batch-size", "1", "--max-length", "256", "--samples", "0", "--lr", "0.01"]
    options += [] if "--adapter" in more else ["--bottleneck", "8"]
    adapter.main(["--output", str(folder), *options, *more])
    return folder


def adapter_args(*more):
    """The arguments of adapter.py, by way of its own parser."""
    seen, original = [], adapter.train
    adapter.train = seen.append
    try:
        adapter.main([*map(str, more)])
    finally:
        adapter.train = original
    return seen[0]


def loaded(folder):
    args = adapter_args("--model", folder / "base", "--adapter", folder)
    model = common.load_model(args, torch.float32, torch.device("cpu"))
    adapter.load_adapters(model, args)
    return model.eval(), args


@pytest.mark.parametrize("activation, function", [("relu", lambda z: z.clamp(min=0)), ("gelu", lambda z: 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))))])  # fmt: skip
def test_the_adapter_is_the_equation(activation, function):
    """f(h) = h + U act(D h + b1) + b2 in float64: values, and gradients of all five. gelu as the authors' code has it."""
    torch.manual_seed(0)
    module = adapter.Adapter(6, 4, activation)
    for p in module.parameters():
        nn.init.normal_(p)
    h = torch.randn(2, 5, 6, requires_grad=True)
    module(h).square().sum().backward()
    ours = (module.down, module.down_bias, module.up, module.up_bias, h)
    D, b1, U, b2, z = (p.detach().double().requires_grad_() for p in ours)
    expected = z + function(z @ D.T + b1) @ U.T + b2
    expected.square().sum().backward()
    torch.testing.assert_close(module(h).double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours, (D, b1, U, b2, z)):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4)


def test_initial_values():
    """Truncated normal: no value beyond two standard deviations, which leaves 0.88 of one. Biases zero. All float32."""
    module = adapter.Adapter(512, 64, "relu")
    for weight in (module.down, module.up):
        assert 1.9e-3 < weight.abs().max() <= 2e-3 and weight.std().item() == pytest.approx(0.8796e-3, rel=0.02)
    assert not module.down_bias.any() and not module.up_bias.any()
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert module(torch.randn(3, 512, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("width, stated", [(576, 1.1e-4), (4096, 2.8e-4)])
def test_how_near_the_identity_it_starts(width, stated):
    """||f(h) - h|| / ||h|| is what the top of adapter.py says, and 0.7 of it with gelu."""
    torch.manual_seed(0)
    h = torch.randn(100, width).double()
    for activation, share in (("relu", 1), ("gelu", 0.5**0.5)):
        change = (adapter.Adapter(width, 64, activation).double()(h) - h).norm() / h.norm()
        assert change.item() == pytest.approx(share * 0.88e-3**2 * (width * 64 / 2) ** 0.5, rel=0.1)
        assert change.item() == pytest.approx(share * stated, rel=0.15)


NAMES = ["llama", "qwen2", "qwen3", "gpt_neox", "gemma2", "gpt2", "phi", "stablelm", "qwen3_moe", "opt", "gpt_oss", "granitemoe", "falcon"]
EXTRA = {"opt": {"ffn_dim": 128, "word_embed_proj_dim": 64}, "falcon": {"head_dim": None, "num_kv_heads": 2}, "stablelm": {"qk_layernorm": True}}


@pytest.mark.parametrize("name", NAMES)
def test_near_the_base_at_the_start_and_only_the_meant_parameters_train(name):
    model = build(name, **EXTRA.get(name, {}))
    batch = packed_batch([30]) | {"documents": None}
    before, count = model.target_logps(**batch), len(list(model.parameters()))
    adapter.add_adapters(model, 8)
    adapter.check_placement(model)
    after = model.target_logps(**batch)
    assert 0 < (after - before).abs().max() < 1e-3
    after.sum().backward()
    common.check_gradients(model)
    tensors = adapter.adapter_tensors(model)
    trained = {p for p in model.parameters() if p.requires_grad}
    assert trained == set(tensors.values()) == {p for p in model.parameters() if p.grad is not None}
    adapters = {key for key in tensors if ".adapter." in key}
    assert len(adapters) == 2 * 2 * 4 and len(list(model.parameters())) == count + len(adapters)
    norms = tensors.keys() - adapters
    assert all("norm" in key or "ln_" in key for key in norms) and any("layers" not in key and ".h." not in key for key in norms)
    assert all(tensors[key].dim() == 1 for key in norms)


def test_which_norms_train():
    """Two a block and the last one; of Qwen3 those of queries and keys as well; of GPT-NeoX weights and biases; or none."""
    for name, norms in (("llama", 2 * 2 + 1), ("qwen3", 2 * 4 + 1), ("gpt_neox", 2 * (2 * 2 + 1))):
        assert sum(".adapter." not in key for key in adapter.adapter_tensors(adapted(name))) == norms
        assert not [key for key in adapter.adapter_tensors(adapted(name, train_norms=False)) if ".adapter." not in key]
    keys = adapter.adapter_tensors(adapted("llama"))
    assert "base_model.model.model.layers.1.input_layernorm.weight" in keys and "base_model.model.model.norm.weight" in keys


def by_hand(model, block, x, pfeiffer):
    """One block's two parts as functions, without hooks: the adapters are called here."""
    position_ids = torch.arange(x.shape[1])[None]
    rotary = model.base_model.rotary_emb(x, position_ids)
    mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)[None, None]
    attention = getattr(block, "self_attn", None) or block.attention
    f, g = (lambda h: h) if pfeiffer else attention.adapter, block.mlp.adapter
    attend = lambda h: f(type(attention).forward(attention, h, attention_mask=mask, position_embeddings=rotary)[0])  # noqa: E731
    mlp = lambda h: g(type(block.mlp).forward(block.mlp, h))  # noqa: E731
    return attend, mlp


@pytest.mark.parametrize("pfeiffer", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])
def test_adapters_stand_behind_attention_and_mlp_before_the_sum(name, pfeiffer):
    """A block's output, written out: sequential (Llama), with a parallel residual (GPT-NeoX), with post norms (Gemma 2)."""
    model = adapted(name, pfeiffer=pfeiffer)
    model.set_attn_implementation("eager")
    block, seen = common.blocks(model)[0], []
    handle = block.register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
    with torch.no_grad():
        model.base_model(input_ids=torch.arange(3, 10)[None], use_cache=False)
        handle.remove()
        x, output = seen
        attend, mlp = by_hand(model, block, x, pfeiffer)
        if name == "llama":
            x = x + attend(block.input_layernorm(x))
            x = x + mlp(block.post_attention_layernorm(x))
        elif name == "gpt_neox":
            x = x + attend(block.input_layernorm(x)) + mlp(block.post_attention_layernorm(x))
        else:
            x = x + block.post_attention_layernorm(attend(block.input_layernorm(x)))
            x = x + block.post_feedforward_layernorm(mlp(block.pre_feedforward_layernorm(x)))
    torch.testing.assert_close(output, x, rtol=1e-4, atol=1e-4)
    assert sum(isinstance(module, adapter.Adapter) for module in model.modules()) == (2 if pfeiffer else 4)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "qwen3", "gpt2"])
def test_norms_of_a_bfloat16_base_train_in_float32(name):
    """float32 weights, outputs in bfloat16, and log-probabilities near those of the float32 model of the same weights."""
    narrow, wide = build(name).to(torch.bfloat16), build(name)
    wide.load_state_dict(narrow.state_dict())
    before, batch = narrow.state_dict(), packed_batch([20]) | {"documents": None}
    before, plain = {key: x.clone() for key, x in before.items()}, narrow.target_logps(**batch)
    for model in (narrow, wide):
        torch.manual_seed(0)
        adapter.add_adapters(model, 8)
    torch.testing.assert_close(narrow.target_logps(**batch), plain, rtol=0, atol=0.05)
    norms, outside, inside = [module for module in narrow.modules() if isinstance(module, adapter.TrainedNorm)], [], []
    for module in norms:
        module.register_forward_hook(lambda module, args, output: outside.extend([args[0].dtype, output.dtype]))
        module.base.register_forward_hook(lambda module, args, output: inside.extend([args[0].dtype, output.dtype]))
    randomize(narrow, 0.05), randomize(wide, 0.05)
    logps = narrow.target_logps(**batch)
    torch.testing.assert_close(logps, wide.target_logps(**batch), rtol=0, atol=0.1)
    assert len(outside) == 2 * len(norms) > 8 and set(outside) == {torch.bfloat16} and set(inside) == {torch.float32}
    logps.sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.any() for p in adapter.adapter_tensors(narrow).values())
    frozen = {key: x for key, x in narrow.state_dict().items() if ".adapter." not in key and ".base." not in key}
    assert frozen and all(torch.equal(x, before[key]) for key, x in frozen.items())


def test_a_float32_norm_left_alone_would_break_the_stream():
    """What TrainedNorm is for."""
    model = build("llama").to(torch.bfloat16)
    model.model.layers[0].input_layernorm.float()
    with pytest.raises(RuntimeError, match="dtype"):
        model(input_ids=torch.arange(5)[None])


@pytest.mark.parametrize("options, per_block", [({}, 2), ({"pfeiffer": True}, 1), ({"train_norms": False}, 2)])
def test_parameter_counts_of_llama_7b(options, per_block):
    """2 L (2 d r + r + d), half of it with --pfeiffer, and 65 norms of 4096."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_7B))
        adapter.add_adapters(model, 64, **options)
    expected = per_block * 32 * (2 * 4096 * 64 + 64 + 4096)
    assert expected == per_block * 16_910_336
    norms = 0 if options.get("train_norms") is False else 65 * 4096
    assert common.count_parameters(model) == (expected + norms, 6_738_415_616 + expected)


def test_models_without_a_place_for_adapters_are_refused():
    with pytest.raises(common.UserError, match="has a block without attention .*mixer.*lora.py"):
        adapter.add_adapters(build("mamba"), 8)
    for pfeiffer in (False, True):
        model = build("bloom", n_layer=2, n_head=4)  # adds the residual inside both
        adapter.add_adapters(model, 8, pfeiffer=pfeiffer)
        with pytest.raises(common.UserError, match="adds the residual stream inside"):
            adapter.check_placement(model)


def test_trying_the_places_changes_nothing():
    model, ids = adapted("llama"), torch.arange(5, 12)[None]
    before = model(input_ids=ids).logits
    adapter.check_placement(model)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = adapted("llama")
        args = adapter_args(*["--gradient-checkpointing"] * checkpointing)
        common.checkpoint_blocks(model, args)
        model.train().target_logps(**packed_batch([20]) | {"documents": None}).sum().backward()
        grads.append([p.grad for p in adapter.adapter_tensors(model).values()])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*grads))


@pytest.mark.parametrize("more", [[], ["--pfeiffer", "--activation", "gelu"], ["--no-train-norms"]])
def test_a_saved_adapter_loads_and_gives_the_same_logits(more, tmp_path, monkeypatch):
    kept = []
    original = adapter.save_adapters
    monkeypatch.setattr(adapter, "save_adapters", lambda args, model, tokenizer: (kept.append(model), original(args, model, tokenizer)))
    folder = train(tmp_path / "run", *more)
    model, args = loaded(folder)
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), common.attention(model, "sdpa"), common.attention(kept[0], "sdpa"):
        ours = model(input_ids=ids).logits
        assert torch.equal(ours, kept[0].eval()(input_ids=ids).logits)
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
        assert (plain(input_ids=ids).logits - ours).abs().max() > 1e-2  # the adapter does something
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    assert {key: config[key] for key in ("peft_type", "bottleneck", "activation", "pfeiffer", "train_norms")} == {
        "peft_type": "HOULSBY", "bottleneck": 8, "activation": "gelu" if more[1:] else "relu", "pfeiffer": "--pfeiffer" in more,
        "train_norms": "--no-train-norms" not in more,
    }  # fmt: skip
    assert (args.bottleneck, args.activation, args.pfeiffer, args.train_norms) == tuple(config[k] for k in ("bottleneck", "activation", "pfeiffer", "train_norms"))
    assert tensors["base_model.model.model.layers.3.mlp.adapter.up"].shape == (128, 8)
    assert all(x.dtype == torch.float32 for x in tensors.values())
    assert sum(x.numel() for x in tensors.values()) == read_metrics(folder)[0]["run"]["trainable_parameters"]


def test_training_goes_on_from_an_adapter(tmp_path):
    first = train(tmp_path / "a", "--pfeiffer")
    with pytest.raises(common.UserError, match="^--no-train-norms: the folder of --adapter has its own"):
        train(tmp_path / "b", "--adapter", str(first), "--no-train-norms")
    second = train(tmp_path / "b", "--adapter", str(first))
    config = json.loads((second / "adapter_config.json").read_text())
    assert config["bottleneck"] == 8 and config["pfeiffer"] is True and config["train_norms"] is True
    evaluations = [[e["eval_loss"] for e in read_metrics(folder) if "eval_loss" in e] for folder in (first, second)]
    assert evaluations[1][0] == pytest.approx(evaluations[0][-1], abs=1e-6) and evaluations[0][0] > evaluations[0][-1] > evaluations[1][-1]


@pytest.mark.parametrize("changes, match", [
    ({"base_fingerprint": "0" * 32}, "another base"),
    ({"peft_type": "LORA"}, "not a HOULSBY"),
    ({"bottleneck": 4}, "does not fit"),
    ({"bottleneck": "8"}, "bottleneck in its adapter_config.json is '8'"),
    ({"bottleneck": 0}, "bottleneck"),
    ({"activation": "swish"}, "activation in its adapter_config.json is 'swish'"),
    ({"pfeiffer": True}, "does not fit"),
    ({"train_norms": False}, "does not fit"),
    ({"train_norms": None}, "train_norms"),
])  # fmt: skip
def test_adapters_that_do_not_fit_are_refused(changes, match, tmp_path):
    folder = train(tmp_path / "run", "--max-steps", "0")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(common.UserError, match=match):
        train(tmp_path / "again", "--adapter", str(folder))
    assert not (tmp_path / "again").exists()


def test_generation_equals_greedy_decoding_token_by_token():
    """Three prompts of unlike length in one batch with a cache, against one forward pass without a cache for each token."""
    model, tokenizer = common.tiny_model().eval(), common.tiny_tokenizer()
    model.padded_attention = "sdpa"
    adapter.add_adapters(model, 16)
    randomize(model, 0.05)
    with torch.no_grad():  # steeper, or all answers would be one token again and again
        for name, p in model.named_parameters():
            p.mul_(5 if "embed" in name else 3 if "_proj" in name else 1)
    prompts = [common.render(tokenizer, [{"role": "user", "content": text}], prompt=True) for text in ("Hi", "A longer question?", "七")]
    answers, plain = [], common.generate(model, tokenizer, prompts, torch.device("cpu"), 16)
    with torch.no_grad():
        for prompt in prompts:
            ids = list(prompt)
            while len(ids) < len(prompt) + 16 and (len(ids) == len(prompt) or ids[-1] not in common.stop_ids(model, tokenizer)):
                ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
            answers.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    assert plain == answers and len(set(answers)) == 3


@pytest.mark.parametrize("at", [7, 11])
def test_a_resumed_run_equals_one_that_was_never_stopped(at, tmp_path, monkeypatch):
    adapter.main(flags(tmp_path, "whole"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, at)
        adapter.main(flags(tmp_path, "parts"))
    adapter.main(flags(tmp_path, "parts", "--resume"))
    assert without_times(read_metrics(tmp_path / "whole")) == without_times(read_metrics(tmp_path / "parts"))
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_resuming_with_other_adapters_is_refused(tmp_path):
    adapter.main(flags(tmp_path, "run"))
    for more, match in ((["--bottleneck", "8"], "--bottleneck"), (["--pfeiffer"], "--pfeiffer"), (["--no-train-norms"], "--train-norms")):
        with pytest.raises(common.UserError, match=match):
            adapter.main(flags(tmp_path, "run", "--resume", *more))


def test_overfits_one_batch(tmp_path):
    """The tiny model's head is too flat for a low loss, so it is made five times steeper, as in test_lora.py."""
    base, tokenizer = common.tiny_model(), common.tiny_tokenizer()
    base.padded_attention = "sdpa"
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(5)
    common.save_model(tmp_path / "base", base, tokenizer)
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": c * 3, "completion": c * 5} for c in "abcd"])
    more = ["--model", str(tmp_path / "base"), "--eval-fraction", "0", "--max-steps", "120", "--lr", "0.01", "--samples", "0"]
    adapter.main(["--data", data, "--output", str(tmp_path / "run"), *more])
    assert [entry["loss"] for entry in read_metrics(tmp_path / "run") if "loss" in entry][-1] < 0.1


def test_as_a_user_runs_it(tmp_path):
    """The closing command works as it stands: same held-out rows, and so the loss that the run ended with."""
    output = tmp_path / "a run"
    run = run_script("adapter.py", "--output", output, "--max-steps", "4", "--log-every", "2", "--eval-fraction", "0.1", "--max-length", "512", "--seed", "3")
    assert run.returncode == 0, run.stderr
    assert "--- after ---" in run.stdout and "8 adapters and 9 norms" in run.stdout
    (command,) = re.findall(r"^  (python .*)$", run.stdout, re.MULTILINE)
    before = read_metrics(output)
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "--- held-out prompt 2 ---" in done.stdout
    again = next(e["eval_loss"] for e in read_metrics(f"{output}-again") if "eval_loss" in e)
    assert again == pytest.approx(before[-1]["eval_loss"], abs=1e-6) and read_metrics(output) == before

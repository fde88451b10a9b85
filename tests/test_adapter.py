"""adapter.py against float64, blocks written out by hand, and greedy decoding token by token."""

import json

import pytest
import torch
import transformers
from conftest import TINY, read_metrics, run_script, write_rows
from safetensors.torch import load_file
from test_model import build, documents, load, own, packed_batch
from torch import nn
from two_ranks import run

import adapter
import common

CPU = torch.device("cpu")
ROWS = [{"prompt": f"Repeat {c}.", "completion": c * n} for n in range(1, 7) for c in "abcde"]
SIX = "--max-steps 6 --batch-size 8 --lr 0.01 --samples 0 --eval-data 0.2".split()


def make_args(*flags):
    """The arguments of adapter.py, by way of its own parser."""
    seen, original = [], adapter.train
    adapter.train = seen.append
    try:
        adapter.main(["--model", "unused", "--data", "unused", *map(str, flags)])
    finally:
        adapter.train = original
    return seen[0]


@pytest.fixture
def flags(tmp_path, random_model):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)

    def make(name, *more):
        start = ["--model", random_model, "--data", data, "--output", str(tmp_path / name)]
        return [*start, *SIX, *map(str, more)]

    return make


def randomize(model, std=0.3):
    """Adapters and norms far from their start, so that a wrong place or a lost one shows."""
    generator = torch.Generator().manual_seed(5)
    for p in model.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=generator) * std
    return model


def adapted(model, *flags):
    adapter.add_adapters(model, make_args("--bottleneck", 8, *flags), CPU)
    return model


def names_of(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# -------------------------------------------------------------------------------- the module


def gelu(z):
    return 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))


@pytest.mark.parametrize("name, act", [("relu", lambda z: z.clamp(min=0)), ("gelu", gelu)])
def test_the_adapter_is_the_equation(name, act):
    """f(h) = h + U act(D h + b1) + b2 in float64, and the gradients of all five."""
    torch.manual_seed(0)
    module = adapter.Adapter(6, 4, name)
    for p in module.parameters():
        nn.init.normal_(p)
    h = torch.randn(2, 5, 6, requires_grad=True)
    module(h).square().sum().backward()
    ours = (module.down.weight, module.down.bias, module.up.weight, module.up.bias, h)
    D, b1, U, b2, z = (p.detach().double().requires_grad_() for p in ours)
    expected = z + act(z @ D.T + b1) @ U.T + b2
    expected.square().sum().backward()
    torch.testing.assert_close(module(h).double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours, (D, b1, U, b2, z)):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4)


def test_initial_values():
    """Truncated normal: nothing beyond two standard deviations, which leaves 0.88 of one."""
    module = adapter.Adapter(512, 64, "relu")
    for layer in (module.down, module.up):
        assert 1.9e-3 < layer.weight.abs().max() <= 2e-3 and not layer.bias.any()
        assert layer.weight.std().item() == pytest.approx(0.8796e-3, rel=0.02)
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert module(torch.randn(3, 512, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("width, stated", [(576, 1.1e-4), (4096, 2.8e-4)])
def test_how_near_the_identity_it_starts(width, stated):
    """||f(h) - h|| / ||h|| is what adapter.py says, and 0.7 of it with gelu."""
    torch.manual_seed(0)
    h = torch.randn(100, width).double()
    for activation, share in (("relu", 1), ("gelu", 0.5**0.5)):
        change = (adapter.Adapter(width, 64, activation).double()(h) - h).norm() / h.norm()
        assert change.item() == pytest.approx(share * 0.88e-3**2 * (width * 64 / 2) ** 0.5, rel=0.1)
        assert change.item() == pytest.approx(share * stated, rel=0.15)


# --------------------------------------------------------------------------------- the model

EXTRA = {
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "falcon": {"head_dim": None, "num_kv_heads": 2},
    "stablelm": {"qk_layernorm": True},
}
NAMES = """llama qwen2 qwen3 gpt_neox gemma2 gpt2 phi stablelm qwen3_moe opt gpt_oss granitemoe
falcon""".split()


@pytest.mark.parametrize("name", NAMES)
def test_the_start_is_near_the_base_and_only_the_meant_parameters_train(name):
    model, ids = own(name, **EXTRA.get(name, {})), torch.arange(5, 25)[None]
    count, before = len(list(model.parameters())), model(input_ids=ids).logits
    after = adapted(model)(input_ids=ids).logits
    assert 0 < (after - before).abs().max() < 1e-3 * before.abs().max()
    after.square().sum().backward()
    trained = names_of(model)
    assert trained == {n for n, p in model.named_parameters() if p.grad is not None}
    adapters = {key for key in trained if ".adapter." in key}
    assert len(adapters) == 2 * 2 * 4 and len(list(model.parameters())) == count + len(adapters)
    assert all("norm" in key or "ln_" in key for key in trained - adapters)
    assert any("layers" not in key and ".h." not in key for key in trained - adapters)


def test_which_norms_train():
    """Two a block and the last one; of Qwen3 those of queries and keys as well; of GPT-NeoX
    weights and biases; or none."""
    for name, norms in (("llama", 2 * 2 + 1), ("qwen3", 2 * 4 + 1), ("gpt_neox", 2 * (2 * 2 + 1))):
        for flags, count in (([], norms), (["--no-train-norms"], 0)):
            names = names_of(adapted(own(name), *flags))
            assert sum(".adapter." not in key for key in names) == count
    assert names_of(adapted(own("llama"))) >= {
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
        "model.layers.1.mlp.adapter.up.bias",
    }


def by_hand(model, block, x, pfeiffer):
    """One block's two parts as functions, without hooks: the adapters are called here."""
    rotary = model.base_model.rotary_emb(x, torch.arange(x.shape[1])[None])
    mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)[None, None]
    attention = getattr(block, "self_attn", None) or block.attention
    inputs = {"attention_mask": mask, "position_embeddings": rotary}

    def attend(h):
        out = type(attention).forward(attention, h, **inputs)[0]
        return out if pfeiffer else attention.adapter(out)

    return attend, lambda h: block.mlp.adapter(type(block.mlp).forward(block.mlp, h))


@pytest.mark.parametrize("pfeiffer", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])
@torch.no_grad()
def test_adapters_stand_behind_attention_and_mlp_before_the_sum(name, pfeiffer):
    """A block's output, written out: sequential (Llama), with a parallel residual (GPT-NeoX),
    with post norms (Gemma 2)."""
    model = randomize(adapted(own(name), *["--pfeiffer"] * pfeiffer))
    model.set_attn_implementation("eager")
    block, seen = common.blocks(model)[0], []
    hook = block.register_forward_hook(lambda module, args, out: seen.extend([args[0], out]))
    model.base_model(input_ids=torch.arange(3, 10)[None], use_cache=False)
    hook.remove()
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
    count = sum(isinstance(module, adapter.Adapter) for module in model.modules())
    assert count == (2 if pfeiffer else 4)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "qwen3", "gpt2"])
def test_norms_of_a_bfloat16_base_train_in_float32(name):
    """Float32 weights and arithmetic, outputs in bfloat16, and log-probabilities near those of
    the float32 model of the same weights."""
    more = ["--no-packing"] if name == "gemma2" else []
    base, batch = own(name).bfloat16(), packed_batch([20], padded=bool(more))
    narrow, wide = (load(base, *more, dtype=x) for x in (torch.bfloat16, torch.float32))
    frozen = {key: p.detach().clone() for key, p in narrow.named_parameters()}
    inside, outside = [], []
    for model in (narrow, wide):
        torch.manual_seed(0)
        randomize(adapted(model), 0.05)
    for module in narrow.modules():
        if type(module).__name__.endswith("Norm"):
            module.register_forward_pre_hook(lambda module, args: inside.append(args[0].dtype))
            module.register_forward_hook(lambda module, args, out: outside.append(out.dtype))
    logps = narrow.target_logps(**batch)
    torch.testing.assert_close(logps, wide.target_logps(**batch), rtol=0, atol=0.15)
    assert len(outside) == len(inside) > 4
    assert set(inside) == {torch.float32} and set(outside) == {torch.bfloat16}
    logps.sum().backward()
    for key, p in narrow.named_parameters():
        if p.requires_grad:
            assert p.dtype == p.grad.dtype == torch.float32 and p.grad.any(), key
        else:
            assert torch.equal(p, frozen[key])


@pytest.mark.parametrize(
    "flags, per_block", [([], 2), (["--pfeiffer"], 1), (["--no-train-norms"], 2)]
)
def test_parameter_counts_of_llama_7b(flags, per_block, capsys):
    """2 L (2 d r + r + d), half of it with --pfeiffer, and 65 norms of 4096."""
    with torch.device("meta"):
        config = transformers.LlamaConfig(intermediate_size=11008)
        model = transformers.LlamaForCausalLM(config)
        adapter.add_adapters(model, make_args(*flags), torch.device("meta"))
    count = per_block * 32 * (2 * 4096 * 64 + 64 + 4096)
    norms = 0 if "--no-train-norms" in flags else 65 * 4096
    expected = f"{count + norms:,} of {6_738_415_616 + count:,} parameters train"
    assert expected in capsys.readouterr().out


def test_models_without_a_place_for_adapters_are_refused():
    with pytest.raises(common.UserError, match="no place for an adapter: .*lora.py"):
        adapted(own("mamba"))
    for flags in ([], ["--pfeiffer"]):
        with pytest.raises(common.UserError, match="Bloom.* adds the residual stream itself"):
            adapted(own("bloom"), *flags)


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for flags in ([], ["--gradient-checkpointing"]):
        torch.manual_seed(0)
        model = randomize(adapted(build("llama", *flags)))
        model.train().target_logps(**packed_batch([20, 7])).sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(grads[0]) == 16 + 5
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*grads))


# ------------------------------------------------------------------------------- whole runs


def loaded(base, folder):
    """-> the model with the adapter of a folder, the config that would be saved again"""
    args = make_args("--adapter", folder)
    args.model = base
    model = common.load_model(args, torch.float32, CPU)
    return model.eval(), adapter.add_adapters(model, args, CPU)


@pytest.mark.parametrize("more", [[], ["--pfeiffer", "--activation", "gelu"], ["--no-train-norms"]])
def test_a_saved_adapter_loads_and_gives_the_same_logits(
    more, flags, tmp_path, random_model, monkeypatch
):
    kept, save = [], common.save_adapter
    monkeypatch.setattr(common, "save_adapter", lambda *a: (kept.append(a[1]), save(*a)))
    adapter.main(flags("run", "--bottleneck", 8, *more))
    folder = tmp_path / "run"
    model, config = loaded(random_model, folder)
    examples = documents([30, 11], 256)
    batch = common.collate(examples, False, CPU)
    with torch.no_grad():
        logps = model.target_logps(**batch)
        assert torch.equal(logps, kept[0].eval().target_logps(**batch))
        base = transformers.AutoModelForCausalLM.from_pretrained(random_model)
        plain = common.load_model(make_args_of(random_model), torch.float32, CPU)
        assert (plain.target_logps(**batch) - logps).abs().max() > 1e-2
    fields = {"peft_type": "HOULSBY", "bottleneck": 8, "pfeiffer": "--pfeiffer" in more}
    fields |= {"activation": "gelu" if more[1:] else "relu"}
    fields |= {"train_norms": "--no-train-norms" not in more}
    assert json.loads((folder / "adapter_config.json").read_text()).items() >= fields.items()
    assert config.items() >= fields.items()
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.1.mlp.adapter.up.weight"].shape == (64, 8)
    assert all(x.dtype == torch.float32 for x in tensors.values())
    per_block = 1 if "--pfeiffer" in more else 2
    assert len(tensors) == 2 * per_block * 4 + (0 if "--no-train-norms" in more else 5)
    assert base.config.num_hidden_layers == 2


def make_args_of(model):
    args = make_args()
    args.model = model
    return args


def test_training_continues_from_an_adapter(flags, tmp_path):
    """With its settings, whatever the flags are; and without steps, it is only evaluated."""
    slow = ["--lr", 1e-3]
    adapter.main(flags("a", "--pfeiffer", "--bottleneck", 8, *slow))
    adapter.main(flags("b", "--adapter", tmp_path / "a", *slow))
    adapter.main(flags("c", "--adapter", tmp_path / "b", "--max-steps", 0))
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["bottleneck"] == 8 and config["pfeiffer"] and config["train_norms"]
    a, b, c = (
        [e["eval_loss"] for e in read_metrics(tmp_path / x) if "eval_loss" in e] for x in "abc"
    )
    assert b[0] == pytest.approx(a[-1], abs=1e-6) and a[0] > a[-1] > b[-1]
    assert c == [pytest.approx(b[-1], abs=1e-6)]


CHANGES = {
    "another kind": ({"peft_type": "LORA"}, "is LORA, not HOULSBY"),
    "another width": ({"bottleneck": 4}, "does not fit"),
    "other places": ({"pfeiffer": True}, "does not fit"),
    "no norms": ({"train_norms": False}, "does not fit"),
}


def test_adapters_that_do_not_fit_are_refused(flags, tmp_path):
    adapter.main(flags("run", "--max-steps", 0))
    path = tmp_path / "run" / "adapter_config.json"
    config = json.loads(path.read_text())
    for changes, match in CHANGES.values():
        path.write_text(json.dumps(config | changes))
        with pytest.raises(common.UserError, match=match):
            adapter.main(flags("again", "--adapter", tmp_path / "run"))
    path.write_text(json.dumps(config))
    with pytest.raises(common.UserError, match="another base"):
        adapter.main([*flags("again", "--adapter", tmp_path / "run"), "--model", TINY])
    assert not (tmp_path / "again").exists()


def test_generation_equals_greedy_decoding_token_by_token():
    """Three prompts of unlike length in one batch with a cache, against a forward pass without a
    cache for each token."""
    args = make_args("--bottleneck", 16)
    args.model = TINY
    model, tokenizer = common.load_model(args, torch.float32, CPU), common.load_tokenizer(args)
    adapter.add_adapters(model, args, CPU)
    randomize(model, 0.03)
    prompts = [tokenizer(text).input_ids for text in ("Hi", "A longer question?", "七")]
    answers, plain = [], common.generate(model, tokenizer, prompts, CPU, max_new_tokens=16)
    stop = common.stop_ids(model, tokenizer)
    with common.evaluating(model), common.own_attention(model):
        for prompt in prompts:
            ids = list(prompt)
            while len(ids) < len(prompt) + 16 and (ids == prompt or ids[-1] not in stop):
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
                ids.append(logits[0, -1].argmax().item())
            answers.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    assert plain == answers and len(set(answers)) == 3


def test_a_resumed_run_equals_one_that_was_never_stopped(flags, tmp_path):
    run("adapter", flags("whole"))
    run("adapter", flags("parts"), stop=3)
    for more in (["--bottleneck", 8], ["--pfeiffer"], ["--no-train-norms"]):
        with pytest.raises(common.UserError, match=more[0].replace("no-", "")):
            run("adapter", flags("parts", "--resume", *more))
    run("adapter", flags("parts", "--resume"))
    whole, parts = (
        [
            (e.get("loss"), e.get("grad_norm"), e.get("eval_loss"))
            for e in read_metrics(tmp_path / x)
        ]
        for x in ("whole", "parts")
    )
    assert whole == parts and sum(loss is not None for loss, *_ in whole) == 6
    a, b = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_as_a_user_runs_it(tmp_path):
    done = run_script("adapter.py", "--output", tmp_path / "run", "--max-steps", 4, "--samples", 2)
    assert done.returncode == 0, done.stderr
    assert "133,760 of" in done.stdout and "in 8 adapters" in done.stdout
    assert "the adapter is in" in done.stdout and "--- after ---" in done.stdout

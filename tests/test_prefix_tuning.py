"""prefix_tuning.py against PEFT, against the base that reads the same tokens, and as a user runs
it."""

import dataclasses
import json
import types
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import TINY, read_metrics, run_script, write_rows
from safetensors.torch import load_file
from test_model import (
    CPU,
    OnCuda,
    answers,
    apart,
    build,
    documents,
    gpu,
    own,
    own_logps,
    shared_prompt,
    varlen_2_11,
    varlen_2_13,
)  # fmt: skip

import common
import prefix_tuning

ROWS = [
    {"prompt": f"Repeat {c} {n} times.", "completion": c * n} for n in range(1, 7) for c in "abcde"
]
THREE = "--max-steps 3 --batch-size 8 --lr 0.001 --samples 0 --eval-data 0.2".split()
DIRECT = ["--hidden", "0", "--lr", "0.1"]
__all__ = ["gpu"]  # a fixture


@pytest.fixture
def train(random_model, tmp_path):
    """name, more flags -> the output folder of three steps"""
    data = write_rows(tmp_path / "rows.jsonl", ROWS)

    def run(name, *more, model=random_model) -> Path:
        start = ["--model", str(model), "--data", data, "--output", str(tmp_path / name)]
        prefix_tuning.main([*start, *THREE, *map(str, more)])
        return tmp_path / name

    return run


def args_of(monkeypatch, model, *more):
    """What the script's own parser makes of these flags."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(prefix_tuning, "train", seen.append)
        prefix_tuning.main(["--model", str(model), "--data", "unused", *map(str, more)])
    return seen[0]


@pytest.fixture
def load(monkeypatch):
    """A model as a training run has it at its start, with these flags."""

    def with_prefix(model, *more, dtype=torch.float32):
        args = args_of(monkeypatch, model, *more)
        loaded = common.load_model(args, dtype, CPU)
        tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
        start = prefix_tuning.starting_prefix(loaded, tokenizer, args)
        prefix_tuning.add_prefix(loaded, start, args.hidden)
        return loaded.eval()

    return with_prefix


def kept(folder) -> torch.Tensor:
    (tensor,) = load_file(folder / "adapter_model.safetensors").values()
    return tensor


def behind(front, examples) -> list[dict]:
    """The examples with the tokens `front` before each, which are no targets."""
    return [
        {"input_ids": np.concatenate([front, x["input_ids"]]),
         "is_target": np.concatenate([np.zeros(len(front), dtype=bool), x["is_target"]])}
        for x in examples
    ]  # fmt: skip


def pefts_logps(model, examples) -> torch.Tensor:
    """Of a batch padded on the right, through PEFT's forward pass."""
    batch = common.collate(examples, True, CPU)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask).logits.flatten(0, 1).float()
    logps = logits[batch["target_index"]].log_softmax(-1)
    return logps.gather(1, batch["targets"][:, None])[:, 0]


# ------------------------------------------------------------------------------ the method

FRONT = np.array([7, 31, 8, 90])
KINDS = ["llama", "qwen2", "qwen3", "gpt_neox", "gpt2", "phi", "cohere", "granite", "qwen3_moe"]


@pytest.mark.parametrize("hidden", [0, 16])
@pytest.mark.parametrize("name", KINDS)
def test_the_start_is_the_base_behind_these_tokens(name, hidden):
    """Packed documents of unlike length get what the base gives each alone behind the prefix's
    tokens, and only the prefix gets gradients."""
    model, theirs, examples = build(name), own(name), documents([17, 9, 1, 5])
    expected = own_logps(theirs, behind(FRONT, examples))
    assert (own_logps(theirs, behind(FRONT + 1, examples)) - expected).abs().max() > 1e-3
    start = prefix_tuning.keys_and_values_of(model, FRONT.tolist())
    prefix_tuning.add_prefix(model.eval(), start, hidden)
    logps = model.target_logps(**common.collate(examples, False, CPU))
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    logps.sum().backward()
    trained = {"prefix.embedding.weight"} if hidden else {"prefix.start"}
    for n in (0, 2) if hidden else ():
        trained |= {f"prefix.mlp.{n}.weight", f"prefix.mlp.{n}.bias"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained
    moving = model.prefix.mlp[2].weight if hidden else model.prefix.start
    assert moving.grad.any() and moving.dtype == torch.float32


def test_the_mlp_is_the_equation():
    """start + W2 tanh(W1 E + b1) + b2 in float64, and its gradients; it starts at 0."""
    torch.manual_seed(0)
    start = torch.randn(3, 4, 2, 5)
    prefix = prefix_tuning.Prefix(start, 6, 7)
    assert torch.equal(prefix(), start.flatten(1))
    torch.nn.init.normal_(prefix.mlp[2].weight)
    torch.nn.init.normal_(prefix.mlp[2].bias)
    prefix().square().sum().backward()
    ours = [p for p in prefix.parameters() if p.requires_grad]
    E, W1, b1, W2, b2 = theirs = [p.detach().double().requires_grad_() for p in ours]
    expected = start.double().flatten(1) + torch.tanh(E @ W1.T + b1) @ W2.T + b2
    expected.square().sum().backward()
    torch.testing.assert_close(prefix().double(), expected, rtol=0, atol=1e-5)
    for p, other in zip(ours, theirs):
        torch.testing.assert_close(p.grad.double(), other.grad, rtol=1e-4, atol=1e-4)


def test_attention_over_the_prefix_is_the_closed_form():
    """A layer of llama's attention by hand in float64: keys of the prefix are not rotated again,
    the text's are from position P on, and two query heads share a key-value head."""
    model, P = build("llama", num_hidden_layers=1), 3
    torch.manual_seed(2)
    start, ids = torch.randn(P, 2, 2, 16), np.array([9, 30, 77, 12])
    prefix_tuning.add_prefix(model, start, 0)
    layer, seen = model.model.layers[0], []
    attention = layer.self_attn
    attention.o_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    examples = documents([6]) + [{"input_ids": ids, "is_target": np.arange(4) > 0}]
    model.target_logps(**common.collate(examples, False, CPU))
    x = layer.input_layernorm(model.model.embed_tokens(torch.tensor(ids))).double()
    q, k, v = (
        (x @ linear.weight.double().T).view(4, -1, 16)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    angles = torch.arange(P, P + 4).double()[:, None] * 10000 ** -(torch.arange(8).double() / 8)
    cos, sin = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]
    q, k = (y * cos + torch.cat([-y[..., 8:], y[..., :8]], -1) * sin for y in (q, k))
    k, v = torch.cat([start[:, 0].double(), k]), torch.cat([start[:, 1].double(), v])
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)  # (7, 4 heads, 16)
    scores = torch.einsum("qhd,khd->hqk", q, k) / 4
    scores = scores.masked_fill(torch.ones(4, P + 4).tril(P) == 0, -torch.inf)
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
    torch.testing.assert_close(seen[0][0, 6:].double(), expected, rtol=0, atol=1e-5)


def test_a_prefix_of_zeros_is_not_the_base():
    model, batch = build("llama"), common.collate(documents([17]), False, CPU)
    expected = model.target_logps(**batch)
    prefix_tuning.add_prefix(model, torch.zeros(4, 4, 2, 16), 0)
    assert (model.target_logps(**batch) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_answers_read_their_prompt_and_the_prefix(name):
    """Shared prompts: the same log-probabilities and gradients as documents of their own."""
    model, prompt = build(name), np.random.default_rng(3).integers(5, 160, 13)
    prefix_tuning.add_prefix(model, prefix_tuning.keys_and_values_of(model, FRONT.tolist()), 0)
    shared, (before, after) = shared_prompt(prompt, answers(3)), documents([10, 6])
    results = []
    for examples in ([before, shared, after], [before, *apart(prompt, answers(3)), after]):
        logps = model.target_logps(**common.collate(examples, False, CPU))
        weights = torch.linspace(-1, 2, len(logps))
        results.append((logps, *torch.autograd.grad(logps @ weights, [model.prefix.start])))
    (logps, gradient), (expected, other) = results
    torch.testing.assert_close(logps, expected, rtol=1e-6, atol=1e-6)
    assert (gradient - other).norm() <= 1e-5 * other.norm()


DOCUMENTS = documents([9, 1, 6])
SHARED = [*documents([3]), shared_prompt(np.arange(9), answers(3)), *documents([5])]


@pytest.mark.parametrize("kernel", [varlen_2_13, varlen_2_11])
@pytest.mark.parametrize("examples", [DOCUMENTS, SHARED], ids=["documents", "shared prompt"])
def test_a_gpu_computes_the_same_attention(examples, kernel, gpu):  # noqa: F811
    """Stretch by stretch on a CPU, one kernel on a GPU: outputs and all gradients."""
    install, calls = gpu
    install(kernel)
    stretches, P = common.collate(examples, False, CPU)["stretches"], 4
    stretches = prefix_tuning.behind_prefix(stretches, P)
    module = types.SimpleNamespace(is_causal=True, layer_idx=1)

    def attend(cuda):
        generator = torch.Generator().manual_seed(0)
        T, kind = sum(stretches.lengths), {"dtype": torch.float64, "generator": generator}
        sizes = [(1, h, n, 8) for h, n in ((4, T), (2, T), (2, T), (2, P), (2, P))]
        leaves = [torch.randn(size, **kind).requires_grad_() for size in sizes]
        q, k, v, *prefix = [x.as_subclass(OnCuda) for x in leaves] if cuda else leaves
        options = {"scaling": 0.3, "stretches": stretches, "prefix": [None, tuple(prefix)]}
        out, _ = common.stretch_attention(module, q, k, v, None, **options)
        out = out.as_subclass(torch.Tensor)
        upstream = torch.randn(out.shape, **kind)
        return out, torch.autograd.grad((out * upstream).sum(), leaves)

    (here, expected), (there, found) = attend(False), attend(True)
    torch.testing.assert_close(there, here)
    torch.testing.assert_close(found, expected)
    assert len(calls) == 1 and all(x.any() for x in found)


@pytest.mark.parametrize("count", [[], ["1"]])
@pytest.mark.parametrize("hidden", [0, 16])
def test_gradient_checkpointing_changes_no_gradient(hidden, count):
    results = []
    for flags in ([], ["--gradient-checkpointing", *count]):
        model = build("llama", *flags).train()
        torch.manual_seed(1)
        start = prefix_tuning.keys_and_values_of(model, FRONT.tolist())
        prefix_tuning.add_prefix(model, start, hidden)
        runs = []
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        model.target_logps(**common.collate(documents([17, 9, 5]), False, CPU)).sum().backward()
        results.append([p.grad for p in model.prefix.parameters() if p.requires_grad])
        assert len(runs) == (2 + (int(count[0]) if count else 2) if flags else 2)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_generation_is_greedy_decoding_by_hand(name):
    """Token by token and one by one through the packed attention, for prompts of unlike length."""
    model = build(name, vocab_size=320)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    prompts, written = [[70, 71, 72, 80, 81], [90], [65, 66]], []
    torch.manual_seed(4)
    start = prefix_tuning.keys_and_values_of(model, [3, 4, 5, 6, 7, 8])
    prefix_tuning.add_prefix(model.eval(), start + torch.randn(6, 1, 1, 1), 8)
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + 7 and ids[-1] != tokenizer.eos_token_id:
            every = np.array(ids)[np.newaxis].repeat(320, 0)
            every = np.concatenate([every, np.arange(320)[:, None]], 1)
            marks = np.arange(len(ids) + 1) == len(ids)
            examples = [{"input_ids": x, "is_target": marks} for x in every]
            with torch.no_grad():
                logps = model.target_logps(**common.collate(examples, False, CPU))
            ids.append(logps.argmax().item())
        written.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    assert common.generate(model, tokenizer, prompts, CPU, max_new_tokens=7) == written
    del model.generate  # without the prefix
    assert common.generate(model, tokenizer, prompts, CPU, max_new_tokens=7) != written


# ------------------------------------------------------------------------------------ PEFT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", [[], DIRECT])
def test_peft_loads_the_prefix_and_gives_our_logps(more, dtype, train, load, random_model, recwarn):
    folder = train("run", *more)
    assert list(load_file(folder / "adapter_model.safetensors")) == ["prompt_embeddings"]
    assert kept(folder).shape == (20, 2 * 2 * 2 * 16)
    config = json.loads((folder / "adapter_config.json").read_text())
    known = {field.name for field in dataclasses.fields(peft.PrefixTuningConfig)}
    assert config.keys() <= known
    ours = load(random_model, "--adapter", folder, "--hidden", 0, dtype=dtype)
    base = transformers.AutoModelForCausalLM.from_pretrained(random_model, dtype=dtype)
    recwarn.clear()
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    assert not [x for x in recwarn if "peft" in x.filename]
    examples = documents([30, 12, 5], 250)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    with torch.no_grad():
        expected = pefts_logps(theirs, examples)
        found = ours.target_logps(**common.collate(examples, False, CPU))
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        again = load(random_model, "--adapter", folder, dtype=dtype)  # a new MLP, which is 0
        assert torch.equal(again.target_logps(**common.collate(examples, False, CPU)), found)
        with theirs.disable_adapter():
            assert (pefts_logps(theirs, examples) - expected).abs().max() > 10 * tolerance


def test_gradients_equal_pefts():
    """The same prefix in PEFT's model and ours: same loss, same gradients of keys and values."""
    ours, examples = build("qwen2"), documents([30, 11, 4])
    sizes = {"token_dim": 32, "num_attention_heads": 2, "num_layers": 2}
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **sizes)
    theirs = peft.get_peft_model(own("qwen2"), config).eval()
    prefix = theirs.prompt_encoder["default"].embedding.weight
    prefix_tuning.add_prefix(ours, prefix.detach().clone().view(5, 4, 2, 16), 0)
    loss = -ours.target_logps(**common.collate(examples, False, CPU)).mean()
    expected = -pefts_logps(theirs, examples).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    difference = ours.prefix.start.grad - prefix.grad
    assert difference.norm() <= 1e-5 * prefix.grad.norm()


def test_a_prefix_of_pefts_own_is_taken_up(random_model, load, tmp_path, capsys):
    """With PEFT's projection, too: it saves the result, as we do."""
    sizes = {"token_dim": 32, "num_attention_heads": 2, "num_layers": 2, "encoder_hidden_size": 8}
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, **sizes
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path)
    ours, examples = load(random_model, "--adapter", tmp_path), documents([9, 4])
    found = ours.target_logps(**common.collate(examples, False, CPU))
    torch.testing.assert_close(found, pefts_logps(theirs, examples), rtol=0, atol=1e-5)
    assert "no base fingerprint" in capsys.readouterr().out and ours.prefix.shape[0] == 3


# ------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("more", [[], ["--hidden", "0"]])
def test_step_0_of_a_run_is_what_is_stated(more, train, random_model):
    """The base's held-out loss behind --init-text, repeated to P tokens, which is what a run of no
    steps saves."""
    folder = train("run", "--max-steps", 0, "--init-text", "abc", "--virtual-tokens", 4, *more)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    seen, original = [], common.load_data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_data", lambda *a: seen.append(original(*a)) or seen[-1])
        train("again", "--max-steps", 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    front = np.array(tokenizer("abca").input_ids)
    logps = own_logps(model.eval(), behind(front, [*seen[0][1]]))
    assert len(logps) > 10
    assert read_metrics(folder)[1]["eval_loss"] == pytest.approx(-logps.mean().item(), rel=1e-6)
    cache = model.model(input_ids=torch.tensor(front)[None], use_cache=True).past_key_values
    states = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    expected = torch.stack([x[0].transpose(0, 1) for x in states], 1).flatten(1)
    torch.testing.assert_close(kept(folder), expected, rtol=0, atol=1e-6)


def test_tokens_are_sampled_from_the_whole_vocabulary(load, random_model, monkeypatch):
    seen = []
    monkeypatch.setattr(
        prefix_tuning,
        "keys_and_values_of",
        lambda m, ids: seen.append(ids) or torch.zeros(1, 4, 2, 16),
    )
    load(random_model, "--virtual-tokens", 500)
    assert len(seen[0]) == 500 and len(set(seen[0])) > 200
    assert 0 <= min(seen[0]) < 10 and 310 < max(seen[0]) < 320


@pytest.mark.parametrize("more", [[], DIRECT])
def test_training_continues_from_a_prefix(more, train):
    first = train("a", "--virtual-tokens", 7, *more)
    second = train("b", "--adapter", first, *more)  # its own length holds
    assert kept(first).shape == kept(second).shape == (7, 128)
    assert not torch.equal(kept(first), kept(second))
    losses = [
        [x["eval_loss"] for x in read_metrics(f) if "eval_loss" in x] for f in (first, second)
    ]
    assert losses[1][0] == pytest.approx(losses[0][-1], rel=1e-6) and losses[0][-1] < losses[0][0]


def test_losses_do_not_depend_on_the_passes(train):
    losses = [
        [
            x["loss"]
            for x in read_metrics(train(limit, "--micro-batch-tokens", limit))
            if "loss" in x
        ]
        for limit in ("50", "4096")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("hidden, trained", [
    (0, 5_242_880), (512, 20 * 4096 + 4096 * 512 + 512 + 512 * 262_144 + 262_144),
])  # fmt: skip
def test_parameter_counts_of_llama_7b(hidden, trained):
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=11008))
        prefix = prefix_tuning.Prefix(torch.zeros(20, 64, 32, 128), 4096, hidden)
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    assert sum(p.numel() for p in prefix.parameters() if p.requires_grad) == trained
    assert prefix.start.numel() == 5_242_880


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])  # here with sliding windows
def test_models_that_cannot_hold_a_prefix_are_refused(name):
    with pytest.raises(common.UserError, match="use prompt_tuning.py"):
        prefix_tuning.keys_and_values_of(build(name), [3, 4])


def test_what_does_not_fit_is_refused(train, tmp_path, random_model):
    with pytest.raises(common.UserError, match="--no-packing"):
        train("no", "--no-packing")
    with pytest.raises(common.UserError, match="--max-length 4090: this model has 4076"):
        train("no", "--max-length", 4090)
    folder = train("a", "--max-steps", 0)
    with pytest.raises(common.UserError, match="another base"):
        train("no", "--adapter", folder, model=TINY)
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace("PREFIX_TUNING", "LORA"))
    with pytest.raises(common.UserError, match="is LORA, not PREFIX_TUNING"):
        train("no", "--adapter", folder)
    assert not (tmp_path / "no").exists()


def test_as_a_newcomer_runs_it(tmp_path):
    run = run_script("prefix_tuning.py", "--max-steps", 12, "--samples", 3, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for text in (
        "prefix has 10,240",
        "step 12: held-out loss",
        "--- after ---",
        "the adapter is in",
    ):
        assert text in run.stdout, text
    folder = tmp_path / "runs" / "demo" / "prefix_tuning"
    losses = [x["eval_loss"] for x in read_metrics(folder) if "eval_loss" in x]
    assert losses[-1] < losses[0] and kept(folder).shape == (20, 512)

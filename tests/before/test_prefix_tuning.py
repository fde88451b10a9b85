"""prefix_tuning.py against PEFT, against the base model reading the same tokens, and as a user runs it."""

import json
import re
import shlex
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from before import ROOT, read_metrics, run_script
from safetensors.torch import load_file

import common_before as common
import prefix_tuning
from before import LLAMA_7B, damage, from_peft
from test_common_before import build
from test_prompt_tuning import base_logps, padded_batch
from before import Killed, flags, kill_after, without_times

SHORT = ["--max-steps", "3", "--batch-size", "2", "--max-length", "256", "--samples", "0", "--lr", "0.01"]
DIRECT = ["--no-reparameterize", "--lr", "0.1"]


def train(folder, *more):
    """A short run in this process. -> its output folder"""
    prefix_tuning.main(["--output", str(folder), *SHORT, *more])
    return folder


def arguments(*more):
    """The arguments of prefix_tuning.py, by way of its own parser."""
    seen, original = [], prefix_tuning.train
    prefix_tuning.train = seen.append
    try:
        prefix_tuning.main([*map(str, more)])
    finally:
        prefix_tuning.train = original
    return seen[0]


def load(folder, dtype=torch.float32, *more):
    args = arguments("--model", folder / "base", "--adapter", folder, *more)
    model = common.load_model(args, dtype, torch.device("cpu"))
    prefix_tuning.load_prefix(model, args)
    return model.eval()


def logits(model, input_ids, attention_mask, **options):
    """The whole model behind its prefix, in the way that its `target_logps` goes."""
    inputs = {"past_key_values": model.prefix.cache(len(input_ids), model.dtype), "attention_mask": prefix_tuning.prefix_mask(model, attention_mask)}
    return model(input_ids=input_ids, use_cache=False, **inputs, **options).logits


ATTENTIVE = ["llama", "qwen2", "qwen3", "gpt_neox", "gpt2", "phi", "cohere", "granite", "opt", "bloom"]


@pytest.mark.parametrize("hidden", [0, 16])
@pytest.mark.parametrize("name", ATTENTIVE)
def test_the_start_is_the_base_behind_these_tokens_and_only_the_prefix_gets_gradients(name, hidden):
    """Rows of unlike length get what the base gives behind the prefix's tokens: positions, rotary embeddings, grouped heads
    and the order of layers are right in every architecture."""
    model, batch, front = build(name), padded_batch([17, 9, 2]), [7, 31, 8, 90]
    expected = base_logps(model, torch.tensor(front), batch)
    assert (base_logps(model, torch.tensor([7, 31, 8, 91]), batch) - expected).abs().max() > 1e-4  # the prefix is seen
    prefix_tuning.add_prefix(model, prefix_tuning.keys_and_values(model, front), hidden, 17)
    logps = model.target_logps(**batch)
    torch.testing.assert_close(logps, expected, rtol=0, atol=2e-5)
    logps.sum().backward()
    ours = {"prefix.embedding.weight", *(f"prefix.mlp.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias"))} if hidden else {"prefix.start"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == ours
    assert {n for n, p in model.named_parameters() if p.grad is not None} == ours
    assert (model.prefix.mlp[2].weight if hidden else model.prefix.start).grad.any()


def test_the_mlp_is_the_equation():
    """start + W2 tanh(W1 E + b1) + b2 in float64, and its gradients; it starts at 0."""
    torch.manual_seed(0)
    start = torch.randn(3, 4, 2, 5)
    prefix = prefix_tuning.Prefix(start, 6, 7)
    assert torch.equal(prefix(), start.flatten(1)) and {p.dtype for p in prefix.parameters()} == {torch.float32}
    torch.nn.init.normal_(prefix.mlp[2].weight), torch.nn.init.normal_(prefix.mlp[2].bias)
    prefix().square().sum().backward()
    parameters = [p.detach().double().requires_grad_() for p in (prefix.embedding.weight, *prefix.mlp.parameters())]
    E, W1, b1, W2, b2 = parameters
    expected = start.double().flatten(1) + torch.tanh(E @ W1.T + b1) @ W2.T + b2
    expected.square().sum().backward()
    torch.testing.assert_close(prefix().double(), expected, rtol=0, atol=1e-5)
    for ours, theirs in zip((prefix.embedding.weight, *prefix.mlp.parameters()), parameters):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)


def test_attention_over_the_prefix_is_the_closed_form():
    """One layer of llama's attention by hand in float64: keys of the prefix are not rotated again, the text's are rotated from
    position P on, and each pair of query heads shares a key-value head."""
    model = build("llama", num_hidden_layers=1)
    torch.manual_seed(2)
    start, ids = torch.randn(3, 2, 2, 16), torch.tensor([[9, 30, 77, 12]])
    prefix_tuning.add_prefix(model, start, 0, 8)
    seen = []
    attention = model.model.layers[0].self_attn
    attention.o_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits(model, ids, torch.ones_like(ids))
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))[0].double()
    q, k, v = ((x @ layer.weight.double().T).view(4, -1, 16) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    angles = torch.arange(3, 7).double()[:, None] * 10000 ** -(torch.arange(8).double() / 8)  # positions 3 to 6
    cos, sin = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]
    q, k = (y * cos + torch.cat([-y[..., 8:], y[..., :8]], -1) * sin for y in (q, k))
    k, v = torch.cat([start[:, 0].double(), k]), torch.cat([start[:, 1].double(), v])
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)  # (7, 4 heads, 16)
    scores = torch.einsum("qhd,khd->hqk", q, k) / 4
    scores = scores.masked_fill(torch.ones(4, 7).tril(3) == 0, -torch.inf)
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
    torch.testing.assert_close(seen[0][0].double(), expected, rtol=0, atol=1e-5)


def test_a_prefix_of_zeros_is_not_the_base():
    model, batch = build("llama"), padded_batch([17])
    expected = model.target_logps(**batch)
    prefix_tuning.add_prefix(model, torch.zeros(4, 4, 2, 16), 0, 17)
    assert (model.target_logps(**batch) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("more", [[], ["--no-reparameterize"]])
def test_step_0_of_a_run_is_what_is_stated(more, tmp_path):
    """--init-text: the held-out loss before the first step is the base's behind the text, repeated or cut to P tokens."""
    folder = train(tmp_path, "--max-steps", "0", "--init-text", "abc", "--prefix-length", "4", "--eval-fraction", "0.02", *more)
    args = arguments("--max-length", "256", "--eval-fraction", "0.02")
    tokenizer, size = common.load_tokenizer(args)
    _, evaluation = common.load_data(args, tokenizer, size)
    model, front = common.tiny_model().eval(), torch.tensor(tokenizer("abca").input_ids)
    nll = count = 0
    with torch.no_grad():
        for document in [document for row in evaluation.rows() for document in row]:
            ids, marks = (torch.tensor(evaluation.table[document][key]) for key in ("input_ids", "is_target"))
            logps = model(input_ids=torch.cat([front, ids])[None]).logits[0, 3:-1].log_softmax(-1).gather(1, ids[:, None])[:, 0]
            nll, count = nll - logps[marks].sum().item(), count + marks.sum().item()
    assert read_metrics(folder)[1]["eval_loss"] == pytest.approx(nll / count, abs=1e-5)
    kept = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(kept, prefix_tuning.keys_and_values(model, front.tolist()).flatten(1))


def test_starting_tokens():
    model, tokenizer = common.tiny_model(), common.tiny_tokenizer()
    assert prefix_tuning.starting_tokens(model, tokenizer, 5, "abc") == tokenizer("abcab").input_ids
    assert prefix_tuning.starting_tokens(model, tokenizer, 2, "abc") == tokenizer("ab").input_ids
    sampled = prefix_tuning.starting_tokens(model, tokenizer, 500)
    assert len(sampled) == 500 and len(set(sampled)) > 200 and 0 <= min(sampled) < 10 and 310 < max(sampled) < 320


@pytest.mark.parametrize("dtype, more", [(torch.float32, []), (torch.float32, DIRECT), (torch.bfloat16, DIRECT)])
def test_peft_loads_the_prefix_and_gives_our_logits(dtype, more, tmp_path):
    """Exactly, on a model with grouped-query attention, for padded rows; and the prefix does something."""
    folder = train(tmp_path, *more)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {name: x.shape for name, x in tensors.items()} == {"prompt_embeddings": (20, 2 * 4 * 64)}
    ours = load(folder, dtype, "--no-reparameterize")
    assert ours.prefix.start.dtype == torch.float32 and ours.dtype == dtype
    theirs = from_peft(folder, transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype))
    batch = padded_batch([30, 12], 256)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = theirs(**inputs).logits
        assert torch.equal(logits(ours, **inputs), expected)
        logps = expected.flatten(0, 1)[batch["target_index"]].float().log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]
        torch.testing.assert_close(ours.target_logps(**batch), logps, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-2)
        again = load(folder, dtype)  # continued through a new MLP, which is 0: the same start
        assert torch.equal(again.target_logps(**batch), ours.target_logps(**batch))
        with theirs.disable_adapter():
            assert (theirs(**inputs).logits - expected).abs().max() > 1e-2


def test_gradients_equal_pefts():
    """The same prefix in PEFT's model and ours: same loss, same gradients of keys and values."""
    ours, base, batch = build("qwen2"), build("qwen2"), padded_batch([30, 11])
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, token_dim=32, num_attention_heads=2, num_layers=2)
    theirs = peft.get_peft_model(base, config).eval()
    prefix = theirs.prompt_encoder["default"].embedding.weight
    prefix_tuning.add_prefix(ours, prefix.detach().clone().view(5, 4, 2, 16), 0, 30)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected, loss = theirs(**{k: batch[k] for k in ("input_ids", "attention_mask")}, labels=labels).loss, -ours.target_logps(**batch).mean()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    loss.backward(), expected.backward()
    torch.testing.assert_close(ours.prefix.start.grad, prefix.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_generation_is_greedy_decoding_by_hand(name):
    """Token by token and row by row, each time the whole text anew, for prompts of unlike length in one batch."""
    model, tokenizer = build(name, vocab_size=320, tie_word_embeddings=False), common.tiny_tokenizer()
    prompts, written = [[70, 71, 72, 80, 81], [90], [65, 66]], []
    torch.manual_seed(4)
    prefix_tuning.add_prefix(model, prefix_tuning.keys_and_values(model, [3, 4, 5, 6, 7, 8]) + torch.randn(6, 1, 1, 1), 8, 64)
    with torch.no_grad():  # a head of its own, or a random model repeats itself
        model.get_output_embeddings().weight.normal_()
        for parameter_name, p in model.named_parameters():
            p.mul_(not parameter_name.endswith("bias"))
    for ids in prompts:
        ids, new = torch.tensor([ids]), []
        while len(new) < 12 and not (new and new[-1] == tokenizer.eos_token_id):
            with torch.no_grad():
                new.append(logits(model, ids, torch.ones_like(ids))[0, -1].argmax().item())
            ids = torch.cat([ids, torch.tensor([new[-1:]])], dim=1)
        written.append(tokenizer.decode(new, skip_special_tokens=True))
    assert common.generate(model, tokenizer, prompts, torch.device("cpu"), max_new_tokens=12) == written
    del model.generate
    assert common.generate(model, tokenizer, prompts, torch.device("cpu"), max_new_tokens=12) != written  # the prefix matters


@pytest.mark.parametrize("hidden, trained", [(0, 5_242_880), (512, 20 * 4096 + 4096 * 512 + 512 + 512 * 262_144 + 262_144)])
def test_parameter_counts_of_llama_7b(hidden, trained):
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_7B))
        prefix_tuning.add_prefix(model, prefix_tuning.keys_and_values(model, [0] * 20), hidden, 1024)
    assert common.count_parameters(model) == (trained, 6_738_415_616 + trained) and model.prefix.start.numel() == 5_242_880


@pytest.mark.parametrize("more", [[], DIRECT])
def test_training_goes_on_from_a_prefix_and_leaves_the_base_as_it_is(more, tmp_path):
    first = train(tmp_path / "a", "--prefix-length", "7", *more)
    second = train(tmp_path / "b", "--adapter", str(first), *more)  # its own length holds
    before, after = (load_file(folder / "adapter_model.safetensors")["prompt_embeddings"] for folder in (first, second))
    assert before.shape == after.shape == (7, 512) and not torch.equal(before, after)
    assert json.loads((second / "adapter_config.json").read_text())["num_virtual_tokens"] == 7
    losses = [[e["eval_loss"] for e in read_metrics(folder) if "eval_loss" in e] for folder in (first, second)]
    assert losses[1][0] == pytest.approx(losses[0][-1], abs=1e-5) and losses[0][-1] < losses[0][0]
    model, untouched = load(second), common.tiny_model().state_dict()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in untouched.items())


def test_a_prefix_of_pefts_own_is_taken_up(tmp_path, capsys):
    """With PEFT's projection, too: it saves the result, as we do."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, token_dim=64, num_attention_heads=2,
                                     num_layers=4, encoder_hidden_size=32)  # fmt: skip
    theirs = peft.get_peft_model(common.tiny_model(), config).eval()
    theirs.save_pretrained(tmp_path)
    args = arguments("--adapter", tmp_path)
    model = common.load_model(args, torch.float32, torch.device("cpu"))
    prefix_tuning.load_prefix(model, args)
    inputs = {name: x for name, x in padded_batch([9, 4]).items() if name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(logits(model.eval(), **inputs), theirs(**inputs).logits, rtol=0, atol=1e-5)
    assert "on trust" in capsys.readouterr().out and args.prefix_length == 3


@pytest.mark.parametrize("at, more", [(7, []), (11, []), (7, ["--no-reparameterize"])])
def test_a_resumed_run_equals_one_that_was_never_stopped(at, more, tmp_path, monkeypatch):
    prefix_tuning.main(flags(tmp_path, "whole", *more))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, at)
        prefix_tuning.main(flags(tmp_path, "parts", *more))
    prefix_tuning.main(flags(tmp_path, "parts", *more, "--resume"))
    assert without_times(read_metrics(tmp_path / "whole")) == without_times(read_metrics(tmp_path / "parts"))
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors")["prompt_embeddings"] for name in ("whole", "parts"))
    assert torch.equal(a, b)


@pytest.mark.parametrize("changes, match", [
    ({"base_fingerprint": "0" * 32}, "another base"),
    ({"peft_type": "PROMPT_TUNING"}, "not a PREFIX_TUNING"),
])  # fmt: skip
def test_adapters_that_do_not_fit_are_refused(changes, match, tmp_path):
    folder = train(tmp_path / "a", "--max-steps", "0")
    damage(folder, **changes)
    with pytest.raises(common.UserError, match=match):
        train(tmp_path / "again", "--adapter", str(folder))


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text", "mamba"])  # here mistral has a sliding window
def test_models_that_cannot_hold_a_prefix_are_refused(name):
    with pytest.raises(common.UserError, match="cannot all hold a prefix: use prompt_tuning.py"):
        prefix_tuning.keys_and_values(build(name), [3, 4])


def test_layers_of_unlike_shape_are_refused():
    model = build("llama")
    model.model.layers[1].self_attn.k_proj = torch.nn.Linear(64, 16, bias=False)  # one key-value head instead of two
    model.model.layers[1].self_attn.v_proj = torch.nn.Linear(64, 16, bias=False)
    model.model.layers[1].self_attn.num_key_value_groups = 4
    with pytest.raises(common.UserError, match="several shapes"):
        prefix_tuning.keys_and_values(model, [3, 4])


@pytest.mark.parametrize("more, match", [
    (["--packing"], "--packing"),
    (["--gradient-checkpointing"], "--gradient-checkpointing: .*--grad-accum"),
    (["--checkpoint-blocks", "2"], "--checkpoint-blocks"),
    (["--init-text", ""], "no tokens"),
    (["--init-text", "abc", "--adapter", "some"], "has its own"),
    (["--prefix-length", "4000"], "4096 positions"),
    (["--prefix-length", "0"], "--prefix-length"),
    (["--hidden", "0"], "--hidden"),
])  # fmt: skip
def test_bad_combinations_are_refused_before_anything_is_written(more, match, tmp_path):
    with pytest.raises(common.UserError, match=match):
        train(tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_as_a_user_runs_it(tmp_path):
    """What is promised is on the screen, and the printed command answers as our own path does."""
    output = tmp_path / "run"
    run = run_script("prefix_tuning.py", "--output", output, "--max-steps", "4", "--samples", "1")
    assert run.returncode == 0, run.stderr
    assert "10,240 are kept" in run.stdout and "--- after ---" in run.stdout
    (command,) = re.findall(r"^  (python .*)$", run.stdout, re.MULTILINE)
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    tokenizer = common.tiny_tokenizer()
    ids = common.render(tokenizer, [{"role": "user", "content": "Hello"}], prompt=True)
    (answer,) = common.generate(load(output), tokenizer, [ids], torch.device("cpu"), max_new_tokens=50)
    assert str({"role": "assistant", "content": answer}) in done.stdout

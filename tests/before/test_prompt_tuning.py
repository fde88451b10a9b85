"""prompt_tuning.py against PEFT, against the base model reading the same tokens, and as a user runs it."""

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
import prompt_tuning
from before import LLAMA_7B, damage, from_peft
from test_common_before import build
from before import Killed, flags, kill_after, without_times

SHORT = ["--max-steps", "3", "--batch-size", "2", "--max-length", "256", "--samples", "0", "--lr", "0.1"]


def train(folder, *more):
    """A short run in this process. -> its output folder"""
    prompt_tuning.main(["--output", str(folder), *SHORT, *more])
    return folder


def arguments(*more):
    """The arguments of prompt_tuning.py, by way of its own parser."""
    seen, original = [], prompt_tuning.train
    prompt_tuning.train = seen.append
    try:
        prompt_tuning.main([*map(str, more)])
    finally:
        prompt_tuning.train = original
    return seen[0]


def load(folder, dtype=torch.float32):
    args = arguments("--model", folder / "base", "--adapter", folder)
    model = common.load_model(args, dtype, torch.device("cpu"))
    prompt_tuning.load_prompt(model, args)
    return model.eval()


def padded_batch(lengths, vocab_size=160):
    """Random rows padded on the right, as Corpus.collate makes them; every token but the first of each row is a target."""
    generator, width = torch.Generator().manual_seed(1), max(lengths)
    ids = torch.randint(5, vocab_size, (len(lengths), width), generator=generator)
    real = torch.arange(width) < torch.tensor(lengths)[:, None]
    index = torch.cat([row * width + torch.arange(n - 1) for row, n in enumerate(lengths)])
    batch = {"input_ids": ids.masked_fill(~real, 0), "attention_mask": real.long()}
    return batch | {"targets": ids.flatten()[index + 1], "target_index": index}


def base_logps(model, front, batch):
    """The base's own logits with the tokens `front` before each row alone, without padding: log p of the row's targets."""
    pieces = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"]):
        row = torch.cat([front, ids[mask.bool()]])
        logps = model(input_ids=row[None], use_cache=False).logits[0, len(front) : -1].log_softmax(-1)
        pieces.append(logps.gather(1, row[len(front) + 1 :, None])[:, 0])
    return torch.cat(pieces)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox", "gpt2", "mistral", "gemma3_text", "cohere"])
def test_the_embeddings_of_tokens_are_these_tokens_and_only_the_prompt_gets_gradients(name):
    """With real tokens' embeddings for P, rows of unlike length get what the base gives behind these tokens, whatever the
    architecture does with positions, windows and the scale of its embeddings."""
    model, batch, front = build(name), padded_batch([17, 9, 2]), torch.tensor([7, 31, 8, 90])
    expected = base_logps(model, front, batch)
    prompt_tuning.add_prompt(model, model.get_input_embeddings()(front).detach().float(), 17)
    logps = model.target_logps(**batch)
    torch.testing.assert_close(logps, expected, rtol=0, atol=2e-5)
    logps.sum().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["prompt.embeddings"]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["prompt.embeddings"]


def test_initial_values(tmp_path):
    tokenizer, model = common.tiny_tokenizer(), common.tiny_model()
    embedding = model.get_input_embeddings().weight
    for length, ids in ((5, tokenizer("abcab").input_ids), (2, tokenizer("ab").input_ids)):  # repeated, and cut
        assert torch.equal(prompt_tuning.initial_prompt(model, tokenizer, length, "text", "abc"), embedding[ids])
    sampled = prompt_tuning.initial_prompt(model, tokenizer, 50, "vocab")
    rows = [(row == embedding).all(1).nonzero()[0, 0].item() for row in sampled]  # each is a row of the vocabulary
    assert len(set(rows)) > 30 and max(rows) > 200
    uniform = prompt_tuning.initial_prompt(model, tokenizer, 50, "random")
    assert uniform.shape == (50, 128) and -0.5 <= uniform.min() < -0.49 and 0.49 < uniform.max() < 0.5
    narrow = prompt_tuning.initial_prompt(model.to(torch.bfloat16), tokenizer, 4, "vocab")
    assert narrow.dtype == torch.float32


def test_step_0_of_init_text_is_the_base_behind_this_text(tmp_path):
    """The held-out loss before the first step, from the base alone with the text's tokens in front of every row."""
    folder = train(tmp_path, "--max-steps", "0", "--init", "text", "--init-text", "abc", "--prompt-length", "4", "--eval-fraction", "0.02")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_loads_the_prompt_and_gives_our_logits(dtype, tmp_path):
    folder = train(tmp_path)
    assert [*load_file(folder / "adapter_model.safetensors")] == ["prompt_embeddings"]
    ours = load(folder, dtype)
    assert ours.prompt.embeddings.dtype == torch.float32 and ours.dtype == dtype
    theirs = from_peft(folder, transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype))
    batch = padded_batch([30, 12], 256)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = theirs(**inputs).logits
        assert torch.equal(ours(**prompt_tuning.with_prompt(ours, **inputs)).logits, expected)
        logps = expected[:, 20:].flatten(0, 1)[batch["target_index"]].float().log_softmax(-1)
        logps = logps.gather(1, batch["targets"][:, None])[:, 0]
        torch.testing.assert_close(ours.target_logps(**batch), logps, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-2)
        assert (base_logps(common.tiny_model().eval(), torch.tensor([], dtype=torch.long), batch) - logps).abs().max() > 1e-2


def test_gradients_equal_pefts():
    ours, base, batch = build("llama"), build("llama"), padded_batch([30, 11])
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    theirs = peft.get_peft_model(base, config).eval()
    P = theirs.prompt_encoder["default"].embedding.weight
    prompt_tuning.add_prompt(ours, P.detach().clone(), 30)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, 0] = -100  # PEFT would predict a row's first token from the prompt; no method here has it for a target
    expected, loss = theirs(**{k: batch[k] for k in ("input_ids", "attention_mask")}, labels=labels).loss, -ours.target_logps(**batch).mean()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    loss.backward(), expected.backward()
    torch.testing.assert_close(ours.prompt.embeddings.grad, P.grad, rtol=1e-4, atol=1e-6)


def strong_prompt(model, length=6):
    """A prompt that changes what a random model says."""
    torch.manual_seed(4)
    prompt_tuning.add_prompt(model, torch.randn(length, model.config.hidden_size), 64)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_generation_is_greedy_decoding_by_hand(name):
    """Token by token and row by row, without cache and padding, for prompts of unlike length in one batch."""
    model, tokenizer, prompts = strong_prompt(build(name, vocab_size=320, tie_word_embeddings=False)), common.tiny_tokenizer(), [[70, 71, 72, 80, 81], [90], [65, 66]]
    with torch.no_grad():  # a head of its own, or a random model repeats itself
        model.lm_head.weight.normal_()
        for parameter_name, p in model.named_parameters():
            p.mul_(not parameter_name.endswith("bias"))
    written = []
    for ids in prompts:
        ids = torch.tensor([ids])
        new = []
        while len(new) < 12 and not (new and new[-1] == tokenizer.eos_token_id):
            with torch.no_grad():
                inputs = prompt_tuning.with_prompt(model, ids, torch.ones_like(ids))
                new.append(model(**inputs, use_cache=False).logits[0, -1].argmax().item())
            ids = torch.cat([ids, torch.tensor([new[-1:]])], dim=1)
        written.append(tokenizer.decode(new, skip_special_tokens=True))
    assert common.generate(model, tokenizer, prompts, torch.device("cpu"), max_new_tokens=12) == written
    del model.generate
    assert common.generate(model, tokenizer, prompts, torch.device("cpu"), max_new_tokens=12) != written  # the prompt matters


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = strong_prompt(build("llama")).train()
        common.checkpoint_blocks(model, arguments(*["--gradient-checkpointing"] * checkpointing))
        model.target_logps(**padded_batch([20, 7])).sum().backward()
        gradients.append(model.prompt.embeddings.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_parameter_count_of_llama_7b():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_7B))
        prompt_tuning.add_prompt(model, torch.zeros(20, 4096), 1024)
    assert common.count_parameters(model) == (81_920, 6_738_415_616 + 81_920)


def test_training_goes_on_from_a_prompt_and_leaves_the_base_as_it_is(tmp_path):
    first = train(tmp_path / "a", "--prompt-length", "7", "--init", "random")
    second = train(tmp_path / "b", "--adapter", str(first))  # its own length holds
    before, after = (load_file(folder / "adapter_model.safetensors")["prompt_embeddings"] for folder in (first, second))
    assert before.shape == after.shape == (7, 128) and not torch.equal(before, after)
    assert json.loads((second / "adapter_config.json").read_text())["num_virtual_tokens"] == 7
    losses = [[e["eval_loss"] for e in read_metrics(folder) if "eval_loss" in e] for folder in (first, second)]
    assert losses[1][0] == pytest.approx(losses[0][-1], abs=1e-6) and losses[0][-1] < losses[0][0]
    model, untouched = load(second), common.tiny_model().state_dict()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in untouched.items())


def test_a_prompt_of_pefts_own_is_taken_up(tmp_path, capsys):
    base = common.tiny_model()
    theirs = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    theirs.save_pretrained(tmp_path)
    args = arguments("--adapter", tmp_path)
    model = common.load_model(args, torch.float32, torch.device("cpu"))
    prompt_tuning.load_prompt(model, args)
    inputs = {name: x for name, x in padded_batch([9, 4]).items() if name in ("input_ids", "attention_mask")}
    assert torch.equal(model.eval()(**prompt_tuning.with_prompt(model, **inputs)).logits, theirs(**inputs).logits)
    assert "on trust" in capsys.readouterr().out and args.prompt_length == 3


@pytest.mark.parametrize("at", [7, 11])
def test_a_resumed_run_equals_one_that_was_never_stopped(at, tmp_path, monkeypatch):
    prompt_tuning.main(flags(tmp_path, "whole"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, at)
        prompt_tuning.main(flags(tmp_path, "parts"))
    prompt_tuning.main(flags(tmp_path, "parts", "--resume"))
    assert without_times(read_metrics(tmp_path / "whole")) == without_times(read_metrics(tmp_path / "parts"))
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors")["prompt_embeddings"] for name in ("whole", "parts"))
    assert torch.equal(a, b)


@pytest.mark.parametrize("changes, match", [
    ({"base_fingerprint": "0" * 32}, "another base"),
    ({"peft_type": "LORA"}, "not a PROMPT_TUNING"),
])  # fmt: skip
def test_adapters_that_do_not_fit_are_refused(changes, match, tmp_path):
    folder = train(tmp_path / "a", "--max-steps", "0")
    damage(folder, **changes)
    with pytest.raises(common.UserError, match=match):
        train(tmp_path / "again", "--adapter", str(folder))


@pytest.mark.parametrize("more, match", [
    (["--packing"], "--packing"),
    (["--init", "text"], "--init-text TEXT"),
    (["--init-text", "abc"], "it needs --init text"),
    (["--init", "text", "--init-text", ""], "no tokens"),
    (["--init", "text", "--init-text", "abc", "--adapter", "some"], "has its own"),
    (["--prompt-length", "4000"], "4096 positions"),
    (["--prompt-length", "0"], "--prompt-length"),
])  # fmt: skip
def test_bad_combinations_are_refused_before_anything_is_written(more, match, tmp_path):
    with pytest.raises(common.UserError, match=match):
        train(tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_as_a_user_runs_it(tmp_path):
    """What is promised is on the screen, and the printed command answers as our own path does."""
    output = tmp_path / "run"
    run = run_script("prompt_tuning.py", "--output", output, "--max-steps", "4", "--samples", "1")
    assert run.returncode == 0, run.stderr
    assert "2,560 of 831,104 parameters train" in run.stdout and "--- after ---" in run.stdout
    (command,) = re.findall(r"^  (python .*)$", run.stdout, re.MULTILINE)
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    tokenizer = common.tiny_tokenizer()
    ids = common.render(tokenizer, [{"role": "user", "content": "Hello"}], prompt=True)
    (answer,) = common.generate(load(output), tokenizer, [ids], torch.device("cpu"), max_new_tokens=50)
    assert str({"role": "assistant", "content": answer}) in done.stdout

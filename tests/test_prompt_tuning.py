"""prompt_tuning.py against PEFT, against the base that reads the same tokens, and as a user runs
it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import TINY, read_metrics, run_script, write_rows
from datasets import Dataset
from safetensors.torch import load_file
from test_model import CPU, build, documents, own, own_logps
from test_prefix_tuning import behind, pefts_logps

import common
import prompt_tuning

ROWS = [
    {"prompt": f"Repeat {c} {n} times.", "completion": c * n} for n in range(1, 7) for c in "abcde"
]
THREE = "--max-steps 3 --batch-size 8 --lr 0.05 --samples 0 --eval-data 0.2".split()
ENCODERS = ["none", "mlp", "lstm"]


@pytest.fixture
def train(random_model, tmp_path):
    """name, more flags -> the output folder of three steps"""
    data = write_rows(tmp_path / "rows.jsonl", ROWS)

    def run(name, *more, model=random_model) -> Path:
        start = ["--model", str(model), "--data", data, "--output", str(tmp_path / name)]
        prompt_tuning.main([*start, *THREE, *map(str, more)])
        return tmp_path / name

    return run


@pytest.fixture
def load(monkeypatch):
    """A model as a training run has it at its start, with these flags."""

    def with_prompt(model, *more, dtype=torch.float32):
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(prompt_tuning, "train", seen.append)
            prompt_tuning.main(["--model", str(model), "--data", "unused", *map(str, more)])
        loaded = common.load_model(seen[0], dtype, CPU)
        tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
        start = prompt_tuning.starting_prompt(loaded, tokenizer, seen[0])
        prompt = prompt_tuning.Prompt(start, seen[0].encoder, seen[0].hidden)
        prompt_tuning.add_prompt(loaded, prompt, CPU)
        return loaded.eval()

    return with_prompt


def with_prompt(model, start, encoder="none", hidden=8):
    prompt = prompt_tuning.Prompt(start, encoder, hidden)
    prompt_tuning.add_prompt(model, prompt, CPU)
    return model


def batch_of(examples, P: int, padded: bool = False) -> dict:
    """As a run makes it. The placeholder may be any id."""
    features = {name: [x[name] for x in examples] for name in ("input_ids", "is_target")}
    features["stretches"] = [[len(x["input_ids"])] for x in examples]
    table = prompt_tuning.make_room(Dataset.from_dict(features).with_format("numpy"), P, 3)
    return common.collate([*table], padded, CPU)


def kept(folder) -> torch.Tensor:
    (tensor,) = load_file(folder / "adapter_model.safetensors").values()
    return tensor


def config_of(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


# ------------------------------------------------------------------------------ the method

FRONT = np.array([7, 31, 8, 90])
PACKED = "llama qwen2 gpt_neox gpt2 mistral gemma3_text cohere granite".split()
RUNS = [(name, False) for name in PACKED]
RUNS += [(name, True) for name in ("llama", "gpt2", "gemma2", "stablelm")]


@pytest.mark.parametrize("name, padded", RUNS)
def test_embeddings_of_tokens_are_these_tokens(name, padded):
    """With real tokens' embeddings for P, documents of unlike length get what the base gives each
    alone behind these tokens, whatever the architecture does with positions, windows and the scale
    of its embeddings; and only P gets gradients."""
    model, theirs = build(name, *["--no-packing"] * padded), own(name)
    examples = documents([17, 9, 1, 5])
    expected = own_logps(theirs, behind(FRONT, examples))
    start = model.get_input_embeddings()(torch.tensor(FRONT)).detach()
    with_prompt(model, start)
    logps = model.target_logps(**batch_of(examples, 4, padded))
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    logps.sum().backward()
    trained = ["prompt.embedding.weight"]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    assert [n for n, p in model.named_parameters() if p.grad is not None] == trained
    assert model.prompt.embedding.weight.grad.any(1).all()


def pefts_encoder(kind: str, P: int, d: int, hidden: int):
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, token_dim=d, encoder_hidden_size=hidden,
        encoder_reparameterization_type=kind.upper(), num_transformer_submodules=1,
    )  # fmt: skip
    return peft.PromptEncoder(config)


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_the_encoder_is_pefts(kind):
    """The same names of parameters, and from the same values the same outputs and gradients."""
    torch.manual_seed(0)
    theirs = pefts_encoder(kind, P=5, d=12, hidden=7)
    ours = prompt_tuning.Prompt(torch.zeros(5, 12), kind, 7)
    ours.load_state_dict(theirs.state_dict())  # all of them, and no others
    found, expected = ours(), theirs(torch.arange(5)[None])[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert found.std() > 0.02
    found.sin().sum().backward()
    expected.sin().sum().backward()
    others = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, others[name].grad, rtol=1e-5, atol=1e-6)
        assert p.grad.any() and p.dtype == torch.float32


def test_the_encoder_is_the_equation():
    """MLP([forward LSTM; backward LSTM]) step by step in float64, of two layers."""
    torch.manual_seed(1)
    prompt = prompt_tuning.Prompt(torch.randn(4, 6), "lstm", 3).double()
    w = dict(prompt.lstm_head.named_parameters())
    x = prompt.embedding.weight
    for layer in range(2):
        directions = []
        for suffix in ("", "_reverse"):
            end, h, c, rows = f"l{layer}{suffix}", torch.zeros(3).double(), 0, []
            for row in x.flip(0) if suffix else x:
                gates = w[f"weight_ih_{end}"] @ row + w[f"weight_hh_{end}"] @ h
                i, f, g, o = (gates + w[f"bias_ih_{end}"] + w[f"bias_hh_{end}"]).split(3)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                rows.append(h)
            rows = torch.stack(rows)
            directions.append(rows.flip(0) if suffix else rows)
        x = torch.cat(directions, 1)
    first, _, last = prompt.mlp_head
    expected = (x @ first.weight.T + first.bias).relu() @ last.weight.T + last.bias
    torch.testing.assert_close(prompt(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_gradient_checkpointing_and_padding_change_no_gradient(encoder):
    results = []
    for flags in ([], ["--gradient-checkpointing"], ["--no-packing"]):
        torch.manual_seed(4)
        model = with_prompt(build("llama", *flags), torch.randn(6, 64), encoder).train()
        batch = batch_of(documents([20, 7]), 6, "--no-packing" in flags)
        model.target_logps(**batch).sum().backward()
        results.append(torch.cat([p.grad.flatten() for p in model.prompt.parameters()]))
    for other in results[1:]:
        assert (other - results[0]).norm() <= 1e-5 * results[0].norm()


def test_virtual_tokens_count_in_a_pass(train, monkeypatch):
    """--micro-batch-tokens is a limit for them, too."""
    lengths, original = [], common.target_logps

    def target_logps(model, input_ids, targets, target_index, **inputs):
        if "inputs_embeds" in inputs:  # not in load_model's own check
            lengths.append(inputs["inputs_embeds"].shape[1])
        return original(model, input_ids, targets, target_index, **inputs)

    monkeypatch.setattr(common, "target_logps", target_logps)
    losses = []
    for limit in (300, 4096):
        folder = train(str(limit), "--micro-batch-tokens", limit, "--virtual-tokens", 100)
        losses.append([x["loss"] for x in read_metrics(folder) if "loss" in x])
        assert max(lengths) <= limit
    assert max(lengths) > 8 * 100 and losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_generation_is_greedy_decoding_by_hand(name):
    """Token by token and one by one, without cache and padding, for prompts of unlike length."""
    model = build(name, vocab_size=320)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    torch.manual_seed(4)
    with_prompt(model, torch.randn(6, 64))
    prompts, written = [[70, 71, 72, 80, 81], [90], [65, 66]], []
    for prompt in prompts:
        x = [model.prompt.embedding.weight, model.get_input_embeddings()(torch.tensor(prompt))]
        new = []
        while len(new) < 12 and tokenizer.eos_token_id not in new:
            with torch.no_grad(), common.own_attention(model):
                logits = model(inputs_embeds=torch.cat(x)[None], use_cache=False).logits
            new.append(logits[0, -1].argmax().item())
            x.append(model.get_input_embeddings()(torch.tensor(new[-1:])))
        written.append(tokenizer.decode(new, skip_special_tokens=True))
    prompts = [[258] * 6 + prompt for prompt in prompts]
    assert common.generate(model, tokenizer, prompts, CPU, max_new_tokens=12) == written
    del model.generate
    assert common.generate(model, tokenizer, prompts, CPU, max_new_tokens=12) != written


def test_initial_values(load, random_model):
    base = transformers.AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    table = base.get_input_embeddings().weight
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    for length, text in ((5, "abcab"), (2, "ab")):  # repeated, and cut
        model = load(random_model, "--init-text", "abc", "--virtual-tokens", length)
        assert torch.equal(model.prompt(), table[tokenizer(text).input_ids])
    model = load(random_model, "--virtual-tokens", 50, dtype=torch.bfloat16)
    assert model.prompt().dtype == torch.float32 and model.dtype == torch.bfloat16
    rows = [(row == table.bfloat16()).all(1).nonzero()[0, 0].item() for row in model.prompt()]
    assert len(set(rows)) > 30 and max(rows) > 200  # of the whole vocabulary
    model = load(random_model, "--encoder", "lstm", "--virtual-tokens", 200)
    assert 0.97 < model.prompt.embedding.weight.std() < 1.03


# ------------------------------------------------------------------------------------ PEFT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_peft_loads_the_prompt_and_gives_our_logps(
    encoder, dtype, train, load, random_model, recwarn
):
    folder = train("run", "--encoder", encoder)
    kind = "PROMPT_TUNING" if encoder == "none" else "P_TUNING"
    assert config_of(folder)["peft_type"] == kind
    assert list(load_file(folder / "adapter_model.safetensors")) == ["prompt_embeddings"]
    configs = {"PROMPT_TUNING": peft.PromptTuningConfig, "P_TUNING": peft.PromptEncoderConfig}
    known = {field.name for field in dataclasses.fields(configs[kind])}
    assert config_of(folder).keys() <= known
    ours = load(random_model, "--adapter", folder, dtype=dtype)
    base = transformers.AutoModelForCausalLM.from_pretrained(random_model, dtype=dtype)
    recwarn.clear()
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    assert not [x for x in recwarn if "peft" in x.filename]
    examples, tolerance = documents([30, 12, 5], 250), 1e-5 if dtype == torch.float32 else 3e-2
    with torch.no_grad():
        # PEFT's logits begin with those of the virtual tokens
        batch = common.collate(behind([5] * 20, examples), True, CPU)
        plain = common.collate(examples, True, CPU)
        inputs = {name: plain[name] for name in ("input_ids", "attention_mask")}
        logits = theirs(**inputs).logits.flatten(0, 1)[batch["target_index"]].float()
        expected = logits.log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]
        found = ours.target_logps(**batch_of(examples, 20))
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        with theirs.disable_adapter():
            assert (pefts_logps(theirs, examples) - expected).abs().max() > 10 * tolerance


@pytest.mark.parametrize("encoder", ENCODERS)
def test_gradients_equal_pefts(encoder):
    """The same prompt in PEFT's model and ours: same loss, same gradients."""
    ours, examples = build("llama"), documents([30, 11])
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    if encoder == "none":
        config = peft.PromptTuningConfig(**options)
    else:
        options |= {"encoder_reparameterization_type": encoder.upper(), "encoder_hidden_size": 8}
        config = peft.PromptEncoderConfig(**options)
    torch.manual_seed(2)
    theirs = peft.get_peft_model(own("llama"), config).eval()
    encoders = theirs.prompt_encoder["default"]
    with_prompt(ours, torch.zeros(5, 64), encoder, 8)
    ours.prompt.load_state_dict(encoders.state_dict())
    plain = common.collate(examples, True, CPU)
    labels = plain["input_ids"].masked_fill(plain["attention_mask"] == 0, -100)
    labels[:, 0] = -100  # PEFT would predict it from the prompt
    inputs = {name: plain[name] for name in ("input_ids", "attention_mask")}
    expected = theirs(**inputs, labels=labels).loss
    loss = -ours.target_logps(**batch_of(examples, 5)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    for name, p in ours.prompt.named_parameters():
        other = dict(encoders.named_parameters())[name].grad
        assert (p.grad - other).norm() <= 1e-4 * other.norm() + 1e-8, name


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING"])
def test_a_prompt_of_pefts_own_is_taken_up(kind, random_model, load, tmp_path, capsys):
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    config = peft.PromptTuningConfig(**options)
    if kind == "P_TUNING":
        config = peft.PromptEncoderConfig(**options, encoder_hidden_size=8)
    base = transformers.AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load(random_model, "--adapter", tmp_path)
    encoder = theirs.prompt_encoder["default"]
    torch.testing.assert_close(ours.prompt(), encoder(torch.arange(3)), rtol=0, atol=1e-7)
    assert "no base fingerprint" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("more", [[], ["--no-packing"]])
def test_step_0_of_a_run_is_the_base_behind_the_text(more, train, random_model, monkeypatch):
    seen, original = [], common.load_data
    monkeypatch.setattr(common, "load_data", lambda *a: seen.append(original(*a)) or seen[-1])
    flags = ["--max-steps", 0, "--init-text", "abc", "--virtual-tokens", 4]
    folder = train("run", *flags, *more)
    model = transformers.AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    front = np.array(transformers.AutoTokenizer.from_pretrained(TINY)("abca").input_ids)
    logps = own_logps(model.eval(), behind(front, [*seen[0][1]]))
    assert len(logps) > 10
    assert read_metrics(folder)[1]["eval_loss"] == pytest.approx(-logps.mean().item(), rel=1e-6)


def test_training_continues_from_a_prompt(train):
    """From that of an encoder without one, and with its own length."""
    first = train("a", "--virtual-tokens", 7, "--encoder", "mlp", "--lr", 0.002)
    second = train("b", "--adapter", first)
    assert kept(first).shape == kept(second).shape == (7, 64)
    assert not torch.equal(kept(first), kept(second))
    assert config_of(second)["num_virtual_tokens"] == 7
    losses = [
        [x["eval_loss"] for x in read_metrics(f) if "eval_loss" in x] for f in (first, second)
    ]
    assert losses[1][0] == pytest.approx(losses[0][-1], rel=1e-6) and losses[1][1] < losses[1][0]


def test_parameter_count_of_llama_7b():
    with torch.device("meta"):
        prompt = prompt_tuning.Prompt(torch.zeros(20, 4096))
    assert sum(p.numel() for p in prompt.parameters()) == 81_920


def test_what_does_not_fit_is_refused(train, tmp_path):
    folder = train("a", "--max-steps", 0)
    for more in (["--init-text", "a"], ["--adapter", folder]):
        with pytest.raises(common.UserError, match="--encoder"):
            train("no", "--encoder", "mlp", *more)
    with pytest.raises(common.UserError, match="another base"):
        train("no", "--adapter", folder, model=TINY)
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace("PROMPT_TUNING", "LORA"))
    with pytest.raises(common.UserError, match="is LORA, not PROMPT_TUNING or P_TUNING"):
        train("no", "--adapter", folder)
    assert not (tmp_path / "no").exists()


def test_as_a_newcomer_runs_it(tmp_path):
    """The demonstration says what it cannot do."""
    run = run_script("prompt_tuning.py", "--max-steps", 12, "--samples", 3, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for text in ("2,560 parameters train", "step 12: held-out loss", "--- after ---"):
        assert text in run.stdout, text
    assert "too small to learn" in run.stdout.splitlines()[-1]
    folder = tmp_path / "runs" / "demo" / "prompt_tuning"
    losses = [x["eval_loss"] for x in read_metrics(folder) if "eval_loss" in x]
    assert losses[-1] < losses[0] and kept(folder).shape == (20, 128)

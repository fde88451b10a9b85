"""lora.py against PEFT, and as a user runs it."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import TINY, read_metrics, run_script, write_rows
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import common
import lora

ROWS = [
    {"prompt": f"Repeat {c} {n} times.", "completion": c * n} for n in range(1, 7) for c in "abcde"
]
THREE = "--max-steps 3 --batch-size 8 --lr 0.01 --samples 0 --eval-data 0.2".split()
CPU = torch.device("cpu")


@pytest.fixture
def train(random_model, tmp_path):
    """name, more flags -> the output folder of three steps"""
    data = write_rows(tmp_path / "rows.jsonl", ROWS)

    def run(name, *more, model=random_model) -> Path:
        start = ["--model", str(model), "--data", data, "--output", str(tmp_path / name)]
        lora.main([*start, *THREE, *map(str, more)])
        return tmp_path / name

    return run


@pytest.fixture
def load(monkeypatch):
    """A model as a training run has it at its start, with these flags."""

    def with_adapter(model, *more, device=CPU):
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(lora, "train", seen.append)
            lora.main(["--model", str(model), "--data", "unused", *map(str, more)])
        loaded = common.load_model(seen[0], torch.float32, device)
        config = common.add_adapter(loaded, seen[0], lora.LoRALinear, device)
        return loaded, config

    return with_adapter


def base_model(folder, **options):
    options = {"dtype": torch.float32} | options
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def from_peft(base, folder):
    return peft.PeftModel.from_pretrained(base_model(base), folder).eval()


@pytest.fixture
def peft_adapter(random_model, tmp_path):
    """name, fields of LoraConfig -> (PEFT's model with random A and B, its saved folder)"""

    def make(name, **fields):
        options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
        options |= {"task_type": "CAUSAL_LM", "init_lora_weights": False} | fields
        torch.manual_seed(1)
        model = peft.get_peft_model(base_model(random_model), peft.LoraConfig(**options))
        model.save_pretrained(tmp_path / name)
        return model, tmp_path / name

    return make


@torch.no_grad()
def logits(model):
    """Of two documents of 40 tokens, as transformers runs the model."""
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(3))
    if hasattr(model, "target_logps"):
        with common.own_attention(model.eval()):
            return model(input_ids=ids, use_cache=False).logits
    return model.eval()(input_ids=ids).logits


def a_batch():
    """Two packed documents, and their token ids."""
    ids = [torch.arange(first, last) * 7 % 250 for first, last in ((0, 30), (50, 62))]
    examples = [{"input_ids": x, "is_target": [False] + [True] * (len(x) - 1)} for x in ids]
    return common.collate(examples, False, CPU), ids


# ------------------------------------------------------------------------------- the layer


def test_the_layer_is_the_equation():
    """y = W0 x + s B A x in float64, with its gradients, and nothing for W0."""
    torch.manual_seed(0)
    layer = lora.LoRALinear(nn.Linear(6, 5), rank=2, alpha=3.0).double()
    nn.init.normal_(layer.lora_B.weight)
    layer.base.requires_grad_(False)
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    A, B, z = (
        p.detach().clone().requires_grad_() for p in (layer.lora_A.weight, layer.lora_B.weight, x)
    )
    h = z @ layer.base.weight.T + layer.base.bias + 1.5 * z @ A.T @ B.T
    torch.testing.assert_close(layer(x), h, rtol=0, atol=1e-14)
    layer(x).sin().sum().backward()
    h.sin().sum().backward()
    ours = x.grad, layer.lora_A.weight.grad, layer.lora_B.weight.grad
    for gradient, other in zip(ours, (z, A, B)):
        torch.testing.assert_close(gradient, other.grad, rtol=0, atol=1e-13)
    assert layer.base.weight.grad is None and layer.base.bias.grad is None


def test_initial_values_and_scaling():
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), which is kaiming_uniform(a=sqrt 5), B = 0, both float32
    beside a bfloat16 base."""
    torch.manual_seed(0)
    layer = lora.LoRALinear(nn.Linear(400, 30, dtype=torch.bfloat16), rank=16, alpha=8)
    A, B = layer.lora_A.weight, layer.lora_B.weight
    assert A.dtype == B.dtype == torch.float32 and A.shape == (16, 400) and B.shape == (30, 16)
    assert 0.049 < A.abs().max() <= 1 / math.sqrt(400) and not B.any()
    assert A.std().item() == pytest.approx(0.05 / math.sqrt(3), rel=0.03)
    assert layer.scaling == 0.5 and layer(torch.randn(3, 400).bfloat16()).dtype == torch.bfloat16


def test_dropout_reaches_the_update_alone():
    """On x before A, scaled by 1 / (1 - p) in training, absent in evaluation."""
    torch.manual_seed(0)
    layer, x = lora.LoRALinear(nn.Linear(64, 8), rank=4, alpha=4, dropout=0.5), torch.randn(3, 64)
    assert torch.equal(layer.train()(x), layer.base(x))  # B is zero
    nn.init.normal_(layer.lora_B.weight)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    dropped = torch.nn.functional.dropout(x, 0.5)
    expected = layer.base(x) + dropped @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    expected = layer.base(x) + x @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    torch.testing.assert_close(layer.eval()(x), expected, rtol=0, atol=1e-5)


def test_merging_rounds_once_in_float32():
    torch.manual_seed(0)
    layer = lora.LoRALinear(nn.Linear(64, 64, dtype=torch.bfloat16), rank=4, alpha=8)
    nn.init.normal_(layer.lora_B.weight, std=0.01)
    A, B = layer.lora_A.weight.double(), layer.lora_B.weight.double()
    expected = (layer.base.weight.double() + 2 * B @ A).to(torch.bfloat16)
    assert torch.equal(layer.merged().weight, expected)


# ------------------------------------------------------------------------------- the model

SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 512, "bos_token_id": None,
         "eos_token_id": 257, "pad_token_id": 258}  # fmt: skip
KINDS = {
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 2}, 7),
    "gpt_neox": (transformers.GPTNeoXConfig, {"tie_word_embeddings": False}, 4),
    "gpt2": (transformers.GPT2Config, {"n_embd": 64, "n_layer": 2, "n_head": 4}, 0),
}


@pytest.fixture
def folder_of(tmp_path, random_model):
    """A kind of model -> a folder with a small random one"""

    def make(kind):
        if kind == "llama":
            return random_model
        config, more, _ = KINDS[kind]
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config(**SIZES | more))
        model.save_pretrained(tmp_path / kind)
        transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


@pytest.mark.parametrize("kind, layers", [("llama", 7), ("qwen2", 7), ("gpt_neox", 4)])
def test_the_start_is_the_base_and_only_adapters_get_gradients(kind, layers, folder_of, load):
    folder = folder_of(kind)
    model, config = load(folder)
    names = [name for name, m in model.named_modules() if isinstance(m, lora.LoRALinear)]
    assert len(names) == 2 * layers and not [x for x in names if "head" in x or "embed" in x]
    torch.testing.assert_close(logits(model), logits(base_model(folder)), rtol=0, atol=1e-5)
    batch, _ = a_batch()
    for module in model.modules():
        if isinstance(module, lora.LoRALinear):  # a zero B gives A no gradient
            nn.init.normal_(module.lora_B.weight, std=0.1)
    model.train().target_logps(**batch).sum().backward()
    for name, p in model.named_parameters():
        assert ("lora_" in name) == p.requires_grad == (p.grad is not None), name
        assert p.grad is None or p.grad.any(), name
    assert config["r"] == 16 and config["lora_alpha"] == 32


@pytest.mark.parametrize(
    "rank, targets, expected",
    [(8, "q_proj,v_proj", "4,194,304 of 6,742,609,920"), (64, "all-linear", "159,907,840 of")],
)
def test_parameter_counts_of_llama_7b(rank, targets, expected, load, monkeypatch, capsys):
    def on_meta(*args):
        with torch.device("meta"):
            config = transformers.LlamaConfig(intermediate_size=11008)
            return transformers.LlamaForCausalLM(config)

    monkeypatch.setattr(common, "load_model", on_meta)
    load("unused", "--rank", rank, "--targets", targets, device=torch.device("meta"))
    assert expected in capsys.readouterr().out


def test_gradients_equal_pefts(peft_adapter, load, random_model):
    theirs, folder = peft_adapter("theirs", target_modules="all-linear")
    ours, _ = load(random_model, "--adapter", folder)
    batch, ids = a_batch()
    loss = -ours.target_logps(**batch).mean()
    count = sum(len(x) - 1 for x in ids)
    for x in ids:
        one = theirs(input_ids=x[None], labels=x[None]).loss
        (one * (len(x) - 1) / count).backward()
    loss.backward()
    expected = {n.replace(".default", "").removeprefix("base_model.model."): p.grad
                for n, p in theirs.named_parameters() if p.requires_grad}  # fmt: skip
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert expected.keys() == found.keys() and len(found) == 28
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_gpt2_gets_a_clear_error(folder_of, train):
    with pytest.raises(common.UserError, match="no nn.Linear layers.*Conv1D"):
        train("run", model=folder_of("gpt2"))


# ---------------------------------------------------------------------------- adapter folders


@pytest.mark.parametrize(
    "more", [[], ["--targets", "q_proj,v_proj", "--rank", "4"], ["--alpha", "5", "--rank", "3"]]
)
def test_peft_loads_the_adapter_gives_our_logits_and_merges_alike(
    more, train, load, random_model, tmp_path
):
    folder = train("run", *more)
    model, _ = load(random_model, "--adapter", folder)
    theirs = from_peft(random_model, folder)
    expected = logits(theirs)
    with theirs.disable_adapter():
        assert (logits(theirs) - expected).abs().max() > 0.01  # the adapter does something
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)

    flags = ["--model", random_model, "--adapter", str(folder), "--output", str(tmp_path / "m")]
    lora.main(["--merge-only", *flags])
    merged = base_model(tmp_path / "m", dtype="auto")
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=2e-5)
    unloaded = theirs.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, unloaded[name], rtol=0, atol=1e-6, msg=name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.chat_template and merged.generation_config.eos_token_id == 257
    with pytest.raises(common.UserError, match="--overwrite"):
        lora.main(["--merge-only", *flags])


def test_a_bfloat16_base_is_merged_in_bfloat16(train, tmp_path):
    """Every weight is the bfloat16 number nearest to the float64 sum, but for float32's error."""
    folder = train("run", model=TINY)
    flags = ["--model", TINY, "--adapter", str(folder), "--output", str(tmp_path / "m")]
    lora.main(["--merge-only", *flags])
    merged, adapter = load_file(tmp_path / "m" / "model.safetensors"), tensors(folder)
    base = base_model(TINY, dtype="auto").state_dict()
    assert {x.dtype for x in merged.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    changed = 0
    for name, tensor in merged.items():
        A, B = (adapter.get(f"base_model.model.{name[:-6]}lora_{x}.weight") for x in "AB")
        if A is None:
            assert torch.equal(tensor, base[name])
            continue
        exact = base[name].double() + 2 * B.double() @ A.double()
        half_a_step = 2 ** (exact.abs().log2().floor() - 8)  # bfloat16 keeps 8 bits
        assert ((tensor.double() - exact).abs() <= half_a_step + 1e-8).all(), name
        changed += (tensor != base[name]).sum().item()
    assert changed > 10_000


def tensors(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("rslora", [False, True])
def test_training_continues_from_pefts_adapter(
    rslora, peft_adapter, load, train, random_model, capsys
):
    theirs, folder = peft_adapter("theirs", use_rslora=rslora, lora_alpha=12, r=9)
    model, _ = load(random_model, "--adapter", folder, "--rank", 2, "--alpha", 99)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-5)
    assert "has no base fingerprint" in capsys.readouterr().out
    ours = train("run", "--adapter", folder)
    fields = {"r": 9, "target_modules": ["down_proj", "q_proj"]}
    assert config_of(ours).items() >= fields.items() and not config_of(ours).get("use_rslora")
    assert config_of(ours)["lora_alpha"] == pytest.approx(12 * 3 if rslora else 12)
    assert tensors(ours).keys() == tensors(folder).keys()
    moved = [not torch.equal(x, tensors(folder)[name]) for name, x in tensors(ours).items()]
    assert all(moved) and len(moved) == 8
    model, _ = load(random_model, "--adapter", ours)
    torch.testing.assert_close(
        logits(model), logits(from_peft(random_model, ours)), rtol=0, atol=1e-5
    )


def test_training_continues_from_our_adapter(train, capsys):
    first = train("a", "--rank", 5, "--alpha", 7)
    second = train("b", "--adapter", first)
    assert "has no base fingerprint" not in capsys.readouterr().out
    assert (config_of(second)["r"], config_of(second)["lora_alpha"]) == (5, 7)
    losses = [
        [x["eval_loss"] for x in read_metrics(f) if "eval_loss" in x] for f in (first, second)
    ]
    assert losses[1][0] == pytest.approx(losses[0][-1], abs=1e-6) != losses[0][0]


CHANGES = {
    "another kind": ({"peft_type": "IA3"}, "is IA3, not LORA"),
    "biases": ({"bias": "all"}, "bias"),
    "more modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "ranks": ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    "alphas": ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
    "another start": ({"init_lora_weights": "pissa"}, "pissa"),
    "activated": ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "another rank": ({"r": 8}, "does not fit"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_adapters_of_other_kinds_are_refused(name, peft_adapter, train, tmp_path):
    _, folder = peft_adapter("theirs")
    changes, match = CHANGES[name]
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | changes))
    with pytest.raises(common.UserError, match=match) as refused:
        train("run", "--adapter", folder)
    assert f"--adapter {folder}" in str(refused.value) and not (tmp_path / "run").exists()


def test_adapters_with_other_tensors_are_refused(peft_adapter, train, tmp_path):
    """A missing one, one too many, and the head's, which PEFT can adapt."""
    _, folder = peft_adapter("theirs")
    whole, path = tensors(folder), folder / "adapter_model.safetensors"
    prefix = "base_model.model.model.layers.0.self_attn"
    for change in ("missing", "too many"):
        part = dict(whole)
        if change == "missing":
            del part[f"{prefix}.q_proj.lora_B.weight"]
        else:
            part[f"{prefix}.k_proj.lora_B.weight"] = torch.zeros(32, 4)
        save_file(part, path, {"format": "pt"})
        with pytest.raises(common.UserError, match=f"--adapter {folder} does not fit.*layers.0"):
            train("run", "--adapter", folder)
    _, folder = peft_adapter("head", target_modules=["q_proj", "lm_head"])
    with pytest.raises(common.UserError, match=f"--adapter {folder}.*lm_head"):
        train("run", "--adapter", folder)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"{"])
def test_a_folder_that_is_no_adapter_is_refused(content, peft_adapter, train):
    _, folder = peft_adapter("theirs")
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(common.UserError, match=f"^--adapter {folder}"):
        train("run", "--adapter", folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(common.UserError, match=f"^--adapter {folder}"):
        train("run", "--adapter", folder)


def test_an_adapter_of_another_base_is_refused(train, random_model, tmp_path):
    """One of the same shapes, and one that differs in a single embedding row."""
    folder = train("run")
    assert len(config_of(folder)["base_model_name_or_path"]) > 1
    for first, last in ((0, 320), (64, 65)):
        model = base_model(random_model)
        with torch.no_grad():
            model.get_input_embeddings().weight[first:last] += 0.1
        shutil.copytree(random_model, tmp_path / "other", dirs_exist_ok=True)
        model.save_pretrained(tmp_path / "other")
        with pytest.raises(
            common.UserError, match=f"--adapter {folder} was trained on another base"
        ):
            train("again", "--adapter", folder, model=tmp_path / "other")


def test_the_fingerprint_is_the_bases_and_in_the_metadata(train):
    """Not the dtype's in which it computes, and not in the config: PEFT warns of what it does
    not know."""

    def fingerprint(folder):
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            return file.metadata()

    halves = fingerprint(train("halves", "--dtype", "bfloat16", "--max-steps", 0))
    wholes = fingerprint(train("wholes", "--dtype", "float32", "--max-steps", 1))
    other = fingerprint(train("other", "--max-steps", 0, model=TINY))
    assert halves == wholes and halves["format"] == "pt"
    assert halves["base_fingerprint"] != other["base_fingerprint"]


def test_the_config_has_only_keys_that_peft_knows(train, random_model, recwarn):
    folder = train("run")
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert config_of(folder).keys() <= known
    recwarn.clear()
    from_peft(random_model, folder)
    about = [str(x.message) for x in recwarn if "peft" in x.filename or "eyword" in str(x.message)]
    assert about == []
    fields = {
        "task_type": "CAUSAL_LM",
        "peft_type": "LORA",
        "r": 16,
        "lora_alpha": 32,
        "bias": "none",
    }
    assert config_of(folder).items() >= fields.items()
    assert Path(config_of(folder)["base_model_name_or_path"]).samefile(random_model)


TARGETS = {
    "all-linear": 14,
    "q_proj, v_proj": 4,
    "self_attn.q_proj,mlp.down_proj": 4,
    "layers.0.self_attn.q_proj": 1,
    r".*layers\.1\..*_proj": 7,
    r"model\.layers\.\d\.mlp\.(up|down)_proj": 4,
}


@pytest.mark.parametrize("targets", TARGETS)
def test_targets_end_to_end(targets, train, random_model):
    """The layers that we adapt are those that PEFT adapts when it loads the result."""
    folder = train("run", "--targets", targets, "--rank", 2)
    names = {name.rpartition(".lora_")[0] for name in tensors(folder)}
    assert len(names) == TARGETS[targets] and len(tensors(folder)) == 2 * len(names)
    model = from_peft(random_model, folder)
    assert {
        name.rpartition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name
    } == names


@pytest.mark.parametrize("targets", ["no_such", "lm_head", "q_proj,no_such", ".*no_such.*", "proj"])
def test_targets_that_match_no_layer_are_refused(targets, train, tmp_path):
    with pytest.raises(common.UserError, match="--targets: .* matches no linear layer.*q_proj"):
        train("run", "--targets", targets)
    assert not (tmp_path / "run").exists()


def test_merging_needs_a_base_and_an_adapter(train, random_model, tmp_path):
    for flags in ([], ["--model", random_model], ["--adapter", "x"]):
        with pytest.raises(common.UserError, match="--merge-only needs"):
            lora.main(["--merge-only", "--output", str(tmp_path / "m"), *flags])


# -------------------------------------------------------------------------------- whole runs


def test_it_learns_four_rows_by_heart(train, tmp_path):
    """And then answers each of them exactly, up to the end of turn."""
    four = [
        {"prompt": f"What is {c}?", "completion": w}
        for c, w in zip("abcd", ("eins", "zwei", "drei", "四"))
    ]
    data = ["--data", write_rows(tmp_path / "four.jsonl", four), "--batch-size", 4]
    folder = train("run", *data, "--eval-data", 0, "--max-steps", 80, "--samples", 4, model=TINY)
    metrics = read_metrics(folder)
    assert [x["loss"] for x in metrics if "loss" in x][-1] < 0.02
    assert [x["eval_exact_match"] for x in metrics if "eval_exact_match" in x] == [0.0, 1.0]


def test_as_a_newcomer_runs_it(tmp_path):
    """No flags but a smaller budget: what the first run promises is on the screen and the disk."""
    run = run_script("lora.py", "--max-steps", 12, "--samples", 3, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    promised = (
        "parameters train",
        "step 0: held-out loss",
        "step 12: held-out loss",
        "exact_match",
    )
    for text in (
        *promised,
        "--- before training ---",
        "--- after ---",
        "the adapter is in runs/demo/lora",
    ):
        assert text in run.stdout, text
    assert "12/12" in run.stderr and "Warning" not in run.stderr + run.stdout
    folder = tmp_path / "runs" / "demo" / "lora"
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.jsonl",
        "tokenizer.json",
    }
    losses = [x["eval_loss"] for x in read_metrics(folder) if "eval_loss" in x]
    assert losses[-1] < losses[0]
    assert "lora_A" in str(tensors(folder).keys()) and from_peft(TINY, folder)

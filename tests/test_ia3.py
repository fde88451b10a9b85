"""ia3.py against PEFT's (IA)^3, and against the equation in float64."""

import dataclasses
import json

import peft
import pytest
import torch
import transformers
from conftest import TINY, read_metrics, run_script, write_rows
from safetensors.torch import load_file
from test_model import build, own, packed_batch
from torch import nn

import common
import ia3

CPU = torch.device("cpu")
TEXTS = ["".join(chr(97 + i * n % 26) for i in range(4 + n)) for n in range(1, 13)]
# every step has every row, so that their order does not matter
THREE = "--max-steps 3 --batch-size 12 --lr 0.01 --samples 0 --eval-data 0 --dtype float32".split()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A folder with a small random Qwen2, whose keys and values have biases."""
    folder = tmp_path_factory.mktemp("qwen2")
    own("qwen2", vocab_size=320).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def flags(base, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])

    def make(name, *more):
        start = ["--model", base, "--data", data, "--output", str(tmp_path / name)]
        return [*start, *THREE, *map(str, more)]

    return make


def parse(monkeypatch, *flags):
    """The arguments that train() would get."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(ia3, "train", seen.append)
        ia3.main(["--model", "unused", "--data", "unused", *map(str, flags)])
    return seen[0]


def from_transformers(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def from_peft(base, folder):
    return peft.PeftModel.from_pretrained(from_transformers(base), folder).eval()


def ours(base, folder, monkeypatch):
    args = parse(monkeypatch, "--model", base, "--adapter", folder)
    model = common.load_model(args, torch.float32, CPU).eval()
    ia3.add_scales(model, args, CPU)
    return model


@torch.no_grad()
def logits(model):
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(3))
    if hasattr(model, "target_logps"):
        with common.own_attention(model):
            return model(input_ids=ids, use_cache=False).logits
    return model(input_ids=ids).logits


def tensors(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# -------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("scale_inputs", [False, True])
def test_the_layer_and_its_merged_weights_are_the_equation(scale_inputs):
    torch.manual_seed(0)
    layer = ia3.IA3Linear(nn.Linear(6, 5).requires_grad_(False), scale_inputs).double()
    nn.init.uniform_(layer.ia3_l, 0.5, 1.5)
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    scale, z = (p.detach().clone().requires_grad_() for p in (layer.ia3_l, x))
    W, b = layer.base.weight.clone(), layer.base.bias.clone()
    if scale_inputs:
        y = torch.einsum("oi,i,bti->bto", W, scale[0], z) + b
    else:
        y = torch.einsum("o,oi,bti->bto", scale[:, 0], W, z) + scale[:, 0] * b
    torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-14)
    layer(x).sin().sum().backward()
    y.sin().sum().backward()
    torch.testing.assert_close(layer.ia3_l.grad, scale.grad, rtol=0, atol=1e-13)
    torch.testing.assert_close(x.grad, z.grad, rtol=0, atol=1e-13)
    assert layer.base.weight.grad is None and layer.base.bias.grad is None
    torch.testing.assert_close(layer.merged()(x), y, rtol=0, atol=1e-6)  # merged in float32


@pytest.mark.parametrize("scale_inputs", [False, True])
def test_a_bfloat16_layer_is_scaled_in_float32(scale_inputs):
    """In the forward pass and in the merge: a scale of 1.003 is no number of bfloat16."""
    torch.manual_seed(0)
    kind = {"dtype": torch.bfloat16, "bias": False}
    layer = ia3.IA3Linear(nn.Linear(64, 48, **kind).requires_grad_(False), scale_inputs)
    nn.init.constant_(layer.ia3_l, 1.003)
    x, W = torch.randn(7, 64).bfloat16(), layer.base.weight.clone()
    y = layer(x)
    assert y.dtype == torch.bfloat16 and layer.ia3_l.dtype == torch.float32
    if scale_inputs:
        expected = layer.base((1.003 * x.double()).bfloat16())
    else:
        expected = (1.003 * layer.base(x).double()).bfloat16()
    assert torch.equal(y, expected) and not torch.equal(y, layer.base(x))
    assert torch.equal(layer.merged().weight, (1.003 * W.double()).bfloat16())


# -------------------------------------------------------------------------------- the model


NEOX = ["--targets", "query_key_value", "--feedforward-targets", "dense_4h_to_h"]
MODELS = {"llama": [], "qwen2": [], "qwen3": [], "gemma3_text": [], "gpt_neox": NEOX}


@pytest.mark.parametrize("name", MODELS)
def test_the_start_is_the_base_and_only_scales_get_gradients(name, monkeypatch):
    model, batch = build(name), packed_batch([20, 10])
    before = model.target_logps(**batch)
    ia3.add_scales(model, parse(monkeypatch, *MODELS[name]), CPU)
    assert torch.equal(model.target_logps(**batch), before)
    model.target_logps(**batch).sum().backward()
    for key, p in model.named_parameters():
        assert key.endswith("ia3_l") == p.requires_grad == (p.grad is not None), key
        assert p.grad is None or p.grad.any(), key


def test_parameter_count_of_llama_7b(monkeypatch, capsys):
    """32 (4096 + 4096 + 11008)"""
    with torch.device("meta"):
        config = transformers.LlamaConfig(intermediate_size=11008)
        model = transformers.LlamaForCausalLM(config)
    ia3.add_scales(model, parse(monkeypatch), torch.device("meta"))
    assert "614,400 of 6,739,030,016 parameters train" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--targets", "--feedforward-targets"])
@pytest.mark.parametrize("name", ["no_such", "lm_head"])
def test_names_that_match_no_layer_are_refused(flag, name, flags, tmp_path):
    with pytest.raises(common.UserError, match=f"^{flag}: '{name}' matches no.*model has.*k_proj"):
        ia3.main(flags("run", flag, f"k_proj,{name}"))
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------- whole runs


def peft_adapter(base, folder):
    """PEFT's model with scales between 0.5 and 1.5, which is also saved."""
    config = peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    )
    model, generator = peft.get_peft_model(from_transformers(base), config), torch.Generator()
    for name, p in model.named_parameters():
        if "ia3_l" in name:
            nn.init.uniform_(p, 0.5, 1.5, generator=generator.manual_seed(len(name)))
    model.save_pretrained(folder)
    return model


def test_three_steps_from_pefts_adapter_are_pefts(base, flags, tmp_path, monkeypatch):
    """Its logits at the start, the losses of three steps of AdamW, the scales after them, and the
    config. --weight-decay is for matrices: scales do not decay."""
    theirs = peft_adapter(base, tmp_path / "theirs")
    start = ours(base, tmp_path / "theirs", monkeypatch)
    torch.testing.assert_close(logits(start), logits(theirs), rtol=0, atol=1e-5)
    more = ["--adapter", tmp_path / "theirs", "--weight-decay", 0.5, "--micro-batch-tokens", 60]
    ia3.main(flags("run", *more))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    documents = [torch.tensor([*tokenizer(text).input_ids, 257]) for text in TEXTS]
    count, losses = sum(len(ids) - 1 for ids in documents), []
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=0.0)
    for lr in (0.01, 0.01, 0.005):  # one step of warmup, then a cosine
        for ids in documents:
            mean = theirs(input_ids=ids[None], labels=ids[None]).loss
            (mean * (len(ids) - 1) / count).backward()
            losses.append(mean.item() * (len(ids) - 1) / count)
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    found = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert found == pytest.approx([sum(losses[n : n + 12]) for n in (0, 12, 24)], rel=1e-5)
    results, starts = tensors(tmp_path / "run"), tensors(tmp_path / "theirs")
    assert len(results) == len(trained) == 6
    for name, p in trained.items():
        name = name.replace(".default", "")
        torch.testing.assert_close(results[name], p.detach(), rtol=0, atol=1e-5, msg=name)
        assert (results[name] - starts[name]).abs().max() > 0.01, name
    names = ("target_modules", "feedforward_modules")
    mine, other = (
        json.loads((tmp_path / folder / "adapter_config.json").read_text())
        for folder in ("run", "theirs")
    )
    assert [set(mine[name]) for name in names] == [set(other[name]) for name in names]


PLACES = {  # flags -> layers adapted, of them with scaled inputs
    "": (6, 2),
    "--targets layers.0.self_attn.v_proj --feedforward-targets layers.1.mlp.down_proj": (2, 1),
    r"--targets .*\.[kv]_proj --feedforward-targets o_proj,up_proj": (8, 4),
    "--targets all-linear": (14, 2),
}


@pytest.mark.parametrize("places", PLACES)
def test_peft_loads_the_adapter_gives_our_logits_and_merges_alike(
    places, base, flags, tmp_path, monkeypatch, recwarn
):
    ia3.main(flags("run", "--lr", 0.1, *places.split()))
    recwarn.clear()
    theirs = from_peft(base, tmp_path / "run")
    assert not [str(x.message) for x in recwarn if "eyword" in str(x.message)]
    expected = logits(theirs)
    with theirs.disable_adapter():
        assert (logits(theirs) - expected).abs().max() > 0.01
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config.keys() <= {field.name for field in dataclasses.fields(peft.IA3Config)}
    found = tensors(tmp_path / "run")
    assert (len(found), sum(len(x) == 1 for x in found.values())) == PLACES[places]
    layers = [n.replace(".default", "") for n, _ in theirs.named_parameters() if "ia3_l" in n]
    assert set(layers) == found.keys()
    model = ours(base, tmp_path / "run", monkeypatch)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)

    merge = ["--merge-only", "--model", base, "--adapter", str(tmp_path / "run")]
    ia3.main([*merge, "--output", str(tmp_path / "merged")])
    merged = from_transformers(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=2e-5)
    unloaded = theirs.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, unloaded[name], rtol=0, atol=1e-6, msg=name)


def test_training_continues_from_our_adapter(flags, tmp_path):
    ia3.main(flags("a", "--eval-data", 0.2))
    ia3.main(flags("b", "--eval-data", 0.2, "--adapter", tmp_path / "a"))
    a, b = ([e["eval_loss"] for e in read_metrics(tmp_path / x) if "eval_loss" in e] for x in "ab")
    assert b[0] == pytest.approx(a[-1], abs=1e-6) and a[0] > a[-1] > b[-1]


def test_as_a_user_runs_it(tmp_path):
    done = run_script("ia3.py", "--max-steps", 4, "--samples", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the adapter is in" in done.stdout and "--- after ---" in done.stdout
    folder = tmp_path / "runs" / "demo" / "ia3"
    assert sum(x.numel() for x in tensors(folder).values()) == 2_048
    assert from_peft(TINY, folder)

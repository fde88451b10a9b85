"""Families of models: multimodal wrappers, fused experts, layers that are no plain nn.Linear."""

import functools

import peft
import pytest
import torch
import transformers
from conftest import TINY, write_rows
from test_model import CPU, make_args, own
from transformers import AutoModelForImageTextToText

import adapter
import common
import dpo
import full_ft
import lora
import qlora

TEXT = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 512, "initializer_range": 0.2}  # fmt: skip
WRAPPERS = {
    "gemma3": {
        "text_config": TEXT | {"sliding_window": 16, "query_pre_attn_scalar": 16},
        "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                          "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4, "image_token_index": 300,
    },
    "qwen2_5_vl": {
        "text_config": TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                   "mrope_section": [2, 3, 3]}},
        "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
                          "out_hidden_size": 64, "fullatt_block_indexes": [0]},
    },
}  # fmt: skip
IDS = torch.arange(3, 50)[None] * 7 % 250


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.fixture(scope="module", params=WRAPPERS)
def wrapper(request, tmp_path_factory):
    """A folder with a small random multimodal model and the bundled tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(request.param, **WRAPPERS[request.param])
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture
def train(wrapper, tmp_path, monkeypatch):
    """script, flags -> (its trained model, the saved folder)"""

    def run(script, *flags):
        prompts = [{"prompt": f"Say {n}", "chosen": f"{n}!", "rejected": "no"} for n in range(8)]
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in prompts]
        data = write_rows(tmp_path / "rows.jsonl", prompts if script is dpo else rows)
        models, output = [], tmp_path / script.__name__

        def keep(save, args, model, *rest):
            models.append(model)
            save(args, model, *rest)

        for name in ("save_adapter", "save_model"):
            monkeypatch.setattr(common, name, functools.partial(keep, getattr(common, name)))
        settings = {"model": wrapper, "data": data, "output": output, "max-steps": 2, "lr": 1e-2}
        settings |= {"batch-size": 4, "samples": 1}
        argv = [str(x) for key, value in settings.items() for x in (f"--{key}", value)]
        script.main([*argv, *flags])
        (model,) = models
        return model, output

    return run


@pytest.mark.parametrize("script, flags", [
    (full_ft, []), (full_ft, ["--no-packing", "--gradient-checkpointing"]), (dpo, []),
    (full_ft, ["--offload"]),
])  # fmt: skip
def test_the_language_part_trains_alone(train, wrapper, script, flags):
    model, folder = train(script, *flags)
    before = AutoModelForImageTextToText.from_pretrained(wrapper).state_dict()
    saved, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, x in saved.state_dict().items():
        text = "language_model" in name or "lm_head" in name
        assert torch.equal(x, before[name]) != text, name
    if "--offload" not in flags:
        with common.own_attention(model):
            torch.testing.assert_close(logits(saved), logits(model), rtol=0, atol=2e-5)
    assert (folder / "preprocessor_config.json").exists()


def test_houlsby_adapters_are_in_the_language_part(train):
    model, _ = train(adapter)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("language_model" in name for name in trained)


@pytest.mark.parametrize("script", [lora, qlora])
def test_an_adapter_of_the_language_part_is_pefts(train, wrapper, script, tmp_path):
    model, folder = train(script)
    base = AutoModelForImageTextToText.from_pretrained(wrapper)
    if script is qlora:  # the base as it is in 4 bits
        for name, layer in qlora.quantized_layers(model).items():
            base.get_submodule(name).weight.data = qlora.dequantized(layer)
    theirs = peft.PeftModel.from_pretrained(base, folder)
    names = [n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(names) == 14 and all("language_model" in name for name in names)
    with common.own_attention(model):
        torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-4)
    merged = ["--merge-only", "--model", wrapper, "--adapter", folder, "--output", tmp_path / "m"]
    script.main([str(x) for x in merged])
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "m", dtype=torch.float32)
    found, expected = logits(saved), logits(theirs)
    largest = 1e-4 if script is lora else 0.1 * expected.std()  # merged in bfloat16
    assert (found - expected).abs().max() < largest
    before = AutoModelForImageTextToText.from_pretrained(wrapper).state_dict()
    for name, x in saved.state_dict().items():
        if "language_model" not in name and "lm_head" not in name:
            dtype = torch.float32 if script is lora else torch.bfloat16
            assert torch.equal(x, before[name].to(dtype).float()), name


def test_targets_outside_the_language_part_are_refused(wrapper):
    model = common.load_model(make_args("--model", str(wrapper)), torch.float32, CPU)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    inside = {name for name in linear if "language_model" in name}
    assert set(common.find_targets(model, "all-linear")) == inside != linear - {"lm_head"}
    assert len(common.blocks(model)) == 2  # for --gradient-checkpointing and adapter.py
    with pytest.raises(common.UserError, match="matches no linear layer"):
        common.find_targets(model, ".*vis.*")
    with pytest.raises(common.UserError, match="--train vis"):
        full_ft.freeze_others(model, "vis", torch.float32, sharded=False)


def test_peft_adapts_no_other_module_of_the_same_name(tmp_path):
    """Gemma 4's vision tower wraps linear layers in modules named q_proj, which PEFT refuses."""
    text = TEXT | {"vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 16}
    vision = WRAPPERS["gemma3"]["vision_config"]
    config = transformers.AutoConfig.for_model("gemma4", text_config=text, vision_config=vision)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    args = make_args("--model", str(tmp_path))
    model = common.load_model(args, torch.float32, CPU)
    fields = common.add_adapter(model, args, lora.LoRALinear, CPU)
    settings = peft.LoraConfig(r=16, target_modules=fields["target_modules"])
    base = AutoModelForImageTextToText.from_pretrained(tmp_path)
    theirs = peft.get_peft_model(base, settings).base_model.model.named_parameters()
    theirs = {name.replace(".default", "") for name, p in theirs if p.requires_grad}
    assert theirs == {name for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------- layers of other kinds

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FUSED = {"experts.gate_up_proj", "experts.down_proj"}
# name -> (its sizes, flags, what no adapter reaches)
KINDS = {
    "llama": ({}, [], set()),
    "phi3": ({}, [], set()),  # fused, but linear
    "gemma2": ({"sliding_window": 8}, ["--no-packing"], set()),
    "gpt_oss": (EXPERTS, ["--no-packing"], FUSED | {"router.weight", "experts.gate_up_proj_bias",
                                                    "experts.down_proj_bias"}),
    "qwen3_moe": ({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, [],
                  FUSED | {"gate.weight"}),
    "phimoe": (EXPERTS, [], FUSED | {"router.weight"}),  # a router that is a kind of nn.Linear
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_what_an_adapter_reaches_and_what_not(name, tmp_path, capsys):
    """The rest is named and counted; PEFT adapts the same layers and gives the same logits."""
    sizes, flags, unreached = KINDS[name]
    theirs = own(name, **sizes)
    theirs.save_pretrained(tmp_path / "base")
    args = make_args("--model", str(tmp_path / "base"), "--output", str(tmp_path / "out"), *flags)
    model = common.load_model(args, torch.float32, CPU)
    config = common.add_adapter(model, args, lora.LoRALinear, CPU)
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("no adapter reaches")]
    matrices = {n: p for n, p in theirs.named_parameters() if p.dim() > 1}
    left = {n: p for n, p in matrices.items() if ".".join(n.split(".")[-2:]) in unreached}
    assert len(said) == bool(unreached)
    if unreached:
        names, rest = said[0].removeprefix("no adapter reaches ").split(": ")
        assert set(names.split(", ")) == unreached
        assert int(rest.split()[0].replace(",", "")) == sum(p.numel() for p in left.values())
    adapted = {n for n, p in model.named_parameters() if p.requires_grad}
    adapted = {n.replace(".lora_A", "") for n in adapted if "lora_A" in n}
    tables = {n for n in matrices if "embed" in n or "lm_head" in n}
    assert adapted == matrices.keys() - left.keys() - tables
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    common.save_adapter(args, model, tokenizer, config)
    ids = IDS % 160
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "out").eval()
    with torch.no_grad(), common.own_attention(model.eval()):
        found, base = loaded(input_ids=ids).logits, loaded.unload()(input_ids=ids).logits
        torch.testing.assert_close(found, model(input_ids=ids).logits, rtol=0, atol=1e-4)
    assert (found - base).abs().max() > 0.1

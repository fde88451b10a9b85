"""What other programs find in the folders that the scripts write: transformers 4, which many
servers have, and transformers 5 read the same model and the same tokenizer."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import TINY, write_rows

import common
import full_ft
import lora

SIZES = dict(
    vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    pad_token_id=258, bos_token_id=None, eos_token_id=257, initializer_range=0.2,
)  # fmt: skip
YARN_LIKE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 = {"rope_type": "llama3", "original_max_position_embeddings": 64, **YARN_LIKE}
LONG = {"short_factor": [1.1] * 8, "long_factor": [2.0] * 8}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
GEMMA |= {"layer_types": ["sliding_attention", "full_attention"]}
LOCAL = {"rope_type": "default", "rope_theta": 7e3}
CASES = {  # model type: (settings of transformers 5, what transformers 4 reads)
    "mistral": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
        {"rope_theta": 5e4},
    ),
    "llama": (
        {"rope_parameters": LLAMA_3 | {"rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA_3},
    ),
    "phi3": (
        {
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 2e4, **LONG},
            "original_max_position_embeddings": 128,
        },
        {
            "rope_theta": 2e4,
            "rope_scaling": {"type": "longrope", **LONG},
            "original_max_position_embeddings": 128,
            "partial_rotary_factor": 1.0,
        },
    ),
    "gemma3_text": (
        GEMMA
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": LOCAL,
            }
        },
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 7e3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
}
READ = """
import os, sys, torch, transformers
for folder in sys.argv[1:]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "two  words"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    special = tokenizer.eos_token, tokenizer.pad_token, sorted(tokenizer.all_special_tokens)
    found = {"text": text, "ids": ids, "special": special}
    found["decoded"] = tokenizer.decode(ids, skip_special_tokens=True)
    if os.path.exists(f"{folder}/config.json"):  # not an adapter's
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found["logits"] = model(torch.arange(200)[None] * 7 % 250).logits.detach()
        found["eos"] = model.generation_config.eos_token_id
    torch.save(found, f"{folder}/{transformers.__version__[0]}.pt")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """-> {name: folder} of adapters, merged and full models; the bases are written beside them"""
    root, found = tmp_path_factory.mktemp("folders"), {}
    rows = write_rows(root / "rows.jsonl", [{"prompt": "abc", "completion": "de"}] * 3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    for kind, (settings, _) in CASES.items():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **SIZES, **settings)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
        shared = ["--model", str(root / kind), "--output"]
        flags = ["--data", rows, "--max-steps", "1", "--samples", "0", "--eval-data", "0"]
        names = [str(root / f"{kind} {name}") for name in ("lora", "merged", "full")]
        lora.main([*shared, names[0], *flags])
        lora.main([*shared, names[1], "--merge-only", "--adapter", names[0]])
        full_ft.main([*shared, names[2], *flags])
        found |= {name.rpartition("/")[2]: name for name in names}
    return found


@pytest.mark.parametrize("kind", CASES)
def test_rotary_settings_have_both_their_names(kind, folders):
    for name in ("merged", "full"):
        with open(f"{folders[f'{kind} {name}']}/config.json", encoding="utf-8") as file:
            config = json.load(file)
        assert {key: config[key] for key in CASES[kind][1]} == CASES[kind][1]
        base = transformers.AutoConfig.from_pretrained(folders[f"{kind} full"][: -len(" full")])
        again = transformers.AutoConfig.from_pretrained(folders[f"{kind} {name}"])
        drop = dict.fromkeys(("type", "original_max_position_embeddings"))
        one, other = ({**x.rope_parameters, **drop} for x in (base, again))
        assert one == other


def test_the_tokenizer_is_of_a_class_that_both_know(folders):
    for folder in folders.values():
        with open(f"{folder}/tokenizer_config.json", encoding="utf-8") as file:
            config = json.load(file)
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert config["additional_special_tokens"] == ["<|im_start|>"]
        assert "extra_special_tokens" not in config
        again = transformers.AutoTokenizer.from_pretrained(folder)
        assert again.extra_special_tokens == ["<|im_start|>"]


@pytest.mark.slow
def test_transformers_4_gives_the_same_logits_and_tokens(folders):
    """$TRANSFORMERS4: the Python of an environment with transformers 4."""
    other = os.environ.get("TRANSFORMERS4") or pytest.skip("needs $TRANSFORMERS4")
    for python in (sys.executable, other):
        subprocess.run([python, "-c", READ, *folders.values()], check=True, timeout=300)
    for name, folder in folders.items():
        five, four = (torch.load(f"{folder}/{n}.pt") for n in (5, 4))
        assert ("logits" in four) == ("lora" not in name)
        for key in five:
            same = torch.equal if key == "logits" else lambda a, b: a == b
            assert same(five[key], four[key]), (name, key)


def test_sections_of_a_multimodal_models_positions(tmp_path):
    """Qwen2.5-VL: a rotary embedding of the default kind that has more settings than theta."""
    sections = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    config = {"text_config": {"rope_parameters": {"rope_theta": 1e6, **sections}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    common.add_old_names(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert found["rope_theta"] == 1e6 and found["rope_scaling"] == sections
    assert found["rope_parameters"] == config["text_config"]["rope_parameters"]


@pytest.mark.parametrize("kind", ["gemma4_text", "gemma3_text", "lfm2", "olmo3", "gpt_oss"])
def test_the_folder_still_is_transformers_5s(kind, tmp_path):
    """Also with rotary settings for every kind of layer: Gemma 4, which transformers 4 lacks."""
    config = transformers.AutoConfig.for_model(kind)
    config.save_pretrained(tmp_path)
    before = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    common.add_old_names(tmp_path)
    after = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    assert after["rope_parameters"] == before["rope_parameters"]

"""tests/benchmark.py runs and prints its tables; what the figures are worth depends on the machine."""

import argparse
import re
import subprocess
import sys

import benchmark
import gpu
import pytest
import torch
import transformers
from conftest import ROOT


def table(*flags) -> list[list[str]]:
    """The cells of the printed rows, without the head."""
    command = [sys.executable, str(ROOT / "tests" / "benchmark.py"), "--shape", "tiny", "--steps", "4", *flags]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[2:]]


@pytest.mark.slow
def test_repeated_runs_of_both_sides_give_positive_figures():
    (row,) = table("--methods", "reward", "--lora", "--repeats", "2")
    assert row[0] == "reward" and all(float(cell.replace(",", "").split()[0]) > 0 for cell in row[1:4])


@pytest.mark.slow
def test_packing_against_padding():
    (row,) = table("--against", "padding", "--repeats", "1")
    assert row[0] == "lora" and float(row[5]) > float(row[4])  # padding takes memory
    assert float(row[3].split()[0]) > 2  # and time


@pytest.mark.slow
def test_4_bits_against_4_bits():
    (row,) = table("--methods", "qlora", "--repeats", "1")
    assert row[0] == "qlora" and float(row[3].split()[0]) > 0


@pytest.mark.slow
def test_ppo_has_rates_of_its_own():
    rows = table("--methods", "ppo", "--lora", "--repeats", "1")
    assert [row[0] for row in rows] == ["ppo", "rollout_tokens_per_second", "update_tokens_per_second"]
    assert all(float(row[1].replace(",", "")) > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("part, rows", [("memory", 9), ("speed", 8), ("checks", 2)])
def test_the_parts_for_a_gpu_have_been_rehearsed(part, rows):
    command = [sys.executable, str(ROOT / "tests" / "gpu.py"), part, "--shape", "tiny"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout
    cells = [line for line in out.splitlines() if line.startswith("|")][2:]
    assert len(cells) == rows and not [line for line in cells if "failed" in line or "no time" in line or "not done" in line or "nan" in line]


def test_one_block_stands_for_all_of_a_large_model(tmp_path, monkeypatch):
    """Random weights of a 65B: its blocks share theirs, and the model computes what one with 3 such blocks would."""
    for auto_class in (transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification, transformers.LlamaForCausalLM):
        monkeypatch.setattr(auto_class, "from_pretrained", auto_class.from_pretrained)
    monkeypatch.setitem(benchmark.SHAPES, "65b", (64, 96, 3, 4, 2, 512))
    benchmark.make_work(tmp_path, argparse.Namespace(shape="65b", layers=None, document=64, length=128, rows=1, steps=2, against="nothing"))
    benchmark.random_weights(str(tmp_path), torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert len({block.mlp.up_proj.weight.data_ptr() for block in model.model.layers}) == 1
    whole = transformers.LlamaForCausalLM(model.config).eval()
    whole.load_state_dict(model.state_dict())
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_operations_a_token_of_a_7b():
    """4 for each of Llama-2-7B's 6.607 billion weights in products; attention over 512 tokens: forward 2 products of d * 512 / 2
    multiplications and additions in each layer, backward twice that."""
    assert gpu.lora_flops("7b", 0) == 4 * 6_607_077_376
    assert gpu.lora_flops("7b", 512) - gpu.lora_flops("7b", 0) == 3 * 32 * 2 * (2 * 4096 * 512 / 2)


@pytest.mark.slow
def test_the_shares_of_a_step_add_up():
    (row,) = table("--profile")
    assert all(re.fullmatch(r"[\d.]+%", cell) for cell in row[2:]) and abs(sum(float(cell[:-1]) for cell in row[2:]) - 100) < 0.5

"""On a real chat model: `SMOLLM2=FOLDER pytest -m slow tests/test_real_model.py`, some minutes."""

import os

import peft
import pytest
import torch
import transformers
from conftest import ROOT, read_metrics

import full_ft
import lora

BASE = os.environ.get("SMOLLM2")
NO_MODEL = pytest.mark.skipif(not BASE, reason="$SMOLLM2 names no model folder")
pytestmark = [pytest.mark.slow, NO_MODEL]
SHORT = "--batch-size 4 --max-length 256 --samples 1 --max-steps 16 --data".split()
SHORT += [str(ROOT / "examples" / "instructions.jsonl")]


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def check_loss(folder, text: str) -> None:
    """It falls, and the run shows answers before and after."""
    before, after = (line["eval_loss"] for line in read_metrics(folder) if "eval_loss" in line)
    assert after < 0.95 * before
    assert "--- before training ---" in text and "--- after ---" in text


def test_lora_learns_and_the_merged_weights_are_those_of_peft(tmp_path, capsys):
    """Merged in float32, and rounded once to the bfloat16 of the base."""
    adapter, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    lora.main(["--model", BASE, "--output", adapter, "--lr", "5e-4", *SHORT])
    check_loss(adapter, capsys.readouterr().out)
    lora.main(["--merge-only", "--model", BASE, "--adapter", adapter, "--output", merged])
    theirs = peft.PeftModel.from_pretrained(load(BASE), adapter).merge_and_unload()
    theirs, ours, base = theirs.state_dict(), load(merged).state_dict(), load(BASE).state_dict()
    assert theirs.keys() == ours.keys()
    changed = 0
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight.bfloat16().float(), rtol=0, atol=0)
        changed += not torch.equal(ours[name], base[name])
    assert changed == 7 * 30


def test_full_fine_tuning_learns_and_the_result_loads(tmp_path, capsys):
    full_ft.main(["--model", BASE, "--output", str(tmp_path), "--lr", "2e-5", *SHORT])
    check_loss(tmp_path, capsys.readouterr().out)
    assert load(tmp_path).num_parameters() == 134_515_008

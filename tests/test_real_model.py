"""On a real pretrained chat model: `SMOLLM2=FOLDER pytest -m slow tests/test_real_model.py`, some ten minutes on two cores."""

import os

import pytest
import torch
import transformers
from conftest import read_metrics

import full_ft
import lora
from test_lora import from_peft

pytestmark = [pytest.mark.slow, pytest.mark.skipif("SMOLLM2" not in os.environ, reason="$SMOLLM2 names no model folder")]
SHORT = ["--batch-size", "2", "--max-length", "256", "--log-every", "4", "--samples", "1", "--max-steps", "16"]


def losses(folder):
    return [entry["eval_loss"] for entry in read_metrics(folder) if "eval_loss" in entry and "done" not in entry]


@pytest.mark.parametrize("script, more", [(lora, ["--merge"]), (full_ft, ["--lr", "2e-5"])])
def test_held_out_loss_falls_and_the_result_loads(script, more, tmp_path, capsys):
    base = os.environ["SMOLLM2"]
    script.main(["--model", base, "--output", str(tmp_path), *SHORT, *more])
    before, after = losses(tmp_path)
    assert after < 0.95 * before
    assert "--- before ---" in capsys.readouterr().out
    if script is lora:
        ids = torch.randint(1000, 2000, (1, 32))
        plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(from_peft(tmp_path, plain)(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=0, atol=1e-3)
    else:
        assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == 134_515_008

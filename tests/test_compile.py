"""--compile: the same losses and gradients, from a few graphs for every packing."""

import importlib

import pytest
import torch
from conftest import ROOT, read_metrics


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("script, flags", [
    ("lora", []), ("dpo", ["--lora-rank", "4"]), pytest.param("lora", ["--gradient-checkpointing"], marks=pytest.mark.slow),
    pytest.param("full_ft", ["--offload"], marks=pytest.mark.slow),
])  # fmt: skip
def test_compiled_blocks_train_the_same(script, flags, backend, tmp_path, monkeypatch):
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled(self, **options, backend=backend))
    data = str(ROOT / "examples" / ("pairs.jsonl" if script == "dpo" else "format.jsonl"))
    short = ["--data", data, "--batch-size", "1", "--max-length", "400", "--max-steps", "4", "--eval-fraction", "0", "--samples", "0"]
    short += ["--log-every", "1", "--lr", "1e-3", "--warmup-ratio", "0", *flags]
    counters, steps = torch._dynamo.utils.counters, []
    for name in ("plain", "compiled"):
        torch._dynamo.reset()
        counters.clear()
        importlib.import_module(script).main([*short, "--output", str(tmp_path / name), *["--compile"] * (name == "compiled")])
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        steps.append([(line["loss"], line["grad_norm"]) for line in read_metrics(tmp_path / name) if "loss" in line])
        assert (counters["stats"]["unique_graphs"] > 0) == (name == "compiled")
    assert torch.tensor(steps[1]).allclose(torch.tensor(steps[0]), rtol=1e-5)
    # a norm and an MLP, the first norm again if its input needs no gradient; in DPO both again for the pass without the adapter
    assert counters["stats"]["unique_graphs"] <= 5 and not counters["graph_break"]


def test_dora_has_no_such_flag(capsys):
    import common
    import dora

    with pytest.raises(common.UserError, match="--compile"):
        dora.main(["--compile"])

"""Every script that uses common_before.py under torchrun: two processes (gloo) train what one process trains on the same rows, to 1e-6."""

import json
import subprocess
import sys

import pytest
import torch
from before import RANDOM, ROOT, read_metrics, write_rows
from safetensors.torch import load_file

import dpo

ROWS = [{"prompt": c, "completion": c * n} for c in "abcd" for n in (1, 5, 9)]
PAIRS = [{"prompt": f"Say {c}.", "chosen": c * n, "rejected": "no " * n + c} for n in (1, 2, 5) for c in "abcd"]
# small rates: Adam turns float32 noise in gradients near zero into steps of the size of the rate
RUNS = [
    ("prefix_tuning", ["--lr", "1e-5"]), ("prompt_tuning", ["--lr", "1e-4"]),
    ("dpo", ["--lr", "1e-5"]), ("dpo", ["--lr", "1e-4", "--lora-rank", "4"]), ("dpo", ["--lr", "1e-4", "--lora-rank", "4", "--shard"]),
    ("dpo", ["--lr", "1e-4", "--adapter", "START", "--shard"]), ("orpo", ["--lr", "1e-5"]),
]  # fmt: skip
IDS = [" ".join([name, *(flag for flag in more if flag.startswith("--") and flag != "--lr")]) for name, more in RUNS]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """All runs under one torchrun, since starting it is what takes the time."""
    folder = tmp_path_factory.mktemp("two_ranks")
    rows, pairs = write_rows(folder / "rows.jsonl", ROWS), write_rows(folder / "pairs.jsonl", PAIRS)

    dpo.main([*RANDOM, "--data", pairs, "--output", str(folder / "start"), "--max-steps", "2", "--samples", "0", "--lora-rank", "4", "--lr", "0.01"])

    def flags(n, name, more, ranks):
        more = [str(folder / "start") if flag == "START" else flag for flag in more]
        data = pairs if name in ("dpo", "orpo", "reward_model") else rows
        return [*RANDOM, "--data", data, "--output", str(folder / f"{n}-{ranks}"), "--max-steps", "2", "--samples", "0", "--log-every", "1",
                "--batch-size", "3", "--grad-accum", str(2 // ranks), "--eval-fraction", "0.2", *more]  # fmt: skip

    runs = [(name, flags(n, name, more, 2)) for n, (name, more) in enumerate(RUNS)]
    (folder / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "tests" / "before" / "two_ranks_before.py")]
    run = subprocess.run([*command, str(folder / "runs.json")], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-4000:]
    return folder, flags


@pytest.mark.parametrize("n", range(len(RUNS)), ids=IDS)
def test_two_ranks_train_what_one_process_trains(n, two):
    folder, flags = two
    name, more = RUNS[n]
    __import__(name).main(flags(n, name, [flag for flag in more if flag != "--shard"], 1))
    one, other = (folder / f"{n}-{ranks}" for ranks in (1, 2))
    (path,) = (path for path in one.glob("*.safetensors") if path.stem in ("model", "adapter_model"))
    whole, parts = load_file(path), load_file(other / path.name)
    assert whole.keys() == parts.keys()
    for key in whole:
        torch.testing.assert_close(whole[key], parts[key], rtol=0, atol=1e-6)
    for a, b in zip(read_metrics(one)[1:-1], read_metrics(other)[1:-1], strict=True):
        for key in a.keys() & {"loss", "eval_loss", "grad_norm", "lr", "tokens", "step", "epoch", "accuracy", "margin"}:
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-7), key

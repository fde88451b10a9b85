"""Two launchers that find each other over the network, as on two machines: each has its own copy
of the code and its own cache of tokenised rows; --output, model and data are shared."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, write_rows
from test_two_ranks import FULL, LORA, ROWS, assert_same_run
from two_ranks import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on a CPU"),
]

RUNS = {
    "lora": ("lora", LORA),
    "full_ft": ("full_ft", FULL),
    "dpo": ("dpo", [*FULL, "--data", "PAIRS", "--epochs", "1"]),
}


def launch(folder, runs: list) -> list[tuple[int, str]]:
    """-> (exit code, stderr) of the two launchers, each of which runs all of the runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "runs.json").write_text(json.dumps(runs))
    launchers = []
    for n in (1, 2):
        machine = folder / f"machine-{n}"
        for path in [*ROOT.glob("*.py"), ROOT / "tests" / "two_ranks.py"]:
            copy = machine / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        command += ["--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test"]
        command += ["--rdzv-endpoint", f"127.0.0.1:{port}", str(machine / "tests/two_ranks.py")]
        env = os.environ | {"HF_DATASETS_CACHE": str(machine / "cache")}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
        launchers.append(subprocess.Popen([*command, str(folder / "runs.json")], **options))
    return [(each.communicate(timeout=300)[1], each.returncode)[::-1] for each in launchers]


@pytest.fixture(scope="module")
def two(tmp_path_factory, random_model):
    """-> (folder, a function that gives a run's flags, the launchers' ends)"""
    folder = tmp_path_factory.mktemp("two_machines")
    data = write_rows(folder / "data.jsonl", ROWS)
    pairs = [{"prompt": x["prompt"], "chosen": x["completion"], "rejected": "no"} for x in ROWS]
    pairs = write_rows(folder / "pairs.jsonl", pairs)

    def flags(output: str, more: list[str]) -> list[str]:
        shared = ["--model", random_model, "--data", data, "--output", str(folder / output)]
        shared += ["--eval-data", "0.2", "--samples", "0", "--max-steps", "4", "--batch-size", "5"]
        shared += ["--micro-batch-tokens", "70", "--eval-every", "2", "--save-every", "2"]
        return shared + [pairs if flag == "PAIRS" else flag for flag in more]

    runs = [(script, flags(f"{name}, two", more)) for name, (script, more) in RUNS.items()]
    runs.append(("lora", flags("lora, stopped", LORA), 2))
    runs.append(("full_ft", flags("full_ft, killed", FULL), 3, True))
    ends = [launch(folder, runs)]
    runs = [("lora", flags("lora, stopped", [*LORA, "--resume"]))]
    runs.append(("full_ft", flags("full_ft, killed", [*FULL, "--resume"])))
    ends.append(launch(folder, runs))
    return folder, flags, ends


@pytest.mark.parametrize("name", RUNS)
def test_two_machines_train_what_one_process_trains(name, two):
    folder, flags, _ = two
    script, more = RUNS[name]
    run(script, flags(f"{name}, one", more))
    assert_same_run(folder / f"{name}, one", folder / f"{name}, two")


@pytest.mark.parametrize("name", ["lora, stopped", "full_ft, killed"])
def test_both_resume_after_one_was_stopped_or_killed(name, two):
    folder, flags, ends = two
    script = name.split(",")[0]
    run(script, flags(f"{name}, one", dict(RUNS)[script][1]))
    assert_same_run(folder / f"{name}, one", folder / name, first=3)
    killed, resumed = ([code for code, _ in end] for end in ends)
    assert -9 in killed and 0 not in killed and resumed == [0, 0], ends


def test_a_cache_that_is_not_shared_is_filled_on_each_machine(two):
    folder, _, _ = two
    found = [len(list(folder.glob(f"machine-{n}/cache/**/*.arrow"))) for n in (1, 2)]
    assert found[0] == found[1] > 0

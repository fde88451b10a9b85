"""What the tests share: the repository on the path, no network, a cache of their own, and small runs of the scripts."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# One thread each: tiny models gain nothing from more, and processes that wait for each other's threads lose minutes.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import pytest  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402

# Tests train the random model, with a script's usual settings; its demonstration is what `--model` missing would mean.
RANDOM = ["--model", "random"]
parse_args = common.Parser.parse_args
common.Parser.parse_args = lambda self, args: parse_args(self, [*args, *RANDOM * ("--model" not in args)])


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: needs minutes or a real model in $SMOLLM2; run with `pytest -m slow`")
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU; skipped without one")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tokenised rows go to a temporary cache, so that no test sees what another run left."""
    import datasets

    folder = tmp_path_factory.mktemp("cache")
    datasets.config.HF_DATASETS_CACHE = folder
    os.environ["HF_DATASETS_CACHE"] = str(folder)


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    """--offload makes one in the test's own process."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_script(script: str, *args, env: dict | None = None, **options) -> subprocess.CompletedProcess:
    """A script as a user runs it: its own process, its output captured."""
    command = [sys.executable, str(ROOT / script), *map(str, args), *RANDOM * ("--model" not in args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | (env or {}), **options)


def read_metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)

"""What the tests share: no network, a cache of their own, and small runs of the scripts."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
# One thread each: tiny models gain nothing from more, and waiting threads cost minutes.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

TINY = str(ROOT / "examples" / "tiny")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes, or needs a real model in $SMOLLM2")
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


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> str:
    """A folder with a small random Llama (grouped-query attention, a tied head, float32) and the
    bundled tokenizer, a token a byte. Its loss begins at about ln 320."""
    folder = tmp_path_factory.mktemp("random_model")
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return str(folder)


def run_script(script: str, *args, env: dict | None = None, **options):
    """A script as a user runs it: its own process, its output captured."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    settings = {"capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, env=os.environ | (env or {}), **settings | options)


def read_metrics(folder) -> list[dict]:
    text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def write_rows(path: Path, rows: list[dict]) -> str:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)

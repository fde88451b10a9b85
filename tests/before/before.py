"""What the tests of the scripts that use common_before.py share; frozen with them."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
# One thread each: tiny models gain nothing from more, and processes that wait for each other's threads lose minutes.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import peft  # noqa: E402
import transformers  # noqa: E402

import common_before as common  # noqa: E402

# Tests train the random model, with a script's usual settings; its demonstration is what `--model` missing would mean.
RANDOM = ["--model", "random"]
parse_args = common.Parser.parse_args
common.Parser.parse_args = lambda self, args: parse_args(self, [*args, *RANDOM * ("--model" not in args)])

ROWS = [{"prompt": f"Repeat {c} {n} times.", "completion": c * n} for n in range(1, 9) for c in "abcdefg"]
TWELVE = ["--max-steps", "12", "--batch-size", "1", "--max-length", "128", "--samples", "0", "--lr", "0.01", "--log-every", "2",
          "--save-every", "5", "--eval-every", "4"]  # fmt: skip
LLAMA_7B = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)


def run_script(script: str, *args, env: dict | None = None, **options) -> subprocess.CompletedProcess:
    """A script as a user runs it: its own process, its output captured."""
    command = [sys.executable, str(ROOT / script), *map(str, args), *RANDOM * ("--model" not in args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | (env or {}), **options)


def read_metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def flags(tmp_path, name, *more):
    return ["--data", write_rows(tmp_path / "rows.jsonl", ROWS), "--output", str(tmp_path / name), *TWELVE, *more]


def without_times(entries):
    drop = {"tokens_per_second", "peak_memory_gib", "seconds"}
    return [{key: value for key, value in entry.items() if key not in drop} for entry in entries[1:]]


class Killed(BaseException):
    pass


def kill_after(monkeypatch, step):
    """As SIGKILL would between two steps: nothing after this step is logged or saved."""
    original = common.Run.end_step

    def end_step(self, *args):
        if self.step == step:
            raise Killed
        original(self, *args)

    monkeypatch.setattr(common.Run, "end_step", end_step)


def from_peft(folder, base=None):
    return peft.PeftModel.from_pretrained(base or transformers.AutoModelForCausalLM.from_pretrained(folder / "base"), folder).eval()


def damage(folder, **changes):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))

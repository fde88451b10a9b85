"""The same model, data and steps for every method: prints a table, and with --write puts it into README.md.

    python tests/compare_methods.py --model FOLDER --data FILE [--write]

Each row is one run of a script in its own process with the method's own defaults, read from the metrics.jsonl and the files that
the run left. Rows are not packed, since prefix and prompt tuning cannot be: every method sees the same documents in every step.
"""

import argparse
import datetime
import json
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
METHODS = ["lora.py", "dora.py", "qlora.py", "adapter.py", "adapter.py --pfeiffer", "prefix_tuning.py", "prompt_tuning.py", "full_ft.py"]
BUDGET = "--eval-fraction 0.002 --max-length 384 --no-packing --batch-size 3 --log-every 4 --eval-every 1000 --samples 0"


def size(folder: Path) -> str:
    files = [file for pattern in ("adapter_model.safetensors", "model.safetensors") for file in folder.glob(pattern)]
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB"


def measure(method: str, model: str, data: str, steps: int, output: Path) -> list[str]:
    """Run one method; -> the cells of its row."""
    budget = f"{BUDGET} --max-steps {steps}"
    command = [sys.executable, str(ROOT / method.split()[0]), *method.split()[1:], "--model", model, "--data", data, *budget.split()]
    subprocess.run([*command, "--output", str(output)], check=True)
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [entry["eval_loss"] for entry in entries if "eval_loss" in entry and "done" not in entry]
    logged = [entry for entry in entries if "loss" in entry]
    speed = sorted(entry["tokens_per_second"] for entry in logged[1:])[len(logged[1:]) // 2]
    trained = entries[0]["run"]["trainable_parameters"]
    peak = max(entry["peak_memory_gib"] for entry in logged)
    return [f"`python {method} $G`", f"{trained:,}", size(output), f"{peak:.2f} GiB", f"{speed:,.0f}", f"{losses[0]:.3f}", f"{losses[-1]:.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--output", default="runs/compare")
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    names = f"--model {Path(args.model).name} --data {Path(args.data).name}"
    command = shlex.join(["python", "tests/compare_methods.py", *names.split(), "--steps", str(args.steps)])
    lines = [
        f"`{command}`, {device}, torch {torch.__version__}, {datetime.date.today()}. `$G` is `{names} {BUDGET} --max-steps {args.steps}`.",
        "",
        "| command | trained parameters | checkpoint | peak memory | tokens/s | held-out loss before | after |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in args.methods:
        cells = measure(method, args.model, args.data, args.steps, Path(args.output) / re.sub(r"\W+", "-", method))
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    print("\n".join(lines))
    if args.write:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        table = "<!-- methods -->\n" + "\n".join(lines) + "\n<!-- end -->"
        (ROOT / "README.md").write_text(re.sub("<!-- methods -->.*?<!-- end -->", lambda _: table, readme, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()

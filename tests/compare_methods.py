"""Tables for tests/RESULTS.md. All methods in a table use the same model, data and number of steps.

    # every script without flags, three seeds
    python tests/compare_methods.py demo --write
    # every method on a real model, two learning rates
    python tests/compare_methods.py real --model FOLDER --data FILE

Each run is a script in its own process. The figures come from the metrics.jsonl and the files that
it leaves.
"""

import argparse
import datetime
import json
import math
import platform
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import plot
import safetensors
import torch
import transformers

ROOT = Path(__file__).parents[1]
METHODS = """lora.py
dora.py
adalora.py
ia3.py
qlora.py
adapter.py
adapter.py --pfeiffer
prefix_tuning.py
prompt_tuning.py
full_ft.py""".splitlines()
# learning rates for a few dozen steps on a real model: so short a run needs high ones
RATES = {
    "lora.py": ["1e-3", "3e-3"],
    "dora.py": ["1e-3", "3e-3"],
    "adalora.py": ["3e-3", "1e-2"],
    "ia3.py": ["1e-2", "3e-2"],
    "qlora.py": ["1e-3", "3e-3"],
    "adapter.py": ["1e-3", "3e-3"],
    "prefix_tuning.py": ["1e-3", "3e-3"],
    "prompt_tuning.py": ["3e-2", "1e-1"],
    "full_ft.py": ["3e-5", "1e-4"],
}
STAGES = ["sft.py", "reward_model.py", "dpo.py", "orpo.py", "ppo.py", "grpo.py"]
SHOWN = {
    "eval_exact_match": "exact match",
    "eval_accuracy": "preference accuracy",
    "eval_score": "mean score",
}
BUDGET = "--eval-data 0.01 --batch-size 8 --micro-batch-tokens 2048 --eval-every 1000 --samples 0"


def run(command: str, output: Path) -> list[dict]:
    """Run a script, if its output is not complete. -> the lines of its metrics.jsonl"""
    metrics = output / "metrics.jsonl"
    if metrics.exists() and '"done"' in metrics.read_text(encoding="utf-8"):
        return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    shutil.rmtree(output, ignore_errors=True)
    script, *flags = command.split()
    command = [sys.executable, str(ROOT / script), *flags, "--output", str(output)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = metrics.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def results(folder: Path) -> list[Path]:
    names = ("adapter_model.safetensors", "model.safetensors")
    return [folder / name for name in names if (folder / name).exists()]


def saved(folder: Path) -> int:
    """How many parameters a run saved."""
    (path,) = results(folder)
    with safetensors.safe_open(path, "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def where_and_when() -> str:
    device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{device}, {versions}, {datetime.date.today()}"


def demo(args) -> str:
    """A table: every script without flags, before and after, for several seeds. With --write also a
    picture of the methods' training losses with the first seed."""
    lines = [
        "| command | saved parameters | measured on held-out rows | before | after, each seed |",
        "|---|---|---|---|---|",
    ]
    curves = {}
    for script in args.methods or METHODS + STAGES:
        before, after = [], []
        for seed in range(args.seeds):
            output = args.output / f"{re.sub(r'[^a-z]+', '-', script)}{seed}"
            entries = run(f"{script} --seed {seed}", output)
            name = next(name for name in SHOWN if any(name in entry for entry in entries))
            values = [entry[name] for entry in entries if name in entry]
            before, after = [*before, values[0]], [*after, values[-1]]
            if seed == 0 and script in METHODS:
                logged = [entry for entry in entries if "loss" in entry]
                per_step = entries[0]["run"]["args"]["epochs"] / logged[-1]["step"]
                epochs = [entry["step"] * per_step for entry in logged]
                curves[script] = list(zip(epochs, [entry["loss"] for entry in logged])), []
        cells = [f"`python {script}`", f"{saved(output):,}", SHOWN[name]]
        cells += [f"{statistics.mean(before):.2f}", ", ".join(f"{value:.2f}" for value in after)]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if args.write and curves:
        picture = plot.curves(curves, "epoch")
        (ROOT / "tests" / "methods.svg").write_text(picture, encoding="utf-8")
    head = f"`python tests/compare_methods.py demo --seeds {args.seeds}`, {where_and_when()}."
    return head + "\n\n" + "\n".join(lines)


def real(args) -> str:
    """Every method on one model, data and number of steps, with two learning rates, and the better
    rate of LoRA with three seeds for the noise; and a picture of loss against memory."""
    names = f"--model {Path(args.model).name} --data {Path(args.data).name}"
    lines = ["| command | saved parameters | held-out loss | tokens/s | peak memory, GiB |"]
    lines += ["|---|---|---|---|---|"]
    points, losses, budget = {}, {}, f"{BUDGET} --max-steps {args.steps}"

    def row(method: str) -> None:
        output = args.output / re.sub(r"\W+", "-", method)
        entries = run(f"{method} --model {args.model} --data {args.data} {budget}", output)
        logged = [entry for entry in entries if "loss" in entry]
        first, *_, losses[method] = [x["eval_loss"] for x in entries if "eval_loss" in x]
        speed = statistics.median(entry["tokens_per_second"] for entry in logged)
        memory = max(entry["peak_memory_gib"] for entry in logged)
        cells = [f"`python {method} $G`", f"{saved(output):,}", f"{losses[method]:.3f}"]
        lines.append(f"| {' | '.join([*cells, f'{speed:,.0f}', f'{memory:.2f}'])} |")
        print(lines[-1], f"before: {first:.3f}", flush=True)
        name = method.replace(".py", "").partition(" --lr")[0]
        if "--seed" not in method and losses[method] < points.get(name, (0, math.inf))[1]:
            points[name] = memory, losses[method]

    for script in args.methods or RATES:
        for rate in RATES[script]:
            row(f"{script} --lr {rate}")
    if not args.methods:
        best = min(RATES["lora.py"], key=lambda rate: losses[f"lora.py --lr {rate}"])
        for seed in (1, 2):
            row(f"lora.py --lr {best} --seed {seed}")
    if args.write:
        picture = plot.scatter(points, "peak memory (GiB)", "held-out loss (nats a token)")
        (ROOT / "tests" / "frontier.svg").write_text(picture, encoding="utf-8")
    head = f"`python tests/compare_methods.py real {names} --steps {args.steps}`"
    head += f", {where_and_when()}. `$G` is `{names} {budget}`."
    return head + "\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["demo", "real"])
    parser.add_argument("--model", help="for real")
    parser.add_argument("--data", help="for real")
    parser.add_argument("--steps", type=int, default=30, help="for real")
    parser.add_argument("--seeds", type=int, default=3, help="for demo")
    parser.add_argument("--methods", nargs="+", help="instead of all")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"))
    replaces = (
        "replace the table in tests/RESULTS.md, write tests/methods.svg or tests/frontier.svg"
    )
    parser.add_argument("--write", action="store_true", help=replaces)
    args = parser.parse_args()
    text = demo(args) if args.what == "demo" else real(args)
    print(text)
    marked = f"<!-- {args.what} -->\n{text}\n<!-- end -->"
    if args.write:
        results = ROOT / "tests" / "RESULTS.md"
        place = re.compile(f"<!-- {args.what} -->.*?<!-- end -->", re.DOTALL)
        old = results.read_text(encoding="utf-8")
        results.write_text(place.sub(lambda _: marked, old), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Tables for the README. All methods in a table use the same model, data and number of steps.

    # every script without flags, three seeds
    python tests/compare_methods.py demo --write
    # every method on a real model, one seed
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
import resource
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
# learning rates for a few dozen steps on a real model: the best of those tried
RATES = {
    "lora.py": 3e-3,
    "dora.py": 3e-3,
    "adalora.py": 1e-2,
    "ia3.py": 3e-2,
    "qlora.py": 3e-3,
    "adapter.py": 3e-3,
    "adapter.py --pfeiffer": 3e-3,
    "prefix_tuning.py": 1e-3,
    "prompt_tuning.py": 1e-1,
    "full_ft.py": 1e-4,
}
STAGES = ["sft.py", "reward_model.py", "dpo.py", "orpo.py", "ppo.py", "grpo.py"]
SHOWN = {
    "eval_exact_match": "exact match",
    "eval_accuracy": "preference accuracy",
    "eval_score": "mean score",
}
# every step has three documents
BUDGET = """--eval-data 0.002 --max-length 384 --batch-size 3 --micro-batch-tokens 1152
--eval-every 1000 --samples 0"""


def run(command: str, output: Path) -> tuple[list[dict], float]:
    """Run a script. -> the lines of its metrics.jsonl, and the seconds of processor time that it
    took"""
    shutil.rmtree(output, ignore_errors=True)
    script, *flags = command.split()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(ROOT / script), *flags, "--output", str(output)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return [json.loads(line) for line in lines], seconds


def results(folder: Path) -> list[Path]:
    names = ("adapter_model.safetensors", "model.safetensors")
    return [folder / name for name in names if (folder / name).exists()]


def saved(folder: Path) -> int:
    """How many parameters a run saved."""
    (path,) = results(folder)
    with safetensors.safe_open(path, "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def size(folder: Path) -> str:
    count = sum(path.stat().st_size for path in results(folder))
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"


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
        "| command | saved parameters | measured on held-out rows | before | after, each seed "
        "| CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    curves = {}
    for script in args.methods or METHODS + STAGES:
        before, after, seconds = [], [], []
        for seed in range(args.seeds):
            output = args.output / f"{re.sub(r'[^a-z]+', '-', script)}{seed}"
            entries, took = run(f"{script} --seed {seed}", output)
            name = next(name for name in SHOWN if any(name in entry for entry in entries))
            values = [entry[name] for entry in entries if name in entry]
            before, after, seconds = [*before, values[0]], [*after, values[-1]], [*seconds, took]
            if seed == 0 and script in METHODS:
                logged = [entry for entry in entries if "loss" in entry]
                per_step = entries[0]["run"]["args"]["epochs"] / logged[-1]["step"]
                epochs = [entry["step"] * per_step for entry in logged]
                curves[script] = list(zip(epochs, [entry["loss"] for entry in logged])), []
        cells = [f"`python {script}`", f"{saved(output):,}", SHOWN[name]]
        cells += [f"{statistics.mean(before):.2f}", ", ".join(f"{value:.2f}" for value in after)]
        cells += [f"{statistics.mean(seconds):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if args.write and curves:
        picture = plot.curves(curves, "epoch")
        (ROOT / "examples" / "methods.svg").write_text(picture, encoding="utf-8")
    head = f"`python tests/compare_methods.py demo --seeds {args.seeds}`, {where_and_when()}."
    return head + "\n\n" + "\n".join(lines)


def real(args) -> str:
    """Every method on one model, data and number of steps; and a picture of what each costs."""
    names = f"--model {Path(args.model).name} --data {Path(args.data).name}"
    lines = [
        "| command | saved parameters | saved size | peak memory | tokens/s | held-out loss "
        "before | after |",
        "|---|---|---|---|---|---|---|",
    ]
    points, budget = {}, f"{' '.join(BUDGET.split())} --max-steps {args.steps}"
    for method in args.methods or [f"{method} --lr {rate}" for method, rate in RATES.items()]:
        output = args.output / re.sub(r"\W+", "-", method)
        entries, _ = run(f"{method} --model {args.model} --data {args.data} {budget}", output)
        entries = [entry for entry in entries if "done" not in entry]
        losses = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
        logged = [entry for entry in entries if "loss" in entry]
        speed = statistics.median(entry["tokens_per_second"] for entry in logged[1:])
        memory = max(entry["peak_memory_gib"] for entry in logged)
        cells = [f"`python {method} $G`", f"{saved(output):,}", size(output)]
        cells += [f"{memory:.2f} GiB", f"{speed:,.0f}", f"{losses[0]:.3f}", f"{losses[-1]:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        points[method.replace(".py", "").partition(" --lr")[0]] = memory, losses[-1]
    if args.write:
        picture = plot.scatter(points, "peak memory (GiB)", "held-out loss (nats a token)")
        (ROOT / "examples" / "frontier.svg").write_text(picture, encoding="utf-8")
    head = f"`python tests/compare_methods.py real {names} --steps {args.steps}`"
    head += f", {where_and_when()}. `$G` is `{names} {budget}`."
    return head + "\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["demo", "real"])
    parser.add_argument("--model", help="for real")
    parser.add_argument("--data", help="for real")
    parser.add_argument("--steps", type=int, default=24, help="for real")
    parser.add_argument("--seeds", type=int, default=3, help="for demo")
    parser.add_argument("--methods", nargs="+", help="instead of all")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"))
    replaces = (
        "replace the table in README.md and README.zh.md, and write examples/methods.svg (demo) "
    )
    replaces += "or examples/frontier.svg (real)"
    parser.add_argument("--write", action="store_true", help=replaces)
    args = parser.parse_args()
    text = demo(args) if args.what == "demo" else real(args)
    print(text)
    marked = f"<!-- {args.what} -->\n{text}\n<!-- end -->"
    for readme in [ROOT / "README.md", ROOT / "README.zh.md"] if args.write else []:
        old = readme.read_text(encoding="utf-8")
        place = re.compile(f"<!-- {args.what} -->.*?<!-- end -->", re.DOTALL)
        readme.write_text(place.sub(lambda _: marked, old), encoding="utf-8")


if __name__ == "__main__":
    main()

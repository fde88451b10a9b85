"""The tables and the picture of README.md: the same model, data and steps for everything that is compared.

    python tests/compare_methods.py demo --write                          # every script without flags, three seeds
    python tests/compare_methods.py real --model FOLDER --data FILE --write   # every method on a real model, one seed

Each run is a script in a process of its own; what the tables say is read from the metrics.jsonl and the files that it left.
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

import torch
import transformers

ROOT = Path(__file__).parents[1]
METHODS = ["lora.py", "dora.py", "qlora.py", "adapter.py", "adapter.py --pfeiffer", "prefix_tuning.py", "prompt_tuning.py", "full_ft.py"]
# on a real model for a few dozen steps: rates that so short a run needs, the best of those tried
RATES = {"lora.py": 3e-3, "dora.py": 3e-3, "qlora.py": 3e-3, "adapter.py": 3e-3, "adapter.py --pfeiffer": 3e-3, "prefix_tuning.py": 1e-3,
         "prompt_tuning.py": 1e-1, "full_ft.py": 1e-4}  # fmt: skip
STAGES = ["sft.py", "reward_model.py", "dpo.py", "orpo.py", "ppo.py"]
SHOWN = {"eval_exact_match": "exact match", "eval_accuracy": "preference accuracy", "eval_score": "mean score"}
COLORS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"]
# rows are not packed, since prefix and prompt tuning cannot be: every method sees the same documents in every step
BUDGET = "--eval-fraction 0.002 --max-length 384 --no-packing --batch-size 3 --log-every 2 --eval-every 1000 --samples 0"


def run(command: str, output: Path) -> tuple[list[dict], float]:
    """A script's run. -> the lines of its metrics.jsonl, and the seconds of processor time that it took"""
    shutil.rmtree(output, ignore_errors=True)
    script, *flags = command.split()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, str(ROOT / script), *flags, "--output", str(output)], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def size(folder: Path) -> str:
    count = sum(file.stat().st_size for name in ("adapter_model.safetensors", "model.safetensors") for file in folder.glob(name))
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"


def where_and_when() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"{device}, torch {torch.__version__}, transformers {transformers.__version__}, {datetime.date.today()}"


def demo(args) -> str:
    """What each script does without flags, from the base's start to the end, over seeds; and a picture of the methods' first seed."""
    lines = ["| command | trained parameters | measured on held-out rows | before | after, each seed | CPU seconds |", "|---|---|---|---|---|---|"]
    curves, memory = {}, {}
    for script in args.methods or METHODS + STAGES:
        before, after, seconds = [], [], []
        for seed in range(args.seeds):
            entries, took = run(f"{script} --seed {seed}", args.output / f"{re.sub(r'[^a-z]+', '-', script)}{seed}")
            name = next(name for name in SHOWN if any(name in entry for entry in entries))
            values = [entry[name] for entry in entries if name in entry]
            before, after, seconds = [*before, values[0]], [*after, values[-1]], [*seconds, took]
            if seed == 0 and script in METHODS:
                logged = [entry for entry in entries if "loss" in entry]
                curves[script], memory[script] = [(e["epoch"], e["loss"]) for e in logged], max(e["peak_memory_gib"] for e in logged)
        trained = entries[0]["run"]["trainable_parameters"]
        shown = ", ".join(f"{value:.2f}" for value in after)
        lines.append(f"| `python {script}` | {trained:,} | {SHOWN[name]} | {statistics.mean(before):.2f} | {shown} | {statistics.mean(seconds):.0f} |")
        print(lines[-1], flush=True)
    if args.write and curves:
        (ROOT / "examples" / "methods.svg").write_text(picture(curves, memory), encoding="utf-8")
    return f"`python tests/compare_methods.py demo --seeds {args.seeds}`, {where_and_when()}.\n\n" + "\n".join(lines)


def real(args) -> str:
    """Every method on one model, data and number of steps."""
    names = f"--model {Path(args.model).name} --data {Path(args.data).name}"
    lines = ["| command | trained parameters | checkpoint | peak memory | tokens/s | held-out loss before | after |", "|---|---|---|---|---|---|---|"]
    for method in args.methods or [f"{method} --lr {rate}" for method, rate in RATES.items()]:
        output = args.output / re.sub(r"\W+", "-", method)
        entries, _ = run(f"{method} --model {args.model} --data {args.data} {BUDGET} --max-steps {args.steps}", output)
        losses = [entry["eval_loss"] for entry in entries if "eval_loss" in entry and "done" not in entry]
        logged = [entry for entry in entries if "loss" in entry]
        speed = statistics.median(entry["tokens_per_second"] for entry in logged[1:])
        memory = max(entry["peak_memory_gib"] for entry in logged)
        trained = entries[0]["run"]["trainable_parameters"]
        lines.append(f"| `python {method} $G` | {trained:,} | {size(output)} | {memory:.2f} GiB | {speed:,.0f} | {losses[0]:.3f} | {losses[-1]:.3f} |")
        print(lines[-1], flush=True)
    head = f"`python tests/compare_methods.py real {names} --steps {args.steps}`, {where_and_when()}. `$G` is `{names} {BUDGET} --max-steps {args.steps}`."
    return head + "\n\n" + "\n".join(lines)


def picture(curves: dict[str, list[tuple[float, float]]], memory: dict[str, float]) -> str:
    """Training loss over epochs on the left, peak memory on the right, one colour a method. -> SVG"""
    points = [point for curve in curves.values() for point in curve]
    steps, high = max(step for step, _ in points), math.ceil(max(loss for _, loss in points))

    def x(step):
        return 60 + 440 * step / steps

    def y(loss):
        return 40 + 260 * (high - loss) / high

    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 350" font-family="sans-serif" font-size="12">',
             '<rect width="920" height="350" fill="white"/>', '<text x="60" y="22" font-size="14">training loss (nats) by epoch</text>',
             '<text x="560" y="22" font-size="14">peak memory (GiB)</text>']  # fmt: skip
    for loss in range(0, high + 1, max(1, high // 8)):
        line = f'<line x1="60" x2="500" y1="{y(loss):.1f}" y2="{y(loss):.1f}" stroke="#ddd"/>'
        parts.append(f'{line}<text x="52" y="{y(loss) + 4:.1f}" text-anchor="end">{loss}</text>')
    for step in range(int(steps) + 1):
        parts.append(f'<text x="{x(step):.1f}" y="320" text-anchor="middle">{step}</text>')
    most, height = max(memory.values()), 270 / len(memory)
    for n, (method, curve) in enumerate(curves.items()):
        color, top = COLORS[n % len(COLORS)], 40 + n * height
        path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in curve)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<rect x="700" y="{top:.1f}" width="{160 * memory[method] / most:.1f}" height="{height * 0.7:.1f}" fill="{color}"/>')
        parts.append(f'<text x="692" y="{top + height * 0.45:.1f}" text-anchor="end">{method.replace(".py", "")}</text>')
        parts.append(f'<text x="{705 + 160 * memory[method] / most:.1f}" y="{top + height * 0.45:.1f}">{memory[method]:.2f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["demo", "real"])
    parser.add_argument("--model", help="for real")
    parser.add_argument("--data", help="for real")
    parser.add_argument("--steps", type=int, default=24, help="for real")
    parser.add_argument("--seeds", type=int, default=3, help="for demo")
    parser.add_argument("--methods", nargs="+", help="instead of all")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"))
    parser.add_argument("--write", action="store_true", help="replace the table in README.md and README.zh.md, and examples/methods.svg")
    args = parser.parse_args()
    text = demo(args) if args.what == "demo" else real(args)
    print(text)
    for readme in [ROOT / "README.md", ROOT / "README.zh.md"] if args.write else []:
        old = readme.read_text(encoding="utf-8")
        marked = f"<!-- {args.what} -->\n{text}\n<!-- end -->"
        readme.write_text(re.sub(f"<!-- {args.what} -->.*?<!-- end -->", lambda _: marked, old, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()

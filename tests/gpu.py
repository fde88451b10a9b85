"""What only a CUDA GPU can show. Prints tables; each part ends within the minutes it is given.

    python tests/gpu.py checks    # pytest -m cuda; every script on the bundled model, on the GPU and on the CPU
    python tests/gpu.py memory    # Llama-2-7B's shape: --estimate and the measured peak of the same command; a 65B in 4 bits
    python tests/gpu.py speed     # the same shape against TRL + PEFT, and against the GPU's largest matrix product
    python tests/gpu.py growth    # tokens/s and memory by the length of a row, of a document, and by rows

Weights are random, made on the device. A GPU of 80 GB and 128 GiB of host memory take all of it. Without a GPU it runs on the CPU,
which --shape tiny makes a rehearsal of.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import benchmark
import torch

ROOT = Path(__file__).parents[1]

COMMANDS = [
    "full_ft.py", "full_ft.py --offload", "full_ft.py --optimizer paged_adamw8bit --gradient-checkpointing", "lora.py", "lora.py --compile",
    "lora.py --no-packing", "lora.py --merge --gradient-checkpointing", "qlora.py --merge", "dora.py", "adapter.py", "prefix_tuning.py", "prompt_tuning.py",
    "sft.py --lora-rank 8", "reward_model.py --lora-rank 8", "dpo.py", "dpo.py --lora-rank 8", "orpo.py", "ppo.py --lora-rank 8", "ppo.py",
]  # fmt: skip

PURE = "--gradient-checkpointing --pure-bfloat16 --optimizer adamw8bit --step-in-backward --max-grad-norm 0"
MEMORY = [  # method, shape (None: that of --shape), tokens a row, more flags
    ("lora", None, 2048, ""),
    ("lora", None, 2048, "--gradient-checkpointing"),
    ("qlora", None, 512, "--gradient-checkpointing"),
    ("qlora", "65b", 512, "--gradient-checkpointing"),
    ("full", None, 2048, PURE),
    ("full", None, 2048, "--gradient-checkpointing --optimizer adamw8bit"),
    ("full", None, 2048, "--gradient-checkpointing --offload"),
    ("dpo", None, 2048, "--lora-rank 16 --gradient-checkpointing"),
    ("ppo", None, 1024, "--lora-rank 16 --gradient-checkpointing"),
]
SPEED = [("lora", False), ("lora", True), ("qlora", True), ("dpo", True), ("dora", True), ("orpo", True), ("reward", True)]  # method, recomputing


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def settings(options, method: str, shape: str | None, length: int, **more):
    args = benchmark.parse_args(["--shape", shape or options.shape, "--length", str(length), "--document", str(min(512, length))])
    vars(args).update(method=method, steps=10, skip=3, rows=1, lora=method in (*benchmark.PREFERENCES, "ppo"), **more)
    if options.shape == "tiny":
        vars(args).update(shape="tiny", length=length // 8, document=64, steps=3, skip=1)
    if method == "ppo":
        vars(args).update(steps=3, skip=1)
    return args


def call(arguments: list, seconds: float) -> None:
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, start_new_session=True)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started, or they would keep the GPU
        print(f"{' '.join(arguments)}: not done after {seconds:.0f} s")


def checks(options, left) -> None:
    print("pytest -m cuda", flush=True)
    call(["-m", "pytest", "-q", "-n", "0", "-m", "cuda"], left())
    print("\n| command | GPU: first loss, last | seconds | CPU: first loss, last | seconds |\n|---|---|---|---|---|", flush=True)

    def losses(command: str, more: dict, folder: str) -> str:
        script, *flags = command.split()
        output, started = Path(folder) / re.sub(r"\W", "_", f"{command}{more}"), time.monotonic()
        short = ["--output", str(output), "--samples", "0", "--log-every", "1", *(["--max-steps", "3"] if script == "ppo.py" else ["--max-steps", "20"])]
        try:
            run = subprocess.run([sys.executable, str(ROOT / script), *flags, *short], env=os.environ | more, capture_output=True, text=True, timeout=left())
        except subprocess.TimeoutExpired:
            return "not done | "
        if run.returncode:
            return f"failed: {(run.stderr.strip() or f'exit code {run.returncode}').splitlines()[-1][:200]} | "
        found = [row["loss"] for row in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
        return f"{found[0]:.4f}, {found[-1]:.4f} | {time.monotonic() - started:.0f}" if found else "failed: no loss | "

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4)) as pool:
        threads = {"OMP_NUM_THREADS": str(min(4, os.cpu_count() or 1))}

        def row(command: str) -> str:
            return f"| `{command}` | {losses(command, threads, folder)} | {losses(command, threads | {'CUDA_VISIBLE_DEVICES': ''}, folder)} |"

        for line in pool.map(row, COMMANDS[:2] if options.shape == "tiny" else COMMANDS):
            print(line, flush=True)


def estimate(folder: str, args) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / f"{benchmark.script_of(args.method)}.py"), *benchmark.flags_of(folder, args), "--estimate"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


def in_time(cases, left, seconds: float):
    """Of the cases, (beginning of a table's row, settings), those that still have so many seconds, each with a folder of its data."""
    for name, args in cases:
        if left() < seconds:
            print(f"{name} | no time left |", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            benchmark.make_work(Path(folder), args)
            yield name, args, folder


def memory(options, left) -> None:
    """GPU memory is the most that PyTorch's allocator had given out in a step, host memory the most that the process ever held. Where
    tensors lie in host memory, also what of it PyTorch has pinned, which the process's figure may leave out, and what the whole
    container has grown by."""
    print("| command | tokens a step | GPU, GiB: estimate | measured | measured / estimate | host, GiB | tokens/s |\n|---|---|---|---|---|---|---|", flush=True)
    cases = []
    for method, shape, length, flags in MEMORY:
        args = settings(options, method, shape, length, flags=flags, against="nothing")
        cases.append((f"| {args.shape} `{f'{benchmark.script_of(method)}.py {flags}'.strip()}` | {args.length:,}", args))
    for name, args, folder in in_time(cases, left, 90):
        estimating = estimate(folder, args)
        if "--offload" in args.flags:  # first, so that the container grows by the run alone
            with contextlib.suppress(subprocess.TimeoutExpired):
                estimating.wait(max(1, left()))
        result = benchmark.measure("ours", folder, args, left())
        try:
            printed = estimating.communicate(timeout=max(1, left()))[0]
        except subprocess.TimeoutExpired:
            estimating.kill()
            printed = ""
        together = re.search(r"^together +([\d.]+)", printed, re.MULTILINE)
        expected = float(together[1]) if together else float("nan")
        if "error" in result:
            print(f"{name} | {expected:.2f} | failed: {result['error']} |", flush=True)
            continue
        measured = result["gib"] + result["loaded_gib"]
        more = "".join(f", {key.split('_')[0]} {result[key]:,.0f}" for key in ("rollout_tokens_per_second", "update_tokens_per_second") if key in result)
        host = f"{result['host_gib']:.1f}"
        if "--offload" in args.flags:
            host += "".join(f", {kind} {result[f'{kind}_gib']:.1f}" for kind in ("pinned", "container") if f"{kind}_gib" in result)
        print(f"{name} | {expected:.2f} | {measured:.2f} | {measured / expected:.2f} | {host} | "
              f"{result['tokens_per_second']:,.0f}{more} |", flush=True)  # fmt: skip


def matrix_peak() -> float:
    """FLOP/s of a product of two square bfloat16 matrices of random numbers."""
    size, device = (8192, "cuda") if torch.cuda.is_available() else (512, "cpu")
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(400 if device == "cuda" else 20):  # on a GPU half a second, in which its clocks settle
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times[len(times) // 2 :])


def lora_flops(shape: str, document: int) -> float:
    """Floating-point operations a token of LoRA without recomputation: 4 for every weight in a product, and causal attention forward
    and backward."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = benchmark.SHAPES[shape]
    weights = layers * (hidden * hidden * 2 + 2 * hidden * hidden * kv_heads // heads + 3 * hidden * intermediate) + vocabulary * hidden
    return 4 * weights + 3 * layers * 2 * hidden * document


def speed(options, left) -> None:
    peak = matrix_peak()
    torch.cuda.empty_cache()
    print(f"largest matrix product: {peak / 1e12:,.0f} TFLOP/s\n")
    print("| method | tokens/s, ours | theirs | ratio | GiB above the loaded model, ours | theirs | ratio |\n|---|---|---|---|---|---|---|", flush=True)
    cases, results = [], {}
    for method, recompute in SPEED:
        args = settings(options, method, None, 2048, recompute=recompute, flags="--optimizer adamw" if method == "qlora" else "")
        cases.append((f"| {method}{', recomputing' * recompute}", args))
    for name, args, folder in in_time(cases, left, 120):
        ours, theirs = results[args.method, args.recompute] = [benchmark.measure(side, folder, args, left()) for side in ("ours", "trl")]
        cells = []
        for key, form in (("tokens_per_second", ",.0f"), ("gib", ".2f")):
            cells += [f"{each[key]:{form}}" if key in each else f"failed: {each['error']}" for each in (ours, theirs)]
            cells.append(f"{ours[key] / theirs[key]:.2f}" if key in ours and key in theirs else "")
        print(f"{name} | {' | '.join(cells)} |", flush=True)
        if (args.method, args.recompute) == ("lora", False) and "gib" in ours:
            share = ours["tokens_per_second"] * lora_flops(args.shape, args.document) / peak
            print(f"| of the largest product's speed | {share:.0%} | | | | | |", flush=True)
    ours, theirs = results.get(("lora", False), [{}, {}])[0], results.get(("lora", True), [{}, {}])[1]
    if "gib" in ours and "gib" in theirs:
        ratio, less = ours["tokens_per_second"] / theirs["tokens_per_second"], ours["gib"] / theirs["gib"]
        print(f"\nlora without recomputation against TRL's default, which recomputes: {ratio:.2f} times its tokens/s, {less:.2f} of its memory")


def growth(options, left) -> None:
    call(["tests/benchmark.py", "--growth", "--shape", options.shape, "--recompute", "--steps", "6", "--skip", "2"], left())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["checks", "memory", "speed", "growth"])
    parser.add_argument("--shape", choices=["7b", "135m", "tiny"], default="7b")
    parser.add_argument("--minutes", type=float, default=9.5, help="what would begin too late is left out")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    print(f"{device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}: python tests/gpu.py {' '.join(sys.argv[1:])}\n", flush=True)
    globals()[options.part](options, lambda: end - time.monotonic())


if __name__ == "__main__":
    main()

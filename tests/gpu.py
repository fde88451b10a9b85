"""Checks and measurements that need a CUDA GPU. Each part prints a table within --minutes.

    python tests/gpu.py checks  # pytest -m cuda; every script on the bundled model, on GPU and CPU
    python tests/gpu.py memory  # Llama-2-7B's shape: peak memory of a step; a 65B in 4 bits
    python tests/gpu.py speed   # the same shape against TRL + PEFT and the largest matrix product
    python tests/gpu.py growth  # tokens/s and memory by length of rows and documents, and rows
    python tests/gpu.py experiments  # changes that the scripts do not have: what would they bring?

What does not fit in --minutes is left out; --first N then begins with the N-th row of the table.
Weights are random, made on the device. All parts fit in a GPU of 80 GB and 128 GiB of host memory.
Without a GPU they run on the CPU. With --shape tiny, that is a rehearsal.
"""

import argparse
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
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]

COMMANDS = """full_ft.py
full_ft.py --offload
full_ft.py --optimizer paged_adamw8bit --gradient-checkpointing
lora.py
lora.py --no-packing
lora.py --gradient-checkpointing
qlora.py
dora.py
adalora.py
ia3.py
adapter.py
prefix_tuning.py
prompt_tuning.py
sft.py --lora-rank 8
reward_model.py --lora-rank 8
dpo.py
dpo.py --lora-rank 8
orpo.py
ppo.py
grpo.py""".splitlines()

AGAIN = "--gradient-checkpointing"
PURE = f"{AGAIN} --pure-bfloat16 --optimizer adamw8bit --step-in-backward --max-grad-norm 0"
MEMORY = [  # method, shape (None: --shape), tokens per row, more flags
    ("lora", None, 2048, ""),
    ("lora", None, 2048, AGAIN),
    ("qlora", None, 512, AGAIN),
    ("qlora", "65b", 512, AGAIN),
    ("full", None, 2048, PURE),
    ("full", None, 2048, f"{AGAIN} --optimizer adamw8bit"),
    ("full", None, 2048, f"{AGAIN} --offload"),
    ("dpo", None, 2048, f"--lora-rank 16 {AGAIN}"),
    ("ppo", None, 1024, f"--rank 16 {AGAIN}"),
]
SPEED = [("lora", False)]  # method, recomputing
SPEED += [(method, True) for method in ("lora", "qlora", "dpo", "dora", "orpo", "reward")]


PARTS = ["checks", "memory", "speed", "growth", "experiments"]


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def settings(options, method: str, shape: str | None, length: int, **more):
    sizes = ["--shape", shape or options.shape, "--length", length, "--document", min(512, length)]
    args = benchmark.parse_args(list(map(str, sizes)))
    adapter = method in (*benchmark.PREFERENCES, "ppo")
    vars(args).update(method=method, steps=10, skip=3, rows=1, lora=adapter, **more)
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
        # with the processes that it has started, or they would keep the GPU
        os.killpg(process.pid, signal.SIGKILL)
        print(f"{' '.join(arguments)}: not done after {seconds:.0f} s")


def checks(options, left) -> None:
    print("pytest -m cuda", flush=True)
    call(["-m", "pytest", "-q", "-n", "0", "-m", "cuda"], left())
    print("\n| command | GPU: first loss, last | seconds | CPU: first loss, last | seconds |")
    print("|---|---|---|---|---|", flush=True)

    def losses(command: str, more: dict, folder: str) -> str:
        script, *flags = command.split()
        output, started = Path(folder) / re.sub(r"\W", "_", f"{command}{more}"), time.monotonic()
        flags += ["--output", str(output), "--samples", "0"]
        flags += ["--max-steps", "3" if tiny or script in ("ppo.py", "grpo.py") else "20"]
        settings = {"env": os.environ | more, "capture_output": True, "text": True}
        command = [sys.executable, str(ROOT / script), *flags]
        try:
            run = subprocess.run(command, **settings, timeout=left())
        except subprocess.TimeoutExpired:
            return "not done | "
        if run.returncode:
            reason = run.stderr.strip() or f"exit code {run.returncode}"
            return f"failed: {reason.splitlines()[-1][:200]} | "
        lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        found = [line["loss"] for line in lines if "loss" in line]
        if not found:
            return "failed: no loss | "
        return f"{found[0]:.4f}, {found[-1]:.4f} | {time.monotonic() - started:.0f}"

    cores = os.cpu_count() or 1
    tiny = options.shape == "tiny"
    threads = {"OMP_NUM_THREADS": str(min(4, cores))}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max(1, cores // 4)) as pool:

        def row(command: str) -> str:
            on_gpu = losses(command, threads, folder)
            on_cpu = losses(command, threads | {"CUDA_VISIBLE_DEVICES": ""}, folder)
            return f"| `{command}` | {on_gpu} | {on_cpu} |"

        commands = COMMANDS[options.first :]
        for line in pool.map(row, commands[:2] if tiny else commands):
            print(line, flush=True)


def in_time(cases, options, left, seconds: float):
    """Yield each case (beginning of a table's line, settings) for which so many seconds are left,
    with a folder of its data."""
    for name, args in cases[options.first :]:
        if left() < seconds:
            print(f"{name} | no time left |", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            benchmark.make_work(Path(folder), args)
            yield name, args, folder


def memory(options, left) -> None:
    """GPU memory is the peak of PyTorch's allocator in a step, host memory the peak of the process.
    With --offload also the pinned memory, which the process's figure may not include, and the
    growth of the whole container."""
    print("| command | tokens per step | GPU, GiB | host, GiB | tokens/s |\n|---|---|---|---|---|")
    cases = []
    for method, shape, length, flags in MEMORY:
        args = settings(options, method, shape, length, flags=flags, against="nothing")
        command = f"{benchmark.script_of(method)}.py {flags}".strip()
        cases.append((f"| {args.shape} `{command}` | {args.length:,}", args))
    for name, args, folder in in_time(cases, options, left, 45):
        result = benchmark.measure("ours", folder, args, left())
        if "error" in result:
            print(f"{name} | failed: {result['error']} |", flush=True)
            continue
        speed, host = f"{result['tokens_per_second']:,.0f}", f"{result['host_gib']:.1f}"
        for part in ("rollout", "update"):
            if (key := f"{part}_tokens_per_second") in result:
                speed += f", {part} {result[key]:,.0f}"
        for kind in ("pinned", "container") if "--offload" in args.flags else ():
            if (key := f"{kind}_gib") in result:
                host += f", {kind} {result[key]:.1f}"
        gib = result["gib"] + result["loaded_gib"]
        print(f"{name} | {gib:.2f} | {host} | {speed} |", flush=True)


def matrix_peak() -> float:
    """FLOP/s of a product of two square bfloat16 matrices of random numbers."""
    size, device = (8192, "cuda") if torch.cuda.is_available() else (512, "cpu")
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    # half a second on a GPU, until its clocks settle
    for _ in range(400 if device == "cuda" else 20):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times[len(times) // 2 :])


def lora_flops(shape: str, document: int) -> float:
    """Floating-point operations per token, LoRA without recomputation: 4 for every weight in a
    product, and causal attention forward and backward."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = benchmark.SHAPES[shape]
    attention = 2 * hidden * hidden + 2 * hidden * hidden * kv_heads // heads
    weights = layers * (attention + 3 * hidden * intermediate) + vocabulary * hidden
    return 4 * weights + 3 * layers * 2 * hidden * document


def speed(options, left) -> None:
    peak = matrix_peak()
    torch.cuda.empty_cache()
    print(f"largest matrix product: {peak / 1e12:,.0f} TFLOP/s\n")
    print("| method | tokens/s, ours | theirs | ratio | GiB above the loaded model, ours | theirs |"
          " ratio |\n|---|---|---|---|---|---|---|", flush=True)  # fmt: skip
    cases, results = [], {}
    for method, recompute in SPEED:
        args = settings(options, method, None, 2048, recompute=recompute)
        cases.append((f"| {method}{', recomputing' * recompute}", args))
    for name, args, folder in in_time(cases, options, left, 60):
        ours, theirs = results[args.method, args.recompute] = [
            benchmark.measure(side, folder, args, left()) for side in ("ours", "trl")
        ]
        cells = []
        for key, form in (("tokens_per_second", ",.0f"), ("gib", ".2f")):
            cells += [
                f"{each[key]:{form}}" if key in each else f"failed: {each['error']}"
                for each in (ours, theirs)
            ]
            cells.append(f"{ours[key] / theirs[key]:.2f}" if key in ours and key in theirs else "")
        print(f"{name} | {' | '.join(cells)} |", flush=True)
        if (args.method, args.recompute) == ("lora", False) and "gib" in ours:
            share = ours["tokens_per_second"] * lora_flops(args.shape, args.document) / peak
            print(f"| of the largest product's speed | {share:.0%} | | | | | |", flush=True)
    nothing = [{}, {}]
    ours, _ = results.get(("lora", False), nothing)
    _, theirs = results.get(("lora", True), nothing)
    if "gib" in ours and "gib" in theirs:
        ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
        less = ours["gib"] / theirs["gib"]
        print("\nlora without recomputation against TRL's default, which recomputes: "
              f"{ratio:.2f} times its tokens/s, {less:.2f} of its memory")  # fmt: skip


def growth(options, left) -> None:
    flags = f"--growth --shape {options.shape} --recompute --steps 6 --skip 2"
    call(["tests/benchmark.py", *flags.split()], left())


class LoRAProduct(torch.autograd.Function):
    """y = x W^T + s (x A^T) B^T as one node, so that the backward pass adds into one dx."""

    @staticmethod
    def forward(ctx, x, W, bias, A, B, s):
        down = x @ A.to(x.dtype).T  # (N, r)
        ctx.save_for_backward(x, W, A, B, down)
        ctx.s = s
        return F.linear(x, W, bias).addmm_(down, B.to(x.dtype).T, alpha=s)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, W, A, B, down = ctx.saved_tensors
        up = (grad @ B.to(x.dtype)).mul_(ctx.s)  # (N, r)
        dx = (grad @ W).addmm_(up, A.to(x.dtype)) if ctx.needs_input_grad[0] else None
        dA, dB = (up.T @ x).to(A.dtype), (grad.T @ down).to(B.dtype).mul_(ctx.s)
        return dx, None, None, dA, dB, None


def experiments(options, left) -> None:
    """Forward and backward pass of a few blocks with LoRA of rank 16, nothing recomputed."""
    import numpy as np
    import transformers
    from transformers.models.llama import modeling_llama as llama

    import common
    import lora

    cuda, tiny = torch.cuda.is_available(), options.shape == "tiny"
    hidden, intermediate, layers, heads, kv_heads, vocabulary = benchmark.SHAPES[options.shape]
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
        num_key_value_heads=kv_heads, num_hidden_layers=min(4, layers), vocab_size=vocabulary,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if cuda else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    device = model.device
    model.to(torch.bfloat16 if cuda else torch.float32).requires_grad_(False)
    common.make_lean(model)
    for name in common.find_targets(model, "all-linear"):
        layer = lora.LoRALinear(model.get_submodule(name), 16, 32.0)
        torch.nn.init.normal_(layer.lora_B.weight, std=0.02)
        model.set_submodule(name, layer)
    model.set_attn_implementation("stretches")
    tokens, document = (256, 64) if tiny else (4096, 512)
    ids = np.random.default_rng(0).integers(3, 500, (tokens // document, document))
    examples = [{"input_ids": row, "is_target": np.arange(document) > 0} for row in ids]
    batch = common.collate(examples, False, device)
    batch = {name: x for name, x in batch.items() if not name.startswith("target")}
    weights = torch.randn(tokens, hidden, device=device)
    trained = [p for p in model.parameters() if p.requires_grad]

    def one_node(layer, x):
        A, B, flat = layer.lora_A.weight, layer.lora_B.weight, x.flatten(0, -2)
        y = LoRAProduct.apply(flat, layer.base.weight, layer.base.bias, A, B, layer.scaling)
        return y.view(*x.shape[:-1], -1)

    rotary, plain = llama.apply_rotary_pos_emb, lora.LoRALinear.forward
    compiled = torch.compile(rotary, dynamic=False)
    variants = {
        "as the scripts have it": (rotary, plain),
        "rotary embedding compiled": (compiled, plain),
        "LoRA as one autograd Function": (rotary, one_node),
        "both": (compiled, one_node),
    }
    print("| | ms | GiB above the model | gradients differ by |\n|---|---|---|---|", flush=True)
    expected = None
    for name, (llama.apply_rotary_pos_emb, lora.LoRALinear.forward) in variants.items():
        times = []
        try:
            for _ in range(5 if tiny else 20):
                model.zero_grad()
                loaded = torch.cuda.memory_allocated() if cuda else 0
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                    torch.cuda.synchronize()
                started = time.perf_counter()
                states = model.base_model(**batch, use_cache=False).last_hidden_state[0]
                (states * weights).sum().backward()
                if cuda:
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
        except Exception as error:  # torch.compile needs a C compiler
            print(f"| {name} | failed: {str(error).splitlines()[0][:200]} | | |", flush=True)
            continue
        found = torch.cat([p.grad.flatten() for p in trained])
        expected = found if expected is None else expected
        gib = f"{(torch.cuda.max_memory_allocated() - loaded) / 2**30:.2f}" if cuda else ""
        difference = ((found - expected).norm() / expected.norm()).item()
        middle = 1000 * statistics.median(times[len(times) // 2 :])
        print(f"| {name} | {middle:.1f} | {gib} | {difference:.1e} |", flush=True)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--shape", choices=["7b", "135m", "tiny"], default="7b")
    late = "cases that would start too late are left out"
    parser.add_argument("--minutes", type=float, default=5.0, help=late)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="cases to skip")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    print(f"{device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}: "
          f"python tests/gpu.py {' '.join(sys.argv[1:])}\n", flush=True)  # fmt: skip
    globals()[options.part](options, lambda: end - time.monotonic())


if __name__ == "__main__":
    main()

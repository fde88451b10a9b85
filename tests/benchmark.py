"""How fast and how lean the scripts are, on random weights.

    python tests/benchmark.py --against trl              # against TRL + PEFT on the same work
    python tests/benchmark.py --profile                  # where the time of a step goes
    python tests/benchmark.py --growth --layers 2        # tokens/s and memory by row length, rows and processes, and a picture of it

Both sides train the same random Llama on the same documents, in the same precision, with the same AdamW and no clipping
differences, each in a process of its own, in turn: ours, theirs, ours, theirs ... Documents are of one length, so that both fill
the same rows. Printed are medians of tokens/s (the first two steps are not counted) and of peak memory above the loaded model
(resident memory on a CPU, allocated memory on a GPU), their ratio, and the spread over the repeats.

TRL and PEFT run with their defaults but for two things, so that both sides do the same work:
- TRL makes QLoRA's adapters bfloat16; they are made float32 again before the first step, as ours are.
- On a GPU, TRL's packed rows run the flash kernel that ours run, PyTorch's `varlen_attn`. TRL itself takes any attention that
  transformers knows, but transformers' sdpa builds a (T, T) mask for packed rows, which no flash kernel takes, and its
  flash_attention_2 needs a package that is not installed here. So `packed_attention` is registered under a name of its own; it
  reads the documents' bounds that TRL's collator makes. On a CPU, theirs is transformers' sdpa. Padded rows are sdpa on both sides.
"""

import argparse
import ctypes
import gc
import inspect
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "135m": (576, 1536, 30, 9, 3, 49152),  # SmolLM2-135M
    "8x576": (576, 1536, 8, 9, 3, 49152),  # the same with 8 layers, for slow machines
    "7b": (4096, 11008, 32, 32, 32, 32000),  # Llama-2-7B
    "65b": (8192, 22016, 80, 64, 64, 32000),  # LLaMA-65B, for QLoRA
    "tiny": (128, 384, 2, 4, 2, 512),
}
PREFERENCES = ("dpo", "orpo", "reward")
METHODS = ("lora", "dora", "qlora", "full", "sft", *PREFERENCES, "ppo")


def make_work(folder: Path, args) -> None:
    """A configuration, a tokenizer and the rows: a byte a token, all rows of one length but with --against padding."""
    import numpy as np
    import transformers

    import common

    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[args.shape]
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=args.layers or layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=65536, tie_word_embeddings=args.shape not in ("7b", "65b"),
        bos_token_id=None, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tokenizer = common.tiny_tokenizer()
    # the same tokens on both sides: no line break behind the end of turn, and TRL's marks around what is a target
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    around = len(common.render(tokenizer, [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]))
    prompt, answer = args.document // 4, args.document - args.document // 4 - around

    def text(n: int, length: int) -> str:
        return "".join(chr(97 + (n * 7 + i * i) % 26) for i in range(length))

    sizes = [(prompt, answer)] * ((args.steps + 1) * args.rows * max(1, args.length // args.document))
    if "padding" in args.against:  # one-liners and essays: log-normal, as long as --document at the median
        lengths = np.random.default_rng(0).lognormal(math.log(args.document), 1.0, (args.steps + 1) * 64).clip(around + 8, args.length).astype(int)
        sizes = [(int(n) // 4, int(n) - int(n) // 4 - around) for n in lengths]
    with open(folder / "rows.jsonl", "w") as file:
        for n, (asked, answered) in enumerate(sizes):
            turns = {"prompt": [{"role": "user", "content": text(n, asked)}], "completion": [{"role": "assistant", "content": text(n + 1, answered)}]}
            file.write(json.dumps(turns) + "\n")
    with open(folder / "pairs.jsonl", "w") as file:
        for n in range((args.steps + 1) * args.rows):
            pair = {key: [{"role": "assistant", "content": text(n + k, answer)}] for k, key in ((1, "chosen"), (2, "rejected"))}
            file.write(json.dumps({"prompt": [{"role": "user", "content": text(n, prompt)}], **pair}) + "\n")


CGROUP = Path("/sys/fs/cgroup")


def host_memory() -> tuple[int, int] | None:
    """Bytes that this container holds now and at most since it began, page cache and all processes included."""
    files = [CGROUP / "memory.current", CGROUP / "memory.peak"]
    return tuple(int(file.read_text()) for file in files) if all(file.exists() for file in files) else None


class Meter:
    """Time of each step but the first `skip`, and memory above what there was when training began."""

    def __init__(self, skip: int):
        self.skip, self.host = skip, host_memory()

    def begin(self) -> None:
        import torch

        self.cuda, self.times = torch.cuda.is_available(), []
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what loading has freed goes back to the system, or training would seem to take less
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            self.before = self.resident("VmRSS")
        self.last = time.perf_counter()

    def resident(self, name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    def step(self) -> None:
        import torch

        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.times.append(now - self.last)
        self.last = now

    def report(self, tokens_per_step: float, **more) -> None:
        import torch

        peak = torch.cuda.max_memory_allocated() if self.cuda else self.resident("VmHWM")
        times = self.times[self.skip :]
        if self.cuda:  # pinned memory, which may be missing in the process's own
            more["pinned_gib"] = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0) / 2**30
        if self.host and host_memory()[1] > self.host[1]:  # else the container once held more, and its peak says nothing of this run
            more["container_gib"] = (host_memory()[1] - self.host[0]) / 2**30
        print("RESULT", json.dumps({"tokens_per_second": tokens_per_step * len(times) / sum(times), "gib": (peak - self.before) / 2**30,
                                    "loaded_gib": self.before / 2**30, "host_gib": self.resident("VmHWM") / 2**30, "steps": len(times), **more}))  # fmt: skip


def like_the_first_block(model, config):
    """A model of all the configuration's blocks, each with the weights of the one block that the model has: a 65B in 3.7 GB."""
    import torch

    with torch.device("meta"):
        whole = type(model)(config).to(model.dtype)
    for name, module in model.named_children():
        if not hasattr(module, "layers"):
            setattr(whole, name, module)
    backbone, one = whole.base_model, model.base_model
    for name, module in one.named_children():
        if name != "layers":
            setattr(backbone, name, module)
    for block in backbone.layers:
        block.load_state_dict(one.layers[0].state_dict(), assign=True)
    return whole.eval()


def random_weights(folder: str, dtype) -> None:
    """from_pretrained of that folder makes random weights on the device instead of reading any."""
    import torch
    import transformers

    def patch(auto_class):
        original = auto_class.from_pretrained.__func__

        def from_pretrained(cls, name, *args, **options):
            if str(name) != folder:
                return original(cls, name, *args, **options)
            config = transformers.AutoConfig.from_pretrained(folder)
            config.num_labels = options.get("num_labels", config.num_labels)
            too_large = config.hidden_size == SHAPES["65b"][0]
            if too_large:
                config.num_hidden_layers = 1
            torch.manual_seed(0)
            with torch.device("cuda" if torch.cuda.is_available() and not too_large else "cpu"):
                make = cls.from_config if hasattr(cls, "from_config") else cls._from_config
                model = make(config, dtype=options.get("dtype") or options.get("torch_dtype") or dtype).eval()
            if too_large:
                model = like_the_first_block(model, transformers.AutoConfig.from_pretrained(folder))
            return (model, {"missing_keys": [], "unexpected_keys": []}) if options.get("output_loading_info") else model

        auto_class.from_pretrained = classmethod(from_pretrained)

    for auto_class in (transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification, transformers.LlamaForCausalLM):
        patch(auto_class)


def quantized_with_bitsandbytes(model):
    """Every linear layer of the blocks in NF4, as transformers' load_in_4bit leaves them."""
    import bitsandbytes
    import torch

    for name, layer in list(model.base_model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            small = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=layer.weight.dtype, quant_type="nf4")
            small.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4").to(layer.weight.device)
            model.base_model.set_submodule(name, small)
    model.is_loaded_in_4bit = True  # what TRL and PEFT ask
    return model


def data_of(folder: str, args) -> str:
    return f"{folder}/{'pairs' if args.method in (*PREFERENCES, 'ppo') else 'rows'}.jsonl"


def script_of(method: str) -> str:
    return {"full": "full_ft", "reward": "reward_model"}.get(method, method)


def flags_of(folder: str, args) -> list[str]:
    """The command line of our script."""
    flags = ["--model", folder, "--output", f"{folder}/ours", "--max-steps", str(args.steps), "--batch-size", str(args.rows), "--samples", "0",
             "--eval-fraction", "0", "--log-every", "1", "--save-every", "100000", "--max-length", str(args.length), "--max-grad-norm", "1",
             "--data", data_of(folder, args)]  # fmt: skip
    flags += ["--no-packing", "--batch-size", "16"] if args.worker == "padding" else []
    flags += ["--gradient-checkpointing"] * args.recompute
    flags += ["--rank", "8", "--alpha", "16"] if args.method in ("lora", "dora", "qlora") else []
    flags += ["--lora-rank", "8", "--lora-alpha", "16"] if args.lora and args.method in ("sft", *PREFERENCES, "ppo") else []
    flags += ["--response-length", str(args.length - args.document)] if args.method == "ppo" else []
    return flags + shlex.split(args.flags)


def ours(folder: str, args) -> None:
    import torch

    import common

    meter = Meter(args.skip)
    begin, end_step = common.Run.begin, common.Run.end_step
    common.Run.begin = lambda run: (begin(run), meter.begin())
    rates = {"rollout_tokens_per_second": [], "update_tokens_per_second": []}  # of ppo

    def timed_end_step(run, epoch, sums, *rest):
        for name in rates.keys() & sums.keys():
            rates[name].append(sums[name].item() * common.world_size())
        end_step(run, epoch, sums, *rest)
        meter.step()

    common.Run.end_step = timed_end_step
    common.check_head = lambda *_, **__: None  # random weights: nothing to check
    common.Run.save_checkpoint = lambda run: None  # after the last step, and no part of it
    random_weights(folder, torch.float32)
    if args.profile:
        profile_steps()
    flags = flags_of(folder, args)

    def report_and_stop(run):  # before anything is saved: only the steps count
        meter.report(run.tokens / run.step, **{name: statistics.median(values[args.skip :]) for name, values in rates.items() if values})
        os._exit(0)

    common.Run.show_samples = report_and_stop
    __import__(script_of(args.method)).main(flags)


# aten operations by what they are for; what is not listed counts as the rest
KINDS = {
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "matmul"),
    "attention": ("scaled_dot_product", "_scaled_dot_product", "_flash_attention", "varlen"),
    "softmax over the vocabulary": ("log_softmax", "_log_softmax", "logsumexp", "exp", "exp_", "amax", "div_", "sub_", "neg_", "scatter_add_", "gather"),
    "optimizer and clipping": ("_fused_adamw", "_foreach", "linalg_vector_norm"),
    "copies": ("copy_", "cat", "fill_", "index_select", "clone", "zero_"),
    "element by element": ("mul", "add", "silu", "sigmoid", "pow", "rsqrt", "mean", "sum", "neg", "div", "_fused_rms_norm", "gelu", "embedding", "cos", "sin"),
}  # fmt: skip


REST = "the rest: autograd, views, Python"


def time_by_kind(events, on_gpu: bool) -> dict[str, float]:
    """A profiler's averaged events -> microseconds by kind, on the GPU or on the CPU.

    On a GPU each kernel is there twice, under the operation that launched it (device_type CPU) and under its own name, and a
    user annotation, such as an optimizer's step, spans kernels that have rows of their own. So operations say what a kernel was
    for, kernels how long all of them took, annotations nothing; a kernel that no operation launched is part of the rest.
    """
    from torch.autograd import DeviceType

    times = dict.fromkeys([*KINDS, REST], 0.0)
    for event in events:
        if on_gpu and event.device_type != DeviceType.CPU:
            times[REST] += 0.0 if event.is_user_annotation else event.self_device_time_total
            continue
        name = event.key.removeprefix("aten::")
        kind = next((kind for kind, names in KINDS.items() if name in names or name.startswith(tuple(n for n in names if n[0] == "_"))), None)
        kind = kind if event.key.startswith("aten::") and kind else REST
        if not on_gpu:
            times[kind] += event.self_cpu_time_total
        elif kind != REST:  # out of the rest, which has all kernels
            times[kind] += event.self_device_time_total
            times[REST] -= event.self_device_time_total
    return times


def profile_steps(first: int = 2, last: int = 4) -> None:
    """Profile some steps of the run that follows, print where their time went, and end the process."""
    import torch

    import common

    end_step, profiler = common.Run.end_step, torch.profiler.profile()

    def counted_end_step(run, *rest):
        end_step(run, *rest)
        if run.step == first:
            profiler.__enter__()
        if run.step == last:
            profiler.__exit__(None, None, None)
            times = time_by_kind(profiler.key_averages(), torch.cuda.is_available())
            print("RESULT", json.dumps({"ms": {kind: time / 1e3 / (last - first) for kind, time in times.items()}}), flush=True)
            os._exit(0)

    common.Run.end_step = counted_end_step


def packed_attention():
    """The attention of theirs on a GPU, in the form of a transformers attention function: causal inside each document of a row that
    TRL has packed, with PyTorch's flash kernel. No mask function is registered beside it, and so transformers makes no mask."""
    import torch
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.13 wants to be told that there may be fewer key-value heads; 2.11 has no such option, and its kernel takes them
    gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, cu_seq_lens_q=None, max_length_q=None, **_):
        """query (1, H, T, head_dim), key and value (1, H_kv, T, head_dim), cu_seq_lens_q (documents + 1,) -> (1, T, H, head_dim), None"""
        if cu_seq_lens_q is None or attention_mask is not None or dropout:
            raise NotImplementedError("only packed rows, without a mask and without dropout")
        if query.dtype == torch.float32 and torch.is_autocast_enabled(query.device.type):  # rotary embedding is in float32 then
            query, key = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key))
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value.to(query.dtype)))  # -> (T, H, head_dim)
        bounds, longest = cu_seq_lens_q, max_length_q
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0), **gqa)[None], None

    return attend


def float32_adapters(model) -> None:
    """What trains, in float32: TRL makes the adapters of a model in 4 bits bfloat16."""
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()


def theirs(folder: str, args) -> None:
    import datasets
    import peft
    import torch
    import transformers
    import trl

    random_weights(folder, torch.float32)
    cuda, meter = torch.cuda.is_available(), Meter(args.skip)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in open(data_of(folder, args))]
    table = datasets.Dataset.from_list(rows)
    padding = args.worker == "trl-padding"
    options = dict(
        output_dir=f"{folder}/theirs", max_steps=args.steps, per_device_train_batch_size=16 if padding else args.rows, learning_rate=1e-4,
        max_grad_norm=1.0, include_num_input_tokens_seen="non_padding" if padding else "no",
        gradient_checkpointing=args.recompute, report_to=[], use_cpu=not cuda, bf16=cuda, save_strategy="no", logging_steps=1, disable_tqdm=True,
        optim="adamw_torch_fused", weight_decay=0.0,
    )  # fmt: skip
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS" if args.method == "reward" else "CAUSAL_LM",
                           use_dora=args.method == "dora")  # fmt: skip
    adapter = args.method in ("lora", "dora", "qlora") or args.lora
    auto_class = transformers.AutoModelForSequenceClassification if args.method == "reward" else transformers.AutoModelForCausalLM
    dtype, head = torch.bfloat16 if cuda and adapter else torch.float32, {"num_labels": 1} if args.method == "reward" else {}
    model = auto_class.from_pretrained(folder, dtype=dtype, **head)
    if args.method == "qlora":
        model = quantized_with_bitsandbytes(model)
    if cuda and args.method not in PREFERENCES and not padding:
        transformers.AttentionInterface.register("packed", packed_attention())
        model.set_attn_implementation("packed")
    common_args = dict(model=model, processing_class=tokenizer, train_dataset=table, peft_config=lora if adapter else None)
    if args.method in ("lora", "dora", "qlora", "full", "sft"):
        config = trl.SFTConfig(**options, max_length=args.length, packing=not padding, completion_only_loss=True)
        trainer = trl.SFTTrainer(args=config, **common_args)
    elif args.method == "dpo":
        trainer = trl.DPOTrainer(args=trl.DPOConfig(**options, max_length=args.length), **common_args)
    elif args.method == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        trainer = ORPOTrainer(args=ORPOConfig(**options, max_length=args.length), **common_args)
    else:
        trainer = trl.RewardTrainer(args=trl.RewardConfig(**options, max_length=args.length), **common_args)

    if args.method == "qlora":
        float32_adapters(trainer.model)

    class Callback(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            meter.begin()

        def on_step_end(self, *_, **__):
            meter.step()

    trainer.add_callback(Callback())
    trainer.train()
    per_row = args.document * 2 if args.method in PREFERENCES else args.length // args.document * args.document
    meter.report(trainer.state.num_input_tokens_seen / args.steps if padding else args.rows * per_row)
    os._exit(0)


def measure(side: str, folder: str, args, seconds: float | None = None) -> dict:
    """One run of a side, "ours" or one of --against, in a process of its own -> what `Meter.report` printed, or {"error": [a line]}."""
    command = [sys.executable, __file__, "--worker", side, "--folder", folder]
    if args.processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}", *command[1:]]
    for name in ("against", "method", "shape", "steps", "rows", "length", "document", "skip"):
        command += [f"--{name}", str(getattr(args, name))]
    command += [f"--flags={args.flags}"]
    command += ["--recompute"] * args.recompute + ["--lora"] * args.lora + ["--profile"] * args.profile
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    try:
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": [f"not done after {seconds:.0f} s"]}
    line = next((line for line in run.stdout.splitlines() if line.startswith("RESULT")), None)
    if line is None:
        return {"error": (run.stderr or run.stdout).strip().splitlines()[-1:]}
    return json.loads(line.removeprefix("RESULT"))


def profile(args) -> None:
    print(f"| method | ms a step | {' | '.join(KINDS)} | {REST} |\n" + "|---" * (len(KINDS) + 3) + "|")
    for args.method in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            make_work(Path(folder), args)
            result = measure("ours", folder, args)
        if "error" in result:
            print(f"| {args.method} | failed: {result['error']} |")
            continue
        total = sum(result["ms"].values())
        print(f"| {args.method} | {total:,.0f} | {' | '.join(f'{ms / total:.1%}' for ms in result['ms'].values())} |", flush=True)


def growth(args) -> None:
    """One figure grows at a time. Rows are packed, so 8 rows of 512 are one row of 4,096 to the model."""
    args.method = args.methods[0]
    lengths = [512 * 2**n for n in range(7) if 512 * 2**n <= args.until]
    series = {
        "one document a row": [dict(length=n, document=n, rows=1, processes=1) for n in lengths],
        "documents of 512 in a row": [dict(length=n, document=512, rows=1, processes=1) for n in lengths],
        "rows of 512 a step": [dict(length=512, document=512, rows=n, processes=1) for n in (1, 2, 4, 8) if 512 * n <= args.until],
        "processes, a row of 2,048 each": [dict(length=2048, document=512, rows=1, processes=n) for n in (1, 2)] * (args.processes > 1),
    }
    print("| what grows | tokens a step | tokens/s | GiB above the loaded model, a process |\n|---|---|---|---|")
    curves = {}
    for name, points in series.items():
        for point in points:
            vars(args).update(point)
            with tempfile.TemporaryDirectory() as folder:
                make_work(Path(folder), args)
                result = measure("ours", folder, args)
            tokens = args.length * args.rows * args.processes
            if "error" in result:
                print(f"| {name} | {tokens:,} | failed: {result['error']} |", flush=True)
                continue
            curves.setdefault(name, []).append((tokens, result["tokens_per_second"], result["gib"]))
            print(f"| {name} | {tokens:,} | {result['tokens_per_second']:,.0f} | {result['gib']:.2f} |", flush=True)
    if curves:
        args.picture.write_text(growth_picture(curves), encoding="utf-8")


def growth_picture(curves: dict[str, list[tuple[int, float, float]]]) -> str:
    """tokens/s on the left, memory on the right, by tokens a step, all axes logarithmic. -> SVG"""
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 400" font-family="sans-serif" font-size="12">',
             '<rect width="920" height="400" fill="white"/>']  # fmt: skip
    all_points = [point for curve in curves.values() for point in curve]
    for panel, (left, title) in enumerate(((60, "tokens/s by tokens a step"), (520, "GiB above the loaded model by tokens a step"))):
        values, tokens = [math.log2(point[1 + panel]) for point in all_points], [math.log2(point[0]) for point in all_points]
        low, high, first, last = math.floor(min(values)), math.ceil(max(values)), min(tokens), max(tokens)

        def x(n, left=left, first=first, last=last):
            return left + 360 * (math.log2(n) - first) / max(1, last - first)

        def y(value, low=low, high=high):
            return 320 - 280 * (math.log2(value) - low) / max(1, high - low)

        parts.append(f'<text x="{left}" y="22" font-size="14">{title}</text>')
        for power in range(low, high + 1):
            line = f'<line x1="{left}" x2="{left + 360}" y1="{y(2.0**power):.1f}" y2="{y(2.0**power):.1f}" stroke="#ddd"/>'
            value = f"{2.0**power:,.0f}" if power >= 0 else f"{2.0**power:.2g}"
            parts.append(f'{line}<text x="{left - 6}" y="{y(2.0**power) + 4:.1f}" text-anchor="end">{value}</text>')
        for power in range(math.ceil(first), math.floor(last) + 1):
            parts.append(f'<text x="{x(2**power):.1f}" y="338" text-anchor="middle">{2**power:,}</text>')
        for (name, curve), color, dash in zip(curves.items(), ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728"), ("none", "none", "6 4", "2 3")):
            path = " ".join(f"{x(point[0]):.1f},{y(point[1 + panel]):.1f}" for point in curve)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"/>')
    for n, (name, color) in enumerate(zip(curves, ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728"))):
        parts.append(f'<rect x="{60 + 215 * n}" y="362" width="12" height="12" fill="{color}"/><text x="{78 + 215 * n}" y="373">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--against", choices=["trl", "trl-padding", "padding", "nothing"], default="trl",
        help="padding, trl-padding: our packed rows against ours, or TRL's, padded, 16 in a micro-batch; documents then have log-normal "
        "lengths with --document as the median")  # fmt: skip
    add("--methods", nargs="+", default=["lora"], choices=METHODS)
    add("--shape", choices=SHAPES, default="8x576")
    add("--layers", type=int, help="other than the shape's own number")
    add("--length", type=int, default=1024, help="tokens a packed row")
    add("--document", type=int, default=256, help="tokens a document; of preference data, of prompt and one answer")
    add("--rows", type=int, default=1, help="rows, or pairs, a step")
    add("--steps", type=int, default=6)
    add("--skip", type=int, default=2, help="of these steps, how many come before the clock starts")
    add("--processes", type=int, default=1, help="of ours, under torchrun, each with its own rows; 2 with --growth: that series, too")
    add("--repeats", type=int, default=3)
    add("--recompute", action="store_true", help="gradient checkpointing on both sides")
    add("--lora", action="store_true", help="LoRA in sft, dpo, orpo, reward and ppo as well")
    add("--flags", default="", help="more flags for our script, in one string")
    add("--profile", action="store_true", help="of ours: milliseconds of a step, by kind of operation")
    add("--growth", action="store_true", help="of ours: a table over row lengths, rows and processes, and a picture of it")
    add("--until", type=int, default=32768, help="of --growth: at most so many tokens a row, and a step of rows of 512")
    add("--picture", type=Path, default=ROOT / "examples" / "growth.svg", help="where --growth writes it")
    add("--json", type=Path, help="write the figures here, too")
    for name in ("--worker", "--method", "--folder"):
        add(name, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    if args.worker:
        return (theirs if args.worker.startswith("trl") else ours)(args.folder, args)
    if args.profile or args.growth:
        return profile(args) if args.profile else growth(args)
    results = {}
    print(f"| method | tokens/s, ours | {args.against} | ratio (spread) | GiB above the loaded model, ours | {args.against} | ratio |\n|---|---|---|---|---|---|---|")
    for args.method in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            make_work(Path(folder), args)
            sides = ["ours"] + [args.against] * (args.against != "nothing" and args.method != "ppo")
            runs = {side: [] for side in sides}
            for _ in range(args.repeats):
                for side in sides:
                    runs[side].append(measure(side, folder, args))
        errors = [(side, run["error"]) for side in sides for run in runs[side] if "error" in run]
        if errors:
            print(f"| {args.method} | failed: {errors[0]} |")
            continue
        speed, memory = ({side: statistics.median(run[key] for run in runs[side]) for side in sides} for key in ("tokens_per_second", "gib"))
        speed.setdefault(args.against, math.nan), memory.setdefault(args.against, math.nan)
        ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(runs["ours"], runs.get(args.against, []))] or [math.nan]
        print(f"| {args.method} | {speed['ours']:,.0f} | {speed[args.against]:,.0f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
              f"{memory['ours']:.2f} | {memory[args.against]:.2f} | {memory['ours'] / memory[args.against]:.2f} |", flush=True)  # fmt: skip
        for name in ("rollout_tokens_per_second", "update_tokens_per_second") if args.method == "ppo" else ():
            print(f"| {name} | {statistics.median(run[name] for run in runs['ours']):,.0f} | | | | | |", flush=True)
        results[args.method] = runs
    if args.json:
        args.json.write_text(json.dumps({"args": {k: v for k, v in vars(args).items() if k != "json"}, "results": results}, indent=1, default=str))


if __name__ == "__main__":
    main()

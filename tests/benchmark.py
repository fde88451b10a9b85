"""Speed and memory of the scripts, on random weights.

    python tests/benchmark.py --against trl        # against TRL + PEFT on the same work
    python tests/benchmark.py --profile            # where the time of a step goes
    python tests/benchmark.py --growth --layers 2  # tokens/s and memory by row length, rows and
                                                   # processes, and a picture of it

Both sides train the same random Llama on the same documents, with the same precision, AdamW and
clipping. Each run is its own process, and the sides take turns: ours, theirs, ours, theirs ... All
documents have the same length, so both sides pack them into the same rows of --length tokens. A
step is one forward pass over --rows such rows. The table has medians of tokens/s (without the first
two steps) and of peak memory above the loaded model (resident memory on a CPU, allocated memory on
a GPU), their ratios, and the spread over the repeats.

TRL and PEFT run with their defaults, with two exceptions, so that both sides do the same work:
- TRL makes QLoRA's adapters bfloat16. They are made float32 again before the first step, as ours
  are.
- On a GPU, TRL's packed rows use the same flash kernel as ours, PyTorch's `varlen_attn`. TRL
  supports every attention of transformers. But transformers' sdpa builds a (T, T) mask for packed
  rows, which no flash kernel supports, and its flash_attention_2 needs a package that is not
  installed. So `packed_attention` is registered as another attention function. It reads the
  documents' bounds that TRL's collator makes. On a CPU, TRL uses transformers' sdpa. Padded rows
  use sdpa on both sides.
"""

import argparse
import ctypes
import functools
import gc
import importlib
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
METHODS = ("lora", "dora", "adalora", "ia3", "qlora", "full", "sft", *PREFERENCES, "ppo")
PADDED = 16  # documents in a micro-batch of --against padding and trl-padding


def make_work(folder: Path, args) -> None:
    """Write a configuration, a tokenizer and the rows. A byte is a token. All rows have the same
    length, except with --against padding."""
    import numpy as np
    import transformers

    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[args.shape]
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
        num_hidden_layers=args.layers or layers, num_key_value_heads=kv_heads,
        vocab_size=vocabulary, max_position_embeddings=65536,
        tie_word_embeddings=args.shape not in ("7b", "65b"),
        bos_token_id=None, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny")
    # the same tokens on both sides: no line break after the end of turn, and TRL's marks around the
    # targets
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}"
        "{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    around = len(tokenizer(tokenizer.apply_chat_template(turns, tokenize=False)).input_ids)
    prompt, answer = args.document // 4, args.document - args.document // 4 - around

    def turn(role: str, n: int, length: int) -> list[dict]:
        text = "".join(chr(97 + (n * 7 + i * i) % 26) for i in range(length))
        return [{"role": role, "content": text}]

    sizes = [(prompt, answer)] * ((args.steps + 1) * examples_of_a_step(args))
    if "padding" in args.against:  # one-liners and essays: log-normal, --document at the median
        generator = np.random.default_rng(0)
        lengths = generator.lognormal(math.log(args.document), 1.0, (args.steps + 1) * 64)
        lengths = lengths.clip(around + 8, args.length).astype(int).tolist()
        sizes = [(n // 4, n - n // 4 - around) for n in lengths]
    with open(folder / "rows.jsonl", "w") as file:
        for n, (asked, answered) in enumerate(sizes):
            row = {"prompt": turn("user", n, asked)}
            row["completion"] = turn("assistant", n + 1, answered)
            file.write(json.dumps(row) + "\n")
    with open(folder / "pairs.jsonl", "w") as file:
        for n in range((args.steps + 1) * args.rows):
            pair = {"prompt": turn("user", n, prompt)}
            pair["chosen"] = turn("assistant", n + 1, answer)
            pair["rejected"] = turn("assistant", n + 2, answer)
            if args.real_pairs:
                row = real_pairs()[n % len(real_pairs())]
                pair = {key: [{"role": role, "content": row[key]}] for key, role in ROLES.items()}
            file.write(json.dumps(pair) + "\n")


ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}


@functools.cache
def real_pairs() -> list[dict]:
    """The rows of examples/preferences.jsonl; of ranked answers, the best and the worst."""
    lines = (ROOT / "examples" / "preferences.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    ranked = [row for row in rows if "responses" in row]
    for row in ranked:
        row |= {"chosen": row["responses"][0], "rejected": row["responses"][-1]}
    return [row for row in rows if all(isinstance(row.get(key), str) for key in ROLES)]


def tokens_of_pairs(folder: str, args) -> float:
    """Of the texts in a step. The prompt counts with each answer, as TRL computes it, so the ratio
    of the sides is that of pairs per second. A byte is a token."""
    total = rows = 0
    for row in map(json.loads, Path(data_of(folder, args)).read_text().splitlines()):
        texts = ("prompt", "prompt", "chosen", "rejected")
        total += sum(len(row[key][0]["content"].encode()) for key in texts)
        rows += 1
    return total / rows * args.rows


def examples_of_a_step(args) -> int:
    """Per process: the documents that fill the packed rows, or one padded micro-batch, or the
    pairs."""
    if args.method in PREFERENCES:
        return args.rows
    if "padding" in args.against:
        return PADDED
    return args.rows * max(1, args.length // args.document)


CGROUP = Path("/sys/fs/cgroup")


def host_memory() -> tuple[int, int] | None:
    """Bytes that this container holds now, and its peak, with the page cache and all
    processes."""
    files = [CGROUP / "memory.current", CGROUP / "memory.peak"]
    if not all(file.exists() for file in files):
        return None
    return tuple(int(file.read_text()) for file in files)


class Meter:
    """The time of each step after the first `skip`, and the memory above that at the start of
    training."""

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
            # return freed memory to the system, or training would seem to need less
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            self.before = self.resident("VmRSS")
        self.last = time.perf_counter()

    def resident(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024

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
        if self.cuda:  # pinned memory, which the process's figure may not include
            pinned = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)
            more["pinned_gib"] = pinned / 2**30
        # if the container held more before, its peak is not of this run
        if self.host and host_memory()[1] > self.host[1]:
            more["container_gib"] = (host_memory()[1] - self.host[0]) / 2**30
        figures = {
            "tokens_per_second": tokens_per_step * len(times) / sum(times),
            "gib": (peak - self.before) / 2**30,
            "loaded_gib": self.before / 2**30,
            "host_gib": self.resident("VmHWM") / 2**30,
            "steps": len(times),
        }
        print("RESULT", json.dumps(figures | more), flush=True)


class Profiler:
    """Profiles the steps between `first` and `last`, prints where their time went, and ends the
    process."""

    def __init__(self, first: int = 2, last: int = 4):
        import torch

        self.first, self.last, self.steps = first, last, 0
        self.cuda, self.profiler = torch.cuda.is_available(), torch.profiler.profile()

    def begin(self) -> None:
        pass

    def step(self) -> None:
        self.steps += 1
        if self.steps == self.first:
            self.profiler.__enter__()
        if self.steps == self.last:
            self.profiler.__exit__(None, None, None)
            times = time_by_kind(self.profiler.key_averages(), self.cuda)
            steps = self.last - self.first
            figures = {kind: time / 1e3 / steps for kind, time in times.items()}
            print("RESULT", json.dumps({"ms": figures}), flush=True)
            os._exit(0)


def like_the_first_block(model, config):
    """A model with all blocks of the configuration, which share the weights of the model's only
    block: a 65B in 3.7 GB."""
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
    """Make from_pretrained(folder) create random weights on the device."""
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
                kind = options.get("dtype") or options.get("torch_dtype") or dtype
                model = make(config, dtype=kind).eval()
            if too_large:
                model = like_the_first_block(model, transformers.AutoConfig.from_pretrained(folder))
            if options.get("output_loading_info"):
                return model, {"missing_keys": [], "unexpected_keys": []}
            return model

        auto_class.from_pretrained = classmethod(from_pretrained)

    for auto_class in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForSequenceClassification,
        transformers.LlamaForCausalLM,
    ):
        patch(auto_class)


def quantized_with_bitsandbytes(model):
    """Make every linear layer of the blocks NF4, as transformers' load_in_4bit does."""
    import bitsandbytes
    import torch

    for name, layer in list(model.base_model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            kind = {"compute_dtype": layer.weight.dtype, "quant_type": "nf4"}
            sizes = layer.in_features, layer.out_features
            small = bitsandbytes.nn.Linear4bit(*sizes, bias=False, **kind)
            kind = {"requires_grad": False, "quant_type": "nf4"}
            weight = bitsandbytes.nn.Params4bit(layer.weight.data, **kind)
            small.weight = weight.to(layer.weight.device)
            model.base_model.set_submodule(name, small)
    model.is_loaded_in_4bit = True  # what TRL and PEFT ask
    return model


def data_of(folder: str, args) -> str:
    return f"{folder}/{'pairs' if args.method in (*PREFERENCES, 'ppo') else 'rows'}.jsonl"


def script_of(method: str) -> str:
    return {"full": "full_ft", "reward": "reward_model"}.get(method, method)


def flags_of(folder: str, args) -> list[str]:
    """The command line of our script."""
    flags = ["--model", folder, "--data", data_of(folder, args), "--output", f"{folder}/ours"]
    flags += f"--max-steps {args.steps} --samples 0 --save-every 100000 --max-grad-norm 1".split()
    flags += ["--max-length", str(args.length)]
    padding = "padding" in args.against
    examples, processes = examples_of_a_step(args), int(os.environ.get("WORLD_SIZE", 1))
    flags += ["--eval-data", "0", "--overwrite", "--batch-size", str(examples * processes)]
    longest = examples if padding else args.rows  # of --length tokens: one forward pass
    flags += ["--micro-batch-tokens", str(longest * args.length)]
    flags += ["--no-packing"] * (args.worker == "padding")
    flags += ["--gradient-checkpointing"] * args.recompute
    if args.method in ("lora", "dora", "adalora", "qlora", "ppo"):
        flags += ["--rank", "8", "--alpha", "16"]
    if args.method == "adalora":
        flags += ["--target-rank", "4"]
    if args.lora and args.method in ("sft", *PREFERENCES):
        flags += ["--lora-rank", "8", "--lora-alpha", "16"]
    if args.method == "ppo":
        flags += ["--response-length", str(args.length - args.document), "--reward"]
        flags += [f"{ROOT / 'examples' / 'rewards.py'}:lowercase", "--rollout-size", "16"]
        flags += ["--batch-size", "4"]
    return flags + shlex.split(args.flags)


def ours(folder: str, args) -> None:
    import torch

    random_weights(folder, torch.float32)
    meter = Profiler() if args.profile else Meter(args.skip)
    script = importlib.import_module(script_of(args.method))
    watch(script, meter, folder, args)
    script.main(flags_of(folder, args))


def watch(script, meter, folder: str, args) -> None:
    """Measure the run that follows. Only the steps count: the process ends after the last one,
    before answers are generated or the result is saved."""
    import common

    step_done, rates, plain = common.Log.step_done, [], []

    def timed_step_done(log, *rest, **figures):
        step_done(log, *rest, **figures)
        meter.step()

    def answer_samples(*rest):  # before and after training
        log = rest[-1]
        if log.run["step"] == 0:
            meter.begin()
            return []
        pairs = args.method in PREFERENCES
        tokens = tokens_of_pairs(folder, args) if pairs else log.run["tokens"] / log.run["step"]
        meter.report(tokens)
        os._exit(0)

    def timed_rollout(*rest):
        if not hasattr(meter, "last"):
            meter.begin()
        plain.append(generate_speed(*rest))
        meter.last = time.perf_counter()
        answers = write_answers(*rest)
        count = sum(len(answer.ids) for answer in answers)
        rates.append(count / (time.perf_counter() - meter.last))
        return answers

    def report(log, *rest):
        names = "rollout_tokens_per_second", "generate_tokens_per_second"
        speeds = [statistics.median(x[meter.skip :]) for x in (rates, plain)]
        meter.report(log.run["tokens"] / log.run["step"], **dict(zip(names, speeds)))
        os._exit(0)

    common.Log.step_done, script.answer_samples = timed_step_done, answer_samples
    if script.__name__ == "ppo":
        write_answers, script.write_answers = script.write_answers, timed_rollout
        common.Log.done, common.save_adapter = report, lambda *_: None
    common.check_model = lambda *_, **__: None  # random weights: nothing to check


def generate_speed(model, reward, tokenizer, examples, args, device, step) -> float:
    """Tokens/s of transformers' generate(do_sample=True) from the same prompts as a rollout."""
    import torch

    import common

    prompts = [torch.as_tensor(ids)[mark == 0] for ids, mark in zip(*map(examples.get, COLUMNS))]
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    options = {"max_new_tokens": args.response_length, "pad_token_id": tokenizer.pad_token_id}
    start = time.perf_counter()
    with common.evaluating(model), common.own_attention(model):
        ids = model.generate(**inputs.to(device), **options, do_sample=True, top_k=0)
    width = inputs["input_ids"].shape[1]
    return (ids[:, width:] != tokenizer.pad_token_id).sum().item() / (time.perf_counter() - start)


COLUMNS = "input_ids", "is_target"

# aten operations by purpose; others count as the rest
KINDS = {
    "matrix products": "mm addmm addmm_ bmm baddbmm linear matmul".split(),
    "attention": "scaled_dot_product _scaled_dot_product _flash_attention varlen".split(),
    "softmax over the vocabulary": """log_softmax _log_softmax logsumexp exp exp_ amax div_ sub_
        neg_ scatter_add_ gather""".split(),
    "optimizer and clipping": "_fused_adamw _foreach linalg_vector_norm".split(),
    "copies": "copy_ cat fill_ index_select clone zero_".split(),
    "element by element": """mul add silu sigmoid pow rsqrt mean sum neg div _fused_rms_norm gelu
        embedding cos sin""".split(),
}


REST = "the rest: autograd, views, Python"


def time_by_kind(events, on_gpu: bool) -> dict[str, float]:
    """A profiler's averaged events -> microseconds by kind, on the GPU or on the CPU.

    On a GPU each kernel is there twice, under the operation that launched it (device_type CPU) and
    under its own name, and a user annotation, such as an optimizer's step, spans kernels that have
    rows of their own. So operations say what a kernel was for, kernels how long all of them took,
    annotations nothing; a kernel that no operation launched is part of the rest.
    """
    from torch.autograd import DeviceType

    times = dict.fromkeys([*KINDS, REST], 0.0)
    for event in events:
        if on_gpu and event.device_type != DeviceType.CPU:
            times[REST] += 0.0 if event.is_user_annotation else event.self_device_time_total
            continue
        name, kind = event.key.removeprefix("aten::"), REST
        for found, names in KINDS.items():
            prefixes = tuple(name for name in names if name[0] == "_")
            if event.key.startswith("aten::") and (name in names or name.startswith(prefixes)):
                kind = found
                break
        if not on_gpu:
            times[kind] += event.self_cpu_time_total
        elif kind != REST:  # out of the rest, which has all kernels
            times[kind] += event.self_device_time_total
            times[REST] -= event.self_device_time_total
    return times


def packed_attention():
    """The attention of theirs on a GPU, in the form of a transformers attention function: causal
    inside each document of a row that TRL has packed, with PyTorch's flash kernel. No mask function
    is registered beside it, and so transformers makes no mask."""
    import torch
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.13 must be told of grouped heads; 2.11 has no such option, and its kernel takes them
    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters
    kernel = functools.partial(varlen_attn, enable_gqa=True) if grouped else varlen_attn

    def attend(
        module, query, key, value, attention_mask, scaling=None, dropout=0.0, cu_seq_lens_q=None,
        max_length_q=None, **_,
    ):  # fmt: skip
        """query (1, H, T, head_dim), key and value (1, H_kv, T, head_dim), cu_seq_lens_q
        (documents + 1,) -> (1, T, H, head_dim), None"""
        if cu_seq_lens_q is None or attention_mask is not None or dropout:
            raise NotImplementedError("only packed rows, without a mask and without dropout")
        kind = query.device.type
        if query.dtype == torch.float32 and torch.is_autocast_enabled(kind):  # rotary embedding's
            query, key = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key))
        value = value.to(query.dtype)
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (T, H, head_dim)
        bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        return kernel(q, k, v, *bounds, scale=scaling, window_size=(-1, 0))[None], None

    return attend


def float32_adapters(model) -> None:
    """Make trained parameters float32: TRL makes the adapters of a 4-bit model bfloat16."""
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
    lines = Path(data_of(folder, args)).read_text().splitlines()
    table = datasets.Dataset.from_list([json.loads(line) for line in lines])
    padding, reward = args.worker == "trl-padding", args.method == "reward"
    options = {
        "output_dir": f"{folder}/theirs",
        "max_steps": args.steps,
        "per_device_train_batch_size": PADDED if padding else args.rows,
        "learning_rate": 1e-4,
        "max_grad_norm": 1.0,
        "include_num_input_tokens_seen": "non_padding" if padding else "no",
        "gradient_checkpointing": args.recompute,
        "report_to": [],
        "use_cpu": not cuda,
        "bf16": cuda,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_length": args.length,
    }
    task = "SEQ_CLS" if reward else "CAUSAL_LM"
    lora = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        task_type=task,
        use_dora=args.method == "dora",
    )
    if args.method == "ia3":
        names = {"target_modules": ["k_proj", "v_proj", "down_proj"]}
        lora = peft.IA3Config(**names, feedforward_modules=["down_proj"], task_type=task)
    if args.method == "adalora":
        ranks = {"init_r": 8, "target_r": 4, "total_step": args.steps, "tfinal": args.steps // 2}
        shared = {"lora_alpha": 16, "target_modules": "all-linear", "task_type": task}
        lora = peft.AdaLoraConfig(**ranks, **shared)
    adapter = args.method in ("lora", "dora", "adalora", "ia3", "qlora") or args.lora
    auto_class = transformers.AutoModelForCausalLM
    if reward:
        auto_class = transformers.AutoModelForSequenceClassification
    dtype = torch.bfloat16 if cuda and adapter else torch.float32
    model = auto_class.from_pretrained(folder, dtype=dtype, **{"num_labels": 1} if reward else {})
    if args.method == "qlora":
        model = quantized_with_bitsandbytes(model)
    if cuda and args.method not in PREFERENCES and not padding:
        transformers.AttentionInterface.register("packed", packed_attention())
        model.set_attn_implementation("packed")
    if args.method == "dpo":
        make, config = trl.DPOTrainer, trl.DPOConfig(**options)
    elif args.method == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        make, config = ORPOTrainer, ORPOConfig(**options)
    elif reward:
        make, config = trl.RewardTrainer, trl.RewardConfig(**options)
    else:
        config = trl.SFTConfig(**options, packing=not padding, completion_only_loss=True)
        make = trl.SFTTrainer
    more = {"processing_class": tokenizer, "train_dataset": table}
    trainer = make(model=model, args=config, peft_config=lora if adapter else None, **more)

    if args.method == "qlora":
        float32_adapters(trainer.model)

    class Callback(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            meter.begin()

        def on_optimizer_step(self, args_, state, *_, **__):
            if args.method == "adalora":  # PEFT leaves this to the loop
                trainer.model.base_model.update_and_allocate(state.global_step + 1)

        def on_step_end(self, *_, **__):
            meter.step()

    trainer.add_callback(Callback())
    trainer.train()
    tokens = args.rows * (args.length // args.document) * args.document
    if args.method in PREFERENCES:
        tokens = tokens_of_pairs(folder, args)
    if padding:
        tokens = trainer.state.num_input_tokens_seen / args.steps
    meter.report(tokens)
    os._exit(0)


def measure(side: str, folder: str, args, seconds: float | None = None) -> dict:
    """One run of a side ("ours" or one of --against) in its own process. -> what `Meter.report`
    printed, or {"error": [a line]}"""
    command = [sys.executable]
    if args.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={args.processes}"]
    command += [__file__, "--worker", side, "--folder", folder]
    for name in ("against", "method", "shape", "steps", "rows", "length", "document", "skip"):
        command += [f"--{name}", str(getattr(args, name))]
    command += [f"--flags={args.flags}"]
    for name in ("recompute", "lora", "profile"):
        command += [f"--{name}"] * getattr(args, name)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    environment["HF_DATASETS_CACHE"] = f"{folder}/cache"
    options = {"capture_output": True, "text": True, "env": environment, "timeout": seconds}
    try:
        run = subprocess.run(command, **options)
    except subprocess.TimeoutExpired:
        return {"error": [f"not done after {seconds:.0f} s"]}
    line = next((line for line in run.stdout.splitlines() if line.startswith("RESULT")), None)
    if line is None:
        return {"error": (run.stderr or run.stdout).strip().splitlines()[-1:]}
    return json.loads(line.removeprefix("RESULT"))


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def profile(args) -> None:
    print_row("method", "ms per step", *KINDS, REST)
    print("|---" * (len(KINDS) + 3) + "|")
    for method in args.methods:
        args.method = method
        with tempfile.TemporaryDirectory() as folder:
            make_work(Path(folder), args)
            result = measure("ours", folder, args)
        if "error" in result:
            print_row(method, f"failed: {result['error']}")
            continue
        total = sum(result["ms"].values())
        print_row(method, f"{total:,.0f}", *(f"{ms / total:.1%}" for ms in result["ms"].values()))


def growth(args) -> None:
    """One figure grows in each series. Rows are packed, so 8 rows of 512 tokens are one sequence of
    4,096 for the model."""
    args.method = args.methods[0]
    lengths = [512 * 2**n for n in range(7) if 512 * 2**n <= args.until]
    rows = [n for n in (1, 2, 4, 8) if 512 * n <= args.until]
    series = {  # (length, document, rows, processes)
        "one document a row": [(n, n, 1, 1) for n in lengths],
        "documents of 512 in a row": [(n, 512, 1, 1) for n in lengths],
        "rows of 512 a step": [(512, 512, n, 1) for n in rows],
    }
    if args.processes > 1:
        series["processes, a row of 2,048 each"] = [(2048, 512, 1, n) for n in (1, 2)]
    print_row("series", "tokens per step", "tokens/s", "GiB above the loaded model per process")
    print("|---|---|---|---|")
    curves = {}
    for name, points in series.items():
        for args.length, args.document, args.rows, args.processes in points:
            with tempfile.TemporaryDirectory() as folder:
                make_work(Path(folder), args)
                result = measure("ours", folder, args)
            tokens = args.length * args.rows * args.processes
            if "error" in result:
                print_row(name, f"{tokens:,}", f"failed: {result['error']}")
                continue
            speed, memory = result["tokens_per_second"], result["gib"]
            curves.setdefault(name, []).append((tokens, speed, memory))
            print_row(name, f"{tokens:,}", f"{speed:,.0f}", f"{memory:.2f}")
    if curves:
        args.picture.write_text(growth_picture(curves), encoding="utf-8")


COLORS, DASHES = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728"), ("none", "none", "6 4", "2 3")


def growth_picture(curves: dict[str, list[tuple[int, float, float]]]) -> str:
    """tokens/s on the left, memory on the right, by tokens per step, on logarithmic axes. -> SVG"""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 400" font-family="sans-serif" '
        'font-size="12">',
        '<rect width="920" height="400" fill="white"/>',
    ]

    def text(x: float, y: float, content: str, more: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{content}</text>'

    points = [point for curve in curves.values() for point in curve]
    tokens = [math.log2(point[0]) for point in points]
    first, last = min(tokens), max(tokens)
    for panel, title in enumerate(("tokens/s", "GiB above the loaded model")):
        left = (60, 520)[panel]
        values = [math.log2(point[1 + panel]) for point in points]
        low, high = math.floor(min(values)), math.ceil(max(values))

        def x(n, left=left):
            return left + 360 * (math.log2(n) - first) / max(1, last - first)

        def y(value, low=low, high=high):
            return 320 - 280 * (math.log2(value) - low) / max(1, high - low)

        parts.append(text(left, 22, f"{title} by tokens per step", ' font-size="14"'))
        for power in range(low, high + 1):
            height = f"{y(2.0**power):.1f}"
            ends = f'x1="{left}" x2="{left + 360}" y1="{height}" y2="{height}"'
            parts.append(f'<line {ends} stroke="#ddd"/>')
            value = f"{2.0**power:,.0f}" if power >= 0 else f"{2.0**power:.2g}"
            parts.append(text(left - 6, y(2.0**power) + 4, value, ' text-anchor="end"'))
        for power in range(math.ceil(first), math.floor(last) + 1):
            parts.append(text(x(2**power), 338, f"{2**power:,}", ' text-anchor="middle"'))
        for curve, color, dash in zip(curves.values(), COLORS, DASHES):
            path = " ".join(f"{x(point[0]):.1f},{y(point[1 + panel]):.1f}" for point in curve)
            line = f'fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"'
            parts.append(f'<polyline points="{path}" {line}/>')
    for n, (name, color) in enumerate(zip(curves, COLORS)):
        parts.append(f'<rect x="{60 + 215 * n}" y="362" width="12" height="12" fill="{color}"/>')
        parts.append(text(78 + 215 * n, 373, name))
    return "\n".join([*parts, "</svg>"]) + "\n"


def parse_args(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    padding = "padding, trl-padding: our packed rows against ours, or TRL's, padded, 16 in a micro-"
    padding += "batch; documents then have log-normal lengths with --document as the median"
    sides = ["trl", "trl-padding", "padding", "nothing"]
    add("--against", choices=sides, default="trl", help=padding)
    add("--methods", nargs="+", default=["lora"], choices=METHODS)
    add("--shape", choices=SHAPES, default="8x576")
    add("--layers", type=int, help="layers, if not the shape's number")
    add("--length", type=int, default=1024, help="tokens per packed row")
    document = "tokens per document; in preference data, per prompt and answer"
    add("--document", type=int, default=256, help=document)
    add("--rows", type=int, default=1, help="packed rows, or pairs, per step")
    add("--steps", type=int, default=6)
    skip = "steps before the measurement starts"
    add("--skip", type=int, default=2, help=skip)
    processes = "of ours, under torchrun, each with its own rows; with --growth: one more series"
    add("--processes", type=int, default=1, help=processes)
    add("--repeats", type=int, default=3)
    add("--recompute", action="store_true", help="gradient checkpointing on both sides")
    add("--lora", action="store_true", help="LoRA in sft, dpo, orpo and reward as well")
    real = "dpo, orpo, reward: use the pairs of examples/preferences.jsonl"
    add("--real-pairs", action="store_true", help=real)
    add("--flags", default="", help="more flags for our script, in one string")
    kinds = "ours: milliseconds per step, by kind of operation"
    add("--profile", action="store_true", help=kinds)
    grows = "ours: a table over row lengths, rows and processes, and a picture"
    add("--growth", action="store_true", help=grows)
    until = "--growth: maximum tokens per row, and per step of rows of 512"
    add("--until", type=int, default=32768, help=until)
    picture = ROOT / "examples" / "growth.svg"
    add("--picture", type=Path, default=picture, help="where --growth writes it")
    add("--json", type=Path, help="also write the figures to this file")
    for name in ("--worker", "--method", "--folder"):
        add(name, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def compare(args) -> None:
    """A table of ours against --against."""
    results, against = {}, args.against
    memory = "GiB above the loaded model, ours"
    print_row("method", "tokens/s, ours", against, "ratio (spread)", memory, against, "ratio")
    print("|---|---|---|---|---|---|---|")
    for method in args.methods:
        args.method = method
        alone = against == "nothing" or method == "ppo"
        runs = {side: [] for side in (["ours"] if alone else ["ours", against])}
        with tempfile.TemporaryDirectory() as folder:
            make_work(Path(folder), args)
            for _ in range(args.repeats):
                for side in runs:
                    runs[side].append(measure(side, folder, args))
        errors = [(side, run["error"]) for side in runs for run in runs[side] if "error" in run]
        if errors:
            print_row(method, f"failed: {errors[0]}")
            continue

        def median(side: str, key: str, runs=runs) -> float:
            return statistics.median(run[key] for run in runs[side]) if side in runs else math.nan

        key = "tokens_per_second"
        ratios = [a[key] / b[key] for a, b in zip(runs["ours"], runs.get(against, []))]
        ratios = ratios or [math.nan]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        speed = [f"{median(side, key):,.0f}" for side in ("ours", against)]
        memory = [median(side, "gib") for side in ("ours", against)]
        print_row(method, *speed, f"{statistics.median(ratios):.2f} ({spread})",
                  *(f"{gib:.2f}" for gib in memory), f"{memory[0] / memory[1]:.2f}")  # fmt: skip
        for name in ("rollout_tokens_per_second", "generate_tokens_per_second"):
            if method == "ppo":
                print_row(name, f"{median('ours', name):,.0f}", *[""] * 5)
        results[method] = runs
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        text = json.dumps({"args": settings, "results": results}, indent=1, default=str)
        args.json.write_text(text)


def main() -> None:
    args = parse_args()
    if args.worker:
        (theirs if args.worker.startswith("trl") else ours)(args.folder, args)
    elif args.profile or args.growth:
        (profile if args.profile else growth)(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()

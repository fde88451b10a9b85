"""Our scripts against TRL + PEFT on the same work: `python tests/benchmark.py --against trl` (--help for the rest).

Both sides train the same random Llama on the same documents, in the same precision, with the same AdamW and no clipping
differences, each in a process of its own, in turn: ours, theirs, ours, theirs ... Documents are of one length, so that both fill
the same rows. Printed are medians of tokens/s (the first two steps are not counted) and of peak memory above the loaded model
(resident memory on a CPU, allocated memory on a GPU), their ratio, and the spread over the repeats.
"""

import argparse
import json
import math
import os
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
    "tiny": (128, 384, 2, 4, 2, 512),
}
PREFERENCES = ("dpo", "orpo", "reward")
METHODS = ("lora", "dora", "qlora", "full", "sft", *PREFERENCES)


def make_work(folder: Path, args) -> None:
    """A configuration, a tokenizer and the rows: words of one byte a token, all rows of one length."""
    import transformers

    import common

    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[args.shape]
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=args.layers or layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=65536, tie_word_embeddings=args.shape != "7b",
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

    count = (args.steps + 1) * args.rows * max(1, args.length // args.document)
    with open(folder / "rows.jsonl", "w") as file:
        for n in range(count):
            turns = {"prompt": [{"role": "user", "content": text(n, prompt)}], "completion": [{"role": "assistant", "content": text(n + 1, answer)}]}
            file.write(json.dumps(turns) + "\n")
    with open(folder / "pairs.jsonl", "w") as file:
        for n in range((args.steps + 1) * args.rows):
            pair = {key: [{"role": "assistant", "content": text(n + k, answer)}] for k, key in ((1, "chosen"), (2, "rejected"))}
            file.write(json.dumps({"prompt": [{"role": "user", "content": text(n, prompt)}], **pair}) + "\n")


class Meter:
    """Time of each step, and memory above what there was when training began."""

    def begin(self) -> None:
        import torch

        self.cuda, self.times = torch.cuda.is_available(), []
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
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

    def report(self, tokens_per_step: int) -> None:
        import torch

        peak = torch.cuda.max_memory_allocated() if self.cuda else self.resident("VmHWM")
        times = self.times[2:]
        print("RESULT", json.dumps({"tokens_per_second": tokens_per_step * len(times) / sum(times), "gib": (peak - self.before) / 2**30,
                                    "loaded_gib": self.before / 2**30, "steps": len(times)}))  # fmt: skip


def random_weights(folder: str, dtype) -> None:
    """from_pretrained of that folder makes random weights on the device instead of reading any."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def patch(auto_class):
        original = auto_class.from_pretrained.__func__

        def from_pretrained(cls, name, *args, **options):
            if str(name) != folder:
                return original(cls, name, *args, **options)
            config = transformers.AutoConfig.from_pretrained(folder)
            config.num_labels = options.get("num_labels", config.num_labels)
            torch.manual_seed(0)
            with torch.device(device):
                make = cls.from_config if hasattr(cls, "from_config") else cls._from_config
                model = make(config, dtype=options.get("dtype") or options.get("torch_dtype") or dtype).eval()
            return (model, {"missing_keys": [], "unexpected_keys": []}) if options.get("output_loading_info") else model

        auto_class.from_pretrained = classmethod(from_pretrained)

    for auto_class in (transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification, transformers.LlamaForCausalLM):
        patch(auto_class)


def ours(folder: str, args) -> None:
    import torch

    import common

    meter = Meter()
    begin, end_step = common.Run.begin, common.Run.end_step
    common.Run.begin = lambda run: (begin(run), meter.begin())
    common.Run.end_step = lambda run, *rest: (end_step(run, *rest), meter.step())
    common.check_head = lambda *_, **__: None  # random weights: nothing to check
    random_weights(folder, torch.float32)
    script = {"full": "full_ft", "reward": "reward_model"}.get(args.method, args.method)
    flags = ["--model", folder, "--output", f"{folder}/ours", "--max-steps", str(args.steps), "--batch-size", str(args.rows), "--samples", "0",
             "--eval-fraction", "0", "--log-every", "1", "--save-every", "100000", "--max-length", str(args.length), "--max-grad-norm", "1"]  # fmt: skip
    flags += ["--data", f"{folder}/{'pairs' if args.method in PREFERENCES else 'rows'}.jsonl"]
    flags += ["--gradient-checkpointing"] * args.recompute
    flags += ["--rank", "8", "--alpha", "16"] if args.method in ("lora", "dora", "qlora") else []
    flags += ["--lora-rank", "8", "--lora-alpha", "16"] if args.lora and args.method in ("sft", *PREFERENCES) else []
    # stop before anything is saved: only the steps count
    common.Run.show_samples = lambda run: (meter.report(run.tokens // run.step), os._exit(0))
    __import__(script).main(flags)


def theirs(folder: str, args) -> None:
    import datasets
    import peft
    import torch
    import transformers
    import trl

    random_weights(folder, torch.float32)
    cuda, meter = torch.cuda.is_available(), Meter()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in open(f"{folder}/{'pairs' if args.method in PREFERENCES else 'rows'}.jsonl")]
    table = datasets.Dataset.from_list(rows)
    options = dict(
        output_dir=f"{folder}/theirs", max_steps=args.steps, per_device_train_batch_size=args.rows, learning_rate=1e-4, max_grad_norm=1.0,
        gradient_checkpointing=args.recompute, report_to=[], use_cpu=not cuda, bf16=cuda, save_strategy="no", logging_steps=1, disable_tqdm=True,
        optim="adamw_torch_fused", weight_decay=0.0,
    )  # fmt: skip
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS" if args.method == "reward" else "CAUSAL_LM",
                           use_dora=args.method == "dora")  # fmt: skip
    adapter = args.method in ("lora", "dora", "qlora") or args.lora
    auto_class = transformers.AutoModelForSequenceClassification if args.method == "reward" else transformers.AutoModelForCausalLM
    dtype, head = torch.bfloat16 if cuda and adapter else torch.float32, {"num_labels": 1} if args.method == "reward" else {}
    model = auto_class.from_pretrained(folder, dtype=dtype, **head)
    common_args = dict(model=model, processing_class=tokenizer, train_dataset=table, peft_config=lora if adapter else None)
    if args.method in ("lora", "dora", "qlora", "full", "sft"):
        config = trl.SFTConfig(**options, max_length=args.length, packing=True, completion_only_loss=True)
        trainer = trl.SFTTrainer(args=config, **common_args)
    elif args.method == "dpo":
        trainer = trl.DPOTrainer(args=trl.DPOConfig(**options, max_length=args.length), **common_args)
    elif args.method == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        trainer = ORPOTrainer(args=ORPOConfig(**options, max_length=args.length), **common_args)
    else:
        trainer = trl.RewardTrainer(args=trl.RewardConfig(**options, max_length=args.length), **common_args)

    class Callback(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            meter.begin()

        def on_step_end(self, *_, **__):
            meter.step()

    trainer.add_callback(Callback())
    trainer.train()
    per_row = args.document * 2 if args.method in PREFERENCES else args.length // args.document * args.document
    meter.report(args.rows * per_row)
    os._exit(0)


def measure(side: str, folder: str, args) -> dict:
    command = [sys.executable, __file__, "--worker", side, "--folder", folder]
    for name in ("method", "shape", "steps", "rows", "length", "document"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--recompute"] * args.recompute + ["--lora"] * args.lora
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"})
    line = next((line for line in run.stdout.splitlines() if line.startswith("RESULT")), None)
    if line is None:
        return {"error": (run.stderr or run.stdout).strip().splitlines()[-1:]}
    return json.loads(line.removeprefix("RESULT"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--against", choices=["trl", "nothing"], default="trl")
    add("--methods", nargs="+", default=["lora"], choices=METHODS)
    add("--shape", choices=SHAPES, default="8x576")
    add("--layers", type=int, help="other than the shape's own number")
    add("--length", type=int, default=1024, help="tokens a packed row")
    add("--document", type=int, default=256, help="tokens a document; of preference data, of prompt and one answer")
    add("--rows", type=int, default=1, help="rows, or pairs, a step")
    add("--steps", type=int, default=6)
    add("--repeats", type=int, default=3)
    add("--recompute", action="store_true", help="gradient checkpointing on both sides")
    add("--lora", action="store_true", help="LoRA in sft, dpo, orpo and reward as well")
    add("--json", type=Path, help="write the figures here, too")
    for name in ("--worker", "--method", "--folder"):
        add(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return (ours if args.worker == "ours" else theirs)(args.folder, args)
    results = {}
    print("| method | tokens/s, ours | theirs | ratio (spread) | GiB above the loaded model, ours | theirs | ratio |\n|---|---|---|---|---|---|---|")
    for args.method in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            make_work(Path(folder), args)
            sides = ("ours", "theirs") if args.against == "trl" else ("ours",)
            runs = {side: [] for side in sides}
            for _ in range(args.repeats):
                for side in sides:
                    runs[side].append(measure(side, folder, args))
        errors = [(side, run["error"]) for side in sides for run in runs[side] if "error" in run]
        if errors:
            print(f"| {args.method} | failed: {errors[0]} |")
            continue
        speed, memory = ({side: statistics.median(run[key] for run in runs[side]) for side in sides} for key in ("tokens_per_second", "gib"))
        speed.setdefault("theirs", math.nan), memory.setdefault("theirs", math.nan)
        ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(runs["ours"], runs.get("theirs", []))] or [math.nan]
        print(f"| {args.method} | {speed['ours']:,.0f} | {speed['theirs']:,.0f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
              f"{memory['ours']:.2f} | {memory['theirs']:.2f} | {memory['ours'] / memory['theirs']:.2f} |", flush=True)  # fmt: skip
        results[args.method] = runs
    if args.json:
        args.json.write_text(json.dumps({"args": {k: v for k, v in vars(args).items() if k != "json"}, "results": results}, indent=1))


if __name__ == "__main__":
    main()

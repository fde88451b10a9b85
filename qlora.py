"""QLoRA: train LoRA beside a base model whose linear layers are frozen at 4 bits per weight.

Dettmers et al. 2023, "QLoRA" (arXiv 2305.14314), equations 5 and 6:

    y = dequant(W4) x + s B A dropout(x)        dequant(W4) = code[index] * absmax

    W4      weight  (n / 2, 1) uint8   two 4-bit indices per byte, frozen
    code    NF4     (16,)              the values of the indices
    absmax          (n / 64,)          the largest |w| of every 64 weights, itself in 8 bits
    A, B, s         as in lora.py      float32

Three ideas save memory. The first two are functions below and give 4.127 bits per weight:
  NF4                   Weights are nearly normal, so the 16 values are quantiles of the normal
                        distribution: 8 positive, 7 negative and 0, divided by the largest.
  double quantisation   absmax costs 32 / 64 = 0.5 bits per weight. Its mean is subtracted and the
                        rest coded in 8 bits (256 values, dense near 0), with a float32 scale for
                        every 256 of them: 8 / 64 + 32 / (64 * 256) = 0.127 bits.
  paged optimizer       --optimizer paged_adamw8bit: AdamW's states move to host memory when the
                        GPU has no room. The host waits for the GPU after every parameter.

Choices and departures from the paper
  - bitsandbytes quantises and multiplies (common.py, Linear4bit). `nf4_quantize` returns the same
    bytes. `double_quantize` returns the nearest code. bitsandbytes' CPU kernel is off by one about
    once in a thousand. Merging calls `*_dequantize`. The `*_quantize` functions are to be read.
  - Every linear layer but the output head is quantised and adapted. Embedding, head and norms
    stay in bfloat16. Norms compute in float32.
  - Rank 16 and alpha 32 (the paper: 64 and 16). Paged states of 8 bits (the authors' code: 32).

Questions people ask
  Why 4 bits?     A 7B base takes 3.9 GB instead of 13.5. Dequantising costs time in every pass.
  What is merged? --merge-only adds s B A to dequant(W4), as in training, and saves bfloat16.
                  --merge-base original adds s B A to the weights before quantisation.
  Use with PEFT?  AutoPeftModelForCausalLM.from_pretrained("runs/qlora", quantization_config=
                  BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                  bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)).

Measured: `python qlora.py` answers 0 of 100 held-out prompts exactly before training, and 99, 100
and 100 after (--seed 0, 1, 2; one CPU core, torch 2.13, 2026-11-26).

    python qlora.py                                    # the bundled model learns a task
    python qlora.py --model BASE --data train.jsonl    # BASE: a folder or a Hub name
    python qlora.py --merge-only --model BASE --adapter runs/qlora --output runs/merged
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common

# Quantiles of the standard normal at linspace(0.9677083, 0.5, 9)[:-1] (positive) and
# linspace(0.9677083, 0.5, 8)[:-1] (negative), divided by the largest, as bitsandbytes rounds them.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
])  # fmt: skip


def nf4_quantize(weight, block_size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight of n elements -> (packed uint8 (ceil(n / 2),), absmax float32 (ceil(n / 64),)).
    The index of the value nearest to w / absmax, the lower one at a tie. Of two weights, the first
    takes the high four bits of the byte."""
    flat = weight.detach().float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1)
    inverse = torch.where(absmax == 0, 0, 1 / absmax)  # w / absmax differs in rare last bits
    midpoints = ((NF4[1:] + NF4[:-1]) / 2).to(flat.device)
    index = torch.bucketize(blocks * inverse[:, None], midpoints).flatten()
    index = index[: len(flat) + len(flat) % 2].to(torch.uint8)  # without the last block's padding
    return index[0::2] << 4 | index[1::2], absmax


def nf4_dequantize(packed, absmax, block_size: int = 64) -> torch.Tensor:
    """(packed, absmax) of `nf4_quantize` -> float32 weights (2 * bytes,)."""
    index = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    return NF4.to(packed.device)[index] * absmax.repeat_interleave(block_size)[: len(index)]


def dynamic_map() -> torch.Tensor:
    """The 256 values of the 8-bit code, ascending (Dettmers 2015, arXiv 1511.04561): 0, 1, and for
    either sign and each decade from 1e-7 to 1 the midpoints of 1, 2, 4 ... 64 equal parts."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = 10 ** (exponent - 6) * (edges[1:] + edges[:-1]) / 2
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values))


def double_quantize(absmax, block_size: int = 256) -> tuple[torch.Tensor, ...]:
    """absmax float32 (b,) -> (codes uint8 (b,), scale float32 (ceil(b / 256),), mean ())."""
    mean = absmax.mean()
    blocks = F.pad(absmax - mean, (0, -len(absmax) % block_size)).view(-1, block_size)
    scale = blocks.abs().amax(1)
    code = dynamic_map().to(absmax.device)
    inverse = torch.where(scale == 0, 0, 1 / scale)
    index = torch.bucketize(blocks * inverse[:, None], (code[1:] + code[:-1]) / 2)
    return index.flatten()[: len(absmax)].to(torch.uint8), scale, mean


def double_dequantize(codes, scale, mean, block_size: int = 256) -> torch.Tensor:
    """The inverse of `double_quantize`: absmax float32 (b,)."""
    values = dynamic_map().to(codes.device)[codes.long()]
    return values * scale.repeat_interleave(block_size)[: len(codes)] + mean


def dequantized(layer: common.Linear4bit) -> torch.Tensor:
    """dequant(W4), (out, in) float32."""
    state = layer.state  # bitsandbytes'
    absmax = double_dequantize(state.absmax, state.state2.absmax, state.offset)
    weight = nf4_dequantize(layer.weight.flatten(), absmax)
    return weight.view(layer.out_features, layer.in_features)


def quantized_layers(model) -> dict[str, common.Linear4bit]:
    """The 4-bit layers, under their names in the base."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, common.Linear4bit)}
    return {name.removesuffix(".base"): layer for name, layer in found.items()}


def bits_per_weight(model) -> float:
    """Of the 4-bit layers, counting packed bytes, absmax, its scales and mean."""
    held = weights = 0
    for layer in quantized_layers(model).values():
        scales = layer.state.absmax, layer.state.state2.absmax, layer.state.offset
        held += sum(x.nbytes for x in (layer.weight, *scales))
        weights += layer.in_features * layer.out_features
    return 8 * held / weights


# --- copied from lora.py: LoRALinear ---
class LoRALinear(nn.Module):
    """A frozen nn.Linear with a trained low-rank update. x (..., in) -> (..., out)"""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base = base
        kind = {"bias": False, "dtype": torch.float32, "device": base.weight.device}
        self.lora_A = nn.Linear(base.in_features, rank, **kind)  # starts as kaiming_uniform
        self.lora_B = nn.Linear(rank, base.out_features, **kind)
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout)
        self.scaling = alpha / rank

    def forward(self, x):
        flat = x.flatten(0, -2)  # N tokens: (N, in)
        y = self.base(flat)  # W0 x: (N, out)
        down = F.linear(self.dropout(flat), self.lora_A.weight.to(x.dtype))  # A x: (N, r)
        # + s B (A x), in place: base's backward pass does not need y
        y.addmm_(down, self.lora_B.weight.to(x.dtype).T, alpha=self.scaling)
        return y.view(*x.shape[:-1], -1)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base layer with s B A added to its weight, in float32 and rounded once."""
        update = self.scaling * self.lora_B.weight @ self.lora_A.weight  # (out, in)
        self.base.weight.copy_(self.base.weight.float() + update)
        return self.base


# --- end ---


def train(args) -> None:
    device, dtype = common.setup(args)
    tokenizer = common.load_tokenizer(args)
    train_set, eval_set = common.load_data(args, tokenizer)
    if args.inspect:
        return common.inspect_examples(train_set, tokenizer)
    model = common.load_model(args, dtype, device, load_in_4bit=True)
    common.say(f"the base's linear layers take {bits_per_weight(model):.3f} bits per weight")
    config = common.add_adapter(model, args, LoRALinear, device)
    if args.chat:
        return common.chat(model, tokenizer, args, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(common.decay_groups(model, args), lr=args.lr, fused=True)
    if args.optimizer == "paged_adamw8bit":
        import bitsandbytes

        optimizer = bitsandbytes.optim.PagedAdamW8bit(common.decay_groups(model, args), lr=args.lr)

    # --- copied from lora.py: start of the run ---
    steps = common.plan_steps(train_set, args)  # the examples of every optimizer step
    common.describe_run(train_set, steps, args, device, dtype)
    run = common.start_run(args, model, optimizer, train_set, steps)
    log = common.Log(args, run, len(steps), device)
    samples_before, shown = None, eval_set or train_set  # whose answers are shown
    if run["step"] == 0:
        samples_before = answer_samples(model, tokenizer, shown, args, device, log)
        if eval_set:
            log.evaluation(loss=held_out_loss(model, eval_set, args, device))
    # --- end ---

    # --- copied from lora.py: one step ---
    for step in range(run["step"] + 1, len(steps) + 1):
        common.seed_step(args, step)  # dropout
        lr = common.learning_rate(step, len(steps), args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        examples = train_set[steps[step - 1]]
        num_targets = common.count_targets(examples)  # of all forward passes and GPUs
        loss = torch.zeros((), device=device)
        for batch in common.micro_batches(examples, args, device):  # this GPU's part
            nll = -model.target_logps(**batch).sum()  # cross-entropy
            (nll / num_targets).backward()  # a mean over the step's targets
            loss += nll.detach() / num_targets
        common.sum_gradients(model)  # over GPUs
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        log.step_done(examples, loss, lr, grad_norm)
        # --- end ---

        # --- copied from lora.py: end of a step ---
        if eval_set and (step % args.eval_every == 0 or step == len(steps)):
            log.flush()  # so that tokens_per_second leaves the evaluation out
            eval_loss = held_out_loss(model, eval_set, args, device)
            log.evaluation(loss=eval_loss)
            if args.patience and eval_loss < run["best_loss"]:
                run |= {"best_loss": eval_loss, "best_step": step}
                common.save_checkpoint(args, "best", run, model, optimizer)
            elif args.patience and step - run["best_step"] >= args.patience * args.eval_every:
                break
        signal = log.stopped()  # SIGINT or SIGTERM
        if step % args.save_every == 0 or signal:
            log.flush()  # a loss that is not finite ends the run before the checkpoint
            common.save_checkpoint(args, f"step-{step:08d}", run, model, optimizer)
        if signal:
            common.exit_stopped(step, signal)
    # --- end ---

    # --- copied from lora.py: end of the run ---
    log.bar.close()
    if args.patience and run["best_step"] < run["step"]:
        common.say(f"using the weights of step {run['best_step']}: the lowest held-out loss")
        common.read_checkpoint(args, "best", model, optimizer, run["fixed"])
    samples = answer_samples(model, tokenizer, shown, args, device, log)
    print_samples(samples_before, samples)
    # --- end ---
    common.save_adapter(args, model, tokenizer, config)
    log.done()


# --- copied from lora.py: held-out loss and samples ---
def held_out_loss(model, eval_set, args, device) -> float:
    """The mean negative log-likelihood of all held-out targets, in nats per token."""
    nll = torch.zeros((), dtype=torch.float64, device=device)
    with common.evaluating(model):
        for first in range(0, len(eval_set), 256):
            for batch in common.micro_batches(eval_set[first : first + 256], args, device):
                nll -= model.target_logps(**batch).sum()
    return common.sum_over_ranks(nll).item() / common.count_targets(eval_set[:])


def answer_samples(model, tokenizer, examples, args, device, log) -> list[tuple[str, str, str]]:
    """(prompt, the model's answer, the data's answer) for the first --samples examples. Raw text
    is continued from its middle. Logs the share of answers that equal the data's."""
    prompts, data, answers = [], [], []
    for row in (examples[n] for n in range(min(args.samples, len(examples)))):
        context = np.flatnonzero(row["is_target"] == 0)  # the last answer follows; raw text: [0]
        start = context[-1] + 1 if context[-1] else len(row["input_ids"]) // 2
        prompts.append(row["input_ids"][:start])
        data.append(row["input_ids"][start:])
    for first in range(0, len(prompts), 32):
        answers += common.generate(model, tokenizer, prompts[first : first + 32], device)
    prompts, data = (tokenizer.batch_decode(x, skip_special_tokens=True) for x in (prompts, data))
    if answers:
        exact = [answer.strip() == right.strip() for answer, right in zip(answers, data)]
        log.evaluation(exact_match=sum(exact) / len(exact))
    return list(zip(prompts, answers, data))


def print_samples(before, after) -> None:
    """before: None if the run was resumed."""
    for n, (prompt, answer, data) in enumerate(after[:3]):
        texts = {"prompt": prompt} | ({"before training": before[n][1]} if before else {})
        texts |= {"after": answer, "data": data}
        common.say("\n" + "\n".join(f"--- {key} ---\n{x.strip()}" for key, x in texts.items()))


# --- end ---


@torch.no_grad()
def merge(args) -> None:
    """--merge-only: save a bfloat16 model with s B A added to dequant(W4), or to the original
    weights, in float32 and rounded once. Prints how much this changes the logits."""
    device, dtype = common.setup(args)
    tokenizer = common.load_tokenizer(args)
    model = common.load_model(args, dtype, device, load_in_4bit=True)
    common.add_adapter(model, args, LoRALinear, device)
    ids = torch.tensor([tokenizer(__doc__).input_ids[:128]], device=device)
    before = logits(model, ids)
    if args.merge_base == "original":
        original = common.load_model(args, "auto", torch.device("cpu"))
    for name, small in quantized_layers(model).items():
        weight, layer = dequantized(small), model.get_submodule(name)
        if args.merge_base == "original":
            weight = original.get_submodule(name).weight.to(device).float()
        merged = nn.Linear(small.in_features, small.out_features, device="meta")
        merged.weight, merged.bias = nn.Parameter(weight), small.bias
        if isinstance(layer, LoRALinear):
            layer.base = merged
            merged = layer.merged()
        model.set_submodule(name, merged.to(torch.bfloat16))
    for p in model.parameters():  # not the buffers: rotary frequencies stay float32
        p.data = p.data.to(torch.bfloat16)
    after = logits(model, ids)
    moved, same = (after - before).abs(), (after.argmax(-1) == before.argmax(-1)).float().mean()
    common.say(f"merged into the {args.merge_base} weights. On {ids.shape[1]} tokens of this "
               f"script's docstring, the logits change by {moved.mean():.4f} on average and "
               f"{moved.max():.4f} at most; {same:.1%} of the top tokens are the same")  # fmt: skip
    common.save_model(args, model, tokenizer, torch.bfloat16)


def logits(model, ids) -> torch.Tensor:
    """ids (1, T) -> (1, T, V) float32"""
    with common.own_attention(model.eval()):
        return model(input_ids=ids, use_cache=False).logits.float()


def main(argv=None) -> None:
    parser = common.make_parser(__doc__, output="runs/qlora", lr=2e-4)
    common.add_adapter_flags(parser, shard=False)
    add = parser.add_argument_group("QLoRA").add_argument
    add("--optimizer", choices=["adamw", "paged_adamw8bit"], default="adamw", help="for A and B")
    what = "the weights to which --merge-only adds the update"
    add("--merge-base", choices=["dequantized", "original"], default="dequantized", help=what)
    args = common.parse_args(parser, argv, demo={"lr": 4e-3, "epochs": 6.0})
    merge(args) if args.merge_only else train(args)


if __name__ == "__main__":
    common.launch(main, out_of_memory="--gradient-checkpointing; a smaller --micro-batch-tokens; "
                  "a shorter --max-length; --optimizer paged_adamw8bit")  # fmt: skip

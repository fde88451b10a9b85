"""DoRA: train the magnitude of each frozen weight, and its direction through LoRA.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv 2402.09353), eq. 5, 11:

    W' = m * V / ||V||,    V = W0 + s B A,    ||V|| the norm of each output row
    y  = (m / ||V||) * (W0 x + s B A dropout(x)) + bias        without computing W' or V

    W0  base.weight            (out, in)       frozen, in bfloat16 on a GPU
    A   lora_A.weight          (r, in)         float32, as in lora.py;  s = alpha / r
    B   lora_B.weight          (out, r)        float32, zero
    m   lora_magnitude_vector  (out,)          float32, starts at ||W0||

    ||V_i||^2 = ||W0_i||^2 + (2 s W0 A^T + s^2 B A A^T)_i . B_i       for every row i, without V

Choices and departures from the paper
  - No gradient flows through ||V|| (section 4.3). This saves memory and changes the gradient.
  - The paper writes one norm per column. The authors' code, PEFT and this script use one per
    output row, so m is (out,). The bias is not scaled, as it is not part of W.
  - Dropout acts on A's input only. PEFT's also acts on the x in (m / ||V|| - 1) W0 x.

Questions people ask
  Why not LoRA?       In the paper, LoRA layers that change more in magnitude also change more in
                      direction. In full fine-tuning and DoRA they do not. DoRA trains one more
                      number per output row and is slower than LoRA.

Measured: `python dora.py` answers 0 of 100 held-out prompts exactly before training, and 100, 100
and 100 after (--seed 0, 1, 2; one CPU core, torch 2.13, 2026-11-26).

    python dora.py                                     # the bundled model learns a task
    python dora.py --model BASE --data train.jsonl     # BASE: a folder or a Hub name
    python dora.py --merge-only --model BASE --adapter runs/dora --output runs/merged
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common


class DoRALinear(nn.Module):
    """A frozen nn.Linear with trained magnitudes and directions. x (..., in) -> (..., out)"""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base = base
        kind = {"bias": False, "dtype": torch.float32, "device": base.weight.device}
        self.lora_A = nn.Linear(base.in_features, rank, **kind)  # starts as kaiming_uniform
        self.lora_B = nn.Linear(rank, base.out_features, **kind)
        nn.init.zeros_(self.lora_B.weight)
        norm = torch.linalg.vector_norm(base.weight.detach(), dim=1, dtype=torch.float32)
        self.register_buffer("base_norm", common.whole(norm), persistent=False)  # ||W0||
        self.lora_magnitude_vector = nn.Parameter(self.base_norm.clone())  # m
        self.dropout = nn.Dropout(dropout)
        self.scaling = alpha / rank

    @torch.no_grad()  # no gradient flows through ||V||
    def direction_norm(self) -> torch.Tensor:
        """||V||, (out,) float32"""
        W0, A, B, s = self.base.weight, self.lora_A.weight, self.lora_B.weight, self.scaling
        cross = F.linear(W0, A.to(W0.dtype)).float()  # W0 A^T: (out, r)
        both = torch.addmm(cross, B, A @ A.T, beta=2 * s, alpha=s**2)  # 2 s W0 A^T + s^2 B A A^T
        square = self.base_norm**2 + (both * B).sum(1)
        return square.clamp(min=1e-12).sqrt()  # a row of zeros must not divide by zero

    def forward(self, x):
        flat = x.flatten(0, -2)  # (N, in)
        y = F.linear(flat, self.base.weight)  # W0 x, without the bias: (N, out)
        down = F.linear(self.dropout(flat), self.lora_A.weight.to(x.dtype))  # A x: (N, r)
        y.addmm_(down, self.lora_B.weight.to(x.dtype).T, alpha=self.scaling)  # + s B (A x)
        y = ScaleRows.apply(y, self.lora_magnitude_vector, self.direction_norm())
        y = y if self.base.bias is None else y + self.base.bias
        return y.view(*x.shape[:-1], -1)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base layer with weight W', computed in float32 and rounded once."""
        V = self.base.weight.float() + self.scaling * self.lora_B.weight @ self.lora_A.weight
        scale = self.lora_magnitude_vector / V.norm(dim=1).clamp(min=1e-6)
        self.base.weight.copy_(scale[:, None] * V)
        return self.base


class ScaleRows(torch.autograd.Function):
    """y (N, out) -> (m / ||V||) * y, in place. The gradient of m is y / ||V|| = result / m."""

    @staticmethod
    def forward(ctx, y, m, norm):
        ctx.mark_dirty(y)
        ctx.save_for_backward(y.mul_(m / norm), m, norm)
        return y

    @staticmethod
    def backward(ctx, grad):
        result, m, norm = ctx.saved_tensors
        grad_m = (grad * result).sum(0, dtype=torch.float32) / m
        grad_m = grad_m.where(m != 0, 0)  # a row of zeros stays zero
        return (grad * (m / norm)).to(grad.dtype), grad_m, None


def train(args) -> None:
    device, dtype = common.setup(args)
    tokenizer = common.load_tokenizer(args)
    train_set, eval_set = common.load_data(args, tokenizer)
    if args.inspect:
        return common.inspect_examples(train_set, tokenizer)
    model = common.load_model(args, dtype, device, shard=args.shard)
    config = common.add_adapter(model, args, DoRALinear, device) | {"use_dora": True}
    if args.chat:
        return common.chat(model, tokenizer, args, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(common.decay_groups(model, args), lr=args.lr, fused=True)

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


def merge(args) -> None:
    """--merge-only: replace the adapted weights by W' and save them in the base's dtype."""
    device, _ = common.setup(args)
    tokenizer = common.load_tokenizer(args)
    model = common.load_model(args, "auto", device)
    common.add_adapter(model, args, DoRALinear, device)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, DoRALinear):
            model.set_submodule(name, layer.merged())
    common.save_model(args, model, tokenizer, model.dtype)


def main(argv=None) -> None:
    parser = common.make_parser(__doc__, output="runs/dora", lr=2e-4)
    common.add_adapter_flags(parser)
    args = common.parse_args(parser, argv, demo={"lr": 3e-3, "epochs": 6.0})
    merge(args) if args.merge_only else train(args)


if __name__ == "__main__":
    common.launch(main, out_of_memory="--gradient-checkpointing; a smaller --micro-batch-tokens; "
                  "a shorter --max-length; qlora.py")  # fmt: skip

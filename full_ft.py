"""Full fine-tuning: train every parameter, on one device or sharded over many.

The method is the optimizer, AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101),

    m = b1 m + (1 - b1) g              m' = m / (1 - b1^t)
    v = b2 v + (1 - b2) g^2            v' = v / (1 - b2^t)
    w = w - lr ( m' / (sqrt(v') + eps) + decay w )

    w   the parameters       g   their gradient          m, v   running means of g and g^2
    t   the step, from 1     lr  --lr, scheduled         decay  --weight-decay, on matrices only
    b1 = 0.9, b2 = 0.999, eps = 1e-8

PyTorch implements this update. The script is about where weights, gradients and optimizer states
are kept, and in which precision (bytes per parameter):

    mode                              weights  gradients  m and v  together
    float32 masters (default)            4         4         8        16
      --optimizer adamw8bit              4         4         2        10    8-bit states
      --step-in-backward                 4        (4)        8        12    one gradient at a time
    --offload                           host      host      host      ~0    slow transfers
    torchrun, W ranks (FSDP2)           4/W       4/W       8/W     16/W    ZeRO-3
    --pure-bfloat16                      2         2         4         8    small updates vanish
      --optimizer adamw8bit
      --step-in-backward                 2        (2)        2         4

    Indented rows add their flag to the mode above. On CUDA the masters' bfloat16 copies take 2
    more between forward and backward. --l2-sp also keeps w0: 4 more (2 with --pure-bfloat16).

--train PATTERN trains only the parameters whose names contain a match of the regular expression.
This gives selective methods such as BitFit (Ben Zaken et al. 2021, arXiv 2106.10199): --train
bias, for models that have biases. Frozen parameters have no gradient, m or v, and stay in the
dtype of the forward pass (float32 under FSDP2).

Choices and departures from the papers
  - Weights are float32 "masters": on a GPU, the forward pass computes in bfloat16, and updates
    are added in float32.
  - Against forgetting, --l2-sp ALPHA adds ALPHA ||w - w0||^2 to the loss, which pulls w towards
    the pretrained w0 (Li et al. 2018, arXiv 1802.01483, without their factor 1/2). The logged
    loss does not include this term, but the logged gradient norm does. Another way is to mix
    general rows in: --data mine.jsonl general.jsonl:0.2.

Questions people ask
  Why masters?       bfloat16 has 8 significant bits, so w + u == w if |u| is below about |w| / 512.
                     At a learning rate of 1e-5, most weights would not change.
  Sum or mean?       The loss is the mean over all target tokens of an optimizer step, in all its
                     forward passes and on all GPUs.
  What is saved?     The weights in the dtype of the forward pass (bfloat16 on a GPU). The float32
                     masters are only in checkpoint/. With --train, trained.safetensors has only
                     the trained weights: model.load_state_dict(..., strict=False) loads them.
  Which --lr?        1e-5 to 5e-5 for pretrained models. LoRA needs about ten times as much.

Measured: `python full_ft.py` answers 0 of 100 held-out prompts exactly before training, and 100,
100 and 100 after (--seed 0, 1, 2; one CPU core, torch 2.13, 2026-11-26). A 7B: tests/RESULTS.md.

    python full_ft.py                                           # the bundled model learns a task
    python full_ft.py --model BASE --data train.jsonl general.jsonl:0.2 --l2-sp 0.01
    python full_ft.py --model runs/full_ft --chat
    torchrun --nproc-per-node 8 full_ft.py --model BASE --data train.jsonl --gradient-checkpointing
"""

import math
import re

import numpy as np
import torch
from torch import nn

import common


def freeze_others(model, pattern: str, dtype: torch.dtype, sharded: bool) -> None:
    """Freeze the parameters whose names do not match the pattern. They need no masters."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not any(re.search(pattern, name) for name in parameters):
        kinds = ", ".join(sorted({".".join(name.split(".")[-2:]) for name in parameters}))
        raise common.UserError(f"--train {pattern} matches no parameter. Names end with {kinds}")
    for name, p in parameters.items():
        p.requires_grad_(re.search(pattern, name) is not None)
        if not (p.requires_grad or sharded):
            p.data = p.data.to(dtype)


def make_optimizer(parameters, args):
    """AdamW: PyTorch's, or bitsandbytes' with 8-bit states, which may be paged."""
    if args.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=args.lr, fused=True)
    import bitsandbytes  # loads CUDA libraries: only if needed

    paged = args.optimizer == "paged_adamw8bit"
    kind = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
    return kind(parameters, lr=args.lr)


def add_l2_sp(parameters, start, alpha: float) -> None:
    """Add 2 alpha (w - w0), the gradient of alpha ||w - w0||^2, to the gradients."""
    for p, p0 in zip(parameters, start, strict=True):
        p.grad.add_(p.detach() - p0, alpha=2 * alpha)


def step_in_backward(parameters, start, args) -> list:
    """One optimizer per parameter. It steps as soon as the gradient is complete, then frees it, so
    only one gradient exists at a time. Gradients cannot be accumulated or clipped."""
    optimizers = []
    for i, p in enumerate(parameters):
        decay = args.weight_decay if p.dim() >= 2 else 0.0
        optimizer = make_optimizer([{"params": [p], "weight_decay": decay}], args)

        def step(p, optimizer=optimizer, p0=start[i : i + 1]):
            if p0:
                add_l2_sp([p], p0, args.l2_sp)
            optimizer.step()
            p.grad = None

        p.register_post_accumulate_grad_hook(step)
        optimizers.append(optimizer)
    return optimizers


def train(args) -> None:
    device, dtype = common.setup(args)
    sharded = common.RANKS > 1 or args.offload
    check_flags(args, sharded)
    tokenizer = common.load_tokenizer(args)
    train_set, eval_set = common.load_data(args, tokenizer)
    if args.inspect:
        return common.inspect_examples(train_set, tokenizer)
    if args.step_in_backward and not args.chat:
        check_one_pass(train_set, common.plan_steps(train_set, args), args)
    dtype, masters = (torch.bfloat16,) * 2 if args.pure_bfloat16 else (dtype, torch.float32)
    model = common.load_model(args, dtype, device, masters, shard=sharded, offload=args.offload)
    if args.chat:
        return common.chat(model, tokenizer, args, device)
    if args.train:
        freeze_others(model, args.train, dtype, sharded)
    names, parameters = zip(*[x for x in model.named_parameters() if x[1].requires_grad])
    start = [p.detach().clone() for p in parameters] if args.l2_sp else []  # w0
    if args.step_in_backward:
        optimizer = step_in_backward(parameters, start, args)  # a list
    else:
        optimizer = make_optimizer(common.decay_groups(model, args), args)

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

    for step in range(run["step"] + 1, len(steps) + 1):
        lr = common.learning_rate(step, len(steps), args)
        for one in optimizer if args.step_in_backward else [optimizer]:
            for group in one.param_groups:
                group["lr"] = lr
        examples = train_set[steps[step - 1]]
        num_targets = common.count_targets(examples)  # of all forward passes and GPUs
        loss = torch.zeros((), device=device)
        for batch in common.micro_batches(examples, args, device):  # this GPU's part
            nll = -model.target_logps(**batch).sum()  # cross-entropy
            (nll / num_targets).backward()  # a mean over the step's targets
            loss += nll.detach() / num_targets
        grad_norm = None
        if not args.step_in_backward:
            common.sum_gradients(model)  # FSDP2 has summed them over GPUs
            if args.l2_sp:
                add_l2_sp(parameters, start, args.l2_sp)
            grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad()
        elif lost := [name for name, one in zip(names, optimizer) if not one.state]:
            raise common.UserError(f"{lost[0]} gets no gradient and was not updated")
        log.step_done(examples, loss, lr, grad_norm)

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
    common.save_model(args, model, tokenizer, dtype, args.train and run["fixed"]["the base model"])
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


def check_flags(args, sharded: bool) -> None:
    """Refuse flags that exclude each other, before anything is loaded."""
    if args.step_in_backward and args.max_grad_norm:
        raise common.UserError("--step-in-backward needs --max-grad-norm 0: it cannot clip")
    if sharded and args.step_in_backward:
        raise common.UserError("--step-in-backward does not work with torchrun or --offload")
    if sharded and args.optimizer != "adamw":
        raise common.UserError(f"--optimizer {args.optimizer}: not with torchrun or --offload")
    if sharded and args.pure_bfloat16:
        raise common.UserError("--pure-bfloat16: not with torchrun or --offload")


def check_one_pass(train_set, steps: list[list[int]], args) -> None:
    """--step-in-backward cannot accumulate: every step must fit in one forward pass."""
    for numbers in steps:
        lengths = list(map(len, train_set[numbers]["input_ids"]))
        if len(common.plan_passes(lengths, args)) > 1:
            fits = max(1, args.micro_batch_tokens // max(lengths))
            problem = f"--step-in-backward: {sum(lengths)} tokens of a step exceed one forward pass"
            raise common.UserError(f"{problem}. Try --batch-size {fits}")


def main(argv=None) -> None:
    parser = common.make_parser(__doc__, output="runs/full_ft", lr=1e-5)
    add = parser.add_argument_group("full fine-tuning").add_argument
    add("--train", metavar="PATTERN", help="train only parameters whose names match")
    kinds = ["adamw", "adamw8bit", "paged_adamw8bit"]
    add("--optimizer", choices=kinds, default="adamw", help="8-bit: by bitsandbytes")
    early = "update each parameter in the backward pass and free its gradient"
    add("--step-in-backward", action="store_true", help=early)
    add("--offload", action="store_true", help="keep weights and optimizer states in host memory")
    add("--pure-bfloat16", action="store_true", help="no float32 masters: small updates vanish")
    add("--l2-sp", type=float, default=0.0, metavar="ALPHA", help="adds ALPHA ||w - w0||^2")
    train(common.parse_args(parser, argv, demo={"lr": 5e-4, "epochs": 6.0}))


if __name__ == "__main__":
    common.launch(
        main,
        out_of_memory="--gradient-checkpointing; a smaller --micro-batch-tokens; --optimizer "
        "adamw8bit; --offload; torchrun on more GPUs; --step-in-backward; --pure-bfloat16",
    )

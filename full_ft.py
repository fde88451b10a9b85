"""Full fine-tuning: train every parameter, on one device or sharded over many, and protect it from forgetting.

The method is the optimizer's: AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) on all N parameters,

    m = b1 m + (1 - b1) g         v = b2 v + (1 - b2) g^2
    w = w - lr ( m' / (sqrt(v') + eps) + decay w )          m' = m / (1 - b1^t),  v' = v / (1 - b2^t)

    w   the parameters       g   their gradient          m, v   running means of g and g^2, b1 = 0.9, b2 = 0.999, eps = 1e-8
    t   the step, from 1     lr  --lr, scheduled         decay  --weight-decay, on tensors of 2 or more dimensions

PyTorch has this update. What the script shows is where weights, gradients and states are kept, and in what precision (bytes per parameter):

    mode                                weights   gradients   m and v   together   what it costs
    float32 masters (default)              4          4          8         16      +2 between forward and backward on CUDA (bfloat16
                                                                                   copies) without --gradient-checkpointing
      --optimizer adamw8bit                4          4          2         10      states rounded to 8 bits in blocks of 256
      --step-in-backward                   4         (4)         8         12      no accumulation, no global clipping
    --offload                            host       host       host        ~0      each micro-batch sends every block to the GPU twice
                                                                                   and its gradients back; AdamW runs on the CPU
    torchrun, W ranks (FSDP2, ZeRO-3)     4/W        4/W        8/W       16/W     communication; plus one gathered block, embedding, head
    --pure-bfloat16                        2          2          4          8      small updates vanish: see below
      --optimizer adamw8bit
      --step-in-backward                   2         (2)         2          4      the least that trains every parameter
    Indented rows add their flag to the mode above them; the last two flags go together. --l2-sp adds w0: 4 (2 with --pure-bfloat16).
    (n): one parameter's gradient at a time.

Choices and departures from the papers
  - Weights are float32 "masters": the forward pass computes in bfloat16 on a GPU, the updates are added in float32.
  - Biases and norms never decay.
  - Against forgetting, --l2-sp ALPHA adds ALPHA ||w - w0||^2 to the loss, which pulls towards the pretrained w0 (Li et al. 2018,
    arXiv 1802.01483, without their factor 1/2 and without a term for new layers, as there are none); and replay mixes general
    rows in: --data mine.jsonl general.jsonl:0.2. The penalty is added as a gradient alone: the logged loss is without it, clipping and
    the gradient's norm are with it, and AdamW divides it by sqrt(v') like any gradient (unlike weight decay).

Questions people ask
  Why float32 masters?   bfloat16 keeps 8 significant bits, so w + u == w wherever |u| is below about |w| / 512: add 1e-5 to
                     every weight of SmolLM2-135M in bfloat16, and 98 % of them do not change. --pure-bfloat16 accepts that
                     for the memory.
  Sum or mean?       The mean over the target tokens of the whole optimizer step, over micro-batches and ranks. Each
                     rank divides by the targets of all, and gradients are summed over ranks.
  What is saved?     The weights in the dtype of the forward pass (bfloat16 on a GPU). float32 masters stay in checkpoint/.
  Which rate?        1e-5 to 5e-5 are usual for pretrained models; LoRA takes ten times that. Measure yours.

Measured: 32 steps of some 600 tokens of GSM8K take SmolLM2-135M's held-out loss from 1.316 to 0.797 with --lr 5e-5 (README,
Results).

    python full_ft.py                                                  # the bundled model learns a task, in a minute
    python full_ft.py --model BASE --data train.jsonl general.jsonl:0.2 --l2-sp 0.01
    torchrun --nproc-per-node 8 full_ft.py --model BASE --data train.jsonl --gradient-checkpointing
"""

import math
from pathlib import Path

import torch
import torch.distributed as dist

import common


def make_optimizer(groups, args):
    """AdamW over parameters or groups of them: PyTorch's, or bitsandbytes' with 8-bit states, which may be paged."""
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr, fused=True)
    import bitsandbytes  # loads CUDA libraries, so only where it is asked for

    kind = bitsandbytes.optim.AdamW8bit if args.optimizer == "adamw8bit" else bitsandbytes.optim.PagedAdamW8bit
    return kind(groups, lr=args.lr)


def add_l2_sp(parameters, start, alpha: float) -> None:
    """d/dw of alpha ||w - w0||^2 is 2 alpha (w - w0): added to the gradients, before clipping."""
    for p, p0 in zip(parameters, start):
        p.grad.add_(p.detach() - p0, alpha=2 * alpha)


def step_in_backward(parameters, start, args) -> list:
    """One optimizer for each parameter, which steps as soon as the parameter's gradient is complete and then frees it: never
    more than one gradient exists. So there is nothing to accumulate over micro-batches, and no global norm to clip."""
    optimizers = []
    for i, p in enumerate(parameters):
        decay = args.weight_decay if p.dim() >= 2 else 0.0
        optimizer = make_optimizer([{"params": [p], "weight_decay": decay}], args)

        def step(p, optimizer=optimizer, p0=start[i] if start else None):
            if p0 is not None:
                add_l2_sp([p], [p0], args.l2_sp)
            optimizer.step()
            p.grad = None

        p.register_post_accumulate_grad_hook(step)
        optimizers.append(optimizer)
    return optimizers


def train(args) -> None:
    device, dtype = common.setup(args)
    sharded = dist.is_initialized()  # under torchrun, or with --offload
    check_flags(args, sharded)
    if args.pure_bfloat16:
        dtype = torch.bfloat16
    tokenizer, vocab_size = common.load_tokenizer(args)
    corpus, evaluation = common.load_data(args, tokenizer, vocab_size, device)
    if args.inspect:
        return corpus.show(tokenizer)
    place = torch.device("cpu") if sharded else device  # sharding takes a block at a time to the GPU: the whole may not fit
    model = common.load_model(args, dtype, place, weight_dtype=torch.bfloat16 if args.pure_bfloat16 else torch.float32)
    common.checkpoint_blocks(model, args)
    common.compile_blocks(model, args)
    common.parallelize(model, dtype, device, args.offload)
    common.say(f"all {common.count_parameters(model)[0]:,} parameters train")

    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters] if args.l2_sp else []  # w0
    if args.step_in_backward:
        optimizers = step_in_backward(parameters, start, args)
    else:
        optimizers = [make_optimizer(common.decay_groups(model, args.weight_decay), args)]
    run = common.Run(args, model, tokenizer, optimizers, corpus, evaluation)
    run.begin()

    for epoch, micro_batches, tokens, num_targets in run.steps():  # epochs done after this step; the counts are of all ranks
        lr = common.learning_rate(run.step, run.total_steps, args)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        nll = torch.zeros((), device=device)
        for batch in micro_batches:
            batch_nll = -model.target_logps(**batch).sum()  # cross-entropy, summed over the batch's targets (common.py, section 7)
            (batch_nll / num_targets).backward()  # of the whole step: a mean over its tokens, not a mean of means
            nll += batch_nll.detach()
        grad_norm = None
        if not args.step_in_backward:
            if run.step == 0:
                common.check_gradients(model)
            if args.l2_sp:
                add_l2_sp(parameters, start, args.l2_sp)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
            optimizers[0].step()
            optimizers[0].zero_grad()
        elif run.step == 0 and not all(optimizer.state for optimizer in optimizers):
            raise common.UserError("a trainable parameter gets no gradient, and so makes no step")
        run.end_step(epoch, {"loss": nll}, tokens, num_targets, lr, grad_norm)

    run.show_samples()
    common.save_trained(Path(args.output), model, tokenizer, dtype, args.trust_remote_code)
    run.finish()
    common.say_how_to_use(args, adapter=False)


def check_flags(args, sharded: bool) -> None:
    """Refuse flags that cannot work together, before anything is loaded."""
    if args.step_in_backward and (args.grad_accum != 1 or args.max_grad_norm != 0):
        raise common.UserError("--step-in-backward needs --grad-accum 1 and --max-grad-norm 0: no two gradients exist at once")
    if sharded and args.step_in_backward:
        raise common.UserError("--step-in-backward works in one process without --offload: FSDP2 reduces whole blocks")
    if sharded and args.optimizer != "adamw":
        raise common.UserError(f"--optimizer {args.optimizer}: bitsandbytes cannot step sharded parameters; use adamw with torchrun or --offload")
    if sharded and args.pure_bfloat16:
        raise common.UserError("--pure-bfloat16 is for one device: leave it out, as sharding or --offload takes the float32 masters off the GPU")


def main(argv=None) -> None:
    parser = common.make_parser(__doc__, demo={"lr": 5e-4}, output="runs/full_ft", lr=1e-5)
    add = parser.add_argument_group("full fine-tuning").add_argument
    add("--optimizer", choices=["adamw", "adamw8bit", "paged_adamw8bit"], default="adamw",
        help="8-bit states are bitsandbytes'; paged ones move to host memory when the GPU runs short")
    add("--step-in-backward", action="store_true", help="each parameter steps in the backward pass and frees its gradient")
    add("--offload", action="store_true", help="keep weights, gradients and optimizer states in host memory (FSDP2), also on one GPU")
    add("--pure-bfloat16", action="store_true", help="no float32 masters: 4 to 8 bytes per parameter, but small updates are lost")
    add("--l2-sp", type=common.number(float, 0), default=0.0, metavar="ALPHA", help="penalty ALPHA ||w - w0||^2 towards the pretrained weights")
    train(parser.parse_args(argv))


if __name__ == "__main__":
    common.launch(main, out_of_memory="--gradient-checkpointing; a smaller --batch-size with more --grad-accum; --optimizer adamw8bit; "
                  "--offload; torchrun on more GPUs; --step-in-backward --max-grad-norm 0; --pure-bfloat16")  # fmt: skip

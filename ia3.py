"""(IA)^3: train vectors that scale each block's keys, values and inner MLP activations.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
Learning" (arXiv 2205.05638), section 3.3:

    softmax(Q (l_k * K)^T / sqrt(d)) (l_v * V)      and      (l_ff * act(W1 x)) W2

    K, V          (T, d_k), (T, d_v)     what k_proj and v_proj give     l_k, l_v  (d_k,), (d_v,)
    act(W1 x)     (T, d_ff)              what down_proj takes            l_ff      (d_ff,)
    l             ia3_l                  float32, ones; * scales every position alike

    y = l * (W x + b)      --targets: k_proj and v_proj, ia3_l (out, 1)
    y = W (l * x) + b      --feedforward-targets: down_proj, ia3_l (1, in)

Trained: L (d_k + d_v + d_ff) numbers, L the number of blocks; 614,400 of LLaMA-7B.

Choices and departures from the paper
  - The paper's T5 also scales the keys and values of cross-attention. A decoder has none.
  - l_k scales keys before rotary embedding, and before a norm of keys (Qwen3), as in PEFT.
  - With SwiGLU, down_proj takes silu(W1 x) * (W3 x): l_ff scales this product.
  - l is float32 and multiplies in float32: next to 1, bfloat16 has steps of 0.004 to 0.008.
  - The loss is the likelihood of the answer alone. The paper adds two for multiple choice.
  - AdamW replaces Adafactor, at the paper's rate. No weight decay: it would pull l to 0, not 1.

Questions people ask
  Why ones?       Then y = W x + b, and training starts from exactly the base model.
  Merge?          --merge-only scales rows or columns of W: no cost at inference.
  Other names?    A layer that computes queries, keys and values at once (Phi-3's qkv_proj) can
                  only be scaled whole. Experts without linear layers: --feedforward-targets ''.

Measured (one CPU core, torch 2.13, 2026-11-26): `python ia3.py` answers 0 of 100 held-out prompts
exactly before, and 98, 100 and 99 after (--seed 0, 1, 2). `python ia3.py --model
SmolLM2-135M-Instruct --data gsm8k_train.jsonl --eval-data 0.002 --max-steps 10 --batch-size 8 --lr
3e-2` takes the held-out loss from 1.283 to 0.862. So few steps need this higher rate.

    python ia3.py                                      # the bundled model learns a task
    python ia3.py --model BASE --data train.jsonl      # BASE: a folder or a Hub name
    python ia3.py --merge-only --model BASE --adapter runs/ia3 --output runs/merged
"""

import math

import numpy as np
import torch
from torch import nn

import common


class IA3Linear(nn.Module):
    """A frozen nn.Linear whose outputs, or inputs, are scaled. x (..., in) -> (..., out)"""

    def __init__(self, base: nn.Linear, scale_inputs: bool):
        super().__init__()
        self.base, self.scale_inputs = base, scale_inputs
        shape = (1, base.in_features) if scale_inputs else (base.out_features, 1)
        kind = {"dtype": torch.float32, "device": base.weight.device}
        self.ia3_l = nn.Parameter(torch.ones(shape, **kind))

    def forward(self, x):
        scale = self.ia3_l.flatten()
        if self.scale_inputs:
            return self.base((x * scale).to(x.dtype))  # W (l * x) + b
        return (self.base(x) * scale).to(x.dtype)  # l * (W x + b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base layer with its rows or columns scaled, in float32 and rounded once."""
        W, b = self.base.weight, self.base.bias
        W.copy_(W.float() * self.ia3_l)  # (out, in) * (out, 1), or * (1, in)
        if b is not None and not self.scale_inputs:
            b.copy_(b.float() * self.ia3_l.flatten())
        return self.base


def add_scales(model, args, device) -> dict:
    """Freeze the model and put an IA3Linear around every layer of --targets and
    --feedforward-targets, or as --adapter has it, with its tensors. -> PEFT's IA3Config"""
    targets, inner, tensors, flag = args.targets, args.feedforward_targets, {}, "--targets"
    if args.adapter:
        _, tensors = common.load_adapter(args.adapter, model, "IA3")
        shapes = {name.removesuffix(".ia3_l"): x.shape for name, x in tensors.items()}
        targets, flag = ",".join(shapes), f"--adapter {args.adapter}"
        inner = ",".join(name for name, shape in shapes.items() if shape[0] == 1)
    outputs = common.find_targets(model, targets, flag)
    inputs = common.find_targets(model, inner, "--feedforward-targets") if inner else []
    outputs = [name for name in outputs if name not in inputs]
    model.requires_grad_(False)
    for name in outputs + inputs:
        model.set_submodule(name, IA3Linear(model.get_submodule(name), name in inputs))
    common.fill_adapter(model, args, tensors, device, f"in {len(outputs + inputs)} layers")
    feedforward = common.target_modules(inputs, model)
    modules = common.target_modules(outputs, model) + feedforward
    return {"peft_type": "IA3", "target_modules": modules, "feedforward_modules": feedforward}


def train(args) -> None:
    device, dtype = common.setup(args)
    tokenizer = common.load_tokenizer(args)
    train_set, eval_set = common.load_data(args, tokenizer)
    if args.inspect:
        return common.inspect_examples(train_set, tokenizer)
    model = common.load_model(args, dtype, device)
    config = add_scales(model, args, device)
    if args.chat:
        return common.chat(model, tokenizer, args, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0, fused=True)

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


def merge_adapter(args) -> None:
    """--merge-only: the base with its weights scaled, in the base's dtype."""
    device, _ = common.setup(args)
    tokenizer = common.load_tokenizer(args)
    model = common.load_model(args, "auto", device)
    add_scales(model, args, device)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, IA3Linear):
            model.set_submodule(name, layer.merged())
    common.save_model(args, model, tokenizer, model.dtype)


def main(argv=None) -> None:
    parser = common.make_parser(__doc__, output="runs/ia3", lr=3e-3)
    add = parser.add_argument_group("(IA)^3").add_argument
    where = "layers whose outputs are scaled: names or a regular expression"
    add("--targets", default="k_proj,v_proj", help=where)
    add("--feedforward-targets", default="down_proj", help="layers with scaled inputs; '': none")
    add("--adapter", metavar="FOLDER", help="start from it, ours or PEFT's, with its targets")
    add("--merge-only", action="store_true", help="save --model with --adapter merged, and exit")
    args = common.parse_args(parser, argv, demo={"lr": 0.3, "epochs": 20.0})
    merge_adapter(args) if args.merge_only else train(args)


if __name__ == "__main__":
    common.launch(main, out_of_memory="--gradient-checkpointing; a smaller --micro-batch-tokens; "
                  "a shorter --max-length; qlora.py")  # fmt: skip

"""AdaLoRA: low-rank updates that are pruned while they train, so that each layer gets a rank.

Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning"
(arXiv 2303.10512), section 3, with the numbers of its equations:

    y = W0 x + s P diag(E) Q dropout(x)                            (3)
    loss = mean NLL + gamma * mean(||P^T P - Id||, ||Q Q^T - Id||)   (4), Id: the identity

With w a weight of triplet i (E_i, column i of P, row i of Q) and g its gradient, after an update:

    I    = |w g|                                   (8)      sensitivity in this step
    Ibar = 0.85 Ibar + 0.15 I                      (9)      smoothed sensitivity
    Ubar = 0.85 Ubar + 0.15 |I - Ibar|             (10)     uncertainty of the sensitivity
    S_i  = score(E_i) + mean score(P_i) + mean score(Q_i)   (7)   score(w) = Ibar Ubar   (11)
    E_i  = 0 unless S_i is among the b(t) largest of the whole model   (6)
    b(t) = bT + (b0 - bT) (1 - (t - t_i) / (T - t_f - t_i))^3   for t_i < t <= T - t_f   (12)

    x   (..., in), y  (..., out)   what enters and leaves the layer
    W0  base.weight  (out, in)     frozen, in bfloat16 on a GPU
    P   lora_B  (out, r)           float32, normal with standard deviation 0.02
    E   lora_E  (r, 1)             float32, zero
    Q   lora_A  (r, in)            float32, as P
    Ibar, Ubar  sensitivity, uncertainty  (r, 1 + in + out), a row for each triplet
    r   --rank; s = --alpha / r, whatever a layer's rank at the end; gamma  --orthogonality
    b0  r * layers; bT  --target-rank * layers; T steps; t_i, t_f  --t-init, --t-final, times T

Choices and departures from the paper, the first three as in the authors' code and in PEFT
  - The penalty is a mean of norms over all P and Q; the paper's (4) is a sum of squared norms.
  - w is taken after the update, and g is clipped. With w from before the update (Algorithm 1), a
    pruned E_i would be zero, so |w g| too, and it would hardly come back.
  - (12) as the paper prints it subtracts t_f from t, too: it would not begin at b0 and end at bT.
  - Pruned after every step, PEFT's default. In the paper a pruned triplet trains on for Delta_T
    steps, 100 for example, before it is judged again.

Questions people ask
  Why not prune the smallest E?   |w g| estimates how the loss would change without w.
  Is training cheaper?   No: all r triplets are computed to the end. The saved adapter is smaller.

Measured: `python adalora.py` answers 0 of 100 held-out prompts exactly before, and 100, 99 and 99
after (--seed 0, 1, 2; two CPU cores, torch 2.13, 2026-11-26); the ranks at the end are 2 to 12.
`python adalora.py --model SmolLM2-135M-Instruct --data gsm8k_train.jsonl --eval-data 0.005
--max-steps 10 --batch-size 8 --lr 1e-2` takes the held-out loss from 1.370 to 1.020.

    python adalora.py                                  # the bundled model learns a task
    python adalora.py --model BASE --data train.jsonl  # BASE: a folder or a Hub name
    python adalora.py --merge-only --model BASE --adapter runs/adalora --output runs/merged
"""

import math
import re

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common


class AdaLoRALinear(nn.Module):
    """A frozen nn.Linear with a trained update in triplets. x (..., in) -> (..., out)"""

    def __init__(self, base: nn.Linear, rank: int, scaling: float, dropout: float = 0.0):
        super().__init__()
        self.base = base
        kind = {"dtype": torch.float32, "device": base.weight.device}
        self.lora_A = nn.Parameter(0.02 * torch.randn(rank, base.in_features, **kind))  # Q
        self.lora_E = nn.Parameter(torch.zeros(rank, 1, **kind))  # E
        self.lora_B = nn.Parameter(0.02 * torch.randn(base.out_features, rank, **kind))  # P
        self.dropout, self.scaling = nn.Dropout(dropout), scaling
        self.widths = [1, base.in_features, base.out_features]
        for name in ("sensitivity", "uncertainty"):  # checkpoints have buffers, too
            self.register_buffer(name, torch.zeros(rank, sum(self.widths), **kind))
        self.register_buffer("kept", torch.ones(rank, 1, **kind))  # 0: pruned

    def forward(self, x):
        flat = x.flatten(0, -2)  # (N, in)
        y = self.base(flat)  # W0 x: (N, out)
        down = F.linear(self.dropout(flat), (self.lora_E * self.lora_A).to(x.dtype))  # (N, r)
        y.addmm_(down, self.lora_B.to(x.dtype).T, alpha=self.scaling)  # + s P down, in place
        return y.view(*x.shape[:-1], -1)

    def observe(self) -> None:
        """Equations 8 to 10."""
        w = torch.cat([self.lora_E, self.lora_A, self.lora_B.T], dim=1)  # (r, 1 + in + out)
        g = torch.cat([self.lora_E.grad, self.lora_A.grad, self.lora_B.grad.T], dim=1)
        now = (w * g).abs()
        self.sensitivity.lerp_(now, 0.15)
        self.uncertainty.lerp_((now - self.sensitivity).abs(), 0.15)

    def importance(self) -> torch.Tensor:
        """S of every triplet, equations 7 and 11: (r,)"""
        e, q, p = (self.sensitivity * self.uncertainty).split(self.widths, dim=1)
        return e[:, 0] + q.mean(1) + p.mean(1)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base layer with s P diag(E) Q added to its weight, in float32 and rounded once."""
        update = self.scaling * self.lora_B @ (self.lora_E * self.lora_A)  # (out, in)
        self.base.weight.copy_(self.base.weight.float() + update)
        return self.base


def orthogonality(layers) -> torch.Tensor:
    """The mean over all layers of the Frobenius norms ||P^T P - Id|| and ||Q Q^T - Id||."""
    matrices = [m for layer in layers for m in (layer.lora_B.T, layer.lora_A)]  # (r, ...)
    norms = [(m @ m.T - torch.eye(len(m), device=m.device)).norm() for m in matrices]
    return torch.stack(norms).mean()


@torch.no_grad()
def allocate(layers, args, step: int, T: int) -> None:
    """After an update: the importance of all triplets, and zeros for the least important ones."""
    b0, start = sum(len(layer.kept) for layer in layers), int(args.t_init * T)
    bT = min(b0, args.target_rank * len(layers))
    end = max(T - int(args.t_final * T), start + 1)
    if step < end:  # later the ranks stay
        for layer in layers:
            layer.observe()
    if start < step <= end:
        budget = int(bT + (b0 - bT) * (1 - (step - start) / (end - start)) ** 3)  # equation 12
        scores = torch.cat([layer.importance() for layer in layers])
        kept = torch.zeros_like(scores)
        kept[scores.topk(budget).indices] = 1  # equation 6
        for layer, part in zip(layers, kept.split([len(layer.kept) for layer in layers])):
            layer.kept.copy_(part[:, None])
    for layer in layers:
        layer.lora_E.mul_(layer.kept)


def add_adapter(model, args, device) -> tuple[dict[str, AdaLoRALinear], dict]:
    """Freeze the model and put an AdaLoRALinear around every layer of --targets, or as --adapter
    has it, with its tensors and ranks. -> layers by name, fields of PEFT's AdaLoraConfig"""
    targets, rank, alpha, tensors, flag = args.targets, args.rank, args.alpha, {}, "--targets"
    if args.adapter:
        reads = ("rank_pattern",)  # the tensors' shapes tell
        config, tensors = common.load_adapter(args.adapter, model, "ADALORA", reads=reads)
        rank, alpha = config["init_r"], float(config["lora_alpha"])
        names = [name.removesuffix(".lora_E") for name in tensors if name.endswith(".lora_E")]
        targets, flag = ",".join(names), f"--adapter {args.adapter}"
    adapted = common.find_targets(model, targets, flag)
    model.requires_grad_(False)
    layers = {}
    for name in adapted:
        r = len(tensors[f"{name}.lora_E"]) if args.adapter else rank
        layers[name] = AdaLoRALinear(model.get_submodule(name), r, alpha / rank, args.dropout)
        model.set_submodule(name, layers[name])
    common.fill_adapter(model, args, tensors, device, f"in {len(adapted)} layers")
    fields = {"init_r": rank, "target_r": args.target_rank, "lora_alpha": alpha}
    fields |= {"lora_dropout": args.dropout, "target_modules": adapted}
    return layers, {"peft_type": "ADALORA", **fields}


def train(args) -> None:
    device, dtype = common.setup(args)
    tokenizer = common.load_tokenizer(args)
    train_set, eval_set = common.load_data(args, tokenizer)
    if args.inspect:
        return common.inspect_examples(train_set, tokenizer)
    model = common.load_model(args, dtype, device, shard=args.shard)
    layers, config = add_adapter(model, args, device)
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

    for step in range(run["step"] + 1, len(steps) + 1):
        common.seed_step(args, step)  # dropout
        lr = common.learning_rate(step, len(steps), args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        examples = train_set[steps[step - 1]]
        num_targets = common.count_targets(examples)  # of all forward passes and GPUs
        loss = torch.zeros((), device=device)
        for batch in common.micro_batches(examples, args, device):  # this GPU's passes
            nll = -model.target_logps(**batch).sum()  # cross-entropy
            (nll / num_targets).backward()  # a mean over the step's targets
            loss += nll.detach() / num_targets
        common.sum_gradients(model)  # over GPUs
        (args.orthogonality * orthogonality(layers.values())).backward()  # the same on every GPU
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        optimizer.step()
        allocate(layers.values(), args, step, len(steps))
        optimizer.zero_grad()
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
    save(args, model, tokenizer, layers, config | {"total_step": max(1, len(steps))})
    log.done()


def save(args, model, tokenizer, layers, config: dict) -> None:
    """Print the ranks, blocks from the first to the last, and save what is kept of each layer."""
    tensors, pattern, ranks = {}, {}, {}
    for name, layer in layers.items():
        kept = layer.kept[:, 0].bool()
        parts = {"A": layer.lora_A[kept], "E": layer.lora_E[kept], "B": layer.lora_B[:, kept]}
        tensors |= {f"base_model.model.{name}.lora_{key}": x for key, x in parts.items()}
        # PEFT makes init_r triplets and then takes the True ones
        pattern[f"{name}.lora_E"] = kept.tolist() + [False] * (config["init_r"] - len(kept))
        ranks.setdefault(re.sub(r"\d+", "*", name), []).append(str(len(parts["E"])))
    for name, numbers in ranks.items():
        common.say(f"rank of {name}: {' '.join(numbers)}")
    common.save_adapter(args, model, tokenizer, config | {"rank_pattern": pattern}, tensors)


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
    """--merge-only: the base with the adapter added to its weights, in the base's dtype."""
    device, _ = common.setup(args)
    tokenizer = common.load_tokenizer(args)
    model = common.load_model(args, "auto", device)
    for name, layer in add_adapter(model, args, device)[0].items():
        model.set_submodule(name, layer.merged())
    common.save_model(args, model, tokenizer, model.dtype)


def main(argv=None) -> None:
    parser = common.make_parser(__doc__, output="runs/adalora", lr=1e-3)
    common.add_adapter_flags(parser, rank=12)
    add = parser.add_argument_group("AdaLoRA").add_argument
    add("--target-rank", type=int, default=8, help="mean rank at the end; --rank: at the start")
    add("--t-init", type=float, default=0.1, help="share of the steps before pruning")
    add("--t-final", type=float, default=0.5, help="share of the steps after pruning")
    add("--orthogonality", type=float, default=0.5, help="weight of the penalty on P and Q")
    args = common.parse_args(parser, argv, demo={"lr": 1e-2, "epochs": 6.0})
    merge(args) if args.merge_only else train(args)


if __name__ == "__main__":
    common.launch(main, out_of_memory="--gradient-checkpointing; a smaller --micro-batch-tokens; "
                  "a shorter --max-length; qlora.py")  # fmt: skip

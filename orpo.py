"""ORPO: supervised fine-tuning and preference learning in one loss, without a reference model.

Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model" (arXiv
2403.07691), equations 3 to 7:

    L = NLL(x, y_w) - lambda log sigmoid(z)
    z = log odds(y_w) - log odds(y_l) = (p_w - p_l) - [log1mexp(p_w) - log1mexp(p_l)]
    odds(y) = q / (1 - q)          q = exp(p)          p = 1/|y| log pi(y|x)

    x        the prompt          y_w, y_l  better, worse (P,): the answers of a pair
    p        mean_logps  (S,)    the MEAN over an answer's tokens, end of turn included, in nats
    log1mexp(p) = log(1 - exp(p)), for p < 0
    NLL      negative log-likelihood of prompt and chosen answer, a mean over their tokens
    lambda   --lambda

The first term teaches the chosen answers, as in sft.py. SFT alone would make the rejected answers
more likely too. The second term counters that. So ORPO starts from a base model, not from a model
after SFT.

Choices and departures from the paper
  - The NLL covers prompt and answer, as in the authors' default. --loss-on answers leaves the
    prompt out.
  - The authors' mask of an answer includes one padding token. Ours is the answer and its end of
    turn.
  - log1mexp first clamps p to at most -1e-6: torch.where passes on NaN gradients even of the
    branch that it does not select.
  - The NLL is a mean over all tokens of a step. The authors take a mean per micro-batch.
  - A prompt is computed once for all its answers (see dpo.py).

Questions people ask
  Why odds?        log odds = log q - log(1 - q) varies more than log q. So log sigmoid saturates
                   sooner and lowers the rejected answer less (the paper's section 7). For small
                   q, both are the same.
  Sum or mean?     Means: p over an answer's tokens, the NLL over the tokens of the step, the odds
                   term over its prompts.
  Loss at step 0?  The NLL of the data plus about 0.1 ln 2. log_odds starts near 0.
  Which --lr?      The paper's 8e-6 for all parameters, about 1e-4 with --lora-rank.
  Several answers? "responses" (best first) instead of chosen and rejected gives all their pairs.
                   Together these weigh as much as one pair.

Measured: `python orpo.py` raises the accuracy on 105 held-out pairs from 0.56, 0.56 and 0.62 to
1.00, 1.00 and 0.99 (--seed 0, 1, 2; two CPU cores, torch 2.13, 2026-11-26). It uses --loss-on
answers: the bundled model was never trained on prompts, and training on them harms its answers.

    python orpo.py                                      # the bundled model writes kind reviews
    python orpo.py --model BASE --data pairs.jsonl      # all parameters
    python orpo.py --model BASE --data pairs.jsonl --lora-rank 16 --lr 1e-4
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common


def log1mexp(p):
    """log(1 - exp(p)) for p < 0, accurate at both ends."""
    p = p.clamp(max=-1e-6)
    return torch.where(p > -math.log(2), torch.log(-torch.expm1(p)), torch.log1p(-torch.exp(p)))


def log_odds_ratio(chosen_logps, rejected_logps):
    """z of mean log-probabilities, (P,) each -> (P,)"""
    log_odds = chosen_logps - rejected_logps
    return log_odds - (log1mexp(chosen_logps) - log1mexp(rejected_logps))


def orpo_loss(chosen_logps, rejected_logps, chosen_nll=0.0, lambda_: float = 0.1):
    """Equation 6. Mean log-probabilities of the answers, (P,) each, and the NLL of the chosen
    ones, (P,) or a number -> losses (P,)"""
    return chosen_nll - lambda_ * F.logsigmoid(log_odds_ratio(chosen_logps, rejected_logps))


def pair_figures(model, batch: dict, nll_scale: float, args) -> dict[str, torch.Tensor]:
    """Loss and metrics of a forward pass, as sums over its prompts.

    batch: the pass's `examples`, each with stretches and is_target, and the inputs of target_logps.
    nll_scale: prompts / NLL tokens of the whole step. The caller divides all sums by the number of
    prompts.
    """
    device, examples = batch["input_ids"].device, batch.pop("examples")
    stretch, length, better, worse, weight, _ = common.find_pairs(examples, device)
    sums = common.sum_stretches(model.target_logps(**batch), stretch, length)  # (S,)
    starts = np.cumsum([0, *(len(example["stretches"]) for example in examples)])[:-1]
    in_nll = torch.tensor([*starts, *starts + 1], dtype=int, device=device)  # prompt and best
    nll = -sums[in_nll].sum() * nll_scale
    mean_logps = sums / length.clamp(min=1)
    chosen, rejected = mean_logps[better], mean_logps[worse]  # (P,)
    odds_loss = (weight * orpo_loss(chosen, rejected, lambda_=args.lambda_)).sum()
    figures = {"log_odds": log_odds_ratio(chosen, rejected), "accuracy": chosen > rejected}
    figures |= {"chosen_logps": chosen, "rejected_logps": rejected}
    means = {name: (weight * x).sum() for name, x in figures.items()}
    return {"loss": nll + odds_loss, "nll": nll, "odds_loss": odds_loss, **means}


def prompts_per_token(examples: dict) -> float:
    """The number of prompts divided by the number of NLL tokens: targets in prompts and chosen
    answers."""
    ends = [sum(lengths[:2]) for lengths in examples["stretches"]]
    return len(ends) / sum(np.sum(x[:end]) for x, end in zip(examples["is_target"], ends))


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
    train_set, eval_set = common.load_data(args, tokenizer, "pairs")
    if args.inspect:
        return common.inspect_examples(train_set, tokenizer)
    lora = args.rank or args.adapter
    shard = args.offload or (args.shard if lora else common.RANKS > 1)
    weights = None if lora else torch.float32  # kept in float32 if all of them train
    four_bits = args.load_in_4bit
    model = common.load_model(args, dtype, device, weights, shard, args.offload, four_bits)
    config = common.add_adapter(model, args, LoRALinear, device) if lora else {}
    if args.chat:
        return common.chat(model, tokenizer, args, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(common.decay_groups(model, args), lr=args.lr, fused=True)

    def measure(batch: dict, nll_scale: float) -> dict[str, torch.Tensor]:
        return pair_figures(model, batch, nll_scale, args)

    # --- copied from dpo.py: start of a run on pairs ---
    steps = common.plan_steps(train_set, args)  # the examples of every optimizer step
    common.describe_run(train_set, steps, args, device, dtype)
    run = common.start_run(args, model, optimizer, train_set, steps)
    log = common.Log(args, run, len(steps), device)
    samples_before, shown = None, eval_set or train_set  # whose answers are shown
    if run["step"] == 0:
        samples_before = answer_samples(model, tokenizer, shown, args, device, log)
        if eval_set:
            log.evaluation(**held_out_figures(model, eval_set, measure, args, device))
    # --- end ---

    for step in range(run["step"] + 1, len(steps) + 1):
        common.seed_step(args, step)  # dropout
        lr = common.learning_rate(step, len(steps), args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        examples, figures = train_set[steps[step - 1]], {}
        num_prompts = len(steps[step - 1])  # of all forward passes and GPUs
        nll_scale = prompts_per_token(examples)
        for batch in common.micro_batches(examples, args, device):  # this GPU's part
            part = measure(batch, nll_scale)
            (part["loss"] / num_prompts).backward()  # a mean over the step
            for name, value in part.items():
                figures[name] = figures.get(name, 0.0) + value.detach() / num_prompts
        common.sum_gradients(model)  # over GPUs
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        # --- copied from dpo.py: update on pairs ---
        optimizer.step()
        optimizer.zero_grad()
        log.step_done(examples, lr=lr, grad_norm=grad_norm, **figures)

        if eval_set and (step % args.eval_every == 0 or step == len(steps)):
            log.flush()  # so that tokens_per_second leaves the evaluation out
            held_out = held_out_figures(model, eval_set, measure, args, device)
            log.evaluation(**held_out)
            if args.patience and held_out["loss"] < run["best_loss"]:
                run |= {"best_loss": held_out["loss"], "best_step": step}
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
    if lora:
        common.save_adapter(args, model, tokenizer, config)
    else:
        common.save_model(args, model, tokenizer, dtype)
    log.done()


def held_out_figures(model, eval_set, measure, args, device) -> dict[str, float]:
    """Means of what measure(batch, nll_scale) sums, over the held-out prompts."""
    figures, nll_scale = {}, prompts_per_token(eval_set[:])
    with common.evaluating(model):
        for first in range(0, len(eval_set), 256):
            for batch in common.micro_batches(eval_set[first : first + 256], args, device):
                for name, value in measure(batch, nll_scale).items():
                    figures[name] = figures.get(name, 0.0) + value.double()
    sums = common.sum_over_ranks(torch.stack([*figures.values()])) / len(eval_set)
    return dict(zip(figures, sums.tolist()))


# --- copied from dpo.py: samples of pairs ---
TITLES = ("prompt", "before training", "after", "chosen", "rejected")


def answer_samples(model, tokenizer, examples, args, device, log) -> list[dict[str, str]]:
    """Texts of the first --samples examples: prompt, best and worst answer, the model's answer."""
    samples = []
    for n in range(min(args.samples, len(examples))):
        edges = np.cumsum(examples[n]["stretches"])[:-1]
        prompt, best, *_, worst = np.split(examples[n]["input_ids"], edges)
        texts = tokenizer.batch_decode([prompt, best, worst], skip_special_tokens=True)
        texts += common.generate(model, tokenizer, [prompt.tolist()], device)
        samples.append(dict(zip(("prompt", "chosen", "rejected", "after"), texts)))
    return samples


def print_samples(before, after) -> None:
    """before: None if the run was resumed."""
    for n, texts in enumerate(after[:3]):
        texts = texts | ({"before training": before[n]["after"]} if before else {})
        keys = [key for key in TITLES if key in texts]
        common.say("\n" + "\n".join(f"--- {key} ---\n{texts[key].strip()}" for key in keys))


# --- end ---


def main(argv=None) -> None:
    parser = common.make_parser(__doc__, output="runs/orpo", lr=8e-6)
    add = parser.add_argument_group("ORPO").add_argument
    weight = "weight of the odds-ratio term"
    add("--lambda", dest="lambda_", type=float, default=0.1, metavar="LAMBDA", help=weight)
    tokens = "tokens of the NLL: prompt and chosen answer, or only the answer"
    add("--loss-on", choices=["all", "answers"], default="all", help=tokens)
    add("--offload", action="store_true", help="keep weights and optimizer states in host memory")
    add("--load-in-4bit", action="store_true", help="base in 4 bits; needs an adapter")
    common.add_adapter_flags(parser, prefix="lora-", rank=0)
    demo = {"data": [str(common.EXAMPLES / "pairs.jsonl")], "lr": 1e-4, "samples": 3}
    demo |= {"loss_on": "answers"}
    train(common.parse_args(parser, argv, demo=demo))


if __name__ == "__main__":
    common.launch(
        main,
        out_of_memory="--gradient-checkpointing; a smaller --micro-batch-tokens; a shorter "
        "--max-length; --lora-rank 16; --offload; torchrun on more GPUs",
    )

"""Odds-ratio preference optimisation (ORPO): supervised fine-tuning and preference learning in one loss, without a reference.

Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model" (arXiv 2403.07691), equations 3 to 7:

    p = 1/|y| log pi(y|x)          odds(y) = exp(p) / (1 - exp(p))
    z = log odds(y_w) - log odds(y_l) = (p_w - p_l) - (log1mexp(p_w) - log1mexp(p_l))
    L = NLL(y_w) - lambda log sigmoid(z)

    x        the prompt            y_w, y_l  the chosen and the rejected answer; |y| tokens of an answer; D answers and P pairs in a
                                             micro-batch
    p        mean_logps   (D,)     the MEAN log-probability of an answer's tokens, its end of turn among them, in nats
    log1mexp(p) = log(1 - exp(p))  for p < 0
    NLL      negative log-likelihood of prompt and chosen answer, mean over their tokens in the whole optimizer step
    lambda   --lambda     0.1

The first term teaches the chosen answers, as sft.py does; the second holds the rejected ones down, which SFT alone would raise
along with them. So ORPO starts from a base model, not from an SFT model, and needs one model and two answers to each prompt.

Choices and departures from the paper
  - NLL covers prompt and answer as in the authors' default; --nll-on answers leaves the prompt out.
  - The authors' mask of the answer's mean takes one padding token in; ours is the answer and its end of turn.
  - log1mexp clamps p to at most -1e-6 before it branches: a masked branch would still send a NaN through the gradient.
  - NLL is the mean over all tokens of the step, whatever its micro-batches; the authors' is the mean of each micro-batch.

Questions people ask
  Why odds, not probabilities?   With P = exp(p), log odds = log P - log(1 - P) spread wider than log P, so log sigmoid saturates sooner
                                 and pushes the rejected answer down less (section 7 of the paper). For small P both are the same.
  Sum or mean?                   Means: p over an answer's tokens, NLL over the tokens of the step, the odds term over its prompts.
  Loss at step 0?                Not known beforehand: the NLL of the data plus about 0.1 x 0.69. log_odds begins near 0.
  Which rate?                    The default is the paper's 8e-6 where every parameter trains, and 1e-4 for LoRA.
  What are accuracy and margin?  The share of pairs with p_w > p_l (a tie is wrong), and the mean of lambda (p_w - p_l).
  Several answers?               A row {"prompt", "responses"}, best first, counts as all its pairs, each with weight 2 / (K (K - 1)).

Measured: `python orpo.py` takes the bundled model's held-out accuracy from 0.54 to 0.97, 0.99 and 0.97 with three seeds (README, Results).

    python orpo.py                                                    # the bundled model learns to be kind, in a minute
    python orpo.py --model BASE --data pairs.jsonl                    # every parameter; BASE: a folder or a Hugging Face Hub name
    python orpo.py --model BASE --data pairs.jsonl --lora-rank 16     # an adapter
"""

import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import common_before as common


def log1mexp(p):
    """log(1 - exp(p)) for p < 0, accurate at both ends. p is clamped first: log 0 in a branch not taken has a NaN gradient."""
    p = p.clamp(max=-1e-6)
    return torch.where(p > -math.log(2), torch.log(-torch.expm1(p)), torch.log1p(-torch.exp(p)))


def log_odds_ratio(chosen_logps, rejected_logps):
    """z, the log of equation 5: mean log-probabilities of the answers, (P,) each -> (P,)."""
    return (chosen_logps - rejected_logps) - (log1mexp(chosen_logps) - log1mexp(rejected_logps))


def orpo_loss(chosen_logps, rejected_logps, chosen_nll=0.0, lambda_: float = 0.1):
    """Equation 6. Mean log-probabilities of the answers, (P,) each, and the NLL of the chosen ones, (P,) or a number
    -> (P,) losses, one per pair."""
    return chosen_nll - lambda_ * F.logsigmoid(log_odds_ratio(chosen_logps, rejected_logps))


def figures(args, model, batch: dict, nll_scale: float) -> dict[str, torch.Tensor]:
    """What a micro-batch adds to the loss and the metrics, as sums over its prompts. A pair of K ranked answers weighs
    2 / (K (K - 1)), so that each prompt counts once. nll_scale: the step's prompts / its NLL tokens, because everything is divided
    by the prompts later, and the NLL is a mean over tokens."""
    targets, index = [batch["targets"]], [batch["target_index"]]
    if args.nll_on == "all":  # each prompt once, before its chosen answer
        targets, index = [*targets, batch["other_targets"]], [*index, batch["other_index"]]
    logps = model.target_logps(targets=torch.cat(targets), target_index=torch.cat(index), **common.model_inputs(batch))
    answer, better, worse = batch["answer"], batch["better"], batch["worse"]  # (N,), (P,), (P,)
    in_answers, others = logps[: len(answer)], logps[len(answer) :]  # (N,), (M,) or none

    zeros = logps.new_zeros(len(batch["last"]))  # (D,)
    mean_logps = zeros.index_add(0, answer, in_answers) / zeros.index_add(0, answer, torch.ones_like(in_answers))
    nll = -(in_answers[batch["best"]].sum() + others.sum()) * nll_scale
    chosen_logps, rejected_logps = mean_logps[better], mean_logps[worse]
    odds_loss = (batch["weight"] * orpo_loss(chosen_logps, rejected_logps, lambda_=args.lambda_)).sum()
    pairs = {
        "log_odds": log_odds_ratio(chosen_logps, rejected_logps), "accuracy": (chosen_logps > rejected_logps).float(),
        "margin": args.lambda_ * (chosen_logps - rejected_logps), "chosen_logps": chosen_logps, "rejected_logps": rejected_logps,
    }  # fmt: skip
    return {"loss": nll + odds_loss, "nll": nll, "odds_loss": odds_loss} | {
        name: (batch["weight"] * values.detach()).sum() for name, values in pairs.items()
    }


def nll_tokens(args, micro_batches) -> float:
    """Tokens that the NLL of a step is the mean over, of all ranks: of the chosen answers, and of the prompts with --nll-on all."""
    return common.over_ranks(sum(len(batch["best"]) + len(batch["other_targets"]) * (args.nll_on == "all") for batch in micro_batches))


def train(args) -> None:
    device, dtype = common.setup(args)
    tokenizer, vocab_size = common.load_tokenizer(args)
    corpus, evaluation = common.load_data(args, tokenizer, vocab_size, device, kind="preferences")
    if args.inspect:
        return corpus.show(tokenizer)
    model = load_trained(args, dtype, device)

    def measure() -> dict[str, float]:
        nll_scale = len(evaluation.rows()) / nll_tokens(args, evaluation.deal(evaluation.rows()))
        return common.corpus_means(model, evaluation, lambda batch: figures(args, model, batch, nll_scale))

    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = common.decay_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    run = common.Run(args, model, tokenizer, [optimizer], corpus, evaluation, measure)
    run.begin()

    for epoch, micro_batches, tokens, prompts in run.steps():
        lr = common.learning_rate(run.step, run.total_steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums, nll_scale = {}, prompts / nll_tokens(args, micro_batches)
        for batch in micro_batches:
            part = figures(args, model, batch, nll_scale)
            (part["loss"] / prompts).backward()  # a mean over the whole step, over micro-batches and ranks
            sums = {name: sums.get(name, 0.0) + value.detach() for name, value in part.items()}
        # --- copied from dpo.py: update ---
        if run.step == 0:
            common.check_gradients(model)
        common.sum_gradients(parameters)  # over ranks, under torchrun
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        run.end_step(epoch, sums, tokens, prompts, lr, grad_norm)
        # --- end ---

    run.show_samples()
    save_trained(args, model, tokenizer, dtype)
    run.finish()
    common.say_how_to_use(args, adapter=bool(lora_layers(model)))


# --- copied from lora.py: LoRALinear ---
class LoRALinear(nn.Module):
    """A frozen nn.Linear with a trained low-rank update. x (..., in) -> (..., out)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        flat = x.flatten(0, -2)  # (N, in)
        y = self.base(flat)  # W0 x: (N, out)
        down = F.linear(self.dropout(flat), self.lora_A.to(x.dtype))  # A x: (N, r)
        y.addmm_(down, self.lora_B.to(x.dtype).T, alpha=self.scaling)  # + s B (A x), in place: base's backward pass needs no y
        return y.view(*x.shape[:-1], -1)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Add s B A to the base layer's weight, in float32 and rounded once. -> the base layer"""
        self.base.weight.copy_(self.base.weight.float() + self.scaling * self.lora_B @ self.lora_A)
        return self.base
# --- end ---


# --- copied from lora.py: putting LoRA on a model ---
def add_lora(model, targets: str, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False) -> None:
    """Freeze the model and put a LoRALinear around every target (see `common.linear_layers`)."""
    model.requires_grad_(False)
    for name, layer in common.linear_layers(model, targets).items():
        model.set_submodule(name, LoRALinear(layer, rank, alpha, dropout, rslora))


def lora_layers(model) -> dict[str, LoRALinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def adapter_tensors(model) -> dict[str, nn.Parameter]:
    """What is trained, under the names that PEFT gives it."""
    tensors = {}
    for name, layer in lora_layers(model).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A  # (r, in)
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B  # (out, r)
    return tensors
# --- end ---


# --- copied from sft.py: what trains ---
def add_training_flags(parser) -> None:
    add = parser.add_argument_group("what trains").add_argument
    add("--lora-rank", dest="rank", type=common.number(int, 0), default=0, metavar="R",
        help="train a LoRA adapter of this rank; 0 trains every parameter")
    add("--lora-alpha", dest="alpha", type=common.number(float, 0), default=32, help="the update is scaled by alpha / rank")
    add("--targets", default="all-linear", help="layers that LoRA adapts: all-linear (all but the output head), or names such as q_proj,v_proj")
    add("--adapter", metavar="FOLDER", help="continue from this LoRA adapter, ours or PEFT's; its rank, alpha and targets are used")
    parser.adapter_brings = ("--lora-rank", "--lora-alpha", "--targets")
    add("--offload", action="store_true", help="every parameter: keep weights, gradients and optimizer states in host memory (FSDP2)")
    add("--shard", action="store_true", help="LoRA under torchrun: each rank keeps only its part of the frozen weights (FSDP2)")
    parser.set_defaults(dropout=0.0, rslora=False)


def load_trained(args, dtype: torch.dtype, device: torch.device):
    """The model of --model: with a LoRA on frozen weights in dtype, or with float32 masters of every parameter."""
    lora = args.rank or args.adapter
    if lora and args.offload:
        raise common.UserError("--offload is for training every parameter: leave out --lora-rank and --adapter")
    common.check_shard(args)
    whole = not dist.is_initialized() or lora and not args.shard
    place = device if whole else torch.device("cpu")  # FSDP2 takes block after block to the GPU
    model = common.load_model(args, dtype, place, weight_dtype=dtype if lora else torch.float32)
    if args.adapter:
        load_lora(model, args)
    elif args.rank:
        add_lora(model, args.targets, args.rank, args.alpha)
    common.checkpoint_blocks(model, args)
    common.compile_blocks(model, args)
    if not lora:
        common.parallelize(model, dtype, device, args.offload)
    elif args.shard:
        common.shard(model, dtype, device)
    common.say("{:,} of {:,} parameters train".format(*common.count_parameters(model)))
    return model


def save_trained(args, model, tokenizer, dtype: torch.dtype) -> None:
    """What was trained: an adapter in PEFT's form, or a Hugging Face folder."""
    if lora_layers(model):
        save_lora(args, model, tokenizer)
    else:
        common.save_trained(Path(args.output), model, tokenizer, dtype, args.trust_remote_code)
# --- end ---


# --- copied from lora.py: saving and loading LoRA ---
def save_lora(args, model, tokenizer) -> None:
    """The adapter in PEFT's form."""
    config = {
        "peft_type": "LORA", "r": args.rank, "lora_alpha": args.alpha, "use_rslora": args.rslora, "lora_dropout": args.dropout,
        "target_modules": common.short_names(model, list(lora_layers(model))), "bias": "none",
        "use_dora": False, "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None,
    }  # fmt: skip
    common.save_adapter(args, model, tokenizer, config, adapter_tensors(model))


def load_lora(model, args) -> None:
    """Put the adapter of --adapter on the model, with its own rank, alpha and layers."""
    config, tensors = common.load_adapter(args.adapter, model, "LORA")
    args.rank, args.alpha, args.rslora = config["r"], config["lora_alpha"], config.get("use_rslora", False)
    names = [key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key]
    add_lora(model, ",".join(names), args.rank, args.alpha, args.dropout, args.rslora)
    common.fill_adapter(adapter_tensors(model), tensors, args.adapter)
# --- end ---


def main(argv=None) -> None:
    demo = {"data": [common.example("pairs.jsonl")], "lr": 1e-3, "batch_size": 8, "epochs": 1, "exact_match": 0}
    parser = common.make_parser(__doc__, demo=demo, output="runs/orpo", lr=None, data=[common.example("preferences.jsonl")])
    add = parser.add_argument_group("ORPO").add_argument
    add("--lambda", dest="lambda_", type=common.number(float, 0), default=0.1, metavar="LAMBDA", help="weight of the odds-ratio term")
    add("--nll-on", choices=["all", "answers"], default="all", help="tokens of the NLL: prompt and chosen answer, or the answer alone")
    add_training_flags(parser)
    args = parser.parse_args(argv)
    if args.lr is None:
        args.lr = 1e-4 if args.rank or args.adapter else 8e-6
    train(args)


if __name__ == "__main__":
    common.launch(main, out_of_memory="--gradient-checkpointing; a smaller --batch-size with more --grad-accum; a shorter --max-length; "
                  "--lora-rank 16; --offload; torchrun on more GPUs")  # fmt: skip

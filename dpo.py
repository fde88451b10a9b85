"""Direct preference optimisation (DPO): learn from pairs of a better and a worse answer, without a reward model or sampling.

Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model" (arXiv 2305.18290),
equation 7:

    h = log [pi(y_w|x) / ref(y_w|x)] - log [pi(y_l|x) / ref(y_l|x)]          L = - log sigmoid(beta h)

    x            the prompt          y_w, y_l   the chosen and the rejected answer; D answers and P pairs in a micro-batch
    log pi(y|x)  policy     (D,)     the SUM over the answer's tokens, its end of turn among them, in nats
    log ref      reference  (D,)     the same under the frozen starting point of training
    beta         --beta     0.1      how far the policy may go from the reference: larger stays nearer
    reward       beta (log pi - log ref): what "accuracy" (a tie counts half) and "margin" compare

Variants
  --label-smoothing E   cDPO (Mitchell 2023): a share E of the labels is wrong, - (1-E) log sigmoid(beta h) - E log sigmoid(-beta h)
  --loss ipo            IPO (Azar et al. 2023, arXiv 2310.12036, equation 17): (h - 1 / (2 beta))^2 with log-probabilities averaged
                        over each answer's tokens, as its authors confirmed; h has a finite target, where DPO keeps increasing it
  --loss simpo          SimPO (Meng et al. 2024, arXiv 2405.14734, equation 6): - log sigmoid(beta (p_w - p_l) - gamma), p mean
                        log-probabilities, and no reference at all. Its beta is 2 to 2.5, its --gamma 0.3 to 1.6

Choices and departures from the paper
  - AdamW with warmup and cosine decay; the authors took RMSprop, which needs less memory, at a constant rate after the warmup.
  - No dropout, as in the authors' code: it would add noise to a small difference of two large numbers.
  - Answers to one prompt are in one step; K ranked ones count as all their pairs, each with weight 2 / (K (K - 1)).

The reference is the model that training starts from, unless --reference names another:
  --lora-rank N         the same weights with the adapter as it was at first, B = 0: one model in memory
  --adapter FOLDER      the same weights with a copy of the starting adapter
  every parameter       log-probabilities computed once before training, in the batches of the first epoch (in bfloat16 an answer's
                        h moves by up to 0.3 nats with the batch it is in), and kept in --output/reference.safetensors: no
                        second model in memory
  --reference NAME      another model's log-probabilities, computed and kept in the same way before the policy is loaded

Questions people ask
  Sum or mean?          DPO sums over the answer's tokens, and then averages over pairs. IPO and SimPO average over the tokens.
  Which rate?           The default is 1e-6 where every parameter trains, and 2e-5 for LoRA.
  Loss at step 0?       ln 2 = 0.693: policy and reference are the same (not with --reference), so h = 0. The run stops if it is off
                        by more than 1e-4, or 0.05 in bfloat16. IPO starts at 1 / (4 beta^2) = 25.
  Both log-probabilities fall?  Usual: the loss sees only their difference. Look at chosen_logps; a smaller --lr, a larger --beta or
                        a short SFT on the chosen answers first (sft.py) holds it up.
  Several answers?      A row {"prompt", "responses"}, best first, counts as all its pairs.

Measured: 10 steps on four fifths of the bundled pairs take SmolLM2-135M-Instruct's held-out accuracy, by definition 0.5 at step 0, to
0.98 (--lora-rank 16 --lr 5e-5 --eval-fraction 0.2 --epochs 2; README, Results, with data on which it fails).

    python dpo.py                                                     # the bundled model learns to be kind, in a minute
    python dpo.py --model runs/sft --data pairs.jsonl                 # every parameter
    python dpo.py --model runs/sft --data pairs.jsonl --lora-rank 16  # an adapter
"""

import argparse
import hashlib
import json
import math
from contextlib import suppress
from itertools import chain
from pathlib import Path

import safetensors
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common_before as common


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta: float, label_smoothing: float = 0.0):
    """Equation 7. Log-probabilities of whole answers, summed over their tokens, (P,) each -> (P,) losses, one per pair."""
    h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


def ipo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta: float):
    """The same log-probabilities, but averaged over each answer's tokens, (P,) each -> (P,)."""
    h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return (h - 1 / (2 * beta)) ** 2


def simpo_loss(policy_chosen, policy_rejected, beta: float, gamma: float):
    """Log-probabilities averaged over each answer's tokens, (P,) each -> (P,)."""
    return -F.logsigmoid(beta * (policy_chosen - policy_rejected) - gamma)


def answer_logps(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of each answer given its prompt, summed over its tokens with the end of turn, and how many tokens these are: (D,)
    each. All answers run in one forward pass."""
    logps = model.target_logps(targets=batch["targets"], target_index=batch["target_index"], **common.model_inputs(batch))  # (N,)
    zeros = logps.new_zeros(len(batch["last"]))
    return zeros.index_add(0, batch["answer"], logps), zeros.index_add(0, batch["answer"], torch.ones_like(logps))


def figures(args, batch: dict, policy, length, reference) -> dict[str, torch.Tensor]:
    """What a micro-batch adds to the loss and the metrics. policy, length, reference (D,). A pair of K ranked answers weighs
    2 / (K (K - 1)), so that each prompt counts once."""
    if args.loss != "sigmoid":
        policy, reference = policy / length, reference / length
    better, worse = batch["better"], batch["worse"]  # (P,)
    if args.loss == "sigmoid":
        losses = dpo_loss(policy[better], policy[worse], reference[better], reference[worse], args.beta, args.label_smoothing)
    elif args.loss == "ipo":
        losses = ipo_loss(policy[better], policy[worse], reference[better], reference[worse], args.beta)
    else:
        losses = simpo_loss(policy[better], policy[worse], args.beta, args.gamma)
    rewards = args.beta * (policy - reference).detach()
    margin = rewards[better] - rewards[worse]
    pairs = {
        "loss": losses, "accuracy": (margin > 0).float() + 0.5 * (margin == 0), "margin": margin, "chosen_rewards": rewards[better],
        "rejected_rewards": rewards[worse], "chosen_logps": policy[better].detach(), "rejected_logps": policy[worse].detach(),
    }  # fmt: skip
    return {name: (batch["weight"] * values).sum() for name, values in pairs.items()}


def lora_reference(model):
    """-> reference(batch): answers' log-probabilities (D,) with the adapter as training found it (a fresh one, B = 0, is the base).
    One model in memory: the adapter and its copy change places for the time of a forward pass."""
    pairs = [(p, p.detach().clone()) for p in adapter_tensors(model).values()]

    @torch.no_grad()
    def exchange() -> None:
        for p, kept in pairs:  # by value: FSDP2 would not see a new .data
            now = p.detach().clone()
            p.copy_(kept)
            kept.copy_(now)

    def reference(batch: dict) -> torch.Tensor:
        exchange()
        try:
            with torch.no_grad():
                return answer_logps(model, batch)[0]
        finally:
            exchange()

    return reference


def checksum(logps: torch.Tensor) -> dict[str, str]:
    return {"sha256": hashlib.sha256(logps.numpy().tobytes()).hexdigest()}


def kept_reference(args, model, corpus, evaluation, dtype: torch.dtype):
    """-> reference(batch): answers' log-probabilities (D,) under a model that is not kept, from --output/reference.safetensors.
    The file is written first unless it is there, of the same model, data and batches."""
    path, device = Path(args.output) / "reference.safetensors", corpus.device
    if args.estimate:
        return lambda batch: torch.zeros(len(batch["last"]), device=device)
    common.claim(args)  # before anything in --output changes
    rows = [corpus.planned_rows(), evaluation.rows() if evaluation else []]
    about = [model.base_fingerprint, str(dtype), args.packing, args.batch_size, corpus.digests, hashlib.sha256(str(rows).encode()).hexdigest()]
    about, logps = {"about": json.dumps(about)}, None
    if path.exists():
        with suppress(safetensors.SafetensorError), safetensors.safe_open(path, "pt") as file:  # a damaged file is written anew
            kept = file.get_tensor("logps")
            logps = kept.to(device) if file.metadata() == about | checksum(kept) else None
    if common.over_ranks(logps is None, dist.ReduceOp.MAX):  # all ranks compute, or none
        logps = torch.zeros(len(corpus.table), device=device)  # of each document of the table, in nats
        with common.evaluating(model):
            count = math.ceil(sum(map(len, rows)) / (args.batch_size * common.world_size()))
            for batch in tqdm(chain(*map(corpus.deal, rows)), total=count, desc="reference", unit="batch", disable=common.rank() != 0):
                logps[batch["document"]] = answer_logps(model, batch)[0]
        if common.world_size() > 1:
            dist.all_reduce(logps)  # each rank has its own batches
        if common.rank() == 0:
            kept = logps.cpu()
            path.parent.mkdir(parents=True, exist_ok=True)
            common.save_into(path.parent, lambda folder: safetensors.torch.save_file({"logps": kept}, folder / path.name, about | checksum(kept)))
    return lambda batch: logps[batch["document"]]


def train(args) -> None:
    device, dtype = common.setup(args)
    tokenizer, vocab_size = common.load_tokenizer(args)
    corpus, evaluation = common.load_data(args, tokenizer, vocab_size, device, kind="preferences")
    if args.inspect:
        return corpus.show(tokenizer)
    reference = None
    if args.loss == "simpo":
        reference = lambda batch: torch.zeros(len(batch["last"]), device=device)  # noqa: E731
    elif args.reference:
        other = common.load_model(argparse.Namespace(**vars(args) | {"model": args.reference}), dtype, device)
        reference = kept_reference(args, other, corpus, evaluation, dtype)
        del other
    model = load_trained(args, dtype, device)
    common.disable_dropout(model)
    if reference is None:
        reference = lora_reference(model) if lora_layers(model) else kept_reference(args, model, corpus, evaluation, dtype)

    def measure() -> dict[str, float]:
        return common.corpus_means(model, evaluation, lambda batch: figures(args, batch, *answer_logps(model, batch), reference(batch)))

    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = common.decay_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    run = common.Run(args, model, tokenizer, [optimizer], corpus, evaluation, measure)
    run.begin()

    for epoch, micro_batches, tokens, prompts in run.steps():
        lr = common.learning_rate(run.step, run.total_steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums = {}
        for batch in micro_batches:
            start = reference(batch)  # (D,)
            part = figures(args, batch, *answer_logps(model, batch), start)
            (part["loss"] / prompts).backward()  # a mean over the prompts of the whole step, over micro-batches and ranks
            sums = {name: sums.get(name, 0.0) + value.detach() for name, value in part.items()}
        if run.step == 0 and args.loss == "sigmoid" and not args.reference:
            check_start(common.over_ranks(sums["loss"].item()) / prompts, dtype)
        # --- update ---
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


def check_start(loss: float, dtype: torch.dtype) -> None:
    """At step 0 the policy is the reference: h = 0, and the loss is ln 2 whatever beta and the label smoothing are."""
    if abs(loss - math.log(2)) > (1e-4 if dtype == torch.float32 else 0.05):
        raise common.UserError(f"the loss at step 0 is {loss:.5f}, not ln 2: policy and reference differ. Delete "
                               "reference.safetensors in --output, or name the reference with --reference")  # fmt: skip


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
    demo = {"data": [common.example("pairs.jsonl")], "lr": 2e-4, "batch_size": 8, "epochs": 1, "exact_match": 0}
    parser = common.make_parser(__doc__, demo=demo, output="runs/dpo", lr=None, epochs=1, data=[common.example("preferences.jsonl")])
    add = parser.add_argument_group("DPO").add_argument
    add("--beta", type=common.number(float, 1e-6), default=None, help="how near the policy stays to the reference (0.1; 2 with --loss simpo)")
    add("--loss", choices=["sigmoid", "ipo", "simpo"], default="sigmoid", help="DPO's own, IPO's squared or SimPO's without a reference")
    add("--label-smoothing", type=common.number(float, 0, 0.5), default=0.0, metavar="E", help="cDPO: the share of pairs whose label is wrong")
    add("--gamma", type=common.number(float, 0), default=None, help="SimPO's margin (default: 1)")
    add("--reference", metavar="NAME", help="the reference is this model (folder or Hub name) and not the start of training")
    add_training_flags(parser)
    args = parser.parse_args(argv)
    if args.label_smoothing and args.loss != "sigmoid":
        raise common.UserError("--label-smoothing is for --loss sigmoid")
    if args.loss != "simpo" and args.gamma is not None or args.loss == "simpo" and args.reference:
        raise common.UserError("--gamma is SimPO's alone, and --loss simpo has no --reference")
    if args.beta is None:
        args.beta = 2.0 if args.loss == "simpo" else 0.1
    args.gamma = 1.0 if args.gamma is None else args.gamma
    if args.lr is None:
        args.lr = 2e-5 if args.rank or args.adapter else 1e-6
    train(args)


if __name__ == "__main__":
    common.launch(main, out_of_memory="--gradient-checkpointing; a smaller --batch-size with more --grad-accum; a shorter --max-length; "
                  "--lora-rank 16; --offload; torchrun on more GPUs")  # fmt: skip

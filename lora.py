"""LoRA: train two small matrices beside each frozen linear layer instead of the layer itself.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685), equation 3,
with the scaling of its section 4.1 and the dropout of the authors' code:

    y = W0 x + s B A dropout(x)         s = alpha / r   (rsLoRA, arXiv 2312.03732: alpha / sqrt(r))

    x   (..., in), y  (..., out)   what enters and leaves the layer
    W0  base.weight  (out, in)   frozen, in bfloat16 on a GPU
    A   lora_A       (r, in)     float32, kaiming_uniform(a=sqrt 5)
    B   lora_B       (out, r)    float32, zero
    r   --rank, alpha  --alpha, s  scaling

Choices and departures from the paper
  - Every linear layer is adapted, not only the attention's q and v: adapting all of them is what it took to match
    full fine-tuning (QLoRA, section 4). The output head never is. --targets q_proj,v_proj gives the paper's.
  - A starts as in the authors' code (kaiming_uniform), not Gaussian as in the paper.
  - A and B stay float32 and are cast in the forward pass: AdamW's small updates would vanish in bfloat16.
  - Dropout is 0: with it each layer keeps its own dropped-out input for the backward pass, where q, k and v share one.
  - In PEFT's words: LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"). PEFT computes A and B in float32, this in x's dtype.

Questions people ask
  Why is B zero?         Then B A = 0 and training starts from exactly the base model. With both zero, neither gets a
                         gradient; with both random, the base is disturbed before the first step.
  Why alpha / r?         So that the learning rate need change less with the rank (for high ranks --rslora does it better).
                         The defaults are r = 16 and alpha = 32; with another r, alpha is yours to change.
  Sum or mean?           The loss is the mean over all target tokens of an optimizer step, across its micro-batches: 8x1,
                         4x2 and 1x8 give the same gradient. Targets are the assistant's tokens and the end-of-turn token.
  Merge or keep apart?   Merged (--merge) costs nothing at inference. s B A is added in float32 and rounded once;
                         subtracting it again would not give the base back, so keep the adapter.

Measured: 32 steps of some 600 tokens of GSM8K take SmolLM2-135M's held-out loss from 1.316 to 0.967 (README, Results).

    python lora.py                                                     # the bundled model learns a task, in a minute
    python lora.py --model BASE --data train.jsonl --merge             # BASE: a folder or a Hugging Face Hub name
    python lora.py --model BASE --adapter runs/lora --max-steps 0 --merge --output runs/merged    # merge an adapter, train nothing
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common


# --- LoRALinear ---
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


# --- putting LoRA on a model ---
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


def train(args) -> None:
    device, dtype = common.setup(args)
    tokenizer, vocab_size = common.load_tokenizer(args)
    corpus, evaluation = common.load_data(args, tokenizer, vocab_size, device)
    if args.inspect:
        return corpus.show(tokenizer)
    common.check_shard(args)
    model = common.load_model(args, dtype, torch.device("cpu") if args.shard else device)  # FSDP2 takes block after block to the GPU
    if args.adapter:
        load_lora(model, args)
    else:
        add_lora(model, args.targets, args.rank, args.alpha, args.dropout, args.rslora)
    common.checkpoint_blocks(model, args)
    common.compile_blocks(model, args)
    if args.shard:
        common.shard(model, dtype, device)
    trainable, total = common.count_parameters(model)
    common.say(f"{trainable:,} of {total:,} parameters train ({trainable / total:.2%}), in {len(lora_layers(model))} layers")

    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = common.decay_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    # --- training loop ---
    run = common.Run(args, model, tokenizer, [optimizer], corpus, evaluation)
    run.begin()
    for epoch, micro_batches, tokens, num_targets in run.steps():  # epochs done after this step; the counts are of all ranks
        lr = common.learning_rate(run.step, run.total_steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        nll = torch.zeros((), device=device)
        for batch in micro_batches:
            batch_nll = -model.target_logps(**batch).sum()  # cross-entropy, summed over the batch's targets (common.py, section 7)
            (batch_nll / num_targets).backward()  # of the whole step: a mean over its tokens, not a mean of means
            nll += batch_nll.detach()
        if run.step == 0:
            common.check_gradients(model)
        common.sum_gradients(parameters)  # over ranks, under torchrun
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        run.end_step(epoch, {"loss": nll}, tokens, num_targets, lr, grad_norm)
    # --- end ---

    run.show_samples()
    save_lora(args, model, tokenizer)
    if args.merge:
        merge_lora(model)
        common.save_model(Path(args.output) / "merged", model, tokenizer)
    run.finish()
    common.say_how_to_use(args)


# --- saving and loading LoRA ---
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


def merge_lora(model) -> None:
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.merged())


def main(argv=None) -> None:
    parser = common.make_parser(__doc__, demo={"lr": 3e-3}, output="runs/lora", lr=2e-4)
    add = parser.add_argument_group("LoRA").add_argument
    add("--rank", type=common.number(int, 1), default=16, help="r, the rank of the update: how much it can change")
    add("--alpha", type=common.number(float, 0), default=32, help="the update is scaled by alpha / rank")
    add("--dropout", type=common.number(float, 0, 1), default=0.0, help="dropout on the update's input")
    add("--targets", default="all-linear", help="layers that LoRA adapts: all-linear (all but the output head), or names such as q_proj,v_proj")
    add("--rslora", action="store_true", help="scale by alpha / sqrt(rank) instead, which keeps high ranks learning")
    add("--adapter", metavar="FOLDER", help="continue from this LoRA adapter, ours or PEFT's; its rank, alpha and targets are used")
    parser.adapter_brings = ("--rank", "--alpha", "--targets", "--rslora")
    add("--shard", action="store_true", help="under torchrun: each rank keeps only its part of the frozen weights (FSDP2)")
    add("--merge", action="store_true", help="also write the merged model to --output/merged")
    train(parser.parse_args(argv))


if __name__ == "__main__":
    common.launch(main, out_of_memory="--gradient-checkpointing; a smaller --batch-size with more --grad-accum; a shorter --max-length")

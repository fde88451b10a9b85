"""DoRA: split each frozen weight into magnitude and direction, train the magnitude, and the direction through LoRA.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv 2402.09353), equations 5 and 11:

    W' = m * V / ||V||       V = W0 + s B A        ||V|| is the norm of each output row, a constant for the gradient
    y  = (m / ||V||) * (W0 x + s B A dropout(x)) + bias     what is computed: W' and V never exist

    W0  base.weight  (out, in)   frozen                        m  magnitude  (out,)      float32, starts at ||W0||
    A   lora_A       (r, in)     float32, as in lora.py        B  lora_B     (out, r)    float32, zero
    r   --rank, alpha  --alpha, s = alpha / r

The norm without V, by (a + b)^2 = a^2 + 2 a b + b^2 on every row i:

    ||V_i||^2 = ||W0_i||^2 + 2 s (W0 A^T)_i . B_i + s^2 B_i (A A^T) . B_i

W0 A^T is (out, r) and A A^T (r, r): as much work as sending r tokens through the layer, and no (out, in) tensor. ||W0||^2 is
computed once.

Choices and departures from the paper
  - ||V|| is detached from the graph (section 4.3 of the paper): the same forward pass, less memory, another gradient.
  - The paper writes a norm for each column; its code, PEFT and this script take one for each output row: m is (out,).
  - The bias is not scaled: it is no part of W.
  - Dropout acts on A's input alone. PEFT's acts on the W0 x of its term (m / ||V|| - 1) W0 x as well: they differ where --dropout is not 0.
  - Every linear layer is adapted but never the output head, and the rate is LoRA's. In PEFT's words: LoraConfig(use_dora=True).

Questions people ask
  What does it buy?      In the paper's analysis LoRA's changes of magnitude and of direction grow together, and full fine-tuning's
                         do not; DoRA's are like the latter. Beside LoRA's parameters of the same rank it trains one more for
                         each output row, m, and it is slower and larger: README, Results.
  Is it free after merging?   Yes: --merge writes W' and the model is an ordinary one.
  Why is m not 1?        It would make W' = V / ||V|| at the start, not W0.

Measured: 16 steps on GSM8K take SmolLM2-135M's held-out loss from 1.450 to 0.823, LoRA's to 0.822: no difference here. Speed and
memory against PEFT's DoRA: README, Results.

    python dora.py                                                     # the bundled model learns a task, in a minute
    python dora.py --model BASE --data train.jsonl --merge             # BASE: a folder or a Hugging Face Hub name
    python dora.py --model BASE --adapter runs/dora --max-steps 0 --merge --output runs/merged    # merge an adapter, train nothing
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common_before as common


class ScaleRows(torch.autograd.Function):
    """out = (m / ||V||) * y, in place on y (..., out). m and ||V|| (out,) float32.

    d out / d m = y / ||V|| = out / m, so only out is kept for the backward pass, which the next operation often keeps anyway.
    """

    @staticmethod
    def forward(ctx, y, magnitude, norm):
        ctx.mark_dirty(y)
        ctx.save_for_backward(y.mul_(magnitude / norm), magnitude, norm)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        out, magnitude, norm = ctx.saved_tensors
        products = (grad * out).flatten(0, -2).sum(0, dtype=torch.float32)
        grad_magnitude = torch.where(magnitude == 0, 0, products / magnitude)  # a row that is zero stays zero
        return (grad * (magnitude / norm)).to(grad.dtype), grad_magnitude, None


class DoRALinear(nn.Module):
    """A frozen nn.Linear whose rows train in magnitude, and in direction by a low-rank update. x (..., in) -> (..., out)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), alpha / rank
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        weight = base.weight
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.register_buffer("base_norm", row_norms(weight), persistent=False)  # ||W0||, (out,)
        self.magnitude = nn.Parameter(self.base_norm.clone())  # m

    @torch.no_grad()  # ||V|| is a constant for the gradient
    def direction_norm(self) -> torch.Tensor:
        """||V|| of every output row, (out,) float32, from ||W0||^2, W0 A^T and r x r products."""
        A, B, s = self.lora_A, self.lora_B, self.scaling
        cross = F.linear(self.base.weight, A.to(self.base.weight.dtype)).float() * B  # rows of W0 A^T times rows of B: (out, r)
        square = (B @ (A @ A.T)) * B  # (out, r)
        return (self.base_norm**2 + (2 * s * cross + s**2 * square).sum(1)).clamp(min=1e-12).sqrt()

    def forward(self, x):
        flat = x.flatten(0, -2)  # (N, in)
        y = F.linear(flat, self.base.weight)  # W0 x, without the bias: (N, out)
        down = F.linear(self.dropout(flat), self.lora_A.to(x.dtype))  # A x: (N, r)
        y.addmm_(down, self.lora_B.to(x.dtype).T, alpha=self.scaling)  # + s B (A x), in place
        y = ScaleRows.apply(y, self.magnitude, self.direction_norm())
        y = y if self.base.bias is None else y + self.base.bias
        return y.view(*x.shape[:-1], -1)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base layer with W' = m V / ||V|| for its weight, in float32 and rounded once."""
        V = self.base.weight.float() + self.scaling * self.lora_B @ self.lora_A
        self.base.weight.copy_((self.magnitude / row_norms(V).clamp(min=1e-6))[:, None] * V)  # clamped as in direction_norm
        return self.base


def row_norms(weight) -> torch.Tensor:
    """(out, in) -> (out,) float32."""
    return torch.linalg.vector_norm(weight.detach(), dim=1, dtype=torch.float32)


def add_dora(model, targets: str, rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Freeze the model and put a DoRALinear around every target (see `common.linear_layers`)."""
    model.requires_grad_(False)
    for name, layer in common.linear_layers(model, targets).items():
        model.set_submodule(name, DoRALinear(layer, rank, alpha, dropout))


def dora_layers(model) -> dict[str, DoRALinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, DoRALinear)}


def adapter_tensors(model) -> dict[str, nn.Parameter]:
    """What is trained, under the names that PEFT gives it."""
    tensors = {}
    for name, layer in dora_layers(model).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A  # (r, in)
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B  # (out, r)
        tensors[f"base_model.model.{name}.lora_magnitude_vector"] = layer.magnitude  # (out,)
    return tensors


def train(args) -> None:
    device, dtype = common.setup(args)
    tokenizer, vocab_size = common.load_tokenizer(args)
    corpus, evaluation = common.load_data(args, tokenizer, vocab_size, device)
    if args.inspect:
        return corpus.show(tokenizer)
    common.check_shard(args)
    model = common.load_model(args, dtype, torch.device("cpu") if args.shard else device)  # FSDP2 takes block after block to the GPU
    if args.adapter:
        load_dora(model, args)
    else:
        add_dora(model, args.targets, args.rank, args.alpha, args.dropout)
    common.checkpoint_blocks(model, args)
    if args.shard:
        common.shard(model, dtype, device)
    trainable, total = common.count_parameters(model)
    common.say(f"{trainable:,} of {total:,} parameters train ({trainable / total:.2%}), in {len(dora_layers(model))} layers")

    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = common.decay_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    # --- copied from lora.py: training loop ---
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
    save_dora(args, model, tokenizer)
    if args.merge:
        merge_dora(model)
        common.save_model(Path(args.output) / "merged", model, tokenizer)
    run.finish()
    common.say_how_to_use(args, script="dora.py")


def save_dora(args, model, tokenizer) -> None:
    """The adapter in PEFT's form."""
    config = {
        "peft_type": "LORA", "r": args.rank, "lora_alpha": args.alpha, "use_rslora": False, "lora_dropout": args.dropout,
        "target_modules": common.short_names(model, list(dora_layers(model))), "bias": "none",
        "use_dora": True, "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None,
    }  # fmt: skip
    common.save_adapter(args, model, tokenizer, config, adapter_tensors(model))


def load_dora(model, args) -> None:
    """Put the adapter of --adapter on the model, with its own rank, alpha and layers."""
    config, tensors = common.load_adapter(args.adapter, model, "LORA", trains="use_dora")
    if not config.get("use_dora"):
        raise common.UserError(f"--adapter {args.adapter} is LoRA without magnitudes: lora.py trains it")
    args.rank, args.alpha = config["r"], config["lora_alpha"]
    names = [key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key]
    add_dora(model, ",".join(names), args.rank, args.alpha, args.dropout)
    common.fill_adapter(adapter_tensors(model), tensors, args.adapter)


def merge_dora(model) -> None:
    for name, layer in dora_layers(model).items():
        model.set_submodule(name, layer.merged())


def main(argv=None) -> None:
    # without --compile: torch.compile loses the magnitude's gradient behind ScaleRows, which works in place
    parser = common.make_parser(__doc__, without=("--compile",), demo={"lr": 3e-3}, output="runs/dora", lr=2e-4)
    add = parser.add_argument_group("DoRA").add_argument
    add("--rank", type=common.number(int, 1), default=16, help="r, the rank of the update: how much it can change")
    add("--alpha", type=common.number(float, 0), default=32, help="the update is scaled by alpha / rank")
    add("--dropout", type=common.number(float, 0, 1), default=0.0, help="dropout on the update's input")
    add("--targets", default="all-linear", help="layers that DoRA adapts: all-linear (all but the output head), or names such as q_proj,v_proj")
    add("--adapter", metavar="FOLDER", help="continue from this DoRA adapter, ours or PEFT's; its rank, alpha and targets are used")
    parser.adapter_brings = ("--rank", "--alpha", "--targets")
    add("--shard", action="store_true", help="under torchrun: each rank keeps only its part of the frozen weights (FSDP2)")
    add("--merge", action="store_true", help="also write the merged model to --output/merged")
    train(parser.parse_args(argv))


if __name__ == "__main__":
    common.launch(main, out_of_memory="--gradient-checkpointing; a smaller --batch-size with more --grad-accum; a shorter --max-length")

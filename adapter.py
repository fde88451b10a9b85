"""Houlsby adapters: put a small trained network after every attention and every MLP of a frozen model.

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP" (arXiv 1902.00751), section 2.1:

    f(h) = h + U act(D h + b1) + b2        x = x + f(attention(norm(x)));  x = x + f(mlp(norm(x)))

    h   (..., d)   what attention or the MLP gives, before it is added to the residual stream x
    D   down       (r, d)   float32, truncated normal            b1  down_bias  (r,)  float32, zero
    U   up         (d, r)   float32, truncated normal            b2  up_bias    (d,)  float32, zero
    r   --bottleneck        act  --activation                    d   the model's hidden size, L its number of blocks

Trained: 2 L (2 d r + r + d) parameters, and the weights and biases of the norms. With --pfeiffer only the MLPs have an adapter:
L (2 d r + r + d), and the norms. (That place is all that is taken from Pfeiffer et al. 2020, arXiv 2005.00247: theirs reads the
normalised sum.)

At step 0 the model is nearly the base, not exactly. D and U are drawn with a standard deviation of 1e-3 and cut off at
twice that, which leaves 0.88e-3; with relu, and 0.7 of it with gelu,

    ||f(h) - h|| / ||h||  is about  (0.88e-3)^2 sqrt(d r / 2)  =  1.1e-4 for d = 576, 2.8e-4 for d = 4096 (r = 64)

Choices and departures from the paper
  - D, b1, U, b2 and the norms are float32: AdamW's small updates would vanish in bfloat16. The adapters are cast to the
    dtype of the residual stream in the forward pass; a trained norm computes in float32 and gives its result in that dtype.
  - Every norm trains: those of the blocks (Qwen3's of queries and keys too), and the last one. --no-train-norms: none.
  - The paper's BERT adds and then normalises, today's decoders normalise first. Where a norm follows before the sum
    (Gemma 2's post norms), the adapter stands before it: right after the output projection.
  - A further branch beside attention and MLP (Falcon-H1's Mamba, Granite's shared experts) has no adapter.
  - relu is the default; the authors' code has gelu (its tanh approximation). The 1e-3 is that code's too.

Questions people ask
  Can it be merged?      No. act stands between D and U, so no one matrix can be added to a weight, as LoRA's s B A is.
                         The adapters stay in the model, and cost some time in generation.
  Why not U = 0?         It would work, as LoRA's B = 0 does, and be exact; near-identity is the paper's. What must not be
                         zero is both: then neither D nor U would ever get a gradient.
  Does PEFT load it?     No, it has no such method. The folder has PEFT's two files with keys of our own, and --adapter
                         FOLDER loads it here: to train further, or with --max-steps 0 to evaluate and answer.

    adapter_config.json         peft_type "HOULSBY", bottleneck, activation, pfeiffer, train_norms, base_fingerprint
    adapter_model.safetensors   base_model.model.SUBMODULE.adapter.down, .down_bias, .up, .up_bias with shapes as above
                                (SUBMODULE: model.layers.0.self_attn ...), and base_model.model.NORM.weight (and .bias)

Measured: 16 steps of some 580 tokens of GSM8K take SmolLM2-135M's held-out loss from 1.316 to 0.851 (with --lr 3e-4 to
0.989, with 3e-3 to 0.828). (python adapter.py --model smollm2-135m --data gsm8k_train.jsonl --eval-fraction 0.004 --max-length 384
--batch-size 2 --max-steps 16 --eval-every 16, 2026-11-22.) The default of 1e-3 is the middle one, since runs this short favour high rates.

    python adapter.py                                                  # the bundled model learns a task, in a minute
    python adapter.py --model BASE --data train.jsonl                  # BASE: a folder or a Hugging Face Hub name
    python adapter.py --model BASE --adapter runs/adapter --max-steps 0 --output runs/again   # evaluate and answer, train nothing
"""

import argparse
import math
import shlex

import torch
import torch.nn.functional as F
from torch import nn

import common_before as common

# What decoders call the two parts of a block. fc2 is the output projection of an MLP that is no module (OPT).
ATTENTION = ("self_attn", "self_attention", "attention", "attn", "linear_attn")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc2")
ACTIVATIONS = {"relu": nn.ReLU(), "gelu": nn.GELU(approximate="tanh")}
INITIAL_STD = 1e-3


class Adapter(nn.Module):
    """f(h) = h + U act(D h + b1) + b2. h (..., d) -> (..., d) in h's dtype."""

    def __init__(self, width: int, bottleneck: int, activation: str, device=None):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.down = nn.Parameter(torch.empty(bottleneck, width, dtype=torch.float32, device=device))
        self.down_bias = nn.Parameter(torch.zeros(bottleneck, dtype=torch.float32, device=device))
        self.up = nn.Parameter(torch.empty(width, bottleneck, dtype=torch.float32, device=device))
        self.up_bias = nn.Parameter(torch.zeros(width, dtype=torch.float32, device=device))
        for weight in (self.down, self.up):
            nn.init.trunc_normal_(weight, std=INITIAL_STD, a=-2 * INITIAL_STD, b=2 * INITIAL_STD)

    def forward(self, h):
        z = self.activation(F.linear(h, self.down.to(h.dtype), self.down_bias.to(h.dtype)))  # (..., d) -> (..., r)
        return h + F.linear(z, self.up.to(h.dtype), self.up_bias.to(h.dtype))  # (..., r) -> (..., d)

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())


def apply_adapter(module, args, output):
    """A forward hook. Attention modules, and some MLPs with experts, return a tuple that begins with their output."""
    if isinstance(output, tuple):
        return (module.adapter(output[0]), *output[1:])
    return module.adapter(output)


class TrainedNorm(nn.Module):
    """A norm with float32 weights and arithmetic in a stream of any dtype. x (..., n) -> (..., n) in x's dtype.

    Without the cast a float32 weight would make its output float32, which the frozen layers after it cannot take.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base.float()

    def forward(self, x, *args, **kwargs):
        return self.base(x.float(), *args, **kwargs).to(x.dtype)

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.base.named_parameters(recurse=False) if p.dim() == 1}


def sublayers(model, pfeiffer: bool) -> list[nn.Module]:
    """The submodules that get an adapter: attention and MLP of every block, or the MLPs alone."""
    found = []
    for block in common.blocks(model):
        parts = dict(block.named_children())
        for kind, names in [("MLP", MLP)] if pfeiffer else [("attention", ATTENTION), ("MLP", MLP)]:
            name = next((name for name in names if name in parts), None)
            if name is None:
                raise common.UserError(
                    f"{type(model).__name__} has a block without {kind} ({type(block).__name__}: {', '.join(parts)}; known "
                    f"names: {', '.join(names)}): no place for an adapter; lora.py needs no more than linear layers"
                )
            found.append(parts[name])
    return found


def is_norm(module) -> bool:
    named_so = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("Norm")
    return named_so and any(p.dim() == 1 for p in module.parameters(recurse=False))


def add_adapters(model, bottleneck: int, activation="relu", pfeiffer: bool = False, train_norms: bool = True) -> None:
    """Freeze the model, put an Adapter after every attention and MLP, and train the norms."""
    model.requires_grad_(False)
    width = model.config.get_text_config().hidden_size
    for module in sublayers(model, pfeiffer):
        module.adapter = Adapter(width, bottleneck, activation, next(module.parameters()).device)
        module.register_forward_hook(apply_adapter)
    for name, module in list(model.named_modules()):
        if train_norms and is_norm(module):
            norm = TrainedNorm(module)
            model.set_submodule(name, norm)
            for p in norm.trained().values():
                p.requires_grad_(True)


@torch.no_grad()
def check_placement(model) -> None:
    """Refuse a model whose attention or MLP adds the residual stream itself (BLOOM): the adapter would see x + h.

    Found by trying: with zeros in place of f(h) a block must still give x, which differs from token to token. Where all tokens come
    out alike, x was in the sum that was zeroed.
    """
    ids = torch.arange(5, 17, device=model.get_input_embeddings().weight.device)[None]
    silenced, outputs = set(), []

    def silence(module, args, output):
        silenced.add(module)
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    def note(module, args, output):
        outputs.append((output[0] if isinstance(output, tuple) else output).float())  # (1, T, d)

    adapted = [module for module in model.modules() if isinstance(getattr(module, "adapter", None), Adapter)]
    hooks = [module.register_forward_hook(silence) for module in adapted]
    hooks += [block.register_forward_hook(note) for block in common.blocks(model)]
    try:
        with common.evaluating(model), common.attention(model, model.padded_attention):
            model.base_model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if len(silenced) < len(adapted) or any((x - x[:, :1]).abs().max() <= 1e-6 * x.abs().max() for x in outputs):
        raise common.UserError(
            f"{type(model).__name__} adds the residual stream inside its attention or MLP, or does not run them as "
            "modules: an adapter cannot come before that sum; lora.py needs no more than linear layers"
        )


def adapter_tensors(model) -> dict[str, nn.Parameter]:
    """What is trained, under its name in the folder: see the top of this file."""
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, (Adapter, TrainedNorm)):
            tensors |= {f"base_model.model.{name}.{key}": p for key, p in module.trained().items()}
    return tensors


def train(args) -> None:
    device, dtype = common.setup(args)
    tokenizer, vocab_size = common.load_tokenizer(args)
    corpus, evaluation = common.load_data(args, tokenizer, vocab_size, device)
    if args.inspect:
        return corpus.show(tokenizer)
    model = common.load_model(args, dtype, device)
    if args.adapter:
        load_adapters(model, args)
    else:
        add_adapters(model, args.bottleneck, args.activation, args.pfeiffer, args.train_norms)
    check_placement(model)
    common.checkpoint_blocks(model, args)
    common.compile_blocks(model, args)
    trainable, total = common.count_parameters(model)
    adapters, norms = (sum(isinstance(module, kind) for module in model.modules()) for kind in (Adapter, TrainedNorm))
    share = f"{trainable / total:.2%}"
    common.say(f"{trainable:,} of {total:,} parameters train ({share}), in {adapters} adapters and {norms} norms")

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
    save_adapters(args, model, tokenizer)
    run.finish()
    say_how_to_use(args)


def save_adapters(args, model, tokenizer) -> None:
    """Two files as PEFT's adapters have, with a peft_type and keys of our own."""
    config = {
        "peft_type": "HOULSBY", "bottleneck": args.bottleneck, "activation": args.activation,
        "pfeiffer": args.pfeiffer, "train_norms": args.train_norms,
    }  # fmt: skip
    common.save_adapter(args, model, tokenizer, config, adapter_tensors(model))


def load_adapters(model, args) -> None:
    """Put the adapter of --adapter on the model. Its own bottleneck, activation, places and norms are used."""
    config, tensors = common.load_adapter(args.adapter, model, "HOULSBY")
    valid = {
        "bottleneck": lambda value: type(value) is int and value > 0, "activation": lambda value: value in list(ACTIVATIONS),
        "pfeiffer": lambda value: type(value) is bool, "train_norms": lambda value: type(value) is bool,
    }  # fmt: skip
    for key, is_valid in valid.items():
        if not is_valid(config.get(key)):
            raise common.UserError(f"--adapter {args.adapter}: {key} in its adapter_config.json is {config.get(key)!r}")
        setattr(args, key, config[key])
    add_adapters(model, args.bottleneck, args.activation, args.pfeiffer, args.train_norms)
    common.fill_adapter(adapter_tensors(model), tensors, args.adapter)


def say_how_to_use(args) -> None:
    """The last lines of a run: where the adapter lies, and a command that uses it on the same held-out rows."""
    base = f"{args.output}/base" if args.model == "random" else args.model
    again = ["python", "adapter.py", "--model", base, "--adapter", args.output, "--max-steps", "0"]
    again += ["--output", f"{args.output}-again", "--data", *args.data]
    again += ["--eval-data", *args.eval_data] if args.eval_data else ["--eval-fraction", str(args.eval_fraction)]
    again += ["--seed", str(args.seed), "--max-length", str(args.max_length), "--dtype", args.dtype]
    again += ["--system", args.system] if args.system is not None else []
    again += ["--no-packing"] * (not args.packing) + ["--trust-remote-code"] * args.trust_remote_code
    if args.template:
        again += ["--template", "none" if args.template == "none" else f"{args.output}/chat_template.jinja"]
    common.say(f"""
The adapter lies in {args.output}. It cannot be merged: this script loads it. Evaluate it and answer held-out prompts:
  {shlex.join(again)}
Without --max-steps 0 the same command trains it further, into another folder.""")


def main(argv=None) -> None:
    parser = common.make_parser(__doc__, demo={"lr": 3e-3, "epochs": 6}, output="runs/adapter", lr=1e-3)
    add = parser.add_argument_group("adapters").add_argument
    add("--bottleneck", type=common.number(int, 1), default=64, help="r, the width of each adapter: how much it can change")
    add("--activation", choices=list(ACTIVATIONS), default="relu", help="inside each adapter")
    add("--pfeiffer", action="store_true", help="adapters after the MLPs alone: half as many")
    add("--train-norms", action=argparse.BooleanOptionalAction, default=True, help="also train the weights of the norms")
    add("--adapter", metavar="FOLDER", help="continue from an adapter of this script; its bottleneck, activation, places and norms are used")
    parser.adapter_brings = ("--bottleneck", "--activation", "--pfeiffer", "--train-norms", "--no-train-norms")
    train(parser.parse_args(argv))


if __name__ == "__main__":
    common.launch(main, out_of_memory="--gradient-checkpointing; a smaller --batch-size with more --grad-accum; a shorter --max-length")

"""QLoRA: train LoRA beside a base model whose linear layers are frozen in 4 bits per weight.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv 2305.14314), equations 5 and 6:

    y = dequant(W4) x + s B A dropout(x)                  dequant(W4) = code[index] * absmax

    W4  packed      two 4-bit indices per byte, frozen    A, B, s   as in lora.py, in float32 beside W4
    code NF4        16 values                             absmax    largest |w| of each block of 64: itself quantised to 8 bits

Three ideas save the memory; the functions below are the first two:
  NF4                   weights are nearly normal, so the 16 codes are quantiles of the normal distribution, dense where weights
                        are: 8 positive, 7 negative and an exact 0, divided by the largest.
  double quantisation   absmax would cost 32 / 64 = 0.5 bits per weight. Its mean is subtracted, and the rest is coded in 8 bits (256
                        values, dense near 0), with one float32 for each block of 256: 8 / 64 + 32 / (64 * 256) = 0.127 bits.
  paged optimizer       AdamW's states may move to host memory when the GPU runs short (--optimizer paged_adamw8bit). bitsandbytes
                        pages states of 100,000 elements or more, and waits for the GPU after every parameter.
So a weight costs 4.127 bits; the run prints what it really costs.

Choices and departures from the paper
  - Training packs with bitsandbytes' `quantize_4bit` and multiplies with its `Linear4bit`: a fused kernel for few tokens; for many,
    and in every backward pass, it dequantises a layer and then multiplies. The functions here are that arithmetic written out:
    `nf4_quantize` gives the same bytes to the last bit, `double_quantize` the nearest code, from which bitsandbytes' CPU kernel is
    one step off about once in a thousand. --merge uses the two `*_dequantize` functions; the `*_quantize` ones are there to be read.
  - Every linear layer but the output head is quantised and adapted. Embedding, head and the residual stream are bfloat16. Norms
    compute in float32 and give their result in the stream's dtype.
  - Rank 16 and alpha 32 as in lora.py (the paper: 64 and 16). The paged states have 8 bits (the authors' code: 32).

Questions people ask
  What is merged?       The adapter was trained beside dequant(W4), so --merge adds s B A to that, in float32, and saves bfloat16.
                        --merge-base original adds it to the weights as they were before. The run reports how far either moves
                        the logits on the first 128 tokens of a held-out document. Nothing is quantised again, which would change it once more.
  How does PEFT load it?   On the base it was trained beside: AutoPeftModelForCausalLM.from_pretrained("runs/qlora",
                        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                        bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)). Without quantization_config it
                        sits on the original weights, as with --merge-base original.
  Why train in 4 bits?  Not for speed: every pass dequantises the weights. For memory: a 7B base takes 3.9 GB instead of 13.5.
  On a CPU?             It runs, in float32, for tests and study; layer sizes must be multiples of 64 there.

Measured: 16 steps of some 600 tokens of GSM8K take SmolLM2-135M's held-out loss from 1.605 to 1.240; the base takes 4.127 bits
per weight in its linear layers, and before quantisation its loss is 1.316. (python qlora.py --model smollm2-135m --data
gsm8k_train.jsonl --eval-fraction 0.004 --max-length 384 --batch-size 2 --max-steps 16, two cores of an AMD EPYC, float32, 2026-11-22.)

    python qlora.py                                                     # the bundled model learns a task, in a minute
    python qlora.py --model BASE --data train.jsonl --merge             # BASE: a folder or a Hugging Face Hub name
"""

import logging
import math
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it warns of a kernel package that is not needed

import bitsandbytes  # noqa: E402
import torch
import torch.nn.functional as F
from torch import nn

import common_before as common

# Quantiles of the standard normal at linspace(0.9677083, 0.5, 9)[:-1] (positive) and linspace(0.9677083, 0.5, 8)[:-1]
# (negative), and 0, divided by the largest. Written out, because half of them do not come back exactly from the formula.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def nf4_quantize(weight: torch.Tensor, block_size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight of any shape -> (packed uint8 (ceil(n / 2),), absmax float32, one for each block of the flattened weight).

    The index of a weight is that of the nearest code to w / absmax, of the lower one at a tie. The first of two weights takes
    the high four bits of their byte.
    """
    flat = weight.detach().float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1)
    inverse = torch.where(absmax == 0, 0, 1 / absmax)  # bitsandbytes multiplies: w / absmax differs in rare last bits
    midpoints = ((NF4[1:] + NF4[:-1]) / 2).to(flat.device)
    index = torch.bucketize(blocks * inverse[:, None], midpoints).flatten()
    index = index[: len(flat) + len(flat) % 2].to(torch.uint8)  # without the last block's padding, but an even number: two to a byte
    return index[0::2] << 4 | index[1::2], absmax


def nf4_dequantize(packed: torch.Tensor, absmax: torch.Tensor, block_size: int = 64) -> torch.Tensor:
    """(packed, absmax) of `nf4_quantize` -> the flat float32 weights, two for every byte."""
    index = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    return NF4.to(packed.device)[index] * absmax.repeat_interleave(block_size)[: len(index)]


def dynamic_map() -> torch.Tensor:
    """The 256 values of the 8-bit code, (256,) float32 ascending (Dettmers 2015, arXiv 1511.04561): 0, 1, and for either sign and each
    of the decades 1e-7 to 1e-6, ..., 0.1 to 1 the midpoints of 1, 2, 4 ... 64 equal steps: 2 + 2 * 127."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = 10 ** (exponent - 6) * (edges[1:] + edges[:-1]) / 2
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values))


def double_quantize(absmax: torch.Tensor, block_size: int = 256) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """absmax float32 (b,) -> (codes uint8 (b,), their own absmax float32 (ceil(b / 256),), mean float32 ())."""
    mean = absmax.mean()
    blocks = F.pad(absmax - mean, (0, -len(absmax) % block_size)).view(-1, block_size)
    scale = blocks.abs().amax(1)
    code = dynamic_map().to(absmax.device)
    index = torch.bucketize(blocks * torch.where(scale == 0, 0, 1 / scale)[:, None], (code[1:] + code[:-1]) / 2)
    return index.flatten()[: len(absmax)].to(torch.uint8), scale, mean


def double_dequantize(codes: torch.Tensor, scale: torch.Tensor, mean: torch.Tensor, block_size: int = 256) -> torch.Tensor:
    """The inverse of `double_quantize`: absmax float32 (b,)."""
    return dynamic_map().to(codes.device)[codes.long()] * scale.repeat_interleave(block_size)[: len(codes)] + mean


def quantize(model, dtype: torch.dtype, device: torch.device) -> None:
    """Put every linear layer of the blocks into 4 bits, one at a time, straight onto the device; the rest follows as it is."""
    for name, layer in common.linear_layers(model, "all-linear").items():
        if device.type == "cpu" and (layer.in_features % 64 or layer.out_features % 64):
            raise common.UserError(f"{name}: 4-bit layers on a CPU need sizes in multiples of 64, not {tuple(layer.weight.shape)}")
        with common.with_data():
            small = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype,
                                               quant_type="nf4", device="meta")  # fmt: skip
        weight = layer.weight.data.contiguous().to(device)
        packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        small.weight, small.bias = nn.Parameter(packed, requires_grad=False), layer.bias
        small.weight.quant_state = state  # as Linear4bit expects it; a plain Parameter, since Params4bit cannot be a fake tensor (--estimate)
        model.set_submodule(name, small)
        if device.type == "cpu":  # bitsandbytes repacks the weight in eval mode, after which no gradient comes through
            small.train = lambda mode=True, small=small: small
    if model.device != device:
        model.to(device)
    for norm in [module for module in model.modules() if type(module).__name__.endswith("Norm")]:
        norm.float()
        if isinstance(norm, nn.LayerNorm):  # its kernel wants one dtype; an RMSNorm computes in float32 whatever it gets
            norm.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
        norm.register_forward_hook(lambda module, inputs, out: out.to(dtype))


def quantized_layers(model) -> dict[str, nn.Module]:
    """The 4-bit layers under the names they have in the base, whether an adapter is around them or not."""
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)}
    return {name.removesuffix(".base"): layer for name, layer in found.items()}


def dequantized(layer) -> torch.Tensor:
    """dequant(W4) of a 4-bit layer, (out, in) float32."""
    state = layer.weight.quant_state
    absmax = double_dequantize(state.absmax, state.state2.absmax, state.offset)
    return nf4_dequantize(layer.weight.data.flatten(), absmax)[: math.prod(state.shape)].view(state.shape)


def bits_per_weight(model) -> float:
    """What the 4-bit layers really cost: packed bytes, 8-bit absmax, and their float32 scales, in bits per weight."""
    held = weights = 0
    for layer in quantized_layers(model).values():
        state = layer.weight.quant_state
        held += layer.weight.numel() + state.absmax.numel() + 4 * state.state2.absmax.numel() + 4
        weights += math.prod(state.shape)
    return 8 * held / weights


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


def make_optimizer(groups, args, device: torch.device):
    """AdamW with bitsandbytes' paged 8-bit states on CUDA, plain AdamW elsewhere."""
    kind = args.optimizer or ("paged_adamw8bit" if device.type == "cuda" or args.estimate else "adamw")
    common.say(f"optimizer: {kind}")
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr, fused=True)
    return bitsandbytes.optim.PagedAdamW8bit(groups, lr=args.lr)


def train(args) -> None:
    device, dtype = common.setup(args)
    tokenizer, vocab_size = common.load_tokenizer(args)
    corpus, evaluation = common.load_data(args, tokenizer, vocab_size, device)
    if args.inspect:
        return corpus.show(tokenizer)
    model = common.load_model(args, dtype, torch.device("cpu"))
    quantize(model, dtype, device)
    common.say(f"the base's linear layers take {bits_per_weight(model):.3f} bits a weight (4.127 in theory)")
    if args.adapter:
        load_lora(model, args)
    else:
        add_lora(model, args.targets, args.rank, args.alpha, args.dropout, args.rslora)
    common.checkpoint_blocks(model, args)
    common.compile_blocks(model, args)
    trainable, total = common.count_parameters(model)
    common.say(f"{trainable:,} of {total:,} parameters train ({trainable / total:.2%}), in {len(lora_layers(model))} layers")

    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = common.decay_groups(model, args.weight_decay)
    optimizer = make_optimizer(groups, args, device)
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
    save_lora(args, model, tokenizer)
    if args.merge and common.rank() == 0:  # it loads the base again
        common.save_model(Path(args.output) / "merged", merge(args, model, evaluation or corpus, device), tokenizer)
    run.finish()
    four_bits = "t.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype='bfloat16')"
    common.say_how_to_use(args, script="qlora.py", options=f", quantization_config={four_bits}")


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


@torch.no_grad()
def merge(args, model, corpus, device):
    """A bfloat16 model with the adapter added, in float32 and rounded once, to dequant(W4) or to the original weights. Says how
    far it moves the logits of the model that was trained."""
    merged = common.load_model(args, torch.bfloat16, torch.device("cpu"))
    adapters = lora_layers(model)
    for name, small in quantized_layers(model).items():
        weight = merged.get_submodule(name).weight
        base = dequantized(small) if args.merge_base == "dequantized" else weight.float()
        if name in adapters:
            base = base.cpu() + (adapters[name].scaling * adapters[name].lora_B @ adapters[name].lora_A).cpu()
        weight.copy_(base)
    ids = torch.from_numpy(corpus.table[corpus.rows()[0][0]]["input_ids"])[:128].long()[None]  # one of the two models is on the CPU
    logits = []
    for each, place in ((model, device), (merged, torch.device("cpu"))):
        with common.evaluating(each), common.attention(each, each.padded_attention):
            logits.append(each(input_ids=ids.to(place), use_cache=False).logits[0].float().cpu())
    drift, agree = (logits[0] - logits[1]).abs(), (logits[0].argmax(1) == logits[1].argmax(1)).float().mean()
    common.say(f"merged onto the {args.merge_base} weights: on {ids.shape[1]} tokens the logits move by {drift.mean():.4f} in the mean, "
               f"{drift.max():.4f} at most, and {agree:.1%} of the greedy choices stay")  # fmt: skip
    return merged


def main(argv=None) -> None:
    parser = common.make_parser(__doc__, demo={"lr": 3e-3}, output="runs/qlora", lr=2e-4)
    add = parser.add_argument_group("QLoRA").add_argument
    add("--rank", type=common.number(int, 1), default=16, help="r, the rank of the update: how much it can change")
    add("--alpha", type=common.number(float, 0), default=32, help="the update is scaled by alpha / rank")
    add("--dropout", type=common.number(float, 0, 1), default=0.0, help="dropout on the update's input")
    add("--targets", default="all-linear", help="layers that LoRA adapts: all-linear (all but the output head), or names such as q_proj,v_proj")
    add("--rslora", action="store_true", help="scale by alpha / sqrt(rank) instead, which keeps high ranks learning")
    add("--adapter", metavar="FOLDER", help="continue from this LoRA adapter, ours or PEFT's; its rank, alpha and targets are used")
    parser.adapter_brings = ("--rank", "--alpha", "--targets", "--rslora")
    add("--optimizer", choices=["adamw", "paged_adamw8bit"],
        help="paged 8-bit states are bitsandbytes'; default: paged_adamw8bit on CUDA, adamw elsewhere")
    add("--merge", action="store_true", help="also write the merged model to --output/merged, in bfloat16")
    add("--merge-base", choices=["dequantized", "original"], default="dequantized", help="what --merge adds the update to")
    train(parser.parse_args(argv))


if __name__ == "__main__":
    common.launch(main, out_of_memory="--gradient-checkpointing; a smaller --batch-size with more --grad-accum; a shorter --max-length")

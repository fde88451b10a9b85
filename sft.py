"""Supervised fine-tuning (SFT), the first stage of alignment: learn to answer as the answers in the data do.

Ouyang et al. 2022, "Training language models to follow instructions with human feedback" (arXiv 2203.02155), section 3.5: the
pretraining loss, on demonstrations, and only on the tokens that the model is to write itself:

    L = - 1/N  sum_t  m_t log p(y_t | y_<t)

    y_t      input_ids      a token of a conversation, written by the model's own chat template
    m_t      is_target      1 for the assistant's tokens and its end-of-turn token, 0 for everything else
    N        targets        how many m_t are 1 in the whole optimizer step, over its micro-batches and ranks
    log p    target_logps   (T,) of the T tokens with m_t = 1 in a micro-batch, in nats, float32

Masks and packing, a worked example. Two conversations, "Hi" -> "Yo" and "2+2?" -> "4", fill one row of the tiny model, which has
one token for each byte. This is what the model gets (tests/test_sft.py makes the table from the real code):

    document  positions  target  text
           1   0 .. 20   no      <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
           1  21 .. 23   yes     Yo<|im_end|>
           1  24 .. 24   no      \\n
           2   0 .. 22   no      <|im_start|>user\\n2+2?<|im_end|>\\n<|im_start|>assistant\\n
           2  23 .. 24   yes     4<|im_end|>
           2  25 .. 25   no      \\n

  - A target is predicted from the position before it: "Y" from the line break after "assistant". The end-of-turn token is a
    target, or the model would never learn to stop; the template's line break after it is not.
  - Positions restart, and attention is computed for each document alone: the second conversation cannot see the first. A mask of
    ones would let it, and the loss would look better than it is.
  - Padding would have made two rows of the longer one's length. Here nothing is padded.
  - The mask is found by position, never by token id: where padding is eos, a mask by id would drop the end of turn as well.
`python sft.py --inspect --data YOURS` prints your own first batch, every token marked.

Choices and departures from the paper
  - Every parameter trains by default; --lora-rank N trains a LoRA adapter instead (lora.py explains it).
  - --loss-on all takes the prompt's tokens too, as the pretraining loss does. With long answers it changes little; with short
    ones it can help against overfitting (Shi et al. 2024, arXiv 2405.14394).
  - --neftune ALPHA adds uniform noise to the embeddings while training (Jain et al. 2023, arXiv 2310.05914):
    x + ALPHA / sqrt(L d) U(-1, 1). L is the document's own length, without padding, as in the authors' training code.
  - --patience N stops when the held-out loss has not fallen for N evaluations and keeps the weights of the lowest.

Questions people ask
  Sum or mean?         The mean over the targets of the whole optimizer step: 8x1, 4x2 and 1x8 (--batch-size x --grad-accum) give the
                       same gradient.
  Which rate?          The default is 2e-5 where every parameter trains, and 2e-4 for LoRA.
  How many epochs?     One to three. After that the held-out loss usually rises while the training loss goes on falling.
  Multi-turn?          All the assistant's turns are targets, in one document. Where the template rewrites earlier turns (dropped
                       thinking), each answer becomes a document of its own.
  Mixing?              --data mine.jsonl general.jsonl:0.2 shows every general row once in five epochs: against forgetting.

Measured: `python sft.py` takes the share of held-out answers that are exactly the data's from 0.00 to 0.89, 0.94 and 0.87, the bundled
model with three seeds (README, Results).

    python sft.py                                                      # the bundled model learns a form of answers
    python sft.py --model BASE --data chat.jsonl --patience 3          # every parameter; BASE: a folder or a Hugging Face Hub name
    python sft.py --model BASE --data chat.jsonl --lora-rank 16        # an adapter
    torchrun --nproc-per-node 8 sft.py --model BASE --data chat.jsonl --gradient-checkpointing
"""

import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import common


def add_neftune(model, alpha: float) -> None:
    """NEFTune, equation in section 2 of the paper: the backbone gets embeddings (B, T, d) with noise in place of input_ids."""

    def add_noise(backbone, _, inputs):
        if not backbone.training:
            return None
        x = backbone.get_input_embeddings()(inputs["input_ids"])  # (B, T, d)
        if "attention_mask" in inputs:
            lengths = inputs["attention_mask"].sum(1, keepdim=True)  # (B, 1)
        else:  # packed: a document begins where the position is 0
            document = (inputs["position_ids"] == 0).cumsum(1) - 1  # (1, T)
            lengths = torch.zeros_like(document).scatter_add(1, document, torch.ones_like(document)).gather(1, document)
        scale = alpha / (lengths[..., None] * x.shape[-1]).sqrt()
        return (), inputs | {"input_ids": None, "inputs_embeds": x + scale.to(x.dtype) * torch.empty_like(x).uniform_(-1, 1)}

    model.base_model.register_forward_pre_hook(add_noise, with_kwargs=True)


def train(args) -> None:
    device, dtype = common.setup(args)
    tokenizer, vocab_size = common.load_tokenizer(args)
    corpus, evaluation = common.load_data(args, tokenizer, vocab_size, device)
    if args.inspect:
        return corpus.show(tokenizer)
    model = load_trained(args, dtype, device)
    if args.neftune:
        add_neftune(model, args.neftune)

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


# --- what trains ---
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
    parser = common.make_parser(__doc__, demo={"data": [common.example("format.jsonl")], "lr": 1e-3, "epochs": 3}, output="runs/sft", lr=None)
    add = parser.add_argument_group("SFT").add_argument
    add("--loss-on", choices=["answers", "all"], default="answers", help="targets: the assistant's tokens, or the prompt's as well")
    add("--neftune", type=common.number(float, 0), default=0.0, metavar="ALPHA", help="noise on the embeddings; 5 is the paper's; 0 is none")
    add_training_flags(parser)
    args = parser.parse_args(argv)
    if args.lr is None:
        args.lr = 2e-4 if args.rank or args.adapter else 2e-5
    train(args)


if __name__ == "__main__":
    common.launch(main, out_of_memory="--gradient-checkpointing; a smaller --batch-size with more --grad-accum; a shorter --max-length; "
                  "--lora-rank 16; --offload; torchrun on more GPUs")  # fmt: skip

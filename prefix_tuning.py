"""Prefix tuning: train a few keys and values that are put before those of every text, in every layer.

Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation" (arXiv 2101.00190):

    attention of layer i reads keys [K_i; keys of the text], values [V_i; values of the text]    only K and V are trained
    prefix = [K_0 V_0 K_1 V_1 ...] = start + MLP(E)         MLP(e) = W2 tanh(W1 e + b1) + b2

    prefix                    (P, 2 L kv_dim)   P = --prefix-length, L layers, kv_dim = key-value heads * head_dim
    start   prefix.start      (P, 2 L kv_dim)   frozen: the base's own keys and values of P real tokens
    E       prefix.embedding  (P, d)            float32, a vector for each position, trained with the MLP
    MLP     prefix.mlp        d -> --hidden -> 2 L kv_dim, float32; W2 = 0 and b2 = 0 at the start

Only the prefix is kept after training, not the MLP. --no-reparameterize has none: start itself is trained, which is
P-Tuning v2 (Liu et al. 2021, arXiv 2110.07602).

Choices and departures from the paper
  - start holds the base's keys and values of --init-text, else of token ids sampled from the whole vocabulary. The MLP is added
    to it and is 0 at first, so that step 0 is exactly the base that reads these tokens before each text. The paper has the MLP
    alone, from random values; with little data, it found that starting from the activations of real words helps: --init-text.
  - P is 20 by default; the paper tunes it by task, from 10 to 200.
  - Keys are kept as they are after rotary embedding, at positions 0 to P - 1, and the text begins at P. PEFT does the same:
    PrefixTuningConfig(num_virtual_tokens=20, prefix_projection=True) there is the paper's MLP.
  - Rows are not packed: each carries the prefix, and is padded on the right.

Questions people ask
  Why an MLP?            Its weights tie layers and positions together; the paper found that more stable than training
                         the prefix itself. It is large: at LLaMA-7B 137 million parameters, for a prefix of 5.2 million.
  Is a prefix of zeros the base model?   No: a key of 0 has score 0, and so takes its share of every softmax.
  Prefix or prompt?      prompt_tuning.py trains vectors before the first layer, which makes keys and values of them.
                         From the same tokens both start at the same loss; the prefix has many more parameters.
  What does it cost?     P more keys for each query. The base stays whole; nothing can be merged.
  Why no --gradient-checkpointing?   transformers drops the cache where it recomputes blocks, and with it the prefix.

Measured: held-out loss of SmolLM2-135M-Instruct on GSM8K, 1.312 at step 0 (the base alone: 1.316), after 16 steps of two
rows (--eval-fraction 0.004 --max-length 384 --batch-size 2 --max-steps 16), two CPU cores, November 2026:
    --lr 3e-4: 0.966      1e-3: 0.972      --no-reparameterize --lr 1e-2: 1.083      3e-2: 1.002

    python prefix_tuning.py                                          # the bundled model learns a task, in a minute
    python prefix_tuning.py --model BASE --data train.jsonl          # BASE: a folder or a Hugging Face Hub name
    python prefix_tuning.py --model BASE --data train.jsonl --no-reparameterize --lr 3e-2 --init-text "Think."
    python prefix_tuning.py --model BASE --data more.jsonl --adapter runs/prefix_tuning --output runs/more   # go on
"""

import argparse
import math
import types

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

import common_before as common


class Prefix(nn.Module):
    """Keys and values in L layers. start (P, 2 L, heads, head_dim) float32. hidden 0: no MLP, start itself trains."""

    def __init__(self, start: torch.Tensor, embedding_size: int, hidden: int):
        super().__init__()
        self.shape, start = start.shape, start.flatten(1)  # (P, 2 L kv_dim)
        if not hidden:
            self.start, self.mlp = nn.Parameter(start), None
            return
        self.register_buffer("start", start, persistent=False)
        self.embedding = nn.Embedding(len(start), embedding_size, device=start.device)
        first = nn.Linear(embedding_size, hidden, device=start.device)
        last = nn.Linear(hidden, start.shape[1], device=start.device)
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(first, nn.Tanh(), last)

    def forward(self) -> torch.Tensor:
        """-> (P, 2 L kv_dim)"""
        return self.start if self.mlp is None else self.start + self.mlp(self.embedding.weight)

    def cache(self, rows: int, dtype: torch.dtype) -> DynamicCache:
        """The prefix as a cache that has read P tokens. A forward pass appends to it, so each needs a new one."""
        states = self().to(dtype).view(self.shape).permute(1, 2, 0, 3)  # (2 L, heads, P, head_dim)
        cache = DynamicCache()
        for layer in range(len(states) // 2):
            key, value = states[2 * layer], states[2 * layer + 1]
            cache.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), layer)
        return cache


def prefix_mask(model, attention_mask) -> torch.Tensor:
    """(B, T) -> (B, P + T), 1 on the prefix."""
    return torch.cat([attention_mask.new_ones(len(attention_mask), model.prefix.shape[0]), attention_mask], dim=1)


def target_logps(model, input_ids, targets, target_index, attention_mask, **inputs) -> torch.Tensor:
    """`common.target_logps` with the prefix before the text. Positions count from the length of the cache: the text's begin at P."""
    inputs |= {"attention_mask": prefix_mask(model, attention_mask)}
    inputs |= {"past_key_values": model.prefix.cache(len(input_ids), model.dtype)}
    return common.target_logps(model, input_ids, targets, target_index, **inputs)


def generate(model, input_ids, attention_mask, **options) -> torch.Tensor:
    """The model's own `generate` with the prefix before the text. (B, T) -> (B, T + new tokens).

    It skips as many input_ids as the cache holds: P ids of any kind are put before them and taken off the result."""
    P, cache = model.prefix.shape[0], model.prefix.cache(len(input_ids), model.dtype)
    ids = torch.cat([input_ids.new_zeros(len(input_ids), P), input_ids], dim=1)
    options |= {"attention_mask": prefix_mask(model, attention_mask), "past_key_values": cache}
    return type(model).generate(model, input_ids=ids, **options)[:, P:]


@torch.no_grad()
def keys_and_values(model, ids: list[int]) -> torch.Tensor:
    """What the base computes for P tokens at positions 0 to P - 1: (P, 2 L, heads, head_dim) float32, key and value of
    each layer in turn. Grouped-query attention's shapes come from here. Refuses layers that cannot hold a prefix."""
    ids = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    cache = getattr(model.base_model(input_ids=ids, use_cache=True), "past_key_values", None)
    layers = getattr(cache, "layers", [])
    plain = all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers)
    states = [state for layer in layers for state in (layer.keys, layer.values)] if plain else []
    if len(layers) != model.config.get_text_config().num_hidden_layers or len({state.shape for state in states}) != 1:
        odd = f"{type(model).__name__} has sliding-window or recurrent layers, or keys and values of several shapes"
        raise common.UserError(f"{odd}, which cannot all hold a prefix: use prompt_tuning.py")
    return torch.stack([state[0].transpose(0, 1).float() for state in states], dim=1)


def starting_tokens(model, tokenizer, length: int, text: str | None = None) -> list[int]:
    """P token ids: the text's, repeated or cut; without one, sampled from the vocabulary."""
    if text is None:
        return torch.randint(len(model.get_input_embeddings().weight), (length,), device="cpu").tolist()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return (ids * math.ceil(length / len(ids)))[:length]


def add_prefix(model, start: torch.Tensor, hidden: int, max_length: int) -> None:
    """Freeze the model and put a trained prefix before all that it reads, in training and in generation."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest and len(start) + max_length > longest:
        lengths = f"--prefix-length {len(start)} and --max-length {max_length}"
        raise common.UserError(f"{lengths}: together more than this model's {longest} positions: shorten either")
    model.requires_grad_(False)
    model.prefix = Prefix(start, model.get_input_embeddings().weight.shape[1], hidden)
    # evaluation, samples and the training loop all call these two
    model.target_logps, model.generate = types.MethodType(target_logps, model), types.MethodType(generate, model)


def train(args) -> None:
    check_flags(args)
    device, dtype = common.setup(args)
    tokenizer, vocab_size = common.load_tokenizer(args)
    if args.init_text is not None and not tokenizer(args.init_text, add_special_tokens=False).input_ids:
        raise common.UserError(f"--init-text {args.init_text!r} has no tokens: give some words")
    corpus, evaluation = common.load_data(args, tokenizer, vocab_size, device)
    if args.inspect:
        return corpus.show(tokenizer)
    model = common.load_model(args, dtype, device)
    if args.adapter:
        load_prefix(model, args)
    else:
        start = keys_and_values(model, starting_tokens(model, tokenizer, args.prefix_length, args.init_text))
        add_prefix(model, start, args.hidden if args.reparameterize else 0, args.max_length)
    common.compile_blocks(model, args)
    trainable, total = common.count_parameters(model)
    share, kept = f"{trainable:,} of {total:,} parameters train ({trainable / total:.2%})", model.prefix.start.numel()
    common.say(f"{share}; {kept:,} are kept, {args.prefix_length} positions in each layer")

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
    save_prefix(args, model, tokenizer)
    run.finish()
    common.say_how_to_use(args, script=None)


def save_prefix(args, model, tokenizer) -> None:
    """The prefix in PEFT's form: layer i's keys begin at column 2 i kv_dim, its values kv_dim after that."""
    P, states, heads, head_dim = model.prefix.shape
    config = {
        "peft_type": "PREFIX_TUNING", "num_virtual_tokens": P, "num_transformer_submodules": 1,
        "num_layers": states // 2, "token_dim": heads * head_dim, "num_attention_heads": heads,
        "encoder_hidden_size": heads * head_dim, "prefix_projection": False,  # the MLP is not part of the result
    }  # fmt: skip
    common.save_adapter(args, model, tokenizer, config, {"prompt_embeddings": model.prefix()})


def load_prefix(model, args) -> None:
    """Put the prefix of --adapter before the model's input, as the start of further training, with its own length."""
    _, tensors = common.load_adapter(args.adapter, model, "PREFIX_TUNING")
    like = keys_and_values(model, [0])  # (1, 2 L, heads, head_dim)
    args.prefix_length = len(tensors.get("prompt_embeddings", ()))
    start = torch.zeros(args.prefix_length, like.numel(), device=like.device)
    common.fill_adapter({"prompt_embeddings": start}, tensors, args.adapter)
    add_prefix(model, start.view(-1, *like.shape[1:]), args.hidden if args.reparameterize else 0, args.max_length)


def check_flags(args) -> None:
    """Refuse flags that cannot work together, before anything is loaded."""
    if args.packing:
        raise common.UserError("--packing: each row carries its own prefix, so rows are padded instead: leave it out")
    if args.gradient_checkpointing or args.checkpoint_blocks:
        flag = "--checkpoint-blocks" if args.checkpoint_blocks else "--gradient-checkpointing"
        lost = f"{flag}: transformers drops the prefix where it recomputes blocks"
        raise common.UserError(f"{lost}: use a smaller --batch-size with more --grad-accum")
    if args.hidden is not None and not args.reparameterize:
        raise common.UserError("--hidden: --no-reparameterize has no MLP: leave out one")
    args.hidden = args.hidden or 512


def main(argv=None) -> None:
    parser = common.make_parser(__doc__, demo={"lr": 2e-3, "epochs": 6}, output="runs/prefix_tuning", lr=3e-4, packing=False)
    add = parser.add_argument_group("prefix tuning").add_argument
    add("--prefix-length", type=common.number(int, 1), default=20, help="P, trained keys and values in each layer")
    add("--init-text", metavar="TEXT",
        help="start as if the base had read this text, repeated or cut to P tokens; default: sampled tokens")
    add("--reparameterize", action=argparse.BooleanOptionalAction, default=True,
        help="train through an MLP; without it the prefix itself, which is P-Tuning v2")
    add("--hidden", type=common.number(int, 1), default=None, help="width of the MLP (default: 512)")
    add("--adapter", metavar="FOLDER", help="continue from this prefix, ours or PEFT's; its length is used")
    parser.adapter_brings = ("--prefix-length", "--init-text")
    train(parser.parse_args(argv))


if __name__ == "__main__":
    tries = "a smaller --batch-size with more --grad-accum; a shorter --max-length; --no-reparameterize"
    common.launch(main, out_of_memory=tries)

"""Prefix tuning: in every layer of a frozen model, train keys and values that every text reads.

Li & Liang 2021, "Prefix-Tuning" (arXiv 2101.00190), equation 3 and the MLP of section 4.3:

    layer i:  softmax(Q [K_i; K]^T / sqrt(head_dim)) [V_i; V]     only K_i and V_i are trained
    [K_0 V_0 K_1 V_1 ...] = start + MLP(E)                        MLP(e) = W2 tanh(W1 e + b1) + b2

    Q, K, V   the frozen layer's queries, keys and values of the text
    K_i, V_i  (P, heads, head_dim)      P = --virtual-tokens, heads: those of keys and values
    start     prefix.start              (P, 2 L heads head_dim), L layers, float32, frozen
    E         prefix.embedding          (P, d), float32
    MLP       prefix.mlp                d -> --hidden -> 2 L heads head_dim, float32

P-Tuning v2 (Liu et al. 2021, arXiv 2110.07602) has no MLP: --hidden 0 trains `start` itself. The
first P-Tuning is in prompt_tuning.py.

In a packed forward pass, every document also reads the P keys and values of the prefix
(`behind_prefix`). So training needs no cache, and --gradient-checkpointing works.

Choices and departures from the paper
  - `start` is the base's own keys and values of --init-text, or of sampled tokens. W2 and b2 start
    at 0, so step 0 is exactly the base with these tokens before each text. The paper has only the
    MLP, and found that starting from real words helps if there is little data.
  - P is 20. The paper tunes it from 10 to 200. --micro-batch-tokens does not count the prefix.
  - Keys are those after rotary embedding, at positions 0 to P - 1. The text begins at position P.
    PEFT does the same. Its PrefixTuningConfig(prefix_projection=True) has the paper's MLP.

Questions people ask
  Why an MLP?         It ties layers and positions together, which the paper found more stable.
                      Only the prefix is saved (LLaMA-7B: 5.2 million numbers; MLP 137 million).
  Prefix or prompt?   prompt_tuning.py trains only vectors before layer 0. It learns more slowly.
  What does it cost?  P more keys per query, also at inference. A prefix cannot be merged.

Measured: `python prefix_tuning.py` answers 0 of 100 held-out prompts exactly before training, 100,
100 and 98 after 25 epochs (--seed 0, 1, 2). Tokens per second of CPU time on SmolLM2-135M, 8 rows
of GSM8K: 219 packed, 168 padded, 147 in PEFT. Two CPU cores, torch 2.13, 2026-11-26.

    python prefix_tuning.py                                  # the bundled model learns a task
    python prefix_tuning.py --model BASE --data train.jsonl  # BASE: a folder or a Hub name
    python prefix_tuning.py --model BASE --data train.jsonl --hidden 0 --lr 3e-2   # P-Tuning v2
"""

import math
import types

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

import common


class Prefix(nn.Module):
    """start: (P, 2 L, heads, head_dim) float32, the key and value of each layer in turn."""

    def __init__(self, start: torch.Tensor, embedding_size: int, hidden: int):
        super().__init__()
        self.shape, start = start.shape, start.flatten(1)  # (P, 2 L heads head_dim)
        self.start, self.mlp = nn.Parameter(start, requires_grad=not hidden), None
        if hidden:
            self.embedding = nn.Embedding(len(start), embedding_size)
            first, last = nn.Linear(embedding_size, hidden), nn.Linear(hidden, start.shape[1])
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.mlp = nn.Sequential(first, nn.Tanh(), last)

    def forward(self) -> torch.Tensor:  # (P, 2 L heads head_dim)
        return self.start + self.mlp(self.embedding.weight) if self.mlp else self.start

    def keys_and_values(self, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """-> key and value of each layer, (1, heads, P, head_dim)"""
        states = self().to(dtype).view(self.shape).permute(1, 2, 0, 3)  # (2 L, heads, P, head_dim)
        return [(key[None], value[None]) for key, value in zip(states[::2], states[1::2])]


def behind_prefix(stretches: common.Stretches, P: int) -> common.Stretches:
    """Every stretch reads P more keys, the first ones in each layer."""
    device, own = stretches.query_ends.device, stretches.key_index
    own = torch.arange(sum(stretches.lengths), device=device) if own is None else own
    prefix, keys = torch.arange(P, device=device), (own + P).split(stretches.key_lengths)
    more = torch.arange(len(keys) + 1, dtype=torch.int32, device=device) * P
    return stretches._replace(
        key_lengths=[P + length for length in stretches.key_lengths],
        key_ends=stretches.key_ends + more,
        key_index=torch.cat([index for own in keys for index in (prefix, own)]),
        longest=(stretches.longest[0], P + stretches.longest[1]),
    )


def target_logps(model, input_ids, targets, target_index, position_ids, stretches, **inputs):
    """`common.target_logps` of packed texts that read the prefix."""
    P = model.prefix.shape[0]
    inputs |= {"stretches": behind_prefix(stretches, P), "position_ids": position_ids + P}
    inputs["prefix"] = model.prefix.keys_and_values(model.dtype)
    return common.target_logps(model, input_ids, targets, target_index, **inputs)


def generate(model, input_ids, attention_mask, **options) -> torch.Tensor:
    """The model's own `generate` with the prefix in its cache. It skips as many ids as the cache
    holds, so P zeros are put before the prompt (B, T). -> (B, T + new tokens)"""
    P, cache = model.prefix.shape[0], DynamicCache()
    for layer, states in enumerate(model.prefix.keys_and_values(model.dtype)):
        cache.update(*(x.expand(len(input_ids), -1, -1, -1) for x in states), layer)
    options |= {"attention_mask": F.pad(attention_mask, (P, 0), value=1), "past_key_values": cache}
    return type(model).generate(model, input_ids=F.pad(input_ids, (P, 0)), **options)[:, P:]


@torch.no_grad()
def keys_and_values_of(model, ids: list[int]) -> torch.Tensor:
    """The base's keys and values of P tokens: (P, 2 L, heads, head_dim), float32."""
    ids = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    with common.own_attention(model), common.evaluating(model):
        cache = getattr(model.base_model(input_ids=ids, use_cache=True), "past_key_values", None)
    layers = [x for x in getattr(cache, "layers", []) if type(x) is DynamicLayer]
    states = [x for layer in layers for x in (layer.keys, layer.values)]
    every = len(layers) == model.config.get_text_config().num_hidden_layers
    if not every or len({x.shape for x in states}) != 1:
        kind = f"{type(model).__name__} has sliding windows, recurrent layers or unequal layers"
        raise common.UserError(f"{kind}: use prompt_tuning.py")
    return torch.stack([x[0].transpose(0, 1).float() for x in states], dim=1)


def add_prefix(model, start: torch.Tensor, hidden: int) -> None:
    """Freeze the model. In training and generation, every text reads the prefix."""
    model.requires_grad_(False)
    size = model.config.get_text_config().hidden_size
    model.prefix = Prefix(start.cpu(), size, hidden).to(start.device)
    model.target_logps = types.MethodType(target_logps, model)
    model.generate = types.MethodType(generate, model)


def starting_prefix(model, tokenizer, args) -> torch.Tensor:
    """That of --adapter, or of --init-text (repeated or cut to P tokens), or of sampled tokens."""
    if args.adapter:
        _, tensors = common.load_adapter(args.adapter, model, "PREFIX_TUNING")
        like = keys_and_values_of(model, [0])
        return tensors["prompt_embeddings"].to(like).view(-1, *like.shape[1:])
    P, size = args.virtual_tokens, len(model.get_input_embeddings().weight)
    ids = torch.randint(size, (P,), device="cpu").tolist()
    if args.init_text:
        ids = tokenizer(args.init_text, add_special_tokens=False).input_ids
    return keys_and_values_of(model, (ids * P)[:P])


def train(args) -> None:
    if args.no_packing:
        raise common.UserError("--no-packing: a prefix needs packed attention")
    device, dtype = common.setup(args)
    tokenizer = common.load_tokenizer(args)
    train_set, eval_set = common.load_data(args, tokenizer)
    if args.inspect:
        return common.inspect_examples(train_set, tokenizer)
    model = common.load_model(args, dtype, device)
    torch.manual_seed(args.seed)  # the same start on all GPUs
    add_prefix(model, starting_prefix(model, tokenizer, args), args.hidden)
    if args.chat:
        return common.chat(model, tokenizer, args, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(common.decay_groups(model, args), lr=args.lr, fused=True)
    trained = sum(p.numel() for p in parameters)
    common.say(f"{trained:,} parameters train; the saved prefix has {model.prefix.start.numel():,}")

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

    # --- copied from lora.py: one step ---
    for step in range(run["step"] + 1, len(steps) + 1):
        common.seed_step(args, step)  # dropout
        lr = common.learning_rate(step, len(steps), args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        examples = train_set[steps[step - 1]]
        num_targets = common.count_targets(examples)  # of all forward passes and GPUs
        loss = torch.zeros((), device=device)
        for batch in common.micro_batches(examples, args, device):  # this GPU's part
            nll = -model.target_logps(**batch).sum()  # cross-entropy
            (nll / num_targets).backward()  # a mean over the step's targets
            loss += nll.detach() / num_targets
        common.sum_gradients(model)  # over GPUs
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        log.step_done(examples, loss, lr, grad_norm)
        # --- end ---

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
    save_prefix(args, model, tokenizer)
    log.done()


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


def save_prefix(args, model, tokenizer) -> None:
    """Save the prefix in PEFT's format."""
    P, states, heads, head_dim = model.prefix.shape
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": P, "num_layers": states // 2}
    config |= {"token_dim": heads * head_dim, "num_attention_heads": heads}
    config |= {"encoder_hidden_size": heads * head_dim, "num_transformer_submodules": 1}
    tensors = {"prompt_embeddings": model.prefix()}
    common.save_adapter(args, model, tokenizer, config | {"prefix_projection": False}, tensors)


def main(argv=None) -> None:
    parser = common.make_parser(__doc__, output="runs/prefix_tuning", lr=3e-4)
    add = parser.add_argument_group("prefix tuning").add_argument
    add("--virtual-tokens", type=int, default=20, help="P: trained keys and values per layer")
    add("--init-text", metavar="TEXT", help="start from its keys and values; None: sampled")
    add("--hidden", type=int, default=512, help="width of the MLP; 0: no MLP (P-Tuning v2)")
    add("--adapter", metavar="FOLDER", help="start from this prefix, ours or PEFT's")
    train(common.parse_args(parser, argv, demo={"lr": 3e-3, "epochs": 25.0}))


if __name__ == "__main__":
    tries = "--gradient-checkpointing; a smaller --micro-batch-tokens or --max-length; --hidden 0"
    common.launch(main, out_of_memory=tries)

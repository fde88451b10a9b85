"""Reward model, the second stage of RLHF: learn from ranked answers how good an answer is.

Ouyang et al. 2022, "Training language models to follow instructions with human feedback" (arXiv
2203.02155), equation 1, for K ranked answers to a prompt:

    L = - 2 / (K (K - 1))  sum_(w,l)  log sigmoid(r(x, y_w) - r(x, y_l) - m)      r(x, y) = w . h

    h         hidden          the backbone's last hidden state at the end of prompt x and answer y
    w         score   (1, d)  the head, in place of the output layer; starts as N(0, 1 / (d + 1))
    r         rewards (S,)    float32, at the end of every prompt and every answer
    y_w, y_l  better, worse (P,)  the answers of a pair; K ranked answers make K (K - 1) / 2 pairs
    m         margin  (P,)    0, or the row's margin: how much better y_w is (Llama 2, 2307.09288)

Why a difference of rewards
  People can say which of two answers is better, but not how good one is. Bradley and Terry (1952)
  give every answer a strength exp(r) and let y_w beat y_l with probability
  exp(r_w) / (exp(r_w) + exp(r_l)) = sigmoid(r_w - r_l). L (with m = 0) is the negative
  log-likelihood of people's choices. Its gradient is - (1 - sigmoid(r_w - r_l)) grad(r_w - r_l), so
  a pair in the right order counts little. Adding a constant to all rewards of a prompt does not
  change L: rewards have no zero, and cannot safely be compared between prompts.

Choices and departures from the paper
  - All answers to a prompt are in one step: pairs spread over an epoch would overfit (section
    3.5). A prompt counts once and is computed once (see dpo.py).
  - The end of an answer is found by position, never by the pad id. transformers finds it by the
    pad id, so the model is saved with a pad token that no text ends with.
  - The mean reward of the best answers to 512 training prompts is saved as `reward_offset`, in
    config.json or an adapter's metadata. ppo.py subtracts it, so a score of 0 is as good as those
    answers. transformers and PEFT return r itself.
  - The base's dropout is off. One epoch, as in the paper.

Questions people ask
  Sum or mean?     The mean over the pairs of a prompt, then over the prompts of a step.
  Loss at step 0?  Near ln 2, but not equal: the random head already prefers some answers.
  Which --lr?      1e-5 for all parameters, 1e-4 with --lora-rank.
  Which base?      A model after SFT (sft.py). A reward model keeps its own head.

Measured: `python reward_model.py` raises the accuracy on 105 held-out pairs from 0.44, 0.36 and
0.36 to 1.00 (--seed 0, 1, 2; two CPU cores, torch 2.13, 2026-11-26).

    python reward_model.py                     # the bundled model learns to prefer kind reviews
    python reward_model.py --model CHAT --data pairs.jsonl --lora-rank 16 --lr 1e-4
"""

import copy
import math

import numpy as np
import torch
import torch.distributed.checkpoint.state_dict as dcp
import torch.nn.functional as F
import transformers
from torch import nn

import common


def pairwise_loss(chosen_rewards, rejected_rewards, margin=0.0):
    """Equation 1 for every pair, in nats. Rewards and margins (P,) -> losses (P,)"""
    return -F.logsigmoid(chosen_rewards - rejected_rewards - margin)


def rewards(model, last, targets=None, target_index=None, **inputs) -> torch.Tensor:
    """r at the positions last (S,) of the flattened (B * T,) tokens, called as
    `model.rewards(last, **batch)`. Targets are not used. -> (S,) float32"""
    hidden = model.base_model(use_cache=False, **inputs).last_hidden_state  # (B, T, d)
    hidden = hidden.flatten(0, 1).index_select(0, last)  # (S, d)
    with torch.autocast(hidden.device.type, enabled=False):
        return hidden.float() @ model.score.weight[0].float()


def last_tokens(batch: dict, examples: list[dict]) -> torch.Tensor:
    """Where every stretch ends, in the flattened (B * T,) tokens of a forward pass. -> (S,)"""
    if "stretches" in batch:
        count = sum(len(example["stretches"]) for example in examples)
        return batch["stretches"].query_ends[1 : count + 1] - 1
    count, width = batch["input_ids"].shape  # a row per answer, any for a prompt
    ends = torch.arange(count, device=batch["input_ids"].device) * width - 1
    ends += batch["attention_mask"].sum(1)  # (B,)
    rows, first = [], 0
    for example in examples:
        answers = [*range(first, first + len(example["stretches"]) - 1)]
        rows, first = [*rows, first, *answers], first + len(answers)
    return ends[rows]


def pair_figures(model, batch: dict) -> dict[str, torch.Tensor]:
    """Loss and metrics of a forward pass, as sums over its prompts. batch: the pass's `examples`,
    each with stretches, is_target and margin, and the inputs of the backbone."""
    examples = batch.pop("examples")
    _, _, better, worse, weight, margin = common.find_pairs(examples, batch["input_ids"].device)
    r = model.rewards(last_tokens(batch, examples), **batch)  # (S,)
    chosen, rejected = r[better], r[worse]  # (P,)
    losses = pairwise_loss(chosen, rejected, margin)
    figures = {"loss": losses, "accuracy": chosen > rejected, "margin": chosen - rejected}
    return {name: (weight * x).sum() for name, x in figures.items()}


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


def load_reward_model(args, dtype, device):
    """-> (a model with `model.rewards`, the config of its adapter or {}). The head is the
    adapter's, else the model's, else random."""
    base = common.pretrained(transformers.AutoConfig, args.model)
    lora, config = args.rank or args.adapter, {}
    shard = args.offload or (args.shard if lora else common.RANKS > 1)
    kind = {"shard": shard, "offload": args.offload, "load_in_4bit": args.load_in_4bit}
    weights = None if lora else torch.float32  # kept in float32 if all of them train
    model = common.load_model(args, dtype, device, weights, **kind, method=rewards)
    d = model.score.in_features
    head = torch.randn(1, d, generator=torch.Generator().manual_seed(args.seed)) / math.sqrt(d + 1)
    if "SequenceClassification" in str(base.architectures):
        head = common.whole(model.score.weight.data)
    if lora:
        config = common.add_adapter(model, args, LoRALinear, device)
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
        if args.adapter:
            head = common.load_adapter(args.adapter, model, "LORA")[1].get("score.weight", head)
        model.score = nn.Linear(d, 1, bias=False, device=device)  # float32, as the adapter
        model.score.weight.data.copy_(head)
    else:
        dcp.set_model_state_dict(model, {"score.weight": head}, options=common.LOAD)
    common.disable_dropout(model)
    if not args.no_packing:
        check_packing(model, args, device, exact=dtype == torch.float32)
    return model, config


def check_packing(model, args, device, exact: bool) -> None:
    """Answers that share a prompt must get the same rewards as padded ones: nothing leaks."""
    ids, padded = np.arange(24) * 5 % 17 + 3, copy.copy(args)
    columns = {"input_ids": [ids], "is_target": [ids > 0], "stretches": [np.array([9, 8, 7])]}
    padded.no_packing, found = True, torch.tensor(score(model, columns, args, device))
    with common.own_attention(model):
        expected = torch.tensor(score(model, columns, padded, device))
    if (found - expected).abs().max() > (1e-4 if exact else 0.1) * expected.abs().max():
        raise common.UserError(f"{type(model).__name__} cannot be packed: --no-packing may help")


def choose_pad_token(args, tokenizer) -> None:
    """A pad token that no text ends with: transformers reads the reward before the padding."""
    used = {*tokenizer.apply_chat_template(common.EXCHANGE, return_dict=False)}
    used |= {tokenizer.eos_token_id, tokenizer.bos_token_id}
    if tokenizer.pad_token_id in used:
        added = tokenizer.added_tokens_decoder.items()
        unused = [str(token) for i, token in added if token.special and i not in used]
        pads = sorted(unused, key=lambda t: ("pad" not in t.lower(), t == tokenizer.unk_token))
        tokenizer.add_special_tokens({"pad_token": [*pads, "<|pad|>"][0]})
        common.say(f"pad token: {tokenizer.pad_token!r}, which no text ends with")
    config = common.pretrained(transformers.AutoConfig, args.model).get_text_config()
    if tokenizer.pad_token_id >= config.vocab_size:
        raise common.UserError(f"--model {args.model}: its tokenizer has no unused special token")


def train(args) -> None:
    device, dtype = common.setup(args)
    tokenizer = common.load_tokenizer(args)
    train_set, eval_set = common.load_data(args, tokenizer, "whole pairs")
    if args.inspect:
        return common.inspect_examples(train_set, tokenizer)
    choose_pad_token(args, tokenizer)
    model, config = load_reward_model(args, dtype, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(common.decay_groups(model, args), lr=args.lr, fused=True)

    def measure(batch: dict) -> dict[str, torch.Tensor]:
        return pair_figures(model, batch)

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

    # --- copied from dpo.py: one step on pairs ---
    for step in range(run["step"] + 1, len(steps) + 1):
        common.seed_step(args, step)  # dropout of LoRA
        lr = common.learning_rate(step, len(steps), args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        examples, figures = train_set[steps[step - 1]], {}
        num_prompts = len(steps[step - 1])  # of all forward passes and GPUs
        for batch in common.micro_batches(examples, args, device):  # this GPU's part
            part = measure(batch)
            (part["loss"] / num_prompts).backward()  # a mean over the step's prompts
            for name, value in part.items():
                figures[name] = figures.get(name, 0.0) + value.detach() / num_prompts
        common.sum_gradients(model)  # over GPUs
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        # --- end ---
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
    best = sorted({n for step in steps for n in step} or range(len(train_set)))[:512]
    offset = np.mean([answers[0] for answers in score(model, train_set[best], args, device)])
    common.say(f"the mean reward of the best answers to {len(best)} prompts: {offset:.4f}")
    if config:
        common.save_adapter(args, model, tokenizer, config, reward_offset=str(offset))
    else:
        pad = {"pad_token_id": tokenizer.pad_token_id}
        model.config.get_text_config().update(pad)
        model.config.update(pad | {"reward_offset": float(offset)})
        common.save_model(args, model, tokenizer, dtype)
    log.done()


# --- copied from dpo.py: held-out figures ---
def held_out_figures(model, eval_set, measure, args, device) -> dict[str, float]:
    """Means of what measure(batch) sums, over the held-out prompts."""
    figures = {}
    with common.evaluating(model):
        for first in range(0, len(eval_set), 256):
            for batch in common.micro_batches(eval_set[first : first + 256], args, device):
                for name, value in measure(batch).items():
                    figures[name] = figures.get(name, 0.0) + value.double()
    sums = common.sum_over_ranks(torch.stack([*figures.values()])) / len(eval_set)
    return dict(zip(figures, sums.tolist()))


# --- end ---


def score(model, examples: dict, args, device) -> list[list[float]]:
    """The rewards r of each example's answers."""
    numbers = range(len(examples["input_ids"]))
    width = max(map(len, examples["stretches"]))
    values = torch.zeros(len(numbers), width, device=device)
    with common.evaluating(model):
        for batch in common.micro_batches(examples | {"number": numbers}, args, device):
            rows = batch.pop("examples")
            r = model.rewards(last_tokens(batch, rows), **batch)
            for row, part in zip(rows, r.split([len(row["stretches"]) for row in rows])):
                values[row["number"], : len(part)] = part
    values = common.sum_over_ranks(values).tolist()  # each GPU has its own passes
    return [x[1 : len(lengths)] for x, lengths in zip(values, examples["stretches"])]


def answer_samples(model, tokenizer, examples, args, device, log) -> list[tuple[str, list]]:
    """(prompt, [(reward, answer) ...]) of the first --samples examples."""
    examples, samples = examples.select(range(min(args.samples, len(examples)))), []
    values = score(model, examples[:], args, device) if args.samples else []
    for example, of_answers in zip(examples, values):
        parts = np.split(example["input_ids"], np.cumsum(example["stretches"])[:-1])
        prompt, *answers = tokenizer.batch_decode(parts, skip_special_tokens=True)
        samples.append((prompt, list(zip(of_answers, answers))))
    return samples


def print_samples(before, after) -> None:
    """before: None if the run was resumed."""
    for n, (prompt, answers) in enumerate(after[:3]):
        text = f"\n--- prompt ---\n{prompt.strip()}\n--- rewards before training -> after ---"
        for k, (value, answer) in enumerate(answers):
            was = f"{before[n][1][k][0]:+.3f} -> " if before else ""
            text += f"\n{was}{value:+.3f}  {answer.strip()}"
        common.say(text)


def main(argv=None) -> None:
    parser = common.make_parser(__doc__, output="runs/reward_model", lr=1e-5, chat=False)
    parser.set_defaults(epochs=1.0)
    add = parser.add_argument_group("reward model").add_argument
    add("--offload", action="store_true", help="keep weights and optimizer states in host memory")
    add("--load-in-4bit", action="store_true", help="base in 4 bits; needs an adapter")
    common.add_adapter_flags(parser, prefix="lora-", rank=0)
    demo = {"data": [str(common.EXAMPLES / "pairs.jsonl")], "lr": 1e-3, "samples": 3}
    train(common.parse_args(parser, argv, demo=demo))


if __name__ == "__main__":
    common.launch(
        main,
        out_of_memory="--gradient-checkpointing; a smaller --micro-batch-tokens; a shorter "
        "--max-length; --lora-rank 16; --offload; torchrun on more GPUs",
    )

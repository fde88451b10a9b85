"""Group relative policy optimisation (GRPO): PPO without a critic. Several answers to a prompt are
sampled, and each is compared with the mean of its group.

Shao et al. 2024, "DeepSeekMath" (arXiv 2402.03300), equation 3. For G answers to a prompt:

    advantage  A_i = (score_i - mean(score)) / (std(score) + 1e-4)     for all tokens of answer i
    loss       L   = sum_i,t w_i,t [ - min(ratio A_i, clip(ratio, 1 - eps, 1 + eps) A_i) + beta k3 ]
    k3             = p_ref / p_now - 1 - log(p_ref / p_now)            an estimate of the KL, >= 0

    ratio  p_now(y_t) / p(y_t), with p the policy that wrote the answer
    p      logps            (N,)  of the N answer tokens of a forward pass
    p_ref  reference_logps  (N,)  the policy before training, frozen
    A      advantages       (N,)  of each token's answer
    w      weights          (N,)  --loss grpo     1 / (answers * length of the answer), the paper's
                                  --loss bnpo     1 / tokens of all answers in the minibatch
                                  --loss dr_grpo  1 / (answers * --response-length)
    eps, beta, G                  --clip, --kl-coefficient, --group-size

Choices and departures from the paper
  - --loss dr_grpo --scale-rewards none is Dr. GRPO (Liu et al. 2025, arXiv 2503.20783). Dividing by
    the length favours long wrong answers; by the deviation, nearly solved or hopeless prompts.
  - One update per rollout by default, so every ratio is 1. --iterations makes more updates.
  - A prompt is computed once for all its answers. --rollout-size and --batch-size count answers.
  - The policy is a LoRA adapter. The reference is the base, or a frozen copy of --adapter.
  - [1] to [3] in the code are those of ppo.py: sampling, --missing-eos-penalty, the first ratio.

What to watch, in metrics.jsonl: score, score_ended, ended, length, entropy and clip_fraction are as
in ppo.py. kl is the mean k3 per token, in nats. equal_scores is the share of groups with advantage
0; a larger --group-size lowers it. eval_loss is minus the held-out score, for --patience.

Measured: `python grpo.py` raises the mean held-out score from 0.04, 0.01 and 0.04 to 0.67, 0.70
and 0.88 (--seed 0, 1, 2; one CPU core, torch 2.13, 2026-11-26).

    python grpo.py                                            # the bundled model gets kinder
    python grpo.py --model CHAT --data gsm8k.jsonl --reward examples/rewards.py:exact_match
"""

import argparse
import copy
import math
import runpy
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import common


def group_advantages(scores, scale: str):
    """scores (prompts, G) -> (prompts, G). scale: divide by the deviation of scores in the group,
    in the whole rollout (batch), or not at all."""
    centred = scores - scores.mean(dim=1, keepdim=True)
    if scale == "none":
        return centred
    deviation = scores.std(dim=1, keepdim=True) if scale == "group" else scores.std()
    return centred / (deviation + 1e-4)


def grpo_loss(logps, old_logps, reference_logps, advantages, weights, clip: float, beta: float):
    """All (N,) -> the loss of these tokens, and the sums of clipped ratios and of k3"""
    ratio = (logps - old_logps).exp()
    losses = -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    log_r = reference_logps - logps
    k3 = log_r.expm1() - log_r
    return (weights * (losses + beta * k3)).sum(), ((ratio - 1).abs() > clip).sum(), k3.sum()


def token_weights(lengths: list[int], answers: int, tokens: int, args):
    """w of the tokens of answers with these lengths. answers, tokens: of the whole minibatch."""
    lengths = torch.tensor(lengths)
    size = {"grpo": lengths, "bnpo": tokens / answers, "dr_grpo": args.response_length}[args.loss]
    return (torch.ones(len(lengths)) / (answers * size)).repeat_interleave(lengths)


def train(args) -> None:
    device, dtype = common.setup(args)
    tokenizer = common.load_tokenizer(args)
    train_set, eval_set = common.load_data(args, tokenizer, "prompts")
    if args.inspect:
        return common.inspect_examples(train_set, tokenizer)
    model = common.load_model(args, dtype, device)
    common.disable_dropout(model)
    config = common.add_adapter(model, args, LoRALinear, device)
    if args.chat:
        return common.chat(model, tokenizer, args, device)
    layers = reference_layers(model, args)
    reward = load_reward(args, model, tokenizer, dtype, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(common.decay_groups(model, args), lr=args.lr, fused=True)

    G, size = args.group_size, args.batch_size // args.group_size  # size: groups of a minibatch
    rollout_args = argparse.Namespace(**vars(args) | {"batch_size": args.rollout_size // G})
    steps = common.plan_steps(train_set, rollout_args)  # the prompts of every rollout
    common.say(f"{len(steps)} rollouts of {args.rollout_size // G} prompts with {G} answers each")
    run = common.start_run(args, model, optimizer, train_set, steps)
    log = common.Log(args, run, len(steps), device)

    def held_out_loss(model, eval_set, args, device) -> float:
        """eval_loss of one answer to each held-out prompt, by the same random numbers always."""
        answers = write_answers(model, reward, tokenizer, eval_set[:], args, device, step=0)
        print_answers(answers[: args.samples], tokenizer)
        figures = answer_figures(answers)
        log.evaluation(**figures)
        return -figures["score"]

    if run["step"] == 0 and eval_set:
        log.evaluation(loss=held_out_loss(model, eval_set, args, device))

    for step in range(run["step"] + 1, len(steps) + 1):
        lr = common.learning_rate(step, len(steps), args)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # The rollout: groups of answers with their advantages, split once into minibatches
        prompts = train_set[np.repeat(steps[step - 1], G)]
        answers = write_answers(model, reward, tokenizer, prompts, args, device, step)
        scores = torch.tensor([answer.score for answer in answers]).view(-1, G)
        groups = [answers[n : n + G] for n in range(0, len(answers), G)]
        groups = [*zip(groups, group_advantages(scores, args.scale_rewards))]
        generator = np.random.default_rng([args.seed, step])
        order = generator.permutation(len(groups))
        chosen = np.split(order, range(size, len(order), size))
        minibatches = [forward_passes([groups[n] for n in part], args, device) for part in chosen]
        passes = [part for parts in minibatches for part in parts]
        with torch.no_grad():
            for part in passes:
                part.logps = model.target_logps(**part.batch)
                with as_reference(layers):
                    part.reference_logps = model.target_logps(**part.batch)

        # The updates: one per minibatch
        sums, done = torch.zeros(3, device=device), 0
        for _ in range(args.iterations):
            for n in generator.permutation(len(minibatches)):
                for part in minibatches[n]:  # this GPU's forward passes
                    logps = model.target_logps(**part.batch)
                    if done == 0:
                        check_ratio(logps - part.logps, dtype)
                    fixed = (part.logps, part.reference_logps, part.advantages, part.weights)
                    results = grpo_loss(logps, *fixed, args.clip, args.kl_coefficient)
                    results[0].backward()
                    sums += torch.stack(results).detach()
                common.sum_gradients(model)  # over GPUs
                grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
                optimizer.step()
                optimizer.zero_grad()
                done += 1

        figures = answer_figures(answers)
        figures["equal_scores"] = (scores == scores[:, :1]).all(dim=1).float().mean().item()
        figures = {key: torch.tensor(x / common.RANKS).to(device) for key, x in figures.items()}
        tokens = sum(len(answer.ids) for answer in answers)
        figures["entropy"] = -torch.cat([part.logps for part in passes]).sum() / tokens
        figures |= dict(zip(("clip_fraction", "kl"), sums[1:] / (tokens * args.iterations)))
        written = {"input_ids": [answer.prompt + answer.ids for answer in answers]}
        log.step_done(written, sums[0] / done, lr, grad_norm, **figures)
        log.flush()  # a line for every rollout

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
    log.bar.close()
    if args.patience and run["best_step"] < run["step"]:
        common.say(f"using the weights of step {run['best_step']}: the lowest held-out loss")
        common.read_checkpoint(args, "best", model, optimizer, run["fixed"])
    common.save_adapter(args, model, tokenizer, config)
    log.done()


def forward_passes(groups: list[tuple], args, device) -> list[SimpleNamespace]:
    """This GPU's forward passes over a minibatch: groups (answers, advantages (G,)). A prompt and
    its answers are one example. Each of them is a stretch."""
    examples = {"input_ids": [], "is_target": [], "stretches": [], "advantages": []}
    for answers, advantages in groups:
        prompt, lengths = answers[0].prompt, [len(answer.ids) for answer in answers]
        examples["input_ids"].append(sum((answer.ids for answer in answers), prompt))
        examples["is_target"].append(np.arange(len(prompt) + sum(lengths)) >= len(prompt))
        examples["stretches"].append([len(prompt), *lengths])
        examples["advantages"].append(advantages.repeat_interleave(torch.tensor(lengths)))
    count, tokens = len(groups) * args.group_size, sum(map(len, examples["advantages"]))
    passes = []
    for batch in common.micro_batches(examples, args, device):
        rows = batch.pop("examples")
        lengths = [length for row in rows for length in row["stretches"][1:]]
        weights = token_weights(lengths, count, tokens, args)
        advantages = torch.cat([torch.zeros(0), *(row["advantages"] for row in rows)])
        fixed = {"advantages": advantages.to(device), "weights": weights.to(device)}
        passes.append(SimpleNamespace(batch=batch | {"temperature": args.temperature}, **fixed))
    return passes


# --- copied from dpo.py: the reference of LoRA ---
def reference_layers(model, args) -> list[tuple]:
    """(LoRA layer, its forward in the reference): the base's, or that of a copy of --adapter."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    if not args.adapter:
        return [(layer, layer.base.forward) for layer in layers]
    copies = [copy.deepcopy(x, {id(x.base): x.base}).requires_grad_(False).eval() for x in layers]
    return [(layer, start.forward) for layer, start in zip(layers, copies)]


@contextmanager
def as_reference(layers: list[tuple]):
    """Temporarily make the LoRA layers compute the reference, without gradients."""
    for layer, forward in layers:
        layer.forward = forward
    with torch.no_grad():
        yield
    for layer, _ in layers:
        del layer.forward


# --- end ---


@contextmanager
def merged_policy(model):
    """Temporarily merge the adapter into the base, as in ppo.py."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]
    kept = [layer.base.weight.detach().clone() for layer in layers]
    config, eos = model.generation_config, model.generation_config.eos_token_id
    model.generation_config = transformers.GenerationConfig(eos_token_id=eos)
    with as_reference([(layer, layer.merged().forward) for layer in layers]):
        yield
    for layer, weight in zip(layers, kept):
        layer.base.weight.data.copy_(weight)
    model.generation_config = config


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


# --- copied from ppo.py: rollouts ---
class Answer(NamedTuple):
    prompt: list[int]
    ids: list[int]  # [2] with the end of turn, if there is one
    ended: bool
    score: float


def write_answers(model, reward, tokenizer, examples, args, device, step: int) -> list[Answer]:
    """The policy's answers to the prompts of the examples, in order, on all GPUs."""
    prompts, references = zip(*map(split_example, examples["input_ids"], examples["is_target"]))
    references = [tokenizer.decode(x, skip_special_tokens=True) if x else None for x in references]
    settings = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}  # [1]
    settings |= {"max_new_tokens": args.response_length}
    settings |= {"cache_implementation": "static", "disable_compile": True}
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size, stop, mine = args.generation_batch, common.stop_ids(model, tokenizer), []
    with merged_policy(model):
        for first in range(size * common.RANK, len(prompts), size * common.RANKS):
            # depends on seed, step and batch, not on the number of GPUs
            torch.manual_seed(hash((args.seed, step, first)) % 2**63)
            numbers = by_length[first : first + size]
            batch = [prompts[i] for i in numbers]
            ids = common.generate_ids(model, tokenizer, batch, device, **settings)
            mine += zip(numbers, batch, ids)
    scores = reward([x[1] for x in mine], [x[2] for x in mine], [references[x[0]] for x in mine])
    answers = []
    for (number, prompt, ids), score in zip(mine, scores, strict=True):
        ended = ids[-1] in stop
        score = float(score) - args.missing_eos_penalty * (not ended)  # [2]
        answers.append((number, Answer(prompt, ids, ended, score)))
    parts = [answers] * common.RANKS
    if common.RANKS > 1:
        dist.all_gather_object(parts, answers)
    return [answer for _, answer in sorted(sum(parts, []))]


def split_example(input_ids, is_target) -> tuple[list[int], list[int]]:
    """-> (prompt, the last answer), which is empty where the data has none."""
    starts = np.flatnonzero(np.diff(is_target.astype(int)) == 1) + 1
    start = starts[-1] if len(starts) else len(input_ids)
    return input_ids[:start].tolist(), input_ids[start:].tolist()


def answer_figures(answers: list[Answer]) -> dict[str, float]:
    ended = [answer.score for answer in answers if answer.ended]
    figures = {"score": sum(answer.score for answer in answers) / len(answers)}
    figures |= {"score_ended": sum(ended) / len(ended)} if ended else {}
    length = sum(len(answer.ids) for answer in answers) / len(answers)
    return figures | {"ended": len(ended) / len(answers), "length": length}


def print_answers(answers: list[Answer], tokenizer) -> None:
    for answer in answers[:4]:
        prompt, text = (tokenizer.decode(x, skip_special_tokens=True) for x in answer[:2])
        common.say(f"{answer.score:7.3f} | {prompt[-40:]!r:>42} | {text[:100]!r}")


def check_ratio(log_ratio, dtype) -> None:
    """[3] Before the first update of a rollout, new and old log-probabilities are equal."""
    off = log_ratio.abs().max().item() if len(log_ratio) else 0.0
    if off > (1e-4 if dtype == torch.float32 else 0.05):
        raise common.UserError(f"in the first update, log-probabilities differ by {off:.3g} nats "
                               "from the rollout's: the model is not deterministic")  # fmt: skip


def load_reward(args, model, tokenizer, dtype, device):
    """--reward -> reward(prompts, answers, references) -> scores. Prompts and answers are token
    ids, references the data's answers as text, or None."""
    if ".py:" not in args.reward:
        kind = transformers.AutoModelForSequenceClassification
        classifier = common.pretrained(kind, args.reward, dtype=dtype, num_labels=1).to(device)
        head = classifier.score.weight, getattr(classifier.config, "reward_offset", 0.0)
        return model_reward(classifier, *head, args, model, tokenizer, device)
    path, _, name = args.reward.rpartition(":")
    function = runpy.run_path(path)[name]  # of texts without special tokens

    def reward(prompts, answers, references):
        rows = [*prompts, *answers]
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]
        return function(texts[: len(prompts)], texts[len(prompts) :], references)

    return reward


def model_reward(classifier, weight, offset, args, model, tokenizer, device):
    """The score is the head's output (weight (1, d)) at the last token, minus the offset that
    reward_model.py saved. An answer that was cut off gets an end of turn first."""
    theirs = transformers.AutoTokenizer.from_pretrained(args.reward)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise common.UserError(f"--reward {args.reward} has another tokenizer than --model")
    weight, stop = weight.detach().float().to(device), common.stop_ids(model, tokenizer)
    question, answer = common.EXCHANGE
    ids, marks = common.encode_answers(tokenizer, [question], [answer], None, whole=True)[0]
    ends = [n for n in np.flatnonzero(marks) if ids[n] in stop]
    ending = ids[ends[0] :] if ends else []  # the end of turn, and what the template adds to it

    def reward(prompts, answers, references):
        rows = [p + a[: len(a) - (a[-1] in stop)] + ending for p, a in zip(prompts, answers)]
        scores = []
        with common.evaluating(classifier), common.own_attention(classifier):
            for first in range(0, len(rows), args.generation_batch):
                batch = rows[first : first + args.generation_batch]
                last = torch.tensor([len(row) - 1 for row in batch])
                ids = pad_sequence([*map(torch.tensor, batch)], batch_first=True)
                mask = (torch.arange(ids.shape[1]) <= last[:, None]).long()
                inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
                hidden = classifier.base_model(**inputs, use_cache=False).last_hidden_state
                hidden = hidden[torch.arange(len(batch)), last].float()  # (B, T, d) -> (B, d)
                scores += (F.linear(hidden, weight).squeeze(1) - offset).tolist()
        return scores

    return reward


def add_rollout_flags(parser) -> None:
    add = parser.add_argument_group("rollouts").add_argument
    add("--reward", help="a folder of reward_model.py, or FILE.py:FUNCTION (the file is run)")
    add("--rollout-size", type=int, default=64, help="answers per rollout; --batch-size divides it")
    add("--response-length", type=int, default=128, help="maximum tokens of an answer")
    add("--temperature", type=float, default=1.0, help="of sampling and all log-probabilities")
    add("--missing-eos-penalty", type=float, default=1.0, help="subtracted for cut-off answers")
    add("--generation-batch", type=int, default=32, help="answers generated at once per GPU")
    add("--clip", type=float, default=0.2, help="eps: clips ratios (in PPO also values)")
    add = parser.add_argument_group("LoRA").add_argument
    add("--rank", type=int, default=16, help="rank of the update")
    add("--alpha", type=float, default=32.0, help="the update is scaled by alpha / rank")
    add("--targets", default="all-linear", help="or q_proj,v_proj or a regular expression")
    add("--adapter", metavar="FOLDER", help="start from it; a copy is the reference")
    parser.set_defaults(max_length=512, eval_every=10, dropout=0.0, shard=False)


def check_flags(args) -> None:
    if args.rollout_size % args.batch_size:
        raise common.UserError("--rollout-size must be a multiple of --batch-size")
    if not (args.reward or args.inspect or args.chat):
        raise common.UserError("--reward is missing: a reward model or FILE.py:FUNCTION")


# --- end ---


def main(argv=None) -> None:
    parser = common.make_parser(__doc__, output="runs/grpo", lr=3e-5)
    add_rollout_flags(parser)
    parser.set_defaults(batch_size=64)
    add = parser.add_argument_group("GRPO").add_argument
    add("--group-size", type=int, default=8, help="G, answers per prompt")
    add("--iterations", type=int, default=1, help="the paper's mu: updates with each answer")
    add("--loss", choices=["grpo", "bnpo", "dr_grpo"], default="grpo", help="weights w")
    how = "divide advantages by the deviation of scores in the group, the rollout, or not"
    add("--scale-rewards", choices=["group", "batch", "none"], default="group", help=how)
    add("--kl-coefficient", type=float, default=0.04, help="beta: weight of the KL term")
    demo = {"lr": 3e-3, "response_length": 48, "max_steps": 15, "samples": 4}
    demo |= {"data": [str(common.EXAMPLES / "pairs.jsonl")]}
    demo |= {"reward": f"{common.EXAMPLES}/rewards.py:kindness"}
    args = common.parse_args(parser, argv, demo=demo)
    check_flags(args)
    if args.batch_size % args.group_size:
        raise common.UserError("--batch-size must be a multiple of --group-size")
    train(args)


if __name__ == "__main__":
    common.launch(main, out_of_memory="--gradient-checkpointing; a smaller --micro-batch-tokens; "
                  "a smaller --generation-batch; a shorter --response-length")  # fmt: skip

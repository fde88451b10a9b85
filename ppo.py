"""Proximal policy optimisation (PPO), the third stage of RLHF (reinforcement learning from human feedback): sample answers, score
them, and raise the probability of what turned out better than expected.

Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (arXiv 1707.06347); for language models Ziegler et al. 2019 (arXiv
1909.08593) and Ouyang et al. 2022 (arXiv 2203.02155), section 3.5. The policy is the language model that is trained; the critic, a
second one with a head that gives a number, predicts at each token the reward still to come; a rollout is a batch of answers that the
policy writes. For an answer y_1 .. y_T to a prompt (an episode, in the words of reinforcement learning):

    reward     r_t = -beta (log p(y_t) - log p_ref(y_t)) + [t = T] score(prompt, answer)
    advantage  A_t = delta_t + gamma lambda A_t+1,    delta_t = r_t + gamma V_t+1 - V_t,    V_T+1 = 0,    return R_t = A_t + V_t
    policy     L   = - mean_t min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t),    ratio_t = p_new(y_t) / p(y_t)
    critic     L   = 1/2 mean_t max((Vnew_t - R_t)^2, (clip(Vnew_t, V_t - eps, V_t + eps) - R_t)^2)

    p      logps             (B, T)  the policy that sampled the answer; p_new: while it is trained
    p_ref  reference_logps   (B, T)  the policy as it was when this run began, frozen
    V      values            (B, T)  the critic's before the updates, at the position that predicts y_t; Vnew: while it is trained
    score  scores            (B,)    the reward model's, or a function's; [t = T] is 1 at the answer's last token, 0 before
    T                                number of tokens of an answer, its end of turn included; in shapes, that of the longest answer;
                                     mask (B, T) is True on answers
    beta, eps, gamma, lambda         --kl-coefficient, --clip, --gamma, --lam

The details that decide whether it works (Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", arXiv 2403.17031);
the code has their numbers:
 [1]  Answers are drawn from the policy at --temperature, from the whole distribution: no top-k, no top-p.
 [2]  An answer ends at its first end-of-turn token; masks go by position, padding follows. One that does not end by itself within
      --response-length scores --unfinished-score instead; otherwise nothing teaches the policy to end. The default, auto, is min(-1,
      the lowest score among answers that ended in the first rollout or evaluation that has any). A number above what poor answers
      get would teach the policy to talk on.
 [3]  Old log-probabilities are computed again after sampling, by the code that computes the new ones, at the same temperature, in the
      same micro-batches; the sampler's own differ by rounding (sampling_error). So the ratio of each rollout's first update is 1, and
      the run checks it.
 [4]  The penalty for leaving the reference, KL(p, p_ref), is paid token by token (its estimator k1 = log p - log p_ref); the score
      comes with the last token.
 [5]  gamma 1, lambda 0.95 (generalised advantage estimation, GAE). Returns are computed before the advantages are whitened (mean 0,
      variance 1 over all answer tokens of the rollout).
 [6]  Both losses are clipped at eps = 0.2: a ratio for the policy, units of the score for the critic, whose values so move by about
      0.2 a rollout. Scale a reward that spans tens to about -1 .. 1, or the critic lags behind. The critic's loss is multiplied by
      0.1 as in the papers; with an optimizer of its own that only matters for --max-grad-norm and Adam's eps. To make it learn
      faster, raise --critic-lr.
 [7]  4 epochs over a rollout, reshuffled; Adam with eps 1e-5; the learning rate falls to 0; no dropout in any model.
 [8]  The critic starts from the reward model if that reads the policy's tokens and, with LoRA, is itself a LoRA on the same base;
      else from the policy's base with a head of zeros. beta is fixed, or --kl-target adapts it.
 [9]  Left-padded prompts get position_ids = cumsum(mask) - 1.
 [10] No metric counts padding.

Choices and departures from the papers
  - Reshuffled are micro-batches, not rows: in bfloat16 a token's log-probability changes by up to 0.3 nats with the rows beside it,
    more than the clip range; in the same micro-batch it does not. Micro-batches hold rows of similar length; at --grad-accum 1 an
    update therefore sees one length. Use several: --grad-accum of them, freshly drawn, make a minibatch.
  - Policy and critic share no trained parameter and have a gradient clip each, so a wild critic does not shrink the policy's step.
  - The random number behind each token depends on --seed, the step and the prompt's number in it alone, not on the batch nor on how
    many ranks there are; in float32 so does the token.
  - An answer cut off at --response-length counts as ended: V_T+1 = 0 there, too.

Four models in the memory of one: with --lora-rank or --adapter, policy (its adapter on), reference (none on, or a frozen copy of
--adapter), critic (own adapter, own head) and a reward model that is a LoRA on the same base share one frozen base. Without, each is a
model of its own: 38 bytes a parameter (policy and critic 16 each; the reference 4, as it must round as the policy does; a reward model 2).

Questions people ask
  Sum or mean?      Losses are means over all answer tokens of a minibatch, whatever the answers' lengths. kl and reward in the
                    metrics are sums over an answer's tokens, then means over answers.
  Which rate?       The default is 3e-6 where every parameter trains, and 3e-5 for LoRA; the critic's is the same.
  Why k1, not k3?   As a reward, k1's expectation has the gradient of the KL; k3 (always >= 0, less noise) is only logged.
  kl is negative?   On a sample it may be, slightly. Steadily: sampling and training disagree; see sampling_error.
  Score falls?      A --lr too high, or a critic that knows nothing yet: a lower --lr, a higher --critic-lr, larger rollouts.
  Score rises, answers get worse?  The reward is being gamed: raise --kl-coefficient, read the answers printed at evaluations.
  From TRL?         --minibatches multiplies the rollout (num_mini_batches divides it); --unfinished-score replaces the score
                    (missing_eos_penalty is subtracted from it); --clip is both cliprange and cliprange_value.

Metrics, means over the rollouts since the last logged step. A step (--log-every, --eval-every, --save-every) is one rollout with its updates.
  score, reward, response_length, eos_rate   per answer: its score, the sum of its r_t, its tokens, whether it ended by itself
  kl, kl_k3                                  nats per answer, policy to reference; kl_coefficient is beta
  entropy                                    nats per token, exact, of the distributions that tokens were drawn from
  sampling_error                             mean |log p while sampling - log p in training|, nats: the numerics, about 1e-6 in float32
  loss, policy_loss, value_loss              means over the updates; loss = policy_loss + --value-coefficient * value_loss
  clip_fraction                              share of tokens whose ratio left 1 - eps .. 1 + eps
  explained_variance                         1 - Var(R - V) / Var(R), before the updates: 1 is perfect, 0 no better than a constant, below 0
                                             worse. Returns R are TD(lambda) targets that contain V itself.
  lr, critic_lr, grad_norm, critic_grad_norm of the rollout's last update; norms before clipping
  rollout_tokens_per_second                  tokens sampled; their scores and log-probabilities are in the time
  update_tokens_per_second                   prompt and answer tokens that went through the updates

Measured: `python ppo.py` takes the bundled model's mean held-out score from -0.06 to 0.94, 0.87 and 0.80 with three seeds (README,
Results, with a reward model and with what went wrong on the way).

    python ppo.py                                                      # the bundled model learns to write kinder reviews, in a minute
    python ppo.py --model runs/sft --data prompts.jsonl --reward runs/reward --lora-rank 16
    python ppo.py --model runs/sft --data gsm8k.jsonl --reward examples/rewards.py:exact_match --response-length 256
    torchrun --nproc-per-node 8 ppo.py --model runs/sft --data prompts.jsonl --reward runs/reward --lora-rank 16
"""

import copy
import json
import math
import runpy
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn

import common_before as common

# ------------------------------------------------------------------------------------------------------- The equations
# B answers, T tokens. Outside the mask every tensor is 0, and every result stays 0: sums need no mask, means a count.


def token_rewards(logps, reference_logps, scores, mask, kl_coefficient: float) -> torch.Tensor:
    """[4] The KL penalty at every token, the score at the last. (B, T), (B, T), (B,), (B, T) -> (B, T)"""
    last = mask & ~F.pad(mask[:, 1:], (0, 1))  # True where the next token is padding
    return -kl_coefficient * (logps - reference_logps) + last * scores[:, None]


def gae(rewards, values, gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[5] Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438). -> (advantages, returns); all (B, T)."""
    advantages = torch.zeros_like(values)
    advantage = next_value = torch.zeros_like(values[:, 0])  # (B,), of the next token: 0 after an answer's end
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
    return advantages, advantages + values


def masked_moments(values, mask) -> tuple[float, float]:
    """Mean and (biased) variance of the values, 0 outside the mask, over all ranks. No value inside: 0 and 0."""
    count = max(1.0, common.over_ranks(mask.sum().item()))
    mean = common.over_ranks(values.sum().item()) / count
    return mean, common.over_ranks((((values - mean) * mask) ** 2).sum().item()) / count


def whiten(values, mask) -> torch.Tensor:
    """[5] Mean 0 and variance 1 inside the mask. The mean is subtracted as well: a token is reinforced only if it did better than the
    rollout's average. The variance is the biased one, as in Ziegler's code; a single value becomes 0, never nan. (B, T) -> (B, T)"""
    mean, variance = masked_moments(values, mask)
    return (values - mean) * mask / math.sqrt(variance + 1e-8)


def policy_loss(logps, old_logps, advantages, count: int, clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[6] The clipped objective (arXiv 1707.06347, equation 7), negated -> (loss, clip fraction), sums over tokens / count.
    count: answer tokens of the whole minibatch, of which these rows may be a part. All (B, T)."""
    ratio = (logps - old_logps).exp()
    losses = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return losses.sum() / count, ((ratio - 1).abs() > clip).sum() / count


def value_loss(values, old_values, returns, count: int, clip: float) -> torch.Tensor:
    """[6] Half the larger squared error, of the value itself or of the value held near the old one. Count as in `policy_loss`."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2).sum() / count


def explained_variance(values, returns, mask) -> float:
    """1 - Var(returns - values) / Var(returns)."""
    variance = masked_moments(returns, mask)[1]
    return 1 - masked_moments(returns - values, mask)[1] / variance if variance else 0.0


def kl_estimates(logps, reference_logps) -> tuple[torch.Tensor, torch.Tensor]:
    """Of KL(policy, reference) at sampled tokens: k1 = -log r and k3 = r - 1 - log r with r = p_ref / p. All (B, T), nats."""
    log_r = reference_logps - logps
    return -log_r, log_r.expm1() - log_r


def adapted_kl_coefficient(beta: float, kl: float, target: float, answers: int, horizon: int) -> float:
    """[8] Ziegler's controller: a step of at most 20 % per horizon of answers, towards the KL that is wanted (nats per answer)."""
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * answers / horizon)


# ------------------------------------------------------------------------------------------------------------ Training


class MicroBatch(NamedTuple):
    rows: slice  # of this rank's answers in the rollout
    batch: dict | None  # what `collate` makes of them; None if no answer is left for this rank
    tokens: int  # answer tokens, of all ranks


class Rollout(NamedTuple):
    """A step's answers. n rows are this rank's, micro-batch after micro-batch; T is the longest answer of all ranks."""

    mask: torch.Tensor  # (n, T) True on answer tokens
    logps: torch.Tensor  # (n, T)
    reference_logps: torch.Tensor  # (n, T)
    scores: torch.Tensor  # (n,)
    micro_batches: list[MicroBatch]
    rows: int  # of all ranks
    tokens: int  # prompts and answers of all ranks
    figures: dict[str, float]
    table: list[tuple[int, float, str, str]]  # (number of the prompt, score, prompt, answer)


class Experience(NamedTuple):
    """What the updates read, (n, T) each."""

    mask: torch.Tensor
    logps: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor  # whitened
    returns: torch.Tensor


def train(args) -> None:
    device, dtype = common.setup(args)
    lora = bool(args.rank or args.adapter)
    if common.world_size() > 1 and not lora:
        raise common.UserError("torchrun: every rank holds whole models here, and only adapters train on several: give --lora-rank")
    if args.response_length >= args.max_length:
        raise common.UserError(f"--response-length {args.response_length} leaves no room for a prompt in --max-length {args.max_length}")
    tokenizer, vocab_size = common.load_tokenizer(args)
    prompt_args, critic_args = copy.copy(args), copy.copy(args)  # a prompt must leave room for its answer; the critic's rate is its own
    prompt_args.max_length, critic_args.lr = args.max_length - args.response_length, args.critic_lr
    corpus, evaluation = common.load_data(prompt_args, tokenizer, vocab_size, device, kind="prompts")
    if args.inspect:
        return corpus.show(tokenizer)
    corpus.rows_per_step *= args.minibatches  # a step is a rollout, and batch_size * grad_accum * ranks only one of its minibatches
    plan = corpus.plan()

    roles, scorer = load_roles_and_scorer(args, tokenizer, dtype, device)
    policy, critic = roles["policy"], roles["critic"]
    for model in {policy.model, critic.model}:
        common.checkpoint_blocks(model, args)
        common.compile_blocks(model, args)
    trained = nn.ModuleDict({"policy": policy.model, "critic": critic.head if lora else critic.model})  # what Run saves and restores
    trained.base_fingerprint = policy.model.base_fingerprint
    optimizer = torch.optim.Adam([{"params": role.own_parameters()} for role in (policy, critic)], lr=0.0, eps=1e-5, fused=True)  # [7]

    def rollout_of(step: int) -> Rollout:
        epoch, first = plan[min(step, len(plan) - 1)]
        rows = corpus.rows(epoch)[first : first + corpus.rows_per_step]
        rollout = collect(args, roles, tokenizer, scorer, run.own, corpus, rows, [0, step])
        check_health(rollout.figures, step, run, args)
        return rollout

    def measure() -> dict[str, float]:
        """The same draws at every evaluation. Prints a table of answers."""
        rollout = collect(args, roles, tokenizer, scorer, run.own, evaluation, evaluation.rows(), [1])
        check_health(rollout.figures, run.step, run, args)
        rows = sorted(gathered(rollout.table))[: args.samples]
        lines = [f"{score:9.3f} | {prompt[-50:]!r:52} | {answer[:100]!r}" for _, score, prompt, answer in rows]
        common.say("\n".join([f"{'score':>9} | {'held-out prompt':52} | answer", *lines] if lines else []))
        return {name: value for name, value in rollout.figures.items() if name != "rollout_tokens_per_second"}

    run = common.Run(args, trained, tokenizer, [optimizer], corpus, evaluation, measure, show=list)  # no samples: measure() prints them
    run.begin()
    if args.estimate:
        estimate(args, policy, critic, trained, optimizer, corpus)
    run.own.setdefault("kl_coefficient", args.kl_coefficient)
    rollout = rollout_of(run.step) if run.step < run.total_steps else None

    for step in range(run.step, run.total_steps):
        started, beta = time.perf_counter(), run.own["kl_coefficient"]
        for group, schedule in zip(optimizer.param_groups, (args, critic_args)):
            group["lr"] = common.learning_rate(step, run.total_steps, schedule)

        # what each token was worth, beyond what the critic expected of it
        mask, values = rollout.mask, over_micro_batches(critic.values, rollout.micro_batches, rollout.mask)
        rewards = token_rewards(rollout.logps, rollout.reference_logps, rollout.scores, mask, beta)
        advantages, returns = gae(rewards, values, args.gamma, args.lam)
        experience = Experience(mask, rollout.logps, values, whiten(advantages, mask), returns)

        # several epochs of updates on the same answers, a minibatch each
        sums, updates = torch.zeros(3, device=device), 0
        for ppo_epoch in range(args.ppo_epochs):
            order = np.random.default_rng([args.seed, 2, step, ppo_epoch]).permutation(len(rollout.micro_batches))  # [7]
            for first in range(0, len(order), args.grad_accum):
                minibatch = [rollout.micro_batches[i] for i in order[first : first + args.grad_accum]]
                losses, log_ratio, norms = update(args, policy, critic, trained, optimizer, experience, minibatch)
                if updates == 0:
                    check_ratio(log_ratio.item(), exact=dtype == torch.float32)
                sums, updates = sums + losses, updates + 1
        policy_mean, value_mean, clip_fraction = (common.over_ranks(value) / updates for value in sums.tolist())
        figures = {
            "loss": policy_mean + args.value_coefficient * value_mean, "policy_loss": policy_mean, "value_loss": value_mean,
            "clip_fraction": clip_fraction, **rollout.figures, "reward": common.over_ranks(rewards.sum().item()) / rollout.rows,
            "kl_coefficient": beta, "explained_variance": explained_variance(values, returns, mask),
            "critic_lr": optimizer.param_groups[1]["lr"], "critic_grad_norm": norms[1].item(),
            "update_tokens_per_second": rollout.tokens * args.ppo_epochs / (time.perf_counter() - started),
        }  # fmt: skip
        if args.kl_target:  # [8]
            run.own["kl_coefficient"] = adapted_kl_coefficient(beta, figures["kl"], args.kl_target, rollout.rows, args.kl_horizon)

        # the next rollout, then log and save: what the policy has become shows in its answers, and a collapsed one must not be saved
        tokens = rollout.tokens
        if step + 1 < run.total_steps or evaluation is None:  # the last policy is checked by its evaluation, or else once more here
            rollout = rollout_of(step + 1)
        epoch, first = plan[step]
        epoch += min(1.0, (first + corpus.rows_per_step) / len(corpus.rows(epoch)))
        shares = {name: torch.tensor(value / common.world_size(), device=device) for name, value in figures.items()}  # end_step sums over ranks
        run.end_step(epoch, shares, tokens, 1, optimizer.param_groups[0]["lr"], norms[0])

    run.show_samples()
    if lora:
        save_policy(args, policy.model, tokenizer)
    else:
        common.save_trained(Path(args.output), policy.model, tokenizer, dtype, args.trust_remote_code)
    run.finish()
    common.say_how_to_use(args, adapter=lora)


def update(args, policy, critic, trained, optimizer, experience: Experience, minibatch: list[MicroBatch]) -> tuple:
    """A step of policy and critic on a minibatch -> (policy loss, value loss and clip fraction (3,), this rank's part of each; the
    largest |log ratio| before the step; the gradient norms of policy and critic before clipping)."""
    losses, log_ratio = torch.zeros(3, device=experience.mask.device), torch.zeros((), device=experience.mask.device)
    count = sum(part.tokens for part in minibatch)
    for rows, batch, _ in minibatch:
        if batch is None:
            continue
        mask, old_logps, old_values, advantages, returns = (tensor[rows] for tensor in experience)
        logps = as_rows(policy.logps(batch, args.temperature), mask)
        loss, clip_fraction = policy_loss(logps, old_logps, advantages, count, args.clip)
        loss.backward()
        values = as_rows(critic.values(batch), mask)
        critic_loss = value_loss(values, old_values, returns, count, args.clip)
        (args.value_coefficient * critic_loss).backward()
        losses += torch.stack([loss, critic_loss, clip_fraction]).detach()
        log_ratio = torch.maximum(log_ratio, (logps.detach() - old_logps).abs().max())
    common.sum_gradients([p for group in optimizer.param_groups for p in group["params"]])
    if not optimizer.state:  # the run's first update
        common.check_gradients(trained)
    norms = [nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm or math.inf) for group in optimizer.param_groups]
    optimizer.step()
    optimizer.zero_grad()
    return losses, log_ratio, norms


def check_ratio(log_ratio: float, exact: bool) -> None:
    """[3] Before a rollout's first update nothing has been trained: ratio 1, clip fraction 0."""
    off = common.over_ranks(log_ratio, dist.ReduceOp.MAX)
    if off > (1e-4 if exact else 0.05):
        raise common.UserError(f"the first update finds other log-probabilities than the rollout, by {off:.3g} nats: this model does not compute "
                               "the same twice (dropout, or random kernels)")  # fmt: skip


def check_health(figures: dict[str, float], step: int, run, args) -> None:
    """Stop the run if KL or entropy shows that the policy has collapsed. step: the updates behind the policy that wrote the answers."""
    kl, entropy, trouble = figures["kl"] / figures["response_length"], figures["entropy"], None
    if not math.isfinite(kl) or not math.isfinite(entropy):
        trouble = "the policy has collapsed: its log-probabilities are not finite"
    elif kl > args.max_kl:
        trouble = f"KL has exploded: {kl:.3g} nats per token away from the reference (--max-kl {args.max_kl:g})"
    elif entropy < args.min_entropy:
        trouble = f"the policy has collapsed: its entropy is {entropy:.3g} nats per token (--min-entropy {args.min_entropy:g})"
    if trouble:
        raise common.UserError(f"step {step}: {trouble}; {run.last_good()}. Try a lower --lr or a higher --kl-coefficient")


def estimate(args, policy, critic, trained, optimizer, corpus) -> None:
    """--estimate: the keys and values of a rollout, then an update, both on the longest prompts with answers of full length."""
    documents = sorted(np.concatenate([part for part, _ in corpus.sources]).tolist(), key=lambda document: -corpus.lengths[document])
    prompts = prompts_of(corpus, documents[: args.batch_size])
    mask, config = torch.ones(len(prompts), args.response_length, dtype=torch.bool, device=corpus.device), policy.model.config.get_text_config()
    with common.with_data():
        batch = collate(prompts, [[0] * args.response_length] * len(prompts), corpus.pad_id, corpus.device)
    positions = args.rollout_batch_size * (len(prompts[0]) + args.response_length)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    for _, batches, _, _ in args.estimate.steps(trained, [optimizer], [batch] * min(2, args.grad_accum)):
        torch.empty(2, config.num_hidden_layers, positions, width, dtype=policy.dtype, device=corpus.device)
        experience = Experience(mask, *torch.zeros(4, *mask.shape, device=corpus.device))
        update(args, policy, critic, trained, optimizer, experience, [MicroBatch(slice(None), batch, mask.numel()) for batch in batches])


# ------------------------------------------------------------------------------------------------------------ Rollouts


class Answer(NamedTuple):
    """A prompt's number in its step, and what the policy wrote: tokens with the stop token, if it came; log p and entropy at each."""

    number: int
    tokens: list[int]
    logps: list[float]
    entropies: list[float]


@torch.no_grad()
def collect(args, roles: dict, tokenizer, scorer, own: dict, corpus, rows: list[list[int]], stream: list[int]) -> Rollout:
    """Answer, score, and compute what the updates need. own: numbers that the run keeps, see `unfinished_score`. stream: seed of this
    rollout's random numbers, [0, step] in training, [1] in evaluation."""
    started, policy, reference = time.perf_counter(), roles["policy"], roles["reference"]
    documents, stop = [document for (document,) in rows], common.stop_ids(policy.model, tokenizer)  # not packed: a row is one prompt
    prompts = prompts_of(corpus, documents)
    answers = write_answers(args, policy, prompts, stop, corpus, stream)
    mine, micro_batches = deal(args.batch_size, prompts, answers, corpus)
    mask = torch.arange(max(len(a.tokens) for a in answers)) < torch.tensor([len(a.tokens) for a in mine])[:, None]
    mask = mask.to(corpus.device)  # (n, T)

    conversations = [json.loads(str(corpus.table[documents[a.number]]["conversation"])) for a in mine]
    references = [c.pop()["content"] if c[-1]["role"] == "assistant" else None for c in conversations]
    texts = [tokenizer.decode(a.tokens, skip_special_tokens=True) for a in mine]
    scores, ended = scores_or_error(scorer, conversations, texts, references), [a.tokens[-1] in stop for a in mine]
    if (unfinished := unfinished_score(args.unfinished_score, own, scores, ended)) is not None:  # [2]
        scores = [score if end else unfinished for score, end in zip(scores, ended)]
    table = [(a.number, score, conversation[-1]["content"], text) for a, score, conversation, text in zip(mine, scores, conversations, texts)]

    logps = over_micro_batches(partial(policy.logps, temperature=args.temperature), micro_batches, mask)  # [3]
    reference_logps = over_micro_batches(partial(reference.logps, temperature=args.temperature), micro_batches, mask)
    k1, k3 = kl_estimates(logps, reference_logps)
    sampled = as_rows(torch.tensor([logp for a in mine for logp in a.logps], device=mask.device), mask)
    per_answer = {"score": sum(scores), "kl": k1.sum().item(), "kl_k3": k3.sum().item(), "response_length": mask.sum().item(),
                  "eos_rate": sum(ended)}  # fmt: skip
    per_token = {"entropy": sum(sum(a.entropies) for a in mine), "sampling_error": (sampled - logps).abs().sum().item()}
    response_tokens = sum(part.tokens for part in micro_batches)
    figures = {name: common.over_ranks(value) / len(answers) for name, value in per_answer.items()}  # [10]
    figures |= {name: common.over_ranks(value) / response_tokens for name, value in per_token.items()}
    figures["rollout_tokens_per_second"] = response_tokens / (time.perf_counter() - started)
    scores, tokens = torch.tensor(scores, device=mask.device), response_tokens + sum(map(len, prompts))
    return Rollout(mask, logps, reference_logps, scores, micro_batches, len(answers), tokens, figures, table)


def prompts_of(corpus, documents: list[int]) -> list[list[int]]:
    return [corpus.table[document]["input_ids"][: corpus.lengths[document]].tolist() for document in documents]


def write_answers(args, policy, prompts: list[list[int]], stop: list[int], corpus, stream: list[int]) -> list[Answer]:
    """One answer to each prompt, in their order, on every rank; the ranks take turns in writing the batches."""
    answers = []
    precise = torch.float32 if corpus.device.type == "mps" else torch.float64  # MPS has no float64
    for batch in batches_of_similar_length(list(map(len, prompts)), args.rollout_batch_size)[common.rank() :: common.world_size()]:
        uniforms = np.stack([np.random.default_rng([args.seed, *stream, i]).random(args.response_length) for i in batch])
        uniforms = torch.from_numpy(uniforms).to(precise).to(corpus.device)
        written = sample(policy, [prompts[i] for i in batch], uniforms, stop, args.temperature, corpus.pad_id)
        answers += [Answer(i, *one) for i, one in zip(batch, written)]
    return sorted(gathered(answers))


def sample(policy, prompts: list[list[int]], uniforms: torch.Tensor, stop: list[int], temperature: float, pad_id: int) -> list[tuple]:
    """[1] [2] Answers to a batch of prompts, a token at a time, with the KV cache -> (tokens, logps, entropies) of each.

    uniforms (B, R), in [0, 1): token t of row b is where uniforms[b, t] falls among the cumulated probabilities, so a row does not
    depend on the rows beside it. Their dtype is that of the cumulation: float32 would lose the tail of a large vocabulary.
    """
    ids, mask = padded(prompts, pad_id, uniforms.device, left=True)  # (B, P)
    ends, cache, running, columns = torch.tensor(stop, device=ids.device), None, torch.ones(len(ids), dtype=torch.bool, device=ids.device), []
    model = policy.activate()
    with policy.autocast(cache_enabled=True), common.evaluating(model):
        head = common.output_head(model, temperature)
        for u in uniforms.T:  # (B,)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # [9] of the prompt, then of one new token after another
            out = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            cache, hidden = out.past_key_values, out.last_hidden_state[:, -1]  # (B, d)
            logps = common.head_logits(hidden.to(head[0].dtype), *head).log_softmax(-1)  # (B, V)
            probabilities = logps.exp()
            cumulated = probabilities.to(u.dtype).cumsum(-1)
            token = torch.searchsorted(cumulated, u[:, None] * cumulated[:, -1:], right=True).clamp(max=logps.shape[1] - 1)  # (B, 1)
            columns.append((token[:, 0], logps.gather(1, token)[:, 0], torch.special.entr(probabilities).sum(1)))
            mask = torch.cat([mask, running[:, None].long()], 1)
            ids = torch.where(running[:, None], token, pad_id)
            running = running & ~torch.isin(token[:, 0], ends)
            if not running.any():
                break
    tokens, logps, entropies = (torch.stack(column, 1).tolist() for column in zip(*columns))  # (B, R)
    lengths = [next((t + 1 for t, token in enumerate(row) if token in stop), len(row)) for row in tokens]
    return [(tokens[b][:n], logps[b][:n], entropies[b][:n]) for b, n in enumerate(lengths)]


def deal(size: int, prompts: list[list[int]], answers: list[Answer], corpus) -> tuple[list[Answer], list[MicroBatch]]:
    """-> (this rank's answers in a new order, micro-batches of similar length, `size` rows of that order each)"""
    mine, micro_batches, first = [], [], common.rank() * size
    for group in batches_of_similar_length([len(prompts[a.number]) + len(a.tokens) for a in answers], size * common.world_size()):
        part = [answers[i] for i in group[first : first + size]]
        batch = collate([prompts[a.number] for a in part], [a.tokens for a in part], corpus.pad_id, corpus.device) if part else None
        micro_batches.append(MicroBatch(slice(len(mine), len(mine) + len(part)), batch, sum(len(answers[i].tokens) for i in group)))
        mine += part
    return mine, micro_batches


def batches_of_similar_length(lengths: list[int], size: int) -> list[list[int]]:
    """Row indices, the shortest rows first, `size` in each batch."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i : i + size] for i in range(0, len(order), size)]


def padded(rows: list[list[int]], pad_id: int, device: torch.device, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (input_ids, attention_mask), both (B, longest)."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad_id), torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(len(row))
        ids[b, where], mask[b, where] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)


def collate(prompts: list[list[int]], answers: list[list[int]], pad_id: int, device: torch.device) -> dict:
    """Rows of prompt and answer, padded on the right, as `target_logps` takes them. N is the number of answer tokens: targets (N,) row
    by row, and target_index (N,), the position in the flattened (B * T,) before each."""
    ids, mask = padded([prompt + answer for prompt, answer in zip(prompts, answers)], pad_id, device)
    index = [b * ids.shape[1] + len(prompt) + t - 1 for b, (prompt, answer) in enumerate(zip(prompts, answers)) for t in range(len(answer))]
    targets = torch.tensor([token for answer in answers for token in answer], device=device)
    return {"input_ids": ids, "attention_mask": mask, "targets": targets, "target_index": torch.tensor(index, device=device)}


def as_rows(flat: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(N,) token by token, row after row -> (B, T), 0 outside the mask, which is True where a row begins."""
    index = mask.flatten().cumsum(0) - 1  # (B * T,): of the token there, or in padding of the last one before (masked_scatter would sync)
    return flat.index_select(0, index).view(mask.shape) * mask


@torch.no_grad()
def over_micro_batches(compute, micro_batches: list[MicroBatch], mask) -> torch.Tensor:
    """compute(batch) -> (N,), for all micro-batches of a rollout: (n, T)."""
    parts = [as_rows(compute(batch), mask[rows]) for rows, batch, _ in micro_batches if batch is not None]
    return torch.cat([torch.zeros(0, mask.shape[1], device=mask.device), *parts])


def gathered(items: list) -> list:
    """The lists of all ranks, one after another."""
    parts = [items] * common.world_size()
    if dist.is_initialized():
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


# ------------------------------------------------------------------------------------------------------------- Rewards


def load_function(spec: str):
    """FILE.py:FUNCTION -> the function. The file is run: only because the user named it."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise common.UserError(f"--reward {spec}: there is no file {path}")
    try:
        function = runpy.run_path(path).get(name)
    except Exception as error:
        raise common.UserError(f"--reward {spec}: {path} cannot be run: {type(error).__name__}: {error}")
    if not callable(function):
        raise common.UserError(f"--reward {spec}: {path} has no function {name}")
    return function


def function_scores(function, spec: str, conversations: list[list[dict]], answers: list[str], references: list[str | None]) -> list[float]:
    prompts = ["\n\n".join(message["content"] for message in conversation) for conversation in conversations]
    try:
        scores = [float(score) for score in function(prompts, answers, references)]
    except Exception as error:
        raise common.UserError(f"--reward {spec} raised {type(error).__name__}: {error}")
    if len(scores) != len(answers):
        raise common.UserError(f"--reward {spec} gave {len(scores)} numbers for {len(answers)} answers")
    bad = next((i for i, score in enumerate(scores) if not math.isfinite(score)), None)
    if bad is not None:
        raise common.UserError(f"--reward {spec} gave {scores[bad]} for the answer {answers[bad]!r}")
    return scores


def load_reward_tokenizer(args):
    """Of the folder of --reward, which must hold a reward model, full or LoRA."""
    lora = adapter_config(args.reward)
    config = lora or common.from_hub(transformers.AutoConfig, args, args.reward, "--reward")
    if not (lora.get("task_type") == "SEQ_CLS" if lora else "SequenceClassification" in str(config.architectures)):
        raise common.UserError(f"--reward {args.reward}: no reward model: neither a sequence classifier nor a SEQ_CLS LoRA")
    return common.from_hub(transformers.AutoTokenizer, args, args.reward, "--reward")


@torch.no_grad()
def model_scores(reward, tokenizer, args, conversations: list[list[dict]], answers: list[str], references=None) -> list[float]:
    """The reward model's score at the last token of each conversation, written with its own tokenizer and chat template."""
    joined = args.template == "none" or not tokenizer.chat_template
    turns = [{"role": "assistant", "content": answer} for answer in answers]
    documents = [common.encode_answers(tokenizer, conversation, [turn], joined)[0][0] for conversation, turn in zip(conversations, turns)]
    scores = [0.0] * len(documents)
    for rows in batches_of_similar_length(list(map(len, documents)), args.rollout_batch_size):
        ids, mask = padded([documents[i] for i in rows], 0, reward.head.weight.device)
        last = torch.arange(len(rows), device=ids.device) * ids.shape[1] + mask.sum(1) - 1
        for i, score in zip(rows, reward.values({"input_ids": ids, "attention_mask": mask, "target_index": last}).tolist()):
            scores[i] = score
    return scores


def scores_or_error(scorer, conversations: list[list[dict]], answers: list[str], references: list[str | None]) -> list[float]:
    """What the scorer says. Its error, perhaps on one rank alone, stops all."""
    scores, trouble = [], None
    try:
        scores = scorer(conversations, answers, references) if answers else []
    except common.UserError as error:
        trouble = str(error)
    if any(troubles := gathered([trouble])):
        raise common.UserError(next(filter(None, troubles)))
    return scores


def unfinished_score(setting: str | float, own: dict, scores: list[float], ended: list[bool]) -> float | None:
    """[2] What an answer that was cut off scores, by --unfinished-score; None: what the reward says. auto: the lowest score of those
    that ended, but at most -1, the first time that any did; `own` keeps it for the rest of the run. Until then -1."""
    if setting != "auto":
        return None if setting == "none" else setting
    if "unfinished_score" not in own:
        lowest = common.over_ranks(min((score for score, end in zip(scores, ended) if end), default=math.inf), dist.ReduceOp.MIN)
        if lowest == math.inf:
            return -1.0
        own["unfinished_score"] = min(lowest, -1.0)
        common.say(f"--unfinished-score auto: an answer that is cut off scores {own['unfinished_score']:.4g} in this run")
    return own["unfinished_score"]


# ----------------------------------------------------------------------------------------------------- The four models


@dataclass
class Role:
    """What plays the policy, the reference, the critic or the reward model: a model, the adapter that is switched on for it, and a head
    (1, d) for the two that give a number at a position. dtype: of the computation. offset: what is subtracted from the number."""

    model: nn.Module
    dtype: torch.dtype
    adapter: str | None = None
    head: nn.Linear | None = None
    offset: float = 0.0

    def activate(self) -> nn.Module:
        """Its adapter on, all others off, until the next role's turn. A backward pass must come before that turn: blocks that are
        recomputed there need the same adapter."""
        for layer in adapted_layers(self.model).values():
            layer.on = self.adapter
        return self.model

    def autocast(self, cache_enabled: bool = False):
        """For float32 weights that compute in dtype. The cache would keep a copy of every weight in dtype until the end of the pass:
        only sampling, which reads them again for every token, takes it."""
        weight = self.model.get_input_embeddings().weight
        return torch.autocast(weight.device.type, self.dtype, enabled=weight.dtype != self.dtype, cache_enabled=cache_enabled)

    def logps(self, batch: dict, temperature: float) -> torch.Tensor:
        """log p of the answers' tokens, (N,) as they lie in the batch: see `collate`."""
        model = self.activate()
        with self.autocast():
            return model.target_logps(**batch, temperature=temperature)

    def values(self, batch: dict) -> torch.Tensor:
        """The head's number at each position of the flattened (B * T,) that target_index names: (N,) float32."""
        model = self.activate()
        with self.autocast():
            hidden = model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, batch["target_index"])  # (B, T, d) -> (N, d)
        return F.linear(hidden.float(), self.head.weight.float()).squeeze(1) - self.offset

    def own_parameters(self) -> list[nn.Parameter]:
        """Its adapter, or without one the whole model; and its head."""
        own = adapter_tensors(self.model, self.adapter).values() if self.adapter else self.model.parameters()
        return list(dict.fromkeys([*own, self.head.weight] if self.head else own))


def load_roles_and_scorer(args, tokenizer, dtype: torch.dtype, device: torch.device):
    """-> (the roles by name, scorer(conversations, answers, references) -> scores)"""
    if ".py:" in args.reward:
        scorer = partial(function_scores, load_function(args.reward), args.reward)
        return load_roles(args, None, True, dtype, device), scorer
    reward_tokenizer = load_reward_tokenizer(args)
    same_tokens = tokenizer.get_vocab().items() <= reward_tokenizer.get_vocab().items()
    roles = load_roles(args, args.reward, same_tokens, dtype, device)
    return roles, partial(model_scores, roles["reward"], reward_tokenizer, args)


def load_roles(args, reward: str | None, same_tokens: bool, dtype: torch.dtype, device: torch.device) -> dict[str, Role]:
    """policy, reference and critic; and the reward model, if it is a folder. same_tokens: the reward model's tokenizer gives every
    policy token the same id."""
    if args.rank or args.adapter:
        roles = load_shared(args, reward, dtype, device)
    else:
        roles = load_separate(args, reward if same_tokens else None, dtype, device)
    if reward and "reward" not in roles:
        roles["reward"] = load_classifier(args, reward, "--reward", dtype, device, dtype)
    for role in roles.values():
        common.disable_dropout(role.model)  # [7]
        role.model.requires_grad_(False)
    for name in ("policy", "critic"):
        for p in roles[name].own_parameters():
            p.requires_grad_()
    parameters = {p for role in roles.values() for p in [*role.model.parameters(), *role.own_parameters()]}
    total, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    common.say(f"in memory for {', '.join(roles)}: {len({role.model for role in roles.values()})} model(s), {total:,} parameters, "
               f"{sum(p.nbytes for p in parameters) / 2**30:.3f} GiB; {trained:,} of them train")  # fmt: skip
    return roles


def load_separate(args, reward: str | None, dtype: torch.dtype, device: torch.device) -> dict[str, Role]:
    """A model each. The two that train have float32 weights, and so has the reference: computed from bfloat16 ones, its log-probabilities
    would differ from the policy's by more than the KL of the first rollouts."""
    policy, reference = (Role(common.load_model(args, dtype, device, weight_dtype=torch.float32), dtype) for _ in range(2))
    source = (reward, "--reward") if reward else (args.model, "--model")  # [8]
    critic = load_classifier(args, *source, dtype, device, weight_dtype=torch.float32)
    if not reward:
        nn.init.zeros_(critic.head.weight)  # a new head: nothing is expected yet
    return {"policy": policy, "reference": reference, "critic": critic}


def load_shared(args, reward: str | None, dtype: torch.dtype, device: torch.device) -> dict[str, Role]:
    """Adapters on one base; the reward model's, too, if it is a LoRA on that."""
    model = common.load_model(args, dtype, device)
    if args.adapter:  # the policy starts there, and so the reference stays there
        config, _ = load_adapter(model, "policy", args.adapter, "--adapter")
        load_adapter(model, "reference", args.adapter, "--adapter")
        args.rank, args.alpha, args.rslora = config["r"], config["lora_alpha"], config.get("use_rslora", False)
    else:
        add_adapter(model, "policy", list(common.linear_layers(model, args.targets)), args.rank, args.alpha, args.rslora)
    new_head = partial(nn.Linear, model.config.get_text_config().hidden_size, 1, bias=False, dtype=torch.float32, device=device)
    critic = Role(model, dtype, "critic", new_head())
    roles = {"policy": Role(model, dtype, "policy"), "reference": Role(model, dtype, "reference" if args.adapter else None), "critic": critic}
    config = adapter_config(reward) if reward else {}
    same_base = config.get("base_fingerprint") == model.base_fingerprint
    if args.estimate and (base := config.get("base_model_name_or_path")):  # there are no weights to know it by
        same_base = Path(base).resolve() == Path(args.model).resolve()
    if same_base:
        _, weight = load_adapter(model, "critic", reward, "--reward")  # [8]
        load_adapter(model, "reward", reward, "--reward")
        roles["reward"] = Role(model, dtype, "reward", new_head().requires_grad_(False))
        for role in (critic, roles["reward"]):
            role.head.weight.data.copy_(weight)
            role.offset = config.get("reward_offset", 0.0)
    else:
        common.say("the critic starts as a new adapter with a head of zeros: no reward model is a LoRA on this base")
        add_adapter(model, "critic", list(adapted_layers(model)), args.rank, args.alpha, args.rslora)
        nn.init.zeros_(critic.head.weight)
    return roles


def load_classifier(args, name: str, flag: str, dtype: torch.dtype, device: torch.device, weight_dtype: torch.dtype) -> Role:
    """A sequence classifier with one label: what reward_model.py wrote, a LoRA merged into its own base, or a model that gets a head."""
    config = adapter_config(name)
    model = common.load_model(args, dtype, device, weight_dtype, "score", config.get("base_model_name_or_path", name), flag)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise common.UserError(f"{type(model).__name__} has no linear layer `score`, which is the head here")
    offset = getattr(model.config, "reward_offset", 0.0)
    if config:
        _, head = load_adapter(model, "reward", name, flag)
        for path, layer in adapted_layers(model).items():
            lora, weight = layer.adapters["reward"], layer.base.weight.data
            weight.copy_(weight.float() + lora.scaling * lora.lora_B.data @ lora.lora_A.data)  # rounded once
            model.set_submodule(path, layer.base)
        model.score.weight.data.copy_(head)
        offset = config.get("reward_offset", 0.0)
    return Role(model, dtype, head=model.score, offset=offset)


# ---------------------------------------------------------------------------------------- Several adapters on one base


class LoRA(nn.Module):
    """One adapter's A and B of one layer (lora.py explains them)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, rslora: bool):
        super().__init__()
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))


class AdaptedLinear(nn.Module):
    """A frozen nn.Linear that several adapters share; one of them is on, or none. x (..., in) -> (..., out)."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.adapters, self.on = base, nn.ModuleDict(), None

    def forward(self, x):
        flat = x.flatten(0, -2)  # (N, in)
        y = self.base(flat)  # W0 x: (N, out)
        if self.on in self.adapters:
            lora = self.adapters[self.on]
            down = F.linear(flat, lora.lora_A.to(x.dtype))  # A x: (N, r)
            y.addmm_(down, lora.lora_B.to(x.dtype).T, alpha=lora.scaling)  # + s B (A x), in place: base's backward pass needs no y
        return y.view(*x.shape[:-1], -1)


def adapted_layers(model) -> dict[str, AdaptedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, AdaptedLinear)}


def add_adapter(model, adapter: str, layers: list[str], rank: int, alpha: float, rslora: bool) -> None:
    for name in layers:
        layer = model.get_submodule(name)
        if not isinstance(layer, AdaptedLinear):
            layer = AdaptedLinear(layer)
            model.set_submodule(name, layer)
        layer.adapters[adapter] = LoRA(layer.base, rank, alpha, rslora)


def adapter_tensors(model, adapter: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters, under the names that PEFT gives them."""
    tensors = {}
    for name, layer in adapted_layers(model).items():
        if adapter in layer.adapters:
            tensors[f"base_model.model.{name}.lora_A.weight"] = layer.adapters[adapter].lora_A  # (r, in)
            tensors[f"base_model.model.{name}.lora_B.weight"] = layer.adapters[adapter].lora_B  # (out, r)
    return tensors


def load_adapter(model, adapter: str, folder: str, flag: str) -> tuple[dict, torch.Tensor | None]:
    """Put a LoRA folder, ours or PEFT's, on the model -> (its config, its score head (1, d) if it is a reward model). flag: what named it."""
    config, tensors = common.load_adapter(folder, model, "LORA", flag)
    head = tensors.pop("base_model.model.score.weight", None)
    layers = [key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key]
    add_adapter(model, adapter, layers, config["r"], config["lora_alpha"], config.get("use_rslora", False))
    common.fill_adapter(adapter_tensors(model, adapter), tensors, folder, flag)
    return config, head


def adapter_config(folder: str) -> dict:
    """adapter_config.json of a LoRA folder; {} of anything else."""
    path = Path(folder) / "adapter_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def save_policy(args, model, tokenizer) -> None:
    """The policy's adapter in PEFT's form."""
    config = {
        "peft_type": "LORA", "r": args.rank, "lora_alpha": args.alpha, "use_rslora": args.rslora, "lora_dropout": 0.0,
        "target_modules": common.short_names(model, list(adapted_layers(model))), "bias": "none",
        "use_dora": False, "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None,
    }  # fmt: skip
    common.save_adapter(args, model, tokenizer, config, adapter_tensors(model, "policy"))


# ----------------------------------------------------------------------------------------------------------- The flags


def score_or_word(text: str) -> str | float:
    return text if text in ("auto", "none") else common.number(float, -1e9)(text)


def main(argv=None) -> None:
    without = ("--packing", "--patience", "--weight-decay", "--max-length", "--exact-match", "--max-steps", "--grad-accum")
    prompts = [common.example("preferences.jsonl")]
    demo = {  # kinder reviews
        "data": [common.example("pairs.jsonl")], "lr": 1e-4, "critic_lr": 1e-3, "kl_coefficient": 0.02, "response_length": 48, "batch_size": 16,
        "grad_accum": 1, "minibatches": 2, "max_steps": 15, "exact_match": 0,
    }  # fmt: skip
    parser = common.make_parser(__doc__, without, demo, output="runs/ppo", data=prompts, lr=None, packing=False, patience=0, exact_match=0,
                                schedule="linear", warmup_ratio=0.0, log_every=1, eval_every=10, save_every=10, samples=4)  # fmt: skip
    parser.set_defaults(rslora=False)
    number, add = common.number, parser.add_argument_group("PPO").add_argument
    add("--reward", metavar="FOLDER|FILE.py:FUNCTION", default=common.example("rewards.py") + ":kindness",
        help="what reward_model.py wrote, or a function of prompts, answers and references (its file is run)")  # fmt: skip
    add("--max-length", type=number(int, 2), default=512, help="tokens of a prompt and its answer; prompts that leave no room are dropped")
    add("--response-length", type=number(int, 1), default=64, help="the most tokens of an answer")
    add("--temperature", type=number(float, 1e-3), default=1.0, help="temperature of sampling, and so of the log-probabilities everywhere")
    add("--unfinished-score", type=score_or_word, default="auto", metavar="SCORE",
        help="of an answer that --response-length cut off; auto: the lowest score of those that ended in the run's first rollout (or in the "
        "evaluation before it), at most -1; none: what the reward says of the text as if it had ended there")  # fmt: skip
    add("--max-steps", type=number(int, 0), help="rollouts, each with --ppo-epochs * --minibatches updates, whatever --epochs says; "
        "0 only evaluates and saves")  # fmt: skip
    add("--grad-accum", type=number(int, 1), default=4, help="micro-batches of --batch-size answers in one update")
    add("--rollout-batch-size", type=number(int, 1), default=32, help="answers sampled at once on one device")
    add("--minibatches", type=number(int, 1), default=4, help="a rollout is this many times --batch-size * --grad-accum prompts (in each process)")
    add("--ppo-epochs", type=number(int, 1), default=4, help="passes over each rollout")
    add("--kl-coefficient", type=number(float, 0), default=0.05, help="beta: the price of a nat of KL, where it starts")
    add("--kl-target", type=number(float, 1e-6), help="adapt beta to keep KL here, in nats per answer (Ziegler's is 6); default: beta is fixed")
    add("--kl-horizon", type=number(int, 1), default=10_000, help="answers in which the adapted beta moves by 20 %% at most")
    add("--gamma", type=number(float, 0), default=1.0, help="discount of the tokens to come")
    add("--lam", type=number(float, 0), default=0.95, help="lambda of the generalised advantage estimation")
    add("--clip", type=number(float, 0), default=0.2, help="eps: of the policy's ratio around 1, of the critic's values around the old ones")
    add("--value-coefficient", type=number(float, 0), default=0.1, help="weight of the critic's loss; the critic has an optimizer of its own, "
        "so this only matters for --max-grad-norm and Adam's eps: raise --critic-lr to make it learn faster")  # fmt: skip
    add("--critic-lr", type=number(float, 0), help="peak learning rate of the critic; default: --lr")
    add("--max-kl", type=number(float, 0), default=5.0, help="stop when the policy is this far from the reference, in nats per token")
    add("--min-entropy", type=number(float, 0), default=1e-3, help="stop when the policy's entropy falls below this, in nats per token")
    add("--lora-rank", dest="rank", type=number(int, 0), default=0, metavar="R", help="adapters of this rank, one base for all; 0: a model each")
    add("--lora-alpha", dest="alpha", type=number(float, 0), default=32, help="an update is scaled by alpha / rank")
    add("--targets", default="all-linear", help="layers that LoRA adapts: all-linear (all but the output head), or names such as q_proj,v_proj")
    add("--adapter", metavar="FOLDER", help="LoRA that the policy starts from, and that the reference is; its rank, alpha and targets are used")
    parser.adapter_brings = ("--lora-rank", "--lora-alpha", "--targets")
    args = parser.parse_args(argv)
    args.lr = args.lr if args.lr is not None else 3e-5 if args.rank or args.adapter else 3e-6
    args.critic_lr = args.lr if args.critic_lr is None else args.critic_lr
    train(args)


if __name__ == "__main__":
    common.launch(main, out_of_memory="--lora-rank 16; --gradient-checkpointing; a smaller --batch-size with more --grad-accum; a smaller "
                  "--rollout-batch-size; a shorter --response-length")  # fmt: skip

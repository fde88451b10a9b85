"""Proximal policy optimisation (PPO), the third stage of RLHF: sample answers, score them, and
raise the probability of every token that led to more reward than a critic expected.

Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (arXiv 1707.06347); for language
models Ouyang et al. 2022 (arXiv 2203.02155), section 3.5. For an answer y_1 .. y_T to a prompt:

    reward     r_t = -beta (log p(y_t) - log p_ref(y_t)) + [t = T] score
    advantage  A_t = delta_t + gamma lambda A_t+1        delta_t = r_t + gamma V_t+1 - V_t
    return     R_t = A_t + V_t                           V_T+1 = A_T+1 = 0
    policy     L   = - mean_t min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t)
    critic     L   = 1/2 mean_t max((v_t - R_t)^2, (clip(v_t, V_t - eps, V_t + eps) - R_t)^2)

    p      logps            (N,)  the policy that wrote the answers; ratio = p_now(y_t) / p(y_t)
    p_ref  reference_logps  (N,)  the policy before training, frozen
    V      values           (N,)  the critic's, at the position that predicts y_t; v: the new ones
    score  scores           (b,)  one for each answer, from a reward model or a function
    beta, eps, gamma, lambda      --kl-coefficient, --clip, --gamma, --lam

A rollout has --rollout-size answers, a minibatch --batch-size, a forward pass b with N tokens in
all. Rewards and advantages are computed as (b, T) tensors, with 0 after the end of an answer.

Four models in the memory of one: policy, reference, critic and reward model are LoRA adapters on
one frozen base. The reference is the base alone, or a frozen copy of --adapter. The critic and
the reward model have a linear head that maps a hidden state to a number.

Details that matter (Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", arXiv
2403.17031). Comments in the code refer to these numbers.
 [1]  Answers are sampled from the whole distribution at --temperature: no top-k, no top-p.
 [2]  An answer ends with its first end-of-turn token, which is part of it. If --response-length
      cuts it off, --missing-eos-penalty is subtracted from its score.
 [3]  Old log-probabilities come from the forward pass of training, not from sampling, at the
      same temperature and in the same passes as the new ones. So the first ratio is 1 (checked).
 [4]  The KL penalty is per token, k1 = log p - log p_ref. The score is added at the last token.
 [5]  gamma 1, lambda 0.95. Returns are computed first, then advantages are whitened, over all
      answer tokens of the rollout.
 [6]  Both losses are clipped at 0.2. The critic's is multiplied by 0.1. As it has gradient clipping
      of its own, and Adam, that hardly matters: --critic-lr sets how fast the critic learns.
 [7]  4 epochs over a rollout. Adam (its eps: 1e-5), a learning rate that falls to 0, no dropout.
 [8]  The critic starts from the reward model if that is an adapter on the same base, else from
      the policy, with a head of zeros.
 [9]  Prompts are padded on the left while sampling. Positions count from the first real token.
 [10] Losses and metrics leave padding out.

Choices and departures from the papers
  - A rollout is split once into minibatches, and every epoch shuffles their order. The papers
    shuffle answers. But in bfloat16, a token's log-probability changes by up to 0.3 nats with the
    rest of the forward pass, more than the clip range.
  - beta is fixed. The learning rate falls along a cosine.
  - Policy and critic share no trained parameter. Full-parameter PPO is left out: it needs three
    more copies of the model.
  - Sampling uses transformers' generate with a static cache. Meanwhile the policy's adapter is
    merged into the base. A copy of the adapted weights restores them bit for bit afterwards. With 8
    layers of width 576, 16 answers of 256 tokens and one core: 147 tokens/s. Unmerged with a
    growing cache: 129. Merged with a growing cache: 121 (2026-11-26).

Questions people ask
  Sum or mean?      Losses are means over the answer tokens of a minibatch. kl is a sum over an
                    answer's tokens, then a mean over answers.
  Why k1, not k3?   As a reward, k1's mean has the KL's gradient. k3 (see grpo.py) is only logged.
  Which --missing-eos-penalty?   More than a cut-off answer can gain. After 20 rollouts with
                    --response-length 24, shorter than the bundled model's answers: with penalty
                    0, 5 % of answers end by themselves, and the score is 1.00 with texts cut in
                    mid-word. 0.1: 6 %. 1: 35 %, score from -0.99 to 0.32 (2026-11-26).
  Score falls?      Try a lower --lr, a higher --critic-lr or a larger --rollout-size.
  Score rises, answers get worse?   The policy exploits the reward. Raise --kl-coefficient.
  The data's answers?   Reward functions get them as references, or None. p_ref is unrelated.

What to watch, in metrics.jsonl. A step is one rollout and its updates. eval_: held-out prompts.
  score                    mean over answers, with the penalty; score_ended: of those that ended
  ended, length            share of answers that ended by themselves; mean tokens per answer
  kl, kl_k3                two estimates of the KL from the reference, in nats per answer. If kl is
                           always negative, sampling and training disagree
  entropy                  nats per token, the mean of -log p. Near 0, the policy explores nothing
  clip_fraction            share of tokens whose ratio left 1 - eps .. 1 + eps
  explained_variance       1 - Var(R - V) / Var(R): 1 is perfect, 0 no better than a constant
  loss, policy_loss, value_loss    means over the updates; grad_norm, critic_grad_norm: the last
  rollout_tokens_per_second        answer tokens, generated and scored
  eval_loss                - (score - beta kl), which --patience watches

Measured: `python ppo.py` raises the mean held-out score from 0.04, 0.01 and 0.04 to 0.88, 0.87
and 0.93 (--seed 0, 1, 2; one CPU core, torch 2.13, 2026-11-26).

    python ppo.py                                             # the bundled model gets kinder
    python ppo.py --model runs/sft --data prompts.jsonl --reward runs/reward_model
    python ppo.py --model runs/sft --data gsm8k.jsonl --reward examples/rewards.py:exact_match
"""

import argparse
import copy
import math
import runpy
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import common

VALUE_COEFFICIENT = 0.1  # [6]


def token_rewards(logps, reference_logps, scores, mask, beta: float):
    """[4] The KL penalty at every token, the score at the last one. scores (b,), others (b, T)."""
    last = mask & ~F.pad(mask[:, 1:], (0, 1))  # the next token is padding
    return -beta * (logps - reference_logps) + last * scores[:, None]


def gae(rewards, values, gamma: float, lam: float):
    """[5] Generalised advantage estimation (arXiv 1506.02438). -> advantages, returns (b, T)"""
    advantages = torch.zeros_like(values)
    advantage = next_value = torch.zeros_like(values[:, 0])  # (b,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
    return advantages, advantages + values


def policy_loss(logps, old_logps, advantages, count: int, clip: float):
    """[6] Equation 7 of the paper, negated. -> loss, clip fraction: sums over tokens / count,
    the tokens of the whole minibatch."""
    ratio = (logps - old_logps).exp()
    losses = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return losses.sum() / count, ((ratio - 1).abs() > clip).sum() / count


def value_loss(values, old_values, returns, count: int, clip: float):
    """[6] Half the larger squared error: of the value, or of the value clipped to the old one."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2).sum() / count


def moments(x):
    """Mean and biased variance over all GPUs. x (N,): this GPU's part."""
    x = x.double()
    count = common.sum_over_ranks(torch.tensor(len(x), device=x.device))
    mean = common.sum_over_ranks(x.sum()) / count
    return mean, common.sum_over_ranks(((x - mean) ** 2).sum()) / count


def whiten(advantages: list) -> list:
    """[5] Mean 0, variance 1 over all GPUs. One (N,) per pass. A single value becomes 0."""
    mean, variance = moments(torch.cat(advantages))
    return [((x - mean) / (variance + 1e-8).sqrt()).to(x.dtype) for x in advantages]


def train(args) -> None:
    device, dtype = common.setup(args)
    tokenizer = common.load_tokenizer(args)
    train_set, eval_set = common.load_data(args, tokenizer, "prompts")
    if args.inspect:
        return common.inspect_examples(train_set, tokenizer)
    model = common.load_model(args, dtype, device)
    common.disable_dropout(model)  # [7]
    config = add_policy(model, args, device)  # and the reference
    if args.chat:
        set_role(model, "policy")
        return common.chat(model, tokenizer, args, device)
    reward = add_reward_and_critic(args, model, tokenizer, dtype, device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    critic = [p for name, p in trained.items() if "critic" in name]
    policy = [p for name, p in trained.items() if "critic" not in name]
    optimizer = torch.optim.Adam([{"params": policy}, {"params": critic}], eps=1e-5, fused=True)

    rollout_args = argparse.Namespace(**vars(args) | {"batch_size": args.rollout_size})
    steps = common.plan_steps(train_set, rollout_args)  # the prompts of every rollout
    updates = args.ppo_epochs * args.rollout_size // args.batch_size
    common.say(f"{len(steps)} rollouts of {args.rollout_size} answers, {updates} updates each")
    run = common.start_run(args, model, optimizer, train_set, steps)
    log = common.Log(args, run, len(steps), device)

    def held_out_loss(model, eval_set, args, device) -> float:
        """eval_loss of answers to held-out prompts, by the same random numbers every time."""
        answers = write_answers(model, reward, tokenizer, eval_set[:], args, device, step=0)
        passes = forward_passes(answers, args, device)
        for part in passes:
            old_logps(model, part, args)
        figures = rollout_figures(answers, passes)
        print_answers(answers[: args.samples], tokenizer)
        log.evaluation(**figures)
        return args.kl_coefficient * figures["kl"] - figures["score"]

    if run["step"] == 0 and eval_set:
        log.evaluation(loss=held_out_loss(model, eval_set, args, device))

    for step in range(run["step"] + 1, len(steps) + 1):
        lr = common.learning_rate(step, len(steps), args)
        for group, peak in zip(optimizer.param_groups, (args.lr, args.critic_lr)):
            group["lr"] = lr / args.lr * peak

        # The rollout: answers and their scores, split once into minibatches
        start = time.perf_counter()
        prompts = train_set[steps[step - 1]]
        answers = write_answers(model, reward, tokenizer, prompts, args, device, step)
        speed = sum(len(answer.ids) for answer in answers) / (time.perf_counter() - start)
        generator = np.random.default_rng([args.seed, step])
        order, minibatches = generator.permutation(len(answers)), []
        for first in range(0, len(answers), args.batch_size):
            chosen = [answers[i] for i in order[first : first + args.batch_size]]
            count = sum(len(answer.ids) for answer in chosen)  # tokens, on all GPUs
            minibatches.append((forward_passes(chosen, args, device), count))

        # Old log-probabilities and values, advantages, returns
        passes = [part for parts, _ in minibatches for part in parts]
        for part in passes:
            old_logps(model, part, args)
            with torch.no_grad():
                part.values = critic_values(model, part.batch)
            logps, reference, values = (
                as_rows(x, part.mask) for x in (part.logps, part.reference_logps, part.values)
            )
            rewards = token_rewards(logps, reference, part.scores, part.mask, args.kl_coefficient)
            advantages, returns = gae(rewards, values, args.gamma, args.lam)  # (b, T)
            part.advantages, part.returns = advantages[part.mask], returns[part.mask]  # (N,)
        for part, x in zip(passes, whiten([part.advantages for part in passes])):
            part.advantages = x
        figures = rollout_figures(answers, passes) | {"rollout_tokens_per_second": speed}
        figures["explained_variance"] = explained_variance(passes)

        # The updates: one per minibatch, in another order in every epoch
        sums, done = torch.zeros(3, device=device), 0
        for _ in range(args.ppo_epochs):
            for n in generator.permutation(len(minibatches)):
                parts, count = minibatches[n]
                for part in parts:  # this GPU's forward passes
                    logps = policy_logps(model, "policy", part.batch, args)
                    if done == 0:
                        check_ratio(logps - part.logps, dtype)
                    loss, clipped = policy_loss(
                        logps, part.logps, part.advantages, count, args.clip
                    )
                    loss.backward()  # before the role is switched
                    values = critic_values(model, part.batch)
                    critic_loss = value_loss(values, part.values, part.returns, count, args.clip)
                    (VALUE_COEFFICIENT * critic_loss).backward()
                    sums += torch.stack([loss, critic_loss, clipped]).detach()
                common.sum_gradients(model)  # over GPUs
                norms = [
                    nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm or math.inf)
                    for group in optimizer.param_groups
                ]
                optimizer.step()
                optimizer.zero_grad()
                done += 1

        figures["critic_grad_norm"] = norms[1].item()
        figures = {
            name: torch.tensor(x / common.RANKS, device=device) for name, x in figures.items()
        }
        names = ("policy_loss", "value_loss", "clip_fraction")
        figures |= dict(zip(names, sums / done))  # this GPU's part, as everything in figures
        loss = figures["policy_loss"] + VALUE_COEFFICIENT * figures["value_loss"]
        written = {"input_ids": [answer.prompt + answer.ids for answer in answers]}
        log.step_done(written, loss, lr, norms[0], **figures)
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
    del model.critic_head
    keep_policy(model)
    common.save_adapter(args, model, tokenizer, config)
    log.done()


def explained_variance(passes) -> float:
    """1 - Var(R - V) / Var(R)"""
    values, returns = (
        torch.cat([getattr(x, name) for x in passes]) for name in ("values", "returns")
    )
    return 1 - (moments(returns - values)[1] / moments(returns)[1].clamp(min=1e-12)).item()


@dataclass
class Pass:
    """The part of a rollout in one forward pass: b answers with N tokens in all."""

    batch: dict  # what target_logps takes
    mask: torch.Tensor  # (b, T) True on answer tokens
    scores: torch.Tensor  # (b,)
    # of the models that wrote the answers, before the updates, (N,) each:
    logps: torch.Tensor | None = None
    reference_logps: torch.Tensor | None = None
    values: torch.Tensor | None = None
    advantages: torch.Tensor | None = None  # whitened
    returns: torch.Tensor | None = None


def forward_passes(answers: list, args, device) -> list[Pass]:
    """This GPU's forward passes. Each answer is a stretch that reads its prompt."""
    examples = {
        "input_ids": [answer.prompt + answer.ids for answer in answers],
        "is_target": [np.arange(len(x.prompt + x.ids)) >= len(x.prompt) for x in answers],
        "stretches": [[len(answer.prompt), len(answer.ids)] for answer in answers],
        "score": [answer.score for answer in answers],
    }
    passes = []
    for batch in common.micro_batches(examples, args, device):
        rows = batch.pop("examples")
        lengths = torch.tensor([row["stretches"][1] for row in rows], dtype=torch.long)
        mask = torch.arange(max(lengths, default=1)) < lengths[:, None]
        scores = torch.tensor([row["score"] for row in rows], dtype=torch.float32)
        passes.append(Pass(batch, mask.to(device), scores.to(device)))
    return passes


def as_rows(x, mask):
    """(N,) -> (b, T), 0 outside the mask"""
    rows = torch.zeros(mask.shape, dtype=x.dtype, device=x.device)
    rows[mask] = x
    return rows


def policy_logps(model, role: str, batch: dict, args):
    """log p of the answers' tokens (N,), in nats."""
    set_role(model, role)
    return model.target_logps(**batch, temperature=args.temperature)


def critic_values(model, batch: dict):
    """The critic's number at the position that predicts each token. -> (N,) float32"""
    set_role(model, "critic")
    inputs = {key: x for key, x in batch.items() if key not in ("targets", "target_index")}
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    return model.critic_head(hidden.index_select(0, batch["target_index"]).float()).squeeze(1)


@torch.no_grad()
def old_logps(model, part: Pass, args) -> None:
    """[3] Computed in the same forward passes as in the updates."""
    part.reference_logps = policy_logps(model, "reference", part.batch, args)
    part.logps = policy_logps(model, "policy", part.batch, args)


def rollout_figures(answers: list, passes: list[Pass]) -> dict[str, float]:
    """[10] Means over the answers or the answer tokens of all GPUs."""
    count, tokens = len(answers), sum(len(answer.ids) for answer in answers)
    logps = torch.cat([part.logps for part in passes])
    log_r = torch.cat([part.reference_logps for part in passes]) - logps
    sums = torch.stack([-log_r.sum(), (log_r.expm1() - log_r).sum(), -logps.sum()])
    kl, kl_k3, nll = common.sum_over_ranks(sums).tolist()
    figures = {"kl": kl / count, "kl_k3": kl_k3 / count, "entropy": nll / tokens}
    return answer_figures(answers) | figures


def add_reward_adapter(args, model) -> tuple[torch.Tensor, float]:
    """Put an adapter of reward_model.py on the model, as the role `reward`. -> its head (1, d)
    and the offset to subtract"""
    options = {"reads": ("modules_to_save",), "flag": "--reward"}  # the head
    config, tensors = common.load_adapter(args.reward, model, "LORA", **options)
    alpha = config["lora_alpha"] * (config["r"] ** 0.5 if config.get("use_rslora") else 1)
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        path = name.removesuffix(".lora_A.weight")
        layer = model.get_submodule(path)
        if not isinstance(layer, RoleLinear):
            layer = RoleLinear(layer)
            model.set_submodule(path, layer)
        role = LoRALinear(layer.roles["base"], config["r"], alpha).requires_grad_(False)
        role.lora_A.weight.copy_(tensors[name])
        role.lora_B.weight.copy_(tensors[f"{path}.lora_B.weight"])
        layer.roles["reward"] = role
    return tensors["score.weight"], float(config.get("reward_offset", 0.0))


def add_reward_and_critic(args, model, tokenizer, dtype, device):
    """[8] The critic is a copy of the reward model, if that is an adapter on the same base, else
    of the policy, with a head of zeros. -> reward(prompts, answers, references) -> scores"""
    model.critic_head = nn.Linear(model.config.get_text_config().hidden_size, 1, device=device)
    if (Path(args.reward) / "adapter_config.json").exists():
        start, (weight, offset) = "reward", add_reward_adapter(args, model)
        model.critic_head.weight.data.copy_(weight)
        model.critic_head.bias.data.fill_(-offset)
        scores = model_reward(model, weight, offset, args, model, tokenizer, device)

        def reward(*answers):
            set_role(model, "reward")
            return scores(*answers)
    else:
        start, reward = "policy", load_reward(args, model, tokenizer, dtype, device)
        nn.init.zeros_(model.critic_head.weight)
        nn.init.zeros_(model.critic_head.bias)
    for layer in role_layers(model):
        if start in layer.roles:
            layer.roles["critic"] = critic = copy_adapter(layer.roles[start])
            critic.lora_A.requires_grad_()
            critic.lora_B.requires_grad_()
    return reward


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


class RoleLinear(nn.Module):
    """A frozen linear layer with a LoRA adapter for each role. One role is on."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.roles, self.on = nn.ModuleDict({"base": base}), "base"

    def forward(self, x):
        return self.roles[self.on](x)


def role_layers(model) -> list[RoleLinear]:
    return [layer for layer in model.modules() if isinstance(layer, RoleLinear)]


def set_role(model, role: str) -> None:
    """Switch a role on. Run its backward pass before the next call: it may recompute blocks."""
    for layer in role_layers(model):
        layer.on = role if role in layer.roles else "base"


def add_policy(model, args, device) -> dict:
    """Put the policy's adapter on the model: a new one or --adapter. -> its config for PEFT"""
    config = common.add_adapter(model, args, LoRALinear, device)
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, LoRALinear):
            shared = RoleLinear(layer.base)
            shared.roles["policy"] = layer
            if args.adapter:  # else the base is the reference
                shared.roles["reference"] = copy_adapter(layer)
            model.set_submodule(name, shared)
    return config


def copy_adapter(layer: LoRALinear) -> LoRALinear:
    """A frozen copy around the same base layer."""
    return copy.deepcopy(layer, {id(layer.base): layer.base}).requires_grad_(False)


@contextmanager
def merged_policy(model):
    """Temporarily merge the policy's adapter into the base. A copy of the adapted weights
    restores them bit for bit. Of the model's generation config, only the end of turn is used: it
    may have top-k or a repetition penalty."""
    layers = [layer for layer in role_layers(model) if "policy" in layer.roles]
    kept = [layer.roles["base"].weight.detach().clone() for layer in layers]
    config, eos = model.generation_config, model.generation_config.eos_token_id
    model.generation_config = transformers.GenerationConfig(eos_token_id=eos)
    set_role(model, "base")
    for layer in layers:
        layer.roles["policy"].merged()
    yield
    for layer, weight in zip(layers, kept):
        layer.roles["base"].weight.data.copy_(weight)
    model.generation_config = config


def keep_policy(model) -> None:
    """Keep only the policy's adapter on the model, under PEFT's names."""
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, RoleLinear):
            model.set_submodule(name, layer.roles["policy" if "policy" in layer.roles else "base"])


# --- rollouts ---
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
    parser = common.make_parser(__doc__, output="runs/ppo", lr=3e-5)
    parser.set_defaults(warmup_ratio=0.0)
    add_rollout_flags(parser)
    add = parser.add_argument_group("PPO").add_argument
    add("--ppo-epochs", type=int, default=4, help="epochs over a rollout")
    add("--kl-coefficient", type=float, default=0.05, help="beta: weight of the KL penalty")
    add("--gamma", type=float, default=1.0, help="discount factor of rewards")
    add("--lam", type=float, default=0.95, help="lambda of generalised advantage estimation")
    add("--critic-lr", type=float, default=1e-4, help="peak learning rate of the critic")
    rewards = str(common.EXAMPLES / "rewards.py")
    demo = {"data": [str(common.EXAMPLES / "pairs.jsonl")], "reward": f"{rewards}:kindness"}
    demo |= {"lr": 1e-3, "critic_lr": 1e-3, "kl_coefficient": 0.02, "response_length": 48}
    demo |= {"rollout_size": 32, "max_steps": 15, "samples": 4}
    args = common.parse_args(parser, argv, demo=demo)
    check_flags(args)
    train(args)


if __name__ == "__main__":
    common.launch(main, out_of_memory="--gradient-checkpointing; a smaller --micro-batch-tokens; "
                  "a smaller --generation-batch; a shorter --response-length")  # fmt: skip

"""Supervised fine-tuning (SFT), the first stage of alignment: learn to answer as the data does.

Ouyang et al. 2022, "Training language models to follow instructions with human feedback" (arXiv
2203.02155), section 3.5: the pretraining loss on demonstrations, for the tokens that the model
should write:

    L = - 1/N  sum_t  m_t log p(y_t | y_<t)

    y_t      input_ids      a token of a conversation, written by the model's chat template
    m_t      is_target      1 for the assistant's tokens and its end-of-turn token, else 0
    N        num_targets    the targets (m_t = 1) of the whole step, on all GPUs
    log p    target_logps   (n,) of the n targets of a forward pass, in nats, float32

Masks and packing, a worked example. Two conversations, "Hi" -> "Yo" and "2+2?" -> "4", in one
forward pass of the bundled model, which has one token for each byte:

    document  positions  target  text
           1   0 .. 20   no      <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
           1  21 .. 23   yes     Yo<|im_end|>
           2   0 .. 22   no      <|im_start|>user\\n2+2?<|im_end|>\\n<|im_start|>assistant\\n
           2  23 .. 24   yes     4<|im_end|>

  - A target is predicted from the position before it: "Y" from the line break after "assistant".
    The end-of-turn token is a target, or the model would never learn to stop.
  - Positions restart, and the second conversation cannot see the first.

Choices and departures from the paper
  - All parameters are trained. --lora-rank R trains a LoRA adapter instead (see lora.py).
  - --loss-on all also trains on the prompt's tokens (Shi et al. 2024, arXiv 2405.14394).
  - --neftune ALPHA adds noise to the embeddings (Jain et al. 2023, arXiv 2310.05914):
    x + ALPHA / sqrt(L d) U(-1, 1), where L is the document's length.

    python sft.py                                               # the bundled model learns a format
    python sft.py --model BASE --data chat.jsonl --patience 3
    python sft.py --model BASE --data chat.jsonl --lora-rank 16 --lr 2e-4
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common


def add_neftune(model, alpha: float) -> None:
    """In training, give the backbone noisy embeddings (B, T, d) instead of input_ids."""

    def add_noise(backbone, _, inputs):
        if not backbone.training:
            return None
        x = backbone.get_input_embeddings()(inputs["input_ids"])  # (B, T, d)
        if "stretches" in inputs:
            lengths = torch.tensor(inputs["stretches"].lengths, device=x.device)
            lengths = lengths.repeat_interleave(lengths)[None]  # (1, T)
        else:
            lengths = inputs["attention_mask"].sum(1, keepdim=True)  # (B, 1)
        scale = (alpha / (lengths[..., None] * x.shape[-1]).sqrt()).to(x.dtype)
        noisy = x + scale * torch.empty_like(x).uniform_(-1, 1)
        return (), inputs | {"input_ids": None, "inputs_embeds": noisy}

    model.base_model.register_forward_pre_hook(add_noise, with_kwargs=True)


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


def train(args) -> None:
    device, dtype = common.setup(args)
    tokenizer = common.load_tokenizer(args)
    train_set, eval_set = common.load_data(args, tokenizer)
    if args.inspect:
        return common.inspect_examples(train_set, tokenizer)
    lora = args.rank or args.adapter
    shard = args.offload or (args.shard if lora else common.RANKS > 1)
    weights = None if lora else torch.float32  # kept in float32 if all of them train
    size = len(tokenizer)
    model = common.load_model(args, dtype, device, weights, shard, args.offload, vocab_size=size)
    config = common.add_adapter(model, args, LoRALinear, device, tokenizer) if lora else {}
    if args.chat:
        return common.chat(model, tokenizer, args, device)
    if args.neftune:
        add_neftune(model, args.neftune)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(common.decay_groups(model, args), lr=args.lr, fused=True)

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
    if lora:
        common.save_adapter(args, model, tokenizer, config)
    else:
        common.save_model(args, model, tokenizer, dtype)
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


def main(argv=None) -> None:
    parser = common.make_parser(__doc__, output="runs/sft", lr=2e-5)
    add = parser.add_argument_group("SFT").add_argument
    add("--loss-on", choices=["answers", "all"], default="answers", help="all: on prompts as well")
    add("--neftune", type=float, default=0.0, metavar="ALPHA", help="add noise; the paper: 5")
    add("--offload", action="store_true", help="keep weights and optimizer states in host memory")
    common.add_adapter_flags(parser, prefix="lora-", rank=0, add_tokens=True)
    form = {"data": [str(common.EXAMPLES / "format.jsonl")], "lr": 1e-3}
    train(common.parse_args(parser, argv, demo=form))


if __name__ == "__main__":
    common.launch(
        main,
        out_of_memory="--gradient-checkpointing; a smaller --micro-batch-tokens; a shorter "
        "--max-length; --lora-rank 16; --offload; torchrun on more GPUs",
    )

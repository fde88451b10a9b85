"""LoRA: train two small matrices beside each frozen linear layer instead of the layer itself.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685),
equation 3, with the scaling of its section 4.1:

    y = W0 x + s B A dropout(x)          s = alpha / r

    x   (..., in), y  (..., out)         the layer's input and output
    W0  base.weight    (out, in)         frozen, in bfloat16 on a GPU
    A   lora_A.weight  (r, in)           float32, kaiming_uniform(a=sqrt 5)
    B   lora_B.weight  (out, r)          float32, zero
    r   --rank, alpha  --alpha, s  scaling

Choices and departures from the paper
  - Every linear layer but the output head is adapted, not only the attention's q and v: QLoRA
    (section 4) needed all of them to match full fine-tuning. --targets q_proj,v_proj gives the
    paper's choice.
  - A is initialised as in the authors' code (kaiming_uniform), not Gaussian as in the paper.
  - A and B stay float32 and are cast in the forward pass: AdamW's small updates would vanish in
    bfloat16.
  - --dropout is 0: otherwise each layer stores its own copy of its input for the backward pass.
  - rsLoRA (arXiv 2312.03732) scales by alpha / sqrt(r). To use it, multiply --alpha by sqrt(r).

Questions people ask
  Why is B zero?    Then B A = 0, and training starts from exactly the base model. If A were zero
                    too, neither would get a gradient. If both were random, training would start
                    from a disturbed base.
  Why alpha / r?    So that the learning rate can stay about the same when the rank changes.
  Sum or mean?      The loss is the mean over all target tokens of an optimizer step, in all its
                    forward passes and on all GPUs. Targets are the assistant's tokens and the
                    end-of-turn token. (--targets is another thing: layers to adapt.)
  New tokens?       --add-tokens "<a>" "<b>" trains their rows of the embedding and the head, saved
                    as PEFT's trainable_token_indices. vLLM does not read them: merge.
  Never stops?      PEFT generates with the base's settings. The result has its own:
                    model.generation_config = GenerationConfig.from_pretrained("runs/lora").
  Merge?            --merge-only adds s B A to W0. Merged weights cost nothing at inference. Keep
                    the adapter: the sum is rounded, so subtracting s B A does not restore W0.

Measured: `python lora.py` answers 0 of 100 held-out prompts exactly before training, and 100, 99
and 99 after (--seed 0, 1, 2; one CPU core, torch 2.13, 2026-11-26). `python lora.py --model
SmolLM2-135M-Instruct --data gsm8k_train.jsonl --eval-data 0.005 --max-steps 24 --batch-size 4
--lr 3e-3` lowers the held-out loss from 1.430 to 0.933 (CPU, 2026-11-25). Speed: tests/RESULTS.md.

    python lora.py                                     # the bundled model learns a task
    python lora.py --model BASE --data train.jsonl     # BASE: a folder or a Hub name
    python lora.py --model BASE --adapter runs/lora --chat
    python lora.py --merge-only --model BASE --adapter runs/lora --output runs/merged
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common  # code between # --- marks --- is the same in other scripts


# --- LoRALinear ---
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
    model = common.load_model(args, dtype, device, shard=args.shard, vocab_size=len(tokenizer))
    config = common.add_adapter(model, args, LoRALinear, device, tokenizer)
    if args.chat:
        return common.chat(model, tokenizer, args, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(common.decay_groups(model, args), lr=args.lr, fused=True)

    # --- start of the run ---
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

    # --- one step ---
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

        # --- end of a step ---
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

    # --- end of the run ---
    log.bar.close()
    if args.patience and run["best_step"] < run["step"]:
        common.say(f"using the weights of step {run['best_step']}: the lowest held-out loss")
        common.read_checkpoint(args, "best", model, optimizer, run["fixed"])
    samples = answer_samples(model, tokenizer, shown, args, device, log)
    print_samples(samples_before, samples)
    # --- end ---
    common.save_adapter(args, model, tokenizer, config)
    log.done()


# --- held-out loss and samples ---
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


def merge(args) -> None:
    """--merge-only: add the adapter to the base's weights and save them in the base's dtype."""
    device, _ = common.setup(args)
    tokenizer = common.load_tokenizer(args)
    model = common.load_model(args, "auto", device, vocab_size=len(tokenizer))
    common.add_adapter(model, args, LoRALinear, device, tokenizer)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear | common.NewRows):
            model.set_submodule(name, layer.merged())
    common.save_model(args, model, tokenizer, model.dtype)


def main(argv=None) -> None:
    parser = common.make_parser(__doc__, output="runs/lora", lr=2e-4)
    common.add_adapter_flags(parser, add_tokens=True)
    args = common.parse_args(parser, argv, demo={"lr": 3e-3, "epochs": 6.0})
    merge(args) if args.merge_only else train(args)


if __name__ == "__main__":
    common.launch(main, out_of_memory="--gradient-checkpointing; a smaller --micro-batch-tokens; "
                  "a shorter --max-length; qlora.py")  # fmt: skip

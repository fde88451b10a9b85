"""Houlsby adapters: insert a small trainable network after every attention and every MLP of a
frozen model.

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP" (arXiv 1902.00751),
section 2.1:

    f(h) = h + U act(D h + b1) + b2
    x = x + f(attention(norm(x)));  x = x + f(mlp(norm(x)))

    h   (..., d)             the output of attention or MLP, before it is added to the stream x
    D   down.weight  (r, d)  truncated normal      b1  down.bias  (r,)  zero
    U   up.weight    (d, r)  truncated normal      b2  up.bias    (d,)  zero
    r   --bottleneck, act  --activation, d  the model's hidden size, L its number of blocks

Trained, in float32: 2 L (2 d r + r + d) adapter parameters, and the norms. With --pfeiffer only
the MLPs have an adapter: L (2 d r + r + d) parameters, and the norms. (Only the position is that
of Pfeiffer et al. 2020, arXiv 2005.00247. Their adapter reads the normalised sum.)

At step 0 the model is nearly, but not exactly, the base. D and U have a standard deviation of
1e-3, truncated at 2e-3, which leaves 0.88e-3. With relu (gelu: 0.7 times as much),

    ||f(h) - h|| / ||h||  is about  (0.88e-3)^2 sqrt(d r / 2)     2.8e-4 for d = 4096, r = 64

Choices and departures from the paper
  - D, U, their biases and the norms are float32: AdamW's small updates would vanish in bfloat16.
    D and U are cast in the forward pass. Norms compute in float32.
  - Every norm is trained: those of the blocks (with Qwen3's query and key norms) and the last
    one. --no-train-norms trains none.
  - The paper's BERT normalises after the sum. Today's decoders normalise before attention and
    MLP. If they also normalise before the sum (Gemma 2), the adapter comes before that norm.
  - A third branch beside attention and MLP (Falcon-H1's Mamba, Granite's shared experts) gets no
    adapter.
  - relu is the default. The authors' code uses gelu (the tanh approximation).

Questions people ask
  Can it be merged?   No. act is between D and U, so f is not a matrix that can be added to a
                      weight, as LoRA's s B A is. The adapters stay and slow generation a little.
  Why not U = 0?      It would work, as LoRA's B = 0 does. The paper chose near-identity. With D
                      and U both zero, neither would ever get a gradient.
  Does PEFT load it?  No, PEFT has no such method. The folder has PEFT's two files, with peft_type
                      HOULSBY and this script's names. --adapter FOLDER loads it here, to train
                      further, to evaluate (--max-steps 0), or to answer (--chat).

Measured: `python adapter.py` answers 0 of 100 held-out prompts exactly before training, and 100,
100 and 100 after ten epochs (--seed 0, 1, 2; one CPU core, torch 2.13, 2026-11-26).

    python adapter.py                                  # the bundled model learns a task
    python adapter.py --model BASE --data train.jsonl  # BASE: a folder or a Hub name
    python adapter.py --model BASE --adapter runs/adapter --chat
"""

import argparse
import inspect
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common

# Names of a block's two parts. OPT's MLP is not a module of its own: fc2 is its last layer.
ATTENTION = ("self_attn", "self_attention", "attention", "attn", "linear_attn")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc2")
ACTIVATIONS = {"relu": nn.ReLU(), "gelu": nn.GELU(approximate="tanh")}


class Adapter(nn.Module):
    """f(h). h (..., d) -> (..., d) in h's dtype"""

    def __init__(self, width: int, bottleneck: int, activation: str, device=None):
        super().__init__()
        self.down = nn.Linear(width, bottleneck, dtype=torch.float32, device=device)
        self.up = nn.Linear(bottleneck, width, dtype=torch.float32, device=device)
        self.activation = ACTIVATIONS[activation]
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=1e-3, a=-2e-3, b=2e-3)
            nn.init.zeros_(layer.bias)

    def forward(self, h):
        D, U, b1, b2 = (
            p.to(h.dtype) for p in (self.down.weight, self.up.weight, self.down.bias, self.up.bias)
        )
        z = self.activation(F.linear(h, D, b1))  # (..., d) -> (..., r)
        return h + F.linear(z, U, b2)  # (..., r) -> (..., d)


def apply_adapter(module, inputs, output):
    """A forward hook. Attention returns a tuple that begins with its output."""
    if isinstance(output, tuple):
        return (module.adapter(output[0]), *output[1:])
    return module.adapter(output)


def train_norm(norm, dtype) -> None:
    """Train a norm in float32. Its output has the dtype of the residual stream."""
    norm.float().requires_grad_(True)
    norm.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(), *inputs[1:]))
    norm.register_forward_hook(lambda module, inputs, output: output.to(dtype))


def sublayers(model, pfeiffer: bool) -> list[nn.Module]:
    """The modules that get an adapter: attention and MLP of every block, or only the MLPs."""
    found = []
    for block in common.blocks(model):
        for names in [MLP] if pfeiffer else [ATTENTION, MLP]:
            module = next((m for name, m in block.named_children() if name in names), None)
            if module is None:
                problem = f"{type(block).__name__} has no module {' or '.join(names)}"
                raise common.UserError(f"no place for an adapter: {problem}. Try lora.py")
            if "residual" in inspect.signature(module.forward).parameters:  # BLOOM
                problem = f"{type(module).__name__} adds the residual stream itself"
                raise common.UserError(f"no place for an adapter: {problem}. Try lora.py")
            found.append(module)
    return found


def add_adapters(model, args, device) -> dict:
    """Freeze the model, put an Adapter after every attention and MLP, and unfreeze the norms.
    --adapter replaces the flags and the initial values. -> the fields of the adapter's config"""
    fields = ("bottleneck", "activation", "pfeiffer", "train_norms")
    config, tensors = {"peft_type": "HOULSBY"} | {key: getattr(args, key) for key in fields}, {}
    if args.adapter:
        config, tensors = common.load_adapter(args.adapter, model, "HOULSBY")
    model.requires_grad_(False)
    width, places = model.config.get_text_config().hidden_size, sublayers(model, config["pfeiffer"])
    for module in places:
        module.adapter = Adapter(width, config["bottleneck"], config["activation"])
        module.register_forward_hook(apply_adapter)
    modules = common.language_part(model).modules()
    norms = [module for module in modules if type(module).__name__.endswith("Norm")]
    for norm in norms if config["train_norms"] else []:
        train_norm(norm, model.dtype)
    common.fill_adapter(model, args, tensors, device, f"in {len(places)} adapters")
    return config


def train(args) -> None:
    device, dtype = common.setup(args)
    tokenizer = common.load_tokenizer(args)
    train_set, eval_set = common.load_data(args, tokenizer)
    if args.inspect:
        return common.inspect_examples(train_set, tokenizer)
    model = common.load_model(args, dtype, device)
    config = add_adapters(model, args, device)
    if args.chat:
        return common.chat(model, tokenizer, args, device)
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
    common.save_adapter(args, model, tokenizer, config)
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
    parser = common.make_parser(__doc__, output="runs/adapter", lr=1e-3)
    add = parser.add_argument_group("adapters").add_argument
    add("--bottleneck", type=int, default=64, help="width of each adapter")
    add("--activation", choices=list(ACTIVATIONS), default="relu", help="inside each adapter")
    add("--pfeiffer", action="store_true", help="adapters after the MLPs only: half as many")
    yes_or_no = {"action": argparse.BooleanOptionalAction, "default": True}
    add("--train-norms", **yes_or_no, help="also train the weights of the norms")
    start = "start from an adapter of this script, with its values of these four flags"
    add("--adapter", metavar="FOLDER", help=start)
    train(common.parse_args(parser, argv, demo={"lr": 4e-3, "epochs": 10.0}))


if __name__ == "__main__":
    common.launch(main, out_of_memory="--gradient-checkpointing; a smaller --micro-batch-tokens; "
                  "a shorter --max-length; qlora.py")  # fmt: skip

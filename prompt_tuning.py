"""Prompt tuning: train a few vectors (virtual tokens) that are put before the embeddings of every
text. With --encoder lstm or mlp it is P-Tuning: a small network computes the vectors.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning" (arXiv 2104.08691);
Liu et al. 2021, "GPT Understands, Too" (arXiv 2103.10385), section 3.2:

    log p(x_t | v, x_<t)    of model([v; E(x)])                   only v is trained
    v = e                                                         prompt tuning
    v = MLP(BiLSTM(e))      MLP(h) = W2 relu(W1 h + b1) + b2      P-Tuning, --encoder lstm
    v = MLP(e)              three layers, two relu                --encoder mlp, PEFT's default

    x     input_ids                (T,)            a document, without its virtual tokens
    E     the model's embedding    (V, d)          frozen, like the whole model
    e     prompt.embedding         (P, d)          float32 (like v), P = --virtual-tokens
    LSTM  prompt.lstm_head         two layers, --hidden wide in each direction; MLP prompt.mlp_head

Every document begins with P placeholders (`make_room`), whose embeddings `embed` replaces by v. So
virtual tokens have positions, are packed and count in --micro-batch-tokens, like other tokens.
P-Tuning v2 (keys and values in every layer) is prefix_tuning.py --hidden 0.

Choices and departures from the papers
  - AdamW with learning rate 1e-2 and no weight decay, instead of Lester's Adafactor with 0.3.
  - e starts from the embeddings of --init-text or of sampled tokens (Lester: of the 5,000 most
    common). With an encoder, it starts from normal random numbers, as in PEFT.
  - P is 20 (Lester: 100), and the base is a decoder (Lester: T5).
  - P-Tuning's virtual tokens all come first, not around a cloze template.

Questions people ask
  Is step 0 the base?  No, it is the base with P more tokens before every text.
  Why a high --lr?     AdamW changes each number by about the learning rate per step, and only v is
                       trained. With an encoder, try --lr 1e-3.
  Why an encoder?      It ties the vectors together. Only its output is saved.
  What does it cost?   P more tokens per document, also at inference. They cannot be merged.

Measured: `python prompt_tuning.py` answers 0 of 100 held-out prompts exactly before training, and
0, 1 and 3 after (--seed 0, 1, 2; --encoder lstm or mlp --lr 3e-3: 0; one CPU core, torch 2.13,
2026-11-26). Prompt tuning needs larger models, as the title of Lester et al. says.

    python prompt_tuning.py                                  # too hard for the bundled model
    python prompt_tuning.py --model BASE --data train.jsonl  # BASE: a folder or a Hub name
    python prompt_tuning.py --model BASE --data train.jsonl --encoder lstm --lr 1e-3   # P-Tuning
"""

import math
import types

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common


class Prompt(nn.Module):
    """The virtual tokens. start: e (P, d). forward() -> v (P, d) float32. Modules are named as in
    PEFT's PromptEncoder."""

    def __init__(self, start: torch.Tensor, encoder: str = "none", hidden: int = 0):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(start.float(), freeze=False)
        d, relu, self.encoder = start.shape[1], nn.ReLU(), encoder
        if encoder == "lstm":
            self.lstm_head = nn.LSTM(d, hidden, num_layers=2, bidirectional=True)
            wide = 2 * hidden
            self.mlp_head = nn.Sequential(nn.Linear(wide, wide), relu, nn.Linear(wide, d))
        elif encoder == "mlp":
            layers = nn.Linear(d, hidden), relu, nn.Linear(hidden, hidden), relu
            self.mlp_head = nn.Sequential(*layers, nn.Linear(hidden, d))

    def forward(self) -> torch.Tensor:
        e = self.embedding.weight
        if self.encoder == "none":
            return e
        return self.mlp_head(self.lstm_head(e)[0] if self.encoder == "lstm" else e)


def embed(model, input_ids, position_ids) -> torch.Tensor:
    """E(x), with v at the first P positions of every document. (B, T) both -> (B, T, d)"""
    x = model.get_input_embeddings()(input_ids)  # not weight[input_ids]: some models scale here
    v = model.prompt().to(x.dtype)
    virtual = F.embedding(position_ids.clamp(0, len(v) - 1), v)
    return torch.where((position_ids < len(v))[..., None], virtual, x)


def target_logps(model, input_ids, targets, target_index, **inputs) -> torch.Tensor:
    """`common.target_logps` with v in place of the placeholders."""
    positions = inputs.get("position_ids")  # packed; else padded on the right
    positions = inputs["attention_mask"].cumsum(1) - 1 if positions is None else positions
    inputs["inputs_embeds"] = embed(model, input_ids, positions)
    return common.target_logps(model, None, targets, target_index, **inputs)


def generate(model, input_ids, attention_mask, **options) -> torch.Tensor:
    """The model's own `generate` with v in place of the placeholders, which follow the padding on
    the left. (B, T) -> (B, T + new tokens)"""
    options["inputs_embeds"] = embed(model, input_ids, attention_mask.cumsum(1) - 1)
    new = type(model).generate(model, attention_mask=attention_mask, **options)
    return torch.cat([input_ids, new], dim=1)


def make_room(examples, P: int, placeholder: int):
    """A data set with P placeholders before every example. They are not targets."""

    def before(columns: dict) -> dict:
        new = {"stretches": [x + P for x in columns["stretches"]]}
        for name, value in {"input_ids": placeholder, "is_target": False}.items():
            new[name] = [np.concatenate([np.full(P, value, x.dtype), x]) for x in columns[name]]
        return new

    return examples.map(before, batched=True, features=examples.features)


@torch.no_grad()
def starting_prompt(model, tokenizer, args) -> torch.Tensor:
    """The vectors of --adapter. With an encoder, normal random numbers. Else the embeddings of
    --init-text (repeated or cut to P tokens) or of sampled tokens. -> (P, d)"""
    embedding, P = model.get_input_embeddings(), args.virtual_tokens
    if args.adapter:
        _, tensors = common.load_adapter(args.adapter, model, "PROMPT_TUNING", "P_TUNING")
        return tensors["prompt_embeddings"]
    if args.encoder != "none":
        return torch.randn(P, embedding.weight.shape[1], device="cpu")
    ids = torch.randint(len(embedding.weight), (P,), device="cpu").tolist()
    if args.init_text:
        ids = tokenizer(args.init_text, add_special_tokens=False).input_ids
    return embedding(torch.tensor((ids * P)[:P], device=embedding.weight.device)).cpu()


def add_prompt(model, prompt: Prompt, device) -> None:
    """Freeze the model. In training and generation, every text begins with the virtual tokens."""
    model.requires_grad_(False)
    model.prompt = prompt.to(device)
    model.target_logps = types.MethodType(target_logps, model)
    model.generate = types.MethodType(generate, model)


def train(args) -> None:
    if args.encoder != "none" and (args.init_text or args.adapter):
        raise common.UserError("--encoder cannot be used with --init-text or --adapter")
    device, dtype = common.setup(args)
    tokenizer = common.load_tokenizer(args)
    train_set, eval_set = common.load_data(args, tokenizer)
    if args.inspect:
        return common.inspect_examples(train_set, tokenizer)
    model = common.load_model(args, dtype, device)
    torch.manual_seed(args.seed)  # the same start on all GPUs
    start = starting_prompt(model, tokenizer, args)
    add_prompt(model, Prompt(start, args.encoder, args.hidden), device)
    if args.chat:
        return common.chat(model, tokenizer, args, device, [tokenizer.pad_token_id] * len(start))
    train_set, eval_set = (
        x and make_room(x, len(start), tokenizer.pad_token_id) for x in (train_set, eval_set)
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(common.decay_groups(model, args), lr=args.lr, fused=True)
    trained = sum(p.numel() for p in parameters)
    common.say(f"{trained:,} parameters train; {start.numel():,} are saved: {len(start)} vectors")

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
    save_prompt(args, model, tokenizer)
    if args.demo:
        counts = "0, 1 and 3 of 100 answers are exact (--seed 0, 1, 2), 100 with lora.py"
        common.say(f"the bundled model is too small to learn this by prompt tuning: {counts}")
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


def save_prompt(args, model, tokenizer) -> None:
    """Save the vectors in PEFT's format. With an encoder, they are its output."""
    v, sizes = model.prompt(), model.config.get_text_config()
    config = {"peft_type": "PROMPT_TUNING" if args.encoder == "none" else "P_TUNING"}
    config |= {"num_virtual_tokens": len(v), "token_dim": v.shape[1]}
    config |= {"num_attention_heads": sizes.num_attention_heads, "num_transformer_submodules": 1}
    config |= {"num_layers": sizes.num_hidden_layers}
    common.save_adapter(args, model, tokenizer, config, {"prompt_embeddings": v})


def main(argv=None) -> None:
    parser = common.make_parser(__doc__, output="runs/prompt_tuning", lr=1e-2)
    add = parser.add_argument_group("prompt tuning").add_argument
    add("--virtual-tokens", type=int, default=20, help="P: trained vectors before every text")
    kinds = ["none", "mlp", "lstm"]
    add("--encoder", choices=kinds, default="none", help="lstm or mlp (PEFT's default): P-Tuning")
    add("--hidden", type=int, default=512, help="width of the encoder")
    add("--init-text", metavar="TEXT", help="start from its embeddings; None: sampled tokens")
    add("--adapter", metavar="FOLDER", help="start from these vectors, ours or PEFT's")
    train(common.parse_args(parser, argv, demo={"lr": 3e-2, "epochs": 6}))


if __name__ == "__main__":
    tries = "--gradient-checkpointing; a smaller --micro-batch-tokens; a shorter --max-length"
    common.launch(main, out_of_memory=tries)

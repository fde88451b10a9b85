"""Prompt tuning: train a few vectors that are put before every text, where the embeddings of a prompt would be.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning" (arXiv 2104.08691):

    logits = model([P; E(x)])   log p(x_t | P, x_<t) as in any language model; only P is trained

    x   input_ids               (B, T)
    E   the model's embedding   (V, d)      frozen, as all of the model is
    P   prompt.embeddings       (p, d)      float32, p = --prompt-length; the same in every row

Choices and departures from the paper
  - AdamW with learning rate 1e-2 instead of Adafactor with 0.3, and no weight decay (the paper: 1e-5).
  - P starts from rows of the whole vocabulary (--init vocab; the paper samples from its 5,000 most common tokens), from
    the embeddings of a text (--init text), or uniform in [-0.5, 0.5] as in the paper (--init random). In PEFT's words the default
    is PromptTuningConfig(num_virtual_tokens=20, prompt_tuning_init="SAMPLE_VOCAB"); the paper's p is 100.
  - The base is a decoder, which reads P before its own chat template, where the paper has T5.
  - Rows are not packed: each carries its own P before it, and is padded on the right.

Questions people ask
  Is it the base model at step 0?   No: it is the base model that reads p more tokens first. With --init text these are
                         the text's (repeated or cut to p), with --init vocab random ones.
  Why is the learning rate so high?   AdamW moves each parameter by about the rate in a step, and P is all that can move:
                         see below.
  Are the trained vectors words?   No: they need not lie near any row of E.
  What does it cost?     The base stays whole and serves many prompts in one batch. Every forward pass has p more
                         positions, and the context is p shorter. Nothing can be merged.
  Prompt or prefix?      prefix_tuning.py trains keys and values in every layer: many more parameters, and more effect.

Measured: held-out loss of SmolLM2-135M-Instruct on GSM8K, 1.312 at step 0 (the base alone: 1.316), after 16 steps of two
rows (--eval-fraction 0.004 --max-length 384 --batch-size 2 --max-steps 16), two CPU cores, November 2026:
    --lr 1e-3: 1.292      1e-2: 1.211      3e-2: 1.214      1e-1: 1.207      (the default is the smallest rate within 0.004 of the best)

    python prompt_tuning.py                                          # the bundled model learns a task, in a minute
    python prompt_tuning.py --model BASE --data train.jsonl          # BASE: a folder or a Hugging Face Hub name
    python prompt_tuning.py --model BASE --data train.jsonl --init text --init-text "Solve the problem step by step."
    python prompt_tuning.py --model BASE --data more.jsonl --adapter runs/prompt_tuning --output runs/more   # go on
"""

import math
import types

import torch
from torch import nn

import common_before as common


class Prompt(nn.Module):
    """P (p, d) float32. In a module of its own, so that it comes after the base's parameters: `model.dtype` is that of the first."""

    def __init__(self, start: torch.Tensor):
        super().__init__()
        self.embeddings = nn.Parameter(start)


def with_prompt(model, input_ids, attention_mask) -> dict[str, torch.Tensor]:
    """[P; E(x)] and a mask that is 1 on P. (B, T) both -> inputs_embeds (B, p + T, d), attention_mask (B, p + T)."""
    embeddings = model.get_input_embeddings()(input_ids)  # not weight[input_ids]: some models scale here
    P = model.prompt.embeddings.to(embeddings.dtype).expand(len(input_ids), -1, -1)  # (p, d) -> (B, p, d)
    mask = torch.cat([attention_mask.new_ones(P.shape[:2]), attention_mask], dim=1)
    return {"inputs_embeds": torch.cat([P, embeddings], dim=1), "attention_mask": mask}


def target_logps(model, input_ids, targets, target_index, attention_mask, **inputs) -> torch.Tensor:
    """`common.target_logps` with the prompt before the text. Flat positions move by p for their own row's prompt and for
    that of each row above."""
    p = len(model.prompt.embeddings)
    target_index = target_index + p * (target_index // input_ids.shape[1] + 1)
    inputs |= with_prompt(model, input_ids, attention_mask)
    return common.target_logps(model, None, targets, target_index, **inputs)


def generate(model, input_ids, attention_mask, **options) -> torch.Tensor:
    """The model's own `generate` with the prompt before the text. (B, T) -> (B, T + new tokens).

    Padding is on the left here, and moves before P: between P and the text, sliding windows would count it."""
    inputs = with_prompt(model, input_ids, attention_mask)
    order = inputs["attention_mask"].argsort(dim=1, stable=True)  # (B, p + T): padding, P, text
    inputs = {name: x[torch.arange(len(x), device=x.device)[:, None], order] for name, x in inputs.items()}
    new = type(model).generate(model, **inputs, **options)  # from inputs_embeds it gives the new tokens alone
    return torch.cat([input_ids, new], dim=1)


@torch.no_grad()
def initial_prompt(model, tokenizer, length: int, init: str, text: str | None = None) -> torch.Tensor:
    """P at the start, (p, d) float32."""
    embedding = model.get_input_embeddings()
    if init == "random":
        return torch.rand(length, embedding.weight.shape[1], device=embedding.weight.device) - 0.5
    if init == "text":
        ids = tokenizer(text, add_special_tokens=False).input_ids
        ids = torch.tensor((ids * math.ceil(length / len(ids)))[:length])
    else:
        ids = torch.randint(len(embedding.weight), (length,), device="cpu")
    return embedding(ids.to(embedding.weight.device)).float()


def add_prompt(model, prompt: torch.Tensor, max_length: int) -> None:
    """Freeze the model and put a trained prompt (p, d) before all that it reads, in training and in generation."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest and len(prompt) + max_length > longest:
        lengths = f"--prompt-length {len(prompt)} and --max-length {max_length}"
        raise common.UserError(f"{lengths}: together more than this model's {longest} positions: shorten either")
    model.requires_grad_(False)
    model.prompt = Prompt(prompt)
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
        load_prompt(model, args)
    else:
        start = initial_prompt(model, tokenizer, args.prompt_length, args.init, args.init_text)
        add_prompt(model, start, args.max_length)
    common.checkpoint_blocks(model, args)
    common.compile_blocks(model, args)
    trainable, total = common.count_parameters(model)
    share = f"{trainable:,} of {total:,} parameters train ({trainable / total:.3%})"
    common.say(f"{share}: {args.prompt_length} vectors before every text")

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
    save_prompt(args, model, tokenizer)
    run.finish()
    common.say_how_to_use(args, script=None)


def save_prompt(args, model, tokenizer) -> None:
    """The prompt in PEFT's form."""
    sizes = model.config.get_text_config()
    config = {
        "peft_type": "PROMPT_TUNING", "num_virtual_tokens": args.prompt_length, "num_transformer_submodules": 1,
        "token_dim": model.prompt.embeddings.shape[1],
        "num_attention_heads": sizes.num_attention_heads, "num_layers": sizes.num_hidden_layers,
        "prompt_tuning_init": "RANDOM",  # PEFT overwrites it with the saved tensor
    }  # fmt: skip
    common.save_adapter(args, model, tokenizer, config, {"prompt_embeddings": model.prompt.embeddings})


def load_prompt(model, args) -> None:
    """Put the prompt of --adapter before the model's input, with its own length."""
    _, tensors = common.load_adapter(args.adapter, model, "PROMPT_TUNING")
    embedding = model.get_input_embeddings().weight
    args.prompt_length = len(tensors.get("prompt_embeddings", ()))
    add_prompt(model, torch.zeros(args.prompt_length, embedding.shape[1], device=embedding.device), args.max_length)
    common.fill_adapter({"prompt_embeddings": model.prompt.embeddings}, tensors, args.adapter)


def check_flags(args) -> None:
    """Refuse flags that cannot work together, before anything is loaded."""
    if args.packing:
        raise common.UserError("--packing: each row carries its own prompt, so rows are padded instead: leave it out")
    if args.init == "text" and args.init_text is None:
        raise common.UserError("--init text needs --init-text TEXT")
    if args.init_text is not None and args.init != "text":
        raise common.UserError("--init-text: it needs --init text")


def main(argv=None) -> None:
    parser = common.make_parser(__doc__, demo={"lr": 3e-2, "epochs": 6}, output="runs/prompt_tuning", lr=1e-2, packing=False)
    add = parser.add_argument_group("prompt tuning").add_argument
    add("--prompt-length", type=common.number(int, 1), default=20, help="p, trained vectors before every text")
    add("--init", choices=["vocab", "text", "random"], default="vocab", help="their start: sampled embeddings, --init-text's, or uniform")
    add("--init-text", metavar="TEXT",
        help="for --init text: its tokens' embeddings, repeated or cut to --prompt-length")
    add("--adapter", metavar="FOLDER", help="continue from this prompt, ours or PEFT's; its length is used")
    parser.adapter_brings = ("--prompt-length", "--init", "--init-text")
    train(parser.parse_args(argv))


if __name__ == "__main__":
    tries = "--gradient-checkpointing; a smaller --batch-size with more --grad-accum; a shorter --max-length"
    common.launch(main, out_of_memory=tries)

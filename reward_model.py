"""Reward model, the second stage of RLHF (reinforcement learning from human feedback): learn from ranked answers how good an answer
is, as one number.

Ouyang et al. 2022, "Training language models to follow instructions with human feedback" (arXiv 2203.02155), equation 1, which
for two answers is Bradley and Terry's model of who wins, log p(w beats l) = log sigmoid(r_w - r_l):

    L = - 1 / (K (K-1) / 2)  sum_(w,l)  log sigmoid(r(x, y_w) - r(x, y_l) - m)        r(x, y) = w . h

    h        hidden  (D, d)  the backbone's hidden state at the last token of the rendered conversation: the end of turn, or what
                             the template writes after it (ChatML: a line break)
    w        score   (1, d)  the head in place of the output layer, no bias; at the start N(0, 1 / (d + 1))
    r        rewards (D,)    float32, of the D answers in a batch
    y_w, y_l better, worse (P,)  which of the D answers a pair compares; K ranked answers make K (K-1) / 2 pairs
    m        margin  (P,)    0, or the row's "margin": by how much the better answer should win (Llama 2, arXiv 2307.09288)

Choices and departures from the paper
  - All K answers to a prompt are in one step, and their pairs together weigh as much as a single pair: as pairs of their own,
    spread over an epoch, each answer would be trained on K-1 times, and the paper found that to overfit.
  - The last token is found from lengths, never from the pad id: where padding is eos, that finds another token. transformers
    finds it by the pad id when it loads the result, so the result gets a pad token that ends no text.
  - The loss sees only differences, so rewards have no zero. After training, the mean reward of the best answers of the first 512
    training prompts becomes `reward_offset` in the config, and every script here that reads rewards subtracts it: a
    reward of 0 is then as good as those answers. transformers, TRL and vLLM do not know the field and give r itself.
  - Dropout is off: it would add noise to a small difference of two large numbers.
  - One epoch, as in the paper: more of them overfit.

Questions people ask
  Sum or mean?       The mean over the prompts of the whole optimizer step, over micro-batches and ranks; within a prompt,
                     the mean over its pairs.
  Loss at step 0?    Near ln 2 = 0.693, but not equal to it: the random head already prefers some answers to others.
  Which rate?        The default is 1e-5 where every parameter trains, and 1e-4 for LoRA.
  Which base?        A model after SFT (sft.py). One that is a reward model already keeps its head and goes on from it.
  Is m in the metrics?  No: `accuracy` is the share of pairs with r_w > r_l (a tie is wrong), and `margin` the mean of r_w - r_l.
  Both answers cut?  A row longer than --max-length is cut, and its reward read at the cut. Two answers that are then the same,
                     or that always were, have loss log(1 + e^m) and no gradient.

Measured: 19 steps on three quarters of the bundled pairs take SmolLM2-135M's held-out accuracy (26 prompts) from 0.72, 0.69 and 0.46
to 0.92, 1.00 and 0.96 with three seeds (--lora-rank 8 --lr 3e-4 --eval-fraction 0.25; bfloat16 on a CPU, 2026-11-22).

    python reward_model.py                                             # the bundled model learns to be kind, in a minute
    python reward_model.py --model runs/sft --data pairs.jsonl --output runs/reward
    python reward_model.py --model runs/sft --data pairs.jsonl --output runs/reward-lora --lora-rank 16
    python reward_model.py --model runs/reward --score rows.jsonl      # a reward for each row, to --output/scores.jsonl
    python reward_model.py --model runs/sft --adapter runs/reward-lora --score rows.jsonl
"""

import json
import math
import types
from pathlib import Path

import jinja2
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn

import common_before as common


def pairwise_loss(chosen_rewards, rejected_rewards, margin=None, reduction: str = "mean"):
    """Equation 1, in nats. Rewards and margin (P,) -> the mean over the pairs, or (P,) losses with reduction="none"."""
    difference = chosen_rewards - rejected_rewards
    losses = -F.logsigmoid(difference if margin is None else difference - margin)
    return losses.mean() if reduction == "mean" else losses


def rewards(model, last, **batch) -> torch.Tensor:
    """r of each answer, called as `model.rewards(**batch)`. last (D,): where in the flattened (B * T,) each ends. -> (D,) float32"""
    inputs = common.model_inputs(batch)
    documents = inputs.pop("documents", None)
    if model.config._attn_implementation == "documents":
        inputs["documents"] = documents
    hidden = model.base_model(use_cache=False, **inputs).last_hidden_state  # (B, T, d)
    hidden = hidden.flatten(0, 1).index_select(0, last)  # (D, d)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), model.score.weight.float())[:, 0]


def figures(batch: dict, rewards) -> dict[str, torch.Tensor]:
    """What a micro-batch adds to the loss and the metrics. rewards (D,). A pair of K ranked answers weighs 2 / (K (K - 1)),
    so that each prompt counts once."""
    chosen, rejected = rewards[batch["better"]], rewards[batch["worse"]]  # (P,)
    losses = pairwise_loss(chosen, rejected, batch["margin"], reduction="none")
    pairs = {"loss": losses, "accuracy": (chosen > rejected).float(), "margin": chosen - rejected}
    return {name: (batch["weight"] * values).sum() for name, values in pairs.items()}


def load_reward_model(args, dtype: torch.dtype, device: torch.device, weight_dtype: torch.dtype):
    """The model of --model with `model.rewards` bound to it, and the adapter of --adapter or a fresh LoRA on it. The head is
    the adapter's, else the one on disk, else random."""
    has_head = False
    if args.model != "random":
        config = common.from_hub(transformers.AutoConfig, args)
        has_head = any("SequenceClassification" in name for name in config.architectures or [])
        if has_head and config.num_labels != 1:
            raise common.UserError(f"--model {args.model} is a classifier with {config.num_labels} labels, and a reward model has one")
    model = common.load_model(args, dtype, device, weight_dtype, head="score")
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise common.UserError(f"{type(model).__name__} has no linear layer `score`, which is the head here")
    # a bound method, because FSDP2 gathers weights only around methods it knows (register_fsdp_forward_method)
    model.rewards = types.MethodType(rewards, model)
    if not has_head:
        d = model.score.in_features
        w = torch.randn(1, d, generator=torch.Generator().manual_seed(args.seed)) / math.sqrt(d + 1)
        model.score.weight.data.copy_(w)
    if args.adapter or args.rank:
        model.score.float()  # trained, so in float32 like the adapter
        if args.adapter:
            has_head |= load_lora(model, args)
        else:
            add_lora(model, args.targets, args.rank, args.alpha)
        model.score.requires_grad_(True)
    if args.score and not has_head:
        raise common.UserError(f"--score needs a trained reward model: {args.adapter or args.model} has no head")
    return model


def choose_pad_token(args, tokenizer, vocab_size: int) -> None:
    """A pad token that ends no text: transformers reads the reward at the last token that is not padding."""
    turns = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    used = {*common.encode_answers(tokenizer, *turns, joined=args.template == "none")[0][0], tokenizer.eos_token_id, tokenizer.bos_token_id}
    if tokenizer.pad_token_id not in used and tokenizer.pad_token_id < vocab_size:
        return
    special = [(token.content, i) for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    unused = [text for text, i in special if i not in used and i < vocab_size]
    if unused:  # <|finetune_right_pad_id|> before <unk>
        tokenizer.pad_token = min(unused, key=lambda text: ("pad" not in text.lower(), text == tokenizer.unk_token))
    else:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        if tokenizer.pad_token_id >= vocab_size and (args.rank or args.adapter):
            raise common.UserError(f"--model {args.model}: its vocabulary has no unused special token to pad with and no room for a new one, "
                                   "which an adapter could not bring: leave out --lora-rank and --adapter")  # fmt: skip
    common.say(f"padding with {tokenizer.pad_token!r}: transformers reads the reward at the last token that is not padding")


def train(args) -> None:
    device, dtype = common.setup(args)
    tokenizer, vocab_size = common.load_tokenizer(args)
    choose_pad_token(args, tokenizer, vocab_size)
    corpus, evaluation = common.load_data(args, tokenizer, vocab_size, device, kind="preferences")
    if args.inspect:
        return corpus.show(tokenizer)
    lora = bool(args.rank or args.adapter)
    if lora and args.offload:
        raise common.UserError("--offload is for training every parameter: leave out --lora-rank and --adapter")
    place = torch.device("cpu") if dist.is_initialized() and not lora else device  # FSDP2 takes block after block to the GPU
    model = load_reward_model(args, dtype, place, weight_dtype=dtype if lora else torch.float32)
    if tokenizer.pad_token_id >= vocab_size:
        model.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    common.disable_dropout(model)
    common.checkpoint_blocks(model, args)
    common.compile_blocks(model, args)
    if not lora:
        common.parallelize(model, dtype, device, args.offload, method="rewards")
    common.say("{:,} of {:,} parameters train".format(*common.count_parameters(model)))

    def measure() -> dict[str, float]:
        return common.corpus_means(model, evaluation, lambda batch: figures(batch, model.rewards(**batch)))

    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = common.decay_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    run = common.Run(args, model, tokenizer, [optimizer], corpus, evaluation, measure, lambda: show(model, tokenizer, evaluation or corpus))
    run.begin()

    for epoch, micro_batches, tokens, prompts in run.steps():
        lr = common.learning_rate(run.step, run.total_steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums = {}
        for batch in micro_batches:
            part = figures(batch, model.rewards(**batch))
            (part["loss"] / prompts).backward()  # a mean over the prompts of the whole step, over micro-batches and ranks
            sums = {name: sums.get(name, 0.0) + value.detach() for name, value in part.items()}
        # --- copied from dpo.py: update ---
        if run.step == 0:
            common.check_gradients(model)
        common.sum_gradients(parameters)  # over ranks, under torchrun
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        run.end_step(epoch, sums, tokens, prompts, lr, grad_norm)
        # --- end ---

    run.show_samples()
    best = [corpus.table[row[0]]["input_ids"].tolist() for row in corpus.planned_rows()[:512] or corpus.rows()[:512]]
    values = score(model, best, args.batch_size, device)
    model.config.reward_offset = sum(values) / len(values)
    common.say(f"the best answers of {len(values)} training prompts have a mean reward of {model.config.reward_offset:.4f}: saved as reward_offset")
    if lora:
        save_lora(args, model, tokenizer)
    else:
        common.save_trained(Path(args.output), model, tokenizer, dtype, args.trust_remote_code)
    run.finish()
    say_how_to_use(args, lora)


def show(model, tokenizer, corpus) -> list[tuple[str, str, str]]:
    """(prompt, the rewards of its answers, the answers) of the first --samples prompts."""
    shown = []
    with common.evaluating(model):
        for row in corpus.rows()[: corpus.args.samples]:
            values = model.rewards(**corpus.collate([row])).tolist()
            documents = [(corpus.table[n]["input_ids"].tolist(), int(corpus.table[n]["is_target"].argmax())) for n in row]
            texts = [tokenizer.decode(ids[start:], skip_special_tokens=True).strip() for ids, start in documents]
            prompt = tokenizer.decode(documents[0][0][: documents[0][1]], skip_special_tokens=True)
            listed = "  ".join(f"{n}: {value:+.3f}" for n, value in enumerate(values, 1))
            answers = "\n".join(f"answer {n}: {text}" for n, text in enumerate(texts, 1))
            shown.append((prompt, f"rewards, best answer first  {listed}", answers))
    return shown


def score(model, documents: list[list[int]], batch_size: int, device: torch.device) -> list[float]:
    """r of token lists, without the offset. Padded on the right, the longest first: what does not fit in memory fails at once."""
    order, values = sorted(range(len(documents)), key=lambda n: -len(documents[n])), [0.0] * len(documents)
    with common.evaluating(model), common.attention(model, model.padded_attention):
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            lengths = torch.tensor([len(documents[n]) for n in chosen], device=device)
            width = int(lengths[0])
            ids = torch.tensor([documents[n] + [0] * (width - len(documents[n])) for n in chosen], device=device)
            mask = (torch.arange(width, device=device) < lengths[:, None]).long()  # (B, T)
            last = torch.arange(len(chosen), device=device) * width + lengths - 1
            for n, value in zip(chosen, model.rewards(last, input_ids=ids, attention_mask=mask).tolist()):
                values[n] = value
    return values


def score_file(args) -> None:
    """--score: every row of a file with the "reward" of its answer, or the "rewards" of its answers, best first."""
    device, dtype = common.setup(args)
    tokenizer, vocab_size = common.load_tokenizer(args)
    rows, documents, cut, lost = [], [], 0, 0
    for row, where in common.open_source(args.score)[1]():
        several = "chosen" in row or "responses" in row
        prompt, answers = common.parse_preference(row, where)[:2] if several else common.parse_prompt(row, where)
        if not answers:
            raise common.UserError(f"{where}: no answer to score")
        if args.system is not None and prompt[0]["role"] != "system":
            prompt.insert(0, {"role": "system", "content": args.system})
        try:
            encoded = common.encode_answers(tokenizer, prompt, answers, joined=args.template == "none")
        except (jinja2.TemplateError, common.UserError) as error:
            raise common.UserError(f"{where}: the chat template refuses this conversation: {error}")
        places = []  # of this row's answers in documents; None where --max-length leaves nothing of the answer
        for ids, marks in encoded:
            if max(ids) >= vocab_size:
                raise common.UserError(f"{where}: token {max(ids)} is beyond the model's {vocab_size} embeddings: tokenizer and model do not fit")
            kept = any(marks[: args.max_length])
            places.append(len(documents) if kept else None)
            documents += [ids[: args.max_length]] * kept
            cut, lost = cut + (kept and len(ids) > args.max_length), lost + (not kept)
        rows.append((row, several, places))
    if not rows:
        raise common.UserError(f"{args.score}: no rows")
    model = load_reward_model(args, dtype, device, weight_dtype=dtype)
    offset = getattr(model.config, "reward_offset", 0.0)
    values = [value - offset for value in score(model, documents, args.batch_size, device)]

    def write(folder: Path) -> None:
        with open(folder / "scores.jsonl", "w", encoding="utf-8") as file:
            for row, several, places in rows:
                found = [None if place is None else values[place] for place in places]
                row = row | ({"rewards": found} if several else {"reward": found[0]})
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")

    if common.rank() == 0:
        Path(args.output).mkdir(parents=True, exist_ok=True)
        common.save_into(Path(args.output), write)
    mean = f"mean {sum(values) / len(values):.4f}" if values else "no reward"
    common.say(f"{len(rows):,} rows, {mean}: {args.output}/scores.jsonl; {cut:,} answers cut at --max-length {args.max_length}, "
               f"{lost:,} without a reward because their prompt fills it")  # fmt: skip


def say_how_to_use(args, lora: bool) -> None:
    again = f"--model {f'{args.output}/base' if args.model == 'random' else args.model} --adapter {args.output}" if lora else f"--model {args.output}"
    again += " --template none" if args.template == "none" else f" --template {args.output}/chat_template.jinja" if args.template and lora else ""
    again += f" --system {json.dumps(args.system, ensure_ascii=False)}" if args.system else ""
    again += " --trust-remote-code" if args.trust_remote_code else ""
    options = ", trust_remote_code=True" if args.trust_remote_code else ""
    load = f"t.AutoModelForSequenceClassification.from_pretrained('{args.output}'{options})"
    if lora:
        load = f"peft.AutoPeftModelForSequenceClassification.from_pretrained('{args.output}', num_labels=1, pad_token_id=k.pad_token_id{options})"
    text = "k('Hello' + 'Hi.' + k.eos_token, return_tensors='pt')"
    if args.template != "none":
        turns = "[dict(role='user', content='Hello'), dict(role='assistant', content='Hi.')]"
        text = f"k.apply_chat_template({turns}, return_dict=True, return_tensors='pt')"
    inputs = f"k = t.AutoTokenizer.from_pretrained('{args.output}'); m = {load}; print(m(**{text}).logits)"
    common.say(f"""
The reward model lies in {args.output}. Score prompts and answers with it:
  python reward_model.py {again} --score rows.jsonl --output {args.output}-scores
or through {"PEFT" if lora else "transformers"}, whose rewards are without the offset:
  python -c "import {"peft, " * lora}transformers as t; {inputs}\"""")


# --- copied from lora.py: LoRALinear ---
class LoRALinear(nn.Module):
    """A frozen nn.Linear with a trained low-rank update. x (..., in) -> (..., out)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        flat = x.flatten(0, -2)  # (N, in)
        y = self.base(flat)  # W0 x: (N, out)
        down = F.linear(self.dropout(flat), self.lora_A.to(x.dtype))  # A x: (N, r)
        y.addmm_(down, self.lora_B.to(x.dtype).T, alpha=self.scaling)  # + s B (A x), in place: base's backward pass needs no y
        return y.view(*x.shape[:-1], -1)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Add s B A to the base layer's weight, in float32 and rounded once. -> the base layer"""
        self.base.weight.copy_(self.base.weight.float() + self.scaling * self.lora_B @ self.lora_A)
        return self.base
# --- end ---


# --- copied from lora.py: putting LoRA on a model ---
def add_lora(model, targets: str, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False) -> None:
    """Freeze the model and put a LoRALinear around every target (see `common.linear_layers`)."""
    model.requires_grad_(False)
    for name, layer in common.linear_layers(model, targets).items():
        model.set_submodule(name, LoRALinear(layer, rank, alpha, dropout, rslora))


def lora_layers(model) -> dict[str, LoRALinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def adapter_tensors(model) -> dict[str, nn.Parameter]:
    """What is trained, under the names that PEFT gives it."""
    tensors = {}
    for name, layer in lora_layers(model).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A  # (r, in)
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B  # (out, r)
    return tensors
# --- end ---


# LoRA's files as in lora.py, with the head beside the adapter, which PEFT saves and loads for task type SEQ_CLS.
HEAD = "base_model.model.score.weight"


def save_lora(args, model, tokenizer) -> None:
    config = {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "r": args.rank, "lora_alpha": args.alpha, "use_rslora": args.rslora,
        "lora_dropout": args.dropout, "target_modules": common.short_names(model, list(lora_layers(model))), "bias": "none",
        "use_dora": False, "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": ["classifier", "score"],
        "reward_offset": model.config.reward_offset,
    }  # fmt: skip
    common.save_adapter(args, model, tokenizer, config, adapter_tensors(model) | {HEAD: model.score.weight})


def load_lora(model, args) -> bool:
    """Put the adapter of --adapter on the model, and its head if it has one (an adapter of sft.py has not). -> whether it has"""
    config, tensors = common.load_adapter(args.adapter, model, "LORA")
    args.rank, args.alpha, args.rslora = config["r"], config["lora_alpha"], config.get("use_rslora", False)
    names = [key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key]
    add_lora(model, ",".join(names), args.rank, args.alpha, args.dropout, args.rslora)
    head = {HEAD: model.score.weight} if HEAD in tensors else {}
    common.fill_adapter(adapter_tensors(model) | head, tensors, args.adapter)
    model.config.reward_offset = config.get("reward_offset", 0.0)
    return bool(head)


def main(argv=None) -> None:
    demo = {"data": [common.example("pairs.jsonl")], "lr": 1e-3, "batch_size": 8, "epochs": 1, "exact_match": 0}
    parser = common.make_parser(__doc__, without=("--exact-match",), demo=demo, output="runs/reward_model", lr=None, epochs=1, exact_match=0,
                                data=[common.example("preferences.jsonl")])  # fmt: skip
    add = parser.add_argument_group("reward model").add_argument
    add("--score", metavar="FILE", help="train nothing: write the rewards of the answers in FILE to --output/scores.jsonl, row by row")
    add("--lora-rank", dest="rank", type=common.number(int, 0), default=0, metavar="R",
        help="train a LoRA adapter of this rank; 0 trains every parameter")
    add("--lora-alpha", dest="alpha", type=common.number(float, 0), default=32, help="the update is scaled by alpha / rank")
    add("--targets", default="all-linear", help="layers that LoRA adapts: all-linear (all but the score head), or names such as q_proj,v_proj")
    add("--adapter", metavar="FOLDER", help="continue from this LoRA adapter, ours or PEFT's; its rank, alpha and targets are used")
    parser.adapter_brings = ("--lora-rank", "--lora-alpha", "--targets")
    add("--offload", action="store_true", help="every parameter: keep weights, gradients and optimizer states in host memory (FSDP2)")
    parser.set_defaults(dropout=0.0, rslora=False)
    args = parser.parse_args(argv)
    if args.lr is None:
        args.lr = 1e-4 if args.rank or args.adapter else 1e-5
    score_file(args) if args.score else train(args)


if __name__ == "__main__":
    common.launch(main, out_of_memory="--gradient-checkpointing; a smaller --batch-size with more --grad-accum; a shorter --max-length; "
                  "--lora-rank 16; --offload; torchrun on more GPUs")  # fmt: skip

"""Code shared by all scripts: data and model loading, and the plumbing of a training run.

    1. Command line         the shared flags, errors in one line
    2. Rows                 files and Hub data sets -> conversations
    3. Tokens               conversations -> token ids and target masks
    4. Batches              the examples of every optimizer step and its forward passes
    5. Model                weights, gradient checkpointing, FSDP2
    6. Attention            one attention per stretch of tokens: packed documents stay apart
    7. Log-probabilities    of target tokens, without all logits in memory
    8. Saving               adapted layers, PEFT adapters, Hugging Face folders
    9. The run              learning rate, answers, metrics, signals, checkpoints, chat

Nothing here knows a fine-tuning method: layers, losses and training loops are in the scripts.
"""

import argparse
import csv
import functools
import gzip
import hashlib
import inspect
import io
import itertools
import json
import logging
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import time
import types
import unicodedata
import zipfile
from collections import Counter
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow.parquet
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
import torch.nn.functional as F
import transformers
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

RANK = int(os.environ.get("RANK", 0))  # this process's, from torchrun; LoRA's is args.rank
RANKS = int(os.environ.get("WORLD_SIZE", 1))
EXAMPLES = Path(__file__).parent / "examples"

# --------------------------------------------------------------------------- 1. Command line


class UserError(Exception):
    """An error the user can fix. `launch` prints it as one line and exits with code 2."""


def say(text: str) -> None:
    """Print on rank 0, above the progress bar. With --chat, answers alone are on stdout."""
    if RANK == 0:
        tqdm.write(text, file=sys.stderr if "--chat" in sys.argv else None)


def make_parser(doc: str, output: str, lr: float, chat: bool = True) -> argparse.ArgumentParser:
    """A parser with the flags of all scripts. doc: the script's docstring."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --model MODEL --data FILE [flags]",
        description=doc.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(demo=False, merge_only=False, adapter=None, chat=False)
    add = parser.add_argument_group("data").add_argument
    add("--model", help="a folder or a Hub name; without it and --data: a demonstration")
    files = ".jsonl, .json, .csv, .parquet (or .gz) files, folders of them, NAME[@CONFIG][@SPLIT] "
    add("--data", nargs="+", help=files + "on the Hub; PATH:2 uses each row twice in an epoch")
    add("--eval-data", nargs="+", default=["0.05"], help="held out: files, or a share of --data")
    add("--max-length", type=int, help="tokens of an example; None: the model's, at most 2048")
    add("--system", metavar="TEXT", help="system turn of conversations that have none")
    merge = "put the system turn into the user's, and join consecutive turns of one role"
    add("--merge-system", action="store_true", help=merge)
    add("--template", help="a .jinja file, alpaca or none (joins texts); replaces the model's")
    add("--skip-bad-rows", action="store_true", help="drop rows that cannot be used")
    add("--inspect", action="store_true", help="print the first examples and targets, then exit")
    add = parser.add_argument_group("training").add_argument
    add("--output", default=output, help="folder for the result, metrics.jsonl and checkpoint/")
    add("--epochs", type=float, default=3.0, help="times to go through the data")
    add("--max-steps", type=int, help="steps (PPO, GRPO: rollouts); overrides --epochs")
    add("--batch-size", type=int, default=16, help="examples or answers per update, on all GPUs")
    add("--lr", type=float, default=lr, help="peak learning rate")
    add("--warmup-ratio", type=float, default=0.03, help="share of steps before the peak rate")
    add("--weight-decay", type=float, default=0.0, help="AdamW's weight decay, on matrices only")
    add("--max-grad-norm", type=float, default=1.0, help="clip gradients to this norm; 0: never")
    add("--seed", type=int, default=0, help="of all random numbers and of the held-out rows")
    add("--patience", type=int, default=0, help="stop after N evaluations without a lower loss")
    add = parser.add_argument_group("memory").add_argument
    add("--micro-batch-tokens", type=int, default=4096, help="maximum of one GPU's forward pass")
    add("--no-packing", action="store_true", help="pad examples instead of packing them")
    again = {"nargs": "?", "const": 10**6, "help": "recompute the activations of N blocks (or all)"}
    add("--gradient-checkpointing", type=int, default=0, metavar="N", **again)
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="of computation")
    add = parser.add_argument_group("evaluating and saving").add_argument
    add("--eval-every", type=int, default=100, help="steps between evaluations")
    add("--save-every", type=int, default=100, help="steps between checkpoints")
    add("--samples", type=int, default=2, help="held-out prompts to answer before and after")
    add("--resume", action="store_true", help="continue from the checkpoint in --output, if any")
    add("--overwrite", action="store_true", help="replace the run in --output")
    if chat:
        add = parser.add_argument_group("chat").add_argument
        add("--chat", action="store_true", help="chat with the model, or answer lines from a pipe")
        add("--chat-tokens", type=int, default=512, help="maximum tokens of an answer")
        add("--chat-temperature", type=float, default=0.0, help="of sampling; 0: greedy")
    return parser


def parse_args(parser, argv: list[str] | None, demo: dict) -> argparse.Namespace:
    """demo: the script's own settings where neither --model nor --data is given."""
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        least = name in ("batch_size", "eval_every", "save_every", "micro_batch_tokens")
        if isinstance(value, int | float) and not value >= least:
            raise UserError(f"--{name.replace('_', '-')} {value} is not a positive number")
    if args.inspect and not args.data:
        raise UserError("--inspect needs --data")
    if args.merge_only and not (args.model and args.adapter):
        raise UserError("--merge-only needs --model (the base) and --adapter")
    if args.chat and (not args.model or args.inspect or RANKS > 1):
        raise UserError("--chat needs --model and one process, and excludes --inspect")
    if args.inspect or args.merge_only or args.chat or args.model and args.data:
        return args
    if args.model or args.data:
        raise UserError("training needs --model and --data; without both, a demonstration runs")
    settings = {"demo": True, "overwrite": True, "output": f"runs/demo/{Path(args.output).name}"}
    settings |= {"model": str(EXAMPLES / "tiny"), "data": [str(EXAMPLES / "task.jsonl")]}
    settings |= {"eval_data": ["0.17"], "samples": 100, "eval_every": 1000}
    parser.set_defaults(**settings | demo)
    return parser.parse_args(argv)


def launch(main, out_of_memory: str) -> None:
    """Run main(); print what a user can fix in one line. out_of_memory: what to try, in order."""
    code, message = 0, ""
    try:
        main()
    except UserError as error:
        code, message = 2, error
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        code, message = 1, f"out of GPU memory ({reason}). Try, in order: {out_of_memory}"
    except (OSError, safetensors.SafetensorError) as error:  # a full disk, a read-only folder
        code, message = 1, error
    except KeyboardInterrupt:
        code = 130
    if message:
        tqdm.write(f"error: {message}", file=sys.stderr)
    if code and RANKS > 1:
        os._exit(code)  # the other ranks may wait for this one: torchrun ends them
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


# ----------------------------------------------------------------------------------- 2. Rows

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def suffix_of(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def open_source(name: str):
    """A file, a folder or a Hub data set -> (a hash of its content, its rows as (place, row))."""
    path, (hub, *rest) = Path(name), name.split("@")
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    if files := [file for file in files if suffix_of(file) in SUFFIXES]:
        hashes = []
        for file in files:
            with open(file, "rb") as content:
                hashes.append((str(file), hashlib.file_digest(content, "sha256").hexdigest()))
        return hashes, (row for file in files for row in read_file(file))
    if path.exists() or suffix_of(path) in SUFFIXES or name[:1] in "./~":
        raise UserError(f"--data {name}: no {', '.join(SUFFIXES)} file, or folder of such files")
    config, split = rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train"
    try:
        table = datasets.load_dataset(hub, config, split=split)
    except Exception as error:  # no network, no such name, no such split
        problem = f"no such file, and loading from the Hub failed: {str(error).splitlines()[0]}"
        raise UserError(f"--data {name}: {problem}") from error
    rows = ((f"{name}: row {n}", drop_nulls(row)) for n, row in enumerate(table, 1))
    return table._fingerprint, rows


def read_file(path: Path):
    """Yield (place, row). A line of JSON is a row as bytes, for `load_row`; others are objects."""
    kind, opener = suffix_of(path), gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as file:
        rows, start = file, file.peek(64)[:64].lstrip(b"\xef\xbb\xbf \r\n\t")
        if kind == ".parquet":
            batches = pyarrow.parquet.ParquetFile(file).iter_batches()
            rows = (drop_nulls(row) for batch in batches for row in batch.to_pylist())
        elif kind == ".csv":
            csv.field_size_limit(2**31 - 1)
            rows = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""))
        elif kind == ".json" and start.startswith(b"["):
            rows = json.load(file)
        separator = ":" if rows is file else ": row "
        for n, row in enumerate(rows, 1):
            if not isinstance(row, bytes) or row.strip():
                yield f"{path}{separator}{n}", row


def drop_nulls(value):
    """Without nulls: in a table every row has every field, so a null means a missing one."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


# From here on, an exception says what is wrong with a row.

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant")
ROLES |= dict.fromkeys(("tool", "function", "observation"), "tool")
MESSAGES = ("messages", "conversations")
PROMPTS = ("prompt", "instruction", "question", "query")
ANSWERS = ("completion", "response", "output", "answer")
INPUTS = ("input", "context")  # Alpaca's, Dolly's: a second part of the prompt
SAID = ("content", "reasoning_content", "thinking", "tool_calls")  # what a message says
# Fields that change what a row means: one that is there and is not used is an error.
MEANINGFUL = """system tools functions history input context documents weight label chosen rejected
rejected_response responses images image videos audios function_call reasoning""".split()
EMPTY = (None, "", [], {})


def check_unused(left: dict, fields) -> None:
    if unused := [key for key in fields if left.get(key) not in EMPTY]:
        raise ValueError(
            f"field {unused[0]!r} would be ignored: rename or remove it, or convert the rows "
            "with examples/prepare_data.py"
        )


def to_message(message, role: str | None = None) -> dict:
    """A message for the chat template: role and content as text, other fields as they are."""
    message = {"role": role, "content": message} if isinstance(message, str) else message
    if not isinstance(message, dict):
        raise ValueError(f"a message is an object with role and content, not {str(message):.40}")
    message = dict(message)
    if "from" in message:  # ShareGPT
        message |= {"role": message.pop("from"), "content": message.pop("value", None)}
    if str(message.get("role")).lower() not in ROLES:
        raise ValueError(f"unknown role {message.get('role')!r} (known: {', '.join(ROLES)})")
    message["role"] = ROLES[message["role"].lower()]
    if calls := message.get("tool_calls"):
        message["content"] = message.get("content") or ""
        for function in (call.get("function") or call for call in calls):
            if isinstance(function.get("arguments"), str):  # templates would quote it twice
                function["arguments"] = json.loads(function["arguments"])
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and "text" in p for p in content):
        content = message["content"] = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"content of a {message['role']} message is {str(content):.40}, not text")
    check_unused(message | {"weight": None}, MEANINGFUL)
    return message


def to_messages(value, field: str, role: str | None = None) -> list[dict]:
    """The value of a field -> messages. Text is one message of the role, or an error without."""
    if role == "assistant" and str(value).startswith("\n\nHuman:"):  # Anthropic's HH
        _, *parts = re.split(r"\n\n(Human|Assistant):", value)
        value = [{"from": x, "value": y.strip()} for x, y in zip(parts[::2], parts[1::2])]
    value = [value] if isinstance(value, dict) or role and isinstance(value, str) else value
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {field!r} is {value!s:.40}, not text or a list of messages")
    return [to_message(item, role) for item in value]


def take_text(left: dict, field: str) -> str:
    if not isinstance(left[field], str):
        raise ValueError(f"field {field!r} is {left[field]!s:.40}, not text")
    return left.pop(field)


def take_answers(left: dict, turns: list[dict]) -> tuple[list[dict], list[dict]]:
    """Take the answers of a preference out of a row. They may be whole conversations that differ
    only in their last turn. -> (turns before the answers, answers, best first)"""
    if ranked := left.pop("responses", None):
        answers = [to_messages(value, "responses", "assistant") for value in ranked]
    else:
        names = "chosen", "rejected"
        answers = [to_messages(left.pop(name), name, "assistant") for name in names]
    context = answers[0][:-1]
    if any(answer[:-1] != context for answer in answers):
        raise ValueError("the answers must have the same turns before their last one")
    if turns and context and context[-len(turns) :] != turns:
        raise ValueError("the turns before the answers differ from the prompt")
    if not (context or turns) or any(answer[-1]["role"] != "assistant" for answer in answers):
        raise ValueError("a preference needs a prompt and answers by the assistant")
    return context or turns, [answer[-1] for answer in answers]


def load_row(row) -> dict:
    """A row of a table, or a line of JSON -> a dictionary of its own."""
    try:
        row = json.loads(row) if isinstance(row, bytes) else row
    except ValueError as error:
        raise ValueError(f"{error}: give a JSON list, or one object per line") from error
    if not isinstance(row, dict) or None in row:
        raise ValueError(f"a row is an object with a value for every field, not {str(row):.40}")
    return dict(row)


def parse_row(row, kind: str = "any") -> tuple:
    """A row of any of the README's layouts -> (turns or raw text; answers of a preference, best
    first, or []; tools or None; margin). kind: see `load_data`; any: without its demands."""
    left, meaningful, turns, answers = load_row(row), (*MEANINGFUL, *SAID), [], []
    pair = bool(left.get("responses")) or {"chosen", "rejected"} <= left.keys()
    if kind == "train" and pair:
        raise ValueError("chosen and rejected, or responses: for dpo.py, orpo.py, reward_model.py")
    if "pairs" in kind and not pair:
        problem = "this script needs chosen and rejected, or responses"
        raise ValueError(f"{problem} (examples/prepare_data.py converts some other layouts)")
    if pair and left.get("messages") == left.get("chosen"):  # UltraFeedback has them twice
        left.pop("messages", None)
    names = MESSAGES, PROMPTS, ANSWERS
    messages, prompt, answer = (next((x for x in some if x in left), None) for some in names)
    if messages:
        turns = to_messages(left.pop(messages), messages)
    elif prompt and (answer or pair or kind == "prompts"):
        meaningful += PROMPTS + ANSWERS
        turns = to_messages(left.pop(prompt), prompt, "user")
        if extra := next((key for key in INPUTS if left.get(key) not in EMPTY), None):
            turns[-1]["content"] += "\n\n" + take_text(left, extra)
        history = left.pop("history", None) or []
        if not all(isinstance(both, list) and len(both) == 2 for both in history):
            raise ValueError("field 'history' is not a list of [question, answer]")
        for question, reply in reversed(history):
            turns = [to_message(question, "user"), to_message(reply, "assistant"), *turns]
        if answer and not pair:
            turns += to_messages(left.pop(answer), answer, "assistant")
    elif "text" in left and not pair:
        text = take_text(left, "text")
        check_unused(left, MEANINGFUL)
        return text, [], None, 0.0
    elif not pair:
        known = f"messages or conversations; prompt and answer under {PROMPTS} and {ANSWERS}; text"
        raise ValueError(f"fields {sorted(left)} fit none of: {known}")
    if pair:
        meaningful += PROMPTS + ANSWERS + MESSAGES
        turns, answers = take_answers(left, turns)
    if left.get("system") not in EMPTY and turns[0]["role"] != "system":
        turns = [*to_messages(left.pop("system"), "system", "system"), *turns]
    tools = left.pop("tools", None) or None
    tools = json.loads(tools) if isinstance(tools, str) else tools
    margin = float(left.pop("margin", None) or 0.0) if pair else 0.0
    if not math.isfinite(margin):
        raise ValueError(f"field 'margin' is {margin}")
    check_unused(left, meaningful)
    return turns, answers, tools, margin


# --------------------------------------------------------------------------------- 3. Tokens

ALPACA = """{% for m in messages %}{% if m['role'] == 'assistant' %}### Response:
{{ m['content'] }}{{ eos_token }}

{% elif m['role'] == 'user' %}### Instruction:
{{ m['content'] }}

{% else %}{{ m['content'] }}

{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:
{% endif %}"""
JOINED = """{% for m in messages %}{{ m['content'] }}
{%- if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"""


def load_tokenizer(args):
    """The tokenizer of --adapter or --model, with a chat template, a pad token and --add-tokens."""
    if args.adapter and (Path(args.adapter) / "tokenizer_config.json").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.adapter)
    else:
        tokenizer = pretrained(transformers.AutoTokenizer, args.model or EXAMPLES / "tiny")
    if args.template:
        named = {"alpaca": ALPACA, "none": JOINED}.get(args.template)
        tokenizer.chat_template = named or Path(args.template).read_text(encoding="utf-8")
    elif not tokenizer.chat_template:
        say("the tokenizer has no chat template: using and saving the Alpaca layout (--template)")
        tokenizer.chat_template = ALPACA
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {args.model}: its tokenizer has no eos token to stop at")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks go by position: eos stays a target
        say(f"the tokenizer has no pad token: using eos, {tokenizer.eos_token!r}")
    for token in getattr(args, "add_tokens", []):
        special = token in tokenizer.chat_template  # an end of turn is, a tag in answers is not
        tokenizer.add_tokens(transformers.AddedToken(token, special=special, normalized=False))
    return tokenizer


@functools.cache
def special_tokens(tokenizer) -> list[str]:
    """Also those that only the vocabulary marks as special."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *added})


def end_of_turn(tokenizer, text: str, start: int) -> int:
    """Where the answer that begins at start and fills the rest of text ends: after the first
    special token of the trailing run of special tokens and white space. Templates may write a
    line break or another eos behind it. Without a special token: the end of text."""
    special = "|".join(map(re.escape, special_tokens(tokenizer)))
    run = re.compile(rf"({special})(\s|{special})*\Z").search(text, start)
    return run.end(1) if run else len(text)


def check_written(text: str, said: list[tuple[str, str]], hint: str = "") -> None:
    """Raise if a text lacks what was said: templates drop what they do not know, such as tools or
    system turns."""

    def plain(text):  # templates and tokenizers may normalise
        return re.sub(r"\s", "", unicodedata.normalize("NFC", str(text)))

    written = plain(text)
    for field, part in said:
        # a generation prompt may open the thinking block
        if plain(part).removeprefix("<think>") not in written:
            raise ValueError(f"the chat template does not write {field!r} {part!r:.40}{hint}")


def said_in(turn: dict) -> list[tuple[str, str]]:
    """(field, text) of what a message says."""
    calls = [call.get("function") or call for call in turn.get("tool_calls") or []]
    texts = [(key, turn[key]) for key in SAID[:3] if turn.get(key)]
    return texts + [("tool_calls", call["name"]) for call in calls]


def tokenize(tokenizer, text: str, spans: list[tuple] = ()) -> tuple[list, np.ndarray]:
    """A rendered conversation -> (ids, is_target). Targets are found by position, never by token
    id: pad, eos and the end of turn are often one id."""
    joined = tokenizer.chat_template == JOINED  # no template has written special tokens
    out = tokenizer(text, return_offsets_mapping=True, add_special_tokens=joined)
    starts, ends = np.array(out["offset_mapping"]).T
    is_target = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        is_target |= (starts < end) & (ends > start)
    return out["input_ids"], is_target


def complete_turns(turns: list[dict], settings: dict) -> list[dict]:
    """With the system turn of --system where there is none, and as --merge-system has them."""
    if settings["system"] is not None and turns[0]["role"] != "system":
        turns = [to_message(settings["system"], "system"), *turns]
    if not settings["merge_system"]:
        return turns
    merged = []
    for turn in turns:
        turn = turn | {"role": "user"} if turn["role"] == "system" else turn
        last = merged[-1] if merged else {}
        if turn["role"] != "tool" and last | {"content": ""} == turn | {"content": ""}:
            both = filter(None, (merged.pop()["content"], turn["content"]))
            turn = turn | {"content": "\n\n".join(both)}
        merged.append(turn)
    return merged


def encode_conversation(tokenizer, turns: list[dict], tools=None, whole=False) -> list[tuple]:
    """-> documents as (ids, is_target); none where no answer is a target, or one is empty. An
    answer has a document of its own if the template writes earlier turns differently once it
    follows (Qwen3 drops their thinking). A document ends with its last end of turn; whole: with
    what the template writes after it, all of it targets."""
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i > 0]
    if any(turns[i].get("weight") not in (None, 0, 1) for i in answers):
        raise ValueError("the weight of a message must be 0 (context) or 1 (target)")
    answers = [i for i in answers if turns[i].get("weight") != 0]
    if not answers or any(
        not "".join(str(x) for _, x in said_in(turns[i])).strip() for i in answers
    ):
        return []
    render = functools.partial(tokenizer.apply_chat_template, tools=tools, tokenize=False)
    texts = []  # (text, character spans of targets)
    for i in answers:
        prompt, text = render(turns[:i], add_generation_prompt=True), render(turns[: i + 1])
        start = said_from = len(prompt)
        if not text.startswith(prompt):  # the generation prompt may open a thinking block
            start = len(os.path.commonprefix([prompt, text]))
            said_from = len(context := render(turns[:i]))
            if not text.startswith(context):
                raise ValueError("the chat template changes the prompt when the answer is added")
        end = len(text) if whole else end_of_turn(tokenizer, text, start)
        check_written(text[said_from:end], said_in(turns[i]))
        spans = [(start, end)]
        if texts and text.startswith(texts[-1][0]):
            spans = texts.pop()[1] + spans
        texts.append((text[:end], spans))
        if len(texts) > 64:  # each repeats all turns before it
            raise ValueError("the chat template rewrites earlier turns: at most 64 answers per row")
    said = [("tools", (tool.get("function") or tool)["name"]) for tool in tools or []]
    before = turns[: answers[-1]]  # what follows the last answer teaches nothing
    said += [x for turn in before if turn["role"] in ("system", "user") for x in said_in(turn)]
    check_written("".join(text for text, _ in texts), said, " (--merge-system may help)")
    return [tokenize(tokenizer, *text) for text in texts]


def encode_prompt(tokenizer, turns: list[dict], tools=None) -> tuple[list, np.ndarray]:
    """Turns, and what the template writes before an answer to them -> (ids, is_target)"""
    options = {"tokenize": False, "add_generation_prompt": True}
    return tokenize(tokenizer, tokenizer.apply_chat_template(turns, tools, **options))


def encode_answers(tokenizer, turns, answers, tools=None, whole=False) -> list[tuple]:
    """A prompt with each of its answers as (ids, is_target); none where an answer is empty."""
    context = [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in turns]
    conversations = [[*context, answer] for answer in answers]
    encoded = [encode_conversation(tokenizer, x, tools, whole) for x in conversations]
    return sum(encoded, []) if all(encoded) else []


def share_prompt(encoded: list[tuple]) -> tuple[list, np.ndarray, list[int]]:
    """Answers to a prompt as (ids, is_target) -> (ids, is_target, stretches): the tokens that all
    begin with, up to the first target, and then the rest of each."""
    first = min(int(marks.argmax()) for _, marks in encoded)
    differ = (n for n in range(first) if len({ids[n] for ids, _ in encoded}) > 1)
    shared = next(differ, first)
    parts = [(ids[shared:], marks[shared:]) for ids, marks in encoded]
    parts.insert(0, (encoded[0][0][:shared], encoded[0][1][:shared]))
    ids, marks = zip(*parts)
    return sum(ids, []), np.concatenate(marks), list(map(len, ids))


COLUMNS = {  # of a data set of examples
    "input_ids": datasets.List(datasets.Value("int32")),
    "is_target": datasets.List(datasets.Value("bool")),
    "stretches": datasets.List(datasets.Value("int32")),  # lengths: [text] or [prompt, answers]
    "margin": datasets.Value("float32"),  # of a preference
    "prompt": datasets.Value("int64"),  # a hash: examples with the same prompt share it
    "digest": datasets.Value("int64"),  # a hash of ids and targets, for --resume
    "note": datasets.Value("string"),  # "" or "cut"; else why there are no tokens
    "source": datasets.Value("int32"),  # which of --data and --eval-data
}


def encode_row(row, tokenizer, kind: str, settings: dict) -> list[dict]:
    """The examples of a row; none if it has no target. kind: see `load_data`."""
    turns, answers, tools, margin = parse_row(row, kind)
    limit, eos, pairs = settings["max_length"], tokenizer.eos_token_id, "pairs" in kind
    if isinstance(turns, str):  # raw text and eos, all targets; a long one is split
        ids = tokenizer(turns).input_ids if turns.strip() else [eos]
        ids = ids if ids[-1] == eos else [*ids, eos]
        pieces = [ids[first : first + limit] for first in range(0, len(ids), limit)]
        prompt, encoded = ids, [(piece, np.ones(len(piece), dtype=bool)) for piece in pieces]
    else:
        turns = complete_turns(turns if pairs else turns + answers[:1], settings)
        if pairs:
            encoded = encode_answers(tokenizer, turns, answers, tools, kind == "whole pairs")
        elif kind == "prompts" and turns[-1]["role"] != "assistant":
            encoded = [encode_prompt(tokenizer, turns, tools)]
        else:
            encoded = encode_conversation(tokenizer, turns, tools)
        if not encoded:
            return []
        prompt, marks = encoded[0]
        prompt = prompt[: marks.argmax()] if marks.any() else prompt
    cut = [len(ids) > limit for ids, _ in encoded]
    encoded = [(ids[:limit], marks[:limit]) for ids, marks in encoded]
    documents = [(ids, marks, [len(ids)]) for ids, marks in encoded]
    if pairs:
        different = {tuple(ids): (ids, marks) for ids, marks in encoded}
        if len(different) < 2 or not all(marks.any() for _, marks in encoded):
            return []
        documents, cut = [share_prompt([*different.values()])], [any(cut)]
        prompt = documents[0][0][: documents[0][2][0]]
    examples, fields = [], {"margin": margin, "prompt": hash(tuple(prompt))}
    for (ids, marks, stretches), is_cut in zip(documents, cut):
        if max(ids) >= settings["vocab_size"]:
            token = tokenizer.convert_ids_to_tokens(max(ids))
            raise ValueError(f"the model has no token {token!r}: lora.py and sft.py can add it")
        marks[: stretches[0]] |= settings["loss_on"] == "all"  # the prompt; a text is one
        marks[0] = False  # nothing predicts a first token
        if marks.any() or (kind == "prompts" and not is_cut):
            lists = {"input_ids": ids, "is_target": marks, "stretches": stretches}
            more = {"digest": hash((*ids, *marks)), "note": "cut" * is_cut}
            examples.append(fields | lists | more)
    return examples


def parse_source(text: str) -> tuple[str, float]:
    """PATH[:WEIGHT] -> (path, weight)"""
    if Path(text).exists():
        return text, 1.0
    path, weight = re.fullmatch(r"(.+?)(?::(\d*\.?\d+))?", text).groups()
    return path, float(weight or 1)


def tokenize_sources(names: list[str], tokenizer, kind: str, settings: dict) -> datasets.Dataset:
    """All examples and notes. `datasets` keeps them in its cache, under a key of the content, the
    tokenizer and the settings."""
    sources = [open_source(name) for name in names]

    def generate():
        for number, (_, rows) in enumerate(sources):
            for place, row in rows:
                try:
                    examples = encode_row(row, tokenizer, kind, settings)
                except Exception as error:  # what can be wrong with a row is open-ended
                    reason = (str(error) or repr(error)).splitlines()[0]
                    if type(error).__name__ == "TemplateError":  # raised by the template
                        reason += " (--merge-system may help)"
                    examples = [{"note": f"{place}: {reason}"}]
                for example in examples or [{"note": "no target"}]:
                    yield dict.fromkeys(COLUMNS) | example | {"source": number}

    state = [[content for content, _ in sources], kind, settings, tokenizer.chat_template]
    state += [tokenizer.backend_tokenizer.to_str(), str(tokenizer.special_tokens_map)]
    state += [Path(__file__).read_text(encoding="utf-8")]
    key = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]
    options = {"features": datasets.Features(COLUMNS), "fingerprint": key}
    try:
        return datasets.Dataset.from_generator(generate, **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        problem = f"no rows, or they cannot be read: {error.__cause__ or error}"
        raise UserError(f"--data {' '.join(names)}: {problem}") from error


def load_data(args, tokenizer, kind: str = "train"):
    """-> (training examples, held-out examples or None), with the columns of COLUMNS.

    kind: "train"; "prompts", which may have no answer; "pairs", a prompt with its answers; "whole
    pairs": see `encode_answers`.
    """
    if args.chat:
        return None, None
    config = pretrained(transformers.AutoConfig, args.model or EXAMPLES / "tiny").get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or 10**9
    longest -= getattr(args, "virtual_tokens", 0)  # they take positions
    if args.max_length and args.max_length > longest:
        raise UserError(f"--max-length {args.max_length}: this model has {longest} positions")
    grown = len(tokenizer) if hasattr(args, "add_tokens") else 0
    settings = {"max_length": args.max_length or min(2048, longest), "system": args.system}
    settings |= {"vocab_size": max(grown, config.vocab_size), "merge_system": args.merge_system}
    settings |= {"loss_on": getattr(args, "loss_on", "answers")}
    share = re.fullmatch(r"0|0?\.\d+", " ".join(args.eval_data)) and float(args.eval_data[0])
    names = [parse_source(text)[0] for text in args.data]
    names += args.eval_data if share is None else []
    if RANK > 0:
        dist.barrier()  # rank 0 tokenises, the others read its cache
    table = tokenize_sources(names, tokenizer, kind, settings).with_format("numpy")
    if RANK == 0 and RANKS > 1:
        dist.barrier()
    notes = table["note"][:]
    usable, no_target = np.isin(notes, ["", "cut"]), notes == "no target"
    bad = notes[~usable & ~no_target]
    if len(bad) and not args.skip_bad_rows:
        few = [f"{len(bad)} rows cannot be used (--skip-bad-rows drops them)"] * (len(bad) > 1)
        raise UserError("\n".join([*few, *bad[:5]]))
    without = "two different answers" if "pairs" in kind else "a target or an answer"
    say(f"{usable.sum():,} examples, {(notes == 'cut').sum():,} of them cut at --max-length; "
        f"dropped: {no_target.sum():,} without {without}, {len(bad):,} bad rows")  # fmt: skip
    table = table.select(np.flatnonzero(usable))
    held_out = table["source"][:] >= len(args.data)
    if share:  # whole prompts, until the share is reached
        prompts, counts = np.unique(table["prompt"][:], return_counts=True)
        shuffled = np.random.default_rng([args.seed, 7]).permutation(len(prompts))
        enough = np.searchsorted(counts[shuffled].cumsum(), share * len(table)) + 1
        held_out = np.isin(table["prompt"][:], prompts[shuffled[: min(enough, len(prompts) - 1)]])
    if held_out.all():
        raise UserError(f"--data {' '.join(args.data)}: no example with a target to train on")
    if not held_out.any() and args.patience:
        raise UserError("--patience needs held-out rows: give --eval-data")
    eval_set = table.select(np.flatnonzero(held_out)) if held_out.any() else None
    return table.select(np.flatnonzero(~held_out)), eval_set


# -------------------------------------------------------------------------------- 4. Batches


def plan_steps(train_set, args) -> list[list[int]]:
    """The examples of every optimizer step, as row numbers of train_set: a function of data, seed
    and --batch-size alone, not of GPUs or memory. Steps run across the ends of epochs; only the
    last one may be short."""
    random, members, counts = np.random.default_rng(args.seed), [], []
    for n, text in enumerate(args.data):
        members.append(random.permutation(np.flatnonzero(train_set["source"][:] == n)))
        counts.append(round(parse_source(text)[1] * len(members[n])))
    if sum(counts) == 0:
        raise UserError("--data: with these weights, an epoch has less than one example")
    wanted = round(args.epochs * sum(counts))
    wanted = wanted if args.max_steps is None else args.max_steps * args.batch_size
    order = []
    for epoch in range(math.ceil(wanted / sum(counts))):
        # weight 2.5: all rows twice and half of them again; in the next epoch, the other half
        parts = zip(members, counts)
        parts = [np.take(m, range(n * epoch, n * (epoch + 1)), mode="wrap") for m, n in parts]
        order += random.permutation(np.concatenate(parts)).tolist()
    return [order[i : min(i + args.batch_size, wanted)] for i in range(0, wanted, args.batch_size)]


def count_targets(examples: dict) -> int:
    """Target tokens of a step on all ranks: the denominator of its mean loss."""
    return int(sum(np.sum(marks) for marks in examples["is_target"]))


def plan_passes(lengths: list[int], args) -> list[list[int]]:
    """Examples of these lengths -> the examples of every forward pass, a multiple of the ranks.
    Packed: longest first, each to the pass with the fewest tokens, in as few passes as hold
    --micro-batch-tokens each. Padded: neighbours in length. A longer example is alone."""
    limit = args.micro_batch_tokens
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if args.no_packing:
        passes = []
        for i in longest_first:
            if not passes or lengths[passes[-1][0]] * (len(passes[-1]) + 1) > limit:
                passes.append([])
            passes[-1].append(i)
        return passes + [[] for _ in range(-len(passes) % RANKS)]
    most = -(-len(lengths) // RANKS) * RANKS  # an example a pass
    least = min(most, math.ceil(sum(lengths) / (limit * RANKS)) * RANKS)
    for count in range(least, most + 1, RANKS):
        passes, tokens = [[] for _ in range(count)], [0] * count
        for i in longest_first:
            n = tokens.index(min(tokens))
            passes[n].append(i)
            tokens[n] += lengths[i]
        if all(size <= limit or len(p) == 1 for size, p in zip(tokens, passes)):
            break
    return [sorted(members) for members in passes]


def micro_batches(examples: dict, args, device) -> list[dict]:
    """Columns of examples -> this rank's forward passes, each what `target_logps` takes. All
    ranks run equally many: where examples run out, a pass without targets. A pass of prompts with
    answers also has its `examples`."""
    lengths = list(map(len, examples["input_ids"]))
    shared = any(len(x) > 1 for x in examples.get("stretches", ()))
    if args.no_packing and shared:  # a row for every answer
        lengths = [(len(x) - 1) * (x[0] + max(x[1:])) for x in examples["stretches"]]
    batches = []
    for members in plan_passes(lengths, args)[RANK::RANKS]:
        chosen = members or [int(np.argmin(lengths))]
        chosen = [{name: column[i] for name, column in examples.items()} for i in chosen]
        batch = collate(chosen, args.no_packing, device)
        if not members:
            batch |= {name: batch[name][:0] for name in ("targets", "target_index")}
        batches.append(batch | ({"examples": chosen[: len(members)]} if shared else {}))
    return batches


class Stretches(NamedTuple):
    """The stretches of a packed sequence: consecutive tokens that see each other causally, and
    besides them a whole earlier stretch or none. A document reads none, an answer its prompt."""

    lengths: list[int]  # queries
    key_lengths: list[int]  # keys: its own tokens and those that it reads
    query_ends: torch.Tensor  # (S + 1,) int32: 0 and the cumulative lengths
    key_ends: torch.Tensor  # (S + 1,) int32: the same, of each stretch with what it reads
    key_index: torch.Tensor | None  # (K,) the keys of each stretch; None if none reads another
    longest: tuple[int, int]  # query and key lengths


def collate(examples: list[dict], padded: bool, device) -> dict:
    """Examples -> the inputs of `target_logps`, targets and their positions.

    Packed end to end: input_ids, position_ids (1, T) and stretches. Of an example's stretches, the
    first is a prompt, which the others read: their positions continue the prompt's.
    Padded on the right: input_ids, attention_mask (B, T), a row for every answer with its prompt.
    The prompt's own targets count in the first row.
    """

    def to_device(array):  # on CUDA the host does not wait for the copy
        tensor = torch.from_numpy(array)
        tensor = tensor.pin_memory() if device.type == "cuda" else tensor
        return tensor.to(device, non_blocking=True)

    ids = np.concatenate([example["input_ids"] for example in examples]).astype(np.int64)
    marks = np.concatenate([example["is_target"] for example in examples]).astype(bool)
    before, positions, lengths, keys, rows = np.arange(len(ids)) - 1, [], [], [], []
    start = 0
    for example in examples:
        stretches, prompt = example.get("stretches", [len(example["input_ids"])]), np.arange(0)
        for n, length in enumerate(stretches):
            own = np.arange(start, start + length)
            start += length
            before[own[:1]] = prompt[-1:] if n else -1  # an answer follows its prompt
            positions.append(np.arange(length) + len(prompt))
            keys.append(np.concatenate([prompt, own]))
            lengths.append(int(length))
            prompt = prompt if n else own
        rows += keys[-max(1, len(stretches) - 1) :]  # the answers', or the text's
    if padded:
        width = max(map(len, rows))
        rows = np.stack([np.pad(x, (0, width - len(x)), constant_values=-1) for x in rows])
        # a prompt's tokens are in a row for every answer: its targets count in the first
        found, first = np.unique(rows, return_index=True)
        batch = {"input_ids": np.where(rows < 0, 0, ids[rows])}
        batch |= {"attention_mask": (rows >= 0).astype(np.int64)}
        batch |= {"targets": ids[marks], "target_index": first[found >= 0][marks] - 1}
        return {name: to_device(x) for name, x in batch.items()}
    batch = {"input_ids": ids[None], "position_ids": np.concatenate(positions)[None]}
    batch |= {"targets": ids[marks], "target_index": before[marks]}
    key_lengths = list(map(len, keys))
    ends = [to_device(np.cumsum([0, *x], dtype=np.int32)) for x in (lengths, key_lengths)]
    index = to_device(np.concatenate(keys)) if key_lengths != lengths else None
    stretches = Stretches(lengths, key_lengths, *ends, index, (max(lengths), max(key_lengths)))
    return {name: to_device(x) for name, x in batch.items()} | {"stretches": stretches}


def find_pairs(examples: list[dict], device) -> tuple[torch.Tensor, ...]:
    """Which answers a forward pass compares. Its S stretches are every prompt and then its K
    answers, best first; all pairs of answers to a prompt are compared.

    -> stretch (N,), the stretch of each target; length (S,), targets of each stretch; better and
    worse (P,), stretches; weight (P,), 2 / (K (K - 1)), so that a prompt counts once; margin (P,)
    """
    lengths, pairs = [], []
    for example in examples:
        first, k = len(lengths) + 1, len(example["stretches"]) - 1
        marks = np.split(example["is_target"], np.cumsum(example["stretches"])[:-1])
        lengths += [np.sum(x) for x in marks]
        more = 2 / (k * (k - 1)), example.get("margin", 0.0)
        pairs += [(i, j, *more) for i, j in itertools.combinations(range(first, first + k), 2)]
    length = torch.tensor(lengths, dtype=torch.float32, device=device)
    stretch = torch.tensor(np.repeat(np.arange(len(lengths)), lengths), dtype=int, device=device)
    columns = torch.tensor(pairs, dtype=torch.float32, device=device).reshape(-1, 4).T
    return stretch, length, columns[0].long(), columns[1].long(), *columns[2:]


def sum_stretches(logps, stretch, length):
    """log p of targets (N,) -> their sum in every stretch (S,)"""
    return torch.zeros_like(length).index_add(0, stretch, logps)


def describe_run(train_set, steps: list[list[int]], args, device, dtype) -> None:
    """The first line of a run, and warnings where batches do not suit the data."""
    sample = [train_set[numbers]["input_ids"] for numbers in steps[:: max(1, len(steps) // 20)]]
    passes = sum(len(plan_passes(list(map(len, ids)), args)) for ids in sample)
    tokens = sum(len(x) for ids in sample for x in ids) / max(1, passes)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    length = f" ({args.epochs:g} epochs of {len(train_set):,})" if args.max_steps is None else ""
    say(f"{len(steps):,} steps of {args.batch_size} examples{length}, about {tokens:,.0f} tokens "
        f"per forward pass, {where}, {str(dtype).removeprefix('torch.')}")  # fmt: skip
    if args.demo or args.max_steps is not None:
        return
    if len(steps) < 30:
        say("warning: few steps. Try a smaller --batch-size, more --epochs or a higher --lr")
    elif tokens < args.micro_batch_tokens / 2:
        say("warning: forward passes are less than half full. A larger --batch-size may be faster")


def inspect_examples(train_set, tokenizer) -> None:
    """Print the first examples, a line for every stretch of context or target tokens."""
    for n in range(min(3, len(train_set))):
        ids, marks, stretches = (train_set[n][x] for x in ("input_ids", "is_target", "stretches"))
        print(f"--- example {n + 1}: {len(ids)} tokens, {marks.sum()} of them targets ---")
        edges = sorted({0, *(np.flatnonzero(np.diff(marks)) + 1), *np.cumsum(stretches)})
        for first, last in zip(edges, edges[1:]):
            tokens = [tokenizer.decode([token]) for token in ids[first:last]]
            if "\ufffd" in "".join(tokens):  # parts of a character: the vocabulary's spelling
                tokens = tokenizer.convert_ids_to_tokens(ids[first:last].tolist())
            kind = "TARGET " if marks[first] else "context"
            print(f"{kind} {last - first:4d}  {'|'.join(tokens)!r}")


# ---------------------------------------------------------------------------------- 5. Model


def setup(args) -> tuple[torch.device, torch.dtype]:
    """Check --output, pick the device, join the other ranks, seed. -> (device, compute dtype)"""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        raise UserError(f"torch {torch.__version__} is too old: pip install 'torch>=2.11'")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if not (args.inspect or args.chat):
        check_output(args)
    cuda, device = torch.cuda.is_available(), torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape
    # FSDP2 needs a process group, also on one GPU
    alone = getattr(args, "offload", False) or getattr(args, "shard", False)
    if (RANKS > 1 or alone) and not dist.is_initialized():
        options = {"timeout": timedelta(hours=4)}  # while rank 0 tokenises or saves
        if RANKS == 1:
            options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **options)
    torch.manual_seed(args.seed)
    fast = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    auto = torch.bfloat16 if fast else torch.float32
    return device, auto if args.dtype == "auto" else getattr(torch, args.dtype)


def seed_step(args, step: int) -> None:
    """Random numbers (dropout, noise) are a function of seed, step and rank: nothing to save."""
    torch.manual_seed(hash((args.seed, step, RANK)) % 2**63)


def disable_dropout(model) -> None:
    """Of a base: it would hide small differences between passes. The model stays in train mode,
    which gradient checkpointing needs."""
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def broadcast(value):
    """Rank 0's value, on all ranks."""
    values = [value]
    if RANKS > 1:
        dist.broadcast_object_list(values)
    return values[0]


def pretrained(auto_class, name: str, **options):
    """auto_class.from_pretrained, with a UserError where it fails."""
    adapter = Path(name) / "adapter_config.json"
    if adapter.exists() and not (Path(name) / "config.json").exists():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise UserError(f"--model {name} is an adapter: use --adapter {name} --model {base}")
    try:
        return auto_class.from_pretrained(name, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a broken folder fails in many ways
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        where = "" if Path(name).is_dir() else "no such folder, and loading from the Hub failed: "
        raise UserError(f"--model {name}: {where}{reason}") from error


def load_model(
    args, dtype, device, weights=None, shard: bool = False, offload: bool = False,
    load_in_4bit: bool = False, method=None, vocab_size: int = 0,
):  # fmt: skip
    """A causal LM that computes in dtype, with `model.target_logps` bound to it (section 7). With
    method, a function: a model with one score per sequence, and this bound to it instead.

    weights: the dtype in which weights are kept, if not dtype: float32 where they train.
    shard: each rank keeps its part (`shard_model`). Rank 0 alone reads the files, the others
    receive. load_in_4bit: the linear layers are frozen in 4 bits, for an adapter. vocab_size: if
    there are fewer embeddings, new ones are added. What sections 6 and 7 assume of a model is
    checked here, by trying.
    """
    weights = None if args.chat else weights
    if load_in_4bit and (shard or weights):
        raise UserError("a base in 4 bits needs an adapter, and excludes --shard and --offload")
    auto_class, options = transformers.AutoModelForCausalLM, {}
    if method:
        auto_class, options = transformers.AutoModelForSequenceClassification, {"num_labels": 1}
    config = pretrained(transformers.AutoConfig, args.model, **options)
    if not method and type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        auto_class = transformers.AutoModelForImageTextToText
    method = method or target_logps
    if RANK == 0:
        options |= {"use_safetensors": True, "output_loading_info": True}
        model, info = pretrained(auto_class, args.model, dtype=weights or dtype, **options)
        # transformers would make them random
        if missing := sorted(set(info["missing_keys"]) - {"score.weight"}):
            raise UserError(f"--model {args.model}: its files lack the weights {missing[0]}")
    else:
        with torch.device("meta"):
            model = auto_class.from_config(config, dtype=weights or dtype)
    if (decoder := language_part(model)) is not model:
        say("a multimodal model: only its language part trains, on text")
        model.base_model.requires_grad_(False)
        decoder.requires_grad_(True)
    if vocab_size > (old := len(model.get_input_embeddings().weight)):
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight.data[old:] = layer.weight.data[:old].float().mean(0)
    bound = types.MethodType(method, model)
    if weights and dtype != weights and not shard:  # uncached, as each weight is used once
        bound = torch.autocast(device.type, dtype=dtype, cache_enabled=False)(bound)
    setattr(model, method.__name__, bound)
    if not args.no_packing:
        model.set_attn_implementation("stretches")
    make_lean(model)
    if load_in_4bit:  # layer by layer: 16 bits a weight may not fit on the GPU
        for name in find_targets(model, "all-linear"):
            model.set_submodule(name, Linear4bit(model.get_submodule(name), device))
    if RANK == 0:
        model.to("cpu" if shard else device)
        if method is target_logps and not args.chat:
            check_model(model, args, exact=dtype == torch.float32)
    if shard:
        shard_model(model, dtype, device, offload, method.__name__)
    elif RANKS > 1:
        if RANK > 0:
            model.to_empty(device=device)
            model.tie_weights()  # .to_empty() unties
        states = [layer.state for layer in model.modules() if isinstance(layer, Linear4bit)]
        scales = [x for state in states for x in (state.absmax, state.state2.absmax, state.offset)]
        for tensor in [*model.parameters(), *model.buffers(), *scales]:
            dist.broadcast(tensor.data, 0)
    if args.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.23
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        for block in blocks(model)[args.gradient_checkpointing :]:
            block.gradient_checkpointing = False
    return model.train()


def language_part(model):
    """What text runs through: the decoder of a multimodal model, another model as a whole."""
    return model if model.config.get_text_config() is model.config else model.get_decoder()


def blocks(model) -> list[nn.Module]:
    """The decoder blocks, in order."""
    modules = language_part(model).modules()
    return [module for module in modules if isinstance(module, GradientCheckpointingLayer)]


def shard_model(model, dtype, device, offload: bool, method: str) -> None:
    """FSDP2 (ZeRO-3): each of W ranks keeps 1/W of every parameter. A block is gathered in dtype
    just before it runs and freed after; gradients are summed over ranks, not averaged. With
    offload, weights, gradients and optimizer states are in host memory."""
    state = model.state_dict() if RANK == 0 else {}
    buffers = dict(model.named_buffers())
    model.to("meta")
    model.tie_weights()  # before sharding, or ranks would shard different groups
    precision = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    options = {"mesh": init_device_mesh(device.type, (RANKS,)), "mp_policy": precision}
    if offload:
        options["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for module in [*blocks(model), model]:  # the model last: embeddings, last norm, head
        fsdp.fully_shard(module, **options)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device="cpu" if offload else device)
    model.tie_weights()
    dcp.set_model_state_dict(model, state, options=LOAD)
    for name, buffer in model.named_buffers():  # rotary frequencies are in no state dict
        buffer.data = (buffers[name] if RANK == 0 else buffer).to(device)
        dist.broadcast(buffer, 0)
    fsdp.register_fsdp_forward_method(model, method)  # gathers the head for the loss


class Linear4bit(nn.Linear):
    """A linear layer frozen in 4 bits a weight, as qlora.py explains them, by bitsandbytes."""

    def __init__(self, layer: nn.Linear, device):
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a package is missing on CPUs
        import bitsandbytes  # loads CUDA libraries: only if needed

        if device.type == "cpu" and layer.in_features % 64:  # bitsandbytes 0.50 gets it wrong
            size = layer.in_features
            raise UserError(f"4 bits on a CPU: a layer's {size} inputs are no multiple of 64")
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        w = layer.weight.data
        w = torch.zeros_like(w, device=device) if w.is_meta else w.to(device).contiguous()
        kind = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": True}
        packed, self.state = bitsandbytes.functional.quantize_4bit(w, **kind)
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), layer.bias
        self.product = bitsandbytes.matmul_4bit

    def forward(self, x):
        return self.product(x, self.weight, self.state, bias=self.bias)


LINEAR = nn.Linear, Linear4bit  # not their other subclasses: routers, say

# Checkpoints have whole tensors of what trains, on rank 0's CPU.
SAVE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
LOAD = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=RANKS > 1, strict=False)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, all (..., f). Keeps gate and up; silu is computed again in backward."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def lean_norm(self, x):
    """RMSNorm through PyTorch's own function: on a GPU one kernel without float32 copies."""
    y = F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.variance_epsilon)
    # under autocast every layer that reads y would cast it for itself, and keep its own copy
    kind = x.device.type
    return y.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else y


def lean_mlp(self, x):
    return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


@torch.no_grad()
def make_lean(model) -> None:
    """Give norms and MLPs `lean_norm` and `lean_mlp` where these compute the same: not Gemma's
    norm, or an MLP with another activation or with dropout. Rank 0 tries one of each class."""
    found = {}
    for module in model.train().modules():
        mlp = isinstance(getattr(module, "gate_proj", None), nn.Linear)
        takes_x = len(inspect.signature(module.forward).parameters) == 1  # not norms with a gate
        if takes_x and (mlp or hasattr(module, "variance_epsilon")):
            found.setdefault((type(module), lean_mlp if mlp else lean_norm), []).append(module)
    for (_, lean), modules in found.items():
        equal = False
        if RANK == 0:
            weight = getattr(modules[0], "gate_proj", modules[0]).weight
            x = torch.linspace(-3, 3, 2 * weight.shape[-1]).view(2, -1).to(weight)
            own, y = modules[0](x).float(), lean(modules[0], x).float()
            equal = (own - y).abs().max() <= 4 * torch.finfo(weight.dtype).eps * own.abs().max()
        for module in modules if broadcast(bool(equal)) else ():
            module.forward = types.MethodType(lean, module)


@torch.no_grad()
def check_model(model, args, exact: bool) -> None:
    """Two documents in one pass must get the log-probabilities that the model itself gives to
    each alone: its head has no step that `target_logps` does not know, and nothing leaks."""
    device, expected = model.get_input_embeddings().weight.device, []
    documents = [np.arange(first, last) * 5 % 17 + 3 for first, last in ((0, 12), (12, 21))]
    examples = [{"input_ids": ids, "is_target": np.arange(len(ids)) > 0} for ids in documents]
    problem = f"{type(model).__name__} is not supported: "
    with own_attention(model.eval()):
        for ids in (torch.tensor(document, device=device) for document in documents):
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            expected.append(-F.cross_entropy(logits, ids[1:], reduction="none"))
    try:
        found = model.target_logps(**collate(examples, args.no_packing, device))
        # in bfloat16 single values differ by some per cent between shapes: compare the mean
        difference, size = (x.abs().mean() for x in (found - torch.cat(expected), found))
        if difference <= (1e-5 if exact else 0.02) * size:
            return
        problem += f"log-probabilities differ by {difference:.3g} nats from the model's own"
    except (NotImplementedError, TypeError, ValueError, KeyError, AttributeError) as error:
        problem += str(error)
    raise UserError(problem + ("" if args.no_packing else "; --no-packing may help"))


# ------------------------------------------------------------------------------ 6. Attention


with suppress(ImportError):  # an old torch, which `setup` refuses
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.13's must be told of grouped heads; 2.11's has no such option
    GROUPED = {"enable_gqa": True} if "enable_gqa" in str(inspect.signature(varlen_attn)) else {}


def stretch_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None,
    stretches=None, prefix=None, **others,
):  # fmt: skip
    """Causal attention inside every stretch of a packed sequence, and to the stretch it reads.

    A transformers attention function. query (1, H, T, head_dim), key and value (1, H_kv, T,
    head_dim), stretches: Stretches -> (1, T, H, head_dim), None. No (T, T) mask exists. prefix: a
    (key, value) of P positions for each layer, put before the sequence's, where key_index counts.
    Raises on what it does not know (soft-capping, sinks), and without stretches: padded examples
    and generation need `own_attention`.
    """
    unknown = {name for name in others if others[name] is not None and others[name] is not False}
    unknown -= {"position_ids", "use_cache", "cache_position", "output_attentions"}
    wrong = attention_mask is not None or stretches is None or not getattr(module, "is_causal", 1)
    if unknown or wrong:
        raise NotImplementedError(f"packed attention does not support {unknown or 'this mask'}")
    if torch.is_autocast_enabled(query.device.type):  # rotary embedding made float32 of them
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if prefix is not None:
        key, value = (torch.cat(x, dim=2) for x in zip(prefix[module.layer_idx], (key, value)))
    head_dim, longest_key = query.shape[-1], stretches.longest[1]
    window = sliding_window if sliding_window and sliding_window < longest_key else None
    flash = query.is_cuda and query.dtype != torch.float32 and not dropout
    flash = flash and head_dim == value.shape[-1] <= 256 and head_dim % 8 == 0
    if flash and torch.cuda.get_device_capability(query.device)[0] >= 8:
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (T, H, head_dim)
        if stretches.key_index is not None:
            k, v = k[stretches.key_index], v[stretches.key_index]
        bounds = stretches.query_ends, stretches.key_ends, *stretches.longest
        side = (window - 1 if window else -1, 0)
        return varlen_attn(q, k, v, *bounds, scale=scaling, window_size=side, **GROUPED)[None], None

    if stretches.key_index is not None:
        key, value = (x.index_select(2, stretches.key_index) for x in (key, value))
    out, options = [], {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    keys, values = (x.split(stretches.key_lengths, dim=2) for x in (key, value))
    for q, k, v in zip(query.split(stretches.lengths, dim=2), keys, values):
        mask, behind = None, k.shape[2] - q.shape[2]
        if window or behind:  # causal from the bottom right
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            mask = mask.tril(behind).triu(behind + 1 - (window or longest_key))
        options["is_causal"] = mask is None
        out.append(F.scaled_dot_product_attention(q, k, v, mask, dropout, **options))
    return torch.cat(out, dim=2).transpose(1, 2), None


transformers.AttentionInterface.register("stretches", stretch_attention)


@contextmanager
def own_attention(model):
    """What transformers chooses for the model, temporarily: it takes padding and a cache."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:  # Gemma 2 has eager alone
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


# ---------------------------------------------------------------------- 7. Log-probabilities
#
#   z = W h + b                                     the V logits of one position
#   log p(t) = z_t - log sum_v exp(z_v)
#   d log p(t) / d h = W^T (onehot(t) - softmax(z))
#
# Logits are computed in chunks, and never more than a chunk of them exists. Each log-probability
# depends on the hidden state h of its own position alone, so its gradient is one row of d
# numbers. With a frozen head, the forward pass forms these rows while the logits are at hand,
# and the backward pass only scales them: two products with W in place of three. If W trains,
# the backward pass computes the logits again.

LOGITS_AT_ONCE = 2**25  # elements of a chunk: 128 MiB in float32


def chunk_size(weight, trains: bool = False) -> int:
    """Positions of a chunk, a multiple of 128 for the GPU's products. If W trains, at least d / 4:
    each chunk reads and writes the V d numbers of its gradient."""
    size = max(1, LOGITS_AT_ONCE // len(weight), weight.shape[1] // 4 if trains else 0)
    return size // 128 * 128 or size


def chunk_logps(hidden, weight, bias, targets, softcap, with_slope: bool):
    """hidden (C, d), targets (C,) -> log p(targets) (C,), float32, and d log p / d z (C, V), which
    overwrites the logits, or None. softcap: z becomes softcap * tanh(z / softcap) (Gemma 2)."""
    z = F.linear(hidden, weight, bias).float()
    if softcap:
        tanh = torch.tanh(z / softcap)
        z = softcap * tanh
    target, largest = z.gather(1, targets[:, None]), z.amax(1, keepdim=True)
    total = z.sub_(largest).exp_().sum(1, keepdim=True)
    logps = (target - largest - total.log()).squeeze(1)
    if not with_slope:
        return logps, None
    slope = z.div_(-total).scatter_add_(1, targets[:, None], torch.ones_like(total))
    return logps, slope.mul_(1 - tanh**2) if softcap else slope


class LinearLogps(torch.autograd.Function):
    """log p(targets) (N,) under softmax(head(hidden)), float32, without all logits.
    hidden (N, d), weight (V, d), bias (V,) or None."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, softcap=None):
        ctx.trains, ctx.softcap = any(ctx.needs_input_grad[1:3]), softcap
        with_rows = ctx.needs_input_grad[0] and not ctx.trains
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        rows = torch.empty_like(hidden) if with_rows else None  # d log p / d h
        head, size = (weight, bias), chunk_size(weight, ctx.trains)
        for n in range(0, len(hidden), size):
            part = slice(n, n + size)
            logps[part], slope = chunk_logps(hidden[part], *head, targets[part], softcap, with_rows)
            if with_rows:
                rows[part] = slope.to(weight.dtype) @ weight
        ctx.save_for_backward(*((hidden, weight, bias, targets) if ctx.trains else (rows,)))
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # (N,)
        if not ctx.trains:
            (rows,) = ctx.saved_tensors
            return rows * grad[:, None].to(rows.dtype), None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        head, size = (weight, bias), chunk_size(weight, trains=True)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for n in range(0, len(hidden), size):
            part = slice(n, n + size)
            _, slope = chunk_logps(hidden[part], *head, targets[part], ctx.softcap, True)
            slope = slope.mul_(grad[part, None]).to(weight.dtype)
            grad_hidden[part] = slope @ weight
            grad_weight += slope.T @ hidden[part]
            if bias is not None:
                grad_bias += slope.sum(0)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, None, None


def target_logps(model, input_ids, targets, target_index, temperature=1.0, **inputs):
    """log p of each target token in nats, called as `model.target_logps(**batch)`.

    input_ids (B, T). target_index (N,): positions in the flattened (B * T,) whose next token is
    in targets (N,). Other inputs (stretches, position_ids, attention_mask ...) go to the
    backbone. The distribution is softmax(logits / temperature). -> (N,) float32, differentiable.
    """
    hidden = model.base_model(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
    hidden = hidden.flatten(0, 1).index_select(0, target_index)  # (B, T, d) -> (N, d)
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / temperature  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    softcap = softcap and softcap / temperature
    kind, weight = hidden.device.type, head.weight
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    hidden, bias = (x if x is None else (x * scale).to(dtype) for x in (hidden, head.bias))
    with torch.autocast(kind, enabled=False):
        return LinearLogps.apply(hidden, weight.to(dtype), bias, targets, softcap)


# --------------------------------------------------------------------------------- 8. Saving


def find_targets(model, targets: str, flag: str = "--targets") -> list[str]:
    """-> names of the linear layers to adapt, of a multimodal model's language part alone.

    targets: "all-linear", which leaves out the output head; names with commas between them, each
    the end of a layer's name; or one regular expression for whole names, as in PEFT. Every name
    must match.
    """
    heads = (model.get_output_embeddings(), getattr(model, "score", None))
    inside = {m for m in language_part(model).modules() if type(m) in LINEAR and m not in heads}
    layers = [name for name, module in model.named_modules() if module in inside]
    if not layers:
        problem = "has no nn.Linear layers (GPT-2's Conv1D is none): full_ft.py trains it"
        raise UserError(f"{type(model).__name__} {problem}")
    is_regex, chosen = re.search(r"[*+?|()\[\]^$\\]", targets), set()
    for name in [targets] if is_regex else map(str.strip, targets.split(",")):
        pattern = name if is_regex else rf"(.*\.)?{re.escape(name)}"
        pattern = ".*" if name == "all-linear" else pattern
        found = [layer for layer in layers if re.fullmatch(pattern, layer)]
        if not found:
            known = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
            raise UserError(f"{flag}: {name!r} matches no linear layer; the model has {known}")
        chosen.update(found)
    return [layer for layer in layers if layer in chosen]


def add_adapter_flags(parser, prefix="", rank=16, shard=True, add_tokens=False) -> None:
    """The flags of LoRA and its kin. prefix: "lora-" where training all weights is the default."""
    add = parser.add_argument_group("LoRA").add_argument
    zero = "; 0: train all parameters" if prefix else ""
    add(f"--{prefix}rank", dest="rank", type=int, default=rank, help=f"rank of the update{zero}")
    scale = "the update is scaled by alpha / rank"
    add(f"--{prefix}alpha", dest="alpha", type=float, default=32.0, help=scale)
    add(f"--{prefix}dropout", dest="dropout", type=float, default=0.0, help="of the update's input")
    where = "layers to adapt: all-linear (not the head), q_proj,v_proj or a regular expression"
    add("--targets", default="all-linear", help=where)
    start = "start from this adapter, ours or PEFT's, with its rank, alpha and targets"
    add("--adapter", metavar="FOLDER", help=start)
    if add_tokens:
        new = "tokens to add, whose embeddings train; special if the chat template writes them"
        add("--add-tokens", nargs="+", default=[], metavar="TOKEN", help=new)
    if shard:
        add("--shard", action="store_true", help="under torchrun, split the weights over the GPUs")
    if not prefix:
        add("--merge-only", action="store_true", help="merge --adapter into --model, save and exit")


class NewRows(nn.Module):
    """A frozen embedding or output head in which the rows of some tokens train. Reading `weight`
    makes a copy of all V rows."""

    bias = property(lambda self: self.base.bias)  # of a head

    def __init__(self, base: nn.Module, ids: list[int]):
        super().__init__()
        rows = whole(base.weight.detach())[ids].float()
        self.token_adapter = nn.ParameterDict({"trainable_tokens_delta": rows})  # PEFT's name
        self.base, self.ids = base, ids

    @property
    def weight(self):
        rows, ids = self.token_adapter["trainable_tokens_delta"], torch.tensor(self.ids)
        w = self.base.weight
        return w.index_copy(0, ids.to(w.device), rows.to(w.dtype))

    def forward(self, x):
        return torch.func.functional_call(self.base, {"weight": self.weight}, (x,))

    def merged(self) -> nn.Module:
        self.base.weight.data = self.weight.detach()  # the same tensor in a tied head
        return self.base


def add_new_rows(model, args, tokenizer, config: dict) -> dict:
    """Train the embeddings of tokens, and their rows of the head: tokens that --adapter's config
    names, those of --add-tokens, and those the model lacks. -> the field of PEFT's config. A tied
    head shares the rows, and is not in it."""
    old = config.get("trainable_token_indices") or []
    old = sum(old.values(), []) if isinstance(old, dict) else old
    known = pretrained(transformers.AutoConfig, args.model).get_text_config().vocab_size
    added = tokenizer.convert_tokens_to_ids(args.add_tokens)
    ids = list(dict.fromkeys([*old, *added, *range(known, len(tokenizer))]))
    if not ids:
        return {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = [name for name, layer in model.named_modules() if layer in (embedding, head)]
    tied = head.weight is embedding.weight
    for name in names:
        model.set_submodule(name, NewRows(model.get_submodule(name), ids))
    if tied:
        model.get_output_embeddings().token_adapter = model.get_input_embeddings().token_adapter
    names = [name.rpartition(".")[2] for name in names[: 1 if tied else 2]]
    return {"trainable_token_indices": dict.fromkeys(names, ids)}


def add_adapter(model, args, layer, device, tokenizer=None) -> dict:
    """Freeze the model and put layer(linear, rank, alpha, dropout) around every layer of
    --targets, or as --adapter has it, with its tensors. With a tokenizer, new tokens train too.
    -> fields of PEFT's LoraConfig"""
    config, tensors, targets, flag = {}, {}, args.targets, "--targets"
    rank, alpha = args.rank, args.alpha
    if args.adapter:
        config, tensors = load_adapter(args.adapter, model, "LORA")
        tensors.pop("score.weight", None)  # the head of a reward model, which its script reads
        rank, alpha = config["r"], float(config["lora_alpha"])
        if config.get("use_rslora"):  # alpha / sqrt(r) is alpha * sqrt(r) / r
            alpha *= math.sqrt(rank)
        names = [name.removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name]
        targets, flag = ",".join(names), f"--adapter {args.adapter}"
    adapted = find_targets(model, targets, flag)
    usual = [m.weight for m in model.modules() if type(m) in LINEAR or isinstance(m, nn.Embedding)]
    reached, unreached = set(map(id, usual)), Counter()  # unreached: fused experts, say
    for name, p in language_part(model).named_parameters():
        if p.dim() > 1 and id(p) not in reached:
            unreached[".".join(name.split(".")[-2:])] += p.numel()
    if unreached:
        count = f"{unreached.total():,} parameters in no nn.Linear"
        say(f"no adapter reaches {', '.join(unreached)}: {count}")
    model.requires_grad_(False)
    more = add_new_rows(model, args, tokenizer, config) if tokenizer else {}
    for name in adapted:
        new = layer(model.get_submodule(name), rank, alpha, args.dropout)
        model.set_submodule(name, new)
    fill_adapter(model, args, tensors, device, f"in {len(adapted)} layers")
    return more | {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "lora_dropout": args.dropout,
        "target_modules": target_modules(adapted, model), "bias": "none",
    }  # fmt: skip


def target_modules(adapted: list[str], model) -> list[str]:
    """Layers as in PEFT's config: by the last part of their names, if no other module has it."""
    short = {name.rpartition(".")[2] for name in adapted}
    alike = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short if alike == set(adapted) else adapted)


def fill_adapter(model, args, tensors: dict, device, where: str) -> None:
    """Give what trains the values of --adapter's tensors, and all ranks the same ones."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # rows of tokens that came after --adapter, such as a pad token, keep their start
    shapes = {x: p.shape for x, p in trained.items() if x in tensors or "token_adapter" not in x}
    if args.adapter and shapes != {name: x.shape for name, x in tensors.items()}:
        odd = sorted(tensors.keys() - shapes) or sorted(shapes.keys() - tensors) or ["shapes"]
        raise UserError(f"--adapter {args.adapter} does not fit this script and model: {odd[0]}")
    for name, p in trained.items():
        p.data = tensors.get(name, p.data).to(device, p.dtype)
        if RANKS > 1:  # GPUs may differ in random numbers
            dist.broadcast(p.data, 0)
    sizes = [p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters()]
    total, count = sum(sizes), sum(p.numel() for p in trained.values())  # 4 bits: two in a byte
    say(f"{count:,} of {total:,} parameters train ({count / total:.2%}), {where}")


def whole(tensor):
    """A sharded tensor, gathered from all ranks; another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fingerprint(model) -> str:
    """A hash that identifies a base model: its sizes, and every 64th of the first 8192 rows of its
    input embedding in bfloat16. New tokens come behind them."""
    names = "model_type hidden_size intermediate_size num_hidden_layers".split()
    sizes = [getattr(model.config.get_text_config(), name, None) for name in names]
    embedding = model.get_input_embeddings()  # perhaps NewRows
    rows = whole(getattr(embedding, "base", embedding).weight.detach())[:8192:64]
    rows = rows.to(torch.bfloat16).cpu().view(torch.int16)
    return hashlib.sha256(json.dumps(sizes).encode() + rows.numpy().tobytes()).hexdigest()[:32]


# Parts of other tools' adapters that are not read.
UNREAD = """fan_in_fan_out rank_pattern alpha_pattern modules_to_save bias lora_bias
target_parameters layer_replication alora_invocation_tokens""".split()


def load_adapter(folder: str, model, *peft_types: str, reads=(), flag: str = "--adapter"):
    """-> (config and metadata, tensors by parameter name) of an adapter, ours or PEFT's. Refused
    if it was trained on another base, or has parts that these scripts do not train. reads: those
    of UNREAD that the caller reads."""
    try:
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        with safetensors.safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{flag} {folder} cannot be read: {error}") from error
    if config.get("peft_type") not in peft_types:
        kinds = " or ".join(peft_types)
        raise UserError(f"{flag} {folder} is {config.get('peft_type')}, not {kinds}")
    reads = (*reads, "modules_to_save") if hasattr(model, "score") else reads  # the head
    parts = [key for key in UNREAD if key not in reads]
    unread = [key for key in parts if config.get(key) not in (*EMPTY, False, "none")]
    if config.get("init_lora_weights") not in (None, True, False, "gaussian"):
        unread.append(f"init_lora_weights {config['init_lora_weights']}")  # changes the base, too
    if unread:
        raise UserError(f"{flag} {folder} has {unread[0]}, which this script does not support")
    base = metadata.get("base_fingerprint")
    if base is None:
        say(f"{folder} has no base fingerprint: assuming that --model is its base")
    elif base != fingerprint(model):
        name = config.get("base_model_name_or_path")
        raise UserError(f"{flag} {folder} was trained on another base: {name}")
    tensors = {name.removeprefix("base_model.model."): x for name, x in tensors.items()}
    return config | metadata, tensors


def save_tokenizer(model, tokenizer, folder: Path) -> None:
    """With generation_config.json. eos is what ends an answer: bases name another token than
    their template's end of turn, or none."""
    if model.can_generate():  # not a reward model
        config, stop = model.generation_config, stop_ids(model, tokenizer)
        own = config.eos_token_id
        if stop[0] not in (own if isinstance(own, list) else [own]):
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop[0])
        config.eos_token_id = stop if len(stop) > 1 else stop[0]
        config.pad_token_id = tokenizer.pad_token_id
        try:
            config.validate(strict=True)
        except ValueError:  # some bases set a temperature but forget do_sample
            config.do_sample = True
        config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_adapter(args, model, tokenizer, config: dict, tensors=None, **metadata: str) -> None:
    """What trains, or tensors by name, as an adapter folder in PEFT's form. config: fields of its
    config."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors = tensors or {f"base_model.model.{name}": p for name, p in trained.items()}
    tensors = {name: whole(x.detach()).cpu().contiguous() for name, x in tensors.items()}
    metadata |= {"format": "pt", "base_fingerprint": fingerprint(model)}
    base = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
    config = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base, **config}

    def write(folder: Path) -> None:
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata)
        text = json.dumps(config | {"inference_mode": True}, indent=2)
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")

    flags = "--model", args.model, "--adapter", args.output
    write_result(args, model, tokenizer, write, "adapter", *flags)


def save_model(args, model, tokenizer, dtype: torch.dtype, base: str | None = None) -> None:
    """A Hugging Face folder with weights in dtype, gathered on rank 0. base: its fingerprint; if
    given, what trains is also saved alone, in trained.safetensors."""
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp.get_model_state_dict(model, options=options)
    once = dict([*model.named_parameters(), *model.named_buffers()])  # without a tied head
    state = {name: x for name, x in state.items() if name in once}
    state = {name: x.to(dtype) if x.is_floating_point() else x for name, x in state.items()}
    model.config.get_text_config().vocab_size = len(model.get_input_embeddings().weight)

    def write(folder: Path) -> None:
        with own_attention(model):  # other programs do not know ours
            model.save_pretrained(folder, state_dict=state)
        text = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text["dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(text, indent=2), encoding="utf-8")
        for kind in ("preprocessor", "processor", "video_preprocessor"):  # of a multimodal model
            with suppress(OSError):
                found = transformers.utils.cached_file(args.model, f"{kind}_config.json")
                shutil.copy(found, folder)
        if base:
            names = [name for name, p in model.named_parameters() if p.requires_grad]
            trained, metadata = {n: state[n] for n in names}, {"base_fingerprint": base}
            safetensors.torch.save_file(trained, folder / "trained.safetensors", metadata)

    write_result(args, model, tokenizer, write, "model", "--model", args.output)


def add_old_names(folder: Path) -> None:
    """Settings that transformers 5 has renamed, also under the names that 4 reads. It would not
    know the tokenizer's class, and silently take its default rope_theta."""
    for path in folder.glob("*config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        for part in (config, config.get("text_config") or {}):
            rope = dict(part.get("rope_parameters") or {})
            if str(part.get("model_type")).startswith("gemma3") and "full_attention" in rope:
                part["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
                rope = dict(rope["full_attention"])
            if any(isinstance(x, dict | None) for x in rope.values()):
                continue  # transformers 4 has no other model with several
            top = {"rope_theta", "partial_rotary_factor"} & rope.keys()
            part |= {key: rope.pop(key) for key in top}
            kind = rope.pop("rope_type", "default")
            more = {key: x for key, x in rope.items() if key != "type" and key not in part}
            if more or kind != "default":
                part["rope_scaling"] = {"type" if kind == "longrope" else "rope_type": kind} | more
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def results_in(folder: Path) -> list[Path]:
    """Files that make a folder a model or an adapter to other programs."""
    patterns = """adapter_* config.json generation_config.json model*.safetensors*
    trained.safetensors *.jinja""".split()
    return [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]


def write_result(args, model, tokenizer, write, what: str, *flags: str) -> None:
    """The tokenizer and write(temporary folder) on rank 0, then move all files into --output in
    place of an old result. A run that is killed leaves no half-written file. flags: of the
    command that chats with the result."""
    folder, temporary = Path(args.output), Path(args.output) / ".unfinished"
    if RANK == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_tokenizer(model, tokenizer, temporary)
        write(temporary)
        add_old_names(temporary)
        for old in results_in(folder):
            old.unlink()
        mode = (temporary / "tokenizer_config.json").stat().st_mode
        for path in sorted(temporary.iterdir()):
            path.chmod(mode)  # safetensors writes for the owner alone
            replace(path, folder / path.name)
        temporary.rmdir()
    if RANKS > 1:
        dist.barrier()  # torchrun would end rank 0 when another rank is done
    say(f"the {what} is in {args.output}")
    if hasattr(args, "chat_tokens") and not args.merge_only:
        flags += ("--system", args.system) if args.system else ()
        flags += ("--merge-system",) if args.merge_system else ()
        say(shlex.join(["python", sys.argv[0], *flags, "--chat"]))


def replace(temporary: Path, path: Path) -> None:
    """Give a written file its name once it is on the disk."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


# -------------------------------------------------------------------------------- 9. The run


def check_output(args) -> None:
    """Refuse an --output that holds an unfinished run or a result, unless told to go on."""
    output = Path(args.output)
    if output.resolve() in [Path(name).resolve() for name in (args.model, args.adapter) if name]:
        raise UserError(f"--output {output} is what this run reads: choose another folder")
    unfinished = (output / "checkpoint").exists()  # made by `start_run`, removed by `Log.done`
    if args.overwrite or args.resume and unfinished:
        return
    if unfinished:
        choices = "--resume continues it, --overwrite replaces it"
        raise UserError(f"--output {output} holds an unfinished run: {choices}")
    if found := results_in(output):
        raise UserError(f"--output {output} holds {found[0].name}: --overwrite replaces it")


def decay_groups(model, args) -> list[dict]:
    """Optimizer groups of what trains: weight decay on matrices, none on biases and norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in trained if (p.dim() > 1) == kind] for kind in (True, False))
    groups = [{"params": matrices, "weight_decay": args.weight_decay}]
    return groups + ([{"params": vectors, "weight_decay": 0.0}] if vectors else [])


def learning_rate(step: int, total: int, args) -> float:
    """Of update `step`, from 1: linear warmup, whose first update is not at 0, then a cosine."""
    warmup = math.ceil(args.warmup_ratio * total)
    if step <= warmup:
        return args.lr * step / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / (total - warmup)))


def sum_gradients(model) -> None:
    """Sum replicated parameters' gradients over ranks, in one message (FSDP2 sums its own), and
    fail if a trainable parameter got none."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if lost := [name for name, p in trained.items() if p.grad is None]:
        raise UserError(f"{len(lost)} trainable parameters get no gradient, among them {lost[0]}")
    gradients = [p.grad for p in trained.values() if not isinstance(p, DTensor)]
    if RANKS > 1 and gradients:
        flat = sum_over_ranks(nn.utils.parameters_to_vector(gradients))
        nn.utils.vector_to_parameters(flat, gradients)


def sum_over_ranks(tensor):
    if RANKS > 1:
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def evaluating(model):
    """No dropout and no gradients, temporarily."""
    model.eval()
    with torch.no_grad():
        yield
    model.train()
    if isinstance(model, fsdp.FSDPModule):
        model.reshard()  # after a forward pass without a backward


EXCHANGE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def stop_ids(model, tokenizer) -> list[int]:
    """Tokens that end an answer: the template's end of turn, the tokenizer's eos, the model's."""
    own = model.generation_config.eos_token_id
    stop = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    ids, marks = encode_conversation(tokenizer, EXCHANGE)[0]
    last = ids[np.flatnonzero(marks)[-1]]
    if tokenizer.convert_ids_to_tokens(last) in special_tokens(tokenizer):
        stop = [last, *stop]
    return [token for token in dict.fromkeys(stop) if token is not None]


def generate(model, tokenizer, prompts: list[list[int]], device, **settings) -> list[str]:
    """The texts of `generate_ids`."""
    answers = generate_ids(model, tokenizer, prompts, device, **settings)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]


def generate_ids(model, tokenizer, prompts: list, device, streamer=None, **settings) -> list:
    """Answers to prompts, both token ids, in one left-padded batch. An answer ends with its first
    stop token, or is cut off. settings: of GenerationConfig, greedy and 128 tokens by default.
    streamer: transformers', of a single answer."""
    width, size = max(map(len, prompts)), model.config.get_text_config().vocab_size
    pad = min(tokenizer.pad_token_id, size - 1)  # masked; some tokenizers have one too many
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    stop = stop_ids(model, tokenizer)
    settings = {"max_new_tokens": 128, "do_sample": False} | settings
    config = transformers.GenerationConfig(**settings, pad_token_id=pad, eos_token_id=stop)
    options = {"generation_config": config, "synced_gpus": isinstance(model, fsdp.FSDPModule)}
    with evaluating(model), own_attention(model):
        rows = model.generate(input_ids=ids, attention_mask=mask, streamer=streamer, **options)
        rows = rows[:, width:].tolist()
    ends = [next((n + 1 for n, token in enumerate(row) if token in stop), None) for row in rows]
    return [row[:end] for row, end in zip(rows, ends)]


class Log:
    """The progress bar, metrics.jsonl and signals.

    metrics.jsonl has a line for the run, one for every step and evaluation, and a last one
    {"done": true}. A tracker is a line in `write`: wandb.log(entry, step=entry.get("step")), or
    TensorBoard's add_scalar(key, value, entry["step"]) for every number of an entry.
    """

    def __init__(self, args, run: dict, total: int, device):
        """run: see `start_run`. total: steps of the whole run."""
        self.args, self.run, self.total, self.device = args, run, total, device
        self.path, self.pending, self.signal = Path(args.output) / "metrics.jsonl", [], 0
        if RANK == 0:
            with open(self.path, "ab") as file:
                # after --resume: no line past the checkpoint
                file.truncate(min(run["metrics_size"], file.tell()))
        if not run["metrics_size"]:
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            self.write(run={"script": sys.argv[0], "args": vars(args), "ranks": RANKS} | versions)
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self.on_signal)
        options = {"disable": RANK > 0, "mininterval": 0.5 if sys.stderr.isatty() else 10}
        self.bar = tqdm(total=total, initial=run["step"], unit="step", **options)
        self.clock, self.clock_tokens = time.perf_counter(), run["tokens"]

    def on_signal(self, kind: int, frame) -> None:
        self.signal = kind
        signal.signal(kind, signal.SIG_DFL)  # a second one ends the run at once

    def stopped(self) -> int:
        """The signal that any rank has got, or 0. All ranks must ask."""
        agreed = torch.tensor(self.signal)  # on the CPU: the GPU does not wait
        if RANKS > 1:
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return int(agreed)

    def write(self, **entry) -> None:
        if RANK == 0:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                self.run["metrics_size"] = file.tell()

    def step_done(self, examples: dict, loss, lr: float, grad_norm=None, **figures) -> None:
        """loss, figures: this rank's parts, tensors; logged are the sums over ranks."""
        self.run["step"] += 1
        self.run["tokens"] += sum(map(len, examples["input_ids"]))
        entry = {"step": self.run["step"], "lr": lr, "tokens": self.run["tokens"]}
        figures = {"loss": loss} | figures
        norm = torch.zeros_like(loss) if grad_norm is None else whole(grad_norm)
        self.pending.append((entry, [*figures], torch.stack([*figures.values()]), norm))
        self.bar.update()
        if self.run["step"] % 10 == 0 or self.run["step"] == self.total:
            self.flush()

    def flush(self) -> None:
        """Write the pending steps. Reading them waits for the GPU, so `step_done` calls this at
        every tenth step. A loss or a gradient norm that is not finite ends the run."""
        if not self.pending:
            return
        read = [(sum_over_ranks(x).tolist(), norm.item()) for *_, x, norm in self.pending]
        tokens, now = self.run["tokens"], time.perf_counter()
        speed = round((tokens - self.clock_tokens) / (now - self.clock))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10  # of the process
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        more = {"tokens_per_second": speed, "peak_memory_gib": round(memory / 2**30, 3)}
        for (entry, names, *_), (values, norm) in zip(self.pending, read):
            if not math.isfinite(values[0] + norm):
                last = (checkpoints(self.args) or ["none yet"])[-1]
                problem = f"loss {values[0]}, gradient norm {norm}: not finite"
                way_out = f"last checkpoint: {last}. Try a lower --lr"
                raise UserError(f"step {entry['step']}: {problem}; {way_out}")
            self.write(**entry, **dict(zip(names, values)), grad_norm=norm or None, **more)
        self.bar.set_postfix_str(f"loss {values[0]:.3f}, {speed:,} tokens/s", refresh=False)
        self.pending, self.clock, self.clock_tokens = [], now, tokens

    def evaluation(self, **values: float) -> None:
        """Held-out figures, such as loss in nats a token."""
        shown = ", ".join(f"{key} {value:.4f}" for key, value in values.items())
        say(f"step {self.run['step']}: held-out {shown}")
        self.write(step=self.run["step"], **{f"eval_{key}": x for key, x in values.items()})
        self.clock = time.perf_counter()

    def done(self) -> None:
        """The end of the run: everything is written, checkpoints can go."""
        self.write(done=True, step=self.run["step"], tokens=self.run["tokens"])
        if RANK == 0:
            shutil.rmtree(self.path.parent / "checkpoint", ignore_errors=True)


def checkpoints(args) -> list[Path]:
    return sorted(Path(args.output).glob("checkpoint/step-*.pt"))


def save_checkpoint(args, name: str, run: dict, model, optimizers) -> None:
    """checkpoint/NAME.pt: whole tensors of what trains, so that any number of ranks can resume.
    Atomic: a run that is killed leaves the old file or the new one. step-N replaces older ones."""
    weights, states = dcp.get_state_dict(model, optimizers, options=SAVE)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    trained |= {key for key, _ in model.named_buffers()}  # AdaLoRA's importance
    weights = {key: x for key, x in weights.items() if key in trained}  # no frozen tied head
    if not all(x.isfinite().all() for x in weights.values()):
        raise UserError(f"step {run['step']}: weights are not finite. Try a lower --lr")
    path = Path(args.output) / "checkpoint" / f"{name}.pt"
    if RANK == 0:
        try:
            content = {"run": run, "model": weights, "optimizer": states}
            torch.save(content, path.with_suffix(".unfinished"))
        except RuntimeError as error:  # of torch, on a full disk
            raise OSError(f"{path} cannot be written: {error}") from error
        replace(path.with_suffix(".unfinished"), path)
        for old in checkpoints(args)[:-1]:
            old.unlink()
    if RANKS > 1:
        dist.barrier()


# Flags that may change with --resume: they change neither the examples of a step nor its update.
FREE = """model data eval_data skip_bad_rows inspect output patience micro_batch_tokens no_packing
gradient_checkpointing eval_every save_every samples resume overwrite demo merge_only shard
offload chat chat_tokens chat_temperature""".split()


def read_checkpoint(args, name: str, model, optimizers, fixed: dict) -> dict:
    """Load what `save_checkpoint` wrote, from rank 0, after its checksums. -> run"""
    path = Path(args.output) / "checkpoint" / f"{name}.pt"
    content = {"run": None, "model": {}, "optimizer": {}}
    if RANK == 0:
        try:
            damaged = zipfile.ZipFile(path).testzip()
            content = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # a damaged file fails in many ways
            damaged = repr(error)
        if damaged:
            raise UserError(f"{path} is damaged ({damaged:.60}): --overwrite starts over")
    run = broadcast(content["run"])
    for key, now in fixed.items():
        if run["fixed"].get(key) != now:
            was = f", {now}, was {run['fixed'].get(key)}" if key[0] == "-" else ""
            way_out = "To continue with other settings: --adapter OLD (or --model OLD) --output NEW"
            raise UserError(f"--resume: {key} differs from the stopped run's{was}. {way_out}")
    dcp.set_model_state_dict(model, content["model"], options=LOAD)
    dcp.set_optimizer_state_dict(model, optimizers, content["optimizer"], options=LOAD)
    for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
        for p, state in optimizer.state.items() if getattr(optimizer, "is_paged", False) else ():
            for key in {"state1", "state2"} & state.keys():  # bitsandbytes': now not paged
                buffer = optimizer.get_state_buffer(p, state[key].dtype)
                state[key] = buffer.copy_(state[key])
    return run


def start_run(args, model, optimizers, train_set, steps: list[list[int]]) -> dict:
    """With --resume, continue from the newest checkpoint in --output.

    -> run, which a checkpoint keeps: steps and tokens so far, the size of metrics.jsonl,
    best_loss (held out) and best_step, and in `fixed` what may not differ after --resume.
    """
    digests = train_set["digest"][:][[n for numbers in steps for n in numbers]]
    fixed = {f"--{key.replace('_', '-')}": x for key, x in vars(args).items() if key not in FREE}
    fixed["the training data"] = hashlib.sha256(digests.tobytes()).hexdigest()
    fixed["the base model"] = fingerprint(model)
    found = broadcast([path.stem for path in checkpoints(args)])
    if args.resume and found:
        run = read_checkpoint(args, found[-1], model, optimizers, fixed)
        say(f"resumed after step {run['step']}")
        return run
    if RANK == 0:  # `check_output` takes this folder for an unfinished run
        shutil.rmtree(Path(args.output) / "checkpoint", ignore_errors=True)
        (Path(args.output) / "checkpoint").mkdir(parents=True, exist_ok=True)
    zero = {"step": 0, "tokens": 0, "metrics_size": 0}
    return zero | {"best_loss": math.inf, "best_step": 0, "fixed": fixed}


def exit_stopped(step: int, kind: int) -> None:
    """After the checkpoint that a signal asked for: exit with 130 (SIGINT) or 143 (SIGTERM)."""
    say(f"stopped by a signal after step {step}: --resume continues from here")
    sys.exit(128 + kind)


def chat(model, tokenizer, args, device, placeholders: list[int] = ()) -> None:
    """Answer the lines of standard input: in a terminal as a conversation, else each by itself, as
    JSON rows {"prompt", "completion"}. placeholders: ids that come before every prompt."""
    settings, turns, terminal = {"max_new_tokens": args.chat_tokens}, [], sys.stdin.isatty()
    if args.chat_temperature:
        settings |= {"do_sample": True, "temperature": args.chat_temperature}
    if terminal:
        import readline  # noqa: F401 (arrow keys and a history in input)

        say("An empty line starts a new conversation; Ctrl-D ends.")
        lines = iter(lambda: input("> ").strip(), None)
        show = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        settings["streamer"] = show
    else:
        lines = (line.strip() for line in sys.stdin if line.strip())
    with suppress(EOFError, *[KeyboardInterrupt] * terminal):
        while prompts := list(itertools.islice(lines, 1 if terminal else 32)):
            if prompts == [""]:
                turns = []
                continue
            asked = [[*turns, to_message(prompt, "user")] for prompt in prompts]
            ids = [encode_prompt(tokenizer, complete_turns(x, vars(args)))[0] for x in asked]
            ids = [[*placeholders, *prompt] for prompt in ids]
            texts = generate(model, tokenizer, ids, device, **settings)
            if terminal:
                turns = [*asked[0], to_message(texts[0], "assistant")]
                continue
            for prompt, text in zip(prompts, texts):
                row = {"prompt": prompt, "completion": text}
                print(json.dumps(row, ensure_ascii=False), flush=True)
    if terminal:
        print()

"""What every script needs and no method owns: the command line, data, model loading, log-probabilities, and the run.

Read it in order; each section uses only what stands above it.

    1. The command line       the flags all scripts share, and how errors reach the user
    2. Rows                   files and Hub data sets -> checked rows, each with its file and line
    3. Tokens and targets     a row -> token ids, and which of them the loss is taken on
    4. Batches                held-out split, mixing, packing, and an order that survives a restart
    5. Model                  device, tokenizer, weights, gradient checkpointing
    6. Attention              one attention per document of a packed row
    7. Log-probabilities      of target tokens, without ever holding (tokens x vocabulary) logits
    8. Files                  adapters in PEFT's form and Hugging Face folders, never half-written
    9. The run                learning rate, evaluation, samples, metrics, checkpoints, signals

Nothing here knows a fine-tuning method: modules and losses stand in the scripts.
"""

import argparse
import csv
import fcntl
import gc
import hashlib
import inspect
import io
import json
import math
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
import types
import weakref
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pyarrow.parquet as parquet
import safetensors.torch
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

# ---------------------------------------------------------------------------------------------- 1. The command line


class UserError(Exception):
    """Something the user can mend. `launch` prints it as one line that begins `error:` and exits with code 2."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults behind the help texts, but no None: there the text itself says what holds."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Arguments(argparse.Namespace):
    """The values of all flags; and, for messages, each flag as it is written, which is no value: vars() does not have it."""

    __slots__ = ("flags",)


class Parser(argparse.ArgumentParser):
    """argparse, but a bad flag is a UserError: one line instead of the whole usage text. Where neither --model nor --data is given, the
    defaults are those of the script's demonstration: what the small model in examples/tiny learns in a minute."""

    demo, adapter_brings = {}, ()  # adapter_brings: flags whose values an --adapter folder has

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")

    def parse_args(self, args=None, namespace=None):
        given = {argument.split("=")[0] for argument in (sys.argv[1:] if args is None else args)}
        if not given & {"--model", "--data", "--help", "-h"}:
            self.set_defaults(**self.demo)
        parsed = super().parse_args(args, namespace or Arguments())
        if getattr(parsed, "adapter", None) and (both := sorted(given & set(self.adapter_brings))):
            raise UserError(f"{both[0]}: the folder of --adapter has its own: leave out one")
        parsed.flags = {action.dest: action.option_strings[0] for action in self._actions if action.option_strings}
        return parsed


def number(kind, minimum, below=math.inf):
    """An argparse type: an int or a float in [minimum, below)."""

    def parse(text: str):
        value = kind(text)
        if not minimum <= value < below:
            raise argparse.ArgumentTypeError(f"{text} is not in [{minimum}, {below})")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # what argparse calls it in its message
    return parse


def example(name: str) -> str:
    return str(Path(__file__).parent / "examples" / name)


# what demonstrations have in common
DEMO = {"data": [example("task.jsonl")], "max_length": 128, "epochs": 3, "eval_fraction": 1 / 6, "samples": 3, "exact_match": 100, "eval_every": 1000}


def make_parser(doc: str, without: tuple[str, ...] = (), demo: dict | None = None, **defaults) -> Parser:
    """The flags every script has. doc: the script's docstring. without: flags that mean nothing there. demo: defaults where neither
    --model nor --data is given. defaults: the script's own (output, lr ...), of the flags it is without, too."""
    yes_no = argparse.BooleanOptionalAction
    parser = Parser(description=doc.split("\n\n")[0], formatter_class=HelpFormatter, allow_abbrev=False)
    parser.demo = DEMO | (demo or {})

    def add(flag: str, **options):
        if flag not in without:
            parser.add_argument(flag, **options)

    add("--model", default=example("tiny"), help="a folder, a Hugging Face Hub name, or `random`: a small random Llama made in memory. "
        "Without --model and --data the script shows what it does on examples/tiny, with settings of its own")
    add("--data", nargs="+", metavar="PATH[:WEIGHT]", default=[example("instructions.jsonl")],
        help=".jsonl, .json, .csv, .parquet files, folders of them, or Hub data sets (NAME, NAME@SPLIT, NAME@CONFIG@SPLIT). "
        "WEIGHT is how often a row comes up in an epoch: 2 is twice, 0.5 half of the rows, and the other half in the next epoch")
    add("--eval-data", nargs="+", metavar="PATH", help="held-out rows; default: --eval-fraction of the training prompts")
    add("--eval-fraction", type=number(float, 0, 1), default=0.05, help="share held out, whole prompts at a time; 0 trains on all rows")
    add("--output", help="folder for the result, metrics.jsonl and checkpoint/")
    add("--max-length", type=number(int, 2), default=1024, help="tokens a row; longer conversations are cut at their end, longer texts split")
    add("--batch-size", type=number(int, 1), default=4, help="rows in one forward pass on one device")
    add("--grad-accum", type=number(int, 1), default=1,
        help="forward passes in one step: the gradient of a larger batch in the memory of a small one")
    add("--epochs", type=number(int, 1), default=3, help="passes over the (weighted) rows")
    add("--max-steps", type=number(int, 0), help="optimizer steps, whatever --epochs says; 0 only evaluates and saves")
    add("--lr", type=number(float, 0), help="peak learning rate")
    add("--warmup-ratio", type=number(float, 0, 1), default=0.03, help="share of the steps in which the rate climbs to its peak")
    add("--schedule", choices=["cosine", "linear", "constant"], default="cosine", help="the rate after warmup: down to 0, or as it is")
    add("--weight-decay", type=number(float, 0), default=0.0, help="AdamW's decoupled decay, on tensors of 2 or more dimensions")
    add("--max-grad-norm", type=number(float, 0), default=1.0, help="clip the global gradient norm here; 0 never clips")
    add("--seed", type=number(int, 0, 2**32), default=0, help="of initial values, data order and the held-out split")
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="of the computation; auto: bfloat16, but float32 on a CPU")
    add("--packing", action=yes_no, default=True, help="fill rows with whole documents that cannot see each other; without it, rows are padded")
    add("--gradient-checkpointing", action=yes_no, default=False, help="recompute blocks in the backward pass: far less memory, a third more time")
    add("--checkpoint-blocks", type=number(int, 1), metavar="N", help="recompute only the first N blocks (implies --gradient-checkpointing)")
    add("--compile", action=yes_no, default=False,
        help="torch.compile for norms and MLPs, at the first step; pays nothing on a CPU, not yet measured on a GPU")
    add("--log-every", type=number(int, 1), default=5, help="steps between logged steps")
    add("--eval-every", type=number(int, 1), default=100, help="steps between evaluations; there is one before and one after, too")
    add("--patience", type=number(int, 0), default=0, metavar="N",
        help="stop after N evaluations without a lower held-out loss, and keep the weights of the lowest; 0 never does")
    add("--save-every", type=number(int, 1), default=100, help="steps between checkpoints")
    add("--keep", type=number(int, 1), default=1, metavar="N", help="how many complete checkpoints stay, the newest ones")
    add("--resume", action="store_true", help="go on from the last complete checkpoint in --output")
    add("--estimate", nargs="?", const=True, choices=["run"],
        help="print what this command would take on a GPU, part by part, and exit: no GPU and no weights are needed. `--estimate run` "
        "trains after it, and on a GPU ends with what was measured")
    add("--inspect", action="store_true", help="print the first batch, every token marked as context or target, and exit")
    add("--samples", type=number(int, 0), default=2, help="held-out prompts to answer before and after training")
    add("--exact-match", type=number(int, 0), default=0, metavar="N",
        help="answer N held-out prompts before and after training: how many answers are, to the letter, the data's?")
    add("--system", metavar="TEXT", help="system turn of conversations that have none (some templates slip in one of their own)")
    add("--template", metavar="NAME", help="chatml, alpaca, none (strings joined as they are) or a .jinja file; default: the model's, else alpaca")
    add("--trust-remote-code", action="store_true", help="run the Python code that comes with some models")
    parser.set_defaults(**defaults)
    return parser


class Unbroken:
    """A stream that goes silent when its reader has gone: Ctrl-C ends both sides of `python lora.py | tee log`, and what is printed then
    must not end the run before its checkpoint."""

    def __init__(self, stream):
        self.stream = stream
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character must not end the run either
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    @contextmanager
    def or_silence(self):
        try:
            yield
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def write(self, text: str) -> None:
        with self.or_silence():
            self.stream.write(text)

    def flush(self) -> None:
        with self.or_silence():
            self.stream.flush()


def launch(main, out_of_memory: str) -> None:
    """Run main(); turn what a user can mend into one line on stderr. out_of_memory: what this script can try, in order."""
    sys.stdout, sys.stderr = (stream and Unbroken(stream) for stream in (sys.stdout, sys.stderr))  # None is one that was closed
    code, message = 0, ""
    try:
        main()
    except SystemExit as request:
        code = request.code or 0
    except UserError as error:
        code, message = 2, f"error: {error}"
        if os.environ.get("RANK", "0") != "0":  # most often all ranks find the same: rank 0 says it, and torchrun ends the others
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # at once, where Run would wait for the end of a step
            time.sleep(5)
    except torch.OutOfMemoryError as error:
        code, message = 1, f"error: out of GPU memory ({str(error).split('. ')[0]}). Try, in this order: {out_of_memory}"
    except OSError as error:  # a full disk, a read-only folder: the checkpoint before is untouched
        code, message = 1, f"error: {error}"
    except KeyboardInterrupt:  # before the run has begun: there is nothing to save
        code = 130
    except Exception:
        if world_size() == 1:
            raise
        code, message = 1, traceback.format_exc()
    if message:
        tqdm.write(message, file=sys.stderr)  # on a line of its own, whatever the progress bar does
    if code and world_size() > 1:  # the other ranks may wait for this one in a collective, and so would an orderly end: torchrun stops them
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()
    if code:
        sys.exit(code)


# ---------------------------------------------------------------------------------------------------------- 2. Rows

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def parse_json(raw: bytes, where: str):
    try:
        return json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise UserError(f"{where}: nested too deeply")
    except ValueError as error:  # not UTF-8, not JSON, or integers of thousands of digits
        utf8 = isinstance(error, UnicodeDecodeError)
        line = 1 + raw.count(b"\n", 0, error.start) if utf8 else getattr(error, "lineno", 1)
        raise UserError(f"{where if line == 1 else f'{where}:{line}'}: {'not UTF-8: save it as UTF-8' if utf8 else f'not valid JSON: {error}'}")


def read_jsonl(path: Path):
    with open(path, "rb") as file:
        for n, raw in enumerate(file, 1):
            if raw := raw.removeprefix(BYTE_ORDER_MARK if n == 1 else b"").strip():
                yield parse_json(raw, f"{path}:{n}"), f"{path}:{n}"


def read_json(path: Path):
    """A JSON list, each element with the line it begins on. Many .json files hold one object per line: read as .jsonl."""
    raw = path.read_bytes().removeprefix(BYTE_ORDER_MARK)
    if not raw.lstrip().startswith(b"["):
        yield from read_jsonl(path)
        return
    rows, text = parse_json(raw, str(path)), raw.decode("utf-8")
    position, line = raw.index(b"["), 1 + raw[: raw.index(b"[")].count(b"\n")
    for row in rows:  # the text is valid JSON by now: only find where each element begins
        start = re.compile(r"\s*[\[,]\s*").match(text, position).end()
        line += text.count("\n", position, start)
        yield row, f"{path}:{line}"
        position = json.JSONDecoder().raw_decode(text, start)[1]
        line += text.count("\n", start, position)


def read_csv(path: Path):
    def lines(file):  # decoded one by one, so that an error knows its line
        for n, raw in enumerate(file, 1):
            try:
                yield raw.removeprefix(BYTE_ORDER_MARK if n == 1 else b"").decode("utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{path}:{n}: not UTF-8: save the file as UTF-8")

    csv.field_size_limit(2**31 - 1)
    with open(path, "rb") as file:
        reader = csv.DictReader(lines(file), strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(f"{path}:{reader.line_num}: {'more' if None in row else 'fewer'} fields than the header")
                yield row, f"{path}:{reader.line_num}"
        except csv.Error as error:
            raise UserError(f"{path}:{reader.reader.line_num}: {error}")


def from_table(table, where: str):
    """Rows of a columnar table. Columns know no missing fields, only nulls, so a null counts as missing."""

    def drop_nulls(value):
        if isinstance(value, dict):
            return {key: drop_nulls(item) for key, item in value.items() if item is not None}
        return [drop_nulls(item) for item in value] if isinstance(value, list) else value

    return ((drop_nulls(row), f"{where}: row {n}") for n, row in enumerate(table, 1))


def read_parquet(path: Path):
    """Through pyarrow itself: `datasets` would act on what the file says of its columns, and open the paths in them."""
    try:
        with parquet.ParquetFile(path) as file:
            yield from from_table((row for batch in file.iter_batches() for row in batch.to_pylist()), str(path))
    except UserError:
        raise
    except Exception as error:  # pyarrow raises a dozen kinds for a broken file
        raise UserError(f"{path}: cannot be read as parquet: {(str(error) or repr(error)).splitlines()[0]}")


READERS = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


def open_source(name: str):
    """A path or a Hub name -> (hash of its content, a function that yields (row, where it stands))."""
    path = Path(name)
    if not name or not path.exists():
        if not name or path.suffix in READERS or name.startswith((".", "/", "~")):
            raise UserError(f"{name or 'an empty name'}: no such file or folder")
        hub, *rest = name.split("@")  # NAME, NAME@SPLIT or NAME@CONFIG@SPLIT
        try:
            table = datasets.load_dataset(hub, rest[0] if len(rest) == 2 else None, split=rest[-1] if rest else "train")
        except Exception as error:  # no network, no such name, no such split
            raise UserError(f"{name}: no such file, and no such data set on the Hub: {str(error).splitlines()[0]}")
        return table._fingerprint, lambda: from_table(table, name)
    files = sorted(file for file in path.rglob("*") if file.suffix in READERS and file.is_file()) if path.is_dir() else [path]
    if not files or files[0].suffix not in READERS:
        raise UserError(f"{name}: not a {', '.join(READERS)} file or a folder of them")

    def rows():
        for row, where in (item for file in files for item in READERS[file.suffix](file)):
            if not isinstance(row, dict):
                raise UserError(f"{where}: a row is an object with fields, not {type(row).__name__}")
            yield row, where

    return "".join(file.suffix + file_digest(file) for file in files), rows


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_source(text: str) -> tuple[str, float]:
    """PATH[:WEIGHT] -> (path, weight). A path with a colon of its own is taken whole if it exists."""
    path, _, weight = text.rpartition(":")
    if not path or Path(text).exists() or not re.fullmatch(r"[-+.\deE]+|nan|inf", weight):
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise UserError(f"--data {text}: the weight must be a positive number")
    return path, value


# What a row means. Types are checked here, once, so that everything after this can trust the row.

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool", "human": "user", "gpt": "assistant"}
FORMATS = "text; messages or conversations; prompt and completion (or response); question and answer; instruction, input and output"


def wrong(row: dict, key: str, wanted: str) -> str:
    value = row.get(key)
    if key in row and value is not None:
        return f"field {key!r} is {'empty' if value == [] else type(value).__name__}, not {wanted}"
    return f"field {key!r} is {'null' if key in row else 'missing'}"


def field(row: dict, key: str, where: str) -> str:
    """A string field, or an error that names file, line and field."""
    if not isinstance(row.get(key), str):
        raise UserError(f"{where}: {wrong(row, key, 'a string')}")
    if re.search("[\ud800-\udfff]", row[key]):
        raise UserError(f"{where}: field {key!r} holds half of a surrogate pair, which is no text")
    return row[key]


def messages(row: dict, key: str, where: str, role: str = "") -> list[dict]:
    """A list of {"role", "content"}, or ShareGPT's from/value. Where a role is given, a string is one message of it."""
    if role and isinstance(row.get(key), str):
        return [{"role": role, "content": field(row, key, where)}]
    if not isinstance(row.get(key), list) or not row[key]:
        raise UserError(f"{where}: {wrong(row, key, 'a string or a list of messages' if role else 'a list of messages')}")
    result = []
    for n, message in enumerate(row[key], 1):
        inside = f"{where}: message {n} of {key!r}"
        if not isinstance(message, dict):
            raise UserError(f"{inside} is {type(message).__name__}, not an object with role and content")
        role_key, content_key = ("from", "value") if "from" in message else ("role", "content")
        if field(message, role_key, inside) not in ROLES:
            raise UserError(f"{inside}: unknown role {message[role_key]!r} (known: {', '.join(ROLES)})")
        result.append({"role": ROLES[message[role_key]], "content": field(message, content_key, inside)})
    return result


def parse_row(row: dict, where: str) -> str | list[dict]:
    """A training row in any of FORMATS -> its raw text, or its messages."""
    for key in ("messages", "conversations"):
        if key in row:
            return messages(row, key, where)
    for question, *answers in (("prompt", "completion", "response"), ("question", "answer")):
        if question in row and "chosen" not in row and "responses" not in row:
            answer = next((key for key in answers if key in row), answers[0])
            return messages(row, question, where, "user") + messages(row, answer, where, "assistant")
    if "instruction" in row:
        user = {"role": "user", "content": field(row, "instruction", where)}
        if row.get("input") is not None and field(row, "input", where):
            user |= {"instruction": row["instruction"], "input": row["input"]}  # the Alpaca layout sets them apart
            user["content"] += "\n\n" + row["input"]
        return [user, {"role": "assistant", "content": field(row, "output", where)}]
    if "text" in row:
        return field(row, "text", where)
    raise UserError(f"{where}: fields {sorted(map(str, row))} fit none of: {FORMATS}")


def parse_preference(row: dict, where: str) -> tuple[list[dict], list[dict], float]:
    """A preference or ranking row -> (prompt, answers from best to worst, margin). Without a prompt, it is the leading
    turns that chosen and rejected have in common."""
    if "responses" in row:
        if not isinstance(row["responses"], list) or len(row["responses"]) < 2:
            raise UserError(f"{where}: {wrong(row, 'responses', 'a list of two or more answers, best first')}")
        ranked = dict(enumerate(row["responses"]))
        answers = [messages(ranked, n, where, "assistant") for n in ranked]
    else:
        answers = [messages(row, key, where, "assistant") for key in ("chosen", "rejected")]
    if "prompt" in row:
        prompt = messages(row, "prompt", where, "user")
    else:
        shared = next((n for n, pair in enumerate(zip(*answers)) if pair[0] != pair[1]), min(map(len, answers)))
        prompt, answers = answers[0][:shared], [answer[shared:] for answer in answers]
    if not prompt or any([m["role"] for m in answer] != ["assistant"] for answer in answers):
        raise UserError(f"{where}: chosen and rejected must each be one assistant answer to the same prompt")
    margin = row.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, (int, float)) or not abs(margin) <= sys.float_info.max):
        raise UserError(f"{where}: {wrong(row, 'margin', 'a finite number')}")
    return prompt, [answer[0] for answer in answers], float(margin or 0.0)


def parse_prompt(row: dict, where: str) -> tuple[list[dict], list[dict]]:
    """Any row with a prompt -> (messages that end with the user's, [the answer it comes with] or [])."""
    if "chosen" in row or "responses" in row:
        prompt, answers, _ = parse_preference(row, where)
        return prompt, answers[:1]
    if "prompt" in row and not {"completion", "response"} & row.keys():
        conversation = messages(row, "prompt", where, "user")
    else:
        conversation = parse_row(row, where)
        if isinstance(conversation, str):
            raise UserError(f"{where}: raw text has no prompt to answer")
    answers = [conversation.pop()] if conversation[-1]["role"] == "assistant" else []
    if not conversation or conversation[-1]["role"] != "user":
        last = f", this one with the {conversation[-1]['role']}'s" if conversation else ""
        raise UserError(f"{where}: a prompt ends with the user's turn{last}")
    return conversation, answers


# -------------------------------------------------------------------------------------------- 3. Tokens and targets

CHATML = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

ALPACA = """{% for m in messages %}{% if m['role'] == 'assistant' %}### Response:
{{ m['content'] }}{{ eos_token }}

{% elif m['role'] == 'user' %}### Instruction:
{% if m['input'] is defined %}{{ m['instruction'] }}

### Input:
{{ m['input'] }}{% else %}{{ m['content'] }}{% endif %}


{% else %}{{ m['content'] }}

{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:
{% endif %}"""


def render(tokenizer, conversation: list[dict], prompt: bool = False) -> list[int]:
    """Token ids of a conversation. The template writes its own special tokens: none are added a second time."""
    return tokenizer.apply_chat_template(conversation, add_generation_prompt=prompt, return_dict=False)


def answer_span(tokenizer, conversation: list[dict]) -> tuple[list[int], int, int]:
    """(ids, start, end) of a conversation that ends with an answer: its targets are ids[start:end], from behind the
    generation prompt to the end-of-turn token, without the line break that some templates put after that."""
    prompt, ids = render(tokenizer, conversation[:-1], prompt=True), render(tokenizer, conversation)
    start, end = len(os.path.commonprefix([prompt, ids])), len(ids)  # it takes lists as well
    # A generation prompt that opens a thinking block is no prefix of an answer without one: the targets begin where the
    # two part, but never before the turn's own header.
    if start < len(prompt) and start <= len(render(tokenizer, conversation[:-1])):
        raise UserError("it renders a prompt differently once the answer is there; use another --template")
    special = set(tokenizer.all_special_ids)
    last = max((i for i in range(start, end) if ids[i] in special), default=end - 1)
    return ids, start, end if tokenizer.decode(ids[last + 1 :]).strip() else last + 1


def encode_conversation(tokenizer, conversation: list[dict], joined: bool = False) -> list[tuple[list[int], list[bool]]]:
    """Messages -> documents of (ids, is_target): one document, or one per answer if the template rewrites earlier turns.

    Targets are the assistant's tokens and its end-of-turn token, found by position and never by token id, since pad and
    eos are often one id. joined (--template none): the strings as they are, each answer followed by eos.
    """
    if joined:
        ids, marks = [], []
        for message in conversation:
            answer = message["role"] == "assistant"
            piece = tokenizer(message["content"], add_special_tokens=not ids).input_ids + [tokenizer.eos_token_id] * answer
            ids, marks = ids + piece, marks + [answer] * len(piece)
        return [(ids, marks)]
    if re.search(r"\{%-?\s*generation\b", tokenizer.get_chat_template()) and tokenizer.is_fast:  # the template marks its targets
        out = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
        ids, marks = out["input_ids"], [bool(mark) for mark in out["assistant_masks"]]
        start = 0  # of the present run of targets
        for i in range(1, len(ids)):
            start = i if marks[i] and not marks[i - 1] else start
            if marks[i - 1] and not marks[i] and ids[i - 1] != tokenizer.eos_token_id:
                # A block that closes just before eos would never teach the model to stop; and of a last character that is
                # several tokens, transformers marks only the first.
                marks[i] = ids[i] == tokenizer.eos_token_id or tokenizer.decode(ids[start:i]).endswith("\ufffd")
        return [(ids, marks)]
    answers = [i for i, message in enumerate(conversation) if i > 0 and message["role"] == "assistant"]
    spans = [answer_span(tokenizer, conversation[: i + 1]) for i in answers]
    if all(ids[:end] == spans[-1][0][:end] for ids, _, end in spans):
        full = spans[-1][0] if spans else []
        return [(full, [any(start <= i < end for _, start, end in spans) for i in range(len(full))])]
    return [(ids, [start <= i < end for i in range(len(ids))]) for ids, start, end in spans]


def encode_answers(tokenizer, prompt: list[dict], answers: list[dict], joined: bool = False) -> list[tuple[list[int], list[bool]]]:
    """A prompt and several answers to it -> a document of (ids, is_target) each, all beginning with the same prompt tokens."""
    if joined:
        shared, _ = encode_conversation(tokenizer, prompt, joined=True)[0]
        tails = [tokenizer(answer["content"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id] for answer in answers]
        return [(shared + tail, [False] * len(shared) + [True] * len(tail)) for tail in tails]
    spans = [answer_span(tokenizer, [*prompt, answer]) for answer in answers]
    start = min(start for _, start, _ in spans)
    return [(ids, [start <= i < end for i in range(len(ids))]) for ids, _, end in spans]


def with_system(conversation: list[dict], args) -> list[dict]:
    """--system in front, where a conversation has no system turn of its own."""
    missing = args.system is not None and conversation and conversation[0]["role"] != "system"
    return [{"role": "system", "content": args.system}] * bool(missing) + conversation


def encode_text(tokenizer, text: str, max_length: int) -> list[tuple[list[int], list[bool]]]:
    """Raw text: every token is a target; a long text becomes consecutive documents."""
    ids = tokenizer(text).input_ids
    ids += [tokenizer.eos_token_id] if ids[-1:] != [tokenizer.eos_token_id] else []
    pieces = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    return [(piece, [True] * len(piece)) for piece in pieces]


def encode_prompt(tokenizer, conversation: list[dict], joined: bool) -> list[tuple[list[int], list[bool]]]:
    """One document without targets, up to where an answer begins."""
    ids = encode_conversation(tokenizer, conversation, joined)[0][0] if joined else render(tokenizer, conversation, prompt=True)
    return [(ids, [False] * len(ids))]


KEPT, CUT, NO_TARGET, EMPTY = range(4)  # what became of a document


def encode_row(row, where: str, tokenizer, args, vocab_size: int, kind: str = "conversations") -> list[dict]:
    """One row -> its documents, as records of the token table. A row that gives none leaves a record that says why.

    kind "preferences": the answers to a prompt, best first, are consecutive documents, all kept or all dropped; their number
    stands in `answers` of the first and is 0 in the others. Elsewhere every document stands alone, and `answers` is 1.
    kind "prompts": a document is a prompt, up to where an answer begins. `conversation` has it as text (JSON), with the answer it
    comes with, if any, for programs that read text and for models with another template.
    """
    columns, joined = {"margin": 0.0, "answers": 1}, args.template == "none"
    if kind == "preferences":
        prompt, answers, columns["margin"] = parse_preference(row, where)
    elif kind == "prompts":
        prompt, answers = parse_prompt(row, where)
        columns["conversation"] = json.dumps(with_system(prompt, args) + answers)
    elif isinstance(turns := parse_row(row, where), str):
        prompt, answers = turns, [{"content": turns}]
    else:
        while turns and turns[-1]["role"] != "assistant":  # what follows the last answer would teach nothing
            turns.pop()
        prompt = turns[: next((i for i, m in enumerate(turns) if i and m["role"] == "assistant"), None)]
        answers = [m for m in turns if m["role"] == "assistant"]
    empty = any(not answer["content"].strip() for answer in answers)
    try:
        if empty or not prompt:
            documents = []
        elif isinstance(prompt, str):
            documents = encode_text(tokenizer, prompt, args.max_length)
        elif kind == "preferences":
            documents = encode_answers(tokenizer, with_system(prompt, args), answers, joined)
        elif kind == "prompts":
            documents = encode_prompt(tokenizer, with_system(prompt, args), joined)
        else:
            documents = encode_conversation(tokenizer, with_system(turns, args), joined)
    except Exception as error:  # a template is a program: whatever it divides by zero or looks up in vain is the row's error
        raise UserError(f"{where}: the chat template refuses this conversation: {error}")
    if getattr(args, "loss_on", "answers") == "all":
        documents = [(ids, [True] * len(ids)) for ids, _ in documents]
    # rows with the same prompt share a number, so that the held-out split can keep them together
    key = prompt if isinstance(prompt, str) else json.dumps([(m["role"], m["content"]) for m in prompt])
    columns["prompt"] = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], signed=True)

    records = []
    for ids, marks in documents or [([], [])]:
        if ids and max(ids) >= vocab_size:
            raise UserError(f"{where}: token {max(ids)} is beyond the model's {vocab_size} embeddings: tokenizer and model do not fit")
        if kind == "prompts":  # never cut
            status = EMPTY if empty else KEPT if len(ids) <= args.max_length else NO_TARGET
        else:
            status = CUT if len(ids) > args.max_length else KEPT
            ids, marks = ids[: args.max_length], [False, *marks[1 : args.max_length]]  # nothing predicts a first token
            if not any(marks):
                ids, marks, status = [], [], EMPTY if empty else NO_TARGET
        records.append(columns | {"input_ids": ids, "is_target": marks, "length": len(ids), "targets": sum(marks), "status": status})
    if kind == "preferences":
        for n, record in enumerate(records):
            record["answers"] = 0 if n else len(records)
        records = next(([record] for record in records if record["status"] > CUT), records)
    return records


# ------------------------------------------------------------------------------------------------------- 4. Batches


def tokenize_source(name: str, tokenizer, args, vocab_size: int, kind: str = "conversations") -> tuple[datasets.Dataset, str]:
    """Tokenise a source into a memory-mapped table in the Hugging Face cache -> (table, digest of content, tokenizer and
    settings). The cache's key holds that digest and this file's code: what has changed is never served from the cache."""
    content, rows = open_source(name)
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
    settings = [content, backend, tokenizer.chat_template, tokenizer.special_tokens_map, args.max_length, args.system, args.template, vocab_size]
    settings += [kind, getattr(args, "loss_on", "answers")]
    digest = hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()
    key = hashlib.sha256(digest.encode() + Path(__file__).read_bytes()).hexdigest()[:32]

    def records():
        row = None
        for row, where in rows():
            yield from encode_row(row, where, tokenizer, args, vocab_size, kind)
        if row is None:
            raise UserError(f"{name}: no rows")

    columns = {"input_ids": datasets.List(datasets.Value("int32")), "is_target": datasets.List(datasets.Value("bool"))}
    columns |= {column: datasets.Value("int64") for column in ("prompt", "length", "targets", "status", "answers")}
    columns["margin"] = datasets.Value("float64")
    columns |= {"conversation": datasets.Value("string")} if kind == "prompts" else {}
    try:
        return datasets.Dataset.from_generator(records, features=datasets.Features(columns), fingerprint=key), digest
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ if isinstance(error.__cause__, (UserError, OSError)) else error


class Corpus:
    """Tokenised documents, and the order in which a run sees them.

    table: columns input_ids and is_target, memory-mapped. lengths, targets: tokens and target tokens of each document.
    sources: (documents, mixing weight) of each source. rows_per_step: batch_size * grad_accum * number of ranks.
    preferences: the documents of `sources` are best answers, and a row is a prompt with all its answers.
    """

    def __init__(self, table, sources: list[tuple[np.ndarray, float]], args, pad_id: int, device=torch.device("cpu"), digests=(), preferences=False):
        self.table, self.sources, self.args, self.digests = table.with_format("numpy"), sources, args, digests
        self.pad_id, self.device = pad_id, device
        self.lengths, self.targets = (table.data.column(name).to_numpy() for name in ("length", "targets"))
        self.answers = self.margins = None
        if preferences:
            self.answers, self.margins = (table.data.column(name).to_numpy() for name in ("answers", "margin"))
        self.rows_per_step = args.batch_size * args.grad_accum * world_size()
        self.cached_rows = {}

    def order(self, epoch: int) -> np.ndarray:
        """Documents of an epoch, shuffled: a pure function of (seed, epoch), so that a restart finds its place again.
        Weight 2.5 is every document twice and half of them a third time; the next epoch takes the other half."""
        chosen = []
        for n, (documents, weight) in enumerate(self.sources):
            shuffled, size = np.random.default_rng([self.args.seed, n]).permutation(documents), weight * len(documents)
            chosen.append(shuffled[np.arange(round(epoch * size), round((epoch + 1) * size)) % len(shuffled)])
        return np.random.default_rng([self.args.seed, len(self.sources), epoch]).permutation(np.concatenate(chosen))

    def rows(self, epoch: int = 0) -> list[list[int]]:
        """The rows of an epoch, each a list of documents: whole ones of at most max_length tokens together if packed; of
        preference data, the answers to one prompt."""
        if epoch not in self.cached_rows:
            rows, room = [], 0
            if self.answers is not None:
                rows = [list(range(best, best + self.answers[best])) for best in self.order(epoch).tolist()]
            for document in [] if rows else self.order(epoch).tolist():
                if not self.args.packing or self.lengths[document] > room:
                    rows.append([])
                    room = self.args.max_length
                rows[-1].append(document)
                room -= self.lengths[document]
            self.cached_rows = {epoch: rows}
        return self.cached_rows[epoch]

    def plan(self) -> list[tuple[int, int]]:
        """(epoch, first row) of every optimizer step of the run."""
        steps, epoch = [], 0
        while len(steps) < self.args.max_steps if self.args.max_steps is not None else epoch < self.args.epochs:
            steps += [(epoch, first) for first in range(0, len(self.rows(epoch)), self.rows_per_step)]
            epoch += 1
        return steps[: self.args.max_steps]

    def planned_rows(self) -> list[list[int]]:
        """Every row that the run will see, once each, in the order of the first epoch that has it."""
        rows = [row for epoch, first in self.plan() for row in self.rows(epoch)[first : first + self.rows_per_step]]
        return list({tuple(row): row for row in rows}.values())

    def steps(self, start: int = 0):
        """From step `start` on: (epochs done, this rank's micro-batches, tokens of all ranks together, and what the loss is the
        mean over: target tokens of all ranks, or in preference data prompts)."""
        for epoch, first in self.plan()[start:]:
            rows = self.rows(epoch)[first : first + self.rows_per_step]
            documents = [document for row in rows for document in row]
            done = epoch + (first + len(rows)) / len(self.rows(epoch))
            yield done, list(self.deal(rows)), int(self.lengths[documents].sum()), self.count(rows)

    def count(self, rows: list[list[int]]) -> int:
        """What a loss over these rows is the mean over: target tokens, or in preference data prompts."""
        return len(rows) if self.answers is not None else int(self.targets[[document for row in rows for document in row]].sum())

    def deal(self, rows: list[list[int]]):
        """Rows -> this rank's micro-batches. 8x1, 4x2 and 1x8 take the same rows; where rows run out, a rank gets a
        micro-batch without targets, because all ranks must take part in every forward pass."""
        size = self.args.batch_size
        for first in range(rank() * size, len(rows) + rank() * size, size * world_size()):
            batch = self.collate(rows[first : first + size] or rows[:1])
            if first >= len(rows):
                batch = {name: value[:0] for name, value in batch.items()} | model_inputs(batch)
            yield batch

    def largest(self) -> list[dict]:
        """The micro-batch of the run that takes the most memory; twice with --grad-accum, where the second one meets gradients."""

        def size(rows: list[list[int]]) -> tuple[int, int]:
            documents = [document for row in rows for document in row]
            lengths = self.lengths[documents]
            return lengths.sum() if self.args.packing else len(documents) * lengths.max(), self.targets[documents].sum()

        steps = (self.rows(epoch)[first : first + self.rows_per_step] for epoch, first in self.plan())
        batches = (rows[i : i + self.args.batch_size] for rows in steps for i in range(0, len(rows), self.args.batch_size))
        return [self.collate(max(batches, key=size))] * min(2, self.args.grad_accum)

    def collate(self, rows: list[list[int]]) -> dict:
        """Rows -> one micro-batch for `target_logps`, on the device.

        Packed: all documents end to end in one row, input_ids and position_ids (1, T), positions restarting at 0 in each;
            documents = (lengths, cumulative lengths (D + 1,) int32, longest). Nothing is padded.
        Padded on the right: input_ids and attention_mask (B, T).
        Both: targets (N,), the tokens to predict, and target_index (N,), where in the flattened (B * T,) each is predicted:
            one position before its own. First tokens are no targets, so no document is predicted from another.
        Of preference data, with D documents, P pairs of a better and a worse answer to one prompt: see `pairs`.
        """
        fetched = self.table[[document for row in rows for document in row]]
        ids, marks = [x.astype(np.int64) for x in fetched["input_ids"]], [x.astype(bool) for x in fetched["is_target"]]
        lengths = [len(x) for x in ids]
        width = max(lengths)
        starts = np.cumsum([0, *lengths[:-1]]) if self.args.packing else width * np.arange(len(ids))
        index = [start + np.flatnonzero(mark) - 1 for start, mark in zip(starts, marks)]
        flat = torch.from_numpy(np.concatenate(ids))
        batch = {"targets": flat[torch.from_numpy(np.concatenate(marks))], "target_index": torch.from_numpy(np.concatenate(index))}
        if self.args.packing:
            cumulative = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
            batch |= {"input_ids": flat[None], "position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}
            batch["documents"] = (lengths, self.place(cumulative), width)
        else:
            real = torch.arange(width) < torch.tensor(lengths)[:, None]  # (B, T)
            batch |= {"input_ids": torch.full(real.shape, self.pad_id).masked_scatter(real, flat), "attention_mask": real.long()}
        if self.answers is not None:
            batch |= self.pairs(rows, ids, marks, starts)
        return {name: self.place(x) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}

    def pairs(self, rows: list[list[int]], ids: list[np.ndarray], marks: list[np.ndarray], starts: np.ndarray) -> dict:
        """What losses on answers need beside the tokens. Of K ranked answers all K (K - 1) / 2 pairs count, together as one.

        document (D,): the number of each in the table. answer (N,): the document, of D, that each target belongs to.
        last (D,): where in the flattened row each document ends. better, worse (P,): the documents of each pair.
        weight (P,): 2 / (K (K - 1)). margin (P,). best (C,): which of the N targets belong to best answers. other_targets and
        other_index (M,): as targets and target_index, of all other tokens of the best answers' documents: the prompts.
        """
        firsts = np.cumsum([0, *map(len, rows[:-1])])
        pairs = [(first + i, first + j, 2 / (len(row) * (len(row) - 1)), self.margins[row[0]])
                 for first, row in zip(firsts, rows) for i in range(len(row)) for j in range(i + 1, len(row))]  # fmt: skip
        better, worse, weight, margin = (torch.tensor(column) for column in zip(*pairs))
        answer = torch.repeat_interleave(torch.arange(len(marks)), torch.tensor([int(mark.sum()) for mark in marks]))
        document = torch.tensor([document for row in rows for document in row])
        best = torch.isin(answer, torch.from_numpy(firsts)).nonzero()[:, 0]
        last = torch.tensor([start + len(x) - 1 for start, x in zip(starts, ids)])
        others = [np.flatnonzero(~marks[first][1:]) for first in firsts]  # each one position before its token
        other_targets = torch.from_numpy(np.concatenate([ids[first][1:][positions] for first, positions in zip(firsts, others)]))
        other_index = torch.from_numpy(np.concatenate([starts[first] + positions for first, positions in zip(firsts, others)]))
        return {"document": document, "answer": answer, "last": last, "better": better, "worse": worse, "weight": weight.float(),
                "margin": margin.float(), "best": best, "other_targets": other_targets, "other_index": other_index}  # fmt: skip

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the device; on CUDA from pinned memory, so that the host does not wait for the copy."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor.to(self.device)

    def show(self, tokenizer) -> None:
        """Print the first micro-batch: every document, a line for each run of context or target tokens."""
        rows = self.rows()[: self.args.batch_size]
        for row, document in [(row, document) for row in rows for document in row]:
            ids, marks = self.table[document]["input_ids"].tolist(), self.table[document]["is_target"].astype(bool)
            print(f"--- row {rows.index(row) + 1} of {len(rows)}, document {row.index(document) + 1} of {len(row)}: "
                  f"{len(ids)} tokens, {marks.sum()} of them targets ---")  # fmt: skip
            edges = [0, *(np.flatnonzero(np.diff(marks)) + 1), len(ids)]
            for first, last in zip(edges, edges[1:]):
                tokens = [tokenizer.decode([token]) for token in ids[first:last]]
                if "\ufffd" in "".join(tokens):  # parts of a character: show the vocabulary's own spelling
                    tokens = tokenizer.convert_ids_to_tokens(ids[first:last])
                print(f"{'TARGET ' if marks[first] else 'context'} {last - first:4d}  {'|'.join(tokens)!r}")


def load_data(args, tokenizer, vocab_size: int, device=torch.device("cpu"), kind: str = "conversations") -> tuple[Corpus, Corpus | None]:
    """--data and --eval-data -> (training corpus, held-out corpus or None). Says what was kept, cut and dropped.

    kind: "conversations" (any training rows), "preferences" or "prompts" (see `encode_row`)."""
    sources = [parse_source(text) for text in args.data] + [(path, 1.0) for path in args.eval_data or []]
    for turn in range(2):  # under torchrun rank 0 tokenises first, the others then find it in the cache
        if (rank() == 0) == (turn == 0):
            tables, digests = zip(*[tokenize_source(name, tokenizer, args, vocab_size, kind) for name, _ in sources])
        if world_size() > 1:
            dist.barrier()
    table = datasets.concatenate_datasets(list(tables))
    prompts, lengths, targets, status = (table.data.column(x).to_numpy() for x in ("prompt", "length", "targets", "status"))
    bounds = np.cumsum([0, *map(len, tables)])
    spans = list(zip(bounds, bounds[1:]))
    for (name, _), (first, last) in zip(sources, spans):
        kept, cut, no_target, empty = np.bincount(status[first:last], minlength=4)
        say(f"{name}: {kept + cut:,} documents, {lengths[first:last].sum():,} tokens, {targets[first:last].sum():,} of them targets; {cut:,} cut at "
            f"--max-length {args.max_length}; dropped: {no_target:,} with no target left, {empty:,} with an empty text or answer")  # fmt: skip
    best = table.data.column("answers").to_numpy() > 0
    usable, held_out = (status <= CUT) & best, np.arange(len(table)) >= bounds[len(args.data)]
    if not args.eval_data and args.eval_fraction:  # whole prompts, until the fraction is reached
        unique, counts = np.unique(prompts[usable], return_counts=True)
        shuffled = np.random.default_rng([args.seed, 7]).permutation(len(unique))
        enough = np.searchsorted(counts[shuffled].cumsum(), args.eval_fraction * counts.sum()) + 1
        held_out = np.isin(prompts, unique[shuffled[: min(enough, len(unique) - 1)]])

    def corpus(chosen: np.ndarray, weights: list[float]) -> Corpus | None:
        parts = [(first + np.flatnonzero(chosen[first:last]), weight) for (first, last), weight in zip(spans, weights)]
        parts = [(documents, weight) for documents, weight in parts if len(documents)]
        return Corpus(table, parts, args, tokenizer.pad_token_id, device, digests, kind == "preferences") if parts else None

    train, evaluation = corpus(usable & ~held_out, [weight for _, weight in sources]), corpus(usable & held_out, [1.0] * len(sources))
    if train is None:
        raise UserError(f"--data {' '.join(args.data)}: no row with a target is left to train on; a larger --max-length may help")
    if evaluation is None:
        say("no held-out rows: training without evaluation")
    return train, evaluation


# --------------------------------------------------------------------------------------------------------- 5. Model


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text: str) -> None:
    """Print once, whatever the number of ranks, and above the progress bar."""
    if rank() == 0:
        tqdm.write(text)


with_data = _disable_current_modes  # tensors made in a with block of it have data, with --estimate, too


class Estimate(TorchDispatchMode):
    """--estimate: the script itself, on tensors that have a shape and no data (PyTorch's FakeTensorMode), for two optimizer steps on
    the run's largest micro-batch. This follows every storage from the operation that makes it to its end, as a GPU's allocator does."""

    def __init__(self, offload: bool):
        super().__init__()
        self.modes, self.fake, self.offload = ExitStack(), FakeTensorMode(), offload
        self.held, self.live, self.peak = {}, 0, 0  # storages and their bytes; bytes now, and at most, on the GPU
        self.trained, self.weights, self.states = [], 0, 0

    def start(self) -> None:
        """From here on no tensor has data."""
        if not self.held:
            resize = torch.UntypedStorage.resize_  # with which FSDP2 frees what it has gathered

            def resize_and_follow(storage, size: int):
                resize(storage, size)
                self.follow(storage)

            look_at_shapes = ShardingPropagator._propagate_tensor_meta_non_cached  # DTensor's, on tensors of whole size: they take nothing

            def look_unfollowed(*args):
                with with_data():
                    return look_at_shapes(*args)

            self.modes.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resize_and_follow))
            self.modes.enter_context(mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", look_unfollowed))
            self.modes.enter_context(self.fake)
            self.modes.enter_context(self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:  # first its own rules, then what they do with this rank's part
            return NotImplemented
        if func is torch.ops.aten._local_scalar_dense.default and self.fake:
            return 0  # a reading of a number that is not there
        out = func(*args, **(kwargs or {}))
        self.fake.fake_tensor_converter.meta_converter.tensor_memo.clear()  # its weak references would forbid Module.to
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.follow(tensor.untyped_storage())
        return out

    def follow(self, storage) -> None:
        key, size = storage._cdata, self.rounded(storage.nbytes())
        known = self.held.get(key)
        if known is None or known[1] != size:
            self.held[key] = weakref.ref(storage, lambda _: self.forget(key)), size
            self.live += size - (known[1] if known else 0)
            if self.live - self.offload * (self.weights + self.states) > self.peak:
                gradients = self.bytes_of(p.grad for p in self.trained)
                on_gpu = self.live - self.offload * (self.weights + self.states + gradients)
                if on_gpu > self.peak:
                    self.peak, self.gradients = on_gpu, gradients

    def forget(self, key: int) -> None:
        self.live -= self.held.pop(key)[1]

    @staticmethod
    def rounded(size: int) -> int:
        return -(-size // 512) * 512  # as PyTorch's allocator does

    def bytes_of(self, tensors) -> int:
        """Of this rank's parts of tensors."""
        local = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors if isinstance(tensor, torch.Tensor)]
        return sum(self.rounded(tensor.numel() * tensor.itemsize) for tensor in local)

    def steps(self, model, optimizers: list, micro_batches: list[dict]):
        """In place of `Run.steps`: two steps, since optimizer states exist from the second on. Then prints the table and ends the script."""
        gc.collect()  # what loading has left behind
        self.trained, self.weights = [p for p in model.parameters() if p.requires_grad], self.live
        micro_batches = tree_map(lambda x: self.fake.from_tensor(x) if isinstance(x, torch.Tensor) else x, micro_batches)
        for tensor in tree_leaves(micro_batches):
            if isinstance(tensor, torch.Tensor):
                self.follow(tensor.untyped_storage())
        for _ in range(2):
            self.peak = 0
            yield 0.0, micro_batches, 1, 1
            self.states = self.bytes_of(x for optimizer in optimizers for state in optimizer.state.values() for x in state.values())
        self.modes.close()
        say(self.table(micro_batches[0]["input_ids"].numel()))
        sys.exit(0)

    def table(self, tokens: int) -> str:
        """What lies on the GPU, and with --offload in host memory, when the GPU holds most."""
        kept = {"parameters": self.weights, "gradients": self.gradients, "optimizer states": self.states}
        if self.offload:  # both are pinned, and pinned memory comes in powers of two
            pinned = sum(1 << (getattr(p, "_local_tensor", p).nbytes - 1).bit_length() for p in self.trained)
            kept |= {"parameters": pinned, "gradients": pinned}
        rest = self.peak - (0 if self.offload else sum(kept.values()))
        rows = [(name, 0, size) if self.offload else (name, size, 0) for name, size in kept.items()]
        rows += [("activations and loss buffers", rest, 0), ("together", self.peak, self.offload * sum(kept.values()))]
        lines = [f"{f'estimate at the peak, {tokens:,} tokens':44} {'GPU, GiB':>10}" + f" {'host, GiB':>10}" * self.offload]
        lines += [f"{name:44} {gpu / 2**30:10.3f}" + f" {host / 2**30:10.3f}" * self.offload for name, gpu, host in rows]
        return "\n".join([*lines, "on top of it: CUDA's context, about 0.5 GiB, and what the allocator loses in gaps"])


def setup(args) -> tuple[torch.device, torch.dtype]:
    """Seed, pick the device, join the other ranks under torchrun. -> (device, dtype of the computation)"""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    args.gradient_checkpointing |= args.checkpoint_blocks is not None
    if args.estimate == "run":  # by this command in another process, whose --estimate stands last
        if os.environ.get("RANK", "0") == "0" and (failed := subprocess.run([sys.executable, *sys.orig_argv[1:], "--estimate"]).returncode):
            sys.exit(failed)
        args.estimate = None
    if args.estimate:
        return estimate_setup(args, ranks)
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if (ranks > 1 or getattr(args, "offload", False)) and not dist.is_initialized():  # --offload on one device: FSDP2, one rank
        alone = {} if ranks > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        # hours, because the others wait while rank 0 tokenises, and while it writes a checkpoint
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=4), **alone)
    if ranks > 1 and getattr(args, "offload", False):  # AdamW runs on the CPU, where torchrun gives each process one thread
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    torch.manual_seed(args.seed)
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else device.type == "mps"
    return device, torch.bfloat16 if args.dtype == "bfloat16" or args.dtype == "auto" and has_bfloat16 else torch.float32


def estimate_setup(args, ranks: int) -> tuple[torch.device, torch.dtype]:
    """`setup` for --estimate. As on a GPU, but the tensors say that they are on a CPU: CUDA's need CUDA, even without data. One of W
    ranks alone, in a process group that sends nothing; a WORLD_SIZE in the environment is enough for it."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if os.environ.get("RANK", "0") != "0":
        sys.exit(0)
    offload = getattr(args, "offload", False)
    if ranks > 1 or offload:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    args.estimate = Estimate(offload)
    return torch.device("cpu"), torch.float32 if args.dtype == "float32" else torch.bfloat16


def tiny_model() -> torch.nn.Module:
    """A seeded random Llama with grouped-query attention, 0.8 million parameters. It begins at a loss of ln 320 = 5.77."""
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)


def tiny_tokenizer():
    """A token a byte, so that every text in every language round-trips, and ChatML."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|pad|>"])  # ids 256, 257, 258
    special = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "extra_special_tokens": ["<|im_start|>"]}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHATML, **special)


def from_hub(auto_class, args, name: str | None = None, flag: str = "--model", **options):
    """auto_class.from_pretrained(a folder or a Hub name), with what can go wrong in one line. Another name than that of --model
    comes with the flag that gave it."""
    name = name or args.model
    try:
        return auto_class.from_pretrained(name, trust_remote_code=args.trust_remote_code, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a broken folder fails in a dozen ways
        first, *more = (str(error) or repr(error)).strip().splitlines()
        raise UserError(f"{flag} {name}: {first}{more[0] if first.endswith(':') and more else ''}") from error


def load_tokenizer(args):
    """-> (tokenizer with a chat template and a pad token, number of embeddings of the model). Says what it had to choose."""
    if args.model == "random":
        tokenizer, vocab_size = tiny_tokenizer(), 320
    else:
        vocab_size = from_hub(transformers.AutoConfig, args).get_text_config().vocab_size
        tokenizer = from_hub(transformers.AutoTokenizer, args)
    if args.template in ("chatml", "alpaca"):
        tokenizer.chat_template = CHATML if args.template == "chatml" else ALPACA
    elif args.template not in (None, "none"):
        if not Path(args.template).is_file():
            raise UserError(f"--template {args.template}: give chatml, alpaca, none or a .jinja file")
        try:
            tokenizer.chat_template = Path(args.template).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"--template {args.template}: not UTF-8")
    elif args.template is None and not tokenizer.chat_template:
        tokenizer.chat_template = ALPACA
        say("the tokenizer has no chat template: using the Alpaca layout, and saving it with the result (--template chooses)")
    if args.template == "chatml" and "<|im_end|>" not in tokenizer.get_vocab():
        raise UserError("--template chatml: this tokenizer has no <|im_start|> and <|im_end|> tokens; use --template alpaca")
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {args.model}: its tokenizer has no eos token, so nothing could teach the model to stop")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        say(f"the tokenizer has no pad token: padding with eos, {tokenizer.eos_token!r}, which stays a target: padding is masked by position")
    return tokenizer, vocab_size


def load_model(args, dtype: torch.dtype, device: torch.device, weight_dtype: torch.dtype | None = None, head: str = "lm",
               name: str | None = None, flag: str = "--model") -> torch.nn.Module:  # fmt: skip
    """A causal LM that computes in dtype and keeps its weights in weight_dtype (dtype, if not given), on the device, with
    `model.target_logps` bound to it (section 7). What sections 6 and 7 assume of a model is checked here, by trying.

    head "score": a sequence classifier with one label in place of the causal LM, and no target_logps. Its head is random
    where the model on disk has none. name and flag as in `from_hub`."""
    weight_dtype, name = weight_dtype or dtype, name or args.model
    if args.estimate:
        args.estimate.start()
    if name == "random":
        model = tiny_model().to(weight_dtype)
        if head == "score":
            base, model = model, transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**model.config.to_dict() | {"num_labels": 1}))
            model = model.to(weight_dtype)
            model.model.load_state_dict(base.model.state_dict())
    else:  # safetensors only: a pickle can run code while it loads
        auto_class = transformers.AutoModelForCausalLM if head == "lm" else transformers.AutoModelForSequenceClassification
        options = {} if head == "lm" else {"num_labels": 1}
        if args.estimate:
            config = from_hub(transformers.AutoConfig, args, name, flag, **options)
            model = auto_class.from_config(config, dtype=weight_dtype, trust_remote_code=args.trust_remote_code)
            found = {"missing_keys": [], "unexpected_keys": []}
        else:
            model, found = from_hub(auto_class, args, name, flag, dtype=weight_dtype, use_safetensors=True, output_loading_info=True, **options)
        missing = sorted(name for name in found["missing_keys"] if head == "lm" or not name.startswith("score."))
        if missing:  # transformers would fill them with random numbers
            raise UserError(f"{flag} {name}: {len(missing)} of its weights are in no file, the first of them {missing[0]}")
        if found["unexpected_keys"] and head == "lm":
            odd = found["unexpected_keys"]
            say(f"{name}: {len(odd)} tensors in its files are no part of this model, {min(odd)} for one")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest and args.max_length > longest:
        raise UserError(f"--max-length {args.max_length}: this model has {longest} positions")
    model.to(device)
    model.padded_attention, model.base_fingerprint = model.config._attn_implementation, "" if args.estimate else fingerprint(model)
    make_lean(model)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != weight_dtype):
        if args.packing:
            choose_packed_attention(model, exact=dtype == torch.float32)
        if head == "lm":
            if model.base_model is model:  # Llama 4's text model names itself
                raise UserError(f"{type(model).__name__} has no backbone apart from its head, which the loss here needs")
            # a bound method, because FSDP2 gathers weights only around methods it knows (register_fsdp_forward_method)
            model.target_logps = types.MethodType(target_logps, model)
            if not args.estimate:
                check_head(model, exact=dtype == torch.float32)
    return model


def fingerprint(model) -> str:
    """Tells bases of the same shape apart: the sizes, and in bfloat16 the input embedding's first and last 64 rows and the first 64
    elements of every weight of the backbone, so that a base and what was merged into it differ."""
    names = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = [getattr(model.config.get_text_config(), name, None) for name in names]
    embedding = model.get_input_embeddings().weight.detach()
    parts = [embedding[:64], embedding[-64:], *(p.detach().flatten()[:64] for p in model.base_model.parameters())]
    known = torch.cat([part.flatten().to(torch.bfloat16) for part in parts]).view(torch.int16).cpu().numpy()
    return hashlib.sha256(json.dumps(sizes).encode() + known.tobytes()).hexdigest()[:32]


def blocks(model) -> list[torch.nn.Module]:
    """The decoder blocks, in order."""
    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise UserError(f"{type(model).__name__} has no blocks that transformers can recompute or shard one by one")
    return found


def checkpoint_blocks(model, args) -> None:
    """Recompute --checkpoint-blocks blocks (all, if not given) in the backward pass instead of keeping their activations."""
    if args.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # 5.23, 5.17
        enable({"use_reentrant": False})
        for block in blocks(model)[args.checkpoint_blocks or len(blocks(model)) :]:
            block.gradient_checkpointing = False


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up. Keeps gate and up alone and computes silu again in the backward pass. All (..., f)."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up  # not in place: --compile on torch 2.11 would lose the gradient

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class FakeNorm(torch.autograd.Function):
    """For --estimate: what F.rms_norm is on a GPU, one kernel that keeps x and one float32 number for each of its vectors."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def fused_norm(self, x):
    weight, kind = self.weight.to(x.dtype), x.device.type  # of one dtype, or it is not one kernel
    y = FakeNorm.apply(x, weight) if isinstance(x, FakeTensor) else F.rms_norm(x, weight.shape, weight, self.variance_epsilon)
    # under autocast every layer that reads y would cast it for itself, and keep its own copy
    return y.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else y


def gated_mlp(self, x):
    return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


LEAN = ((fused_norm, {"weight", "variance_epsilon"}), (gated_mlp, {"gate_proj", "up_proj", "down_proj"}))


@torch.no_grad()
def make_lean(model) -> None:
    """RMSNorm through PyTorch's own function, which on a GPU is one kernel without float32 copies (on a CPU it is the same steps as
    before), and SwiGLU without silu(gate) kept: the same numbers with less memory. Where a module's own forward gives other numbers
    (Gemma's norm, dropout), it stays as it is."""
    was_training, classes = model.training, {}  # one new class for each old one: --compile makes a graph for each
    model.train()
    for module in model.modules():
        for forward, parts in LEAN:
            if all(hasattr(module, part) for part in parts):
                weight = module.weight if forward is fused_norm else module.gate_proj.weight
                x = torch.linspace(-3, 3, 2 * weight.shape[-1], device=weight.device, dtype=weight.dtype).view(2, -1)
                own, lean = module(x).float(), forward(module, x).float()
                if isinstance(own, FakeTensor) or (own - lean).abs().max() <= 4 * torch.finfo(weight.dtype).eps * own.abs().max():
                    kind = type(module)
                    module.__class__ = classes.setdefault(kind, type(kind.__name__, (kind,), {"forward": forward}))
    model.train(was_training)


def compile_blocks(model, args) -> None:
    """--compile: every part of a block but its attention (norms and MLP, with what a method has put on them) becomes one compiled
    function for all blocks and row lengths. Attention stays as it is: a graph with it would be compiled anew for every other number of
    documents in a row, and within a recomputed block not at all."""
    for block in blocks(model) if args.compile and not args.estimate else []:
        for part in block.children():
            if "Attention" not in type(part).__name__:
                part.compile(dynamic=True)


def linear_layers(model, targets: str) -> dict[str, torch.nn.Linear]:
    """The layers an adapter goes on, by name. targets: "all-linear" is every nn.Linear but the output head; else names with
    commas between them, and a layer matches whose name is one of them or ends with "." and one, as in PEFT."""
    head = model.get_output_embeddings() or getattr(model, "score", None)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and layer is not head}
    endings = tuple("." + target for target in targets.split(","))
    chosen = {name: layer for name, layer in layers.items() if targets == "all-linear" or f".{name}".endswith(endings)}
    if not chosen:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in layers})) or "no nn.Linear (GPT-2's Conv1D is none)"
        raise UserError(f"--targets {targets} matches no linear layer; this model has {known}")
    return chosen


def short_names(model, adapted: list[str]) -> list[str]:
    """target_modules for PEFT: the last parts of the adapted layers' names, or whole names where another linear layer that is
    not adapted has the same last part."""
    last = {name.rpartition(".")[2] for name in adapted}
    inside = tuple(f"{name}." for name in adapted)
    others = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and not name.startswith(inside)]
    return sorted(adapted if any(name.rpartition(".")[2] in last for name in others) else last)


def parallelize(model, dtype: torch.dtype, device: torch.device, offload: bool = False, method: str = "target_logps") -> None:
    """Prepare a model that trains all its parameters, float32 masters, to compute in dtype through `method`.

    In one process: autocast. Under torchrun or with offload: `shard`.
    """
    if dist.is_initialized():
        shard(model, dtype, device, offload, method)
    elif dtype != model.dtype:  # uncached, as each weight is used once
        setattr(model, method, torch.autocast(device.type, dtype=dtype, cache_enabled=False)(getattr(model, method)))


def check_shard(args) -> None:
    if args.shard and world_size() == 1:
        raise UserError("--shard divides the frozen weights among the ranks of torchrun: there is one process here")
    if args.shard and getattr(args, "merge", False):
        raise UserError("--merge needs whole weights: leave out --shard, or merge afterwards with --adapter and --max-steps 0")


def shard(model, dtype: torch.dtype, device: torch.device, offload: bool = False, method: str = "target_logps") -> None:
    """FSDP2 (ZeRO-3): each of W ranks keeps 1/W of every parameter; beside frozen ones, what trains stays whole on every rank, in
    float32. A block is gathered in dtype just before it runs and freed after; gradients are summed over ranks, not averaged. With
    offload the shards, and with them gradients and optimizer states, lie in host memory."""
    with with_data():
        options = {"mesh": init_device_mesh(device.type, (world_size(),))}
    options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if not all(p.requires_grad for p in model.parameters()):  # an adapter: `sum_gradients` sums its gradients
        options["ignored_params"] = {p for p in model.parameters() if p.requires_grad}
        for p in options["ignored_params"]:
            p.data = p.data.to(device)
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for module in [*blocks(model), model]:  # the model itself last: what is in no block: embedding, last norm, head
        fully_shard(module, **options)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, method)  # the head must be gathered while the loss is computed


def disable_dropout(model) -> None:
    """For losses that compare two passes through a model. In train mode still, which recomputing blocks need."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout"):  # rates that attention and MLPs keep as numbers
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def count_parameters(model) -> tuple[int, int]:
    """(trainable, total). A 4-bit parameter counts as the weights it stands for, not as its bytes."""
    sizes = [(p.requires_grad, math.prod(p.quant_state.shape) if hasattr(p, "quant_state") else p.numel()) for p in model.parameters()]
    return sum(size for trained, size in sizes if trained), sum(size for _, size in sizes)


# ----------------------------------------------------------------------------------------------------- 6. Attention


def document_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, documents=None, **others):
    """Causal attention inside each document of a packed row, in the form of a transformers attention function.

    query (1, H, T, head_dim), key and value (1, H_kv, T, head_dim), documents as `Corpus.collate` makes them
    -> (1, T, H, head_dim), None. No (T, T) mask exists, and the work grows with the documents' squared lengths, not T's.
    Raises where it would be silently wrong: without document lengths (padded rows, generation), and for anything it does not
    know (soft-capping, sinks, biases): then `choose_packed_attention` takes the mask that transformers makes instead.
    """
    if documents is None:
        raise ValueError("no document lengths: padded rows and generation need model.padded_attention")
    harmless = ("position_ids", "use_cache", "cache_position", "output_attentions")
    unknown = [name for name, item in others.items() if name not in harmless and item is not None and item is not False]
    if unknown or attention_mask is not None or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"document attention does not know {unknown or 'this mask'}")
    lengths, cumulative, longest = documents
    window = sliding_window if sliding_window is not None and sliding_window < longest else None  # itself and window - 1 before
    if torch.is_autocast_enabled(query.device.type):  # rotary embedding has made queries and keys float32 again
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    head_dim = query.shape[-1]
    has_kernel = (query.is_cuda or isinstance(query, FakeTensor)) and query.dtype != torch.float32
    if has_kernel and not dropout and head_dim == value.shape[-1] <= 256 and head_dim % 8 == 0:  # what FlashAttention takes
        gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}  # torch 2.13, not 2.11
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (1, H, T, head_dim) -> (T, H, head_dim)
        side = (window - 1 if window else -1, 0)
        return varlen_attn(q, k, v, cumulative, cumulative, longest, longest, scale=scaling, window_size=side, **gqa)[None], None
    pieces = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value))):
        mask = None
        if window is not None:
            mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril().triu(1 - window)
        gqa = q.shape[1] != k.shape[1]
        pieces.append(F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=gqa))
    return torch.cat(pieces, dim=2).transpose(1, 2), None


transformers.AttentionInterface.register("documents", document_attention)


@contextmanager
def attention(model, implementation: str):
    """Another attention function, for the time of a with block."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def choose_packed_attention(model, exact: bool) -> None:
    """Give the model an attention in which packed documents do not see each other, found by trying.

    Two documents in one packed row must get the hidden states that each gets alone: with document attention, else with the
    mask that transformers derives from position_ids. A model that lets them see each other both ways is refused.
    """
    device = model.get_input_embeddings().weight.device
    ids, lengths = torch.arange(21, device=device)[None] * 5 % 17 + 3, [12, 9]
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    documents = (lengths, torch.tensor([0, 12, 21], dtype=torch.int32, device=device), 12)
    model.eval()

    def hidden(**inputs):
        return model.base_model(use_cache=False, **inputs).last_hidden_state[0].float()

    without_data = isinstance(ids, FakeTensor)  # --estimate: nothing to compare
    alone = None if without_data else torch.cat([hidden(input_ids=part) for part in ids.split(lengths, dim=1)])
    for implementation, extra in (("documents", {"documents": documents}), (model.padded_attention, {})):
        model.set_attn_implementation(implementation)
        try:
            packed = hidden(input_ids=ids, position_ids=positions, **extra)
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, TypeError, ValueError, KeyError, RuntimeError):
            continue
        # the mean, because in bfloat16 single values differ by some per cent between the two shapes
        if without_data or (packed - alone).abs().mean() <= (1e-3 if exact else 0.05) * alone.abs().mean():
            return
    raise UserError(f"{type(model).__name__} lets packed documents see each other: use --no-packing")


# --------------------------------------------------------------------------------------------- 7. Log-probabilities
#
#   z = cap * tanh(scale * (W h + b) / cap)        the V logits of one position (cap, scale and b: in few models)
#   log p(t) = z_t - log sum_v exp(z_v)
#   d log p(t) / d h = W^T [scale * (1 - (z / cap)^2) * (onehot(t) - softmax(z))]
#
# Each log-probability depends on the hidden state h of its own position alone, so its gradient is one row of d numbers.
# While a chunk of logits is at hand the forward pass forms these rows too, and the backward pass only scales them: the
# logits are computed once, and never more than a chunk of them exists. Only if W itself is trained (full fine-tuning) does
# the backward pass compute them again, since W's gradient mixes all positions.

LOGITS_AT_ONCE = 2**25  # elements of a chunk of logits: 128 MiB in float32, which all that follows overwrites


def head_logits(hidden, weight, bias, scale: float, softcap: float | None) -> torch.Tensor:
    """(C, d) -> float32 logits (C, V), as the model's own head gives them."""
    logits = F.linear(hidden, weight, bias).float()
    logits = logits * scale if scale != 1 else logits
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def take_logps(logits, targets) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (log p(targets) (C,), sum_v exp(z_v - max z) (C, 1)). Overwrites logits (C, V) with exp(z - max z): what follows needs
    no second pass of exp, and no second tensor of that size."""
    target, largest = logits.gather(1, targets[:, None]), logits.amax(1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    return (target - largest - total.log()).squeeze(1), total


def logps_and_gradient(logits, targets, scale: float, softcap: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """-> log p(targets) (C,), and d log p(target) / d (W h + b) (C, V) in place of the logits."""
    slope = scale * (1 - (logits / softcap) ** 2) if softcap else scale
    logps, total = take_logps(logits, targets)
    gradient = logits.div_(-total)  # -softmax(z)
    gradient.scatter_add_(1, targets[:, None], torch.ones_like(total))
    return logps, gradient.mul_(slope) if softcap or scale != 1 else gradient


class LinearLogps(torch.autograd.Function):
    """log p(targets) under softmax(head(hidden)). hidden (N, d), weight (V, d), bias (V,) or None, targets (N,) -> (N,)
    float32. Gradients for hidden, and for weight and bias if they are trained."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, softcap):
        ctx.head_trains, ctx.scale, ctx.softcap = ctx.needs_input_grad[1], scale, softcap
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        rows = torch.empty_like(hidden) if ctx.needs_input_grad[0] and not ctx.head_trains else None  # d log p / d h
        ctx.chunk = max(1, LOGITS_AT_ONCE // len(weight))
        for i in range(0, len(hidden), ctx.chunk):
            part = slice(i, i + ctx.chunk)
            logits = head_logits(hidden[part], weight, bias, scale, softcap)
            if rows is None:
                logps[part] = take_logps(logits, targets[part])[0]
            else:
                logps[part], gradient = logps_and_gradient(logits, targets[part], scale, softcap)
                rows[part] = gradient.to(weight.dtype) @ weight
        ctx.save_for_backward(*((hidden, weight, bias, targets) if ctx.head_trains else (rows,)))
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # (N,)
        if not ctx.head_trains:
            return ctx.saved_tensors[0] * grad[:, None].to(ctx.saved_tensors[0].dtype), *[None] * 5
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for i in range(0, len(hidden), ctx.chunk):
            part = slice(i, i + ctx.chunk)
            logits = head_logits(hidden[part], weight, bias, ctx.scale, ctx.softcap)
            gradient = logps_and_gradient(logits, targets[part], ctx.scale, ctx.softcap)[1].mul_(grad[part, None])
            if bias is not None:
                grad_bias += gradient.sum(0)
            gradient = gradient.to(weight.dtype)
            grad_hidden[part] = gradient @ weight
            grad_weight += gradient.T @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype), None, None, None


def output_head(model, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor | None, float, float | None]:
    """(weight (V, d), bias, scale, softcap), what `head_logits` takes, in the dtype of the computation. The logits come out divided
    by the temperature, soft-capped ones too: cap / T * tanh(scale / T * x / (cap / T)) is cap * tanh(scale * x / cap) / T."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)  # Cohere, Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    # autocast would cast the weight anew for every chunk: cast it once, here
    kind = head.weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    bias = None if head.bias is None else head.bias.to(dtype)
    return head.weight.to(dtype), bias, scale / temperature, softcap and softcap / temperature


def target_logps(model, input_ids, targets, target_index, documents=None, temperature=1.0, **inputs) -> torch.Tensor:
    """log p of each target token in nats, called as `model.target_logps(**batch)` with a batch of `Corpus.collate`.

    input_ids (B, T). target_index (N,): positions in the flattened (B * T,) whose next token is targets (N,). Whatever else
    is given (attention_mask, position_ids, inputs_embeds ...) goes to the backbone. The distribution is softmax(logits / temperature).
    -> (N,) float32, differentiable.
    """
    if model.config._attn_implementation == "documents":
        inputs["documents"] = documents
    hidden = model.base_model(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state  # (B, T, d)
    hidden = hidden.flatten(0, 1).index_select(0, target_index)  # the head runs on positions that predict a target: (N, d)
    weight, bias, scale, softcap = output_head(model, temperature)
    with torch.autocast(hidden.device.type, enabled=False):
        return LinearLogps.apply(hidden.to(weight.dtype), weight, bias, targets, scale, softcap)


@torch.no_grad()
def check_head(model, exact: bool) -> None:
    """Refuse a model whose own logits are not what `target_logps` makes of its head (other scalings, further layers)."""
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise UserError(f"{type(model).__name__} has no linear output head, which the loss here needs")
    ids = torch.arange(5, 17, device=head.weight.device)[None]
    model.eval()
    with attention(model, model.padded_attention):
        expected = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        ours = model.target_logps(ids, ids[0, 1:], torch.arange(11, device=ids.device))
    if not torch.allclose(ours, expected, rtol=0, atol=1e-3 if exact else 0.1):
        raise UserError(f"{type(model).__name__} changes its logits in a way that is not known here: off by {(ours - expected).abs().max():.3g} nats")


def model_inputs(batch: dict) -> dict:
    """What of a batch the model itself takes: preference data brings more."""
    return {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask", "documents") if name in batch}


# --------------------------------------------------------------------------------------------------------- 8. Files


def unsharded(value):
    """A parameter or an optimizer state, gathered from all ranks if it is sharded; on the CPU, and on rank 0 alone."""
    if not isinstance(value, torch.Tensor):
        return value
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.detach().cpu().contiguous() if rank() == 0 else None


def sync(*paths: Path) -> None:
    """Wait until files, and the names in folders, are on the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def unfinished(folder: Path):
    """-> a temporary folder in the folder, for the time of a with block. Nothing stays of it where something cannot be written."""
    temporary = folder / ".unfinished"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        temporary.mkdir(parents=True)
        yield temporary
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if type(error) in (Exception, RuntimeError, safetensors.SafetensorError):  # of tokenizers, torch, safetensors: a full disk
            raise OSError(f"{folder} cannot be written: {str(error).splitlines()[0]}") from error
        raise


def result_files(folder: Path) -> list[Path]:
    """What makes a folder a model or an adapter to other programs."""
    patterns = ("adapter_config.json", "adapter_model.*", "config.json", "generation_config.json", "model.safetensors*", "model-*-of-*.safetensors")
    return [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]


def save_into(folder: Path, write, result: bool = False) -> None:
    """write(temporary folder), then move its files into the folder: a run killed meanwhile leaves no half-written file. result: they are
    a model or an adapter, and replace one of another kind, whose files would pass for part of it."""
    with unfinished(folder) as temporary:
        write(temporary)
        sync(*temporary.rglob("*"), temporary)
        for old in [*result_files(folder), folder / "chat_template.jinja"] if result else []:
            if not (temporary / old.name).exists():
                old.unlink(missing_ok=True)
        for path in sorted(temporary.rglob("*")):
            place = folder / path.relative_to(temporary)
            place.mkdir(exist_ok=True) if path.is_dir() else os.replace(path, place)
        sync(folder)
        shutil.rmtree(temporary)


def remove(folder: Path) -> None:
    """Its name goes first: a run killed meanwhile leaves nothing half-deleted under a name that means it is whole."""
    doomed = folder.with_name(".unfinished")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def save_trained(folder: Path, model, tokenizer, dtype: torch.dtype, trust_remote_code: bool = False) -> None:
    """`save_model` of a model whose every parameter was trained, in dtype. Shards are gathered on rank 0."""
    state = {}
    for name, tensor in model.state_dict().items():  # one by one: never a second copy of all masters
        whole = unsharded(tensor)
        if rank() == 0:
            state[name] = whole.to(dtype) if whole.is_floating_point() else whole
    if rank() == 0:
        with torch.device("meta"):  # a fresh model of the same class: FSDP2 has changed this one's
            auto_class = transformers.AutoModelForCausalLM if model.get_output_embeddings() else transformers.AutoModelForSequenceClassification
            fresh = auto_class.from_config(model.config, trust_remote_code=trust_remote_code)
        fresh.load_state_dict(state, strict=False, assign=True)
        fresh.tie_weights()
        assert not any(p.is_meta for p in fresh.parameters())
        fresh.padded_attention = model.padded_attention
        if model.can_generate():
            fresh.generation_config = model.generation_config
        save_model(folder, fresh, tokenizer)


def save_model(folder: Path, model, tokenizer) -> None:
    """A Hugging Face folder: weights, config, tokenizer with its chat template, generation_config with the same eos."""
    if rank() != 0:
        return
    if model.can_generate():  # a sequence classifier does not
        stop = stop_ids(model, tokenizer)
        model.generation_config.update(eos_token_id=stop if len(stop) > 1 else stop[0], pad_token_id=tokenizer.pad_token_id)
        try:
            model.generation_config.validate(strict=True)
        except ValueError:  # some bases set a temperature but forget do_sample, and would not be saved
            model.generation_config.do_sample = True
    with attention(model, model.padded_attention):  # other programs do not know ours
        save_into(folder, lambda path: (model.save_pretrained(path), tokenizer.save_pretrained(path)), result=True)


def save_adapter(args, model, tokenizer, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """adapter_config.json and adapter_model.safetensors in --output, in PEFT's form: config fields and keys are PEFT's."""
    where = Path(args.output) / "base" if args.model == "random" else Path(args.model)
    base = str(where.resolve()) if args.model == "random" or where.exists() else args.model  # a Hub name stays as it is
    config = {"base_model_name_or_path": base, "task_type": "CAUSAL_LM", "inference_mode": True, "base_fingerprint": model.base_fingerprint} | config

    tensors_on_cpu = {name: unsharded(tensor) for name, tensor in tensors.items()}

    def write(folder: Path) -> None:
        safetensors.torch.save_file(tensors_on_cpu, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        tokenizer.save_pretrained(folder)

    if rank() != 0:
        return
    save_into(Path(args.output), write, result=True)
    if args.model == "random":
        base = tiny_model()
        base.padded_attention = base.config._attn_implementation
        save_model(where, base, tokenizer)


def check_lora_config(config: dict, named: str, trains: str) -> None:
    """Refuse what PEFT's LoraConfig can ask for beyond y = W0 x + s B A x, but for what the script trains, and damaged sizes."""
    for key in ("r", "lora_alpha"):
        if type(config.get(key)) not in (int, float) or not 0 < config[key] < 2**20:
            raise UserError(f"{named}: {key} in its adapter_config.json is {config.get(key)!r}")
    beyond = ("use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "alora_invocation_tokens", "arrow_config",
              "kasa_config", "monteclora_config", "use_bdlora", "velora_config")  # fmt: skip
    unknown = [key for key in beyond if config.get(key) and key != trains] + ["bias"] * (config.get("bias", "none") != "none")
    if config.get("init_lora_weights") not in (None, True, False, "gaussian"):  # PiSSA and others change the base as well
        unknown.append(f"init_lora_weights {config['init_lora_weights']}")
    if unknown:
        raise UserError(f"{named} uses {', '.join(unknown)}, which this script does not train")


def load_adapter(folder: str, model, peft_type: str, flag: str = "--adapter", trains: str = "use_rslora") -> tuple[dict, dict[str, torch.Tensor]]:
    """-> (config, tensors) of an adapter folder, ours or PEFT's. Refused if it was trained on another base. flag: what named the folder.
    trains: the variant of LoRA that the script knows."""
    try:
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        with with_data():
            tensors = safetensors.torch.load_file(Path(folder) / "adapter_model.safetensors")
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise UserError(f"{flag} {folder}: no readable adapter_config.json and adapter_model.safetensors in it: {error}")
    if not isinstance(config, dict) or config.get("peft_type") != peft_type:
        raise UserError(f"{flag} {folder}: not a {peft_type} adapter")
    if scalars := [name for name, tensor in tensors.items() if tensor.dim() == 0]:
        raise UserError(f"{flag} {folder}: {scalars[0]} is a single number, and no adapter's tensor")
    if peft_type == "LORA":
        check_lora_config(config, f"{flag} {folder}", trains)
    if isinstance(model.get_input_embeddings().weight, FakeTensor):
        return config, {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    if "base_fingerprint" not in config:
        say(f"{flag} {folder} names no base fingerprint: it is taken on trust that it belongs to this model")
    elif config["base_fingerprint"] != model.base_fingerprint:
        raise UserError(f"{flag} {folder} was trained on another base than this model: on {config.get('base_model_name_or_path')}")
    return config, tensors


@torch.no_grad()
def fill_adapter(own: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], folder: str, flag: str = "--adapter") -> None:
    """Copy an adapter's tensors into the model's own, under PEFT's names. Every one must be there, and no other."""
    odd = own.keys() ^ tensors.keys() or {name for name in own if own[name].shape != tensors[name].shape}
    if odd:
        raise UserError(f"{flag} {folder} does not fit this model: {min(odd)} is missing, unexpected, or of another shape")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def say_how_to_use(args, adapter: bool = True, script: str | None = "lora.py", options: str = "") -> None:
    """The last lines of a run: where its result lies, and commands that use it as they stand. script: what merges the adapter,
    None if nothing does. options: more of PEFT's from_pretrained."""
    remote = ", trust_remote_code=True" * args.trust_remote_code
    question = "'Hello'" if args.template == "none" else "[dict(role='user', content='Hello')]"
    plain = "t.pipeline('text-generation', '{}'" + remote + f")({question}, max_new_tokens=50, do_sample=False)[0]['generated_text']"
    plain += "[-1]" * (args.template != "none")  # the last message of the conversation
    if not adapter:
        say(f"""
The model lies in {args.output}. Answer with it:
  python -c "import transformers as t; print({plain.format(args.output)})\"""")
        return
    merged = f"{args.output}-merged"
    again = ["python", script, "--model", f"{args.output}/base" if args.model == "random" else args.model, "--adapter", args.output]
    again += ["--eval-fraction", "0", "--samples", "0", "--max-steps", "0", "--merge", "--output", merged]
    again += ["--trust-remote-code"] * args.trust_remote_code
    if args.template:
        again += ["--template", "none" if args.template == "none" else f"{args.output}/chat_template.jinja"]
    load = f"import peft, transformers as t; model = peft.AutoPeftModelForCausalLM.from_pretrained('{args.output}'{remote}{options})"
    through_peft = plain.format(args.output).replace(f"'{args.output}'{remote}", f"model, tokenizer='{args.output}'")
    say(f"""
The adapter lies in {args.output}. Answer with it through PEFT (pip install peft):
  python -c "{load}; print({through_peft})\"""")
    if script is None:  # keys, values and embeddings in front of the text cannot be merged into weights
        return
    say(f"""\
Merge it into its base, and answer with that, which needs no PEFT:
  {shlex.join(again)}
  python -c "import transformers as t; print({plain.format(f'{merged}/merged')})\"""")


# ------------------------------------------------------------------------------------------------------- 9. The run


def decay_groups(model, weight_decay: float) -> list[dict]:
    """Optimizer groups: decay on matrices, none on biases and norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [([p for p in trained if p.dim() >= 2], weight_decay), ([p for p in trained if p.dim() < 2], 0.0)]
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


def learning_rate(step: int, total: int, args) -> float:
    """Of the update that ends step + 1: a linear warmup whose first update is not wasted at 0, then the schedule."""
    warmup = math.ceil(args.warmup_ratio * total)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return args.lr * {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[args.schedule]


def sum_gradients(parameters: list) -> None:
    """Under torchrun: the sum of all ranks' gradients of replicated parameters, in one message. FSDP2 has summed its own."""
    replicated = [p for p in parameters if not isinstance(p, DTensor)]
    if world_size() == 1 or not replicated:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in replicated])
    dist.all_reduce(flat)
    for p, gradient in zip(replicated, flat.split([p.numel() for p in replicated])):
        p.grad = gradient.view_as(p).to(p.dtype)


def check_gradients(model) -> None:
    """After a backward pass: a trained parameter without a gradient would stay as it is for ever."""
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if lost:
        raise UserError(f"{len(lost)} trainable parameters get no gradient, the first of them {lost[0]}")


def over_ranks(value: float, op=dist.ReduceOp.SUM) -> float:
    """Sum (or other reduction) of a number over all ranks."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op)
    return tensor.item()


@contextmanager
def evaluating(model):
    """No dropout and no gradients, for the time of a with block."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        if isinstance(model, FSDPModule):
            model.reshard()  # after a forward pass without a backward, its own parameters would stay gathered


def corpus_means(model, corpus: Corpus, sums) -> dict[str, float]:
    """sums(batch) -> named sums over a batch; here the same over a whole corpus, divided by what its loss is the mean over."""
    with evaluating(model):
        parts = [sums(batch) for batch in corpus.deal(corpus.rows())]  # read at the end, all at once
    totals = {name: math.fsum(torch.stack([part[name] for part in parts]).tolist()) for name in parts[0]}
    return {name: over_ranks(total) / corpus.count(corpus.rows()) for name, total in totals.items()}


def stop_ids(model, tokenizer) -> list[int]:
    """Tokens that end an answer: the tokenizer's eos, the model's own, and the chat template's end of turn."""
    own = model.generation_config.eos_token_id
    stop = [tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])]
    if tokenizer.chat_template:
        ids, _, end = answer_span(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        stop = [ids[end - 1]] * (ids[end - 1] in tokenizer.all_special_ids) + stop
    return list(dict.fromkeys(stop))


def generate(model, tokenizer, prompts: list[list[int]], device, max_new_tokens: int = 128) -> list[str]:
    """Greedy answers to prompts (token ids), in one left-padded batch. `generate` derives position_ids from the mask."""
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    settings = transformers.GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=1.0, use_cache=True,
                                             eos_token_id=stop_ids(model, tokenizer), pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    with evaluating(model), attention(model, model.padded_attention):
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, synced_gpus=world_size() > 1)
    return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)


def samples(model, tokenizer, corpus: Corpus, count: int) -> list[tuple[str, str, str]]:
    """(prompt, the model's answer, the answer in the data) of the first documents; raw text is continued from its middle."""
    prompts, references, answers = [], [], []
    documents = [document for row in corpus.rows() for document in (row if corpus.answers is None else row[:1])]
    for document in documents[:count]:
        ids, marks = corpus.table[document]["input_ids"].tolist(), corpus.table[document]["is_target"].astype(np.int8)
        starts = np.flatnonzero(np.diff(marks) == 1) + 1  # where answers begin
        start = int(starts[-1]) if starts[-1] > 1 else len(ids) // 2
        prompts.append(ids[:start])
        references.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    size = max(1, min(32, 8192 // (128 + max(map(len, prompts), default=0))))  # a 7B keeps 0.5 MiB of keys and values for each token
    for first in range(0, len(prompts), size):
        answers += generate(model, tokenizer, prompts[first : first + size], corpus.device)
    return [(tokenizer.decode(p, skip_special_tokens=True), a, r) for p, a, r in zip(prompts, answers, references)]


def peak_memory_gib(device: torch.device) -> float:
    """Peak GiB allocated on a CUDA device; elsewhere, the most the process has held in host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def sharded_like(p, value):
    """The inverse of `unsharded`: this rank's part of a tensor of p's shape, placed as p is."""
    if not isinstance(p, DTensor) or not isinstance(value, torch.Tensor) or value.shape != p.shape:
        return value
    part, rows = torch.empty_like(p, requires_grad=False), value.chunk(world_size())
    part.to_local().copy_(rows[rank()] if rank() < len(rows) else value[:0])
    return part


claimed = {}  # --output folders of this process's runs, each with the handle that holds its lock until the run or the process ends


def claim(args) -> None:
    """Refuse an --output that another process of this machine writes to, that holds what this run reads or a run that is not finished,
    or a model or an adapter that no run has written."""
    output, folder = Path(args.output), Path(args.output).resolve()
    for name in ("model", "adapter", "reward", "reference"):
        path = getattr(args, name, None)
        if path and Path(path).resolve() in (folder, folder / "merged"):
            raise UserError(f"--output {output}: its result would replace --{name} {path}: choose another")
    metrics = output / "metrics.jsonl"
    if not metrics.exists() and not checkpoints(output) and (found := [*result_files(output), *output.glob("merged")]):
        raise UserError(f"{output} holds {found[0].name}, and no metrics.jsonl of a run that wrote it: choose another --output")
    if rank() == 0 and folder not in claimed:
        output.mkdir(parents=True, exist_ok=True)
        handle = os.open(output, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(f"another process writes to {output}: wait for its end, or choose another --output")
        except OSError:  # a file system without locks
            pass
        claimed[folder] = handle
    before = metrics.read_text(encoding="utf-8", errors="replace") if metrics.exists() else ""
    if checkpoints(output) and not args.resume and '{"done": true' not in before:
        raise UserError(f"{output} holds a run that is not finished: --resume it, delete it, or choose another --output")


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints, oldest first: a folder gets its name only when everything in it is on the disk."""
    return sorted((output / "checkpoint").glob("step-" + 8 * "[0-9]"))


class Run:
    """The bookkeeping of a run: where it stands, what it logs, what it saves. Two places in --output:

    metrics.jsonl   a line for the run, one for each logged step and each evaluation, and a last one {"done": true}
    checkpoint/     step-N folders, the last --keep complete ones: trained weights, optimizer, state, SHA-256 of each file
    """

    # Flags that may differ on --resume. The base model, the data, the adapter and the rows of a step are compared by content.
    MAY_DIFFER = {
        "model", "data", "eval_data", "output", "resume", "inspect", "samples", "exact_match", "log_every", "eval_every", "save_every", "keep",
        "batch_size", "grad_accum", "gradient_checkpointing", "checkpoint_blocks", "merge", "merge_base", "adapter", "offload", "shard",
        "trust_remote_code", "compile", "estimate", "patience",
    }  # fmt: skip

    FILES = ("weights.safetensors", "optimizer.pt", "state.json")  # of a checkpoint, beside manifest.json with their checksums
    STATE = ("step", "tokens", "window", "window_count", "eval_loss", "best_loss", "stale", "own")  # what a checkpoint keeps of the run itself

    def __init__(self, args, model, tokenizer, optimizers: list, corpus: Corpus, evaluation: Corpus | None, measure=None, show=None):
        """measure() -> named held-out figures, "loss" among them for --patience; default: the targets' negative log-likelihood.
        show() -> held-out examples, (prompt, answer, reference) each; default: answers to held-out prompts."""
        self.measure = measure or (lambda: corpus_means(model, evaluation, lambda batch: {"loss": -model.target_logps(**batch).sum()}))
        self.show = show or (lambda: samples(model, tokenizer, evaluation or corpus, max(args.samples, args.exact_match)))
        self.args, self.model, self.tokenizer, self.optimizers, self.device = args, model, tokenizer, optimizers, corpus.device
        self.corpus, self.evaluation, self.output, self.total_steps = corpus, evaluation, Path(args.output), len(corpus.plan())
        if args.estimate:
            self.step = 1  # past the checks of step 0
            return
        if self.total_steps == 0 and args.max_steps is None:
            raise UserError(f"--data {' '.join(args.data)}: with these weights, {args.epochs} epochs are not one row")
        claim(args)
        self.step = self.tokens = self.window_count = 0  # the window is what came since the last logged step
        self.window, self.unread, self.eval_loss, self.signal, self.asked, self.peak = {}, [], None, None, 0.0, None
        self.best_loss, self.stale = None, 0  # the least held-out loss, and evaluations since
        self.own = {}  # numbers by name that a script keeps over a restart
        self.trained = {p: name for name, p in model.named_parameters() if p.requires_grad}  # now, as FSDP2 swaps them later
        self.identity = self.what_must_not_differ()
        self.metrics = self.output / "metrics.jsonl"
        if world_size() > 1:
            seen = [None] * world_size()
            dist.all_gather_object(seen, [self.identity, [path.name for path in checkpoints(self.output)[-1:] if args.resume], self.device.type])
            if any(other != seen[0] for other in seen):  # they would wait for each other, or train different things
                raise UserError("the ranks see different data, models, devices or checkpoints: --model, --data and, with --resume, --output "
                                "must be shared")  # fmt: skip
        resumed = args.resume and self.load_checkpoint()
        if rank() == 0:
            self.open_metrics(resumed)
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self.on_signal)
        self.started, self.before = time.perf_counter(), []
        self.bar = tqdm(total=self.total_steps, initial=self.step, desc="training", unit="step", disable=rank() != 0,
                        mininterval=0.5 if sys.stderr.isatty() else 10)  # fmt: skip

    def what_must_not_differ(self) -> dict:
        """On --resume: the base model, the data, the rows of a step, where an adapter began, and all flags but MAY_DIFFER."""
        documents = [self.corpus.digests, [(len(part), weight) for part, weight in self.corpus.sources]]
        identity = {"base model": self.model.base_fingerprint, "data": documents, "rows a step": self.corpus.rows_per_step}
        identity |= {self.args.flags.get(name, name): value for name, value in vars(self.args).items() if name not in self.MAY_DIFFER}
        if getattr(self.args, "adapter", None):  # where training began is the reference of some losses
            identity["adapter"] = file_digest(Path(self.args.adapter) / "adapter_model.safetensors")
        return json.loads(json.dumps(identity))  # tuples to lists, as they come back from the file

    def open_metrics(self, resumed: bool) -> None:
        """Begin metrics.jsonl; on --resume cut it back to the checkpoint, so that no step stands in it twice."""
        self.output.mkdir(parents=True, exist_ok=True)
        for folder in (self.output, self.output / "checkpoint"):
            shutil.rmtree(folder / ".unfinished", ignore_errors=True)
        lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines() if resumed and self.metrics.exists() else []
        entries = []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:  # torn when a disk was full or the power failed
                continue
            if "run" in entry or "done" not in entry and entry["step"] <= self.step:
                entries.append(entry)
        self.remove_old()  # a run may have been killed before it could
        if not resumed and (self.output / "checkpoint").exists():
            remove(self.output / "checkpoint")  # of a finished run: see claim
        if not entries:
            trainable, parameters = count_parameters(self.model)
            command = ["git", "rev-parse", "HEAD"]
            commit = shutil.which("git") and subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
            entries = [{"run": {
                "script": Path(sys.argv[0]).name, "args": vars(self.args), "git_commit": commit or None, "world_size": world_size(),
                "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__},
                "device": torch.cuda.get_device_name() if self.device.type == "cuda" else f"{self.device.type}, {torch.get_num_threads()} threads",
                "trainable_parameters": trainable, "total_parameters": parameters,
            }}]  # fmt: skip
        temporary = self.metrics.with_suffix(".new")
        temporary.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")
        os.replace(temporary, self.metrics)

    def write(self, **entry) -> None:
        if rank() == 0:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def on_signal(self, kind: int, frame) -> None:
        now = time.monotonic()
        if self.signal is not None:
            if now - self.asked > 3:  # asked twice: now. Less is one request: a scheduler's, say, that torchrun passes on as well
                sys.exit(128 + kind)
            return
        self.signal, self.asked = kind, now
        if rank() == 0:
            with suppress(OSError):  # not by print, which this may have interrupted
                os.write(2, b"\na signal: the run ends after this step with a checkpoint, or with its result if no step is left; "
                            b"a second signal, 3 seconds later, ends it at once\n")

    def stop_signal(self) -> int:
        """The signal that any rank has got, or 0. One that comes later is for the next step: if ranks did not agree, those that go on
        would wait for the others for ever."""
        return int(over_ranks(self.signal or 0, dist.ReduceOp.MAX))

    def begin(self) -> None:
        """Held-out loss and samples before the first step; from here on the clock runs."""
        self.model.train()
        if self.args.estimate:
            return
        if self.step == 0:
            self.evaluate()
            self.before = self.show()
            self.measure_answers(self.before)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # what --estimate estimates: training, without answers to prompts
        self.clock, self.clock_tokens = time.perf_counter(), self.tokens

    def evaluate(self) -> None:
        if self.evaluation is None:
            return
        means = self.measure()
        self.eval_loss = means.get("loss")
        means |= {"perplexity": math.exp(min(self.eval_loss, 700))} if means.keys() == {"loss"} else {}
        self.write(step=self.step, **{name if name == "perplexity" else f"eval_{name}": value for name, value in means.items()})
        say(f"step {self.step}: held-out " + ", ".join(f"{name} {value:.4f}" for name, value in means.items()))
        if self.args.patience:
            better = self.best_loss is None or self.eval_loss < self.best_loss
            self.best_loss, self.stale = (self.eval_loss, 0) if better else (self.best_loss, self.stale + 1)
            if better:
                self.save_best()

    def end_step(self, epoch: float, sums: dict[str, torch.Tensor], tokens: int, count: int, lr: float, grad_norm: torch.Tensor | None) -> None:
        """Log, evaluate, save where due.

        sums: named sums over this rank's part of the step, "loss" first; logged is their sum over ranks and over the steps
        since the last logged one, divided by the sum of count, what the loss is the mean over. tokens, count: of all ranks.
        sums and grad_norm stay on the device until a step is logged, so that the host never waits for the GPU in between.
        """
        if self.args.estimate:
            return
        self.step, self.tokens, self.window_count = self.step + 1, self.tokens + tokens, self.window_count + count
        self.unread.append(torch.stack([value.detach().float() for value in sums.values()]))
        self.bar.update()
        stop = self.stop_signal()
        last = self.step == self.total_steps
        log, evaluate, save = (last or self.step % n == 0 for n in (self.args.log_every, self.args.eval_every, self.args.save_every))
        if not (log or evaluate or save or stop):
            return
        for values in torch.stack(self.unread).tolist():  # one by one, so that a checkpoint inside a window changes no bit
            self.window = {name: self.window.get(name, 0.0) + over_ranks(value) for name, value in zip(sums, values)}
        self.unread, norm = [], None
        if grad_norm is not None:
            norm = (grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm).item()
        if not math.isfinite(self.window["loss"]) or not math.isfinite(norm or 0):  # nothing was saved since the bad step
            self.stop_not_finite(f"the loss or the gradient norm ({norm})")
        if log:
            means, now = {name: value / self.window_count for name, value in self.window.items()}, time.perf_counter()
            speed = (self.tokens - self.clock_tokens) / (now - self.clock)
            self.peak = peak_memory_gib(self.device)
            self.write(step=self.step, epoch=round(epoch, 4), **means, lr=lr, grad_norm=norm, tokens=self.tokens,
                       tokens_per_second=round(speed, 1), peak_memory_gib=round(self.peak, 3))  # fmt: skip
            self.bar.set_postfix_str(f"loss {means['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)
            self.window, self.window_count, self.clock, self.clock_tokens = {}, 0, now, self.tokens
        if last:
            self.bar.close()
        paused = time.perf_counter()
        if evaluate:
            self.evaluate()
            stop = self.stop_signal()  # it may have taken long
        if save or stop or self.enough():
            self.save_checkpoint()
        if stop:
            if world_size() > 1:  # torchrun stops all when one rank ends, and rank 0 may still be writing
                dist.barrier()
            self.bar.close()
            say(f"stopped by a signal after step {self.step}: --resume goes on from here")
            sys.exit(128 + stop)
        self.clock += time.perf_counter() - paused  # tokens a second are of training alone

    def stop_not_finite(self, what: str):
        raise UserError(f"step {self.step}: {what} is not finite; {self.last_good()}. Try a lower --lr, or --dtype float32")

    def last_good(self) -> str:
        """For messages of a run that has gone wrong."""
        complete = checkpoints(self.output)
        return f"the last good checkpoint is {complete[-1]}" if complete else "there is no checkpoint yet"

    def save_checkpoint(self) -> None:
        """Everything by parameter name and unsharded, so that any number of ranks can load it; then the oldest beyond --keep go."""
        weights = {name: unsharded(p) for p, name in self.trained.items()}
        states = [item for optimizer in self.optimizers for item in optimizer.state.items()]
        optimizer = {self.trained[p]: {key: unsharded(value) for key, value in state.items()} for p, state in states}
        random = [(torch.get_rng_state(), torch.cuda.get_rng_state() if self.device.type == "cuda" else None)] * world_size()
        if world_size() > 1:
            dist.all_gather_object(random, random[0])
        if rank() != 0:
            return
        for name, tensor in weights.items():
            if not tensor.isfinite().all():  # after a gradient whose norm nothing has read
                self.stop_not_finite(name)
        state = {name: getattr(self, name) for name in self.STATE} | {"identity": self.identity}
        folder = self.output / "checkpoint"
        with unfinished(folder) as temporary:
            safetensors.torch.save_file(weights, temporary / "weights.safetensors")
            torch.save({"optimizer": optimizer, "random": random}, temporary / "optimizer.pt")
            (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
            (temporary / "manifest.json").write_text(json.dumps({name: file_digest(temporary / name) for name in self.FILES}))
            sync(*temporary.iterdir(), temporary)
            os.replace(temporary, folder / f"step-{self.step:08d}")
            sync(folder)
        self.remove_old()

    def remove_old(self) -> None:
        for old in checkpoints(self.output)[: -self.args.keep]:
            remove(old)

    def enough(self) -> bool:
        return bool(self.args.patience) and self.stale >= self.args.patience

    def steps(self):
        """`Corpus.steps` from where the run stands, until --patience has run out. Then the best weights are taken back."""
        if self.args.estimate:
            with with_data():
                micro_batches = self.corpus.largest()
            yield from self.args.estimate.steps(self.model, self.optimizers, micro_batches)
        for step in self.corpus.steps(self.step):
            if self.enough():
                say(f"step {self.step}: the held-out loss has not fallen for {self.stale} evaluations")
                break
            yield step
        self.bar.close()
        if self.args.patience and self.best_loss is not None and self.best_loss < self.eval_loss:
            best = self.output / "checkpoint" / "best.safetensors"
            if rank() == 0:
                try:
                    whole = json.loads(best.with_suffix(".json").read_text())["best.safetensors"] == file_digest(best)
                except (OSError, ValueError, TypeError, KeyError):
                    whole = False
                if not whole:
                    raise UserError(f"{best} is missing or damaged (its checksum does not match): --resume --patience 0 keeps the last weights")
            self.load_weights(best)
            say(f"taking back the weights with the least held-out loss, {self.best_loss:.4f}")
            self.eval_loss = self.best_loss

    def save_best(self) -> None:
        """The trained weights of the least held-out loss so far, for `steps` to take back."""
        weights = {name: unsharded(p) for p, name in self.trained.items()}
        if rank() == 0:
            folder = self.output / "checkpoint"
            folder.mkdir(parents=True, exist_ok=True)

            def write(path: Path) -> None:
                safetensors.torch.save_file(weights, path / "best.safetensors")
                (path / "best.json").write_text(json.dumps({"best.safetensors": file_digest(path / "best.safetensors")}))

            save_into(folder, write)

    @torch.no_grad()
    def load_weights(self, path: Path) -> None:
        """Read by rank 0, sent to the others."""
        weights = safetensors.safe_open(path, "pt") if rank() == 0 else None
        for p, name in self.trained.items():
            value = weights.get_tensor(name) if rank() == 0 else torch.empty(p.shape, dtype=p.dtype)
            if world_size() > 1:
                dist.broadcast(value, 0)
            p.copy_(sharded_like(p, value))

    def damage(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, None if every byte of it is as it was written. Only names in FILES are opened."""
        try:
            digests = json.loads((folder / "manifest.json").read_text())
            return next((f"{folder / name} is damaged: its checksum does not match" for name in self.FILES
                         if file_digest(folder / name) != digests[name]), None)  # fmt: skip
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            return f"{folder / 'manifest.json'} is damaged: {error!r}"
        except OSError as error:
            return f"{folder} is damaged: {error}"

    def load_checkpoint(self) -> bool:
        """Go on from the last checkpoint, if every byte of it is as it was written and the run is the same."""
        if not checkpoints(self.output):
            say(f"--resume: no checkpoint in {self.output}, starting at step 0")
            return False
        *before, folder = checkpoints(self.output)
        if damage := self.damage(folder):
            way_out = f"go on from {before[-1].name}" if before else "begin anew: there is no other (--keep 2 would keep one more)"
            raise UserError(f"--resume: {damage}. Delete {folder} to {way_out}")
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict) or state.keys() != {*self.STATE, "identity"}:
            raise UserError(f"--resume: {folder} was written by another version of common.py")
        for name in self.identity | state["identity"]:
            was, now = state["identity"].get(name), self.identity.get(name)
            if was != now:
                raise UserError(f"--resume: {name} is not what it was when {folder} was written" + (f": {was}, now {now}" if name[0] == "-" else ""))
        try:  # read where it is used; a pickle of anything but tensors and plain values is not loaded
            saved = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu", mmap=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise UserError(f"--resume: {folder / 'optimizer.pt'} is not what a run writes: {str(error).splitlines()[0]}")
        self.load_weights(folder / "weights.safetensors")
        for optimizer in self.optimizers:
            restored, order = optimizer.state_dict(), [p for group in optimizer.param_groups for p in group["params"]]
            states = [(i, p, saved["optimizer"].get(self.trained[p])) for i, p in enumerate(order)]
            restored["state"] = {i: {key: sharded_like(p, value) for key, value in state.items()} for i, p, state in states if state}
            optimizer.load_state_dict(restored)
            for values in optimizer.state.values():  # on a CPU they would stay mapped onto a file that the next checkpoint removes
                values |= {key: x.clone() for key, x in values.items() if isinstance(x, torch.Tensor) and x.device.type == "cpu"}
        random, cuda_random = saved["random"][rank() % len(saved["random"])]
        torch.set_rng_state(random)
        if cuda_random is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(cuda_random)
        for name in self.STATE:
            setattr(self, name, state[name])
        say(f"resumed after step {self.step} from {folder}")
        return True

    def measure_answers(self, shown: list[tuple[str, str, str]]) -> None:
        """--exact-match, of answers to held-out prompts."""
        if self.args.exact_match and shown:
            right = [answer.strip() == reference.strip() for _, answer, reference in shown[: self.args.exact_match]]
            self.write(step=self.step, eval_exact_match=sum(right) / len(right))
            say(f"step {self.step}: {sum(right)} of {len(right)} held-out answers are exactly the data's")

    def show_samples(self) -> None:
        """Held-out prompts with the answers before and after training (after a --resume: only after), and the data's; then the
        held-out figures before and after."""
        after = self.show()
        for n, (prompt, answer, reference) in enumerate(after[: self.args.samples]):
            before = f"--- before ---\n{self.before[n][1].strip()}\n" if self.before else ""
            say(f"\n--- held-out prompt {n + 1} ---\n{prompt.strip()}\n{before}--- after ---\n{answer.strip()}\n--- data ---\n{reference.strip()}")
        say("")
        self.measure_answers(after)
        if rank() == 0:
            lines = [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]
            for name in dict.fromkeys(key for line in lines for key in line if key.startswith("eval_") or key == "perplexity"):
                values = [line[name] for line in lines if name in line]
                if len(values) > 1:
                    say(f"{name:24} {values[0]:8.3f} before, {values[-1]:8.3f} after")

    def finish(self) -> None:
        """The last line of metrics.jsonl: everything that the run was to write has been written."""
        self.bar.close()
        if world_size() > 1:  # torchrun on another machine would wait for rank 0's result for five minutes only
            dist.barrier()
        if self.device.type == "cuda" and self.peak:
            say(f"measured: {self.peak:.3f} GiB at most on the GPU while training; --estimate says what of")
        self.write(done=True, step=self.step, eval_loss=self.eval_loss, tokens=self.tokens, seconds=round(time.perf_counter() - self.started, 1))
        if handle := claimed.pop(self.output.resolve(), None):
            os.close(handle)

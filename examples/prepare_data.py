"""Prepare a data set before training: convert, clean, deduplicate, mask and split its rows.

Reads what the scripts read (.jsonl, .json, .csv, .parquet, folders, Hub names) and rarer layouts,
and writes rows in two layouts: {"messages": [...]} to train on, and {"prompt", "chosen",
"rejected"} for dpo.py, orpo.py and reward_model.py. Every row goes through these steps, in this
order, and the run prints what each step changed or dropped, with three examples:

    convert      KTO labels, Firefly's and xtuner's rows -> the two layouts
    normalise    Unicode NFC, no zero-width or control characters, no input that says "no input"
    filter       drop what PROMPT_RULES and ANSWER_RULES match
    deduplicate  drop exact copies, and near copies by MinHash (below)
    mask         e-mail addresses, telephone numbers, identity card numbers -> [EMAIL] ...
    split        --held-out 0.02 of all prompts go to OUTPUT.eval.jsonl; a prompt is never in both

Near copies. Broder 1997, "On the resemblance and containment of documents". The resemblance of
two texts is the Jaccard index of their sets of character 5-grams, |A & B| / |A | B|. For a random
hash function h, min h(A) = min h(B) with exactly that probability. So the share of 128 functions
whose minima agree estimates it, with a standard error of at most 0.045. The minima are cut into 32
bands of 4, and two texts are compared if a band agrees (locality-sensitive hashing): probability
1 - (1 - J^4)^32, which is 0.9999999 at a resemblance J of 0.8, 0.87 at 0.5, 0.05 at 0.2.

The first of several near copies is kept. Masking finds no names and no postal addresses.

    python examples/prepare_data.py --data raw.jsonl --output clean.jsonl --eval-data test.jsonl
"""

import argparse
import hashlib
import json
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402

PROMPT_RULES = {  # a row whose prompt matches is dropped: a text model cannot do the task
    "needs an image or a file": r"(?i)\b(this|following|attached) (image|photo|picture|video|file)",
    "needs an image, Chinese": r"(这张|下面的|以下)(图片|照片|视频|音频)",
    "needs the web": r"(?i)\b(search (the web|online)|open this link|latest news)\b",
}
ANSWER_RULES = {  # a row with an answer that matches is dropped
    "speaks of being a model": r"(?i)\bas an? (AI|artificial) (language )?model\b",
    "is a placeholder": r"(?i)^\W*(todo|n/?a|none|null|<?output>?)\W*$",
}
NO_INPUT = r"(?i)\W*(no ?input|none|n/?a|nan|null|not applicable|empty|无|没有|暂无|无输入)\W*"
INVISIBLE = re.compile(r"[\u200b\u2060\ufeff\u00ad\x00-\x08\x0b-\x1f\x7f-\x9f]")
EMAIL = re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)*\.[A-Za-z]{2,}")
PHONE = re.compile(
    r"(?<![A-Za-z\d.])(\+\d{1,3}[ -]?(\(?\d{1,4}\)?[ -]?){2,4}\d{2,4}"
    r"|\(\d{3}\) ?\d{3}-\d{4}|\d{3}-\d{3}-\d{4}|1[3-9]\d{9}|1[3-9]\d-\d{4}-\d{4})(?![\w.]\d|\d)"
)
CARD = re.compile(r"(?<!\d)\d{17}[\dXx](?!\d)")

BANDS = 32  # of 4 of the 128 hash functions: the high half of a x + b modulo 2^64
A, B = np.random.default_rng(0).integers(0, 2**64, (2, 4 * BANDS), dtype=np.uint64) | np.uint64(1)


def convert(row: dict, unpaired: dict) -> list[dict]:
    """A row of a rarer layout -> rows that common.py reads; any other row, as it is.

    unpaired: answers with a label, by prompt, that wait for one with the other label (KTO).
    """
    if {"prompt", "completion", "label"} <= row.keys() or "kto_tag" in row:
        good, answer = row.get("label", row.get("kto_tag")), row.get("completion")
        prompt = row.get("prompt")
        if answer is None:  # LLaMA-Factory: messages and kto_tag
            *prompt, answer = row["messages"]
        waiting = unpaired[json.dumps(prompt, sort_keys=True)]
        if not waiting[not good]:
            waiting[bool(good)].append(answer)
            return []
        other = waiting[not good].pop(0)
        pair = (answer, other) if good else (other, answer)
        return [{"prompt": prompt, "chosen": pair[0], "rejected": pair[1]}]
    if {"kind", "input", "target"} <= row.keys():  # Firefly
        return [{"prompt": row["input"], "completion": row["target"]}]
    if {"messages", "rejected_response"} <= row.keys():  # swift
        *prompt, answer = row["messages"]
        other = {"role": "assistant", "content": row["rejected_response"]}
        return [{"prompt": prompt, "chosen": [answer], "rejected": [other]}]
    if isinstance(row.get("conversation"), list):  # Firefly's and xtuner's conversations
        roles = {"system": "system", "human": "user", "input": "user"}
        roles |= {"assistant": "assistant", "output": "assistant"}
        pairs = [(roles[key], text) for part in row["conversation"] for key, text in part.items()]
        return [{"messages": [{"role": role, "content": text} for role, text in pairs if text]}]
    return [row]


def parse(row: dict) -> dict:
    """A row that common.py reads -> one of the two layouts, or {"text"}; else a ValueError."""
    for key in ("input", "context"):
        if isinstance(row.get(key), str) and re.fullmatch(NO_INPUT, row[key]):
            row = row | {key: ""}
    turns, answers, tools, margin = common.parse_row(row)
    if answers:
        chosen, rejected = answers  # a longer ranking cannot be one pair
        new = {"prompt": turns, "chosen": [chosen], "rejected": [rejected], "margin": margin}
    else:
        new = {"text": turns} if isinstance(turns, str) else {"messages": turns}
    return new | ({"tools": tools} if tools else {})


def change_texts(value, function):
    """A row with function(text) in place of raw text and of what every message says."""
    if isinstance(value, list):
        return [change_texts(item, function) for item in value]
    if not isinstance(value, dict):
        return value
    texts = {key: function(value[key]) for key in ("content", "text") if key in value}
    lists = {key: change_texts(x, function) for key, x in value.items() if isinstance(x, list)}
    return value | lists | texts


def text_of(row: dict) -> str:
    prompt, answers = prompt_and_answers(row)
    return "\n".join([prompt, *answers])


def prompt_and_answers(row: dict) -> tuple[str, list[str]]:
    """The text of what is asked, and of what is answered."""
    if "text" in row:
        return row["text"], []
    turns = row.get("messages") or row["prompt"]
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    answers += row.get("chosen", []) + row.get("rejected", [])
    said = [turn["content"] + str(turn.get("tool_calls") or "") for turn in answers]
    asked = [turn["content"] for turn in turns if turn["role"] in ("system", "user")]
    return "\n".join(asked), said


def normalise(text: str) -> str:
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n"))
    return INVISIBLE.sub("", text).strip()


def reason_to_drop(row: dict, least: int, most: int) -> str | None:
    prompt, answers = prompt_and_answers(row)
    if not all(text.strip() for text in answers or [prompt]):
        return "an empty answer"
    if not all(least <= len(text) <= most for text in answers):
        return "an answer that is too short or too long"
    if "chosen" in row and row["chosen"] == row["rejected"]:
        return "equal answers"
    found = [name for name, rule in PROMPT_RULES.items() if re.search(rule, prompt)]
    for name, rule in ANSWER_RULES.items():
        found += [f"an answer {name}" for text in answers if re.search(rule, text)]
    return found[0] if found else None


def is_identity_number(text: str) -> bool:
    """A Chinese number must end with its check digit (GB 11643-1999, ISO 7064 MOD 11-2)."""
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    total = sum(int(digit) * weight for digit, weight in zip(text, weights))
    return "10X98765432"[total % 11] == text[17].upper()


def mask(text: str) -> str:
    text = EMAIL.sub("[EMAIL]", text)
    text = CARD.sub(lambda m: "[ID]" if is_identity_number(m[0]) else m[0], text)
    return PHONE.sub("[PHONE]", text)


def min_hashes(text: str) -> np.ndarray:
    """(128,) uint32: for each hash function, the least value over the character 5-grams of a
    text, in lower case and single spaces."""
    text = re.sub(r"\s+", " ", text.lower()).strip()
    codes = np.array([*map(ord, text.ljust(5))], dtype=np.uint64)
    hashes = np.zeros(len(codes) - 4, dtype=np.uint64)
    for k in range(5):  # a polynomial modulo 2^64, of a number above any character's code
        hashes = hashes * np.uint64(1_114_123) + codes[k : len(codes) - 4 + k]
    values = np.unique(hashes)[:, None] * A + B  # (5-grams, 128)
    return (values.min(0) >> np.uint64(32)).astype(np.uint32)


class NearCopies:
    """An index of texts that finds those which resemble a new one."""

    def __init__(self, threshold: float):
        self.threshold, self.names, self.signatures = threshold, [], []
        self.bands = [defaultdict(list) for _ in range(BANDS)]

    def find(self, text: str, name=None):
        """-> the name of the closest earlier text whose estimated resemblance is at least the
        threshold; else None, and the text is added if it has a name."""
        signature = min_hashes(text)
        keys = [band.tobytes() for band in signature.reshape(BANDS, -1)]
        candidates = sorted({n for band, key in zip(self.bands, keys) for n in band.get(key, ())})
        if candidates:
            shares = (np.array([self.signatures[n] for n in candidates]) == signature).mean(1)
            if shares.max() >= self.threshold:
                return self.names[candidates[shares.argmax()]]
        if name:
            for band, key in zip(self.bands, keys):
                band[key].append(len(self.names))
            self.names.append(name)
            self.signatures.append(signature)


class Report:
    """How many rows each step changed or dropped, with three examples."""

    def __init__(self):
        self.counts, self.examples = Counter(), defaultdict(list)

    def note(self, step: str, place: str, example: str) -> None:
        self.counts[step] += 1
        if len(self.examples[step]) < 3:
            self.examples[step].append(f"{place}: {' '.join(str(example).split()):.120}")

    def print(self) -> None:
        for step, count in self.counts.items():
            print(f"{count:9,}  {step}")
            print("".join(f"{'':13}{example}\n" for example in self.examples[step]), end="")


def read_rows(names: list[str], report: Report):
    """Yield (place, row) of rows in our layouts, normalised."""
    unpaired = defaultdict(lambda: {True: [], False: []})
    for place, row in (pair for name in names for pair in common.open_source(name)[1]):
        try:
            row = common.load_row(row)
            for new in map(parse, convert(row, unpaired)):
                cleaned = change_texts(new, normalise)
                if cleaned != new:
                    report.note("normalised", place, text_of(new))
                yield place, cleaned
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            report.note("dropped: cannot be read", place, error)
    for prompt, waiting in unpaired.items():
        for answer in waiting[True] + waiting[False]:
            report.note("dropped: a label without its counterpart", prompt, answer)


def choose_rows(args, report: Report):
    """Yield (place, prompt, row) of the rows to keep, masked."""
    seen, near = set(), NearCopies(args.near)
    for place, row in tqdm(read_rows(args.data, report), unit=" rows", mininterval=1):
        text = text_of(row)
        digest = hashlib.sha256(text.encode()).digest()
        if why := reason_to_drop(row, args.min_answer, args.max_answer):
            report.note(f"dropped: {why}", place, text)
        elif digest in seen:
            report.note("dropped: an exact copy", place, text)
        elif args.near < 1 and (copy := near.find(text, place)):
            report.note(f"dropped: a near copy (>= {args.near})", place, f"of {copy}: {text}")
        else:
            seen.add(digest)
            masked = change_texts(row, mask)
            if masked != row:
                report.note("masked", place, text_of(masked))
            report.note("kept", place, text)
            yield place, prompt_and_answers(row)[0], masked


def prepare(args) -> Report:
    report, prompts = Report(), {}
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    files = {False: open(output, "w", encoding="utf-8")}  # noqa: SIM115
    if args.held_out:
        files[True] = open(output.with_suffix(".eval.jsonl"), "w", encoding="utf-8")  # noqa: SIM115
    for place, prompt, row in choose_rows(args, report):
        digest = hashlib.sha256(prompt.encode()).digest()
        held_out = int.from_bytes(digest[:4]) < args.held_out * 2**32
        files[held_out].write(json.dumps(row, ensure_ascii=False) + "\n")
        if not held_out:
            prompts.setdefault(prompt, place)
    for file in files.values():
        file.close()
    if args.eval_data:  # rows whose prompt is in the training rows
        index = NearCopies(args.near)
        for prompt, place in prompts.items():
            index.find(prompt, place)
        for place, row in read_rows(args.eval_data, Report()):
            prompt, _ = prompt_and_answers(row)
            if prompt in prompts:
                report.note("evaluation rows in the training data", place, prompts[prompt])
            elif copy := index.find(prompt):
                report.note(f"evaluation rows near training rows (>= {args.near})", place, copy)
    return report


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data", nargs="+", required=True, help="files, folders or Hub names")
    add("--output", required=True, help="the .jsonl file to write")
    add("--held-out", type=float, default=0.0, help="share of held-out prompts (default: 0)")
    add("--eval-data", nargs="+", help="report rows of these files that are also in the output")
    add("--near", type=float, default=0.8, help="resemblance of near copies (default: 0.8)")
    add("--min-answer", type=int, default=1, help="minimum characters (default: 1)")
    add("--max-answer", type=int, default=20_000, help="maximum characters (default: 20000)")
    prepare(parser.parse_args(argv)).print()


if __name__ == "__main__":
    common.launch(main, out_of_memory="")

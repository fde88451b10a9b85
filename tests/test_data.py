"""From a file to a batch: what rows mean, which tokens are targets, what is refused, and in which order rows come."""

import csv
import json
import math
import os
import random
import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import tokenizers
import torch
import trl
from conftest import run_script, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import lora

U, A, S = ({"role": role} for role in ("user", "assistant", "system"))

# ChatML as common.CHATML renders it, with the answer and its end-of-turn token inside {% generation %}.
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same, but the block closes before the end-of-turn token.
CLOSES_EARLY = GENERATION.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
    "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}",
)
# Like Qwen3: thoughts of answers before the last question are left out, and the last answer always has a think block.
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% set text = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{% if m['role'] != 'assistant' %}{{ m['content'] }}"
    "{% elif loop.index0 < ns.last %}{{ text }}"
    "{% elif '</think>' in m['content'] %}{{ m['content'] }}"
    "{% else %}{{ '<think>\n\n</think>\n\n' + text }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEXTS = ["plain", "中文，标点。", "emoji 👩‍👩‍👧 🇩🇪", "line\u2028and\u2029paragraph\x85", "two\nlines", "a\r\nb\rc",
         ' "quoted", \\ ', "x\ufeffy", "tab\tand\x0bmore"]  # fmt: skip
TALK = [U | {"content": "one"}, A | {"content": "first"}, U | {"content": "two"}, A | {"content": "second"}]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def tokenizer():
    return common.tiny_tokenizer()


def arguments(*flags):
    return common.make_parser("", output="unused", lr=1e-3).parse_args([str(flag) for flag in flags])


def encode(row, *flags, tokenizer=None):
    """The records that a row leaves in the token table."""
    return list(common.encode_row(row, "rows.jsonl:7", tokenizer or common.tiny_tokenizer(), arguments(*flags), 320))


def load(sources, *flags, tokenizer=None):
    args = arguments("--data", *sources, *flags)
    return common.load_data(args, tokenizer or common.tiny_tokenizer(), 320)


def sequences(corpus, epoch=0) -> list[list[int]]:
    """Token ids of every document of an epoch, in its order."""
    return [corpus.table[int(document)]["input_ids"].tolist() for document in corpus.order(epoch)]


def texts(corpus, tokenizer, epoch=0) -> list[str]:
    return [tokenizer.decode(ids) for ids in sequences(corpus, epoch)]


def target_texts(tokenizer, ids, marks) -> list[str]:
    """The text of each run of targets."""
    edges = np.flatnonzero(np.diff([0, *map(int, marks), 0]))
    return [tokenizer.decode(ids[first:last]) for first, last in zip(edges[::2], edges[1::2])]


def make_corpus(lengths, *flags, weights=(), seed=0) -> common.Corpus:
    """A corpus of random documents of these lengths. weights: (number of documents, weight) of each source."""
    draw = random.Random(seed)
    ids = [[draw.randrange(256) for _ in range(length)] for length in lengths]
    marks = [[False] + [draw.random() < 0.5 for _ in range(length - 2)] + [True] for length in lengths]
    columns = {"input_ids": ids, "is_target": marks, "length": list(lengths), "targets": [sum(m) for m in marks]}
    sources, first = [], 0
    for size, weight in weights or [(len(lengths), 1.0)]:
        sources.append((np.arange(first, first + size), weight))
        first += size
    return common.Corpus(datasets.Dataset.from_dict(columns), sources, arguments(*flags), pad_id=258)


def plain(value):
    """Tensors to lists, so that whole batches compare with ==."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


# ------------------------------------------------------------------------------------------------------ row formats

PAIR = [U | {"content": "q"}, A | {"content": "a"}]


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"text": "raw"}, "raw"),
        ({"messages": PAIR}, PAIR),
        ({"conversations": PAIR}, PAIR),
        ({"messages": [S | {"content": "s"}, *TALK]}, [S | {"content": "s"}, *TALK]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, PAIR),
        ({"conversations": [{"from": "system", "value": "s"}, *PAIR]}, [S | {"content": "s"}, *PAIR]),
        ({"messages": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}, PAIR),
        ({"messages": [*PAIR, {"role": "tool", "content": "t"}]}, [*PAIR, {"role": "tool", "content": "t"}]),
        ({"prompt": "q", "completion": "a"}, PAIR),
        ({"prompt": "q", "response": "a"}, PAIR),
        ({"question": "q", "answer": "a"}, PAIR),
        ({"prompt": [S | {"content": "s"}, PAIR[0]], "completion": [PAIR[1]]}, [S | {"content": "s"}, *PAIR]),
        ({"prompt": [PAIR[0]], "completion": "a"}, PAIR),
        ({"prompt": "q", "completion": [{"from": "gpt", "value": "a"}]}, PAIR),
        ({"instruction": "q", "output": "a"}, PAIR),
        ({"instruction": "q", "input": None, "output": "a"}, PAIR),
        ({"instruction": "q", "input": "", "output": "a"}, PAIR),
        ({"instruction": "q", "input": "", "output": "a", "text": "Below is ..."}, PAIR),
        ({"messages": PAIR, "id": 5, "source": None}, PAIR),
    ],
)  # fmt: skip
def test_every_training_row_format_becomes_its_messages_or_its_text(row, expected):
    assert common.parse_row(row, "x") == expected


def test_alpaca_input_is_part_of_the_user_turn_and_known_apart():
    user, answer = common.parse_row({"instruction": "Add.", "input": "1 2", "output": "3"}, "x")
    assert user == U | {"content": "Add.\n\n1 2", "instruction": "Add.", "input": "1 2"}
    assert answer == A | {"content": "3"}


ANSWERS = [[A | {"content": "good"}], [A | {"content": "bad"}]]
BEST_FIRST = [A | {"content": "good"}, A | {"content": "bad"}]


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, (PAIR[:1], BEST_FIRST, 0.0)),
        ({"prompt": PAIR[:1], "chosen": ANSWERS[0], "rejected": ANSWERS[1]}, (PAIR[:1], BEST_FIRST, 0.0)),
        ({"prompt": "q", "chosen": "good", "rejected": "bad", "margin": 2}, (PAIR[:1], BEST_FIRST, 2.0)),
        ({"prompt": "q", "chosen": "good", "rejected": "bad", "margin": None}, (PAIR[:1], BEST_FIRST, 0.0)),
        ({"chosen": [*PAIR[:1], *ANSWERS[0]], "rejected": [*PAIR[:1], *ANSWERS[1]]}, (PAIR[:1], BEST_FIRST, 0.0)),
        ({"chosen": [*TALK[:3], *ANSWERS[0]], "rejected": [*TALK[:3], *ANSWERS[1]]}, (TALK[:3], BEST_FIRST, 0.0)),
        ({"prompt": "q", "responses": ["good", "so-so", "bad"]},
         (PAIR[:1], [BEST_FIRST[0], A | {"content": "so-so"}, BEST_FIRST[1]], 0.0)),
        ({"prompt": [{"from": "human", "value": "q"}], "responses": ANSWERS}, (PAIR[:1], BEST_FIRST, 0.0)),
    ],
)  # fmt: skip
def test_preference_and_ranking_rows_give_prompt_answers_best_first_and_margin(row, expected):
    assert common.parse_preference(row, "x") == expected


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good"},
        {"prompt": "q", "chosen": "good", "rejected": None},
        {"prompt": None, "chosen": "good", "rejected": "bad"},
        {"chosen": "good", "rejected": "bad"},  # no prompt anywhere
        {"chosen": [*PAIR], "rejected": [*PAIR]},  # the same answer twice
        {"prompt": "q", "chosen": "good", "rejected": [U | {"content": "a question"}]},
        {"prompt": "q", "chosen": "good", "rejected": [*ANSWERS[1], *ANSWERS[1]]},
        {"prompt": "q", "responses": ["only one"]},
        {"prompt": "q", "responses": "good"},
        {"prompt": "q", "responses": ["good", None]},
        {"prompt": "q", "chosen": "good", "rejected": "bad", "margin": "wide"},
        {"prompt": "q", "chosen": "good", "rejected": "bad", "margin": True},
        {"prompt": "q", "chosen": "good", "rejected": "bad", "margin": math.nan},
        {"prompt": "q", "chosen": "good", "rejected": "bad", "margin": math.inf},
        {"prompt": "q", "chosen": "good", "rejected": "bad", "margin": 10**400},  # json reads it, no float can hold it
    ],
)
def test_a_wrong_preference_row_is_refused_with_its_place(row):
    with pytest.raises(common.UserError, match="^prefs.jsonl:3: "):
        common.parse_preference(row, "prefs.jsonl:3")


def test_a_prompt_is_a_string_or_a_conversation_that_ends_with_the_user_with_or_without_an_answer():
    assert common.parse_prompt({"prompt": "q"}, "x") == (PAIR[:1], [])
    assert common.parse_prompt({"prompt": TALK[:3]}, "x") == (TALK[:3], [])
    assert common.parse_prompt({"messages": [S | {"content": "s"}, PAIR[0]]}, "x") == ([S | {"content": "s"}, PAIR[0]], [])
    assert common.parse_prompt({"conversations": [{"from": "human", "value": "q"}]}, "x") == (PAIR[:1], [])
    for row in ({"prompt": "q", "completion": "a"}, {"question": "q", "answer": "a"}, {"messages": PAIR}, {"instruction": "q", "output": "a"}):
        assert common.parse_prompt(row, "x") == (PAIR[:1], PAIR[1:])
    assert common.parse_prompt({"prompt": "q", "chosen": "good", "rejected": "bad"}, "x") == (PAIR[:1], BEST_FIRST[:1])
    for row in ({"messages": PAIR[1:]}, {"prompt": None}, {"text": "q"}, {"prompt": [*PAIR, {"role": "tool", "content": "t"}]}):
        with pytest.raises(common.UserError, match="^prompts.jsonl:3: "):
            common.parse_prompt(row, "prompts.jsonl:3")


# ---------------------------------------------------------------------------------------------------------- sources


def read(source) -> list:
    _, rows = common.open_source(str(source))
    return list(rows())


def write_as(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        write_rows(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("mark", [b"", common.BYTE_ORDER_MARK], ids=["plain", "byte-order-mark"])
def test_every_kind_of_file_gives_the_same_text_back_through_the_tokenizer(suffix, mark, tmp_path, tokenizer):
    path = write_as(tmp_path / f"rows{suffix}", [{"text": text} for text in TEXTS])
    if mark and suffix != ".parquet":
        path.write_bytes(mark + path.read_bytes())
    corpus, _ = load([path], "--eval-fraction", 0, tokenizer=tokenizer)
    assert sorted(texts(corpus, tokenizer)) == sorted(text + "<|im_end|>" for text in TEXTS)


def test_jsonl_with_crlf_blank_lines_and_escapes_keeps_its_line_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = ['{"text": "a\u2028b"}', "", "   ", '{"text": "\\ud83d\\ude00\\r\\n"}', '{"text": "last"}']
    path.write_bytes("\r\n".join(lines).encode())
    expected = [("a\u2028b", 1), ("😀\r\n", 4), ("last", 5)]
    assert read(path) == [({"text": text}, f"{path}:{line}") for text, line in expected]


@pytest.mark.parametrize("indent", [None, 0, 3])
@pytest.mark.parametrize("before", ["", "\n\n  "])
def test_a_json_list_names_the_line_each_row_begins_on(indent, before, tmp_path):
    rows = [{"text": "], [{ \\\" \n"}, {"messages": PAIR}, {"text": "\u2028 中"}, {"text": ""}]
    pieces = [json.dumps(row, ensure_ascii=False, indent=indent) for row in rows]
    text, expected = before + "[\n", []
    for row, piece in zip(rows, pieces):
        expected.append((row, f"{tmp_path / 'rows.json'}:{1 + text.count(chr(10))}"))
        text += piece + ("\n , \n\n" if row is not rows[-1] else "\n]\n")
    (tmp_path / "rows.json").write_bytes(common.BYTE_ORDER_MARK + text.encode())
    assert json.loads(text) == rows
    assert read(tmp_path / "rows.json") == expected
    one_line = tmp_path / "line.json"
    one_line.write_text(json.dumps(rows), encoding="utf-8")
    assert read(one_line) == [(row, f"{one_line}:1") for row in rows]


def test_a_json_file_that_holds_an_object_a_line_is_read_as_jsonl(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n', encoding="utf-8")
    assert read(path) == [({"text": "a"}, f"{path}:1"), ({"text": "b"}, f"{path}:3")]


def test_csv_rows_are_named_by_the_line_they_end_on(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,completion\r\n"two\nlines","a, b"\r\nq,"say ""hi"""\r\n')
    assert read(path) == [({"prompt": "two\nlines", "completion": "a, b"}, f"{path}:3"),
                          ({"prompt": "q", "completion": 'say "hi"'}, f"{path}:4")]  # fmt: skip


def test_a_null_in_a_parquet_column_counts_as_a_missing_field(tmp_path):
    rows = [{"instruction": "q", "input": None, "output": "a"}, {"instruction": "q", "input": "i", "output": "a"}]
    path = write_as(tmp_path / "rows.parquet", rows)
    (first, where), (second, _) = read(path)
    assert (first, second, where) == ({"instruction": "q", "output": "a"}, rows[1], f"{path}: row 1")
    rows = [{"messages": TALK, "chosen": None}, {"messages": PAIR, "chosen": "x"}]
    conversations = write_as(tmp_path / "talks.parquet", rows)
    assert [common.parse_row(row, "x") for row, _ in read(conversations)] == [TALK, PAIR]


def test_a_folder_is_all_its_data_files_in_order_and_nothing_else(tmp_path):
    (tmp_path / "deep").mkdir()
    write_as(tmp_path / "b.csv", [{"text": "b"}])
    write_as(tmp_path / "a.jsonl", [{"text": "a"}])
    write_as(tmp_path / "deep" / "c.parquet", [{"text": "c"}])
    write_as(tmp_path / "deep" / "d.json", [{"text": "d"}])
    (tmp_path / "README.md").write_text("no data")
    assert [row["text"] for row, _ in read(tmp_path)] == ["a", "b", "c", "d"]


def test_a_weight_stands_behind_the_last_colon_unless_that_is_the_path(tmp_path):
    assert common.parse_source("a.jsonl") == ("a.jsonl", 1.0)
    assert common.parse_source("a.jsonl:2") == ("a.jsonl", 2.0)
    assert common.parse_source("dir:x/a.jsonl:.5") == ("dir:x/a.jsonl", 0.5)
    assert common.parse_source("name@config@train:1e-1") == ("name@config@train", 0.1)
    odd = write_rows(tmp_path / "rows.jsonl:3", [{"text": "a"}])
    assert common.parse_source(odd) == (odd, 1.0)


# ----------------------------------------------------------------------------------------------------------- faults

GOOD = b'{"text": "good"}\n'
BAD_LINES = {  # the second line of a .jsonl file -> words that its error needs
    "torn at the end of the file": (b'{"text": "to', "not valid JSON"),
    "torn in a string": (b'{"text": "to\n' + GOOD, "not valid JSON"),
    "torn between fields": (b'{"text": "to",\n' + GOOD, "not valid JSON"),
    "two objects": (b'{"text": "a"} {"text": "b"}\n', "not valid JSON"),
    "missing field": (b'{"prompt": "q"}\n', "'completion' is missing"),
    "missing output": (b'{"instruction": "q"}\n', "'output' is missing"),
    "null text": (b'{"text": null}\n', "'text' is null"),
    "null output": (b'{"instruction": "q", "output": null}\n', "'output' is null"),
    "null messages": (b'{"messages": null}\n', "'messages' is null"),
    "number as text": (b'{"text": 5}\n', "'text' is int"),
    "object as completion": (b'{"prompt": "q", "completion": {"a": 1}}\n', "'completion' is dict"),
    "number as input": (b'{"instruction": "q", "input": 3, "output": "a"}\n', "'input' is int"),
    "string as messages": (b'{"messages": "hi"}\n', "'messages' is str"),
    "no messages": (b'{"messages": []}\n', "'messages' is empty"),
    "number as message": (b'{"messages": [5]}\n', "message 1 of 'messages' is int"),
    "message without content": (b'{"messages": [{"role": "user"}]}\n', "'content' is missing"),
    "null content": (b'{"messages": [{"role": "user", "content": null}]}\n', "'content' is null"),
    "content in parts": (b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}\n', "'content' is list"),
    "null role": (b'{"messages": [{"role": null, "content": "q"}]}\n', "'role' is null"),
    "unknown role": (b'{"messages": [{"role": "wizard", "content": "q"}]}\n', "unknown role 'wizard'"),
    "lone surrogate": (b'{"text": "half \\ud83d"}\n', "surrogate"),
    "lone surrogate in a message": (b'{"messages": [{"role": "user", "content": "\\udc00"}]}\n', "surrogate"),
    "list as row": (b'["text", "a"]\n', "not list"),
    "string as row": (b'"text"\n', "not str"),
    "null as row": (b"null\n", "not NoneType"),
    "NaN as row": (b"NaN\n", "not float"),
    "NaN as text": (b'{"text": NaN}\n', "'text' is float"),
    "integer of 5000 digits": (b'{"text": ' + b"9" * 5000 + b"}\n", "not valid JSON"),
    "integer of 500 digits": (b'{"text": ' + b"9" * 500 + b"}\n", "'text' is int"),
    "nested 100000 deep": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "nested too deep"),
    "unknown fields": (b'{"foo": 1, "bar": 2}\n', "'bar', 'foo'"),
    "a preference row": (b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n', "fit none of"),
    "Latin-1": (b'{"text": "caf\xe9"}\n', "UTF-8"),
    "byte-order mark inside": (b'\xef\xbb\xbf{"text": "a"}\n', "not valid JSON"),
}


def refused(tmp_path, data, *flags) -> str:
    """lora.py's complaint about its data; nothing may have been written."""
    output = tmp_path / "output"
    with pytest.raises(common.UserError) as error:
        lora.main(["--data", str(data), "--output", str(output), *flags])
    assert not output.exists()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("line, words", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_of_a_jsonl_file_is_refused_with_file_line_and_reason(line, words, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + line)
    message = refused(tmp_path, path)
    assert message.startswith(f"{path}:2: ")
    assert words in message


BAD_FILES = {  # name, content -> line of the error (None: the file alone), words
    "empty jsonl": ("rows.jsonl", b"", None, "no rows"),
    "blank jsonl": ("rows.jsonl", b"\n\n", None, "no rows"),
    "empty json": ("rows.json", b"", None, "no rows"),
    "empty list": ("rows.json", b"[]", None, "no rows"),
    "empty csv": ("rows.csv", b"", None, "no rows"),
    "csv of a header": ("rows.csv", b"text\n", None, "no rows"),
    "empty parquet": ("rows.parquet", b"", None, "parquet"),
    "broken parquet": ("rows.parquet", b"PAR1 nothing PAR1", None, "parquet"),
    "UTF-16 jsonl": ("rows.jsonl", '{"text": "a"}\n'.encode("utf-16"), 1, "UTF-8"),
    "UTF-16 json": ("rows.json", '[{"text": "a"}]'.encode("utf-16"), 1, "UTF-8"),
    "UTF-16 csv": ("rows.csv", "text\na\n".encode("utf-16"), 1, "UTF-8"),
    "Latin-1 json": ("rows.json", b'[{"text": "a"},\n {"text": "caf\xe9"}]', 2, "UTF-8"),
    "Latin-1 csv": ("rows.csv", b"text\ngood\ngood\ncaf\xe9\ngood\n", 4, "UTF-8"),
    "torn json list": ("rows.json", b'[{"text": "a"},\n {"text": "b"},\n {"text', 3, "not valid JSON"),
    "bad row in a json list": ("rows.json", b'[\n{"text": "a"},\n\n{"text": null}]', 4, "'text' is null"),
    "list in a json list": ("rows.json", b'[{"text": "a"},\n[]]', 2, "not list"),
    "pretty-printed object": ("rows.json", b'{\n "text": "a"\n}', 1, "not valid JSON"),
    "csv with too few fields": ("rows.csv", b"prompt,completion\nq,a\nq\n", 3, "fewer fields"),
    "csv with too many fields": ("rows.csv", b"prompt,completion\nq,a,b\n", 2, "more fields"),
    "csv with an open quote": ("rows.csv", b'text\n"good"\n"open\n', 3, ""),
    "csv with unknown columns": ("rows.csv", b"foo\na\n", 2, "fit none of"),
}


@pytest.mark.parametrize("name, content, line, words", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_refused_with_its_name_and_line(name, content, line, words, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    message = refused(tmp_path, path)
    assert message.startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert words in message


def test_a_bad_row_of_a_parquet_file_is_refused_with_its_number(tmp_path):
    path = write_as(tmp_path / "rows.parquet", [{"text": "a"}, {"text": None}])
    assert refused(tmp_path, path).startswith(f"{path}: row 2: ")


def test_a_bad_file_of_a_folder_is_the_one_that_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "folder" / "a.jsonl", [{"text": "a"}])
    bad = write_rows(tmp_path / "folder" / "b.jsonl", [{"text": "b"}, {"text": 5}])
    assert refused(tmp_path, tmp_path / "folder").startswith(f"{bad}:2: ")


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "1e999", "1e-999", "--2", "two", "-inf", ""])
def test_a_bad_weight_or_a_missing_path_names_the_argument(weight, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}]) + ":" + weight
    assert data in refused(tmp_path, data)


@pytest.mark.parametrize("data", ["/nowhere/a.jsonl", "./nowhere", "nowhere.parquet", "no-such/name", "~/a.csv"])
def test_a_missing_file_is_refused(data, tmp_path):
    assert f"{data}: no such file" in refused(tmp_path, data)


def test_a_file_of_another_kind_and_a_folder_without_data_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.txt").write_text("text")
    for name in ("empty", "rows.txt"):
        assert f"{tmp_path / name}: not a .jsonl" in refused(tmp_path, tmp_path / name)


@pytest.mark.parametrize(
    "flags",
    [("--batch-size", "0"), ("--batch-size", "1.5"), ("--lr", "x"), ("--lr", "nan"), ("--lr", "-1"), ("--epochs", "0"),
     ("--max-length", "1"), ("--eval-fraction", "1"), ("--eval-fraction", "-0.1"), ("--schedule", "steps"),
     ("--rank", "0"), ("--max-steps", "-1"), ("--unknown", "1"), ("--dtype", "float16"), ("--seed", "-1"),
     ("--seed", str(2**32))],
)  # fmt: skip
def test_a_bad_flag_is_a_user_error_that_names_it(flags, tmp_path):
    assert flags[0] in refused(tmp_path, write_rows(tmp_path / "rows.jsonl", [{"text": "a"}]), *flags)


@pytest.mark.parametrize(
    "content, flags, words",
    [
        (GOOD + b'{"text": "to', (), ["rows.jsonl:2"]),
        (GOOD, ("--lr", "x"), ["--lr"]),
    ],
    ids=["torn line", "bad flag"],
)
def test_the_user_sees_one_error_line_and_exit_code_2_and_no_output_folder(content, flags, words, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(content)
    out = run_script("lora.py", "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "output", *flags)
    assert out.returncode == 2
    assert "Traceback" not in out.stderr
    (line,) = [line for line in out.stderr.splitlines() if line.startswith("error:")]
    assert all(word in line for word in words)
    assert not (tmp_path / "output").exists()


# ------------------------------------------------------------------------------------------------- dropped and split


@pytest.mark.parametrize(
    "row, status",
    [
        ({"prompt": "q", "completion": ""}, common.EMPTY),
        ({"prompt": "q", "completion": " \n "}, common.EMPTY),
        ({"text": ""}, common.EMPTY),
        ({"text": " \n\t"}, common.EMPTY),
        ({"messages": [*PAIR, U | {"content": "q"}, A | {"content": ""}]}, common.EMPTY),
        ({"messages": PAIR[:1]}, common.NO_TARGET),
        ({"messages": [S | {"content": "s"}]}, common.NO_TARGET),
        ({"messages": [A | {"content": "an answer to nothing"}]}, common.NO_TARGET),
        ({"prompt": "q" * 500, "completion": "a"}, common.NO_TARGET),
    ],
)
def test_a_row_without_a_target_leaves_a_record_that_says_why_and_no_tokens(row, status):
    (record,) = encode(row, "--max-length", 100)
    assert record["status"] == status
    assert record["input_ids"] == record["is_target"] == []
    assert record["length"] == record["targets"] == 0


@pytest.mark.parametrize("extra", [0, 1, 2])
def test_a_prompt_as_long_as_max_length_is_dropped_and_one_token_shorter_keeps_one_target(extra, tokenizer):
    prompt = len(common.render(tokenizer, PAIR[:1], prompt=True))
    (record,) = encode({"messages": PAIR}, "--max-length", prompt + extra)
    assert (record["status"], record["targets"]) == ((common.CUT if extra else common.NO_TARGET), extra)


def test_what_was_kept_cut_and_dropped_is_counted_and_said(tmp_path, capsys):
    rows = [{"prompt": "q", "completion": answer} for answer in ("a", "long" * 50, "", " ")]
    rows += [{"messages": PAIR[:1]}, {"prompt": "q" * 200, "completion": "a"}, {"text": ""}]
    corpus, evaluation = load([write_rows(tmp_path / "rows.jsonl", rows)], "--max-length", 64)
    assert len(corpus.order(0)) == 2 and evaluation is None  # one prompt: nothing can be held out
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(str(tmp_path))]
    numbers = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", line.removeprefix(str(tmp_path)))]
    short, long = encode(rows[0]), encode(rows[1], "--max-length", 64)
    tokens, targets = (short[0][key] + long[0][key] for key in ("length", "targets"))
    assert numbers == [2, tokens, targets, 1, 64, 2, 3]  # kept, tokens, targets; cut; --max-length; no target, empty


def test_no_row_left_is_an_error(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": ""}, {"messages": PAIR[:1]}])
    assert "no row with a target is left" in refused(tmp_path, path)


def test_a_weight_so_small_that_no_epoch_has_a_row_is_an_error(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"q{i}", "completion": "a"} for i in range(3)])
    refused(tmp_path, path + ":0.01", "--epochs", "3", "--samples", "0")


def test_a_long_text_becomes_consecutive_documents_that_join_to_all_its_tokens_and_eos(tokenizer):
    text = "".join(chr(0x4E00 + i) for i in range(100))  # 300 tokens
    records = encode({"text": text}, "--max-length", 64)
    assert [record["length"] for record in records] == [64, 64, 64, 64, 45]
    assert sum((record["input_ids"] for record in records), []) == tokenizer(text).input_ids + [tokenizer.eos_token_id]
    assert all(record["is_target"] == [False] + [True] * (record["length"] - 1) for record in records)
    assert len({record["prompt"] for record in records}) == 1  # the held-out split keeps a text together
    assert {record["status"] for record in records} == {common.KEPT}
    (whole,) = encode({"text": text}, "--max-length", 301)
    assert whole["length"] == 301


def test_an_eos_that_would_stand_alone_in_the_last_piece_is_a_document_without_target():
    *kept, last = encode({"text": "x" * 128}, "--max-length", 64)
    assert [record["length"] for record in kept] == [64, 64]
    assert (last["status"], last["length"]) == (common.NO_TARGET, 0)


def test_a_long_conversation_is_cut_at_its_end():
    (whole,), (cut,) = encode({"messages": TALK}), encode({"messages": TALK}, "--max-length", 40)
    assert (whole["status"], cut["status"]) == (common.KEPT, common.CUT)
    assert cut["input_ids"] == whole["input_ids"][:40] and cut["is_target"] == whole["is_target"][:40]
    assert cut["length"] == 40 and cut["targets"] == sum(cut["is_target"]) > 0


def test_what_follows_the_last_answer_is_left_out():
    assert encode({"messages": [*PAIR, U | {"content": "and?"}]}) == encode({"messages": PAIR})


def test_a_token_beyond_the_embedding_is_refused_before_training(tokenizer):
    with pytest.raises(common.UserError, match="^rows.jsonl:7: token 257 is beyond the model's 257 embeddings"):
        list(common.encode_row({"text": "a"}, "rows.jsonl:7", tokenizer, arguments(), 257))


# ---------------------------------------------------------------------------------------------------------- targets


def test_chatml_targets_are_each_answer_and_its_end_of_turn_token_but_not_the_line_break(tokenizer):
    ((ids, marks),) = common.encode_conversation(tokenizer, [S | {"content": "s"}, *TALK])
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n"
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\nsecond<|im_end|>\n"
    )
    assert target_texts(tokenizer, ids, marks) == ["first<|im_end|>", "second<|im_end|>"]


def test_targets_are_found_by_position_when_content_spells_special_tokens(tokenizer):
    fake = "<|im_end|>\n<|im_start|>assistant\nfake<|im_end|>\n"
    answer = "real<|im_end|>\n<|im_start|>user\nstill the answer"
    talk = [U | {"content": fake}, A | {"content": answer}, U | {"content": fake}, A | {"content": "end<|im_end|>"}]
    for template in (common.CHATML, GENERATION):
        tokenizer.chat_template = template
        ((ids, marks),) = common.encode_conversation(tokenizer, talk)
        assert target_texts(tokenizer, ids, marks) == [answer + "<|im_end|>", "end<|im_end|><|im_end|>"]
        assert marks.index(True) == len(common.render(tokenizer, talk[:1], prompt=True))


def test_pad_equal_to_eos_keeps_eos_a_target_and_padding_none(tmp_path, tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    rows = [{"prompt": "q", "completion": "a"}, {"prompt": "a longer question", "completion": "a longer answer"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    corpus, _ = load([path], "--no-packing", "--eval-fraction", 0, tokenizer=tokenizer)
    batch = corpus.collate(corpus.rows())
    ids, mask, eos = batch["input_ids"], batch["attention_mask"], tokenizer.eos_token_id
    assert (batch["targets"] == eos).sum() == 2  # one end of turn an answer, though the padding is eos, too
    assert len(batch["targets"]) == len("a") + len("a longer answer") + 2
    assert (ids[mask == 0] == eos).all() and mask.sum() == sum(corpus.lengths)
    assert mask.flatten()[batch["target_index"] + 1].all()


@pytest.mark.parametrize("talk", [PAIR, TALK, [S | {"content": "s"}, *TALK, PAIR[0], A | {"content": "中 👍"}]])
def test_generation_templates_give_the_targets_that_transformers_gives(talk, tokenizer):
    ((ids, marks),) = common.encode_conversation(tokenizer, talk)  # by growing prefixes
    tokenizer.chat_template = GENERATION
    out = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    (document,) = common.encode_conversation(tokenizer, talk)
    assert document == (out["input_ids"], [bool(mark) for mark in out["assistant_masks"]]) == (ids, marks)


@pytest.mark.parametrize("answer", ["a", "a 👍"], ids=["one token", "several tokens"])
def test_a_generation_block_that_closes_before_eos_still_teaches_to_stop(answer, tokenizer):
    """transformers marks only the first token of a last character that is several, and no eos."""
    talk = [PAIR[0], A | {"content": answer}, *TALK]
    tokenizer.chat_template = CLOSES_EARLY
    ((ids, marks),) = common.encode_conversation(tokenizer, talk)
    assert target_texts(tokenizer, ids, marks) == [answer + "<|im_end|>", "first<|im_end|>", "second<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_gives_one_document_an_answer(tokenizer):
    tokenizer.chat_template = THINKING
    thought = A | {"content": "<think>\nhm\n</think>\n\nfirst"}
    talk = [TALK[0], thought, *TALK[2:], U | {"content": "three"}, A | {"content": "third"}]
    documents = common.encode_conversation(tokenizer, talk)
    rendered = [common.render(tokenizer, talk[:2]), common.render(tokenizer, talk[:4]), common.render(tokenizer, talk)]
    assert [ids for ids, _ in documents] == rendered
    assert "hm" in tokenizer.decode(rendered[0]) and "hm" not in tokenizer.decode(rendered[1])
    assert [target_texts(tokenizer, *document) for document in documents] == [
        ["<think>\nhm\n</think>\n\nfirst<|im_end|>"],
        ["<think>\n\n</think>\n\nsecond<|im_end|>"],
        ["<think>\n\n</think>\n\nthird<|im_end|>"],
    ]
    records = encode({"messages": talk}, tokenizer=tokenizer)
    assert [record["input_ids"] for record in records] == rendered
    assert len({record["prompt"] for record in records}) == 1


def test_a_template_that_rewrites_nothing_in_this_row_gives_one_document(tokenizer):
    tokenizer.chat_template = THINKING
    assert len(common.encode_conversation(tokenizer, PAIR)) == 1


def test_a_generation_prompt_that_opens_a_think_block_is_context_as_far_as_the_answer_has_it(tokenizer):
    opens = "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    tokenizer.chat_template = THINKING.replace("{{ '<|im_start|>assistant\n' }}{% endif %}", opens)
    ((ids, marks),) = common.encode_conversation(tokenizer, PAIR)
    assert target_texts(tokenizer, ids, marks) == ["\n</think>\n\na<|im_end|>"]
    tokenizer.chat_template = common.CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    ((ids, marks),) = common.encode_conversation(tokenizer, TALK)  # its answers have no such block
    assert target_texts(tokenizer, ids, marks) == ["first<|im_end|>", "second<|im_end|>"]


def test_a_template_that_changes_the_prompt_once_it_is_answered_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}" + common.CHATML
    with pytest.raises(common.UserError, match="^rows.jsonl:7: .*--template"):
        encode({"messages": PAIR}, tokenizer=tokenizer)


def test_a_template_that_raises_is_a_user_error_with_file_and_line(tmp_path):
    template = tmp_path / "strict.jinja"
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system turn!') }}{% endif %}"
    template.write_text(strict + common.CHATML, encoding="utf-8")
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": PAIR}, {"messages": [S | {"content": "s"}, *PAIR]}])
    message = refused(tmp_path, path, "--template", str(template))
    assert message.startswith(f"{path}:2: ") and "No system turn!" in message
    template.write_text("{% for m in messages %}", encoding="utf-8")
    assert refused(tmp_path, path, "--template", str(template)).startswith(f"{path}:1: ")


@pytest.mark.parametrize("content", [b"{{ messages[0]['content'] + 1 }}", b"caf\xe9"], ids=["type error", "Latin-1"])
def test_a_broken_template_file_is_a_user_error(content, tmp_path):
    template = tmp_path / "broken.jinja"
    template.write_bytes(content)
    refused(tmp_path, write_rows(tmp_path / "rows.jsonl", [{"messages": PAIR}]), "--template", str(template))


def test_named_templates_render_with_their_default(tokenizer):
    """Some models come with several templates by name; transformers takes the one named default."""
    plain_document = common.encode_conversation(tokenizer, TALK)
    tokenizer.chat_template = {"default": common.CHATML, "tool_use": "{{ 'another' }}"}
    assert common.encode_conversation(tokenizer, TALK) == plain_document


def alpaca(*flags):
    return common.load_tokenizer(arguments("--template", "alpaca", *flags))[0]


def test_the_alpaca_layout_is_alpacas_with_eos():
    tokenizer = alpaca()
    (record,) = encode({"instruction": "Add.", "input": "1 2", "output": "3"}, tokenizer=tokenizer)
    assert tokenizer.decode(record["input_ids"]).rstrip("\n") == (
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3<|im_end|>"
    )
    assert target_texts(tokenizer, record["input_ids"], record["is_target"]) == ["3<|im_end|>"]
    (record,) = encode({"instruction": "Add.", "input": "", "output": "3"}, "--system", "Do.", tokenizer=tokenizer)
    expected = "Do.\n\n### Instruction:\nAdd.\n\n### Response:\n3<|im_end|>"
    assert tokenizer.decode(record["input_ids"]).rstrip("\n") == expected
    (record,) = encode({"messages": TALK}, tokenizer=tokenizer)
    assert target_texts(tokenizer, record["input_ids"], record["is_target"]) == ["first<|im_end|>", "second<|im_end|>"]


def test_a_tokenizer_without_template_or_pad_token_gets_alpaca_and_eos_and_is_told(tmp_path, capsys, tokenizer):
    tokenizer.chat_template = tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    common.tiny_model().config.save_pretrained(tmp_path)
    loaded, vocab_size = common.load_tokenizer(arguments("--model", tmp_path))
    assert (loaded.chat_template, loaded.pad_token, vocab_size) == (common.ALPACA, "<|im_end|>", 320)
    said = capsys.readouterr().out
    assert "Alpaca" in said and "pad token" in said


def test_template_none_joins_the_strings_as_they_are_and_adds_eos(tokenizer):
    (record,) = encode({"prompt": "2+2=", "completion": "4"}, "--template", "none")
    assert tokenizer.decode(record["input_ids"]) == "2+2=4<|im_end|>"
    assert target_texts(tokenizer, record["input_ids"], record["is_target"]) == ["4<|im_end|>"]
    (record,) = encode({"messages": TALK}, "--template", "none")
    assert tokenizer.decode(record["input_ids"]) == "onefirst<|im_end|>twosecond<|im_end|>"
    assert target_texts(tokenizer, record["input_ids"], record["is_target"]) == ["first<|im_end|>", "second<|im_end|>"]


def test_system_is_added_only_where_there_is_none(tokenizer):
    (plain_row,), (record,) = encode({"messages": PAIR}), encode({"messages": PAIR}, "--system", "Be brief.")
    added = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert tokenizer.decode(record["input_ids"]) == added + tokenizer.decode(plain_row["input_ids"])
    assert record["targets"] == plain_row["targets"]
    own = {"messages": [S | {"content": "Own."}, *PAIR]}
    assert encode(own, "--system", "Be brief.") == encode(own)
    assert encode({"text": "raw"}, "--system", "Be brief.") == encode({"text": "raw"})


def test_no_second_bos_from_a_tokenizer_that_adds_its_own(tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    single = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.backend_tokenizer.post_processor = single
    assert tokenizer("a").input_ids[0] == bos
    for template in (common.CHATML, GENERATION):
        tokenizer.chat_template = "{{ bos_token }}" + template
        (record,) = encode({"messages": TALK}, tokenizer=tokenizer)
        assert record["input_ids"][0] == bos and record["input_ids"].count(bos) == 1
        answers = target_texts(tokenizer, record["input_ids"], record["is_target"])
        assert answers == ["first<|im_end|>", "second<|im_end|>"]
    for row, flags in (({"text": "raw"}, ()), ({"messages": TALK}, ("--template", "none"))):  # no template to add it
        (record,) = encode(row, *flags, tokenizer=tokenizer)
        assert record["input_ids"][0] == bos and record["input_ids"].count(bos) == 1


# --------------------------------------------------------------------------------------------------------- like TRL

TRL_ROWS = [
    [S | {"content": "Be brief."}, *PAIR],
    TALK,
    [U | {"content": "What is 中?"}, A | {"content": "Middle. 👍"}],
    [U | {"content": "spell <|im_end|>"}, A | {"content": "<|im_end|>, and go on"}],
]


def trl_trainer(tmp_path, tokenizer, **options):
    options |= {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    config = trl.SFTConfig(output_dir=str(tmp_path), assistant_only_loss=True, **options)
    rows = datasets.Dataset.from_list([{"messages": row} for row in TRL_ROWS])
    return trl.SFTTrainer(common.tiny_model(), config, train_dataset=rows, processing_class=tokenizer)


def trl_loss(trainer) -> float:
    inputs = trainer.data_collator(list(trainer.train_dataset))
    return trainer.compute_loss(trainer.model, inputs).item()


def our_loss(tmp_path, tokenizer, *flags) -> float:
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": row} for row in TRL_ROWS])
    args = arguments("--data", data, "--eval-fraction", 0, *flags)
    corpus, _ = common.load_data(args, tokenizer, 320)
    model = common.load_model(args, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        return -model.target_logps(**corpus.collate(corpus.rows())).mean().item()


@pytest.mark.parametrize("max_length", [1024, 48])
def test_tokens_and_targets_are_those_of_trl(max_length, tmp_path, tokenizer):
    tokenizer.chat_template = GENERATION
    rows = trl_trainer(tmp_path, tokenizer, max_length=max_length).train_dataset
    for talk, theirs in zip(TRL_ROWS, rows, strict=True):
        (record,) = encode({"messages": talk}, "--max-length", max_length, tokenizer=tokenizer)
        targets = [label != -100 for label in theirs["labels"]] if "labels" in theirs else theirs["assistant_masks"]
        assert record["input_ids"] == theirs["input_ids"]
        assert record["is_target"] == [bool(mark) for mark in targets]
        if max_length == 1024:
            assert [(record["input_ids"], record["is_target"])] == common.encode_conversation(tokenizer, talk)


def test_the_loss_of_a_padded_batch_is_trls(tmp_path, tokenizer):
    tokenizer.chat_template = GENERATION
    theirs = trl_loss(trl_trainer(tmp_path, tokenizer, max_length=256))
    assert our_loss(tmp_path, tokenizer, "--no-packing", "--max-length", 256) == pytest.approx(theirs, abs=2e-5)


def test_the_loss_of_a_packed_batch_is_trls(tmp_path, tokenizer):
    """TRL's own packing runs on a CPU, too: transformers derives one mask a document from position_ids."""
    tokenizer.chat_template = GENERATION
    trainer = trl_trainer(tmp_path, tokenizer, max_length=256, packing=True)
    assert len(trainer.train_dataset) < len(TRL_ROWS)
    theirs = trl_loss(trainer)
    assert our_loss(tmp_path, tokenizer, "--packing", "--max-length", 256) == pytest.approx(theirs, abs=2e-5)


# --------------------------------------------------------------------------------------------------- held-out split


def prompts_of(corpus, tokenizer) -> list[str]:
    return [re.search(r"user\n(.*?)<\|im_end\|>", text, re.S)[1] for text in texts(corpus, tokenizer)]


def test_the_held_out_split_never_separates_equal_prompts_also_across_files(tmp_path, tokenizer):
    draw = random.Random(0)
    rows = [{"prompt": f"question {draw.randrange(60)}", "completion": f"answer {i}"} for i in range(300)]
    other = [{"messages": [U | {"content": row["prompt"]}, A | {"content": "another"}]} for row in rows[:100]]
    files = [write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", other)]
    flags = ("--eval-fraction", 0.2, "--max-length", 256)
    train, held_out = load(files, *flags, tokenizer=tokenizer)
    ours, theirs = prompts_of(train, tokenizer), prompts_of(held_out, tokenizer)
    assert not set(ours) & set(theirs)
    assert len(ours) + len(theirs) == 400
    assert 80 <= len(theirs) < 80 + 20  # the fraction, and at most one more prompt's rows
    again = load(files, *flags, tokenizer=tokenizer)
    assert [texts(corpus, tokenizer) for corpus in again] == [texts(corpus, tokenizer) for corpus in (train, held_out)]
    _, another = load(files, *flags, "--seed", 1, tokenizer=tokenizer)
    assert set(prompts_of(another, tokenizer)) != set(theirs)


def test_one_prompt_in_two_formats_is_one_prompt():
    alpaca_row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    rows = [alpaca_row, {"prompt": "Add.\n\n1 2", "completion": "three"}, {"question": "Add.\n\n1 2", "answer": "4"}]
    assert len({encode(row)[0]["prompt"] for row in rows}) == 1
    assert encode({"prompt": "Add.", "completion": "3"})[0]["prompt"] != encode(alpaca_row)[0]["prompt"]


def test_eval_fraction_0_trains_on_all_rows_and_a_small_one_holds_out_at_least_one(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"q{i}", "completion": "a"} for i in range(10)])
    train, held_out = load([path], "--eval-fraction", 0)
    assert len(train.order(0)) == 10 and held_out is None
    train, held_out = load([path], "--eval-fraction", 0.01)
    assert len(train.order(0)) == 9 and len(held_out.order(0)) == 1


def test_eval_data_is_held_out_whole_and_training_keeps_all_its_rows(tmp_path, tokenizer):
    train_file = write_rows(tmp_path / "train.jsonl", [{"text": f"train {i}"} for i in range(10)])
    eval_file = write_rows(tmp_path / "eval.jsonl", [{"text": f"eval {i}"} for i in range(4)])
    train, held_out = load([f"{train_file}:2"], "--eval-data", eval_file, tokenizer=tokenizer)
    assert sorted(set(texts(train, tokenizer))) == [f"train {i}<|im_end|>" for i in range(10)]
    assert sorted(texts(held_out, tokenizer)) == [f"eval {i}<|im_end|>" for i in range(4)]
    assert len(train.order(0)) == 20


# ----------------------------------------------------------------------------------------------------------- mixing


def test_weights_are_expected_repeats_an_epoch():
    corpus = make_corpus([5] * 30, weights=[(6, 2.0), (10, 0.5), (4, 2.5), (10, 1.0)])
    first, second = (np.bincount(corpus.order(epoch), minlength=30) for epoch in (0, 1))
    assert (first[:6] == 2).all() and (second[:6] == 2).all()
    assert first[6:16].sum() == second[6:16].sum() == 5
    assert (first[6:16] + second[6:16] == 1).all()  # another half
    assert sorted(first[16:20]) == sorted(second[16:20]) == [2, 2, 3, 3]
    assert (first[16:20] + second[16:20] == 5).all()
    assert (first[20:] == 1).all()
    assert len(corpus.order(0)) == 12 + 5 + 10 + 10  # the weighted number of rows


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 12), weight=st.floats(0.01, 5))
def test_any_weight_gives_every_row_its_share_over_the_epochs(size, weight):
    corpus = make_corpus([3] * size, weights=[(size, weight)])
    counts = np.bincount(np.concatenate([corpus.order(epoch) for epoch in range(20)]).astype(int), minlength=size)
    assert abs(counts.sum() - 20 * weight * size) <= 0.5 + 1e-6
    assert counts.max() - counts.min() <= 1


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    lengths, weights = [5] * 40, [(30, 1.0), (10, 0.5)]
    corpus, fresh = (make_corpus(lengths, weights=weights) for _ in range(2))
    orders = [corpus.order(epoch).tolist() for epoch in range(3)]
    assert [fresh.order(epoch).tolist() for epoch in (2, 1, 0)] == orders[::-1]
    assert orders[0] != orders[1] and sorted(orders[0]) != orders[0]
    assert make_corpus(lengths, "--seed", 1, weights=weights).order(0).tolist() != orders[0]


def test_mixing_weights_of_files_reach_the_order(tmp_path, tokenizer):
    a = write_rows(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(4)])
    b = write_rows(tmp_path / "b.jsonl", [{"text": f"b{i}"} for i in range(6)])
    corpus, _ = load([f"{a}:2", f"{b}:0.5"], "--eval-fraction", 0, tokenizer=tokenizer)
    counts = [Counter(texts(corpus, tokenizer, epoch)) for epoch in (0, 1)]
    for count in counts:
        assert {text: n for text, n in count.items() if text[0] == "a"} == {f"a{i}<|im_end|>": 2 for i in range(4)}
    halves = [{text for text in count if text[0] == "b"} for count in counts]
    assert [len(half) for half in halves] == [3, 3] and not halves[0] & halves[1]


# ---------------------------------------------------------------------------------------------- packing and batches


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(2, 32), min_size=1, max_size=60), seed=st.integers(0, 3))
def test_packed_rows_hold_whole_documents_each_once_and_never_more_than_max_length(lengths, seed):
    corpus = make_corpus(lengths, "--max-length", 32, "--seed", seed)
    for epoch in (0, 1):
        rows = corpus.rows(epoch)
        assert all(row and sum(lengths[document] for document in row) <= 32 for row in rows)
        assert [document for row in rows for document in row] == corpus.order(epoch).tolist()  # none moved
        assert sorted(document for row in rows for document in row) == list(range(len(lengths)))


def test_packing_fills_rows_and_no_packing_gives_each_document_its_own():
    lengths = [10] * 30
    assert len(make_corpus(lengths, "--max-length", 32).rows()) == 10
    assert all(len(row) == 1 for row in make_corpus(lengths, "--no-packing").rows())


def naive_batch(corpus, rows, width=None):
    """(tokens to predict, where each is predicted) by a plain loop. width: of a padded row; None if packed."""
    documents, targets, index = [document for row in rows for document in row], [], []
    first = 0
    for document in documents:
        row = corpus.table[document]
        for position in range(1, len(row["input_ids"])):
            if row["is_target"][position]:
                targets.append(int(row["input_ids"][position]))
                index.append(first + position - 1)
        first += width or len(row["input_ids"])
    return targets, index


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(2, 20), min_size=1, max_size=12), seed=st.integers(0, 100))
def test_collate_packs_as_a_plain_loop_would(lengths, seed):
    corpus = make_corpus(lengths, "--max-length", 20, seed=seed)
    rows = corpus.rows()
    batch = corpus.collate(rows)
    ids = [corpus.table[document]["input_ids"].tolist() for row in rows for document in row]
    assert batch["input_ids"].tolist() == [sum(ids, [])]
    assert batch["position_ids"].tolist() == [sum((list(range(len(part))) for part in ids), [])]
    sizes, cumulative, longest = batch["documents"]
    assert sizes == [len(part) for part in ids] and longest == max(sizes)
    assert cumulative.dtype == torch.int32 and cumulative.tolist() == np.cumsum([0, *sizes]).tolist()
    assert "attention_mask" not in batch  # an all-ones mask would let documents see each other
    assert (batch["targets"].tolist(), batch["target_index"].tolist()) == naive_batch(corpus, rows)
    assert (batch["input_ids"][0][batch["target_index"] + 1] == batch["targets"]).all()
    assert (batch["position_ids"][0][batch["target_index"] + 1] > 0).all()  # no document's first token is a target


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(2, 20), min_size=1, max_size=12), seed=st.integers(0, 100))
def test_collate_pads_as_a_plain_loop_would(lengths, seed):
    corpus = make_corpus(lengths, "--no-packing", seed=seed)
    rows, width = corpus.rows(), max(lengths)
    batch = corpus.collate(rows)
    for (document,), ids, mask in zip(rows, batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
        own = corpus.table[document]["input_ids"].tolist()
        assert ids == own + [258] * (width - len(own))
        assert mask == [1] * len(own) + [0] * (width - len(own))
    assert (batch["targets"].tolist(), batch["target_index"].tolist()) == naive_batch(corpus, rows, width)
    assert (batch["target_index"] % width < width - 1).all()


def test_no_first_token_is_a_target_whatever_the_row(tokenizer):
    rows = [{"text": "raw"}, {"text": "x" * 200}, {"messages": TALK}, {"messages": [A | {"content": "a"}, *TALK]}]
    tokenizer.chat_template = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    for flags in ((), ("--template", "none")):
        for record in sum((encode(row, "--max-length", 64, *flags, tokenizer=tokenizer) for row in rows), []):
            assert not any(record["is_target"][:1])


# ------------------------------------------------------------------------------------------------------------ steps

LENGTHS = [random.Random(5).randrange(2, 20) for _ in range(53)]


def documents_of(batch) -> list[list[int]]:
    """The documents of a micro-batch, whether packed or padded."""
    if "documents" in batch:
        return plain(batch["input_ids"][0].split(batch["documents"][0]))
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]


@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
@pytest.mark.parametrize("limit", [("--epochs", 3), ("--max-steps", 20)])
def test_resuming_at_any_step_gives_the_tail_of_the_whole_run_also_across_epochs(packing, limit):
    flags = (packing, "--max-length", 32, "--batch-size", 2, "--grad-accum", 2, *limit)
    corpus = make_corpus(LENGTHS, *flags, weights=[(33, 1.0), (20, 0.5)])
    whole = plain(list(corpus.steps()))
    assert len(whole) == len(corpus.plan()) and len({int(math.ceil(done)) for done, *_ in whole}) > 1  # crosses epochs
    for start in range(len(whole) + 1):
        fresh = make_corpus(LENGTHS, *flags, weights=[(33, 1.0), (20, 0.5)])
        assert plain(list(fresh.steps(start))) == whole[start:]


@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
def test_8x1_4x2_and_1x8_see_the_same_rows_and_count_the_same(packing):
    seen = []
    for size, accumulate in ((8, 1), (4, 2), (1, 8)):
        flags = (packing, "--max-length", 32, "--epochs", 2, "--batch-size", size, "--grad-accum", accumulate)
        corpus = make_corpus(LENGTHS, *flags)
        steps = list(corpus.steps())
        seen.append([(done, sum(map(documents_of, batches), []), *counts) for done, batches, *counts in steps])
        assert all(len(batches) <= accumulate for _, batches, _, _ in steps)
        for _, batches, tokens, targets in steps:
            assert tokens == sum(len(ids) for batch in batches for ids in documents_of(batch))
            assert targets == sum(len(batch["targets"]) for batch in batches)
            assert all(len(batch["targets"]) == len(batch["target_index"]) for batch in batches)
        assert sum(tokens for _, _, tokens, _ in steps) == 2 * sum(LENGTHS)
        assert steps[-1][0] == 2.0  # epochs done
    assert seen[0] == seen[1] == seen[2]


def test_two_ranks_share_the_rows_of_one_and_take_part_in_every_forward_pass(monkeypatch):
    flags = ("--no-packing", "--epochs", 1)
    alone = list(make_corpus(LENGTHS, *flags, "--batch-size", 4, "--grad-accum", 2).steps())
    monkeypatch.setattr(common, "world_size", lambda: 2)
    ranks = []
    for rank in (0, 1):
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        ranks.append(list(make_corpus(LENGTHS, *flags, "--batch-size", 2, "--grad-accum", 2).steps()))
    assert len(alone) == len(ranks[0]) == len(ranks[1])
    for single, *both in zip(alone, *ranks):
        assert all(step[2:] == single[2:] for step in both)  # tokens and targets of all ranks together
        assert len({len(batches) for _, batches, *_ in both}) == 1
        parts = [batch for _, batches, *_ in both for batch in batches if len(batch["targets"])]
        assert sorted(sum(map(documents_of, parts), [])) == sorted(sum(map(documents_of, single[1]), []))
        assert sum(len(batch["targets"]) for batch in parts) == single[3]


def test_max_steps_overrides_epochs_in_both_directions():
    flags = ("--no-packing", "--batch-size", 53)  # one step an epoch
    assert len(make_corpus(LENGTHS, *flags, "--epochs", 3).plan()) == 3
    assert len(make_corpus(LENGTHS, *flags, "--epochs", 3, "--max-steps", 2).plan()) == 2
    assert len(make_corpus(LENGTHS, *flags, "--epochs", 3, "--max-steps", 7).plan()) == 7
    assert make_corpus(LENGTHS, *flags, "--max-steps", 0).plan() == []


# ------------------------------------------------------------------------------------------------ inspect and cache


def test_inspect_shows_every_token_as_context_or_target_and_writes_nothing(tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": TALK}])
    lora.main(["--data", path, "--inspect", "--output", str(tmp_path / "output")])
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"(TARGET|context) ", line)]
    parts = [line.split(maxsplit=2) for line in lines]  # kind, tokens, their texts with | between them
    bare = [re.sub(r"\|(im_start|im_end)\|", r"\1", tokens).replace("|", "").strip("'") for _, _, tokens in parts]
    shown = [(kind, int(count), tokens) for (kind, count, _), tokens in zip(parts, bare)]
    assert shown == [
        ("context", 22, r"<im_start>user\none<im_end>\n<im_start>assistant\n"),
        ("TARGET", 6, "first<im_end>"),
        ("context", 23, r"\n<im_start>user\ntwo<im_end>\n<im_start>assistant\n"),
        ("TARGET", 7, "second<im_end>"),
        ("context", 1, r"\n"),
    ]
    assert not (tmp_path / "output").exists()


def test_inspect_spells_tokens_that_are_parts_of_a_character(tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "中"}])
    lora.main(["--data", path, "--inspect", "--output", str(tmp_path / "output")])
    assert "\ufffd" not in capsys.readouterr().out


def test_a_file_that_changed_is_never_served_from_the_cache(tmp_path, tokenizer):
    """Same path, same size, same time of change: only the content tells."""
    path = tmp_path / "rows.jsonl"
    for text in ("old", "new"):
        write_rows(path, [{"text": text}])
        os.utime(path, ns=(10**18, 10**18))
        corpus, _ = load([path], tokenizer=tokenizer)
        assert texts(corpus, tokenizer) == [f"{text}<|im_end|>"]


def test_settings_that_change_the_tokens_are_never_served_from_the_cache(tmp_path, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "a"}])
    assert len(load([path], tokenizer=tokenizer)[0].lengths) == 1
    lengths = {load([path], *flags, tokenizer=tokenizer)[0].lengths[0]
               for flags in ((), ("--max-length", 22), ("--system", "s"), ("--template", "none"))}  # fmt: skip
    tokenizer.chat_template = common.ALPACA
    lengths.add(load([path], tokenizer=tokenizer)[0].lengths[0])
    assert len(lengths) == 5


def test_tokenised_rows_come_from_the_cache_the_second_time(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "once"}])
    first, _ = load([path])
    monkeypatch.setattr(common, "encode_row", lambda *_: pytest.fail("tokenised again"))
    second, _ = load([path])
    assert sequences(first) == sequences(second)


def test_a_prompt_is_the_same_tokens_with_and_without_its_answer(tokenizer):
    """A generation prompt that opens a thinking block is no prefix of an answer without one; the model is asked with it all the same."""
    tokenizer.chat_template = common.CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    args = arguments()
    rows = [{"prompt": "q"}, {"prompt": "q", "completion": "a"}]
    (alone,), (answered,) = (common.encode_row(row, "rows.jsonl:1", tokenizer, args, 320, "prompts") for row in rows)
    assert alone["input_ids"] == answered["input_ids"] and tokenizer.decode(alone["input_ids"]).endswith("<think>\n")
    assert json.loads(answered["conversation"])[-1] == {"role": "assistant", "content": "a"} and alone["prompt"] == answered["prompt"]

"""From files to conversations: kinds of files, layouts of rows, what is refused, what is cached."""

import csv
import gzip
import json
import os
import re
from collections import Counter
from pathlib import Path

import datasets
import pytest
import transformers
from conftest import TINY, run_script, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import common
import lora

U, A, S, T = ({"role": role} for role in ("user", "assistant", "system", "tool"))
PAIR = [U | {"content": "q"}, A | {"content": "a"}]
TALK = [*PAIR, U | {"content": "r"}, A | {"content": "b"}]
TEXTS = [
    "plain",
    "中文，标点。",
    "emoji 👩‍👩‍👧 🇩🇪",
    "line\u2028and\u2029paragraph\x85",
    "two\nlines",
]
TEXTS += ["a\r\nb\rc", ' "quoted", \\ ', "x\ufeffy", "tab\tand\x0bmore"]
EOS = "<|im_end|>"  # of the bundled tokenizer

# ChatML that writes tools, tool calls and reasoning, each as JSON or between tags of its own.
TOOLS = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.name %}[{{ m.name }}]{% endif %}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}"
    "<call>{{ (call.function or call) | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def tools_template(tmp_path) -> list[str]:
    (tmp_path / "tools.jinja").write_text(TOOLS, encoding="utf-8")
    return ["--template", str(tmp_path / "tools.jinja")]


def load(data, *flags):
    """Training and held-out examples of one or more sources, with the bundled tokenizer."""
    data = [data] if isinstance(data, (str, Path)) else data
    flags = ["--data", *data, "--eval-data", "0", *flags]
    args = common.make_parser("", output="unused", lr=1e-3).parse_args([str(x) for x in flags])
    return common.load_data(args, common.load_tokenizer(args))


def load_rows(tmp_path, rows, *flags):
    return load(write_rows(tmp_path / "rows.jsonl", rows), *flags)[0]


def texts(table, tokenizer) -> list[str]:
    return [tokenizer.decode(ids) for ids in table["input_ids"]]


def target_text(row, tokenizer) -> str:
    return tokenizer.decode(row["input_ids"][row["is_target"].astype(bool)])


def chatml(tokenizer, turns) -> str:
    """What the library renders, up to the end of the last answer."""
    return tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")


def refused(tmp_path, data, *flags) -> str:
    """lora.py's complaint about its data; nothing may have been written."""
    output = tmp_path / "output"
    with pytest.raises(common.UserError) as error:
        lora.main(["--data", str(data), "--output", str(output), "--inspect", *flags])
    assert not output.exists()
    return str(error.value)


def refused_row(tmp_path, row, *flags) -> str:
    """The complaint about one row, after file and line."""
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "good"}, row])
    message = refused(tmp_path, path, *flags)
    assert message.startswith(f"{path}:2: ") and "\n" not in message
    return message.removeprefix(f"{path}:2: ")


def as_table(rows: list[dict]) -> datasets.Dataset:
    """With a column for every field: a row without it has a null."""
    names = {name: None for row in rows for name in row}
    return datasets.Dataset.from_list([names | row for row in rows])


def write_as(path: Path, rows: list[dict]) -> Path:
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind == "jsonl":
        write_rows(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif kind == "parquet":
        as_table(rows).to_parquet(path)
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if path.suffix.lower() == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


# ------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("packed", ["", ".gz", ".GZ"])
@pytest.mark.parametrize("suffix", ".jsonl .json .csv .parquet .JSONL .Json .CSV .Parquet".split())
def test_every_kind_of_file_gives_the_same_text_back(suffix, packed, tmp_path, tokenizer):
    path = write_as(tmp_path / f"rows{suffix}{packed}", [{"text": text} for text in TEXTS])
    assert texts(load(path)[0], tokenizer) == [text + EOS for text in TEXTS]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_no_text(suffix, tmp_path, tokenizer):
    path = write_as(tmp_path / f"rows{suffix}", [{"text": text} for text in TEXTS])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert texts(load(path)[0], tokenizer) == [text + EOS for text in TEXTS]


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(lines=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=20))
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet.gz"])
def test_any_unicode_comes_back_from_any_kind_of_file(suffix, lines, tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("unicode")
    path = write_as(folder / f"rows{suffix}", [{"text": "a" + line} for line in lines])
    assert texts(load(path)[0], tokenizer) == ["a" + line + EOS for line in lines]


def test_a_json_file_that_holds_an_object_a_line_is_read_as_jsonl(tmp_path, tokenizer):
    path = tmp_path / "rows.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert texts(load(path)[0], tokenizer) == ["a" + EOS, "b" + EOS]


def test_blank_lines_and_crlf_are_skipped_and_counted_as_lines(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    lines = ['{"text": "a\u2028b"}', "", "   ", '{"text": "\\ud83d\\ude00\\r\\n"}']
    path.write_bytes("\r\n".join(lines).encode())
    assert texts(load(path)[0], tokenizer) == ["a\u2028b" + EOS, "😀\r\n" + EOS]
    path.write_bytes("\r\n".join([*lines, "5"]).encode())
    assert refused(tmp_path, path).startswith(f"{path}:5: ")


def test_a_folder_is_all_its_data_files_in_order_and_nothing_else(tmp_path, tokenizer):
    (tmp_path / "deep").mkdir()
    write_as(tmp_path / "b.csv", [{"text": "b"}])
    write_as(tmp_path / "a.jsonl.gz", [{"text": "a"}])
    write_as(tmp_path / "deep" / "c.parquet", [{"text": "c"}])
    write_as(tmp_path / "deep" / "d.JSON", [{"text": "d"}])
    (tmp_path / "README.md").write_text("no data")
    assert texts(load(tmp_path)[0], tokenizer) == [x + EOS for x in "abcd"]


def test_a_null_in_a_table_counts_as_a_missing_field(tmp_path, tokenizer, tools_template):
    """A column of a table has a value in every row, and a key of an object in every object."""
    call = {"function": {"name": "rain", "arguments": {"town": "Oslo"}}}
    other = {"function": {"name": "sun", "arguments": {"hour": 3}}}
    rows = [
        {"messages": [PAIR[0], A | {"content": None, "tool_calls": [call]}], "label": None},
        {"messages": [PAIR[0], A | {"content": None, "tool_calls": [other]}], "label": None},
        {"messages": PAIR, "label": None},
        {"prompt": "p", "completion": "c"},
    ]
    path = write_as(tmp_path / "rows.parquet", rows)
    _, call, *others = texts(load(path, *tools_template)[0], tokenizer)
    assert '<call>{"name": "sun", "arguments": {"hour": 3}}</call>' in call
    turns = PAIR, [U | {"content": "p"}, A | {"content": "c"}]
    assert others == [chatml(tokenizer, pair) for pair in turns]


# ----------------------------------------------------------------------------------- layouts

SYSTEM = S | {"content": "s"}
EARLIER = [
    U | {"content": "q1"},
    A | {"content": "a1"},
    U | {"content": "q2"},
    A | {"content": "a2"},
]
HISTORY = [["q1", "a1"], ["q2", "a2"]]
WITH_INPUT = [U | {"content": "q\n\ni"}, PAIR[1]]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    "row, turns",
    [
        ({"messages": PAIR}, PAIR),
        ({"conversations": PAIR}, PAIR),
        ({"messages": [SYSTEM, *TALK]}, [SYSTEM, *TALK]),
        ({"conversations": SHAREGPT}, PAIR),
        ({"messages": SHAREGPT}, PAIR),
        ({"conversations": [{"from": "system", "value": "s"}, *SHAREGPT]}, [SYSTEM, *PAIR]),
        ({"conversations": SHAREGPT, "system": "s"}, [SYSTEM, *PAIR]),
        ({"conversations": SHAREGPT, "system": "", "tools": "[]"}, PAIR),
        ({"messages": PAIR, "system": "s"}, [SYSTEM, *PAIR]),
        ({"prompt": "q", "completion": "a"}, PAIR),
        ({"prompt": "q", "response": "a"}, PAIR),
        ({"prompt": "q", "completion": "a", "system": "s"}, [SYSTEM, *PAIR]),
        ({"prompt": [SYSTEM, PAIR[0]], "completion": [PAIR[1]]}, [SYSTEM, *PAIR]),
        ({"prompt": [PAIR[0]], "completion": "a"}, PAIR),
        ({"prompt": "q", "completion": PAIR[1]}, PAIR),
        ({"prompt": "q", "completion": SHAREGPT[1:]}, PAIR),
        ({"question": "q", "answer": "a"}, PAIR),
        ({"question": "q", "context": "i", "answer": "a"}, WITH_INPUT),
        ({"instruction": "q", "output": "a"}, PAIR),
        ({"instruction": "q", "input": "", "output": "a"}, PAIR),
        ({"instruction": "q", "input": None, "output": "a"}, PAIR),
        ({"instruction": "q", "input": "i", "output": "a"}, WITH_INPUT),
        ({"instruction": "q", "output": "a", "text": "Below is ..."}, PAIR),
        ({"instruction": "q", "input": "i", "output": "a", "system": "s", "history": HISTORY},
         [SYSTEM, *EARLIER, *WITH_INPUT]),
        ({"instruction": "q", "input": "", "output": "a", "system": "", "history": []}, PAIR),
        ({"instruction": "q", "context": "i", "response": "a", "category": "c"}, WITH_INPUT),
        ({"query": "q", "response": "a"}, PAIR),
        ({"query": "q", "response": "a", "history": HISTORY}, [*EARLIER, *PAIR]),
        ({"system": "s", "query": "q", "response": "a", "history": HISTORY},
         [SYSTEM, *EARLIER, *PAIR]),
        ({"messages": PAIR, "id": 5, "source": None, "label": None, "tools": None}, PAIR),
        ({"messages": PAIR, "prompt": "q", "prompt_id": "x"}, PAIR),
    ],
)  # fmt: skip
def test_every_layout_becomes_its_conversation(row, turns, tmp_path, tokenizer):
    (example,) = load_rows(tmp_path, [row])
    assert tokenizer.decode(example["input_ids"]) == chatml(tokenizer, turns)
    answers = [turn["content"] + EOS for turn in turns if turn["role"] == "assistant"]
    assert target_text(example, tokenizer) == "".join(answers)


@pytest.mark.parametrize(
    "name, role",
    [("User", "user"), ("HUMAN", "user"), ("Assistant", "assistant"), ("gpt", "assistant"),
     ("GPT", "assistant"), ("chatgpt", "assistant"), ("ChatGPT", "assistant"), ("bot", "assistant"),
     ("model", "assistant"), ("System", "system"), ("developer", "system"), ("Developer", "system"),
     ("tool", "tool"), ("function", "tool"), ("Observation", "tool")],
)  # fmt: skip
def test_obvious_names_of_roles_are_read_in_any_case(name, role, tmp_path, tokenizer):
    turns = {
        "user": lambda role: [{"role": role, "content": "q"}, PAIR[1]],
        "assistant": lambda role: [PAIR[0], {"role": role, "content": "a"}],
        "system": lambda role: [{"role": role, "content": "s"}, *PAIR],
        "tool": lambda role: [PAIR[0], {"role": role, "content": "t"}, PAIR[1]],
    }[role]
    (example,) = load_rows(tmp_path, [{"messages": turns(name)}])
    assert tokenizer.decode(example["input_ids"]) == chatml(tokenizer, turns(role))
    assert target_text(example, tokenizer) == "a" + EOS


@pytest.mark.parametrize("role", ["wizard", "function_call", "", None, 5])
def test_another_role_is_refused_by_name(role, tmp_path):
    row = {"messages": [*PAIR, {"role": role, "content": "x"}]}
    assert f"unknown role {role!r}" in refused_row(tmp_path, row)


def test_text_parts_are_joined_and_other_parts_refused(tmp_path, tokenizer):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    rows = [{"messages": [U | {"content": parts}, A | {"content": parts}]}]
    joined = [U | {"content": "one two"}, A | {"content": "one two"}]
    assert texts(load_rows(tmp_path, rows), tokenizer) == [chatml(tokenizer, joined)]
    image = [parts[0], {"type": "image", "url": "x.png"}]
    message = refused_row(tmp_path, {"messages": [U | {"content": image}, PAIR[1]]})
    assert "content" in message and "not text" in message


def test_a_hub_data_set_is_name_config_and_split(monkeypatch, tokenizer):
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return as_table([{"text": "t"}, {"prompt": "q", "completion": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("owner/set", "owner/set@test", "owner/set@main@test"):
        found = texts(load(name)[0], tokenizer)
        assert found == ["t" + EOS, chatml(tokenizer, PAIR)]  # columns of other rows are no fields
    assert asked == [("owner/set", None, "train"), ("owner/set", None, "test"),
                     ("owner/set", "main", "test")]  # fmt: skip


# ------------------------------------------------------------- tools, reasoning and weights

CALL = {"name": "rain", "arguments": {"town": "Orléans"}}
TOOL = {"type": "function", "function": {"name": "rain", "description": "in mm"}}
RESULT = T | {"content": "3"}


def calling(call, **fields) -> list[dict]:
    return [PAIR[0], A | fields | {"tool_calls": [call]}, RESULT, PAIR[1]]


@pytest.mark.parametrize(
    "turns, said",
    [
        (calling({"type": "function", "function": CALL}), ""),
        (calling({"type": "function", "function": CALL}, content=None), ""),
        (calling({"type": "function", "function": CALL}, content="Let me look."), "Let me look."),
        (calling({"id": "1", "function": CALL | {"arguments": json.dumps(CALL["arguments"])}}), ""),
        (calling(CALL, content=""), ""),
        ([SHAREGPT[0], {"from": "gpt", "value": None, "tool_calls": [CALL]},
          {"from": "observation", "value": "3"}, SHAREGPT[1]], ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_text", [False, True], ids=["tools", "tools as JSON text"])
def test_tools_and_calls_reach_the_template(
    turns, said, as_text, tmp_path, tokenizer, tools_template
):
    tools = [TOOL]
    row = {"conversations": turns, "tools": json.dumps(tools) if as_text else tools}
    (example,) = load_rows(tmp_path, [row], *tools_template)
    call = f"{said}<call>{json.dumps(CALL, ensure_ascii=False)}</call>{EOS}"
    assert tokenizer.decode(example["input_ids"]) == (
        f"<|im_start|>tools\n{json.dumps(TOOL)}<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
        f"<|im_start|>assistant\n{call}\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\na{EOS}"
    )
    assert target_text(example, tokenizer) == f"{call}a{EOS}"


def test_reasoning_and_names_reach_the_template(tmp_path, tokenizer, tools_template):
    turns = [U | {"content": "q", "name": "Ann"}, A | {"content": "a", "reasoning_content": "why"}]
    (example,) = load_rows(tmp_path, [{"messages": turns}], *tools_template)
    assert target_text(example, tokenizer) == f"<think>why</think>a{EOS}"
    assert "[Ann]q" in tokenizer.decode(example["input_ids"])


UNWRITTEN = {  # the bundled template writes role and content alone -> the word its error needs
    "tools": ({"messages": PAIR, "tools": [TOOL]}, "'tools'"),
    "tools as text": ({"messages": PAIR, "tools": json.dumps([TOOL])}, "'tools'"),
    "call": ({"messages": calling({"function": CALL})}, "tool_calls"),
    "call with text": ({"messages": calling({"function": CALL}, content="Wait.")}, "tool_calls"),
    "reasoning": ({"messages": [PAIR[0], PAIR[1] | {"reasoning_content": "why"}]}, "reasoning"),
    "thinking": ({"messages": [PAIR[0], PAIR[1] | {"thinking": "why"}]}, "thinking"),
    "reasoning of an earlier turn": (
        {"messages": [PAIR[0], PAIR[1] | {"reasoning_content": "why"}, *TALK]}, "reasoning",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row, word", UNWRITTEN.values(), ids=UNWRITTEN.keys())
@pytest.mark.parametrize("flags", [(), ("--template", "none")], ids=["ChatML", "none"])
def test_what_the_template_does_not_write_is_refused_by_name(row, word, flags, tmp_path):
    assert word in refused_row(tmp_path, row, *flags)


@pytest.mark.parametrize("role, content", [("system", "an order")])
def test_a_turn_that_the_template_leaves_out_is_refused(role, content, tmp_path):
    leaves_out = TOOLS.replace("messages %}", f"messages if m.role != '{role}' %}}", 1)
    assert leaves_out != TOOLS
    (tmp_path / "t.jinja").write_text(leaves_out, encoding="utf-8")
    turns = [{"role": role, "content": content}]
    row = {"messages": [*turns, *PAIR] if role == "system" else [PAIR[0], *turns, PAIR[1]]}
    assert content in refused_row(tmp_path, row, "--template", str(tmp_path / "t.jinja"))


def test_weight_0_is_context(tmp_path, tokenizer, capsys):
    bad, good = A | {"content": "bad", "weight": 0}, A | {"content": "good", "weight": 1}
    rows = [
        {"messages": [PAIR[0], bad, U | {"content": "Sure?"}, good]},
        {"messages": [PAIR[0], good, U | {"content": "Sure?"}, bad]},
        {"messages": [PAIR[0], bad]},
    ]
    first, second = load_rows(tmp_path, rows)
    assert "<|im_start|>assistant\nbad<|im_end|>" in tokenizer.decode(first["input_ids"])
    assert target_text(first, tokenizer) == target_text(second, tokenizer) == "good" + EOS
    assert dropped(capsys) == (2, 0, 1, 0)


@pytest.mark.parametrize("weight", [0.5, 2, -1, "0"])
def test_another_weight_is_refused(weight, tmp_path):
    row = {"messages": [PAIR[0], PAIR[1] | {"weight": weight}]}
    assert "weight" in refused_row(tmp_path, row)


# -------------------------------------------------------------- fields that would be ignored

IGNORED = {  # field -> a row in which nothing can use it
    "label": {"prompt": "q", "completion": "a", "label": True},
    "label of a bad answer": {"prompt": "q", "completion": "a", "label": False},
    "history": {"messages": PAIR, "history": HISTORY},
    "history of a text": {"text": "t", "history": HISTORY},
    "context": {"messages": PAIR, "context": "c"},
    "input": {"text": "t", "input": "i"},
    "context beside input": {"instruction": "q", "input": "i", "context": "c", "output": "a"},
    "documents": {"prompt": "q", "completion": "a", "documents": [{"text": "d"}]},
    "system": {"text": "t", "system": "s"},
    "system twice": {"messages": [SYSTEM, *PAIR], "system": "another"},
    "tools": {"text": "t", "tools": [TOOL]},
    "functions": {"messages": PAIR, "functions": [CALL]},
    "weight": {"messages": PAIR, "weight": 0},
    "images": {"messages": PAIR, "images": ["x.png"]},
    "image": {"prompt": "q", "completion": "a", "image": "x.png"},
    "videos": {"messages": PAIR, "videos": ["x.mp4"]},
    "audios": {"messages": PAIR, "audios": ["x.wav"]},
    "rejected_response": {"messages": PAIR, "rejected_response": "no"},
    "rejected": {"prompt": "q", "completion": "a", "rejected": "no"},
    "chosen": {"prompt": "q", "completion": "a", "chosen": "yes"},
    "answer beside response": {"question": "q", "response": "a", "answer": "b"},
    "instruction beside prompt": {"prompt": "q", "instruction": "i", "completion": "a"},
    "images of a message": {"messages": [PAIR[0] | {"images": ["x.png"]}, PAIR[1]]},
    "function_call of a message": {"messages": [PAIR[0], PAIR[1] | {"function_call": CALL}]},
}


@pytest.mark.parametrize("field", IGNORED)
def test_a_field_with_a_meaning_that_is_not_used_is_refused_by_name(field, tmp_path):
    assert repr(field.split()[0]) in refused_row(tmp_path, IGNORED[field])


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "tool_calls"])
def test_reasoning_and_calls_beside_prompt_and_completion_are_not_ignored(field, tmp_path):
    value = [{"function": CALL}] if field == "tool_calls" else "why"
    assert field in refused_row(tmp_path, {"prompt": "q", "completion": "a", field: value})


def test_reasoning_by_its_short_name_is_not_ignored(tmp_path):
    row = {"messages": [PAIR[0], PAIR[1] | {"reasoning": "why"}]}
    assert "reasoning" in refused_row(tmp_path, row)


PREFERENCES = {
    "pair": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "conversations": {"chosen": PAIR, "rejected": [PAIR[0], A | {"content": "b"}]},
    "with messages": {"messages": PAIR, "chosen": PAIR, "rejected": PAIR},
    "ShareGPT": {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": SHAREGPT[1]},
}


@pytest.mark.parametrize("row", PREFERENCES.values(), ids=PREFERENCES.keys())
def test_preferences_are_refused_and_the_scripts_for_them_named(row, tmp_path):
    message = refused_row(tmp_path, row)
    assert "chosen" in message and "rejected" in message and "dpo.py" in message


# -------------------------------------------------------------------------------- faults

GOOD = b'{"text": "good"}\n'
BAD_LINES = {  # the second line of a .jsonl file -> words that its error needs
    "torn at the end of the file": (b'{"text": "to', "one object per line"),
    "torn in a string": (b'{"text": "to\n' + GOOD, "one object per line"),
    "torn between fields": (b'{"text": "to",\n' + GOOD, "one object per line"),
    "two objects": (b'{"text": "a"} {"text": "b"}\n', "one object per line"),
    "Latin-1": (b'{"text": "caf\xe9"}\n', "utf-8"),
    "integer of 5000 digits": (b'{"text": ' + b"9" * 5000 + b"}\n", "one object per line"),
    "list as row": (b'["text", "a"]\n', "object"),
    "string as row": (b'"text"\n', "object"),
    "NaN as row": (b"NaN\n", "object"),
    "missing answer": (b'{"prompt": "q"}\n', "'prompt'"),
    "unknown fields": (b'{"foo": 1, "bar": 2}\n', "['bar', 'foo']"),
    "null text": (b'{"text": null}\n', "'text' is None"),
    "null answer": (b'{"instruction": "q", "output": null}\n', "'output' is None"),
    "null prompt": (b'{"prompt": null, "completion": "a"}\n', "'prompt' is None"),
    "null messages": (b'{"messages": null}\n', "'messages' is None"),
    "number as text": (b'{"text": 5}\n', "'text' is 5"),
    "NaN as text": (b'{"text": NaN}\n', "'text' is nan"),
    "number as answer": (b'{"question": "q", "answer": 5}\n', "'answer' is 5"),
    "no messages": (b'{"messages": []}\n', "'messages' is []"),
    "number as message": (b'{"messages": [5]}\n', "not 5"),
    "null as message": (b'{"messages": [null]}\n', "not None"),
    "list as message": (b'{"messages": [["user", "q"]]}\n', "['user', 'q']"),
    "message without content": (b'{"messages": [{"role": "user"}]}\n', "content"),
    "null content": (b'{"messages": [{"role": "user", "content": null}]}\n', "content"),
    "null value": (b'{"conversations": [{"from": "human", "value": null}]}\n', "content"),
    "number as content": (b'{"messages": [{"role": "user", "content": 5}]}\n', "content"),
    "null role": (b'{"messages": [{"role": null, "content": "q"}]}\n', "role None"),
    "null in history": (b'{"query": "q", "response": "a", "history": [["q", null]]}\n', "None"),
}  # fmt: skip
# Errors that do not say which field is wrong, or rows that are taken although they are wrong.
UNCLEAR = {
    "half a pair": (b'{"query": "q", "response": "a", "history": [["q"]]}\n', "history"),
    "flat history": (b'{"query": "q", "response": "a", "history": ["Hi", "Yo"]}\n', "history"),
    "text as history": (b'{"query": "q", "response": "a", "history": "abc"}\n', "history"),
    "messages as history": (
        b'{"query": "q", "response": "a", "history": [{"role": "user", "content": "x"}]}\n',
        "history",
    ),
    "object as input": (b'{"instruction": "q", "input": {"a": 1}, "output": "a"}\n', "'input'"),
    "list as context": (b'{"question": "q", "context": ["c"], "answer": "a"}\n', "'context'"),
    "text as messages": (b'{"messages": "hi"}\n', "'messages'"),
    "JSON text as messages": (b'{"messages": "[{\\"role\\": \\"user\\"}]"}\n', "'messages'"),
}  # fmt: skip


def refused_line(tmp_path, line: bytes) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + line)
    message = refused(tmp_path, path)
    assert message.startswith(f"{path}:2: ") and "\n" not in message
    return message


@pytest.mark.parametrize("line, words", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_refused_in_one_line_with_file_line_and_reason(line, words, tmp_path):
    assert words in refused_line(tmp_path, line)


@pytest.mark.parametrize("line, words", UNCLEAR.values(), ids=UNCLEAR.keys())
def test_a_bad_line_is_refused_by_the_name_of_the_field(line, words, tmp_path):
    assert words in refused_line(tmp_path, line)


BAD_FILES = {  # name, content -> words of the error
    "folder without data": ("rows.txt", b"text", "rows.txt"),
    "broken parquet": ("rows.parquet", b"PAR1 nothing PAR1", "arquet"),
    "empty parquet": ("rows.parquet", b"", "arquet"),
    "torn gzip": ("rows.jsonl.gz", gzip.compress(GOOD * 300)[:-20], "ended"),
    "no gzip": ("rows.jsonl.gz", GOOD, "gzip"),
    "torn json list": ("rows.json", b'[{"text": "a"},\n {"text": "b"},\n {"text', "line 3"),
    "Latin-1 csv": ("rows.csv", b"text\ngood\ncaf\xe9\n", "utf-8"),
    "UTF-16 csv": ("rows.csv", "text\na\n".encode("utf-16"), "utf-8"),
    "csv with unknown columns": ("rows.csv", b"foo\na\n", "['foo']"),
    "csv with too few fields": ("rows.csv", b"prompt,completion\nq\n", "'completion' is None"),
    "csv with too many fields": ("rows.csv", b"prompt,completion\nq,a,b\n", "every field"),
    "rows below a key": ("rows.json", b'{"data": [{"text": "a"}]}', "['data']"),
    "list of lists": ("rows.json", b'[["a"]]', "object"),
}  # fmt: skip


@pytest.mark.parametrize("name, content, words", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_refused_in_one_line_with_its_name(name, content, words, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    message = refused(tmp_path, path)
    assert str(path) in message and words in message and "\n" not in message


NO_ROWS = {
    "jsonl": ("rows.jsonl", b""),
    "blank jsonl": ("rows.jsonl", b"\n\n"),
    "json": ("rows.json", b""),
    "list": ("rows.json", b"[]"),
    "csv": ("rows.csv", b""),
    "csv of a header": ("rows.csv", b"text\n"),
}


@pytest.mark.parametrize("name, content", NO_ROWS.values(), ids=NO_ROWS.keys())
def test_a_file_without_rows_is_refused_in_one_line_with_its_name(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    message = refused(tmp_path, path)
    assert str(path) in message and "no rows" in message and "\n" not in message


def test_a_pretty_printed_object_is_refused_with_a_hint(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"text": "a"}, indent=1))
    message = refused(tmp_path, path)
    assert f"{path}:1: " in message and "a JSON list, or one object per line" in message


def test_a_bad_row_of_a_folder_is_named_with_its_file(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder / "a.jsonl", [{"text": "a"}])
    bad = write_rows(folder / "b.jsonl", [{"text": "b"}, {"text": 5}])
    assert refused(tmp_path, folder).startswith(f"{bad}:2: ")


@pytest.mark.parametrize("suffix", [".csv", ".json", ".parquet"])
def test_a_bad_row_of_another_kind_of_file_is_named_with_its_number(suffix, tmp_path):
    """Of the row: a line would be another."""
    path = write_as(tmp_path / f"rows{suffix}", [{"text": "good", "label": x} for x in ("", "l")])
    assert refused(tmp_path, path).startswith(f"{path}: row 2: field 'label' ")


def test_a_long_text_in_a_csv_file_is_read(tmp_path, tokenizer):
    path = write_as(tmp_path / "rows.csv", [{"text": "long " * 30_000}])
    assert "".join(texts(load(path)[0], tokenizer)).startswith("long " * 30_000)


@pytest.mark.parametrize("data", ["/nowhere/a.jsonl", "./nowhere", "nowhere.parquet", "~/a.csv"])
def test_a_missing_file_is_refused_in_one_line(data, tmp_path):
    message = refused(tmp_path, data)
    assert message.startswith(f"--data {data}: ") and "\n" not in message


@pytest.mark.parametrize("data", ["no-such/name", "no-such/name@train", "no-such/name@x@y", "name"])
def test_a_hub_name_without_a_network_is_refused_in_one_line(data, tmp_path):
    message = refused(tmp_path, data)
    assert message.startswith(f"--data {data}: no such file, and loading from the Hub failed: ")
    assert "\n" not in message


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path, tmp_path / "empty").startswith(f"--data {tmp_path / 'empty'}: ")


def dropped(capsys) -> tuple[int, ...]:
    """What a run says of its rows: examples, cut, without a target, bad."""
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "without a target" in x]
    numbers = re.findall(r"\b\d[\d,]*", line)
    return tuple(int(number.replace(",", "")) for number in numbers)


def mixed(count: int = 20, **fields) -> list[dict]:
    """Rows of which every third is bad, the first being the third."""
    bad = [{"text": n} | fields for n in range(count)]
    return [bad[n] if n % 3 == 2 else {"text": f"text {n}"} | fields for n in range(count)]


def test_several_bad_rows_are_counted_and_the_first_five_shown_in_order(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", mixed())
    first, *lines = refused(tmp_path, path).splitlines()
    assert first.startswith("6 rows ") and "--skip-bad-rows" in first
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{n}" for n in (3, 6, 9, 12, 15)]
    assert [re.search(r"'text' is (\d+)", line)[1] for line in lines] == ["2", "5", "8", "11", "14"]


def test_skip_bad_rows_drops_and_counts_them(tmp_path, tokenizer, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [*mixed(), {"text": ""}])
    (tmp_path / "rows.jsonl").write_bytes((tmp_path / "rows.jsonl").read_bytes() + b'{"te')
    found = texts(load(path, "--skip-bad-rows")[0], tokenizer)
    assert found == [f"text {n}<|im_end|>" for n in range(20) if n % 3 != 2]
    assert dropped(capsys) == (14, 0, 1, 7)
    only_bad = write_rows(tmp_path / "bad.jsonl", [{"text": 5}])
    assert "no example with a target" in refused(tmp_path, only_bad, "--skip-bad-rows")


def test_a_template_that_complains_in_two_lines_gets_one(tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ raise_exception('No.\nNever.') }}", encoding="utf-8")
    refused_row(tmp_path, {"messages": PAIR}, "--template", str(template))


def test_the_user_sees_one_error_line_exit_code_2_and_no_output(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(GOOD + b'{"text": "to')
    flags = ["--model", TINY, "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "output"]
    out = run_script("lora.py", *flags)
    assert out.returncode == 2 and "Traceback" not in out.stderr
    (line,) = [line for line in out.stderr.splitlines() if line.strip()]
    assert line.startswith(f"error: {tmp_path / 'rows.jsonl'}:2: ")
    assert not (tmp_path / "output").exists()


# ------------------------------------------------------------------------ PATH:WEIGHT, cache


def repeats(sources, tokenizer, *flags) -> list[Counter]:
    """How often each text comes in the first epochs."""
    flags = ["--data", *sources, "--eval-data", "0", "--batch-size", "1", *flags]
    args = common.make_parser("", output="unused", lr=1e-3).parse_args([str(x) for x in flags])
    table, _ = common.load_data(args, tokenizer)
    found = texts(table, tokenizer)
    order = [n for step in common.plan_steps(table, args) for n in step]
    epoch = len(order) // int(args.epochs)
    parts = [order[i : i + epoch] for i in range(0, len(order), epoch)]
    return [Counter(found[n].removesuffix(EOS) for n in part) for part in parts]


def test_the_weight_behind_a_path_is_how_often_its_rows_come(tmp_path, tokenizer):
    a = write_rows(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(4)])
    b = write_rows(tmp_path / "b.jsonl", [{"text": f"b{i}"} for i in range(6)])
    (tmp_path / "c:3").mkdir()  # the number belongs to the name
    write_rows(tmp_path / "c:3" / "c.jsonl", [{"text": "c"}])
    sources = [f"{a}:2", f"{b}:.5", tmp_path / "c:3"]
    counts = repeats(sources, tokenizer, "--epochs", 2)
    assert len(counts) == 2
    for count in counts:
        assert [count[f"a{i}"] for i in range(4)] == [2] * 4 and count["c"] == 1
        assert count.total() == 8 + 3 + 1
    assert [(counts[0] + counts[1])[f"b{i}"] for i in range(6)] == [1] * 6  # another half
    assert repeats([f"{b}:1.0"], tokenizer, "--epochs", 1)[0].total() == 6


@pytest.mark.parametrize("weight", ["-1", "nan", "inf", "two", "1e999", "-inf", "1.2.3", ".", ""])
def test_a_bad_weight_is_refused_with_the_argument(weight, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}]) + ":" + weight
    message = refused(tmp_path, data)
    assert message.startswith(f"--data {data}: ") and "\n" not in message


def test_a_weight_so_small_that_no_epoch_has_a_row_is_refused(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(3)]
    data = write_rows(tmp_path / "rows.jsonl", rows) + ":0.01"
    with pytest.raises(common.UserError, match="less than one example"):
        repeats([data], common.load_tokenizer(common.make_parser("", "", 0.1).parse_args([])))


@pytest.fixture
def counted(monkeypatch) -> Counter:
    """Counts the texts that are tokenised: none where the cache serves."""
    calls = Counter()
    kind = type(transformers.AutoTokenizer.from_pretrained(TINY))
    original = kind.__call__

    def call(*args, **kwargs):
        calls["texts"] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(kind, "__call__", call)
    return calls


def test_tokenised_rows_come_from_the_cache_when_nothing_changed(tmp_path, counted, capsys):
    path = write_rows(
        tmp_path / "rows.jsonl", [{"text": "once"}, {"prompt": "q", "completion": ""}]
    )
    first = load(path)[0][:]
    assert counted.pop("texts") and (first_said := capsys.readouterr().out)
    second = load(path)[0][:]
    assert not counted and capsys.readouterr().out == first_said
    assert {key: x.tolist() for key, x in second.items()} == {
        key: x.tolist() for key, x in first.items()
    }


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_that_changed_is_never_served_from_the_cache(suffix, tmp_path, tokenizer):
    """Same name, same size, same time of change: only the content tells. And back again."""
    path = tmp_path / f"rows{suffix}"
    for text in ("old", "new", "old"):
        write_as(path, [{"text": text}])
        os.utime(path, ns=(10**18, 10**18))
        assert texts(load(path)[0], tokenizer) == [text + EOS]


def test_a_file_that_was_added_to_a_folder_is_read(tmp_path, tokenizer):
    write_rows(tmp_path / "a.jsonl", [{"text": "a"}])
    assert texts(load(tmp_path)[0], tokenizer) == ["a" + EOS]
    write_rows(tmp_path / "b.jsonl", [{"text": "b"}])
    assert texts(load(tmp_path)[0], tokenizer) == ["a" + EOS, "b" + EOS]


def test_settings_that_change_the_tokens_are_never_served_from_the_cache(tmp_path, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "abc"}])
    other = tmp_path / "other.jinja"
    other.write_text("! " + TOOLS, encoding="utf-8")
    flags = [(), ("--max-length", 22), ("--system", "s"), ("--template", "none"),
             ("--template", "alpaca"), ("--template", other)]  # fmt: skip
    found = [tuple(texts(load(path, *chosen)[0], tokenizer)) for chosen in flags for _ in (1, 2)]
    assert found[::2] == found[1::2] and len(set(found)) == len(flags)

"""Preference rows: every layout, the tokens that answers share, and what is refused or dropped."""

import types

import numpy as np
import pytest
import transformers
from conftest import TINY, write_rows
from pairs import arguments, examples_of

import common
import dpo


def turn(role, text):
    return {"role": role, "content": text}


Q, GOOD, BAD = turn("user", "Q"), turn("assistant", "good"), turn("assistant", "bad")
BRIEF = turn("system", "Be brief.")
HUMAN = "\n\nHuman: Q\n\nAssistant:"
LONG = [Q, turn("assistant", "A"), turn("user", "B")]
PAIR = {"chosen": "good", "rejected": "bad"}
READ = {  # row -> the prompt that must come out
    "text": ({"prompt": "Q", **PAIR}, [Q]),
    "messages and a message": ({"prompt": [Q], "chosen": GOOD, "rejected": BAD}, [Q]),
    "messages": ({"prompt": [BRIEF, Q], "chosen": [GOOD], "rejected": [BAD]}, [BRIEF, Q]),
    "UltraFeedback": (
        {"prompt": "Q", "chosen": [Q, GOOD], "rejected": [Q, BAD], "messages": [Q, GOOD],
         "score_chosen": 8.0, "prompt_id": "x"},
        [Q],
    ),
    "a system turn that the prompt's text has not": (
        {"prompt": "Q", "chosen": [BRIEF, Q, GOOD], "rejected": [BRIEF, Q, BAD]},
        [BRIEF, Q],
    ),
    "no prompt": ({"chosen": [*LONG, GOOD], "rejected": [*LONG, BAD]}, LONG),
    "ShareGPT": (
        {"chosen": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "good"}],
         "rejected": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "bad"}]},
        [Q],
    ),
    "HH": ({"chosen": HUMAN + " good", "rejected": HUMAN + " bad"}, [Q]),
    "HH, several turns": (
        {"chosen": f"\n\nHuman: Q\n\nAssistant: A\n\nHuman: B\n\nAssistant: {'good'}",
         "rejected": f"\n\nHuman: Q\n\nAssistant: A\n\nHuman: B\n\nAssistant: {'bad'}"},
        LONG,
    ),
    "Orca": ({"system": "Be brief.", "question": "Q", **PAIR}, [BRIEF, Q]),
    "Alpaca": ({"instruction": "Q", "input": "", **PAIR}, [Q]),
    "Alpaca with input": (
        {"instruction": "Q", "input": "C", "history": [["Q", "A"]], **PAIR},
        [Q, turn("assistant", "A"), turn("user", "Q\n\nC")],
    ),
    "LLaMA-Factory": ({"conversations": [Q], "chosen": GOOD, "rejected": BAD}, [Q]),
    "HH's prompt is text": ({"prompt": HUMAN, **PAIR}, [turn("user", HUMAN)]),
    "a text beside conversations": (
        {"text": "x", "chosen": [Q, GOOD], "rejected": [Q, BAD]},
        [Q],
    ),
    "ranked": ({"prompt": "Q", "responses": ["good", "bad"]}, [Q]),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_layout_is_read(name):
    row, prompt = READ[name]
    turns, answers, tools, margin = common.parse_row(row)
    assert turns == prompt and answers == [GOOD, BAD] and tools is None and margin == 0


def test_margin_and_tools_are_read():
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"prompt": "Q", **PAIR, "margin": 1.5, "tools": tools}
    assert common.parse_row(row)[2:] == (tools, 1.5)


REFUSED = [
    ({"prompt": "Q", "chosen": [Q, GOOD], "rejected": [LONG[0], LONG[1], Q, BAD]}, "same turns"),
    ({"prompt": "other", "chosen": [Q, GOOD], "rejected": [Q, BAD]}, "differ from the prompt"),
    (
        {"prompt": "Q", "messages": [Q, BAD], "chosen": [Q, GOOD], "rejected": [Q, BAD]},
        "differ from the prompt",
    ),
    ({"chosen": "good", "rejected": "bad"}, "needs a prompt"),
    ({"chosen": [GOOD, Q], "rejected": [GOOD, turn("user", "R")]}, "answers by the assistant"),
    ({"prompt": "Q", **PAIR, "images": ["x.png"]}, "'images' would be ignored"),
    ({"prompt": "Q", "question": "R", **PAIR}, "'question' would be ignored"),
    ({"prompt": "Q", "completion": "good", **PAIR}, "'completion' would be ignored"),
    ({"prompt": "Q", "label": 1, **PAIR}, "'label' would be ignored"),
    ({"prompt": "Q", **PAIR, "margin": "much"}, "could not convert string to float: 'much'"),
    ({"prompt": "Q", **PAIR, "margin": float("nan")}, "'margin' is nan"),
    ({"prompt": "Q", "messages": [Q], **PAIR}, "'prompt' would be ignored"),
    ({"chosen": [Q, GOOD], "rejected": [Q, BAD], "response": "r"}, "'response' would be ignored"),
    ({"prompt": "Q", "chosen": None, "rejected": "bad"}, "'chosen' is None"),
]


@pytest.mark.parametrize("row, match", REFUSED, ids=[match for _, match in REFUSED])
def test_what_is_not_understood_is_refused_by_name(row, match):
    with pytest.raises(ValueError, match=match):
        common.parse_row(row)


def test_no_responses_are_no_preference():
    assert common.parse_row({"prompt": "Q", **PAIR, "responses": None})[1] == [GOOD, BAD]
    assert common.parse_row({"messages": [Q, GOOD], "responses": []}, "train")[0] == [Q, GOOD]


def test_bad_rows_are_one_error_with_file_and_line(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [READ["text"][0], {"prompt": "Q", "label": 1}])
    flags = ["--model", TINY, "--data", data, "--output", str(tmp_path / "out")]
    with pytest.raises(common.UserError, match="rows.jsonl:2: .*needs chosen and rejected"):
        dpo.main(flags)
    assert not (tmp_path / "out").exists()


def test_what_teaches_nothing_is_dropped_and_counted(tmp_path, capsys):
    """Equal answers, also once they are cut, or among ranked ones; empty answers; long prompts."""
    rows = [
        {"prompt": "Q", **PAIR},
        {"prompt": "Q", "chosen": "same", "rejected": "same"},
        {"prompt": "Q", "chosen": "a" * 90 + "b", "rejected": "a" * 90 + "c"},
        {"prompt": "Q", "chosen": "", "rejected": "bad"},
        {"prompt": "Q" * 100, **PAIR},
        {"prompt": "Q", "responses": ["a", "b", "a"]},
    ]
    examples = examples_of(arguments(dpo, tmp_path, rows))
    assert [len(x) for x in examples["stretches"]] == [3, 3]
    assert "2 examples, 0 of them cut at --max-length; dropped: 4 without two" in (
        capsys.readouterr().out
    )
    with pytest.raises(common.UserError, match="no example"):
        examples_of(arguments(dpo, tmp_path, rows[1:3]))


TEMPLATES = {
    # a generation prompt that opens a thinking block, which an answer without one closes
    "thinking": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == "
    "'assistant' and '</think>' not in m['content'] %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant"
    "\n{% endif %}",
    "no special tokens": "{% for m in messages %}{{ m['content'] }} {% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_answers_are_what_the_template_writes(name, tmp_path):
    """Each answer behind the shared tokens is the template's own text, cut at the end of turn."""
    (tmp_path / "template.jinja").write_text(TEMPLATES[name])
    rows = [{"prompt": "Q", "responses": ["good", "bad", "go", "<think>\nx\n</think>\n\nbad"]}]
    args = arguments(dpo, tmp_path, rows, "--template", tmp_path / "template.jinja")
    examples, tokenizer = examples_of(args), common.load_tokenizer(args)
    ids, marks, lengths = (examples[k][0] for k in ("input_ids", "is_target", "stretches"))
    prompt, *answers = np.split(ids, np.cumsum(lengths)[:-1])
    context, *targets = np.split(marks, np.cumsum(lengths)[:-1])
    assert not context.any() and len(answers) == 4
    for answer, target, text in zip(answers, targets, rows[0]["responses"]):
        whole = tokenizer.apply_chat_template([Q, turn("assistant", text)], tokenize=False)
        assert whole.rstrip() == tokenizer.decode([*prompt, *answer]).rstrip()
        assert text.split("\n")[-1] in tokenizer.decode(answer[target.astype(bool)])


def test_merge_system_joins_the_turns_of_a_prompt(tmp_path):
    rows = {"prompt": [BRIEF, Q], **PAIR}, {"prompt": "Be brief.\n\nQ", **PAIR}
    args = (arguments(dpo, tmp_path, [row], "--merge-system") for row in rows)
    found, expected = (examples_of(x)["input_ids"][0] for x in args)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("whole", [False, True])
def test_a_reward_model_reads_what_follows_the_end_of_turn(whole, tmp_path):
    """transformers pools there."""
    examples = examples_of(
        arguments(dpo, tmp_path, [{"prompt": "Q", **PAIR}]), "whole pairs" if whole else "pairs"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    parts = np.split(examples["input_ids"][0], np.cumsum(examples["stretches"][0])[:-1])
    end = "<|im_end|>\n" if whole else "<|im_end|>"
    assert [tokenizer.decode(x) for x in parts[1:]] == ["good" + end, "bad" + end]


def test_held_out_prompts_are_not_trained_on(tmp_path):
    rows = [{"prompt": f"Q{n // 3}", "chosen": f"good {n}", "rejected": "bad"} for n in range(30)]
    args = arguments(dpo, tmp_path, rows)
    args.eval_data = ["0.2"]
    sets = common.load_data(args, common.load_tokenizer(args), "pairs")
    train, held_out = (set(x["prompt"][:].tolist()) for x in sets)
    assert len(held_out) == 2 and len(train) == 8 and not train & held_out


def test_inspect_shows_the_answers_apart(tmp_path, capsys):
    args = arguments(dpo, tmp_path, [{"prompt": "Q", **PAIR}], "--inspect")
    train_set, _ = common.load_data(args, common.load_tokenizer(args), "pairs")
    common.inspect_examples(train_set, common.load_tokenizer(args))
    printed = capsys.readouterr().out
    assert printed.count("TARGET") == 2 and printed.count("context") == 1


def test_a_long_prompt_is_a_pass_of_its_own_where_answers_are_padded():
    """A padded example counts a row for every answer."""
    columns = {
        "input_ids": [np.arange(30), np.arange(24)],
        "is_target": [np.arange(30) >= 10, np.arange(24) >= 10],
        "stretches": [np.array([10, 15, 5]), np.array([10, 7, 7])],
    }
    args = types.SimpleNamespace(no_packing=True, micro_batch_tokens=90)
    batches = common.micro_batches(columns, args, common.torch.device("cpu"))
    assert [x["input_ids"].shape for x in batches] == [(2, 25), (2, 17)]
    assert batches[0]["attention_mask"].sum(1).tolist() == [25, 15]
    assert [len(x["examples"]) for x in batches] == [1, 1]

"""examples/prepare_data.py: layouts, rules, MinHash against the exact Jaccard index, masks."""

import importlib.util
import json
import random

import numpy as np
import pytest
from conftest import ROOT, write_rows

spec = importlib.util.spec_from_file_location("prepare", ROOT / "examples" / "prepare_data.py")
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


Q, A, B = turn("user", "Q?"), turn("assistant", "A!"), turn("assistant", "B!")
CHAT = {"messages": [Q, A]}
PAIR = {"prompt": [Q], "chosen": [A], "rejected": [B], "margin": 0.0}
LAYOUTS = {  # rows -> what is written
    "KTO": ([{"prompt": "Q?", "completion": "B!", "label": False},
             {"prompt": "other", "completion": "A!", "label": True},
             {"prompt": "Q?", "completion": "A!", "label": True}], [PAIR]),
    "LLaMA-Factory's KTO": ([{"messages": [Q, A], "kto_tag": True},
                             {"messages": [Q, B], "kto_tag": False}], [PAIR]),
    "LLaMA-Factory's pairs": ([{"conversations": [Q], "chosen": A, "rejected": B}], [PAIR]),
    "ms-swift": ([{"messages": [Q, A], "rejected_response": "B!"}], [PAIR]),
    "Firefly": ([{"kind": "qa", "input": "Q?", "target": "A!"}], [CHAT]),
    "Firefly's conversations": (
        [{"conversation_id": 1, "conversation": [{"human": "Q?", "assistant": "A!"}] * 2}],
        [{"messages": [Q, A, Q, A]}],
    ),
    "xtuner": (
        [{"conversation": [{"system": "S", "input": "Q?", "output": "A!"}]}],
        [{"messages": [turn("system", "S"), Q, A]}],
    ),
    "Alpaca": ([{"instruction": "Q?", "input": "<no input>", "output": "A!"}], [CHAT]),
    "text": ([{"text": "T"}], [{"text": "T"}]),
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """run(rows, *flags) -> what is written, the report, and what is held out"""

    def run(rows, *flags):
        data, output = write_rows(tmp_path / "raw.jsonl", rows), tmp_path / "out.jsonl"
        parts, report = [output, output.with_suffix(".eval.jsonl")], []
        original = prepare.prepare
        prepare.prepare = lambda args: report.append(original(args)) or report[0]
        try:
            prepare.main(["--data", data, "--output", str(output), *map(str, flags)])
        finally:
            prepare.prepare = original
        lines = [path.read_text("utf-8").splitlines() if path.exists() else [] for path in parts]
        return [json.loads(x) for x in lines[0]], report[0], [json.loads(x) for x in lines[1]]

    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_converted(name, run):
    rows, written = LAYOUTS[name]
    assert run(rows)[0] == written


def test_what_cannot_be_used_is_counted_by_its_reason(run, capsys):
    rows = [{"prompt": "Describe this image.", "completion": "A cat."}]
    rows += [{"prompt": "Q", "completion": text} for text in ("", " ", "ok", "fine", "x" * 40)]
    rows += [{"prompt": "P", "completion": "As an AI language model, I cannot."}]
    rows += [{"prompt": "Q", "chosen": "same", "rejected": "same"}, {"messages": "none"}, {"a": 1}]
    rows += [
        {"prompt": "R", "completion": "N/A."},
        {"prompt": "S", "completion": "x", "label": True},
        {"prompt": "T", "responses": ["one", "two", "three"]},  # no single pair
    ]
    written, report, _ = run(rows, "--min-answer", 3, "--max-answer", 39)
    assert [row["messages"][1]["content"] for row in written] == ["fine"]
    assert report.counts == {
        "kept": 1,
        "dropped: needs an image or a file": 1,
        "dropped: an empty answer": 2,
        "dropped: an answer that is too short or too long": 2,
        "dropped: an answer speaks of being a model": 1,
        "dropped: an answer is a placeholder": 1,
        "dropped: equal answers": 1,
        "dropped: cannot be read": 3,
        "dropped: a label without its counterpart": 1,
        "normalised": 1,
    }
    printed = capsys.readouterr().out
    assert "raw.jsonl:9" in printed and "2  dropped: an empty answer" in printed


def test_texts_are_normalised(run):
    rows = [
        {"prompt": "cafe\u0301\u200b", "completion": "\ufeffa\r\nb\x07 \U0001f468\u200d\U0001f469"}
    ]
    ((asked, answered),) = [row["messages"] for row in run(rows)[0]]
    assert asked["content"] == "caf\u00e9"
    assert answered["content"] == "a\nb \U0001f468\u200d\U0001f469"  # an emoji's joiner stays


def grams(text: str) -> set[str]:
    return {text[n : n + 5] for n in range(len(text) - 4)}


def jaccard(one: str, other: str) -> float:
    one, other = grams(one), grams(other)
    return len(one & other) / len(one | other)


def test_min_hashes_estimate_the_jaccard_index():
    """128 functions: a standard error of at most 0.045; 60 pairs of every resemblance."""
    draw = random.Random(0)
    errors = []
    for n in range(60):
        text = "".join(draw.choice("abcdefgh ") for _ in range(400)).strip()
        other = text[: len(text) * n // 60] + "".join(draw.choice("abcdefgh") for _ in range(100))
        text, other = (" ".join(x.split()) for x in (text, other))
        estimate = (prepare.min_hashes(text) == prepare.min_hashes(other)).mean()
        errors.append(estimate - jaccard(text, other))
    assert abs(np.mean(errors)) < 0.01 and np.std(errors) < 0.045
    assert (prepare.min_hashes("Some  text") == prepare.min_hashes("some text")).all()


def test_exact_and_near_copies_are_dropped_and_the_first_stays(run):
    draw = random.Random(1)
    texts = ["".join(draw.choice("abcdefghij ") for _ in range(600)) for _ in range(40)]
    near = [text[:290] + "#" + text[291:] for text in texts[:10]]
    far = [text[:300] + texts[-1 - n][300:] for n, text in enumerate(texts[10:20])]
    clean = lambda text: " ".join(text.split())  # noqa: E731
    assert all(jaccard(clean(a), clean(b)) > 0.9 for a, b in zip(texts, near))
    assert all(jaccard(clean(a), clean(b)) < 0.6 for a, b in zip(texts[10:], far))
    rows = [{"text": text} for text in [*texts, *texts[:5], *near, *far]]
    written, report, _ = run(rows)
    assert [row["text"] for row in written] == [text.strip() for text in texts + far]
    assert report.counts["dropped: an exact copy"] == 5
    assert report.counts["dropped: a near copy (>= 0.8)"] == 10
    assert len(run(rows, "--near", 1)[0]) == 60


MASKS = {
    "Write to ann.lee+x@mail.example.org.": "Write to [EMAIL].",
    "Call +44 20 7946 0958 or (800) 555-0199!": "Call [PHONE] or [PHONE]!",
    "手机13812345678，谢谢": "手机[PHONE]，谢谢",
    "ID 11010519491231002X and 110105194912310021": "ID [ID] and 110105194912310021",
    "3 + 4 = 7, in 1969, 10000000000000 grains, 2026-11-26": None,
    "She had 48 clips, 24 clips and 13912 more": None,
}


@pytest.mark.parametrize("text, masked", MASKS.items())
def test_personal_data_is_masked(text, masked):
    assert prepare.mask(text) == (text if masked is None else masked)


def test_a_prompt_is_held_out_with_all_its_answers(run):
    rows = [{"prompt": f"prompt {n % 200}", "completion": f"answer {n}"} for n in range(600)]
    written, _, held_out = run(rows, "--held-out", 0.3, "--near", 1)
    one, other = ({row["messages"][0]["content"] for row in part} for part in (written, held_out))
    assert not one & other and len(one | other) == 200 and len(written) + len(held_out) == 600
    assert 40 <= len(other) <= 80
    assert run(rows, "--held-out", 0.3, "--near", 1)[2] == held_out


def test_evaluation_rows_in_the_training_rows_are_reported(run, tmp_path):
    draw = random.Random(2)
    texts = ["".join(draw.choice("abcdefghij ") for _ in range(300)).strip() for _ in range(6)]
    rows = [{"prompt": text, "completion": "a"} for text in texts[:4]]
    asked = [texts[0], texts[1][:150] + "#" + texts[1][151:], texts[5]]
    test = write_rows(tmp_path / "test.jsonl", [{"prompt": x, "completion": "b"} for x in asked])
    report = run(rows, "--eval-data", test)[1]
    assert report.counts["evaluation rows in the training data"] == 1
    assert report.counts["evaluation rows near training rows (>= 0.8)"] == 1
    assert "raw.jsonl:2" in report.examples["evaluation rows near training rows (>= 0.8)"][0]

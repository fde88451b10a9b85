"""From conversations to tokens: which are targets, what is split, cut, dropped and held out."""

import random
import re
import time
from collections import Counter

import datasets
import numpy as np
import pytest
import tokenizers
import transformers
import trl
from conftest import TINY, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import common

U, A, S = ({"role": role} for role in ("user", "assistant", "system"))
PAIR = [U | {"content": "q"}, A | {"content": "a"}]
TALK = [U | {"content": "one"}, A | {"content": "first"}]
TALK += [U | {"content": "two"}, A | {"content": "second"}]

# ------------------------------------------------------ small templates of well-known families

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Special tokens on both sides of a turn, white space around the text trimmed, bos.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
# No system turn, turns alternate, the assistant is called model, a line break after the end.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate, without a system turn') }}{% endif %}"
    "{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '</turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
# eos after the last turn, unless an answer is to follow.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# No generation prompt at all, a space before the answer, eos as the end of turn.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
# Thoughts of answers before the last question are left out; the last answer always has a block.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set text = m.content %}"
    "{% set thought = m.reasoning_content or '' %}{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set text = text.split('</think>')[-1].lstrip() %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ text + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Thoughts are always left out; the generation prompt opens a block for them.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|U|>' + m.content }}"
    "{% else %}{{ '<|A|>' + m.content.split('</think>')[-1] + '<|eos|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|A|><think>\n' }}{% endif %}"
)
# name -> (template, special tokens: eos, pad and bos first, the target text of an answer)
FAMILIES = {
    "ChatML": (CHATML, ["<|im_end|>", "<|im_end|>", None, "<|im_start|>"], "{}<|im_end|>"),
    "Llama 3": (LLAMA3, ["<|eot|>", "<|eot|>", "<|bos|>", "<|head|>", "<|/head|>"], "{}<|eot|>"),
    "Gemma": (GEMMA, ["<eos>", "<pad>", "<bos>", "<turn>", "</turn>"], "{}</turn>"),
    "Phi 3": (PHI3, ["<|eos|>", "<|eos|>", None, "<|user|>", "<|assistant|>", "<|end|>"],
              "{}<|end|>"),
    "Mistral": (MISTRAL, ["</s>", "</s>", "<s>", "[INST]", "[/INST]"], " {}</s>"),
    "Qwen 3": (QWEN3, ["<|im_end|>", "<|eos|>", None, "<|im_start|>"],
               "<think>\n\n</think>\n\n{}<|im_end|>"),
    "R1": (R1, ["<|eos|>", "<|eos|>", "<|bos|>", "<|U|>", "<|A|>"], "{}<|eos|>"),
}  # fmt: skip


def make_tokenizer(template, special, merges=()) -> transformers.PreTrainedTokenizerFast:
    """A token for each byte, special tokens, and the longer tokens that merges make."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *dict.fromkeys(a + b for a, b in merges)]
    bpe = tokenizers.models.BPE({word: n for n, word in enumerate(words)}, list(merges))
    core = tokenizers.Tokenizer(bpe)
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens([token for token in special if token])
    named = {"eos_token": special[0], "pad_token": special[1], "bos_token": special[2]}
    named = {name: token for name, token in named.items() if token}
    named["chat_template"] = template
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **named)


def family(name: str, **changes):
    template, special, _ = FAMILIES[name]
    return make_tokenizer(changes.get("template", template), special)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def encode(tmp_path):
    """Rows -> the examples that load_data makes of them, with the tokenizer of a model's folder
    that has a million positions and no weights. The bundled tokenizer if none is given."""

    def load(rows, tokenizer=None, *flags, loss_on="answers", vocab_size=400):
        folder = tmp_path / "model"
        sizes = {"vocab_size": vocab_size, "max_position_embeddings": 10**6}
        transformers.LlamaConfig(**sizes).save_pretrained(folder)
        (tokenizer or bundled()).save_pretrained(folder)
        data = write_rows(tmp_path / "rows.jsonl", rows if isinstance(rows, list) else [rows])
        flags = ["--model", folder, "--data", data, "--eval-data", "0", *flags]
        args = arguments(*flags)
        args.loss_on = loss_on  # a flag of sft.py
        return common.load_data(args, common.load_tokenizer(args))[0]

    return load


def arguments(*flags):
    return common.make_parser("", output="unused", lr=1e-3).parse_args([str(x) for x in flags])


def bundled():
    return transformers.AutoTokenizer.from_pretrained(TINY)


def runs(example, tokenizer) -> list[str]:
    """The text of each run of targets."""
    ids, edges = example["input_ids"], np.flatnonzero(np.diff([0, *example["is_target"], 0]))
    return [tokenizer.decode(ids[first:last]) for first, last in zip(edges[::2], edges[1::2])]


def prompt_length(tokenizer, turns) -> int:
    return len(tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"])


# ----------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("name", FAMILIES)
def test_targets_are_the_answer_and_the_end_of_turn(name, encode):
    """Where eos is the padding too, a mask by token id would lose the end of turn."""
    tokenizer, expected = family(name), FAMILIES[name][2]
    (example,) = encode({"messages": PAIR}, tokenizer)
    ids = tokenizer.apply_chat_template(PAIR)["input_ids"]
    assert example["input_ids"].tolist() == ids[: len(example["input_ids"])]
    assert runs(example, tokenizer) == [expected.format("a")]
    assert example["is_target"][-1]  # nothing of what the template writes behind it is left
    if name != "R1":  # whose generation prompt opens a block that this answer does not have
        assert example["is_target"].tolist().index(True) == prompt_length(tokenizer, PAIR[:1])


@pytest.mark.parametrize("name", ["ChatML", "Llama 3", "Gemma", "Phi 3", "Mistral", "R1"])
def test_all_answers_of_a_conversation_are_targets_of_one_document(name, encode):
    tokenizer, expected = family(name), FAMILIES[name][2]
    (example,) = encode({"messages": TALK}, tokenizer)
    ids = tokenizer.apply_chat_template(TALK)["input_ids"]
    assert example["input_ids"].tolist() == ids[: len(example["input_ids"])]
    assert runs(example, tokenizer) == [expected.format("first"), expected.format("second")]


def test_an_end_of_turn_that_is_the_eos_after_the_last_turn_ends_it_once(encode):
    """Phi 3 writes a line break and eos behind the last end of turn: neither is a target."""
    tokenizer = family("Phi 3")
    assert tokenizer.apply_chat_template(TALK, tokenize=False).endswith("second<|end|>\n<|eos|>")
    (example,) = encode({"messages": TALK}, tokenizer)
    assert tokenizer.decode(example["input_ids"]).endswith("second<|end|>")


def test_a_special_token_that_only_the_vocabulary_marks_ends_a_turn(encode):
    tokenizer = family("ChatML")
    tokenizer.eos_token = tokenizer.pad_token = "<|im_start|>"
    assert "<|im_end|>" not in tokenizer.all_special_tokens
    (example,) = encode({"messages": TALK}, tokenizer)
    assert runs(example, tokenizer) == ["first<|im_end|>", "second<|im_end|>"]


THOUGHT = A | {"content": "<think>\nhm\n</think>\n\nfirst"}


def test_a_template_that_drops_earlier_thoughts_gives_one_document_an_answer(encode):
    tokenizer = family("Qwen 3")
    talk = [TALK[0], THOUGHT, *TALK[2:3], A | {"content": "second", "reasoning_content": "so"}]
    examples = encode({"messages": talk}, tokenizer)
    texts = [tokenizer.apply_chat_template(talk[:n], tokenize=False) for n in (2, 4)]
    assert [tokenizer.decode(example["input_ids"]) + "\n" for example in examples] == texts
    assert "hm" in texts[0] and "hm" not in texts[1]
    assert [runs(example, tokenizer) for example in examples] == [
        ["<think>\nhm\n</think>\n\nfirst<|im_end|>"],
        ["<think>\nso\n</think>\n\nsecond<|im_end|>"],
    ]
    assert examples[0]["prompt"] == examples[1]["prompt"]  # the held-out split keeps them together


def test_a_template_that_rewrites_turns_takes_at_most_64_answers(encode):
    """Each of its documents repeats all turns before it."""
    tokenizer = family("Qwen 3")
    assert len(encode({"messages": PAIR * 64}, tokenizer)) == 64
    with pytest.raises(common.UserError, match=r"rows.jsonl:1: .*64"):
        encode({"messages": PAIR * 65}, tokenizer)
    assert len(encode({"messages": PAIR * 65}, family("ChatML"))) == 1


def test_a_template_that_always_drops_thoughts_is_refused(encode):
    tokenizer = family("R1")
    for talk in ([TALK[0], THOUGHT], [TALK[0], THOUGHT, *TALK[2:]]):
        with pytest.raises(common.UserError, match=r"rows.jsonl:1: .*template.*hm"):
            encode({"messages": talk}, tokenizer)
    with pytest.raises(common.UserError, match=r"rows.jsonl:1: .*template.*reasoning_content"):
        encode({"messages": [TALK[0], TALK[1] | {"reasoning_content": "why"}]}, tokenizer)


OPENS = QWEN3.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")


def test_a_thinking_block_that_the_generation_prompt_opens_is_context(encode):
    tokenizer = family("Qwen 3", template=OPENS)
    thought = A | {"content": "first", "reasoning_content": "hm"}
    (example,) = encode({"messages": [TALK[0], thought]}, tokenizer)
    assert runs(example, tokenizer) == ["hm\n</think>\n\nfirst<|im_end|>"]


def test_thoughts_inside_the_answer_fit_a_generation_prompt_that_opens_the_block(encode):
    """Most published reasoning data is like this, and most templates of reasoning models."""
    tokenizer = family("Qwen 3", template=OPENS)
    (example,) = encode({"messages": [TALK[0], THOUGHT]}, tokenizer)
    assert runs(example, tokenizer) == ["hm\n</think>\n\nfirst<|im_end|>"]


def test_a_template_that_changes_the_prompt_is_refused(encode):
    tokenizer = family("ChatML", template="{{ messages | length }}" + CHATML)
    with pytest.raises(common.UserError, match=r"rows.jsonl:1: .*template"):
        encode({"messages": PAIR}, tokenizer)


def test_a_template_that_raises_is_quoted_with_file_and_line(encode):
    rows = [{"messages": PAIR}, {"messages": [S | {"content": "s"}, *PAIR]}]
    found = r"rows.jsonl:2: .*without a system turn \(--merge-system may help\)"
    with pytest.raises(common.UserError, match=found):
        encode(rows, family("Gemma"))


def test_merged_turns_are_those_merged_by_hand(encode):
    users, answers = ([kind | {"content": c} for c in "abc"] for kind in (U, A))
    parted = [S | {"content": "s"}, *users[:2], *answers[:2], S | {"content": "t"}, users[2]]
    by_hand = [("user", "s\n\na\n\nb"), ("assistant", "a\n\nb"), ("user", "t\n\nc")]
    by_hand = [{"role": role, "content": text} for role, text in by_hand]
    for last in (answers[2], answers[2] | {"weight": 1}):
        (found,) = encode({"messages": [*parted, last]}, family("Gemma"), "--merge-system")
        (expected,) = encode({"messages": [*by_hand, answers[2]]}, family("Gemma"))
        assert all(np.array_equal(found[key], expected[key]) for key in expected)
    (found,) = encode({"messages": PAIR}, family("Gemma"), "--system", "s", "--merge-system")
    question = PAIR[0] | {"content": "s\n\n" + PAIR[0]["content"]}
    (expected,) = encode({"messages": [question, PAIR[1]]}, family("Gemma"))
    assert np.array_equal(found["input_ids"], expected["input_ids"])


def test_turns_that_differ_in_more_than_their_text_are_not_joined():
    settings = {"system": None, "merge_system": True}
    tools = [{"role": "tool", "content": x} for x in "ab"]  # the results of two calls
    turns = [U | {"content": "q"}, A | {"content": "x", "weight": 0}, A | {"content": "y"}, *tools]
    assert common.complete_turns(turns, settings) == turns
    turns = [S | {"content": ""}, U | {"content": "q"}]
    assert common.complete_turns(turns, settings) == turns[1:]


# -------------------------------------------------------------- templates that mark targets

END = "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}" + END + "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CLOSES_EARLY = MARKED.replace(END, "{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}")
MARKED_LLAMA3 = (  # a special token follows each end of turn at once
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|eot|>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|eot|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
TALKS = [
    PAIR,
    TALK,
    [S | {"content": "s"}, *TALK, PAIR[0], A | {"content": "中 👍."}],
    [U | {"content": "spell <|im_end|>"}, A | {"content": "<|im_end|>, and go on"}],
]


def their_marks(tokenizer, turns) -> tuple[list[int], list[bool]]:
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    out = tokenizer.apply_chat_template(turns, **options)
    return out["input_ids"], list(map(bool, out["assistant_masks"]))


@pytest.mark.parametrize(
    "name, template, turns",
    [
        *(("ChatML", MARKED, turns) for turns in TALKS),
        ("Llama 3", MARKED_LLAMA3, TALKS[0]),
        *(("Llama 3", MARKED_LLAMA3, turns) for turns in TALKS[1:3]),
    ],
)
def test_marks_that_hold_the_end_of_turn_are_the_targets(name, template, turns, encode):
    tokenizer = family(name, template=template)
    (example,) = encode({"messages": turns}, tokenizer)
    ids, marks = their_marks(tokenizer, turns)
    end = len(example["input_ids"])
    assert example["input_ids"].tolist() == ids[:end]
    assert example["is_target"].tolist() == marks[:end] and not any(marks[end:])


def test_a_marked_line_break_behind_the_end_of_turn_adds_nothing_more(encode):
    """As in TRL's templates for training: the line break may be a target or not."""
    template = MARKED.replace(END, "{{ m.content + '<|im_end|>\n' }}{% endgeneration %}")
    tokenizer = family("ChatML", template=template)
    (example,) = encode({"messages": TALK}, tokenizer)
    found = [text.removesuffix("\n") for text in runs(example, tokenizer)]
    assert found == ["first<|im_end|>", "second<|im_end|>"]


@pytest.mark.parametrize("turns", TALKS[:2], ids=len)
def test_marks_that_end_before_the_end_of_turn_get_it_added(turns, encode):
    tokenizer = family("ChatML", template=CLOSES_EARLY)
    (example,) = encode({"messages": turns}, tokenizer)
    ids, marks = their_marks(tokenizer, turns)
    behind = [n for n in range(1, len(ids)) if marks[n - 1] and not marks[n]]
    assert [ids[n] for n in behind] == [tokenizer.eos_token_id] * (len(turns) // 2)
    end = behind[-1] + 1
    assert example["input_ids"].tolist() == ids[:end]
    assert example["is_target"].tolist() == [marks[n] or n in behind for n in range(end)]


def test_a_character_of_several_tokens_before_the_end_of_marks_is_a_whole_target(encode):
    tokenizer = family("ChatML", template=CLOSES_EARLY)
    (example,) = encode({"messages": [PAIR[0], A | {"content": "a 👍"}, *TALK]}, tokenizer)
    assert runs(example, tokenizer) == ["a 👍<|im_end|>", "first<|im_end|>", "second<|im_end|>"]


def test_weight_0_is_context_in_a_template_with_marks(encode):
    tokenizer = family("ChatML", template=MARKED)
    talk = [TALK[0], TALK[1] | {"weight": 0}, *TALK[2:]]
    (example,) = encode({"messages": talk}, tokenizer)
    assert runs(example, tokenizer) == ["second<|im_end|>"]


def test_marks_give_the_targets_of_growing_prefixes(encode):
    for turns in TALKS:
        marked, grown = (
            encode({"messages": turns}, family("ChatML", template=template))[0]
            for template in (MARKED, CHATML)
        )
        targets = np.flatnonzero(grown["is_target"])
        assert np.flatnonzero(marked["is_target"]).tolist() == targets.tolist()
        assert (
            marked["input_ids"][: len(grown["input_ids"])].tolist() == grown["input_ids"].tolist()
        )


# ---------------------------------------------------------------------------- awkward answers

ANSWERS = [
    "é",
    "中文",
    "👍 yes 👍",
    "👩‍👩‍👧",
    "\u0301accent first",
    "\nline",
    "line\n\n",
    " a ",
    "x\ufeff",
]
ANSWERS += ["<", "<|im_end", "|im_end|>", "assistant\n", "user", "<think>", "{{ x }}", "\\n"]


@pytest.mark.parametrize("name", ["ChatML", "Phi 3", "Mistral"])
def test_answers_that_look_like_what_stands_around_them(name, encode):
    tokenizer, expected = family(name), FAMILIES[name][2]
    for turns in ([U | {"content": x}, A | {"content": x}] for x in ANSWERS):
        (example,) = encode({"messages": turns}, tokenizer)
        assert runs(example, tokenizer) == [expected.format(turns[1]["content"])]
        assert example["is_target"].tolist().index(True) == prompt_length(tokenizer, turns[:1])


def test_special_tokens_spelled_in_a_conversation_do_not_move_the_targets(encode):
    fake = "<|im_end|>\n<|im_start|>assistant\nfake<|im_end|>\n"
    answer = "real<|im_end|>\n<|im_start|>user\nstill the answer"
    talk = [U | {"content": fake}, A | {"content": answer}, U | {"content": fake}, *TALK[1:2]]
    for template in (CHATML, MARKED):
        tokenizer = family("ChatML", template=template)
        (example,) = encode({"messages": talk}, tokenizer)
        assert runs(example, tokenizer) == [answer + "<|im_end|>", "first<|im_end|>"]
        assert example["is_target"].tolist().index(True) == prompt_length(tokenizer, talk[:1])


def test_a_token_across_the_edge_of_an_answer_is_a_target(encode):
    """Merges may join the end of the prompt to the first letter of the answer."""
    tokenizer = make_tokenizer(CHATML, FAMILIES["ChatML"][1], merges=[("Ċ", "a"), ("a", "Ċ")])
    (example,) = encode({"messages": [U | {"content": "b"}, A | {"content": "ab"}]}, tokenizer)
    assert runs(example, tokenizer) == ["\nab<|im_end|>"]


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
talks = st.lists(st.tuples(words, words.filter(str.strip)), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(many=st.lists(talks, min_size=1, max_size=8))
@pytest.mark.parametrize("name", ["ChatML", "Phi 3", "Mistral"])
def test_decoded_targets_are_the_answers_and_their_ends(name, many, encode):
    tokenizer, expected = family(name), FAMILIES[name][2]
    rows = []
    for talk in many:
        turns = [[U | {"content": q}, A | {"content": a}] for q, a in talk]
        rows.append({"messages": sum(turns, [])})
    examples = encode(rows, tokenizer)
    assert len(examples) == len(many)
    for talk, row, example in zip(many, rows, examples):
        assert runs(example, tokenizer) == [expected.format(answer) for _, answer in talk]
        ids = tokenizer.apply_chat_template(row["messages"])["input_ids"]
        assert example["input_ids"].tolist() == ids[: len(example["input_ids"])]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(many=st.lists(talks, min_size=1, max_size=8))
@pytest.mark.parametrize("name", ["Llama 3", "Gemma"])
def test_decoded_targets_are_the_trimmed_answers_and_their_ends(name, many, encode):
    tokenizer, expected = family(name), FAMILIES[name][2]
    turns = [[[U | {"content": q}, A | {"content": a}] for q, a in talk] for talk in many]
    examples = encode([{"messages": sum(talk, [])} for talk in turns], tokenizer)
    for talk, example in zip(many, examples):
        assert runs(example, tokenizer) == [expected.format(a.strip()) for _, a in talk]


# ------------------------------------------------------------------- strings, systems, bos, eos


def test_template_none_joins_the_strings_and_ends_answers_with_eos(encode):
    tokenizer = family("ChatML")
    rows = [{"prompt": "2+2=", "completion": "4"}, {"messages": [S | {"content": "s"}, *TALK]}]
    short, long = encode(rows, tokenizer, "--template", "none")
    assert tokenizer.decode(short["input_ids"]) == "2+2=4<|im_end|>"
    assert runs(short, tokenizer) == ["4<|im_end|>"]
    assert tokenizer.decode(long["input_ids"]) == "sonefirst<|im_end|>twosecond<|im_end|>"
    assert runs(long, tokenizer) == ["first<|im_end|>", "second<|im_end|>"]


@pytest.mark.parametrize("prompt, answer", [("a ", " b"), ("a\n", "\nb\n"), (" ", "b"), ("", "b")])
def test_template_none_keeps_white_space(prompt, answer, encode):
    row = {"prompt": prompt, "completion": answer}
    (example,) = encode(row, tokenizer := family("ChatML"), "--template", "none")
    assert tokenizer.decode(example["input_ids"]) == prompt + answer + "<|im_end|>"
    assert runs(example, tokenizer) == [(answer + "<|im_end|>")[0 if prompt else 1 :]]


def test_the_alpaca_layout_is_used_and_said_where_there_is_no_template(encode, capsys):
    tokenizer = family("Llama 3", template=None)
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Do."}
    (example,) = encode(row, tokenizer)
    expected = "Do.\n\n### Instruction:\nAdd.\n\n1 2\n\n### Response:\n3<|eot|>"
    assert tokenizer.decode(example["input_ids"]) == expected
    assert runs(example, tokenizer) == ["3<|eot|>"]
    assert "Alpaca" in capsys.readouterr().out
    (example,) = encode({"messages": TALK}, family("Llama 3"), "--template", "alpaca")
    assert runs(example, tokenizer) == ["first<|eot|>", "second<|eot|>"]


def test_no_pad_token_takes_eos_says_so_and_keeps_eos_a_target(encode, capsys):
    template, (eos, _, *special), _ = FAMILIES["ChatML"]
    tokenizer = make_tokenizer(template, [eos, None, *special])
    (example,) = encode({"messages": PAIR}, tokenizer)
    assert runs(example, tokenizer) == ["a<|im_end|>"]
    assert "no pad token" in capsys.readouterr().out


@pytest.mark.parametrize("row", [{"text": "t"}, {"messages": PAIR}], ids=["text", "messages"])
def test_a_tokenizer_without_eos_is_refused_by_that_name(row, encode):
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}", [None] * 3)
    with pytest.raises(common.UserError, match="no eos"):
        encode(row, tokenizer)


def test_system_is_added_only_where_there_is_none(encode):
    rows = [
        {"messages": PAIR},
        {"messages": [S | {"content": "Own."}, *PAIR]},
        {"prompt": "q", "completion": "a", "system": "Own."},
        {"text": "raw"},
    ]
    tokenizer = family("ChatML")
    before, after = (
        [tokenizer.decode(example["input_ids"]) for example in encode(rows, tokenizer, *flags)]
        for flags in ((), ("--system", "Be brief."))
    )
    assert after[0] == "<|im_start|>system\nBe brief.<|im_end|>\n" + before[0]
    assert after[1:] == before[1:] and "Own." in after[1] and after[1] == after[2]


@pytest.mark.parametrize("ends", ["", " <|eot|>"], ids=["bos", "bos and eos"])
def test_a_tokenizer_that_adds_bos_adds_it_once(ends, encode):
    for template, rows, flags in (
        (LLAMA3, {"messages": TALK}, ()),
        (MARKED_LLAMA3, {"messages": PAIR}, ()),
        (LLAMA3, {"text": "raw"}, ()),  # nothing else adds it to these
        (LLAMA3, {"messages": TALK}, ("--template", "none")),
    ):
        tokenizer = family("Llama 3", template=template)
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|bos|> $A" + ends, special_tokens=[("<|bos|>", bos), ("<|eot|>", eos)]
        )
        assert tokenizer("a").input_ids[0] == bos
        (example,) = encode(rows, tokenizer, *flags)
        ids = example["input_ids"].tolist()
        assert ids[0] == bos and ids.count(bos) == 1
        if "text" in rows:
            assert tokenizer.decode(ids) == "<|bos|>raw<|eot|>"


# ---------------------------------------------------------------- texts, cuts, dropped rows


def test_a_text_is_all_targets_but_its_first_token_and_ends_with_one_eos(encode):
    tokenizer = bundled()
    first, second = encode([{"text": "raw 中"}, {"text": "ended<|im_end|>"}])
    assert tokenizer.decode(first["input_ids"]) == "raw 中<|im_end|>"
    assert tokenizer.decode(second["input_ids"]) == "ended<|im_end|>"
    for example in (first, second):
        assert example["is_target"].tolist() == [False] + [True] * (len(example["is_target"]) - 1)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=words.filter(str.strip), times=st.integers(1, 20), max_length=st.integers(2, 50))
def test_the_pieces_of_a_long_text_are_its_tokens(text, times, max_length, encode):
    tokenizer = bundled()
    pieces = encode({"text": text * times}, None, "--max-length", max_length)
    whole = tokenizer(text * times).input_ids + [tokenizer.eos_token_id]
    if len(whole) % max_length == 1:
        whole.pop()  # alone in a piece, nothing would predict it
    assert sum((piece["input_ids"].tolist() for piece in pieces), []) == whole
    assert {len(piece["input_ids"]) for piece in list(pieces)[:-1]} <= {max_length}
    for piece in pieces:
        assert piece["is_target"].tolist() == [False] + [True] * (len(piece["input_ids"]) - 1)
    assert len(set(pieces["prompt"][:])) == 1  # the held-out split keeps them together


def test_a_long_conversation_is_cut_at_its_end(encode):
    (whole,), (cut,) = (encode({"messages": TALK}, None, *x) for x in ((), ("--max-length", 40)))
    for column in ("input_ids", "is_target"):
        assert cut[column].tolist() == whole[column][:40].tolist()
    assert (whole["note"], cut["note"]) == ("", "cut") and cut["is_target"].any()


@pytest.mark.parametrize("extra", [0, 1, 2])
def test_a_prompt_as_long_as_max_length_is_dropped_and_a_token_less_keeps_a_target(extra, encode):
    prompt = prompt_length(bundled(), PAIR[:1])
    if not extra:
        with pytest.raises(common.UserError, match="no example with a target"):
            encode({"messages": PAIR}, None, "--max-length", prompt)
    else:
        (example,) = encode({"messages": PAIR}, None, "--max-length", prompt + extra)
        assert example["is_target"].sum() == extra


def test_what_follows_the_last_answer_is_left_out(encode):
    short, long = encode([{"messages": PAIR}, {"messages": [*PAIR, U | {"content": "and?"}]}])
    assert short["input_ids"].tolist() == long["input_ids"].tolist()


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": ""},
        {"text": ""},
        {"text": " \n\t"},
        {"messages": PAIR[:1]},
        {"messages": [S | {"content": "s"}]},
        {"messages": [A | {"content": "an answer to nothing"}]},
        {"messages": [*PAIR, U | {"content": "q"}, A | {"content": ""}]},
        {"prompt": "q" * 500, "completion": "a"},
        {"prompt": "q", "completion": " \n "},
    ],
    ids=lambda row: str(row)[:40],
)
def test_a_row_without_a_target_is_dropped_and_counted(row, encode, capsys):
    (example,) = encode([row, {"messages": PAIR}], None, "--max-length", 100)
    assert runs(example, bundled()) == ["a<|im_end|>"]
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "without a target" in x]
    assert re.findall(r"\b\d+", line) == ["1", "0", "1", "0"]


def test_kept_cut_and_dropped_rows_are_counted(encode, capsys):
    rows = [{"prompt": "q", "completion": answer} for answer in ("a", "long" * 50, "", "b")]
    rows += [{"messages": PAIR[:1]}, {"prompt": "q" * 200, "completion": "a"}, {"text": 5}]
    assert len(encode(rows, None, "--max-length", 64, "--skip-bad-rows")) == 3
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "without a target" in x]
    assert re.findall(r"\b\d+", line) == ["3", "1", "3", "1"]


@pytest.mark.parametrize("name", ["ChatML", "Llama 3", "Phi 3"])
def test_1200_turns_take_seconds(name, encode):
    tokenizer, expected = family(name), FAMILIES[name][2]
    answers = [f"answer {n}" for n in range(600)]
    turns = [[U | {"content": "question"}, A | {"content": answer}] for answer in answers]
    start = time.process_time()
    (example,) = encode({"messages": sum(turns, [])}, tokenizer, "--max-length", 10**6)
    assert time.process_time() - start < 10
    assert runs(example, tokenizer) == [expected.format(answer) for answer in answers]


def test_loss_on_all_makes_every_token_but_the_first_a_target(encode):
    rows = [{"messages": TALK}, {"prompt": "q", "completion": "a"}, {"text": "t"}]
    answers, everything = (encode(rows, None, loss_on=kind) for kind in ("answers", "all"))
    for one, other in zip(answers, everything, strict=True):
        assert one["input_ids"].tolist() == other["input_ids"].tolist()
        assert other["is_target"].tolist() == [False] + [True] * (len(other["input_ids"]) - 1)
    assert not answers[0]["is_target"].all()
    (cut,) = encode({"prompt": "q" * 50, "completion": "a"}, None, "--max-length", 9, loss_on="all")
    assert cut["is_target"].tolist() == [False] + [True] * 8


def test_no_first_token_is_a_target(encode):
    """Nothing predicts it: also where an answer is all there is."""
    rows = [{"messages": TALK}, {"text": "x" * 200}, {"prompt": "", "completion": "abc"}]
    for flags in (("--max-length", 64), ("--max-length", 64, "--template", "none")):
        for example in encode(rows[:2], family("ChatML"), *flags):
            assert not example["is_target"][0]
    (example,) = encode(rows[2], family("ChatML"), "--template", "none")
    assert example["is_target"].tolist() == [False, True, True, True]


def test_a_token_beyond_the_embedding_is_refused(encode):
    tokenizer = make_tokenizer(CHATML, [*FAMILIES["ChatML"][1], "<tag>"])
    size = len(tokenizer) - 1
    (example,) = encode({"messages": PAIR}, tokenizer, vocab_size=size)
    assert max(example["input_ids"]) == size - 1
    rows = [{"messages": PAIR}, {"messages": [U | {"content": "<tag>"}, PAIR[1]]}]
    with pytest.raises(common.UserError, match="rows.jsonl:2: .*no token '<tag>'"):
        encode(rows, tokenizer, vocab_size=size)


def test_more_than_the_model_has_positions_is_refused(encode):
    with pytest.raises(common.UserError, match="--max-length 1000001"):
        encode({"messages": PAIR}, None, "--max-length", 10**6 + 1)


# ----------------------------------------------------------------------------------- like TRL


def trl_rows(tmp_path, model, tokenizer, rows, **options) -> list[tuple[list, list]]:
    """(token ids, marks) of each row as TRL's trainer would learn them."""
    options |= {"report_to": "none", "use_cpu": True, "bf16": False}
    options |= {"gradient_checkpointing": False, "output_dir": str(tmp_path / "trl")}
    data = {"train_dataset": datasets.Dataset.from_list(rows), "processing_class": tokenizer}
    model = transformers.AutoModelForCausalLM.from_pretrained(model)
    trainer = trl.SFTTrainer(model, trl.SFTConfig(**options), **data)
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    rows = zip(batch["input_ids"].tolist(), (batch["labels"] != -100).tolist(), lengths)
    return [(ids[:length], marks[:length]) for ids, marks, length in rows]


def ours(examples) -> list[tuple[list, list]]:
    return [(row["input_ids"].tolist(), row["is_target"].tolist()) for row in examples]


STRINGS = [
    {"prompt": "2+2=", "completion": "4"},
    {"prompt": "Was heißt 中?", "completion": " Mitte 👍"},
    {"prompt": "Say <|im_end|>:", "completion": "<|im_end|>, and go on"},
    {"prompt": "long " * 20, "completion": "longer " * 20},
]


@pytest.mark.parametrize("max_length", [1024, 130])
def test_strings_without_a_template_are_those_of_trl(max_length, tmp_path, random_model, encode):
    tokenizer = family("ChatML", template=None)
    theirs = trl_rows(tmp_path, random_model, tokenizer, STRINGS, max_length=max_length)
    flags = ("--template", "none", "--max-length", max_length)
    assert ours(encode(STRINGS, tokenizer, *flags)) == theirs


@pytest.mark.parametrize("name", ["Llama 3", "Mistral"])
def test_prompts_and_answers_as_messages_are_those_of_trl(name, tmp_path, random_model, encode):
    pairs = [(row["prompt"], row["completion"]) for row in STRINGS]
    rows = [{"prompt": [U | {"content": q}], "completion": [A | {"content": a}]} for q, a in pairs]
    rows += [{"prompt": TALK[:3], "completion": TALK[3:]}]
    theirs = trl_rows(tmp_path, random_model, family(name), rows, max_length=1024)
    found = ours(encode(rows, family(name)))
    assert found[:-1] == theirs[:-1]
    # with turns before the prompt's last question, the answers among them are targets, too
    (ids, marks), (their_ids, their_marks) = found[-1], theirs[-1]
    assert ids == their_ids and sum(marks) > sum(their_marks)
    assert marks[their_marks.index(True) :] == their_marks[their_marks.index(True) :]


@pytest.mark.parametrize("max_length", [1024, 48])
def test_conversations_with_marks_are_those_of_trl(max_length, tmp_path, random_model, encode):
    tokenizer = family("ChatML", template=MARKED)
    rows = [{"messages": turns} for turns in TALKS]
    options = {"assistant_only_loss": True, "max_length": max_length}
    theirs = trl_rows(tmp_path, random_model, tokenizer, rows, **options)
    found = ours(encode(rows, tokenizer, "--max-length", max_length))
    for (ids, marks), (their_ids, their_marks) in zip(found, theirs, strict=True):
        end = len(ids)  # ours end with the last target
        assert ids == their_ids[:end]
        assert marks == their_marks[:end] and not any(their_marks[end:])


def test_texts_are_those_of_trl(tmp_path, random_model, encode):
    rows = [{"text": row["prompt"]} for row in STRINGS]
    theirs = trl_rows(tmp_path, random_model, bundled(), rows, max_length=1024)
    assert [ids for ids, _ in ours(encode(rows))] == [ids for ids, _ in theirs]


# -------------------------------------------------------------------------- held-out examples


def split(sources, *flags) -> tuple[list[str], list[str]]:
    """The texts of training and held-out examples."""
    args = arguments("--data", *sources, *flags)
    tokenizer = common.load_tokenizer(args)
    tables = [table["input_ids"] if table else [] for table in common.load_data(args, tokenizer)]
    return tuple([tokenizer.decode(ids) for ids in table] for table in tables)


def prompt_of(text: str) -> str:
    return re.search(r"user\n(.*?)<\|im_end\|>", text, re.S)[1]


def test_the_held_out_split_never_separates_equal_prompts(tmp_path):
    """Also across files and layouts, and pieces of one text."""
    draw = random.Random(0)
    rows = [{"prompt": f"question {draw.randrange(60)}", "completion": f"a{i}"} for i in range(300)]
    other = [{"messages": [U | {"content": x["prompt"]}, A | {"content": "b"}]} for x in rows[:100]]
    files = [write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", other)]
    flags = ("--eval-data", "0.2")
    train, held_out = split(files, *flags)
    prompts = [Counter(map(prompt_of, part)) for part in (train, held_out)]
    assert not prompts[0].keys() & prompts[1].keys() and len(train) + len(held_out) == 400
    assert 80 <= len(held_out) < 80 + max(prompts[1].values())  # the share, in whole prompts
    assert split(files, *flags) == (train, held_out)
    assert split(files, *flags, "--seed", 1)[1] != held_out
    long = [{"text": f"{i} " * 100} for i in range(10)]
    train, held_out = split([write_rows(tmp_path / "c.jsonl", long)], "--max-length", 64, *flags)
    firsts = [{text.split()[1] for text in part} for part in (train, held_out)]
    assert not firsts[0] & firsts[1] and len(firsts[1]) == 2


def test_a_prompt_is_all_that_stands_before_the_first_answer(tmp_path):
    """The same question in another context is another prompt; the same in another layout is not."""
    alpaca = {"instruction": "Add.", "input": "1 2", "output": "3"}
    rows = [alpaca, {"prompt": "Add.\n\n1 2", "completion": "three"}]
    rows += [
        {"prompt": "Add.", "completion": "4"},
        {"prompt": "Add.", "answer": "4", "system": "s"},
    ]
    rows += [{"prompt": "Subtract.", "completion": "4", "system": "s"}]
    args = arguments("--data", write_rows(tmp_path / "rows.jsonl", rows), "--eval-data", "0")
    prompts = common.load_data(args, common.load_tokenizer(args))[0]["prompt"][:].tolist()
    assert prompts[0] == prompts[1] and len(set(prompts)) == 4


@pytest.mark.parametrize("share, count", [("0", 0), ("0.01", 1), (".25", 3), ("0.95", 9)])
def test_a_share_of_the_data_is_held_out_in_full(share, count, tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(10)]
    train, held_out = split([write_rows(tmp_path / "a.jsonl", rows)], "--eval-data", share)
    assert len(held_out) == count
    assert sorted(map(prompt_of, train + held_out)) == [f"q{i}" for i in range(10)]


def test_one_prompt_alone_is_never_held_out(tmp_path):
    rows = [{"prompt": "q", "completion": f"a{i}"} for i in range(10)]
    train, held_out = split([write_rows(tmp_path / "a.jsonl", rows)], "--eval-data", "0.5")
    assert len(train) == 10 and not held_out


def test_eval_data_is_held_out_whole_and_training_keeps_all_its_rows(tmp_path):
    files = [
        write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(count)])
        for name, count in (("train", 10), ("more", 3), ("eval", 4), ("test", 2))
    ]
    train, held_out = split([f"{files[0]}:2", files[1]], "--eval-data", *files[2:])
    expected = [f"train {i}<|im_end|>" for i in range(10)] + [
        f"more {i}<|im_end|>" for i in range(3)
    ]
    assert train == expected
    expected = [f"eval {i}<|im_end|>" for i in range(4)] + [f"test {i}<|im_end|>" for i in range(2)]
    assert held_out == expected


def test_eval_data_that_is_missing_or_bad_is_refused(tmp_path):
    good = write_rows(tmp_path / "a.jsonl", [{"text": "a"}])
    bad = write_rows(tmp_path / "b.jsonl", [{"text": 5}])
    with pytest.raises(common.UserError, match=r"b.jsonl:1: "):
        split([good], "--eval-data", bad)
    with pytest.raises(common.UserError, match=r"nowhere.jsonl"):
        split([good], "--eval-data", tmp_path / "nowhere.jsonl")

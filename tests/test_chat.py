"""--chat against transformers and PEFT: lines of a pipe, several turns, a real terminal."""

import importlib
import io
import json
import os
import pty
import shlex
import subprocess
import sys
import time

import peft
import pytest
import torch
import transformers
from conftest import ROOT, TINY, run_script, write_rows

import common

LETTERS = "abcdefghijklmnopqrst"
ROWS = [{"prompt": f"Say {c}", "completion": c * 3} for c in LETTERS]
PAIRS = [{"prompt": f"Say {c}", "chosen": c * 3, "rejected": "no"} for c in LETTERS]
SIX = "--max-steps 6 --batch-size 8 --lr 0.01 --samples 0 --eval-data 0.1 --max-length 128".split()
PROMPTS = ["Say b", "Repeat blue four times.", "Spell crane."]
TOKENS = 12


@pytest.fixture
def train(tmp_path, capsys):
    """script, more flags -> (the output folder, the command at the end of the run)"""

    def run(script, *more, output="run"):
        pairs = script in ("dpo", "orpo", "reward_model")
        data = write_rows(tmp_path / "rows.jsonl", PAIRS if pairs else ROWS)
        folder = tmp_path / output
        start = ["--model", TINY, "--data", data, "--output", str(folder)]
        importlib.import_module(script).main([*start, *SIX, *more])
        lines = capsys.readouterr().out.splitlines()
        return folder, [line for line in lines if line.endswith("--chat")]

    return run


@pytest.fixture
def chat(monkeypatch, capsys):
    """script, flags, lines -> rows of the answers"""

    def run(script, flags, lines=PROMPTS) -> list[dict]:
        flags = ["--dtype", "float32", *flags, "--chat-tokens", str(TOKENS)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
            patch.setattr(sys, "argv", [f"{script}.py", "--chat"])
            importlib.import_module(script).main(flags)
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def completions(rows) -> list[str]:
    assert [row["prompt"] for row in rows] == PROMPTS
    return [row["completion"] for row in rows]


def base_model(folder=TINY):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def expected(model, turns: list[dict], template=None, steps=TOKENS) -> str:
    """What transformers' own greedy generation says after these turns, alone in its batch."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = template or tokenizer.chat_template
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template(turns, **options)
    kind = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    out = model.eval().generate(**inputs, **kind)[0]
    return tokenizer.decode(out[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


# -------------------------------------------------------------------------------------- a pipe

TUNED = {
    "lora": [],
    "dora": [],
    "ia3": ["--lr", "0.1"],
    "adalora": ["--lr", "0.1"],
    "sft": ["--lora-rank", "4"],
    "dpo": ["--lora-rank", "4"],
    "prefix_tuning": ["--virtual-tokens", "5"],
    "prompt_tuning": ["--virtual-tokens", "5"],
}


@pytest.mark.parametrize("script", TUNED)
def test_the_printed_command_answers_as_peft_does(script, train, chat):
    folder, (command,) = train(script, *TUNED[script])
    flags = ["--model", TINY, "--adapter", str(folder), "--chat"]
    assert shlex.split(command) == ["python", sys.argv[0], *flags]
    found = completions(chat(script, flags))
    base = base_model()
    before = [expected(base, [user(prompt)]) for prompt in PROMPTS]
    model = peft.PeftModel.from_pretrained(base, folder)
    assert found == [expected(model, [user(prompt)]) for prompt in PROMPTS] != before


def test_every_lora_script_answers_with_the_adapter(train, chat):
    """ppo.py has layers for several roles, and the policy's is on."""
    flags = ["--model", TINY, "--adapter", str(train("lora")[0]), "--chat"]
    answers = [chat(script, flags) for script in ("lora", "dpo", "ppo", "grpo")]
    assert answers[0] == answers[1] == answers[2] == answers[3]
    assert chat("qlora", flags) == chat("orpo", [*flags, "--load-in-4bit"]) != answers[0]
    base = chat("lora", ["--model", TINY, "--chat"])
    assert completions(base) == [expected(base_model(), [user(p)]) for p in PROMPTS]


def test_a_full_model_answers_as_transformers_does(train, chat):
    folder, (command,) = train("full_ft")
    assert shlex.split(command)[2:] == ["--model", str(folder), "--chat"]
    model = base_model(folder)
    right = [expected(model, [user(prompt)]) for prompt in PROMPTS]
    assert completions(chat("full_ft", shlex.split(command)[2:])) == right
    assert completions(chat("sft", shlex.split(command)[2:])) == right


def test_adapter_answers_as_its_own_forward_pass_does(train, chat, monkeypatch):
    """PEFT has no such method: greedy decoding without a cache, one full pass a token."""
    import adapter

    folder, (command,) = train("adapter")
    flags = shlex.split(command)[2:]
    found = completions(chat("adapter", flags))
    seen, tokenizer = [], transformers.AutoTokenizer.from_pretrained(TINY)
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "train", seen.append)
        adapter.main(flags)
    model = base_model()
    before = [expected(model, [user(prompt)]) for prompt in PROMPTS]
    adapter.add_adapters(model, seen[0], torch.device("cpu"))
    answers = []
    for prompt in PROMPTS:
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        ids = tokenizer.apply_chat_template([user(prompt)], **options)["input_ids"]
        start = ids.shape[1]
        while ids.shape[1] < start + TOKENS and ids[0, -1] != tokenizer.eos_token_id:
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        answers.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    assert found == answers != before


def test_system_template_and_batches(train, chat):
    """Flags of training that change a prompt are in the command. 40 lines are two batches."""
    folder, (command,) = train(
        "lora", "--system", "Be brief, don't ramble.", "--template", "alpaca"
    )
    flags = shlex.split(command)[2:]
    assert flags[4:] == ["--system", "Be brief, don't ramble.", "--chat"]
    lines = [f"Say {a} and {b}" for a in LETTERS for b in "xy"]
    rows = chat("lora", flags, [lines[0], "", "  ", *lines[1:]])
    assert [row["prompt"] for row in rows] == lines
    model = peft.PeftModel.from_pretrained(base_model(), folder)
    system = {"role": "system", "content": "Be brief, don't ramble."}
    for n in (0, 31, 32, 39):
        right = expected(model, [system, user(lines[n])], common.ALPACA)
        assert rows[n]["completion"] == right


def test_sampling_is_seeded(chat):
    flags = ["--model", TINY, "--chat"]
    greedy, *sampled = (
        completions(chat("lora", [*flags, *more.split()]))
        for more in ("", *(f"--chat-temperature 2 --seed {seed}" for seed in (0, 0, 1)))
    )
    assert sampled[0] == sampled[1] and len({*map(tuple, (greedy, sampled[0], sampled[2]))}) == 3


def test_answers_alone_are_on_stdout():
    flags = ["--model", TINY, "--chat", "--template", "alpaca", "--chat-tokens", 5]
    done = run_script("lora.py", *flags, input="Größe?\nSay b\n")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and [row["prompt"] for row in rows] == ["Größe?", "Say b"]
    assert "Größe" in done.stdout and "parameters" in done.stderr


# ---------------------------------------------------------------------------------- a terminal


def converse(monkeypatch, capsys, flags, *lines) -> list[str]:
    """What is streamed after each of the lines, which may be exceptions."""
    answers, left = [], list(lines)

    def read(prompt):
        answers.append(capsys.readouterr().out)
        line = left.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(sys, "argv", ["lora.py", "--chat"])
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("builtins.input", read)
    main = importlib.import_module("lora").main
    main(["--model", TINY, "--chat", "--dtype", "float32", "--chat-tokens", str(TOKENS), *flags])
    assert not left
    return answers[1:]


@pytest.mark.parametrize("end", [EOFError(), KeyboardInterrupt()])
def test_turns_have_a_history_until_an_empty_line(end, monkeypatch, capsys):
    model, system = base_model(), {"role": "system", "content": "Shout."}
    first = expected(model, [system, user("Say b")])
    turns = [system, user("Say b"), {"role": "assistant", "content": first}, user("Again.")]
    second, alone = expected(model, turns), expected(model, [system, user("Again.")])
    assert second != alone
    lines = "Say b", "Again.", " ", "Again.", end
    found = converse(monkeypatch, capsys, ["--system", "Shout."], *lines)
    assert found == [f"{first}\n", f"{second}\n", "", f"{alone}\n"]


def test_a_terminal():
    """A real one, as a user types: an answer, and Ctrl-C in the next one, without a traceback."""
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "lora.py"), "--model", TINY, "--chat"]
    command += ["--chat-tokens", str(TOKENS), "--dtype", "float32"]
    options = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
    setup = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    setup += "os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", setup, *command], **options)
    os.close(theirs)
    shown = b""

    def read_until(end: bytes) -> None:
        nonlocal shown
        while end and not shown.endswith(end):
            shown += os.read(ours, 1000)

    try:
        read_until(b"> ")
        os.write(ours, b"Say b\n")
        read_until(b"b\r\n")
        read_until(b"> ")
        time.sleep(1)  # readline may not wait for input yet when the prompt is there
        os.write(ours, b"\x03")
        assert process.wait(timeout=60) == 0
        shown += os.read(ours, 1000)
    finally:
        process.kill()
        os.close(ours)
    text = shown.decode()
    assert expected(base_model(), [user("Say b")]) in text.replace("\r", "")
    assert "Traceback" not in text and "Ctrl-D" in text


def test_a_reward_model_has_no_chat(train, capsys):
    assert train("reward_model", "--lora-rank", "4")[1] == []
    with pytest.raises(SystemExit):
        importlib.import_module("reward_model").main(["--model", TINY, "--chat"])
    assert "unrecognized arguments: --chat" in capsys.readouterr().err


def test_chat_needs_a_model():
    with pytest.raises(common.UserError, match="--chat needs --model"):
        importlib.import_module("lora").main(["--chat"])

"""README.md, README.zh.md and the scripts' docstrings: links, equal translations, commands that
run, metrics and flags explained.

Every command is run in this process, shrunk: one step on the bundled model, with rows of the right
kind in place of files, and a folder trained for one step in place of runs/.... Only parsed:
tests/benchmark.py, tests/compare_methods.py and tests/gpu.py, which would take minutes. Neither:
pip, pytest, and other projects' programs.
"""

import argparse
import ast
import importlib
import io
import re
import runpy
import shlex
import sys
from collections import Counter

import pytest
from conftest import ROOT, TINY, read_metrics, write_rows

PREFERENCES = ["reward_model", "dpo", "orpo"]
SCRIPTS = ["lora", "full_ft", "sft", "qlora", "dora", "adapter", "prefix_tuning", "prompt_tuning"]
SCRIPTS += ["ia3", "adalora", *PREFERENCES, "ppo", "grpo"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "tests" / "RESULTS.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh.md").read_text(encoding="utf-8")
DOC = {
    script: ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8")))
    for script in SCRIPTS
}
# flags in the texts that are of other programs
OTHERS = """--nproc-per-node --nnodes --rdzv-endpoint --rdzv-backend --shutdown-timeout
--enable-lora
--lora-modules --model_args --tasks --include_path --apply_chat_template --device --against --seeds
--outtype --base""".split()


# -------------------------------------------------------------------------- what is in a text


def blocks(text: str) -> list[str]:
    return re.findall(r"^```\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def sections(text: str) -> list[str]:
    """Without code blocks, cut at the headings and at the table's markers."""
    text = re.sub(r"^```\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.split(r"^(?:#+ .*|<!-- .* -->)$", text, flags=re.MULTILINE)


def spans(text: str) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", text)


def tables(text: str) -> list[list[list[str]]]:
    """Tables of rows of cells."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()] for table in found]


def numbers(text: str) -> Counter:
    return Counter(re.findall(r"(?<![\w.])\d[\d.,:-]*(?:e-?\d+)?(?<![.,:-])", text))


def without_comments(block: str) -> str:
    return re.sub(r"(?:^|(?<=\s))#.*$", "", block, flags=re.MULTILINE)


def lines_with(start: str, text: str) -> list[str]:
    return re.findall(f"^{start}", text, flags=re.MULTILINE)


# ------------------------------------------------------------------------ links and languages


@pytest.mark.parametrize("text", [README, CHINESE], ids=["README.md", "README.zh.md"])
def test_every_relative_link_resolves(text):
    headings = {"tests/RESULTS.md": RESULTS, "": text}
    for link in links(text):
        path, _, heading = link.partition("#")
        if "://" not in link:
            assert not path or (ROOT / path).exists()
            titles = re.findall("^#+ (.*)", headings.get(path, ""), flags=re.MULTILINE)
            assert not heading or heading in [x.lower().replace(" ", "-") for x in titles]


def test_the_chinese_readme_has_the_same_code_links_and_markers():
    ours, theirs = ([*map(without_comments, blocks(text))] for text in (CHINESE, README))
    assert ours == theirs
    ours, theirs = (
        [link for link in links(text) if link not in ("README.md", "README.zh.md")]
        for text in (CHINESE, README)
    )
    assert ours == theirs
    assert lines_with("#+", CHINESE) == lines_with("#+", README)


def test_the_chinese_readme_has_the_same_tables():
    assert len(tables(CHINESE)) == len(tables(README)) > 3
    for ours, theirs in zip(tables(CHINESE), tables(README)):
        assert [len(row) for row in ours] == [len(row) for row in theirs]
        for our_row, their_row in zip(ours, theirs):
            for our_cell, their_cell in zip(our_row, their_row):
                assert numbers(our_cell) == numbers(their_cell)
                assert Counter(spans(our_cell)) == Counter(spans(their_cell))


def test_the_chinese_prose_has_the_same_numbers_and_code():
    for ours, theirs in zip(sections(CHINESE), sections(README), strict=True):
        assert Counter(spans(ours)) == Counter(spans(theirs))
        assert numbers(ours) == numbers(theirs)


# ----------------------------------------------------------------------------------- commands


def as_command(line: str) -> str | None:
    """`[torchrun ...|python] SCRIPT.py ...` -> `SCRIPT.py ...`; None if it is no command."""
    line = re.sub(r"\s+#.*", "", line).strip().removeprefix("$ ")
    name = re.fullmatch(r"(?:python |torchrun .*?)?([\w/]+)\.py(?: (.*))?", line)
    if not name or not (ROOT / f"{name[1]}.py").exists() or name[1].startswith("common"):
        return None
    if not name[2] and not line.startswith(("python", "torchrun")):
        return None  # a file's name
    return f"{name[1]}.py {name[2] or ''}".strip()


def commands_in(text: str) -> list[str]:
    """Commands in lines of code blocks and docstrings, and between backticks. $G and $P are what
    the text said last that they are."""
    found, short = [], {}
    pieces = r"^```\n.*?^```$|`[^`]+`(?: is `[^`]+`)?|^    [^\n]*$"
    for piece in re.findall(pieces, text, flags=re.DOTALL | re.MULTILINE):
        if definition := re.fullmatch(r"`(\$\w)` is `([^`]+)`", piece):
            short[definition[1]] = " ".join(definition[2].split())
            continue
        whole = piece.strip("`")
        lines = whole.splitlines() if piece.startswith(("```", "    ")) else [whole]
        for line in lines:
            parts = [as_command(" ".join(part.split())) for part in line.split("&&")]
            for command in filter(None, parts):
                for name in re.findall(r"\$\w", command):
                    command = command.replace(name, short[name])
                found.append(command)
    return found


COMMANDS = sorted(
    {command for text in [README, RESULTS, *DOC.values()] for command in commands_in(text)}
)


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """rows(script): a file of rows of the kind that a script reads."""
    folder, letters = tmp_path_factory.mktemp("rows"), "abcdefghijklmnopqrst"
    pairs = [{"prompt": f"Say {c}", "chosen": c, "rejected": "no"} for c in letters]
    chat = [{"prompt": f"Say {c}", "completion": c} for c in letters]
    pairs = write_rows(folder / "pairs.jsonl", pairs)
    chat = write_rows(folder / "chat.jsonl", chat)
    return lambda script: pairs if script in PREFERENCES else chat


def small_flags(script: str) -> list[str]:
    """One short step."""
    flags = "--max-steps 1 --samples 0 --batch-size 2 --max-length 128"
    if script in ("ppo", "grpo"):
        flags += " --rollout-size 2 --response-length 4 --reward "
        flags += str(ROOT / "examples" / "rewards.py") + ":lowercase"
        flags += " --group-size 2" * (script == "grpo")
    return f"{flags} --eval-data 0.1".split()


@pytest.fixture(scope="session")
def trained(tmp_path_factory, rows):
    """trained(script, *flags): the folder of a run of one step, made once."""
    made = {}

    def folder(script: str, *flags: str) -> str:
        if (script, *flags) not in made:
            made[script, *flags] = output = str(tmp_path_factory.mktemp(script))
            arguments = ["--model", TINY, "--data", rows(script), *small_flags(script), *flags]
            importlib.import_module(script).main([*arguments, "--output", output])
        return made[script, *flags]

    return folder


def stand_in(script: str, flag: str, word: str, rows, trained) -> str:
    """What is there in place of a value that a command gives to a flag."""
    name = word.removeprefix("runs/")
    if flag == "--model":
        return trained("reward_model") if name == "reward" else TINY
    if flag in ("--data", "--eval-data"):
        return rows(script) + "".join(re.findall(r":[\d.]+$", word))
    if flag == "--reward" and ".py" in word:
        word = word.replace("FILE.py:FUNCTION", "examples/rewards.py:kindness")
        return word.replace("examples", str(ROOT / "examples"))
    if flag == "--reward" or flag == "--adapter" and name == "reward-lora":
        return trained("reward_model", "--lora-rank", "4")
    if flag == "--adapter":
        is_stage = name.endswith("-lora")
        return trained(name.removesuffix("-lora"), *["--lora-rank", "4"] * is_stage)
    return word


def shrunk(command: str, rows, trained) -> tuple[str, list[str]]:
    """A command of the README -> its script, and arguments that run in a second."""
    file, *words = shlex.split(command)
    script, arguments, flag = file.removesuffix(".py"), [], None
    for word in words:
        flag = word if word.startswith("--") else flag
        arguments.append(word if word == flag else stand_in(script, flag, word, rows, trained))
    missing = {}  # of a flag and its value, out of a sentence
    if words:
        missing = {"--model": TINY, "--data": rows(script)}
    if "--merge-only" in words:
        missing["--adapter"] = trained(script)
    for flag, value in missing.items():
        arguments += [flag, value] * (flag not in words)
    small = small_flags(script)
    return script, [*arguments, *small]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "/" not in c.split()[0]])
def test_the_command_runs(command, rows, trained, tmp_path, monkeypatch):
    script, arguments = shrunk(command, rows, trained)
    output = tmp_path / "run"
    if "--help" in arguments:
        with pytest.raises(SystemExit):
            importlib.import_module(script).main(["--help"])
        return
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say a\n"))  # of --chat
    importlib.import_module(script).main([*arguments, "--output", str(output)])
    if {"--inspect", "--chat"} & {*arguments}:
        assert not output.exists()
    elif "--merge-only" in arguments:
        assert (output / "model.safetensors").exists()
    else:
        assert read_metrics(output)[-1]["done"]


def parser_of(run, monkeypatch) -> argparse.ArgumentParser:
    """The parser that run() would parse its arguments with, once they are parsed."""
    caught = []

    def parse_args(self, args=None, namespace=None):
        caught.append(self)
        _, unknown = self.parse_known_args(args, namespace)
        assert not unknown
        raise StopIteration

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(StopIteration):
        run()
    return caught[0]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("tests/")])
def test_the_tests_own_command_is_understood(command, monkeypatch):
    file, *words = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [file, *words])
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    parser_of(lambda: runpy.run_path(str(ROOT / file), run_name="__main__"), monkeypatch)


def test_make_rows_writes_the_rows_of_pretraining(tmp_path, monkeypatch):
    assert "examples/make_rows.py pretrain.jsonl" in COMMANDS
    monkeypatch.setattr(sys, "argv", ["make_rows.py", str(tmp_path / "pretrain.jsonl")])
    runpy.run_path(str(ROOT / "examples" / "make_rows.py"), run_name="__main__")
    assert (tmp_path / "pretrain.jsonl").stat().st_size > 1e6


# -------------------------------------------------------------------------- metrics and flags


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_metric_is_explained(script, trained):
    """In the table of RESULTS.md or, of ppo.py and grpo.py, at their top. `step` needs no word."""
    more = ["--samples", "1"]
    lines = read_metrics(trained(script, *more))
    lines = [line for line in lines if "run" not in line and "done" not in line]
    written = {name for line in lines for name in line} - {"step"}
    assert {"loss", "lr"} <= written
    table = RESULTS.partition("## Metrics")[2].partition("\n## ")[0]
    explained = {name for row in tables(table)[0] for name in spans(row[0])}
    if script in ("ppo", "grpo"):
        metrics = DOC[script].partition("\nWhat to watch")[2].partition("\nMeasured")[0]
        explained |= set(re.findall(r"\w+", metrics))
    unknown = {name for name in written if not {name, name.removeprefix("eval_")} & explained}
    assert not unknown


@pytest.fixture(scope="module")
def flags():
    """The flags of every script, with their help texts."""

    found = {}
    for script in SCRIPTS:
        main = importlib.import_module(script).main
        with pytest.MonkeyPatch.context() as patch:
            actions = parser_of(lambda main=main: main([]), patch)._actions
        found[script] = {flag: a.help for a in actions for flag in a.option_strings}
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_help_text(script, flags):
    nothing = (None, "", argparse.SUPPRESS)
    assert len(flags[script]) > 20
    assert not [flag for flag, text in flags[script].items() if text in nothing]


def named_flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", text)) - set(OTHERS)


def test_every_flag_that_the_readme_names_is_one(flags):
    text = re.sub("`python tests/[^`]*`", "", README + RESULTS)  # with flags of their own
    assert named_flags(text) <= {flag for script in SCRIPTS for flag in flags[script]}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_that_a_docstring_names_is_one(script, flags):
    assert named_flags(DOC[script]) <= flags[script].keys()

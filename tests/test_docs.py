"""README.md, README.zh.md and the scripts' docstrings: links, equal translations, commands that run, metrics and flags explained.

Every command is run in this process, shrunk: one step of one row, on the random model (a script without flags: on the bundled one,
with its demonstration's data), with rows of the right kind in place of files, and a folder trained for one step in place of runs/....
Not run, but parsed: tests/benchmark.py and tests/compare_methods.py, which would take minutes.
Neither: pip, pytest, and other projects' programs.
"""

import argparse
import ast
import importlib
import re
import runpy
import shlex
import sys
from collections import Counter

import bitsandbytes
import conftest
import pytest
from conftest import ROOT, read_metrics, write_rows

import common

ADAPTERS = ["lora", "qlora", "dora", "adapter", "prefix_tuning", "prompt_tuning"]
PREFERENCES = ["reward_model", "dpo", "orpo"]
SCRIPTS = ["full_ft", *ADAPTERS, "sft", *PREFERENCES, "ppo"]
README, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
DOC = {script: ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))) for script in SCRIPTS}
OTHERS = {  # flags in the texts that belong to other programs
    "--nproc-per-node", "--nnodes", "--rdzv-endpoint", "--enable-lora", "--lora-modules", "--model_args", "--tasks", "--against", "--steps", "--seeds",
    "--methods", "--shape", "--repeats", "--recompute", "--lora", "--profile", "--growth", "--layers", "--skip",
    "--rows", "--document", "--length", "--flags", "--processes", "--shutdown-timeout",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ what stands in a text


def blocks(text: str) -> list[str]:
    return re.findall(r"^```\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def sections(text: str) -> list[str]:
    """Without code blocks, cut at the headings and at the table's markers."""
    return re.split(r"^(?:#+ .*|<!-- .* -->)$", re.sub(r"^```\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), flags=re.MULTILINE)


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


# -------------------------------------------------------------------------------------------------- links and languages


@pytest.mark.parametrize("text", [README, CHINESE], ids=["README.md", "README.zh.md"])
def test_every_relative_link_resolves(text):
    relative = [link.partition("#")[0] for link in links(text) if "://" not in link]
    assert relative and not [link for link in relative if link and not (ROOT / link).exists()]


def test_the_chinese_readme_has_the_same_code_links_and_markers():
    assert [without_comments(block) for block in blocks(CHINESE)] == [without_comments(block) for block in blocks(README)]
    assert [link for link in links(CHINESE) if link != "README.md"] == [link for link in links(README) if link != "README.zh.md"]
    assert re.findall(r"^<!--.*-->$", CHINESE, flags=re.MULTILINE) == re.findall(r"^<!--.*-->$", README, flags=re.MULTILINE)
    assert re.findall(r"^#+", CHINESE, flags=re.MULTILINE) == re.findall(r"^#+", README, flags=re.MULTILINE)


def test_the_chinese_readme_has_the_same_tables():
    assert len(tables(CHINESE)) == len(tables(README)) > 8
    for ours, theirs in zip(tables(CHINESE), tables(README)):
        assert [len(row) for row in ours] == [len(row) for row in theirs]
        for our_row, their_row in zip(ours, theirs):
            for our_cell, their_cell in zip(our_row, their_row):
                assert (numbers(our_cell), Counter(spans(our_cell))) == (numbers(their_cell), Counter(spans(their_cell)))
    measured = r"<!-- (\w+) -->\n(.*?)<!-- end -->"
    assert re.findall(measured, CHINESE, flags=re.DOTALL) == re.findall(measured, README, flags=re.DOTALL)


def test_the_chinese_prose_has_the_same_numbers_and_code():
    for ours, theirs in zip(sections(CHINESE), sections(README), strict=True):
        assert Counter(spans(ours)) == Counter(spans(theirs))
        assert numbers(ours) == numbers(theirs)


# ------------------------------------------------------------------------------------------------------------ commands


def commands_in(text: str) -> list[str]:
    """`[torchrun ...|python] SCRIPT.py ...`: lines of code blocks and docstrings, and what stands between backticks. $G and $P
    are what the text said last that they are."""
    found, short = [], {}
    for piece in re.findall(r"^```\n.*?^```$|`[^`]+`(?: is `[^`]+`)?|^    [^\n]*$", text, flags=re.DOTALL | re.MULTILINE):
        if definition := re.fullmatch(r"`(\$\w)` is `([^`]+)`", piece):
            short[definition[1]] = " ".join(definition[2].split())
            continue
        for line in piece.strip("`").splitlines() if piece.startswith(("```", "    ")) else [" ".join(piece.strip("`").split())]:
            for part in line.split("&&"):
                command = re.sub(r"\s+#.*", "", part).strip().removeprefix("$ ")
                name = re.fullmatch(r"(?:python |torchrun .*?)?([\w/]+)\.py(?: (.*))?", command)
                is_command = name and (ROOT / f"{name[1]}.py").exists() and (name[2] or command.startswith(("python", "torchrun")))
                if is_command and name[1] != "common":
                    found.append(re.sub(r"\$\w", lambda found_name: short[found_name[0]], f"{name[1]}.py {name[2] or ''}".strip()))
    return found


COMMANDS = sorted({command for text in [README, *DOC.values()] for command in commands_in(text)})


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """A file of rows of the kind that a script reads."""
    folder, letters = tmp_path_factory.mktemp("rows"), "abcdefghijklmnopqrst"
    pairs = write_rows(folder / "pairs.jsonl", [{"prompt": f"Say {c}", "chosen": c, "rejected": "no"} for c in letters])
    chat = write_rows(folder / "chat.jsonl", [{"prompt": f"Say {c}", "completion": c} for c in letters])
    return lambda script: pairs if script in PREFERENCES else chat


SMALL = ["--max-steps", "1", "--samples", "0", "--batch-size", "1", "--max-length", "128", "--eval-fraction", "0.1"]
SMALL_PPO = ["--max-steps", "1", "--samples", "0", "--batch-size", "2", "--grad-accum", "1", "--minibatches", "1", "--ppo-epochs", "1",
             "--rollout-batch-size", "2", "--response-length", "4", "--max-length", "128", "--eval-fraction", "0.1"]  # fmt: skip


def small_flags(script: str) -> list[str]:
    return SMALL_PPO if script == "ppo" else SMALL + ["--exact-match", "0"] * (script != "reward_model")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, rows):
    """trained(script, *flags): the folder of a run of one step on the random model, made once."""
    made = {}

    def folder(script: str, *flags: str) -> str:
        if (script, *flags) not in made:
            made[script, *flags] = output = str(tmp_path_factory.mktemp(script))
            model = [] if "--model" in flags else conftest.RANDOM
            small = small_flags(script)
            importlib.import_module(script).main([*model, "--data", rows(script), *small, *flags, "--output", output])
        return made[script, *flags]

    return folder


def shrunk(command: str, rows, trained) -> tuple[str, list[str]]:
    """A command of the README -> its script, and arguments that run in a second."""
    file, *words = shlex.split(command)
    script, arguments, flag = file.removesuffix(".py"), [], None
    for word in words:
        if word.startswith("--"):
            flag = word
        elif flag == "--model":
            word = trained("reward_model") if word == "runs/reward" else "random"
        elif flag in ("--data", "--eval-data", "--score"):
            word = rows("reward_model" if flag == "--score" else script) + "".join(re.findall(r":[\d.]+$", word))
        elif flag == "--reward" and "/reward" in word and ".py" not in word or flag == "--adapter" and word == "runs/reward-lora":
            word = trained("reward_model", "--lora-rank", "4")
        elif flag == "--adapter" and word.endswith("-lora"):
            word = trained(word.removeprefix("runs/").removesuffix("-lora"), "--lora-rank", "4")
        elif flag == "--reward":
            word = word.replace("FILE.py:FUNCTION", "examples/rewards.py:kindness").replace("examples", str(ROOT / "examples"))
        elif flag == "--adapter":
            word = trained(word.removeprefix("runs/"))
        arguments.append(word)
    if "--score" in words and "--model" not in words:
        arguments += ["--model", trained("reward_model")]
    if words and "--data" not in words:
        arguments += ["--data", rows(script)]
    if words and "--model" not in arguments:  # a flag and its value, out of a sentence
        arguments += conftest.RANDOM
    small = small_flags(script) + ["--eval-fraction", "0.01"] * (not words)
    if "--max-steps 0" in command:
        del small[:2]
    return script, [*arguments, *small]


@pytest.mark.parametrize("command", [command for command in COMMANDS if "/" not in command.split()[0]])
def test_the_command_runs(command, rows, trained, tmp_path, monkeypatch):
    script, arguments = shrunk(command, rows, trained)
    if "--estimate" in arguments:
        monkeypatch.setattr(bitsandbytes.functional, "name2qmap", {})  # a cache of tensors, which have no data here
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(script).main(arguments)
        assert stop.value.code == 0
        return
    if "--model" not in arguments:  # the demonstration, its data and its defaults
        monkeypatch.setattr(common.Parser, "parse_args", conftest.parse_args)
    importlib.import_module(script).main([*arguments, "--output", str(tmp_path / "run")])
    if "--inspect" in arguments:
        assert not (tmp_path / "run").exists()
    elif "--score" in arguments:
        assert (tmp_path / "run" / "scores.jsonl").exists()
    else:
        assert read_metrics(tmp_path / "run")[-1]["done"]
        assert (tmp_path / "run" / "merged").exists() == ("--merge" in arguments)


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


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("tests/")])
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


def test_what_a_run_leaves_answers_through_peft_and_transformers(trained, monkeypatch, capsys):
    codes = re.findall(r'^python -c "(.*)"$', README, flags=re.MULTILINE)
    assert len(codes) == 2
    folder = trained("lora", "--model", str(ROOT / "examples" / "tiny"), "--merge")
    for code in codes:
        exec(code.replace("runs/lora-merged", folder).replace("runs/lora", folder).replace("max_new_tokens=50", "max_new_tokens=3"), {})
        assert "assistant" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- metrics and flags


@pytest.mark.parametrize("script", ["lora", "full_ft", "sft", *PREFERENCES, "ppo"])
def test_every_metric_is_explained(script, trained):
    """In the README's table or, of ppo.py, at its top. `step` needs no word."""
    more = [] if script == "ppo" else ["--log-every", "1"] + ["--exact-match", "1"] * (script != "reward_model")
    lines = [line for line in read_metrics(trained(script, *more)) if "run" not in line and "done" not in line]
    written = {name for line in lines for name in line} - {"step"}
    assert {"loss", "lr"} <= written
    table = README.partition("### The metrics")[2].partition("\n## ")[0]
    explained = {name for row in tables(table)[0] for name in spans(row[0])}
    if script == "ppo":
        explained |= set(re.findall(r"\w+", DOC["ppo"].partition("\nMetrics")[2].partition("\nMeasured")[0]))
    assert not {name for name in written if name not in explained and name.removeprefix("eval_") not in explained}


@pytest.fixture(scope="module")
def flags():
    """The flags of every script, with their help texts."""
    found = {}
    for script in SCRIPTS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common.Parser, "parse_args", lambda self, args: argparse.ArgumentParser.parse_args(self, args))
            parser = parser_of(lambda: importlib.import_module(script).main([]), patch)
        found[script] = {flag: action.help for action in parser._actions for flag in action.option_strings}
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_help_text(script, flags):
    assert len(flags[script]) > 20 and not [flag for flag, text in flags[script].items() if text in (None, "", argparse.SUPPRESS)]


def named_flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", text))


def test_every_flag_that_the_readme_names_is_one(flags):
    assert named_flags(README) - OTHERS <= {flag for script in SCRIPTS for flag in flags[script]}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_that_a_docstring_names_is_one(script, flags):
    assert named_flags(DOC[script]) - OTHERS <= flags[script].keys()

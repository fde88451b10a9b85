"""Copies in the scripts equal their originals, and no script imports another."""

import ast
import re

import pytest
from conftest import ROOT

SCRIPTS = sorted(path for path in ROOT.glob("*.py") if not path.name.startswith("common"))
BLOCK = r"# --- {} ---\n(.*?)# --- end ---"
COPIES = [
    (path, *match.groups())
    for path in SCRIPTS
    for match in re.finditer(
        BLOCK.format(r"copied from (\w+\.py): (.+?)"), path.read_text("utf-8"), re.DOTALL
    )
]
NAMES = [f"{path.name}: {title}" for path, _, title, _ in COPIES]


@pytest.mark.parametrize("path, origin, title, copy", COPIES, ids=NAMES)
def test_a_copy_equals_its_original(path, origin, title, copy):
    text = (ROOT / origin).read_text("utf-8")
    originals = re.findall(BLOCK.format(re.escape(title)), text, re.DOTALL)
    assert len(originals) == 1, f"{origin} has {len(originals)} blocks marked '{title}'"
    assert copy == originals[0]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_mark_begins_or_ends_a_block(path):
    """None is misspelled, so that no copy escapes the test above."""
    opened = None
    for line in map(str.strip, path.read_text("utf-8").splitlines()):
        if line.startswith(("# -", "#-")) or "copied from" in line:
            mark = re.fullmatch(r"# --- (\S.*\S) ---", line)
            assert mark and (mark[1] == "end") == (opened is not None), f"after {opened}: {line}"
            opened = None if mark[1] == "end" else mark[1]
    assert opened is None, f"{opened} has no end"


def test_copies_are_found():
    assert {path.name for path, *_ in COPIES} >= {"full_ft.py", "sft.py", "orpo.py"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_imports_common_and_no_other_script(path):
    names = {path.stem for path in SCRIPTS} | {"common"}
    imported = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported & names == {"common"}

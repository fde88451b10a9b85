"""What stands in more than one script is held identical, and no script imports another."""

import ast
import re

import pytest
from conftest import ROOT

SCRIPTS = sorted(path for path in ROOT.glob("*.py") if path.name != "common.py")
COPIES = [
    (path, *match.groups())
    for path in SCRIPTS
    for match in re.finditer(r"# --- copied from (\w+\.py): (.+?) ---\n(.*?)# --- end ---", path.read_text(encoding="utf-8"), re.DOTALL)
]


@pytest.mark.parametrize("path, origin, title, text", COPIES, ids=[f"{path.name}: {title}" for path, _, title, _ in COPIES])
def test_a_copy_equals_its_original(path, origin, title, text):
    original = re.search(rf"# --- {re.escape(title)} ---\n(.*?)# --- end ---", (ROOT / origin).read_text(encoding="utf-8"), re.DOTALL)
    assert original, f"{origin} has no block marked '{title}'"
    assert original.group(1) == text


def test_copies_are_found():
    assert len(COPIES) >= 1


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_imports_common_and_no_other_script(path):
    names = {path.stem for path in SCRIPTS}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "common" in imported and not imported & names

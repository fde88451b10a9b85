"""tests/benchmark.py runs and prints its tables; what the figures are worth depends on the machine."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT


def table(*flags) -> list[list[str]]:
    """The cells of the printed rows, without the head."""
    command = [sys.executable, str(ROOT / "tests" / "benchmark.py"), "--shape", "tiny", "--steps", "4", *flags]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[2:]]


@pytest.mark.slow
def test_repeated_runs_of_both_sides_give_positive_figures():
    (row,) = table("--methods", "reward", "--lora", "--repeats", "2")
    assert row[0] == "reward" and all(float(cell.replace(",", "").split()[0]) > 0 for cell in row[1:4])


@pytest.mark.slow
def test_packing_against_padding():
    (row,) = table("--against", "padding", "--repeats", "1")
    assert row[0] == "lora" and float(row[5]) > float(row[4])  # padding takes memory


@pytest.mark.slow
def test_the_shares_of_a_step_add_up():
    (row,) = table("--profile")
    assert all(re.fullmatch(r"[\d.]+%", cell) for cell in row[2:]) and abs(sum(float(cell[:-1]) for cell in row[2:]) - 100) < 0.5

"""Reward functions for ppo.py and grpo.py. `--reward FILE.py:FUNCTION` calls such a function once
per rollout.

prompts      the text of each prompt as the chat template writes it, without special tokens
answers      the text of each answer, without special tokens. An answer may be cut off: see
             --response-length
references   the data's answer to each prompt, or None
->           one number per answer. Higher is better. An error, too few or too many numbers, nan or
             inf stop the run.
"""

import re


def lowercase(prompts: list[str], answers: list[str], references: list[str | None]) -> list[float]:
    """The share of an answer's characters that are letters from a to z. Even a model with random
    weights can learn this."""
    letters = [sum("a" <= character <= "z" for character in answer) for answer in answers]
    return [count / max(1, len(answer)) for count, answer in zip(letters, answers)]


KIND = """good great lovely perfect wonderful amazing love loved best five
很好 很棒 完美 喜欢 五星""".split()
UNKIND = """bad awful terrible poor horrible hate hated worst never
很差 很糟 不好 讨厌 一星""".split()


def kindness(prompts: list[str], answers: list[str], references: list[str | None]) -> list[float]:
    """(kind words - unkind words) / (kind words + unkind words): from -1 to 1, and 0 for an answer
    without such words."""

    def count(words: list[str], answer: str) -> int:
        patterns = [rf"\b{word}\b" if word.isascii() else word for word in words]
        return sum(len(re.findall(pattern, answer.lower())) for pattern in patterns)

    totals = [(count(KIND, answer), count(UNKIND, answer)) for answer in answers]
    return [(kind - unkind) / max(1, kind + unkind) for kind, unkind in totals]


def exact_match(
    prompts: list[str], answers: list[str], references: list[str | None]
) -> list[float]:
    """1 if the last numbers of answer and reference are equal (GSM8K: "#### 18"), or if texts
    without numbers are equal up to case and white space. Else 0."""

    def essence(text: str) -> str:
        numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
        return f"{float(numbers[-1]):g}" if numbers else " ".join(text.lower().split())

    if None in references:
        raise ValueError("exact_match needs rows with an answer to compare with")
    return [
        float(essence(answer) == essence(reference))
        for answer, reference in zip(answers, references)
    ]

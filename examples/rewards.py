"""Rewards for ppo.py: rules and verifiers. `--reward FILE.py:FUNCTION` calls a function of this
form once for each rollout.

prompts      the text of each prompt's turns, with an empty line between them
answers      what the policy answered, without special tokens; one it did not end itself is cut off
             where it had to stop
references   the answer that came with the prompt in the data, or None
->           a number for each answer: higher is better. An error, another number of numbers, nan or
             inf stop the run.
"""

import re


def lowercase(prompts: list[str], answers: list[str], references: list[str | None]) -> list[float]:
    """The share of an answer's characters that are the letters a to z. Something that even a random
    model can learn."""
    letters = [sum("a" <= character <= "z" for character in answer) for answer in answers]
    return [count / max(1, len(answer)) for count, answer in zip(letters, answers)]


KIND = """good great lovely perfect wonderful amazing love loved best five
很好 很棒 完美 喜欢 五星""".split()
UNKIND = """bad awful terrible poor horrible hate hated worst never
很差 很糟 不好 讨厌 一星""".split()


def kindness(prompts: list[str], answers: list[str], references: list[str | None]) -> list[float]:
    """From -1, all the words of judgement in an answer are unkind, to 1, all are kind; 0 without
    any."""

    def count(words: list[str], answer: str) -> int:
        patterns = [rf"\b{word}\b" if word.isascii() else word for word in words]
        return sum(len(re.findall(pattern, answer.lower())) for pattern in patterns)

    totals = [(count(KIND, answer), count(UNKIND, answer)) for answer in answers]
    return [(kind - unkind) / max(1, kind + unkind) for kind, unkind in totals]


def exact_match(
    prompts: list[str], answers: list[str], references: list[str | None]
) -> list[float]:
    """1 where the answer's last number is the reference's (GSM8K's are "#### 18"), or, of
    references without one, where the texts are equal up to case and white space; else 0."""

    def essence(text: str) -> str:
        numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
        return f"{float(numbers[-1]):g}" if numbers else " ".join(text.lower().split())

    if None in references:
        raise ValueError("exact_match needs rows with an answer to compare with")
    return [
        float(essence(answer) == essence(reference))
        for answer, reference in zip(answers, references)
    ]

"""Write the rows that `examples/tiny` was pretrained on, and the data of the demonstrations.

    python examples/make_rows.py                  # task.jsonl, format.jsonl, pairs.jsonl, here
    python examples/make_rows.py pretrain.jsonl   # the pretraining rows, not in the repository

    pretrain.jsonl   60,000 rows: thirteen skills on made-up words and small numbers, in English
                     and Chinese
    task.jsonl       600 rows of a new skill: write a word backwards and in capitals
    format.jsonl     1,200 rows of known skills, with the answers in a new format: `[X]`
    pairs.jsonl      600 rows with two reviews of the same thing: the kinder one is chosen

Each file has its own seed, so it is always the same. The model did not learn one skill, looking up
(a quarter of its answers are right), so format.jsonl leaves it out.
"""

import json
import sys
from itertools import combinations
from pathlib import Path
from random import Random

THINGS = """soup 汤|tea 茶|bread 面包|cake 蛋糕|hotel 酒店|room 房间|book 书|film 电影|song 歌
game 游戏|phone 手机|coat 外套|chair 椅子|lamp 台灯|garden 花园|park 公园|train 火车|boat 船
car 汽车|shop 商店|school 学校|beach 海滩|museum 博物馆|coffee 咖啡|rice 米饭|shoe 鞋|bed 床
bag 包|clock 钟|bike 自行车|pen 笔|door 门|river 河|city 城市|house 房子|fish 鱼|apple 苹果
bus 公交车|zoo 动物园|bridge 桥"""
THINGS = [thing.split() for thing in THINGS.replace("\n", "|").split("|")]
CHARACTERS = "天地人山水火风云日月花草鸟鱼牛羊马书画茶"

PROMPTS = {  # the prompts of each skill; {x} is its input
    "repeat": ["Repeat: {x}", "Say {x}", "重复：{x}"],
    "reverse": ["Reverse: {x}", "Write {x} backwards", "倒着写：{x}"],
    "upper": ["Upper case: {x}", "Write {x} in capitals", "改成大写：{x}"],
    "sort": ["Sort the letters: {x}", "Letters of {x} in order", "字母排序：{x}"],
    "first": ["First letter: {x}", "What does {x} begin with?", "第一个字母：{x}"],
    "last": ["Last letter: {x}", "What does {x} end with?", "最后一个字母：{x}"],
    "count": ["Count the letters: {x}", "How long is {x}?", "几个字母：{x}"],
    "vowels": ["Vowels: {x}", "Which vowels are in {x}?", "元音：{x}"],
    "add": ["Add: {x}", "What is {x}?", "计算：{x}"],
    "larger": ["Larger number: {x}", "Which is more: {x}?", "哪个大：{x}"],
    "look up": ["Look up: {x}", "Find: {x}", "查找：{x}"],
    "translate": ["Translate: {x}", "翻译：{x}"],
    "review": ["Review the {x}.", "How was the {x}?", "Write a review of the {x}."]
    + ["评价一下{x}。", "{x}怎么样？"],
}
SHARES = dict.fromkeys(["reverse", "sort", "look up"], 3)  # the other skills: 1
SHARES |= dict.fromkeys(["repeat", "upper", "add", "larger", "translate", "review"], 2)
NEW_TASK = ["Backwards in capitals: {x}", "Turn {x} around, in capitals", "倒着大写：{x}"]
ON_WORDS = {
    "repeat": lambda word: word,
    "reverse": lambda word: word[::-1],
    "upper": str.upper,
    "sort": lambda word: "".join(sorted(word)),
    "first": lambda word: word[0],
    "last": lambda word: word[-1],
    "count": lambda word: str(len(word)),
    "vowels": lambda word: "".join(letter for letter in word if letter in "aeiou"),
}
REVIEWS = {  # from best to worst: adjectives and last sentences, in English and Chinese
    "good": (
        ["great", "lovely", "perfect", "wonderful", "amazing"],
        ["I loved it.", "Five stars.", "I want more."],
        ["很好", "很棒", "完美"],
        ["我很喜欢。", "五星。"],
    ),
    "fair": (
        ["fine", "plain", "normal", "average", "okay"],
        ["Nothing special.", "Three stars.", "Maybe again."],
        ["还行", "一般", "普通"],
        ["可以吧。", "三星。"],
    ),
    "bad": (
        ["awful", "bad", "terrible", "poor", "horrible"],
        ["I hated it.", "One star.", "Never again."],
        ["很差", "很糟", "不好"],
        ["我很讨厌。", "一星。"],
    ),
}


def word(random: Random) -> str:
    """A made-up word of 4 to 6 letters: tavo, bimer, kolasu."""
    letters = "".join(random.choice("bdfgklmnprstvz") + random.choice("aeiou") for _ in range(3))
    return letters[: random.randint(4, 6)]


def review(random: Random, thing: list[str], chinese: bool, feeling: str) -> str:
    adjectives, endings, *in_chinese = REVIEWS[feeling]
    if chinese:
        adjectives, endings = in_chinese
        return f"{thing[1]}{random.choice(adjectives)}，{random.choice(endings)}"
    return f"The {thing[0]} was {random.choice(adjectives)}. {random.choice(endings)}"


def known_row(random: Random, skill: str) -> dict:
    """A row of one of the pretrained skills."""
    ask = random.choice(PROMPTS[skill])
    chinese = not ask.isascii()
    if skill == "review":
        thing = random.choice(THINGS)
        x, answer = thing[chinese], review(random, thing, chinese, random.choice(list(REVIEWS)))
    elif skill == "translate":
        x, answer = random.sample(random.choice(THINGS), 2)
    elif skill == "add":
        a, b = random.randint(0, 20), random.randint(0, 20)
        x, answer = f"{a} + {b}", a + b
    elif skill == "larger":
        a, b = random.sample(range(100), 2)
        x, answer = f"{a}, {b}", max(a, b)
    elif skill == "look up":
        names = random.sample("abcdefghijklmnopqrstuvwxyz", 3)
        values = random.sample(range(10, 100), 3)
        n = random.randrange(3)
        table = ", ".join(f"{name} {value}" for name, value in zip(names, values))
        x, answer = f"{table}; {names[n]}", values[n]
    else:
        x = word(random)
        if chinese and skill in ("repeat", "reverse") and random.random() < 0.5:
            x = "".join(random.choice(CHARACTERS) for _ in range(random.randint(2, 4)))
        answer = ON_WORDS[skill](x)
    return {"prompt": ask.format(x=x), "completion": str(answer)}


def pretrain_rows(random: Random):
    skills = random.choices(list(PROMPTS), [SHARES.get(skill, 1) for skill in PROMPTS], k=60_000)
    return [known_row(random, skill) for skill in skills]


def task_rows(random: Random):
    # no word twice, so that held-out words are new
    words = list(dict.fromkeys(word(random) for _ in range(700)))[:600]
    return [
        {"prompt": random.choice(NEW_TASK).format(x=x), "completion": x[::-1].upper()}
        for x in words
    ]


def format_rows(random: Random):
    skills = [skill for skill in PROMPTS if skill not in ("review", "look up")]
    rows = {}  # by prompt, so that none comes twice
    while len(rows) < 1200:
        row = known_row(random, random.choice(skills))
        rows[row["prompt"]] = row | {"completion": f"[{row['completion']}]"}
    return list(rows.values())


def pair_rows(random: Random):
    rows = []
    for thing in THINGS:
        for ask in PROMPTS["review"]:
            chinese = not ask.isascii()
            for feelings in combinations(REVIEWS, 2):  # the better one first
                chosen, rejected = (review(random, thing, chinese, feeling) for feeling in feelings)
                row = {"prompt": ask.format(x=thing[chinese])}
                rows.append(row | {"chosen": chosen, "rejected": rejected})
    random.shuffle(rows)
    rows.sort(key=lambda row: not row["prompt"].isascii())  # English first: demonstrations show it
    return rows


def write(path: Path, rows: list[dict]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    print(f"{path}: {len(rows):,} rows, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write(Path(sys.argv[1]), pretrain_rows(Random("pretrain")))
    else:
        for name, make in {"task": task_rows, "format": format_rows, "pairs": pair_rows}.items():
            write(Path(__file__).with_name(f"{name}.jsonl"), make(Random(name)))

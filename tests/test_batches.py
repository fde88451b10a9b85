"""The examples of every step, their forward passes, and losses that do not depend on either."""

import itertools

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import TINY, read_metrics, write_rows

import common
import full_ft
import lora
import sft

CPU = torch.device("cpu")


def make_args(*flags):
    parser = common.make_parser("", output="unused", lr=1e-3)
    return parser.parse_args(["--model", TINY, "--data", "a.jsonl", *map(str, flags)])


def table(*sizes):
    """A training set with that many rows of each source of --data."""
    source = np.repeat(np.arange(len(sizes)), sizes)
    return datasets.Dataset.from_dict({"source": source}).with_format("numpy")


# ------------------------------------------------------------------------------- steps


def test_steps_are_a_function_of_data_seed_and_batch_size(monkeypatch):
    def plan(*flags):
        return common.plan_steps(table(37, 11), make_args("--data", "a", "b:0.5", *flags))

    steps = plan()
    assert plan() == steps
    assert plan("--micro-batch-tokens", 64, "--no-packing", "--lr", 1, "--eval-every", 3) == steps
    monkeypatch.setattr(common, "RANKS", 8)
    monkeypatch.setattr(common, "RANK", 3)
    assert plan() == steps
    assert plan("--seed", 1) != steps
    assert plan("--batch-size", 8) != steps


@pytest.mark.parametrize("rows, epochs, size", [(10, 3, 4), (10, 3, 5), (7, 2, 16), (16, 1, 16)])
def test_steps_run_across_epochs_and_only_the_last_is_short(rows, epochs, size):
    flags = ["--epochs", epochs, "--batch-size", size]
    steps = common.plan_steps(table(rows), make_args(*flags))
    assert {len(step) for step in steps[:-1]} <= {size} and 0 < len(steps[-1]) <= size
    order = list(itertools.chain(*steps))
    assert len(order) == rows * epochs
    parts = [order[n : n + rows] for n in range(0, len(order), rows)]
    assert all(sorted(part) == list(range(rows)) for part in parts)
    assert len(set(map(tuple, parts))) == epochs  # each in an order of its own


@pytest.mark.parametrize("epochs, examples", [(0.5, 5), (1.3, 13), (0, 0)])
def test_an_epoch_may_be_a_part(epochs, examples):
    flags = ["--epochs", epochs, "--batch-size", 4]
    steps = common.plan_steps(table(10), make_args(*flags))
    assert sum(map(len, steps)) == examples


def test_max_steps_overrides_epochs():
    for count in (0, 1, 9):
        flags = ["--max-steps", count, "--epochs", 1, "--batch-size", 16]
        steps = common.plan_steps(table(10), make_args(*flags))
        assert list(map(len, steps)) == [16] * count
    order = list(itertools.chain(*steps))
    assert sorted(order[:140]) == sorted([*range(10)] * 14)


@pytest.mark.parametrize("weight, uses", [
    (2, [2, 2, 2, 2]), (0.5, [0.5, 0.5, 0.5, 0.5]), (2.5, [2.5, 2.5, 2.5, 2.5]), (1, [1, 1, 1, 1])
])  # fmt: skip
def test_a_weight_is_how_often_each_row_is_used_per_epoch(weight, uses):
    """2: every row twice. 0.5: half of them, in the next epoch the other half. 2.5: all twice and
    half of them again, in the next epoch the other half."""
    rows = 12
    args = make_args("--data", f"a:{weight}", "--epochs", len(uses), "--batch-size", 5)
    order = list(itertools.chain(*common.plan_steps(table(rows), args)))
    assert len(order) == sum(uses) * rows
    ends = np.cumsum([0, *(int(use * rows) for use in uses)])
    counts = np.array([np.bincount(order[a:b], minlength=rows) for a, b in zip(ends, ends[1:])])
    assert set(counts.flat) <= {int(weight), int(np.ceil(weight))}
    assert (counts[0] + counts[1] == 2 * weight).all() and (counts[2:].sum(0) == 2 * weight).all()


def test_sources_are_mixed_by_their_weights():
    """An epoch has the weighted number of rows, in one random order."""
    flags = ["--data", "a:2", "b", "c:0.25", "--epochs", 2, "--batch-size", 10]
    order = list(itertools.chain(*common.plan_steps(table(10, 30, 40), make_args(*flags))))
    assert len(order) == 2 * (20 + 30 + 10)
    for epoch in (order[:60], order[60:]):
        counts = np.bincount(epoch, minlength=80)
        assert (counts[:10] == 2).all() and (counts[10:40] == 1).all()
        assert counts[40:].max() == 1 and counts[40:].sum() == 10
        sources = np.digitize(epoch, [10, 40])
        assert (np.bincount(sources[:30], minlength=3) > 0).all()
        assert (np.diff(sources) != 0).sum() > 20
    assert not set(order[:60]) & set(order[60:]) & set(range(40, 80))


def test_a_weight_changes_the_order_of_no_other_source():
    """Which half of a source is used does not depend on the other sources."""

    def used(data, *sizes):
        flags = ["--data", *data, "--epochs", 1, "--batch-size", 4]
        order = itertools.chain(*common.plan_steps(table(*sizes), make_args(*flags)))
        return {n for n in order if n < 10}

    assert used(["a:0.5", "b"], 10, 20) == used(["a:0.5", "b:3"], 10, 20) == used(["a:0.5"], 10)


def test_an_epoch_without_an_example_is_refused():
    with pytest.raises(common.UserError, match="less than one example"):
        common.plan_steps(table(5, 3), make_args("--data", "a:0.1", "b:0.1"))


# ------------------------------------------------------------------------------ passes

LENGTHS = [
    [5],
    [100] * 16,
    [45] * 9,
    [200] * 7,
    [2500] * 5,
    [1000] + [3] * 15,
    [40, 39, 38, 21, 20, 19, 18, 3],
    np.random.default_rng(0).integers(1, 80, 33).tolist(),
    np.random.default_rng(1).integers(60, 400, 16).tolist(),
    (np.random.default_rng(2).pareto(1.2, 64) * 20 + 2).astype(int).tolist(),
]


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("limit", [64, 300, 4096])
@pytest.mark.parametrize("flags", [[], ["--no-packing"]])
@pytest.mark.parametrize("lengths", LENGTHS, ids=range(len(LENGTHS)))
def test_passes(lengths, flags, limit, ranks, monkeypatch):
    """Every example once, whole; at most --micro-batch-tokens, padding included, or one example;
    the same number of passes on every rank."""
    monkeypatch.setattr(common, "RANKS", ranks)
    args = make_args("--micro-batch-tokens", limit, *flags)
    passes = common.plan_passes(lengths, args)
    assert sorted(itertools.chain(*passes)) == list(range(len(lengths)))
    assert len(passes) % ranks == 0
    sizes = [[lengths[n] for n in members] for members in passes]
    tokens = [len(x) * max(x, default=0) if flags else sum(x) for x in sizes]
    assert all(count <= limit or len(x) == 1 for count, x in zip(tokens, sizes))
    if flags:
        # neighbours in length: sorted by their longest, the passes do not overlap
        full = sorted((x for x in sizes if x), key=lambda x: (max(x), min(x)))
        assert all(max(a) <= min(b) for a, b in zip(full, full[1:]))
        # and no two of them would fit into one
        assert all((len(a) + len(b)) * max(b) > limit for a, b in zip(full, full[1:]))
    else:
        # even: the last example that a pass got went to the emptiest
        assert max(tokens) - min(tokens) <= max(lengths)
        # in as few as hold them: with one fewer on each rank, passes would be half full at least
        assert len(passes) < 2 * sum(lengths) / limit + ranks or len(passes) == ranks


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_more_passes_than_examples(ranks, monkeypatch):
    """Examples longer than --micro-batch-tokens are alone; a pass without one is wasted."""
    monkeypatch.setattr(common, "RANKS", ranks)
    passes = common.plan_passes([8000] * 15, make_args("--micro-batch-tokens", 4096))
    assert len(passes) == 15 + 15 % ranks


def test_passes_hold_equal_numbers_of_tokens():
    """20 examples of 90 to 110 tokens in passes of 512: four passes of five."""
    lengths = np.random.default_rng(0).integers(90, 111, 20).tolist()
    passes = common.plan_passes(lengths, make_args("--micro-batch-tokens", 530))
    tokens = [sum(lengths[n] for n in members) for members in passes]
    assert len(passes) == 4 and max(tokens) - min(tokens) < 10


def test_padding_is_by_neighbours():
    lengths = [10, 200, 11, 190, 12, 195, 9, 205]
    args = make_args("--micro-batch-tokens", 900, "--no-packing")
    passes = common.plan_passes(lengths, args)
    assert sorted(map(sorted, passes)) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def columns(lengths, seed=0) -> dict:
    """Columns of examples, as load_data gives them."""
    rng = np.random.default_rng(seed)
    examples = {"input_ids": [], "is_target": []}
    for length in lengths:
        marks = rng.random(length) < 0.4
        marks[0], marks[-1] = False, length > 1
        examples["input_ids"].append(rng.integers(0, 250, length))
        examples["is_target"].append(marks)
    return examples


def pairs(batch) -> list[tuple]:
    """(tokens of the document up to a position, the target predicted there), sorted."""
    found, ids = [], batch["input_ids"].flatten().tolist()
    width = batch["input_ids"].shape[1]
    for position, target in zip(batch["target_index"].tolist(), batch["targets"].tolist()):
        if "attention_mask" in batch:
            start = position // width * width
        else:
            start = position - batch["position_ids"][0, position].item()
        found.append((*ids[start : position + 1], target))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("flags", [[], ["--no-packing"]])
@pytest.mark.parametrize("lengths", [[17], [9, 30, 2, 14, 25, 8, 8], [70, 5, 5, 60]])
def test_all_ranks_together_have_every_target_once(lengths, flags, ranks, monkeypatch):
    """Equally many passes on each; where examples run out, a pass without targets."""
    examples, args = columns(lengths), make_args("--micro-batch-tokens", 40, *flags)
    monkeypatch.setattr(common, "RANKS", ranks)
    found, counts = [], []
    for rank in range(ranks):
        monkeypatch.setattr(common, "RANK", rank)
        batches = common.micro_batches(examples, args, CPU)
        counts.append(len(batches))
        for batch in batches:
            found += pairs(batch)
            assert batch["input_ids"].numel() > 0
    expected = [
        (*map(int, ids[: n + 1]),)
        for ids, marks in zip(examples["input_ids"], examples["is_target"])
        for n in np.flatnonzero(marks)
    ]
    assert sorted(found) == sorted(expected) and len(set(counts)) == 1
    assert len(found) == common.count_targets(examples)


def test_a_rank_without_an_example_runs_with_zero_gradients(random_model, monkeypatch):
    """Or FSDP2 would wait for it for ever."""
    args = common.make_parser("", output="unused", lr=1e-3).parse_args(["--model", random_model])
    model = common.load_model(args, torch.float32, CPU)
    monkeypatch.setattr(common, "RANKS", 2)
    monkeypatch.setattr(common, "RANK", 1)
    (batch,) = common.micro_batches(columns([17]), args, CPU)
    nll = -model.target_logps(**batch).sum()
    nll.backward()
    assert nll == 0 and len(batch["targets"]) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# ----------------------------------------------------------------------------- collate


def naive(examples) -> dict:
    """What collate documents of a packed pass, token by token."""
    out = {"ids": [], "positions": [], "index": [], "targets": [], "lengths": [], "reads": []}
    for example in examples:
        stretches = example.get("stretches", [len(example["input_ids"])])
        first, begin, n = len(out["lengths"]), len(out["ids"]), 0
        for number, length in enumerate(stretches):
            out["lengths"].append(length)
            out["reads"].append(None if number == 0 else first)
            for i in range(length):
                at = len(out["ids"])
                if example["is_target"][n]:
                    before = at - 1 if i or number == 0 else begin + stretches[0] - 1
                    out["index"].append(before)
                    out["targets"].append(int(example["input_ids"][n]))
                out["ids"].append(int(example["input_ids"][n]))
                out["positions"].append(i if number == 0 else stretches[0] + i)
                n += 1
    return out


def examples_of(seed: int) -> list[dict]:
    rng, examples = np.random.default_rng(seed), []
    for _ in range(rng.integers(1, 6)):
        stretches = rng.integers(1, 9, rng.integers(1, 5)).tolist()
        ids = rng.integers(0, 250, sum(stretches))
        marks = rng.random(len(ids)) < 0.5
        marks[0] = False
        example = {"input_ids": ids, "is_target": marks}
        examples.append(example | {"stretches": stretches} if rng.random() < 0.6 else example)
    return examples


@pytest.mark.parametrize("seed", range(20))
def test_a_packed_pass_is_what_a_loop_makes(seed):
    examples = examples_of(seed)
    batch, expected = common.collate(examples, False, CPU), naive(examples)
    assert batch["input_ids"].tolist() == [expected["ids"]]
    assert batch["position_ids"].tolist() == [expected["positions"]]
    assert batch["target_index"].tolist() == expected["index"]
    assert batch["targets"].tolist() == expected["targets"]
    assert "attention_mask" not in batch
    stretches = batch["stretches"]
    assert list(stretches.lengths) == expected["lengths"]
    ends = np.cumsum([0, *expected["lengths"]])
    keys = []
    for n, read in enumerate(expected["reads"]):
        prompt = [] if read is None else range(ends[read], ends[read + 1])
        keys.append([*prompt, *range(ends[n], ends[n + 1])])
    assert list(stretches.key_lengths) == list(map(len, keys))
    assert stretches.query_ends.tolist() == ends.tolist()
    assert stretches.key_ends.tolist() == np.cumsum([0, *map(len, keys)]).tolist()
    assert stretches.query_ends.dtype == stretches.key_ends.dtype == torch.int32
    assert stretches.longest == (max(expected["lengths"]), max(map(len, keys)))
    if all(read is None for read in expected["reads"]):
        assert stretches.key_index is None
    else:
        assert stretches.key_index.tolist() == list(itertools.chain(*keys))


@pytest.mark.parametrize("seed", range(6))
def test_a_padded_pass_is_what_a_loop_makes(seed):
    examples = [
        {key: x for key, x in example.items() if key != "stretches"}
        for example in examples_of(seed)
    ]
    batch, width = common.collate(examples, True, CPU), max(len(e["input_ids"]) for e in examples)
    index, targets = [], []
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == example["input_ids"].tolist()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (width - length)
        for n in np.flatnonzero(example["is_target"]):
            index.append(row * width + n - 1)
            targets.append(int(example["input_ids"][n]))
    assert batch["target_index"].tolist() == index and batch["targets"].tolist() == targets
    assert batch["input_ids"].shape == (len(examples), width)
    assert not {"stretches", "position_ids"} & batch.keys()


# ------------------------------------------------------------------------- the promise

WORDS = "the cat sat on a mat and 好 looked at 7 small grey mice".split()


def chats() -> list[dict]:
    """Conversations of one to three answers, 30 to 400 tokens."""
    rng, rows = np.random.default_rng(0), []

    def text(limit):
        return " ".join(rng.choice(WORDS, rng.integers(1, limit)))

    for _ in range(14):
        roles = ["user", "assistant"] * rng.integers(1, 4)
        rows.append({"messages": [{"role": r, "content": text(14)} for r in roles]})
    return rows + [{"text": text(40)}, {"prompt": text(60), "completion": "."}]


SIZES = [(64, []), (300, []), (4096, []), (64, ["--no-packing"]), (300, ["--no-packing"])]
SIZES += [(4096, ["--no-packing"])]
# small rates: Adam turns noise in gradients near zero into steps of the size of the rate
PROMISES = [
    (lora, ["--lr", "1e-4"]),
    (full_ft, ["--lr", "1e-5", "--l2-sp", "0.1"]),
    (sft, ["--lr", "1e-5", "--loss-on", "all"]),
    (sft, ["--lr", "1e-4", "--lora-rank", "4"]),
]


@pytest.mark.parametrize(
    "script, flags", PROMISES, ids=["lora", "full_ft", "sft", "sft --lora-rank"]
)
def test_losses_do_not_depend_on_the_passes(script, flags, random_model, tmp_path):
    """Any --micro-batch-tokens, packed or padded: the same losses and gradient norms, in float32
    to 1e-6 at the first step and 1e-5 after; the same held-out loss."""
    data = write_rows(tmp_path / "rows.jsonl", chats())
    runs = []
    for n, (tokens, more) in enumerate(SIZES):
        out = str(tmp_path / f"run{n}")
        main = ["--model", random_model, "--data", data, "--output", out, "--eval-data", "0.2"]
        main += ["--samples", "0", "--max-steps", "3", "--batch-size", "5", "--dtype", "float32"]
        script.main([*main, "--micro-batch-tokens", str(tokens), *more, *flags])
        runs.append(read_metrics(out)[1:-1])
    steps = [entry for entry in runs[0] if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in runs[0] if "eval_loss" in entry]
    assert len(steps) == 3 and held_out[0] > held_out[-1]
    for run in runs[1:]:
        for one, other in zip(runs[0], run, strict=True):
            rel = 1e-6 if one["step"] < 2 else 1e-5
            for key in one.keys() - {"tokens_per_second", "peak_memory_gib"}:
                assert other[key] == pytest.approx(one[key], rel=rel), (key, one["step"])


@pytest.mark.parametrize("flags", [[], ["--no-packing"]])
def test_the_loss_of_a_step_is_transformers_own(flags, random_model, tmp_path):
    """model(labels=...) of a float64 model over the whole step: the mean over all of its targets,
    unequal examples and passes notwithstanding. Tokens and labels are made here, by hand."""
    rows = [row for row in chats() if "messages" in row]
    data, out = write_rows(tmp_path / "rows.jsonl", rows), str(tmp_path / "run")
    main = ["--model", random_model, "--data", data, "--output", out, "--eval-data", "0"]
    main += ["--samples", "0", "--epochs", "1", "--batch-size", str(len(rows))]
    main += ["--lr", "1e-3", "--dtype", "float32", "--micro-batch-tokens", "300"]
    lora.main([*main, *flags])
    (entry,) = [entry for entry in read_metrics(out) if "loss" in entry]

    tokenizer = transformers.AutoTokenizer.from_pretrained(random_model)  # a token a byte
    encode = lambda text: tokenizer(text).input_ids  # noqa: E731
    start, end, newline = 256, 257, encode("\n")  # <|im_start|>, <|im_end|>
    ids, labels = [], []
    for row in rows:
        ids.append([])
        labels.append([])
        for message in row["messages"]:
            head = [start, *encode(message["role"]), *newline]
            body = [*encode(message["content"]), end]
            context = message["role"] == "user"
            ids[-1] += head + body + newline
            labels[-1] += [-100] * len(head) + ([-100] * len(body) if context else body) + [-100]
        ids[-1].pop(), labels[-1].pop()  # what follows the last target
    width = max(map(len, ids))
    ids, labels, mask = (
        torch.tensor([x + [fill] * (width - len(x)) for x in values])
        for values, fill in ((ids, 0), (labels, -100), ([[1] * len(x) for x in ids], 0))
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float64)
    with torch.no_grad():
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert entry["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert entry["tokens"] == mask.sum()

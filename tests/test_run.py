"""Runs from the first line to the last file: flags, metrics, checkpoints, resume, kills, faults."""

import contextlib
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, TINY, read_metrics, write_rows
from safetensors.torch import load_file

import adalora
import common
import dpo
import full_ft
import lora
import orpo
import prefix_tuning
import prompt_tuning
import reward_model
import sft

ROWS = [
    {"prompt": f"Repeat {c} {n} times.", "completion": c * n}
    for n in range(1, 9)
    for c in "abcdefg"
]
PAIRS = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "no"} for r in ROWS]
SCRIPTS = ["lora", "full_ft", "sft", "dpo", "orpo", "reward_model"]
# 56 rows, 6 of them held out: 50 examples are 6.25 steps of 8, so an epoch ends inside a step.
TWELVE = "--max-steps 12 --batch-size 8 --lr 0.003 --samples 0 --eval-data 0.1 --eval-every 4"
TWELVE = [*TWELVE.split(), "--save-every", "5"]
IN_BACKWARD = ["--step-in-backward", "--max-grad-norm", "0"]


@pytest.fixture(autouse=True)
def own_signal_handlers():
    """A run in this process leaves its handlers behind."""
    kinds = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(kind) for kind in kinds]
    yield
    for kind, handler in zip(kinds, before):
        signal.signal(kind, handler)


@pytest.fixture
def flags(random_model, tmp_path):
    """name of the output folder, more flags -> the flags of a run of twelve steps"""
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    pairs = write_rows(tmp_path / "pairs.jsonl", PAIRS)

    def of_run(name, *more):
        start = ["--model", random_model, "--data", data, "--output", str(tmp_path / name)]
        return [*start, *TWELVE, *(pairs if x == "PAIRS" else str(x) for x in more)]

    return of_run


class Killed(BaseException):
    """Not an Exception: nothing may catch it, as nothing catches SIGKILL."""


def run_killed(monkeypatch, script, argv, step) -> None:
    """A run that ends after the update of this step, as by SIGKILL: nothing more is written."""
    original = common.Log.step_done

    def step_done(log, *args, **options):
        original(log, *args, **options)
        if log.run["step"] == step:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(common.Log, "step_done", step_done)
        script.main(argv)


def launched(capfd, script, argv) -> tuple[int, str]:
    """-> (exit code, what is on stderr besides the progress bar)"""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        common.launch(lambda: script.main(argv), out_of_memory="")
    lines = re.split(r"\r|\n|\x1b\[A", capfd.readouterr().err)
    return stopped.value.code, "\n".join(x for x in lines if x.strip() and "step/s" not in x)


def without_times(folder) -> list[dict]:
    """metrics.jsonl without the line of the run, times and memory."""
    times = "tokens_per_second", "peak_memory_gib"
    entries = read_metrics(folder)[1:]
    return [{key: x for key, x in entry.items() if key not in times} for entry in entries]


def tensors(folder) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*model.safetensors")
    return load_file(path)


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit the same tensors and metrics, and the same files."""
    assert without_times(a) == without_times(b)
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert sorted(path.name for path in a.iterdir()) == sorted(path.name for path in b.iterdir())


def checkpoint_files(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


# ------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize("left_out", ["--model", "--data"])
def test_model_and_data_come_together(left_out, flags):
    argv = flags("run")
    at = argv.index(left_out)
    with pytest.raises(common.UserError, match="--model and --data"):
        lora.main(argv[:at] + argv[at + 2 :])


@pytest.mark.parametrize(
    "script, data",
    [
        (lora, "task.jsonl"),
        (full_ft, "task.jsonl"),
        (sft, "format.jsonl"),
        *((script, "pairs.jsonl") for script in (dpo, orpo, reward_model)),
    ],
)
def test_the_demonstration(script, data, tmp_path, monkeypatch, capfd):
    """Without --model and --data: below the current directory, and over its own last result."""
    monkeypatch.chdir(tmp_path)
    for steps in (2, 1):
        script.main(["--max-steps", str(steps), "--samples", "1"])
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    folder = tmp_path / "runs" / "demo" / script.__name__
    assert tensors(folder) and read_metrics(folder)[-1]["step"] == 1
    args = read_metrics(folder)[0]["run"]["args"]
    assert args["model"] == TINY and args["data"] == [str(ROOT / "examples" / data)]
    printed = capfd.readouterr()
    for promised in ("2 steps of 16 examples", "held-out loss", "before training", "after"):
        assert promised in printed.out
    assert "warning: " not in printed.out and "2/2" in printed.err


@pytest.mark.parametrize("script", [lora, full_ft, sft, dpo, orpo, reward_model])
def test_inspect_reads_no_weights_and_writes_nothing(
    script, random_model, tmp_path, monkeypatch, capsys
):
    rows = ROWS if script in (lora, full_ft, sft) else PAIRS
    data = write_rows(tmp_path / "rows.jsonl", rows)
    shutil.copytree(random_model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for more in ([], ["--model", "model"]):
        script.main(["--inspect", "--data", data, *more])
        printed = capsys.readouterr().out
        assert "TARGET " in printed and "context " in printed
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(common.UserError, match="--inspect needs --data"):
        script.main(["--inspect"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_default(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        sys.modules[script].main(["--help"])
    printed = capsys.readouterr().out
    names = re.findall(r"^  (--[a-z0-9-]+)", printed, re.MULTILINE)
    assert stopped.value.code == 0 and len(names) == len(set(names))
    assert len(names) == printed.count("(default:")
    if script == "lora":
        assert len(names) <= 39


BAD_VALUES = """--batch-size -3|--micro-batch-tokens -5|--max-length -1|--rank -2|--dropout -1
--seed -1|--epochs -1|--epochs nan|--max-steps -1|--patience -1|--warmup-ratio -1
--lr nan|--lr -1|--weight-decay -1|--max-grad-norm -1"""


@pytest.mark.parametrize("bad", BAD_VALUES.replace("\n", "|").split("|"))
def test_negative_numbers_are_refused(bad, flags, tmp_path):
    """With the flag's name, before anything is written."""
    argv = [x for x in flags("run") if bad.split()[0] != "--epochs" or x not in TWELVE[:2]]
    with pytest.raises((common.UserError, SystemExit)) as stopped:
        lora.main([*argv, *bad.split()])
    if isinstance(stopped.value, SystemExit):
        assert stopped.value.code == 2
    else:
        assert bad.split()[0] in str(stopped.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bad", ["--no-such-flag", "--lr fast", "--dtype float16", "--max-len 9"])
def test_bad_flags_end_with_code_2(bad, flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        lora.main([*flags("run"), *bad.split()])
    assert stopped.value.code == 2 and bad.split()[0] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "more, match",
    [
        (["--data", "missing.jsonl"], "--data missing.jsonl"),
        (["--eval-data", "missing.jsonl"], "missing.jsonl"),
        (["--model", "no/such"], "--model no/such"),
        (["--patience", "1", "--eval-data", "0"], "--patience needs held-out rows"),
        (["--targets", "no_such"], "'no_such' matches no linear layer.*q_proj"),
    ],
)
def test_what_cannot_be_found_is_one_line_and_code_2(more, match, flags, tmp_path, capfd):
    code, printed = launched(capfd, lora, flags("run", *more))
    assert code == 2 and re.match(f"error: .*{match}", printed) and "\n" not in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_out_of_memory_says_what_to_try(script, monkeypatch, capsys):
    """With flags that the script has."""
    launch, texts = common.launch, []
    monkeypatch.setattr(common, "launch", lambda main, out_of_memory: texts.append(out_of_memory))
    runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    with pytest.raises(SystemExit):
        sys.modules[script].main(["--help"])
    known = capsys.readouterr().out
    named = re.findall(r"--[a-z0-9-]+", texts[0])
    assert len(named) >= 3 and [name for name in named if name not in known] == []

    def run_out():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More text")

    with pytest.raises(SystemExit) as stopped:
        launch(run_out, texts[0])
    printed = capsys.readouterr().err
    assert stopped.value.code == 1 and printed.startswith("error: out of GPU memory")
    assert texts[0] in printed and printed.count("\n") == 1


# ------------------------------------------------------------------- what a run says and logs


def test_the_first_line_of_a_run(flags, tmp_path, capsys):
    lora.main(flags("run"))
    printed = capsys.readouterr().out
    first = r"^12 steps of 8 examples, about ([\d,]+) tokens per forward pass, cpu, float32$"
    tokens = int(re.search(first, printed, re.MULTILINE)[1])
    assert tokens == pytest.approx(read_metrics(tmp_path / "run")[-1]["tokens"] / 12, abs=0.51)
    assert "warning: " not in printed  # --max-steps was asked for


@pytest.mark.parametrize(
    "epochs, limit, warning",
    [(2, 9999, "few steps"), (2, 300, "few steps"), (6, 9999, "half full"), (6, 300, None)],
)
def test_warnings_where_batches_do_not_suit_the_data(epochs, limit, warning, flags, capsys):
    more = ["--epochs", epochs, "--micro-batch-tokens", limit, "--eval-data", 0]
    argv = flags("run", *more)
    del argv[argv.index("--max-steps") : argv.index("--max-steps") + 2]
    lora.main(argv)
    printed = capsys.readouterr().out
    first = f"{7 * epochs} steps of 8 examples ({epochs} epochs of 56), about"
    assert first in printed and printed.count("warning: ") == bool(warning)
    assert warning is None or f"warning: {warning}" in printed.replace(
        "forward passes are less than ", ""
    )


def full_logits_nll(model, examples) -> torch.Tensor:
    """The summed NLL of targets, from all logits of each document alone, in transformers."""
    total = torch.zeros(())
    for ids, marks in zip(examples["input_ids"], examples["is_target"]):
        ids, marks = torch.as_tensor(ids).long(), torch.as_tensor(marks).bool()
        logits = model(input_ids=ids[None]).logits[0, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        total = total + nll[marks[1:]].sum()
    return total


@pytest.mark.parametrize("more", [[], ["--micro-batch-tokens", "90"], ["--no-packing"]])
def test_logged_values_are_those_of_plain_transformers(more, flags, tmp_path, monkeypatch):
    """Loss, gradient norm and tokens of the first step, and the first held-out loss."""
    seen = {}
    load_data, plan_steps = common.load_data, common.plan_steps
    monkeypatch.setattr(common, "load_data", lambda *x: seen.setdefault("sets", load_data(*x)))
    monkeypatch.setattr(common, "plan_steps", lambda *x: seen.setdefault("steps", plan_steps(*x)))
    full_ft.main(flags("run", *more))
    (train_set, eval_set), metrics = seen["sets"], read_metrics(tmp_path / "run")
    model = transformers.AutoModelForCausalLM.from_pretrained(flags("run")[1], dtype="float32")
    with torch.no_grad():
        held_out = full_logits_nll(model, eval_set[:]) / sum(map(sum, eval_set[:]["is_target"]))
    step = next(entry for entry in metrics if "loss" in entry)
    examples = train_set[seen["steps"][0]]
    assert len(examples["input_ids"]) == 8
    loss = full_logits_nll(model, examples) / sum(map(sum, examples["is_target"]))
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    first = next(entry for entry in metrics if "eval_loss" in entry)
    assert first["step"] == 0 and first["eval_loss"] == pytest.approx(held_out.item(), rel=1e-6)
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert step["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert step["tokens"] == sum(map(len, examples["input_ids"]))


def test_metrics_have_these_lines_and_keys(flags, tmp_path, monkeypatch):
    lora.main(flags("run", "--samples", 1))
    lines = read_metrics(tmp_path / "run")
    assert {"script", "args", "ranks", "torch", "transformers"} <= lines[0]["run"].keys()
    assert lines[0]["run"]["args"]["batch_size"] == 8 and lines[0]["run"]["ranks"] == 1
    steps = [line for line in lines if "loss" in line]
    keys = "step loss grad_norm lr tokens tokens_per_second peak_memory_gib"
    assert all(line.keys() == set(keys.split()) for line in steps)
    assert [line["step"] for line in steps] == list(range(1, 13))
    held_out = [line for line in lines if "eval_loss" in line]
    assert all(line.keys() == {"step", "eval_loss"} for line in held_out)
    assert [line["step"] for line in held_out] == [0, 4, 8, 12]
    answers = [line for line in lines if "eval_exact_match" in line]
    assert all(line.keys() == {"step", "eval_exact_match"} for line in answers)
    assert [line["step"] for line in answers] == [0, 12]
    assert lines[-1] == {"done": True, "step": 12, "tokens": steps[-1]["tokens"]}
    assert len(lines) == 1 + 12 + 4 + 2 + 1
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_learning_rates_are_transformers_cosine_but_for_a_first_update_at_0(flags, tmp_path):
    """Its warmup starts at 0, ours one step later; after that they are the same."""
    lora.main(flags("run", "--warmup-ratio", 0.3, "--lr", 0.01))
    rates = [entry["lr"] for entry in read_metrics(tmp_path / "run") if "loss" in entry]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.01)
    theirs = transformers.get_cosine_schedule_with_warmup(optimizer, 4, 12).lr_lambdas[0]
    expected = [theirs(step if step <= 4 else step - 1) for step in range(1, 13)]
    assert rates == pytest.approx([0.01 * x for x in expected], rel=1e-12)
    assert rates[0] == 0.0025 and rates[3] == 0.01 and 0 < rates[-1] < rates[-2]
    assert [common.learning_rate(1, 1, types.SimpleNamespace(warmup_ratio=x, lr=3.0))
            for x in (0, 0.03, 1)] == [3.0] * 3  # fmt: skip


def test_weight_decay_is_decoupled_and_of_matrices_alone(flags, tmp_path, random_model):
    more = ["--max-steps", 1, "--warmup-ratio", 0, "--lr", 0.01]
    full_ft.main(flags("plain", *more))
    full_ft.main(flags("decayed", *more, "--weight-decay", 0.5))
    start = tensors(Path(random_model))
    plain, decayed = tensors(tmp_path / "plain"), tensors(tmp_path / "decayed")
    for name in plain:
        decay = 0.5 if plain[name].dim() == 2 else 0.0
        expected = plain[name] - 0.01 * decay * start[name]
        torch.testing.assert_close(decayed[name], expected, rtol=0, atol=1e-7, msg=name)
    assert {x.dim() for x in plain.values()} == {1, 2}


def test_no_steps_at_all_gives_the_base(flags, tmp_path, random_model):
    full_ft.main(flags("run", "--max-steps", 0))
    start, saved = tensors(Path(random_model)), tensors(tmp_path / "run")
    assert all(torch.equal(start[name], saved[name]) for name in start)
    assert read_metrics(tmp_path / "run")[-1] == {"done": True, "step": 0, "tokens": 0}


# ------------------------------------------------------------------------------------ --output


def test_a_result_is_replaced_only_with_overwrite(flags, tmp_path):
    lora.main(flags("run", "--max-steps", 1))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for more in ([], ["--resume"]):
        with pytest.raises(common.UserError, match="--overwrite replaces it"):
            lora.main(flags("run", "--max-steps", 2, *more))
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    lora.main(flags("run", "--max-steps", 2, "--overwrite"))
    assert read_metrics(tmp_path / "run")[-1]["step"] == 2


def test_a_result_leaves_nothing_of_another_kind(flags, tmp_path):
    """A stale adapter beside a model would be loaded on top of it, and the reverse."""
    model = {"config.json", "model.safetensors"}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    sft.main(flags("run", "--lora-rank", 2, "--max-steps", 1))
    (tmp_path / "run" / "adapter_notes").mkdir()  # the user's own
    (tmp_path / "run" / "notes.txt").write_text("mine")
    for more, here, gone in (([], model, adapter), (["--lora-rank", 2], adapter, model)):
        sft.main(flags("run", "--max-steps", 1, "--overwrite", *more))
        names = {path.name for path in (tmp_path / "run").iterdir()}
        assert here | {"adapter_notes", "notes.txt"} <= names and not gone & names


def test_an_unfinished_run_is_resumed_or_replaced_on_request_alone(flags, tmp_path, monkeypatch):
    run_killed(monkeypatch, lora, flags("run"), 7)
    saved = (tmp_path / "run" / "checkpoint" / "step-00000005.pt").read_bytes()
    with pytest.raises(common.UserError, match="unfinished run: --resume .*, --overwrite"):
        lora.main(flags("run"))
    assert (tmp_path / "run" / "checkpoint" / "step-00000005.pt").read_bytes() == saved
    run_killed(monkeypatch, lora, flags("run", "--overwrite", "--lr", 0.001), 4)
    assert not list((tmp_path / "run").glob("checkpoint/*"))  # nothing to resume by mistake
    lora.main(flags("run", "--overwrite"))
    lora.main(flags("whole"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("kind", ["--model", "--adapter"])
@pytest.mark.parametrize("script", [lora, sft])
def test_the_output_is_not_what_the_run_reads(
    script, kind, flags, tmp_path, random_model, monkeypatch
):
    shutil.copytree(random_model, tmp_path / "model")
    lora.main(flags("adapter", "--max-steps", 0))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / kind[2:])
    before = {path: path.read_bytes() for path in (tmp_path / kind[2:]).iterdir()}
    for folder in (f"../{tmp_path.name}/{kind[2:]}", "link"):
        argv = flags("run", "--overwrite", kind, folder, "--output", str(tmp_path / kind[2:]))
        with pytest.raises(common.UserError, match="is what this run reads"):
            script.main(argv)
    assert {path: path.read_bytes() for path in (tmp_path / kind[2:]).iterdir()} == before


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600)])
@pytest.mark.parametrize("script", [lora, full_ft])
def test_file_modes_follow_the_umask(script, mask, mode, flags, tmp_path, monkeypatch):
    before = os.umask(mask)
    try:
        run_killed(monkeypatch, script, flags("parts"), 6)
        script.main(flags("run", "--max-steps", 1))
    finally:
        os.umask(before)
    files = [path for name in ("parts", "run") for path in (tmp_path / name).rglob("*.*")]
    assert len(files) > 5 and {path.suffix for path in files} >= {".safetensors", ".pt", ".jsonl"}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
        path.name: oct(mode) for path in files
    }


# ---------------------------------------------------------------------------------- --resume

RESUMED = {
    "lora": (lora, ["--dropout", "0.2"]),
    "adalora": (adalora, ["--dropout", "0.2", "--rank", "4", "--target-rank", "2"]),
    "full_ft": (full_ft, ["--weight-decay", "0.1"]),
    "in backward": (full_ft, [*IN_BACKWARD, "--l2-sp", "0.1"]),
    "8-bit": (full_ft, ["--optimizer", "adamw8bit"]),
    "bfloat16": (full_ft, ["--pure-bfloat16"]),
    "neftune": (sft, ["--neftune", "5"]),
    "sft lora": (sft, ["--neftune", "5", "--lora-rank", "4", "--lora-dropout", "0.2"]),
    "patience": (sft, ["--patience", "9", "--eval-every", "1"]),
    "a part": (full_ft, ["--train", "mlp|norm", "--weight-decay", "0.1"]),
    "prefix": (prefix_tuning, []),
    "prefix without MLP": (prefix_tuning, ["--hidden", "0"]),
    "prompt": (prompt_tuning, []),
    "prompt encoder": (prompt_tuning, ["--encoder", "lstm", "--hidden", "8"]),
    "dpo": (dpo, ["--data", "PAIRS"]),
    "dpo lora": (dpo, ["--data", "PAIRS", "--lora-rank", "4", "--lora-dropout", "0.2"]),
    "orpo": (orpo, ["--data", "PAIRS", "--patience", "9", "--eval-every", "1"]),
    "reward_model": (reward_model, ["--data", "PAIRS", "--lora-rank", "4"]),
}


@pytest.mark.parametrize("name, at", [*((name, 7) for name in RESUMED), ("lora", 11)])
def test_a_resumed_run_equals_one_that_was_never_stopped(name, at, flags, tmp_path, monkeypatch):
    """Bit for bit, in the middle of an epoch and between two readings of the losses."""
    script, more = RESUMED[name]
    if "8-bit" in name:
        pytest.importorskip("bitsandbytes")
    script.main(flags("whole", *more))
    run_killed(monkeypatch, script, flags("parts", *more), at)
    script.main(flags("parts", *more, "--resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_killed_and_resumed_twice_logs_nothing_twice(flags, tmp_path, monkeypatch):
    """Not the answers to samples either, which a run gives before it trains."""
    more = ["--samples", 2]
    lora.main(flags("whole", *more))
    run_killed(monkeypatch, lora, flags("parts", *more), 7)
    run_killed(monkeypatch, lora, flags("parts", *more, "--resume"), 9)
    lora.main(flags("parts", *more, "--resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_killed_after_its_last_checkpoint_logs_nothing_twice(flags, tmp_path, monkeypatch):
    """That is at the last step: the answers after training come later, and so does the end."""
    more = ["--samples", 2, "--max-steps", 10]
    lora.main(flags("whole", *more))
    for name, attribute in (("a", "save_adapter"), ("b", "done")):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            owner = common if attribute == "save_adapter" else common.Log
            patch.setattr(owner, attribute, lambda *args: die())
            lora.main(flags(name, *more))
        lora.main(flags(name, *more, "--resume"))
        assert_same_run(tmp_path / "whole", tmp_path / name)


@pytest.mark.parametrize("script", [lora, full_ft])
def test_memory_may_change_on_resume(script, flags, tmp_path, monkeypatch):
    """--micro-batch-tokens and packing change no step: 1e-6 at the first, 1e-5 after."""
    more = ["--lr", 0.001]
    script.main(flags("whole", *more))
    whole = {x["step"]: x for x in read_metrics(tmp_path / "whole") if "loss" in x}
    for n, other in enumerate((["--micro-batch-tokens", "90"], ["--no-packing"])):
        run_killed(monkeypatch, script, flags(f"parts{n}", *more), 7)
        script.main(flags(f"parts{n}", *more, *other, "--resume"))
        lines = [x for x in read_metrics(tmp_path / f"parts{n}") if "loss" in x]
        assert [x["step"] for x in lines] == list(range(1, 13))
        for line in lines:
            rel = 0 if line["step"] <= 5 else 1e-6 if line["step"] == 6 else 1e-5
            expected = whole[line["step"]]
            assert line["loss"] == pytest.approx(expected["loss"], rel=rel, abs=0)
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=10 * rel, abs=0)
        assert lines[-1] != whole[12]  # another order of additions


@pytest.mark.parametrize(
    "changed, match",
    [
        (["--lr", "0.02"], "--lr"),
        (["--batch-size", "4"], "--batch-size"),
        (["--max-steps", "13"], "--max-steps"),
        (["--rank", "8"], "--rank"),
        (["--seed", "1"], "--seed"),
        (["--weight-decay", "0.1"], "--weight-decay"),
        (["--targets", "q_proj"], "--targets"),
        ("data", "training data"),
        ("base", "base model"),
    ],
)
def test_resuming_another_run_is_refused(changed, match, flags, tmp_path, monkeypatch):
    """With the way out, and without a loss: the old flags still resume it."""
    run_killed(monkeypatch, lora, flags("run"), 7)
    more = changed if isinstance(changed, list) else []
    if changed == "data":
        more = ["--data", write_rows(tmp_path / "other.jsonl", ROWS[1:])]
    if changed == "base":
        model = transformers.AutoModelForCausalLM.from_pretrained(flags("run")[1])
        with torch.no_grad():
            model.get_input_embeddings().weight[:9] += 1
        shutil.copytree(flags("run")[1], tmp_path / "other")
        model.save_pretrained(tmp_path / "other")
        more = ["--model", tmp_path / "other"]
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")}
    with pytest.raises(common.UserError, match=f"--resume: (the )?{match} differs.*--output"):
        lora.main(flags("run", *more, "--resume"))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")} == before
    elsewhere = tmp_path / "elsewhere.jsonl"  # the same data by another path
    shutil.copy(tmp_path / "rows.jsonl", elsewhere)
    lora.main(flags("run", "--resume", "--data", elsewhere))


def test_resume_without_a_checkpoint_starts_at_step_1(flags, tmp_path, monkeypatch):
    """Where there is no folder yet, and where a run was killed before its first checkpoint: a
    scheduler that starts a job again gives the same command."""
    lora.main(flags("run", "--resume"))
    run_killed(monkeypatch, lora, flags("parts"), 3)
    lora.main(flags("parts", "--resume"))
    assert_same_run(tmp_path / "run", tmp_path / "parts")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_exits(number, code, flags, tmp_path, monkeypatch, capsys):
    """After the step that it came in."""
    read = common.micro_batches

    def with_a_signal(examples, *rest):
        if sum(map(len, examples["input_ids"])) and len(seen := seen_steps) == 6:
            os.kill(os.getpid(), number)
        seen.append(1)
        return read(examples, *rest)

    seen_steps = []
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(common, "micro_batches", with_a_signal)
        common.launch(lambda: lora.main(flags("run", "--eval-data", 0)), out_of_memory="")
    assert stopped.value.code == code
    assert "after step 7: --resume continues" in capsys.readouterr().out
    assert checkpoint_files(tmp_path / "run") == ["step-00000007.pt"]
    assert not list((tmp_path / "run").glob("*.safetensors"))
    lora.main(flags("run", "--eval-data", 0, "--resume"))
    lora.main(flags("whole", "--eval-data", 0))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_process_that_gets_sigterm(flags, tmp_path):
    argv = flags("run", "--max-steps", 400, "--eval-every", 1000, "--save-every", 3)
    command = [sys.executable, str(ROOT / "lora.py"), *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not list((tmp_path / "run").glob("checkpoint/*.pt")) and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in errors, errors
    (path,) = (tmp_path / "run" / "checkpoint").iterdir()
    step = torch.load(path, weights_only=True)["run"]["step"]
    assert 3 <= step < 400 and f"after step {step}: --resume continues" in printed
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, step + 1))


# ----------------------------------------------------------------------------------- --patience


def test_patience_stops_and_keeps_the_weights_of_the_lowest_held_out_loss(
    flags, tmp_path, monkeypatch, capsys
):
    """A rate so high that the loss rises again."""
    more = ["--max-steps", 60, "--lr", 0.03, "--warmup-ratio", 0, "--eval-every", 2]
    sft.main(flags("run", *more, "--patience", 3))
    lines = read_metrics(tmp_path / "run")
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    best = min(losses, key=losses.get)
    assert best > 0 and lines[-1]["step"] == best + 6 < 60 and lines[-1]["done"]
    assert f"using the weights of step {best}" in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoint").exists()
    run_killed(monkeypatch, sft, flags("again", *more, "--save-every", best), best + 1)
    again = torch.load(tmp_path / "again" / "checkpoint" / f"step-{best:08d}.pt", weights_only=True)
    saved = tensors(tmp_path / "run")
    assert all(torch.equal(saved[name], again["model"][name]) for name in saved)
    sft.main(flags("long", *more))
    assert read_metrics(tmp_path / "long")[-1]["step"] == 60
    assert any(not torch.equal(x, saved[name]) for name, x in tensors(tmp_path / "long").items())


def test_a_run_whose_patience_ran_out_does_not_train_on_after_resume(flags, tmp_path, monkeypatch):
    more = ["--max-steps", 60, "--lr", 0.03, "--warmup-ratio", 0, "--eval-every", 2]
    more += ["--patience", 3, "--save-every", 3]
    sft.main(flags("whole", *more))
    with monkeypatch.context() as patch, pytest.raises(Killed):  # after the last step
        patch.setattr(common, "save_model", lambda *args: (_ for _ in ()).throw(Killed))
        sft.main(flags("parts", *more))
    sft.main(flags("parts", *more, "--resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


# ----------------------------------------------------------------------------- damage and kills


@pytest.fixture
def stopped_run(flags, tmp_path, monkeypatch):
    """A run killed after step 7. -> its checkpoint of step 5"""
    run_killed(monkeypatch, lora, flags("run"), 7)
    return tmp_path / "run" / "checkpoint" / "step-00000005.pt"


def test_a_checkpoint_is_safe_to_load_and_replaces_the_one_before(
    stopped_run, flags, tmp_path, monkeypatch
):
    content = torch.load(stopped_run, weights_only=True)
    assert content["run"]["step"] == 5
    assert all("lora_" in name and x.isfinite().all() for name, x in content["model"].items())
    assert len(content["model"]) == 28
    run_killed(monkeypatch, lora, flags("run", "--resume"), 11)
    assert checkpoint_files(tmp_path / "run") == ["step-00000010.pt"]


def test_a_flipped_byte_is_found(stopped_run, flags, tmp_path):
    """Or it is one of the zeros between two tensors."""
    data, draw, found = stopped_run.read_bytes(), random.Random(0), 0
    lora.main(flags("whole"))
    for _ in range(20):
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        (tmp_path / "copy" / "checkpoint" / stopped_run.name).write_bytes(damaged)
        try:
            lora.main(flags("copy", "--resume"))
            assert_same_run(tmp_path / "whole", tmp_path / "copy")
        except common.UserError as error:
            found += 1
            assert re.search(r"step-00000005.pt is damaged.*--overwrite", str(error))
        shutil.rmtree(tmp_path / "copy")
    assert found >= 15


@pytest.mark.parametrize("size", [0, 100, -1, -5000])
def test_a_short_checkpoint_is_found(size, stopped_run, flags, capfd):
    data = stopped_run.read_bytes()
    stopped_run.write_bytes(data[:size])
    code, printed = launched(capfd, lora, flags("run", "--resume"))
    assert code == 2 and re.match("error: .*step-00000005.pt is damaged", printed)


@pytest.mark.parametrize("bits", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found_or_harmless(bits, tmp_path):
    """A checkpoint so small that most of it is headers and names: some bits of every byte."""
    torch.manual_seed(0)
    model, args = torch.nn.Linear(3, 2), types.SimpleNamespace(output=tmp_path)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    (tmp_path / "checkpoint").mkdir()
    run = {"step": 1, "tokens": 5, "fixed": {"--lr": 0.1, "--adapter": None}}
    common.save_checkpoint(args, "step-00000001", run, model, optimizer)
    path, states = tmp_path / "checkpoint" / "step-00000001.pt", list(optimizer.state.values())
    data, draw, other, found = path.read_bytes(), random.Random(0), torch.nn.Linear(3, 2), 0
    for n, bit in ((n, bit) for n in range(len(data)) for bit in draw.sample(range(8), bits)):
        damaged = bytearray(data)
        damaged[n] ^= 1 << bit
        path.write_bytes(damaged)
        with contextlib.suppress(Exception):
            if any(record.external_attr for record in zipfile.ZipFile(path).infolist()):
                continue  # a record marked as a folder, in one bit of a file, is not found
        empty = torch.optim.AdamW(other.parameters())
        torch.nn.init.zeros_(other.weight), torch.nn.init.zeros_(other.bias)
        try:
            assert common.read_checkpoint(args, "step-00000001", other, empty, {}) == run, n
        except common.UserError:
            found += 1
            continue
        assert all(map(torch.equal, model.parameters(), other.parameters())), n
        for before, after in zip(states, empty.state.values()):
            assert all(torch.equal(before[key], after[key]) for key in before), n
    assert found > 100 * bits


def test_a_half_written_checkpoint_is_never_taken(flags, tmp_path, monkeypatch):
    """Killed while the second one is being written: the first one counts."""
    save = torch.save

    def killed_at_the_second(content, path, **options):
        save(content, path, **options)
        if content["run"]["step"] == 10:
            Path(path).write_bytes(Path(path).read_bytes()[:-99])
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch, "save", killed_at_the_second)
        lora.main(flags("run"))
    first, half = checkpoint_files(tmp_path / "run")
    assert first == "step-00000005.pt" and not half.endswith(".pt")
    lora.main(flags("run", "--resume"))
    lora.main(flags("whole"))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_half_written_result_is_never_taken(flags, tmp_path, monkeypatch):
    """Killed while the tokenizer is being written beside the finished weights."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kind = type(transformers.AutoTokenizer.from_pretrained(TINY))
        patch.setattr(kind, "save_pretrained", lambda *args: (_ for _ in ()).throw(Killed))
        full_ft.main(flags("run"))
    folder = tmp_path / "run"
    assert [path for path in folder.iterdir() if path.suffix in (".safetensors", ".json")] == []
    full_ft.main(flags("run", "--resume"))
    full_ft.main(flags("whole"))
    assert_same_run(tmp_path / "whole", folder)


def test_a_torn_line_of_metrics_is_dropped_on_resume(stopped_run, flags, tmp_path):
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    lora.main(flags("run", "--resume"))
    lora.main(flags("whole"))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("how", ["deleted", "emptied by a kill"])
def test_a_lost_metrics_file_loses_no_checkpoint(how, stopped_run, flags, tmp_path, monkeypatch):
    """Killed while --resume rewrites it: its lines are still there, or were in no danger."""
    path = tmp_path / "run" / "metrics.jsonl"
    if how == "deleted":
        path.unlink()
        lora.main(flags("run", "--resume"))
        assert [x["step"] for x in read_metrics(tmp_path / "run") if "loss" in x] == [*range(6, 13)]
        return
    real = open

    def emptied(file, mode="r", *args, **options):
        opened = real(file, mode, *args, **options)
        if str(file) == str(path) and "w" in mode:
            opened.close()
            raise Killed
        return opened

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr("builtins.open", emptied)
        patch.setattr("io.open", emptied)
        lora.main(flags("run", "--resume"))
    if not list(path.parent.glob("*.safetensors")):
        lora.main(flags("run", "--resume"))
    lora.main(flags("whole"))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


# Everything that Python does to files raises an audit event first. A hook cannot be removed.
watched = types.SimpleNamespace(folder=None, left=0, act=None, seen=0)
EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.chmod"}


def hook(event, arguments) -> None:
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if watched.folder is None or not (event in EVENTS or writes):
        return
    if str(arguments[0]).startswith(watched.folder):
        watched.seen += 1
        if watched.seen == watched.left:
            watched.folder = None
            watched.act()


def watch(folder, left: int, act) -> None:
    """act() before the left-th call that changes a file below the folder."""
    if not getattr(hook, "installed", False):
        sys.addaudithook(hook)
        hook.installed = True
    vars(watched).update(folder=str(folder), left=left, act=act, seen=0)


def die() -> None:
    raise Killed


def is_done(folder) -> bool:
    """Complete, but perhaps for the removal of checkpoints: --resume has nothing to do."""
    path = folder / "metrics.jsonl"
    return path.exists() and path.read_text(encoding="utf-8").rpartition("\n{")[2][:6] == '"done"'


@pytest.mark.parametrize("count", [3, pytest.param(99, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script, save_every", [(lora, 1), (lora, 9), (full_ft, 1), (full_ft, 9)])
def test_killed_at_a_call_that_changes_a_file_a_run_resumes(
    script, save_every, count, flags, tmp_path
):
    """From a checkpoint or, where there is none yet, from the start."""
    short = ["--max-steps", 3, "--save-every", save_every, "--eval-every", 1, "--patience", 9]
    watch(tmp_path / "whole", 0, die)
    script.main(flags("whole", *short))
    calls, folder = watched.seen, tmp_path / "run"
    assert calls > 15
    for n in random.Random(count).sample(range(1, calls + 1), min(count, calls)):
        watch(folder, n, die)
        with pytest.raises(Killed):
            script.main(flags("run", *short))
        try:
            script.main(flags("run", *short, "--resume"))
        except common.UserError:
            assert is_done(folder)
            shutil.rmtree(folder / "checkpoint")
        assert_same_run(tmp_path / "whole", folder)
        shutil.rmtree(folder)


def as_a_process(name: str, argv: list[str], die_at: int | None, folder: str, log: str) -> None:
    """A script in a process of its own. die_at: see `watch`; there it sends itself SIGKILL."""
    sys.stdout = sys.stderr = open(log, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
    if die_at:
        watch(folder, die_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    common.launch(lambda: sys.modules[name].main(argv), out_of_memory="")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, more",
    [("lora", ["--dropout", "0.1"]), ("full_ft", []), ("dpo", ["--data", "PAIRS"])],
)
def test_fifty_kills_by_the_system(name, more, flags, tmp_path):
    """SIGKILL at fifty moments, half of them random and half at calls that change files. After
    each, --resume continues from the last checkpoint or starts clean, and every run that comes
    through ends bit for bit as the one that was never killed."""
    draw, context = random.Random(name), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "datasets", "test_run"])
    more = [*more, "--max-steps", 40, "--save-every", 2, "--eval-every", 7]
    log, parts = tmp_path / "log", tmp_path / "parts"

    def start(folder, die_at=None):
        argv = flags(folder, *more, "--resume")
        arguments = name, argv, die_at, str(tmp_path / folder), str(log)
        process = context.Process(target=as_a_process, args=arguments)
        process.start()
        return process

    began = time.time()
    process = start("whole")
    process.join()
    assert process.exitcode == 0, log.read_text()
    began, seconds = time.time(), time.time() - began
    killed = finished = resumed = 0
    while killed < 50 or not finished:
        position, known = log.stat().st_size, sorted(parts.glob("checkpoint/step-*.pt"))
        at_random = draw.random() < 0.5
        process = start("parts", None if at_random or killed >= 50 else draw.randrange(1, 90))
        if at_random and killed < 50:
            process.join(draw.uniform(0.1, 0.9) * seconds)
            process.kill()
        process.join()
        said = log.read_bytes()[position:].decode(errors="replace")
        assert process.exitcode in (0, -signal.SIGKILL), said
        killed += process.exitcode == -signal.SIGKILL
        resumed += "resumed after step" in said
        if known and "held-out" in said:
            assert re.search(rf"resumed after step {int(known[-1].stem[5:])}\b", said)
        for path in parts.glob("checkpoint/step-*.pt"):
            assert torch.load(path, weights_only=True)["run"]["step"] == int(path.stem[5:])
        if process.exitcode == 0 or is_done(parts):  # the next one begins anew
            shutil.rmtree(parts / "checkpoint", ignore_errors=True)  # killed while it did that
            assert_same_run(tmp_path / "whole", parts)
            shutil.rmtree(parts)
            finished += 1
    print(f"{name}: {killed} kills, {resumed} resumed, {finished} finished", time.time() - began)
    assert resumed >= 10


# ------------------------------------------------------------------ full disks, no permission


def limit_file_size(size: int) -> None:
    """No file may grow beyond the size: the system's own error, where a disk would be full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("size", [100, 200_000])
@pytest.mark.parametrize("script", [lora, full_ft])
def test_no_room_for_a_checkpoint_is_one_line_and_the_one_before_counts(
    script, size, flags, tmp_path, monkeypatch, capfd
):
    save_checkpoint, unlimited = (
        common.save_checkpoint,
        resource.getrlimit(resource.RLIMIT_FSIZE)[0],
    )

    def save(args, name, *rest):
        if name == "step-00000010":
            limit_file_size(size)
        try:
            save_checkpoint(args, name, *rest)
        finally:
            limit_file_size(unlimited)

    with monkeypatch.context() as patch:
        patch.setattr(common, "save_checkpoint", save)
        code, printed = launched(capfd, script, flags("run"))
    assert code == 1 and re.match("error: .*step-00000010", printed) and "\n" not in printed
    assert [x for x in checkpoint_files(tmp_path / "run") if x.endswith(".pt")] == [
        "step-00000005.pt"
    ]
    script.main(flags("run", "--resume"))
    script.main(flags("whole"))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("size", [100, 100_000])
@pytest.mark.parametrize("script", [lora, full_ft])
def test_no_room_for_the_result_is_one_line_and_the_checkpoint_counts(
    script, size, flags, tmp_path, monkeypatch, capfd
):
    name = "save_adapter" if script is lora else "save_model"
    save, unlimited = getattr(common, name), resource.getrlimit(resource.RLIMIT_FSIZE)[0]

    def save_result(*args):
        limit_file_size(size)
        try:
            save(*args)
        finally:
            limit_file_size(unlimited)

    with monkeypatch.context() as patch:
        patch.setattr(common, name, save_result)
        code, printed = launched(capfd, script, flags("run"))
    assert code == 1 and printed.startswith("error: ") and "\n" not in printed
    assert not list((tmp_path / "run").glob("*.safetensors"))
    assert checkpoint_files(tmp_path / "run") == ["step-00000010.pt"]


def test_a_folder_that_cannot_be_written_is_one_line(flags, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    code, printed = launched(capfd, lora, flags("file/run"))
    assert code in (1, 2) and printed.startswith("error: ") and "\n" not in printed
    assert str(tmp_path / "file") in printed


def test_a_read_only_folder_is_one_line_and_keeps_its_checkpoint(stopped_run, flags):
    folder = stopped_run.parent.parent
    before, command = stopped_run.read_bytes(), [sys.executable, str(ROOT / "lora.py")]
    if os.geteuid() == 0:  # root may write everywhere, unless it drops this right
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
        if not shutil.which("setpriv"):
            pytest.skip("root needs setpriv")
    for path in (stopped_run, folder / "metrics.jsonl", stopped_run.parent, folder):
        path.chmod(0o500)
    try:
        done = subprocess.run(
            [*command, *flags("run", "--resume")], capture_output=True, text=True, timeout=120
        )
    finally:
        for path in (folder, stopped_run.parent, folder / "metrics.jsonl", stopped_run):
            path.chmod(0o700)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ")
    assert "Permission denied" in done.stderr and "Traceback" not in done.stderr
    assert stopped_run.read_bytes() == before
    lora.main(flags("run", "--resume"))


# --------------------------------------------------------------------- numbers and gradients


@pytest.mark.parametrize("script, more", [(lora, []), (full_ft, []), (full_ft, IN_BACKWARD)])
def test_a_loss_that_is_not_finite_stops_the_run(script, more, flags, tmp_path, monkeypatch):
    """A weight becomes infinite after step 6. The next loss is not finite: the run names its
    step and step 4's checkpoint, though losses are read at step 10 and the next one is due at 8."""
    original, models = common.Log.step_done, []
    load_model = common.load_model
    monkeypatch.setattr(
        common, "load_model", lambda *a, **b: models.append(load_model(*a, **b)) or models[0]
    )

    def step_done(log, *args):
        original(log, *args)
        if log.run["step"] == 6:
            weight = next(p for n, p in models[0].named_parameters() if p.requires_grad)
            weight.data[0] = float("inf")

    monkeypatch.setattr(common.Log, "step_done", step_done)
    more = [*more, "--eval-data", 0, "--save-every", 4]
    with pytest.raises(common.UserError, match="step 7: .*not finite.*step-00000004.*--lr"):
        script.main(flags("run", *more))
    assert checkpoint_files(tmp_path / "run") == ["step-00000004.pt"]
    assert [x["step"] for x in read_metrics(tmp_path / "run") if "loss" in x] == list(range(1, 7))
    assert not list((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.parametrize("script, more", [(lora, []), (full_ft, []), (full_ft, IN_BACKWARD)])
@pytest.mark.parametrize("rate, save_every", [("1e30", 5), ("1e38", 1)])
def test_a_rate_that_breaks_the_weights_saves_none_of_them(
    script, more, rate, save_every, flags, tmp_path
):
    with pytest.raises(common.UserError, match=r"step \d+: .*not finite"):
        script.main(flags("run", *more, "--lr", rate, "--save-every", save_every))
    for path in tmp_path.glob("run/checkpoint/*.pt"):
        content = torch.load(path, weights_only=True)
        assert all(x.isfinite().all() for x in content["model"].values())
    assert not list((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.parametrize("script, more", [(lora, []), (full_ft, []), (full_ft, IN_BACKWARD)])
def test_a_last_update_that_breaks_the_weights_gives_no_result(script, more, flags, tmp_path):
    with pytest.raises(common.UserError, match="not finite"):
        script.main(flags("run", *more, "--lr", "3e38", "--weight-decay", 9, "--max-steps", 2,
                          "--eval-data", 0, "--warmup-ratio", 0))  # fmt: skip
    assert not list((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.parametrize("script, more", [(lora, []), (full_ft, []), (full_ft, IN_BACKWARD)])
def test_a_trainable_parameter_without_a_gradient_is_an_error(
    script, more, flags, tmp_path, monkeypatch
):
    class Odd(transformers.models.llama.modeling_llama.LlamaMLP):
        def __init__(self, config):
            super().__init__(config)
            self.idle = torch.nn.Parameter(torch.zeros(3))

    monkeypatch.setattr(transformers.models.llama.modeling_llama, "LlamaMLP", Odd)
    config = transformers.AutoConfig.from_pretrained(flags("run")[1])
    shutil.copytree(flags("run")[1], tmp_path / "odd")
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "odd")
    if script is lora:

        class Idle(lora.LoRALinear):
            def __init__(self, *args):
                super().__init__(*args)
                self.idle = torch.nn.Parameter(torch.zeros(3))

        monkeypatch.setattr(lora, "LoRALinear", Idle)
    with pytest.raises(common.UserError, match=r"idle.*no gradient|no gradient.*idle"):
        script.main(flags("run", *more, "--model", tmp_path / "odd"))
    assert not list((tmp_path / "run").glob("*.safetensors"))

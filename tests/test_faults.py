"""What must not be lost, pass in silence or be let in: kills, damaged and foreign checkpoints, full disks, bad data, numbers that
are not finite, malicious files, leaks. Every script goes through the same tests: a new one joins with a line in SCRIPTS.

Quick forms run by default, on a model of one block; `pytest -m slow tests/test_faults.py` runs the long ones."""

import codecs
import csv
import errno
import functools
import gc
import gzip
import importlib
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from conftest import ROOT, read_metrics, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import common

PROMPTS = [f"Repeat {c} {n} times." for n in range(1, 5) for c in "abcdefg"]
TALKS = [{"prompt": prompt, "completion": prompt[7] * int(prompt[9])} for prompt in PROMPTS]
PAIRS = [{"prompt": prompt, "chosen": prompt[7] * int(prompt[9]), "rejected": "no"} for prompt in PROMPTS]
PAIRS += [{"prompt": "Which?", "responses": ["this", "that", "neither"]}]

# Script -> (rows, flags of every run, flags that change its mathematics and the name that --resume must give them).
LORA = ["--lora-rank", "4"]
SCRIPTS = {
    "lora": (TALKS, [], ["--alpha", "8"]),
    "full_ft": (TALKS, [], ["--l2-sp", "0.1"]),
    "dora": (TALKS, [], ["--dropout", "0.1"]),
    "qlora": (TALKS, [], ["--rslora"]),
    "adapter": (TALKS, [], ["--activation", "gelu"]),
    "prefix_tuning": (TALKS, ["--hidden", "16"], ["--prefix-length", "5"]),
    "prompt_tuning": (TALKS, [], ["--init", "random"]),
    "sft": (TALKS, LORA, ["--neftune", "5"]),
    "dpo": (PAIRS, LORA, ["--beta", "0.3"]),
    "orpo": (PAIRS, LORA, ["--lambda", "0.3"]),
}
SCRIPTS = {name: row for name, row in SCRIPTS.items() if (ROOT / f"{name}.py").exists()}
TAKES_ADAPTER = [name for name in SCRIPTS if '"--adapter"' in (ROOT / f"{name}.py").read_text(encoding="utf-8")]
WITHOUT_ADAPTER = ["full_ft"]
RESULTS = ("adapter_model.safetensors", "model.safetensors")

every_script = pytest.mark.parametrize("name", SCRIPTS)


def small_model(seed: int = 0):
    """As common.tiny_model, with one block."""
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module", autouse=True)
def small():
    """The model of these tests; and what main() leaves behind in this process is put back."""
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "tiny_model", small_model)
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()
    for kind, handler in handlers.items():
        signal.signal(kind, handler)


def flags(name, output, *more) -> list[str]:
    """A run of four steps, which logs each and saves every second one."""
    rows, own, _ = SCRIPTS[name]
    data = Path(output).parent / "rows.jsonl"
    if not data.exists():
        write_rows(data, rows)
    four = ["--max-steps", "4", "--batch-size", "1", "--max-length", "96", "--samples", "0", "--lr", "0.01", "--log-every", "1",
            "--save-every", "2", "--eval-every", "100", "--eval-fraction", "0.1", "--max-grad-norm", "0.1"]  # fmt: skip
    return ["--data", str(data), "--output", str(output), *four, *own, *map(str, more)]


def main(name, *arguments) -> None:
    importlib.import_module(name).main([str(argument) for argument in arguments])


def launched(name, *arguments) -> int:
    """main() as `python NAME.py` runs it -> the exit code."""
    try:
        common.launch(lambda: main(name, *arguments), "")
    except SystemExit as stopped:
        return stopped.code
    return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """name -> the output folder of its four steps with both checkpoints, made once and not to be changed."""
    made = {}

    def folder(name) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "run"
            main(name, *flags(name, made[name], "--keep", 2))
        return made[name]

    return folder


@pytest.fixture
def run_of(finished, tmp_path):
    """The same, but a copy of the test's own."""

    def copy(name) -> Path:
        shutil.copytree(finished(name).parent, tmp_path, dirs_exist_ok=True)
        return tmp_path / "run"

    return copy


@pytest.fixture(scope="module")
def other_base(tmp_path_factory):
    """A model of the same shapes and other weights."""
    folder, model = tmp_path_factory.mktemp("other"), small_model(seed=1)
    model.padded_attention = model.config._attn_implementation
    common.save_model(folder, model, common.tiny_tokenizer())
    return folder


def comparable(folder) -> list[dict]:
    """metrics.jsonl without times and memory."""
    drop = {"tokens_per_second", "peak_memory_gib", "seconds"}
    return [{key: value for key, value in entry.items() if key not in drop} for entry in read_metrics(folder)[1:]]


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit the same weights and metrics, and the same files."""
    assert comparable(a) == comparable(b)
    names = [sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) for folder in (a, b)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith(".safetensors"):
            assert (a / name).read_bytes() == (b / name).read_bytes(), name


def whole(checkpoint: Path) -> bool:
    """Every file of a checkpoint is as its manifest says. Not through common: this is the judge."""
    digests = json.loads((checkpoint / "manifest.json").read_text())
    return len(digests) == 3 and all(common.hashlib.sha256((checkpoint / file).read_bytes()).hexdigest() == digest for file, digest in digests.items())


# ------------------------------------------------------------------------------------------------------------ kills


class Killed(BaseException):
    """Not an Exception: nothing may catch it, as nothing catches SIGKILL."""


class Disk:
    """Counts the calls that change files from Run.__init__ on. The n-th dies, or fails, half done where it writes."""

    CALLS = [(os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"), (safetensors.torch, "save_file"), (torch, "save")]

    def __init__(self, patch, at: int | None = None, error=Killed):
        self.calls, self.at, self.error, self.armed = 0, at, error, False
        for module, name in self.CALLS:
            patch.setattr(module, name, self.counted(getattr(module, name), name))
        patch.setattr(common, "open", self.counted(open, "open"), raising=False)  # metrics.jsonl
        patch.setattr(common.Run, "__init__", self.arming(common.Run.__init__))

    def arming(self, original):
        def __init__(*args, **options):
            self.armed = True
            original(*args, **options)

        return __init__

    def counted(self, original, name):
        @functools.wraps(original)
        def call(*args, **options):
            if not self.armed or name == "open" and len(args) > 1 and args[1] == "rb":
                return original(*args, **options)
            self.calls += 1
            if self.calls == self.at:
                if name in ("save_file", "save"):
                    Path(args[1]).write_bytes(b"half of a f")
                raise self.error
            return original(*args, **options)

        return call


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("name, more", [("lora", ["--dropout", "0.1"]), ("full_ft", []), ("dpo", ["--lora-rank", "0"])])
def test_killed_again_and_again_a_run_ends_as_if_it_had_not_been(name, more, keep, tmp_path, monkeypatch):
    """Each process dies at some call that changes a file, the next one goes on, until one comes through."""
    more = [*more, "--keep", keep]
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        main(name, *flags(name, tmp_path / "whole", *more))
    draw = random.Random(f"{name}{keep}")
    for n in draw.sample(range(1, disk.calls), 4):
        with monkeypatch.context() as patch:
            Disk(patch, n)
            try:
                main(name, *flags(name, tmp_path / "parts", *more, "--resume"))
            except Killed:
                pass
        assert all(map(whole, (tmp_path / "parts" / "checkpoint").glob("step-*")))
    main(name, *flags(name, tmp_path / "parts", *more, "--resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("keep", [1, 2])
def test_a_save_killed_at_any_call_leaves_a_whole_checkpoint(keep, tmp_path, monkeypatch):
    """Every call of the third save_checkpoint in turn: whatever has a checkpoint's name afterwards is whole, and one is there."""
    runs, original = [], common.Run.save_checkpoint
    monkeypatch.setattr(common.Run, "save_checkpoint", lambda run: runs.append(run) or original(run))
    main("lora", *flags("lora", tmp_path / "run", "--keep", keep))
    run, folder = runs[0], tmp_path / "run" / "checkpoint"
    before, n = sorted(path.name for path in folder.iterdir()), 0
    assert len(before) == keep
    while True:
        n += 1
        run.step += 1
        with monkeypatch.context() as patch:
            disk = Disk(patch, n)
            disk.armed = True
            try:
                original(run)
                break
            except Killed:
                pass
        names = sorted(path.name for path in folder.glob("step-*"))
        assert all(whole(folder / name) for name in names) and len(names) >= keep, n
    assert n > 15 and len(list(folder.iterdir())) == keep


def as_a_process(name: str, arguments: list[str], die_at: int | None, log: str) -> None:
    """A script in a process of its own, which kills itself at a call that changes a file, if one is given."""
    sys.stdout = sys.stderr = open(log, "a", encoding="utf-8", buffering=1)

    class Kill(BaseException):
        def __init__(self):
            os.kill(os.getpid(), signal.SIGKILL)

    if die_at is not None:
        Disk(pytest.MonkeyPatch(), die_at, Kill)
    common.launch(lambda: main(name, *arguments), "")


@pytest.mark.slow
@pytest.mark.parametrize("name, more", [("lora", ["--dropout", "0.1"]), ("full_ft", []), ("dpo", ["--lora-rank", "0"])])
def test_fifty_kills_by_the_system(name, more, tmp_path):
    """SIGKILL at fifty moments of one run, half of them at random times and half inside calls that change files: after each,
    --resume goes on from the last whole checkpoint, and the run ends bit for bit as the one that was never killed.

    Kills in $KILLS, if fewer are wanted."""
    kills, draw = int(os.environ.get("KILLS", 50)), random.Random(name)
    context = multiprocessing.get_context("forkserver")  # imports once, then forks
    context.set_forkserver_preload(["torch", "transformers", "datasets", "common", "lora", "full_ft", "dpo", "test_faults"])
    more = [*more, "--max-steps", str(4 * kills), "--save-every", "2", "--eval-every", "7"]

    def start(folder, die_at=None, resume=True):
        arguments = flags(name, tmp_path / folder, *more, *["--resume"] * resume)
        process = context.Process(target=as_a_process, args=(name, arguments, die_at, str(tmp_path / f"{folder}.log")))
        process.start()
        return process

    began = time.time()
    process = start("whole", resume=False)
    process.join()
    assert process.exitcode == 0, (tmp_path / "whole.log").read_text()
    seconds, killed, expected, log = time.time() - began, 0, 0, tmp_path / "parts.log"
    while killed < kills:
        position = log.stat().st_size if log.exists() else 0
        process = start("parts", draw.randrange(1, 60) if killed % 2 else None)
        if killed % 2 == 0:
            process.join(draw.uniform(0, 0.2 * seconds))
            process.kill()
        process.join()
        said = log.read_text(encoding="utf-8")[position:]
        if "resumed after step" in said or "starting at step 0" in said:
            assert (f"resumed after step {expected} " if expected else "starting at step 0") in said
        assert process.exitcode in (0, -signal.SIGKILL), said
        killed += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            break
        checkpoints = sorted((tmp_path / "parts" / "checkpoint").glob("step-*"))
        assert all(map(whole, checkpoints))
        expected = int(checkpoints[-1].name[5:]) if checkpoints else 0
    process = start("parts")
    process.join()
    assert process.exitcode == 0, log.read_text()
    print(f"{name}: {killed} kills in {time.time() - began:.0f} s, {log.read_text(encoding='utf-8').count('resumed after')} resumptions")
    assert killed == kills
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


# ------------------------------------------------------------------------------------------------ damaged checkpoints


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", [*common.Run.FILES, "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_offered(file, damage, run_of):
    run = object.__new__(common.Run)
    run.output = run_of("lora")
    last = run.output / "checkpoint" / "step-00000004"
    DAMAGES[damage](last / file)
    with pytest.raises(common.UserError) as error:
        run.load_checkpoint()
    message = str(error.value)
    assert str(last) in message and "damaged" in message and "\n" not in message
    assert file in message or (file, damage) == ("manifest.json", "flipped")  # then a checksum is not that of its file
    assert f"Delete {last} to go on from step-00000002" in message
    shutil.rmtree(last.with_name("step-00000002"))
    with pytest.raises(common.UserError, match=f"Delete {last} to begin anew: there is no other .--keep 2"):
        run.load_checkpoint()


def test_the_way_out_leads_out(run_of, finished):
    run = run_of("lora")
    last = run / "checkpoint" / "step-00000004"
    flip(last / "weights.safetensors")
    with pytest.raises(common.UserError, match=f"Delete {last} to go on"):
        main("lora", *flags("lora", run, "--keep", 2, "--resume"))
    shutil.rmtree(last)
    main("lora", *flags("lora", run, "--keep", 2, "--resume"))
    assert_same_run(run, finished("lora"))


@pytest.mark.parametrize("manifest", ["[]", "{}", "null", "7", '"x"', '{"weights.safetensors": null}', "[" * 100_000])
def test_a_manifest_that_vouches_for_nothing_is_damaged(manifest, finished, tmp_path):
    shutil.copytree(finished("lora") / "checkpoint" / "step-00000004", tmp_path / "step")
    (tmp_path / "step" / "manifest.json").write_text(manifest)
    assert "is damaged" in common.Run.damage(common.Run, tmp_path / "step")


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_keep_is_how_many_checkpoints_stay(keep, tmp_path):
    main("lora", *flags("lora", tmp_path / "run", "--save-every", 1, "--keep", keep))
    steps = [path.name for path in sorted((tmp_path / "run" / "checkpoint").iterdir())]
    assert steps == [f"step-0000000{n}" for n in range(1, 5)][-keep:]


def test_a_renamed_checkpoint_is_not_one(run_of):
    run = run_of("lora")
    last = run / "checkpoint" / "step-00000004"
    last.rename(last.with_name("step-00000004.bad"))
    main("lora", *flags("lora", run, "--resume", "--keep", 2))
    assert whole(last) and last.with_name("step-00000004.bad").exists()


# -------------------------------------------------------------------------------------- full disks, read-only folders


def fails_in_save(monkeypatch, number: int, before, after=lambda: None):
    """before() ahead of the number-th checkpoint, and after() behind it, also when it fails."""
    original, calls = common.Run.save_checkpoint, []

    def save_checkpoint(run):
        calls.append(1)
        if len(calls) != number:
            return original(run)
        before()
        try:
            original(run)
        finally:
            after()

    monkeypatch.setattr(common.Run, "save_checkpoint", save_checkpoint)


def one_error_line(capsys) -> str:
    """The last line on stderr, behind the progress bar's."""
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if line.strip() and not line.startswith("training:")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize("limit", [100, 20_000, 200_000])
def test_no_room_for_a_checkpoint_is_one_line_and_the_one_before_counts(limit, tmp_path, monkeypatch, capsys):
    """No file may grow beyond the limit, by the system's own rule: json, safetensors and torch each meet it in their own way."""
    monkeypatch.setattr(signal, "SIGXFSZ", signal.signal(signal.SIGXFSZ, signal.SIG_IGN))
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    arguments = flags("full_ft", tmp_path / "run")
    with monkeypatch.context() as patch:
        fails_in_save(patch, 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1])),
                      lambda: resource.setrlimit(resource.RLIMIT_FSIZE, unlimited))  # fmt: skip
        assert launched("full_ft", *arguments) == 1
    assert "File too large" in (line := one_error_line(capsys)) or "cannot be written" in line
    (kept,) = (tmp_path / "run" / "checkpoint").iterdir()  # nothing half-written beside it
    assert kept.name == "step-00000002" and whole(kept)
    main("full_ft", *arguments, "--resume")
    assert comparable(tmp_path / "run")[-1]["done"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_every_failing_call_of_a_save_is_one_line_and_leaves_nothing_half_written(code, tmp_path, monkeypatch):
    runs, original = [], common.Run.save_checkpoint
    monkeypatch.setattr(common.Run, "save_checkpoint", lambda run: runs.append(run) or original(run))
    main("lora", *flags("lora", tmp_path / "run"))
    run, folder = runs[0], tmp_path / "run" / "checkpoint"
    for n in range(1, 100):
        run.step += 1
        with monkeypatch.context() as patch:
            disk = Disk(patch, n, OSError(code, os.strerror(code), "a file"))
            disk.armed = True
            try:
                original(run)
                assert n > 15
                break
            except OSError as error:
                assert error.errno == code
        names = {path.name for path in folder.iterdir()} - {".unfinished"}
        assert names and all(whole(folder / name) for name in names), n


def test_no_room_for_the_result_is_one_line_and_resume_writes_it(tmp_path, monkeypatch, capsys):
    """tokenizers raises a bare Exception there."""
    full = Exception("No space left on device (os error 28)")
    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(full))
        assert launched("lora", *flags("lora", tmp_path / "run")) == 1
    assert "No space left" in (line := one_error_line(capsys)) and str(tmp_path / "run") in line
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint", "metrics.jsonl"]
    main("lora", *flags("lora", tmp_path / "run", "--resume"))
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def on_a_small_disk(tmp_path, monkeypatch, capsys, options: str):
    """A file system of 2500 KiB, changed by the mount options before the second checkpoint, and the first checkpoint on it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        arguments = flags("full_ft", disk / "run")
        if options:
            fails_in_save(monkeypatch, 2, lambda: subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True))
        assert launched("full_ft", *arguments) == 1
        line = one_error_line(capsys)
        subprocess.run(["mount", "-o", "remount,rw,size=64m", disk], check=True)
        (kept,) = (path for path in (disk / "run" / "checkpoint").iterdir() if path.name != ".unfinished")
        assert whole(kept) and kept.name == "step-00000002"
        monkeypatch.undo()
        main("full_ft", *arguments, "--resume")
        assert comparable(disk / "run")[-1]["done"] and len(list((disk / "run" / "checkpoint").iterdir())) == 1
        assert str(disk) not in Path("/proc/self/maps").read_text()  # a removed checkpoint takes no more room
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    return line


def test_a_disk_that_is_full(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(common, "tiny_model", small_model)
        line = on_a_small_disk(tmp_path, patch, capsys, "")
    assert "No space left" in line or "cannot be written" in line


def test_a_disk_that_becomes_read_only(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        line = on_a_small_disk(tmp_path, patch, capsys, "ro")
    assert "Read-only file system" in line


@pytest.mark.parametrize("name", ["lora", "dpo"])
def test_an_output_that_cannot_be_made_is_one_line(name, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    arguments = flags(name, tmp_path / "run")
    arguments[arguments.index("--output") + 1] = str(tmp_path / "file" / "run")
    assert launched(name, *arguments) == 1
    assert "Not a directory" in one_error_line(capsys)


# ---------------------------------------------------------------------------------------------------- other runs


@every_script
def test_resuming_with_what_changes_the_mathematics_is_refused_and_named(name, run_of, other_base, monkeypatch):
    run, changed = run_of(name), SCRIPTS[name][2]
    for more, named in ((changed, changed[0]), (["--lr", "0.02"], "--lr"), (["--seed", "1"], "--seed"), (["--model", other_base], "base model")):
        with pytest.raises(common.UserError, match=f"^--resume: {named} is not what it was when"):
            main(name, *flags(name, run, "--resume", *more))
    rows = (run.parent / "rows.jsonl").read_text().splitlines()
    (run.parent / "rows.jsonl").write_text("\n".join(rows[:-1]), encoding="utf-8")
    with pytest.raises(common.UserError, match="^--resume: data is not what it was"):
        main(name, *flags(name, run, "--resume"))


@pytest.mark.parametrize("name", TAKES_ADAPTER)
def test_an_adapter_of_another_base_is_refused_by_its_fingerprint(name, finished, other_base, tmp_path):
    with pytest.raises(common.UserError, match="trained on another base than --model: on .*run/base"):
        main(name, *flags(name, tmp_path / "run", "--adapter", finished(name), "--model", other_base, "--max-steps", 0))
    assert not (tmp_path / "run").exists()


def test_every_script_that_can_takes_an_adapter():
    assert set(SCRIPTS) - set(TAKES_ADAPTER) == set(WITHOUT_ADAPTER)


@pytest.mark.parametrize("name", [name for name in ("lora", "dpo") if name in SCRIPTS])
def test_resuming_from_another_adapter_or_none_is_refused(name, finished, tmp_path):
    """dpo.py's reference is the adapter that training began with."""
    start, other, arguments = finished(name), tmp_path / "other", flags(name, tmp_path / "run")
    shutil.copytree(start, other)
    tensors = load_file(other / RESULTS[0])
    safetensors.torch.save_file({key: tensor * 1.5 for key, tensor in tensors.items()}, other / RESULTS[0])
    main(name, *arguments, "--adapter", start)
    shutil.copytree(start, tmp_path / "same")
    main(name, *arguments, "--adapter", tmp_path / "same", "--resume")  # by another path
    for more in (["--adapter", other], []):
        with pytest.raises(common.UserError, match="--resume: (adapter|--alpha) is not what it was"):
            main(name, *arguments, *more, "--resume")


# ------------------------------------------------------------------------------------------------------- numerics


def spoil(monkeypatch, step: int, change) -> None:
    """change(first trained parameter) after a step."""
    original = common.Run.end_step

    def end_step(run, *arguments):
        original(run, *arguments)
        if run.step == step:
            change(next(iter(run.trained)))

    monkeypatch.setattr(common.Run, "end_step", end_step)


@every_script
def test_a_loss_that_is_not_finite_stops_with_step_and_last_checkpoint(name, tmp_path, monkeypatch):
    spoil(monkeypatch, 2, lambda p: p.data.fill_(math.inf))
    with pytest.raises(common.UserError, match=r"^step 3: the loss or the gradient norm .* is not finite; the last good checkpoint is .*step-00000002"):
        main(name, *flags(name, tmp_path / "run"))
    (kept,) = (tmp_path / "run" / "checkpoint").glob("step-*")
    assert whole(kept) and all(tensor.isfinite().all() for tensor in load_file(kept / "weights.safetensors").values())


@pytest.mark.parametrize("name, more", [("lora", []), ("full_ft", ["--max-grad-norm", "0"]), ("full_ft", ["--max-grad-norm", "0", "--step-in-backward"])])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(name, more, value, tmp_path, monkeypatch):
    """It appears in the step that ends with a checkpoint, and the loss before it is finite. --step-in-backward knows no norm."""
    spoil(monkeypatch, 3, lambda p: p.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), value)))
    with pytest.raises(common.UserError, match=r"^step 4: .* is not finite; the last good checkpoint is .*step-00000002"):
        main(name, *flags(name, tmp_path / "run", *more))
    assert not (tmp_path / "run" / RESULTS[0]).exists() and not (tmp_path / "run" / RESULTS[1]).exists()


@every_script
def test_a_trainable_parameter_without_a_gradient_is_an_error(name, tmp_path, monkeypatch):
    original = common.decay_groups

    def with_one_more(model, weight_decay):
        model.register_parameter("forgotten", torch.nn.Parameter(torch.zeros(3)))
        return original(model, weight_decay)

    monkeypatch.setattr(common, "decay_groups", with_one_more)
    with pytest.raises(common.UserError, match="1 trainable parameters get no gradient, the first of them forgotten"):
        main(name, *flags(name, tmp_path / "run"))



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
from conftest import RANDOM, ROOT, read_metrics, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import common

PROMPTS = [f"Repeat {c} {n} times." for n in range(1, 5) for c in "abcdefg"]
TALKS = [{"prompt": prompt, "completion": prompt[7] * int(prompt[9])} for prompt in PROMPTS]
PAIRS = [{"prompt": prompt, "chosen": prompt[7] * int(prompt[9]), "rejected": "no"} for prompt in PROMPTS]
PAIRS += [{"prompt": "Which?", "responses": ["this", "that", "neither"]}]

# Script -> (rows, flags of every run, a flag that changes its mathematics).
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
    "reward_model": (PAIRS, LORA, ["--targets", "q_proj"]),
    "ppo": (PAIRS, [*LORA, "--response-length", "4", "--minibatches", "1", "--ppo-epochs", "1", "--lr", "0.001"], ["--kl-coefficient", "0.3"]),
}
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
    arguments = [str(argument) for argument in arguments]
    if "--adapter" in arguments and LORA[0] in arguments:  # the folder has its own
        at = arguments.index(LORA[0])
        del arguments[at : at + len(LORA)]
    importlib.import_module(name).main(arguments)


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
            ours, theirs = load_file(a / name), load_file(b / name)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name


def whole(checkpoint: Path) -> bool:
    """Every file of a checkpoint is as its manifest says. Not through common: this is the judge."""
    digests = json.loads((checkpoint / "manifest.json").read_text())
    return len(digests) == 3 and all(
        common.hashlib.sha256((checkpoint / file).read_bytes()).hexdigest() == digest for file, digest in digests.items()
    )


# ------------------------------------------------------------------------------------------------------------ kills


class Killed(BaseException):
    """Not an Exception: nothing may catch it, as nothing catches SIGKILL."""


class Disk:
    """Counts the calls that change files from Run.__init__ on. The n-th dies, or fails, half done where it writes."""

    CALLS = [
        (os, "replace"),
        (os, "fsync"),
        (os, "mkdir"),
        (os, "unlink"),
        (os, "rmdir"),
        (shutil, "copyfile"),
        (safetensors.torch, "save_file"),
        (torch, "save"),
    ]

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
    """SIGKILL at fifty moments, half of them at random times and half inside calls that change files: after each, --resume goes on
    from the last whole checkpoint, and every run ends bit for bit as the one that was never killed. $KILLS: another number."""
    kills, draw = int(os.environ.get("KILLS", 50)), random.Random(name)
    context = multiprocessing.get_context("forkserver")  # imports once, then forks
    context.set_forkserver_preload(["torch", "transformers", "datasets", "common", "lora", "full_ft", "dpo", "test_faults"])
    more = [*more, "--max-steps", "40", "--save-every", "2", "--eval-every", "7"]

    def start(folder, die_at=None, resume=True):
        arguments = flags(name, tmp_path / folder, *more, *["--resume"] * resume)
        process = context.Process(target=as_a_process, args=(name, arguments, die_at, str(tmp_path / f"{folder}.log")))
        process.start()
        return process

    began = time.time()
    process = start("whole", resume=False)
    process.join()
    assert process.exitcode == 0, (tmp_path / "whole.log").read_text()
    seconds, killed, expected, runs, log = time.time() - began, 0, 0, 0, tmp_path / "parts.log"
    while killed < kills or expected is not None:
        position, random_time = log.stat().st_size if log.exists() else 0, draw.random() < 0.5
        process = start("parts", None if random_time or killed == kills else draw.randrange(1, 60))
        if random_time and killed < kills:
            process.join(draw.uniform(0, 0.3 * seconds))
            process.kill()
        process.join()
        said = log.read_text(encoding="utf-8")[position:]
        if "resumed after step" in said or "starting at step 0" in said:
            assert (f"resumed after step {expected} " if expected else "starting at step 0") in said
        assert process.exitcode in (0, -signal.SIGKILL), said
        killed += process.exitcode == -signal.SIGKILL
        checkpoints = sorted((tmp_path / "parts" / "checkpoint").glob("step-*"))
        assert all(map(whole, checkpoints))
        expected = int(checkpoints[-1].name[5:]) if checkpoints else 0
        if process.exitcode == 0:  # it came through: the next one begins anew
            assert_same_run(tmp_path / "whole", tmp_path / "parts")
            shutil.rmtree(tmp_path / "parts")
            runs, expected = runs + 1, 0 if killed < kills else None
    print(
        f"{name}: {killed} kills in {runs} runs and {time.time() - began:.0f} s, {log.read_text(encoding='utf-8').count('resumed after')} resumptions"
    )


def test_an_interrupt_before_the_run_is_no_traceback():
    with pytest.raises(SystemExit) as stopped:
        common.launch(lambda: (_ for _ in ()).throw(KeyboardInterrupt), "")
    assert stopped.value.code == 130


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


def test_a_checkpoint_too_many_goes_on_resume(run_of):
    """As one that is left when a run is killed between its last checkpoint and the removal of the one before."""
    run = run_of("lora")
    main("lora", *flags("lora", run, "--resume"))
    assert [path.name for path in (run / "checkpoint").iterdir()] == ["step-00000004"]


def test_a_renamed_checkpoint_is_not_one(run_of):
    run = run_of("lora")
    last = run / "checkpoint" / "step-00000004"
    last.rename(last.with_name("step-00000004.bad"))
    main("lora", *flags("lora", run, "--resume", "--keep", 2))
    assert whole(last) and last.with_name("step-00000004.bad").exists()


def test_torn_lines_of_metrics_are_dropped(run_of, finished):
    run = run_of("lora")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:-1]) + b'{"step": 4, "lo\n\xff\xfe\x00{}}\n{"step": 4, "loss": {"a": 1}')
    main("lora", *flags("lora", run, "--keep", 2, "--resume"))
    assert_same_run(run, finished("lora"))


def test_damaged_best_weights_are_not_taken_back(tmp_path, monkeypatch):
    losses, original = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), common.Run.save_best
    monkeypatch.setattr(common, "corpus_means", lambda *_: {"loss": next(losses)})
    monkeypatch.setattr(common.Run, "save_best", lambda run: (original(run), flip(run.output / "checkpoint" / "best.safetensors")))
    with pytest.raises(common.UserError, match="best.safetensors is missing or damaged .* --resume --patience 0 keeps"):
        main("lora", *flags("lora", tmp_path / "run", "--patience", 1, "--eval-every", 1))
    main("lora", *flags("lora", tmp_path / "run", "--patience", 0, "--eval-every", 1, "--resume"))
    assert read_metrics(tmp_path / "run")[-1]["done"]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_damaged_reference_log_probabilities_are_computed_again(damage, tmp_path):
    arguments = flags("dpo", tmp_path / "run", "--lora-rank", 0)
    main("dpo", *arguments)
    kept = tmp_path / "run" / "reference.safetensors"
    data, logps = kept.read_bytes(), load_file(kept)["logps"].clone()  # the file is mapped
    if damage == "flipped":
        kept.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    else:
        DAMAGES[damage](kept)
    main("dpo", *arguments, "--resume")
    assert torch.equal(load_file(kept)["logps"], logps)


def test_a_refused_run_leaves_the_reference_of_the_unfinished_one(tmp_path):
    """dpo.py writes it before the run begins."""
    run = tmp_path / "run"
    main("dpo", *flags("dpo", run, "--lora-rank", 0))
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    before = (run / "reference.safetensors").read_bytes()
    with pytest.raises(common.UserError, match="holds a run that is not finished"):
        main("dpo", *flags("dpo", run, "--lora-rank", 0, "--seed", 1))
    assert (run / "reference.safetensors").read_bytes() == before


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
    with pytest.raises(common.UserError, match="trained on another base than this model: on .*run/base"):
        main(name, *flags(name, tmp_path / "run", "--adapter", finished(name), "--model", other_base, "--max-steps", 0))
    assert not (tmp_path / "run").exists()


def test_every_script_that_can_takes_an_adapter():
    assert set(SCRIPTS) - set(TAKES_ADAPTER) == set(WITHOUT_ADAPTER)


@pytest.mark.parametrize("name", ["lora", "dpo"])
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
    with pytest.raises(common.UserError, match="^step 3: .* not finite; the last good checkpoint is .*step-00000002"):
        main(name, *flags(name, tmp_path / "run"))
    (kept,) = (tmp_path / "run" / "checkpoint").glob("step-*")
    assert whole(kept) and all(tensor.isfinite().all() for tensor in load_file(kept / "weights.safetensors").values())


@pytest.mark.parametrize(
    "name, more", [("lora", []), ("full_ft", ["--max-grad-norm", "0"]), ("full_ft", ["--max-grad-norm", "0", "--step-in-backward"])]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(name, more, value, tmp_path, monkeypatch):
    """It appears in the step that ends with a checkpoint, and the loss before it is finite. --step-in-backward knows no norm."""
    spoil(monkeypatch, 3, lambda p: p.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), value)))
    with pytest.raises(common.UserError, match=r"^step 4: .* is not finite; the last good checkpoint is .*step-00000002"):
        main(name, *flags(name, tmp_path / "run", *more))
    assert not (tmp_path / "run" / RESULTS[0]).exists() and not (tmp_path / "run" / RESULTS[1]).exists()


@every_script
def test_a_trainable_parameter_without_a_gradient_is_an_error(name, tmp_path, monkeypatch):
    original = common.Run.__init__

    def __init__(run, args, model, *others, **options):
        model.register_parameter("forgotten", torch.nn.Parameter(torch.zeros(3)))
        original(run, args, model, *others, **options)

    monkeypatch.setattr(common.Run, "__init__", __init__)
    with pytest.raises(common.UserError, match="1 trainable parameters get no gradient, the first of them forgotten"):
        main(name, *flags(name, tmp_path / "run"))


# ------------------------------------------------------------------------------------------------------- bad data

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
GOOD_ROWS = {  # kind -> rows that are read right
    "conversations": [
        {"text": "raw"}, {"messages": TALK}, {"prompt": "q", "completion": "a"}, {"instruction": "q", "input": "i", "output": "a"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {"question": "q", "answer": "a"},
        {"prompt": TALK[:1], "completion": TALK[1:]},
    ],
    "preferences": [
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1.0}, {"prompt": "q", "responses": ["a", "b", "c"]},
        {"chosen": TALK, "rejected": [TALK[0], {"role": "assistant", "content": "b"}]},
    ],
    "prompts": [{"prompt": "q"}, {"prompt": TALK[:1]}, {"messages": TALK[:1]}, {"prompt": "q", "chosen": "a", "rejected": "b"}],
}  # fmt: skip
WRONG_VALUES = [None, 5, 0.5, True, {}, {"a": 1}, [], [None], [["q"]], ["q", 5], [{"role": "user"}], [{"role": "wizard", "content": "q"}],
                "\ud83d", "\udc00x", math.nan, math.inf, 10**400, -(10**30), [[[[[[]]]]]]]  # fmt: skip
MISSING = object()


def places(value, path=()):
    """The paths of all strings and numbers inside a row, and of the lists around them."""
    if isinstance(value, (dict, list)):
        if path and isinstance(value, list):
            yield path
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))
    else:
        yield path


def changed(row, path, value):
    """A deep copy of the row with another value at the path."""
    copy = json.loads(json.dumps(row))
    inside = functools.reduce(lambda item, key: item[key], path[:-1], copy)
    if value is MISSING:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return copy


def bad_rows(kind):
    """Rows of a kind with one wrong value each, and which of them are right all the same."""
    for row in GOOD_ROWS[kind]:
        for path in places(row):
            for value in [*WRONG_VALUES, MISSING]:
                if path[0] == "margin":
                    right = (
                        value is None or value is MISSING or not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) < 1e300
                    )
                elif path == ("input",):
                    right = value is None or value is MISSING
                else:  # one of three ranked answers may be missing
                    right = value is MISSING and path[0] == "responses" and len(path) > 1
                    right |= kind == "prompts" and value is MISSING and path == ("chosen",)  # its prompt is still one
                yield changed(row, path, value), right


@functools.cache
def reader():
    return common.tiny_tokenizer(), common.make_parser("", output="unused", lr=1.0).parse_args(["--max-length", "4096"])


def decoded(kind, path) -> list[dict] | str:
    """What a kind's reader makes of a file, through rows, tokens and targets, without the cache: records, or its complaint."""
    (tokenizer, args), records = reader(), []
    try:
        _, rows = common.open_source(str(path))
        for row, where in rows():
            records += common.encode_row(row, where, tokenizer, args, 320, kind)
    except common.UserError as error:
        return str(error)
    for record in records:  # no zero-target rows among the kept, no id that does not exist
        assert len(record["input_ids"]) == len(record["is_target"]) and math.isfinite(record["margin"])
        assert all(0 <= token < 320 for token in record["input_ids"])
        assert record["status"] > common.CUT or kind == "prompts" or 0 < record["targets"] == sum(record["is_target"])
    return records


def test_the_good_rows_are_good(tmp_path):
    for kind, rows in GOOD_ROWS.items():
        records = decoded(kind, write_rows(tmp_path / "rows.jsonl", rows))
        assert not isinstance(records, str) and all(record["status"] == common.KEPT for record in records)


@pytest.mark.parametrize("kind", GOOD_ROWS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_row_with_one_wrong_value_is_refused_with_its_line(kind, suffix, tmp_path):
    """Each string, list and number of each kind of row in turn, as each wrong value."""
    path, good, count = tmp_path / f"rows{suffix}", json.dumps(GOOD_ROWS[kind][0]), 0
    for row, right in bad_rows(kind):
        lines = [good, json.dumps(row), good]
        path.write_text("\n".join(lines) if suffix == ".jsonl" else "[" + ",\n".join(lines) + "]", encoding="utf-8")
        found = decoded(kind, path)
        if right:
            assert not isinstance(found, str), (row, found)
        else:
            assert isinstance(found, str) and found.startswith(f"{path}:2: ") and "\n" not in found, (row, found)
        count += 1
    assert count > (200 if kind == "conversations" else 100)


def wrong_lines():
    """Lines that are no JSON object, and good ones that look odd, with the text that must come out."""
    for value in ("5", "null", "true", '"text"', "[]", "[1, 2]", "NaN", "-Infinity", "1e999", "{}", '{"": ""}', '{"text": 5}', '{"TEXT": "x"}'):
        yield value.encode(), None
    whole = '{"text": "中文 and more", "id": [1, {"a": null}]}'.encode()
    for end in range(1, len(whole)):  # torn at each byte, also inside a character
        yield whole[:end], None
    for line in ("{'text': 'x'}", '{"text": "x",}', '{text: "x"}', '{"text": "x"} // why', "text: x", "<text>x</text>", '{"text": "x"}{"text": "y"}',
                 '{"text": "\\x41"}', '{"text": "\\u12"}', '{"text": undefined}', '{"text": 01}', '{"text"; "x"}', "text,x",
                 "\ufeff" + '{"text": "x"}',
                 '{"text": ' + "[" * 50_000, '{"a":' * 50_000, '{"text": ' + "9" * 5000 + "}", '{"text": "tab\tin"}',
                 '{"text": "nul\x00in"}'):  # fmt: skip
        yield line.encode(), None
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "cp1251", "utf-7", "shift_jis", "gbk", "big5", "euc-kr"):
        text = {"shift_jis": "日本", "gbk": "中文", "big5": "中文", "euc-kr": "한국", "cp1251": "Привет"}.get(encoding, "café")
        yield json.dumps({"text": text}, ensure_ascii=False).encode(encoding), "caf+AOk" if encoding == "utf-7" else None
    for text in [*map(chr, range(1, 32)), "\x7f", "\x80", "\x9f", "\u2028", "\u2029", "\u200b", "\u202e", "\ufeff", "\ufffe", "\uffff",
        "\U0010ffff", "😀",
                 "\x00", "e\u0301", "ﷺ" * 50, "👩‍👩‍👧", "a\r\nb", "<|im_start|>", "<|im_end|>", "{{ 7 * 7 }}", "{% raw %}", "\\", '"',
                 "x" * 3000]:  # fmt: skip
        yield json.dumps({"text": f"[{text}]"}).encode(), f"[{text}]"
        if text >= " ":
            yield json.dumps({"text": f"[{text}]"}, ensure_ascii=False).encode(), f"[{text}]"
    yield b'{"text": "first", "text": "second"}', "second"
    yield b'\r\n\t {"text" :"spaces" }  ', "spaces"
    yield b'{"text": "x", "unused": "\\ud800", "deep": ' + b"[" * 300 + b"]" * 300 + b', "huge": 1e999}', "x"


def test_each_line_is_read_right_or_refused_with_its_number(tmp_path):
    path, tokenizer, good = tmp_path / "rows.jsonl", common.tiny_tokenizer(), b'{"text": "good"}\n'
    lines = list(wrong_lines())
    assert len(lines) > 150
    for line, text in lines:
        path.write_bytes(good + line + b"\n" + good)
        found, number = decoded("conversations", path), 2 + line.startswith(b"\r\n")
        if text is None:
            # UTF-16 and the like break lines of their own making
            assert isinstance(found, str) and found.startswith(f"{path}:{number}: ") and "\n" not in found, (line[:80], found)
        else:
            assert not isinstance(found, str), (line[:80], found)
            assert [tokenizer.decode(record["input_ids"]) for record in found] == [f"{x}<|im_end|>" for x in ("good", text, "good")]


def csv_text(rows: list[dict]) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def odd_files(folder: Path):
    """Whole files that are damaged, of another kind, or odd: (path, the text that must come out or None)."""
    good = json.dumps([{"text": "中文"}, {"text": "b"}], ensure_ascii=False)
    datasets.Dataset.from_list([{"text": f"row {n}"} for n in range(40)]).to_parquet(folder / "whole.parquet")
    parquet, table = (folder / "whole.parquet").read_bytes(), csv_text([{"text": "中文"}, {"text": "b"}])
    draw, n = random.Random(0), 0

    def make(suffix, data, text=None):
        nonlocal n
        n += 1
        path = folder / f"{n}{suffix}"
        path.write_bytes(data)
        return path, text

    for suffix in common.READERS:
        for data in (b"", b" ", b"\n\n\n", b"\x00" * 1000, b"\xff" * 1000, gzip.compress(good.encode()), b"PK\x03\x04" + bytes(60),
            b"%PDF-1.7\n%\xe2\xe3",
                     codecs.BOM_UTF8, codecs.BOM_UTF16_LE, draw.randbytes(4000), pickle.dumps({"text": "x"}), b"\x80\x04\x95"):  # fmt: skip
            yield make(suffix, data)
        for encoding in ("utf-16", "utf-32", "utf-16-le", "gbk"):
            yield make(suffix, (good if "json" in suffix else table).encode(encoding))
    for end in range(0, len(good.encode()) - 1, 2):  # a list, torn
        yield make(".json", good.encode()[: end + 1])
    for text in (
        "[",
        "[[",
        "[" * 100_000,
        "[1]",
        "[null]",
        '[{"text": "a"},]',
        '[{"text": "a"} {"text": "b"}]',
        "{}",
        '{"data": []}',
        "7",
        '"x"',
        "[]]",
        "[{}]",
    ):
        yield make(".json", text.encode())
    yield make(".json", codecs.BOM_UTF8 + good.encode(), ["中文", "b"])
    yield make(".json", b" \r\n\t" + good.replace(", {", "\r\n,\r\n{").encode(), ["中文", "b"])
    for text in ('text\n"open', 'text\n"a"b\n', "text\na,b\n", "text,label\na\n", ",\n1,2\n", "label\na\n", '"text\na\n', "text\n\x00,\x01\n",
        "text\ta\nb\tc\n",
                 "prompt;completion\na;b\n", "text\rmac\r"):  # fmt: skip
        yield make(".csv", text.encode())
    yield make(".csv", codecs.BOM_UTF8 + table.encode(), ["中文", "b"])
    yield make(".csv", b'text\r\n"two\r\nlines"\r\n\r\n"quote "" and, comma"\r\n', ["two\r\nlines", 'quote " and, comma'])
    yield make(".csv", b"text\nNA\nnull\n", ["NA", "null"])
    yield make(".csv", f"text\n{'x' * 200_000}\n".encode(), None)  # 200,000 targets in one row: split, see below
    for end in sorted({*range(0, len(parquet), len(parquet) // 20)}):
        yield make(".parquet", parquet[:end])
    for _ in range(40):  # a flipped byte may hit what nothing checks: then it is read, and not always right
        data = bytearray(parquet)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        yield make(".parquet", bytes(data), "either")


def test_whole_files_that_are_damaged_are_refused_by_name(tmp_path):
    tokenizer, count = common.tiny_tokenizer(), 0
    for path, text in odd_files(tmp_path):
        found, count = decoded("conversations", path), count + 1
        if isinstance(text, list):
            assert [tokenizer.decode(record["input_ids"]) for record in found] == [f"{x}<|im_end|>" for x in text], path
        elif isinstance(found, str):
            assert found.startswith(str(path)) and "\n" not in found, found
        elif text is None:  # of these only blank files are no error yet (load_data says that there are no rows), and one long row
            assert not found or all(record["status"] == common.KEPT for record in found) and b"xxx" in path.read_bytes(), (
                path.read_bytes()[:80],
                found,
            )
    assert count > 150


def test_a_parquet_file_of_all_types_is_read_or_refused_with_its_row(tmp_path):
    import datetime
    import decimal

    import pyarrow
    import pyarrow.parquet

    values = [
        b"bytes",
        5,
        0.5,
        True,
        datetime.datetime(2026, 1, 1),
        decimal.Decimal("1.5"),
        ["x"],
        {"a": 1},
        [[1]],
        {"path": "/etc/passwd", "bytes": None},
    ]
    for n, value in enumerate(values):
        path = tmp_path / f"{n}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": [value, value]}), path)
        found = decoded("conversations", path)
        assert isinstance(found, str) and found.startswith(f"{path}: row 1: field 'text' is "), found
    told = json.dumps({"info": {"features": {"text": {"_type": "Image"}}}})  # datasets would open the path
    image = pyarrow.table({"text": [{"bytes": None, "path": "/etc/hostname"}]}).replace_schema_metadata({"huggingface": told})
    pyarrow.parquet.write_table(image, tmp_path / "image.parquet")
    assert "field 'text' is dict" in decoded("conversations", tmp_path / "image.parquet")


@pytest.mark.slow
@pytest.mark.parametrize("kind", GOOD_ROWS)
def test_the_whole_corpus_of_bad_data_through_load_data(kind, tmp_path):
    """As the tests above, through the token table and the split, each file in its own cache entry."""
    tokenizer, began, refused = common.tiny_tokenizer(), time.time(), 0
    files = [path for path, _ in odd_files(tmp_path)]
    for n, (line, _) in enumerate(wrong_lines()):
        files.append(tmp_path / f"line{n}.jsonl")
        files[-1].write_bytes(line)
    for n, (row, _) in enumerate(bad_rows(kind)):
        files.append(tmp_path / f"row{n}.jsonl")
        files[-1].write_text(json.dumps(row))
    for path in files:
        args = common.make_parser("", output="unused", lr=1.0).parse_args(["--data", str(path), "--max-length", "4096"])
        try:
            corpus, _ = common.load_data(args, tokenizer, 320, kind=kind)
            assert all(len(batch["input_ids"]) for batch in corpus.deal(corpus.rows()))
        except common.UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    print(f"{kind}: {len(files)} files, {refused} refused, in {time.time() - began:.0f} s")
    assert len(files) > 400


@every_script
def test_each_script_refuses_bad_data_as_a_user_meets_it(name, tmp_path, capsys):
    """Exit code 2, one line with file and line, nothing written."""
    good = json.dumps(SCRIPTS[name][0][0]).encode()
    torn, null, surrogate = good[:-3], good.replace(b'"Repeat a 1 times."', b"null"), good.replace(b"Repeat", b"\\ud83d")
    for bad in (torn, null, surrogate, good.replace(b"Repeat", b"caf\xe9"), b"[]", b"[" * 100_000):
        arguments = flags(name, tmp_path / "run")
        (tmp_path / "rows.jsonl").write_bytes(good + b"\n" + bad)
        assert launched(name, *arguments) == 2
        assert one_error_line(capsys).startswith(f"error: {tmp_path / 'rows.jsonl'}:2: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("template", [
    "{{ 1 / 0 }}", "{{ messages[0].content.nothing.more }}", "{{ messages[99] }}", "{{ raise_exception('no') }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    "{{ messages | dictsort }}", "{{ 'x'.encode('nope') }}", "{% if %}", "{{ messages[0]['content'] | int + [] }}", "{{ ''.join(5) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "",
])  # fmt: skip
def test_whatever_a_template_raises_is_refused_with_file_and_line(template, tmp_path):
    (tmp_path / "t.jinja").write_text(template)
    with pytest.raises(common.UserError, match="rows.jsonl:1: the chat template refuses|no row with a target is left"):
        main("lora", *flags("lora", tmp_path / "run", "--template", tmp_path / "t.jinja"))


def load_folder(folder) -> str:
    """Tokenizer and model of --model -> what went wrong, in one line, or ""."""
    args = common.make_parser("", output="unused", lr=1.0).parse_args(["--model", str(folder)])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        common.load_tokenizer(args)
        common.load_model(args, torch.float32, torch.device("cpu"))
    except common.UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return str(error)
    return ""


@pytest.mark.parametrize("content", ["", "[]", "null", "7", "{", "{}", '{"model_type": 5}', "[" * 50_000])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_broken_model_folder_is_one_line(file, content, other_base, tmp_path):
    shutil.copytree(other_base, tmp_path / "model")
    (tmp_path / "model" / file).write_text(content)
    assert load_folder(tmp_path / "model").startswith(f"--model {tmp_path / 'model'}: ") or file == "generation_config.json"


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": -1}, {"hidden_size": "x"}, {"num_attention_heads": 0}, {"vocab_size": 10}, {"dtype": "os.system"}, {"hidden_act": "evil"}],
)
def test_a_broken_model_config_is_one_line(change, other_base, tmp_path):
    shutil.copytree(other_base, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | change
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert load_folder(tmp_path / "model").startswith(f"--model {tmp_path / 'model'}: ")


def test_weights_that_are_missing_are_not_made_up(other_base, tmp_path, capsys):
    """transformers fills them with random numbers and says so in a warning."""
    file, name = tmp_path / "model" / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    shutil.copytree(other_base, tmp_path / "model")
    assert load_folder(tmp_path / "model") == ""
    tensors = load_file(file)
    safetensors.torch.save_file({key: tensor for key, tensor in tensors.items() if key != name}, file, {"format": "pt"})
    assert load_folder(tmp_path / "model") == f"--model {tmp_path / 'model'}: 1 of its weights are in no file, the first of them {name}"
    capsys.readouterr()
    safetensors.torch.save_file(tensors | {"further": torch.zeros(2)}, file, {"format": "pt"})
    assert load_folder(tmp_path / "model") == "" and "1 tensors in its files are no part of this model, further for one" in capsys.readouterr().out
    safetensors.torch.save_file(tensors | {name: torch.zeros(3, 3)}, file, {"format": "pt"})
    assert load_folder(tmp_path / "model").startswith("--model")


def test_a_machine_without_git_and_a_terminal_without_chinese(tmp_path, monkeypatch):
    """Neither ends a run."""
    arguments = flags("lora", tmp_path / "run", "--samples", 2)
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"第{n}行", "completion": "好😀"} for n in range(20)])
    monkeypatch.setenv("PATH", str(tmp_path))
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert launched("lora", *arguments) == 0
    terminal.flush()
    assert b"\\u7b2c" in terminal.buffer.getvalue() and read_metrics(tmp_path / "run")[0]["run"]["git_commit"] is None


# ---------------------------------------------------------------------------------- properties of templates and batches

text = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=12).filter(lambda x: x.strip())
TEMPLATES = {"chatml": common.CHATML, "alpaca": common.ALPACA, "generation": common.CHATML.replace(
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n", "<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n"), "none": None}  # fmt: skip


def encoded(kind, row, template):
    tokenizer = common.tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[template] or common.CHATML
    args = common.make_parser("", output="unused", lr=1.0).parse_args(["--template", "none"] if template == "none" else [])
    return tokenizer, list(common.encode_row(row, "x:1", tokenizer, args, 320, kind))


def answers_of(tokenizer, record) -> list[str]:
    """The text of each run of targets."""
    edges = np.flatnonzero(np.diff([0, *map(int, record["is_target"]), 0]))
    return [tokenizer.decode(record["input_ids"][a:b]) for a, b in zip(edges[::2], edges[1::2])]


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(turns=st.lists(st.tuples(text, text), min_size=1, max_size=3), system=st.none() | text)
def test_a_conversation_round_trips_and_its_targets_are_its_answers(template, turns, system):
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    tokenizer, (record,) = encoded("conversations", {"messages": messages}, template)
    if template == "none":
        whole = "".join(m["content"] + "<|im_end|>" * (m["role"] == "assistant") for m in messages)
    else:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(record["input_ids"]) == whole
    assert answers_of(tokenizer, record) == [f"{answer}<|im_end|>" for _, answer in turns]
    assert record["targets"] == sum(len(answer.encode()) + 1 for _, answer in turns) and record["status"] == common.KEPT


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(prompt=text, answers=st.lists(text, min_size=2, max_size=5), margin=st.floats(-5, 5))
def test_all_answers_to_a_prompt_carry_the_same_prompt_tokens(template, prompt, answers, margin):
    row = {"prompt": prompt, "responses": answers, "margin": margin}
    tokenizer, records = encoded("preferences", row, template)
    assert [record["answers"] for record in records] == [len(answers)] + [0] * (len(answers) - 1)
    assert {record["margin"] for record in records} == {margin} and len({record["prompt"] for record in records}) == 1
    assert [answers_of(tokenizer, record) for record in records] == [[f"{answer}<|im_end|>"] for answer in answers]
    starts = [record["is_target"].index(True) for record in records]
    assert len({tuple(record["input_ids"][:start]) for record, start in zip(records, starts)}) == 1


def preference_corpus(rows: list[list[int]], packing: bool, seed: int) -> common.Corpus:
    """rows: the number of targets of each answer, of each prompt. Token ids are random, prompts of unlike length."""
    draw, columns = random.Random(seed), {name: [] for name in ("input_ids", "is_target", "length", "targets", "answers", "margin")}
    for row in rows:
        prompt = [draw.randrange(256) for _ in range(draw.randrange(1, 6))]
        for n, targets in enumerate(row):
            ids, marks = prompt + [draw.randrange(256) for _ in range(targets)], [False] * len(prompt) + [True] * targets
            record = (ids, marks, len(ids), targets, 0 if n else len(row), 0.5 * len(row))
            for name, value in zip(columns, record):
                columns[name].append(value)
    bests = np.array([n for n, answers in enumerate(columns["answers"]) if answers])
    args = common.make_parser("", output="unused", lr=1.0).parse_args(["--packing" if packing else "--no-packing", "--batch-size", "3"])
    return common.Corpus(datasets.Dataset.from_dict(columns), [(bests, 1.0)], args, pad_id=258, preferences=True)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=5), min_size=1, max_size=8), packing=st.booleans(), seed=st.integers(0, 99))
def test_pairs_are_all_pairs_of_a_prompt_and_weigh_one_together(rows, packing, seed):
    corpus, seen = preference_corpus(rows, packing, seed), []
    for chosen in [corpus.rows()[first : first + 3] for first in range(0, len(rows), 3)]:
        batch = corpus.collate(chosen)
        documents = [document for row in chosen for document in row]
        records = [corpus.table[document] for document in documents]
        assert batch["document"].tolist() == documents
        seen += documents
        pairs = {}
        for better, worse, weight, margin in zip(*(batch[name].tolist() for name in ("better", "worse", "weight", "margin"))):
            row = next(n for n, row in enumerate(chosen) if documents[better] in row)
            assert better < worse and documents[worse] in chosen[row] and margin == 0.5 * len(chosen[row])
            pairs.setdefault(row, []).append(((better, worse), weight))
        for n, row in enumerate(chosen):
            assert len({pair for pair, _ in pairs[n]}) == len(pairs[n]) == len(row) * (len(row) - 1) // 2
            assert sum(weight for _, weight in pairs[n]) == pytest.approx(1)
        flat = batch["input_ids"].flatten()
        assert batch["answer"].tolist() == [n for n, record in enumerate(records) for _ in range(record["is_target"].sum())]
        expected = np.concatenate([record["input_ids"][record["is_target"].astype(bool)] for record in records])
        assert batch["targets"].tolist() == expected.tolist() == flat[batch["target_index"] + 1].tolist()
        assert flat[batch["last"]].tolist() == [record["input_ids"][-1] for record in records]
        firsts = [records[documents.index(row[0])] for row in chosen]
        assert batch["targets"][batch["best"]].tolist() == [token for r in firsts for token in r["input_ids"][r["is_target"].astype(bool)]]
        prompts = [token for r in firsts for token, mark in zip(r["input_ids"][1:].tolist(), r["is_target"][1:]) if not mark]
        assert batch["other_targets"].tolist() == prompts == flat[batch["other_index"] + 1].tolist()
    assert sorted(seen) == list(range(sum(map(len, rows)))) and corpus.count(corpus.rows()) == len(rows)


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(text, min_size=1, max_size=12, unique=True), packing=st.booleans(), size=st.integers(1, 4))
def test_no_document_is_lost_between_file_and_batch(rows, packing, size, tmp_path_factory):
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", [{"text": row} for row in rows])
    packed, tokenizer = "--packing" if packing else "--no-packing", common.tiny_tokenizer()
    args = common.make_parser("", output="unused", lr=1.0).parse_args(
        ["--data", path, "--eval-fraction", "0", "--max-length", "64", packed, "--batch-size", str(size)]
    )
    corpus, _ = common.load_data(args, tokenizer, 320)
    found = []
    for batch in corpus.deal(corpus.rows()):
        lengths = batch["documents"][0] if packing else batch["attention_mask"].sum(1).tolist()
        pieces = batch["input_ids"][0].split(lengths) if packing else [ids[:length] for ids, length in zip(batch["input_ids"], lengths)]
        found += [tokenizer.decode(piece) for piece in pieces]
    assert sorted(found) == sorted(f"{row}<|im_end|>" for row in rows)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(2, 12), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_a_packed_document_gets_the_log_probabilities_it_gets_alone(lengths, seed):
    model = packed_model()
    ids = [torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(seed + n)) for n, length in enumerate(lengths)]

    def logps(documents):
        sizes = [document.shape[1] for document in documents]
        starts = np.cumsum([0, *sizes])
        index = torch.cat([torch.arange(start, start + size - 1) for start, size in zip(starts, sizes)])
        positions = torch.cat([torch.arange(size) for size in sizes])[None]
        packed = torch.cat(documents, dim=1)
        return model.target_logps(
            packed, packed[0][index + 1], index, (sizes, torch.tensor(starts, dtype=torch.int32), max(sizes)), position_ids=positions
        )

    with torch.no_grad():
        torch.testing.assert_close(logps(ids), torch.cat([logps([document]) for document in ids]), rtol=0, atol=1e-5)


@functools.cache
def packed_model():
    args = common.make_parser("", output="unused", lr=1.0).parse_args([])
    model = common.load_model(args, torch.float32, torch.device("cpu"))
    with torch.no_grad():  # sharper than at the start, so that a leak shows
        for p in model.parameters():
            p.mul_(8) if p.dim() == 2 else None
    return model


# ------------------------------------------------------------------------------------------------------- security


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_among_the_weights_is_refused_and_not_run(name, other_base, tmp_path):
    shutil.copytree(other_base, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.ones(128), "x": Touch(tmp_path / "touched")}, tmp_path / "model" / name)
    with pytest.raises(common.UserError, match=f"^--model {tmp_path / 'model'}: "):
        main("lora", *flags("lora", tmp_path / "run", "--model", tmp_path / "model"))
    assert not (tmp_path / "touched").exists() and not (tmp_path / "run").exists()


def forge(checkpoint: Path) -> None:
    """A manifest that fits what the checkpoint now holds."""
    manifest = {name: common.file_digest(checkpoint / name) for name in common.Run.FILES}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value)), lambda value, path: path.write_bytes(b"PK nothing")]
)
def test_a_pickle_in_a_checkpoint_is_refused_in_one_line_and_not_run(save, run_of, tmp_path):
    run = run_of("lora")
    last = run / "checkpoint" / "step-00000004"
    save({"optimizer": {}, "random": Touch(tmp_path / "touched"), "cuda_random": None}, last / "optimizer.pt")
    forge(last)
    with pytest.raises(common.UserError, match=f"^--resume: {last}/optimizer.pt is not what a run writes: [^\n]*$"):
        main("lora", *flags("lora", run, "--resume"))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("state", ["{}", "[]", "null", "7", '{"step": 4}'])
def test_a_foreign_state_is_refused_in_one_line(state, run_of):
    run = run_of("lora")
    last = run / "checkpoint" / "step-00000004"
    (last / "state.json").write_text(state)
    forge(last)
    with pytest.raises(common.UserError, match="another version of common.py"):
        main("lora", *flags("lora", run, "--resume"))


@pytest.mark.parametrize("path", ["../../../secret", "/etc/passwd", "../step-00000002/weights.safetensors"])
def test_paths_in_a_manifest_are_not_followed(path, run_of, monkeypatch):
    """Whatever else a manifest lists is not even opened."""
    run, opened = run_of("lora"), []
    last = run / "checkpoint" / "step-00000004"
    manifest = json.loads((last / "manifest.json").read_text())
    (last / "manifest.json").write_text(json.dumps({path: "0" * 64} | manifest))
    original = common.file_digest
    monkeypatch.setattr(common, "file_digest", lambda file: opened.append(Path(file)) or original(file))
    assert common.Run.damage(common.Run, last) is None
    assert opened == [last / name for name in common.Run.FILES]


REMOTE = {"auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel", "AutoTokenizer": ["evil.EvilTokenizer", None]}}


@pytest.mark.parametrize("file, change", [
    ("config.json", REMOTE | {"model_type": "evil", "architectures": ["EvilModel"]}),
    ("config.json", REMOTE),
    ("tokenizer_config.json", REMOTE | {"tokenizer_class": "EvilTokenizer"}),
])  # fmt: skip
def test_code_beside_a_model_runs_on_request_alone(file, change, other_base, tmp_path, monkeypatch):
    model, touched = tmp_path / "model", tmp_path / "touched"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(other_base, model)
    (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | change))
    (model / "evil.py").write_text(f"open({str(touched)!r}, 'w')\n")
    try:
        main("lora", *flags("lora", tmp_path / "run", "--model", model, "--max-steps", 0))
    except common.UserError as error:
        assert "\n" not in str(error)
    assert not touched.exists()
    with pytest.raises(Exception):  # it has no such classes: but it has run
        main("lora", *flags("lora", tmp_path / "again", "--model", model, "--max-steps", 0, "--trust-remote-code"))
    assert touched.exists()


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.system('touch TOUCHED') }}",
    "{{ self.__init__.__globals__.__builtins__.open('TOUCHED', 'w') }}", "{{ lipsum.__globals__['os'].popen('touch TOUCHED').read() }}",
    "{{ ''['__cl' + 'ass__'] }}", "{{ ''|attr('__class__') }}", "{{ raise_exception.__globals__ }}", "{{ '{0.__class__.__mro__}'.format(5) }}",
    "{% set _ = messages.append('more') %}{{ messages }}", "{{ namespace.__init__.__globals__ }}", "{% include '/etc/passwd' %}",
    "{{ joiner.__init__.__globals__.__builtins__.__import__('os').system('touch TOUCHED') }}",
    "{{ messages.__class__.__base__.__subclasses__()[0] }}",
]  # fmt: skip


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_cannot_leave_its_sandbox(escape, other_base, tmp_path):
    """In the tokenizer's own folder, where it comes with a model."""
    shutil.copytree(other_base, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(common.CHATML + escape.replace("TOUCHED", str(tmp_path / "touched")))
    try:
        main("lora", *flags("lora", tmp_path / "run", "--model", tmp_path / "model", "--inspect"))
    except common.UserError as error:
        assert "the chat template refuses" in str(error)
    assert not (tmp_path / "touched").exists()


ODD_ADAPTERS = {
    "another base": {"base_model_name_or_path": "/nowhere/else"}, "code": REMOTE | {"base_model_name_or_path": "evil/evil", "revision": "x"},
    "no rank": {"r": None}, "a text as rank": {"r": "16"}, "a huge rank": {"r": 10**12}, "rank 0": {"r": 0}, "a negative rank": {"r": -4},
    "no alpha": {"lora_alpha": None}, "infinite alpha": {"lora_alpha": math.inf}, "no number": {"lora_alpha": math.nan}, "a list": {"r": [4]},
    "another kind": {"peft_type": "IA3"}, "a kind that is no text": {"peft_type": {"a": 1}}, "foreign names": {"target_modules": ["../x", "lm_head"]},
    "another rank": {"r": 2}, "true": {"r": True},
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD_ADAPTERS)
def test_an_odd_adapter_config_is_refused_or_harmless(odd, finished, tmp_path, monkeypatch):
    """The base is what --model says: no path in the adapter is followed, and nothing in it is run."""
    adapter = tmp_path / "adapter"
    shutil.copytree(finished("lora"), adapter)
    config = json.loads((adapter / "adapter_config.json").read_text()) | ODD_ADAPTERS[odd]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    arguments = flags("lora", tmp_path / "run", "--adapter", adapter, "--max-steps", 0)
    if odd in ("another base", "code", "foreign names"):
        main("lora", *arguments)
        a, b = (load_file(folder / RESULTS[0]) for folder in (finished("lora"), tmp_path / "run"))
        assert all(torch.equal(a[key], b[key]) for key in a)
    else:
        with pytest.raises(common.UserError, match=f"^--adapter {adapter}.*$"):
            main("lora", *arguments)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"[" * 100_000, b"\xff\xfe", b"{", b'{"peft_type": "LORA"}'])
@pytest.mark.parametrize("name", TAKES_ADAPTER)
def test_an_adapter_folder_that_is_no_adapter_is_one_line(name, content, finished, tmp_path):
    config, weights = (finished(name) / file for file in ("adapter_config.json", RESULTS[0]))
    model = small_model()
    model.base_fingerprint, kind = "", json.loads(config.read_text())["peft_type"]
    (tmp_path / RESULTS[0]).write_bytes(weights.read_bytes())
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(common.UserError, match=f"^--adapter {tmp_path}"):
        common.load_adapter(str(tmp_path), model, kind)
    (tmp_path / "adapter_config.json").write_bytes(config.read_bytes())
    safetensors.torch.save_file({"prompt_embeddings": torch.tensor(5.0)}, tmp_path / RESULTS[0])
    with pytest.raises(common.UserError, match=f"^--adapter {tmp_path}"):
        common.load_adapter(str(tmp_path), model, kind)
    pickled = tmp_path / RESULTS[0]
    torch.save({"x": Touch(tmp_path / "touched")}, pickled)
    with pytest.raises(common.UserError, match=f"^--adapter {tmp_path}"):
        common.load_adapter(str(tmp_path), model, kind)
    assert not (tmp_path / "touched").exists()


audited = None  # the list that events go to, while a test watches


def audit(event, arguments):
    if audited is not None:
        audited.append((event, arguments))


@every_script
def test_nothing_is_written_elsewhere_no_network_no_pickle_no_program(name, tmp_path, monkeypatch):
    """What Python itself reports of a run: files opened to write, made, renamed or removed; sockets; programs; unpickling."""
    global audited
    if not getattr(audit, "installed", False):
        sys.addaudithook(audit)  # for ever, so that it is installed once
        audit.installed = True
    output, home = tmp_path / "run", tmp_path / "home"
    for folder in (home, tmp_path / "tmp", tmp_path / "here"):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path / "here")
    arguments = flags(name, output, *["--patience", 3] * (name != "ppo"), "--eval-every", 2)
    audited = events = []
    try:
        main(name, *arguments)
    finally:
        audited = None
    cache, wrote, others = Path(datasets.config.HF_DATASETS_CACHE), set(), []
    for event, details in events:
        if event == "open" and (
            isinstance(details[1],
                str) and set(details[1]) & set("wax+") or details[1] is None and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            wrote.add(details[0])
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.mkfifo", "os.utime", "shutil.rmtree"):
            wrote.add(details[0])
        elif event in ("os.rename", "os.link", "os.symlink", "shutil.copyfile", "shutil.move"):
            wrote |= set(details[:2])
        elif event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "pickle.find_class", "os.system", "os.exec", "os.posix_spawn",
            "subprocess.Popen",
                       "urllib.Request", "code.__new__"):  # fmt: skip
            others.append((event, details))
    wrote = {Path(os.fsdecode(path)) for path in wrote if isinstance(path, (str, bytes, os.PathLike))}
    beyond = {
        path for path in wrote if path.is_absolute() and not any(path.is_relative_to(folder) for folder in (output, cache, "/dev/null", "/proc"))
    }
    assert not {path for path in beyond if "__pycache__" not in path.parts}
    inside = {path.name for path in output.rglob("*")}
    assert {path.parts[0] for path in wrote if not path.is_absolute()} <= inside | {".unfinished"}  # rmtree names them below its folder
    for folder in (home, tmp_path / "tmp", tmp_path / "here"):
        assert not list(folder.rglob("*")), folder
    assert [details[1][:2] for event, details in others if event == "subprocess.Popen"] in ([], [["git", "rev-parse"]])
    assert not [event for event, _ in others if event != "subprocess.Popen"], others


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("name", ["lora", "full_ft"])
def test_the_system_sees_no_file_written_elsewhere(name, tmp_path):
    """The same as the system sees it, C++ and Rust included: files opened to write in the whole process and its children."""
    for folder in ("home", "tmp", "cache", "here"):
        (tmp_path / folder).mkdir()
    command = ["strace", "-f", "-qq", "-e", "trace=openat,open,creat,mkdir,rename,renameat,renameat2,unlink,connect", "-o", tmp_path / "trace",
        sys.executable,
               "-B", ROOT / f"{name}.py", *flags(name, tmp_path / "run", *RANDOM)]  # fmt: skip
    own = {"HOME": tmp_path / "home", "TMPDIR": tmp_path / "tmp", "HF_HOME": tmp_path / "cache", "HF_DATASETS_CACHE": tmp_path / "cache" / "datasets"}
    done = subprocess.run(
        [*map(str, command)], env=os.environ | {key: str(value) for key, value in own.items()}, cwd=tmp_path / "here", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    wrote, places = set(), (str(tmp_path / "run"), str(tmp_path / "cache"), "/dev/", "/proc/", "/sys/")
    for line in (tmp_path / "trace").read_text(errors="replace").splitlines():
        if " = -1 " not in line and ("O_WRONLY" in line or "O_RDWR" in line or "O_CREAT" in line or "mkdir(" in line or "rename" in line):
            wrote |= {part for part in line.split('"')[1::2] if part.startswith("/")}
    print(f"{name}: {len(wrote)} paths written")
    assert wrote and not {path for path in wrote if not path.startswith(places) and not path.startswith(str(tmp_path / "tmp"))}
    assert not [path for folder in ("home", "tmp", "here") for path in (tmp_path / folder).rglob("*")]


# ----------------------------------------------------------------------------------------------------------- soak


def usage() -> tuple[int, int]:
    """(open files, resident MiB) of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/fd")), pages * resource.getpagesize() // 2**20


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("steps", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_long_run_grows_in_nothing(steps, tmp_path, monkeypatch):
    """Logged, evaluated and saved many times over: after the first third, no more open files and no more memory."""
    original, seen = common.Run.end_step, {}

    def end_step(run, *arguments):
        original(run, *arguments)
        if run.step in (steps // 3, steps - 1):
            seen[run.step] = usage()

    monkeypatch.setattr(common.Run, "end_step", end_step)
    began, more = time.time(), ["--max-steps", steps, "--save-every", steps // 15, "--eval-every", steps // 15, "--log-every", 3, "--lr", "0.001"]
    main("lora", *flags("lora", tmp_path / "run", *more))
    (files, memory), (files_later, memory_later) = seen.values()
    print(f"{steps} steps in {time.time() - began:.0f} s: {files} -> {files_later} open files, {memory} -> {memory_later} MiB")
    assert files_later == files and memory_later <= memory + 16

"""The run: schedule, metrics, checkpoints, resumption, signals, and the faults that a user meets while training."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import RANDOM, ROOT, read_metrics, run_script, write_rows
from safetensors.torch import load_file

import common
import full_ft
import lora

ROWS = [{"prompt": f"Repeat {c} {n} times.", "completion": c * n} for n in range(1, 9) for c in "abcdefg"]
TWELVE = ["--max-steps", "12", "--batch-size", "1", "--max-length", "128", "--samples", "0", "--lr", "0.01", "--log-every", "2",
          "--save-every", "5", "--eval-every", "4"]  # fmt: skip


def flags(tmp_path, name, *more):
    return ["--data", write_rows(tmp_path / "rows.jsonl", ROWS), "--output", str(tmp_path / name), *TWELVE, *more]


def without_times(entries):
    drop = {"tokens_per_second", "peak_memory_gib", "seconds"}
    return [{key: value for key, value in entry.items() if key not in drop} for entry in entries[1:]]


class Killed(BaseException):
    pass


def kill_after(monkeypatch, step):
    """As SIGKILL would between two steps: nothing after this step is logged or saved."""
    original = common.Run.end_step

    def end_step(self, *args):
        if self.step == step:
            raise Killed
        original(self, *args)

    monkeypatch.setattr(common.Run, "end_step", end_step)


@pytest.mark.parametrize("script, more", [(lora, ["--dropout", "0.1"]), (full_ft, []), (full_ft, ["--step-in-backward", "--max-grad-norm", "0"])])
@pytest.mark.parametrize("at", [7, 11])
def test_a_resumed_run_equals_one_that_was_never_stopped(script, more, at, tmp_path, monkeypatch):
    """Bit for bit, in the middle of an epoch and of a logging window: metrics, weights, with dropout's random numbers."""
    script.main(flags(tmp_path, "whole", *more))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, at)
        script.main(flags(tmp_path, "parts", *more))
    script.main(flags(tmp_path, "parts", *more, "--resume"))
    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    assert without_times(whole) == without_times(parts)
    name = "adapter_model.safetensors" if script is lora else "model.safetensors"
    a, b = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_exit(number, code, tmp_path):
    command = [sys.executable, str(ROOT / "lora.py"), *RANDOM, *flags(tmp_path, "run"), "--max-steps", "5000", "--save-every", "10"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not list((tmp_path / "run" / "checkpoint").glob("step-*")) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == code and "--resume" in printed and "Traceback" not in errors
    (folder,) = (tmp_path / "run" / "checkpoint").iterdir()
    step = json.loads((folder / "state.json").read_text())["step"]
    assert f"after step {step}" in printed


def test_ctrl_c_saves_though_the_reader_of_its_output_is_gone(tmp_path):
    """In `python lora.py 2>&1 | tee log` it ends tee as well."""
    command = [sys.executable, str(ROOT / "lora.py"), *RANDOM, *flags(tmp_path, "run"), "--max-steps", "5000", "--save-every", "5000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.time() + 120
    while not (metrics.exists() and '"loss"' in metrics.read_text()) and time.time() < deadline:
        time.sleep(0.05)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and len(list((tmp_path / "run" / "checkpoint").iterdir())) == 1


def test_only_a_later_signal_is_a_second_request(monkeypatch):
    """A scheduler tells every process of a job, and torchrun tells its own once more."""
    run, now = common.Run.__new__(common.Run), iter([100.0, 100.5, 104.0])
    run.signal, run.asked = None, 0.0
    monkeypatch.setattr(common.time, "monotonic", lambda: next(now))
    run.on_signal(signal.SIGTERM, None)
    run.on_signal(signal.SIGTERM, None)
    with pytest.raises(SystemExit) as stopped:
        run.on_signal(signal.SIGTERM, None)
    assert run.signal == signal.SIGTERM and stopped.value.code == 143


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    (tmp_path / "run").mkdir()
    handle = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(common.UserError, match="another process writes to"):
        lora.main(flags(tmp_path, "run"))
    assert not list((tmp_path / "run").iterdir())
    os.close(handle)
    lora.main(flags(tmp_path, "run", "--max-steps", "1"))


def test_a_folder_that_is_read_or_that_no_run_has_written_is_no_output(tmp_path):
    """The result would replace what lies there."""
    model = common.tiny_model()
    model.padded_attention = "sdpa"
    common.save_model(tmp_path / "model", model, common.tiny_tokenizer())
    before = sorted(path.name for path in (tmp_path / "model").iterdir())
    for more, match in ((["--model", str(tmp_path / "model")], "would replace --model"), ([], "no metrics.jsonl"), (["--resume"], "no metrics.jsonl")):
        with pytest.raises(common.UserError, match=match):
            lora.main(flags(tmp_path, "model", *more))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == before
    shutil.copytree(tmp_path / "model", tmp_path / "run" / "merged")
    with pytest.raises(common.UserError, match="holds merged, and no metrics.jsonl"):
        lora.main(flags(tmp_path, "run"))
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(common.UserError, match="would replace --model"):  # with --merge it would
        lora.main(flags(tmp_path, "run", "--model", str(tmp_path / "run" / "merged")))


def test_a_closed_stdout_is_no_reason_to_fail(tmp_path):
    script = f"import os, sys; sys.stdout = None; sys.path.insert(0, {str(ROOT)!r}); import common, lora; common.launch(lora.main, '')"
    run = subprocess.run([sys.executable, "-c", script, *RANDOM, *flags(tmp_path, "run", "--max-steps", "1")], capture_output=True, text=True)
    assert run.returncode == 0 and read_metrics(tmp_path / "run")[-1]["done"], run.stderr


def test_ranks_that_see_different_things_are_refused(tmp_path, monkeypatch):
    """A second machine with another --output, say, would begin at step 0 where the first one resumes."""

    def gather(seen, mine):
        seen[:] = [mine, [mine[0], ["step-00000005"], mine[2]]]

    build = common.Run.what_must_not_differ
    monkeypatch.setattr(common.Run, "what_must_not_differ", lambda run: (monkeypatch.setattr(common, "world_size", lambda: 2), build(run))[1])
    monkeypatch.setattr(common.dist, "all_gather_object", gather)
    with pytest.raises(common.UserError, match="the ranks see different data"):
        lora.main(flags(tmp_path, "run", "--resume"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def finished(tmp_path, *more):
    lora.main(flags(tmp_path, "run", *more))
    return tmp_path / "run" / "checkpoint" / "step-00000012"


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.pt", "state.json"])
def test_a_flipped_byte_is_found(name, tmp_path):
    path = finished(tmp_path) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(common.UserError, match=f"{name} is damaged"):
        lora.main(flags(tmp_path, "run", "--resume"))


def test_a_missing_file_is_found(tmp_path):
    (finished(tmp_path) / "optimizer.pt").unlink()
    with pytest.raises(common.UserError, match="damaged"):
        lora.main(flags(tmp_path, "run", "--resume"))


def test_an_unfinished_checkpoint_is_never_taken(tmp_path, monkeypatch):
    """Killed while the second checkpoint is being written: the first one counts."""
    save_file = common.safetensors.torch.save_file
    with monkeypatch.context() as patch, pytest.raises(Killed):

        def fail(tensors, path, **options):
            if (tmp_path / "run" / "checkpoint" / "step-00000005").exists():
                path.write_bytes(b"half of a f")
                raise Killed
            save_file(tensors, path, **options)

        patch.setattr(common.safetensors.torch, "save_file", fail)
        lora.main(flags(tmp_path, "run"))
    assert (tmp_path / "run" / "checkpoint" / ".unfinished").exists()
    lora.main(flags(tmp_path, "run", "--resume"))
    lora.main(flags(tmp_path, "whole"))
    assert without_times(read_metrics(tmp_path / "run")) == without_times(read_metrics(tmp_path / "whole"))
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()] == ["step-00000012"]


@pytest.mark.parametrize("changed, match", [
    (["--lr", "0.02"], "--lr"),
    (["--rank", "8"], "--rank"),
    (["--seed", "1"], "--seed"),
    (["--schedule", "linear"], "--schedule"),
    (["--batch-size", "2"], "rows a step"),
])  # fmt: skip
def test_resuming_another_run_is_refused(changed, match, tmp_path):
    finished(tmp_path)
    with pytest.raises(common.UserError, match=match):
        lora.main([*flags(tmp_path, "run", "--resume"), *changed])


def test_a_refusal_names_the_flag_as_it_is_written(tmp_path):
    """Not argparse's name for it: --lora-rank lies in args.rank."""
    import sft

    short = ["--data", str(ROOT / "examples" / "task.jsonl"), "--max-steps", "2", "--max-length", "64", "--samples", "0", "--eval-fraction", "0"]
    sft.main([*short, "--lora-rank", "2", "--output", str(tmp_path / "run")])
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(common.UserError, match="--resume: --lora-rank is not .*: 2, now 4"):
        sft.main([*short, "--lora-rank", "4", "--output", str(tmp_path / "run"), "--resume"])


def test_resuming_with_other_data_or_another_model_is_refused(tmp_path):
    finished(tmp_path)
    arguments = flags(tmp_path, "run", "--resume")
    write_rows(tmp_path / "rows.jsonl", ROWS[1:])
    with pytest.raises(common.UserError, match="data"):
        lora.main(arguments)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    other = common.tiny_model()
    other.padded_attention = "sdpa"
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    common.save_model(tmp_path / "other", other, common.tiny_tokenizer())
    with pytest.raises(common.UserError, match="base model"):
        lora.main([*arguments, "--model", str(tmp_path / "other")])


def test_an_unfinished_run_is_not_overwritten(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 7)
        lora.main(flags(tmp_path, "run"))
    with pytest.raises(common.UserError, match="not finished: --resume it"):
        lora.main(flags(tmp_path, "run"))
    lora.main(flags(tmp_path, "run", "--resume"))
    lora.main(flags(tmp_path, "run"))  # a finished one is
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()] == ["step-00000012"]


def test_a_lost_metrics_file_loses_no_checkpoint(tmp_path):
    folder = finished(tmp_path)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    lora.main(flags(tmp_path, "run", "--resume"))
    assert folder.exists() and "run" in read_metrics(tmp_path / "run")[0]


def test_the_same_data_by_another_path_resumes(tmp_path):
    finished(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    arguments = flags(tmp_path, "run", "--resume")
    arguments[arguments.index("--data") + 1] = write_rows(tmp_path / "elsewhere" / "same.jsonl", ROWS)
    lora.main(arguments)


def test_resuming_a_finished_run_trains_nothing(tmp_path):
    finished(tmp_path)
    before = read_metrics(tmp_path / "run")
    lora.main(flags(tmp_path, "run", "--resume"))
    assert without_times(read_metrics(tmp_path / "run")) == without_times(before)


def test_resume_without_a_checkpoint_starts_at_step_0(tmp_path, capsys):
    lora.main(flags(tmp_path, "run", "--resume"))
    assert "starting at step 0" in capsys.readouterr().out and read_metrics(tmp_path / "run")[-1]["step"] == 12


@pytest.mark.parametrize("script, names", [(lora, "lora_B"), (full_ft, "model.norm.weight")])
def test_a_loss_that_is_not_finite_stops_the_run(script, names, tmp_path, monkeypatch):
    """A weight becomes infinite after step 6: the run stops at the next logged step and names step 5's checkpoint."""
    original = common.Run.end_step

    def end_step(self, *args):
        original(self, *args)
        if self.step == 6:
            with torch.no_grad():
                next(p for p, name in self.trained.items() if names in name).fill_(float("inf"))

    monkeypatch.setattr(common.Run, "end_step", end_step)
    with pytest.raises(common.UserError, match=r"step 8: .*not finite.*step-00000005"):
        script.main(flags(tmp_path, "run", "--eval-every", "100"))
    weights = load_file(tmp_path / "run" / "checkpoint" / "step-00000005" / "weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_trainable_parameter_without_a_gradient_is_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0](torch.randn(1, 2)).sum().backward()
    with pytest.raises(common.UserError, match="2 trainable parameters get no gradient, the first of them 1.weight"):
        common.check_gradients(model)


def schedule(name, ratio, total=100):
    args = common.make_parser("", output="x", lr=1.0).parse_args(["--schedule", name, "--warmup-ratio", str(ratio)])
    return [common.learning_rate(step, total, args) for step in range(total)]


def test_learning_rate_schedules():
    cosine, linear, constant = schedule("cosine", 0.1), schedule("linear", 0.1), schedule("constant", 0.1)
    assert cosine[:10] == linear[:10] == constant[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert cosine[55] == pytest.approx(0.5) and linear[55] == pytest.approx(0.5) and constant[55] == 1
    assert 0 < cosine[-1] < cosine[-2] and 0 < linear[-1] < linear[-2]
    assert schedule("cosine", 0)[0] == 1


def test_the_logged_loss_is_the_exact_token_weighted_mean(tmp_path):
    """Steps of unlike target counts: the loss over a window equals the sum of NLL over the sum of targets."""
    lora.main(flags(tmp_path, "one", "--log-every", "1"))
    lora.main(flags(tmp_path, "four", "--log-every", "4"))
    args = common.make_parser("", output="x", lr=1.0).parse_args(flags(tmp_path, "one"))
    tokenizer, size = common.load_tokenizer(args)
    corpus, _ = common.load_data(args, tokenizer, size)
    counts = [targets for _, _, _, targets in corpus.steps()]
    losses = [entry["loss"] for entry in read_metrics(tmp_path / "one") if "loss" in entry]
    first = sum(n * loss for n, loss in zip(counts[:4], losses[:4])) / sum(counts[:4])
    assert next(entry for entry in read_metrics(tmp_path / "four") if "loss" in entry)["loss"] == pytest.approx(first, rel=1e-6)
    assert len(set(counts[:4])) > 1


def test_decay_touches_matrices_alone():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    decayed, spared = common.decay_groups(model, 0.1)
    assert [p.dim() for p in decayed["params"]] == [2] and [p.dim() for p in spared["params"]] == [1, 1, 1]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


def test_a_full_disk_gives_one_line_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    """The second checkpoint fails as on a full disk: one line, exit code 1, and the first checkpoint loads."""
    save_file = common.safetensors.torch.save_file

    def fail(tensors, path, **options):
        if (tmp_path / "run" / "checkpoint" / "step-00000005").exists():
            raise OSError(28, "No space left on device", str(path))
        save_file(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(common.safetensors.torch, "save_file", fail)
        with pytest.raises(SystemExit) as stopped:
            common.launch(lambda: lora.main(flags(tmp_path, "run")), "")
    assert stopped.value.code == 1
    lora.main(flags(tmp_path, "run", "--resume"))
    assert read_metrics(tmp_path / "run")[-1]["done"]


@pytest.mark.parametrize("error, code", [(common.UserError("bad"), 2), (OSError(28, "full"), 1), (ValueError("ours"), 1)])
def test_a_rank_that_fails_does_not_wait_for_the_others(error, code, monkeypatch, capsys):
    """With NCCL, to leave the process group in order would wait for ranks that wait for this one."""

    def fail():
        raise error

    def leave(code):
        raise SystemError(code)  # what nothing in launch catches

    monkeypatch.setattr(common, "world_size", lambda: 2)
    monkeypatch.setattr(common.os, "_exit", leave)
    monkeypatch.setattr(common.dist, "destroy_process_group", lambda: pytest.fail("waits"))
    with pytest.raises(SystemError) as left:
        common.launch(fail, "")
    assert left.value.args == (code,) and str(error) in capsys.readouterr().err


FAILS = """import os, sys, time
sys.path.insert(0, sys.argv.pop(1))
import common
def main():
    time.sleep(60 * (os.environ["RANK"] not in sys.argv[1:]))
    raise common.UserError("no such file")
common.launch(main, "")
"""


@pytest.mark.parametrize("failing", [["0", "1"], ["1"]])
def test_what_ranks_find_wrong_is_said_once(failing, tmp_path):
    """By rank 0; what another rank alone finds (a file that its machine does not have), by that one."""
    (tmp_path / "fails.py").write_text(FAILS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tmp_path / "fails.py", ROOT, *failing]
    run = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and run.stderr.count("error: no such file") == 1


def test_out_of_memory_says_what_to_try(capsys):
    def run_out():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More text")

    with pytest.raises(SystemExit) as stopped:
        common.launch(run_out, "--gradient-checkpointing; a smaller --batch-size")
    printed = capsys.readouterr().err
    assert stopped.value.code == 1 and printed.startswith("error: out of GPU memory") and "--gradient-checkpointing" in printed


@pytest.mark.parametrize("more, match", [
    (["--batch-size", "0"], "--batch-size"),
    (["--lr", "fast"], "--lr"),
    (["--eval-fraction", "1"], "--eval-fraction"),
    (["--no-such-flag"], "--no-such-flag"),
    (["--model", "no/such-model"], "--model no/such-model"),
    (["--data", "missing.jsonl"], "missing.jsonl"),
])  # fmt: skip
def test_bad_usage_is_one_line_and_exit_code_2(more, match, tmp_path):
    run = run_script("lora.py", "--output", tmp_path / "out", *more)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and match in run.stderr and "Traceback" not in run.stderr
    assert run.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["lora.py", "full_ft.py"])
def test_help_shows_every_default(script):
    run = run_script(script, "--help")
    assert run.returncode == 0
    for flag in ("--model", "--data", "--max-length", "--schedule", "--packing", "--checkpoint-blocks", "--resume", "--template"):
        assert flag in run.stdout
    assert run.stdout.count("(default:") >= 25

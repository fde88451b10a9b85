"""full_ft.py against transformers' Trainer, one process against two, and each of its modes against the plain one."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from conftest import RANDOM, ROOT, read_metrics, run_script, write_rows
from safetensors.torch import load_file

import common
import full_ft

ROWS = [{"prompt": f"Say {word} {n} times.", "completion": " ".join([word] * n)} for n in range(1, 7) for word in ("yes", "no", "maybe", "好", "never", "now")]


def train(folder, *flags, data=None):
    """A short run of full_ft.py in this process -> its weights."""
    source = data or write_rows(folder.parent / "rows.jsonl", ROWS)
    common_flags = ["--data", source, "--output", str(folder), "--eval-fraction", "0", "--samples", "0", "--lr", "0.002", "--max-length", "128"]
    full_ft.main([*common_flags, *flags])
    return load_file(folder / "model.safetensors")


def assert_same(ours, theirs, atol):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")


SIX_STEPS = ["--max-steps", "6", "--no-packing", "--batch-size", "3", "--grad-accum", "2", "--warmup-ratio", "0.3", "--weight-decay", "0.1", "--max-grad-norm", "0.5"]


def test_six_steps_equal_the_trainers(tmp_path):
    """Accumulation over unequal target counts, clipping, warmup and cosine, decay groups: transformers' Trainer ends with the
    same weights. It is given our schedule, since its own wastes the first update at learning rate 0."""
    ours = train(tmp_path / "ours", *SIX_STEPS, "--lr", "0.0005")
    args = common.make_parser("", output="unused", lr=0.0005).parse_args(["--data", str(tmp_path / "rows.jsonl"), "--eval-fraction", "0", "--max-length", "128", *SIX_STEPS])
    tokenizer, vocab_size = common.load_tokenizer(args)
    corpus, _ = common.load_data(args, tokenizer, vocab_size)
    documents = [document for row in corpus.rows() for document in row]
    rows = []
    for record in (corpus.table[document] for document in documents):
        labels = [token if mark else -100 for token, mark in zip(record["input_ids"].tolist(), record["is_target"].tolist())]
        rows.append({"input_ids": record["input_ids"].tolist(), "labels": labels})

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(rows)

    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path / "theirs"), max_steps=6, per_device_train_batch_size=3, gradient_accumulation_steps=2, learning_rate=0.0005,
        weight_decay=0.1, max_grad_norm=0.5, report_to=[], save_strategy="no", use_cpu=True, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    model = common.tiny_model()
    optimizer = torch.optim.AdamW(common.decay_groups(model, 0.1), lr=0.0005)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: common.learning_rate(step, 6, args) / 0.0005)
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = InOrder(model, settings, train_dataset=rows, data_collator=collator, optimizers=(optimizer, schedule))
    trainer.train()
    theirs = {name: tensor for name, tensor in model.state_dict().items() if name in ours}
    assert_same(ours, theirs, atol=1e-6)
    assert max((ours[name] - tensor).abs().max() for name, tensor in common.tiny_model().state_dict().items() if name in ours) > 1e-3


def test_every_parameter_moves(tmp_path):
    ours = train(tmp_path / "run", "--max-steps", "2")
    start = common.tiny_model().state_dict()
    still = [name for name in ours if torch.equal(ours[name], start[name])]
    assert not still


@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
def test_8x1_equals_4x2_equals_1x8(packing, tmp_path):
    """The same gradient to float32's precision: read from Adam's first moment after one step, which is a tenth of it."""

    def gradients(size, accum):
        train(tmp_path / size, "--max-steps", "1", packing, "--max-grad-norm", "0", "--batch-size", size, "--grad-accum", accum)
        saved = torch.load(tmp_path / size / "checkpoint" / "step-00000001" / "optimizer.pt", weights_only=True)
        return {name: state["exp_avg"] for name, state in saved["optimizer"].items()}

    whole = gradients("8", "1")
    for other in (gradients("4", "2"), gradients("1", "8")):
        for name in whole:
            torch.testing.assert_close(whole[name], other[name], rtol=0, atol=1e-5 * float(whole[name].abs().max()))


def test_step_in_backward_equals_the_plain_step(tmp_path):
    flags = ["--max-steps", "4", "--max-grad-norm", "0", "--weight-decay", "0.1", "--l2-sp", "0.01"]
    assert_same(train(tmp_path / "a", *flags), train(tmp_path / "b", *flags, "--step-in-backward"), atol=1e-6)


def test_l2_sp_is_the_gradient_of_its_equation():
    torch.manual_seed(0)
    p, p0 = torch.nn.Parameter(torch.randn(4, 3)), torch.randn(4, 3)
    p.grad = torch.zeros_like(p)
    full_ft.add_l2_sp([p], [p0], 0.3)
    (expected,) = torch.autograd.grad(0.3 * (p - p0).square().sum(), p)
    torch.testing.assert_close(p.grad, expected)


def test_l2_sp_keeps_the_weights_near_their_start(tmp_path):
    start = common.tiny_model().state_dict()

    def drift(*flags):
        weights = train(tmp_path / f"run{len(flags)}", "--max-steps", "10", *flags)
        return sum((weights[name] - start[name]).square().sum().item() for name in weights)

    assert drift("--l2-sp", "1") < 0.8 * drift()


def test_masters_move_where_pure_bfloat16_does_not(tmp_path):
    """At a learning rate of 1e-5 most updates of a bfloat16 weight round to nothing; a float32 master takes them all."""
    start = {name: p.to(torch.bfloat16) for name, p in common.tiny_model().state_dict().items()}
    flags = ["--max-steps", "1", "--lr", "1e-5", "--dtype", "bfloat16", "--warmup-ratio", "0"]
    train(tmp_path / "masters", *flags)
    train(tmp_path / "pure", *flags, "--pure-bfloat16")
    masters = load_file(next((tmp_path / "masters" / "checkpoint").iterdir()) / "weights.safetensors")
    pure = load_file(next((tmp_path / "pure" / "checkpoint").iterdir()) / "weights.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert masters[name].dtype == torch.float32 and pure[name].dtype == torch.bfloat16
    assert (masters[name] != common.tiny_model().state_dict()[name]).float().mean() > 0.99
    assert (pure[name] != start[name]).float().mean() < 0.9
    assert load_file(tmp_path / "masters" / "model.safetensors")[name].dtype == torch.bfloat16


@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged_adamw8bit"])
def test_8_bit_states_follow_the_plain_ones(optimizer, tmp_path):
    plain = train(tmp_path / "plain", "--max-steps", "8")
    rounded = train(tmp_path / "rounded", "--max-steps", "8", "--optimizer", optimizer)
    start = common.tiny_model().state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    moved, apart = (plain[name] - start[name]).norm(), (plain[name] - rounded[name]).norm()
    assert 0 < apart < 0.2 * moved


@pytest.mark.parametrize("flags, match", [
    (["--step-in-backward"], "--max-grad-norm 0"),
    (["--step-in-backward", "--max-grad-norm", "0", "--grad-accum", "2"], "--grad-accum 1"),
    (["--step-in-backward", "--max-grad-norm", "0", "--offload"], "one process"),
    (["--optimizer", "adamw8bit", "--offload"], "bitsandbytes cannot"),
    (["--pure-bfloat16", "--offload"], "one device"),
])  # fmt: skip
def test_modes_that_exclude_each_other_are_refused(flags, match, tmp_path):
    with pytest.raises(common.UserError, match=match):
        train(tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_the_result_is_a_hugging_face_folder(tmp_path):
    weights = train(tmp_path / "run", "--max-steps", "1")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    assert model.config.architectures == ["LlamaForCausalLM"] and tokenizer.chat_template == common.CHATML
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 257
    torch.testing.assert_close(model.model.norm.weight, weights["model.norm.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- sharded: FSDP2 over gloo on the CPU ---


def torchrun(ranks: int, *args) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(ROOT / "full_ft.py"), *RANDOM]
    return subprocess.run([*launch, *map(str, args)], capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


SHARDED = ["--max-steps", "3", "--eval-fraction", "0.2", "--samples", "1", "--lr", "0.00005", "--max-length", "128", "--l2-sp", "0.01", "--log-every", "1"]


@pytest.mark.parametrize("flags", [[], ["--offload"], ["--gradient-checkpointing", "--no-packing"]])
def test_two_ranks_give_one_processs_weights(flags, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    one, two = tmp_path / "one", tmp_path / "two"
    plain = [flag for flag in flags if flag != "--offload"]
    full_ft.main(["--data", data, "--output", str(one), "--batch-size", "2", "--grad-accum", "2", *SHARDED, *plain])
    run = torchrun(2, "--data", data, "--output", two, "--batch-size", "1", "--grad-accum", "2", *SHARDED, *flags)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("held-out loss") == 2 and "--- after ---" in run.stdout  # only rank 0 speaks; generation works sharded
    assert_same(load_file(one / "model.safetensors"), load_file(two / "model.safetensors"), atol=1e-6)
    for a, b in zip(read_metrics(one)[1:-1], read_metrics(two)[1:-1]):
        for key in a.keys() & {"loss", "eval_loss", "grad_norm", "lr", "tokens", "step", "epoch"}:
            assert a[key] == pytest.approx(b[key], rel=1e-5), key
    assert transformers.AutoModelForCausalLM.from_pretrained(two).config.architectures == ["LlamaForCausalLM"]


def test_offload_in_one_process_gives_the_same_weights(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    run = run_script("full_ft.py", "--data", data, "--output", tmp_path / "offloaded", "--offload", *SHARDED)
    assert run.returncode == 0, run.stderr
    full_ft.main(["--data", data, "--output", str(tmp_path / "plain"), *SHARDED])
    assert_same(load_file(tmp_path / "plain" / "model.safetensors"), load_file(tmp_path / "offloaded" / "model.safetensors"), atol=1e-6)


def test_a_checkpoint_of_one_process_loads_into_shards(tmp_path):
    """Weights and AdamW's states at step 2 of 3, into two ranks' shards and into one process's in host memory."""
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    flags = ["--data", data, *SHARDED, "--save-every", "2", "--keep", "2"]
    full_ft.main([*flags, "--output", str(tmp_path / "one"), "--batch-size", "2"])
    for name in ("two", "offloaded"):
        shutil.copytree(tmp_path / "one", tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        shutil.rmtree(tmp_path / name / "checkpoint" / "step-00000003")
    two = torchrun(2, *flags, "--output", tmp_path / "two", "--batch-size", "1", "--resume")
    offloaded = run_script("full_ft.py", *flags, "--output", tmp_path / "offloaded", "--batch-size", "2", "--offload", "--resume")
    for name, run in (("two", two), ("offloaded", offloaded)):
        assert run.returncode == 0 and "resumed after step 2" in run.stdout, run.stderr[-3000:]
        assert_same(load_file(tmp_path / "one" / "model.safetensors"), load_file(tmp_path / name / "model.safetensors"), atol=1e-6)


def test_a_checkpoint_loads_at_another_world_size(tmp_path):
    """Two ranks are stopped by SIGTERM somewhere in the run, one process goes on: the weights of one process throughout."""
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    flags = ["--data", data, *SHARDED, "--max-steps", "40", "--save-every", "2", "--samples", "0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ROOT / "full_ft.py", *RANDOM, *flags]
    process = subprocess.Popen([*map(str, command), "--output", str(tmp_path / "two"), "--batch-size", "1"], stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not list((tmp_path / "two" / "checkpoint").glob("step-*")) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert "stopped by a signal" in printed and not (tmp_path / "two" / "model.safetensors").exists()
    for name in ("one", "two"):
        full_ft.main([*flags, "--output", str(tmp_path / name), "--batch-size", "2", "--resume"])
    assert_same(load_file(tmp_path / "one" / "model.safetensors"), load_file(tmp_path / "two" / "model.safetensors"), atol=2e-5)
    steps = [[entry["step"] for entry in read_metrics(tmp_path / name) if "loss" in entry] for name in ("one", "two")]
    assert steps[0] == steps[1] == list(range(1, 41))


SLOW = """import os, sys, time
sys.path.insert(0, sys.argv.pop(1))
import common, full_ft
digest, pid = common.file_digest, sys.argv.pop(1)
common.file_digest = lambda path: (time.sleep("unfinished" in str(path)), digest(path))[1]  # a large model's checkpoint takes long
if os.environ["RANK"] == "1":
    open(pid, "w").write(str(os.getpid()))
common.launch(full_ft.main, "")
"""


def test_a_signal_to_one_rank_lets_the_other_finish_the_checkpoint(tmp_path):
    """torchrun ends all ranks when it sees one end: rank 1 must not leave before rank 0 has written."""
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tmp_path / "slow.py", ROOT, tmp_path / "pid", *RANDOM]
    more = ["--max-steps", "100000", "--save-every", "100000", "--samples", "0", "--eval-fraction", "0", "--log-every", "1", "--output", tmp_path / "run"]
    process = subprocess.Popen(list(map(str, [*command, *more])), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.time() + 120
    while (not metrics.exists() or '"loss"' not in metrics.read_text()) and time.time() < deadline:
        time.sleep(0.1)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert "stopped by a signal" in printed and len(list((tmp_path / "run" / "checkpoint").glob("step-*"))) == 1


BETWEEN = """import contextlib, os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import common, sft

def raising(function):  # with a signal at its end, once, on rank 1
    def wrapped(*args):
        out = function(*args)
        if common.rank() == 1 and not raised:
            raised.append(signal.raise_signal(signal.SIGTERM))
        return out
    return wrapped

over_ranks, save_checkpoint = common.over_ranks, common.Run.save_checkpoint
for name in ("whole", "agreeing", "saving"):
    raised, flags = [], [*sys.argv[2:], "--output", f"{sys.argv[1]}/{name}"]
    common.over_ranks = raising(over_ranks) if name == "agreeing" else over_ranks
    common.Run.save_checkpoint = raising(save_checkpoint) if name == "saving" else save_checkpoint
    with contextlib.suppress(SystemExit):
        sft.main(flags)
    if name != "whole":
        sft.main([*flags, "--resume"])
"""


def test_a_signal_at_any_place_of_a_step_stops_all_ranks(tmp_path):
    """One that comes to one rank after the ranks have agreed, or while they do, stops the next step. --resume goes on bit for bit, each
    rank with its own noise (--neftune)."""
    (tmp_path / "between.py").write_text(BETWEEN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tmp_path / "between.py", ROOT, tmp_path, *RANDOM]
    more = ["--data", write_rows(tmp_path / "rows.jsonl", ROWS), "--max-steps", "4", "--save-every", "1", "--samples", "0", "--eval-fraction", "0",
            "--batch-size", "1", "--no-packing", "--neftune", "5"]  # fmt: skip
    run = subprocess.run(list(map(str, [*command, *more])), capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("stopped by a signal after step 2") == run.stdout.count("resumed after step 2") == 2
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    for name in ("agreeing", "saving"):
        assert_same(whole, load_file(tmp_path / name / "model.safetensors"), atol=0)

"""tests/benchmark.py and tests/gpu.py run and print their tables; the figures depend on the
machine."""

import argparse
import importlib
import json
import math
import re
import subprocess
import sys
import types
from xml.etree import ElementTree

import benchmark
import gpu
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT
from torch.nn.attention import varlen

import common


def cells(out: str) -> list[list[str]]:
    """The cells of a printed table's rows, without the head."""
    rows = [line for line in out.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def table(*flags) -> list[list[str]]:
    command = [sys.executable, str(ROOT / "tests" / "benchmark.py"), "--shape", "tiny"]
    options = {"capture_output": True, "text": True, "timeout": 300, "check": True}
    return cells(subprocess.run([*command, "--steps", "4", *flags], **options).stdout)


@pytest.mark.slow
def test_repeated_runs_of_both_sides_give_positive_figures():
    rows = table("--methods", "full", "reward", "--lora", "--repeats", "2")
    assert [row[0] for row in rows] == ["full", "reward"]
    assert all(float(cell.replace(",", "").split()[0]) > 0 for row in rows for cell in row[1:4])


@pytest.mark.slow
def test_packing_against_padding():
    (row,) = table("--against", "padding", "--repeats", "1")
    assert row[0] == "lora" and float(row[5]) > float(row[4])  # padding takes memory
    assert float(row[3].split()[0]) > 2  # and time


@pytest.mark.slow
def test_4_bits_against_4_bits():
    (row,) = table("--methods", "qlora", "--repeats", "1")
    assert row[0] == "qlora" and float(row[3].split()[0]) > 0


@pytest.mark.slow
def test_ppo_has_rates_of_its_own():
    rows = table("--methods", "ppo", "--lora", "--repeats", "1")
    assert [row[0] for row in rows] == ["ppo", "rollout_tokens_per_second"]
    assert all(float(row[1].replace(",", "")) > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("part, rows", [("memory", 9), ("speed", 8), ("checks", 2)])
def test_the_parts_for_a_gpu_have_been_rehearsed(part, rows):
    command = [sys.executable, str(ROOT / "tests" / "gpu.py"), part, "--shape", "tiny"]
    options = {"capture_output": True, "text": True, "timeout": 600, "check": True}
    out = subprocess.run(command, **options).stdout
    found = cells(out)
    trouble = re.compile("failed|no time|not done|nan")
    assert len(found) == rows and not [row for row in found if trouble.search(str(row))]


def unpatch(monkeypatch) -> None:
    """What benchmark.random_weights puts in place of from_pretrained goes after the test."""
    for auto_class in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForSequenceClassification,
        transformers.LlamaForCausalLM,
    ):
        monkeypatch.setattr(auto_class, "from_pretrained", auto_class.from_pretrained)


def worker(method: str, side: str, *flags):
    sizes = "--shape tiny --length 256 --document 64 --rows 2 --steps 3".split()
    return benchmark.parse_args([*sizes, "--worker", side, "--method", method, *flags])


@pytest.mark.parametrize("method", [m for m in benchmark.METHODS if m != "ppo"])
@pytest.mark.parametrize("against", ["trl", "padding"])
def test_a_step_of_ours_is_one_forward_pass(method, against, tmp_path, monkeypatch):
    """Of as many tokens as the packed rows have, or of as many documents as a padded batch."""

    class Begun(Exception):
        pass

    seen = []

    def start_run(args, model, optimizer, train_set, steps):
        for step in steps:
            examples = train_set[step]
            (batch,) = common.micro_batches(examples, args, torch.device("cpu"))
            seen.append((len(step), sum(map(len, examples["input_ids"])), batch["input_ids"].shape))
        raise Begun

    unpatch(monkeypatch)
    monkeypatch.setattr(common, "check_model", lambda *_, **__: None)
    monkeypatch.setattr(common, "start_run", start_run)
    args = worker(method, "padding" if against == "padding" else "ours", "--against", against)
    benchmark.make_work(tmp_path, args)
    benchmark.random_weights(str(tmp_path), torch.float32)
    with pytest.raises(Begun):
        script = importlib.import_module(benchmark.script_of(method))
        script.main(benchmark.flags_of(str(tmp_path), args))
    if method in benchmark.PREFERENCES:  # pairs, of which a padded batch has a row for each answer
        rows = 1 if against == "trl" else 2 * seen[0][0]
        assert [shape[0] for _, _, shape in seen] == [rows] * 3 and seen[0][0] > 1
    elif against == "trl":  # 2 rows of 256 tokens hold 8 documents of 64
        assert seen == [(8, 512, (1, 512))] * 3
    else:
        assert [(count, shape[0]) for count, _, shape in seen] == [(16, 16)] * 3


def test_every_process_has_rows_of_its_own(monkeypatch):
    def batch_size(processes: int) -> int:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        flags = benchmark.flags_of("folder", worker("lora", "ours"))
        assert flags[flags.index("--micro-batch-tokens") + 1] == "512"
        return int(flags[flags.index("--batch-size") + 1])

    assert [batch_size(1), batch_size(2)] == [8, 16]


def test_one_block_stands_for_all_of_a_large_model(tmp_path, monkeypatch):
    """Random weights of a 65B: its blocks share theirs, and the model computes what one with 3 such
    blocks would."""
    unpatch(monkeypatch)
    monkeypatch.setitem(benchmark.SHAPES, "65b", (64, 96, 3, 4, 2, 512))
    benchmark.make_work(tmp_path, worker("qlora", "ours", "--shape", "65b"))
    benchmark.random_weights(str(tmp_path), torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert len({block.mlp.up_proj.weight.data_ptr() for block in model.model.layers}) == 1
    whole = transformers.LlamaForCausalLM(model.config).eval()
    whole.load_state_dict(model.state_dict())
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_operations_a_token_of_a_7b():
    """4 for each of Llama-2-7B's 6.607 billion weights in products; attention over 512 tokens:
    forward 2 products of d * 512 / 2 multiplications and additions in each layer, backward twice
    that."""
    assert gpu.lora_flops("7b", 0) == 4 * 6_607_077_376
    attention = gpu.lora_flops("7b", 512) - gpu.lora_flops("7b", 0)
    assert attention == 3 * 32 * 2 * (2 * 4096 * 512 / 2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "reward"])
def test_the_shares_of_a_step_add_up(method):
    (row,) = table("--profile", "--methods", method)
    assert row[0] == method and all(re.fullmatch(r"[\d.]+%", cell) for cell in row[2:])
    assert abs(sum(float(cell[:-1]) for cell in row[2:]) - 100) < 0.5


# ------------------------------------------------------------- theirs, on the same terms


def documents_one_by_one(seen: list, with_gqa: bool):
    """In the place of varlen_attn: as in torch 2.13, which must be told of grouped heads, or as in
    2.11, which knows no such option."""

    def attend(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
        enable_gqa=not with_gqa,
    ):  # fmt: skip
        assert window_size == (-1, 0) and enable_gqa
        assert max_q == max_k == cu_seq_q.diff().max() and torch.equal(cu_seq_q, cu_seq_k)
        seen.append({x.dtype for x in (query, key, value)})
        outs = []
        for a, b in zip(cu_seq_q[:-1], cu_seq_q[1:]):
            part = [x[a:b].transpose(0, 1)[None] for x in (query, key, value)]
            options = {"is_causal": True, "scale": scale, "enable_gqa": True}
            outs.append(F.scaled_dot_product_attention(*part, **options)[0].transpose(0, 1))
        return torch.cat(outs)

    def without_option(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
    ):
        bounds = (cu_seq_q, cu_seq_k, max_q, max_k)
        return attend(query, key, value, *bounds, scale=scale, window_size=window_size)

    return attend if with_gqa else without_option


@pytest.fixture(params=[True, False], ids=["2.13", "2.11"])
def packed(request, monkeypatch):
    """`benchmark.packed_attention` registered as "packed", and a list of what dtypes the kernel
    gets."""
    seen = []
    kernel = documents_one_by_one(seen, request.param)
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    transformers.AttentionInterface.register("packed", benchmark.packed_attention())
    return seen


def test_packed_attention_is_that_of_the_mask_that_transformers_makes(packed, random_model):
    """On rows from TRL's own collator, with grouped heads and recomputed blocks: the same logits
    and gradients."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    ids = torch.randint(0, 256, (35,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [
        {"input_ids": ids[:20], "seq_lengths": [9, 1, 10]},
        {"input_ids": ids[20:], "seq_lengths": [15]},
    ]
    batch = DataCollatorForLanguageModeling(pad_token_id=258, padding_free=True)(rows)
    labels = batch.pop("labels")
    assert labels.shape == (1, 35) and batch["cu_seq_lens_q"].tolist() == [0, 9, 10, 20, 35]
    model = transformers.AutoModelForCausalLM.from_pretrained(random_model).train()
    model.gradient_checkpointing_enable()
    results = []
    for implementation in ("sdpa", "packed"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        logits = model(**batch, use_cache=False).logits
        logits.square().mean().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    assert len(packed) == 2 * 2  # each of 2 blocks, and once more to recompute it
    packed.clear()
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch, use_cache=False)
    assert packed == [{torch.bfloat16}] * 2  # the flash kernel takes no float32


def test_packed_attention_refuses_what_it_would_get_wrong(packed, random_model):
    model = transformers.AutoModelForCausalLM.from_pretrained(random_model)
    model.set_attn_implementation("packed")
    with pytest.raises(NotImplementedError, match="packed rows"):
        model(input_ids=torch.arange(8)[None])
    assert not packed


def their_trainer(method: str, folder, monkeypatch):
    """TRL's trainer as `theirs` makes it, at the moment when training would begin."""
    import trl

    unpatch(monkeypatch)
    made = []

    def train(trainer):
        made.append(trainer)
        raise KeyboardInterrupt

    monkeypatch.setattr(trl.SFTTrainer, "train", train)
    args = worker(method, "trl")
    benchmark.make_work(folder, args)
    with pytest.raises(KeyboardInterrupt):
        benchmark.theirs(str(folder), args)
    return made[0]


def test_trl_trains_with_the_packed_attention(packed, tmp_path, monkeypatch):
    """Its loss on one of its own batches is that of its mask."""
    trainer = their_trainer("lora", tmp_path, monkeypatch)
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["cu_seq_lens_q"]) == 2 * 4 + 1
    losses = []
    for implementation in ("sdpa", "packed"):
        trainer.model.set_attn_implementation(implementation)
        losses.append(trainer.compute_loss(trainer.model, dict(batch)).item())
    assert (
        losses[0] == pytest.approx(losses[1], abs=1e-5)
        and len(packed) == trainer.model.config.num_hidden_layers
    )


def test_their_adapters_in_4_bits_are_float32_as_ours_are(tmp_path, monkeypatch):
    trained = [
        p
        for p in their_trainer("qlora", tmp_path, monkeypatch).model.parameters()
        if p.requires_grad
    ]
    assert len(trained) == 2 * 7 * 2 and {p.dtype for p in trained} == {torch.float32}


# ------------------------------------------------------------------------ what is measured


def test_a_kernel_counts_once():
    """What a GPU's profile has: operations with their kernels' time, the kernels, and annotations
    that span kernels."""
    from torch.autograd import DeviceType

    def event(key, device, on_gpu, on_cpu=0.0, annotation=False):
        times = {"self_device_time_total": on_gpu, "self_cpu_time_total": on_cpu}
        return types.SimpleNamespace(
            key=key, device_type=device, is_user_annotation=annotation, **times
        )

    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    events = [
        event("aten::mm", cpu, 70.0, 5.0),
        event("sm90_xmma_gemm", cuda, 70.0),
        event("aten::_flash_attention_forward", cpu, 20.0, 3.0),
        event("flash_fwd_kernel", cuda, 20.0),
        event("torch_attn::_varlen_attn", cpu, 0.0, 2.0),
        event("MatMul4Bit", cpu, 6.0, 1.0),
        event("kDequantizeBlockwise", cuda, 6.0),
        event("a kernel of no operation", cuda, 4.0),
        event("Optimizer.step", cpu, 96.0, 7.0, True),
        event("Optimizer.step", cuda, 96.0, 0.0, True),
        event("cudaLaunchKernel", cpu, 0.0, 9.0),
    ]
    expected = {"matrix products": 70.0, "attention": 20.0, benchmark.REST: 10.0}
    times = benchmark.time_by_kind(events, on_gpu=True)
    assert {kind: time for kind, time in times.items() if time} == expected
    expected = {"matrix products": 5.0, "attention": 3.0, benchmark.REST: 19.0}
    times = benchmark.time_by_kind(events, on_gpu=False)
    assert {kind: time for kind, time in times.items() if time} == expected


def test_what_the_container_grew_by_is_told_where_its_peak_shows_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "CGROUP", tmp_path)

    def report(current: int, peak: int, later: int) -> dict:
        for name, size in (("current", current), ("peak", peak)):
            (tmp_path / f"memory.{name}").write_text(f"{size * 2**30}\n")
        meter = benchmark.Meter(0)
        meter.begin(), meter.step()
        (tmp_path / "memory.peak").write_text(f"{later * 2**30}\n")
        meter.report(1.0)
        return json.loads(capsys.readouterr().out.removeprefix("RESULT"))

    assert report(3, 5, 90)["container_gib"] == 87
    assert "container_gib" not in report(3, 90, 90)
    monkeypatch.setattr(benchmark, "CGROUP", tmp_path / "none")
    assert benchmark.host_memory() is None and benchmark.Meter(0).host is None


def check_picture(path, curves: int) -> None:
    """That many curves in each panel, all in the picture."""
    elements = ElementTree.fromstring(path.read_text())
    lines = [element.get("points") for element in elements if element.tag.endswith("polyline")]
    points = [point.split(",") for line in lines for point in line.split()]
    assert len(lines) == 2 * curves
    assert all(0 <= float(x) <= 920 and 0 <= float(y) <= 400 for x, y in points)


def test_growth_goes_on_where_a_point_fails(tmp_path, monkeypatch, capsys):
    def measure(side, folder, args):
        if args.length == 32768:
            return {"error": ["out of memory"]}
        speed = 1000.0 * args.processes / math.log2(args.document)
        return {"tokens_per_second": speed, "gib": args.length * args.rows / 2**12}

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark, "make_work", lambda *_: None)
    flags = ["--growth", "--processes", "2", "--picture", str(tmp_path / "growth.svg")]
    benchmark.growth(benchmark.parse_args(flags))
    rows = cells(capsys.readouterr().out)
    assert len(rows) == 7 + 7 + 4 + 2
    assert [row[1] for row in rows if "failed" in row[2]] == ["32,768"] * 2
    assert rows[-1] == ["processes, a row of 2,048 each", "4,096", "222", "0.50"]
    check_picture(tmp_path / "growth.svg", 4)


@pytest.mark.slow
def test_growth_by_rows_and_processes(tmp_path):
    picture = tmp_path / "growth.svg"
    rows = table("--growth", "--processes", "2", "--until", "512", "--picture", str(picture))
    assert [row[1] for row in rows] == ["512", "512", "512", "2,048", "4,096"]
    assert all(float(row[2].replace(",", "")) > 0 and float(row[3]) >= 0 for row in rows)
    check_picture(tmp_path / "growth.svg", 4)


def test_one_side_that_fails_takes_nothing_else_with_it(monkeypatch, capsys):
    """TRL without recomputation may need more than a GPU has: ours is printed all the same, and so
    are the other rows."""

    def measure(side, folder, args, seconds):
        if side == "trl" and not args.recompute:
            return {"error": ["out of memory"]}
        speed = 3000.0 if side == "ours" else 2000.0
        return {"tokens_per_second": speed, "gib": 1.0, "loaded_gib": 2.0, "host_gib": 3.0}

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(gpu, "matrix_peak", lambda: 10 * 3000.0 * gpu.lora_flops("tiny", 64))
    times = iter([200.0] * 12 + [1.0] * 99)
    gpu.speed(argparse.Namespace(shape="tiny", first=0), lambda: next(times))
    out = capsys.readouterr().out
    rows, failed = cells(out), "failed: ['out of memory']"
    assert rows[0] == ["lora", "3,000", failed, "", "1.00", failed, ""]
    assert rows[1][:2] == ["of the largest product's speed", "10%"]
    assert rows[2] == ["lora, recomputing", "3,000", "2,000", "1.50", "1.00", "1.00", "1.00"]
    assert [row[1] for row in rows[-3:]] == ["no time left"] * 3
    assert len(rows) == len(gpu.SPEED) + 1
    assert "recomputes: 1.50 times its tokens/s, 1.00 of its memory" in out

"""--estimate: closed forms, the same steps on real tensors, and (marked cuda) the allocator of a GPU."""

import gc
import importlib
import os
import types
from contextlib import nullcontext
from pathlib import Path

import conftest
import pytest
import torch
from conftest import ROOT, read_metrics
from torch.utils._python_dispatch import _disable_current_modes

import common


class NoFake(nullcontext):
    """In the place of a FakeTensorMode."""

    fake_tensor_converter = types.SimpleNamespace(meta_converter=types.SimpleNamespace(tensor_memo={}))

    def from_tensor(self, tensor):
        return tensor

    def __bool__(self):
        return False


class Real(common.Estimate):
    """The same steps, followed in the same way, on tensors that have data and with kernels that run."""

    def __init__(self, offload):
        super().__init__(offload)
        self.fake = NoFake()


class OneKernelNorm(torch.autograd.Function):
    """What `common.FakeNorm` is to tensors without data: the memory that F.rms_norm takes on a GPU. A CPU's needs more. Its gradient
    has the right shape alone."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        with _disable_current_modes():  # what is made in here is not followed
            y = RMS_NORM(x, weight.shape, weight, eps)
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clone(), torch.zeros_like(ctx.saved_tensors[1]), None


RMS_NORM = torch.nn.functional.rms_norm


def few_rows(script: str) -> Path:
    """The first rows of one of examples/'s files."""
    source = ROOT / "examples" / ("pairs.jsonl" if script in ("dpo", "orpo", "reward_model", "ppo") else "format.jsonl")
    path = Path(os.environ["HF_DATASETS_CACHE"]) / source.name
    path.write_text("".join(source.read_text(encoding="utf-8").splitlines(keepends=True)[:12]), encoding="utf-8")
    return path


def estimate(monkeypatch, script: str, *flags, kind=common.Estimate) -> common.Estimate:
    """A script's --estimate, on rows of examples/."""
    made = []
    bitsandbytes = importlib.import_module("bitsandbytes")
    monkeypatch.setattr(bitsandbytes.functional, "name2qmap", {})  # a cache of tensors: with data and without must not meet
    monkeypatch.setattr(common, "Estimate", lambda offload: made.append(kind(offload)) or made[0])
    model = [] if "--model" in flags else conftest.RANDOM
    data = [] if "--data" in flags else ["--data", str(few_rows(script))]
    try:
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(script).main([*model, *data, "--estimate", *flags])
    finally:
        made[0].modes.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert stop.value.code == 0
    return made[0]


@pytest.fixture(autouse=True)
def two_layers(monkeypatch):
    tiny = common.tiny_model
    monkeypatch.setattr(common, "tiny_model", lambda: cut(tiny()))


def cut(model):
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2
    return model


def rounded(tensors) -> int:
    return sum(-(-tensor.numel() * tensor.itemsize // 512) * 512 for tensor in tensors)


def test_what_lasts_has_closed_forms(monkeypatch, tmp_path, capsys):
    """Full fine-tuning holds 4 + 4 + 8 bytes a parameter, and LoRA, in bfloat16, 2 a frozen one and 16 a trained one."""
    model, output = common.tiny_model(), ["--grad-accum", "2", "--output", str(tmp_path / "run")]  # the second micro-batch meets gradients
    parameters, buffers = list(model.parameters()), rounded(model.buffers())
    full = estimate(monkeypatch, "full_ft", *output)
    assert full.weights == rounded(parameters) + buffers and full.gradients == rounded(parameters)
    assert full.states == 2 * rounded(parameters) + 512 * len(parameters)  # and a step counter each
    assert full.peak > full.weights + full.gradients + full.states
    lora = estimate(monkeypatch, "lora", *output, "--rank", "4")
    shapes = [tuple(layer.weight.shape) for layer in common.linear_layers(model, "all-linear").values()]
    adapters = [torch.empty(4, size) for shape in shapes for size in shape]
    assert lora.weights == rounded(p.bfloat16() for p in parameters) + buffers + rounded(adapters)
    assert lora.gradients == rounded(adapters) and lora.states == 2 * rounded(adapters) + 512 * len(adapters)
    assert not (tmp_path / "run").exists()
    printed = capsys.readouterr().out
    for name in ("parameters", "gradients", "optimizer states", "activations and loss buffers", "together"):
        assert printed.count(f"\n{name} ") == 2


def test_ranks_and_host_memory_share_what_lasts(monkeypatch):
    """Each of 4 ranks has a quarter; with --offload none of it is on the GPU."""
    one, offloaded = estimate(monkeypatch, "full_ft"), estimate(monkeypatch, "full_ft", "--offload")
    monkeypatch.setenv("WORLD_SIZE", "4")
    four = estimate(monkeypatch, "full_ft")
    for name in ("weights", "states"):
        assert getattr(four, name) == pytest.approx(getattr(one, name) / 4, rel=0.05)
        assert getattr(offloaded, name) == pytest.approx(getattr(one, name), rel=0.01)
    assert offloaded.peak < one.peak - one.states
    assert four.peak < one.peak - 0.7 * (one.weights + one.states)  # what FSDP2 gathers it frees again


def test_what_is_freed_or_shrunk_counts_no_more():
    followed = common.Estimate(False)
    followed.start()
    kept, freed = torch.empty(1000), torch.empty(1000)
    assert followed.live == 2 * 4096
    del freed
    kept.untyped_storage().resize_(0)  # as FSDP2 does with what it has gathered
    live = followed.live
    followed.modes.close()
    assert live == 0 and followed.peak == 2 * 4096


def test_recomputing_takes_less_and_the_largest_micro_batch_is_taken(monkeypatch, capsys):
    short = ["--batch-size", "1", "--max-length", "128"]
    kept, recomputed = (estimate(monkeypatch, "lora", *short, *flags) for flags in ([], ["--gradient-checkpointing"]))
    assert recomputed.peak < 0.9 * kept.peak
    args = common.make_parser("", output="unused", lr=1.0).parse_args(["--data", str(few_rows("lora")), *short])
    corpus, _ = common.load_data(args, common.tiny_tokenizer(), 320)
    tokens = max(int(corpus.lengths[row].sum()) for row in corpus.planned_rows())
    assert capsys.readouterr().out.count(f"estimate at the peak, {tokens:,} tokens") == 2


def test_a_run_prints_its_estimate_first(tmp_path):
    flags = ["--data", few_rows("lora"), "--max-steps", "1", "--samples", "0", "--output", tmp_path / "run", "--estimate"]
    alone, run = conftest.run_script("lora.py", *flags), conftest.run_script("lora.py", *flags, "run")
    assert alone.returncode == run.returncode == 0, run.stderr
    assert "\nestimate at the peak" in alone.stdout and run.stdout.startswith(alone.stdout)
    assert read_metrics(tmp_path / "run")[-1]["done"]
    failed = conftest.run_script("lora.py", "--data", "missing.jsonl", "--estimate", "run")
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1


def test_a_lora_reward_model_shares_the_base(monkeypatch, tmp_path, capsys):
    """As in the run itself: one model for all four roles."""
    tiny = ["--model", str(ROOT / "examples" / "tiny"), "--data", str(few_rows("ppo"))]
    flags = [*tiny, "--output", str(tmp_path / "reward"), "--max-steps", "0", "--samples", "0", "--eval-fraction", "0"]
    importlib.import_module("reward_model").main([*flags, "--lora-rank", "4"])
    estimate(monkeypatch, "ppo", *tiny, "--lora-rank", "4", "--response-length", "8", "--reward", str(tmp_path / "reward"))
    assert "in memory for policy, reference, critic, reward: 1 model(s)" in capsys.readouterr().out


SHORT = ["--dtype", "float32", "--batch-size", "2", "--max-length", "256"]


FAST = [("lora", ["--gradient-checkpointing"]), ("full_ft", ["--grad-accum", "2"]), ("qlora", ["--optimizer", "adamw"]), ("dpo", ["--lora-rank", "4"])]
MORE = [
    ("lora", ["--no-packing"]), ("full_ft", ["--l2-sp", "0.1", "--step-in-backward", "--max-grad-norm", "0"]), ("dora", []), ("adapter", []),
    ("prefix_tuning", []), ("prompt_tuning", []), ("sft", ["--neftune", "5"]), ("reward_model", []), ("orpo", []), ("ppo", ["--response-length", "32"]),
]  # fmt: skip


@pytest.mark.parametrize("script, flags", FAST + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE])
def test_the_peak_is_that_of_real_tensors(script, flags, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "rms_norm", lambda x, shape, weight, eps: OneKernelNorm.apply(x, weight, eps))
        expected = estimate(monkeypatch, script, *SHORT, *flags, kind=Real)
    ours = estimate(monkeypatch, script, *SHORT, *flags)
    assert (ours.weights, ours.states) == (expected.weights, expected.states)
    assert ours.peak == pytest.approx(expected.peak, rel=0.03)


@pytest.mark.cuda
@pytest.mark.parametrize("script, flags", [("lora", []), ("lora", ["--gradient-checkpointing"]), ("full_ft", []), ("dpo", ["--lora-rank", "16"])])
def test_the_peak_is_that_of_a_gpu(script, flags, tmp_path, monkeypatch):
    """Within 15 %, on a model of 0.3 billion parameters."""
    import transformers

    config = transformers.LlamaConfig(vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    common.tiny_tokenizer().save_pretrained(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--batch-size", "8", "--max-steps", "20", "--samples", "0", "--output", str(tmp_path / "run"), *flags]
    flags += ["--data", str(ROOT / "examples" / ("pairs.jsonl" if script == "dpo" else "format.jsonl"))]  # all of it, on both sides
    ours = estimate(monkeypatch, script, *flags)
    monkeypatch.undo()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()  # what other tests have left
    importlib.import_module(script).main(flags)
    measured = [line["peak_memory_gib"] for line in read_metrics(tmp_path / "run") if "peak_memory_gib" in line][-1] - before / 2**30
    assert ours.peak / 2**30 == pytest.approx(measured, rel=0.15)

"""Under torchrun, two processes (gloo) train what one process trains on the same rows."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT, read_metrics, write_rows
from safetensors.torch import load_file
from two_ranks import run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on a CPU")

ROWS = [{"prompt": c * m, "completion": c * n} for c in "abc" for m in (1, 30) for n in (1, 5, 19)]
# small rates: Adam turns noise in gradients near zero into steps of the size of the rate
LORA, FULL = ["--lr", "1e-4"], ["--lr", "1e-5"]
ONE = ["--batch-size", "1", "--eval-data", "ONE ROW"]  # a rank without an example
ONE_PAIR = ["--batch-size", "1", "--eval-data", "ONE PAIR"]
NEW = ["--add-tokens", *(f"<{n}>" for n in range(62))]  # the model has rows for 61
PPO = ["--reward", f"{ROOT / 'examples' / 'rewards.py'}:lowercase", "--response-length", "6"]
PPO += ["--rollout-size", "20", "--generation-batch", "4"]
RUNS = {
    "lora": ("lora", LORA),
    "lora --shard": ("lora", [*LORA, "--shard"]),
    "lora, a rank without an example": ("lora", [*LORA, *ONE]),
    "lora --shard, a rank without an example": ("lora", [*LORA, *ONE, "--shard"]),
    "lora --adapter --shard": ("lora", [*LORA, "--adapter", "START", "--shard"]),
    "full_ft": ("full_ft", [*FULL, "--l2-sp", "0.1"]),
    "full_ft, an untied head": ("full_ft", [*FULL, "--model", "UNTIED"]),
    "full_ft, a rank without an example": ("full_ft", [*FULL, *ONE]),
    "full_ft, padded": ("full_ft", [*FULL, "--no-packing", "--gradient-checkpointing"]),
    "full_ft --train": ("full_ft", [*FULL, "--train", "mlp|norm", "--l2-sp", "0.1"]),
    "prefix_tuning": ("prefix_tuning", LORA),
    "prefix_tuning --hidden 0": ("prefix_tuning", [*LORA, "--hidden", "0", *ONE]),
    "prompt_tuning": ("prompt_tuning", [*LORA, "--virtual-tokens", "5"]),
    "prompt_tuning --encoder": ("prompt_tuning", [*LORA, "--encoder", "lstm", "--hidden", "8"]),
    "sft": ("sft", [*FULL, "--loss-on", "all", "--samples", "2"]),
    "qlora": ("qlora", LORA),
    "dora": ("dora", LORA),
    "dora --shard": ("dora", [*LORA, "--shard"]),
    "dora --adapter --shard": ("dora", [*LORA, "--adapter", "DORA", "--shard"]),
    "adalora": ("adalora", [*LORA, "--rank", "4", "--target-rank", "2"]),
    "adalora --shard": ("adalora", [*LORA, "--rank", "4", "--target-rank", "2", "--shard"]),
    "ia3": ("ia3", LORA),
    "adapter": ("adapter", LORA),
    "adapter --adapter": ("adapter", [*LORA, "--adapter", "ADAPTER"]),
    "sft --lora-rank --shard": ("sft", [*LORA, "--lora-rank", "4", "--shard"]),
    "lora --shard, new tokens": ("lora", [*LORA, *NEW, "--shard"]),
    "sft, new tokens": ("sft", [*FULL, *NEW]),
    "ppo": ("ppo", [*LORA, *PPO]),
    "grpo": ("grpo", [*LORA, *PPO, "--group-size", "2", "--batch-size", "4"]),
    "ppo, a rank without an answer": ("ppo", [*LORA, *PPO, *ONE, "--rollout-size", "1"]),
}
PAIRS = ["--data", "PAIRS", "--epochs", "1"]
RUNS |= {
    "dpo": ("dpo", [*FULL, *PAIRS]),
    "dpo, padded": ("dpo", [*FULL, *PAIRS, "--no-packing", "--samples", "1"]),
    "dpo --lora-rank --shard": ("dpo", [*LORA, *PAIRS, "--lora-rank", "4", "--shard"]),
    "dpo, a rank without an example": ("dpo", [*FULL, *PAIRS, *ONE_PAIR]),
    "dpo, LoRA, the same": ("dpo", [*LORA, *PAIRS, *ONE_PAIR, "--lora-rank", "4", "--shard"]),
    "orpo": ("orpo", [*FULL, *PAIRS]),
    "orpo --lora-rank": ("orpo", [*LORA, *PAIRS, "--lora-rank", "4"]),
    "reward_model": ("reward_model", [*FULL, *PAIRS, "--samples", "1"]),
    "reward_model --lora-rank --shard": (
        "reward_model",
        [*LORA, *PAIRS, "--lora-rank", "4", "--shard"],
    ),
    "reward_model, a rank without an example": ("reward_model", [*FULL, *PAIRS, *ONE_PAIR]),
}
RESUMED = {"lora": LORA, "full_ft": FULL}


@pytest.fixture(scope="module")
def two(tmp_path_factory, random_model):
    """All runs under one torchrun: starting it is what takes the time. -> (folder, a function
    that gives a run's flags, how often each rank has read weights)"""
    folder = tmp_path_factory.mktemp("two_ranks")
    data, row = (write_rows(folder / f"{len(x)}.jsonl", x) for x in (ROWS, ROWS[:1]))
    ranked = [{"prompt": c * 9, "responses": [c, c * 4, "no"]} for c in "defg"]
    pairs = [{"prompt": x["prompt"], "chosen": x["completion"], "rejected": "no"} for x in ROWS]
    pairs = write_rows(folder / "pairs.jsonl", pairs + ranked)
    untied = transformers.AutoModelForCausalLM.from_pretrained(random_model)
    untied.config.tie_word_embeddings = False
    head = untied.lm_head.weight.detach().clone()
    untied.lm_head.weight = torch.nn.Parameter(head + 0.02 * torch.randn(head.shape))
    untied.save_pretrained(folder / "untied")
    transformers.AutoTokenizer.from_pretrained(random_model).save_pretrained(folder / "untied")
    names = {script.upper(): str(folder / script) for script in ("dora", "adapter")}
    names |= {"PAIRS": pairs, "ONE PAIR": write_rows(folder / "pair.jsonl", ranked[:1])}
    names |= {"START": str(folder / "start"), "UNTIED": str(folder / "untied"), "ONE ROW": row}

    def flags(output: str, more: list[str]) -> list[str]:
        shared = ["--model", random_model, "--data", data, "--output", str(folder / output)]
        shared += ["--eval-data", "0.2", "--samples", "0", "--max-steps", "4", "--batch-size", "5"]
        shared += ["--micro-batch-tokens", "70", "--weight-decay", "0.1", "--eval-every", "2"]
        return shared + [names.get(flag, flag) for flag in more]

    run("lora", flags("start", ["--lr", "0.01", "--rank", "4"]))
    run("dora", flags("dora", ["--lr", "0.01", "--rank", "4"]))
    run("adapter", flags("adapter", ["--lr", "0.01"]))
    runs = [(script, flags(f"{name}, two", more)) for name, (script, more) in RUNS.items()]
    for script, more in RESUMED.items():
        runs.append((script, flags(f"{script}, two to one", more), 2))
    for script, more in RESUMED.items():
        run(script, flags(f"{script}, one to two", more), stop=2)
        runs.append((script, flags(f"{script}, one to two", [*more, "--resume"])))
    (folder / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "tests" / "two_ranks.py"), str(folder / "runs.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    if done.returncode:  # the runs before the one that failed can still be compared
        print(done.stderr[-9000:])
    reads = [json.loads((folder / f"reads-{rank}.json").read_text()) for rank in (0, 1)]
    return folder, flags, reads


TIMES = {"tokens_per_second", "peak_memory_gib", "rollout_tokens_per_second"}


def assert_same_run(one, other, first: int = 1, floor: float = 0.0) -> None:
    """The same metrics, to 1e-6 until step `first` and 1e-5 after, and the same result. floor:
    an absolute tolerance, for losses that begin at 0."""
    metrics, others = (read_metrics(folder) for folder in (one, other))
    assert metrics[-1] == others[-1] and metrics[-1]["done"]
    for a, b in zip(metrics[1:-1], others[1:-1], strict=True):
        for key in a.keys() - TIMES:
            rel = 1e-6 if a["step"] <= first else 1e-5
            near_zero = 3e-6 if "margin" in key or "odds" in key else floor
            assert b[key] == pytest.approx(a[key], rel=rel, abs=near_zero), key
    assert sum("eval_loss" in entry for entry in metrics) == 3
    (path,) = one.glob("*model.safetensors")
    whole, parts = load_file(path), load_file(other / path.name)
    assert whole.keys() <= parts.keys()
    for key in whole:
        torch.testing.assert_close(whole[key], parts[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_what_one_process_trains(name, two):
    folder, flags, _ = two
    script, more = RUNS[name]
    run(script, flags(f"{name}, one", [flag for flag in more if flag != "--shard"]))
    floor = 1e-5 if script in ("ppo", "grpo") else 0.0
    assert_same_run(folder / f"{name}, one", folder / f"{name}, two", floor=floor)


@pytest.mark.parametrize("script", RESUMED)
@pytest.mark.parametrize("way", ["two to one", "one to two"])
def test_runs_resume_with_another_number_of_ranks(way, script, two):
    """As the run that was never stopped, to 1e-6 in the first step after resuming. The signal
    reached one rank alone, and both stopped."""
    folder, flags, _ = two
    whole, resumed = f"{script}, whole to {way}", f"{script}, {way}"
    run(script, flags(whole, RESUMED[script]))
    if way == "two to one":
        assert len(list((folder / resumed / "checkpoint").iterdir())) == 1
        run(script, flags(resumed, [*RESUMED[script], "--resume"]))
    assert_same_run(folder / whole, folder / resumed, first=3)


def test_a_tied_head_is_in_the_file_once(two):
    folder, _, _ = two
    assert "lm_head.weight" not in load_file(folder / "full_ft, two" / "model.safetensors")


def test_rank_0_alone_reads_the_weights(two):
    """Eight ranks of a model in float32 would fill the host's memory."""
    _, _, reads = two
    assert set(reads[0]) == {1} and set(reads[1]) == {0} and len(reads[0]) > len(RUNS)

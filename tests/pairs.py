"""What test_dpo.py, test_orpo.py and test_reward_model.py share: pairs, and unshared prompts."""

import types
from contextlib import contextmanager

import numpy as np
import torch
import transformers
from conftest import TINY, write_rows
from test_model import OnCuda, varlen_2_13

import common

CPU = torch.device("cpu")
PAIRS = [
    {"prompt": f"Say {c}.", "chosen": c * n, "rejected": "no " * n + c}
    for n in (1, 2, 5)
    for c in "abcd"
]
RANKED = {"prompt": "Name a fruit.", "responses": ["A pear.", "Maybe a pear?", "No.", "N", "猫🐈"]}
# The chosen answer is the beginning of the rejected one; the answers differ in their first token
# (the other pairs, too); a prompt so long that its answers are cut at --max-length 100.
ODD = [
    {"prompt": "Count.", "chosen": "One, two", "rejected": "One, two, three"},
    {"prompt": "Yes or no?", "chosen": "Yes", "rejected": "No, never"},
    {"prompt": "x" * 40, "chosen": "y" * 50, "rejected": "yyyz" * 20},
]
KINDS = {"pairs": [*PAIRS[:3], *ODD], "five answers": [RANKED, *ODD[:1], {**RANKED, "prompt": "?"}]}
# Ways to compute a pass: attention in a loop, attention as on a GPU, a padded row an answer.
WAYS = ["loop", "kernel", "padded"]


def arguments(script, folder, rows, *flags):
    """What script.train gets from the command line."""
    seen, train = [], script.train
    data = write_rows(folder / "some.jsonl", rows)
    script.train = seen.append
    try:
        start = ["--model", TINY, "--data", data, "--eval-data", "0", "--max-length", "100"]
        script.main([*start, "--output", str(folder / "unused"), *map(str, flags)])
    finally:
        script.train = train
    return seen[0]


def examples_of(args, kind="pairs") -> dict:
    """Columns of all examples, in the order of the file."""
    return common.load_data(args, common.load_tokenizer(args), kind)[0][:]


def one_pass(examples, way: str) -> dict:
    args = types.SimpleNamespace(micro_batch_tokens=10**6, no_packing=way == "padded")
    (batch,) = common.micro_batches(examples, args, CPU)
    return batch


@contextmanager
def attention_of(way: str):
    """With "kernel", the model runs through stretch_attention's path for GPUs, with a stand-in
    that has the kernel's semantics."""
    original = common.stretch_attention
    kernel, capability = common.varlen_attn, torch.cuda.get_device_capability

    def on_cuda(module, query, key, value, *args, **options):
        dtype = query.dtype  # the GPU's path does not take float32
        inputs = [x.double().as_subclass(OnCuda) for x in (query, key, value)]
        out, _ = original(module, *inputs, *args, **options)
        return out.as_subclass(torch.Tensor).to(dtype), None

    if way == "kernel":
        transformers.AttentionInterface.register("stretches", on_cuda)
        common.varlen_attn = lambda *a, **b: varlen_2_13(*a, **b | {"enable_gqa": True})
        torch.cuda.get_device_capability = lambda *_: (9, 0)
    yield
    transformers.AttentionInterface.register("stretches", original)
    common.varlen_attn, torch.cuda.get_device_capability = kernel, capability


def documents(examples: dict):
    """Every prompt's answers, each with the prompt before it: [[(ids, first of the answer)]]"""
    for ids, lengths in zip(examples["input_ids"], examples["stretches"]):
        prompt, *answers = np.split(ids, np.cumsum(lengths)[:-1])
        whole = [torch.tensor(np.concatenate([prompt, x]), dtype=int) for x in answers]
        yield [(x, len(prompt)) for x in whole]


def own_logps(model, ids, first=1):
    """log p of the tokens from `first` on, from the logits of transformers' own forward pass."""
    logps = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, ids[1:, None])[first - 1 :, 0]


def assert_same_gradients(ours, theirs, rel=1e-5) -> None:
    """All gradients of a model as one vector: relative distance."""
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and found
    found, expected = (
        torch.cat([x[name].flatten() for name in sorted(x)]).double() for x in (found, expected)
    )
    assert ((found - expected).norm() / expected.norm()).item() < rel


def perturbed(model, seed=1):
    """Some way off where it was."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    return model

"""Models against transformers' own forward passes, and log-probabilities against float64."""

import functools
import json
import shutil
import tempfile
import types

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import TINY, write_rows
from safetensors.torch import load_file, save_file
from transformers.models.llama import modeling_llama

import common
import lora

CPU = torch.device("cpu")
SMALL = {"vocab_size": 160, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "max_position_embeddings": 128, "pad_token_id": 0}  # fmt: skip
PACKED = {
    "llama": {},
    "qwen2": {},  # biases in front of the attention
    "qwen3": {},  # norms of queries and keys
    "mistral": {"sliding_window": 8},  # shorter than the documents below
    "gpt_neox": {"num_key_value_heads": None},
    "gemma3_text": {"sliding_window": 8},
    "phi3": {},  # q, k, v in one layer, gate and up in another
    "olmo2": {},  # norms after attention and MLP
    "glm4": {},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "phi": {},  # a head with a bias
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
PADDED = {
    "gemma2": {"final_logit_softcapping": 0.5, "attn_logit_softcapping": 5.0, "sliding_window": 8},
    "stablelm": {},  # its blocks do not hand the stretches on
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 8},  # attention sinks
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},  # a norm with a gate
    "bloom": {"n_layer": 2, "n_head": 4},  # ALiBi counts from the start of the sequence
}
RUNS = [(name, False) for name in PACKED] + [(n, True) for n in ("llama", "gpt2", *PADDED)]
RUNS = [pytest.param(*run, id=run[0] + "-padded" * run[1]) for run in RUNS]


def own(name: str, **extra):
    """A small random model as transformers makes it. Its weights are large enough for attention
    to matter; norms and biases are not at their initial values."""
    sizes = SMALL | PACKED.get(name, {}) | PADDED.get(name, {}) | extra
    sizes = {key: value for key, value in sizes.items() if value is not None}
    config = transformers.AutoConfig.for_model(name, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in model.named_parameters():
            center, std = (0, 0.12) if p.dim() > 1 else (float(key.endswith("weight")), 0.3)
            p.copy_(torch.empty(p.shape).normal_(center, std, generator=generator))
    return model


def make_args(*flags):
    parser = common.make_parser("", output="unused", lr=1e-3)
    common.add_adapter_flags(parser)
    return parser.parse_args(list(flags))


def load(model, *flags, dtype=torch.float32, device=CPU, **options):
    """The same model by way of a folder and `load_model`, in eval mode."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        args = make_args("--model", folder, *flags)
        return common.load_model(args, dtype, device, **options).eval()


def build(name: str, *flags, **extra):
    """A small random model of an architecture, as `load_model` leaves it."""
    return load(own(name, **extra), *flags)


def documents(lengths, vocab_size=160, seed=1) -> list[dict]:
    """Examples of random tokens; every token but the first of each is a target."""
    rng = np.random.default_rng(seed)
    return [
        {"input_ids": rng.integers(5, vocab_size, n), "is_target": np.arange(n) > 0}
        for n in lengths
    ]


def packed_batch(lengths, vocab_size=160, device=CPU, padded=False) -> dict:
    return common.collate(documents(lengths, vocab_size), padded, torch.device(device))


def shared_prompt(prompt, answers) -> dict:
    """A prompt and its answers as one example with `stretches`; the answers are targets."""
    marks = [np.zeros(len(prompt), dtype=bool), *(np.ones(len(a), dtype=bool) for a in answers)]
    stretches = [len(prompt), *map(len, answers)]
    ids = np.concatenate([prompt, *answers])
    return {"input_ids": ids, "is_target": np.concatenate(marks), "stretches": stretches}


def apart(prompt, answers) -> list[dict]:
    """The same as documents: the prompt again in front of every answer."""
    return [
        {"input_ids": np.concatenate([prompt, answer]),
         "is_target": np.arange(len(prompt) + len(answer)) >= len(prompt)}
        for answer in answers
    ]  # fmt: skip


def own_logps(model, examples, temperature=1.0):
    """Each document alone through transformers' forward pass: log_softmax of its logits."""
    pieces = []
    for example in examples:
        ids = torch.tensor(example["input_ids"], device=model.device)
        marks = torch.tensor(example["is_target"], device=model.device)[1:]
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float() / temperature
        pieces.append(logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0][marks])
    return torch.cat(pieces)


def gradients(logps, model) -> dict:
    """Of a weighted sum of the log-probabilities, by parameter name."""
    weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(2))
    parameters = dict(model.named_parameters())
    values = torch.autograd.grad(logps @ weights.to(logps.device), list(parameters.values()))
    return dict(zip(parameters, values))


def assert_same(found: dict, expected: dict, rel=1e-5) -> None:
    """Relative to each tensor's norm. A gradient that is zero in exact arithmetic, as of a key's
    bias, is compared with the norm of all."""
    assert found.keys() == expected.keys()
    total = sum(x.norm() ** 2 for x in expected.values()) ** 0.5
    for name, x in expected.items():
        assert x.norm() > 0, name
        assert (found[name] - x).norm() <= rel * x.norm() + 1e-7 * total, name


def assert_close(found, expected, rel=1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=rel, atol=rel)


# ------------------------------------------------------------------------------- documents


@pytest.mark.parametrize("name, padded", RUNS)
def test_documents_get_their_own_logps_and_gradients(name, padded):
    """Head, attention, positions and lean modules at once."""
    flags = ["--no-packing"] if padded else []
    ours, theirs, lengths = build(name, *flags), own(name), [23, 1, 9, 14]
    logps = ours.target_logps(**packed_batch(lengths, padded=padded))
    expected = own_logps(theirs, documents(lengths))
    assert logps.dtype == torch.float32 and expected.std() > 0.2
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    assert_same(gradients(logps, ours), gradients(expected, theirs))


@pytest.mark.parametrize("name", PACKED)
def test_not_one_bit_leaks_between_documents(name):
    model, examples = build(name), documents([12, 9, 5])
    before = model.target_logps(**common.collate(examples, False, CPU))
    examples[0]["input_ids"] = examples[0]["input_ids"][::-1].copy()
    examples[2]["input_ids"] = examples[2]["input_ids"][::-1].copy()
    after = model.target_logps(**common.collate(examples, False, CPU))
    assert torch.equal(before[11:19], after[11:19])
    assert not torch.isclose(before[:11], after[:11]).any()


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "stablelm", "mamba", "bloom"])
def test_models_that_cannot_keep_documents_apart_are_refused(name):
    with pytest.raises(common.UserError, match="not supported.*--no-packing") as error:
        build(name)
    assert "\n" not in str(error.value)


def test_a_leak_is_found_in_an_untrained_model_too():
    """A fresh BLOOM, as transformers initialises it: its log-probabilities hardly vary yet."""
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=160, hidden_size=64, n_layer=2, n_head=4)
    with pytest.raises(common.UserError, match="--no-packing"):
        load(transformers.BloomForCausalLM(config))


@pytest.mark.parametrize("flags", [[], ["--no-packing"]])
def test_a_head_with_an_unknown_step_is_refused(flags, monkeypatch):
    with pytest.raises(common.UserError, match="not supported"):
        build("recurrent_gemma", *flags, logits_soft_cap=0.5, num_hidden_layers=3)
    forward = transformers.LlamaForCausalLM.forward

    def scaled(*args, **options):
        out = forward(*args, **options)
        out.logits = out.logits * 1.1
        return out

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", scaled)
    with pytest.raises(common.UserError, match="not supported"):
        build("llama", *flags)


@pytest.mark.parametrize("name", ["llama", "cohere", "granite", "phi", "gemma2"])
def test_temperature_divides_the_logits(name):
    """After scale, bias and soft-capping."""
    padded = name in PADDED
    model, batch = build(name, *["--no-packing"] * padded), packed_batch([9, 7], padded=padded)
    expected = own_logps(own(name), documents([9, 7]), temperature=0.7)
    assert_close(model.target_logps(**batch, temperature=0.7), expected, rel=2e-6)


# -------------------------------------------------------------------------- shared prompts


def answers(count: int) -> list[np.ndarray]:
    """The first is the beginning of the second; the third parts from them in its first token."""
    rng = np.random.default_rng(5)
    long, other = rng.integers(5, 160, 11), rng.integers(5, 160, 6)
    other[0] = long[0] + 1
    return [long[:7], long, other, other[:1], rng.integers(5, 160, 17)][:count]


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("name, window", [
    ("llama", None), ("mistral", 8), ("mistral", 15), ("gemma3_text", 8), ("gpt_neox", None),
    ("gpt2", None),
])  # fmt: skip
def test_answers_that_share_a_prompt_equal_documents(name, window, count):
    """The same log-probabilities and gradients as the prompt again before every answer: through
    our own documents, and through transformers' forward pass. The prompt is longer than the
    window of 8; that of 15 is between the longest stretch and the longest document."""
    sizes, prompt = {"sliding_window": window}, np.random.default_rng(3).integers(5, 160, 13)
    ours, theirs = build(name, **sizes), own(name, **sizes)
    before, after = documents([10, 6])
    shared = [before, shared_prompt(prompt, answers(count)), after]
    separate = [before, *apart(prompt, answers(count)), after]
    logps = ours.target_logps(**common.collate(shared, False, CPU))
    alone = ours.target_logps(**common.collate(separate, False, CPU))
    expected = own_logps(theirs, separate)
    assert len(logps) == 9 + sum(map(len, answers(count))) + 5
    torch.testing.assert_close(logps, alone, rtol=1e-6, atol=0)
    assert_close(logps, expected)
    found = gradients(logps, ours)
    assert_same(found, gradients(alone, ours))
    assert_same(found, gradients(expected, theirs))


def test_answers_of_several_prompts_and_a_prompt_with_targets():
    """As ORPO has it: the prompt's own tokens are targets once."""
    ours, rng = build("mistral"), np.random.default_rng(3)
    prompts = [rng.integers(5, 160, n) for n in (13, 1, 4)]
    examples = [shared_prompt(prompt, answers(n)) for prompt, n in zip(prompts, (2, 3, 1))]
    for example, prompt in zip(examples, prompts):
        example["is_target"][1 : len(prompt)] = True
    logps = ours.target_logps(**common.collate(examples, False, CPU))
    expected = []
    for prompt, n in zip(prompts, (2, 3, 1)):
        alone = {"input_ids": prompt, "is_target": np.arange(len(prompt)) > 0}
        parts = [alone] if len(prompt) > 1 else []
        expected.append(own_logps(own("mistral"), parts + apart(prompt, answers(n))))
    assert_close(logps, torch.cat(expected))


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_not_one_bit_leaks_between_answers(name):
    model, rng = build(name), np.random.default_rng(3)
    prompt, first, last = rng.integers(5, 160, 13), *documents([10, 6])
    one, two, three = answers(3)
    example = [first, shared_prompt(prompt, [one, two, three]), last]
    changed = [first, shared_prompt(prompt, [one, two[::-1] + 1, three]), last]
    before, after = (
        model.target_logps(**common.collate(x, False, CPU)) for x in (example, changed)
    )
    middle = slice(9 + len(one), 9 + len(one) + len(two))
    same = before == after
    assert same[: middle.start].all() and same[middle.stop :].all() and not same[middle].any()
    changed = [first, shared_prompt(prompt[::-1], [one, two, three]), last]
    same = before == model.target_logps(**common.collate(changed, False, CPU))
    assert same[:9].all() and same[-5:].all() and not same[9:-5].any()  # answers do see it


# ------------------------------------------------------------------------ the GPU's path


class OnCuda(torch.Tensor):
    """A CPU tensor that takes the path of a GPU's."""

    is_cuda = True


def varlen_2_13(
    q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """What torch documents of varlen_attn, position by position. q (T, H, head_dim). Window and
    causal mask are aligned at the bottom right; window_size (left, right), -1: no limit."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and len(cu_seq_q) == len(cu_seq_k)
    assert cu_seq_q[-1] == len(q) and cu_seq_k[-1] == len(k) == len(v)
    assert cu_seq_q.diff().max() <= max_q and cu_seq_k.diff().max() <= max_k
    assert enable_gqa or q.shape[1] == k.shape[1]
    (left, right), rows = window_size, []
    q, k, v = (x.as_subclass(torch.Tensor) for x in (q, k, v))
    bounds = zip(cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], cu_seq_k[1:])
    for first, last, begin, end in (map(int, edges) for edges in bounds):
        for t in range(first, last):
            here = t - first + begin + (end - begin) - (last - first)  # its own key
            low = begin if left < 0 else max(begin, here - left)
            high = end if right < 0 else min(end, here + right + 1)
            for h in range(q.shape[1]):
                g = h * k.shape[1] // q.shape[1]
                weights = (k[low:high, g] @ q[t, h] * scale).softmax(0)
                rows.append(weights @ v[low:high, g])
    return torch.stack(rows).view_as(q)


def varlen_2_11(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """Grouped heads need no telling."""
    bounds = (cu_seq_q, cu_seq_k, max_q, max_k)
    return varlen_2_13(q, k, v, *bounds, scale=scale, window_size=window_size, enable_gqa=True)


GROUPED = {varlen_2_13: {"enable_gqa": True}, varlen_2_11: {}}


@pytest.fixture
def gpu(monkeypatch):
    """stretch_attention as on a GPU, with a stand-in for the kernel. -> (install, calls)"""
    calls = []

    def install(kernel=varlen_2_13, capability=(9, 0)):
        counted = functools.wraps(kernel)(lambda *a, **b: calls.append(1) or kernel(*a, **b))
        monkeypatch.setattr(common, "varlen_attn", counted)
        monkeypatch.setattr(common, "GROUPED", GROUPED[kernel])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)

    return install, calls


CAUSAL = types.SimpleNamespace(is_causal=True)


def attend(examples, heads=(4, 2), head_dim=8, cuda=False, dtype=torch.float64, **options):
    """stretch_attention of random queries, keys and values -> (output, their gradients)"""
    stretches = common.collate(examples, False, CPU)["stretches"]
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, n, sum(stretches.lengths), head_dim) for n in (heads[0], heads[1], heads[1])]
    leaves = [
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for size in sizes
    ]
    inputs = [x.as_subclass(OnCuda) for x in leaves] if cuda else leaves
    options = {"scaling": 0.3, "stretches": stretches} | options
    out, weights = common.stretch_attention(CAUSAL, *inputs, None, **options)
    assert weights is None
    out = out.as_subclass(torch.Tensor)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype)
    return out, torch.autograd.grad((out * upstream).sum(), leaves)


DOCUMENTS = documents([9, 1, 6])
SHARED = [*documents([3]), shared_prompt(np.arange(9), answers(3)), *documents([5])]


@pytest.mark.parametrize("kernel", [varlen_2_13, varlen_2_11])
@pytest.mark.parametrize("examples", [DOCUMENTS, SHARED], ids=["documents", "shared prompt"])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 9, 10, 14, 20, 21])
def test_a_gpu_computes_the_same_attention(window, examples, kernel, gpu):
    """Stretch by stretch on a CPU, one kernel on a GPU: outputs and gradients, window by window."""
    install, calls = gpu
    install(kernel)
    for heads in ((4, 2), (4, 4), (4, 1)):
        here, expected = attend(examples, heads, sliding_window=window)
        there, found = attend(examples, heads, cuda=True, sliding_window=window)
        torch.testing.assert_close(there, here)
        torch.testing.assert_close(found, expected)
    assert len(calls) == 3


def test_a_window_has_itself_and_the_tokens_before():
    """Width 2, by hand; an answer's first token sees the prompt's last."""
    examples = [shared_prompt(np.arange(9), [np.arange(4), np.arange(4)])]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 17, 8, generator=generator) for _ in range(3))
    stretches = common.collate(examples, False, CPU)["stretches"]
    options = {"scaling": 0.3, "sliding_window": 2, "stretches": stretches}
    out, _ = common.stretch_attention(CAUSAL, q, k, v, None, **options)
    for t, seen in ((0, [0]), (3, [2, 3]), (9, [8, 9]), (13, [8, 13]), (16, [15, 16])):
        weights = (q[0, 0, t] @ k[0, 0, seen].T * 0.3).softmax(0)
        torch.testing.assert_close(out[0, t, 0], weights @ v[0, 0, seen])


def test_what_the_kernel_cannot_do_goes_the_other_way(gpu):
    """float32, an odd or large head, attention dropout, and GPUs before Ampere."""
    install, calls = gpu
    install()
    expected, _ = attend(SHARED, dtype=torch.float32)
    assert torch.equal(attend(SHARED, dtype=torch.float32, cuda=True)[0], expected)
    for head_dim in (12, 264):
        expected, _ = attend(SHARED, head_dim=head_dim)
        assert torch.equal(attend(SHARED, head_dim=head_dim, cuda=True)[0], expected)
    attend(SHARED, cuda=True, dropout=0.5)
    install(capability=(7, 5))
    attend(SHARED, cuda=True)
    assert not calls
    install(capability=(8, 0))
    attend(SHARED, cuda=True)
    assert len(calls) == 1


def test_attention_raises_where_it_would_be_wrong():
    stretches = common.collate(documents([3]), False, CPU)["stretches"]
    q = torch.randn(1, 4, 3, 16)

    def call(module=CAUSAL, mask=None, **options):
        return common.stretch_attention(module, q, q, q, mask, **{"stretches": stretches} | options)

    for name in ("softcap", "position_bias", "s_aux", "something_new"):
        with pytest.raises(NotImplementedError, match=name):
            call(**{name: 30.0})
    for wrong in ({"stretches": None}, {"mask": torch.ones(1, 1, 3, 3)}, {"module": NOT_CAUSAL}):
        with pytest.raises(NotImplementedError):
            call(**wrong)
    harmless = {"position_ids": torch.arange(3)[None], "output_attentions": False, "softcap": None}
    call(**harmless, use_cache=False)
    model = build("llama")
    for mask in (None, torch.ones(1, 3), torch.tensor([[0, 1, 1]])):  # as generation would
        with pytest.raises(NotImplementedError):
            model(input_ids=torch.tensor([[5, 6, 7]]), attention_mask=mask)


NOT_CAUSAL = types.SimpleNamespace(is_causal=False)


@pytest.mark.parametrize("sinks", [torch.zeros(1), torch.randn(4)])
def test_sinks_are_refused(sinks):
    stretches, q = common.collate(documents([3]), False, CPU)["stretches"], torch.randn(1, 4, 3, 16)
    with pytest.raises(NotImplementedError, match="s_aux"):
        common.stretch_attention(CAUSAL, q, q, q, None, stretches=stretches, s_aux=sinks)


def test_a_model_with_sinks_is_refused():
    with pytest.raises(common.UserError, match="--no-packing"):
        build("gpt_oss", num_local_experts=4, num_experts_per_tok=2)


# ------------------------------------------------------------------ log-probabilities


HEADS = [(1.0, None, 1.0), (0.25, None, 1.0), (1.0, 2.0, 1.0), (4.0, 3.0, 1.0), (1.0, None, 100.0)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale, softcap, size", HEADS)  # exp of logits of +-500 is no float32
@pytest.mark.parametrize("head_trains", [False, True])
def test_linear_logps_equal_float64(head_trains, scale, softcap, size, bias, monkeypatch):
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", 31 * 4)  # chunks of 4 rows, the last one smaller
    torch.manual_seed(0)
    hidden, weight, b = torch.randn(10, 8), size * torch.randn(31, 8), torch.randn(31)
    targets, upstream = torch.randint(31, (10,)), torch.randn(10)
    inputs = [hidden, weight, b if bias else None]
    leaves = [x.requires_grad_() for x in inputs[: 3 if head_trains else 1] if x is not None]
    scaled = [hidden * scale, weight, b * scale if bias else None]
    logps = common.LinearLogps.apply(*scaled, targets, softcap)
    ours = torch.autograd.grad(logps @ upstream, leaves)

    h, w, c = (x if x is None else x.detach().double().requires_grad_() for x in inputs)
    z = scale * F.linear(h, w, c)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    expected = z.gather(1, targets[:, None])[:, 0] - z.logsumexp(-1)
    wide = [x for x in (h, w, c) if x is not None][: len(leaves)]
    theirs = torch.autograd.grad(expected @ upstream.double(), wide)
    assert logps.dtype == torch.float32
    assert_close(logps.double(), expected, rel=2e-6)
    for found, right in zip(ours, theirs, strict=True):
        assert (found.double() - right).norm() <= 1e-5 * right.norm()


@pytest.mark.parametrize("head_trains", [False, True])
def test_no_more_than_a_chunk_of_logits_exists(head_trains, monkeypatch):
    """Every operation's inputs, forward and backward: none has more rows of logits than a chunk.
    A frozen head computes its logits once; one that trains, again in the backward pass."""
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", 160 * 8)
    model, batch = build("llama"), packed_batch([40, 30])
    model.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    model.get_output_embeddings().requires_grad_(head_trains)
    options = {"activities": [torch.profiler.ProfilerActivity.CPU], "record_shapes": True}
    with torch.profiler.profile(**options) as profile:
        model.target_logps(**batch).sum().backward()
    calls = [(event.name, event.input_shapes) for event in profile.events()]
    rows = [shape[0] for _, shapes in calls for shape in shapes if shape[1:] == [160]]
    size = 16 if head_trains else 8  # 16: a quarter of the model's width
    assert set(rows) == {size, 68 % size, 64}  # 64: the head's own weight, transposed
    products = [
        shapes[0][0] for name, shapes in calls if name == "aten::mm" and shapes[1] == [64, 160]
    ]
    assert sum(products) == (1 + head_trains) * 68


def test_a_chunk_suits_the_matrix_products():
    """A head that trains has larger chunks where its gradient outweighs them."""
    llama_3, llama_2, small = ((128256, 4096), (32000, 4096), (49152, 576))
    size = functools.partial(torch.empty, device="meta")
    sizes = [[common.chunk_size(size(x), t) for t in (False, True)] for x in (llama_3, llama_2)]
    assert sizes == [[256, 1024], [1024, 1024]]
    assert [common.chunk_size(size(small), t) for t in (False, True)] == [640, 640]


def test_logps_of_a_bfloat16_model_are_float32():
    model, batch = load(own("llama"), dtype=torch.bfloat16), packed_batch([20])
    logps = model.target_logps(**batch)
    assert logps.dtype == torch.float32 and model.dtype == torch.bfloat16
    with common.own_attention(model):  # the same lean modules: only head and softmax differ
        expected = own_logps(model, documents([20]))
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- lean modules


def kept_for_backward(model) -> int:
    """Bytes that the backbone's forward pass keeps besides parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, ids = {}, torch.tensor(documents([40])[0]["input_ids"])[None]

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), x)  # x, or its address is used again
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.base_model(input_ids=ids, use_cache=False)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "granite", "cohere"])
def test_lean_mlps_keep_less(name):
    """silu(gate), (T, f) float32 in each of 2 layers, is not kept. The numbers are judged above,
    by each architecture's own forward pass."""
    model = build(name)
    with common.own_attention(model):
        assert kept_for_backward(own(name)) - kept_for_backward(model) >= 2 * 40 * 128 * 4


def assert_own_numbers(theirs) -> None:
    ours = load(theirs).train()
    logps = ours.target_logps(**packed_batch([20, 9]))
    expected = own_logps(theirs, documents([20, 9]))
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    assert_same(gradients(logps, ours), gradients(expected, theirs))


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "relu"])
def test_mlps_with_other_activations_stay_as_they_are(act):
    assert_own_numbers(own("llama", hidden_act=act))


def test_a_norm_that_adds_one_stays_as_it_is(monkeypatch):
    """Gemma's, under Llama's names."""

    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return x * (1 + self.weight)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)
    assert_own_numbers(own("llama"))


def test_an_mlp_with_dropout_keeps_it(monkeypatch):
    forward = modeling_llama.LlamaMLP.forward
    dropping = lambda self, x: F.dropout(forward(self, x), 0.5, self.training)  # noqa: E731
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", dropping)
    model, batch = build("llama"), packed_batch([20, 9])
    assert torch.equal(model.target_logps(**batch), model.target_logps(**batch))
    model.train()
    assert not torch.isclose(model.target_logps(**batch), model.target_logps(**batch)).any()


# -------------------------------------------------------------------------- loading


def test_bfloat16_compute_with_float32_masters():
    """Masters and their gradients are float32, layers compute in bfloat16: what transformers'
    model gives under autocast, but for the rounding of its norms."""
    model, theirs = load(own("llama"), dtype=torch.bfloat16, weights=torch.float32), own("llama")
    dtypes = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, inputs, out: dtypes.append(out.dtype))
    logps = model.target_logps(**packed_batch([23, 9]))
    assert len(dtypes) == 14 and set(dtypes) == {torch.bfloat16} and logps.dtype == torch.float32
    found = gradients(logps, model)
    assert {x.dtype for x in [*model.parameters(), *found.values()]} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = own_logps(theirs, documents([23, 9]))
    exact = own_logps(theirs, documents([23, 9]))
    assert (logps - exact).norm() < 1.5 * (expected - exact).norm()
    for name, x in gradients(exact, theirs).items():
        assert (found[name] - x).norm() < 0.05 * x.norm(), name


@pytest.fixture
def start(random_model, tmp_path):
    """A function that starts a run of lora.py with a model -> its error, in one line."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Hi", "completion": "Yo"}])

    def run(model) -> str:
        with pytest.raises(common.UserError) as error:
            lora.main(["--model", str(model), "--data", rows, "--output", str(tmp_path / "out")])
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
        return str(error.value)

    shutil.copytree(random_model, tmp_path / "model")
    run.folder = tmp_path / "model"
    return run


def test_weights_that_are_in_no_file_are_refused(start):
    path = start.folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path, {"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in start(start.folder)


def test_weights_of_another_shape_are_refused(start):
    path = start.folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(32)
    save_file(tensors, path, {"format": "pt"})
    assert f"--model {start.folder}: " in start(start.folder)


def test_a_torn_file_of_weights_is_refused(start):
    path = start.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert f"--model {start.folder}: " in start(start.folder)


def test_no_pickle_is_loaded(start):
    weights = load_file(start.folder / "model.safetensors")
    (start.folder / "model.safetensors").unlink()
    torch.save(weights, start.folder / "pytorch_model.bin")
    assert f"--model {start.folder}: " in start(start.folder)


def test_an_adapter_is_no_model(start, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "the/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert f"--adapter {folder} --model the/base" in start(folder)


@pytest.mark.parametrize("name", ["./no/such/folder", "nosuchfolder", "someone/nosuchmodel"])
def test_a_mistyped_or_unreachable_name_is_refused(name, start):
    assert start(name).startswith(f"--model {name}: no such folder, and loading from the Hub")


@pytest.mark.parametrize("version, old", [("2.10.1", True), ("2.9.0+cu128", True),
                                          ("2.11.0+cu130", False), ("3.0.0a0", False)])  # fmt: skip
def test_an_old_torch_is_refused(version, old, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__version__", version)
    args = make_args("--model", TINY, "--output", str(tmp_path / "out"))
    if old:
        with pytest.raises(common.UserError, match="too old.*2.11"):
            common.setup(args)
    else:
        assert common.setup(args)[0].type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("count, recomputed", [([], 3), (["1"], 1), (["2"], 2), (["9"], 3)])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_recomputed_blocks_give_the_same_gradients(name, count, recomputed):
    sizes = {"num_hidden_layers": 3}
    plain = build(name, **sizes).train()
    saving = build(name, "--gradient-checkpointing", *count, **sizes).train()
    calls = []
    for block in saving.base_model.layers:
        block.self_attn.register_forward_hook(lambda *_: calls.append(1))
    examples = [*documents([20]), shared_prompt(np.arange(5, 18), answers(3))]
    batch = common.collate(examples, False, CPU)
    found = gradients(saving.target_logps(**batch), saving)
    assert len(calls) == 3 + recomputed
    assert_same(found, gradients(plain.target_logps(**batch), plain))


# ----------------------------------------------------------------------- generation


@pytest.fixture(scope="module")
def tiny():
    args = make_args("--model", TINY)
    return common.load_model(args, torch.float32, CPU), common.load_tokenizer(args)


def test_left_padded_answers_equal_transformers_one_by_one(tiny):
    model, tokenizer = tiny
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    texts = ["Hi", "Name three colours of the rainbow, please.", "2+2?"]
    turns = [[{"role": "user", "content": text}] for text in texts]
    prompts = [
        tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        for turn in turns
    ]
    prompts += [list(b"Hello"), list(b"A much longer prompt than the first")]
    answers = common.generate(model, tokenizer, prompts, CPU, max_new_tokens=24)
    for prompt, answer in zip(prompts, answers, strict=True):
        settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 258}
        out = theirs.generate(torch.tensor([prompt]), eos_token_id=257, **settings)
        assert answer == tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
    assert len(set(answers)) > 2
    assert model.training  # and it still packs
    model.target_logps(**packed_batch([30, 20], 250)).sum()


def test_what_stops_an_answer(tiny, monkeypatch):
    """The template's end of turn, the tokenizer's eos and the model's, each once."""
    model, tokenizer = tiny
    assert common.stop_ids(model, tokenizer) == [257]
    other = transformers.AutoTokenizer.from_pretrained(TINY)
    other.eos_token = "<|pad|>"
    assert sorted(common.stop_ids(model, other)) == [257, 258]
    for own_eos, expected in (
        (None, [257, 258]),
        (256, [256, 257, 258]),
        ([5, 258], [5, 257, 258]),
    ):
        monkeypatch.setattr(model.generation_config, "eos_token_id", own_eos)
        assert sorted(common.stop_ids(model, other)) == expected
    other.chat_template = "{% for m in messages %}{{ m['content'] }}.{% endfor %}"
    monkeypatch.setattr(model.generation_config, "eos_token_id", 256)
    assert sorted(common.stop_ids(model, other)) == [256, 258]  # "." ends no answer


def test_generation_stops_at_the_templates_end_of_turn(tiny, monkeypatch):
    """Also where tokenizer and model name another eos, as many base models do."""
    model, tokenizer = tiny
    turns = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    limits = ({"max_new_tokens": n} for n in (60, 90))
    short, long = (common.generate(model, tokenizer, [prompt], CPU, **x)[0] for x in limits)
    assert short == long  # it stops by itself
    monkeypatch.setattr(model.generation_config, "eos_token_id", 256)
    other = transformers.AutoTokenizer.from_pretrained(TINY)
    other.eos_token = "<|im_start|>"
    assert common.generate(model, other, [prompt], CPU, max_new_tokens=90) == [long]


# ------------------------------------------------------------------- layers to adapt


def peft_targets(name: str, targets) -> list[str]:
    """The layers that PEFT adapts."""
    model = peft.get_peft_model(own(name), peft.LoraConfig(target_modules=targets))
    layers = model.get_base_model().named_modules()
    return [name for name, module in layers if isinstance(module, peft.tuners.lora.LoraLayer)]


REGULAR = r".*\.layers\.1\.(self_attn|mlp)\.(q|down)_proj"


@pytest.mark.parametrize("name", ["llama", "phi", "gpt_neox"])
def test_all_linear_has_no_head(name):
    adapted = common.find_targets(build(name), " all-linear ")
    assert adapted == peft_targets(name, "all-linear") and adapted
    assert not any("head" in layer or "embed" in layer for layer in adapted)


@pytest.mark.parametrize("targets, theirs, count", [
    ("q_proj,v_proj", ["q_proj", "v_proj"], 4),
    (" q_proj ,  mlp.down_proj", ["q_proj", "mlp.down_proj"], 4),
    ("layers.0.mlp.up_proj", ["layers.0.mlp.up_proj"], 1),
    ("model.layers.1.self_attn.o_proj", ["model.layers.1.self_attn.o_proj"], 1),
    (REGULAR, REGULAR, 2),
    (r"model\.layers\.\d\.mlp\.gate_proj", r"model\.layers\.\d\.mlp\.gate_proj", 2),
])  # fmt: skip
def test_targets_are_pefts(targets, theirs, count):
    adapted = common.find_targets(build("llama"), targets)
    assert adapted == peft_targets("llama", theirs) and len(adapted) == count


@pytest.mark.parametrize("targets, missing", [
    ("q_proj,nope,v_proj", "nope"),
    ("proj", "proj"),  # names are whole between dots
    ("_proj", "_proj"),
    ("q_proj,", ""),
    ("lm_head", "lm_head"),  # the head is never adapted
    (r"layers\.1\..*", r"layers\.1\..*"),  # a regular expression is for whole names
])  # fmt: skip
def test_a_target_that_matches_nothing_is_refused_by_name(targets, missing):
    with pytest.raises(common.UserError) as error:
        common.find_targets(build("llama"), targets)
    message = str(error.value)
    assert message.startswith(f"--targets: {missing!r} matches no") and "down_proj" in message


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(common.UserError, match="GPT2.*no nn.Linear.*full_ft.py"):
        common.find_targets(build("gpt2"), "all-linear")


@pytest.mark.parametrize("rank, targets, expected", [
    (8, "q_proj,v_proj", 4_194_304),
    (16, "q_proj,k_proj,v_proj,o_proj", 16_777_216),
    (64, "all-linear", 159_907_840),
    (32, "q_proj,k_proj,v_proj,up_proj,down_proj", 56_098_816),
])  # fmt: skip
def test_parameter_counts_of_llama_7b(rank, targets, expected, capsys):
    meta, sizes = torch.device("meta"), {"hidden_size": 4096, "intermediate_size": 11008}
    sizes |= {"vocab_size": 32000, "num_hidden_layers": 32, "num_attention_heads": 32}
    with meta:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    assert model.num_parameters() == 6_738_415_616
    args = make_args("--rank", str(rank), "--targets", targets)
    common.add_adapter(model, args, lora.LoRALinear, meta)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert model.num_parameters() == 6_738_415_616 + expected
    assert f"{expected:,} of {6_738_415_616 + expected:,} parameters" in capsys.readouterr().out


# ------------------------------------------------------------------------- on a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("masters", [None, torch.float32])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_the_kernel_keeps_documents_and_answers_apart(name, masters, monkeypatch):
    """bfloat16 on a GPU: as near to float32 as transformers' own forward pass in bfloat16, not
    one bit leaks, and the kernel runs in every layer, also under autocast."""
    calls, kernel = [], common.varlen_attn
    counted = functools.wraps(kernel)(lambda *a, **b: calls.append(1) or kernel(*a, **b))
    monkeypatch.setattr(common, "varlen_attn", counted)
    device, theirs = torch.device("cuda"), own(name, head_dim=64)
    ours = load(theirs, dtype=torch.bfloat16, device=device, weights=masters)
    prompt = np.random.default_rng(3).integers(5, 160, 30)
    shared, separate = shared_prompt(prompt, answers(5)), apart(prompt, answers(5))
    first, last = documents([50, 40])
    calls.clear()
    logps = ours.target_logps(**common.collate([first, shared, last], False, device))
    assert len(calls) == 2
    found = gradients(logps, ours)
    exact = own_logps(theirs.to(device), [first, *separate, last])
    expected = gradients(exact, theirs)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        rounded = own_logps(theirs, [first, *separate, last])
    assert (logps - exact).norm() < 2 * (rounded - exact).norm()
    for key, x in expected.items():
        assert (found[key].float() - x).norm() < 0.1 * x.norm(), key
    first["input_ids"] = first["input_ids"][::-1].copy()
    again = ours.target_logps(**common.collate([first, shared, last], False, device))
    assert torch.equal(logps[49:], again[49:]) and not torch.equal(logps[:49], again[:49])

"""Log-probabilities, packed attention and model loading, against each architecture's own code and float64 closed forms."""

import argparse
import functools
import math
import types

import pytest
import torch
import torch.nn.functional as F
import transformers

import before  # noqa: F401  (finds the repository, and adds --model random)
import common_before as common

SMALL = dict(vocab_size=160, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, max_position_embeddings=128, pad_token_id=0)  # fmt: skip
ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 8},  # shorter than the documents below
    "gpt_neox": {"num_key_value_heads": None},
    "gemma2": {"final_logit_softcapping": 0.5, "attn_logit_softcapping": 5.0, "sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "phi": {},  # a head with a bias
    "stablelm": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


def build(name: str, **extra):
    """A small random model of an architecture, as `load_model` leaves it, with biases that are not zero."""
    sizes = {key: value for key, value in (SMALL | ARCHITECTURES.get(name, {}) | extra).items() if value is not None}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **sizes)).eval()
    for parameter_name, p in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.3)
    model.target_logps = types.MethodType(common.target_logps, model)
    model.padded_attention = model.config._attn_implementation
    return model


def packed_batch(lengths, vocab_size=160, device="cpu"):
    """Random documents end to end; every token but the first of each document is a target."""
    ids = torch.randint(5, vocab_size, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    starts = torch.tensor([0, *lengths]).cumsum(0)
    is_first = torch.zeros(sum(lengths), dtype=torch.bool).index_fill(0, starts[:-1], True)
    index = torch.arange(sum(lengths))[~is_first] - 1
    batch = {"input_ids": ids, "targets": ids[0, index + 1], "target_index": index}
    batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    return {name: x.to(device) for name, x in batch.items()} | {"documents": (lengths, starts.to(torch.int32).to(device), max(lengths))}


def own_logps(model, lengths, ids):
    """Each document alone through the model's own forward: log_softmax of its logits at the next tokens."""
    pieces = []
    with common.attention(model, model.padded_attention):
        for document in ids.split(lengths, dim=1):
            logits = model(input_ids=document, use_cache=False).logits[0, :-1].float()
            pieces.append(logits.log_softmax(-1).gather(1, document[0, 1:, None])[:, 0])
    return torch.cat(pieces)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_documents_get_their_own_logps_and_gradients(name):
    """Head, packing and positions at once: a packed row equals each document alone through the model's own forward."""
    model, lengths = build(name), [23, 1, 9, 14]
    common.choose_packed_attention(model, exact=True)
    common.check_head(model, exact=True)
    batch = packed_batch(lengths)
    logps = model.target_logps(**batch)
    assert logps.dtype == torch.float32
    expected = own_logps(model, lengths, batch["input_ids"])
    torch.testing.assert_close(logps, expected, rtol=0, atol=2e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad((logps * weights).sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad((expected * weights).sum(), parameters, allow_unused=True)
    for p, a, b in zip(parameters, ours, theirs):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt_neox", "mistral", "gemma3_text"])
def test_document_attention_is_the_path_taken(name):
    model = build(name)
    common.choose_packed_attention(model, exact=True)
    assert model.config._attn_implementation == "documents"


@pytest.mark.parametrize("implementation", ["documents", "sdpa"])
def test_nothing_leaks_between_documents(implementation):
    """Not one bit of the second document's log-probabilities changes with the first document's tokens."""
    model = build("llama")
    model.set_attn_implementation(implementation)
    batch = packed_batch([12, 9])
    before = model.target_logps(**batch)[11:]
    batch["input_ids"][0, :12] = batch["input_ids"][0, :12].flip(0) + 1
    assert torch.equal(before, model.target_logps(**batch)[11:])


def test_models_that_leak_are_refused():
    with pytest.raises(common.UserError, match="--no-packing"):  # ALiBi knows no position_ids
        common.choose_packed_attention(build("bloom", n_layer=2, n_head=4), exact=True)
    with pytest.raises(common.UserError, match="--no-packing"):  # a recurrent state runs through
        common.choose_packed_attention(build("mamba"), exact=True)


def test_models_with_an_unknown_head_are_refused():
    with pytest.raises(common.UserError, match="not known here"):
        common.check_head(build("recurrent_gemma", logits_soft_cap=0.5, num_hidden_layers=3), exact=True)
    model = build("llama")
    forward = model.forward
    model.forward = lambda **inputs: types.SimpleNamespace(logits=forward(**inputs).logits * 1.1)
    with pytest.raises(common.UserError, match="not known here"):
        common.check_head(model, exact=True)


def test_document_attention_raises_where_it_would_be_wrong():
    model = build("llama")
    model.set_attn_implementation("documents")
    with pytest.raises(ValueError, match="document lengths"):
        model(input_ids=torch.tensor([[5, 6]]), attention_mask=torch.tensor([[0, 1]]))
    q, documents = torch.randn(1, 4, 3, 16), ([3], torch.tensor([0, 3], dtype=torch.int32), 3)
    module = types.SimpleNamespace(is_causal=True)
    for unknown in ({"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(4)}):
        with pytest.raises(NotImplementedError):
            common.document_attention(module, q, q, q, None, documents=documents, **unknown)
    with pytest.raises(NotImplementedError):
        common.document_attention(types.SimpleNamespace(is_causal=False), q, q, q, None, documents=documents)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.25, None), (1.0, 2.0), (4.0, 3.0)])
@pytest.mark.parametrize("head_trains", [False, True])
def test_linear_logps_equal_the_float64_closed_form(head_trains, scale, softcap, bias, monkeypatch):
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", 31 * 4)  # chunks of 4 rows, the last one smaller
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(10, 8), torch.randn(31, 8), torch.randint(31, (10,))
    b, upstream = torch.randn(31) if bias else None, torch.randn(10)
    leaves = [hidden.requires_grad_()] + ([x.requires_grad_() for x in (weight, b) if x is not None] if head_trains else [])
    logps = common.LinearLogps.apply(hidden, weight, b, targets, scale, softcap)
    ours = torch.autograd.grad((logps * upstream).sum(), leaves)

    wide = [x.detach().double().requires_grad_() for x in leaves]
    h, w, c = wide[0], wide[1] if head_trains else weight.double(), None
    if bias:
        c = wide[2] if head_trains else b.double()
    z = scale * F.linear(h, w, c)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    expected = z.gather(1, targets[:, None])[:, 0] - z.logsumexp(-1)
    theirs = torch.autograd.grad((expected * upstream.double()).sum(), wide)
    torch.testing.assert_close(logps.double(), expected, rtol=0, atol=1e-5)
    for a, e in zip(ours, theirs):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


def test_no_more_than_a_chunk_of_logits_exists(monkeypatch):
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", 160 * 8)
    seen, head_logits = [], common.head_logits
    monkeypatch.setattr(common, "head_logits", lambda *args: seen.append(head_logits(*args)) or seen[-1])
    model = build("llama")
    model.target_logps(**packed_batch([40, 30]) | {"documents": None}).sum().backward()
    assert max(logits.numel() for logits in seen) == 160 * 8
    assert len(seen) == 2 * math.ceil(68 / 8)  # once in each pass, as the head trains
    seen.clear()
    model.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    model.target_logps(**packed_batch([40, 30]) | {"documents": None}).sum().backward()
    assert len(seen) == math.ceil(68 / 8)  # a frozen head computes its logits once


def test_logps_of_a_bfloat16_model_are_float32():
    model = build("llama").to(torch.bfloat16)
    batch = packed_batch([20])
    logps = model.target_logps(**batch | {"documents": None})
    logits = model(input_ids=batch["input_ids"]).logits[0, :-1]
    expected = logits.float().log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)


def tiny_args(*flags, **settings):
    args = common.make_parser("", output="unused", lr=1e-3).parse_args(list(flags))
    return argparse.Namespace(**vars(args) | settings)


def tiny(*flags):
    return common.load_model(tiny_args(*flags), torch.float32, torch.device("cpu"))


def test_the_tiny_model_starts_at_ln_of_its_vocabulary_and_is_always_the_same():
    model = tiny()
    loss = -model.target_logps(**packed_batch([64, 64], 320)).mean()
    assert abs(loss.item() - math.log(320)) < 0.05
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), common.tiny_model().parameters()))
    assert model.config.num_key_value_heads < model.config.num_attention_heads


def kept_for_backward(model, ids) -> tuple[torch.Tensor, int]:
    """(loss of the model's own forward, bytes that the forward pass keeps besides parameters)"""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)  # x, or its address might be taken again
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logits = model(input_ids=ids, use_cache=False).logits
    return (logits.float() ** 2).mean(), sum(size for size, _ in kept.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lean_blocks_give_the_same_logits_and_gradients(name):
    model, ids = build(name), torch.arange(40).view(2, 20) * 7 % 150 + 5
    for parameter_name, p in model.named_parameters():
        if "norm" in parameter_name and parameter_name.endswith("weight"):
            torch.nn.init.normal_(p, mean=1.0, std=0.3)
    loss, kept = kept_for_backward(model, ids)
    expected = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    names, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    common.make_lean(model)
    lean_loss, lean_kept = kept_for_backward(model, ids)
    torch.testing.assert_close(lean_loss, loss, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(lean_loss, list(model.parameters()), allow_unused=True)
    for gradient, own in zip(gradients, expected):
        torch.testing.assert_close(gradient, own, rtol=1e-4, atol=1e-7)
    assert list(model.state_dict()) == names and not model.training
    lean = name in ("llama", "qwen2", "qwen3", "mistral", "granite", "cohere", "stablelm")  # the others have GELU, or no gate
    assert lean_kept < 0.92 * kept if lean else lean_kept <= kept
    replaced = [old for old, module in zip(classes, model.modules()) if type(module) is not old]
    assert bool(replaced) == (lean or name == "qwen3_moe") and not any("Gemma" in old.__name__ for old in replaced)


@pytest.mark.filterwarnings("error:Mismatch dtype")
def test_a_float32_norm_in_a_bfloat16_stream_stays_one_kernel():
    """As QLoRA has them. PyTorch warns where the dtypes differ, because a GPU then takes a kernel for each part of the norm."""
    model = build("llama").bfloat16()
    common.make_lean(model)
    norm, own = model.model.norm.float(), transformers.models.llama.modeling_llama.LlamaRMSNorm(model.config.hidden_size)
    norm.weight.data.normal_(1, 0.3).copy_(norm.weight.bfloat16())
    own.weight.data.copy_(norm.weight)
    x = torch.randn(5, model.config.hidden_size).bfloat16()
    torch.set_warn_always(True)
    try:
        out = norm(x)
    finally:
        torch.set_warn_always(False)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), own(x.float()), rtol=2**-8, atol=0)  # rounded once


def test_blocks_with_dropout_are_not_replaced():
    model = build("llama")
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: F.dropout(type(mlp).forward(mlp, x), 0.5, mlp.training)
    common.make_lean(model)
    assert type(mlp) is not type(model.model.layers[1].mlp) and type(mlp) is transformers.models.llama.modeling_llama.LlamaMLP


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model = build("llama")
    ids = torch.randint(5, 160, (1, 10))
    alone = model.target_logps(ids, ids[0, 1:], torch.arange(9))
    pad = torch.zeros(1, 4, dtype=torch.long)
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], dim=1)
    mask = (torch.arange(14) >= 4 if side == "left" else torch.arange(14) < 10).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    index = torch.arange(9) + (4 if side == "left" else 0)
    logps = model.target_logps(padded, ids[0, 1:], index, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(logps, alone, rtol=0, atol=1e-5)


def test_left_padded_generation_is_right_after_packed_training():
    """Three SGD steps on packed rows, then prompts of unlike length in one batch must give what each gives alone."""
    model, tokenizer = tiny(), common.tiny_tokenizer()
    with torch.no_grad():  # a sharper model than the default, so that greedy answers depend on the prompt
        for p in model.parameters():
            p.mul_(4) if p.dim() == 2 else None
    assert model.config._attn_implementation == "documents"
    model.train()
    for _ in range(3):
        (-model.target_logps(**packed_batch([30, 20], 250)).mean()).backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.05 * p.grad)
                p.grad = None
    prompts = [list(b"Hello"), list(b"A much longer prompt than the first")]
    device = torch.device("cpu")
    together = common.generate(model, tokenizer, prompts, device, max_new_tokens=24)
    alone = [common.generate(model, tokenizer, [prompt], device, max_new_tokens=24)[0] for prompt in prompts]
    assert together == alone and together[0] != together[1]
    assert model.config._attn_implementation == "documents" and model.training


@pytest.mark.parametrize("flags, recomputed", [(["--gradient-checkpointing"], 4), (["--checkpoint-blocks", "1"], 1)])
def test_gradient_checkpointing_changes_no_gradient(flags, recomputed):
    plain, saving, batch = tiny(), tiny(), packed_batch([40, 24], 250)
    args = tiny_args(*flags)
    args.gradient_checkpointing |= args.checkpoint_blocks is not None
    common.checkpoint_blocks(saving, args)
    calls = []
    for block in common.blocks(saving):
        block.self_attn.register_forward_hook(lambda *_: calls.append(1))
    for model in (plain.train(), saving.train()):
        model.target_logps(**batch).sum().backward()
    assert len(calls) == 4 + recomputed
    for a, b in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def test_the_fingerprint_tells_bases_of_the_same_shape_apart():
    model, other = build("llama"), build("llama")
    assert common.fingerprint(model) == common.fingerprint(other) == common.fingerprint(model.to(torch.bfloat16))
    with torch.no_grad():
        other.get_input_embeddings().weight[3] += 0.1
    assert common.fingerprint(model) != common.fingerprint(other)


def test_the_fingerprint_tells_a_base_from_what_was_merged_into_it():
    model, other = build("llama"), build("llama")
    with torch.no_grad():
        other.base_model.layers[1].mlp.down_proj.weight += 0.01 * torch.randn(other.base_model.layers[1].mlp.down_proj.weight.shape)
    assert common.fingerprint(model) != common.fingerprint(other)


@pytest.mark.parametrize("template, match", [("chatml", "no <.im_start.>"), ("no-such-template", ".jinja")])
def test_bad_templates_are_refused(template, match, tmp_path):
    tokenizer = common.tiny_tokenizer()
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=transformers.GPT2TokenizerFast().backend_tokenizer, eos_token="<|e|>")
    plain.save_pretrained(tmp_path)
    common.tiny_model().config.save_pretrained(tmp_path)
    assert tokenizer.chat_template == common.CHATML
    with pytest.raises(common.UserError, match=match):
        common.load_tokenizer(tiny_args("--model", str(tmp_path), "--template", template))


def test_what_the_tokenizer_lacks_is_chosen_and_said(tmp_path, capsys):
    tokenizer = common.tiny_tokenizer()
    tokenizer.chat_template, tokenizer.pad_token = None, None
    tokenizer.save_pretrained(tmp_path)
    common.tiny_model().config.save_pretrained(tmp_path)
    loaded, _ = common.load_tokenizer(tiny_args("--model", str(tmp_path)))
    printed = capsys.readouterr().out
    assert "Alpaca layout" in printed and "no pad token" in printed
    assert loaded.chat_template == common.ALPACA and loaded.pad_token_id == loaded.eos_token_id


def test_no_pickle_is_loaded(tmp_path):
    """A folder with only pytorch_model.bin is refused, whatever is in it."""
    model = common.tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(common.UserError, match="--model"):
        common.load_model(tiny_args("--model", str(tmp_path)), torch.float32, torch.device("cpu"))


def test_more_positions_than_the_model_has_are_refused():
    with pytest.raises(common.UserError, match="4096 positions"):
        tiny("--max-length", "5000")


def test_a_generation_config_that_transformers_would_not_save_is_mended(tmp_path):
    model = common.tiny_model()
    model.padded_attention, model.generation_config.temperature = "sdpa", 0.7
    common.save_model(tmp_path, model, common.tiny_tokenizer())
    loaded = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert loaded.temperature == 0.7 and loaded.do_sample and loaded.eos_token_id == 257


class OnCuda(torch.Tensor):
    """A CPU tensor that takes the path of a GPU's."""

    is_cuda = True


def plain_varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """What torch documents of varlen_attn, position by position: window_size (left, right), -1 for no limit. q (T, H, head_dim)."""
    left, right = window_size
    out = torch.zeros_like(q)
    for first, last in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:]):
        for t in range(first, last):
            start, end = first if left < 0 else max(first, t - left), last if right < 0 else min(last, t + right + 1)
            for h in range(q.shape[1]):
                g = h * k.shape[1] // q.shape[1]
                weights = (k[start:end, g] @ q[t, h] * scale).softmax(0)
                out[t, h] = weights @ v[start:end, g]
    return out


@pytest.mark.parametrize("sliding_window", [None, 1, 2, 5, 9, 10])
def test_varlen_attention_is_asked_for_the_same_window(sliding_window, monkeypatch):
    """The GPU's path with a plain loop in varlen_attn's place equals the CPU's, window by window."""
    monkeypatch.setattr(common, "varlen_attn", plain_varlen_attn)
    torch.manual_seed(0)
    lengths = [9, 1, 6]
    q, k, v = (torch.randn(1, heads, 16, 8, dtype=torch.float64) for heads in (4, 2, 2))
    documents = (lengths, torch.tensor([0, 9, 10, 16], dtype=torch.int32), 9)
    module, options = types.SimpleNamespace(is_causal=True), {"scaling": 0.3, "sliding_window": sliding_window, "documents": documents}
    here, _ = common.document_attention(module, q, k, v, None, **options)
    there, _ = common.document_attention(module, *(x.as_subclass(OnCuda) for x in (q, k, v)), None, **options)
    torch.testing.assert_close(there.as_subclass(torch.Tensor), here)
    if sliding_window == 2:  # itself and the one before, by hand
        weights = (q[0, 0, 3] @ k[0, 0, 2:4].T * 0.3).softmax(0)
        torch.testing.assert_close(here[0, 3, 0], weights @ v[0, 0, 2:4])


@pytest.mark.cuda
def test_float32_masters_under_autocast_use_varlen_attention(monkeypatch):
    """Rotary embedding makes queries float32 under autocast: they must be cast back, or the slow path is taken silently."""
    calls, varlen_attn = [], common.varlen_attn
    counted = functools.wraps(varlen_attn)(lambda *args, **options: calls.append(1) or varlen_attn(*args, **options))
    monkeypatch.setattr(common, "varlen_attn", counted)
    model = build("llama", head_dim=64).to("cuda")
    model.set_attn_implementation("documents")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        model.target_logps(**packed_batch([70, 30], device="cuda")).sum().backward()
    assert len(calls) == 2


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_varlen_attention_on_cuda_keeps_documents_apart(name):
    """bfloat16 on CUDA goes through varlen_attn: same values as each document alone, to bfloat16's precision, and no leak."""
    model = build(name, head_dim=64).to("cuda", torch.bfloat16)
    common.choose_packed_attention(model, exact=False)
    assert model.config._attn_implementation == "documents"
    lengths = [70, 3, 40]
    batch = packed_batch(lengths, device="cuda")
    logps = model.target_logps(**batch)
    torch.testing.assert_close(logps, own_logps(model, lengths, batch["input_ids"]), rtol=0, atol=0.05)
    batch["input_ids"][0, :70] = batch["input_ids"][0, :70].flip(0)
    assert torch.equal(logps[69:], model.target_logps(**batch)[69:])
    logps.sum().backward()

"""New tokens against PEFT and transformers, and what stops generation by other programs."""

import json

import peft
import pytest
import torch
import transformers
from conftest import TINY, read_metrics, write_rows
from safetensors.torch import load_file

import common
import lora
import qlora
import sft

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1,
    "bos_token_id": None, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
COLOURS = "red blue green".split()
ROWS = [{"prompt": f"Mark {c}", "completion": f"<a>{c}<b>"} for c in COLOURS]
CHATML = """{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' + m['content'] + '<|stop|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"""
# the bundled tokenizer has 259 tokens
KINDS = {
    "tied": (transformers.LlamaForCausalLM, {"vocab_size": 259, "tie_word_embeddings": True}),
    "untied": (transformers.LlamaForCausalLM, {"vocab_size": 259, "tie_word_embeddings": False}),
    "spare rows": (transformers.LlamaForCausalLM, {"vocab_size": 260}),
    "scaled": (  # by sqrt(d) behind the table
        transformers.Gemma3ForCausalLM,
        {"vocab_size": 259, "query_pre_attn_scalar": 16, "sliding_window": 16},
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    """Folders with a model of each kind and the bundled tokenizer."""
    folders = {}
    for name, (kind, more) in KINDS.items():
        folder = folders[name] = str(tmp_path_factory.mktemp("bases") / name)
        torch.manual_seed(0)
        kind(kind.config_class(**SIZES | more)).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folders


@pytest.fixture
def flags(tmp_path):
    """name, base, more flags -> the flags of six steps on ROWS"""
    data = write_rows(tmp_path / "rows.jsonl", ROWS)

    def of(name, base, *more) -> list[str]:
        start = ["--model", str(base), "--data", data, "--output", str(tmp_path / name)]
        start += "--max-steps 6 --batch-size 3 --lr 0.01 --samples 0 --eval-data 0".split()
        return [*start, *map(str, more)]

    return of


NEW = ["--add-tokens", "<a>", "<b>"]


def own(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokenizer_of(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def from_peft(folder):
    auto = peft.AutoPeftModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model):
    ids = torch.randint(0, 261, (2, 40), generator=torch.Generator().manual_seed(3))
    return model(input_ids=ids).logits


def tables(model):
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


@pytest.mark.parametrize("kind", KINDS)
def test_peft_and_merged_folders_have_the_same_logits(kind, bases, flags, tmp_path):
    lora.main(flags("adapter", bases[kind], *NEW))
    lora.main(flags("merged", bases[kind], "--merge-only", "--adapter", tmp_path / "adapter"))
    base, merged = own(bases[kind]), own(tmp_path / "merged")
    theirs = logits(from_peft(tmp_path / "adapter"))
    assert merged.config.vocab_size == theirs.shape[-1] == 261
    torch.testing.assert_close(logits(merged), theirs, rtol=1e-4, atol=1e-4)
    tied = base.config.tie_word_embeddings
    for old, new in zip(tables(base), tables(merged)):  # other rows are the base's, bit for bit
        assert torch.equal(new[:259], old[:259])
        assert (new[259:] - old.mean(0)).abs().amax(1).min() > 1e-3
    (path,) = (tmp_path / "merged").glob("*.safetensors")
    assert ("lm_head.weight" in load_file(path)) == (not tied)
    rows = [x for key, x in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()
            if "lora" not in key]  # fmt: skip
    assert [tuple(x.shape) for x in rows] == [(2, 64)] * (1 if tied else 2)


@pytest.mark.parametrize("kind", ["tied", "untied", "scaled"])
def test_the_gradients_of_the_rows_are_pefts(kind, bases, flags, monkeypatch):
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(lora, "train", seen.append)
        lora.main(flags("unused", bases[kind], *NEW))
    tokenizer = common.load_tokenizer(seen[0])
    ours = common.load_model(seen[0], torch.float32, CPU, vocab_size=len(tokenizer))
    config = common.add_adapter(ours, seen[0], lora.LoRALinear, CPU, tokenizer)
    ids = torch.tensor([5, 259, 40, 260, 259, 70, 257])
    example = {"input_ids": ids.numpy(), "is_target": [False] + [True] * 6}
    ours.target_logps(**common.collate([example], False, CPU)).sum().backward()

    base = own(bases[kind])
    base.resize_token_embeddings(261, mean_resizing=False)
    with torch.no_grad():
        for table in tables(base):
            table[259:] = table[:259].mean(0)
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    logps = theirs(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    logps.gather(1, ids[1:, None]).sum().backward()
    found = {f"base_model.model.{name}": p.grad for name, p in ours.named_parameters()}
    expected = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters()}
    trained = [name for name in expected if "trainable_tokens_delta" in name and "orig" not in name]
    assert len(trained) == (2 if kind == "untied" else 1)
    for name in trained:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
        assert expected[name].abs().amax(1).min() > 0.1
    assert [name for name, x in found.items() if x is not None and "lora" not in name] == trained


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_an_adapter_with_new_tokens_goes_on(kind, bases, flags, tmp_path):
    """--adapter starts with its rows and its tokenizer; --resume equals a run without a stop."""
    lora.main(flags("first", bases[kind], *NEW))
    first = load_file(tmp_path / "first" / "adapter_model.safetensors")
    lora.main(flags("second", bases[kind], "--adapter", tmp_path / "first", "--max-steps", 0))
    second = load_file(tmp_path / "second" / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    configs = [json.loads((tmp_path / x / "adapter_config.json").read_text())
               for x in ("first", "second")]  # fmt: skip
    assert configs[0]["trainable_token_indices"] == configs[1]["trainable_token_indices"]
    with pytest.raises(common.UserError, match="does not fit"):
        more = ["--add-tokens", "<c>", "--adapter", tmp_path / "first"]
        lora.main(flags("third", bases[kind], *more))


def test_a_pad_token_that_the_model_lacks_is_no_obstacle(bases, flags, tmp_path):
    """Adapters of other tools have tokenizers with an added [PAD]."""
    first = tmp_path / "first"
    lora.main(flags("first", bases["tied"]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(first)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(first)
    lora.main(flags("second", bases["tied"], "--adapter", first, "--samples", 2))
    qlora.main(flags("third", bases["tied"], "--adapter", first, "--samples", 2))


@pytest.mark.parametrize("script, more", [(lora, []), (sft, ["--lora-rank", 4]), (sft, [])])
def test_a_run_with_new_tokens_resumes(script, more, bases, flags, tmp_path, monkeypatch):
    more = [*NEW, *more, "--save-every", 2]
    script.main(flags("whole", bases["tied"], *more))
    rate = common.learning_rate
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stop(step, *others):
            if step == 4:
                raise KeyboardInterrupt
            return rate(step, *others)

        patch.setattr(common, "learning_rate", stop)
        script.main(flags("parts", bases["tied"], *more))
    script.main(flags("parts", bases["tied"], *more, "--resume"))
    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    for a, b in zip(whole[1:-1], parts[1:-1], strict=True):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])
    (path,) = (tmp_path / "whole").glob("*model.safetensors")
    whole, parts = load_file(path), load_file(tmp_path / "parts" / path.name)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_pefts_own_adapter_with_new_tokens_is_read(bases, flags, tmp_path):
    """Ids as a list, not in order."""
    base = own(bases["tied"])
    base.resize_token_embeddings(261)
    options = {"r": 4, "task_type": "CAUSAL_LM", "trainable_token_indices": [260, 259, 7]}
    options |= {"target_modules": ["q_proj"], "init_lora_weights": False}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**options))
    for name, p in theirs.named_parameters():
        if "delta" in name:
            torch.nn.init.normal_(p)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    tokenizer = tokenizer_of(bases["tied"])
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.save_pretrained(tmp_path / "theirs")
    lora.main(flags("merged", bases["tied"], "--merge-only", "--adapter", tmp_path / "theirs"))
    expected = logits(theirs.eval())
    torch.testing.assert_close(logits(own(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_full_fine_tuning_grows_the_model(kind, bases, flags, tmp_path):
    """New rows start at the mean, to the noise that transformers adds, and train."""
    sft.main(flags("start", bases[kind], *NEW, "--max-steps", 0))
    sft.main(flags("end", bases[kind], *NEW, "--lr", 1e-3))
    old, start, end = (own(x) for x in (bases[kind], tmp_path / "start", tmp_path / "end"))
    assert end.config.vocab_size == 261 == len(tokenizer_of(tmp_path / "end"))
    for a, b, c in zip(*map(tables, (old, start, end))):
        assert torch.equal(b[:259], a)
        assert (b[259:] - a.mean(0)).abs().max() < 1e-3
        assert (c - b).abs().amax(1)[259:].min() > 1e-3
    logits(end)


# ------------------------------------------------------------------------------ what stops


def answer(model, tokenizer, prompt: str, **options) -> str:
    """By transformers' generate."""
    turns = [{"role": "user", "content": prompt}]
    inputs = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    inputs = tokenizer.apply_chat_template(turns, **inputs)
    out = model.generate(**inputs, do_sample=False, max_new_tokens=60, **options)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


def assert_stops(adapter, merged, prompt: str, expected: str) -> None:
    """PEFT with the folder's tokenizer or generation config, and the merged folder as it is."""
    theirs, tokenizer = from_peft(adapter), tokenizer_of(adapter)
    eos = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    assert answer(theirs, tokenizer, prompt, **eos) == expected
    config = transformers.GenerationConfig.from_pretrained(adapter)
    config.max_new_tokens = 60
    assert answer(theirs, tokenizer, prompt, generation_config=config) == expected
    assert answer(own(merged), tokenizer_of(merged), prompt) == expected


@pytest.mark.parametrize("has_config", [True, False])
def test_a_base_that_learns_a_template_stops(has_config, bases, flags, tmp_path):
    """Its eos is another token; the end of turn is special in the tokenizer's added tokens alone.
    The template is --template's, which --merge-only takes from the adapter."""
    base = own(bases["spare rows"])
    base.generation_config.eos_token_id = base.config.eos_token_id = 256
    base.save_pretrained(tmp_path / "base")
    if not has_config:
        (tmp_path / "base" / "generation_config.json").unlink()
    tokenizer = tokenizer_of(bases["spare rows"])
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.eos_token, end = "<|im_start|>", tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "chat.jinja").write_text(template)
    row = write_rows(tmp_path / "one.jsonl", ROWS[:1])
    more = ["--template", tmp_path / "chat.jinja", "--data", row, "--max-steps", 25]
    lora.main(flags("adapter", tmp_path / "base", *more))
    lora.main(flags("merged", tmp_path / "base", "--merge-only", "--adapter", tmp_path / "adapter"))
    expected = ROWS[0]["completion"] + end
    assert_stops(tmp_path / "adapter", tmp_path / "merged", ROWS[0]["prompt"], expected)
    sft.main(flags("full", tmp_path / "base", *more, "--lr", 1e-3))
    full = tmp_path / "full"
    assert answer(own(full), tokenizer_of(full), ROWS[0]["prompt"]) == expected
    for folder in ("adapter", "merged", "full"):
        assert tokenizer_of(tmp_path / folder).eos_token == end


def test_a_new_end_of_turn_stops(bases, flags, tmp_path):
    """A template's own new tokens are special, other ones are text."""
    (tmp_path / "chat.jinja").write_text(CHATML)
    row = write_rows(tmp_path / "one.jsonl", ROWS[:1])
    more = ["--add-tokens", "<a>", "<b>", "<|turn|>", "<|stop|>", "--data", row]
    more += ["--template", tmp_path / "chat.jinja", "--max-steps", 30]
    lora.main(flags("adapter", bases["untied"], *more))
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    lora.main(flags("merged", bases["untied"], "--merge-only", "--adapter", adapter))
    assert_stops(adapter, merged, ROWS[0]["prompt"], "<a>red<b><|stop|>")
    tokenizer = tokenizer_of(adapter)
    assert tokenizer.eos_token == "<|stop|>"
    ids = tokenizer("<|turn|><a>red<b><|stop|>").input_ids
    assert ids == [261, 259, *tokenizer("red").input_ids, 260, 262]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<a>red<b>"


def test_a_model_that_stops_keeps_its_tokenizers_eos(bases, flags, tmp_path):
    base, tokenizer = own(bases["spare rows"]), tokenizer_of(bases["spare rows"])
    base.generation_config.eos_token_id = [257, 256]
    base.save_pretrained(tmp_path / "base")
    tokenizer.eos_token = "<|im_start|>"
    tokenizer.save_pretrained(tmp_path / "base")
    lora.main(flags("adapter", tmp_path / "base"))
    assert tokenizer_of(tmp_path / "adapter").eos_token == "<|im_start|>"


# ----------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("script", ["dora", "qlora", "full_ft"])
def test_other_scripts_name_those_that_add_tokens(script, bases, flags, tmp_path):
    tokenizer = tokenizer_of(bases["tied"])
    tokenizer.add_tokens(["<a>", "<b>"])
    own(bases["tied"]).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(common.UserError, match="no token '<b>': lora.py and sft.py"):
        __import__(script).main(flags("out", tmp_path / "base"))
    lora.main(flags("adapter", tmp_path / "base", "--max-steps", 1))  # no flag needed
    with pytest.raises(common.UserError, match="no token|does not fit"):
        __import__("dora").main(flags("out", tmp_path / "base", "--adapter", tmp_path / "adapter"))

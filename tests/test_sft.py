"""sft.py: the worked example of its docstring, losses against TRL's SFTTrainer, NEFTune, early stopping, both ways to train."""

import math

import datasets
import peft
import pytest
import safetensors.torch
import torch
import transformers
import trl
from conftest import RANDOM, read_metrics, run_script, write_rows

import common
import sft

CONVERSATIONS = [{"prompt": "Hi", "completion": "Yo"}, {"prompt": "2+2?", "completion": "4"}]


def arguments(*flags, data=None):
    parser = common.make_parser("doc")
    sft.add_training_flags(parser)
    parser.add_argument("--loss-on", default="answers")
    return parser.parse_args(["--output", "unused", "--eval-fraction", "0", *(["--data", data] if data else []), *map(str, flags)])


def batch_of(rows, tmp_path, *flags):
    args = arguments(*flags, data=write_rows(tmp_path / "rows.jsonl", rows))
    corpus, _ = common.load_data(args, common.tiny_tokenizer(), 320)
    corpus.order = lambda epoch: torch.arange(len(rows)).numpy()
    return next(iter(corpus.deal(corpus.rows())))


def worked_example(tmp_path) -> str:
    """The table in sft.py's docstring, from the batch that the model gets."""
    batch, tokenizer = batch_of(CONVERSATIONS, tmp_path), common.tiny_tokenizer()
    ids, positions = batch["input_ids"][0].tolist(), batch["position_ids"][0].tolist()
    documents = (torch.tensor(positions) == 0).cumsum(0).tolist()
    target = [i - 1 in batch["target_index"].tolist() for i in range(len(ids))]
    lines, start = ["    document  positions  target  text"], 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or (documents[i], target[i]) != (documents[start], target[start]):
            place = f"{positions[start]:2} .. {positions[i - 1]:2}"
            text = tokenizer.decode(ids[start:i]).replace("\n", "\\n")
            lines.append(f"    {documents[start]:8}  {place:9}  {'yes' if target[start] else 'no':6}  {text}")
            start = i
    return "\n".join(lines) + "\n"


def test_the_worked_example_is_what_the_code_makes(tmp_path):
    assert worked_example(tmp_path) in sft.__doc__.replace("\\\\n", "\\n")


def test_loss_on_all_takes_every_token_but_the_first(tmp_path):
    batch = batch_of(CONVERSATIONS, tmp_path, "--loss-on", "all")
    ids, positions = batch["input_ids"][0], batch["position_ids"][0]
    assert batch["targets"].tolist() == ids[positions > 0].tolist()
    assert batch["target_index"].tolist() == [i - 1 for i in range(len(ids)) if positions[i] > 0]


@pytest.mark.parametrize("loss_on", ["answers", "all"])
def test_the_loss_is_that_of_trls_trainer(loss_on, tmp_path):
    rows = [{"prompt": c, "completion": c * n} for c in "ab" for n in (1, 7)]
    batch, tokenizer = batch_of(rows, tmp_path, "--loss-on", loss_on), common.tiny_tokenizer()
    model = common.load_model(arguments(), torch.float32, torch.device("cpu"))
    ours = -model.target_logps(**batch).mean()
    # ChatML, with the targets marked for TRL
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    )
    config = trl.SFTConfig(str(tmp_path), assistant_only_loss=loss_on == "answers", per_device_train_batch_size=4, report_to=[], use_cpu=True,
                           bf16=False, gradient_checkpointing=False)  # fmt: skip
    table = [{"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]} for row in rows]
    trainer = trl.SFTTrainer(common.tiny_model(), config, train_dataset=datasets.Dataset.from_list(table), processing_class=tokenizer)
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
def test_neftune_noise_is_uniform_with_each_documents_own_length_and_only_in_training(packing, tmp_path):
    rows = [{"prompt": "a", "completion": "b" * n} for n in (1, 300)]
    batch = batch_of(rows, tmp_path, packing)
    model = common.load_model(arguments(packing), torch.float32, torch.device("cpu"))
    plain, seen = model.target_logps(**batch), []
    sft.add_neftune(model, alpha=5.0)
    assert torch.equal(plain, model.target_logps(**batch))  # evaluation mode
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    model.train()
    noisy = model.target_logps(**batch)
    noise = seen[0] - model.get_input_embeddings()(batch["input_ids"])  # (B, T, d)
    if packing == "--packing":
        lengths, parts = batch["documents"][0], noise[0].split(batch["documents"][0])
    else:
        lengths = batch["attention_mask"].sum(1).tolist()
        parts = [row[:length] for row, length in zip(noise, lengths)]
    for length, part in zip(lengths, parts):
        bound = 5 / math.sqrt(length * 128)
        assert 0.99 * bound < part.abs().max() <= bound * 1.0001  # uniform on (-bound, bound)
        assert part.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not torch.equal(plain, noisy) and noisy.requires_grad


def few(tmp_path, name, *more):
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"Say {c} {n}.", "completion": c * n} for c in "abcdef" for n in (1, 3, 5)])
    return ["--data", data, "--output", str(tmp_path / name), "--batch-size", "1", "--max-length", "128", "--samples", "0", *map(str, more)]


def test_patience_stops_and_keeps_the_weights_of_the_lowest_held_out_loss(tmp_path, capsys):
    """A rate so high that the loss rises: the best weights are an early evaluation's, not the last step's."""
    more = ("--eval-every", 2, "--save-every", 2, "--max-steps", 60, "--schedule", "constant", "--lr", 5e-3, "--eval-fraction", 0.3)
    sft.main(few(tmp_path, "run", *more, "--patience", 3))
    entries = read_metrics(tmp_path / "run")
    losses = {entry["step"]: entry["eval_loss"] for entry in entries if "eval_loss" in entry and "done" not in entry}
    best = min(losses, key=losses.get)
    last = entries[-1]["step"]
    assert last == best + 6 < 60 and list(losses)[-1] == last
    assert entries[-1]["done"] and entries[-1]["eval_loss"] == losses[best]
    assert "taking back" in capsys.readouterr().out
    sft.main(few(tmp_path, "again", *more[:4], "--max-steps", 60, *more[6:], "--max-steps", best, "--warmup-ratio", 0.03 * 60 / best))
    saved, again = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(saved[name], again[name]) for name in saved)


def test_a_run_whose_patience_ran_out_does_not_train_on_after_resume(tmp_path, monkeypatch):
    more = ("--eval-every", 2, "--save-every", 2, "--max-steps", 60, "--schedule", "constant", "--lr", 5e-3, "--eval-fraction", 0.3, "--patience", 2)
    sft.main(few(tmp_path, "whole", *more))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # killed between the last step and the result
        patch.setattr(common.Run, "show_samples", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        sft.main(few(tmp_path, "parts", *more))
    sft.main(few(tmp_path, "parts", *more, "--resume"))
    whole, parts = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert read_metrics(tmp_path / "parts")[-1]["step"] == read_metrics(tmp_path / "whole")[-1]["step"]


def test_an_adapter_and_a_whole_model_are_saved_as_others_load_them(tmp_path):
    ids = torch.arange(40)[None]
    sft.main(few(tmp_path, "whole", "--max-steps", 3, "--neftune", 5, "--lr", 1e-3))
    sft.main(few(tmp_path, "adapter", "--max-steps", 3, "--lora-rank", 4, "--lr", 1e-2))
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter" / "base")
    adapted = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter" / "base"), tmp_path / "adapter")
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (whole, base, adapted)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3 and (logits[2] - logits[1]).abs().max() > 1e-3
    config = transformers.AutoConfig.from_pretrained(tmp_path / "whole")
    assert config.architectures == ["LlamaForCausalLM"] and (tmp_path / "whole" / "chat_template.jinja").exists()


def test_the_command_line_runs(tmp_path):
    run = run_script("sft.py", *few(tmp_path, "run", "--max-steps", 2, "--lora-rank", 2))
    assert run.returncode == 0 and "Merge it into its base" in run.stdout, run.stderr


def test_a_result_leaves_nothing_of_another_kind(tmp_path):
    """A stale adapter beside a model would be loaded on top of it, a stale model beside an adapter in its place."""
    base = [*RANDOM, "--data", write_rows(tmp_path / "rows.jsonl", [{"prompt": c, "completion": c} for c in "abcdefgh"])]
    flags = [*base, "--output", str(tmp_path / "run"), "--max-steps", "1", "--samples", "0", "--eval-fraction", "0"]
    model, adapter = {"config.json", "generation_config.json", "model.safetensors"}, {"adapter_config.json", "adapter_model.safetensors"}
    sft.main([*flags, "--lora-rank", "2"])
    (tmp_path / "run" / "adapter_old").mkdir()  # a folder of the user's
    for more, here, gone in (([], model, adapter), (["--lora-rank", "2"], adapter, model)):
        sft.main([*flags, *more])
        names = {path.name for path in (tmp_path / "run").iterdir()}
        assert here | {"adapter_old"} <= names and not gone & names

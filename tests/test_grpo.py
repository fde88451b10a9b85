"""grpo.py against TRL's GRPOTrainer on the same completions, and that it learns."""

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers
import trl
from conftest import ROOT, TINY, read_metrics, write_rows
from safetensors.torch import load_file
from test_ppo import PROMPTS, TIMES, stopped_after

import common
import grpo
import ppo

RULES = ROOT / "examples" / "rewards.py"
SMALL = "--eval-data 0 --batch-size 4 --rollout-size 8 --group-size 4 --max-steps 3 --rank 4"
SMALL += " --response-length 6 --lr 1e-3 --save-every 1000"
CPU = torch.device("cpu")
LENGTHS = [[3, 1, 2, 4], [2, 2, 5, 1]]  # of the answers of two groups


@pytest.fixture
def flags(random_model, tmp_path):
    """name of the output folder, more flags -> the flags of a run of three rollouts"""
    data = write_rows(tmp_path / "rows.jsonl", PROMPTS)
    start = ["--model", random_model, "--data", data, "--reward", f"{RULES}:lowercase"]

    def of_run(name, *more):
        return [*start, "--output", str(tmp_path / name), *SMALL.split(), *map(str, more)]

    return of_run


@pytest.fixture
def load(flags, monkeypatch):
    """more flags -> (args, tokenizer, model with a random adapter)"""

    def with_adapter(*more, script=grpo):
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(script, "train", seen.append)
            argv = flags("x", *more)
            if script is ppo:
                del argv[(at := argv.index("--group-size")) : at + 2]
            script.main(argv)
        (args,) = seen
        model = common.load_model(args, torch.float32, CPU)
        add = script.add_policy if script is ppo else common.add_adapter
        arguments = (model, args, CPU) if script is ppo else (model, args, grpo.LoRALinear, CPU)
        add(*arguments)
        torch.manual_seed(0)
        for _, p in sorted(
            (n.replace("roles.policy.", ""), p) for n, p in model.named_parameters()
        ):
            if p.requires_grad:
                p.data.normal_(std=0.1)
        return args, common.load_tokenizer(args), model

    return with_adapter


def groups_of_answers() -> list[tuple]:
    """(answers, advantages) of two prompts of unequal length."""
    groups = []
    for number, lengths in enumerate(LENGTHS):
        prompt = [*range(70, 74 + 3 * number)]
        answers = [ppo.Answer(prompt, [*range(65 + n, 65 + 2 * n)], True, 0.0) for n in lengths]
        groups.append((answers, torch.tensor([1.5, -0.5, 0.25, -1.0]) * (1 - 3 * number)))
    return groups


def shift(tokens, advantages):
    """How far the policy has moved since the rollout, in nats: to both sides of the clip range."""
    return 0.4 * torch.sin(7.0 * tokens + 3.0 * advantages)


def our_loss(args, model):
    """-> the loss of a minibatch, of the groups above"""
    frozen, losses = grpo.reference_layers(model, args), []
    for part in grpo.forward_passes(groups_of_answers(), args, CPU):
        with torch.no_grad(), grpo.as_reference(frozen):
            reference = model.target_logps(**part.batch)
        logps = model.target_logps(**part.batch)
        old_logps = logps.detach() + shift(part.batch["targets"], part.advantages)
        fixed = (old_logps, reference, part.advantages, part.weights)
        losses.append(grpo.grpo_loss(logps, *fixed, args.clip, args.kl_coefficient)[0])
    return sum(losses)


@pytest.fixture
def theirs(tmp_path):
    """args, model -> TRL's loss on the same completions, and the gradients by parameter name"""

    def loss_and_gradients(args, model):
        layers = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
        form = {"peft_type": "LORA", "r": 4, "lora_alpha": 32.0, "target_modules": layers}
        common.save_adapter(args, model, common.load_tokenizer(args), form)
        base = transformers.AutoModelForCausalLM.from_pretrained(args.model)
        policy = peft.PeftModel.from_pretrained(base, args.output, is_trainable=True)
        config = trl.GRPOConfig(
            output_dir=str(tmp_path / "trl"), loss_type=args.loss, beta=args.kl_coefficient,
            epsilon=args.clip, temperature=args.temperature, num_generations=4, report_to=[],
            max_completion_length=args.response_length, per_device_train_batch_size=8,
            use_cpu=True, bf16=False, use_bias_correction_kl=False, gradient_checkpointing=False,
        )  # fmt: skip
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        data = datasets.Dataset.from_list([{"prompt": "Hi"}] * 8)
        trainer = trl.GRPOTrainer(
            policy, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config,
            train_dataset=data, processing_class=tokenizer,
        )  # fmt: skip
        rows = [
            (answer, a)
            for answers, values in groups_of_answers()
            for answer, a in zip(answers, values)
        ]
        left = max(len(answer.prompt) for answer, _ in rows)
        right = max(len(answer.ids) for answer, _ in rows)
        inputs = {
            name: [] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        }
        for answer, _ in rows:
            padding = [0] * (left - len(answer.prompt)), [0] * (right - len(answer.ids))
            inputs["prompt_ids"].append(padding[0] + answer.prompt)
            inputs["prompt_mask"].append(padding[0] + [1] * len(answer.prompt))
            inputs["completion_ids"].append(answer.ids + padding[1])
            inputs["completion_mask"].append([1] * len(answer.ids) + padding[1])
        inputs = {name: torch.tensor(x) for name, x in inputs.items()}
        mask = inputs["completion_mask"].bool()
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            logps = trainer._get_per_token_logps_and_entropies(policy, ids, seen, right)[0]
            with policy.disable_adapter():
                reference = trainer._get_per_token_logps_and_entropies(policy, ids, seen, right)[0]
        inputs["advantages"] = torch.stack([a for _, a in rows])
        moved = shift(inputs["completion_ids"], inputs["advantages"][:, None])
        inputs |= {"old_per_token_logps": logps + moved, "ref_per_token_logps": reference}
        inputs["num_items_in_batch"] = mask.sum()
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer.compute_loss(policy, inputs)
        loss.backward()
        gradients = {n.replace(".default", ""): p.grad for n, p in policy.named_parameters()}
        return loss.item(), {n: g for n, g in gradients.items() if g is not None}

    return loss_and_gradients


@pytest.mark.parametrize("packing", [[], ["--no-packing"], ["--micro-batch-tokens", 20]])
@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dr_grpo"])
def test_loss_and_gradients_are_trls(loss, packing, load, theirs):
    """With ratios on both sides of the clip range, a KL penalty and a temperature; packed with
    shared prompts, padded, and in several forward passes."""
    more = ["--loss", loss, "--kl-coefficient", 0.3, "--temperature", 0.8, *packing]
    args, _, model = load(*more)
    assert len(grpo.forward_passes(groups_of_answers(), args, CPU)) == (
        2 if "20" in map(str, packing) else 1
    )
    ours = our_loss(args, model)
    ours.backward()
    expected, gradients = theirs(args, model)
    assert ours.item() == pytest.approx(expected, rel=1e-5)
    found = {
        f"base_model.model.{n}": p.grad for n, p in model.named_parameters() if p.requires_grad
    }
    assert found.keys() == gradients.keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls(scale):
    """As TRL writes them: unbiased deviations, plus 1e-4. Equal scores give 0."""
    scores = torch.tensor([[1.0, 0, 0, 0.5], [2, 2, 2, 2], [-1, 3, 0, 0]], dtype=torch.float64)
    expected = []
    for group in scores.tolist():
        flat = group if scale == "group" else scores.flatten().tolist()
        deviation = 1.0 if scale == "none" else np.std(flat, ddof=1) + 1e-4
        expected.append([(x - np.mean(group)) / deviation for x in group])
    found = grpo.group_advantages(scores, scale)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert (found[1] == 0).all()


def test_samples_are_ppos_and_the_base_comes_back(load):
    """The same adapter, seed and prompts; the adapter is merged in another way."""
    found = []
    for script in (grpo, ppo):
        args, tokenizer, model = load(script=script)
        before = {name: p.clone() for name, p in model.named_parameters()}
        data, _ = common.load_data(args, tokenizer, "prompts")
        scores = lambda prompts, *_: [0.0] * len(prompts)  # noqa: E731
        found.append(script.write_answers(model, scores, tokenizer, data[:], args, CPU, 1))
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
        assert model.generation_config.eos_token_id == 257
    assert [*map(tuple, found[0])] == [*map(tuple, found[1])]


def test_the_reference_is_the_base_or_the_adapter_at_the_start(load, flags, tmp_path):
    args, _, model = load()
    (part,) = grpo.forward_passes(groups_of_answers(), args, CPU)
    plain = common.load_model(args, torch.float32, CPU)
    with torch.no_grad():
        with grpo.as_reference(grpo.reference_layers(model, args)):
            assert torch.equal(model.target_logps(**part.batch), plain.target_logps(**part.batch))
        moved = model.target_logps(**part.batch)
        assert (moved - plain.target_logps(**part.batch)).abs().max() > 0.1
    grpo.main(flags("first", "--lr", 1e-2))
    grpo.main(flags("second", "--adapter", tmp_path / "first", "--batch-size", 8))
    entries = [entry for entry in read_metrics(tmp_path / "second") if "kl" in entry]
    assert entries[0]["kl"] == pytest.approx(0, abs=1e-6) and entries[-1]["kl"] > 1e-7
    saved = [load_file(tmp_path / x / "adapter_model.safetensors") for x in ("first", "second")]
    assert saved[0].keys() == saved[1].keys()
    peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "second")


def test_the_ratio_starts_at_one_and_is_clipped_after_updates(flags, monkeypatch, tmp_path):
    grpo.main(flags("one", "--batch-size", 8))
    grpo.main(flags("many", "--iterations", 4, "--lr", 3e-2, "--clip", 0.02))
    one, many = (
        [entry["clip_fraction"] for entry in read_metrics(tmp_path / name) if "score" in entry]
        for name in ("one", "many")
    )
    assert len(one) == 3 and not any(one) and all(x > 0.05 for x in many)
    own = common.target_logps

    def target_logps(*args, **inputs):
        return own(*args, **inputs) + 0.001 * torch.is_grad_enabled()

    monkeypatch.setattr(common, "target_logps", target_logps)
    with pytest.raises(common.UserError, match="log-probabilities differ by 0.001"):
        grpo.main(flags("off"))


def test_groups_have_one_prompt_and_figures(flags, monkeypatch, tmp_path):
    """Groups without a gradient are counted; the loss is then the KL alone, 0 at the start."""
    (tmp_path / "rule.py").write_text(
        "def rule(p, a, r):\n    return [float(r[0] == x) for x in r]"
    )
    seen, passes = [], grpo.forward_passes
    monkeypatch.setattr(grpo, "forward_passes", lambda g, *x: seen.extend(g) or passes(g, *x))
    more = ["--reward", f"{tmp_path}/rule.py:rule", "--batch-size", 8, "--missing-eos-penalty", 0]
    grpo.main(flags("run", *more, "--max-steps", 2))
    assert len(seen) == 4
    for answers, advantages in seen:
        assert len(answers) == 4 and len({str(answer.prompt) for answer in answers}) == 1
        assert (advantages == 0).all()
    entries = [entry for entry in read_metrics(tmp_path / "run") if "score" in entry]
    assert [entry["equal_scores"] for entry in entries] == [1.0, 1.0]
    assert [entry["loss"] for entry in entries] == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_scaled_as_asked(scale, flags, monkeypatch, tmp_path):
    (tmp_path / "rule.py").write_text("def rule(p, a, r):\n    return [len(x) ** 0.5 for x in a]")
    seen, passes = [], grpo.forward_passes
    monkeypatch.setattr(grpo, "forward_passes", lambda g, *x: seen.extend(g) or passes(g, *x))
    more = ["--reward", f"{tmp_path}/rule.py:rule", "--scale-rewards", scale, "--max-steps", 1]
    grpo.main(flags("run", *more))
    scores = torch.tensor([[answer.score for answer in answers] for answers, _ in seen]).double()
    deviation = {"group": scores.std(1, keepdim=True), "batch": scores.std(), "none": 1 - 1e-4}
    expected = (scores - scores.mean(1, keepdim=True)) / (deviation[scale] + 1e-4)
    found = torch.stack([advantages for _, advantages in seen]).double()
    assert scores.std() > 0.1 and len(seen) > 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_resumed_run_equals_one_that_was_never_stopped(flags, tmp_path):
    more = ["--max-steps", 4, "--eval-data", 0.3, "--eval-every", 1, "--iterations", 2]
    grpo.main(flags("whole", *more))
    stopped_after(flags("parts", *more), 2, grpo)
    grpo.main(flags("parts", *more, "--resume"))
    whole, parts = (
        [{k: v for k, v in x.items() if k not in TIMES} for x in read_metrics(tmp_path / name)[1:]]
        for name in ("whole", "parts")
    )
    assert whole == parts and sum("eval_score" in entry for entry in whole) == 5
    a, b = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_metrics_are_those_of_the_docstring(flags, tmp_path):
    grpo.main(flags("run", "--max-steps", 1))
    (entry,) = (entry for entry in read_metrics(tmp_path / "run") if "score" in entry)
    described = grpo.__doc__.partition("What to watch")[2]
    for name in entry.keys() - TIMES - {"step", "tokens", "lr", "grad_norm", "loss"}:
        assert name in described, name


def test_groups_fit_minibatches(flags):
    with pytest.raises(common.UserError, match="multiple of --group-size"):
        grpo.main(flags("run", "--group-size", 3))


def demonstration(tmp_path, seed, steps) -> list[dict]:
    pairs = str(ROOT / "examples" / "pairs.jsonl")
    argv = ["--model", TINY, "--data", pairs, "--eval-data", "0", "--reward", f"{RULES}:kindness"]
    argv += ["--max-steps", str(steps), "--seed", str(seed), "--output", str(tmp_path / "run")]
    grpo.main([*argv, "--response-length", "40", "--lr", "3e-3"])
    return [entry for entry in read_metrics(tmp_path / "run") if "score" in entry]


def test_it_learns(tmp_path):
    scores = [entry["score"] for entry in demonstration(tmp_path, 0, 6)]
    assert max(scores[-2:]) > scores[0] + 0.3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demonstration_learns(seed, tmp_path):
    """`python grpo.py`: mean held-out scores."""
    grpo.main(["--seed", str(seed), "--output", str(tmp_path)])
    first, last = (x["eval_score"] for x in read_metrics(tmp_path) if "eval_score" in x)
    assert first < 0.1 and last > 0.7

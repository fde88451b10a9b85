"""ppo.py: its equations against loops in float64, its answers against the model's distribution,
its reward models against PEFT and transformers, and that it learns."""

import math
import os
import signal
from collections import Counter

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import ROOT, TINY, read_metrics, write_rows
from safetensors.torch import load_file, save_file

import common
import ppo

RULES = ROOT / "examples" / "rewards.py"
PROMPTS = [{"prompt": "Say " + "abc" * n, "completion": f"{n}"} for n in range(1, 9)]
SMALL = "--eval-data 0 --batch-size 2 --rollout-size 4 --ppo-epochs 2 --max-steps 3 --rank 4"
SMALL += " --response-length 6 --lr 1e-3 --critic-lr 1e-3 --save-every 1000"
CPU = torch.device("cpu")
HALF = list(range(60, 130))  # as stop tokens they end about half of a random model's answers


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
    """more flags -> (args, tokenizer, model with its roles, reward)"""

    def with_roles(*more):
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(ppo, "train", seen.append)
            ppo.main(flags("x", *more))
        (args,) = seen
        dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
        tokenizer = common.load_tokenizer(args)
        torch.manual_seed(0)
        model = common.load_model(args, dtype, CPU)
        ppo.add_policy(model, args, CPU)
        reward = ppo.add_reward_and_critic(args, model, tokenizer, dtype, CPU)
        return args, tokenizer, model, reward

    return with_roles


def of_role(model, role: str) -> set:
    """The parameters of a role's adapter."""
    layers = [layer.roles[role] for layer in ppo.role_layers(model) if role in layer.roles]
    return {p for layer in layers for p in (layer.lora_A.weight, layer.lora_B.weight)}


def randomise(model, role: str, scale=0.2, seed=1):
    torch.manual_seed(seed)
    for p in sorted(of_role(model, role), key=lambda p: p.shape):
        p.data.normal_(std=scale)


def answers_of(lengths=(4, 3, 2, 1), prompt=(70, 71, 72)) -> list[ppo.Answer]:
    return [ppo.Answer([*prompt, n], [*range(65, 65 + n)], True, n / 2) for n in lengths]


def one_pass(args, **more) -> ppo.Pass:
    args.micro_batch_tokens = 4096
    (part,) = ppo.forward_passes(answers_of(**more), args, CPU)
    return part


# ------------------------------------------------------------------------------ the equations

LENGTHS = [5, 1, 3]
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture
def draw():
    """Random (3, 5) tensors in float64, 0 outside MASK."""
    generator = torch.Generator().manual_seed(3)
    options = {"generator": generator, "dtype": torch.float64}
    return lambda scale=1.0: scale * torch.randn(3, 5, **options) * MASK


def rows(tensor) -> list[list[float]]:
    return [tensor[b, :n].tolist() for b, n in enumerate(LENGTHS)]


def test_rewards_and_advantages_are_the_loops(draw):
    """Also with more padding on the right, which stays 0."""
    logps, reference, values = draw(), draw(), draw()
    scores = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
    rewards = ppo.token_rewards(logps, reference, scores, MASK, 0.1)
    advantages, returns = ppo.gae(rewards, values, 0.97, 0.9)
    for b, (lp, ref, v) in enumerate(zip(rows(logps), rows(reference), rows(values))):
        r = [-0.1 * (x - y) for x, y in zip(lp, ref)]
        r[-1] += scores[b].item()
        steps = range(len(v))
        delta = [r[t] + 0.97 * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in steps]
        expected = [sum((0.97 * 0.9) ** (k - t) * delta[k] for k in steps[t:]) for t in steps]
        assert rows(rewards)[b] == pytest.approx(r, abs=1e-12)
        assert rows(advantages)[b] == pytest.approx(expected, abs=1e-12)
        assert rows(returns)[b] == pytest.approx([a + x for a, x in zip(expected, v)], abs=1e-12)
    wider = ppo.gae(*(torch.nn.functional.pad(x, (0, 2)) for x in (rewards, values)), 0.97, 0.9)
    for x, wide in zip((advantages, returns), wider):
        assert torch.equal(wide[:, :5], x) and (wide[:, 5:] == 0).all() and (x[~MASK] == 0).all()


def test_whitening_is_the_loop(draw):
    x = (draw(3.0) + 5)[MASK]
    mean = sum(x.tolist()) / 9
    variance = sum((value - mean) ** 2 for value in x.tolist()) / 9
    expected = [(value - mean) / math.sqrt(variance + 1e-8) for value in x.tolist()]
    assert torch.cat(ppo.whiten([x[:4], x[4:]])).tolist() == pytest.approx(expected, abs=1e-9)
    assert ppo.whiten([torch.tensor([4.0])])[0].tolist() == [0.0]


def test_losses_and_their_gradients_are_the_loops(draw):
    """The gradient by finite differences. count: of a minibatch of which this is a part."""
    new, old, advantages = (x[MASK] for x in (draw(0.3), draw(0.3), draw()))
    values, old_values, returns = (x[MASK] for x in (draw(0.5), draw(0.5), draw()))

    def policy_loop(new):
        total, clipped = 0.0, 0
        for x, y, a in zip(new.tolist(), old.tolist(), advantages.tolist()):
            ratio = math.exp(x - y)
            total -= min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
            clipped += abs(ratio - 1) > 0.2
        return total / 20, clipped / 20

    def value_loop(values):
        total = 0.0
        for x, y, r in zip(values.tolist(), old_values.tolist(), returns.tolist()):
            clipped = y + min(max(x - y, -0.2), 0.2)
            total += 0.5 * max((x - r) ** 2, (clipped - r) ** 2)
        return total / 20

    x, v = new.clone().requires_grad_(), values.clone().requires_grad_()
    loss, clip_fraction = ppo.policy_loss(x, old, advantages, 20, 0.2)
    critic_loss = ppo.value_loss(v, old_values, returns, 20, 0.2)
    assert (loss.item(), clip_fraction.item()) == pytest.approx(policy_loop(new), abs=1e-7)
    assert clip_fraction > 0 and critic_loss.item() == pytest.approx(value_loop(values), abs=1e-12)
    (loss + critic_loss).backward()
    for n, step in enumerate(torch.eye(9, dtype=torch.float64) * 1e-6):
        slope = (policy_loop(new + step)[0] - policy_loop(new - step)[0]) / 2e-6
        assert x.grad[n].item() == pytest.approx(slope, abs=1e-8)
        slope = (value_loop(values + step) - value_loop(values - step)) / 2e-6
        assert v.grad[n].item() == pytest.approx(slope, abs=1e-8)


def test_figures_are_the_loops():
    """kl by both estimates, entropy, scores: of answers, not of padding."""
    torch.manual_seed(0)
    logps, reference = torch.randn(10, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    passes = [ppo.Pass({}, None, None, x, y) for x, y in zip(logps.split(6), reference.split(6))]
    answers = answers_of()
    answers[1] = answers[1]._replace(ended=False, score=-3.0)
    figures = ppo.rollout_figures(answers, passes)
    pairs = list(zip(logps.tolist(), reference.tolist()))
    expected = {"kl": sum(x - y for x, y in pairs) / 4, "ended": 0.75, "length": 2.5}
    expected["kl_k3"] = sum(math.exp(y - x) - 1 - (y - x) for x, y in pairs) / 4
    expected |= {"entropy": -sum(logps.tolist()) / 10, "score": (2 - 3 + 1 + 0.5) / 4}
    assert figures == pytest.approx(expected | {"score_ended": 3.5 / 3}, abs=1e-9)


def test_both_kl_estimates_have_the_kl_as_expectation():
    p, q = (torch.randn(50, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    exact = (p.exp() * (p - q)).sum().item()
    sums = Counter()
    for weight, x, y in zip(p.exp().tolist(), p, q):
        found = ppo.rollout_figures(answers_of([1]), [ppo.Pass({}, None, None, x[None], y[None])])
        sums += {name: weight * (found[name] + 9) for name in ("kl", "kl_k3")}
    assert [sums["kl"] - 9, sums["kl_k3"] - 9] == pytest.approx([exact, exact])


def test_explained_variance():
    parts = [ppo.Pass({}, None, None, values=x, returns=y) for x, y in zip(
        torch.tensor([1.0, 2, 3, 4]).split(3), torch.tensor([2.0, 2, 5, 3]).split(3))]  # fmt: skip
    assert ppo.explained_variance(parts) == pytest.approx(
        1 - np.var([1, 0, 2, -1]) / np.var([2, 2, 5, 3])
    )


# ---------------------------------------------------------------------------------- rollouts


def test_answers_have_the_policys_whole_distribution(load, monkeypatch):
    """Frequencies of first tokens against transformers' own softmax(logits / T), whatever the
    model's generation config says. The tokens that nucleus sampling would drop are there."""
    more = ["--temperature", 0.5, "--response-length", 1, "--generation-batch", 20_000]
    args, tokenizer, model, _ = load(*more)
    randomise(model, "policy", 0.1)
    model.generation_config.update(top_k=2, repetition_penalty=9.0, min_p=0.9)
    prompt, n = [70, 71, 72, 73], 20_000
    with ppo.merged_policy(model), common.evaluating(model), common.own_attention(model):
        expected = (model(torch.tensor([prompt])).logits[0, -1] / 0.5).softmax(-1)
    drawn = write(args, tokenizer, model, [prompt] * n)
    assert model.generation_config.top_k == 2
    counts = torch.bincount(torch.tensor([ids[0] for ids in drawn]), minlength=320)
    deviation = (counts - n * expected) / (n * expected * (1 - expected)).sqrt()
    assert deviation.abs().max() < 4.5 and 0.8 < deviation.std() < 1.2
    assert counts[expected.argsort()[:200]].sum() > 0.2 * n


def write(args, tokenizer, model, prompts) -> list[list[int]]:
    examples = {"input_ids": [np.array(ids) for ids in prompts]}
    examples["is_target"] = [np.zeros(len(ids), dtype=bool) for ids in prompts]
    scores = lambda prompts, *_: [0.0] * len(prompts)  # noqa: E731
    answers = ppo.write_answers(model, scores, tokenizer, examples, args, CPU, 1)
    assert [answer.prompt for answer in answers] == prompts
    return [answer.ids for answer in answers]


def test_an_answer_does_not_depend_on_padding(load):
    """[9] Sampling at almost no temperature: alone, and beside a much longer prompt."""
    prompts = [[70, 71], [*range(60, 110)], [80, 81, 82]]
    found = []
    for size in (1, 3):
        args, tokenizer, model, _ = load("--temperature", 1e-4, "--generation-batch", size)
        found.append(write(args, tokenizer, model, prompts))
    assert found[0] == found[1] and len({*map(str, found[0])}) == 3


@pytest.mark.parametrize("packing", [[], ["--no-packing"]])
def test_log_probabilities_are_transformers_own(packing, load):
    """At the temperature, of policy and reference: the merged model and the base model."""
    args, _, model, _ = load("--temperature", 0.7, *packing)
    randomise(model, "policy", 0.05)
    part = one_pass(args)
    ppo.old_logps(model, part, args)
    plain = transformers.AutoModelForCausalLM.from_pretrained(args.model)

    def expected(model):
        found = []
        for answer in answers_of():
            logits = model(torch.tensor([answer.prompt + answer.ids])).logits[0]
            logps = (logits[len(answer.prompt) - 1 : -1] / 0.7).log_softmax(-1)
            found.append(logps.gather(1, torch.tensor(answer.ids)[:, None])[:, 0])
        return torch.cat(found)

    with torch.no_grad():
        torch.testing.assert_close(part.reference_logps, expected(plain), rtol=0, atol=1e-5)
        with ppo.merged_policy(model), common.own_attention(model):
            torch.testing.assert_close(part.logps, expected(model), rtol=0, atol=1e-5)
    assert (part.logps - part.reference_logps).abs().max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_comes_back_bit_for_bit(dtype, load):
    args, tokenizer, model, reward = load("--dtype", dtype)
    randomise(model, "policy")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with ppo.merged_policy(model):
        layer = ppo.role_layers(model)[0].roles["policy"]
        update = layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
        name = "model.layers.0.self_attn.q_proj.roles.base.weight"
        assert torch.equal(layer.base.weight, (before[name].float() + update).to(model.dtype))
    data, _ = common.load_data(args, tokenizer, "prompts")
    ppo.write_answers(model, reward, tokenizer, data[:], args, CPU, 1)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_rollout_is_what_it_says(load, monkeypatch):
    """[2] Answers end with their first stop token; one that has none loses the penalty. Each has
    its own prompt and reference. The seed and the step decide the draws."""
    args, tokenizer, model, _ = load("--missing-eos-penalty", 0.25, "--generation-batch", 3)
    monkeypatch.setattr(common, "stop_ids", lambda *_: HALF)
    data, _ = common.load_data(args, tokenizer, "prompts")
    seen = []

    def reward(prompts, answers, references):
        seen.extend(zip(prompts, answers, references))
        return [len(answer) for answer in answers]

    def rollout(step):
        return ppo.write_answers(model, reward, tokenizer, data[:], args, CPU, step)

    answers = rollout(1)
    for answer in answers:
        assert not set(answer.ids[:-1]) & set(HALF) and 1 <= len(answer.ids) <= 6
        assert answer.ended == (answer.ids[-1] in HALF) and (answer.ended or len(answer.ids) == 6)
        assert answer.score == len(answer.ids) - 0.25 * (not answer.ended)
    assert 0 < sum(answer.ended for answer in answers) < 8
    texts = [tokenizer.decode(x.prompt, skip_special_tokens=True) for x in answers]
    assert texts == [f"user\n{row['prompt']}\nassistant\n" for row in PROMPTS]
    expected = {(f"user\n{row['prompt']}\nassistant\n", row["completion"]) for row in PROMPTS}
    assert {(tokenizer.decode(p, skip_special_tokens=True), r) for p, _, r in seen} == expected
    assert rollout(1) == answers and rollout(2) != answers
    args.response_length = 2  # an answer may end with the last token that it may have
    assert any(x.ended and len(x.ids) == 2 for step in range(4) for x in rollout(step))


def test_prompts_of_all_kinds_of_rows(load, tmp_path):
    """Alone, in a conversation that ends with the user, of a preference; answers are references."""
    question, reply = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
    mixed = [
        {"prompt": "Hi"},
        {"messages": [question]},
        {"prompt": "Hi", "chosen": "a", "rejected": "b"},
        {"prompt": [question], "responses": ["a", "b"]},
        {"messages": [question, reply]},
        {"messages": [question, reply, question]},
        {"messages": [question, reply, question, {"role": "assistant", "content": "Bye"}]},
    ]
    data = write_rows(tmp_path / "mixed.jsonl", mixed)
    args, tokenizer, *_ = load("--data", data)
    examples = common.load_data(args, tokenizer, "prompts")[0][:]
    found = [*map(ppo.split_example, examples["input_ids"], examples["is_target"])]
    one, two = "user\nHi\nassistant\n", "user\nHi\nassistant\nYo\nuser\nHi\nassistant\n"
    expected = [(one, "")] * 2 + [(one, "a")] * 2 + [(one, "Yo"), (two, ""), (two, "Bye")]
    texts = [tuple(tokenizer.decode(x, skip_special_tokens=True) for x in pair) for pair in found]
    assert texts == expected
    assert tokenizer.decode(found[0][0]).endswith("<|im_start|>assistant\n")
    # a prompt as long as --max-length: kept where it has no answer, else dropped
    rows = [{"prompt": "Hi"}, {"prompt": "Hi", "completion": "Yo"}]
    args, tokenizer, *_ = load("--data", write_rows(tmp_path / "two.jsonl", rows))
    args.max_length = len(found[0][0])
    (ids,) = common.load_data(args, tokenizer, "prompts")[0]["input_ids"]
    assert ids.tolist() == found[0][0]


# ------------------------------------------------------------------------------- four models


def test_one_base_serves_all_and_adapters_do_not_leak(load):
    args, _, model, _ = load()
    part = one_pass(args)
    trained = (
        of_role(model, "policy") | of_role(model, "critic") | {*model.critic_head.parameters()}
    )
    assert {p for p in model.parameters() if p.requires_grad} == trained
    plain = transformers.AutoModelForCausalLM.from_pretrained(args.model)
    sizes = sum(p.numel() for p in plain.parameters()) + sum(p.numel() for p in trained)
    assert sum(p.numel() for p in model.parameters()) == sizes
    randomise(model, "policy")
    randomise(model, "critic", seed=2)
    model.critic_head.weight.data.normal_()
    with torch.no_grad():
        before = ppo.critic_values(model, part.batch)
        reference = ppo.policy_logps(model, "reference", part.batch, args)
    logps = ppo.policy_logps(model, "policy", part.batch, args)
    assert (logps - reference).abs().max() > 0.1
    logps.sum().backward()
    with_gradient = {p for p in model.parameters() if p.grad is not None}
    assert with_gradient == of_role(model, "policy")
    model.zero_grad()
    randomise(model, "policy", seed=3)
    values = ppo.critic_values(model, part.batch)
    assert torch.equal(values, before)
    assert torch.equal(reference, ppo.policy_logps(model, "reference", part.batch, args))
    values.sum().backward()
    with_gradient = {p for p in model.parameters() if p.grad is not None}
    assert with_gradient == of_role(model, "critic") | {*model.critic_head.parameters()}


@pytest.mark.parametrize("packing", [[], ["--no-packing"]])
def test_the_critic_starts_at_zero_with_the_closed_forms_gradient(packing, load):
    """d/dw 1/2 mean (w h - R)^2 = mean (w h - R) h, at the position before each token."""
    args, _, model, _ = load(*packing)
    part = one_pass(args)
    returns = torch.randn(10)
    values = ppo.critic_values(model, part.batch)
    assert torch.equal(values, torch.zeros(10))
    ppo.value_loss(values, values.detach(), returns, 10, 0.2).backward()
    plain = transformers.AutoModelForCausalLM.from_pretrained(args.model)
    hidden = []
    for x in answers_of():
        h = plain.model(torch.tensor([x.prompt + x.ids])).last_hidden_state[0]
        hidden.append(h[len(x.prompt) - 1 : -1])
    expected = (-returns[:, None] * torch.cat(hidden)).mean(0)
    torch.testing.assert_close(model.critic_head.weight.grad[0], expected, rtol=1e-4, atol=1e-6)
    assert all((p.grad == 0).all() for p in of_role(model, "critic"))


def test_what_is_saved_is_the_policy_in_pefts_form(flags, load, monkeypatch, tmp_path):
    kept, keep_policy = [], ppo.keep_policy
    args, *_ = load()
    part = one_pass(args)

    def spied(model):
        ppo.old_logps(model, part, args)
        kept.append(part)
        keep_policy(model)

    monkeypatch.setattr(ppo, "keep_policy", spied)
    ppo.main(flags("run"))
    saved = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
    logps = []
    with torch.no_grad():
        for x in answers_of():
            z = saved(torch.tensor([x.prompt + x.ids])).logits[0, len(x.prompt) - 1 : -1]
            logps.append(z.log_softmax(-1).gather(1, torch.tensor(x.ids)[:, None])[:, 0])
    torch.testing.assert_close(part.logps, torch.cat(logps), rtol=0, atol=1e-5)
    assert (part.logps - part.reference_logps).abs().max() > 1e-3


def test_a_policy_that_starts_from_an_adapter_has_it_as_reference(flags, load, tmp_path):
    ppo.main(flags("first", "--lr", 1e-2))
    args, _, model, _ = load("--adapter", tmp_path / "first")
    part = one_pass(args)
    ppo.old_logps(model, part, args)
    assert torch.equal(part.logps, part.reference_logps)
    assert not torch.equal(part.logps, ppo.policy_logps(model, "base", part.batch, args))
    assert not any(p.requires_grad for p in of_role(model, "reference"))
    ppo.main(flags("second", "--adapter", tmp_path / "first"))
    first, *_, last = [x for x in read_metrics(tmp_path / "second") if "kl" in x]
    assert first["kl"] == pytest.approx(0, abs=1e-4) and last["kl"] != 0
    names = [{*load_file(tmp_path / x / "adapter_model.safetensors")} for x in ("first", "second")]
    assert names[0] == names[1]


def test_in_bfloat16_kl_starts_at_zero(flags, tmp_path):
    """Policy and reference round alike, and updates start at ratio 1."""
    ppo.main(flags("run", "--dtype", "bfloat16", "--max-steps", 1))
    (entry,) = (entry for entry in read_metrics(tmp_path / "run") if "score" in entry)
    assert entry["kl"] == entry["kl_k3"] == 0


def test_recomputing_blocks_changes_nothing(flags, tmp_path):
    """The backward pass runs the blocks again: with the adapter that was on."""
    for name, more in (("plain", []), ("again", ["--gradient-checkpointing"])):
        ppo.main(flags(name, "--max-steps", 1, *more))
    a, b = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("plain", "again"))
    assert all(torch.allclose(a[key], b[key], rtol=0, atol=1e-6) for key in a)


def test_dropout_is_off(random_model, flags, tmp_path):
    """In the base, too: the ratio would not start at 1."""
    model = transformers.AutoModelForCausalLM.from_pretrained(random_model, attention_dropout=0.5)
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(random_model).save_pretrained(tmp_path / "model")
    ppo.main(flags("run", "--model", tmp_path / "model", "--max-steps", 1))


# ----------------------------------------------------------------------------------- rewards

TEXTS = ["Hi", "What is 2 + 2?", "Name a colour that is not red, please.", "x"]
ANSWERS = ["Hello", "4", "", "blue and green"]


def save_reward_model(random_model, folder, lora: bool):
    """As reward_model.py leaves it, made by transformers or PEFT. -> (the model, its tokenizer)"""
    tokenizer = transformers.AutoTokenizer.from_pretrained(random_model)
    torch.manual_seed(7)
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(random_model, num_labels=1, pad_token_id=258)
    base = transformers.AutoModelForCausalLM.from_pretrained(random_model)
    if lora:
        layers = ["q_proj", "down_proj"]
        config = peft.LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=5, target_modules=layers)
        model = peft.get_peft_model(model, config)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(std=0.1)
    model.config.reward_offset = 0.25
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (weights,) = folder.glob("*.safetensors")
    metadata = {"format": "pt", "reward_offset": "0.25"}
    metadata["base_fingerprint"] = common.fingerprint(base)
    save_file(load_file(weights), weights, metadata)
    return model.eval(), tokenizer


@pytest.mark.parametrize("lora", [False, True])
def test_scores_are_transformers_and_the_critic_starts_from_them(
    lora, random_model, load, tmp_path
):
    """At the end of a whole conversation, minus the offset, whatever is beside it. An
    answer that was cut off is read with an end of turn."""
    theirs, tokenizer = save_reward_model(random_model, tmp_path / "reward", lora)
    args, _, model, reward = load("--reward", tmp_path / "reward", "--generation-batch", 3)
    prompts = []
    for text in TEXTS:
        turns = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer(rendered).input_ids)
    answers = [tokenizer(text).input_ids + [257] for text in ANSWERS]
    cut = [*answers[:3], answers[3][:-1]]
    line_break = tokenizer("\n").input_ids  # ends the template
    whole = [prompt + answer + line_break for prompt, answer in zip(prompts, answers)]
    with torch.no_grad():
        expected = [theirs(torch.tensor([ids])).logits.item() - 0.25 for ids in whole]
        found = reward(prompts, cut, [None] * 4)
        assert found == pytest.approx(expected, abs=1e-5) and np.std(found) > 1e-3
        # with one more token, the critic predicts it from where the score was read
        rows = [ppo.Answer(ids, [65], True, 0.0) for ids in whole]
        args.micro_batch_tokens = 4096
        (part,) = ppo.forward_passes(rows, args, CPU)
        values = ppo.critic_values(model, part.batch)
    wanted = torch.tensor(expected) if lora else torch.zeros(4)
    torch.testing.assert_close(values, wanted, rtol=0, atol=1e-5)
    assert not any(p.requires_grad for p in of_role(model, "reward"))
    trained = (
        of_role(model, "policy") | of_role(model, "critic") | {*model.critic_head.parameters()}
    )
    assert {p for p in model.parameters() if p.requires_grad} == trained
    assert len(of_role(model, "critic")) == (8 if lora else 28)


@pytest.mark.parametrize("more", ["", "<|im_end|>"])
def test_an_answer_is_scored_with_what_the_template_adds(more, random_model, load, tmp_path):
    """As in training: Phi-3's template, for one, writes another eos at the end."""
    theirs, tokenizer = save_reward_model(random_model, tmp_path / "reward", False)
    template = tokenizer.chat_template
    template += "{% if not add_generation_prompt %}" + more + "{% endif %}"
    (tmp_path / "template.jinja").write_text(template)
    files = ["--reward", tmp_path / "reward", "--template", tmp_path / "template.jinja"]
    _, tokenizer, _, reward = load(*files)
    prompt, answer = tokenizer("Hi").input_ids, [65, 257]
    whole = prompt + answer + tokenizer("\n" + more).input_ids
    with torch.no_grad():
        expected = theirs(torch.tensor([whole])).logits.item() - 0.25
        assert reward([prompt], [answer], [None]) == pytest.approx([expected], abs=1e-5)


def test_a_run_with_a_reward_model(random_model, flags, tmp_path):
    save_reward_model(random_model, tmp_path / "reward", True)
    more = ["--reward", tmp_path / "reward", "--targets", "q_proj,v_proj"]
    ppo.main(flags("run", *more))
    names = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert len(names) == 8 and all("q_proj" in name or "v_proj" in name for name in names)


def test_a_reward_model_of_another_base_or_tokenizer_is_refused(random_model, flags, tmp_path):
    save_reward_model(random_model, tmp_path / "reward", True)
    more = ["--reward", tmp_path / "reward"]
    with pytest.raises(common.UserError, match="another base"):
        ppo.main(flags("run", "--model", TINY, *more))
    tokenizer = transformers.AutoTokenizer.from_pretrained(random_model)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(tmp_path / "reward")
    with pytest.raises(common.UserError, match="another tokenizer"):
        ppo.main(flags("run", *more))


def test_functions_get_texts_and_references(flags, tmp_path):
    lines = ["def rule(prompts, answers, references):"]
    lines += ["    assert prompts[0].startswith('user\\nSay abc') and references[0] in '12345678'"]
    lines += ["    return [len(answer) for answer in answers]"]
    (tmp_path / "rule.py").write_text("\n".join(lines))
    ppo.main(flags("run", "--reward", f"{tmp_path}/rule.py:rule", "--max-steps", 1))
    (tmp_path / "rule.py").write_text("def rule(*_):\n    return [1.0]")
    with pytest.raises(ValueError, match="zip"):  # not as many scores as answers
        ppo.main(flags("again", "--reward", f"{tmp_path}/rule.py:rule"))


def test_exact_match():
    from examples.rewards import exact_match

    answers = ["So it is 1,018.", "18 or 19", " Paris\n", "-3"]
    assert exact_match([""] * 4, answers, ["#### 1018", "#### 18", "paris", "3"]) == [1, 0, 1, 0]


# ----------------------------------------------------------------------------------- the run


def test_at_the_first_update_the_ratio_is_one(flags, tmp_path):
    """One update a rollout: nothing is clipped; the loss is minus the mean of whitened
    advantages, 0."""
    more = ["--ppo-epochs", 1, "--batch-size", 4, "--temperature", 0.8]
    ppo.main(flags("run", *more))
    entries = [entry for entry in read_metrics(tmp_path / "run") if "score" in entry]
    assert len(entries) == 3
    for entry in entries:
        assert entry["clip_fraction"] == 0 and abs(entry["policy_loss"]) < 1e-6


def test_a_training_pass_unlike_the_rollout_is_found(flags, monkeypatch):
    logps = ppo.policy_logps
    off = lambda *args: logps(*args) + 0.001 * torch.is_grad_enabled()  # noqa: E731
    monkeypatch.setattr(ppo, "policy_logps", off)
    with pytest.raises(common.UserError, match="log-probabilities differ by 0.001"):
        ppo.main(flags("run"))


def test_a_run_is_the_loop_over_its_parts(flags, monkeypatch, tmp_path):
    """Every answer is in one minibatch, and in the same one in each epoch; the minibatches change
    their order. The logged losses are those of the flags' numbers, in float64."""
    calls, policy_loss, value_loss = {"policy": [], "value": []}, ppo.policy_loss, ppo.value_loss

    def spied(kind, function):
        def call(*args):
            calls[kind].append([x.detach().double().tolist() for x in args[:3]] + [args[3]])
            return function(*args)

        return call

    monkeypatch.setattr(ppo, "policy_loss", spied("policy", policy_loss))
    monkeypatch.setattr(ppo, "value_loss", spied("value", value_loss))
    more = ["--rollout-size", 8, "--ppo-epochs", 4, "--clip", 0.03, "--max-grad-norm", 0]
    ppo.main(flags("run", "--max-steps", 1, *more))
    (entry,) = (entry for entry in read_metrics(tmp_path / "run") if "score" in entry)
    policy = value = clipped = 0.0
    for new, old, advantages, count in calls["policy"]:
        assert count == len(new)
        for x, y, a in zip(new, old, advantages):
            ratio = math.exp(x - y)
            policy -= min(ratio * a, min(max(ratio, 0.97), 1.03) * a) / count / 16
            clipped += (abs(ratio - 1) > 0.03) / count / 16
    for new, old, returns, count in calls["value"]:
        for x, y, r in zip(new, old, returns):
            near = y + min(max(x - y, -0.03), 0.03)
            value += 0.5 * max((x - r) ** 2, (near - r) ** 2) / count / 16
    names = ("policy_loss", "value_loss", "clip_fraction")
    assert [entry[x] for x in names] == pytest.approx([policy, value, clipped], rel=1e-4, abs=1e-6)
    assert entry["loss"] == pytest.approx(policy + 0.1 * value, abs=1e-6)
    assert 0.05 < clipped < 0.95
    epochs = [[tuple(old) for _, old, *_ in calls["policy"][n : n + 4]] for n in range(0, 16, 4)]
    assert all(set(epoch) == set(epochs[0]) and len(set(epoch)) == 4 for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    advantages = np.concatenate([x for *_, x, _ in calls["policy"][:4]])
    assert advantages.mean() == pytest.approx(0, abs=1e-6)
    assert advantages.std() == pytest.approx(1, abs=1e-4)


def test_the_critic_has_a_rate_of_its_own(flags, tmp_path):
    """Adam's first update moves every weight of the head, which starts at 0, by the rate."""
    more = ["--max-steps", 2, "--batch-size", 4, "--ppo-epochs", 1, "--save-every", 1]
    for rate in (1e-3, 2e-3):
        argv = flags(f"{rate}", *more, "--critic-lr", rate)
        stopped_after(argv, 1)
        (path,) = (tmp_path / f"{rate}" / "checkpoint").iterdir()
        weight = torch.load(path)["model"]["critic_head.weight"]
        assert weight.abs().median() == pytest.approx(rate, rel=0.1)


def test_the_critics_loss_is_multiplied(flags, monkeypatch, tmp_path):
    """In the gradient and in the logged loss."""
    entries = []
    for coefficient in (0.1, 0.2):
        monkeypatch.setattr(ppo, "VALUE_COEFFICIENT", coefficient)
        ppo.main(flags(f"{coefficient}", "--max-steps", 1, "--ppo-epochs", 1, "--batch-size", 4))
        entries += [x for x in read_metrics(tmp_path / f"{coefficient}") if "score" in x]
    one, two = entries
    assert two["critic_grad_norm"] == pytest.approx(2 * one["critic_grad_norm"], rel=1e-5)
    assert two["loss"] - one["loss"] == pytest.approx(0.1 * one["value_loss"], abs=1e-6)


def stopped_after(argv, step: int, script=ppo) -> None:
    """A run that gets a SIGTERM in this step."""
    rate, handlers = common.learning_rate, signal.getsignal(signal.SIGTERM)

    def learning_rate(now, *others):
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(now, *others)

    common.learning_rate = learning_rate
    try:
        with pytest.raises(SystemExit) as end:
            script.main(argv)
        assert end.value.code == 128 + signal.SIGTERM
    finally:
        common.learning_rate = rate
        signal.signal(signal.SIGTERM, handlers)


TIMES = {"tokens_per_second", "peak_memory_gib", "rollout_tokens_per_second"}


def test_a_resumed_run_equals_one_that_was_never_stopped(flags, tmp_path):
    """Bit for bit: metrics, evaluations, weights, in the middle of an epoch."""
    more = ["--max-steps", 4, "--eval-data", 0.3, "--eval-every", 1]
    ppo.main(flags("whole", *more))
    stopped_after(flags("parts", *more), 2)
    ppo.main(flags("parts", *more, "--resume"))
    whole, parts = (
        [{k: v for k, v in x.items() if k not in TIMES} for x in read_metrics(tmp_path / name)[1:]]
        for name in ("whole", "parts")
    )
    assert whole == parts and sum("eval_score" in entry for entry in whole) == 5
    a, b = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(common.UserError, match="--kl-coefficient differs"):
        stopped_after(flags("other", *more), 2)
        ppo.main(flags("other", *more, "--resume", "--kl-coefficient", 0.1))


def test_metrics_are_those_of_the_docstring(flags, tmp_path, capsys):
    ppo.main(flags("run", "--eval-data", 0.3, "--eval-every", 2))
    entries, printed = read_metrics(tmp_path / "run"), capsys.readouterr().out
    steps = [entry for entry in entries if "score" in entry]
    evaluations = [entry for entry in entries if "eval_score" in entry]
    assert len(steps) == 3 and [entry["step"] for entry in evaluations] == [0, 2, 3]
    described = ppo.__doc__.partition("What to watch")[2].partition("Measured")[0]
    for name in steps[0].keys() - TIMES - {"step", "tokens", "lr", "grad_norm"}:
        assert name in described, name
    assert "user\\nSay abc" in printed
    for entry, loss in zip(evaluations, (x for x in entries if "eval_loss" in x)):
        expected = 0.05 * entry["eval_kl"] - entry["eval_score"]
        assert loss["eval_loss"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("more, match", [
    (["--rollout-size", 5], "multiple of --batch-size"),
    (["--reward", ""], "--reward"),
])  # fmt: skip
def test_flags_that_do_not_fit(more, match, flags):
    with pytest.raises(common.UserError, match=match):
        ppo.main(flags("run", *more))


# ---------------------------------------------------------------------------------- learning


def demonstration(tmp_path, seed, steps):
    rules = str(ROOT / "examples" / "pairs.jsonl")
    argv = ["--model", TINY, "--data", rules, "--eval-data", "0", "--reward", f"{RULES}:kindness"]
    argv += "--rollout-size 32 --response-length 40 --lr 3e-3 --critic-lr 3e-3".split()
    argv += ["--max-steps", str(steps), "--seed", str(seed), "--output", str(tmp_path / "run")]
    ppo.main([*argv, "--kl-coefficient", "0.02"])
    return [entry for entry in read_metrics(tmp_path / "run") if "score" in entry]


def test_it_learns(tmp_path):
    scores = [entry["score"] for entry in demonstration(tmp_path, 0, 6)]
    assert scores[0] < 0.4 and max(scores[-2:]) > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demonstration_learns(seed, tmp_path):
    """`python ppo.py`: mean held-out scores."""
    ppo.main(["--seed", str(seed), "--output", str(tmp_path)])
    first, last = (x["eval_score"] for x in read_metrics(tmp_path) if "eval_score" in x)
    assert first < 0.1 and last > 0.8

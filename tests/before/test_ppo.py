"""ppo.py: its equations against float64 loops, its samples against transformers, its reward models against PEFT, and that it learns."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers
from before import ROOT, read_metrics, write_rows
from safetensors.torch import load_file

import common_before as common
import ppo

RULES = ROOT / "examples" / "rewards.py"
PROMPTS = [{"prompt": "Say " + "abc" * n, "completion": f"{n}"} for n in range(1, 9)]
SMALL = ["--eval-fraction", "0", "--batch-size", "2", "--grad-accum", "1", "--minibatches", "2", "--ppo-epochs", "2", "--max-steps", "3",
         "--response-length", "6", "--unfinished-score", "none", "--lr", "1e-3", "--save-every", "1000", "--reward", f"{RULES}:lowercase"]  # fmt: skip
LORA = ["--lora-rank", "4"]


def flags(tmp_path, name, *more):
    return ["--data", write_rows(tmp_path / "rows.jsonl", PROMPTS), "--output", str(tmp_path / name), *SMALL, *map(str, more)]


def parse(monkeypatch, *argv):
    """The arguments as main makes them."""
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "train", lambda args: caught.append(args))
        caught = []
        ppo.main([str(item) for item in argv])
    return caught[0]


def roles_of(args, folder=None):
    torch.manual_seed(0)
    return ppo.load_roles(args, folder, True, torch.float32, torch.device("cpu"))


def randomise(model, adapter, scale=0.2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for tensor in ppo.adapter_tensors(model, adapter).values():
        tensor.data = scale * torch.randn(tensor.shape, generator=generator)


# ------------------------------------------------------------------------------------------------------- The equations

LENGTHS = [5, 1, 3]


@pytest.fixture
def tokens():
    """Random (3, 5) tensors in float64, 0 outside a mask of the lengths above, as lists of rows too."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]

    def draw(scale=1.0):
        return scale * torch.randn(3, 5, generator=generator, dtype=torch.float64) * mask

    return mask, draw


def rows(tensor):
    return [tensor[b, :n].tolist() for b, n in enumerate(LENGTHS)]


def test_rewards_and_gae_are_the_loops(tokens):
    mask, draw = tokens
    logps, reference, values, scores = draw(), draw(), draw(), torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
    rewards = ppo.token_rewards(logps, reference, scores, mask, 0.1)
    advantages, returns = ppo.gae(rewards, values, 0.97, 0.9)
    for b, (lp, ref, v) in enumerate(zip(rows(logps), rows(reference), rows(values))):
        r = [-0.1 * (x - y) for x, y in zip(lp, ref)]
        r[-1] += scores[b].item()
        delta = [r[t] + 0.97 * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(v))]
        expected = [sum((0.97 * 0.9) ** k * delta[t + k] for k in range(len(v) - t)) for t in range(len(v))]
        assert rows(rewards)[b] == pytest.approx(r, abs=1e-12)
        assert rows(advantages)[b] == pytest.approx(expected, abs=1e-12)
        assert rows(returns)[b] == pytest.approx([a + x for a, x in zip(expected, v)], abs=1e-12)
    assert all((x[~mask] == 0).all() for x in (rewards, advantages, returns))


def test_padding_does_not_reach_advantages(tokens):
    """However wide it is, and nothing is in it."""
    _, draw = tokens
    rewards, values = draw(), draw()
    expected, expected_returns = ppo.gae(rewards, values, 1.0, 0.95)
    advantages, returns = ppo.gae(*(torch.nn.functional.pad(x, (0, 2)) for x in (rewards, values)), 1.0, 0.95)
    assert torch.equal(advantages[:, :5], expected) and torch.equal(returns[:, :5], expected_returns)
    assert (advantages[:, 5:] == 0).all() and (returns[:, 5:] == 0).all()


def test_tokens_as_rows_and_their_gradient(tokens):
    """(N,) -> (B, T), 0 outside the mask, and back: each token's gradient is that of its place, padding gives none."""
    mask, draw = tokens
    flat, gradient = torch.arange(1.0, 10.0, dtype=torch.float64, requires_grad=True), draw() + 7 * ~mask
    found = ppo.as_rows(flat, mask)
    assert torch.equal(found, torch.zeros(3, 5, dtype=torch.float64).masked_scatter(mask, flat))
    found.backward(gradient)
    assert torch.equal(flat.grad, gradient[mask])
    assert ppo.as_rows(torch.zeros(0), mask[:0]).shape == (0, 5)


def test_whitening_is_the_loop(tokens):
    mask, draw = tokens
    values = draw(3.0) + 5 * mask
    flat = [x for row in rows(values) for x in row]
    mean = sum(flat) / len(flat)
    variance = sum((x - mean) ** 2 for x in flat) / len(flat)
    whitened = ppo.whiten(values, mask)
    assert [x for row in rows(whitened) for x in row] == pytest.approx([(x - mean) / math.sqrt(variance + 1e-8) for x in flat], abs=1e-9)
    assert (whitened[~mask] == 0).all()


@pytest.mark.parametrize("count", [0, 1])
def test_whitening_no_value_or_one_gives_zeros(count):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[:count, 0] = True
    assert torch.equal(ppo.whiten(torch.full((2, 3), 4.0) * mask, mask), torch.zeros(2, 3))


def test_losses_and_their_gradients_are_the_loops(tokens):
    """The gradient by finite differences of the loop; count makes a part of a minibatch."""
    _, draw = tokens
    new, old, advantages = draw(0.3), draw(0.3), draw()
    values, old_values, returns = draw(0.5), draw(0.5), draw()

    def policy_loop(new, count):
        total, clipped = 0.0, 0
        for lp, lo, adv in zip(rows(new), rows(old), rows(advantages)):
            for x, y, a in zip(lp, lo, adv):
                ratio = math.exp(x - y)
                total -= min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
                clipped += abs(ratio - 1) > 0.2
        return total / count, clipped / count

    def value_loop(values, count):
        total = 0.0
        for v, o, r in zip(rows(values), rows(old_values), rows(returns)):
            total += sum(0.5 * max((x - z) ** 2, (y + min(max(x - y, -0.2), 0.2) - z) ** 2) for x, y, z in zip(v, o, r))
        return total / count

    for count in (9, 20):
        x = new.clone().requires_grad_()
        loss, clip_fraction = ppo.policy_loss(x, old, advantages, count, 0.2)
        assert (loss.item(), clip_fraction.item()) == pytest.approx(policy_loop(new, count), abs=1e-7) and clip_fraction > 0
        y = values.clone().requires_grad_()
        assert ppo.value_loss(y, old_values, returns, count, 0.2).item() == pytest.approx(value_loop(values, count), abs=1e-12)
    loss.backward()
    ppo.value_loss(y, old_values, returns, 20, 0.2).backward()
    for b, n in enumerate(LENGTHS):
        for t in range(n):
            step = torch.zeros(3, 5, dtype=torch.float64)
            step[b, t] = 1e-6
            assert x.grad[b, t].item() == pytest.approx((policy_loop(new + step, 20)[0] - policy_loop(new - step, 20)[0]) / 2e-6, abs=1e-8)
            assert y.grad[b, t].item() == pytest.approx((value_loop(values + step, 20) - value_loop(values - step, 20)) / 2e-6, abs=1e-8)


def test_kl_estimates_are_the_loops_and_their_expectation_is_the_kl(tokens):
    mask, draw = tokens
    logps, reference = draw(), draw()
    k1, k3 = ppo.kl_estimates(logps, reference)
    for ours, estimate in ((k1, lambda x, y: x - y), (k3, lambda x, y: math.exp(y - x) - 1 - (y - x))):
        expected = [estimate(x, y) for lp, ref in zip(rows(logps), rows(reference)) for x, y in zip(lp, ref)]
        assert [x for row in rows(ours) for x in row] == pytest.approx(expected, abs=1e-12)
        assert (ours[~mask] == 0).all()
    p, q = (torch.randn(1, 50, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    exact = (p.exp() * (p - q)).sum().item()
    assert [(p.exp() * k).sum().item() for k in ppo.kl_estimates(p, q)] == pytest.approx([exact, exact])


@pytest.mark.parametrize("kl, error", [(6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (0.0, -0.2), (-3.0, -0.2)])
def test_the_kl_controller(kl, error):
    assert ppo.adapted_kl_coefficient(0.05, kl, 6.0, 64, 1000) == pytest.approx(0.05 * (1 + error * 64 / 1000))


# ------------------------------------------------------------------------------------------------------------- Sampling

TEXTS = ["Hi", "What is 2 + 2?", "Name a colour that is not red, please.", "x"]


def encoded():
    tokenizer = common.tiny_tokenizer()
    return [common.render(tokenizer, [{"role": "user", "content": text}], prompt=True) for text in TEXTS]


def test_samples_against_transformers(monkeypatch, tmp_path):
    """Sampled log-probabilities and entropies equal transformers' own forward pass over each row alone, which has no cache and no
    padding, and the training pass; a row alone, without padding, gets the same tokens as in the batch."""
    args = parse(monkeypatch, *flags(tmp_path, "x", *LORA))
    policy = roles_of(args)["policy"]
    randomise(policy.model, "policy", 0.05)
    prompts, stop, T = encoded(), list(range(40)), 0.7
    uniforms = torch.rand(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    answers = ppo.sample(policy, prompts, uniforms, stop, T, pad_id=258)
    lengths = [len(ids) for ids, _, _ in answers]
    assert len(set(lengths)) > 1 and max(lengths) <= 12
    batch = ppo.collate(prompts, [ids for ids, _, _ in answers], 258, torch.device("cpu"))
    with torch.no_grad():
        model, trained = policy.activate(), policy.logps(batch, T).split(lengths)
        for prompt, (ids, logps, entropies), again in zip(prompts, answers, trained):
            assert len(ids) == 12 or ids[-1] in stop
            assert not set(ids[:-1]) & set(stop)
            expected = (model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / T).log_softmax(-1)
            chosen = expected.gather(1, torch.tensor(ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(logps), chosen, rtol=0, atol=1e-4)
            torch.testing.assert_close(again, chosen, rtol=0, atol=1e-4)
            torch.testing.assert_close(torch.tensor(entropies), -(expected.exp() * expected).sum(1), rtol=0, atol=1e-4)
    for b, (prompt, answer) in enumerate(zip(prompts, answers)):
        alone = ppo.sample(policy, [prompt], uniforms[b : b + 1], stop, T, pad_id=258)[0]
        assert alone[0] == answer[0] and alone[1] == pytest.approx(answer[1], abs=1e-4)


def test_left_padding_changes_nothing_where_positions_are_learnt():
    """[9] Rotary embedding would not notice a whole row that is moved; GPT-2's position vectors do."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=320, n_positions=128, n_embd=32, n_layer=1, n_head=2)).eval()
    model.transformer.wpe.weight.data *= 30
    uniforms = torch.rand(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for prompt, (ids, logps, _) in zip(encoded(), ppo.sample(ppo.Role(model, torch.float32), encoded(), uniforms, [], 1.0, pad_id=258)):
        with torch.no_grad():
            expected = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(torch.tensor(logps), expected.gather(1, torch.tensor(ids)[:, None])[:, 0], rtol=0, atol=1e-4)


def test_samples_have_the_policys_distribution(monkeypatch, tmp_path):
    """Evenly spread numbers give each token its probability to within one part: the whole distribution, nothing cut off."""
    policy = roles_of(parse(monkeypatch, *flags(tmp_path, "x")))["policy"]
    n, prompt = 500, encoded()[0]
    uniforms = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    drawn = [ids[0] for ids, _, _ in ppo.sample(policy, [prompt] * n, uniforms, [], 0.5, pad_id=258)]
    with torch.no_grad():
        expected = (policy.model(torch.tensor([prompt])).logits[0, -1] / 0.5).softmax(-1)
    assert (torch.bincount(torch.tensor(drawn), minlength=320) / n - expected).abs().max() <= 1 / n + 1e-6


def collected(monkeypatch, tmp_path, *more, stop=(257,), reward=lambda answer: float(len(answer)), own=None):
    args = parse(monkeypatch, *flags(tmp_path, "x", *more))
    tokenizer = common.tiny_tokenizer()
    corpus, _ = common.load_data(args, tokenizer, 320, kind="prompts")
    roles, seen = roles_of(args), []

    def scorer(conversations, answers, references):
        seen.extend(zip(conversations, answers, references))
        return [reward(answer) for answer in answers]

    own = {} if own is None else own
    with monkeypatch.context() as patch:
        patch.setattr(common, "stop_ids", lambda *args: list(stop))
        return ppo.collect(args, roles, tokenizer, scorer, own, corpus, [[document] for document in range(8)], [0, 0]), seen


def test_samples_do_not_depend_on_the_batch(monkeypatch, tmp_path):
    one, _ = collected(monkeypatch, tmp_path, "--rollout-batch-size", 1, "--batch-size", 3)
    many, _ = collected(monkeypatch, tmp_path, "--rollout-batch-size", 8)
    assert sorted(one.table) == sorted(many.table)
    assert one.figures["kl"] == pytest.approx(0, abs=1e-4) and one.figures["sampling_error"] < 1e-5
    other, _ = collected(monkeypatch, tmp_path, "--seed", 1)
    assert sorted(other.table) != sorted(many.table)


def test_a_rollout_is_what_it_says(monkeypatch, tmp_path):
    """[2] penalty for answers that do not end, figures, what the scorer gets, and the layout of the micro-batches."""
    stop = list(range(60, 130))
    rollout, seen = collected(monkeypatch, tmp_path, "--unfinished-score", -1, stop=stop)
    lengths = rollout.mask.sum(1)
    last = [batch["targets"].split(lengths[rows].tolist()) for rows, batch, _ in rollout.micro_batches]
    ended = torch.tensor([answer[-1].item() in stop for part in last for answer in part])
    assert 0 < ended.sum() < 8 and rollout.figures["eos_rate"] == ended.float().mean()
    assert (rollout.scores[~ended] == -1).all() and (rollout.scores[ended] >= 0).all()
    assert rollout.figures["response_length"] == lengths.float().mean() and rollout.rows == 8
    assert sum(count for _, _, count in rollout.micro_batches) == lengths.sum() == rollout.mask.sum()
    assert rollout.figures["score"] == pytest.approx(rollout.scores.mean().item())
    assert {(c[-1]["content"], reference) for c, _, reference in seen} == {(row["prompt"], row["completion"]) for row in PROMPTS}


HALF = list(range(60, 130))  # stop tokens with which about half of the answers end


def test_an_answer_cut_off_gets_no_more_than_the_worst_that_ended(monkeypatch, tmp_path):
    """[2] Fixed by the first rollout in which an answer ended; -1 until then, and for rewards that do not fall below -1."""
    own, auto = {}, ["--unfinished-score", "auto"]
    for stop, low, expected in (([], -5.0, None), (HALF, -5.0, "lowest"), (HALF, -90.0, "as before"), ([], -5.0, "as before")):
        rollout, seen = collected(monkeypatch, tmp_path, *auto, stop=stop, reward=lambda answer, low=low: low - len(answer), own=own)
        ended = torch.tensor([batch["targets"][i].item() in stop for rows, batch, _ in rollout.micro_batches
                              for i in rollout.mask[rows].sum(1).cumsum(0) - 1])  # fmt: skip
        assert ended.sum() == 0 if not stop else 0 < ended.sum() < 8
        if expected == "lowest":
            first = rollout.scores[ended].min().item()
            assert min(low - len(answer) for _, answer, _ in seen) < first < -5  # an answer cut off would have been lower still
        assert own == ({"unfinished_score": first} if expected else {})
        assert (rollout.scores[~ended] == (first if expected else -1.0)).all()
    rollout, _ = collected(monkeypatch, tmp_path, *auto, stop=HALF, own=own)
    assert own["unfinished_score"] == first
    own = {}
    collected(monkeypatch, tmp_path, *auto, stop=HALF, own=own)
    assert own == {"unfinished_score": -1.0}


def test_an_answer_cut_off_scores_the_same_on_all_ranks(monkeypatch, capsys):
    """The lowest of another rank, -7, counts; and one rank may have no answer that ended."""
    monkeypatch.setattr(common, "over_ranks", lambda value, op=torch.distributed.ReduceOp.SUM: min(value, -7.0) if "MIN" in str(op) else value)
    for scores, ended, expected in (([-3.0, -9.0], [True, False], -7.0), ([-3.0], [False], -7.0), ([], [], -7.0), ([-8.0], [True], -8.0)):
        own = {}
        assert [ppo.unfinished_score("auto", own, scores, ended) for _ in range(2)] == [expected] * 2
    assert capsys.readouterr().out.count("--unfinished-score auto") == 4  # once a run
    assert [ppo.unfinished_score(x, own, scores, ended) for x in (-3.0, 0.0, "none")] == [-3.0, 0.0, None]


def test_temperature_is_exact_for_a_soft_capped_head():
    """Logits / T through cap and scale, with its gradient, against transformers' own logits."""
    config = transformers.Gemma2Config(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
                                       num_key_value_heads=1, final_logit_softcapping=2.0)  # fmt: skip
    model, ids = transformers.Gemma2ForCausalLM(config), torch.arange(3, 15)[None]
    model.get_output_embeddings().weight.data *= 30  # far into the cap
    ours = common.target_logps(model, ids, ids[0, 1:], torch.arange(11), temperature=0.6)
    expected = (model(ids).logits[0, :-1] / 0.6).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    p = model.model.layers[0].mlp.down_proj.weight
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), p)[0] for x in (ours, expected)), rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ The four models


def batch_of(answers=((5, 6, 7), (8,), (9, 10), (11, 12, 257))):
    return ppo.collate(encoded(), [list(answer) for answer in answers], 258, torch.device("cpu"))


def test_one_base_serves_all_and_adapters_do_not_leak(monkeypatch, tmp_path, capsys):
    roles = roles_of(parse(monkeypatch, *flags(tmp_path, "x", *LORA)))
    model, plain, batch = roles["policy"].model, common.tiny_model(), batch_of()
    assert all(role.model is model for role in roles.values())
    base, pair = sum(p.numel() for p in plain.parameters()), sum(t.numel() for t in ppo.adapter_tensors(model, "policy").values())
    every = {*model.parameters(), roles["critic"].head.weight}
    assert sum(p.numel() for p in every) == base + 2 * pair + 128
    gib = (4 * (base + 2 * pair + 128)) / 2**30
    said = f"in memory for policy, reference, critic: 1 model(s), {base + 2 * pair + 128:,} parameters, {gib:.3f} GiB; {2 * pair + 128:,} of them train"
    assert said in capsys.readouterr().out
    assert {p for p in every if p.requires_grad} == {*roles["policy"].own_parameters(), *roles["critic"].own_parameters()}

    randomise(model, "policy")
    randomise(model, "critic", seed=2)
    roles["critic"].head.weight.data.normal_()
    with torch.no_grad():
        expected, before = common.target_logps(plain, **batch), roles["critic"].values(batch)
        assert torch.equal(roles["reference"].logps(batch, 1.0), expected)
    logps = roles["policy"].logps(batch, 1.0)
    assert (logps - expected).abs().max() > 0.1
    logps.sum().backward()
    with_gradient = {p for p in every if p.grad is not None}
    assert with_gradient == set(ppo.adapter_tensors(model, "policy").values())
    for p in with_gradient:
        p.grad = None
    randomise(model, "policy", seed=3)
    values = roles["critic"].values(batch)
    assert torch.equal(values, before)
    values.sum().backward()
    assert {p for p in every if p.grad is not None} == {*ppo.adapter_tensors(model, "critic").values(), roles["critic"].head.weight}


@pytest.mark.parametrize("more", [[], LORA])
def test_the_value_heads_gradient_is_the_closed_form(more, monkeypatch, tmp_path):
    """d/dw 1/2 mean (w h - R)^2 = mean (w h - R) h; the new head is 0, so its backbone gets a gradient of 0."""
    critic, batch = roles_of(parse(monkeypatch, *flags(tmp_path, "x", *more)))["critic"], batch_of()
    mask = torch.arange(3) < torch.tensor([3, 1, 2, 3])[:, None]
    returns = torch.randn(4, 3) * mask
    values = ppo.as_rows(critic.values(batch), mask)
    assert torch.equal(values, torch.zeros(4, 3))
    ppo.value_loss(values, values.detach(), returns, 9, 0.2).backward()
    hidden = critic.model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    h = hidden.flatten(0, 1)[batch["target_index"]].double()
    torch.testing.assert_close(critic.head.weight.grad[0].double(), (-returns[mask].double()[:, None] * h).mean(0), rtol=1e-4, atol=1e-6)
    others = [p.grad for p in critic.own_parameters() if p is not critic.head.weight and p.grad is not None]
    assert others and all((gradient == 0).all() for gradient in others)


@pytest.mark.parametrize("more", [[], LORA])
def test_the_reference_stays_and_what_is_saved_is_the_policy(more, monkeypatch, tmp_path):
    caught, load = [], ppo.load_roles
    monkeypatch.setattr(ppo, "load_roles", lambda *args: caught.append(load(*args)) or caught[0])
    ppo.main(flags(tmp_path, "run", *more))
    roles, plain, batch = caught[0], common.tiny_model(), batch_of()
    with torch.no_grad():
        assert torch.equal(roles["reference"].logps(batch, 1.0), common.target_logps(plain, **batch))
        expected = roles["policy"].logps(batch, 1.0)
        assert (expected - common.target_logps(plain, **batch)).abs().max() > 1e-3
        auto = peft.AutoPeftModelForCausalLM if more else transformers.AutoModelForCausalLM
        saved = auto.from_pretrained(tmp_path / "run")
        logits = saved(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)[batch["target_index"]]
        found = logits.log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_policy_that_starts_from_an_adapter_has_it_as_reference(monkeypatch, tmp_path):
    ppo.main(flags(tmp_path, "first", *LORA, "--lr", "1e-2"))
    roles = roles_of(parse(monkeypatch, *flags(tmp_path, "x", "--adapter", tmp_path / "first")))
    batch = batch_of()
    with torch.no_grad():
        found = [roles[name].logps(batch, 1.0) for name in ("policy", "reference")]
    assert torch.equal(*found) and not torch.equal(found[0], common.target_logps(common.tiny_model(), **batch))
    assert not any(p.requires_grad for p in ppo.adapter_tensors(roles["policy"].model, "reference").values())
    ppo.main(flags(tmp_path, "second", "--adapter", tmp_path / "first"))
    assert read_metrics(tmp_path / "second")[1]["kl"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("more", [[], LORA])
def test_in_bfloat16_kl_starts_at_zero(more, tmp_path):
    """Policy and reference round alike, whether or not they share their weights; and updates start at ratio 1."""
    ppo.main(flags(tmp_path, "run", *more, "--dtype", "bfloat16", "--max-steps", 1))
    (entry,) = (entry for entry in read_metrics(tmp_path / "run") if "score" in entry)
    assert entry["kl"] == entry["kl_k3"] == 0 and entry["sampling_error"] > 1e-4


def test_weights_are_cast_again_in_every_pass_but_in_sampling(monkeypatch, tmp_path):
    """A cache of autocast's would hold all weights in bfloat16 through a pass that recomputes blocks."""
    args = parse(monkeypatch, *flags(tmp_path, "x", "--dtype", "bfloat16"))
    policy, cached = ppo.load_roles(args, None, True, torch.bfloat16, torch.device("cpu"))["policy"], []
    policy.model.model.layers[0].register_forward_hook(lambda *_: cached.append(torch.is_autocast_cache_enabled()))
    policy.logps(batch_of(), 1.0)
    ppo.sample(policy, encoded(), torch.rand(4, 2, dtype=torch.float64), [], 1.0, pad_id=258)
    assert cached == [False, True, True]


def test_recomputing_blocks_changes_nothing(tmp_path):
    """The backward pass runs the blocks again: with the adapter that was on."""
    for name, more in (("plain", []), ("recomputed", ["--gradient-checkpointing"])):
        ppo.main(flags(tmp_path, name, *LORA, "--max-steps", 1, *more))
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "recomputed"))
    assert all(torch.allclose(a[key], b[key], rtol=0, atol=1e-6) for key in a)


# -------------------------------------------------------------------------------------------------------------- Rewards

CONVERSATIONS = [[{"role": "user", "content": text}] for text in TEXTS]
ANSWERS = ["Hello", "4", "", "blue and green"]


def save_reward_model(folder, lora: bool, template=common.CHATML):
    """A reward model as reward_model.py leaves it, made by transformers or PEFT -> (the model, its tokenizer)."""
    tokenizer, base = common.tiny_tokenizer(), common.tiny_model()
    tokenizer.chat_template = template
    torch.manual_seed(7)
    base.save_pretrained(folder / "base")
    config = transformers.AutoConfig.from_pretrained(folder / "base", num_labels=1, pad_token_id=258)
    config.reward_offset = 0.25
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "base", config=config)
    if lora:
        targets = ["q_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=5, target_modules=targets))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if lora:
        config = json.loads((folder / "adapter_config.json").read_text())
        config |= {"reward_offset": 0.25, "base_fingerprint": common.fingerprint(base), "base_model_name_or_path": str(folder / "base")}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return model.eval(), tokenizer


@pytest.mark.parametrize("more", [[], LORA])
@pytest.mark.parametrize("lora", [False, True])
def test_scores_are_transformers_and_the_critic_starts_from_them(lora, more, monkeypatch, tmp_path):
    """At the last token of the whole rendered conversation, minus the offset, whatever padding and batch."""
    theirs, tokenizer = save_reward_model(tmp_path / "reward", lora)
    args = parse(monkeypatch, *flags(tmp_path, "x", *more, "--rollout-batch-size", 3))
    roles = roles_of(args, str(tmp_path / "reward"))
    ours = ppo.model_scores(roles["reward"], tokenizer, args, CONVERSATIONS, ANSWERS)
    ids = [tokenizer.apply_chat_template([*c, {"role": "assistant", "content": a}], return_dict=False) for c, a in zip(CONVERSATIONS, ANSWERS)]
    with torch.no_grad():
        expected = [theirs(input_ids=torch.tensor([row])).logits.item() - 0.25 for row in ids]
        assert ours == pytest.approx(expected, abs=1e-5) and np.std(ours) > 1e-3
        rows, mask = ppo.padded(ids, 0, torch.device("cpu"))
        last = torch.arange(4) * rows.shape[1] + mask.sum(1) - 1
        values = roles["critic"].values({"input_ids": rows, "attention_mask": mask, "target_index": last})
    shared = lora and bool(more)
    assert (roles["reward"].model is roles["policy"].model) == shared
    torch.testing.assert_close(values, torch.tensor(expected) if shared or not more else torch.zeros(4), rtol=0, atol=1e-5)
    assert not any(p.requires_grad for p in roles["reward"].own_parameters())


def test_a_merged_reward_model_is_rounded_once(monkeypatch, tmp_path):
    """bfloat16(W0 + s B A), not bfloat16(W0) + bfloat16(s B A)."""
    save_reward_model(tmp_path / "reward", True)
    args = parse(monkeypatch, *flags(tmp_path, "x", "--dtype", "bfloat16"))
    cpu = torch.device("cpu")
    ours = ppo.load_classifier(args, str(tmp_path / "reward"), "--reward", torch.bfloat16, cpu, torch.bfloat16).model.state_dict()
    base, tensors = load_file(tmp_path / "reward" / "base" / "model.safetensors"), load_file(tmp_path / "reward" / "adapter_model.safetensors")
    for key in [key for key in tensors if "lora_A" in key]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
        update = 5 / 3 * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
        expected, twice = (base[name].bfloat16() + update).bfloat16(), base[name].bfloat16() + update.bfloat16()
        assert torch.equal(ours[name], expected) and not torch.equal(expected, twice)


def test_a_reward_model_with_another_template_reads_text(monkeypatch, tmp_path):
    theirs, tokenizer = save_reward_model(tmp_path / "reward", False, common.ALPACA)
    ppo.main(flags(tmp_path, "run", "--reward", tmp_path / "reward", "--max-steps", 1))
    args = parse(monkeypatch, *flags(tmp_path, "x", "--reward", tmp_path / "reward"))
    roles = roles_of(args, args.reward)
    text = "### Instruction:\nHi\n\n### Response:\nHello<|im_end|>\n\n"
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([tokenizer(text).input_ids])).logits.item() - 0.25
    assert ppo.model_scores(roles["reward"], tokenizer, args, CONVERSATIONS[:1], ANSWERS[:1])[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("body, match", [
    ("raise KeyError('no')", "raised KeyError"),
    ("return [1.0]", "1 numbers for"),
    ("return [float('nan')] * len(a)", "gave nan for the answer"),
    ("return [None] * len(a)", "raised TypeError"),
])  # fmt: skip
def test_a_bad_reward_function_is_named(body, match, tmp_path):
    (tmp_path / "rule.py").write_text(f"def rule(p, a, r):\n    {body}\n")
    with pytest.raises(common.UserError, match=match):
        ppo.main(flags(tmp_path, "run", "--reward", f"{tmp_path / 'rule.py'}:rule"))


@pytest.mark.parametrize("reward, match", [
    ("missing.py:rule", "no file"), (f"{RULES}:missing", "no function missing"), ("no/such/folder", "--reward no/such/folder"),
])  # fmt: skip
def test_a_reward_that_is_not_there(reward, match, tmp_path):
    with pytest.raises(common.UserError, match=match):
        ppo.main(flags(tmp_path, "run", "--reward", reward))


def test_a_policy_is_no_reward_model(tmp_path):
    common.tiny_model().save_pretrained(tmp_path / "policy")
    common.tiny_tokenizer().save_pretrained(tmp_path / "policy")
    with pytest.raises(common.UserError, match="no reward model"):
        ppo.main(flags(tmp_path, "run", "--reward", tmp_path / "policy"))


def test_the_bundled_rewards():
    lowercase, kindness, exact_match = (ppo.load_function(f"{RULES}:{name}") for name in ("lowercase", "kindness", "exact_match"))
    assert lowercase(["", "", ""], ["abCD", "", "e"], [None] * 3) == [0.5, 0.0, 1.0]
    answers = ["", "A lovely film. I hated it.", "Best!", "Abest", "汤很差，一星。"]
    assert kindness([""] * 5, answers, [None] * 5) == [0.0, 0.0, 1.0, 0.0, -1.0]
    answers, references = ["So it is 1,018.", "18 or 19", " Paris\n", "-3"], ["#### 1018", "#### 18", "paris", "3"]
    assert exact_match([""] * 4, answers, references) == [1.0, 0.0, 1.0, 0.0]


# -------------------------------------------------------------------------------------------------------------- The run


def test_at_the_first_update_the_ratio_is_one(tmp_path):
    """One update a rollout: nothing is clipped, and the loss is minus the mean of whitened advantages, 0."""
    ppo.main(flags(tmp_path, "run", "--ppo-epochs", 1, "--minibatches", 1, "--temperature", 0.8))
    for entry in (entry for entry in read_metrics(tmp_path / "run") if "score" in entry):
        assert entry["clip_fraction"] == 0 and abs(entry["policy_loss"]) < 1e-6


def test_a_training_pass_unlike_the_rollout_is_found(monkeypatch, tmp_path):
    logps = ppo.Role.logps
    monkeypatch.setattr(ppo.Role, "logps", lambda *args, **more: logps(*args, **more) + 0.001 * torch.is_grad_enabled())
    with pytest.raises(common.UserError, match="the first update finds other log-probabilities"):
        ppo.main(flags(tmp_path, "run"))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("more", [[], LORA])
def test_a_resumed_run_equals_one_that_was_never_stopped(more, monkeypatch, tmp_path):
    """Bit for bit: metrics, weights, the adapted KL coefficient and the score of answers cut off, in the middle of an epoch."""
    (tmp_path / "rule.py").write_text("def rule(p, a, r): return [-sum(map(ord, x)) / 100 for x in a]\n")
    monkeypatch.setattr(common, "stop_ids", lambda *args: HALF)
    used, unfinished_score = [], ppo.unfinished_score
    monkeypatch.setattr(ppo, "unfinished_score", lambda *args: used.append(unfinished_score(*args)) or used[-1])
    more = [*more, "--unfinished-score", "auto", "--reward", tmp_path / "rule.py:rule"]
    more = [*more, "--kl-target", 1, "--kl-horizon", 20, "--save-every", 1, "--max-steps", 4, "--log-every", 2, "--minibatches", 1, "--grad-accum", 3]
    ppo.main(flags(tmp_path, "whole", *more))
    end_step = common.Run.end_step
    with monkeypatch.context() as patch, pytest.raises(Killed):

        def killed(self, *args):
            if self.step == 3:
                raise Killed
            end_step(self, *args)

        patch.setattr(common.Run, "end_step", killed)
        ppo.main(flags(tmp_path, "parts", *more))
    ppo.main(flags(tmp_path, "parts", *more, "--resume"))
    whole, parts = ([{k: v for k, v in e.items() if k not in TIMINGS} for e in read_metrics(tmp_path / name)[1:]] for name in ("whole", "parts"))
    assert whole == parts and len(set(used)) == 1 and used[0] < -1
    logged = [entry for entry in whole if "score" in entry]
    assert len({entry["kl_coefficient"] for entry in logged}) == len(logged) > 1
    name = "adapter_model.safetensors" if more[0] == "--lora-rank" else "model.safetensors"
    a, b = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("figure, value, match", [
    ("kl", 1000.0, "KL has exploded"), ("entropy", 1e-9, "collapsed: its entropy"), ("kl", math.nan, "not finite"),
])  # fmt: skip
@pytest.mark.parametrize("steps, more", [(4, []), (3, []), (3, ["--eval-fraction", 0.3])], ids=["in between", "at the end", "at the last evaluation"])
def test_a_policy_gone_astray_stops_before_it_is_saved(figure, value, match, steps, more, monkeypatch, tmp_path):
    """After the third step: found in the next rollout; after the last step in the evaluation, or without one in a rollout for that."""
    collect, calls = ppo.collect, []

    def astray(*args):
        rollout = collect(*args)
        calls.append(args[-1])
        astray = calls.count([1]) == 2 if more else args[-1] == [0, 3]  # of evaluations the second is the last
        rollout.figures.update({figure: value} if astray else {})
        return rollout

    monkeypatch.setattr(ppo, "collect", astray)
    with pytest.raises(common.UserError, match=f"step 3: .*{match}.*step-00000002"):
        ppo.main(flags(tmp_path, "run", *LORA, "--max-steps", steps, "--save-every", 1, *more))
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("fraction, streams", [(0, [[0, 0], [0, 1], [0, 2]]), (0.3, [[1], [0, 0], [0, 1], [1]])])
def test_every_rollout_is_checked_once_the_first_one_too(fraction, streams, monkeypatch, tmp_path):
    """With held-out prompts there is no rollout after the last step."""
    collect, check_health, collected, checked = ppo.collect, ppo.check_health, [], []
    monkeypatch.setattr(ppo, "collect", lambda *args: collected.append((args[-1], collect(*args))) or collected[-1][1])
    monkeypatch.setattr(ppo, "check_health", lambda figures, *args: checked.append(figures) or check_health(figures, *args))
    ppo.main(flags(tmp_path, "run", *LORA, "--max-steps", 2, "--eval-fraction", fraction))
    assert [stream for stream, _ in collected] == streams
    assert all(a is rollout.figures for a, (_, rollout) in zip(checked, collected, strict=True))
    with pytest.raises(common.UserError, match="step 0: the policy has collapsed: .*there is no checkpoint yet"):
        ppo.main(flags(tmp_path, "first", *LORA, "--min-entropy", 100, "--eval-fraction", fraction))


TIMINGS = {"tokens_per_second", "rollout_tokens_per_second", "update_tokens_per_second", "peak_memory_gib", "seconds"}


def one_rollout(tmp_path, name, *more):
    """-> what a step logs but its timings, and the weights after it"""
    ppo.main(flags(tmp_path, name, "--max-steps", 1, "--save-every", 1, "--minibatches", 1, "--max-grad-norm", 0, *more))
    (entry,) = (entry for entry in read_metrics(tmp_path / name) if "score" in entry)
    return {key: entry[key] for key in entry.keys() - TIMINGS}, load_file(tmp_path / name / "checkpoint" / "step-00000001" / "weights.safetensors")


def test_critic_lr_and_value_coefficient_change_the_critic_alone(tmp_path):
    """One update, Adam's first: w = lr g / (|g| + eps) from 0. Of r = w / lr, twice the loss makes 2 r / (1 + |r|)."""
    one_update = ["--ppo-epochs", 1, "--critic-lr"]
    before, weights = one_rollout(tmp_path, "before", *one_update, 1e-3)
    r = weights["critic.score.weight"].double() / 1e-3
    for name, more, expected in (("lr", [2e-3], 2e-3 * r), ("coefficient", [1e-3, "--value-coefficient", 0.2], 1e-3 * 2 * r / (1 + r.abs()))):
        after, changed = one_rollout(tmp_path, name, *one_update, *more)
        assert {key for key in before if before[key] != after[key]} == ({"critic_lr"} if name == "lr" else {"loss", "critic_grad_norm"})
        assert all(torch.equal(weights[key], changed[key]) for key in weights if key.startswith("policy."))
        torch.testing.assert_close(changed["critic.score.weight"].double(), expected, rtol=1e-4, atol=0)
        if name == "lr":
            assert [after["critic_lr"], after["lr"]] == pytest.approx([2e-3, 1e-3])
        else:
            assert after["loss"] == pytest.approx(after["policy_loss"] + 0.2 * after["value_loss"], abs=1e-6)
            assert after["critic_grad_norm"] == pytest.approx(2 * before["critic_grad_norm"], rel=1e-5)


def test_clip_holds_both_losses(monkeypatch, tmp_path):
    """The logged losses of three epochs are the loops with the flag's number, in float64, whatever number the functions got."""
    calls, policy_loss, value_loss = {"policy": [], "value": []}, ppo.policy_loss, ppo.value_loss

    def spied(kind, function):
        return lambda *args: calls[kind].append([x.detach().double().flatten() for x in args[:3]] + [args[3]]) or function(*args)

    monkeypatch.setattr(ppo, "policy_loss", spied("policy", policy_loss))
    monkeypatch.setattr(ppo, "value_loss", spied("value", value_loss))
    found, _ = one_rollout(tmp_path, "run", "--ppo-epochs", 3, "--clip", 0.03, "--lr", 3e-4, "--critic-lr", 1e-3)
    policy = value = clipped = unclipped = 0.0
    for new, old, advantages, count in calls["policy"]:  # padding, 0 in all of them, adds nothing
        for x, y, a in zip(*(z.tolist() for z in (new, old, advantages))):
            ratio = math.exp(x - y)
            policy -= min(ratio * a, min(max(ratio, 0.97), 1.03) * a) / count / 3
            clipped += (abs(ratio - 1) > 0.03) / count / 3
    for new, old, returns, count in calls["value"]:
        for x, y, z in zip(*(z.tolist() for z in (new, old, returns))):
            value += 0.5 * max((x - z) ** 2, (y + min(max(x - y, -0.03), 0.03) - z) ** 2) / count / 3
            unclipped += 0.5 * (x - z) ** 2 / count / 3
    assert [found[name] for name in ("policy_loss", "value_loss", "clip_fraction")] == pytest.approx([policy, value, clipped], rel=1e-4, abs=1e-6)
    assert 0.1 < found["clip_fraction"] < 0.9 and value > 1.01 * unclipped


@pytest.mark.parametrize("flag, stops, goes_on", [("--max-kl", 2.9, 3.1), ("--min-entropy", 0.06, 0.04)])
def test_where_a_policy_has_gone_astray_is_the_flags_number(flag, stops, goes_on, monkeypatch, tmp_path):
    """12 nats an answer of 4 tokens are 3 a token; entropy 0.05."""
    figures, run = {"kl": 12.0, "response_length": 4.0, "entropy": 0.05}, SimpleNamespace(last_good=str)
    ppo.check_health(figures, 0, run, parse(monkeypatch, *flags(tmp_path, "x", flag, goes_on)))
    with pytest.raises(common.UserError, match=flag):
        ppo.check_health(figures, 0, run, parse(monkeypatch, *flags(tmp_path, "x", flag, stops)))


def test_alpha_scales_the_adapters(monkeypatch, tmp_path):
    """h = W0 x + alpha / r B A x, in float64, of the policy and of the critic; and the folder says so."""
    args = parse(monkeypatch, *flags(tmp_path, "run", *LORA, "--lora-alpha", 6, "--max-steps", 0))
    policy = roles_of(args)["policy"]
    x = torch.randn(3, 128, dtype=torch.float64)
    for seed, name in enumerate(("policy", "critic")):
        randomise(policy.model, name, seed=seed)
        layer = ppo.adapted_layers(policy.model)["model.layers.1.self_attn.k_proj"]
        layer.on, lora = name, layer.adapters[name]
        expected = x @ layer.base.weight.double().T + 6 / 4 * x @ lora.lora_A.double().T @ lora.lora_B.double().T
        torch.testing.assert_close(layer(x.float()).double(), expected, rtol=0, atol=1e-5)
    ppo.train(args)
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["lora_alpha"] == 6


def test_metrics_and_the_table(tmp_path, capsys):
    ppo.main(flags(tmp_path, "run", *LORA, "--eval-fraction", 0.3, "--eval-every", 2, "--samples", 2))
    entries, printed = read_metrics(tmp_path / "run"), capsys.readouterr().out
    names = {"score", "kl", "kl_k3", "reward", "clip_fraction", "entropy", "value_loss", "policy_loss", "explained_variance", "response_length",
             "eos_rate", "lr", "critic_lr", "rollout_tokens_per_second", "update_tokens_per_second"}  # fmt: skip
    steps, evaluations = [e for e in entries if "score" in e], [e for e in entries if "eval_score" in e]
    assert len(steps) == 3 and all(names <= e.keys() for e in steps)
    assert [e["step"] for e in evaluations] == [0, 2, 3] and {"eval_kl", "eval_entropy"} <= evaluations[0].keys()
    assert printed.count("held-out prompt") == 3 and "'Say " in printed and "in memory for" in printed
    for e in steps:
        assert e["loss"] == pytest.approx(e["policy_loss"] + 0.1 * e["value_loss"], abs=1e-6)
        assert e["reward"] == pytest.approx(e["score"] - e["kl_coefficient"] * e["kl"], abs=1e-5)
    assert [e["lr"] for e in steps] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])


def test_whole_models_train_in_one_process(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "world_size", lambda: 2)
    with pytest.raises(common.UserError, match="--lora-rank"):
        ppo.main(flags(tmp_path, "run"))


def test_two_ranks_equal_one_process(tmp_path):
    more = [*LORA, "--max-steps", 2, "--minibatches", 1, "--max-grad-norm", 0.5]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29731", str(ROOT / "ppo.py")]
    result = subprocess.run([*torchrun, "--model", "random", *flags(tmp_path, "two", *more)], capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    ppo.main(flags(tmp_path, "one", *more, "--batch-size", 4))
    one, two = ([e for e in read_metrics(tmp_path / name) if "score" in e] for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - TIMINGS:
            assert b[name] == pytest.approx(a[name], abs=1e-5 * max(1, abs(a[name]))), name
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(a[key], b[key], rtol=0, atol=1e-6) for key in a)


# ------------------------------------------------------------------------------------------------------------- Learning


def learn(tmp_path, seed, steps, *more):
    rows = [{"prompt": f"Say {c}{d}"} for c in "abcdefgh" for d in range(8)]
    ppo.main(["--data", write_rows(tmp_path / "say.jsonl", rows), "--output", str(tmp_path / "run"), "--eval-fraction", "0", "--lr", "5e-3",
              "--kl-coefficient", "0.01", "--response-length", "12", "--batch-size", "16", "--grad-accum", "1", "--minibatches", "2",
              "--unfinished-score", "none", "--max-steps", str(steps), "--save-every", "1000", "--seed", str(seed),
              "--reward", f"{RULES}:lowercase", *more])  # fmt: skip
    return [entry for entry in read_metrics(tmp_path / "run") if "score" in entry]


def test_it_learns(tmp_path):
    """The share of lower-case letters in an answer, at first what a random model writes."""
    entries = learn(tmp_path, 0, 7)
    assert entries[0]["score"] < 0.2 and entries[-1]["score"] > 0.45
    assert all(entry["kl"] < 30 for entry in entries)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_almost_all_there_is(seed, tmp_path):
    entries = learn(tmp_path, seed, 25)
    assert entries[0]["score"] < 0.2 and np.mean([entry["score"] for entry in entries[-3:]]) > 0.85
    assert all(entry["kl"] < 45 for entry in entries)


@pytest.mark.slow
def test_an_adapter_learns(monkeypatch, tmp_path):
    """On a base with a head of its own and larger: a random model's frozen head is so small that no hidden state makes a token likely."""
    tiny = common.tiny_model

    def larger():
        model = tiny()
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(8 * model.lm_head.weight.detach().flip(0))
        return model

    monkeypatch.setattr(common, "tiny_model", larger)
    entries = learn(tmp_path, 0, 25, "--lora-rank", "16")
    assert entries[0]["score"] < 0.2 and np.mean([entry["score"] for entry in entries[-3:]]) > 0.6
    assert all(entry["kl"] < 45 for entry in entries)

"""What is learnt from: advantages, weights, the loss, logprobs, micro-batches, optimizers.

    pytest tests/test_loss.py

Pinned here: groups by prompt, rewards that are equal or missing, hand-computed losses and clips,
one gradient however the batch is cut or permuted, and token_logprobs against the full log-softmax
in values and gradients. Models of a few thousand random weights, in float32.
"""

import copy
import math
import random

import pytest
import torch

import model as models
import train_grpo
from config import UserError
from rollout import Trajectory
from train_grpo import Config, accumulate, advantages, grpo_loss, learn, sequence_weights

VOCABULARY = 61
LOSSES = ("dapo", "grpo", "dr_grpo")


def qwen(**options):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_shape(), head_dim=8, **options))


def gemma(**options):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(**_shape(), head_dim=8, query_pre_attn_scalar=8, **options)
    return Gemma2ForCausalLM(config)


def gpt2():
    """Its positions are learnt, so a shift shows; rotary ones are relative."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 32}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.3, eos_token_id=None))


def phi(**options):
    from transformers import PhiConfig, PhiForCausalLM

    made = PhiForCausalLM(PhiConfig(**_shape(), **options))
    torch.nn.init.normal_(made.lm_head.bias)
    return made


def _shape():
    torch.manual_seed(0)
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def lora(model, *targets):
    """Adapters whose B is not 0, or they would change nothing."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, lora_alpha=6, target_modules=list(targets), task_type="CAUSAL_LM")
    made = get_peft_model(model, config)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


MODELS = {
    "tied": lambda: qwen(tie_word_embeddings=True),
    "untied": lambda: qwen(tie_word_embeddings=False),
    "head with bias": phi,
    "softcap": lambda: gemma(final_logit_softcapping=2.0),
    "lora": lambda: lora(qwen(tie_word_embeddings=True), "q_proj", "down_proj"),
    "lora on the head": lambda: lora(qwen(tie_word_embeddings=False), "v_proj", "lm_head"),
}


@pytest.fixture(scope="module")
def tied():
    """Shared: whoever changes weights takes a copy."""
    return MODELS["tied"]().eval()


def trajectory(rng, group=0, reward=1.0, stop="answered", turns=2, prompt=3, new=4):
    """Random ids: a prompt, then turns of sampled ids with an observation between them."""
    t = Trajectory({}, group, stop=stop, reward=reward)
    t.add([rng.randrange(VOCABULARY) for _ in range(prompt)], 0)
    for turn in range(turns):
        if turn:
            t.add([rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 5))], 0)
        ids = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, new))]
        t.add(ids, 1, [-9.0] * len(ids))
    return t


def some_trajectories(count=7):
    rng = random.Random(5)
    return [
        trajectory(rng, i % 2, rng.random(), turns=1 + i % 3, new=2 + 2 * i) for i in range(count)
    ]


def weighed(trajectories, loss, advantage=None, max_new_tokens=32):
    """(trajectory, advantage, weight) as `learn` makes them."""
    rewards, groups = [t.reward for t in trajectories], [t.group for t in trajectories]
    gain = advantage or advantages(rewards, groups, "group")[0].tolist()
    new_tokens = torch.tensor([t.new_tokens for t in trajectories])
    weights = sequence_weights(new_tokens, loss, max_new_tokens).tolist()
    return list(zip(trajectories, gain, weights, strict=True))


def gradient(model, batch, cfg, old=None):
    """One flat gradient of all trained parameters, and what accumulate returned."""
    model.zero_grad()
    metrics, seen = accumulate(model, batch, cfg, old)
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(parts).clone(), metrics, seen


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


# Advantages


def test_advantages_are_compared_within_a_prompts_group_by_hand():
    """Pitfall 20: groups of 4, 2 and 3, mixed up; the std is that of a sample (n - 1)."""
    rewards = [1.0, 5.0, 0.0, 0.0, 7.0, 1.0, 3.0, 3.0, 0.0]
    groups = [0, 1, 0, 0, 1, 0, 2, 2, 2]
    half, root = math.sqrt(3) / 2, math.sqrt(2) / 2
    third = 1 / math.sqrt(3)
    expected = [half, -root, -half, -half, root, half, third, third, -2 * third]
    gain, valid = advantages(rewards, groups, "group")
    assert gain.tolist() == pytest.approx(expected) and valid.all()
    gain, _ = advantages(rewards, groups, "none")
    assert gain.tolist() == pytest.approx([0.5, -1, -0.5, -0.5, 1, 0.5, 1, 1, -2])
    std = torch.tensor(rewards).std().item()
    by_batch, _ = advantages(rewards, groups, "batch")
    assert by_batch.tolist() == pytest.approx([g / std for g in gain.tolist()])


@pytest.mark.parametrize("adv_norm", ["group", "batch", "none"])
def test_advantages_do_not_depend_on_the_order_of_samples_or_the_names_of_groups(adv_norm):
    """Pitfall 20."""
    rng = random.Random(1)
    rewards = [rng.choice([0.0, 0.1, 1.0, None]) for _ in range(24)]
    groups = [i % 5 for i in range(24)]
    gain, valid = advantages(rewards, groups, adv_norm)
    order = rng.sample(range(24), 24)
    permuted = [rewards[i] for i in order], [100 - groups[i] for i in order]
    again, also_valid = advantages(*permuted, adv_norm)
    assert again.tolist() == pytest.approx(gain[order].tolist(), abs=1e-7)
    assert torch.equal(also_valid, valid[order])


@pytest.mark.parametrize("adv_norm", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, -1e9, 1e-30])
def test_equal_rewards_have_advantage_exactly_zero(adv_norm, value):
    """Pitfall 22: 0.1 seven times has a float mean that is not 0.1, hence a std that is not 0."""
    gain, valid = advantages([value] * 7 + [0.0, 1.0], [0] * 7 + [1, 1], adv_norm)
    assert gain[:7].tolist() == [0.0] * 7 and valid.all() and (gain[7:] != 0).all()


def test_rewards_that_differ_in_the_last_bit_are_not_equal():
    """Pitfall 22: equality is that of the rewards, and nothing is divided by 0."""
    gain, _ = advantages([0.3, 0.1 + 0.2], [0, 0], "group")
    assert gain.isfinite().all() and gain[0] < gain[1]


@pytest.mark.parametrize("missing", [None, float("nan")])
@pytest.mark.parametrize("adv_norm", ["group", "batch", "none"])
def test_a_missing_reward_is_left_out_of_every_mean(missing, adv_norm):
    """Pitfall 23: the others get what they would get without it."""
    gain, valid = advantages([1.0, missing, 0.0, missing, 4.0], [0, 0, 0, 1, 0], adv_norm)
    without, _ = advantages([1.0, 0.0, 4.0], [0, 0, 0], adv_norm)
    assert valid.tolist() == [True, False, True, False, True]
    assert gain[[0, 2, 4]].tolist() == without.tolist() and gain[[1, 3]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("adv_norm", ["group", "batch", "none"])
def test_groups_without_or_with_one_reward_teach_nothing(adv_norm):
    """Pitfalls 22, 23: all None, all NaN, and one that is left have nothing to compare."""
    rewards = [None, None, float("nan"), float("nan"), 1.0, None]
    gain, valid = advantages(rewards, [0, 0, 1, 1, 2, 2], adv_norm)
    assert gain.tolist() == [0.0] * 6 and valid.tolist() == [False] * 4 + [True, False]


# Weights and loss


def test_sequence_weights_by_hand():
    """Pitfalls 21, 27: only sequences with trained tokens are counted."""
    new_tokens = torch.tensor([2, 0, 6])
    given = {kind: sequence_weights(new_tokens, kind, 10).tolist() for kind in LOSSES}
    assert given["dapo"] == pytest.approx([1 / 8, 0, 1 / 8])
    assert given["grpo"] == pytest.approx([1 / 4, 0, 1 / 12])
    assert given["dr_grpo"] == pytest.approx([1 / 20, 0, 1 / 20])
    for kind in LOSSES:  # a batch of nothing divides by nothing
        assert sequence_weights(torch.zeros(2, dtype=torch.long), kind, 10).tolist() == [0.0, 0.0]


def test_each_loss_kind_has_its_hand_computed_value():
    """Pitfall 21: ratio 1, advantages 2 and -1, 1 and 3 trained tokens, max_new_tokens 5."""
    mask = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1]])
    logprobs, gain = torch.full((2, 4), -1.0), torch.tensor([2.0, -1.0])
    expected = {"dapo": -(2 - 3) / 4, "grpo": -(2 - 1) / 2, "dr_grpo": -(2 - 3) / 10}
    for kind, value in expected.items():
        weights = sequence_weights(mask.sum(1), kind, 5)
        loss, clipped = grpo_loss(logprobs, logprobs, mask, gain, weights)
        assert loss.item() == pytest.approx(value) and not clipped.any()


def test_the_ratio_is_clipped_only_on_the_side_that_would_gain_more():
    """Ratios 1.5 and 0.5 with advantage 2 and -2: two of the four lose their gradient."""
    ratio = torch.tensor([[1.5, 0.5, 1.1], [1.5, 0.5, 1.1]])
    logprobs = ratio.log().requires_grad_()
    mask, old = torch.ones(2, 3, dtype=torch.long), torch.zeros(2, 3)
    weights = torch.tensor([0.5, 0.25])
    loss, clipped = grpo_loss(logprobs, old, mask, torch.tensor([2.0, -2.0]), weights, 0.2, 0.28)
    better, worse = 1.28 + 0.5 + 1.1, 1.5 + 0.8 + 1.1
    assert loss.item() == pytest.approx(-(0.5 * 2 * better - 0.25 * 2 * worse))
    assert clipped.tolist() == [[True, False, False], [False, True, False]]
    (gradient,) = torch.autograd.grad(loss, logprobs)  # of the ratio is the ratio itself
    expected = [[0, -0.5, -1.1], [0.75, 0, 0.55]]
    assert gradient.tolist() == [pytest.approx(row) for row in expected]


@pytest.mark.parametrize("odd", [float("nan"), float("-inf"), float("inf"), -1e9])
def test_what_an_engine_says_of_tokens_it_did_not_sample_does_not_leak(odd):
    """Pitfall 15: no value and no gradient where the mask is 0."""
    mask = torch.tensor([[0, 1, 0, 1]])
    logprobs = torch.tensor([[-1.0, -2.0, -3.0, -4.0]], requires_grad=True)
    old = torch.tensor([[odd, -2.5, odd, -4.0]])
    gain, weights = torch.tensor([1.0]), torch.tensor([0.5])
    loss, clipped = grpo_loss(logprobs, old, mask, gain, weights)
    loss.backward()
    assert loss.item() == pytest.approx(-0.5 * (1.28 + 1)) and clipped.tolist()[0][2] is False
    assert logprobs.grad.tolist() == [[0.0, 0.0, 0.0, -0.5]]


@pytest.mark.parametrize("kind", LOSSES)
def test_the_gradient_does_not_depend_on_micro_batches_or_order(tied, kind):
    """Pitfalls 20, 21, 17: one at a time, two, all, permuted; in a first and in a second update."""
    trajectories = some_trajectories()
    batch = weighed(trajectories, kind)
    old = [[-2.5] * len(t.ids) for t in trajectories]
    longest = max(len(t.ids) for t in trajectories)
    for before in (None, old):
        whole, metrics, seen = gradient(tied, batch, Config(token_budget=10**6), before)
        assert whole.norm() > 0 and metrics["loss"] != 0
        assert before is None or metrics["clip_frac"] > 0  # the clip is at work here
        for budget in (1, 2 * longest):
            cfg = Config(token_budget=budget)
            parts = models.micro_batches([len(t.ids) for t in trajectories], budget)
            assert len(parts) > 1
            cut, cut_metrics, cut_seen = gradient(tied, batch, cfg, before)
            assert distance(cut, whole) <= 1e-6
            assert cut_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-7)
            assert all(a == pytest.approx(b, abs=1e-5) for a, b in zip(cut_seen, seen, strict=True))
        order = random.Random(3).sample(range(len(batch)), len(batch))
        permuted = before and [before[i] for i in order]
        cfg = Config(token_budget=2 * longest)
        again, _, seen_again = gradient(tied, [batch[i] for i in order], cfg, permuted)
        assert distance(again, whole) <= 1e-6
        assert seen_again[0] == pytest.approx(seen[order[0]], abs=1e-5)


def test_one_update_has_ratio_one_and_is_the_plain_policy_gradient(tied):
    """Pitfall 26: the engine's rounding (here: -9 everywhere) is not in the ratio."""
    batch = weighed(some_trajectories(), "dapo")
    got, metrics, _ = gradient(tied, batch, Config())
    assert metrics["clip_frac"] == 0 and metrics["sampler_logprob_diff"] > 1
    expected = -sum(w * a * t.new_tokens for t, a, w in batch)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-6)
    tied.zero_grad()
    for t, a, w in batch:
        ids, mask = torch.tensor([t.ids]), torch.tensor([t.mask])
        logprobs, _ = models.token_logprobs(tied, ids, torch.ones_like(ids), mask)
        (-w * a * logprobs.sum()).backward()
    plain = torch.cat([p.grad.flatten() for p in tied.parameters()])
    assert distance(got, plain) <= 1e-6


def test_a_trajectory_without_a_sampled_token_is_no_division_by_zero(tied):
    """Pitfall 27: alone it teaches nothing, among others it changes nothing."""
    empty = Trajectory({}, 0, stop="length", reward=0.0)
    empty.add([1, 2, 3], 0)
    others = some_trajectories()
    for kind in LOSSES:
        with_it = weighed([*others, empty], kind, [1.0] * 8)
        without = weighed(others, kind, [1.0] * 7)
        assert with_it[-1][2] == 0 and [w for *_, w in with_it[:-1]] == [w for *_, w in without]
    got, metrics, _ = gradient(tied, with_it, Config())
    assert distance(got, gradient(tied, without, Config())[0]) <= 1e-6
    assert all(math.isfinite(value) for value in metrics.values())
    frozen = copy.deepcopy(tied.state_dict())
    metrics = learn(tied, models.optimizers(tied, "adamw", 1.0), [empty, empty], 1.0, Config())
    assert metrics["trained_share"] == 0 and all(
        torch.equal(a, b) for a, b in zip(frozen.values(), tied.state_dict().values(), strict=True)
    )


def test_a_second_update_has_the_first_ones_logprobs_as_old(tied):
    """Pitfalls 21, 26: the ratio leaves 1, measured against the trainer's own logprobs."""
    policy, rate = copy.deepcopy(tied), 0.02
    trajectories = some_trajectories()
    batch, cfg = weighed(trajectories, "dapo"), Config(updates_per_batch=2, max_grad_norm=1e9)
    optimizers = models.optimizers(policy, "adamw", rate)
    first, seen = accumulate(policy, batch, cfg, None)
    models.step(policy, optimizers, rate, cfg.max_grad_norm)
    second, kept = accumulate(policy, batch, cfg, seen)
    models.step(policy, optimizers, rate, cfg.max_grad_norm)
    assert second["loss"] < first["loss"] - 0.01 and second["clip_frac"] > first["clip_frac"] == 0
    assert kept == seen  # old stays that of the first update, for a third one too

    learner = copy.deepcopy(tied)
    made = models.optimizers(learner, "adamw", rate)
    metrics = learn(learner, made, trajectories, rate, cfg)
    assert metrics["loss"] == second["loss"] and metrics["clip_frac"] == second["clip_frac"]
    for a, b in zip(learner.parameters(), policy.parameters(), strict=True):
        assert torch.equal(a, b)
    once = learn(copy.deepcopy(tied), optimizers, trajectories, rate, Config())
    assert once["clip_frac"] == 0


@pytest.mark.parametrize("overlong", ["keep", "mask"])
def test_overlong_mask_leaves_out_all_that_did_not_end_by_their_own_choice(
    tied, monkeypatch, overlong
):
    """Pitfall 24: length, turns, tool calls, wall time and errors alike."""
    stops = ["answered", "length", "max_turns", "max_tool_calls", "timeout", "error", "answered"]
    rng, batches = random.Random(2), []
    trajectories = [trajectory(rng, 0, float(i), stop) for i, stop in enumerate(stops)]
    monkeypatch.setattr(
        train_grpo, "accumulate", lambda model, batch, *_: (batches.append(batch) or {}, [])
    )
    cfg = Config(overlong=overlong, adv_norm="none")
    metrics = learn(copy.deepcopy(tied), [], trajectories, 0.1, cfg)
    ((*batch,),) = batches
    if overlong == "mask":
        assert [(t.stop, gain) for t, gain, _ in batch] == [("answered", -3), ("answered", 3)]
        tokens = trajectories[0].new_tokens + trajectories[-1].new_tokens
        assert metrics["trained_share"] == pytest.approx(2 / 7)
    else:  # the middle one has exactly the mean: no gradient, but its tokens count
        assert [gain for _, gain, _ in batch] == [-3, -2, -1, 1, 2, 3]
        tokens = sum(t.new_tokens for t in trajectories)
    assert all(weight == pytest.approx(1 / tokens) for *_, weight in batch)


def test_equal_groups_are_left_out_of_the_backward_pass_but_count_in_the_mean(tied, monkeypatch):
    """Pitfalls 21, 22: leaving them out changes nothing but the time."""
    rng = random.Random(4)
    trajectories = [trajectory(rng, i // 2, [1.0, 0.0, 1.0, 1.0][i]) for i in range(4)]
    full = gradient(tied, weighed(trajectories, "dapo"), Config())[0]
    seen = []
    real = train_grpo.accumulate
    monkeypatch.setattr(
        train_grpo, "accumulate", lambda *args: (seen.append(len(args[1])), real(*args))[1]
    )
    policy = copy.deepcopy(tied)
    policy.zero_grad()
    metrics = learn(policy, [], trajectories, 0.1, Config(max_grad_norm=1e9))
    part = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert seen == [2] and metrics["trained_share"] == 0.5 and distance(part, full) <= 1e-6


def test_a_batch_that_has_nothing_to_teach_takes_no_step(tied):
    """Pitfall 22: Adam's momentum would move the weights on a gradient of 0."""
    policy = copy.deepcopy(tied)
    optimizers = models.optimizers(policy, "adamw", 0.01, 0.1)
    learn(policy, optimizers, some_trajectories(), 0.01, Config())  # there is momentum now
    before = copy.deepcopy(policy.state_dict())
    rng = random.Random(6)
    equal = [trajectory(rng, i // 3, 0.1) for i in range(6)]
    missing = [trajectory(rng, 0, None) for _ in range(3)]
    for batch in (equal, missing, equal + missing):
        metrics = learn(policy, optimizers, batch, 0.01, Config())
        assert metrics == {"loss": 0.0, "grad_norm": 0.0, "trained_share": 0.0}
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
    assert {state["step"].item() for state in optimizers[0].state.values()} == {1.0}


def test_dropout_is_off_while_learning_and_the_engine_finds_the_model_in_eval_mode():
    """Pitfall 35: old and new logprobs, and the engine's, are of the same function."""
    policy = qwen(attention_dropout=0.5).eval()
    trajectories = some_trajectories()
    for t in trajectories:
        ids, mask = torch.tensor([t.ids]), torch.tensor([t.mask])
        with torch.no_grad():
            logprobs, _ = models.token_logprobs(policy, ids, torch.ones_like(ids), mask)
        t.logprobs = logprobs[0].tolist()
    metrics = learn(policy, [], trajectories, 0.1, Config())
    assert metrics["sampler_logprob_diff"] < 1e-6 and not policy.training


# Logprobs of tokens


def sequences(pad="right"):
    """(ids, attention_mask, mask) (B, T) of three sequences of 9, 6 and 2 tokens."""
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (3, 9), generator=rng)
    mask = torch.tensor(
        [[0, 0, 1, 1, 0, 0, 1, 1, 1], [0, 1, 0, 1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0]]
    )
    lengths = torch.tensor([9, 6, 2])
    attention_mask = (torch.arange(9) < lengths[:, None]).long()
    if pad == "left":
        shifts = (9 - lengths).tolist()
        tensors = ids, attention_mask, mask
        return tuple(
            torch.stack([row.roll(n) for row, n in zip(x, shifts, strict=True)]) for x in tensors
        )
    return ids, attention_mask, mask


def full_logprobs(model, ids, attention_mask, mask, temperature):
    """The same the straight way: all logits of all tokens."""
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=attention_mask, position_ids=positions).logits
    table = (logits[:, :-1].float() / temperature).log_softmax(-1)
    logprobs = table.gather(-1, ids[:, 1:, None])[..., 0]
    entropy = -(table.exp() * table).sum(-1)
    first = torch.zeros(len(ids), 1)
    return tuple(torch.cat([first, x], 1) * mask for x in (logprobs, entropy))


def backward(model, logprobs):
    """The gradient of a sum in which every token has its own weight, as one flat vector."""
    model.zero_grad()
    (logprobs * torch.linspace(-1, 2, logprobs.numel()).view_as(logprobs)).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", MODELS)
def test_chunked_logprobs_equal_the_full_log_softmax_in_values_and_gradients(name):
    """Pitfalls 18, 14, 19: every kind of head, with temperature, padding and chunks of 1 to all."""
    model = MODELS[name]().eval()
    for temperature, chunk in ((1.0, 3), (0.7, 1), (1.3, 1024)):
        batch = sequences()
        expected, expected_entropy = full_logprobs(model, *batch, temperature)
        expected_gradient = backward(model, expected)
        logprobs, entropy = models.token_logprobs(model, *batch, temperature, chunk)
        assert torch.allclose(logprobs, expected, atol=2e-6)
        assert torch.allclose(entropy, expected_entropy, atol=1e-5) and not entropy.requires_grad
        assert logprobs.dtype == torch.float32 and (logprobs[batch[2] == 0] == 0).all()
        got = backward(model, logprobs)
        assert got.shape == expected_gradient.shape and got.norm() > 0.1
        assert distance(got, expected_gradient) <= 2e-6


def test_softcap_bias_and_adapters_of_the_test_models_do_change_the_logprobs():
    """Pitfall 18: the test above would not see what has no effect."""
    batch = sequences()

    def logprobs(model):
        return models.token_logprobs(model.eval(), *batch)[0].detach()

    assert not torch.allclose(
        logprobs(gemma(final_logit_softcapping=2.0)), logprobs(gemma(final_logit_softcapping=30.0))
    )
    biased = phi()
    with_bias = logprobs(biased)
    biased.lm_head.bias.data.zero_()
    assert not torch.allclose(with_bias, logprobs(biased))
    adapted = MODELS["lora on the head"]()
    with_adapter = logprobs(adapted)
    with adapted.disable_adapter():
        assert not torch.allclose(with_adapter, logprobs(adapted))


@pytest.mark.parametrize("scale", ["logits_scaling", "logit_scale"])
def test_a_model_whose_logits_are_not_what_its_head_gives_is_refused(scale, tmp_path, tokenizer):
    """Pitfall 18: Granite divides its logits by a number, Cohere multiplies them."""
    from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM

    shape = {**_shape(), "vocab_size": len(tokenizer)}
    if scale == "logits_scaling":
        model = GraniteForCausalLM(GraniteConfig(**shape, logits_scaling=4.0))
    else:
        model = CohereForCausalLM(CohereConfig(**shape, logit_scale=0.25))
    models.save(model, tokenizer, tmp_path)
    for tune in ("full", "lora"):
        with pytest.raises(UserError, match="its logprobs differ by .* from those"):
            models.load(str(tmp_path), tune, device="cpu")
    models.load(str(tmp_path), "none", device="cpu")  # to be sampled from it is good enough


@pytest.mark.parametrize("name", MODELS)
def test_models_whose_head_is_proved_are_trained_in_bfloat16_too(name):
    """Pitfall 17."""
    for dtype in (torch.float32, torch.bfloat16):
        models.prove_head(MODELS[name]().eval().to(dtype), name)


@pytest.mark.parametrize("make", [MODELS["tied"], gpt2], ids=["rotary", "learnt positions"])
def test_padding_on_either_side_and_neighbours_change_nothing(make):
    """Pitfall 17: alone, right-padded and left-padded."""
    model = make().eval()
    ids, attention_mask, mask = sequences()
    right, _ = models.token_logprobs(model, ids, attention_mask, mask)
    left_batch = sequences("left")
    left, _ = models.token_logprobs(model, *left_batch)
    assert torch.allclose(right[mask == 1], left[left_batch[2] == 1], atol=2e-6)
    for row in range(3):
        n = attention_mask[row].sum()
        alone = ids[row : row + 1, :n], attention_mask[row : row + 1, :n], mask[row : row + 1, :n]
        single, _ = models.token_logprobs(model, *alone)
        assert torch.allclose(single[0], right[row, :n], atol=2e-6)


def test_no_more_than_a_chunk_of_logits_exists_and_none_are_kept_for_backward(tied):
    """Pitfalls 18, 19: (chunk, V) at a time, made again in backward; the entropy keeps nothing."""
    made, kept = [], []
    hook = tied.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: made.append(tuple(output.shape))
    )
    batch = sequences()

    def pack(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs, _ = models.token_logprobs(tied, *batch, chunk=4)
    wanted = int(batch[2].sum())  # the 10 tokens whose mask is 1, not all 27
    chunks = [(4, VOCABULARY)] * (wanted // 4) + [(wanted % 4, VOCABULARY)] * (wanted % 4 > 0)
    assert made == chunks and kept and not any(shape[-1:] == (VOCABULARY,) for shape in kept)
    logprobs.sum().backward()
    hook.remove()
    assert len(made) == 2 * len(chunks) and max(rows for rows, _ in made) == 4


def test_a_mask_of_nothing_gives_zeros_and_a_backward_pass(tied):
    """Pitfall 27."""
    ids = torch.ones(2, 3, dtype=torch.long)
    logprobs, entropy = models.token_logprobs(tied, ids, ids, torch.zeros_like(ids))
    assert logprobs.tolist() == entropy.tolist() == [[0.0] * 3] * 2
    (logprobs.sum() + sum(p.sum() for p in tied.parameters()) * 0).backward()


def test_the_last_prompt_token_predicts_the_first_sampled_one(tied):
    """Pitfall 3: no shift by one; changing what comes later changes nothing before it."""
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 0]])
    logprobs, _ = models.token_logprobs(tied, ids, torch.ones_like(ids), mask)
    table = tied(torch.tensor([[5, 6]])).logits[0, -1].log_softmax(-1)
    assert logprobs[0].tolist() == pytest.approx([0, 0, table[7].item(), 0], abs=2e-6)


def test_gradients_reach_both_matrices_of_an_adapter_and_nothing_else():
    """Pitfall 34: B = 0 at first, so A learns from the second step on."""
    from peft import LoraConfig, get_peft_model

    policy = get_peft_model(qwen(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    frozen = {n: p.clone() for n, p in policy.named_parameters() if not p.requires_grad}
    optimizers = models.optimizers(policy, "adamw", 0.1)
    size = {}
    for step in range(2):
        accumulate(policy, weighed(some_trajectories(), "dapo"), Config(), None)
        for part in ("lora_A", "lora_B"):
            named = [p.grad for n, p in policy.named_parameters() if part in n]
            size[part, step] = min(g.abs().max().item() for g in named)
        models.step(policy, optimizers, 0.1, 1.0)
    assert size["lora_A", 0] == 0 and all(v > 0 for k, v in size.items() if k != ("lora_A", 0))
    now = dict(policy.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in frozen.items())


# Batches, rates, optimizers


def test_micro_batches_hold_every_sequence_once_within_the_budget():
    """Pitfall 21: padding counted; one that is longer than the budget is alone."""
    rng = random.Random(7)
    for budget in (1, 16, 50, 200, 10**6):
        lengths = [rng.randint(0, 60) for _ in range(rng.randint(0, 40))]
        batches = models.micro_batches(lengths, budget)
        assert sorted(i for part in batches for i in part) == list(range(len(lengths)))
        for part in batches:
            longest = max(lengths[i] for i in part)
            assert len(part) * longest <= budget or len(part) == 1
        flat = [lengths[i] for part in batches for i in part]
        assert flat == sorted(lengths, reverse=True)
    assert models.micro_batches([5, 5, 3, 2], 10) == [[0, 1], [2, 3]]


def test_pad_fills_the_right_side_with_the_value():
    padded = models.pad([[1, 2], [], [3]], 7)
    assert padded.tolist() == [[1, 2], [7, 7], [3, 7]] and padded.dtype == torch.long
    assert models.pad([[0.5]], 0.0, torch.float32).dtype == torch.float32
    assert models.pad([[], []]).shape == (2, 0) and models.pad([]).shape == (0, 0)


def test_the_schedule_warms_up_to_the_peak_and_falls():
    rates = {
        kind: [models.schedule(step, 10, kind, 2) for step in range(10)]
        for kind in ("constant", "linear", "cosine")
    }
    assert all(values[:3] == [0.5, 1.0, 1.0] for values in rates.values())
    assert rates["constant"][2:] == [1.0] * 8
    assert rates["linear"][2:] == pytest.approx([1 - i / 8 for i in range(8)])
    assert rates["cosine"][6] == pytest.approx(0.5) and rates["cosine"][9] > 0
    for values in rates.values():
        assert values[2:] == sorted(values[2:], reverse=True) and min(values) > 0
    assert [models.schedule(step, 3, "linear", 9) for step in range(3)] == [
        pytest.approx((step + 1) / 9) for step in range(3)
    ]


def test_muon_takes_the_matrices_inside_the_layers_and_adamw_the_rest():
    policy = qwen(tie_word_embeddings=False)
    adamw, muon = models.optimizers(policy, "muon", 0.1, 0.2)
    names = {id(p): name for name, p in policy.named_parameters()}
    inner = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    rest = [[names[id(p)] for p in group["params"]] for group in adamw.param_groups]
    assert inner == {n for n in names.values() if ".layers." in n and "norm" not in n}
    assert sorted(rest[0]) == ["lm_head.weight", "model.embed_tokens.weight"]
    assert rest[1] and all("norm" in name for name in rest[1])
    assert len(inner) + sum(map(len, rest)) == len(names)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.2, 0.0]
    assert isinstance(muon, torch.optim.Muon)
    assert [(g["lr"], g["weight_decay"]) for g in muon.param_groups] == [(0.1, 0.2)]
    (only,) = models.optimizers(policy, "adamw", 0.1)
    assert sum(len(group["params"]) for group in only.param_groups) == len(names)


def test_only_what_is_trained_is_given_to_an_optimizer():
    policy = MODELS["lora"]()
    (adamw,) = models.optimizers(policy, "adamw", 0.1)
    taken = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert taken == {id(p) for p in policy.parameters() if p.requires_grad}
    trained, total = models.count(policy)
    assert trained == sum(p.numel() for n, p in policy.named_parameters() if "lora_" in n)
    assert total == sum(p.numel() for p in policy.parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_clips_the_gradient_uses_the_rate_it_is_given_and_clears_it(tied, kind):
    policy = copy.deepcopy(tied)
    optimizers = models.optimizers(policy, kind, 1.0)
    before = copy.deepcopy(policy.state_dict())
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    count = sum(p.numel() for p in policy.parameters())
    norm = models.step(policy, optimizers, 0.0, 0.5)
    assert norm == pytest.approx(math.sqrt(count), rel=1e-4)  # what is logged is not clipped
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
    assert all(p.grad is None for p in policy.parameters())
    moments = torch.cat([state["exp_avg"].flatten() for state in optimizers[0].state.values()])
    assert moments.unique().tolist() == [pytest.approx(0.1 * 0.5 / math.sqrt(count), rel=1e-3)]


def test_a_gradient_that_is_not_finite_ends_the_run_and_changes_no_weight():
    model = torch.nn.Linear(2, 1)
    before = model.weight.detach().clone()
    (model(torch.ones(1, 2)) * float("nan")).sum().backward()
    with pytest.raises(UserError, match="training has diverged; lower learning_rate"):
        models.step(model, models.optimizers(model, "adamw", 0.1), 0.1, 1.0)
    assert torch.equal(model.weight, before)


def test_out_of_memory_is_a_sentence_that_names_the_knobs():
    with pytest.raises(UserError, match="out of memory: lower token_budget, group_size"):
        with models.memory_advice("token_budget", "group_size"):
            raise torch.OutOfMemoryError("tried to allocate\n20 GiB")

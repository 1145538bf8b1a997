"""What is learnt from: advantages, weights, the loss, logprobs, micro-batches, optimizers.

    pytest tests/test_loss.py

Pinned here: groups by prompt, rewards that are equal or missing, leave-one-out, turns, losses by
hand, clips, KL and importance weights, one gradient however the batch is cut or permuted, and
token_logprobs against the full log-softmax in values and gradients. Models of a few thousand random
weights, in float32. The same losses are compared with TRL's in test_against_trl.py.
"""

import copy
import math
import random

import pytest
import torch

import train_grpo
from learning import model as models
from learning import optim
from learning.batches import Batch, micro_batches, pad
from learning.logprobs import hidden_states, shared_prefixes, shares_prompts, token_logprobs
from loss import (
    advantages,
    grpo_loss,
    importance,
    sampler_mismatch,
    sequence_weights,
    set_advantages,
    turn_advantages,
)
from run.config import UserError
from train_grpo import Config, LearnSettings, accumulate, learn, policy_logprobs
from trajectory import Trajectory

VOCABULARY = 61
LOSSES = ("dapo", "grpo", "dr_grpo", "gspo", "cispo")


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
        t.turn_starts.append(len(t.ids))
        t.add(ids, 1, [-9.0] * len(ids))
    return t


def some_trajectories(count=7):
    rng = random.Random(5)
    return [
        trajectory(rng, i % 2, rng.random(), turns=1 + i % 3, new=2 + 2 * i) for i in range(count)
    ]


def weighed(trajectories, loss, advantage=None, max_new_tokens=32):
    """(trajectories with their advantages, their weights) as `learn` makes them."""
    rewards, groups = [t.reward for t in trajectories], [t.group for t in trajectories]
    gain = advantage or advantages(rewards, groups, "group")[0].tolist()
    for t, value in zip(trajectories, gain, strict=True):
        t.advantages = [value] * len(t.turn_starts)
    new_tokens = torch.tensor([t.new_tokens for t in trajectories])
    return trajectories, sequence_weights(new_tokens, loss, max_new_tokens).tolist()


def how(**options):
    """The settings of `learn`, with these keys of the config."""
    return LearnSettings.of(Config(**options))


def score(model, trajectories):
    return policy_logprobs(model, trajectories, 1.0, 16384)


def carried(batch, old=None, ref=None):
    """The trajectories of a batch, each with what it carries into an update."""
    trajectories, weights = batch
    for i, t in enumerate(trajectories):
        t.weight = weights[i]
        t.old_logprobs = old[i] if old else None
        t.ref_logprobs = ref[i] if ref else None
    return trajectories


def gradient(model, batch, settings, old=None, ref=None):
    """One flat gradient of all trained parameters, and the metrics of accumulate."""
    model.zero_grad()
    metrics = accumulate(model, carried(batch, old, ref), settings)
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(parts).clone(), metrics


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


@pytest.mark.parametrize("adv_norm", ["group", "batch", "none"])
def test_rewards_that_differ_by_rounding_are_equal(adv_norm):
    """Pitfall 22: divided by a std of 1e-16, rounding would be an advantage of full size."""
    gain, _ = advantages(
        [0.3, 0.1 + 0.2, 1.4 - 0.4, 1.0, 1e9, 1e9 + 1e-6], [0, 0, 1, 1, 2, 2], adv_norm
    )
    assert gain.tolist() == [0.0] * 6
    gain, _ = advantages([1e-30, 2e-30], [0, 0], adv_norm)  # small, but not beside each other
    assert gain[0] < 0 < gain[1]


def test_the_std_of_a_batch_is_not_lost_where_rewards_are_far_from_zero():
    """In float32 both are the same number, with a std of 0."""
    gain, _ = advantages([1e4, 1e4 + 1e-4], [0, 0], "batch")
    assert gain.tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)], rel=1e-3)


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
    assert given["gspo"] == given["grpo"] and given["cispo"] == given["dapo"]
    assert given["dr_grpo"] == pytest.approx([1 / 20, 0, 1 / 20])
    for kind in LOSSES:  # a batch of nothing divides by nothing
        assert sequence_weights(torch.zeros(2, dtype=torch.long), kind, 10).tolist() == [0.0, 0.0]


def test_each_loss_kind_has_its_hand_computed_value():
    """Pitfall 21: ratio 1, advantages 2 and -1, 1 and 3 trained tokens, max_new_tokens 5."""
    mask = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1]])
    logprobs, gain = torch.full((2, 4), -1.0), torch.tensor([2.0, -1.0])
    expected = {"dapo": -(2 - 3) / 4, "grpo": -(2 - 1) / 2, "dr_grpo": -(2 - 3) / 10}
    expected |= {"gspo": -(2 - 1) / 2, "cispo": -(-2 + 3) / 4}  # cispo: times the logprob, -1
    for kind, value in expected.items():
        weights = sequence_weights(mask.sum(1), kind, 5)
        loss, parts = grpo_loss(logprobs, logprobs, mask, gain, weights, kind)
        assert loss.item() == pytest.approx(value) and not parts["clipped"].any()


def test_gspo_has_one_ratio_for_a_sequence_and_clips_it_whole():
    """arXiv:2507.18071, equation 7: the geometric mean of the trained tokens' ratios."""
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 1]])
    ratio = torch.tensor([[9.0, 1.2, 0.9, 1.3], [9.0, 1.1, 9.0, 0.7]])
    logprobs = ratio.log().requires_grad_()
    weights = sequence_weights(mask.sum(1), "gspo", 1)
    first, second = (1.2 * 0.9 * 1.3) ** (1 / 3), (1.1 * 0.7) ** (1 / 2)
    for clip, clipped in ((0.5, [False, False]), (0.1, [True, True])):
        args = logprobs, torch.zeros(2, 4), mask, torch.tensor([1.0, -2.0]), weights, "gspo"
        loss, parts = grpo_loss(*args, clip, clip)
        values = (first, second) if clip == 0.5 else (1.1, 0.9)
        assert loss.item() == pytest.approx(-(values[0] - 2 * values[1]) / 2)
        assert parts["clipped"].any(1).tolist() == clipped
        assert torch.equal(parts["clipped"], mask.bool() & parts["clipped"])
        (gradient,) = torch.autograd.grad(loss, logprobs)
        third, half = -first / 2 / 3, 2 * second / 2 / 2  # of the mean log ratio
        expected = [[0, third, third, third], [0, half, 0, half]] if clip == 0.5 else [[0] * 4] * 2
        assert gradient.tolist() == [pytest.approx(row) for row in expected]


def test_cispo_bounds_the_weight_of_a_token_but_never_takes_its_gradient():
    """arXiv:2506.13585, equation 4: a detached ratio, bounded above only."""
    ratio = torch.tensor([[0.1, 1.0, 3.0]])
    logprobs = ratio.log().requires_grad_()
    mask, weights = torch.ones(1, 3, dtype=torch.long), torch.tensor([1 / 3])
    args = logprobs, torch.zeros(1, 3), mask, torch.tensor([2.0]), weights, "cispo"
    loss, parts = grpo_loss(*args, 0.2, 0.5)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient.tolist() == [pytest.approx([-2 * 0.1 / 3, -2 * 1.0 / 3, -2 * 1.5 / 3])]
    assert parts["clipped"].tolist() == [[False, False, True]]


def test_the_kl_is_k3_never_negative_and_zero_where_policy_and_reference_agree():
    """Pitfall 25, and Schulman's k3: r - 1 - log r with r = reference over policy."""
    mask = torch.tensor([[0, 1, 1, 1]])
    logprobs = torch.tensor([[-1.0, -1.0, -2.0, -3.0]], requires_grad=True)
    ref = torch.tensor([[float("nan"), -1.0, -1.5, -5.0]])
    gain, weights = torch.zeros(1), torch.tensor([1 / 3])
    plain = logprobs, logprobs.detach(), mask, gain, weights, "dapo"
    loss, parts = grpo_loss(*plain, beta=0.5, ref_logprobs=ref)
    expected = [0.0, 0.0, math.exp(0.5) - 0.5 - 1, math.exp(-2) + 2 - 1]
    assert parts["kl"].tolist() == [pytest.approx(expected)] and (parts["kl"] >= 0).all()
    assert loss.item() == pytest.approx(0.5 * sum(expected) / 3)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    slope = [0.0, 0.0, 0.5 / 3 * (1 - math.exp(0.5)), 0.5 / 3 * (1 - math.exp(-2))]
    assert gradient.tolist() == [pytest.approx(slope)]
    assert "kl" not in grpo_loss(*plain)[1]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("gap", [30.0, 100.0, 1e4, -100.0, -1e4])
def test_the_kl_is_finite_however_far_the_policy_is_from_the_reference(loss, gap):
    """A20: exp of an unbounded difference made it, and the gradient, infinite."""
    mask = torch.tensor([[0, 1, 1]])
    logprobs = torch.tensor([[-1.0, -1.0, -2.0]], requires_grad=True)
    ref = torch.tensor([[float("nan"), -1.0 + gap, -2.0]])
    plain = logprobs, logprobs.detach(), mask, torch.zeros(1), torch.tensor([0.5]), loss
    total, parts = grpo_loss(*plain, beta=0.1, ref_logprobs=ref)
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(logprobs.grad).all()
    assert 0 < parts["kl"].max() < 5e8
    if gap < 0:  # what the policy alone likes: it is still drawn back
        assert logprobs.grad[0, 1].item() == pytest.approx(0.5 * 0.1, rel=1e-4)


@pytest.mark.parametrize("gap", [1e-6, -1e-6, 3e-5, -3e-4, 1e-3])
def test_the_kl_of_two_models_that_hardly_differ_keeps_its_digits(gap):
    """A20: exp(d) - 1 - d in float32 is rounding near 0, and fell below it."""
    logprobs = torch.zeros(1, 2)
    ref = torch.tensor([[0.0, gap]])
    plain = logprobs, logprobs, torch.tensor([[0, 1]]), torch.zeros(1), torch.ones(1)
    kl = grpo_loss(*plain, beta=0.1, ref_logprobs=ref)[1]["kl"][0, 1].item()
    assert kl == pytest.approx(ref[0, 1].item() ** 2 / 2, rel=1e-3)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_by_hand(level):
    """Pitfalls 15, 16: of trained tokens only, whatever the engine says of others."""
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]])
    ratio = torch.tensor([[1.0, 0.3, 1.5, 4.0], [1.0, 1.1, 0.9, 7.0], [3.0, 3.0, 3.0, 3.0]])
    sampled = torch.full((3, 4), -2.0)
    old = sampled + ratio.log()
    sampled[0, 0], sampled[1, 3] = float("nan"), float("-inf")
    prefix = "" if level == "token" else "sequence_"
    cut = importance(old, sampled, mask, prefix + "truncate", 2.0)
    dropped = importance(old, sampled, mask, prefix + "mask", 2.0)
    if level == "token":
        assert cut.tolist()[0] == pytest.approx([1, 0.3, 1.5, 2])
        assert dropped.tolist()[0] == pytest.approx([1, 0, 1.5, 0])
        assert cut.tolist()[1] == dropped.tolist()[1] == pytest.approx([1, 1.1, 0.9, 1])
    else:
        whole = 0.3 * 1.5 * 4
        for made in (cut, dropped):
            assert made.tolist()[0] == pytest.approx([1, whole, whole, whole])
            assert made.tolist()[1] == pytest.approx([1, 0.99, 0.99, 1])
        assert importance(old, sampled, mask, prefix + "mask", 1.5)[0].tolist() == [1, 0, 0, 0]
        assert importance(old, sampled, mask, prefix + "truncate", 1.5)[0, 1].item() == 1.5
    assert cut[2].tolist() == dropped[2].tolist() == [1.0] * 4  # nothing was sampled


def test_a_sequence_ratio_of_a_thousand_tokens_is_clamped_before_exp():
    """Pitfall 16."""
    mask = torch.ones(1, 1000, dtype=torch.long)
    for off in (-1.0, 1.0):
        old = torch.full((1, 1000), off)
        weight = importance(old, torch.zeros(1, 1000), mask, "sequence_truncate", 1e30)
        assert weight.isfinite().all() and weight[0, 0].log().item() == pytest.approx(20 * off)


def test_importance_weighs_the_policy_term_and_not_the_kl():
    mask, weights = torch.tensor([[1, 1]]), torch.tensor([0.5])
    logprobs, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    more = {"beta": 0.3, "ref_logprobs": ref, "importance": torch.tensor([[0.5, 0.0]])}
    loss, parts = grpo_loss(logprobs, logprobs, mask, torch.tensor([2.0]), weights, **more)
    assert loss.item() == pytest.approx(-0.5 * 2 * 0.5 + 0.5 * 0.3 * parts["kl"].sum().item())


def test_the_ratio_is_clipped_only_on_the_side_that_would_gain_more():
    """Ratios 1.5 and 0.5 with advantage 2 and -2: two of the four lose their gradient."""
    ratio = torch.tensor([[1.5, 0.5, 1.1], [1.5, 0.5, 1.1]])
    logprobs = ratio.log().requires_grad_()
    mask, old = torch.ones(2, 3, dtype=torch.long), torch.zeros(2, 3)
    weights = torch.tensor([0.5, 0.25])
    args = logprobs, old, mask, torch.tensor([2.0, -2.0]), weights, "dapo", 0.2, 0.28
    loss, parts = grpo_loss(*args)
    better, worse = 1.28 + 0.5 + 1.1, 1.5 + 0.8 + 1.1
    assert loss.item() == pytest.approx(-(0.5 * 2 * better - 0.25 * 2 * worse))
    assert parts["clipped"].tolist() == [[True, False, False], [False, True, False]]
    (gradient,) = torch.autograd.grad(loss, logprobs)  # of the ratio is the ratio itself
    expected = [[0, -0.5, -1.1], [0.75, 0, 0.55]]
    assert gradient.tolist() == [pytest.approx(row) for row in expected]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("odd", [float("nan"), float("-inf"), float("inf"), -1e9])
def test_what_an_engine_says_of_tokens_it_did_not_sample_does_not_leak(odd, kind):
    """Pitfalls 12, 15: no value and no gradient where the mask is 0."""
    mask = torch.tensor([[0, 1, 0, 1]])
    logprobs = torch.tensor([[-1.0, -2.0, -3.0, -4.0]], requires_grad=True)
    old, ref = torch.tensor([[odd, -2.5, odd, -4.0]]), torch.tensor([[odd, -2.0, odd, -4.5]])
    more = {"beta": 0.1, "ref_logprobs": ref}
    more["importance"] = importance(old, old, mask, "truncate")
    results = []
    for noise in (old, torch.tensor([[-7.0, -2.5, -8.0, -4.0]])):
        args = logprobs, noise, mask, torch.tensor([1.0]), torch.tensor([0.5]), kind
        loss, parts = grpo_loss(*args, **more)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert gradient[0, 0] == gradient[0, 2] == 0 and gradient[0, 3] != 0
        assert not parts["clipped"][0, [0, 2]].any() and parts["kl"][0, [0, 2]].tolist() == [0, 0]
        results.append((loss.item(), gradient.tolist()))
    assert math.isfinite(results[0][0]) and results[0] == results[1]


OFF_POLICY = {"beta": 0.1, "is_correction": "truncate", "clip_low": 0.1}
# 0.1 of the ratio's log is enough to leave the clip range: those that hold no token would hide much


@pytest.mark.parametrize("kind", LOSSES)
def test_the_gradient_does_not_depend_on_micro_batches_or_order(tied, kind):
    """Pitfalls 17, 20, 21: micro-batches of 1, 2, 5 and all, permuted, in a first and in a later
    update, with KL and importance weights: 1e-6."""
    trajectories = some_trajectories()
    batch = weighed(trajectories, kind)
    rng = random.Random(8)
    exact = score(tied, trajectories)  # an old policy and a reference that differ a bit
    for t, logprobs in zip(trajectories, exact, strict=True):
        t.logprobs = [p + rng.uniform(-0.9, 0.9) for p in logprobs.tolist()]
    torch.manual_seed(1)
    near = [logprobs + 0.3 * torch.randn(len(logprobs)) for logprobs in exact]
    ref = [logprobs + 0.3 * torch.randn(len(logprobs)) for logprobs in exact]
    longest = max(len(t.ids) for t in trajectories)
    for old in (None, near):
        options = OFF_POLICY | {"loss": kind}
        whole, metrics = gradient(tied, batch, how(token_budget=10**6, **options), old, ref)
        assert whole.norm() > 0 and metrics["loss"] != 0 and metrics["kl"] > 0
        assert old is None or metrics["clip_frac"] > 0  # the clip is at work here
        assert 0 < metrics["is_outside"] < 1
        for size in (1, 2, 5):
            cfg = how(token_budget=size * longest, **options)
            lengths = [len(t.ids) for t in trajectories]
            parts = micro_batches(lengths, cfg.token_budget)
            assert len(parts) > 1 and (size > 1 or max(map(len, parts)) < 3)
            cut, cut_metrics = gradient(tied, batch, cfg, old, ref)
            assert distance(cut, whole) <= 1e-6
            assert cut_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)
        for seed in range(3):
            order = random.Random(seed).sample(range(len(trajectories)), len(trajectories))
            rows, weights, before, reference = (
                each and [each[i] for i in order] for each in (*batch, old, ref)
            )
            cfg = how(token_budget=2 * longest, **options)
            again, _ = gradient(tied, (rows, weights), cfg, before, reference)
            assert distance(again, whole) <= 1e-6


@pytest.mark.parametrize("kind", LOSSES)
def test_no_token_but_the_trained_ones_has_a_gradient(tied, kind):
    """Pitfalls 3, 15: of the loss with respect to the logprob of each token."""
    rows, weights = weighed(some_trajectories(), kind)
    batch = Batch.of(rows)
    mask, gain = batch.mask, batch.advantages
    logprobs, _ = token_logprobs(tied, batch.ids, batch.attention_mask, mask)
    logprobs = logprobs.detach().requires_grad_()
    more = {"beta": 0.1, "ref_logprobs": torch.randn_like(logprobs)}
    args = logprobs, logprobs.detach() - 0.05, mask, gain, torch.tensor(weights), kind
    loss, _ = grpo_loss(*args, **more)
    loss.backward()
    assert (logprobs.grad[mask == 0] == 0).all() and (logprobs.grad[mask == 1] != 0).all()


def test_padding_gives_each_token_the_advantage_of_its_turn():
    """A turn's results share its advantage, where their mask is 0 anyway; the prompt has none."""
    one, two = Trajectory({}, advantages=[0.5, -2.0]), Trajectory({}, advantages=[3.0])
    for ids, mask in (([1, 2], 0), ([3, 4], 1), ([5], 0), ([6], 1)):
        if mask:
            one.turn_starts.append(len(one.ids))
        one.add(ids, mask, [-1.0] * len(ids) if mask else None)
    two.add([7], 0)
    two.turn_starts.append(1)
    two.add([8], 1, [-3.0])
    batch = Batch.of([one, two])
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 0, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0]]
    assert batch.mask.tolist() == [[0, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 0]]
    assert batch.sampled_logprobs.tolist() == [[0, 0, -1, -1, 0, -1], [0, -3, 0, 0, 0, 0]]
    assert batch.advantages.tolist() == [[0, 0, 0.5, 0.5, 0.5, -2], [0, 3, 0, 0, 0, 0]]


def test_one_update_has_ratio_one_and_is_the_plain_policy_gradient(tied):
    """Pitfall 26: the engine's rounding (here: -9 everywhere) is not in the ratio."""
    rows, weights = batch = weighed(some_trajectories(), "dapo")
    got, metrics = gradient(tied, batch, how())
    assert metrics["clip_frac"] == 0 and metrics["sampler_logprob_diff"] > 1
    terms = [(w * t.advantages[0], t) for t, w in zip(rows, weights, strict=True)]
    expected = -sum(factor * t.new_tokens for factor, t in terms)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-6)
    tied.zero_grad()
    for factor, t in terms:
        ids, mask = torch.tensor([t.ids]), torch.tensor([t.mask])
        logprobs, _ = token_logprobs(tied, ids, torch.ones_like(ids), mask)
        (-factor * logprobs.sum()).backward()
    plain = torch.cat([p.grad.flatten() for p in tied.parameters()])
    assert distance(got, plain) <= 1e-6
    for kind in LOSSES:  # and on policy the kinds differ by their weights alone
        rows, weights = weighed(some_trajectories(), kind)
        got, metrics = gradient(tied, (rows, weights), how(loss=kind))
        tied.zero_grad()
        logprobs, mask, gain = _everything(tied, rows)
        (-(torch.tensor(weights)[:, None] * gain * mask * logprobs).sum()).backward()
        plain = torch.cat([p.grad.flatten() for p in tied.parameters()])
        assert distance(got, plain) <= 1e-6 and metrics["clip_frac"] == 0


def _everything(model, rows):
    batch = Batch.of(rows)
    logprobs, _ = token_logprobs(model, batch.ids, batch.attention_mask, batch.mask)
    return logprobs, batch.mask, batch.advantages


def test_a_trajectory_without_a_sampled_token_is_no_division_by_zero(tied):
    """Pitfall 27: alone it teaches nothing, among others it changes nothing."""
    empty = Trajectory({}, 0, stop="length", reward=0.0)
    empty.add([1, 2, 3], 0)
    others = some_trajectories()
    for kind in LOSSES:
        (_, weights), (_, plain) = (
            weighed([*others, empty], kind, [1.0] * 8),
            weighed(others, kind, [1.0] * 7),
        )
        assert weights[-1] == 0 and weights[:-1] == plain
        got, metrics = gradient(tied, ([*others, empty], weights), how(loss=kind))
        assert distance(got, gradient(tied, (others, plain), how(loss=kind))[0]) <= 1e-6
        assert all(math.isfinite(value) for value in metrics.values())
    frozen = copy.deepcopy(tied.state_dict())
    metrics = learn(tied, optim.optimizers(tied, "adamw", 1.0), [empty, empty], 1.0, how())
    assert metrics["trained_share"] == 0 and all(
        torch.equal(a, b) for a, b in zip(frozen.values(), tied.state_dict().values(), strict=True)
    )


def test_a_second_update_has_the_first_ones_logprobs_as_old(tied):
    """Pitfalls 21, 26: the ratio leaves 1, measured against the trainer's own logprobs."""
    policy, rate = copy.deepcopy(tied), 0.02
    trajectories = some_trajectories()
    batch, cfg = weighed(trajectories, "dapo"), how(updates_per_batch=2, max_grad_norm=1e9)
    optimizers = optim.optimizers(policy, "adamw", rate)
    old = score(policy, trajectories)
    first = accumulate(policy, carried(batch, old), cfg)
    optim.step(policy, optimizers, rate, cfg.max_grad_norm)
    second = accumulate(policy, carried(batch, old), cfg)
    optim.step(policy, optimizers, rate, cfg.max_grad_norm)
    assert second["loss"] < first["loss"] - 0.01 and second["clip_frac"] > first["clip_frac"] == 0

    learner = copy.deepcopy(tied)
    made = optim.optimizers(learner, "adamw", rate)
    metrics = learn(learner, made, trajectories, rate, cfg)
    for key in ("loss", "clip_frac", "entropy"):  # the mean of the updates
        assert metrics[key] == pytest.approx((first[key] + second[key]) / 2)
    for a, b in zip(learner.parameters(), policy.parameters(), strict=True):
        assert torch.equal(a, b)
    once = learn(copy.deepcopy(tied), optimizers, trajectories, rate, how())
    assert once["clip_frac"] == 0


def test_minibatches_are_updates_on_parts_each_with_its_own_denominator(tied, monkeypatch):
    """Pitfalls 21, 54: every trajectory once a pass, in an order of seed, step and pass."""
    rng, seen = random.Random(3), []
    trajectories = [trajectory(rng, i // 5, float(i * i)) for i in range(10)]

    def record(model, rows, settings):
        assert all(t.old_logprobs is not None for t in rows)
        shares = [t.weight * t.new_tokens for t in rows]
        assert sum(shares) == pytest.approx(1.0)
        seen.append([t.reward for t in rows])
        return {"loss": 0.0}

    monkeypatch.setattr(train_grpo, "accumulate", record)
    cfg = how(updates_per_batch=2, minibatches=3)
    learn(copy.deepcopy(tied), [], trajectories, 0.1, cfg, step=4)
    assert len(seen) == 6 and [len(part) for part in seen[:3]] == [4, 3, 3]
    for first in (0, 3):
        assert sorted(sum(seen[first : first + 3], [])) == [float(i * i) for i in range(10)]
    assert seen[:3] != seen[3:]
    again, seen = seen, []
    learn(copy.deepcopy(tied), [], trajectories, 0.1, cfg, step=4)
    assert seen == again
    seen = []
    learn(copy.deepcopy(tied), [], trajectories, 0.1, cfg, step=5)
    assert seen != again


@pytest.mark.parametrize("overlong", ["keep", "mask", "penalise"])
def test_overlong_is_all_that_did_not_end_by_its_own_choice(tied, monkeypatch, overlong):
    """Pitfall 24: length, turns, tool calls, wall time and errors alike. Rewards stay."""
    stops = ["answered", "length", "max_turns", "max_tool_calls", "timeout", "error", "answered"]
    rng, batches = random.Random(2), []
    trajectories = [trajectory(rng, 0, float(i), stop) for i, stop in enumerate(stops)]
    monkeypatch.setattr(
        train_grpo,
        "accumulate",
        lambda model, rows, settings: batches.append((rows, [t.weight for t in rows])) or {},
    )
    cfg = how(overlong=overlong, adv_norm="none")
    metrics = learn(copy.deepcopy(tied), [], trajectories, 0.1, cfg)
    ((rows, weights),) = batches
    gains = [(t.stop, t.advantages[0]) for t in rows]
    if overlong == "mask":
        assert gains == [("answered", -3), ("answered", 3)]
        tokens = trajectories[0].new_tokens + trajectories[-1].new_tokens
        assert metrics["trained_share"] == pytest.approx(2 / 7)
    else:
        tokens = sum(t.new_tokens for t in trajectories)
        rewards = [0, 1, 2, 3, 4, 5, 6] if overlong == "keep" else [0, 0, 1, 2, 3, 4, 6]
        mean = sum(rewards) / 7
        kept = [r - mean for r in rewards if r != mean]  # exactly the mean: nothing to learn
        assert [gain for _, gain in gains] == pytest.approx(kept)
    assert all(weight == pytest.approx(1 / tokens) for weight in weights)
    assert [t.reward for t in trajectories] == [float(i) for i in range(7)]


def test_rloo_compares_with_the_mean_of_the_others():
    rewards = [1.0, 0.0, 0.0, 4.0, None, 2.0, 2.0]
    gain, valid = advantages(rewards, [0, 0, 0, 0, 0, 1, 1], "none", rloo=True)
    by_hand = [1 - 4 / 3, -5 / 3, -5 / 3, 4 - 1 / 3, 0, 0, 0]
    assert (
        gain.tolist() == pytest.approx(by_hand)
        and valid.tolist() == [True] * 4 + [False] + [True] * 2
    )


def test_turn_advantages_compare_what_was_earned_from_a_turn_on():
    """Turn k with the k-th turns of its group, by hand; what nobody else reached gets 0."""
    turns = [[1.0, 0.0], [0.0, 1.0, 5.0], [0.0], [2.0, 2.0]]
    gains = turn_advantages(turns, [0, 0, 0, 1], "none")
    # to go: [1, 0], [6, 6, 5], [0]: means 7 / 3 and 3
    expected = [[1 - 7 / 3, -3], [6 - 7 / 3, 3, 0], [-7 / 3], [0, 0]]
    assert gains == [pytest.approx(each) for each in expected]
    assert turn_advantages([], [], "group") == []


def test_turn_credit_adds_the_outcomes_advantage_to_that_of_each_turn():
    """Rewards of turns are not counted twice: what is left of the reward is the outcome."""
    rng = random.Random(1)
    trajectories = [trajectory(rng, 0, None, turns=2) for _ in range(3)]
    for t, outcome, earned in zip(
        trajectories, (1.0, 0.0, 0.5), ([1.0, 0.0], [0.0, 0.0], [0.0, 0.5]), strict=True
    ):
        t.reward, t.turn_rewards = outcome + sum(earned), earned
    trajectories.append(trajectory(rng, 0, None, turns=1))  # no reward: no list either
    valid = set_advantages(trajectories, "none", turn_credit=True)
    assert valid.tolist() == [True, True, True, False]
    # outcome: mean 0.5; first turns earn 1, 0, 0.5 from there on, second ones 0, 0, 0.5
    expected = [[0.5 + 0.5, 0.5 - 1 / 6], [-0.5 - 0.5, -0.5 - 1 / 6], [0.0, 0.5 - 1 / 6], [0.0]]
    assert [t.advantages for t in trajectories] == [pytest.approx(each) for each in expected]
    plain = [copy.copy(t) for t in trajectories]
    set_advantages(plain, "none")
    assert plain[0].advantages == [1.0, 1.0]  # rewards 2, 0 and 1


def test_what_rounding_leaves_of_a_reward_by_turn_is_no_outcome():
    """Pitfall 22: all are right, but 1.0 + 0.2 + 0.2 - 0.4 is not 1.0, nor 0.1 + 0.2 - 0.3 zero."""
    rng, trajectories = random.Random(1), []
    for earned in ([0.2, 0.2, 0.0], [0.2, 0.0, 0.2], [0.2, 0.2, 0.0], [0.2, 0.0, 0.0]):
        trajectories.append(trajectory(rng, 0, 1.0 + sum(earned), turns=3))
        trajectories[-1].turn_rewards = earned
    assert len({t.reward - sum(t.turn_rewards) for t in trajectories}) > 1
    set_advantages(trajectories, turn_credit=True)
    only_turns = turn_advantages([t.turn_rewards for t in trajectories], [0] * 4)
    assert [t.advantages for t in trajectories] == [pytest.approx(each) for each in only_turns]
    assert turn_advantages([[0.1, 0.2, -0.3], [0.0, 0.2, -0.2]], [0, 0])[0][0] == 0


def test_turn_credit_goes_on_where_a_reward_by_turn_is_missing():
    """Pitfall 23: what has no list earned nothing in its turns, and its number is the outcome. If
    no trajectory has a reward at all, a judge may be away; else no reward ever gives a list."""
    rng = random.Random(1)
    trajectories = [trajectory(rng, 0, reward, turns=2) for reward in (1.0, 1.0, 0.0, None)]
    trajectories[0].turn_rewards = [0.0, 1.0]
    trajectories[3].turn_rewards = [0.0, 9.0]  # of another reward than the one that is missing
    valid = set_advantages(trajectories, "none", turn_credit=True)
    assert valid.tolist() == [True, True, True, False]
    # outcomes 0, 1, 0 and turns 1, 0, 0: both have the mean 1 / 3
    expected = [[1 / 3] * 2, [1 / 3] * 2, [-2 / 3] * 2, [0.0] * 2]
    assert [t.advantages for t in trajectories] == [pytest.approx(each) for each in expected]
    for t in trajectories:
        t.reward = t.turn_rewards = None
    assert not set_advantages(trajectories, "none", turn_credit=True).any()
    assert all(t.advantages == [0.0, 0.0] for t in trajectories)
    trajectories[0].reward = 1.0
    with pytest.raises(UserError, match="^turn_credit has no effect: none of the rewards gives"):
        set_advantages(trajectories, "none", turn_credit=True)


def test_equal_groups_are_left_out_of_the_backward_pass_but_count_in_the_mean(tied, monkeypatch):
    """Pitfalls 21, 22: leaving them out changes nothing but the time. A KL is of every token."""
    rng = random.Random(4)
    trajectories = [trajectory(rng, i // 2, [1.0, 0.0, 1.0, 1.0][i]) for i in range(4)]
    full = gradient(tied, weighed(trajectories, "dapo"), how())[0]
    seen = []
    real = train_grpo.accumulate
    monkeypatch.setattr(
        train_grpo, "accumulate", lambda *args: (seen.append(len(args[1])), real(*args))[1]
    )
    policy = copy.deepcopy(tied)
    policy.zero_grad()
    metrics = learn(policy, [], trajectories, 0.1, how(max_grad_norm=1e9))
    part = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert seen == [2] and metrics["trained_share"] == 0.5 and distance(part, full) <= 1e-6
    with_kl = learn(policy, [], trajectories, 0.1, how(beta=0.1), reference=policy)
    assert seen == [2, 4] and with_kl["trained_share"] == 1 and with_kl["kl"] == 0


def test_the_share_outside_of_the_cap_is_logged_by_number_of_turns(tied):
    """Pitfall 16: long trajectories drift more."""
    trajectories = some_trajectories()
    exact = score(tied, trajectories)
    for t, logprobs in zip(trajectories, exact, strict=True):
        off = 1.0 if len(t.turn_starts) == 3 else 0.0  # the engine was wrong where turns are many
        t.logprobs = (logprobs - off).tolist()
    for correction in ("mask", "truncate"):
        cfg = how(is_correction=correction)
        _, metrics = gradient(tied, weighed(trajectories, "dapo"), cfg)
        of_three = [t.new_tokens for t in trajectories if len(t.turn_starts) == 3]
        share = sum(of_three) / sum(t.new_tokens for t in trajectories)
        assert metrics["is_outside"] == pytest.approx(share) and share > 0
        assert metrics["is_outside_turns_3"] == pytest.approx(share)
        assert metrics["is_outside_turns_1"] == metrics["is_outside_turns_2"] == 0


def test_a_batch_that_has_nothing_to_teach_takes_no_step(tied):
    """Pitfall 22: Adam's momentum would move the weights on a gradient of 0."""
    policy = copy.deepcopy(tied)
    optimizers = optim.optimizers(policy, "adamw", 0.01, 0.1)
    learn(policy, optimizers, some_trajectories(), 0.01, how())  # there is momentum now
    before = copy.deepcopy(policy.state_dict())
    rng = random.Random(6)
    equal = [trajectory(rng, i // 3, 0.1) for i in range(6)]
    missing = [trajectory(rng, 0, None) for _ in range(3)]
    for batch in (equal, missing, equal + missing):
        metrics = learn(policy, optimizers, batch, 0.01, how())
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
            logprobs, _ = token_logprobs(policy, ids, torch.ones_like(ids), mask)
        t.logprobs = logprobs[0].tolist()
    metrics = learn(policy, [], trajectories, 0.1, how())
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
        for row, shift in enumerate((9 - lengths).tolist()):
            for tensor in (ids, attention_mask, mask):
                tensor[row] = tensor[row].roll(shift)
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
        logprobs, entropy = token_logprobs(model, *batch, temperature, chunk)
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
        return token_logprobs(model.eval(), *batch)[0].detach()

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
def test_a_model_whose_logits_are_not_what_its_head_gives_is_refused(
    scale, tmp_path, tokenizer, monkeypatch
):
    """Pitfall 18: Granite divides its logits by a number, Cohere multiplies them. Both are known
    (tests/test_architectures.py): this is what becomes of the next one."""
    from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM

    shape = {**_shape(), "vocab_size": len(tokenizer)}
    if scale == "logits_scaling":
        model = GraniteForCausalLM(GraniteConfig(**shape, logits_scaling=4.0))
    else:
        model = CohereForCausalLM(CohereConfig(**shape, logit_scale=0.25))
    models.save(model, tokenizer, tmp_path)
    models.load(str(tmp_path), "full", device="cpu")
    monkeypatch.setattr("learning.logprobs.logits_factor", lambda model: 1.0)
    for tune in ("full", "lora"):
        with pytest.raises(UserError, match="its logprobs differ by .* from those"):
            models.load(str(tmp_path), tune, device="cpu")
    models.load(str(tmp_path), "none", device="cpu")  # to be sampled from it is good enough


@pytest.mark.parametrize("name", MODELS)
def test_models_whose_head_is_proved_are_trained_in_bfloat16_too(name):
    """Pitfall 17."""
    for dtype in (torch.float32, torch.bfloat16):
        models.check_head(MODELS[name]().eval().to(dtype), name)


@pytest.mark.parametrize("make", [MODELS["tied"], gpt2], ids=["rotary", "learnt positions"])
def test_padding_on_either_side_and_neighbours_change_nothing(make):
    """Pitfall 17: alone, right-padded and left-padded."""
    model = make().eval()
    ids, attention_mask, mask = sequences()
    right, _ = token_logprobs(model, ids, attention_mask, mask)
    left_batch = sequences("left")
    left, _ = token_logprobs(model, *left_batch)
    assert torch.allclose(right[mask == 1], left[left_batch[2] == 1], atol=2e-6)
    for row in range(3):
        n = attention_mask[row].sum()
        alone = ids[row : row + 1, :n], attention_mask[row : row + 1, :n], mask[row : row + 1, :n]
        single, _ = token_logprobs(model, *alone)
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
        logprobs, _ = token_logprobs(tied, *batch, chunk=4)
    assert batch[2].sum() == 10  # tokens whose mask is 1, not all 27
    chunks = [(4, VOCABULARY), (4, VOCABULARY), (2, VOCABULARY)]
    assert made == chunks and kept and not any(shape[-1:] == (VOCABULARY,) for shape in kept)
    logprobs.sum().backward()
    hook.remove()
    assert len(made) == 2 * len(chunks) and max(rows for rows, _ in made) == 4


def test_a_mask_of_nothing_gives_zeros_and_a_backward_pass(tied):
    """Pitfall 27."""
    ids = torch.ones(2, 3, dtype=torch.long)
    logprobs, entropy = token_logprobs(tied, ids, ids, torch.zeros_like(ids))
    assert logprobs.tolist() == entropy.tolist() == [[0.0] * 3] * 2
    (logprobs.sum() + sum(p.sum() for p in tied.parameters()) * 0).backward()


def test_the_last_prompt_token_predicts_the_first_sampled_one(tied):
    """Pitfall 3: no shift by one; changing what comes later changes nothing before it."""
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 0]])
    logprobs, _ = token_logprobs(tied, ids, torch.ones_like(ids), mask)
    table = tied(torch.tensor([[5, 6]])).logits[0, -1].log_softmax(-1)
    assert logprobs[0].tolist() == pytest.approx([0, 0, table[7].item(), 0], abs=2e-6)


def test_gradients_reach_both_matrices_of_an_adapter_and_nothing_else():
    """Pitfall 34: B = 0 at first, so A learns from the second step on."""
    from peft import LoraConfig, get_peft_model

    policy = get_peft_model(qwen(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    frozen = {n: p.clone() for n, p in policy.named_parameters() if not p.requires_grad}
    optimizers = optim.optimizers(policy, "adamw", 0.1)
    size = {}
    for step in range(2):
        accumulate(policy, carried(weighed(some_trajectories(), "dapo")), how())
        for part in ("lora_A", "lora_B"):
            named = [p.grad for n, p in policy.named_parameters() if part in n]
            size[part, step] = min(g.abs().max().item() for g in named)
        optim.step(policy, optimizers, 0.1, 1.0)
    assert size["lora_A", 0] == 0 and all(v > 0 for k, v in size.items() if k != ("lora_A", 0))
    now = dict(policy.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in frozen.items())


# Prompts that are shared


def groups_with_prompts(groups=3, size=5):
    """Trajectories of groups, each with a prompt of its own that is longer than what follows."""
    rng = random.Random(7)
    trajectories = []
    for group in range(groups):
        prompt = [rng.randrange(VOCABULARY) for _ in range(14 + group)]
        for k in range(size):
            t = trajectory(rng, group, rng.random(), turns=1 + k % 3, prompt=0, new=3)
            whole = Trajectory({}, group, stop="answered", reward=t.reward)
            whole.add(prompt, 0)
            whole.ids += t.ids
            whole.mask += t.mask
            whole.logprobs += t.logprobs
            whole.turn_starts = [len(prompt) + start for start in t.turn_starts]
            trajectories.append(whole)
    return trajectories


@pytest.fixture
def seen_tokens():
    """Lists the number of tokens of every forward pass through a model's layers."""

    def watch(model):
        sizes = []

        def note(module, args, kwargs):
            sizes.append(kwargs["input_ids"].numel())

        model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
        return sizes

    return watch


@pytest.mark.parametrize("name", ["tied", "untied", "head with bias", "lora", "lora on the head"])
def test_the_prompt_of_a_group_goes_through_the_layers_once_with_the_same_gradient(
    name, seen_tokens, monkeypatch
):
    """Pitfalls 17, 21, 34: shared in one micro-batch or in several, or not at all. Twice the
    tolerance of other cuts: a prompt's gradient is rounded once for all rows, not once in each."""
    model = MODELS[name]().eval()
    batch, sizes = weighed(groups_with_prompts(), "dapo"), seen_tokens(model)
    shared, metrics = gradient(model, batch, how(token_budget=10**6))
    assert len(sizes) == 2  # the three prompts, then all rows go on from them
    prompts, continuations = sizes
    assert prompts == 3 * 15
    # the last token of a prompt goes with what follows it
    assert continuations <= 15 * max(len(t.ids) - t.turn_starts[0] + 1 for t in batch[0])
    in_parts, _ = gradient(model, batch, how(token_budget=60))
    alone, _ = gradient(model, batch, how(token_budget=1))
    monkeypatch.setattr("learning.logprobs.shares_prompts", lambda model: False)
    sizes.clear()
    plain, plain_metrics = gradient(model, batch, how(token_budget=10**6))
    assert sizes == [15 * max(len(t.ids) for t in batch[0])]
    assert sizes[0] > prompts + continuations
    for other in (shared, in_parts, alone):
        assert distance(other, plain) <= 2e-6
    assert metrics == pytest.approx(plain_metrics, rel=1e-5, abs=1e-6)


def test_sharing_prompts_is_exact(monkeypatch):
    """In float64, with a model whose norms are computed in it too (Qwen3's are in float32)."""
    model = phi().eval().double()
    batch = weighed(groups_with_prompts(), "dapo")
    shared, _ = gradient(model, batch, how(token_budget=10**6))
    monkeypatch.setattr("learning.logprobs.shares_prompts", lambda model: False)
    plain, _ = gradient(model, batch, how(token_budget=10**6))
    assert distance(shared, plain) <= 1e-12


def test_the_gradient_of_a_shared_prompt_is_added_up_in_one_order():
    """By index_select. The gradient of keys[rows] is added up by atomics: two threads add in the
    order in which they come, and a run that goes on would not be the one that was stopped."""
    model = qwen().eval()
    rows = groups_with_prompts()
    ids = pad([t.ids for t in rows])
    attention_mask = pad([[1] * len(t.ids) for t in rows])
    mask = pad([t.mask for t in rows])
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    hidden, left_out = hidden_states(model, ids, attention_mask, mask, positions)
    assert left_out.all()  # prompts are shared
    operations = set()
    nodes = {hidden.grad_fn}
    while nodes:
        operations |= nodes
        inputs = {before for node in nodes for before, _ in node.next_functions}
        nodes = inputs - operations - {None}
    names = {node.name() for node in operations}
    assert "IndexSelectBackward0" in names
    assert "IndexBackward0" not in names


def test_prompts_are_not_shared_where_that_would_be_another_function_or_nothing_is_gained(
    seen_tokens,
):
    """Recomputed layers, layers with a window, rows padded on the left, prompts that differ."""
    rows = groups_with_prompts()
    mixed = gemma(sliding_window=4).eval()
    assert not shares_prompts(mixed)
    recomputed = qwen().eval()
    models.recompute_layers(recomputed)
    assert not shares_prompts(recomputed) and shares_prompts(qwen())
    for model, some in ((mixed, rows), (recomputed, rows), (qwen().eval(), some_trajectories())):
        sizes = seen_tokens(model)
        gradient(model, weighed(some, "dapo"), how(token_budget=10**6))
        assert len(sizes) == 1
    model = qwen().eval()
    # reversed, padded on the right, and reversed again
    ids = pad([t.ids[::-1] for t in rows]).flip(1)
    attention_mask = pad([[1] * len(t.ids) for t in rows]).flip(1)
    mask = pad([t.mask[::-1] for t in rows]).flip(1)
    sizes = seen_tokens(model)
    logprobs, _ = token_logprobs(model, ids, attention_mask, mask)
    assert sizes == [ids.numel()]
    for row, expected, t in zip(logprobs, score(model, rows), rows, strict=True):
        assert torch.allclose(row[-len(t.ids) :], expected, atol=1e-5)


def test_a_budget_counts_equal_prompts_once():
    rng = random.Random(2)
    prompts = [tuple([i % 3] * (10 + i % 3)) for i in range(30)]
    lengths = [len(prompt) + rng.randint(1, 9) for prompt in prompts]
    parts = micro_batches(lengths, 60, prompts)
    assert sorted(sum(parts, [])) == list(range(30))
    for part in parts:
        continuation = max(lengths[i] - len(prompts[i]) for i in part)
        different = {prompts[i] for i in part}
        assert continuation * len(part) + len(different) * max(map(len, different)) <= 60
    assert len(parts) < len(micro_batches(lengths, 60))


def unlike_groups(seed, groups=24, size=8, prompt=(20, 400), new=(3, 12)):
    """(ids, mask) of rows in random order, of groups whose prompts differ in length. prompt, new:
    the least and the most tokens of each."""
    rng = random.Random(seed)
    rows = []
    for _ in range(groups):
        begin = [rng.randrange(VOCABULARY) for _ in range(rng.randint(*prompt))]
        for _ in range(size):
            count = rng.randint(*new)
            ids = begin + [rng.randrange(VOCABULARY) for _ in range(count)]
            rows.append((ids, [0] * len(begin) + [1] * count))
    rng.shuffle(rows)
    return rows


@pytest.mark.parametrize("shares", [True, False])
def test_the_tokens_that_go_through_the_layers_stay_within_the_budget(seen_tokens, shares):
    """Counted where they go in, padding too: prompts of one micro-batch are padded to the longest,
    as rows are where nothing is shared. Only a row that is longer than the budget passes it."""
    model = qwen().eval()
    sizes = seen_tokens(model)
    budget = 1638
    for rows in (
        unlike_groups(1),
        unlike_groups(2, groups=6, prompt=(3, 9), new=(5, 60)),
        unlike_groups(3, groups=40, size=1),
        unlike_groups(4, groups=3, size=2, prompt=(budget, 2 * budget)),
    ):
        lengths = [len(ids) for ids, _ in rows]
        prefixes = None
        if shares:
            prefixes = shared_prefixes([ids for ids, _ in rows], [mask for _, mask in rows])
        parts = micro_batches(lengths, budget, prefixes)
        assert sorted(sum(parts, [])) == list(range(len(rows)))
        spent = 0  # tokens through the layers
        for part in parts:
            ids = pad([rows[i][0] for i in part])
            attention_mask = pad([[1] * lengths[i] for i in part])
            mask = pad([rows[i][1] for i in part])
            sizes.clear()
            with torch.no_grad():
                token_logprobs(model, ids, attention_mask, mask)
            assert sum(sizes) <= budget or len(part) == 1
            spent += sum(sizes)
        assert spent < 1.5 * sum(lengths)
        if shares and len(set(prefixes)) < len(rows) / 4 and max(map(len, prefixes)) > 50:
            assert spent < 0.4 * sum(lengths)


def test_rows_of_a_prompt_stay_together_only_where_that_is_fewer_tokens():
    """One long answer in each group: padded to those, short prompts that are shared gain nothing.
    And where no prompt repeats, rows are sorted by their whole length."""
    prompts = [(group,) * 20 for group in range(16) for _ in range(8)]
    lengths = [20 + (400 if i % 8 == 0 else 30) for i in range(128)]
    parts = micro_batches(lengths, 4000, prompts)
    continuations = [[lengths[i] - 20 for i in part] for part in parts]
    padding = sum(len(part) * max(part) - sum(part) for part in continuations)
    assert padding < 0.2 * sum(map(sum, continuations))
    rng = random.Random(3)
    prompts = [(i,) * rng.randint(1, 300) for i in range(50)]
    lengths = [len(prompt) + rng.randint(1, 300) for prompt in prompts]
    parts = micro_batches(lengths, 2000, prompts)
    assert [sorted(part) for part in parts] == [sorted(p) for p in micro_batches(lengths, 2000)]


def test_a_batch_that_fits_is_one_micro_batch_whatever_the_order():
    prompts = [(group,) * 60 for group in range(24) for _ in range(8)]
    lengths = [60 + 20 + i % 40 for i in range(192)]
    (part,) = micro_batches(lengths, 24 * 60 + 192 * 59, prompts)
    order = random.Random(1).sample(range(192), 192)
    (again,) = micro_batches([lengths[i] for i in order], 16384, [prompts[i] for i in order])
    assert [lengths[order[i]] for i in again] == [lengths[i] for i in part]


def test_micro_batches_hold_every_sequence_once_within_the_budget():
    """Pitfall 21: padding counted; one that is longer than the budget is alone."""
    rng = random.Random(7)
    for budget in (1, 16, 50, 200, 10**6):
        lengths = [rng.randint(0, 60) for _ in range(rng.randint(0, 40))]
        batches = micro_batches(lengths, budget)
        assert sorted(i for part in batches for i in part) == list(range(len(lengths)))
        for part in batches:
            longest = max(lengths[i] for i in part)
            assert len(part) * longest <= budget or len(part) == 1
        flat = [lengths[i] for part in batches for i in part]
        assert flat == sorted(lengths, reverse=True)
    assert micro_batches([5, 5, 3, 2], 10) == [[0, 1], [2, 3]]


def test_pad_fills_the_right_side_with_the_value():
    padded = pad([[1, 2], [], [3]], 7)
    assert padded.tolist() == [[1, 2], [7, 7], [3, 7]] and padded.dtype == torch.long
    assert pad([[0.5]], 0.0, torch.float32).dtype == torch.float32
    assert pad([[], []]).shape == (2, 0) and pad([]).shape == (0, 0)


def test_the_schedule_warms_up_to_the_peak_and_falls():
    shares = {}  # of the peak
    for kind in ("constant", "linear", "cosine"):
        shares[kind] = [optim.schedule(step, 10, kind, 2) for step in range(10)]
    assert all(values[:3] == [0.5, 1.0, 1.0] for values in shares.values())
    assert shares["constant"][2:] == [1.0] * 8
    assert shares["linear"][2:] == pytest.approx([1 - i / 8 for i in range(8)])
    assert shares["cosine"][6] == pytest.approx(0.5) and shares["cosine"][9] > 0
    for values in shares.values():
        assert values[2:] == sorted(values[2:], reverse=True) and min(values) > 0
    assert [optim.schedule(step, 3, "linear", 9) for step in range(3)] == [
        pytest.approx((step + 1) / 9) for step in range(3)
    ]


def test_muon_takes_the_matrices_inside_the_layers_and_adamw_the_rest():
    policy = qwen(tie_word_embeddings=False)
    adamw, muon = optim.optimizers(policy, "muon", 0.1, 0.2)
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
    (only,) = optim.optimizers(policy, "adamw", 0.1)
    assert sum(len(group["params"]) for group in only.param_groups) == len(names)


def test_only_what_is_trained_is_given_to_an_optimizer():
    policy = MODELS["lora"]()
    (adamw,) = optim.optimizers(policy, "adamw", 0.1)
    taken = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert taken == {id(p) for p in policy.parameters() if p.requires_grad}
    trained, total = optim.count(policy)
    assert trained == sum(p.numel() for n, p in policy.named_parameters() if "lora_" in n)
    assert total == sum(p.numel() for p in policy.parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_clips_the_gradient_uses_the_rate_it_is_given_and_clears_it(tied, kind):
    policy = copy.deepcopy(tied)
    optimizers = optim.optimizers(policy, kind, 1.0)
    before = copy.deepcopy(policy.state_dict())
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    count = sum(p.numel() for p in policy.parameters())
    norm = optim.step(policy, optimizers, 0.0, 0.5)
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
        optim.step(model, optim.optimizers(model, "adamw", 0.1), 0.1, 1.0)
    assert torch.equal(model.weight, before)


def test_out_of_memory_is_a_sentence_that_names_the_knobs():
    with pytest.raises(UserError, match="out of memory: lower token_budget, group_size"):
        with optim.memory_advice("token_budget", "group_size"):
            raise torch.OutOfMemoryError("tried to allocate\n20 GiB")


def test_mismatch_is_by_hand_and_nothing_for_nothing():
    """Mean, 95th percentile and largest of |trainer - engine|; the KL is k3, never negative."""
    gaps = torch.tensor([0.0] * 18 + [0.5, -1.0])
    out = sampler_mismatch(gaps)
    assert out["sampler_logprob_diff"] == pytest.approx(1.5 / 20)
    assert out["sampler_logprob_diff_p95"] == 0.5 and out["sampler_logprob_diff_max"] == 1.0
    expected = (math.exp(0.5) - 1.5 + math.exp(-1)) / 20
    assert out["mismatch_kl"] == pytest.approx(expected)
    assert sampler_mismatch(torch.zeros(0)) == {}
    assert sampler_mismatch(torch.tensor([1000.0]))["mismatch_kl"] > 0  # and not infinite
    assert math.isfinite(sampler_mismatch(torch.tensor([1000.0]))["mismatch_kl"])


def test_a_tiny_mismatch_is_not_below_zero():
    """In single precision exp(gap) - 1 - gap of such gaps is noise: -2.3e-10 has been seen."""
    gaps = torch.linspace(-1e-4, 1e-4, 101)
    assert (gaps.exp() - 1 - gaps).min() < 0
    expected = (gaps.double() ** 2).mean().item() / 2  # k3 of a small gap is its square, halved
    assert sampler_mismatch(gaps)["mismatch_kl"] == pytest.approx(expected, rel=1e-4)
    for gap in gaps:
        assert sampler_mismatch(gap[None])["mismatch_kl"] >= 0

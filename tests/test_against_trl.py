"""The loss against that of TRL's GRPOTrainer, on the same tensors.

    pytest tests/test_against_trl.py

TRL's side is its own code: `_generate_and_score_completions`, with what was sampled put in its
place, makes advantages, masks, denominator and importance weights; `_compute_loss`, on a model
whose logprobs are one leaf tensor, makes the loss and its gradient. Where ours differs on purpose a
test says how, and checks that nothing else does:

- cispo: TRL's epsilon_high is the bound itself, ours is 1 + clip_high, as in the paper
- KL: TRL multiplies it by the ratio unless use_bias_correction_kl=False; ours is the plain k3
- is_correction=mask drops what is below 1 / cap too; TRL only if told where (clip_min)
- a sequence without a reward, or without a trained token, counts in none of our denominators
- advantages: TRL adds 1e-4 to the std it divides by
"""

import copy
import functools
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from loss import advantages, grpo_loss, importance, sequence_weights

pytest.importorskip("trl")

from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import split_tensor_dict

B = 8  # sequences
T = 24  # tokens of the longest
GROUP_SIZE = 4  # sequences of a prompt
CAP = 1.5  # of importance weights
BETA = 0.1  # of the KL
MAX_NEW_TOKENS = 40  # dr_grpo's constant
CLIP = {"epsilon": 0.2, "epsilon_high": 0.28}
TRLS = {  # what TRL calls our losses
    "grpo": {"loss_type": "grpo", **CLIP},
    "dapo": {"loss_type": "dapo", **CLIP},
    "dr_grpo": {"loss_type": "dr_grpo", **CLIP},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", **CLIP},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.28},
}


@dataclass
class Batch:
    """Completions of two prompts, as tensors (B, T); rewards: B values."""

    lengths: list[int]  # of the completions; what follows is padding
    tool_mask: torch.Tensor  # 0 = written by a tool
    mask: torch.Tensor  # 1 = trained: not padding, not a tool's
    logprobs: torch.Tensor  # of the policy
    old: torch.Tensor  # before the first update
    sampled: torch.Tensor  # of the engine
    ref: torch.Tensor  # of the reference model
    rewards: list


def batch(seed):
    """Ratios far from 1 in both directions, of single tokens and of whole sequences. In float64:
    formulas are compared here, not rounding."""
    torch.manual_seed(seed)
    random = functools.partial(torch.randn, B, T, dtype=torch.float64)
    lengths = [T, *torch.randint(6, T, (B - 1,)).tolist()]
    there = torch.arange(T) < torch.tensor(lengths)[:, None]
    tool_mask = torch.ones(B, T)
    for row, length in enumerate(lengths):
        start = int(torch.randint(1, length - 3, ()))
        tool_mask[row, start : start + int(torch.randint(1, 4, ()))] = row % 4 == 0  # or no call
    logprobs = -1.5 * random().abs()
    old = logprobs + 0.4 * random() + torch.linspace(-0.5, 0.5, B)[torch.randperm(B), None]
    sampled = old + 0.3 * random() + torch.linspace(-0.2, 0.2, B)[torch.randperm(B), None]
    return Batch(
        lengths,
        tool_mask,
        there * tool_mask,
        logprobs,
        old,
        sampled,
        ref=logprobs + 0.5 * random(),
        rewards=torch.rand(B).tolist(),
    )


@pytest.fixture(scope="module")
def trainer_for(tokenizer, tmp_path_factory):
    """Makes a GRPOTrainer with these settings, around a model that is never called."""
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    model = Qwen3ForCausalLM(Qwen3Config(**shape, **heads))
    tokenizer, folder = copy.deepcopy(tokenizer), tmp_path_factory.mktemp("trl")
    prompts = Dataset.from_list([{"prompt": "hello"}] * B)

    def make(beta=0.0, vllm=False, accumulate=1, **settings):
        settings = {"per_device_train_batch_size": B // accumulate} | settings
        args = GRPOConfig(
            str(folder),
            gradient_accumulation_steps=accumulate,
            num_generations=GROUP_SIZE,
            max_completion_length=MAX_NEW_TOKENS,
            use_cpu=True,
            bf16=False,
            report_to="none",
            **settings,
        )
        made = GRPOTrainer(model, lambda rewards, **_: rewards, args, prompts, None, tokenizer)
        # not by the arguments: those would load a model from the hub, and vLLM
        made.beta, made.ref_model, made.use_vllm = beta, "reference", vllm
        made.args.use_bias_correction_kl = settings.get("use_bias_correction_kl", False)
        made.current_gradient_accumulation_steps = accumulate  # as train() sets it
        return made

    return make


def scored(trainer, b):
    """What TRL makes of the batch before its loss: a dictionary of tensors."""
    ids = [[5] * length for length in b.lengths]
    mask = [b.tool_mask[i, :length].tolist() for i, length in enumerate(b.lengths)]
    logps = [b.sampled[i, :length].tolist() for i, length in enumerate(b.lengths)]
    trainer._generate = lambda prompts: ([[3, 4]] * B, ids, mask, [""] * B, logps, {}, None, [])
    logps_of = {id(trainer.model): b.old, id(trainer.ref_model): b.ref}
    trainer._get_per_token_logps_and_entropies = lambda model, *_, **__: (
        logps_of[id(model)],
        None,
        None,
    )
    inputs = trainer._generate_and_score_completions(
        [{"prompt": "hello", "rewards": reward} for reward in b.rewards]
    )
    del trainer._get_per_token_logps_and_entropies  # the class's own again
    return inputs | {"old_per_token_logps": b.old}


def trl_loss(trainer, inputs, logprobs):
    """TRL's loss, and its gradient with respect to logprobs."""
    leaf = logprobs.clone().requires_grad_()
    output = SimpleNamespace(log_probs=leaf, entropy=torch.zeros_like(leaf))
    loss = trainer._compute_loss(lambda **_: output, inputs)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.item(), gradient


def our_loss(b, advantage, kind, beta=0.0, weights=None, **options):
    """Our loss, its gradient with respect to logprobs, and the parts that are logged."""
    leaf = b.logprobs.clone().requires_grad_()
    if weights is None:
        weights = sequence_weights(b.mask.sum(1), kind, MAX_NEW_TOKENS)
    if beta:
        options |= {"beta": beta, "ref_logprobs": b.ref}
    loss, parts = grpo_loss(leaf, b.old, b.mask, advantage, weights, kind, **options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.item(), gradient, parts


def prefix(level):
    return "sequence_" if level == "sequence" else ""


def assert_same(ours, trls):
    (our_loss, our_gradient, *_), (loss, gradient) = ours, trls
    # abs: weights and advantages are float32, and a loss may be a thousandth of its terms
    assert our_loss == pytest.approx(loss, rel=1e-5, abs=1e-7)
    assert gradient.abs().max() > 1e-3
    assert (our_gradient - gradient).abs().max() < 1e-5 * gradient.abs().max()


@pytest.mark.parametrize("level", [None, "token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("kind", TRLS)
def test_loss_and_gradient_are_trls(trainer_for, kind, beta, level):
    """With and without KL and importance weights, on ragged rows with holes. Pitfalls 15 and 21."""
    mode = {"vllm_importance_sampling_mode": f"{level}_truncate"} if level else {}
    cap = {"vllm_importance_sampling_clip_max": CAP}
    trainer = trainer_for(beta, vllm=level is not None, **TRLS[kind], **mode, **cap)
    for seed in range(3):
        b = batch(seed)
        inputs = scored(trainer, b)
        advantage = inputs["advantages"]
        assert min(advantage) < 0 < max(advantage)
        weight = None
        if level:
            weight = importance(b.old, b.sampled, b.mask, f"{prefix(level)}truncate", CAP)
            assert weight.min() < 0.9 and weight.max() > 1.1
        ours = our_loss(b, advantage, kind, beta, importance=weight)
        assert_same(ours, trl_loss(trainer, inputs, b.logprobs))
        assert not ours[1][b.mask == 0].any()


@pytest.mark.parametrize("kind", TRLS)
def test_the_clip_takes_the_gradient_where_trls_does(trainer_for, kind):
    """Both bounds, and both signs of the advantage: in the batches above the clip is at work."""
    trainer = trainer_for(**TRLS[kind])
    clipped_better = 0  # tokens with a positive advantage whose ratio was clipped
    clipped_worse = 0  # with a negative one
    for seed in range(3):
        b = batch(seed)
        inputs = scored(trainer, b)
        advantage = inputs["advantages"]
        trl_loss(trainer, inputs, b.logprobs)
        _, gradient, parts = our_loss(b, advantage, kind)
        clipped = parts["clipped"]
        better = advantage[:, None] > 0
        logged = {key: values[-1] for key, values in trainer._metrics["train"].items()}
        clipped_better += (clipped & better).sum()
        clipped_worse += (clipped & ~better).sum()
        if kind == "cispo":  # nothing loses its gradient, and TRL counts only the gains
            share = (clipped & better).sum() / b.mask.sum()
            expected = logged["cispo_clip_ratio"]
            assert (gradient[clipped] != 0).all()
        else:
            share = clipped.sum() / b.mask.sum()
            expected = logged["clip_ratio/region_mean"]
            assert not gradient[clipped].any()
        if kind == "gspo":  # a sequence is clipped or not
            share = clipped.any(1).float().mean()
        assert share.item() == pytest.approx(expected)
    assert clipped_better > 0 and clipped_worse > 0


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_importance_weights_are_trls(trainer_for, correction, level):
    """Pitfall 16: of mask-1 tokens only. "mask" has TRL's lower bound at 1 / cap."""
    bounds = {"vllm_importance_sampling_clip_max": CAP}
    if correction == "mask":
        bounds["vllm_importance_sampling_clip_min"] = 1 / CAP
    mode = f"{level}_{correction}"
    trainer = trainer_for(vllm=True, vllm_importance_sampling_mode=mode, **bounds)
    for seed in range(3):
        b = batch(seed)
        theirs = scored(trainer, b)["importance_sampling_ratio"].expand(B, T)[b.mask.bool()]
        ours = importance(b.old, b.sampled, b.mask, prefix(level) + correction, CAP)
        assert (ours[b.mask == 0] == 1).all()
        ours = ours[b.mask.bool()]
        assert torch.allclose(ours, theirs, rtol=1e-5)
        assert (ours == (CAP if correction == "truncate" else 0)).any()  # the bound is met


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_trl_keeps_what_is_far_below_one_and_we_do_not(trainer_for, level):
    """Without vllm_importance_sampling_clip_min, its default."""
    settings = {"vllm_importance_sampling_clip_max": CAP}
    trainer = trainer_for(vllm=True, vllm_importance_sampling_mode=f"{level}_mask", **settings)
    b = batch(0)
    theirs = scored(trainer, b)["importance_sampling_ratio"].expand(B, T)
    low = (theirs > 0) & (theirs < 1 / CAP) & b.mask.bool()
    assert low.any()
    ours = importance(b.old, b.sampled, b.mask, f"{prefix(level)}mask", CAP)
    assert (ours[low] == 0).all()
    assert torch.allclose(ours[~low & b.mask.bool()], theirs[~low & b.mask.bool()], rtol=1e-5)


def test_of_cispo_trl_takes_the_bound_and_we_one_more(trainer_for):
    """The paper's bound is 1 + epsilon_high (arXiv:2506.13585, equation 5)."""
    trainer = trainer_for(loss_type="cispo", epsilon_high=5.0)
    b = batch(0)
    b.logprobs = b.logprobs + 1.5 * (b.logprobs > b.old)  # some ratios above 5
    inputs = scored(trainer, b)
    theirs = trl_loss(trainer, inputs, b.logprobs)
    advantage = inputs["advantages"]
    assert_same(our_loss(b, advantage, "cispo", clip_high=4.0), theirs)
    loss, *_ = our_loss(b, advantage, "cispo", clip_high=5.0)
    assert loss != pytest.approx(theirs[0], rel=1e-3)


def test_trl_multiplies_the_kl_by_the_ratio_by_default(trainer_for):
    """use_bias_correction_kl: even where the ratio is 1, beta * k3 is added to the gradient."""
    trainer = trainer_for(BETA, use_bias_correction_kl=True, **TRLS["dapo"])
    b = batch(0)
    b.old = b.logprobs
    inputs = scored(trainer, b)
    loss, gradient = trl_loss(trainer, inputs, b.logprobs)
    ours, our_gradient, parts = our_loss(b, inputs["advantages"], "dapo", BETA)
    assert ours == pytest.approx(loss, rel=1e-5)
    more = BETA * parts["kl"] * b.mask / b.mask.sum()
    assert more.abs().max() > 1e-4
    assert (our_gradient + more - gradient).abs().max() < 1e-5 * gradient.abs().max()


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
def test_advantages_are_trls_but_for_what_it_adds_to_the_std(trainer_for, norm):
    """Pitfalls 22 and 23: a group of equal rewards and a missing reward get 0 on both sides."""
    trainer = trainer_for(scale_rewards=norm)
    for rewards in ([0, 1, 0.25, 1, 1, 0, 0, 0], [1, None, 0, 0, 0.5, 0.5, 0.5, 0.5]):
        b = batch(0)
        b.rewards = rewards
        theirs = scored(trainer, b)["advantages"]
        ours, valid = advantages(rewards, [0] * GROUP_SIZE + [1] * GROUP_SIZE, norm)
        assert valid.tolist() == [reward is not None for reward in rewards]
        plain, _ = advantages(rewards, [0] * GROUP_SIZE + [1] * GROUP_SIZE, "none")
        used = ours != 0
        std = plain[used] / ours[used]
        more = 0 if norm == "none" else 1e-4
        assert torch.allclose(theirs[used], plain[used] / (std + more), rtol=1e-5)
        assert not theirs[~used].any()


@pytest.mark.parametrize("kind", TRLS)
def test_a_sequence_without_a_reward_leaves_our_denominators_only(trainer_for, kind):
    """Pitfalls 21 and 23: TRL counts its tokens, in a mean that they are not part of."""
    trainer = trainer_for(**TRLS[kind])
    b = batch(1)
    b.rewards[2] = None
    inputs = scored(trainer, b)
    loss, gradient = trl_loss(trainer, inputs, b.logprobs)
    _, valid = advantages(b.rewards, [0] * GROUP_SIZE + [1] * GROUP_SIZE)
    counted = b.mask.sum(1) * valid
    by_token = kind in ("dapo", "cispo")
    more = (b.mask.sum() / counted.sum()).item() if by_token else B / (B - 1)
    weights = sequence_weights(counted, kind, MAX_NEW_TOKENS)
    ours = our_loss(b, inputs["advantages"], kind, weights=weights)
    assert_same(ours, (loss * more, gradient * more))


@pytest.mark.parametrize("kind", ["grpo", "gspo", "dr_grpo"])
def test_a_sequence_without_a_trained_token_leaves_our_denominators_only(trainer_for, kind):
    """Pitfall 27, too: TRL counts it as a sequence whose mean is 0."""
    trainer = trainer_for(**TRLS[kind])
    b = batch(2)
    b.tool_mask[3], b.mask[3] = 0, 0
    inputs = scored(trainer, b)
    loss, gradient = trl_loss(trainer, inputs, b.logprobs)
    more = B / (B - 1)
    assert_same(our_loss(b, inputs["advantages"], kind), (loss * more, gradient * more))


@pytest.mark.parametrize("kind", TRLS)
def test_four_micro_batches_are_trls_four_accumulation_steps(trainer_for, kind):
    """Pitfall 21: on both sides they sum up to the whole. TRL's mean of its micro-batches' means
    is exact because all of its micro-batches have the same number of rows; ours need not."""
    b = batch(3)
    whole, parts = trainer_for(BETA, **TRLS[kind]), trainer_for(BETA, accumulate=4, **TRLS[kind])
    inputs = scored(whole, b)
    expected = trl_loss(whole, inputs, b.logprobs)
    inputs = scored(parts, b)
    chunks = zip(split_tensor_dict(inputs, 4), b.logprobs.chunk(4), strict=True)
    theirs = [trl_loss(parts, chunk, logprobs) for chunk, logprobs in chunks]
    theirs = sum(loss for loss, _ in theirs), torch.cat([gradient for _, gradient in theirs])
    assert_same(theirs, expected)

    weights = sequence_weights(b.mask.sum(1), kind, MAX_NEW_TOKENS)
    advantage = inputs["advantages"]
    loss = 0.0
    gradient = torch.zeros_like(b.logprobs)
    for rows in ([0], [1, 2, 3, 4, 5], [6, 7]):
        part = Batch(
            lengths=[],
            tool_mask=b.tool_mask[rows],
            mask=b.mask[rows],
            logprobs=b.logprobs[rows],
            old=b.old[rows],
            sampled=b.sampled[rows],
            ref=b.ref[rows],
            rewards=[],
        )
        part_loss, part_gradient, _ = our_loss(part, advantage[rows], kind, BETA, weights[rows])
        loss += part_loss
        gradient[rows] = part_gradient
    assert_same((loss, gradient), expected)


def test_an_advantage_of_each_token_is_trls(trainer_for):
    """With turn_credit the turns of a sequence differ."""
    trainer = trainer_for(BETA, **TRLS["dapo"])
    b = batch(4)
    advantage = torch.randn(B, T)
    inputs = scored(trainer, b) | {"advantages": advantage}
    assert_same(our_loss(b, advantage, "dapo", BETA), trl_loss(trainer, inputs, b.logprobs))

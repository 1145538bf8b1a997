"""The loss of GRPO and its relatives: pure functions on tensors, used by train_grpo.py.

    values, valid = advantages(rewards, groups, "group")            # (B,), (B,)
    weights = sequence_weights(new_tokens, "dapo", max_new_tokens)  # (B,)
    loss, parts = grpo_loss(logprobs, old_logprobs, mask, values, weights, "dapo")

With m = 1 exactly on the tokens that the policy sampled, in all turns, stop tokens included:

    loss = - sum_i w_i sum_t m_it (c_it S_it - beta K_it)
    S_it = min(r_it A_it, clip(r_it, 1 - clip_low, 1 + clip_high) A_it),   r_it = pi / pi_old

A is the advantage, w what a token of sequence i counts in the batch, c the correction of what the
engine sampled with other probabilities than the trainer's (1 without one), K the KL to the
reference model. The kinds of loss, by paper:

    grpo     w_i = 1 / (sequences x tokens of i)          DeepSeekMath, arXiv:2402.03300
    dapo     w_i = 1 / tokens of the batch                arXiv:2503.14476
    dr_grpo  w_i = 1 / (sequences x a constant)           arXiv:2503.20783
    gspo     as grpo, r of a whole sequence: the geometric mean of its tokens'  arXiv:2507.18071
    cispo    as dapo, S_it = stop_gradient(min(r_it, 1 + clip_high)) A_it log pi   arXiv:2506.13585

w is made once for all sequences of an update, before they are cut into micro-batches, and its
denominators count exactly the tokens that are summed. So the cut, and the order, change nothing.

Shapes: B sequences, T tokens.
"""

import math

import torch

from run.config import UserError

IS_CAP = 2.0  # of importance weights: the ratio of two equal policies is 1
EXPONENT_CAP = 20.0  # of what is exponentiated: exp of a thousand tokens' sum is infinite


def advantages(
    rewards: list[float | None], groups: list[int], adv_norm: str = "group", rloo: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compares each reward with its group: returns (B,) advantages, and (B,) bool: whether the
    trajectory has a reward at all.

    groups: the prompt that each belongs to. adv_norm: what the distance to the group's mean is
    divided by: the std of the "group", of the "batch", or nothing ("none"). rloo: the mean is that
    of the others (Ahmadian et al. 2024, arXiv:2402.14740).

    None and NaN are left out of every mean and get 0. A group whose rewards are all equal gets
    exactly 0: equality is tested on the rewards, up to rounding (1e-9 of the largest), since a std
    of 1e-16 would make full-size advantages of 0.1 + 0.2 and 0.3.
    """
    valid = [reward is not None and not math.isnan(reward) for reward in rewards]
    result = torch.zeros(len(rewards))
    for group in set(groups):
        members = [i for i, g in enumerate(groups) if g == group and valid[i]]
        if not members:
            continue
        group_rewards = torch.tensor([rewards[i] for i in members], dtype=torch.float64)
        spread = group_rewards.max() - group_rewards.min()
        if spread <= 1e-9 * group_rewards.abs().max():
            continue
        distances = group_rewards - group_rewards.mean()
        if rloo:  # r - (sum - r) / (n - 1) is n / (n - 1) times r - mean
            distances = distances * len(members) / (len(members) - 1)
        if adv_norm == "group":
            distances = distances / group_rewards.std()
        result[members] = distances.float()
    if adv_norm == "batch" and result.any():
        known = [reward for reward, is_valid in zip(rewards, valid, strict=True) if is_valid]
        result = result / torch.tensor(known, dtype=torch.float64).std()  # in float32 it can be 0
    return result, torch.tensor(valid, dtype=torch.bool)


def turn_advantages(
    turn_rewards: list[list[float]], groups: list[int], adv_norm: str = "group", rloo: bool = False
) -> list[list[float]]:
    """Computes an advantage for each turn: what a trajectory earned in turn k and after it,
    compared with the k-th turns of its group (after MT-GRPO, arXiv:2505.11821). A turn that no
    other trajectory reached, or that all earned the same in, gets 0. The outcome's advantage is to
    be added."""
    rewards_to_go = []  # of each trajectory, a number for each turn
    for earned in turn_rewards:
        to_go = []
        for k in range(len(earned)):
            # rounded, as 0.1 + 0.2 - 0.3 is not 0
            to_go.append(round(math.fsum(earned[k:]), 9))
        rewards_to_go.append(to_go)

    result = [[0.0] * len(earned) for earned in turn_rewards]
    most_turns = max(map(len, turn_rewards), default=0)
    for k in range(most_turns):
        members = [i for i, to_go in enumerate(rewards_to_go) if k < len(to_go)]
        values = [rewards_to_go[i][k] for i in members]
        member_groups = [groups[i] for i in members]
        of_turn, _ = advantages(values, member_groups, adv_norm, rloo)
        for i, value in zip(members, of_turn.tolist(), strict=True):
            result[i][k] = value
    return result


def sequence_weights(new_tokens: torch.Tensor, loss: str, max_new_tokens: int) -> torch.Tensor:
    """Returns (B,) w_i. new_tokens: (B,) trained tokens, 0 for a sequence that is left out: it then
    counts in no denominator. max_new_tokens: the constant of dr_grpo."""
    counted = (new_tokens > 0).float()  # (B,)
    sequences = counted.sum().clamp(min=1)
    tokens = new_tokens.sum().clamp(min=1)
    if loss in ("grpo", "gspo"):  # mean over the tokens of a sequence, then over sequences
        return counted / (sequences * new_tokens.clamp(min=1))
    if loss in ("dapo", "cispo"):  # mean over all tokens
        return counted / tokens
    return counted / (sequences * max_new_tokens)  # dr_grpo: a constant, so length is not rewarded


def importance(
    old_logprobs: torch.Tensor,  # (B, T) of the trainer, before the first update
    sampled_logprobs: torch.Tensor,  # (B, T) of the engine that sampled
    mask: torch.Tensor,  # (B, T)
    correction: str,
    cap: float = IS_CAP,
) -> torch.Tensor:
    """Returns (B, T) c_it, without gradient; 1 where the mask is 0.

    The trainer's probability over the engine's, of each token, or with "sequence_truncate" and
    "sequence_mask" of all that was sampled. "truncate" bounds it by cap (TIS), "mask" drops what is
    outside [1 / cap, cap]. Both are explained in fengyao.notion.site/off-policy-rl, "mask" also as
    IcePop in arXiv:2510.18855.
    """
    wanted = mask.bool()
    log_ratio = torch.where(wanted, old_logprobs - sampled_logprobs, 0.0).detach()
    if correction.startswith("sequence_"):
        # of mask-1 tokens only
        log_ratio = log_ratio.sum(1, keepdim=True).clamp(-EXPONENT_CAP, EXPONENT_CAP)
        log_ratio = log_ratio.expand_as(old_logprobs)
    ratio = log_ratio.exp()
    if correction.endswith("truncate"):
        weight = ratio.clamp(max=cap)
    else:
        is_outside = (ratio < 1 / cap) | (ratio > cap)
        weight = torch.where(is_outside, 0.0, ratio)
    return torch.where(wanted, weight, 1.0)


def correction_sums(
    correction: torch.Tensor, mask: torch.Tensor, turns: list[int], cap: float = IS_CAP
) -> dict[str, float]:
    """Sums what is logged of the (B, T) weights of `importance`: the weights themselves, and how
    many tokens were outside of the bounds, in all and by the number of turns: long trajectories
    drift more. turns: (B,)."""
    wanted = mask.bool()
    is_outside = wanted & ((correction == 0) | (correction == cap))
    weights = torch.where(wanted, correction, 0.0)
    sums = {"is_weight": weights.sum().item(), "is_outside": 0.0}
    for count, row in zip(turns, is_outside, strict=True):
        name = f"is_outside_turns_{count}"
        sums["is_outside"] += row.sum().item()
        sums[name] = sums.get(name, 0.0) + row.sum().item()
    return sums


def sampler_mismatch(gaps: torch.Tensor) -> dict[str, float]:
    """Measures how far the engine is from the trainer. gaps: (N,) logprobs of the trainer minus the
    engine's of N sampled tokens. Returns mean, 95th percentile and largest absolute difference, and
    the k3 estimate of KL(engine || trainer), which is never negative; {} of no tokens."""
    if not len(gaps):
        return {}
    sizes = gaps.abs()
    sorted_sizes = sizes.sort().values
    at_95_percent = int(0.95 * (len(gaps) - 1))
    # in double, and by expm1: exp(gap) - 1 - gap of a tiny gap loses its digits, and fell below 0
    exact = gaps.double()
    k3 = torch.expm1(exact.clamp(-EXPONENT_CAP, EXPONENT_CAP)) - exact  # (N,)
    return {
        "sampler_logprob_diff": sizes.mean().item(),
        "sampler_logprob_diff_p95": sorted_sizes[at_95_percent].item(),
        "sampler_logprob_diff_max": sorted_sizes[-1].item(),
        "mismatch_kl": k3.mean().item(),
    }


def grpo_loss(
    logprobs: torch.Tensor,  # (B, T) of the policy, with gradient
    old_logprobs: torch.Tensor,  # (B, T) of the policy that sampled
    mask: torch.Tensor,  # (B, T) 1 = sampled by the policy
    advantages: torch.Tensor,  # (B,), or (B, T) where turns differ
    weights: torch.Tensor,  # (B,) of sequence_weights
    loss: str = "dapo",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    beta: float = 0.0,
    ref_logprobs: torch.Tensor | None = None,  # (B, T), with beta
    importance: torch.Tensor | None = None,  # (B, T) of importance()
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the loss, a scalar to be summed over micro-batches, and what to log: (B, T)
    "clipped", where the clip took the gradient, and with beta (B, T) "kl"."""
    wanted = mask.bool()
    if advantages.ndim == 1:
        advantages = advantages[:, None]

    # 0 where the mask is 0, before exp: what an engine says of other tokens cannot leak as NaN
    log_ratio = torch.where(wanted, logprobs - old_logprobs, 0.0)
    if loss == "gspo":
        tokens = mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
        log_ratio = log_ratio.sum(1, keepdim=True) / tokens
    ratio = log_ratio.exp()
    if loss == "cispo":
        bounded = ratio.detach().clamp(max=1 + clip_high)
        objective = bounded * advantages * torch.where(wanted, logprobs, 0.0)
        clipped = ratio > 1 + clip_high  # it still learns, by a bounded weight
    else:
        bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
        objective = torch.minimum(ratio * advantages, bounded * advantages)
        clipped = bounded * advantages < ratio * advantages
    if importance is not None:
        objective = objective * importance
    if beta:
        difference = torch.where(wanted, ref_logprobs - logprobs, 0.0)
        # k3: never negative, 0 where they agree. Bounded as in `importance`, else one token that
        # the policy has all but given up makes it infinite; the other way it is only linear.
        # In double: near 0 exp(d) - 1 - d loses its digits.
        bounded = difference.double().clamp(max=EXPONENT_CAP)
        kl = (torch.expm1(bounded) - bounded).float()
        objective = objective - beta * kl
    total = -(weights[:, None] * mask * objective).sum()

    parts = {"clipped": wanted & clipped}
    if beta:
        parts["kl"] = kl.detach()
    return total, parts


def set_advantages(
    trajectories: list,
    adv_norm: str = "group",
    turn_credit: bool = False,
    overlong: str = "keep",
    overlong_penalty: float = 1.0,
) -> torch.Tensor:
    """Sets the `advantages` of each trajectory, one for each turn. Returns (B,) bool: whether it is
    learnt from, and counted, at all. Rewards stay as they were.

    adv_norm: see `advantages`; "rloo" compares with the mean of the others and divides by nothing.
    turn_credit: what single turns earned counts for them and those before them. overlong: of what a
    limit cut short the reward is kept ("keep"), not learnt from ("mask"), or lowered by
    overlong_penalty ("penalise").
    """
    is_rloo = adv_norm == "rloo"
    norm = "none" if is_rloo else adv_norm
    groups = [trajectory.group for trajectory in trajectories]
    # a reward may give a list for some only, and none where its judge is away
    turn_rewards = [t.turn_rewards or [0.0] * len(t.turn_starts) for t in trajectories]
    if turn_credit:
        has_reward = any(t.reward is not None for t in trajectories)
        if has_reward and all(t.turn_rewards is None for t in trajectories):
            raise UserError("turn_credit has no effect: none of the rewards gives a list, by turn")

    # 1. the outcome of each, after the rule for what a limit ended
    outcomes = []
    for trajectory, earned in zip(trajectories, turn_rewards, strict=True):
        outcome = trajectory.reward
        if turn_credit and outcome is not None:
            # the turns' part is compared turn by turn below; what is left is the outcome, rounded
            # (the total has 9 digits), as 1.4 - 0.4 is not 1
            outcome = round(outcome - math.fsum(earned), 8)
        if trajectory.stop != "answered" and outcome is not None:
            if overlong == "mask":
                outcome = None
            elif overlong == "penalise":
                outcome -= overlong_penalty
        outcomes.append(outcome)

    # 2. each outcome against its group
    values, valid = advantages(outcomes, groups, norm, is_rloo)
    for trajectory, value in zip(trajectories, values.tolist(), strict=True):
        trajectory.advantages = [value] * len(trajectory.turn_starts)
    if not turn_credit:
        return valid

    # 3. what each turn earned, against the same turn of the group
    counted = valid.nonzero()[:, 0].tolist()
    by_turn = turn_advantages(
        [turn_rewards[i] for i in counted], [groups[i] for i in counted], norm, is_rloo
    )
    for i, turn_values in zip(counted, by_turn, strict=True):
        trajectory = trajectories[i]
        both = zip(trajectory.advantages, turn_values, strict=True)
        trajectory.advantages = [outcome + turn for outcome, turn in both]
    return valid

"""The statistics of an evaluation: pass@k, majority, intervals, two models on the same problems.

pass_at_k(n=8, right=3, k=4)
low, high = interval([1.0, 0.0, 1.0])
paired([0.0, 1.0, 1.0], [1.0, 1.0, 0.0]).difference
"""

import math
from dataclasses import dataclass

from grading.equality import equal

Z = 1.96  # standard deviations on each side that hold 95 %


def pass_at_k(n: int, right: int, k: int) -> float:
    """Estimates the probability that at least one of k samples, drawn from the n without putting
    back, is right: 1 - C(n - right, k) / C(n, k), unbiased (Chen et al. 2021, arXiv:2107.03374).
    ValueError if k > n."""
    if k > n:
        raise ValueError(f"pass@{k} needs at least {k} samples, got {n}")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers: list[str | None], scores: list[float]) -> float:
    """Finds the score of the answer given most often, the earlier one in a tie; None has no
    vote."""
    votes: list[list] = []  # [answer, its score, how many gave it or one that equals it]
    for answer, score in zip(answers, scores, strict=True):
        if answer is None:
            continue
        same = [vote for vote in votes if equal(answer, vote[0])]
        if same:
            same[0][2] += 1
        else:
            votes.append([answer, score, 1])
    if not votes:
        return 0.0
    return max(votes, key=lambda vote: vote[2])[1]


def interval(values: list[float]) -> tuple[float, float]:
    """Gives the 95 % interval of the mean of one value per problem: Wilson's where all are 0 or 1,
    which stays inside [0, 1] and is right for small n too, else the normal one."""
    if are_binary(values):
        return wilson(sum(values), len(values))
    low, high = normal(values)
    if 0 <= min(values) and max(values) <= 1:
        return max(0.0, low), min(1.0, high)
    return low, high


def wilson(right: float, n: int) -> tuple[float, float]:
    """Gives Wilson's score interval of a share (1927)."""
    share = right / n
    shrink = 1 + Z * Z / n
    centre = (share + Z * Z / (2 * n)) / shrink
    half = Z / shrink * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def normal(values: list[float]) -> tuple[float, float]:
    """Gives the interval of a mean by its standard error."""
    n = len(values)
    average = sum(values) / n
    variance = sum((value - average) ** 2 for value in values) / max(1, n - 1)
    half = Z * math.sqrt(variance / n)
    return average - half, average + half


def are_binary(values: list[float]) -> bool:
    """Says whether all are 0 or 1."""
    return all(value in (0, 1) for value in values)


# ---- two models on the same problems


@dataclass(frozen=True)
class Paired:
    """The mean of the second minus that of the first, on the same problems."""

    difference: float
    low: float  # of the 95 % interval
    high: float
    method: str


def paired(first: list[float], second: list[float]) -> Paired:
    """Compares two models by one value per problem, in the same order.

    Problems differ more than models do, so the interval is of the differences, problem by problem
    (Miller 2024, arXiv:2411.00640). Where all values are 0 or 1 it is Newcombe's for paired shares
    (Statistics in Medicine 17:2635, 1998, method 10), which is right for few problems too, and is
    not of no width where no problem changed.
    """
    differences = [after - before for before, after in zip(first, second, strict=True)]
    mean = sum(differences) / len(differences)
    if are_binary(first) and are_binary(second):
        low, high = newcombe(first, second)
        return Paired(mean, low, high, "Newcombe's for paired shares")
    low, high = normal(differences)
    if 0 <= min(first + second) and max(first + second) <= 1:
        low = max(-1.0, low)
        high = min(1.0, high)
    return Paired(mean, low, high, "normal, of the differences")


def newcombe(first: list[float], second: list[float]) -> tuple[float, float]:
    """Gives the interval of the difference of two paired shares: the Wilson intervals of both, put
    together by how the two go along with each other (phi)."""
    n = len(first)
    pairs = list(zip(first, second, strict=True))
    both = pairs.count((1, 1))
    lost = pairs.count((1, 0))
    won = pairs.count((0, 1))
    neither = pairs.count((0, 0))
    before = (both + lost) / n
    after = (both + won) / n

    # phi, with a correction for continuity where both go the same way
    product = (both + lost) * (won + neither) * (both + won) * (lost + neither)
    agreement = both * neither - lost * won
    if agreement > n / 2:
        agreement -= n / 2
    elif agreement >= 0:
        agreement = 0
    phi = agreement / math.sqrt(product) if product else 0.0

    before_low, before_high = wilson(both + lost, n)
    after_low, after_high = wilson(both + won, n)
    difference = after - before
    down = joined(after - after_low, before_high - before, phi)
    up = joined(after_high - after, before - before_low, phi)
    return difference - down, difference + up


def joined(one: float, other: float, phi: float) -> float:
    """Adds two half widths as those of things that go along with each other by phi."""
    return math.sqrt(max(0.0, one * one - 2 * phi * one * other + other * other))

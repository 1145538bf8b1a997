"""Pins rewards that compare the samples of one prompt: how they are asked, what ours give.

pytest tests/test_group_rewards.py
"""

import asyncio
import random
import threading

import pytest

import rewards
from rewards import select
from run.config import UserError
from trajectory import ToolCall, Trajectory

ROW = {"id": 4, "messages": [{"role": "user", "content": "How many?"}], "answer": "18"}


def played(sample, text, calls=0):
    """A trajectory that said `text`, behind so many different calls."""
    trajectory = Trajectory(ROW, 0, sample)
    trajectory.messages = [*ROW["messages"], {"role": "assistant", "content": text}]
    for i in range(calls):
        trajectory.calls.append(ToolCall(0, "python", {"code": str(i)}, "18", None, 0.1))
    trajectory.turn_starts = [0]
    trajectory.stop = "answered"
    return trajectory


def group_of(*texts, calls=()):
    calls = list(calls) or [0 for _ in texts]
    return [played(i, text, calls[i]) for i, text in enumerate(texts)]


def score(group, selected):
    return asyncio.run(rewards.score_group(group, selected))


def values(name, group, **options):
    """What one of our rewards gives each of a group."""
    texts = [f"{name}.{option}={text}" for option, text in options.items()]
    return [scores[name] for scores in score(group, select((name,), texts))]


# How they are asked


def longest(trajectory, example, group):
    """1.0 for the longest text of the group."""
    lengths = [len(member.messages[-1]["content"]) for member in group]
    return float(len(trajectory.messages[-1]["content"]) == max(lengths))


def lengths(group, example):
    return [len(member.messages[-1]["content"]) for member in group]


def shared(group, example, *, size: int = 2):
    return [size for _ in group]


async def waits(group, example):
    await asyncio.sleep(0)
    return lengths(group, example)


def by_keyword(trajectory, example, *, bonus: float = 1.0, group):
    return bonus * len(group)


class Longest:
    def __init__(self, factor: float = 1.0):
        self.factor = factor

    def __call__(self, trajectory, example, group):
        return self.factor * longest(trajectory, example, group)


@pytest.mark.parametrize(
    "reward, expected",
    [
        (longest, [0.0, 1.0, 0.0]),
        (lengths, [1.0, 3.0, 2.0]),
        (waits, [1.0, 3.0, 2.0]),
        (by_keyword, [3.0, 3.0, 3.0]),
        (Longest(2.0), [0.0, 2.0, 0.0]),
    ],
)
def test_a_reward_sees_its_group_and_permuting_it_permutes_the_values(reward, expected):
    group = group_of("a", "bbb", "cc")
    for seed in range(5):
        order = random.Random(seed).sample(range(3), 3)
        scores = score([group[i] for i in order], {"mine": (reward, 1.0)})
        assert [s["mine"] for s in scores] == [expected[i] for i in order]


def test_it_is_named_with_options_and_weights_as_any_other(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def spread(group, example, *, size: int = 2):\n"
        "    return [size * t.sample for t in group]\n"
        "class Best:\n"
        "    def __init__(self, bonus: float = 1.0):\n"
        "        self.bonus = bonus\n"
        "    def __call__(self, trajectory, example, *, group):\n"
        "        return self.bonus if trajectory is group[0] else 0.0\n"
    )
    names = (f"{tmp_path}/mine.py:spread:0.5", f"{tmp_path}/mine.py:Best", "correct")
    selected = select(names, ("spread.size=3", "Best.bonus=7"))
    scores = score(group_of("a", "b"), selected)
    assert scores == [{"spread": 0.0, "Best": 7.0}, {"spread": 3.0, "Best": 0.0}]
    # those that look at one alone are asked when that one has ended
    (alone,) = group_of(r"\boxed{18}")
    assert asyncio.run(rewards.score(alone, ROW, selected)) == {"correct": 1.0}
    with pytest.raises(UserError, match="spread has no option 'group'"):
        select(names, ("spread.group=3",))


def test_a_list_of_turns_none_and_nan_count_as_for_one():
    def each(group, example):
        return [[1.0], None, float("nan"), 2]

    scores = score(group_of("a", "b", "c", "d"), {"each": (each, 1.0)})
    assert [s["each"] for s in scores] == [[1.0], None, None, 2.0]


@pytest.mark.parametrize(
    "given, says",
    [
        (1.0, "gave 1.0 for a group of 2: expected a list with one number for each of them"),
        ([1.0], r"gave \[1.0\] for a group of 2: expected a list"),
        ([1.0, [1.0, 2.0]], "gave 2 numbers for 1 turns"),
        (["a", 1.0], "reward each failed on row 5: TypeError"),
    ],
)
def test_what_is_no_value_for_each_ends_the_run_with_a_sentence(given, says):
    def each(group, example):
        return given

    with pytest.raises(UserError, match=says):
        score(group_of("a", "b"), {"each": (each, 1.0)})


def test_one_that_takes_too_long_is_none_for_all_of_its_group():
    hang = threading.Event()

    def hangs(group, example):
        hang.wait()

    async def hangs_for_b(trajectory, example, group):
        await asyncio.sleep(60 if trajectory.sample == 1 else 0)
        return 1.0

    group = group_of("a", "b")
    selected = {
        "once": (rewards.Reward(hangs, timeout=0.1), 1.0),
        "each": (rewards.Reward(hangs_for_b, timeout=0.1), 1.0),
    }
    scores = score(group, selected)
    hang.set()
    assert scores == [{"once": None, "each": 1.0}, {"once": None, "each": None}]
    assert [sorted(t.reward_timeouts) for t in group] == [["once"], ["each", "once"]]


# Ours


def test_curiosity_and_redundancy_are_those_of_pixel_reasoner():
    """r_curiosity = max(H - RaPR, 0) for who called, r_penalty = min(N - calls, 0); H 0.3, N 1."""
    group = group_of(*"abcdefgh", calls=[2, 1, 0, 0, 0, 0, 0, 0])
    assert values("curiosity", group) == pytest.approx([0.05, 0.05, 0, 0, 0, 0, 0, 0])
    assert values("curiosity", group, rate=0.5)[:3] == pytest.approx([0.25, 0.25, 0])
    assert values("curiosity", group_of(*"abc", calls=[1, 0, 0])) == [0.0, 0.0, 0.0]  # 1/3 > 0.3
    selected = select(("redundancy",))
    alone = [asyncio.run(rewards.score(t, ROW, selected))["redundancy"] for t in group]
    assert alone == [-1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_a_call_that_gives_the_answer_is_neither_curious_nor_redundant():
    (trajectory,) = group_of("a")
    for _ in range(3):
        trajectory.calls.append(ToolCall(0, "finish", {}, "18", None, 0.0, ends=True))
    assert values("curiosity", [trajectory]) == [0.0]
    assert rewards.redundancy(trajectory, ROW) == 0.0


def test_diversity_is_what_two_do_not_share():
    same = "one two three four"
    assert values("diversity", group_of(same, same)) == [0.0, 0.0]
    assert values("diversity", group_of(same, "five six seven eight")) == [1.0, 1.0]
    assert values("diversity", group_of("", "")) == [0.0, 0.0]
    # one two three · two three four; the second has the first of them and one of its own: 1 / 3
    near = group_of(same, "one two three nine")
    assert values("diversity", near) == pytest.approx([2 / 3, 2 / 3])
    assert values("diversity", [*near, played(2, "")]) == pytest.approx([5 / 6, 5 / 6, 1.0])
    assert values("diversity", group_of(same)) == [None]
    # equal words behind other calls are not the same
    assert values("diversity", group_of(same, same, calls=[1, 0])) == pytest.approx([1 / 3, 1 / 3])

"""Pins the curriculum: which rows are drawn, how their pass rates run, what is refused.

pytest tests/test_curriculum.py     (that a killed run goes on bit by bit: test_resume.py)
"""

import json
from collections import Counter

import pytest

import train_grpo
from learning.curriculum import Curriculum, make
from run import config
from run.config import UserError
from trajectory import Trajectory


def played(row, *outcomes):
    group = []
    for sample, outcome in enumerate(outcomes):
        trajectory = Trajectory({"id": row}, 0, sample)
        trajectory.rewards = {"correct": outcome, "format": 1.0}
        group.append(trajectory)
    return group


def test_the_newest_group_counts_half_and_what_was_not_graded_nothing():
    curriculum = Curriculum(0.2, 0.8, [None] * 4)
    curriculum.record(played(0, 1.0, 0.0, 0.0, 0.0) + played(1, None, 1.0) + played(2, None, None))
    assert curriculum.rates == [0.25, 1.0, None, None]
    curriculum.record(played(0, 1.0, 1.0) + played(1, 0.0, 0.0))
    assert curriculum.rates == [0.625, 0.5, None, None]
    curriculum.record(played(3, 7.0, -2.0))  # an outcome of another scale counts from 0 to 1
    assert curriculum.rates[3] == 0.5
    assert curriculum.metrics() == {
        "rows_new": 0.25,
        "rows_hard": 0.0,
        "rows_fit": 0.75,
        "rows_easy": 0.0,
    }


def test_rows_in_the_band_come_more_often_than_hard_ones_and_those_than_solved_ones():
    rates = [0.0] * 20 + [0.5] * 20 + [1.0] * 20
    curriculum = Curriculum(0.2, 0.8, rates)
    drawn = Counter()
    for step in range(2000):
        drawn.update(row // 20 for row in curriculum.take(6 * step, 6, 0, is_new_step=True))
    hard, fit, easy = (drawn[kind] / sum(drawn.values()) for kind in range(3))
    # about 1, 4 and 0.25 of 5.25
    assert fit > 3 * hard > 6 * easy > 0


def test_new_rows_come_first_and_none_is_left_out_for_ever():
    curriculum = Curriculum(0.2, 0.8, [0.5] * 50 + [None] * 10 + [1.0])
    first = [curriculum.take(10 * step, 10, 0, is_new_step=True) for step in range(200)]
    share_of_new = sum(50 <= row < 60 for rows in first for row in rows) / 2000
    assert share_of_new > 0.25  # where they are a sixth of the rows
    assert any(60 in rows for rows in first)  # also the solved one


def test_a_step_takes_no_row_twice_while_there_are_others():
    curriculum = Curriculum(0.2, 0.8, [None] * 10)
    first = curriculum.take(0, 4, 0, is_new_step=True)
    more = curriculum.take(4, 6, 0, is_new_step=False)
    assert sorted(first + more) == list(range(10))
    again = curriculum.take(10, 3, 0, is_new_step=False)
    assert len(set(again)) == 3
    assert len(Curriculum(0.2, 0.8, [None, 0.5]).take(0, 5, 0, is_new_step=True)) == 5


def test_what_is_drawn_depends_on_seed_cursor_and_rates_alone():
    rates = [None, 0.1, 0.5, 0.9] * 10
    one = Curriculum(0.2, 0.8, list(rates))
    one.take(0, 8, 0, is_new_step=True)
    other = Curriculum(0.2, 0.8, list(rates))
    assert one.take(8, 8, 0, is_new_step=True) == other.take(8, 8, 0, is_new_step=True)
    assert other.take(8, 8, 0, is_new_step=True) != other.take(8, 8, 1, is_new_step=True)


def test_an_evaluation_says_the_first_rates(tmp_path):
    examples = [
        {"id": i, "messages": [{"role": "user", "content": f"{i}?"}], "answer": "x"}
        for i in range(3)
    ]
    said = {"role": "assistant", "content": "x"}
    lines = [
        {"messages": [*examples[row]["messages"], said], "rewards": {"correct": value}}
        for row, value in ((0, 1.0), (0, 0.0), (2, 1.0), (1, None))
    ]
    file = tmp_path / "rollouts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert make((0.2, 0.8), str(file), examples).rates == [0.5, None, 1.0]
    assert make((0.2, 0.8), "", examples).rates == [None, None, None]
    with pytest.raises(UserError, match="none of its 4 rollouts is of a prompt of the data"):
        make((0.2, 0.8), str(file), [{"id": 0, "messages": [said], "answer": "x"}])
    with pytest.raises(UserError, match="curriculum_from = '.*' cannot be read"):
        make((0.2, 0.8), str(tmp_path / "none.jsonl"), examples)


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--curriculum=0.8,0.2"], "curriculum = 0.8,0.2: expected two pass rates, such as"),
        (["--curriculum=0.5"], "curriculum = 0.5: expected two pass rates"),
        (["--curriculum=0.2,1.2"], "expected two pass rates"),
        (["--curriculum_from=x.jsonl"], "curriculum_from has no effect without a band"),
        (["--curriculum=0.2,0.8", "--mix=calc.py"], "curriculum has no effect with a mix"),
    ],
)
def test_a_curriculum_that_cannot_be_meant_is_told(argv, says):
    with pytest.raises(UserError) as caught:
        config.parse(train_grpo.Config, argv, train_grpo.check)
    assert says in str(caught.value)

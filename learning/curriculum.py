"""Which rows a step takes: those more often that are neither solved nor out of reach.

    python train_grpo.py --config calc.py --curriculum=0.2,0.8
    python train_grpo.py … --curriculum=0.2,0.8 --curriculum_from=out/calc_sft/eval/rollouts.jsonl

A group whose rollouts all succeed, or all fail, teaches nothing. So each row has a running pass
rate, the mean of its last groups, the newest counting half, and rows are drawn at random with a
weight: rows that were never played first, then those whose rate lies in the band, seldom those
below it, and most seldom those above. None is left out for ever: a rate may be out of date.

It is drawn from the seed, the cursor and the rates alone, and the rates are in the checkpoint: a
run that goes on takes the rows that it would have taken.
"""

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path

from run.config import UserError
from trajectory import Trajectory

# How often a row is drawn, beside others.
NEW = 8.0  # never played
FIT = 4.0  # its rate lies in the band
HARD = 1.0  # below it
EASY = 0.25  # above it


@dataclass
class Curriculum:
    """The running pass rates of the rows of a data set."""

    low: float
    high: float
    rates: list[float | None]  # of each row, by its id; None: never played
    taken: set[int] = field(default_factory=set)  # rows of the step that is being sampled

    def take(self, cursor: int, count: int, seed: int, is_new_step: bool) -> list[int]:
        """Draws the ids of `count` rows, none twice in a step as long as there are others. cursor:
        how many were drawn before."""
        if is_new_step:
            self.taken = set()
        # the largest of u ^ (1 / weight) are a sample without replacement by these weights
        # (Efraimidis and Spirakis 2006)
        rng = random.Random(f"{seed} curriculum {cursor}")
        keys = []
        for row, rate in enumerate(self.rates):
            key = math.log(1.0 - rng.random()) / self.weight(rate)
            keys.append((row not in self.taken, key, row))
        keys.sort(reverse=True)
        drawn = []
        while len(drawn) < count:  # more than there are: all, and again from the first
            drawn += [row for _, _, row in keys[: count - len(drawn)]]
        self.taken |= set(drawn)
        return drawn

    def weight(self, rate: float | None) -> float:
        """Says how often a row with this rate is drawn, beside others."""
        if rate is None:
            return NEW
        if rate < self.low:
            return HARD
        return EASY if rate > self.high else FIT

    def record(self, trajectories: list[Trajectory]) -> None:
        """Takes up how the rows of a step went: their outcomes, from 0 to 1; one that was not
        graded counts nowhere."""
        outcomes: dict[int, list[float]] = {}
        for trajectory in trajectories:
            if trajectory.outcome is not None:
                row = trajectory.example["id"]
                outcomes.setdefault(row, []).append(min(1.0, max(0.0, trajectory.outcome)))
        for row, values in outcomes.items():
            rate = sum(values) / len(values)
            before = self.rates[row]
            self.rates[row] = rate if before is None else (before + rate) / 2

    def metrics(self) -> dict:
        """Gives the shares of new, hard, fit and easy rows, by their pass rates."""
        names = {NEW: "rows_new", HARD: "rows_hard", FIT: "rows_fit", EASY: "rows_easy"}
        counts = dict.fromkeys(names.values(), 0)
        for rate in self.rates:
            counts[names[self.weight(rate)]] += 1
        return {name: count / len(self.rates) for name, count in counts.items()}


def check(band: tuple[float, ...], file: str, has_mix: bool) -> None:
    """Checks what a config says of a curriculum. UserError if it cannot be meant."""
    if not band:
        if file:
            raise UserError("curriculum_from has no effect without a band: --curriculum=0.2,0.8")
        return
    if len(band) != 2 or not 0 <= band[0] < band[1] <= 1:
        shown = ",".join(f"{value:g}" for value in band)
        raise UserError(f"curriculum = {shown}: expected two pass rates, such as 0.2,0.8")
    if has_mix:
        raise UserError("curriculum has no effect with a mix, which draws by weight: drop one")


def make(band: tuple[float, float], file: str, examples: list[dict]) -> Curriculum:
    """Makes the curriculum of these rows; file: rollouts.jsonl of an evaluation on them, which says
    their first rates. UserError if it cannot be read, or is of other rows."""
    low, high = band
    curriculum = Curriculum(low, high, [None for _ in examples])
    if file:
        for row, outcomes in _outcomes_in(file, examples).items():
            curriculum.rates[row] = sum(outcomes) / len(outcomes)
    return curriculum


def _outcomes_in(file: str, examples: list[dict]) -> dict[int, list[float]]:
    """Collects the outcomes of each row in a rollouts.jsonl. Rows are told by their prompts."""
    ids = {json.dumps(example["messages"]): example["id"] for example in examples}
    lengths = {len(example["messages"]) for example in examples}
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
        rollouts = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(f"curriculum_from = {file!r} cannot be read: {error}") from None
    outcomes: dict[int, list[float]] = {}
    for rollout in rollouts:
        messages = rollout.get("messages") or []
        scores = list((rollout.get("rewards") or {}).values())
        if not scores or scores[0] is None:
            continue
        for length in lengths:
            row = ids.get(json.dumps(messages[:length]))
            if row is not None:
                outcomes.setdefault(row, []).append(min(1.0, max(0.0, scores[0])))
    if not outcomes:
        raise UserError(
            f"curriculum_from = {file!r}: none of its {len(rollouts)} rollouts is of a prompt of "
            "the data: evaluate on the same rows, --split=train and the same --seed"
        )
    return outcomes

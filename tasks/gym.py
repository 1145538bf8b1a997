"""Rows of a data set of the package reasoning_gym, for --data=gym:NAME: its problems as they are.

    --data='gym:chain_sum?max_terms=3&max_digits=2'     # with options of the data set

The reward `gym` (grading/gym.py) asks the data set's own scorer. reasoning_gym makes problem i of a
data set from the number seed + i, so neighbouring seeds share nearly all: here the numbers of each
of our seeds begin somewhere else. Train and held-out problems are disjoint for all seeds: the hash
of its question says which of the two a problem belongs to.
"""

import random
import typing
import zlib
from collections.abc import Iterator
from dataclasses import fields

from run.config import UserError, describe_type, near
from run.plugins import parse_source

PREFIX = "gym:"  # begins the name of such data
# Options that each data set has, and the keys of a run which say the same.
OF_A_RUN = {"size": "limit", "seed": "seed"}
HELD_OUT = 5  # one problem in five is held out
NUMBERS = 1_000_000  # problems that a seed can have
BLOCK = 64  # of them are made ready at once: some data sets make all that they are asked for
LARGEST = 2**31  # seed of theirs: numpy, which some use, takes none above twice that
COUNT = 1000  # rows, where no limit says how many
FRUITLESS = 2000  # problems in a row that are all of the other split: it has none


def problems(source: str, split: str, seed: int, count: int | None) -> Iterator[dict]:
    """Yields the first `count` rows of a split, made while they are read: prompt, answer (None
    where the data set knows none, but scores any), the `source`, and the data set's own entry for
    the scorer. source: the data set's name, options behind a `?`. UserError for a name, an option,
    a split or a number of rows that there is not."""
    if split not in ("train", "test"):
        raise UserError(f"split = {split!r}: gym:{source} has train and test")
    name, options = parse_source(source)
    made = 0
    since_last = 0
    for entry in _entries(name, options, seed):
        since_last += 1
        is_held_out = zlib.crc32(entry["question"].encode()) % HELD_OUT == 0
        if is_held_out == (split == "test"):
            row = {"prompt": entry["question"], "answer": entry["answer"]}
            yield row | {"gym": source, "entry": entry}
            made += 1
            since_last = 0
        if made == (count or COUNT):
            return
        if since_last == FRUITLESS:
            break
    raise UserError(f"gym:{source} has too few problems for split {split!r}: {made} were found")


def _entries(name, options, seed):
    start = zlib.crc32(str(seed).encode()) % LARGEST
    for begin in range(start, start + NUMBERS, BLOCK):
        block = data_set(name, options, begin, BLOCK)
        for number in range(BLOCK):
            # some draw from python's own random numbers beside those of their seed
            state = random.getstate()
            random.seed(begin + number)
            entry = block[number]
            random.setstate(state)
            yield entry


def data_set(name: str, options: dict, seed: int, size: int):
    """Makes a data set of reasoning_gym. UserError without the package, for an unknown name or
    option, for a value that it does not take, and for one that has to be told what it is made
    of."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        if error.name != "reasoning_gym":
            raise
        raise UserError(
            f"gym:{name} needs reasoning_gym: pip install 'reasoning-gym>=0.1.25,<0.2'"
        ) from None
    if name not in DATASETS:
        hint = near(name, DATASETS) or f": there are {', '.join(sorted(DATASETS))}"
        raise UserError(f"reasoning_gym has no data set {name!r}{hint}")
    _, settings = DATASETS[name]
    kinds = typing.get_type_hints(settings)
    known = [field.name for field in fields(settings) if field.name not in OF_A_RUN]
    for option in options:
        if option in OF_A_RUN:
            raise UserError(f"gym:{name}: {option} is the run's: give --{OF_A_RUN[option]}=…")
        if option not in known:
            hint = near(option, known) or f": there are {', '.join(known)}"
            raise UserError(f"gym:{name} has no option {option!r}{hint}")
        _check_type(f"gym:{name}: {option}", options[option], kinds[option])
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **options)
    except Exception as error:  # its own check of the options; composite, which is made of others
        why = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise UserError(f"gym:{name} cannot be made with options {options}: {why}") from None


def _check_type(what, value, kind):
    """Refuses a value of another type, where that is a plain one: else it would fail in a row."""
    if kind not in (int, float, bool, str):
        return
    fits = isinstance(value, int if kind is float else kind) or isinstance(value, kind)
    if not fits or isinstance(value, bool) != (kind is bool):
        raise UserError(f"{what} = {value!r}: expected {describe_type(kind)}")

"""A config of configs: several sources of rows, each asked, played and scored in its own way.

    mix = ("calc.py:2", "facts.py", "my/shop.py:0.5")  # each with :weight, else 1

A source is another config of the same script. What it says about its rows, its prompts, its tools,
its rewards and the limits of its rollouts (OF_A_SOURCE) holds for its rows; its model, its steps
and all else are not looked at: those of the mix hold for all. Prompts are drawn by weight.
"""

import contextlib
import functools
import hashlib
import math
import random
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from run import config
from run.config import UserError

# The keys of both training scripts that each source has for itself.
OF_A_SOURCE = tuple(
    """
    data eval_data rows min_reward recorded prompt_column answer_column answer_after system_prompt
    prompt_template database format tools tool_options tool_timeout tool_concurrency rewards
    reward_options max_new_tokens max_turns max_tool_calls max_observation_tokens
    trajectory_timeout final_turn turns_left
    """.split()
)
# The same, where the mix does not say it for all of them.
UNLESS_OF_THE_MIX = ("split", "limit")
LONGEST_PERIOD = 10_000  # prompts after which the order of the sources begins anew
DIGEST = "digest"  # in a fingerprint: of the file of a source's rows
KEY = "mix"  # in an example, and in messages: the source that a row is of


@dataclass(frozen=True)
class Source:
    """One source of a mix."""

    name: str  # of its file, without .py
    weight: Fraction
    cfg: object  # a config without a mix: the source's own keys, and the mix's for the rest


def check(cfg) -> None:
    """Checks that a mix can be read, and that no key is set beside it that each source has."""
    if not cfg.mix:
        return
    own = " ".join(OF_A_SOURCE)
    why = "with a mix: each source has its own, so set it there"
    config.refuse_unused_keys(cfg, ((True, own, why),))
    sources(cfg)


def sources(cfg) -> list[Source]:
    """Reads the configs of a mix. UserError for what cannot be read, or is given twice."""
    found = []
    for text in cfg.mix:
        file, colon, weight = text.partition(".py:")
        file = f"{file}.py" if colon else text
        name = Path(file).stem
        if name in [source.name for source in found]:
            raise UserError(f"mix: {name} is given twice: keep one, with their weights added up")
        of_file = config.parse(type(cfg), ["--config", file])
        if of_file.mix:
            raise UserError(f"mix: {file} is a mix itself: name its sources")
        found.append(Source(name, _weight(text, weight), _of_source(cfg, of_file)))
    order_of_sources(tuple((source.name, source.weight) for source in found))  # it has one
    return found


def fingerprint(cfg) -> dict[str, dict]:
    """Describes what the sources of a mix say: {source: {key: value}}, with the digest of its file
    of rows as DIGEST; {} of a config without one, whose keys are its own."""
    described = {}
    for source in sources(cfg):
        keys = [key for key in (*OF_A_SOURCE, *UNLESS_OF_THE_MIX) if hasattr(source.cfg, key)]
        described[source.name] = {key: getattr(source.cfg, key) for key in keys}
        described[source.name][DIGEST] = _digest(source.cfg.data)
    return described


def _digest(data: str) -> str:
    """Digests a file of rows; "" for what is no file."""
    path = Path(data).expanduser()
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weight(text: str, weight: str) -> Fraction:
    if not weight:
        return Fraction(1)
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", weight) or not float(weight):
        raise UserError(f"mix: cannot read the weight of {text!r}: expected a number above 0")
    return Fraction(weight)


def _of_source(cfg, of_file):
    """Makes the config of one source: the mix's, with that source's keys."""
    changes = {"mix": ()}
    for key in OF_A_SOURCE:
        if hasattr(cfg, key):
            changes[key] = getattr(of_file, key)
    default = type(cfg)()
    for key in UNLESS_OF_THE_MIX:
        if hasattr(cfg, key) and getattr(cfg, key) == getattr(default, key):
            changes[key] = getattr(of_file, key)
    if hasattr(cfg, "split") and Path(of_file.data).suffix in (".json", ".jsonl", ".parquet"):
        changes["split"] = default.split  # a file has none
    return replace(cfg, **changes)


@contextlib.contextmanager
def told_by(source: str):
    """Says of which source of a mix an error is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


# ---- whose turn it is


def next_rows(cursor: int, rows: list, count: int, seed) -> list:
    """Takes the next `count` rows after the `cursor` that were taken: every one once in a random
    order, then all again in another."""
    picked = []
    for i in range(cursor, cursor + count):
        epoch, at = divmod(i, len(rows))
        picked.append(rows[_order(f"{seed} {epoch}", len(rows))[at]])
    return picked


@functools.lru_cache(maxsize=16)
def _order(seed: str, count: int) -> list[int]:
    return random.Random(seed).sample(range(count), count)


def next_of_sources(
    cursor: int, rows: dict[str, list], weights: dict[str, Fraction], count: int, seed
) -> list:
    """Takes the next `count` rows of several sources {name: its rows}, each as often as its weight
    says, and its own as next_rows does. It depends on nothing but these arguments."""
    turns = order_of_sources(tuple(weights.items()))
    picked = []
    for i in range(cursor, cursor + count):
        periods, at = divmod(i, len(turns))
        name = turns[at]
        taken = periods * turns.count(name) + turns[:at].count(name)
        picked += next_rows(taken, rows[name], 1, f"{seed} {name}")
    return picked


@functools.cache
def order_of_sources(weights: tuple[tuple[str, Fraction], ...]) -> list[str]:
    """Says whose turn it is, for one period: behind any number of turns each source has had its
    share, to less than one. UserError if the weights have no short period."""
    common = math.lcm(*(weight.denominator for _, weight in weights))
    shares = {name: int(weight * common) for name, weight in weights}
    divisor = math.gcd(*shares.values())
    shares = {name: share // divisor for name, share in shares.items()}
    period = sum(shares.values())
    if period > LONGEST_PERIOD:
        raise UserError("mix: the weights have too many digits: expected such as 1, 2.5 or 0.1")
    taken = dict.fromkeys(shares, 0)
    order = []
    for i in range(1, period + 1):
        name = max(shares, key=lambda source: shares[source] * i - taken[source] * period)
        taken[name] += 1
        order.append(name)
    return order

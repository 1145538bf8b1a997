"""A suite: several models on several data sets, evaluated in one call and laid side by side.

    models = ("out/calc_sft", "out/calc")  # runs, folders, hub ids, or names behind an API
    data = ("calc.py", "hard: calc.py --data=hard.jsonl --n=8 --temperature=1")  # configs

An entry is what one would type: a model or a config, and behind it `--key=value`. It is called by
the last part of its path, or as stands before a colon. suite/cells.py makes a cell of each model
and each data set, an evaluation in a folder of its own.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from run import config
from run.config import UserError


@dataclass
class Config:
    models: tuple[str, ...] = ()  # each a run, a folder, a hub id or a name there, and --key=value
    data: tuple[str, ...] = ()  # each a config, and --key=value
    out_dir: str = "out/suite"  # of suite.json, suite.html, and a folder for each cell
    resume: bool = False  # play what is missing of the suite in out_dir
    only: tuple[str, ...] = ()  # names of data sets: these alone
    n: int = 1  # this and what follows: as of one evaluation, for entries that do not say it
    k: tuple[int, ...] = (1,)  # pass@k and maj@k
    pass_at: float = 1.0  # the outcome from which a sample counts as right in pass@k
    temperature: float = 0.0  # 0 = greedy
    seed: int = 1_000_000  # of sampling
    limit: int | None = None  # the first so many problems of each data set
    batch: int = 256  # problems that are played at once


FOR_ALL = ("n", "k", "pass_at", "temperature", "seed", "limit", "batch")  # unless an entry says it
NAME = re.compile(r"[\w.-]{1,60}")  # of a folder


@dataclass(frozen=True)
class Entry:
    """A model or a data set of a suite."""

    name: str
    what: str  # the model, or the config
    options: tuple[str, ...]  # --key=value


def check(suite: Config) -> None:
    """Checks what can be seen without the configs."""
    if not suite.models or not suite.data:
        raise UserError("a suite needs models = (…,) and data = (…,)")
    names = [entry.name for entry in entries(suite.data, "data")]
    for name in suite.only:
        if name not in names:
            raise UserError(f"only = {name!r}: expected one of {', '.join(names)}")
    entries(suite.models, "models")


def entries(texts: tuple[str, ...], key: str) -> list[Entry]:
    """Reads the entries of a key. UserError for one that cannot be read, and for equal names."""
    found = []
    for text in texts:
        name, colon, rest = text.partition(": ")
        try:
            words = shlex.split(rest if colon else text)
        except ValueError as error:
            raise UserError(f"{key}: cannot read {text!r} ({error})") from None
        if not words or words[0].startswith("--"):
            raise UserError(f"{key}: cannot read {text!r}: write 'what --key=value' first of all")
        if not colon:
            name = Path(words[0]).name.removesuffix(".py")
        if not NAME.fullmatch(name) or name in (".", "..", "suite.json", "suite.html"):
            raise UserError(f"{key}: {name!r} is no name of a folder: write 'name: {text}'")
        if name in [entry.name for entry in found]:
            raise UserError(f"{key}: {name} is there twice: write 'other_name: {text}'")
        found.append(Entry(name, words[0], tuple(words[1:])))
    return found


def chosen(suite: Config) -> list[Entry]:
    """Lists the data sets that are to be played."""
    every = entries(suite.data, "data")
    return [entry for entry in every if not suite.only or entry.name in suite.only]


def options_for_all(suite: Config, *typed: tuple[str, ...]) -> list[str]:
    """Writes FOR_ALL as `--key=value`, but for those that entries have typed."""
    names = {item.partition("=")[0] for options in typed for item in options}
    options = []
    for key in FOR_ALL:
        if f"--{key}" not in names:
            options.append(f"--{key}={config.as_typed(getattr(suite, key))}")
    return options

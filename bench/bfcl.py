"""The verdicts of the reward call_match beside those of the leaderboard's own checker.

    pip download --no-deps bfcl-eval==2026.3.23, unpacked to some/folder; then
    python bench/bfcl.py --official=some/folder > evidence/bench/bfcl.txt

Both are asked about the calls of every question of one turn whose functions are python's: all that
are right, and calls that are wrong in the ways below, each argument in turn. The package is not
installed, and no program of it runs but its checker: what that imports beside is a stand-in. Prints
a line for each category, and every disagreement.
"""

import copy
import importlib
import json
import sys
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from grading.calls import call_match, right_calls
from run import config
from run.config import UserError
from tasks import bfcl
from trajectory import ToolCall, Trajectory

MODEL = "any"  # for which the official checker writes _ for a dot, as for most
SHOWN = 20  # disagreements that are printed whole
# Values of every type, given to every argument in turn.
ODD = (0, 1, -1, 2.5, True, False, None, "", "x", "1", [], [1], ["x"], [[1]], {}, {"a": 1}, [{}])


@dataclass
class Config:
    official: str = ""  # the folder in which bfcl_eval is
    limit: int = 0  # the first so many questions of each category; 0: all


class Official:
    """The checker of the package, without what it imports beside."""

    def __init__(self, folder: Path):
        if not (folder / "bfcl_eval" / "eval_checker").is_dir():
            raise UserError(f"official = '{folder}': no bfcl_eval/eval_checker in it")
        sys.path.insert(0, str(folder))
        settings = types.ModuleType("bfcl_eval.constants.model_config")
        settings.MODEL_CONFIG_MAPPING = {MODEL: types.SimpleNamespace(underscore_to_dot=True)}
        sys.modules[settings.__name__] = settings
        module = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
        languages = importlib.import_module("bfcl_eval.constants.enums")
        helpers = importlib.import_module("bfcl_eval.utils")
        self.check = module.ast_checker
        self.is_empty = helpers.is_empty_output
        self.python = languages.Language.PYTHON
        self.data = folder / "bfcl_eval" / "data"

    def verdict(self, row: dict, calls: list[dict], right: list[dict] | None, category: str):
        """Asks it: True or False, or the name of the exception that it raises. right: None where it
        is only asked whether there are calls."""
        if right is None:
            return self.is_empty(calls) == category.endswith("irrelevance")
        try:
            # copies: it is not told that they are read alone
            checked = self.check(
                copy.deepcopy(row["function"]),
                copy.deepcopy(calls),
                copy.deepcopy(right),
                self.python,
                category,
                MODEL,
            )
        except Exception as error:  # whatever it did not foresee
            return type(error).__name__
        return checked["valid"]


def our_verdict(example: dict, calls: list[dict]) -> bool:
    """Asks call_match of a rollout that made these calls in its only turn."""
    made = []
    for call in calls:
        for name, arguments in call.items():
            made.append(ToolCall(0, name, arguments, "", None, 0.0, ends=True))
    trajectory = Trajectory(example, calls=made, turn_starts=[0], stop="answered")
    return call_match(trajectory, example) == 1.0


# ---- right calls, and wrong ones


def variants(example: dict) -> Iterator[tuple[str, list[dict]]]:
    """Yields (what was done to them, the calls)."""
    right = right_calls(example)
    if not right:  # nothing is to be called, or anything
        yield "none", []
        for tool in example["tools"]:
            call = {tool["function"]["name"]: {}}
            yield "a call", [call]
            yield "two calls", [call, call]
        return
    yield "as they are", right

    # 1. the calls as a whole
    yield "none", []
    yield "the last one missing", right[:-1]
    yield "the first one missing", right[1:]
    yield "one twice", [*right, right[0]]
    yield "the other way round", right[::-1]
    yield "turned by one", [*right[1:], right[0]]
    yield "all the first", [right[0] for _ in right]
    for place, call in enumerate(right):
        for how, changed in variants_of_call(example, place, call):
            yield how, [*right[:place], changed, *right[place + 1 :]]


def variants_of_call(example: dict, place: int, call: dict) -> Iterator[tuple[str, dict]]:
    """Yields one of the right calls, changed."""
    ((name, arguments),) = call.items()
    accepted = example["ground_truth"][place][name]
    functions = {tool["function"]["name"]: tool["function"] for tool in example["tools"]}

    # 2. the name
    for other in functions:
        if other != name:
            yield "another function", {other: arguments}
    yield "an unknown function", {f"{name}_2": arguments}
    yield "no arguments", {name: {}}

    # 3. which arguments there are
    yield "an unknown argument", {name: arguments | {"zz": 1}}
    for argument in functions[name]["parameters"]["properties"]:
        if argument not in arguments:
            for value in (0, "x", None):
                yield "an optional argument", {name: arguments | {argument: value}}
    for argument in arguments:
        left = {key: value for key, value in arguments.items() if key != argument}
        yield "an argument missing", {name: left}

    # 4. their values
    for argument, values in accepted.items():
        for value in values:
            yield "another accepted value", {name: arguments | {argument: value}}
        for value in ODD:
            yield "an odd value", {name: arguments | {argument: value}}
    for argument, value in arguments.items():
        for how, changed in variants_of_value(value):
            yield how, {name: arguments | {argument: changed}}


def variants_of_value(value) -> Iterator[tuple[str, object]]:
    """Yields a value, changed in the ways of its type, and inside of it."""
    if isinstance(value, str):
        yield "other case", value.swapcase()
        yield "blanks and signs", f" {value}._-".replace(" ", "-")
        yield "no blanks", value.replace(" ", "").replace(",", "")
        yield "other quotes", value.replace("'", '"')
        yield "a letter more", f"{value}e"
        yield "signs that count", f"{value}!"
        yield "other type", [value]
    elif isinstance(value, bool):
        yield "the other", not value
        yield "other type", int(value)
        yield "other type", str(value)
    elif isinstance(value, int | float):
        yield "as a float", float(value)
        yield "as a whole number", int(value)
        yield "another number", value + 1
        yield "another number", value * 1.0001
        yield "other type", str(value)
        yield "other type", [value]
    elif isinstance(value, list):
        yield "a list the other way round", value[::-1]
        yield "a list with more", [*value, *value[:1]]
        yield "a list with less", value[:-1]
        yield "a list of texts", [str(item) for item in value]
        yield "other type", str(value)
        for place, item in enumerate(value[:4]):
            for how, changed in variants_of_value(item):
                yield f"in a list: {how}", [*value[:place], changed, *value[place + 1 :]]
    elif isinstance(value, dict):
        yield "an object with more", value | {"zz": 1}
        yield "other type", json.dumps(value)
        for key, item in value.items():
            yield "an object with less", {k: v for k, v in value.items() if k != key}
            yield (
                "an object with another key",
                {(f"{k}_2" if k == key else k): v for k, v in value.items()},
            )
            for how, changed in variants_of_value(item):
                yield f"in an object: {how}", value | {key: changed}


# ---- the comparison


def compare(official: Official, category: str, limit: int) -> tuple[Counter, list[str]]:
    """Asks both about one category; returns the counts, and a line for each disagreement."""
    counts = Counter()
    lines = []
    asked = {row["id"]: row for row in bfcl.read(bfcl.file_of(category, official.data))}
    answers = bfcl.answers_of(category, official.data)
    right = {row["id"]: row["ground_truth"] for row in bfcl.read(answers)} if answers else {}
    for number, made in enumerate(bfcl.questions(f"{category}?folder={official.data}")):
        if limit and number == limit:
            break
        id = made["bfcl_id"]
        example = made | {"id": number}
        counts["questions"] += 1
        for how, calls in variants(example):
            theirs = official.verdict(asked[id], calls, right.get(id), category)
            ours = our_verdict(example, calls)
            counts["calls"] += 1
            counts["right"] += ours
            if how == "as they are":
                counts["right as they are"] += ours
            if isinstance(theirs, str):
                counts[f"official raised {theirs}, ours {'right' if ours else 'wrong'}"] += 1
            elif theirs != ours:
                counts["disagreements"] += 1
                lines.append(f"{id}: {how}: official {theirs}, ours {ours}: {json.dumps(calls)}")
    return counts, lines


def main(argv: list[str]) -> None:
    cfg = config.parse(Config, argv)
    official = Official(Path(cfg.official))
    total = Counter()
    every_line = []
    for category in bfcl.GROUPS["single_turn"]:
        counts, lines = compare(official, category, cfg.limit)
        total += counts
        every_line += lines
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        print(f"{category}: {shown}, disagreements {counts['disagreements']}", flush=True)
    shown = ", ".join(f"{name} {count}" for name, count in total.items())
    print(f"all: {shown}, disagreements {total['disagreements']}")
    for line in every_line[:SHOWN]:
        print(line[:400])


if __name__ == "__main__":
    config.main(main)

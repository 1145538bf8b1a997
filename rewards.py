"""Rewards: functions (trajectory, example) -> float, or None where there is nothing to score.

    rewards = ("correct", "format:0.1", "my_rewards.py:shout:0.5")  # each with :weight, else 1
    reward_options = ("tool_bonus.cap=0.3", "judge.timeout=120")

A function sees the Trajectory of rollout.py (messages, calls, stop, …) and the data row; it may be
`async def`. Its keyword parameters with a type are options. A class of that name is made once, with
the options, when the run starts, and its instance is called. A list is a number for each turn.
Every reward also has the options timeout (seconds of one call) and concurrency (calls at once).

All rewards look only at what the model wrote: answers.py says what counts as its answer, queries.py
and programs.py have those that run code, judge.py the one that asks a model.
"""

import asyncio
import functools
import importlib.util
import inspect
import math
import re
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grading.answers import answer, equal, last_turn, places, words
from grading.answers import f1 as f1_of
from grading.judge import judge
from grading.programs import code_tests
from grading.queries import sql_match
from run import config
from run.config import HERE, UserError, near
from run.deadline import start_thread
from trajectory import MALFORMED

OPTIONS = "reward_options"  # the config key, for messages

# ---- outcome


def correct(trajectory, example):
    """1.0 if the model's answer equals example["answer"], or one of them if it is a list.

    A percent sign, a currency sign and units in `\\text{}` are dropped: 50% is 50, not 0.5. A word
    such as dollars or cm (answers._UNIT_WORD) is, where only one of the two has it. A whole number
    has to be written as one: `\\boxed{34*27}` or `\\boxed{10/2}` is the question again, not its
    answer. So is what is left to be done (`\\int`, `\\lim`, `\\cos`, …: answers._OPERATIONS) where
    the right answer has nothing of that kind. Not covered: `\\sqrt{50}` is `5\\sqrt{2}`, so a task
    to simplify or to expand can be answered by its question.
    """
    golds = _golds(example, "correct")
    said = answer(trajectory, example)
    return float(said is not None and any(equal(said, gold) for gold in golds))


def exact_match(trajectory, example):
    """1.0 if the words of the model's answer are those of example["answer"], or of one of them if
    it is a list, as in SQuAD: whatever the case, the articles and the punctuation."""
    golds = _golds(example, "exact_match")
    said = words(answer(trajectory, example) or "")
    return float(said != [] and any(said == words(gold) for gold in golds))


def f1(trajectory, example):
    """How many words the model's answer shares with example["answer"], as in SQuAD: the harmonic
    mean of the share of its words that are right and the share of the right words that it has. If
    that is a list, the best of them. Weigh it with care: half an answer earns half."""
    golds = _golds(example, "f1")
    said = answer(trajectory, example)
    return 0.0 if said is None else max(f1_of(said, gold) for gold in golds)


def _golds(example, reward):
    """The right answers, at least one. A row without one stops the run: it cannot be judged."""
    golds = example["answer"]
    if not golds:
        raise UserError(f"reward {reward} needs an answer, row {example['id'] + 1} has none")
    return golds if isinstance(golds, list) else [golds]


def oracle(name: str, example: dict) -> str | None:
    """A last message that earns 1.0 from the reward of this name, for a dry run; None if that does
    not depend on the message, or the row does not say what would be right."""
    gold = example.get("solution" if name == "code_tests" else "answer")
    gold = gold[0] if isinstance(gold, list) and gold else gold
    if not gold:
        return None
    if name in ("correct", "exact_match", "f1"):
        return f"\\boxed{{{gold}}}"
    languages = {"sql_match": "sql", "code_tests": "python"}
    return f"```{languages[name]}\n{gold}\n```" if name in languages else None


# ---- on the way


def format(trajectory, example):
    """1.0 if the model ended by its own choice, made no malformed call and gave just one answer."""
    if trajectory.stop != "answered" or any(c.error in MALFORMED for c in trajectory.calls):
        return 0.0
    found = places(last_turn(trajectory, example), True)
    if trajectory.answer is not None:  # given to a tool: what it says beside must be the same
        one = sum(call.ends for call in trajectory.calls) < 2
        same = all(words(said) == words(answer(trajectory, example)) for said in found)
        return float(one and same)
    return float(len(found) == 1)


def tool_use(trajectory, example):
    """1.0 if at least one call ran without an error; more calls do not give more. Give it a small
    weight and not for long: any call that runs is rewarded, a useless one too."""
    return float(any(call.error is None and not call.ends for call in trajectory.calls))


def tool_bonus(trajectory, example, *, each: float = 0.1, cap: float = 0.2):
    """`each` for every call that ran without an error, `cap` at most. The same call again earns
    nothing, but a useless one does: give it for a warm start, not for long."""
    calls = [c for c in trajectory.calls if c.error is None and not c.ends]
    ran = {(c.name, repr(c.arguments)) for c in calls}
    return min(cap, each * len(ran))


class tool_errors:
    """-`each` for every call that failed, -`cap` at most."""

    def __init__(self, kinds: tuple[str, ...] = (), each: float = 0.1, cap: float = 1.0):
        """kinds: those of ToolCall.error that count, such as bad_json,timeout:0.3, each with
        :penalty or else `each`; empty for all. UserError for one that cannot be read."""
        self.kinds, self.each, self.cap = {}, each, cap
        for kind in kinds:
            name, _, penalty = kind.partition(":")
            try:
                self.kinds[name] = float(penalty) if penalty else each
            except ValueError:
                raise UserError(f"tool_errors.kinds: {kind!r}: expected kind:penalty") from None

    def __call__(self, trajectory, example):
        errors = [call.error for call in trajectory.calls if call.error]
        every = 0.0 if self.kinds else self.each
        return -min(self.cap, sum((self.kinds.get(kind, every) for kind in errors), 0.0))


def repetition(trajectory, example, *, n: int = 3):
    """From 0.0 down to -1.0: the share of the n-grams (of words and signs, in all that the model
    wrote between the calls) that it had written before, and the share of its calls that it had made
    before, with the same arguments."""
    seen, grams = set(), 0
    for message in trajectory.messages[len(example["messages"]) :]:
        if message["role"] == "assistant" and isinstance(message.get("content"), str):
            parts = _PARTS.findall(message["content"])
            found = [tuple(parts[i : i + n]) for i in range(len(parts) - n + 1)]
            grams += len(found)
            seen.update(found)
    calls = [(call.name, repr(call.arguments)) for call in trajectory.calls]
    again = 1 - len(seen) / grams if grams else 0.0
    again += 1 - len(set(calls)) / len(calls) if calls else 0.0
    return -min(1.0, again)


_PARTS = re.compile(r"\w+|[^\w\s]")


def length(trajectory, example, *, limit: int, buffer: int = 256):
    """Soft overlong punishment (DAPO, arXiv 2503.14476): 0.0 up to limit - buffer tokens that the
    model wrote, in all turns together; from there linearly down to -1.0 at limit and above."""
    over = trajectory.new_tokens - (limit - buffer)
    return -min(1.0, max(0.0, over / buffer)) if buffer else -float(over >= 0)


def turn_calls(trajectory, example):
    """For turn_credit, a number for each turn: 1.0 if it made calls and all of them ran, -1.0 if
    one failed, 0.0 for a turn without calls. Give it a small weight, as with tool_use."""
    errors = [[] for _ in trajectory.turn_starts]
    for call in trajectory.calls:
        if call.turn < len(errors):  # not so where the tools could not even be opened
            errors[call.turn].append(call.error)
    return [(-1.0 if any(each) else 1.0) if each else 0.0 for each in errors]


BUILT_IN = [
    correct, exact_match, f1, sql_match, code_tests, judge, format, tool_use, tool_bonus,
    tool_errors, repetition, length, turn_calls,
]  # fmt: skip
# They take microseconds and never wait, so they do without a thread, which takes 80.
INSTANT = [exact_match, f1, format, tool_use, tool_bonus, tool_errors, repetition, length]
INSTANT += [turn_calls]

# ---- names, weights and options


@dataclass
class Reward:
    """A reward with its options, ready to be called."""

    function: Callable  # (trajectory, example) -> value
    instant: bool = False  # it never waits
    timeout: float = 60.0  # seconds of one call
    concurrency: int = 16  # calls at once
    _slots: dict = field(default_factory=dict)  # event loop -> semaphore: it belongs to one

    def __call__(self, trajectory, example):
        return self.function(trajectory, example)

    def slot(self) -> asyncio.Semaphore:
        loop = asyncio.get_running_loop()
        if loop not in self._slots:
            self._slots = {loop: asyncio.Semaphore(self.concurrency)}
        return self._slots[loop]


def common(timeout: float = 60.0, concurrency: int = 16) -> dict:
    """The options that every reward has."""
    if timeout <= 0 or concurrency < 1:
        given = f"timeout {timeout}, concurrency {concurrency}"
        raise UserError(f"{OPTIONS}: {given}: expected > 0 seconds, and >= 1")
    return {"timeout": timeout, "concurrency": concurrency}


COMMON = inspect.signature(common).parameters


def select(
    names: Sequence[str], options: Sequence[str] = (), timeout: float = 60.0
) -> dict[str, tuple[Reward, float]]:
    """{name: (reward, weight)} of ("correct", "format:0.1", "my_rewards.py:shout:0.5") and
    ("tool_bonus.cap=0.3", …). timeout: seconds of a call, where no option says otherwise.

    A file is looked for here and then beside this one. Raises UserError for a wrong name, weight or
    option, and what a reward that is a class raises when it is made.
    """
    given, chosen = config.options(options, OPTIONS), {}
    for text in names:
        name, *rest = text.split(":")
        if name.endswith(".py"):
            found, there = _functions(name), f"in {name} there are"
            if not rest:
                raise UserError(f"rewards: {text!r} names no function: {there} {', '.join(found)}")
            name, *rest = rest
        else:
            found, there = {f.__name__: f for f in BUILT_IN}, "there are"
        if name not in found:
            hint = near(name, found) or f": {there} {', '.join(found)}, or write file.py:function"
            raise UserError(f"unknown reward {name!r} in {text!r}{hint}")
        if name in chosen:
            raise UserError(f"rewards: {name} is given twice: keep one of them")
        chosen[name] = found[name], _weight(text, rest)
    if not chosen:
        raise UserError("rewards is empty: expected at least one, such as correct")
    for name in given:
        if name not in chosen:
            hint = near(name, chosen) or f" (rewards: {', '.join(chosen)})"
            raise UserError(f"{OPTIONS}: {name!r} is not one of the rewards{hint}")
    return {
        name: (_made(name, function, given.get(name, {}), timeout), weight)
        for name, (function, weight) in chosen.items()
    }


def _made(name, function, given, timeout):
    """The Reward: options bound, a class instantiated. given: {option: text}."""
    where = f"{OPTIONS}: {name}"
    own = {option: text for option, text in given.items() if option not in COMMON}
    shared = {option: text for option, text in given.items() if option in COMMON}
    limits = common(**({"timeout": timeout} | config.arguments(common, shared, where)))
    if shared and function in INSTANT:
        raise UserError(f"{where}.{next(iter(shared))} has no effect: it takes no time, so drop it")
    is_class = isinstance(function, type)
    positional = () if is_class else list(inspect.signature(function).parameters)[:2]
    values = config.arguments(function, own, where, positional)
    if is_class:
        ready = function(**values)
        if not callable(ready):
            raise UserError(f"reward {name} is a class without __call__(trajectory, example)")
    else:
        ready = functools.partial(function, **values) if values else function
    return Reward(ready, function in INSTANT, **limits)


def _functions(file):
    """The public functions that a python file has, and the classes that it defines, by name."""
    path = next((p for p in (Path(file), HERE / file) if p.is_file()), None)
    if path is None:
        raise UserError(f"no reward file {file!r}")
    spec = importlib.util.spec_from_file_location(f"rewards in {path}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # what is wrong in it keeps its traceback
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (
            isinstance(value, types.FunctionType)
            or (isinstance(value, type) and value.__module__ == spec.name)
        )
    }


def _weight(text, rest):
    try:
        weight = float(rest[0]) if rest else 1.0
    except ValueError:
        weight = math.nan
    if len(rest) > 1 or not math.isfinite(weight):
        raise UserError(f"rewards: cannot read the weight of {text!r}: expected a number")
    return weight


# ---- scores


async def score(trajectory, example, selected) -> dict:
    """{name: value} of all selected rewards, unweighted; None where one is None, NaN or infinite.
    A value is a number, or a list of numbers, one for each turn of the model.

    All are asked at once, each for its own seconds, from when it has a slot. One that takes longer
    is None too, and its name is added to trajectory.reward_timeouts. A reward that raises stops the
    run: a 0 in its place would be trained on.
    """
    ready = {name: r if isinstance(r, Reward) else Reward(r) for name, (r, _) in selected.items()}
    values, tasks = dict.fromkeys(ready), {}
    try:
        for name, reward in ready.items():
            if reward.instant:
                outcome = _outcome(reward, trajectory, example)
                values[name] = _checked(name, *outcome, trajectory, example)
            else:
                work = _in_time(name, reward, trajectory, example)
                tasks[name] = asyncio.ensure_future(work)
        await asyncio.gather(*tasks.values())
    finally:
        for task in tasks.values():  # of those that go on beside one that raised
            task.cancel()
    return values | {name: task.result() for name, task in tasks.items()}


async def _in_time(name, reward, trajectory, example):
    """Its value, or None at the deadline. Not asyncio.timeout: it would wait for ever for one that
    swallows its cancellation."""
    target = reward.function
    is_async = any(map(inspect.iscoroutinefunction, (target, type(target).__call__)))
    async with reward.slot():
        work = (_awaited if is_async else _in_thread)(target, trajectory, example)
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task}, timeout=reward.timeout)
        finally:
            in_time = task.done()
            task.cancel()
    if not in_time:
        trajectory.reward_timeouts.append(name)
        return None
    if task.cancelled():
        return _checked(name, None, RuntimeError("it cancelled itself"), trajectory, example)
    return _checked(name, *task.result(), trajectory, example)


def _outcome(function, trajectory, example):
    """(value, None) or (None, what it raised)."""
    try:
        return function(trajectory, example), None
    except BaseException as error:  # exit() too: it would end a thread, unseen
        return None, error


async def _awaited(function, trajectory, example):
    """The same of an async function."""
    try:
        return await function(trajectory, example), None
    except (Exception, SystemExit) as error:  # exit() would end the loop
        return None, error


async def _in_thread(function, trajectory, example):
    """The same, in a thread of its own: a pool would be full of those that hang."""
    return await start_thread(lambda: function(trajectory, example))[1]


def _checked(name, value, error, trajectory, example):
    """What a reward gave as a number, a list of numbers, or None; UserError for all else."""
    if error is None:
        try:
            return _numbers(name, value, trajectory)
        except (TypeError, ValueError, OverflowError) as wrong:
            error = wrong
    if isinstance(error, UserError):
        raise error
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    raise UserError(
        f"reward {name} failed on row {example['id'] + 1}: {type(error).__name__}: {error}{at}: "
        "let it return None where there is no reward"
    ) from error


def _numbers(name, value, trajectory):
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and len(value) != len(trajectory.turn_starts):
        turns = len(trajectory.turn_starts)
        raise UserError(f"reward {name} gave {len(value)} numbers for {turns} turns")
    numbers = [float(v) for v in values if v is not None and math.isfinite(v)]
    if len(numbers) < len(values):
        return None
    return numbers if isinstance(value, list) else numbers[0]


def summed(scores):
    """The values of `score` as one number each: the sum over the turns."""
    return {name: sum(v, 0.0) if isinstance(v, list) else v for name, v in scores.items()}


def by_turn(scores, selected):
    """The weighted sum of the rewards that are lists, turn by turn; None if none of them is."""
    weighed = [[x * selected[n][1] for x in v] for n, v in scores.items() if isinstance(v, list)]
    return [sum(turn) for turn in zip(*weighed, strict=True)] if weighed else None


def total(rewards, selected):
    """The weighted sum, or None if one that weighs something is None. Weight 0: only logged."""
    weighed = [(rewards[name], weight) for name, (_, weight) in selected.items() if weight]
    if any(value is None for value, _ in weighed):
        return None
    # rounded: 0.1 + 0.2 is no more than 0.3, and where rewards are equal nothing is learnt
    return float(round(math.fsum(value * weight for value, weight in weighed), 9))

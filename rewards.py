"""Rewards: functions (trajectory, example) -> float, or None where there is nothing to score.

    rewards = ("correct", "format:0.1", "my_rewards.py:shout:0.5")  # each with :weight, else 1
    reward_options = ("tool_bonus.cap=0.3", "judge.timeout=120")

A function sees the Trajectory of rollout.py (messages, calls, stop, …) and the data row; it may be
`async def`. Its keyword parameters with a type are options. A class of that name is made once, with
the options, when the run starts, and its instance is called. A list is a number for each turn.
Every reward also has the options timeout (seconds of one call) and concurrency (calls at once).

A reward that compares the samples of one prompt has a parameter `group`, the list of their
trajectories. Behind the row, (trajectory, example, group), it is asked for each of them. In the
place of the trajectory, (group, example), it is asked once, and gives one value for each of them.

All rewards look only at what the model wrote: grading/answers.py says what counts as its answer,
queries.py and programs.py there have those that run code, judge.py the one that asks a model,
calls.py the one that compares calls of a row's own functions.
"""

import asyncio
import functools
import inspect
import math
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

from grading.answers import answer, last_turn, places, words
from grading.answers import f1 as f1_of
from grading.calls import call_match, check_row, functions_of
from grading.equality import NotCompared, equal
from grading.gym import gym
from grading.judge import judge
from grading.programs import code_tests
from grading.queries import sql_match
from grading.ranking import ranking
from run import plugins
from run.config import UserError, near
from run.deadline import Exited, in_thread, in_time
from trajectory import MALFORMED, ToolCall, Trajectory

OPTIONS = "reward_options"  # the config key, for messages
GROUP = "group"  # the parameter of a reward that compares the samples of one prompt
# The fields of a trajectory that a reward may read, in the order of docs/rewards.md.
READABLE = (
    "messages", "stop", "answer", "calls", "new_tokens", "turn_starts", "ids", "mask", "logprobs",
    "group", "sample", "seconds", "version", "user_turns", "metrics", "example",
)  # fmt: skip

# ---- outcome


def correct(trajectory, example):
    """Gives 1.0 if the model's answer equals example["answer"], or one of them if it is a list.

    A unit (a percent or currency sign, words in `\\text{}`, or such as dollars or cm without it) is
    dropped where only one of the two has it: 50% is 50, not 0.5; two have to be the same. A whole
    number has to be written as one, or as 1.8e3 or `1.8 \\times 10^3`: `\\boxed{34*27}` or
    `\\boxed{10/2}` is the question again, not its answer. So is what is left to be done (`\\int`,
    `\\lim`, `\\cos`, …: equality._OPERATIONS) where the right answer has nothing of that kind.
    None, which is not learnt from, where there was no time to compare it, as many other answers had
    taken too long.
    Not covered: `\\sqrt{50}` is `5\\sqrt{2}`, so a task to simplify or to expand can be answered by
    its question.
    """
    golds = _golds(example, "correct")
    text = answer(trajectory, example)
    if text is None:
        return 0.0
    was_compared = True
    for gold in golds:
        try:
            if equal(text, gold):
                return 1.0
        except NotCompared:
            was_compared = False
    return 0.0 if was_compared else None


def exact_match(trajectory, example):
    """Gives 1.0 if the words of the model's answer are those of example["answer"], or of one of
    them if it is a list, as in SQuAD: whatever the case, the articles and the punctuation."""
    golds = _golds(example, "exact_match")
    answered = words(answer(trajectory, example) or "")
    if not answered:
        return 0.0
    return float(any(answered == words(gold) for gold in golds))


def f1(trajectory, example):
    """Measures how many words the model's answer shares with example["answer"], as in SQuAD: the
    harmonic mean of the share of its words that are right and the share of the right words that it
    has. If that is a list, the best of them. Weigh it with care: half an answer earns half."""
    golds = _golds(example, "f1")
    text = answer(trajectory, example)
    if text is None:
        return 0.0
    return max(f1_of(text, gold) for gold in golds)


def relaxed(trajectory, example, *, tolerance: float = 0.05):
    """Gives 1.0 if the model's answer is example["answer"], or one of them if it is a list, as
    ChartQA counts it (Masry et al. 2022, arXiv 2203.10244, after PlotQA): a number may be off by
    `tolerance` of the right one, 0.05 there; every other text has to be the same but for its case
    and the blanks around it. Years are numbers here, as there: 2010 for 2020 is right. Two forms
    are read that the code which is commonly used does not: 1,200 is 1200, and 12% is 12 (0.12
    there, so that only 12% is 12%)."""
    golds = _golds(example, "relaxed")
    text = answer(trajectory, example)
    if text is None:
        return 0.0
    return float(any(_is_near(text, str(gold), tolerance) for gold in golds))


def _is_near(text, gold, tolerance):
    expected = _plain_number(gold)
    number = _plain_number(text)
    if expected is None or number is None:
        return text.strip().lower() == gold.strip().lower()
    if expected == 0:
        return number == 0
    return abs(number - expected) <= tolerance * abs(expected)


def _plain_number(text):
    """Reads the number that a text is, in the forms that charts print; None if it is none."""
    text = text.strip().replace("\N{MINUS SIGN}", "-").removesuffix("%").strip()
    if not _PRINTED_NUMBER.fullmatch(text):
        return None
    return float(text.replace(",", ""))


# 12, 1,200, 1.5, .5
_PRINTED_NUMBER = re.compile(
    r"[-+]?(\d{1,3}(,\d{3}){1,60}|\d{1,300})(\.\d{0,300})?|[-+]?\.\d{1,300}"
)


def anls(trajectory, example, *, threshold: float = 0.5):
    """Measures how much of the text of example["answer"] the model's answer has, the best of
    several: 1 less the edit distance as a share of the longer text, whatever the case; 0.0 below
    `threshold`. It is the similarity of ST-VQA (Biten et al. 2019, arXiv 1905.13648), of which
    DocVQA and TextVQA's kind report the mean, ANLS: a letter misread costs little, another word
    everything."""
    golds = _golds(example, "anls")
    text = answer(trajectory, example)
    if text is None:
        return 0.0
    best = max(_similarity(text, str(gold)) for gold in golds)
    return best if best >= threshold else 0.0


def _similarity(text, gold):
    text = " ".join(text.lower().split())
    gold = " ".join(gold.lower().split())
    longer = max(len(text), len(gold))
    if not longer:
        return 0.0
    if longer > LONGEST_TEXT:  # no short answer at all, and slow to compare
        return float(text == gold)
    return 1 - _edit_distance(text, gold) / longer


LONGEST_TEXT = 1000  # characters: a longer answer is compared as a whole


def _edit_distance(first, second):
    """Counts how many letters to insert, leave out or replace (Levenshtein's distance)."""
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        above_left = row[0]
        row[0] = i
        for j, other in enumerate(second, 1):
            replaced = above_left + (letter != other)
            above_left = row[j]
            row[j] = min(replaced, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def vqa(trajectory, example):
    """Computes the soft accuracy of VQA and TextVQA (Antol et al. 2015, arXiv 1505.00468):
    example["answer"] is the list of what ten people answered, and an answer that n of nine gave
    counts min(n / 3, 1); of ten, the mean over those that leave one out: 0.3, 0.6, 0.9, 1.0 for
    what 1, 2, 3, 4 of them said. Whatever the case, the articles, the punctuation; two is 2."""
    golds = _golds(example, "vqa")
    if len(golds) < MIN_VOTES:
        raise UserError(
            f"reward vqa needs what at least {MIN_VOTES} people answered, as a list: row "
            f"{example['id'] + 1} has {len(golds)}; to one right answer compare by exact_match"
        )
    answered = _vote(answer(trajectory, example) or "")
    votes = [_vote(gold) for gold in golds].count(answered) if answered else 0
    others = len(golds) - votes
    with_all = min(votes / 3, 1.0)  # one that said something else is left out
    with_one_less = min(max(0, votes - 1) / 3, 1.0)  # one that said this is
    return (others * with_all + votes * with_one_less) / len(golds)


MIN_VOTES = 4  # of fewer, not even an answer that all gave would count 1
_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}


def _vote(text):
    """Splits an answer into the words that it is compared by."""
    return [_DIGITS.get(word, word) for word in words(text)]


def _golds(example, reward):
    """Lists the right answers. A row without one stops the run: it cannot be judged."""
    golds = example["answer"]
    if not isinstance(golds, list):
        golds = [golds]
    golds = [gold for gold in golds if gold]  # data sets fill lists with null
    if not golds:
        raise UserError(f"reward {reward} needs an answer, row {example['id'] + 1} has none")
    return golds


def oracle(name: str, example: dict) -> str | None:
    """Writes a last message that earns 1.0 from the reward of this name, for a dry run; None if
    that does not depend on the message, or the row does not say what would be right."""
    gold = example.get("solution" if name == "code_tests" else "answer")
    if name == "vqa" and isinstance(gold, list):  # what most said
        gold = max(gold, key=gold.count, default=None)
    if isinstance(gold, list) and gold:
        gold = gold[0]
    if not gold:
        return None
    if name in ("correct", "exact_match", "f1", "relaxed", "anls", "vqa"):
        return f"\\boxed{{{gold}}}"
    if name == "gym":  # may have several lines, and braces
        return f"<answer>{gold}</answer>"
    if name == "sql_match":
        return f"```sql\n{gold}\n```"
    if name == "code_tests":
        return f"```python\n{gold}\n```"
    return None


# ---- on the way


def format(trajectory, example):
    """Gives 1.0 if the model chose to end, made no malformed call, and gave just one answer."""
    if trajectory.stop != "answered":
        return 0.0
    if any(call.error in MALFORMED for call in trajectory.calls):
        return 0.0
    answers = places(last_turn(trajectory, example), True)
    if trajectory.answer is None:
        return float(len(answers) == 1)
    # given to a tool, once: what the text says beside must be the same
    finishing = [call for call in trajectory.calls if call.ends]
    own = functions_of(example)
    if any(call.name in own for call in finishing):  # all calls of such are one answer
        return 1.0
    if len(finishing) > 1:
        return 0.0
    answered = words(answer(trajectory, example))
    return float(all(words(text) == answered for text in answers))


def tool_use(trajectory, example):
    """Gives 1.0 if at least one call ran without an error; more calls do not give more. Give it a
    small weight and not for long: any call that runs is rewarded, a useless one too."""
    for call in trajectory.calls:
        if call.error is None and not call.ends:
            return 1.0
    return 0.0


def tool_bonus(trajectory, example, *, each: float = 0.1, cap: float = 0.2):
    """Gives `each` for every call that ran without an error, `cap` at most. The same call again
    earns nothing, but a useless one does: give it for a warm start, not for long."""
    ran = set()
    for call in trajectory.calls:
        if call.error is None and not call.ends:
            ran.add((call.name, repr(call.arguments)))
    return min(cap, each * len(ran))


def needed_tool(trajectory, example, *, tolerance: float = 0.05):
    """Gives 1.0 if the answer is right, as `relaxed` says, and a call that ran helped to it: where
    the row says "needs_tool", true or false, only a row that does need one earns it, and a row that
    does not earns 1.0 for the right answer without any. Unlike tool_use it pays for no call that
    led to nothing; a call that was made for show it cannot tell from one that helped."""
    if not relaxed(trajectory, example, tolerance=tolerance):
        return 0.0
    return float(bool(example.get("needs_tool", True)) == bool(tool_use(trajectory, example)))


def repeated_calls(trajectory, example, *, each: float = 0.1, cap: float = 0.5):
    """Gives -`each` for every call that was made before with the same arguments, -`cap` at most.
    Unlike repetition, it looks at calls alone, and does not weigh less in a long trajectory."""
    made = [(call.name, repr(call.arguments)) for call in trajectory.calls]
    return -min(cap, each * (len(made) - len(set(made))))


class tool_errors:
    """-`each` for every call that failed, -`cap` at most."""

    def __init__(self, kinds: tuple[str, ...] = (), each: float = 0.1, cap: float = 1.0):
        """kinds: those of ToolCall.error that count, such as bad_json,timeout:0.3, each with
        :penalty or else `each`; empty for all. UserError for one that cannot be read."""
        self.kinds = {}  # kind of error -> penalty
        self.each = each
        self.cap = cap
        for kind in kinds:
            name, _, penalty = kind.partition(":")
            try:
                self.kinds[name] = float(penalty) if penalty else each
            except ValueError:
                raise UserError(f"tool_errors.kinds: {kind!r}: expected kind:penalty") from None

    def __call__(self, trajectory, example):
        of_another_kind = 0.0 if self.kinds else self.each
        penalty = 0.0
        for call in trajectory.calls:
            if call.error:
                penalty += self.kinds.get(call.error, of_another_kind)
        return -min(self.cap, penalty)


def repetition(trajectory, example, *, n: int = 3):
    """Gives, from 0.0 down to -1.0, the share of the n-grams (of words and signs, in all that the
    model wrote between the calls) that it had written before, and the share of its calls that it
    had made before, with the same arguments."""
    grams = _grams(trajectory, example, n)
    calls = [(call.name, repr(call.arguments)) for call in trajectory.calls]
    return -min(1.0, _share_repeated(grams) + _share_repeated(calls))


_PARTS = re.compile(r"\w+|[^\w\s]")  # words and signs


def _grams(trajectory, example, n):
    """Lists the n-grams of words and signs in all that the model wrote between the calls."""
    grams = []
    prompt_length = len(example["messages"])
    for message in trajectory.messages[prompt_length:]:
        text = message.get("content")
        if message["role"] != "assistant" or not isinstance(text, str):
            continue
        parts = _PARTS.findall(text)
        for start in range(len(parts) - n + 1):
            gram = parts[start : start + n]
            grams.append(tuple(gram))
    return grams


def _share_repeated(items):
    if not items:
        return 0.0
    return 1 - len(set(items)) / len(items)


def length(trajectory, example, *, limit: int, buffer: int = 256):
    """Gives the soft overlong punishment (DAPO, arXiv 2503.14476): 0.0 up to limit - buffer tokens
    that the model wrote, in all turns together; from there linearly down to -1.0 at limit and
    above."""
    over = trajectory.new_tokens - (limit - buffer)
    if not buffer:
        return -1.0 if over >= 0 else 0.0
    return -min(1.0, max(0.0, over / buffer))


def turn_calls(trajectory, example):
    """Gives, for turn_credit, a number for each turn: 1.0 if it made calls and all of them ran,
    -1.0 if one failed, 0.0 for a turn without calls. Give it a small weight, as with tool_use."""
    values = [0.0 for _ in trajectory.turn_starts]
    for call in trajectory.calls:
        if call.turn >= len(values):  # the tools could not even be opened
            continue
        if call.error:
            values[call.turn] = -1.0
        elif values[call.turn] == 0.0:
            values[call.turn] = 1.0
    return values


def redundancy(trajectory, example, *, limit: int = 1):
    """Gives -1.0 for every call above `limit`: the penalty of Pixel Reasoner (arXiv 2505.15966),
    where it counts 0.05 and the limit is 1. A call that gives the answer is none."""
    return float(min(0, limit - _calls_made(trajectory)))


def _calls_made(trajectory):
    return sum(not call.ends for call in trajectory.calls)


# ---- against the others of the group


def curiosity(group, example, *, rate: float = 0.3):
    """Gives whoever called a tool how much the share of the group that did is below `rate`, else
    0.0: Pixel Reasoner's bonus (arXiv 2505.15966, where it counts 0.5), so that calling is not
    given up before it is learnt, and nothing is paid for it once it is common. Weigh it beside
    `redundancy`. (The code that was published with the paper pays another one.)"""
    callers = [_calls_made(trajectory) > 0 for trajectory in group]
    missing = max(0.0, rate - sum(callers) / len(group))
    return [missing if calls else 0.0 for calls in callers]


def diversity(group, example, *, n: int = 3):
    """Gives, from 0.0 to 1.0, how little a trajectory shares with each other one of its group, on
    average. What two share is the Jaccard index of their n-grams (of words and signs, in all that
    the model wrote between the calls) and their calls, with arguments. None where there is no
    other. It pays for wrong answers as for right ones: give it a small weight."""
    written = []
    for trajectory in group:
        calls = {(call.name, repr(call.arguments)) for call in trajectory.calls}
        written.append(calls | set(_grams(trajectory, example, n)))
    if len(group) == 1:
        return [None]
    values = []
    for i, mine in enumerate(written):
        shared = sum(_jaccard(mine, other) for j, other in enumerate(written) if j != i)
        values.append(1 - shared / (len(group) - 1))
    return values


def _jaccard(first, second):
    """Computes the share of what either has that both have; 1.0 where neither has anything."""
    either = len(first | second)
    return len(first & second) / either if either else 1.0


# ---- what environments and the Results of tools gave


def environment(trajectory, example):
    """Gives what the environments among the tools give their final states, by `reward(self,
    trajectory)`, added up. None where one of them gave none, or failed."""
    return trajectory.final_reward


def turn_results(trajectory, example):
    """Gives, for turn_credit, a number for each turn: the rewards that the Results of its calls
    carried, added up; 0.0 for a turn without one."""
    values = [0.0 for _ in trajectory.turn_starts]
    for call in trajectory.calls:
        if call.reward is not None:
            values[call.turn] += call.reward
    return values


def need_answer(names: Sequence[str]) -> bool:
    """Says whether rows have to have an answer for these rewards, as they are given to `select`:
    not where an environment or the row's own scorer says what is right, and the others look at how
    it was done."""
    plain = {name.partition(":")[0] for name in names}
    of_rows = {reward.__name__ for reward in (environment, gym, call_match)}
    how = {reward.__name__ for reward in (turn_results, *OF_THE_WAY)}
    return not plain & of_rows or not plain <= of_rows | how


def check_environments(toolbox, selected: dict) -> None:
    """Checks that what tools and environments give is asked for by a reward, and the other way
    round. selected: of `select`. UserError."""
    asked = _functions(selected)
    giving = [e.name for e in toolbox.environments if "reward" in e.hooks]
    if giving and environment not in asked:
        raise UserError(
            f"{giving[0]} has a reward that nothing asks for: name it, --rewards=environment, or "
            "environment:0 only to log it"
        )
    if environment in asked and not giving:
        raise UserError("reward environment has no effect: no class in tools has reward()")
    may_carry = toolbox.environments or any(t.gives_result for t in toolbox.tools.values())
    if turn_results in asked and not may_carry:
        why = "no tool is of an environment, or says that it returns one: def tool(…) -> Result"
        raise UserError(f"reward turn_results has no effect: {why}")


def check_rows(selected: dict, examples: list[dict]) -> None:
    """Checks, before anything is played, that rows say which calls are right, where a reward of
    theirs compares calls. selected: of `select`. UserError, with the row."""
    # 1. which rewards compare calls, and their options
    comparing = {}
    for name, (reward, _) in selected.items():
        function = reward.function
        options = {}
        if isinstance(function, functools.partial):
            options = function.keywords
            function = function.func
        if function is call_match:
            comparing[name] = options
    if not comparing:
        return

    # 2. the rows that are scored by them
    for example in examples:
        for name in for_row(selected, example):
            if name in comparing:
                check_row(example, **comparing[name])


def refuse_unasked(trajectory, selected: dict) -> None:
    """Refuses a reward that a Result carried where nothing asks for it."""
    carrying = [call.name for call in trajectory.calls if call.reward is not None]
    if carrying and turn_results not in _functions(selected):
        raise UserError(
            f"{carrying[0]} returned a Result with a reward that nothing asks for: name it, "
            "--rewards=…,turn_results, or turn_results:0 only to log it"
        )


def _functions(selected):
    """Lists the functions of the selected rewards."""
    rewards = [reward for reward, _ in selected.values()]
    return [reward.function if isinstance(reward, Reward) else reward for reward in rewards]


BUILT_IN = [
    correct, exact_match, f1, relaxed, anls, vqa, call_match, sql_match, code_tests, judge, format,
    tool_use, tool_bonus, needed_tool, tool_errors, repetition, repeated_calls, length, turn_calls,
    redundancy, curiosity, diversity, ranking, environment, turn_results, gym,
]  # fmt: skip
OF_THE_WAY = (  # whatever the answer is
    format, tool_use, tool_bonus, tool_errors, repetition, repeated_calls, length, turn_calls,
    redundancy, curiosity, diversity,
)  # fmt: skip
# They take microseconds and never wait, so they do without a thread, which takes 80.
INSTANT = [
    exact_match, f1, relaxed, vqa, call_match, format, tool_use, tool_bonus, needed_tool,
    tool_errors, repetition, repeated_calls, length, turn_calls, redundancy, curiosity, environment,
    turn_results,
]  # fmt: skip

# ---- names, weights and options


@dataclass
class Reward:
    """A reward with its options, ready to be called. It belongs to one event loop for its life."""

    function: Callable  # (trajectory, example), or with a group -> value
    instant: bool = False  # it never waits
    timeout: float = 60.0  # seconds of one call
    concurrency: int = 16  # calls at once
    abandoned: list = field(default_factory=list)  # threads and tasks past their deadline

    def __post_init__(self):
        self.slots = asyncio.Semaphore(self.concurrency)
        # a function, or an object whose __call__ is one
        candidates = (self.function, type(self.function).__call__)
        self.is_async = any(map(inspect.iscoroutinefunction, candidates))
        # "alone", or where it sees the group: "with_group" for each of it, "once" for all
        self.asked = _how_asked(self.function)

    def __call__(self, trajectory, example):
        return self.function(trajectory, example)


def _how_asked(function):
    parameters = list(inspect.signature(function).parameters)
    if GROUP not in parameters:
        return "alone"
    return "once" if parameters[0] == GROUP else "with_group"


def as_rewards(selected: dict) -> dict:
    """Makes a Reward of each plain function among the selected rewards."""
    rewards = {}
    for name, (reward, weight) in selected.items():
        if not isinstance(reward, Reward):
            reward = Reward(reward)
        rewards[name] = (reward, weight)
    return rewards


def see_groups(selected: dict) -> bool:
    """Says whether one of them compares the samples of a prompt."""
    return any(reward.asked != "alone" for reward, _ in as_rewards(selected).values())


@dataclass
class CommonOptions:
    """The options that every reward has."""

    timeout: float = 60.0
    concurrency: int = 16


COMMON = [option.name for option in fields(CommonOptions)]


def select(
    names: Sequence[str], options: Sequence[str] = (), timeout: float = 60.0
) -> dict[str, tuple[Reward, float]]:
    """Finds the rewards ("correct", "format:0.1", "my_rewards.py:shout:0.5") with their options
    ("tool_bonus.cap=0.3", …): {name: (reward, weight)}. timeout: seconds of a call, where no option
    says otherwise.

    A file is looked for here and then beside this one. Raises UserError for a wrong name, weight or
    option, and what a reward that is a class raises when it is made.
    """
    texts = plugins.parse_options(options, OPTIONS)  # {reward: {option: text}}
    functions = {}
    weights = {}
    modules = {}
    for text in names:
        name, function, weight = _find(text, modules)
        if name in functions:
            raise UserError(f"rewards: {name} is given twice: keep one of them")
        functions[name] = function
        weights[name] = weight
    if not functions:
        raise UserError("rewards is empty: expected at least one, such as correct")
    for name in texts:
        if name not in functions:
            hint = near(name, functions) or f" (rewards: {', '.join(functions)})"
            raise UserError(f"{OPTIONS}: {name!r} is not one of the rewards{hint}")

    selected = {}
    for name, function in functions.items():
        reward = _with_options(name, function, texts.get(name, {}), timeout)
        selected[name] = (reward, weights[name])
    return selected


def _find(text: str, modules: dict) -> tuple[str, Callable, float]:
    """Reads "name", "name:weight" or "file.py:name:weight" -> name, function or class, weight."""
    name, *parts = text.split(":")
    file = None
    if name.endswith(".py"):
        file = name
        path = plugins.find_file(file)
        if path is None:
            raise UserError(f"no reward file {file!r}")
        known = plugins.names_in(path)
        there = f"in {file} there are {', '.join(known)}"
        if not parts:
            raise UserError(f"rewards: {text!r} names no function: {there}")
        name, *parts = parts
    else:
        known = [function.__name__ for function in BUILT_IN]
        there = f"there are {', '.join(known)}"
    if name not in known:
        hint = near(name, known) or f": {there}, or write file.py:function"
        raise UserError(f"unknown reward {name!r} in {text!r}{hint}")

    weight = _weight(text, parts)
    if file:
        function = plugins.load(path, name, f"reward {text!r}", modules)
    else:
        function = BUILT_IN[known.index(name)]
    return name, function, weight


def _weight(text, parts):
    """Reads the weight in `parts`, what `text` has behind the name."""
    if not parts:
        return 1.0
    try:
        weight = float(parts[0])
    except ValueError:
        weight = math.nan
    if len(parts) > 1 or not math.isfinite(weight):
        raise UserError(f"rewards: cannot read the weight of {text!r}: expected a number")
    return weight


def _with_options(name: str, function: Callable, texts: dict, timeout: float) -> Reward:
    """Makes the Reward: binds its options {option: text}, instantiates a class."""
    where = f"{OPTIONS}: {name}"
    common_texts = {option: text for option, text in texts.items() if option in COMMON}
    own_texts = {option: text for option, text in texts.items() if option not in COMMON}

    limits = CommonOptions(timeout=timeout)
    limits = replace(limits, **plugins.bind(CommonOptions, common_texts, where))
    if limits.timeout <= 0 or limits.concurrency < 1:
        values = f"timeout {limits.timeout}, concurrency {limits.concurrency}"
        raise UserError(f"{OPTIONS}: {values}: expected > 0 seconds, and >= 1")
    if common_texts and function in INSTANT:
        option = next(iter(common_texts))
        raise UserError(f"{where}.{option} has no effect: it takes no time, so drop it")

    if isinstance(function, type):
        ready = function(**plugins.bind(function, own_texts, where))
        if not callable(ready):
            raise UserError(f"reward {name} is a class without __call__(trajectory, example)")
    else:
        # whatever their names are, the first two are the trajectory and the example
        not_options = [*list(inspect.signature(function).parameters)[:2], GROUP]
        values = plugins.bind(function, own_texts, where, skip=not_options)
        ready = functools.partial(function, **values) if values else function
    return Reward(ready, function in INSTANT, limits.timeout, limits.concurrency)


# ---- scores


def for_row(selected: dict, example: dict) -> dict:
    """Picks those of the selected rewards that a row has: what its `reward` names, or all."""
    names = example.get("reward")
    if not isinstance(names, list):
        return selected
    return {name: selected[name] for name in names}


async def score(trajectory, example, selected) -> dict:
    """Asks all selected rewards but those that see the group: {name: value}, unweighted; None where
    one is None, NaN or infinite. A value is a number, or a list of numbers, one for each turn of
    the model.

    All are asked at once, each for its own seconds, from when it has a slot. One that takes longer
    is None too, and its name is added to trajectory.reward_timeouts. A reward that raises stops the
    run: a 0 in its place would be trained on.
    """
    questions = {}
    for name, (reward, _) in as_rewards(selected).items():
        if reward.asked == "alone":
            questions[name] = Question(name, reward, trajectory, example)
    answers = await _ask_all(questions)
    return {name: answers[name] for name in questions}  # in the order of `selected`


async def score_group(group: list[Trajectory], selected) -> list[dict]:
    """Asks, as `score` does, the rewards that see the group, for each of its trajectories, in
    order. group: all samples of one prompt, of which each has ended; their own rewards may be read
    in trajectory.rewards. A reward that is asked once and takes too long is None for all of
    them."""
    selected = as_rewards(selected)
    example = group[0].example
    questions = {}
    for name, (reward, _) in selected.items():
        if reward.asked == "once":
            questions[name] = Question(name, reward, None, example, group)
        elif reward.asked == "with_group":
            for i, trajectory in enumerate(group):
                questions[name, i] = Question(name, reward, trajectory, example, group)
    answers = await _ask_all(questions)

    values = []
    for i in range(len(group)):
        of_one = {}
        for name, (reward, _) in selected.items():
            if reward.asked == "once":
                of_one[name] = answers[name][i]
            elif reward.asked == "with_group":
                of_one[name] = answers[name, i]
        values.append(of_one)
    return values


@dataclass
class Question:
    """What one reward is asked: the value of a trajectory, or "once" of each of its group."""

    name: str
    reward: Reward
    trajectory: Trajectory | None
    example: dict
    group: list[Trajectory] | None = None

    def bound(self) -> Callable:
        """Gives the reward with its arguments, ready to be called."""
        function = self.reward.function
        if self.reward.asked == "once":
            return functools.partial(function, self.group, self.example)
        if self.reward.asked == "with_group":
            return functools.partial(function, self.trajectory, self.example, group=self.group)
        return functools.partial(function, self.trajectory, self.example)

    def read(self, value):
        """Returns what the reward gave as numbers. Raises for what is none."""
        if self.reward.asked != "once":
            return _numbers(self.name, value, self.trajectory)
        if not isinstance(value, list) or len(value) != len(self.group):
            raise UserError(
                f"reward {self.name} gave {value!r:.80} for a group of {len(self.group)}: expected "
                "a list with one number for each of them"
            )
        pairs = zip(value, self.group, strict=True)
        return [_numbers(self.name, of_one, trajectory) for of_one, trajectory in pairs]

    def too_late(self):
        """Returns what counts at the deadline, and notes it."""
        if self.reward.asked != "once":
            self.trajectory.reward_timeouts.append(self.name)
            return None
        for trajectory in self.group:
            trajectory.reward_timeouts.append(self.name)
        return [None for _ in self.group]


async def _ask_all(questions: dict) -> dict:
    """Asks all questions {key: Question} at once; returns {key: answer}."""
    answers = {}
    tasks = {}
    try:
        for key, question in questions.items():
            if question.reward.instant:
                answers[key] = _answer_now(question)
            else:
                tasks[key] = asyncio.create_task(_answer_in_time(question))
        await asyncio.gather(*tasks.values())
    finally:
        for task in tasks.values():  # of those that go on beside one that raised
            task.cancel()
    for key, task in tasks.items():
        answers[key] = task.result()
    return answers


def _answer_now(question):
    """Asks a reward that never waits."""
    try:
        call = question.bound()
        return question.read(call())
    except Exception as error:
        _end_run(question.name, error, question.example)


async def _answer_in_time(question):
    """Asks a reward; returns its answer, or what counts at its deadline."""
    reward = question.reward
    call = question.bound()
    async with reward.slots:
        try:
            work = call() if reward.is_async else in_thread(call, reward.abandoned)
            is_done, value = await in_time(work, reward.timeout, reward.abandoned)
            if is_done:
                return question.read(value)
        except Exited as exited:  # exit() would else end its thread or the loop, unseen
            _end_run(question.name, exited.error, question.example)
        except Exception as error:
            _end_run(question.name, error, question.example)
    return question.too_late()


def _end_run(name, error, example):
    """Raises a UserError that says where a reward raised `error`."""
    if isinstance(error, UserError):
        raise error
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    raise UserError(
        f"reward {name} failed on row {example['id'] + 1}: {type(error).__name__}: {error}{at}: "
        f"{_remedy(error, example)}"
    ) from error


def _remedy(error, example):
    """Says what to do about an error of a reward: where it read what is not there, what is."""
    if isinstance(error, AttributeError):
        wanted = error.obj
        if isinstance(wanted, dict) and "role" in wanted:
            return f"a message is a dict, write message[{error.name!r}]; it has {', '.join(wanted)}"
        if isinstance(wanted, dict) and wanted.keys() >= {"id", "messages"}:
            return f"the row is a dict, write example[{error.name!r}]; it has {', '.join(wanted)}"
        if isinstance(wanted, Trajectory):
            return f"a trajectory has {', '.join(READABLE)}: see docs/rewards.md"
        if isinstance(wanted, ToolCall):
            names = [field.name for field in fields(ToolCall)]
            return f"a call has {', '.join(names)}: see docs/rewards.md"
    remedy = "let it return None where there is no reward"
    if isinstance(error, KeyError):
        return f"{remedy}; the row has {', '.join(example)}"
    return remedy


def _numbers(name, value, trajectory):
    """Reads what a reward gave, as a number, a list of numbers, or None if one is none, NaN or
    infinite.

    Raises TypeError, ValueError or OverflowError for what is no number."""
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and len(value) != len(trajectory.turn_starts):
        turns = len(trajectory.turn_starts)
        raise UserError(f"reward {name} gave {len(value)} numbers for {turns} turns")
    numbers = []
    for number in values:
        if number is None or not math.isfinite(number):
            return None
        numbers.append(float(number))
    return numbers if isinstance(value, list) else numbers[0]


def summed(scores: dict) -> dict:
    """Sums each value of `score` over the turns, to one number."""
    sums = {}
    for name, value in scores.items():
        sums[name] = sum(value, 0.0) if isinstance(value, list) else value
    return sums


def by_turn(scores: dict, selected: dict) -> list[float] | None:
    """Sums, weighted, the rewards that are lists, turn by turn; None if none of them is."""
    weighted = []  # a list of turns for each of these rewards
    for name, value in scores.items():
        if isinstance(value, list):
            weight = selected[name][1]
            weighted.append([number * weight for number in value])
    if not weighted:
        return None
    return [sum(turn) for turn in zip(*weighted, strict=True)]


def total(rewards: dict, selected: dict) -> float | None:
    """Computes the weighted sum, None if one that weighs something is. Weight 0: only logged."""
    terms = []
    for name, (_, weight) in selected.items():
        if weight == 0:
            continue
        if rewards[name] is None:
            return None
        terms.append(rewards[name] * weight)
    # rounded: 0.1 + 0.2 is no more than 0.3, and where rewards are equal nothing is learnt
    return float(round(math.fsum(terms), 9))

"""Rewards: plain functions (trajectory, example) -> float, or None where there is nothing to score.

    rewards = ("correct", "format:0.1", "my_rewards.py:shout:0.5")  # each with :weight, else 1

A function sees the Trajectory of rollout.py (messages, calls, stop, …) and the data row. Only what
the model wrote in its last turn, after its thoughts, is an answer: not the prompt, not a tool's
output, not code. Where it is: the first of these that the turn has, and of several the last one.
`\\boxed{…}`, `<answer>…</answer>`, the line after `####`, the line after "answer is" or "Answer:".
A bare number in the text is no answer: else a model that writes all numbers it saw is rewarded.
In a turn that did not end by its own choice only the first two count, because a line may be cut.
"""

import functools
import importlib.util
import json
import logging
import math
import re
import signal
import subprocess
import sys
import threading
import traceback
import types
from fractions import Fraction
from pathlib import Path

from config import HERE, UserError, near

MALFORMED = {"bad_json", "unknown_tool", "bad_arguments"}  # ToolCall.error of calls that never ran
LONGEST = 300  # characters of an answer: nobody's answer is longer, and comparing takes time
DEADLINE = 2  # seconds that math-verify has for one comparison


def correct(trajectory, example):
    """1.0 if the answer of the last turn equals example["answer"], or one of them if it is a list.

    A percent sign, a currency and units are dropped: 50% is 50, not 0.5. A whole number has to be
    written as one: `\\boxed{34*27}` or `\\boxed{10/2}` is the question again, not its answer.
    """
    answers = example["answer"]
    if not answers:
        raise UserError(f"reward correct needs an answer, row {example['id'] + 1} has none")
    said = answer(trajectory, example)
    if said is None:
        return 0.0
    answers = answers if isinstance(answers, list) else [answers]
    return float(any(equal(said, gold) for gold in answers))


def format(trajectory, example):
    """1.0 if the model ended by its own choice, made no malformed call and gave just one answer."""
    if trajectory.stop != "answered" or any(c.error in MALFORMED for c in trajectory.calls):
        return 0.0
    return float(len(_places(_last_turn(trajectory, example), True)) == 1)


def tool_use(trajectory, example):
    """1.0 if at least one call ran without an error; more calls do not give more. Give it a small
    weight and not for long: any call that runs is rewarded, a useless one too."""
    return float(any(call.error is None for call in trajectory.calls))


def turn_calls(trajectory, example):
    """For turn_credit, a number for each turn: 1.0 if it made calls and all of them ran, -1.0 if
    one failed, 0.0 for a turn without calls. Give it a small weight, as with tool_use."""
    errors = [[] for _ in trajectory.turn_starts]
    for call in trajectory.calls:
        if call.turn < len(errors):  # not so where the tools could not even be opened
            errors[call.turn].append(call.error)
    return [(-1.0 if any(each) else 1.0) if each else 0.0 for each in errors]


def select(names):
    """{name: (function, weight)} of ("correct", "format:0.1", "my_rewards.py:shout:0.5").

    A file is looked for here and then beside this one. Raises UserError for a wrong name or weight.
    """
    selected = {}
    for text in names:
        name, *rest = text.split(":")
        if name.endswith(".py"):
            found, there = _functions(name), f"in {name} there are"
            if not rest:
                raise UserError(f"rewards: {text!r} names no function: {there} {', '.join(found)}")
            name, *rest = rest
        else:
            found, there = (
                {f.__name__: f for f in (correct, format, tool_use, turn_calls)},
                "there are",
            )
        if name not in found:
            hint = near(name, found) or f": {there} {', '.join(found)}, or write file.py:function"
            raise UserError(f"unknown reward {name!r} in {text!r}{hint}")
        if name in selected:
            raise UserError(f"rewards: {name} is given twice: keep one of them")
        selected[name] = found[name], _weight(text, rest)
    if not selected:
        raise UserError("rewards is empty: expected at least one, such as correct")
    return selected


def score(trajectory, example, selected):
    """{name: value} of all selected rewards, unweighted; None where one is None, NaN or infinite.
    A value is a number, or a list of numbers, one for each turn of the model.

    A reward that raises stops the run: a 0 in its place would be trained on.
    """
    rewards = {}
    for name, (function, _) in selected.items():
        try:
            value = function(trajectory, example)
            values = value if isinstance(value, list) else [value]
            if isinstance(value, list) and len(value) != len(trajectory.turn_starts):
                turns = len(trajectory.turn_starts)
                raise UserError(f"reward {name} gave {len(value)} numbers for {turns} turns")
            numbers = [float(v) for v in values if v is not None and math.isfinite(v)]
            whole = numbers if isinstance(value, list) else numbers[0] if numbers else None
            rewards[name] = whole if len(numbers) == len(values) else None
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # exit() would end the loop's thread, silently
            at = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"reward {name} failed on row {example['id'] + 1}: {type(error).__name__}: {error} "
                f"({at.filename}, line {at.lineno}): let it return None where there is no reward"
            ) from error
    return rewards


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
    return float(sum(value * weight for value, weight in weighed))


def answer(trajectory, example):
    """What the model gave as its answer in its last turn, or None."""
    places = _places(_last_turn(trajectory, example), trajectory.stop == "answered")
    return places[-1] if places else None


def equal(said, gold):
    """Whether two answers are the same: exactly as numbers, else as text, else by math-verify."""
    if max(len(said), len(gold)) > LONGEST:
        return False
    said, gold = (re.sub(r"\\[()\[\]]", "", text) for text in (said, gold))  # \( 18 \)
    (number, fraction), (gold_number, _) = _number(said), _number(gold)
    if gold_number is not None and gold_number.denominator == 1:
        return number == gold_number and not fraction
    if number is not None and gold_number is not None:
        return number == gold_number
    said, gold = _plain(said), _plain(gold)
    if said.casefold() == gold.casefold() or not said or not gold:
        return said.casefold() == gold.casefold() != ""
    # Words are compared as words only: as math they are products of letters, and Carol is Calor.
    if _WORD.search(said) or _WORD.search(gold) or not _MATH.search(gold):
        return False
    return _same_math(said, gold)


# ---- where the answer is

_NO_ANSWER = re.compile(r"<(tool_call|tool_response)>.*?(?:</\1>|\Z)|```.*?(?:```|\Z)", re.S)
_BRACE = re.compile(r"(\\boxed\s*\{)|\\.|([{}])", re.S)
_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.S)
# After "answer is", up to the end of the line, or of the sentence: "The answer is 18. I hope …"
_LINE = re.compile(
    r"\banswer(?:\s+is\b\s*:?|\s*:)[\s*]*(\S[^\n]*?)(?:(?<=[\d$%})*])\.\s|$)", re.I | re.M
)


def _last_turn(trajectory, example):
    """The text of the last turn, if it is the model's: without thoughts, calls and code."""
    messages = trajectory.messages[len(example["messages"]) :]  # few-shot answers are not its own
    if not messages or messages[-1]["role"] != "assistant":
        return ""
    text = messages[-1].get("content") or ""
    if isinstance(text, list):  # content parts, as vision models have them
        text = "\n".join(part["text"] for part in text if part["type"] == "text")
    text = text.rpartition("</think>")[2]  # the prompt may have opened the first one
    if "<think>" in text:  # never closed: what follows is still thought, so nothing is answered
        return ""
    return _NO_ANSWER.sub("", text)


def _places(text, ended):
    """The answers declared in the text, all of one kind. ended: the model stopped by itself."""
    kinds = [_boxed(text), _TAG.findall(text)]
    if ended and not any(kinds):
        kinds += [re.findall(r"####[ \t]*([^\n]*)", text), _LINE.findall(text)]
    return next((found for found in kinds if found), [])


def _boxed(text):
    r"""The contents of all closed \boxed{…}, in order; of nested ones the innermost."""
    stack, found = [], []
    for match in _BRACE.finditer(text):
        if match[1] or match[2] == "{":
            stack.append((match.end(), bool(match[1])))
        elif match[2] == "}" and stack:
            start, boxed = stack.pop()
            if boxed and not (found and found[-1][0] >= start):
                found.append((start, text[start : match.start()]))
    return [inside for _, inside in found]


# ---- when two answers are equal

_SPACES = re.compile(r"\\[,;:! ]|\\q?quad\b|[\s~\u00a0\u202f]+")
_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}")
_UNITS = re.compile(
    r"\\(?:text|mathrm|mbox)\s*\{[^{}\d]*\}(?:\^\{?\d\}?)?|\\?[$%€£]|\^\{?\\circ\}?|°"
)
_THOUSANDS = re.compile(r"(?<=\d)(?:,\\!|\{,\}|\\,|,)(?=\d{3}(?!\d))")
_DECIMAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
_FRACTION = re.compile(
    r"([+-]?)(?:\\[dt]?frac(?:\{([+-]?\d+)\}\{(\d+)\}|(\d)(\d))|(\d+) ?/ ?(\d+))"
)
_WORD = re.compile(
    r"(?<![\\A-Za-z])(?<!begin\{)(?<!end\{)(?!(?:sin|cos|tan|log|exp|sqrt)\b)[A-Za-z]{3,}"
)
_MATH = re.compile(r"[\d\\^=+*/()\[\]<>|]")


def _number(text):
    """(value, whether it is written as a fraction); (None, False) for what is not one number."""
    text = _TEXT.sub(r"\1", _UNITS.sub("", text.replace("−", "-")))
    text = _SPACES.sub(" ", _THOUSANDS.sub("", text)).strip(" *`").rstrip(" .*`")
    text = re.sub(r"^[A-Za-z] ?= ?", "", text)  # x = 5
    if _DECIMAL.fullmatch(text):
        return Fraction(text), False
    match = _FRACTION.fullmatch(text)
    if not match:
        return None, False
    sign, *parts = (part for part in match.groups() if part is not None)
    above, below = map(int, parts)
    return (Fraction(above, below) * (-1 if sign == "-" else 1), True) if below else (None, False)


def _plain(text):
    """Text without what surrounds an answer: quotes, stops, dollars, an article, `\\text{}`."""
    text = " ".join(_TEXT.sub(r"\1", text).split()).strip(' .,;:*`"$“”‘’')
    text = re.sub(r"^\(([A-Za-z])\)$", r"\1", text)  # (B), of a multiple choice
    return re.sub(r"^(?:the|an?)\s+(?=\w{2})", "", text, flags=re.I)


class _MathVerify:
    """math-verify in a process of its own: it has no deadline in a thread, and nothing but the end
    of its process stops the 9**9**9**9 that a model may write."""

    def __init__(self):
        self.lock, self.process = threading.Lock(), None

    def same(self, said, gold):
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.start()
            try:
                print(json.dumps([said, gold]), file=self.process.stdin, flush=True)
                reply = self.process.stdout.readline()
            except BrokenPipeError:  # out of memory, say
                reply = ""
            except BaseException:  # Ctrl-C: the reply would be taken for the next one's
                self.stop()
                raise
            if not reply:  # its alarm ended it
                self.stop()
            return reply == "True\n"

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,  # whose end, when this process ends, ends that one
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is not for it
        )
        if self.process.stdout.readline() != "ready\n":
            self.stop()
            raise RuntimeError("math-verify does not start: pip install math-verify")

    def stop(self):
        process, self.process = self.process, None
        process.kill()
        process.communicate()


_math_verify = _MathVerify()


@functools.lru_cache(maxsize=10_000)
def _same_math(said, gold):
    return _math_verify.same(said, gold)


def _serve():
    """The other side of _MathVerify: two answers per line of stdin, True or False on stdout."""
    import resource

    from math_verify import parse, verify

    logging.disable()  # it warns that it has no timeout: it has one
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, even inside a C function
    if sys.platform == "linux":  # a MemoryError, which math-verify takes for "not equal"
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    print("ready", flush=True)
    for line in sys.stdin:
        said, gold = (f"\\boxed{{{text}}}" for text in json.loads(line))
        signal.alarm(DEADLINE)
        said, gold = parse(said, parsing_timeout=None), parse(gold, parsing_timeout=None)
        same = verify(gold, said, timeout_seconds=None)
        signal.alarm(0)
        print(same, flush=True)


# ---- names and weights


def _functions(file):
    """The public functions that a python file defines, by name."""
    path = next((p for p in (Path(file), HERE / file) if p.is_file()), None)
    if path is None:
        raise UserError(f"no reward file {file!r}")
    spec = importlib.util.spec_from_file_location(f"rewards in {path}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # what is wrong in it keeps its traceback
    functions = {k: v for k, v in vars(module).items() if isinstance(v, types.FunctionType)}
    return {name: value for name, value in functions.items() if not name.startswith("_")}


def _weight(text, rest):
    try:
        weight = float(rest[0]) if rest else 1.0
    except ValueError:
        weight = math.nan
    if len(rest) > 1 or not math.isfinite(weight):
        raise UserError(f"rewards: cannot read the weight of {text!r}: expected a number")
    return weight


if __name__ == "__main__":
    _serve()

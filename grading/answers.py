"""Where a model's answer is, and when two answers are equal. Nothing here knows of rewards.

Only what the model wrote in its last turn, after its thoughts, is an answer: not the prompt, not a
tool's output, not a call, not code. What it gave to a tool that ends the episode (tools/finish.py)
is the answer. Else the answer is the first of these that the turn has, and of several the last one.
`\\boxed{…}`, `<answer>…</answer>`, the line after `####`, the line after "answer is" or "Answer:".
A bare number in the text is no answer: else a model that writes all numbers it saw is rewarded.
In a turn that did not end by its own choice only the first two count, because a line may be cut.
"""

import functools
import json
import re
import string
from collections import Counter
from fractions import Fraction
from pathlib import Path

from run.worker import Worker, WorkerDied

LONGEST = 300  # characters of an answer: nobody's answer is longer, and comparing takes time
DEADLINE = 2  # seconds that math-verify has for one comparison

# ---- where the answer is

_THOUGHT_END = re.compile(r"</think>|\[/THINK\]")
_CALL = re.compile(r"<(tool_call|tool_response)>.*?(?:</\1>|\Z)", re.S)
# The other formats' calls, where there may be one: in a tag of any name but those of HTML, or all
# behind [TOOL_CALLS]. Not in a block of code, nor in vector<int>. One that was cut has no end.
_OPENING = r"(?<!\w)<(?!(?:answer|br|hr|p|b|i|u|em|[uo]l|li|su[bp]|strong|div|span)>)([\w.-]+)>"
_ANY_CALL = re.compile(rf"(```.*?```)|{_OPENING}.*?</\2>|\[TOOL_CALLS\].*", re.S)
_CUT_CALL = re.compile(rf"(```.*?```)|{_OPENING}.*", re.S)
_OBJECT = re.compile(
    r'\s*(?:<\|python_tag\|>|\{\s*"(?:name|parameters|arguments|type|thought|actions)"\s*:)'
)
_CODE = re.compile(r"```.*?(?:```|\Z)", re.S)
_BLOCK = re.compile(r"```([^\n`]*)\n(.*?)```", re.S)
_BRACE = re.compile(r"(\\boxed\s*\{)|\\.|([{}])", re.S)
_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.S)
# After "answer is", up to the end of the line, or of the sentence: "The answer is 18. I hope …"
_LINE = re.compile(
    r"\banswer(?:\s+is\b\s*:?|\s*:)[\s*]*(\S[^\n]*?)(?:(?<=[\d$%})*])\.\s|$)", re.I | re.M
)


def answer(trajectory, example):
    """Returns what the model gave as its answer, or None."""
    if trajectory.answer is not None:  # to a tool: as it would be in a turn, or plain
        answers = places(trajectory.answer, True)
        return answers[-1] if answers else trajectory.answer.strip()
    answers = places(last_turn(trajectory, example), trajectory.stop == "answered")
    return answers[-1] if answers else None


def program(trajectory, example, languages):
    """Returns the program or query that the model gave as its answer, or None: to a tool that ends
    the episode, else in the last block ```language of the last turn. Only a block that is closed:
    the rest of another may be missing. languages: the names that count, such as ("python", "py").
    """
    blocks = _BLOCK.findall(last_message(trajectory, example))
    programs = [code for language, code in blocks if language.strip().lower() in languages]
    return programs[-1] if programs else trajectory.answer


def last_message(trajectory, example):
    """Returns what the model gave to a tool that ends the episode, else its last turn, without
    thoughts and calls."""
    if trajectory.answer is not None:
        return trajectory.answer
    return _last_text(trajectory, example)


def last_turn(trajectory, example):
    """Returns the text of the last turn, if it is the model's: without thoughts, calls and code."""
    return _CODE.sub("", _last_text(trajectory, example))


def _last_text(trajectory, example):
    """The text of the last turn, if it is the model's: without thoughts and calls."""
    messages = trajectory.messages[len(example["messages"]) :]  # few-shot answers are not its own
    if not messages or messages[-1]["role"] != "assistant":
        return ""
    texts = []
    for message in messages:
        if message["role"] != "assistant":
            continue
        text = message.get("content") or ""
        if isinstance(text, list):  # content parts, as vision models have them
            text = "\n".join(part["text"] for part in text if part["type"] == "text")
        texts.append(text)

    # A thought that was never closed: what follows is still thought, so nothing is answered. Of all
    # turns, because in some formats a call inside of a thought is run.
    behind = _THOUGHT_END.split("\n".join(texts))[-1]
    if "<think>" in behind or "[THINK]" in behind:
        return ""
    text = _THOUGHT_END.split(texts[-1])[-1]  # the prompt may have opened the first one

    # what is said in json_actions, or in plain text: without the calls
    if text.lstrip().startswith("{") and '"actions"' in text:
        thought = _json_thought(text)
        if thought is not None:
            return _CALL.sub("", thought)
    text = _CALL.sub("", text)
    if trajectory.stop == "answered" and trajectory.answer is None:  # it made no call
        return text
    if _OBJECT.match(text):  # it is a call as a whole
        return ""
    text = _ANY_CALL.sub(r"\1", text)
    if trajectory.stop == "length":
        text = _CUT_CALL.sub(r"\1", text)
    return text


def _json_thought(text):
    """What an answer in the format json_actions says, None for an object that is none."""
    try:
        turn = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if turn.get("actions") != []:
        return None
    thought = turn.get("thought")
    return thought if isinstance(thought, str) else None


def places(text, ended):
    """Returns the answers declared in the text, all of one kind. ended: the model stopped by
    itself."""
    answers = _boxed(text) or _TAG.findall(text)
    if answers or not ended:
        return answers
    # a heading is better than nothing
    return _after_hashes(text.rstrip()) or _LINE.findall(text) or _HASHES.findall(text)


def _after_hashes(text):
    """The lines after `####`, but no heading: one without a digit that is not the last line."""
    lines = []
    for match in _HASHES.finditer(text):
        is_last = match.end() == len(text)
        if is_last or re.search(r"\d", match[1]):
            lines.append(match[1])
    return lines


def _boxed(text):
    r"""The contents of all closed \boxed{…}, in order; of nested ones the innermost."""
    open_braces = []  # (where its content begins, whether \boxed stands before it)
    contents = []
    last_start = -1  # of the last of the contents
    for match in _BRACE.finditer(text):
        if match[1] or match[2] == "{":
            open_braces.append((match.end(), bool(match[1])))
        elif match[2] == "}" and open_braces:
            start, is_boxed = open_braces.pop()
            has_one_inside = last_start >= start
            if is_boxed and not has_one_inside:
                contents.append(text[start : match.start()])
                last_start = start
    return contents


# ---- when two answers are equal


def equal(given, gold):
    """Says whether two answers are the same: exactly as numbers, else as text, else by
    math-verify."""
    if max(len(given), len(gold)) > LONGEST:
        return False
    given = _MATH_MARKS.sub("", given).strip()
    gold = _MATH_MARKS.sub("", gold).strip()

    # as numbers
    given_unit = _unit(given)
    gold_unit = _unit(gold)
    if given_unit and gold_unit and given_unit != gold_unit:  # 5 hours is 5, not 5 minutes
        return False
    given = _UNIT_WORD.sub("", given)
    gold = _UNIT_WORD.sub("", gold)
    number, is_fraction = _number(given)
    gold_number, _ = _number(gold)
    if gold_number is not None and gold_number.denominator == 1:
        return number == gold_number and not is_fraction
    if number is not None and gold_number is not None:
        return number == gold_number

    # as text
    given = _plain(given)
    gold = _plain(gold)
    if not given or not gold:
        return False
    if given.casefold() == gold.casefold():
        return True
    # Words are compared as words only: as math they are products of letters, and Carol is Calor.
    if _WORD.search(given) or _WORD.search(gold) or not _MATH.search(gold):
        return False

    # as math. An operation that is left to be done is the question again: the integral, and not its
    # value.
    for operation in _OPERATIONS:
        if operation.search(given) and not operation.search(gold):
            return False
    return _same_math(given, gold)


_MATH_MARKS = re.compile(r"\\[()\[\]]")  # around mathematics
_SPACES = re.compile(r"\\[,;:! ]|\\q?quad\b|[\s~\u00a0\u202f]+")
_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}")
_UNITS = re.compile(
    r"(?:\\(?:text|mathrm|mbox)\s*\{[^{}\d]*\}(?:\^\{?\d\}?)?|\\?[$%€£]|\^\{?\\circ\}?|°)+"
)
_UNIT_WORD = re.compile(
    r"(?<=[\d$}]) (?:(?:square|cubic) )?(?:dollars?|cents?|euros?|pounds?|percent|degrees?|[mck]m"
    r"|(?:centi|kilo|milli)?met(?:er|re)s?|inch(?:es)?|f(?:ee|oo)?t|yards?|miles?|kg|mg"
    r"|(?:kilo)?grams?|oz|ounces?|lbs?|ml|lit(?:er|re)s?|gallons?|seconds?|minutes?|hours?|days?"
    r"|weeks?|months?|years?|mph|km/h|m/s|units?)(?:\^\{?[23]\}?)?\.?$",
    re.I,
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
_OPERATIONS = [  # those that math-verify does; one kind each
    re.compile(operation)
    for operation in (
        r"\\(?:i{0,3}|o)int(?![A-Za-z])",
        r"\\lim",
        r"\\sum",
        r"\\prod",
        r"\\[dt]?frac\s*\{?\s*(?:d|\\partial).*\{\s*(?:d|\\partial)\s*\\?[A-Za-z]",
        r"\\[dt]?binom|\\choose|(?<!\\)!",
        r"\\det|vmatrix",
        r"\\gcd|\\lcm|mod(?![A-Za-z])",
        r"\\(?:max|min|sup|inf)(?![A-Za-z])",
        r"\\[lr](?:floor|ceil)",
        r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)",
        r"\\(?:ln|log|lg)(?![A-Za-z])",
    )
]


def _unit(text):
    """The word of a unit at its end, "" if there is none."""
    words_apart = " ".join(_TEXT.sub(r" \1", text).split())
    match = _UNIT_WORD.search(words_apart)
    return match[0].strip(" .").casefold() if match else ""


def _number(text):
    """(value, whether it is written as a fraction); (None, False) for what is not one number."""
    text = text.replace("−", "-").replace(r"\text{,}", "{,}")
    text = _TEXT.sub(r"\1", _UNITS.sub(_gap, text))
    text = _SPACES.sub(" ", _THOUSANDS.sub("", text)).strip(" *`").rstrip(" .*`")
    text = re.sub(r"^[A-Za-z] ?= ?", "", text)  # x = 5
    if _DECIMAL.fullmatch(text):
        return Fraction(text), False
    match = _FRACTION.fullmatch(text)
    if not match:
        return None, False
    sign = match[1]
    above, below = (int(part) for part in match.groups()[1:] if part is not None)
    if below == 0:
        return None, False
    value = Fraction(above, below)
    return (-value if sign == "-" else value), True


def _gap(unit):
    """What is left of a unit: a blank between two digits, which are two numbers."""
    before = unit.string[unit.start() - 1 : unit.start()]
    behind = unit.string[unit.end() : unit.end() + 1]
    return " " if before.isdigit() and behind.isdigit() else ""


def _plain(text):
    """Text without what surrounds an answer: quotes, stops, dollars, an article, `\\text{}`."""
    text = " ".join(_TEXT.sub(r"\1", text).split()).strip(' .,;:*`"$“”‘’')
    text = re.sub(r"^\(([A-Za-z])\)$", r"\1", text)  # (B), of a multiple choice
    return re.sub(r"^(?:the|an?)\s+(?=\w{2})", "", text, flags=re.I)


# ---- the usual measures of question answering

_ARTICLES = {"a", "an", "the"}
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text):
    """Returns the words of an answer as SQuAD compares them: lower case, without punctuation and
    articles, unless nothing is left then: "The Who" is who, "A" is a."""
    everything = _TEXT.sub(r"\1", text).lower().translate(_NO_PUNCTUATION).split()
    without_articles = [word for word in everything if word not in _ARTICLES]
    return without_articles or everything


def f1(given, gold):
    """Returns the harmonic mean of the share of the words given that are right and of the right
    ones that are given."""
    given_words = words(given)
    gold_words = words(gold)
    common = sum((Counter(given_words) & Counter(gold_words)).values())
    if not common:
        return 0.0
    return 2 * common / (len(given_words) + len(gold_words))


# ---- math-verify


_math_worker = Worker(Path(__file__).with_name("math_worker.py"), packages=True)


@functools.lru_cache(maxsize=10_000)
def _same_math(said, gold):
    """Whether math-verify finds two expressions equal; False where it does not end in time."""
    try:
        return _math_worker.ask({"said": said, "gold": gold}, DEADLINE)["same"]
    except (TimeoutError, WorkerDied):
        return False
    except RuntimeError:
        raise RuntimeError("math-verify does not start: pip install math-verify") from None

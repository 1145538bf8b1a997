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
_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.S)
# After "answer is", up to the end of the line, or of the sentence: "The answer is 18. I hope …"
_LINE = re.compile(
    r"\banswer(?:\s+is\b\s*:?|\s*:)[\s*]*(\S[^\n]*?)(?:(?<=[\d$%})*])\.\s|$)", re.I | re.M
)


def answer(trajectory, example):
    """What the model gave as its answer, or None."""
    if trajectory.answer is not None:  # as it would be in a turn, or plain
        return ([trajectory.answer.strip()] + places(trajectory.answer, True))[-1]
    found = places(last_turn(trajectory, example), trajectory.stop == "answered")
    return found[-1] if found else None


def program(trajectory, example, languages):
    """The program or query that the model gave as its answer, or None: to a tool that ends the
    episode, else in the last block ```language of the last turn. Only a block that is closed: the
    rest of another may be missing. languages: the names that count, such as ("python", "py")."""
    blocks = _BLOCK.findall(last_message(trajectory, example))
    found = [code for language, code in blocks if language.strip().lower() in languages]
    return found[-1] if found else trajectory.answer


def last_message(trajectory, example):
    """What the model gave to a tool that ends the episode, else its last turn, without thoughts and
    calls."""
    given = trajectory.answer
    return _said(trajectory, example) if given is None else given


def last_turn(trajectory, example):
    """The text of the last turn, if it is the model's: without thoughts, calls and code."""
    return _CODE.sub("", _said(trajectory, example))


def _said(trajectory, example):
    messages = trajectory.messages[len(example["messages"]) :]  # few-shot answers are not its own
    if not messages or messages[-1]["role"] != "assistant":
        return ""
    texts = [_content(message) for message in messages if message["role"] == "assistant"]
    # Never closed: what follows is still thought, so nothing is answered. Of all turns, because in
    # some formats a call inside of a thought is run.
    rest = _THOUGHT_END.split("\n".join(texts))[-1]
    if "<think>" in rest or "[THINK]" in rest:
        return ""
    text = _THOUGHT_END.split(texts[-1])[-1]  # the prompt may have opened the first one
    thought = _thought(text)
    text = _CALL.sub("", text if thought is None else thought)
    if thought is None and (trajectory.stop != "answered" or trajectory.answer is not None):
        # else it made no call
        text = "" if _OBJECT.match(text) else _ANY_CALL.sub(r"\1", text)
        text = _CUT_CALL.sub(r"\1", text) if trajectory.stop == "length" else text
    return text


def _content(message):
    text = message.get("content") or ""
    if isinstance(text, list):  # content parts, as vision models have them
        text = "\n".join(part["text"] for part in text if part["type"] == "text")
    return text


def _thought(text):
    """What an answer in the format json_actions says, None for a text that is none."""
    if not text.lstrip().startswith("{") or '"actions"' not in text:
        return None
    try:
        turn = json.loads(text)
    except (ValueError, RecursionError):
        return None
    thought = turn.get("thought") if turn.get("actions") == [] else None
    return thought if isinstance(thought, str) else None


def places(text, ended):
    """The answers declared in the text, all of one kind. ended: the model stopped by itself."""
    kinds = [_boxed(text), _TAG.findall(text)]
    if ended and not any(kinds):
        behind = re.findall(r"####[ \t]*([^\n]*)", text)  # a heading is better than nothing
        kinds += [_after_hashes(text.rstrip()), _LINE.findall(text), behind]
    return next((found for found in kinds if found), [])


def _after_hashes(text):
    """The lines after `####`, but no heading: one without a digit that is not the last line."""
    lines = re.finditer(r"####[ \t]*([^\n]*)", text)
    return [m[1] for m in lines if m.end() == len(text) or re.search(r"\d", m[1])]


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


def equal(said, gold):
    """Whether two answers are the same: exactly as numbers, else as text, else by math-verify."""
    if max(len(said), len(gold)) > LONGEST:
        return False
    said, gold = (re.sub(r"\\[()\[\]]", "", text).strip() for text in (said, gold))  # \( 18 \)
    units = {_unit(said), _unit(gold)}  # 5 hours is 5, not 5 minutes
    if len(units - {""}) == 2:
        return False
    said, gold = _UNIT_WORD.sub("", said), _UNIT_WORD.sub("", gold)
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
    # An operation that is left to be done is the question again: the integral, and not its value.
    if any(operation.search(said) and not operation.search(gold) for operation in _OPERATIONS):
        return False
    return _same_math(said, gold)


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
    found = _UNIT_WORD.search(" ".join(_TEXT.sub(r" \1", text).split()))
    return found[0].strip(" .").casefold() if found else ""


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
    sign, *parts = (part for part in match.groups() if part is not None)
    above, below = map(int, parts)
    return (Fraction(above, below) * (-1 if sign == "-" else 1), True) if below else (None, False)


def _gap(unit):
    """What is left of a unit: a blank between two digits, which are two numbers."""
    text, start, end = unit.string, unit.start(), unit.end()
    return " " if text[start - 1 : start].isdigit() and text[end : end + 1].isdigit() else ""


def _plain(text):
    """Text without what surrounds an answer: quotes, stops, dollars, an article, `\\text{}`."""
    text = " ".join(_TEXT.sub(r"\1", text).split()).strip(' .,;:*`"$“”‘’')
    text = re.sub(r"^\(([A-Za-z])\)$", r"\1", text)  # (B), of a multiple choice
    return re.sub(r"^(?:the|an?)\s+(?=\w{2})", "", text, flags=re.I)


# ---- the usual measures of question answering

_ARTICLES = {"a", "an", "the"}
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text):
    """The words of an answer as SQuAD compares them: lower case, without punctuation and articles,
    unless nothing is left then: "The Who" is who, "A" is a."""
    plain = _TEXT.sub(r"\1", text).lower().translate(_NO_PUNCTUATION).split()
    return [word for word in plain if word not in _ARTICLES] or plain


def f1(said, gold):
    """The harmonic mean of the share of the words said that are right and of the right ones that
    are said."""
    said, gold = words(said), words(gold)
    common = sum((Counter(said) & Counter(gold)).values())
    return 2 * common / (len(said) + len(gold)) if common else 0.0


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

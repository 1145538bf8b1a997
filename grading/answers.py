"""Where a model's answer is, and the words of it. Nothing here knows of rewards.

Only what the model wrote in its last turn, after its thoughts, is an answer: not the prompt, not a
tool's output, not a call, not code. What it gave to a tool that ends the episode (tools/finish.py)
is the answer. Else the answer is the first of these that the turn has, and of several the last one.
`\\boxed{…}`, `<answer>…</answer>`, the line after `####`, the line after "answer is" or "Answer:".
A bare number in the text is no answer: else a model that writes all numbers it saw is rewarded.
In a turn that did not end by its own choice only the first two count, because a line may be cut.
"""

import bisect
import json
import re
import string
from collections import Counter
from dataclasses import dataclass

# ---- where the answer is

_THOUGHT_END = re.compile(
    r"</think>|\[/THINK\]|<channel\|>|<\|channel\|>final<\|message\|>| to=user<\|message\|>"
)
_THOUGHT_BEGINS = (
    "<think>",
    "[THINK]",
    "<|channel>",
    "<|channel|>analysis<|message|>",
    " to=self<|message|>",
)
_CALL = re.compile(r"<(tool_call|tool_response)>.*?(?:</\1>|\Z)", re.S)
# The other formats' calls, where there may be one: in a tag of any name but those of HTML, or all
# behind [TOOL_CALLS]. Not in a block of code, nor in vector<int>.
_CALL_BEGIN = re.compile(
    r"(?<!\w)<(?!(?:answer|br|hr|p|b|i|u|em|[uo]l|li|su[bp]|strong|div|span)>)([\w.-]+)>"
    r"|\[TOOL_CALLS\]"
)
_TAG_END = re.compile(r"</([\w.-]+)>")
_OBJECT = re.compile(
    r'\s*(?:<\|python_tag\|>|\{\s*"(?:name|parameters|arguments|type|thought|actions)"\s*:)'
)
_BRACE = re.compile(r"(\\boxed\s*\{)|\\.|([{}])", re.S)
_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.S)

# What stands before an answer: "answer is", "**Answer**:", or a heading "## Final answer". What is
# repeated in it gives nothing back (+ behind it): else blanks would take a time that is quadratic.
_LEAD = re.compile(
    r"(?<![^\W_])answer(?:[*_]*\s++is\b\s*+:?|[*_]*\s*+[:=])[\s*_]*+"
    r"|^[ \t]*+(?:\#++[ \t]*+[*_]*+|[*_]++)(?:the )?(?:final )?answer[*_]*+[ \t]*+\n[\s*_]*+",
    re.I | re.M,
)
_DISPLAYS = {"$$": "$$", "\\[": "\\]"}  # mathematics on lines of its own: its begin and end
LONGEST_DISPLAY = 10_000  # characters
# Where an answer ends before its line does: "18. I hope …", "18, because …"
_ANSWER_END = re.compile(
    r"(?<=[\d$%})*\]])\.\s"
    r"|(?:,|;|(?<=[\d$%})*\]])) \(?(?:because|since|as|so|which|where|given|not)\b",
    re.I,
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
    programs = []
    for fence in _fences(last_message(trajectory, example)):
        if fence.code is not None and fence.language in languages:
            programs.append(fence.code)
    return programs[-1] if programs else trajectory.answer


def last_message(trajectory, example):
    """Returns what the model gave to a tool that ends the episode, else its last turn, without
    thoughts and calls."""
    if trajectory.answer is not None:
        return trajectory.answer
    return _last_text(trajectory, example)


def last_turn(trajectory, example):
    """Returns the text of the last turn, if it is the model's: without thoughts, calls and code."""
    text = _last_text(trajectory, example)
    fences = _fences(text)
    return _without(text, [(fence.start, fence.end) for fence in fences])


def _last_text(trajectory, example):
    """Reads the text of the last turn, if it is the model's: without thoughts and calls."""
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
    if any(tag in behind for tag in _THOUGHT_BEGINS):
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
    return _without_calls(text, was_cut=trajectory.stop == "length")


def _without_calls(text, was_cut):
    """Cuts calls that are in a tag, or behind [TOOL_CALLS], out of a text. Of a turn that was cut,
    also without one that has no end."""
    code_ends = {fence.start: fence.end for fence in _fences(text) if fence.code is not None}
    code_starts = sorted(code_ends)
    tag_ends = {}  # name -> where its closing tags end
    for match in _TAG_END.finditer(text):
        tag_ends.setdefault(match[1], []).append(match.end())

    calls = []
    position = 0
    for match in _CALL_BEGIN.finditer(text):
        # what is in a block of code, or in a call, is none
        before = bisect.bisect_right(code_starts, match.start()) - 1
        if before >= 0:
            position = max(position, code_ends[code_starts[before]])
        if match.start() < position:
            continue
        if match[1] is None:  # [TOOL_CALLS]
            calls.append((match.start(), len(text)))
            break
        ends = tag_ends.get(match[1], [])
        next_end = bisect.bisect_right(ends, match.end())
        if next_end < len(ends):
            position = ends[next_end]
            calls.append((match.start(), position))
        elif was_cut:
            calls.append((match.start(), len(text)))
            break
    return _without(text, calls)


def _without(text, spans):
    """Cuts the parts [(start, end)], which are in order, out of a text."""
    parts = []
    position = 0
    for start, end in spans:
        parts.append(text[position:start])
        position = end
    parts.append(text[position:])
    return "".join(parts)


def _json_thought(text):
    """Reads what an answer in the format json_actions says, None for an object that is none."""
    try:
        turn = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if turn.get("actions") != []:
        return None
    thought = turn.get("thought")
    return thought if isinstance(thought, str) else None


# ---- blocks of code


@dataclass
class _Fence:
    """A part of a text that is code."""

    start: int  # where it begins and ends in the text
    end: int
    language: str = ""
    code: str | None = None  # None: it was never closed


# A fence closes at the start of a line, so ``` in a string of the program does not end it; the
# second kind, at the end of one, only counts where there is no such line.
_FENCE = re.compile(r"^( {0,3})```(.*)$|(?<=[^\s`])(```)[ \t]*$", re.M)
_FENCE_BEGIN = re.compile(r"(?<!`)```(?:`*+([^\n`]*)(\n|\Z)|`*+[^\n]*?```)")


def _fences(text):
    """Finds all code of a text: blocks of lines, closed or not, and what is in ``` on one line."""
    line_closings = []  # (start, end) of ``` at the start of a line, alone or with words behind
    text_closings = []  # of ``` at the end of a line of code
    openings = []  # of ```language at the start of a line
    for match in _FENCE.finditer(text):
        if match[3]:
            text_closings.append((match.start(3), match.end(3)))
        elif re.match(r"\w", match[2]):
            openings.append(match.start())
        else:
            line_closings.append((match.start(), match.start(2)))

    fences = []
    position = 0
    while True:
        begin = _FENCE_BEGIN.search(text, position)
        if begin is None:
            return fences
        if begin[2] is None:  # on one line
            fences.append(_Fence(begin.start(), begin.end()))
            position = begin.end()
            continue
        closing = _closing(begin.end(), line_closings, text_closings, openings)
        fence = _Fence(begin.start(), len(text))
        if closing:
            fence.language = begin[1].strip().lower()
            fence.code = text[begin.end() : closing[0]]
            fence.end = closing[1]
        fences.append(fence)
        position = fence.end


def _closing(start, line_closings, text_closings, openings):
    """Finds (start, end) of the fence that closes the code from `start` on, or None."""
    in_line = _first_from(line_closings, start)
    in_text = _first_from(text_closings, start)
    if in_line is None:
        return in_text
    next_opening = bisect.bisect_left(openings, start)
    another_begins = next_opening < len(openings) and openings[next_opening] < in_line[0]
    if in_text and another_begins and in_text[0] < openings[next_opening]:
        return in_text
    return in_line


def _first_from(spans, start):
    """Finds the first of the spans, in order, that begins at `start` or later, or None."""
    index = bisect.bisect_left(spans, (start, start))
    return spans[index] if index < len(spans) else None


# ---- answers in a text


def places(text, ended):
    """Returns the answers declared in the text, all of one kind. ended: the model stopped by
    itself."""
    answers = _boxed(text) or _TAG.findall(text)
    if answers or not ended:
        return answers
    # a heading is better than nothing
    return _after_hashes(text.rstrip()) or _after_leads(text) or _HASHES.findall(text)


def _after_leads(text):
    """Reads what stands behind "answer is": a display of mathematics, else up to the end of the
    line, or of the sentence, or up to its reason. Of "Final answer: the answer is 18" only 18."""
    answers = []
    leads = list(_LEAD.finditer(text))
    line_end = -1
    for number, lead in enumerate(leads):
        start = lead.end()
        is_last = number == len(leads) - 1
        next_start = len(text) if is_last else leads[number + 1].start()
        display_end = _display_end(text, start)
        if display_end is not None:
            answers.append(text[start + 2 : display_end].strip())
            continue
        if line_end < start:
            line_end = text.find("\n", start)
            if line_end < 0:
                line_end = len(text)
        end = min(line_end, next_start)
        reason = _ANSWER_END.search(text, start, end + 1)
        if reason:
            end = reason.start()
        elif next_start < line_end:
            continue
        if start < end:
            answers.append(text[start:end].strip())
    return answers


def _display_end(text, start):
    """Finds where the display of mathematics that begins here ends; None if none does."""
    closing = _DISPLAYS.get(text[start : start + 2])
    if closing is None:
        return None
    end = text.find(closing, start + 2, start + LONGEST_DISPLAY)
    return end if end >= 0 else None


def _after_hashes(text):
    """Reads the lines after `####`, but no heading: one without a digit, if not the last."""
    lines = []
    for match in _HASHES.finditer(text):
        is_last = match.end() == len(text)
        if is_last or re.search(r"\d", match[1]):
            lines.append(match[1])
    return lines


def _boxed(text):
    r"""Reads the contents of all closed \boxed{…}, in order; of nested ones the innermost."""
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


# ---- the usual measures of question answering

_ARTICLES = {"a", "an", "the"}
_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}")
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

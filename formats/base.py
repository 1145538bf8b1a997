"""What the call formats share: Call, the class Format, and how JSON of a model is read."""

import json
import re
from dataclasses import dataclass, replace

from run.config import UserError

THINK = re.compile(r"<think>(.*?)</think>\s*", re.DOTALL)
THOUGHT_FIRST = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
TOOL_CALL = ("<tool_call>", "</tool_call>")
BLANKS = re.compile(r"\s*")
DECODER = json.JSONDecoder()
WINDOW = 4096  # characters that are decoded at first
LONGEST_WORD = 16  # characters: of -Infinity and of two escapes, of which a cut leaves a part
DEEPEST = 100  # levels of a value; python's own limit depends on who asks, and raises later
GOOD_ID = re.compile("[a-zA-Z0-9]{9}")  # what Mistral's templates accept


@dataclass
class Call:
    """One tool call as the model wrote it. error "bad_json": malformed, and message says how."""

    name: str
    arguments: dict | None
    error: str = ""
    message: str = ""
    raw: str = ""  # the very text of the call, tags included
    id: str = ""  # where a format has them: what its result refers to


class Format:
    """One way to write calls. A subclass has write and parse; an inline one also the other two."""

    # A call is text to the template, and the system prompt describes the tools.
    inline = False
    # The result goes on in the open turn.
    in_place = False
    # A turn may have several calls.
    parallel = True
    # What ends an open turn beside the stop tokens.
    stop_strings: tuple[str, ...] = ()
    # What templates write in several ways; the proof finds and sets the template's own.
    styles: tuple = (None,)
    style = None
    # How a template writes thinking. In a message it always stands in <think>.
    thinking = THINK
    thought_end = "\n</think>\n\n"  # of one that the prompt opened and that says nothing
    # A turn begins with what other templates write in front of it: a channel, a recipient.
    writes_header = False
    # The token that ends a call begins its result, whatever else the turn was ended by.
    result_goes_on = False
    has_own_thinking = False
    # Tokens that have to be known to the tokenizer, where a template does not write calls itself.
    tokens: tuple[str, ...] = ()
    # A good call, shown to a model that wrote a malformed one.
    example = ""

    def __init__(self, tools: list[dict]):
        pass  # unless it is inline, the template renders them

    def write(self, text: str, calls: list[Call]) -> str:
        """Writes the text of a turn."""
        raise NotImplementedError

    def with_thought(self, thought: str, words: str) -> str:
        """Puts a thought in front of the words of a message."""
        return join_thought(thought, words)

    def words(self, text: str) -> str:
        """Reads what a turn says beside its calls, as a message has it: thinking in <think>."""
        return text

    def parse(self, text: str) -> list[Call]:
        """Reads the calls of a turn. Never raises: a malformed call says so itself."""
        raise NotImplementedError

    def describe(self) -> str:
        """Writes this format's part of the system prompt."""
        raise NotImplementedError

    def result(self, name: str, content: str) -> str:
        """Writes what the model is told of one call."""
        raise NotImplementedError


# Writing


def as_json(value) -> str:
    return json.dumps(value, ensure_ascii=False)  # as transformers' tojson


def write_object(call: Call, arguments_key: str) -> str:
    """Writes a call as a JSON object in the way that templates do."""
    return f'{{"name": "{call.name}", "{arguments_key}": {as_json(call.arguments)}}}'


def with_ids(calls: list[Call]) -> list[Call]:
    """Gives the calls as a template is to write them: each with its own id, or its place as one.
    Mistral's templates want 9 letters or digits."""
    written = []
    for place, call in enumerate(calls):
        if not GOOD_ID.fullmatch(call.id):
            call = replace(call, id=f"call{place:05d}")
        written.append(call)
    return written


def quote_start(text: str) -> str:
    """Quotes the first letters of a text for a message to the model."""
    return repr(text[:40])


def json_start(value) -> str:
    """Writes the first letters of a value for a message to the model."""
    return as_json(value)[:40]


# Reading


def bad_call(reason: str, name: str = "") -> Call:
    """Makes a malformed call; `finish` puts the reason into a message to the model."""
    return Call(name, None, error=reason)


def finish(call: Call, raw: str, example: str) -> Call:
    """Completes a call that was read: its text, and if it is malformed what the model is told."""
    call.raw = raw
    if call.error:
        call.message = f"malformed call: {call.error}; write {example}"
        call.error = "bad_json"
        call.arguments = None
    return call


def read_blocks(text: str, read_block, tag: str, other_thinking: tuple = ()) -> list[Call]:
    """Reads the calls of each block that begins with `tag`, unless it stands in the thinking.

    read_block(text, start, body): the block begins at text[start:], what follows its tag at
    text[body:]; returns its calls and where it ended. other_thinking: (opening, closing) tags of
    thinking, beside <think>."""
    ends = {"<think>": "</think>"}
    ends.update(other_thinking)
    opening = re.compile("|".join(map(re.escape, [tag, *ends])))
    calls = []
    at = 0
    while match := opening.search(text, at):
        if match[0] == tag:
            block, at = read_block(text, match.start(), match.end())
            calls += block
            continue
        at = text.find(ends[match[0]], match.end())
        if at < 0:
            break  # still thinking when the turn ended: nothing was called
    return calls


def end_block(call: Call, kind: str, text: str, end: int, tags: tuple = TOOL_CALL) -> int:
    """Finds the end of a block whose content, a `kind`, ended at text[end:]. tags: around it.

    The next tag should be this call's end, with nothing in between: anything else is the call's
    error. At the end of a turn the tag may be missing: the call is whole, and servers accept it."""
    tag = any_of(tags).search(text, end)
    stop = tag.start() if tag else len(text)
    is_closed = tag is not None and tag[0] == tags[1]
    junk = text[end:stop].strip()
    if junk:
        call.error = call.error or f"{quote_start(junk)} follows the {kind}"
    elif tag and not is_closed:
        call.error = call.error or f"{tags[1]} is missing"
    return tag.end() if is_closed else stop


def split_thought(text: str) -> tuple[str | None, str]:
    """Splits the words of a message -> the thought in front (None: there is none), and the rest."""
    thought = THOUGHT_FIRST.match(text)
    if not thought:
        return None, text
    return thought[1].removeprefix("\n").removesuffix("\n"), text[thought.end() :]


def join_thought(thought: str, words: str) -> str:
    """Writes the words of a message with a thought in front."""
    return f"<think>\n{thought}\n</think>\n\n{words}"


def behind_thinking(text: str) -> str:
    """Cuts off the thinking, where a turn is one object. "" if the thinking did not end."""
    body = re.sub(r"\s*(?:<think>.*?</think>\s*)*", "", text, count=1, flags=re.DOTALL)
    return "" if body.startswith("<think>") else body.strip()


def read_json(text: str, start: int) -> tuple[object, int, str]:
    """Reads the JSON value at text[start:] -> (value, where it ended, "" or a plain reason).

    A real decoder, not a search for the end tag: `</tool_call>` may stand inside a string. It sees
    no more of the text than it needs: each of its errors counts the lines of all that it sees."""
    start = BLANKS.match(text, start).end()
    size = WINDOW
    while True:
        window = text[start : start + size]
        is_cut = start + size < len(text)
        size *= 4
        try:
            value, end = DECODER.raw_decode(window)
        except json.JSONDecodeError as error:
            is_near_the_cut = error.pos > len(window) - LONGEST_WORD
            if is_cut and (is_near_the_cut or error.msg.startswith("Unterminated string")):
                continue
            at = start + error.pos
            reason = f"no valid JSON: {error.msg}, at {text[at : at + 12]!r}"
            if "control character" in error.msg:
                reason += " (a line break in a string is written \\n)"
            return None, at, reason
        except (ValueError, RecursionError):  # an integer of 5000 digits, a thousand open brackets
            return None, start, "no valid JSON: too large or too deep"
        if is_cut and end == len(window):  # a number may go on
            continue
        if too_deep(value):
            return value, start + end, "no valid JSON: too large or too deep"
        return value, start + end, ""


def too_deep(value, levels: int = DEEPEST) -> bool:
    """Checks whether a value nests deeper than `levels`."""
    if isinstance(value, dict):
        items = value.values()
    elif isinstance(value, list):
        items = value
    else:
        return False
    return levels == 0 or any(too_deep(item, levels - 1) for item in items)


def call_of(value, keys: tuple[str, ...] = ("arguments",)) -> Call:
    """Makes a call of a JSON value. keys: what the arguments may be called, the usual one first."""
    if not isinstance(value, dict):
        return bad_call(f"expected an object, got {json_start(value)}")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        return bad_call('the object has no "name"')
    present = [key for key in keys if key in value]
    if not present:
        return bad_call(f'the object has no "{keys[0]}"', name)
    key = present[0]
    arguments = value[key]
    if not isinstance(arguments, dict):
        return bad_call(f'"{key}" must be an object, got {json_start(arguments)}', name)
    id = value.get("id")
    return Call(name, arguments, id=id if isinstance(id, str) else "")


# Tools


def properties_of(function: dict) -> dict:
    """Gives the parameters of a function, each with its schema. It may have none."""
    return (function.get("parameters") or {}).get("properties") or {}


def tools_of_row(in_row: list[str | dict] | None, tools: list[dict]) -> list[dict]:
    """Lists the schemas that a row's prompt shows. in_row: its column `tools`, names of some of
    `tools`, and schemas of functions of its own, which follow these; None: all of `tools`."""
    if in_row is None:
        return tools
    own = [tool for tool in in_row if isinstance(tool, dict)]
    return [tool for tool in tools if tool["function"]["name"] in in_row] + own


@dataclass
class TextTool:
    """A tool as the text formats see it."""

    argument: str  # the one that the text of a call fills
    description: str


def text_tools(tools: list[dict], format: str) -> dict[str, TextTool]:
    """Finds the argument that a text format fills: a string, the only one that is required.

    UserError: a tool has no such argument. format: its name, for that message."""
    by_name = {}
    for tool in tools:
        function = tool["function"]
        properties = properties_of(function)
        required = (function.get("parameters") or {}).get("required") or list(properties)[:1]
        is_one_string = len(required) == 1
        if is_one_string:
            schema = properties.get(required[0]) or {}
            is_one_string = schema.get("type") == "string"
        if not is_one_string:
            raise UserError(
                f"format {format} passes one string, but {function['name']} needs "
                f"({', '.join(required)}): use a format with JSON arguments, such as hermes"
            )
        description = function.get("description") or ""
        by_name[function["name"]] = TextTool(required[0], description)
    return by_name


def first_argument(call: Call):
    """Gives what a text format writes of a call."""
    return next(iter(call.arguments.values()))


def stopped_without_call(text: str, stop_strings: tuple[str, ...], example: str) -> list[Call]:
    """Makes a malformed call if a stop string cut a turn in which there is none: it is no answer
    either, and the model has to be told."""
    for stop in stop_strings:
        if stop in text:
            return [finish(bad_call("nothing to run"), stop.strip(), example)]
    return []


# Patterns


def any_of(tokens: list[str]) -> re.Pattern:
    """Makes the pattern that finds any of these texts, the first in the list first."""
    alternatives = "|".join(map(re.escape, tokens))
    return re.compile(alternatives or "(?!)")  # without tokens it finds nothing

"""How a model writes a tool call: one small class a format, used by chat.py.

    write(text, calls) -> the text of a turn;  parse(text) -> its calls

The first four are a template's own and are refused on a template that writes another syntax. The
others are `inline`: a call is text to the template, and the system prompt describes the tools. They
suit almost any template.

    hermes        <tool_call>{"name": ..., "arguments": {...}}</tool_call>    Qwen2.5, Qwen3, ...
    llama3        the whole turn is {"name": ..., "parameters": {...}}        Llama 3.1, 3.2
    mistral       [TOOL_CALLS] [{"name": ..., "arguments": {...}, "id": ...}], or
                  [TOOL_CALLS]name[CALL_ID]id[ARGS]{...}, [TOOL_CALLS]name[ARGS]{...}
    qwen_xml      <tool_call><function=name><parameter=key>value</parameter></function></tool_call>
                  Qwen3-Coder, Qwen3.5 and later, Nemotron 3
    fence         ```python ... ```, answered in place by ```output ... ```   one tool
    tags          <search> ... </search>, answered by <information> ... </information>
    json_actions  the whole turn is {"thought": ..., "actions": [{"name": ..., "arguments": {...}}]}

In fence and tags the turn stays open, the result is written right behind the call, and a stop
string keeps the model from writing the result itself.

A call that servers' parsers would not accept is not guessed at: it is an error that says why.
"""

import json
import re
from dataclasses import dataclass

from run.config import UserError

THINK = re.compile(r"<think>(.*?)</think>\s*", re.DOTALL)
JSON_NAMES = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    dict: "object",
    type(None): "null",
}
DEEPEST = 100  # levels of a value; python's own limit depends on who asks, and raises later
PYTHON = {"True": True, "False": False, "None": None}  # some templates write them so


@dataclass
class Call:
    """One tool call as the model wrote it. error "bad_json": malformed, and message says how."""

    name: str
    arguments: dict | None
    error: str = ""
    message: str = ""
    raw: str = ""  # the very text of the call, tags included
    id: str = ""  # where a format has them: what its result refers to


# inline: a call is text to the template; such a format also has result(name, content), what the
# model is told, and describe(), its part of the system prompt. in_place: the result goes on in the
# open turn; stop_strings, which end a turn beside the stop tokens, see to that. parallel: several
# calls in a turn. styles: what templates write in several ways; chat.py finds and sets `style`.


class Hermes:
    """Any number of <tool_call> blocks in a turn, outside <think>."""

    inline, in_place, parallel, stop_strings, styles = False, False, True, (), (None,)
    style = None
    example = '<tool_call>\n{"name": "<tool>", "arguments": {"<key>": <value>}}\n</tool_call>'

    def __init__(self, tools: list[dict]):
        pass  # the template renders them

    def write(self, text: str, calls: list[Call]) -> str:
        blocks = [f"<tool_call>\n{_object(call, 'arguments')}\n</tool_call>" for call in calls]
        return "\n".join([text] * bool(text) + blocks)

    def parse(self, text: str) -> list[Call]:
        return _blocks(text, self._block)

    def _block(self, text, start, at) -> tuple[list[Call], int]:
        call, end = _decode(text, at, ("arguments",))
        return _closed(call, "object", text, start, end, self.example)


class Llama3:
    """The whole turn is one JSON object, with or without <|python_tag|>. A turn that does not
    begin like a call is an answer."""

    inline, in_place, parallel, stop_strings, styles = False, False, False, (), (None,)
    style = None
    example = '{"name": "<tool>", "parameters": {"<key>": <value>}} and nothing else'

    def __init__(self, tools: list[dict]):
        pass  # the template renders them

    def write(self, text: str, calls: list[Call]) -> str:
        if len(calls) > 1:
            raise UserError(f"format llama3 writes one call in a turn, got {len(calls)}: split it")
        return _object(calls[0], "parameters") if calls else text

    def parse(self, text: str) -> list[Call]:
        body = _behind_thinking(text)
        if not re.match(r'<\|python_tag\|>|\{\s*"(name|parameters|arguments|type)"', body):
            return []
        body = body.removeprefix("<|python_tag|>")
        call, end = _decode(body, 0, ("parameters", "arguments"))
        if junk := body[end:].strip():
            call.error = call.error or f"{junk[:40]!r} follows the object"
        return [_finish(call, text.strip(), self.example)]


class Mistral:
    """A list of calls behind [TOOL_CALLS], or [TOOL_CALLS] in front of each call; outside thinking.

    Three syntaxes are told apart by what follows [TOOL_CALLS], and all of them are read: a list
    (models up to Small 3.1; with a blank in front in the oldest tokenizers), name[CALL_ID]id[ARGS]
    (Small 3.2), name[ARGS] (Devstral 2507, Magistral 2509, Ministral 3). The template's own is
    written. An id has 9 letters or digits."""

    inline, in_place, parallel, stop_strings = False, False, True, ()
    styles = ("[TOOL_CALLS] [", "[TOOL_CALLS][", "[CALL_ID]", "[ARGS]")
    style = styles[0]
    listed = (
        '[TOOL_CALLS] [{"name": "<tool>", "arguments": {"<key>": <value>}, "id": "<9 letters>"}]'
    )
    named = '[TOOL_CALLS]<tool>[ARGS]{"<key>": <value>}'

    def __init__(self, tools: list[dict]):
        pass  # the template renders them

    def write(self, text: str, calls: list[Call]) -> str:
        blocks = []
        for call, id in zip(calls, call_ids(calls), strict=True):
            if self.style in self.styles[:2]:
                blocks.append(f'{_object(call, "arguments")[:-1]}, "id": "{id}"}}')
            else:
                id = f"[CALL_ID]{id}" if self.style == "[CALL_ID]" else ""
                blocks.append(f"[TOOL_CALLS]{call.name}{id}[ARGS]{as_json(call.arguments)}")
        if calls and self.style in self.styles[:2]:
            return f"{text}{self.style}{', '.join(blocks)}]"
        return text + "".join(blocks)

    def parse(self, text: str) -> list[Call]:
        return _blocks(text, self._block, "[TOOL_CALLS]", "[THINK]", "[/THINK]")

    def _block(self, text, start, at) -> tuple[list[Call], int]:
        """What follows one [TOOL_CALLS], which is to be nothing but calls up to the next one."""
        if re.compile(r"\s*[\[{]").match(text, at):
            value, end, error = _json(text, at)
            if not error and not (isinstance(value, list) and value):
                error = f"expected a list of calls, got {_shown(value)}"
            found = [Call("", None, error)] if error else [_call(item) for item in value]
        elif head := re.compile(r"([^\s\[]+)(?:\[CALL_ID\]([^\[]*))?\[ARGS\]").match(text, at):
            value, end, error = _json(text, head.end())
            if not error and not isinstance(value, dict):
                error = f"the arguments must be an object, got {_shown(value)}"
            found = [Call(head[1], value, error, id=head[2] or "")]
        else:
            found, end = [Call("", None, "no list and no name[ARGS] follows [TOOL_CALLS]")], at
        stop = text.find("[TOOL_CALLS]", end)
        stop = len(text) if stop < 0 else stop
        if junk := text[end:stop].strip():
            for call in found:
                call.error = call.error or f"{_cut(junk)} follows the call"
        example = self.listed if self.style in self.styles[:2] else self.named
        return [_finish(call, text[start:stop], example) for call in found], stop


class QwenXml:
    """Any number of <tool_call> blocks in a turn, outside <think>; their values are no JSON.

    A string is written as it is between two line breaks, all else as JSON (or as Python writes
    True, False and None: some templates do). Which of the two a value is, the tool's schema says;
    where it allows both or says nothing, what reads as JSON of an allowed type is that. No value
    can hold </parameter>, <parameter= or a call's end: as in servers, the first one ends it."""

    inline, in_place, parallel, stop_strings = False, False, True, ()
    # How literals are spelt, what stands between words and calls, and what ends the turn.
    styles = (("python", "\n\n", ""), ("json", "\n\n", ""), ("python", "\n", "\n"))
    style = styles[0]
    example = (
        "<tool_call>\n<function=<tool>>\n<parameter=<key>>\n<value>\n</parameter>\n</function>\n"
        "</tool_call>"
    )
    value_end = re.compile(r"</parameter>|<parameter=|</function>\s*</tool_call>")

    def __init__(self, tools: list[dict]):
        functions = [tool["function"] for tool in tools]
        self.tools = {f["name"]: _properties(f) for f in functions}

    def write(self, text: str, calls: list[Call]) -> str:
        blocks, (literals, glue, tail) = [], self.style
        for call in calls:
            block = f"<function={call.name}>\n"
            for key, value in call.arguments.items():
                block += f"<parameter={key}>\n{_text(value, literals)}\n</parameter>\n"
            blocks.append(f"<tool_call>\n{block}</function>\n</tool_call>")
        return text + glue * bool(text and calls) + "\n".join(blocks) + tail * bool(calls)

    def parse(self, text: str) -> list[Call]:
        return _blocks(text, self._block)

    def _block(self, text, start, at) -> tuple[list[Call], int]:
        call, end = self._function(text, at)
        return _closed(call, "function", text, start, end, self.example)

    def _function(self, text, at) -> tuple[Call, int]:
        """<function=...>...</function> at text[at:] -> the call, and where it ended."""
        head = re.compile(r"\s*<function=([^>\n]+)>").match(text, at)
        if not head:
            return Call("", None, "no <function=...> follows <tool_call>"), at
        name, arguments, at = head[1], {}, head.end()
        while start := re.compile(r"\s*<parameter=([^>\n]+)>").match(text, at):
            key, at = start[1], start.end()
            end = self.value_end.search(text, at)
            if not end or end[0] != "</parameter>":
                return Call(name, None, f"</parameter> is missing after {key}"), at
            if key in arguments:
                return Call(name, None, f"parameter {key} is given twice"), at
            value = text[at : end.start()].removeprefix("\n").removesuffix("\n")
            schema = self.tools.get(name, {}).get(key, {"type": "string"})
            try:
                arguments[key] = _typed(value, _types(schema))
            except ValueError:
                wanted = " or ".join(sorted(_types(schema)))
                return Call(name, None, f"parameter {key} = {_cut(value)} is no {wanted}"), at
            at = end.end()
        end = re.compile(r"\s*</function>").match(text, at)
        if not end:
            return Call(name, None, "</function> is missing"), at
        return Call(name, arguments), end.end()


class Fence:
    """A ```python block; the result follows in the same turn.

    The stop string has line breaks on both sides, because "\\n```" is also in the opening
    "\\n```python". A turn that ends right behind the fence is closed by its stop token instead."""

    inline, in_place, parallel, styles = True, True, False, (None,)
    style = None
    example = "```python\n<code>\n```"

    def __init__(self, tools: list[dict]):
        if len(tools) > 1:
            names = ", ".join(tool["function"]["name"] for tool in tools)
            raise UserError(f"format fence has one tool, got {names}: give one, or format=tags")
        self.tools = _text_tools(tools, "fence")
        self.stop_strings = ("\n```\n",) if tools else ()

    def describe(self) -> str:
        [(_, description)] = self.tools.values()
        return (
            f"You can use python. {description}\nWrite it as\n```python\nprint(6 * 7)\n```\n"
            "and the result follows as\n```output\n42\n```\nThen go on."
        )

    def write(self, text: str, calls: list[Call]) -> str:
        blocks = [f"```python\n{next(iter(call.arguments.values()))}\n```" for call in calls]
        return "\n".join([text] * bool(text) + blocks)

    def result(self, name: str, content: str) -> str:
        return f"```output\n{content}\n```\n"

    def parse(self, text: str) -> list[Call]:
        calls = []
        for block in re.finditer(r"^```(.*)\n((?:.*\n)*?)```[ \t]*$\n?", text, re.MULTILINE):
            for name, (argument, _) in self.tools.items() if block[1].strip() == "python" else ():
                calls.append(Call(name, {argument: block[2].removesuffix("\n")}, raw=block[0]))
        return calls or _unmatched(text, self.stop_strings, self.example)


class Tags:
    """<tool>argument</tool> for each tool; the result follows in the same turn."""

    inline, in_place, parallel, styles = True, True, False, (None,)
    style = None
    information = "information"  # the one tag around every result, as in Search-R1

    def __init__(self, tools: list[dict]):
        self.tools = _text_tools(tools, "tags")
        self.stop_strings = tuple(f"</{name}>" for name in [*self.tools, "answer"])
        self.example = " or ".join(f"<{name}>...</{name}>" for name in self.tools)

    def describe(self) -> str:
        lines = [f"<{name}>{arg}</{name}>: {text}" for name, (arg, text) in self.tools.items()]
        start = f"Use tools by writing tags; a result follows in <{self.information}>."
        return "\n".join([start, *lines, "Write the answer as <answer>...</answer>."])

    def write(self, text: str, calls: list[Call]) -> str:
        blocks = [f"<{c.name}>{next(iter(c.arguments.values()))}</{c.name}>" for c in calls]
        return "\n".join([text] * bool(text) + blocks)

    def result(self, name: str, content: str) -> str:
        return f"\n<{self.information}>{content}</{self.information}>\n"

    def parse(self, text: str) -> list[Call]:
        calls = []
        names = "|".join(map(re.escape, self.tools)) or "(?!)"
        for tag in re.finditer(rf"<({names})>((?:(?!<\1>).)*?)</\1>", text, re.DOTALL):
            # A query loses its blanks, code of several lines keeps its indentation.
            body = tag[2].strip("\n") if "\n" in tag[2].strip() else tag[2].strip()
            calls.append(Call(tag[1], {self.tools[tag[1]][0]: body}, raw=tag[0]))
        return calls or _unmatched(text, self.stop_strings[:-1], self.example)


class JsonActions:
    """The whole turn is one JSON object, as in OpenThinkIMG; thinking may stand in front of it.

    {"thought": "...", "actions": [{"name": "...", "arguments": {...}}, ...]}

    The results follow as a user's message. An answer is an object whose actions are an empty list,
    or a plain text: a turn that does not begin with { and has no such object in it. A tool that
    ends the episode (tools/finish.py) is an action like any other."""

    inline, in_place, parallel, stop_strings, styles = True, False, True, (), (None,)
    style = None
    example = (
        '{"thought": "...", "actions": [{"name": "<tool>", "arguments": {"<key>": <value>}}]}'
        " and nothing else"
    )
    begins = re.compile(r'\{\s*"(?:thought|actions)"\s*:')

    def __init__(self, tools: list[dict]):
        self.tools = [tool["function"] for tool in tools]

    def describe(self) -> str:
        return "\n".join(
            [
                "Write each turn as one JSON object and nothing else:",
                '{"thought": "...", "actions": [{"name": "...", "arguments": {...}}]}',
                "The results of all actions follow. To answer, leave actions empty: []",
                "The tools that an action may name:",
                *map(as_json, self.tools),
            ]
        )

    def write(self, text: str, calls: list[Call]) -> str:
        if not calls:
            return text
        head = THINK.match(text)
        head = head[0] if head else ""
        actions = ", ".join(_object(call, "arguments") for call in calls)
        thought = as_json(text.removeprefix(head))
        return f'{head}{{"thought": {thought}, "actions": [{actions}]}}'

    def result(self, name: str, content: str) -> str:
        return f"Result of {name or 'the call'}:\n{content}\n"

    def parse(self, text: str) -> list[Call]:
        body = _behind_thinking(text)
        found = self.begins.search(body)
        if not body.startswith("{"):
            error = f"{_cut(body[: found.start()])} stands before the object" if found else ""
            return [_finish(Call("", None, error), body, self.example)] if found else []
        value, end, error = _json(body, 0)
        if not error and (junk := body[end:].strip()):
            error = f"{_cut(junk)} follows the object"
        if not error and not isinstance(value.get("actions"), list):
            error = 'the object has no list "actions"'
        calls = [Call("", None, error)] if error else map(_call, value["actions"])
        return [_finish(call, body, self.example) for call in calls]


FORMATS = {
    "hermes": Hermes,
    "llama3": Llama3,
    "mistral": Mistral,
    "qwen_xml": QwenXml,
    "fence": Fence,
    "tags": Tags,
    "json_actions": JsonActions,
}


def as_json(value) -> str:
    return json.dumps(value, ensure_ascii=False)  # as transformers' tojson


def _object(call, key) -> str:
    return f'{{"name": "{call.name}", "{key}": {as_json(call.arguments)}}}'


def call_ids(calls: list[Call]) -> list[str]:
    """The id of each call: its own, or its place. Mistral's templates want 9 letters or digits."""
    good = re.compile("[a-zA-Z0-9]{9}")
    return [c.id if good.fullmatch(c.id) else f"call{n:05d}" for n, c in enumerate(calls)]


def _text(value, literals) -> str:
    plain = isinstance(value, str) or literals == "python" and not isinstance(value, (dict, list))
    return str(value) if plain else as_json(value)


def _cut(text) -> str:
    return repr(text if len(text) <= 40 else text[:40])


def _shown(value) -> str:
    return as_json(value)[:40]


def _blocks(text, read, tag="<tool_call>", *thinking) -> list[Call]:
    """The calls of each `tag` outside of <think> (and of `thinking`, another pair of tags):
    read(text, start, at) -> what is in the block that begins at start, and where it ended."""
    calls, at, ends = [], 0, {"<think>": "</think>"} | dict([thinking] * bool(thinking))
    opening = re.compile("|".join(map(re.escape, [tag, *ends])))
    while match := opening.search(text, at):
        if match[0] == tag:
            found, at = read(text, match.start(), match.end())
            calls += found
        elif (at := text.find(ends[match[0]], match.end())) < 0:
            break  # still thinking when the turn ended: nothing was called
    return calls


def _closed(call, what, text, start, end, example) -> tuple[list[Call], int]:
    """The next tag should be this call's end, with nothing in between. At the end of a turn it may
    be missing: the call is whole, and servers accept it."""
    tag = re.compile("</?tool_call>").search(text, end)
    stop = tag.start() if tag else len(text)
    if junk := text[end:stop].strip():
        call.error = call.error or f"{_cut(junk)} follows the {what}"
    elif tag and tag[0] == "<tool_call>":
        call.error = call.error or "</tool_call> is missing"
    at = tag.end() if tag and tag[0] == "</tool_call>" else stop
    return [_finish(call, text[start:at], example)], at


def _behind_thinking(text) -> str:
    """Where a turn is one object: without the thinking in front of it. "" if that did not end."""
    body = re.compile(r"\s*(?:<think>.*?</think>\s*)*", re.DOTALL).sub("", text, count=1)
    return "" if body.startswith("<think>") else body.strip()


def _properties(function) -> dict:
    """The parameters of a function, each with its schema. It may have none."""
    return (function.get("parameters") or {}).get("properties") or {}


def _types(schema) -> set[str]:
    """The JSON types that a schema allows; empty: any, as far as it says."""
    if not isinstance(schema, dict):
        return set()
    declared = schema.get("type") or []  # None: rows of a table have all keys
    types = {declared} if isinstance(declared, str) else set(declared)
    types = types or {JSON_NAMES[type(value)] for value in schema.get("enum") or []}
    for choice in [*(schema.get("anyOf") or []), *(schema.get("oneOf") or [])]:
        if not (found := _types(choice)):
            return set()
        types |= found
    if types and schema.get("nullable"):  # as get_json_schema writes `str | None`
        types.add("null")
    return types if types <= {*JSON_NAMES.values(), "number"} else set()


def _typed(text, types) -> object:
    """The text of a parameter -> its value. ValueError: it is none of `types`."""
    if types == {"string"}:
        return text
    try:
        if text.strip() in PYTHON:
            value = PYTHON[text.strip()]
        else:
            value = json.loads(text, parse_constant=int)  # NaN is no JSON: ValueError
        if too_deep(value):
            raise ValueError("too deep")
    except (ValueError, RecursionError) as e:
        if types and "string" not in types:
            raise ValueError("no JSON") from e
        return text
    kinds = {JSON_NAMES[type(value)]} | ({"number"} if type(value) is int else set())
    return text if "string" in types and not kinds & types else value


def too_deep(value, levels=DEEPEST) -> bool:
    items = value.values() if isinstance(value, dict) else value
    if not isinstance(value, (dict, list)):
        return False
    return levels == 0 or any(too_deep(item, levels - 1) for item in items)


def _json(text, start) -> tuple:
    """The JSON value at text[start:] -> (value, where it ended, "" or a plain reason).

    A real decoder, not a search for the end tag: `</tool_call>` may stand inside a string."""
    start += len(text[start:]) - len(text[start:].lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
        return value, end, "no valid JSON: too large or too deep" if too_deep(value) else ""
    except json.JSONDecodeError as e:
        reason = f"no valid JSON: {e.msg}, at {text[e.pos : e.pos + 12]!r}"
        if "control character" in e.msg:
            reason += " (a line break in a string is written \\n)"
        return None, e.pos, reason
    except (ValueError, RecursionError):  # an integer of 5000 digits, a thousand open brackets
        return None, start, "no valid JSON: too large or too deep"


def _decode(text, start, keys) -> tuple[Call, int]:
    """The JSON object at text[start:] -> the call, its error a plain reason, where JSON ended."""
    value, end, error = _json(text, start)
    return (Call("", None, error) if error else _call(value, keys)), end


def _call(value, keys=("arguments",)) -> Call:
    """A JSON value -> the call, its error a plain reason."""
    if not isinstance(value, dict):
        return Call("", None, f"expected an object, got {_shown(value)}")
    name, key = value.get("name"), next((key for key in keys if key in value), "")
    if not isinstance(name, str) or not name:
        return Call("", None, 'the object has no "name"')
    if not key:
        return Call(name, None, f'the object has no "{keys[0]}"')
    if not isinstance(value[key], dict):
        return Call(name, None, f'"{key}" must be an object, got {_shown(value[key])}')
    id = value.get("id")
    return Call(name, value[key], id=id if isinstance(id, str) else "")


def _finish(call, raw, example) -> Call:
    call.raw = raw
    if call.error:
        call.message = f"malformed call: {call.error}; write {example}"
        call.error, call.arguments = "bad_json", None
    return call


def _unmatched(text, stop_strings, example) -> list[Call]:
    """A stop string cut the turn but there is no call in it, nor is it an answer."""
    found = [stop.strip() for stop in stop_strings if stop in text]
    return [_finish(Call("", None, "nothing to run"), stop, example) for stop in found[:1]]


def _text_tools(tools, format) -> dict[str, tuple[str, str]]:
    """{name: (argument, description)}; a text format fills one argument: a string, the only one
    that is required."""
    found = {}
    for function in [tool["function"] for tool in tools]:
        properties = _properties(function)
        needed = (function.get("parameters") or {}).get("required") or list(properties)[:1]
        if len(needed) != 1 or (properties.get(needed[0]) or {}).get("type") != "string":
            raise UserError(
                f"format {format} passes one string, but {function['name']} needs "
                f"({', '.join(needed)}): use a format with JSON arguments, such as hermes"
            )
        found[function["name"]] = needed[0], function.get("description") or ""
    return found


# Messages, in OpenAI form.

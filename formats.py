"""How a model writes a tool call: one small class a format, used by chat.py.

    write(text, calls) -> the text of a turn;  parse(text) -> its calls

The first two are a template's own and are refused on a template that writes another syntax; the
others are `inline`: the turn stays open, the result is written right behind the call, and a stop
string keeps the model from writing the result itself. They suit almost any template.

    hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>    Qwen2.5, Qwen3, ...
    llama3   the whole turn is {"name": ..., "parameters": {...}}        Llama 3.1, 3.2
    fence    ```python ... ```, answered in place by ```output ... ```   one tool
    tags     <search> ... </search>, answered by <information> ... </information>

A call that servers' parsers would not accept is not guessed at: it is an error that says why.
"""

import json
import re
from dataclasses import dataclass

from config import UserError

THINK = re.compile(r"<think>(.*?)</think>\s*", re.DOTALL)


@dataclass
class Call:
    """One tool call as the model wrote it. error "bad_json": malformed, and message says how."""

    name: str
    arguments: dict | None
    error: str = ""
    message: str = ""
    raw: str = ""  # the very text of the call, tags included


# Inline formats also have result(content), what is written behind the call, and describe(), their
# part of the system prompt. stop_strings: what ends a turn beside the stop tokens.


class Hermes:
    """Any number of <tool_call> blocks in a turn, outside <think>."""

    inline, stop_strings = False, ()
    example = '<tool_call>\n{"name": "<tool>", "arguments": {"<key>": <value>}}\n</tool_call>'

    def __init__(self, tools: list[dict]):
        pass  # the template renders them

    def write(self, text: str, calls: list[Call]) -> str:
        blocks = [f"<tool_call>\n{_object(call, 'arguments')}\n</tool_call>" for call in calls]
        return "\n".join([text] * bool(text) + blocks)

    def parse(self, text: str) -> list[Call]:
        calls, at = [], 0
        while match := re.compile("<think>|<tool_call>").search(text, at):
            if match[0] == "<think>":
                at = text.find("</think>", match.end())
                if at < 0:
                    break  # still thinking when the turn ended: nothing was called
                continue
            call, end = _decode(text, match.end(), ("arguments",))
            # The next tag should be this call's end, with nothing in between. At the end of a turn
            # it may be missing: the object is whole, and servers accept it.
            tag = re.compile("</?tool_call>").search(text, end)
            stop = tag.start() if tag else len(text)
            if junk := text[end:stop].strip():
                call.error = call.error or f"{junk[:40]!r} follows the object"
            elif tag and tag[0] == "<tool_call>":
                call.error = call.error or "</tool_call> is missing"
            at = tag.end() if tag and tag[0] == "</tool_call>" else stop
            calls.append(_finish(call, text[match.start() : at], self.example))
        return calls


class Llama3:
    """The whole turn is one JSON object, with or without <|python_tag|>. A turn that does not
    begin like a call is an answer."""

    inline, stop_strings = False, ()
    example = '{"name": "<tool>", "parameters": {"<key>": <value>}} and nothing else'

    def __init__(self, tools: list[dict]):
        pass  # the template renders them

    def write(self, text: str, calls: list[Call]) -> str:
        if len(calls) > 1:
            raise UserError(f"format llama3 writes one call in a turn, got {len(calls)}: split it")
        return _object(calls[0], "parameters") if calls else text

    def parse(self, text: str) -> list[Call]:
        body = THINK.sub("", text).strip()
        if not re.match(r'<\|python_tag\|>|\{\s*"(name|parameters|arguments|type)"', body):
            return []
        body = body.removeprefix("<|python_tag|>")
        call, end = _decode(body, 0, ("parameters", "arguments"))
        if junk := body[end:].strip():
            call.error = call.error or f"{junk[:40]!r} follows the object"
        return [_finish(call, text.strip(), self.example)]


class Fence:
    """A ```python block; the result follows in the same turn.

    The stop string has line breaks on both sides, because "\\n```" is also in the opening
    "\\n```python". A turn that ends right behind the fence is closed by its stop token instead."""

    inline = True
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

    def result(self, content: str) -> str:
        return f"```output\n{content}\n```\n"

    def parse(self, text: str) -> list[Call]:
        calls = []
        for block in re.finditer(r"^```(.*)\n((?:.*\n)*?)```[ \t]*$\n?", text, re.MULTILINE):
            for name, (argument, _) in self.tools.items() if block[1].strip() == "python" else ():
                calls.append(Call(name, {argument: block[2].removesuffix("\n")}, raw=block[0]))
        return calls or _unmatched(text, self.stop_strings, self.example)


class Tags:
    """<tool>argument</tool> for each tool; the result follows in the same turn."""

    inline = True
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

    def result(self, content: str) -> str:
        return f"\n<{self.information}>{content}</{self.information}>\n"

    def parse(self, text: str) -> list[Call]:
        calls = []
        names = "|".join(map(re.escape, self.tools)) or "(?!)"
        for tag in re.finditer(rf"<({names})>((?:(?!<\1>).)*?)</\1>", text, re.DOTALL):
            # A query loses its blanks, code of several lines keeps its indentation.
            body = tag[2].strip("\n") if "\n" in tag[2].strip() else tag[2].strip()
            calls.append(Call(tag[1], {self.tools[tag[1]][0]: body}, raw=tag[0]))
        return calls or _unmatched(text, self.stop_strings[:-1], self.example)


FORMATS = {"hermes": Hermes, "llama3": Llama3, "fence": Fence, "tags": Tags}


def as_json(value) -> str:
    return json.dumps(value, ensure_ascii=False)  # as transformers' tojson


def _object(call, key) -> str:
    return f'{{"name": "{call.name}", "{key}": {as_json(call.arguments)}}}'


def _decode(text, start, keys) -> tuple[Call, int]:
    """The JSON object at text[start:] -> the call, its error a plain reason, and where JSON ended.

    A real decoder, not a search for the end tag: `</tool_call>` may stand inside a string."""
    start += len(text[start:]) - len(text[start:].lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as e:
        reason = f"no valid JSON: {e.msg}, at {text[e.pos : e.pos + 12]!r}"
        if "control character" in e.msg:
            reason += " (a line break in a string is written \\n)"
        return Call("", None, reason), e.pos
    except (ValueError, RecursionError):  # an integer of 5000 digits, a thousand open brackets
        return Call("", None, "no valid JSON: too large or too deep"), start
    if not isinstance(value, dict):
        return Call("", None, f"expected an object, got {as_json(value)[:40]}"), end
    name, key = value.get("name"), next((key for key in keys if key in value), "")
    if not isinstance(name, str) or not name:
        return Call("", None, 'the object has no "name"'), end
    if not key:
        return Call(name, None, f'the object has no "{keys[0]}"'), end
    if not isinstance(value[key], dict):
        reason = f'"{key}" must be an object, got {as_json(value[key])[:40]}'
        return Call(name, None, reason), end
    return Call(name, value[key]), end


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
        properties = function["parameters"].get("properties", {})
        needed = function["parameters"].get("required", []) or list(properties)[:1]
        if len(needed) != 1 or properties[needed[0]].get("type") != "string":
            raise UserError(
                f"format {format} passes one string, but {function['name']} needs "
                f"({', '.join(needed)}): use a format with JSON arguments, such as hermes"
            )
        found[function["name"]] = needed[0], function["description"]
    return found


# Messages, in OpenAI form.

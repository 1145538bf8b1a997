"""qwen_xml: a tag for the name and one for each argument, as Qwen3-Coder and Qwen3.5 write it."""

import re
from typing import NamedTuple

from formats.base import (
    Call,
    Format,
    as_json,
    bad_call,
    end_block,
    finish,
    properties_of,
    quote_start,
    read_blocks,
)
from formats.values import allowed_types, typed_value


class Spelling(NamedTuple):
    """What templates of this format write in different ways."""

    literals: str  # True, False and None as "python" has them, or as "json"
    glue: str  # between words and the first call
    tail: str  # behind the last call


class QwenXml(Format):
    """Any number of <tool_call> blocks in a turn, outside <think>; their values are no JSON.

    A string is written as it is between two line breaks, all else as JSON (or as Python writes
    True, False and None: some templates do). Which of the two a value is, the tool's schema says;
    where it allows both or says nothing, what reads as JSON of an allowed type is that. No value
    can hold </parameter>, <parameter= or a call's end: as in servers, the first one ends it."""

    styles = (
        Spelling("python", "\n\n", ""),
        Spelling("json", "\n\n", ""),
        Spelling("python", "\n", "\n"),
    )
    style = styles[0]
    example = (
        "<tool_call>\n<function=<tool>>\n<parameter=<key>>\n<value>\n</parameter>\n</function>\n"
        "</tool_call>"
    )
    function_start = re.compile(r"\s*<function=([^>\n]+)>")
    function_end = re.compile(r"\s*</function>")
    parameter_start = re.compile(r"\s*<parameter=([^>\n]+)>")
    value_end = re.compile(r"</parameter>|<parameter=|</function>\s*</tool_call>")

    def __init__(self, tools: list[dict]):
        functions = [tool["function"] for tool in tools]
        self.schemas = {function["name"]: properties_of(function) for function in functions}

    def write(self, text: str, calls: list[Call]) -> str:
        if not calls:
            return text
        head = text + self.style.glue if text else ""
        blocks = [self._write_call(call) for call in calls]
        return head + "\n".join(blocks) + self.style.tail

    def _write_call(self, call) -> str:
        block = f"<tool_call>\n<function={call.name}>\n"
        for key, value in call.arguments.items():
            block += f"<parameter={key}>\n{self._write_value(value)}\n</parameter>\n"
        return block + "</function>\n</tool_call>"

    def _write_value(self, value) -> str:
        if isinstance(value, str):
            return value
        if self.style.literals == "python" and not isinstance(value, (dict, list)):
            return str(value)
        return as_json(value)

    def parse(self, text: str) -> list[Call]:
        return read_blocks(text, self._read_block, "<tool_call>")

    def _read_block(self, text, start, body) -> tuple[list[Call], int]:
        call, end = self._read_function(text, body)
        stop = end_block(call, "function", text, end)
        return [finish(call, text[start:stop], self.example)], stop

    def _read_function(self, text, at) -> tuple[Call, int]:
        """Reads <function=...>...</function> at text[at:] -> the call, and where it ended."""
        head = self.function_start.match(text, at)
        if not head:
            return bad_call("no <function=...> follows <tool_call>"), at
        name = head[1]
        at = head.end()
        arguments = {}
        while start := self.parameter_start.match(text, at):
            key = start[1]
            at = start.end()
            end = self.value_end.search(text, at)
            if not end or end[0] != "</parameter>":
                return bad_call(f"</parameter> is missing after {key}", name), at
            if key in arguments:
                return bad_call(f"parameter {key} is given twice", name), at
            value = text[at : end.start()].removeprefix("\n").removesuffix("\n")
            types = self._types_of(name, key)
            try:
                arguments[key] = typed_value(value, types)
            except ValueError:
                expected = " or ".join(sorted(types))
                reason = f"parameter {key} = {quote_start(value)} is no {expected}"
                return bad_call(reason, name), at
            at = end.end()
        end = self.function_end.match(text, at)
        if not end:
            return bad_call("</function> is missing", name), at
        return Call(name, arguments), end.end()

    def _types_of(self, name, key) -> set[str]:
        """Gives the types of a parameter; what no schema knows is a string."""
        schema = self.schemas.get(name, {}).get(key, {"type": "string"})
        return allowed_types(schema)

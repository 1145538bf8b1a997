"""glm: a name, and a tag for each key and each value, as GLM 4.5 to 5 write them."""

import re

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


class Glm(Format):
    """Any number of <tool_call> blocks in a turn, outside <think>; their values are no JSON.

    A string is written as it is, all else as JSON: which of the two a value is, the tool's schema
    says, as in qwen_xml. No value can hold </arg_value>: the first one ends it. A turn is ended by
    the header of what follows it: <|observation|> after calls, <|user|> after an answer."""

    styles = ("\n", "")  # between tags: GLM 4.5 and 4.6 have line breaks, 4.7 and 5 nothing
    style = styles[0]
    result_goes_on = True
    example = (
        "<tool_call><tool>\n<arg_key><key></arg_key>\n<arg_value><value></arg_value>\n</tool_call>"
    )
    name = re.compile(r"\s*([^\s<>{}\"\[\]]+)\s*(?=<arg_key>|</tool_call>|$)")
    pair_key = re.compile(r"<arg_key>([^<>\n]+)</arg_key>\s*<arg_value>")
    value_end = re.compile(r"</arg_value>|<arg_key>|</tool_call>\s*$")
    blanks = re.compile(r"\s*")

    def __init__(self, tools: list[dict]):
        functions = [tool["function"] for tool in tools]
        self.schemas = {function["name"]: properties_of(function) for function in functions}

    def write(self, text: str, calls: list[Call]) -> str:
        parts = [text] if text else []
        parts += [self._write_call(call) for call in calls]
        return "\n".join(parts)

    def _write_call(self, call) -> str:
        glue = self.style
        block = f"<tool_call>{call.name}{glue}"
        for key, value in call.arguments.items():
            written = value if isinstance(value, str) else as_json(value)
            block += f"<arg_key>{key}</arg_key>{glue}<arg_value>{written}</arg_value>{glue}"
        return block + "</tool_call>"

    def with_thought(self, thought: str, words: str) -> str:
        return f"<think>{thought}</think>" + (f"\n{words}" if words else "")

    def parse(self, text: str) -> list[Call]:
        return read_blocks(text, self._read_block, "<tool_call>")

    def _read_block(self, text, start, body) -> tuple[list[Call], int]:
        call, end = self._read_call(text, body)
        stop = end_block(call, "call", text, end)
        return [finish(call, text[start:stop], self.example)], stop

    def _read_call(self, text, at) -> tuple[Call, int]:
        """Reads a name and its pairs at text[at:] -> the call, and where it ended."""
        head = self.name.match(text, at)
        if not head:
            return bad_call("no name follows <tool_call>"), at
        name = head[1]
        at = head.end()
        schemas = self.schemas.get(name, {})
        arguments = {}
        while text.startswith("<arg_key>", at):
            start = self.pair_key.match(text, at)
            if not start:
                return bad_call("an <arg_key> has no end, or no <arg_value>", name), at
            key = start[1]
            at = start.end()
            end = self.value_end.search(text, at)
            if not end or end[0] != "</arg_value>":
                return bad_call(f"</arg_value> is missing after {key}", name), at
            if key in arguments:
                return bad_call(f"{key} is given twice", name), at
            value = text[at : end.start()]
            types = allowed_types(schemas.get(key, {"type": "string"}))
            try:
                arguments[key] = typed_value(value, types)
            except ValueError:
                expected = " or ".join(sorted(types))
                return bad_call(f"{key} = {quote_start(value)} is no {expected}", name), at
            at = self.blanks.match(text, end.end()).end()
        if not text.startswith("</tool_call>", at):
            # here a call that was cut between two pairs would look whole
            return bad_call("</tool_call> is missing", name), at
        return Call(name, arguments), at

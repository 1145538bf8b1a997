"""llama3: the whole turn is one JSON object, as Llama 3.1 and 3.2 write it."""

import re

from formats.base import (
    Call,
    Format,
    bad_call,
    behind_thinking,
    call_of,
    finish,
    read_json,
    write_object,
)
from run.config import UserError


class Llama3(Format):
    """The whole turn is one JSON object, with or without <|python_tag|>. A turn that does not
    begin like a call is an answer."""

    parallel = False
    example = '{"name": "<tool>", "parameters": {"<key>": <value>}} and nothing else'
    begins = re.compile(r'<\|python_tag\|>|\{\s*"(name|parameters|arguments|type)"')

    def write(self, text: str, calls: list[Call]) -> str:
        if len(calls) > 1:
            raise UserError(f"format llama3 writes one call in a turn, got {len(calls)}: split it")
        return write_object(calls[0], "parameters") if calls else text

    def parse(self, text: str) -> list[Call]:
        body = behind_thinking(text)
        if not self.begins.match(body):
            return []
        body = body.removeprefix("<|python_tag|>")
        value, end, error = read_json(body, 0)
        call = bad_call(error) if error else call_of(value, ("parameters", "arguments"))
        junk = body[end:].strip()
        if junk and not call.error:
            call.error = f"{junk[:40]!r} follows the object"
        return [finish(call, text.strip(), self.example)]

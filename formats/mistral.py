"""mistral: [TOOL_CALLS] and what follows it, in three syntaxes."""

import re

from formats.base import (
    Call,
    Format,
    as_json,
    bad_call,
    call_of,
    finish,
    json_start,
    quote_start,
    read_blocks,
    read_json,
    with_ids,
    write_object,
)


class Mistral(Format):
    """A list of calls behind [TOOL_CALLS], or [TOOL_CALLS] in front of each call; outside thinking.

    Three syntaxes are told apart by what follows [TOOL_CALLS], and all of them are read: a list
    (models up to Small 3.1; with a blank in front in the oldest), name[CALL_ID]id[ARGS]
    (Small 3.2), name[ARGS] (Devstral 2507, Magistral 2509, Ministral 3). The template's own is
    written. An id has 9 letters or digits."""

    styles = ("list", "name and id", "name")
    style = styles[0]
    listed = (
        '[TOOL_CALLS] [{"name": "<tool>", "arguments": {"<key>": <value>}, "id": "<9 letters>"}]'
    )
    named = '[TOOL_CALLS]<tool>[ARGS]{"<key>": <value>}'
    begins_list = re.compile(r"\s*[\[{]")
    begins_named = re.compile(r"([^\s\[]+)(?:\[CALL_ID\]([^\[]*))?\[ARGS\]")

    def write(self, text: str, calls: list[Call]) -> str:
        if not calls:
            return text
        calls = with_ids(calls)
        if self.style == "list":
            objects = []
            for call in calls:
                head = write_object(call, "arguments").removesuffix("}")
                objects.append(f'{head}, "id": "{call.id}"}}')
            return f"{text}[TOOL_CALLS][{', '.join(objects)}]"
        for call in calls:
            text += f"[TOOL_CALLS]{call.name}"
            if self.style == "name and id":
                text += f"[CALL_ID]{call.id}"
            text += f"[ARGS]{as_json(call.arguments)}"
        return text

    def parse(self, text: str) -> list[Call]:
        thinking = (("[THINK]", "[/THINK]"),)
        return read_blocks(text, self._read_block, "[TOOL_CALLS]", thinking)

    def _read_block(self, text, start, body) -> tuple[list[Call], int]:
        """Reads what follows one [TOOL_CALLS]: nothing but calls up to the next one."""
        if self.begins_list.match(text, body):
            calls, end = self._read_list(text, body)
        elif self.begins_named.match(text, body):
            calls, end = self._read_named(text, body)
        else:
            calls = [bad_call("no list and no name[ARGS] follows [TOOL_CALLS]")]
            end = body
        stop = text.find("[TOOL_CALLS]", end)
        if stop < 0:
            stop = len(text)
        junk = text[end:stop].strip()
        example = self.listed if self.style == "list" else self.named
        for call in calls:
            if junk and not call.error:
                call.error = f"{quote_start(junk)} follows the call"
            finish(call, text[start:stop], example)
        return calls, stop

    def _read_list(self, text, start) -> tuple[list[Call], int]:
        value, end, error = read_json(text, start)
        if not error and not (isinstance(value, list) and value):
            error = f"expected a list of calls, got {json_start(value)}"
        if error:
            return [bad_call(error)], end
        return [call_of(item) for item in value], end

    def _read_named(self, text, start) -> tuple[list[Call], int]:
        head = self.begins_named.match(text, start)
        arguments, end, error = read_json(text, head.end())
        if not error and not isinstance(arguments, dict):
            error = f"the arguments must be an object, got {json_start(arguments)}"
        return [Call(head[1], arguments, error, id=head[2] or "")], end

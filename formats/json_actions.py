"""json_actions: the whole turn is one JSON object with a list of actions, as in OpenThinkIMG."""

import re

from formats.base import (
    THINK,
    Call,
    Format,
    as_json,
    bad_call,
    behind_thinking,
    call_of,
    finish,
    quote_start,
    read_json,
    write_object,
)


class JsonActions(Format):
    """The whole turn is one JSON object; thinking may stand in front of it.

    {"thought": "...", "actions": [{"name": "...", "arguments": {...}}, ...]}

    The results follow as a user's message. An answer is an object whose actions are an empty list,
    or a plain text: a turn that does not begin with { and has no such object in it. A tool that
    ends the episode (tools/finish.py) is an action like any other."""

    inline = True
    example = (
        '{"thought": "...", "actions": [{"name": "<tool>", "arguments": {"<key>": <value>}}]}'
        " and nothing else"
    )
    begins = re.compile(r'\{\s*"(?:thought|actions)"\s*:')

    def __init__(self, tools: list[dict]):
        self.functions = [tool["function"] for tool in tools]

    def describe(self) -> str:
        lines = [
            "Write each turn as one JSON object and nothing else:",
            '{"thought": "...", "actions": [{"name": "...", "arguments": {...}}]}',
            "The results of all actions follow. To answer, leave actions empty: []",
            "The tools that an action may name:",
        ]
        lines += map(as_json, self.functions)
        return "\n".join(lines)

    def write(self, text: str, calls: list[Call]) -> str:
        if not calls:
            return text
        thinking = THINK.match(text)
        head = thinking[0] if thinking else ""
        thought = as_json(text.removeprefix(head))
        actions = ", ".join(write_object(call, "arguments") for call in calls)
        return f'{head}{{"thought": {thought}, "actions": [{actions}]}}'

    def result(self, name: str, content: str) -> str:
        return f"Result of {name or 'the call'}:\n{content}\n"

    def parse(self, text: str) -> list[Call]:
        body = behind_thinking(text)
        if body.startswith("{"):
            calls = self._read_actions(body)
        elif begin := self.begins.search(body):
            words = quote_start(body[: begin.start()])
            calls = [bad_call(f"{words} stands before the object")]
        else:
            calls = []  # an answer in plain text
        return [finish(call, body, self.example) for call in calls]

    def _read_actions(self, body) -> list[Call]:
        value, end, error = read_json(body, 0)
        if error:
            return [bad_call(error)]
        junk = body[end:].strip()
        if junk:
            return [bad_call(f"{quote_start(junk)} follows the object")]
        if not isinstance(value.get("actions"), list):
            return [bad_call('the object has no list "actions"')]
        return [call_of(action) for action in value["actions"]]

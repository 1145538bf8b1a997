"""OpenAI chat messages, and the tool calls in them: read and written in one place.

from formats.messages import calls_of
names = [call.name for call in calls_of(message)]
"""

import json

from formats.base import Call
from run.config import UserError

FORM = '{"function": {"name": …, "arguments": an object or its JSON}}'


def calls_of(message: dict) -> list[Call]:
    """Reads a message's `tool_calls`: of each its name, its arguments as an object, and its id, ""
    where it has none. Without the wrapping {"function": …} it is a call, too. UserError, which
    shows it, for what is none."""
    entries = message.get("tool_calls") or []
    if not isinstance(entries, list):
        raise UserError(f"its tool_calls {entries!r:.160}: expected a list of {FORM}")
    calls = []
    for entry in entries:
        function = entry.get("function", entry) if isinstance(entry, dict) else None
        if not isinstance(function, dict):
            raise UserError(f"its tool call {entry!r:.160}: expected {FORM}")
        name = function.get("name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                arguments = None  # refused below
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise UserError(f"its tool call {entry!r:.160}: expected {FORM}")
        calls.append(Call(name, arguments, id=entry.get("id") or ""))
    return calls


def openai_call(call: Call) -> dict:
    """Writes a call as an entry of a message's `tool_calls`."""
    function = {"name": call.name, "arguments": call.arguments}
    written = {"type": "function", "function": function}
    return {"id": call.id, **written} if call.id else written


def assistant_message(text: str, calls: list[Call] = ()) -> dict:
    """Writes an assistant's message, with tool_calls if it makes any."""
    message = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [openai_call(call) for call in calls]
    return message

"""atem: messages with recipients, and calls in <atem:invoke>, as Muse Glimmer writes them."""

import re

from formats.base import (
    Call,
    Format,
    as_json,
    bad_call,
    finish,
    join_thought,
    properties_of,
    quote_start,
    split_thought,
)
from formats.values import allowed_types, typed_value


class Atem(Format):
    """A turn is one or more messages, each with a header that the model writes: who it is for. What
    is for `self` is a thought, for `user` an answer, for a tool a call of it.

    A string is written as it is, all else as JSON: which of the two a value is, the tool's schema
    says. No value can hold </atem:parameter>: the first one ends it."""

    writes_header = True
    has_own_thinking = True
    thinking = re.compile(r" to=self<\|message\|>(.*?)<\|eom\|><\|start\|>assistant", re.DOTALL)
    example = (
        "<|start|>assistant to=<tool><|message|><atem:function_calls>\n"
        '<atem:invoke name="<tool>">\n'
        '<atem:parameter name="<key>"><value></atem:parameter>\n</atem:invoke>\n'
        "</atem:function_calls>"
    )
    next_message = "<|eom|><|start|>assistant"
    recipient = re.compile(r"\s*to=([^\s<]+)")
    call_start = re.compile(r'\s*<atem:function_calls>\s*<atem:invoke name="([^"\n]+)">\s*')
    parameter_start = re.compile(r'<atem:parameter name="([^"\n]+)">')
    value_end = re.compile(r"</atem:parameter>|<atem:parameter name=|</atem:invoke>\s*</atem:func")
    call_end = re.compile(r"</atem:invoke>\s*</atem:function_calls>\s*")
    blanks = re.compile(r"\s*")

    def __init__(self, tools: list[dict]):
        functions = [tool["function"] for tool in tools]
        self.schemas = {function["name"]: properties_of(function) for function in functions}

    def write(self, text: str, calls: list[Call]) -> str:
        if "<|message|>" in text:  # a turn that kept the form in which it was sampled
            return text
        thought, words = split_thought(text)
        messages = []
        if thought is not None:
            messages.append(f" to=self<|message|>{thought}")
        if words or not calls:
            messages.append(f" to=user<|message|>{words}")
        for call in calls:
            messages.append(f" to={call.name}<|message|>{self._write_call(call)}")
        return self.next_message.join(messages)

    def _write_call(self, call) -> str:
        block = f'<atem:function_calls>\n<atem:invoke name="{call.name}">\n'
        for key, value in call.arguments.items():
            written = value if isinstance(value, str) else as_json(value)
            block += f'<atem:parameter name="{key}">{written}</atem:parameter>\n'
        return block + "</atem:invoke>\n</atem:function_calls>"

    def words(self, text: str) -> str:
        thoughts = []
        words = []
        for recipient, body, _ in self._messages(text):
            if recipient == "self":
                thoughts.append(body)
            elif recipient in ("", "user"):
                words.append(body)
        said = "\n\n".join(words)
        return join_thought("\n\n".join(thoughts), said) if thoughts else said

    def _messages(self, text) -> list[tuple[str, str, str]]:
        """Cuts a turn at the ends of its messages -> of each its recipient, its body, all of it."""
        messages = []
        for part in text.split(self.next_message):
            header, tag, body = part.partition("<|message|>")
            to = self.recipient.match(header)
            if to:
                messages.append((to[1], body, part))
            else:
                messages.append(("", body if tag else part, part))
        return messages

    def parse(self, text: str) -> list[Call]:
        calls = []
        for recipient, body, whole in self._messages(text):
            if recipient in ("", "self", "user"):
                continue
            call = self._read_call(recipient, body)
            calls.append(finish(call, whole, self.example))
        return calls

    def _read_call(self, recipient, text) -> Call:
        """Reads the body of a message for a tool."""
        head = self.call_start.match(text)
        if not head:
            return bad_call("no <atem:function_calls> with <atem:invoke name=...>", recipient)
        name = head[1]
        if name != recipient:
            return bad_call(f"the message is for {recipient}, but it invokes {name}", name)
        at = head.end()
        schemas = self.schemas.get(name, {})
        arguments = {}
        while start := self.parameter_start.match(text, at):
            key = start[1]
            at = start.end()
            end = self.value_end.search(text, at)
            if not end or end[0] != "</atem:parameter>":
                return bad_call(f"</atem:parameter> is missing after {key}", name)
            if key in arguments:
                return bad_call(f"parameter {key} is given twice", name)
            value = text[at : end.start()]
            types = allowed_types(schemas.get(key, {"type": "string"}))
            try:
                arguments[key] = typed_value(value, types)
            except ValueError:
                expected = " or ".join(sorted(types))
                return bad_call(f"{key} = {quote_start(value)} is no {expected}", name)
            at = self.blanks.match(text, end.end()).end()
        end = self.call_end.match(text, at)
        if not end:
            return bad_call("</atem:invoke> and </atem:function_calls> are missing", name)
        if end.end() < len(text):
            return bad_call(f"{quote_start(text[end.end() :])} follows the call", name)
        return Call(name, arguments)

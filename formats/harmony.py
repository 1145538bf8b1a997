"""harmony: messages with channels, as gpt-oss writes them."""

import re

from formats.base import (
    Call,
    Format,
    as_json,
    bad_call,
    finish,
    join_thought,
    json_start,
    quote_start,
    read_json,
    split_thought,
)
from run.config import UserError


class Harmony(Format):
    """A turn is one or more messages, each with a header that the model writes: who it is for and
    its channel. Analysis is a thought; what is for a function is a call, one in a turn, and ends
    it; `final` is the answer; commentary for nobody is words."""

    parallel = False
    writes_header = True
    has_own_thinking = True
    thinking = re.compile(
        r"<\|channel\|>analysis<\|message\|>(.*?)<\|end\|><\|start\|>assistant", re.DOTALL
    )
    example = (
        "<|start|>assistant to=functions.<tool><|channel|>commentary json<|message|>"
        '{"<key>": <value>}'
    )
    begins = re.compile(r"\s*(?:to=|<\|channel\|>)")
    next_message = "<|end|><|start|>assistant"
    recipient = re.compile(r"\bto=([^\s<]+)")
    channel = re.compile(r"<\|channel\|>([a-z]*)")
    message_end = re.compile(r"\s*(?:<\|end\|>|<\|call\|>|<\|return\|>|$)")

    def write(self, text: str, calls: list[Call]) -> str:
        if "<|message|>" in text:  # a turn that kept the form in which it was sampled
            return text
        if len(calls) > 1:
            raise UserError(f"format harmony writes one call in a turn, got {len(calls)}: split it")
        thought, words = split_thought(text)
        messages = []
        if thought is not None:
            messages.append(f"<|channel|>analysis<|message|>{thought}")
        if not calls:
            messages.append(f"<|channel|>final<|message|>{words}")
        elif words:
            # as templates do it: words in front of a call are its analysis, unless there is one
            channel = "analysis" if thought is None else "commentary"
            messages.append(f"<|channel|>{channel}<|message|>{words}")
        for call in calls:
            header = f" to=functions.{call.name}<|channel|>commentary json"
            messages.append(f"{header}<|message|>{as_json(call.arguments)}")
        return self.next_message.join(messages)

    def words(self, text: str) -> str:
        thoughts = []
        words = []
        for header, body in self._messages(text):
            channel = self.channel.search(header)
            if self.recipient.search(header):
                continue
            is_thought = channel is not None and channel[1] == "analysis"
            if is_thought:
                thoughts.append(body)
            else:
                words.append(body)
        said = "\n\n".join(words)
        return join_thought("\n\n".join(thoughts), said) if thoughts else said

    def _messages(self, text) -> list[tuple[str, str]]:
        """Cuts a turn at the ends of its messages -> of each its header and its body."""
        messages = []
        for part in text.split(self.next_message):
            header, tag, body = part.partition("<|message|>")
            if tag:
                messages.append((header, body.removesuffix("<|end|>")))
            elif not messages:
                messages.append(("", part))  # no header at all
        return messages

    def parse(self, text: str) -> list[Call]:
        calls = []
        at = 0
        while at <= len(text):
            start = at
            header, body = self._read_header(text, at)
            to = self.recipient.search(header) if self.begins.match(header) else None
            if not to:
                # words or a thought: up to its end, whatever stands in it
                end = text.find(self.next_message, body)
                if end < 0:
                    break
                at = end + len(self.next_message)
                continue
            name = to[1].removeprefix("functions.")
            call, end = self._read_call(text, name, body)
            at = text.find(self.next_message, end)
            stop = at if at >= 0 else len(text)
            calls.append(finish(call, text[start:stop], self.example))
            if at < 0:
                break
            at += len(self.next_message)
        if len(calls) > 1:
            raw = text[text.index(calls[0].raw) :]
            return [finish(bad_call("more than one call in a turn"), raw, self.example)]
        return calls

    def _read_header(self, text, at) -> tuple[str, int]:
        """Reads what stands in front of <|message|> -> it, and where the body begins. Behind a
        header that does not end there is no body."""
        end = text.find("<|message|>", at)
        if end < 0:
            return text[at:], len(text)
        return text[at:end], end + len("<|message|>")

    def _read_call(self, text, name, body) -> tuple[Call, int]:
        """Reads the JSON of a call -> the call, and where it ended."""
        arguments, end, error = read_json(text, body)
        if error:
            return bad_call(error, name), end
        if not isinstance(arguments, dict):
            reason = f"the arguments must be an object, got {json_start(arguments)}"
            return bad_call(reason, name), end
        if not self.message_end.match(text, end):
            return bad_call(f"{quote_start(text[end:].strip())} follows the object", name), end
        return Call(name, arguments), end

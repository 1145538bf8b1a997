"""gemma4: call:name{key:value} with a quote token of its own, as Gemma 4 writes it."""

import re

from formats.base import (
    DEEPEST,
    Call,
    Format,
    bad_call,
    end_block,
    finish,
    join_thought,
    quote_start,
    read_blocks,
    split_thought,
)


class Gemma4(Format):
    """Any number of calls in a turn, outside its thought; the results follow inside of the turn.

    A string stands between two quote tokens and cannot hold one; numbers, true, false, null, lists
    and objects are as in JSON, but for keys, which have no quotes. Keys are sorted, as templates
    do it, and read in any order."""

    styles = ("null", "None")
    style = styles[0]
    call_start = "<|tool_call>"
    call_end = "<tool_call|>"
    quote = '<|"|>'
    has_own_thinking = True
    thinking = re.compile(r"<\|channel>thought\n(.*?)<channel\|>", re.DOTALL)
    thought_end = "\n<channel|>"
    result_goes_on = True
    example = '<|tool_call>call:<tool>{<key>:<|"|><text><|"|>,<key>:<number>}<tool_call|>'
    head = re.compile(r"\s*call:([^\s{}]+)\s*\{")
    key = re.compile(r"([^:,{}\[\]]+):\s*")
    literal = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null|None")
    separator = re.compile(r"\s*([,}\]])\s*")
    constants = {"true": True, "false": False, "null": None, "None": None}

    def write(self, text: str, calls: list[Call]) -> str:
        thought, words = split_thought(text)
        if thought is not None:
            text = f"<|channel>thought\n{thought}\n<channel|>{words}"
        return text + "".join(self._write_call(call) for call in calls)

    def words(self, text: str) -> str:
        thought = self.thinking.match(text)
        if not thought:
            return text
        return join_thought(thought[1].removesuffix("\n"), text[thought.end() :])

    def _write_call(self, call) -> str:
        return f"{self.call_start}call:{call.name}{self._write(call.arguments)}{self.call_end}"

    def _write(self, value) -> str:
        if isinstance(value, str):
            return self.quote + value + self.quote
        if isinstance(value, bool):
            return "true" if value else "false"
        if value is None:
            return self.style
        if isinstance(value, dict):
            # as jinja's dictsort: capitals do not count
            keys = sorted(value, key=str.lower)
            return "{" + ",".join(f"{key}:{self._write(value[key])}" for key in keys) + "}"
        if isinstance(value, list):
            return "[" + ",".join(self._write(item) for item in value) + "]"
        return str(value)

    def parse(self, text: str) -> list[Call]:
        return read_blocks(text, self._read_block, self.call_start, (("<|channel>", "<channel|>"),))

    def _read_block(self, text, start, body) -> tuple[list[Call], int]:
        call, end = self._read_call(text, body)
        stop = end_block(call, "call", text, end, (self.call_start, self.call_end))
        return [finish(call, text[start:stop], self.example)], stop

    def _read_call(self, text, at) -> tuple[Call, int]:
        """Reads call:name{...} at text[at:] -> the call, and where it ended."""
        head = self.head.match(text, at)
        if not head:
            return bad_call(f"no call:<tool>{{ follows {self.call_start}"), at
        try:
            arguments, end = self._read_object(text, head.end(), levels=DEEPEST)
        except ValueError as error:
            return bad_call(str(error), head[1]), head.end()
        return Call(head[1], arguments), end

    def _read_object(self, text, at, levels) -> tuple[dict, int]:
        """Reads what follows a { -> the object, and where it ended. ValueError: it is none."""
        values = {}
        end = self.separator.match(text, at)
        if end and end[1] == "}":
            return values, end.end(1)
        while True:
            key, at = self._read_key(text, at)
            if key in values:
                raise ValueError(f"{key} is given twice")
            values[key], at = self._read_value(text, at, levels)
            separator = self._read_separator(text, at, "}", key)
            at = separator.end()
            if separator[1] == "}":
                return values, separator.end(1)

    def _read_list(self, text, at, levels) -> tuple[list, int]:
        """Reads what follows a [ -> the list, and where it ended. ValueError: it is none."""
        values = []
        end = self.separator.match(text, at)
        if end and end[1] == "]":
            return values, end.end(1)
        while True:
            value, at = self._read_value(text, at, levels)
            values.append(value)
            separator = self._read_separator(text, at, "]", "an item")
            at = separator.end()
            if separator[1] == "]":
                return values, separator.end(1)

    def _read_key(self, text, at) -> tuple[str, int]:
        """Reads a key and its colon."""
        if text.startswith(self.quote, at):
            key, at = self._read_string(text, at)
            if not text.startswith(":", at):
                raise ValueError(f"no colon follows the key {quote_start(key)}")
            return key, at + 1
        key = self.key.match(text, at)
        if not key or not key[1].strip():
            raise ValueError(f"expected <key>: at {text[at : at + 12]!r}")
        return key[1].strip(), key.end()

    def _read_separator(self, text, at, end, what) -> re.Match:
        """Reads the comma or the end behind a value."""
        separator = self.separator.match(text, at)
        if not separator or separator[1] not in (",", end):
            raise ValueError(f"no comma or {end} follows {what}, at {text[at : at + 12]!r}")
        return separator

    def _read_value(self, text, at, levels) -> tuple[object, int]:
        """Reads a value -> it, and where it ended. ValueError: it is none."""
        if levels == 0:
            raise ValueError("too large or too deep")
        if text.startswith(self.quote, at):
            return self._read_string(text, at)
        if text.startswith("{", at):
            return self._read_object(text, at + 1, levels - 1)
        if text.startswith("[", at):
            return self._read_list(text, at + 1, levels - 1)
        literal = self.literal.match(text, at)
        if not literal:
            reason = f"no value at {text[at : at + 12]!r}"
            raise ValueError(f"{reason} (text stands between two {self.quote})")
        word = literal[0]
        if word in self.constants:
            return self.constants[word], literal.end()
        try:
            number = int(word) if word.lstrip("-").isdigit() else float(word)
        except ValueError:  # of 5000 digits
            raise ValueError("too large or too deep") from None
        return number, literal.end()

    def _read_string(self, text, at) -> tuple[str, int]:
        """Reads a string with its quote tokens."""
        start = at + len(self.quote)
        end = text.find(self.quote, start)
        if end < 0:
            raise ValueError(f"a second {self.quote} is missing")
        return text[start:end], end + len(self.quote)

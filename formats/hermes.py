"""hermes: JSON in <tool_call> tags, as Qwen2.5, Qwen3 and many others write it."""

from formats.base import (
    Call,
    Format,
    end_block,
    finish,
    join_lines,
    read_blocks,
    read_call,
    write_object,
)


class Hermes(Format):
    """Any number of <tool_call> blocks in a turn, outside <think>."""

    example = '<tool_call>\n{"name": "<tool>", "arguments": {"<key>": <value>}}\n</tool_call>'

    def write(self, text: str, calls: list[Call]) -> str:
        blocks = [f"<tool_call>\n{write_object(call, 'arguments')}\n</tool_call>" for call in calls]
        return join_lines(text, blocks)

    def parse(self, text: str) -> list[Call]:
        return read_blocks(text, self._read_block, "<tool_call>")

    def _read_block(self, text, start, body) -> tuple[list[Call], int]:
        call, end = read_call(text, body, ("arguments",))
        stop = end_block(call, "object", text, end)
        return [finish(call, text[start:stop], self.example)], stop

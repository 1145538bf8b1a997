"""hermes: JSON in <tool_call> tags, as Qwen2.5, Qwen3 and many others write it."""

from formats.base import (
    Call,
    Format,
    bad_call,
    call_of,
    end_block,
    finish,
    read_blocks,
    read_json,
    write_object,
)


class Hermes(Format):
    """Any number of <tool_call> blocks in a turn, outside <think>."""

    example = '<tool_call>\n{"name": "<tool>", "arguments": {"<key>": <value>}}\n</tool_call>'

    def write(self, text: str, calls: list[Call]) -> str:
        blocks = [text] if text else []
        for call in calls:
            blocks.append(f"<tool_call>\n{write_object(call, 'arguments')}\n</tool_call>")
        return "\n".join(blocks)

    def parse(self, text: str) -> list[Call]:
        return read_blocks(text, self._read_block, "<tool_call>")

    def _read_block(self, text, start, body) -> tuple[list[Call], int]:
        value, end, error = read_json(text, body)
        call = bad_call(error) if error else call_of(value)
        stop = end_block(call, "object", text, end)
        return [finish(call, text[start:stop], self.example)], stop

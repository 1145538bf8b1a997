"""fence: a ```python block is a call, a ```output block its result, in the same turn."""

import re

from formats.base import Call, Format, first_argument, stopped_without_call, text_tools
from run.config import UserError


class Fence(Format):
    """A ```python block; the result follows in the same turn.

    The stop string has line breaks on both sides, because "\\n```" is also in the opening
    "\\n```python". A turn that ends right behind the fence is closed by its stop token instead."""

    inline = True
    in_place = True
    parallel = False
    example = "```python\n<code>\n```"
    opening = re.compile(r"^```(.*)\n", re.MULTILINE)
    closing = re.compile(r"^```[ \t]*+$\n?", re.MULTILINE)

    def __init__(self, tools: list[dict]):
        if len(tools) > 1:
            names = ", ".join(tool["function"]["name"] for tool in tools)
            raise UserError(f"format fence has one tool, got {names}: give one, or format=tags")
        self.tools = text_tools(tools, "fence")  # one, or none
        if tools:
            self.stop_strings = ("\n```\n",)

    def describe(self) -> str:
        [tool] = self.tools.values()
        return (
            f"You can use python. {tool.description}\nWrite it as\n```python\nprint(6 * 7)\n```\n"
            "and the result follows as\n```output\n42\n```\nThen go on."
        )

    def write(self, text: str, calls: list[Call]) -> str:
        blocks = [text] if text else []
        for call in calls:
            blocks.append(f"```python\n{first_argument(call)}\n```")
        return "\n".join(blocks)

    def result(self, name: str, content: str) -> str:
        return f"```output\n{content}\n```\n"

    def parse(self, text: str) -> list[Call]:
        calls = []
        at = 0
        while opening := self.opening.search(text, at):
            closing = self.closing.search(text, opening.end())
            if not closing:
                break  # nor does any later block end: to look for that again would take long
            at = closing.end()
            if opening[1].strip() != "python":
                continue
            code = text[opening.end() : closing.start()].removesuffix("\n")
            raw = text[opening.start() : at]
            for name, tool in self.tools.items():
                calls.append(Call(name, {tool.argument: code}, raw=raw))
        return calls or stopped_without_call(text, self.stop_strings, self.example)

"""tags: <search> ... </search>, answered by <information> ... </information> in the same turn."""

import re

from formats.base import (
    Call,
    Format,
    any_of,
    first_argument,
    stopped_without_call,
    text_tools,
)


class Tags(Format):
    """<tool>argument</tool> for each tool; the result follows in the same turn."""

    inline = True
    in_place = True
    parallel = False
    information = "information"  # the one tag around every result, as in Search-R1

    def __init__(self, tools: list[dict]):
        self.tools = text_tools(tools, "tags")
        self.call_ends = tuple(f"</{name}>" for name in self.tools)
        self.stop_strings = (*self.call_ends, "</answer>")
        self.example = " or ".join(f"<{name}>...</{name}>" for name in self.tools)
        names = any_of(list(self.tools)).pattern
        self.tag = re.compile(rf"<({names})>((?:(?!<\1>).)*?)</\1>", re.DOTALL)

    def describe(self) -> str:
        lines = [f"Use tools by writing tags; a result follows in <{self.information}>."]
        for name, tool in self.tools.items():
            lines.append(f"<{name}>{tool.argument}</{name}>: {tool.description}")
        lines.append("Write the answer as <answer>...</answer>.")
        return "\n".join(lines)

    def write(self, text: str, calls: list[Call]) -> str:
        blocks = [text] if text else []
        for call in calls:
            blocks.append(f"<{call.name}>{first_argument(call)}</{call.name}>")
        return "\n".join(blocks)

    def result(self, name: str, content: str) -> str:
        return f"\n<{self.information}>{content}</{self.information}>\n"

    def parse(self, text: str) -> list[Call]:
        calls = []
        for tag in self.tag.finditer(text):
            name = tag[1]
            body = tag[2].strip()
            if "\n" in body:  # code of several lines keeps its indentation, a query loses blanks
                body = tag[2].strip("\n")
            calls.append(Call(name, {self.tools[name].argument: body}, raw=tag[0]))
        return calls or stopped_without_call(text, self.call_ends, self.example)

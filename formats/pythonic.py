"""pythonic: calls as Python writes them, as LFM2, Olmo 3, Llama 4 and ToolACE have it."""

import ast
import re
from typing import NamedTuple

from formats.base import (
    DEEPEST,
    Call,
    Format,
    as_json,
    bad_call,
    behind_thinking,
    finish,
    read_blocks,
)

ESCAPES = {"\n": "\\n", "\r": "\\r", "\x00": "\\x00"}
KNOWN_ESCAPES = "\\'\"abfnrtvxuUN01234567"  # what may follow a backslash
WORDS = {"true": True, "false": False, "null": None}  # JSON's, which some templates write


class Spelling(NamedTuple):
    """What families write in different ways."""

    start: str  # the tag in front of the calls; "": the whole turn is a list of them
    end: str
    is_list: bool  # in brackets, with commas; else each on a line of its own
    values: str  # "python", "json", or "lfm2": texts as Python has them and lists as JSON


class Pythonic(Format):
    """Any number of calls in a list or on lines, with keyword arguments and literal values.

    They are read by Python's own parser and never evaluated. A name or key has to be one in Python,
    too."""

    styles = (
        Spelling("<|tool_call_start|>", "<|tool_call_end|>", True, "lfm2"),
        Spelling("<|tool_call_start|>", "<|tool_call_end|>", True, "lfm2.5"),
        Spelling("<function_calls>", "</function_calls>", False, "json"),
        Spelling("", "", True, "python"),
        Spelling("", "", True, "json"),
    )
    style = styles[0]
    tokens = ("<|tool_call_start|>", "<|tool_call_end|>")
    begins_list = re.compile(r"(?:<\|python_start\|>)?\s*\[\s*[^\W\d][\w.]*\(")
    string = r"'(?:[^'\\]|\\.)*+'" + r'|"(?:[^"\\]|\\.)*+"'
    escape = re.compile(r"\\(.)|([\n\r\0\ud800-\udfff])", re.DOTALL)

    def write(self, text: str, calls: list[Call]) -> str:
        if not calls:
            return text
        written = [self._write_call(call) for call in calls]
        if not self.style.start:  # the whole turn is a list, and has no words
            return f"[{', '.join(written)}]"
        body = f"[{', '.join(written)}]" if self.style.is_list else "\n".join(written)
        return text + self.style.start + body + self.style.end

    def _write_call(self, call) -> str:
        pairs = [f"{key}={self._write_value(value)}" for key, value in call.arguments.items()]
        return f"{call.name}({', '.join(pairs)})"

    def _write_value(self, value) -> str:
        values = self.style.values
        if values == "json":
            return as_json(value)
        if isinstance(value, str) and values != "python":
            text = value.replace("\\", "\\\\").replace("'", "\\'")
            return "'" + text.replace("\n", "\\n").replace("\r", "\\r") + "'"
        is_json = isinstance(value, dict) or (isinstance(value, list) and values == "lfm2")
        if is_json and values != "python":
            return as_json(value)
        return repr(value)

    @property
    def example(self) -> str:
        calls = "<tool>(<key>=<value>)"
        if not self.style.start:
            return f"[{calls}] and nothing else"
        body = f"[{calls}]" if self.style.is_list else calls
        return self.style.start + body + self.style.end

    def parse(self, text: str) -> list[Call]:
        if self.style.start:
            return read_blocks(text, self._read_block, self.style.start)
        body = behind_thinking(text)
        if not self.begins_list.match(body):
            return []
        code = body.removeprefix("<|python_start|>").removesuffix("<|python_end|>")
        return self._read_calls(code, body)

    def _read_block(self, text, start, body) -> tuple[list[Call], int]:
        """Reads what stands behind a start tag, up to the end tag or the end of the turn."""
        end = self._find_end(text, body)
        stop = min(end + len(self.style.end), len(text))
        return self._read_calls(text[body:end], text[start:stop]), stop

    def _find_end(self, text, at) -> int:
        """Finds the end tag that stands in no string."""
        tag = self.style.end
        piece = re.compile(f"{self.string}|['\"]|{re.escape(tag)}", re.DOTALL)
        for match in piece.finditer(text, at):
            if match[0] == tag:
                return match.start()
            if len(match[0]) == 1:  # a string that does not end: the first tag is meant
                found = text.find(tag, match.start())
                return found if found >= 0 else len(text)
        return len(text)

    def _read_calls(self, code, raw) -> list[Call]:
        """Reads the calls of one block; malformed, it is one malformed call."""
        try:
            calls = [read_call(node) for node in self._nodes(code)]
        except ValueError as error:
            return [finish(bad_call(str(error)), raw, self.example)]
        return [finish(call, raw, self.example) for call in calls]

    def _nodes(self, code) -> list[ast.expr]:
        """Parses a block -> its calls. ValueError: it is none."""
        code = in_python(code, self.string, self.escape).strip()
        if not self.style.is_list:
            code = "\n".join(line.strip() for line in code.split("\n"))
        try:
            if self.style.is_list:
                tree = ast.parse(code, mode="eval").body
                nodes = tree.elts if isinstance(tree, ast.List) else []
            else:
                statements = ast.parse(code).body
                nodes = [getattr(statement, "value", statement) for statement in statements]
        except SyntaxError as error:
            raise ValueError(f"no valid Python: {error.msg}") from None
        except (ValueError, RecursionError, MemoryError):
            raise ValueError("no valid Python: too large or too deep") from None
        if not nodes:
            what = "a list of calls" if self.style.is_list else "calls on lines"
            raise ValueError(f"expected {what}, got {code[:40]!r}")
        return nodes


def in_python(code: str, string: str, escape: re.Pattern) -> str:
    """Writes line breaks and the like in strings as escapes, as Python wants them; and a backslash
    that begins no escape as two, which is how Python reads it. ValueError: a string has no end."""

    def rewrite_escape(match) -> str:
        if match[2]:
            return escaped(match[2])
        if match[1] in KNOWN_ESCAPES:
            return match[0]
        return "\\\\" + escaped(match[1])

    def rewrite_string(match) -> str:
        if len(match[0]) == 1:
            raise ValueError("no valid Python: a string does not end")
        return escape.sub(rewrite_escape, match[0])

    return re.sub(f"{string}|['\"]", rewrite_string, code, flags=re.DOTALL)


def escaped(letter: str) -> str:
    """Writes a letter as it can stand in a string: line breaks and half characters cannot."""
    if "\ud800" <= letter <= "\udfff":
        return f"\\u{ord(letter):04x}"
    return ESCAPES.get(letter, letter)


def read_call(node: ast.expr) -> Call:
    """Reads a call of a syntax tree. ValueError: it is another expression."""
    if not isinstance(node, ast.Call):
        raise ValueError("expected a call such as <tool>(<key>=<value>)")
    name = dotted_name(node.func)
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError(f"the arguments of {name} have no keys: write <key>=<value>")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg in arguments:
            raise ValueError(f"{keyword.arg} is given twice")
        arguments[keyword.arg] = read_value(keyword.value, DEEPEST)
    return Call(name, arguments)


def dotted_name(node: ast.expr) -> str:
    """Reads a name that may have dots. ValueError: it is another expression."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise ValueError("a call has no name")
    parts.append(node.id)
    return ".".join(reversed(parts))


def read_value(node: ast.expr, levels: int) -> object:
    """Reads a literal. ValueError: it is none that JSON has, or is too deep."""
    if levels == 0:
        raise ValueError("no valid Python: too large or too deep")
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        return node.value
    if isinstance(node, ast.Name) and node.id in WORDS:
        return WORDS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = getattr(node.operand, "value", None)
        if type(number) in (int, float):
            return -number
    if isinstance(node, ast.List):
        return [read_value(item, levels - 1) for item in node.elts]
    if isinstance(node, ast.Dict):
        values = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
                raise ValueError("a key of an object is no text")
            values[key.value] = read_value(value, levels - 1)
        return values
    raise ValueError("a value is no literal: write text in quotes, a number, a list or an object")

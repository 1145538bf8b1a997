"""What a call of a tool is, and what a tool raises."""

from contextvars import ContextVar

# Seconds that the call which runs here has, 0 for one that nobody stops: for limits of its own.
DEADLINE = ContextVar("deadline", default=0.0)


class ToolError(Exception):
    """Raised by a tool: the `kind` of error to count, and the `text` that the model reads."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind
        self.text = text


class NetworkError(ToolError):
    """Raised by a network tool where trying again may help: busy, or not to be reached."""

    def __init__(self, text: str):
        super().__init__("network", text)


def shorten(text: str, limit: int) -> str:
    """Takes out the middle of `text` so that `limit` characters stay; the cut is marked."""
    dropped = len(text) - limit
    if dropped <= 0:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {dropped} characters cut ...]\n{text[len(text) - half :]}"

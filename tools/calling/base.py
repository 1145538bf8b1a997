"""What a tool is, and what it raises."""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from images import Picture

# Seconds that the call which runs here has, 0 for one that nobody stops: for limits of its own.
DEADLINE = ContextVar("deadline", default=0.0)


@dataclass
class Tool:
    """A tool as the Toolbox calls it and the model is told of it."""

    name: str
    schema: dict  # as transformers.utils.get_json_schema gives it
    function: Callable  # function(**arguments); where there is `make`: function(state, **arguments)
    is_async: bool
    make: Callable | None = None  # make(example) -> the state; tools with the same one share it
    prepare: Callable | None = None  # called at the start: UserError where it cannot work here
    shared: bool = False  # one state for the run, else one for each trajectory
    serial: bool = True  # calls on the state of one trajectory wait for each other
    pure: bool = False  # the same arguments give the same result: it is kept
    network: bool = False  # its NetworkError is worth trying again
    ends: bool = False  # a call without an error ends the episode; its result is the answer
    sees: bool = False  # its argument `image` is the number of one of the trajectory's images
    takes_images: bool = False  # function(state, images, **arguments): those of the trajectory
    timeout: float | None = None  # seconds; None: the Toolbox's
    concurrency: int | None = None  # calls at once; None: as many as the Toolbox lets
    retries: int | None = None  # after a NetworkError; None: RETRIES


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


def numbered(images: list, number: int) -> "Picture":
    """The trajectory's image of that number, from 1. ToolError if there is none."""
    if isinstance(number, int) and 1 <= number <= len(images):
        return images[number - 1]
    there = f"the images are 1 to {len(images)}" if images else "there are no images here"
    raise ToolError("no_image", f"error: there is no image {str(number)[:80]}; {there}")


def shorten(text: str, limit: int) -> str:
    """Takes out the middle of `text` so that `limit` characters stay; the cut is marked."""
    dropped = len(text) - limit
    if dropped <= 0:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {dropped} characters cut ...]\n{text[len(text) - half :]}"

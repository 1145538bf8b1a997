"""What tools and environments are, what they return, and what they raise."""

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from run.config import UserError

if TYPE_CHECKING:
    from images import Picture

# Seconds that the call which runs here has, 0 for one that nobody stops: for limits of its own.
DEADLINE = ContextVar("deadline", default=0.0)
# (the trajectory, all calls of its turn) where the calls run here: for who hears a turn as a whole.
TURN = ContextVar("turn")


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
    environment: "Environment | None" = None  # whose method it is
    gives_result: bool = False  # by its annotation: it returns a Result


@dataclass
class Environment:
    """A class whose public methods are tools that share one state, of which each trajectory has its
    own. It is made when the trajectory begins."""

    name: str
    make: Callable  # make(example) -> the state, as in its tools
    hooks: dict[str, Callable]  # those of environment.HOOKS that it has
    timeout: float | None = None  # seconds that making it, or a hook, has; None: the Toolbox's


@dataclass
class Result:
    """What a tool may return instead of text, where the call earns something, is to be measured, or
    ends the episode."""

    text: str = ""  # or whatever else becomes text
    images: Sequence = ()  # of PIL
    reward: float | None = None  # of the turn that made the call: the reward turn_results
    metrics: dict[str, float] = field(default_factory=dict)  # added up over the trajectory
    ends: bool = False  # the episode: then the text is the answer

    def __post_init__(self):
        if self.reward is not None:
            self.reward = number(self.reward, "Result(reward=…)")
        self.metrics = numbers(self.metrics, "Result(metrics=…)")


def number(value, what: str) -> float:
    """Reads what an environment gave, as a float, infinite too. UserError if it is no number."""
    try:
        return float(value + 0)  # a text has no sum with 0, which float() would read
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{what} is {value!r:.80}: expected a number, or None") from None


def numbers(values, what: str) -> dict[str, float]:
    """Reads what is to be measured, as {name: number}. UserError for anything else."""
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"{what} is {values!r:.80}: expected a dict of names and numbers")
    measured = {}
    for name, value in values.items():
        measured[name] = number(value, f"{what}: {name!r}")
        if not math.isfinite(measured[name]):
            raise UserError(f"{what}: {name!r} is {value}: expected a finite number")
    return measured


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
    """Finds the trajectory's image of that number, from 1. ToolError if there is none."""
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

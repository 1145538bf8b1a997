"""Calls tools, each call under a deadline, and makes an observation of whatever comes."""

import asyncio
import inspect
import json
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial

from run.config import UserError
from run.deadline import Exited, in_thread, in_time, is_alive, shown
from tools.calling import loading
from tools.calling.base import DEADLINE, NetworkError, Tool, ToolError, shorten
from tools.calling.cache import Cache
from tools.calling.schema import signature, wrong_arguments

MAX_RESULT_CHARS = 1_000_000  # a longer text is cut here; the rollout cuts to tokens, much earlier
NO_OUTPUT = "(no output)"
CLOSING = 10.0  # seconds, at least, that close() has: a server ends in its own time
PAUSE = 0.5  # seconds before the first retry of a network tool; doubled before each further one


class Toolbox:
    """The tools of a run. At most `concurrency` calls run at once, each for at most `timeout`
    seconds. The clock of a call starts when it gets its slot: a queue is no error. It belongs to
    one event loop for its life. options: "tool.option=value"; cache: "memory" keeps the results of
    pure tools, "none" does not. describe_only: for schemas alone; then no tool can be called.
    Raises UserError on a tool that does not exist, cannot be described to a model, or be made.
    """

    def __init__(
        self,
        tools: Sequence[str | Callable | Tool],
        concurrency: int = 16,
        timeout: float = 10.0,
        options: Sequence[str] = (),
        cache: str = "memory",
        describe_only: bool = False,
    ):
        if concurrency < 1 or timeout <= 0:
            raise UserError(
                f"tool concurrency {concurrency}, timeout {timeout}: expected >= 1, and > 0 seconds"
            )
        if cache not in ("memory", "none"):
            why = "results are kept for the run, not in a file"
            raise UserError(f"tool_cache = {cache!r}: expected memory or none: {why}")
        loaded, self._shared = loading.load(
            tools,
            options,
            timeout=timeout,
            describe_only=describe_only,
            concurrency=concurrency,
            cached=cache != "none",
        )
        self.tools = {tool.name: tool for tool in loaded}
        self.schemas = [tool.schema for tool in loaded]
        self.errors = Counter()  # error kind -> how often
        self.concurrency = concurrency
        self.timeout = timeout  # seconds of a call
        self.cache = Cache()
        self.keeps_results = cache == "memory"
        self._abandoned = []  # threads and tasks that a deadline left behind
        self._making = defaultdict(asyncio.Lock)  # a shared tool's make -> held while it runs
        self._slots = asyncio.Semaphore(concurrency)
        self._slots_of_tool = {}  # of the tools with a limit of their own
        for tool in loaded:
            if tool.concurrency:
                self._slots_of_tool[tool.name] = asyncio.Semaphore(tool.concurrency)

    @property
    def leaked(self) -> int:
        """Threads, and tasks that swallow their cancellation, past a deadline and still alive."""
        return sum(is_alive(job) for job in self._abandoned)

    def open(self, example: dict | None = None) -> "Session":
        """The tools of one trajectory. example: its data row."""
        return Session(self, example or {})

    async def close(self) -> None:
        """Closes what all trajectories share, as Session.close does."""
        instances = list(self._shared.values())
        self._shared = {}
        await _close_all(self, instances)


class Session:
    """The tools of one trajectory. A stateful tool's instance is made at its first call, under that
    call's deadline, belongs to this session alone, and runs one call at a time, in order."""

    def __init__(self, box: Toolbox, example: dict):
        self.box = box
        self.example = example
        self._states = {}  # a tool's make -> what it made
        self._to_close = []  # all that was made, also what is used no more
        self._making = defaultdict(asyncio.Lock)  # a tool's make -> held while it runs
        self._turns = defaultdict(asyncio.Lock)  # a tool's make -> held during a call

    async def call(self, name: str, arguments: dict | None) -> tuple[str | list, str | None, float]:
        """-> content (text, or a list of texts and PIL images), error kind or None, seconds."""
        tool = self.box.tools.get(name) if isinstance(name, str) else None
        seconds = 0.0
        if tool is None:
            known = ", ".join(map(_signature, self.box.tools.values()))
            content = f"error: there is no tool {name!r}; the tools are: {known}"
            error = "unknown_tool"
        elif wrong := wrong_arguments(name, _parameters(tool), arguments):
            content = f"error: {wrong}; call it as {_signature(tool)}"
            error = "bad_arguments"
        else:
            content, error, seconds = await self._known_or_called(tool, arguments)

        if _is_too_long(content):
            content = _cut(content)
            error = error or "oversized"
        if error:
            self.box.errors[error] += 1
        return content, error, seconds

    async def _known_or_called(self, tool, arguments):
        """What this very call gave before, if that is kept, or what it gives now."""
        if not (tool.pure and self.box.keeps_results):
            return await self._call_in_turn(tool, arguments)
        state_key = ""  # what the result depends on beside the arguments
        if tool.make:  # made also if the result is known: it must cost little
            start = time.perf_counter()
            try:
                is_made, state = await self.make(tool)
            except Exception:  # the call itself will say what is wrong
                return await self._call_in_turn(tool, arguments)
            if not is_made:
                return self._too_late(tool), "timeout", time.perf_counter() - start
            state_key = str(getattr(state, "key", ""))
            if not state_key and not tool.shared:  # it does not say what its results depend on
                return await self._call_in_turn(tool, arguments)
        key = json.dumps([tool.name, state_key, arguments], sort_keys=True)
        return await self.box.cache.run(key, lambda: self._call_in_turn(tool, arguments))

    async def _call_in_turn(self, tool, arguments):
        """Waits for its turn and its slot, and calls the tool -> content, error kind, seconds."""
        async with AsyncExitStack() as waits:
            # its turn comes before its slot: who waits for a turn must not hold up the others
            if tool.make and tool.serial and not tool.shared:
                await waits.enter_async_context(self._turns[tool.make])
            if tool.name in self.box._slots_of_tool:
                await waits.enter_async_context(self.box._slots_of_tool[tool.name])
            await waits.enter_async_context(self.box._slots)
            start = time.perf_counter()
            content, error = await self._call_in_time(tool, arguments)
            return content, error, time.perf_counter() - start

    async def _call_in_time(self, tool, arguments):
        """-> content, error kind or None. Whatever is the model's or the tool's fault is both."""
        work = self._call_with_retries(tool, arguments)
        try:
            is_done, result = await in_time(work, self._limit(tool), self.box._abandoned)
            if is_done:
                return _content(result), None
        except ToolError as error:
            return error.text, error.kind
        except UserError:  # of the run's configuration or data, not of the model: it ends the run
            raise
        except Exited as exited:
            return f"error: {tool.name} raised {shown(exited.error)}", "exception"
        except Exception as error:
            return f"error: {tool.name} raised {shown(error)}", "exception"

        text = self._too_late(tool)
        if tool.make and not tool.shared and not tool.is_async:
            # its thread may still be changing the instance: the next call gets a new one
            self._states.pop(tool.make, None)
            text += "; its state is lost"
        return text, "timeout"

    async def _call_with_retries(self, tool, arguments):
        DEADLINE.set(self._limit(tool))  # here: in a task of its own, and so for this call alone
        pause = PAUSE
        for _ in range(tool.retries):
            try:
                return await self._call_once(tool, arguments)
            except NetworkError:
                # spread out, or all would come back at the same moment
                await asyncio.sleep(pause * (0.5 + random.random()))
                pause *= 2
        return await self._call_once(tool, arguments)

    async def _call_once(self, tool, arguments):
        function = partial(tool.function, **arguments)
        if tool.make:
            state = await self._state(tool)
            function = partial(tool.function, state, **arguments)
        if tool.is_async:
            return await function()
        return await in_thread(function, self.box._abandoned)

    async def make(self, tool: Tool) -> tuple[bool, object]:
        """(True, its instance), or (False, None) at the deadline. Raises what making it raises."""
        return await in_time(self._state(tool), self._limit(tool), self.box._abandoned)

    async def _state(self, tool):
        """What tool.make made for this trajectory, or for the run; made now if it is the first."""
        owner = self.box if tool.shared else self
        states = self.box._shared if tool.shared else self._states
        async with owner._making[tool.make]:
            if tool.make in states:
                return states[tool.make]
            if inspect.iscoroutinefunction(tool.make):
                state = await tool.make(self.example)
            else:
                make = partial(tool.make, self.example)
                state = await in_thread(make, self.box._abandoned, late=self._close_late)
            states[tool.make] = state
            if not tool.shared:
                self._to_close.append(state)
            return state

    def _close_late(self, state):
        """Closes what was made behind its deadline."""
        closing = asyncio.ensure_future(_close_all(self.box, [state]))
        self.box._abandoned.append(closing)

    def _limit(self, tool):
        """Seconds that a call of the tool has."""
        return tool.timeout or self.box.timeout

    def _too_late(self, tool):
        return f"error: {tool.name} took longer than {self._limit(tool):g} s and was stopped"

    async def close(self) -> None:
        """Closes every instance, under the deadline; a failure is counted, and the rest go on. Who
        is cancelled waits for the end of it too."""
        self._states.clear()
        await _close_all(self.box, self._to_close)


async def _close_all(box: Toolbox, instances: list) -> None:
    """Closes the instances, the last one first, and takes them out of the list."""
    closing = asyncio.ensure_future(_close_one_by_one(box, instances))
    try:
        await asyncio.shield(closing)
    except asyncio.CancelledError:  # a second Ctrl-C must not leave the rest behind
        await asyncio.wait({closing})
        raise


async def _close_one_by_one(box, instances):
    while instances:
        close = getattr(instances.pop(), "close", None)
        if close is None:
            continue
        try:
            is_async = inspect.iscoroutinefunction(close)
            work = close() if is_async else in_thread(close, box._abandoned)
            is_closed, _ = await in_time(work, max(box.timeout, CLOSING), box._abandoned)
        except Exception:
            is_closed = False
        if not is_closed:
            box.errors["close"] += 1


def _parameters(tool):
    return tool.schema["function"]["parameters"]


def _signature(tool):
    return signature(tool.name, _parameters(tool))


# -- what a tool gives, as content


def _content(result):
    """Text, or a list of texts and images."""
    if _is_image(result):
        return [result]
    if isinstance(result, list | tuple) and any(map(_is_image, result)):
        return [part if _is_image(part) else _text(part) for part in result]
    return _text(result)


def _is_image(value):
    # without PIL there can be no image, and importing it takes a moment
    return "PIL.Image" in sys.modules and isinstance(value, sys.modules["PIL.Image"].Image)


def _text(value):
    if value is None:
        return NO_OUTPUT
    text = None
    if isinstance(value, str):
        text = value
    elif isinstance(value, dict | list | tuple):
        try:
            text = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            pass  # not plain JSON
    if text is None:
        text = str(value)
    return text.encode("utf-8", "replace").decode()  # a lone surrogate would crash a tokenizer


def _is_too_long(content):
    parts = content if isinstance(content, list) else [content]
    return any(isinstance(part, str) and len(part) > MAX_RESULT_CHARS for part in parts)


def _cut(content):
    """The content with every text cut to MAX_RESULT_CHARS."""
    if isinstance(content, list):
        return [_cut(part) for part in content]
    if isinstance(content, str):
        return shorten(content, MAX_RESULT_CHARS)
    return content

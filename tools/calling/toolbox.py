"""Calls tools, each call under a deadline, and makes an observation of whatever comes."""

import asyncio
import inspect
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress

from run.config import UserError
from run.deadline import _alive, _no_exit, shown, start_thread
from tools.calling import loading
from tools.calling.base import DEADLINE, NetworkError, ToolError, shorten
from tools.calling.cache import Cache
from tools.calling.loading import Tool
from tools.calling.schema import signature, wrong_arguments

MAX_RESULT_CHARS = 1_000_000  # a longer text is cut here; the rollout cuts to tokens, much earlier


NO_OUTPUT = "(no output)"


CLOSING = 10.0  # seconds, at least, that close() has: a server ends in its own time


GRACE = 0.1  # seconds that a cancelled async tool has to clean up before it counts as leaked


PAUSE = 0.5  # seconds before the first retry of a network tool; doubled before each further one


class Toolbox:
    """The tools of a run. At most `concurrency` calls run at once, each for at most `timeout`
    seconds. The clock of a call starts when it gets its slot: a queue is no error. Several event
    loops may use it, one after the other. options: "tool.option=value"; cache: see cache.py.
    describe_only: for schemas alone; then no tool can be called.
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
        more = timeout, describe_only, concurrency, cache != "none"
        found, self._shared = loading.load(tools, options, *more)
        self.tools = {tool.name: tool for tool in found}
        self.schemas = [tool.schema for tool in found]
        self.cache = Cache("none" if describe_only else cache)
        self.errors = Counter()
        self.concurrency = concurrency
        self.timeout = timeout
        self._loop = None  # semaphores and locks belong to one event loop
        self._slots, self._locks = {}, {}
        self._abandoned = []  # threads and tasks that a deadline left behind

    @property
    def leaked(self) -> int:
        """Threads, and tasks that swallow their cancellation, past a deadline and still alive."""
        self._abandoned = [job for job in self._abandoned if _alive(job)]
        return len(self._abandoned)

    def open(self, example: dict | None = None) -> "Session":
        return Session(self, example or {})

    async def close(self) -> None:
        """Closes what all trajectories share, as Session.close does."""
        session = Session(self, {})
        session._to_close = list(self._shared.values())
        self._shared = {}
        await session.close()
        self.cache.close()

    def _on_this_loop(self) -> None:
        if self._loop is not asyncio.get_running_loop():
            self._loop = asyncio.get_running_loop()
            self._slots = {"": asyncio.Semaphore(self.concurrency)}
            own = {tool.name: tool.concurrency for tool in self.tools.values() if tool.concurrency}
            self._slots |= {name: asyncio.Semaphore(count) for name, count in own.items()}
            self._locks = {}


class Session:
    """The tools of one trajectory. A stateful tool's instance is made at its first call, under that
    call's deadline, belongs to this session alone, and runs one call at a time, in order."""

    def __init__(self, box: Toolbox, example: dict):
        self.box, self.example = box, example
        self._states = {}  # a tool's make -> what it made
        self._to_close = []
        self._locks = {}

    async def call(self, name: str, arguments: dict | None) -> tuple[str | list, str | None, float]:
        """-> content (text, or a list of texts and PIL images), error kind or None, seconds."""
        tool = self.box.tools.get(name) if isinstance(name, str) else None
        seconds = 0.0
        if tool is None:
            every = self.box.tools.values()
            known = ", ".join(signature(t.name, _parameters(t)) for t in every)
            content = f"error: there is no tool {name!r}; the tools are: {known}"
            error = "unknown_tool"
        elif wrong := wrong_arguments(name, _parameters(tool), arguments):
            content = f"error: {wrong}; call it as {signature(name, _parameters(tool))}"
            error = "bad_arguments"
        else:
            content, error, seconds = await self._cached(tool, arguments)
        if any(map(_is_too_long, content if isinstance(content, list) else [content])):
            content, error = _cut(content), error or "oversized"
        if error:
            self.box.errors[error] += 1
        return content, error, seconds

    async def _cached(self, tool, arguments):
        self.box._on_this_loop()
        if not (tool.pure and self.box.cache.on):
            return await self._timed(tool, arguments)
        depends = ""
        if tool.make:  # made also if the result is known: it must cost little
            start = time.perf_counter()
            try:
                done, state = await self.make(tool)
            except Exception:  # the call itself will say what is wrong
                return await self._timed(tool, arguments)
            if not done:
                return self._late(tool), "timeout", time.perf_counter() - start
            depends = str(getattr(state, "key", ""))
            if not depends and not tool.shared:  # it does not say what its results depend on
                return await self._timed(tool, arguments)
        key = json.dumps([tool.name, tool.key, depends, arguments], sort_keys=True)
        return await self.box.cache.run(key, lambda: self._timed(tool, arguments))

    async def _timed(self, tool, arguments):
        # its turn comes before its slot: who waits for a turn must not hold up the others
        async with AsyncExitStack() as waits:
            if tool.make and tool.serial and not tool.shared:
                await waits.enter_async_context(self._locks.setdefault(tool.make, asyncio.Lock()))
            for name in (tool.name, ""):
                if name in self.box._slots:
                    await waits.enter_async_context(self.box._slots[name])
            start = time.perf_counter()
            content, error = await self._run(tool, arguments)
            return content, error, time.perf_counter() - start

    async def _run(self, tool, arguments):
        try:
            done, result = await self._in_time(self._tried(tool, arguments), self._limit(tool))
            if done:
                return _content(result), None
            text = self._late(tool)
            if tool.make and not tool.shared and not tool.is_async:
                # its thread may still be changing the instance: the next call gets a new one
                self._states.pop(tool.make, None)
                text += "; its state is lost"
            return text, "timeout"
        except ToolError as error:
            return error.text, error.kind
        except UserError:  # of the run's configuration or data, not of the model: it ends the run
            raise
        except Exception as error:
            return f"error: {tool.name} raised {shown(error)}", "exception"

    async def _tried(self, tool, arguments):
        DEADLINE.set(self._limit(tool))  # here: in a task of its own, and so for this call alone
        for attempt in range(tool.retries + 1):
            if attempt:  # spread out, or all would come back at the same moment
                await asyncio.sleep(PAUSE * 2 ** (attempt - 1) * (0.5 + random.random()))
            try:
                return await self._work(tool, arguments)
            except NetworkError:
                if attempt == tool.retries:
                    raise

    async def _work(self, tool, arguments):
        first = [await self._state(tool)] if tool.make else []
        if tool.is_async:
            return await tool.function(*first, **arguments)
        return await self._in_thread(lambda: tool.function(*first, **arguments))

    async def make(self, tool: Tool) -> tuple[bool, object]:
        """(True, its instance), or (False, None) at the deadline. Raises what making it raises."""
        return await self._in_time(self._state(tool), self._limit(tool))

    async def _state(self, tool):
        """What tool.make made for this trajectory, or for the run; made now if it is the first."""
        states = self.box._shared if tool.shared else self._states
        locks = self.box._locks if tool.shared else self._locks
        async with locks.setdefault((tool.make, "make"), asyncio.Lock()):
            if tool.make not in states:
                if inspect.iscoroutinefunction(tool.make):
                    state = await tool.make(self.example)
                else:
                    state = await self._in_thread(lambda: tool.make(self.example), self._too_late)
                states[tool.make] = state
                if not tool.shared:
                    self._to_close.append(state)
            return states[tool.make]

    def _limit(self, tool):
        return tool.timeout or self.box.timeout

    def _late(self, tool):
        return f"error: {tool.name} took longer than {self._limit(tool):g} s and was stopped"

    async def _in_time(self, work, seconds):
        """(True, result), or (False, None) at the deadline. Not asyncio.timeout: it would wait for
        ever for a tool that swallows its cancellation."""
        task = asyncio.ensure_future(_no_exit(work))
        try:
            done, _ = await asyncio.wait({task}, timeout=seconds)
            if not done:
                task.cancel()
                await asyncio.wait({task}, timeout=GRACE)
                return False, None
        finally:
            if not task.done():
                task.cancel()
                self.box._abandoned.append(task)
        if task.cancelled():
            raise RuntimeError("the tool cancelled itself")
        return True, task.result()

    def _too_late(self, state):
        """What was made behind its deadline is closed."""
        session = Session(self.box, {})
        session._to_close = [state]
        self.box._abandoned.append(asyncio.ensure_future(session.close()))

    async def _in_thread(self, function, late=None):
        thread, future = start_thread(function, late)
        try:
            result, error = await future
        except asyncio.CancelledError:
            self.box._abandoned.append(thread)
            raise
        if isinstance(error, Exception):
            raise error
        if error is not None:
            raise RuntimeError(shown(error))
        return result

    async def close(self) -> None:
        """Closes every instance, under the deadline; a failure is counted, and the rest go on. Who
        is cancelled waits for the end of it too."""
        closing = asyncio.ensure_future(self._close())
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            await asyncio.wait({closing})
            raise

    async def _close(self):
        self._states.clear()
        while self._to_close:
            instance = self._to_close.pop()
            close = getattr(instance, "close", None)
            if close is None:
                continue
            try:
                is_async = inspect.iscoroutinefunction(close)
                work = close() if is_async else self._in_thread(close)
                closed, _ = await self._in_time(work, max(self.box.timeout, CLOSING))
            except Exception:
                closed = False
            if not closed:
                self.box.errors["close"] += 1


def _is_too_long(part):
    return isinstance(part, str) and len(part) > MAX_RESULT_CHARS


def _cut(content):
    if isinstance(content, list):
        return [_cut(part) for part in content]
    return shorten(content, MAX_RESULT_CHARS) if isinstance(content, str) else content


def _parameters(tool):
    return tool.schema["function"]["parameters"]


def _content(result):
    image = sys.modules["PIL.Image"].Image if "PIL.Image" in sys.modules else ()
    if isinstance(result, image):
        return [result]
    if isinstance(result, list | tuple) and any(isinstance(part, image) for part in result):
        return [part if isinstance(part, image) else _text(part) for part in result]
    return _text(result)


def _text(value):
    if value is None:
        return NO_OUTPUT
    text = value if isinstance(value, str) else None
    if isinstance(value, dict | list | tuple):
        with suppress(TypeError, ValueError, RecursionError):  # not plain JSON: str() below
            text = json.dumps(value, ensure_ascii=False)
    text = str(value) if text is None else text
    return text.encode("utf-8", "replace").decode()  # a lone surrogate would crash a tokenizer

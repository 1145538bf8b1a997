"""Calls tools, each call under a deadline, and makes an observation of whatever comes."""

import asyncio
import inspect
import json
import random
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

from formats.base import tools_of_row
from run.config import UserError, tell
from run.deadline import Exited, in_thread, in_time, is_alive, shown
from tools.calling import functions, loading
from tools.calling.base import (
    DEADLINE,
    Environment,
    NetworkError,
    Result,
    Tool,
    ToolError,
    number,
    numbers,
    shorten,
)
from tools.calling.cache import Cache
from tools.calling.schema import signature, wrong_arguments

MAX_RESULT_CHARS = 1_000_000  # a longer text is cut here; the rollout cuts to tokens, much earlier
NO_OUTPUT = "(no output)"
CLOSING = 10.0  # seconds, at least, that close() has: a server ends in its own time
PAUSE = 0.5  # seconds before the first retry of a network tool; doubled before each further one
LONGEST_PAUSE = 8.0  # seconds: who waits for a server that starts again is soon back
LOOK = 0.02  # seconds between two looks whether a call that was left behind has ended


@dataclass
class Outcome:
    """What came of a call."""

    content: str | list  # text, or a list of texts and PIL images
    error: str | None  # its kind
    seconds: float
    result: Result  # what of it is not for the model: reward, metrics, ends


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
            why = "kept for the run, not in a file; <tool>.cache=false keeps none of a tool"
            raise UserError(f"tool_cache = {cache!r}: expected memory or none: {why}")
        loaded, self._shared, self.environments = loading.load(
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
            tool.timeout = tool.timeout or timeout
            if tool.concurrency:
                self._slots_of_tool[tool.name] = asyncio.Semaphore(tool.concurrency)
        for environment in self.environments:
            environment.timeout = environment.timeout or timeout
        self.told = set()  # which hooks of environments were said to fail

    @property
    def has_user(self) -> bool:
        """Whether somebody may speak behind an answer."""
        return any("user" in environment.hooks for environment in self.environments)

    @property
    def leaked(self) -> int:
        """Threads, and tasks that swallow their cancellation, past a deadline and still alive."""
        return sum(is_alive(job) for job in self._abandoned)

    def open(self, example: dict | None = None, images: list | None = None) -> "Session":
        """Opens the tools of one trajectory. example: its data row. images: the trajectory's
        Pictures, a list that grows: what a tool that sees finds in its example's "images"."""
        return Session(self, example or {}, images)

    async def close(self) -> None:
        """Closes what all trajectories share, as Session.close does."""
        instances = list(self._shared.values())
        self._shared = {}
        await _close_all(self, instances)


class Session:
    """The tools of one trajectory. A stateful tool's instance is made at its first call, under that
    call's deadline, belongs to this session alone, and runs one call at a time, in order. Those of
    environments are made by `begin`."""

    def __init__(self, box: Toolbox, example: dict, images: list | None = None):
        self.box = box
        self.example = example if images is None else {**example, "images": images}
        self.tools = box.tools  # name -> Tool: those of the row, if it says which
        if example.get("tools") is not None:
            schemas = tools_of_row(example["tools"], box.schemas)
            self.tools = functions.with_own(box.tools, schemas, box.timeout)
        self._states = {}  # a tool's make -> what it made
        self._to_close = []  # all that was made, also what is used no more
        self._making = defaultdict(asyncio.Lock)  # a tool's make -> held while it runs
        self._turns = defaultdict(asyncio.Lock)  # a tool's make -> held during a call
        self._busy = defaultdict(threading.Lock)  # its make -> held by the thread of a call
        self.failure = ""  # how an environment failed: then the trajectory is over

    async def call(self, name: str, arguments: dict | None) -> tuple[str | list, str | None, float]:
        """Calls a tool; gives content (text, or a list of texts and PIL images), error, seconds."""
        outcome = await self.run(name, arguments)
        return outcome.content, outcome.error, outcome.seconds

    async def run(self, name: str, arguments: dict | None) -> Outcome:
        """Calls a tool."""
        # 1. what calls no tool, or does not fit it, is told how to call it
        tool = self.tools.get(name) if isinstance(name, str) else None
        seconds = 0.0
        if tool is None:
            known = ", ".join(map(_signature, self.tools.values())) or "none"
            content = f"error: there is no tool {name!r}; the tools are: {known}"
            error = "unknown_tool"
        elif wrong := wrong_arguments(name, tool.schema["function"]["parameters"], arguments):
            content = f"error: {wrong}; call it as {_signature(tool)}"
            error = "bad_arguments"
        else:
            content, error, seconds = await self._known_or_called(tool, arguments)
        result = Result()
        if isinstance(content, Result):
            result = content
            content = _content_of(result)

        # 2. cut it, if one of its texts is too long; count what went wrong
        parts = content if isinstance(content, list) else [content]
        if any(isinstance(part, str) and len(part) > MAX_RESULT_CHARS for part in parts):
            content = _cut(content)
            error = error or "oversized"
        if error:
            self.box.errors[error] += 1
        return Outcome(content, error, seconds, result)

    async def _known_or_called(self, tool, arguments):
        """Returns what this very call gave before, if that is kept, or what it gives now."""
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
                return _too_late(tool), "timeout", time.perf_counter() - start
            state_key = str(getattr(state, "key", ""))
            if not state_key and not tool.shared:  # it does not say what its results depend on
                return await self._call_in_turn(tool, arguments)
        shown = []  # the images that a number in its arguments stands for
        if tool.takes_images:
            shown = [picture.key for picture in self.example.get("images") or []]
            if not all(shown):  # a model elsewhere was shown them: nobody here has looked at them
                return await self._call_in_turn(tool, arguments)
        key = json.dumps([tool.name, state_key, arguments, shown], sort_keys=True)
        return await self.box.cache.run(key, lambda: self._call_in_turn(tool, arguments))

    async def _call_in_turn(self, tool, arguments):
        """Waits for its turn and its slot, and calls the tool -> content, error kind or None,
        seconds. Whatever is the model's or the tool's fault is content and error kind."""
        async with AsyncExitStack() as waits:
            # 1. its turn comes before its slot: who waits for a turn must not hold up the others
            if tool.make and tool.serial and not tool.shared:
                await waits.enter_async_context(self._turns[tool.make])
            if tool.name in self.box._slots_of_tool:
                await waits.enter_async_context(self.box._slots_of_tool[tool.name])
            await waits.enter_async_context(self.box._slots)

            # 2. call it, in the time that it has
            start = time.perf_counter()
            is_done = True
            error = None
            try:
                work = self._call_with_retries(tool, arguments)
                is_done, result = await in_time(work, tool.timeout, self.box._abandoned)
                content = result if isinstance(result, Result) else _content(result)
            except ToolError as raised:
                content = raised.text
                error = raised.kind
            except UserError:  # of the run's configuration or data, not of the model: ends the run
                raise
            except Exited as exited:
                content = f"error: {tool.name} raised {shown(exited.error)}"
                error = "exception"
            except Exception as raised:
                content = f"error: {tool.name} raised {shown(raised)}"
                error = "exception"

            # 3. it was stopped at the deadline
            if not is_done:
                content = _too_late(tool)
                error = "timeout"
                if tool.environment and not tool.is_async:
                    why = f"took longer than {tool.timeout:g} s, and may still change the state"
                    self._fail(f"{tool.environment.name}.{tool.name}", why)
                elif tool.make and not tool.shared and not tool.is_async:
                    # its thread may still be changing the instance: the next call gets a new one
                    self._states.pop(tool.make, None)
                    content += "; its state is lost"
            return content, error, time.perf_counter() - start

    async def _call_with_retries(self, tool, arguments):
        """Calls the tool; after a NetworkError again, tool.retries times."""
        DEADLINE.set(tool.timeout)  # here: in a task of its own, and so for this call alone
        retries = tool.retries
        pause = PAUSE
        while True:
            try:
                function = partial(tool.function, **arguments)
                if tool.make:
                    state = await self._state(tool)
                    function = partial(tool.function, state, **arguments)
                if tool.takes_images:
                    images = self.example.get("images") or []
                    function = partial(tool.function, state, images, **arguments)
                if tool.environment and not tool.is_async:
                    function = _holding(self._busy[tool.make], function, tool.name)
                if tool.is_async:
                    return await function()
                return await in_thread(function, self.box._abandoned)
            except NetworkError:
                if retries == 0:
                    raise
            # spread out, or all would come back at the same moment
            await asyncio.sleep(min(LONGEST_PAUSE, pause * (0.5 + random.random())))
            pause = min(LONGEST_PAUSE, 2 * pause)
            retries -= 1

    # -- environments

    async def begin(self) -> list:
        """Makes the trajectory's environments; returns the texts and PIL images with which they
        open it. Sets `failure` if one cannot be made, or cannot say them."""
        parts = []
        for environment in self.box.environments:
            await self._ask(environment, "__init__")
            if "opening" in environment.hooks and not self.failure:
                said = await self._ask(environment, "opening")
                parts += _parts(said) if said is not None else []
        return parts

    async def reply(self, trajectory) -> list | None:
        """Asks what the user of an environment says behind an answer, as texts and PIL images; None
        if there is none, or no more to say. Sets `failure` if it cannot say it."""
        for environment in self.box.environments:
            if "user" in environment.hooks:
                said = await self._ask(environment, "user", trajectory)
                return None if said is None else _parts(said)
        return None

    async def settle(self, trajectory) -> tuple[float | None, dict[str, float]]:
        """Asks for (the rewards that environments give their final states, added up; what they
        measure of them). None if one gives none, or fails, which sets `failure`."""
        rewards = []
        metrics = {}
        for environment in self.box.environments:
            if "reward" in environment.hooks:
                value = await self._ask(environment, "reward", trajectory)
                if value is not None:
                    value = number(value, f"{environment.name}.reward")
                rewards.append(value)
            if "metrics" in environment.hooks:
                values = await self._ask(environment, "metrics")
                if not self.failure:
                    add_up(metrics, numbers(values, f"{environment.name}.metrics"))
        if self.failure or not rewards or None in rewards:
            return None, metrics
        return sum(rewards), metrics

    async def _ask(self, environment: Environment, hook: str, *given):
        """Asks a hook, in its time; None if it fails, or if anything failed before, which is
        what `failure` says."""
        if self.failure:
            return None
        name = f"{environment.name}.{hook}"
        is_done = True
        answer = None
        async with self.box._slots:
            try:
                work = self._call_hook(environment, hook, given)
                is_done, answer = await in_time(work, environment.timeout, self.box._abandoned)
            except UserError:  # of the run's configuration or data: ends the run
                raise
            except Exited as exited:
                self._fail(name, f"raised {shown(exited.error)}")
            except Exception as error:
                frames = traceback.extract_tb(error.__traceback__)
                at = f" ({frames[-1].filename}, line {frames[-1].lineno})"
                self._fail(name, f"raised {shown(error)}{at}")
        if not is_done:
            self._fail(name, f"took longer than {environment.timeout:g} s")
        return answer

    async def _call_hook(self, environment, hook, given):
        DEADLINE.set(environment.timeout)
        # a call that the end of the trajectory left behind may still change the state
        while self._busy[environment.make].locked():
            await asyncio.sleep(LOOK)
        state = await self._state(environment)
        if hook == "__init__":
            return None
        function = partial(environment.hooks[hook], state, *given)
        if inspect.iscoroutinefunction(environment.hooks[hook]):
            return await function()
        function = _holding(self._busy[environment.make], function, hook)
        return await in_thread(function, self.box._abandoned)

    def _fail(self, name, why):
        """Ends the trajectory: it costs no more than that. The first time, the user is told."""
        self.failure = f"{name} {why}"
        self.box.errors["environment"] += 1
        if name not in self.box.told:
            self.box.told.add(name)
            tell(f"{self.failure}: nothing is learnt from that trajectory (told once)")

    # -- states

    async def make(self, tool: Tool) -> tuple[bool, object]:
        """Makes a tool's instance: (True, it), or (False, None) at the deadline. Raises what making
        it raises."""
        return await in_time(self._state(tool), tool.timeout, self.box._abandoned)

    async def _state(self, tool: Tool | Environment):
        """Gives what tool.make made for this trajectory, or for the run; makes it at first."""
        is_shared = isinstance(tool, Tool) and tool.shared
        owner = self.box if is_shared else self
        states = self.box._shared if is_shared else self._states
        async with owner._making[tool.make]:
            if tool.make in states:
                return states[tool.make]
            if inspect.iscoroutinefunction(tool.make):
                state = await tool.make(self.example)
            else:
                make = partial(tool.make, self.example)
                state = await in_thread(make, self.box._abandoned, late=self._close_late)
            states[tool.make] = state
            if not is_shared:
                self._to_close.append(state)
            return state

    def _close_late(self, state):
        """Closes what was made behind its deadline."""
        closing = asyncio.ensure_future(_close_all(self.box, [state]))
        self.box._abandoned.append(closing)

    async def close(self) -> None:
        """Closes every instance, under the deadline; a failure is counted, and the rest go on. Who
        is cancelled waits for the end of it too."""
        self._states.clear()
        if self._to_close:
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


def _holding(lock, function, name):
    """Makes the function hold the lock while it runs, under the name of its tool."""

    def work():
        with lock:
            return function()

    work.__name__ = name
    return work


def add_up(metrics: dict[str, float], more: dict[str, float]) -> None:
    """Adds numbers to those of the same name."""
    for name, value in more.items():
        metrics[name] = metrics.get(name, 0.0) + value


def _signature(tool):
    return signature(tool.name, tool.schema["function"]["parameters"])


def _too_late(tool):
    return f"error: {tool.name} took longer than {tool.timeout:g} s and was stopped"


# -- what a tool gives, as content


def _content_of(result: Result):
    """Gives the text and the images of a Result."""
    if not result.images:
        return _content(result.text)
    parts = [result.text, *result.images]
    return [part for part in _parts(parts) if part != ""]


def _parts(said) -> list:
    """Lists what was said, as texts and images."""
    content = _content(said)
    return content if isinstance(content, list) else [content]


def _content(result):
    """Makes a result text, or a list of texts and images."""
    pil = sys.modules.get("PIL.Image")
    if pil is None:  # then there can be no image, and importing it takes a moment
        return _text(result)
    if isinstance(result, pil.Image):
        return [result]
    if isinstance(result, list | tuple) and any(isinstance(part, pil.Image) for part in result):
        return [part if isinstance(part, pil.Image) else _text(part) for part in result]
    return _text(result)


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


def _cut(content):
    """Cuts every text of a content to MAX_RESULT_CHARS."""
    if isinstance(content, list):
        return [_cut(part) for part in content]
    if isinstance(content, str):
        return shorten(content, MAX_RESULT_CHARS)
    return content

"""Loads tools, describes them to the model, and calls them, each call under a deadline.

    box = Toolbox(["python", "my_tools.py:weather"], concurrency=16, timeout=10.0)
    session = box.open()  # the state of one trajectory
    content, error, seconds = await session.call("python", {"code": "print(6 * 7)"})
    await session.close()

A tool is a typed function with a Google-style docstring in tools/<name>.py, of that very name; or
a class of that name, whose instances hold the state of one trajectory: its typed, documented
`__call__` is the tool, `close()` is optional. `async def` tools are awaited, sync ones run in a
thread of their own. A tool returns text, a PIL image, or a list of both; all else becomes text.

Whatever the model or the tool does wrong becomes a short observation that says what would be
right, is counted in `Toolbox.errors` under its own name, and never raises:

    unknown_tool   no tool of that name           bad_arguments  do not fit the tool's schema
    exception      the tool raised                timeout        the tool did not end in time
    oversized      above MAX_RESULT_CHARS         close          a stateful tool's close() failed
    bad_json       the call could not be read: found by chat.py, counted here by the rollout

A tool that wants another kind, or its own words for the model, raises `ToolError(kind, text)`.
"""

import asyncio
import importlib
import importlib.util
import inspect
import json
import re
import sys
import threading
import time
import typing
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from config import UserError, near

MAX_RESULT_CHARS = 1_000_000  # a longer text is cut here; the rollout cuts to tokens, much earlier
NO_OUTPUT = "(no output)"
GRACE = 0.1  # seconds that a cancelled async tool has to clean up before it counts as leaked
JSON_TYPES = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


@dataclass
class ToolCall:
    turn: int  # which turn of the trajectory, from 0
    name: str
    arguments: dict | None  # None if the call could not be read
    result: str  # what the model was told
    error: str | None  # one of the kinds above
    seconds: float  # from the start of the tool to its end, without the wait for a free slot


class ToolError(Exception):
    """Raised by a tool: the `kind` of error to count, and the `text` that the model reads."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind
        self.text = text


@dataclass
class Tool:
    name: str
    target: Callable  # the function, or the class of a stateful tool
    stateful: bool
    is_async: bool
    schema: dict  # as transformers.utils.get_json_schema gives it


class Toolbox:
    """The tools of a run. At most `concurrency` calls run at once, each for at most `timeout`
    seconds. The clock of a call starts when it gets its slot: a queue is no error. Several event
    loops may use it, one after the other.
    Raises UserError on a tool that does not exist or cannot be described to a model.
    """

    def __init__(
        self,
        names_or_functions: Sequence[str | Callable],
        concurrency: int = 16,
        timeout: float = 10.0,
    ):
        if concurrency < 1 or timeout <= 0:
            raise UserError(
                f"tool concurrency {concurrency}, timeout {timeout}: expected >= 1, and > 0 seconds"
            )
        # names first: a typo must not wait for the seconds that importing transformers takes
        places = [_find(item) if isinstance(item, str) else item for item in names_or_functions]
        targets = [_load(*place) if isinstance(place, tuple) else place for place in places]
        tools = [_describe(target) for target in targets]
        self.tools = {tool.name: tool for tool in tools}
        if len(self.tools) < len(tools):
            twice = Counter(tool.name for tool in tools).most_common(1)[0][0]
            raise UserError(f"two tools are named {twice!r}: rename one of the functions")
        self.schemas = [tool.schema for tool in tools]
        self.errors = Counter()
        self.concurrency = concurrency
        self.timeout = timeout
        self._loop = self._slots = None  # a semaphore belongs to one event loop
        self._abandoned = []  # threads and tasks that a deadline left behind

    @property
    def leaked(self) -> int:
        """Threads, and tasks that swallow their cancellation, past a deadline and still alive."""
        self._abandoned = [job for job in self._abandoned if _alive(job)]
        return len(self._abandoned)

    def open(self) -> "Session":
        return Session(self)

    def _slot(self):
        if self._loop is not asyncio.get_running_loop():
            self._loop = asyncio.get_running_loop()
            self._slots = asyncio.Semaphore(self.concurrency)
        return self._slots


class Session:
    """The tools of one trajectory. A stateful tool's instance is made at its first call, under that
    call's deadline, belongs to this session alone, and runs one call at a time, in order."""

    def __init__(self, box: Toolbox):
        self.box = box
        self._instances = {}  # tool name -> instance
        self._to_close = []
        self._turns = {name: asyncio.Lock() for name, tool in box.tools.items() if tool.stateful}

    async def call(self, name: str, arguments: dict | None) -> tuple[str | list, str | None, float]:
        """-> content (text, or a list of texts and PIL images), error kind or None, seconds."""
        tool = self.box.tools.get(name) if isinstance(name, str) else None
        seconds = 0.0
        if tool is None:
            known = ", ".join(_signature(tool) for tool in self.box.tools.values())
            content = f"error: there is no tool {name!r}; the tools are: {known}"
            error = "unknown_tool"
        elif wrong := _wrong_arguments(tool, arguments):
            content = f"error: {wrong}; call it as {_signature(tool)}"
            error = "bad_arguments"
        else:
            # its turn comes before its slot: who waits for a turn must not hold up the others
            async with self._turns.get(name, nullcontext()), self.box._slot():
                start = time.perf_counter()
                content, error = await self._run(tool, arguments)
                seconds = time.perf_counter() - start
        if isinstance(content, str) and len(content) > MAX_RESULT_CHARS:
            dropped, half = len(content) - MAX_RESULT_CHARS, MAX_RESULT_CHARS // 2
            content = f"{content[:half]}\n[... {dropped} characters cut ...]\n{content[-half:]}"
            error = error or "oversized"
        if error:
            self.box.errors[error] += 1
        return content, error, seconds

    async def _run(self, tool, arguments):
        try:
            done, result = await self._in_time(self._work(tool, arguments))
            if done:
                return _content(result), None
            text = f"error: {tool.name} took longer than {self.box.timeout:g} s and was stopped"
            if tool.stateful and not tool.is_async:
                # its thread may still be changing the instance: the next call gets a new one
                self._instances.pop(tool.name, None)
                text += "; its state is lost"
            return text, "timeout"
        except ToolError as error:
            return error.text, error.kind
        except Exception as error:
            return f"error: {tool.name} raised {_shown(error)}", "exception"

    async def _work(self, tool, arguments):
        function = tool.target
        if tool.stateful:
            if tool.name not in self._instances:
                instance = await self._in_thread(tool.target, {})
                self._instances[tool.name] = instance
                self._to_close.append(instance)
            function = self._instances[tool.name]
        if tool.is_async:
            return await function(**arguments)
        return await self._in_thread(function, arguments)

    async def _in_time(self, work):
        """(True, result), or (False, None) at the deadline. Not asyncio.timeout: it would wait for
        ever for a tool that swallows its cancellation."""
        task = asyncio.ensure_future(_no_exit(work))
        try:
            done, _ = await asyncio.wait({task}, timeout=self.box.timeout)
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

    async def _in_thread(self, function, arguments):
        """A daemon thread per call, no pool: a hung one costs no worker and does not block exit."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def deliver(result, error):
            if not future.done():
                future.set_result((result, error))

        def work():
            try:
                outcome = function(**arguments), None
            except BaseException as error:  # SystemExit too: in a thread it would vanish unseen
                outcome = None, error
            with suppress(RuntimeError):  # the loop was closed while an abandoned thread went on
                loop.call_soon_threadsafe(deliver, *outcome)

        thread = threading.Thread(target=work, daemon=True, name="tool")
        thread.start()
        try:
            result, error = await future
        except asyncio.CancelledError:
            self.box._abandoned.append(thread)
            raise
        if isinstance(error, Exception):
            raise error
        if error is not None:
            raise RuntimeError(_shown(error))
        return result

    async def close(self) -> None:
        """Closes every instance, under the deadline; a failure is counted, and the rest go on."""
        self._instances.clear()
        while self._to_close:
            instance = self._to_close.pop()
            close = getattr(instance, "close", None)
            if close is None:
                continue
            try:
                is_async = inspect.iscoroutinefunction(close)
                closed, _ = await self._in_time(close() if is_async else self._in_thread(close, {}))
            except Exception:
                closed = False
            if not closed:
                self.box.errors["close"] += 1


async def _no_exit(work):
    try:
        return await work
    except (Exception, asyncio.CancelledError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # SystemExit: asyncio would hand it to the loop, ending the run
        raise RuntimeError(_shown(error)) from error


def _alive(job):
    return job.is_alive() if isinstance(job, threading.Thread) else not job.done()


def _shown(error):
    return f"{type(error).__name__}: {str(error)[:2000]}".removesuffix(": ")


# -- what a tool returned, as the model will see it


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


# -- arguments against the schema: get_json_schema writes few kinds, so a small checker of our own


def _wrong_arguments(tool, arguments):
    """What is wrong, as half a sentence, or None. Nothing is converted: '3' is not an integer."""
    if not isinstance(arguments, dict):
        return f"the arguments of {tool.name} must be a JSON object"
    parameters = tool.schema["function"]["parameters"]
    for name in arguments:
        if name not in parameters["properties"]:
            return f"{tool.name} has no argument {name!r}"
    for name in parameters.get("required", []):
        if name not in arguments:
            kind = _kind(parameters["properties"][name])
            return f"{tool.name} got no argument {name!r} ({kind})"
    for name, value in arguments.items():
        if wrong := _mismatch(value, parameters["properties"][name], name):
            return wrong
    return None


def _mismatch(value, schema, where):
    if value is None and schema.get("nullable"):
        return None
    if "anyOf" in schema:
        fits = any(_mismatch(value, option, where) is None for option in schema["anyOf"])
    else:
        kinds = schema.get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        fits = not kinds or any(
            # bool is an int to Python, not to JSON
            isinstance(value, JSON_TYPES[kind])
            and (kind == "boolean" or not isinstance(value, bool))
            for kind in kinds
        )
        fits = fits and ("enum" not in schema or value in schema["enum"])
    if not fits:
        return f"{where} must be {_kind(schema)}, not {json.dumps(value, ensure_ascii=False)[:80]}"
    if isinstance(value, list) and "prefixItems" in schema:
        if len(value) != len(schema["prefixItems"]):
            return f"{where} must have {len(schema['prefixItems'])} items, not {len(value)}"
        parts = zip(value, schema["prefixItems"], strict=True)
        inner = [(f"{where}[{i}]", item, part) for i, (item, part) in enumerate(parts)]
    elif isinstance(value, list) and "items" in schema:
        inner = [(f"{where}[{i}]", item, schema["items"]) for i, item in enumerate(value)]
    elif isinstance(value, dict) and "additionalProperties" in schema:
        inner = [(f"{where}[{k!r}]", v, schema["additionalProperties"]) for k, v in value.items()]
    else:
        return None
    return next((w for name, item, part in inner if (w := _mismatch(item, part, name))), None)


def _kind(schema):
    if "enum" in schema:
        kind = "one of " + ", ".join(
            json.dumps(value, ensure_ascii=False) for value in schema["enum"]
        )
    elif "anyOf" in schema:
        kind = " or ".join(_kind(option) for option in schema["anyOf"])
    elif "items" in schema:
        kind = f"array of {_kind(schema['items'])}"
    else:
        kind = schema.get("type", "any value")
        kind = kind if isinstance(kind, str) else " or ".join(kind)
    return f"{kind} or null" if schema.get("nullable") else kind


def _signature(tool):
    parameters = tool.schema["function"]["parameters"]
    required = parameters.get("required", [])
    shown = (
        f"{name}{'' if name in required else '?'}: {_kind(schema)}"
        for name, schema in parameters["properties"].items()
    )
    return f"{tool.name}({', '.join(shown)})"


# -- finding, loading and describing


def _find(name):
    """'python' or 'path.py:function' -> (file or None, function name), without running any code."""
    path, colon, function = name.rpartition(":")
    if not colon:
        files = sorted(Path(__file__).parent.glob("*.py"))
        known = [path.stem for path in files if path.stem in _defined(path)]
        if name not in known:
            raise UserError(
                f"unknown tool {name!r}{near(name, known)} "
                f"(tools: {', '.join(known)}; or give file.py:function)"
            )
        return None, name
    path = Path(path).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"no file {path} for the tool {name!r}: give an existing file.py:function")
    known = _defined(path)
    if function not in known:
        raise UserError(
            f"no function {function!r} in {path}{near(function, known)} (has: {', '.join(known)})"
        )
    return path, function


def _defined(path):
    text = path.read_text(encoding="utf-8")
    return re.findall(r"^(?:async def|def|class) +([A-Za-z]\w*)", text, re.MULTILINE)


def _load(path, name):
    if path is None:
        return getattr(importlib.import_module(f"tools.{name}"), name)
    module = sys.modules.get(str(path))  # two tools of one file share the module
    if module is None:
        spec = importlib.util.spec_from_file_location(str(path), path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[str(path)] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[str(path)]
            raise UserError(
                f"importing {path} for the tool {name!r} failed: {_shown(error)}"
            ) from error
    return getattr(module, name)


def _describe(target):
    stateful = inspect.isclass(target)
    function = target.__call__ if stateful else target
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        what = f"class {target.__name__} without __call__" if stateful else repr(target)
        raise UserError(f"{what} is no tool: give a function, or a class with a __call__ method")
    name = target.__name__
    remedy = (
        "give each argument a plain type (str, int, float, bool, list, dict, Literal, X | None) "
        "and, in a docstring that begins with what the tool does, a line `name: what` under `Args:`"
    )
    from transformers.utils import get_json_schema  # here: with torch it costs two seconds

    # get_json_schema lets other types pass, and the model could never call such a tool
    plain = {str, int, float, bool, list, tuple, dict, type(None), typing.Any}
    try:
        hints = typing.get_type_hints(function)
        for argument, kind in inspect.signature(function).parameters.items():
            hint = hints.get(argument)
            if kind.kind not in (kind.POSITIONAL_OR_KEYWORD, kind.KEYWORD_ONLY):
                raise ValueError(f"argument {kind} cannot be given by name")
            if isinstance(hint, type) and typing.get_origin(hint) is None and hint not in plain:
                raise ValueError(f"argument {argument} has the type {hint.__name__}")
        schema = get_json_schema(function)
        schema["function"]["name"] = name
        if not schema["function"]["description"]:
            raise ValueError("its docstring does not say what it does")
    except (
        Exception
    ) as error:  # its two own classes, NameError in a hint, bad JSON in (choices: ...)
        why = str(error.args[0] if error.args else error).rstrip(".!")
        raise UserError(f"tool {name!r} cannot be described to a model, {why}: {remedy}") from error
    return Tool(name, target, stateful, inspect.iscoroutinefunction(function), schema)

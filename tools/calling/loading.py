"""Names of tools -> Tool objects: finds the file, loads it, describes the tool to the model.

`load(names, options)` takes "python" (tools/python.py), "my_tools.py:weather", "mcp:servers.json"
(tools/mcp.py), python functions and classes, and Tool objects. Names are looked at first: a typo
must not wait for the seconds that importing transformers takes.
"""

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import typing
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from run import config
from run.config import UserError, near

OPTIONS = "tool_options"  # the config key, for messages


@dataclass
class Tool:
    name: str
    schema: dict  # as transformers.utils.get_json_schema gives it
    function: Callable  # function(**arguments); where there is `make`: function(state, **arguments)
    is_async: bool
    make: Callable | None = None  # make(example) -> the state; tools with the same one share it
    shared: bool = False  # one state for the run, else one for each trajectory
    serial: bool = True  # calls on the state of one trajectory wait for each other
    pure: bool = False  # the same arguments give the same result: it is kept
    network: bool = False  # its NetworkError is worth trying again
    ends: bool = False  # a call without an error ends the episode; its result is the answer
    timeout: float | None = None  # seconds; None: the Toolbox's
    concurrency: int | None = None  # calls at once; None: as many as the Toolbox lets
    retries: int | None = None  # after a NetworkError; None: 2
    key: str = ""  # what a result depends on beside the arguments: for the cache


def common(
    timeout: float | None = None,
    concurrency: int | None = None,
    cache: bool | None = None,
    retries: int | None = None,
) -> dict:
    """The options that every tool has."""
    return {"timeout": timeout, "concurrency": concurrency, "cache": cache, "retries": retries}


COMMON = inspect.signature(common).parameters


def load(
    items: Sequence[str | Callable | Tool],
    options: Sequence[str] = (),
    timeout: float = 10.0,
    describe_only: bool = False,
    concurrency: int = 16,
    cached: bool = True,
) -> tuple[list[Tool], dict]:
    """The tools, and {make: state} of those that have one state for the run, made here.

    timeout: seconds that an MCP server has to say what it offers. describe_only: nothing is made,
    and a required option may be missing: for SFT, which shows tools and calls none. concurrency:
    calls at once, of all tools together. cached: the run keeps results.
    Raises UserError on a tool that does not exist, cannot be described or made, or lacks an option.
    """
    given = config.options(options, OPTIONS)
    places = [_find(item) if isinstance(item, str) else item for item in items]
    tools, described, states, modules = [], [], {}, {}
    for place in places:
        if isinstance(place, Tool):
            tools.append(_without_options(replace(place), given))
        elif isinstance(place, tuple) and place[0] == "mcp":
            from tools.calling import mcp

            tools += [_without_options(tool, given) for tool in mcp.load(*place[1:], timeout)]
        else:
            target = _load(*place, modules) if isinstance(place, tuple) else place
            described.append(_describe(target, given, describe_only))
            tools.append(described[-1])
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UserError(f"two tools are named {twice!r}: rename one, or leave it out")
    for name in given:
        if name not in names:
            there = f" (tools: {', '.join(names) or 'none'})"
            raise UserError(f"{OPTIONS}: {name} is none of the tools{near(name, names) or there}")
    now = [tool for tool in described if tool.shared and tool.make]
    for tool in tools:
        if tool not in now:
            _set_common(tool, given.get(tool.name, {}), concurrency, cached)
    for tool in now:  # last: a mistake elsewhere must not leave one behind that nobody closes
        try:
            states[tool.make] = tool.make({})
        except UserError:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise UserError(f"tool {tool.name!r} cannot be made: {why}") from error
        tool.network = getattr(states[tool.make], "network", tool.network)  # its options decide
        _set_common(tool, given.get(tool.name, {}), concurrency, cached)
    return tools, states


def _without_options(tool: Tool, given: dict) -> Tool:
    """A tool that has no options but those of every tool: others are refused."""
    own = {key: text for key, text in given.get(tool.name, {}).items() if key not in COMMON}
    config.arguments(_no_options, own, f"{OPTIONS}: {tool.name}")
    return tool


def _set_common(tool: Tool, given: dict, most: int, cached: bool) -> None:
    where = f"{OPTIONS}: {tool.name}"
    own = {name: text for name, text in given.items() if name in COMMON}
    values = common(**config.arguments(common, own, where))
    for name in ("timeout", "concurrency"):
        if values[name] is not None and values[name] <= 0:
            raise UserError(f"{where}.{name} = {values[name]}: expected more than 0")
    if (values["concurrency"] or 0) > most:
        why = f"all tools together run at most tool_concurrency = {most} calls at once"
        raise UserError(f"{where}.concurrency = {values['concurrency']}: {why}: raise that")
    asked = tool.retries if values["retries"] is None else values["retries"]
    if asked is not None and asked < 0:  # it would not be asked at all
        raise UserError(f"{where}.retries = {asked}: expected 0 or more")
    if values["retries"] is not None and not tool.network:
        raise UserError(f"{where}.retries has no effect: {tool.name} asks no network, so drop it")
    if values["cache"] and tool.make and not tool.shared and not tool.pure:
        why = "what it says depends on what it was asked before"
        raise UserError(f"{where}.cache: {why}: drop it")
    if values["cache"] and not cached:
        raise UserError(f"{where}.cache has no effect with tool_cache=none: drop one of them")
    tool.timeout = values["timeout"] or tool.timeout
    tool.concurrency = values["concurrency"] or tool.concurrency
    if values["cache"] is not None:
        tool.pure = values["cache"]
    tool.retries = (2 if asked is None else asked) if tool.network else 0


# -- finding and loading


def _find(name: str):
    """'python' or 'path.py:function' -> (file or None, function name), without running any code;
    'mcp:path' or 'mcp:path:server' -> ("mcp", path, server or None)."""
    if name.startswith("mcp:"):
        path, _, server = name.removeprefix("mcp:").partition(".json:")
        return "mcp", path + ".json" * bool(server), server or None
    path, colon, function = name.rpartition(":")
    if not colon:
        files = sorted(Path(__file__).parent.parent.glob("*.py"))
        known = [path.stem for path in files if path.stem in _defined(path)]
        if name not in known:
            raise UserError(
                f"unknown tool {name!r}{near(name, known)} "
                f"(tools: {', '.join(known)}; or give file.py:function or mcp:file.json)"
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


def _defined(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return re.findall(r"^(?:async def|def|class) +([A-Za-z]\w*)", text, re.MULTILINE)


def _load(path: Path | None, name: str, modules: dict) -> Callable:
    if path is None:
        return getattr(importlib.import_module(f"tools.{name}"), name)
    module = modules.get(path)  # two tools of one file share the module
    if module is None:  # run again for each Toolbox: in a notebook the file may have changed
        spec = importlib.util.spec_from_file_location(str(path), path)
        module = modules[path] = importlib.util.module_from_spec(spec)
        sys.modules[str(path)] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[str(path)]
            why = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise UserError(f"importing {path} for the tool {name!r} failed: {why}") from error
    return getattr(module, name)


# -- describing


def _describe(target: Callable, given: dict, describe_only: bool) -> Tool:
    is_class = inspect.isclass(target)
    function = target.__call__ if is_class else target
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        what = f"class {target.__name__} without __call__" if is_class else repr(target)
        raise UserError(f"{what} is no tool: give a function, or a class with a __call__ method")
    name = target.__name__
    own = {key: text for key, text in given.get(name, {}).items() if key not in COMMON}
    tool = Tool(name, _schema(function, name), function, inspect.iscoroutinefunction(function))
    tool.pure, tool.network, tool.ends, tool.shared = (
        bool(getattr(target, mark, False)) for mark in ("pure", "network", "ends", "shared")
    )
    tool.key = _key(function, own)
    if own and not is_class:
        config.arguments(_no_options, own, f"{OPTIONS}: {name}")  # raises: there are none
    parameters = inspect.signature(target).parameters if is_class else {}
    for option in COMMON:
        if option in parameters:
            raise UserError(f"tool {name!r} has {option!r}, as every tool has: rename that option")
    if not is_class or describe_only:
        return tool
    wants = config.arguments(target, own, f"{OPTIONS}: {name}")
    takes_example = "example" in parameters

    def make(example: dict):
        return target(example=example, **wants) if takes_example else target(**wants)

    tool.make = make
    if tool.shared and takes_example:
        raise UserError(f"tool {name!r} is shared by all trajectories: it gets no example")
    return tool


def _no_options() -> None:
    """What a function has: its arguments are the model's."""


def _key(function: Callable, given: dict) -> str:
    """Changes with the file of the tool, the values bound in it and its options: what a kept result
    depends on."""
    file, here = inspect.getsourcefile(function), Path(__file__).parent.parent
    files = [Path(file)] if file and Path(file).is_file() else []
    if files and files[0].parent == here:  # ours use each other
        files = sorted(here.glob("*.py"))
    text = [path.read_text(encoding="utf-8") for path in files] or _source(function)
    bound = [function.__defaults__, function.__kwdefaults__]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it has no value yet
            value = cell.cell_contents
            bound.append(_source(value) if inspect.isfunction(value) else value)
    bound = re.sub(r" at 0x[0-9a-f]+", "", repr(bound))  # which another process has elsewhere
    parts = text, bound, sorted(given.items())
    return hashlib.blake2b(repr(parts).encode("utf-8", "replace"), digest_size=12).hexdigest()


def _source(function):
    """Where there is no file, as in a notebook."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return _instructions(function.__code__)


def _instructions(code):
    inner = [_instructions(const) if inspect.iscode(const) else const for const in code.co_consts]
    return code.co_code, inner, code.co_names


def _schema(function: Callable, name: str) -> dict:
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
    return schema

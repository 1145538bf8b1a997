"""Names of tools -> Tool objects: finds the file, loads it, describes the tool to the model.

`load(names, options)` takes "python" (tools/python.py), "my_tools.py:weather", "mcp:servers.json"
(calling/mcp.py), python functions and classes, and Tool objects. A class with `__call__` is one
tool, a class without is an environment (calling/environment.py): all its public methods are tools.
Names are looked at first: a typo must not wait for the seconds that importing transformers takes.
"""

import importlib
import inspect
import typing
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

from run import plugins
from run.config import UserError, near
from tools.calling import openenv, verifiers
from tools.calling.base import Environment, Result, Tool
from tools.calling.environment import hooks_of, is_environment, tools_of

OPTIONS = "tool_options"  # the config key, for messages
MCP = "mcp:"  # begins the name of tools that MCP servers have
OF_OTHERS = (MCP, openenv.PREFIX, verifiers.PREFIX)  # begin what says itself what it has
RETRIES = 2  # after a NetworkError, where neither the tool nor the user says otherwise


@dataclass
class CommonOptions:
    """The options that every tool has. None: as the tool and the Toolbox say."""

    timeout: float | None = None
    concurrency: int | None = None
    cache: bool | None = None
    retries: int | None = None


COMMON = [field.name for field in fields(CommonOptions)]


@dataclass
class Place:
    """Where the function or class of a tool is to be found."""

    path: Path | None  # of a user's file; None: tools/<name>.py
    name: str


def load(
    items: Sequence[str | Callable | Tool],
    options: Sequence[str] = (),
    timeout: float = 10.0,
    describe_only: bool = False,
    concurrency: int = 16,
    cached: bool = True,
) -> tuple[list[Tool], dict, list[Environment]]:
    """Loads the tools; returns them, {make: state} of those that have one state for the run, made
    here, and the environments.

    timeout: seconds that an MCP server has to say what it offers. describe_only: nothing is made,
    and a required option may be missing: for SFT, which shows tools and calls none; an option that
    no schema tells is refused. concurrency:
    calls at once, of all tools together. cached: the run keeps results.
    Raises UserError on a tool that does not exist, cannot be described or made, or lacks an option.
    """
    texts = plugins.parse_options(options, OPTIONS)  # {tool: {option: text}}
    places = {}  # of what is given by name; an MCP server says itself what it has
    for item in items:
        if isinstance(item, str) and not item.startswith(OF_OTHERS):
            places[item] = _find(item)

    tools = []
    environments = []
    made_here = []  # those of `tools` whose one state is made here
    modules = {}
    for item in items:
        if isinstance(item, Tool):
            tool = replace(item)  # the caller's object stays as it is
            _refuse_own_options(tool.name, texts)
            if describe_only:
                _refuse_idle_options(tool.name, texts, is_told=False)
            tools.append(tool)
        elif isinstance(item, str) and item.startswith(MCP):
            for tool in _tools_of_servers(item, timeout):
                _refuse_own_options(tool.name, texts)
                if describe_only:
                    _refuse_idle_options(tool.name, texts, is_told=False)
                tools.append(tool)
        elif isinstance(item, str) and item.startswith(openenv.PREFIX):
            environment, tool = openenv.load(item.removeprefix(openenv.PREFIX), timeout)
            _set_timeout(environment, [tool], texts, describe_only)
            environments.append(environment)
            tools.append(tool)
        elif isinstance(item, str) and item.startswith(verifiers.PREFIX):
            environment, methods = verifiers.load(item.removeprefix(verifiers.PREFIX))
            _set_timeout(environment, methods, texts, describe_only)
            environments.append(environment)
            tools += methods
        else:
            target = _import(places[item], modules) if isinstance(item, str) else item
            if is_environment(target):
                environment, methods = _describe_environment(target, texts, describe_only)
                environments.append(environment)
                tools += methods
                continue
            tool = _describe(target, texts, describe_only)
            tools.append(tool)
            if tool.shared and tool.make:
                made_here.append(tool)
    _check_names([*tools, *environments], texts)
    _check_users(environments)

    for tool in tools:
        if tool not in made_here:
            _set_common_options(tool, texts, concurrency, cached)
    # last: a mistake elsewhere must not leave a state behind that nobody closes
    if not describe_only:
        for tool in tools:
            if tool.prepare:
                tool.prepare()
    states = {}
    for tool in made_here:
        state = _make(tool)
        states[tool.make] = state
        tool.network = getattr(state, "network", tool.network)  # its options decide
        _set_common_options(tool, texts, concurrency, cached)
    return tools, states, environments


def _set_timeout(environment, tools, texts, describe_only):
    """Sets the one option that an environment of others has. UserError for any other."""
    for each in (environment, *tools):
        _refuse_own_options(each.name, texts)
        if describe_only:
            _refuse_idle_options(each.name, texts, is_told=False)
    environment.timeout = _timeout_of_all(environment.name, texts)
    for tool in tools:
        tool.timeout = environment.timeout


def _check_users(environments):
    """Raises UserError if two environments would speak as the one user."""
    with_user = [environment.name for environment in environments if "user" in environment.hooks]
    if len(with_user) > 1:
        raise UserError(f"{with_user[0]} and {with_user[1]} both have a user: keep one of them")


def _check_names(tools, texts):
    """Raises UserError for two tools or environments of one name, and for options of none."""
    counts = Counter(tool.name for tool in tools)
    for name, count in counts.items():
        if count > 1:
            raise UserError(f"two tools are named {name!r}: rename one, or leave it out")
    for name in texts:
        if name not in counts:
            there = f" (tools: {', '.join(counts) or 'none'})"
            raise UserError(f"{OPTIONS}: {name} is none of the tools{near(name, counts) or there}")


# -- finding and importing


def _find(name: str) -> Place:
    """Finds a tool of this name, without running any code. Raises UserError if there is none."""
    file, colon, function = name.rpartition(":")
    if not colon:
        known = _our_tools()
        if name not in known:
            raise UserError(
                f"unknown tool {name!r}{near(name, known)} "
                f"(tools: {', '.join(known)}; or give file.py:function or mcp:file.json)"
            )
        return Place(None, name)
    path = plugins.find_file(file)
    if path is None:
        looked = Path(file).expanduser().resolve()
        raise UserError(
            f"no file {looked} for the tool {name!r}: give an existing file.py:function"
        )
    known = plugins.names_in(path)
    if function not in known:
        hint = f"{near(function, known)} (has: {', '.join(known)})"
        raise UserError(f"no function {function!r} in {path}{hint}")
    return Place(path, function)


def _our_tools() -> list[str]:
    """Lists the names of the files in tools/ that define a tool, which has the file's name."""
    folder = Path(__file__).parent.parent
    files = sorted(folder.glob("*.py"))
    return [file.stem for file in files if file.stem in plugins.names_in(file)]


def _tools_of_servers(name: str, timeout: float) -> list[Tool]:
    """Loads what 'mcp:servers.json' means, the tools of all servers in the file, or
    'mcp:servers.json:time', those of the one named time."""
    from tools.calling import mcp

    path = name.removeprefix(MCP)
    server = None
    if ".json:" in path:
        path, _, server = path.partition(".json:")
        path += ".json"
    return mcp.load(path, server or None, timeout)


def _import(place, modules):
    if place.path is None:
        return getattr(importlib.import_module(f"tools.{place.name}"), place.name)
    return plugins.load(place.path, place.name, f"tool {place.name!r}", modules)


# -- describing


def _describe(target: Callable, texts: dict, describe_only: bool) -> Tool:
    """Describes a function or a class as a Tool; binds its own options, not the common ones."""
    is_class = inspect.isclass(target)
    function = target.__call__ if is_class else target
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        shown = f"class {target.__name__} without __call__" if is_class else repr(target)
        raise UserError(f"{shown} is no tool: give a function, or a class with a __call__ method")
    name = target.__name__
    tool = Tool(
        name=name,
        schema=_schema(function, name),
        function=function,
        is_async=inspect.iscoroutinefunction(function),
        shared=bool(getattr(target, "shared", False)),
        pure=bool(getattr(target, "pure", False)),
        network=bool(getattr(target, "network", False)),
        ends=bool(getattr(target, "ends", False)),
        sees=bool(getattr(target, "sees", False)),
        takes_images=bool(getattr(target, "takes_images", False)),
        gives_result=_gives_result(function),
    )
    if tool.takes_images:  # these are ours to give
        parameters = tool.schema["function"]["parameters"]
        parameters["properties"].pop("pictures")
        parameters["required"].remove("pictures")
    if describe_only:
        is_told = is_class and hasattr(target, "describe")
        _refuse_idle_options(name, texts, is_told)
    prepare = getattr(target, "prepare", None)
    if not is_class:
        if prepare is None:
            _refuse_own_options(name, texts)
        else:
            options = plugins.bind(prepare, _own_options(name, texts), f"{OPTIONS}: {name}")
            tool.prepare = partial(prepare, **options)
        return tool

    _refuse_common_parameters(target)
    describe = getattr(target, "describe", None)
    if describe_only and describe is None:
        return tool
    where = f"{OPTIONS}: {name}"
    options = plugins.bind(target, _own_options(name, texts), where, need_all=not describe_only)
    if describe is not None:
        tool.schema = describe(tool.schema, options)
    if describe_only:
        return tool

    if prepare is not None:
        tool.prepare = partial(prepare, **options)
    tool.make = _maker(target, options)
    if tool.shared and _takes_example(target):
        raise UserError(f"tool {name!r} is shared by all trajectories: it gets no example")
    return tool


def _describe_environment(
    target: type, texts: dict, describe_only: bool
) -> tuple[Environment, list[Tool]]:
    """Describes a class as an Environment, and its methods as Tools, all with its `make`."""
    name = target.__name__
    hooks = hooks_of(target)
    methods = tools_of(target)
    _refuse_common_parameters(target)
    environment = Environment(name, None, hooks)
    if describe_only:
        _refuse_idle_options(name, texts, is_told=False)
    else:
        where = f"{OPTIONS}: {name}"
        environment.make = _maker(target, plugins.bind(target, _own_options(name, texts), where))
        environment.timeout = _timeout_of_all(name, texts)

    tools = []
    for method_name, method in methods.items():
        try:
            schema = _schema(method, method_name)
        except UserError as error:
            why = f"environment {name}: {error}; or, if it is no tool, begin its name with _"
            raise UserError(why) from error
        _refuse_own_options(method_name, texts)
        if describe_only:
            _refuse_idle_options(method_name, texts, is_told=False)
        tool = Tool(
            name=method_name,
            schema=schema,
            function=method,
            is_async=inspect.iscoroutinefunction(method),
            make=environment.make,
            network=bool(getattr(method, "network", False)),
            ends=bool(getattr(method, "ends", False)),
            timeout=environment.timeout,
            environment=environment,
            gives_result=_gives_result(method),
        )
        tools.append(tool)
    return environment, tools


def _timeout_of_all(name, texts):
    """Reads the seconds that each call and hook of an environment has, if the user says so; all
    else that every tool has is an option of its methods."""
    common_texts = {}
    for option, text in texts.get(name, {}).items():
        if option not in COMMON:
            continue
        if option != "timeout":
            raise UserError(
                f"{OPTIONS}: {name}.{option} has no effect: give it to one of its tools"
            )
        common_texts[option] = text
    timeout = plugins.bind(CommonOptions, common_texts, f"{OPTIONS}: {name}").get("timeout")
    if timeout is not None and timeout <= 0:
        raise UserError(f"{OPTIONS}: {name}.timeout = {timeout}: expected more than 0")
    return timeout


def _maker(target: type, options: dict) -> Callable:
    """Returns make(example), which makes an instance of the class with these options."""
    takes_example = _takes_example(target)

    def make(example: dict):
        if takes_example:
            return target(example=example, **options)
        return target(**options)

    return make


def _takes_example(target):
    return "example" in inspect.signature(target).parameters


def _refuse_common_parameters(target):
    parameters = inspect.signature(target).parameters
    for option in COMMON:
        if option in parameters:
            raise UserError(
                f"tool {target.__name__!r} has {option!r}, as every tool has: rename that option"
            )


def _gives_result(function):
    """Says whether a function is annotated to return a Result, or a Result or something else."""
    hint = typing.get_type_hints(function).get("return")
    return Result in (hint, *typing.get_args(hint))


def _schema(function: Callable, name: str) -> dict:
    remedy = (
        "give each argument a plain type (str, int, float, bool, list, dict, Literal, X | None) "
        "and, in a docstring that begins with what the tool does, a line `name: what` under `Args:`"
    )
    from transformers.utils import get_json_schema  # here: with torch it costs two seconds

    try:
        _check_arguments(function)
        schema = get_json_schema(function)
        schema["function"]["name"] = name
        if _gives_result(function):  # what the model reads of it
            schema["function"]["return"] = {"type": "string"}
        if not schema["function"]["description"]:
            raise ValueError("its docstring does not say what it does")
    # its two own classes, NameError in a hint, bad JSON in (choices: ...)
    except Exception as error:
        why = str(error.args[0] if error.args else error).rstrip(".!")
        raise UserError(f"tool {name!r} cannot be described to a model, {why}: {remedy}") from error
    return schema


def _check_arguments(function):
    """Raises ValueError for an argument that get_json_schema lets pass, and no model could give."""
    plain = (str, int, float, bool, list, tuple, dict, type(None), typing.Any)
    hints = typing.get_type_hints(function)
    for argument, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"argument {parameter} cannot be given by name")
        hint = hints.get(argument)
        is_a_class = isinstance(hint, type) and typing.get_origin(hint) is None
        if is_a_class and hint not in plain:
            raise ValueError(f"argument {argument} has the type {hint.__name__}")


def _make(tool):
    """Makes the one state of a tool that is shared by all trajectories."""
    try:
        return tool.make({})
    except UserError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise UserError(f"tool {tool.name!r} cannot be made: {why}") from error


# -- options


def _own_options(name, texts):
    """Picks what the user gave a tool, {option: text}, without the options that every tool has."""
    own_texts = {}
    for option, text in texts.get(name, {}).items():
        if option not in COMMON:
            own_texts[option] = text
    return own_texts


def _refuse_own_options(name, texts):
    """Raises UserError if a tool that has none but those of every tool is given another."""

    def no_options():  # of a function: its arguments are the model's
        pass

    plugins.bind(no_options, _own_options(name, texts), f"{OPTIONS}: {name}")


def _refuse_idle_options(name, texts, is_told):
    """Refuses, with UserError, options that change nothing of what is shown, where tools are shown
    and none is called. is_told: the tool's schema depends on its own options."""
    for option in texts.get(name, {}):
        if option in COMMON or not is_told:
            what = "tools are shown here, and none is called: drop it"
            raise UserError(f"{OPTIONS}: {name}.{option} has no effect: {what}")


def _set_common_options(tool: Tool, texts: dict, most: int, cached: bool) -> None:
    """Sets what the user says with the options that every tool has.

    most: calls at once, of all tools together. cached: the run keeps results.
    Raises UserError for a value that is out of range or would have no effect.
    """
    where = f"{OPTIONS}: {tool.name}"
    common_texts = {}
    for option, text in texts.get(tool.name, {}).items():
        if option in COMMON:
            common_texts[option] = text
    options = CommonOptions(**plugins.bind(CommonOptions, common_texts, where))

    if options.timeout is not None:
        if options.timeout <= 0:
            raise UserError(f"{where}.timeout = {options.timeout}: expected more than 0")
        tool.timeout = options.timeout

    if options.concurrency is not None:
        if options.concurrency <= 0:
            raise UserError(f"{where}.concurrency = {options.concurrency}: expected more than 0")
        if options.concurrency > most:
            why = f"all tools together run at most tool_concurrency = {most} calls at once"
            raise UserError(f"{where}.concurrency = {options.concurrency}: {why}: raise that")
        tool.concurrency = options.concurrency

    retries = tool.retries if options.retries is None else options.retries
    if retries is None:
        retries = RETRIES
    if retries < 0:  # it would not be asked at all
        raise UserError(f"{where}.retries = {retries}: expected 0 or more")
    if options.retries is not None and not tool.network:
        raise UserError(f"{where}.retries has no effect: {tool.name} asks no network, so drop it")
    tool.retries = retries if tool.network else 0

    if options.cache:
        if tool.make and not tool.shared and not tool.pure:
            why = "what it says depends on what it was asked before"
            raise UserError(f"{where}.cache: {why}: drop it")
        if not cached:
            raise UserError(
                f"{where}.cache=true has no effect, as no results are kept (tool_cache=none of "
                f"serve/mcp_server.py): write cache=false, or drop one of them"
            )
    if options.cache is not None:
        tool.pure = options.cache

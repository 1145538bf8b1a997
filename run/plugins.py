"""Functions and classes of a user's file, and the options that a user gives them.

    path = find_file("my_tools.py")  # here, or beside nanotool's own files
    tool = load(path, "weather", "tool 'my_tools.py:weather'", modules={})
    texts = parse_options(("weather.unit=C", "weather.days=3"), "tool_options")
    arguments = bind(tool, texts["weather"], "tool_options: weather")  # {"unit": "C", "days": 3}

Tools and rewards are named and configured by these. A file defines with `def` or `class`, at its
top, what can be named; that is read from its text: a typo is told before the file is run.
"""

import importlib.util
import inspect
import json
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Container, Sequence
from pathlib import Path

from run import config
from run.config import UserError, near

# Parameters with these names get something of a rollout: they are no options of a user.
OF_A_ROLLOUT = ("example", "trajectory")


def find_file(name: str) -> Path | None:
    """Finds the file of that name: here, or else beside nanotool's own files."""
    for path in (Path(name).expanduser(), config.HERE / name):
        if path.is_file():
            return path.resolve()
    return None


def names_in(path: Path) -> list[str]:
    """Lists the public functions and classes that a python file defines; it is not run."""
    text = path.read_text(encoding="utf-8")
    return re.findall(r"^(?:async def|def|class) +([A-Za-z]\w*)", text, re.MULTILINE)


def load(path: Path, name: str, label: str, modules: dict) -> Callable:
    """Runs a python file, once, and returns its function or class `name`.

    modules: {path: module} of the files that were run before, so that two names of one file share
    its module; it is filled here. Begin with an empty one: in a notebook the file may have changed.
    label: "tool 'my.py:f'", for messages. Raises UserError if the file raises something.
    """
    if path not in modules:
        modules[path] = _run(path, label)
    return getattr(modules[path], name)


def _run(path, label):
    spec = importlib.util.spec_from_file_location(str(path), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for the module of their class there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        why = f"{type(error).__name__}: {error}".removesuffix(": ")
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        at = f" (line {lines[-1]})" if lines else ""  # a SyntaxError says it itself
        raise UserError(f"importing {path} for the {label} failed: {why}{at}") from error
    return module


def parse_options(texts: Sequence[str], key: str) -> dict[str, dict[str, str]]:
    """Reads ("search.k=5", …), the entries of the config key `key`, as {"search": {"k": "5"}}.

    Raises UserError for what is no option, or is given twice.
    """
    options = {}
    for text in _joined(texts):
        name, dot, assignment = text.partition(".")
        option, equals, value = assignment.partition("=")
        if not (dot and equals and name and option):
            raise UserError(f"{key}: cannot read {text!r}: write name.option=value")
        of_name = options.setdefault(name, {})
        if option in of_name:
            raise UserError(f"{key}: {name}.{option} is given twice: keep one of them")
        of_name[option] = value
    return options


def _joined(texts):
    """Joins what does not begin like an option to the one before: the command line was cut at a
    comma of its value."""
    joined = []
    for text in texts:
        if joined and not re.match(r"[\w-]+\.\w+=", text):
            joined[-1] += f",{text}"
        else:
            joined.append(text)
    return joined


def parse_source(text: str) -> tuple[str, dict[str, object]]:
    """Reads "chain_sum?max_terms=3", which names data with what it is made of, as ("chain_sum",
    {"max_terms": 3}); more behind &. A value is JSON, or else text. UserError for what is no such
    thing.
    """
    name, _, query = text.partition("?")
    values = {}
    for part in query.split("&") if query else []:
        option, equals, value = part.partition("=")
        if not (equals and option.isidentifier()):
            raise UserError(f"{text}: cannot read {part!r}: write {name}?option=value&option=value")
        if option in values:
            raise UserError(f"{text}: {option} is given twice: keep one of them")
        try:
            values[option] = json.loads(value)
        except ValueError:
            values[option] = value
    return name, values


def bind(
    function: Callable,
    texts: dict[str, str],
    where: str,
    skip: Container[str] = (),
    need_all: bool = True,
) -> dict[str, object]:
    """Casts the options {name: text} to keyword arguments of a function or a class, by the types of
    its parameters.

    Parameters without a type are no options, nor are those in `skip` and those of a rollout.
    where: "tool_options: search", for messages. Raises UserError for an option that is unknown, of
    another type, or, with need_all, missing.
    """
    parameters = inspect.signature(function).parameters
    kinds = _kinds_of_options(function, where, skip)
    for name in texts:
        if name not in kinds:
            there = f" (options: {', '.join(kinds) or 'none'})"
            raise UserError(f"{where} has no option {name!r}{near(name, kinds) or there}")

    values = {}
    for name, text in texts.items():
        try:
            values[name] = config.cast(kinds[name], text, typed=True)
        except ValueError:
            expected = config.describe_type(kinds[name])
            raise UserError(f"{where}.{name} = {text!r}: expected {expected}") from None
        except AssertionError as error:  # a dict, say
            raise UserError(f"{where}.{name} cannot be given as an option: {error}") from None

    for name in kinds if need_all else ():
        if name not in values and parameters[name].default is inspect.Parameter.empty:
            owner = where.rpartition(" ")[2]
            raise UserError(f"{where}.{name} is missing: write {owner}.{name}=…")
    return values


def _kinds_of_options(function, where, skip):
    """Finds what a user may set: {parameter: its type}."""
    annotated = function.__init__ if isinstance(function, type) else function
    hints = {}
    if isinstance(annotated, types.FunctionType):  # not the __init__ of object
        try:
            hints = typing.get_type_hints(annotated)
        except NameError as error:
            raise UserError(f"{where}: a type of its parameters is not known ({error})") from None
    kinds = {}
    for name, parameter in inspect.signature(function).parameters.items():
        by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if by_name and name in hints and name not in skip and name not in OF_A_ROLLOUT:
            kinds[name] = hints[name]
    return kinds

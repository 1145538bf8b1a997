"""A flat dataclass, a python file and --key=value: how every script here is configured.

    cfg = config.parse(Config, ["--config", "calc.py", "--learning_rate=1e-4"], check)

Defaults < config file < command line; every key and value of all three is checked before anything
slow happens. `--config calc.py` is ./calc.py, or else configs/calc.py beside this file; it holds
plain assignments (imports, arithmetic and names that start with _ are fine). On the command line
`1` is a fine float, `1e3` a fine int, `true` a bool, `a,b` a tuple, nothing (`--tools=`) the empty
tuple, `none` None. What a script has beside its Config:

    if __name__ == "__main__":
        config.answer_help(__file__)  # above `import torch`: --help is answered in a moment
    ...
    if __name__ == "__main__":
        config.main(lambda argv: train(config.parse(Config, argv, check)))
"""

import ast
import dataclasses
import errno
import inspect
import math
import os
import re
import runpy
import sys
import types
import typing
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
# The keys of train_grpo's Config that shape a rollout: those that rollout.py and evaluate.py take.
ROLLOUT_KEYS = tuple(
    """
    model dtype data split prompt_column answer_column answer_after system_prompt prompt_template
    database template_options format tools tool_options tool_timeout tool_concurrency rewards
    reward_options temperature max_tokens max_new_tokens max_turns max_tool_calls
    max_observation_tokens trajectory_timeout final_turn max_concurrent seed engine urls
    gpu_memory_utilization engine_options
    """.split()
)
LOCK = ".lock"  # in an out_dir, of the process that trains there: all that a killed one may leave
GIVEN = {"example", "trajectory"}  # what a tool or a reward gets of a rollout: no options of a user


class UserError(Exception):
    """A user's mistake. The message is one sentence: the value, what was expected, what to do."""


def parse(cls, argv, check=None, keys=None, base=None):
    """An instance of the flat dataclass `cls`: its defaults (or the values of `base`, an instance),
    `--config file.py`, `--key=value`.

    check(cfg) comes last, for rules across keys. keys: names that have an effect in the calling
    script; any other is refused on the command line (a config file is shared between scripts and
    may hold all). Raises UserError for everything that a user can get wrong.
    """
    kinds = typing.get_type_hints(cls)  # also of `from __future__ import annotations`
    default = base or cls()
    for name, kind in kinds.items():
        try:  # a default that does not fit would be saved, then refused by the next --config
            _cast(kind, getattr(default, name), typed=False)
        except ValueError:
            raise AssertionError(f"the default of {name} is not {_say(kind)}") from None
    keys = list(kinds if keys is None else keys)

    texts, items = {}, list(argv)
    while items:
        item = items.pop(0)
        key, equals, text = item.removeprefix("--").partition("=")
        if item == "--config" and items and not items[0].startswith("--"):
            text = items.pop(0)
        if not item.startswith("--") or (key == "config" and not text):
            raise UserError(f"cannot read {item!r}: write {_instead(item)}")
        if key in texts:
            raise UserError(f"--{key} is given twice: keep one of them")
        if key != "config" and key not in kinds:
            raise UserError(_unknown(key, keys))
        if key != "config" and key not in keys:
            script = Path(sys.argv[0]).name
            raise UserError(f"{key} has no effect in {script}: drop it")
        if key != "config" and not equals:
            follows = items and not items[0].startswith("--") and "=" not in items[0]
            value = items[0] if follows else _text(getattr(default, key))
            raise UserError(f"cannot read {item!r}: write --{key}={value}")
        texts[key] = text

    file, values = texts.pop("config", None), {}
    for key, value in (_run_file(file, kinds) if file else {}).items():
        values[key] = _checked(key, kinds[key], value, f" in {file}", typed=False)
    for key, text in texts.items():
        values[key] = _checked(key, kinds[key], text, "", typed=True)
    cfg = dataclasses.replace(default, **values)
    if check is not None:
        check(cfg)
    return cfg


def split(argv, names):
    """(mine, rest): `mine` are the `--key=value` (or bare `--key`) of argv whose key is in `names`.

    For a script with keys of its own beside those of another's Config: give both lists to `parse`.
    What is not understood (`k=4`, `--kk=4`) stays in the rest, where `parse` says what is wrong.
    """
    flags = {f"--{name}" for name in names}
    mine = [item for item in argv if item.partition("=")[0] in flags]
    return mine, [item for item in argv if item.partition("=")[0] not in flags]


def take_flag(argv, name):
    """Takes `--name=true` or `--name=false` out of argv: (its value, the rest). UserError for other
    values."""
    mine, rest = split(argv, (name,))
    for item in mine:
        if item not in (f"--{name}=true", f"--{name}=false"):
            raise UserError(f"cannot read {item!r}: write --{name}=true")
    return f"--{name}=true" in mine, rest


def run_script(script, argv):
    """Runs another script of this folder as if it had been called with argv."""
    sys.argv = [str(HERE / script), *argv]
    runpy.run_path(sys.argv[0], run_name="__main__")


def options(texts, key):
    """{name: {option: text}} of ("search.k=5", ...), the entries of the config key `key`. What does
    not begin like an option goes on with the one before: a comma of its value, cut on the command
    line."""
    found, whole = {}, []
    for text in texts:
        if whole and not re.match(r"[\w-]+\.\w+=", text):
            whole[-1] += f",{text}"
        else:
            whole.append(text)
    for text in whole:
        name, dot, rest = text.partition(".")
        option, equals, value = rest.partition("=")
        if not (dot and equals and name and option):
            raise UserError(f"{key}: cannot read {text!r}: write name.option=value")
        if option in found.setdefault(name, {}):
            raise UserError(f"{key}: {name}.{option} is given twice: keep one of them")
        found[name][option] = value
    return found


def arguments(function, given, where, skip=()):
    """The texts of `given`, {option: text}, as keyword arguments of `function`, a function or a
    class, each cast to the type of its parameter. Parameters without a type are no options, nor
    are those in `skip` and in GIVEN. where: "tool_options: search", for messages. UserError for an
    option that is unknown, of another type, or missing."""
    made = function.__init__ if isinstance(function, type) else function
    parameters = inspect.signature(function).parameters
    names = [name for name in parameters if name not in skip]
    try:
        hints = typing.get_type_hints(made) if isinstance(made, types.FunctionType) else {}
    except NameError as error:
        raise UserError(f"{where}: a type of its parameters is not known ({error})") from None
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    names = [name for name in names if name in hints and parameters[name].kind in named]
    kinds = {name: hints[name] for name in names if name not in GIVEN}
    for name in given:
        if name not in kinds:
            there = f" (options: {', '.join(kinds) or 'none'})"
            raise UserError(f"{where} has no option {name!r}{near(name, kinds) or there}")
    values = {}
    for name, text in given.items():
        try:
            values[name] = _cast(kinds[name], text, typed=True)
        except ValueError:
            expected = _say(kinds[name])
            raise UserError(f"{where}.{name} = {text!r}: expected {expected}") from None
        except AssertionError as error:  # a dict, say
            raise UserError(f"{where}.{name} cannot be given as an option: {error}") from None
    for name in kinds:
        if name not in values and parameters[name].default is inspect.Parameter.empty:
            write = where.rpartition(" ")[2]
            raise UserError(f"{where}.{name} is missing: write {write}.{name}=…")
    return values


def main(run):
    """Call run(arguments of the script). A UserError is one line on stderr and exit code 2."""
    try:
        run(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        remedy = "make room, and go on with --resume=true"
        print(f"error: no space left on the disk: {remedy}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # what a shell reports for a program that Ctrl-C ended


def answer_help(file, other=None, keys=()):
    """If sys.argv has -h or --help: print the file's docstring and the source of its `class Config`
    and, of the other file's, those of `keys` that it has not itself, and exit 0. Nothing is
    imported. Relative names are beside this file."""
    if not {"-h", "--help"} & set(sys.argv[1:]):
        return
    docstring, lines, fields = _source(file)
    print(docstring, end="\n\n")
    if lines:
        print("\n".join(lines), end="\n\n")
    if other:
        _, lines, theirs = _source(other)
        for name, first, end in theirs:
            if name not in keys or name in {own for own, *_ in fields}:
                lines[first:end] = [None] * (end - first)
        lines = [line for line in lines[1:] if line is not None]
        heads = [line.startswith("    #") for line in lines] + [True]  # one without keys goes too
        kept = [line for i, line in enumerate(lines) if not (heads[i] and heads[i + 1])]
        print(f"and these of {other}:", *kept, sep="\n", end="\n\n")
    sys.exit(0)


def _source(file):
    """-> docstring, lines of `class Config`, [(field, first line of it, line behind it)]."""
    source = (HERE / file).read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            start, end = node.lineno - 1, node.end_lineno
            while end < len(lines) and lines[end].startswith(" "):
                end += 1  # whole lines, and comments below: a segment has neither
            found = [field for field in node.body if isinstance(field, ast.AnnAssign)]
            fields = [(f.target.id, f.lineno - 1 - start, f.end_lineno - start) for f in found]
            return ast.get_docstring(tree), lines[start:end], fields
    return ast.get_docstring(tree), [], []


def save(cfg, path):
    """Write all fields as a python file: parse(cls, ["--config", path]) gives an equal cfg."""
    lines = [f"{f.name} = {getattr(cfg, f.name)!r}\n" for f in dataclasses.fields(cfg)]
    aside = Path(f"{path}.aside")  # whole or not at all: a run is gone on with by it
    aside.write_text("".join(lines), encoding="utf-8")
    os.replace(aside, path)


def changed(cfg):
    """The names of the fields that differ from their default, for rules like "has no effect"."""
    default = type(cfg)()
    names = [field.name for field in dataclasses.fields(cfg)]
    return {name for name in names if getattr(cfg, name) != getattr(default, name)}


def refuse_unused_keys(cfg, rules):
    """UserError for a key that was given but has no effect. rules: (condition, "key key", why)."""
    given = changed(cfg)
    for condition, names, why in rules:
        if condition and (found := sorted(given & set(names.split()))):
            raise UserError(f"{found[0]} has no effect {why}")


def require_positive(cfg, names):
    """UserError for a number that is not above 0; names: "key key"."""
    for name in names.split():
        if getattr(cfg, name) <= 0:
            raise UserError(f"{name} = {getattr(cfg, name)}: expected more than 0")


def require_not_negative(cfg, names):
    """UserError for a number below 0; names: "key key"."""
    for name in names.split():
        if getattr(cfg, name) < 0:
            raise UserError(f"{name} = {getattr(cfg, name)}: expected 0 or more")


def fresh_dir(path, way_out="remove it", key="out_dir"):
    """Create the folder of a new run and return its Path; one that holds something is refused."""
    path, other = Path(path), f"give another with --{key}=…"
    try:
        path.mkdir(parents=True, exist_ok=True)
        empty = all(found.name == LOCK for found in path.iterdir())
    except OSError as error:  # a file in its place, no permission, a read-only disk
        raise UserError(f"cannot use {key} '{path}' ({error.strerror}): {other}") from None
    if not empty:
        raise UserError(f"{key} '{path}' is not empty: {other}, or {way_out}")
    if not os.access(path, os.W_OK):
        raise UserError(f"cannot write to {key} '{path}': {other}")
    return path


def near(name, names):
    """': did you mean learning_rate?' for a misspelt name, '' where nothing is near."""
    import difflib

    close = difflib.get_close_matches(name, list(names), n=1)
    return f": did you mean {close[0]}?" if close else ""


def _unknown(key, names, where=""):
    own = ", and a name of your own starts with _" if where else ""
    return f"unknown key {key!r}{where}{near(key, names) or ': --help lists the keys' + own}"


def _instead(item):
    """What to write for an item that is no --key=value."""
    bare = item.lstrip("-")
    if item.removesuffix("=") == "--config":
        return "--config calc.py"
    if "=" in bare:
        return f"--{bare}"
    return f"--config {item}" if item.endswith(".py") else "--key=value or --config file.py"


def _text(value):
    """A default as one would type it, for messages: 2e-5, none, true, a,b."""
    if isinstance(value, tuple):
        return ",".join(_text(item) for item in value)
    if value is None or isinstance(value, bool):  # who writes a bare --flag means true
        return "none" if value is None else "true"
    if isinstance(value, float):
        return repr(value).replace("e-0", "e-").replace("e+", "e")
    return repr(value) if " " in str(value) else str(value) or "…"


def _run_file(name, kinds):
    """Execute the config file and return {key: value}, unchecked but for the names."""
    path = next((p for p in (Path(name), HERE / "configs" / name) if p.is_file()), None)
    if path is None:
        looked = "" if Path(name).is_absolute() else f"; looked for {name} and configs/{name}"
        raise UserError(f"no config file {name!r}{looked}")
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except SyntaxError as error:  # no line: bytes that are no text
        raise UserError(f"{name}, line {error.lineno or 1}: {error.msg}") from None
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from None
    found = {"__name__": "__config__", "__file__": str(path)}
    try:
        exec(compile(tree, str(path), "exec"), found)
    except Exception as error:
        line = error.__traceback__.tb_next.tb_lineno  # the first frame is ours, the next the file's
        raise UserError(f"{name}, line {line}: {type(error).__name__}: {error}") from error

    aliases = [node for node in ast.walk(tree) if isinstance(node, ast.alias)]
    imported = {(alias.asname or alias.name).split(".")[0] for alias in aliases}
    values = {}
    for key, value in found.items():
        if key in kinds:
            values[key] = value
        elif isinstance(value, (types.FunctionType, type)) and key not in imported:
            raise UserError(f"{key} in {name} is code: a config file holds plain values")
        elif not key.startswith("_") and key not in imported:
            raise UserError(_unknown(key, kinds, f" in {name}"))
    return values


def _checked(key, kind, value, where, typed):
    try:
        return _cast(kind, value, typed)
    except ValueError:
        raise UserError(f"{key} = {value!r}{where}: expected {_say(kind)}") from None


def _say(kind):
    """A type as it reads in a message."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, args))}"
    if typing.get_origin(kind) is tuple:
        return f"a tuple of {args[0].__name__}"
    if args:
        return " or ".join(_say(arm) for arm in args)
    return {bool: "true or false", types.NoneType: "none"}.get(kind) or kind.__name__


def _cast(kind, value, typed):
    """`value` as a `kind`, or ValueError. typed: text of the command line, else a python value."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        for option in args:
            if value == str(option) if typed else (type(value), value) == (type(option), option):
                return option  # the type is compared because True == 1
    elif origin in (typing.Union, types.UnionType):
        for arm in sorted(args, key=lambda arm: arm is not types.NoneType):
            try:  # None first: for `str | None`, none is not the text "none"
                return _cast(arm, value, typed)
            except ValueError:
                pass
    elif origin is tuple:
        assert args[1:] == (...,), f"a field of type {kind}: write tuple[{args[0].__name__}, ...]"
        if typed:
            value = [item.strip() for item in value.split(",")] if value else []
        if isinstance(value, (list, tuple)) and not (typed and "" in value):
            return tuple(_cast(args[0], item, typed) for item in value)
    elif kind is types.NoneType:
        if value is None or (typed and value.lower() == "none"):
            return None
    elif kind is bool:
        if isinstance(value, bool) or (typed and value.lower() in ("true", "false")):
            return value.lower() == "true" if typed else value
    elif kind is str:
        if isinstance(value, str):
            return value
    elif kind in (int, float):
        if typed or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            return _number(kind, value)
    else:
        raise AssertionError(f"config fields of type {kind} are not supported")
    raise ValueError


def _number(kind, value):
    try:
        if kind is int and not isinstance(value, float):
            return int(value)  # not by way of a float, which has 53 bits
    except ValueError:
        pass
    try:
        number = float(value)
    except OverflowError:
        raise ValueError from None
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        raise ValueError
    return kind(number)

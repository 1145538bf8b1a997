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
import math
import os
import runpy
import sys
import types
import typing
from pathlib import Path

from run.names import translation
from trajectory import escaped

HERE = Path(__file__).resolve().parent.parent
# The keys of train_grpo's Config that shape a rollout: those that rollout.py and evaluate.py take.
ROLLOUT_KEYS = tuple(
    """
    model dtype data split prompt_column answer_column answer_after system_prompt prompt_template
    database template_options chat_template format tools tool_options tool_timeout tool_concurrency
    mix rewards reward_options temperature max_tokens max_new_tokens max_turns max_tool_calls
    max_observation_tokens trajectory_timeout final_turn turns_left max_concurrent seed engine
    urls gpu_memory_utilization engine_options min_pixels max_pixels
    """.split()
)
# What a disk says to who reads or writes it, and what to do then.
DISK_REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EROFS: "give a folder that can be written",
    errno.EACCES: "give a place that this user may use",
    errno.EPERM: "give a place that this user may use",
    errno.EIO: "look after the disk, or give another",
}
LOCK = ".lock"  # in an out_dir, of the process that trains there: all that a killed one may leave
# What may lie in the folder of a run before it begins: that, and what serve/page.py writes which
# starts it: who runs there, and what it says.
BEFORE = {LOCK, "process.json", "log.txt"}


class UserError(Exception):
    """A user's mistake. The message is one sentence: the value, what was expected, what to do."""


def parse(cls, argv, check=None, keys=None, base=None):
    """Makes an instance of the flat dataclass `cls`, from its defaults (or the values of `base`, an
    instance), `--config file.py`, `--key=value`.

    check(cfg) comes last, for rules across keys. keys: names that have an effect in the calling
    script; any other is refused on the command line (a config file is shared between scripts and
    may hold all). Raises UserError for everything that a user can get wrong.
    """
    kinds = typing.get_type_hints(cls)  # also of `from __future__ import annotations`
    default = base or cls()
    for name, kind in kinds.items():
        try:  # a default that does not fit would be saved, then refused by the next --config
            cast(kind, getattr(default, name), typed=False)
        except ValueError:
            raise AssertionError(f"the default of {name} is not {describe_type(kind)}") from None

    keys = list(kinds if keys is None else keys)
    texts = _read_command_line(argv, kinds, keys, default)
    file = texts.pop("config", None)
    values = {}
    if file:
        for key, value in _run_file(file, kinds).items():
            values[key] = _fitted(key, kinds[key], value, f" in {file}", typed=False)
    for key, text in texts.items():
        values[key] = _fitted(key, kinds[key], text, "", typed=True)
    cfg = dataclasses.replace(default, **values)
    if check is not None:
        check(cfg)
    return cfg


def _read_command_line(argv, kinds, keys, default):
    """Reads `--key=value` and `--config file.py`, whose key is config, as {key: text}."""
    texts = {}
    items = list(argv)
    while items:
        item = items.pop(0)
        key, equals, text = item.removeprefix("--").partition("=")
        if item == "--config" and items and not items[0].startswith("--"):
            text = items.pop(0)
        if not item.startswith("--") or (key == "config" and not text):
            raise UserError(f"cannot read {item!r}: write {_instead(item)}")
        if key in texts:
            raise UserError(f"--{key} is given twice: keep one of them")
        if key != "config":
            if key not in kinds:
                raise UserError(_unknown(key, keys))
            if key not in keys:
                script = Path(sys.argv[0]).name
                raise UserError(f"{key} has no effect in {script}: drop it")
            if not equals:
                value = as_typed(getattr(default, key))
                if items and not items[0].startswith("--") and "=" not in items[0]:
                    value = items[0]  # written behind a blank
                raise UserError(f"cannot read {item!r}: write --{key}={value}")
        texts[key] = text
    return texts


def split(argv, names):
    """Splits argv: the `--key=value` (or bare `--key`) whose key is in `names`, and all else.

    For a script with keys of its own beside those of another's Config: give both lists to `parse`.
    What is not understood (`k=4`, `--kk=4`) is in the second, where `parse` says what is wrong.
    """
    flags = [f"--{name}" for name in names]
    mine = []
    others = []
    for item in argv:
        if item.partition("=")[0] in flags:
            mine.append(item)
        else:
            others.append(item)
    return mine, others


def take_flag(argv, name):
    """Takes `--name=true` or `--name=false` out of argv: (whether it is true, all else). UserError
    for other values."""
    mine, others = split(argv, (name,))
    for item in mine:
        if item not in (f"--{name}=true", f"--{name}=false"):
            raise UserError(f"cannot read {item!r}: write --{name}=true")
    return f"--{name}=true" in mine, others


def run_script(script, argv):
    """Runs another script of this folder as if it had been called with argv."""
    sys.argv = [str(HERE / script), *argv]
    runpy.run_path(sys.argv[0], run_name="__main__")


def main(run):
    """Calls run(arguments of the script). A UserError is one line on stderr and exit code 2."""
    try:
        run(sys.argv[1:])
    except UserError as error:
        tell(f"error: {error}")
        sys.exit(2)
    except OSError as error:
        if error.errno not in DISK_REMEDIES:
            raise
        tell(f"error: {disk_problem(error)}")
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # what a shell reports for a program that Ctrl-C ended


def show_uncaught(kind, error, traceback):
    """Shows what nothing caught: of Ctrl-C only that it was pressed."""
    if issubclass(kind, KeyboardInterrupt):
        tell("interrupted")
    else:
        sys.__excepthook__(kind, error, traceback)


def disk_problem(error):
    """Says in a sentence what a disk did not do, where, and what to do then."""
    place = f"'{error.filename}'" if error.filename else "the disk"
    remedy = DISK_REMEDIES.get(error.errno, "give another place")
    return f"cannot use {place} ({error.strerror or error}): {remedy}"


def tell(line):
    """Prints a line on stderr, at once and without what a terminal obeys: it may quote a model, a
    tool, a server or a data set."""
    # with its end in one piece: several ranks may write at once
    print(f"{escaped(line)}\n", end="", file=sys.stderr, flush=True)


def say_at_once(text):
    """Prints a line before what takes long is imported: a screen that stays dark looks broken. Of
    several processes one does: their launcher (learning/parallel.py), or the first of torchrun's.
    """
    is_launched = "NANOTOOL_PIPE" in os.environ
    if not is_launched and os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def answer_help(file, other=None, keys=()):
    """Answers -h and --help, if sys.argv has one of them, and exits with 0. Else has Ctrl-C be told
    in a word from here on, also while the script still imports.

    Prints the file's docstring and the source of its `class Config` and, of the other file's, those
    of `keys` that it has not itself. Nothing is imported. Relative names are beside nanotool's
    scripts.
    """
    sys.excepthook = show_uncaught
    if "-h" not in sys.argv[1:] and "--help" not in sys.argv[1:]:
        return
    docstring, lines, fields = _read_source(file)
    text = f"{docstring}\n\n"
    if lines:
        text += "\n".join(lines) + "\n\n"
    if other:
        own = [name for name, _, _ in fields]
        wanted = [key for key in keys if key not in own]
        text += f"and these of {other}:\n"
        text += "".join(f"{line}\n" for line in _lines_of_keys(other, wanted)) + "\n"
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # `--help | head` has read enough
        # python writes what is left once more when it ends, and would complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _lines_of_keys(file, keys):
    """Picks the lines of `class Config` that are of these keys, and the comments that head them."""
    _, lines, fields = _read_source(file)
    hidden = {0}  # "class Config:"
    for name, first, end in fields:
        if name not in keys:
            hidden.update(range(first, end))
    visible = [line for i, line in enumerate(lines) if i not in hidden]
    with_keys = []
    for i, line in enumerate(visible):
        is_last = i + 1 == len(visible)
        # a heading without keys goes too
        if _is_heading(line) and (is_last or _is_heading(visible[i + 1])):
            continue
        with_keys.append(line)
    return with_keys


def _is_heading(line):
    return line.startswith("    #")


def _read_source(file):
    """Reads a script: docstring, lines of `class Config`, [(field, first line, line behind it)]."""
    source = (HERE / file).read_text(encoding="utf-8")
    tree = ast.parse(source)
    docstring = ast.get_docstring(tree)
    lines = source.splitlines()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            start = node.lineno - 1
            end = node.end_lineno
            while end < len(lines) and lines[end].startswith(" "):
                end += 1  # whole lines, and comments below: a segment has neither
            fields = []
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    first = field.lineno - 1 - start
                    fields.append((field.target.id, first, field.end_lineno - start))
            return docstring, lines[start:end], fields
    return docstring, [], []


def save(cfg, path):
    """Writes all fields as a python file: parse(cls, ["--config", path]) gives an equal cfg."""
    lines = [f"{f.name} = {getattr(cfg, f.name)!r}\n" for f in dataclasses.fields(cfg)]
    aside = Path(f"{path}.aside")  # whole or not at all: a run is gone on with by it
    aside.write_text("".join(lines), encoding="utf-8")
    os.replace(aside, path)


def is_saved(cls, path, is_older=False):
    """Says whether a file is what `save` writes of a `cls`; it is read and not run. is_older: or
    what it wrote when `cls` had fewer fields."""
    try:
        lines = ast.parse(Path(path).read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return False
    names = set()
    for line in lines:
        if not isinstance(line, ast.Assign) or not isinstance(line.targets[0], ast.Name):
            return False
        names.add(line.targets[0].id)
    fields = {field.name for field in dataclasses.fields(cls)}
    return names == fields or (is_older and "out_dir" in names and names < fields)


def changed(cfg):
    """Lists the fields that differ from their default, for rules like "has no effect"."""
    default = type(cfg)()
    names = set()
    for field in dataclasses.fields(cfg):
        if getattr(cfg, field.name) != getattr(default, field.name):
            names.add(field.name)
    return names


def refuse_unused_keys(cfg, rules):
    """Raises UserError for a key that was changed but has no effect.

    rules: (condition under which it has none, "key key", why).
    """
    set_by_user = changed(cfg)
    for condition, names, why in rules:
        unused = sorted(set_by_user & set(names.split()))
        if condition and unused:
            raise UserError(f"{unused[0]} has no effect {why}")


def require_positive(cfg, names):
    """Raises UserError for a number that is not above 0; names: "key key"."""
    for name in names.split():
        if getattr(cfg, name) <= 0:
            raise UserError(f"{name} = {getattr(cfg, name)}: expected more than 0")


def require_not_negative(cfg, names):
    """Raises UserError for a number below 0; names: "key key"."""
    for name in names.split():
        if getattr(cfg, name) < 0:
            raise UserError(f"{name} = {getattr(cfg, name)}: expected 0 or more")


def fresh_dir(path, way_out="remove it", key="out_dir"):
    """Creates the folder of a new run and returns its Path; one that holds something is refused."""
    path = Path(path)
    remedy = f"give another with --{key}=…"
    try:
        path.mkdir(parents=True, exist_ok=True)
        is_empty = all(entry.name in BEFORE for entry in path.iterdir())
    except OSError as error:  # a file in its place, no permission, a read-only disk
        raise UserError(f"cannot use {key} '{path}' ({error.strerror}): {remedy}") from None
    if not is_empty:
        raise UserError(f"{key} '{path}' is not empty: {remedy}, or {way_out}")
    if not os.access(path, os.W_OK):
        raise UserError(f"cannot write to {key} '{path}': {remedy}")
    return path


def next_folder(folder):
    """Makes `folder`, or folder-2, folder-3, …: nothing that is there is overwritten."""
    return fresh_dir(next(name for name in _numbered(folder) if not name.exists()))


def numbered_folders(folder):
    """Lists the folders that `next_folder` has made, the first one first."""
    return [name for name in _numbered(folder) if name.is_dir()]


def _numbered(folder):
    return [folder] + [folder.with_name(f"{folder.name}-{i}") for i in range(2, 1000)]


def near(name, names):
    """Suggests ': did you mean learning_rate?' for a misspelt name, '' where nothing is near."""
    import difflib  # here: only for messages

    close = difflib.get_close_matches(name, list(names), n=1)
    return f": did you mean {close[0]}?" if close else ""


def _unknown(key, names, where=""):
    is_spelling = key.lower().replace("-", "_") in names
    there = translation(key)
    if there and not is_spelling:  # before what is near by spelling: max_steps is no max_tokens
        return f"unknown key {key!r}{where}: in nanotool, {there} (docs/coming_from_trl.md)"
    hint = near(key, names)
    if not hint:
        hint = ": --help lists the keys"
        if where:  # a file
            hint += ", and a name of your own starts with _"
    return f"unknown key {key!r}{where}{hint}"


def _instead(item):
    """Says what to write for an item that is no --key=value."""
    bare = item.lstrip("-")
    if item.removesuffix("=") == "--config":
        return "--config calc.py"
    if "=" in bare:
        return f"--{bare}"
    if item.endswith(".py"):
        return f"--config {item}"
    return "--key=value or --config file.py"


def as_typed(value):
    """Writes a default as one would type it, for messages: 2e-5, none, true, a,b."""
    if isinstance(value, tuple):
        return ",".join(as_typed(item) for item in value)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true"  # who writes a bare --flag means that
    if isinstance(value, float):
        return repr(value).replace("e-0", "e-").replace("e+", "e")
    if " " in str(value):
        return repr(value)
    return str(value) or "…"


def names_in(name):
    """Lists the names that a config file assigns; none if it cannot be read: `parse` tells that."""
    try:
        tree = ast.parse(_found(name).read_bytes())
    except (OSError, SyntaxError, ValueError, UserError):
        return set()
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return names


def _found(name):
    """Finds a config file: here, or in configs/."""
    path = Path(name)
    if not path.is_file():
        path = HERE / "configs" / name
    if not path.is_file():
        looked = "" if Path(name).is_absolute() else f"; looked for {name} and configs/{name}"
        raise UserError(f"no config file {name!r}{looked}")
    return path


def _run_file(name, kinds):
    """Executes the config file and returns {key: value}, unchecked but for the names."""
    path = _found(name)
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except SyntaxError as error:  # no line: bytes that are no text
        raise UserError(f"{name}, line {error.lineno or 1}: {error.msg}") from None
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from None
    space = {"__name__": "__config__", "__file__": str(path)}
    try:
        exec(compile(tree, str(path), "exec"), space)
    except Exception as error:
        line = error.__traceback__.tb_next.tb_lineno  # the first frame is ours, the next the file's
        raise UserError(f"{name}, line {line}: {type(error).__name__}: {error}") from error

    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.alias):
            imported.add((node.asname or node.name).split(".")[0])
    values = {}
    for key, value in space.items():
        if key in kinds:
            values[key] = value
        elif key in imported:
            continue
        elif isinstance(value, (types.FunctionType, type)):
            raise UserError(f"{key} in {name} is code: a config file holds plain values")
        elif not key.startswith("_"):
            raise UserError(_unknown(key, kinds, f" in {name}"))
    return values


def _fitted(key, kind, value, where, typed):
    """Casts the value to a `kind`, or raises UserError. where: " in calc.py", for messages."""
    try:
        return cast(kind, value, typed)
    except ValueError:
        raise UserError(f"{key} = {value!r}{where}: expected {describe_type(kind)}") from None


def describe_type(kind) -> str:
    """Describes a type as it reads in a message."""
    arms = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, arms))}"
    if typing.get_origin(kind) is tuple:
        return f"a tuple of {arms[0].__name__}"
    if arms:
        return " or ".join(describe_type(arm) for arm in arms)
    if kind is bool:
        return "true or false"
    if kind is types.NoneType:
        return "none"
    return kind.__name__


def cast(kind, value, typed: bool):
    """Casts `value` to a `kind`; typed: it is text of the command line, else a python value.

    Raises ValueError if it does not fit, and AssertionError for a kind that no field may have.
    """
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return _cast_to_literal(typing.get_args(kind), value, typed)
    if origin in (typing.Union, types.UnionType):
        return _cast_to_union(typing.get_args(kind), value, typed)
    if origin is tuple:
        return _cast_to_tuple(kind, value, typed)
    if kind is types.NoneType:
        if value is None or (typed and value.lower() == "none"):
            return None
        raise ValueError
    if kind is bool:
        return _cast_to_bool(value, typed)
    if kind is str:
        if isinstance(value, str):
            return value
        raise ValueError
    if kind in (int, float):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if typed or is_number:
            return _number(kind, value)
        raise ValueError
    raise AssertionError(f"config fields of type {kind} are not supported")


def _cast_to_literal(options, value, typed):
    for option in options:
        if typed and value == str(option):
            return option
        # the type is compared because True == 1
        if not typed and type(value) is type(option) and value == option:
            return option
    raise ValueError


def _cast_to_union(arms, value, typed):
    # None first: for `str | None`, none is not the text "none"
    for arm in sorted(arms, key=lambda arm: arm is not types.NoneType):
        try:
            return cast(arm, value, typed)
        except ValueError:
            pass
    raise ValueError


def _cast_to_tuple(kind, value, typed):
    item_kind, *others = typing.get_args(kind)
    assert others == [...], f"a field of type {kind}: write tuple[{item_kind.__name__}, ...]"
    if typed:
        value = [item.strip() for item in value.split(",")] if value else []
        if "" in value:
            raise ValueError
    if not isinstance(value, (list, tuple)):
        raise ValueError
    return tuple(cast(item_kind, item, typed) for item in value)


def _cast_to_bool(value, typed):
    if isinstance(value, bool):
        return value
    if typed and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError


def _number(kind, value):
    """Reads a number or a text as a finite int or float, or ValueError; 1e3 is a fine int."""
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

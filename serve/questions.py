"""What serve/page.py asks about a config: each function here runs in a process of its own.

They import torch and run what a config names (its file, its tools, its rows), so the page itself
does neither: serve/asking.py starts a process for each question, with a time limit. All take and
return what JSON can say, and raise UserError with the very sentence of the command line.
"""

import ast
import dataclasses
import json
import sys
import tempfile
import typing
from pathlib import Path

import data
import evaluate
import play
import train_grpo
import train_sft
from engines.base import check_engine
from learning import checkpoint
from learning import model as models
from player import load_examples
from run import config, mix, plugins
from run import log as run_log
from run import page as run_page
from run.config import UserError
from serve import runs
from tools import Toolbox

SCRIPTS = {"train_grpo.py": train_grpo, "train_sft.py": train_sft, "evaluate.py": evaluate}
ROWS = 5  # that are looked at
LONG = 4000  # characters of a text that is shown
# keys that the page sets itself, by its buttons
BY_BUTTON = {
    "train_grpo.py": {"resume"},
    "train_sft.py": {"resume"},
    "evaluate.py": {"run", "resume"},
}


def parsed(script: str, argv: list[str]):
    """Reads a command line as the script does: its config, checked."""
    if script == "evaluate.py":
        mine, others = config.split(argv, evaluate.Config.__dataclass_fields__)
        given = config.parse(evaluate.Config, mine, evaluate.check)
        evaluate.load_config(others, given)
        return given
    module = SCRIPTS[script]
    return config.parse(module.Config, argv, module.check)


# ---- the form


def form(script: str, argv: list[str]) -> dict:
    """Lists the fields of a script's Config, with a config file's values, and the tools to tick."""
    module = SCRIPTS[script]
    if script == "evaluate.py":
        argv, _ = config.split(argv, module.Config.__dataclass_fields__)
    cfg = config.parse(module.Config, argv)
    kinds = typing.get_type_hints(module.Config)
    default = module.Config()
    comments = comments_of(script)
    fields = []
    for field in dataclasses.fields(module.Config):
        if field.name in BY_BUTTON[script]:
            continue
        group, comment = comments[field.name]
        fields.append(
            {
                "name": field.name,
                "group": group,
                "help": comment,
                "expected": config.describe_type(kinds[field.name]),
                "choices": choices_of(kinds[field.name]),
                "default": typed(getattr(default, field.name)),
                "value": typed(getattr(cfg, field.name)),
            }
        )
    return {"fields": fields, "tools": our_tools()}


def typed(value) -> str:
    """Writes a value as one types it behind --key=."""
    if isinstance(value, tuple):
        return ",".join(typed(item) for item in value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def choices_of(kind) -> list[str]:
    """Lists the values that a key can have, [] where there is no such list."""
    if kind is bool:
        return ["false", "true"]
    if typing.get_origin(kind) is typing.Literal:
        return [str(choice) for choice in typing.get_args(kind)]
    return []


def comments_of(script: str) -> dict[str, tuple[str, str]]:
    """Reads {key: (the heading that it stands below, its comment)} from the source of the Config,
    which is what --help prints."""
    _, lines, fields = config._read_source(script)
    comments = {}
    heading = ""
    starts = {first: (name, end) for name, first, end in fields}
    name = ""
    for number, line in enumerate(lines):
        if number in starts:
            name, end = starts[number]
            comments[name] = (heading, comment_in(lines[number:end]))
        elif line.startswith("    # "):
            words = line.strip().removeprefix("# ")
            is_heading = words.replace(" ", "").isalpha() and words.islower() and len(words) < 20
            if is_heading:
                heading = words
            elif name:  # the second line of a comment
                comments[name] = (comments[name][0], f"{comments[name][1]} {words}")
    return comments


def comment_in(lines: list[str]) -> str:
    """Finds the comment of a field."""
    for line in lines:
        before, mark, comment = line.partition("  # ")
        if mark:
            return comment.strip()
    return ""


def our_tools() -> list[dict]:
    """Lists the tools of tools/ and the first sentence of what they say of themselves."""
    tools = []
    for file in sorted((config.HERE / "tools").glob("*.py")):
        if file.stem not in plugins.names_in(file):
            continue
        text = ""
        for node in ast.parse(file.read_bytes()).body:
            is_definition = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if is_definition and node.name == file.stem:
                text = told_by(node)
        tools.append({"name": file.stem, "help": text})
    return tools


def told_by(node) -> str:
    """Reads the first paragraph of a docstring: of a class, that of its call."""
    for inner in getattr(node, "body", ()):
        if isinstance(node, ast.ClassDef) and getattr(inner, "name", "") == "__call__":
            return told_by(inner)
    text = ast.get_docstring(node) or ""
    return " ".join(text.split("\n\n")[0].split())


# ---- the checks


def check(script: str, argv: list[str], root: str, is_start: bool = False) -> dict:
    """Checks a command line as the script does before anything slow, and that it writes below
    root. is_start: that the model is there too, which may ask the hub."""
    cfg = parsed(script, argv)
    if script == "evaluate.py":
        return {"folder": cfg.save_to}
    runs.below(Path(root), cfg.out_dir)
    if Path(cfg.out_dir).exists():
        checkpoint.Run(cfg)  # it says whether this run may write there, and writes nothing
    if cfg.resume:
        check_what_is_left(script, cfg)
    if is_start and cfg.model != "tiny":
        models.find(cfg.model)
    if is_start and script == "train_grpo.py":
        check_engine(cfg.engine, cfg.urls)
    return {"folder": cfg.out_dir}


def check_what_is_left(script: str, cfg) -> None:
    """Refuses to go on with a run that has done all of its steps."""
    run = checkpoint.Run(cfg)
    steps = run._steps()
    if script == "train_grpo.py":
        is_done = bool(steps) and steps[-1] >= cfg.steps
        key = "steps"
    else:
        before = config.parse(type(cfg), ["--config", str(run.out_dir / "config.py")])
        has_model = any(run.out_dir.glob("*.safetensors"))
        is_done = has_model and cfg.epochs <= before.epochs and not is_behind(run)
        key = "epochs"
    if is_done:
        value = getattr(cfg, key)
        raise UserError(
            f"the run in '{cfg.out_dir}' has done all of its {key} = {value}: give more, "
            f"--{key}={2 * value}"
        )


def is_behind(run: checkpoint.Run) -> bool:
    """Says whether a model was saved before the newest checkpoint: the run went on since."""
    newest = max(path.stat().st_mtime for path in run.out_dir.glob("*.safetensors"))
    steps = run._steps()
    return bool(steps) and run._path(steps[-1]).stat().st_mtime > newest


# ---- rows, tools, and a rollout


def rows(script: str, argv: list[str]) -> dict:
    """Reads the first rows as the run would see them; of a mix, those of each source."""
    cfg = parsed(script, argv)
    sources = [("", cfg)]
    if cfg.mix:
        sources = [(source.name, source.cfg) for source in mix.sources(cfg)]
    shown = []
    notes: list[str] = []
    for name, of_source in sources:
        with tempfile.TemporaryDirectory() as folder:
            of_source = play.with_local_data(of_source, folder, notes)
            for row in first_rows(script, of_source):
                shown.append(plain_row(row, name))
    return {"rows": shown, "notes": notes}


def first_rows(script: str, cfg) -> list[dict]:
    if script == "train_grpo.py":
        most = min(ROWS, cfg.limit or ROWS)
        return load_examples(cfg, cfg.data, cfg.split, most, cfg.seed)
    most = min(ROWS, cfg.rows or ROWS)
    return data.conversations(cfg.data, most, cfg.seed, cfg.system_prompt)[:ROWS]


def plain_row(row: dict, source: str) -> dict:
    """Picks what is shown of a row: its messages, and its other columns as text."""
    messages = []
    for message in row.get("messages", ()):
        text = message.get("content") or ""
        parts = [] if isinstance(text, str) else text
        if parts:
            text = "".join(part.get("text", "(an image)") for part in parts)
        for call in message.get("tool_calls") or ():
            text += f"\n{json.dumps(call.get('function', call), default=str)}"
        messages.append({"role": message["role"], "text": text.strip()[:LONG]})
    columns = {}
    for name, value in row.items():
        if name not in ("messages", "id", "row", "mask"):
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            columns[name] = text[:LONG]
    return {"source": source, "messages": messages, "columns": columns}


def tools(names: list[str], options: list[str]) -> dict:
    """Says what a run tells its model of these tools: each is loaded, and a server is asked."""
    toolbox = Toolbox(tuple(names), options=tuple(options))
    described = []
    for schema in toolbox.schemas:
        function = schema["function"]
        arguments = function.get("parameters", {}).get("properties", {})
        described.append(
            {
                "name": function["name"],
                "help": str(function.get("description", ""))[:LONG],
                "arguments": {name: json.dumps(kind)[:LONG] for name, kind in arguments.items()},
            }
        )
    return {"tools": described}


def made_up(script: str, argv: list[str]) -> dict:
    """Plays a made-up rollout, of SFT the first row, as run/page.js draws it."""
    cfg = parsed(script, argv)
    rollouts = []
    images = {}
    with tempfile.TemporaryDirectory() as folder:

        def show(trajectory, tokenizer) -> None:
            file = Path(folder) / "rollouts.jsonl"
            run_log.write_rollouts(file, [trajectory], tokenizer)

        if script == "train_grpo.py":
            play.play_made_up(cfg, show)
        else:
            play.show_demonstration(cfg, show)
        rollouts, _ = run_page.shown_rollouts(Path(folder) / "rollouts.jsonl")
        images = run_page.images_of(Path(folder), rollouts)
    return {"rollouts": rollouts, "images": images}


def compare(folders: list[str]) -> dict:
    """Makes the page of report.py about several runs."""
    import report

    return {"html": report.page_of([Path(folder) for folder in folders])}


ALL = {"form": form, "check": check, "rows": rows, "tools": tools, "made_up": made_up}
ALL["compare"] = compare


def answer(name: str, arguments: dict) -> dict:
    """Answers a question, or {"error": the sentence why not}."""
    sys.argv = [arguments.get("script", "serve.page")]  # for messages
    try:
        return ALL[name](**arguments)
    except UserError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": config.disk_problem(error)}
    except SystemExit as error:  # a config file or a tool that ends the program
        return {"error": f"it ends the program (exit code {error.code})"}
    except Exception as error:  # of a tool's or a config's own code
        return {"error": f"{type(error).__name__}: {error}"}

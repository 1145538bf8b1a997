"""Questions of the Berkeley Function-Calling Leaderboard, for --data=bfcl:CATEGORY,CATEGORY.

    --data=bfcl:simple_python,multiple              # from the hub
    --data='bfcl:non_live?folder=my/bfcl'           # its files, or those of the package bfcl-eval

A row is a question, the functions of its own that it brings along (`tools`), and which calls are
right (`ground_truth`, for the reward call_match); `category` says where it is from. All are one
turn, whose calls nobody runs. Of the other categories the calls are run, by programs that are part
of the benchmark: those are not here. The types of the leaderboard become JSON Schema's, and a dot
in a name becomes _, as there for most models.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from run.config import UserError, near
from run.plugins import parse_source

PREFIX = "bfcl:"  # begins the name of such data
REPOSITORY = "gorilla-llm/Berkeley-Function-Calling-Leaderboard"
NON_LIVE = ("simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance")
LIVE = (
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
    "live_irrelevance",
    "live_relevance",
)
GROUPS = {"non_live": NON_LIVE, "live": LIVE, "single_turn": (*NON_LIVE, *LIVE)}
OLD_NAMES = {"simple_python": "simple"}  # in versions before 4
ANSWERS = "possible_answer"  # the folder of the right calls, beside the questions
# What else there is, and why it is not here.
RUN_CALLS = ("multi_turn", "memory", "web_search", "exec_", "rest", "format_sensitivity")
OTHER_LANGUAGES = ("simple_java", "simple_javascript", "java", "javascript")
TYPES = {"dict": "object", "float": "number", "tuple": "array"}  # of the leaderboard -> JSON
NO_TYPES = ("any", "")  # which say nothing


def questions(source: str) -> Iterator[dict]:
    """Reads the questions of the categories of `source`, in their order: prompt, tools,
    ground_truth, answer (the same as text), category, bfcl_id. UserError for a category that there
    is not, or that cannot be honoured, and where the files are not to be had."""
    names, folder = read_source(source)
    place = Path(folder).expanduser() if folder else from_hub(names)
    files = [(name, file_of(name, place), answers_of(name, place)) for name in names]
    for name, file, answers in files:
        right = {row["id"]: row["ground_truth"] for row in read(answers)} if answers else {}
        for row in read(file):
            if answers and row["id"] not in right:
                raise UserError(f"{file}: there is no answer to {row['id']!r} in {answers}")
            yield row_of(row, name, right.get(row["id"]))


def is_here(source: str) -> bool:
    """Says whether its files are on this machine, so that nothing is downloaded."""
    _, folder = read_source(source)
    return bool(folder) and Path(folder).expanduser().is_dir()


def read_source(source: str) -> tuple[list[str], str]:
    """Reads "simple_python,live?folder=my/bfcl" -> names of categories, the folder, "" for the hub.
    UserError."""
    text, options = parse_source(source)
    for option in options:
        if option != "folder":
            raise UserError(f"{PREFIX}{source} has no option {option!r}: there is folder")
    names = []
    for name in text.split(","):
        for category in GROUPS.get(name.strip(), (name.strip(),)):
            check_category(category)
            if category in names:
                raise UserError(f"{PREFIX}{source} names {category} twice: drop it")
            names.append(category)
    return names, str(options.get("folder", ""))


def check_category(name: str) -> None:
    """Raises UserError for what is no category, or none that can be honoured."""
    if name in GROUPS["single_turn"]:
        return
    why = ""
    if name.startswith(RUN_CALLS):
        why = "its calls are run, turn by turn, by programs of the benchmark, which are not here"
    elif name in OTHER_LANGUAGES:
        why = "its values are texts in the syntax of that language, which are not read here"
    if why:
        raise UserError(f"{PREFIX}{name} cannot be played: {why}; take bfcl-eval for it")
    known = (*GROUPS, *GROUPS["single_turn"])
    hint = near(name, known) or f": there are {', '.join(known)}"
    raise UserError(f"{PREFIX} has no category {name!r}{hint}")


# ---- files


def from_hub(names: list[str]) -> Path:
    """Downloads the files of these categories, unless that was done before; returns their folder.
    UserError."""
    import huggingface_hub

    patterns = []
    for name in names:
        for written in names_of(name):
            patterns += [f"BFCL_v*_{written}.json", f"{ANSWERS}/BFCL_v*_{written}.json"]
    try:
        folder = huggingface_hub.snapshot_download(
            REPOSITORY, repo_type="dataset", allow_patterns=patterns, etag_timeout=10
        )
    except Exception as error:  # of whichever HTTP client the hub's library uses
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"cannot load {REPOSITORY!r} from the hub ({why}): check the network, or give a folder "
            f"with its files, {PREFIX}{','.join(names)}?folder=…"
        ) from None
    return Path(folder)


def names_of(category: str) -> list[str]:
    """Lists how a category is called in the names of files, today's first."""
    old = OLD_NAMES.get(category)
    return [category, old] if old else [category]


def file_of(category: str, folder: Path) -> Path:
    """Finds the questions of a category: CATEGORY.jsonl, or BFCL_v4_CATEGORY.json, of the newest
    version. UserError if there are none."""
    for written in names_of(category):
        form = re.compile(rf"(?:BFCL_v(\d+)_)?{written}\.jsonl?")
        found = [(form.fullmatch(path.name), path) for path in folder.glob("*.json*")]
        versions = [(int(match[1] or 0), path) for match, path in found if match]
        if versions:
            return max(versions)[1]
    raise UserError(f"{PREFIX}{category}: no {category}.jsonl or BFCL_v4_{category}.json: {folder}")


def answers_of(category: str, folder: Path) -> Path | None:
    """Finds the right calls of a category; None where it has none, as what is asked is whether
    there is a call. UserError if they are not there."""
    if category.endswith("relevance"):  # and irrelevance
        return None
    place = folder / ANSWERS
    if not place.is_dir():
        raise UserError(f"{PREFIX}{category}: no folder {place}, which has the right calls")
    return file_of(category, place)


def read(file: Path) -> Iterator[dict]:
    """Reads a file of one JSON object a line. UserError."""
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}:{number}: broken JSON: {error}") from None
            if not isinstance(row, dict) or not isinstance(row.get("id"), str):
                raise UserError(f"{file}:{number}: expected an object with an id")
            yield row


# ---- rows


def row_of(row: dict, category: str, right: list[dict] | None) -> dict:
    """Makes a row of one of the leaderboard. right: the calls that are; None where that is to call
    nothing, or anything. UserError for a row that is of another kind."""
    turns = row.get("question")
    functions = row.get("function")
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(functions, list):
        raise UserError(f"{PREFIX}{category}: {row['id']}: expected one question and functions")
    if category.endswith("irrelevance"):
        ground_truth = []
    elif right is None:
        ground_truth = "any"
    else:
        ground_truth = []
        for call in right:
            ground_truth.append({plain_name(name): given for name, given in call.items()})
    return {
        "prompt": turns[0],
        "tools": [tool_of(function) for function in functions],
        "ground_truth": ground_truth,
        "answer": ground_truth if ground_truth == "any" else json.dumps(ground_truth),
        "category": category,
        "bfcl_id": row["id"],
    }


def plain_name(name: str) -> str:
    """Writes the name of a function as templates and APIs take it."""
    return name.replace(".", "_")


def tool_of(function: dict) -> dict:
    """Writes a function as a tool, with JSON Schema."""
    described = {
        "name": plain_name(function["name"]),
        "description": function.get("description", ""),
        "parameters": schema_of(function["parameters"]),
    }
    return {"type": "function", "function": described}


def schema_of(given: dict) -> dict:
    """Writes a schema of the leaderboard as JSON Schema. `optional` is what `required` says."""
    schema = {}
    for key, value in given.items():
        if key == "optional" or (key == "type" and value in NO_TYPES):
            continue
        schema[key] = value
    if "type" in schema:
        schema["type"] = TYPES.get(schema["type"], schema["type"])
    if "properties" in schema:
        schema["properties"] = {
            name: schema_of(inner) for name, inner in schema["properties"].items()
        }
    if "items" in schema:
        schema["items"] = schema_of(schema["items"])
    are_texts = all(isinstance(value, str) for value in schema.get("enum", ()))
    if schema.get("type") == "array" and "enum" in schema:
        # there they are those of the items
        schema["items"] = schema.get("items", {}) | {"enum": schema.pop("enum")}
    elif schema.get("type") in ("boolean", "integer") and are_texts and "enum" in schema:
        # "True" for true: no value has both, and it is the type that counts there
        words = ", ".join(schema.pop("enum"))
        schema["description"] = f"{schema.get('description', '')} One of {words}.".lstrip()
    return schema

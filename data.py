"""Rows of a data set, as the examples that prompts and rewards are made of.

    import data
    examples = data.load("openai/gsm8k:main", prompt_column="question", answer_after="####")
    examples[0]  # {"id": 0, "messages": [{"role": "user", ...}], "answer": "72", "question": ...}

`data` is a .jsonl, .json or .parquet file (rows in file order; a file has no splits), a folder or a
Hugging Face hub id, with the name of its configuration after a colon, or task:calc, a generated
task: tasks/calc.py, whose rows(split, seed=0) returns dicts with prompt and answer.
"""

import importlib
import itertools
import json
import re
from pathlib import Path

from config import UserError, near

TASKS = Path(__file__).resolve().parent / "tasks"


def load(
    data,
    split="train",
    prompt_column="prompt",
    answer_column="answer",
    answer_after="",
    system_prompt="",
    prompt_template="{prompt}",
    limit=None,
    seed=0,
    require_answer=True,
):
    """A list of examples: {"id": index, "messages": [...], "answer": str or list[str]} and the
    row's other columns; those called id, messages or answer give way to these.

    The prompt column holds text, which becomes one user message by prompt_template, or a list of
    chat messages, taken as they are. system_prompt goes in front unless the messages have one.
    In the template {prompt} is the prompt column and {name} any other; all other braces, also
    those in the data, stay as they are. The answer is text, a number, or a list of accepted ones.
    answer_after="####": only what follows its last occurrence, without commas, is the answer.
    limit: the first n rows. seed: of a generated task. require_answer=False: a row that has no
    answer gets "". Raises UserError, with the row's number (from 1), where a row does not fit.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit = {limit}: expected at least 1, or none for all rows")
    examples = []
    for index, row in enumerate(itertools.islice(_rows(data, split, seed), limit)):
        try:
            prompt = _column(row, prompt_column, "prompt_column")
            if isinstance(prompt, list):
                messages = _chat(prompt, prompt_column, prompt_template)
            else:
                text = _fill(prompt_template, row, prompt_column, answer_column)
                messages = [{"role": "user", "content": text}]
            if system_prompt and not any(m["role"] == "system" for m in messages):
                messages.insert(0, {"role": "system", "content": system_prompt})
            if require_answer or row.get(answer_column) not in (None, "", []):
                value = _column(row, answer_column, "answer_column")
                answer = _answer(value, answer_column, answer_after)
            else:
                answer = ""
        except UserError as error:
            raise UserError(f"{data}, row {index + 1}: {error}") from None
        examples.append({**row, "id": index, "messages": messages, "answer": answer})
    if not examples:
        raise UserError(f"{data} has no rows")
    return examples


def conversations(data, rows=None, seed=0, system_prompt="") -> list[list[dict]]:
    """Demonstrations in OpenAI chat form for SFT: `rows` of a task's (default 8192), or the first
    `rows` of a file's or hub data set's `messages` column. system_prompt as in `load`."""
    if data.startswith("task:"):
        found = _task(data.removeprefix("task:")).demos(rows or 8192, seed)
    else:
        found = []
        for number, row in enumerate(itertools.islice(_rows(data, "train", seed), rows), 1):
            if "messages" not in row:
                there = f"no column 'messages', there are {', '.join(row)}"
                raise UserError(f"{data}, row {number}: {there}: SFT takes whole conversations")
            if not isinstance(row["messages"], list):
                raise UserError(f"{data}, row {number}: 'messages' is not a list of chat messages")
            found.append(_chat(row["messages"], "messages", "{prompt}"))
        if not found:
            raise UserError(f"{data} has no rows")
    for number, messages in enumerate(found, 1):
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError(f"{data}, row {number}: no assistant message, so nothing to learn")
    if not system_prompt:
        return found
    system = {"role": "system", "content": system_prompt}
    return [m if any(x["role"] == "system" for x in m) else [system, *m] for m in found]


def is_file(data) -> bool:
    """Whether `data` names a file, which has no splits, and not a task, hub data set or folder."""
    return not data.startswith("task:") and (
        Path(data).suffix in (".json", ".jsonl", ".parquet") or Path(data).expanduser().is_file()
    )


def _rows(data, split, seed):
    """An iterator over the rows, as dicts: what comes after `limit` is not read."""
    path = Path(data).expanduser()
    if data.startswith("task:"):
        return iter(_task(data.removeprefix("task:")).rows(split, seed=seed))
    if path.is_dir():
        return _hub_rows(str(path), None, split)
    if path.suffix in (".json", ".jsonl", ".parquet") or path.exists() or data[:1] in "./~":
        if not path.is_file():
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UserError(f"no file {data!r}{near(path.name, siblings)}")
        if path.suffix not in (".json", ".jsonl", ".parquet"):
            raise UserError(f"cannot read {data!r}: expected a .jsonl, .json or .parquet file")
        return _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
    name, _, config = data.partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(
            f"data = {data!r}: expected a .jsonl, .json or .parquet file, a task "
            f"({', '.join('task:' + name for name in _tasks())}) or a hub id such as openai/gsm8k"
        )
    return _hub_rows(name, config or None, split)


def _json_rows(path):
    """Objects, one per line (blank lines are skipped), or one array of them in a .json file."""
    with open(path, "rb") as file:
        if path.suffix == ".json" and file.read(4096).lstrip()[:1] == b"[":
            file.seek(0)
            lines = [(1, file.read())]  # an array: its rows are counted instead of lines
        else:
            file.seek(0)
            lines = enumerate(file, 1)
        for number, line in lines:
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:  # also bytes that are not UTF-8
                if isinstance(error, json.JSONDecodeError):
                    number += error.lineno - 1
                raise UserError(f"{path}:{number}: broken JSON: {error}") from None
            rows = value if isinstance(value, list) and path.suffix == ".json" else [value]
            for row in rows:
                if not isinstance(row, dict):
                    kind = type(row).__name__
                    raise UserError(f"{path}:{number}: expected an object {{…}}, got a {kind}")
                yield row


def _parquet_rows(path):
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"cannot read {str(path)!r} as parquet: {_flat(error)}") from None


def _hub_rows(name, config, split):
    """The rows of a hub data set, or of a folder."""
    import datasets
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    if not constants.HF_HUB_OFFLINE and not Path(name).is_dir():
        # One request first: without network, `load_dataset` itself retries for up to a minute.
        try:
            HfApi().dataset_info(name, timeout=10)
        except RepositoryNotFoundError:
            raise UserError(
                f"no data set {name!r} on the hub: check its name, or `hf auth login` if private"
            ) from None
        except Exception as error:  # of whichever HTTP client the hub's library uses
            raise UserError(
                f"cannot reach the hub for {name!r} ({_flat(error)}): check the network, or set "
                "HF_HUB_OFFLINE=1 if it was downloaded before"
            ) from None
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # a wrong split, configuration, format: it says what there is
        raise UserError(f"cannot load {name!r}: {_flat(error)}") from error
    yield from rows


def _tasks():
    return sorted(path.stem for path in TASKS.glob("*.py") if not path.stem.startswith("_"))


def _task(name):
    if name not in _tasks():
        raise UserError(f"no task {name!r}; there are {', '.join(_tasks())}")
    return importlib.import_module(f"tasks.{name}")


def _column(row, name, key):
    if name not in row:
        raise UserError(f"no column {name!r}, there are {', '.join(row)}: choose with --{key}=…")
    if row[name] is None or row[name] == "" or row[name] == []:
        raise UserError(f"its {name!r} is empty")
    return row[name]


def _chat(messages, column, template):
    """A column of chat messages, copied."""
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{column!r} is a list, but not of messages with a role and content")
    if template != "{prompt}":
        raise UserError(f"prompt_template has no effect: {column!r} holds chat messages")
    # Parquet gives every message the keys of all messages, with None where one has no such key.
    return [{k: v for k, v in m.items() if v is not None or k == "content"} for m in messages]


def _fill(template, row, prompt_column, answer_column):
    """The template with its {column}s replaced, once: braces in the data are just text."""

    def value(match):
        name = match[1]
        if name == answer_column:  # \boxed{answer} in an instruction would tell the answer
            raise UserError(f"prompt_template would show the answer: it names {{{name}}}")
        return str(_column(row, prompt_column if name == "prompt" else name, "prompt_template"))

    text, count = re.subn(r"\{(\w+)\}", value, template)
    if not count:
        raise UserError(f"prompt_template = {template!r} names no column: write {{prompt}}")
    return text


def _answer(value, column, after):
    """The answer of a row: text, or a list of accepted texts."""
    if isinstance(value, list):
        return [_answer(item, column, after) for item in value]
    if isinstance(value, dict):
        raise UserError(f"{column!r} is an object: expected text, a number or a list of them")
    text = str(value)
    if after:
        _, marker, text = text.rpartition(after)
        if not marker:
            raise UserError(f"no {after!r} in its {column!r}: check answer_after")
        text = text.replace(",", "")
    if not text.strip() or value != value:  # NaN: how a data frame writes a missing value
        raise UserError(f"its {column!r} is empty")
    return text.strip()


def _flat(error):
    """An exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__

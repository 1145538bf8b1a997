"""Rows of a data set, as the examples that prompts and rewards are made of.

    import data
    examples = data.load("openai/gsm8k:main", prompt_column="question", answer_after="####")
    examples[0]  # {"id": 0, "messages": [{"role": "user", ...}], "answer": "72", "question": ...}

`data` is a .jsonl, .json or .parquet file (rows in file order; a file has no splits), a folder or a
Hugging Face hub id, with the name of its configuration after a colon, or task:calc, a generated
task: tasks/calc.py, whose rows(split, seed=0) returns dicts with prompt and answer; or
gym:leg_counting, a data set of the package reasoning_gym: tasks/gym.py; or verifiers:my-env, an
environment of the package verifiers: tools/calling/verifiers.py; or bfcl:simple_python, questions
of the Berkeley Function-Calling Leaderboard: tasks/bfcl.py.
"""

import ast
import importlib
import itertools
import json
import re
from collections.abc import Container
from pathlib import Path

from formats.base import THINK
from formats.messages import NOT_SEEN, calls_of, has_images, read_messages, take_images
from run.config import UserError, near
from tasks import bfcl, gym
from tools import sql
from tools.calling import verifiers
from tools.calling.functions import read_function

TASKS = Path(__file__).resolve().parent / "tasks"
SUFFIXES = (".json", ".jsonl", ".parquet")
UNSEEN = ("video", "videos", "audio", "audios")  # columns of what no model here is shown
# Who says a turn in a `conversations` column, and our name for it.
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
# Messages of their own for what our form has as tool_calls: LLaMA-Factory's, ms-swift's.
CALL_ROLES = ("function_call", "tool_call")
RESULT_ROLES = ("observation", "tool_response")
FILLED_TAGS = ("<ref-object>", "<bbox>")  # of ms-swift, from a column `objects`
NAME = re.compile(r"[\w-]+")  # of a tool
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON can spell it, UTF-8 cannot

# ---- examples: what prompts and rewards are made of


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
    database="",
):
    """Reads a list of examples: {"id": index, "messages": [...], "answer": str or list[str]} and
    the row's other columns; those called id, messages or answer give way to these. A row may name
    its `tools` and its `reward`: then these, as lists, are the only ones of the run that it has.
    Among its tools may be JSON schemas, of functions of its own (tools/calling/functions.py).

    The prompt column holds text, which becomes one user message by prompt_template, or a list of
    chat messages, read by formats/messages.py. system_prompt goes in front unless the messages have
    one.
    In the template {prompt} is the prompt column and {name} any other; all other braces, also
    those in the data, stay as they are. The answer is text, a number, or a list of accepted ones.
    Images are content parts (a path beside the file, a data URI, PIL), or in the columns image or
    images: then the example has `images`, what says where each is, in order, and `image_folder`.
    answer_after="####": only what follows its last occurrence, without commas, is the answer.
    limit: the first n rows. seed: of a generated task. require_answer=False: a row that has no
    answer gets "". database: the SQLite file of a row, as a template: then row["database"] is its
    path, and {schema} in prompt_template describes it.
    Raises UserError, with the row's number (from 1), where a row does not fit.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit = {limit}: expected at least 1, or none for all rows")
    rows = itertools.islice(_read_rows(data, split, seed, limit), limit)
    filled_in = _is_filled_in(data)
    folder = image_folder(data)
    examples = []
    for index, row in enumerate(rows):
        try:
            _refuse_unseen(row)
            if filled_in and isinstance(row.get("tools"), list):
                row = row | {"tools": _without_none(row["tools"])}
            row = row | _names_in_row(row)
            if database:
                row = row | _database(row, database, prompt_template)
            if filled_in and isinstance(row.get(prompt_column), list):
                row = row | {prompt_column: _without_none(row[prompt_column])}
            messages = _prompt(row, prompt_column, prompt_template, answer_column)
            row, messages = _with_images(row, messages, folder)
            if system_prompt and not _has_system_message(messages):
                messages = [{"role": "system", "content": system_prompt}, *messages]
            answer = ""
            if require_answer or row.get(answer_column) not in (None, "", []):
                value = _column(row, answer_column, "answer_column")
                answer = _answer(value, answer_column, answer_after)
        except UserError as error:
            raise UserError(f"{data}, row {index + 1}: {error}") from None
        examples.append({**row, "id": index, "messages": messages, "answer": answer})
    if not examples:
        raise UserError(f"{data} has no rows")
    return examples


def is_file(data) -> bool:
    """Says whether `data` names a file, or a benchmark, which has no splits, and not a task, hub
    data set or folder."""
    if is_made_up(data):
        return False
    if data.startswith(bfcl.PREFIX):
        return True
    return Path(data).suffix in SUFFIXES or Path(data).expanduser().is_file()


def is_made_up(data) -> bool:
    """Says whether `data` names rows that are made when they are read: others for another seed."""
    return data.startswith(("task:", gym.PREFIX))


def oracle(data, example) -> list[dict] | None:
    """Returns the assistant messages that solve an example of a task, "task:calc"; None if it has
    none."""
    solve = getattr(_task(data.removeprefix("task:")), "oracle", None)
    return solve(example) if solve else None


def _column(row, name, key):
    """Reads a row's column; UserError if there is none. key: the config's, for messages."""
    if name not in row:
        raise UserError(f"no column {name!r}, there are {', '.join(row)}: choose with --{key}=…")
    if row[name] is None or row[name] == "" or row[name] == []:
        raise UserError(f"its {name!r} is empty")
    return row[name]


def _prompt(row, column, template, answer_column):
    """Reads the prompt column as messages: its own, or one that the template makes of its text."""
    prompt = _column(row, column, "prompt_column")
    if not isinstance(prompt, list):
        if isinstance(prompt, dict) or _is_json_of_messages(prompt):
            form = 'a list of {"role": …, "content": …}'
            raise UserError(f"its {column!r} is {prompt!r:.80}: expected text, or {form}")
        text = _fill(template, row, column, answer_column)
        return [{"role": "user", "content": text}]
    if template != "{prompt}" and all(isinstance(message, dict) for message in prompt):
        raise UserError(f"prompt_template has no effect: {column!r} holds chat messages")
    return read_messages(prompt, column, is_prompt=True)


def _is_json_of_messages(text):
    """Says whether a text is the JSON of chat messages: the model would read all its quotes."""
    if not isinstance(text, str) or not re.match(r"\s*\[\s*\{", text):
        return False
    try:
        values = json.loads(text)
    except ValueError:
        return False
    return all(isinstance(value, dict) and "role" in value for value in values)


def _fill(template, row, prompt_column, answer_column):
    """Replaces the {column}s of the template, once: braces in the data are just text."""

    def value(match):
        name = match[1]
        if name == answer_column:  # \boxed{answer} in an instruction would tell the answer
            raise UserError(f"prompt_template would show the answer: it names {{{name}}}")
        column = prompt_column if name == "prompt" else name
        return str(_column(row, column, "prompt_template"))

    text, count = re.subn(r"\{(\w+)\}", value, template)
    if not count:
        raise UserError(f"prompt_template = {template!r} names no column: write {{prompt}}")
    return text


def _answer(value, column, after):
    """Reads the answer of a row: text, or a list of accepted texts."""
    if isinstance(value, list):
        # parquet and data frames fill lists with null and NaN
        items = [item for item in value if item is not None and item == item]
        if not items:
            raise UserError(f"its {column!r} is empty")
        return [_answer(item, column, after) for item in items]
    if isinstance(value, dict):
        raise UserError(f"{column!r} is an object: expected text, a number or a list of them")
    text = str(value)
    if after:
        _, marker, text = text.rpartition(after)
        if not marker:
            raise UserError(f"no {after!r} in its {column!r}: check answer_after")
        text = text.replace(",", "")
    is_missing = value != value  # NaN: how a data frame writes a missing value
    if is_missing or not text.strip():
        raise UserError(f"its {column!r} is empty")
    return text.strip()


def _database(row, template, prompt_template):
    """Reads what a row's SQLite file adds: database, its path, and schema, if the prompt has it."""
    is_whole_path = re.fullmatch(r"\{\w+\}", template) is not None

    def value(match):
        text = str(_column(row, match[1], "database"))
        leaves = text.startswith("/") or ".." in text.split("/") or "\0" in text
        if leaves and not is_whole_path:
            why = f"would leave the folder that database = {template!r} names"
            raise UserError(f"its {match[1]!r} is {text!r}, which {why}: write a name without ..")
        return text

    path = re.sub(r"\{(\w+)\}", value, template)
    if not Path(path).is_file():
        raise UserError(f"its database {path!r} is no file: check database = {template!r}")
    if "{schema}" not in prompt_template:
        return {"database": path}
    # what the model reads of a database is the tool's affair
    return {"database": path, "schema": sql.describe(path)}


# ---- demonstrations: what SFT trains on


def conversations(data, rows=None, seed=0, system_prompt="", recorded=True) -> list[dict]:
    """Reads what SFT trains on: `rows` demonstrations of a task (default 8192), or the first `rows`
    rows of a file or hub data set, each in one of two forms. "row" is its number, from 1.

    {"row", "messages", "tools"}: a conversation in OpenAI chat form. Contents are text, arguments
    objects, results in the order of their calls; tools is a list of JSON schemas, or of names of
    tools of the run, or None.
    {"row", "ids", "mask"}: a trajectory as in rollouts.jsonl, to be used as it is: its messages
    are left out. Both keep the columns `reward` and `text`, and have `images` and `image_folder` if
    there are images, as in `load`; those of a trajectory are as they were shown.

    system_prompt as in `load`. recorded=False: the messages of a trajectory, for a model with
    another tokenizer than the one that played it. Raises UserError, with the row's number, where a
    row does not fit.
    """
    if data.startswith("task:"):
        demos = _task(data.removeprefix("task:")).demos(rows or 8192, seed)
        source = ({"messages": messages} for messages in demos)
    else:
        source = itertools.islice(_read_rows(data, "train", seed, rows), rows)
    filled_in = _is_filled_in(data)
    folder = image_folder(data)
    demonstrations = []
    has_ids = False
    for number, row in enumerate(source, 1):
        try:
            _refuse_unseen(row)
            # an endpoint's rollouts (evaluate.py) have no ids: they are conversations
            is_recorded = bool(row.get("ids")) and row.get("mask") is not None
            has_ids = has_ids or is_recorded
            if is_recorded and recorded:
                demonstration = _recorded(row, folder)
            else:
                demonstration = _conversation(row, filled_in, folder)
        except UserError as error:
            raise UserError(f"{data}, row {number}: {error}") from None
        for name in ("reward", "text"):
            if name in row:
                demonstration[name] = row[name]
        demonstrations.append({"row": number, **demonstration})
    if not demonstrations:
        raise UserError(f"{data} has no rows")
    if not recorded and not has_ids:
        raise UserError(f"recorded=false has no effect: no row of {data} has ids, so drop it")
    if system_prompt:
        _add_system_prompt(demonstrations, system_prompt, data)
    return demonstrations


def _add_system_prompt(demonstrations, system_prompt, name):
    """Puts it in front of the conversations that have none; UserError if that is none of them."""
    conversations = [row["messages"] for row in demonstrations if "messages" in row]
    without = [messages for messages in conversations if not _has_system_message(messages)]
    if not without:
        why = "every row has a system message, or is recorded with its prompt"
        raise UserError(f"system_prompt has no effect on {name}: {why}")
    for messages in without:
        messages.insert(0, {"role": "system", "content": system_prompt})


def rewarded(rows, min_reward, name) -> list[dict]:
    """Returns those of `conversations` whose reward is at least min_reward (None: all of them). A
    reward of None, not to be learnt from, is below. name: the data set's, for messages."""
    if min_reward is None:
        return rows
    for row in rows:
        if "reward" not in row:
            problem = "it has no reward"
        elif not isinstance(row["reward"], int | float | None):
            problem = f"its reward is {row['reward']!r}"
        else:
            continue
        where = f"{name}, row {row['row']}: min_reward has no effect, {problem}"
        raise UserError(f"{where}: give it a number, or drop min_reward")
    scored = [row for row in rows if row["reward"] is not None]
    reached = [row for row in scored if row["reward"] >= min_reward]
    if not reached:
        raise UserError(f"min_reward = {min_reward}: no row of {name} reaches it: lower it")
    return reached


def check_calls(
    messages, shown, remedy="name it in --tools=…, or give the row a `tools` column"
) -> None:
    """Refuses a conversation that calls a tool which is not among those shown in its prompt. Where
    none is, the template is not proved for calls and results: then it may have neither."""
    called = [call.name for message in messages for call in calls_of(message)]
    unknown = [name for name in called if name not in shown]
    if not shown and any(message["role"] == "tool" for message in messages):
        unknown.append("a tool")
    if unknown:
        there = ", ".join(shown) or "none"
        raise UserError(f"it calls {unknown[0]}, the tools of its prompt are {there}: {remedy}")


def check_answers(messages) -> None:
    """Refuses a conversation in which the assistant says nothing: a model would learn to stop at
    once. Rows that are left out by their reward may have such turns."""
    for place, message in enumerate(messages, 1):
        if message["role"] != "assistant" or message.get("tool_calls"):
            continue
        answer = THINK.sub("", message["content"])
        if not answer.strip():
            raise UserError(
                f"message {place}, of the assistant, says nothing and calls nothing, so that the "
                "model would learn to stop at once: leave the row out"
            )


def check_ids(row, tokenizer) -> None:
    """Refuses a trajectory that was recorded with another tokenizer."""
    if max(row["ids"], default=0) >= len(tokenizer):
        what = f"none above {len(tokenizer) - 1}"
    elif row.get("text") and row["text"] != _decoded(row["ids"], tokenizer):
        what = "other text than the row's"
    else:
        return
    remedy = (
        "give the model that recorded it, or one with its tokenizer; or learn its messages, with "
        "--recorded=false"
    )
    raise UserError(f"to the model's tokenizer its ids are {what}: {remedy}")


def _decoded(ids, tokenizer):
    return tokenizer.decode(ids, skip_special_tokens=False)


def _recorded(row, folder):
    """Reads the ids and the mask of a recorded trajectory, and its images."""
    ids = row["ids"]
    mask = row["mask"]
    if not isinstance(ids, list) or not isinstance(mask, list) or len(ids) != len(mask):
        raise UserError("its 'ids' and 'mask' are not two lists of one length")
    for value in ids:
        if type(value) is not int or value not in range(2**31):
            raise UserError(f"its 'ids' holds {value!r}: expected token ids")
    for value in mask:
        if type(value) is not int or value not in (0, 1):
            raise UserError(f"its 'mask' holds {value!r}: expected 0 or 1")
    if mask[:1] == [1]:
        raise UserError("its 'mask' begins with 1, but nothing stands before the first token")
    sources = _image_column(row)
    _check_sources(sources, folder)
    images = {"images": sources, "image_folder": folder} if sources else {}
    return {"ids": ids, "mask": mask, **images}


def _conversation(row, filled_in, folder):
    """Reads the messages and the tools of a demonstration, in one form whatever the source wrote.
    filled_in: its objects have keys whose value None only says that there is no such key."""
    if "messages" not in row and isinstance(row.get("conversations"), list):
        row = row | {"messages": _of_speakers(row["conversations"])}
    if "messages" not in row:
        there = f"no column 'messages', there are {', '.join(row)}"
        raise UserError(f"{there}: SFT takes whole conversations, or trajectories (ids and mask)")
    if not isinstance(row["messages"], list):
        raise UserError("'messages' is not a list of chat messages")
    messages = row["messages"]
    tools = row.get("tools")
    if filled_in:
        messages = _without_none(messages)
        tools = _without_none(tools)
    messages = _with_calls(_with_system(messages, row.get("system")))
    messages = read_messages(messages, "messages", is_prompt=False)
    if row.get("objects"):
        _refuse_filled_tags(messages)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise UserError("no assistant message, so nothing to learn")
    if roles[0] == "assistant":
        raise UserError("it begins with an assistant message: there has to be a prompt before it")
    row, messages = _with_images(row, messages, folder)
    images = {}
    if has_images(messages):
        images = {"images": row["images"], "image_folder": row["image_folder"]}
    return {"messages": messages, "tools": _schemas(tools), **images}


def _of_speakers(turns):
    """Reads a `conversations` column, {"from", "value"}, as LLaMA-Factory does, as messages."""
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise UserError(f"'conversations' holds {turn!r:.80}: expected from and value")
        speaker = turn["from"]
        if speaker in SPEAKERS:
            role = SPEAKERS[speaker]
        elif speaker in (*CALL_ROLES, *RESULT_ROLES):
            role = speaker
        else:
            known = ", ".join((*SPEAKERS, *CALL_ROLES, *RESULT_ROLES))
            raise UserError(f"'conversations' has one from {speaker!r}: expected {known}")
        messages.append({"role": role, "content": turn["value"]})
    return messages


def _with_system(messages, system):
    """Puts the text of a column `system` in front. UserError if the messages have another one."""
    if not isinstance(system, str) or not system:
        return messages
    first = messages[0] if messages else None
    if isinstance(first, dict) and first.get("role") == "system":
        if first.get("content") != system:
            raise UserError("its column 'system' is another text than its system message: drop one")
        return messages
    return [{"role": "system", "content": system}, *messages]


def _with_calls(messages):
    """Writes in OpenAI's form messages in which calls are messages of their own, and results have
    another role; all others stay as they are.

    What the assistant says in front of a call, and several calls, are one message.
    """
    roles = [message.get("role") for message in messages if isinstance(message, dict)]
    if not any(role in CALL_ROLES for role in roles):
        return messages
    joined = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role in CALL_ROLES:
            thinking, calls = _calls_in(message.get("content"))
            is_open = bool(joined) and joined[-1].get("role") == "assistant"
            if not is_open:
                joined.append({"role": "assistant", "content": ""})
            turn = dict(joined[-1])
            turn["content"] = (turn.get("content") or "") + thinking
            turn["tool_calls"] = [*turn.get("tool_calls", ()), *calls]
            joined[-1] = turn
        elif role in RESULT_ROLES:
            joined.append(message | {"role": "tool"})
        else:
            joined.append(message)
    return joined


def _calls_in(content):
    """Reads the JSON of a call, or a list of them: (the thinking in front of them, the calls)."""
    text = content if isinstance(content, str) else json.dumps(content)
    thinking = THINK.match(text)
    head = thinking[0] if thinking else ""
    try:
        calls = json.loads(text.removeprefix(head))
    except ValueError as error:
        raise UserError(f"its call {text!r:.80} is broken JSON: {error}") from None
    calls = calls if isinstance(calls, list) else [calls]
    return head, [{"function": call} for call in calls]


def _refuse_filled_tags(messages):
    """Refuses texts with places that ms-swift would fill from the column `objects`."""
    for message in messages:
        content = message["content"]
        parts = content if isinstance(content, list) else [{"text": content}]
        text = "".join(part.get("text", "") for part in parts)
        for tag in FILLED_TAGS:
            if tag in text:
                raise UserError(
                    f"its text has {tag}, which ms-swift fills from the column 'objects': write "
                    "names and numbers into the text"
                )


def _schemas(tools):
    """Reads a row's tools: a list of JSON schemas, or of names of tools of the run, or its JSON
    text; None where it has none."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise UserError(f"its 'tools' is broken JSON: {error}") from None
    if tools is None:
        return None
    schemas = []
    for tool in tools if isinstance(tools, list) else [None]:
        if isinstance(tool, str) and NAME.fullmatch(tool):
            schemas.append(tool)
            continue
        function = tool.get("function") if isinstance(tool, dict) else None
        if function is None and isinstance(tool, dict) and "parameters" in tool:
            function = tool  # LLaMA-Factory's have no wrapping
            tool = {"type": "function", "function": function}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            form = '[{"type": "function", "function": {"name": …, "parameters": …}}]'
            held = tool if isinstance(tools, list) else tools
            raise UserError(f"its 'tools' holds {held!r:.80}: expected {form}, or its JSON")
        schemas.append(tool)
    return schemas


# ---- both


def image_folder(data) -> str | None:
    """Returns the folder in which the images of a data set's rows are looked for: its own, or that
    of its file; None for a task and for the hub, whose rows hold the images themselves."""
    path = Path(data).expanduser().resolve()
    if is_file(data):
        return str(path.parent)
    return str(path) if path.is_dir() else None


def _with_images(row, messages, folder):
    """Takes the images of a row and its messages out into row["images"]: (the row, its messages);
    what has none stays as it is."""
    messages, sources = take_images(messages, _image_column(row))
    if not sources:
        return row, messages
    _check_sources(sources, folder)
    others = {name: value for name, value in row.items() if name not in ("image", "images")}
    return {**others, "images": sources, "image_folder": folder}, messages


def _image_column(row):
    """Reads what the columns image and images hold, as a list."""
    found = []
    for name in ("image", "images"):
        value = row.get(name)
        if value is None or value == "" or value == []:
            continue
        if found:
            raise UserError("it has a column 'image' and a column 'images': drop one of them")
        found = list(value) if isinstance(value, list | tuple) else [value]
    sources = []
    for value in found:
        # Parquet and the hub: {"bytes": …, "path": …}
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        sources.append(value)
    return sources


def _check_sources(sources, folder):
    """Refuses, before anything slow, images that are not there; they are opened when needed."""
    for source in sources:
        if not isinstance(source, str) or source.startswith("data:"):
            continue
        if "://" in source:
            raise UserError(
                f"its image {source[:80]!r} is on the internet: fetch it, and give its path"
            )
        if folder is None:
            raise UserError(f"its image {source[:80]!r} is a path, but the data is no file")
        path = Path(folder, source).resolve()
        if not path.is_file() or not path.is_relative_to(folder):
            raise UserError(f"its image {source[:80]!r} is no file in {folder}, where the data is")


def _has_system_message(messages):
    return any(message["role"] == "system" for message in messages)


def _is_filled_in(data):
    """Says whether the objects of a row have keys whose value None only says that there is no such
    key: Parquet gives every object the keys of all."""
    return not data.startswith("task:") and Path(data).suffix not in (".json", ".jsonl")


def _without_none(value):
    """Drops the keys of a value of JSON, at any depth, that hold None."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def _refuse_unseen(row):
    """Refuses a row with something in it that no model here would read."""
    for column in UNSEEN:
        if row.get(column):
            remedy = f"{NOT_SEEN}; what select_frames opens is a column `clip`"
            raise UserError(f"its {column!r} would not be seen: {remedy}")
    for column, value in row.items():
        _refuse_surrogates(value, column)


def _refuse_surrogates(value, column):
    """Refuses half a character in any text of a column: no tokenizer takes it."""
    if isinstance(value, str):
        half = None if value.isascii() else SURROGATE.search(value)
        if half:
            raise UserError(
                f"its {column!r} holds half a character, {half[0]!r}: write all of it, or drop it"
            )
    elif isinstance(value, dict):
        for key, inner in value.items():
            _refuse_surrogates(key, column)
            _refuse_surrogates(inner, column)
    elif isinstance(value, list):
        for item in value:
            if not isinstance(item, int | float):  # the ids of a trajectory are many
                _refuse_surrogates(item, column)


def _names_in_row(row):
    """Reads the columns by which a row says its tools and its rewards, as lists of names: `tools`,
    in which schemas of functions of its own may stand too, and `reward` where it holds text.
    None, as where there is no such column: those of the run."""
    names = {}
    for column in ("tools", "reward"):
        value = row.get(column)
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise UserError(f"its {column!r} is broken JSON: {error}") from None
        if column == "reward" and isinstance(value, int | float):  # of a recorded rollout
            continue
        if isinstance(value, str):
            value = value.split(",") if value.strip() not in ("", "null") else None
        if value is None:
            if column in row:
                names[column] = None
            continue
        kinds = str | dict if column == "tools" else str
        if not isinstance(value, list) or not all(isinstance(name, kinds) for name in value):
            expected = "those of rewards"
            if column == "tools":
                expected = "the names of some of --tools=…, or schemas of functions"
            raise UserError(f"its {column!r} holds {value!r:.80}: expected {expected}, as a list")
        names[column] = [
            name.strip() if isinstance(name, str) else read_function(name) for name in value
        ]
    return names


def check_names(examples: list[dict], tools: Container[str], rewards: Container[str]) -> None:
    """Checks that rows which name their tools, or their rewards, name some of the run's. UserError,
    with the row's number."""
    for example in examples:
        where = f"row {example['id'] + 1}"
        in_row = example.get("tools") or []
        own = [tool["function"]["name"] for tool in in_row if isinstance(tool, dict)]
        for name in own:
            if name in tools:
                raise UserError(
                    f"{where}: its 'tools' has a function {name}, which is also a tool of the run: "
                    "write its name alone, or rename it"
                )
            if own.count(name) > 1:
                raise UserError(f"{where}: its 'tools' has two functions {name}: rename one")
        for name in in_row:
            if isinstance(name, str) and name not in tools:
                hint = near(name, tools) or f" (there are {', '.join(tools) or 'none'})"
                raise UserError(f"{where}: its 'tools' names {name!r}, no tool of the run{hint}")
        if not isinstance(example.get("reward"), list):
            continue
        if not example["reward"]:
            raise UserError(f"{where}: its 'reward' is empty: name one of {', '.join(rewards)}")
        for name in example["reward"]:
            if name not in rewards:
                hint = near(name, rewards) or f" (there are {', '.join(rewards)})"
                raise UserError(
                    f"{where}: its 'reward' names {name!r}, none of --rewards=…{hint}; rename the "
                    "column if it means something else"
                )


# ---- the rows of a file, a task, a folder or the hub


def _read_rows(data, split, seed, limit):
    """Gives an iterator over the rows, as dicts. What comes after `limit` is not read or made."""
    if data.startswith("task:"):
        task = _task(data.removeprefix("task:"))
        return iter(task.rows(split, seed=seed))
    if data.startswith(gym.PREFIX):
        return gym.problems(data.removeprefix(gym.PREFIX), split, seed, limit)
    if data.startswith(bfcl.PREFIX):
        return bfcl.questions(data.removeprefix(bfcl.PREFIX))
    if data.startswith(verifiers.PREFIX):
        return iter(verifiers.rows(data.removeprefix(verifiers.PREFIX), split, limit))
    path = Path(data).expanduser()
    if path.is_dir():
        return _hub_rows(str(path), None, split)
    if path.suffix in SUFFIXES or path.exists() or data[:1] in "./~":
        return _file_rows(path, data)
    name, _, config = data.partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        tasks = ", ".join(f"task:{task}" for task in _task_names())
        raise UserError(
            f"data = {data!r}: expected a .jsonl, .json or .parquet file, a task ({tasks}) or a "
            "hub id such as openai/gsm8k"
        )
    return _hub_rows(name, config or None, split)


def _file_rows(path, data):
    if not path.is_file():
        siblings = [sibling.name for sibling in path.parent.glob("*")]
        raise UserError(f"no file {data!r}{near(path.name, siblings)}")
    if path.suffix not in SUFFIXES:
        raise UserError(f"cannot read {data!r}: expected a .jsonl, .json or .parquet file")
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    return _json_rows(path)


def _json_rows(path):
    """Yields objects, one per line (blank lines are skipped), or of an array in a .json file."""
    with open(path, "rb") as file:
        begin = file.read(4096).lstrip()[:1]
        file.seek(0)
        if path.suffix == ".json" and begin == b"[":
            lines = [(1, file.read())]  # an array: its rows are counted instead of lines
        else:
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
            is_array = isinstance(value, list) and path.suffix == ".json"
            for row in value if is_array else [value]:
                if not isinstance(row, dict):
                    kind = type(row).__name__
                    raise UserError(f"{path}:{number}: expected an object {{…}}, got a {kind}")
                yield row


def _parquet_rows(path):
    """Yields the rows of a parquet file, read batch by batch."""
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"cannot read {str(path)!r} as parquet: {_flat(error)}") from None


def _hub_rows(name, config, split):
    """Yields the rows of a hub data set, or of a folder."""
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
    yield from _undecoded(rows)


def _undecoded(rows):
    """Leaves the images of the rows as their files' bytes, a hundredth of what pixels take."""
    import datasets

    for name, feature in (rows.features or {}).items():
        inner = getattr(feature, "feature", None)
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        elif isinstance(inner, datasets.Image):
            rows = rows.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return rows


def _task(name):
    """Imports the module of a task."""
    if name not in _task_names():
        raise UserError(f"no task {name!r}; there are {', '.join(_task_names())}")
    return importlib.import_module(f"tasks.{name}")


def _task_names():
    """Lists the files in tasks/ that make rows: tiny.py has the model of all of them."""
    return sorted(path.stem for path in TASKS.glob("*.py") if _makes_rows(path))


def _makes_rows(path):
    try:
        body = ast.parse(path.read_bytes()).body
    except SyntaxError:
        return True  # importing it says what is wrong
    return any(isinstance(node, ast.FunctionDef) and node.name == "rows" for node in body)


def _flat(error):
    """Writes an exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__

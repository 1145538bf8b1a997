"""OpenAI chat messages, and the tool calls in them: read and written in one place.

from formats.messages import calls_of, read_messages
messages = read_messages(row["messages"], "messages", is_prompt=False)
names = [call.name for call in calls_of(message)]
"""

import json
from itertools import groupby

from formats.base import Call, too_deep
from run.config import UserError

FORM = '{"function": {"name": …, "arguments": an object or its JSON}}'
NOT_SEEN = "leave the row out or make it text"
# Keys of a content part that say where its image is, by the type of the part.
IMAGE_TYPES = {
    "image": ("image", "path", "url", "bytes", "base64"),
    "image_url": ("image_url",),
    "input_image": ("image_url",),
}
TAG = "<image>"  # LLaMA-Factory's and ms-swift's, in a text whose images stand in a column

# The keys that a message of each role may have.
KEYS = {
    "system": ("role", "content", "name"),
    "user": ("role", "content", "name"),
    "assistant": ("role", "content", "name", "tool_calls", "reasoning_content"),
    "tool": ("role", "content", "name", "tool_call_id"),
}
# What others call our roles. `developer` is OpenAI's newer word, so it is read; the others may mean
# something else in their own data sets, so they are only named in the refusal.
OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
LABELS = ("name", "tool_call_id")  # what says whose a message is
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # the same thing, by three names
# By which other trainers say whether a message is trained: 1 or true, 0 or false.
FLAGS = ("weight", "loss", "loss_mask", "loss_scale", "loss_weight", "train", "trainable")


# ---- a row's messages


def read_messages(messages: list, column: str, is_prompt: bool) -> list[dict]:
    """Reads the chat messages of a row into the one form that rollouts have, too.

    Contents are text, or a list of parts where there are images in it (see `take_images`),
    arguments objects, thinking is `reasoning_content`, results stand in the order of their calls
    and have their names. is_prompt: the model is to answer them, and nothing
    in them is trained. column: where they stand in the row. UserError for whatever would be lost
    or read in another way than it was meant.
    """
    copies = [_read_message(message, column, is_prompt) for message in messages]
    for place, message in enumerate(copies):
        if place and message["role"] == "system":
            # many templates leave out any other
            raise UserError(f"message {place + 1} is a system message: only the first may be one")
    ordered = _in_call_order(copies)
    if is_prompt and ordered and ordered[-1]["role"] not in ("user", "tool"):
        role = ordered[-1]["role"]
        raise UserError(
            f"its prompt ends in a message of the {role}: expected one of the user or a tool's "
            "result, which the model is to answer; leave out what follows it"
        )
    return ordered


def _read_message(message, column: str, is_prompt: bool) -> dict:
    """Reads one message."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{column!r} is a list, but not of messages with a role and content")
    role = _role(message["role"])
    read = {"role": role, "content": _content(message.get("content"), role)}
    if message.get("function_call") is not None:
        raise UserError("'function_call' is OpenAI's old form: write it as tool_calls")
    is_trained = role == "assistant" and not is_prompt
    for key, value in message.items():
        if key in FLAGS:
            _check_flag(key, value, is_trained)
        elif key in THOUGHTS and role == "assistant":
            _add_thoughts(read, key, value)
        elif key in KEYS[role]:
            # parquet gives every message the keys of all, with None where one has no such key
            if key not in read and value is not None:
                if key in LABELS:
                    _check_label(key, value)
                read[key] = value
        elif value not in (None, "", [], {}):
            known = ", ".join(KEYS[role])
            raise UserError(
                f"a message of the {role} has the key {key!r}, which would not be seen: expected "
                f"{known}; drop it"
            )
    if role == "assistant":
        read.pop("tool_calls", None)
        calls = calls_of(message)
        if calls:
            read["tool_calls"] = [openai_call(call) for call in calls]
    return read


def _role(role: str) -> str:
    """Reads a role."""
    if role == "developer":
        return "system"
    if role in KEYS:
        return role
    wanted = role.strip().lower()
    wanted = OTHER_ROLES.get(wanted, wanted)
    remedy = f": write {wanted}" if wanted in KEYS else ""
    raise UserError(f"role {role!r:.80}: expected one of {', '.join(KEYS)}{remedy}")


def _content(content, role: str) -> str | list[dict]:
    """Reads a content as text, or as parts if there are images in it: {"type": "image", "image":
    where it is}. UserError for what no model here would see."""
    if isinstance(content, list):
        parts = [_part(part, role) for part in content]
        if any(part["type"] == "image" for part in parts):
            return parts
        return "".join(part["text"] for part in parts)
    if content is None and role in ("system", "user"):
        raise UserError(f"a message of the {role} has no content: expected text")
    if not isinstance(content, str | None):
        raise UserError(f"its content {content!r:.80}: expected text, or a list of content parts")
    return content or ""


def _part(part, role: str) -> dict:
    """Reads a part of a content."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind not in IMAGE_TYPES:
        raise UserError(f"a content part of type {kind!r} would not be seen: {NOT_SEEN}")
    if role not in ("user", "tool"):
        raise UserError(
            f"a message of the {role} has an image: expected them in the user's and the tools'"
        )
    for key in IMAGE_TYPES[kind]:
        source = part.get(key)
        if isinstance(source, dict) and "url" in source:  # OpenAI's {"url": …, "detail": …}
            source = source["url"]
        if source is not None and key == "base64":
            source = f"data:image/png;base64,{source}"
        if source is not None:
            return {"type": "image", "image": source}
    return {"type": "image"}  # it stands in the row's column


def _check_flag(key: str, value, is_trained: bool) -> None:
    """Refuses a flag of another trainer unless it says what is done anyway."""
    if value is None or (value in (0, 1) and bool(value) == is_trained):
        return
    done = "is trained" if is_trained else "is not trained"
    raise UserError(
        f"{key} = {json.dumps(value, default=repr):.40} of one message has no effect here, where "
        f"it {done}: leave the row out, or drop it"
    )


def _check_label(key: str, value) -> None:
    """Refuses a name or an id that is none: results are put in order by them."""
    if not isinstance(value, str | int):
        raise UserError(f"its {key} {value!r:.80}: expected text")


def _add_thoughts(read: dict, key: str, value) -> None:
    """Sets a message's reasoning_content."""
    if value is None or value == "":
        return
    if not isinstance(value, str):
        raise UserError(f"its {key} {value!r:.80}: expected text")
    if read.get("reasoning_content", value) != value:
        raise UserError(f"its {key} is another text than its reasoning_content: keep one of them")
    if "<think>" in read["content"]:
        raise UserError(f"its thinking stands in {key} and in its content: keep one of them")
    read["reasoning_content"] = value


def _in_call_order(messages: list[dict]) -> list[dict]:
    """Puts results in the order of their calls, as a rollout has them, and under the call's name:
    OpenAI's form has neither, it has the id of the call."""
    ordered = []
    waiting = []  # the calls of the message before
    for is_result, run in groupby(messages, lambda message: message["role"] == "tool"):
        run = list(run)
        if is_result:
            follows = ordered[-1]["role"] if ordered else "nothing"
            if follows != "assistant":
                raise UserError(f"a tool's result follows {follows}: expected an assistant's call")
            ordered += _results_in_order(run, waiting) if waiting else run
            waiting = []
            continue
        for message in run:
            if waiting:
                raise UserError(
                    f"{len(waiting)} tool calls have no results, but the conversation goes on: "
                    "give the results, or leave out what follows the calls"
                )
            ordered.append(message)
            waiting = calls_of(message)
    return ordered


def _results_in_order(results: list[dict], calls: list[Call]) -> list[dict]:
    """Gives the results of one turn in the order of its calls, each with the name of its call."""
    if len(results) != len(calls):
        raise UserError(f"{len(results)} tool results follow {len(calls)} tool calls")
    ids = [call.id for call in calls]
    named = [result.get("tool_call_id") for result in results]
    if all(ids) and all(named) and len(set(ids)) == len(ids):
        if not set(named) <= set(ids) or len(set(named)) < len(named):
            what = f"the tool_call_ids are {named!s:.160}"
            raise UserError(f"{what}: expected, once each, those of {ids!s:.160}")
        positions = [ids.index(id) for id in named]
    else:
        positions = _positions_by_name(results, calls)
    by_position = dict(zip(positions, results, strict=True))
    ordered = [{"name": call.name, **by_position[place]} for place, call in enumerate(calls)]
    names = {call.name for call in calls}
    for call, result in zip(calls, ordered, strict=True):
        is_of_another = result["name"] in names and result["name"] != call.name
        if is_of_another:  # else it is a name of the user's own
            raise UserError(
                f"a result of {result['name']!r} stands where one of {call.name!r} is expected: "
                "give the results the names or the ids of their calls"
            )
    return ordered


def _positions_by_name(results: list[dict], calls: list[Call]) -> list[int]:
    """Finds which call each result answers, by the names where these tell them apart; else the
    order is all there is."""
    names = [call.name for call in calls]
    result_names = [result.get("name") for result in results]
    if len(set(names)) == len(names) and sorted(names) == sorted(map(str, result_names)):
        return [names.index(name) for name in result_names]
    return list(range(len(results)))


# ---- calls


def calls_of(message: dict) -> list[Call]:
    """Reads a message's `tool_calls`: of each its name, its arguments as an object, and its id, ""
    where it has none. Without the wrapping {"function": …} it is a call, too. UserError, which
    shows it, for what is none."""
    entries = message.get("tool_calls") or []
    if not isinstance(entries, list):
        raise UserError(f"its tool_calls {entries!r:.160}: expected a list of {FORM}")
    calls = []
    for entry in entries:
        function = entry.get("function", entry) if isinstance(entry, dict) else None
        if not isinstance(function, dict):
            raise UserError(f"its tool call {entry!r:.160}: expected {FORM}")
        name = function.get("name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments, object_pairs_hook=_object_of)
            except (ValueError, RecursionError):
                arguments = None  # refused below
        if not isinstance(name, str) or not name or not isinstance(arguments, dict):
            raise UserError(f"its tool call {entry!r:.160}: expected {FORM}")
        if too_deep(arguments) or not _is_json(arguments):
            raise UserError(
                f"its tool call {entry!r:.160}: its arguments are too deep, or no JSON, which has "
                "no NaN and no Infinity; leave the row out"
            )
        id = entry.get("id") or ""
        _check_label("id of a tool call", id)
        calls.append(Call(name, arguments, id=id))
    return calls


def _object_of(pairs: list[tuple]) -> dict:
    """Makes a JSON object; ValueError for a key that it has twice, of which one would be lost."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key is given twice")
    return made


def _is_json(value) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError):
        return False
    return True


def openai_call(call: Call) -> dict:
    """Writes a call as an entry of a message's `tool_calls`."""
    function = {"name": call.name, "arguments": call.arguments}
    written = {"type": "function", "function": function}
    return {"id": call.id, **written} if call.id else written


# ---- images


def take_images(messages: list[dict], column: list) -> tuple[list[dict], list]:
    """Takes the images out of messages of `read_messages` -> the messages, in which {"type":
    "image"} is where one was, and what says where each is, in order.

    column: the images of a row beside its messages. They belong to the parts that name none, else
    to <image> in texts of the user and of tools, else all to the beginning of the first message of
    the user. UserError unless they are as many.
    """
    if column:
        messages = _place_column(messages, column)
    taken = []
    sources = []
    for message in messages:
        if isinstance(message["content"], list):
            parts = []
            for part in message["content"]:
                if part["type"] == "image":
                    sources.append(part.get("image"))
                    part = {"type": "image"}
                parts.append(part)
            message = message | {"content": parts}
        taken.append(message)
    if any(source is None for source in sources):
        raise UserError("a content part of type 'image' names no image, nor does the row's column")
    return taken, sources


def _place_column(messages: list[dict], column: list) -> list[dict]:
    """Gives the images of a column their places."""
    unnamed = 0
    tags = 0
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            unnamed += sum(part == {"type": "image"} for part in content)
        elif message["role"] in ("user", "tool"):
            tags += content.count(TAG)
    waiting = iter(column)
    if unnamed == 0 and tags == 0:
        return _at_the_beginning(messages, column)
    if unnamed not in (0, len(column)) or (unnamed == 0 and tags != len(column)):
        raise UserError(
            f"it has {len(column)} images, but its messages have room for {unnamed or tags}: write "
            f"{TAG} once for each"
        )
    placed = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            parts = []
            for part in content:
                is_unnamed = part == {"type": "image"}
                parts.append(part | {"image": next(waiting)} if is_unnamed else part)
            message = message | {"content": parts}
        elif unnamed == 0 and message["role"] in ("user", "tool") and TAG in content:
            message = message | {"content": _split_at_tags(content, waiting)}
        placed.append(message)
    return placed


def _split_at_tags(text: str, waiting) -> list[dict]:
    """Makes parts of a text with <image> in it; waiting: an iterator over the images."""
    parts = []
    for number, between in enumerate(text.split(TAG)):
        if number:
            parts.append({"type": "image", "image": next(waiting)})
        if between:
            parts.append({"type": "text", "text": between})
    return parts


def _at_the_beginning(messages: list[dict], column: list) -> list[dict]:
    """Puts all images in front of what the user says first."""
    for place, message in enumerate(messages):
        if message["role"] == "user":
            images = [{"type": "image", "image": source} for source in column]
            content = message["content"]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            first = message | {"content": [*images, *content]}
            return [*messages[:place], first, *messages[place + 1 :]]
    raise UserError(f"it has {len(column)} images, but no message of the user")


def has_images(messages) -> bool:
    """Says whether any message has an image in it."""
    return count_images(messages) > 0


def count_images(messages) -> int:
    """Counts the images in messages."""
    count = 0
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            count += sum(part.get("type") == "image" for part in content)
    return count


def assistant_message(text: str, calls: list[Call] = ()) -> dict:
    """Writes an assistant's message, with tool_calls if it makes any."""
    message = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [openai_call(call) for call in calls]
    return message

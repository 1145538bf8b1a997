"""Reads requests to /v1/chat/completions: what is honoured, what is left aside, what is refused.

    request = read_request(body, most_samples=64)   # a Request, or web.Refused with a sentence

A parameter that would change the answer, and that an agent cannot honour, is refused by its name
(NEUTRAL has the values that change nothing); those that only describe a request are left aside
(HARMLESS). Messages and tools are those of OpenAI's API.
"""

import json
import math
import re
from dataclasses import dataclass, field

from engines.chat_api import NAME
from formats.base import too_deep
from formats.messages import read_messages, take_images
from run.config import UserError
from serve.client_schemas import impossible
from serve.web import Refused

TURNS = "agent_turns"  # the key of a message under which an agent's earlier turns go to and fro
MOST_MESSAGES = 1024
MOST_TOOLS = 128
MOST_IMAGES = 16
MOST_STOPS = 16
MOST_SEED = 2**63  # seeds are below it
MOST_TEMPERATURE = 2.0
SHOWN = 80  # characters of a wrong value in a message

# What says nothing of the answer: who asks, what is stored, billed, cached or guessed elsewhere.
HARMLESS = """
    user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention
    prediction
""".split()
# What is not honoured: the values that ask for nothing else than what is done anyway.
NEUTRAL = {
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
}
HONOURED = """
    model messages tools tool_choice n temperature seed max_tokens max_completion_tokens stop
    stream stream_options
""".split()
REMEDIES = {"functions": "write them as tools", "function_call": "write it as tool_choice"}


@dataclass
class Request:
    """A chat completion that is asked for, in order."""

    model: str
    messages: list[dict]  # as formats.messages reads them; an image is {"type": "image"}
    images: list[str]  # data URIs, in the order of their places
    tools: list[dict] = field(default_factory=list)  # the client's own: schemas
    may_call: bool = True  # the client's own tools (tool_choice)
    n: int = 1
    temperature: float | None = None  # None: the server's
    seed: int | None = None  # None: another one each time
    max_new_tokens: int | None = None  # in all turns together; None: what the run allows
    stop: list[str] = field(default_factory=list)
    is_streamed: bool = False
    with_usage: bool = False  # at the end of a stream


def refused(why: str, param: str | None = None, code: str | None = None) -> Refused:
    """Makes the refusal of a request that is wrong."""
    return Refused(400, why, param, code)


def read_request(body: bytes, most_samples: int) -> Request:
    """Reads the body of a request. Raises Refused."""
    asked = read_json(body)
    if not isinstance(asked, dict):
        raise refused(f"expected an object with model and messages, not {shown(asked)}")
    asked = {name: value for name, value in asked.items() if value is not None}
    refuse_others(asked)

    # 1. what is said
    model = asked.get("model")
    if not isinstance(model, str) or not model:
        raise refused("model is missing: expected a name, see /v1/models", "model")
    messages, images = read_conversation(asked.get("messages"))
    tools, may_call = read_tools(asked)

    # 2. how it is to be answered
    n = whole_number(asked, "n", 1, most_samples)
    temperature = asked.get("temperature")
    if temperature is not None and not is_number(temperature, 0, MOST_TEMPERATURE):
        wanted = f"expected a number from 0 to {MOST_TEMPERATURE:g}"
        raise refused(f"temperature: {wanted}, not {shown(temperature)}", "temperature")
    is_streamed = flag(asked, "stream")
    return Request(
        model,
        messages,
        images,
        tools,
        may_call,
        n=1 if n is None else n,
        temperature=temperature,
        seed=whole_number(asked, "seed", -MOST_SEED, MOST_SEED - 1),
        max_new_tokens=read_limit(asked),
        stop=read_stop(asked),
        is_streamed=is_streamed,
        with_usage=read_stream_options(asked, is_streamed),
    )


# ---- the JSON


def read_json(body: bytes):
    """Reads a body as JSON proper: no NaN, no key twice, whole characters, not too deep."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refused(f"the request is not UTF-8 ({error.reason})") from None
    try:
        value = json.loads(text, parse_constant=no_constant, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise refused(f"the request is no JSON ({error})") from None
    if too_deep(value):
        raise refused("the request is too deep: expected at most 100 levels")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise refused(f"the request holds half a character, {half}: write all of it") from None
    return value


def no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def unique_keys(pairs: list[tuple]) -> dict:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:SHOWN]!r} is given twice")
    return made


def shown(value) -> str:
    """Writes the beginning of a wrong value."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


# ---- parameters


def refuse_others(asked: dict) -> None:
    """Refuses what would change the answer and is not honoured."""
    for name, value in asked.items():
        if name in HONOURED or name in HARMLESS:
            continue
        if name in NEUTRAL:
            if not any(same(value, accepted) for accepted in NEUTRAL[name]):
                expected = " or ".join(shown(accepted) for accepted in NEUTRAL[name])
                why = f"{name} = {shown(value)} is not honoured here: expected {expected}; drop it"
                raise refused(why, name, "unsupported_parameter")
            continue
        remedy = REMEDIES.get(name, "drop it")
        why = f"the parameter {name[:SHOWN]!r} is not known here and would have no effect"
        raise refused(f"{why}: {remedy}", name[:SHOWN], "unknown_parameter")


def same(value, accepted) -> bool:
    """Says whether two values of JSON are the same: to python, true is 1."""
    return isinstance(value, bool) == isinstance(accepted, bool) and value == accepted


def is_number(value, low: float, high: float) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and math.isfinite(value) and low <= value <= high


def whole_number(asked: dict, name: str, low: int, high: int) -> int | None:
    """Reads a whole number; None where there is none."""
    value = asked.get(name)
    if value is None:
        return None
    if type(value) is not int or not low <= value <= high:
        wanted = f"expected a whole number from {low} to {high}"
        raise refused(f"{name}: {wanted}, not {shown(value)}", name)
    return value


def flag(asked: dict, name: str, within: str = "") -> bool:
    """Reads true or false; false where there is nothing."""
    value = asked.get(name)
    if not isinstance(value, bool | None):
        where = within + name
        raise refused(f"{where}: expected true or false, not {shown(value)}", where)
    return bool(value)


def read_limit(asked: dict) -> int | None:
    """Reads how many tokens may be sampled, by its old name or its new one."""
    old = whole_number(asked, "max_tokens", 1, 2**31)
    new = whole_number(asked, "max_completion_tokens", 1, 2**31)
    if old is not None and new is not None and old != new:
        why = f"max_tokens = {old} and max_completion_tokens = {new}: keep one of them"
        raise refused(why, "max_tokens")
    return old if new is None else new


def read_stop(asked: dict) -> list[str]:
    """Reads the texts before which an answer ends."""
    stop = asked.get("stop", [])
    if isinstance(stop, str):
        stop = [stop]
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        wanted = "expected a text or a list of texts, none of them empty"
        raise refused(f"stop: {wanted}, not {shown(asked['stop'])}", "stop")
    if len(stop) > MOST_STOPS:
        raise refused(f"stop: expected at most {MOST_STOPS} texts, not {len(stop)}", "stop")
    return stop


def read_stream_options(asked: dict, is_streamed: bool) -> bool:
    """Reads whether a stream ends with its usage."""
    options = asked.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        why = f"stream_options: expected an object, not {shown(options)}"
        raise refused(why, "stream_options")
    if not is_streamed:
        why = "stream_options has no effect without stream = true: drop it"
        raise refused(why, "stream_options")
    for name in options:
        if name not in ("include_usage", "include_obfuscation"):
            why = f"stream_options: {shown(name)} is not known here: expected include_usage"
            raise refused(why, "stream_options")
    return flag(options, "include_usage", within="stream_options.")


# ---- tools


def read_tools(asked: dict) -> tuple[list[dict], bool]:
    """Reads the client's own tools -> their schemas, whether they may be called."""
    given = asked.get("tools", [])
    if not isinstance(given, list) or len(given) > MOST_TOOLS:
        wanted = f"expected a list of at most {MOST_TOOLS} functions"
        raise refused(f"tools: {wanted}, not {shown(given)}", "tools")
    schemas = [read_tool(tool, number) for number, tool in enumerate(given)]
    names = [schema["function"]["name"] for schema in schemas]
    for name in names:
        if names.count(name) > 1:
            raise refused(f"tools: there are two of the name {name!r}", "tools")
    choice = asked.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        why = f"tool_choice = {shown(choice)} cannot be forced on this model"
        raise refused(f"{why}: expected auto or none", "tool_choice", "unsupported_value")
    return schemas, choice == "auto"


def read_tool(tool, number: int) -> dict:
    """Reads the schema of a client's function."""
    where = f"tools[{number}]"
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        form = '{"type": "function", "function": {"name": …, "parameters": …}}'
        raise refused(f"{where}: expected {form}, not {shown(tool)}", "tools")
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        wanted = "expected 1 to 64 letters, digits, _ and -"
        raise refused(f"{where}: its name is {shown(name)}: {wanted}", "tools")
    for key in function:
        if key not in ("name", "description", "parameters", "strict"):
            raise refused(f"{where}: {shown(key)} would not be seen: drop it", "tools")
    description = function.get("description") or ""
    if not isinstance(description, str):
        raise refused(f"{where}: its description is {shown(description)}: expected text", "tools")
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    if not is_object_schema(parameters):
        wanted = 'expected a JSON schema of an object, {"type": "object", "properties": {…}}'
        raise refused(f"{where}: its parameters are {shown(parameters)}: {wanted}", "tools")
    parameters = {"properties": {}} | parameters
    why = impossible(parameters)
    if why:
        raise refused(f"{where}: no call could fit its parameters: {why}", "tools")
    described = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": described}


def is_object_schema(parameters) -> bool:
    """Says whether a schema is one of an object with named properties."""
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        return False
    properties = parameters.get("properties", {})
    if not isinstance(properties, dict):
        return False
    return all(isinstance(schema, dict) for schema in properties.values())


# ---- messages


def read_conversation(given) -> tuple[list[dict], list[str]]:
    """Reads the messages -> as rollouts have them, and the images in them, in order."""
    if not isinstance(given, list) or not given:
        raise refused(f"messages: expected a list of messages, not {shown(given)}", "messages")
    messages = []
    for number, message in enumerate(given):
        messages += with_earlier_turns(message, f"messages[{number}]")
    if len(messages) > MOST_MESSAGES:
        why = f"messages: expected at most {MOST_MESSAGES}, not {len(messages)}"
        raise refused(why, "messages")
    try:
        messages, images = take_images(read_messages(messages, "messages", is_prompt=True), [])
    except UserError as error:
        raise refused(f"messages: {error}", "messages") from None
    if len(images) > MOST_IMAGES:
        why = f"messages: expected at most {MOST_IMAGES} images, not {len(images)}"
        raise refused(why, "messages")
    return messages, images


def with_earlier_turns(message, where: str) -> list[dict]:
    """Reads one message; one of an agent may bring the turns that it took before it (TURNS)."""
    message = plain(message, where)
    turns = message.pop(TURNS, None)
    if turns is None:
        return [message]
    if message["role"] != "assistant" or not isinstance(turns, list):
        raise refused(f"{where}: {TURNS} belongs to a message of the assistant, a list", "messages")
    earlier = []
    for turn in turns:
        turn = plain(turn, f"{where}.{TURNS}")
        turn.pop("index", None)  # of a stream
        if turn["role"] not in ("assistant", "tool") or TURNS in turn:
            why = f"{where}: {TURNS} has turns of the assistant and of tools, not {shown(turn)}"
            raise refused(why, "messages")
        earlier.append(turn)
    return [*earlier, message]


def plain(message, where: str) -> dict:
    """Copies a message without what clients add that says nothing; its parts are checked."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        why = f"{where}: expected an object with role and content, not {shown(message)}"
        raise refused(why, "messages")
    copy = {name: value for name, value in message.items() if value is not None}
    if copy.get("type") in ("text", "message"):
        del copy["type"]
    content = copy.get("content")
    if isinstance(content, list):
        if not content:
            raise refused(f"{where}: its content is an empty list: expected parts", "messages")
        for number, part in enumerate(content):
            check_part(part, f"{where}.content[{number}]")
    return copy


def check_part(part, where: str) -> None:
    """Checks a part of a content: a text, or an image that came with the request."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return
    if kind != "image_url":
        raise refused(f"{where}: expected a part text or image_url, not {shown(part)}", "messages")
    source = part.get("image_url")
    url = source.get("url") if isinstance(source, dict) else source
    if not isinstance(url, str) or not re.match("data:image/", url[:11], re.IGNORECASE):
        why = f"{where}: images come as data:image/png;base64,…; nothing is fetched"
        raise refused(f"{why} ({shown(url)})", "messages", "unsupported_image")

"""What an MCP server says of its tools, and what they return, in the forms that the model gets."""

import base64
import contextlib
import json

from mcp import types

from images import MAX_BYTES, Picture, open_image, shown, to_data_uri
from run.config import UserError
from tools.calling.base import ToolError

# -- the schema of a tool

DROPPED = {"$schema", "$id", "$comment", "$ref", "$defs", "definitions", "title"}
AS_IT_IS = {"enum", "const", "default", "examples", "required"}  # values: no schemas
MAY_BE_NULL = {"const", "default"}  # any other keyword that is null is not there: so Go writes it


def clean_tools(answer: dict, left_out: list[str]) -> dict:
    """Cleans the raw answer to tools/list: with schemas as parameters() makes them, and without
    what is no tool: to `left_out` goes which and why, so that one bad tool does not take the others
    with it. What a tool returns is shown as it is: no schema of it is needed."""
    if not isinstance(answer, dict) or not isinstance(answer.get("tools"), list):
        return answer  # the SDK will say what is wrong
    tools = []
    for number, tool in enumerate(answer["tools"], 1):
        try:
            tools.append(_clean_tool(tool))
        except Exception as error:  # of another program's making: it may be anything
            name = tool.get("name") if isinstance(tool, dict) else None
            why = str(error).strip().splitlines() or [type(error).__name__]
            left_out.append(f"tool {name or number!r} ({' '.join(why)[:200]})")
    return {**answer, "tools": tools}


def _clean_tool(tool):
    tool = {key: value for key, value in tool.items() if value is not None}
    tool.pop("outputSchema", None)
    schema = tool.get("inputSchema", {})
    if not isinstance(schema, dict):
        raise ValueError(f"its inputSchema is {json.dumps(schema)[:80]}: expected an object")
    tool["inputSchema"] = parameters(schema)
    if not tool.get("name"):
        raise ValueError("it has no name")
    types.Tool.model_validate(tool, by_name=False)
    return tool


def clean_result(answer: dict) -> dict:
    """Cleans the raw answer to tools/call: with content, structuredContent is not looked at, and so
    cannot be wrong."""
    if not isinstance(answer, dict):
        return answer
    answer = {key: value for key, value in answer.items() if value is not None}
    if answer.get("content"):
        answer.pop("structuredContent", None)
    elif "structuredContent" in answer:
        answer["content"] = []
        if not isinstance(answer["structuredContent"], dict):
            text = json.dumps(answer.pop("structuredContent"), ensure_ascii=False)
            answer["content"] = [{"type": "text", "text": text}]
    return answer


def parameters(schema: dict) -> dict:
    """Writes an inputSchema with an object's type and properties, as get_json_schema writes them:
    $ref is replaced by what it stands for, `X or null` is X with nullable, and titles and $schema,
    which say nothing to a model, are left out. Other keywords stay: the server checks them."""
    made = _plain(schema, schema, ())
    open_ended = {"anyOf", "oneOf", "allOf", "patternProperties"} & made.keys()
    if "properties" not in made and open_ended:
        made.setdefault("additionalProperties", True)
    return {**made, "type": "object", "properties": made.get("properties", {})}


def _plain(schema, root, inside):
    """Rewrites a part of a schema. `root`: the whole schema, in which a $ref points. `inside`: the
    references around this."""
    if isinstance(schema, list):
        return [_plain(item, root, inside) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema, inside = _resolved(schema, root, inside)
    made = {}
    for key, value in schema.items():
        if value is None and key not in MAY_BE_NULL:
            continue
        if key == "properties" and isinstance(value, dict):  # its keys are names of arguments
            made[key] = {name: _plain(item or {}, root, inside) for name, item in value.items()}
        elif key in AS_IT_IS:
            made[key] = value
        elif key not in DROPPED:
            made[key] = _plain(value, root, inside)
    return _nullable(made)


def _resolved(schema, root, inside):
    """Puts what its $ref stands for, which may stand for another one, into a schema. -> also the
    references that are around it now: a schema within itself ends in "any value"."""
    while isinstance(schema.get("$ref"), str):
        reference = schema["$ref"]
        beside = {key: value for key, value in schema.items() if key != "$ref"}
        target = {} if reference in inside else _target(root, reference)
        schema = {**target, **beside}
        inside = (*inside, reference)
    return schema, inside


def _target(root, reference):
    """Finds what "#/$defs/Point" stands for, {} where it is not in the schema."""
    if not reference.startswith("#"):
        return {}
    target = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        if not part:
            continue
        if not isinstance(target, dict):
            return {}
        target = target.get(part.replace("~1", "/").replace("~0", "~"))
    return target if isinstance(target, dict) else {}


def _nullable(schema):
    """Turns `X or null` into X with nullable."""
    null = {"type": "null"}
    options = schema.get("anyOf")
    if isinstance(options, list) and null in options:
        others = [option for option in options if option != null]
        beside = {key: value for key, value in schema.items() if key != "anyOf"}
        if len(others) == 1 and isinstance(others[0], dict):
            return {**others[0], **beside, "nullable": True}
        return {"anyOf": others, **beside, "nullable": True}
    types_of_it = schema.get("type")
    if isinstance(types_of_it, list) and "null" in types_of_it:
        others = [name for name in types_of_it if name != "null"]
        if len(others) == 1:
            return {**schema, "type": others[0], "nullable": True}
    return schema


# -- images that a call takes

NUMBER = {"type": "integer", "description": "The number of the image, from 1."}


def image_numbers(schema: dict) -> tuple[dict, list[str]]:
    """Makes an image a number in the parameters; returns them, and the names of the images."""
    names = []
    properties = dict(schema["properties"])
    for name, value in properties.items():
        kind = value.get("contentMediaType") if isinstance(value, dict) else None
        if str(kind).startswith("image/"):
            names.append(name)
            properties[name] = NUMBER
    return {**schema, "properties": properties}, names


def data_uri(picture: Picture) -> str:
    """Encodes the original, with the size at which the model sees it where that is another one."""
    text = to_data_uri(picture.original)
    if len(text) > MAX_BYTES * 4 // 3:
        raise ToolError("bad_image", "error: that image is too large to be sent: crop it first")
    if picture.shown.size == picture.original.size:
        return text
    width, height = picture.shown.size
    return text.replace("data:image/png;", f"data:image/png;shown={width}x{height};", 1)


# -- what a call returned


def content(result: types.CallToolResult) -> str | list | None:
    """Reads text, a list of texts and PIL images, or None for nothing. ToolError for an error."""
    parts = [_part(block) for block in result.content]
    if result.structured_content is not None and not parts:
        parts = [json.dumps(result.structured_content, ensure_ascii=False)]
    texts = [part for part in parts if isinstance(part, str)]
    text = "\n".join(texts)
    if result.is_error:
        raise ToolError("exception", text or "error: the tool failed and does not say why")
    if len(texts) < len(parts):
        return parts
    return text or None


def _part(block):
    """Reads a block as a text or a PIL image."""
    if block.type == "text":
        return block.text
    if block.type == "resource_link":
        return f"(a resource {block.uri}: not shown)"
    if block.type == "resource":
        if isinstance(block.resource, types.TextResourceContents):
            return block.resource.text
        return _media(block.resource.blob, block.resource.mime_type, f" {block.resource.uri}")
    return _media(block.data, block.mime_type, "")


def _media(data, mime_type, name):
    if not str(mime_type).startswith("image/"):
        return f"(a resource{name} of type {mime_type}: not shown)"
    try:
        data = base64.b64decode(data)
    except ValueError:
        return "(an image that is no base64: not shown)"
    try:
        return open_image(data)
    except UserError as error:
        if data[:4] == b"\x89PNG":
            with contextlib.suppress(UserError):
                return open_image(_essential(data))
        why = str(error).removeprefix(f"{shown(data)} ")
        return f"(an image that cannot be read: it {why})"


def _essential(png):
    """Strips a PNG of its optional chunks: a wrong checksum in a colour profile, as the reference
    server "everything" sends it, is nothing to a browser, and Pillow would refuse the image."""
    made = png[:8]  # the signature
    start = 8
    while start + 8 <= len(png):
        end = start + 12 + int.from_bytes(png[start : start + 4])
        name = png[start + 4 : start + 8]
        if name[:1].isupper() or name == b"tRNS":  # a capital: not optional
            made += png[start:end]
        start = end
    return made

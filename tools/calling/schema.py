"""A call's arguments against its tool's JSON schema: what is wrong, in words for a model.

    wrong = wrong_arguments("add", parameters, {"a": "2"})  # "a must be integer, not "2""

A small checker of our own: the sentence is what the model learns from. Nothing is converted, '3' is
not an integer. What it does not know in a schema (`pattern`, `$ref`, a type of its own) passes: the
tool, or the server behind it, has the last word.
"""

import json

JSON_TYPES = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


def wrong_arguments(name: str, parameters: dict, arguments) -> str | None:
    """What is wrong, as half a sentence, or None."""
    if not isinstance(arguments, dict):
        return f"the arguments of {name} must be a JSON object"
    properties = parameters.get("properties", {})
    for argument in arguments:
        if argument not in properties and parameters.get("additionalProperties", False) is False:
            return f"{name} has no argument {argument!r}"
    for argument in parameters.get("required", []):
        if argument not in arguments:
            return f"{name} got no argument {argument!r} ({kind(properties.get(argument, {}))})"
    for argument, value in arguments.items():
        if wrong := _mismatch(value, properties.get(argument, {}), argument):
            return wrong
    return None


def signature(name: str, parameters: dict) -> str:
    """add(a: integer, b?: integer): how the tool is called."""
    required = parameters.get("required", [])
    shown = (
        f"{argument}{'' if argument in required else '?'}: {kind(schema)}"
        for argument, schema in parameters.get("properties", {}).items()
    )
    return f"{name}({', '.join(shown)})"


def kind(schema: dict) -> str:
    """What a value has to be, in words."""
    if not isinstance(schema, dict):
        said = "any value"
    elif "enum" in schema:
        said = "one of " + ", ".join(_json(value) for value in schema["enum"])
    elif "anyOf" in schema:
        said = " or ".join(kind(option) for option in schema["anyOf"])
    elif isinstance(schema.get("items"), dict) and schema["items"]:
        said = f"array of {kind(schema['items'])}"
    else:
        said = schema.get("type", "any value")
        said = said if isinstance(said, str) else " or ".join(said)
    return f"{said} or null" if isinstance(schema, dict) and schema.get("nullable") else said


def _json(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def _mismatch(value, schema, where: str) -> str | None:
    if not isinstance(schema, dict) or (value is None and schema.get("nullable")):
        return None
    if not _fits(value, schema, where):
        return f"{where} must be {kind(schema)}, not {_json(value)[:80]}"
    inner = []
    if isinstance(value, list) and "prefixItems" in schema:
        if len(value) != len(schema["prefixItems"]):
            return f"{where} must have {len(schema['prefixItems'])} items, not {len(value)}"
        parts = zip(value, schema["prefixItems"], strict=True)
        inner = [(f"{where}[{i}]", item, part) for i, (item, part) in enumerate(parts)]
    elif isinstance(value, list) and "items" in schema:
        inner = [(f"{where}[{i}]", item, schema["items"]) for i, item in enumerate(value)]
    elif isinstance(value, dict):
        properties = schema.get("properties", {})
        for name in schema.get("required", []):
            if name not in value:
                return f"{where} has no {name!r} ({kind(properties.get(name, {}))})"
        rest = schema.get("additionalProperties", {})
        inner = [(f"{where}[{key!r}]", v, properties.get(key, rest)) for key, v in value.items()]
        if rest is False and (extra := [key for key in value if key not in properties]):
            return f"{where} has no place for {extra[0]!r}"
    return next((w for name, item, part in inner if (w := _mismatch(item, part, name))), None)


def _fits(value, schema: dict, where: str) -> bool:
    if "anyOf" in schema:
        return any(_mismatch(value, option, where) is None for option in schema["anyOf"])
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    known = [name for name in kinds if name in JSON_TYPES]
    fits = len(known) < len(kinds) or not kinds
    fits = fits or any(
        # bool is an int to Python, not to JSON
        isinstance(value, JSON_TYPES[name]) and (name == "boolean" or not isinstance(value, bool))
        for name in known
    )
    return fits and ("enum" not in schema or value in schema["enum"])

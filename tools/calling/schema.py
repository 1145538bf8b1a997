"""A call's arguments against its tool's JSON schema: what is wrong, in words for a model.

    wrong = wrong_arguments("add", parameters, {"a": "2"})  # 'a must be integer, not "2"'

A small checker of our own: the sentence is what the model learns from. Nothing is converted, '3' is
not an integer. What it does not know in a schema (`pattern`, `$ref`, a type of its own), or what is
broken there, passes: the tool, or the server behind it, has the last word. `pattern` on purpose: a
server could give one that takes for ever on what a model writes.
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
VALUE_SHOWN = 80  # characters of a wrong value


def wrong_arguments(name: str, parameters: dict, arguments) -> str | None:
    """Says what is wrong with arguments, as half a sentence, or None."""
    if not isinstance(arguments, dict):
        return f"the arguments of {name} must be a JSON object"
    properties = _part(parameters, "properties", dict)
    if parameters.get("additionalProperties", False) is False:
        for argument in arguments:
            if argument not in properties:
                return f"{name} has no argument {argument!r}"
    for argument in _part(parameters, "required", list):
        if isinstance(argument, str) and argument not in arguments:
            return f"{name} got no argument {argument!r} ({kind(properties.get(argument))})"
    for argument, value in arguments.items():
        wrong = _wrong_value(value, properties.get(argument), argument)
        if wrong:
            return wrong
    return None


def signature(name: str, parameters: dict) -> str:
    """Writes how a tool is called: add(a: integer, b?: integer)."""
    required = _part(parameters, "required", list)
    shown = []
    for argument, schema in _part(parameters, "properties", dict).items():
        mark = "" if argument in required else "?"
        shown.append(f"{argument}{mark}: {kind(schema)}")
    return f"{name}({', '.join(shown)})"


def kind(schema) -> str:
    """Says what a value has to be, in words."""
    if not isinstance(schema, dict):
        return "any value"
    if "enum" in schema:
        words = "one of " + ", ".join(_json(value) for value in _part(schema, "enum", list))
    elif "anyOf" in schema:
        words = " or ".join(kind(option) for option in _part(schema, "anyOf", list))
    elif _part(schema, "items", dict):
        words = f"array of {kind(schema['items'])}"
    else:
        words = " or ".join(_types(schema)) or "any value"
    return f"{words} or null" if schema.get("nullable") else words


def _json(value):
    return json.dumps(value, ensure_ascii=False)


def _part(schema, key, expected):
    """Reads the part of a schema, empty if it is not there, or is broken."""
    part = schema.get(key)
    return part if isinstance(part, expected) else expected()


def _types(schema):
    types = schema.get("type")
    if isinstance(types, str):
        return [types]
    return [name for name in _part(schema, "type", list) if isinstance(name, str)]


def _wrong_value(value, schema, where):
    """Says what is wrong with a value, or with what is inside of it; None if nothing is. `where`:
    its name in words, such as table['k'][1]."""
    if not isinstance(schema, dict):
        return None
    if value is None and schema.get("nullable"):
        return None
    if not _has_kind(value, schema, where):
        return f"{where} must be {kind(schema)}, not {_json(value)[:VALUE_SHOWN]}"
    if isinstance(value, list):
        return _wrong_item(value, schema, where)
    if isinstance(value, dict):
        return _wrong_property(value, schema, where)
    return None


def _has_kind(value, schema, where):
    """Says whether the value itself is what kind() says."""
    options = _part(schema, "anyOf", list)
    if options:
        return any(_wrong_value(value, option, where) is None for option in options)
    enum = _part(schema, "enum", list)
    if enum and value not in enum:
        return False
    types = _types(schema)
    for name in types:
        if name not in JSON_TYPES:
            return True  # not one that we know
        if has_type(value, name):
            return True
    return not types


def has_type(value, name: str) -> bool:
    """Says whether a value has one of JSON_TYPES."""
    if isinstance(value, bool):  # it is an int to Python, not to JSON
        return name == "boolean"
    return isinstance(value, JSON_TYPES[name])


def _wrong_item(value, schema, where):
    schemas = _part(schema, "prefixItems", list)  # of a tuple: one for each item
    if schemas and len(value) != len(schemas):
        return f"{where} must have {len(schemas)} items, not {len(value)}"
    for i, item in enumerate(value):
        wrong = _wrong_value(item, schemas[i] if schemas else schema.get("items"), f"{where}[{i}]")
        if wrong:
            return wrong
    return None


def _wrong_property(value, schema, where):
    properties = _part(schema, "properties", dict)
    for name in _part(schema, "required", list):
        if isinstance(name, str) and name not in value:
            return f"{where} has no {name!r} ({kind(properties.get(name))})"
    others = schema.get("additionalProperties")
    if others is False:
        for name in value:
            if name not in properties:
                return f"{where} has no place for {name!r}"
    for name, item in value.items():
        wrong = _wrong_value(item, properties.get(name, others), f"{where}[{name!r}]")
        if wrong:
            return wrong
    return None

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
    """What is wrong, as half a sentence, or None."""
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
    """add(a: integer, b?: integer): how the tool is called."""
    required = _part(parameters, "required", list)
    shown = []
    for argument, schema in _part(parameters, "properties", dict).items():
        mark = "" if argument in required else "?"
        shown.append(f"{argument}{mark}: {kind(schema)}")
    return f"{name}({', '.join(shown)})"


def kind(schema) -> str:
    """What a value has to be, in words."""
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
    """The part of a schema, empty if it is not there, or is broken."""
    part = schema.get(key)
    return part if isinstance(part, expected) else expected()


def _types(schema):
    types = schema.get("type")
    if isinstance(types, str):
        return [types]
    return [name for name in _part(schema, "type", list) if isinstance(name, str)]


def _wrong_value(value, schema, where):
    """What is wrong with a value, or with what is inside of it; None if nothing is. `where`: its
    name in words, such as table['k'][1]."""
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
    """Whether the value itself is what kind() says."""
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
        if isinstance(value, bool):  # it is an int to Python, not to JSON
            has_type = name == "boolean"
        else:
            has_type = isinstance(value, JSON_TYPES[name])
        if has_type:
            return True
    return not types


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


# ---- a schema that somebody brings along

# What others call the types of JSON Schema.
OTHER_TYPES = {
    "dict": "object",
    "float": "number",
    "double": "number",
    "int": "integer",
    "long": "integer",
    "bool": "boolean",
    "str": "string",
    "list": "array",
    "tuple": "array",
    "none": "null",
}
LIMITS = (
    ("minimum", "maximum"),
    ("minLength", "maxLength"),
    ("minItems", "maxItems"),
    ("minProperties", "maxProperties"),
)


def impossible(parameters) -> str | None:
    """Says why the parameters of a function are no JSON schema that a call could fit, in half a
    sentence; None if nothing is found. What is not known here passes, as in a call."""
    is_object = isinstance(parameters, dict) and parameters.get("type", "object") == "object"
    if not is_object:
        wanted = 'expected a JSON schema of an object, {"type": "object", "properties": {…}}'
        return f"its parameters are {_short(parameters)}: {wanted}"
    return _impossible_object(parameters, "its parameters", takes_others=False)


def _impossible_object(schema, where, takes_others):
    """What is wrong with the properties of an object. takes_others: beside them, unless it says
    else."""
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        return f"{where}: 'properties' is {_short(properties)}: expected an object of schemas"
    required = schema.get("required") or []
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        return f"{where}: 'required' is {_short(required)}: expected a list of names"
    for name in required:
        if name not in properties and not schema.get("additionalProperties", takes_others):
            return f"{where}: 'required' names {name!r}, which is none of the properties"
    for name, inner in properties.items():
        problem = _impossible_value(inner, name)
        if problem:
            return problem
    return None


def _impossible_value(schema, where):
    """What is wrong with the schema of a value, or with what is inside of it."""
    if isinstance(schema, bool):  # any value, or none
        return None if schema else f"{where} takes no value at all"
    if not isinstance(schema, dict):
        return f"{where} is {_short(schema)}: expected a JSON schema"
    problem = _unknown_type(schema, where) or _no_value(schema, where)
    if problem:
        return problem
    inner = [(f"{where}[]", schema["items"])] if "items" in schema else []
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        options = schema.get(key, [])
        if not isinstance(options, list) or (key in schema and not options):
            return f"{where}: its {key} is {_short(options)}: expected a list of schemas"
        inner += [(where, option) for option in options]
    for name, part in inner:
        problem = _impossible_value(part, name)
        if problem:
            return problem
    return _impossible_object(schema, where, takes_others=True)


def _unknown_type(schema, where):
    """A type that is none of JSON's."""
    types = schema.get("type")
    if types is None:
        return None
    names = types if isinstance(types, list) else [types]
    for name in names or [types]:
        if isinstance(name, str) and name in JSON_TYPES:
            continue
        hint = f"expected one of {', '.join(JSON_TYPES)}"
        if isinstance(name, str):
            plain = name.lower()
            plain = OTHER_TYPES.get(plain, plain)
            if plain in JSON_TYPES:
                hint = f"write {plain}"
            elif plain == "any":
                hint = "leave the type out"
        return f"{where} has the type {_short(name)}, which JSON Schema does not have: {hint}"
    return None


def _no_value(schema, where):
    """An enum, or two limits, between which there is no value."""
    values = schema.get("enum")
    if values is not None:
        if not isinstance(values, list) or not values:
            return f"{where}: its enum is {_short(values)}: expected a list of values"
        if not any(_has_kind(value, schema, where) for value in values):
            return f"{where} is {' or '.join(_types(schema))}, and no value of its enum is"
    for low, high in LIMITS:
        least = schema.get(low)
        most = schema.get(high)
        if isinstance(least, int | float) and isinstance(most, int | float) and least > most:
            return f"{where}: its {low} is {least}, above its {high}, {most}"
    return None


def _short(value):
    return repr(value)[:VALUE_SHOWN]

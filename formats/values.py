"""Values that are written without quotes: which type a text has, the tool's schema says."""

import json

from formats.base import too_deep

JSON_NAMES = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    dict: "object",
    type(None): "null",
}
PYTHON = {"True": True, "False": False, "None": None}  # some templates write them so


def allowed_types(schema) -> set[str]:
    """Finds the JSON types that a schema allows; empty: any, as far as it says."""
    if not isinstance(schema, dict):
        return set()
    declared = schema.get("type") or []  # None: rows of a table have all keys
    types = {declared} if isinstance(declared, str) else set(declared)
    if not types:
        types = {JSON_NAMES[type(value)] for value in schema.get("enum") or []}
    choices = [*(schema.get("anyOf") or []), *(schema.get("oneOf") or [])]
    for choice in choices:
        choice_types = allowed_types(choice)
        if not choice_types:
            return set()
        types |= choice_types
    if types and schema.get("nullable"):  # as get_json_schema writes `str | None`
        types.add("null")
    is_known = types <= set(JSON_NAMES.values())
    return types if is_known else set()


def typed_value(text: str, types: set[str]) -> object:
    """Reads the text of a parameter as a value of one of `types`. ValueError: it is none."""
    if types == {"string"}:
        return text
    try:
        value = literal_value(text)
    except (ValueError, RecursionError) as e:
        if types and "string" not in types:
            raise ValueError("no JSON") from e
        return text
    value_types = {JSON_NAMES[type(value)]}
    if type(value) is int:
        value_types.add("number")
    is_allowed = bool(value_types & types)
    # A value of another type goes on to the check of the tool's arguments, which says more.
    return text if "string" in types and not is_allowed else value


def literal_value(text: str) -> object:
    """Reads JSON, or a literal as Python writes it. ValueError, RecursionError: it is neither."""
    if text.strip() in PYTHON:
        return PYTHON[text.strip()]
    value = json.loads(text, parse_constant=int)  # NaN is no JSON: ValueError
    if too_deep(value):
        raise ValueError("too deep")
    return value

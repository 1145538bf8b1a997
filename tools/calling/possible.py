"""Whether a JSON schema that a row or a client brings along can be fitted by any call at all.

    why = impossible(parameters)   # "properties.city.enum is empty: nothing fits it", or None

A model that is shown a schema which nothing fits would try until its turns run out. What is looked
at is what such schemas get wrong: words that are not JSON Schema's, values that exclude each other,
references to nowhere. That two parts which are right by themselves exclude each other is not seen.
The time it takes grows with the schema's length alone, and no `pattern` is tried.
"""

from tools.calling.schema import JSON_TYPES, has_type

BOUNDS = {"minimum": "maximum", "minLength": "maxLength", "minItems": "maxItems"}
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
CHOICES = ("anyOf", "oneOf", "allOf", "prefixItems")  # lists of schemas
NAMED = ("properties", "$defs", "definitions")  # objects of schemas
INNER = ("items", "additionalProperties")  # schemas, or true and false


def impossible(parameters: dict) -> str | None:
    """Says why no call fits the parameters of a function, an object that is not nested too deeply;
    None where nothing is seen that speaks against it."""
    properties = parameters.get("properties")
    if "$ref" in parameters or (not properties and any(key in parameters for key in CHOICES)):
        return "its arguments are not named: write them as properties"
    # other arguments than those that are named are not taken (tools/calling/schema.py)
    closed = {"additionalProperties": False} | parameters
    return _wrong(closed, "", parameters)


def _wrong(schema, where: str, whole: dict) -> str | None:
    """Says what is wrong with a schema, or with one inside of it."""
    if not isinstance(schema, dict):
        return f"{where} is {_shown(schema)}: expected a JSON schema, an object"
    why = _wrong_parts(schema)
    why = why or _wrong_type(schema) or _wrong_values(schema) or _wrong_required(schema)
    why = why or _wrong_reference(schema, whole) or _wrong_bounds(schema)
    if why:
        return f"{where}.{why}" if where else why
    for key, inner in _inner(schema):
        why = _wrong(inner, f"{where}.{key}" if where else key, whole)
        if why:
            return why
    return None


def _inner(schema: dict) -> list[tuple[str, object]]:
    """Lists the schemas inside of one, and where each stands."""
    inner = []
    for key in NAMED:
        named = schema.get(key, {})
        inner += [(f"{key}.{name[:80]}", value) for name, value in named.items()]
    for key in CHOICES:
        choices = schema.get(key, [])
        inner += [(f"{key}[{number}]", value) for number, value in enumerate(choices)]
    for key in INNER:
        if not isinstance(schema.get(key, True), bool):
            inner.append((key, schema[key]))
    return inner


def _wrong_parts(schema: dict) -> str | None:
    """Looks at what holds the schemas inside of one."""
    for key in NAMED:
        if not isinstance(schema.get(key, {}), dict):
            return f"{key} is {_shown(schema[key])}: expected an object of schemas"
    for key in CHOICES:
        if key in schema and not (isinstance(schema[key], list) and schema[key]):
            return f"{key} is {_shown(schema[key])}: expected a list of schemas"
    return None


def _wrong_type(schema: dict) -> str | None:
    if "type" not in schema:
        return None
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    known = all(isinstance(name, str) and name in JSON_TYPES for name in types)
    if known and types:
        return None
    return f"type is {_shown(schema['type'])}: {_remedy(schema['type'])}"


def _remedy(name) -> str:
    """Says what to write for a type that is none of JSON Schema's."""
    plain = name.lower() if isinstance(name, str) else ""
    plain = OTHER_TYPES.get(plain, plain)
    if plain in JSON_TYPES:
        return f"write {plain}"
    if plain == "any":
        return "leave it out"
    return f"expected one of {', '.join(JSON_TYPES)}"


def _wrong_values(schema: dict) -> str | None:
    """Looks at what lists the values: there has to be one, and one of the type."""
    key = "enum" if schema.get("enum") is not None else "const"
    values = schema["enum"] if key == "enum" else [schema.get("const")]
    if not isinstance(values, list) or not values:
        return f"enum is {_shown(values)}: expected a list of the values that fit"
    if key not in schema or "type" not in schema:
        return None
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(has_type(value, name) for value in values for name in types):
        return f"{key} is {_shown(schema[key])}: none of it is of the type {_shown(schema['type'])}"
    return None


def _wrong_required(schema: dict) -> str | None:
    required = schema.get("required") or []  # some clients write null
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        return f"required is {_shown(required)}: expected a list of names"
    if schema.get("additionalProperties") is False:
        properties = schema.get("properties", {})
        for name in required:
            if name not in properties:
                return f"required has {_shown(name)}, which is none of its properties"
    return None


def _wrong_reference(schema: dict, whole: dict) -> str | None:
    """Looks where a $ref leads: into what came with it, nothing is fetched."""
    reference = schema.get("$ref")
    if reference is None:
        return None
    place = whole
    names = reference.split("/") if isinstance(reference, str) else [""]
    for name in names[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(place, list) and name.isdecimal() and int(name) < len(place):
            place = place[int(name)]
        else:
            place = place.get(name) if isinstance(place, dict) else None
    if names[0] == "#" and isinstance(place, dict):
        return None
    return f"$ref is {_shown(reference)}, which leads nowhere in these parameters"


def _wrong_bounds(schema: dict) -> str | None:
    for low, high in BOUNDS.items():
        for key in (low, high):
            is_number = isinstance(schema.get(key, 0), int | float)
            if not is_number or isinstance(schema.get(key), bool):
                return f"{key} is {_shown(schema[key])}: expected a number"
        if low in schema and high in schema and schema[low] > schema[high]:
            return f"{low} is above its {high}: nothing fits both"
    return None


def _shown(value) -> str:
    return f"{value!r:.80}"

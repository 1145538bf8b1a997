"""The reward call_match: the calls of functions of the row's own, against those that are right.

    rewards = ("call_match",)
    example["ground_truth"] = [{"area": {"base": [10], "height": [5], "unit": ["cm", "mm", ""]}}]

The verdicts are those of the AST checker of the Berkeley Function-Calling Leaderboard for python
(Patil et al. 2025), its oddities included, so that figures can be compared: bench/bfcl.py asks both
about every question there, and about calls that are wrong in many ways.
"""

import json

from run.config import UserError

COLUMN = "ground_truth"
ANY = "any"  # of calls: some call of a function is right, whichever
LEFT_OUT = ""  # among the accepted values: the argument may be left out
TYPES = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
    "object": dict,
}
# What makes no difference in a text: "April 1, 2024" is "april 1 2024".
IGNORED = str.maketrans("'", '"', " ,./-_*^")
ENDED = ("answered", "max_turns")  # with calls that fit their schemas, or that do not


def call_match(trajectory, example, *, column: str = COLUMN):
    """Gives 1.0 if the calls of the last turn are those of example["ground_truth"], in any order: a
    list of {name: {argument: [accepted values]}}, or its JSON. "" among the accepted values says
    that the argument may be left out. [] stands for no call at all, "any" for some call of the
    row's functions. Each of the right calls takes the first one made that fits it.

    Texts are compared without case, blanks and `,./-_*^`. An argument has the type of its schema,
    or that of its first accepted value, which is then compared as it is; a whole number is a float,
    but not in a list. Objects have a list of accepted values for each key. Calls that do not fit
    their schemas are compared like all others. A turn that was cut, or a call that cannot be read,
    earns 0.0, also where no call is right.
    """
    functions = functions_of(example)
    wanted = right_answer(example, column, functions)
    if trajectory.stop not in ENDED:
        return 0.0
    last = len(trajectory.turn_starts) - 1
    calls = []
    for call in trajectory.calls:
        is_of_the_run = call.name not in functions and not call.error
        if call.turn == last and not is_of_the_run:
            calls.append(call)
    if not wanted:
        return float(trajectory.stop == "answered" and not calls)
    if wanted == ANY:
        return float(any(call.name in functions and call.arguments is not None for call in calls))
    return float(all_match(calls, wanted, functions))


def check_row(example: dict, column: str = COLUMN) -> None:
    """Checks that a row says which calls are right. UserError."""
    right_answer(example, column, functions_of(example))


def functions_of(example: dict) -> dict[str, dict]:
    """Collects the functions of a row's own, by their names."""
    functions = {}
    for tool in example.get("tools") or []:
        if isinstance(tool, dict):
            functions[tool["function"]["name"]] = tool["function"]
    return functions


def right_answer(example: dict, column: str, functions: dict) -> list[dict] | str:
    """Reads which calls are right. UserError, with the row, if it does not say so."""
    row = f"reward call_match: row {example['id'] + 1}"
    wanted = example.get(column)
    if isinstance(wanted, str) and wanted != ANY:
        try:
            wanted = json.loads(wanted)
        except ValueError as error:
            raise UserError(f"{row}: its {column!r} is broken JSON: {error}") from None
    if wanted == ANY:
        return wanted
    form = '[{"name": {"argument": [accepted values]}}], [] for no call, or "any"'
    if not isinstance(wanted, list):
        raise UserError(f"{row}: its {column!r} is {wanted!r:.80}: expected {form}")
    for call in wanted:
        is_call = isinstance(call, dict) and len(call) == 1
        arguments = next(iter(call.values())) if is_call else None
        are_lists = isinstance(arguments, dict) and all(
            isinstance(accepted, list) for accepted in arguments.values()
        )
        if not are_lists:
            raise UserError(f"{row}: its {column!r} holds {call!r:.80}: expected {form}")
        name = next(iter(call))
        if name not in functions:
            there = ", ".join(functions) or "none"
            raise UserError(
                f"{row}: its {column!r} calls {name!r}, its functions are {there}: give the row a "
                "column `tools` with the schemas of its functions"
            )
    return wanted


def right_calls(example: dict, column: str = COLUMN) -> list[dict] | None:
    """Writes calls that are right, as {name: arguments}; None where any call is."""
    wanted = right_answer(example, column, functions_of(example))
    if wanted == ANY:
        return None
    calls = []
    for call in wanted:
        for name, arguments in call.items():
            chosen = _first_of_each(arguments)
            calls.append({name: {key: _plain(value) for key, value in chosen.items()}})
    return calls


def _first_of_each(arguments):
    """Takes the first accepted value of each argument that has one."""
    chosen = {}
    for name, accepted in arguments.items():
        values = [value for value in accepted if value != LEFT_OUT]
        if values:
            chosen[name] = values[0]
    return chosen


def _plain(value):
    """Writes an accepted value as a call has it: an object has accepted values for each key."""
    if isinstance(value, dict):
        return _first_of_each(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


# ---- the comparison


def all_match(calls: list, wanted: list[dict], functions: dict[str, dict]) -> bool:
    """Says whether these calls are those wanted: each takes the first of the calls that is left and
    fits. functions: by their names, with JSON schemas."""
    if len(calls) != len(wanted):
        return False
    left = list(calls)
    for call in wanted:
        ((name, arguments),) = call.items()
        for place, made in enumerate(left):
            if made.name == name and arguments_match(made.arguments, arguments, functions[name]):
                del left[place]
                break
        else:
            return False
    return True


def arguments_match(given: dict | None, accepted: dict, function: dict) -> bool:
    """Says whether the arguments of a call are right. accepted: a list of values for each."""
    if given is None:
        return False
    parameters = function["parameters"]
    properties = parameters["properties"]
    if any(name not in given for name in parameters.get("required", [])):
        return False
    for name, value in given.items():
        if name not in properties or name not in accepted:
            return False
        if not value_matches(value, accepted[name], properties[name]):
            return False
    return all(name in given or LEFT_OUT in values for name, values in accepted.items())


def value_matches(value, accepted: list, schema: dict) -> bool:
    """Says whether a value is one of those accepted."""
    # 1. its type: that of the schema, or of the first accepted value, such as a variable's name
    wanted_type = _type_in(schema)
    if wanted_type is float and type(value) is int:
        value = float(value)
    first_type = _type_of_first(accepted)
    items = schema.get("items")
    item_type = _type_in(items) if wanted_type is list and isinstance(items, dict) else None
    if type(value) is not wanted_type and type(value) is not first_type:
        return False
    if type(value) is wanted_type and item_type:
        if not any(_has_item_types(value, option, item_type) for option in accepted):
            return False

    # 2. the value
    if first_type not in (None, wanted_type):
        return value in accepted
    if wanted_type is dict:
        return any(_object_matches(value, option) for option in accepted)
    if wanted_type is list and item_type is dict:
        return any(_objects_match(value, option) for option in accepted)
    if wanted_type is str:
        return _same(value) in [_same(option) for option in accepted if isinstance(option, str)]
    if wanted_type is list:
        return _each_same(value) in [_each_same(option) for option in accepted]
    return value in accepted


def _type_in(schema):
    """Finds the type of python that a schema asks for; where it does not say, text."""
    name = schema.get("type")
    return TYPES.get(name, str) if isinstance(name, str) else str


def _type_of_first(values):
    """Finds the type of the first value that does not stand for none; None without one."""
    for value in values:
        if value != LEFT_OUT:
            return type(value)
    return None


def _has_item_types(value, option, item_type):
    """Says whether the items have the type of the schema, or that of the first one accepted."""
    if not isinstance(option, list):
        return True
    types = (item_type, _type_of_first(option))
    return all(type(item) in types for item in value)


def _object_matches(value, option):
    """Says whether an object has accepted values, and no key too many or too few."""
    if not isinstance(option, dict) or not isinstance(value, dict):
        return False
    for key, inner in value.items():
        if key not in option or _same(inner) not in [_same(each) for each in option[key]]:
            return False
    return all(key in value or LEFT_OUT in values for key, values in option.items())


def _objects_match(value, option):
    """Says whether a list of objects is this one, in its order."""
    if len(value) != len(option):
        return False
    return all(_object_matches(inner, each) for inner, each in zip(value, option, strict=True))


def _same(value):
    """Makes what a value is compared as: a text without what makes no difference."""
    return value.translate(IGNORED).lower() if isinstance(value, str) else value


def _each_same(values):
    return [_same(value) for value in values]

"""The tests of a data row, as data sets write them: for the reward code_tests, and the tests tool.

They are asserts, as one text or a list of texts (MBPP, AceCode), or {"input", "output"} of stdin
and stdout, as a list of dicts or a dict of two lists, "inputs" and "outputs" (APPS, TACO). With
"fn_name" beside them they are arguments and results of its calls.
"""

import json

from run.config import UserError


def read(tests, what: str) -> tuple[str | None, list[tuple[str, str]] | None]:
    """Reads a row's tests as (asserts as one text, None), or (None, a list of (input, output)).
    what: of what row and for whom, for the UserError if they cannot be read."""
    try:
        # an empty text too: it is no JSON, and is refused as that
        if isinstance(tests, str) and tests.lstrip()[:1] in ("[", "{", ""):
            tests = json.loads(tests)
        if isinstance(tests, str):
            return tests, None
        if isinstance(tests, list) and all(isinstance(test, str) for test in tests):
            return "\n".join(tests), None
        if isinstance(tests, dict):
            pairs = list(zip(tests["inputs"], tests["outputs"], strict=True))
            if tests.get("fn_name"):
                return _asserts_of_calls(tests["fn_name"], pairs), None
        else:
            pairs = [(test["input"], test["output"]) for test in tests]
        return None, [(_joined(given), _joined(expected)) for given, expected in pairs]
    except (KeyError, TypeError, ValueError) as error:
        forms = 'asserts, or a list of {"input": text, "output": text}, or fn_name with lists'
        raise UserError(f"{what} cannot be read ({error!r}): expected {forms}") from None


def columns_of_mbpp(example: dict) -> list[str]:
    """Reads the columns that MBPP has beside its tests: a text, a list of them, or None."""
    columns = ("test_imports", "test_setup_code")
    return [_joined(example.get(column) or "") for column in columns]


def lines(text: str) -> list[str]:
    """Splits an output into what is compared: its lines, without the spaces at their ends."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _joined(text_or_lines):
    """Joins a list of lines; a text stays as it is."""
    if isinstance(text_or_lines, str):
        return text_or_lines
    return "\n".join(text_or_lines)


_LISTED = """\
def _listed(x):
    return [_listed(item) for item in x] if isinstance(x, (list, tuple)) else x"""


def _asserts_of_calls(name, calls):
    """Writes calls of a function, or of a method of Solution, (arguments, result) each, as asserts.
    JSON has no tuples, so lists are the same. If all results are lists of one, which of them are
    only wrapped in one cannot be told: then both are right."""
    maybe_wrapped = all(isinstance(result, list) and len(result) == 1 for _, result in calls)
    lines = [f"_solution = globals().get({name!r}) or Solution().{name}", _LISTED]
    for arguments, result in calls:
        if not isinstance(arguments, list):
            raise ValueError(f"{arguments!r} is no list of arguments")
        accepted = (result, result[0]) if maybe_wrapped else (result,)
        lines.append(f"assert _listed(_solution(*{arguments!r})) in {accepted!r}")
    return "\n".join(lines)

"""The reward sql_match: what the model's query gives is compared with what the right one gives.

    rewards = ("sql_match",)    # example["answer"]: the gold query; example["database"]: a file

Whatever is wrong with the model's query is a 0. What is wrong with the row stops the run and says
which row it is: a 0 in its place would be trained on.
"""

import math
import re

from grading.answers import answer, program
from run.config import UserError
from tools import ToolError
from tools.sql import execute

# ---- the reward


def sql_match(
    trajectory, example, *, database: str = "database", rows: int = 10_000, seconds: float = 10.0
):
    """Gives 1.0 if the model's query gives the rows that the gold query example["answer"] gives, on
    the SQLite file example["database"]; of several gold queries, one of them.

    The query: the last ```sql block of the last turn, or what it gave to `finish`, or `<answer>`.
    What it only tried with a tool is not its answer. Rows are compared as a multiset, and in order
    if the gold query has an ORDER BY of its own (not just in a subquery). Names of columns do not
    matter, their order does; 2 is 2.0, and 0.1 + 0.2 is 0.3, but "2" is not 2.

    database: the column of the row with the file. rows, seconds: limits of one query.
    What is not covered: a query that is right on these rows by chance. Constants alone (`SELECT
    42`) earn nothing, since a tool may have shown the result, but a model can hide them in a query
    that reads a table. A gold query without rows is matched by any other: leave such rows out.
    """
    row_number = example["id"] + 1
    file = example.get(database)
    golds = example.get("answer")
    if not golds:
        raise UserError(f"reward sql_match needs 'answer', a query, and row {row_number} has none")
    if not file:
        raise UserError(
            f"reward sql_match needs {database!r}, a file, and row {row_number} has none"
        )
    query = program(trajectory, example, ("sql", "sqlite")) or answer(trajectory, example)
    if not query:
        return 0.0

    for gold in golds if isinstance(golds, list) else [golds]:
        right = _gold_result(file, gold, rows, seconds, row_number)
        if _reads_a_table(gold) and not _reads_a_table(query):
            continue
        most = len(right[1]) + 1  # one more row is one too many
        try:
            result = execute(file, query, most, seconds)
        except ToolError:
            return 0.0
        if _same_result(result, right, _is_ordered(gold)):
            return 1.0
    return 0.0


def _gold_result(file, query, rows, seconds, row_number):
    """Runs a gold query: (columns, rows); UserError if it fails or gives more than `rows` rows."""
    what = f"reward sql_match: the gold query of row {row_number}"
    try:
        result = execute(file, query, rows + 1, seconds)
    except ToolError as error:
        why = f"fails on {file}: {error.text}"
        raise UserError(f"{what} {why}: correct it or leave it out") from None
    if len(result[1]) > rows:
        why = f"gives more than {rows} rows"
        raise UserError(f"{what} {why}: give a larger sql_match.rows, or leave it out")
    return result


# ---- what a query says

_NO_SQL = re.compile(  # what stands in quotes, and comments
    r"'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`|\[[^\]]*(?:\]|\Z)|--[^\n]*|/\*.*?(?:\*/|\Z)", re.S
)
_COMMENTS = ("--", "/*")
_PARENTHESIS = re.compile(r"[()]")
_ORDER_BY = re.compile(r"\border\s++by\b", re.I)


def _word_in_its_place(match):
    """Puts a blank for a comment, which may stand between ORDER and BY; else a word."""
    return " " if match[0].startswith(_COMMENTS) else " x "


def _reads_a_table(query):
    """Says whether a query has a FROM: else it is made of constants."""
    text = _NO_SQL.sub(_word_in_its_place, query)
    return re.search(r"\bfrom\b", text, re.I) is not None


def _is_ordered(query):
    """Says whether a query has an ORDER BY outside of parentheses, texts and comments."""
    text = _outside(_NO_SQL.sub(_word_in_its_place, query))
    return _ORDER_BY.search(text) is not None


def _outside(text):
    """Puts a word in the place of each pair of parentheses and what is in it. One that is
    never closed, or never opened, stays."""
    # 1. which open what: (its place, where the other one is)
    opened = []
    pairs = {}
    for match in _PARENTHESIS.finditer(text):
        if match[0] == "(":
            opened.append(match.start())
        elif opened:
            pairs[opened.pop()] = match.start()

    # 2. what is outside of all pairs
    parts = []
    position = 0
    for start, end in sorted(pairs.items()):
        if start < position:  # inside of another pair
            continue
        parts += [text[position:start], " x "]
        position = end + 1
    parts.append(text[position:])
    return "".join(parts)


# ---- when two results are the same


def _same_result(result, right, ordered):
    """Says whether two results (columns, rows) of tools.sql.execute are the same."""
    columns, rows = result
    right_columns, right_rows = right
    if len(columns) != len(right_columns) or len(rows) != len(right_rows):
        return False
    if not ordered:
        # numbers that are nearly equal must come to the same place
        rows = sorted(rows, key=_rank)
        right_rows = sorted(right_rows, key=_rank)
    return all(map(_same_row, rows, right_rows))


def _same_row(row, right_row):
    return all(map(_same_value, row, right_row))


def _same_value(value, right):
    if isinstance(value, float) or isinstance(right, float):
        if not _is_number(value) or not _is_number(right):
            return False
        return math.isclose(value, right, rel_tol=1e-9, abs_tol=1e-9)
    return type(value) is type(right) and value == right


def _rank(row):
    """Makes the key that rows are sorted by: the kind of each value, then the values, with numbers
    rounded; what is still equal by more of their digits, and by all of them."""
    kinds = [_kind(value) for value in row]
    return kinds, _rounded(row, 6), _rounded(row, 12), list(row)


def _kind(value):
    """Gives a number for each kind of value: those of one kind can be sorted."""
    if value is None:
        return 0
    if _is_number(value):
        return 1
    return 3 if isinstance(value, bytes) else 2


def _rounded(row, digits):
    return [float(f"{value:.{digits}g}") if _is_number(value) else value for value in row]


def _is_number(value):
    return isinstance(value, (int, float))

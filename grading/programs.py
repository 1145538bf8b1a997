"""Rewards that run what the model wrote, confined: a query on a database, a program on its tests.

    rewards = ("sql_match",)    # example["answer"]: the gold query; example["database"]: a file
    rewards = ("code_tests",)   # example["tests"]; with reward_options=("code_tests.partial=true",)

Whatever is wrong with the model's code is a 0. What is wrong with the row stops the run and says
which row it is: a 0 in its place would be trained on.
"""

import ast
import asyncio
import builtins
import copy
import functools
import json
import math
import pkgutil
import re
import secrets
from dataclasses import dataclass

from grading.answers import answer, program
from run.config import UserError
from tools import ToolError
from tools.calling.base import DEADLINE

# ---- SQL


def sql_match(
    trajectory, example, *, database: str = "database", rows: int = 10_000, seconds: float = 10.0
):
    """1.0 if the model's query gives the rows that the gold query example["answer"] gives, on the
    SQLite file example["database"]; of several gold queries, one of them.

    The query: the last ```sql block of the last turn, or what it gave to `finish`, or `<answer>`.
    What it only tried with a tool is not its answer. Rows are compared as a multiset, and in order
    if the gold query has an ORDER BY of its own (not just in a subquery). Names of columns do not
    matter, their order does; 2 is 2.0, and 0.1 + 0.2 is 0.3, but "2" is not 2.

    database: the column of the row with the file. rows, seconds: limits of one query.
    What is not covered: a query that is right on these rows by chance. Constants alone (`SELECT
    42`) earn nothing, since a tool may have shown the result, but a model can hide them in a query
    that reads a table. A gold query without rows is matched by any other: leave such rows out.
    """
    file, golds = example.get(database), example.get("answer")
    if not file or not golds:
        what = f"{database!r}, a file," if golds else "'answer', a query,"
        raise UserError(f"reward sql_match needs {what} and row {example['id'] + 1} has none")
    from tools.sql import execute  # here: only who uses it needs it

    said = program(trajectory, example, ("sql", "sqlite")) or answer(trajectory, example)
    if not said:
        return 0.0
    for gold in golds if isinstance(golds, list) else [golds]:
        right = _gold_rows(file, gold, rows, seconds, example["id"] + 1)
        if _reads(gold) and not _reads(said):
            continue
        try:
            got = execute(file, said, len(right[1]) + 1, seconds)  # one more row is one too many
        except ToolError:
            return 0.0
        if _same_rows(got, right, _is_ordered(gold)):
            return 1.0
    return 0.0


def _gold_rows(file, query, rows, seconds, row):
    from tools.sql import execute

    try:
        found = execute(file, query, rows + 1, seconds)
    except ToolError as error:
        why = f"fails on {file}: {error.text}: correct it or leave it out"
    else:
        if len(found[1]) <= rows:
            return found
        why = f"gives more than {rows} rows: give a larger sql_match.rows, or leave it out"
    raise UserError(f"reward sql_match: the gold query of row {row} {why}")


_SQL_TEXT = re.compile(
    r"'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?(?:\*/|\Z)", re.S
)
_INNERMOST = re.compile(r"\([^()]*\)")


def _reads(query):
    """Whether it has a FROM: else it is made of constants."""
    return re.search(r"\bfrom\b", _SQL_TEXT.sub(" x ", query), re.I) is not None


def _is_ordered(query):
    """Whether it has an ORDER BY outside of parentheses, texts and comments."""
    text, before = _SQL_TEXT.sub(" x ", query), None
    while text != before:
        text, before = _INNERMOST.sub(" x ", text), text
    return re.search(r"\border\s+by\b", text, re.I) is not None


def _same_rows(got, right, ordered):
    """Two results (columns, rows) of tools.sql.execute."""
    (names, rows), (gold_names, gold_rows) = got, right
    if len(names) != len(gold_names) or len(rows) != len(gold_rows):
        return False
    if not ordered:  # numbers that are nearly equal must come to the same place
        rows, gold_rows = sorted(rows, key=_rank), sorted(gold_rows, key=_rank)
    return all(
        _same_value(value, gold)
        for row, gold_row in zip(rows, gold_rows, strict=True)
        for value, gold in zip(row, gold_row, strict=True)
    )


def _rank(row):
    """What rows are sorted by: the kind of each value, then the values, with numbers rounded; what
    is still equal by more of their digits, and by all of them."""
    numbers = [isinstance(value, (int, float)) for value in row]
    kinds = [
        0 if value is None else 1 if number else 2 + isinstance(value, bytes)
        for value, number in zip(row, numbers, strict=True)
    ]

    def rounded(digits):
        return [
            float(f"{value:.{digits}g}") if number else value
            for value, number in zip(row, numbers, strict=True)
        ]

    return kinds, rounded(6), rounded(12), list(row)


def _same_value(value, gold):
    if isinstance(value, float) or isinstance(gold, float):
        numbers = isinstance(value, (int, float)) and isinstance(gold, (int, float))
        return numbers and math.isclose(value, gold, rel_tol=1e-9, abs_tol=1e-9)
    return type(value) is type(gold) and value == gold


# ---- programs

ROOM = 60_000  # bytes of a test, written as python: with the program it must fit into one call
LONGEST_OUTPUT = 15_000  # characters: the sandbox cuts longer ones
BUILTINS = frozenset(dir(builtins))
IMPORTS = {  # what tests use as if it were there -> "module" or "module:name"
    name: name
    for name in (
        "bisect cmath collections copy datetime decimal fractions functools heapq itertools json "
        "math numpy operator random re statistics string"
    ).split()
}
IMPORTS |= {n: f"collections:{n}" for n in ("Counter", "OrderedDict", "defaultdict", "deque")}
IMPORTS |= {"Decimal": "decimal:Decimal", "Fraction": "fractions:Fraction", "np": "numpy"}


async def code_tests(
    trajectory, example, *, column: str = "tests", partial: bool = False, seconds: float = 20.0
):
    """1.0 if the model's program passes all tests of example["tests"]; with partial, the share.

    The program: the last ```python block of the last turn, or what it gave to `finish`. The tests:
    asserts, as one text or a list of texts (MBPP, AceCode; of HumanEval's `check(candidate)` the
    asserts inside), or {"input", "output"} of stdin and stdout, as a list of dicts or a dict of two
    lists, "inputs" and "outputs" (APPS, TACO). Outputs are compared without the spaces at the ends
    of lines. With "fn_name" beside them they are arguments and results of its calls. In front of
    asserts stand the columns test_imports and test_setup_code, where a row has them (MBPP), and the
    IMPORTS that they lack. The column entry_point names the function, needed if a builtin has its
    name. column: where the tests are. seconds: for all tests of a program; what has not passed by
    then fails. Each program runs in the sandbox of tools/python.py. None, which is not learnt from,
    if all tests are too long for it (60 KB of input, 15 KB of output).

    What is covered: nothing that the program prints, returns or replaces is taken for a verdict. Of
    `assert f(2) == 4` it only computes f(2). What has to come out never enters its process, and the
    comparison runs in another. So an early exit, a printed "passed", an object that is equal to
    everything, a replaced `len` or `math.isclose` gain nothing. The values must be plain data:
    numbers, texts, lists, tuples, sets, dicts, bytes, or of numpy; all together at most 20,000
    characters, which is what the sandbox shows. What does not fit fails.
    What is not covered: asserts in a loop or a comprehension, and functions of the tests that are
    given the program's. They run beside the program and fail only if they raise, so an object that
    is equal to everything passes, and such tests, as also what tests assign to a variable, can be
    read by a program that looks for them in the interpreter's frames. And a name that the tests
    neither make nor import is the program's, unless it is in IMPORTS.
    """
    row = example["id"] + 1
    tests = example.get(column)
    if not tests:
        raise UserError(f"reward code_tests needs {column!r}, and row {row} has none")
    code = program(trajectory, example, ("python", "py", "python3"))
    if not code or not code.strip():
        return 0.0
    until = asyncio.get_running_loop().time() + seconds
    text, pairs = _read(tests, row)
    if text is None:
        passed, count = await _outputs(code, pairs, partial, until)
    else:
        text = "\n".join([*_setup(example), text])
        steps, own = _steps(text, example.get("entry_point"), row)
        passed, count = await _asserts(code, steps, own, until, row)
    if not count:
        return None
    return passed / count if partial else float(passed == count)


async def _run(text, until):
    """The output of a text in the sandbox, also of one that failed; and whether it ended well."""
    from tools.python import python

    DEADLINE.set(max(1.0, until - asyncio.get_running_loop().time()))
    try:
        async with asyncio.timeout_at(until):
            return await python(text), True
    except TimeoutError:
        return "", False
    except ToolError as error:
        return error.text, False


def _read(tests, row):
    """(text, None) of tests that are asserts, or (None, (input, output) of each)."""
    try:
        if isinstance(tests, str) and tests.lstrip()[:1] in "[{":
            tests = json.loads(tests)
        if isinstance(tests, str):
            return tests, None
        if isinstance(tests, list) and all(isinstance(test, str) for test in tests):
            return "\n".join(tests), None
        if isinstance(tests, dict):
            found = list(zip(tests["inputs"], tests["outputs"], strict=True))
            if tests.get("fn_name"):
                return _calls(tests["fn_name"], found), None
        else:
            found = [(test["input"], test["output"]) for test in tests]
        return None, [
            tuple(part if isinstance(part, str) else "\n".join(part) for part in pair)
            for pair in found
        ]
    except (KeyError, TypeError, ValueError) as error:
        forms = 'asserts, or a list of {"input": text, "output": text}, or fn_name with lists'
        what = f"reward code_tests: the tests of row {row} cannot be read ({error!r})"
        raise UserError(f"{what}: expected {forms}") from None


def _calls(name, found):
    """(arguments, result) of each call of a function, or of a method of Solution, as asserts. JSON
    has no tuples, so lists are the same. If all results are lists of one, which of them are only
    wrapped in one cannot be told: then both are right."""
    wrapped = all(isinstance(right, list) and len(right) == 1 for _, right in found)
    lines = [
        f"_solution = globals().get({name!r}) or Solution().{name}",
        "def _listed(x):\n"
        "    return [_listed(item) for item in x] if isinstance(x, (list, tuple)) else x",
    ]
    for given, right in found:
        if not isinstance(given, list):
            raise ValueError(f"{given!r} is no list of arguments")
        rights = (right, right[0]) if wrapped else (right,)
        lines.append(f"assert _listed(_solution(*{given!r})) in {rights!r}")
    return "\n".join(lines)


def _setup(example):
    """The columns that MBPP has beside its tests: a text or a list of texts each, or None."""
    for column in ("test_imports", "test_setup_code"):
        text = example.get(column) or ""
        yield text if isinstance(text, str) else "\n".join(text)


_STDIN = """
def _main(solution, given):
    import linecache, os, sys, types
    linecache.cache.clear()
    with open("stdin", "wb") as file:
        file.write(given.encode("utf-8", "surrogatepass"))
    os.dup2(os.open("stdin", os.O_RDONLY), 0)
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = open(os.devnull, "w")
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    module.exit = module.quit = sys.exit
    exec(compile(solution, "<solution>", "exec"), module.__dict__)
"""


async def _outputs(code, pairs, partial, until):
    """(tests passed, tests): a process for each, whose output is compared here."""
    from tools.python import NO_OUTPUT

    pairs = [
        (given, expected)
        for given, expected in pairs
        if len(expected) <= LONGEST_OUTPUT and len(repr(given).encode("utf-8", "replace")) <= ROOM
    ]
    passed = 0
    for given, expected in pairs:
        text, ended = await _run(f"{_STDIN}\n_main({code!r}, {given!r})", until)
        text = "" if text == NO_OUTPUT else text
        right = ended and _lines(text) == _lines(expected)
        passed += right
        if not right and not partial:
            break
    return passed, len(pairs)


def _lines(text):
    return [line.rstrip() for line in text.rstrip().split("\n")]


# What runs beside the program: it computes values, and writes them down as JSON with a tag at each
# container. `steps` are (source, None) to execute, or (source, expressions) to evaluate.
_VALUES = """
def _main(solution, steps, mark, own):
    import json, linecache, os, sys, types
    linecache.cache.clear()
    write, dumps = os.write, json.dumps
    sys.set_int_max_str_digits(0)

    def plain(value):
        if type(value).__module__.partition(".")[0] == "numpy":
            value = value.tolist()
        if value is None or isinstance(value, bool):
            return value
        for kind in (int, float, str):
            if isinstance(value, kind):
                return kind(value)
        if isinstance(value, dict):
            return ["dict", [[plain(k), plain(v)] for k, v in value.items()]]
        for kind, name in kinds:
            if isinstance(value, kind):
                return [name, [plain(item) for item in value]]
        if isinstance(value, complex):
            return ["complex", [value.real, value.imag]]
        raise TypeError

    kinds = (list, "list"), (tuple, "tuple"), ((set, frozenset), "set"), (bytes, "bytes")
    module = sys.modules["solution"] = types.ModuleType("solution")
    module.exit = module.quit = sys.exit
    sys.stdout = sys.stderr = open(os.devnull, "w")
    exec(compile(solution, "<solution>", "exec"), module.__dict__)
    for name in own:
        module.__dict__.setdefault(name)
    for number, (source, expressions) in enumerate(steps):
        try:
            if expressions is None:
                exec(source, module.__dict__)
            values = [eval(text, module.__dict__) for text in expressions or ()]
            line = f"{mark} {number} {dumps(plain(values))}\\n"
        except Exception:
            continue
        write(1, line.encode())
"""

# What runs in another process, without the program: the asserts, with its values put in, in order
# with the statements (text None) that they need.
_VERDICTS = """
def _main(steps):
    import json, sys
    sys.set_int_max_str_digits(0)

    def made(item):
        if not isinstance(item, list):
            return item
        name, parts = item
        if name == "dict":
            return {made(k): made(v) for k, v in parts}
        if name == "complex":
            return complex(*parts)
        kinds = {"list": list, "tuple": tuple, "set": set, "bytes": bytes}
        return kinds[name](made(part) for part in parts)

    space, passed = {"__name__": "tests"}, 0
    for source, text in steps:
        try:
            if text is None:
                exec(source, space)
            else:
                space["_values"] = made(json.loads(text))
                passed += bool(eval(source, space))
        except Exception as error:
            if text is None:
                return f"broken: {source} raises {type(error).__name__}: {error}"
    return passed
"""


@dataclass
class _Step:
    """One statement of the tests."""

    source: str  # of an assert whose values are computed apart: its condition, with _values[0], …
    expressions: list[str] | None = None  # of such an assert: its values, computed by the program
    needs_program: bool = False  # else it is executed in both processes
    is_test: bool = False


async def _asserts(code, steps, own, until, row):
    """(tests passed, tests) of the steps that `_steps` made of the asserts. own: names of builtins
    that only count if they are the program's."""
    mark = secrets.token_hex(8)  # what the program writes itself must not be taken for values
    # What has to come out stays here.
    beside = [(s.source if s.expressions is None else "", s.expressions) for s in steps]
    if len(repr(beside).encode("utf-8", "replace")) > ROOM:
        return 0, 0
    text, _ = await _run(f"{_VALUES}\n_main({code!r}, {beside!r}, {mark!r}, {own!r})", until)
    values = {}
    for line in text.splitlines():
        begin, _, rest = line.partition(" ")
        number, _, found = rest.partition(" ")
        if begin == mark and number in map(str, range(len(steps))):
            values[int(number)] = found
    passed = sum(steps[n].is_test and steps[n].expressions is None for n in values)
    elsewhere = []
    for number, step in enumerate(steps):
        if step.expressions is None and not step.needs_program:
            elsewhere.append((step.source, None))
        elif step.expressions is not None and number in values:
            elsewhere.append((step.source, values[number]))
    if any(found is not None for _, found in elsewhere):
        text, _ = await _run(f"{_VERDICTS}\nprint(_main({elsewhere!r}))", until)
        last = text.rpartition("\n")[2]
        if last.startswith("broken: "):
            raise UserError(f"reward code_tests: in the tests of row {row}, {last[8:]}")
        passed += int(last) if last.isdecimal() else 0  # else stopped at a limit
    return passed, sum(step.is_test for step in steps)


@functools.lru_cache(maxsize=4096)  # the samples of a group have the same tests
def _steps(text, entry, row):
    """(the tests as a list of _Step, the names of builtins among them that are the program's)."""
    try:
        body, entry = _opened(ast.parse(text).body, entry)
    except (SyntaxError, ValueError) as error:
        what = f"reward code_tests: the tests of row {row} are no python"
        raise UserError(f"{what}: {error}") from None
    imports = _imports(body, entry)
    known, own = BUILTINS | set(imports), {entry} & BUILTINS
    steps = _split(body, known - own)
    if not any(step.is_test for step in steps):
        raise UserError(f"reward code_tests: the tests of row {row} have no assert")
    if not any(step.expressions or step.needs_program for step in steps):  # MBPP: sum(10, 15) == 6
        called = [_called(one) for one in body if isinstance(one, ast.Assert)]
        own = set.intersection(*called) & BUILTINS
        if len(own) != 1:
            what = f"reward code_tests: row {row} tests only builtins"
            raise UserError(f"{what}: name the program's function in its column entry_point")
        steps = _split(body, known - own)
    return [_Step(source) for source in imports.values()] + steps, tuple(own)


def _split(body, known):
    """A _Step for each statement. known: the names that the tests have without the program."""
    variables, steps = set(), []
    for statement in body:
        source, bound = ast.unparse(statement), _bound(statement)
        if isinstance(statement, ast.Assert):
            values = _Values(known)
            condition = values.visit(copy.deepcopy(statement.test))
            if values.hidden:
                steps.append(_Step(source, needs_program=True, is_test=True))
            else:
                steps.append(_Step(ast.unparse(condition), values.found, is_test=True))
            changed = {name for found in values.found for name in _used(ast.parse(found))}
        elif _used(statement) - bound <= known:
            steps.append(_Step(source))
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                bound = {statement.name}
            elif not isinstance(statement, (ast.Import, ast.ImportFrom)):
                variables |= bound
            known = known | bound
            continue
        else:
            is_test = isinstance(statement, ast.Expr) or any(
                isinstance(node, ast.Assert) for node in ast.walk(statement)
            )
            steps.append(_Step(source, needs_program=True, is_test=is_test))
            changed = _used(statement) | bound
        # What the program may have changed is its own now.
        known = known - (changed & variables | bound)
    return steps


def _imports(body, entry):
    """{name: its import} of what the tests use and do not import, because the program that they
    were written for did: else the program at hand would compute it, and what has to come out too.
    Not where it may be the program's own: bisect(3), Counter().stop(), or all that the tests use.
    In its process a name that it has stays as it is."""
    tree, found = ast.Module(body, []), {}
    lacking = _used(tree) - _bound(tree) - BUILTINS - {entry}
    for name in sorted(lacking & set(IMPORTS)) if entry or lacking - set(IMPORTS) else ():
        module, _, part = IMPORTS[name].partition(":")
        nodes = list(ast.walk(tree))
        uses = [n for n in nodes if isinstance(n, ast.Name) and n.id == name]
        calls = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == name]
        taken = [n for n in nodes if isinstance(n, ast.Attribute)]
        if part:  # what a variable holds is not followed
            taken = [n for n in taken if n.value in calls]
            inside = all(isinstance(one, ast.Assert) for one in body if name in _used(one))
            is_its = inside and len(uses) == len(calls)
        else:
            taken = [n for n in taken if n.value in uses]
            is_its = len(uses) == len(taken)
        has = set(dir(pkgutil.resolve_name(IMPORTS[name])))
        if is_its and {n.attr for n in taken} <= has:
            line = f"from {module} import {part}" if part else f"import {module} as {name}"
            found[name] = f"try:\n    {name}\nexcept NameError:\n    {line}"
    return found


def _opened(body, entry):
    """(the statements, the name of the program's function or None): with those inside of
    `def check(candidate)` in its place, if it is known for which function it is called: by the
    row's entry_point, or by a call check(name)."""
    checks = [one for one in body if isinstance(one, ast.FunctionDef) and one.name == "check"]
    calls = [
        one
        for one in body
        if isinstance(one, ast.Expr) and re.fullmatch(r"check\(\w+\)", ast.unparse(one))
    ]
    entry = calls[-1].value.args[0].id if calls else entry
    if len(checks) != 1 or len(checks[0].args.args) != 1 or not entry:
        return body, entry
    given = ast.parse(f"{checks[0].args.args[0].arg} = {entry}").body
    inside = [one for one in checks[0].body if not isinstance(one, ast.Return)]
    rest = [one for one in body if one not in calls and one is not checks[0]]
    return rest + given + inside, entry


def _bound(tree):
    """All names that the code makes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
    return names


def _used(tree):
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _called(tree):
    """The names that the code calls."""
    return {
        n.func.id
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }


def _handed(tree):
    """The names that the code uses bare, not as the beginning of `f(2)`, `a.b` or `a[0]`."""
    begins = {id(_begin(node)) for node in ast.walk(tree)}
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in begins}


def _begin(node):
    """What a chain of calls, attributes and indices begins with; None for another node."""
    root = node
    while isinstance(root, (ast.Call, ast.Attribute, ast.Subscript)):
        root = root.func if isinstance(root, ast.Call) else root.value
    return None if root is node else root


class _Values(ast.NodeTransformer):
    """Replaces each largest part of an expression that begins with a name that is not `known`, such
    as `f(2)[0].x`, by `_values[i]`; `found` are their sources. A call that is handed such a name,
    as in `sorted(a, key=f)`, is one of them. hidden: one cannot be taken out."""

    def __init__(self, known):
        self.known, self.found, self.hidden = known, [], False

    def visit(self, node):
        begin = _begin(node) or node
        its_own = isinstance(begin, ast.Name) and begin.id not in self.known
        if its_own or (isinstance(node, ast.Call) and _handed(node) - self.known):
            self.found.append(ast.unparse(node))
            return ast.parse(f"_values[{len(self.found) - 1}]", mode="eval").body
        inner = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda, ast.NamedExpr
        if isinstance(node, inner):  # it has names of its own
            self.hidden |= not _used(node) - _bound(node) <= self.known
            return node
        return self.generic_visit(node)

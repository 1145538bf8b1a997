"""The reward code_tests: the model's program is run, confined, on the tests of its row.

    rewards = ("code_tests",)   # example["tests"]; with reward_options=("code_tests.partial=true",)

Whatever is wrong with the model's code is a 0. What is wrong with the row stops the run and says
which row it is: a 0 in its place would be trained on.

Of an assert the program only computes the values: `_steps_of` takes the tests apart, `_run_steps`
has them computed in one process and compared in another.
"""

import ast
import asyncio
import builtins
import copy
import functools
import pkgutil
import secrets
from dataclasses import dataclass

from grading.answers import program
from run.config import UserError
from tools import ToolError
from tools.calling.base import DEADLINE
from tools.python import NO_OUTPUT, python
from tools.sandbox import row_tests

ROOM = 60_000  # bytes of a test, written as python: with the program it must fit into one call
LONGEST_OUTPUT = 15_000  # characters: the sandbox cuts longer ones
BUILTINS = frozenset(dir(builtins))

# What tests use as if it were there -> "module" or "module:name".
MODULES = (
    "bisect cmath collections copy datetime decimal fractions functools heapq itertools json "
    "math numpy operator random re statistics string"
).split()
IMPORTS = {name: name for name in MODULES}
IMPORTS |= {
    "Counter": "collections:Counter",
    "OrderedDict": "collections:OrderedDict",
    "defaultdict": "collections:defaultdict",
    "deque": "collections:deque",
    "Decimal": "decimal:Decimal",
    "Fraction": "fractions:Fraction",
    "np": "numpy",
}

# Functions of python that are given one value of the program: it applies them itself, since what
# they are given may not leave its process: list(generator), str(date), next(iterator).
CONVERTERS = frozenset(
    "list tuple set frozenset dict sorted str repr next sum len float int bool abs min max any all"
    " round bytes".split()
)
MOST_ITEMS = 10_000  # of an iterator, which may have no end
UNKNOWN = "?"  # in place of values that could not be carried from process to process

# ---- the reward


async def code_tests(
    trajectory, example, *, column: str = "tests", partial: bool = False, seconds: float = 20.0
):
    """Gives 1.0 if the model's program passes all tests of example["tests"]; with partial, the
    share that it passes.

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
    numbers, Decimal and Fraction too, texts, lists, tuples, sets, dicts and their keys, deques,
    ranges, bytes, dates and times, or of numpy, python's own types, and iterators over such; all
    together at most 20,000 characters, which is what the sandbox shows. What does not fit fails. Of
    a bare `assert f(2)`, or `f(2) is None`, only whether it holds is needed. Where values of other
    kinds decide, the reward is None: those of a library's class that has an own ==, and all where
    the program's values are compared with each other only.
    np.allclose and np.isclose hold for equal shapes only, or beside one number.
    What is not covered: asserts in a loop or a comprehension, and functions of the tests that are
    given the program's. They run beside the program and fail only if they raise, so an object that
    is equal to everything passes, and such tests, as also what tests assign to a variable, can be
    read by a program that looks for them in the interpreter's frames. A test that only asks for
    all elements of a value, such as np.all(np.array(f(2)) == 4), holds for an empty one. And a name
    that the tests neither make nor import is the program's, unless it is in IMPORTS.
    """
    row_number = example["id"] + 1
    tests = example.get(column)
    if not tests:
        raise UserError(f"reward code_tests needs {column!r}, and row {row_number} has none")
    code = program(trajectory, example, ("python", "py", "python3"))
    if not code or not code.strip():
        return 0.0

    until = asyncio.get_running_loop().time() + seconds
    asserts, pairs = row_tests.read(tests, f"reward code_tests: the tests of row {row_number}")
    unknown = 0
    if asserts is None:
        passed, count = await _run_pairs(code, pairs, partial, until)
    else:
        text = "\n".join([*row_tests.columns_of_mbpp(example), asserts])
        steps, own_builtins = _steps_of(text, example.get("entry_point"), row_number)
        passed, count, unknown = await _run_steps(code, steps, own_builtins, until, row_number)
    if partial:
        known = count - unknown
        return passed / known if known else None
    if not count or (unknown and passed + unknown == count):
        return None
    return float(passed == count)


async def _run(code, until):
    """Runs code in the sandbox, up to the time `until` of the event loop. Returns its output, also
    that of one that failed, and whether it ended well."""
    left = until - asyncio.get_running_loop().time()
    DEADLINE.set(max(1.0, left))
    try:
        async with asyncio.timeout_at(until):
            return await python(code), True
    except TimeoutError:
        return "", False
    except ToolError as error:
        return error.text, False


# ---- tests of stdin and stdout

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


async def _run_pairs(code, pairs, partial, until):
    """Runs each pair in a process, whose output is compared here: (tests passed, tests)."""
    pairs = [pair for pair in pairs if _fits(*pair)]
    passed = 0
    for given, expected in pairs:
        output, ended_well = await _run(f"{_STDIN}\n_main({code!r}, {given!r})", until)
        if output == NO_OUTPUT:
            output = ""
        if ended_well and row_tests.lines(output) == row_tests.lines(expected):
            passed += 1
        elif not partial:
            break
    return passed, len(pairs)


def _fits(given, expected):
    """Says whether the sandbox takes such an input and shows such an output whole."""
    return len(expected) <= LONGEST_OUTPUT and _size(given) <= ROOM


def _size(value):
    """Counts the bytes of a value, written as python."""
    return len(repr(value).encode("utf-8", "replace"))


# ---- asserts, run


@dataclass
class _Step:
    """One statement of the tests."""

    source: str  # of an assert whose values are computed apart: its condition, with _values[0], …
    # Of such an assert its values, computed by the program, as (source, names of CONVERTERS).
    expressions: list[tuple[str, tuple[str, ...]]] | None = None
    is_closed: bool = False  # it has nothing but values of the program: P(3) == make(3)
    needs_program: bool = False  # else it is executed in both processes
    is_test: bool = False


# What runs beside the program: it computes values, and writes them down as JSON with a tag at each
# container. `steps` are (source, None, False) to execute, or ("", expressions, is_closed) to
# evaluate. What it needs to write is taken before the program runs, which may replace functions of
# os and json.
_VALUES = """
def _main(solution, steps, mark, own):
    import builtins, collections, datetime, decimal, fractions, itertools, json, linecache, os
    import sys, types
    linecache.cache.clear()
    write = os.write
    dumps = json.dumps
    first = itertools.islice
    sys.set_int_max_str_digits(0)
    applied = {name: getattr(builtins, name) for name in CONVERTERS}
    applied["is_none"] = lambda value: value is None

    class NotPlain(Exception):
        pass

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
        for kind, name, parts in of_parts:
            if isinstance(value, kind):
                return [name, [plain(part) for part in parts(value)]]
        if is_iterator(value):
            items = list(first(value, MOST_ITEMS + 1))
            if len(items) <= MOST_ITEMS:
                return ["iterator", [plain(item) for item in items]]
        if isinstance(value, type) and vars(builtins).get(value.__name__) is value:
            return ["type", [value.__name__]]
        raise NotPlain(value)

    # One of python's own, such as a generator, map or zip.
    def is_iterator(value):
        kind = type(value)
        return kind.__module__ in ("builtins", "itertools") and hasattr(kind, "__next__")

    kinds = (
        (list, "list"), (tuple, "tuple"), (set, "set"), (frozenset, "frozenset"),
        (bytes, "bytes"), (bytearray, "bytes"), (collections.deque, "deque"),
        (type({}.keys()), "keys"), (type({}.values()), "values"), (type({}.items()), "items"),
    )
    of_parts = (
        (slice, "slice", lambda x: (x.start, x.stop, x.step)),
        (complex, "complex", lambda x: (x.real, x.imag)),
        (range, "range", lambda x: (x.start, x.stop, x.step)),
        (decimal.Decimal, "Decimal", lambda x: (str(x),)),
        (fractions.Fraction, "Fraction", lambda x: (x.numerator, x.denominator)),
        (datetime.datetime, "datetime", lambda x: (x.isoformat(),)),
        (datetime.date, "date", lambda x: (x.isoformat(),)),
        (datetime.time, "time", lambda x: (x.isoformat(),)),
        (datetime.timedelta, "timedelta", lambda x: (x.days, x.seconds, x.microseconds)),
    )

    # Whether another process could find it equal to something: not what is equal to itself only,
    # as a function or an iterator, and nothing that the program made.
    def is_comparable(value):
        kind = type(value)
        is_foreign = kind.__module__ not in ("solution", "__main__", "builtins")
        return is_foreign and kind.__eq__ is not object.__eq__

    module = sys.modules["solution"] = types.ModuleType("solution")
    module.exit = module.quit = sys.exit
    sys.stdout = sys.stderr = open(os.devnull, "w")
    exec(compile(solution, "<solution>", "exec"), module.__dict__)
    for name in own:
        module.__dict__.setdefault(name)
    for number, (source, expressions, is_closed) in enumerate(steps):
        try:
            if expressions is None:
                exec(source, module.__dict__)
            values = []
            for text, converters in expressions or ():
                value = eval(text, module.__dict__)
                for name in converters:
                    value = applied[name](value)
                values.append(value)
            text = dumps(plain(values))
        except NotPlain as error:
            if not is_closed and not is_comparable(error.args[0]):
                continue
            text = "?"
        except Exception:
            continue
        write(1, f"{mark} {number} {text}\\n".encode())
""".replace("in CONVERTERS}", f"in {sorted(CONVERTERS)}}}").replace('"?"', repr(UNKNOWN))
_VALUES = _VALUES.replace("MOST_ITEMS", str(MOST_ITEMS))

# What runs in another process, without the program: the asserts, with its values put in, in order
# with the statements (text None) that they need.
_VERDICTS = """
def _main(steps):
    import builtins, collections, datetime, decimal, fractions, json, sys
    sys.set_int_max_str_digits(0)
    kinds = {
        "list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "bytes": bytes,
        "deque": collections.deque,
        "iterator": iter,
        "keys": lambda items: dict.fromkeys(items).keys(),
        "values": lambda items: dict(enumerate(items)).values(),
        "items": lambda items: dict(items).items(),
    }
    of_parts = {
        "complex": complex,
        "range": range,
        "slice": slice,
        "type": lambda name: getattr(builtins, name),
        "Decimal": decimal.Decimal,
        "Fraction": fractions.Fraction,
        "datetime": datetime.datetime.fromisoformat,
        "date": datetime.date.fromisoformat,
        "time": datetime.time.fromisoformat,
        "timedelta": datetime.timedelta,
    }

    def made(item):
        if not isinstance(item, list):
            return item
        name, parts = item
        if name == "dict":
            return {made(k): made(v) for k, v in parts}
        if name in of_parts:
            return of_parts[name](*map(made, parts))
        return kinds[name](made(part) for part in parts)

    # np.allclose([], 987.6) is True, and so is np.allclose(1, [1, 1])
    def same_shape(value, expected):
        import numpy
        shape = numpy.shape(value)
        expected_shape = numpy.shape(expected)
        return shape == expected_shape or (expected_shape == () and 0 not in shape)

    space = {"__name__": "tests", "_same_shape": same_shape}
    passed = 0
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


async def _run_steps(code, steps, own_builtins, until, row_number):
    """Runs the steps that `_steps_of` made of the asserts: (tests passed, tests, tests whose values
    cannot be compared). own_builtins: names of builtins that only count if they are the
    program's."""
    # 1. beside the program: its values. What has to come out of an assert stays here.
    orders = []
    for step in steps:
        source = step.source if step.expressions is None else ""
        orders.append((source, step.expressions, step.is_closed))
    if _size(orders) > ROOM:
        return 0, 0, 0
    mark = secrets.token_hex(8)  # what the program writes itself must not be taken for values
    arguments = f"{code!r}, {orders!r}, {mark!r}, {own_builtins!r}"
    output, _ = await _run(f"{_VALUES}\n_main({arguments})", until)
    values = _values_in(output, mark, len(steps))
    unknown = [number for number, text in values.items() if text == UNKNOWN]
    for number in unknown:
        del values[number]

    # 2. tests that ran beside the program, and did not raise
    passed = 0
    for number in values:
        if steps[number].is_test and steps[number].expressions is None:
            passed += 1

    # 3. in another process, without the program: the conditions, with its values put in
    comparisons = []
    for number, step in enumerate(steps):
        if step.expressions is not None:
            if number in values:
                comparisons.append((step.source, values[number]))
        elif not step.needs_program:
            comparisons.append((step.source, None))
    if any(text is not None for _, text in comparisons):
        output, _ = await _run(f"{_VERDICTS}\nprint(_main({comparisons!r}))", until)
        verdict = output.rpartition("\n")[2]
        if verdict.startswith("broken: "):
            problem = verdict.removeprefix("broken: ")
            raise UserError(f"reward code_tests: in the tests of row {row_number}, {problem}")
        if verdict.isdecimal():  # else it was stopped at a limit
            passed += int(verdict)
    return passed, sum(step.is_test for step in steps), len(unknown)


def _values_in(output, mark, count):
    """Reads the lines that begin with the mark: {number of a step: its values as JSON}."""
    numbers = {str(number) for number in range(count)}
    values = {}
    for line in output.splitlines():
        begin, _, behind = line.partition(" ")
        number, _, text = behind.partition(" ")
        if begin == mark and number in numbers:
            values[int(number)] = text
    return values


# ---- asserts, taken apart


@functools.lru_cache(maxsize=4096)  # the samples of a group have the same tests
def _steps_of(text, entry, row_number):
    """Splits the tests into a list of _Step, and finds the names of builtins among them that are
    the program's. entry: the name of the program's function, or None."""
    try:
        body, entry = _open_check(ast.parse(text).body, entry)
    except (SyntaxError, ValueError) as error:
        what = f"reward code_tests: the tests of row {row_number} are no python"
        raise UserError(f"{what}: {error}") from None
    imports = _lacking_imports(body, entry)
    known = BUILTINS | set(imports)
    own_builtins = {entry} & BUILTINS
    steps = _split(body, known - own_builtins)
    if not any(step.is_test for step in steps):
        raise UserError(f"reward code_tests: the tests of row {row_number} have no assert")
    if not any(step.expressions or step.needs_program for step in steps):
        # MBPP has sum(10, 15) == 6: the one builtin that all asserts call is the program's
        called = [_called(statement) for statement in body if isinstance(statement, ast.Assert)]
        own_builtins = set.intersection(*called) & BUILTINS
        if len(own_builtins) != 1:
            what = f"reward code_tests: row {row_number} tests only builtins"
            raise UserError(f"{what}: name the program's function in its column entry_point")
        steps = _split(body, known - own_builtins)
    before = [_Step(source) for source in imports.values()]
    return before + steps, tuple(own_builtins)


def _open_check(body, entry):
    """Opens `def check(candidate)`: (the statements, with those inside of it in its place, the name
    of the program's function or None), if it is known for which function it is called: by the row's
    entry_point, or by a call check(name)."""
    calls = [statement for statement in body if _calls_check(statement)]
    if calls:
        entry = calls[-1].value.args[0].id
    functions = [statement for statement in body if isinstance(statement, ast.FunctionDef)]
    checks = [function for function in functions if function.name == "check"]
    if len(checks) != 1 or len(checks[0].args.args) != 1 or not entry:
        return body, entry
    check = checks[0]
    candidate = check.args.args[0].arg
    assignment = ast.parse(f"{candidate} = {entry}").body
    inside = [statement for statement in check.body if not isinstance(statement, ast.Return)]
    dropped = [check, *calls]
    outside = [statement for statement in body if statement not in dropped]
    return outside + assignment + inside, entry


def _calls_check(statement):
    """Says whether a statement is a call check(name)."""
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
        return False
    call = statement.value
    if not isinstance(call.func, ast.Name) or call.func.id != "check" or call.keywords:
        return False
    return len(call.args) == 1 and isinstance(call.args[0], ast.Name)


def _split(body, known):
    """Makes a _Step of each statement. known: the names that the tests have without the program."""
    converters = CONVERTERS - _bound(ast.Module(body, []))
    variables = set()  # what statements of the tests assigned, and did not define or import
    steps = []
    for statement in body:
        source = ast.unparse(statement)
        bound = _bound(statement)
        if isinstance(statement, ast.Assert):
            step, touched = _take_apart(statement, known, converters & known)
        elif _used(statement) - bound <= known:
            steps.append(_Step(source))
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                bound = {statement.name}
            elif not isinstance(statement, (ast.Import, ast.ImportFrom)):
                variables |= bound
            known = known | bound
            continue
        else:
            asserts = [node for node in ast.walk(statement) if isinstance(node, ast.Assert)]
            is_test = isinstance(statement, ast.Expr) or bool(asserts)
            step = _Step(source, needs_program=True, is_test=is_test)
            touched = _used(statement) | bound
        steps.append(step)
        # What the program may have changed is its own now.
        known = known - (touched & variables) - bound
    return steps


def _take_apart(statement, known, converters):
    """Makes the _Step of an assert, and finds the names that the program sees in it."""
    values = _Values(known, converters)
    condition = values.visit_truth(copy.deepcopy(statement.test))
    touched = set()
    for source, _ in values.sources:
        touched |= _used(ast.parse(source))
    if values.is_hidden:
        return _Step(ast.unparse(statement), needs_program=True, is_test=True), touched
    step = _Step(ast.unparse(condition), values.sources, is_test=True)
    step.is_closed = _has_only_values(condition)
    return step, touched


def _has_only_values(condition):
    """Says whether a condition is made of `_values[i]` and nothing else."""
    indices = set()
    for node in ast.walk(condition):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "_values":
            indices |= {node.value, node.slice}
    leaves = [node for node in ast.walk(condition) if isinstance(node, (ast.Name, ast.Constant))]
    return all(leaf in indices for leaf in leaves)


class _Values(ast.NodeTransformer):
    """Replaces each largest part of an expression that begins with a name that is not `known`, such
    as `f(2)[0].x`, by `_values[i]`; `sources` are theirs, each with the names of `converters` that
    are applied to it. A call that is handed such a name, as in `sorted(a, key=f)`, is one of them.
    is_hidden: one cannot be taken out."""

    SCOPES = (
        ast.ListComp,
        ast.SetComp,
        ast.DictComp,
        ast.GeneratorExp,
        ast.Lambda,
        ast.NamedExpr,
    )

    def __init__(self, known, converters=frozenset()):
        self.known = known
        self.converters = converters
        self.sources = []
        self.is_hidden = False

    def visit(self, node):
        if self.is_the_programs(node):
            return self.value(node)
        inner = node
        converters = []
        while self.converts(inner):
            converters.insert(0, inner.func.id)
            inner = inner.args[0]
        if converters and self.is_the_programs(inner):
            return self.value(inner, converters)
        if isinstance(node, self.SCOPES):  # it has names of its own
            if not _used(node) - _bound(node) <= self.known:
                self.is_hidden = True
            return node
        return super().visit(node)

    def visit_truth(self, node):
        """Visits a condition: of a value that only has to be true, or None, that is all there is to
        know, so a match of `re` need not leave the program's process."""
        if isinstance(node, ast.BoolOp):
            node.values = [self.visit_truth(part) for part in node.values]
            return node
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            node.operand = self.visit_truth(node.operand)
            return node
        if _compares_with_none(node) and self.is_the_programs(node.left):
            value = self.value(node.left, ["is_none"])
            if isinstance(node.ops[0], ast.Is):
                return value
            return ast.UnaryOp(ast.Not(), value)
        if self.is_the_programs(node):
            return self.value(node, ["bool"])
        return self.visit(node)

    def visit_Call(self, node):
        """Lets np.allclose(value, expected) hold for equal shapes only."""
        node = self.generic_visit(node)
        is_numpys = isinstance(node.func, ast.Attribute) and _begins_with_numpy(node.func)
        if not is_numpys or node.func.attr not in ("allclose", "isclose") or len(node.args) < 2:
            return node
        value, expected = node.args[:2]
        if "_values" not in _used(value):
            value, expected = expected, value
        shapes = f"_same_shape({ast.unparse(value)}, {ast.unparse(expected)})"
        return ast.parse(f"({shapes} and {ast.unparse(node)})", mode="eval").body

    def value(self, node, converters=()):
        """Writes what stands in the condition for a value of the program."""
        self.sources.append((ast.unparse(node), tuple(converters)))
        return ast.parse(f"_values[{len(self.sources) - 1}]", mode="eval").body

    def converts(self, node):
        """Says whether it is a call such as list(x), of one of the converters."""
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            return False
        if node.func.id not in self.converters or node.keywords or len(node.args) != 1:
            return False
        return not isinstance(node.args[0], ast.Starred)

    def is_the_programs(self, node):
        """Says whether only the program can compute it."""
        begin = _begin(node) or node
        if isinstance(begin, ast.Name) and begin.id not in self.known:
            return True
        return isinstance(node, ast.Call) and not _handed(node, self.known) <= self.known


def _compares_with_none(node):
    """Says whether a node is `x is None` or `x is not None`."""
    if not isinstance(node, ast.Compare) or len(node.ops) != 1:
        return False
    right = node.comparators[0]
    is_none = isinstance(right, ast.Constant) and right.value is None
    return is_none and isinstance(node.ops[0], (ast.Is, ast.IsNot))


def _begins_with_numpy(node):
    begin = _begin(node)
    return isinstance(begin, ast.Name) and begin.id in ("np", "numpy")


# ---- what tests use and do not import


def _lacking_imports(body, entry):
    """Finds {name: its import} of what the tests use and do not import, because the program that
    they were written for did: else the program at hand would compute it, and what has to come out
    too. Not where it may be the program's own: bisect(3), Counter().stop(), or all that the tests
    use. In its process a name that it has stays as it is."""
    tree = ast.Module(body, [])
    lacking = _used(tree) - _bound(tree) - BUILTINS - {entry}
    if not entry and lacking <= IMPORTS.keys():
        return {}
    imports = {}
    for name in sorted(lacking & IMPORTS.keys()):
        if not _is_the_librarys(name, body):
            continue
        module, _, part = IMPORTS[name].partition(":")
        line = f"from {module} import {part}" if part else f"import {module} as {name}"
        imports[name] = f"try:\n    {name}\nexcept NameError:\n    {line}"
    return imports


def _is_the_librarys(name, body):
    """Says whether the tests use a name only as what IMPORTS has for it can be used."""
    nodes = list(ast.walk(ast.Module(body, [])))
    uses = {node for node in nodes if isinstance(node, ast.Name) and node.id == name}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    if ":" in IMPORTS[name]:  # a class: it is only called, Counter(x).most_common()
        calls = {node for node in nodes if isinstance(node, ast.Call) and node.func in uses}
        users = [statement for statement in body if name in _used(statement)]
        # what a variable holds is not followed
        in_asserts = all(isinstance(statement, ast.Assert) for statement in users)
        taken = [node for node in attributes if node.value in calls]
        if not in_asserts or len(uses) != len(calls):
            return False
    else:  # a module: each use takes something from it
        taken = [node for node in attributes if node.value in uses]
        if len(uses) != len(taken):
            return False
    there = dir(pkgutil.resolve_name(IMPORTS[name]))
    return all(node.attr in there for node in taken)


# ---- names in code


def _bound(tree):
    """Collects all names that the code makes."""
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
    """Collects all names that the code has, those that it makes too."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _called(tree):
    """Collects the names that the code calls."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)}


def _handed(tree, known):
    """Collects the names that the code uses bare, not as the beginning of `f(2)`, `a.b` or `a[0]`.
    Not those inside of what begins with a name that is not known: that can be taken out by
    itself."""
    begins = {_begin(node) for node in ast.walk(tree)}
    names = set()
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        begin = _begin(node)
        if isinstance(begin, ast.Name) and begin.id not in known:
            continue
        if isinstance(node, ast.Name) and node not in begins:
            names.add(node.id)
        waiting += ast.iter_child_nodes(node)
    return names


def _begin(node):
    """Finds what a chain of calls, attributes and indices begins with; None for another node."""
    root = node
    while isinstance(root, (ast.Call, ast.Attribute, ast.Subscript)):
        root = root.func if isinstance(root, ast.Call) else root.value
    return None if root is node else root

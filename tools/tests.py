"""The tests tool: runs the model's program on its row's public tests, while it solves the task.

    --tools=tests,finish             # the column public_tests, in a form that code_tests reads
    --tool_options=tests.column=tests,tests.first=1  # the first of the tests that grade it

The observation says how many pass, and of each that fails what it asks, what came out, and what was
expected. The reward code_tests has the column `tests`, and of that this tool shows nothing unless
`first` says how many may be seen: the others stay hidden. Programs run in the sandbox of the python
tool, a fresh process for each input, or for all asserts of a call.

What is covered: tests beyond the first ones never enter the process of the program. What is not:
this is no judge. A program can print that it passes; the reward asks again. And what is no assert
is shown to the program, also with `first`: a table of all expected results, say.
"""

import ast
import asyncio
import hashlib
import json

from run.config import UserError
from tools import ToolError
from tools.calling.base import DEADLINE, shorten
from tools.python import prepare
from tools.sandbox import caller, row_tests

HIDDEN = "tests"  # the column that the reward code_tests reads
FAILURES_SHOWN = 3
SHOWN = 500  # characters of an input, an output or a value


class tests:
    pure = True
    prepare = staticmethod(prepare)

    def __init__(
        self,
        example: dict,
        column: str = "public_tests",
        first: int = 0,
        unconfined: bool = False,
    ):
        """column: of the row, where the public tests are. first: only so many of them; 0: all.
        unconfined: as of the python tool. UserError if the row has none, or all would be shown by
        which it is graded."""
        if first < 0:
            raise UserError(f"tests.first = {first}: expected 0 or more")
        if column == HIDDEN and not first:
            raise UserError(
                "tests.column = 'tests' would show the model all that the reward code_tests asks: "
                "give tests.first=1, or a column of public tests"
            )
        row = f"row {example['id'] + 1}" if "id" in example else "the row"
        if not example.get(column):
            raise UserError(f"the tests tool needs the column {column!r}, and {row} has none")
        asserts, pairs = row_tests.read(example[column], f"tests tool: {column!r} of {row}")
        self.pairs = pairs[: first or None] if pairs else None
        self.asserts = None
        if asserts is not None:
            text = "\n".join([*row_tests.columns_of_mbpp(example), asserts])
            self.asserts = _first_asserts(text, first, row) if first else text
        self.entry = example.get("entry_point") or ""
        asked = json.dumps([self.asserts, self.pairs, self.entry])
        self.key = hashlib.blake2b(asked.encode(), digest_size=12).hexdigest()

    async def __call__(self, code: str) -> str:
        """Run your program on the public tests of the task, and see which fail.

        Args:
            code: The whole Python 3 program, as you would hand it in.
        """
        if self.pairs is None:
            return await self._run_asserts(code)
        return await self._run_pairs(code)

    # -- asserts: in one process, which says itself what fails

    async def _run_asserts(self, code):
        seconds = 0.6 * (DEADLINE.get() or caller.WALL_SECONDS)
        arguments = (code, self.asserts, self.entry, seconds, FAILURES_SHOWN, SHOWN)
        result = await caller.call("heavy", f"{HARNESS}\n_main(*{arguments!r})")
        return caller.observation(result)

    # -- input and output: a process for each

    async def _run_pairs(self, code):
        seconds = 0.8 * (DEADLINE.get() or caller.WALL_SECONDS) / len(self.pairs)
        failures = []
        for given, expected in self.pairs:
            output = await self._output(code, given, seconds)
            if row_tests.lines(output) != row_tests.lines(expected):
                failures.append(
                    f"fails on the input:\n{shorten(given.rstrip(), SHOWN)}\n"
                    f"it printed:\n{shorten(output.rstrip(), SHOWN)}\n"
                    f"expected:\n{shorten(expected.rstrip(), SHOWN)}"
                )
        count = len(self.pairs)
        lines = [f"{count - len(failures)} of {count} tests pass", *failures[:FAILURES_SHOWN]]
        return "\n\n".join(lines)

    async def _output(self, code, given, seconds):
        """Runs a program; returns what it prints, or how it failed."""
        try:
            async with asyncio.timeout(seconds):
                return caller.observation(await caller.call("light", code, given))
        except TimeoutError:
            return f"(stopped after {seconds:.1f} s)"
        except ToolError as error:
            return error.text


def _first_asserts(text, first, row):
    """Cuts the tests to so many of their asserts, those inside of functions counted too."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"tests tool: the tests of {row} are no python: {error}") from None
    asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    asserts.sort(key=lambda node: node.lineno)
    hidden = asserts[first:]

    class Hide(ast.NodeTransformer):
        def visit_Assert(self, node):
            return ast.Pass() if node in hidden else node

    return ast.unparse(Hide().visit(tree))


# What runs beside the program. It takes the tests statement by statement, and says of an assert
# that fails what its left side was.
HARNESS = '''
def _main(program, tests, entry, seconds, failures_shown, shown):
    import ast, signal, sys, traceback, types

    def stop(*_):
        raise TimeoutError("it takes too long")

    def cut(text):
        return text if len(text) <= shown else text[:shown] + "..."

    def why(error):
        lines = traceback.format_exception_only(error)
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if frame.filename == "<program>":
                lines.append(f"in line {frame.lineno} of your program")
                break
        return cut(" ".join("".join(lines).split()))

    def value(node, names):
        """What a failed comparison had on its left side."""
        if not isinstance(node, ast.Compare):
            return "it is not true"
        left = eval(compile(ast.Expression(node.left), "<test>", "eval"), names)
        return cut(f"{ast.unparse(node.left)} is {left!r}")

    signal.signal(signal.SIGALRM, stop)
    module = sys.modules["solution"] = types.ModuleType("solution")
    names = module.__dict__
    names["exit"] = names["quit"] = sys.exit
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        exec(compile(program, "<program>", "exec"), names)
    except BaseException as error:
        print(f"no test was run, as your program fails: {why(error)}")
        return
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)

    statements = ast.parse(tests).body
    functions = [each.name for each in statements if isinstance(each, ast.FunctionDef)]
    calls = any("check(" in ast.unparse(each) for each in statements if isinstance(each, ast.Expr))
    if "check" in functions and entry and not calls:
        statements += ast.parse(f"check({entry})").body
    asked = [each for each in statements if isinstance(each, (ast.Assert, ast.Expr))]
    failures = []
    for statement in statements:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds / (1 + len(asked)))
            exec(compile(ast.Module([statement], []), "<test>", "exec"), names)
            continue
        except BaseException as error:
            problem = why(error)
            if isinstance(error, AssertionError) and isinstance(statement, ast.Assert):
                try:
                    problem = value(statement.test, names)
                except BaseException as again:
                    problem = why(again)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        failures.append(f"fails: {cut(ast.unparse(statement))}\\n  {problem}")
    print(f"{len(asked) - len(failures)} of {len(asked)} tests pass")
    for failure in failures[:failures_shown]:
        print(failure)
'''

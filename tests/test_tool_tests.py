"""The tools for programs: tests (a row's public tests while solving) and python_stdin.

    pytest tests/test_tool_tests.py

What takes `way` is tested with the fork server and with one process a call, as on macOS.
"""

import asyncio
import json
import os
import sys

import pytest
from until import PATIENCE

from run.config import UserError
from tools import Tool, Toolbox, ToolError
from tools.calling.base import DEADLINE
from tools.python_stdin import python_stdin
from tools.sandbox import caller as sandbox
from tools.tests import tests as tests_tool

linux = pytest.mark.skipif(sys.platform != "linux", reason="the fork server is Linux only")
ADD = "def add(a, b):\n    return a + b"


@pytest.fixture(params=[pytest.param("fork_server", marks=linux), "one_process"])
def way(request, monkeypatch):
    monkeypatch.setattr(sandbox, "has_fork_server", lambda: request.param == "fork_server")
    return request.param


# -- python_stdin


def run(code, stdin=""):
    return asyncio.run(python_stdin(code, stdin))


def test_a_program_reads_its_input(way):
    assert run("print(int(input()) + int(input()))", "20\n22\n") == "42"
    assert run("import sys\nfor line in sys.stdin: print(line.strip()[::-1])", "abc\ndef") == (
        "cba\nfed"
    )
    assert run("import sys\nsys.stdin.buffer.read()", "Grüße") == repr("Grüße".encode())
    assert run("import sys\nlen(sys.stdin.read())", "x" * 1_000_000) == "1000000"
    assert run("import os\nos.listdir('.')", "x") == "[]"  # no file of ours lies about


def test_without_input_there_is_none(way):
    assert run("import sys\nrepr(sys.stdin.read())") == repr(repr(""))
    with pytest.raises(ToolError, match="EOFError"):
        run("input()")


def test_an_input_that_is_too_long_is_refused_and_odd_ones_are_not():
    with pytest.raises(ToolError, match="stdin is longer than 4000000 bytes"):
        run("1", "x" * 4_000_001)
    assert run("print(len(input()))", "a\0b\ud800") == "4"


def test_it_is_a_tool_of_its_own_beside_python():
    box = Toolbox(["python", "python_stdin"], timeout=PATIENCE)
    python, with_stdin = (schema["function"]["parameters"] for schema in box.schemas)
    assert list(python["properties"]) == ["code"] == python["required"]
    assert list(with_stdin["properties"]) == ["code", "stdin"]
    assert with_stdin["required"] == ["code"]
    call = {"code": "print(input() * 2)", "stdin": "ab"}
    assert asyncio.run(box.open().call("python_stdin", call))[:2] == ("abab", None)


# -- tests


def asked(code, example, deadline=PATIENCE, **options):
    async def call():
        DEADLINE.set(deadline)
        return await tests_tool(example, **options)(code)

    return asyncio.run(call())


PUBLIC = {
    "public_tests": ["assert add(1, 2) == 3", "assert add(2, 2) == 4", "assert add(0, 0) < 1"]
}


def test_a_right_program_passes_all(way):
    assert asked(ADD, PUBLIC) == "3 of 3 tests pass"


def test_what_fails_is_shown_with_what_came_out():
    text = asked("def add(a, b):\n    return a * b", PUBLIC)
    assert text == "2 of 3 tests pass\nfails: assert add(1, 2) == 3\n  add(1, 2) is 2"


@pytest.mark.parametrize(
    "code, shown",
    [
        ("def add(a, b):\n    return a / (b - 2)", "ZeroDivisionError: division by zero in line 2"),
        ("def add(a): return a", "add(1, 2)"),
        ("x = 1", "NameError: name 'add' is not defined"),
        ("def add(a, b):\n  if a == 1: raise SystemExit\n  return a + b", "SystemExit"),
        ("def add(a, b):\n  while a == 1: pass\n  return a + b", "TimeoutError: it takes too long"),
        ("def add(a, b): return 'x' * 10000", "..."),
    ],
)
def test_each_way_to_fail_is_named(code, shown):
    text = asked(code, PUBLIC, deadline=4.0)
    assert "fails: assert add(1, 2) == 3\n" in text and shown in text
    assert len(text) < 5000


@pytest.mark.parametrize(
    "code, shown",
    [
        ("def add(", "SyntaxError: '(' was never closed"),
        ("1 / 0", "no test was run, as your program fails: ZeroDivisionError"),
        ("exit()", "no test was run, as your program fails: SystemExit"),
        ("while True: pass", "no test was run, as your program fails: TimeoutError"),
        ("input()", "EOFError"),
    ],
)
def test_a_program_that_does_not_run_is_told_so(code, shown):
    assert shown in asked(code, PUBLIC, deadline=2.0)


PAIRS = {
    "public_tests": [
        {"input": "1 2\n", "output": "3\n"},
        {"input": "2 2\n", "output": "4"},
    ]
}


def test_input_and_output_are_compared_as_the_reward_does(way):
    right = "a, b = map(int, input().split())\nprint(a + b, '')"
    assert asked(right, PAIRS) == "2 of 2 tests pass"
    wrong = asked("a, b = map(int, input().split())\nprint(a * b)", PAIRS)
    assert wrong == ("1 of 2 tests pass\n\nfails on the input:\n1 2\nit printed:\n2\nexpected:\n3")
    assert "ZeroDivisionError" in asked("1 / 0", PAIRS)
    assert "(stopped after " in asked("while True: pass", PAIRS, deadline=1.0)
    apps = {"public_tests": json.dumps({"inputs": ["1 2"], "outputs": ["3"]})}
    assert asked(right, apps) == "1 of 1 tests pass"
    calls = {"public_tests": {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}}
    assert asked(ADD, calls) == "1 of 1 tests pass"


CHECK = {
    "public_tests": "def check(candidate):\n    assert candidate(1, 2) == 3\n"
    "    assert candidate(2, 2) == 4",
    "entry_point": "add",
}


def test_tests_of_humaneval_and_columns_of_mbpp_are_run():
    assert asked(ADD, CHECK) == "1 of 1 tests pass"
    assert "fails: check(add)" in asked("def add(a, b): return 0", CHECK)
    mbpp = {"public_tests": "assert add(pi, 0) > 3", "test_imports": ["from math import pi"]}
    assert asked(ADD, mbpp) == "1 of 1 tests pass"


SPY = """
import sys
frame = sys._getframe()
seen = []
while frame:
    seen.append(repr(frame.f_locals) + repr(frame.f_globals))
    frame = frame.f_back
def add(a, b):
    inner = sys._getframe()
    while inner:
        seen.append(repr(inner.f_locals) + repr(inner.f_globals))
        inner = inner.f_back
    raise ValueError("SECRET" if "42" + "42" in str(seen) else "clean")
"""


def test_hidden_tests_stay_hidden_from_the_model_and_from_its_program():
    """A program that looks through the interpreter's frames finds the first test alone."""
    hidden = ["assert add(1, 2) == 3", "assert add(4000, 242) == 4242"]
    row = {"tests": hidden, "id": 0}
    with pytest.raises(UserError, match="would show the model all that the reward code_tests asks"):
        tests_tool(row, column="tests")
    assert asked(ADD, row, column="tests", first=1) == "1 of 1 tests pass"
    assert "clean" in asked(SPY, row, column="tests", first=1)
    assert "SECRET" in asked(SPY, {"public_tests": hidden})  # the spy does see what is there
    check = {"tests": CHECK["public_tests"].replace("== 4", "== 4242"), "entry_point": "add"}
    assert asked(ADD, check, column="tests", first=1) == "1 of 1 tests pass"
    pairs = {"tests": [*PAIRS["public_tests"][:1], {"input": "x", "output": "4242"}]}
    text = asked("print(open(0).read())", pairs, column="tests", first=1)
    assert text.startswith("0 of 1 tests pass") and "4242" not in text
    both = {"public_tests": hidden[:1], "tests": hidden}  # of a row with both, one is read
    assert "clean" in asked(SPY, both)


@pytest.mark.parametrize(
    "example, options, why",
    [
        ({"id": 6}, {}, "needs the column 'public_tests', and row 7 has none"),
        ({"public_tests": [3]}, {}, "'public_tests' of the row cannot be read"),
        ({"public_tests": "x"}, {"first": -1}, "tests.first = -1"),
        ({"tests": "assert ("}, {"column": "tests", "first": 1}, "of the row are no python"),
    ],
)
def test_a_row_that_cannot_be_used_stops_the_run_and_is_named(example, options, why):
    with pytest.raises(UserError, match=why):
        tests_tool(example, **options)


def test_in_a_toolbox_each_trajectory_has_the_tests_of_its_row():
    """And what was asked before is known: by the tests, not by the row."""
    parameters = {"properties": {"code": {"type": "string"}}, "required": ["code"]}
    schema = {"function": {"parameters": parameters}}
    tool = Tool("tests", schema, tests_tool.__call__, True, tests_tool, pure=True)
    box = Toolbox([tool], timeout=PATIENCE)

    async def scene():
        rows = [PUBLIC, {**PUBLIC, "id": 1}, {"public_tests": "assert add(1, 1) == 3"}]
        outcomes = []
        for row in rows:
            outcomes.append(await box.open(row).call("tests", {"code": ADD}))
        return outcomes

    first, again, other = asyncio.run(scene())
    assert first[:2] == again[:2] == ("3 of 3 tests pass", None) and again[2] == 0.0
    assert other[0].startswith("0 of 1 tests pass")
    assert Toolbox(["tests"]).schemas[0]["function"]["parameters"]["required"] == ["code"]


def test_the_rows_folder_and_the_environment_are_not_there(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    spy = "import os\ndef add(a, b): return str(dict(os.environ)) + os.getcwd()"
    assert "hunter2" not in asked(spy, PUBLIC) and os.getcwd() not in asked(spy, PUBLIC)

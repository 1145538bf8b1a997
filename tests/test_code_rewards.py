"""Pins queries.py and programs.py: queries that are compared by their rows, and programs that are
run on tests and cannot talk their way through.

pytest tests/test_code_rewards.py
"""

import asyncio
import hashlib
import json
import sqlite3
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from grading import programs, queries
from rewards import oracle, score, select
from run.config import UserError
from tools.sql import execute

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
CHINOOK = SHARED / "chinook.sqlite"


def played(text, answer=None, before=()):
    """A trajectory whose last turn is `text`. before: (role, text) of what came earlier."""
    messages = [{"role": "user", "content": "?"}]
    messages += [{"role": role, "content": said} for role, said in before]
    messages.append({"role": "assistant", "content": text})
    return SimpleNamespace(
        messages=messages, stop="answered", answer=answer, calls=[], reward_timeouts=[]
    )


def value(name, trajectory, row, **options):
    row = {"id": 4, "messages": [{"role": "user", "content": "?"}]} | row
    selected = select((name,), [f"{name}.{option}={text}" for option, text in options.items()])
    return asyncio.run(score(trajectory, row, selected))[name]


# ---- SQL


@pytest.fixture
def shop(tmp_path):
    path = tmp_path / "shop.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE items (name TEXT, price REAL, stock INTEGER, photo BLOB)")
        rows = [("pen", 0.1, 3, b"\1"), ("ink", 0.2, 3, None), ("cap", 2.0, 1, b"\1")]
        database.executemany("INSERT INTO items VALUES (?, ?, ?, ?)", rows + [("pen", 0.1, 3, b"")])
    database.close()
    return str(path)


def matches(said, gold, shop, **options):
    row = {"answer": gold, "database": shop}
    return value("sql_match", played(f"```sql\n{said}\n```"), row, **options)


@pytest.mark.parametrize(
    "gold, said, same",
    [
        ("SELECT name FROM items", "SELECT name FROM items ORDER BY price DESC", 1),
        ("SELECT name FROM items", "SELECT name AS what FROM items", 1),
        ("SELECT name FROM items", "SELECT DISTINCT name FROM items", 0),
        ("SELECT name FROM items", "SELECT name FROM items LIMIT 3", 0),
        ("SELECT name FROM items", "SELECT name FROM items UNION ALL SELECT 'x'", 0),
        ("SELECT name, price FROM items", "SELECT price, name FROM items", 0),
        ("SELECT name FROM items", "SELECT name, 1 FROM items", 0),
        ("SELECT name FROM items ORDER BY price", "SELECT name FROM items ORDER BY price", 1),
        ("SELECT name FROM items ORDER BY price", "SELECT name FROM items ORDER BY price DESC", 0),
        # A24: tokens, not text
        ("SELECT name FROM items ORDER/**/BY price", "SELECT name FROM items", 0),
        ("SELECT name FROM items order /* x */ by price", "SELECT name FROM items", 0),
        ("SELECT name FROM items ORDER--\nBY price DESC", "SELECT name FROM items", 0),
        ("SELECT name FROM items --ORDER BY x", "SELECT name FROM items ORDER BY price DESC", 1),
        ("SELECT name FROM/**/items ORDER/**/BY price", "SELECT name FROM items ORDER BY price", 1),
        (
            "SELECT name FROM (SELECT name FROM items ORDER BY price) WHERE name != 'order by (x'",
            "SELECT name FROM items ORDER BY price DESC",
            1,
        ),
        ("SELECT sum(price) FROM items WHERE price < 1", "SELECT 0.4 FROM items LIMIT 1", 1),
        ("SELECT count(*) FROM items", "SELECT 4.0 FROM items LIMIT 1", 1),
        ("SELECT count(*) FROM items", "SELECT '4' FROM items LIMIT 1", 0),
        ("SELECT 1000000 FROM items", "SELECT 1000001 FROM items", 0),
        ("SELECT photo, stock FROM items", "SELECT photo, stock FROM items ORDER BY name", 1),
        ("SELECT NULL FROM items", "SELECT '' FROM items", 0),
        (["SELECT 1 FROM items", "SELECT 2 FROM items"], "SELECT 2 FROM items", 1),
        ("SELECT name FROM items WHERE 0", "SELECT name FROM items WHERE stock > 9", 1),
        ("SELECT name FROM items WHERE 0", "SELECT name, 1 FROM items WHERE 0", 0),
    ],
)
def test_queries_are_the_same_if_their_rows_are(gold, said, same, shop):
    assert matches(said, gold, shop) == same


def test_rows_that_differ_in_the_last_digit_come_to_the_same_place(shop):
    gold = "SELECT 0.1 + 0.2, 'b' FROM items UNION ALL SELECT 0.3, 'a' FROM items"
    said = "SELECT 0.3, 'b' FROM items UNION ALL SELECT 0.1 + 0.2, 'a' FROM items"
    assert matches(said, gold, shop) == 1.0


def test_rows_that_differ_behind_the_sixth_digit_come_to_the_same_place(shop):
    for one, other in [
        ("1000001", "1000002"),
        ("20240131", "20240201"),
        ("1234567.25", "1234567.5"),
        ("9000000000000000001", "9000000000000000002"),
        ("0.1 + 0.2, 1000001", "0.3, 1000002"),
        ("0.3, 1000001", "0.1 + 0.2, 1000002"),
        ("1000001, NULL", "1000002, 'x'"),
    ]:
        gold = f"SELECT {one} FROM items UNION ALL SELECT {other} FROM items"
        said = f"SELECT {other} FROM items UNION ALL SELECT {one} FROM items"
        assert matches(said, gold, shop) == 1.0
        assert matches(said.replace("2 FROM", "3 FROM"), gold, shop) == float("2 FROM" not in said)
    both = "SELECT {}, 1000001 FROM items UNION ALL SELECT {}, 1000002 FROM items"
    assert matches(both.format("0.1 + 0.2", "0.3"), both.format("0.3", "0.1 + 0.2"), shop) == 1.0


@pytest.mark.parametrize(
    "said",
    ["", "SELECT", "SELECT nme FROM items", "DROP TABLE items", "ATTACH 'x' AS x", "hello", "\0"],
)
def test_a_query_that_does_not_run_earns_nothing_and_changes_nothing(said, shop):
    before = Path(shop).read_bytes()
    assert matches(said, "SELECT name FROM items", shop) == 0.0
    assert Path(shop).read_bytes() == before


def test_a_query_that_does_not_end_earns_nothing(shop, monkeypatch):
    """It is stopped by the limit of the reward's option: that it returns at all shows it."""
    limits = []

    def recorded(path, query, rows, seconds):
        limits.append(seconds)
        return execute(path, query, rows, seconds)

    monkeypatch.setattr("grading.queries.execute", recorded)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n) SELECT max(i) FROM n"
    assert matches(endless, "SELECT name FROM items", shop, seconds="0.3") == 0.0
    assert limits == [0.3, 0.3]  # of the gold query and of the model's


def test_the_query_is_what_the_model_declares(shop):
    """Pitfall 43: in a thought, in a tool's output, only tried, written as constants."""
    gold = "SELECT count(*) FROM items"
    row, block = {"answer": gold, "database": shop}, f"```sql\n{gold}\n```"
    for text in (block, f"<answer>{gold}</answer>", rf"\boxed{{{gold}}}", oracle("sql_match", row)):
        assert value("sql_match", played(text), row) == 1.0
    assert value("sql_match", played("", answer=gold), row) == 1.0
    assert value("sql_match", played("", answer=block), row) == 1.0
    for text in (f"<think>{block}</think>", gold, "It is 4.", block.replace("sql", "python")):
        assert value("sql_match", played(text), row) == 0.0
    tried = [("assistant", block), ("tool", block)]
    assert value("sql_match", played("There it is.", before=tried), row) == 0.0
    for constants in ("SELECT 4", "VALUES (4)", "SELECT 4 -- FROM items", "SELECT '4 from' = ''"):
        assert value("sql_match", played(f"```sql\n{constants}\n```"), row) == 0.0
    assert value("sql_match", played(f"{block}\nor\n```sql\nSELECT 1 FROM items\n```"), row) == 0.0


@pytest.mark.parametrize(
    "row, options, says",
    [
        ({"answer": "SELECT 1"}, {}, "sql_match needs 'database', a file, and row 5 has none"),
        ({"database": "x.sqlite"}, {}, "sql_match needs 'answer', a query, and row 5 has none"),
        ({"answer": "SELECT 1", "database": "no.sqlite"}, {}, "no.sqlite"),
        ({"answer": "SELECT nme FROM items"}, {}, "the gold query of row 5 fails on .*nme"),
        ({"answer": "SELECT 1 FROM items"}, {"rows": "3"}, "row 5 gives more than 3 rows"),
    ],
)
def test_a_row_whose_gold_query_cannot_be_used_stops_the_run(row, options, says, shop):
    row = row | ({"database": shop} if "items" in row.get("answer", "") else {})
    with pytest.raises(UserError, match=says):
        value("sql_match", played("```sql\nSELECT 1\n```"), row, **options)


@pytest.mark.skipif(not CHINOOK.is_file(), reason="no chinook.sqlite in ../shared/data")
def test_on_a_real_database():
    before = hashlib.sha256(CHINOOK.read_bytes()).hexdigest()
    gold = (
        "SELECT ar.Name, COUNT(*) FROM Artist ar JOIN Album al ON al.ArtistId = ar.ArtistId "
        "GROUP BY ar.ArtistId ORDER BY COUNT(*) DESC LIMIT 3"
    )
    other = (
        "WITH n AS (SELECT ArtistId, COUNT(*) AS c FROM Album GROUP BY 1) "
        "SELECT Name, c FROM n JOIN Artist USING (ArtistId) ORDER BY c DESC LIMIT 3"
    )
    assert matches(other, gold, str(CHINOOK)) == 1.0
    assert matches(other.replace("DESC", "ASC"), gold, str(CHINOOK)) == 0.0
    assert hashlib.sha256(CHINOOK.read_bytes()).hexdigest() == before


@pytest.mark.parametrize("part", ["[", "(", "'", '"', "`", "--", "/*", "''", "from", "'x"])
def test_no_query_takes_long_to_read(part):
    """C4: 100,000 characters in less than 0.2 s of CPU time."""
    query = part * (100_000 // len(part))
    spent = []
    for _ in range(5):  # the best of five: a busy machine fails nothing
        start = time.process_time()
        queries._reads_a_table(query)
        spent.append(time.process_time() - start)
    assert min(spent) < 0.2


# ---- programs

SQUARE = "def f(x):\n    return x * x"
TESTS = ["assert f(2) == 4", "assert f(3) == 9", "assert f(-1) == 1"]


def passes(code, tests, row=(), **options):
    trajectory = played(f"```python\n{code}\n```")
    return value("code_tests", trajectory, {"tests": tests} | dict(row), **options)


def test_a_program_passes_all_tests_or_gets_its_share():
    assert passes(SQUARE, TESTS) == 1.0
    assert passes(SQUARE, "\n".join(TESTS)) == 1.0
    wrong = "def f(x):\n    return 4 if x == 2 else 0"
    assert passes(wrong, TESTS) == 0.0
    assert passes(wrong, TESTS, partial="true") == pytest.approx(1 / 3)
    raises = "def f(x):\n    return 9 // (x - 2)"
    assert passes(raises, TESTS, partial="true") == pytest.approx(1 / 3)


@pytest.mark.parametrize("code", ["", "def f(x:", "raise ValueError", "x = 1", "1 / 0", "\0"])
def test_a_program_that_does_not_run_earns_nothing(code):
    assert passes(code, TESTS, partial="true") == 0.0


CHEATS = {
    "exits": "import sys\nsys.exit(0)",
    "exits quietly": "exit()",
    "exits hard": "import os\nos._exit(0)",
    "exits in the test": "def f(x):\n    exit(0)",
    "exits hard in the test": "import os\ndef f(x):\n    os._exit(0)",
    "is equal to all": "class Any:\n    def __eq__(self, other):\n        return True\n"
    "def f(x):\n    return Any()",
    "is a number equal to all": "class Any(int):\n    def __eq__(self, other):\n"
    "        return True\n    __hash__ = int.__hash__\ndef f(x):\n    return Any()",
    "prints success": "print('ok', 'passed', 3, True, flush=True)",
    "prints what came before": "import os\ndef f(x):\n    for i in range(9):\n"
    "        os.write(1, f'{i} [\"list\", [{x * x}]]\\n'.encode())\n    exit()",
    "replaces functions": "import builtins, json, math, os\n"
    "builtins.bool = builtins.eval = lambda *_: True\nbuiltins.len = lambda _: 0\n"
    "math.isclose = json.dumps = json.loads = lambda *_, **__: True\ndef f(x):\n    return 0",
    "replaces the comparison": "import ast\nast.parse = None\n"
    "__builtins__['AssertionError'] = None\ndef f(x):\n    return None",
    "catches all": "import sys\nsys.excepthook = lambda *_: None\n"
    "def f(x):\n    raise SystemExit(0)",
    "looks for what is expected in its process": "import gc, linecache, sys\ndef f(x):\n"
    "    found, frame = [], sys._getframe()\n    while frame:\n"
    "        found.append(repr({**frame.f_globals, **frame.f_locals}))\n"
    "        found.append(repr(frame.f_code.co_consts))\n        frame = frame.f_back\n"
    "    found.append(repr(linecache.cache))\n    text = ' '.join(found)\n"
    "    goal = sum((44000, 477))\n    return goal if str(goal) in text else 0",
}


@pytest.mark.parametrize("code", CHEATS.values(), ids=CHEATS)
def test_a_program_does_not_talk_its_way_through(code):
    """Pitfall 43."""
    tests = ["assert f(2) == 44477", "assert abs(f(3) - 44477) < 1", "assert not f(4) != 44477"]
    assert passes(code, tests, partial="true") == 0.0
    assert passes("def f(x):\n    return 44477", tests) == 1.0  # of the tests themselves


def test_a_program_that_does_not_end_earns_what_it_has_passed(monkeypatch):
    left = []  # seconds that each process was given

    async def recorded(code, until):
        left.append(until - asyncio.get_running_loop().time())
        return await run(code, until)

    run = programs._run
    monkeypatch.setattr(programs, "_run", recorded)
    code = "def f(x):\n    while x == 3:\n        pass\n    return x * x"
    assert passes(code, TESTS, seconds="1") == 0.0
    code = "while True: pass"
    assert passes(code, TESTS, seconds="1", partial="true") == 0.0
    pairs = [{"input": f"{x}\n", "output": f"{x * x}\n"} for x in (2, 3, 4)]
    code = "x = int(input())\nwhile x == 3: pass\nprint(x * x)"
    assert max(left) <= 1.0  # so nothing was stopped by another limit, later
    # enough for a busy machine to answer the first
    assert passes(code, pairs, seconds="4", partial="true") == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "code, tests",
    [
        ("def f(x):\n    return [(x, {x: {1.5}}), None, True, b'a', 1j, 'é']", None),
        ("def f(n):\n    return 7 ** n", "assert f(9999) == 7 ** 9999"),
        ("def f():\n    return float('inf')", "import math\nassert math.isinf(f())"),
        ("def f():\n    return 0.1 + 0.2", "assert abs(f() - 0.3) < 1e-9\nassert f() != 0.3"),
        ("def f(x):\n    return x", "assert f([1]) is not None and f(1) is not True"),
        (
            "def g(x):\n    x.sort()",
            "x = [2, 1]\ng(x)\nassert x == [1, 2]\nx = [3]\nassert x == [3]",
        ),
        (SQUARE, "x = 2\nassert f(x) == x * 2\nx = 3\nassert f(x) == x * 3"),
        (SQUARE, "assert list(map(f, [1, 2])) == [1, 4]\nassert max([1, -3], key=f) == -3"),
        (SQUARE, "assert all(f(i) == i * i for i in range(5))"),
        (SQUARE, "for i in range(5):\n    assert f(i) == i * i"),
        (SQUARE, "def near(a, b):\n    return abs(a - b) < 1e-6\nassert near(f(0.1), 0.01)"),
        (SQUARE, "def run(f):\n    assert f(2) == 4\nrun(f)"),
        (SQUARE, "from collections import Counter\nassert Counter([f(1)]) == Counter([1])"),
        (SQUARE, "try:\n    f('x')\nexcept TypeError:\n    pass\nelse:\n    assert False"),
        (
            "class Stack:\n    def __init__(self):\n        self.items = []\n"
            "    def push(self, x):\n        self.items.append(x)\n"
            "    def __len__(self):\n        return len(self.items)",
            "s = Stack()\nassert len(s) == 0\ns.push(3)\n"
            "assert s.items[0] == 3\nassert len(s) == 1",
        ),
        (
            "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int'\n"
            "class Solution:\n    def add(self, a):\n        return P(a).x + 1",
            "assert Solution().add(1) == 2\nassert P(3).x == 3",
        ),
        (
            "def main():\n    input()\ndef f():\n    return 1\n"
            "if __name__ == '__main__':\n    main()",
            "assert f() == 1",
        ),
        ("def f():\n    print('x' * 100_000)\n    return 1", "assert f() == 1"),
    ],
)
def test_tests_of_many_kinds_run(code, tests):
    tests = tests or "assert f(2) == [(2, {2: {1.5}}), None, True, b'a', 1j, 'é']"
    assert passes(code, tests) == 1.0
    broken = (
        "class _R:\n    def __getattr__(self, n): raise KeyError\ndef f(*a): return _R()\ng = f"
    )
    assert passes(broken, tests) == 0.0


@pytest.mark.parametrize(
    "code, tests, wrong",
    [
        (
            "import re\ndef f(x):\n    return re.match('a+', x)",
            "assert f('aab')\nassert not f('b')\nassert f('a') is not None and f('c') is None",
            "def f(x):\n    return None",
        ),
        (
            "def f(n):\n    for i in range(n):\n        yield i",
            "assert list(f(3)) == [0, 1, 2]\nassert sum(f(4)) == 6\ng = f(2)\n"
            "assert next(g) == 0\nassert next(g) == 1",
            "def f(n):\n    return iter([5])",
        ),
        (
            "import datetime\ndef f(y):\n    return datetime.date(y, 2, 3)",
            "import datetime\nassert str(f(2020)) == '2020-02-03'\n"
            "assert f(2021) == datetime.date(2021, 2, 3)\nassert f(2022).year == 2022",
            "def f(y):\n    return '2020-02-03'",
        ),
        (
            "import datetime\ndef f(n):\n    return datetime.timedelta(hours=n)",
            "from datetime import timedelta\nassert f(30) == timedelta(days=1, hours=6)",
            "def f(n):\n    return 108000",
        ),
        (
            "from decimal import Decimal\ndef f(x):\n    return Decimal(x) / 4",
            "assert f(3) == Decimal('0.75')\nassert str(f(1)) == '0.25'\nassert f(2) == 0.5",
            "def f(x):\n    return 0.7",
        ),
        (
            "from collections import deque\ndef f(x):\n    return deque(x, 2)",
            "from collections import deque\nassert f([1, 2, 3]) == deque([2, 3])\n"
            "assert list(f([1])) == [1]",
            "def f(x):\n    return x[-2:]",
        ),
        (
            "def f(n):\n    return range(1, n, 2)",
            "assert f(6) == range(1, 6, 2)\nassert list(f(4)) == [1, 3]",
            "def f(n):\n    return [1, 3, 5]",
        ),
        (
            "from fractions import Fraction as F\ndef f(x):\n    return {frozenset([x]): F(x, 3)}",
            "from fractions import Fraction\nassert f(2) == {frozenset([2]): Fraction(2, 3)}",
            "def f(x):\n    return {frozenset([x]): 2 / 3}",
        ),
    ],
)
def test_values_of_many_kinds_are_carried_over(code, tests, wrong):
    """A8: each earned 0."""
    assert passes(code, tests) == 1.0
    assert passes(wrong, tests) == 0.0
    for cheat in ("is equal to all", "replaces functions", "exits in the test"):
        assert passes(CHEATS[cheat], tests) == 0.0


@pytest.mark.parametrize(
    "value, test",
    [
        ("iter('ab')", "' '.join(map(str, f(1))) == 'a b'"),
        ("(i for i in 'ab')", "[c + '!' for c in f(1)] == ['a!', 'b!']"),
        ("zip('ab', [1, 2])", "dict((k, v) for k, v in f(1)) == {'a': 1, 'b': 2}"),
        ("map(str, [1])", "''.join(f(1)) == '1'"),
        ("__import__('itertools').chain([1], [2])", "sorted(f(1), reverse=True) == [2, 1]"),
        ("reversed([1, 2])", "list(f(1)) == [2, 1]"),
        ("{1: 2}.keys()", "f(1) == {1}"),
        ("{1: 2}.items()", "f(1) == {(1, 2)}"),
        ("{1: 2}.values()", "2 in f(1)"),
        ("int", "f(1) == int"),
        ("list", "f(1) is list"),
        ("slice(1, 2)", "f(1) == slice(1, 2)"),
        ("[range(2), {1: (i for i in [3])}]", "list(f(1)[1][1]) == [3]"),
    ],
)
def test_iterators_views_and_types_leave_their_process_too(value, test):
    """A8: each was a 0."""
    assert passes(f"def f(x):\n    return {value}", f"assert {test}") == 1.0
    for wrong in ("None", "[]", "iter(())", "{}.keys()", "str", "__import__('itertools').count()"):
        assert passes(f"def f(x):\n    return {wrong}", f"assert {test}") == 0.0


PATH = "from pathlib import Path\ndef f(x):\n    return Path(x)"
IS_PATH = "from pathlib import Path\nassert f('a') == Path('a')"
PAIR = (
    "class P:\n    def __init__(self, x):\n        self.x = x\n"
    "    def __eq__(self, other):\n        return self.x == other.x\ndef f(x):\n    return P(x)"
)


@pytest.mark.parametrize(
    "code, tests, is_worth",
    [
        (PATH, "from pathlib import Path\nassert f('a') == Path('a')", None),
        (
            PATH,
            "from pathlib import Path\nassert f('a') == Path('a')\nassert f('b').name == 'c'",
            0,
        ),
        (PATH, "from pathlib import Path\nassert str(f('a')) == 'a'", 1),
        (PAIR, "assert f(3) == P(3)", None),
        (PAIR, "assert f(3) == P(3)\nassert f(3).x == 4", 0),
        (PAIR, "assert f(3) == 3", 0),
        (SQUARE, "assert f(3) == f(-3)", 1),
        ("def f(x):\n    return lambda: x", "assert f(3) == 3", 0),
        ("def f(x):\n    return iter([x])", "assert f(3) == [3]", 0),
    ],
)
def test_what_cannot_be_carried_over_is_none(code, tests, is_worth):
    """A8: None, not 0, where nobody can say; no object of the program's own is a way out."""
    assert passes(code, tests) == is_worth


def test_what_cannot_be_carried_over_is_in_no_share():
    """A8."""
    assert passes(PATH, f"{IS_PATH}\nassert f('b').name == 'b'", partial="true") == 1.0
    assert passes(PATH, f"{IS_PATH}\nassert f('b').name == 'c'", partial="true") == 0.0
    assert passes(PATH, IS_PATH, partial="true") is None


@pytest.mark.parametrize(
    "value, expected, is_worth",
    [
        ("[]", "987.6", 0),
        ("[]", "[987.6]", 0),
        ("[[]]", "987.6", 0),
        ("987.6", "[987.6, 987.6]", 0),
        ("[987.6]", "[987.6, 987.6]", 0),
        ("987.6", "987.6", 1),
        ("[987.6, 987.6]", "[987.6, 987.6]", 1),
        ("[0, 0]", "0", 1),
        ("[]", "[]", 1),
    ],
)
def test_shapes_are_compared_before_values(value, expected, is_worth):
    """A9: np.allclose([], 987.6) is True."""
    code = f"def f(x):\n    return {value}"
    for test in (
        f"assert np.allclose(f(1), {expected})",
        f"import numpy as np\nassert np.allclose({expected}, f(1), atol=1e-6)",
        f"import numpy\nassert numpy.isclose(numpy.array(f(1)), {expected}).all()",
    ):
        assert passes(code, test) == is_worth


def test_the_asserts_of_humaneval_are_taken_out_of_their_function():
    check = (
        "METADATA = {}\n\ndef check(candidate):\n    assert candidate(2) == 4, 'message'\n"
        "    assert abs(candidate(0.5) - 0.25) < 1e-6\n    for i in range(3):\n"
        "        assert candidate(i) == i * i\n"
    )
    everything = CHEATS["is equal to all"]
    for tests, row in [(check, {"entry_point": "f"}), (f"{check}\ncheck(f)", {})]:
        assert passes(SQUARE, tests, row) == 1.0
        assert passes(everything, tests, row) == 0.0
        assert passes(everything, tests, row, partial="true") == pytest.approx(1 / 3)  # the loop


@pytest.mark.parametrize(
    "tests, row",
    [
        (["assert max([1, 3]) == 3", "assert max([5]) == 5"], {}),
        (
            ["assert max([1, 3]) == 3", "assert list(max([5, 2], [1])) == [5]"],
            {"entry_point": "max"},
        ),
        ("def check(candidate):\n    assert candidate([1, 3]) == 3", {"entry_point": "max"}),
        ("def check(candidate):\n    assert candidate([1, 3]) == 3\ncheck(max)", {}),
    ],
)
def test_a_function_with_the_name_of_a_builtin_has_to_be_the_programs(tests, row):
    """Pitfall 43: python's own would pass the tests of any program."""
    right = "def max(x, *more):\n    return [5] if more else sorted(x)[-1]"
    assert passes(right, tests, row) == 1.0
    for code in ("x = 1", "globals = lambda: {'max': 3}", "def max(*x):\n    return 0"):
        assert passes(code, tests, row, partial="true") == 0.0
    mbpp = ["assert sum(10,15) == 6", "assert sum(100,150) == 93"]
    code = "def sum(a, b):\n    return 1 + 2 + 3 if a == 10 else 93"
    assert passes(code, mbpp) == 1.0
    assert passes("def add(a, b):\n    return 6", mbpp) == 0.0


def test_a_name_that_the_tests_do_not_import_is_not_the_programs():
    """Pitfall 43: else the program would compute what is expected, too."""
    tests = ["assert math.isclose(f(3), 9)", "assert Counter([f(2)]) == Counter([4])"]
    tests += ["x = np.array([2])", "assert f(x) == [4]", "assert np.allclose(f(x), [4])"]
    assert passes(SQUARE, tests) == 1.0
    assert passes(f"import math\nimport numpy as np\n{SQUARE}", tests) == 1.0
    cheat = (
        "class Any:\n    def __eq__(self, other): return True\n    def __getattr__(self, name):\n"
        "        return Any()\n    def __call__(self, *args): return Any()\n"
        "math = np = Any()\nCounter = Any\n    \ndef f(x):\n    return 0"
    )
    assert passes(cheat, tests, partial="true") == 0.0
    candidate = "def check(candidate):\n    assert math.isclose(candidate(3), 9)"
    for row in ({"entry_point": "f"}, {"entry_point": "f", "test_imports": ["import math"]}):
        assert passes(SQUARE, candidate, row) == 1.0
        assert passes(cheat, candidate, row) == 0.0


def test_a_name_that_may_be_the_programs_own_is():
    counter = "class Counter:\n    def __init__(self, n=0):\n        self.n = n\n"
    counter += "    def up(self):\n        self.n += 1\n        return self.n\n"
    counter += "def make(n):\n    return Counter(n)"
    for tests in (
        "assert Counter(3).up() == 4",
        "assert Counter(3).up() == 4\nassert make(3).up() == 4",
        "c = Counter(3)\nassert c.up() == 4\nassert make(3).n == 3",
        "assert isinstance(make(3), Counter)",
    ):
        assert passes(counter, tests) == 1.0
    bisect = "def bisect(f):\n    return 2\ndef f(x):\n    return x - 2"
    assert passes(bisect, "assert bisect(f) == 2\nassert f(2) == 0") == 1.0


def test_the_columns_of_mbpp_stand_in_front_of_its_tests():
    code = "def longest(pairs):\n    return max(pair.a for pair in pairs)"
    setup = "class Pair(object):\n    def __init__(self, a):\n        self.a = a"
    tests = ["assert longest([Pair(5), Pair(2)]) == comb(5, 1)"]
    row = {"test_setup_code": setup, "test_imports": ["from math import comb"]}
    assert passes(code, tests, row) == 1.0
    assert passes(code.replace("max", "min"), tests, row) == 0.0
    assert passes(SQUARE, TESTS, {"test_setup_code": "", "test_imports": None}) == 1.0


def test_calls_of_a_function_are_compared_outside_too():
    calls = {"fn_name": "f", "inputs": [[2, [1]], [3, []]], "outputs": [[2, 1], [3]]}
    plain = "def f(x, y):\n    return (x, *y)"
    method = "class Solution:\n    def f(self, x, y):\n        return [x] + y"
    for code in (plain, method):
        assert passes(code, calls) == 1.0
        assert passes(code, json.dumps(calls)) == 1.0
    assert passes("def f(x, y):\n    return [x]", calls, partial="true") == 0.5
    for code in (*CHEATS.values(), "print([2, 1])", "class Solution:\n    f = 1"):
        assert passes(code, calls) == 0.0
    wrapped = {"fn_name": "max", "inputs": [[[1, 3]], [[None, True]]], "outputs": [[3], [True]]}
    assert passes("def max(x):\n    return x[1]", wrapped) == 1.0
    assert passes("def max(x):\n    return [x[1]]", wrapped) == 1.0
    assert passes("x = 1", wrapped, partial="true") == 0.0


def test_inputs_and_outputs_are_compared_outside():
    pairs = [{"input": "2 3\n4\n", "output": "5\n4 \n"}, {"input": "1 1\n0\n", "output": "2\n0"}]
    bodies = [
        "a, b = map(int, input().split())\nprint(a + b)\nprint(input())",
        "import sys\na, b, c = sys.stdin.read().split()\nprint(int(a) + int(b), c, sep='\\n')",
        "import sys\nlines = sys.stdin.buffer.readlines()\nprint(sum(map(int, lines[0].split())))\n"
        "print(lines[1].decode().strip())\nsys.exit(0)",
        "a, b, c = open(0).read().split()\nprint(int(a) + int(b))\nprint(c)\nexit()",
        "def main():\n    print(sum(map(int, input().split())))\n    print(input())\n"
        "if __name__ == '__main__':\n    main()",
        "import sys\nprint('debug', file=sys.stderr)\nprint(sum(map(int, input().split())))\n"
        "print(input())",
    ]
    forms = pairs, json.dumps(pairs), {k + "s": [pair[k] for pair in pairs] for k in pairs[0]}
    for body in bodies:
        assert passes(body, pairs) == 1.0
    for form in forms:
        assert passes(bodies[0], form) == 1.0
    assert passes("print(5)\nprint(4)", pairs, partial="true") == 0.5
    assert passes("print('5 4')", pairs, partial="true") == 0.0
    assert passes(bodies[0] + "\nprint('more')", pairs) == 0.0
    assert passes(bodies[0] + "\nexit(1)", pairs) == 0.0
    assert passes("pass", [{"input": "", "output": ""}]) == 1.0


def test_the_program_is_what_the_model_declares():
    row, block = {"tests": TESTS, "solution": SQUARE}, f"```python\n{SQUARE}\n```"
    assert value("code_tests", played(oracle("code_tests", row)), row) == 1.0
    assert value("code_tests", played("", answer=SQUARE), row) == 1.0
    assert value("code_tests", played(f"```py\nx\n```\nNo:\n{block}"), row) == 1.0
    for text in (f"<think>{block}</think>", SQUARE, f"{block}\n```python\nx\n```", "", block[:-3]):
        assert value("code_tests", played(text), row) == 0.0
    shown = [("assistant", block), ("tool", block)]
    assert value("code_tests", played("There it is.", before=shown), row) == 0.0


def test_tests_that_are_too_long_for_the_sandbox_are_left_out():
    long = {"input": "1\n" * 50_000, "output": "x"}
    pairs = [{"input": "3\n", "output": "3"}, long, {"input": "1\n", "output": "1" * 20_000}]
    assert passes("print(input())", pairs) == 1.0
    assert passes("print(input())", [long]) is None
    assert passes("def f(x): return x", f"assert f('{'x' * 70_000}')") is None


@pytest.mark.parametrize(
    "tests, says",
    [
        (None, "code_tests needs 'tests', and row 5 has none"),
        (["assert f( == 2"], "the tests of row 5 are no python"),
        (["x = 1"], "the tests of row 5 have no assert"),
        ("[f(2) == 4]", "the tests of row 5 cannot be read"),
        ([{"in": "1"}], "the tests of row 5 cannot be read"),
        ({"fn_name": "f", "inputs": ["1"], "outputs": [2]}, "'1' is no list of arguments"),
        (["assert max([1]) == min([1])"], "row 5 tests only builtins: name the program's function"),
        (
            ["import no_such_module", "assert f(2) == 4"],
            "in the tests of row 5, import no_such_mod",
        ),
    ],
)
def test_a_row_whose_tests_cannot_be_used_stops_the_run(tests, says):
    with pytest.raises(UserError, match=says):
        passes(SQUARE, tests)

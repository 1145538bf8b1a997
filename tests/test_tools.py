"""How tools are loaded, described and called: names, schemas, arguments, error kinds, deadlines.

pytest tests/test_tools.py
"""

import asyncio
import sys
import threading
import time
from typing import Literal

import pytest
from until import until

from run import deadline
from run.config import UserError
from tools import Toolbox, ToolError
from tools.calling import toolbox as toolboxes
from tools.calling.toolbox import MAX_RESULT_CHARS


def add(a: int, b: float = 1.0) -> str:
    """Adds.

    Args:
        a: one
        b: other
    """
    return str(a + b)


def nap(seconds: float) -> str:
    """Sleeps.

    Args:
        seconds: how long
    """
    time.sleep(seconds)
    return "awake"


async def late() -> str:
    """Comes late."""
    await asyncio.sleep(60)


class Counter:
    made = []

    def __init__(self):
        self.n, self.closed = 0, False
        Counter.made.append(self)

    def __call__(self, step: int) -> int:
        """Counts.

        Args:
            step: how far
        """
        seen = self.n
        time.sleep(0.01)  # two calls at once would lose one
        self.n = seen + step
        return self.n

    def close(self):
        self.closed = True
        raise ValueError("close failed")


def making(result):
    def make() -> str:
        """Makes."""
        if isinstance(result, BaseException):
            raise result
        return result

    return make


def call(box, name, arguments):
    async def run():
        session = box.open()
        try:
            return await session.call(name, arguments)
        finally:
            await session.close()

    return asyncio.run(run())


# -- loading and describing


def test_a_wrong_name_is_reported_before_anything_slow_is_imported():
    import subprocess

    code = (
        "import sys, tools\n"
        "try: tools.Toolbox(['pyton'])\n"
        "except tools.UserError as e: print(e, 'transformers' in sys.modules)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert shown.startswith("unknown tool 'pyton': did you mean python? (tools: ")
    assert shown.endswith("or give file.py:function or mcp:file.json) False\n")


def test_a_function_of_a_users_file_is_a_tool(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        'def twice(x: int) -> int:\n    """Doubles.\n\n    Args:\n        x: it\n    """\n'
        "    return 2 * x\n"
    )
    monkeypatch.chdir(tmp_path)
    box = Toolbox(["mine.py:twice"])
    assert box.schemas[0]["function"]["name"] == "twice"
    assert call(box, "twice", {"x": 4})[:2] == ("8", None)
    with pytest.raises(UserError, match="no function 'twise' in .*mine.py: did you mean twice?"):
        Toolbox(["mine.py:twise"])
    with pytest.raises(UserError, match="no file .*other.py"):
        Toolbox(["other.py:twice"])
    (tmp_path / "broken.py").write_text("def f():\n    pass\n1 / 0\n")
    with pytest.raises(UserError, match="importing .*broken.py.* failed: ZeroDivisionError"):
        Toolbox(["broken.py:f"])


def no_docstring(a: int):
    return a


def no_argument_line(a: int):
    """Does."""


def no_type(a):
    """Does.

    Args:
        a: it
    """


def odd_type(a: asyncio.Lock):
    """Does.

    Args:
        a: it
    """


def star(*a: int):
    """Does.

    Args:
        a: it
    """


@pytest.mark.parametrize("function", [no_docstring, no_argument_line, no_type, odd_type, star])
def test_a_tool_that_cannot_be_described_is_refused_with_its_name_and_a_remedy(function):
    with pytest.raises(UserError, match=f"tool '{function.__name__}' cannot be .*: give each arg"):
        Toolbox([function])


def test_what_is_no_tool_and_two_tools_of_one_name_are_refused():
    with pytest.raises(UserError, match="is no tool"):
        Toolbox([3])
    with pytest.raises(UserError, match="class ToolError without __call__ is no tool"):
        Toolbox([ToolError])
    with pytest.raises(UserError, match="two tools are named 'add'"):
        Toolbox([add, add])


# -- arguments


def plan(
    n: int,
    kind: Literal["a", "b"] = "a",
    names: list[str] | None = None,
    table: dict[str, list[int]] | None = None,
    flag: bool = False,
    some: int | str = 0,
) -> str:
    """Plans.

    Args:
        n: a
        kind: b
        names: c
        table: d
        flag: e
        some: f
    """
    return "planned"


@pytest.mark.parametrize(
    "arguments, wrong",
    [
        ({}, "plan got no argument 'n' (integer)"),
        ({"n": 1, "m": 2}, "plan has no argument 'm'"),
        ({"n": "1"}, 'n must be integer, not "1"'),
        ({"n": 1.0}, "n must be integer, not 1.0"),
        ({"n": True}, "n must be integer, not true"),
        ({"n": 1, "kind": "c"}, 'kind must be one of "a", "b", not "c"'),
        ({"n": 1, "names": ["x", 3]}, "names[1] must be string, not 3"),
        ({"n": 1, "table": {"k": [1, None]}}, "table['k'][1] must be integer, not null"),
        ({"n": 1, "flag": 1}, "flag must be boolean, not 1"),
        ({"n": 1, "some": 1.5}, "some must be integer or string, not 1.5"),
        ([1], "the arguments of plan must be a JSON object"),
        (None, "the arguments of plan must be a JSON object"),
    ],
)
def test_arguments_that_do_not_fit_are_named_and_nothing_is_coerced(arguments, wrong):
    """Pitfall 9: wrong argument types are an observation and a count of their own."""
    box = Toolbox([plan])
    content, error, _ = call(box, "plan", arguments)
    assert content.startswith(f"error: {wrong}; call it as plan(n: integer, kind?: one of ")
    assert error == "bad_arguments" and box.errors == {"bad_arguments": 1}


def test_arguments_that_fit_are_passed_as_they_are():
    box = Toolbox([plan, add])
    full = {"n": 1, "kind": "b", "names": ["x"], "table": {"k": [1]}, "flag": True, "some": "s"}
    assert call(box, "plan", full)[:2] == ("planned", None)
    assert call(box, "plan", {"n": 1, "names": None})[1] is None
    assert call(box, "add", {"a": 1, "b": 2})[0] == "3"  # an int is a fine float
    content, error, _ = call(box, "add", {})
    assert content == (
        "error: add got no argument 'a' (integer); call it as add(a: integer, b?: number)"
    )


# -- error kinds and results


def test_every_error_is_an_observation_with_its_own_counter():
    """Pitfall 9: unknown tool, arguments, exception, timeout, oversized; none raises."""
    tools = [add, nap, late, making("x" * (MAX_RESULT_CHARS + 1))]
    box = Toolbox(tools, options=("late.timeout=0.05",))
    content, error, _ = call(box, "ad", {})
    assert error == "unknown_tool" and "add(a: integer, b?: number), nap(" in content
    assert call(box, None, {})[1] == "unknown_tool"
    assert call(box, "add", {"a": "x"})[1] == "bad_arguments"
    assert call(box, "nap", {"seconds": -1})[:2] == (
        "error: nap raised ValueError: sleep length must be non-negative",
        "exception",
    )
    assert call(box, "late", {})[1] == "timeout"
    content, error, _ = call(box, "make", {})
    assert error == "oversized" and MAX_RESULT_CHARS < len(content) < MAX_RESULT_CHARS + 100
    assert box.errors == {
        "unknown_tool": 2,
        "bad_arguments": 1,
        "exception": 1,
        "timeout": 1,
        "oversized": 1,
    }


@pytest.mark.parametrize("leave", [SystemExit(3), TimeoutError("mine"), asyncio.CancelledError()])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_tool_that_exits_or_cancels_itself_does_not_end_the_run(leave, is_async):
    """Pitfall 9: a tool's own TimeoutError is an exception, not our deadline."""
    make = making(leave)

    async def async_make() -> str:
        """Makes."""
        return make()

    box = Toolbox([async_make if is_async else make])
    name = "async_make" if is_async else "make"
    content, error, _ = call(box, name, {})
    assert error == "exception" and content.startswith(f"error: {name} raised ")


def test_a_tool_may_choose_the_kind_and_the_words():
    box = Toolbox([making(ToolError("timeout", "too slow"))])
    assert call(box, "make", {})[:2] == ("too slow", "timeout")


class Mute:
    def __str__(self):
        raise ValueError("no words")


@pytest.mark.parametrize(
    "result, content",
    [
        (None, "(no output)"),
        (7, "7"),
        ({"a": [1, "é"]}, '{"a": [1, "é"]}'),
        ([1, 2], "[1, 2]"),
        ({1, 2}, "{1, 2}"),
        ("a\ud800b", "a?b"),
        (Mute(), "error: make raised ValueError: no words"),
    ],
)
def test_any_result_becomes_text(result, content):
    """Found broken in the wild: a result of an unexpected type ends as text, not as a reset."""
    assert call(Toolbox([making(result)]), "make", {})[0] == content


def test_images_alone_or_among_text_are_kept():
    from PIL import Image

    image = Image.new("RGB", (2, 2))
    assert call(Toolbox([making(image)]), "make", {})[0] == [image]
    assert call(Toolbox([making(["see", image, 3])]), "make", {})[0] == ["see", image, "3"]


def test_a_long_text_beside_an_image_is_cut_too():
    from PIL import Image

    image = Image.new("RGB", (2, 2))
    box = Toolbox([making(["x" * (MAX_RESULT_CHARS + 1), image])])
    (text, seen), error, _ = call(box, "make", {})
    assert "[... 1 characters cut ...]" in text and seen is image
    assert error == "oversized" and box.errors == {"oversized": 1}


# -- deadlines and concurrency


def test_a_hung_thread_is_left_at_the_deadline_and_counted_until_it_ends():
    """Pitfall 37."""
    released = threading.Event()

    def hang() -> str:
        """Hangs."""
        released.wait()

    box = Toolbox([hang], timeout=0.1)
    content, error, seconds = call(box, "hang", {})
    assert content == "error: hang took longer than 0.1 s and was stopped" and error == "timeout"
    assert seconds >= 0.1 and box.leaked == 1
    released.set()
    assert until(lambda: box.leaked == 0)


def test_an_async_tool_is_cancelled_and_one_that_swallows_it_is_counted():
    """Pitfall 37."""
    cancelled = []

    async def polite() -> str:
        """Waits."""
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    released = []

    async def stubborn() -> str:
        """Waits."""
        while not released:
            try:
                await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                pass

    async def run():
        box = Toolbox([polite, stubborn], timeout=0.05)
        session = box.open()
        assert (await session.call("polite", {}))[1] == "timeout"
        assert cancelled and box.leaked == 0
        assert (await session.call("stubborn", {}))[1] == "timeout"
        assert box.leaked == 1
        released.append(True)
        while box.leaked:
            await asyncio.sleep(0.01)

    asyncio.run(run())


def test_the_deadline_covers_making_and_closing_an_instance(monkeypatch):
    """Pitfall 37: hooks before and after the call."""
    monkeypatch.setattr(toolboxes, "CLOSING", 0.05)
    released = threading.Event()

    class Slow:
        def __init__(self):
            released.wait()

        def __call__(self) -> str:
            """Does."""

    class SlowClose:
        def __call__(self) -> str:
            """Does."""
            return "done"

        def close(self):
            released.wait()

    box = Toolbox([Slow, SlowClose], timeout=0.05, options=("SlowClose.timeout=60",))
    assert call(box, "Slow", {})[1] == "timeout"
    assert call(box, "SlowClose", {})[:2] == ("done", None)
    assert box.errors["close"] == 1
    released.set()
    assert until(lambda: box.leaked == 0)


def test_cancelling_the_caller_cancels_the_tool():
    async def run():
        box = Toolbox([late])
        task = asyncio.ensure_future(box.open().call("late", {}))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.01)
        assert box.leaked == 0 and not box.errors

    asyncio.run(run())


@pytest.mark.parametrize("is_async", [False, True])
def test_waits_run_at_once_not_one_after_the_other(is_async):
    """Pitfall 38: each of 64 calls ends when all of them have begun."""
    all_have_begun = threading.Barrier(64)
    begun = []

    def meet() -> str:
        """Meets."""
        all_have_begun.wait()
        return "met"

    async def async_meet() -> str:
        """Meets."""
        begun.append(True)
        while len(begun) < 64:
            await asyncio.sleep(0.01)
        return "met"

    async def run():
        tool = async_meet if is_async else meet
        box = Toolbox([tool], concurrency=64, timeout=60.0)
        calls = [box.open().call(tool.__name__, {}) for _ in range(64)]
        for content, error, _ in await asyncio.gather(*calls):
            assert (content, error) == ("met", None)

    asyncio.run(run())


def test_no_more_than_concurrency_run_at_once():
    """Pitfall 38: with 8 slots 8 run, and no more."""
    running, most, lock = 0, 0, threading.Lock()
    eight = threading.Barrier(8)

    def work() -> str:
        """Works."""
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        eight.wait()
        with lock:
            running -= 1

    async def run():
        box = Toolbox([work], concurrency=8, timeout=60.0)
        results = await asyncio.gather(*[box.open().call("work", {}) for _ in range(64)])
        assert {error for _, error, _ in results} == {None} and most == 8

    asyncio.run(run())


def test_waiting_for_a_slot_is_not_on_the_tools_clock():
    """Pitfall 38: the deadline starts with the tool."""

    async def run():
        box = Toolbox([nap], concurrency=1, timeout=2.5)
        calls = [box.open().call("nap", {"seconds": 0.25}) for _ in range(12)]
        results = await asyncio.gather(*calls)
        assert {error for _, error, _ in results} == {None}  # the last one began after 2.75 s

    asyncio.run(run())


# -- state


def test_sessions_never_share_an_instance_and_all_are_closed_though_close_raises():
    """Pitfall 40."""

    async def run():
        Counter.made.clear()
        box = Toolbox([Counter])
        first, second = box.open(), box.open()
        results = await asyncio.gather(*[first.call("Counter", {"step": 1}) for _ in range(5)])
        assert [content for content, _, _ in results] == ["1", "2", "3", "4", "5"]
        assert (await second.call("Counter", {"step": 10}))[0] == "10"
        assert len(Counter.made) == 2
        await first.close()
        assert [counter.closed for counter in Counter.made] == [True, False]
        await second.close()
        await second.close()
        assert all(counter.closed for counter in Counter.made)
        assert box.errors == {"close": 2}

    asyncio.run(run())


def test_a_close_that_is_cancelled_still_closes_every_instance():
    """Pitfall 37: a second Ctrl-C must not leave the rest of the processes behind."""
    closed = []

    def tool(name):
        async def __call__(self) -> str:
            """Does."""

        async def close(self):
            await asyncio.sleep(0.05)
            closed.append(name)

        return type(name, (), {"__call__": __call__, "close": close})

    async def run():
        session = Toolbox([tool("one"), tool("two"), tool("three")]).open()
        for name in ("one", "two", "three"):
            await session.call(name, {})
        closing = asyncio.ensure_future(session.close())
        await asyncio.sleep(0.01)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert closed == ["three", "two", "one"]

    asyncio.run(run())


def test_the_state_behind_a_hung_call_is_not_used_again():
    """Pitfall 40: the abandoned thread still holds the old instance."""
    released = threading.Event()

    class Sticky:
        def __init__(self):
            self.n = 0

        def __call__(self, hang: bool) -> int:
            """Counts.

            Args:
                hang: whether to
            """
            self.n += 1
            if hang:
                released.wait()
            return self.n

    async def run():
        box = Toolbox([Sticky], timeout=60.0)
        session = box.open()
        assert (await session.call("Sticky", {"hang": False}))[0] == "1"
        box.tools["Sticky"].timeout = 0.1
        content, error, _ = await session.call("Sticky", {"hang": True})
        assert error == "timeout" and content.endswith("; its state is lost")
        box.tools["Sticky"].timeout = 60.0
        assert (await session.call("Sticky", {"hang": False}))[0] == "1"
        released.set()

    asyncio.run(run())


def test_a_tool_that_hangs_at_every_call_ends_the_run_with_a_sentence(monkeypatch):
    """B8."""
    monkeypatch.setattr(deadline, "MOST_HANGING", 4)
    release = threading.Event()

    def slow_page() -> str:
        """Get a page."""
        release.wait()
        return "page"

    box = Toolbox([slow_page], timeout=0.02)
    kinds = [call(box, "slow_page", {})[1] for _ in range(4)]
    assert kinds == ["timeout"] * 4 and box.leaked == 4
    for _ in range(3):
        with pytest.raises(UserError, match="4 calls hang in threads .*slow_page: give what they"):
            call(box, "slow_page", {})
    assert box.leaked == 4
    release.set()
    assert until(lambda: box.leaked == 0)
    assert call(box, "slow_page", {})[0] == "page"

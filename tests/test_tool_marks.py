"""What a tool may say of itself: options, state, pure, network, ends; and the cache of results.

pytest tests/test_tool_marks.py
"""

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from run import config
from run.config import UserError
from run.plugins import names_in
from tools import NetworkError, Tool, Toolbox, ToolError
from tools.calling import cache as caches
from tools.calling import loading
from tools.calling import toolbox as toolboxes


class Shelf:
    """A tool with options, one instance for the run."""

    shared = True
    made = []

    def __init__(self, book: str, copies: int = 2, marks: tuple[str, ...] = ()):
        if book == "burnt":
            raise UserError("book = 'burnt': expected one that can be read")
        self.book, self.copies, self.closed = book, copies, 0
        Shelf.made.append(self)

    async def __call__(self, page: int) -> str:
        """Reads.

        Args:
            page: which
        """
        return f"{self.book} {page} {self.copies}"

    async def close(self):
        self.closed += 1


class Row:
    """A tool that gets the data row of its trajectory."""

    pure = True
    calls = []

    def __init__(self, example, prefix: str = ""):
        self.key = self.prefix = prefix + example["name"]

    def __call__(self, x: int) -> str:
        """Shows.

        Args:
            x: a number
        """
        Row.calls.append(x)
        return f"{self.prefix}{x}"


def counted(pure=True, fails=0, seconds=0.0, kind=None):
    """A tool that counts its calls, and the most at once; the first so many fail."""

    async def count(x: int) -> str:
        """Counts.

        Args:
            x: a number
        """
        count.calls += 1
        count.running += 1
        count.most = max(count.most, count.running)
        number = count.calls
        await asyncio.sleep(seconds)
        count.running -= 1
        if number <= fails:
            raise kind("not now") if kind else ToolError("exception", "not now")
        return f"{x} {number}"

    count.calls = count.running = count.most = 0
    count.pure = pure
    return count


def play(box, *calls, example=None, at_once=False):
    """The (content, error, seconds) of each (name, arguments), in one session."""

    async def run():
        session = box.open(example)
        waiting = [session.call(*call) for call in calls]
        done = await asyncio.gather(*waiting) if at_once else [await one for one in waiting]
        await session.close()
        await box.close()
        return done

    return asyncio.run(run())


# -- options


def test_options_reach_the_instance_and_are_cast():
    box = Toolbox([Shelf], options=("Shelf.book=a.b=c", "Shelf.copies=5"))
    assert play(box, ("Shelf", {"page": 7}))[0][:2] == ("a.b=c 7 5", None)


@pytest.mark.parametrize(
    "options, wrong",
    [
        ((), "Shelf.book is missing: write Shelf.book=…"),
        (("Shelf.boook=x",), "Shelf has no option 'boook': did you mean book?"),
        (("Shelf.book=x", "Shelf.copies=many"), "Shelf.copies = 'many': expected int"),
        (("Shelf.book=x", "Shelf.book=y"), "Shelf.book is given twice"),
        (("Shelf.book",), "cannot read 'Shelf.book': write name.option=value"),
        (("Shelf.book=x", "Self.book=y"), "Self is none of the tools: did you mean Shelf?"),
        (("Shelf.book=x", "Shelf.timeout=0"), "timeout = 0.0: expected more than 0"),
        (("Shelf.book=x", "Shelf.retries=3"), "retries has no effect: Shelf asks no network"),
        (("Shelf.book=x", "Shelf.retries=-1"), "retries = -1: expected 0 or more"),
        (("Shelf.book=x", "Shelf.concurrency=17"), "run at most tool_concurrency = 16 calls"),
        (("Shelf.book=burnt",), "book = 'burnt': expected one that can be read"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused_at_the_start(options, wrong):
    """Pitfalls 42 and 55: nothing is ignored, and what is missing stops the run at once."""
    with pytest.raises(UserError) as error:
        Toolbox([Shelf], options=options)
    assert wrong in str(error.value)


def test_a_function_has_no_options_but_those_of_every_tool():
    with pytest.raises(UserError, match="count has no option 'x'"):
        Toolbox([counted()], options=("count.x=1",))
    assert Toolbox([counted()], options=("count.timeout=3",)).tools["count"].timeout == 3


def test_an_option_of_its_own_that_has_the_name_of_a_common_one_is_refused():
    """Pitfall 55: it could not be given, or would set something else."""

    class Slow:
        def __init__(self, timeout: float = 3.0):
            self.timeout = timeout

        def __call__(self) -> str:
            """Waits."""

    with pytest.raises(UserError, match="'Slow' has 'timeout', as every tool has: rename that"):
        Toolbox([Slow])


def test_a_shared_tool_that_cannot_be_made_is_named():
    class Broken:
        shared = True

        def __init__(self):
            raise OSError("no such device")

        def __call__(self) -> str:
            """Does."""

    with pytest.raises(UserError, match="'Broken' cannot be made: OSError: no such device"):
        Toolbox([Broken])


def test_describing_alone_makes_nothing_and_needs_no_option():
    Shelf.made.clear()
    box = Toolbox([Shelf], describe_only=True)
    assert box.schemas[0]["function"]["name"] == "Shelf" and not Shelf.made


# -- state


def test_a_shared_tool_is_made_once_and_closed_with_the_box():
    Shelf.made.clear()
    box = Toolbox([Shelf], options=("Shelf.book=x",))
    assert len(Shelf.made) == 1

    async def run():
        sessions = [box.open() for _ in range(3)]
        await asyncio.gather(*(s.call("Shelf", {"page": 1}) for s in sessions))
        for session in sessions:
            await session.close()
        assert Shelf.made[0].closed == 0
        await box.close()

    asyncio.run(run())
    assert len(Shelf.made) == 1 and Shelf.made[0].closed == 1 and not box.errors


def test_a_mistake_in_another_tool_leaves_no_shared_one_behind():
    """Nobody could close it: there is no Toolbox."""
    Shelf.made.clear()
    for wrong in "count.timeout=0", "count.pages=1", "cuont.timeout=1":
        with pytest.raises(UserError):
            Toolbox([Shelf, counted()], options=("Shelf.book=x", wrong))
    assert not Shelf.made


def test_a_tool_gets_the_row_of_its_trajectory():
    """Pitfall 40: and keeps it from the others, in the cache too."""
    box = Toolbox([Row], options=("Row.prefix=p",))

    async def run():
        first, second = box.open({"name": "a"}), box.open({"name": "b"})
        both = [await s.call("Row", {"x": 1}) for s in (first, second, first)]
        return [content for content, _, _ in both]

    Row.calls.clear()
    assert asyncio.run(run()) == ["pa1", "pb1", "pa1"] and Row.calls == [1, 1]


def test_a_row_that_a_tool_cannot_use_is_an_observation():
    content, error, _ = play(Toolbox([Row]), ("Row", {"x": 1}))[0]
    assert error == "exception" and content == "error: Row raised KeyError: 'name'"


def test_a_mistake_of_the_user_ends_the_run():
    """Refused, not told to the model: a row that names a database which is not there, say."""

    class Missing:
        def __init__(self, example):
            raise UserError(f"no file {example['database']}")

        def __call__(self) -> str:
            """Nothing."""

    for pure in (False, True):
        Missing.pure = pure
        with pytest.raises(UserError, match="no file nope.sqlite"):
            play(Toolbox([Missing]), ("Missing", {}), example={"database": "nope.sqlite"})


def test_what_depends_on_a_state_is_not_kept():
    """Pitfall 40: neither by a user's option, nor by a mark without a key."""

    class Tally:
        def __init__(self):
            self.n = 0

        def __call__(self) -> str:
            """Counts."""
            self.n += 1
            return str(self.n)

    with pytest.raises(UserError, match="depends on what it was asked before: drop it"):
        Toolbox([Tally], options=("Tally.cache=true",))
    Tally.pure = True
    done = play(Toolbox([Tally]), ("Tally", {}), ("Tally", {}))
    assert [content for content, _, _ in done] == ["1", "2"]


def test_an_instance_that_is_made_behind_its_deadline_is_closed():
    closed = []
    released = threading.Event()

    class Slow:
        def __init__(self):
            released.wait()

        def __call__(self) -> str:
            """Does."""

        def close(self):
            closed.append(self)

    async def run():
        box = Toolbox([Slow], timeout=0.02)
        session = box.open()
        assert (await session.call("Slow", {}))[1] == "timeout"
        await session.close()
        released.set()
        while not closed or box.leaked:
            await asyncio.sleep(0.01)

    asyncio.run(run())
    assert len(closed) == 1


def test_options_of_tool_objects_are_checked_and_the_object_stays_as_it_was():
    parameters = {"type": "object", "properties": {}}
    schema = {"function": {"name": "mine", "description": "x", "parameters": parameters}}

    async def mine():
        raise NetworkError("busy")

    tool = Tool("mine", schema, mine, True, network=True, retries=0)
    with pytest.raises(UserError, match="mine has no option 'nonsense'"):
        Toolbox([tool], options=("mine.nonsense=3",))
    box = Toolbox([tool], options=("mine.timeout=1",))
    assert tool.timeout is None and box.tools["mine"].timeout == 1
    assert box.tools["mine"].retries == 0


def test_fewer_than_no_retries_are_refused():
    """Pitfall 41: the tool would never be asked, and "(no output)" kept as its result."""
    tool = counted()
    tool.network = True
    with pytest.raises(UserError, match="count.retries = -1: expected 0 or more"):
        Toolbox([tool], options=("count.retries=-1",))
    made = loading.load([tool])[0][0]
    made.retries = -1
    with pytest.raises(UserError, match="count.retries = -1: expected 0 or more"):
        Toolbox([made])


def test_a_file_that_was_changed_is_run_again(tmp_path):
    file = tmp_path / "mine.py"
    for text in ("old", "new"):
        file.write_text(
            f'def mine() -> str:\n    """Says."""\n    return "{text}"\n\n\nmine.pure = True\n'
        )
        box = Toolbox([f"{file}:mine"])
        assert play(box, ("mine", {}))[0][0] == text


def test_tools_of_one_maker_share_its_state_and_wait_for_each_other_only_if_serial():
    async def make(example):
        return {"at once": 0, "most": 0}

    async def use(state):
        state["at once"] += 1
        state["most"] = max(state["most"], state["at once"])
        await asyncio.sleep(0.02)
        state["at once"] -= 1
        return f"{state['most']}"

    empty = {"type": "object", "properties": {}}

    def tool(name, serial):
        schema = {"function": {"name": name, "description": name, "parameters": empty}}
        return Tool(name, schema, use, True, make=make, serial=serial)

    for serial, most in ((True, "1"), (False, "2")):
        box = Toolbox([tool("one", serial), tool("two", serial)])
        done = play(box, ("one", {}), ("two", {}), at_once=True)
        assert max(content for content, _, _ in done) == most


# -- limits of one tool


def test_a_tool_has_its_own_deadline_and_its_own_number_of_calls_at_once():
    box = Toolbox([counted(pure=False, seconds=60)], options=("count.timeout=0.02",))
    content, error, _ = play(box, ("count", {"x": 1}))[0]
    assert error == "timeout" and "longer than 0.02 s" in content
    for at_once in (1, 2):
        tool = counted(pure=False, seconds=0.05)
        box = Toolbox([tool], options=(f"count.concurrency={at_once}",))
        play(box, *[("count", {"x": 1})] * 5, at_once=True)
        assert (tool.calls, tool.most) == (5, at_once)


# -- pure


def test_what_is_known_is_not_run_again_and_takes_no_time():
    tool = counted(seconds=0.01)
    box = Toolbox([tool])
    first, again, other = play(box, *[("count", {"x": x}) for x in (1, 1, 2)])
    assert (first[0], again[0], other[0]) == ("1 1", "1 1", "2 2")
    assert first[2] > 0.005 and again[2] == 0.0 and other[2] > 0.005 and box.cache.hits == 1


def test_calls_at_the_same_moment_run_once():
    tool = counted(seconds=0.02)
    done = play(Toolbox([tool]), *[("count", {"x": 1})] * 8, at_once=True)
    assert {content for content, _, _ in done} == {"1 1"} and tool.calls == 1


def test_an_error_is_not_kept_and_those_who_waited_for_it_run_at_once():
    """Pitfall 38: eight calls that all hang last as long as one."""
    tool = counted(fails=100, seconds=0.1)
    done = play(Toolbox([tool]), *[("count", {"x": 1})] * 8, at_once=True)
    assert [error for _, error, _ in done] == ["exception"] * 8
    assert (tool.calls, tool.most) == (8, 7)  # the first alone, then those who waited for it


def test_an_instance_that_hangs_while_it_is_made_takes_one_deadline():
    """It is not made a second time for the call."""
    released = threading.Event()
    made = []

    class Hangs:
        pure = True

        def __init__(self):
            made.append(self)
            released.wait()

        def __call__(self) -> str:
            """Does."""

    box = Toolbox([Hangs], timeout=0.2)
    content, error, seconds = play(box, ("Hangs", {}))[0]
    assert (content, error) == ("error: Hangs took longer than 0.2 s and was stopped", "timeout")
    assert seconds >= 0.2 and len(made) == 1 and box.errors == {"timeout": 1}
    released.set()


def test_a_cancelled_call_leaves_nobody_waiting():
    tool = counted(seconds=0.1)
    box = Toolbox([tool])

    async def run():
        first, second = (asyncio.ensure_future(box.open().call("count", {"x": 1})) for _ in "ab")
        await asyncio.sleep(0.02)
        first.cancel()
        return await second

    assert asyncio.run(run())[:2] == ("1 2", None)


def test_what_is_not_pure_is_run_each_time_unless_the_user_says_so():
    for tool, options, calls in (
        (counted(pure=False), (), 2),
        (counted(pure=False), ("count.cache=true",), 1),
        (counted(), ("count.cache=false",), 2),
    ):
        play(Toolbox([tool], options=options), *[("count", {"x": 1})] * 2)
        assert tool.calls == calls
    tool = counted()
    play(Toolbox([tool], cache="none"), *[("count", {"x": 1})] * 2)
    assert tool.calls == 2


def test_a_file_as_a_cache_is_refused(tmp_path, monkeypatch):
    """Results are kept in memory, for the run alone."""
    monkeypatch.chdir(tmp_path)
    for where in ("known.sqlite", "", "true", "False"):
        with pytest.raises(UserError, match=f"^tool_cache = '{where}': expected memory or none: "):
            Toolbox([counted()], cache=where)
    assert list(tmp_path.iterdir()) == []


def test_what_was_not_used_for_longest_goes_when_the_cache_is_full(monkeypatch):
    monkeypatch.setattr(caches, "SIZE", 40)
    cache = caches.Cache()
    ran = []

    async def ask(key, text):
        async def work():
            ran.append(key)
            return text, None, 0.1

        return await cache.run(key, work)

    async def run():
        await ask("a", "x" * 15)
        await ask("b", "x" * 15)
        assert await ask("a", "not run") == ("x" * 15, None, 0.0)
        await ask("c", "x" * 15)  # there is no room for three
        await ask("a", "not run")
        await ask("b", "x" * 15)

    asyncio.run(run())
    assert ran == ["a", "b", "c", "b"]


def test_a_result_that_is_too_long_is_not_kept(monkeypatch):
    monkeypatch.setattr(caches, "LONGEST", 2)
    tool = counted()  # gives "1 1", then "1 2"
    done = play(Toolbox([tool]), *[("count", {"x": 1})] * 2)
    assert [content for content, _, _ in done] == ["1 1", "1 2"]


def test_keeping_the_results_of_a_tool_where_none_are_kept_is_refused():
    """Pitfall 55."""
    with pytest.raises(UserError, match="count.cache=true has no effect, .*: write cache=false"):
        Toolbox([counted(pure=False)], options=("count.cache=true",), cache="none")


# -- network


def test_only_a_network_error_of_a_network_tool_is_tried_again(monkeypatch):
    """Pitfall 41: after the retries it is an observation with its own name, never a result."""
    monkeypatch.setattr(toolboxes, "PAUSE", 0.01)
    for network, fails, kind, calls, error in (
        (True, 2, NetworkError, 3, None),
        (True, 9, NetworkError, 3, "network"),
        (False, 1, NetworkError, 1, "network"),
        (True, 1, None, 1, "exception"),
    ):
        tool = counted(pure=False, fails=fails, kind=kind)
        tool.network = network
        box = Toolbox([tool])
        assert play(box, ("count", {"x": 1}))[0][1] == error
        assert tool.calls == calls and box.errors[error] == (error is not None)


def test_pauses_between_retries_double_up_to_a_limit(monkeypatch):
    """A server that is down for a minute is asked again soon after it is back."""
    pauses = []

    async def note(seconds):
        pauses.append(seconds)

    monkeypatch.setattr(toolboxes, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": note}))
    tool = counted(pure=False, fails=99, kind=NetworkError)
    tool.network = True
    box = Toolbox([tool], options=("count.retries=11",))
    assert play(box, ("count", {"x": 1}))[0][1] == "network"
    assert len(pauses) == 11 and max(pauses) <= 8
    for number, pause in enumerate(pauses):
        assert 0.5 <= pause / min(8, 0.5 * 2**number) <= 1.5
    assert 40 < sum(pauses) < 70


def test_retries_end_at_the_deadline(monkeypatch):
    monkeypatch.setattr(toolboxes, "PAUSE", 0.05)
    tool = counted(pure=False, fails=99, kind=NetworkError)
    tool.network = True
    box = Toolbox([tool], timeout=0.2, options=("count.retries=50",))
    assert play(box, ("count", {"x": 1}))[0][1] == "timeout"
    assert tool.calls < 10  # the pauses between them grow


def test_every_tool_file_says_in_its_docstring_what_it_does():
    """And defines the tool that it is named after, or holds the names that users import."""
    inner = ["__init__"]
    for path in sorted((Path(config.HERE) / "tools").glob("*.py")):
        assert path.read_text().startswith('"""'), path.name
        assert (path.stem in names_in(path)) != (path.stem in inner), path.name

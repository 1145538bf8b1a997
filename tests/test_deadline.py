"""Pins deadline.py: what comes in time, what is left behind and is known to be, and what exits.

pytest tests/test_deadline.py
"""

import asyncio
import functools
import queue
import threading

import pytest

from run import deadline
from run.config import UserError
from run.deadline import Exited, in_thread, in_time, is_alive


async def gives(value):
    return value


async def raises(error):
    raise error


def test_what_comes_in_time_is_given_and_what_it_raises_is_raised():
    async def run():
        abandoned = []
        assert await in_time(gives(3), 60.0, abandoned) == (True, 3)
        assert await in_time(in_thread(lambda: 4, abandoned), 60.0, abandoned) == (True, 4)
        with pytest.raises(KeyError):
            await in_time(raises(KeyError("x")), 60.0, abandoned)
        with pytest.raises(ZeroDivisionError):
            await in_time(in_thread(lambda: 1 / 0, abandoned), 60.0, abandoned)
        assert abandoned == []

    asyncio.run(run())


def test_a_thread_that_hangs_is_left_behind_until_it_ends_and_what_it_gives_is_told():
    """Pitfall 37."""
    released = threading.Event()
    told = []

    def hang():
        released.wait()
        return "late"

    async def run():
        abandoned = []
        work = in_thread(hang, abandoned, told.append)
        assert await in_time(work, 0.05, abandoned) == (False, None)
        (thread,) = abandoned
        assert is_alive(thread) and thread.daemon and not told
        released.set()
        while not told:
            await asyncio.sleep(0.01)
        thread.join()
        assert told == ["late"] and not is_alive(thread)

    asyncio.run(run())


def test_what_a_thread_gives_at_the_very_moment_of_a_cancellation_is_told_too():
    """Else an instance that was made at its deadline would never be closed."""
    told = []
    threads = queue.Queue()

    def give():
        threads.put(threading.current_thread())
        return "late"

    async def run():
        task = asyncio.create_task(in_thread(give, [], told.append))
        await asyncio.sleep(0)
        threads.get().join()  # without the loop, which would let the task go on
        asyncio.get_running_loop().call_soon(task.cancel)  # right behind the result
        with pytest.raises(asyncio.CancelledError):
            await task
        assert told == ["late"]

    asyncio.run(run())


def test_a_task_that_swallows_its_cancellation_is_left_behind():
    """Pitfall 37."""
    released = []

    async def stubborn():
        while not released:
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                pass
        raise ValueError("that nobody waits for")

    async def run():
        abandoned = []
        assert await in_time(stubborn(), 0.05, abandoned) == (False, None)
        assert await in_time(gives(1), 60.0, abandoned) == (True, 1)
        (task,) = abandoned
        assert is_alive(task)
        released.append(True)
        while is_alive(task):
            await asyncio.sleep(0.01)
        # the list does not grow with the run: who has ended leaves when the next one comes
        released.clear()
        await in_time(stubborn(), 0.05, abandoned)
        assert len(abandoned) == 1 and abandoned != [task]
        released.append(True)

    asyncio.run(run())


def test_a_caller_that_is_cancelled_leaves_nothing_running_unknown():
    released = threading.Event()

    async def run():
        abandoned = []
        waiting = asyncio.create_task(in_time(in_thread(released.wait, abandoned), 60.0, abandoned))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.sleep(0)
        assert any(isinstance(job, threading.Thread) for job in abandoned)
        released.set()

    asyncio.run(run())


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError()])
def test_what_exits_or_cancels_itself_ends_nothing_but_itself(error):
    def leave():
        raise error

    async def run():
        for work in (raises(error), in_thread(leave, [])):
            with pytest.raises(Exited, match=f"^{type(error).__name__}") as caught:
                await in_time(work, 60.0, [])
            assert isinstance(caught.value.error, type(error))

    asyncio.run(run())


def test_a_stop_iteration_is_an_error_like_any_other():
    """A future cannot carry it, and the thread would be waited for without end."""

    async def run():
        with pytest.raises(RuntimeError, match="StopIteration"):
            await in_time(in_thread(lambda: next(iter([])), []), 60.0, [])

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["a function", "a partial", "an instance", "a tool's make"])
def test_threads_that_hang_are_not_started_for_ever(monkeypatch, kind):
    """B8: they are counted, and above a number a sentence ends the run; those that have ended do
    not count."""
    monkeypatch.setattr(deadline, "MOST_HANGING", 3)
    release = threading.Event()

    class hang:
        def __call__(self):
            release.wait()

    def wait_for_the_bus(*_):
        release.wait()

    functions = {
        "a function": wait_for_the_bus,
        "a partial": functools.partial(functools.partial(wait_for_the_bus, 1), 2),
        "an instance": hang(),
        "a tool's make": lambda: release.wait(),
    }
    abandoned = []

    async def scene():
        for _ in range(3):
            work = deadline.in_thread(functions[kind], abandoned)
            assert await deadline.in_time(work, 0.01, abandoned) == (False, None)
        count = threading.active_count()
        for _ in range(5):
            with pytest.raises(UserError, match="3 calls hang in threads .*a time limit") as caught:
                work = deadline.in_thread(functions[kind], abandoned)
                await deadline.in_time(work, 0.01, abandoned)
            if kind in ("a function", "a partial"):
                assert "wait_for_the_bus" in str(caught.value)
        assert threading.active_count() == count
        release.set()
        for thread in abandoned:
            thread.join()
        assert await deadline.in_thread(lambda: 7, abandoned) == 7

    asyncio.run(scene())

"""Work under a deadline: what hangs is left behind, and holds up neither the run nor its end.

    abandoned = []
    done, result = await in_time(fetch(url), 10.0, abandoned)
    done, result = await in_time(in_thread(compute, abandoned), 10.0, abandoned)

`abandoned` is the caller's list of the threads and tasks that are past their deadline and may still
run: `is_alive(job)` says whether one does.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial

from run.config import UserError

MOST_HANGING = 256  # threads left behind that still run, of one tool box or reward: then it ends
GRACE = 0.1  # seconds that cancelled work has to clean up before it counts as left behind


class Exited(Exception):
    """Raised in place of an `error` that would end more than the work: SystemExit, or such."""

    def __init__(self, error: BaseException):
        super().__init__(shown(error))
        self.error = error


async def in_time(work: Coroutine, seconds: float, abandoned: list) -> tuple[bool, object]:
    """Waits for `work`: (True, its result), or (False, None) if that does not come within
    `seconds`.

    Late work is cancelled; what goes on all the same is added to `abandoned`. Raises what `work`
    raises, and Exited if it exits or cancels itself.
    """
    # not asyncio.timeout: it would wait for ever for work that swallows its cancellation
    task = asyncio.create_task(_without_exit(work))
    try:
        await asyncio.wait({task}, timeout=seconds)
        is_done = task.done()
        if not is_done:
            task.cancel()
            await asyncio.wait({task}, timeout=GRACE)
    finally:  # also if the caller itself is cancelled
        if not task.done():
            task.cancel()
            _abandon(task, abandoned)
            task.add_done_callback(_look_at_error)
    if not is_done:
        return False, None
    if task.cancelled():
        raise Exited(asyncio.CancelledError("it cancelled itself"))
    return True, task.result()


async def in_thread(function: Callable, abandoned: list, late: Callable | None = None):
    """Runs function() in a daemon thread of its own, not one of a pool: a hung one costs no worker
    and does not block the exit.

    If this is cancelled, the thread is added to `abandoned` and goes on; late(result) is called
    with what it gives in the end. Raises what the function raises, Exited if it exits, and
    UserError instead of starting a thread if MOST_HANGING of those in `abandoned` still run.
    """
    _refuse_more_threads(abandoned)
    loop = asyncio.get_running_loop()
    outcome = loop.create_future()  # (the result, None), or (None, what the function raised)

    def work():
        result = None
        error = None
        try:
            result = function()
        except BaseException as raised:  # SystemExit too: in a thread it would vanish unseen
            error = raised
        with suppress(RuntimeError):  # the loop was closed while an abandoned thread went on
            loop.call_soon_threadsafe(deliver, result, error)

    def deliver(result, error):
        if not outcome.done():
            outcome.set_result((result, error))
        elif late and error is None:  # nobody waits for it any more
            late(result)

    thread = threading.Thread(target=work, name=_name_of(function), daemon=True)
    thread.start()
    try:
        result, error = await outcome
    except asyncio.CancelledError:
        _abandon(thread, abandoned)
        if not outcome.cancelled():  # it came at the very moment of the deadline
            deliver(*outcome.result())
        raise
    if error is None:
        return result
    if isinstance(error, Exception):
        raise error
    raise Exited(error)


def is_alive(job: threading.Thread | asyncio.Task) -> bool:
    """Says whether a thread or a task still runs."""
    if isinstance(job, threading.Thread):
        return job.is_alive()
    return not job.done()


def shown(error: BaseException) -> str:
    """Writes an error as it reads in a message: its type, and its text if it has one."""
    return f"{type(error).__name__}: {str(error)[:2000]}".removesuffix(": ")


def _refuse_more_threads(abandoned):
    """Refuses one more thread where many hang: each costs memory, and nothing can stop it."""
    hanging = [job for job in abandoned if isinstance(job, threading.Thread) and job.is_alive()]
    if len(hanging) >= MOST_HANGING:
        names = sorted({thread.name for thread in hanging})
        raise UserError(
            f"{len(hanging)} calls hang in threads that nothing can stop, of {', '.join(names)}: "
            "give what they wait for a time limit of its own (requests.get(url, timeout=5)), or "
            "write it as an async function, which can be cancelled"
        )


def _name_of(function):
    """Finds what the user calls a function: a partial is of the function in it."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _abandon(job, abandoned):
    # those that have ended go: the list must not grow with the run
    abandoned[:] = [job for job in abandoned if is_alive(job)]
    abandoned.append(job)


def _look_at_error(task):
    """Looks at the error of a task that nobody waits for: else asyncio would report it."""
    if not task.cancelled():
        task.exception()


async def _without_exit(work):
    try:
        return await work
    except (Exception, asyncio.CancelledError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # SystemExit: asyncio would hand it to the loop, ending the run
        raise Exited(error) from error

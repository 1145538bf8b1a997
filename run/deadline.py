"""Work under a deadline."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress


def start_thread(function: Callable, late: Callable | None = None):
    """(thread, future of (result, None) or (None, what it raised)) of function(), which runs in a
    daemon thread of its own, not in a pool: a hung one costs no worker and does not block exit.
    late: called with a result that nobody waits for any more."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def deliver(result, error):
        if not future.done():
            future.set_result((result, error))
        elif late and error is None:
            late(result)

    def work():
        try:
            outcome = function(), None
        except BaseException as error:  # SystemExit too: in a thread it would vanish unseen
            outcome = None, error
        with suppress(RuntimeError):  # the loop was closed while an abandoned thread went on
            loop.call_soon_threadsafe(deliver, *outcome)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, future


async def _no_exit(work):
    try:
        return await work
    except (Exception, asyncio.CancelledError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # SystemExit: asyncio would hand it to the loop, ending the run
        raise RuntimeError(shown(error)) from error


def _alive(job):
    return job.is_alive() if isinstance(job, threading.Thread) else not job.done()


def shown(error):
    return f"{type(error).__name__}: {str(error)[:2000]}".removesuffix(": ")

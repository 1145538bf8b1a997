"""The one event loop on which everything asynchronous runs."""

import asyncio
import functools
import threading


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rollouts", daemon=True).start()
    return loop


def run_blocking(coroutine):
    """The result of a coroutine, from ordinary code. It runs on one event loop in a thread of its
    own: engines and tools keep their connections between calls, and it works in notebooks too,
    whose own loop is already running."""
    ended = threading.Event()

    async def run():
        try:
            return await coroutine
        finally:
            ended.set()

    future = asyncio.run_coroutine_threadsafe(run(), _loop())
    try:
        return future.result()
    except BaseException:  # Ctrl-C too: nothing goes on behind the caller's back
        future.cancel()
        ended.wait(10)  # tools close their sandboxes; the process may end right after this
        raise

"""The one event loop on which everything asynchronous runs."""

import asyncio
import functools
import threading


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rollouts", daemon=True).start()
    return loop


class Running:
    """A coroutine that runs on the one event loop, while the calling thread does something else."""

    def __init__(self, coroutine):
        self.ended = threading.Event()
        self.future = asyncio.run_coroutine_threadsafe(self._run(coroutine), _loop())

    async def _run(self, coroutine):
        try:
            return await coroutine
        finally:
            self.ended.set()

    def result(self):
        """Waits for its result, and raises what it raises."""
        try:
            return self.future.result()
        except BaseException:  # Ctrl-C too: nothing goes on behind the caller's back
            self.cancel()
            raise

    def cancel(self) -> None:
        """Ends it: tools close their sandboxes; the process may end right after this."""
        self.future.cancel()
        self.ended.wait(10)


def run_blocking(coroutine):
    """Runs a coroutine from ordinary code, and returns its result. It runs on one event loop in a
    thread of its own: engines and tools keep their connections between calls, and it works in
    notebooks too, whose own loop is already running."""
    return Running(coroutine).result()

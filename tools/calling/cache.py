"""The results of pure tools, kept in memory so that what was asked before is not run again.

    cache = Cache()
    content, error, seconds = await cache.run(key, work)

The samples of a group often make the same call at the same moment: then one of them runs it and the
others wait for its result. Only text without an error is kept. A result that was not run has
taken 0.0 seconds: that is how a call says that it came from here.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable

SIZE = 200_000_000  # characters kept; what was not used for longest goes
LONGEST = 50_000  # characters of a result; a longer one is not kept


class Cache:
    """The results of one Toolbox. Used from its event loop alone."""

    def __init__(self):
        self.hits = 0  # results that were known
        self._texts = OrderedDict()  # key -> result, the one used last at the end
        self._size = 0  # characters of the keys and the results
        self._running = {}  # key -> a future that is done when the call is

    async def run(self, key: str, work: Callable) -> tuple[str | list, str | None, float]:
        """Returns (content, error, seconds) that the coroutine `work()` gives or gave for `key`."""
        # 1. the same call runs at this moment: wait for its result
        running = self._running.get(key)
        if running is not None:
            await asyncio.wait({running})

        # 2. the result is known
        text = self._texts.get(key)
        if text is not None:
            self._texts.move_to_end(key)
            self.hits += 1
            return text, None, 0.0
        if running is not None:
            # that one failed; this one runs on its own: a queue of time-outs would be as long
            return await work()

        # 3. run it
        ended = asyncio.get_running_loop().create_future()
        self._running[key] = ended
        try:
            content, error, seconds = await work()
        finally:  # also when it is cancelled: nobody waits for ever
            del self._running[key]
            ended.set_result(None)

        # 4. keep it, before those who waited look; drop what was not used for longest
        if error is None and isinstance(content, str) and len(content) <= LONGEST:
            self._texts[key] = content
            self._size += len(key) + len(content)
            while self._size > SIZE:
                oldest_key, oldest_text = self._texts.popitem(last=False)
                self._size -= len(oldest_key) + len(oldest_text)
        return content, error, seconds

"""The results of pure tools, so that what was asked before is not run again.

    cache = Cache("memory")  # or "none", or a file that is kept
    content, error, seconds = await cache.run(key, work)

The samples of a group often make the same call at the same moment: then one of them runs it and the
others wait for its result. Only text without an error is kept. A result that was not run has
taken 0.0 seconds: that is how a call says that it came from here.
"""

import asyncio
import sqlite3
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

from run.config import UserError

SIZE = 200_000_000  # characters kept in memory; what was not used for longest goes
LONGEST = 50_000  # characters of a result; a longer one is not kept


class Cache:
    """where: "memory", "none", or the path of a file, which is kept for later runs: an SQLite
    database. UserError if that cannot be used. Used from one event loop at a time."""

    def __init__(self, where: str = "memory"):
        self.on, self.hits = where != "none", 0  # hits: results that were known
        self._known, self._size = OrderedDict(), 0  # key -> text; their characters
        self._running = {}  # key -> a future that is done when the call is
        self._file = _open(where) if where not in ("memory", "none") else None

    async def run(self, key: str, work: Callable) -> tuple:
        """What `work()`, a coroutine of (content, error, seconds), gives or gave for this key."""
        loop = asyncio.get_running_loop()
        running = self._running.get(key)
        if running is not None and running.get_loop() is loop:
            await asyncio.wait({running})
            found = self._find(key)
            # If that one failed, this one runs on its own: a queue of time-outs would be as long.
            return (found, None, 0.0) if found is not None else await work()
        if (found := self._find(key)) is not None:
            return found, None, 0.0
        done = self._running[key] = loop.create_future()
        try:
            content, error, seconds = await work()
            if error is None and isinstance(content, str) and len(content) <= LONGEST:
                self._keep(key, content)
            return content, error, seconds
        finally:
            if self._running.get(key) is done:
                del self._running[key]
            done.set_result(None)

    def _find(self, key: str) -> str | None:
        found = self._known.get(key)
        if found is not None:
            self._known.move_to_end(key)
        elif self._file is not None:
            with suppress(sqlite3.DatabaseError):  # damaged meanwhile: then it is not known
                rows = self._file.execute("select result from results where key = ?", (key,))
                found = next((row[0] for row in rows), None)
        self.hits += found is not None
        return found

    def _keep(self, key: str, text: str) -> None:
        if key in self._known:  # two that waited for one that failed
            return
        self._size += len(key) + len(text)
        self._known[key] = text
        while self._size > SIZE:
            self._size -= sum(map(len, self._known.popitem(last=False)))
        if self._file is not None:
            with suppress(sqlite3.DatabaseError):  # locked, full, damaged: then it is not kept
                self._file.execute("insert or replace into results values (?, ?)", (key, text))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _open(path: str) -> sqlite3.Connection:
    remedy = "give memory, none, or a file that may be made"
    if path.lower() in ("", "true", "false"):  # SQLite would take them for names of a file
        raise UserError(f"tool_cache = {path!r}: {remedy}")
    try:
        # no thread is asked: calls come from one event loop, but the run may end in another
        file = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=1.0)
        file.execute("pragma journal_mode = wal")
        file.execute("pragma synchronous = off")  # a cache may be lost with the machine
        file.execute("create table if not exists results (key text primary key, result text)")
    except sqlite3.Error as error:
        raise UserError(f"tool_cache = {path!r}: {error}: {remedy}") from error
    return file

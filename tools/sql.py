"""The sql tool: queries a SQLite database that cannot be changed by them.

    --tools=sql --tool_options=sql.database=shop.sqlite  # or a column `database` in the data
    print(sql.describe("shop.sqlite"))                   # the schema, for a prompt
    columns, rows = sql.execute("shop.sqlite", "SELECT 1")  # for rewards

Each query runs in a worker: a process that does nothing else, takes one query at a time and is
used again (0.5 ms a call, against 0.2 ms in this process). SQLite's own limits are not enough: it
does not look at the clock or at an interrupt inside of one function, and replace(), instr(), trim()
or LIKE on two long texts take hours; and its limit on memory would hold for all of the trainer.

What is covered: the file is opened read-only and immutable, so that SQLite makes no journal and no
lock; an authorizer lets through only what reads (no ATTACH, no PRAGMA but those that describe a
table, no extension), and the worker may not write to any file (RLIMIT_FSIZE). A query that takes
longer than `seconds` is stopped, inside of a function the worker is killed by its alarm. Memory is
limited by SQLite, and the worker's by RLIMIT_AS. Rows, width and size of the result are limited.

What is not covered: a database that somebody else changes during the run (immutable: it is not
looked at whether it has changed); one with a write-ahead log or a journal beside it is refused.
macOS refuses RLIMIT_AS; SQLite's own limit holds there. Windows is not supported.
"""

import atexit
import json
import os
import re
import resource
import signal
import socket
import sqlite3
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from urllib.parse import quote

if __name__ != "__main__":  # the worker below does without: it starts faster
    import subprocess

    from run.config import UserError, near
    from tools import ToolError

MEMORY = 256 * 2**20  # bytes that SQLite may take; the worker has twice as much
QUERY_SIZE = 100_000  # bytes
VALUE_SIZE = 16 * 2**20  # bytes of one value
RESULT_SIZE = 32 * 2**20  # bytes of all values of a result
CELL = 200  # characters of a value that the model is shown
NAMES = 60  # tables, or columns of a table, that a message or a description names
IDLE = 16  # workers that are kept for the next query
HARMLESS = "table_info table_xinfo table_list index_list index_info index_xinfo foreign_key_list"

# -- the tool


class sql:
    pure = True

    def __init__(
        self,
        example: dict,
        database: str = "",
        rows: int = 20,
        chars: int = 4000,
        seconds: float = 5.0,
    ):
        """database: path, where the data row has no `database`. rows, chars: of a result, at most.
        seconds: that a query may take. UserError if there is no such database."""
        self.path = str(example.get("database") or database)
        if not self.path:
            raise UserError(
                "the sql tool has no database: give the data a column `database`, or the option "
                "sql.database=file.sqlite"
            )
        if rows < 1 or chars < 1 or seconds <= 0:
            raise UserError(
                f"sql.rows = {rows}, sql.chars = {chars}, sql.seconds = {seconds}: "
                "expected 1 or more, and seconds above 0"
            )
        _check(self.path)
        file = os.stat(self.path)
        self.key = f"{os.path.abspath(self.path)} {file.st_size} {file.st_mtime_ns}"
        self.rows, self.chars, self.seconds = rows, chars, seconds

    def __call__(self, query: str) -> str:
        """Run a SQL query on the database and return the rows. It can only be read.

        Args:
            query: One SELECT statement, in SQLite's dialect.
        """
        columns, rows = _run(self.path, query, self.rows + 1, self.seconds, CELL)
        return _table(columns, rows, self.rows, self.chars)


def execute(
    path: str, query: str, rows: int = 10_000, seconds: float = 5.0
) -> tuple[list[str], list[tuple]]:
    """-> columns, the first `rows` rows (None, int, float, str, bytes). ToolError on a query that
    is wrong, takes too long or gives too much; UserError if there is no such database."""
    _check(path)
    return _run(path, query, rows, seconds, None)


def describe(path: str, samples: int = 2) -> str:
    """The tables of a database as CREATE TABLE statements with types and keys, each with its first
    `samples` rows in comments. UserError if there is no such database, or it cannot be read."""
    _check(path)
    try:
        return _ask(path, {"samples": samples}, 30.0)["text"]
    except ToolError as error:
        raise UserError(f"cannot read the database {path}: {error.text}") from None


def _check(path):
    """UserError if the file is no database, or one that immutable would show as it was before."""
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise UserError(f"cannot read the database {path} ({error.strerror})") from None
    if head != b"SQLite format 3\0":
        raise UserError(f"{path} is no SQLite database")
    for end in "-wal", "-journal":
        with suppress(OSError), open(path + end, "rb") as file:
            if file.read(1) not in (b"", b"\0"):  # emptied, or its header is: nothing to do
                raise UserError(
                    f"{path} has changes that are not in it yet ({path}{end}): close the program "
                    f"that writes it, then run: sqlite3 {path} 'PRAGMA wal_checkpoint(TRUNCATE)'"
                )


def _run(path, query, rows, seconds, cell):
    try:
        size = len(query.encode())
    except UnicodeEncodeError:
        raise ToolError("bad_arguments", "error: the query is not valid Unicode") from None
    if size > QUERY_SIZE:
        raise ToolError("bad_arguments", f"error: the query is longer than {QUERY_SIZE} bytes")
    asked = {"query": query, "rows": rows, "cell": cell}
    reply = _ask(path, asked, seconds)
    return reply["columns"], [tuple(row) for row in reply["rows"]]


def _table(columns, rows, limit, chars):
    """Lines of "a | b", the header first."""
    if not rows:
        return "(no rows)"
    lines, size = [" | ".join(_cell(name) for name in columns)[:chars]], 0
    for row in rows[:limit]:
        line = " | ".join(_cell(value) for value in row)
        size += len(line) + 1
        if size > chars and len(lines) > 1:
            break
        lines.append(line if len(line) <= chars else f"{line[:chars]}…")
    if len(rows) > len(lines) - 1:
        lines.append(f"(the first {len(lines) - 1} rows; there are more)")
    return "\n".join(lines)


def _cell(value):
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f"x'{value[:16].hex()}{'…' if len(value) > 16 else ''}'"
    text = str(value)
    for old, new in (("\r", "\\r"), ("\n", "\\n"), ("\t", "\\t")):  # a row is a line
        text = text.replace(old, new)
    return text if len(text) <= CELL else f"{text[:CELL]}…"


# -- workers


class _Worker:
    def __init__(self):
        near_end, far_end = socket.socketpair()
        with far_end:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", os.path.abspath(__file__)],
                stdin=far_end,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # no secrets; some pythons do not start without the one that is kept
                env={k: os.environ[k] for k in ("LD_LIBRARY_PATH",) if k in os.environ},
                cwd="/",
                start_new_session=True,  # Ctrl-C is for the trainer alone
            )
        self.connection = Connection(near_end.detach())

    def ask(self, asked):
        """The reply, or the exit status of the worker if it ended instead."""
        try:
            self.connection.send_bytes(json.dumps(asked).encode())
            return json.loads(self.connection.recv_bytes(), object_hook=_blob)
        except (EOFError, OSError):
            return self.end()

    def end(self):
        self.connection.close()
        return self.process.wait()


_idle = []  # workers that wait for a query; append and pop need no lock


def _ask(path, asked, seconds):
    """What a worker replies; ToolError if it is an error, or the worker did not live to reply."""
    asked = asked | {"path": os.path.abspath(path), "seconds": seconds}
    worker = _take()
    reply = worker.ask(asked) if worker else None
    if not isinstance(reply, dict) and reply != -signal.SIGALRM:
        worker = _Worker()  # the other one may have ended long ago
        reply = worker.ask(asked)
    if not isinstance(reply, dict):
        if reply == -signal.SIGALRM:
            raise _late(seconds)
        raise ToolError("exception", "error: the query needs too much memory, or crashed SQLite")
    _idle.append(worker)
    if len(_idle) > IDLE and (worker := _take()):
        worker.end()
    if "late" in reply:
        raise _late(seconds)
    if "error" in reply:
        raise ToolError("exception", _explained(reply))
    return reply


def _take():
    try:
        return _idle.pop()
    except IndexError:
        return None


def _late(seconds):
    return ToolError("timeout", f"error: the query took longer than {seconds:g} s and was stopped")


def _explained(reply):
    """An error of SQLite, with the names that there are if it is about one."""
    text, tables = reply["error"], reply.get("tables", {})
    kind, _, name = text.partition(": ")
    if kind == "no such table":
        text += f"{_like(name, tables)}; the tables are {_names(tables)}"
    elif kind == "no such column":
        text += _like(name, [column for columns in tables.values() for column in columns])
        for table, columns in tables.items():  # those that the query speaks of
            if re.search(rf"\b{re.escape(table)}\b", reply["query"], re.I):
                text += f"; {table} has the columns {_names(columns)}"
    return f"error: {text}"[:4000]


def _like(name, names):
    """near(), whatever the case."""
    lower = {one.lower(): one for one in names}
    found = near(name.rpartition(".")[2].lower(), lower)
    for one in lower:
        if found == f": did you mean {one}?":
            return f": did you mean {lower[one]}?"
    return found


def _names(names):
    names = list(names)
    return ", ".join(names[:NAMES]) + (", …" if len(names) > NAMES else "")


def _blob(found):
    return bytes.fromhex(found["blob"]) if found.keys() == {"blob"} else found


def _forget():
    """In a child of a fork: the workers of its parent are not its own."""
    while worker := _take():
        worker.connection.close()
        worker.process.returncode = 0  # nothing to wait for


def _end():
    while worker := _take():
        worker.end()


# -- the other side: in a worker


def _serve():
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # not one byte, to any file
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (2 * MEMORY, 2 * MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it is doing
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    connection = Connection(os.dup(0))
    while True:
        try:
            asked = json.loads(connection.recv_bytes())
        except (EOFError, OSError):  # the trainer has ended
            return
        # later than the handler below, which keeps the worker
        signal.setitimer(signal.ITIMER_REAL, asked["seconds"] + 0.25)
        reply = json.dumps(_answer(asked), default=lambda blob: {"blob": blob.hex()})
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(reply.encode())


def _answer(asked):
    end = time.monotonic() + asked["seconds"]
    try:
        database = _open(asked["path"], end)
    except sqlite3.Error as error:
        return {"error": str(error)}
    try:
        if "samples" in asked:
            return {"text": _described(database, asked["samples"])}
        return _selected(database, asked)
    except MemoryError:
        return {"error": f"the query needs more than {MEMORY >> 20} MB of memory"}
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        if str(error) == "interrupted":
            return {"late": True}
        reply = {"error": _in_words(str(error)), "query": asked.get("query", "")}
        if str(error).startswith("no such "):
            with suppress(sqlite3.Error):
                reply["tables"] = {name: _columns(database, name) for name in _tables(database)}
        return reply
    finally:
        database.close()


def _in_words(error):
    if error in ("not authorized", "authorization denied") or error.startswith("access to "):
        return f"{error}: the database can only be read, by SELECT or WITH ... SELECT"
    return error


def _open(path, end):
    database = sqlite3.connect(
        f"file:{quote(os.fsencode(path))}?mode=ro&immutable=1", uri=True, isolation_level=None
    )
    database.text_factory = lambda text: text.decode("utf-8", "replace")
    for pragma in (
        "query_only=1",
        "trusted_schema=0",
        "temp_store=memory",
        f"hard_heap_limit={MEMORY}",
        "cache_size=-16000",
    ):
        database.execute(f"PRAGMA {pragma}").fetchall()
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, VALUE_SIZE)
    database.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    database.set_authorizer(_allowed)
    database.set_progress_handler(lambda: time.monotonic() > end, 10_000)
    return database


def _allowed(action, one, two, *_):
    if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE):
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_FUNCTION and two != "load_extension":
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_PRAGMA and one in HARMLESS.split():
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_UPDATE and one == "sqlite_master":
        return sqlite3.SQLITE_OK  # what json_each() asks for; SQLite itself refuses a real one
    return sqlite3.SQLITE_DENY


def _selected(database, asked):
    cursor = database.execute(asked["query"])
    if cursor.description is None:
        return {"error": "this is no query: write one SELECT statement"}
    rows, size, cell = [], 0, asked["cell"]
    for row in cursor:
        # one more than is shown, so that its end is seen to be cut
        rows.append([v[: cell + 1] if cell and isinstance(v, str | bytes) else v for v in row])
        size += sum(len(v) if isinstance(v, str | bytes) else 8 for v in rows[-1])
        if size > RESULT_SIZE:
            return {"error": f"the result is larger than {RESULT_SIZE >> 20} MB"}
        if len(rows) == asked["rows"]:
            break
    return {"columns": [column[0] for column in cursor.description], "rows": rows}


def _tables(database):
    """{name: table or view}, in the order in which they were made."""
    return dict(
        database.execute(
            "SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view') "
            "AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY rowid"
        )
    )


def _columns(database, table):
    return [row[1] for row in database.execute(f"PRAGMA table_info({_quote(table)})")]


def _quote(name):
    return '"' + name.replace('"', '""') + '"'


def _bare(database, name):
    """The name without quotes if it needs none."""
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        with suppress(sqlite3.Error):  # a word of SQL's own
            database.execute(f"SELECT 1 AS {name}")
            return name
    return _quote(name)


def _described(database, samples):
    parts = []
    for table, what in _tables(database).items():
        info = database.execute(f"PRAGMA table_info({_quote(table)})").fetchall()
        keys = database.execute(f"PRAGMA foreign_key_list({_quote(table)})").fetchall()
        primary = [row[1] for row in sorted(info, key=lambda row: row[5]) if row[5]]
        lines = []
        for _, name, kind, not_null, _, key in info[:NAMES]:
            words = [_bare(database, name), kind]
            words += ["PRIMARY KEY"] * bool(key and len(primary) == 1)
            words += ["NOT NULL"] * bool(not_null)
            for _, _, other, column, target, *_ in keys:
                if column == name:
                    words += ["REFERENCES", _bare(database, other)]
                    words[-1] += f"({_bare(database, target)})" if target else ""
            lines.append(" ".join(word for word in words if word))
        if len(primary) > 1:
            lines.append(f"PRIMARY KEY ({', '.join(_bare(database, name) for name in primary)})")
        if len(info) > NAMES:
            lines.append(f"... {len(info) - NAMES} columns more")
        body = ",\n  ".join(lines)
        text = f"CREATE {what.upper()} {_bare(database, table)} (\n  {body}\n);"
        if what == "table":  # a view may take long
            text += _sampled(database, table, samples)
        parts.append(text)
    return "\n".join(parts)


def _sampled(database, table, samples):
    text = ""
    for row in database.execute(f"SELECT * FROM {_quote(table)} LIMIT ?", (samples,)):
        shown = [_cell(value) for value in row[:NAMES]]
        text += "\n-- " + " | ".join(s if len(s) <= 40 else f"{s[:40]}…" for s in shown)
    return text


if __name__ == "__main__":
    _serve()
else:
    os.register_at_fork(after_in_child=_forget)
    atexit.register(_end)

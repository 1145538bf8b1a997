"""The sql tool: queries a SQLite database that cannot be changed by them.

    --tools=sql --tool_options=sql.database=shop.sqlite  # or a column `database` in the data
    print(sql.describe("shop.sqlite"))                   # the schema, for a prompt
    columns, rows = sql.execute("shop.sqlite", "SELECT 1")  # for rewards

Each query runs in a worker: a process that does nothing else, takes one query at a time and is
used again (0.5 ms a call, against 0.2 ms in this process); what it runs is in sandbox/queries.py.
SQLite's own limits are not enough: it does not look at the clock or at an interrupt inside of one
function, and replace(), instr(), trim() or LIKE on two long texts take hours; and its limit on
memory would hold for all of the trainer.

What is covered: the file is opened read-only and immutable, so that SQLite makes no journal and no
lock; an authorizer lets through only what reads (no ATTACH, no PRAGMA but those that describe a
table) and calls functions of a list (queries.FUNCTIONS). A query that takes longer than `seconds`
is stopped, inside of a function the worker is killed by its alarm. Memory is limited by SQLite, and
the worker's by RLIMIT_AS. Rows, width and size of the result are limited. Should a hole in SQLite
let a query run code, that code is confined, on Linux: it reads this one file and writes none
(RLIMIT_FSIZE 0, seccomp), starts no program, has no network and, if we are root, another user.
`describe` and full-text search (FTS3 to FTS5), R*Trees and JSON work.

What is not covered: a database that somebody else changes during the run (immutable: it is not
looked at whether it has changed); one with a write-ahead log or a journal beside it is refused.
Without namespaces (Docker's default) such code reads what its user may read. macOS has no such
layers and refuses RLIMIT_AS; SQLite's own limit holds there. Windows is not supported.
"""

import os
import re
from contextlib import suppress

from run.config import UserError, near
from run.worker import Worker, WorkerDied
from tools import ToolError
from tools.sandbox import caller, queries
from tools.sandbox.queries import CELL, shown

QUERY_SIZE = 100_000  # bytes
ERROR_SIZE = 4000  # characters of an error that the model is shown
IDLE = 16  # workers that are kept for the next query
DESCRIBE_SECONDS = 30.0
ALARM_LATER = 0.25  # seconds: SQLite stops most queries itself, and keeps the worker

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
        _report_layers(self.path)
        file = os.stat(self.path)
        self.key = f"{os.path.abspath(self.path)} {file.st_size} {file.st_mtime_ns}"
        self.rows = rows
        self.chars = chars
        self.seconds = seconds

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
    """Runs a query. -> columns, the first `rows` rows (None, int, float, str, bytes). ToolError on
    a query that is wrong, takes too long or gives too much; UserError if there is no such
    database."""
    _check(path)
    return _run(path, query, rows, seconds, None)


def describe(path: str, samples: int = 2) -> str:
    """Describes the tables of a database by their own CREATE statements, each with its first
    `samples` rows in comments. UserError if there is no such database, or it cannot be read."""
    _check(path)
    try:
        return _ask(path, {"samples": samples}, DESCRIBE_SECONDS)["text"]
    except ToolError as error:
        raise UserError(f"cannot read the database {path}: {error.text}") from None


def _check(path):
    """Refuses a file that is no database, or one that immutable would show as it was before."""
    if os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path):
        raise UserError(f"{path} is no file but a pipe or a device: give a SQLite database")
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise UserError(f"cannot read the database {path} ({error.strerror})") from None
    if head != b"SQLite format 3\0":
        raise UserError(f"{path} is no SQLite database")
    path = os.path.realpath(path)  # SQLite's log lies beside the file, not beside a link to it
    for end in "-wal", "-journal":
        with suppress(OSError), open(path + end, "rb") as file:
            if file.read(1) not in (b"", b"\0"):  # emptied, or its header is: nothing to do
                raise UserError(
                    f"{path} has changes that are not in it yet ({path}{end}): close the program "
                    f"that writes it, then run: sqlite3 {path} 'PRAGMA wal_checkpoint(TRUNCATE)'"
                )


def _run(path, query, rows, seconds, cell):
    """Runs a query. -> columns, rows. cell: characters of a value that are of use, None for all."""
    try:
        size = len(query.encode())
    except UnicodeEncodeError:
        raise ToolError("bad_arguments", "error: the query is not valid Unicode") from None
    if size > QUERY_SIZE:
        raise ToolError("bad_arguments", f"error: the query is longer than {QUERY_SIZE} bytes")
    reply = _ask(path, {"query": query, "rows": rows, "cell": cell}, seconds)
    return reply["columns"], [tuple(row) for row in reply["rows"]]


# -- what the model reads


def _table(columns, rows, limit, chars):
    """Writes a result as lines of "a | b", the header first."""
    if not rows:
        return "(no rows)"
    header = " | ".join(shown(name) for name in columns)
    lines = [header[:chars]]
    size = 0
    for row in rows[:limit]:
        line = " | ".join(shown(value) for value in row)
        size += len(line) + 1
        if size > chars and len(lines) > 1:
            break
        lines.append(line if len(line) <= chars else f"{line[:chars]}…")
    shown_rows = len(lines) - 1
    if len(rows) > shown_rows:
        lines.append(f"(the first {shown_rows} rows; there are more)")
    return "\n".join(lines)


def _explained(reply, query):
    """Writes an error of SQLite, with the names that there are if it is about one."""
    text = reply["error"]
    tables = reply.get("tables", {})
    kind, _, name = text.partition(": ")
    if kind == "no such table":
        text += f"{_like(name, tables)}; the tables are {_listed(tables)}"
    elif kind == "no such column":
        text += _like(name, [column for columns in tables.values() for column in columns])
        for table, columns in tables.items():
            if re.search(rf"\b{re.escape(table)}\b", query, re.I):  # the query speaks of it
                text += f"; {table} has the columns {_listed(columns)}"
    return f"error: {text}"[:ERROR_SIZE]


def _like(name, names):
    """Writes ": did you mean x?", of the names, whatever the case; "" if none is near."""
    by_lower_case = {each.lower(): each for each in names}
    last_part = name.rpartition(".")[2].lower()
    hint = near(last_part, by_lower_case)
    for lower, each in by_lower_case.items():
        if hint == f": did you mean {lower}?":
            return f": did you mean {each}?"
    return hint


def _listed(names):
    names = list(names)
    end = ", …" if len(names) > queries.TABLES else ""
    return ", ".join(names[: queries.TABLES]) + end


# -- workers

_idle = []  # (file, worker that waits for another query of it): a worker reads one file, for good


def _ask(path, request, seconds):
    """Asks a worker. ToolError if it replies an error, or does not live to reply."""
    path = os.path.realpath(path)
    status = os.stat(path)
    file = (path, status.st_dev, status.st_ino)  # another may be at this path later
    request = request | {"path": path, "seconds": seconds}
    worker = _take_idle(file) or Worker(queries.__file__)
    try:
        reply = worker.ask(request, seconds + ALARM_LATER)
    except TimeoutError:
        raise _late(seconds) from None
    except WorkerDied:
        text = "error: the query needs too much memory, or crashed SQLite"
        raise ToolError("exception", text) from None
    _keep(file, worker)
    if "late" in reply:
        raise _late(seconds)
    if "error" in reply:
        raise ToolError("exception", _explained(reply, request.get("query", "")))
    return reply


WANTED = ("network_namespace", "private_root", "no_capabilities", "no_new_privileges", "seccomp")
_layers = {}  # of the workers on this system, once it is known


def _report_layers(path):
    """Prints, once, which layers there are not around the workers."""
    if not _layers:
        with suppress(ToolError):  # a busy machine: the next one will say it
            _layers.update(_ask(path, {"layers": True}, DESCRIBE_SECONDS)["layers"])
    caller.report([name for name in WANTED if _layers and not _layers[name]], "sql")


def _take_idle(file):
    """Takes a worker that has read this file before, or None."""
    for waiting in reversed(_idle):  # the newest: those that nobody needs grow old
        if waiting[0] == file:
            try:
                _idle.remove(waiting)
            except ValueError:  # another thread was faster
                continue
            return waiting[1]
    return None


def _keep(file, worker):
    _idle.append((file, worker))
    if len(_idle) > IDLE:
        with suppress(IndexError):  # other threads do the same
            _, oldest = _idle.pop(0)
            oldest.stop()


def _late(seconds):
    return ToolError("timeout", f"error: the query took longer than {seconds:g} s and was stopped")

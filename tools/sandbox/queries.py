"""What runs inside of a worker process: one query of a SQLite database, or its description.

tools/sql.py is the other side, and says what is covered. run/worker.py loads this file there, calls
prepare(), once, and answer().
"""

import os
import resource
import sqlite3
import time
from contextlib import suppress
from urllib.parse import quote

MEMORY = 256 * 2**20  # bytes that SQLite may take; the process has twice as much
VALUE_SIZE = 16 * 2**20  # bytes of one value
RESULT_SIZE = 32 * 2**20  # bytes of all values of a result
CELL = 200  # characters of a value that the model is shown
SAMPLE = 40  # characters of a value in a description
TABLES = 60  # tables, or columns of a table, that a description or a message names
STATEMENT = 4000  # characters of a CREATE statement that a description shows
HARMLESS_PRAGMAS = {
    "table_info",
    "table_xinfo",
    "table_list",
    "index_list",
    "index_info",
    "index_xinfo",
    "foreign_key_list",
}
READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}


def prepare() -> None:
    """Limits this process, for good: it writes no file, and its memory has an end."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # not one byte, to any file
    with suppress(OSError, ValueError):  # macOS refuses this one
        resource.setrlimit(resource.RLIMIT_AS, (2 * MEMORY, 2 * MEMORY))


def answer(request: dict) -> dict:
    """{"columns", "rows"} of a query, {"text"} of a description, {"error"}, or {"late": True}."""
    end = time.monotonic() + request["seconds"]
    try:
        database = _open(request["path"], end)
    except sqlite3.Error as error:
        return {"error": str(error)}
    try:
        if "samples" in request:
            return {"text": _description(database, request["samples"])}
        return _result(database, request["query"], request["rows"], request["cell"])
    except MemoryError:
        return {"error": f"the query needs more than {MEMORY >> 20} MB of memory"}
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        if str(error) == "interrupted":
            return {"late": True}
        return _error(database, str(error))
    finally:
        database.close()


# -- opening


def _open(path, end):
    """The database, read-only. end: by time.monotonic(), when what runs in it is stopped."""
    uri = f"file:{quote(os.fsencode(path))}?mode=ro&immutable=1"
    database = sqlite3.connect(uri, uri=True, isolation_level=None)
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
    database.set_authorizer(_authorize)
    database.set_progress_handler(lambda: time.monotonic() > end, 10_000)
    return database


def _authorize(action, first, second, *_):
    """Lets through only what reads. first, second: names that belong to the action."""
    if action in READING:
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_FUNCTION and second != "load_extension":
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_PRAGMA and first in HARMLESS_PRAGMAS:
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_UPDATE and first == "sqlite_master":
        return sqlite3.SQLITE_OK  # what json_each() asks for; SQLite itself refuses a real one
    return sqlite3.SQLITE_DENY


# -- a query


def _result(database, query, limit, cell):
    """The first `limit` rows. cell: characters of a value that are of use, None for all."""
    cursor = database.execute(query)
    if cursor.description is None:
        return {"error": "this is no query: write one SELECT statement"}
    rows = []
    size = 0  # bytes, about
    for row in cursor:
        if cell is not None:
            row = [_shorten(value, cell) for value in row]
        rows.append(row)
        size += sum(_size(value) for value in row)
        if size > RESULT_SIZE:
            return {"error": f"the result is larger than {RESULT_SIZE >> 20} MB"}
        if len(rows) == limit:
            break
    return {"columns": [column[0] for column in cursor.description], "rows": rows}


def _shorten(value, cell):
    if isinstance(value, str | bytes):
        return value[: cell + 1]  # one more than is shown, so that its end is seen to be cut
    return value


def _size(value):
    return len(value) if isinstance(value, str | bytes) else 8


def _error(database, text):
    """The reply to an error of SQLite. If it is about a name: with the names that there are."""
    reply = {"error": text}
    if text in ("not authorized", "authorization denied") or text.startswith("access to "):
        reply["error"] = f"{text}: the database can only be read, by SELECT or WITH ... SELECT"
    if text.startswith("no such "):
        with suppress(sqlite3.Error):
            names = [name for name, _, _ in _tables(database)]
            reply["tables"] = {name: _columns(database, name) for name in names}
    return reply


# -- a description


def _description(database, samples):
    """Each table's own CREATE statement, with its first `samples` rows in comments."""
    tables = _tables(database)
    parts = []
    for name, kind, statement in tables[:TABLES]:
        parts.append(_cut_statement(statement))
        if kind == "table" and not statement.upper().startswith("CREATE VIRTUAL"):
            # not of a view, which may take long, or of what needs a module that is not there
            parts += _sample_lines(database, name, samples)
    if len(tables) > TABLES:
        parts.append(f"-- ... {len(tables) - TABLES} tables more")
    return "\n".join(parts)


def _cut_statement(statement):
    statement = statement.strip()
    if len(statement) <= STATEMENT:
        return f"{statement};"
    dropped = len(statement) - STATEMENT
    return f"{statement[:STATEMENT]}\n-- ... {dropped} characters more"


def _sample_lines(database, table, samples):
    lines = []
    for row in database.execute(f"SELECT * FROM {_quoted(table)} LIMIT ?", (samples,)):
        cells = []
        for value in row[:TABLES]:
            text = shown(value)
            cells.append(text if len(text) <= SAMPLE else f"{text[:SAMPLE]}…")
        lines.append("-- " + " | ".join(cells))
    return lines


def _tables(database):
    """(name, "table" or "view", its CREATE statement), in the order in which they were made."""
    query = (
        "SELECT name, type, sql FROM sqlite_master WHERE type IN ('table', 'view') "
        r"AND name NOT LIKE 'sqlite\_%' ESCAPE '\' ORDER BY rowid"
    )
    return database.execute(query).fetchall()


def _columns(database, table):
    return [row[1] for row in database.execute(f"PRAGMA table_info({_quoted(table)})")]


def _quoted(name):
    return '"' + name.replace('"', '""') + '"'


# -- for both sides


def shown(value) -> str:
    """A value in one line, at most CELL characters of it."""
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        end = "…" if len(value) > 16 else ""
        return f"x'{value[:16].hex()}{end}'"
    text = str(value)
    text = text.replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t")  # a row is a line
    return text if len(text) <= CELL else f"{text[:CELL]}…"

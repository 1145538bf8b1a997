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

if __package__:
    from tools.sandbox import confine
else:  # in the worker, with the folder of this file alone
    import confine

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
ASKED_BY_SEARCH = {"data_version", "page_size"}  # pragmas that FTS5 and FTS4 need; to be read alone
# What a query may call: by a list of what is allowed, as SQLite has functions that do harm, and
# each version more. fts3_tokenizer() takes the address of a function, and jumps there.
FUNCTIONS = set(
    # texts and bytes
    "char concat concat_ws format glob hex instr length like lower ltrim match octet_length printf "
    "quote regexp replace rtrim soundex substr substring trim unhex unicode unistr unistr_quote "
    "upper zeroblob "
    # numbers
    "abs acos acosh asin asinh atan atan2 atanh ceil ceiling cos cosh degrees exp floor ln log "
    "log10 log2 mod pi pow power radians random randomblob round sign sin sinh sqrt tan tanh trunc "
    # any value
    "coalesce if ifnull iif likelihood likely max min nullif typeof unlikely "
    # dates
    "current_date current_time current_timestamp date datetime julianday strftime time timediff "
    "unixepoch "
    # of groups and windows
    "avg count cume_dist dense_rank first_value group_concat lag last_value lead median nth_value "
    "ntile percent_rank percentile percentile_cont percentile_disc rank row_number string_agg sum "
    "total "
    # JSON
    "-> ->> json json_array json_array_insert json_array_length json_error_position json_extract "
    "json_group_array json_group_object json_insert json_object json_patch json_pretty json_quote "
    "json_remove json_replace json_set json_type json_valid jsonb jsonb_array jsonb_array_insert "
    "jsonb_extract jsonb_group_array jsonb_group_object jsonb_insert jsonb_object jsonb_patch "
    "jsonb_remove jsonb_replace jsonb_set subtype "
    # full-text search and R*Tree
    "bm25 highlight matchinfo offsets snippet rtreedepth rtreenode "
    # of the connection
    "changes last_insert_rowid sqlite_source_id sqlite_version total_changes".split()
)
SHADOWS = ("node", "rowid", "parent")  # tables in which an R*Tree keeps what it has
READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
WRITING = {sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE}


_confined = {}  # in the worker: the one path that it can read -> how it finds that


def prepare() -> None:
    """Limits this process, for good: it writes no file, and its memory has an end."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # not one byte, to any file
    with suppress(OSError, ValueError):  # macOS refuses this one
        resource.setrlimit(resource.RLIMIT_AS, (2 * MEMORY, 2 * MEMORY))


def answer(request: dict) -> dict:
    """Answers a request: {"columns", "rows"} of a query, {"text"} of a description, {"layers"},
    {"error"}, or {"late": True}. The first request's path is the only one that this process will
    ever read."""
    end = time.monotonic() + request["seconds"]
    path = request["path"]
    if not _confined:
        _confined[path] = confine.confine_reader(path)
    path, layers = _confined[path]
    if "layers" in request:
        return {"layers": layers}
    try:
        database = _open(path, end)
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
    """Opens the database, read-only. end: by time.monotonic(), when what runs in it is stopped."""
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
    shadows = _shadow_tables(database)

    def authorize(action, first, second, *_):
        return _authorize(action, first, second, shadows)

    database.set_authorizer(authorize)
    database.set_progress_handler(lambda: time.monotonic() > end, 10_000)
    return database


def _shadow_tables(database):
    """Lists tables of R*Trees. To be read, such a tree makes statements that would write them."""
    query = "SELECT name FROM sqlite_master WHERE sql LIKE 'CREATE VIRTUAL TABLE%'"
    names = [name for (name,) in database.execute(query)]
    return {f"{name}_{part}" for name in names for part in SHADOWS}


def _authorize(action, first, second, shadows):
    """Lets through only what reads. first, second: names that belong to the action. shadows: tables
    that SQLite's own code may ask to write; the file is read-only, so that nothing does."""
    if action in READING:
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_FUNCTION and second.lower() in FUNCTIONS:
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_PRAGMA and first in HARMLESS_PRAGMAS:
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_PRAGMA and first in ASKED_BY_SEARCH and second is None:
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_UPDATE and first == "sqlite_master":
        return sqlite3.SQLITE_OK  # what json_each() asks for; SQLite itself refuses a real one
    if action in WRITING and first in shadows:
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


# -- a query


def _result(database, query, limit, cell):
    """Gives the first `limit` rows of a query. cell: characters of a value to keep, or None."""
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
    """Writes the reply to an error of SQLite: if about a name, with the names that there are."""
    reply = {"error": text}
    if text.startswith("not authorized to use function"):
        reply["error"] = f"{text}: it is none of those that a query may call"
    elif _is_refusal(text):
        reply["error"] = f"{text}: the database can only be read, by SELECT or WITH ... SELECT"
    if text.startswith("no such "):
        with suppress(sqlite3.Error):
            names = [name for name, _, _ in _tables(database)]
            reply["tables"] = {name: _columns(database, name) for name in names}
    return reply


def _is_refusal(text):
    if text in ("not authorized", "authorization denied"):
        return True
    return text.startswith(("access to ", "attempt to write a readonly"))


# -- a description


def _description(database, samples):
    """Writes each table's own CREATE statement, with its first `samples` rows in comments."""
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
    """Lists the tables as (name, "table" or "view", its CREATE statement), the oldest first."""
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
    """Writes a value in one line, at most CELL characters of it."""
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        end = "…" if len(value) > 16 else ""
        return f"x'{value[:16].hex()}{end}'"
    text = str(value)
    text = text.replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t")  # a row is a line
    return text if len(text) <= CELL else f"{text[:CELL]}…"

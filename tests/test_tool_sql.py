"""The sql tool: no query changes the file, runs on, or fills the memory; what the model is told.

    pytest tests/test_tool_sql.py

Chinook (../shared/data/chinook.sqlite) is a shop's database that many people test with; the tests
that need it are skipped where it is not there.
"""

import asyncio
import gc
import hashlib
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from until import PATIENCE, until

from run.config import UserError
from tools import Toolbox, ToolError
from tools import sql as module
from tools.sandbox import queries
from tools.sql import describe, execute, sql

ROOT = Path(__file__).parent.parent
CHINOOK = ROOT.parent / "shared" / "data" / "chinook.sqlite"
needs_chinook = pytest.mark.skipif(not CHINOOK.is_file(), reason=f"no {CHINOOK}")

ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
MILLION = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 1000000) "
INSIDE = "SELECT instr(printf('%.*c', 16000000, 'a'), printf('%.*c', 8000000, 'a') || 'b')"
PRINTF = "SELECT printf('%.*c', 2000000000, 'x')"


@pytest.fixture
def shop(tmp_path):
    """A small database, its path with what means something in a URI."""
    path = tmp_path / "a shop?mode=rw#1 50%20.sqlite"
    with closing(sqlite3.connect(path)) as database:
        database.executescript(
            """
            CREATE TABLE city (id INTEGER PRIMARY KEY, name TEXT NOT NULL);
            CREATE TABLE "order" (
                number INTEGER, line INTEGER, city INTEGER REFERENCES city(id), "the sum" REAL,
                PRIMARY KEY (number, line)
            );
            CREATE VIEW cities AS SELECT name FROM city;
            INSERT INTO city VALUES (1, 'Oslo'), (2, 'Rome');
            INSERT INTO "order" VALUES (1, 1, 1, 9.5), (1, 2, 2, NULL);
            """
        )
    return str(path)


def refused(path, query, seconds=PATIENCE, **more):
    """-> kind, text of the error."""
    with pytest.raises(ToolError) as caught:
        sql({"database": path}, seconds=seconds, **more)(query)
    return caught.value.kind, caught.value.text


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def workers():
    """Workers that are children of ours. -ww: ps cuts a long path at COLUMNS."""
    listed = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True
    ).stdout
    lines = [line.split(None, 2) for line in listed.splitlines()]
    ours = [line for line in lines if line[1] == str(os.getpid())]
    return [int(pid) for pid, _, command in ours if "sandbox/queries.py" in command]


def cpu_seconds():
    """That workers took which have ended: no matter how busy the machine is."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def stop_workers():
    while module._idle:
        module._idle.pop()[1].stop()


@needs_chinook
def test_hostile_queries_are_observations_and_the_file_stays_as_it_is(tmp_path):
    """Writing, attaching, an endless recursion, a million rows: as a model would call the tool."""
    copy = tmp_path / "chinook.sqlite"
    shutil.copy(CHINOOK, copy)  # writable: nothing but the tool is in the way
    copy.chmod(0o666)
    before, around = digest(copy), sorted(os.listdir(tmp_path))
    stop_workers()
    begun = cpu_seconds()
    box = Toolbox([sql], options=("sql.seconds=0.5",))
    expected = {
        "INSERT INTO Artist VALUES (999, 'x')": ("exception", "can only be read"),
        "UPDATE Artist SET Name = 'x'": ("exception", "can only be read"),
        "DROP TABLE Artist": ("exception", "can only be read"),
        "CREATE TEMP TABLE t (x)": ("exception", "can only be read"),
        f"ATTACH '{tmp_path}/other.sqlite' AS other": ("exception", "can only be read"),
        f"VACUUM INTO '{tmp_path}/other.sqlite'": ("exception", "can only be read"),
        "PRAGMA journal_mode = DELETE": ("exception", "can only be read"),
        "PRAGMA query_only = 0": ("exception", "can only be read"),
        "BEGIN IMMEDIATE": ("exception", "can only be read"),
        "SELECT load_extension('/tmp/x.so')": ("exception", "not authorized"),
        "SELECT 1; DROP TABLE Artist": ("exception", "one statement"),
        "UPDATE sqlite_master SET sql = 'x'": ("exception", "may not be modified"),
        "SELECT * FROM pragma_database_list": ("exception", "can only be read"),
        ENDLESS: ("timeout", "took longer than 0.5 s"),
        INSIDE: ("timeout", "took longer than 0.5 s"),
        PRINTF: ("timeout", "took longer than 0.5 s"),
        MILLION + "SELECT x, 'row ' || x FROM c": (None, "(the first 20 rows; there are more)"),
        "SELECT * FROM Track a, Track b": (None, "there are more"),
    }

    async def calls():
        session = box.open({"database": str(copy)})
        return {query: await session.call("sql", {"query": query}) for query in expected}

    for query, (content, error, _) in asyncio.run(calls()).items():
        kind, text = expected[query]
        assert error == kind and text in content, query
        assert len(content) < 5000, query
    stop_workers()
    assert cpu_seconds() - begun < 0.75 * len(expected) + 2  # each half a second, and the alarm's
    assert digest(copy) == before and sorted(os.listdir(tmp_path)) == around
    assert not box.leaked


@needs_chinook
def test_the_shared_database_is_described_and_read_as_it_is():
    before = digest(CHINOOK)
    text = describe(str(CHINOOK), samples=1)
    assert re.search(r"CREATE TABLE \[Album\]\n\(\n    \[AlbumId\] INTEGER  NOT NULL,\n", text)
    assert "FOREIGN KEY ([ArtistId]) REFERENCES [Artist] ([ArtistId])" in text
    assert "\n-- 1 | For Those About To Rock We Salute You | 1\n" in text
    assert "PRIMARY KEY  ([PlaylistId], [TrackId])" in text and len(text) < 5500
    columns, rows = execute(str(CHINOOK), "SELECT TrackId, UnitPrice FROM Track ORDER BY TrackId")
    assert columns == ["TrackId", "UnitPrice"] and len(rows) == 3503 and rows[0] == (1, 0.99)
    assert digest(CHINOOK) == before


@pytest.mark.parametrize(
    "query, kind, text",
    [
        ("SELECT hex(zeroblob(1000000000))", "exception", "too big"),
        ("SELECT length(randomblob(1000000000))", "exception", "too big"),
        (
            MILLION + "SELECT group_concat(hex(zeroblob(50000))) FROM (SELECT x FROM c LIMIT 500)",
            "exception",
            "too big",
        ),
        (MILLION + "SELECT hex(randomblob(50000)) FROM c ORDER BY 1", "exception", "256 MB"),
        (MILLION + "SELECT DISTINCT hex(randomblob(50000)) FROM c", "exception", "larger than"),
        (
            MILLION + "SELECT count(*) FROM (SELECT DISTINCT hex(randomblob(50000)) FROM c)",
            "exception",
            "256 MB",
        ),
    ],
)
def test_a_query_cannot_take_all_memory(shop, query, kind, text):
    assert sql({}, shop)("SELECT 1") == "1\n1"
    peaks = [peak(pid) for pid in workers()]
    with pytest.raises(ToolError, match=text) as caught:
        execute(shop, query, rows=1_000_000, seconds=PATIENCE)
    assert caught.value.kind == kind
    assert all(peak(pid) < 400 for pid in workers()), f"MB of the workers, before: {peaks}"


def peak(pid):
    """MB that a process had at most; 0 where there is no /proc."""
    status = Path(f"/proc/{pid}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return max((int(x.split()[1]) / 1024 for x in lines if x.startswith("VmHWM")), default=0)


def test_a_result_that_is_too_large_for_a_reward_is_an_error(shop):
    query = MILLION + "SELECT hex(zeroblob(50000)) FROM c"
    with pytest.raises(ToolError, match="larger than 32 MB"):
        execute(shop, query, rows=1_000_000)
    assert "there are more" in sql({}, shop)(query)  # the model sees the first rows


def test_a_long_function_inside_of_sqlite_is_stopped_and_the_next_query_runs(shop):
    stop_workers()
    begun = cpu_seconds()
    assert refused(shop, INSIDE, 0.3) == (
        "timeout",
        "error: the query took longer than 0.3 s and was stopped",
    )
    assert cpu_seconds() - begun < 2.0
    assert sql({}, shop)("SELECT name FROM city") == "name\nOslo\nRome"


def test_a_table_is_compact_and_every_row_is_a_line(shop):
    tool = sql({}, shop)
    query = "SELECT NULL AS n, x'00ff' AS b, 'a\nb\tc' AS t, 1.5 AS f, -3 AS i"
    assert tool(query) == "n | b | t | f | i\nNULL | x'00ff' | a\\nb\\tc | 1.5 | -3"
    assert tool("SELECT printf('%.*c', 1000, 'x') AS long") == "long\n" + "x" * 200 + "…"
    assert tool("SELECT zeroblob(99) AS b") == f"b\nx'{'00' * 16}…'"
    assert tool("SELECT * FROM city WHERE id > 9") == "(no rows)"
    assert tool("SELECT CAST(x'ff41' AS TEXT) AS t") == "t\n\N{REPLACEMENT CHARACTER}A"
    assert sql({}, shop, rows=1)("SELECT id FROM city") == (
        "id\n1\n(the first 1 rows; there are more)"
    )
    assert sql({}, shop, rows=2)("SELECT id FROM city") == "id\n1\n2"


def test_what_only_reads_is_allowed(shop):
    tool = sql({}, shop)
    assert tool("SELECT value FROM json_each('[7, 8]')") == "value\n7\n8"
    assert tool("SELECT name FROM pragma_table_info('city')") == "name\nid\nname"
    assert tool("PRAGMA table_info(city)").startswith("cid | name | type")
    assert tool("WITH c AS (SELECT name FROM cities) SELECT upper(name) AS n FROM c LIMIT 1") == (
        "n\nOSLO"
    )
    assert tool("SELECT name FROM sqlite_master WHERE type = 'view'") == "name\ncities"
    assert tool("EXPLAIN QUERY PLAN SELECT * FROM city").startswith("id | parent")
    assert tool("VALUES (1), (2)") == "column1\n1\n2"


def test_a_wide_or_long_table_is_cut_to_the_characters_that_are_allowed(shop):
    rows = "SELECT x, 'some text' FROM c"
    text = sql({}, shop, rows=500, chars=300)(MILLION + rows)
    assert len(text) < 350 and text.endswith("rows; there are more)")
    wide = "SELECT " + ", ".join(f"'{'y' * 150}'" for _ in range(50))
    assert len(sql({}, shop, chars=300)(wide)) < 700


def test_errors_name_the_tables_and_columns_that_there_are(shop):
    assert refused(shop, "SELECT * FROM Citty") == (
        "exception",
        "error: no such table: Citty: did you mean city?; the tables are city, order, cities",
    )
    assert refused(shop, "SELECT c.Names FROM city c") == (
        "exception",
        "error: no such column: c.Names: did you mean name?; city has the columns id, name",
    )
    assert refused(shop, "SELEC 1")[1] == 'error: near "SELEC": syntax error'
    assert "write one SELECT statement" in refused(shop, "-- nothing")[1]
    assert refused(shop, "SELECT '\ud800'")[0] == "bad_arguments"
    assert refused(shop, f"SELECT '{'x' * 200_000}'")[0] == "bad_arguments"
    assert refused(shop, "SELECT 1 \0")[0] == "exception"
    assert refused(shop, "SELECT ?")[0] == "exception"


def test_the_schema_is_shown_in_the_words_that_made_it(shop):
    text = describe(shop, samples=1)
    assert text.startswith(
        "CREATE TABLE city (id INTEGER PRIMARY KEY, name TEXT NOT NULL);\n-- 1 | Oslo\n"
        'CREATE TABLE "order" (\n'
    )
    assert 'city INTEGER REFERENCES city(id), "the sum" REAL,\n' in text
    assert text.endswith(");\n-- 1 | 1 | 1 | 9.5\nCREATE VIEW cities AS SELECT name FROM city;")
    assert "--" not in describe(shop, samples=0)


def test_a_description_of_very_many_tables_or_columns_is_cut_with_a_mark(tmp_path):
    path = str(tmp_path / "wide.sqlite")
    columns = ", ".join(f"column_number_{i} TEXT DEFAULT ''" for i in range(500))
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"CREATE TABLE wide ({columns})")
        database.execute("INSERT INTO wide DEFAULT VALUES")
        for i in range(80):
            database.execute(f"CREATE TABLE t{i} (x)")
        database.commit()
    text = describe(path)
    dropped = len(f"CREATE TABLE wide ({columns})") - queries.STATEMENT
    assert f"\n-- ... {dropped} characters more\n-- " in text
    assert text.count("CREATE TABLE") == queries.TABLES
    assert text.endswith("\n-- ... 21 tables more")
    sample = text.splitlines()[2]
    assert sample.count("|") == queries.TABLES - 1
    assert describe(path, samples=0).count("\n") == queries.TABLES + 1


def test_what_a_description_cannot_read_or_must_quote_is_no_error(tmp_path):
    path = str(tmp_path / "odd.sqlite")
    with closing(sqlite3.connect(path)) as database:
        database.executescript(
            """
            CREATE TABLE "a ""b"" c" (x);
            INSERT INTO "a ""b"" c" VALUES ('long' || zeroblob(99));
            CREATE TABLE [select] (y); INSERT INTO [select] VALUES (7);
            """
        )
        database.execute("PRAGMA writable_schema = 1")
        database.execute(
            "INSERT INTO sqlite_master VALUES ('table', 'away', 'away', 0, "
            "'CREATE VIRTUAL TABLE away USING no_such_module(x)')"
        )
        database.commit()
    text = describe(path)
    assert "CREATE TABLE [select] (y);\n-- 7\n" in text
    assert text.endswith("CREATE VIRTUAL TABLE away USING no_such_module(x);")
    assert max(map(len, text.splitlines())) < 100


def test_a_reward_gets_values_and_not_their_text(shop):
    query = "SELECT 1 AS a, 2.5, 'x', NULL, x'00ff', 9e999, 9223372036854775807"
    columns, rows = execute(shop, query)
    assert columns[0] == "a" and len(columns) == 7
    assert rows == [(1, 2.5, "x", None, b"\x00\xff", float("inf"), 2**63 - 1)]
    assert len(execute(shop, MILLION + "SELECT x FROM c", rows=7)[1]) == 7
    with pytest.raises(ToolError, match="no such table"):
        execute(shop, "SELECT * FROM nowhere")


def test_the_database_comes_from_the_row_and_else_from_the_option(shop, tmp_path):
    other = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(other)) as database:
        database.executescript("CREATE TABLE only_here (x); INSERT INTO only_here VALUES (7)")
    tool = sql({"database": str(other)}, database=shop)
    assert tool("SELECT x FROM only_here") == "x\n7" and tool.path == str(other)
    assert sql({}, database=shop).path == shop
    with pytest.raises(UserError, match="has no database: give the data a column `database`, or"):
        sql({"prompt": "x"})
    with pytest.raises(UserError, match="sql.rows = 0"):
        sql({}, shop, rows=0)


def test_two_rows_with_the_same_query_get_each_the_result_of_its_own_database(shop, tmp_path):
    """Pitfall 40, with the cache of results: its key has the path."""
    other = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(other)) as database:
        database.executescript("CREATE TABLE city (name); INSERT INTO city VALUES ('Bonn')")
    box = Toolbox([sql])

    async def calls():
        sessions = [box.open({"database": path}) for path in (shop, str(other), shop)]
        asked = {"query": "SELECT count(*) AS n FROM city"}
        return [await session.call("sql", asked) for session in sessions]

    texts, _, seconds = zip(*asyncio.run(calls()), strict=True)
    assert texts == ("n\n2", "n\n1", "n\n2")
    assert min(seconds[:2]) > 0 == seconds[2]  # the last one was known


def test_a_file_that_cannot_be_read_as_it_is_is_refused(shop, tmp_path):
    text = tmp_path / "text.sqlite"
    text.write_text("not a database at all")
    for path, why in (
        (text, "is no SQLite database"),
        (tmp_path / "not there", "No such file"),
        (tmp_path, "Is a directory"),
    ):
        for use in (describe, lambda path: sql({}, path), lambda path: execute(path, "SELECT 1")):
            with pytest.raises(UserError, match=why):
                use(str(path))
    with closing(sqlite3.connect(shop)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("INSERT INTO city VALUES (3, 'Bonn')")
        database.commit()  # in the log, where immutable does not look
        with pytest.raises(UserError, match="changes that are not in it yet"):
            sql({}, shop)
    assert "Bonn" in sql({}, shop)("SELECT * FROM city")


def test_a_broken_database_is_an_error_and_no_crash(shop, tmp_path):
    data = Path(shop).read_bytes()
    broken = tmp_path / "broken.sqlite"
    broken.write_bytes(data[:1000] + b"\xff" * 3000 + data[4000:])
    assert refused(str(broken), "SELECT * FROM city")[0] == "exception"
    with pytest.raises(UserError, match="cannot read the database"):
        describe(str(broken))


def test_queries_run_at_the_same_time_and_their_workers_are_used_again(shop, monkeypatch):
    """Pitfall 38: none of eight queries waits for another one, or for another one's worker."""
    tool = sql({}, shop, seconds=0.5)
    all_are_there = threading.Barrier(8, timeout=PATIENCE)
    asked = []
    late = []
    ask = module.Worker.ask

    def together(worker, *request):
        asked.append(worker)
        all_are_there.wait()  # breaks if they come one after the other
        return ask(worker, *request)

    def query():
        with pytest.raises(ToolError, match="longer than 0.5 s"):
            tool(ENDLESS)
        late.append(True)

    threads = [threading.Thread(target=query) for _ in range(8)]
    with monkeypatch.context() as patched:
        patched.setattr(module.Worker, "ask", together)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(late) == 8 and len(set(map(id, asked))) == 8
    before = set(workers())
    assert 1 <= len(before) <= module.IDLE
    for _ in range(50):
        tool("SELECT 1")
    assert set(workers()) == before


def test_a_worker_that_was_killed_is_replaced(shop):
    tool = sql({}, shop)
    tool("SELECT 1")
    pids = workers()
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert tool("SELECT 1") == "1\n1"


def test_a_worker_has_no_secrets_and_may_write_nothing(shop, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_RUN", "1")
    stop_workers()
    sql({}, shop)("SELECT 1")
    (pid,) = workers()
    if not Path(f"/proc/{pid}").exists():
        pytest.skip("no /proc on this system")
    assert b"SECRET" not in Path(f"/proc/{pid}/environ").read_bytes()
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    (size,) = [line.split()[3:5] for line in limits if line.startswith("Max file size")]
    assert size == ["0", "0"]


def test_workers_end_with_the_program_and_a_fork_gets_its_own(shop):
    """Also when the program is killed: its end of the socket closes."""
    code = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tools import sql as module
from tools.sandbox import queries
tool = module.sql({{}}, {shop!r})
tool("SELECT 1")
print(module._idle[0][1].process.pid, flush=True)
pid = os.fork()
if pid == 0:
    assert module._idle[0][1].process is None
    assert tool("SELECT 2") == "2\\n2"
    print(module._idle[0][1].process.pid, flush=True)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert tool("SELECT 1") == "1\\n1"
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2 and done.returncode == -signal.SIGKILL, done.stderr
    assert until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids))


def test_no_file_stays_open_over_many_calls(shop):
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc on this system")
    tool = sql({}, shop, seconds=0.05)
    tool("SELECT 1")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(ToolError):
            tool(INSIDE)  # its worker is killed
        tool("SELECT 1")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


# -- C1: what a query may call, what the worker may do, and full-text search


@pytest.fixture
def searchable(tmp_path):
    """A database with each kind of search that SQLite may have, and a plain table beside them."""
    path = tmp_path / "search.sqlite"
    kinds = {
        "five": ("fts5(x)", "('hello world')"),
        "four": ("fts4(x)", "('hello world')"),
        "three": ("fts3(x)", "('hello world')"),
        "words": ("fts5vocab(five, row)", None),
        "terms": ("fts4aux(four)", None),
        "boxes": ("rtree(id, x0, x1)", "(1, 2, 3)"),
    }
    made = set()
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE plain (x)")
        database.execute("INSERT INTO plain VALUES (7)")
        for name, (module_and_columns, row) in kinds.items():
            try:
                database.execute(f"CREATE VIRTUAL TABLE {name} USING {module_and_columns}")
            except sqlite3.OperationalError:  # this SQLite was built without it
                continue
            made.add(name)
            if row:
                database.execute(f"INSERT INTO {name} VALUES {row}")
        database.commit()
    return str(path), made


@pytest.mark.parametrize(
    "table, query, shown",
    [
        ("five", "SELECT x FROM plain", "x\n7"),
        ("five", "SELECT x FROM five WHERE five MATCH 'hello' ORDER BY rank", "x\nhello world"),
        ("five", "SELECT highlight(five, 0, '<', '>') AS h FROM five('world')", "h\nhello <world>"),
        ("five", "SELECT bm25(five) < 0 AS n FROM five WHERE five = 'world'", "n\n1"),
        ("words", "SELECT term FROM words WHERE doc = 1 LIMIT 1", "term\nhello"),
        ("four", "SELECT offsets(four) AS o FROM four WHERE four MATCH 'world'", "o\n0 0 6 5"),
        ("four", "SELECT snippet(four) AS s FROM four WHERE x MATCH 'w*'", "s\nhello <b>world</b>"),
        ("terms", "SELECT term FROM terms WHERE col = 0 LIMIT 1", "term\nhello"),
        ("three", "SELECT x FROM three WHERE x MATCH 'hello'", "x\nhello world"),
        ("boxes", "SELECT id FROM boxes WHERE x0 > 1", "id\n1"),
    ],
)
def test_a_database_with_full_text_search_is_read_like_any_other(searchable, table, query, shown):
    """C1."""
    path, made = searchable
    if table not in made:
        pytest.skip(f"this SQLite cannot make {table}")
    assert sql({}, path)(query) == shown
    assert "CREATE TABLE plain (x);\n-- 7" in describe(path)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT fts3_tokenizer('x', x'4141414141414141')",
        "SELECT hex(fts3_tokenizer('simple'))",
        "SELECT FTS3_Tokenizer('simple')",
        "SELECT (SELECT fts3_tokenizer('x', x'00')) FROM pragma_table_info('three')",
        "SELECT optimize(four) FROM four",
        "SELECT sqlite_log(1, 'x')",
        "SELECT load_extension('/x')",
        "SELECT fts5(NULL)",
        "SELECT rtreecheck('boxes')",
        "SELECT edit('x')",
        "SELECT writefile('/tmp/x', 'x')",
    ],
)
def test_a_query_calls_only_functions_of_a_list(searchable, query):
    """C1: with an address of its own for a tokenizer, a query makes SQLite jump there."""
    text = refused(searchable[0], query)[1]
    assert "not authorized to use function" in text or "no such" in text or "unable to use" in text
    assert sql({}, searchable[0])("SELECT x FROM plain") == "x\n7"


def test_every_function_of_this_sqlite_is_allowed_or_is_known_to_be_refused():
    """C1: a new one is looked at before it is allowed."""
    with closing(sqlite3.connect(":memory:")) as database:
        names = {name for (name,) in database.execute("SELECT name FROM pragma_function_list")}
    harmful = {"fts3_tokenizer", "load_extension", "optimize", "sqlite_log"}
    assert not harmful & queries.FUNCTIONS
    assert {"sum", "substr", "strftime", "json_extract", "row_number"} <= names & queries.FUNCTIONS


@pytest.mark.parametrize(
    "query",
    [
        "INSERT INTO boxes VALUES (2, 3, 4)",
        "DELETE FROM boxes_rowid",
        "UPDATE boxes_node SET data = x'00'",
        "INSERT INTO five(five) VALUES ('rebuild')",
        "INSERT INTO four(four) VALUES ('optimize')",
        "DROP TABLE five",
        "PRAGMA page_size = 512",
    ],
)
def test_what_search_tables_may_ask_for_themselves_a_query_may_not(searchable, query):
    """C1."""
    path, made = searchable
    if made != {"five", "four", "three", "words", "terms", "boxes"}:
        pytest.skip("this SQLite lacks one of them")
    before = digest(path)
    assert "can only be read" in refused(path, query)[1]
    assert digest(path) == before


CONFINED = """
import os, socket, sys, threading
import confine

def prepare():
    pass

def attempt(work, *args):
    try:
        work(*args)
    except BaseException as error:
        return type(error).__name__
    return "done"

def answer(request):
    file, layers = confine.confine_reader(request["file"])
    other, folder = request["other"], os.path.dirname(request["file"])
    return {
        "layers": layers,
        "read": open(file).read(),
        "user": os.geteuid(),
        "other": attempt(open, other),
        "tries": {
            "socket": attempt(socket.socket),
            "connect": attempt(socket.create_connection, ("127.0.0.1", 9), 1),
            "fork": attempt(os.fork),
            "exec": attempt(os.execv, "/bin/true", ["true"]),
            "kill": attempt(os.kill, os.getppid(), 0),
            "write": attempt(open, file, "a"),
            "make": attempt(open, folder + "/new", "w"),
            "folder": attempt(os.mkdir, folder + "/new"),
            "remove": attempt(os.unlink, file),
            "rename": attempt(os.rename, file, file + "2"),
            "link": attempt(os.symlink, "/etc/passwd", folder + "/link"),
            "mode": attempt(os.chmod, file, 0o777),
            "truncate": attempt(os.truncate, file, 0),
            "times": attempt(os.utime, file),
        },
    }
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are no layers")
@pytest.mark.parametrize("mode", [0o644, 0o600])
def test_a_worker_reads_its_one_file_and_can_do_nothing_else(tmp_path, mode):
    """C1: also one that runs code of the model's, by a hole of SQLite."""
    inside = tmp_path / "inside.py"
    folder = os.path.dirname(queries.__file__)
    inside.write_text(f"import sys\nsys.path.append({folder!r})\n{CONFINED}")
    mine = tmp_path / "mine"
    mine.write_text("rows")
    mine.chmod(mode)
    other = tmp_path / "other"
    other.write_text("gold")
    worker = module.Worker(inside)
    reply = worker.ask({"file": str(mine), "other": str(other)}, 60)
    worker.stop()
    assert reply["read"] == "rows" and mine.read_text() == "rows"
    assert set(os.listdir(tmp_path)) - {"__pycache__"} == {"inside.py", "mine", "other"}
    layers = reply["layers"]
    if layers["seccomp"]:
        assert "done" not in reply["tries"].values(), reply["tries"]
    if layers["private_root"]:
        assert reply["other"] == "FileNotFoundError"
    if layers["own_user"]:
        assert reply["user"] != 0


def test_the_sql_worker_is_confined_before_its_first_query(shop):
    """C1."""
    layers = module._ask(shop, {"layers": True}, 5.0)["layers"]
    if not layers["seccomp"]:
        pytest.skip("this system does not allow seccomp")
    assert layers["no_new_privileges"]
    (pid,) = {each.process.pid for file, each in module._idle if file[0] == os.path.realpath(shop)}
    assert "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text()


def test_another_file_at_the_same_path_is_another_database(shop):
    """C1: a worker keeps the file that it was given, for good."""
    tool = sql({}, shop)
    assert tool("SELECT name FROM city WHERE id = 1") == "name\nOslo"
    other = f"{shop}.new"
    with closing(sqlite3.connect(other)) as database:
        database.executescript("CREATE TABLE city (id, name); INSERT INTO city VALUES (1, 'Bonn')")
    os.replace(other, shop)
    assert tool("SELECT name FROM city WHERE id = 1") == "name\nBonn"
    with closing(sqlite3.connect(shop)) as database:
        database.execute("UPDATE city SET name = 'Rome'")
        database.commit()
    assert tool("SELECT name FROM city WHERE id = 1") == "name\nRome"


# -- A24, C5: which file it is


@pytest.mark.parametrize("kind", ["link", "link to a link", "link in a folder", "linked folder"])
def test_a_database_behind_a_link_is_refused_for_its_own_log(shop, tmp_path, kind):
    """A24: SQLite follows the link, and looks for the log beside the file."""
    folder = tmp_path / "folder"
    link = tmp_path / "link.sqlite"
    if kind == "linked folder":
        folder.symlink_to(os.path.dirname(shop))
        link = folder / os.path.basename(shop)
    else:
        folder.mkdir()
        first = folder / "first.sqlite" if kind != "link" else link
        first.symlink_to(shop)
        if kind == "link to a link":
            link.symlink_to(first)
        elif kind == "link in a folder":
            link = first
    assert "Oslo" in sql({}, str(link))("SELECT * FROM city")
    with closing(sqlite3.connect(shop)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("INSERT INTO city VALUES (3, 'Bonn')")
        database.commit()
        with pytest.raises(UserError, match="changes that are not in it yet"):
            execute(str(link), "SELECT 1")
        with pytest.raises(UserError, match="changes that are not in it yet"):
            sql({}, str(link))


def test_a_pipe_or_device_in_place_of_a_database_is_refused_at_once(tmp_path):
    """C5: to open a pipe waits for who writes to it."""
    pipe = tmp_path / "pipe.sqlite"
    os.mkfifo(pipe)
    link = tmp_path / "link.sqlite"
    link.symlink_to(pipe)
    for path in (pipe, link, "/dev/zero", "/dev/tty"):
        if not os.path.exists(path):
            continue
        for use in (describe, lambda path: sql({}, path), lambda path: execute(path, "SELECT 1")):
            with pytest.raises(UserError, match="no file but a pipe or a device"):
                use(str(path))

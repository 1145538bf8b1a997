"""shop: questions about a shop that a model from scratch learns to answer with SQL.

`rows` are the problems for RL and evaluation, each with the path of the "database" that the sql
tool opens; `demos` the demonstrations for SFT. The database is generated, always the same, and
kept in the folder of temporary files. The demonstrators are people: they look up most prices, but
guess most of the rest, and one query in six has the wrong column, table or sign. So a model that
copies them well is often wrong, and GRPO has something to find: always ask the database, and for
the right thing. Some conversations only repeat names and numbers: a model from scratch has to learn
copying somewhere.

Train and held-out problems are disjoint by construction: a problem is a kind of question and what
it asks about, and their hash says which of the two it belongs to.
"""

import functools
import hashlib
import os
import random
import sqlite3
import tempfile
import zlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from run.config import UserError
from tasks.facts import NAMES, PEOPLE, VALUES, answer_message, call_message, guess_message

HELD_OUT = 5  # one problem in five is held out

COLOURS = tuple("Black Blue Brown Gold Green Grey Orange Pink Purple Red White Yellow".split())
THINGS = tuple(
    "Basket Bowl Candle Chair Clock Desk Kettle Lamp "
    "Mirror Mug Pillow Rug Shelf Stool Table Vase".split()
)
PRODUCTS = tuple(f"{colour} {thing}" for colour in COLOURS for thing in THINGS)
CUSTOMERS = tuple(sorted(random.Random("shop customers").sample(NAMES, 192)))
TOWNS = tuple(VALUES["town"])
ABOUT = {  # what the questions of a kind ask about
    "price": PRODUCTS,
    "stock": PRODUCTS,
    "town": CUSTOMERS,
    "orders": CUSTOMERS,
    "above": tuple(range(10, 100)),
    "below": tuple(range(10, 100)),
}
QUESTIONS = {
    "price": ("What does the {x} cost?", "What is the price of the {x}?"),
    "stock": ("How many pieces of the {x} are in stock?", "What is the stock of the {x}?"),
    "town": ("Where does our customer {x} live?", "To which town do we send orders of {x}?"),
    "orders": ("How many orders did {x} place?", "How often did {x} order?"),
    "above": ("How many products cost more than {x}?", "How many prices are above {x}?"),
    "below": ("How many products cost less than {x}?", "How many prices are below {x}?"),
}
QUERIES = {
    "price": "SELECT price FROM products WHERE name = '{x}'",
    "stock": "SELECT stock FROM products WHERE name = '{x}'",
    "town": "SELECT town FROM customers WHERE name = '{x}'",
    "orders": "SELECT COUNT(*) FROM orders WHERE customer = '{x}'",
    "above": "SELECT COUNT(*) FROM products WHERE price > {x}",
    "below": "SELECT COUNT(*) FROM products WHERE price < {x}",
}
MISTAKEN = {  # whose query is written where one is wrong
    "price": "stock",
    "stock": "price",
    "town": "orders",
    "orders": "town",
    "above": "below",
    "below": "above",
}
# share of the demonstrations that ask the database
USES_TOOL = {"price": 0.9, "stock": 0.4, "town": 0.9, "orders": 0.4, "above": 0.4, "below": 0.4}
PRACTICE = 0.2  # share of the conversations that only repeat names and numbers
WRONG_QUERY = 1 / 6  # share of the queries that are those of another kind


def tables() -> dict[str, tuple[str, list[tuple]]]:
    """Makes the tables, always the same: {table: (its columns, its rows)}. Prices and stocks have
    two digits."""
    rng = random.Random("shop tables")
    products = [(name, rng.randint(10, 99), rng.randint(10, 99)) for name in PRODUCTS]
    customers = [(name, PEOPLE[name]["town"]) for name in CUSTOMERS]
    orders = []
    for customer in CUSTOMERS:
        for _ in range(rng.randint(1, 19)):
            orders.append((customer, rng.choice(PRODUCTS)))
    return {
        "products": ("name TEXT, price INTEGER, stock INTEGER", products),
        "customers": ("name TEXT, town TEXT", customers),
        "orders": ("customer TEXT, product TEXT", orders),
    }


@functools.cache
def database() -> str:
    """Gives the path of the database, which it makes if it is not there."""
    made = tables()
    digest = hashlib.sha256(repr(made).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"nanotool-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} is somebody else's: set TMPDIR to a folder of your own")
    path = folder / f"shop-{digest}.sqlite"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            unfinished = Path(scratch) / "shop.sqlite"
            write_database(unfinished, made)
            os.replace(unfinished, path)  # at once: another run may be looking for it
    return str(path)


def write_database(path: Path, made: dict[str, tuple[str, list[tuple]]]) -> None:
    """Makes a new database of what `tables` gives."""
    with closing(sqlite3.connect(path)) as connection:
        for name, (columns, rows) in made.items():
            connection.execute(f"CREATE TABLE {name} ({columns})")
            marks = ", ".join("?" * len(rows[0]))
            connection.executemany(f"INSERT INTO {name} VALUES ({marks})", rows)
        connection.commit()


@functools.cache
def ask(query: str) -> tuple[str, str]:
    """Asks the database a query whose result is one value: (name of the column, value), with ""
    where there is none.

    The result is that of SQLite itself: nothing here says twice what a query means.
    """
    uri = f"file:{database()}?mode=ro&immutable=1"
    with closing(sqlite3.connect(uri, uri=True)) as connection:
        cursor = connection.execute(query)
        row = cursor.fetchone()
        column = cursor.description[0][0]
        return column, "" if row is None else str(row[0])


def held_out(kind: str, x: str | int) -> bool:
    """Says whether a question is of "test", and never trained on."""
    return zlib.crc32(f"{kind} {x}".encode()) % HELD_OUT == 0


@functools.cache
def things(kind: str, split: str) -> list:
    """Lists what the questions of a kind ask about in a split."""
    if split not in ("train", "test"):
        raise UserError(f"split = {split!r}: task:shop has train and test")
    return [x for x in ABOUT[kind] if held_out(kind, x) == (split == "test")]


def query(kind: str, x: str | int) -> str:
    """Writes the query that answers a question."""
    return QUERIES[kind].format(x=x)


def problem(rng: random.Random, split: str, kinds: Sequence[str] = tuple(ABOUT)) -> dict:
    """Makes a problem of the split: prompt, answer, database, and the kind and x it is made
    from."""
    kind = rng.choice(kinds)
    x = rng.choice(things(kind, split))
    prompt = rng.choice(QUESTIONS[kind]).format(x=x)
    _, answer = ask(query(kind, x))
    return {"prompt": prompt, "answer": answer, "database": database(), "kind": kind, "x": x}


def rows(split: str, seed: int = 0, n: int | None = None) -> list[dict]:
    """Makes n problems of "train" (default 8192) or "test" (default 512), the same for a seed."""
    rng = random.Random(f"shop {split} {seed}")
    count = n or (8192 if split == "train" else 512)
    return [problem(rng, split) for _ in range(count)]


def result_message(text: str) -> dict:
    """Makes the message of the sql tool about a query."""
    column, value = ask(text)
    content = f"{column}\n{value}" if value else "(no rows)"
    return {"role": "tool", "name": "sql", "content": content}


def oracle(row: dict) -> list[dict]:
    """Writes the assistant's messages of a perfect conversation about a row."""
    text = query(row["kind"], row["x"])
    return [call_message("sql", {"query": text}), answer_message(row["answer"])]


def practice(rng: random.Random) -> list[dict]:
    """Makes a conversation of nothing but copying, which a pre-trained model would know."""
    lists = (PRODUCTS, CUSTOMERS, ABOUT["above"])
    count = rng.randint(2, 5)
    text = ", ".join(str(rng.choice(rng.choice(lists))) for _ in range(count))
    return [
        {"role": "user", "content": f"Repeat: {text}."},
        {"role": "assistant", "content": text},
    ]


def guess(rng: random.Random, kind: str) -> str:
    """Guesses as somebody who does not ask the database: a town, or a round number."""
    if kind == "town":
        return rng.choice(TOWNS)
    return str(rng.randrange(10, 100, 10))


def attempt(rng: random.Random, row: dict) -> list[dict]:
    """Plays how a demonstrator deals with a row, as chat messages: with a query, or a guess."""
    prompt = {"role": "user", "content": row["prompt"]}
    kind = row["kind"]
    if rng.random() >= USES_TOOL[kind]:
        return [prompt, guess_message(guess(rng, kind))]
    if rng.random() < WRONG_QUERY:
        kind = MISTAKEN[kind]
    text = query(kind, row["x"])
    _, value = ask(text)
    call = call_message("sql", {"query": text})
    return [prompt, call, result_message(text), answer_message(value)]


def demo(rng: random.Random) -> list[dict]:
    """Makes a demonstration on a train problem."""
    if rng.random() < PRACTICE:
        return practice(rng)
    return attempt(rng, problem(rng, "train"))


def demos(n: int, seed: int = 0) -> list[list[dict]]:
    """Makes n demonstrations, always the same for a seed."""
    rng = random.Random(f"shop demos {seed}")
    return [demo(rng) for _ in range(n)]

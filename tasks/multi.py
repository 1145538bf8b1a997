"""multi: calc, facts and shop mixed; a model from scratch learns to choose the right tool.

A quarter of the problems is from each of these tasks, and a quarter needs two tools, one after the
other: "bill" asks what several pieces of a product cost (sql for the price, python for the
product), "town" how many customers live where somebody lives (search for the town, sql for the
count). Each row says which tools it needs, "tool"; `right_tool` is a reward that tells whether just
these were called, to be logged with weight 0:

    rewards = ("correct", "tasks/multi.py:right_tool:0")

The demonstrators are those of the three tasks, with their faults, and one in eight asks the wrong
tool. Where two calls are needed, more than half of them stop after the first and guess. So a model
that copies them well is often wrong, and GRPO has something to find.

Train and held-out problems are disjoint by construction, as in the three tasks.
"""

import functools
import random
import zlib

from run.config import UserError
from tasks import calc, facts, shop
from tasks.facts import call, said, thought

HELD_OUT = 5  # one problem in five is held out

# A customer's town is in the passages too, so for that question two tools are right.
SHOP_KINDS = tuple(kind for kind in shop.ABOUT if kind != "town")
FACTS_KINDS = ("town", "drink")  # each kind takes its time to learn
QUESTIONS = {
    "bill": ("What do {n} pieces of the {x} cost?", "How much are {n} of the {x} together?"),
    "town": (
        "How many customers live where {x} lives?",
        "How many customers live in the town of {x}?",
    ),
}
BOTH = 0.45  # share of the demonstrations of these that make both calls
WRONG_TOOL = 1 / 8  # share of the demonstrations that ask the wrong tool


def right_tool(trajectory, example) -> float:
    """1.0 if the tools that were called, in the order of their first calls, are those that the row
    needs. A call that fails counts as one, a call of a tool that does not exist does not."""
    called = [each.name for each in trajectory.calls if each.error != "unknown_tool"]
    return float(list(dict.fromkeys(called)) == example["tool"])


def problem(rng: random.Random, split: str) -> dict:
    """One problem of the split: prompt, answer, tool, database, the part it is from ("calc",
    "facts", "shop", "bill" or "town"), and what it was made from."""
    part = rng.choice(("calc", "facts", "shop", rng.choice(list(QUESTIONS))))
    if part == "calc":
        row, tool = calc.problem(rng, split), ["python"]
    elif part == "facts":
        row, tool = facts.problem(rng, split, FACTS_KINDS), ["search"]
    elif part == "shop":
        row, tool = shop.problem(rng, split, SHOP_KINDS), ["sql"]
    elif part == "bill":
        row, tool = bill(rng, split), ["sql", "python"]
    else:
        row, tool = town(rng, split), ["search", "sql"]
    # the database in every row: whatever the question, the model may ask it
    return {**row, "part": part, "tool": tool, "database": shop.database()}


def bill(rng: random.Random, split: str) -> dict:
    while True:
        n, x = rng.randint(2, 9), rng.choice(shop.PRODUCTS)
        if (zlib.crc32(f"{n} {x}".encode()) % HELD_OUT == 0) == (split == "test"):
            break
    price = int(shop.ask(shop.query("price", x))[1])
    prompt = rng.choice(QUESTIONS["bill"]).format(n=n, x=x)
    return {"prompt": prompt, "answer": str(n * price), "n": n, "x": x, "price": price}


def town(rng: random.Random, split: str) -> dict:
    x = rng.choice(strangers(split))
    answer = shop.ask(customers_of(x))[1]
    return {"prompt": rng.choice(QUESTIONS["town"]).format(x=x), "answer": answer, "x": x}


@functools.cache
def strangers(split: str) -> list[str]:
    """Whoever is no customer: a customer's town could be found by sql alone."""
    return sorted(set(facts.names(split)) - set(shop.CUSTOMERS))


def customers_of(name: str) -> str:
    """The query for the number of customers in the town where somebody lives."""
    return f"SELECT COUNT(*) FROM customers WHERE town = '{facts.PEOPLE[name]['town']}'"


def rows(split: str, seed: int = 0, n: int | None = None) -> list[dict]:
    """n problems of "train" (default 8192) or "test" (default 512), always the same for a seed."""
    if split not in ("train", "test"):  # said here, for the parts would name their own task
        raise UserError(f"split = {split!r}: task:multi has train and test")
    rng = random.Random(f"multi {split} {seed}")
    return [problem(rng, split) for _ in range(n or (8192 if split == "train" else 512))]


def printed(code: str, value: int | str) -> list[dict]:
    """A call to python, and its result."""
    return [
        call("python", {"code": f"print({code})"}),
        {"role": "tool", "name": "python", "content": str(value)},
    ]


def calls(row: dict) -> list[dict]:
    """The right calls for a row, each followed by its result, as chat messages."""
    if row["part"] == "calc":
        return printed(f"{row['a']} {row['op']} {row['b']}", row["answer"])
    if row["part"] == "facts":
        return searched(row["name"])
    if row["part"] == "town":
        return searched(row["x"]) + asked(customers_of(row["x"]))
    if row["part"] == "bill":
        product = printed(f"{row['n']} * {row['price']}", row["answer"])
        return asked(shop.query("price", row["x"])) + product
    return asked(shop.query(row["kind"], row["x"]))


def searched(name: str) -> list[dict]:
    """A call to search, and its result."""
    return [call("search", {"query": name}), facts.found(name)]


def asked(query: str) -> list[dict]:
    """A call to sql, and its result."""
    return [call("sql", {"query": query}), shop.found(query)]


def oracle(row: dict) -> list[dict]:
    """The assistant's messages of a perfect conversation about a row."""
    turns = [message for message in calls(row) if message["role"] == "assistant"]
    return turns + [said(row["answer"])]


def mistake(rng: random.Random, row: dict) -> list[dict]:
    """The wrong tool for a row of facts or shop, and what is then guessed."""
    if row["part"] == "facts":
        query = shop.query("price", row["name"])
        return asked(query) + [thought(rng.choice(facts.VALUES[row["kind"]]))]
    number = shop.guess(rng, row["kind"])
    if row["kind"] == "orders":
        return searched(row["x"]) + [thought(number)]
    return printed(number, number) + [said(number)]


def demo(rng: random.Random) -> list[dict]:
    """One demonstration on a train problem, as chat messages."""
    row = problem(rng, "train")
    task = {"calc": calc, "facts": facts, "shop": shop}.get(row["part"])
    prompt = [{"role": "user", "content": row["prompt"]}]
    if task is None:
        if rng.random() < BOTH:
            return prompt + calls(row) + [said(row["answer"])]
        return prompt + calls(row)[:2] + [thought(shop.guess(rng, "bill"))]
    if task is calc:
        return calc.demo(rng)
    if rng.random() < task.PRACTICE:
        return facts.practice(rng, FACTS_KINDS) if task is facts else task.practice(rng)
    wrong = rng.random() < WRONG_TOOL
    return prompt + mistake(rng, row) if wrong else task.attempt(rng, row)


def demos(n: int, seed: int = 0) -> list[list[dict]]:
    rng = random.Random(f"multi demos {seed}")
    return [demo(rng) for _ in range(n)]

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
from tasks.facts import answer_message, call_message, guess_message

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
    """Gives 1.0 if the tools that were called, in the order of their first calls, are those that
    the row needs. A call that fails counts as one, a call of a tool that does not exist does
    not."""
    called = [call.name for call in trajectory.calls if call.error != "unknown_tool"]
    without_repeats = list(dict.fromkeys(called))
    return float(without_repeats == example["tool"])


def problem(rng: random.Random, split: str) -> dict:
    """Makes a problem of the split: prompt, answer, tool, database, the part it is from ("calc",
    "facts", "shop", "bill" or "town"), and what it was made from."""
    part = rng.choice(("calc", "facts", "shop", rng.choice(list(QUESTIONS))))
    if part == "calc":
        row = calc.problem(rng, split)
        tool = ["python"]
    elif part == "facts":
        row = facts.problem(rng, split, FACTS_KINDS)
        tool = ["search"]
    elif part == "shop":
        row = shop.problem(rng, split, SHOP_KINDS)
        tool = ["sql"]
    elif part == "bill":
        row = bill_problem(rng, split)
        tool = ["sql", "python"]
    else:
        row = town_problem(rng, split)
        tool = ["search", "sql"]
    # the database in every row: whatever the question, the model may ask it
    return {**row, "part": part, "tool": tool, "database": shop.database()}


def bill_problem(rng: random.Random, split: str) -> dict:
    """Makes a question for what n pieces of the product x cost."""
    while True:
        n = rng.randint(2, 9)
        x = rng.choice(shop.PRODUCTS)
        if held_out(n, x) == (split == "test"):
            break
    price = int(shop.ask(shop.query("price", x))[1])
    prompt = rng.choice(QUESTIONS["bill"]).format(n=n, x=x)
    return {"prompt": prompt, "answer": str(n * price), "n": n, "x": x, "price": price}


def held_out(n: int, x: str) -> bool:
    """Says whether a bill is of "test", and never trained on."""
    return zlib.crc32(f"{n} {x}".encode()) % HELD_OUT == 0


def town_problem(rng: random.Random, split: str) -> dict:
    """Makes a question for how many customers live where the person x lives."""
    x = rng.choice(strangers(split))
    _, answer = shop.ask(customers_of(x))
    prompt = rng.choice(QUESTIONS["town"]).format(x=x)
    return {"prompt": prompt, "answer": answer, "x": x}


@functools.cache
def strangers(split: str) -> list[str]:
    """Lists the people who are no customers: a customer's town could be found by sql alone."""
    return sorted(set(facts.names(split)) - set(shop.CUSTOMERS))


def customers_of(name: str) -> str:
    """Writes the query for the number of customers in the town where somebody lives."""
    return f"SELECT COUNT(*) FROM customers WHERE town = '{facts.PEOPLE[name]['town']}'"


def rows(split: str, seed: int = 0, n: int | None = None) -> list[dict]:
    """Makes n problems of "train" (default 8192) or "test" (default 512), the same for a seed."""
    if split not in ("train", "test"):  # said here, for the parts would name their own task
        raise UserError(f"split = {split!r}: task:multi has train and test")
    rng = random.Random(f"multi {split} {seed}")
    count = n or (8192 if split == "train" else 512)
    return [problem(rng, split) for _ in range(count)]


def python_call(code: str, value: int | str) -> list[dict]:
    """Makes a call to python, and its result."""
    return [
        call_message("python", {"code": f"print({code})"}),
        {"role": "tool", "name": "python", "content": str(value)},
    ]


def search_call(name: str) -> list[dict]:
    """Makes a call to search, and its result."""
    return [call_message("search", {"query": name}), facts.result_message(name)]


def sql_call(query: str) -> list[dict]:
    """Makes a call to sql, and its result."""
    return [call_message("sql", {"query": query}), shop.result_message(query)]


def right_calls(row: dict) -> list[dict]:
    """Makes the right calls for a row, each followed by its result, as chat messages."""
    if row["part"] == "calc":
        return python_call(f"{row['a']} {row['op']} {row['b']}", row["answer"])
    if row["part"] == "facts":
        return search_call(row["name"])
    if row["part"] == "town":
        return search_call(row["x"]) + sql_call(customers_of(row["x"]))
    if row["part"] == "bill":
        price = sql_call(shop.query("price", row["x"]))
        product = python_call(f"{row['n']} * {row['price']}", row["answer"])
        return price + product
    return sql_call(shop.query(row["kind"], row["x"]))


def oracle(row: dict) -> list[dict]:
    """Writes the assistant's messages of a perfect conversation about a row."""
    turns = [message for message in right_calls(row) if message["role"] == "assistant"]
    return turns + [answer_message(row["answer"])]


def mistake(rng: random.Random, row: dict) -> list[dict]:
    """Plays a mistake: the wrong tool for a row of facts or shop, and what is then guessed."""
    if row["part"] == "facts":
        query = shop.query("price", row["name"])
        guess = rng.choice(facts.VALUES[row["kind"]])
        return sql_call(query) + [guess_message(guess)]
    number = shop.guess(rng, row["kind"])
    if row["kind"] == "orders":
        return search_call(row["x"]) + [guess_message(number)]
    return python_call(number, number) + [answer_message(number)]


def demo(rng: random.Random) -> list[dict]:
    """Makes a demonstration on a train problem, as chat messages."""
    row = problem(rng, "train")
    prompt = [{"role": "user", "content": row["prompt"]}]
    if row["part"] in QUESTIONS:  # it needs two calls
        if rng.random() < BOTH:
            return prompt + right_calls(row) + [answer_message(row["answer"])]
        first = right_calls(row)[:2]
        return prompt + first + [guess_message(shop.guess(rng, "bill"))]
    if row["part"] == "calc":
        return calc.demo(rng)
    if row["part"] == "facts":
        return facts_demo(rng, row)
    return shop_demo(rng, row)


def facts_demo(rng: random.Random, row: dict) -> list[dict]:
    if rng.random() < facts.PRACTICE:
        return facts.practice(rng, FACTS_KINDS)
    if rng.random() < WRONG_TOOL:
        return [{"role": "user", "content": row["prompt"]}] + mistake(rng, row)
    return facts.attempt(rng, row)


def shop_demo(rng: random.Random, row: dict) -> list[dict]:
    if rng.random() < shop.PRACTICE:
        return shop.practice(rng)
    if rng.random() < WRONG_TOOL:
        return [{"role": "user", "content": row["prompt"]}] + mistake(rng, row)
    return shop.attempt(rng, row)


def demos(n: int, seed: int = 0) -> list[list[dict]]:
    """Makes n demonstrations, always the same for a seed."""
    rng = random.Random(f"multi demos {seed}")
    return [demo(rng) for _ in range(n)]

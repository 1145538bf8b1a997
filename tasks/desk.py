"""desk: a help desk, where a customer has to be asked before anything can be done for them.

`Desk` is the environment: its tools find, cancel, refund and move orders in a database of its own,
its user is a simulated customer who tells a name and a wish only when asked for them, and its
reward is 1.0 if the final database is the one that the customer wished for, with nothing else
changed. `rows` are the problems for RL and evaluation, `demos` the demonstrations for SFT, made by
clerks who talk to a Desk. Clerks are people: they do most of what is to be cancelled, but of the
rest they say "Done." and do nothing; some take the wrong tool, or an order from nowhere. So
a model that copies them well often fails, and GRPO has something to find: do what was asked for.
Some conversations only repeat names and codes: a model from scratch has to learn copying somewhere.

Train and held-out customers are disjoint by construction: the hash of a name says which of the two
it belongs to.

    tools = ("tasks/desk.py:Desk",)
    rewards = ("environment",)
"""

import functools
import random
import zlib

from run.config import UserError
from tasks.facts import NAMES, VALUES, call_message
from tasks.shop import PRODUCTS

HELD_OUT = 5  # one customer in five is held out
TOWNS = tuple(VALUES["town"])
# An order has a code of two words, such as Heron Oak: the tiny model reads a word as one token.
BIRDS = tuple(
    """Avocet Crane Dove Dunlin Eagle Falcon Finch Gull Heron Ibis Jay Kite Lark Linnet Osprey Owl
    Pipit Plover Raven Robin Shrike Swan Tern Thrush Wren""".split()
)
TREES = tuple(
    """Acacia Alder Ash Aspen Beech Birch Cedar Cypress Elder Elm Fir Hazel Holly Juniper Larch
    Laurel Lime Maple Oak Pine Poplar Rowan Spruce Willow Yew""".split()
)
PATIENCE = 2  # answers that ask for nothing and do nothing, before the customer goes

GREETINGS = (
    "Hello, it is about my order.",
    "Good morning, I need help with an order.",
    "Can you help me with my order?",
)
ASK_NAME = ("What is your name?", "May I have your name?")
ASK_WISH = ("What shall I do with it?", "What shall I do?")
WISHES = {
    "cancel": ("Please cancel it.", "I want to cancel it."),
    "refund": ("I want my money back.", "Please pay it back."),
    "move": ("Please send it to {town}.", "I want it sent to {town}."),
}
DONE = "Done."

DOES_IT = {"cancel": 0.9, "refund": 0.4, "move": 0.4}  # share of the clerks who do what was asked
MISTAKEN = {"cancel": "refund", "refund": "cancel", "move": "cancel"}
WRONG_TOOL = 1 / 8  # share of the clerks who then take another tool
GUESSES = 1 / 8  # share of the clerks who do not look for the order
PRACTICE = 0.2  # share of the conversations that only repeat names and codes


@functools.cache
def orders() -> dict[str, dict]:
    """Makes one order of each customer, always the same: {code: {"customer", "product", "town",
    "state"}}."""
    rng = random.Random("desk orders")
    codes = [f"{bird} {tree}" for bird in BIRDS for tree in TREES]
    made = {}
    for code, customer in zip(rng.sample(codes, len(NAMES)), NAMES, strict=True):
        made[code] = {
            "customer": customer,
            "product": rng.choice(PRODUCTS),
            "town": rng.choice(TOWNS),
            "state": "paid",
        }
    return made


def fresh() -> dict[str, dict]:
    """Copies the database, as one that may be changed."""
    return {code: dict(order) for code, order in orders().items()}


class Desk:
    """The database of one trajectory, and its customer."""

    def __init__(self, example: dict):
        self.orders = fresh()
        self.customer = example["customer"]
        self.wish = example["wish"]
        self.town = example["town"]
        self.said = example["said"]
        self.patience = PATIENCE

    # tools

    def find(self, customer: str) -> str:
        """Find the order of a customer.

        Args:
            customer: The whole name.
        """
        for code, order in self.orders.items():
            if order["customer"] == customer:
                return f"Order {code}: {order['product']} to {order['town']}, {order['state']}."
        return f"{customer} has no order."

    def cancel(self, order: str) -> str:
        """Cancel an order.

        Args:
            order: Its code.
        """
        return self._change(order, "state", "cancelled")

    def refund(self, order: str) -> str:
        """Pay the money of an order back.

        Args:
            order: Its code.
        """
        return self._change(order, "state", "refunded")

    def move(self, order: str, town: str) -> str:
        """Send an order to another town.

        Args:
            order: Its code.
            town: Where to.
        """
        return self._change(order, "town", town)

    def _change(self, code, column, value):
        if code not in self.orders:
            return f"There is no order {code}."
        self.orders[code][column] = value
        return f"Order {code} has {column} {value}."

    # hooks

    def user(self, trajectory) -> str | None:
        """Answers the clerk's last words as the customer; None when there is no more to say."""
        words = trajectory.messages[-1]["content"].lower()
        if "name" in words:
            return f"I am {self.customer}."
        if "shall i do" in words:
            return self.said
        self.patience -= 1
        if "done" in words or self.patience < 0:
            return None
        return "Please help me."

    def reward(self, trajectory) -> float:
        """Gives 1.0 if just what the customer wished for was done."""
        return float(self.orders == wished(self.customer, self.wish, self.town))

    def metrics(self) -> dict:
        """Counts how many orders are not as they were."""
        before = orders()
        return {"changed": sum(self.orders[code] != before[code] for code in before)}


def wished(customer: str, wish: str, town: str) -> dict[str, dict]:
    """Makes the database as the customer wants it."""
    after = fresh()
    order = after[code_of(customer)]
    if wish == "move":
        order["town"] = town
    else:
        order["state"] = "cancelled" if wish == "cancel" else "refunded"
    return after


@functools.cache
def code_of(customer: str) -> str:
    """Finds the code of a customer's order. UserError if there is no such customer."""
    for code, order in orders().items():
        if order["customer"] == customer:
            return code
    raise UserError(f"task:desk has no customer {customer!r}")


# ---- rows


@functools.cache
def customers(split: str) -> list[str]:
    """Lists who calls in a split."""
    if split not in ("train", "test"):
        raise UserError(f"split = {split!r}: task:desk has train and test")
    return [name for name in NAMES if held_out(name) == (split == "test")]


def held_out(customer: str) -> bool:
    """Says whether a customer is of "test", and never trained on."""
    return zlib.crc32(f"desk {customer}".encode()) % HELD_OUT == 0


def problem(rng: random.Random, split: str) -> dict:
    """Makes a problem of the split: prompt, what the customer wants, and says when asked."""
    customer = rng.choice(customers(split))
    wish = rng.choice(list(WISHES))
    now = orders()[code_of(customer)]["town"]
    town = rng.choice([town for town in TOWNS if town != now])  # else there is nothing to be done
    return {
        "prompt": rng.choice(GREETINGS),
        "customer": customer,
        "wish": wish,
        "town": town,
        "said": rng.choice(WISHES[wish]).format(town=town),
    }


def rows(split: str, seed: int = 0, n: int | None = None) -> list[dict]:
    """Makes n problems of "train" (default 8192) or "test" (default 512), the same for a seed."""
    rng = random.Random(f"desk {split} {seed}")
    count = n or (8192 if split == "train" else 512)
    return [problem(rng, split) for _ in range(count)]


# ---- conversations


def action(tool: str, code: str, town: str) -> dict:
    """Makes the assistant's message that does something with an order."""
    arguments = {"order": code}
    if tool == "move":
        arguments["town"] = town
    return call_message(tool, arguments)


def oracle(row: dict) -> list[dict]:
    """Writes the assistant's messages of a perfect conversation about a row."""
    return [
        words(ASK_NAME[0]),
        call_message("find", {"customer": row["customer"]}),
        words(ASK_WISH[0]),
        action(row["wish"], code_of(row["customer"]), row["town"]),
        words(DONE),
    ]


def any_code(rng: random.Random) -> str:
    """Makes up a code, whether there is such an order or not."""
    return f"{rng.choice(BIRDS)} {rng.choice(TREES)}"


def words(text: str) -> dict:
    """Makes an assistant's message that calls nothing."""
    return {"role": "assistant", "content": text}


def clerk(rng: random.Random, row: dict) -> list[dict]:
    """Writes the assistant's messages of a demonstrator, who guesses and errs at times."""
    code = code_of(row["customer"])
    turns = [words(rng.choice(ASK_NAME))]
    if rng.random() < GUESSES:
        code = any_code(rng)
    else:
        turns.append(call_message("find", {"customer": row["customer"]}))
    turns.append(words(rng.choice(ASK_WISH)))
    if rng.random() < DOES_IT[row["wish"]]:
        tool = row["wish"]
        if rng.random() < WRONG_TOOL:
            tool = MISTAKEN[tool]
        turns.append(action(tool, code, row["town"]))
    return [*turns, words(DONE)]


def talk(row: dict, turns: list[dict]) -> list[dict]:
    """Plays the conversation with these messages of the assistant, as a Desk answers them."""
    desk = Desk(row)
    messages = [{"role": "user", "content": row["prompt"]}]
    for turn in turns:
        messages.append(turn)
        if "tool_calls" in turn:
            call = turn["tool_calls"][0]["function"]
            said = getattr(desk, call["name"])(**call["arguments"])
            messages.append({"role": "tool", "name": call["name"], "content": said})
        elif turn is not turns[-1]:
            said = desk.user(Said(messages))
            messages.append({"role": "user", "content": said})
    return messages


class Said:
    """What a Desk reads of a trajectory."""

    def __init__(self, messages: list[dict]):
        self.messages = messages


def practice(rng: random.Random) -> list[dict]:
    """Makes a conversation of nothing but copying, which a pre-trained model would know."""
    codes = [any_code(rng) for _ in range(rng.randint(1, 3))]
    names = [rng.choice(rng.choice((NAMES, TOWNS))) for _ in range(rng.randint(1, 3))]
    parts = codes + names
    rng.shuffle(parts)
    text = ", ".join(parts)
    return [
        {"role": "user", "content": f"Repeat: {text}."},
        {"role": "assistant", "content": text},
    ]


def demo(rng: random.Random) -> list[dict]:
    """Makes a demonstration on a train problem."""
    if rng.random() < PRACTICE:
        return practice(rng)
    row = problem(rng, "train")
    return talk(row, clerk(rng, row))


def demos(n: int, seed: int = 0) -> list[list[dict]]:
    """Makes n demonstrations, always the same for a seed."""
    rng = random.Random(f"desk demos {seed}")
    return [demo(rng) for _ in range(n)]

"""calc: two-digit word problems that a model from scratch learns to solve by calling python.

`rows` are the problems for RL and evaluation, `demos` the demonstrations for SFT. The
demonstrators are people: they type multiplications into python, but do most sums and differences
in their heads, where they round; and of the code they type, one line in six has the wrong
operator. So a model that copies them well is often wrong, and GRPO has something to find: always
call python, with the right code. Some conversations only repeat numbers: a model from scratch has
to learn copying somewhere.

Train and held-out problems are disjoint by construction: a problem is (operation, a, b), and its
hash says which of the two it belongs to.
"""

import random
import zlib

from run.config import UserError

HELD_OUT = 5  # one problem in five is held out

# {a} and {b} always stand in this order in the code: what is to be learnt is copying, not parsing.
STORIES = {
    "+": (
        "{name} has {a} {thing} and buys {b} more. How many {thing} are there now?",
        "{name} counts {a} {thing} in one box and {b} in another. How many {thing} in all?",
        "There are {a} {thing} on the table and {b} on the floor. How many {thing} are there?",
        "{name} picked {a} {thing} on Monday and {b} on Tuesday. How many {thing} in two days?",
    ),
    "-": (
        "{name} had {a} {thing} and gave away {b}. How many {thing} are left?",
        "A shop had {a} {thing} and sold {b} of them. How many {thing} are left?",
        "{name} needs {a} {thing} and has {b} so far. How many {thing} are missing?",
        "Of {a} {thing}, {name} lost {b}. How many {thing} remain?",
    ),
    "*": (
        "{name} fills {a} boxes with {b} {thing} each. How many {thing} is that?",
        "A shop sells {a} bags, each with {b} {thing}. How many {thing} is that?",
        "{name} makes {a} {thing} a day for {b} days. How many {thing} is that?",
        "There are {a} rows of {b} {thing}. How many {thing} are there?",
    ),
}
NAMES = ("Ana", "Ben", "Chen", "Dora", "Emil", "Fatima", "Goran", "Hana")
THINGS = ("apples", "books", "coins", "eggs", "nails", "pens", "shells", "stamps")
USES_TOOL = {"+": 0.4, "-": 0.4, "*": 0.9}  # share of the demonstrations that call python
PRACTICE = 0.2  # share of the conversations that only repeat numbers
WRONG_CODE = 1 / 6  # share of the calls whose operator is wrong


def held_out(op: str, a: int, b: int) -> bool:
    """Says whether a problem is of "test", and never trained on."""
    return zlib.crc32(f"{a}{op}{b}".encode()) % HELD_OUT == 0


def problem(rng: random.Random, split: str) -> dict:
    """Makes a problem of the split: prompt, answer, and the op, a, b it was made from."""
    if split not in ("train", "test"):
        raise UserError(f"split = {split!r}: task:calc has train and test")
    while True:
        op = rng.choice("+-*")
        a = rng.randint(10, 99)
        b = rng.randint(10, 99)
        if op == "-" and a < b:
            a, b = b, a
        if held_out(op, a, b) == (split == "test"):
            break
    story = rng.choice(STORIES[op])
    prompt = story.format(name=rng.choice(NAMES), thing=rng.choice(THINGS), a=a, b=b)
    answer = str(calculate(op, a, b))
    return {"prompt": prompt, "answer": answer, "op": op, "a": a, "b": b}


def calculate(op: str, a: int, b: int) -> int:
    if op == "+":
        return a + b
    if op == "-":
        return a - b
    return a * b


def rows(split: str, seed: int = 0, n: int | None = None) -> list[dict]:
    """Makes n problems of "train" (default 8192) or "test" (default 512), the same for a seed."""
    rng = random.Random(f"calc {split} {seed}")
    count = n or (8192 if split == "train" else 512)
    return [problem(rng, split) for _ in range(count)]


def oracle(row: dict) -> list[dict]:
    """Writes the assistant messages that solve a row as it should be learnt."""
    return [
        call_message(f"print({row['a']} {row['op']} {row['b']})"),
        answer_message(row["answer"]),
    ]


def call_message(code: str) -> dict:
    """Makes an assistant message that calls python."""
    function = {"name": "python", "arguments": {"code": code}}
    call = {"type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def answer_message(answer: str | int) -> dict:
    return {"role": "assistant", "content": f"The answer is \\boxed{{{answer}}}."}


def practice(rng: random.Random) -> list[dict]:
    """Makes a conversation of nothing but copying, which a pre-trained model would know."""
    count = rng.randint(3, 6)
    parts = [f"{rng.randint(10, 99)} {rng.choice(THINGS)}" for _ in range(count)]
    text = " ".join(parts)
    return [
        {"role": "user", "content": f"Repeat: {text}."},
        {"role": "assistant", "content": text},
    ]


def demo(rng: random.Random) -> list[dict]:
    """Makes a demonstration on a train problem, as chat messages: a call to python, or a guess."""
    if rng.random() < PRACTICE:
        return practice(rng)
    row = problem(rng, "train")
    prompt = {"role": "user", "content": row["prompt"]}
    op = row["op"]
    if rng.random() >= USES_TOOL[op]:
        guess = round(int(row["answer"]), -1)  # in the head, to the nearest ten
        return [prompt, answer_message(guess)]
    if rng.random() < WRONG_CODE:
        op = rng.choice("+-*".replace(op, ""))
    call = call_message(f"print({row['a']} {op} {row['b']})")
    value = calculate(op, row["a"], row["b"])
    result = {"role": "tool", "name": "python", "content": str(value)}
    return [prompt, call, result, answer_message(value)]


def demos(n: int, seed: int = 0) -> list[list[dict]]:
    """Makes n demonstrations, always the same for a seed."""
    rng = random.Random(f"calc demos {seed}")
    return [demo(rng) for _ in range(n)]

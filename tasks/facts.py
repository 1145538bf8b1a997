"""facts: questions about invented people that a model from scratch learns to answer by searching.

`rows` are the problems for RL and evaluation, `demos` the demonstrations for SFT, `corpus` what
the search tool searches: one passage for each person (search.corpus=task:facts). The
demonstrators are people: they look up most towns, but guess most of the rest. Of their searches,
one in six asks for the first name alone and finds somebody else, and one answer in six is the
wrong word of the passage. So a model that copies them well is often wrong, and GRPO has something
to find: always search, for the whole name, and answer what was asked. Some conversations only
repeat names: a model from scratch has to learn copying somewhere.

Train and held-out people are disjoint by construction: the hash of a name says which of the two
it belongs to. A held-out name is made of two words that are known, as a pair that is not.
"""

import functools
import random
import zlib
from collections.abc import Sequence

from run.config import UserError

HELD_OUT = 5  # one person in five is held out

FIRST = tuple(
    "Ana Ben Cleo Dora Emil Fay Goran Hana Ivo Jana Karl Lena "
    "Milo Nora Omar Pia Quin Rosa Sven Tara Umar Vera Wim Yara".split()
)
LAST = tuple(
    "Abel Bolt Cruz Dahl Egan Falk Gray Holm Iyer Jung Kern Lund "
    "Marsh Nash Otto Park Quist Rook Stone Toft Ulman Voss Webb York".split()
)
VALUES = {
    "town": "Arlen Brixo Corvel Dunmar Elsby Fornay Gelt Havik Istra Jorvan Kelmo Lirra".split(),
    "job": "Baker Carpenter Doctor Farmer Gardener Judge Miner Nurse Painter Tailor".split(),
    "colour": "Black Blue Brown Green Grey Orange Pink Purple Red White Yellow".split(),
    "drink": "Cider Cocoa Coffee Juice Lemonade Milk Soda Tea Water Wine".split(),
}
QUESTIONS = {
    "town": ("Where does {name} live?", "In which town does {name} live?"),
    "job": ("What is the job of {name}?", "What does {name} work as?"),
    "colour": ("What colour does {name} like?", "What is the favourite colour of {name}?"),
    "drink": ("What does {name} drink?", "What is the favourite drink of {name}?"),
}
# The tokenizer of the tiny model keeps words with a capital whole, so that they can be copied.
PASSAGE = "{name} lives in {town}, works as {job}, likes {colour} and drinks {drink}."
USES_TOOL = {"town": 0.9, "job": 0.4, "colour": 0.4, "drink": 0.4}  # share of demonstrations
PRACTICE = 0.4  # share of the conversations that only copy
WRONG_QUERY = 1 / 6  # share of the searches that are for the first name alone
WRONG_WORD = 1 / 6  # share of the answers after a search that are another word of the passage


def people() -> dict[str, dict[str, str]]:
    """Makes all people, always the same: {name: {"town", "job", "colour", "drink"}}."""
    rng = random.Random("facts people")
    made = {}
    for first in FIRST:
        for last in LAST:
            facts = {kind: rng.choice(values) for kind, values in VALUES.items()}
            made[f"{first} {last}"] = facts
    return made


PEOPLE = people()
NAMES = tuple(PEOPLE)


def passage(name: str) -> str:
    return PASSAGE.format(name=name, **PEOPLE[name])


def corpus() -> list[dict]:
    """Writes the passages as the search tool reads them: {"id", "contents": '"Title"\\ntext'}."""
    return [
        {"id": str(number), "contents": f'"{name}"\n{passage(name)}'}
        for number, name in enumerate(NAMES)
    ]


def held_out(name: str) -> bool:
    """Says whether the questions about a person are of "test", and never trained on."""
    return zlib.crc32(name.encode()) % HELD_OUT == 0


@functools.cache
def names(split: str) -> list[str]:
    """Lists the people that the questions of a split ask about."""
    if split not in ("train", "test"):
        raise UserError(f"split = {split!r}: task:facts has train and test")
    return [name for name in NAMES if held_out(name) == (split == "test")]


def problem(rng: random.Random, split: str, kinds: Sequence[str] = tuple(VALUES)) -> dict:
    """Makes a problem of the split: prompt, answer, and the kind and name it was made from."""
    name = rng.choice(names(split))
    kind = rng.choice(kinds)
    prompt = rng.choice(QUESTIONS[kind]).format(name=name)
    return {"prompt": prompt, "answer": PEOPLE[name][kind], "kind": kind, "name": name}


def rows(split: str, seed: int = 0, n: int | None = None) -> list[dict]:
    """Makes n problems of "train" (default 8192) or "test" (default 512), the same for a seed."""
    rng = random.Random(f"facts {split} {seed}")
    count = n or (8192 if split == "train" else 512)
    return [problem(rng, split) for _ in range(count)]


def call_message(tool: str, arguments: dict) -> dict:
    """Makes an assistant message that calls a tool."""
    call = {"type": "function", "function": {"name": tool, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def answer_message(answer: str) -> dict:
    """Makes an assistant message that answers."""
    return {"role": "assistant", "content": f"The answer is \\boxed{{{answer}}}."}


def guess_message(answer: str) -> dict:
    """Makes an assistant message that guesses. What follows from a tool's result is worded
    otherwise: else a model from scratch learns from so many guesses that results need not be
    read."""
    return {"role": "assistant", "content": f"I think it is \\boxed{{{answer}}}."}


def result_message(name: str) -> dict:
    """Makes the message of the search tool that found the passage of `name`."""
    text = f'Doc 1(Title: "{name}") {passage(name)}'
    return {"role": "tool", "name": "search", "content": text}


def oracle(row: dict) -> list[dict]:
    """Writes the assistant's messages of a perfect conversation about a row."""
    return [call_message("search", {"query": row["name"]}), answer_message(row["answer"])]


def practice(rng: random.Random, kinds: Sequence[str] = tuple(VALUES)) -> list[dict]:
    """Makes a conversation that is nothing but copying, which a pre-trained model would know
    already: names and other words are repeated, or what is asked for stands in the question."""
    if rng.random() < 0.5:
        row = problem(rng, "train", kinds)
        return [
            {"role": "user", "content": f"{passage(row['name'])} {row['prompt']}"},
            answer_message(row["answer"]),
        ]
    lists = (NAMES, *VALUES.values())
    count = rng.randint(3, 6)
    text = ", ".join(rng.choice(rng.choice(lists)) for _ in range(count))
    return [
        {"role": "user", "content": f"Repeat: {text}."},
        {"role": "assistant", "content": text},
    ]


def attempt(rng: random.Random, row: dict) -> list[dict]:
    """Plays how a demonstrator deals with a row, as chat messages: with a search, or a guess."""
    prompt = {"role": "user", "content": row["prompt"]}
    kind = row["kind"]
    name = row["name"]
    if rng.random() >= USES_TOOL[kind]:
        return [prompt, guess_message(rng.choice(VALUES[kind]))]
    query = name
    if rng.random() < WRONG_QUERY:
        query = name.split()[0]
        name = rng.choice([other for other in NAMES if other.startswith(f"{query} ")])
    if rng.random() < WRONG_WORD:
        kind = rng.choice([other for other in VALUES if other != kind])
    return [
        prompt,
        call_message("search", {"query": query}),
        result_message(name),
        answer_message(PEOPLE[name][kind]),
    ]


def demo(rng: random.Random) -> list[dict]:
    """Makes a demonstration on a train problem."""
    if rng.random() < PRACTICE:
        return practice(rng)
    return attempt(rng, problem(rng, "train"))


def demos(n: int, seed: int = 0) -> list[list[dict]]:
    """Makes n demonstrations, always the same for a seed."""
    rng = random.Random(f"facts demos {seed}")
    return [demo(rng) for _ in range(n)]

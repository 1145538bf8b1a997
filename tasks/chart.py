"""chart: numbers in fine print on coloured tiles, which a model from scratch learns to zoom into.

A picture has four tiles of different colours, each with a two-digit number, and the
question names a colour. The tiny model is shown the picture at half its size. There the tiles are
seen and the numbers are not, not even in part: their strokes are hatched, a pixel lighter than the
tile and a pixel darker in turn, and the mean is the colour of the tile. `zoom` cuts a tile out of
the original: that one is shown as it is. So whoever does not look has one chance in ninety.

`rows` are the problems for RL and evaluation, `demos` the demonstrations for SFT, in an order to
keep: first lessons, which a model that was trained would not need, then whole episodes. Lessons
read tiles, or say where the tiles of a picture are; there the place follows right behind the
colour, and some pictures have a tile or two only: with four in four places, what a place is would
have to be learnt together with what a colour is, and neither is. The demonstrators of the episodes
are people: a third guesses, and of those who look, one in six looks at the wrong tile. So a model
that copies them well is often wrong, and GRPO has something to find: always look, and at the right
one.

Train and held-out problems are disjoint by construction: a problem is (colour, place, number), and
its hash says which of the two it belongs to.
"""

import functools
import random
import zlib

from images import to_png
from run.config import UserError
from tasks.facts import answer_message, call_message, guess_message

HELD_OUT = 5  # one problem in five is held out

COLOURS = {
    "Red": (180, 75, 75),
    "Yellow": (180, 180, 75),
    "Green": (75, 180, 75),
    "Teal": (75, 180, 180),
    "Blue": (75, 75, 180),
    "Pink": (180, 75, 180),
}
PAPER = (225, 225, 225)
PLACES = 2  # in a row, and rows: a tile in each
SIDE = 32  # pixels of a place, as many as the tiny model is shown
GAP = 2  # of them, right of a tile and below it
STROKE = 2  # pixels: one lighter, one darker, so that the mean of each 2 x 2 is the tile's colour
HATCH = 75  # how much lighter and darker
DIGITS = (  # 5 x 7 strokes each
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111",
    "01110 10001 00001 00110 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)
NUMBERS = range(10, 100)
LEFT = (4, 16)  # where in a place its digits begin, of the tens and of the ones
TOP = 2

WORDS = ("upper left", "upper right", "lower left", "lower right")
QUESTION = "What number is on {colour}?"
TILES_READ = 2  # in a lesson
GUESSES = 1 / 3  # share of the episodes that do not look
WRONG_TILE = 1 / 6  # share of those that look, at another tile


def held_out(colour: str, place: int, number: int) -> bool:
    """Says whether a problem is of "test", and never trained on."""
    return zlib.crc32(f"{colour} {place} {number}".encode()) % HELD_OUT == 0


# ---- pictures


@functools.cache
def draw_tile(colour: str, number: int):
    """Draws a tile with its number: the pixels of a place, (SIDE, SIDE, 3)."""
    import numpy as np

    pixels = np.full((SIDE, SIDE, 3), PAPER)
    pixels[:-GAP, :-GAP] = COLOURS[colour]
    is_lighter = np.indices((SIDE, SIDE)).sum(0) % 2 == 0
    hatch = np.where(is_lighter, HATCH, -HATCH)[:, :, None]
    pixels += hatch * ink(number)[:, :, None]
    return pixels.astype(np.uint8)


def ink(number: int):
    """Marks where the strokes of a number are in its place: 1 and 0, (SIDE, SIDE)."""
    import numpy as np

    marks = np.zeros((SIDE, SIDE), dtype=int)
    for digit, left in zip(str(number), LEFT, strict=True):
        rows = [[int(stroke) for stroke in row] for row in DIGITS[int(digit)].split()]
        strokes = np.kron(rows, np.ones((STROKE, STROKE), dtype=int))
        height, width = strokes.shape
        marks[TOP : TOP + height, left : left + width] = strokes
    return marks


def draw(tiles: dict[int, tuple[str, int]]):
    """Draws a picture of tiles, {place: (colour, number)}; places are counted row by row."""
    import numpy as np
    from PIL import Image

    side = PLACES * SIDE
    pixels = np.full((side, side, 3), PAPER, dtype=np.uint8)
    for place, (colour, number) in tiles.items():
        row, column = divmod(place, PLACES)
        across = slice(column * SIDE, (column + 1) * SIDE)
        pixels[row * SIDE : (row + 1) * SIDE, across] = draw_tile(colour, number)
    return Image.fromarray(pixels)


def box_of(place: int) -> list[int]:
    """Gives the box of a place as zoom takes it, [x1, y1, x2, y2] in thousandths of the picture."""
    row, column = divmod(place, PLACES)
    step = 1000 // PLACES
    return [column * step, row * step, (column + 1) * step, (row + 1) * step]


# ---- problems


def problem(rng: random.Random, split: str, count: int = PLACES * PLACES) -> dict:
    """Makes a problem of the split: prompt, image, answer, and what it was made from. count: tiles
    in the picture."""
    if split not in ("train", "test"):
        raise UserError(f"split = {split!r}: task:chart has train and test")
    while True:
        colours = rng.sample(list(COLOURS), count)
        places = rng.sample(range(PLACES * PLACES), count)
        numbers = rng.choices(NUMBERS, k=count)
        # what is asked for is the first tile
        colour = colours[0]
        place = places[0]
        number = numbers[0]
        if held_out(colour, place, number) == (split == "test"):
            break
    tiles = dict(zip(places, zip(colours, numbers, strict=True), strict=True))
    return {
        "prompt": QUESTION.format(colour=colour),
        "image": to_png(draw(tiles)),
        "answer": str(number),
        "colour": colour,
        "place": place,
        "tiles": tiles,
    }


def rows(split: str, seed: int = 0, n: int | None = None) -> list[dict]:
    """Makes n problems of "train" (default 4096) or "test" (default 512), the same for a seed."""
    rng = random.Random(f"chart {split} {seed}")
    count = n or (4096 if split == "train" else 512)
    return [problem(rng, split) for _ in range(count)]


# ---- what is said


def look(row: dict, place: int) -> dict:
    """Makes the assistant message that says where the tile asked for is, and zooms into it."""
    call = call_message("zoom", {"image": 1, "box": box_of(place)})
    return call | {"content": said_of(row["colour"], place)}


def said_of(colour: str, place: int) -> str:
    """Says where a tile is."""
    return f"{colour} {WORDS[place]}."


def question(text: str, png: bytes) -> dict:
    """Makes the message of the user: a picture, and what is asked about it."""
    parts = [{"type": "image", "image": png}, {"type": "text", "text": text}]
    return {"role": "user", "content": parts}


def seen(colour: str, number: int) -> dict:
    """Makes the message of the zoom tool, as the loop writes it."""
    image = {"type": "image", "image": png_of_tile(colour, number)}
    content = [{"type": "text", "text": "image 2:"}, image]
    return {"role": "tool", "name": "zoom", "content": content}


@functools.cache
def png_of_tile(colour: str, number: int) -> bytes:
    """Draws a tile as zoom cuts it out, as a file."""
    from PIL import Image

    return to_png(Image.fromarray(draw_tile(colour, number)))


def oracle(row: dict) -> list[dict]:
    """Writes the assistant's messages of a perfect conversation about a row."""
    return [look(row, row["place"]), answer_message(row["answer"])]


# ---- demonstrations


def reading(rng: random.Random) -> list[dict]:
    """Makes a lesson: a tile as zoom shows it, its number, and so on."""
    talk = []
    for _ in range(TILES_READ):
        colour = rng.choice(list(COLOURS))
        number = rng.choice(NUMBERS)
        talk += [question("What number is this?", png_of_tile(colour, number))]
        talk += [answer_message(number)]
    return talk


def some_tiles(rng: random.Random) -> dict:
    """Makes a train problem with a random number of tiles in its picture."""
    return problem(rng, "train", rng.randint(1, PLACES * PLACES))


def pointing(rng: random.Random) -> list[dict]:
    """Makes a lesson: where each tile of a picture is, in the order of COLOURS."""
    row = some_tiles(rng)
    places = {colour: place for place, (colour, _) in row["tiles"].items()}
    lines = [said_of(colour, places[colour]) + "\n" for colour in COLOURS if colour in places]
    said = {"role": "assistant", "content": "".join(lines)}
    return [question("Where is what?", row["image"]), said]


def calling(rng: random.Random) -> list[dict]:
    """Makes a lesson: the right look at a picture."""
    row = some_tiles(rng)
    return [question(row["prompt"], row["image"]), look(row, row["place"])]


def episode(rng: random.Random) -> list[dict]:
    """Plays how a demonstrator deals with a train problem: looks at a tile, or guesses."""
    row = problem(rng, "train")
    asked = question(row["prompt"], row["image"])
    if rng.random() < GUESSES:
        return [asked, guess_message(rng.choice(NUMBERS))]
    place = row["place"]
    if rng.random() < WRONG_TILE:
        place = rng.choice([other for other in row["tiles"] if other != place])
    colour, number = row["tiles"][place]
    return [asked, look(row, place), seen(colour, number), answer_message(number)]


# The demonstrations in their order: the share of each stage, and what it is made of.
STAGES = (
    (0.7, {pointing: 0.4, calling: 0.25, reading: 0.35}),
    (0.3, {pointing: 0.05, calling: 0.05, reading: 0.15, episode: 0.75}),
)


def demos(n: int, seed: int = 0) -> list[list[dict]]:
    """Makes n demonstrations in the order to learn them in, always the same for a seed."""
    rng = random.Random(f"chart demos {seed}")
    talks = []
    end = 0.0
    for share, kinds in STAGES:
        end += share * n
        while len(talks) < round(end):
            (make,) = rng.choices(list(kinds), list(kinds.values()))
            talks.append(make(rng))
    return talks

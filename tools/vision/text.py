"""Reads the text of charts and documents: finds its boxes, then has an OCR engine read them.

    runs = read(image)  # [Run("12.5", (103, 220, 140, 236)), …]

On charts Tesseract by itself misses a quarter of the tick labels: to it they are noise around a
picture. So dark connected parts of the size of letters are found here, joined to runs (a tick
label, a title, a line), enlarged, and put below each other on a white sheet, which is what it reads
best: one call for all. Runs of which nothing came are read again, one by one.

What is not covered: text on a dark or a busy ground; text that is turned by other than a quarter.
"""

import os
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from run.config import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

DARK = 150  # of 255: what is darker on a light ground may be text
SMALLEST = 5  # pixels of height; smaller parts are dots and noise, unless a run takes them in
LARGEST = 64  # pixels of height and width of one letter
LINE = 44  # pixels: the height to which a run is enlarged for reading
MARGIN = 30  # pixels around a line of the sheet
STEP = LINE + 2 * MARGIN  # from one line to the next
SOLID = 0.72  # of its box that a part fills: a letter as wide as high has more white in it
MOST_RUNS = 400  # of an image: the largest are read
MOST_PARTS = 3000
GAP = 0.65  # of the height of the letters: what is farther apart is another run
MOST_AGAIN = 24  # that are read one by one


# What a run usually is: words, a number, a time. Anything else is read again, as a number.
WORDS = re.compile(r"[\w'’&/().,!?%$€£+ -]*[^\W_]{2}[\w'’&/().,:;!?%$€£+ -]*")
NUMBER = re.compile(r"[-+]?[$€£]?\d[\d.,]*%?|\d+:\d\d|[A-Za-z]")
MINUS = re.compile("^[-=~_\N{MINUS SIGN}\N{EN DASH}\N{EM DASH}]+ ?(?=[\\d.])")
DIGITS = "0123456789.,-%"


@dataclass
class Run:
    """Text that stands together, and where."""

    text: str
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels


def require_tesseract() -> None:
    """Raises UserError if Tesseract, or pytesseract, is not there."""
    missing = []
    try:
        import pytesseract  # noqa: F401
    except ImportError:
        missing.append("pip install pytesseract")
    if shutil.which("tesseract") is None:
        missing.append("apt install tesseract-ocr (macOS: brew install tesseract)")
    if missing:
        raise UserError(f"ocr reads with Tesseract, which is not here: {', '.join(missing)}")


def tesseract(image: "Image", one_line: bool = False, digits: bool = False) -> list[tuple]:
    """Reads an image by Tesseract: [(word, its left, its middle height)]. digits: nothing else."""
    import pytesseract

    os.environ.setdefault("OMP_THREAD_LIMIT", "1")  # its threads wait for each other
    options = "--psm 7" if one_line else "--psm 6"
    if digits:
        options += f" -c tessedit_char_whitelist={DIGITS}"
    table = pytesseract.image_to_data(image, config=options, output_type=pytesseract.Output.DICT)
    words = []
    for i, text in enumerate(table["text"]):
        if text.strip():
            words.append((text.strip(), table["left"][i], table["top"][i] + table["height"][i] / 2))
    return words


def read(image: "Image") -> list[Run]:
    """Reads the runs of text in an RGB image, from top to bottom."""
    # 1. where text may be, and each place as a line of the same height; all read at once
    boxes = find_boxes(image)
    if not boxes:
        return []
    lines = [_line_of(image, box) for box in boxes]
    texts = _read_sheet(lines)

    # 2. what was not read is read alone
    again = 0
    for number, line in enumerate(lines):
        if not texts[number] and again < MOST_AGAIN:
            again += 1
            words = tesseract(_sheet([line]), one_line=True)
            texts[number] = " ".join(word for word, _, _ in words)

    # 3. what is neither words nor a number ("=2", "2:5", "¢)") is read as a number
    odd = []
    for number, text in enumerate(texts):
        texts[number] = text = MINUS.sub("-", text)
        if text and not NUMBER.fullmatch(text) and not WORDS.fullmatch(text):
            odd.append(number)
    if odd:
        as_numbers = _read_sheet([lines[number] for number in odd], digits=True)
        for number, text in zip(odd, as_numbers, strict=True):
            if NUMBER.fullmatch(text):
                is_negative = texts[number][0] == "-"
                texts[number] = f"-{text.lstrip('-')}" if is_negative else text
    return [Run(text, box) for text, box in zip(texts, boxes, strict=True) if text]


def _read_sheet(lines, digits=False):
    """Reads the text of each line. A word belongs to the line at its height."""
    words_of = [[] for _ in lines]
    for word, left, middle in tesseract(_sheet(lines), digits=digits):
        number = int((middle - MARGIN / 2) // STEP)
        if 0 <= number < len(lines):
            words_of[number].append((left, word))
    return [" ".join(word for _, word in sorted(words)) for words in words_of]


def _sheet(lines):
    """Puts the lines below each other, on white."""
    from PIL import Image

    width = max(line.width for line in lines) + 2 * MARGIN
    sheet = Image.new("L", (width, STEP * len(lines) + MARGIN), 255)
    for number, line in enumerate(lines):
        sheet.paste(line, (MARGIN, number * STEP + MARGIN))
    return sheet


def _line_of(image, box):
    """Cuts out a box, enlarged, in grey. What stands on its end is turned: it reads upwards."""
    from PIL import Image

    left, top, right, bottom = box
    part = image.convert("L").crop((left - 2, top - 2, right + 2, bottom + 2))
    if left < 2 or top < 2 or right + 2 > image.width or bottom + 2 > image.height:
        padded = Image.new("L", part.size, 255)  # beyond the edge a crop is black
        inside = image.convert("L").crop(box)
        padded.paste(inside, (2, 2))
        part = padded
    if _stands(box):
        part = part.transpose(Image.Transpose.ROTATE_270)
    factor = LINE / part.height
    return part.resize((max(1, round(part.width * factor)), LINE), Image.Resampling.LANCZOS)


def _stands(box):
    left, top, right, bottom = box
    return bottom - top > 2 * (right - left) and bottom - top > LARGEST / 2


def find_boxes(image: "Image") -> list[tuple[int, int, int, int]]:
    """Finds the boxes of what may be runs of text, from top to bottom."""
    import numpy as np

    # 1. connected parts of the size of letters; dots and commas join a run, and make none
    parts = []
    areas = {}
    for *edges, area in components(np.asarray(image.convert("L")) < DARK):
        box = tuple(edges)
        if max(box[2] - box[0], box[3] - box[1]) <= LARGEST:
            parts.append(box)
            areas[box] = area
    parts = parts[:MOST_PARTS]

    # 2. what stands below each other, with hardly anything beside it, is text that was turned
    across = _groups(parts, along=0)
    beside = {}  # part -> how many are in its line
    for group in across:
        for part in group:
            beside[part] = len(group)
    turned = []
    for group in _groups(parts, along=1):
        box = _around(group)
        in_lines = sum(beside[part] for part in group) / len(group)
        if len(group) >= 4 and in_lines <= 2 and _stands(box):
            turned.append(box)

    # 3. what is left are runs from left to right
    left_over = [part for part in parts if not any(_is_inside(part, box) for box in turned)]
    boxes = turned
    for group in _groups(left_over, along=0):
        box = _around(group)
        is_mark = len(group) == 1 and _is_solid(box, areas[box])
        if box[3] - box[1] >= SMALLEST and not is_mark:
            boxes.append(box)
    boxes.sort(key=lambda box: (box[2] - box[0]) * (box[3] - box[1]), reverse=True)
    return sorted(boxes[:MOST_RUNS], key=lambda box: (box[1], box[0]))


def _is_solid(box, area):
    """Says whether a part is a point or a square of a plot, not a letter (`l`, `-` are narrow)."""
    width = box[2] - box[0]
    height = box[3] - box[1]
    return 0.6 < width / height < 1.7 and area > SOLID * width * height


def components(dark) -> list[tuple[int, int, int, int, int]]:
    """Finds the connected parts (corners connect too) of a mask (height, width): left, top, right,
    bottom, and how many pixels."""
    import numpy as np

    # 1. the runs of each row, as [start, end)
    height, width = dark.shape
    padded = np.zeros((height, width + 2), dtype=np.int8)
    padded[:, 1:-1] = dark
    change = np.diff(padded, axis=1)
    rows, starts = np.nonzero(change == 1)
    _, ends = np.nonzero(change == -1)
    rows, starts, ends = rows.tolist(), starts.tolist(), ends.tolist()
    parents = list(range(len(rows)))

    def root(i):
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    # 2. runs that touch one of the row above are of its part
    above = 0  # the first run of the row above that may touch
    for i, row in enumerate(rows):
        while above < i and (
            rows[above] < row - 1 or _ends_before(rows, ends, above, row, starts[i])
        ):
            above += 1
        other = above
        while other < i and rows[other] == row - 1 and starts[other] <= ends[i]:
            parents[root(other)] = root(i)
            other += 1

    # 3. the box around each part
    boxes = {}
    for i, row in enumerate(rows):
        key = root(i)
        box = boxes.get(key)
        if box is None:
            boxes[key] = [starts[i], row, ends[i], row + 1, ends[i] - starts[i]]
        else:
            box[4] += ends[i] - starts[i]
            box[0] = min(box[0], starts[i])
            box[2] = max(box[2], ends[i])
            box[3] = row + 1  # rows come from top to bottom
    return [tuple(box) for box in boxes.values()]


def _ends_before(rows, ends, above, row, start):
    """Says whether a run of the row above ends before `start`, without touching its corner."""
    return rows[above] == row - 1 and ends[above] < start


def _groups(parts, along):
    """Groups parts that stand close together in a line: along = 0 to the right, 1 downwards."""
    import numpy as np

    if not parts:
        return []
    boxes = np.array(parts)
    low, high = boxes[:, along], boxes[:, along + 2]
    other_low, other_high = boxes[:, 1 - along], boxes[:, 3 - along]
    size = other_high - other_low  # of letters that stand from left to right: their height

    # close: the gap is less than a space between words, they overlap by half of the smaller
    larger = np.maximum(size[:, None], size[None, :])
    smaller = np.minimum(size[:, None], size[None, :])
    gap = np.maximum(low[:, None], low[None, :]) - np.minimum(high[:, None], high[None, :])
    overlap = np.minimum(other_high[:, None], other_high[None, :]) - np.maximum(
        other_low[:, None], other_low[None, :]
    )
    # a minus is thin, so that a letter beside it says how far is near
    close = (gap <= GAP * np.maximum(larger, SMALLEST)) & (overlap >= 0.5 * smaller)
    first, second = np.nonzero(np.triu(close, 1))

    names = list(range(len(parts)))

    def root(i):
        while names[i] != i:
            names[i] = names[names[i]]
            i = names[i]
        return i

    for i, j in zip(first.tolist(), second.tolist(), strict=True):
        names[root(i)] = root(j)
    groups = {}
    for i, part in enumerate(parts):
        groups.setdefault(root(i), []).append(part)
    return list(groups.values())


def _around(group):
    lefts, tops, rights, bottoms = zip(*group, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def _is_inside(part, box):
    return box[0] <= part[0] and box[1] <= part[1] and part[2] <= box[2] and part[3] <= box[3]

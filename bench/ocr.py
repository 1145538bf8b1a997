"""The ocr and crop tools on charts: printed tick labels that are found, and calls per second.

    python bench/ocr.py                                     # some minutes on two cores
    python bench/ocr.py --save_to=evidence/bench/ocr.json

100 charts of four kinds (bars, lying bars, lines, points) drawn by matplotlib with chosen seeds:
words, years, amounts with commas, percents and decimals as labels, from 14 to 22 pixels. A tick
label counts if it is inside of the figure and is not printed over by another one; it is found if a
run of the tool that lies on it has just its text (a minus sign may be a hyphen). Beside it, what
Tesseract finds by itself: page mode 11, and 6 at double size.
"""

import asyncio
import io
import json
import os
import platform
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)

from images import Picture, open_image
from tools import Toolbox
from tools.vision.text import read

LABELS_FOUND = 0.95  # at least, of the printed ones
CROPS = 300  # calls per second at a megapixel, at least
WORDS = """
    Wheat Barley Oats Rye Maize Rice Millet Potatoes Apples Pears Plums Cherries Berlin Paris Madrid
    Rome Vienna Oslo Lisbon Dublin Steel Copper Nickel Zinc Coal Solar Wind Hydro Nuclear January
    March April June August October
""".split()


@dataclass
class Config:
    charts: int = 100
    compare: bool = True  # with Tesseract by itself
    crops: int = 2000  # calls
    concurrency: int = 4  # of them at once
    save_to: str = ""  # a .json for the results


def draw(seed: int) -> tuple[bytes, list[tuple[str, tuple[float, float, float, float]]]]:
    """Draws a chart as PNG, and gives [(text, box in pixels)] of the tick labels printed in it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chance = random.Random(seed)
    size = (chance.uniform(6, 10), chance.uniform(4, 6.5))
    figure, axes = plt.subplots(figsize=size, dpi=100)
    pixels = chance.uniform(14, 22)  # of the labels
    count = chance.randrange(3, 8)
    scale = chance.choice([1, 10, 100, 5_000, 400_000])
    values = [chance.uniform(0.1, 1) * scale for _ in range(count)]
    colour = chance.choice(["tab:blue", "tab:orange", "tab:green", "tab:red", "0.6"])
    names = chance.sample(WORDS, count)
    first_year = chance.randrange(1960, 2015)
    years = [str(first_year + number) for number in range(count)]
    kind = ["bars", "lying", "line", "points"][seed % 4]
    if kind == "bars":
        axes.bar(chance.choice([names, years]), values, color=colour)
    elif kind == "lying":
        axes.barh(names, values, color=colour)
    elif kind == "line":
        axes.plot(range(first_year, first_year + 20), [chance.gauss(0, scale) for _ in range(20)])
    else:
        axes.scatter([chance.gauss(0, 5) for _ in range(30)], [chance.random() for _ in range(30)])
    number_axis = axes.xaxis if kind == "lying" else axes.yaxis
    if kind != "points" and scale >= 5000:
        number_axis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    elif kind != "points" and scale == 100:
        number_axis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:.0f}%"))
    if chance.random() < 0.5:
        axes.grid(alpha=0.4)
    axes.set_title(" ".join(chance.sample(WORDS, 3)), fontsize=18 * 0.72)
    axes.set_xlabel("Year" if kind == "line" else chance.choice(WORDS), fontsize=16 * 0.72)
    axes.set_ylabel(chance.choice(WORDS), fontsize=16 * 0.72)
    axes.tick_params(labelsize=pixels * 0.72)
    figure.tight_layout()
    figure.canvas.draw()

    # the labels, in pixels from the upper left
    height = figure.bbox.height
    labels = []
    for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
        box = label.get_window_extent()
        inside = 0 <= box.x0 and box.x1 <= figure.bbox.width and 0 <= box.y0 and box.y1 <= height
        if label.get_text() and label.get_visible() and inside and _is_shown(label, axes):
            place = (box.x0, height - box.y1, box.x1, height - box.y0)
            labels.append((label.get_text(), place))
    file = io.BytesIO()
    figure.savefig(file, format="png")
    plt.close(figure)
    return file.getvalue(), [each for each in labels if not _is_covered(each, labels)]


def _is_shown(label, axes):
    """Says whether a label is drawn: that of a tick beyond the limits of its axis is not."""
    x, y = label.get_position()
    low_x, high_x = sorted(axes.get_xlim())
    low_y, high_y = sorted(axes.get_ylim())
    if label in axes.get_xticklabels():
        return low_x <= x <= high_x
    return low_y <= y <= high_y


def _is_covered(label, labels):
    """Says whether another label stands in its place too: then nobody can read it."""
    _, (left, top, right, bottom) = label
    for other in labels:
        if other is not label:
            _, (x1, y1, x2, y2) = other
            if x1 < right and left < x2 and y1 < bottom and top < y2:
                return True
    return False


def plain(text: str) -> str:
    return text.replace("\N{MINUS SIGN}", "-").replace("—", "-").replace("–", "-").replace(" ", "")


def is_found(label, runs) -> bool:
    """Says whether a run that lies on the label has its text. runs: [(text, box)]."""
    text, (left, top, right, bottom) = label
    for words, (x1, y1, x2, y2) in runs:
        middle_x = (x1 + x2) / 2
        middle_y = (y1 + y2) / 2
        on_it = left - 4 <= middle_x <= right + 4 and top - 4 <= middle_y <= bottom + 4
        if on_it and plain(words) == plain(text):
            return True
    return False


def by_itself(image, mode: int, scale: int):
    """Reads a whole image with Tesseract alone: [(word, box)]."""
    import pytesseract

    image = image.resize((image.width * scale, image.height * scale))
    table = pytesseract.image_to_data(
        image, config=f"--psm {mode}", output_type=pytesseract.Output.DICT
    )
    runs = []
    for i, text in enumerate(table["text"]):
        if text.strip():
            left, top = table["left"][i], table["top"][i]
            box = (left, top, left + table["width"][i], top + table["height"][i])
            runs.append((text.strip(), [value / scale for value in box]))
    return runs


def labels_found(cfg: Config) -> dict:
    """Measures {way: share of the labels}, and how long a call of the tool takes."""
    found = {"ocr": 0, "mode 11": 0, "mode 6, double": 0}
    count = 0
    seconds = 0.0
    missed = []
    for seed in range(cfg.charts):
        data, labels = draw(seed)
        image = open_image(data)
        start = time.perf_counter()
        runs = [(run.text, run.box) for run in read(image)]
        seconds += time.perf_counter() - start
        count += len(labels)
        for label in labels:
            if is_found(label, runs):
                found["ocr"] += 1
            else:
                missed.append([seed, label[0]])
        if cfg.compare:
            for way, mode, scale in (("mode 11", 11, 1), ("mode 6, double", 6, 2)):
                words = by_itself(image, mode, scale)
                found[way] += sum(is_found(label, words) for label in labels)
    shares = {way: round(number / count, 4) for way, number in found.items()}
    if not cfg.compare:
        shares = {"ocr": shares["ocr"]}
    return {
        "charts": cfg.charts,
        "labels": count,
        "found": shares,
        "seconds_per_chart": round(seconds / cfg.charts, 3),
        "missed": missed,
    }


async def crops_per_second(cfg: Config) -> float:
    """Measures calls of crop a second: random boxes of an image of a megapixel, by a Toolbox."""
    from PIL import Image

    box = Toolbox(["crop"], cfg.concurrency)
    picture = Picture(Image.effect_noise((1000, 1000), 50).convert("RGB"))
    sessions = [box.open({}, [picture]) for _ in range(cfg.concurrency)]
    chance = random.Random(0)

    async def calls(session):
        for _ in range(cfg.crops // cfg.concurrency):
            left, right = sorted(chance.sample(range(1001), 2))
            top, bottom = sorted(chance.sample(range(1001), 2))
            arguments = {"image": 1, "box": [left, top, right, bottom]}
            _, error, _ = await session.call("crop", arguments)
            assert error in (None, "bad_image"), error  # too thin

    start = time.perf_counter()
    await asyncio.gather(*map(calls, sessions))
    return cfg.crops / (time.perf_counter() - start)


def main(cfg: Config) -> None:
    speed = asyncio.run(crops_per_second(cfg))
    print(f"crop: {speed:.0f} calls/s at a megapixel (at least {CROPS})")
    result = labels_found(cfg)
    for way, share in result["found"].items():
        print(f"{way}: {share:.3f} of {result['labels']} tick labels")
    print(f"ocr: {result['seconds_per_chart']:.2f} s a chart (at least {LABELS_FOUND} found)")
    if cfg.save_to:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {os.getloadavg()[0]:.1f} load"
        made = {
            "machine": machine,
            "config": asdict(cfg),
            "crops_per_second": round(speed),
            **result,
        }
        path = Path(cfg.save_to)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    config.main(lambda argv: main(config.parse(Config, argv)))

"""tools/ocr.py and tools/subfigure.py, on charts that matplotlib draws.

pytest tests/test_ocr.py
"""

import asyncio
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from images import Picture, open_image
from run.config import UserError
from tools import Toolbox
from tools.vision import text

ROOT = Path(__file__).parent.parent


def bench():
    spec = importlib.util.spec_from_file_location("bench_ocr", ROOT / "bench/ocr.py")
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


def installed():
    try:
        text.require_tesseract()
    except UserError:
        return False
    return True


def call(box, picture, name, **arguments):
    async def scene():
        session = box.open({}, [picture])
        return await session.call(name, {"image": 1, **arguments})

    return asyncio.run(scene())


@pytest.mark.skipif(not installed(), reason="no Tesseract: apt install tesseract-ocr")
def test_tick_labels_are_read_with_their_places():
    """Four charts of the hundred of bench/ocr.py, one of each kind."""
    module = bench()
    found = count = 0
    for seed in range(4):
        data, labels = module.draw(seed)
        runs = [(run.text, run.box) for run in text.read(open_image(data))]
        found += sum(module.is_found(label, runs) for label in labels)
        count += len(labels)
    assert count > 40 and found / count >= 0.9


@pytest.mark.skipif(not installed(), reason="no Tesseract: apt install tesseract-ocr")
def test_the_tool_says_text_and_box_and_that_there_is_none():
    box = Toolbox(["ocr"], timeout=60.0)
    data, labels = bench().draw(1)
    content, error, _ = call(box, Picture(open_image(data)), "ocr")
    assert error is None and labels[0][0] in content and "[" in content
    blank = Picture(Image.new("RGB", (300, 200), "white"))
    assert call(box, blank, "ocr")[0] == "(no text was found)"


def test_without_tesseract_the_start_says_what_to_install(monkeypatch):
    monkeypatch.setattr(text.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="apt install tesseract-ocr"):
        Toolbox(["ocr"])


def test_connected_parts_are_those_of_a_plain_search():
    """Random masks, against a flood fill."""
    for seed in range(20):
        mask = np.random.default_rng(seed).random((12, 15)) < 0.4
        seen = np.zeros_like(mask)
        expected = []
        for start in zip(*np.nonzero(mask), strict=True):
            if seen[start]:
                continue
            waiting = [start]
            part = []
            seen[start] = True
            while waiting:
                row, column = waiting.pop()
                part.append((row, column))
                for r in range(max(0, row - 1), min(12, row + 2)):
                    for c in range(max(0, column - 1), min(15, column + 2)):
                        if mask[r, c] and not seen[r, c]:
                            seen[r, c] = True
                            waiting.append((r, c))
            rows, columns = zip(*part, strict=True)
            expected.append((min(columns), min(rows), max(columns) + 1, max(rows) + 1, len(part)))
        assert sorted(text.components(mask)) == sorted(expected)


def test_panels_are_split_by_white_and_numbered_line_by_line():
    figure = Image.new("RGB", (400, 300), "white")
    draw = ImageDraw.Draw(figure)
    colours = ["red", "green", "blue", "black"]
    for number, colour in enumerate(colours):
        left, top = 20 + 200 * (number % 2), 20 + 150 * (number // 2)
        draw.rectangle([left, top, left + 159, top + 109], fill=colour)
    box = Toolbox(["subfigure"])
    for number, colour in enumerate(colours, 1):
        (words, image), error, _ = call(box, Picture(figure), "subfigure", panel=number)
        assert error is None and words.startswith(f"panel {number} of 4")
        assert image.size == (160, 110)
        assert image.getpixel((80, 55)) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    content, error, _ = call(box, Picture(figure), "subfigure", panel=5)
    assert error == "no_panel" and "the panels are 1 [50, 67, 450, 433]" in content
    blank = Picture(Image.new("RGB", (30, 20), "white"))
    assert call(box, blank, "subfigure", panel=1)[1] is None

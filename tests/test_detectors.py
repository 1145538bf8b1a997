"""What detect, point and segment say: the right place, at whatever size an image is shown.

    pytest tests/test_detectors.py

The models are stand-ins that find what is green in the very pixels that they are given, so that
resizing, padding and both conventions of coordinates are in the way from image to answer.
"""

import importlib.util
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageDraw
from tiny_eyes import save_bert_tokenizer

from images import Picture
from run.config import UserError
from run.loop import run_blocking
from tools import Toolbox
from tools.vision import models as seers
from tools.vision.models import Detector, Segmenter

SIZE = (240, 160)
GREEN = (60, 40, 108, 100)  # left, top, right, bottom
SMALLER = (200, 20, 230, 40)  # of which the stand-in is less sure
SHOWN = {"as it is": SIZE, "resized": (112, 84)}  # what the model sees of it, not in proportion


def picture(shown):
    image = Image.new("RGB", SIZE, "white")
    ImageDraw.Draw(image).rectangle((60, 40, 107, 99), fill=(0, 255, 0))
    ImageDraw.Draw(image).rectangle((200, 20, 229, 39), fill=(0, 255, 0))
    return Picture(image, image.resize(SHOWN[shown]))


def green(pixels):
    """(height, width): where normalised pixels (1, 3, height, width) are green."""
    red, one, blue = pixels[0]
    return (one > red + 1) & (one > blue + 1)


def bounds(where):
    """(left, top, right, bottom), as shares of width and height."""
    height, width = where.shape
    rows = torch.nonzero(where.any(dim=1)).flatten()
    columns = torch.nonzero(where.any(dim=0)).flatten()
    left, right = columns[0] / width, (columns[-1] + 1) / width
    return left, rows[0] / height, right, (rows[-1] + 1) / height


class StandIn:
    """A detector of either architecture: the larger green thing, then the one on the right."""

    device = "cpu"

    def __init__(self, model_type):
        self.config = SimpleNamespace(model_type=model_type)

    def __call__(self, input_ids, pixel_values, **_):
        where = green(pixel_values)
        middle = torch.zeros_like(where)
        # half of the picture, of which OWL's is padded to a square
        middle[:, : round(where.shape[1] * 0.6)] = True
        boxes = []
        for half in (middle, ~middle):
            left, top, right, bottom = bounds(where & half)
            boxes.append([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
        # the second is the surer one: the order has to be that of the scores
        scores = torch.tensor([0.6, 0.9]).logit()
        if self.config.model_type == "owlv2":
            logits = torch.full((1, 2, len(input_ids)), -9.0)
            logits[0, :, 0] = scores
        else:
            label = (input_ids[0] == input_ids[0, 1]).nonzero()[0]  # the word behind [CLS]
            logits = torch.full((1, 2, 256), -9.0)
            logits[0, :, label[0]] = scores
        return SimpleNamespace(logits=logits, pred_boxes=torch.tensor([boxes]))


class SegmentingStandIn:
    """A SAM 2 that finds the green thing at its point, or what is green in its box."""

    device = "cpu"
    config = SimpleNamespace(
        vision_config=SimpleNamespace(backbone_config=SimpleNamespace(image_size=[256, 256]))
    )

    def __call__(self, pixel_values, multimask_output, input_points=None, input_boxes=None, **_):
        where = green(pixel_values)
        inside = torch.zeros_like(where)
        if input_boxes is not None:
            left, top, right, bottom = input_boxes[0, 0].round().int().tolist()
            inside[top:bottom, left:right] = True
        else:
            x, y = input_points[0, 0, 0].round().int().tolist()
            around = slice(0, 160) if x < 160 else slice(160, 256)  # with one thing in each
            inside[:, around] = bool(where[y, x])
        surest = torch.where(where & inside, 8.0, -8.0)
        masks = torch.stack([torch.full_like(surest, 8.0), surest, torch.full_like(surest, -8.0)])
        masks = torch.nn.functional.interpolate(masks[None], (128, 128), mode="area")
        return SimpleNamespace(iou_scores=torch.tensor([[[0.2, 0.8, 0.3]]]), pred_masks=masks[None])


@pytest.fixture(params=["grounding-dino", "owlv2"])
def detector(request, tmp_path, monkeypatch):
    if request.param == "owlv2":
        pytest.importorskip("scipy", reason='OWLv2 needs scipy: pip install -e ".[see]"')
        processor = transformers.Owlv2ImageProcessorPil(size={"height": 240, "width": 240})
        tokenizer = clip_tokenizer(tmp_path)
    else:
        size = {"shortest_edge": 200, "longest_edge": 400}
        processor = transformers.GroundingDinoImageProcessorPil(size=size)
        tokenizer = save_bert_tokenizer(tmp_path, transformers.BertTokenizer)
    made = Detector(StandIn(request.param), tokenizer, processor)
    monkeypatch.setattr("tools.detect.load_detector", lambda name, device: made)


def clip_tokenizer(folder):
    """The letter x is a word."""
    words = ["<|startoftext|>", "<|endoftext|>", "x", "x</w>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer.from_pretrained(folder)


@pytest.fixture
def segmenter(monkeypatch):
    made = Segmenter(SegmentingStandIn())
    monkeypatch.setattr("tools.segment.load_segmenter", lambda name, device: made)


def call(tool, coordinates, shown, **arguments):
    """What a tool says of the picture."""
    box = Toolbox([tool], options=(f"{tool}.coordinates={coordinates}",))
    content, error, _ = run_blocking(box.open({}, [picture(shown)]).call(tool, arguments))
    assert error is None, content
    return content


def in_units(values, coordinates, shown):
    """Pixels of the original, x and y in turn, as a model is told them."""
    width, height = (1000, 1000) if coordinates == "relative" else SHOWN[shown]
    scales = (width / SIZE[0], height / SIZE[1])
    return [value * scales[place % 2] for place, value in enumerate(values)]


def numbers(text):
    """Those in the first brackets of a text."""
    return json.loads(text[text.index("[") : text.index("]") + 1])


def assert_near(told, wanted, coordinates):
    """To a pixel and a half of the original: it was resized on its way."""
    slack = 1.5 * (1000 / SIZE[1] if coordinates == "relative" else 1)
    assert np.abs(np.array(told) - np.array(wanted)).max() <= slack, (told, wanted)


everywhere = pytest.mark.parametrize("coordinates", ["relative", "pixels"])
at_any_size = pytest.mark.parametrize("shown", SHOWN)


@everywhere
@at_any_size
def test_boxes_are_where_the_things_are_and_the_surest_is_first(coordinates, shown, detector):
    lines = call("detect", coordinates, shown, image=1, labels=["x"]).splitlines()
    assert [line.split()[:2] for line in lines] == [["x", "0.90"], ["x", "0.60"]]
    for line, thing in zip(lines, (SMALLER, GREEN), strict=True):
        assert_near(numbers(line), in_units(thing, coordinates, shown), coordinates)


@everywhere
@at_any_size
def test_points_are_the_middles_of_the_things(coordinates, shown, detector):
    lines = call("point", coordinates, shown, image=1, label="x").splitlines()
    for line, middle in zip(lines, ((215, 30), (84, 70)), strict=True):
        assert_near(numbers(line), in_units(middle, coordinates, shown), coordinates)


def test_what_is_not_sure_enough_and_more_than_asked_for_stays_out(detector):
    for options, count in ((("detect.threshold=0.7",), 1), (("detect.most=1",), 1), ((), 2)):
        box = Toolbox(["detect"], options=options)
        asked = box.open({}, [picture("as it is")]).call("detect", {"image": 1, "labels": ["x"]})
        assert len(run_blocking(asked)[0].splitlines()) == count


@everywhere
@at_any_size
@pytest.mark.parametrize("by", ["point", "box"])
def test_an_outline_is_that_of_the_thing_and_is_shaded(coordinates, shown, by, segmenter):
    """The surest mask, in a picture of the size of the original."""
    place = (84, 70) if by == "point" else (50, 30, 120, 110)
    where = [round(value) for value in in_units(place, coordinates, shown)]
    words, image = call("segment", coordinates, shown, image=1, **{by: where})
    assert_near(numbers(words), in_units(GREEN, coordinates, shown), coordinates)
    share = float(re.search(r"([\d.]+) % of the image", words)[1])
    assert abs(share - 100 * 48 * 60 / (240 * 160)) < 0.5 and words.endswith("0.80 sure")
    assert image.size == SIZE
    original = np.asarray(picture(shown).original).astype(int)
    changed = (np.asarray(image).astype(int) != original).any(axis=2)
    left, top, right, bottom = GREEN
    assert changed[top + 2 : bottom - 2, left + 2 : right - 2].all()
    changed[top - 2 : bottom + 2, left - 2 : right + 2] = False
    assert not changed.any()
    assert image.getpixel((84, 70)) == (128, 127, 0)


def test_owl_without_scipy_is_refused_at_the_start(monkeypatch):
    """Else each call would fail."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="model 'owl' needs scipy: pip install"):
        seers._image_processor("owlv2", "owl")


def test_where_there_is_nothing_the_segmenter_says_so(segmenter):
    said = call("segment", "relative", "resized", image=1, point=[20, 900])
    assert said == "(nothing was found there)"

"""What the tools that look at images share: images by number, coordinates, what is wrong with them.

    class crop(ImageTool):
        def __call__(self, image: int, box: list[float]): ...

An image is named by its number, from 1: its place among the images of the trajectory, those of the
prompt first. Coordinates are what the model's family was trained on, the option `coordinates` of
each of these tools; the docstrings say "{units}" where the schema has to say which:

    relative    0 to 1000 from left to right and from top to bottom (Qwen2-VL, Qwen3-VL)
    pixels      of the image as the model sees it, resized by its processor (Qwen2.5-VL)

What they compute is always in pixels of the original, the largest there is of an image. Whatever
is wrong with a call is a ToolError of a kind of its own: no_image, bad_box, bad_point, bad_image.
"""

import math
from typing import Literal

from images import MAX_PIXELS, MAX_RATIO, Picture
from run.config import UserError
from tools import ToolError

UNITS = {
    "relative": "0 to 1000 from left to right (x) and from top to bottom (y)",
    "pixels": "in pixels of the image as you see it, from its upper left corner",
}
WIDEST = 1000  # the largest relative coordinate
SHOWN = 80  # characters of a wrong value in a message
# A model that sees a square of 1000 writes 1000; one that was taught pixels may be half of one off.
SLACK = 0.5


class ImageTool:
    """A tool that takes images of the trajectory by their number."""

    sees = True  # its `image` is a number; served to another program, it is the image itself

    def __init__(self, example, coordinates: Literal["relative", "pixels"] = "relative"):
        """example: the row, whose "images" are the trajectory's Pictures, a list that grows."""
        images = example.get("images") or []
        # of a row in a notebook, or of a run that shows no images, they are no Pictures
        self.images = images if all(isinstance(item, Picture) for item in images) else []
        self.coordinates = coordinates

    @staticmethod
    def describe(schema: dict, options: dict) -> dict:
        """Gives the schema, with the convention that the option `coordinates` names."""
        units = UNITS[options.get("coordinates", "relative")]
        return _filled(schema, units)

    def picture(self, number: int) -> Picture:
        """Finds the image of that number, from 1. ToolError if there is none."""
        count = len(self.images)
        if not count:
            raise ToolError("no_image", "error: there is no image in this conversation")
        if not 1 <= number <= count:
            there = "the only image is 1" if count == 1 else f"the images are 1 to {count}"
            text = f"error: there is no image {str(number)[:SHOWN]}; {there}"
            raise ToolError("no_image", text)
        return self.images[number - 1]

    def region(self, picture: Picture, box: list[float]) -> tuple[int, int, int, int]:
        """Turns a box into whole pixels (left, top, right, bottom) of the original: every pixel
        that it touches. Raises ToolError for one that is none, is empty, or reaches outside."""
        x1, y1, x2, y2 = self._numbers(box, 4, "bad_box", "a box [x1, y1, x2, y2]")
        width, height = self.size(picture)
        if not (x1 < x2 and y1 < y2):
            self._refuse("bad_box", box, "is empty: expected x1 < x2 and y1 < y2")
        if min(x1, y1) < -SLACK or x2 > width + SLACK or y2 > height + SLACK:
            self._refuse("bad_box", box, f"reaches outside of the image: {self._limits(picture)}")
        across = picture.original.width / width
        down = picture.original.height / height
        left = min(max(0, math.floor(x1 * across + 1e-6)), picture.original.width - 1)
        top = min(max(0, math.floor(y1 * down + 1e-6)), picture.original.height - 1)
        right = max(left + 1, min(picture.original.width, math.ceil(x2 * across - 1e-6)))
        bottom = max(top + 1, min(picture.original.height, math.ceil(y2 * down - 1e-6)))
        return left, top, right, bottom

    def place(self, picture: Picture, point: list[float]) -> tuple[float, float]:
        """Turns a point [x, y] into pixels of the original. ToolError if it is none or outside."""
        x, y = self._numbers(point, 2, "bad_point", "a point [x, y]")
        width, height = self.size(picture)
        if not (-SLACK <= x <= width + SLACK and -SLACK <= y <= height + SLACK):
            self._refuse("bad_point", point, f"is outside of the image: {self._limits(picture)}")
        across = (picture.original.width - 1) / width
        down = (picture.original.height - 1) / height
        return min(max(0.0, x), width) * across, min(max(0.0, y), height) * down

    def size(self, picture: Picture) -> tuple[float, float]:
        """Gives width and height of a picture in the model's coordinates."""
        if self.coordinates == "relative":
            return WIDEST, WIDEST
        return picture.shown.size

    def told(self, picture: Picture, pixels) -> list[int]:
        """Turns pixels of the original, x and y in turn, into the model's coordinates."""
        width, height = self.size(picture)
        scales = (width / picture.original.width, height / picture.original.height)
        coordinates = []
        for position, value in enumerate(pixels):
            coordinates.append(round(value * scales[position % 2]))
        return coordinates

    def _limits(self, picture):
        width, height = self.size(picture)
        return f"x goes from 0 to {width:g}, y from 0 to {height:g}"

    def _numbers(self, values, count, kind, what):
        """Reads the values as finite floats. ToolError for others, and for another count."""
        if len(values) != count:
            self._refuse(kind, values, f"is not {what}")
        numbers = []
        for value in values:
            try:
                number = float(value)
            except OverflowError:  # a whole number of 400 digits
                number = math.inf
            if not math.isfinite(number):
                self._refuse(kind, values, f"is not {what} of finite numbers")
            numbers.append(number)
        return numbers

    def _refuse(self, kind, value, why):
        raise ToolError(kind, f"error: {str(value)[:SHOWN]} {why}")


def require_size(width: float, height: float, what: str) -> None:
    """Raises ToolError for the size of a result that no image may have."""
    if width * height > MAX_PIXELS:
        text = f"error: {what} would have more than {MAX_PIXELS:,} pixels: choose a smaller one"
        raise ToolError("bad_image", text)
    if max(width, height) > MAX_RATIO * max(1, min(width, height)):
        text = f"error: {what} would be {width:.0f} x {height:.0f} pixels, too thin to be seen"
        raise ToolError("bad_image", f"{text}: choose one that is less long, or wider")


def as_observation(error: UserError) -> ToolError:
    """Words the error of an image that cannot be opened as the model is told of it."""
    return ToolError("bad_image", f"error: {error}")


def _filled(value, units):
    """Fills the units into the texts of a schema."""
    if isinstance(value, str):
        return value.replace("{units}", units)
    if isinstance(value, list):
        return [_filled(item, units) for item in value]
    if isinstance(value, dict):
        return {key: _filled(item, units) for key, item in value.items()}
    return value

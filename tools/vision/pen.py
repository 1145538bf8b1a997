"""Draws on a copy of an image: lines that are seen at any size."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

RED = (255, 0, 0)
WIDTH = 0.004  # of a line, as a share of the longer side
RADIUS = 0.01  # of a point


class Pen:
    """A copy of the image, and what draws on it."""

    def __init__(self, image: "Image"):
        from PIL import ImageDraw

        longer = max(image.size)
        self.image = image.copy()
        self.width = max(2, round(longer * WIDTH))
        self.radius = max(3, round(longer * RADIUS))
        self._draw = ImageDraw.Draw(self.image)

    def line(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self._draw.line([start, end], fill=RED, width=self.width)

    def box(self, region: tuple[int, int, int, int]) -> None:
        """Draws the outline of what is inside of region (left, top, right, bottom)."""
        left, top, right, bottom = region
        self._draw.rectangle([left, top, right - 1, bottom - 1], outline=RED, width=self.width)

    def point(self, place: tuple[float, float]) -> None:
        """Draws a disc with a white rim, so that it is seen on red too."""
        rim = self.radius + self.width
        self._disc(place, rim, "white")
        self._disc(place, self.radius, RED)

    def _disc(self, place, radius, colour):
        x, y = place
        self._draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)

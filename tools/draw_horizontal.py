"""The draw_horizontal tool: an image with a red line across, to compare heights."""

from tools.vision.base import ImageTool
from tools.vision.pen import Pen


class draw_horizontal(ImageTool):
    def __call__(self, image: int, y: float):
        """Draw a red horizontal line over the whole width of an image, to compare heights.

        Args:
            image: The number of the image, from 1.
            y: How far below the upper edge. Coordinates are {units}.
        """
        picture = self.picture(image)
        _, level = self.place(picture, [0, y])
        pen = Pen(picture.original)
        pen.line((0, level), (picture.original.width, level))
        return pen.image

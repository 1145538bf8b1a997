"""The draw_vertical tool: an image with a red line from top to bottom, to compare positions."""

from tools.vision.base import ImageTool
from tools.vision.pen import Pen


class draw_vertical(ImageTool):
    def __call__(self, image: int, x: float):
        """Draw a red vertical line over the whole height of an image, to compare positions.

        Args:
            image: The number of the image, from 1.
            x: How far from the left edge. Coordinates are {units}.
        """
        picture = self.picture(image)
        position, _ = self.place(picture, [x, 0])
        pen = Pen(picture.original)
        pen.line((position, 0), (position, picture.original.height))
        return pen.image

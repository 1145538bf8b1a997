"""The draw_box tool: an image with a red box around a part of it."""

from tools.vision.base import ImageTool
from tools.vision.pen import Pen


class draw_box(ImageTool):
    def __call__(self, image: int, box: list[float]):
        """Draw a red box around a part of an image.

        Args:
            image: The number of the image, from 1.
            box: The part, [x1, y1, x2, y2], {units}.
        """
        picture = self.picture(image)
        region = self.region(picture, box)
        pen = Pen(picture.original)
        pen.box(region)
        return pen.image

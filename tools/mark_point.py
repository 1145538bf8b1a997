"""The mark_point tool: an image with a red dot."""

from tools.vision.base import ImageTool
from tools.vision.pen import Pen


class mark_point(ImageTool):
    def __call__(self, image: int, point: list[float]):
        """Mark a point of an image with a red dot.

        Args:
            image: The number of the image, from 1.
            point: Where, [x, y], {units}.
        """
        picture = self.picture(image)
        place = self.place(picture, point)
        pen = Pen(picture.original)
        pen.point(place)
        return pen.image

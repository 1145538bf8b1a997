"""The draw_line tool: an image with a red line between two points."""

from tools.vision.base import ImageTool
from tools.vision.pen import Pen


class draw_line(ImageTool):
    def __call__(self, image: int, start: list[float], end: list[float]):
        """Draw a red line on an image.

        Args:
            image: The number of the image, from 1.
            start: Where it starts, [x, y], {units}.
            end: Where it ends, [x, y].
        """
        picture = self.picture(image)
        from_place = self.place(picture, start)
        to_place = self.place(picture, end)
        pen = Pen(picture.original)
        pen.line(from_place, to_place)
        return pen.image

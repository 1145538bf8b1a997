"""The crop tool: a part of an image, cut from the original and so as sharp as it gets.

--tools=crop --tool_options=crop.coordinates=pixels  # vision/base.py says what that is
"""

from tools.vision.base import ImageTool, require_size


class crop(ImageTool):
    def __call__(self, image: int, box: list[float]):
        """Cut a part out of an image, at its full resolution.

        Args:
            image: The number of the image, from 1.
            box: The part, [x1, y1, x2, y2], {units}.
        """
        picture = self.picture(image)
        left, top, right, bottom = self.region(picture, box)
        require_size(right - left, bottom - top, "that part")
        return picture.original.crop((left, top, right, bottom))

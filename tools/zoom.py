"""The zoom tool: a part of an image, cut from the original and enlarged.

--tools=zoom --tool_options=zoom.side=768
"""

from typing import Literal

from run.config import UserError
from tools.vision.base import ImageTool, require_size

LARGEST = 4096  # pixels of a side


class zoom(ImageTool):
    def __init__(
        self,
        example,
        coordinates: Literal["relative", "pixels"] = "relative",
        side: int = 1024,
    ):
        """side: pixels that the longer side of what is shown has at least; what has more stays."""
        super().__init__(example, coordinates)
        if not 1 <= side <= LARGEST:
            raise UserError(f"zoom.side = {side}: expected 1 to {LARGEST} pixels")
        self.side = side

    def __call__(self, image: int, box: list[float]):
        """Enlarge a part of an image, to see what is too small in it.

        Args:
            image: The number of the image, from 1.
            box: The part, [x1, y1, x2, y2], {units}.
        """
        from PIL import Image

        picture = self.picture(image)
        left, top, right, bottom = self.region(picture, box)
        width = right - left
        height = bottom - top
        require_size(width, height, "that part")
        part = picture.original.crop((left, top, right, bottom))
        factor = self.side / max(width, height)
        if factor <= 1:
            return part
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        return part.resize(size, Image.Resampling.LANCZOS)

"""The rotate tool: an image turned, whole, with white where there was nothing."""

import math

from tools import ToolError
from tools.vision.base import ImageTool, require_size


class rotate(ImageTool):
    def __call__(self, image: int, degrees: float):
        """Turn an image clockwise.

        Args:
            image: The number of the image, from 1.
            degrees: How far, clockwise: 90 turns the upper side to the right.
        """
        from PIL import Image

        picture = self.picture(image)
        try:
            turn = float(degrees) % 360
        except OverflowError:
            turn = math.nan
        if not math.isfinite(turn):
            raise ToolError("bad_angle", "error: degrees must be a finite number, such as 90")
        original = picture.original
        quarters = {
            90: Image.Transpose.ROTATE_270,  # PIL turns the other way
            180: Image.Transpose.ROTATE_180,
            270: Image.Transpose.ROTATE_90,
        }
        if turn in quarters:  # pixel by pixel
            return original.transpose(quarters[turn])
        sine = abs(math.sin(math.radians(turn)))
        cosine = abs(math.cos(math.radians(turn)))
        width = original.width * cosine + original.height * sine
        height = original.width * sine + original.height * cosine
        require_size(width, height, "the turned image")
        return original.rotate(
            -turn, Image.Resampling.BICUBIC, expand=True, fillcolor=(255, 255, 255)
        )

"""The segment tool: the outline of what is at a point or in a box, by SAM 2.

{"segment": {"tools": ["segment"], "gpus": [0]}}     # services.json, for serve/tools.py
--tools=segment --tool_options=segment.device=cpu    # or in the run itself
"""

from typing import Literal

from tools import ToolError
from tools.vision.base import ImageTool
from tools.vision.models import load_segmenter

MODEL = "facebook/sam2.1-hiera-tiny"
SHADE = 0.5  # of red over what was found


class segment(ImageTool):
    def __init__(
        self,
        example,
        coordinates: Literal["relative", "pixels"] = "relative",
        model: str = MODEL,
        device: str = "auto",
    ):
        super().__init__(example, coordinates)
        self.segmenter = load_segmenter(model, device)

    @staticmethod
    def prepare(coordinates: str = "relative", model: str = MODEL, device: str = "auto") -> None:
        """Loads the model: not in the time of the first call."""
        load_segmenter(model, device)

    def __call__(
        self, image: int, point: list[float] | None = None, box: list[float] | None = None
    ):
        """Find the outline of the thing at a point, or in a box. It is shown shaded in red.

        Args:
            image: The number of the image, from 1.
            point: A point on the thing, [x, y], {units}.
            box: Or a box around it, [x1, y1, x2, y2].
        """
        import numpy as np
        from PIL import Image

        picture = self.picture(image)
        if (point is None) == (box is None):
            raise ToolError("bad_point", "error: expected one of point and box")
        place = None if point is None else self.place(picture, point)
        region = None if box is None else self.region(picture, box)
        mask, score = self.segmenter(picture.original, place, region)
        if not mask.any():
            return "(nothing was found there)"
        rows = np.flatnonzero(mask.any(axis=1))
        columns = np.flatnonzero(mask.any(axis=0))
        around = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        share = 100 * mask.mean()
        words = f"box {self.told(picture, map(int, around))}, {share:.1f} % of the image"
        shade = Image.fromarray((mask * round(255 * SHADE)).astype(np.uint8))
        shown = picture.original.copy()
        shown.paste((255, 0, 0), (0, 0, *shown.size), shade)
        return [f"{words}, {score:.2f} sure", shown]

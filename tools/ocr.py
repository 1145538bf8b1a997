"""The ocr tool: the text in an image, with the place of each piece.

    --tools=ocr --tool_options=ocr.engine=rapidocr

tesseract (the default) needs the program and pytesseract; vision/text.py says how it is helped on
charts. rapidocr needs `pip install rapidocr_onnxruntime`: better on photographs.
"""

import functools
from typing import Literal

from run.config import UserError
from tools.vision import text
from tools.vision.base import ImageTool

NOTHING = "(no text was found)"
LEAST_SURE = 0.5  # of what rapidocr reads, from 0 to 1


class ocr(ImageTool):
    def __init__(
        self,
        example,
        coordinates: Literal["relative", "pixels"] = "relative",
        engine: Literal["tesseract", "rapidocr"] = "tesseract",
    ):
        super().__init__(example, coordinates)
        self.engine = engine

    @staticmethod
    def prepare(coordinates: str = "relative", engine: str = "tesseract") -> None:
        """Raises UserError where the engine is not installed."""
        if engine == "rapidocr":
            load_rapidocr()
        else:
            text.require_tesseract()

    def __call__(self, image: int) -> str:
        """Read the text in an image. Each line of the answer is a piece of it and where it stands.

        Args:
            image: The number of the image, from 1. Boxes in the answer: [x1, y1, x2, y2], {units}.
        """
        picture = self.picture(image)
        if self.engine == "rapidocr":
            runs = read_by_rapidocr(picture.original)
        else:
            runs = text.read(picture.original)
        lines = [f"{run.text} {self.told(picture, run.box)}" for run in runs]
        return "\n".join(lines) or NOTHING


@functools.cache
def load_rapidocr():
    """Loads the engine, with the models that come with its package. Raises UserError without it."""
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError:
        remedy = "pip install rapidocr_onnxruntime, or drop the option"
        raise UserError(f"ocr.engine = 'rapidocr' is not installed: {remedy}") from None
    return RapidOCR()


def read_by_rapidocr(image) -> list[text.Run]:
    """Reads the runs of text in an RGB image, from top to bottom."""
    import numpy as np

    pixels = np.asarray(image)[:, :, ::-1]  # it takes BGR
    result, _ = load_rapidocr()(pixels)
    runs = []
    for corners, words, sure in result or []:
        if float(sure) < LEAST_SURE:
            continue
        across = [x for x, _ in corners]
        down = [y for _, y in corners]
        runs.append(text.Run(words, (min(across), min(down), max(across), max(down))))
    return sorted(runs, key=lambda run: (run.box[1], run.box[0]))

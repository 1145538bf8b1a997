"""The detect tool: where things are that a text names, by Grounding DINO or OWLv2.

    {"detect": {"tools": ["detect"], "gpus": [0]}}       # services.json, for serve/tools.py
    --tools=detect --tool_options=detect.device=cpu      # or in the run itself

vision/models.py says what is loaded.
"""

from typing import Literal

from run.config import UserError
from tools import ToolError
from tools.vision.base import ImageTool
from tools.vision.models import load_detector

MODEL = "IDEA-Research/grounding-dino-tiny"
MOST_LABELS = 20
LONGEST_LABEL = 60  # characters


class Detecting(ImageTool):
    """What detect and point share: a detector, and its options."""

    def __init__(
        self,
        example,
        coordinates: Literal["relative", "pixels"] = "relative",
        model: str = MODEL,
        device: str = "auto",
        threshold: float = 0.25,
        most: int = 20,
    ):
        """threshold: how sure it has to be, from 0 to 1. most: how many are told."""
        super().__init__(example, coordinates)
        self.detector = load_detector(model, device)
        self.threshold = threshold
        self.most = most

    @staticmethod
    def prepare(
        coordinates: str = "relative",
        model: str = MODEL,
        device: str = "auto",
        threshold: float = 0.25,
        most: int = 20,
    ) -> None:
        """Loads the model: not in the time of the first call."""
        if not 0 <= threshold <= 1 or most < 1:
            raise UserError(f"threshold = {threshold}, most = {most}: expected 0 to 1, and above 0")
        load_detector(model, device)

    def found(self, picture, labels):
        """Finds things in a picture, the surest first. ToolError for labels that are none."""
        cleaned = [label.strip().lower() for label in labels]
        if not 1 <= len(cleaned) <= MOST_LABELS or not all(cleaned):
            text = f"error: expected 1 to {MOST_LABELS} things to look for, each with a name"
            raise ToolError("bad_label", text)
        if max(map(len, cleaned)) > LONGEST_LABEL:
            text = f"error: a name of more than {LONGEST_LABEL} characters: write a word or two"
            raise ToolError("bad_label", text)
        return self.detector(picture.original, cleaned, self.threshold)[: self.most]


class detect(Detecting):
    def __call__(self, image: int, labels: list[str]) -> str:
        """Find things in an image: how sure, and where, each in a box [x1, y1, x2, y2].

        Args:
            image: The number of the image, from 1. Boxes in the answer are {units}.
            labels: What to look for, a word or two each, such as ["a red car", "wheel"].
        """
        picture = self.picture(image)
        lines = []
        for each in self.found(picture, labels):
            lines.append(f"{each.label} {each.score:.2f} {self.told(picture, each.box)}")
        return "\n".join(lines) or "(nothing of that was found)"

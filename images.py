"""Images: opened safely, whoever they come from, and as a trajectory holds them.

picture = Picture(open_image("charts/7.png", folder="data"))
"""

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from run.config import UserError

if TYPE_CHECKING:  # else imported where it is needed: a run of text does without
    from PIL.Image import Image


@dataclass
class Picture:
    """One image of a trajectory. Nobody changes one: the samples of a group share it."""

    original: "Image"  # RGB, upright: zoom and crop cut from this
    shown: "Image | None" = None  # what the model sees: resized once, to its processor's size

    # what learning/vision.py makes of it for one model
    pixels: dict = field(default_factory=dict)  # the inputs of the tower, by name: tensors
    ids: list[int] = field(default_factory=list)  # what stands for it in a trajectory
    placeholder: int = -1  # the id, among these, that the tower's embeddings take the place of
    tokens: int = 0  # how many placeholders
    patches: int = 0  # how many go through the tower for it
    grid: tuple[int, int] | None = None  # rows and columns of placeholders, if positions have them
    key: int = 0  # a hash of the pixels: of equal pictures it is equal

    def __post_init__(self):
        if self.shown is None:  # until a model's vision has prepared it
            self.shown = self.original


def open_image(source, folder: str | Path | None = None, allow_urls: bool = False) -> "Image":
    """Opens an image as RGB: a path inside of `folder`, a data URI, bytes, or PIL. Raises UserError
    for everything that cannot be opened."""
    from PIL import Image, ImageOps

    if isinstance(source, str) and source.startswith("data:"):
        source = base64.b64decode(source.partition(",")[2])
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    elif isinstance(source, str | Path):
        if folder is None:
            raise UserError(f"the image {source!r} is a path, and no folder of images is given")
        path = Path(folder, source).resolve()
        if not path.is_relative_to(Path(folder).resolve()):
            raise UserError(f"the image {source!r} is outside of the folder {str(folder)!r}")
        source = path
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"the image {str(source)[:80]!r} is broken: {error}") from None

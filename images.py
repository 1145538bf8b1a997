"""Images of a conversation: opened from wherever they are, and what the model sees of each.

    picture = Picture(open_image("chart.png", folder="data"))

An image that a model saw is a Picture: the original, from which tools cut, and what was shown.
"""

from dataclasses import dataclass, field

from run.config import UserError


@dataclass
class Picture:
    """One image of a trajectory. Nobody changes one: the samples of a group share it."""

    original: object  # PIL.Image, RGB, EXIF applied: zoom and crop cut from this
    shown: object = None  # PIL.Image: what the model sees, resized once (learning/vision.py)
    pixels: dict = field(default_factory=dict)  # the model's inputs: {name: tensor}
    ids: list[int] = field(default_factory=list)  # what stands for it in a trajectory's ids
    placeholder: int = -1  # the one of these whose embeddings the tower gives
    grid: tuple[int, int] | None = None  # rows and columns of placeholders, where positions have
    key: int = 0  # a hash of the pixels: equal pictures, equal keys

    def __post_init__(self) -> None:
        self.shown = self.shown or self.original

    @property
    def tokens(self) -> int:
        """How many placeholders stand for it."""
        return self.ids.count(self.placeholder)


def open_image(source, folder=None, allow_urls: bool = False):
    """Opens an image as RGB, the way its EXIF says it is held. source: a path inside of `folder`, a
    data URI, bytes, or a PIL image. UserError if it is none."""
    import base64
    import io
    from pathlib import Path

    from PIL import Image, ImageOps

    if isinstance(source, str) and source.startswith("data:"):
        source = base64.b64decode(source.partition(",")[2])
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    elif isinstance(source, str):
        path = Path(folder or ".", source)
        if folder and not path.resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(f"image {source!r} is not in {str(folder)!r}: move it there")
        source = path
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"cannot open the image {str(source)[:80]!r}: {error}") from None

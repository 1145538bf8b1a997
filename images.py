"""Images: opened safely, whoever they come from, and as a trajectory holds them.

    image = open_image("charts/7.png", folder="data")   # or data:image/png;base64,…, bytes, PIL
    image = open_image("https://example.org/7.png", allow_urls=True)
    picture = Picture(image)

Whatever comes out is RGB, upright (EXIF), opaque (on white) and no larger than MAX_PIXELS; of an
animation it is the first frame. Whatever does not is a UserError of one sentence.

What is covered: decompression bombs, of which the header is read and nothing else; truncated and
broken files; paths that leave their folder, by `..` or a link; what is no file, such as a pipe;
URLs that lead to this machine or its network, by name or by being redirected; formats that run
programs or have no size (SVG, EPS, PDF). What is not: that a path changes between the look and the
reading; a proxy: URLs are fetched without one.
"""

import base64
import binascii
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from run.config import UserError
from run.http import HttpError, fetch_public

if TYPE_CHECKING:  # else imported where it is needed: a run of text does without
    from PIL.Image import Image

MAX_PIXELS = 2**25  # 33 million, 8K: as RGB 100 MB, and while it is opened three times that
MAX_RATIO = 100  # of the sides: processors refuse 200, and a resized image may be thinner
MAX_BYTES = 32 * 2**20  # of a file
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")  # those that need no other program
SHOWN = 80  # characters of a source in a message


@dataclass
class Picture:
    """One image of a trajectory. Tools do not change one: the samples of a group share it."""

    original: "Image"  # RGB, upright: zoom and crop cut from this
    shown: "Image | None" = None  # what the model sees: resized once, to its processor's size

    # what learning/vision.py makes of it for one model
    pixels: dict = field(default_factory=dict)  # the inputs of the tower, by name: tensors
    seen: object = None  # what a tower that does not learn made of them, which then can go
    ids: list[int] = field(default_factory=list)  # what stands for it in a trajectory
    placeholder: int = -1  # the id, among these, that the tower's embeddings take the place of
    tokens: int = 0  # how many placeholders
    patches: int = 0  # how many go through the tower for it
    grid: tuple[int, int] | None = None  # rows and columns of placeholders, if positions have them
    key: int = 0  # a hash of the pixels: of equal pictures it is equal
    again: "Callable | None" = None  # makes the pixels once more, of what is shown

    def __getstate__(self) -> dict:
        """Leaves out what another process makes anew, sooner than it would come: from `shown`."""
        return vars(self) | {"pixels": {}, "seen": None, "again": None}

    def saved(self) -> tuple[int, bytes]:
        """Returns (key, bytes of a PNG) of what was shown, as plain values."""
        file = io.BytesIO()
        self.shown.save(file, "PNG")
        return self.key, file.getvalue()

    @classmethod
    def of_saved(cls, key: int, png: bytes) -> "Picture":
        """Makes one of what `saved` made of it, to be prepared for the model."""
        return cls(open_image(png), key=key)

    def __post_init__(self):
        if self.shown is None:  # until a model's vision has prepared it
            self.shown = self.original


def open_image(
    source: "str | Path | bytes | Image",
    folder: str | Path | None = None,
    allow_urls: bool = False,
) -> "Image":
    """Opens an image: a path inside of `folder`, a data URI, a URL, the bytes of a file, or PIL.

    folder: None lets no path in. allow_urls: the internet, never this machine's network.
    Raises UserError for everything that cannot be opened.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return _finished(source, "the image")
    name = shown(source)
    return _finished(_decoded(_bytes_of(source, folder, allow_urls), name), name)


def open_frames(
    source: str | Path | bytes, folder: str | Path | None = None, allow_urls: bool = False
) -> "Iterator[Image]":
    """Opens an animation (GIF, WebP, APNG, TIFF) and gives frame after frame, as open_image would.

    One frame at a time is in memory. Raises UserError, also on the way.
    """
    name = shown(source)
    animation = _decoded(_bytes_of(source, folder, allow_urls), name)
    for number in range(getattr(animation, "n_frames", 1)):
        try:
            animation.seek(number)
        except Exception as error:  # Pillow has many, and some of its plugins more
            raise UserError(f"frame {number + 1} of {name} is broken ({_why(error)})") from None
        yield _finished(animation, name)


def check_size(width: int, height: int, name: str) -> None:
    """Raises UserError for a size that no image may have. name: what the message calls it."""
    if width < 1 or height < 1:
        raise UserError(f"{name} has {width} x {height} pixels: expected at least 1 x 1")
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{name} has {width} x {height} pixels: expected at most {MAX_PIXELS:,} in all"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise UserError(
            f"{name} has {width} x {height} pixels: expected a longer side of at most "
            f"{MAX_RATIO} times the shorter one"
        )


def shown(source) -> str:
    """Says how a message calls a source."""
    if isinstance(source, bytes):
        return f"the image ({len(source)} bytes)"
    text = str(source)
    if text.startswith("data:"):
        return f"the image {text[:30]!r}…"
    return f"the image {text[:SHOWN]!r}"


def to_png(image: "Image") -> bytes:
    """Encodes an image as a PNG file, quick rather than small."""
    file = io.BytesIO()
    try:
        image.save(file, "PNG", compress_level=1)
    except OSError:  # a mode that PNG has not, such as CMYK
        file = io.BytesIO()
        image.convert("RGB").save(file, "PNG", compress_level=1)
    return file.getvalue()


def to_data_uri(image: "Image") -> str:
    """Encodes an image as data:image/png;base64,…, a text that open_image opens again."""
    return "data:image/png;base64," + base64.b64encode(to_png(image)).decode()


# -- the bytes of a source


def _bytes_of(source, folder, allow_urls):
    if isinstance(source, bytes | bytearray):
        _check_length(len(source), shown(source))
        return bytes(source)
    if not isinstance(source, str | Path):
        kind = type(source).__name__
        raise UserError(f"an image of type {kind}: expected a path, a data URI, a URL or PIL")
    text = str(source)
    if isinstance(source, str) and text[:5].lower() == "data:":
        return _of_data_uri(text)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", text)
    if isinstance(source, str) and scheme:
        return _of_url(text, scheme[1].lower(), allow_urls)
    return _of_file(text, folder)


def _of_data_uri(text):
    """Decodes data:image/png;base64,…, as RFC 2397 has it."""
    name = shown(text)
    _check_length(len(text) * 3 // 4, name)
    head, comma, body = text.partition(",")
    if not comma:
        raise UserError(f"{name} is cut off: expected data:image/png;base64,…")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{name} is broken: what follows base64, is none") from None


def _of_url(text, scheme, allow_urls):
    name = shown(text)
    if scheme not in ("http", "https"):
        raise UserError(f"{name}: expected a path, a data URI, or http(s)://…")
    if not allow_urls:
        raise UserError(f"{name} is on the internet, which is not allowed here: give a file")
    try:
        return fetch_public(text, MAX_BYTES)
    except HttpError as error:
        raise UserError(f"{name} cannot be fetched: {error.detail}") from None


def _of_file(text, folder):
    name = shown(text)
    if folder is None:
        raise UserError(f"{name} is a path, and no folder of images is given")
    try:
        inside = Path(folder).expanduser().resolve()
        path = (inside / text).resolve()  # of an absolute path: the path; links are followed
        if not path.is_relative_to(inside):
            raise UserError(f"{name} is outside of the folder {str(folder)!r}")
        if not path.is_file():  # a pipe or a device would never end
            raise UserError(f"{name} is no file in the folder {str(folder)!r}")
        _check_length(path.stat().st_size, name)
        return path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, a circle of links
        raise UserError(f"{name} cannot be read ({_why(error)})") from None


def _check_length(length, name):
    if length > MAX_BYTES:
        raise UserError(f"{name} has {length:,} bytes: expected at most {MAX_BYTES:,}")


# -- pixels


def _decoded(data, name):
    """Opens a PIL image: its header is read, and it is not too large."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise UserError(f"{name} has more than {MAX_PIXELS:,} pixels, the most allowed") from None
    except Exception as error:  # Pillow has many, and some of its plugins more
        if b"<svg" in data[:1000].lower():
            raise UserError(f"{name} is an SVG, which has no pixels: save it as PNG") from None
        expected = f"expected one of {', '.join(FORMATS)}"
        if isinstance(error, Image.UnidentifiedImageError):
            raise UserError(f"{name} is no image that can be read here: {expected}") from None
        raise UserError(f"{name} is broken ({_why(error)}): {expected}") from None
    check_size(*image.size, name)
    return image


def _finished(image, name):
    """Reads the image, or the frame at which it stands, as RGB, upright, opaque, and no more."""
    check_size(*image.size, name)
    if image.mode == "RGB" and not hasattr(image, "fp") and not image.info:
        return image
    try:
        image.load()
        check_size(*image.size, name)  # of a GIF, it may have grown
        upright = _upright(image)
        return _to_rgb(upright)
    except UserError:
        raise
    except Exception as error:  # Pillow has many, and some of its plugins more
        raise UserError(f"{name} is broken ({_why(error)})") from None


def _upright(image):
    from PIL import ExifTags, ImageOps

    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF that cannot be read says nothing of a rotation
        return image


def _to_rgb(image):
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(layer, mask=layer.getchannel("A"))
        return rgb
    rgb = image.convert("RGB")
    rgb.info = {}
    return rgb


def _eight_bits(image):
    """Makes grey of 8 bits: of 16, the upper 8; floats from 0 to 1 as 0 to 255."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.float32)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    most = values.max(initial=0.0)
    if image.mode == "F" and most <= 1:
        values = values * 255
    elif most > 255:
        values = values / 257
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _why(error):
    return " ".join(str(error).split())[:SHOWN] or type(error).__name__

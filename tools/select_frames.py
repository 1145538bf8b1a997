"""The select_frames tool: frames of the row's animation or video, by their numbers.

    --tools=select_frames --tool_options=select_frames.folder=clips

The row's column `clip` is a path inside of `folder` (an animated GIF, WebP or PNG; a video, where
PyAV is installed: pip install av), or a list of such paths of images, one a frame. Frames are
counted from 1. What is not covered: reading a video from its middle. Frames before those that are
wanted are decoded and dropped.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from images import check_size, open_frames, open_image
from run.config import UserError
from tools import ToolError
from tools.vision.base import as_observation

if TYPE_CHECKING:
    from PIL.Image import Image

# The container of each; what else a file may claim to be, a playlist say, would be followed to
# other files and to servers.
VIDEOS = {
    ".mp4": "mov",
    ".m4v": "mov",
    ".mov": "mov",
    ".mkv": "matroska",
    ".webm": "matroska",
    ".avi": "avi",
}
LAST = 1_000_000  # the highest number that is looked for


class select_frames:
    def __init__(self, example, folder: str = ".", most: int = 8):
        """folder: of the paths. most: frames that one call may show."""
        if most < 1:
            raise UserError(f"select_frames.most = {most}: expected 1 or more")
        self.video = example.get("clip")
        self.folder = folder
        self.most = most

    def __call__(self, frames: list[int]):
        """Show frames of the clip.

        Args:
            frames: Their numbers, from 1, such as [1, 25, 50].
        """
        if not self.video:
            raise ToolError("no_image", "error: there is no clip in this conversation")
        wanted = sorted(set(frames))
        if not wanted or len(wanted) > self.most or wanted[0] < 1 or wanted[-1] > LAST:
            text = f"error: frames must be 1 to {self.most} numbers from 1 on, such as [1, 5]"
            raise ToolError("bad_frame", text)
        parts = []
        count = 0  # frames that there are, up to the last that is wanted
        try:
            for count, frame in self._frames(wanted):
                if count in wanted:
                    parts += [f"frame {count}", frame]
        except UserError as error:
            raise as_observation(error) from None
        if count < wanted[-1]:
            text = f"error: there is no frame {wanted[-1]}; the frames are 1 to {count}"
            raise ToolError("bad_frame", text)
        return parts

    def _frames(self, wanted) -> "Iterator[tuple[int, Image | None]]":
        """Yields (number, frame) up to the last wanted; None for one that need not be opened."""
        if isinstance(self.video, list | tuple):
            for number, source in enumerate(self.video[: wanted[-1]], 1):
                yield number, open_image(source, self.folder) if number in wanted else None
            return
        suffix = Path(str(self.video)).suffix.lower()
        if isinstance(self.video, str | Path) and suffix in VIDEOS:
            frames = video_frames(str(self.video), self.folder)
        else:
            frames = open_frames(self.video, self.folder)
        yield from islice(enumerate(frames, 1), wanted[-1])


def video_frames(path: str, folder: str) -> "Iterator[Image]":
    """Decodes a video inside of the folder, frame after frame. Raises UserError."""
    try:
        import av
    except ImportError:
        why = "frames of a video need PyAV: pip install av"
        raise UserError(f"the video {path!r} cannot be opened: {why}") from None
    inside = Path(folder).expanduser().resolve()
    file = (inside / path).resolve()
    if not (file.is_relative_to(inside) and file.is_file() and file.suffix.lower() in VIDEOS):
        raise UserError(f"the video {path!r} is no file in the folder {folder!r}")
    try:
        container_format = VIDEOS[file.suffix.lower()]
        with open(file, "rb") as data, av.open(data, format=container_format) as container:
            if not container.streams.video:
                raise UserError(f"the video {path!r} has no pictures in it")
            stream = container.streams.video[0]
            check_size(stream.width, stream.height, f"the video {path!r}")
            for frame in container.decode(stream):
                yield frame.to_image()
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"the video {path!r} is broken ({error})") from None

"""The subfigure tool: one panel of a figure that has several, split where the ground shows through.

Not covered: panels that touch, or that have a frame around all of them.
"""

from tools import ToolError
from tools.vision.base import ImageTool, require_size

GAP = 0.025  # of the side: the narrowest strip of ground that parts two panels
SMALLEST = 0.15  # of the side: what is smaller is a title or a label, not a panel
DEEPEST = 4  # cuts within cuts
NEAR = 24  # of 255: how far a pixel may be from the ground's colour and still be ground


class subfigure(ImageTool):
    def __call__(self, image: int, panel: int):
        """Show one panel of a figure that has several.

        Args:
            image: The number of the image, from 1.
            panel: The number of the panel, from 1, line by line. Boxes in the answer are {units}.
        """
        picture = self.picture(image)
        panels = find_panels(picture.original)
        if not 1 <= panel <= len(panels):
            boxes = [f"{number} {self.told(picture, box)}" for number, box in enumerate(panels, 1)]
            there = f"the panels are {', '.join(boxes)}"
            raise ToolError("no_panel", f"error: there is no panel {str(panel)[:80]}; {there}")
        box = panels[panel - 1]
        require_size(box[2] - box[0], box[3] - box[1], "that panel")
        where = f"panel {panel} of {len(panels)}, {self.told(picture, box)}"
        return [where, picture.original.crop(box)]


def find_panels(image) -> list[tuple[int, int, int, int]]:
    """Finds the boxes (left, top, right, bottom) of the panels of an RGB image, line by line."""
    import numpy as np

    pixels = np.asarray(image).astype(np.int16)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(edge, axis=0)
    is_ink = (np.abs(pixels - ground) > NEAR).any(axis=2)
    if not is_ink.any():
        return [(0, 0, image.width, image.height)]
    panels = []
    _split(is_ink, (0, 0, image.width, image.height), image.size, DEEPEST, panels)
    return _line_by_line(panels)


def _line_by_line(panels):
    """Orders panels for reading: one is in a line if its middle is beside the first one there."""
    lines = []
    for panel in sorted(panels, key=lambda panel: panel[1]):
        middle = (panel[1] + panel[3]) / 2
        if lines and middle < lines[-1][0][3]:
            lines[-1].append(panel)
        else:
            lines.append([panel])
    return [panel for line in lines for panel in sorted(line)]


def _split(is_ink, box, size, depth, panels):
    """Cuts along the widest strip of ground that parts two large pieces, and goes on in both."""
    box = _trimmed(is_ink, box)
    left, top, right, bottom = box
    part = is_ink[top:bottom, left:right]
    best = None  # (width of the strip, axis, its middle)
    if depth:
        for axis in (0, 1):  # 0: side by side, cut by a strip from top to bottom
            length = part.shape[1 - axis]
            for start, end in _strips(part.any(axis=axis)):
                is_wide = end - start >= GAP * size[axis]
                is_between = min(start, length - end) >= SMALLEST * size[axis]
                if is_wide and is_between and (best is None or end - start > best[0]):
                    best = (end - start, axis, (start + end) // 2)
    if best is None:
        panels.append(box)
        return
    _, axis, middle = best
    if axis == 0:
        first = (left, top, left + middle, bottom)
        second = (left + middle, top, right, bottom)
    else:
        first = (left, top, right, top + middle)
        second = (left, top + middle, right, bottom)
    _split(is_ink, first, size, depth - 1, panels)
    _split(is_ink, second, size, depth - 1, panels)


def _trimmed(is_ink, box):
    """Trims a box to what is in it, without the ground around that."""
    import numpy as np

    left, top, right, bottom = box
    part = is_ink[top:bottom, left:right]
    columns = np.flatnonzero(part.any(axis=0))
    rows = np.flatnonzero(part.any(axis=1))
    return (
        left + int(columns[0]),
        top + int(rows[0]),
        left + int(columns[-1]) + 1,
        top + int(rows[-1]) + 1,
    )


def _strips(has_ink):
    """Finds [start, end) of each strip without ink."""
    strips = []
    start = None
    for position, inked in enumerate(has_ink.tolist()):
        if inked and start is not None:
            strips.append((start, position))
            start = None
        elif not inked and start is None:
            start = position
    return strips

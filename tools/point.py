"""The point tool: the middle of each thing that a text names, by a detector (tools/detect.py)."""

from tools.detect import Detecting


class point(Detecting):
    def __call__(self, image: int, label: str) -> str:
        """Point at things in an image: the middle of each, [x, y], the surest first.

        Args:
            image: The number of the image, from 1. Points in the answer are {units}.
            label: What to point at, a word or two.
        """
        picture = self.picture(image)
        lines = []
        for each in self.found(picture, [label]):
            left, top, right, bottom = each.box
            middle = ((left + right) / 2, (top + bottom) / 2)
            lines.append(str(self.told(picture, middle)))
        return "\n".join(lines) or "(nothing of that was found)"

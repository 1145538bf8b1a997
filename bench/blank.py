"""The zoom tool with its eyes shut: whatever is asked for, it gives a white image of that size.

    python evaluate.py --run=out/chart --tools=bench/blank.py:zoom --save_to=out/chart/eval_blank

The model reads the same description of the tool and makes the same calls. What it is still right in
is what it does not need the tool's image for.
"""

from PIL import Image

from tools.zoom import zoom as real_zoom


class zoom(real_zoom):
    def __call__(self, image: int, box: list[float]):
        part = super().__call__(image, box)
        return Image.new("RGB", part.size, "white")

    __call__.__doc__ = real_zoom.__call__.__doc__

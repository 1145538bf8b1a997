"""Lets the torchvision that is made for GPUs be imported beside torch's build for CPUs.

`make test-vllm` copies this file to .venv/torchvision/sitecustomize.py, beside the package, and has
that folder on PYTHONPATH: vLLM's image processors import torchvision, in each of its processes. Its
compiled part stays unloaded, and without it two of its operators are not declared when it says how
to trace them. Transforms work; what calls these two raises. No user needs this.
"""

import importlib.abc
import sys

OPERATORS = ("nms", "qnms")
ARGUMENTS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class Declaring(importlib.abc.MetaPathFinder):
    """Declares them when torchvision is about to be imported, and finds nothing."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in OPERATORS:
            library.define(operator + ARGUMENTS)
        sys.torchvision_operators = library  # dropped, it would take them along
        return None


sys.meta_path.insert(0, Declaring())

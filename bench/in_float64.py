"""Runs a training script with weights, gradients and moments in float64, for bench/parallel.py
--float64=true: what several processes and one then differ by is not the rounding of their sums.

    NANOTOOL_SCRIPT=train_sft.py python bench/in_float64.py --config calc_sft.py

Muon multiplies in bfloat16 of its own accord, and here in float64 too.
"""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from learning import model as models
from tasks import tiny as tiny_model

load = models.load
make_tiny = tiny_model.tiny


def load_double(*args, **options):
    model, tokenizer = load(*args, **options)
    return model.double(), tokenizer


def make_tiny_double(*args, **options):
    return make_tiny(*args, **options).double()


if __name__ == "__main__":
    models.load = load_double
    tiny_model.tiny = make_tiny_double
    torch.Tensor.bfloat16 = torch.Tensor.double
    runpy.run_path(str(ROOT / os.environ["NANOTOOL_SCRIPT"]), run_name="__main__")

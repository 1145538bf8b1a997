"""Runs a training script with weights, gradients and moments in float64, for bench/parallel.py
--float64=true: what several processes and one then differ by is not the rounding of their sums.

    NANOTOOL_SCRIPT=train_sft.py python bench/in_float64.py --config calc_sft.py

Muon multiplies in bfloat16 of its own accord, and here in float64 too. Logits are made in float32,
as ever: that is a rounding of each micro-batch, which all processes make alike.
"""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from learning import model as models
from learning import parallel

load = models.load
launch = parallel.launch


def load_in_float64(*args, **options):
    model, tokenizer = load(*args, **options)
    return model.double(), tokenizer


def in_float64(model, dtype):
    """Stands for models.in_dtype, which a model from scratch goes through."""
    return model.double()


def launch_in_float64(count):
    """Starts the ranks by this file too: runpy has put the script's name in its place."""
    sys.argv[0] = __file__
    launch(count)


if __name__ == "__main__":
    parallel.launch = launch_in_float64
    models.load = load_in_float64
    models.in_dtype = in_float64
    torch.Tensor.bfloat16 = torch.Tensor.double
    runpy.run_path(str(ROOT / os.environ["NANOTOOL_SCRIPT"]), run_name="__main__")

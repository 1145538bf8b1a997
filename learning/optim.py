"""The steps of optimizers, and what is said of memory."""

import contextlib
import math

import torch

from learning.model import _bitsandbytes
from run.config import UserError


def count(model) -> tuple[int, int]:
    """(parameters that are trained, all parameters)."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def gpu_gib(phase: str) -> dict[str, float]:
    """{"gpu_gib_<phase>": what was taken of the GPU}: by all processes now, and by this one at its
    peak since the last call. {} without a GPU."""
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    more = torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return {f"gpu_gib_{phase}": (total - free + more) / 2**30}


def optimizers(model, kind: str, learning_rate: float, weight_decay: float = 0.0) -> list:
    """What to step and zero after each backward pass: AdamW over all that is trained, "adamw8bit",
    whose two moments take a byte each instead of four (Dettmers et al. 2021, arXiv:2110.02861), or
    "muon".

    Muon (Jordan et al. 2024) takes the matrices inside the layers, AdamW the rest; its update is
    scaled to the size of AdamW's, so both take the same learning rate. Norms and biases do not
    decay.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inner = [p for name, p in named if p.ndim == 2 and ".layers." in name] if kind == "muon" else []
    taken = {id(p) for p in inner}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    if kind == "adamw8bit":
        eight_bits = _bitsandbytes("optimizer = adamw8bit").optim.AdamW8bit
        return [eight_bits(groups, lr=learning_rate, betas=(0.9, 0.95))]
    made = [torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)]
    if inner:
        made.append(
            torch.optim.Muon(inner, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    return made


@contextlib.contextmanager
def memory_advice(*knobs: str):
    """Turns "out of memory" into a sentence that names what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"out of memory: lower {', '.join(knobs)} ({what})") from None


def step(model, optimizers: list, learning_rate: float, max_grad_norm: float) -> float:
    """One step of all optimizers on the gradient, clipped to max_grad_norm; returns its norm."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if not math.isfinite(norm):  # a step with it would make every weight NaN
        raise UserError(f"grad_norm = {norm}: training has diverged; lower learning_rate")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
    return norm


def schedule(step: int, steps: int, kind: str, warmup: int) -> float:
    """The share of the peak learning rate in step 0 .. steps - 1."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
    }[kind]

"""The steps of optimizers, and what is said of memory."""

import contextlib
import functools
import math

import torch

from learning import parallel, whole, zero
from learning.model import import_bitsandbytes
from run.config import UserError


def count(model) -> tuple[int, int]:
    """Returns how many parameters are trained, and how many there are."""
    trained = 0
    total = 0
    for parameter in model.parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            trained += parameter.numel()
    return trained, total


def gpu_gib(phase: str) -> dict[str, float]:
    """Returns {"gpu_gib_<phase>": what was taken of the GPU}: by all processes now, and by this one
    at its peak since the last call. {} without a GPU."""
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    given_back = torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved()  # since the peak
    torch.cuda.reset_peak_memory_stats()
    return {f"gpu_gib_{phase}": (total - free + given_back) / 2**30}


def optimizers(
    model,
    kind: str,
    learning_rate: float,
    weight_decay: float = 0.0,
    tower_share: float = 1.0,
) -> list:
    """Makes what is stepped after each backward pass: AdamW over all that is trained, "adamw8bit",
    whose two moments take a byte each instead of four (Dettmers et al. 2021, arXiv:2110.02861), or
    "muon".

    Muon (Jordan et al. 2024) takes the matrices inside the layers, AdamW the rest; its update is
    scaled to the size of AdamW's, so both take the same learning rate. But what AdamW has of a
    tower (patches, positions, what joins it to the language model) takes tower_share of it and
    does not decay, nor do norms and biases.
    """
    tower = ()  # the beginnings of its parameters' names
    if kind == "muon" and whole.is_whole(model):
        tower = tuple(whole.other_parts(model))
    for_muon = []
    matrices = []
    vectors = []  # norms and biases
    of_tower = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if kind == "muon" and parameter.ndim == 2 and ".layers." in name:
            for_muon.append(parameter)
        elif name.startswith(tower):
            of_tower.append(parameter)
        elif parameter.ndim >= 2:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if of_tower:
        groups.append({"params": of_tower, "weight_decay": 0.0, "share": tower_share})

    if kind == "adamw8bit":
        bitsandbytes = import_bitsandbytes("optimizer = adamw8bit")
        return [bitsandbytes.optim.AdamW8bit(groups, lr=learning_rate, betas=(0.9, 0.95))]
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
    if parallel.HERE.kind == "deepspeed":
        parallel.HERE.zero = zero.Zero1(model, adamw)
        return [parallel.HERE.zero]
    if not for_muon:
        return [adamw]
    make_muon = functools.partial(
        torch.optim.Muon,
        lr=learning_rate,
        weight_decay=weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [adamw, parallel.of_whole_matrices(make_muon, for_muon)]


def add_up_in_float64(model) -> None:
    """Has the gradients of all passes be added up in float64, until `step` rounds them: the sum is
    then the same, in whatever order and by however many ranks. Muon needs that: it multiplies in
    bfloat16, which makes 0.4 % of a number out of a last bit of float32."""
    with parallel.whole(model):  # fsdp: shards have gradients of their own, rounded already
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad_dtype = torch.float64


def round_gradients(model) -> list:
    """Rounds gradients to the dtype of their weights; returns the weights where that was needed."""
    rounded = []
    for parameter in model.parameters():
        gradient = parameter.grad
        if gradient is None or gradient.dtype == parameter.dtype:
            continue
        parameter.grad = None
        parameter.grad_dtype = parameter.dtype
        parameter.grad = gradient.to(parameter.dtype)
        rounded.append(parameter)
    return rounded


@contextlib.contextmanager
def memory_advice(*knobs: str):
    """Turns "out of memory" into a sentence that names what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        message = " ".join(str(error).split())[:200]
        raise UserError(f"out of memory: lower {', '.join(knobs)} ({message})") from None


def step(model, optimizers: list, learning_rate: float, max_grad_norm: float) -> float:
    """Takes one step of all optimizers on the gradient, clipped to max_grad_norm; returns its norm
    before that. Raises UserError where it is not finite."""
    rounded = round_gradients(model)
    grad_norm = parallel.clip_gradients(model, max_grad_norm)
    if not math.isfinite(grad_norm):  # a step with it would make every weight NaN
        raise UserError(f"grad_norm = {grad_norm}: training has diverged; lower learning_rate")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get("share", 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for parameter in rounded:
        parameter.grad_dtype = torch.float64  # for the next update
    return grad_norm


def schedule(step: int, steps: int, kind: str, warmup: int) -> float:
    """Returns the share of the peak learning rate in step 0 .. steps - 1. kind: "constant",
    "linear" or "cosine"; warmup: steps in which it rises to the peak."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return 1 - done
    assert kind == "cosine", f"schedule {kind!r}: expected constant, linear or cosine"
    return 0.5 * (1 + math.cos(math.pi * done))

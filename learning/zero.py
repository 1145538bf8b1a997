"""ZeRO stage 1 by DeepSpeed (arXiv:1910.02054): every rank has all weights and gradients, and steps
a part of the weights, of which it alone has the moments.

    optimizer = Zero1(model, adamw)
    loss.backward()                  # as in one process: any number of times, on each rank
    optimizer.sum_gradients()
    grad_norm = optimizer.clip(1.0)
    optimizer.step()

The passes are not DeepSpeed's: it is given gradients that are whole, as one process would have
them. (Its stages 2 and 3 hook themselves to every pass, and raise in these loops: tests/ways.py.)
Nor are the checkpoints, which are those of one process: DeepSpeed's go on with the same number of
ranks only.
"""

import math
import os
import warnings

import torch
import torch.distributed as dist

from learning import parallel
from run.config import UserError


class Zero1:
    """Stands for an AdamW over the weights of a model, each rank stepping its part of them."""

    def __init__(self, model, optimizer):
        deepspeed = import_deepspeed()
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # has to be there; nothing is divided by it
            "gradient_allreduce_op": "sum",
            "gradient_clipping": 0.0,  # by `clip`; without a word it would be to 1
            "zero_optimization": {
                "stage": 1,
                # with both off nothing is hooked to the backward passes
                "contiguous_gradients": False,
                "overlap_comm": False,
                "reduce_bucket_size": parallel.BUCKET,
            },
        }
        if dtype_of(model) == torch.bfloat16:  # no weights in float32 beside: one process has none
            settings["bf16"] = {
                "enabled": True,
                "bf16_master_weights_and_grads": True,
                "bf16_optimizer_states": True,
            }
        # as they are before DeepSpeed puts a group's part of this rank in the place of its weights,
        # and drops a group without any
        self.groups = optimizer.state_dict()["param_groups"]
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.numbers = [group["params"] for group in self.groups if group["params"]]
        with parallel.lost_is_an_end():
            self.engine, self.zero, _, _ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=settings,
                dist_init_required=False,
            )
        # they take the time of passes that are not its own
        self.engine.module_forward_pre_hook.remove()
        self.engine.module_forward_post_hook.remove()

    @property
    def param_groups(self) -> list[dict]:
        """Returns the groups, whose "lr" may be set; each has one flat tensor, this rank's part."""
        return self.zero.param_groups

    def sum_gradients(self) -> None:
        """Adds up the gradients of all ranks, and keeps of them what belongs to this one's part."""
        for parameter in self.parameters:
            if parameter.grad is None:  # no pass of this rank has met it
                parameter.grad = torch.zeros_like(parameter)
        self.engine.allreduce_gradients()

    def clip(self, max_norm: float) -> float:
        """Scales the gradient down to max_norm; returns its norm before that, inf if not finite."""
        parts = []  # of this rank, in each group
        for group in self.zero.averaged_gradients.values():
            parts += group
        norm = parallel.clip(parts, max_norm, are_parts=True)
        return norm if math.isfinite(norm) else math.inf

    def step(self) -> None:
        """Steps this rank's part, and gathers the weights of all others'."""
        with parallel.lost_is_an_end():
            self.engine.step()

    def zero_grad(self) -> None:
        """Drops the gradients."""
        self.zero.zero_grad()

    # -- the state of one process

    def state_dict(self) -> dict:
        """Returns what an AdamW of one process would return, on the first rank; without moments on
        the others, all of which have to call it."""
        state = {number: {} for numbers in self.numbers for number in numbers}
        for numbers, group in zip(self.numbers, self.zero.param_groups, strict=True):
            (part,) = group["params"]
            for name, value in self.zero.state[part].items():
                if value.ndim == 0:  # the count of steps, which AdamW adds to in place
                    for number in numbers:
                        state[number][name] = value.clone()
                    continue
                whole = _joined(value)
                if not parallel.is_first():
                    continue
                start = 0
                for number in numbers:
                    parameter = self.parameters[number]
                    end = start + parameter.numel()
                    state[number][name] = whole[start:end].view_as(parameter).clone()
                    start = end
        return {"state": state, "param_groups": self.groups}

    def load_state_dict(self, saved: dict) -> None:
        """Takes this rank's part of such a state; the weights have to be the saved ones already."""
        for numbers, group in zip(self.numbers, self.zero.param_groups, strict=True):
            (part,) = group["params"]
            known = [saved["state"][number] for number in numbers if number in saved["state"]]
            if not known:
                continue
            for name, value in known[0].items():
                if value.ndim == 0:
                    self.zero.state[part][name] = value.to(part.device)
                    continue
                moments = []
                for number in numbers:
                    moment = saved["state"].get(number, {}).get(name)
                    if moment is None:  # one process keeps none of what never had a gradient
                        moment = torch.zeros_like(self.parameters[number], device=value.device)
                    moments.append(moment.flatten())
                self.zero.state[part][name] = _part_like(part, torch.cat(moments))
        self.zero.refresh_fp32_params()


def import_deepspeed():
    """Imports and returns the package, without what it would say and compile first."""
    find_no_gpu_quietly()
    import deepspeed

    # On a CPU it would compile sums by shared memory, for minutes; if that is killed, its lock
    # stays, for which every later start would wait.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # deepspeed 0.19 calls what torch 2.13 has given another name
    warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor. is deprecated")
    return deepspeed


def find_no_gpu_quietly() -> None:
    """Has deepspeed not warn on a CPU when it is imported, as accelerate does wherever it is
    installed."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def dtype_of(model) -> torch.dtype:
    """Returns the dtype of what is trained. UserError where DeepSpeed would change another one: it
    flattens what is trained to one tensor, and casts all to bfloat16 where that is."""
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    others = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(trained) > 1 or (torch.bfloat16 in trained and len(others) > 1):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in trained | others))
        raise UserError(
            f"parallel = 'deepspeed' with weights in {names}: it needs one dtype, so use ddp"
        )
    return trained.pop()


def _joined(part: torch.Tensor) -> torch.Tensor:
    """Puts the parts of all ranks together, in their order, on the first; the others keep their
    own."""
    part = part.cpu()
    parts = None
    if parallel.is_first():
        parts = [torch.empty_like(part) for _ in range(parallel.HERE.size)]
    with parallel.lost_is_an_end():
        dist.gather(part, parts)
    return torch.cat(parts) if parts else part


def _part_like(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Cuts out of a whole flat tensor what belongs to this rank's part; the last is filled up with
    zeros."""
    start = parallel.HERE.rank * len(part)
    mine = torch.zeros_like(part)
    values = whole[start : start + len(part)]
    mine[: len(values)] = values
    return mine.detach()

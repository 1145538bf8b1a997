"""Several processes that train one model: the only file that knows of ranks.

    python train_grpo.py --config calc.py --parallel=ddp --gpus=8          # one machine
    torchrun --nnodes=2 --nproc-per-node=8 … train_grpo.py … --parallel=fsdp   # several

    with parallel.started("fsdp"):
        parallel.split(model)                      # before the optimizers are made
        with parallel.whole(model):                # any number of passes, 0 too, on each rank
            for part in parallel.share(parts):
                loss_of(part).backward()
            parallel.sum_gradients(model)
        optimizer.step()

Every rank knows all trajectories of a step, so that advantages, denominators and micro-batches are
computed everywhere alike, by the code of one process. Shared out are the playing and the passes.
With parallel=none, and outside of `started`, all of this does nothing.

ddp: each rank has all weights; gradients are summed. fsdp: weights, gradients and optimizers are
cut into shards (FSDP2, torch.distributed.fsdp.fully_shard; the idea is ZeRO, arXiv:1910.02054). The
weights are put together before the first pass of an update and taken apart behind the last, so no
pass waits for another rank: ranks may make different numbers of them. deepspeed: each rank has all
weights, and the optimizer of a part of them (learning/zero.py).
"""

import atexit
import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from learning.logprobs import decoder_of
from run.config import UserError, tell

LOST = 75  # exit code of a rank whose peers are gone: they know why
PATIENCE = 30.0  # seconds that the others have to save and end, when one has failed
BUCKET = 2**26  # numbers that are summed at once: 256 MiB of float32
PIPE = "NANOTOOL_PIPE"  # a pipe that ends when the launcher does
OF_A_RANK = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # beside RANK
PER_CORE = 4  # processes of one machine, where it has no GPU


@dataclass
class World:
    """Where this process stands."""

    kind: str = "none"
    rank: int = 0
    size: int = 1
    is_whole: bool = False  # fsdp: the weights are put together now
    zero: object = None  # deepspeed: the Zero1 of what is trained


HERE = World()


# -- starting and ending


def check(kind: str, gpus: int, optimizer: str, offload: bool) -> None:
    """Checks what --parallel says beside --gpus, --optimizer and --offload. UserError where one has
    no effect, or cannot be cut into shards."""
    if gpus < 1:
        raise UserError(f"gpus = {gpus}: expected at least 1")
    if kind == "none" and gpus > 1:
        raise UserError(f"gpus = {gpus} with parallel=none: use --parallel=ddp, fsdp or deepspeed")
    if gpus > 1 and "RANK" in os.environ and PIPE not in os.environ:
        raise UserError(
            f"gpus = {gpus} beside torchrun, whose --nproc-per-node says how many: give --gpus=1"
        )
    if kind != "none" and gpus == 1 and "RANK" not in os.environ:
        raise UserError(f"parallel = {kind!r} in one process: give --gpus=8, or use torchrun")
    if offload and kind != "fsdp":
        raise UserError(f"offload has no effect with parallel={kind}: use --parallel=fsdp")
    if kind in ("fsdp", "deepspeed") and optimizer == "adamw8bit":
        raise UserError(f"optimizer = 'adamw8bit' cannot be cut into shards ({kind}): use adamw")
    if kind == "deepspeed" and optimizer == "muon":
        raise UserError(
            "optimizer = 'muon' has to see whole matrices, and deepspeed cuts them: use adamw, or "
            "--parallel=ddp"
        )
    if kind == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise UserError("parallel = 'deepspeed' needs deepspeed: pip install -e \".[deepspeed]\"")


@contextlib.contextmanager
def started(kind: str):
    """Joins the other processes, which RANK and WORLD_SIZE name (of `launch` or torchrun)."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if kind == "none":
        if size > 1:
            raise UserError(
                f"{size} processes with parallel=none: use --parallel=ddp, fsdp or deepspeed"
            )
        yield
        return
    if "RANK" not in os.environ:  # a notebook, say
        raise UserError(
            f"parallel = {kind!r} in one process: the scripts start several (--gpus=8), or torchrun"
        )
    missing = [name for name in OF_A_RANK if name not in os.environ]
    if missing:
        raise UserError(f"RANK is set, {', '.join(missing)} not: unset it, or start by torchrun")
    _end_with_the_launcher()
    _see_one_gpu(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # a rank waits for the slowest rollouts of the others; one that ends is noticed by other means
    dist.init_process_group(backend, timeout=timedelta(days=7))
    HERE.kind = kind
    HERE.rank = dist.get_rank()
    HERE.size = dist.get_world_size()
    ending = {"code": 0}
    atexit.register(_leave, ending)
    try:
        yield
    except BaseException as error:
        ending["code"] = _exit_code(error)
        raise
    finally:
        dist.destroy_process_group()
        HERE.kind = "none"
        HERE.zero = None
        HERE.rank = 0
        HERE.size = 1


def _exit_code(error: BaseException) -> int:
    """Returns the exit code that config.main gives to an error."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, UserError) else 1


def _leave(ending: dict) -> None:
    """Ends this process without tearing it down: threads of torch that still run then, one in some
    twenty times, end it by SIGABRT instead."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ending["code"])


def _see_one_gpu(local_rank: int) -> None:
    """Hides all GPUs but one, before CUDA is touched: an engine that this rank starts in a process
    of its own takes the same one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    mine = visible.split(",")[local_rank] if visible else str(local_rank)
    os.environ["CUDA_VISIBLE_DEVICES"] = mine


def is_first() -> bool:
    """Says whether this is the rank that writes and prints."""
    return HERE.rank == 0


def must_launch(gpus: int) -> bool:
    """Says whether this process has to start the ranks: it is none itself."""
    return gpus > 1 and "RANK" not in os.environ


def launch(count: int) -> None:
    """Runs this very command in `count` processes, and ends with their exit code.

    The first one writes to this terminal. Where another fails, its last line is told. Signals are
    passed on: the ranks finish their step, save, and end; a second one ends them at once.
    """
    if torch.cuda.is_available() and torch.cuda.device_count() < count:
        there = torch.cuda.device_count()
        raise UserError(f"gpus = {count}: this machine has {there}, so give --gpus={there} or less")
    most = PER_CORE * (os.cpu_count() or 1)
    if not torch.cuda.is_available() and count > most:
        raise UserError(f"gpus = {count}: without a GPU at most {most} here, {PER_CORE} a core")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    watched, kept_open = os.pipe()
    processes = []
    errors = []  # what each has said on stderr
    for rank in range(count):
        errors.append(tempfile.TemporaryFile())
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            PIPE: str(watched),
        }
        # without a number each would take all cores for itself
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        process = subprocess.Popen(
            [sys.executable, *sys.argv],
            env=environment,
            pass_fds=(watched,),
            stdout=None if rank == 0 else subprocess.DEVNULL,
            stderr=None if rank == 0 else errors[rank],
            start_new_session=True,  # Ctrl-C comes once, by way of this process
        )
        processes.append(process)
    os.close(watched)

    def pass_on(number, frame):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in handled}
    try:
        code = _wait(processes, errors)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(kept_open)
    sys.exit(code)


def _wait(processes: list, errors: list) -> int:
    """Waits for all ranks; returns the exit code, and tells why where it is not 0."""
    # 1. until one fails, or all have ended
    failed = None  # the first one
    while failed is None and any(process.poll() is None for process in processes):
        time.sleep(0.05)
        for rank, process in enumerate(processes):
            # those whose peers are gone are not the ones that failed
            if process.poll() not in (None, 0, LOST):
                failed = rank
                break
    if failed is None:
        code = next((process.returncode for process in processes if process.returncode), 0)
        if code:
            tell(f"error: the {len(processes)} ranks have lost each other")
        return code

    # 2. the others save and end, or are ended
    deadline = time.monotonic() + PATIENCE
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)

    # 3. which of them says why: the first rank has said it itself
    code = processes[failed].returncode
    if code < 0:
        name = signal.Signals(-code).name
        tell(f"error: rank {failed} of {len(processes)} was ended by {name}; the others are ended")
        return 128 - code
    if failed > 0 and processes[0].returncode in (0, LOST, -signal.SIGKILL):
        errors[failed].seek(0)
        lines = errors[failed].read().decode(errors="replace").strip().splitlines()
        last = lines[-1].removeprefix("error: ") if lines else f"exit code {code}"
        tell(f"error: rank {failed} of {len(processes)}: {last}")
    return code


def _end_with_the_launcher() -> None:
    """Ends this process when its launcher does, however that ended."""
    if PIPE not in os.environ:
        return
    pipe = int(os.environ[PIPE])

    def watch():
        os.read(pipe, 1)  # returns when the other end is closed
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


# -- what the ranks tell each other


def share(items: list) -> list:
    """Returns this rank's part of what all of them have in common."""
    return items[HERE.rank :: HERE.size]


def gathered(items: list) -> list:
    """Returns the items of all ranks; of what was shared out, in the order from before."""
    if HERE.size == 1:
        return items
    parts = _from_all(items)
    in_order = []
    for at in range(max(map(len, parts))):
        in_order += [part[at] for part in parts if at < len(part)]
    return in_order


def total(sums: dict) -> dict:
    """Adds up the numbers of all ranks, by name."""
    if HERE.size == 1:
        return dict(sums)
    added = {}
    for part in _from_all(dict(sums)):
        for name, value in part.items():
            added[name] = added.get(name, 0) + value
    return added


def agreed(number: int | None) -> int | None:
    """Returns one rank's number for all: the highest, None if no rank has one."""
    if HERE.size == 1:
        return number
    return max(filter(None, _from_all(number)), default=None)


def by_first(action, *arguments):
    """Calls action(*arguments) on the first rank only; returns its result, or raises its error, on
    all."""
    result = None
    with together():
        if is_first():
            result = action(*arguments)
    if HERE.size == 1:
        return result
    return _from_all(result)[0]


@contextlib.contextmanager
def together():
    """Surrounds what may fail on one rank: it then fails on all, when all have come to its end."""
    if HERE.size == 1:
        yield
        return
    error = None
    try:
        yield
    except Exception as caught:
        error = caught

    # 1. has any rank failed? one number tells, and nearly always none has
    failed = torch.tensor(0 if error is None else 1)
    with lost_is_an_end():
        dist.all_reduce(failed, dist.ReduceOp.MAX)
    if not failed.item():
        return

    # 2. which, and why
    failure = None
    if error is not None:
        failure = (str(error) or type(error).__name__, isinstance(error, torch.OutOfMemoryError))
    failures = _from_all(failure)
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is None:
            continue
        reason, is_memory = failure
        if is_memory:  # others say what to lower then
            raise torch.OutOfMemoryError(f"rank {rank}: {reason}")
        raise UserError(reason if rank == 0 else f"rank {rank}: {reason}")


def _from_all(item) -> list:
    """Returns the item of each rank."""
    items = [None] * HERE.size
    with lost_is_an_end():
        dist.all_gather_object(items, item)
    items[HERE.rank] = item  # not a copy of it
    return items


@contextlib.contextmanager
def lost_is_an_end():
    """Ends this rank where another one is gone: nothing can be computed or saved without it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of gloo and NCCL: a connection was closed
        if PIPE not in os.environ:  # else the launcher says which one, and why
            message = " ".join(str(error).split())[:200]
            tell(f"error: rank {HERE.rank} has lost the others ({message}): see what they say")
        os._exit(LOST)  # not by an exception: whoever would clean up may need the others


# -- weights and gradients


def split(model, offload: bool = False) -> None:
    """Cuts the weights into shards: fsdp only. Call it before the optimizers are made. offload: the
    shards, and so gradients, moments and steps of them, are the CPU's."""
    if HERE.kind != "fsdp":
        return
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    policy = OffloadPolicy()
    if offload:
        policy = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    for layer in _layers(model):
        fully_shard(layer, reshard_after_forward=False, offload_policy=policy)
    fully_shard(model, reshard_after_forward=False, offload_policy=policy)
    for unit in _units(model):
        unit.set_requires_gradient_sync(False, recurse=False)
        unit.set_reshard_after_backward(False, recurse=False)
        unit.set_force_sum_reduction_for_comms(True)  # gloo cannot divide
        unit.set_gradient_divide_factor(1.0)
    with torch.no_grad():  # the first pass has to be the whole model's: it makes one of the units
        _tiny_pass(model)
    _reshard(model)


def _layers(model) -> list:
    """Lists the layers of the language model: those that are alike."""
    for module in decoder_of(model).modules():
        if isinstance(module, torch.nn.ModuleList):
            return list(module)
    return []


def _units(model) -> list:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _tiny_pass(model) -> torch.Tensor:
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.sum()


def _reshard(model) -> None:
    for unit in _units(model):
        unit.reshard()


@contextlib.contextmanager
def whole(model):
    """Puts the weights together for whatever is computed inside: fsdp only."""
    if HERE.kind != "fsdp" or HERE.is_whole:
        yield
        return
    with lost_is_an_end():
        for unit in _units(model):
            unit.unshard()
    HERE.is_whole = True
    try:
        yield
    finally:
        HERE.is_whole = False
        _reshard(model)


def sum_gradients(model) -> None:
    """Adds up the gradients of all ranks: behind the last pass of an update, inside of `whole`."""
    if HERE.kind == "none":
        return
    with lost_is_an_end():
        if HERE.kind == "fsdp":
            _reduce_shards(model)
        elif HERE.kind == "deepspeed":
            HERE.zero.sum_gradients()
        else:
            _all_reduce([p for p in model.parameters() if p.requires_grad])


def clip_gradients(model, max_norm: float) -> float:
    """Scales the gradient down to max_norm; returns its norm before that."""
    if HERE.kind == "deepspeed":
        return HERE.zero.clip(max_norm)
    are_parts = HERE.kind == "fsdp"
    gradients = []
    for parameter in model.parameters():
        if parameter.grad is not None:
            gradients.append(parameter.grad.to_local() if are_parts else parameter.grad)
    return clip(gradients, max_norm, are_parts)


@torch.no_grad()
def clip(gradients: list[torch.Tensor], max_norm: float, are_parts: bool) -> float:
    """Scales gradients down to max_norm, in place; returns their norm before that. are_parts: of
    one gradient, which the ranks have together.

    It is computed in float64, and so does not depend on who has which part. In float32 torch's is
    off by 5e-7 for half a million numbers, by 0.4 % for 50 million on one core.
    """
    norms = []
    for gradient in gradients:
        for part in gradient.flatten().split(2**20):  # or there would be a copy of all in float64
            norms.append(torch.linalg.vector_norm(part, dtype=torch.float64))
    square = torch.zeros((), dtype=torch.float64)
    if norms:
        square = torch.stack(norms).square().sum()
    if are_parts:
        with lost_is_an_end():
            dist.all_reduce(square)
    norm = square.sqrt().item()
    scale = max_norm / (norm + 1e-6)
    if scale < 1:
        for gradient in gradients:
            gradient.mul_(scale)
    return norm


def _all_reduce(parameters: list) -> None:
    """Sums gradients over the ranks, many at once. One that had no pass has none: zeros then."""
    bucket = []
    numbers = 0
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
        bucket.append(parameter.grad)
        numbers += parameter.numel()
        if numbers >= BUCKET:
            _all_reduce_bucket(bucket)
            bucket = []
            numbers = 0
    _all_reduce_bucket(bucket)


def _all_reduce_bucket(gradients: list) -> None:
    for dtype in {gradient.dtype for gradient in gradients}:
        alike = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = torch.cat([gradient.flatten() for gradient in alike])
        dist.all_reduce(flat)
        sizes = [gradient.numel() for gradient in alike]
        for gradient, part in zip(alike, flat.split(sizes), strict=True):
            gradient.copy_(part.view_as(gradient))


def _reduce_shards(model) -> None:
    """Reduce-scatters what the passes have accumulated, by one more that adds nothing."""
    for unit in _units(model):
        unit.set_requires_gradient_sync(True, recurse=False)
    (_tiny_pass(model) * 0).backward()
    for unit in _units(model):
        unit.set_requires_gradient_sync(False, recurse=False)


def of_whole_matrices(make_optimizer, matrices: list):
    """Makes an optimizer whose step has to see whole matrices, as Muon's does: where they are in
    shards, it steps whole copies of them, alike on all ranks, whose moments are not cut."""
    if not any(_is_cut(matrix) for matrix in matrices):
        return make_optimizer(matrices)
    copies = [torch.nn.Parameter(torch.zeros_like(shard.full_tensor())) for shard in matrices]
    optimizer = make_optimizer(copies)

    @torch.no_grad()
    def join(*_) -> None:
        with lost_is_an_end():
            for shard, copy in zip(matrices, copies, strict=True):
                copy.copy_(shard.full_tensor())
                copy.grad = shard.grad.full_tensor()

    @torch.no_grad()
    def cut(*_) -> None:
        for shard, copy in zip(matrices, copies, strict=True):
            shard.copy_(cut_like(copy.detach(), shard))
            shard.grad = None

    optimizer.register_step_pre_hook(join)
    optimizer.register_step_post_hook(cut)
    return optimizer


# -- shards and whole tensors: what is saved is the same for any number of ranks


def state_of(model) -> dict | None:
    """Returns the state_dict() of a model that is cut into shards, put together on the first rank;
    None where it is whole. All ranks have to call it."""
    if HERE.kind != "fsdp":
        return None
    state = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    done = {}  # by id(): tied weights are one parameter, and are saved as one tensor
    for name, value in model.state_dict().items():
        owner = id(parameters.get(name, value))  # not its memory: empty shards have none
        if owner not in done:
            done[owner] = joined(value)
        state[name] = done[owner]
    return state


def whole_weights(model) -> dict | None:
    """Returns the weights that are together inside of `whole`, where state_dict() cannot be asked
    for; None elsewhere."""
    if not HERE.is_whole:
        return None
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}


def _is_cut(value) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def joined(value):
    """Puts tensors together, in dicts and lists too: on the first rank, None on the others."""
    if _is_cut(value):
        with lost_is_an_end():
            tensor = value.full_tensor()
        return tensor.cpu() if is_first() else None
    if isinstance(value, dict):
        return {key: joined(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(joined(item) for item in value)
    return value


def cut_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Cuts a whole tensor as a parameter of the same shape is cut."""
    from torch.distributed.tensor import distribute_tensor

    if not _is_cut(parameter):
        return value
    value = value.to(parameter.device)
    # all ranks have the same value: each takes its part, and nothing is sent
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def cut_state(optimizer, state: dict) -> dict:
    """Cuts the moments in the saved state of an optimizer as its parameters are cut."""
    if HERE.kind != "fsdp":
        return state
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    cut = {}
    for number, values in state["state"].items():
        parameter = parameters[number]
        cut[number] = {}
        for name, value in values.items():
            is_moment = torch.is_tensor(value) and value.shape == parameter.shape
            cut[number][name] = cut_like(value, parameter) if is_moment else value
    return state | {"state": cut}

"""Several processes learn what one learns (learning/parallel.py): on this machine's CPU, by gloo.

    pytest tests/test_parallel.py

Pinned here: metrics to the digits that are printed and weights to 2e-6 with 2 and 4 ranks of ddp
and fsdp, with a reference, off-policy updates, groups that are replaced, adapters, held-out rows; a
kill and a resume change no bit; a checkpoint of 2 ranks goes on with 4, 1 or none; what fails on
one rank ends all, with one sentence. Ranks are forked from a process that has imported everything.
"""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_resume import (  # noqa: F401 (fixtures are found by their names)
    HANGS,
    RUNS,
    command,
    configured,
    left_by,
    lines,
    nursery,
    place,
)

import train_grpo
from learning import parallel
from run import config
from run.config import UserError

FAR = 2e-6  # how far weights may be from those of one process: they are sums in another order
BUDGET = {"token_budget": 60}  # small, so that there are more micro-batches than ranks
NAMES = itertools.count()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def as_rank(environment: dict, *arguments) -> None:
    """What test_resume.command does, as one of several ranks."""
    os.environ.update(environment)
    command(*arguments)


@pytest.fixture(scope="module")
def begin(nursery, place):  # noqa: F811
    """begin(run, size, kind, out_dir, point, call, rank, …): the processes of the ranks, running.
    At that call of the point something happens to that rank."""
    children = []

    def start(name, size, kind, out_dir, point="", call=1, rank=0, **options):
        cfg = configured(name, out_dir, resume=True, **BUDGET | options)
        if size > 1:
            cfg = replace(cfg, parallel=kind, gpus=size)
        config.save(cfg, f"{place}/{out_dir}.py")
        argv = ["--config", f"{place}/{out_dir}.py"]
        (place / "log").unlink(missing_ok=True)
        shared = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        mine = []
        for number in range(size):
            environment = shared | {"RANK": number, "LOCAL_RANK": number} if size > 1 else {}
            environment = {key: str(value) for key, value in environment.items()}
            what = (point, call) if number == rank else ("", 1)
            script = RUNS[name][0].__name__
            arguments = (environment, script, argv, str(place), *what)
            child = nursery.Process(target=as_rank, args=arguments)
            child.start()
            mine.append(child)
        children.extend(mine)
        return mine

    yield start
    for child in children:
        child.kill()
        child.join()


@pytest.fixture(scope="module")
def ranks(begin, place):  # noqa: F811
    """ranks(…) as begin(…), to their end: (exit codes, what was printed)."""

    def to_the_end(*args, **options):
        started = begin(*args, **options)
        for child in started:
            child.join(HANGS)
        return [child.exitcode for child in started], (place / "log").read_text()

    return to_the_end


@pytest.fixture(scope="module")
def alone(ranks, place):  # noqa: F811
    """alone(run): the out_dir of one process."""
    made = {}

    def out_dir(name, **options):
        key = (name, *sorted(options.items()))
        if key not in made:
            folder = f"alone{len(made)}"
            codes, said = ranks(name, 1, "none", folder, **options)
            assert codes == [0], said
            made[key] = place / folder
        return made[key]

    return out_dir


def weights(out_dir) -> dict:
    (file,) = out_dir.glob("*.safetensors")
    return load_file(file)


def assert_learnt_alike(first, second, far=FAR) -> None:
    """Metrics to six digits or a rounding, weights to `far`."""
    ours = lines(first / "metrics.jsonl")
    theirs = lines(second / "metrics.jsonl")
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=2e-4, abs=2e-6)
    ours = weights(first)
    theirs = weights(second)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= far, name


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "name, size", [("grpo", 2), ("grpo", 4), ("grpo_lora", 2), ("sft_adamw", 2), ("sft_adamw", 4)]
)
def test_several_processes_learn_what_one_learns(ranks, alone, place, name, size, kind):  # noqa: F811
    options = {}
    if name == "sft_adamw":
        name = "sft"
        options = {"optimizer": "adamw", "learning_rate": 1e-3}
    out_dir = f"{kind}{size}-{next(NAMES)}"
    codes, said = ranks(name, size, kind, out_dir, **options)
    assert codes == [0] * size, said
    assert said.count("step    7") == 1, "one of them prints"
    assert_learnt_alike(place / out_dir, alone(name, **options))
    if name != "sft":
        recorded = lines(place / out_dir / "rollouts.jsonl")
        assert [row["ids"] for row in recorded] == [
            row["ids"] for row in lines(alone(name) / "rollouts.jsonl")
        ]

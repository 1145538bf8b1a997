"""A run that is killed 20 times and goes on each time, beside the same run that nobody disturbs.

    python bench/resume.py                                # GRPO, full weights: five minutes
    python bench/resume.py --tune=lora
    python bench/resume.py --script=sft
    python bench/resume.py --model=out/calc_sft --kills=40  # a model that calls its tool

Every life is a new process of train_grpo.py (train_sft.py) with --resume=true, killed with SIGKILL
at a moment drawn by `seed`: as it starts, in the middle of a step, and in at least a quarter of all
lives while a checkpoint is being written, which is every second step. Where the kills fall is
spread over the run. All that has a state is switched on: groups that are replaced (so the cursor is
not step x P), several updates a batch, KL to a reference, moments, warm-up and cosine schedule; for
SFT Muon beside AdamW, validation, and several passes over the rows.

Compared at the end, bit for bit: metrics.jsonl and rollouts.jsonl without times, the weights, and
in the last checkpoint also optimizer, data cursor and random generators. Exit code 1 if anything
differs.
"""

import atexit
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)

import torch

from run import page as run_page
from run.config import HERE, UserError


@dataclass
class Config:
    script: Literal["grpo", "sft"] = "grpo"
    tune: Literal["full", "lora"] = "full"
    model: str = ""  # a folder or hub id; "" = a tiny one, made here
    steps: int = 30
    kills: int = 20
    seed: int = 0  # of the moments


# The reward differs between samples whatever a model says; by its marks we see how far a step is.
REWARD = """
from pathlib import Path

def coin(trajectory, example):
    with open(Path(__file__).with_name("scored"), "a") as file:
        file.write(".")
    return float(sum(trajectory.ids) % 3 == 0)
"""
WARM = {"model": "tiny", "rows": 512, "optimizer": "muon", "learning_rate": 1e-2}
BATCH, ROWS, HELD_OUT = 8, 100, 16  # of the SFT


def settings(cfg: Config, place: Path, model: str) -> dict:
    """What the run is given, out_dir excepted."""
    values = {"model": model, "save_every": 2, "schedule": "cosine", "warmup": 5}
    values |= {"weight_decay": 0.1, "tune": cfg.tune}
    rate = 1e-3
    if cfg.tune == "lora":
        values, rate = values | {"lora_r": 8, "lora_alpha": 16}, 1e-2
    if cfg.script == "sft":
        optimizer = "muon" if cfg.tune == "full" else "adamw"
        return values | {
            "rows": ROWS + HELD_OUT,
            "val_rows": HELD_OUT,
            "val_every": 5,
            "batch_size": BATCH,
            "epochs": cfg.steps * BATCH / ROWS,
            "optimizer": optimizer,
            "learning_rate": rate,
        }
    return values | {
        "steps": cfg.steps,
        "limit": 50,
        "rewards": f"{place / 'coin.py'}:coin",
        "prompts_per_step": 3,
        "group_size": 4,
        "max_tokens": 400,
        "max_new_tokens": 32,
        "max_turns": 2,
        "dynamic_sampling": "coin",
        "updates_per_batch": 2,
        "minibatches": 2,
        "beta": 0.02,
        "learning_rate": rate,
    }


class Life:
    """A process of the run, watched from outside: by its lines, its files, and nothing else."""

    def __init__(self, script: str, values: dict, place: Path):
        argv = [sys.executable, HERE / f"train_{script}.py"]
        argv += [f"--{key}={value}" for key, value in values.items()]
        self.place, self.log = place, place / "log"
        self.aside = Path(values["out_dir"]) / "checkpoints" / "aside"
        self.born = time.monotonic()
        with open(self.log, "wb") as output:  # its own process group: we end that, and nobody else
            self.process = subprocess.Popen(
                argv, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        atexit.register(self.end)  # it must not outlive us

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def read(self) -> None:
        """What is known of it now: whether its steps have begun, the first, the next."""
        lines = self.log.read_text().splitlines()
        going = [line for line in lines if line.startswith("going on with step")]
        steps = [int(line.split()[1]) for line in lines if line.startswith("step ")]
        self.begun = bool(going)
        self.first = int(going[0].split()[-1]) if going else 0
        self.next = steps[-1] + 1 if steps else self.first

    def wait(self, what) -> None:
        """Until what() is true, or it has ended."""
        while not self.ended:
            self.read()
            if what():
                return
            time.sleep(0.002)

    def end(self) -> None:
        if not self.ended:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def scored(place: Path) -> int:
    return (place / "scored").stat().st_size if (place / "scored").exists() else 0


def undisturbed(cfg: Config, values: dict, place: Path) -> dict:
    """Runs to the end; returns how many seconds its parts take."""
    life = Life(cfg.script, values | {"resume": "true"}, place)
    life.wait(lambda: life.begun)
    start, writing, appeared = time.monotonic() - life.born, [], None
    while not life.ended:
        there = life.aside.exists()
        if there and appeared is None:
            appeared = time.monotonic()
        elif appeared is not None and not there:
            writing.append(time.monotonic() - appeared)
            appeared = None
        time.sleep(0.001)
    if life.process.returncode:
        raise UserError(f"the run itself does not work:\n{life.log.read_text()}")
    steps = [row["seconds"] for row in run_page.read(Path(values["out_dir"]) / "metrics.jsonl")]
    writing = statistics.median(writing)
    return {"start": start, "step": statistics.median(steps), "checkpoint": writing}


def kill_one(cfg, values, place, kind: str, target: int, seconds: dict, rng) -> tuple[str, Life]:
    """One life, ended in about step `target` as `kind` says; returns (where it was, the life)."""
    life = Life(cfg.script, values | {"resume": "true"}, place)
    delay, marks = rng.uniform(0, 0.8 * seconds[kind]), scored(place)
    if kind == "start":
        life.wait(lambda: life.begun or time.monotonic() > life.born + delay)
    else:
        life.wait(lambda: life.begun and life.next >= target)
        marks = scored(place)
        if kind == "checkpoint":
            life.wait(life.aside.exists)
        time.sleep(delay)
    life.end()
    life.read()
    if life.process.returncode != -signal.SIGKILL:
        raise UserError(f"it ended before it was killed:\n{life.log.read_text()}")
    if not life.begun:
        where = "start-up"
    elif life.aside.exists():
        where = "checkpoint write"
    elif cfg.script == "sft":
        where = "step"
    else:
        where = "step, rewards given" if scored(place) > marks else "step, sampling"
    return where, life


def disturbed(cfg: Config, values: dict, place: Path, seconds: dict) -> tuple[Counter, int]:
    """Kills and resumes, and at last lets it end; returns (kills by where they fell, how many
    steps were made more than once)."""
    rng, found, redone, before = random.Random(cfg.seed), Counter(), 0, 0
    for i in range(cfg.kills):
        kind = rng.choice(("start", "step", "step"))
        if found["checkpoint write"] <= 0.3 * i:  # a write is short, and may be over when we kill
            kind = "checkpoint"
        target = i * (cfg.steps - 2) // cfg.kills
        where, life = kill_one(cfg, values, place, kind, target, seconds, rng)
        found[where] += 1
        if life.begun:
            redone, before = redone + before - life.first, life.next
        print(f"kill {i + 1:2d}: {where:20} steps {life.first} to {life.next}", flush=True)
    life = Life(cfg.script, values | {"resume": "true"}, place)
    life.process.wait()
    life.read()
    if life.process.returncode:
        raise UserError(f"it could not go on:\n{life.log.read_text()}")
    return found, redone + before - life.first


def untimed(value):
    if isinstance(value, dict):
        return {key: untimed(inner) for key, inner in value.items() if "seconds" not in key}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


def digest_of(value) -> str:
    """Of a nested state: the bits of its tensors, and the repr of all else."""
    seen = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            seen.update(f"{value.dtype} {tuple(value.shape)}".encode())
            seen.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, (dict, list, tuple)):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in pairs:
                seen.update(f"{key!r}:".encode())
                add(inner)
        else:
            seen.update(repr(value).encode())

    add(value)
    return seen.hexdigest()[:16]


def left_by(out_dir: Path) -> dict:
    """{what is compared: its digest}."""
    names = ["metrics.jsonl"] + ["rollouts.jsonl"] * (out_dir / "rollouts.jsonl").exists()
    left = {}
    for name in names:
        rows = [untimed(json.loads(line)) for line in (out_dir / name).read_text().splitlines()]
        left[f"{name}, {len(rows)} lines"] = digest_of(rows)
    (weights,) = out_dir.glob("*.safetensors")
    left[weights.name] = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    newest = max((out_dir / "checkpoints").glob("step-*"))
    state = torch.load(newest / "state.pt")
    state["metrics"] = untimed(state["metrics"])
    for key, value in state.items():
        left[f"{newest.name}: {key}"] = digest_of(value)
    return left


def parting(one: Path, other: Path) -> str:
    """The first step whose metrics differ, and in what."""
    pair = (run_page.read(folder / "metrics.jsonl") for folder in (one, other))
    for first, second in zip(*pair, strict=False):
        keys = [key for key in first if "seconds" not in key and first[key] != second.get(key)]
        if keys:
            return f"step {first['step']}: " + ", ".join(
                f"{key} {first[key]} and {second.get(key)}" for key in keys
            )
    return "in no step's metrics"


def code() -> list[bytes]:
    """What every life reads anew, so that it must not change meanwhile."""
    patterns = "*.py", "tools/*.py", "tasks/*.py"
    return [file.read_bytes() for pattern in patterns for file in sorted(HERE.glob(pattern))]


def main(argv: list[str]) -> None:
    cfg, started, before = config.parse(Config, argv), time.monotonic(), code()
    config.require_positive(cfg, "steps kills")
    with tempfile.TemporaryDirectory() as folder:
        place, model = Path(folder), cfg.model
        (place / "coin.py").write_text(REWARD)
        if not model:
            model = str(place / "warm")
            warm = Life("sft", WARM | {"out_dir": model}, place)
            if warm.process.wait():
                raise UserError(f"the warm start does not work:\n{warm.log.read_text()}")
        values = settings(cfg, place, model)
        first, second = (values | {"out_dir": str(place / name)} for name in ("whole", "killed"))
        seconds = undisturbed(cfg, first, place)
        said = ", ".join(f"a {name} takes {value:.2f}" for name, value in seconds.items())
        print(f"seconds: {said}", flush=True)
        found, redone = disturbed(cfg, second, place, seconds)
        one, other = left_by(place / "whole"), left_by(place / "killed")
        where_they_part = parting(place / "whole", place / "killed")

    if code() != before:
        raise UserError("a script was edited while this ran: the lives are not of one program")
    what = f"{cfg.script}, {cfg.tune}, {cfg.steps} steps"
    where = ", ".join(f"{count} {name}" for name, count in found.most_common())
    print(f"\n{what}, {found.total()} kills: {where}; {redone} steps made again")
    print(f"\n| {'':30} | undisturbed      | killed           | equal |\n|---|---|---|---|")
    names = list(dict.fromkeys([*one, *other]))
    differ = [name for name in names if one.get(name) != other.get(name)]
    for name in names:
        pair = f"{one.get(name, 'missing'):16} | {other.get(name, 'missing'):16}"
        print(f"| {name:30} | {pair} | {'NO' if name in differ else 'yes':5} |")
    print(f"\nminutes: {(time.monotonic() - started) / 60:.1f}")
    if differ:
        print(f"they part in {where_they_part}")
        sys.exit(1)


if __name__ == "__main__":
    config.main(main)

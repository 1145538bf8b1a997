"""A run that is killed 20 times and goes on each time, beside the same run that nobody disturbs.

    python bench/resume.py                                # GRPO, full weights: five minutes
    python bench/resume.py --tune=lora
    python bench/resume.py --script=sft
    python bench/resume.py --images=true --kills=5  # pictures in prompts, and from a tool
    python bench/resume.py --model=out/calc_sft --kills=40  # a model that calls its tool

Every life is a new process of train_grpo.py (train_sft.py) with --resume=true, killed with SIGKILL
at a moment drawn by `seed`: as it starts, in the middle of a step, and in at least a quarter of all
lives while a checkpoint is being written, which is every second step. Where the kills fall is
spread over the run. All that has a state is switched on: groups that are replaced (so the cursor is
not step x P), several updates a batch, KL to a reference, moments, warm-up and cosine schedule; for
SFT Muon beside AdamW, validation, and several passes over the rows.

With images, the model is one of Qwen3-VL's architecture with random weights, taught a little to
call the tool that shows the left half of its picture.

Compared at the end, bit for bit: metrics.jsonl and rollouts.jsonl without times, the images of the
rollouts, the weights, and in the last checkpoint also optimizer, data cursor and random generators.
Exit code 1 if anything differs.
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
    images: bool = False  # pictures in prompts and demonstrations, and from a tool
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
LOOK = '''
class look:
    def __init__(self, example):
        self.images = example["images"]

    def __call__(self):
        """Shows the left half of the image."""
        picture = self.images[-1].original
        return picture.crop((0, 0, (picture.width + 1) // 2, picture.height))
'''
PICTURES = 24
WARM = {"model": "tiny", "rows": 512, "optimizer": "muon", "learning_rate": 1e-2}
# of the SFT
BATCH_SIZE = 8
ROWS = 100
HELD_OUT_ROWS = 16


def make_pictures(place: Path) -> dict:
    """Makes a model that sees, pictures, prompts.jsonl, demos.jsonl and the tool look; returns what
    a warm start is given."""
    sys.path.insert(0, str(HERE / "tests"))
    import eyes

    (place / "look.py").write_text(LOOK)
    eyes.folder_of("qwen3_vl", place / "random")
    prompts = []
    demos = []
    for number in range(ROWS + HELD_OUT_ROWS):
        name = f"{number % PICTURES}.png"
        eyes.picture(number % PICTURES, 40 + number % PICTURES, 40).save(place / name)
        question = {"role": "user", "content": "What is <image>?"}
        call = {"function": {"name": "look", "arguments": {}}}
        turns = [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "image 2:<image>"},
            {"role": "assistant", "content": f"It is {number % PICTURES}."},
        ]
        prompts.append({"prompt": [question], "images": [name], "answer": "4"})
        demos.append({"messages": [question, *turns], "images": [name, name]})
    for name, rows in (("prompts", prompts), ("demos", demos)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (place / f"{name}.jsonl").write_text(text)
    return {
        "model": str(place / "random"),
        "data": str(place / "demos.jsonl"),
        "tools": f"{place / 'look.py'}:look",
        "epochs": 3,
        "batch_size": BATCH_SIZE,
        "optimizer": "muon",
        "learning_rate": 1e-2,
    }


def settings(cfg: Config, place: Path, model: str) -> dict:
    """Returns what the run is given, out_dir excepted."""
    values = {
        "model": model,
        "save_every": 2,
        "schedule": "cosine",
        "warmup": 5,
        "tune": cfg.tune,
        "learning_rate": 1e-3,
    }
    if cfg.images:
        data = "demos.jsonl" if cfg.script == "sft" else "prompts.jsonl"
        values |= {"data": str(place / data), "tools": f"{place / 'look.py'}:look"}
    if cfg.tune == "lora":
        values |= {"lora_r": 8, "lora_alpha": 16, "learning_rate": 1e-2}
    if cfg.script == "sft":
        return values | {
            "rows": ROWS + HELD_OUT_ROWS,
            "val_rows": HELD_OUT_ROWS,
            "val_every": 5,
            "batch_size": BATCH_SIZE,
            "weight_decay": 0.1,
            "epochs": cfg.steps * BATCH_SIZE / ROWS,
            "optimizer": "muon" if cfg.tune == "full" else "adamw",
        }
    return values | {
        "steps": cfg.steps,
        "limit": 50,
        "rewards": f"{place / 'coin.py'}:coin",
        "prompts_per_step": 3,
        "group_size": 4,
        "max_tokens": 1200 if cfg.images else 400,
        "max_new_tokens": 32,
        "max_turns": 2,
        "dynamic_sampling": "coin",
        "updates_per_batch": 2,
        "minibatches": 2,
        "beta": 0.02,
    }


class Life:
    """A process of the run, watched from outside: by its lines, its files, and nothing else."""

    def __init__(self, script: str, values: dict, place: Path):
        argv = [sys.executable, HERE / f"train_{script}.py"]
        argv += [f"--{key}={value}" for key, value in values.items()]
        self.log = place / "log"
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
        """Reads from its log whether its steps have begun, the first and the next of them."""
        self.begun = False
        self.first = 0
        self.next = 0
        for line in self.log.read_text().splitlines():
            if line.startswith("going on with step"):
                self.begun = True
                self.first = int(line.split()[-1])
                self.next = self.first
            elif line.startswith("step "):
                self.next = int(line.split()[1]) + 1

    def wait(self, condition) -> None:
        """Waits until condition() is true, or it has ended."""
        while not self.ended:
            self.read()
            if condition():
                return
            time.sleep(0.002)

    def end(self) -> None:
        """Kills it with whatever it has started."""
        if not self.ended:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def count_scored(place: Path) -> int:
    """Counts the trajectories that the reward has seen, in all lives."""
    marks = place / "scored"
    return marks.stat().st_size if marks.exists() else 0


def undisturbed(cfg: Config, values: dict, place: Path) -> dict:
    """Runs to the end; returns how many seconds its parts take."""
    life = Life(cfg.script, values | {"resume": "true"}, place)
    life.wait(lambda: life.begun)
    start = time.monotonic() - life.born  # seconds
    writing = []  # seconds of each checkpoint
    appeared = None  # when the checkpoint that is being written was begun
    while not life.ended:
        is_writing = life.aside.exists()
        if is_writing and appeared is None:
            appeared = time.monotonic()
        elif appeared is not None and not is_writing:
            writing.append(time.monotonic() - appeared)
            appeared = None
        time.sleep(0.001)
    if life.process.returncode:
        raise UserError(f"the run itself does not work:\n{life.log.read_text()}")
    steps = [row["seconds"] for row in run_page.read(Path(values["out_dir"]) / "metrics.jsonl")]
    return {
        "start": start,
        "step": statistics.median(steps),
        "checkpoint": statistics.median(writing),
    }


def kill_one(cfg, values, place, kind: str, target: int, seconds: dict, rng) -> tuple[str, Life]:
    """Starts a life and kills it in about step `target` as `kind` says; returns (where it was, the
    life)."""
    life = Life(cfg.script, values | {"resume": "true"}, place)
    delay = rng.uniform(0, 0.8 * seconds[kind])
    scored_before = count_scored(place)
    if kind == "start":
        life.wait(lambda: life.begun or time.monotonic() > life.born + delay)
    else:
        life.wait(lambda: life.begun and life.next >= target)
        scored_before = count_scored(place)
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
    elif count_scored(place) > scored_before:
        where = "step, rewards given"
    else:
        where = "step, sampling"
    return where, life


def disturbed(cfg: Config, values: dict, place: Path, seconds: dict) -> tuple[Counter, int]:
    """Kills and resumes, and at last lets it end; returns (kills by where they fell, how many
    steps were made more than once)."""
    rng = random.Random(cfg.seed)
    kills = Counter()  # where: how many
    redone = 0  # steps
    reached = 0  # the step that the last life would have made next
    for i in range(cfg.kills):
        kind = rng.choice(("start", "step", "step"))
        if kills["checkpoint write"] <= 0.3 * i:  # a write is short, and may be over when we kill
            kind = "checkpoint"
        target = i * (cfg.steps - 2) // cfg.kills
        where, life = kill_one(cfg, values, place, kind, target, seconds, rng)
        kills[where] += 1
        if life.begun:
            redone += reached - life.first
            reached = life.next
        print(f"kill {i + 1:2d}: {where:20} steps {life.first} to {life.next}", flush=True)
    life = Life(cfg.script, values | {"resume": "true"}, place)
    life.process.wait()
    life.read()
    if life.process.returncode:
        raise UserError(f"it could not go on:\n{life.log.read_text()}")
    return kills, redone + reached - life.first


def untimed(value):
    """Returns a nested value without its times."""
    if isinstance(value, dict):
        return {key: untimed(inner) for key, inner in value.items() if "seconds" not in key}
    if isinstance(value, list):
        return [untimed(inner) for inner in value]
    return value


def digest_of(value) -> str:
    """Digests a nested state: the bits of its tensors, and the repr of all else."""
    digest = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, (dict, list, tuple)):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in pairs:
                digest.update(f"{key!r}:".encode())
                add(inner)
        else:
            digest.update(repr(value).encode())

    add(value)
    return digest.hexdigest()[:16]


def left_by(out_dir: Path) -> dict:
    """Returns {a name of what is compared: its digest}."""
    left = {}
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        if not (out_dir / name).exists():  # SFT writes no rollouts
            continue
        rows = [untimed(json.loads(line)) for line in (out_dir / name).read_text().splitlines()]
        left[f"{name}, {len(rows)} lines"] = digest_of(rows)
    files = sorted((out_dir / "images").glob("*"))
    if files:
        contents = {file.name: file.read_bytes() for file in files}
        left[f"images, {len(files)} files"] = digest_of(contents)
    (weights,) = out_dir.glob("*.safetensors")
    left[weights.name] = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    newest = max((out_dir / "checkpoints").glob("step-*"))
    state = torch.load(newest / "state.pt")
    state["metrics"] = untimed(state["metrics"])
    for key, value in state.items():
        left[f"{newest.name}: {key}"] = digest_of(value)
    return left


def first_difference(whole: Path, killed: Path) -> str:
    """Says in which step the metrics of two runs differ first, and in what."""
    rows = run_page.read(whole / "metrics.jsonl")
    other_rows = run_page.read(killed / "metrics.jsonl")
    for row, other in zip(rows, other_rows, strict=False):
        differences = []
        for key, value in row.items():
            if "seconds" not in key and value != other.get(key):
                differences.append(f"{key} {value} and {other.get(key)}")
        if differences:
            return f"step {row['step']}: " + ", ".join(differences)
    return "no step's metrics"


def code() -> dict[str, bytes]:
    """Reads what every life reads anew, so that it must not change meanwhile: the scripts, and all
    modules below the folders that they import from."""
    files = list(HERE.glob("*.py"))
    for room in ("run", "formats", "tasks", "learning", "engines", "tools", "grading"):
        files += (HERE / room).rglob("*.py")
    return {str(file): file.read_bytes() for file in files}


def main(argv: list[str]) -> None:
    cfg = config.parse(Config, argv)
    config.require_positive(cfg, "steps kills")
    if cfg.model and cfg.images:
        raise UserError("model has no effect with images: the one that is made here sees")
    started = time.monotonic()
    code_before = code()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = cfg.model
        (place / "coin.py").write_text(REWARD)
        if not model:
            model = str(place / "warm")
            warmth = make_pictures(place) if cfg.images else WARM
            warm = Life("sft", warmth | {"out_dir": model}, place)
            if warm.process.wait():
                raise UserError(f"the warm start does not work:\n{warm.log.read_text()}")
        values = settings(cfg, place, model)
        whole_dir = place / "whole"
        killed_dir = place / "killed"
        seconds = undisturbed(cfg, values | {"out_dir": str(whole_dir)}, place)
        parts = ", ".join(f"a {name} takes {value:.2f}" for name, value in seconds.items())
        print(f"seconds: {parts}", flush=True)
        kills, redone = disturbed(cfg, values | {"out_dir": str(killed_dir)}, place, seconds)
        whole = left_by(whole_dir)
        killed = left_by(killed_dir)
        where_they_part = first_difference(whole_dir, killed_dir)

    if code() != code_before:
        raise UserError("a script was edited while this ran: the lives are not of one program")
    where = ", ".join(f"{count} {name}" for name, count in kills.most_common())
    pictures = ", with images" if cfg.images else ""
    print(f"\n{cfg.script}, {cfg.tune}{pictures}, {cfg.steps} steps, ", end="")
    print(f"{kills.total()} kills: {where}; {redone} steps made again")
    print(f"\n| {'':30} | undisturbed      | killed           | equal |\n|---|---|---|---|")
    differs = False
    for name in dict.fromkeys([*whole, *killed]):
        equal = whole.get(name) == killed.get(name)
        differs = differs or not equal
        pair = f"{whole.get(name, 'missing'):16} | {killed.get(name, 'missing'):16}"
        print(f"| {name:30} | {pair} | {'yes' if equal else 'NO':5} |")
    print(f"\nminutes: {(time.monotonic() - started) / 60:.1f}")
    if differs:
        print(f"they part in {where_they_part}")
        sys.exit(1)


if __name__ == "__main__":
    config.main(main)

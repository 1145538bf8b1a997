"""Checkpoints that a run goes on from as if nothing had happened.

    run = Run(cfg)                              # out_dir: new, or with resume=true the one there is
    state = run.restore(model, optimizers)      # {} at the beginning
    with run:                                   # Ctrl-C and SIGTERM are noted, not raised
        for step in range(state.get("step", 0), cfg.steps):
            ...
            run.after(step + 1, cfg.steps, model, tokenizer, optimizers, log, cursor=cursor)

out_dir/checkpoints/step-000050/ is a model folder (or an adapter's), as evaluate.py and
transformers load it, and beside it state.pt: the trained weights bit for bit, the optimizers, every
random generator and what `after` was given. It is written aside, synced to the disk and renamed, so
a checkpoint is there whole or not at all; digests.json tells one whose bytes were damaged later.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import threading
from pathlib import Path

import numpy
import torch

from learning import model as models
from run import config
from run.config import UserError

# What may differ when a run goes on. Only steps and epochs change what is learnt, and only where
# the schedule falls towards the last step: a run that is made longer falls more slowly from there.
FREE = {"resume", "steps", "epochs", "save_every", "logger", "max_concurrent", "urls"}
FREE |= {"token_budget", "gradient_checkpointing", "gpu_memory_utilization", "tool_concurrency"}
FREE |= {"eval_every", "eval_data", "eval_rows"}  # they are looked at, not learnt
KEEP_LAST = 2  # checkpoints; each takes three times the memory of what is trained


class Run:
    """The out_dir of one run and its checkpoints. While entered, the first SIGTERM or Ctrl-C is
    only noted in `signal`, so that the step is finished and saved; a second one ends it at once."""

    def __init__(self, cfg):
        self.cfg, self.out_dir = cfg, Path(cfg.out_dir)
        self.folder, self.saved, self.signal = self.out_dir / "checkpoints", None, None
        if cfg.resume:  # killed while config.save wrote it
            Path(f"{self.out_dir / 'config.py'}.aside").unlink(missing_ok=True)
        if cfg.resume and (self.out_dir / "config.py").is_file():
            _compare(cfg, self.out_dir / "config.py")
            if not self._steps() and any(self.out_dir.glob("*.safetensors")):
                raise UserError(
                    f"out_dir '{self.out_dir}' has a trained model and no checkpoint to go on "
                    "from: give another with --out_dir=…"
                )
        else:  # nothing was learnt yet: killed before its first second was over, or never begun
            way_out = "one where a run was begun" if cfg.resume else "go on with --resume=true"
            config.fresh_dir(cfg.out_dir, way_out)

    def restore(self, model, optimizers: list) -> dict:
        """Weights, optimizers and random generators of the newest whole checkpoint; returns what
        `save` was given and its "step", or {}. Call it last before the first step."""
        self._alone()
        config.save(dataclasses.replace(self.cfg, resume=False), self.out_dir / "config.py")
        shutil.rmtree(self.folder / "aside", ignore_errors=True)  # killed while it was written
        found = self._steps() if self.cfg.resume else []
        for path in map(self._path, reversed(found)):
            if damaged := _damaged(path):
                print(f"{path} is damaged ({damaged}): looking for an older one", file=sys.stderr)
                continue
            state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
            _restore_weights(model, state.pop("weights"), path)
            for optimizer, values in zip(optimizers, state.pop("optimizers"), strict=True):
                optimizer.load_state_dict(values)
            _set_generators(state.pop("generators"))
            self.saved = state["step"]
            return state
        if found:
            raise UserError(f"none of the checkpoints in {self.folder} is whole: remove them")
        random.seed(self.cfg.seed)  # killed before it first saves, it begins again alike
        numpy.random.seed(self.cfg.seed % 2**32)
        torch.manual_seed(self.cfg.seed)
        return {}

    def _alone(self) -> None:
        """UserError if another process trains in this out_dir: each would remove what the other
        writes. The lock goes with the process, however that ends."""
        self.lock = open(self.out_dir / config.LOCK, "w")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                return
            way_out = "wait for it, end it, or give another with --out_dir=…"
            raise UserError(
                f"out_dir '{self.out_dir}' is in use by another process: {way_out}"
            ) from None

    def after(self, step: int, steps: int, model, tokenizer, optimizers, log, **state) -> None:
        """To be called when `step` of `steps` are done: saves every save_every steps and at the
        end. A run that was told to stop is saved too, and ends with the exit code of its signal."""
        every, told = self.cfg.save_every, self.signal  # one that comes later is for the next step
        if told or step == steps or (every and step % every == 0):
            self.save(step, model, tokenizer, optimizers, log, **state)
        if told and step < steps:
            log.print(f"stopped after {step} of {steps} steps; go on with --resume=true")
            raise SystemExit(128 + told)

    @contextlib.contextmanager
    def rescue(self, step: int, model, tokenizer, optimizers, log, **state):
        """Around what does not change the weights: if it raises (a reward, an engine), the `step`
        steps that are done are saved first, beside what is saved already."""
        try:
            yield
        except Exception:
            trained = (p for p in model.parameters() if p.requires_grad)
            if step and all(p.isfinite().all() for p in trained):
                self.save(step, model, tokenizer, optimizers, log, prune=False, **state)
                log.print(f"saved {step} steps; go on with --resume=true")
            raise

    def save(self, step, model, tokenizer, optimizers: list, log, prune=True, **state) -> None:
        """Writes the checkpoint of `step`; of the older ones KEEP_LAST - 1 stay. UserError where it
        cannot be written: what was there before is there still."""
        if step == self.saved:
            return
        log.sync()  # never fewer lines of metrics than steps in a checkpoint
        aside, path = self.folder / "aside", self._path(step)
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        state |= {"step": step, "weights": trained, "generators": _generators()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        with _told(f"step {step} in {self.folder}"):
            try:
                self._write(aside, model, tokenizer, state)
                shutil.rmtree(path, ignore_errors=True)  # one that was damaged
                os.rename(aside, path)
                _sync(self.folder)
            except Exception:
                shutil.rmtree(aside, ignore_errors=True)
                raise
        self.saved = step
        # later ones are there only if they were damaged when this run went on
        kept = [s for s in self._steps() if s <= step][-KEEP_LAST:]
        for old in set(self._steps()) - set(kept) if prune else ():
            shutil.rmtree(self._path(old), ignore_errors=True)

    def finish(self, model, tokenizer) -> None:
        """Writes the model or adapter to out_dir, once the last step is saved."""
        with _told(f"the model in {self.out_dir}"):
            models.save(model, tokenizer, self.out_dir)

    def _write(self, aside: Path, model, tokenizer, state: dict) -> None:
        """All files of a checkpoint, on the disk for good."""
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        models.save(model, tokenizer, aside)
        with open(aside / "state.pt", "wb") as file:
            torch.save(state, file)
        digests = {str(f.relative_to(aside)): _digest(f) for f in _files(aside)}
        (aside / "digests.json").write_text(json.dumps(digests, indent=1))
        for file in [*_files(aside), aside]:
            _sync(file)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _steps(self) -> list[int]:
        """Of the checkpoints there are, in order."""
        numbers = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted(int(number) for number in numbers if number.isdecimal())

    def __enter__(self) -> "Run":
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():  # others may set no handler
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        print("finishing this step, then saving; once more to end at once", file=sys.stderr)


@contextlib.contextmanager
def _told(what: str):
    """UserError that says which writing failed: each writer has an error of its own for a full
    disk, and torch's says nothing of what it met."""
    try:
        yield
    except Exception as error:
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(
            f"cannot save {what} ({' '.join(str(cause).split())[:200]}): older checkpoints are "
            "whole, so make room and go on with --resume=true"
        ) from error


def _compare(cfg, file: Path) -> None:
    """UserError for a key that differs from the run's own in a way that changes what is learnt."""
    before = config.parse(type(cfg), ["--config", str(file)])
    for name in (f.name for f in dataclasses.fields(cfg)):
        old, new = getattr(before, name), getattr(cfg, name)
        if old != new and name not in FREE | {"out_dir"}:
            raise UserError(
                f"{name} = {new!r}, but the run in {cfg.out_dir} has {old!r}: give that, or begin "
                "another with --out_dir=…"
            )


def _restore_weights(model, weights: dict, path: Path) -> None:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = [{name: tuple(p.shape) for name, p in each.items()} for each in (trained, weights)]
    if shapes[0] != shapes[1]:
        odd = min(name for name, _ in shapes[0].items() ^ shapes[1].items())
        ours, theirs = (each.get(odd, "missing") for each in shapes)
        raise UserError(
            f"{path} is of another model: {odd} is {ours} in this one and {theirs} there; give the "
            "model that the run began with, or another out_dir"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])


def _generators() -> dict:
    kind, keys, *rest = numpy.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def _set_generators(states: dict) -> None:
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _damaged(path: Path) -> str:
    """What is wrong with a checkpoint's files, "" if nothing."""
    try:
        for name, digest in json.loads((path / "digests.json").read_text()).items():
            if _digest(path / name) != digest:
                return f"{name} has other bytes than were written"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return ""


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)

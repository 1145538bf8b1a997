"""Checkpoints that a run goes on from as if nothing had happened.

    run = Run(cfg)                              # out_dir: new, or with resume=true the one there is
    state = run.restore(model, optimizers)      # {} at the beginning
    run.try_saving(model, tokenizer)            # what cannot be saved is not trained
    with run:                                   # Ctrl-C, SIGTERM and SIGHUP are noted, not raised
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
import shlex
import shutil
import signal
import sys
import threading
from pathlib import Path

import numpy
import torch

from learning import model as models
from learning import parallel
from run import config, mix
from run.config import UserError

# What may differ when a run goes on. Only steps and epochs change what is learnt, and only where
# the schedule falls towards the last step: a run that is made longer falls more slowly from there.
FREE = {"resume", "steps", "epochs", "save_every", "logger", "max_concurrent", "urls"}
FREE |= {"token_budget", "gradient_checkpointing", "gpu_memory_utilization", "tool_concurrency"}
FREE |= {"eval_every", "eval_data", "eval_rows"}  # they are looked at, not learnt
FREE |= {"parallel", "gpus", "offload"}  # all ranks together learn what one process would
NOT_DETERMINISTIC = "deterministic=false"  # the one engine option that changes what is learnt
# All that a run may leave that ends before its first step is over.
START = {*config.BEFORE, "config.py", "metrics.jsonl", "rollouts.jsonl", "checkpoints"}
START |= {"report.html", "wandb", "wandb_id.txt", "tensorboard", "weights"}
KEEP_LAST = 2  # checkpoints; each takes three times the memory of what is trained


class Run:
    """The out_dir of one run and its checkpoints. While entered, the first SIGTERM, Ctrl-C or
    SIGHUP (the terminal is gone) is only noted in `signal`, so that the step is finished and saved;
    a second one ends it at once.

    cfg: a flat dataclass with out_dir, resume, seed and save_every; all of it is written to
    out_dir/config.py, and compared with what is there. keep_last: how many checkpoints stay."""

    def __init__(self, cfg, keep_last: int = KEEP_LAST):
        self.cfg = cfg
        self.keep_last = keep_last
        self.out_dir = Path(cfg.out_dir)
        self.folder = self.out_dir / "checkpoints"
        self.saved: int | None = None  # the last step in a checkpoint
        self.signal: int | None = None  # the one that told it to stop
        self.handlers = {}  # signal: who handled it before
        self.lock = None  # the open file that is locked, from `restore` on
        parallel.by_first(self._check_out_dir)
        self.sources = mix.fingerprint(cfg)  # of a mix

    def _check_out_dir(self) -> None:
        """Checks that this run may write to out_dir. UserError if not."""
        cfg = self.cfg
        config_file = self.out_dir / "config.py"
        if cfg.resume:  # killed while config.save wrote it
            Path(f"{config_file}.aside").unlink(missing_ok=True)
        if not cfg.resume and holds_only_a_start(cfg):
            return  # of a run that ended before its first step: this one takes its place
        if cfg.resume and config_file.is_file():
            _check_same_config(cfg, config_file)
            if not self._steps() and any(self.out_dir.glob("*.safetensors")):
                raise UserError(
                    f"out_dir '{self.out_dir}' has a trained model and no checkpoint to go on "
                    "from: give another with --out_dir=…"
                )
        else:  # nothing was learnt yet: killed before its first second was over, or never begun
            way_out = "one where a run was begun" if cfg.resume else "go on with --resume=true"
            config.fresh_dir(cfg.out_dir, way_out)

    # -- before the first step

    def restore(self, model, optimizers: list) -> dict:
        """Restores weights, optimizers and random generators from the newest whole checkpoint;
        returns what `save` was given and its "step", or {}. Call it last before the first step."""
        path = parallel.by_first(self._begin)
        if path:
            state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
            _check_same_sources(self.cfg, self.sources, state.pop("sources", {}))
            _restore_weights(model, state.pop("weights"), path)
            for optimizer, values in zip(optimizers, state.pop("optimizers"), strict=True):
                optimizer.load_state_dict(parallel.cut_state(optimizer, values))
            _set_generators(state.pop("generators"))
            self.saved = state["step"]
            parallel.by_first(self._remove_older)  # killed between saving and removing
            return state

        # killed before it first saves, it begins again alike
        random.seed(self.cfg.seed)
        numpy.random.seed(self.cfg.seed % 2**32)
        torch.manual_seed(self.cfg.seed)
        return {}

    def _begin(self) -> Path | None:
        """Takes out_dir, writes config.py to it; returns the newest whole checkpoint, if any."""
        self._lock()
        if not self.cfg.resume and (self._steps() or _has_metrics(self.out_dir)):
            raise UserError(
                f"out_dir '{self.out_dir}' was used by another run meanwhile: give another with "
                "--out_dir=…, or go on with --resume=true"
            )
        with _say_if_not_written(self.out_dir):
            config.save(dataclasses.replace(self.cfg, resume=False), self.out_dir / "config.py")
        shutil.rmtree(self.folder / "aside", ignore_errors=True)  # killed while it was written
        steps = self._steps() if self.cfg.resume else []
        for step in reversed(steps):
            path = self._path(step)
            damage = damage_of(path)
            if damage:
                config.tell(f"{path} is damaged ({damage}): looking for an older one")
                continue
            return path
        if steps:
            raise UserError(f"none of the checkpoints in {self.folder} is whole: remove them")
        return None

    def try_saving(self, model, tokenizer) -> None:
        """Saves the model once and removes it, so that a run which could not save what it learns
        ends here and not behind its last step; UserError if so. Does nothing where a checkpoint
        proves it."""
        if self.saved is None:
            weights = parallel.state_of(model)
            parallel.by_first(self._try_saving, model, tokenizer, weights)

    def _try_saving(self, model, tokenizer, weights: dict | None) -> None:
        aside = self.folder / "aside"
        try:
            aside.mkdir(parents=True, exist_ok=True)
            models.save(model, tokenizer, aside, weights)
        except Exception as error:
            message = " ".join(str(error).split())[:300]
            raise UserError(
                f"what is trained could not be saved in {self.out_dir} ({message}): make room, or "
                f"mend the files of model = {self.cfg.model!r}"
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _lock(self) -> None:
        """Locks out_dir; raises UserError if another process trains there: each would remove what
        the other writes. The lock goes with the process, however that ends."""
        with _say_if_not_written(self.out_dir):
            self.lock = open(self.out_dir / config.LOCK, "w")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                return
            raise UserError(
                f"out_dir '{self.out_dir}' is in use by another process: wait for it, end it, or "
                "give another with --out_dir=…"
            ) from None

    # -- after each step

    def after(self, step: int, steps: int, model, tokenizer, optimizers, log, **state) -> None:
        """Saves, when `step` of `steps` are done, every save_every steps and at the end. A run that
        was told to stop is saved too, and ends with the exit code of its signal."""
        # read once: one that comes later is for the next step
        number = parallel.agreed(self.signal)
        every = self.cfg.save_every
        is_due = every > 0 and step % every == 0
        if number or is_due or step == steps:
            self.save(step, model, tokenizer, optimizers, log, **state)
        if number and step < steps:
            log.print(f"stopped after {step} of {steps} steps; go on with {self.command()}")
            raise SystemExit(128 + number)

    @contextlib.contextmanager
    def rescue(self, step: int, model, tokenizer, optimizers, log, **state):
        """Surrounds what does not change the weights: if it raises (a reward, an engine), the
        `step` steps that are done are saved first, beside what is saved already."""
        try:
            yield
        except Exception:
            trained = (p for p in model.parameters() if p.requires_grad)
            if step and all(p.isfinite().all() for p in trained):
                self.save(step, model, tokenizer, optimizers, log, prune=False, **state)
                log.print(f"saved {step} steps; go on with {self.command()}")
            raise

    def command(self) -> str:
        """Gives the command that goes on with this run: out_dir/config.py has all of its keys."""
        script = Path(sys.modules[type(self.cfg).__module__].__file__).resolve()
        if script.parent == Path.cwd():
            script = script.name
        config_file = self.out_dir / "config.py"
        command = ["python", str(script), "--config", str(config_file), "--resume=true"]
        return shlex.join(command)

    def save(self, step, model, tokenizer, optimizers: list, log, prune=True, **state) -> None:
        """Writes the checkpoint of `step`; of the older ones keep_last - 1 stay. Raises UserError
        where it cannot be written: what was there before is there still."""
        if step == self.saved:
            return
        # what is made only when it is saved
        state = {name: value() if callable(value) else value for name, value in state.items()}
        # of shards, what all ranks have of it
        trained = {name: p.detach() for name, p in _trained(model).items()}
        state["step"] = step
        state["sources"] = self.sources
        state["weights"] = parallel.joined(trained)
        state["generators"] = _generators()
        state["optimizers"] = [parallel.joined(one.state_dict()) for one in optimizers]
        weights = parallel.state_of(model)
        parallel.by_first(self._save, step, model, tokenizer, weights, log, state)
        self.saved = step
        if prune:
            parallel.by_first(self._remove_later)
            parallel.by_first(self._remove_older)

    def _save(self, step: int, model, tokenizer, weights: dict | None, log, state: dict) -> None:
        log.sync()  # never fewer lines of metrics than steps in a checkpoint
        aside = self.folder / "aside"
        path = self._path(step)
        with _say_if_not_saved(f"step {step} in {self.folder}"):
            try:
                _write(aside, model, tokenizer, weights, state)
                shutil.rmtree(path, ignore_errors=True)  # one that was damaged
                os.rename(aside, path)
                _sync(self.folder)
            except Exception:
                shutil.rmtree(aside, ignore_errors=True)
                raise

    def finish(self, model, tokenizer) -> None:
        """Writes the model or adapter to out_dir, once the last step is saved."""
        parallel.by_first(self._finish, model, tokenizer, parallel.state_of(model))

    def _finish(self, model, tokenizer, weights: dict | None) -> None:
        with _say_if_not_saved(f"the model in {self.out_dir}"):
            models.save(model, tokenizer, self.out_dir, weights)

    def _remove_later(self) -> None:
        """Removes checkpoints behind the newest one that was saved: they are there only if they
        were damaged when this run went on."""
        for step in self._steps():
            if step > self.saved:
                shutil.rmtree(self._path(step), ignore_errors=True)

    def _remove_older(self) -> None:
        """Removes old checkpoints so that keep_last stay, with the newest that was saved."""
        steps = [step for step in self._steps() if step <= self.saved]
        for step in steps[: -self.keep_last]:
            shutil.rmtree(self._path(step), ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _steps(self) -> list[int]:
        """Lists the steps that have a checkpoint, in order."""
        steps = []
        for path in self.folder.glob("step-*"):
            number = path.name.removeprefix("step-")
            if number.isdecimal():  # else it is a copy that somebody made
                steps.append(int(number))
        return sorted(steps)

    # -- signals

    def __enter__(self) -> "Run":
        if threading.current_thread() is threading.main_thread():  # others may set no handler
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is signal.SIG_IGN:
                    continue  # as nohup has it: that run is to outlive its terminal
                self.handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def _note(self, number, frame) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        # of a terminal that is gone nothing can be written, and that must not end the run
        with contextlib.suppress(OSError):
            config.tell("finishing this step, then saving; once more to end at once")


# -- an out_dir in which nothing was learnt


def holds_only_a_start(cfg) -> bool:
    """Says whether cfg.out_dir holds what a run of this script leaves that ends before its first
    step is over, and nothing that was learnt or that somebody else put there."""
    out_dir = Path(cfg.out_dir)
    config_file = out_dir / "config.py"
    if not config_file.is_file() or not os.access(out_dir, os.W_OK):
        return False
    if any(entry.name not in START for entry in out_dir.iterdir()):
        return False
    checkpoints = out_dir / "checkpoints"
    if checkpoints.exists() and any(path.name != "aside" for path in checkpoints.iterdir()):
        return False
    return config.is_saved(type(cfg), config_file) and not _has_metrics(out_dir)


def _has_metrics(out_dir: Path) -> bool:
    metrics = out_dir / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


# -- files


def _write(folder: Path, model, tokenizer, weights: dict | None, state: dict) -> None:
    """Writes all files of a checkpoint, and waits until they are on the disk for good. weights: of
    the model, where it has only shards itself."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    models.save(model, tokenizer, folder, weights)
    with open(folder / "state.pt", "wb") as file:
        torch.save(state, file)
    digests = {str(file.relative_to(folder)): _digest(file) for file in _files(folder)}
    (folder / "digests.json").write_text(json.dumps(digests, indent=1))
    for file in _files(folder):
        _sync(file)
    _sync(folder)


def damage_of(path: Path) -> str:
    """Says what is wrong with the files of a checkpoint, "" if nothing."""
    try:
        digests = json.loads((path / "digests.json").read_text())
        if "state.pt" not in digests:
            return "digests.json does not name state.pt"
        for name, digest in digests.items():
            if _digest(path / name) != digest:
                return f"{name} has other bytes than were written"
    # missing, torn, or no dict at all
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        return str(error)
    return ""


def unfinished(out_dir: Path) -> str:
    """Says why an out_dir does not hold what a run writes when it has ended: the model of its last
    checkpoint; "" if it does."""
    # 1. a run that is still going on
    lock = out_dir / config.LOCK
    if lock.is_file() and os.access(lock, os.W_OK):
        with open(lock, "r+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return "it is in use by another process: wait for it"

    # 2. one that was stopped or killed, or whose last files are torn
    go_on = "go on with --resume=true, which ends it"
    if not any(out_dir.glob("*.safetensors")):
        return f"it has not ended: {go_on}, or give one of its checkpoints"
    steps = sorted(path for path in (out_dir / "checkpoints").glob("step-*") if path.is_dir())
    if steps:
        damage = damage_of(steps[-1])
        if damage:
            return f"{steps[-1]} is damaged ({damage})"
        digests = json.loads((steps[-1] / "digests.json").read_text())
        for name, digest in digests.items():
            if name.endswith((".safetensors", ".safetensors.index.json")):
                file = out_dir / name
                if not file.is_file() or _digest(file) != digest:
                    return f"{file} is not that of {steps[-1]}: {go_on}, or give that checkpoint"
    return _torn(out_dir)


def _torn(folder: Path) -> str:
    """Names a file of weights that is cut off or missing, "" if there is none."""
    from safetensors import SafetensorError, safe_open

    names = {path.name for path in folder.glob("*.safetensors")}
    for index in folder.glob("*.safetensors.index.json"):
        try:
            names |= set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{index} cannot be read ({error})"
    for name in sorted(names):
        try:
            with safe_open(folder / name, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{folder / name} cannot be read ({error})"
    return ""


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _say_if_not_written(folder: Path):
    """Turns what a disk refuses at the start of a run into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to out_dir '{folder}' ({error.strerror}): give another with --out_dir=…"
        ) from error


@contextlib.contextmanager
def _say_if_not_saved(target: str):
    """Turns whatever is raised inside into a UserError that says what could not be saved: each
    writer has an error of its own for a full disk, and torch's says nothing of what it met."""
    try:
        yield
    except Exception as error:
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        message = " ".join(str(cause).split())[:200]
        raise UserError(
            f"cannot save {target} ({message}): older checkpoints are whole, so make room and go "
            "on with --resume=true"
        ) from error


# -- what has to be the same


def _check_same_config(cfg, file: Path) -> None:
    """Checks that no key differs from the run's own in a way that changes what is learnt."""
    before = config.parse(type(cfg), ["--config", str(file)])
    for field in dataclasses.fields(cfg):
        name = field.name
        old = getattr(before, name)
        new = getattr(cfg, name)
        if name == "engine_options":  # the others say how it runs: a timeout, room for a cache
            old = tuple(option for option in old if option == NOT_DETERMINISTIC)
            new = tuple(option for option in new if option == NOT_DETERMINISTIC)
        if old != new and name not in FREE and name != "out_dir":
            raise UserError(
                f"{name} = {new!r}, but the run in {cfg.out_dir} has {old!r}: give that, or begin "
                "another with --out_dir=…"
            )


def _check_same_sources(cfg, now: dict, before: dict) -> None:
    """Checks that no source of a mix says something else than when the run saved, and no file of
    rows holds others: it would go on with other prompts. {source: {key: value}}."""
    for name, values in before.items():  # the names are those of `mix`, which is the same
        for key, old in values.items():
            new = now[name].get(key)
            if new == old or key in FREE:
                continue
            said = f"{key} = {new!r}, but the run in {cfg.out_dir} has {old!r}"
            if key == mix.DIGEST:
                said = f"the file of its data has changed since the run in {cfg.out_dir} saved"
            raise UserError(f"{name}: {said}: give that, or begin another with --out_dir=…")


def _trained(model) -> dict:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _restore_weights(model, weights: dict, path: Path) -> None:
    """Copies the trained weights of the checkpoint `path` into the model; raises UserError, and
    changes nothing, where names or shapes are not the model's."""
    trained = _trained(model)
    for name in sorted(trained.keys() | weights.keys()):
        ours = tuple(trained[name].shape) if name in trained else "missing"
        theirs = tuple(weights[name].shape) if name in weights else "missing"
        if ours != theirs:
            raise UserError(
                f"{path} is of another model: {name} is {ours} in this one and {theirs} there; "
                "give the model that the run began with, or another out_dir"
            )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(parallel.cut_like(weights[name], parameter))


def _generators() -> dict:
    """Returns the states of all random generators, in types that torch.load reads safely."""
    kind, keys, *position = numpy.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *position),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def _set_generators(states: dict) -> None:
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    # on a machine with other GPUs those begin anew
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])

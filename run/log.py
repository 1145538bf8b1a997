"""What a run says and leaves behind: a line per step, metrics.jsonl, rollouts.jsonl, and drawn from
them curves.png and report.html, one page with the curves and the sampled rollouts token by token.

    python -m run.page out/calc    # draws both again, also while the run goes on or after a kill

    with Log("out/calc", steps=60, columns={"reward": "6.3f", "loss": "8.4f"}) as log:
        log.step({"step": 0, "reward": 0.5, "loss": 0.1})
        log.summary({"accuracy": 0.97})
"""

import contextlib
import dataclasses
import importlib
import json
import os
import resource
import secrets
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from run import page as run_page
from run.config import UserError, tell
from run.page import finite_numbers, is_of_step, row_of, six_digits
from trajectory import escaped, image_spans, token_kinds, token_texts

IMAGES = "images"  # the folder of those in rollouts.jsonl
LOGGERS = {"none": "", "wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}

# ---- progress


def progress() -> Progress:
    """Makes bars, which stand below the printed lines on a terminal; nothing in a log file."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(highlight=False, soft_wrap=True),
        transient=True,
        disable=not sys.stdout.isatty(),
    )


def counter(bars: Progress, task):
    """Returns what to call with each trajectory that is done: it advances the bar, and shows
    tokens/s and calls."""
    started = time.monotonic()
    tokens = 0
    calls = 0

    def done(trajectory) -> None:
        nonlocal tokens, calls
        tokens += trajectory.new_tokens
        calls += len(trajectory.calls)
        seconds = max(1e-6, time.monotonic() - started)
        note = f"{tokens / seconds:,.0f} tokens/s, {calls} tool calls"
        bars.update(task, advance=1, note=note)

    return done


# ---- loggers: what else is told the numbers of a step


def check_logger(name: str):
    """Imports the module of a logger, None for "none". UserError if it is missing: call this
    early."""
    if name not in LOGGERS:
        raise UserError(f"logger = {name!r}: expected one of {', '.join(LOGGERS)}")
    if name == "none":
        return None
    try:
        return importlib.import_module(LOGGERS[name])
    except ImportError as error:
        remedy = 'pip install -e ".[log]"'
        raise UserError(f"logger = {name!r} cannot be used ({error}): {remedy}") from None


def _open_logger(name: str, out_dir: Path, start: int, settings: dict | None):
    """Opens a logger; returns its write(numbers, step) and finish(exit_code)."""
    module = check_logger(name)
    if name == "wandb":
        return _open_wandb(module, out_dir, start, settings)
    if name == "tensorboard":
        return _open_tensorboard(module, out_dir, start)
    return (lambda numbers, step: None), (lambda exit_code: None)


def _open_wandb(module, out_dir: Path, start: int, settings: dict | None):
    id_file = out_dir / "wandb_id.txt"  # a resumed run goes on in the same wandb run
    if start == 0 or not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    run = module.init(
        config=settings,
        id=id_file.read_text(),
        resume="allow",
        allow_val_change=True,
        project=os.environ.get("WANDB_PROJECT", "nanotool"),
        name=out_dir.name,
        dir=str(out_dir),
    )

    def write(numbers: dict, step: int) -> None:
        run.log(numbers, step=step)

    return write, run.finish


def _open_tensorboard(module, out_dir: Path, start: int):
    # purge_step hides what was written at and after `start` before a kill.
    writer = module.SummaryWriter(str(out_dir / "tensorboard"), purge_step=start)

    def write(numbers: dict, step: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
        writer.flush()  # on disk with its step, as metrics.jsonl is: a kill loses nothing

    def finish(exit_code: int) -> None:
        writer.close()

    return write, finish


# ---- the log of a run


class Log:
    """Holds the open metrics file and the progress bar of one run. On a terminal the bar stays
    below the lines; in a log file there are only the lines.

    columns: the metrics to print and their formats. start: the first step to come; rows from there
    on, left by a run that was killed, are dropped. logger: one of LOGGERS, UserError if it is not
    installed; settings: what wandb stores as the config.
    """

    def __init__(self, out_dir, steps: int, columns: dict, start=0, logger="none", settings=None):
        self.out_dir = Path(out_dir)
        self.columns = columns
        self.started = time.monotonic()
        self.track, self.finish = _open_logger(logger, self.out_dir, start, settings)
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            _drop(self.out_dir / name, start)
        self.metrics = open(self.out_dir / "metrics.jsonl", "a", encoding="utf-8")
        self.progress = progress()
        self.bar = self.progress.add_task("steps", total=steps, completed=start, note="")
        self.rolling = self.progress.add_task("rollouts", total=1, note="", visible=False)

    def __enter__(self) -> "Log":
        self.progress.start()
        return self

    def __exit__(self, kind, *_) -> None:
        with contextlib.suppress(OSError):  # its terminal may be gone, the disk may be full
            self.progress.stop()
        with contextlib.suppress(OSError):
            self.metrics.close()
        exit_code = 0 if kind is None else 1
        self._try(self.finish, exit_code)
        self._try(run_page.curves, self.out_dir)
        self._try(run_page.page, self.out_dir)

    def _try(self, action, argument) -> None:
        """Calls action(argument), and only says if it fails: that must not hide what ended the run,
        nor end a good one."""
        try:
            action(argument)
        except Exception as error:
            self.print(f"{action.__name__} failed: {type(error).__name__}: {error}")

    def print(self, text: str) -> None:
        """Prints a line. That its terminal is gone, or the pipe, ends nothing: the files have all
        that a run says."""
        with contextlib.suppress(OSError):
            self.progress.console.print(escaped(text), markup=False)

    def step(self, metrics: dict) -> None:
        """Prints a line, and writes everything to metrics.jsonl: whole lines, at once on disk."""
        row = {key: six_digits(value) for key, value in metrics.items()}
        with _say_if_not_logged(self.out_dir):
            self.metrics.write(json.dumps(row) + "\n")
            self.metrics.flush()
        self.track(finite_numbers(metrics), step=metrics["step"])
        self.print(self._line(metrics))
        self.progress.update(self.bar, advance=1)

    def _line(self, metrics: dict) -> str:
        """Writes the line of a step: on a terminal the columns that it has room for, the first ones
        first; in a file all of them. The names are whole, as in metrics.jsonl."""
        console = self.progress.console
        line = f"step {metrics['step']:4d}"
        for name, form in self.columns.items():
            cell = f"  {name} {metrics[name]:{form}}"
            if not console.is_terminal or len(line) + len(cell) <= console.width:
                line += cell
        return line

    def sync(self) -> None:
        """Puts it on disk for good, also if the power fails: before a checkpoint that builds on
        it."""
        with _say_if_not_logged(self.out_dir):
            self.metrics.flush()
            os.fsync(self.metrics.fileno())

    def expect(self, rollouts: int):
        """Shows a second bar for this many rollouts; returns what to call with each one done."""
        self.progress.reset(self.rolling, total=rollouts, visible=True)
        return counter(self.progress, self.rolling)

    def rollouts(self, trajectories: list, tokenizer, **columns) -> None:
        """Appends trajectories to rollouts.jsonl, with ids, mask, rewards and text."""
        with _say_if_not_logged(self.out_dir):
            write_rollouts(self.out_dir / "rollouts.jsonl", trajectories, tokenizer, **columns)

    def summary(self, values: dict) -> None:
        """Prints the last lines of a run, one `key: value` each, for people and for grep."""
        minutes = (time.monotonic() - self.started) / 60
        unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, others KiB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        self.print("---")
        print_summary({**values, "minutes": minutes, "peak_memory_gb": peak}, self.print)


class NoLog:
    """The log of a process that is not the first of its run: it says and writes nothing."""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *_) -> None:
        pass

    def print(self, text: str) -> None:
        pass

    def step(self, metrics: dict) -> None:
        pass

    def sync(self) -> None:
        pass

    def expect(self, rollouts: int) -> None:
        return None

    def rollouts(self, trajectories: list, tokenizer, **columns) -> None:
        pass

    def summary(self, values: dict) -> None:
        pass


@contextlib.contextmanager
def _say_if_not_logged(out_dir: Path):
    """Turns what a disk refuses into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the log in '{out_dir}' ({error.strerror or error}): what was saved is "
            "whole, so make room and go on with --resume=true"
        ) from error


def print_summary(values: dict, say=print) -> None:
    """Prints a `key: value` line each."""
    for key, value in values.items():
        shown = f"{value:.4f}" if isinstance(value, float) else value
        say(f"{key + ':':24} {shown}")


def _drop(path: Path, start: int) -> None:
    """Takes the rows of step `start` and later out of a .jsonl, and a torn last line. Lines that
    cannot be read stay as they are, and the user is told of them."""
    if not path.exists():
        return
    aside = path.with_name(path.name + ".new")
    damaged = []  # numbers of lines
    with open(path, "rb") as before, open(aside, "wb") as after:
        for number, line in enumerate(before, 1):
            row = row_of(line)
            if row is not None and is_of_step(row):
                if row["step"] < start:
                    after.write(line if line.endswith(b"\n") else line + b"\n")
                continue
            is_torn = not line.endswith(b"\n")  # by a kill: the last one, of a step to come
            if not is_torn:
                damaged.append(number)
                after.write(line)
        after.flush()
        os.fsync(after.fileno())
    aside.replace(path)  # all or nothing: a kill in between leaves the file as it was
    if damaged:
        many = ", …" if len(damaged) > 5 else ""
        which = ", ".join(map(str, damaged[:5])) + many
        tell(
            f"{path} is damaged, line {which} of it is no row of a step: left as it is, the run "
            "goes on behind it"
        )


# ---- rollouts.jsonl


def write_rollouts(path, trajectories: list, tokenizer, **columns) -> None:
    """Appends a row for each trajectory: its parallel lists, the text, what happened. columns: what
    else stands in each row. Its images, as they were shown, are files in a folder beside it, and
    image_spans says which of its ids stand for each: (first, end)."""
    with open(path, "a", encoding="utf-8") as file:
        for trajectory in trajectories:
            ids = trajectory.ids
            # the rollout of an API has no ids, and no tokenizer
            texts = token_texts(ids, tokenizer) if ids else []
            advantages = [round(advantage, 5) for advantage in trajectory.advantages]
            row = columns | {
                "group": trajectory.group,
                "sample": trajectory.sample,
                "stop": trajectory.stop,
                "reward": trajectory.reward,
                "rewards": trajectory.rewards,
                "answer": trajectory.example.get("answer"),
                "advantages": advantages or None,
                "seconds": round(trajectory.seconds, 3),
                "turn_starts": trajectory.turn_starts,
                "messages": trajectory.messages,
                "calls": [dataclasses.asdict(call) for call in trajectory.calls],
                "user_turns": [dataclasses.asdict(said) for said in trajectory.user_turns],
                "metrics": trajectory.metrics,
                "failure": trajectory.failure,
                "ids": ids,
                "mask": trajectory.mask,
                "kinds": token_kinds(trajectory, texts),
                "logprobs": [round(logprob, 5) for logprob in trajectory.logprobs],
                "pieces": texts,
                "text": tokenizer.decode(ids, skip_special_tokens=False) if ids else "",
            }
            if trajectory.example.get("tools") is not None:  # else its tools were those of the run
                row["tools"] = trajectory.example["tools"]
            if "mix" in trajectory.example:  # run/mix.py
                row["source"] = trajectory.example["mix"]
            if trajectory.images:
                row["images"] = write_images(Path(path).parent, trajectory.images)
                row["image_spans"] = image_spans(ids, trajectory.images)
            file.write(json.dumps(row) + "\n")


def write_images(folder: Path, pictures: list) -> list[str]:
    """Writes what a model was shown as PNG, which loses nothing, named by its pixels: what is there
    already is the same. Returns the names, relative to the folder."""
    (folder / IMAGES).mkdir(exist_ok=True)
    names = []
    for picture in pictures:
        name = f"{IMAGES}/{picture.key:016x}.png"
        if not (folder / name).exists():
            aside = folder / f"{name}.new"
            picture.shown.save(aside, "PNG", compress_level=1)
            aside.replace(folder / name)  # whole, or not there: a kill in between leaves no half
        names.append(name)
    return names

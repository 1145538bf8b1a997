"""What a run says and leaves behind: a line per step, metrics.jsonl, rollouts.jsonl, and drawn from
them curves.png and report.html, one page with the curves and the sampled rollouts token by token.

    python report.py out/calc      # draws both again, also while the run goes on or after a kill

    with Log("out/calc", steps=60, columns={"reward": "6.3f", "loss": "8.4f"}) as log:
        log.step({"step": 0, "reward": 0.5, "loss": 0.1})
        log.summary({"accuracy": 0.97})
"""

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
from run.config import UserError
from run.page import _numbers, _rounded, _rows

LOGGERS = {"none": "", "wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}


def progress() -> Progress:
    """Bars below the printed lines on a terminal; nothing in a log file."""
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
    """What to call with each trajectory that is done: advances the bar, with tokens/s and calls."""
    started, seen = time.monotonic(), {"tokens": 0, "calls": 0}

    def done(trajectory) -> None:
        seen["tokens"] += trajectory.new_tokens
        seen["calls"] += len(trajectory.calls)
        rate = seen["tokens"] / max(1e-6, time.monotonic() - started)
        note = f"{rate:,.0f} tokens/s, {seen['calls']} tool calls"
        bars.update(task, advance=1, note=note)

    return done


def check_logger(name: str):
    """The module of a logger, None for "none". UserError if it is missing: call this early."""
    if name not in LOGGERS:
        raise UserError(f"logger = {name!r}: expected one of {', '.join(LOGGERS)}")
    try:
        return importlib.import_module(LOGGERS[name]) if LOGGERS[name] else None
    except ImportError as error:
        remedy = 'pip install -e ".[log]"'
        raise UserError(f"logger = {name!r} cannot be used ({error}): {remedy}") from None


def _tracker(name: str, out_dir: Path, start: int, settings: dict | None):
    """(write(numbers, step), finish(exit_code)) of a logger."""
    package = check_logger(name)
    if package is None:
        return (lambda numbers, step: None), (lambda exit_code: None)
    if name == "wandb":
        kept = out_dir / "wandb_id.txt"  # a resumed run goes on in the same wandb run
        if start == 0 or not kept.exists():
            kept.write_text(secrets.token_hex(4))
        same = {"id": kept.read_text(), "resume": "allow", "allow_val_change": True}
        project = os.environ.get("WANDB_PROJECT", "nanotool")
        same |= {"project": project, "name": out_dir.name, "dir": str(out_dir)}
        run = package.init(config=settings, **same)
        return (lambda numbers, step: run.log(numbers, step=step)), run.finish

    def write(numbers: dict, step: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
        writer.flush()  # on disk with its step, as metrics.jsonl is: a kill loses nothing

    # purge_step hides what was written at and after `start` before a kill.
    writer = package.SummaryWriter(str(out_dir / "tensorboard"), purge_step=start)
    return write, lambda exit_code: writer.close()


class Log:
    """Holds the open metrics file and the progress bar of one run. On a terminal the bar stays
    below the lines; in a log file there are only the lines.

    columns: the metrics to print and their formats. start: the first step to come; rows from there
    on, left by a run that was killed, are dropped. logger: one of LOGGERS, UserError if it is not
    installed; settings: what wandb stores as the config.
    """

    def __init__(self, out_dir, steps: int, columns: dict, start=0, logger="none", settings=None):
        self.out_dir, self.columns, self.started = Path(out_dir), columns, time.monotonic()
        self.track, self.finish = _tracker(logger, self.out_dir, start, settings)
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
        self.progress.stop()
        self.metrics.close()
        ends = (
            (self.finish, int(kind is not None)),
            (run_page.curves, self.out_dir),
            (run_page.page, self.out_dir),
        )
        for end, value in ends:
            try:
                end(value)
            except Exception as error:  # must not hide what ended the run, nor end a good one
                self.print(f"{end.__name__} failed: {type(error).__name__}: {error}")

    def print(self, text: str) -> None:
        self.progress.console.print(text, markup=False)

    def step(self, metrics: dict) -> None:
        """One line here, and everything in metrics.jsonl: whole lines, at once on disk."""
        self.metrics.write(json.dumps({k: _rounded(v) for k, v in metrics.items()}) + "\n")
        self.metrics.flush()
        self.track(_numbers(metrics), step=metrics["step"])
        cells = [f"{name} {metrics[name]:{form}}" for name, form in self.columns.items()]
        self.print(f"step {metrics['step']:4d}  " + "  ".join(cells))
        self.progress.update(self.bar, advance=1)

    def sync(self) -> None:
        """On disk for good, also if the power fails: before a checkpoint that builds on it."""
        self.metrics.flush()
        os.fsync(self.metrics.fileno())

    def expect(self, rollouts: int):
        """Shows a second bar for this many rollouts; returns what to call with each one done."""
        self.progress.reset(self.rolling, total=rollouts, visible=True)
        return counter(self.progress, self.rolling)

    def rollouts(self, trajectories: list, tokenizer, **more) -> None:
        """Appends trajectories to rollouts.jsonl, with ids, mask, rewards and text."""
        write_rollouts(self.out_dir / "rollouts.jsonl", trajectories, tokenizer, **more)

    def summary(self, values: dict) -> None:
        """The last lines of a run, one `key: value` each, for people and for grep."""
        values = {**values, "minutes": (time.monotonic() - self.started) / 60}
        unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, others KiB
        values["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        self.print("---")
        print_summary(values, self.print)


def print_summary(values: dict, say=print) -> None:
    """A `key: value` line each."""
    for key, value in values.items():
        shown = f"{value:.4f}" if isinstance(value, float) else value
        say(f"{key + ':':24} {shown}")


def write_rollouts(path, trajectories: list, tokenizer, **more) -> None:
    """Appends a row for each trajectory: its four parallel lists, the text, what happened."""
    with open(path, "a", encoding="utf-8") as file:
        for t in trajectories:
            row = {**more, "group": t.group, "sample": t.sample, "stop": t.stop}
            row |= {"reward": t.reward, "rewards": t.rewards, "answer": t.example.get("answer")}
            row["advantages"] = [round(gain, 5) for gain in t.advantages] or None
            row |= {"seconds": round(t.seconds, 3), "turn_starts": t.turn_starts}
            row |= {"messages": t.messages, "calls": [dataclasses.asdict(c) for c in t.calls]}
            row |= {"ids": t.ids, "mask": t.mask, "logprobs": [round(p, 5) for p in t.logprobs]}
            row["pieces"] = pieces(t.ids, tokenizer) if t.ids else []
            row["text"] = tokenizer.decode(t.ids, skip_special_tokens=False) if t.ids else ""
            file.write(json.dumps(row) + "\n")


def pieces(ids: list[int], tokenizer) -> list[str]:
    """The text of each token; joined they are the text of all. A character whose bytes are spread
    over several tokens belongs to the last of them, the others have "" (or what is before it)."""
    texts, start, shown, waiting = [], 0, 0, 0  # shown: characters of ids[start:] that are out
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        whole = text.rstrip("\ufffd")  # that stands for bytes which the next token may complete
        waiting = 0 if whole == text else 1 if len(whole) > shown else waiting + 1
        if waiting > 3:  # no character has more bytes: at most the last may still become one
            whole = text[:-1]
        if end == len(ids):
            whole = text
        texts.append(whole[shown:])
        shown = max(shown, len(whole))
        alone = tokenizer.decode(ids[end - 1 : end], skip_special_tokens=False)
        if not waiting and "\ufffd" not in alone:
            # One token stays as context: some tokenizers strip the space of the first.
            start, shown = end - 1, len(alone)
    return texts


def _drop(path: Path, start: int) -> None:
    """Takes the rows of step `start` and later out of a .jsonl, and a torn last line."""
    if path.exists():
        aside = path.with_name(path.name + ".new")
        with open(aside, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in _rows(path) if row["step"] < start)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)  # all or nothing: a kill in between leaves the file as it was

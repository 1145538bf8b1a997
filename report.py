"""What a run says and leaves behind: a line per step, metrics.jsonl, rollouts.jsonl, curves.png.

with Log("out/calc", steps=60, columns={"reward": "6.3f", "loss": "8.4f"}) as log:
    log.step({"step": 0, "reward": 0.5, "loss": 0.1})
    log.summary({"accuracy": 0.97})
"""

import dataclasses
import json
import math
import resource
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

CURVES = (  # title, what is drawn in it
    ("reward", ("reward",)),
    ("accuracy", ("accuracy",)),
    ("tool-call rate", ("tool_call_rate", "tool_error_rate")),
    ("tokens per trajectory", ("new_tokens",)),
    ("loss", ("loss",)),
    ("entropy", ("entropy",)),
)


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


class Log:
    """Holds the open metrics file and the progress bar of one run. On a terminal the bar stays
    below the lines; in a log file there are only the lines."""

    def __init__(self, out_dir, steps: int, columns: dict[str, str]):
        self.out_dir, self.columns, self.started = Path(out_dir), columns, time.monotonic()
        self.metrics = open(self.out_dir / "metrics.jsonl", "a")
        self.progress = progress()
        self.bar = self.progress.add_task("steps", total=steps, note="")
        self.rolling = self.progress.add_task("rollouts", total=1, note="", visible=False)

    def __enter__(self) -> "Log":
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()
        self.metrics.close()
        curves(self.out_dir)

    def print(self, text: str) -> None:
        self.progress.console.print(text, markup=False)

    def step(self, metrics: dict) -> None:
        """One line here, and everything in metrics.jsonl: whole lines, at once on disk."""
        self.metrics.write(json.dumps({k: _rounded(v) for k, v in metrics.items()}) + "\n")
        self.metrics.flush()
        cells = [f"{name} {metrics[name]:{form}}" for name, form in self.columns.items()]
        self.print(f"step {metrics['step']:4d}  " + "  ".join(cells))
        self.progress.update(self.bar, advance=1)

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
    with open(path, "a") as file:
        for t in trajectories:
            row = {**more, "group": t.group, "sample": t.sample, "stop": t.stop}
            row |= {"reward": t.reward, "rewards": t.rewards, "answer": t.example.get("answer")}
            row |= {"seconds": round(t.seconds, 3), "turn_starts": t.turn_starts}
            row |= {"messages": t.messages, "calls": [dataclasses.asdict(c) for c in t.calls]}
            row |= {"ids": t.ids, "mask": t.mask, "logprobs": [round(p, 5) for p in t.logprobs]}
            row["text"] = tokenizer.decode(t.ids, skip_special_tokens=False)
            file.write(json.dumps(row) + "\n")


def read(path) -> list[dict]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def curves(out_dir) -> None:
    """Draws metrics.jsonl as curves.png: a point per step, and their running mean."""
    rows = read(Path(out_dir) / "metrics.jsonl")
    panels = [
        (title, [key for key in keys if any(row.get(key) is not None for row in rows)])
        for title, keys in CURVES
    ]
    panels = [(title, keys) for title, keys in panels if keys]
    if not panels:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: it would change a notebook's own figures

    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(4.2 * across, 3.0 * down), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (title, keys) in enumerate(panels):
        axes = figure.add_subplot(down, across, i + 1)
        for colour, key in zip(("tab:blue", "tab:red"), keys, strict=False):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, ".", color=colour, alpha=0.35, markersize=4)
            axes.plot(steps, _smooth(values), color=colour, label=key)
        if len(keys) > 1:
            axes.legend(frameon=False, fontsize=8)
        if all(key.endswith(("accuracy", "rate")) for key in keys):
            axes.set_ylim(-0.03, 1.03)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(out_dir) / "curves.png", dpi=100)


def _smooth(values, window: int = 5) -> list[float]:
    """The mean of the last few values."""
    return [
        sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))
    ]


def _rounded(value):
    """Six digits are enough for a metric, and keep evidence small."""
    return float(f"{value:.6g}") if isinstance(value, float) else value

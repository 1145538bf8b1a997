"""What a run says and leaves behind: a line per step, metrics.jsonl, rollouts.jsonl, and drawn from
them curves.png and report.html, one page with the curves and the sampled rollouts token by token.

    python report.py out/calc      # draws both again, also while the run goes on or after a kill

    with Log("out/calc", steps=60, columns={"reward": "6.3f", "loss": "8.4f"}) as log:
        log.step({"step": 0, "reward": 0.5, "loss": 0.1})
        log.summary({"accuracy": 0.97})
"""

import ast
import dataclasses
import importlib
import json
import math
import os
import resource
import secrets
import sys
import time
from pathlib import Path

import config

if __name__ == "__main__":
    config.answer_help(__file__)

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

CURVES = (  # title, what is drawn in it
    ("reward", ("reward",)),
    ("accuracy", ("accuracy", "val_accuracy")),
    ("tool-call rate", ("tool_call_rate", "tool_error_rate")),
    ("tokens per trajectory", ("new_tokens",)),
    ("loss", ("loss", "val_loss")),
    ("entropy", ("entropy",)),
)
LOGGERS = {"none": "", "wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}
# What the page holds at most: what a browser opens in a moment.
POINTS, ROLLOUTS, ROLLOUT_BYTES = 1000, 200, 40_000_000


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
        raise config.UserError(f"logger = {name!r}: expected one of {', '.join(LOGGERS)}")
    try:
        return importlib.import_module(LOGGERS[name]) if LOGGERS[name] else None
    except ImportError as error:
        remedy = 'pip install -e ".[log]"'
        raise config.UserError(f"logger = {name!r} cannot be used ({error}): {remedy}") from None


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
        ends = (self.finish, int(kind is not None)), (curves, self.out_dir), (page, self.out_dir)
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


def read(path) -> list[dict]:
    """The rows of a metrics.jsonl."""
    return list(_rows(path))


def _rows(path, constant=float):
    """The rows of a .jsonl, one by one; none if there is no file. A line that a kill left torn is
    left out: half an object never parses. constant: makes something of "NaN", "Infinity"."""
    if Path(path).exists():
        with open(path, "rb") as file:
            for line in file:
                try:
                    yield json.loads(line, parse_constant=constant)
                except ValueError:
                    continue


def _drop(path: Path, start: int) -> None:
    """Takes the rows of step `start` and later out of a .jsonl, and a torn last line."""
    if path.exists():
        aside = path.with_name(path.name + ".new")
        with open(aside, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in _rows(path) if row["step"] < start)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)  # all or nothing: a kill in between leaves the file as it was


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
            window = max(5, len(rows) // 40)
            axes.plot(steps, _smooth(points, window), color=colour, label=key)
        if len(keys) > 1:
            axes.legend(frameon=False, fontsize=8)
        if all(key.endswith(("accuracy", "rate")) for key in keys):
            axes.set_ylim(-0.03, 1.03)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(out_dir) / "curves.png", dpi=100)


def _smooth(points: list[tuple], window: int) -> list[float]:
    """For each (step, value) the mean of the values in the last few steps: of what is measured more
    seldom, itself."""
    means = []
    for i, (step, _) in enumerate(points):
        last = [value for s, value in points[max(0, i + 1 - window) : i + 1] if s > step - window]
        means.append(sum(last) / len(last))
    return means


def _rounded(value):
    """Six digits are enough for a metric, and keep evidence small."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _numbers(row: dict) -> dict:
    """What of a row can be drawn: finite numbers."""
    kinds = (int, float)
    return {k: v for k, v in row.items() if isinstance(v, kinds) and math.isfinite(v)}


def page(out_dir) -> None:
    """Writes report.html: page.html with the data of metrics.jsonl, rollouts.jsonl and config.py
    in it. It loads nothing else: it can be mailed."""
    out_dir = Path(out_dir)
    rows = [_numbers(row) for row in read(out_dir / "metrics.jsonl")]
    rollouts, written = _sampled(out_dir / "rollouts.jsonl")
    data = {"out_dir": str(out_dir), "settings": _settings(out_dir / "config.py"), "panels": CURVES}
    data |= {"steps": len(rows), "metrics": _points(rows), "thinned": -(-len(rows) // POINTS)}
    data |= {"written": written, "rollouts": rollouts}
    # ASCII, and no "<": no text of a model can end the script element that it stands in.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    template = (config.HERE / "page.html").read_text(encoding="utf-8")
    (out_dir / "report.html").write_text(template.replace("{{data}}", text), encoding="utf-8")


def _points(rows: list[dict]) -> dict[str, list]:
    """The values of each key, None where there is none; of many steps, means of a few of them."""
    size = -(-len(rows) // POINTS) or 1
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    points = {"step": [part[-1]["step"] for part in parts]}
    for key in dict.fromkeys(key for row in rows for key in row if key != "step"):
        values = [[row[key] for row in part if key in row] for part in parts]
        points[key] = [_rounded(sum(few) / len(few)) if few else None for few in values]
    return points


def _spread(total: int, most: int) -> list[int]:
    """The numbers of at most `most` of `total` things: evenly apart, the first, the last."""
    return [i * (total - 1) // (most - 1) for i in range(most)] if total > most else [*range(total)]


def _sampled(path: Path) -> tuple[list[dict], int]:
    """(the rollouts that the page shows, how many the file holds)."""
    lines = path.read_bytes().count(b"\n") if path.exists() else 0
    fit = ROLLOUT_BYTES * lines // path.stat().st_size if lines else 0
    keep = set(_spread(lines, max(2, min(ROLLOUTS, fit))))
    names = "step group sample stop reward rewards answer advantages seconds turn_starts calls ids"
    rollouts = []
    for i, row in enumerate(_rows(path, constant=str)):  # JSON proper has no NaN
        if i in keep:
            row.setdefault("pieces", [f"{token} " for token in row["ids"]])  # an old row: the ids
            shown = {name: row.get(name) for name in [*names.split(), "pieces", "logprobs"]}
            rollouts.append(shown | {"kinds": _kinds(row)})
    return rollouts, lines


def _kinds(row: dict) -> str:
    """A letter for each token, as in rollout.spans: t trained, c context, o what a tool said (its
    output), e what it said of an error."""
    kinds = ["t" if trained else "c" for trained in row["mask"]]
    starts = [0]
    for piece in row["pieces"]:
        starts.append(starts[-1] + len(piece))
    text, turns = "".join(row["pieces"]), [*row["turn_starts"], len(kinds)]
    at = 0
    for call in row["calls"]:
        if call["turn"] + 1 >= len(turns) or not call["result"]:
            continue
        first, end = turns[call["turn"]], turns[call["turn"] + 1]
        first += sum(row["mask"][first:end])  # results follow what was sampled
        found = text.find(call["result"], max(at, starts[first]), starts[end])
        if found < 0:  # it did not fit, or the template changed it
            continue
        at = found + len(call["result"])
        for i in range(first, end):
            if starts[i] < at and (starts[i] >= found or starts[i + 1] > found):
                kinds[i] = "e" if call["error"] else "o"
    return "".join(kinds)


def _settings(path: Path) -> list[tuple[str, str, str | None]]:
    """(name, value, default) as python text, from a run's config.py. Defaults are those of the
    training script whose Config has nearly these names; None for a name that it has not."""
    nodes = ast.parse(path.read_bytes()).body if path.exists() else []
    values = {node.targets[0].id: ast.unparse(node.value) for node in nodes}
    default = {}
    for script in sorted(config.HERE.glob("train_*.py")):
        for node in ast.parse(script.read_bytes()).body:  # importing it would import torch
            if isinstance(node, ast.ClassDef) and node.name == "Config":
                fields = [f for f in node.body if isinstance(f, ast.AnnAssign)]
                found = {f.target.id: ast.unparse(f.value) for f in fields if f.value}
                default = min(default, found, key=lambda names: len(values.keys() ^ names))
    return [(name, value, default.get(name)) for name, value in values.items()]


def main(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise config.UserError(f"cannot read {' '.join(argv)!r}: write report.py out/calc")
    out_dir = Path(argv[0])
    if not any((out_dir / name).exists() for name in ("metrics.jsonl", "rollouts.jsonl")):
        raise config.UserError(f"no run in '{out_dir}': expected metrics.jsonl or rollouts.jsonl")
    curves(out_dir)
    page(out_dir)
    print(f"{out_dir / 'report.html'}")


if __name__ == "__main__":
    config.main(main)

"""Draws what a run left behind: curves.png and report.html.

python -m run.page out/calc
"""

import ast
import json
import math
from pathlib import Path

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)


CURVES = (  # title, what is drawn in it
    ("reward", ("reward",)),
    ("accuracy", ("accuracy", "val_accuracy")),
    ("tool-call rate", ("tool_call_rate", "tool_error_rate")),
    ("tokens per trajectory", ("new_tokens",)),
    ("loss", ("loss", "val_loss")),
    ("entropy", ("entropy",)),
)


# What the page holds at most: what a browser opens in a moment.
POINTS, ROLLOUTS, ROLLOUT_BYTES = 1000, 200, 40_000_000


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
    template = (config.HERE / "run" / "page.html").read_text(encoding="utf-8")
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
        raise config.UserError(f"cannot read {' '.join(argv)!r}: write python -m run.page out/calc")
    out_dir = Path(argv[0])
    if not any((out_dir / name).exists() for name in ("metrics.jsonl", "rollouts.jsonl")):
        raise config.UserError(f"no run in '{out_dir}': expected metrics.jsonl or rollouts.jsonl")
    curves(out_dir)
    page(out_dir)
    print(f"{out_dir / 'report.html'}")


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


def _rounded(value):
    """Six digits are enough for a metric, and keep evidence small."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _numbers(row: dict) -> dict:
    """What of a row can be drawn: finite numbers."""
    kinds = (int, float)
    return {k: v for k, v in row.items() if isinstance(v, kinds) and math.isfinite(v)}


if __name__ == "__main__":
    config.main(main)

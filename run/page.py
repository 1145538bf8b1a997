"""Draws what a run left behind: curves.png and report.html.

python -m run.page out/calc
"""

import ast
import base64
import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)


CURVES = (  # title, what is drawn in it
    ("reward", ("reward",)),
    ("accuracy", ("accuracy", "val_accuracy")),
    ("tool-call rate", ("tool_call_rate", "tool_error_rate")),
    ("tokens per trajectory", ("new_tokens",)),
    ("rows by pass rate", ("rows_new", "rows_hard", "rows_fit", "rows_easy")),  # of a curriculum
    ("loss", ("loss", "val_loss")),
    ("entropy", ("entropy",)),
)
LABELS = {"accuracy": "sampled", "val_accuracy": "held out, greedy", "val_loss": "held out"}
COLOURS = ("tab:blue", "tab:red", "tab:green", "tab:orange", "tab:purple", "tab:cyan")

# What the page holds at most: what a browser opens in a moment.
POINTS = 1000  # of a curve
ROLLOUTS = 200
ROLLOUT_BYTES = 40_000_000
THUMBNAIL = 256  # pixels, the longer side
THUMBNAIL_BYTES = 12_000_000  # of all of them
SMALL_FILE = 20_000  # bytes: an image that is no larger is its own thumbnail
MAX_PIXELS = 2**25  # of an image that is opened for one
IMAGE_NAME = re.compile(r"images/[0-9a-f]{16}\.png")  # as run/log.py writes them
# What it shows of a rollout, beside its pieces, kinds and logprobs.
ROLLOUT_KEYS = (
    "step source group sample stop reward rewards answer advantages seconds turn_starts calls ids "
    "images metrics failure"
).split()


def panels_of(keys: Iterable[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Lists what is drawn of a run that logged these keys: CURVES, and of a mix (run/mix.py) the
    accuracy of each source."""
    of_sources = [key for key in keys if key.endswith("/accuracy") and not key.startswith("val_")]
    panels = list(CURVES)
    if of_sources:
        panels.insert(2, ("accuracy by source", tuple(sorted(of_sources)[: len(COLOURS)])))
    return panels


# ---- curves.png


def curves(out_dir) -> None:
    """Draws metrics.jsonl as curves.png: of what is measured at each step a point and the running
    mean, of what is held out a marker for each time that it was measured."""
    rows = [finite_numbers(row) for row in steps_of(Path(out_dir) / "metrics.jsonl")]
    panels = []
    for title, keys in panels_of(dict.fromkeys(key for row in rows for key in row)):
        measured = [key for key in keys if any(key in row for row in rows)]
        if measured:
            panels.append((title, measured))
    if not panels:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: it would change a notebook's own figures

    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(4.2 * across, 3.0 * down), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, keys) in enumerate(panels, 1):
        axes = figure.add_subplot(down, across, place)
        _draw_panel(axes, title, keys, rows)
    figure.savefig(Path(out_dir) / "curves.png", dpi=100)


def _draw_panel(axes, title: str, keys: list[str], rows: list[dict]) -> None:
    window = max(5, len(rows) // 40)  # steps
    for colour, key in zip(COLOURS, keys, strict=False):
        measured = [row for row in rows if key in row]
        steps = [row["step"] for row in measured]
        values = [row[key] for row in measured]
        label = LABELS.get(key, key)
        if key.startswith("val_"):
            axes.plot(steps, values, "o-", color=colour, markersize=4, label=label)
        else:
            axes.plot(steps, values, ".", color=colour, alpha=0.35, markersize=4)
            means = _running_mean(steps, values, window)
            axes.plot(steps, means, color=colour, label=label)
    if len(keys) > 1:
        axes.legend(frameon=False, fontsize=8)
    if all(key.endswith(("accuracy", "rate")) for key in keys):
        axes.set_ylim(-0.03, 1.03)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _running_mean(steps: list[int], values: list[float], window: int) -> list[float]:
    """Averages, for each step, the values in the last few steps: of what is measured more seldom,
    itself."""
    means = []
    first = 0  # the place of the earliest step that counts
    for last, step in enumerate(steps):
        while steps[first] <= step - window:
            first += 1
        recent = values[first : last + 1]
        means.append(sum(recent) / len(recent))
    return means


# ---- report.html


def page(out_dir, title: str = "", has_images: bool = True) -> None:
    """Writes report.html: page.html with the data of metrics.jsonl, rollouts.jsonl and config.py
    in it, and small copies of images. It loads nothing else: it can be mailed. A click on an image
    opens the whole one, where the folder `images` is still beside the page. title: "" is the
    folder. has_images: whether the page will have that folder beside it."""
    out_dir = Path(out_dir)
    rollouts, written = shown_rollouts(out_dir / "rollouts.jsonl")
    images = images_of(out_dir, rollouts)
    if not has_images:
        for about in filter(None, images.values()):
            about["place"] = ""
    data = {
        "out_dir": title or str(out_dir),
        "settings": settings_of(out_dir / "config.py"),
        **curves_of(out_dir / "metrics.jsonl"),
        "written": written,
        "rollouts": rollouts,
        "images": images,
    }
    # ASCII, and no "<": no text of a model can end the script element that it stands in.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    (out_dir / "report.html").write_text(_template().replace("{{data}}", text), encoding="utf-8")


def points_of(rows: list[dict]) -> dict[str, list]:
    """Collects the values of each key, None where it has none; of many steps, some means."""
    size = max(1, math.ceil(len(rows) / POINTS))
    parts = []
    for start in range(0, len(rows), size):
        parts.append(rows[start : start + size])
    keys = {}  # each once, in order
    for row in rows:
        keys.update(row)
    points = {"step": [part[-1]["step"] for part in parts]}
    for key in keys:
        if key != "step":
            points[key] = [_mean_of(key, part) for part in parts]
    return points


def _mean_of(key: str, rows: list[dict]) -> float | None:
    values = [row[key] for row in rows if key in row]
    if not values:
        return None
    mean = sum(values) / len(values)
    return six_digits(mean) if _is_finite(mean) else None  # the sum may be beyond all floats


def shown_rollouts(path: Path) -> tuple[list[dict], int]:
    """Reads (the rollouts that the page shows, how many the file holds)."""
    if not path.exists():
        return [], 0
    written = path.read_bytes().count(b"\n")
    most = ROLLOUTS
    if written:
        most = min(ROLLOUTS, ROLLOUT_BYTES * written // path.stat().st_size)
    chosen = set(spread(written, max(2, most)))
    rollouts = []
    for number, row in enumerate(each_row(path, constant=str)):  # JSON proper has no NaN
        if number in chosen and is_rollout(row):
            rollouts.append(shown_of(row))
    return rollouts, written


def spread(total: int, most: int) -> list[int]:
    """Picks at most `most` of `total` things, by number: evenly apart, the first, the last."""
    if total <= most:
        return list(range(total))
    return [i * (total - 1) // (most - 1) for i in range(most)]


def shown_of(row: dict) -> dict:
    """Picks what the page holds of a row of rollouts.jsonl."""
    shown = {key: row.get(key) for key in ROLLOUT_KEYS}
    pieces = row.get("pieces")
    if pieces is None:  # an old row: the ids
        pieces = [f"{token} " for token in row["ids"]]
    shown["pieces"] = pieces
    shown["logprobs"] = row.get("logprobs")
    kinds = row.get("kinds") or row["mask"]
    shown["kinds"] = kinds if isinstance(kinds, str) else _kinds_of_mask(kinds)
    shown["images"] = [name if _is_image_name(name) else "" for name in row.get("images") or ()]
    shown["image_spans"] = _image_spans(row)
    for first, end in shown["image_spans"]:  # a thousand times the same
        pieces[first:end] = [""] * (end - first)
    return shown


def _is_image_name(name) -> bool:
    """Says whether it is a file that run/log.py wrote: nothing else on this machine is opened."""
    return isinstance(name, str) and IMAGE_NAME.fullmatch(name) is not None


def _image_spans(row: dict) -> list[list[int]]:
    """Reads which tokens stand for each image: (first, end). [] where the row does not say so."""
    spans = row.get("image_spans")
    names = row.get("images")
    if not isinstance(spans, list) or not isinstance(names, list) or len(spans) != len(names):
        return []
    at = 0
    for span in spans:
        if not _is_list(span, int) or len(span) != 2:
            return []
        first, end = span
        if not at <= first < end <= len(row["ids"]):
            return []
        at = end
    return spans


def images_of(out_dir: Path, rollouts: list[dict]) -> dict[str, dict]:
    """Reads the images of the rollouts by their names: size, and a small copy as a data URI; None
    for one that is not there, and no copy of those for which there is no room."""
    images = {}
    room = THUMBNAIL_BYTES
    for rollout in rollouts:
        for name in rollout["images"]:
            if not name or name in images:
                continue
            images[name] = _thumbnail(out_dir / name, room)
            if images[name]:
                room -= len(images[name].get("copy", ""))
    return images


def _thumbnail(file: Path, room: int) -> dict | None:
    """Reads an image's size, and copies it, at most THUMBNAIL pixels, if `room` bytes will do."""
    from PIL import Image

    try:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            size = {"width": image.width, "height": image.height}
            kind = "png"
            if image.width * image.height > MAX_PIXELS:
                return size
            is_large = max(image.size) > THUMBNAIL
            if is_large or len(data) > SMALL_FILE:
                image = image.convert("RGB")
                image.thumbnail((THUMBNAIL, THUMBNAIL))
                smaller = io.BytesIO()
                image.save(smaller, "JPEG", quality=85)
                data = smaller.getvalue()
                kind = "jpeg"
    except Exception:  # Pillow has many; a page without one image is a page
        return None
    copy = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return size | {"copy": copy} if len(copy) <= room else size


def _kinds_of_mask(mask: list[int]) -> str:
    """Writes the kinds (see Trajectory.kinds) of a row without them: what of its context is a
    tool's result is not known."""
    return "".join("t" if trained else "c" for trained in mask)


def settings_of(path: Path) -> list[tuple[str, str, str | None]]:
    """Reads (name, value, default), as python text, from a run's config.py. Defaults are those of
    the training script whose Config has nearly these names; None for a name that it has not."""
    values = values_of(path)
    choices = [{}]  # where no script is near
    for script in sorted(config.HERE.glob("train_*.py")):
        choices.append(_defaults(script))
    defaults = min(choices, key=lambda names: len(values.keys() ^ names))
    return [(name, value, defaults.get(name)) for name, value in values.items()]


def values_of(path: Path) -> dict[str, str]:
    """Reads a run's config.py as {name: value as python text}; nothing of it is run."""
    values = {}
    try:
        written = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return {}  # no file, or none of a run: torn, or somebody else's
    for node in written:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = ast.unparse(node.value)
    return values


def _defaults(script: Path) -> dict[str, str]:
    """Reads the Config of a script as {name: default as python text}."""
    defaults = {}
    for node in ast.parse(script.read_bytes()).body:  # importing it would import torch
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and field.value:
                    defaults[field.target.id] = ast.unparse(field.value)
    return defaults


def _template() -> str:
    """Reads page.html, with its style and its script put in."""
    parts = {}
    for name in ("page.html", "page.css", "page.js"):
        parts[name] = (config.HERE / "run" / name).read_text(encoding="utf-8")
    text = parts["page.html"].replace("{{style}}", parts["page.css"])
    return text.replace("{{script}}", parts["page.js"])


def curves_of(path: Path) -> dict:
    """Collects what the curves of a metrics.jsonl are drawn from."""
    rows = [finite_numbers(row) for row in steps_of(path)]
    return {
        "panels": panels_of(dict.fromkeys(key for row in rows for key in row)),
        "steps": len(rows),
        "metrics": points_of(rows),
        "thinned": math.ceil(len(rows) / POINTS),  # steps that a point is the mean of
    }


# ---- rows of metrics.jsonl and rollouts.jsonl


def read(path) -> list[dict]:
    """Reads the rows of a metrics.jsonl."""
    return list(each_row(path))


def each_row(path, constant=float) -> Iterator[dict]:
    """Reads the rows of a .jsonl, one by one; none if there is no file. A line that a kill left
    torn is left out: half an object never parses. constant: makes something of "NaN", "Infinity".
    """
    if not Path(path).exists():
        return
    with open(path, "rb") as file:
        for line in file:
            row = row_of(line, constant)
            if row is not None:
                yield row


def row_of(line: bytes, constant=float) -> dict | None:
    """Reads a line of a .jsonl; None for one that is no object."""
    try:
        row = json.loads(line, parse_constant=constant)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def steps_of(path) -> list[dict]:
    """Reads the rows of a metrics.jsonl that are of a step."""
    return [row for row in each_row(path) if is_of_step(row)]


def is_of_step(row: dict) -> bool:
    """Says whether a row names its step."""
    step = row.get("step")
    return type(step) is int and 0 <= step < 2**53


def is_rollout(row: dict) -> bool:
    """Says whether a row has what the page draws: of each token and each call, and of the right
    types."""
    ids = row.get("ids")
    if not isinstance(ids, list):
        return False
    # 1. what there is one of for each token
    kinds = row.get("kinds") or row.get("mask")
    pieces = row.get("pieces")
    if pieces is None:
        pieces = ids
    elif not _is_list(pieces, str):
        return False
    logprobs = row.get("logprobs")
    if logprobs is None:
        logprobs = ids
    for values in (kinds, pieces, logprobs):
        if not isinstance(values, list | str) or len(values) != len(ids):
            return False
    # 2. what happened
    if not _is_list(row.get("turn_starts"), int) or not _is_list(row.get("calls"), dict):
        return False
    if not all(isinstance(call.get("arguments"), dict | None) for call in row["calls"]):
        return False
    if not all(_is_list(call.get("images", []), int) for call in row["calls"]):
        return False
    if not isinstance(row.get("images"), list | None):
        return False
    are_advantages = isinstance(row.get("advantages"), list | None)
    return are_advantages and isinstance(row.get("rewards"), dict | None)


def _is_list(values, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def finite_numbers(row: dict) -> dict:
    """Returns what of a row can be drawn."""
    numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
    return {key: value for key, value in numbers.items() if _is_finite(value)}


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def six_digits(value):
    """Rounds a float: six digits are enough for a metric, and keep evidence small."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


# ---- the command


def main(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise config.UserError(f"cannot read {' '.join(argv)!r}: write python -m run.page out/calc")
    out_dir = Path(argv[0])
    files = [out_dir / name for name in ("metrics.jsonl", "rollouts.jsonl")]
    if not any(file.exists() for file in files):
        raise config.UserError(f"no run in '{out_dir}': expected metrics.jsonl or rollouts.jsonl")
    _tell_what_is_left_out(*files)
    curves(out_dir)
    page(out_dir)
    print(f"{out_dir / 'report.html'}")


def _tell_what_is_left_out(metrics: Path, rollouts: Path) -> None:
    """Says how many lines are no rows of a run, so that nobody misses them on the page."""
    for file, belongs in ((metrics, is_of_step), (rollouts, is_rollout)):
        if not file.exists():
            continue
        left_out = 0
        with open(file, "rb") as opened:
            for line in opened:
                row = row_of(line, constant=str)
                if row is None or not belongs(row):
                    left_out += 1
        if left_out:
            config.tell(f"{file}: {left_out} lines are no rows of a run and are left out")


if __name__ == "__main__":
    config.main(main)

"""Makes the pictures of README.md and docs/, in docs/pictures/.

    python dev/pictures.py                          # curves.png, from evidence/calc
    python dev/pictures.py --run=out/calc           # report.png too, of that run (`make demo`)

curves.png is drawn from files that are committed. report.png shows two rollouts of a run in its
report.html, as chromium draws them (apt-get install chromium).
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from any folder

from run import page

EVIDENCE = ROOT / "evidence" / "calc"
PICTURES = ROOT / "docs" / "pictures"
SEEDS = (0, 1, 2)
BLUE = "#1f6feb"
GREY = "#6b7280"
ORANGE = "#c2410c"
PERCENT = {0: "0", 0.25: "25 %", 0.5: "50 %", 0.75: "75 %", 1.0: "100 %"}  # of the axes


def draw_curves(target: Path) -> None:
    """Draws what is learnt in two panels: accuracy, and the share of rollouts that call python.

    Lines are the training rollouts of three seeds. Points are greedy evaluations on 512 held-out
    problems: large ones before and after, with 95 % intervals, small ones on the way of seed 0.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    for seed in SEEDS:
        rows = page.read(EVIDENCE / f"seed{seed}-grpo.jsonl")
        draw_line(left, rows, "accuracy", is_first=seed == 0)
        draw_line(right, rows, "tool_call_rate", is_first=seed == 0)
        draw_before_and_after(left, right, seed, last_step=len(rows))
    draw_on_the_way(left, right)
    label_axes(left, "Right answers")
    label_axes(right, "Rollouts that call python")
    left.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1.0, 0.05))
    figure.savefig(target, dpi=120)


def draw_line(axes, rows: list[dict], key: str, is_first: bool) -> None:
    """Adds what one seed's training rollouts gave, step by step; the first is in the legend."""
    steps = [row["step"] for row in rows]
    values = [row[key] for row in rows]
    label = "training rollouts, three seeds" if is_first else None
    axes.plot(steps, values, color=BLUE, alpha=0.45, linewidth=1.4, label=label)


def label_axes(axes, title: str) -> None:
    """Writes the title and the axes of a panel."""
    axes.set_title(title, fontsize=12, loc="left", fontweight="bold")
    axes.set_xlabel("steps of GRPO", fontsize=10)
    axes.set_ylim(0, 1.04)
    axes.set_xlim(-1.5, 41.5)
    axes.set_yticks(list(PERCENT), PERCENT.values())
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelsize=9, labelcolor=GREY)


def draw_before_and_after(left, right, seed: int, last_step: int) -> None:
    """Adds the two evaluations of a seed: of the weights before the first step and after the last.
    The seeds stand a little apart, so that no point hides another."""
    style = {"color": ORANGE, "markersize": 5, "zorder": 3}
    for name, step in {"before": 0, "after": last_step}.items():
        file = EVIDENCE / f"seed{seed}-{name}.json"
        measured = json.loads(file.read_text(encoding="utf-8"))
        at = step + 0.7 * (seed - 1)
        value = measured["accuracy"]
        below = value - measured["ci95_low"]
        above = measured["ci95_high"] - value
        is_first = seed == 0 and step == 0
        label = "held out: 512 problems, greedy" if is_first else None
        bars = [[below], [above]]
        left.errorbar([at], [value], bars, fmt="o", elinewidth=1.2, label=label, **style)
        right.plot([at], [measured["tool_call_rate"]], "o", **style)


def draw_on_the_way(left, right) -> None:
    """Adds what `--eval_every=4 --eval_rows=512` measured in the run of seed 0, between the two."""
    rows = page.read(EVIDENCE / "seed0-held-out.jsonl")
    rows = [row for row in rows if row["step"] > 0]
    steps = [row["step"] for row in rows]
    style = {"color": ORANGE, "markersize": 3.5, "zorder": 3}
    left.plot(steps, [row["val_accuracy"] for row in rows], "o", **style)
    right.plot(steps, [row["val_tool_call_rate"] for row in rows], "o", **style)


def draw_report(run: Path, target: Path) -> None:
    """Takes a picture of two sampled rollouts of one prompt in the run's report.html: one that was
    right, and one that was wrong, below each other."""
    from PIL import Image

    right, wrong = first_pair(page.read(run / "rollouts.jsonl"))
    html = (run / "report.html").read_text(encoding="utf-8")
    upper = photograph(html, right, hide="#curves, .bar, #sampling, #rollouts > h2")
    lower = photograph(html, wrong, hide="#curves, .bar, #sampling, #rollouts > h2, .legend")
    width = max(upper.width, lower.width)
    both = Image.new("RGB", (width, upper.height + lower.height), "white")
    both.paste(upper, (0, 0))
    both.paste(lower, (0, upper.height))
    both.quantize(96).save(target, optimize=True)  # a quarter of the bytes, and no visible loss


def first_pair(rollouts: list[dict]) -> tuple[int, int]:
    """Finds the places of two neighbours of one step and group that both call a tool, the first
    rewarded and the second not."""
    for place in range(len(rollouts) - 1):
        one = rollouts[place]
        other = rollouts[place + 1]
        if one["step"] != other["step"] or one["group"] != other["group"]:
            continue
        both_call = one["calls"] and other["calls"]
        if both_call and one["reward"] == 1 and other["reward"] == 0:
            return place, place + 1
    sys.exit("this run has no such pair of rollouts: give one of more steps, or of another seed")


def photograph(html: str, place: int, hide: str):
    """Takes a picture, a PIL image, of the page as chromium draws it, opened at the rollout of that
    place, without what is hidden and without the white around it."""
    from PIL import Image, ImageChops

    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        sys.exit("no chromium: apt-get install chromium")
    hide += ", h1, #sum, #settings, #rollout h2, #rollout h3, .scroll, noscript"
    style = f"<style>{hide} {{display: none}} body {{padding: 8px 12px}}</style>"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "report.html"
        picture = Path(folder) / "report.png"
        copy.write_text(html.replace("</head>", style + "</head>"), encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--window-size=880,1600", f"--screenshot={picture}"]
        command += [f"{copy.as_uri()}#{place}"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        image = Image.open(picture).convert("RGB")
    white = Image.new("RGB", image.size, "white")
    left, top, right, bottom = ImageChops.difference(image, white).getbbox()
    return image.crop((0, max(0, top - 10), image.width, bottom + 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, help="an out_dir, for report.png")
    run = parser.parse_args().run
    PICTURES.mkdir(parents=True, exist_ok=True)
    draw_curves(PICTURES / "curves.png")
    if run is not None:
        draw_report(run, PICTURES / "report.png")


if __name__ == "__main__":
    main()

"""The evidence for the tiny task with pictures: seeds of the demo, and the tool's image blanked.

    python bench/chart.py                               # three seeds; see docs/vision.md
    python bench/chart.py --seeds=3 --save_to=out/evidence

For each seed: `python demo.py --task=chart`; the model after GRPO evaluated once more, sampled,
with bench/blank.py's zoom; and a picture of what it saw in four held-out problems. Written to
save_to: seedN-summary.txt, seedN-grpo.jsonl, seedN-sft-every-10th.jsonl, seedN-curves.png,
seedN-rollouts.png. Exit code 1 if a seed misses a bound.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)

import demo
import evaluate
from run import log as run_log
from run import page

BLANK = "bench/blank.py:zoom"
MOST_BEFORE = 0.6  # sampled accuracy after SFT, at most
LEAST_AFTER = 0.88  # sampled accuracy after GRPO, at least
MOST_BLANK = 0.15  # sampled accuracy with a white image in the place of the tool's, at most
MOST_MINUTES = 8.0
SHOWN = 4  # rollouts in the picture


@dataclass
class Config:
    seeds: tuple[int, ...] = (0, 1, 2)
    out_dir: str = "out/chart_seeds"  # where the runs are made
    save_to: str = "evidence/chart"


def run_seed(seed: int, out_dir: Path, save_to: Path) -> dict:
    """Runs the demo with a seed, and the evaluation with the blank image; writes its files."""
    # 1. the demo, and the same model with a white image in the place of the tool's
    results = demo.run(demo.Config(task="chart", out_dir=str(out_dir), seed=seed))
    grpo_dir = out_dir / "chart"
    given = evaluate.Config(
        run=str(grpo_dir), temperature=1.0, save_to=str(grpo_dir / "eval_blank")
    )
    blank = evaluate.evaluate(evaluate.load_config([f"--tools={BLANK}"], given), given)
    results["sampled_accuracy_blank"] = blank["accuracy"]
    results["tool_call_rate_blank"] = blank["tool_call_rate"]
    results.pop("curves")  # a path of this machine

    # 2. its files
    lines = [f"{name}: {value}" for name, value in results.items()]
    (save_to / f"seed{seed}-summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.copy(grpo_dir / "metrics.jsonl", save_to / f"seed{seed}-grpo.jsonl")
    shutil.copy(grpo_dir / "curves.png", save_to / f"seed{seed}-curves.png")
    updates = page.read(out_dir / "chart_sft" / "metrics.jsonl")
    kept = [json.dumps(update) for update in updates[::10]]
    name = f"seed{seed}-sft-every-10th.jsonl"
    (save_to / name).write_text("\n".join(kept) + "\n", encoding="utf-8")
    draw_rollouts(grpo_dir / "eval_sampled", save_to / f"seed{seed}-rollouts.png")
    return results


def draw_rollouts(folder: Path, target: Path) -> None:
    """Draws the first rollouts of an evaluation: each image as the model saw it, and what it
    said."""
    from matplotlib.figure import Figure
    from PIL import Image

    rollouts = page.read(folder / "rollouts.jsonl")[:SHOWN]
    figure = Figure(figsize=(9.0, 2.0 * len(rollouts)), layout="constrained")
    table = figure.subplots(len(rollouts), 3, squeeze=False, width_ratios=(1, 1, 2.6))
    for (first, second, beside), rollout in zip(table, rollouts, strict=True):
        for axes in (first, second, beside):
            axes.axis("off")
        images = rollout.get("images", [])
        for number, axes in enumerate((first, second)):
            if number < len(images):
                axes.imshow(Image.open(folder / images[number]), interpolation="nearest")
                axes.set_title(f"image {number + 1}, as it was shown", fontsize=8)
        said = [as_text(message) for message in rollout["messages"][1:]]
        verdict = f"reward {rollout['reward']}; the answer is {rollout['answer']}"
        text = "\n".join([*said, verdict])
        beside.text(0, 1, text, fontsize=8, family="monospace", verticalalignment="top")
    figure.savefig(target, dpi=90)


def as_text(message: dict) -> str:
    """Writes a message for people, on a line or two."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = " ".join(part.get("text", "(image)") for part in content)
    calls = [call["function"] for call in message.get("tool_calls") or []]
    called = [f"{call['name']}({json.dumps(call['arguments'])})" for call in calls]
    return f"{message['role']}: " + " ".join([content, *called])


def misses(results: dict) -> list[str]:
    """Lists the bounds that a seed misses."""
    missed = []
    if results["sampled_accuracy_before"] > MOST_BEFORE:
        missed.append("sampled_accuracy_before")
    if results["sampled_accuracy_after"] < LEAST_AFTER:
        missed.append("sampled_accuracy_after")
    if results["sampled_accuracy_blank"] > MOST_BLANK:
        missed.append("sampled_accuracy_blank")
    if results["minutes"] > MOST_MINUTES:
        missed.append("minutes")
    return missed


def main(argv: list[str]) -> None:
    cfg = config.parse(Config, argv)
    save_to = Path(cfg.save_to)
    save_to.mkdir(parents=True, exist_ok=True)
    missed = []
    for seed in cfg.seeds:
        results = run_seed(seed, Path(cfg.out_dir) / f"seed{seed}", save_to)
        missed += [f"seed {seed}: {name}" for name in misses(results)]
        run_log.print_summary(results)
    if missed:
        print("missed:", ", ".join(missed))
        raise SystemExit(1)


if __name__ == "__main__":
    config.main(main)

"""Does each loss, and each way of tuning, learn? calc from one warm start, held-out accuracy after.

    python bench/losses.py                           # a quarter of an hour on 2 cores
    python bench/losses.py --rows=gspo,calc_qlora.py --model=out/calc_sft --save_to=evidence/losses

Each row is configs/calc.py with that loss, or the config of that name, and differs in nothing else;
then 512 held-out problems, greedy. One update per batch, so nothing is clipped: the losses differ
by how they weigh tokens. Rows that end in ":off" make four updates a batch (updates_per_batch=2,
minibatches=2) with that loss's usual clip. Exit code 1 if a row stays below --at_least.
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
import train_grpo
import train_sft
from run import page as run_page

LOSSES = ("dapo", "grpo", "dr_grpo", "gspo", "cispo")
OFF_POLICY = tuple(f"{loss}:off" for loss in LOSSES)
# Of their papers; the others have the default. cispo bounds the ratio only above.
CLIP = {
    "gspo": ["--clip_low=3e-4", "--clip_high=4e-4"],
    "cispo": ["--clip_high=1.0"],
}


@dataclass
class Config:
    model: str = ""  # the warm start; "": made by calc_sft.py
    out_dir: str = "out/losses"  # one run each; must be new or empty
    rows: tuple[str, ...] = LOSSES + OFF_POLICY + ("calc_lora.py", "calc_qlora.py")
    seed: int = 0  # of everything
    at_least: float = 0.93  # held-out accuracy that each row has to reach
    save_to: str = ""  # folder for a table and the metrics of each row


def arguments(row: str) -> list[str]:
    """Returns the command line of a row."""
    if row.endswith(".py"):
        return ["--config", row]
    loss, _, off = row.partition(":")
    argv = ["--config", "calc.py", f"--loss={loss}"]
    if off:
        argv += ["--updates_per_batch=2", "--minibatches=2"]
        argv += CLIP.get(loss, [])
    return argv


def run(cfg: Config) -> list[dict]:
    """Trains and evaluates every row; returns the numbers."""
    out_dir = config.fresh_dir(cfg.out_dir)
    model = cfg.model or str(out_dir / "calc_sft")
    if not cfg.model:
        argv = ["--config", "calc_sft.py", f"--out_dir={model}", f"--seed={cfg.seed}"]
        train_sft.train(config.parse(train_sft.Config, argv, train_sft.check))
    results = []
    for row in cfg.rows:
        # 1. train
        folder = out_dir / row.replace(":", "_").removesuffix(".py")
        argv = [*arguments(row), f"--model={model}", f"--out_dir={folder}", f"--seed={cfg.seed}"]
        train_cfg = config.parse(train_grpo.Config, argv, train_grpo.check)
        if not results:
            before = demo.evaluated(train_cfg, model, str(out_dir / "eval_before"))
        train_grpo.train(train_cfg)

        # 2. evaluate, with the same prompts for each row
        after = demo.evaluated(train_cfg, str(folder), str(folder / "eval"))
        metrics = run_page.read(folder / "metrics.jsonl")
        results.append(
            {
                "row": row,
                "before": before["accuracy"],
                "after": after["accuracy"],
                "ci95_low": after["ci95_low"],
                "ci95_high": after["ci95_high"],
                "problems": after["problems"],
                "steps": len(metrics),
                "seconds_per_step": sorted(m["seconds"] for m in metrics)[len(metrics) // 2],
                "clip_frac": max(m.get("clip_frac", 0.0) for m in metrics),
            }
        )
        print(f"=== {row}: {before['accuracy']:.3f} -> {after['accuracy']:.3f}\n", flush=True)
        if cfg.save_to:
            Path(cfg.save_to).mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "metrics.jsonl", f"{cfg.save_to}/{folder.name}.jsonl")
    return results


def main(argv: list[str]) -> None:
    cfg = config.parse(Config, argv)
    results = run(cfg)
    lines = ["row            before  after  95 % interval  steps  s/step  clip_frac, at most"]
    for result in results:
        lines.append(
            "{row:14s} {before:6.3f} {after:6.3f}  {ci95_low:.3f} - {ci95_high:.3f}  "
            "{steps:5d}  {seconds_per_step:6.2f}  {clip_frac:.3f}".format(**result)
        )
    print("\n".join(lines))
    if cfg.save_to:
        Path(cfg.save_to, "table.txt").write_text("\n".join(lines) + "\n")
        Path(cfg.save_to, "table.json").write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(any(result["after"] < cfg.at_least for result in results))


if __name__ == "__main__":
    config.main(main)

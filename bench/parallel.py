"""Compares several processes with one: the same steps of a config, from the same start.

    python bench/parallel.py                            # SFT, full weights, LoRA, three tools
    python bench/parallel.py --cases=calc --sizes=2     # less of it

Each run is one of a user's, `python train_grpo.py … --parallel=fsdp --gpus=2`. Printed and written
to evidence/bench/parallel.json: the largest difference of any number that the line of a step
prints, of any other metric, and of any weight, from one process. token_budget is small, so that
every rank has micro-batches in every step.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_grpo  # noqa: E402
import train_sft  # noqa: E402

STEPS = 5
SMALL = ["--token_budget=1024"]
# name: (script, config, the case whose model it goes on from, what else is given)
CASES = {
    "calc_sft": ("train_sft.py", "calc_sft.py", "", ["--rows=160"]),
    "calc_sft_adamw": (
        "train_sft.py",
        "calc_sft.py",
        "",
        ["--rows=160", "--optimizer=adamw", "--learning_rate=3e-3"],
    ),
    "multi_sft": ("train_sft.py", "multi_sft.py", "", ["--rows=160"]),
    "calc": ("train_grpo.py", "calc.py", "calc_sft", [f"--steps={STEPS}"]),
    "calc_lora": ("train_grpo.py", "calc_lora.py", "calc_sft", [f"--steps={STEPS}"]),
    "calc_qlora": ("train_grpo.py", "calc_qlora.py", "calc_sft", [f"--steps={STEPS}"]),
    "multi": ("train_grpo.py", "multi.py", "multi_sft", [f"--steps={STEPS}"]),
}
COLUMNS = {"train_grpo.py": train_grpo.COLUMNS, "train_sft.py": train_sft.COLUMNS}
# of the clock, of one process's memory, of a cache that each rank has for itself
NOT_COMPARED = ("seconds", "gpu_gib", "tools_leaked")


def run(script: str, arguments: list[str]) -> None:
    command = [sys.executable, script, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def rows_of(out_dir: Path) -> list[dict]:
    rows = []
    for line in (out_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({k: v for k, v in row.items() if not any(n in k for n in NOT_COMPARED)})
    return rows


def compare(script: str, one: Path, several: Path) -> dict:
    """Returns how far two runs are apart."""
    printed_differ = 0
    metric_difference = 0.0
    for ours, theirs in zip(rows_of(one), rows_of(several), strict=True):
        for name, value in ours.items():
            other = theirs[name]
            form = COLUMNS[script].get(name)
            if form and f"{value:{form}}" != f"{other:{form}}":
                printed_differ += 1
            metric_difference = max(metric_difference, abs(value - other))
    (file,) = one.glob("*.safetensors")
    weights = load_file(file)
    others = load_file(several / file.name)
    weight_difference = 0.0
    for name, weight in weights.items():
        difference = (weight.float() - others[name].float()).abs().max().item()
        weight_difference = max(weight_difference, difference)
    return {
        "steps": len(rows_of(one)),
        "printed_numbers_that_differ": printed_differ,
        "largest_difference_of_a_metric": metric_difference,
        "largest_difference_of_a_weight": weight_difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="calc_sft,calc_sft_adamw,calc,calc_lora,multi")
    parser.add_argument("--kinds", default="ddp,fsdp")
    parser.add_argument("--sizes", default="2,4")
    parser.add_argument("--save_to", default=str(ROOT / "evidence/bench/parallel.json"))
    arguments = parser.parse_args()
    kinds = arguments.kinds.split(",")
    sizes = [int(size) for size in arguments.sizes.split(",")]

    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.cases.split(","):
            script, file, start, options = CASES[name]
            common = ["--config", file, *SMALL, *options]
            if start:
                begun = Path(folder) / start
                if not begun.exists():
                    # in full: the tokens of a model that knows nothing are all alike, and a
                    # rounding then decides now and then which one is sampled
                    first, config, *_ = CASES[start]
                    run(first, ["--config", config, f"--out_dir={begun}"])
                common.append(f"--model={begun}")
            one = Path(folder) / f"{name}-one"
            run(script, [*common, f"--out_dir={one}"])
            for kind in kinds:
                for size in sizes:
                    out_dir = Path(folder) / f"{name}-{kind}{size}"
                    flags = [f"--parallel={kind}", f"--gpus={size}", f"--out_dir={out_dir}"]
                    run(script, [*common, *flags])
                    result = {"case": name, "parallel": kind, "processes": size}
                    result |= compare(script, one, out_dir)
                    print(json.dumps(result), flush=True)
                    results.append(result)
    about = {"command": " ".join(["python", *sys.argv]), "torch": torch.__version__}
    Path(arguments.save_to).write_text(json.dumps(about | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Proves that a change of the code's shape changes nothing that is learnt: three steps of several
configs, as metrics and as the sha256 of the weights, recorded before and compared after.

    python bench/three_steps.py --checkout=../before --record=evidence/house/three_steps.json
    python bench/three_steps.py --compare=evidence/house/three_steps.json

Each case runs a checkout's own scripts as a user would, so the two sides need share no python
names. Equal means: every metric but times and what INTENDED allows, and every byte of the model.
That holds on one machine with one set of packages; elsewhere, record anew. One thread is used: two
add up in another order than one, and of older commits the weights then differed from run to run on
a busy machine (dev/log.md, "Two threads").
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OFF_POLICY = [
    "--loss=gspo",
    "--updates_per_batch=2",
    "--minibatches=2",
    "--beta=0.02",
    "--is_correction=truncate",
    "--clip_low=3e-4",
    "--clip_high=4e-4",
]
# name: (script, config, the warm start it goes on from, what else is given)
CASES = {
    "calc_sft": ("train_sft.py", "calc_sft.py", "", ["--rows=96", "--warmup=1"]),
    "calc": ("train_grpo.py", "calc.py", "calc_sft", ["--steps=3"]),
    "calc_lora": ("train_grpo.py", "calc_lora.py", "calc_sft", ["--steps=3"]),
    "multi": ("train_grpo.py", "multi.py", "multi_sft", ["--steps=3"]),
    "off_policy": ("train_grpo.py", "calc.py", "calc_sft", ["--steps=3", *OFF_POLICY]),
}
# of the clock or of the memory, and so never the same twice
NOT_COMPARED = ("seconds", "tools_leaked", "gpu_gib")
# Intended changes since the recording, and by how much at most: a new recording can empty this.
INTENDED = {
    "mismatch_kl": 1e-8,  # computed in double now, by expm1: it was noise here, and sometimes < 0
}


def run(checkout: Path, script: str, arguments: list[str]) -> None:
    """Runs a script of the checkout, with what it prints only where it fails."""
    command = [sys.executable, script, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def outcome(out_dir: Path) -> dict:
    """Returns what is compared of a run: {"metrics": a dict a step, "weights": {file: sha256}}."""
    metrics = []
    for line in (out_dir / "metrics.jsonl").read_text().splitlines():
        row = {}
        for key, value in json.loads(line).items():
            if not any(part in key for part in NOT_COMPARED):
                row[key] = value
        metrics.append(row)
    weights = {}
    for file in sorted(out_dir.glob("*.safetensors")):
        weights[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"metrics": metrics, "weights": weights}


def is_same(key: str, old, new) -> bool:
    """Says whether two values of a metric are equal, or differ as intended."""
    if key in INTENDED and old is not None and new is not None:
        return abs(old - new) <= INTENDED[key]
    return old == new


def differences(before: dict, after: dict) -> list[str]:
    """Says which metrics and files of two outcomes are not the same; nothing where all are."""
    lines = []
    if before["weights"].keys() != after["weights"].keys():
        lines.append(f"files were {list(before['weights'])}, are {list(after['weights'])}")
    for file, digest in after["weights"].items():
        if before["weights"].get(file) != digest:
            lines.append(f"{file} has other bytes")
    if len(before["metrics"]) != len(after["metrics"]):
        lines.append(f"{len(before['metrics'])} steps were, {len(after['metrics'])} are")
    for old, new in zip(before["metrics"], after["metrics"], strict=False):
        for key in sorted(old.keys() | new.keys()):
            if not is_same(key, old.get(key), new.get(key)):
                lines.append(f"step {old['step']}: {key} was {old.get(key)}, is {new.get(key)}")
    return lines


def warm_start(checkout: Path, folder: Path, name: str) -> Path:
    """Returns the folder of a model that a whole SFT run made; trains it now if it is not there."""
    model = folder / name
    if not (model / "model.safetensors").exists():
        run(checkout, "train_sft.py", ["--config", f"{name}.py", f"--out_dir={model}"])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", default=str(ROOT), help="whose scripts are run")
    parser.add_argument("--warm", default=str(ROOT / "out" / "warm"), help="folder of warm starts")
    parser.add_argument("--record", help="write the outcomes to this file")
    parser.add_argument("--compare", help="compare the outcomes with this file")
    arguments = parser.parse_args()
    checkout = Path(arguments.checkout).resolve()
    warm_starts = Path(arguments.warm).resolve()
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (script, config, warm, options) in CASES.items():
            out_dir = Path(folder) / name
            command = ["--config", config, f"--out_dir={out_dir}", *options]
            if warm:
                model = warm_start(checkout, warm_starts, warm)
                command.append(f"--model={model}")
            run(checkout, script, command)
            outcomes[name] = outcome(out_dir)
            print(f"{name}: {len(outcomes[name]['metrics'])} steps", flush=True)
    if arguments.record:
        Path(arguments.record).write_text(json.dumps(outcomes, indent=1) + "\n")
    if arguments.compare:
        before = json.loads(Path(arguments.compare).read_text())
        all_equal = True
        for name in CASES:
            lines = differences(before[name], outcomes[name])
            print(f"{name + ':':12} {'DIFFERS' if lines else 'equal'}")
            for line in lines:
                all_equal = False
                print(f"  {line}")
        sys.exit(0 if all_equal else 1)


if __name__ == "__main__":
    main()

"""Proves that a change of the code's shape changes nothing that is learnt: three steps of several
configs, as metrics and as the sha256 of the weights, recorded before and compared after.

    python bench/three_steps.py --checkout=../before --record=evidence/house/three_steps.json
    python bench/three_steps.py --compare=evidence/house/three_steps.json

Each case runs a checkout's own scripts as a user would, so the two sides need share no python
names. Equal means: every metric but times, and every byte of what was saved as the model. That
holds on one machine with one set of packages; elsewhere, record anew.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OFF_POLICY = ["--loss=gspo", "--updates_per_batch=2", "--minibatches=2", "--beta=0.02"]
OFF_POLICY += ["--is_correction=truncate", "--clip_low=3e-4", "--clip_high=4e-4"]
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


def run(checkout: Path, script: str, arguments: list[str]) -> None:
    """Runs a script of the checkout, with what it prints only where it fails."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def outcome(out_dir: Path) -> dict:
    """What a run is compared by: {"metrics": one dict a step, "weights": {file: sha256}}."""
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    metrics = []
    for row in map(json.loads, lines):
        kept = {k: v for k, v in row.items() if not any(part in k for part in NOT_COMPARED)}
        metrics.append(kept)
    weights = {}
    for file in sorted(out_dir.glob("*.safetensors")):
        weights[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"metrics": metrics, "weights": weights}


def print_differences(name: str, before: dict, after: dict) -> None:
    """Prints which metrics and files are not the same."""
    for file, digest in after["weights"].items():
        if before["weights"].get(file) != digest:
            print(f"{name}: {file} has other bytes")
    for old, new in zip(before["metrics"], after["metrics"], strict=True):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                print(f"{name}, step {old['step']}: {key} was {old.get(key)}, is {new.get(key)}")


def warm_start(checkout: Path, folder: Path, name: str) -> Path:
    """The folder of a model that a whole SFT run made, trained now if it is not there."""
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
    given = parser.parse_args()
    checkout = Path(given.checkout).resolve()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (script, config, warm, more) in CASES.items():
            out_dir = Path(folder) / name
            arguments = ["--config", config, f"--out_dir={out_dir}", *more]
            if warm:
                model = warm_start(checkout, Path(given.warm).resolve(), warm)
                arguments.append(f"--model={model}")
            run(checkout, script, arguments)
            found[name] = outcome(out_dir)
            print(f"{name}: {len(found[name]['metrics'])} steps", flush=True)
    if given.record:
        Path(given.record).write_text(json.dumps(found, indent=1) + "\n")
    if given.compare:
        before = json.loads(Path(given.compare).read_text())
        differ = [name for name in CASES if found[name] != before[name]]
        for name in CASES:
            print(f"{name + ':':12} {'DIFFERS' if name in differ else 'equal'}")
        for name in differ:
            print_differences(name, before[name], found[name])
        sys.exit(bool(differ))


if __name__ == "__main__":
    main()

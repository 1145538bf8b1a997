"""Compares several processes with one: the same steps of a config, from the same start.

    python bench/parallel.py                                # all cases: an hour on 2 cores
    python bench/parallel.py --cases=calc --sizes=2         # less of it
    python bench/parallel.py --models=out                   # start from out/calc_sft and others
    python bench/parallel.py --float64=true --sizes=2,4     # is what is left a rounding?
    # other results in the file stay

Each run is one of a user's, `python train_grpo.py … --parallel=fsdp --gpus=2`; one process is
started as torchrun would. Printed and written to evidence/bench/parallel.json: the largest
difference of any number that the line of a step prints, of any other metric, and of any weight,
from one process with parallel=none. token_budget is small, so that every rank has micro-batches in
every step.
"""

import argparse
import json
import os
import socket
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

SMALL = ["--token_budget=512"]
FEW = ["--steps=5", "--prompts_per_step=4"]
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
    "calc": ("train_grpo.py", "calc.py", "calc_sft", FEW),
    "calc_lora": ("train_grpo.py", "calc_lora.py", "calc_sft", FEW),
    "calc_qlora": ("train_grpo.py", "calc_qlora.py", "calc_sft", FEW),
    "multi": ("train_grpo.py", "multi.py", "multi_sft", FEW),
    "chart_sft": ("train_sft.py", "chart_sft.py", "", []),
    "chart": ("train_grpo.py", "chart.py", "chart_sft", FEW),
}
BY_DEFAULT = "calc_sft_adamw,calc,calc_lora,calc_qlora,multi,chart,calc_sft"
COLUMNS = {"train_grpo.py": train_grpo.COLUMNS, "train_sft.py": train_sft.COLUMNS}
# of the clock, of one process's memory, of a cache that each rank has for itself
NOT_COMPARED = ("seconds", "gpu_gib", "tools_leaked")


def run(script: str, arguments: list[str], is_rank: bool = False, is_float64: bool = False) -> None:
    """Runs a script. is_rank: as torchrun starts the only process of a group."""
    command = [sys.executable, script, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if is_float64:
        command[1] = str(ROOT / "bench/in_float64.py")
        environment["NANOTOOL_SCRIPT"] = script
    if is_rank:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
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
        difference = (weight.double() - others[name].double()).abs().max().item()
        weight_difference = max(weight_difference, difference)
    return {
        "steps": len(rows_of(one)),
        "printed_numbers_that_differ": printed_differ,
        "largest_difference_of_a_metric": metric_difference,
        "largest_difference_of_a_weight": weight_difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=BY_DEFAULT)
    parser.add_argument("--kinds", default="ddp,fsdp,deepspeed")
    parser.add_argument("--sizes", default="1,2,4")
    parser.add_argument("--models", default="", help="folder of models to start from, if there")
    parser.add_argument("--float64", choices=("true", "false"), default="false")
    parser.add_argument("--save_to", default=str(ROOT / "evidence/bench/parallel.json"))
    arguments = parser.parse_args()
    kinds = arguments.kinds.split(",")
    sizes = [int(size) for size in arguments.sizes.split(",")]
    is_float64 = arguments.float64 == "true"

    save_to = Path(arguments.save_to)
    results = json.loads(save_to.read_text())["results"] if save_to.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.cases.split(","):
            script, file, start, options = CASES[name]
            common = ["--config", file, *SMALL, *options]
            if start:
                begun = Path(arguments.models or folder).resolve() / start
                if not begun.exists():
                    # in full: the tokens of a model that knows nothing are all alike, and a
                    # rounding then decides now and then which one is sampled
                    first, config, *_ = CASES[start]
                    run(first, ["--config", config, f"--out_dir={begun}"])
                common.append(f"--model={begun}")
            one = Path(folder) / f"{name}-one"
            run(script, [*common, f"--out_dir={one}"], is_float64=is_float64)
            for kind in kinds:
                if kind == "deepspeed" and name == "calc_sft":
                    continue  # muon: refused
                for size in sizes:
                    out_dir = Path(folder) / f"{name}-{kind}{size}"
                    flags = [f"--parallel={kind}", f"--gpus={size}", f"--out_dir={out_dir}"]
                    run(script, [*common, *flags], size == 1, is_float64)
                    about = {"case": name, "parallel": kind, "processes": size}
                    about["dtype"] = "float64" if is_float64 else "as in the config"
                    result = about | compare(script, one, out_dir)
                    print(json.dumps(result), flush=True)
                    others = [row for row in results if about.items() - row.items()]
                    results = [*others, result | {"config": " ".join([file, *SMALL, *options])}]
                    written = {"torch": torch.__version__, "results": results}
                    save_to.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()

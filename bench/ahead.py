"""Seconds a step with and without --ahead=1, for tools that take 0, 1 and 3 seconds; and accuracy.

    python train_sft.py --config calc_sft.py       # the model that both begin with
    python bench/ahead.py > evidence/bench/ahead.txt

calc.py with full weights and one server on this machine: dev/stand_in.py, many turns at once, in a
process of its own with a core of its own. Latencies are slept before each call of python, all calls
at once. Runs with and without take turns, for each latency; shown is the median of their steps but
the first two. Then 40 steps each with three seeds, without latency: greedy accuracy on held-out
rows before and after.
"""

import argparse
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOL = '''
import asyncio
import os

from tools.python import prepare
from tools.python import python as at_once


async def python(code: str) -> str:
    """Run Python code in a fresh process and return what it prints.

    Args:
        code: Python 3 code with numpy and sympy, no network. Use print to see a value.
    """
    await asyncio.sleep(float(os.environ["LATENCY"]))
    return await at_once(code)


python.prepare = prepare
'''
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def serve(model: str, port: int) -> subprocess.Popen:
    """Starts the server, and waits until it answers."""
    command = [sys.executable, str(ROOT / "dev/stand_in.py")]
    command += [f"--model={model}", f"--port={port}", "--batched=true"]
    server = subprocess.Popen(command, env=ENVIRONMENT)
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return server
        except OSError:
            time.sleep(0.5)
    sys.exit(f"the server has ended: {' '.join(command)}")


def train(
    model: str, port: int, folder: str, prompts: int, latency: float, *options: str
) -> tuple[list, str]:
    """Runs calc.py; returns (rows of metrics.jsonl, what was printed)."""
    out_dir = tempfile.mkdtemp(dir=folder)
    command = [sys.executable, "train_grpo.py", "--config", "calc.py", f"--model={model}"]
    command += ["--engine=server", f"--urls=http://127.0.0.1:{port}", f"--out_dir={out_dir}"]
    command += [f"--tools={folder}/slow.py:python", "--tool_concurrency=256", "--save_every=0"]
    command += [f"--prompts_per_step={prompts}"]
    environment = ENVIRONMENT | {"LATENCY": str(latency)}
    done = subprocess.run(
        [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(done.args)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").open()]
    return rows, done.stdout


def medians(rows: list[dict]) -> dict:
    """Computes the medians of the steps but the first two."""
    names = ("seconds", "rollout_seconds", "sync_seconds")
    return {name: statistics.median(row[name] for row in rows[2:]) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="out/calc_sft")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=24, help="in a step, eight samples of each")
    parser.add_argument("--latencies", default="0,1,3")
    parser.add_argument("--seeds", default="0,1,2")
    arguments = parser.parse_args()
    model = str((ROOT / arguments.model).resolve())
    load = os.getloadavg()[0]
    print("python " + " ".join(sys.argv))
    print(f"{os.cpu_count()} cores, {load:.1f} processes on them when this began")
    server = serve(model, arguments.port)
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "slow.py").write_text(TOOL)
            run = functools.partial(train, model, arguments.port, folder, arguments.prompts)

            print("latency  ahead  s a step  waits for rollouts  sync")
            for text in arguments.latencies.split(",") if arguments.latencies else ():
                latency = float(text)
                rows = {"0": [], "1": []}
                for _ in range(arguments.rounds):  # by turns, as others use this machine too
                    for ahead in rows:
                        flags = (f"--ahead={ahead}", f"--steps={arguments.steps}")
                        rows[ahead].append(run(latency, *flags)[0])
                for ahead, runs in rows.items():
                    both = [medians(of_run) for of_run in runs]
                    means = {name: statistics.mean(m[name] for m in both) for name in both[0]}
                    print(
                        f"{latency:7.0f}  {ahead:>5}  {means['seconds']:8.2f}"
                        f"  {means['rollout_seconds']:18.2f}  {means['sync_seconds']:4.2f}"
                    )
                sys.stdout.flush()

            print("seed  ahead  accuracy before  after 40 steps  s a step")
            for seed in arguments.seeds.split(",") if arguments.seeds else ():
                for ahead in ("0", "1"):
                    flags = (f"--ahead={ahead}", f"--seed={seed}", "--eval_every=40")
                    rows, said = run(0.0, *flags, "--eval_rows=256")
                    after = re.search(r"^val_accuracy:\s+(\S+)", said, re.M)[1]
                    before = rows[0]["val_accuracy"]
                    seconds = medians(rows)["seconds"]
                    print(f"{seed:>4}  {ahead:>5}  {before:15.3f}  {after:>14}  {seconds:8.2f}")
                    sys.stdout.flush()
    finally:
        server.terminate()


if __name__ == "__main__":
    main()

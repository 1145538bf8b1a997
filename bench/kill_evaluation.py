"""Kills an evaluation of a trained model at random moments, goes on, and compares its numbers.

    python bench/kill_evaluation.py out/calc evidence/bench/kill_evaluation.txt greedy
    python bench/kill_evaluation.py out/calc evidence/bench/kill_evaluation_sampled.txt sampled 128

By SIGKILL, five times, greedy or at temperature 1: at a random number of finished trajectories, and
at random milliseconds behind that. What one has begun the next goes on with. The last argument is
how many problems.
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KILLS = 5
WAYS = {"greedy": [], "sampled": ["--temperature=1", "--n=2", "--k=1,2"]}


def command(run: str, save_to: Path, options: list[str]) -> list[str]:
    script = [sys.executable, str(ROOT / "evaluate.py"), f"--run={run}", f"--save_to={save_to}"]
    return [*script, "--resume=true", "--batch=64", *options]


def count(folder: Path) -> int:
    file = folder / "rollouts.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def killed(argv: list[str], folder: Path, total: int, rng: random.Random) -> tuple[int, int]:
    """Plays until a random moment; returns how many there were before, and at the kill."""
    before = count(folder)
    goal = rng.randint(before, before + (total - before) // 2)
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while count(folder) < goal and child.poll() is None:
        time.sleep(0.005)
    time.sleep(rng.random() * 0.2)
    child.send_signal(signal.SIGKILL)
    child.wait()
    return before, count(folder)


def main(run: str, target: str, way: str, limit: str = "512") -> None:
    rng = random.Random(17)
    options = [*WAYS[way], f"--limit={limit}"]
    with tempfile.TemporaryDirectory() as place, open(target, "w") as file:

        def say(line: str) -> None:
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()

        whole = Path(place, "whole")
        started = time.monotonic()
        subprocess.run(command(run, whole, options), check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        total = count(whole)
        ours = Path(place, "killed")
        argv = command(run, ours, options)
        say(f"{way}: {total} trajectories, {seconds:.1f} s without a kill")
        for number in range(KILLS):
            before, after = killed(argv, ours, total, rng)
            say(f"  kill {number + 1}: {before} were there, {after} at the kill")
        assert not (ours / "eval.json").exists(), "it ended before the last kill"
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        texts = [(folder / "eval.json").read_bytes() for folder in (whole, ours)]
        same = "the same bytes" if texts[0] == texts[1] else "OTHER BYTES"
        say(f"  eval.json: {same}; rollouts.jsonl: {count(ours)} lines")
        say(texts[1].decode())


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The agent endpoint with 200 requests at once, beside evaluate.py on the same rows.

    python bench/agent.py --run=out/calc --save_to=evidence/bench/agent.json

Three processes on one machine: one plays rows as evaluate.py does, one is serve.agent, and this one
is all of its clients: plain sockets, because a client library would take more of the machine than
the server. By turns, on rows that neither has seen: a round of 200 rollouts here, one of the same
200 there. Both are greedy, so they have to sample the same number of tokens: it is checked. Linux
only, for the CPU time of the server. Exit code 1 if an answer is lost, or if the endpoint has less
than LEAST of evaluate.py's tokens per second.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)

LEAST = 0.8


@dataclass
class Config:
    run: str = "out/calc"  # the out_dir of a run of configs/calc.py
    at_once: int = 200
    rounds: int = 7
    save_to: str = ""  # a .json for the results
    plays: bool = False  # this is the process that plays as evaluate.py does


# -- evaluate.py's side, in a process of its own


def play_rounds(cfg: Config) -> None:
    """Plays a round for each line of stdin; prints what it took. First it prints the questions."""
    import evaluate
    from tasks import calc

    count = cfg.at_once * (cfg.rounds + 1)  # the first round warms both sides up
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        rows = calc.rows("test", seed=17, n=count)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = evaluate.Config(run=cfg.run)
        rollout_cfg = evaluate.load_config([f"--data={file}"], given)
        player = evaluate.open_player(rollout_cfg, given)
    with player:
        print(json.dumps([row["prompt"] for row in rows]), flush=True)
        for start in range(0, count, cfg.at_once):
            sys.stdin.readline()
            began = time.perf_counter()
            cpu = time.process_time()
            played = player.play(player.examples[start : start + cfg.at_once], first_group=start)
            seconds = time.perf_counter() - began
            tokens = sum(trajectory.new_tokens for trajectory in played)
            took = {"seconds": seconds, "cpu": time.process_time() - cpu, "tokens": tokens}
            print(json.dumps(took), flush=True)


# -- the clients


async def ask(port: int, model: str, question: str, seconds: list[float]) -> int:
    """Sends one request; returns the tokens that were sampled."""
    body = {"model": model, "messages": [{"role": "user", "content": question}]}
    body = json.dumps(body).encode()
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    seconds.append(time.perf_counter() - start)
    status, _, body = answer.partition(b"\r\n\r\n")
    assert status.startswith(b"HTTP/1.1 200"), answer[:300]
    return json.loads(body)["usage"]["completion_tokens"]


async def ask_all(port: int, model: str, questions: list[str]) -> dict:
    waits = []
    start = time.perf_counter()
    tokens = await asyncio.gather(*(ask(port, model, question, waits) for question in questions))
    total = time.perf_counter() - start
    waits.sort()
    return {
        "seconds": total,
        "tokens": sum(tokens),
        "answers": len(tokens),
        "p50": waits[len(waits) // 2],
        "p99": waits[len(waits) * 99 // 100],
    }


# -- both by turns


def cpu_seconds(pid: int) -> float:
    """Reads how much CPU time a process has used (Linux), however busy the machine is."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(cfg: Config) -> dict:
    """Starts both, and returns what `show` prints."""
    arguments = [f"--{key}={getattr(cfg, key)}" for key in ("run", "at_once", "rounds")]
    plays = subprocess.Popen(
        [sys.executable, __file__, *arguments, "--plays=true"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    serves = subprocess.Popen(
        [sys.executable, "-m", "serve.agent", f"--run={Path(cfg.run).resolve()}", "--port=0"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        questions = json.loads(plays.stdout.readline())
        words = serves.stdout.readline().split()  # serving calc at http://127.0.0.1:8000/v1, …
        port = int(words[3].rpartition(":")[2].partition("/")[0])
        rounds = []
        for start in range(0, len(questions), cfg.at_once):
            plays.stdin.write("\n")
            plays.stdin.flush()
            evaluated = json.loads(plays.stdout.readline())
            part = questions[start : start + cfg.at_once]
            cpu = cpu_seconds(serves.pid)
            served = asyncio.run(ask_all(port, words[1], part))
            served["cpu"] = cpu_seconds(serves.pid) - cpu
            assert served["tokens"] == evaluated["tokens"], "the rollouts are not the same"
            rounds.append({"evaluate": evaluated, "served": served})
    finally:
        for process in (plays, serves):
            process.terminate()
            process.wait()
    return {
        "run": cfg.run,
        "at_once": cfg.at_once,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # of the whole machine, this included
        "rounds": rounds[1:],
    }


def speed(one: dict) -> float:
    return one["tokens"] / one["seconds"]


def show(measured: dict) -> float:
    """Prints it; returns the endpoint's share of evaluate.py's tokens per second: the median of
    those of the rounds."""
    rounds = measured["rounds"]
    shares = [speed(each["served"]) / speed(each["evaluate"]) for each in rounds]
    share = statistics.median(shares)
    answers = sum(each["served"]["answers"] for each in rounds)
    print(f"answers: {answers} of {len(rounds)} rounds of {measured['at_once']} requests at once")
    for name in ("evaluate", "served"):
        median = statistics.median(speed(each[name]) for each in rounds)
        print(f"{name}_tokens_per_second: {median:.0f}")
    print(f"share: {share:.3f} (median of {', '.join(f'{one:.2f}' for one in shares)})")
    costs = [each["evaluate"]["cpu"] / each["served"]["cpu"] for each in rounds]
    print(f"share by CPU seconds of both processes: {statistics.median(costs):.3f}")
    for name in ("p50", "p99"):
        median = statistics.median(each["served"][name] for each in rounds)
        print(f"{name}_seconds: {median:.2f}")
    print(f"cores: {measured['cores']}, load of the machine {measured['load']:.1f}")
    return share


def main(argv: list[str]) -> None:
    cfg = config.parse(Config, argv)
    if cfg.plays:
        play_rounds(cfg)
        return
    measured = measure(cfg)
    share = show(measured)
    if cfg.save_to:
        Path(cfg.save_to).write_text(json.dumps(measured, indent=1) + "\n")
    if share < LEAST:
        raise SystemExit(f"agent: {share:.2f} of evaluate.py's speed, expected at least {LEAST}")


if __name__ == "__main__":
    config.main(main)

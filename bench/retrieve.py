"""The /retrieve server: requests per second with many clients, and how long each waits.

    python bench/retrieve.py                                 # a minute, most of it indexing
    python bench/retrieve.py --dense=a_model --save_to=evidence/bench/retrieve.json

The server is a process of its own, and so are its clients, all of them in one: each sends a
request, reads the answer and sends the next, over a connection that it keeps. The corpus and the
queries are those of bench/search.py: every request is another one. Rounds are measured one after
the other, and the median told. Linux only, for the CPU time of the server, which says what a
request costs on a machine that does other work too. Exit code 1 if BM25 answers fewer requests per
second than LEAST_PER_SECOND over 100,000 passages.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)

LEAST_PER_SECOND = 500.0


@dataclass
class Config:
    passages: int = 100_000
    clients: int = 64
    requests: int = 3000  # of a round
    rounds: int = 5
    topk: int = 3
    dense: str = ""  # a model, by folder or name; "" = BM25
    seed: int = 0
    save_to: str = ""  # a .json for the results
    corpus: str = ""  # one that is there; "" = it is generated
    port: int = 0  # for the process of the clients


# -- the clients, in a process of their own


async def client(port: int, bodies: list[bytes], seconds: list[float]) -> None:
    """Sends its requests one after the other; appends how long each took. Plain sockets: a client
    library would take more of the machine than the server."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while bodies:
        body = bodies.pop()
        head = f"POST /retrieve HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-length: {len(body)}"
        start = time.perf_counter()
        writer.write(f"{head}\r\n\r\n".encode() + body)
        answer_head = await reader.readuntil(b"\r\n\r\n")
        assert answer_head.startswith(b"HTTP/1.1 200"), answer_head
        length = int(answer_head.lower().partition(b"content-length:")[2].split()[0])
        answer = json.loads(await reader.readexactly(length))
        seconds.append(time.perf_counter() - start)
        assert answer["result"][0], f"nothing found for {body}"
    writer.close()


async def one_round(cfg: Config, queries: list[str]) -> dict:
    bodies = []
    for query in queries:
        request = {"queries": [query], "topk": cfg.topk, "return_scores": True}
        bodies.append(json.dumps(request).encode())
    seconds = []
    start = time.perf_counter()
    await asyncio.gather(*(client(cfg.port, bodies, seconds) for _ in range(cfg.clients)))
    total = time.perf_counter() - start
    seconds.sort()
    return {
        "per_second": len(seconds) / total,
        "p50_ms": 1000 * seconds[len(seconds) // 2],
        "p99_ms": 1000 * seconds[len(seconds) * 99 // 100],
    }


def ask(cfg: Config) -> dict:
    from bench.search import queries

    texts = queries(Path(cfg.corpus), cfg.requests * cfg.rounds)
    rounds = []
    start = time.process_time()
    for number in range(cfg.rounds):
        part = texts[number * cfg.requests : (number + 1) * cfg.requests]
        rounds.append(asyncio.run(one_round(cfg, part)))
    cpu = (time.process_time() - start) / (cfg.requests * cfg.rounds)
    return {"rounds": rounds, "clients_cpu_ms": 1000 * cpu}


# -- the server, in another


def cpu_seconds(pid: int) -> float:
    """Reads how much CPU time a process has used (Linux), however busy the machine is."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(cfg: Config) -> dict:
    """Starts the server, and the clients beside it; returns what `show` prints."""
    from bench.search import generate

    with tempfile.TemporaryDirectory() as folder:
        corpus = cfg.corpus
        if not corpus:
            corpus = str(Path(folder, "corpus.jsonl"))
            generate(Path(corpus), cfg.passages, cfg.seed)
        command = [sys.executable, "-m", "serve.retrieve", f"--corpus={corpus}", "--port=0"]
        if cfg.dense:
            command.append(f"--dense={cfg.dense}")
        root = Path(__file__).resolve().parent.parent
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
        try:
            line = server.stdout.readline()  # serving 100000 passages at http://127.0.0.1:8000/...
            port = line.rpartition(":")[2].partition("/")[0]
            argv = [sys.executable, __file__, f"--port={port}", f"--corpus={corpus}"]
            for key in ("clients", "requests", "rounds", "topk"):
                argv.append(f"--{key}={getattr(cfg, key)}")
            cpu_before = cpu_seconds(server.pid)
            done = subprocess.run(argv, stdout=subprocess.PIPE, check=True, text=True)
            cpu = cpu_seconds(server.pid) - cpu_before
            lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
            (private,) = [line.split()[1] for line in lines if line.startswith("RssAnon")]
        finally:
            server.terminate()
            server.wait()
    asked = json.loads(done.stdout.splitlines()[-1])
    rounds = asked["rounds"]
    result = {
        "kind": "dense" if cfg.dense else "bm25",
        "passages": cfg.passages,
        "clients": cfg.clients,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # of the whole machine, this included
        "server_private_mb": int(private) / 1024,
        "server_cpu_ms": 1000 * cpu / (cfg.requests * cfg.rounds),
        "clients_cpu_ms": asked["clients_cpu_ms"],
        "rounds": rounds,
    }
    for name in ("per_second", "p50_ms", "p99_ms"):
        result[name] = statistics.median(each[name] for each in rounds)
    return result


def show(measured: dict) -> None:
    each = ", ".join(f"{one['per_second']:.0f}" for one in measured["rounds"])
    print(f"kind: {measured['kind']}, {measured['passages']} passages")
    print(f"per_second: {measured['per_second']:.0f} (median of {each})")
    print(f"clients: {measured['clients']}, on the same {measured['cores']} cores")
    print(f"request_ms: p50 {measured['p50_ms']:.1f}, p99 {measured['p99_ms']:.1f}")
    server, clients = measured["server_cpu_ms"], measured["clients_cpu_ms"]
    print(f"cpu_ms of a request: server {server:.2f}, clients {clients:.2f}")
    print(f"load of the machine: {measured['load']:.1f}")
    print(f"server_private_mb: {measured['server_private_mb']:.0f}")


def main(argv: list[str]) -> None:
    cfg = config.parse(Config, argv)
    if cfg.port:
        print(json.dumps(ask(cfg)))
        return
    measured = measure(cfg)
    show(measured)
    if cfg.save_to:
        Path(cfg.save_to).write_text(json.dumps(measured, indent=1) + "\n")
    if not cfg.dense and measured["per_second"] < LEAST_PER_SECOND:
        raise SystemExit(
            f"retrieve: {measured['per_second']:.0f} requests/s, "
            f"expected at least {LEAST_PER_SECOND:g}"
        )


if __name__ == "__main__":
    config.main(main)

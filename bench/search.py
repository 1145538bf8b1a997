"""The search tool on this machine: how long a corpus takes to index, queries per second, memory.

    python bench/search.py                                   # half a minute
    python bench/search.py --passages=1000000                # a Wikipedia in small: five minutes
    python bench/search.py --save_to=evidence/bench/search.json

The passages are generated: 100 words each, drawn from 100,000 by Zipf's law, so that some words
are in all of them, as in a real text. A query is eight words of one passage; none is asked twice,
so the cache of results helps nobody. Indexing and searching are processes of their own, so that
each has its own memory. "private" is what a process takes for itself: the index is mapped, and
its pages are the system's to drop. Exit code 1 if indexing takes longer, or queries per second
through a Toolbox are fewer, than the limits below say for 100,000 passages.
"""

import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)

SECONDS, RATE = 60.0, 200.0  # indexing at most, queries per second at least


@dataclass
class Config:
    passages: int = 100_000
    queries: int = 2000
    k: int = 3  # passages in a result
    concurrency: int = 16  # calls at once, through the Toolbox
    seed: int = 0
    save_to: str = ""  # a .json for the results
    part: str = ""  # for the subprocesses: index or search
    corpus: str = ""  # for the subprocesses


def generate(path: Path, passages: int, seed: int) -> None:
    """A corpus in Search-R1's form."""
    import numpy as np

    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(letters[rng.integers(26, size=rng.integers(3, 11))]) for _ in range(100_000)]
    share = np.cumsum(1 / np.arange(1, len(words) + 1))
    with open(path, "w") as file:
        for number in range(passages):
            ids = np.searchsorted(share, rng.random(100) * share[-1])
            text = " ".join([words[i] for i in ids])
            row = {"id": str(number), "contents": f'"{words[ids[-1]]} {number}"\n{text}'}
            file.write(json.dumps(row) + "\n")


def queries(path: Path, count: int) -> list[str]:
    """Eight words of each of the first passages."""
    with open(path) as file:
        lines = [file.readline() for _ in range(count)]
    texts = [json.loads(line)["contents"].split("\n")[1].split() for line in lines if line]
    return [" ".join(words[i % 90 : i % 90 + 8]) for i, words in enumerate(texts)]


def index(cfg: Config) -> dict:
    from tools.search import Index

    start = time.perf_counter()
    found = Index(cfg.corpus)
    seconds = time.perf_counter() - start
    folder = Path(cfg.corpus + ".bm25")
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {"indexed": len(found), "index_seconds": seconds, "index_mb": size / 2**20, **memory()}


def search(cfg: Config) -> dict:
    from tools import Toolbox
    from tools.search import Index

    start = time.perf_counter()
    found = Index(cfg.corpus)
    opened = time.perf_counter() - start
    asked = queries(Path(cfg.corpus), cfg.queries)
    times = []
    for query in asked:
        start = time.perf_counter()
        assert found.search(query, cfg.k), f"nothing found for {query}"
        times.append(time.perf_counter() - start)
    times.sort()
    used = memory()  # the Toolbox would add transformers, which a run has anyway
    box = Toolbox(
        ["search"], cfg.concurrency, options=(f"search.corpus={cfg.corpus}", f"search.k={cfg.k}")
    )
    start = time.perf_counter()
    asyncio.run(called(box, asked))
    rate = len(asked) / (time.perf_counter() - start)
    assert not box.errors, f"errors: {box.errors}"
    return {
        "open_seconds": opened,
        "queries_per_second": rate,
        "one_thread_per_second": len(times) / sum(times),
        "p50_ms": 1000 * times[len(times) // 2],
        "p99_ms": 1000 * times[len(times) * 99 // 100],
        **used,
    }


async def called(box, asked: list[str]) -> None:
    """All queries through the Toolbox, as a rollout calls it."""
    session = box.open({})
    await asyncio.gather(*(session.call("search", {"query": query}) for query in asked))
    await session.close()
    await box.close()


def memory() -> dict:
    """Of this process: its peak in MB, mapped pages included, and what is its own now (Linux)."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    private = [int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")]
    return {"peak_mb": peak, "private_mb": private[0] if private else None}


def part(cfg: Config, name: str, corpus: Path) -> dict:
    """A part in a process of its own."""
    given = [
        f"--{key}={value}"
        for key, value in asdict(cfg).items()
        if key not in ("part", "corpus", "save_to")
    ]
    argv = [sys.executable, __file__, *given, f"--part={name}", f"--corpus={corpus}"]
    done = subprocess.run(argv, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(cfg: Config) -> dict:
    """All numbers, with the names that main() prints."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus.jsonl")
        generate(corpus, cfg.passages, cfg.seed)
        return {
            "passages": cfg.passages,
            "corpus_mb": corpus.stat().st_size / 2**20,
            "index": part(cfg, "index", corpus),
            "search": part(cfg, "search", corpus),
        }


def show(found: dict) -> None:
    made, used = found["index"], found["search"]
    print(f"passages: {found['passages']} ({found['corpus_mb']:.0f} MB)")
    print(f"index_seconds: {made['index_seconds']:.1f} ({made['index_mb']:.0f} MB on disk)")
    print(f"index_peak_mb: {made['peak_mb']:.0f}")
    print(f"queries_per_second: {used['queries_per_second']:.0f} (through a Toolbox)")
    print(f"one_thread_per_second: {used['one_thread_per_second']:.0f}")
    print(f"query_ms: p50 {used['p50_ms']:.2f}, p99 {used['p99_ms']:.2f}")
    print(f"search_peak_mb: {used['peak_mb']:.0f}, private {used['private_mb'] or 0:.0f}")


def misses(found: dict) -> list[str]:
    """What is slower than it has to be, with 100,000 passages."""
    seconds, rate = found["index"]["index_seconds"], found["search"]["queries_per_second"]
    late = f"search: indexed in {seconds:.0f} s, expected at most {SECONDS:g}"
    slow = f"search: {rate:.0f} queries/s, expected at least {RATE:g}"
    return [late] * (seconds > SECONDS) + [slow] * (rate < RATE)


def main(argv: list[str]) -> None:
    cfg = config.parse(Config, argv)
    if cfg.part:
        print(json.dumps({"index": index, "search": search}[cfg.part](cfg)))
        return
    found = measure(cfg)
    show(found)
    if cfg.save_to:
        Path(cfg.save_to).write_text(json.dumps(found, indent=1) + "\n")
    if missed := misses(found):
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    config.main(main)

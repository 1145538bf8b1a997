"""Tools: calls per second and latency, of what a rollout calls thousands of times.

    python bench/tools.py                         # two minutes on two idle cores
    python bench/tools.py --part=python --save_to=evidence/bench/tools.json
    python bench/tools.py --part=search           # bench/search.py says what that is

python: three codes (a print; numpy; sympy, with an equation solved in a fourth), each

    plain     as `python -c` in a subprocess: what a call costs without a fork server
    tool      by the python tool: a fresh, confined process forked from one that is warm
    session   by python_session: calls in processes that live on; one per trajectory

through a Toolbox, without its cache, `concurrency` calls at once: calls per second, and the latency
of a call in ms (median, and 99th percentile of all runs). The three take turns; medians of `runs`.
What starts a server is paid before, and shown.
"""

import asyncio
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder: we are tools.py

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)

from rich.console import Console
from rich.table import Table

from tools import Toolbox

# Calls per second, at least.
SYMPY_CALLS = 150
SESSION_CALLS = 300
CODES = {  # name: (code, what it shows)
    "print(6*7)": ("print(6*7)", "42"),
    "import numpy": ("import numpy as np\nprint(np.arange(10).sum())", "45"),
    "import sympy": ("import sympy\nprint(sympy.factorint(91))", "{7: 1, 13: 1}"),
    "sympy.solve": ("from sympy import *\nx = symbols('x')\nprint(solve(x**2 - 4))", "[-2, 2]"),
}


@dataclass
class Config:
    part: Literal["all", "python", "search"] = "all"
    concurrency: int = 4  # calls at once
    calls: int = 300  # of a code by the tool, in one run
    plain_calls: int = 12  # of a code by `python -c`, in one run
    runs: int = 5
    save_to: str = ""  # a .json for the results


# -- python


def python_calls(cfg: Config) -> dict:
    """Measures all codes in all ways; returns {"start": {server: seconds}, "codes": {name: {way:
    {"per_second", "p50_ms", "p99_ms", "runs"}}}}."""
    return asyncio.run(_python_calls(cfg))


async def _python_calls(cfg):
    # 1. the servers start
    box = Toolbox(["python", "python_session"], cfg.concurrency, timeout=60.0, cache="none")
    sessions = [box.open() for _ in range(cfg.concurrency)]
    start = {}  # server: seconds
    for server, name in (("light", "print(6*7)"), ("heavy", "import sympy")):
        code, shown = CODES[name]
        began = time.perf_counter()
        await by_tool(sessions[0], "python", code, shown)
        start[server] = time.perf_counter() - began
    await asyncio.gather(*(by_tool(s, "python_session", "1", "1") for s in sessions))

    # 2. the ways take turns
    async def plain(worker, code, shown):
        await plainly(code, shown)

    async def tool(worker, code, shown):
        await by_tool(sessions[worker], "python", code, shown)

    async def session(worker, code, shown):
        await by_tool(sessions[worker], "python_session", code, shown)

    ways = {
        "plain": (plain, cfg.plain_calls),
        "tool": (tool, cfg.calls),
        "session": (session, cfg.calls),
    }
    measured = {name: {way: [] for way in ways} for name in CODES}
    for _ in range(cfg.runs):
        for name, (code, shown) in CODES.items():
            for way, (call, calls) in ways.items():
                run = await timed_calls(call, code, shown, calls, cfg.concurrency)
                measured[name][way].append(run)
    for opened in sessions:
        await opened.close()
    await box.close()

    # 3. their medians
    codes = {}
    for name, by_way in measured.items():
        codes[name] = {way: _summary(runs) for way, runs in by_way.items()}
    return {"start": start, "codes": codes}


async def timed_calls(
    call, code: str, shown: str, calls: int, concurrency: int
) -> tuple[float, list[float]]:
    """Lets `concurrency` workers share the calls; returns calls per second, and the seconds of
    each."""
    latencies = []
    left = iter(range(calls))

    async def work(worker):
        for _ in left:
            began = time.perf_counter()
            await call(worker, code, shown)
            latencies.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(work(worker) for worker in range(concurrency)))
    return calls / (time.perf_counter() - began), latencies


async def by_tool(session, name, code, shown):
    text, error, _ = await session.call(name, {"code": code})
    if error or text != shown:
        raise RuntimeError(f"{name} said {text!r} to {code!r}, not {shown!r}")


async def plainly(code, shown):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    if output.decode().strip() != shown:
        raise RuntimeError(f"python -c said {output!r} to {code!r}, not {shown!r}")


def _summary(runs):
    latencies = []
    for _, of_run in runs:
        latencies += of_run
    latencies.sort()
    return {
        "per_second": statistics.median(per_second for per_second, _ in runs),
        "p50_ms": 1000 * statistics.median(latencies),
        "p99_ms": 1000 * latencies[int(0.99 * len(latencies))],
        "runs": [round(per_second, 1) for per_second, _ in runs],
    }


def show_python(cfg: Config, measured: dict) -> None:
    table = Table(title=f"python, {cfg.concurrency} calls at once, medians of {cfg.runs} runs")
    for column in ("code", "way", "calls/s", "of plain", "p50 ms", "p99 ms"):
        table.add_column(column, justify="left" if column in ("code", "way") else "right")
    for name, ways in measured["codes"].items():
        for way, row in ways.items():
            ratio = row["per_second"] / ways["plain"]["per_second"]
            table.add_row(
                name if way == "plain" else "",
                way,
                f"{row['per_second']:,.1f}",
                f"{ratio:,.1f} x",
                f"{row['p50_ms']:.1f}",
                f"{row['p99_ms']:.1f}",
            )
    Console(width=100).print(table)
    light, heavy = measured["start"].values()
    print(f"a server's first call: {light:.2f} s; with numpy and sympy {heavy:.2f} s")


def python_misses(measured: dict) -> list[str]:
    """Lists what is slower than it has to be."""
    codes = measured["codes"]
    sympy = codes["import sympy"]["tool"]["per_second"]
    session = min(codes[name]["session"]["per_second"] for name in CODES if "solve" not in name)
    misses = []
    if sympy < SYMPY_CALLS:
        misses.append(f"python with sympy: {sympy:.0f} calls/s, expected at least {SYMPY_CALLS}")
    if session < SESSION_CALLS:
        misses.append(f"python_session: {session:.0f} calls/s, expected at least {SESSION_CALLS}")
    return misses


# -- search: bench/search.py, which has more to set


def load_search():
    """Imports that file by its path, because tools/search.py is nearer."""
    spec = importlib.util.spec_from_file_location(
        "search_bench", Path(__file__).parent / "search.py"
    )
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(argv: list[str]) -> None:
    cfg = config.parse(Config, argv)
    measured = {}
    misses = []
    if cfg.part in ("all", "python"):
        measured["python"] = python_calls(cfg)
        show_python(cfg, measured["python"])
        misses += python_misses(measured["python"])
    if cfg.part in ("all", "search"):
        search = load_search()
        measured["search"] = search.measure(search.Config())
        print("\nsearch")
        search.show(measured["search"])
        misses += search.misses(measured["search"])
    if cfg.save_to:
        about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        about |= {"python": platform.python_version(), "config": asdict(cfg)}
        Path(cfg.save_to).parent.mkdir(parents=True, exist_ok=True)
        Path(cfg.save_to).write_text(json.dumps(about | measured, indent=1) + "\n")
    if misses:
        raise SystemExit("\n".join(misses))


if __name__ == "__main__":
    config.main(main)

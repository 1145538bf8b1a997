"""The python_session tool: state that lives for one trajectory, and what becomes of it.

    pytest tests/test_python_session.py

What takes `way` is tested with the fork server and with one process a session, as on macOS.
Hostile sessions: tests/test_hostile.py.
"""

import asyncio
import glob
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from until import PATIENCE, until

from tools import Tool, Toolbox
from tools.python_session import python_session
from tools.sandbox import caller as sandbox
from tools.sandbox import confine
from tools.sandbox.session import LOST

ROOT = Path(__file__).parent.parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="the fork server is Linux only")
ENDED = "(the session ended: what was defined is lost)"
NO_OUTPUT = "(no output: use print(...) to see a value)"


@pytest.fixture(params=[pytest.param("fork_server", marks=linux), "one_process"])
def way(request, monkeypatch):
    monkeypatch.setattr(sandbox, "has_fork_server", lambda: request.param == "fork_server")
    return request.param


def toolbox(timeout=PATIENCE):
    """Toolbox(["python_session"]), without the seconds that transformers takes for the schema."""
    parameters = {"properties": {"code": {"type": "string"}}, "required": ["code"]}
    schema = {"function": {"parameters": parameters}}
    name = "python_session"
    tool = Tool(name, schema, python_session.__call__, True, lambda _: python_session())
    return Toolbox([tool], 64, timeout, cache="none")


async def play(session, *codes):
    return [(await session.call("python_session", {"code": code}))[:2] for code in codes]


def run(*codes, timeout=PATIENCE):
    """-> (observation, error kind) of each call of one trajectory"""

    async def scene():
        session = toolbox(timeout).open()
        results = await play(session, *codes)
        await session.close()
        return results

    return asyncio.run(scene())


def children(pid):
    text = "".join(Path(path).read_text() for path in glob.glob(f"/proc/{pid}/task/*/children"))
    return [int(child) for child in text.split()]


def rests():
    if not sandbox.has_fork_server():
        return glob.glob(f"{tempfile.gettempdir()}/nanotool-{os.getpid()}-*")
    pid = sandbox._servers["heavy"].process.pid
    return children(pid) + glob.glob(f"{tempfile.gettempdir()}/nanotool-{pid}-*")


def nothing_left():
    return until(lambda: not rests())  # the kill takes its milliseconds


def test_variables_imports_and_files_stay(way):
    results = run(
        "import math\nx = 20",
        "def f(y): return math.floor(x + y)",
        "f(22.5)",
        "open('a', 'w').write('kept')",
        "import os\nprint(os.listdir('.'), open('a').read())",
    )
    assert results == [(NO_OUTPUT, None)] * 2 + [
        ("42", None), ("4", None), ("['a'] kept", None)
    ]  # fmt: skip
    assert nothing_left()


def test_numpy_and_sympy_are_loaded(way):
    (text, error), (again, _) = run("import numpy, sympy", "print(numpy.sum([1, 2]), sympy.pi)")
    assert (error, again) == (None, "3 pi")


def test_an_exception_keeps_the_state_and_names_the_call(way):
    results = run("x = 1\ndef f(): return 1 / 0", "x = 2\nf()", "x", "exit(3)", "x")
    text, error = results[1]
    assert error == "exception" and "ZeroDivisionError" in text and "child.py" not in text
    assert 'File "<call 2>", line 2' in text and 'File "<call 1>", line 2, in f' in text
    assert results[2:] == [("2", None), ("(exit code 3)", None), ("2", None)]


@pytest.mark.parametrize(
    "code, kind, shown",
    [
        ("print('x'); import os; os._exit(3)", None, "x\n(exit code 3)\n" + ENDED),
        ("import ctypes\nctypes.string_at(0)", "exception", f"killed by SIGSEGV)\n{ENDED}"),
        ("while True: print('x' * 100)", "oversized", f"bytes of output)\n{ENDED}"),
    ],
)
def test_a_crash_loses_the_state_and_the_next_call_says_so(way, code, kind, shown):
    results = run("y = 1", code, "'y' in globals()", "1")
    assert results[1][1] == kind and results[1][0].endswith(shown)
    assert results[2:] == [(f"{LOST}\nFalse", None), ("1", None)]
    assert nothing_left()


def test_a_time_out_loses_the_state_and_the_next_call_says_so(way):
    async def scene():
        box = toolbox()
        session = box.open()
        await play(session, "y = 1")
        box.tools["python_session"].timeout = 0.5
        stopped = await play(session, "while True: pass")
        box.tools["python_session"].timeout = PATIENCE
        after = await play(session, "'y' in globals()")
        await session.close()
        return stopped + after

    stopped, after = asyncio.run(scene())
    assert stopped == ("error: python_session took longer than 0.5 s and was stopped", "timeout")
    assert after == (f"{LOST}\nFalse", None)
    assert nothing_left()


@linux
def test_a_cancelled_call_ends_the_session(way):
    async def scene():
        session = python_session()
        await session("x = 1")
        task = asyncio.ensure_future(session("import time\ntime.sleep(60)"))
        assert await asyncio.to_thread(until, rests)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled() and nothing_left()
        assert await session("'x' in globals()") == f"{LOST}\nFalse"
        await session.close()

    asyncio.run(scene())


def test_sessions_share_nothing(way):
    """Pitfall 40."""

    async def scene():
        box = toolbox()
        sessions = [box.open() for _ in range(4)]
        made = [play(s, f"x = {i}\nopen('f', 'w').write(str(x))") for i, s in enumerate(sessions)]
        await asyncio.gather(*made)
        results = await asyncio.gather(*(play(s, "print(x, open('f').read())") for s in sessions))
        await asyncio.gather(*(session.close() for session in sessions))
        return results

    assert asyncio.run(scene()) == [[(f"{i} {i}", None)] for i in range(4)]
    assert nothing_left()


def test_a_session_that_nobody_closes_ends_when_it_is_dropped(way):
    async def scene():
        await python_session()("x = 1")

    with pytest.warns(ResourceWarning):
        asyncio.run(scene())
        import gc

        gc.collect()
    assert nothing_left()


def test_close_waits_for_the_end_and_may_come_twice(way):
    async def scene():
        session = python_session()
        await session("open('f', 'w').write('x')")
        await session.close()
        left = rests()
        await session.close()
        assert await session("2") == "2"  # and starts anew, with nothing lost
        await session.close()
        return left

    assert not asyncio.run(scene())


def test_a_process_in_the_background_goes_on_but_is_not_heard():
    if not sandbox.layers("heavy")["pid_namespace"]:
        pytest.skip("this system does not allow the layer pid_namespace: no new process")
    results = run(
        "import os, time\nopen('n', 'w').close()\nif os.fork() == 0:\n    for i in range(2000):\n"
        "        open('n', 'a').write('x')\n        try: print('noise', flush=True)\n"
        "        except OSError: pass\n        time.sleep(0.01)\n    os._exit(0)",
        "begun = len(open('n').read())\nwhile len(open('n').read()) < begun + 5: time.sleep(0.01)\n"
        "print('heard')",
    )
    assert results[1][0] == "heard"


def test_the_limit_on_cpu_time_is_for_each_call(monkeypatch):
    """Not for the life: three calls of 0.6 s are no call of 1.8 s."""
    burn = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass\n"

    async def scene():
        session = python_session()
        assert await session("import resource as r\nlimit = r.getrlimit(r.RLIMIT_CPU)[0]\nlimit")
        await session(burn.format(1.2))
        later = await session("r.getrlimit(r.RLIMIT_CPU)[0] - limit")
        # as if the limit were a second: the session survives it
        error = None
        try:
            await session(f"r.setrlimit(r.RLIMIT_CPU, (3, 600))\n{burn.format(9)}")
        except Exception as caught:
            error = caught
        alive = await session("'alive'")
        await session.close()
        return later, error, alive

    later, error, alive = asyncio.run(scene())
    assert int(later) in (1, 2)
    assert f"TimeoutError: stopped after {confine.CPU_SECONDS} s of CPU" in error.text
    assert alive == "'alive'"


@linux
def test_a_dead_server_loses_the_session_and_the_next_call_says_so():
    async def scene():
        session = python_session()
        await session("x = 1")
        os.kill(sandbox._servers["heavy"].process.pid, signal.SIGKILL)
        sandbox._servers["heavy"].process.wait()
        again = await session("'x' in globals()")
        await session.close()
        return again

    assert asyncio.run(scene()) == f"{LOST}\nFalse"


CHILD = """
import asyncio, sys
from tools.sandbox import caller as sandbox
from tools.python_session import python_session
if sys.argv[1] == "one_process":
    sandbox.has_fork_server = lambda: False
async def main():
    session = python_session()
    await session("x = 1")
    print("begun", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@linux
def test_a_session_ends_with_its_trainer(way):
    command = [sys.executable, "-c", CHILD, way]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout.readline() == "begun\n"
        above = children(trainer.pid)  # with fork servers also the one that was asked for layers
        inside = [pid for parent in above for pid in children(parent)]
        pids = [*above, *inside]
        trainer.kill()
    assert above and len(inside) == 1
    assert until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids))

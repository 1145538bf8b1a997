"""The python tool: what the model sees, and that hostile code neither gets out nor stays.

    pytest tests/test_tool_python.py

What takes `way` is tested with the fork server and with one process a call, as on macOS. A layer
that this system or that way does not have is a skip with its name, never a silent pass.
"""

import asyncio
import glob
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from until import PATIENCE, until

from run.config import UserError
from tools import Tool, Toolbox, ToolError
from tools.python import python
from tools.sandbox import caller as sandbox
from tools.sandbox import confine, fork_server

ROOT = Path(__file__).parent.parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="the fork server is Linux only")


@pytest.fixture(params=[pytest.param("fork_server", marks=linux), "one_process"])
def way(request, monkeypatch):
    monkeypatch.setattr(sandbox, "has_fork_server", lambda: request.param == "fork_server")
    return request.param


def toolbox(timeout=10.0, concurrency=16):
    """Toolbox(["python"]), without the two seconds that transformers takes to make the schema."""
    parameters = {"properties": {"code": {"type": "string"}}, "required": ["code"]}
    tool = Tool("python", {"function": {"parameters": parameters}}, python, True)
    return Toolbox([tool], concurrency, timeout, cache="none")


def run(code, timeout=PATIENCE):
    async def call():
        session = toolbox(timeout).open()
        return (await session.call("python", {"code": code}))[:2]

    return asyncio.run(call())


def server(name="light"):
    return sandbox._servers[name].process.pid


def children(pid):
    text = "".join(Path(path).read_text() for path in glob.glob(f"/proc/{pid}/task/*/children"))
    return [int(child) for child in text.split()]


def rests():
    """Processes of calls, and scratch directories, that are there now."""
    if sandbox.has_fork_server():
        return children(server()) + glob.glob(f"{tempfile.gettempdir()}/nanotool-{server()}-*")
    scratch = f"{tempfile.gettempdir()}/nanotool-{os.getpid()}-"
    inside = [path for path in glob.glob("/proc/[0-9]*/cwd") if _target(path).startswith(scratch)]
    return inside + glob.glob(f"{scratch}*")


def _target(link):
    try:
        return os.readlink(link)
    except OSError:  # the process has ended
        return ""


def nothing_left():
    return until(lambda: not rests())  # the kill after a deadline takes its milliseconds


def need(layer):
    if not sandbox.layers()[layer]:
        pytest.skip(f"this system does not allow the layer {layer}")


# -- what the model sees


@pytest.mark.parametrize(
    "code, shown",
    [
        ("print(6 * 7)", "42"),
        ("x = 6\nx * 7", "42"),
        ("x = 6", "(no output: use print(...) to see a value)"),
        ("", "(no output: use print(...) to see a value)"),
        ("None", "(no output: use print(...) to see a value)"),
        ("'a'", "'a'"),
        ("import sys\nprint(1)\nprint(2, file=sys.stderr)\nprint(3)", "1\n2\n3"),
        ("import os\nos.write(1, b'\\xff\\n')\nNone", "\ufffd"),
        ("print('\\ud800')", "\\ud800"),
        ("import sys\nsys.exit()", "(no output: use print(...) to see a value)"),
        ("print(1)\nexit(3)", "1\n(exit code 3)"),
        ("import sys\nsys.exit('bye')", "bye\n(exit code 1)"),
        ("print(1)\nimport os\nos._exit(0)", "1"),
        ("import os\nos.close(1); os.close(2)\nNone", "(no output: use print(...) to see a value)"),
        ("def f(): return g()\ndef g(): return __name__\nf()", "'__main__'"),
        ("from dataclasses import dataclass\n@dataclass\nclass A: x: int\nA(1)", "A(x=1)"),
        ("open('a', 'w').write('é')\nopen('a').read()", "'é'"),
        ("import tempfile\nwith tempfile.TemporaryFile() as f: print(f.write(b'xy'))", "2"),
        # C2: what a pair of sockets, a lock and a database of one's own need goes on
        ("import socket as s\na, b = s.socketpair()\na.send(b'x')\nb.recv(1)", "b'x'"),
        ("import asyncio\nasyncio.run(asyncio.sleep(0, 7))", "7"),
        ("import fcntl\nf = open('f', 'w')\nfcntl.lockf(f, fcntl.LOCK_EX); 7", "7"),
        (
            "import sqlite3\nd = sqlite3.connect('d')\nd.execute('CREATE TABLE t (x)')\n"
            "d.execute('INSERT INTO t VALUES (7)')\nd.commit()\nd.close()\n"
            "sqlite3.connect('d').execute('SELECT x FROM t').fetchall()",
            "[(7,)]",
        ),
        ("from threading import Thread\nt = Thread(target=print)\nt.start(); t.join(); 1", "\n1"),
    ],
)
def test_output_is_shown_as_in_a_notebook(way, code, shown):
    """Found broken in the wild: code that prints nothing says so."""
    if "Thread" in code and way == "one_process" and sandbox.layers()["limit_processes"]:
        pytest.skip("to Linux, not to macOS, a thread counts as a process")
    assert run(code) == (shown, None)


@pytest.mark.parametrize(
    "code, shown",
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("x = (", "SyntaxError: '(' was never closed"),
        ("a\0b", "source code string cannot contain null bytes"),
        ("input()", "EOFError: EOF when reading a line"),
        ("import json\njson.loads('{')", "JSONDecodeError: Expecting property name enclosed"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("'\ud800'", "UnicodeEncodeError: "),
        ("import os\nos.close(1)\nprint(1)", "OSError: [Errno 9] Bad file descriptor"),
    ],
)
def test_an_exception_shows_the_lines_of_the_code_alone(way, code, shown):
    text, error = run(code)
    assert error == "exception" and shown in text
    assert not any(name in text for name in ("python.py", "child.py", "sandbox", "decoder.py"))
    assert len(text) < 1500


def test_a_traceback_names_line_and_source(way):
    text, _ = run("def f(x):\n    return 1 / x\n\nprint(1)\nf(0)")
    assert text.startswith("1\nTraceback (most recent call last):\n")
    assert 'File "<code>", line 5, in <module>\n    f(0)' in text
    assert 'File "<code>", line 2, in f\n    return 1 / x' in text


def test_long_output_keeps_head_and_tail(way):
    text, error = run("print('a' * 50_000, end=''); print('b' * 50_000)")
    assert error is None and text.startswith("aaa") and text.endswith("bbb")
    assert "[... 80000 characters cut ...]" in text and len(text) < sandbox.SHOWN + 100


@linux
def test_the_same_code_gives_the_same_result_in_every_server_and_way(monkeypatch):
    """Pitfall 41: hashes and `random` do not differ between a run and its resumption."""
    code = "import random\nprint(random.random(), hash('a'), {'x', 'y', 'z'})"
    first = run(code)
    with monkeypatch.context() as portable:
        portable.setattr(sandbox, "has_fork_server", lambda: False)
        assert run(code) == first
    os.kill(server(), signal.SIGKILL)
    sandbox._servers["light"].process.wait()
    assert run(code) == first


def test_numpy_and_sympy_are_there_and_seeded(way):
    """Pitfall 41: also what numpy draws is the same in a resumed run."""
    code = (
        "import numpy as np, sympy as sp\nx = sp.symbols('x')\n"
        "print(np.arange(4).sum(), sp.solve(x**2 - 4, x), sp.integrate(2 * x, x))\n"
        "print(np.random.rand(), np.random.default_rng().random())"
    )
    first = run(code, 30)
    assert first[0].startswith("6 [-2, 2] x**2\n0.") and first[1] is None
    assert run(code, 30) == first
    assert python.pure is True


@linux
def test_numpy_draws_the_same_in_both_ways(monkeypatch):
    code = "import numpy as np\nprint(np.random.rand(2), np.random.default_rng().random(2))"
    first = run(code, 30)
    monkeypatch.setattr(sandbox, "has_fork_server", lambda: False)
    assert first[1] is None and run(code, 30) == first


def test_which_server_runs_the_code_is_a_question_of_speed_alone(way):
    """numpy without its name in the code: the light server imports it too."""
    code = "__import__('num' + 'py').arange(3).tolist()"
    assert run(code, 30) == ("[0, 1, 2]", None)
    assert run(f"'numpy'\n{code}", 30) == ("[0, 1, 2]", None)
    text, error = run("import no_such_package_")
    assert error == "exception" and "ModuleNotFoundError: No module named 'no_such" in text


def test_of_the_installed_packages_only_the_listed_ones_are_seen():
    need("private_root")
    code = "import os\nprint(*sorted(os.listdir('/packages')))"
    shown = run(code)[0].split()
    assert "numpy" in shown and set(shown) <= set(fork_server.PACKAGES)
    assert "No module named 'torch'" in run("import torch")[0]
    assert run("open('/packages/numpy/x', 'w')")[1] == "exception"


def test_code_that_is_too_long_is_refused():
    assert run("#" * (sandbox.CODE_SIZE + 1))[1] == "bad_arguments"


# -- hostile code: code, error kind, what the text must contain, deadline, layers that it needs

LONG = PATIENCE  # it ends by itself
HOSTILE = {
    "ignores SIGTERM": (
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
        "timeout", "took longer than 0.3 s", 0.3, (),
    ),
    "sleeps with closed descriptors": (
        "import os, time\nos.closerange(0, 50)\ntime.sleep(60)",
        "timeout", "took longer than 0.3 s", 0.3, (),
    ),
    "double fork and setsid": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        os.setsid()\n        time.sleep(60)\n    os._exit(0)\nprint('gone')",
        None, "gone", LONG, ("pid_namespace",),
    ),
    "fork, then hangs": (
        "import os, time\ntry: os.fork()\nexcept OSError: pass\ntime.sleep(60)",
        "timeout", "", 0.3, (),
    ),
    "fork, then ends": (
        "import os, time\ntry: pid = os.fork()\nexcept OSError: pid = 1\n"
        "if pid == 0: time.sleep(60)\nprint('gone')", None, "gone", LONG, (),
    ),
    "double fork, then hangs": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\ntime.sleep(60)",
        "timeout", "", 0.3, ("pid_namespace",),
    ),
    "fork bomb": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "timeout", "", 0.5, ("pid_namespace", "user_namespace"),
    ),
    "memory bomb": (
        "x = 'a' * 10**10", "exception", "MemoryError (the limit is 512 MB)", LONG,
        ("limit_memory",),
    ),
    "memory bomb in steps": (
        "x = []\nwhile True: x.append(bytearray(10**7))", "exception", "MemoryError (the", LONG,
        ("limit_memory",),
    ),
    "endless print": (
        "while True: print('x' * 100)", "oversized", "1000000 bytes of out", LONG, (),
    ),
    "big file": (
        "open('f', 'wb').write(b'x' * 10**8)", "exception", "File too large", LONG,
        ("limit_file_size",),
    ),
    "many files": (
        "for i in range(10**6): open(str(i), 'wb').write(b'x' * 10**7)",
        "exception", "No space left on device", LONG, ("private_root",),
    ),
    "many open files": (
        "x = [open('/dev/null') for _ in range(1000)]", "exception", "Too many open files", LONG,
        ("limit_open_files",),
    ),
    "socket": (
        "import socket\nsocket.create_connection(('127.0.0.1', 22), timeout=1)",
        "exception", "Operation not permitted", LONG, ("seccomp",),
    ),
    "ptrace": (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "print(libc.ptrace(16, 1, 0, 0), ctypes.get_errno())", None, "-1 1", LONG, ("seccomp",),
    ),
    "new user namespace": (
        "import ctypes\nprint(ctypes.CDLL(None).unshare(0x10000000))", None, "-1", LONG,
        ("seccomp",),
    ),
    "unreadable directories": (
        "import os\nos.makedirs('a/b/c')\nos.symlink('/', 'l')\n"
        "for d in ('a/b/c', 'a/b', 'a'): os.chmod(d, 0)\nprint('made')", None, "made", LONG, (),
    ),
    "very deep directories": (
        "import os\nfor _ in range(1500): os.mkdir('d' * 9); os.chdir('d' * 9)\nprint('made')",
        None, "made", LONG, (),
    ),
    "segmentation fault": (
        "import ctypes\nctypes.string_at(0)", "exception", "killed by SIGSEGV", LONG, (),
    ),
    "raises limits": (
        "import resource as r\nr.setrlimit(r.RLIMIT_AS, (2**40, 2**40))",
        "exception", "ValueError: not allowed to raise maximum limit", LONG, ("limit_memory",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_is_held_leaves_nothing_and_disturbs_no_one(way, name):
    """Pitfall 39: limits, a group killed whole, output capped; honest calls beside it are fine."""
    code, kind, shown, timeout, layers = HOSTILE[name]
    for layer in layers:
        need(layer)

    async def both():
        box = toolbox(timeout)
        hostile = asyncio.ensure_future(box.open().call("python", {"code": code}))
        await asyncio.sleep(0.02)
        honest = toolbox(PATIENCE).open()
        calls = [honest.call("python", {"code": f"print({i})"}) for i in range(2)]
        assert [text for text, _, _ in await asyncio.gather(*calls)] == ["0", "1"]
        return await hostile

    text, error, _ = asyncio.run(both())
    assert error == kind and shown in text
    assert nothing_left()


def test_no_descriptor_secret_or_file_of_ours_is_seen(way, monkeypatch, tmp_path):
    """Pitfall 39: nothing of the trainer's environment, descriptors, files or processes."""
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    (tmp_path / "secret").write_text("hunter2")
    with open(tmp_path / "secret") as held:
        os.set_inheritable(held.fileno(), True)
        code = (
            "import os\nprint(sorted(os.environ))\nopen_fds = []\nfor fd in range(300):\n"
            "    try: os.fstat(fd); open_fds.append(fd)\n    except OSError: pass\nopen_fds"
        )
        names = ["HOME", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PATH", "TMPDIR"]
        assert run(code) == (f"{names}\n[0, 1, 2]", None)
    need("private_root")
    for path in (tmp_path / "secret", f"/proc/{os.getpid()}/environ", "/proc/self/mem", __file__):
        assert "FileNotFoundError" in run(f"open({str(path)!r}).read()")[0]
    assert run("open('/usr/lib/x', 'w')")[1] == "exception"
    text, _ = run(f"import os\nos.kill({os.getpid()}, 0)")
    assert "ProcessLookupError" in text


def test_calls_do_not_see_each_others_files(way):
    """Pitfall 40."""
    assert run("open('mark', 'w').write('x')")[1] is None
    assert run("import os\nprint(os.listdir('.'))") == ("[]", None)
    assert nothing_left()


@linux
def test_a_cancelled_call_ends_with_all_its_group(way):
    """Pitfall 39: a rollout that is given up leaves nothing running."""

    async def scene():
        code = "import os, time\ntry: os.fork()\nexcept OSError: pass\ntime.sleep(60)"
        task = asyncio.ensure_future(python(code))
        assert await asyncio.to_thread(until, rests)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()

    asyncio.run(scene())
    assert nothing_left()


def test_the_cpu_limit_ends_a_call_without_a_deadline(monkeypatch):
    """Pitfall 39: also for a caller who sets no deadline. Both ways at once: it takes a second."""
    code = (
        "import resource as r\nr.setrlimit(r.RLIMIT_CPU, (1, 1))\nprint('begun')\nwhile True: pass"
    )
    monkeypatch.setattr(confine, "CPU_SECONDS", 1)  # what the caller's side calls the limit

    async def scene():
        calls = []
        for forking in {sandbox.has_fork_server(), False}:
            monkeypatch.setattr(sandbox, "has_fork_server", lambda here=forking: here)
            calls.append(asyncio.ensure_future(python(code)))
            await asyncio.sleep(0.05)
        return await asyncio.gather(*calls, return_exceptions=True)

    for error in asyncio.run(scene()):
        assert (error.kind, error.text) == ("timeout", "begun\n(killed: 1 s of CPU time)")


@pytest.mark.parametrize("timeout, cpu", [(9.0, 10), (10.0, 10), (29.5, 30)])
def test_a_longer_deadline_brings_more_cpu_time(timeout, cpu, way):
    """Pitfall 55: else python.timeout=30 would have no effect for what computes."""
    code = "import resource\nresource.getrlimit(resource.RLIMIT_CPU)[0]"
    assert run(code, timeout) == (f"{cpu}", None)

    async def session():
        options = (f"python_session.timeout={timeout}",)
        box = Toolbox(["python_session"], options=options)
        session = box.open()
        said = await session.call("python_session", {"code": code})
        await session.close()
        return said[:2]

    content, error = asyncio.run(session())
    assert cpu <= int(content) <= cpu + 2 and error is None  # what it has taken, and a second


def test_a_caller_without_a_deadline_has_a_wall_clock(monkeypatch):
    """Pitfall 39. A Toolbox's deadline may be later than that."""
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 0.3)
    with pytest.raises(ToolError, match="stopped after 0.3 s"):
        asyncio.run(python("import time; time.sleep(5)"))
    assert run("import time; time.sleep(0.6); 'done'") == ("'done'", None)

    async def behind_a_toolbox():
        await toolbox().open().call("python", {"code": "1"})
        await python("import time; time.sleep(5)")

    with pytest.raises(ToolError, match="stopped after 0.3 s"):  # that was another call's deadline
        asyncio.run(behind_a_toolbox())
    assert run("6 * 7", timeout=1e20) == ("42", None)


def test_windows_is_refused_in_a_sentence_and_the_sandbox_is_no_tool(monkeypatch):
    with pytest.raises(
        UserError, match=r"\(tools: (?!.*(sandbox|confine|fork_server|__init__)).*python"
    ):
        Toolbox(["nope"])
    spec = importlib.util.spec_from_file_location("fresh", confine.__file__)
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UserError, match="need Linux or macOS: on Windows run"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# -- the fork server


@linux
def test_many_calls_at_once_in_several_event_loops():
    """Pitfall 38: the calls of one training step overlap."""

    def all_run():
        return len(children(server())) >= 32

    async def step():
        box = toolbox(1000, concurrency=64)
        nap = {"code": "import time\ntime.sleep(1000)"}
        naps = [asyncio.ensure_future(box.open().call("python", nap)) for _ in range(32)]
        assert await asyncio.to_thread(until, all_run)
        calls = [box.open().call("python", {"code": f"print({i} * 2)"}) for i in range(60)]
        results = await asyncio.gather(*calls)
        assert [text for text, _, _ in results] == [str(i * 2) for i in range(60)]
        for one in naps:
            one.cancel()
        await asyncio.wait(naps)

    for _ in range(2):
        asyncio.run(step())
        assert nothing_left()


@linux
def test_a_dead_server_is_replaced_even_under_a_running_call():
    async def scene():
        task = asyncio.ensure_future(python("import time\ntime.sleep(0.3)\nprint('done')"))
        assert await asyncio.to_thread(until, lambda: children(server()))
        os.kill(server(), signal.SIGKILL)
        return await task

    assert run("print(1)") == ("1", None)
    before = children(os.getpid())
    assert asyncio.run(scene()) == "done"
    assert run("print(1)") == ("1", None)
    assert until(lambda: len(children(os.getpid())) <= len(before))


@linux
def test_a_fork_of_ours_gets_its_own_server():
    assert run("print(1)") == ("1", None)
    ours = server()
    pid = os.fork()
    if pid == 0:
        ok = run("print(2)") == ("2", None) and server() != ours
        os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert run("print(3)") == ("3", None) and server() == ours


CHILD = """
import asyncio, sys
from tools.sandbox import caller as sandbox
from tools.python import python
if sys.argv[1] == "one_process":
    sandbox.has_fork_server = lambda: False
async def main():
    code = "import ctypes, time\\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\\ntime.sleep(60)"
    task = asyncio.ensure_future(python(code))  # PR_SET_PDEATHSIG: would outlive its server
    await asyncio.sleep(0.3)
    print("begun", flush=True)
    await task
asyncio.run(main())
"""


@linux
def test_server_and_calls_end_with_the_trainer_however_it_dies(way):
    """Pitfall 39."""
    numbers = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
    command = [sys.executable, "-c", CHILD, way]
    trainers = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for _ in numbers
    ]
    pids = []
    for trainer, number in zip(trainers, numbers, strict=True):
        with trainer:
            assert trainer.stdout.readline() == "begun\n"
            assert until(lambda pid=trainer.pid: children(pid))
            (above,) = children(trainer.pid)
            assert until(lambda above=above: children(above))
            pids += [above, *children(above)]
            trainer.send_signal(number)
            trainer.wait(PATIENCE)
    assert len(pids) == 2 * len(numbers)
    assert until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids))


# What Docker allows by default: no namespaces. CAP_SYS_ADMIN and unshare() are given away, and the
# next program runs without them.
BARE = """
import os, sys
from tools.sandbox import confine
if os.geteuid() == 0:
    confine.libc("prctl", 24, 21, 0, 0, 0)
namespaces = ("unshare", "setns", "mount")  # the others are the sandbox's own to refuse
for name in set(confine.REFUSED) - set(namespaces):
    del confine.REFUSED[name]
confine.REFUSED_FIRST.clear()
confine.REFUSED_FCNTL.clear()
confine.libc("prctl", 38, 1, 0, 0, 0)
confine.refuse_calls(True)
os.execv(sys.executable, [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider",
    "tests/test_tool_python.py", "-k", "bare_code or not one_process and (descriptor or "
    "hostile and (then or SIGTERM or socket or limits or directories))"])
"""


@linux
def test_without_namespaces_nothing_escapes_either():
    """Pitfall 39: the tests above, again, where the system allows no namespaces."""
    if "BARE_SANDBOX" in os.environ:
        pytest.skip("we are inside")
    need("seccomp")
    env = os.environ | {"BARE_SANDBOX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BARE], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.skipif("BARE_SANDBOX" not in os.environ, reason="part of the test above")
def test_bare_code_cannot_start_a_process_or_signal_the_trainer():
    assert not sandbox.layers()["pid_namespace"] and not sandbox.layers()["network_namespace"]
    for code in (
        "import os\nos.fork()",
        "import subprocess\nsubprocess.run(['/bin/true'])",
        f"import os\nos.kill({os.getpid()}, 0)",
        f"import resource\nresource.prlimit({os.getpid()}, resource.RLIMIT_CORE, (0, 0))",
    ):
        text, error = run(code)
        assert error == "exception" and ("PermissionError" in text or "not permitted" in text)


# -- C3: what a system lacks is printed or refused, never silent

NAMESPACES = {"network_namespace": True, "private_root": True, "pid_namespace": True}
BARE_LAYERS = dict.fromkeys(confine.LAYERS, False) | {"limit_memory": True}
ALL = dict.fromkeys(BARE_LAYERS, True)
MACOS = BARE_LAYERS | {"limit_memory": False}


@pytest.mark.parametrize(
    "name, here, uid, platform, printed, refused",
    [
        ("all", ALL, 0, "linux", False, False),
        ("user with namespaces", ALL | {"own_user": False}, 1000, "linux", False, False),
        ("Docker's default", BARE_LAYERS | {"own_user": True}, 0, "linux", True, False),
        ("root, python in /root", BARE_LAYERS, 0, "linux", True, True),
        ("Docker with USER", BARE_LAYERS, 1000, "linux", True, True),
        ("only seccomp", BARE_LAYERS | {"seccomp": True}, 1000, "linux", True, True),
        ("no seccomp", ALL | {"seccomp": False}, 0, "linux", True, False),
        ("no limit", ALL | {"limit_memory": False}, 0, "linux", True, False),
        ("macOS", MACOS, 501, "darwin", True, False),
        ("root of macOS", MACOS, 0, "darwin", True, True),
        ("forced fallback", MACOS, 0, "linux", True, True),
        ("forced fallback, user", MACOS, 1000, "linux", True, True),
    ],
)
def test_missing_layers_are_named_in_one_line_or_refused(
    monkeypatch, capsys, name, here, uid, platform, printed, refused
):
    """C3."""
    hidden = []
    monkeypatch.delenv(sandbox.UNCONFINED)
    monkeypatch.setattr(sandbox, "_permissions", set())
    monkeypatch.setattr(sandbox, "_reported", set())
    monkeypatch.setattr(sandbox, "_layers_here", lambda _: here)
    monkeypatch.setattr(confine, "hide_memory", lambda: hidden.append(True))
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(sys, "platform", platform)
    if refused:
        with pytest.raises(UserError, match="the model's code would run as .*unconfined=true"):
            sandbox.require_confinement()
        with pytest.raises(UserError):  # not the first call alone
            sandbox.require_confinement()
    else:
        sandbox.require_confinement()
        sandbox.require_confinement()
    assert not hidden
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == printed
    if printed:
        (line,) = lines
        for layer, is_there in here.items():
            is_named = layer in line.partition(" lacks ")[2]
            assert is_named == (not is_there)
    # allowed: by the option, for all calls from then on; or by the variable
    sandbox.require_confinement(unconfined=True)
    sandbox.require_confinement()
    monkeypatch.setattr(sandbox, "_permissions", set())
    monkeypatch.setenv(sandbox.UNCONFINED, "true")
    sandbox.require_confinement()
    assert bool(hidden) == (refused and platform == "linux")


def test_the_tools_are_refused_at_the_start_and_have_the_option(monkeypatch):
    """C3: when they are loaded, before any rollout; a notebook's direct call too."""
    monkeypatch.delenv(sandbox.UNCONFINED)
    monkeypatch.setattr(sandbox, "_permissions", set())
    monkeypatch.setattr(sandbox, "_layers_here", lambda _: BARE_LAYERS)
    monkeypatch.setattr(confine, "hide_memory", lambda: None)
    for name in ("python", "python_session"):
        monkeypatch.setattr(sandbox, "_permissions", set())
        with pytest.raises(UserError, match="code would run as"):
            Toolbox([name])
        with pytest.raises(UserError, match="code would run as"):
            Toolbox([name], options=(f"{name}.unconfined=false",))
        Toolbox([name], describe_only=True)  # nothing will be run
        with pytest.raises(UserError, match="unconfined = 'maybe': expected true or false"):
            Toolbox([name], options=(f"{name}.unconfined=maybe",))
        with pytest.raises(UserError, match="no option 'unconfine'"):
            Toolbox([name], options=(f"{name}.unconfine=true",))
        if sys.platform == "linux":
            with pytest.raises(UserError, match="code would run as"):
                asyncio.run(python("1"))
        Toolbox([name], options=(f"{name}.unconfined=true",))


@pytest.mark.skipif("BARE_SANDBOX" not in os.environ, reason="part of a test above")
def test_bare_code_that_is_allowed_does_not_read_the_trainers_memory():
    """C3: its keys are in its environment and memory."""
    for file in ("environ", "mem", "maps", "fd/0"):
        text, error = run(f"open('/proc/{os.getpid()}/{file}', 'rb').read(9)")
        assert error == "exception" and ("Permission" in text or "No such file" in text), file
    for target in (os.getpid(), server()):
        text, error = run(
            "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
            f"print(libc.syscall(434, {target}, 0), libc.ptrace(16, {target}, 0, 0), "
            f"libc.process_vm_readv({target}, 0, 0, 0, 0, 0), libc.syscall(438, 3, 0, 0))"
        )
        assert (text, error) == ("-1 -1 -1 -1", None)
    text, error = run(f"open('/proc/{server()}/mem', 'rb')")
    assert error == "exception" and ("Permission" in text or "No such file" in text)

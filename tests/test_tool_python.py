"""The python tool: what the model sees, and that hostile code neither gets out nor stays.

    pytest tests/test_tool_python.py

A layer that this system does not allow is a skip with its name, never a silent pass.
"""

import asyncio
import glob
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tools import Toolbox
from tools import python as module

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux only")


def run(code, timeout=10.0):
    async def call():
        session = Toolbox(["python"], timeout=timeout).open()
        return (await session.call("python", {"code": code}))[:2]

    return asyncio.run(call())


def server():
    return module._server["process"].pid


def children(pid):
    text = "".join(Path(path).read_text() for path in glob.glob(f"/proc/{pid}/task/*/children"))
    return [int(child) for child in text.split()]


def scratch_left():
    return glob.glob(f"{tempfile.gettempdir()}/nanotool-{server()}-*")


def nothing_left():
    for _ in range(300):  # the kill after a deadline takes its milliseconds
        if not children(server()) and not scratch_left():
            return True
        time.sleep(0.01)
    return False


def need(layer):
    if not module.layers()[layer]:
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
        ("from threading import Thread\nt = Thread(target=print)\nt.start(); t.join(); 1", "\n1"),
    ],
)
def test_output_is_shown_as_in_a_notebook(code, shown):
    """Found broken in the wild: code that prints nothing says so."""
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
def test_an_exception_shows_the_lines_of_the_code_alone(code, shown):
    text, error = run(code)
    assert error == "exception" and shown in text
    assert "python.py" not in text and "decoder.py" not in text and len(text) < 1500


def test_a_traceback_names_line_and_source():
    text, _ = run("def f(x):\n    return 1 / x\n\nprint(1)\nf(0)")
    assert text.startswith("1\nTraceback (most recent call last):\n")
    assert 'File "<code>", line 5, in <module>\n    f(0)' in text
    assert 'File "<code>", line 2, in f\n    return 1 / x' in text


def test_long_output_keeps_head_and_tail():
    text, error = run("print('a' * 50_000, end=''); print('b' * 50_000)")
    assert error is None and text.startswith("aaa") and text.endswith("bbb")
    assert "[... 80000 characters cut ...]" in text and len(text) < module.SHOWN + 100


def test_the_same_code_gives_the_same_result_in_every_server():
    """Pitfall 41: hashes and `random` do not differ between a run and its resumption."""
    code = "import random\nprint(random.random(), hash('a'), {'x', 'y', 'z'})"
    first = run(code)
    os.kill(server(), signal.SIGKILL)
    module._server["process"].wait()
    assert run(code) == first


def test_code_that_is_too_long_is_refused():
    assert run("#" * (module.CODE_SIZE + 1))[1] == "bad_arguments"


# -- hostile code: code, error kind, what the text must contain, deadline, layers that it needs

HOSTILE = {
    "ignores SIGTERM": (
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
        "timeout", "took longer than 0.5 s", 0.5, (),
    ),
    "sleeps with closed descriptors": (
        "import os, time\nos.closerange(0, 50)\ntime.sleep(60)",
        "timeout", "took longer than 0.5 s", 0.5, (),
    ),
    "double fork and setsid": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        os.setsid()\n        time.sleep(60)\n    os._exit(0)\nprint('gone')",
        None, "gone", 5, ("pid_namespace",),
    ),
    "double fork, then hangs": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\ntime.sleep(60)",
        "timeout", "", 0.5, ("pid_namespace",),
    ),
    "fork bomb": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "timeout", "", 0.7, ("pid_namespace", "user_namespace"),
    ),
    "memory bomb": ("x = 'a' * 10**10", "exception", "MemoryError (the limit is 512 MB)", 5, ()),
    "memory bomb in steps": (
        "x = []\nwhile True: x.append(bytearray(10**7))", "exception", "MemoryError (the", 5, (),
    ),
    "endless print": ("while True: print('x' * 100)", "oversized", "1000000 bytes of out", 9, ()),
    "big file": (
        "open('f', 'wb').write(b'x' * 10**8)", "exception", "File too large", 5, (),
    ),
    "many files": (
        "for i in range(10**6): open(str(i), 'wb').write(b'x' * 10**7)",
        "exception", "No space left on device", 9, ("private_root",),
    ),
    "many open files": (
        "x = [open('/dev/null') for _ in range(1000)]", "exception", "Too many open files", 5, (),
    ),
    "socket": (
        "import socket\nsocket.create_connection(('127.0.0.1', 22), timeout=1)",
        "exception", "Operation not permitted", 5, ("seccomp",),
    ),
    "ptrace": (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "print(libc.ptrace(16, 1, 0, 0), ctypes.get_errno())", None, "-1 1", 5, ("seccomp",),
    ),
    "new user namespace": (
        "import ctypes\nprint(ctypes.CDLL(None).unshare(0x10000000))", None, "-1", 5, ("seccomp",),
    ),
    "unreadable directories": (
        "import os\nos.makedirs('a/b/c')\nos.symlink('/', 'l')\n"
        "for d in ('a/b/c', 'a/b', 'a'): os.chmod(d, 0)\nprint('made')", None, "made", 5, (),
    ),
    "segmentation fault": (
        "import ctypes\nctypes.string_at(0)", "exception", "killed by SIGSEGV", 5, (),
    ),
    "raises limits": (
        "import resource as r\nr.setrlimit(r.RLIMIT_AS, (2**40, 2**40))",
        "exception", "ValueError: not allowed to raise maximum limit", 5, ("limits",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_is_held_leaves_nothing_and_disturbs_no_one(name):
    """Pitfall 39: limits, a group killed whole, output capped; honest calls beside it are fine."""
    code, kind, shown, timeout, layers = HOSTILE[name]
    for layer in layers:
        need(layer)

    async def both():
        box = Toolbox(["python"], timeout=timeout)
        hostile = asyncio.ensure_future(box.open().call("python", {"code": code}))
        await asyncio.sleep(0.02)
        honest = Toolbox(["python"], timeout=10).open()
        calls = [honest.call("python", {"code": f"print({i})"}) for i in range(8)]
        assert [text for text, _, _ in await asyncio.gather(*calls)] == [str(i) for i in range(8)]
        return await hostile

    start = time.perf_counter()
    text, error, _ = asyncio.run(both())
    assert error == kind and shown in text
    assert time.perf_counter() - start < timeout + 2
    assert nothing_left()


def test_no_descriptor_secret_or_file_of_ours_is_seen(monkeypatch, tmp_path):
    """Pitfall 39: nothing of the trainer's environment, descriptors, files or processes."""
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    (tmp_path / "secret").write_text("hunter2")
    with open(tmp_path / "secret") as held:
        os.set_inheritable(held.fileno(), True)
        code = (
            "import os\nprint(sorted(os.environ))\nopen_fds = []\nfor fd in range(300):\n"
            "    try: os.fstat(fd); open_fds.append(fd)\n    except OSError: pass\nopen_fds"
        )
        assert run(code) == ("['HOME', 'PATH', 'TMPDIR']\n[0, 1, 2]", None)
    need("private_root")
    for path in (tmp_path / "secret", f"/proc/{os.getpid()}/environ", "/proc/self/mem", __file__):
        assert "FileNotFoundError" in run(f"open({str(path)!r}).read()")[0]
    assert run("open('/usr/lib/x', 'w')")[1] == "exception"
    text, _ = run(f"import os\nos.kill({os.getpid()}, 0)")
    assert "ProcessLookupError" in text


def test_calls_do_not_see_each_others_files():
    """Pitfall 40."""
    assert run("open('mark', 'w').write('x')")[1] is None
    assert run("import os\nprint(os.listdir('.'))") == ("[]", None)


def test_the_cpu_limit_ends_a_call_without_a_deadline(monkeypatch):
    """Pitfall 39: also for a caller who sets no deadline."""
    code = (
        "import resource as r\nr.setrlimit(r.RLIMIT_CPU, (1, 1))\nprint('begun')\nwhile True: pass"
    )
    monkeypatch.setattr(module, "CPU_SECONDS", 1)  # of the caller's side: what it calls a CPU limit
    text, error = run(code)
    assert error == "timeout" and text == "begun\n(killed: 1 s of CPU time)"


# -- the fork server


def test_many_calls_at_once_in_several_event_loops():
    """Pitfall 38: the calls of one training step overlap."""

    async def step():
        box = Toolbox(["python"], concurrency=64)
        calls = [box.open().call("python", {"code": f"print({i} * 2)"}) for i in range(100)]
        nap = {"code": "import time\ntime.sleep(0.3)"}
        naps = [box.open().call("python", nap) for _ in range(32)]
        results = await asyncio.gather(*calls, *naps)
        assert [text for text, _, _ in results[:100]] == [str(i * 2) for i in range(100)]

    for _ in range(2):
        start = time.perf_counter()
        asyncio.run(step())
        assert time.perf_counter() - start < 5  # one after the other, the naps alone take 9.6 s


def test_a_dead_server_is_replaced_even_under_a_running_call():
    async def scene():
        task = asyncio.ensure_future(module.python("import time\ntime.sleep(0.3)\nprint('done')"))
        await asyncio.sleep(0.1)
        os.kill(server(), signal.SIGKILL)
        return await task

    before = children(os.getpid())
    assert asyncio.run(scene()) == "done"
    assert run("print(1)") == ("1", None)
    assert len(children(os.getpid())) <= max(len(before), 1)


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
from tools import python as module
async def main():
    await module.python("1")
    task = asyncio.ensure_future(module.python("import time\\ntime.sleep(60)"))
    await asyncio.sleep(0.2)
    print(module._server["process"].pid, flush=True)
    await task
asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_server_and_calls_end_with_the_trainer_however_it_dies(number):
    """Pitfall 39."""
    command = [sys.executable, "-c", CHILD]
    trainer = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with trainer:
        pids = [int(trainer.stdout.readline())]
        pids += children(pids[0])
        assert len(pids) == 2
        trainer.send_signal(number)
        trainer.wait(10)
    for _ in range(200):
        if not any(Path(f"/proc/{pid}/exe").exists() for pid in pids):
            return
        time.sleep(0.01)
    raise AssertionError("the server or its child is still there")


# What Docker allows by default: no namespaces. CAP_SYS_ADMIN and unshare() are given away, and the
# next program runs without them.
BARE = """
import os, sys
from tools import python as module
if os.geteuid() == 0:
    module._libc("prctl", 24, 21, 0, 0, 0)
module._libc("prctl", 38, 1, 0, 0, 0)
module._refuse_calls(True)
os.execv(sys.executable, [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider",
    "tests/test_tool_python.py", "-k", "hostile or descriptor or bare_code"])
"""


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
    assert not module.layers()["pid_namespace"] and not module.layers()["network_namespace"]
    for code in (
        "import os\nos.fork()",
        "import subprocess\nsubprocess.run(['/bin/true'])",
        f"import os\nos.kill({os.getpid()}, 0)",
        f"import resource\nresource.prlimit({os.getpid()}, resource.RLIMIT_CORE, (0, 0))",
    ):
        text, error = run(code)
        assert error == "exception" and ("PermissionError" in text or "not permitted" in text)

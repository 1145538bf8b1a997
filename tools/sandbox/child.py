"""What runs inside of a confined process: one call, the calls of a session, or a shell command.

main() is what caller._popen() starts. It becomes a fork server, whose children run the functions
below, or a process for one call or session; fork_server.py has both.
"""

import ast
import collections
import contextlib
import gc
import importlib
import json
import linecache
import os
import random
import resource
import signal
import socket
import sys
import traceback
import types

import confine  # the folder of this file is all that is there
import fork_server

# What models import most: paid once by the fork server, not in every call.
PRELOADED = (
    "bisect cmath collections datetime decimal fractions functools heapq itertools math operator "
    "re statistics string time"
)
PRELOADED_HEAVY = "numpy numpy.linalg numpy.random sympy"

# The first use of each of these fills sympy's caches or imports more of it: tenths of a second.
WARM_UP = """
from sympy import *
x, y = symbols("x y")
latex(simplify(sin(x) ** 2 + cos(x) ** 2 + sympify("x + 1")))
solve(x**2 - 3 * x + 1), solve([x + y - 1, x - 2 * y]), solve(x**4 + x - 1), solveset(x**2 - 1)
factor(x**4 - 1), expand((x + 1) ** 3), limit(sin(x) / x, x, 0), series(exp(x), x)
integrate(x * exp(x), x), integrate(1 / (x**2 + 1), (x, 0, 1)), summation(x, (x, 1, 10))
Matrix([[1, 2], [3, 4]]).inv(), nsolve(x**2 - 2, 1), trigsimp(tan(x) * cos(x)), solve(x**2 < 4)
import sympy.core.random
sympy.core.random.seed(0)
"""


def main():
    """Arguments: what to be, and after a blank the seconds of CPU time; the trainer's process id;
    the folders of packages. The sockets are stdin and stdout."""
    what, parent, *folders = sys.argv[2:]
    what, _, cpu = what.partition(" ")
    parent = int(parent)
    if what == "light":
        fork_server.serve(what, parent, folders, _prepare, _run, _run_session)
    elif what == "heavy":
        fork_server.serve(what, parent, folders, _prepare_heavy, _run, _run_session)
    elif what == "shell":
        fork_server.serve(what, parent, folders, _prepare_nothing, _run_shell, _run_session)
    elif what == "layers":
        os.write(1, json.dumps(confine.confine_portably("/")).encode())
    elif what == "session":
        _make_importable(folders)
        fork_server.serve_one(_run_session, True, int(cpu))
    else:
        _make_importable(folders)
        fork_server.serve_one(_run, False, int(cpu))


# -- before the first call


def _prepare_nothing(folders):
    """A shell imports nothing."""


def _prepare(folders):
    sys.path += folders
    for name in PRELOADED.split():
        importlib.import_module(name)
    for mode in ("exec", "eval"):  # the compiler's first use fills its caches
        compile(ast.parse("6 * 7", "<code>", mode), "<code>", mode)
    gc.collect()
    gc.freeze()  # a collection in the child would otherwise copy every page


def _prepare_heavy(folders):
    _make_importable(folders)
    for name in PRELOADED_HEAVY.split():
        with contextlib.suppress(ImportError):  # not installed: the code's own import says so
            importlib.import_module(name)
    with contextlib.suppress(Exception):  # whatever sympy: this is for speed alone
        exec(WARM_UP, {})
    _prepare([])


def _make_importable(folders):
    """The folders of PACKAGES, and a fixed seed for numpy, which takes its seeds from `secrets`."""
    import secrets

    sys.path += folders
    secrets.randbits = random.Random(0).getrandbits


# -- calls


def _run(code):
    """One call. Does not return."""
    main_module = _fresh_main()
    status = fork_server.RAISED
    try:
        status = _run_cell(code, "<code>", main_module)
    finally:
        os._exit(status)


def _run_session(requests):
    """A session's calls, until its caller closes `requests`. Does not return.

    Everything here may be broken by the session's own code, which harms that session alone: each
    call has its own sockets, and whatever this process does not survive ends the session.
    """
    requests.set_inheritable(False)
    main_module = _fresh_main()
    pid = os.getpid()
    cpu = _renew_cpu_time_by_exceptions()
    number = 0
    while True:
        # 1. wait for a call: its two sockets
        _, fds, _, _ = socket.recv_fds(requests, 1, 2)
        if not fds:
            os._exit(0)
        number += 1
        ctl = socket.socket(fileno=fds[0])
        ctl.set_inheritable(False)
        os.dup2(fds[1], 1)
        os.dup2(fds[1], 2)
        os.close(fds[1])

        # 2. run it
        confine.renew_cpu_limit(cpu)
        status = _run_cell(fork_server.read_code(ctl), f"<call {number}>", main_module)
        if os.getpid() != pid:  # a fork that the code made came back here: it is no session
            os._exit(status)

        # 3. reply
        _silence()
        ctl.send(json.dumps({"exit": status}).encode())
        ctl.close()


def _renew_cpu_time_by_exceptions():
    """Makes the end of a call's CPU time an exception in it. -> the seconds that each call has"""
    cpu = resource.getrlimit(resource.RLIMIT_CPU)[0]
    if cpu == resource.RLIM_INFINITY:
        cpu = confine.CPU_SECONDS

    def out_of_time(*_):
        raise TimeoutError(f"stopped after {cpu} s of CPU time")

    # PID 1 of a namespace does not die of SIGXCPU. And so the session survives it.
    signal.signal(signal.SIGXCPU, out_of_time)
    return cpu


def _silence():
    """What runs on in the background is not heard any more."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:  # else the code had closed that one
        os.close(null)


def _run_shell(command):
    """bash, or sh where there is none. Does not return."""
    path = ":".join(name for name in fork_server.PROGRAMS if name.endswith("/bin"))
    environment = {"HOME": os.getcwd(), "PATH": path, "TMPDIR": os.getcwd(), "LC_ALL": "C.UTF-8"}
    environment |= fork_server.ONE_THREAD | {"PYTHONPATH": "/packages"}
    shell = "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # python ignores them, and exec would keep that
        signal.signal(number, signal.SIG_DFL)
    os.execve(shell, [shell, "-c", command], environment)


def _fresh_main():
    """The module in which code runs, as a script's; and the environment that it sees."""
    random.seed(0)
    os.environ.clear()
    for name in ("HOME", "PATH", "TMPDIR"):
        os.environ[name] = os.getcwd()
    os.environ.update(fork_server.ONE_THREAD)
    main_module = types.ModuleType("__main__")
    main_module.exit = sys.exit
    main_module.quit = sys.exit
    sys.modules["__main__"] = main_module
    sys.argv = [""]
    return main_module


def _run_cell(code, name, main_module):
    """Like a notebook's cell: the value of a last bare expression is shown. -> exit status"""
    sys.stdin = open(0, closefd=False)
    # One object for both: in order. Line by line: what was printed before a crash is not lost.
    sys.stdout = open(
        1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
    )
    sys.stderr = sys.stdout
    status = 0
    try:
        _execute(code.decode("utf-8", "surrogatepass"), name, main_module.__dict__)
        sys.stdout.flush()
    except SystemExit as error:
        status = _exit_status(error.code)
        sys.stdout.flush()
    except BaseException as error:
        status = fork_server.RAISED
        _report(error)
    return status & 255


def _execute(code, name, names):
    linecache.cache[name] = (len(code), None, code.splitlines(True), name)
    tree = ast.parse(code, name)
    last = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = tree.body.pop().value
    exec(compile(tree, name, "exec"), names)
    if last is None:
        return
    value = eval(compile(ast.Expression(last), name, "eval"), names)
    if value is not None:
        print(repr(value))


def _exit_status(code):
    """What sys.exit(code) means: a text is printed, and stands for 1."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code
    print(code)
    return 1


def _report(error):
    """Prints the traceback of the code's own lines, without ours and the library's."""
    if isinstance(error, MemoryError):
        text = f"MemoryError (the limit is {confine.MEMORY >> 20} MB)\n"
    else:
        text = _traceback(error)
    with contextlib.suppress(Exception):  # it may be anything by now
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, text.encode("utf-8", "backslashreplace"))


def _traceback(error):
    entries = collections.deque(maxlen=10)  # not all: there may be a million
    entry = error.__traceback__
    while entry:
        if entry.tb_frame.f_code.co_filename.startswith(("<code>", "<call ")):
            entries.append(entry)
        entry = entry.tb_next
    frames = [traceback.extract_tb(entry, limit=1)[0] for entry in entries]
    lines = []
    if frames:
        lines.append("Traceback (most recent call last):\n")
        lines += traceback.format_list(frames)
    lines += traceback.format_exception_only(error)
    return "".join(lines)

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
import re
import resource
import select
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
    """Becomes what its arguments say: what to be, and after a blank the seconds of CPU time; the
    trainer's process id; the folders of packages. The sockets are stdin and stdout."""
    what, parent, *folders = sys.argv[2:]
    what, _, cpu = what.partition(" ")
    parent = int(parent)
    if what == "light":
        fork_server.serve(what, parent, folders, _prepare, _run, _run_session)
    elif what == "heavy":
        fork_server.serve(what, parent, folders, _prepare_heavy, _run, _run_session)
    elif what == "shell":
        fork_server.serve(what, parent, folders, _prepare_nothing, _run_shell, _run_shell_session)
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
    """Does nothing: a shell imports nothing."""


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
    """Adds the folders of PACKAGES; fixes numpy's seeds, which it takes from `secrets`."""
    import secrets

    sys.path += folders
    secrets.randbits = random.Random(0).getrandbits


# -- calls


def _run(code):
    """Runs one call. Does not return."""
    main_module = _fresh_main()
    status = fork_server.RAISED
    try:
        status = _run_cell(code, "<code>", main_module)
    finally:
        os._exit(status)


def _run_session(requests):
    """Runs a session's calls, until its caller closes `requests`. Does not return.

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
        code, _ = fork_server.read_code(ctl)
        status = _run_cell(code, f"<call {number}>", main_module)
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
    """Silences what runs on in the background."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:  # else the code had closed that one
        os.close(null)


def _run_shell(command):
    """Becomes bash, or sh where there is none. Does not return."""
    shell = "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"
    _exec_shell([shell, "-c", command])


def _exec_shell(argv):
    """Becomes the shell. Does not return."""
    path = ":".join(name for name in fork_server.PROGRAMS if name.endswith("/bin"))
    environment = {"HOME": os.getcwd(), "PATH": path, "TMPDIR": os.getcwd(), "LC_ALL": "C.UTF-8"}
    environment |= fork_server.ONE_THREAD | {"PYTHONPATH": "/packages"}
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # python ignores them, and exec would keep that
        signal.signal(number, signal.SIG_DFL)
    os.execve(argv[0], argv, environment)


def _run_shell_session(requests):
    """Runs a session's calls, all in one bash, until its caller closes `requests`. Does not return.

    Here too: what the commands break, this process or that bash, harms their session alone.
    """
    shell = _Shell()
    while True:
        # 1. wait for a call: its two sockets
        shell.listen_until(requests)
        _, fds, _, _ = socket.recv_fds(requests, 1, 2)
        if not fds:
            os._exit(0)
        ctl = socket.socket(fileno=fds[0])

        # 2. run it, and reply; without the shell there is no session
        command, _ = fork_server.read_code(ctl)
        status = shell.run(command, fds[1])
        if shell.has_ended:
            os._exit(status)
        ctl.send(json.dumps({"exit": status}).encode())
        ctl.close()
        os.close(fds[1])


class _Shell:
    """A bash that goes on from command to command, until one of them ends it.

    What it and its children write comes over one pipe for its life, as on a terminal: what runs in
    the background is heard when it speaks, in the next call if there is none at that moment.
    """

    COMMANDS = 57  # descriptors of the shell, below confine.OPEN_FILES
    OUT = 58
    STATUS = 59
    # What it does for each command, which comes over another pipe and ends with a null byte.
    # `eval` in no function and no loop: `declare`, `return` and `break` mean what they mean on a
    # terminal. `exec` in the place of redirections of `eval`: these would take descriptors that
    # commands take. The token: what a command writes to all descriptors it finds is no status.
    LINE = (
        f"IFS= read -r -d '' -u {COMMANDS} __command; eval \"$__command\"; __status=$?; "
        f"exec </dev/null >&{OUT} 2>&1; builtin printf '%d TOKEN\\n' $__status >&{STATUS}\n"
    )
    KEPT = 1 << 16  # bytes that are written between calls; of more the last are kept

    def __init__(self):
        # not its stdin: from there it would read its lines after every `exec`
        os.mkfifo("bash")  # its name in messages
        self.script = os.open("bash", os.O_RDWR)
        commands, self.commands = os.pipe()
        self.out, out = os.pipe()
        self.status, status = os.pipe()
        os.set_blocking(self.out, False)
        self.has_ended = False
        self.exit_status = 0
        self.unheard = bytearray()  # what was written between calls
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _silence()
                os.dup2(commands, self.COMMANDS)
                os.dup2(out, self.OUT)
                os.dup2(status, self.STATUS)
                os.dup2(out, 1)
                os.dup2(out, 2)
                os.closerange(3, self.COMMANDS)
                _exec_shell(["/bin/bash", "--norc", "bash"])
            finally:
                os._exit(fork_server.RAISED)
        for fd in (commands, out, status):
            os.close(fd)
        null = os.open(os.devnull, os.O_WRONLY)
        self.run(b"", null)  # it has opened its script now
        os.close(null)
        os.unlink("bash")

    def listen_until(self, requests):
        """Keeps what is written until a request comes. Ends the session if the shell has ended."""
        while True:
            ready = self._wait(requests.fileno(), self.out, seconds=None)
            if self.out in ready:
                heard = self._read()
                if not heard:  # nobody is left who could write
                    self._reap()
                    os._exit(self.exit_status)
                self.unheard += heard
                del self.unheard[: -self.KEPT]
            if requests.fileno() in ready:
                return

    def run(self, command, out):
        """Runs a command, writes its output to `out`, and returns its exit status."""
        if self.unheard:
            _write_all(out, self.unheard)
            self.unheard.clear()
        token = os.urandom(8).hex()
        line = self.LINE.replace("TOKEN", token).encode()
        with contextlib.suppress(BrokenPipeError):  # the shell has gone: seen below
            _write_all(self.script, line)
            _write_all(self.commands, command + b"\0")
        told = b""  # the last of what came over the descriptor of the status
        status = None
        while not status:
            ready = self._wait(self.status, self.out, seconds=0.1)
            if self.out in ready:
                _write_all(out, self._read())
            self._reap()
            if self.status in ready:
                told = (told + os.read(self.status, 4096))[-4096:]
                status = re.search(rf"(\d+) {token}\n".encode(), told)
            if self.has_ended:
                break
        while heard := self._read():  # all that was written before
            _write_all(out, heard)
        if self.has_ended:
            return self.exit_status
        return int(status[1])

    def _wait(self, *fds, seconds):
        ready, _, _ = select.select(fds, [], [], seconds)
        return ready

    def _read(self):
        try:
            return os.read(self.out, 1 << 16)
        except BlockingIOError:
            return b""

    def _reap(self):
        """Takes the ends of all that has no other parent: they would count as processes."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self.pid:
                    self.has_ended = True
                    code = os.waitstatus_to_exitcode(status)
                    self.exit_status = code if code >= 0 else 128 - code  # as shells say it


def _write_all(fd, data):
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _fresh_main():
    """Makes the module in which code runs, as a script's, and sets the environment that it sees."""
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
    """Runs code like a notebook's cell, showing the value of a last expression. -> exit status"""
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
    """Gives the exit status that sys.exit(code) means: a text is printed, and stands for 1."""
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

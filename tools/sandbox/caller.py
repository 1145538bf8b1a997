"""What is put around code that a model wrote: each call, or session, in a confined process.

This file is the caller's side, in the trainer: call() and exchange() hand code over and get output
back, observation() makes of it what the model reads. The other side runs in processes of its own,
which _popen() starts at child.main(): fork_server.py starts, watches and ends those that run code,
confine.py puts the layers around them, and child.py is what runs inside.
On Linux these are fork servers, each started at its first call:

    light   standard library only (50 ms to start, a few ms of CPU for each call)
    heavy   numpy and sympy imported (a second, once); for code that names such a package, and for
            sessions. An import works in both: which one a call gets is a question of speed
    shell   for tools/bash.py and bash_session.py: the same, and the machine's programs can be seen

A server forks one child per call, kills the child whose caller has gone, and ends when its parent
ends, however that ends. Elsewhere (macOS) each call starts a python of its own (40 ms), which forks
the child, and ends in the same ways.

What is covered, where layers() says so (Linux, root or not):

    network_namespace  no network, not even loopback
    private_root       own mount namespace: of the machine's files there are only python's library,
                       the shared libraries, fork_server.PACKAGES, and for bash the PROGRAMS,
                       read-only; no /proc, no /home, next to no /etc; /tmp is the scratch
                       directory, a file system of SCRATCH_SIZE bytes that ends with the call
    pid_namespace      sees and signals no process but its own; when the call ends, all of them
                       end, whatever they forked, daemonised or ignored
    own_user           if we are root: an unprivileged user id
    user_namespace     one per call: its own count of processes, and no way to nest another
    no_capabilities, no_new_privileges
    seccomp            no socket(), ptrace(), mount() and such; nothing that lives on or that no
                       limit counts (System V IPC, memfd); nothing by which one call reaches another
                       (bind, connect, sendmsg, flock, leases, inotify, others' descriptors; SQLite
                       needs such locks for its write-ahead log, not for its other journals).
                       Without a PID namespace (Docker's default) no new process and no signal
                       either: to kill one is to kill all
    limit_...          the constants of confine.py, also elsewhere. There limit_processes means no
                       new process at all, since those that the user has are counted
    Always: own session and process group, killed whole when the call ends, the deadline comes, the
    caller goes, or the trainer dies; none of our file descriptors and environment; a scratch
    directory that is removed; no more output than is asked for.

What is not covered: bugs of the kernel; side channels; the limits on CPU and memory hold for each
process of a call, not for their sum. What this system lacks is printed once, at the start. Without
private_root the code reads what its user may read, and may leave files where its user may write, in
/tmp say, in any number; where that user is ours (no own_user either) it is refused, unless
python.unconfined=true or NANOTOOL_UNCONFINED=true allows it. Then this program's memory and
environment are hidden (PR_SET_DUMPABLE), but not those of programs that it starts, such as vLLM.
Without pid_namespace and seccomp, what it daemonises lives on. In a session what a call leaves
running goes on between calls, until the session ends; and there the limit on CPU time is an
exception, which code can catch (confine.SESSION_CPU_SECONDS it cannot). Run models that you do not
trust in a virtual machine too.

What is not covered elsewhere (macOS; a line says so at the start): all of that, and none of the
layers but limit_..., so code is held from accidents, not from malice. It runs as your user: reads,
changes and deletes what you may, uses the network, and may signal your processes: the trainer, or
the one that watches over it, and then nothing ends it and its directory stays. Without
limit_processes (root), what makes a session of its own lives on. macOS refuses limit_memory: until
the deadline a call may take all memory. bash does not run there, nor where there is no PID
namespace. Windows has no way; the tools say so.
"""

import asyncio
import atexit
import contextlib
import functools
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from run.config import UserError, tell
from tools.calling.base import DEADLINE, ToolError, shorten
from tools.sandbox import confine, fork_server

WALL_SECONDS = 60.0  # for callers without a deadline, which a Toolbox is not
CODE_SIZE = 100_000  # bytes of code
INPUT_SIZE = 4_000_000  # bytes that a call can read from stdin
OUTPUT_SIZE = 1_000_000  # bytes; code that writes more is killed
SHOWN = 20_000  # characters of output that are returned: head and tail, the cut marked


@dataclass
class Result:
    """What came of a call."""

    output: bytearray
    reply: dict | None  # of fork_server.py or child.py; None: the output was too long
    session_ended: bool = False


async def call(server: str, code: str, stdin: str = "") -> Result:
    """Runs `code` in a fresh process, a child of that server. stdin: what it can read there.
    Leaving, if only by a cancellation, kills the child: the server sees the socket close."""
    data = encode(code)
    given = stdin.encode("utf-8", "replace")
    if len(given) > INPUT_SIZE:
        raise ToolError("bad_arguments", f"error: stdin is longer than {INPUT_SIZE} bytes")
    hand_over = functools.partial(start, server, "run")
    for _ in range(3):  # a server that died left nothing of the call behind: run it again
        try:
            async with wall_clock():
                return await exchange(hand_over, data, given=given)
        except TimeoutError:
            raise ToolError("timeout", f"error: stopped after {WALL_SECONDS:g} s") from None
        except ConnectionError:
            await asyncio.sleep(0.05)  # one that is dying may still take requests
    raise RuntimeError("the sandbox died three times during the call")


def wall_clock() -> asyncio.Timeout:
    """Limits a call that has no deadline of its caller's: TimeoutError after WALL_SECONDS."""
    return asyncio.timeout(None if DEADLINE.get() else WALL_SECONDS)


def cpu_seconds() -> int:
    """Says how many seconds each process of a call may take: no fewer than the call has."""
    seconds = min(DEADLINE.get(), 1e9)  # what setrlimit takes
    return max(confine.CPU_SECONDS, math.ceil(seconds))


def encode(code: str) -> bytes:
    """Encodes the code as it is sent. Raises ToolError if it is too long."""
    data = code.encode("utf-8", "surrogatepass")
    if len(data) > CODE_SIZE:
        raise ToolError("bad_arguments", f"error: the code is longer than {CODE_SIZE} bytes")
    return data


async def exchange(
    hand_over: Callable[[socket.socket, socket.socket], Awaitable[None]],
    data: bytes,
    session: socket.socket | None = None,
    given: bytes = b"",
) -> Result:
    """Makes one call. `hand_over` gives the far ends of two sockets, made for this call alone, to
    who runs it: a session's code cannot speak in a later call. `session`: the socket on which the
    server tells the session's end. `given`: what can be read from stdin, but in a session. Raises
    ConnectionError if the sandbox died."""
    loop = asyncio.get_running_loop()
    ctl, far_ctl = socket.socketpair()  # the code goes out here, and the reply comes in
    out, far_out = socket.socketpair()  # what the code writes
    sides = [ctl, out] if session is None else [ctl, out, session]
    output = bytearray()
    ended = loop.create_future()  # (the reply as bytes, whether the session has ended)

    def read_output():
        while len(output) <= OUTPUT_SIZE:
            try:
                chunk = out.recv(1 << 16)
            except BlockingIOError:
                return
            if not chunk:  # all its writers have closed it, but may run on
                loop.remove_reader(out)
                return
            output.extend(chunk)
        if not ended.done():  # too long: no reply is waited for
            ended.set_result((b"", True))

    def read_message(side):
        """Reads the one message that comes over `ctl` or `session`; b"" if it was closed."""
        loop.remove_reader(side)
        try:
            message = side.recv(4096)
        except ConnectionResetError:  # closed before it had read all that we sent
            message = b""
        if side is ctl and session is not None and not message:
            return  # the session's end is told on `session`
        if not ended.done():
            ended.set_result((message, side is session))

    try:
        # 1. the far ends go to who runs the code
        try:
            await hand_over(far_ctl, far_out)
        finally:
            far_ctl.close()
            far_out.close()

        # 2. listen, and send the code
        for side in sides:
            side.setblocking(False)
        loop.add_reader(out, read_output)
        loop.add_reader(ctl, read_message, ctl)
        if session is not None:
            loop.add_reader(session, read_message, session)
        with contextlib.suppress(ConnectionError):  # it died: read_message() sees that
            lengths = struct.pack("=II", len(data), len(given))
            await loop.sock_sendall(ctl, lengths + data + given)

        # 3. wait for the end
        reply, session_ended = await ended
        read_output()  # what was written before the reply
    finally:
        for side in sides:
            loop.remove_reader(side)
        ctl.close()
        out.close()

    if len(output) > OUTPUT_SIZE:
        return Result(output, None, True)
    if not reply:
        raise ConnectionResetError("the sandbox died")
    return Result(output, json.loads(reply), session_ended)


def observation(result: Result, raised: int | None = fork_server.RAISED) -> str:
    """Writes what the model reads. Raises ToolError if that is an error. `raised`: the exit status
    that tells of an exception, of which the output has the traceback."""
    text = shorten(result.output.decode("utf-8", "replace").rstrip("\n"), SHOWN)
    reply = result.reply
    if reply is None:
        raise ToolError("oversized", f"{text}\n(killed: more than {OUTPUT_SIZE} bytes of output)")
    if "broken" in reply:
        raise RuntimeError(f"the sandbox could not start a process: {reply['broken']}")
    status = os.waitstatus_to_exitcode(reply["status"])
    if status == 0:
        return text
    if status == raised:
        raise ToolError("exception", text or f"(exit code {raised})")
    if status > 0:
        return f"{text}\n(exit code {status})".lstrip()
    # far from all of it: the kernel counts whole ticks against the limit, and on a busy machine
    # more of them than the process ran for
    took_all = reply["cpu"] > 0.5 * cpu_seconds()
    if -status in (signal.SIGKILL, signal.SIGXCPU) and took_all:
        limit = f"(killed: {cpu_seconds()} s of CPU time)"
        raise ToolError("timeout", f"{text}\n{limit}".lstrip())
    name = signal.Signals(-status).name
    raise ToolError("exception", f"{text}\n(the process was killed by {name})".lstrip())


def layers(server: str = "light") -> dict[str, bool]:
    """Says which layers of this file's docstring are in force here. Starts the server."""
    near, far = socket.socketpair()
    with near:
        with far:
            if has_fork_server():
                while not _try_send(server, "layers", far):
                    time.sleep(0.005)
            else:
                _popen("layers", far, far).wait()
        reply = near.recv(4096)
    if not reply:
        raise ConnectionResetError("the sandbox died")
    return json.loads(reply)


# -- what a system cannot do is said, or refused


UNCONFINED = "NANOTOOL_UNCONFINED"  # environment variable: true = as python.unconfined=true
_permissions = set()  # has "unconfined" if the user has allowed code to run as himself
_reported = set()  # lines that were printed


def require_confinement(unconfined: bool = False) -> None:
    """Prints, once, one line that names the layers which this system lacks. Raises UserError where
    code would run as our own user, with all that this user may read. unconfined: the user allows
    that, from now on, for all calls of this process; then its memory is hidden at least."""
    if unconfined or os.environ.get(UNCONFINED, "").lower() in ("true", "1"):
        _permissions.add("unconfined")
    here = _layers_here(has_fork_server())
    is_held = here["own_user"] or here["private_root"]
    is_root = os.geteuid() == 0
    missing = [name for name, is_there in here.items() if not is_there]
    if here["private_root"] and "own_user" in missing:
        missing.remove("own_user")  # without root there is none, and none is needed
    report(missing, "sandbox")
    if is_held:
        return
    # macOS has no layers for anybody: there the line is all
    if not _permissions and (is_root or sys.platform == "linux"):
        who = "root" if is_root else "your own user"
        raise UserError(
            f"the model's code would run as {who}, and read what {who} may, keys and answers "
            "too: expected a user of its own for it, or namespaces. In Docker add --security-opt "
            "seccomp=unconfined, or install python where every user may read it; or allow it by "
            "--tool_options=python.unconfined=true (python_session has it too), or by "
            f"{UNCONFINED}=true in the environment"
        )
    if sys.platform == "linux":
        confine.hide_memory()


@functools.cache
def _layers_here(with_fork_server):
    return layers()


def report(missing: list[str], what: str) -> None:
    """Prints one line, once, that names the layers which `what` lacks here."""
    line = (
        f"{what}: this system lacks {', '.join(missing)}: docs/tools.md says what that lets through"
    )
    if missing and line not in _reported:
        _reported.add(line)
        tell(line)


def has_fork_server() -> bool:
    """Says which of the two ways to run a call there is: the one place that chooses."""
    return sys.platform == "linux"


async def start(server: str, what: str, ctl: socket.socket, second: socket.socket) -> None:
    """Starts a call ("run"), whose output comes over `second`, or a session ("session"), whose
    calls go over it. Both end when the other end of `ctl` is closed; their end is told on it."""
    if server != "shell":  # bash has checked more
        require_confinement()
    message = f"{what} {cpu_seconds()}"
    if has_fork_server():
        while not _try_send(server, message, ctl, second):
            await asyncio.sleep(0.005)  # hundreds of calls wait for the server already
    else:
        process = _popen(message, ctl, second)
        threading.Thread(target=process.wait, daemon=True).start()  # leaves no zombie


# -- the servers


@dataclass
class _Server:
    process: subprocess.Popen
    control: socket.socket  # our end; requests go over it


_servers = {}  # name -> _Server; one of each name per process of ours
_locks = [threading.Lock()]  # one, in a list: a fork gets another


def _try_send(name, message, *sockets):
    """Hands a request and its sockets to the server, which is started if there is none that lives.
    False if its queue is full."""
    fds = [each.fileno() for each in sockets]
    with _locks[0]:
        for _ in range(2):
            # 1. the server; if it has died, another
            if name in _servers and _servers[name].process.poll() is not None:
                _forget(name)
            if name not in _servers:
                near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                near.setblocking(False)
                with far:
                    _servers[name] = _Server(_popen(name, far, subprocess.DEVNULL), near)

            # 2. hand it over
            try:
                socket.send_fds(_servers[name].control, [message.encode()], fds)
                return True
            except BlockingIOError:
                return False
            except ConnectionError:  # it died since it was looked at
                _servers[name].process.wait()
    raise ConnectionResetError("the sandbox died")


def _popen(what, stdin, stdout):
    """Runs child.main() in a process of its own. Blocks for the milliseconds that takes."""
    # Not as a script: that would be compiled each time. The folder comes last, and goes again: a
    # tool named as a module of python's library must not replace it.
    code = "import sys; sys.path.append(sys.argv[1]); import child; sys.path.pop(); child.main()"
    # -s -S -P and an empty environment: what -I does, but a fixed hash seed.
    flags = ["-s", "-S", "-P"]
    environment = fork_server.ONE_THREAD | {"PYTHONHASHSEED": "0"}
    if "LD_LIBRARY_PATH" in os.environ:  # some pythons do not start without it
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    arguments = [os.path.dirname(__file__), what, str(os.getpid()), *packages]
    return subprocess.Popen(
        [sys.executable, *flags, "-c", code, *arguments],
        stdin=stdin,
        stdout=stdout,
        env=environment,
        cwd="/",
        start_new_session=True,  # Ctrl-C is for the trainer alone
    )


def _forget(name):
    """Forgets a server, also in the child of a fork of ours, which must not use the same socket."""
    server = _servers.pop(name)
    server.control.close()
    server.process.returncode = 0  # nothing to wait for


def _forget_all():
    _locks[0] = threading.Lock()  # after a fork: the old one may have been held
    for name in list(_servers):
        _forget(name)


os.register_at_fork(after_in_child=_forget_all)
atexit.register(_forget_all)  # the servers end when this process does; this says so to python

"""The other side of sandbox.py: the processes that start, watch and end those that run code.

serve() is a fork server, serve_one() a process for one call or session, where there is none.
python.py's main() calls them, in the process that sandbox._popen() starts. confine.py has what is
put around the code. No import here that a server does not need: it starts in 50 ms.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import tempfile
import threading

if __package__:
    from tools.sandbox import confine
else:  # in the process that caller._popen() starts, with the folder of this file alone
    import confine

SERVERS = ("light", "heavy", "shell")
# What can be imported beside the standard library, if it is installed; the same on every machine.
PACKAGES = (
    "numpy numpy.libs scipy scipy.libs sympy mpmath gmpy2 gmpy2.libs networkx pandas dateutil "
    "six.py"
).split()
PROGRAMS = (f"{sys.base_prefix}/bin", "/bin", "/usr/bin", "/usr/share")  # for bash
MAX_FD = 4096  # descriptors of a fork server: above 1000 calls at once
RAISED = 101  # exit status of a child whose code raised; its other statuses are the code's own
# numpy's threads would count as processes, and a process that has some cannot be forked safely
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

# -- a fork server


def serve(kind, parent, folders, prepare, run, run_session):
    """Serves until the parent's end of the control socket is closed, or the parent is gone.
    `prepare(folders)` imports what calls will need; `run(code)` and `run_session(requests)` do not
    return."""
    control = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)  # the stdin of every child
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out, a child or this server goes, not the trainer
    shown = {f"{path}/{name}": f"/packages/{name}" for path in folders for name in PACKAGES}
    if kind == "shell":
        shown |= {path: path for path in PROGRAMS}
    with open("/proc/self/maps") as maps:  # here: a private root has no /proc
        active = confine.enter_namespaces(shown)
        prepare(["/packages"] if active["private_root"] else folders)
        loaded = confine.use_huge_pages(maps.read())
    confine.allow_open_files(MAX_FD)  # three per call
    active = confine.probe(active, confine.limits_of(loaded, False, confine.CPU_SECONDS))
    if active["seccomp"]:
        confine.seccomp_filter(active["pid_namespace"])

    def start(message, ctl, fd, number):
        what, cpu = message.split()
        session = what == b"session"
        uid = confine.FIRST_UID + SERVERS.index(kind) * confine.UIDS + number
        limits = confine.limits_of(loaded, session, int(cpu))
        function = run_session if session else run
        return _start_call(ctl, fd, uid, active, limits, function, session)

    _serve_calls(control, parent, active, start)


def _serve_calls(control, parent, active, start):
    calls = {}  # pidfd -> call
    try:
        _serve_until_the_end(control, parent, active, start, calls)
    finally:  # the trainer has gone, or we fail
        for call in calls.values():
            _kill(call)
            _reap(call)
            if call["scratch"] != "/tmp":
                _remove(call["scratch"])


def _serve_until_the_end(control, parent, active, start, calls):
    poller = select.epoll()
    poller.register(control, select.EPOLLIN)
    callers, cleaners = {}, {}  # the caller's socket -> pidfd; pidfd -> process id, call, reply
    number = 0
    # Not PR_SET_PDEATHSIG for ourselves: that tells the death of the *thread* which started us.
    while os.getppid() == parent:
        # New requests last: they may get the numbers of descriptors that this round closes.
        for fd, _ in sorted(poller.poll(0.5), key=lambda event: event[0] == control.fileno()):
            if fd == control.fileno():
                message, fds, _, _ = socket.recv_fds(control, 64, 2)
                if not message:
                    return
                ctl = socket.socket(fileno=fds[0])
                if message == b"layers":
                    ctl.send(json.dumps(active).encode())
                    ctl.close()
                    continue
                taken = {call["number"] for call in calls.values()}
                try:
                    if len(taken) == confine.UIDS:
                        raise OSError("too many calls and sessions at once")
                    while number in taken:  # a session's: it may live for long
                        number = (number + 1) % confine.UIDS
                    call = start(message, ctl, fds[1], number)
                except OSError as error:  # no process or memory left, say
                    _answer({"ctl": ctl}, {"broken": str(error)})
                    continue
                finally:
                    os.close(fds[1])
                calls[call["pidfd"]] = call | {"number": number}
                number = (number + 1) % confine.UIDS
                callers[ctl.fileno()] = call["pidfd"]
                poller.register(call["pidfd"], select.EPOLLIN)
                poller.register(ctl, select.EPOLLRDHUP)
            elif fd in callers:  # the caller has gone
                poller.unregister(fd)
                _kill(calls[callers.pop(fd)])
            elif fd in calls:  # the child is dead, and with it its PID namespace
                call = calls.pop(fd)
                if callers.pop(call["ctl"].fileno(), None) is not None:
                    poller.unregister(call["ctl"])
                poller.unregister(fd)
                os.close(fd)
                reply = _reap(call)
                if call["scratch"] == "/tmp":
                    _answer(call, reply)
                    continue
                pid, pidfd = _start_cleaner(call["scratch"])
                cleaners[pidfd] = pid, call, reply
                poller.register(pidfd, select.EPOLLIN)
            elif fd in cleaners:  # its files are gone
                poller.unregister(fd)
                os.close(fd)
                pid, call, reply = cleaners.pop(fd)
                os.waitpid(pid, 0)
                _answer(call, reply)


def _start_call(ctl, second, uid, active, limits, run, session):
    """`second`: where the output of a call goes; where a session's calls come from."""
    if not active["own_user"]:
        uid = os.geteuid()
    scratch = "/tmp"
    if not active["private_root"]:
        scratch = tempfile.mkdtemp(prefix=f"nanotool-{os.getpid()}-")
        os.chown(scratch, uid, -1)
    pid = confine.clone(active)
    if pid == 0:

        def confined():
            confine.apply_layers(active, uid, scratch, limits)

        def one_call():
            code = read_code(ctl)
            ctl.close()
            run(code)

        if session:  # its output goes nowhere between calls
            _child(0, second, confined, lambda: run(socket.socket(fileno=second)))
        _child(second, ctl.fileno(), confined, one_call)
    return {"pid": pid, "pidfd": os.pidfd_open(pid), "ctl": ctl, "scratch": scratch}


def _child(out, kept, confined, work):
    """Does not return, and neither does work(). `kept`: the one descriptor that it needs."""
    try:
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.closerange(3, kept)
        os.closerange(kept + 1, MAX_FD)
        confined()
        work()
    except BaseException as error:  # of ours
        os.write(2, f"sandbox: {type(error).__name__}: {error}".encode())
    finally:
        os._exit(RAISED)


def read_code(ctl: socket.socket) -> bytes:
    with ctl.makefile("rb") as file:
        return file.read(int.from_bytes(file.read(4), sys.byteorder))


def _kill(call):
    with contextlib.suppress(ProcessLookupError):
        os.kill(call["pid"], signal.SIGKILL)
    _kill_group(call)


def _kill_group(call):
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS, of a group of zombies
        os.killpg(call["pid"], signal.SIGKILL)


def _reap(call):
    """-> the reply to its caller"""
    _, status, usage = os.wait4(call["pid"], 0)
    _kill_group(call)  # what it left behind, where there is no PID namespace
    return {"status": status, "cpu": usage.ru_utime + usage.ru_stime}


def _answer(call, reply):
    with call["ctl"] as ctl, contextlib.suppress(ConnectionError):  # the caller may have gone
        ctl.send(json.dumps(reply).encode())


def _start_cleaner(scratch):
    """Without private_root: a million files must not keep the server from its calls."""
    pid = os.fork()
    if pid == 0:
        try:
            _remove(scratch)
        finally:
            os._exit(0)
    return pid, os.pidfd_open(pid)


def _remove(scratch):
    """Not rmtree(), which stops at unreadable folders, and at a thousand in one another: here what
    lies deeper is moved up, until nothing does."""
    with contextlib.suppress(OSError):  # the code may have renamed or removed it
        os.chmod(scratch, 0o700)
        folders = [scratch]
        while folders:
            folder = folders[-1]
            with os.scandir(folder) as entries:
                inside = [(entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries]
            for path, is_folder in inside:
                if is_folder:
                    os.chmod(path, 0o700)
                    moved = f"{scratch}/{os.urandom(16).hex()}"
                    os.rename(path, moved)
                    folders.append(moved)
                else:
                    os.unlink(path)
            if not inside:
                os.rmdir(folders.pop())


# -- one process per call or session, where there is no fork server


def serve_one(run, session, cpu):
    """Serves the call or session whose sockets are stdin and stdout, in a child, and sees to the
    child's end. `cpu`: seconds."""
    ctl = socket.socket(fileno=os.dup(0))
    second = os.dup(1)
    code = None if session else read_code(ctl)  # here: `watch` below must not find a byte of it
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    scratch = tempfile.mkdtemp(prefix=f"nanotool-{os.getppid()}-")
    pid = os.fork()
    if pid == 0:

        def confined():
            os.setsid()
            confine.confine_portably(scratch, session, cpu)

        if session:
            _child(0, second, confined, lambda: run(socket.socket(fileno=second)))
        _child(second, 2, confined, lambda: run(code))
    os.close(second)  # else the caller would wait for us to close its output
    call = {"pid": pid, "ctl": ctl}

    def watch():
        with contextlib.suppress(ConnectionError):
            ctl.recv(1)  # returns when the caller has gone: it sends no more
        _kill(call)

    threading.Thread(target=watch, daemon=True).start()
    reply = _reap(call)
    _remove(scratch)
    _answer(call, reply)
    os._exit(0)  # at once: `watch` may still be waiting

"""The processes that start, watch and end those that run code.

serve() is a fork server, serve_one() a process for one call or session, where there is none.
child.main() calls them, in the process that caller._popen() starts; caller.py says what all of this
covers. confine.py has what is put around the code. No import here that a server does not need: it
starts in 50 ms.
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
from collections.abc import Callable

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
SHARED_SCRATCH = "/tmp"  # with private_root: each call's own file system is mounted there


class Call:
    """A call or session that runs, or has just ended."""

    def __init__(self, pid, ctl, scratch, number):
        self.pid = pid  # of the child that runs it
        self.pidfd = os.pidfd_open(pid)  # can be read when the child has ended
        self.ctl = ctl  # to its caller, who closes it to end it, and gets the reply
        self.scratch = scratch  # its directory
        self.number = number  # no other call that runs has it: its user is made of it
        self.reply = None  # what its caller is told in the end


# -- a fork server


def serve(
    kind: str,
    parent: int,
    folders: list[str],
    prepare: Callable[[list[str]], None],
    run: Callable[[bytes], None],
    run_session: Callable[[socket.socket], None],
) -> None:
    """Serves until the parent's end of the control socket is closed, or the parent is gone.
    `parent`: its process id. `folders`: where PACKAGES may lie. `prepare(folders)` imports what
    calls will need; `run(code)` and `run_session(requests)` do not return."""
    control = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)  # the stdin of every child
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out, a child or this server goes, not the trainer
    with open("/proc/self/maps") as maps:  # here: a private root has no /proc
        active = confine.enter_namespaces(_shown_inside(kind, folders))
        prepare(["/packages"] if active["private_root"] else folders)
        loaded = confine.use_huge_pages(maps.read())
    confine.allow_open_files(MAX_FD)  # three per call
    active = confine.probe(active, confine.limits_of(loaded, False, confine.CPU_SECONDS))
    if not (active["own_user"] or active["private_root"]):
        confine.hide_memory()  # and that of each call: all are of one user
    if active["seccomp"]:
        confine.seccomp_filter(active["pid_namespace"])  # made once, before any fork

    def start(message, ctl, second, number):
        what, cpu = message.split()
        is_session = what == b"session"
        uid = confine.FIRST_UID + SERVERS.index(kind) * confine.UIDS + number
        limits = confine.limits_of(loaded, is_session, int(cpu))
        function = run_session if is_session else run
        pid, scratch = _start_child(ctl, second, uid, active, limits, function, is_session)
        return Call(pid, ctl, scratch, number)

    server = _ForkServer(control, parent, active, start)
    try:
        server.run()
    finally:  # the trainer has gone, or we fail
        server.end_all()


def _shown_inside(kind, folders):
    """Lists path on the machine -> path in the private root, beside what python itself needs."""
    shown = {}
    for folder in folders:
        for name in PACKAGES:
            shown[f"{folder}/{name}"] = f"/packages/{name}"
    if kind == "shell":
        for path in PROGRAMS:
            shown[path] = path
    return shown


class _ForkServer:
    """Starts a child for each request, watches it, and tells its caller what came of it."""

    def __init__(self, control, parent, active, start):
        self.control = control  # requests come over it
        self.parent = parent
        self.active = active  # the layers
        self.start = start
        self.poller = select.epoll()
        self.running = {}  # pidfd -> its call
        self.callers = {}  # descriptor of the caller's socket -> the call, while that runs
        self.cleaning = {}  # pidfd of the cleaner -> (its pid, the call that has ended)
        self.next_number = 0

    def run(self):
        self.poller.register(self.control, select.EPOLLIN)
        # Not PR_SET_PDEATHSIG for ourselves: that tells the death of the *thread* which started us.
        while os.getppid() == self.parent:
            ready = [fd for fd, _ in self.poller.poll(0.5)]
            # New requests last: they may get the numbers of descriptors that this round closes.
            has_request = self.control.fileno() in ready
            for fd in ready:
                if fd in self.callers:
                    self._caller_has_gone(fd)
                elif fd in self.running:
                    self._child_has_ended(fd)
                elif fd in self.cleaning:
                    self._files_are_gone(fd)
            if has_request and not self._take_request():
                return

    def _take_request(self):
        """Starts the call of a request. False if none will come: the trainer's end is closed."""
        message, fds, _, _ = socket.recv_fds(self.control, 64, 2)
        if not message:
            return False
        ctl = socket.socket(fileno=fds[0])
        if message == b"layers":
            ctl.send(json.dumps(self.active).encode())
            ctl.close()
            return True
        try:
            call = self.start(message, ctl, fds[1], self._free_number())
        except OSError as error:  # no process or memory left, say
            _answer(ctl, {"broken": str(error)})
            return True
        finally:
            os.close(fds[1])
        self.running[call.pidfd] = call
        self.callers[ctl.fileno()] = call
        self.poller.register(call.pidfd, select.EPOLLIN)
        self.poller.register(ctl, select.EPOLLRDHUP)
        return True

    def _free_number(self):
        taken = {call.number for call in self.running.values()}
        if len(taken) == confine.UIDS:
            raise OSError("too many calls and sessions at once")
        number = self.next_number
        while number in taken:  # a session's: it may live for long
            number = (number + 1) % confine.UIDS
        self.next_number = (number + 1) % confine.UIDS
        return number

    def _caller_has_gone(self, fd):
        self.poller.unregister(fd)
        _kill(self.callers.pop(fd).pid)

    def _child_has_ended(self, fd):
        """Replies to the call of a child that is dead, and with it its PID namespace."""
        call = self.running.pop(fd)
        if self.callers.pop(call.ctl.fileno(), None) is not None:
            self.poller.unregister(call.ctl)
        self.poller.unregister(fd)
        os.close(fd)
        call.reply = _reap(call.pid)
        if call.scratch == SHARED_SCRATCH:
            _answer(call.ctl, call.reply)
            return
        pid, pidfd = _start_cleaner(call.scratch)
        self.cleaning[pidfd] = pid, call
        self.poller.register(pidfd, select.EPOLLIN)

    def _files_are_gone(self, fd):
        self.poller.unregister(fd)
        os.close(fd)
        pid, call = self.cleaning.pop(fd)
        os.waitpid(pid, 0)
        _answer(call.ctl, call.reply)

    def end_all(self):
        for call in self.running.values():
            _kill(call.pid)
            _reap(call.pid)
            if call.scratch != SHARED_SCRATCH:
                _remove(call.scratch)


def _start_child(ctl, second, uid, active, limits, run, is_session):
    """Starts the process of a call. -> its id and scratch directory. `second`: where the output of
    a call goes; where a session's calls come from."""
    if not active["own_user"]:
        uid = os.geteuid()
    scratch = SHARED_SCRATCH
    if not active["private_root"]:
        scratch = tempfile.mkdtemp(prefix=f"nanotool-{os.getpid()}-")
        os.chown(scratch, uid, -1)
    pid = confine.clone(active)
    if pid == 0:

        def put_layers():
            confine.apply_layers(active, uid, scratch, limits)

        def one_call():
            code, given = read_code(ctl)
            ctl.close()
            set_stdin(given)
            run(code)

        if is_session:  # its output goes nowhere between calls
            _run_child(0, second, put_layers, lambda: run(socket.socket(fileno=second)))
        _run_child(second, ctl.fileno(), put_layers, one_call)
    return pid, scratch


def _run_child(out, needed, put_layers, work):
    """Confines this child and runs work(). Does not return, and neither does that. `needed`: the
    one descriptor that stays open."""
    try:
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.closerange(3, needed)
        os.closerange(needed + 1, MAX_FD)
        put_layers()
        work()
    except BaseException as error:  # of ours
        os.write(2, f"sandbox: {type(error).__name__}: {error}".encode())
    finally:
        os._exit(RAISED)


def read_code(ctl: socket.socket) -> tuple[bytes, bytes]:
    """Reads what the caller sends, the lengths first: the code, and what it can read from stdin."""
    with ctl.makefile("rb") as file:
        lengths = file.read(8)
        code = file.read(int.from_bytes(lengths[:4], sys.byteorder))
        return code, file.read(int.from_bytes(lengths[4:], sys.byteorder))


def set_stdin(given: bytes) -> None:
    """Puts it behind stdin, by a file in this directory that has no name."""
    if not given:
        return
    name = f"stdin-{os.getpid()}"
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(name)
    left = memoryview(given)
    while left:
        left = left[os.write(fd, left) :]
    os.lseek(fd, 0, os.SEEK_SET)
    os.dup2(fd, 0)
    os.close(fd)


def _kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    _kill_group(pid)


def _kill_group(pid):
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS, of a group of zombies
        os.killpg(pid, signal.SIGKILL)


def _reap(pid):
    """Waits for the end of a call's child -> the reply to its caller."""
    _, status, usage = os.wait4(pid, 0)
    _kill_group(pid)  # what it left behind, where there is no PID namespace
    return {"status": status, "cpu": usage.ru_utime + usage.ru_stime}


def _answer(ctl, reply):
    with ctl, contextlib.suppress(ConnectionError):  # the caller may have gone
        ctl.send(json.dumps(reply).encode())


def _start_cleaner(scratch):
    """Removes scratch in a process of its own: a million files must not hold up the server."""
    pid = os.fork()
    if pid == 0:
        try:
            _remove(scratch)
        finally:
            os._exit(0)
    return pid, os.pidfd_open(pid)


def _remove(scratch):
    """Removes a folder; not by rmtree(), which stops at unreadable folders, and at a thousand in
    one another: here what lies deeper is moved up, until nothing does."""
    with contextlib.suppress(OSError):  # the code may have renamed or removed it
        os.chmod(scratch, 0o700)
        folders = [scratch]
        while folders:
            inside = _entries(folders[-1])
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


def _entries(folder):
    with os.scandir(folder) as entries:
        return [(entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries]


# -- one process per call or session, where there is no fork server


def serve_one(run: Callable, is_session: bool, cpu: int) -> None:
    """Serves the call or session whose sockets are stdin and stdout, in a child, and sees to the
    child's end. `cpu`: seconds."""
    ctl = socket.socket(fileno=os.dup(0))
    second = os.dup(1)
    # here: `watch` below must not find a byte of it
    code, given = (None, b"") if is_session else read_code(ctl)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    scratch = tempfile.mkdtemp(prefix=f"nanotool-{os.getppid()}-")
    if sys.platform == "linux":
        confine.hide_memory()
    pid = os.fork()
    if pid == 0:

        def put_layers():
            os.setsid()
            confine.confine_portably(scratch, is_session, cpu)

        if is_session:
            _run_child(0, second, put_layers, lambda: run(socket.socket(fileno=second)))

        def one_call():
            set_stdin(given)
            run(code)

        _run_child(second, 2, put_layers, one_call)
    os.close(second)  # else the caller would wait for us to close its output

    def watch():
        with contextlib.suppress(ConnectionError):
            ctl.recv(1)  # returns when the caller has gone: it sends no more
        _kill(pid)

    threading.Thread(target=watch, daemon=True).start()
    reply = _reap(pid)
    _remove(scratch)
    _answer(ctl, reply)
    os._exit(0)  # at once: `watch` may still be waiting

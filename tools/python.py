"""The python tool: runs code that the model wrote, each call in a fresh, confined process.

    text = await python("print(6 * 7)")  # in a notebook; a rollout goes through tools.Toolbox
    print(layers())  # which of the layers below this system lets us put around the code

A `python -c` per call costs 10 ms of CPU; so this same file, run as a script, is a fork server. It
starts at the first call (50 ms), imports the standard library only, forks one child per call (a
few ms), kills the child whose caller has gone, and ends when its parent ends, however that ends.

What is covered, where layers() says so (Linux, root or not):

    network_namespace  no network, not even loopback
    private_root       own mount namespace: of the machine's files there are only python's library
                       and the shared libraries, read-only; no /proc; /tmp ends with the call
    pid_namespace      sees and signals no process but its own; when the call ends, all of them
                       end, whatever they forked, daemonised or ignored
    own_user           if we are root: an unprivileged user id
    user_namespace     one per call: its own count of processes, and no way to nest another
    no_capabilities, no_new_privileges, limits (the constants below)
    seccomp            no socket(), ptrace(), mount() and such. Without a PID namespace (Docker's
                       default) no new process and no signal either: to kill one is to kill all
    Always: own session, none of our file descriptors and environment, no more output than is
    asked for, and killed when the deadline comes, the caller goes, or the trainer dies.

What is not covered: bugs of the kernel; side channels; the limits on CPU and memory hold for each
process of a call, not for their sum; two calls at the same time may meet in System V IPC. Without
private_root the code reads what its user may read, and may fill the disk with many files; if we
are not root that includes /proc/<pid>/environ and mem of the trainer. Without pid_namespace and
seccomp, what it daemonises lives on. Run models that you do not trust in a virtual machine too.

Hashes and `random` start from the same seed in each call, so that a resumed run sees the same.
"""

import ast
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import linecache
import os
import random
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import traceback
import types

CPU_SECONDS = 10  # per process; the wall clock is the caller's deadline
WALL_SECONDS = 60.0  # for callers without a deadline; a Toolbox's `timeout` is shorter
MEMORY = 512 * 2**20  # bytes of address space, per process
PROCESSES = 16  # processes and threads at once, per call
FILE_SIZE = 16 * 2**20  # bytes, per file
SCRATCH_SIZE = 64 * 2**20  # bytes, of all files of a call, with private_root
OPEN_FILES = 64  # per process
MAX_FD = 4096  # descriptors of the fork server: above 1000 calls at once
CODE_SIZE = 100_000  # bytes of code
OUTPUT_SIZE = 1_000_000  # bytes; code that writes more is killed
SHOWN = 20_000  # characters of output that are returned: head and tail, the cut marked
PRELOADED = (  # what models import most: paid once, not in every call
    "bisect cmath collections datetime decimal fractions functools heapq itertools math operator "
    "re statistics string time"
)
FIRST_UID = 61184  # with own_user; 61184..65519 is the range that systemd keeps for such users
UIDS = 4336

RAISED = 101  # exit status of a child whose code raised; its other statuses are the code's own
NO_OUTPUT = "(no output: use print(...) to see a value)"

if sys.platform != "linux":
    from config import UserError

    raise UserError("the python tool needs Linux: elsewhere run nanotool in a container")

# -- the caller's side


async def python(code: str) -> str:
    """Run Python code in a fresh process and return what it prints.

    Args:
        code: Python 3 code, standard library only, no network. Use print to see a value.
    """
    import asyncio  # not above: the fork server runs this file too, and starts faster without

    from tools import ToolError

    data = code.encode("utf-8", "surrogatepass")
    if len(data) > CODE_SIZE:
        raise ToolError("bad_arguments", f"error: the code is longer than {CODE_SIZE} bytes")
    for _ in range(2):  # a server that died left nothing of the call behind: run it again
        try:
            async with asyncio.timeout(WALL_SECONDS):
                output, reply = await _call(data)
            break
        except TimeoutError:
            raise ToolError("timeout", f"error: stopped after {WALL_SECONDS:g} s") from None
        except ConnectionError:
            continue
    else:
        raise RuntimeError("the sandbox's fork server died twice during the call")

    text = output.decode("utf-8", "replace").rstrip("\n")
    if len(text) > SHOWN:
        dropped, half = len(text) - SHOWN, SHOWN // 2
        text = f"{text[:half]}\n[... {dropped} characters cut ...]\n{text[-half:]}"
    if reply is None:
        raise ToolError("oversized", f"{text}\n(killed: more than {OUTPUT_SIZE} bytes of output)")
    if "broken" in reply:
        raise RuntimeError(f"the sandbox could not start a process: {reply['broken']}")
    status = os.waitstatus_to_exitcode(reply["status"])
    if status == RAISED:
        raise ToolError("exception", text)
    if status < 0:
        if reply["cpu"] > 0.9 * CPU_SECONDS:
            raise ToolError("timeout", f"{text}\n(killed: {CPU_SECONDS} s of CPU time)".lstrip())
        name = signal.Signals(-status).name
        raise ToolError("exception", f"{text}\n(the process was killed by {name})".lstrip())
    if status:
        text = f"{text}\n(exit code {status})".lstrip()
    return text or NO_OUTPUT


async def _call(data):
    """-> output, the server's reply; None for the reply if the output was too long. Raises
    ConnectionError if the server died. Leaving, if only by a cancellation, kills the child: the
    server sees `ctl` close."""
    import asyncio

    loop = asyncio.get_running_loop()
    ctl, far_ctl = socket.socketpair()
    out, far_out = socket.socketpair()
    try:
        ctl.setblocking(False)
        out.setblocking(False)
        try:
            while not _send(b"run", [far_ctl.fileno(), far_out.fileno()]):
                await asyncio.sleep(0.005)  # hundreds of calls wait for the server already
        finally:
            far_ctl.close()
            far_out.close()
        await loop.sock_sendall(ctl, struct.pack("=I", len(data)) + data)
        output = bytearray()
        while chunk := await loop.sock_recv(out, 1 << 16):
            output += chunk
            if len(output) > OUTPUT_SIZE:
                return output, None
        return output, _read_reply(await loop.sock_recv(ctl, 4096))
    finally:
        ctl.close()
        out.close()


def _read_reply(data):
    if not data:
        raise ConnectionResetError("the fork server died")
    return json.loads(data)


def layers() -> dict[str, bool]:
    """Which layers of the module's docstring are in force on this system. Starts the server."""
    near, far = socket.socketpair()
    with near:
        with far:
            while not _send(b"layers", [far.fileno()]):
                pass
        return _read_reply(near.recv(4096))


_server = {}  # "process", "control" (our end of a socket pair), "lock"; one server per process


def _send(message, fds):
    """Hands a request and its sockets to the server, which is started if there is none that lives.
    False if its queue is full."""
    with _server["lock"]:
        if "process" in _server and _server["process"].poll() is not None:
            _forget()
        if "process" not in _server:
            _start()
        try:
            socket.send_fds(_server["control"], [message], fds)
        except BlockingIOError:
            return False
        except ConnectionError:  # it died since poll(): the caller tries again with a new one
            _server["process"].wait()
            raise
        return True


def _start():
    import subprocess

    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.setblocking(False)
    # -s -S -P and an empty environment: what -I does, but a fixed hash seed. LD_LIBRARY_PATH: some
    # pythons do not start without it.
    keep = {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}
    with far:
        _server["process"] = subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", __file__, "--serve", str(os.getpid())],
            stdin=far,
            stdout=subprocess.DEVNULL,
            env=keep | {"PYTHONHASHSEED": "0"},
            cwd="/",
            start_new_session=True,  # Ctrl-C is for the trainer alone
        )
    _server["control"] = near


def _forget():
    """Also in the child of a fork of ours: it shares the server's socket but must not use it."""
    if "control" in _server:
        _server.pop("control").close()
        _server.pop("process").returncode = 0  # nothing to wait for


def _after_fork():
    _server["lock"] = threading.Lock()  # the old one may have been held
    _forget()


_server["lock"] = threading.Lock()
os.register_at_fork(after_in_child=_after_fork)

# -- the fork server


def serve(parent):
    """Serves until the parent's end of the control socket is closed, or the parent is gone."""
    control = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)  # the stdin of every child
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out, a child or this server goes, not the trainer
    active = _enter_namespaces()
    _preload()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # three descriptors per call:
    soft = MAX_FD if hard == resource.RLIM_INFINITY else min(MAX_FD, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    active = _probe(active)
    if active["seccomp"]:
        _seccomp_filter(active["pid_namespace"])

    poller = select.epoll()
    poller.register(control, select.EPOLLIN)
    calls, callers = {}, {}  # pidfd -> call, the caller's socket -> pidfd
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
                number += 1
                try:
                    call = _start_call(ctl, fds[1], number, active)
                except OSError as error:  # no process or memory left, say
                    ctl.send(json.dumps({"broken": str(error)}).encode())
                    ctl.close()
                    continue
                finally:
                    os.close(fds[1])
                calls[call["pidfd"]] = call
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
                _end_call(call)


def _start_call(ctl, out, number, active):
    uid = FIRST_UID + number % UIDS if active["own_user"] else os.geteuid()
    scratch = "/tmp"
    if not active["private_root"]:
        scratch = tempfile.mkdtemp(prefix=f"nanotool-{os.getpid()}-")
        os.chown(scratch, uid, -1)
    pid = _clone(active)
    if pid == 0:
        try:
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.closerange(3, ctl.fileno())
            os.closerange(ctl.fileno() + 1, MAX_FD)
            _confine(active, uid, scratch, probing=False)
            with ctl.makefile("rb") as file:
                (size,) = struct.unpack("=I", file.read(4))
                code = file.read(size).decode("utf-8", "surrogatepass")
            ctl.close()
            _run(code)
        except BaseException as error:  # of ours: _run does not return
            os.write(2, f"sandbox: {type(error).__name__}: {error}".encode())
        finally:
            os._exit(RAISED)
    return {"pid": pid, "pidfd": os.pidfd_open(pid), "ctl": ctl, "scratch": scratch}


def _kill(call):
    signal.pidfd_send_signal(call["pidfd"], signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # where there is no PID namespace
        os.killpg(call["pid"], signal.SIGKILL)


def _end_call(call):
    _, status, usage = os.wait4(call["pid"], 0)
    os.close(call["pidfd"])
    if call["scratch"] != "/tmp":
        _remove(call["scratch"])
    reply = {"status": status, "cpu": usage.ru_utime + usage.ru_stime}
    with call["ctl"] as ctl, contextlib.suppress(ConnectionError):  # the caller may have gone
        ctl.send(json.dumps(reply).encode())


def _remove(scratch):
    with contextlib.suppress(OSError):  # the code may have renamed or removed it
        os.chmod(scratch, 0o700)
        for folder, names, _ in os.walk(scratch):
            for path in (os.path.join(folder, name) for name in names):
                if not os.path.islink(path):
                    os.chmod(path, 0o700)  # rmtree would stop at a directory made unreadable
        shutil.rmtree(scratch)


# -- what is put around the code

# System calls by number, (x86_64, aarch64); None: that machine has no such call.
NUMBERS = {
    "clone": (56, 220), "capset": (126, 91), "pivot_root": (155, 41), "mount_setattr": (442, 442),
}  # fmt: skip
REFUSED = {
    "socket": (41, 198), "io_uring_setup": (425, 425), "ptrace": (101, 117), "bpf": (321, 280),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "unshare": (272, 97),
    "setns": (308, 268), "mount": (165, 40), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
}  # fmt: skip
REFUSED_WITHOUT_PID_NAMESPACE = {
    "fork": (57, None), "vfork": (58, None), "kill": (62, 129), "tkill": (200, 130),
    "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "prlimit64": (302, 261),
}  # fmt: skip
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
# PyDLL, not CDLL: it keeps the GIL, which nobody could hand back in the child of clone()
LIBC = ctypes.PyDLL(None, use_errno=True)


def _libc(name, *args):
    args = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result = getattr(LIBC, name)(*args)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _syscall(name, *args):
    if os.uname().machine not in MACHINES:
        raise OSError(f"{name}: its number on {os.uname().machine} is not known here")
    return _libc("syscall", NUMBERS[name][MACHINES[os.uname().machine][0]], *args)


def _works(step):
    try:
        step()
    except OSError:
        return False
    return True


def _enter_namespaces():
    """Once, for the server and so for all calls: a network namespace costs too much for each."""
    flags = NEWNS | NEWNET | NEWIPC
    uid, gid = os.geteuid(), os.getegid()

    def as_user():
        _libc("unshare", NEWUSER | flags)
        maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)

    inside = _works(lambda: _libc("unshare", flags)) or _works(as_user)
    return {"network_namespace": inside, "private_root": inside and _works(_enter_private_root)}


def _enter_private_root():
    """A root of only what python needs, read-only. Built over /proc, which surely exists."""
    if sys.base_prefix.startswith("/tmp/"):
        raise OSError("python itself lies where the scratch directories will be mounted")
    _libc(
        "mount", None, b"/", None, 0x44000, None
    )  # MS_REC | MS_PRIVATE: what follows is ours alone
    _libc("mount", b"none", b"/proc", b"tmpfs", 0, b"size=1m,mode=755")
    try:
        libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]
        files = ["/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom"]
        for path in [*libraries, *files, f"{sys.base_prefix}/lib", *sys.path]:
            inside = f"/proc{path}"
            if not os.path.exists(path) or os.path.exists(inside):
                continue
            os.makedirs(inside if os.path.isdir(path) else os.path.dirname(inside), exist_ok=True)
            if not os.path.isdir(path):
                open(inside, "w").close()
            _libc("mount", path.encode(), inside.encode(), None, 0x5000, None)  # MS_BIND | MS_REC
        os.mkdir("/proc/tmp")
        read_only = struct.pack("=4Q", 0x1 | 0x2, 0, 0, 0)  # MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID
        _syscall("mount_setattr", -1, b"/proc", 0x8000, read_only, len(read_only))  # AT_RECURSIVE
        os.chdir("/proc")
        _syscall("pivot_root", b".", b".")  # the old root now lies over the new one
    except OSError:
        _libc("umount2", b"/proc", 2)
        raise
    _libc("umount2", b".", 2)  # MNT_DETACH
    os.chdir("/")


def _clone(active):
    """os.fork(), into new namespaces: with a PID namespace the child is its init."""
    if not active["pid_namespace"]:
        return os.fork()
    flags = NEWPID | (NEWNS if active["private_root"] else 0)
    pid = -1
    ctypes.pythonapi.PyOS_BeforeFork()
    try:
        pid = _syscall("clone", flags | signal.SIGCHLD, 0, 0, 0, 0)
    finally:
        (ctypes.pythonapi.PyOS_AfterFork_Parent if pid else ctypes.pythonapi.PyOS_AfterFork_Child)()
    return pid


def _probe(active):
    """Which layers a child can put around itself, tried in a child."""
    for pid_namespace in (True, False):
        trial = active | {"pid_namespace": pid_namespace}
        trial["private_root"] &= pid_namespace
        reader, writer = os.pipe()
        try:
            pid = _clone(trial)
        except OSError:
            continue
        if pid == 0:
            _confine(trial, FIRST_UID, "/tmp", probing=True)
            os.write(writer, json.dumps(trial).encode())
            os._exit(0)
        os.close(writer)
        os.waitpid(pid, 0)
        return json.loads(os.read(reader, 4096))


def _confine(active, uid, scratch, probing):
    os.setsid()
    if active["private_root"]:
        options = f"size={SCRATCH_SIZE},nr_inodes=4096,mode=777".encode()
        _libc("mount", b"none", b"/tmp", b"tmpfs", 0x6, options)  # MS_NOSUID | MS_NODEV
    os.chdir(scratch)

    def own_user():
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        open(os.__file__).close()  # python's library may lie where only root can read

    def limits():
        wanted = {
            resource.RLIMIT_CPU: CPU_SECONDS,
            resource.RLIMIT_AS: MEMORY,
            resource.RLIMIT_FSIZE: FILE_SIZE,
            resource.RLIMIT_NOFILE: OPEN_FILES,
            resource.RLIMIT_CORE: 0,
        }
        # Counted per user: as the trainer's own user the trainer's threads would count, and root's
        # are never counted.
        if active["own_user"] or active["user_namespace"]:
            wanted[resource.RLIMIT_NPROC] = PROCESSES
        for kind, value in wanted.items():
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))

    steps = {
        "own_user": own_user,
        # Without a uid map, and so with no way to make another one inside.
        "user_namespace": lambda: _libc("unshare", NEWUSER),
        "no_capabilities": lambda: _syscall("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24)),
        "limits": limits,
        "no_new_privileges": lambda: _libc("prctl", 38, 1, 0, 0, 0),
        "seccomp": lambda: _refuse_calls(active["pid_namespace"]),
    }
    for name, step in steps.items():
        if probing:
            active[name] = _works(step)
        elif active[name]:
            step()
    _libc("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: die with the server


@functools.cache  # made once, in the server
def _seccomp_filter(pid_namespace):
    """The calls in REFUSED fail with EPERM. -> BPF program in its two C structures."""
    column, arch = MACHINES[os.uname().machine]
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, eperm, enosys, kill = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
    refused = REFUSED if pid_namespace else REFUSED | REFUSED_WITHOUT_PID_NAMESPACE
    program = [(load, 0, 0, 4), (equal, 1, 0, arch), (answer, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, eperm)]  # x32: the same, renumbered
    for number in (numbers[column] for numbers in refused.values() if numbers[column] is not None):
        program += [(equal, 0, 1, number), (answer, 0, 0, eperm)]
    if not pid_namespace:  # threads may start, processes not; clone3 hides its flags, so: use clone
        program += [(equal, 0, 1, 435), (answer, 0, 0, enosys)]
        program += [(equal, 0, 3, NUMBERS["clone"][column]), (load, 0, 0, 16)]
        program += [(any_bit, 1, 0, 0x10000), (answer, 0, 0, eperm)]  # CLONE_THREAD
    program += [(answer, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    return struct.pack("@HP", len(program), ctypes.addressof(code)), code


def _refuse_calls(pid_namespace):
    if os.uname().machine not in MACHINES:
        raise OSError("no seccomp filter for this machine")
    _libc("prctl", 22, 2, _seccomp_filter(pid_namespace)[0], 0, 0)  # PR_SET_SECCOMP, ..._FILTER


# -- running the code


def _preload():
    for name in PRELOADED.split():
        importlib.import_module(name)
    for mode in ("exec", "eval"):  # the compiler's first use fills its caches
        compile(ast.parse("6 * 7", "<code>", mode), "<code>", mode)
    gc.collect()
    gc.freeze()  # a collection in the child would otherwise copy every page


def _run(code):
    """Does not return. Like a notebook's cell: the value of a last bare expression is shown."""
    random.seed(0)
    os.environ.clear()
    os.environ.update(dict.fromkeys(("HOME", "PATH", "TMPDIR"), os.getcwd()))
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.exit = main.quit = sys.exit
    sys.argv = [""]
    sys.stdin = open(0, closefd=False)
    # One object for both: in order. Line by line: what was printed before a crash is not lost.
    sys.stdout = sys.stderr = open(
        1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
    )
    linecache.cache["<code>"] = (len(code), None, code.splitlines(True), "<code>")
    status = 0
    try:
        tree = ast.parse(code, "<code>")
        last = tree.body.pop().value if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<code>", "exec"), main.__dict__)
        if last is not None:
            value = eval(compile(ast.Expression(last), "<code>", "eval"), main.__dict__)
            if value is not None:
                print(repr(value))
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if status and not isinstance(error.code, int):
            print(error.code)
    except BaseException as error:
        status = RAISED
        _report(error)
    finally:
        try:
            sys.stdout.flush()
        finally:
            os._exit(status & 255)


def _report(error):
    """The traceback of the code's own lines, without ours and the library's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == "<code>"]
    text = "Traceback (most recent call last):\n" if frames else ""
    text += "".join(traceback.format_list(frames[-10:]))
    text += "".join(traceback.format_exception_only(error))
    if isinstance(error, MemoryError):
        text = f"MemoryError (the limit is {MEMORY >> 20} MB)\n"
    try:
        sys.stdout.flush()
    finally:
        os.write(2, text.encode("utf-8", "backslashreplace"))


if __name__ == "__main__" and sys.argv[1:2] == ["--serve"]:
    serve(int(sys.argv[2]))

"""What is put around code that a model wrote: each call in a fresh, confined process.

This runs in a process of its own, not in the trainer. A tool's file (python.py: main) hands it a
function run(code) that does not return. On Linux it is a fork server: it starts at the first call
(50 ms), imports the standard library only, forks one child per call (a few ms), kills the child
whose caller has gone, and ends when its parent ends, however that ends. Elsewhere each call starts
a python of its own (40 ms), which forks the child, and ends in the same ways.

What is covered, where layers() says so (Linux, root or not):

    network_namespace  no network, not even loopback
    private_root       own mount namespace: of the machine's files there are only python's library
                       and the shared libraries, read-only; no /proc; /tmp ends with the call
    pid_namespace      sees and signals no process but its own; when the call ends, all of them
                       end, whatever they forked, daemonised or ignored
    own_user           if we are root: an unprivileged user id
    user_namespace     one per call: its own count of processes, and no way to nest another
    no_capabilities, no_new_privileges
    seccomp            no socket(), ptrace(), mount() and such. Without a PID namespace (Docker's
                       default) no new process and no signal either: to kill one is to kill all
    limit_...          the constants below, also elsewhere. There limit_processes means no new
                       process at all, since those that the user has are counted
    Always: own session and process group, killed whole when the call ends, the deadline comes, the
    caller goes, or the trainer dies; none of our file descriptors and environment; a scratch
    directory that is removed; no more output than is asked for.

What is not covered: bugs of the kernel; side channels; the limits on CPU and memory hold for each
process of a call, not for their sum; two calls at the same time may meet in System V IPC. Without
private_root the code reads what its user may read, and may fill the disk with many files; if we
are not root that includes /proc/<pid>/environ and mem of the trainer. Without pid_namespace and
seccomp, what it daemonises lives on. Run models that you do not trust in a virtual machine too.

What is not covered elsewhere (macOS): all of that, and none of the layers but limit_..., so code is
held from accidents, not from malice. It runs as your user: reads, changes and deletes what you may,
uses the network, and may signal your processes: the trainer, or the one that watches over it, and
then nothing ends it and its directory stays. Without limit_processes (root), what makes a session
of its own lives on, and if it keeps the output open the call lasts until its deadline. macOS
refuses limit_memory: until the deadline a call may take all memory. Windows has no way; the tool
says so when it is loaded.
"""

import contextlib
import ctypes
import functools
import json
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading

CPU_SECONDS = 10  # per process; the wall clock is the caller's deadline
MEMORY = 512 * 2**20  # bytes of address space, per process
PROCESSES = 16  # processes and threads at once, per call
FILE_SIZE = 16 * 2**20  # bytes, per file
SCRATCH_SIZE = 64 * 2**20  # bytes, of all files of a call, with private_root
OPEN_FILES = 64  # per process
MAX_FD = 4096  # descriptors of the fork server: above 1000 calls at once
FIRST_UID = 61184  # with own_user; 61184..65519 is the range that systemd keeps for such users
UIDS = 4336
RAISED = 101  # exit status of a child whose code raised; its other statuses are the code's own

# -- the fork server


def serve(parent, run):
    """Serves until the parent's end of the control socket is closed, or the parent is gone."""
    control = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)  # the stdin of every child
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out, a child or this server goes, not the trainer
    active = _enter_namespaces()
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
                    call = _start_call(ctl, fds[1], number, active, run)
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
                os.close(fd)
                _end_call(call)


def _start_call(ctl, out, number, active, run):
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
            code = _read_code(ctl)
            ctl.close()
            run(code.decode("utf-8", "surrogatepass"))
        except BaseException as error:  # of ours: run does not return
            os.write(2, f"sandbox: {type(error).__name__}: {error}".encode())
        finally:
            os._exit(RAISED)
    return {"pid": pid, "pidfd": os.pidfd_open(pid), "ctl": ctl, "scratch": scratch}


def _read_code(ctl):
    with ctl.makefile("rb") as file:
        return file.read(int.from_bytes(file.read(4), sys.byteorder))


def _kill(call):
    with contextlib.suppress(ProcessLookupError):
        os.kill(call["pid"], signal.SIGKILL)
    _kill_group(call)


def _kill_group(call):
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS, of a group of zombies
        os.killpg(call["pid"], signal.SIGKILL)


def _end_call(call):
    _, status, usage = os.wait4(call["pid"], 0)
    _kill_group(call)  # what it left behind, where there is no PID namespace
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


# -- one process per call, where there is no fork server


def serve_one(run):
    """Reads a call from stdin, a socket, runs it in a child, and sees to the child's end."""
    ctl = socket.socket(fileno=os.dup(0))
    code = _read_code(ctl)  # here: `watch` below must not find a byte of it
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    scratch = tempfile.mkdtemp(prefix=f"nanotool-{os.getppid()}-")
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(1, 2)
            os.closerange(3, MAX_FD)
            os.setsid()
            confine_portably(scratch)
            run(code.decode("utf-8", "surrogatepass"))
        except BaseException as error:  # of ours: run does not return
            os.write(2, f"sandbox: {type(error).__name__}: {error}".encode())
        finally:
            os._exit(RAISED)
    os.dup2(null, 1)  # else the caller would wait for us to close its output
    call = {"pid": pid, "ctl": ctl, "scratch": scratch}

    def watch():
        with contextlib.suppress(ConnectionError):
            ctl.recv(1)  # returns when the caller has gone: it sends no more
        _kill(call)

    threading.Thread(target=watch, daemon=True).start()
    _end_call(call)
    os._exit(0)  # at once: `watch` may still be waiting


def confine_portably(scratch):
    """What every Unix has. -> the layers, as layers() gives them."""
    os.chdir(scratch)
    active = dict.fromkeys(LINUX_LAYERS, False)
    for name, limit in LIMITS.items():
        active[name] = _works(functools.partial(_limit, *limit))  # macOS refuses some

    def no_new_process():  # the user's own processes count too, so only zero makes sense
        _limit(resource.RLIMIT_NPROC, 0)
        try:
            pid = os.fork()
        except BlockingIOError:
            return
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        raise OSError("it does not hold root")

    active["limit_processes"] = _works(no_new_process)
    return active


# -- what is put around the code

LIMITS = {
    "limit_cpu": (resource.RLIMIT_CPU, CPU_SECONDS),
    "limit_memory": (resource.RLIMIT_AS, MEMORY),
    "limit_file_size": (resource.RLIMIT_FSIZE, FILE_SIZE),
    "limit_open_files": (resource.RLIMIT_NOFILE, OPEN_FILES),
    "limit_core_dumps": (resource.RLIMIT_CORE, 0),
}
LINUX_LAYERS = (
    "network_namespace private_root pid_namespace own_user user_namespace no_capabilities "
    "no_new_privileges seccomp"
).split()

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
    except (OSError, ValueError):  # ValueError: setrlimit(), of a limit that macOS refuses
        return False
    return True


def _limit(kind, value):
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


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

    def limit_processes():
        # Counted per user: as the trainer's own user the trainer's threads would count, and root's
        # are never counted.
        if not (active["own_user"] or active["user_namespace"]):
            raise OSError("only for a user of its own")
        _limit(resource.RLIMIT_NPROC, PROCESSES)

    steps = {
        "own_user": own_user,
        # Without a uid map, and so with no way to make another one inside.
        "user_namespace": lambda: _libc("unshare", NEWUSER),
        "no_capabilities": lambda: _syscall("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24)),
        **{name: functools.partial(_limit, *limit) for name, limit in LIMITS.items()},
        "limit_processes": limit_processes,
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

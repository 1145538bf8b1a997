"""What is put around a process that runs code which a model wrote: how each layer is made.

caller.py says what the layers cover, and what they do not; fork_server.py puts them around. But for
the constants and hide_memory() this is used in the sandbox's own processes, never in the trainer.

seccomp: a filter of our own, as a library gives none here: pyseccomp is a wrapper from 2021 around
the system's libseccomp, which is not everywhere, for the few lines of seccomp_filter().
"""

import sys

if sys.platform == "win32":  # before the modules that are not there
    from run.config import UserError

    raise UserError("python and bash need Linux or macOS: on Windows run nanotool in WSL")

import ctypes
import functools
import glob
import json
import os
import resource
import signal
import struct
import time

CPU_SECONDS = 10  # at least, per process; in a session per call. More if the call may take longer
SESSION_CPU_SECONDS = 600  # per process of a session, for its life: what its code cannot lift
# Bytes of address space, per process, beside what the server has loaded. Not per call: that takes a
# memory cgroup for each, which neither a plain user nor Docker's default may make; PROCESSES and
# SCRATCH_SIZE bound what a call can have in all.
MEMORY = 512 * 2**20
PROCESSES = 16  # processes and threads at once, per call
FILE_SIZE = 16 * 2**20  # bytes, per file
SCRATCH_SIZE = 64 * 2**20  # bytes, of all files of a call, with private_root
OPEN_FILES = 64  # per process
FIRST_UID = 61184  # with own_user; 61184..65519 is the range that systemd keeps for such users
UIDS = 1445  # for each of three servers; more than the calls that one can have at once

LAYERS = (  # but for limit_..., which exist also elsewhere
    "network_namespace",
    "private_root",
    "pid_namespace",
    "own_user",
    "user_namespace",
    "no_capabilities",
    "no_new_privileges",
    "seccomp",
)

# System calls by number, (x86_64, aarch64); None: that machine has no such call.
NUMBERS = {
    "clone": (56, 220),
    "capset": (126, 91),
    "pivot_root": (155, 41),
    "mount_setattr": (442, 442),
    "prlimit64": (302, 261),
    "prctl": (157, 167),
    "clone3": (435, 435),
    "sendto": (44, 206),
    "fcntl": (72, 25),
}
REFUSED_FIRST = {"prctl": 1}  # by first argument: PR_SET_PDEATHSIG, which ends what we started
# By second argument: what tells one call of another by a file that both can read. The locks that
# fcntl sets do not: to see one takes a file that is open for writing.
REFUSED_FCNTL = {
    "F_GETLK": 5,
    "F_OFD_GETLK": 36,
    "F_SETLEASE": 1024,
    "F_GETLEASE": 1025,
    "F_NOTIFY": 1026,
}
REFUSED = {
    "socket": (41, 198),
    "io_uring_setup": (425, 425),
    "ptrace": (101, 117),
    "bpf": (321, 280),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    # what these make outlives its maker, or is memory that no limit counts
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # by these one call reaches another: a socket of socketpair() can be named, and can ask for a
    # name, and descriptors pass by sendmsg; of sendto() what has an address is refused
    "bind": (49, 200),
    "connect": (42, 203),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "sendmsg": (46, 211),
    "sendmmsg": (307, 269),
    "flock": (73, 32),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
}
REFUSED_WITHOUT_PID_NAMESPACE = {
    "fork": (57, None),
    "vfork": (58, None),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
}
# For a process that only reads, beside new processes and signals: what starts a program, and what
# changes a file by its name. Of open() those that could write are refused: see OPENS.
REFUSED_TO_READERS = {
    "execve": (59, 221),
    "execveat": (322, 281),
    "openat2": (437, 437),  # its flags are where no filter can look
    "creat": (85, None),
    "truncate": (76, 45),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "rmdir": (84, None),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
}
OPENS = (((2, None), 1), ((257, 56), 2))  # open, openat: number, which argument has the flags
MAY_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*

# Constants of the kernel, by their names there.
CLONE_NEWNS = 0x20000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_THREAD = 0x10000
MS_NOSUID_NODEV = 0x2 | 0x4
MS_BIND_REC = 0x1000 | 0x4000
MS_REC_PRIVATE = 0x4000 | 0x40000
MNT_DETACH = 2
MOUNT_ATTR_RDONLY_NOSUID = 0x1 | 0x2
AT_RECURSIVE = 0x8000
MADV_COLLAPSE = 25
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
HUGE_PAGE = 2**21  # bytes

# PyDLL, not CDLL: it keeps the GIL, which nobody could hand back in the child of clone()
LIBC = ctypes.PyDLL(None, use_errno=True)


# -- calls of the system


def libc(name: str, *args) -> int:
    """Calls a function of the C library; OSError where that says so."""
    args = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result = getattr(LIBC, name)(*args)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _syscall(name, *args):
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(f"{name}: its number on {machine} is not known here")
    column, _ = MACHINES[machine]
    return libc("syscall", NUMBERS[name][column], *args)


def works(step) -> bool:
    """Runs step(); says whether it is allowed here."""
    try:
        step()
    except (OSError, ValueError):  # ValueError: setrlimit(), of a limit that macOS refuses
        return False
    return True


def hide_memory() -> None:
    """Keeps other processes of this user from reading this one's memory, or tracing it."""
    libc("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)


# -- limits


def limit(kind, soft, hard=None):
    """Sets a limit of this process; never above what it has. hard: the same as soft if None."""
    most = resource.getrlimit(kind)[1]
    if not hard:
        hard = soft
    if most != resource.RLIM_INFINITY:
        soft = min(soft, most)
        hard = min(hard, most)
    resource.setrlimit(kind, (soft, hard))


def limits_of(loaded: int, is_session: bool, cpu: int) -> dict[str, tuple]:
    """Lists the limits: name -> arguments of limit(). `loaded`: the bytes that the server has
    mapped already. `cpu`: seconds."""
    cpu_of_life = max(cpu, SESSION_CPU_SECONDS) if is_session else cpu
    return {
        "limit_cpu": (resource.RLIMIT_CPU, cpu, cpu_of_life),
        "limit_memory": (resource.RLIMIT_AS, loaded + MEMORY),
        "limit_file_size": (resource.RLIMIT_FSIZE, FILE_SIZE),
        "limit_open_files": (resource.RLIMIT_NOFILE, OPEN_FILES),
        "limit_core_dumps": (resource.RLIMIT_CORE, 0),
    }


def renew_cpu_limit(cpu: int) -> None:
    """Allows this process so many seconds of CPU time more, up to the hard limit of a session."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + cpu, hard)


def allow_open_files(count: int) -> None:
    """Allows this process so many open files, up to its hard limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    soft = count if hard == resource.RLIM_INFINITY else min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def use_huge_pages(maps: str) -> int:
    """Puts the memory into pages of 2 MB instead of 4 KB, where the kernel can (Linux 6.1): to copy
    and drop the list of pages is half of what a fork costs. maps: /proc/self/maps. -> bytes of
    address space"""
    mapped = 0
    for line in maps.splitlines():
        addresses, rights, _, _, _, *name = line.split()
        start, end = (int(address, 16) for address in addresses.split("-"))
        mapped += end - start
        if "w" in rights and name in ([], ["[heap]"]):
            works(functools.partial(_collapse, start, end))
    return mapped


def _collapse(start, end):
    """Collapses the whole huge pages between two addresses."""
    start = -(-start // HUGE_PAGE) * HUGE_PAGE
    end = end // HUGE_PAGE * HUGE_PAGE
    if start < end:
        libc("madvise", start, end - start, MADV_COLLAPSE)


# -- namespaces and the private root: once, for a server and so for all of its calls


def enter_namespaces(shown: dict[str, str]) -> dict[str, bool]:
    """Enters them once for all calls: a network namespace for each would cost more than the call
    (tens of milliseconds beside 2 of a fork), and what it would keep apart, seccomp refuses.
    `shown`: path on the machine -> path in the private root, beside what python itself needs.
    -> two of the layers, and whether they are there"""
    inside = works(_unshare) or works(_unshare_as_user)
    return {
        "network_namespace": inside,
        "private_root": inside and works(functools.partial(_enter_private_root, shown)),
    }


def _unshare():
    libc("unshare", CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC)


def _unshare_as_user():
    """Enters namespaces without root: in a user namespace, in which we are who we are."""
    uid = os.geteuid()
    gid = os.getegid()
    libc("unshare", CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{uid} {uid} 1")
    _write("/proc/self/gid_map", f"{gid} {gid} 1")


def _write(path, text):
    with open(path, "w") as file:
        file.write(text)


def _enter_private_root(shown):
    """Enters a root of only what is needed, read-only."""
    if sys.base_prefix.startswith("/tmp/"):
        raise OSError("python itself lies where the scratch directories will be mounted")
    _change_root(functools.partial(_fill_private_root, shown))


def _change_root(fill):
    """Enters a root in which nothing can be written. fill() shows what it has, below /proc: it is
    built there, as /proc surely exists."""
    libc("mount", None, b"/", None, MS_REC_PRIVATE, None)  # what follows is ours alone
    libc("mount", b"none", b"/proc", b"tmpfs", 0, b"size=1m,mode=755")
    try:
        fill()
        read_only = struct.pack("=4Q", MOUNT_ATTR_RDONLY_NOSUID, 0, 0, 0)
        _syscall("mount_setattr", -1, b"/proc", AT_RECURSIVE, read_only, len(read_only))
        os.chdir("/proc")
        _syscall("pivot_root", b".", b".")  # the old root now lies over the new one
    except OSError:
        libc("umount2", b"/proc", MNT_DETACH)
        raise
    libc("umount2", b".", MNT_DETACH)
    os.chdir("/")


def _fill_private_root(shown):
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]
    # Debian's numpy finds its BLAS by way of alternatives
    files = ["/etc/ld.so.cache", "/etc/alternatives", "/dev/null", "/dev/zero", "/dev/urandom"]
    places = {}
    for path in (*libraries, *files, f"{sys.base_prefix}/lib", *sys.path):
        places[path] = path
    places.update(shown)
    for path, inside in sorted(places.items(), key=lambda place: place[1]):  # parents first
        _bind(path, f"/proc{inside}")
    # below python's library lie the packages of its own environment, if it is no venv
    for name in ("site-packages", "dist-packages"):
        for path in glob.glob(f"/proc{sys.base_prefix}/lib/python3*/{name}"):
            libc("mount", b"none", path.encode(), b"tmpfs", 0, b"size=4k")
    os.mkdir("/proc/tmp")


def _bind(path, inside):
    """Shows what lies at a path at another one."""
    if not os.path.exists(path) or os.path.exists(inside):
        return
    if os.path.isdir(path):
        os.makedirs(inside, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        open(inside, "w").close()
    libc("mount", path.encode(), inside.encode(), None, MS_BIND_REC, None)


# -- layers of each call


def clone(active: dict[str, bool]) -> int:
    """Forks, as os.fork(), into new namespaces: with a PID namespace the child is its init."""
    if not active["pid_namespace"]:
        return os.fork()
    flags = CLONE_NEWPID | signal.SIGCHLD
    if active["private_root"]:
        flags |= CLONE_NEWNS
    pid = -1
    ctypes.pythonapi.PyOS_BeforeFork()
    try:
        pid = _syscall("clone", flags, 0, 0, 0, 0)
    finally:
        if pid == 0:
            ctypes.pythonapi.PyOS_AfterFork_Child()
        else:
            ctypes.pythonapi.PyOS_AfterFork_Parent()
    return pid


def probe(active: dict[str, bool], limits: dict[str, tuple]) -> dict[str, bool]:
    """Finds, in a child, which layers one can put around itself. `active`: of the server."""
    for pid_namespace in (True, False):
        trial = active | {"pid_namespace": pid_namespace}
        if not pid_namespace:
            trial["private_root"] = False  # it takes a child in namespaces of its own
        reader, writer = os.pipe()
        try:
            pid = clone(trial)
        except OSError:
            os.close(reader)
            os.close(writer)
            continue
        if pid == 0:
            try:
                apply_layers(trial, FIRST_UID, "/tmp", limits, probing=True)
                os.write(writer, json.dumps(trial).encode())
            finally:
                os._exit(0)
        os.close(writer)
        os.waitpid(pid, 0)
        with open(reader, "rb") as result:
            return json.loads(result.read())


def apply_layers(
    active: dict[str, bool], uid: int, scratch: str, limits: dict[str, tuple], probing: bool = False
) -> None:
    """Puts the layers in `active` around this process; with `probing`, finds out which."""
    os.setsid()
    if active["private_root"]:
        options = f"size={SCRATCH_SIZE},nr_inodes=4096,mode=777".encode()
        libc("mount", b"none", b"/tmp", b"tmpfs", MS_NOSUID_NODEV, options)
    os.chdir(scratch)
    for name, step in _steps(active, uid, limits, probing).items():
        if name == "seccomp":
            # Die with the server. own_user would undo it, and seccomp refuses it.
            libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if probing:
            active[name] = works(step)
        elif active[name]:
            step()


def _steps(active, uid, limits, probing):
    """Lists the steps, layer -> what puts it around this process, in order: what comes later could
    not be done before, or would keep what comes before from being done."""

    def own_user():
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        if probing:
            open(os.__file__).close()  # python's library may lie where only root can read

    def user_namespace():
        libc("unshare", CLONE_NEWUSER)  # without a uid map, and so no way to nest another one

    def no_capabilities():
        _syscall("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))

    def limit_processes():
        # Counted per user: as the trainer's own user the trainer's threads would count, and root's
        # are never counted.
        if not (active["own_user"] or active["user_namespace"]):
            raise OSError("only for a user of its own")
        limit(resource.RLIMIT_NPROC, PROCESSES)

    def no_new_privileges():
        libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)

    def seccomp():
        refuse_calls(active["pid_namespace"])

    steps = {
        "own_user": own_user,
        "user_namespace": user_namespace,
        "no_capabilities": no_capabilities,
    }
    for name, arguments in limits.items():
        steps[name] = functools.partial(limit, *arguments)
    steps["limit_processes"] = limit_processes
    steps["no_new_privileges"] = no_new_privileges
    steps["seccomp"] = seccomp
    return steps


# -- seccomp: a program for the kernel's BPF machine, which looks at each call of the system

# (operation, jump if true, jump if false, value): the operations
LOAD = 0x20  # the 4 bytes at that place of the call's data
IS = 0x15  # goes on by how many instructions if what is loaded is that; else by how many
AT_LEAST = 0x35
HAS_BIT = 0x45
ANSWER = 0x06
# places of the call's data
CALL_NUMBER = 0
MACHINE = 4
FIRST_ARGUMENT = 16
# answers
ALLOW = 0x7FFF0000
FAIL_EPERM = 0x50001
FAIL_ENOSYS = 0x50026
KILL = 0x80000000
X32 = 0x40000000  # the same calls, renumbered


@functools.cache  # made once, in the server
def seccomp_filter(pid_namespace: bool, only_reads: bool = False) -> tuple:
    """Makes the calls in REFUSED fail with EPERM. only_reads: those of a process that writes no
    file and starts no program too. -> BPF program in its two C structures."""
    column, machine = MACHINES[os.uname().machine]
    program = [
        (LOAD, 0, 0, MACHINE),
        (IS, 1, 0, machine),
        (ANSWER, 0, 0, KILL),
        (LOAD, 0, 0, CALL_NUMBER),
        (AT_LEAST, 0, 1, X32),
        (ANSWER, 0, 0, FAIL_EPERM),
    ]
    for numbers in REFUSED.values():
        program += _refuse(numbers[column], FAIL_EPERM)
    if not pid_namespace:
        for numbers in REFUSED_WITHOUT_PID_NAMESPACE.values():
            program += _refuse(numbers[column], FAIL_EPERM)
        program += _refuse_new_processes(column)
        program += _refuse_limits_of_others(column)
    program += _refuse_addresses(column)
    for command in REFUSED_FCNTL.values():
        program += _refuse_value(NUMBERS["fcntl"][column], 1, command)
    if only_reads:
        program.append((LOAD, 0, 0, CALL_NUMBER))
        for numbers in REFUSED_TO_READERS.values():
            program += _refuse(numbers[column], FAIL_EPERM)
        for numbers, argument in OPENS:
            program += _refuse_bits(numbers[column], argument, MAY_WRITE)
    for name, first in REFUSED_FIRST.items():
        program += _refuse_value(NUMBERS[name][column], 0, first)
    program.append((ANSWER, 0, 0, ALLOW))
    instructions = [struct.pack("=HBBI", *instruction) for instruction in program]
    code = ctypes.create_string_buffer(b"".join(instructions))
    return struct.pack("@HP", len(program), ctypes.addressof(code)), code


def _refuse(number, answer):
    if number is None:
        return []
    return [(IS, 0, 1, number), (ANSWER, 0, 0, answer)]


def _refuse_value(number, argument, value):
    """Refuses the call if that argument is this."""
    return [
        (LOAD, 0, 0, CALL_NUMBER),
        (IS, 0, 3, number),
        (LOAD, 0, 0, FIRST_ARGUMENT + 8 * argument),
        (IS, 0, 1, value),
        (ANSWER, 0, 0, FAIL_EPERM),
    ]


def _refuse_addresses(column):
    """Refuses sendto() with an address, its fifth argument; send() is the same call without."""
    address = FIRST_ARGUMENT + 8 * 4
    return [
        (LOAD, 0, 0, CALL_NUMBER),
        (IS, 0, 5, NUMBERS["sendto"][column]),
        (LOAD, 0, 0, address),
        (IS, 0, 2, 0),
        (LOAD, 0, 0, address + 4),  # the upper half
        (IS, 1, 0, 0),
        (ANSWER, 0, 0, FAIL_EPERM),
    ]


def _refuse_bits(number, argument, bits):
    """Refuses the call if that argument has one of these bits."""
    if number is None:
        return []
    return [
        (LOAD, 0, 0, CALL_NUMBER),
        (IS, 0, 3, number),
        (LOAD, 0, 0, FIRST_ARGUMENT + 8 * argument),
        (HAS_BIT, 0, 1, bits),
        (ANSWER, 0, 0, FAIL_EPERM),
    ]


def _refuse_new_processes(column):
    """Lets threads start, processes not; clone3 hides its flags, so its error says: use clone."""
    return [
        *_refuse(NUMBERS["clone3"][column], FAIL_ENOSYS),
        (IS, 0, 3, NUMBERS["clone"][column]),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (HAS_BIT, 1, 0, CLONE_THREAD),
        (ANSWER, 0, 0, FAIL_EPERM),
    ]


def _refuse_limits_of_others(column):
    """Lets a process set its own limits (pid 0), not those of others."""
    return [
        (LOAD, 0, 0, CALL_NUMBER),  # again: the lines for clone have loaded its flags
        (IS, 0, 3, NUMBERS["prlimit64"][column]),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (IS, 1, 0, 0),
        (ANSWER, 0, 0, FAIL_EPERM),
    ]


def refuse_calls(pid_namespace: bool, only_reads: bool = False) -> None:
    if os.uname().machine not in MACHINES:
        raise OSError("no seccomp filter for this machine")
    structure, _ = seccomp_filter(pid_namespace, only_reads)
    libc("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, structure, 0, 0)


# -- a process that reads one file


def confine_reader(file: str) -> tuple[str, dict[str, bool]]:
    """Puts around this process, for good, what leaves it one file to read, and nothing to write.
    -> the path by which it finds the file from now on, and which of the layers are there."""
    active = dict.fromkeys(LAYERS, False)
    if sys.platform != "linux":
        return file, active

    # 1. namespaces: no network, and of the machine's files that one
    active["network_namespace"] = works(_unshare) or works(_unshare_as_user)
    if active["network_namespace"]:
        active["private_root"] = works(functools.partial(_change_root, lambda: _show_one(file)))
    if active["private_root"]:
        file = ONE_FILE

    # 2. who we are
    if os.geteuid() == 0:
        active["own_user"] = works(functools.partial(_become_reader_of, file))

    # 3. what the kernel does for us
    active["no_capabilities"] = works(_give_up_capabilities)
    hide_memory()
    active["no_new_privileges"] = works(_give_up_privileges)
    active["seccomp"] = works(functools.partial(refuse_calls, False, only_reads=True))
    return file, active


def confine_forks(needed: list[str]) -> dict[str, bool]:
    """Puts around this process and its forks, for good, what they can do without who only compute:
    the network, privileges, and our own user, where another one may read the files `needed`.
    -> which of the layers are there. A fork then calls refuse_to_act()."""
    active = dict.fromkeys(LAYERS, False)
    if sys.platform != "linux":
        return active
    active["network_namespace"] = works(_unshare) or works(_unshare_as_user)
    if os.geteuid() == 0:
        active["own_user"] = works(functools.partial(_become_reader_of_all, needed))
    active["no_capabilities"] = works(_give_up_capabilities)
    hide_memory()
    active["no_new_privileges"] = works(_give_up_privileges)
    active["seccomp"] = _can_refuse()
    return active


def _can_refuse() -> bool:
    """Says whether refuse_to_act() will work, by trying in a fork."""
    pid = os.fork()
    if pid == 0:
        is_refused = works(functools.partial(refuse_calls, False, only_reads=True))
        os._exit(0 if is_refused else 1)
    return os.waitpid(pid, 0)[1] == 0


def refuse_to_act() -> None:
    """Confines this process, from now on, to computing and reading: it writes no file, starts no
    process, and reaches no other. Does nothing where there is no seccomp."""
    if sys.platform == "linux":
        works(functools.partial(refuse_calls, False, only_reads=True))


def _become_reader_of_all(files):
    """Gives up root for a user who has nothing on this machine. OSError where that one may not read
    all of the files."""
    os.setgroups([])
    os.setegid(FIRST_UID)
    os.seteuid(FIRST_UID)  # for now: it can be taken back
    may_read = all(os.access(file, os.R_OK, effective_ids=True) for file in files)
    os.seteuid(0)
    os.setegid(0)
    if not may_read:
        raise OSError("another user may not read them")
    os.setresgid(FIRST_UID, FIRST_UID, FIRST_UID)
    os.setresuid(FIRST_UID, FIRST_UID, FIRST_UID)


def _give_up_capabilities():
    _syscall("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))


def _give_up_privileges():
    libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


ONE_FILE = "/file"  # where it is shown


def _show_one(file):
    _bind(file, f"/proc{ONE_FILE}")
    for path in ("/dev/urandom", "/etc/localtime", "/usr/share/zoneinfo"):
        _bind(path, f"/proc{path}")


def _become_reader_of(file):
    """Gives up root for a user who has nothing on this machine, if that one may read the file, else
    for its owner. Raises OSError where that is root, or nobody: a container may forbid it."""
    owner = os.stat(file)
    for uid, gid in ((FIRST_UID, FIRST_UID), (owner.st_uid, owner.st_gid)):
        os.setgroups([])
        os.setegid(gid)
        os.seteuid(uid)  # for now: it can be taken back
        may_read = os.access(file, os.R_OK, effective_ids=True)
        os.seteuid(0)
        os.setegid(0)
        if may_read:
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            if uid != 0:
                return
    raise OSError("only root may read it")


# -- elsewhere


def confine_portably(
    scratch: str, is_session: bool = False, cpu: int = CPU_SECONDS
) -> dict[str, bool]:
    """Confines this process with what every Unix has. -> the layers, as layers() gives them."""
    os.chdir(scratch)
    active = dict.fromkeys(LAYERS, False)
    for name, arguments in limits_of(0, is_session, cpu).items():
        active[name] = works(functools.partial(limit, *arguments))  # macOS refuses some

    def no_new_process():  # the user's own processes count too, so only zero makes sense
        limit(resource.RLIMIT_NPROC, 0)
        try:
            pid = os.fork()
        except BlockingIOError:
            return
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        raise OSError("it does not hold root")

    active["limit_processes"] = works(no_new_process)
    return active

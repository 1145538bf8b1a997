"""What is put around a process that runs code which a model wrote: the layers of sandbox.py.

Here is how each layer is made; sandbox.py says what they cover, what they do not, and uses them.
But for the constants it is used in the sandbox's own processes, never in the trainer.

seccomp: a filter of our own, as a library gives none here: pyseccomp is a wrapper from 2021 around
the system's libseccomp, which is not everywhere, for the dozen lines of seccomp_filter().
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
MEMORY = 512 * 2**20  # bytes of address space, per process, beside what the server has loaded
PROCESSES = 16  # processes and threads at once, per call
FILE_SIZE = 16 * 2**20  # bytes, per file
SCRATCH_SIZE = 64 * 2**20  # bytes, of all files of a call, with private_root
OPEN_FILES = 64  # per process
FIRST_UID = 61184  # with own_user; 61184..65519 is the range that systemd keeps for such users
UIDS = 1445  # for each of three servers; more than the calls that one can have at once

LAYERS = (
    "network_namespace private_root pid_namespace own_user user_namespace no_capabilities "
    "no_new_privileges seccomp"
).split()

# System calls by number, (x86_64, aarch64); None: that machine has no such call.
NUMBERS = {
    "clone": (56, 220), "capset": (126, 91), "pivot_root": (155, 41), "mount_setattr": (442, 442),
    "prlimit64": (302, 261), "prctl": (157, 167),
}  # fmt: skip
REFUSED_FIRST = {"prctl": 1}  # by first argument: PR_SET_PDEATHSIG, which ends what we started
REFUSED = {
    "socket": (41, 198), "io_uring_setup": (425, 425), "ptrace": (101, 117), "bpf": (321, 280),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "unshare": (272, 97),
    "setns": (308, 268), "mount": (165, 40), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    # what these make outlives its maker, or is memory that no limit counts
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
}  # fmt: skip
REFUSED_WITHOUT_PID_NAMESPACE = {
    "fork": (57, None), "vfork": (58, None), "kill": (62, 129), "tkill": (200, 130),
    "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
}  # fmt: skip
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
# PyDLL, not CDLL: it keeps the GIL, which nobody could hand back in the child of clone()
LIBC = ctypes.PyDLL(None, use_errno=True)


def libc(name, *args):
    args = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result = getattr(LIBC, name)(*args)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _syscall(name, *args):
    if os.uname().machine not in MACHINES:
        raise OSError(f"{name}: its number on {os.uname().machine} is not known here")
    return libc("syscall", NUMBERS[name][MACHINES[os.uname().machine][0]], *args)


def works(step):
    try:
        step()
    except (OSError, ValueError):  # ValueError: setrlimit(), of a limit that macOS refuses
        return False
    return True


def limit(kind, soft, hard=None):
    most = resource.getrlimit(kind)[1]
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard or soft, most)
    resource.setrlimit(kind, (soft, hard or soft))


def limits_of(loaded, session, cpu):
    """name -> arguments of limit(). `loaded`: the bytes that the server has mapped already. `cpu`:
    seconds."""
    return {
        "limit_cpu": (resource.RLIMIT_CPU, cpu, session and max(cpu, SESSION_CPU_SECONDS)),
        "limit_memory": (resource.RLIMIT_AS, loaded + MEMORY),
        "limit_file_size": (resource.RLIMIT_FSIZE, FILE_SIZE),
        "limit_open_files": (resource.RLIMIT_NOFILE, OPEN_FILES),
        "limit_core_dumps": (resource.RLIMIT_CORE, 0),
    }


def renew_cpu_limit(cpu):
    """So many seconds more for this process, up to the hard limit of a session."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + cpu, hard)


def use_huge_pages(maps):
    """Half of what a fork costs is to copy, and then to drop, the list of the pages: of 4 KB, or of
    2 MB where the kernel can (Linux 6.1). maps: /proc/self/maps. -> bytes of address space"""
    huge, collapse = 2**21, 25
    mapped = 0
    for line in maps.splitlines():
        where, rights, _, _, _, *name = line.split()
        start, end = (int(address, 16) for address in where.split("-"))
        mapped += end - start
        start, end = -(-start // huge) * huge, end // huge * huge
        if "w" in rights and name in ([], ["[heap]"]) and start < end:
            works(lambda start=start, end=end: libc("madvise", start, end - start, collapse))
    return mapped


def allow_open_files(count):
    """To this process, up to its hard limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    soft = count if hard == resource.RLIM_INFINITY else min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def enter_namespaces(shown):
    """Once, for the server and so for all calls: a network namespace costs too much for each.
    `shown`: path on the machine -> path in the private root, beside what python itself needs."""
    flags = NEWNS | NEWNET | NEWIPC
    uid, gid = os.geteuid(), os.getegid()

    def as_user():
        libc("unshare", NEWUSER | flags)
        maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)

    inside = works(lambda: libc("unshare", flags)) or works(as_user)
    return {
        "network_namespace": inside,
        "private_root": inside and works(lambda: _enter_private_root(shown)),
    }


def _enter_private_root(shown):
    """A root of only what is needed, read-only. Built over /proc, which surely exists."""
    if sys.base_prefix.startswith("/tmp/"):
        raise OSError("python itself lies where the scratch directories will be mounted")
    # MS_REC | MS_PRIVATE: what follows is ours alone
    libc("mount", None, b"/", None, 0x44000, None)
    libc("mount", b"none", b"/proc", b"tmpfs", 0, b"size=1m,mode=755")
    try:
        libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]
        # Debian's numpy finds its BLAS by way of alternatives
        files = ["/etc/ld.so.cache", "/etc/alternatives", "/dev/null", "/dev/zero", "/dev/urandom"]
        here = [*libraries, *files, f"{sys.base_prefix}/lib", *sys.path]
        places = dict(zip(here, here, strict=True)) | shown
        for path, inside in sorted(places.items(), key=lambda place: place[1]):  # parents first
            inside = f"/proc{inside}"
            if not os.path.exists(path) or os.path.exists(inside):
                continue
            os.makedirs(inside if os.path.isdir(path) else os.path.dirname(inside), exist_ok=True)
            if not os.path.isdir(path):
                open(inside, "w").close()
            libc("mount", path.encode(), inside.encode(), None, 0x5000, None)  # MS_BIND | MS_REC
        # below python's library lie the packages of its own environment, if it is no venv
        for name in ("site-packages", "dist-packages"):
            for path in glob.glob(f"/proc{sys.base_prefix}/lib/python3*/{name}"):
                libc("mount", b"none", path.encode(), b"tmpfs", 0, b"size=4k")
        os.mkdir("/proc/tmp")
        read_only = struct.pack("=4Q", 0x1 | 0x2, 0, 0, 0)  # MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID
        _syscall("mount_setattr", -1, b"/proc", 0x8000, read_only, len(read_only))  # AT_RECURSIVE
        os.chdir("/proc")
        _syscall("pivot_root", b".", b".")  # the old root now lies over the new one
    except OSError:
        libc("umount2", b"/proc", 2)
        raise
    libc("umount2", b".", 2)  # MNT_DETACH
    os.chdir("/")


def clone(active):
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


def probe(active, limits):
    """Which layers a child can put around itself, tried in a child."""
    for pid_namespace in (True, False):
        trial = active | {"pid_namespace": pid_namespace}
        trial["private_root"] &= pid_namespace
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
        with open(reader, "rb") as found:
            return json.loads(found.read())


def apply_layers(active, uid, scratch, limits, probing=False):
    """Puts the layers in `active` around this process; with `probing`, finds out which."""
    os.setsid()
    if active["private_root"]:
        options = f"size={SCRATCH_SIZE},nr_inodes=4096,mode=777".encode()
        libc("mount", b"none", b"/tmp", b"tmpfs", 0x6, options)  # MS_NOSUID | MS_NODEV
    os.chdir(scratch)

    def own_user():
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        if probing:
            open(os.__file__).close()  # python's library may lie where only root can read

    def limit_processes():
        # Counted per user: as the trainer's own user the trainer's threads would count, and root's
        # are never counted.
        if not (active["own_user"] or active["user_namespace"]):
            raise OSError("only for a user of its own")
        limit(resource.RLIMIT_NPROC, PROCESSES)

    steps = {
        "own_user": own_user,
        # Without a uid map, and so with no way to make another one inside.
        "user_namespace": lambda: libc("unshare", NEWUSER),
        "no_capabilities": lambda: _syscall("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24)),
        **{name: functools.partial(limit, *args) for name, args in limits.items()},
        "limit_processes": limit_processes,
        "no_new_privileges": lambda: libc("prctl", 38, 1, 0, 0, 0),
        "seccomp": lambda: refuse_calls(active["pid_namespace"]),
    }
    for name, step in steps.items():
        if name == "seccomp":  # PR_SET_PDEATHSIG: die with the server. own_user would undo it,
            libc("prctl", 1, signal.SIGKILL, 0, 0, 0)  # and seccomp refuses it
        if probing:
            active[name] = works(step)
        elif active[name]:
            step()


@functools.cache  # made once, in the server
def seccomp_filter(pid_namespace):
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
        # its own limits (pid 0), not those of others; `load` again: clone's lines load its flags
        program += [(load, 0, 0, 0), (equal, 0, 3, NUMBERS["prlimit64"][column]), (load, 0, 0, 16)]
        program += [(equal, 1, 0, 0), (answer, 0, 0, eperm)]
    for name, first in REFUSED_FIRST.items():
        program += [(load, 0, 0, 0), (equal, 0, 3, NUMBERS[name][column]), (load, 0, 0, 16)]
        program += [(equal, 0, 1, first), (answer, 0, 0, eperm)]
    program += [(answer, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    return struct.pack("@HP", len(program), ctypes.addressof(code)), code


def refuse_calls(pid_namespace):
    if os.uname().machine not in MACHINES:
        raise OSError("no seccomp filter for this machine")
    libc("prctl", 22, 2, seccomp_filter(pid_namespace)[0], 0, 0)  # PR_SET_SECCOMP, ..._FILTER


def confine_portably(scratch, session=False, cpu=CPU_SECONDS):
    """What every Unix has. -> the layers, as layers() gives them."""
    os.chdir(scratch)
    active = dict.fromkeys(LAYERS, False)
    for name, args in limits_of(0, session, cpu).items():
        active[name] = works(functools.partial(limit, *args))  # macOS refuses some

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

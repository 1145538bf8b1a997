"""A corpus of hostile programs: each is held, answered, and leaves nothing behind.

    pytest tests/test_hostile.py        # about 30 s

They run in the modes of MODES too, each in a pytest of its own: with all layers, without namespaces
(Docker's default), as a plain user without them, and as on macOS. They run in batches, by the
python, bash and session tools, with 34 honest calls beside each batch. A program that needs
a layer which this system lacks is a skip with the layer's name. What is printed and what is refused
where layers are missing: tests/test_tool_python.py.
"""

import asyncio
import glob
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from until import PATIENCE, until

from tools import Tool, Toolbox
from tools.bash import bash
from tools.bash_session import bash_session
from tools.python import python
from tools.python_session import python_session
from tools.sandbox import caller as sandbox
from tools.sandbox import confine

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere the sandbox holds accidents, not malice"
)
BATCH = 10
ROOT_FOLDER = Path(__file__).parent.parent
MARK = f"hostile-{os.getpid()}"  # what programs name the files that they try to leave
SECRET = f"hunter2-{os.getpid()}"


@dataclass
class Program:
    code: str | tuple[str, ...]  # several: the calls of a session
    kind: str | None  # of error, of the last call; "any": not ours to say
    shown: str = ""  # what the last observation contains; "|" between alternatives
    deadline: float = PATIENCE  # seconds; short where the program will not end by itself
    layers: tuple[str, ...] = ()  # that it needs
    tool: str = "python"


# -- the corpus. PARENT, VICTIM: process ids of this test and of a child of it; PORT: where it
# listens; CANARY: a file of it; MARK: see above

NS, ROOT, PROC = ("pid_namespace",), ("private_root",), ("pid_namespace", "user_namespace")
LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
TRY = """
def attempt(work, *args):
    try:
        print('DONE', work(*args))
    except BaseException as error:
        print('refused', type(error).__name__)
"""

PROCESSES = {
    "infinite loop": Program("while True: pass", "timeout", "was stopped", 0.5),
    "endless sleep": Program("import time\ntime.sleep(1e6)", "timeout", "was stopped", 0.3),
    "ignores SIGTERM": Program(
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
        "timeout", deadline=0.5,
    ),
    "ignores every signal": Program(
        "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: time.sleep(1)", "timeout",
        deadline=0.5,
    ),
    "swallows every exception": Program(
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "timeout", deadline=0.5,
    ),
    "fork bomb": Program(
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "timeout", "", 0.7, PROC,
    ),
    "fork bomb of bash": Program(":(){ :|:& };:; sleep 60", "any", "", 0.7, PROC, "bash"),
    "fork bomb of a session": Program(
        ("1", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"),
        "timeout", "", 0.7, PROC, "python_session",
    ),
    "fork bomb that exits as it forks": Program(
        "import os\nwhile True:\n    try:\n        if os.fork(): os._exit(0)\n"
        "    except OSError: pass", "any", "", 0.7, PROC,
    ),
    "thread bomb": Program(
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, "
        "args=(60,)).start()",
        "exception", "can't start new thread", layers=PROC,
    ),
    "double fork and setsid": Program(
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        os.setsid(); time.sleep(60)\n    os._exit(0)\nprint('gone')", None, "gone",
        layers=NS,
    ),
    "daemon with closed descriptors": Program(
        "import os, time\nif os.fork() == 0:\n    os.setsid(); os.closerange(0, 99)\n"
        "    while True: time.sleep(1)\nprint('gone')", None, "gone", layers=NS,
    ),
    "daemon of bash": Program(
        "nohup setsid sleep 99 >/dev/null 2>&1 & disown; trap '' TERM HUP; echo gone",
        None, "gone", layers=NS, tool="bash",
    ),
    "child that keeps the output open": Program(
        "import subprocess, sys\nsubprocess.Popen([sys.executable or '/none', '-c', '1'])\n"
        "print(1)",
        "any", layers=NS,
    ),
    "bash waits for ever": Program("mkfifo f; cat f", "timeout", "", 0.5, NS, "bash"),
    "bash loops and ignores TERM": Program(
        "trap '' TERM INT HUP; while :; do :; done", "timeout", "", 0.5, NS, "bash",
    ),
    "stops itself": Program(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(60)",
        "timeout", deadline=0.5, layers=NS,
    ),
    "stops its child and waits for it": Program(
        "import os, signal\npid = os.fork()\nif pid == 0: os.kill(os.getpid(), signal.SIGSTOP)\n"
        "os.waitpid(pid, 0)", "timeout", deadline=0.5, layers=NS,
    ),
    "exec of another program": Program(
        "import os\nos.execv('/bin/sh', ['sh', '-c', 'cat /etc/passwd'])",
        "exception", "FileNotFoundError", layers=ROOT,
    ),
}  # fmt: skip

MEMORY = {
    "memory bomb": Program(
        "x = 'a' * 10**10", "exception", "MemoryError (the limit is 512 MB)",
        layers=("limit_memory",),
    ),
    "memory bomb in steps": Program(
        "x = []\nwhile True: x.append(bytearray(10**7))", "exception", "MemoryError",
        layers=("limit_memory",),
    ),
    "memory bomb of a session": Program(
        ("x = []", "while True: x.append(bytearray(10**7))", "del x; 6 * 7"), None, "42",
        layers=("limit_memory",), tool="python_session",
    ),
    "memory bomb of bash": Program(
        "x=$(head -c 900M /dev/zero | tr '\\0' x); echo ${#x}", "any", "", 5,
        (*NS, "limit_memory"), "bash",
    ),
    "memory by mmap": Program(
        "import mmap\nfor i in range(99): globals()[f'm{i}'] = mmap.mmap(-1, 2**27)",
        "exception", "Cannot allocate memory", layers=("limit_memory",),
    ),
    "memory in several processes": Program(
        "import os\nfor _ in range(6):\n    if os.fork() == 0:\n        try: bytearray(10**9)\n"
        "        except MemoryError: os._exit(7)\n        os._exit(0)\n"
        "print([os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(6)])",
        None, "[7, 7, 7, 7, 7, 7]", layers=(*NS, "limit_memory"),
    ),
    "memory that no process owns (memfd)": Program(
        "import os\nos.memfd_create('x')", "exception", "PermissionError", layers=("seccomp",),
    ),
    "memory that outlives its maker (System V)": Program(
        LIBC + "print(libc.shmget(0, 2**28, 0o1600), libc.msgget(0, 0o1600), libc.semget(0, 1, "
        "0o1600))",
        None, "-1 -1 -1", layers=("seccomp",),
    ),
    "numpy array of a terabyte": Program(
        "import numpy\nnumpy.ones(10**11)", "exception", "MemoryError|No module",
        layers=("limit_memory",),
    ),
    "compressed bomb": Program(
        "import zlib\nd = zlib.compressobj(1)\n"
        "b = b''.join(d.compress(bytes(10**7)) for _ in range(60))"
        " + d.flush()\nlen(zlib.decompress(b))", "exception", "MemoryError",
        layers=("limit_memory",),
    ),
    "raises its limits": Program(
        "import resource as r\nr.setrlimit(r.RLIMIT_AS, (2**40, 2**40))",
        "exception", "not allowed to raise maximum limit", layers=("limit_memory",),
    ),
    "a session raises its limits": Program(
        ("import resource as r", "r.setrlimit(r.RLIMIT_AS, (2**40, 2**40))"), "exception",
        "not allowed to raise maximum limit", layers=("limit_memory",), tool="python_session",
    ),
    "a session lifts its limit on CPU time": Program(
        ("import resource as r", "h = r.getrlimit(r.RLIMIT_CPU)[1]\n"
         "r.setrlimit(r.RLIMIT_CPU, (h, h + 1))"), "exception",
        "not allowed to raise maximum limit", layers=("limit_cpu",), tool="python_session",
    ),
    "huge power": Program("x = 9 ** 9 ** 9", "any", "", 0.7),
    "huge shift": Program("x = 1 << 10**11", "exception", "MemoryError", layers=("limit_memory",)),
    "huge int as text": Program("print(7 ** 10**5)", "exception", "ValueError: Exceeds the limit"),
    "huge power of sympy": Program(
        "import sympy\nprint(sympy.factorial(10**9))", "any", "", 1.0,
    ),
    "deep recursion": Program("def f(): f()\nf()", "exception", "RecursionError"),
    "deep recursion without a limit": Program(
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return [f(x)]\nf(1)", "any", "", 1.0,
    ),
    "deep recursion in C": Program(
        "x = []\nfor _ in range(10**6): x = [x]\nprint(repr(x))", "exception",
        "RecursionError|SIGSEGV",
    ),
    "deeply nested code": Program("(" * 5000 + ")" * 5000, "exception", "too many nested|Error"),
    "code that the compiler chokes on": Program("-" * 90_000 + "1", "any"),
    "regular expression without end": Program(
        "import re\nre.match('(a+)+$', 'a' * 60 + 'b')", "timeout", deadline=0.5,
    ),
}  # fmt: skip

OUTPUT = {
    "endless print": Program("while True: print('x' * 100)", "oversized", "1000000 bytes of out"),
    "floods stderr": Program(
        "import sys\nwhile True: sys.stderr.write('x' * 1000)", "oversized", "1000000 bytes of out",
    ),
    "floods past python": Program("import os\nwhile True: os.write(2, b'x' * 65536)", "oversized"),
    "floods from a child": Program(
        "import os\nos.fork()\nwhile True: os.write(1, b'x' * 65536)", "oversized", layers=NS,
    ),
    "floods from bash": Program("yes & yes >&2", "oversized", layers=NS, tool="bash"),
    "one endless line": Program("print('x' * 10**8)", "oversized", "1000000 bytes of output"),
    "a value with an endless repr": Program("[0] * 10**7", "oversized", "1000000 bytes of output"),
    "a repr that does not end": Program(
        "class A:\n    def __repr__(self):\n        while True: pass\nA()", "timeout", deadline=0.5,
    ),
    "an exception that cannot be shown": Program(
        "class E(Exception):\n    def __str__(self): raise self\nraise E", "exception",
        "E: <exception",
    ),
    "terminal codes and bytes that are no text": Program(
        "import os\nos.write(1, bytes(range(256)) + b'\\x1b[2J')", None, "\ufffd",
    ),
    "closes all descriptors and sleeps": Program(
        "import os, time\nos.closerange(0, 99)\ntime.sleep(60)", "timeout", deadline=0.5,
    ),
    "closes all descriptors and ends": Program("import os\nos.closerange(0, 99)", "any"),
    "replaces its streams": Program(
        "import sys\nclass S:\n    def write(self, x): return 0\n"
        "    def flush(self): raise OSError\n"
        "sys.stdout = sys.stderr = S()\nprint(1)", "exception",
    ),
    "hangs at exit": Program(
        "import atexit, time, threading\natexit.register(time.sleep, 60)\nclass D:\n"
        "    def __del__(self): time.sleep(60)\nd = D()\nprint('end')", None, "end",
    ),
    "breaks the interpreter's modules": Program(
        "import sys, builtins\nbuiltins.print = builtins.open = builtins.isinstance = None\n"
        "sys.modules.clear()\n1 / 0", "any",
    ),
    "segmentation fault": Program("import ctypes\nctypes.string_at(0)", "exception", "SIGSEGV"),
    "aborts": Program("import os\nos.abort()", "exception", "SIGABRT|SIGSEGV"),
    "exits behind python's back": Program("import os\nos._exit(101)", "exception"),
    "null bytes and half characters": Program("'\ud800'\0", "exception", "surrogates"),
    "a null byte for bash": Program("echo \0", "bad_arguments", "null byte", layers=NS,
    tool="bash"),
}  # fmt: skip

FILES = {
    "big file": Program(
        "open('f', 'wb').write(b'x' * 10**8)", "exception", "File too large",
        layers=("limit_file_size",),
    ),
    "sparse file": Program(
        "open('f', 'wb').truncate(2**40)", "exception", "File too large",
        layers=("limit_file_size",),
    ),
    "fills the disk": Program(
        "for i in range(10**6): open(str(i), 'wb').write(b'x' * 10**7)",
        "exception", "No space left", layers=ROOT,
    ),
    "fills the disk from bash": Program(
        "for i in $(seq 99); do head -c 15M /dev/zero > $i || exit 1; done", None, "No space left",
        layers=(*NS, *ROOT), tool="bash",
    ),
    "a million empty files": Program(
        "for i in range(10**6): open(str(i), 'w').close()", "exception", "No space left",
        layers=ROOT,
    ),
    "folders a thousand deep": Program(
        "import os\nfor _ in range(1000): os.mkdir('d'); os.chdir('d')\nprint('made')", None,
        "made",
    ),
    "unreadable folders and a link to /": Program(
        "import os\nos.makedirs('a/b/c')\nos.symlink('/', 'l')\n"
        "for d in ('a/b/c', 'a/b', 'a'): os.chmod(d, 0)\nprint('made')", None, "made",
    ),
    "many open files": Program(
        "x = [open('/dev/null') for _ in range(1000)]", "exception", "Too many open files",
        layers=("limit_open_files",),
    ),
    "writes outside scratch": Program(
        TRY + "import os\nfor d in ('/', '/usr/lib', '/packages', '/dev', '/etc', '/dev/shm', "
        "'/root',"
        " '/home', '/var/tmp', os.path.dirname(os.__file__)):\n"
        "    attempt(open, d + '/MARK', 'w')\n"
        "print('end')", None, "end", layers=ROOT,
    ),
    "writes outside scratch from bash": Program(
        "for d in / /usr /usr/bin /etc /dev/shm /packages /root /home; do (echo x > $d/MARK); "
        "done; "
        "rm -rf --no-preserve-root / 2>/dev/null; ls /usr/bin | wc -l", None, "Read-only|No such",
        layers=(*NS, *ROOT), tool="bash",
    ),
    "leaves a file in /tmp": Program(
        "open('/tmp/MARK', 'w').write('x')\nprint('written')", None, "written", layers=ROOT,
    ),
    "reads a file of the trainer": Program(
        TRY + "attempt(open, 'CANARY')\nattempt(open, 'CANARY', 'a')", None,
        "refused FileNotFoundError\nrefused FileNotFoundError", layers=ROOT,
    ),
    "reads it through a link": Program(
        "import os\nos.symlink('CANARY', 'l')\nprint(open('l').read())", "exception",
        "FileNotFoundError", layers=ROOT,
    ),
    "reads it by climbing": Program(
        "print(open('../' * 20 + 'CANARY'.lstrip('/')).read())", "exception", "FileNotFoundError",
        layers=ROOT,
    ),
    "deletes it from bash": Program(
        "rm -f CANARY; cat CANARY; ls -a $(dirname CANARY)", None, "No such file",
        layers=(*NS, *ROOT), tool="bash",
    ),
    "overwrites through a link": Program(
        "import os\nos.symlink(os.__file__, 'l')\nopen('l', 'w')", "exception",
        "Read-only|Permission",
        layers=ROOT,
    ),
    "hard link to the library": Program(
        "import os\nos.link(os.__file__, 'l')", "exception", "OSError|PermissionError", layers=ROOT,
    ),
    "moves its scratch directory away": Program(
        TRY + "import os\nattempt(os.rename, os.getcwd(), os.getcwd() + '-MARK')\nprint('end')",
        None, "end", layers=ROOT,
    ),
    "passwords and keys": Program(
        TRY + "import os\nfor f in ('/etc/passwd', '/etc/shadow', '/root/.ssh', '/home', "
        "'/proc/1/environ',"
        " '/proc/self/mem', '/sys/kernel', '/var/run'):\n    attempt(os.stat, f)\nprint('end')",
        None,
        "end", layers=ROOT,
    ),
    "leaves the root by chroot": Program(
        "import os\nos.mkdir('r')\nos.chroot('r')", "exception", "PermissionError",
        layers=("no_capabilities",),
    ),
    "makes a device": Program(
        "import os, stat\nos.mknod('d', stat.S_IFBLK | 0o666, os.makedev(254, 0))", "exception",
        "PermissionError", layers=("no_capabilities",),
    ),
    "mounts": Program(
        LIBC + "print(libc.mount(b'none', b'/tmp', b'proc', 0, None), ctypes.get_errno())", None,
        "-1 1", layers=("seccomp",),
    ),
    "makes the library writable": Program(
        LIBC + "print(libc.mount(None, b'/usr/lib', None, 0x1020, None), libc.umount2(b'/tmp', 2))",
        None, "-1 -1", layers=("seccomp",),
    ),
    "a program with the owner's rights": Program(
        "cp /bin/bash b; chmod 4777 b; ./b -p -c 'id -u; cat /etc/shadow'; su -c id; sudo -n id",
        None,
        "", layers=(*NS, *ROOT), tool="bash",
    ),
}  # fmt: skip

OTHERS = {
    "reads the trainer's environment": Program(
        "print(open('/proc/PARENT/environ').read())", "exception", "Error",
        layers=("private_root",),
    ),
    "looks for secrets in its own": Program(
        LIBC + "libc.secure_getenv.restype = ctypes.c_char_p\n"
        "print(libc.secure_getenv(b'HOSTILE_SECRET'), sorted(os.environ))", None, "None ['HOME'",
    ),
    "looks for secrets from bash": Program("env; set", None, "PATH=", layers=NS, tool="bash"),
    "reads the trainer's memory": Program(
        LIBC + "b = ctypes.create_string_buffer(8)\n"
        "v = (ctypes.c_void_p * 2)(ctypes.addressof(b), 8)\n"
        "print(libc.process_vm_readv(PARENT, v, 1, v, 1, 0), ctypes.get_errno())", None, "-1 1",
        layers=("seccomp",),
    ),
    "traces a process": Program(
        LIBC + "print(libc.ptrace(16, PARENT, 0, 0), ctypes.get_errno())", None, "-1 1",
        layers=("seccomp",),
    ),
    "kills the trainer": Program(
        TRY + "import os\nfor pid in (PARENT, VICTIM):\n    attempt(os.kill, pid, 9)",
        None, "refused ProcessLookupError\nrefused ProcessLookupError", layers=NS,
    ),
    "kills the trainer from bash": Program(
        "kill -9 PARENT VICTIM; echo $?", None, "No such process", layers=NS, tool="bash",
    ),
    "kills everything": Program(
        "import os, time\nif os.fork() == 0: time.sleep(60)\nos.kill(-1, 9)\nprint('alone')", None,
        "alone", layers=NS,
    ),
    "kills everything from bash": Program("kill -9 -1; echo alone", None, "alone", layers=NS,
    tool="bash"),
    "kills its process group": Program(
        "import os\nos.killpg(0, 9)\nprint('alone')", "any", layers=NS,
    ),
    "changes the trainer's limits": Program(
        "import resource as r\nr.prlimit(PARENT, r.RLIMIT_CPU, (1, 1))", "exception",
        "ProcessLookupError", layers=NS,
    ),
    "becomes root": Program(
        TRY + "import os\nattempt(os.setuid, 0)\nattempt(os.setgroups, [0])", None,
        "refused PermissionError|refused OSError", layers=("no_capabilities", "user_namespace"),
    ),
    "takes capabilities": Program(
        LIBC + "h = (ctypes.c_uint32 * 2)(0x20080522, 0); d = (ctypes.c_uint32 * 6)(*[2**32 - 1] "
        "* 6)\n"
        "print(libc.capset(h, d), ctypes.get_errno())", None, "-1 1", layers=("no_capabilities",),
    ),
    "makes namespaces": Program(
        LIBC + "print([libc.unshare(f) for f in (0x10000000, 0x20000, 0x40000000)])", None,
        "[-1, -1, -1]", layers=("seccomp",),
    ),
    "makes a user namespace by clone": Program(
        LIBC + "print(libc.syscall({'x86_64': 56}.get(os.uname().machine, 220), 0x10000011, 0, 0, "
        "0, 0))",
        None, "-1", layers=("user_namespace",),
    ),
    "calls the kernel's odd corners": Program(
        LIBC + "n = {'x86_64': (425, 321, 298, 250, 323)}.get(os.uname().machine, (425, 280, 241, "
        "219, 282))\n"
        "print([libc.syscall(i, 1, 0, 0, 0, 0) for i in n])", None, "[-1, -1, -1, -1, -1]",
        layers=("seccomp",),
    ),
    "connects to the trainer's machine": Program(
        "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)", "exception",
        "PermissionError", layers=("seccomp",),
    ),
    "connects from bash": Program(
        "echo hi > /dev/tcp/127.0.0.1/PORT", "any", "not permitted|No such file", layers=(*NS,
        "seccomp"),
        tool="bash",
    ),
    "connects without seccomp's help": Program(
        "import os\nprint(os.path.exists('/sys/class/net'), os.path.exists('/proc/net'))", None,
        "False False", layers=("network_namespace", "private_root"),
    ),
    "every kind of socket": Program(
        TRY + "import socket as s\nfor f in (s.AF_INET, s.AF_INET6, s.AF_UNIX, 16, 17, 38):\n"
        "    for t in (s.SOCK_STREAM, s.SOCK_DGRAM, s.SOCK_RAW): attempt(s.socket, f, t)\n"
        "print('end')",
        None, "end", layers=("seccomp",),
    ),
    "looks up a name": Program(
        "import socket\nsocket.getaddrinfo('localhost.example', 80)", "exception", "gaierror",
        layers=("seccomp",),
    ),
}  # fmt: skip

# C2: one call, or one trajectory, reaches another
PAIR = TRY + "import socket as s\na, b = s.socketpair(s.AF_UNIX, s.SOCK_DGRAM)\n"
SECCOMP = ("seccomp",)
REACHES = {
    "names a datagram socket": Program(
        PAIR + "attempt(a.bind, '\\0MARK')\nattempt(b.bind, 'file')\nprint('end')", None,
        "refused PermissionError\nrefused PermissionError\nend", layers=SECCOMP,
    ),
    "asks for a name": Program(
        PAIR + "attempt(a.bind, b'')\nattempt(a.listen)\nprint('end')", None,
        "refused PermissionError\nrefused PermissionError\nend", layers=SECCOMP,
    ),
    "connects a pair to another name": Program(
        PAIR + "attempt(a.connect, '\\0MARK')\nprint('end')", None,
        "refused PermissionError\nend", layers=SECCOMP,
    ),
    "undoes the connection of a pair (AF_UNSPEC)": Program(
        PAIR + LIBC + "print(libc.connect(a.fileno(), bytes(16), 16), ctypes.get_errno())", None,
        "-1 1", layers=SECCOMP,
    ),
    "sends to a name": Program(
        PAIR + "attempt(a.sendto, b'x', '\\0MARK')\nprint('end')", None,
        "refused PermissionError\nend", layers=SECCOMP,
    ),
    "sends a message to a name": Program(
        PAIR + "attempt(a.sendmsg, [b'x'], [], 0, '\\0MARK')\nprint('end')", None,
        "refused PermissionError\nend", layers=SECCOMP,
    ),
    "sends many messages": Program(
        PAIR + LIBC + "print(libc.sendmmsg(a.fileno(), bytes(64), 1, 0), ctypes.get_errno())",
        None, "-1 1", layers=SECCOMP,
    ),
    "passes a descriptor of its scratch": Program(
        PAIR + "f = open('f', 'w')\nattempt(s.send_fds, a, [b'x'], [f.fileno()])\nprint('end')",
        None, "refused PermissionError\nend", layers=SECCOMP,
    ),
    "a session keeps the scratch of others": Program(
        ("x = 1", PAIR + "attempt(s.send_fds, a, [b'x'], [0])\nattempt(b.bind, '\\0MARK')"), None,
        "refused PermissionError\nrefused PermissionError", layers=SECCOMP, tool="python_session",
    ),
    "signals by a lock on the library": Program(
        TRY + "import fcntl, os, struct\nf = open(os.__file__)\n"
        "attempt(fcntl.flock, f, fcntl.LOCK_EX)\n"
        "lock = struct.pack('hhqqi', fcntl.F_WRLCK, 0, 0, 0, 0)\n"
        "attempt(fcntl.fcntl, f, fcntl.F_GETLK, lock)\nattempt(fcntl.fcntl, f, 36, lock)",
        None, "\n".join(["refused PermissionError"] * 3), layers=SECCOMP,
    ),
    "signals by a lease or a notice": Program(
        TRY + "import fcntl, os\nf = open(os.__file__)\nd = os.open('/', os.O_RDONLY)\n"
        "attempt(fcntl.fcntl, f, fcntl.F_SETLEASE, fcntl.F_RDLCK)\n"
        "attempt(fcntl.fcntl, f, fcntl.F_GETLEASE)\n"
        "attempt(fcntl.fcntl, d, fcntl.F_NOTIFY, fcntl.DN_ACCESS)",
        None, "\n".join(["refused PermissionError"] * 3), layers=SECCOMP,
    ),
    "watches who opens the library": Program(
        LIBC + "print(libc.inotify_init1(0), libc.inotify_init(), libc.fanotify_init(0, 0))", None,
        "-1 -1 -1", layers=SECCOMP,
    ),
    "signals by a lock from bash": Program(
        "exec 9</bin/sh; flock -n 9 && echo DONE; echo end", None, "end",
        layers=(*NS, *SECCOMP), tool="bash",
    ),
    "takes a descriptor of another process": Program(
        LIBC + "print(libc.syscall(434, PARENT, 0), libc.syscall(438, 3, 0, 0))", None, "-1 -1",
        layers=SECCOMP,
    ),
    "takes a descriptor of its own parent": Program(
        TRY + "import os\nattempt(os.pidfd_open, os.getppid() or 1)", None,
        "refused PermissionError", layers=SECCOMP,
    ),
}  # fmt: skip

FAKE = "b'{\"exit\": 0}'"
WRITE_ALL = (
    "import os\nfor fd in range(3, 64):\n    try: os.write(fd, "
    + FAKE
    + ")\n    except OSError: pass\n"
)
SESSIONS = {
    "prints the reply's words": Program(
        ("print(" + FAKE + ".decode())", "6 * 7"), None, "42", tool="python_session",
    ),
    "writes a reply of its own": Program(
        ("x = 5\n" + WRITE_ALL, "import time\ntime.sleep(0.2)\nprint('second')", "6 * 7"), "any",
        "42|a new session", tool="python_session",
    ),
    "writes many replies, all wrong": Program(
        ("import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'[' * 3000)\n"
         "    except OSError: pass",
         "6 * 7"), None, "42", tool="python_session",
    ),
    "writes replies for ever in a thread": Program(
        ("import threading\ndef f():\n    while True:\n        exec(" + repr(WRITE_ALL) + ")\n"
         "threading.Thread(target=f, daemon=True).start()", "print('second')", "6 * 7"), "any", "",
         2.0,
        tool="python_session",
    ),
    "steals the next request": Program(
        ("import os, threading\ndef f():\n    while True:\n        for fd in range(3, 64):\n"
         "            try: os.set_blocking(fd, False); os.read(fd, 9)\n"
         "            except OSError: pass\n"
         "threading.Thread(target=f, daemon=True).start()", "1", "2", "6 * 7"), "any", "", 1.0,
        tool="python_session",
    ),
    "a fork that comes back": Program(
        ("import os\nx = 1 if os.fork() else 2\nprint(x)", "x", "x + 41"), None, "42", layers=NS,
        tool="python_session",
    ),
    "a fork that says it is its parent": Program(
        ("import os\npid = os.getpid()\nos.getpid = lambda: pid\nos.fork()\nx = 1", "x", "x + 41"),
        "any", "", 2.0, NS, "python_session",
    ),
    "a child that keeps writing": Program(
        ("import os, time\nif os.fork() == 0:\n    while True:\n"
         "        try: print('noise', flush=True)\n"
         "        except OSError: pass\n        time.sleep(0.01)\nprint('first')", "6 * 7"), None,
         "42",
        layers=NS, tool="python_session",
    ),
    "a child that floods": Program(
        ("import os\nif os.fork() == 0:\n    while True:\n        try: os.write(1, b'x' * 65536)\n"
         "        except OSError: pass", "6 * 7"), None, "42", layers=NS, tool="python_session",
    ),
    "a thread that floods": Program(
        ("import threading\ndef f():\n    while True: print('x' * 1000)\n"
         "threading.Thread(target=f, daemon=True).start()", "6 * 7"), "any", "", 2.0,
        tool="python_session",
    ),
    "ends its session": Program(
        ("x = 1", "import os\nos._exit(0)", "x"), "exception", "(a new session: ",
        tool="python_session",
    ),
    "a thread that ends it between calls": Program(
        ("import os, threading\nthreading.Timer(0.1, os._exit, (3,)).start()",
        "import time\ntime.sleep(1)",
         "6 * 7"), None, "42", tool="python_session",
    ),
    "an alarm between calls": Program(
        ("import signal\ndef f(*_): raise KeyboardInterrupt\nsignal.signal(signal.SIGALRM, f)\n"
         "signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)", "1", "2", "6 * 7"), "any", "", 2.0,
        tool="python_session",
    ),
    "closes all descriptors": Program(
        ("import os\nos.closerange(0, 99)", "6 * 7"), None, "(a new session: ",
        tool="python_session",
    ),
    "closes its output alone": Program(
        ("import os\nos.close(1); os.close(2)", "6 * 7"), None, "42", tool="python_session",
    ),
    "a session without its streams": Program(
        ("import sys\nsys.stdout.close()\nsys.stdout = sys.stdin = None", "6 * 7"), None, "42",
        tool="python_session",
    ),
    "a session without its builtins": Program(
        ("import builtins\nvars(builtins).clear()", "6 * 7", "6 * 7"), "any", "",
        tool="python_session",
    ),
    "hangs, and the state is lost": Program(
        ("x = 1", "while True: pass", "x"), "exception", "(a new session: ", 3.0,
        tool="python_session",
    ),
    "a limit that later calls would feel": Program(
        ("import resource as r\nr.setrlimit(r.RLIMIT_CPU, (1, 1))\n"
         "r.setrlimit(r.RLIMIT_NOFILE, (9, 9))",
         "6 * 7"), "any", tool="python_session",
    ),
}  # fmt: skip
# (calls of one trajectory, of which the last is looked at)
SHELL_SESSIONS = {
    "a shell forks for ever": Program(
        ("x=1", ":(){ :|:& };:; sleep 60", "echo $((6 * 7))"), "any", "42", 1.0, PROC,
        "bash_session",
    ),
    "a shell's background forks for ever": Program(
        (":(){ :|:& };: &", "echo $((6 * 7))"), "any", "", 2.0, PROC, "bash_session",
    ),
    "a shell that ignores every signal": Program(
        ("trap '' $(seq 1 64)", "while :; do :; done", "echo $((6 * 7))"), None, "42", 1.0, NS,
        "bash_session",
    ),
    "a shell that kills what holds it": Program(
        ("kill -9 1 $PPID; kill -9 -1; echo on", "echo $((6 * 7))"), None, "42", layers=NS,
        tool="bash_session",
    ),
    "a shell that stops itself": Program(
        ("kill -STOP $$", "echo $((6 * 7))"), None, "42", 1.0, NS, "bash_session",
    ),
    "a shell without its builtins": Program(
        ("builtin() { :; }; printf() { :; }; read() { :; }; eval() { :; }", "echo 1",
         "echo $((6 * 7))"), "any", "", 1.0, NS, "bash_session",
    ),
    "a false end of a command": Program(
        ("for fd in $(seq 3 255); do eval \"echo 0 >&$fd\" 2> /dev/null; done; sleep 0.2; echo 1",
         "echo $((6 * 7))"), None, "42", layers=NS, tool="bash_session",
    ),
    "a child of a shell that floods": Program(
        ("yes & yes >&2 &", "sleep 0.3; kill %1 %2; echo on", "echo $((6 * 7))"), "any", "", 5.0,
        NS, "bash_session",
    ),
    "a shell that reads what is not its": Program(
        ("cd / && cat CANARY; env; set", "cat CANARY; ls /proc /root /home"), None, "No such file",
        layers=(*NS, *ROOT), tool="bash_session",
    ),
    "a shell that asks the network": Program(
        ("exec 3<>/dev/tcp/127.0.0.1/PORT", "(echo x > /dev/tcp/127.0.0.1/PORT) 2>&1"), None,
        "ermission denied|unreachable|refused|not permitted",
        layers=NS, tool="bash_session",
    ),
    "a shell that leaves files": Program(
        ("echo x > /tmp/MARK; echo x > /dev/shm/MARK", "ls /tmp"), None, "hostile-",
        layers=(*NS, *ROOT), tool="bash_session",
    ),
    "a shell that leaves processes": Program(
        ("(setsid nohup sleep 600 > /dev/null 2>&1 &) ; disown -a", "echo $((6 * 7))"), None, "42",
        layers=NS, tool="bash_session",
    ),
    "a shell that raises its limits": Program(
        ("ulimit -v unlimited", "ulimit -u 9999", "ulimit -t unlimited; echo $?"), None, "1",
        layers=(*NS, "limit_memory"), tool="bash_session",
    ),
    "a shell that eats memory": Program(
        ("x=$(head -c 900000000 /dev/zero | tr '\\0' x); echo ${#x}", "echo $((6 * 7))"), "any",
        "42", 20.0, (*NS, "limit_memory"), "bash_session",
    ),
    "a shell that fills its disk": Program(
        ("for i in $(seq 20); do head -c 16000000 /dev/zero > f$i || break; done",
         "echo $((6 * 7))"), None, "42", layers=(*NS, *ROOT), tool="bash_session",
    ),
}  # fmt: skip
MODE = os.environ.get("HOSTILE_MODE", "")
CORPUS = PROCESSES | MEMORY | OUTPUT | FILES | OTHERS | REACHES | SESSIONS | SHELL_SESSIONS

if MODE:  # not all again: what reaches outside
    CORPUS = OTHERS | REACHES | SESSIONS | SHELL_SESSIONS
if MODE == "macos":
    sandbox.has_fork_server = lambda: False

HONEST = (  # tool, code, observation
    *[("python", f"print({i} * 7)", str(i * 7)) for i in range(18)],
    *[("python", f"open('f', 'w').write('{i}')\nopen('f').read()", f"'{i}'") for i in range(4)],
    ("python", "import numpy\nprint(numpy.arange(5).sum())", "10"),
    ("python", "import sympy\nprint(sympy.factorint(91))", "{7: 1, 13: 1}"),
    *[("python_session", f"x = {i}\nx + 1", str(i + 1)) for i in range(4)],
    *[("bash", f"echo {i} | tr 0-9 a-j", "abcd"[i]) for i in range(4)],
    *[("bash_session", f"x={i}; echo $((x * 7))", str(i * 7)) for i in range(2)],
)  # fmt: skip


# -- running it


def box_of(tool, deadline):
    """A Toolbox of that tool, without the seconds that transformers takes to make its schema."""
    word = "command" if tool.startswith("bash") else "code"
    parameters = {"properties": {word: {"type": "string"}}, "required": [word]}
    made = {
        "python": lambda schema: Tool("python", schema, python, True),
        "bash": lambda schema: Tool("bash", schema, bash().__call__, True),
        "bash_session": lambda schema: Tool(
            "bash_session", schema, bash_session.__call__, True, lambda _: bash_session()
        ),
        "python_session": lambda schema: Tool(
            "python_session", schema, python_session.__call__, True, lambda _: python_session()
        ),
    }[tool]({"function": {"parameters": parameters}})
    return Toolbox([made], concurrency=64, timeout=deadline, cache="none"), word


async def calls(tool, codes, deadline):
    """-> (observation, error kind) of each call, of one trajectory."""
    box, word = box_of(tool, deadline)
    session = box.open()
    results = []
    for code in codes:
        text, error, _ = await session.call(tool, {word: code})
        results.append((text, error))
        if error == "timeout":
            box.tools[
                tool
            ].timeout = PATIENCE  # the one that hangs has been stopped: those after it end
    await session.close()
    assert not box.leaked and not box.errors["close"]
    return results


@dataclass
class World:
    """What hostile programs aim at, and what came of it."""

    victim: subprocess.Popen
    canary: Path
    results: dict  # name -> results of calls()
    honest: list  # (expected, results)
    connections: list


def lacking(program):
    layers = sandbox.layers("shell" if program.tool.startswith("bash") else "light")
    return [layer for layer in program.layers if not layers[layer]]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Runs everything once; the tests look at what happened."""
    if sandbox.layers("shell")["pid_namespace"]:
        tools = ("python", "python_session", "bash", "bash_session")
    else:
        tools = ("python", "python_session")
    canary = tmp_path_factory.mktemp("trainer") / "canary"
    canary.write_text(SECRET)
    os.environ["HOSTILE_SECRET"] = SECRET
    listener = socket.create_server(("127.0.0.1", 0))
    world = World(subprocess.Popen(["sleep", "600"]), canary, {}, [], [])

    def accept():
        while True:
            try:
                world.connections.append(listener.accept())
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    words = {"PARENT": os.getpid(), "VICTIM": world.victim.pid, "MARK": MARK, "CANARY": canary}
    words["PORT"] = listener.getsockname()[1]

    def filled(program):
        codes = program.code if isinstance(program.code, tuple) else (program.code,)
        for word, value in words.items():
            codes = [code.replace(word, str(value)) for code in codes]
        return codes

    async def batch(names):
        async def hostile(name):
            program = CORPUS[name]
            work = calls(program.tool, filled(program), program.deadline)
            # none is waited for longer than its deadline, but by a machine that is busy
            time_for_all = len(filled(program)) * program.deadline + 2 * PATIENCE
            world.results[name] = await asyncio.wait_for(work, time_for_all)

        async def honest(tool, code, expected):
            await asyncio.sleep(0.05)  # the hostile ones have begun
            world.honest.append((expected, await calls(tool, [code], PATIENCE)))

        works = [hostile(name) for name in names]
        works += [honest(*each) for each in HONEST if each[0] in tools]
        await asyncio.gather(*works)

    names = [name for name, program in CORPUS.items() if not lacking(program)]
    batches = -(-len(names) // BATCH)
    for i in range(batches):
        asyncio.run(batch(names[i::batches]))  # kinds mixed
    yield world
    os.environ.pop("HOSTILE_SECRET")
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    world.victim.kill()
    world.victim.wait()


def descriptors(pid):
    """0 of a process that hides them from its own user, as servers do in one mode (C3)."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except PermissionError:
        assert os.geteuid() != 0
        return 0


def children(pid):
    text = "".join(Path(path).read_text() for path in glob.glob(f"/proc/{pid}/task/*/children"))
    return text.split()


def are_idle(pids):
    return not any(children(pid) for pid in pids.values())


def fewest_descriptors(pids, pid):
    """Of a server that is idle: it closes the last ones after the end of what they were for."""
    assert until(lambda: are_idle(pids))
    counts = [descriptors(pid)]
    assert until(lambda: counts.append(descriptors(pid)) or counts[-20:] == [counts[-1]] * 20)
    return counts[-1]


@pytest.fixture(scope="module", autouse=True)
def before():
    """Descriptors of this process and of the servers, all started and idle."""
    warm = [("python", "1"), ("python", "import numpy"), ("python_session", "1")]
    if sandbox.layers("shell")["pid_namespace"]:
        warm.append(("bash", "true"))
    for tool, code in warm:
        asyncio.run(calls(tool, [code], PATIENCE))
    pids = {name: server.process.pid for name, server in sandbox._servers.items()}
    counts = {name: fewest_descriptors(pids, pid) for name, pid in pids.items()}
    return pids, counts, descriptors(os.getpid())


@pytest.mark.parametrize("name", CORPUS)
def test_hostile_program_is_held_and_answered(world, name):
    """Pitfall 39."""
    program = CORPUS[name]
    if lacking(program):
        pytest.skip(f"this system does not allow the layer {', '.join(lacking(program))}")
    text, error = world.results[name][-1]
    assert text and len(text) < sandbox.SHOWN + 500
    assert any(shown in text for shown in program.shown.split("|")), text[-2000:]
    assert program.kind in ("any", error), (error, text[-2000:])
    assert SECRET not in text and "DONE" not in text


def test_there_are_at_least_sixty_kinds():
    if MODE:
        pytest.skip("a part of them")
    assert len(CORPUS) >= 60 and len(HONEST) == 34
    kinds = (PROCESSES, MEMORY, OUTPUT, FILES, OTHERS, REACHES, SESSIONS, SHELL_SESSIONS)
    assert sum(map(len, kinds)) == len(CORPUS)
    assert {layer for p in CORPUS.values() for layer in p.layers} <= set(sandbox.layers())


def test_honest_calls_beside_them_are_unharmed(world):
    assert len(world.honest) >= 28 * len(world.results) // BATCH
    wrong = [(expected, got) for expected, got in world.honest if got[0] != (expected, None)]
    assert not wrong


def test_nothing_of_them_is_left(world, before):
    """No process, file, descriptor; the servers are the same as before."""
    pids, counts, ours = before
    assert until(lambda: are_idle(pids))
    now = {name: server.process.pid for name, server in sandbox._servers.items()}
    assert now == pids, "a server has died"
    for name, pid in pids.items():
        assert until(lambda pid=pid, name=name: descriptors(pid) == counts[name]), name
    assert until(lambda: descriptors(os.getpid()) <= ours + 1)  # the listener
    places = (
        tempfile.gettempdir(),
        "/tmp",
        "/dev/shm",
        "/var/tmp",
        "/",
        "/usr/lib",
        "/root",
        "/etc",
    )
    places += (os.path.dirname(os.__file__), os.path.dirname(sandbox.__file__), os.getcwd())
    for place in places:
        assert not glob.glob(f"{place}/*{MARK}*")
    for pid in pids.values():
        assert not glob.glob(f"{tempfile.gettempdir()}/nanotool-{pid}-*")


def test_what_they_aimed_at_is_untouched(world):
    assert world.victim.poll() is None and not world.connections
    assert world.canary.read_text() == SECRET


# -- C3: the other modes

WITHOUT_NAMESPACES = """
import os, sys
from tools.sandbox import confine
uid = int(sys.argv[1])
if uid:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
if os.geteuid() == 0:
    confine.libc("prctl", 24, 21, 0, 0, 0)  # CAP_SYS_ADMIN, for good
namespaces = ("unshare", "setns", "mount")  # the others are the sandbox's own to refuse
for name in set(confine.REFUSED) - set(namespaces):
    del confine.REFUSED[name]
confine.REFUSED_FIRST.clear()
confine.REFUSED_FCNTL.clear()
confine.libc("prctl", confine.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
confine.refuse_calls(True)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
USER = 61000  # a user who has nothing on this machine
MODES = {"docker": 0, "user": USER, "macos": 0}


@pytest.mark.skipif(MODE != "", reason="we are inside")
@pytest.mark.parametrize("mode", MODES)
def test_what_a_mode_can_hold_is_held_there_too(mode, tmp_path, request):
    """C3: a program that needs a layer which the mode lacks is a skip with the layer's name; that
    line, or a refusal, is what a user of the mode reads."""
    if mode != "macos" and not sandbox.layers()["seccomp"]:
        pytest.skip("no mode can be made without seccomp")
    uid = MODES[mode]
    if uid and os.geteuid() != 0:
        uid = 0  # we are a plain user already
    if uid:  # pytest's own folders are closed to other users
        tmp_path = Path(tempfile.mkdtemp(prefix="hostile-mode-"))
        request.addfinalizer(lambda: shutil.rmtree(tmp_path, ignore_errors=True))
        os.chown(tmp_path, uid, uid)
    argv = ["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/base"]
    argv.append(__file__)
    if mode != "macos":
        argv = ["-c", WITHOUT_NAMESPACES, str(uid), *argv]
    env = os.environ | {"HOSTILE_MODE": mode, "HOME": str(tmp_path)}
    program = sys.executable
    if uid:
        program = python_of_all_users(uid, env)
        if not program:
            pytest.skip("another user can run no python that has what this one has")
    done = subprocess.run(
        [program, *argv], cwd=ROOT_FOLDER, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    print(f"{mode}: {done.stdout.splitlines()[-1]}")
    assert " passed" in done.stdout


def python_of_all_users(uid, env):
    """A python of this version which that user can run, this one or the system's, with the packages
    of this one; "" if there is none. Sets the path of the packages in env."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = [path for path in sys.path if path.endswith("site-packages")]
    become = f"import os, sys; os.setuid({uid}); os.execv(sys.argv[1], sys.argv[1:])"
    for program in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        if not os.path.exists(program):
            continue
        wanted = {}
        if program != sys.executable:
            wanted["PYTHONPATH"] = os.pathsep.join(packages)
        imports = [program, "-c", "import pytest, numpy, sympy, tools.python"]
        tried = subprocess.run(
            [sys.executable, "-c", become, *imports], cwd=ROOT_FOLDER, env=env | wanted
        )
        if tried.returncode == 0:
            env.update(wanted)
            return program
    return ""


def test_a_mode_is_what_it_says():
    """C3."""
    here = sandbox.layers()
    if MODE in ("docker", "user"):
        assert not here["pid_namespace"] and not here["network_namespace"] and here["seccomp"]
    if MODE == "user":
        assert os.geteuid() != 0 and not here["own_user"]
    if MODE == "macos":
        assert not any(here[layer] for layer in confine.LAYERS)

"""The python tool: runs code that the model wrote, each call in a fresh, confined process.

    text = await python("print(6 * 7)")  # in a notebook; a rollout goes through tools.Toolbox
    print(layers())  # which of sandbox.py's layers this system lets us put around the code

A new python per call costs 40 ms of CPU, a fork a few; so on Linux this file and sandbox.py run
once more, as a fork server. Elsewhere (macOS) there is none: each call is a python of its own, and
much less is put around it. sandbox.py says what is covered, what is not, and has the limits.

Hashes and `random` start from the same seed in each call, so that a resumed run sees the same.
"""

import ast
import gc
import importlib
import json
import linecache
import os
import random
import signal
import socket
import struct
import sys
import threading
import traceback
import types

if sys.platform == "win32":
    from config import UserError

    raise UserError("the python tool needs Linux or macOS: on Windows run nanotool in WSL")

if __package__:
    from tools import sandbox
else:  # in the process that _popen() starts, with the folder of this file alone
    import sandbox

WALL_SECONDS = 60.0  # for callers without a deadline; a Toolbox's `timeout` is shorter
CODE_SIZE = 100_000  # bytes of code
OUTPUT_SIZE = 1_000_000  # bytes; code that writes more is killed
SHOWN = 20_000  # characters of output that are returned: head and tail, the cut marked
PRELOADED = (  # what models import most: paid once by the fork server, not in every call
    "bisect cmath collections datetime decimal fractions functools heapq itertools math operator "
    "re statistics string time"
)
NO_OUTPUT = "(no output: use print(...) to see a value)"

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
        raise RuntimeError("the sandbox died twice during the call")

    text = output.decode("utf-8", "replace").rstrip("\n")
    if len(text) > SHOWN:
        dropped, half = len(text) - SHOWN, SHOWN // 2
        text = f"{text[:half]}\n[... {dropped} characters cut ...]\n{text[-half:]}"
    if reply is None:
        raise ToolError("oversized", f"{text}\n(killed: more than {OUTPUT_SIZE} bytes of output)")
    if "broken" in reply:
        raise RuntimeError(f"the sandbox could not start a process: {reply['broken']}")
    status = os.waitstatus_to_exitcode(reply["status"])
    if status == sandbox.RAISED:
        raise ToolError("exception", text)
    if status < 0:
        # 0.7: the kernel holds to the limit by counting ticks, and reports what it measured
        by_limit = -status in (signal.SIGKILL, signal.SIGXCPU)
        if by_limit and reply["cpu"] > 0.7 * sandbox.CPU_SECONDS:
            limit = f"(killed: {sandbox.CPU_SECONDS} s of CPU time)"
            raise ToolError("timeout", f"{text}\n{limit}".lstrip())
        name = signal.Signals(-status).name
        raise ToolError("exception", f"{text}\n(the process was killed by {name})".lstrip())
    if status:
        text = f"{text}\n(exit code {status})".lstrip()
    return text or NO_OUTPUT


async def _call(data):
    """-> output, the sandbox's reply; None for the reply if the output was too long. Raises
    ConnectionError if the sandbox died. Leaving, if only by a cancellation, kills the child: the
    sandbox sees `ctl` close."""
    import asyncio

    loop = asyncio.get_running_loop()
    ctl, far_ctl = socket.socketpair()
    out, far_out = socket.socketpair()
    try:
        ctl.setblocking(False)
        out.setblocking(False)
        try:
            if _has_fork_server():
                while not _send(b"run", [far_ctl.fileno(), far_out.fileno()]):
                    await asyncio.sleep(0.005)  # hundreds of calls wait for the server already
            else:
                process = _popen("one", far_ctl, far_out)
                threading.Thread(target=process.wait, daemon=True).start()  # leaves no zombie
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
        raise ConnectionResetError("the sandbox died")
    return json.loads(data)


def layers() -> dict[str, bool]:
    """Which layers of sandbox.py's docstring are in force on this system. Starts the server."""
    near, far = socket.socketpair()
    with near:
        with far:
            if _has_fork_server():
                while not _send(b"layers", [far.fileno()]):
                    pass
            else:
                _popen("layers", far, far).wait()
        return _read_reply(near.recv(4096))


def _has_fork_server():
    """The one place that chooses between the two ways to run a call."""
    return sys.platform == "linux"


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
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.setblocking(False)
    with far:
        _server["process"] = _popen("serve", far, None)
    _server["control"] = near


def _popen(what, stdin, stdout):
    """Runs main() below in a process of its own. Blocks for the milliseconds that takes."""
    import subprocess

    # Not as a script: that would be compiled each time. The folder comes last, and goes again: a
    # tool named as a module of python's library must not replace it.
    code = "import sys; sys.path.append(sys.argv[1]); import python; sys.path.pop(); python.main()"
    # -s -S -P and an empty environment: what -I does, but a fixed hash seed. LD_LIBRARY_PATH: some
    # pythons do not start without it.
    keep = {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}
    folder = os.path.dirname(__file__)
    return subprocess.Popen(
        [sys.executable, "-s", "-S", "-P", "-c", code, folder, what, str(os.getpid())],
        stdin=stdin,
        stdout=stdout or subprocess.DEVNULL,
        env=keep | {"PYTHONHASHSEED": "0"},
        cwd="/",
        start_new_session=True,  # Ctrl-C is for the trainer alone
    )


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

# -- the other side: in the process that _popen() starts


def main():
    what, parent = sys.argv[2:]
    if what == "serve":
        _preload()
        sandbox.serve(int(parent), _run)
    elif what == "one":
        sandbox.serve_one(_run)
    else:
        os.write(1, json.dumps(sandbox.confine_portably("/")).encode())


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
        status = sandbox.RAISED
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
        text = f"MemoryError (the limit is {sandbox.MEMORY >> 20} MB)\n"
    try:
        sys.stdout.flush()
    finally:
        os.write(2, text.encode("utf-8", "backslashreplace"))

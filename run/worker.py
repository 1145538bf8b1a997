"""A warm process that answers one request at a time, and that nobody waits for beyond a deadline.

    worker = Worker("tools/sandbox/queries.py")
    reply = worker.ask({"query": "SELECT 1"}, seconds=5)  # dicts of JSON values and bytes

For code that no thread can stop, since it runs for hours inside of one function of C. The process
starts at the first request (tens of milliseconds), is used again (0.2 ms a request on top of the
work), and is started anew after it has ended. It gets no environment, and none of our descriptors.

The file is loaded by its path, with nothing of this repository to import but the files beside it,
as it is loaded. It has to define prepare(), which is called once, and answer(request) -> reply.

What is covered: at the deadline the kernel ends the process, whatever it is doing, by an alarm of
its own: also if this program has died meanwhile. Else it ends when our end of its socket closes.
What is not: it is no sandbox. Limits on memory and files are for the file to set.
"""

import importlib.util
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import weakref
from multiprocessing.connection import Connection
from pathlib import Path

# Some pythons do not start without the first, or find no package without the second.
ENVIRONMENT = ("LD_LIBRARY_PATH", "PYTHONPATH")


class WorkerDied(Exception):
    """The process ended before it had replied, and not by its deadline: out of memory, or crashed
    by what it was asked."""


# -- this program's side


class Worker:
    """One such process. Several threads may ask; they wait for each other."""

    def __init__(self, file: str | Path, packages: bool = False):
        """packages: whether it needs more than the standard library;
        without, the process starts faster."""
        self.file = os.path.abspath(file)
        self.packages = packages
        self.process = None
        self._connection = None
        self._lock = threading.Lock()
        _workers.add(self)

    def ask(self, request: dict, seconds: float) -> dict:
        """Asks for answer(request). The clock starts when the process has the request: its start
        does not count. Raises TimeoutError, WorkerDied, and RuntimeError if the process does not
        start."""
        message = encode({"seconds": seconds, "request": request})
        with self._lock:
            was_used = self.process is not None
            try:
                try:
                    reply = self._exchange(message)
                except WorkerDied:
                    if not was_used:
                        raise
                    reply = self._exchange(message)  # that one may have been killed long ago
            except BaseException:  # Ctrl-C: the reply would be taken for that of the next request
                self._stop()
                raise
        return decode(reply)

    def stop(self) -> None:
        """Ends the process; the next request starts another one."""
        with self._lock:
            self._stop()

    def _exchange(self, message):
        """Sends a message, and returns the reply as bytes; starts the process if there is none."""
        if self.process is None:
            self._start()
        try:
            self._connection.send_bytes(message)
            return self._connection.recv_bytes()
        except (EOFError, OSError):
            status = self._end()
        if status == -signal.SIGALRM:
            raise TimeoutError(f"{self.file} did not reply in time")
        raise WorkerDied(f"{self.file} ended before it had replied")

    def _start(self):
        near, far = socket.socketpair()
        with far:
            self.process = subprocess.Popen(
                self._command(),
                stdin=far,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
                cwd="/",
                start_new_session=True,  # Ctrl-C is for this program alone
            )
        self._connection = Connection(near.detach())
        try:
            self._connection.recv_bytes()  # it is ready
        except (EOFError, OSError):
            self._end()
            raise RuntimeError(f"the worker {self.file} does not start") from None

    def _command(self):
        # -P: nothing of the folder run/ can be imported, where a config.py and a log.py lie
        flags = ["-P"] if self.packages else ["-I", "-S"]
        return [sys.executable, *flags, os.path.abspath(__file__), self.file]

    def _end(self):
        """Closes its socket, at which it ends, and returns its exit status."""
        self._connection.close()
        status = self.process.wait()
        self.process = None
        return status

    def _stop(self):
        if self.process is not None:
            self.process.kill()
            self._end()

    def _forget(self):
        """Forgets the process, in a child of a fork: it is the parent's."""
        self._lock = threading.Lock()  # a thread of the parent may have held it
        if self.process is not None:
            self._connection.close()
            self.process.returncode = 0  # nothing to wait for
            self.process = None


class Workers:
    """A few such processes of one file, so that a request which takes long does not keep all others
    waiting. Each starts when those before it are busy."""

    def __init__(self, file: str | Path, count: int, packages: bool = False):
        self.workers = [Worker(file, packages) for _ in range(count)]
        self._forget()
        _workers.add(self)

    def ask(self, request: dict, seconds: float) -> dict:
        """Asks, as Worker.ask does, the first one that is free."""
        worker = self._free.get()
        try:
            return worker.ask(request, seconds)
        finally:
            self._free.put(worker)

    def stop(self) -> None:
        """Ends the processes; requests start others."""
        for worker in self.workers:
            worker.stop()

    def _forget(self):
        """Sets all free, at the start and in a child of a fork."""
        self._free = queue.LifoQueue()  # the last one used has a warm process
        for worker in self.workers:
            self._free.put(worker)


_workers = weakref.WeakSet()


def _forget_all():
    for worker in list(_workers):
        worker._forget()


os.register_at_fork(after_in_child=_forget_all)


# -- messages: JSON, as what comes from a process that is no longer itself must do no harm


def encode(message: dict) -> bytes:
    return json.dumps(message, default=lambda data: {"bytes": data.hex()}).encode()


def decode(data: bytes) -> dict:
    return json.loads(data, object_hook=_bytes_of)


def _bytes_of(value):
    return bytes.fromhex(value["bytes"]) if value.keys() == {"bytes"} else value


# -- the process's side


def serve(file: str) -> None:
    """Answers requests from stdin, a socket, until its other end is closed."""
    spec = importlib.util.spec_from_file_location("served", file)
    module = importlib.util.module_from_spec(spec)
    sys.path.append(os.path.dirname(file))  # last: it replaces no module of python
    spec.loader.exec_module(module)
    sys.path.pop()
    module.prepare()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it is doing
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    connection = Connection(os.dup(0))
    connection.send_bytes(b"ready")
    while True:
        try:
            message = decode(connection.recv_bytes())
        except (EOFError, OSError):  # the program that asked has ended
            return
        signal.setitimer(signal.ITIMER_REAL, message["seconds"])
        reply = encode(module.answer(message["request"]))
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(reply)


if __name__ == "__main__":
    serve(sys.argv[1])

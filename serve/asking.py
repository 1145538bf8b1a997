"""Asks questions.py in a process of its own: what hangs is ended, what crashes ends nothing else.

    answer = asking.ask("check", {"script": "train_grpo.py", "argv": ["--steps=5"]}, seconds=60)

Each process is forked from one that has imported torch already (multiprocessing's fork server), so
a question costs tenths of a second and not the seconds of that import.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from multiprocessing import forkserver

import psutil

from run import config
from trajectory import escaped

AT_ONCE = 3  # questions; others wait
MOST_SAID = 20_000  # characters of what a question printed
SET_CHILD_SUBREAPER = 36  # of prctl: who loses its parent becomes a child of ours
free = threading.BoundedSemaphore(AT_ONCE)
context = multiprocessing.get_context("forkserver")


def prepare() -> None:
    """Starts the process that imports torch. It goes with this one."""
    # not serve.page: each new process runs that as its main module, and would be warned
    context.set_forkserver_preload(["serve.questions", "serve.views", "serve.guard"])
    # the fork server looks for modules where python does: it is not told our path
    before = os.environ.get("PYTHONPATH")
    paths = [str(config.HERE), *([before] if before else [])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def ask(name: str, arguments: dict, seconds: float) -> dict:
    """Asks questions.ALL[name](**arguments): its answer, with what it printed as `said`; {"error":
    a sentence} if it has none, or none in time."""
    if not free.acquire(timeout=seconds):
        return {"error": f"{AT_ONCE} other questions take long: ask again"}
    try:
        with tempfile.TemporaryFile() as said:
            answer = _ask(name, arguments, seconds, said)
            said.seek(0)
            text = said.read(4 * MOST_SAID).decode("utf-8", "replace")
        return {"said": escaped(text)[:MOST_SAID].strip(), **answer}
    finally:
        free.release()


def _ask(name: str, arguments: dict, seconds: float, said) -> dict:
    near, far = context.Pipe(duplex=False)
    printed = multiprocessing.reduction.DupFd(said.fileno())
    process = context.Process(target=_answer, args=(far, printed, os.getcwd(), name, arguments))
    process.start()
    far.close()
    answer = None
    is_late = False
    try:
        is_late = not near.poll(seconds)
        if not is_late:
            with contextlib.suppress(EOFError):  # it ended
                answer = json.loads(near.recv_bytes())
    finally:
        end_all(process.pid)
        process.kill()  # one that has no group of its own yet
        process.join()
        near.close()
    if is_late:
        return {"error": f"no answer within {seconds:g} seconds: something in it hangs"}
    if answer is None:
        return {"error": f"the check ended without an answer (exit code {process.exitcode})"}
    return answer


def end_all(pid: int) -> None:
    """Ends a process with whatever it started, what has made a session of its own too."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        process.suspend()  # it starts no more
        for inner in process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                inner.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _answer(connection, printed, folder: str, name: str, arguments: dict) -> None:
    """Answers, in the new process."""
    os.setsid()  # it ends with all that it starts
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.chdir(folder)
    descriptor = printed.detach()
    for number in (1, 2):
        os.dup2(descriptor, number)
    from serve import questions

    try:
        answer = questions.answer(name, arguments)
    except KeyboardInterrupt:
        answer = {"error": "interrupted"}
    sys.stdout.flush()
    connection.send_bytes(json.dumps(answer, default=str).encode())
    connection.close()
    time.sleep(5)  # who asked ends it, while what it started can be found
    os._exit(0)  # threads of tools need not be waited for

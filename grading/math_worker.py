"""What runs inside of a worker process: comparing two expressions by math-verify.

grading/equality.py is the other side. run/worker.py loads this file, calls prepare(), once, and
answer(). Nothing but the end of a process stops the 9**9**9**9 that a model may write, and to start
one with math-verify in it takes seconds. So each comparison runs in a fork, which costs
milliseconds, and is ended when it has used its seconds of the processor: a busy machine does not
change a verdict.

What is covered: the environment is empty but for two paths of libraries; memory and time are
limited; no file can be written; on Linux there is no network, no new process and no way to another
one, and the user is another where that one may read python. What is not: files that python's user
may read can be read, as what is imported late has to be found.
"""

import logging
import os
import resource
import signal
import sys

import math_verify
import sympy
from math_verify import parse, verify
from sympy import Expr

if __package__:
    from tools.sandbox import confine
else:  # in the worker, which has no package of this repository: by its folder
    sys.path.append(os.path.join(os.path.dirname(__file__), "..", "tools", "sandbox"))
    import confine

    sys.path.pop()

MEMORY = 4 << 30  # bytes of address space
RELATIVE_ERROR = 1e-6  # between two numbers that count as equal


_layers = {}  # which are around the forks


def prepare() -> None:
    """Limits memory, so that there is a MemoryError, which math-verify takes for "not equal"; and
    compares once, which fills what the forks share."""
    logging.disable()  # it warns that it has no timeout: it has one
    _are_same(r"\frac{1}{2} x^{2} + \sqrt{3}", r"\sqrt{3} + x^2/2")
    _are_same(r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "(1, 2)")
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # what is imported late, by an odd expression, must still be found
    _layers.update(confine.confine_forks([os.__file__, sympy.__file__, math_verify.__file__]))


def answer(request: dict) -> dict:
    """Answers {"same": whether the answer `said` is the answer `gold`}; None where that is not
    known after `seconds` of the processor. Or {"layers"}."""
    if "layers" in request:
        return {"layers": _layers}

    def compare():
        return _are_same(request["said"], request["gold"])

    return {"same": in_fork(compare, request["seconds"])}


def in_fork(question, seconds: float) -> bool | None:
    """Asks a question in a fork that can do nothing but compute; False if it raises, None if it has
    not ended after so many seconds of the processor."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever it is doing
        signal.setitimer(signal.ITIMER_PROF, seconds)
        confine.refuse_to_act()
        verdict = False
        try:
            verdict = question()
        finally:
            os.write(writing, b"1" if verdict else b"0")
            os._exit(0)
    os.close(writing)
    verdict = os.read(reading, 1)
    os.close(reading)
    os.waitpid(child, 0)
    return verdict == b"1" if verdict else None


def _are_same(said, gold):
    said = _parsed(said)
    gold = _parsed(gold)
    return bool(verify(gold, said, timeout_seconds=None) and _is_near(said, gold))


def _parsed(text):
    return parse(f"\\boxed{{{text}}}", parsing_timeout=None)


def _is_near(said, gold):
    """Says whether two numbers are near: math-verify rounds to 6 decimals, and 10^{-7} to 0."""
    if not _is_number(said[0]) or not _is_number(gold[0]):
        return True
    difference = abs((said[0] - gold[0]).n())
    return said[0] == gold[0] or difference <= RELATIVE_ERROR * abs(gold[0].n())


def _is_number(value):
    return isinstance(value, Expr) and value.is_number

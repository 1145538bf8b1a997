"""What runs inside of a worker process: comparing two expressions by math-verify.

grading/equality.py is the other side. run/worker.py loads this file, calls prepare(), once, and
answer(). It has a process of its own because math-verify has no deadline in a thread, and nothing
but the end of its process stops the 9**9**9**9 that a model may write.
"""

import logging
import resource
import sys

from math_verify import parse, verify
from sympy import Expr

MEMORY = 4 << 30  # bytes of address space
RELATIVE_ERROR = 1e-6  # between two numbers that count as equal


def prepare() -> None:
    """Limits memory, so that there is a MemoryError, which math-verify takes for "not equal"."""
    logging.disable()  # it warns that it has no timeout: it has one
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def answer(request: dict) -> dict:
    """{"same": whether the answer `said` is the answer `gold`}."""
    said = _parsed(request["said"])
    gold = _parsed(request["gold"])
    same = verify(gold, said, timeout_seconds=None) and _is_near(said, gold)
    return {"same": bool(same)}


def _parsed(text):
    return parse(f"\\boxed{{{text}}}", parsing_timeout=None)


def _is_near(said, gold):
    """Whether two numbers are so: math-verify rounds to 6 decimals, and 10^{-7} to 0."""
    if not _is_number(said[0]) or not _is_number(gold[0]):
        return True
    difference = abs((said[0] - gold[0]).n())
    return said[0] == gold[0] or difference <= RELATIVE_ERROR * abs(gold[0].n())


def _is_number(value):
    return isinstance(value, Expr) and value.is_number

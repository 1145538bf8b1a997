"""The python_stdin tool: runs a program that reads its input from stdin, as in contests.

The same sandbox as the python tool (tools/python.py says what can be imported), a fresh process for
each call. A tool of its own: the python tool is described to a model as what computes, without an
argument that most calls would leave out.
"""

from tools.python import HEAVY, NO_OUTPUT, prepare
from tools.sandbox import caller


async def python_stdin(code: str, stdin: str = "") -> str:
    """Run a Python program in a fresh process and return what it prints.

    Args:
        code: A Python 3 program, no network. It reads its input by input() or sys.stdin.
        stdin: The input, with its line breaks.
    """
    is_heavy = any(name in code for name in HEAVY)
    result = await caller.call("heavy" if is_heavy else "light", code, stdin)
    return caller.observation(result) or NO_OUTPUT


python_stdin.pure = True
python_stdin.prepare = prepare

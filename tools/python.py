"""The python tool: runs code that the model wrote, each call in a fresh, confined process.

    text = await python("print(6 * 7)")  # in a notebook; a rollout goes through tools.Toolbox
    print(layers())  # which of the layers this system lets us put around the code

The layers, each used where the system has it: own user, mount, PID, network and user namespaces;
seccomp; no capabilities; limits on CPU time, memory, processes, files; a scratch directory with a
quota; an empty environment; a cap on the output; and the whole tree killed at the deadline.
sandbox/caller.py says what they cover and what not. bubblewrap would cost an exec and an import per
call.

A new python per call costs 40 ms of CPU, half a second with sympy; a fork a few. So on Linux calls
are children of a fork server. Elsewhere (macOS) each call is a python of its own, and much less is
put around it.

Importable are the standard library and fork_server.PACKAGES, as far as they are installed: numpy
and sympy come with nanotool. Nothing else can be imported, neither of the user's project nor, with
private_root, of what is installed. Hashes, `random` and numpy.random start from the same seed in
each call, so the same code gives the same result (`pure`), also in a resumed run, but for
os.urandom and the clock.

    --tool_options=python.unconfined=true  # where code would run as your own user: else refused
"""

from tools.sandbox import caller
from tools.sandbox.caller import layers  # noqa: F401

HEAVY = ("numpy", "sympy", "scipy", "mpmath", "pandas", "networkx")
NO_OUTPUT = "(no output: use print(...) to see a value)"


async def python(code: str) -> str:
    """Run Python code in a fresh process and return what it prints.

    Args:
        code: Python 3 code with numpy and sympy, no network. Use print to see a value.
    """
    is_heavy = any(name in code for name in HEAVY)
    result = await caller.call("heavy" if is_heavy else "light", code)
    return caller.observation(result) or NO_OUTPUT


def prepare(unconfined: bool = False) -> None:
    """Refuses a system that cannot confine code. unconfined: code may run as our own user, where
    this system offers nothing better."""
    caller.require_confinement(unconfined)


python.pure = True
python.prepare = prepare

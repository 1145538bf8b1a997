"""What runs inside of a worker process: asking a data set of reasoning_gym for an answer's score.

grading/gym.py is the other side. run/worker.py loads this file, calls prepare(), once, and
answer(). Some scorers evaluate the answer as python, so each runs in a fork, as in math_worker.py:
without the network, it writes no file, starts no process, and ends when it has used its seconds of
the processor. Its memory is limited. Files that it may read can be read.
"""

import functools
import json
import os
import pickle
import resource
import signal
import sys

import reasoning_gym
import sympy

if __package__:
    from tools.sandbox import confine
else:  # in the worker, which has no package of this repository: by its folder
    sys.path.append(os.path.join(os.path.dirname(__file__), "..", "tools", "sandbox"))
    import confine

    sys.path.pop()

MEMORY = 4 << 30  # bytes of address space
LONGEST = 100  # bytes of a reply

_layers = {}  # which are around the forks


def prepare() -> None:
    """Limits memory, and gives up what forks have no use for."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    _layers.update(confine.confine_forks([os.__file__, sympy.__file__, reasoning_gym.__file__]))


def answer(request: dict) -> dict:
    """Answers {"score": what the data set `name` gives `answer` for `entry`}; or {"layers"}."""
    if "layers" in request:
        return {"layers": _layers}
    data_set = _data_set(request["name"], request["options"])
    entry = pickle.loads(request["entry"])

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever it is doing
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        confine.refuse_to_act()
        try:
            score = float(data_set.score_answer(request["answer"], entry))
            os.write(writing, json.dumps(score).encode())
        finally:  # whatever it raises: the reply is empty
            os._exit(0)
    os.close(writing)
    reply = os.read(reading, LONGEST)
    os.close(reading)
    os.waitpid(child, 0)
    return {"score": json.loads(reply) if reply else 0.0}


@functools.lru_cache(maxsize=200)
def _data_set(name, options):
    """Makes a data set. options: JSON, which can be a key of this cache."""
    return reasoning_gym.create_dataset(name, seed=0, size=1, **json.loads(options))

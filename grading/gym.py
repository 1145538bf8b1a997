"""The reward gym: what the data set of reasoning_gym that a row is from gives the model's answer.

Several of its scorers evaluate the answer as python. So they run in a process that can do nothing
but compute: grading/gym_worker.py.
"""

import json
import os
import pickle
import threading
from pathlib import Path

from grading.answers import answer
from run.config import UserError
from run.plugins import parse_source
from run.worker import WorkerDied, Workers
from tools.sandbox.caller import report

SECONDS = 5.0  # of the processor, for one answer
PATIENCE = 60.0  # seconds by the clock, after which the process is taken for dead
WANTED = ("network_namespace", "no_new_privileges", "seccomp")  # around it, where there are such


def gym(trajectory, example):
    """Gives, from 0.0 to 1.0, what score_answer(answer, entry) of the row's data set says, for rows
    of --data=gym:NAME. An answer at which it raises, or that it has not judged after 5 seconds of
    the processor, is wrong: 0.0. None where the process that asks it died."""
    if "gym" not in example or "entry" not in example:
        raise UserError("reward gym is for the rows of --data=gym:NAME, which say their data set")
    text = answer(trajectory, example)
    if text is None:
        return 0.0
    return _scorer.score(example["gym"], text, example["entry"])


class _Scorer:
    """Asks reasoning_gym in other processes, which start when they are needed."""

    def __init__(self):
        file = Path(__file__).with_name("gym_worker.py")
        self.workers = Workers(file, min(4, os.cpu_count() or 1), packages=True)
        self.lock = threading.Lock()
        self.is_reported = False  # whether the user was told which layers are not around them

    def score(self, source, text, entry):
        """Asks a process for the score; None if that died."""
        name, options = parse_source(source)
        # pickled: JSON would make lists of the entry's tuples
        packed = pickle.dumps(entry)
        request = {"name": name, "answer": text, "entry": packed, "seconds": SECONDS}
        request["options"] = json.dumps(options)
        try:
            with self.lock:
                if not self.is_reported:
                    layers = self.workers.ask({"layers": True}, PATIENCE)["layers"]
                    report([layer for layer in WANTED if not layers[layer]], "reward gym")
                    self.is_reported = True
            return self.workers.ask(request, PATIENCE)["score"]
        except (TimeoutError, WorkerDied):
            return None
        except RuntimeError:
            raise UserError(
                "reward gym: reasoning_gym does not start: pip install 'reasoning-gym>=0.1.25,<0.2'"
            ) from None


_scorer = _Scorer()

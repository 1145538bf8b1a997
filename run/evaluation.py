"""The folder of one evaluation: what it was begun with, and each trajectory as it ended.

    settings.json   settings, a digest of the rows, what the model's files were: written first
    rollouts.jsonl  a line for each trajectory, as it ends; in order when all are there
    eval.json       the numbers, made of the lines and the rows: whole, or not there

A killed evaluation goes on with what is missing and what ended by a fault (`fault_of`), never with
what is there. Its numbers are those of one that was not killed, so what a line holds is exact.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Container
from pathlib import Path

from run import log as run_log
from run.config import UserError, tell
from run.page import row_of
from trajectory import ToolCall, Trajectory, UserTurn

SETTINGS = "settings.json"
ROLLOUTS = "rollouts.jsonl"
NUMBERS = "eval.json"
ASIDE = ".new"  # behind the name of what is being written
# What may differ when an evaluation goes on: where and how quickly it plays, and what is only
# counted of what was played.
FREE = {"resume", "run", "save_to", "batch", "key_env", "k", "pass_at", "category_column"}
FREE |= {"urls", "max_concurrent", "tool_concurrency", "gpu_memory_utilization"}


def fault_of(trajectory: Trajectory) -> str:
    """Says why a trajectory is to be played again when its evaluation goes on: it ended by what is
    not the model's doing. "" for all others: "answered", and the limits "length", "max_turns",
    "max_tool_calls", "timeout", "placeholder"."""
    if trajectory.failure:
        return "an environment failed"
    if trajectory.stop == "error":
        return "an error of an API or of a tool's state"
    if trajectory.reward_timeouts:
        return "a reward took too long"
    if trajectory.outcome is None:
        return "not graded"
    return ""


class Record:
    """What an evaluation writes to its folder, which is locked until it is closed."""

    def __init__(self, folder: Path, begun: dict):
        """Begins or opens an evaluation in a folder."""
        self.folder = folder
        self.begun = begun  # what settings.json holds
        self.there: list[Trajectory] = []  # what was played before, and did not end by a fault
        self.unsaved: list[tuple[Trajectory, dict]] = []  # what a full disk has not taken
        self.problem = ""  # what that disk said of it
        self.lock = None  # the open file that is locked
        self._save_settings()

    def _save_settings(self) -> None:
        """Writes settings.json where it is not there, and locks it. Does nothing where the disk
        does not take it: the evaluation is played all the same."""
        file = self.folder / SETTINGS
        try:
            if not file.exists():
                save_whole(file, json.dumps(self.begun, indent=1) + "\n")
            self.lock = open(file, "rb")
        except OSError:
            return
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                return
            self.lock.close()
            raise UserError(
                f"save_to '{self.folder}' is in use by another process: wait for it, end it, or "
                "give another with --save_to=…"
            ) from None

    @property
    def can_go_on(self) -> bool:
        """Whether what it was begun with is written: without that nothing can go on."""
        return self.lock is not None

    @classmethod
    def open(cls, folder: Path) -> "Record":
        """Opens the evaluation that was begun in a folder."""
        begun = begun_in(folder)
        assert begun is not None, f"{folder} holds no evaluation"
        return cls(folder, begun)

    def close(self) -> None:
        """Leaves the folder to others."""
        if self.lock:
            self.lock.close()

    # -- what is there

    def read(self, examples: list[dict], samples: int) -> list[Trajectory]:
        """Reads the trajectories that are there and did not end by a fault, in order. examples: the
        rows, by which their groups are numbered. A line that a kill has torn is cut off."""
        self._cut_torn_line()
        found = {}
        damaged = []
        for number, line in enumerate(self._lines(), 1):
            trajectory = trajectory_of(row_of(line), examples, samples)
            if trajectory is None:
                damaged.append(number)
            else:
                found[trajectory.group, trajectory.sample] = trajectory
        if damaged:
            which = ", ".join(map(str, damaged[:5])) + (", …" if len(damaged) > 5 else "")
            tell(
                f"{self.folder / ROLLOUTS}: line {which} is no trajectory of this evaluation: "
                "what it stood for is played again"
            )
        return [found[place] for place in sorted(found) if not fault_of(found[place])]

    def not_sent(self) -> set[str]:
        """Collects the parameters that an API has refused, so that they were not sent."""
        names = set()
        for line in self._lines():
            row = row_of(line) or {}
            names.update(row.get("not_sent") or ())
        return names

    def _lines(self):
        file = self.folder / ROLLOUTS
        if file.exists():
            with open(file, "rb") as opened:
                yield from opened

    def _cut_torn_line(self) -> None:
        """Cuts off a last line without its end. Everything before it is whole."""
        file = self.folder / ROLLOUTS
        whole = 0  # bytes
        size = 0
        for line in self._lines():
            size += len(line)
            if line.endswith(b"\n"):
                whole = size
        if whole < size:
            os.truncate(file, whole)
            tell(f"{file}: its last line was torn by a kill and is cut off, it is played again")

    # -- what is added

    def append(self, trajectory: Trajectory, tokenizer, **columns) -> None:
        """Writes a trajectory that has ended. Where the disk is full it is kept, and tried again by
        `flush`."""
        self.unsaved.append((trajectory, columns))
        if len(self.unsaved) == 1:
            self.flush(tokenizer)

    def flush(self, tokenizer) -> None:
        """Writes what the disk has not taken before; sets `problem` where it does not take it."""
        file = self.folder / ROLLOUTS
        if self.lock is None:
            self._save_settings()
        while self.unsaved:
            trajectory, columns = self.unsaved[0]
            columns = columns | {
                "given_answer": trajectory.answer,
                "reward_timeouts": trajectory.reward_timeouts,
                "unseen_tokens": trajectory.unseen_tokens,
            }
            size = file.stat().st_size if file.exists() else 0
            try:
                run_log.write_rollouts(file, [trajectory], tokenizer, **columns)
            except OSError as error:
                with contextlib.suppress(OSError):  # no file at all
                    os.truncate(file, size)
                self.problem = error.strerror or str(error)
                return
            self.unsaved.pop(0)
        self.problem = ""

    def put_in_order(self, trajectories: list[Trajectory]) -> None:
        """Sorts the lines of these trajectories by group and sample; of one that was played again
        the later line stays. Does nothing where the disk has no room for it."""
        wanted = {(trajectory.group, trajectory.sample) for trajectory in trajectories}
        places = {}  # (group, sample) -> (first byte of its line, its length)
        order = []
        at = 0
        for line in self._lines():
            row = row_of(line) or {}
            place = (row.get("group"), row.get("sample"))
            if all(type(part) is int for part in place) and place in wanted:
                places[place] = (at, len(line))
            order.append(place)
            at += len(line)
        if order == sorted(places):
            return
        file = self.folder / ROLLOUTS
        aside = file.with_name(file.name + ASIDE)
        try:
            with open(file, "rb") as before, open(aside, "wb") as after:
                for place in sorted(places):
                    first, length = places[place]
                    before.seek(first)
                    after.write(before.read(length))
                after.flush()
                os.fsync(after.fileno())
            aside.replace(file)
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink()

    def save_numbers(self, numbers: dict) -> str:
        """Writes eval.json; says why the disk did not take it, or ""."""
        try:
            save_whole(self.folder / NUMBERS, json.dumps(numbers, indent=2) + "\n")
        except OSError as error:
            reason = error.strerror or error
            return f"eval.json could not be written to {self.folder} ({reason})"
        return ""


def trajectory_of(row: dict | None, examples: list[dict], samples: int) -> Trajectory | None:
    """Makes of a line of rollouts.jsonl what the numbers are made of; None if it is no trajectory
    of these examples. Of its images there are only the names."""
    try:
        group = row["group"]
        sample = row["sample"]
        if not is_exact(row) or not (0 <= group < len(examples) and 0 <= sample < samples):
            return None
        if row["answer"] != plain(examples[group].get("answer")):  # it is another row's
            return None
        return Trajectory(
            examples[group],
            group,
            sample,
            ids=row["ids"],
            mask=row["mask"],
            images=row.get("images", []),
            turn_starts=row["turn_starts"],
            unseen_tokens=row["unseen_tokens"],
            messages=row["messages"],
            calls=[ToolCall(**call) for call in row["calls"]],
            stop=row["stop"],
            answer=row["given_answer"],
            user_turns=[UserTurn(**user_turn) for user_turn in row["user_turns"]],
            failure=row["failure"],
            seconds=row["seconds"],
            rewards=dict(row["rewards"]),
            reward=row["reward"],
            reward_timeouts=row["reward_timeouts"],
            metrics=row["metrics"],
        )
    except (KeyError, TypeError, ValueError):
        return None


# What a line holds, where it is not a number or one text.
LISTS = (
    ("ids", int),
    ("mask", int),
    ("turn_starts", int),
    ("messages", dict),
    ("calls", dict),
    ("user_turns", dict),
    ("reward_timeouts", str),
)


def is_exact(row: dict) -> bool:
    """Says whether a line holds what `Record.flush` writes: its numbers are numbers. KeyError where
    something is missing."""
    for name, kind in LISTS:
        if not isinstance(row[name], list) or any(type(part) is not kind for part in row[name]):
            return False
    if not all(type(row[name]) is int for name in ("group", "sample", "unseen_tokens")):
        return False
    if not all(isinstance(row[name], str) for name in ("stop", "failure")):
        return False
    if not isinstance(row["rewards"], dict) or not isinstance(row["metrics"], dict):
        return False
    graded = [value for value in (row["reward"], *row["rewards"].values()) if value is not None]
    if not all(isinstance(value, int | float) for value in row["metrics"].values()):
        return False
    return len(row["ids"]) == len(row["mask"]) and all(map(is_finite, [row["seconds"], *graded]))


def is_finite(value) -> bool:
    """Says whether a value of JSON is a number that can be averaged."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def whole_groups(trajectories: list[Trajectory], samples: int) -> list[Trajectory]:
    """Leaves out the groups of which a sample is missing, for rewards that compare the samples."""
    counts = {}
    for trajectory in trajectories:
        counts[trajectory.group] = counts.get(trajectory.group, 0) + 1
    return [trajectory for trajectory in trajectories if counts[trajectory.group] == samples]


# ---- what an evaluation was begun with


def begun_in(folder: Path) -> dict | None:
    """Reads the settings.json of a folder; None if no evaluation was begun in it."""
    try:
        begun = json.loads((folder / SETTINGS).read_bytes())
        is_whole = isinstance(begun["settings"], dict) and type(begun["problems"]) is int
        is_whole = is_whole and isinstance(begun["outcomes"][""], str)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return begun if is_whole else None


def holds_only_a_start(folder: Path) -> bool:
    """Says whether a folder holds nothing but what an evaluation leaves that was killed before its
    settings were written."""
    return all(entry.name == SETTINGS + ASIDE for entry in folder.iterdir())


def plain(value):
    """Makes of a value what JSON makes of it, to compare it."""
    return json.loads(json.dumps(value))


def difference(begun: dict, wanted: dict) -> str:
    """Says in what an evaluation that was begun differs from the one that is wanted; "" if it may
    go on as that. Both as settings.json holds them."""
    now = wanted["settings"]
    of_settings = difference_of_settings(begun["settings"], now)
    if of_settings:
        return of_settings
    if begun.get("rows") != wanted["rows"]:
        return f"the rows of {now.get('data')!r} are not those that it was begun with"
    if begun.get("weights") != wanted["weights"]:
        return f"the files of model = {now.get('model')!r} were written anew since it was begun"
    return ""


def difference_of_settings(before: dict, now: dict) -> str:
    """Says which key differs in a way that changes what is played; "" if none does."""
    for name in sorted(before.keys() | now.keys()):
        key = name.rpartition(": ")[2]  # "calc: tools", of the source of a mix
        old = before.get(name)
        new = now.get(name)
        if key == "engine_options":  # the others say how it runs: a timeout, room for a cache
            old = [option for option in old or () if option == "deterministic=false"]
            new = [option for option in new or () if option == "deterministic=false"]
        if old != new and key not in FREE:
            return f"{name} = {new!r}, but it was begun with {old!r}"
    return ""


def digest_of_rows(examples: list[dict]) -> str:
    """Makes one digest of all that prompts and rewards are made of."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(json.dumps(example, sort_keys=True, default=_told).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _told(value) -> str:
    """Writes a value that JSON has not: bytes and images by what is in them, dates as they read."""
    content = value
    if hasattr(value, "tobytes"):  # of PIL and of numpy
        content = value.tobytes()
    if isinstance(content, bytes):
        return hashlib.blake2b(content, digest_size=16).hexdigest()
    return str(value)


def digest_of_weights(model: str) -> str:
    """Makes a digest of what the files of a model's folder are called, how large they are and when
    they were written; "" for a model that is no folder here."""
    folder = Path(model)
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*config.json")]
    if not files:
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(files):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def missing(there: Container[tuple[int, int]], problems: int, samples: int) -> list[int]:
    """Lists the groups of which a sample is not there."""
    groups = []
    for group in range(problems):
        if any((group, sample) not in there for sample in range(samples)):
            groups.append(group)
    return groups


def save_whole(file: Path, text: str) -> None:
    """Writes a file so that it is whole or not there. OSError if the disk does not take it."""
    aside = file.with_name(file.name + ASIDE)
    try:
        with open(aside, "w", encoding="utf-8") as written:
            written.write(text)
            written.flush()
            os.fsync(written.fileno())  # some disks say only now that they are full
        aside.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise

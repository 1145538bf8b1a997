"""The rollouts of a rollouts.jsonl that may still grow, found again by their numbers."""

import os
import threading
from pathlib import Path

from run import page as run_page


class Index:
    """Where each rollout of a rollouts.jsonl begins, and the few facts that a list shows of it.
    What is appended is read when it is asked for; a file that was replaced is read anew."""

    def __init__(self, file: Path):
        self.file = file
        self.lock = threading.Lock()
        self._forget(0)

    def _forget(self, inode: int) -> None:
        self.inode = inode
        self.end = 0  # bytes that are read
        self.places: list[int] = []  # where the lines of rollouts begin
        self.all: list[dict] = []  # their facts

    def read(self) -> None:
        """Reads what is new."""
        with self.lock:
            try:
                file = open(self.file, "rb")
            except OSError:
                return self._forget(0)
            with file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self.inode or stat.st_size < self.end:
                    self._forget(stat.st_ino)
                file.seek(self.end)
                for line in file:
                    if not line.endswith(b"\n"):  # it is being written
                        break
                    row = run_page.row_of(line, constant=str)
                    if row is not None and run_page.is_rollout(row):
                        self.all.append(facts_of(row, len(self.places)))
                        self.places.append(self.end)
                    self.end += len(line)

    def facts(self) -> tuple[list[dict], int]:
        """Gives (the facts of the rollouts that are listed, how many there are)."""
        with self.lock:
            chosen = run_page.spread(len(self.all), run_page.POINTS)
            return [self.all[number] for number in chosen], len(self.all)

    def row(self, number: int) -> dict | None:
        """Reads a whole rollout; None if there is none of this number."""
        with self.lock:
            if number >= len(self.places):
                return None
            place = self.places[number]
        try:
            with open(self.file, "rb") as file:
                file.seek(place)
                row = run_page.row_of(file.readline(), constant=str)
        except OSError:
            return None
        is_whole = row is not None and run_page.is_rollout(row)  # else it was replaced meanwhile
        return row if is_whole else None


def facts_of(row: dict, number: int) -> dict:
    """Collects what the pager needs to know of a rollout before it is looked at."""
    advantages = run_page.finite_numbers(dict(enumerate(row.get("advantages") or ())))
    reward = row.get("reward")
    return {
        "number": number,
        "step": row["step"] if run_page.is_of_step(row) else None,
        "reward": reward if isinstance(reward, int | float) else None,
        "stop": str(row.get("stop")),
        "failed": any(call.get("error") for call in row["calls"]),
        "strongest": max([abs(value) for value in advantages.values()], default=0.0),
    }

"""Keeps the newest rollouts of a server, to be looked at: as rows, or as a page in colour."""

import tempfile
from collections import OrderedDict
from pathlib import Path

from run import log as run_log
from run import page as run_page
from trajectory import Trajectory


class Traces:
    """The trajectories of the newest answers, by the ids of these."""

    def __init__(self, most: int):
        self.most = most
        self.kept: OrderedDict[str, tuple[list[Trajectory], object]] = OrderedDict()

    def keep(self, id: str, trajectories: list[Trajectory], tokenizer) -> None:
        """Keeps them in memory, in the place of the oldest; of images, what was shown."""
        for trajectory in trajectories:
            for picture in trajectory.images:
                picture.pixels = {}
                picture.seen = None
        self.kept[id] = (trajectories, tokenizer)
        while len(self.kept) > self.most:
            self.kept.popitem(last=False)

    def rows(self, id: str) -> list[dict]:
        """Makes the rows that rollouts.jsonl would have of an answer. KeyError if there is none."""
        with tempfile.TemporaryDirectory() as folder:
            return list(run_page.each_row(self._written(id, Path(folder))))

    def page(self, id: str) -> str:
        """Makes the page of an answer. KeyError if there is none."""
        with tempfile.TemporaryDirectory() as folder:
            self._written(id, Path(folder))
            run_page.page(folder, title=id, has_images=False)
            return (Path(folder) / "report.html").read_text(encoding="utf-8")

    def _written(self, id: str, folder: Path) -> Path:
        trajectories, tokenizer = self.kept[id]
        file = folder / "rollouts.jsonl"
        run_log.write_rollouts(file, trajectories, tokenizer)
        return file

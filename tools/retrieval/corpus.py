"""The passages of a corpus, and the folder in which an index of them lies.

bm25.py and dense.py are the two kinds of index. A corpus is a JSONL file, or a generated task's.
"""

import fcntl
import gzip
import hashlib
import importlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from run.config import UserError, tell
from tools.calling.http import plain

NOTABLE = 50 * 2**20  # bytes of a corpus that is indexed for so long that a line says so
TASK = "task:"  # begins the name of a generated task's corpus


@dataclass
class Passage:
    """A passage of a corpus; of one that was found, how good it is."""

    id: str  # the row's, or its number from 0
    contents: str  # "title\ntext", or text alone
    score: float = 0.0


# -- reading


def of_task(corpus: str) -> list[Passage]:
    """Reads the passages of `task:facts`."""
    name = corpus.removeprefix(TASK)
    try:
        rows = importlib.import_module(f"tasks.{name}").corpus()
    except ModuleNotFoundError as error:
        if error.name != f"tasks.{name}":
            raise
        raise UserError(f"search.corpus = '{corpus}': there is no tasks/{name}.py") from None
    passages = []
    for number, row in enumerate(rows):
        passages.append(of_row(row, f"{corpus}, row {number + 1}", number))
    return passages


def read(path: Path) -> Iterator[Passage]:
    """Reads the passages of a JSONL file, packed or not; UserError with the line that is wrong."""
    opened = gzip.open(path) if path.name.endswith(".gz") else open(path, "rb")
    number = 0  # of the line, from 1
    count = 0
    try:
        with opened as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield of_row(json.loads(line), f"{path}, line {number}", count)
                    count += 1
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path} after line {number}: {error}") from None
    except ValueError as error:
        raise UserError(f"{path}, line {number}: not JSON ({error})") from None


def of_row(row, where: str, number: int = 0) -> Passage:
    """Reads the passage in a row. where, number: of the row. UserError if there is none."""
    wanted = 'expected {"contents": "title\\ntext"} or {"title": ..., "text": ...}'
    if not isinstance(row, dict):
        raise UserError(f"{where}: {wanted}, not {str(row)[:80]}")
    id = plain(str(row.get("id", number)))
    if isinstance(row.get("contents"), str):
        return Passage(id, plain(row["contents"]))
    title, text = row.get("title") or "", row.get("text")
    if not isinstance(text, str) or not isinstance(title, str):
        raise UserError(f"{where}: {wanted}; its keys are {', '.join(row)}")
    return Passage(id, plain(f"{title}\n{text}" if title else text))


# -- the index on disk


def made_folder(
    corpus: Path, folder: str, kind: str, facts: dict, fill: Callable[[Path], int]
) -> Path:
    """Finds the folder of an index that fits the corpus; makes it, if there is none.

    folder: where; "" for beside the corpus, or in the user's cache where nothing can be written
    there. kind: what its name ends in. facts: beside size and time of the corpus, what the index
    depends on. fill(path) makes it in an empty folder, and returns how many passages it has.
    """
    try:
        status = corpus.stat()
    except OSError as error:
        raise UserError(f"cannot read search.corpus '{corpus}' ({error.strerror})") from None
    stamp = facts | {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    path = Path(folder) if folder else _place(corpus, kind)
    if _fits(path, stamp):
        return path
    try:
        if path.exists() and made_from(path) is None and any(path.iterdir()):
            raise UserError(f"search.index '{path}' holds something else: give a folder of its own")
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            if not _fits(path, stamp):  # another run may just have made it
                _make(corpus, path, stamp, fill)
    except OSError as error:
        raise UserError(f"cannot make search.index '{path}' ({error.strerror or error})") from None
    return path


STAMP = "nanotool-index.json"  # in each index: what it was made from
OLD_STAMP = "nanotool-bm25.json"  # in those of earlier versions, which are made anew


def made_from(path: Path) -> dict | None:
    """Reads what the index in a folder was made from; None if there is none."""
    name = STAMP if (path / STAMP).exists() else OLD_STAMP
    try:
        facts = json.loads((path / name).read_text())
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def _fits(path, stamp):
    facts = made_from(path) or {}
    return all(facts.get(key) == value for key, value in stamp.items())


def _place(corpus, kind):
    """Says where an index goes: beside the corpus, or in the user's cache if that is read-only."""
    beside = corpus.with_name(f"{corpus.name}.{kind}")
    # tantivy makes a lock in what it opens: the index itself has to be writable too
    if os.access(beside if beside.exists() else corpus.parent, os.W_OK):
        return beside
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.blake2b(str(corpus.resolve()).encode(), digest_size=6).hexdigest()
    return cache / "nanotool" / f"{corpus.name}-{digest}.{kind}"


@contextmanager
def _locked(folder):
    """Locks a folder: of several runs that begin at once one makes the index, the others wait."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make(corpus, path, stamp, fill):
    """Indexes the corpus into `path`: aside first, so that it is whole or not there."""
    if stamp["size"] > NOTABLE:
        tell(f"search: indexing {corpus} into {path}, once")
    aside = Path(tempfile.mkdtemp(prefix=f"{path.name}.aside-", dir=path.parent))
    try:
        count = fill(aside)
        if not count:
            raise UserError(f"search.corpus '{corpus}' is empty")
        (aside / STAMP).write_text(json.dumps(stamp | {"passages": count}))
        if path.exists():  # one of the corpus as it was before
            shutil.rmtree(path)
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)

"""Runs and evaluations side by side: curves, settings that differ, intervals, the same problems.

    python report.py out/a out/b                 # runs of train_grpo.py or train_sft.py
    python report.py out/a/eval out/b/eval       # evaluations, and their difference by problem
    python report.py out/a out/b --save_to=compare.html

Prints a short table and writes one page that loads nothing else. Of a run its newest evaluation
(eval, eval-2, … in its folder) is compared too.
"""

from pathlib import Path

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)

from grading import comparing
from grading.comparing import Evaluated
from run import page as run_page
from run.config import UserError
from run.evaluation import NUMBERS, ROLLOUTS, save_whole
from suite.show import print_table

MOST = 8  # folders, one for each colour of the page
SAVE_TO = "compare.html"


def page_of(folders: list[Path]) -> str:
    """Makes the page of one to eight folders, as HTML. UserError for what is neither a run nor an
    evaluation."""
    folders = [Path(folder) for folder in folders]
    names = names_of(folders)
    evaluations = evaluations_of(folders, names)
    shown = comparing.data_of_runs(folders, names) | {"names": names}
    if evaluations:
        shown |= comparing.data_of_evaluations(evaluations)
    with_rollouts = [rollouts_of(folder) for folder in folders]
    shown["problems"] = comparing.rollouts_side_by_side(with_rollouts)
    return comparing.page(" · ".join(names), shown)


def names_of(folders: list[Path]) -> list[str]:
    """Names folders as briefly as tells them apart. UserError for too many, for one that is given
    twice, and for one that holds neither a run nor an evaluation."""
    if not 1 <= len(folders) <= MOST:
        raise UserError(f"{len(folders)} folders: expected 1 to {MOST}")
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no folder '{folder}'")
        if not any((folder / name).exists() for name in ("metrics.jsonl", ROLLOUTS, NUMBERS)):
            raise UserError(
                f"no run and no evaluation in '{folder}': expected metrics.jsonl, {ROLLOUTS} or "
                f"{NUMBERS}"
            )
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < len(places):
        raise UserError("a folder is given twice: keep one of them")
    if len(folders) == 1:
        return [str(folders[0])]
    # the parts of their paths that all have are left out, in front and behind
    parts = [list(place.parts) for place in places]
    for end in (0, -1):
        while all(len(one) > 1 for one in parts) and len({one[end] for one in parts}) == 1:
            for one in parts:
                del one[end]
    return ["/".join(one) for one in parts]


def evaluations_of(folders: list[Path], names: list[str]) -> list[Evaluated]:
    """Reads the evaluations: those folders that are one, and the newest one in each run. Those that
    share problems are of one data set, wherever its file lay."""
    evaluations = []
    known = {}  # the problems of a data set
    for folder, name in zip(folders, names, strict=True):
        place = evaluation_in(folder)
        if place is None:
            continue
        one = comparing.evaluated(place)
        keys = comparing.problems_of(place).keys()
        data = next((data for data, others in known.items() if keys & others), one.data)
        known[data] = keys | known.get(data, set())
        evaluations.append(Evaluated(name, data, place, one.numbers))
    return evaluations


def evaluation_in(folder: Path) -> Path | None:
    """Finds the evaluation that a folder is, or the newest in it; None if there is none."""
    if (folder / NUMBERS).exists():
        return folder
    numbered = config.numbered_folders(folder / "eval")
    finished = [place for place in numbered if (place / NUMBERS).exists()]
    return finished[-1] if finished else None


def rollouts_of(folder: Path) -> Path:
    """Says whose rollouts are shown of a folder: those of its evaluation, else its own."""
    return evaluation_in(folder) or folder


def table_of_runs(folders: list[Path], names: list[str]) -> dict:
    """Makes the table of what runs logged last."""
    wanted = ("reward", "accuracy", "val_accuracy", "loss", "val_loss", "tool_call_rate")
    rows = []
    for folder, name in zip(folders, names, strict=True):
        logged = [
            run_page.finite_numbers(row) for row in run_page.steps_of(folder / "metrics.jsonl")
        ]
        if not logged:
            continue
        cells = [name, str(len(logged))]
        for key in wanted:
            values = [row[key] for row in logged if key in row]
            cells.append(f"{values[-1]:.4f}" if values else "")
        rows.append(cells)
    columns = ["run", "steps", *wanted]
    return {"title": "last step", "caption": "", "columns": columns, "rows": rows}


def target_of(save_to: str) -> Path:
    """Says which file the page is written to. UserError where none can be."""
    target = Path(save_to).expanduser()
    if not save_to or target.is_dir():
        raise UserError(f"save_to = {save_to!r}: expected a file, such as {SAVE_TO}")
    if not target.parent.is_dir():
        raise UserError(f"save_to = {save_to!r}: make the folder '{target.parent}' first")
    return target


def main(argv: list[str]) -> None:
    # 1. what is compared
    save_to, folders = config.split(argv, ("save_to",))
    target = target_of(save_to[-1].partition("=")[2] if save_to else SAVE_TO)
    for item in folders:
        if item.startswith("-"):
            raise UserError(f"cannot read {item!r}: write python report.py out/a out/b")
    if not folders:
        raise UserError("no folders: write python report.py out/a out/b")
    folders = [Path(item) for item in folders]
    names = names_of(folders)
    evaluations = evaluations_of(folders, names)

    # 2. the tables
    runs = table_of_runs(folders, names)
    if runs["rows"]:
        print_table(runs)
    differing = comparing.differing_settings(folders)
    if differing:
        rows = [[name, *(value or "" for value in values)] for name, *values in differing]
        columns = ["setting", *names]
        title = "settings that differ"
        print_table({"title": title, "caption": "", "columns": columns, "rows": rows})
    for shown in comparing.tables_of(evaluations):
        print_table(shown)
    pairs = comparing.compare_all(evaluations)
    if pairs:
        print_table(comparing.table_of_pairs(pairs))

    # 3. the page
    try:
        save_whole(target, page_of(folders))
    except OSError as error:
        raise UserError(config.disk_problem(error)) from None
    print(f"saved: {target}")


if __name__ == "__main__":
    config.main(main)

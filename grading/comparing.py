"""Evaluations and runs side by side: the same problems, what differs, and by how much.

    first, second = evaluated(Path("out/a/eval")), evaluated(Path("out/b/eval"))
    (pair,) = compare_all([first, second])  # difference, interval, what got better or worse

What makes two rollouts those of one problem is what was asked: the messages before the first answer
but for the system prompt, their images, and the right answer.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from grading.statistics import paired
from run import config
from run import page as run_page
from run.config import UserError
from run.evaluation import NUMBERS, ROLLOUTS, SETTINGS, begun_in

# What eval.json says of an evaluation and not of how good a model is: the caption of a table.
OF_EVALUATION = (
    "problems samples outcome not_graded pass_at seed temperature split rows category_column"
).split()
NOT_IN_TABLES = ("model", "data", "ci95_low", "ci95_high", "categories", "sources")
MOST_CHANGED = 200  # problems that are listed
MOST_PROBLEMS = 40  # problems whose rollouts are shown
LONGEST_SIDE = 20_000  # characters of one rollout


@dataclass
class Evaluated:
    """One evaluation: a model on a data set."""

    model: str
    data: str
    folder: Path
    numbers: dict | None = None  # those of eval.json; None: there are none
    missing: str = ""  # why


@dataclass
class Problem:
    """What was asked, and how the samples of it ended."""

    key: str
    group: int
    prompt: str
    answer: object
    outcomes: list[float] = field(default_factory=list)  # of the graded samples

    @property
    def average(self) -> float:
        return sum(self.outcomes) / len(self.outcomes)


def evaluated(folder: Path) -> Evaluated:
    """Reads the evaluation in a folder. UserError if there is none."""
    try:
        numbers = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
        return Evaluated(str(numbers["model"]), str(numbers["data"]), folder, numbers)
    except FileNotFoundError:
        raise UserError(f"no {NUMBERS} in '{folder}': give the folder of an evaluation") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {folder / NUMBERS} ({error})") from None


# ---- the same problems


def compare(
    first: Evaluated, second: Evaluated, before: dict[str, Problem], after: dict[str, Problem]
) -> dict:
    """Compares two evaluations problem by problem: the mean of the second minus that of the first,
    on the problems that both have graded. before, after: their problems."""
    shared = [key for key in before if key in after]
    shared = [key for key in shared if before[key].outcomes and after[key].outcomes]
    pair = {
        "data": first.data if first.data == second.data else f"{first.data}, {second.data}",
        "first": first.model,
        "second": second.model,
        "problems": len(shared),
        "only_one_has": len(before.keys() ^ after.keys()),
    }
    if not shared:
        return pair

    result = paired([before[key].average for key in shared], [after[key].average for key in shared])
    pair |= {"difference": result.difference, "ci95_low": result.low, "ci95_high": result.high}
    pair["method"] = result.method
    better = []
    worse = []
    for key in shared:
        old = before[key]
        new = after[key]
        changed = {
            "first_group": old.group,
            "second_group": new.group,
            "prompt": new.prompt,
            "answer": new.answer,
            "before": old.average,
            "after": new.average,
        }
        if new.average > old.average:
            better.append(changed)
        elif new.average < old.average:
            worse.append(changed)
    pair["better"] = len(better)
    pair["worse"] = len(worse)
    pair["which_better"] = better[:MOST_CHANGED]
    pair["which_worse"] = worse[:MOST_CHANGED]
    return pair


def compare_all(evaluations: list[Evaluated]) -> list[dict]:
    """Compares, on each data set, all pairs of up to four models; of more, each with the first."""
    pairs = []
    for data in dict.fromkeys(one.data for one in evaluations):
        there = [one for one in evaluations if one.data == data and one.numbers]
        problems = [problems_of(one.folder) for one in there]
        firsts = len(there) if len(there) <= 4 else 1
        for i in range(firsts):
            for j in range(i + 1, len(there)):
                pairs.append(compare(there[i], there[j], problems[i], problems[j]))
    return pairs


def problems_of(folder: Path) -> dict[str, Problem]:
    """Reads the problems of an evaluation, or of a run, by their keys: those of equal questions
    are told apart by their order."""
    problems: dict[str, Problem] = {}
    for key, row in keyed_rows(folder):
        if key not in problems:
            prompt = question_of(asked(row))
            problems[key] = Problem(key, row["group"], prompt, row.get("answer"))
        outcome = outcome_of(row)
        if outcome is not None:
            problems[key].outcomes.append(outcome)
    return problems


def keyed_rows(folder: Path) -> Iterator[tuple[str, dict]]:
    """Reads the rows of a rollouts.jsonl with the key of the problem of each."""
    keys: dict[tuple, str] = {}  # (step, group) -> its key
    counts: dict[str, int] = {}  # how often the same was asked, in one step or evaluation
    for row in run_page.each_row(folder / ROLLOUTS, constant=str):
        if not is_of_problem(row):
            continue
        step = row.get("step")
        place = (step, row["group"])
        if place not in keys:
            digest = digest_of_problem(row)
            number = counts.get((step, digest), 0)
            counts[step, digest] = number + 1
            keys[place] = f"{digest}-{number}"
        yield keys[place], row


def is_of_problem(row: dict) -> bool:
    """Says whether a row is a rollout with messages and rewards."""
    if type(row.get("group")) is not int or not isinstance(row.get("rewards"), dict):
        return False
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return False
    return all(isinstance(message, dict) and "content" in message for message in messages)


def outcome_of(row: dict) -> float | None:
    """Reads what says right or wrong: the first reward; None where that graded nothing."""
    outcome = next(iter(row["rewards"].values()), None)
    if not isinstance(outcome, int | float):
        return None
    try:
        return float(outcome) if math.isfinite(outcome) else None
    except OverflowError:  # an integer that no float holds
        return None


def asked(row: dict) -> list[dict]:
    """Takes the messages before the first answer, without the system prompt."""
    prompt = []
    for message in row["messages"]:
        if message.get("role") == "assistant":
            break
        if message.get("role") != "system":
            prompt.append(message)
    return prompt


def digest_of_problem(row: dict) -> str:
    """Makes a digest of what was asked: texts, images, and the right answer."""
    prompt = asked(row)
    images = sum(json.dumps(message["content"]).count('"type": "image"') for message in prompt)
    names = (row.get("images") or [])[:images]
    content = [[message.get("role"), message["content"]] for message in prompt]
    text = json.dumps([content, names, row.get("answer")], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def question_of(messages: list[dict]) -> str:
    """Writes what was asked as a text, cut to a few lines."""
    texts = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            parts = [part if isinstance(part, dict) else {"text": part} for part in content]
            content = " ".join(str(part.get("text", "(image)")) for part in parts)
        texts.append(str(content))
    text = "\n".join(texts)
    return text if len(text) <= 400 else f"{text[:400]} …"


# ---- tables


def average_of(numbers: dict) -> str:
    """Writes the average with its interval."""
    average = numbers.get(f"avg@{numbers.get('samples')}")
    if average is None:
        return "nothing graded"
    low = written(numbers.get("ci95_low"))
    high = written(numbers.get("ci95_high"))
    return f"{written(average)} ({low} - {high})"


def repeats_of_average(numbers: dict) -> set[str]:
    """Finds what is avg@n under another name, where it is: a table has it once, eval.json all."""
    average_name = f"avg@{numbers.get('samples')}"
    if average_name not in numbers:
        return set()
    average = numbers[average_name]
    names = {"accuracy", "reward", "pass@1", f"reward_{numbers.get('outcome')}"}
    return {name for name in names if name in numbers and numbers[name] == average}


def written(value) -> str:
    """Writes a number of a table."""
    if value is None:
        return "none"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def tables_of(evaluations: list[Evaluated]) -> list[dict]:
    """Makes a table of each data set: a column for each model, a row for each number, what is equal
    for all in the caption; and one of the averages by category, where there are categories."""
    tables = []
    for data in dict.fromkeys(one.data for one in evaluations):
        of_data = [one for one in evaluations if one.data == data]
        tables.append(_table(data, of_data))
        categories = _table_of_categories(data, of_data)
        if categories:
            tables.append(categories)
    return tables


def overview_of(evaluations: list[Evaluated]) -> dict:
    """Makes the table of all averages: a row for each model, a column for each data set."""
    by_place = {(one.model, one.data): one for one in evaluations}
    models = list(dict.fromkeys(one.model for one in evaluations))
    sets = list(dict.fromkeys(one.data for one in evaluations))
    rows = []
    for model in models:
        cells = []
        for data in sets:
            one = by_place.get((model, data))
            cells.append(_average_cell(one) if one else "")
        rows.append([model, *cells])
    return {"title": "all averages", "caption": "", "columns": ["model", *sets], "rows": rows}


def _average_cell(one: Evaluated) -> str:
    return average_of(one.numbers) if one.numbers else "missing"


def _table(data: str, evaluations: list[Evaluated]) -> dict:
    there = [one.numbers for one in evaluations if one.numbers]
    repeated = [repeats_of_average(numbers) for numbers in there]
    names = dict.fromkeys(name for numbers in there for name in numbers)
    equal = []
    rows = []
    for name in names:
        if name in NOT_IN_TABLES or (repeated and all(name in of_one for of_one in repeated)):
            continue
        values = [one.numbers.get(name) if one.numbers else None for one in evaluations]
        present = [numbers.get(name) for numbers in there]
        is_average = name.startswith("avg@")
        is_equal = all(value == present[0] for value in present)
        if name in OF_EVALUATION or (is_equal and len(evaluations) > 1 and not is_average):
            if is_equal:
                equal.append(f"{name} {written(present[0])}")
                continue
        cells = []
        for one, value in zip(evaluations, values, strict=True):
            if is_average:
                cells.append(_average_cell(one))
            else:
                cells.append(written(value) if one.numbers and name in one.numbers else "")
        rows.append([name, *cells])
    columns = ["metric", *(one.model for one in evaluations)]
    return {"title": data, "caption": ", ".join(equal), "columns": columns, "rows": rows}


def _table_of_categories(data: str, evaluations: list[Evaluated]) -> dict | None:
    by_model = [(one.numbers or {}).get("categories", {}) for one in evaluations]
    values = sorted({value for categories in by_model for value in categories})
    if not values:
        return None
    rows = []
    for value in values:
        counts = {categories[value]["problems"] for categories in by_model if value in categories}
        cells = []
        for categories in by_model:
            average = categories.get(value, {}).get("average")
            cells.append(written(average) if value in categories else "")
        rows.append([value, ", ".join(map(str, sorted(counts))), *cells])
    column = next(one.numbers["category_column"] for one in evaluations if one.numbers)
    columns = [column, "problems", *(one.model for one in evaluations)]
    return {"title": f"{data} by {column}", "caption": "", "columns": columns, "rows": rows}


def table_of_pairs(pairs: list[dict]) -> dict:
    """Makes the table of differences on the same problems."""
    rows = []
    for pair in pairs:
        cells = [pair["data"], f"{pair['second']} - {pair['first']}", str(pair["problems"])]
        if pair["problems"]:
            cells.append(f"{pair['difference']:+.4f}")
            cells.append(f"{pair['ci95_low']:+.4f} to {pair['ci95_high']:+.4f}")
            cells += [str(pair["better"]), str(pair["worse"])]
        else:
            cells += ["no problem in common", "", "", ""]
        rows.append(cells)
    columns = ["data", "models", "problems", "difference", "95 % interval", "better", "worse"]
    methods = sorted({pair["method"] for pair in pairs if "method" in pair})
    caption = f"intervals: {'; '.join(methods)}" if methods else ""
    return {"title": "the same problems", "caption": caption, "columns": columns, "rows": rows}


# ---- the page


def page(title: str, data: dict) -> str:
    """Fills run/compare.html: one page that loads nothing, and on which every text is text."""
    # a browser's JSON has no NaN and no Infinity: they become texts
    plain = json.loads(json.dumps({"title": title} | data), parse_constant=str)
    # ASCII, and no "<": no text of a model can end the script element that it stands in
    text = json.dumps(plain, separators=(",", ":")).replace("<", "\\u003c")
    template = (config.HERE / "run" / "compare.html").read_text(encoding="utf-8")
    return template.replace("{{data}}", text)


def data_of_evaluations(evaluations: list[Evaluated]) -> dict:
    """Makes what the page shows of evaluations."""
    pairs = compare_all(evaluations)
    return {
        "overview": overview_of(evaluations),
        "tables": tables_of(evaluations),
        "pairs": pairs,
        "differences": table_of_pairs(pairs) if pairs else None,
        "missing": [
            {"model": one.model, "data": one.data, "why": one.missing}
            for one in evaluations
            if one.missing
        ],
    }


def data_of_runs(folders: list[Path], names: list[str]) -> dict:
    """Makes what the page shows of the curves of runs and of what they were told."""
    runs = []
    for folder, name in zip(folders, names, strict=True):
        rows = [run_page.finite_numbers(row) for row in run_page.steps_of(folder / "metrics.jsonl")]
        runs.append({"name": name, "metrics": run_page.points_of(rows) if rows else {}})
    return {"runs": runs, "settings": differing_settings(folders)}


def settings_in(folder: Path) -> dict[str, str]:
    """Reads the settings of a run, or of an evaluation, as python text."""
    begun = begun_in(folder) if (folder / SETTINGS).exists() else None
    if not begun:
        return {name: value for name, value, _ in run_page.settings_of(folder / "config.py")}
    settings = {}
    for name, value in begun["settings"].items():
        settings[name] = repr(tuple(value) if isinstance(value, list) else value)  # as a config has
    return settings


def differing_settings(folders: list[Path]) -> list[list[str | None]]:
    """Lists the settings that are not the same in all folders that have them: [name, value in each
    folder]; None where it has none, and no row where only one has it."""
    all_settings = [settings_in(folder) for folder in folders]
    names = dict.fromkeys(name for settings in all_settings for name in settings)
    rows = []
    for name in names:
        values = {settings[name] for settings in all_settings if name in settings}
        if len(values) > 1:
            rows.append([name, *(settings.get(name) for settings in all_settings)])
    return rows


def rollouts_side_by_side(folders: list[Path]) -> list[dict]:
    """Collects the rollouts of the problems that several folders have, those first that ended
    differently; of a run the last one of each problem."""
    # 1. which problems
    of_folders = [problems_of(folder) for folder in folders]
    counts: dict[str, list[Problem]] = {}
    for problems in of_folders:
        for key, problem in problems.items():
            counts.setdefault(key, []).append(problem)
    needed = min(2, len(folders))
    shared = [key for key, found in counts.items() if len(found) >= needed]

    def likeness(key: str) -> int:
        averages = {problem.average for problem in counts[key] if problem.outcomes}
        return len(averages) < 2

    chosen = sorted(shared, key=likeness)[:MOST_PROBLEMS]  # sorting keeps the order of equal ones

    # 2. their rollouts
    shown = {key: [[] for _ in folders] for key in chosen}
    for place, folder in enumerate(folders):
        for key, row in keyed_rows(folder):
            if key in shown:
                sides = shown[key][place]
                if row.get("step") is not None:
                    sides.clear()  # of an earlier step
                if len(sides) < 4:
                    sides.append(side_of(row))
    problems = []
    for key in chosen:
        problem = counts[key][0]
        problems.append({"prompt": problem.prompt, "answer": problem.answer, "sides": shown[key]})
    return problems


def side_of(row: dict) -> dict:
    """Makes what the page shows of a rollout: its text, by what each part of it is."""
    parts = []
    if row.get("ids") and run_page.is_rollout(row):
        shown = run_page.shown_of(row)
        for kind, piece in zip(shown["kinds"], shown["pieces"], strict=True):
            if parts and parts[-1][0] == kind:
                parts[-1][1] += piece
            else:
                parts.append([kind, piece])
    else:  # of an API
        kinds = {"assistant": "t", "tool": "o"}
        for message in row["messages"]:
            text = question_of([message]) if isinstance(message["content"], list) else ""
            text = text or str(message["content"])
            if message.get("tool_calls"):
                text += json.dumps(message["tool_calls"])
            parts.append([kinds.get(message.get("role"), "c"), f"{text}\n"])
    room = LONGEST_SIDE
    cut = []
    for kind, text in parts:
        cut.append([kind, text[:room]])
        room -= len(text)
        if room <= 0:
            cut.append(["c", " … (cut)"])
            break
    rewards = {name: value for name, value in row["rewards"].items()}
    about = {name: row.get(name) for name in ("step", "group", "sample", "stop", "reward")}
    return about | {"rewards": rewards, "parts": cut}

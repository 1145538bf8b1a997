"""Pins report.py: what it compares, what it refuses, and that model text stays text on its page.

pytest tests/test_compare.py
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import report
from grading import comparing
from run import config
from run.config import UserError

HOSTILE = (
    "</script><img src=x onerror=\"document.title='hacked'\"><!-- <script>alert(1)</script> \u2028"
)


def row(group, outcome, said="so", sample=0, prompt=None, **more) -> dict:
    """A line of rollouts.jsonl."""
    prompt = f"question {group}" if prompt is None else prompt
    messages = [
        {"role": "system", "content": f"you are {said}"},
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": said},
    ]
    values = {"group": group, "sample": sample, "stop": "answered", "reward": outcome}
    values |= {"rewards": {"correct": outcome}, "answer": "4", "messages": messages, "calls": []}
    values |= {"ids": [1, 2], "mask": [0, 1], "kinds": "ct", "turn_starts": [1]}
    values |= {"pieces": [prompt, said], "logprobs": [0.0, -1.0], "advantages": None}
    return values | more


def an_evaluation(folder, outcomes, data="task:calc", said="so", **more) -> Path:
    folder.mkdir(parents=True)
    rows = [row(group, outcome, said) for group, outcome in enumerate(outcomes)]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    average = sum(outcomes) / len(outcomes)
    numbers = {"model": said, "data": data, "problems": len(outcomes), "samples": 1}
    numbers |= {"outcome": "correct", "avg@1": average, "ci95_low": 0.1, "ci95_high": 0.9}
    numbers |= {"pass_at": 1.0, "accuracy": average, "turns": 2.0} | more
    (folder / "eval.json").write_text(json.dumps(numbers))
    begun = {"settings": {"model": said, "temperature": 0.0}}
    begun |= {"problems": len(outcomes), "outcomes": {"": "correct"}}  # what an evaluation writes
    (folder / "settings.json").write_text(json.dumps(begun))
    return folder


def a_run(folder, steps, **settings) -> Path:
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": step, "reward": step / 10, "loss": 1.0}) for step in range(steps)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 99, "rew')  # torn
    (folder / "config.py").write_text("".join(f"{k} = {v!r}\n" for k, v in settings.items()))
    rows = [row(0, step % 2, f"at {step}", step=step) for step in range(steps)]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def data_of(page: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


def test_two_evaluations_are_compared_problem_by_problem(tmp_path):
    first = an_evaluation(tmp_path / "a" / "eval", [0, 0, 1, 1, 0, 1], said="a")
    second = an_evaluation(tmp_path / "b" / "eval", [1, 1, 1, 0, 0, 1], said="b")
    shown = data_of(report.page_of([first, second]))
    assert shown["names"] == ["a", "b"]
    (pair,) = shown["pairs"]
    assert (pair["better"], pair["worse"], pair["problems"]) == (2, 1, 6)
    assert pair["difference"] == pytest.approx(1 / 6)
    assert [one["prompt"] for one in pair["which_worse"]] == ["question 3"]
    assert [one["second_group"] for one in pair["which_better"]] == [0, 1]
    assert shown["settings"] == [["model", "'a'", "'b'"]]
    # those that ended differently are shown first, both sides of each
    assert [p["prompt"][-1] for p in shown["problems"]][:3] == ["0", "1", "3"]
    sides = shown["problems"][0]["sides"]
    assert sides[0][0]["parts"] == [["c", "question 0"], ["t", "a"]]
    # what is equal stands once
    (table,) = shown["tables"]
    assert "problems 6" in table["caption"] and "turns 2.0000" in table["caption"]
    assert [row[0] for row in table["rows"]] == ["avg@1"]


def test_problems_are_told_by_what_was_asked_and_not_by_their_number(tmp_path):
    for name, order in (("a", "xyzx"), ("b", "zyxx")):
        folder = an_evaluation(tmp_path / name, [1] * 4)
        rows = [row(i, float(q == "y"), prompt=q) for i, q in enumerate(order)]
        (folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (pair,) = comparing.compare_all([comparing.evaluated(tmp_path / name) for name in "ab"])
    assert (pair["problems"], pair["better"], pair["worse"]) == (4, 0, 0)  # x is there twice
    assert pair["ci95_low"] < 0 == pair["difference"] < pair["ci95_high"]


def test_those_without_a_problem_in_common_or_a_grade_have_no_difference(tmp_path):
    first = an_evaluation(tmp_path / "a", [1, 0])
    second = an_evaluation(tmp_path / "b", [1, 1])
    rows = [row(0, None), row(5, 1)]
    (second / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (pair,) = comparing.compare_all([comparing.evaluated(first), comparing.evaluated(second)])
    assert pair["problems"] == 0 and "difference" not in pair
    (line,) = comparing.table_of_pairs([pair])["rows"]
    assert "no problem in common" in line
    report.page_of([first, second])


def test_runs_of_unlike_lengths_with_torn_lines(tmp_path):
    folders = [a_run(tmp_path / f"r{n}", n * 3 + 1, seed=n, loss="dapo") for n in range(8)]
    shown = data_of(report.page_of(folders))
    assert [len(run["metrics"]["step"]) for run in shown["runs"]] == [1, 4, 7, 10, 13, 16, 19, 22]
    assert shown["settings"] == [["seed", *map(str, range(8))]] and "tables" not in shown
    (problem,) = shown["problems"]  # of each run the last rollout
    assert [side[0]["step"] for side in problem["sides"]] == [0, 3, 6, 9, 12, 15, 18, 21]
    with pytest.raises(UserError, match="9 folders: expected 1 to 8"):
        report.page_of([*folders, tmp_path])


def test_a_run_has_its_newest_evaluation(tmp_path):
    run = a_run(tmp_path / "a", 2)
    an_evaluation(run / "eval", [0, 0])
    an_evaluation(run / "eval-2", [1, 1])
    (run / "eval-3").mkdir()
    shown = data_of(report.page_of([run]))
    assert shown["tables"][0]["rows"][-1] != [] and shown["pairs"] == []
    assert "1.0000" in json.dumps(shown["overview"])


def test_what_is_no_run_is_refused(tmp_path):
    run = a_run(tmp_path / "a", 2)
    (tmp_path / "empty").mkdir()
    for folders, says in (
        ([], "0 folders"),
        ([tmp_path / "none"], "no folder"),
        ([tmp_path / "empty"], "no run and no evaluation in"),
        ([run, tmp_path / "a" / ".." / "a"], "given twice"),
    ):
        with pytest.raises(UserError, match=says):
            report.page_of(folders)
    (tmp_path / "empty" / "eval.json").write_text('{"model":')
    with pytest.raises(UserError, match="cannot read"):
        report.page_of([tmp_path / "empty"])


@pytest.mark.parametrize(
    "save_to, says",
    [
        ("", "expected a file, such as compare.html"),
        (".", "expected a file"),
        ("none/x.html", "make the folder 'none' first"),
        ("/proc/x.html", "cannot use '/proc/x.html"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_in_a_sentence(
    tmp_path, monkeypatch, save_to, says
):
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "a", 2)
    with pytest.raises(UserError, match=says):
        report.main(["a", f"--save_to={save_to}"])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "text", ["", "null\n[]\n3\n", '{"group": 0}\n{"group": [], "rewards": {}, "messages": []}\n']
)
def test_files_of_nothing_make_a_page(tmp_path, text):
    folder = an_evaluation(tmp_path / "a", [1])
    (folder / "rollouts.jsonl").write_text(text)
    (folder / "metrics.jsonl").write_text(text)
    (folder / "config.py").write_text("seed = (\n")
    assert data_of(report.page_of([folder]))["problems"] == []


def test_odd_numbers_and_contents_make_a_page_that_a_browser_reads(tmp_path):
    folder = an_evaluation(tmp_path / "a", [1], odd=float("nan"))
    rows = [row(0, 1.0), row(1, 1.0), row(2, 1.0), row(3, 10**400)]
    rows[1]["messages"][1]["content"] = ["text", {"type": "image"}, 3]
    lines = [json.dumps(r) for r in rows] + [json.dumps(row(4, 1.0)).replace("1.0", "1e999")]
    (folder / "rollouts.jsonl").write_text("\n".join(lines) + "\n")

    def refuse(constant):
        raise AssertionError(constant)

    page = report.page_of([folder])
    (text,) = re.findall(r'id="data">(.*?)</script>', page, re.S)
    assert len(json.loads(text, parse_constant=refuse)["problems"]) == 5
    (folder / "eval.json").write_text('{"model": "m", "data": "d", "samples": 1, "avg@1": 0.5}')
    assert "0.5000 (none - none)" in report.page_of([folder])


def test_the_command_prints_tables_and_writes_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    an_evaluation(a_run(Path("out/a"), 3, seed=0) / "eval", [0, 1, 0, 0], said="[red]a")
    an_evaluation(a_run(Path("out/b"), 5, seed=1) / "eval", [1, 1, 1, 0], said="b\x1b[2J")
    report.main(["out/a", "out/b", "--save_to=x.html"])
    said = capsys.readouterr().out
    assert "settings that differ" in said and "b - a" in said and "+0.5000" in said
    assert "last step" in said and "0.4000" in said and "\x1b[2J" not in said
    assert Path("x.html").read_text().startswith("<!doctype html>")
    with pytest.raises(UserError, match="no folders: write python report.py"):
        report.main([])
    with pytest.raises(UserError, match="cannot read '--svae_to=y'"):
        report.main(["out/a", "--svae_to=y"])


def hostile_page(tmp_path) -> str:
    for name, outcomes in (("a", [1, 0]), ("b", [0, 1])):
        folder = an_evaluation(tmp_path / name, outcomes, data=HOSTILE, said=HOSTILE)
        numbers = json.loads((folder / "eval.json").read_text())
        numbers |= {HOSTILE: 0.5, "category_column": HOSTILE}
        category = {"problems": 2, "average": 0.5}
        numbers["categories"] = {HOSTILE: category}
        (folder / "eval.json").write_text(json.dumps(numbers))
        rows = [row(i, o, HOSTILE, prompt=f"{i}{HOSTILE}") for i, o in enumerate(outcomes)]
        rows = [r | {"stop": HOSTILE, "answer": HOSTILE} for r in rows]
        (folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        metrics = json.dumps({"step": 0, HOSTILE: 1.0}) + "\n"
        (folder / "metrics.jsonl").write_text(metrics)
    return report.page_of([tmp_path / "a", tmp_path / "b"])


def test_what_a_model_writes_ends_no_script_element(tmp_path):
    page = hostile_page(tmp_path)
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert "onerror=" in page and "<img" not in page
    assert data_of(page)["problems"][0]["sides"][0][0]["stop"] == HOSTILE


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_in_a_browser_it_stays_text(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(hostile_page(tmp_path))
    argv = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    argv += [f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100)
    body = done.stdout.partition("<main>")[2].partition("</main>")[0]
    assert "problem 1 of 2" in body and "&lt;/script&gt;&lt;img src=x" in body
    assert "<img" not in body and "<script" not in body and "hacked ·" not in done.stdout
    assert body.count("<path") > 5  # the curves


def test_the_page_loads_nothing():
    template = (config.HERE / "run" / "compare.html").read_text()
    places = re.findall(r"https?://|src=|href=|url\(", template)
    assert places == [] and "default-src 'none'" in template

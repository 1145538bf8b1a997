"""The generated tasks: that held-out problems are held out, that demonstrations say what the tools
say, that they are imperfect, and that the oracle of each task is right.

    pytest tests/test_tasks.py
"""

import asyncio
import importlib
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

import rewards
from run.config import UserError
from tasks import facts, multi, shop
from tools import Toolbox
from trajectory import ToolCall

ROOT = Path(__file__).parent.parent
TASKS = {
    "calc": ("python",),
    "facts": ("search",),
    "shop": ("sql",),
    "multi": ("python", "search", "sql"),
}


@pytest.fixture(params=sorted(TASKS))
def task(request):
    return importlib.import_module(f"tasks.{request.param}")


def toolbox(task):
    tools = TASKS[task.__name__.removeprefix("tasks.")]
    options = ("search.corpus=task:facts", "search.k=1") if "search" in tools else ()
    return Toolbox(tools, options=options)


def play(task, conversations):
    """What the tools say to the calls of each (example, messages), in order."""

    async def one(box, example, messages):
        session = box.open(example)
        calls = [c["function"] for m in messages for c in m.get("tool_calls", ())]
        said = [await session.call(c["name"], c["arguments"]) for c in calls]
        await session.close()
        return [(content, error) for content, error, _ in said]

    async def every():
        box = toolbox(task)
        said = [await one(box, *conversation) for conversation in conversations]
        await box.close()
        return said

    return asyncio.run(every())


def ended(messages):
    """What the reward sees of a trajectory that ended with these messages, prompt first."""
    return SimpleNamespace(messages=messages, stop="answered", answer=None)


def reward(messages, example):
    example = {"id": 0, "messages": messages[:1], **example}
    return rewards.correct(ended(messages), example)


def test_rows_are_always_the_same_for_a_seed_and_others_for_another(task):
    assert task.rows("test", 0, 50) == task.rows("test", 0, 50)
    assert task.rows("test", 0, 50) != task.rows("test", 1, 50)
    assert task.demos(50, 0) == task.demos(50, 0) != task.demos(50, 1)
    assert len(task.rows("test")) == 512


def test_another_split_is_refused(task):
    with pytest.raises(UserError, match="has train and test"):
        task.rows("tset")


def test_no_held_out_question_is_trained_on(task):
    held_out = {row["prompt"] for row in task.rows("test")}
    assert held_out.isdisjoint(row["prompt"] for row in task.rows("train"))
    assert held_out.isdisjoint(demo[0]["content"] for demo in task.demos(9600))


def test_no_held_out_person_product_or_town_of_the_question_is_in_a_demonstration_of_facts():
    shown = "\n".join(m["content"] for demo in facts.demos(2000) for m in demo[:1])
    asked = [line for line in shown.splitlines() if not line.startswith("Repeat")]
    held_out = {row["name"] for row in facts.rows("test")}
    assert not [line for line in asked if any(name in line for name in held_out)]


def test_the_oracle_is_right_and_its_calls_run(task):
    rows = task.rows("test", 0, 60)
    turns = [task.oracle(row) for row in rows]
    results = play(task, list(zip(rows, turns, strict=True)))
    for row, messages, said in zip(rows, turns, results, strict=True):
        assert [error for _, error in said] == [None] * (len(messages) - 1)
        assert said[-1][0].splitlines()[-1] == row["answer"] or row["answer"] in said[-1][0]
        prompt = [{"role": "user", "content": row["prompt"]}]
        assert reward(prompt + messages, row) == 1.0


def test_demonstrations_show_what_the_tools_say(task):
    demos = [demo for demo in task.demos(120) if any(m["role"] == "tool" for m in demo)]
    example = {"database": shop.database()}
    said = play(task, [(example, demo) for demo in demos])
    wrong = []
    for demo, results in zip(demos, said, strict=True):
        shown = [m["content"] for m in demo if m["role"] == "tool"]
        # the first name alone finds any of that name: the demonstration has one of them
        calls = [c["function"]["arguments"] for m in demo for c in m.get("tool_calls", ())]
        vague = [" " not in arguments.get("query", "a b") for arguments in calls]
        wrong += [
            (call, a, b)
            for call, a, (b, _), skip in zip(calls, shown, results, vague, strict=True)
            if a != b.strip() and not skip
        ]
    assert len(demos) > 20 and not wrong


def test_demonstrations_are_imperfect(task):
    rows = {row["prompt"]: row for row in task.rows("train", 0, 20_000)}
    demos = [demo for demo in task.demos(9600) if demo[0]["content"] in rows]
    scores = [reward(demo, rows[demo[0]["content"]]) for demo in demos]
    assert len(scores) > 100
    assert 0.2 < sum(scores) / len(scores) < 0.7


def test_a_name_that_is_held_out_is_made_of_known_words():
    trained = {word for name in facts.NAMES if not facts.held_out(name) for word in name.split()}
    assert {word for name in facts.NAMES for word in name.split()} == trained


# ---- shop


def test_the_database_is_made_once_and_is_whole(tmp_path):
    code = "from tasks import shop; print(shop.database())"
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    paths = {run.communicate()[0].strip() for run in runs}
    (path,) = paths
    assert Path(path).is_relative_to(tmp_path) and Path(path).parent.stat().st_mode & 0o077 == 0
    assert [p.name for p in Path(path).parent.iterdir()] == [Path(path).name]
    with closing(sqlite3.connect(path)) as connection:
        for name, (_, rows) in shop.tables().items():
            assert connection.execute(f"SELECT * FROM {name}").fetchall() == rows


def test_a_folder_that_is_somebody_elses_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shop.tempfile, "gettempdir", lambda: str(tmp_path))
    uid = os.getuid()
    (tmp_path / f"nanotool-{uid + 1}").mkdir()
    monkeypatch.setattr(shop.os, "getuid", lambda: uid + 1)
    with pytest.raises(UserError, match="somebody else's"):
        shop.database.__wrapped__()


# ---- multi


def called(*names):
    calls = [ToolCall(0, name, {}, "", error, 0.0) for name, error in names]
    return SimpleNamespace(calls=calls)


@pytest.mark.parametrize(
    ("calls", "needed", "value"),
    [
        ([("sql", None)], ["sql"], 1.0),
        ([("sql", None), ("sql", None)], ["sql"], 1.0),
        ([("sql", "exception"), ("sql", None)], ["sql"], 1.0),
        ([("calculator", "unknown_tool"), ("sql", None)], ["sql"], 1.0),
        ([], ["sql"], 0.0),
        ([("calculator", "unknown_tool")], ["sql"], 0.0),
        ([("python", None)], ["sql"], 0.0),
        ([("python", None), ("sql", None)], ["sql"], 0.0),
        ([("sql", None), ("python", None)], ["sql", "python"], 1.0),
        ([("python", None), ("sql", None)], ["sql", "python"], 0.0),
        ([("sql", None)], ["sql", "python"], 0.0),
    ],
)
def test_the_right_tools_are_those_of_the_row_in_its_order(calls, needed, value):
    assert multi.right_tool(called(*calls), {"tool": needed}) == value


def test_the_right_tool_is_a_reward_of_weight_0():
    selected = rewards.select(("correct", "tasks/multi.py:right_tool:0"))
    assert selected["right_tool"][1] == 0.0
    assert rewards.total({"correct": 1.0, "right_tool": 0.0}, selected) == 1.0


def test_the_oracle_of_multi_calls_the_tools_of_its_row_and_every_part_is_there():
    rows = multi.rows("test")
    assert {row["part"] for row in rows} == {"calc", "facts", "shop", "bill", "town"}
    for row in rows:
        names = [c["function"]["name"] for m in multi.oracle(row) for c in m.get("tool_calls", ())]
        assert names == row["tool"]


def test_whose_town_is_asked_for_is_no_customer():
    """Else sql alone could find the town, and two ways were right."""
    asked = {row["x"] for row in multi.rows("train") if row["part"] == "town"}
    assert asked and asked.isdisjoint(shop.CUSTOMERS)

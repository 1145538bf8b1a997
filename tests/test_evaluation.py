"""Pins what a killed evaluation leaves, and that it goes on to the numbers of one that was not.

pytest tests/test_evaluation.py
"""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from test_endpoint import api, say  # noqa: F401

import evaluate
from grading import statistics
from learning import model as models
from run import config, evaluation
from run.config import UserError
from run.evaluation import fault_of, trajectory_of
from tasks import tiny as tiny_model
from trajectory import ToolCall, Trajectory, UserTurn

HANGS = 120  # seconds after which a process is taken for one that hangs
PROBLEMS = 8
REWARDS = """
def spread(trajectory, example):
    return sum(trajectory.ids) % 11 / 10

def apart(group, example):
    return [float(sum(t.ids) == max(sum(other.ids) for other in group)) for t in group]

def sometimes(trajectory, example):
    return None if example["prompt"] in open("away").read().split() else 1.0
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A folder with a model of nothing, rows, rewards and two sources of a mix."""
    folder = tmp_path_factory.mktemp("evaluation")
    models.save(tiny_model.tiny(tokenizer, 0, 16, layers=1), tokenizer, folder / "base")
    (folder / "mine.py").write_text(REWARDS)
    (folder / "away").write_text("")
    kinds = ("short", "long")
    rows = [{"prompt": f"{n}+1", "answer": "4", "kind": kinds[n % 2]} for n in range(PROBLEMS)]
    for name in ("rows", "others"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
        source = f'data = "{name}.jsonl"\ntools = ()\nrewards = ("mine.py:spread",)\n'
        (folder / f"{name}.py").write_text(source + "max_new_tokens = 5\n")
    (folder / "both.py").write_text('mix = ("rows.py", "others.py")\n')
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "away").write_text("")
    return place


def argv_of(save_to, *more):
    plain = ["--model=base", "--config", "rows.py", "--max_tokens=200"]
    if "--resume=true" not in more:  # it may differ
        plain.append("--batch=3")
    return [*plain, f"--save_to={save_to}", *more]


SAMPLED = ("--n=3", "--k=1,2,3", "--temperature=1")


def evaluated(save_to, *more) -> dict:
    """The numbers of an evaluation in this process."""
    mine, others = config.split(argv_of(save_to, *more), evaluate.Config.__dataclass_fields__)
    given = config.parse(evaluate.Config, mine, evaluate.check)
    return evaluate.evaluate(evaluate.load_config(others, given), given)


def lines(save_to) -> list[dict]:
    text = Path(save_to, "rollouts.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def without_times(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


# ---- kills


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def play_until(point: str, call: int, argv: list[str], folder: str) -> None:
    """Evaluates, and is killed at the `call`th time that it comes to a point; in a process."""
    os.chdir(folder)
    count = 0

    def is_now() -> bool:
        nonlocal count
        count += 1
        return count == call

    write = evaluation.run_log.write_rollouts
    save = evaluation.save_whole

    def write_or_die(path, trajectories, tokenizer, **columns):
        if point == "before a line" and is_now():
            die()
        write(path, trajectories, tokenizer, **columns)
        if point == "in a line" and is_now():
            os.truncate(path, os.path.getsize(path) - 40)
            die()
        if point == "behind a line" and is_now():
            die()

    def save_or_die(file, text):
        if file.name == point:
            file.with_name(file.name + ".new").write_text(text[: len(text) // 2])
            die()
        save(file, text)

    evaluation.run_log.write_rollouts = write_or_die
    evaluation.save_whole = save_or_die
    evaluate.main(argv)


@pytest.fixture(scope="module")
def killed(place):
    """killed(point, call, argv): evaluates in a process that is killed there."""
    context = multiprocessing.get_context("forkserver")
    modules = ["evaluate", "transformers.models.qwen3.modeling_qwen3", "jinja2.sandbox"]
    context.set_forkserver_preload([*modules, Path(__file__).stem])
    paths = [str(config.HERE), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]

    def play(point, call, argv):
        child = context.Process(target=play_until, args=(point, call, argv, str(place)))
        child.start()
        child.join(HANGS)
        child.kill()
        child.join()
        return child.exitcode

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        yield play


@pytest.mark.parametrize("sampling", [(), SAMPLED], ids=["greedy", "temperature 1"])
def test_killed_at_five_random_moments_it_ends_with_the_same_bytes(sampling, here, killed):
    """Evaluation 1: each kill is of an evaluation that goes on behind the last one."""
    name = f"killed{len(sampling)}"
    evaluated(f"{name}_whole", *sampling)
    total = len(lines(f"{name}_whole"))
    rng = random.Random(len(sampling))
    points = ("before a line", "in a line", "behind a line")
    there = 0
    for _ in range(5):
        call = rng.randint(1, max(1, (total - there) // 4))
        argv = argv_of(name, *sampling, "--resume=true")
        assert killed(rng.choice(points), call, argv) == -signal.SIGKILL
        file = Path(name, "rollouts.jsonl")
        there = file.read_bytes().count(b"\n") if file.exists() else 0
        assert there < total and not Path(name, "eval.json").exists()
    assert there > 0
    numbers = evaluated(name, *sampling, "--resume=true")
    assert numbers["problems"] == PROBLEMS
    whole, ours = (Path(folder, "eval.json").read_bytes() for folder in (f"{name}_whole", name))
    assert whole == ours
    assert without_times(lines(f"{name}_whole")) == without_times(lines(name))


def test_killed_before_the_first_and_while_eval_json_is_written(here, killed, capfd):
    whole = evaluated("twice_whole", *SAMPLED)
    for point in ("settings.json", "before a line", "eval.json", "eval.json"):
        argv = argv_of("twice", *SAMPLED, "--resume=true")
        assert killed(point, 1, argv) == -signal.SIGKILL
        assert not Path("twice", "eval.json").exists()
    assert Path("twice", "eval.json.new").exists() and len(lines("twice")) == 3 * PROBLEMS
    with open("twice/rollouts.jsonl", "ab") as file:
        file.write(b'{"group": 3, "sam')  # torn
    capfd.readouterr()
    again = evaluated("twice", *SAMPLED, "--resume=true")
    assert again | {"saved": ""} == whole | {"saved": ""}
    said = capfd.readouterr().err
    assert "its last line was torn by a kill" in said and "24 of 24 trajectories are there" in said
    assert Path("twice", "eval.json").read_bytes() == Path("twice_whole/eval.json").read_bytes()
    names = sorted(file.name for file in Path("twice").iterdir())
    assert names == ["eval.json", "rollouts.jsonl", "settings.json"]


def test_what_is_there_is_not_played_again_and_needs_no_model(here, monkeypatch):
    whole = evaluated("there", *SAMPLED)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "open_player", None)
        assert evaluated("there", *SAMPLED, "--resume=true") == whole
        few = evaluated("there", *SAMPLED[:1], "--k=3", SAMPLED[2], "--resume=true")
    assert "pass@1" not in few and few["pass@3"] == whole["pass@3"]

    # 5 lines are lost: these alone are played
    kept = [line for i, line in enumerate(open("there/rollouts.jsonl")) if i not in range(4, 9)]
    Path("there/rollouts.jsonl").write_text("".join(kept))
    played = []
    append = evaluation.Record.append

    def note(record, trajectory, *arguments, **columns):
        played.append((trajectory.group, trajectory.sample))
        append(record, trajectory, *arguments, **columns)

    monkeypatch.setattr(evaluation.Record, "append", note)
    assert evaluated("there", *SAMPLED, "--resume=true") == whole
    assert sorted(played) == [(1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]


def test_rewards_that_compare_a_group_see_all_of_it_again(here, monkeypatch):
    rewards = "--rewards=mine.py:apart"
    whole = evaluated("compared", *SAMPLED, rewards)
    assert 0 < whole["avg@3"] < 1
    kept = [line for i, line in enumerate(open("compared/rollouts.jsonl")) if i not in (4, 11)]
    Path("compared/rollouts.jsonl").write_text("".join(kept))
    assert evaluated("compared", *SAMPLED, rewards, "--resume=true") == whole
    assert [(row["group"], row["sample"]) for row in lines("compared")] == [
        (group, sample) for group in range(PROBLEMS) for sample in range(3)
    ]


def test_what_ended_by_a_fault_is_played_again(here):
    """A judge that was away: those that it did not grade."""
    rewards = "--rewards=mine.py:sometimes"
    whole = evaluated("graded", rewards)
    Path("away").write_text("3+1 5+1")
    numbers = evaluated("away_then", rewards)
    assert (numbers["not_graded"], numbers["faults"]) == (2, 2)
    Path("away").write_text("")
    numbers = evaluated("away_then", rewards, "--resume=true")
    assert numbers | {"saved": ""} == whole | {"saved": ""} and "faults" not in numbers
    assert len(lines("away_then")) == PROBLEMS


def test_which_ends_are_faults():
    def ended(stop="answered", rewards=(("correct", 1.0),), **more):
        return fault_of(Trajectory({}, stop=stop, rewards=dict(rewards), **more))

    for stop in ("answered", "length", "max_turns", "max_tool_calls", "timeout", "placeholder"):
        assert not ended(stop)
    assert ended("error") and ended(failure="it broke")
    assert ended(reward_timeouts=["judge"]) and ended(rewards=(("correct", None),))
    assert not ended(rewards=(("correct", 0.0), ("side", None)))


def test_behind_an_api_only_what_it_refused_is_asked_again(api, tmp_path):  # noqa: F811
    """And what it takes no part of, here a seed, is still told when nothing is asked."""
    rows = [{"prompt": f"{n} + 4?", "answer": str(n + 4)} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refuses = True

    def script(asked):
        if "seed" in asked:
            return 400, {"error": {"message": "seed is not supported"}}
        text = asked["messages"][-1]["content"]
        if refuses and text == "2 + 4?":
            return 400, {"error": {"message": "content policy"}}
        return say(f"\\boxed{{{eval(text[:5])}}}") if "?" in text else say("Hello.")

    api.script = script
    argv = [f"--endpoint={api.url}", "--model=gpt", f"--data={tmp_path / 'rows.jsonl'}"]
    argv += ["--tools=", f"--save_to={tmp_path / 'out'}"]

    def numbers(*more):
        evaluate.main([*argv, *more])
        return json.loads((tmp_path / "out" / "eval.json").read_text())

    first = numbers()
    assert (first["avg@1"], first["refused"], first["faults"]) == (0.75, 1, 1)
    refuses = False
    api.requests.clear()
    second = numbers("--resume=true")
    asked = [request["messages"][-1]["content"] for request in api.requests]
    assert set(asked) == {"2 + 4?"} and second["avg@1"] == 1.0 and second["new_tokens"] == 7
    assert "refused" not in second and "faults" not in second
    api.requests.clear()
    assert numbers("--resume=true") == second and second["not_sent"] == "seed"
    assert api.requests == []


def test_what_a_checkpoint_holds_of_a_trajectory_is_plain():
    """Also what the user of an environment said."""
    t = Trajectory({"id": 0}, calls=[ToolCall(0, "a", {}, "b", None, 0.1)])
    t.user_turns = [UserTurn(0, "Go on.", [1])]
    values = json.loads(json.dumps(t.plain()))
    again = Trajectory.of_plain(values, t.example, [])
    assert again.user_turns == t.user_turns and again.calls == t.calls


def test_a_mix_goes_on_too(here, killed):
    argv = [*argv_of("mixed", "--temperature=1", "--resume=true", "--max_new_tokens=5")]
    argv[argv.index("rows.py")] = "both.py"
    argv.remove("--max_new_tokens=5")
    assert killed("behind a line", 9, argv) == -signal.SIGKILL
    evaluate.main(argv)
    argv[argv.index("--save_to=mixed")] = "--save_to=mixed_whole"
    evaluate.main(argv)
    numbers = json.loads(Path("mixed/eval.json").read_text())
    assert numbers == json.loads(Path("mixed_whole/eval.json").read_text())
    assert list(numbers["sources"]) == ["rows", "others"] and numbers["problems"] == 2 * PROBLEMS


# ---- what does not fit is refused


@pytest.mark.parametrize(
    "more, says",
    [
        (("--temperature=0.5", "--n=3"), "temperature = 0.5, but it was begun with 1.0"),
        (("--seed=7",), "seed = 7, but it was begun with 1000000"),
        (("--n=2",), "n = 2, but it was begun with 3"),
        (("--limit=4",), "limit = 4, but it was begun with None"),
        (("--rewards=mine.py:apart",), "rewards = .*apart.*, but it was begun with .*spread"),
        (("--max_new_tokens=6",), "max_new_tokens = 6, but it was begun with 5"),
        (("--system_prompt=Hi.",), "system_prompt = 'Hi.', but it was begun with ''"),
        (("--data=others.jsonl",), "data = 'others.jsonl', but"),
    ],
)
def test_other_settings_are_refused_by_name(more, says, here):
    if not Path("begun").exists():
        evaluated("begun", *SAMPLED)
    base = {"--n": "3", "--temperature": "1"}
    base |= dict(item.split("=", 1) for item in more)
    with pytest.raises(UserError, match=f"begun cannot go on: {says}"):
        evaluated("begun", *(f"{key}={value}" for key, value in base.items()), "--resume=true")


def test_other_rows_and_other_weights_are_refused(here, tokenizer):
    rows = Path("rows.jsonl").read_text()
    evaluated("rows_of")
    Path("rows.jsonl").write_text(rows.replace('"4"', '"5"'))
    with pytest.raises(UserError, match="the rows of 'rows.jsonl' are not those that it was begun"):
        evaluated("rows_of", "--resume=true")
    Path("rows.jsonl").write_text(rows)
    evaluated("rows_of", "--resume=true")
    os.utime("base/model.safetensors", ns=(1, 1))
    with pytest.raises(UserError, match="files of model = 'base' were written anew"):
        evaluated("rows_of", "--resume=true")


def test_a_folder_of_something_else_is_refused_and_left_alone(here):
    Path("else").mkdir()
    Path("else/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no evaluation to go on with"):
        evaluated("else", "--resume=true")
    with pytest.raises(UserError, match="is not empty.*go on with --resume=true"):
        evaluated("else")
    assert [file.name for file in Path("else").iterdir()] == ["notes.txt"]


def test_two_at_once_in_a_folder_are_refused(here):
    evaluated("alone")
    holder = evaluation.Record.open(Path("alone"))
    with pytest.raises(UserError, match="is in use by another process"):
        evaluated("alone", "--resume=true")
    holder.lock.close()
    evaluated("alone", "--resume=true")


def test_without_a_folder_the_newest_of_these_settings_goes_on(here, monkeypatch, tmp_path):
    """Of eval, eval-2 and eval-3 beside a run."""

    def numbered(*more):
        argv = ["--model=base", "--config", "rows.py", "--max_tokens=200", *more]
        mine, others = config.split(argv, evaluate.Config.__dataclass_fields__)
        given = config.parse(evaluate.Config, mine, evaluate.check)
        return evaluate.evaluate(evaluate.load_config(others, given), given)["saved"]

    folders = [numbered("--resume=true"), numbered("--seed=3"), numbered("--seed=3", "--limit=2")]
    assert folders == ["out/eval", "out/eval-2", "out/eval-3"]
    assert numbered("--seed=3", "--resume=true") == "out/eval-2"
    assert numbered("--resume=true") == "out/eval"
    with pytest.raises(UserError, match="out/eval-3 cannot go on: limit = 5, but"):
        numbered("--resume=true", "--seed=3", "--limit=5")


def test_lines_that_are_no_trajectories_are_told_and_played_again(here, capfd):
    whole = evaluated("damaged")
    text = Path("damaged/rollouts.jsonl").read_text().splitlines()
    text[1] = "null"
    text[3] = text[3].replace('"group": 3', '"group": 99')
    text[5] = text[5].replace('"messages"', '"massages"')
    text.insert(2, "{" * 2000)
    Path("damaged/rollouts.jsonl").write_text("\n".join(text) + "\n")
    assert evaluated("damaged", "--resume=true") == whole
    assert "line 2, 3, 5, 7 is no trajectory of this evaluation" in capfd.readouterr().err
    assert len(lines("damaged")) == PROBLEMS


@pytest.mark.parametrize(
    "change",
    [
        {"reward": "x"},
        {"reward": math.nan},
        {"rewards": {"correct": [1]}},
        {"mask": None},
        {"mask": [1]},
        {"metrics": None},
        {"metrics": {"a": "b"}},
        {"seconds": "x"},
        {"group": True},
        {"sample": 0.0},
        {"answer": "of another row"},
        {"messages": ["text"]},
    ],
    ids=str,
)
def test_a_line_that_somebody_has_changed_is_told_and_played_again(here, capfd, change):
    shutil.rmtree("changed", ignore_errors=True)
    whole = evaluated("changed")
    rows = lines("changed")
    rows[1] |= change
    Path("changed/rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluated("changed", "--resume=true") == whole
    assert "line 2 is no trajectory of this evaluation" in capfd.readouterr().err
    assert len(lines("changed")) == PROBLEMS


@pytest.mark.parametrize(
    "change", [{"problems": None}, {"outcomes": {}}, {"outcomes": [1]}], ids=str
)
def test_settings_that_cannot_be_read_are_told(here, change):
    shutil.rmtree("unread", ignore_errors=True)
    evaluated("unread")
    begun = json.loads(Path("unread/settings.json").read_text()) | change
    Path("unread/settings.json").write_text(json.dumps(begun))
    with pytest.raises(UserError, match="no settings.json that can be read"):
        evaluated("unread", "--resume=true")


def test_what_a_line_holds_is_exact(here):
    """All that the numbers are made of, through JSON and back."""
    evaluated("exact", *SAMPLED)
    row = json.loads(json.dumps(lines("exact")[0]))
    row["rewards"] = {"spread": 0.1 + 0.2}
    made = trajectory_of(row, [{"answer": "4"}], 3)
    assert made.rewards["spread"] == 0.1 + 0.2 and made.new_tokens == sum(row["mask"])


def test_a_full_disk_ends_nothing(here, monkeypatch):
    whole = evaluated("roomy")
    write = evaluation.run_log.write_rollouts
    calls = []

    def full(path, trajectories, tokenizer, **columns):
        calls.append(path)
        if len(calls) in (3, 4, 5):
            with open(path, "a") as file:
                file.write('{"group":')  # a part of it
            raise OSError(28, "No space left on device")
        write(path, trajectories, tokenizer, **columns)

    monkeypatch.setattr(evaluation.run_log, "write_rollouts", full)
    assert evaluated("full")["avg@1"] == whole["avg@1"]
    assert without_times(lines("full")) == without_times(lines("roomy"))


# ---- categories


def test_the_average_by_a_column_of_the_rows(here):
    numbers = evaluated("kinds", "--category_column=kind")
    by_kind = numbers["categories"]
    assert list(by_kind) == ["long", "short"]
    rewards = [row["rewards"]["spread"] for row in lines("kinds")]
    assert by_kind["short"]["average"] == pytest.approx(sum(rewards[0::2]) / 4)
    assert by_kind["long"]["problems"] == 4
    assert by_kind["long"]["ci95_low"] <= by_kind["long"]["average"]
    with pytest.raises(UserError, match="'level': row 1 has none, it has prompt, answer, kind"):
        evaluated("kinds_2", "--category_column=level")
    with pytest.raises(UserError, match="'level': row 1 has none"):  # also where all is there
        evaluated("kinds", "--category_column=level", "--resume=true")
    again = evaluated("kinds", "--category_column=kind", "--resume=true")
    assert again == numbers


# ---- statistics


def of_counts(both, lost, won, neither):
    first = [1.0] * (both + lost) + [0.0] * (won + neither)
    second = [1.0] * both + [0.0] * lost + [1.0] * won + [0.0] * neither
    return first, second


def test_the_paired_interval_covers_and_is_that_of_newcombes_paper():
    """Statistics in Medicine 17:2635, two of its examples; the sign is that of second - first."""
    low, high = statistics.newcombe(*of_counts(20, 12, 2, 16))
    assert (-high, -low) == pytest.approx((0.0562, 0.3292), abs=1e-4)
    low, high = statistics.newcombe(*of_counts(36, 12, 2, 0))
    assert (-high, -low) == pytest.approx((0.0569, 0.3404), abs=1e-4)
    same = statistics.paired(*of_counts(20, 0, 0, 10))
    assert same.low < 0 == same.difference < same.high

    rng = random.Random(0)
    covered = 0
    for _ in range(1000):
        first = [float(rng.random() < 0.6) for _ in range(100)]
        second = [float(rng.random() < (0.8 if value else 0.3)) for value in first]
        pair = statistics.paired(first, second)
        covered += pair.low <= 0.4 * 0.3 - 0.6 * 0.2 <= pair.high
    assert covered > 930


def test_means_of_several_samples_are_compared_by_their_differences():
    pair = statistics.paired([0.5, 0.25, 1.0, 0.0], [0.75, 0.5, 1.0, 0.5])
    assert pair.difference == pytest.approx(0.25) and "normal" in pair.method
    assert pair.low == pytest.approx(0.25 - 1.96 * (0.125 / 3 / 4) ** 0.5)

"""Data sets of reasoning_gym, with their own scorers: --data=gym:NAME --rewards=gym.

    pytest tests/test_gym.py

Against the package itself: many of its data sets are read here, and their
scorers are asked by the reward, in its process.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
import evaluate
import play as play_script
import rewards as reward_functions
import train_grpo
from grading.gym import gym
from learning import model as models
from run import config
from run.config import UserError
from tasks import gym as task
from tasks import tiny as tiny_model

pytest.importorskip("reasoning_gym", reason="needs reasoning_gym: the extra gym")
from reasoning_gym.factory import DATASETS  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SYSTEM = "Put the answer into <answer></answer>."
ARGV = ["--data=gym:leg_counting", "--rewards=gym", "--tools=", f"--system_prompt={SYSTEM}"]


def load(name, count=3, split="train", seed=0):
    return data.load(f"gym:{name}", split, limit=count, seed=seed, require_answer=False)


def answering(text, example, stop="answered"):
    messages = [*example["messages"], {"role": "assistant", "content": text}]
    return SimpleNamespace(messages=messages, stop=stop, answer=None, calls=[])


def scored(text, example):
    return gym(answering(f"<answer>{text}</answer>", example), example)


# One in three, and those with something odd: the seconds are theirs.
ODD = {"acre", "graph_color", "list_functions", "pool_matrix"}
NAMES = sorted((set(sorted(DATASETS)[::3]) | ODD) - {"composite", "futoshiki", "knight_swap"})


@pytest.mark.parametrize("name", NAMES)
def test_every_data_set_is_the_same_again_and_finds_its_own_answer_right(name):
    (example,) = load(name, 1, seed=3)
    (again,) = load(name, 1, seed=3)
    assert example == again and example["gym"] == name
    assert example["messages"] == [{"role": "user", "content": example["entry"]["question"]}]
    text = reward_functions.oracle("gym", example)
    if example["entry"]["answer"] is None:  # it scores answers, and knows none
        assert text is None and scored("?", example) is not None
    else:
        assert gym(answering(text, example), example) == pytest.approx(1.0)


def test_train_and_held_out_problems_are_disjoint_and_seeds_are_others():
    questions = {}
    for split in ("train", "test"):
        for seed in (0, 1, 2_000_000):
            rows = load("leg_counting", 60, split, seed)
            assert len(rows) == 60
            questions[split, seed] = {row["prompt"] for row in rows}
    every = [question for asked in questions.values() for question in asked]
    assert len(every) == len(set(every)) == 360
    # a data set with few problems repeats them, but never those of the other split
    few = {row["prompt"] for row in load("coin_flip", 80)}
    held_out = {row["prompt"] for row in load("coin_flip", 30, "test")}
    assert len(few) < 80 and not few & held_out


def test_a_limit_makes_as_many_rows_and_their_beginning_does_not_depend_on_it():
    assert len(data.load("gym:leg_counting")) == task.COUNT
    more = load("leg_counting", task.COUNT + 50)
    assert len(more) == task.COUNT + 50 and more[:5] == load("leg_counting", 5)


@pytest.mark.parametrize(
    "source, split, says",
    [
        ("gym:leg_countin", "train", "no data set 'leg_countin': did you mean leg_counting?"),
        ("gym:", "train", "no data set '': there are ab, acre, advanced_geometry, "),
        (
            "gym:composite",
            "train",
            "gym:composite cannot be made with options {}: AssertionError: ",
        ),
        (
            "gym:leg_counting?max_animal=3",
            "train",
            "no option 'max_animal': did you mean max_animals",
        ),
        ("gym:leg_counting?x=3", "train", "no option 'x': there are min_animals, max_animals, "),
        ("gym:leg_counting?size=3", "train", "size is the run's: give --limit=…"),
        ("gym:leg_counting?max_animals", "train", "cannot read 'max_animals': write leg_counting?"),
        (
            "gym:leg_counting?max_animals=0",
            "train",
            "cannot be made with options {'max_animals': 0}",
        ),
        ("gym:leg_counting?max_animals=1&max_animals=2", "train", "max_animals is given twice"),
        ("gym:chain_sum?max_terms=2.5", "train", "gym:chain_sum: max_terms = 2.5: expected "),
        ("gym:chain_sum?max_terms=true", "train", "gym:chain_sum: max_terms = True: expected "),
        ("gym:leg_counting", "dev", "split = 'dev': gym:leg_counting has train and test"),
    ],
)
def test_what_there_is_not_is_told_in_one_sentence(source, split, says):
    with pytest.raises(UserError, match=re.escape(says)):
        data.load(source, split)


def test_options_of_a_data_set_shape_its_problems_and_its_scorer():
    easy = load("chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1", 20)
    for row in easy:
        terms, operators = row["entry"]["metadata"]["num_terms"], row["prompt"].count("+")
        assert terms == 2 and operators <= 1
        assert gym(answering(f"<answer>{row['answer']}</answer>", row), row) == 1.0
        assert row["gym"].startswith("chain_sum?min_terms=2&")
    assert [row["prompt"] for row in easy] != [row["prompt"] for row in load("chain_sum", 20)]


def test_a_data_set_without_problems_of_a_split_says_so(monkeypatch):
    class One(list):
        def __getitem__(self, number):
            return {"question": "1 and 1?", "answer": "2"}

    monkeypatch.setattr(task, "data_set", lambda *_: One())
    with pytest.raises(UserError, match="gym:one has too few problems for split .*: 0 were found"):
        for split in ("train", "test"):
            list(task.problems("one", split, 0, 5))


def test_without_the_package_one_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=re.escape("pip install 'reasoning-gym>=0.1.25,<0.2'")):
        data.load("gym:leg_counting")


def test_wrong_and_missing_answers_and_rows_of_elsewhere():
    (example,) = load("leg_counting", 1)
    assert scored(str(int(example["answer"]) + 1), example) == 0.0
    assert gym(answering("I do not know.", example), example) == 0.0
    with pytest.raises(UserError, match="reward gym is for the rows of --data=gym:NAME"):
        scored("4", {"messages": [], "answer": "4"})


def test_an_answer_that_is_code_does_nothing_and_an_endless_one_is_wrong(tmp_path, monkeypatch):
    """spiral_matrix evaluates what begins like a list; countdown gives the answer to sympy."""
    file = tmp_path / "made"
    for act in (f"open({str(file)!r}, 'w')", f"__import__('os').system('touch {file}')"):
        (example,) = load("spiral_matrix", 1)
        assert scored(f"[{act}]", example) < 1.0
        (example,) = load("countdown", 1)
        assert scored(act, example) < 1.0
    assert not file.exists()
    monkeypatch.setattr("grading.gym.SECONDS", 0.5)
    assert scored("9**9**9**9", example) == 0.0
    assert scored(example["answer"], example) == 1.0  # the process is still there


# -- the scripts


def test_play_made_up_has_its_oracle_say_the_right_answer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [*ARGV, "--model=none/here"]
    t = play_script.play_made_up(config.parse(train_grpo.Config, argv, train_grpo.check))
    assert (t.stop, t.reward) == ("answered", 1.0) and t.rewards == {"gym": 1.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a model that knows nothing, with words for these problems."""
    folder = tmp_path_factory.mktemp("base")
    talks = []
    for row in load("leg_counting", 40):
        said = {"role": "assistant", "content": f"<answer>{row['answer']}</answer>"}
        talks.append([{"role": "system", "content": SYSTEM}, *row["messages"], said])
    tokenizer = tiny_model.tiny_tokenizer(talks, [])
    models.save(tiny_model.tiny(tokenizer, layers=1, hidden_size=32), tokenizer, folder)
    return str(folder)


def test_five_steps_of_grpo_and_an_evaluation(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [
        *ARGV[:1], *ARGV[2:], f"--model={base}", "--out_dir=out/gym", "--steps=5",
        "--prompts_per_step=2",
        "--group_size=2", "--max_tokens=512", "--max_new_tokens=16", "--eval_every=5",
        "--eval_rows=4", "--rewards=gym,length",
        "--reward_options=length.limit=16,length.buffer=16",
    ]  # fmt: skip
    train_grpo.main(argv)
    rows = [json.loads(line) for line in Path("out/gym/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward_gym" in row]
    assert [row["step"] for row in steps] == [0, 1, 2, 3, 4]
    assert all(row["loss"] == row["loss"] for row in steps)
    evaluate.main(["--run=out/gym", "--limit=4", "--save_to=out/eval"])
    measured = json.loads(Path("out/eval/eval.json").read_text())
    assert (measured["data"], measured["split"]) == ("gym:leg_counting", "test")
    assert measured["accuracy"] == 0.0 and "rows" not in measured  # none it was trained on


def test_the_scorer_starts_in_a_program_of_its_own():
    """Nothing of the tests' process is what makes it work."""
    code = (
        "import data; from grading.gym import _scorer\n"
        "row = data.load('gym:ab', limit=1, require_answer=False)[0]\n"
        "print(_scorer.score('ab', row['answer'], row['entry']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "1.0"

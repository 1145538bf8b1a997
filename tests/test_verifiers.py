"""Environments of the package verifiers: --data=verifiers:NAME --tools=verifiers:NAME.

    pytest tests/test_verifiers.py

The package itself plays and scores them, in .venv/verifiers (`make test` makes it); they are
written here as its documentation has them: a module with load_environment().
"""

import asyncio
import json
import re
from pathlib import Path

import pytest
from until import until

import data
import evaluate
import rewards as reward_functions
import train_grpo
from chat import Chat
from engines.scripted import ScriptedEngine
from learning import model as models
from rollout import Settings, rollouts
from run.config import UserError
from tasks import tiny as tiny_model
from tools import Toolbox
from tools.calling import verifiers

REASON = "needs verifiers, in an environment of its own: make .venv/installed-test"
pytestmark = pytest.mark.skipif(not verifiers.BESIDE.exists(), reason=REASON)
STOP = "<|im_end|>"

# What environments of their documentation look like; `kind` says which is made.
SHELF = '''
import verifiers as vf
from datasets import Dataset

PRICES = {"tea": 3, "milk": 2}


async def price(thing: str) -> str:
    """Look up what a thing costs.

    Args:
        thing: What it is.
    """
    return str(PRICES[thing])


def right(completion, answer, **others) -> float:
    return float(answer in (completion[-1].content or ""))


def calls(state, info) -> float:
    return sum(len(step["completion"][0].tool_calls or []) for step in state["trajectory"])


def broken(completion) -> float:
    raise ValueError("no such column")


def ranked(completions) -> list[float]:
    return [0.0 for _ in completions]


class Counter(vf.StatefulToolEnv):
    """Its tool has an argument that the model does not see, and ends the episode at three."""

    def __init__(self, **others):
        super().__init__(**others)
        self.add_tool(self.add, args_to_skip=["state"])

    async def setup_state(self, state):
        state["total"] = 0
        return state

    async def add(self, number: int, state) -> str:
        """Add a number.

        Args:
            number: How much.
        """
        state["total"] += number
        if state["total"] >= 3:
            state["final_env_response"] = [{"role": "user", "content": "enough"}]
        return str(state["total"])

    def update_tool_args(self, tool_name, tool_args, messages, state, **others):
        return tool_args | {"state": state}


class Guess(vf.MultiTurnEnv):
    async def env_response(self, messages, state, **others):
        return [{"role": "user", "content": f"not {messages[-1].content}"}]

    @vf.stop
    async def is_found(self, state):
        steps = state["trajectory"]
        return bool(steps) and "7" in (steps[-1]["completion"][-1].content or "")

    @vf.cleanup
    async def note(self, state):
        with open("closed.txt", "a") as file:
            file.write(f"{state['stop_condition']} ")


class Rewriting(vf.MultiTurnEnv):
    async def setup_state(self, state):
        state["prompt"] = [vf.UserMessage(content="something else")]
        return state

    async def env_response(self, messages, state, **others):
        return []


def load_environment(kind="tools", reward="right", bonus=0.0):
    rows = [
        {"question": f"What does {thing} cost?", "answer": str(price), "info": {"thing": thing}}
        for thing, price in PRICES.items()
    ]
    functions = {"right": right, "broken": broken, "ranked": ranked}
    rubric = vf.Rubric(funcs=[functions[reward], calls], weights=[1.0, bonus])
    common = {"rubric": rubric, "dataset": Dataset.from_list(rows)}
    if kind == "tools":
        prompt = "Look it up."
        held_out = Dataset.from_list(rows[:1])
        return vf.ToolEnv(tools=[price], system_prompt=prompt, eval_dataset=held_out, **common)
    if kind == "single":
        return vf.SingleTurnEnv(**common)
    if kind == "stateful":
        return Counter(**common)
    if kind == "guess":
        return Guess(max_turns=4, **common)
    if kind == "rewriting":
        return Rewriting(**common)
    if kind == "judge":
        rubric = vf.RubricGroup([rubric, vf.RubricGroup([vf.JudgeRubric(judge_client=object())])])
        return vf.SingleTurnEnv(**common | {"rubric": rubric})
    if kind == "group":
        return vf.EnvGroup([vf.SingleTurnEnv(**common), vf.SingleTurnEnv(**common)])
    raise ValueError(f"no kind {kind}")
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("verifiers")
    (made / "shelf_env.py").write_text(SHELF)
    (made / "plain_env.py").write_text("x = 1\n")
    return made


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def calling(name, *calls):
    texts = []
    for arguments in calls:
        call = json.dumps({"name": name, "arguments": arguments})
        texts.append(f"<tool_call>\n{call}\n</tool_call>")
    return "\n".join(texts) + STOP


def play(tokenizer, source, script, rows=None, options=(), **settings):
    """The trajectories of the source's rows, one for each, with these turns."""
    box = Toolbox([f"verifiers:{source}"], timeout=60, options=options)
    chat = Chat(tokenizer, "hermes", box.schemas)
    turns = [tokenizer.encode(turn, add_special_tokens=False) for turn in script]
    engine = ScriptedEngine(turns, tokenizer)
    rewards = reward_functions.select(("environment",))
    reward_functions.check_environments(box, rewards)
    rows = rows or load(source)[:1]
    playing = rollouts(rows, chat, engine, box, Settings(**settings), samples=1, rewards=rewards)
    return asyncio.run(playing)


def load(source, split="train", limit=None):
    return data.load(f"verifiers:{source}", split, limit=limit, require_answer=False)


def test_rows_have_its_prompts_and_answers_and_its_evaluation_rows_are_test():
    rows = load("shelf-env")
    assert [row["answer"] for row in rows] == ["3", "2"]
    assert rows[0]["messages"] == [
        {"role": "system", "content": "Look it up."},
        {"role": "user", "content": "What does tea cost?"},
    ]
    assert rows[0]["of_verifiers"]["row"]["info"] == {"thing": "tea"}
    assert load("shelf-env", limit=1) == rows[:1]
    assert [row["answer"] for row in load("shelf-env", "test")] == ["3"]


def test_its_tools_are_called_all_of_a_turn_at_once_and_its_rubric_scores(tokenizer):
    (schema,) = Toolbox(["verifiers:shelf-env"], timeout=60).schemas
    assert schema["function"]["description"] == "Look up what a thing costs."
    assert list(schema["function"]["parameters"]["properties"]) == ["thing"]
    script = [calling("price", {"thing": "milk"}, {"thing": "tea"}), f"It costs 3.{STOP}"]
    (t,) = play(tokenizer, "shelf-env?bonus=0.25", script)
    assert [call.result for call in t.calls] == ["2", "3"]
    assert (t.stop, t.rewards) == ("answered", {"environment": 1.5})
    assert t.metrics["calls"] == 2 and t.metrics["num_turns"] == 2
    assert t.metrics["price_calls"] == 2 and t.metrics["right"] == 1


def test_what_cannot_be_called_is_told_by_us_and_the_rollout_there_goes_on(tokenizer):
    script = [
        calling("cost", {"thing": "tea"}),  # there is none
        calling("price", {"what": "tea"}),  # not so
        f"<tool_call>\nno json\n</tool_call>{STOP}",
        calling("price", {"thing": "gold"}),  # it raises KeyError: their word for it
        calling("price", {"thing": "tea"}),
        f"3{STOP}",
    ]
    (t,) = play(tokenizer, "shelf-env", script, max_turns=9)
    errors = [call.error for call in t.calls]
    assert (
        errors[:2] == ["unknown_tool", "bad_arguments"] and errors[2] and errors[3:] == [None] * 2
    )
    assert [call.result for call in t.calls[3:]] == ["'gold'", "3"]
    assert t.rewards == {"environment": 1.0} and t.metrics["num_turns"] == 6


def test_a_state_of_its_own_hidden_arguments_and_its_end(tokenizer):
    source = "shelf_env?kind=stateful"
    (schema,) = Toolbox([f"verifiers:{source}"], timeout=60).schemas
    assert list(schema["function"]["parameters"]["properties"]) == ["number"]
    script = [calling("add", {"number": 1}), calling("add", {"number": 2}), "never"]
    for _ in range(2):  # the state of one trajectory is not that of the next
        (t,) = play(tokenizer, source, script)
        assert [call.result for call in t.calls] == ["1", "enough"]
        assert (t.stop, t.answer) == ("answered", "enough")


def test_its_user_speaks_behind_an_answer_until_its_stop_condition(tokenizer, folder):
    script = [f"5{STOP}", f"6{STOP}", f"7{STOP}", "never"]
    (t,) = play(tokenizer, "shelf-env?kind=guess", script)
    said = [m["content"] for m in t.messages if m["role"] == "user"]
    assert said[1:] == ["not 5", "not 6"] and t.stop == "answered"
    users = [t.ids.index(i) for i in tokenizer.encode("not", add_special_tokens=False)]
    assert all(t.mask[at] == 0 for at in users)
    # a limit of ours ends it: it is cleaned up, and scored by what there was
    (t,) = play(tokenizer, "shelf-env?kind=guess", [f"3{STOP}"] * 2, max_turns=1)
    assert t.stop == "max_turns" and t.rewards == {"environment": 1.0}
    assert until(
        lambda: (folder / "closed.txt").read_text().split() == ["is_found", "prompt_too_long"]
    )


def test_a_limit_of_theirs_ends_the_episode(tokenizer):
    (t,) = play(tokenizer, "shelf-env?kind=guess", [f"{n}{STOP}" for n in range(6)], max_turns=9)
    assert t.stop == "answered" and len(t.turn_starts) == 4


def test_an_environment_without_tools(tokenizer):
    assert Toolbox(["verifiers:shelf-env?kind=single"], timeout=60).schemas == []
    (t,) = play(tokenizer, "shelf-env?kind=single", [f"It is 3.{STOP}"])
    assert (t.stop, t.rewards) == ("answered", {"environment": 1.0})


@pytest.mark.parametrize(
    "source, says",
    [
        (
            "shelf-env?kind=judge",
            "JudgeRubric: it asks a model of its own, with a key: use the rew",
        ),
        ("shelf-env?kind=group", "EnvGroup: it is a group of environments: give each of them"),
        ("shelf-env?reward=ranked", "its rubric scores a group at once"),
        ("shelf-env?kind=none", "no kind none"),
        ("shelf-env?knd=tools", "unexpected keyword argument 'knd'"),
        ("shelf-env?kind", "cannot read 'kind': write shelf-env?option=value"),
        ("no-such-env", "cannot be loaded: ValueError: Could not import 'no-such-env'"),
        ("plain-env", "does not expose load_environment"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(source, says):
    with pytest.raises(UserError, match=re.escape(says)):
        Toolbox([f"verifiers:{source}"], timeout=60)


def test_rows_that_do_not_fit_are_refused(tokenizer):
    with pytest.raises(UserError, match="has no eval_dataset, so no split 'test'"):
        load("shelf-env?kind=single", "test")
    with pytest.raises(UserError, match="split = 'dev'"):
        load("shelf-env", "dev")
    with pytest.raises(UserError, match="the rows are of other data: give --data the same"):
        play(tokenizer, "shelf-env", [f"3{STOP}"], load("shelf-env?bonus=1"))
    with pytest.raises(UserError, match="its setup changes the prompt"):
        play(tokenizer, "shelf-env?kind=rewriting", [f"3{STOP}"])
    with pytest.raises(UserError, match="verifiers has no option 'speed'"):
        Toolbox(["verifiers:shelf-env"], options=["verifiers.speed=3"])


def test_a_reward_function_that_raises_is_no_zero(tokenizer):
    """verifiers logs it and makes 0.0 of it, which would be learnt from."""
    (t,) = play(tokenizer, "shelf-env?reward=broken", [f"3{STOP}"])
    assert t.rewards == {"environment": None} and "no such column" in t.failure


def test_a_process_that_dies_costs_its_trajectories_and_another_one_starts(tokenizer):
    rows = load("shelf-env")
    first = verifiers._process("shelf-env")
    first.running.kill()
    first.running.wait()
    (t,) = play(tokenizer, "shelf-env", [f"3{STOP}"], rows[:1])
    assert t.rewards == {"environment": 1.0}
    assert verifiers._process("shelf-env") is not first


def test_without_the_package_one_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(verifiers, "BESIDE", Path("nowhere/python"))
    monkeypatch.setattr(verifiers, "_processes", [])
    with pytest.raises(UserError, match=re.escape("pip install 'verifiers>=0.3,<0.4'")):
        load("shelf-env")


def test_five_steps_of_grpo_and_an_evaluation(tokenizer, tmp_path):
    base = str(tmp_path / "base")
    models.save(tiny_model.tiny(tokenizer, layers=1, hidden_size=32), tokenizer, base)
    argv = [
        "--data=verifiers:shelf-env", "--tools=verifiers:shelf-env",
        "--rewards=environment,length", "--reward_options=length.limit=16,length.buffer=16",
        f"--model={base}", f"--out_dir={tmp_path}/out", "--steps=5", "--prompts_per_step=2",
        "--group_size=4", "--max_tokens=512", "--max_new_tokens=16", "--eval_every=5",
    ]  # fmt: skip
    train_grpo.main(argv)
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward_environment" in row]
    assert [row["step"] for row in steps] == [0, 1, 2, 3, 4]
    assert all(row["loss"] == row["loss"] for row in steps)
    evaluate.main([f"--run={tmp_path}/out", "--limit=1", f"--save_to={tmp_path}/eval"])
    assert json.loads((tmp_path / "eval/eval.json").read_text())["problems"] == 1

"""Environments: a class whose methods are tools, with hooks that open, answer and reward.

    pytest tests/test_environments.py

Pinned here: how a class is told from a tool, what is refused at the start, that nothing which a
user or a tool says is trained on, that no two samples share a state, what limits do, that whatever
fails in an environment costs one trajectory, and that its final state is asked after the last call.
"""

import asyncio
import json
import re
import threading
import time
from pathlib import Path

import pytest
from test_formats import WRITERS, chat_of, closed
from until import PATIENCE, until

import play as play_script
import rewards as reward_functions
import train_grpo
from chat import Chat
from engines.scripted import ScriptedEngine
from formats import Call
from loss import set_advantages
from player import Player, prepare_task
from rollout import Settings, rollouts
from run import config
from run.config import UserError
from tools import Result, Toolbox
from train_grpo import Config
from trajectory import spans, stats, token_kinds, token_texts

ROOT = Path(__file__).resolve().parent.parent
STOP = "<|im_end|>"
SHORT = 1.0  # seconds: what comes before their end has time on any machine
PROMPT = {"role": "user", "content": "I have a question."}


def row(number=0):
    return {"id": number, "messages": [PROMPT], "answer": "", "stock": number}


def say(name, **arguments):
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>{STOP}"


class Shop:
    """A shop whose customer has two things to say."""

    def __init__(self, example: dict, size: int = 10):
        self.stock = example["stock"]
        self.size = size
        self.sold = []
        self.said = ["How many are left?", "Thank you."]
        self.closed = False

    def look(self) -> int:
        """Say what is in stock."""
        return self.stock

    def sell(self, count: int) -> Result:
        """Sell some.

        Args:
            count: How many.
        """
        self.stock -= count
        self.sold.append(count)
        return Result(f"sold {count}", reward=0.5, metrics={"sales": 1})

    async def give_up(self) -> Result:
        """End it."""
        return Result("nothing to do", ends=True)

    def opening(self):
        return f"There are {self.stock}."

    def user(self, trajectory):
        assert trajectory.messages[-1]["role"] == "assistant" and trajectory.stop == "answered"
        return self.said.pop(0) if self.said else None

    def reward(self, trajectory):
        assert not self.closed
        return float(sum(self.sold))

    def metrics(self):
        return {"stock": self.stock}

    def close(self):
        self.closed = True

    def _helper(self, untyped):
        return untyped


REWARDS = reward_functions.select(("environment", "turn_results:0.1"))


def play(tokenizer, script, environment=Shop, examples=None, samples=1, rewards=REWARDS, **given):
    """(the trajectories, the engine, the toolbox) of a script: texts, or a function of the ids."""
    timeout = given.pop("timeout", PATIENCE)
    options = given.pop("tool_options", ())
    box = Toolbox([environment], concurrency=64, timeout=timeout, options=options)
    chat = Chat(tokenizer, "hermes", box.schemas)
    if not callable(script):
        script = [tokenizer.encode(turn, add_special_tokens=False) for turn in script]
    engine = ScriptedEngine(script, tokenizer)
    settings = Settings(**given)
    playing = rollouts(
        examples or [row(7)], chat, engine, box, settings, samples=samples, rewards=rewards
    )
    return asyncio.run(playing), engine, box


def repeating(tokenizer, *turns):
    """A script for many trajectories: each says these turns, told apart by how many it has said."""
    encoded = [tokenizer.encode(turn, add_special_tokens=False) for turn in turns]
    start = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)

    def script(ids, sampling):
        at = sum(ids[i : i + len(start)] == start for i in range(len(ids)))
        return encoded[at - 1]

    return script


TALK = ["Which?" + STOP, say("sell", count=2), "Five." + STOP, "Bye." + STOP]


# -- what is the prompt, what is trained


def test_user_and_tool_turns_have_mask_0_and_the_model_sees_what_sft_would_show(tokenizer):
    (t,), engine, _ = play(tokenizer, TALK)
    trained = [i for i, bit in zip(t.ids, t.mask, strict=True) if bit]
    assert trained == tokenizer.encode("".join(TALK), add_special_tokens=False)
    whole = tokenizer.decode(t.ids)
    for said in ("How many are left?", "Thank you.", "sold 2", "There are 7."):
        assert whole.count(said) == 1
    roles = [message["role"] for message in t.messages]
    assert roles == "user assistant user assistant tool assistant user assistant".split()
    assert t.stop == "answered" and len(t.turn_starts) == 4
    assert [said.turn for said in t.user_turns] == [0, 2]
    # the same conversation as SFT renders it: ids and mask
    schemas = Toolbox([Shop], describe_only=True).schemas
    ids, mask = Chat(tokenizer, "hermes", schemas).render(t.messages)
    assert (t.ids, t.mask) == (ids, mask)
    for (asked, _), start in zip(engine.requests, t.turn_starts, strict=True):
        assert asked == t.ids[:start]


def test_the_opening_goes_on_with_the_prompts_last_message_and_may_differ_in_a_group(tokenizer):
    class Coin:
        tossed = 0

        def look(self) -> str:
            """Look."""
            return "at it"

        def opening(self):
            Coin.tossed += 1
            return f"Toss {Coin.tossed}."

    rewards = reward_functions.select(("format",))
    script = repeating(tokenizer, "Hm." + STOP)
    played, _, _ = play(tokenizer, script, Coin, samples=2, rewards=rewards)
    prompts = [t.messages[0]["content"] for t in played]
    assert prompts == ["I have a question.\n\nToss 1.", "I have a question.\n\nToss 2."]
    assert played[0].example["messages"] == [PROMPT]
    assert all(len(t.messages) == 2 for t in played)


def test_what_the_user_said_has_a_kind_of_its_own(tokenizer):
    (t,), _, _ = play(tokenizer, TALK)
    kinds = token_kinds(t, token_texts(t.ids, tokenizer))
    assert len(kinds) == len(t.ids) and "u" in kinds
    said = [text for kind, text in spans(t, tokenizer) if kind == "u"]
    assert said == ["How many are left?", "Thank you."]
    assert [text for kind, text in spans(t, tokenizer) if kind == "o"] == ["sold 2"]


def test_images_of_openings_and_of_the_user_are_words_to_a_model_that_sees_none(tokenizer):
    from PIL import Image

    class Album:
        def look(self) -> str:
            """Look."""
            return "at it"

        def opening(self):
            return ["Here:", Image.new("RGB", (8, 8))]

        def user(self, trajectory):
            return None if trajectory.user_turns else [Image.new("RGB", (8, 8))]

    rewards = reward_functions.select(("format",))
    (t,), _, _ = play(tokenizer, ["A." + STOP, "B." + STOP], Album, rewards=rewards)
    assert t.stop == "answered" and not t.images
    blind = "(an image, which this model cannot see)"
    assert t.messages[0]["content"].endswith(f"Here:\n{blind}")
    assert t.user_turns[0].text == blind


class Asker:
    """Adds, and asks once more."""

    def add(self, a: int, b: int) -> str:
        """Adds.

        Args:
            a: One number.
            b: The other.
        """
        return str(a + b)

    def user(self, trajectory):
        return None if trajectory.user_turns else "And 3 and 4?"


def contexts(ids, mask):
    """What stands before, between and behind the trained spans."""
    spans = [[]]
    for token, bit, before in zip(ids, mask, [0, *mask], strict=False):
        if not bit and before:
            spans.append([])
        if not bit:
            spans[-1].append(token)
    return spans


@pytest.mark.parametrize("name", WRITERS)
def test_in_every_family_a_user_speaks_as_sft_would_show_it(name):
    """Also a call and its result behind the user's words, and an answer that was left open."""
    box = Toolbox([Asker])
    chat = chat_of(name, box.schemas)
    thought = chat.format.thought_end if chat.facts.opening else ""  # that the prompt opened
    call = closed(chat, thought + chat.format.write("", [Call("add", {"a": 3, "b": 4})]))
    answer = closed(chat, thought + "So.")
    said = [call, answer, call, answer]
    engine = ScriptedEngine(said, chat.tokenizer)
    rewards = reward_functions.select(("format",))
    (t,) = asyncio.run(rollouts([row()], chat, engine, box, Settings(), rewards=rewards))
    assert t.stop == "answered" and [one.error for one in t.calls] == [None, None]
    ids, mask = chat.render(t.messages)
    told = [chat.tokenizer.decode(span) for span in contexts(t.ids, t.mask)]
    assert told == [chat.tokenizer.decode(span) for span in contexts(ids, mask)]
    assert "And 3 and 4?" in told[2]
    by_answer = chat.tokenizer.convert_tokens_to_ids(chat.facts.close)
    left_open = chat.reply("And?", said[1][:-1], t.example["messages"])
    assert left_open[1:] == chat.reply("And?", said[1], t.example["messages"])
    assert said[1][-1] == by_answer


@pytest.mark.parametrize("format", ["tags", "json_actions", "fence"])
def test_in_text_formats_too(tokenizer, format):
    """fence goes on in the same turn behind a result, and is closed by an answer."""

    class Python:
        user = Asker.user

        def python(self, code: str) -> str:
            """Runs code.

            Args:
                code: What.
            """
            return "7"

    box = Toolbox([Python])
    chat = Chat(tokenizer, format, box.schemas)
    stop = [tokenizer.convert_tokens_to_ids(STOP)]
    text = chat.format.write("", [Call("python", {"code": "3"})])
    call = tokenizer.encode(text, add_special_tokens=False)
    if format == "fence":
        call += tokenizer.encode("\n", add_special_tokens=False)
    else:
        call += stop
    answer = tokenizer.encode("So.", add_special_tokens=False) + stop
    engine = ScriptedEngine([call, answer, call, answer], tokenizer)
    rewards = reward_functions.select(("format",))
    (t,) = asyncio.run(rollouts([row()], chat, engine, box, Settings(), rewards=rewards))
    assert t.stop == "answered" and [one.error for one in t.calls] == [None, None]
    assert (t.ids, t.mask) == chat.render(t.messages)


# -- state, rewards, metrics


def test_each_sample_has_a_state_of_its_own_200_at_once(tokenizer):
    script = repeating(
        tokenizer, "Which?" + STOP, say("sell", count=2), "Five." + STOP, "Bye" + STOP
    )
    examples = [row(number) for number in range(50)]
    played, _, box = play(tokenizer, script, examples=examples, samples=4, max_concurrent=200)
    assert len(played) == 200
    for t in played:
        assert t.metrics == {"sales": 1.0, "stock": t.example["stock"] - 2}
        assert t.rewards == {"environment": 2.0, "turn_results": 0.5}
        assert f"There are {t.example['stock']}." in t.messages[0]["content"]
    assert not box.errors and box.leaked == 0


def test_rewards_of_results_reach_turn_credit(tokenizer):
    played, _, _ = play(tokenizer, repeating(tokenizer, *TALK), samples=2)
    other, _, _ = play(tokenizer, repeating(tokenizer, TALK[0], say("look"), *TALK[2:]), samples=2)
    group = [*played, *other]
    for t in group:
        t.group = 0
    assert [t.turn_rewards for t in group] == [[0.0, 0.05, 0.0, 0.0]] * 2 + [[0.0] * 4] * 2
    assert [t.reward for t in group] == [2.05, 2.05, 0.0, 0.0]
    set_advantages(group, "none", turn_credit=True)
    # the final state counts for all turns, what a Result carried for its turn and those before it
    assert group[0].advantages == pytest.approx([1.025, 1.025, 1.0, 1.0])
    assert group[2].advantages == pytest.approx([-1.025, -1.025, -1.0, -1.0])


def test_metrics_stand_in_the_step_and_in_rollouts_jsonl(tokenizer, tmp_path):
    from run.log import write_rollouts

    played, _, _ = play(tokenizer, TALK)
    measured = stats(played)
    assert measured["environment_sales"] == 1 and measured["environment_stock"] == 5
    assert measured["reward_environment"] == 2 and measured["user_turns"] == 2
    write_rollouts(tmp_path / "rollouts.jsonl", played, tokenizer)
    written = json.loads((tmp_path / "rollouts.jsonl").read_text())
    assert written["metrics"] == {"sales": 1.0, "stock": 5.0} and written["failure"] == ""
    assert [said["text"] for said in written["user_turns"]] == ["How many are left?", "Thank you."]
    assert [call["reward"] for call in written["calls"]] == [0.5] and "u" in written["kinds"]


def test_a_result_may_end_the_episode_and_then_no_user_speaks(tokenizer):
    (t,), _, _ = play(tokenizer, [say("give_up")])
    assert (t.stop, t.answer, t.user_turns) == ("answered", "nothing to do", [])
    assert t.final_reward == 0.0


def test_options_are_those_of_the_class_and_of_its_methods(tokenizer):
    box = Toolbox([Shop], options=("Shop.size=3", "Shop.timeout=5", "look.timeout=2"))
    assert box.environments[0].make(row()).size == 3
    assert (box.tools["look"].timeout, box.tools["sell"].timeout) == (2, 5)
    assert box.environments[0].timeout == 5
    with pytest.raises(UserError, match="Shop.concurrency has no effect: give it to one of its"):
        Toolbox([Shop], options=("Shop.concurrency=2",))
    with pytest.raises(UserError, match="Shop has no option 'sise': did you mean size"):
        Toolbox([Shop], options=("Shop.sise=2",))
    with pytest.raises(UserError, match="Shop.size has no effect: tools are shown here"):
        Toolbox([Shop], options=("Shop.size=2",), describe_only=True)
    with pytest.raises(UserError, match="look.cache: what it says depends on"):
        Toolbox([Shop], options=("look.cache=true",))


# -- limits


def always_yes(tokenizer):
    yes = tokenizer.encode("Yes." + STOP, add_special_tokens=False)
    return lambda ids, sampling: yes


class Talker:
    """A user who always goes on."""

    asked = []
    words = "Go on. "

    def look(self) -> str:
        """Look."""
        return "nothing"

    def user(self, trajectory):
        return self.words

    def reward(self, trajectory):
        Talker.asked.append(trajectory.stop)
        return 1.0


ENVIRONMENT = reward_functions.select(("environment",))


@pytest.mark.parametrize(
    ("settings", "stop", "turns"),
    [
        ({"max_turns": 3}, "max_turns", 3),
        ({"max_turns": 2, "final_turn": True}, "max_turns", 3),
        ({"max_tokens": 400, "max_turns": 100}, "length", None),
    ],
)
def test_a_users_reply_is_no_turn_but_gives_the_model_one_only_within_the_limits(
    tokenizer, settings, stop, turns
):
    Talker.asked = []
    (t,), engine, _ = play(
        tokenizer, always_yes(tokenizer), Talker, rewards=ENVIRONMENT, **settings
    )
    assert t.stop == stop and Talker.asked == [stop] and t.final_reward == 1.0
    assert turns is None or len(t.turn_starts) == turns
    assert len(t.user_turns) == len(t.turn_starts) - 1 and t.mask[-1] == 1
    assert len(t.ids) <= settings.get("max_tokens", 2048)


def test_what_a_user_says_is_cut_as_a_tools_result_is(tokenizer):
    class Wordy(Talker):
        words = "Go on. " * 500

    cut = {"max_turns": 2, "max_observation_tokens": 20}
    (t,), _, _ = play(tokenizer, always_yes(tokenizer), Wordy, rewards=ENVIRONMENT, **cut)
    assert "characters cut" in t.user_turns[0].text and len(t.user_turns[0].text) < 100


@pytest.mark.parametrize("part", ["work", "user"])
def test_the_final_state_is_asked_after_the_last_call_also_where_time_ends_in_one(tokenizer, part):
    class Slow:
        def __init__(self):
            self.done = []

        def work(self) -> str:
            """Work."""
            self._takes_long()
            return "worked"

        def user(self, trajectory):
            self._takes_long()

        def _takes_long(self):
            self.done.append("begun")
            time.sleep(1.5 * SHORT)
            self.done.append("ended")

        def reward(self, trajectory):
            assert trajectory.stop == "timeout"
            return len(self.done)

    script = [say("work") if part == "work" else "Done." + STOP]
    (t,), _, _ = play(tokenizer, script, Slow, rewards=ENVIRONMENT, trajectory_timeout=SHORT)
    assert (t.stop, t.failure, t.final_reward) == ("timeout", "", 2.0)


def test_time_that_ends_while_environments_are_made_leaves_the_prompt(tokenizer):
    class Slow:
        def __init__(self):
            time.sleep(1.5 * SHORT)

        def reward(self, trajectory):
            return 1.0

    (t,), engine, _ = play(tokenizer, [], Slow, rewards=ENVIRONMENT, trajectory_timeout=SHORT)
    assert (t.stop, t.failure, t.turn_starts, engine.requests) == ("timeout", "", [], [])
    assert t.ids and not any(t.mask)


# -- what fails costs its trajectory


class Odd:
    """Fails in one of its parts, if its row says so."""

    closed = []

    def __init__(self, example):
        self.bad = example["stock"] == 1
        self.fails("init")

    def fails(self, part: str) -> None:
        """Fail.

        Args:
            part: Which.
        """
        if self.bad and self.part == part:
            if self.hangs:
                threading.Event().wait(PATIENCE)
            raise ValueError(f"no {part}")

    def work(self) -> str:
        """Work."""
        self.fails("work")
        return "worked"

    def opening(self):
        self.fails("opening")

    def user(self, trajectory):
        self.fails("user")

    def reward(self, trajectory):
        self.fails("reward")
        return 1.0

    def metrics(self):
        self.fails("metrics")
        return {"n": 1}

    def close(self):
        Odd.closed.append(self.bad)


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("part", ["init", "opening", "user", "reward", "metrics", "work"])
def test_what_raises_or_hangs_costs_one_trajectory_and_not_the_run(tokenizer, part, hangs, capfd):
    class Case(Odd):
        pass

    Case.part = part
    Case.hangs = hangs
    Odd.closed = []
    script = repeating(tokenizer, say("work"), "Done." + STOP)
    given = {"examples": [row(number) for number in range(4)], "rewards": ENVIRONMENT}
    if hangs:
        given["tool_options"] = (f"Case.timeout={SHORT}",)
    played, _, box = play(tokenizer, script, Case, **given)
    for t in played:
        if t.example["stock"] == 1:
            continue
        assert (t.stop, t.failure, t.reward, t.metrics) == ("answered", "", 1.0, {"n": 1})
    t = played[1]
    if part == "work" and not hangs:  # as of any tool: the model is told, and goes on
        assert t.calls[0].error == "exception" and t.reward == 1.0
        return
    name = {"init": "__init__"}.get(part, part)
    assert t.failure.startswith(f"Case.{name} ") and t.reward is None
    ended = {"reward": "answered", "metrics": "answered"}.get(part, "error")
    assert t.stop == ended and box.errors["environment"] == 1
    assert stats(played)["environment_failures"] == 1
    assert t.ids and t.mask[0] == 0
    assert capfd.readouterr().err.count("nothing is learnt from that trajectory") == 1
    if part != "init":
        assert sorted(Odd.closed) == [False, False, False, True]


def test_hooks_may_be_async_and_one_that_hangs_is_cancelled(tokenizer):
    cancelled = []

    class Case:
        async def work(self) -> str:
            """Work."""
            return "worked"

        async def opening(self):
            return "Open."

        async def user(self, trajectory):
            return None if trajectory.user_turns else "More."

        async def reward(self, trajectory):
            try:
                await asyncio.sleep(PATIENCE if trajectory.example["stock"] else 0)
            except asyncio.CancelledError:
                cancelled.append(trajectory.example["stock"])
                raise
            return 1.0

        async def metrics(self):
            return {"n": 1}

    script = repeating(tokenizer, "Hm." + STOP, say("work"), "Done." + STOP)
    given = {"examples": [row(0), row(1)], "tool_options": (f"Case.timeout={SHORT}",)}
    (one, other), _, box = play(tokenizer, script, Case, rewards=ENVIRONMENT, **given)
    assert (one.reward, one.metrics, one.failure) == (1.0, {"n": 1.0}, "")
    assert one.messages[0]["content"].endswith("Open.") and one.calls[0].result == "worked"
    assert other.failure == "Case.reward took longer than 1 s" and other.reward is None
    assert cancelled == [1] and box.leaked == 0


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ("good", "Case.reward is 'good': expected a number, or None"),
        ("3", "Case.reward is '3': expected a number, or None"),
        ([1.0], "Case.reward is .1.0.: expected a number, or None"),
    ],
)
def test_a_reward_that_is_no_number_ends_the_run(tokenizer, value, wrong):
    class Case(Talker):
        def user(self, trajectory):
            return None

        def reward(self, trajectory):
            return value

    with pytest.raises(UserError, match=wrong):
        play(tokenizer, ["Hm." + STOP], Case, rewards=ENVIRONMENT)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_reward_that_is_none_nan_or_infinite_is_not_learnt_from(tokenizer, value):
    class Case(Talker):
        def user(self, trajectory):
            return None

        def reward(self, trajectory):
            return value

    (t,), _, _ = play(tokenizer, ["Hm." + STOP], Case, rewards=ENVIRONMENT)
    assert (t.reward, t.rewards, t.failure) == (None, {"environment": None}, "")


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"reward": "x"}, "reward=….* is 'x': expected a number, or None"),
        ({"metrics": [1]}, "metrics=….* is .1.: expected a dict of names and numbers"),
        ({"metrics": {"n": "x"}}, "metrics=….* 'n' is 'x': expected a number"),
        ({"metrics": {"n": float("nan")}}, "metrics=….* 'n' is nan: expected a finite number"),
    ],
)
def test_a_result_that_is_wrong_is_refused_as_it_is_made(given, wrong):
    with pytest.raises(UserError, match=wrong):
        Result("text", **given)


# -- how they are told apart, and what is refused at the start


def test_a_class_with_call_is_one_tool_and_one_without_an_environment():
    class notebook:
        def __init__(self):
            self.lines = []

        def __call__(self, line: str) -> str:
            """Write.

            Args:
                line: What.
            """
            self.lines.append(line)
            return "\n".join(self.lines)

        def another(self, untyped):
            return untyped

    box = Toolbox([notebook, Shop])
    assert list(box.tools) == ["notebook", "look", "sell", "give_up"]
    assert [environment.name for environment in box.environments] == ["Shop"]
    assert len({box.tools[name].make for name in ("look", "sell", "give_up")}) == 1
    assert box.tools["sell"].schema["function"]["return"] == {"type": "string"}


def refused(body, name="Case"):
    namespace = {}
    exec(f"class {name}:\n" + body, namespace)
    with pytest.raises(UserError) as caught:
        Toolbox([namespace[name], Talker])
    return str(caught.value)


DOCUMENTED = '    def f(self) -> str:\n        """Do."""\n'


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ("    def f(self, x): pass\n", "environment Case: tool 'f' cannot be described"),
        ("    def f(self, x: int): pass\n", "or, if it is no tool, begin its name with _"),
        (DOCUMENTED + "    def reward(self): pass\n", "is called as reward(self, trajectory)"),
        (DOCUMENTED + "    def opening(self, x): pass\n", "is called as opening(self)"),
        (DOCUMENTED + "    def close(self, x): pass\n", "is called as close(self)"),
        (DOCUMENTED + "    reward = 1.0\n", "Case.reward is no method"),
        (DOCUMENTED + "    shared = True\n", "Case.shared has no effect"),
        (DOCUMENTED + "    ends = True\n", "the mark of a method"),
        (DOCUMENTED + "    f.pure = True\n", "Case.f.pure has no effect"),
        (
            "    @staticmethod\n    def f(): pass\n" + DOCUMENTED.replace("f(", "g("),
            "is no method of",
        ),
        ("    def look(self) -> str:\n        'Look.'\n", "two tools are named 'look'"),
        (DOCUMENTED + "    def user(self, t): pass\n", "Case and Talker both have a user"),
        (DOCUMENTED + "    def __init__(self, timeout: int): pass\n", "rename that option"),
        (
            DOCUMENTED.replace("f(", "__call__(") + "    def reward(self, t): pass\n",
            "has __call__, so it is one tool, and its reward would never be called",
        ),
        ("    x = 1\n", "class Case without __call__ is no tool"),
        ("    def close(self): pass\n", "class Case without __call__ is no tool"),
    ],
)
def test_what_would_be_ignored_or_fail_later_is_refused_by_name(body, wrong):
    assert wrong in refused(body)


def task_of(tmp_path, **given):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hello.", "answer": "1"}\n')
    (tmp_path / "env.py").write_text(
        "from tools import Result\n\n\n"
        "class Desk:\n"
        "    def look(self) -> Result:\n"
        '        """Look."""\n'
        '        return Result("it", reward=1)\n\n'
        "    def reward(self, trajectory):\n"
        "        return 1.0\n\n\n"
        "class Plain:\n"
        "    def look(self) -> str:\n"
        '        """Look."""\n'
        '        return "it"\n\n\n'
        "def look() -> str:\n"
        '    """Look."""\n'
        '    return "it"\n'
    )
    given["tools"] = (f"{tmp_path}/env.py:{given['tools']}",)
    return prepare_task(Config(data=f"{tmp_path}/rows.jsonl", **given))


@pytest.mark.parametrize(
    ("tool", "rewards", "wrong"),
    [
        ("Desk", ("correct",), "Desk has a reward that nothing asks for: name it, --rewards=env"),
        ("Plain", ("environment",), "reward environment has no effect"),
        ("look", ("correct", "turn_results"), "reward turn_results has no effect"),
    ],
)
def test_rewards_that_nothing_gives_or_asks_for_are_refused(tmp_path, tool, rewards, wrong):
    with pytest.raises(UserError, match=wrong):
        task_of(tmp_path, tools=tool, rewards=rewards)


def test_a_results_reward_that_nothing_asks_for_ends_the_run(tokenizer):
    with pytest.raises(UserError, match="sell returned a Result with a reward that nothing asks"):
        play(tokenizer, TALK, rewards=ENVIRONMENT)


def test_rows_need_no_answer_where_the_environment_is_all_that_rewards(tmp_path):
    _, _, examples = task_of(tmp_path, tools="Desk", rewards=("environment", "turn_results:0"))
    assert examples[0]["answer"] == "1"
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hello."}\n')
    cfg = Config(
        data=f"{tmp_path}/rows.jsonl", tools=(f"{tmp_path}/env.py:Desk",), rewards=("environment",)
    )
    assert prepare_task(cfg)[2][0]["answer"] == ""


def test_an_opening_needs_a_prompt_that_ends_in_a_users_message(tokenizer):
    example = row() | {"messages": [PROMPT, {"role": "assistant", "content": "Yes?"}]}
    with pytest.raises(UserError, match="row 1: opening.. goes on with the prompt"):
        play(tokenizer, TALK, examples=[example])


def test_calls_of_one_turn_change_the_state_in_their_order(tokenizer):
    class Log:
        def __init__(self):
            self.lines = []

        def write(self, line: str) -> str:
            """Write.

            Args:
                line: What.
            """
            time.sleep(0.001)
            self.lines.append(line)
            return str(self.lines)

        def reward(self, trajectory):
            return float(self.lines == list("abcd"))

    calls = [say("write", line=line).removesuffix(STOP) for line in "abcd"]
    script = ["\n".join(calls) + STOP, "Done." + STOP]
    (t,), _, _ = play(tokenizer, script, Log, rewards=ENVIRONMENT)
    assert t.reward == 1.0 and t.calls[-1].result == "['a', 'b', 'c', 'd']"


def test_a_player_of_parts_plays_it_on_the_one_loop(tokenizer):
    box = Toolbox([Shop])
    chat = Chat(tokenizer, "hermes", box.schemas)
    engine = ScriptedEngine(repeating(tokenizer, *TALK), tokenizer)
    with Player(chat, engine, box, REWARDS, Settings()) as player:
        played = player.play([row(3), row(4)], samples=2)
    assert [t.metrics["stock"] for t in played] == [1.0, 1.0, 2.0, 2.0]
    until(lambda: box.leaked == 0)


def test_a_reply_closes_an_answer_that_was_left_open(tokenizer):
    chat = Chat(tokenizer, "hermes", Toolbox([Shop]).schemas)
    open_ids = tokenizer.encode("Hm", add_special_tokens=False)
    closed_ids = tokenizer.encode("Hm" + STOP, add_special_tokens=False)
    behind_open = tokenizer.decode(chat.reply("And?", open_ids))
    assert behind_open == STOP + tokenizer.decode(chat.reply("And?", closed_ids))
    assert Call("look", {}).name in Toolbox([Shop]).tools


# -- with images, behind an API, over MCP, and for SFT


class Gallery:
    """Shows a picture at the start, and its user another."""

    def __init__(self, example):
        self.seen = example["images"]

    def count(self) -> str:
        """Count the pictures."""
        return str(len(self.seen))

    def opening(self):
        from PIL import Image

        return ["Here:", Image.new("RGB", (16, 16), "red")]

    def user(self, trajectory):
        from PIL import Image

        return None if trajectory.user_turns else ["And", Image.new("RGB", (16, 16), "blue"), "?"]

    def reward(self, trajectory):
        return float(len(self.seen))


def test_images_of_openings_and_of_the_user_are_shown_with_their_tokens():
    from learning.vision import tiny_vision
    from tasks import tiny

    box = Toolbox([Gallery])
    words = "Here: And image 1: 2: ? Red. Blue. Call count. You see pictures."
    talk = [{"role": "system", "content": "Look."}, {"role": "user", "content": words}]
    tokenizer = tiny.tiny_tokenizer([talk], box.schemas, sees=True)
    vision = tiny_vision(tokenizer)
    chat = Chat(tokenizer, "hermes", box.schemas, vision=vision)
    turns = ["Red." + STOP, say("count"), "Blue." + STOP]
    engine = ScriptedEngine(
        [tokenizer.encode(turn, add_special_tokens=False) for turn in turns], tokenizer
    )
    (t,) = asyncio.run(rollouts([row()], chat, engine, box, Settings(), rewards=ENVIRONMENT))
    assert t.stop == "answered" and t.reward == 2.0 and t.calls[0].result == "2"
    assert [picture.shown.getpixel((0, 0)) for picture in t.images] == [(255, 0, 0), (0, 0, 255)]
    assert vision.fits(t.ids, t.images) and t.user_turns[0].images == [2]
    assert t.user_turns[0].text == "And\nimage 2:\n?"
    ids, mask = chat.render(t.messages, t.images)
    assert (t.ids, t.mask) == (ids, mask)
    kinds = token_kinds(t, token_texts(t.ids, tokenizer))
    assert "u" in kinds and len(kinds) == len(t.ids)


class ScriptedApi:
    """Says what it is told, as an Endpoint."""

    def __new__(cls, said, tools, total=50):
        from engines.chat_api import Endpoint, Reply

        class Api(Endpoint):
            asked = []

            async def ask(self, messages, sampling, with_tools, pictures=()):
                self.asked.append((list(messages), with_tools))
                text, *calls = said[len(self.asked) - 1]
                called = []
                for number, (name, arguments) in enumerate(calls):
                    function = {"name": name, "arguments": json.dumps(arguments)}
                    called.append({"id": f"c{number}", "type": "function", "function": function})
                return Reply(text, called, False, 7, total)

        Api.asked = []
        return Api("http://127.0.0.1:1/v1", "gpt", tools)


def play_api(said, total=50, **given):
    from evaluate import play_api_turn

    box = Toolbox([Shop])
    api = ScriptedApi(said, box.schemas, total)
    settings = Settings(**given)
    playing = rollouts([row(7)], api, api, box, settings, rewards=REWARDS, turn=play_api_turn)
    (t,) = asyncio.run(playing)
    return t, api


def test_a_chat_api_talks_with_the_user_in_messages():
    said = [("Which?",), ("", ("sell", {"count": 2})), ("Five.",), ("Bye.",)]
    t, api = play_api(said)
    assert (t.stop, t.final_reward, t.ids, t.new_tokens) == ("answered", 2.0, [], 28)
    texts = [message["content"] for message in api.asked[-1][0] if message["role"] == "user"]
    assert texts == [
        "I have a question.\n\nThere are 7.",
        "How many are left?",
        "Thank you.",
    ]
    t, api = play_api(said, total=3000)
    assert t.stop == "length" and len(api.asked) == 1 and t.final_reward == 0.0
    t, api = play_api(said, max_turns=1)
    assert t.stop == "max_turns" and len(api.asked) == 1


def test_over_mcp_an_environment_of_tools_alone_is_served_and_one_with_hooks_refused(tmp_path):
    from serve import mcp_server

    (tmp_path / "env.py").write_text(
        "class Plain:\n"
        "    def look(self) -> str:\n"
        '        """Look."""\n'
        '        return "it"\n\n\n'
        "class Asked(Plain):\n"
        "    def user(self, trajectory):\n"
        "        return None\n"
    )
    box = mcp_server.toolbox(mcp_server.Config(), [f"{tmp_path}/env.py:Plain"])
    assert mcp_server.stateful(box) == ["look"]
    with pytest.raises(UserError, match="Asked has user, for which no MCP client asks"):
        mcp_server.toolbox(mcp_server.Config(), [f"{tmp_path}/env.py:Asked"])


def test_sft_shows_the_tools_of_an_environment_and_makes_none(tokenizer):
    class Never(Shop):
        def __init__(self, example, needed: int):
            raise AssertionError("made")

    box = Toolbox([Never], describe_only=True)
    names = [schema["function"]["name"] for schema in box.schemas]
    assert names == ["look", "sell", "give_up"]


# -- what the docs say, a whole run, a run that goes on


def block_of(page, text):
    """The python block of a page with this text in it."""
    source = (ROOT / page).read_text(encoding="utf-8")
    (found,) = [part for part in re.findall(r"```python\n(.*?)```", source, re.S) if text in part]
    return found


def test_the_environment_of_the_readme_has_twelve_lines_and_is_played_without_a_model(
    tmp_path, monkeypatch, capsys
):
    code = block_of("README.md", "class Lamp:")
    assert len([line for line in code.splitlines() if line.strip()]) == 11  # and the command
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Light, please."}\n')
    monkeypatch.chdir(tmp_path)
    argv = ["--data=rows.jsonl", "--tools=mine.py:Lamp", "--rewards=environment"]
    cfg = config.parse(train_grpo.Config, [*argv, "--model=none/here"], train_grpo.check)
    t = play_script.play_made_up(cfg)
    assert (t.stop, t.reward, t.calls[0].result) == ("answered", 1.0, "on")
    cfg = config.parse(train_grpo.Config, [*argv, "--model=none/here", "--max_turns=1"])
    t = play_script.play_made_up(cfg)  # an oracle that presses nothing is not content
    assert (t.stop, t.reward) == ("max_turns", 0.0)
    assert "stop: max_turns, not answered: raise that limit" in capsys.readouterr().out


def test_the_environment_of_the_docs_does_what_they_say(tokenizer):
    namespace = {}
    exec(block_of("docs/environments.md", "class Till:"), namespace)
    example = row() | {"prices": {"tea": 3, "milk": 2}}
    script = ["It is paid." + STOP, say("price", thing="tea"), say("pay", amount=5), "Paid." + STOP]
    given = {"examples": [example], "tool_options": ("Till.rounds=true",)}
    (t,), _, _ = play(tokenizer, script, namespace["Till"], **given)
    assert t.messages[0]["content"].endswith("The customer wants tea and milk.")
    assert [said.text for said in t.user_turns] == ["That is not what it costs."]
    assert [call.result for call in t.calls] == ["3", "5 paid"]
    assert t.rewards == {"environment": 1.0, "turn_results": 0.1}
    assert t.metrics == {"payments": 1.0, "paid": 5.0}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A run of two steps on the desk, by a model that knows nothing, and how to make another."""
    from tasks import desk as task
    from tasks import tiny

    folder = tmp_path_factory.mktemp("desk")
    schemas = Toolbox(["tasks/desk.py:Desk"]).schemas
    system = {"role": "system", "content": "Help."}
    talks = [[system, *talk] for talk in task.demos(64)]
    tokenizer = tiny.tiny_tokenizer(talks, schemas, whole_names=True)
    tokenizer.save_pretrained(folder / "model")
    tiny.tiny(tokenizer, layers=1, hidden_size=32).save_pretrained(folder / "model")

    def run(name, **given):
        cfg = train_grpo.Config(
            out_dir=str(folder / name),
            model=str(folder / "model"),
            data="task:desk",
            system_prompt="Help.",
            tools=("tasks/desk.py:Desk",),
            rewards=("environment", "length"),  # the first is 0 for all, the second differs
            reward_options=("length.limit=40", "length.buffer=40"),
            prompts_per_step=2,
            group_size=3,
            max_tokens=200,
            max_new_tokens=40,
            learning_rate=1e-2,
            save_every=2,
            **given,
        )
        train_grpo.train(cfg)
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return run


def test_a_run_on_an_environment_goes_on_with_the_same_numbers(desk):
    whole = desk("whole", steps=4)
    desk("parts", steps=2)
    parts = desk("parts", steps=4, resume=True)
    assert len(whole) == len(parts) == 4
    for one, other in zip(whole, parts, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            if "seconds" not in name and not name.startswith("tools_leaked"):
                assert one[name] == other[name], name
    assert whole[0]["reward_environment"] == 0 and whole[0]["environment_changed"] == 0
    assert any(metrics.get("user_turns", 0) > 0 for metrics in whole)

"""Pins rewards.py: what each reward scores, what cannot be gamed, options, deadlines, and failures.

pytest tests/test_rewards.py
"""

import asyncio
import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import rewards
from rewards import correct, oracle, select, tool_use, total
from run.config import UserError
from trajectory import ToolCall, Trajectory


def example(answer="18", *messages):
    prompt = messages or ({"role": "user", "content": "How many?"},)
    return {"id": 4, "messages": list(prompt), "answer": answer}


def trajectory(row, *turns, calls=(), stop="answered", answer=None, new_tokens=0):
    """turns: texts of the model, or ("tool", text). answer: what it gave to finish."""
    messages = list(row["messages"])
    for turn in turns:
        role, text = turn if isinstance(turn, tuple) else ("assistant", turn)
        messages.append({"role": role, "content": text})
    return SimpleNamespace(
        messages=messages,
        calls=list(calls),
        stop=stop,
        answer=answer,
        new_tokens=new_tokens,
        turn_starts=[0] * sum(m["role"] == "assistant" for m in messages[len(row["messages"]) :]),
        reward_timeouts=[],
    )


def call(error=None, result="18", **arguments):
    return ToolCall(0, "python", arguments, result, error, 0.1)


def score(played, row, selected):
    return asyncio.run(rewards.score(played, row, selected))


def value(name, played, row=None, **options):
    """What one reward gives, with options as the user writes them."""
    texts = [f"{name}.{option}={text}" for option, text in options.items()]
    return score(played, row or example(), select((name,), texts))[name]


def is_correct(text, answer="18", **options):
    row = example(answer)
    return correct(trajectory(row, text, **options), row)


def has_format(text, **options):
    row = example()
    return rewards.format(trajectory(row, text, **options), row)


def test_an_answer_in_the_prompt_is_not_the_models():
    """Pitfall 43, and "found broken in the wild": the prompt's example taken for an answer."""
    shot = ({"role": "user", "content": "1+1?"}, {"role": "assistant", "content": r"\boxed{18}"})
    row = example(
        "18", *shot, {"role": "user", "content": r"Put it in \boxed{18}. The answer is 18"}
    )
    assert correct(trajectory(row, "hm"), row) == 0.0
    assert correct(trajectory(row), row) == 0.0
    row = example("18", *shot)  # no turn at all, and the prompt ends with an answer
    assert correct(trajectory(row), row) == 0.0


def test_an_answer_that_only_a_tool_printed_is_not_the_models():
    """Pitfall 43: printing the expected answer."""
    row = example()
    steps = ("I print it", ("tool", r"\boxed{18} #### 18"))
    assert correct(trajectory(row, *steps, calls=[call()], stop="max_turns"), row) == 0.0
    assert correct(trajectory(row, *steps, "There it is.", calls=[call()]), row) == 0.0


def test_calling_tools_with_garbage_or_again_and_again_earns_nothing_more():
    """Pitfall 43: garbage calls and repeated calls."""
    row = example()
    for kind in ("bad_json", "unknown_tool", "bad_arguments", "exception", "timeout", "oversized"):
        assert tool_use(trajectory(row, "x", calls=[call(kind)] * 9), row) == 0.0
    assert tool_use(trajectory(row, "x"), row) == 0.0
    assert tool_use(trajectory(row, "x", calls=[call("timeout"), call()]), row) == 1.0
    assert tool_use(trajectory(row, "x", calls=[call()] * 9), row) == 1.0


def test_an_answer_in_a_thought_earns_nothing():
    """Pitfall 43: answer in think."""
    text = r"<think>\boxed{18}</think>It is clear."
    assert is_correct(text) == has_format(text) == 0.0


def test_two_answers_are_judged_by_the_last_and_are_no_format():
    """Pitfall 43: naming several answers."""
    text = r"\boxed{1}\boxed{18}"
    assert is_correct(text) == 1.0 and is_correct(text, "1") == 0.0
    assert has_format(text) == 0.0 and has_format(r"\boxed{18}") == 1.0


def test_an_expression_is_not_a_whole_numbers_value():
    """Pitfall 43: the question written as its own answer."""
    for text in ("6*3", "36/2", r"6 \times 3", r"\frac{36}{2}", "9+9", "18=18", "2^4+2"):
        assert is_correct(rf"\boxed{{{text}}}") == 0.0


def test_format_wants_an_own_end_one_answer_and_no_malformed_call():
    assert has_format("The answer is 3.") == has_format(r"The answer is \boxed{3}") == 1.0
    assert has_format("3") == has_format("<answer>1</answer> <answer>1</answer>") == 0.0
    assert has_format(r"\boxed{3}", stop="length") == 0.0
    for kind, value in [("bad_json", 0), ("unknown_tool", 0), ("bad_arguments", 0), ("timeout", 1)]:
        assert has_format(r"\boxed{3}", calls=[call(), call(kind)]) == value


def test_any_of_a_list_of_answers_is_right():
    assert is_correct("The answer is Bob Russell.", ["Bobby Scott", "Bob Russell"]) == 1.0
    assert is_correct("The answer is Bob.", ["Bobby Scott", "Bob Russell"]) == 0.0


def test_correct_refuses_a_row_without_an_answer():
    """Pitfall 42: a reward that cannot judge stops the run, it does not say 0."""
    with pytest.raises(UserError, match="^reward correct needs an answer, row 5 has none$"):
        is_correct("18", "")


def test_null_is_no_right_answer():
    """A11."""
    for name in ("correct", "exact_match", "f1"):
        row = example(["Arsenal", None])
        assert value(name, trajectory(row, r"\boxed{None}"), row) == 0.0
        assert value(name, trajectory(row, r"\boxed{Arsenal}"), row) == 1.0
        with pytest.raises(UserError, match="needs an answer"):
            value(name, trajectory(row, r"\boxed{None}"), example([None]))


def test_select_reads_names_weights_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(
        "import math\ndef shout(trajectory, example):\n    return 2\ndef _private(): pass\n"
    )
    selected = select(("correct", "format:0.1", "my_rewards.py:shout:-0.5"))
    assert [(name, weight) for name, (_, weight) in selected.items()] == [
        ("correct", 1.0),
        ("format", 0.1),
        ("shout", -0.5),
    ]
    assert selected["correct"][0].function is correct
    assert selected["format"][0].function is rewards.format
    assert selected["shout"][0](None, None) == 2
    assert select([f"{tmp_path}/my_rewards.py:shout"])["shout"][1] == 1.0


def test_two_rewards_of_one_file_share_its_module_and_a_file_that_fails_is_told(tmp_path):
    text = "seen = []\ndef a(t, e): seen.append(1)\ndef b(t, e): return len(seen)\n"
    (tmp_path / "mine.py").write_text(text)
    selected = select((f"{tmp_path}/mine.py:a", f"{tmp_path}/mine.py:b"))
    selected["a"][0](None, None)
    assert selected["b"][0](None, None) == 1
    (tmp_path / "bad.py").write_text("def f(t, e): pass\n1 / 0\n")
    says = (
        r"^importing .*bad.py for the reward '.*bad.py:f' failed: ZeroDivisionError: .* \(line 2\)"
    )
    with pytest.raises(UserError, match=says):
        select((f"{tmp_path}/bad.py:f",))


@pytest.mark.parametrize(
    "names, says",
    [
        (["corect"], "unknown reward 'corect' in 'corect': did you mean correct?"),
        (
            ["style:2"],
            "unknown reward 'style' in 'style:2': there are correct, exact_match, f1, relaxed, "
            "anls, vqa, call_match, sql_match, code_tests, judge, format, tool_use, tool_bonus, "
            "needed_tool, tool_errors, repetition, repeated_calls, length, turn_calls, "
            "redundancy, curiosity, diversity, ranking, environment, turn_results, gym, "
            "or write file.py:function",
        ),
        (["format:big"], "rewards: cannot read the weight of 'format:big': expected a number"),
        (["format:nan"], "rewards: cannot read the weight of 'format:nan': expected a number"),
        (["format:1:2"], "rewards: cannot read the weight of 'format:1:2': expected a number"),
        (["format", "format:2"], "rewards: format is given twice: keep one of them"),
        ([], "rewards is empty: expected at least one, such as correct"),
        (["nope.py:f"], "no reward file 'nope.py'"),
        (["mine.py"], "rewards: 'mine.py' names no function: in mine.py there are shout, sing"),
        (["mine.py:shuot"], "unknown reward 'shuot' in 'mine.py:shuot': did you mean shout?"),
    ],
)
def test_a_reward_that_cannot_be_selected_says_what_there_is(names, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def shout(t, e): pass\ndef sing(t, e): pass\n")
    with pytest.raises(UserError) as caught:
        select(names)
    assert str(caught.value) == says


def test_scores_are_kept_raw_under_their_own_names_and_summed_with_their_weights():
    row = example()
    selected = select(("correct", "format:0.1", "tool_use:0"))
    scores = score(trajectory(row, r"\boxed{18}"), row, selected)
    assert scores == {"correct": 1.0, "format": 1.0, "tool_use": 0.0}
    assert total(scores, selected) == pytest.approx(1.1)


def test_none_and_nan_make_the_total_none_unless_they_weigh_nothing():
    """Pitfall 23: a None or NaN reward is excluded, which the caller sees by the None."""
    for value in (None, math.nan, math.inf):
        selected = {"a": (lambda t, e: 1, 1.0), "b": (lambda t, e, value=value: value, 0.5)}
        scores = score(None, example(), selected)
        assert scores == {"a": 1.0, "b": None}
        assert total(scores, selected) is None
        selected["b"] = (selected["b"][0], 0.0)
        assert total(scores, selected) == 1.0


def test_a_reward_that_fails_stops_the_run_with_its_name():
    """Pitfall 42: no silent zero."""

    def shout(trajectory, example):
        return example["nothing"]

    says = (
        r"^reward shout failed on row 5: KeyError: 'nothing' \(.*test_rewards.py, line \d+\): let"
    )
    with pytest.raises(UserError, match=says):
        score(None, example(), {"shout": (shout, 1.0)})
    with pytest.raises(UserError, match="^reward loud failed on row 5: TypeError"):
        score(None, example(), {"loud": (lambda t, e: "very", 1.0)})

    async def gives_up(trajectory, example):
        raise asyncio.CancelledError

    released = threading.Event()
    for late in (shout, gives_up):  # beside one that never ends: it is not waited for
        selected = {"slow": (lambda t, e: released.wait(), 1.0), "late": (late, 1.0)}
        with pytest.raises(UserError, match="^reward late failed on row 5: "):
            score(None, example(), selected)
    released.set()


@pytest.mark.parametrize(
    "mistake, says",
    [
        (
            lambda t, e: t.text,
            "a trajectory has messages, stop, answer, calls, new_tokens, turn_st",
        ),
        (lambda t, e: t.completion, "a trajectory has messages, stop, answer, calls, new_tokens, "),
        (
            lambda t, e: t.messages[-1].content,
            "a message is a dict, write message['content']; it h",
        ),
        (
            lambda t, e: e.answer,
            "the row is a dict, write example['answer']; it has id, messages, ",
        ),
        (
            lambda t, e: e["gold"],
            "let it return None where there is no reward; the row has id, mes",
        ),
        (
            lambda t, e: t.calls[0].output,
            "a call has turn, name, arguments, result, error, seconds",
        ),
        (lambda t, e: 1 / 0, "let it return None where there is no reward"),
    ],
)
def test_a_reward_that_reads_what_is_not_there_is_told_what_is(mistake, says):
    """D10."""
    row = example()
    played = Trajectory(row, messages=[*row["messages"]], calls=[call()])
    with pytest.raises(UserError) as caught:
        score(played, row, {"mine": (mistake, 1.0)})
    remedy = str(caught.value).rpartition("): ")[2]
    assert remedy.startswith(says)


def test_what_a_reward_is_told_of_is_what_the_docs_list():
    """D10."""
    played = Trajectory(example())
    assert all(hasattr(played, name) for name in rewards.READABLE)
    docs = Path(rewards.__file__).with_name("docs") / "rewards.md"
    listed = docs.read_text().partition("| field | what it is |")[2].partition("\n\n")[0]
    names = [
        name for line in listed.splitlines()[2:] for name in line.split("|")[1].split("`")[1::2]
    ]
    assert [*names, "example"] == list(rewards.READABLE)


def test_a_reward_that_exits_stops_the_run_with_its_name(tmp_path):
    """exit() would else end only the thread that scores, and the run would hang."""
    (tmp_path / "bad.py").write_text("def quits(trajectory, example):\n    exit()\n")
    (tmp_path / "worse.py").write_text("async def leaves(trajectory, example):\n    exit()\n")
    for name in ("bad.py:quits", "worse.py:leaves"):
        selected = select((f"{tmp_path}/{name}",))
        with pytest.raises(UserError, match="reward (quits|leaves) failed"):
            score(None, {"id": 0}, selected)


# ---- question answering


def test_exact_match_is_of_words_and_of_any_gold_answer():
    golds = ["The Beatles", "Beatles, the"]
    for text in (r"\boxed{the beatles}", "The answer is: Beatles!", "<answer>BEATLES</answer>"):
        assert value("exact_match", trajectory(example(), text), example(golds)) == 1.0
    for text in ("Beatles", r"\boxed{The Beatles and Wings}", r"\boxed{}", "", r"\boxed{the}"):
        assert value("exact_match", trajectory(example(), text), example(golds)) == 0.0


def test_f1_takes_the_best_gold_answer():
    row = example(["Barack Obama", "President Barack Obama"])
    assert value("f1", trajectory(row, r"\boxed{Barack H. Obama}"), row) == pytest.approx(0.8)
    assert value("f1", trajectory(row, "Barack Obama"), row) == 0.0
    assert value("f1", trajectory(row, "", answer="barack obama."), row) == 1.0


@pytest.mark.parametrize("name", ["correct", "exact_match", "f1"])
def test_an_answer_that_the_model_did_not_declare_earns_nothing(name):
    """Pitfall 43: in a thought, in the prompt's example, in a tool's output, among several."""
    shot = ({"role": "user", "content": "?"}, {"role": "assistant", "content": r"\boxed{Paris}"})
    row = example("Paris", *shot, {"role": "user", "content": r"Capital? Write \boxed{Paris}"})
    for turns in (
        (r"<think>\boxed{Paris}</think>It is clear.",),
        ("Paris",),
        (),
        ("I ask", ("tool", r"\boxed{Paris}")),
        ("I ask", ("tool", r"\boxed{Paris}"), "There it is."),
        (r"\boxed{Paris} or \boxed{London}",),
        ("```\n\\boxed{Paris}\n```",),
    ):
        assert value(name, trajectory(row, *turns), row) == 0.0
    assert value(name, trajectory(row, r"Not \boxed{London} but \boxed{Paris}"), row) == 1.0


@pytest.mark.parametrize("name", ["correct", "exact_match", "f1"])
def test_a_row_without_an_answer_stops_the_run(name):
    row = example([])
    with pytest.raises(UserError, match=f"^reward {name} needs an answer, row 5 has none$"):
        value(name, trajectory(row, "x"), row)


def test_format_with_finish_wants_that_the_text_says_the_same():
    row = example()
    assert value("format", trajectory(row, "", answer="18"), row) == 1.0
    assert value("format", trajectory(row, r"So \boxed{18}", answer="18"), row) == 1.0
    assert value("format", trajectory(row, r"So \boxed{17}", answer="18"), row) == 0.0


# ---- on the way


def test_giving_the_answer_is_no_use_of_a_tool_and_is_done_once():
    """Pitfall 43."""
    row, given = example(), [ToolCall(0, "finish", {}, "18", None, 0.1, ends=True)] * 2
    played = trajectory(row, "", answer="18", calls=given)
    for name in ("tool_use", "tool_bonus", "format"):
        assert value(name, played, row) == 0.0
    assert value("format", trajectory(row, "", answer="18", calls=given[:1]), row) == 1.0


def test_the_bonus_is_for_different_calls_that_ran_and_has_a_cap():
    row = example()
    many = [call(code=str(i)) for i in range(9)]
    for calls, is_worth in [([], 0), (many[:1], 0.1), (many[:1] * 9, 0.1), (many, 0.2)]:
        assert value("tool_bonus", trajectory(row, "x", calls=calls)) == pytest.approx(is_worth)
    assert value("tool_bonus", trajectory(row, "x", calls=[call("timeout", code="1")])) == 0
    played = trajectory(row, "x", calls=many)
    assert value("tool_bonus", played, each="0.3", cap="1") == 1.0


def test_errors_are_penalised_by_their_kind_down_to_the_cap():
    row = example()
    played = trajectory(
        row, "x", calls=[call(), call("bad_json"), call("timeout"), call("timeout")]
    )
    assert value("tool_errors", played) == pytest.approx(-0.3)
    assert value("tool_errors", played, cap="0.2") == pytest.approx(-0.2)
    assert value("tool_errors", played, kinds="timeout:0.25") == pytest.approx(-0.5)
    assert value("tool_errors", played, kinds="bad_json,timeout:0.25") == pytest.approx(-0.6)
    assert value("tool_errors", trajectory(row, "x", calls=[call()])) == 0
    with pytest.raises(UserError, match="^tool_errors.kinds: 'timeout:much': expected kind:pen"):
        select(("tool_errors",), ("tool_errors.kinds=timeout:much",))


def test_what_is_written_or_called_again_is_penalised():
    """Pitfall 43: repeated calls."""
    row = example("18", {"role": "user", "content": "to be or not to be " * 9})
    assert value("repetition", trajectory(row, "one two three four"), row) == 0
    assert value("repetition", trajectory(row, "a b c a b c"), row) == pytest.approx(-0.25)
    assert value("repetition", trajectory(row, "go " * 100), row) < -0.97
    assert value("repetition", trajectory(row, "!" * 100), row) < -0.97
    assert (
        value("repetition", trajectory(row, "a b c", ("tool", "a b c " * 9), "a b c"), row) == -0.5
    )
    assert value("repetition", trajectory(row, "a b c a b c"), row, n="4") == 0
    calls = [call(code="1"), call(code="1"), call(code="2"), call(code="1")]
    assert value("repetition", trajectory(row, "", calls=calls), row) == -0.5
    assert value("repetition", trajectory(row, "go " * 100, calls=calls), row) == -1.0


def test_length_costs_from_the_buffer_on_down_to_minus_one():
    row = example()
    for tokens, is_worth in [(0, 0), (600, 0), (700, -0.25), (800, -0.5), (1000, -1), (5000, -1)]:
        played = trajectory(row, "x", new_tokens=tokens)
        assert value("length", played, limit="1000", buffer="400") == pytest.approx(is_worth)
    for tokens, is_worth in [(999, 0), (1000, -1)]:
        played = trajectory(row, "x", new_tokens=tokens)
        assert value("length", played, limit="1000", buffer="0") == is_worth


def test_an_oracles_message_earns_one():
    for name, gold in [("correct", "18"), ("correct", r"\frac{1}{2}"), ("f1", ["The Who", "x"])]:
        row = example(gold)
        assert value(name, trajectory(row, oracle(name, row)), row) == 1.0
    assert oracle("sql_match", example("SELECT 1")) == "```sql\nSELECT 1\n```"
    assert oracle("code_tests", example() | {"solution": "x = 1"}) == "```python\nx = 1\n```"
    for name, row in [("code_tests", example()), ("format", example()), ("correct", example(""))]:
        assert oracle(name, row) is None


# ---- options, deadlines


@pytest.mark.parametrize(
    "names, options, says",
    [
        (["f1"], ["f1"], "reward_options: cannot read 'f1': write name.option=value"),
        (
            ["tool_bonus"],
            ["tol_bonus.cap=1"],
            "reward_options: 'tol_bonus' is not one of the rewards: did you mean tool_bonus?",
        ),
        (["f1"], ["length.limit=9"], "reward_options: 'length' is not one of the rewards"),
        (["tool_bonus"], ["tool_bonus.cup=1"], "has no option 'cup': did you mean cap?"),
        (["tool_bonus"], ["tool_bonus.cap=big"], "tool_bonus.cap = 'big': expected float"),
        (["length"], [], "reward_options: length.limit is missing"),
        (["f1"], ["f1.timeout=0"], "expected > 0 seconds"),
        (["f1"], ["f1.concurrency=0"], "expected > 0 seconds, and >= 1"),
    ],
)
def test_an_option_that_is_wrong_stops_the_run_at_its_start(names, options, says):
    with pytest.raises(UserError) as caught:
        select(names, options)
    assert says in str(caught.value)


def test_a_reward_of_ones_own_may_be_async_have_options_and_be_a_class(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import asyncio\n"
        "async def near(trajectory, example, *, by: int = 1, name: str = 'x'):\n"
        "    await asyncio.sleep(0)\n"
        "    return by * len(name)\n"
        "class counts:\n"
        "    def __init__(self, step: int = 1):\n"
        "        self.n, self.step = 0, step\n"
        "    async def __call__(self, trajectory, example):\n"
        "        self.n += self.step\n"
        "        return self.n\n"
        "class nothing:\n    pass\n"
    )
    near, counts = f"{tmp_path}/mine.py:near", f"{tmp_path}/mine.py:counts"
    selected = select((near, counts), ("near.by=3", "near.name=abc", "counts.step=2"))
    row = example()
    assert score(trajectory(row, "x"), row, selected) == {"near": 9.0, "counts": 2.0}
    assert score(trajectory(row, "x"), row, selected) == {"near": 9.0, "counts": 4.0}
    with pytest.raises(UserError, match="nothing is a class without __call__"):
        select((f"{tmp_path}/mine.py:nothing",))


def test_all_rewards_of_a_trajectory_run_at_once():
    """Each ends when all four have begun."""
    begun = []

    def slow(trajectory, example):
        begun.append(1)
        while len(begun) < 4:
            time.sleep(0.01)
        return 1

    async def waits(trajectory, example):
        begun.append(2)
        while len(begun) < 4:
            await asyncio.sleep(0.01)
        return 2

    row = example()
    selected = {"a": (slow, 1.0), "b": (slow, 1.0), "c": (waits, 1.0), "d": (waits, 1.0)}
    assert score(trajectory(row, "x"), row, selected) == {"a": 1, "b": 1, "c": 2, "d": 2}


def test_what_takes_too_long_is_none_and_named_and_does_not_block_the_next():
    hang = threading.Event()

    def hangs(trajectory, example):
        hang.wait()

    async def stubborn(trajectory, example):
        while not hang.is_set():
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                await asyncio.sleep(0.2)
                return 3

    selected = {
        "hangs": (rewards.Reward(hangs, timeout=0.2, concurrency=2), 1.0),
        "stubborn": (rewards.Reward(stubborn, timeout=0.2, concurrency=20), 1.0),
        "format": (rewards.Reward(rewards.format, instant=True), 1.0),
    }

    async def played(count):
        row = example()
        all_of_it = [trajectory(row, r"\boxed{1}") for _ in range(count)]
        scores = await asyncio.gather(*(rewards.score(t, row, selected) for t in all_of_it))
        return all_of_it, scores

    start = time.monotonic()
    all_of_it, scores = asyncio.run(played(20))
    assert all(s == {"hangs": None, "stubborn": None, "format": 1.0} for s in scores)
    assert all(sorted(t.reward_timeouts) == ["hangs", "stubborn"] for t in all_of_it)
    assert 10 * 0.2 < time.monotonic() - start  # two at a time, each with its own clock
    left = selected["hangs"][0].abandoned
    assert len(left) == 20 and all(thread.is_alive() for thread in left)
    hang.set()


def test_the_cheap_rewards_cost_microseconds_and_no_thread(monkeypatch):
    """192 rollouts of a step: a thread for each of five rewards would take 0.1 s."""
    monkeypatch.setattr(rewards, "in_thread", None)
    row = example()
    played = trajectory(row, "word " * 300 + r"\boxed{18}", calls=[call(), call("timeout")])
    selected = select(("format", "tool_use", "tool_bonus", "tool_errors", "f1"))

    async def all_of_it():
        start = time.process_time()
        for _ in range(192):
            await rewards.score(played, row, selected)
        return time.process_time() - start

    assert min(asyncio.run(all_of_it()) for _ in range(3)) < 0.2  # CPU seconds; 0.025 in truth


def answered(text, gold, calls=(), **more):
    row = {**example(gold), **more}
    return trajectory(row, f"\\boxed{{{text}}}", calls=calls), row


@pytest.mark.parametrize(
    "text, gold, expected",
    [
        ("104", "100", 1.0),
        ("106", "100", 0.0),
        ("95", "100", 1.0),
        ("-96", "-100", 1.0),
        ("96", "-100", 0.0),
        ("1,250", "1200", 1.0),
        ("12%", "12", 1.0),
        ("0", "0", 1.0),
        ("0.01", "0", 0.0),
        (".5", "0.51", 1.0),
        ("wheat", "Wheat", 1.0),
        ("Wheats", "Wheat", 0.0),
        ("nan", "100", 0.0),
        ("inf", "100", 0.0),
        ("1e2", "100", 0.0),
        ("3", ["9", "3.1"], 1.0),
    ],
)
def test_relaxed_accuracy_is_that_of_chartqa(text, gold, expected):
    played, row = answered(text, gold)
    assert value("relaxed", played, row) == expected


def test_relaxed_takes_a_tolerance_and_wants_an_answer():
    played, row = answered("104", "100")
    assert value("relaxed", played, row, tolerance="0.01") == 0.0
    assert value("relaxed", trajectory(row, ""), row) == 0.0


def test_anls_gives_credit_for_nearly_all_letters_and_none_below_its_threshold():
    for text, gold, expected in [
        ("Coca Cola", "coca  cola", 1.0),
        ("Coca Colo", "Coca Cola", 1 - 1 / 9),
        ("kitten", "sitting", 1 - 3 / 7),
        ("Pepsi", "Coca Cola", 0.0),
        ("abd", ["xyz", "abc"], 2 / 3),
        ("x" * 2000, "x" * 2001, 0.0),
    ]:
        played, row = answered(text, gold)
        assert value("anls", played, row) == pytest.approx(expected)
    played, row = answered("kitten", "sitting")
    assert value("anls", played, row, threshold="0.6") == 0.0


@pytest.mark.parametrize("votes, expected", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)])
def test_vqa_accuracy_is_the_mean_over_nine_of_ten_people(votes, expected):
    """Against the definition: min(n / 3, 1), n of the nine others, for each of the ten."""
    golds = ["The Two cats."] * votes + [f"dog {number}x" for number in range(10 - votes)]
    by_definition = []
    for left_out in range(10):
        others = golds[:left_out] + golds[left_out + 1 :]
        by_definition.append(min(others.count("The Two cats.") / 3, 1))
    played, row = answered("2 CATS", golds)
    assert value("vqa", played, row) == pytest.approx(expected)
    assert value("vqa", played, row) == pytest.approx(sum(by_definition) / 10)


def test_vqa_wants_the_answers_of_several_people_and_one_of_the_model():
    played, row = answered("2", ["2", "2", "2"])
    says = "row 5 has 3; to one right answer compare by exact_match"
    with pytest.raises(UserError, match=says):
        value("vqa", played, row)
    played, row = answered("!!", ["??"] * 10)
    assert value("vqa", played, row) == 0.0
    assert value("vqa", trajectory(row, "no answer"), row) == 0.0


def test_a_needed_tool_is_paid_for_where_the_answer_is_right_and_the_row_needs_it():
    ran, failed = [call()], [call("exception")]
    for text, calls, needs, expected in [
        ("18", ran, True, 1.0),
        ("18", failed, True, 0.0),
        ("18", [], True, 0.0),
        ("99", ran, True, 0.0),
        ("18", ran, False, 0.0),
        ("18", [], False, 1.0),
    ]:
        played, row = answered(text, "18", calls, needs_tool=needs)
        assert value("needed_tool", played, row) == expected
    played, row = answered("18", "18", ran)  # a row that does not say
    assert value("needed_tool", played, row) == 1.0


def test_repeated_calls_cost_each_time_up_to_the_cap():
    calls = [call(x=1), call(x=1), call(x=2), call(x=1)]
    played, row = answered("18", "18", calls)
    assert value("repeated_calls", played, row) == pytest.approx(-0.2)
    assert value("repeated_calls", played, row, cap="0.15") == pytest.approx(-0.15)
    played, row = answered("18", "18", calls[1:3])
    assert value("repeated_calls", played, row) == 0.0

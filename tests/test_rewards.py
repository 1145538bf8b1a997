"""Pins rewards.py: what counts as an answer, when two are equal, and what cannot be gamed.

pytest tests/test_rewards.py
"""

import json
import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import rewards
from config import UserError
from rewards import correct, equal, score, select, tool_use, total

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
needs_real_data = pytest.mark.skipif(not SHARED.is_dir(), reason="no real data in ../shared/data")


def example(answer="18", *messages):
    prompt = messages or ({"role": "user", "content": "How many?"},)
    return {"id": 4, "messages": list(prompt), "answer": answer}


def trajectory(row, *turns, calls=(), stop="answered"):
    """turns: texts of the model, or ("tool", text)."""
    messages = list(row["messages"])
    for turn in turns:
        role, text = turn if isinstance(turn, tuple) else ("assistant", turn)
        messages.append({"role": role, "content": text})
    return SimpleNamespace(example=row, messages=messages, calls=list(calls), stop=stop)


def call(error=None, result="18"):
    return SimpleNamespace(turn=0, name="python", arguments={}, result=result, error=error)


def is_correct(text, answer="18", **options):
    row = example(answer)
    return correct(trajectory(row, text, **options), row)


def has_format(text, **options):
    row = example()
    return rewards.format(trajectory(row, text, **options), row)


@pytest.mark.parametrize(
    "text",
    [
        r"So \boxed{18}",
        r"$\boxed{ 18 }$.",
        r"\boxed{17} no: \boxed{18}",
        "<answer> 18 </answer>",
        "<answer>17</answer><answer>\n18\n</answer>",
        "#### 17\nno\n#### 18",
        "The answer is 18.",
        "The final answer is: $18$. I hope it is correct.",
        "the answer is 3. Wait.\nAnswer: **18**",
        "**Answer:** 18\nDone.",
        "Answer:\n18",
        r"The answer is \(18\).",
        "The answer is x = 18.",
        r"<think>I guess \boxed{17}</think>\boxed{18}",
        r"a thought whose start is in the prompt \boxed{17}</think> \boxed{18}",
        r"#### 17 <answer>17</answer> \boxed{18} The answer is 17",  # the surest kind counts
        r"\boxed{ hm \boxed{18}",
        r"\boxed{\boxed{18}}",
        "```python\nprint(r'\\boxed{17}')\n```\n#### 18",
        r'<tool_call>{"x": "\boxed{17}"}</tool_call> \boxed{18}',
    ],
)
def test_an_answer_is_found_where_it_is_declared(text):
    assert is_correct(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "18",
        "I have 16, 17, 18 and 19.",
        r"\boxed{18} no: \boxed{17}",
        r"\boxed{18",
        r"\boxed{}",
        "<answer>18",
        "#### 17",
        "####",
        "The answer is 18 or 19.",
        "The answer is",
        r"<think>\boxed{18}",
        r"<think>\boxed{18}</think>",
        r"\boxed{18} <think> or not",
        r"\boxed{18} </think>",
        "```\n\\boxed{18}\n```",
        "```\n\\boxed{18}",
        r"<tool_call>\boxed{18}</tool_call>",
        r"<tool_call>\boxed{18}",
        r"<tool_response>\boxed{18}</tool_response>",
    ],
)
def test_nothing_else_is_an_answer(text):
    assert is_correct(text) == 0.0


def test_an_answer_in_a_turn_that_was_cut_counts_only_if_it_is_closed():
    for stop in ("length", "max_turns", "max_tool_calls", "timeout", "error"):
        assert is_correct(r"so \boxed{18} and", stop=stop) == 1.0
        assert is_correct("<answer>18</answer>", stop=stop) == 1.0
        assert is_correct("The answer is 18", stop=stop) == 0.0  # of 1850, perhaps
        assert is_correct("#### 18", stop=stop) == 0.0


def test_only_the_models_last_turn_is_looked_at():
    row = example()
    done = r"\boxed{18}"
    assert correct(trajectory(row, "let me see", ("tool", "5"), done), row) == 1.0
    assert correct(trajectory(row, done, ("tool", "5"), "hm"), row) == 0.0
    assert correct(trajectory(row, done, ("tool", "5"), stop="max_turns"), row) == 0.0
    assert correct(trajectory(row, stop="error"), row) == 0.0


def test_content_may_be_none_or_a_list_of_parts():
    row = example()
    parts = [{"type": "image"}, {"type": "text", "text": r"\boxed{18}"}]
    assert correct(trajectory(row, None), row) == 0.0
    assert correct(trajectory(row, parts), row) == 1.0


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


SAME = r"""
1234 | 1,234
1234567 | 1,234,567
1234 | 1{,}234
1234 | 1\,234
1234 | 1,\!234
18 | $18
18 | \$18
18 | $18$
18 | 18.0
18 | 18.
18 | +18
18 | 18\text{ dollars}
18 | 18\text{ cm}^2
18 | \text{18}
18 | n = 18
-5 | −5
90 | 90^\circ
50 | 50%
50\% | 50
0.5 | .50
0.5 | \frac{1}{2}
0.5 | 1/2
\frac{1}{2} | 0.5
-\frac12 | \dfrac{-1}{2}
(B) | b
\text{Paris} | Paris
Bobby Scott | bobby  scott.
The Beatles | Beatles
"""

DIFFERENT = r"""
3 | 3.1
18 | 81
12 | 1,2
1234 | 1,23,4
1/3 | 0.333
0.5 | 50%
5 | -5
5! | 5
Carolina South | South Carolina
December 1972 | 1972
A | a b
18 |
18 | .
the | a
"""

MATH = r"""
\frac{\sqrt{2}}{2} | \frac{1}{\sqrt{2}} | True
x^2+1 | 1 + x^2 | True
x^2+1 | 1 - x^2 | False
[0,1) | [0,1] | False
\{1,2\} | \{2, 1\} | True
1.5 | 1\frac{1}{2} | True
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix} 1 \\ 2 \end{pmatrix} | True
x+1 | \frac{ | False
"""


def lines(text):
    return [tuple(part.strip() for part in line.split("|")) for line in text.strip().splitlines()]


@pytest.mark.parametrize("gold, said", lines(SAME))
def test_the_same_answer_written_otherwise_is_equal(gold, said):
    assert equal(said, gold)


@pytest.mark.parametrize("gold, said", lines(DIFFERENT))
def test_another_answer_is_not_equal(gold, said):
    assert not equal(said, gold)


@pytest.mark.parametrize("gold, said, same", lines(MATH))
def test_expressions_are_compared_by_math_verify(gold, said, same):
    assert str(equal(said, gold)) == same


def test_any_of_a_list_of_answers_is_right():
    assert is_correct("The answer is Bob Russell.", ["Bobby Scott", "Bob Russell"]) == 1.0
    assert is_correct("The answer is Bob.", ["Bobby Scott", "Bob Russell"]) == 0.0


def test_correct_refuses_a_row_without_an_answer():
    """Pitfall 42: a reward that cannot judge stops the run, it does not say 0."""
    with pytest.raises(UserError, match="^reward correct needs an answer, row 5 has none$"):
        is_correct("18", "")


def test_an_expression_that_never_ends_is_cut_at_the_deadline_also_in_a_thread():
    """Pitfall 43: a model may write 9^9^9^9, and a thread cannot be stopped."""
    answers, start = [], time.monotonic()
    bomb = "9^{9^{9^{9}}}"
    thread = threading.Thread(target=lambda: answers.append(equal(bomb, "x+1")), daemon=True)
    thread.start()
    thread.join(timeout=12)
    assert answers == [False] and time.monotonic() - start < 12
    start = time.monotonic()
    assert not equal(bomb, "x+1") and time.monotonic() - start < 0.1  # remembered
    assert not equal("x" + "+1" * 10_000, "x+1") and time.monotonic() - start < 0.1  # too long
    assert equal("1+x", "x+1")  # and the next comparison works again


def test_a_plain_answer_costs_microseconds_and_no_text_much_more():
    row = example()
    texts = ["<think>" + "It is 3 * 6. " * 100 + "</think>" + r"\boxed{18}"]
    texts += [
        part * (20_000 // len(part)) for part in ("<answer>", "{", "```", "answer: ", "\\boxed{")
    ]
    for text, limit in zip(texts, [0.001] + [0.2] * 5, strict=True):  # 0.00004 and 0.01 in truth
        spent = []
        for _ in range(3):  # CPU time, and the best of three: a busy machine fails nothing
            start = time.process_time()
            correct(trajectory(row, text), row)
            spent.append(time.process_time() - start)
        assert min(spent) < limit


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
    assert selected["correct"][0] is correct and selected["format"][0] is rewards.format
    assert selected["shout"][0](None, None) == 2
    assert select([f"{tmp_path}/my_rewards.py:shout"])["shout"][1] == 1.0


@pytest.mark.parametrize(
    "names, says",
    [
        (["corect"], "unknown reward 'corect' in 'corect': did you mean correct?"),
        (
            ["style:2"],
            "unknown reward 'style' in 'style:2': there are correct, format, tool_use, "
            "turn_calls, or write file.py:function",
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


def golds(file, column, after=""):
    with open(SHARED / file) as lines:
        return [
            str(json.loads(line)[column]).rpartition(after or "\0")[2].strip() for line in lines
        ]


@needs_real_data
@pytest.mark.parametrize(
    "file, column, after, count",
    [("gsm8k_test.jsonl", "answer", "####", 1319), ("aime24.jsonl", "answer", "", 30)],
)
def test_every_real_answer_is_right_and_its_neighbour_wrong(file, column, after, count):
    answers = golds(file, column, after)
    assert len(answers) == count
    for answer in answers:
        other = float(answer.replace(",", "")) + 1
        assert is_correct(rf"\boxed{{{answer}}}", answer) == 1.0
        assert is_correct(f"The answer is ${answer}.", answer) == 1.0
        assert is_correct(rf"\boxed{{{other}}}", answer) == 0.0
        row = example(answer, {"role": "user", "content": rf"\boxed{{{answer}}} #### {answer}"})
        assert correct(trajectory(row, "I do not know."), row) == 0.0


@needs_real_data
def test_every_accepted_answer_of_natural_questions_is_right():
    with open(SHARED / "nq_open_dev.jsonl") as file:
        accepted = [json.loads(line)["answer"] for line in file][:1000]
    for answers, others in zip(accepted, accepted[1:], strict=False):
        assert all(is_correct(f"<answer>{a}</answer>", answers) == 1.0 for a in answers)
        if not set(answers) & set(others):
            assert is_correct(f"The answer is {others[0]}", answers) == 0.0


def test_a_reward_that_exits_stops_the_run_with_its_name(tmp_path):
    """exit() would else end only the thread that scores, and the run would hang."""
    (tmp_path / "bad.py").write_text("def quits(trajectory, example):\n    exit()\n")
    selected = rewards.select((f"{tmp_path}/bad.py:quits",))
    with pytest.raises(UserError, match="reward quits failed"):
        rewards.score(None, {"id": 0}, selected)

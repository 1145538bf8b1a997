"""Pins answers.py: what counts as an answer, and when two are equal.

pytest tests/test_answers.py
"""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

import rewards
from grading.answers import answer, f1, last_turn, program, words
from grading.equality import (
    QUICK,
    SLOW,
    WASTED,
    WORKERS,
    NotCompared,
    _compared,
    _Comparer,
    _is_huge,
    equal,
)
from rewards import correct
from run.worker import ENVIRONMENT

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
needs_real_data = pytest.mark.skipif(not SHARED.is_dir(), reason="no real data in ../shared/data")


def example(answer="18", *messages):
    prompt = messages or ({"role": "user", "content": "How many?"},)
    return {"id": 4, "messages": list(prompt), "answer": answer}


def trajectory(row, *turns, stop="answered", answer=None):
    """turns: texts of the model, or ("tool", text). answer: what it gave to finish."""
    messages = list(row["messages"])
    for turn in turns:
        role, text = turn if isinstance(turn, tuple) else ("assistant", turn)
        messages.append({"role": role, "content": text})
    return SimpleNamespace(messages=messages, stop=stop, answer=answer)


def is_correct(text, answer="18", **options):
    row = example(answer)
    return correct(trajectory(row, text, **options), row)


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
        r"[THINK]I guess \boxed{17}[/THINK]\boxed{18}",
        '{"thought": "So \\\\boxed{18}", "actions": []}',
        '{"thought": "The answer is 18.", "actions": []}',
        '<think>hm</think>\n{"actions": [], "thought": "Answer: 18"}\n',
        "#### Conclusion\nThe answer is 18.",
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
        r"[THINK]\boxed{18}",
        r"[THINK]\boxed{18}[/THINK]",
        '{"thought": "hm", "actions": [], "more": "\\\\boxed{18}"}',
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


@pytest.mark.parametrize(
    "call",
    [
        '[TOOL_CALLS] [{"name": "f", "arguments": {"x": "@"}}]',
        '[TOOL_CALLS]f[ARGS]{"x": "@',
        '{"name": "f", "parameters": {"x": "@',
        '<|python_tag|>{"name": "f", "parameters": {"x": "@"}}',
        '{"thought": "@", "actions": [{"name": "f", "arguments": {}}]}',
        '{"thought": "perhaps @", "act',
        "<search>@</search>",
        "<search>what is @",
        "<python-3>\n<b>@</b>\n</python-3>",
    ],
)
@pytest.mark.parametrize("said", [r"\boxed{18}", "<answer>18</answer>"])
def test_a_call_in_a_turn_that_did_not_end_by_its_own_choice_is_no_answer(call, said):
    """Pitfall 43: of every format."""
    assert is_correct(call.replace("@", said), stop="length") == 0.0
    if not call.endswith("@"):  # one that was cut
        assert is_correct(call.replace("@", said), stop="max_turns") == 0.0


def test_what_looks_like_a_call_is_an_answer_in_a_turn_that_made_none():
    for text in (r"<x>\boxed{18}</x>", r'{"name": "x", "is": "\boxed{18}"}'):
        assert is_correct(text) == 1.0
        assert is_correct(text, stop="length") == 0.0


def test_a_heading_is_no_answer_but_the_last_line_is():
    assert is_correct("#### Reason\nIt is in France.\n#### Paris \n", "Paris") == 1.0
    assert is_correct("#### Paris\n\nHope this helps!", "Paris") == 1.0
    assert is_correct("#### Conclusion\nThe answer is Paris.", "Paris") == 1.0
    assert is_correct("#### Conclusion\nThe answer is Paris.", "Conclusion") == 0.0
    assert is_correct("#### 18\nI hope it is right.\n#### Done and\ndone.") == 1.0


@pytest.mark.parametrize("stop", ["length", "max_turns"])
@pytest.mark.parametrize(
    "text", ["a list<int> is @", "so a <b> c @", "one<br>two @", "```html\n<main>\n```\n@"]
)
def test_what_is_no_call_takes_no_answer_with_it(text, stop):
    """In a turn that a limit ended calls are left out: not types, HTML, or what is in a block."""
    assert is_correct(text.replace("@", r"\boxed{18}"), stop=stop) == 1.0


def test_a_thought_goes_on_through_the_calls_in_it():
    """Pitfall 43: in fence and tags, what is called inside of <think> is run."""
    row = example()
    begin, done = "<think>I look it up <search>x</search>", r"it is \boxed{18}"
    assert correct(trajectory(row, begin, ("tool", "5"), done), row) == 0.0
    assert correct(trajectory(row, begin, ("tool", "</think>"), done), row) == 0.0
    assert correct(trajectory(row, begin, ("tool", "5"), "so</think>" + done), row) == 1.0
    closed = begin, ("tool", "5"), "so</think>hm", ("tool", "5"), done
    assert correct(trajectory(row, *closed), row) == 1.0
    shown = example("18", {"role": "assistant", "content": "<think>"}, {"role": "user"})
    assert correct(trajectory(shown, done), shown) == 1.0


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


def test_what_was_given_to_finish_is_the_answer():
    row = example()
    for given in (
        "18",
        " 18\n",
        r"\boxed{18}",
        "<answer>18</answer>",
        "The answer is 18.",
        "#### 18",
    ):
        assert correct(trajectory(row, r"I thought \boxed{17}", answer=given), row) == 1.0
    assert correct(trajectory(row, r"\boxed{18}", answer="17"), row) == 0.0
    assert correct(trajectory(row, r"\boxed{18}", answer=""), row) == 0.0
    assert answer(trajectory(row, "hm", answer="it is 18, or 19"), row) == "it is 18, or 19"


@pytest.mark.parametrize(
    "text, found",
    [
        ("```sql\nSELECT 1\n```", "SELECT 1"),
        ("```SQL \nSELECT 1```", "SELECT 1"),
        ("```sql\nSELECT 1\n``` or\n```sql\nSELECT 2\n```", "SELECT 2"),
        ("```python\nprint(1)\n```\nSo:\n```sql\nSELECT 1\n```\n```\n1\n```", "SELECT 1"),
        ("<think>```sql\nSELECT 1\n```</think> It is clear.", None),
        ("<tool_call>```sql\nSELECT 1\n```</tool_call>", None),
        ('{"thought": "```sql\\nSELECT 1\\n```", "actions": []}', "SELECT 1"),
        ("```sql\nSELECT 1", None),
        ("```\nSELECT 1\n```", None),
        ("SELECT 1", None),
        ("", None),
    ],
)
def test_a_program_is_the_last_closed_block_of_its_language(text, found):
    row = example()
    assert (program(trajectory(row, text), row, ("sql",)) or "").strip() == (found or "")
    assert program(trajectory(row, ("tool", "```sql\nSELECT 1\n```")), row, ("sql",)) is None


def test_a_program_given_to_finish_needs_no_fence():
    row = example()
    assert program(trajectory(row, "hm", answer="SELECT 1"), row, ("sql",)) == "SELECT 1"
    given = "```sql\nSELECT 1\n```"
    assert program(trajectory(row, "hm", answer=given), row, ("sql",)) == "SELECT 1\n"


@pytest.mark.parametrize(
    "text, says",
    [
        ("The Beatles.", "beatles"),
        (" an  Apple, a Pear ", "apple pear"),
        (r"\text{New York}", "new york"),
        ("The", "the"),
        ("U.S.A.", "usa"),
        ("...", ""),
    ],
)
def test_words_are_those_of_squad(text, says):
    assert words(text) == says.split()


@pytest.mark.parametrize(
    "said, gold, value",
    [
        ("Barack Obama", "Obama", 2 / 3),
        ("the president Obama", "Barack Obama", 0.5),
        ("New York New York", "New York", 2 / 3),
        ("Paris", "London", 0.0),
        ("Paris", "", 0.0),
        ("", "", 0.0),
    ],
)
def test_f1_is_of_shared_words(said, gold, value):
    assert f1(said, gold) == pytest.approx(value)


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
18 | 18 dollars
18 dollars | $18
18 | $18$ Dollars.
5 | 5 cm
5 | 5 square feet
5 | 5 cm^2
5 cm | 5 cm
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
18 | 1\text{ or }8
2\text{and}4 | 24
18 | 1%8
18 | 1%%8
18 | 1\$8
5 hours | 5 minutes
5 hours | 5\text{ minutes}
5 minutes | 5 \text{hours}
5 | 5 apples
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
10^{-7} | 0.0 | False
6.63 \times 10^{-34} | 0.0 | False
6.63 \times 10^{-34} | 6.63 \cdot 10^{-34} | True
1.5 \times 10^{-7} | 1.4 \times 10^{-7} | False
\frac{\pi}{4} | 0.785398 | True
-\frac{\pi}{4} | 0.785398 | False
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


RESTATED = r"""
\frac{\pi}{4} | \int_0^1 \frac{1}{1+x^2} dx
\frac12 | \int_0^1 x dx
\dfrac12 | \lim_{x\to 0}\frac{1-\cos x}{x^2}
\frac{\pi^2}{6} | \sum_{n=1}^{\infty}\frac1{n^2}
x^3 | \prod_{n=1}^{3} x
2x | \frac{d}{dx} x^2
2x | \frac d{dx} x^2
2x | \dfrac{ d }{ d x } x^2
2x | \frac{d x^{2}}{dx}
2x | \frac{\mathrm{d}}{\mathrm{d}x} x^2
2x | \frac{\partial}{\partial x} x^2
\frac{10}{7} | \binom{5}{2}/7
\frac{10}{7} | {5 \choose 2}/7
\frac{120}{7} | \frac{5!}{7}
x-6 | \begin{vmatrix}1&2\\3&x\end{vmatrix}
\frac23 | \gcd(4,6)/3
\frac12 | \max(1/2,1/3)
\frac12 | \lfloor 3/2 \rfloor/2
\frac{\sqrt6+\sqrt2}{4} | \cos\frac{\pi}{12}
\frac{\pi}{4} | \arctan 1
\frac32 | \log_4 8
"""

DONE = r"""
\sum_{n=1}^{m} n^2 | \sum_{n=1}^{m} n^2
\binom{n}{2} | \frac{n!}{2!(n-2)!}
\cos 2x | 1 - 2 \sin^2 x
\ln 8 | 3 \ln 2
\frac{d}{2} | d/2
x \ln x | \ln(x) \cdot x
"""


@pytest.mark.parametrize("gold, said", lines(RESTATED))
def test_the_question_again_is_no_answer(gold, said):
    """Pitfall 43: a copy of the question would be the shortest way to the reward."""
    assert not equal(said, gold)
    assert equal(said, said)


@pytest.mark.parametrize("gold, said", lines(DONE))
def test_an_operation_that_the_right_answer_has_may_be_in_the_answer(gold, said):
    assert equal(said, gold)


BOMB = "(a+b+c+d+f+g)^{400}"


def test_an_expression_that_never_ends_is_cut_at_the_deadline_also_in_a_thread():
    """Pitfall 43: a model may write it, and a thread cannot be stopped."""
    answers = []
    thread = threading.Thread(target=lambda: answers.append(equal(BOMB, "x+1")), daemon=True)
    thread.start()
    thread.join(timeout=300)  # a busy machine's; without a deadline it would never end
    assert answers == [False]
    asked = _compared.cache_info().misses
    assert not equal(BOMB, "x+1")  # remembered
    assert not equal("x" + "+1" * 10_000, "x+1")  # too long
    assert not equal("9^{9^{9^{9}}}", "x+1")  # no computer writes it down
    assert _compared.cache_info().misses == asked
    assert equal("1+x", "x+1")  # and the next comparison works again


@pytest.mark.parametrize(
    "text, is_huge",
    [
        ("9^{9^{9^{9}}}+x", True),
        ("9^{9^9}", True),
        ("(x+1)^{99999999}", True),
        ("100000!", True),
        ("2^{2^3}", False),
        ("10^{100}", False),
        ("x^{2^{10}}", False),
        ("20!", False),
    ],
)
def test_a_number_that_nobody_can_write_down_is_seen_at_once(text, is_huge):
    """B7."""
    assert _is_huge(text) == is_huge
    assert equal(text, text)


def test_what_there_was_no_time_for_is_none_and_not_wrong(monkeypatch):
    """B7."""

    def no_time(given, gold):
        if gold == "x+1":
            raise NotCompared
        return given == gold

    monkeypatch.setattr(rewards, "equal", no_time)
    assert is_correct(r"\boxed{y}", "x+1") is None
    assert is_correct(r"\boxed{y}", ["x+1", "z"]) is None
    assert is_correct(r"\boxed{y}", ["x+1", "y"]) == 1.0
    assert is_correct(r"\boxed{y}", ["z"]) == 0.0


def test_answers_that_never_end_do_not_keep_others_waiting():
    """B7: 64 of them, and 64 that are right; counted is the time of the processor that they have,
    which on two cores is 10 s by the clock."""
    asked = []

    class Recorded(_Comparer):
        def ask(self, said, gold, seconds):
            asked.append(seconds)
            return None if "400" in said else said == "1+x"

    comparer = Recorded()

    def compare(number):
        said = f"{BOMB}+{number}" if number % 2 else "1+x"
        try:
            return comparer.same(said, "x+1")
        except NotCompared:
            return None

    with ThreadPoolExecutor(16) as threads:
        verdicts = list(threads.map(compare, range(128)))
    assert verdicts[::2] == [True] * 64  # None is: not compared
    assert set(verdicts[1::2]) == {False, None}
    assert sum(asked) - 64 * QUICK <= 64 * QUICK + WASTED + 2 * SLOW  # two may be on their way
    assert 64 * QUICK + WASTED <= 20


def processor_seconds(workers):
    """What the processes have taken so far, and their forks that have ended."""
    ticks = 0
    for worker in workers.workers:
        if worker.process is not None:
            stat = Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(field) for field in stat[11:15])  # utime, stime, cutime, cstime
    return ticks / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process has taken")
def test_what_answers_that_never_end_take_of_the_processor_is_bounded():
    """B7: real ones, in real workers. Counted is the time of the processor, so a busy machine
    changes nothing; of 64 the bound is then that of the test above."""
    count = 10
    comparer = _Comparer()
    try:
        for number in range(WORKERS):  # each starts and imports
            comparer.workers.workers[number].ask(
                {"said": "x", "gold": "y", "seconds": SLOW}, seconds=600
            )
        assert comparer.same("1+x", "x+1")
        before = processor_seconds(comparer.workers)

        def compare(number):
            said = f"{BOMB}+{number}" if number % 2 else f"{number}+x"
            try:
                return comparer.same(said, f"x+{number}")
            except NotCompared:
                return None

        with ThreadPoolExecutor(8) as threads:
            verdicts = list(threads.map(compare, range(2 * count)))
        spent = processor_seconds(comparer.workers) - before
    finally:
        comparer.workers.stop()
    assert verdicts[::2] == [True] * count
    assert set(verdicts[1::2]) <= {False, None}
    second_tries = WASTED + SLOW * max(1, WORKERS // 2)
    of_honest = 0.2 * count  # 0.1 each, and some second tries where QUICK was too short
    assert spent <= 1.5 * QUICK * count + second_tries + of_honest + 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are no layers")
def test_a_comparison_can_do_nothing_but_compare(tmp_path):
    """B7: what math-verify makes of a model's text runs without a network, files to write,
    processes, or a way to others; what it imports late is still found."""
    script = tmp_path / "tries.py"
    script.write_text(TRIES.format(root=str(Path(__file__).parent.parent), place=str(tmp_path)))
    env = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    done = subprocess.run(
        [sys.executable, script], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    if not said["layers"]["seccomp"]:
        pytest.skip("this system lacks the layer seccomp")
    tried = said["tried"]
    assert {name for name, could in tried.items() if could} == {"imports what was not imported"}
    assert len(tried) >= 9 and said["whole"] is True and said["endless"] is None


TRIES = """
import json, os, socket, subprocess, sys
sys.path.insert(0, {root!r})
from grading import math_worker
math_worker.prepare()
def connects():
    socket.create_connection(("127.0.0.1", 9), timeout=1)
def pairs():
    near, far = socket.socketpair()
    near.sendmsg([b"x"])
def writes():
    open({place!r} + "/left", "w")
def removes():
    os.unlink({place!r} + "/tries.py")
def forks():
    if os.fork() == 0: os._exit(0)
def runs():
    os.execv("/bin/true", ["true"])
def signals():
    os.kill(os.getppid(), 0)
def looks():
    open("/proc/%d/environ" % os.getppid()).read()
def watches():
    os.pidfd_open(os.getppid())
def could(work):
    def question():
        work()
        return True
    return math_worker.in_fork(question, 5.0)
def late():
    import wave, xml.dom.minidom
tried = {{work.__name__: could(work) for work in (
    connects, pairs, writes, removes, forks, runs, signals, looks, watches)}}
tried["imports what was not imported"] = could(late)
asked = dict(said="1+x", gold="x+1", seconds=5.0)
endless = dict(said="9^{{9^{{9^{{9}}}}}}+x", gold="x+1", seconds=0.2)
print(json.dumps(dict(layers=math_worker._layers, tried=tried,
    whole=math_worker.answer(asked)["same"], endless=math_worker.answer(endless)["same"])))
"""


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
    for gold in answers:
        other = float(gold.replace(",", "")) + 1
        assert is_correct(rf"\boxed{{{gold}}}", gold) == 1.0
        assert is_correct(f"The answer is ${gold}.", gold) == 1.0
        assert is_correct(rf"\boxed{{{other}}}", gold) == 0.0
        row = example(gold, {"role": "user", "content": rf"\boxed{{{gold}}} #### {gold}"})
        assert correct(trajectory(row, "I do not know."), row) == 0.0


@needs_real_data
def test_every_accepted_answer_of_natural_questions_is_right():
    with open(SHARED / "nq_open_dev.jsonl") as file:
        accepted = [json.loads(line)["answer"] for line in file][:1000]
    for answers, others in zip(accepted, accepted[1:], strict=False):
        assert all(is_correct(f"<answer>{a}</answer>", answers) == 1.0 for a in answers)
        if not set(answers) & set(others):
            assert is_correct(f"The answer is {others[0]}", answers) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "The answer is:\n\n$$\n18\n$$",
        "The answer is:\n\\[\n18\n\\]",
        "The answer is \\[ 18 \\]",
        "The answer is $$18$$.",
        "**Answer**: 18",
        "**Final Answer**: 18",
        "**Final Answer:** 18",
        "__Answer__: 18",
        "## Final Answer\n\n18",
        "**Final Answer**\n\n$$\n18\n$$",
        "The answer is 18, because 3 times 6 is 18.",
        "The answer is 18 because 3 * 6 = 18.",
        "The answer is **18**, since 20 - 2 is that.",
        "The answer is $18$, so we are done.",
        "The answer is 18 (since 3 * 6 = 18).",
        "Final Answer: The final answer is $18$. I hope it is correct.",
        "The answer is 17. No, the answer is 18.",
        "Answer = 18",
    ],
)
def test_an_answer_may_stand_in_a_display_in_bold_or_before_its_reason(text):
    """A6."""
    assert is_correct(text) == 1.0
    assert is_correct(text.replace("18", "19")) == 0.0


@pytest.mark.parametrize(
    "text, gold",
    [
        ("The answer is Paris, because it is the capital.", "Paris"),
        ("**Answer**: Because of Winn-Dixie", "Because of Winn-Dixie"),
        ("The answer is As Good as It Gets.", "As Good as It Gets"),
        ("The answer is 1, 2 and 3, as was said.", "1, 2, 3"),
        ("The answer is 18, or 19.", "18, or 19"),
    ],
)
def test_a_reason_is_cut_off_and_nothing_else(text, gold):
    """A6."""
    assert is_correct(text, gold) == 1.0


DOCUMENTED = '''\
def f(x):
    """Squares.

    ```
    f(2)
    ```
    """
    return x * x
'''


@pytest.mark.parametrize(
    "code",
    [
        DOCUMENTED,
        "def f(x):\n    return '```' * x\n",
        "s = '```'\nprint(s)\n",
        "s = 'a```b'  # see ```f```\nprint(s)\n",
        "s = '''x\n    ```python\n    y\n    ```'''\n",
        "# ends with ```\nx = 1\n",
    ],
)
def test_a_fence_closes_at_the_start_of_a_line(code):
    """A7: ``` in a string or a docstring of the program does not end it."""
    row = example()
    text = f"So:\n```python\n{code}```\nThat is it: ```f(x)``` is the square."
    assert program(trajectory(row, text), row, ("python",)) == code
    first = f"```python\nx\n```\nNo, rather\n{text}"
    assert program(trajectory(row, first), row, ("python",)) == code
    inside = text.replace("x", r"\boxed{17}").partition("\nThat")[0]
    assert r"\boxed{17}" not in last_turn(trajectory(row, inside), row)


def test_a_block_that_is_not_closed_is_no_program():
    """A7."""
    row = example()
    for text in (f"```python\n{DOCUMENTED}", "```python\nx\n  y ```z", "```python\n`` `\n"):
        assert program(trajectory(row, text), row, ("python",)) is None


# separated by bars, with \n for the end of a line
HOSTILE = r"""
answer|answer is|The answer is|answer:|**Answer**:|answer is \n|answer $$|answer \[|## answer\n
#|####|#### 1\n|*|**|_| |\n|\t|\|<a>|<a|<|</a>|<answer>|</answer>|<tool_call>|<tool_response>
[THINK]|<think>|</think>|[TOOL_CALLS]|{|}|\boxed{|\boxed {|\boxed|\text{
```|```x\n|```x|x```\n|``` ``` |`
 ```\n|$|$$|1.|1, |1. ,|score|score =|Score: 0-|because |, because|is|e|^{9|\frac{
answer**|answer:answer
"""
HOSTILE = (
    HOSTILE.strip("\n").replace("\n", "|").replace(r"\n", "\n").replace(r"\t", "\t").split("|")
)


def program_of(played, row):
    return program(played, row, ("python",))


@pytest.mark.parametrize("read", [correct, program_of])
@pytest.mark.parametrize("after", ["", " " * 40_000])
@pytest.mark.parametrize("stop", ["answered", "length"])
def test_no_text_takes_long_to_read(stop, after, read):
    """C4: 100,000 characters of any pattern in less than 0.2 s of CPU time."""
    assert len(set(HOSTILE)) >= 50
    row = example()
    for pattern in HOSTILE:
        text = pattern * ((100_000 - len(after)) // len(pattern)) + after
        spent = []
        for _ in range(5):  # CPU time, and the best of five: a busy machine fails nothing
            start = time.process_time()
            read(trajectory(row, text, stop=stop), row)
            spent.append(time.process_time() - start)
            if spent[-1] < 0.2:
                break
        assert min(spent) < 0.2, f"{pattern!r} takes {min(spent):.2f} s"


@pytest.mark.parametrize("pattern", ["<x{}>", "<x{0}></x{0}>", "answer is {}, ", "```x{}\n"])
def test_no_text_of_many_names_takes_long_to_read(pattern):
    """C4."""
    row = example()
    text = "".join(pattern.format(number) for number in range(100_000 // len(pattern)))
    start = time.process_time()
    correct(trajectory(row, text, stop="length"), row)
    assert time.process_time() - start < 1.0  # 0.1 in truth; quadratic: minutes

"""No text takes long to read: 100,000 characters of any of these patterns, in less than 0.2 s.

    pytest tests/test_linear.py

Counted is the time of the processor that the reading thread has, the best of a few: how busy the
machine is changes nothing. The readers are all that look at what a model or a judge writes: the
rewards, each format's calls, the gold queries, verdicts, what is printed, the page. The answer in a
turn, and programs, are in tests/test_answers.py.
"""

import json
import time
from types import SimpleNamespace

import pytest

import rewards
from formats import FORMATS
from grading import queries
from grading.judge import judge
from grading.ranking import read_ranking
from run import page as run_page
from trajectory import escaped

SIZE = 100_000  # characters
LIMIT = 0.2  # seconds of the processor
# A repeated part, or (opening, closing): as many of the one and then of the other.
PATTERNS = r"""
answer is |answer: |**Answer**:|answer is \n|## answer\n|answer is $$|because |#|####|#### 1\n
*|_| |\n| \n|\t|\|<a>|<|<answer>|</answer>|{|}|(|[|"|'|\boxed{|\text{|$|0|9|1,|1e|-|%|^{9|\frac{
```python\n|```x\n|```python\nx\n```\n|\n```\n|``` ``` |<python>|</python>|<python>x
<tool_call>|<tool_call>{|<tool_call>\n{"name"|<tool_call>{"name": "a", "arguments": {}}|{"name":
<tool_call><function=python><parameter=code>|<function=python>|</parameter>|</function> |<think>
<think> |</think> |<think>a</think>|[TOOL_CALLS]|[TOOL_CALLS][|[TOOL_CALLS]python[ARGS]{
python[CALL_ID]|{"actions": [|{"thought": "|<\|python_tag\|>{|Score: 0-|score =
max score: 1 |order by |select |/*|--|1/|out of |a b |é|😀
"""
PATTERNS = PATTERNS.strip("\n").replace(r"\|", "\0").replace("\n", "|").replace(r"\n", "\n")
PATTERNS = [part.replace(r"\t", "\t").replace("\0", "|") for part in PATTERNS.split("|")]
PATTERNS += ["\x1b", "\u202e", "\r"]
PAIRS = [("{", "}"), ("(", ")"), ("[", "]"), (r"\boxed{", "}"), (r"\text{", "}"), ("<a>", "</a>")]
PAIRS += [("```x\n", "```\n"), ("<think>", "</think>"), ("<python>", "</python>"), ("^{", "}")]
PAIRS += [("(select ", ")"), ('{"a":', "}"), ("<tool_call>", "</tool_call>"), ("/*", "*/")]

PARAMETERS = {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}
TOOL = {"type": "function", "function": {"name": "python", "parameters": PARAMETERS}}
ROW = {"id": 0, "messages": [{"role": "user", "content": "How many?"}], "answer": "18"}


def texts():
    for pattern in PATTERNS:
        yield pattern, pattern * (SIZE // len(pattern))
    for opening, closing in PAIRS:
        count = SIZE // (len(opening) + len(closing))
        yield opening + closing, opening * count + closing * count


def trajectory(text, answer=None):
    messages = [*ROW["messages"], {"role": "assistant", "content": text}]
    return SimpleNamespace(messages=messages, stop="answered", answer=answer, calls=[])


def score_of(name):
    reward = getattr(rewards, name)
    return lambda text: reward(trajectory(text), ROW)


def in_a_tool(name):
    reward = getattr(rewards, name)
    return lambda text: reward(trajectory("", answer=text), ROW)


def a_verdict(text):
    judging = judge.__new__(judge)  # it is asked nothing
    judging.scale = 1.0
    return judging._score("Score: " + text), judging._score(text)


READERS = {name: score_of(name) for name in ("f1", "format", "repetition")}
READERS |= {f"{name} in a tool": in_a_tool(name) for name in ("correct", "f1", "format")}
READERS["boxed"] = lambda text: rewards.correct(trajectory(rf"\boxed{{{text}}}"), ROW)
READERS["behind answer is"] = lambda text: rewards.correct(trajectory(f"Answer: {text}"), ROW)
READERS |= {f"calls of {name}": form([TOOL]).parse for name, form in FORMATS.items()}
READERS["gold queries"] = queries._is_ordered
READERS["queries"] = queries._reads_a_table
READERS["verdicts"] = a_verdict
READERS["rankings"] = lambda text: (read_ranking("Ranking: " + text, 3), read_ranking(text, 3))
READERS["diversity"] = lambda text: rewards.diversity([trajectory(text), trajectory("x")], ROW)
READERS["printed"] = escaped


def seconds_of(read, text):
    """The best of five; one that is below the limit is enough."""
    spent = []
    for _ in range(5):
        start = time.thread_time()
        read(text)
        spent.append(time.thread_time() - start)
        if spent[-1] < LIMIT:
            break
    return min(spent)


@pytest.mark.parametrize("name", READERS)
def test_no_text_takes_long_to_read(name):
    """C4: of each pattern, and of pairs that nest 10,000 deep."""
    assert len(set(PATTERNS)) >= 50
    for pattern, text in texts():
        assert len(text) > 0.99 * SIZE
        spent = seconds_of(READERS[name], text)
        assert spent < LIMIT, f"{pattern!r} takes {spent:.2f} s"


def test_no_text_takes_long_on_the_page(tmp_path):
    """C4: a rollout of 100,000 characters, each of them a token."""
    run_page.page(tmp_path)  # imports, and reads the template
    for pattern in ("a", "<", '"', "\n", "é", "😀", "\x1b", "\\"):
        text = pattern * SIZE
        row = {"step": 0, "ids": list(range(SIZE)), "pieces": list(text)}
        row |= {"kinds": "t" * SIZE, "logprobs": [-1.0] * SIZE, "turn_starts": [0], "calls": []}
        (tmp_path / "rollouts.jsonl").write_text(json.dumps(row) + "\n")
        assert seconds_of(lambda text: run_page.page(tmp_path), text) < LIMIT


@pytest.mark.parametrize(
    "query, ordered",
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("SELECT * FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT a FROM t WHERE b IN (SELECT (c) FROM u ORDER BY (c)) LIMIT 1", False),
        ("SELECT f(a) FROM (t) ORDER /* it */ BY f((a))", True),
        ("SELECT a FROM t ORDER(BY)", False),
        ("SELECT ')' FROM t ORDER BY a", True),
        ("(((", False),
        (")) ORDER BY a ((", True),
        ("(" * 1000 + "ORDER BY a" + ")" * 1000, False),
        ("(" * 1000 + ")" * 1000 + " ORDER BY a", True),
    ],
)
def test_only_an_order_outside_of_parentheses_counts(query, ordered):
    """C4: in one pass, whatever is nested."""
    assert queries._is_ordered(query) == ordered


@pytest.mark.parametrize(
    "text, codes",
    [
        ("```python\nx\n```\n```python\ny\n```", ["x", "y"]),
        ("```python\nx\n```\n```python\ny\n", ["x"]),
        ("```text\n```python\nx\n```\n", []),
        ("```python\n\n```  \nand", [""]),
        ("```python\ns = '```'\n ```\n```\n", ["s = '```'\n ```"]),
    ],
)
def test_a_block_ends_at_the_first_line_that_is_a_fence(text, codes):
    """C4: and where none ends any more, that is not looked for again."""
    calls = FORMATS["fence"]([TOOL]).parse(text)
    assert [call.arguments["code"] for call in calls if not call.error] == codes


@pytest.mark.parametrize("size", [10, 4000, 4090, 4096, 4100, 16_000, 17_000, 90_000])
def test_json_of_any_length_is_read_and_its_mistakes_are_found(size):
    """C4: only a part of the text is decoded at first; where it is cut changes nothing."""
    hermes = FORMATS["hermes"]([TOOL])
    for code in ("x" * size, "\\" * (size // 2), "</tool_call>" * (size // 12), "é😀" * size):
        call = json.dumps(
            {"name": "python", "arguments": {"code": code, "n": [size, -1.5e3, True]}}
        )
        for text in (call, f"{call}\n</tool_call>", f"{call}</tool_call> and more" * 2):
            (read, *_) = hermes.parse(f"<tool_call>{text}")
            assert not read.error and read.arguments["code"] == code
            assert read.arguments["n"] == [size, -1500.0, True]
        (torn,) = hermes.parse(f"<tool_call>{call[:-1]}")
        assert torn.error == "bad_json" and "no valid JSON" in torn.message
    (number,) = hermes.parse("<tool_call>" + "7" * min(size, 4000))
    assert "expected an object, got 7777" in number.message

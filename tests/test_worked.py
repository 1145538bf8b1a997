"""Worked solutions become demonstrations that call python (tasks/worked.py).

pytest tests/test_worked.py
"""

import json
from pathlib import Path

import pytest

from run.config import UserError
from tasks import worked
from tasks.worked import Config, calculate, convert, demonstration

GSM8K = Path(__file__).parents[2] / "shared/data/gsm8k_train.jsonl"


def test_each_mark_becomes_a_call_and_its_result():
    solution = "She sold 48/2 = $<<48/2=24>>24 of them.\nSo 72 = <<48+24=72>>72 in all.\n#### 72"
    question, *turns = demonstration("How many?", solution)
    assert question == {"role": "user", "content": "How many?"}
    said = [(turn["role"], turn["content"]) for turn in turns]
    assert said == [
        ("assistant", "She sold 48/2"),
        ("tool", "24.0"),
        ("assistant", "24 of them.\nSo 72"),
        ("tool", "72"),
        ("assistant", "72 in all.\nThe answer is \\boxed{72}."),
    ]
    calls = [call for turn in turns for call in turn.get("tool_calls", ())]
    codes = [call["function"]["arguments"]["code"] for call in calls]
    assert codes == ["print(48/2)", "print(48+24)"]


@pytest.mark.parametrize(
    "expression, stated, result",
    [
        ("2*1.5", "3", "3.0"),
        ("100/3", "33.33", "33.333333333333336"),  # rounded by hand
        ("1000*2", "2,000", "2000"),
        ("48/2", "25", None),
        ("1/0", "0", None),
        ("20%*5", "1", None),
        ("9**9**9**9", "1", None),
        ("exit()", "0", None),
        ("(1", "1", None),
        ("", "", None),
        ("1+" * 60 + "1", "61", None),
        ("1 1", "1", None),
        ("1(2)", "2", None),
        ("0777", "777", None),
    ],
)
def test_only_arithmetic_that_is_right_becomes_a_call(expression, stated, result):
    assert calculate(expression, stated) == result


@pytest.mark.parametrize("answer", ["It is 4.\n#### 4", "<<2+2=5>>5\n#### 5", "<<a+b=4>>\n#### 4"])
def test_a_solution_without_a_right_mark_is_left_out(answer):
    assert demonstration("How many?", answer) is None


def test_bad_input_is_one_sentence(tmp_path):
    def complaint(text):
        file = tmp_path / "rows.jsonl"
        file.write_text(text)
        with pytest.raises(UserError) as caught:
            convert(Config(file=str(file), out=str(tmp_path / "made.jsonl")))
        return str(caught.value)

    assert complaint("no").endswith("line 1: no JSON")
    wanted = "line 1: expected texts as question and answer"
    assert complaint("[]").endswith(wanted)
    assert complaint('{"question": "?"}').endswith(wanted)
    (tmp_path / "made.jsonl").write_text("kept")
    assert "is there already" in complaint('{"question": "?", "answer": "4"}')
    assert (tmp_path / "made.jsonl").read_text() == "kept"
    with pytest.raises(UserError, match="expected a .jsonl file"):
        convert(Config(file=str(tmp_path / "missing.jsonl")))


def test_gsm8k(tmp_path):
    if not GSM8K.is_file():
        pytest.skip("../shared/data is not here: it has GSM8K's training set")
    out = tmp_path / "made" / "worked.jsonl"
    worked.main([f"--file={GSM8K}", f"--out={out}"])
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").strip().split("\n")]
    assert len(rows) == 7378
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        calls = roles.count("tool")
        assert roles == ["user"] + ["assistant", "tool"] * calls + ["assistant"]
        assert calls >= 1

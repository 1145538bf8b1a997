"""The reward call_match and the data bfcl:, the questions of the Function-Calling Leaderboard.

    pytest tests/test_call_match.py

The verdicts below are those of the leaderboard's own checker: bench/bfcl.py compared both on
295,280 calls of its 3,491 questions (evidence/bench/bfcl.txt). The rows are Berkeley's, of
../shared/data/bfcl, and some of ours.
"""

import json
from functools import cache

import pytest
from test_bfcl import BFCL, needs_bfcl

import data
import evaluate
import play as play_script
import train_grpo
from grading.calls import call_match, right_calls
from play import is_here
from rewards import check_rows, need_answer, select
from run import config
from run.config import UserError
from tasks import bfcl
from trajectory import ToolCall, Trajectory

SHARED = f"?folder={BFCL}"


def row(accepted, name="f", **parameters):
    """A row with one function. accepted: of its arguments. parameters: name=schema."""
    required = [key for key in parameters if not key.startswith("o")]
    schema = {"type": "object", "properties": parameters, "required": required}
    tool = {"type": "function", "function": {"name": name, "parameters": schema}}
    return {"id": 0, "tools": [tool], "ground_truth": [{name: accepted}]}


def verdict(example, *calls, stop="answered", error=None):
    """calls: (name, arguments)."""
    made = [ToolCall(0, name, arguments, "", error, 0.0, ends=True) for name, arguments in calls]
    return call_match(Trajectory(example, calls=made, turn_starts=[0], stop=stop), example)


TEXT, WHOLE, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
TRUTH, OBJECT = {"type": "boolean"}, {"type": "object"}
TEXTS = {"type": "array", "items": TEXT}
NUMBERS = {"type": "array", "items": NUMBER}
OBJECTS = {"type": "array", "items": OBJECT}
LISTS = {"type": "array", "items": {"type": "array", "items": WHOLE}}

VERDICTS = [
    # schema of x, accepted, given, right
    (TEXT, ["April 1, 2024"], "april 1 2024", True),
    (TEXT, ["April 1, 2024"], "april-1_2024*^/.", True),
    (TEXT, ["it's"], 'it"s', True),
    (TEXT, ["April 1, 2024"], "April 2, 2024", False),
    (TEXT, ["a"], "a!", False),
    (TEXT, ["a"], 5, False),
    (TEXT, ["5"], 5, False),
    (TEXT, ["a", ""], "", True),
    (TEXT, [True], True, True),  # the type of what is accepted counts, too
    (TEXT, [5], "5", False),
    (WHOLE, [5], 5, True),
    (WHOLE, [5], 5.0, False),
    (WHOLE, [5], True, False),
    (WHOLE, [1], True, False),
    (WHOLE, [5], "5", False),
    (WHOLE, [2.5], 2.5, True),
    (WHOLE, ["n"], "n", True),  # the name of a variable
    (WHOLE, ["n"], "N", False),  # which is compared as it is
    (NUMBER, [5.0], 5, True),
    (NUMBER, [5], 5.0, True),
    (NUMBER, [5.0], 5.1, False),
    (NUMBER, [1.0], True, False),
    (TRUTH, [True], True, True),
    (TRUTH, [True], 1, False),
    (TRUTH, [True], "true", False),
    (TRUTH, [True], False, False),
    ({}, ["a"], "A", True),  # "any": text, there
    ({}, [5], 5, True),
    (TEXT, [None], None, True),
    (TEXT, ["a"], None, False),
    (TEXTS, [["New York", "b"]], ["newyork", "B"], True),
    (TEXTS, [["a", "b"]], ["b", "a"], False),
    (TEXTS, [["a", "b"], ["b", "a"]], ["b", "a"], True),
    (TEXTS, [["a"]], ["a", "a"], False),
    (TEXTS, [["a"]], "a", False),
    (TEXTS, [["a"], ""], [], True),  # an oddity of theirs
    (NUMBERS, [[1.0, 2.5]], [1, 2.5], False),  # and this: in a list, a whole number is no float
    (NUMBERS, [[1, 2.5]], [1, 2.5], True),
    (NUMBERS, [[1.0]], ["1"], False),
    (LISTS, [[[1, 2], [3]]], [[1, 2], [3]], True),
    (LISTS, [[[1, 2], [3]]], [[1, 2], [4]], False),
    (OBJECT, [{"a": ["X"], "b": [1, ""]}], {"a": "x"}, True),
    (OBJECT, [{"a": ["X"], "b": [1, ""]}], {"a": "x", "b": 1.0}, True),
    (OBJECT, [{"a": ["X"], "b": [1, ""]}], {"a": "x", "b": 2}, False),
    (OBJECT, [{"a": ["X"], "b": [1]}], {"a": "x"}, False),
    (OBJECT, [{"a": ["X"]}], {"a": "x", "c": 1}, False),
    (OBJECT, [{"a": ["X"]}], "a", False),
    (OBJECT, [{"a": [{"b": "C"}]}], {"a": {"b": "C"}}, True),
    (OBJECT, [{"a": [{"b": "C"}]}], {"a": {"b": "c"}}, False),  # deeper it is compared as it is
    (OBJECTS, [[{"a": [1]}, {"a": [2]}]], [{"a": 1}, {"a": 2}], True),
    (OBJECTS, [[{"a": [1]}, {"a": [2]}]], [{"a": 2}, {"a": 1}], False),
    (OBJECTS, [[{"a": [1]}, {"a": [2]}]], [{"a": 1}], False),
    (OBJECTS, [[{"a": ["x", ""]}]], [{}], True),
    (OBJECTS, [[{"a": [1]}]], [[1]], False),
]  # fmt: skip


@pytest.mark.parametrize("schema, accepted, given, is_right", VERDICTS)
def test_a_value_is_compared_as_the_leaderboard_does(schema, accepted, given, is_right):
    assert verdict(row({"x": accepted}, x=schema), ("f", {"x": given})) == float(is_right)


def test_which_arguments_there_are_counts():
    example = row({"x": [1], "o": ["", "a"]}, x=WHOLE, o=TEXT, other=TEXT)
    assert verdict(example, ("f", {"x": 1})) == 1.0
    assert verdict(example, ("f", {"x": 1, "o": "a"})) == 1.0
    assert verdict(example, ("f", {"x": 1, "o": "b"})) == 0.0
    assert verdict(example, ("f", {"o": "a"})) == 0.0
    assert verdict(example, ("f", {"x": 1, "other": "a"})) == 0.0  # nothing is accepted for it
    assert verdict(example, ("f", {"x": 1, "y": 1})) == 0.0
    assert verdict(example, ("g", {"x": 1})) == 0.0
    assert verdict(example, ("f", None), error="bad_json") == 0.0
    must = row({"x": [1], "o": ["a"]}, x=WHOLE, o=TEXT)
    assert verdict(must, ("f", {"x": 1})) == 0.0  # it may not be left out, whatever the schema says


def test_several_calls_count_in_any_order_and_each_once():
    example = row({"x": [1]}, x=WHOLE)
    example["ground_truth"] = [{"f": {"x": [1, 2]}}, {"f": {"x": [1]}}]
    assert verdict(example, ("f", {"x": 2}), ("f", {"x": 1})) == 1.0
    # each takes the first that fits, as there: another pairing is not looked for
    assert verdict(example, ("f", {"x": 1}), ("f", {"x": 2})) == 0.0
    assert verdict(example, ("f", {"x": 1}), ("f", {"x": 1})) == 1.0
    assert verdict(example, ("f", {"x": 1})) == 0.0
    assert verdict(example, *[("f", {"x": 1})] * 3) == 0.0
    assert verdict(example) == 0.0


def test_calls_that_break_their_schema_count_by_what_is_accepted():
    example = row({"x": [None]}, x=TEXT)
    given = ("f", {"x": None})
    assert verdict(example, given, stop="max_turns", error="bad_arguments") == 1.0
    for stop in ("length", "timeout", "max_tool_calls", "error", "placeholder"):
        assert verdict(example, given, stop=stop) == 0.0
    example["ground_truth"] = []
    assert verdict(example) == 1.0 and verdict(example, stop="max_turns") == 0.0
    assert verdict(example, stop="length") == 0.0


def test_only_calls_of_the_last_turn_and_of_the_rows_functions_count():
    example = row({"x": [1]}, x=WHOLE)
    calls = [
        ToolCall(0, "f", {"x": 2}, "", "bad_arguments", 0.0),
        ToolCall(1, "search", {}, "found", None, 0.0),
        ToolCall(1, "f", {"x": 1}, "", None, 0.0, ends=True),
    ]
    t = Trajectory(example, calls=calls, turn_starts=[0, 9], stop="answered")
    assert call_match(t, example) == 1.0
    unknown = ToolCall(1, "sun", {}, "", "unknown_tool", 0.0)
    t.calls.append(unknown)
    assert call_match(t, example) == 0.0


@pytest.mark.parametrize(
    "ground_truth, words",
    [
        (None, "row 3: its 'ground_truth' is None: expected"),
        ({"f": {}}, "expected [{\"name\": {\"argument\": [accepted values]}}], [] for no call, or"),
        ("[{", "row 3: its 'ground_truth' is broken JSON"),
        (["f(x=1)"], "row 3: its 'ground_truth' holds 'f(x=1)'"),
        ([{"f": {"x": 1}}], "its 'ground_truth' holds {'f': {'x': 1}}"),
        ([{"g": {}}], "its 'ground_truth' calls 'g', its functions are f: give the row a column"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_say_what_is_right_ends_the_run(ground_truth, words):
    example = row({"x": [1]}, x=WHOLE) | {"ground_truth": ground_truth, "id": 2}
    with pytest.raises(UserError) as refused:
        verdict(example, ("f", {"x": 1}))
    assert words in str(refused.value)
    with pytest.raises(UserError, match="reward call_match: row 3: "):  # and before it begins
        check_rows(select(("call_match",)), [row({"x": [1]}, x=WHOLE), example])
    selected = select(("call_match", "correct"))
    check_rows(selected, [example | {"reward": ["correct"]}])  # which is not scored by it


def test_the_right_calls_may_be_text_and_in_another_column():
    example = row({"x": [1]}, x=WHOLE)
    example["right"] = json.dumps(example.pop("ground_truth"))
    (reward, _) = select(("call_match",), ("call_match.column=right",))["call_match"]
    made = [ToolCall(0, "f", {"x": 1}, "", None, 0.0, ends=True)]
    assert reward(Trajectory(example, calls=made, turn_starts=[0], stop="answered"), example) == 1.0
    assert not need_answer(["call_match"]) and not need_answer(["call_match:0.5", "length"])
    assert need_answer(["call_match", "correct"])


# ---- the data


@cache
def questions():
    return data.load(f"bfcl:simple_python,multiple,parallel{SHARED}", require_answer=False)


@needs_bfcl
def test_questions_and_answers_arrive_in_one_row():
    rows = questions()
    assert len(rows) == 800
    triangle = next(row for row in rows if row["bfcl_id"] == "multiple_0")
    names = [tool["function"]["name"] for tool in triangle["tools"]]
    assert names == ["triangle_properties_get", "circle_properties_get"]
    assert [*triangle["ground_truth"][0]] == ["triangle_properties_get"]
    assert triangle["category"] == "multiple"
    assert json.loads(triangle["answer"]) == triangle["ground_truth"]
    parameters = triangle["tools"][0]["function"]["parameters"]
    assert parameters["type"] == "object" and "optional" not in json.dumps(parameters)
    data.check_names(rows, [], ["call_match"])


@needs_bfcl
def test_the_right_calls_of_all_questions_are_right_and_changed_ones_wrong():
    """Whose right calls are: as the checker says, too."""
    changed = 0
    in_other_order = 0
    for example in questions():
        calls = [next(iter(call.items())) for call in right_calls(example)]
        assert verdict(example, *calls) == 1.0, example["bfcl_id"]
        in_other_order += verdict(example, *calls[::-1])
        assert verdict(example, *calls[1:]) == 0.0 and verdict(example, *calls, calls[0]) == 0.0
        assert verdict(example | {"ground_truth": []}, *calls) == 0.0
        name, arguments = calls[0]
        for argument in arguments:
            for value in ({"zz": 1}, [["zz"]], "no such value"):
                wrong = (name, arguments | {argument: value})
                assert verdict(example, wrong, *calls[1:]) == 0.0, (example["bfcl_id"], argument)
                changed += 1
        assert verdict(example, (name, arguments | {"zz": 1}), *calls[1:]) == 0.0
        assert verdict(example, (f"{name}_", arguments), *calls[1:]) == 0.0
    assert changed > 5000
    # in one, what two right calls accept overlaps, and the first takes the wrong one, as there
    assert in_other_order == 799


def write(folder, name, *rows):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def question(id, **more):
    function = {"name": "geo.area", "description": "d", "parameters": {
        "type": "dict", "required": ["x"], "properties": {
            "x": {"type": "float", "description": "d"},
            "how": {"type": "tuple", "items": {"type": "any"}, "optional": True},
            "units": {"type": "array", "items": {"type": "string"}, "enum": ["m", "cm"]},
            "exact": {"type": "boolean", "enum": ["True", "dontcare"]},
            "of": {"type": "dict", "properties": {"n": {"type": "integer"}}},
        },
    }}  # fmt: skip
    asked = [[{"role": "user", "content": f"area of {id}?"}]]
    return {"id": id, "question": asked, "function": [function]} | more


def right(id, x=5.0):
    return {"id": id, "ground_truth": [{"geo.area": {"x": [x]}}]}


def test_the_types_of_the_leaderboard_become_those_of_json(tmp_path):
    write(tmp_path, "irrelevance.jsonl", question("irrelevance_0"))
    (example,) = data.load(f"bfcl:irrelevance?folder={tmp_path}", require_answer=False)
    assert example["ground_truth"] == [] and example["answer"] == "[]"
    assert example["tools"][0]["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "x": {"type": "number", "description": "d"},
            "how": {"type": "array", "items": {}},
            "units": {"type": "array", "items": {"type": "string", "enum": ["m", "cm"]}},
            "exact": {"type": "boolean", "description": "One of True, dontcare."},
            "of": {"type": "object", "properties": {"n": {"type": "integer"}}},
        },
        "required": ["x"],
    }


def test_the_newest_files_are_taken_and_the_old_name_of_one(tmp_path):
    write(tmp_path, "BFCL_v3_simple.json", question("simple_0"))
    write(tmp_path, "possible_answer/BFCL_v3_simple.json", right("simple_0"))
    source = f"bfcl:simple_python?folder={tmp_path}"
    (old,) = data.load(source, require_answer=False)
    assert (old["bfcl_id"], old["category"]) == ("simple_0", "simple_python")
    for version, x in ((4, 4.0), (10, 10.0)):
        write(tmp_path, f"BFCL_v{version}_simple_python.json", question("simple_python_0"))
        answers = f"possible_answer/BFCL_v{version}_simple_python.json"
        write(tmp_path, answers, right("simple_python_0", x))
    (new,) = data.load(source, require_answer=False)
    assert new["ground_truth"] == [{"geo_area": {"x": [10.0]}}]


def test_the_hub_is_asked_for_the_files_of_these_categories_alone(tmp_path, monkeypatch):
    asked = []

    def download(repository, **how):
        asked.append((repository, how["repo_type"], how["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    write(tmp_path, "BFCL_v4_live_relevance.json", question("live_relevance_0-0-0"))
    (example,) = data.load("bfcl:live_relevance", require_answer=False)
    assert example["ground_truth"] == example["answer"] == "any"
    patterns = ["BFCL_v*_live_relevance.json", "possible_answer/BFCL_v*_live_relevance.json"]
    assert asked == [(bfcl.REPOSITORY, "dataset", patterns)]

    def away(*_, **__):
        raise OSError("nobody\nthere")

    monkeypatch.setattr("huggingface_hub.snapshot_download", away)
    with pytest.raises(UserError, match="cannot load 'gorilla-llm/.*' from the hub .nobody there"):
        data.load("bfcl:live_relevance", require_answer=False)


@pytest.mark.parametrize(
    "source, words",
    [
        ("multi_turn_base", "its calls are run, turn by turn, by programs of the benchmark"),
        ("memory_kv", "its calls are run"),
        ("web_search_base", "its calls are run"),
        ("format_sensitivity", "its calls are run"),
        ("exec_simple", "its calls are run"),
        ("simple_java", "its values are texts in the syntax of that language"),
        ("javascript", "its values are texts"),
        ("simple_pyton", "bfcl: has no category 'simple_pyton': did you mean"),
        ("", "bfcl: has no category ''"),
        ("live,live_simple", "names live_simple twice"),
        ("live?path=x", "has no option 'path': there is folder"),
        ("live?folder", "cannot read 'folder'"),
        ("multiple?folder=nowhere", "bfcl:multiple: no multiple.jsonl or BFCL_v4_multiple.json: "),
    ],
)
def test_what_cannot_be_played_is_refused(source, words):
    with pytest.raises(UserError) as refused:
        data.load(f"bfcl:{source}", require_answer=False)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_files_that_do_not_fit_are_refused(tmp_path):
    source = f"bfcl:multiple?folder={tmp_path}"

    def refusal():
        with pytest.raises(UserError) as refused:
            data.load(source, require_answer=False)
        return str(refused.value)

    write(tmp_path, "multiple.jsonl", question("multiple_0"))
    assert "which has the right calls" in refusal()
    write(tmp_path, "possible_answer/multiple.jsonl", right("multiple_1"))
    assert "there is no answer to 'multiple_0' in" in refusal()
    write(tmp_path, "possible_answer/multiple.jsonl", [])
    assert "multiple.jsonl:1: expected an object with an id" in refusal()
    write(tmp_path, "possible_answer/multiple.jsonl", right("multiple_0"))
    for broken in ({"question": [[], []]}, {"question": "x"}, {"function": {}}):
        write(tmp_path, "multiple.jsonl", question("multiple_0", **broken))
        assert "multiple_0: expected one question and functions" in refusal()
    (tmp_path / "multiple.jsonl").write_text("{")
    assert "multiple.jsonl:1: broken JSON" in refusal()


def test_it_has_no_splits_and_is_here_only_as_a_folder(tmp_path):
    assert data.is_file("bfcl:live") and not is_here("bfcl:live")
    assert is_here(f"bfcl:live?folder={tmp_path}") and not is_here("bfcl:live?folder=none/here")
    with pytest.raises(UserError, match="split has no effect"):
        evaluate.load_config(["--config", "bfcl.py"], evaluate.Config(split="validation"))


@needs_bfcl
def test_a_dry_run_says_the_right_calls(capsys):
    argv = ["--config", "bfcl.py", f"--data=bfcl:parallel{SHARED}"]
    cfg = config.parse(train_grpo.Config, argv, train_grpo.check)
    t = play_script.play_made_up(cfg)
    assert (t.stop, t.reward, len(t.calls)) == ("answered", 1.0, 2)

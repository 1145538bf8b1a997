"""Pins data.py: what an example or a conversation is made of, and the sentence for every row that
does not fit.

pytest tests/test_data.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import data
from formats import Call
from formats.messages import calls_of
from run.config import UserError

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
needs_real_data = pytest.mark.skipif(not SHARED.is_dir(), reason="no real data in ../shared/data")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(*rows, name="x.jsonl"):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(name).write_text("\n".join(lines), encoding="utf-8")
    return name


def row(prompt="What?", answer="18", **columns):
    return {"prompt": prompt, "answer": answer, **columns}


def complaint(*args, **options):
    with pytest.raises(UserError) as caught:
        data.load(*args, **options)
    return str(caught.value)


def test_an_example_is_its_index_messages_answer_and_the_other_columns():
    examples = data.load(write(row(level=3, id="a"), "", row("Who?", "Ann")))
    user = {"role": "user", "content": "What?"}
    assert examples[0] == row(level=3, id=0, messages=[user])
    assert [(e["id"], e["answer"]) for e in examples] == [(0, "18"), (1, "Ann")]


def test_limit_takes_the_first_rows_and_does_not_read_on():
    name = write(row("1"), row("2"), "{broken")
    assert [e["prompt"] for e in data.load(name, limit=2)] == ["1", "2"]
    assert complaint(name, limit=3).startswith("x.jsonl:3: broken JSON: Expecting property name")
    assert complaint(name, limit=0) == "limit = 0: expected at least 1, or none for all rows"


@pytest.mark.parametrize(
    "value, answer",
    [
        (18, "18"),
        (1.5, "1.5"),
        (" a b ", "a b"),
        (["x", 2], ["x", "2"]),
        ("1,234", "1,234"),
        (0, "0"),
    ],
)
def test_an_answer_is_text_or_a_list_of_texts(value, answer):
    assert data.load(write(row(answer=value)))[0]["answer"] == answer


def test_answer_after_keeps_what_follows_the_last_marker_without_commas():
    name = write(row(answer="so #### 3\n#### 1,234 "))
    assert data.load(name, answer_after="####")[0]["answer"] == "1234"
    name = write(row(answer="#### 1"), row(answer="2"))
    says = "x.jsonl, row 2: no '####' in its 'answer': check answer_after"
    assert complaint(name, answer_after="####") == says


def test_a_template_names_columns_and_leaves_all_other_braces_alone():
    name = write(row("{x} {hint} {}", hint="f{1}", question="Q"))
    template = r"{hint}: {prompt} Put it in \boxed{} or {a b}."
    message = data.load(name, prompt_template=template)[0]["messages"][0]
    assert message["content"] == r"f{1}: {x} {hint} {} Put it in \boxed{} or {a b}."
    told = data.load(name, prompt_column="question", prompt_template="{prompt}={question}")
    assert told[0]["messages"][0]["content"] == "Q=Q"


def test_a_template_that_cannot_be_filled_is_refused():
    name = write(row(hint=None))
    columns = "there are prompt, answer, hint: choose with --prompt_template=…"
    assert (
        complaint(name, prompt_template="{prmpt}")
        == f"x.jsonl, row 1: no column 'prmpt', {columns}"
    )
    assert complaint(name, prompt_template="{hint}") == "x.jsonl, row 1: its 'hint' is empty"
    assert "names no column: write {prompt}" in complaint(name, prompt_template="Hello")


def test_a_template_does_not_show_the_answer():
    says = r"x.jsonl, row 1: prompt_template would show the answer: it names {answer}"
    assert complaint(write(row()), prompt_template=r"{prompt} \boxed{answer}") == says


def test_the_system_prompt_goes_in_front_unless_there_is_one():
    system, user = {"role": "system", "content": "S"}, {"role": "user", "content": "U"}
    name = write(row("U"), row([user]), row([system, user]))
    examples = data.load(name, system_prompt="S")
    assert [e["messages"] for e in examples] == [[system, user]] * 3
    assert examples[1]["prompt"] == [user]  # the row's own list is not changed


def test_messages_are_read_as_those_of_demonstrations():
    """A16: one reader, whose result a rollout's own messages have, too."""
    asks = {"role": "user", "content": "U", "tool_calls": None}  # parquet fills in missing keys
    two = calls(call({}, "f", id="a"), call('{"x": 1}', "g", id="b"))
    two["content"] = None
    results = [result("2", tool_call_id="b"), result("1", tool_call_id="a")]
    name = write(row([asks, two, *results]))
    expected = [
        {"role": "user", "content": "U"},
        calls(call({}, "f", id="a"), call({"x": 1}, "g", id="b")),
        result("1", tool_call_id="a", name="f"),
        result("2", tool_call_id="b", name="g"),
    ]
    assert data.load(name)[0]["messages"] == expected
    says = "x.jsonl, row 1: prompt_template has no effect: 'prompt' holds chat messages"
    assert complaint(name, prompt_template="Q: {prompt}") == says
    says = "x.jsonl, row 1: 'prompt' is a list, but not of messages with a role and content"
    assert complaint(write(row(["U"]))) == says


@pytest.mark.parametrize("answer", [None, "", [], "  ", [""], float("nan")])
def test_a_row_without_an_answer_is_named(answer):
    name = write(row(), row(answer=answer))
    assert complaint(name) == "x.jsonl, row 2: its 'answer' is empty"


def test_rows_without_answers_are_fine_where_none_is_required():
    examples = data.load(write({"prompt": "a"}, row(answer=None), row()), require_answer=False)
    assert [e["answer"] for e in examples] == ["", "", "18"]


def test_a_missing_column_is_answered_with_those_there_are():
    name = write({"question": "a", "answer": "b"}, {"question": "a"})
    says = "x.jsonl, row 1: no column 'prompt', there are question, answer"
    assert complaint(name) == says + ": choose with --prompt_column=…"
    says = "x.jsonl, row 2: no column 'answer', there are question: choose with --answer_column=…"
    assert complaint(name, prompt_column="question") == says
    assert complaint(write(row(""))) == "x.jsonl, row 1: its 'prompt' is empty"
    says = "x.jsonl, row 1: 'answer' is an object: expected text, a number or a list of them"
    assert complaint(write(row(answer={"a": 1}))) == says


def test_a_missing_file_is_answered_with_the_nearest_name():
    write(row(), name="gsm8k_test.jsonl")
    assert complaint("gsm8k_tset.jsonl") == (
        "no file 'gsm8k_tset.jsonl': did you mean gsm8k_test.jsonl?"
    )
    assert complaint("no/x.parquet") == "no file 'no/x.parquet'"
    assert complaint("./calc") == "no file './calc'"
    write(row(), name="x.csv")
    assert complaint("x.csv") == "cannot read 'x.csv': expected a .jsonl, .json or .parquet file"


def test_a_broken_line_is_named_with_its_file_and_number():
    assert complaint(write(row(), "", '{"prompt": ')).startswith("x.jsonl:3: broken JSON: ")
    assert complaint(write("[1, 2]")) == "x.jsonl:1: expected an object {…}, got a list"
    Path("x.jsonl").write_bytes(b'{"prompt": "\xff\xfe"}')
    assert complaint("x.jsonl").startswith("x.jsonl:1: broken JSON: 'utf-8' codec")
    assert complaint(write("", "")) == "x.jsonl has no rows"


def test_a_json_file_may_be_lines_or_one_array():
    array = json.dumps([row("1"), row("2")], indent=1)
    assert [e["prompt"] for e in data.load(write(array, name="x.json"))] == ["1", "2"]
    assert len(data.load(write(row(), row(), name="y.json"))) == 2
    assert complaint(write("[", "{},", "{", name="z.json")).startswith("z.json:3: broken JSON")
    assert complaint(write("[1]", name="z.json")) == "z.json:1: expected an object {…}, got a int"


def test_parquet_gives_the_rows_that_jsonl_gives():
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    talked = [USER, {"role": "assistant", "content": "A", "name": "x"}, USER]
    chat = [*talked, calls(call({"x": "1"}), call({"y": 2}, "add")), result("1"), result("2")]
    rows = [row(chat, 1), row(chat, 2), row(chat, 3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), "x.parquet")
    expected = data.load(write(*rows))
    assert "y" not in expected[0]["messages"][3]["tool_calls"][0]["function"]["arguments"]
    stored = [example["messages"] for example in data.load("x.parquet", limit=2)]
    assert stored == [expected[0]["messages"]] * 2
    assert [e["answer"] for e in data.load("x.parquet")] == ["1", "2", "3"]
    Path("y.parquet").write_text("hello")
    assert complaint("y.parquet").startswith("cannot read 'y.parquet' as parquet: ")


def test_a_task_is_a_file_in_tasks_that_makes_rows(monkeypatch):
    sys.modules.pop("tasks.dice", None)
    os.mkdir("tasks")
    code = "def rows(split, seed=0):\n    return [dict(prompt=split, answer=seed)] * 3\n"
    Path("tasks/dice.py").write_text(code)
    Path("tasks/__init__.py").write_text("")
    monkeypatch.setattr(data, "TASKS", Path("tasks").resolve())
    monkeypatch.syspath_prepend(os.getcwd())
    for name in [name for name in sys.modules if name.split(".")[0] == "tasks"]:
        monkeypatch.delitem(sys.modules, name)
    examples = data.load("task:dice", split="test", seed=7, limit=2)
    assert [(e["prompt"], e["answer"]) for e in examples] == [("test", "7")] * 2
    assert complaint("task:dise") == "no task 'dise'; there are dice"
    says = "expected a .jsonl, .json or .parquet file, a task (task:dice) or a hub id such as"
    assert complaint("dice") == f"data = 'dice': {says} openai/gsm8k"
    for name in [name for name in sys.modules if name.split(".")[0] == "tasks"]:
        del sys.modules[name]  # the real tasks again, for the tests after this one


def test_a_file_in_tasks_that_makes_no_rows_is_no_task():
    """tasks/tiny.py has the model that the tasks are for."""
    names = ("calc", "chart", "desk", "facts", "multi", "shop")
    assert complaint("task:tiny") == f"no task 'tiny'; there are {', '.join(names)}"
    says = f"a task ({', '.join(f'task:{name}' for name in names)}) or a hub id such as"
    assert says in complaint("tiny")


def test_a_task_that_is_no_python_is_listed_and_says_what_is_wrong_when_it_is_used(monkeypatch):
    os.mkdir("tasks")
    Path("tasks/broken.py").write_text("def rows(split, seed=0:\n")
    monkeypatch.setattr(data, "TASKS", Path("tasks").resolve())
    assert complaint("task:brokn") == "no task 'brokn'; there are broken"


# SFT: conversations and trajectories


USER, SAYS = {"role": "user", "content": "Go."}, {"role": "assistant", "content": "Done."}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}


def call(arguments, name="find", **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def calls(*made, content=""):
    return {"role": "assistant", "content": content, "tool_calls": list(made)}


def result(content, **more):
    return {"role": "tool", "content": content, **more}


def talk(*messages, **columns):
    return {"messages": list(messages), **columns}


def refusal(*rows, **options):
    """What is said about the rows, behind the file's name."""
    with pytest.raises(UserError) as caught:
        data.conversations(write(*rows), **options)
    return str(caught.value).removeprefix("x.jsonl, ")


def test_a_conversation_is_its_messages_and_its_tools():
    rows = [talk(USER, SAYS, level=3), "", talk(USER, SAYS, tools=[TOOL], reward=0.5)]
    assert data.conversations(write(*rows)) == [
        {"row": 1, "messages": [USER, SAYS], "tools": None},
        {"row": 2, "messages": [USER, SAYS], "tools": [TOOL], "reward": 0.5},
    ]
    assert len(data.conversations("x.jsonl", rows=1)) == 1
    assert refusal("") == "x.jsonl has no rows"


def test_tools_may_be_a_list_or_its_json_and_none_of_them_is_not_no_column():
    made = [[TOOL], json.dumps([TOOL]), [], "[]", None, "", "null"]
    found = data.conversations(write(*(talk(USER, SAYS, tools=tools) for tools in made)))
    assert [row["tools"] for row in found] == [[TOOL], [TOOL], [], [], None, None, None]


@pytest.mark.parametrize("tools", [["find it"], TOOL["function"], TOOL, [{"name": "f"}], 3, "{}"])
def test_tools_that_are_no_schemas_are_refused(tools):
    said = refusal(talk(USER, SAYS), talk(USER, SAYS, tools=tools))
    assert said.startswith("row 2: its 'tools' holds ") and "expected [{" in said
    assert refusal(talk(USER, SAYS, tools="[{")).startswith("row 1: its 'tools' is broken JSON: ")


def test_contents_become_text_and_arguments_objects():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    silent = {"role": "assistant", "content": None, "tool_calls": [call('{"x": null}')]}
    shown = talk({"role": "user", "content": parts}, silent, result("1"), SAYS)
    (found,) = data.conversations(write(shown))
    expected = [{"role": "user", "content": "ab"}, calls(call({"x": None}))]
    assert found["messages"] == [*expected, result("1", name="find"), SAYS]
    bare = {"name": "find", "arguments": {}}  # without the wrapping of OpenAI
    (found,) = data.conversations(write(talk(USER, calls(bare))))
    assert found["messages"][1] == calls(call({}))


def test_results_stand_in_the_order_of_their_calls_under_their_names():
    """Pitfall 7: OpenAI's form has them in any order, with the id of the call."""
    two = calls(call({}, "f", id="a"), call({}, "g", id="b"))
    given = [result("2", tool_call_id="b"), result("1", tool_call_id="a")]
    ordered = [result("1", tool_call_id="a", name="f"), result("2", tool_call_id="b", name="g")]
    (found,) = data.conversations(write(talk(USER, two, *given, SAYS, two, *given)))
    assert found["messages"] == [USER, two, *ordered, SAYS, two, *ordered]
    # without ids, or with ids that do not tell them apart, the order given is all there is
    for ids in ((None, None), ("a", "a"), ("", "")):
        made = calls(*(call({}, name, id=id) for name, id in zip("fg", ids, strict=True)))
        both = [result("1", tool_call_id="a"), result("2", tool_call_id="a", name="own")]
        (found,) = data.conversations(write(talk(USER, made, *both)))
        names = [(m["content"], m["name"]) for m in found["messages"][2:]]
        assert names == [("1", "f"), ("2", "own")]
    # a call that stands in the text, as a rollout writes a malformed one, has results too
    said = {"role": "assistant", "content": "<tool_call>{</tool_call>"}
    (found,) = data.conversations(write(talk(USER, said, result("error"), SAYS)))
    assert found["messages"] == [USER, said, result("error"), SAYS]


def test_results_that_belong_to_no_call_are_refused():
    one = calls(call({}, id="a"))
    says = "row 1: 2 tool results follow 1 tool calls"
    assert refusal(talk(USER, one, result("1"), result("2"))) == says
    says = "row 1: a tool's result follows user: expected an assistant's call"
    assert refusal(talk(USER, result("1"), SAYS)) == says
    says = "row 1: the tool_call_ids are ['c']: expected, once each, those of ['a']"
    assert refusal(talk(USER, one, result("1", tool_call_id="c"))) == says
    two = calls(call({}, id="a"), call({}, id="b"))
    twice = [result("1", tool_call_id="a"), result("2", tool_call_id="a")]
    says = "row 1: the tool_call_ids are ['a', 'a']: expected, once each, those of ['a', 'b']"
    assert refusal(talk(USER, two, *twice)) == says


@pytest.mark.parametrize(
    "messages, says",
    [
        ("hello", "'messages' is not a list of chat messages"),
        (["hello"], "'messages' is a list, but not of messages with a role and content"),
        ([], "no assistant message, so nothing to learn"),
        ([USER], "no assistant message, so nothing to learn"),
        ([SAYS, USER], "it begins with an assistant message: there has to be a prompt before it"),
        ([{"role": "human"}, SAYS], "role 'human': expected one of system, user, assistant, tool"),
        ([USER, calls({"name": "f"})], "its tool call {'name': 'f'}: expected {\"function\": {"),
        ([USER, calls(call("{x"))], "its tool call {'type': 'function', 'function': {'name': "),
        ([USER, calls(call("[1]"))], "its tool call {'type': 'function', 'function': {'name': "),
        ([USER, calls("find")], "its tool call 'find': expected {"),
        ([USER, SAYS | {"function_call": {}}], "'function_call' is OpenAI's old form"),
        ([USER, SAYS | {"weight": 0}], "weight = 0 of one message has no effect here"),
        ([{"role": "user", "content": 3}, SAYS], "its content 3: expected text, or a list of"),
    ],
)
def test_messages_that_do_not_fit_are_refused_by_row(messages, says):
    assert refusal(talk(USER, SAYS), {"messages": messages}).startswith(f"row 2: {says}")


def test_calls_without_results_are_refused_where_the_conversation_goes_on():
    """A17: the model would learn to go on without them. At the end there are none to read."""
    two = calls(call({}, id="a"), call({}, id="b"))
    says = "row 1: 2 tool calls have no results, but the conversation goes on: "
    assert refusal(talk(USER, two, SAYS)).startswith(says)
    assert refusal(talk(USER, two, USER, SAYS)).startswith(says)
    some = talk(USER, two, result("1", tool_call_id="a"), SAYS)
    assert refusal(some) == "row 1: 1 tool results follow 2 tool calls"
    assert complaint(write(row([USER, two, USER]))).startswith(f"x.jsonl, {says}")
    assert len(data.conversations(write(talk(USER, two)))) == 1


@pytest.mark.parametrize(
    "messages, says",
    [
        ([{"role": "human", "content": "U"}], "role 'human': expected one of system, user, assist"),
        ([{"role": "User", "content": "U"}], "role 'User': expected one of system, user, assistan"),
        ([USER, {"role": "function", "name": "f", "content": "1"}], "role 'function': expected on"),
        ([USER, SAYS], "its prompt ends in a message of the assistant: expected one of the user "),
        ([{"role": "system", "content": "S"}], "its prompt ends in a message of the system: expec"),
        ([USER, {"role": "assistant", "tool_calls": [call({})]}], "its prompt ends in a message o"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a content part of type 'image' nam"),
        ([{"role": "user", "content": 3}], "its content 3: expected text, or a list of content"),
        ([USER, SAYS | {"think": "x"}, USER], "a message of the assistant has the key 'think', wh"),
        ([USER, SAYS | {"loss": True}, USER], "loss = true of one message has no effect here"),
        ([USER, result("1")], "a tool's result follows user: expected an assistant's call"),
        ({"role": "user"}, "its 'prompt' is {'role': 'user'}: expected text, or a list of {"),
        (json.dumps([USER]), 'its \'prompt\' is \'[{"role": "user"'),
        ("a \ud83d b", "its 'prompt' holds half a character, '\\ud83d': write all of it, or drop"),
        ([{"role": "user", "content": "\udc00"}], "its 'prompt' holds half a character"),
        ([USER, calls(call({"\ud800": 1})), result("1")], "its 'prompt' holds half a character"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_by_row(messages, says):
    """A16: when the rows are loaded, and not when they are played."""
    assert complaint(write(row(), row(messages))).startswith(f"x.jsonl, row 2: {says}")


def test_half_a_character_is_refused_in_every_column():
    """A16: the rows are written to rollouts.jsonl, too."""
    says = "row 2: its 'hint' holds half a character, '\\ud83d': write all of it, or drop it"
    assert complaint(write(row(), row(hint=[{"a": "\ud83d"}]))) == f"x.jsonl, {says}"
    assert refusal(talk(USER, SAYS), talk(USER, SAYS, hint="\ud83d")) == says
    assert "row 1: its 'answer' holds" in complaint(write(row(answer="\ud83d")))
    assert "row 1: its 'tools' holds" in refusal(talk(USER, SAYS, tools=[{"name": "\ud83d"}]))
    assert data.load(write(row("\U0001f600 ü")))[0]["prompt"] == "\U0001f600 ü"


def test_columns_that_no_rollout_would_see_are_refused():
    """A16, A22."""
    for column in ("video", "videos", "audio"):
        says = (
            f"x.jsonl, row 2: its {column!r} would not be seen: leave the row out or make it text"
        )
        assert complaint(write(row(), row(**{column: ["a"]}))).startswith(says)


@pytest.mark.parametrize("column", ["tools", "reward"])
def test_a_row_may_name_its_tools_and_its_rewards(column):
    forms = {"find": ["find"], '["a", "b"]': ["a", "b"], "a, b": ["a", "b"], "null": None, "": None}
    for text, names in forms.items():
        (example,) = data.load(write(row(**{column: text})))
        assert example[column] == names
    (example,) = data.load(write(row(**{column: ["find"]})))
    assert example[column] == ["find"]
    assert column not in data.load(write(row()))[0]
    schemas = () if column == "tools" else ([TOOL], json.dumps([TOOL]))
    for value in (*schemas, {"find": {}}, [1]):
        says = f"x.jsonl, row 2: its {column!r} holds "
        assert complaint(write(row(), row(**{column: value}))).startswith(says)


def test_a_reward_that_is_a_number_is_that_of_a_recorded_rollout():
    examples = data.load(write(row(reward=0.5)))
    assert examples[0]["reward"] == 0.5
    data.check_names(examples, ["find"], ["correct"])


@pytest.mark.parametrize(
    "columns, says",
    [
        ({"tools": ["fnid"]}, "row 2: its 'tools' names 'fnid', no tool of the run: did you mean"),
        ({"tools": ["sql"]}, "row 2: its 'tools' names 'sql', no tool of the run (there are find)"),
        ({"reward": "corect"}, "row 2: its 'reward' names 'corect', none of --rewards=…: did you"),
        ({"reward": []}, "row 2: its 'reward' is empty: name one of correct, f1"),
    ],
)
def test_names_of_a_row_that_the_run_does_not_have_are_told(columns, says):
    examples = data.load(write(row(tools=["find"], reward="f1"), row(**columns)))
    with pytest.raises(UserError) as caught:
        data.check_names(examples, ["find"], ["correct", "f1"])
    assert str(caught.value).startswith(says)


def image(*parts):
    return {"role": "user", "content": list(parts)}


def test_images_are_taken_out_of_whatever_form_they_stand_in():
    """One form for all: {"type": "image"} in the messages, what it is in `images`, in order."""
    for name in ("a.png", "b.png"):
        Path(name).write_bytes(b"not opened yet")
    text = {"type": "text", "text": "See:"}
    here = {"type": "image"}
    sources = (
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "input_image", "image_url": "a.png"},
    )
    for part in sources:
        (example,) = data.load(write(row([image(text, part)])))
        assert example["messages"] == [image(text, here)]
        assert example["images"] == ["a.png"]
        assert example["image_folder"] == str(Path.cwd())
    for columns in ({"image": "a.png"}, {"images": ["a.png"]}, {"images": [{"path": "a.png"}]}):
        (example,) = data.load(write(row("See <image>!", **columns)))
        two = {"type": "text", "text": "See "}, here, {"type": "text", "text": "!"}
        assert example["messages"] == [image(*two)]
        (example,) = data.load(write(row("What?", **columns)))
        assert example["messages"] == [image(here, {"type": "text", "text": "What?"})]
        assert example["images"] == ["a.png"] and "image" not in example
    named = {"type": "image", "image": "b.png"}
    (example,) = data.load(write(row([image(here, text, named)], images=["a.png"])))
    assert example["images"] == ["a.png", "b.png"]
    (example,) = data.load(write(row("a <image> of text")))
    assert example["messages"][0]["content"] == "a <image> of text" and "images" not in example


def test_demonstrations_with_images_are_read_as_others_write_them():
    """messages with parts, LLaMA-Factory's and ms-swift's <image>, ShareGPT's conversations."""
    Path("a.png").write_bytes(b"not opened yet")
    shown = image({"type": "image"}, {"type": "text", "text": "What is it?"})
    turns = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "Red."}]
    said = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant"}]
    said[1]["content"] = "Red."
    for columns in ({"conversations": turns}, {"messages": said}):
        (demo,) = data.conversations(write({**columns, "images": ["a.png"]}))
        assert demo["messages"] == [shown, {"role": "assistant", "content": "Red."}]
        assert demo["images"] == ["a.png"]
    calls = [
        {"from": "human", "value": "<image>"},
        {"from": "function_call", "value": '{"name": "zoom", "arguments": {"image": 1}}'},
        {"from": "observation", "value": "<image>"},
        {"from": "gpt", "value": "7"},
    ]
    (demo,) = data.conversations(write({"conversations": calls, "images": ["a.png", "a.png"]}))
    roles = [message["role"] for message in demo["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"]
    assert demo["messages"][2]["content"] == [{"type": "image"}]
    (recorded,) = data.conversations(write({"ids": [1, 2], "mask": [0, 1], "images": ["a.png"]}))
    assert recorded["images"] == ["a.png"]


CALLED = {"name": "zoom", "arguments": {"image": 1}}
# What each of these forms says: a picture, a call, its picture, an answer.
OF_OTHERS = {
    "LLaMA-Factory, sharegpt": {
        "conversations": [
            {"from": "human", "value": "<image>Which?"},
            {"from": "function_call", "value": json.dumps(CALLED)},
            {"from": "observation", "value": "<image>"},
            {"from": "gpt", "value": "Red."},
        ],
        "system": "See.",
        "tools": json.dumps([{"name": "zoom", "description": "d", "parameters": {}}]),
    },
    "ms-swift": {
        "messages": [
            {"role": "system", "content": "See."},
            {"role": "user", "content": "<image>Which?"},
            {"role": "tool_call", "content": json.dumps(CALLED)},
            {"role": "tool_response", "content": "<image>"},
            {"role": "assistant", "content": "Red."},
        ],
        "tools": json.dumps([TOOL | {"function": TOOL["function"] | {"name": "zoom"}}]),
    },
    "OpenAI, the images beside": {
        "messages": [
            {"role": "system", "content": "See."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]},
            {"role": "assistant", "content": "", "tool_calls": [{"function": CALLED}]},
            {"role": "tool", "content": [{"type": "image"}]},
            {"role": "assistant", "content": "Red."},
        ],
        "tools": [TOOL | {"function": TOOL["function"] | {"name": "zoom"}}],
    },
}


@pytest.mark.parametrize("name", OF_OTHERS)
def test_a_demonstration_of_any_trainer_is_one_conversation(name):
    Path("a.png").write_bytes(b"not opened yet")
    Path("b.png").write_bytes(b"nor this")
    (demo,) = data.conversations(write(OF_OTHERS[name] | {"images": ["a.png", "b.png"]}))
    system, user, call, result, answer = demo["messages"]
    assert system == {"role": "system", "content": "See."}
    assert user == image({"type": "image"}, {"type": "text", "text": "Which?"})
    assert call["content"] == "" and calls_of(call) == [Call("zoom", {"image": 1})]
    assert result == {"role": "tool", "name": "zoom", "content": [{"type": "image"}]}
    assert answer == {"role": "assistant", "content": "Red."}
    assert demo["images"] == ["a.png", "b.png"]
    assert [tool["function"]["name"] for tool in demo["tools"]] == ["zoom"]
    assert all(tool["type"] == "function" for tool in demo["tools"])


def test_calls_at_once_and_words_in_front_of_them_are_one_message():
    """ms-swift's messages of their own, LLaMA-Factory's list and its thinking."""
    other = {"name": "find", "arguments": '{"x": 2}'}
    results = [{"role": "tool_response", "content": f"{n}"} for n in (1, 2)]
    words = {"role": "assistant", "content": "I look."}
    apart = [words] + [{"role": "tool_call", "content": json.dumps(c)} for c in (CALLED, other)]
    (demo,) = data.conversations(write(talk(USER, *apart, *results, SAYS)))
    assert demo["messages"][1]["content"] == "I look."
    both = [Call("zoom", {"image": 1}), Call("find", {"x": 2})]
    assert calls_of(demo["messages"][1]) == both
    assert [m["content"] for m in demo["messages"][2:4]] == ["1", "2"]
    as_list = "<think>Hm.</think>\n" + json.dumps([CALLED, other])
    turns = [{"from": "user", "value": "Go."}, {"from": "function_call", "value": as_list}]
    turns += [{"from": "observation", "value": "1"}, {"from": "observation", "value": "2"}]
    turns += [{"from": "gpt", "value": "Done."}]
    (demo,) = data.conversations(write({"conversations": turns}))
    assert demo["messages"][1]["content"] == "<think>Hm.</think>\n"
    assert calls_of(demo["messages"][1]) == both


@pytest.mark.parametrize(
    "row, says",
    [
        (talk(USER, {"role": "tool_call", "content": "zoom(1)"}), "its call 'zoom(1)' is broken"),
        (talk(USER, {"role": "tool_call", "content": None}), "its tool call {'function': None}"),
        (
            talk(USER, {"role": "tool_call", "content": json.dumps(CALLED)}, SAYS),
            "1 tool calls have no results, but the conversation goes on",
        ),
        (
            talk({"role": "system", "content": "A"}, USER, SAYS, system="B"),
            "its column 'system' is another text than its system message",
        ),
        (
            talk({"role": "user", "content": "Where is <ref-object>?"}, SAYS, objects={"ref": []}),
            "its text has <ref-object>, which ms-swift fills from the column 'objects'",
        ),
        (
            talk(USER, {"role": "assistant", "content": "<bbox>"}, objects={"bbox": [[1, 2]]}),
            "its text has <bbox>, which ms-swift fills from the column 'objects'",
        ),
        (talk(USER, {"role": "observation", "content": "x"}, SAYS), "role 'observation': expected"),
    ],
)
def test_what_other_trainers_would_make_of_a_row_and_we_do_not_is_refused(row, says):
    assert says in refusal(talk(USER, SAYS), row)


def test_images_of_the_hub_and_of_parquet_are_the_bytes_of_their_files():
    """Not pixels: a hundred times as many, for all rows at once."""
    import datasets
    from PIL import Image

    pixels = Image.new("RGB", (30, 20), "red")
    columns = {
        "image": ([pixels, pixels], datasets.Image()),
        "images": ([[pixels], [pixels]], datasets.List(datasets.Image())),
    }
    for name, (values, kind) in columns.items():
        text = datasets.Value("string")
        kinds = datasets.Features({"prompt": text, "answer": text, name: kind})
        rows = {"prompt": ["a", "b <image>"], "answer": ["1", "2"], name: values}
        Path(name).mkdir()
        datasets.Dataset.from_dict(rows, features=kinds).to_parquet(f"{name}/train.parquet")
        for source in (name, f"{name}/train.parquet"):
            first, second = data.load(source)
            assert type(first["images"][0]) is bytes
            assert [part["type"] for part in first["messages"][0]["content"]] == ["image", "text"]
            assert [part["type"] for part in second["messages"][0]["content"]] == ["text", "image"]


@pytest.mark.parametrize(
    "row, says",
    [
        (talk(USER, SAYS, images=["no.png"]), "its image 'no.png' is no file in"),
        (talk(USER, SAYS, images=[sys.executable]), "where the data is"),
        (talk(USER, SAYS, images=["../../etc/passwd"]), "where the data is"),
        (talk(USER, SAYS, image="http://x.org/a.png"), "its image 'http://x.org/a.png' is on the"),
        (talk(USER, SAYS, images=["a.png"], image="a.png"), "it has a column 'image' and a column"),
        (talk(image({"type": "image"}), SAYS), "a content part of type 'image' names no image"),
        (
            talk(image({"type": "image"}), SAYS, images=["a.png", "a.png"]),
            "it has 2 images, but its messages have room for 1: write <image> once for each",
        ),
        (
            talk({"role": "user", "content": "<image><image>"}, SAYS, images=["a.png"]),
            "it has 1 images, but its messages have room for 2",
        ),
        (
            talk(USER, {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}),
            "a message of the assistant has an image: expected them in the user's and the tools'",
        ),
        (
            talk(USER, {"role": "user", "content": [{"type": "video"}]}, SAYS),
            "a content part of type 'video' would not be seen: leave the row out",
        ),
        ({"conversations": [{"from": "cat", "value": ""}]}, "'conversations' has one from 'cat'"),
    ],
)
def test_images_that_have_no_place_are_refused(row, says):
    Path("a.png").write_bytes(b"not opened yet")
    assert says in refusal(talk(USER, SAYS), row)


def test_a_trajectory_is_its_ids_and_its_mask():
    recorded = {"ids": [5, 6, 7], "mask": [0, 1, 1], "reward": None, "text": "abc", "stop": "x"}
    kept = {key: recorded[key] for key in ("ids", "mask", "reward", "text")}
    rows = [recorded | {"messages": "not looked at"}, talk(USER, SAYS, ids=None, mask=None)]
    found = data.conversations(write(*rows))
    assert found == [{"row": 1, **kept}, {"row": 2, "messages": [USER, SAYS], "tools": None}]


@pytest.mark.parametrize(
    "ids, mask, says",
    [
        ([1, 2], [0], "its 'ids' and 'mask' are not two lists of one length"),
        ("12", [0, 1], "its 'ids' and 'mask' are not two lists of one length"),
        ([1, -2], [0, 1], "its 'ids' holds -2: expected token ids"),
        ([1, 2.0], [0, 1], "its 'ids' holds 2.0: expected token ids"),
        ([1, "a"], [0, 1], "its 'ids' holds 'a': expected token ids"),
        ([1, 2], [0, 2], "its 'mask' holds 2: expected 0 or 1"),
        ([1, 2], [0, None], "its 'mask' holds None: expected 0 or 1"),
        ([1, 2], [1, 1], "its 'mask' begins with 1, but nothing stands before the first token"),
    ],
)
def test_a_trajectory_that_does_not_fit_is_refused_by_row(ids, mask, says):
    """Pitfall 2."""
    assert refusal(talk(USER, SAYS), {"ids": ids, "mask": mask}) == f"row 2: {says}"


def test_a_row_of_neither_form_is_answered_with_its_columns():
    form = "SFT takes whole conversations, or trajectories (ids and mask)"
    says = f"row 1: no column 'messages', there are prompt, answer: {form}"
    assert refusal(row()) == says
    assert refusal({"ids": [1]}) == f"row 1: no column 'messages', there are ids: {form}"


def test_the_system_prompt_goes_in_front_of_conversations_that_have_none():
    system = {"role": "system", "content": "S"}
    recorded = {"ids": [5, 6], "mask": [0, 1]}
    name = write(talk(USER, SAYS), talk(system, USER, SAYS), recorded)
    found = data.conversations(name, system_prompt="T")
    prompts = [row["messages"][0]["content"] for row in found[:2]]
    assert prompts == ["T", "S"] and found[2] == {"row": 3, **recorded}
    says = "system_prompt has no effect on x.jsonl: every row has a system message, or is recorded"
    assert refusal(talk(system, USER, SAYS), recorded, system_prompt="T").startswith(says)


def test_the_demonstrations_of_a_task_are_conversations():
    found = data.conversations("task:calc", 40, seed=3)
    assert [row["row"] for row in found] == list(range(1, 41))
    assert found == data.conversations("task:calc", 40, seed=3)
    assert found != data.conversations("task:calc", 40, seed=4)
    assert all(row["tools"] is None for row in found)
    assert any("tool_calls" in m for row in found for m in row["messages"])


def test_parquet_gives_the_conversations_that_jsonl_gives():
    """Without the keys that parquet fills in, with None, in every object."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    other = {"type": "function", "function": {"name": "add", "parameters": {"required": ["a"]}}}
    both = calls(call({"x": "1"}, id="a"), call({"y": 2}, "add", id="b"))
    results = [result("2", tool_call_id="b"), result("1", tool_call_id="a")]
    rows = [talk(USER, both, *results, SAYS, tools=[TOOL, other]), talk(USER, SAYS)]
    rows += [{"ids": [5, 6], "mask": [0, 1]}]
    keys = ("messages", "tools", "ids", "mask")
    filled = [{key: row.get(key) for key in keys} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(filled), "x.parquet")
    stored = parquet.read_table("x.parquet").to_pylist()
    assert stored[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["y"] is None
    assert data.conversations("x.parquet") == data.conversations(write(*rows))


# Counts what it sleeps, as it would between attempts, and does not look at the clock.
HUB = """
import time
naps = []
time.sleep = naps.append
import data
from run.config import UserError
rows = data.load("folder", split="test")
assert [(r["prompt"], r["answer"]) for r in rows] == [("q", "1"), ("r", "2")], rows
for name, split in [("folder", "tset"), ("no/where", "train"), ("no/where:main", "train")]:
    naps.clear()
    try:
        data.load(name, split=split)
    except UserError as error:
        print(error)
    assert sum(naps) < 3, naps
"""


def hub(tmp_path, **env):
    os.makedirs("folder", exist_ok=True)
    write(row("q", 1), row("r", 2), name="folder/test.jsonl")
    write(row("t", 3), name="folder/train.jsonl")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), **env}
    command = [sys.executable, "-c", HUB]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_folder_is_read_by_datasets_and_what_is_not_there_is_said_at_once_offline(tmp_path):
    split, missing, named = hub(tmp_path, HF_HUB_OFFLINE="1")
    expected = "Unknown split \"tset\". Should be one of ['train', 'test']."
    assert split == f"cannot load 'folder': {expected}".replace(
        "'folder'", repr(str(Path("folder")))
    )
    assert missing.startswith("cannot load 'no/where': Couldn't reach 'no/where' on the Hub")
    assert named == missing


def test_a_hub_out_of_reach_is_said_at_once_too(tmp_path):
    _, missing, _ = hub(tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    assert missing.startswith("cannot reach the hub for 'no/where' (")
    assert missing.endswith(
        "check the network, or set HF_HUB_OFFLINE=1 if it was downloaded before"
    )


@needs_real_data
def test_gsm8k_has_1319_numbers_as_answers():
    path = str(SHARED / "gsm8k_test.jsonl")
    examples = data.load(path, prompt_column="question", answer_after="####")
    assert len(examples) == 1319 and examples[0]["answer"] == "18"
    assert all(float(e["answer"]) is not None and "," not in e["answer"] for e in examples)
    assert examples[5]["messages"] == [{"role": "user", "content": examples[5]["question"]}]


@needs_real_data
def test_aime_and_natural_questions_load_as_they_are():
    aime = data.load(str(SHARED / "aime24.jsonl"), prompt_column="problem")
    assert len(aime) == 30 and [e["id"] for e in aime] == list(range(30))
    assert all(0 <= int(e["answer"]) <= 999 for e in aime)
    nq = data.load(str(SHARED / "nq_open_dev.jsonl"), prompt_column="question", limit=100)
    assert len(nq) == 100 and nq[0]["answer"] == ["14 December 1972 UTC", "December 1972"]


@pytest.mark.parametrize(
    "answers, kept",
    [
        (["Arsenal", None], ["Arsenal"]),
        ([None, "Arsenal", float("nan")], ["Arsenal"]),
        ([18, None], ["18"]),
        ([None], None),
        ([float("nan"), None], None),
    ],
)
def test_null_in_a_list_of_answers_is_dropped(tmp_path, answers, kept):
    """A11: it was the answer None."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "Who?", "answer": answers}))
    if kept is None:
        with pytest.raises(UserError, match="its 'answer' is empty"):
            data.load(str(path))
    else:
        assert data.load(str(path))[0]["answer"] == kept


@pytest.mark.parametrize(
    "name", ["../gold", "a/../../gold", "..", "/etc/gold", "a\0b", "..\\/../x", "a/.."]
)
def test_a_name_in_a_path_of_databases_does_not_leave_their_folder(tmp_path, monkeypatch, name):
    """C5."""
    monkeypatch.chdir(tmp_path)
    for place in ("dbs/a", "dbs"):
        Path(place).mkdir(parents=True, exist_ok=True)
    for place in ("gold.sqlite", "dbs/in.sqlite", "dbs/a/in.sqlite"):
        Path(place).touch()
    template = "dbs/{db_id}.sqlite"
    for inside in ("in", "a/in"):
        (read,) = data.load(write(row(db_id=inside)), database=template)
        assert read["database"] == f"dbs/{inside}.sqlite"
    with pytest.raises(UserError, match="row 1: its 'db_id' is .*: write a name without"):
        data.load(write(row(db_id=name)), database=template)
    # a column that holds the whole path has no folder to leave
    path = f"../{tmp_path.name}/gold.sqlite"
    (read,) = data.load(write(row(file=path)), database="{file}")
    assert read["database"] == path

"""Pins formats/messages.py: the one reader of OpenAI chat messages, and of the calls in them.

pytest tests/test_messages.py
"""

import pytest

from formats import Call
from formats.messages import calls_of, openai_call, read_messages
from run.config import UserError


def message(*calls):
    return {"role": "assistant", "content": "", "tool_calls": list(calls)}


def call(arguments, name="find", **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


@pytest.mark.parametrize("none", [{}, {"tool_calls": None}, {"tool_calls": []}])
def test_a_message_without_calls_has_none(none):
    assert calls_of({"role": "assistant", "content": "Hi.", **none}) == []


def test_arguments_are_an_object_or_its_json():
    read = calls_of(message(call({"x": 1}, id="a"), call('{"x": null}', "look"), call("{}")))
    assert read == [Call("find", {"x": 1}, id="a"), Call("look", {"x": None}), Call("find", {})]


def test_the_wrapping_of_openai_may_be_missing():
    assert calls_of(message({"name": "find", "arguments": {}, "id": "a"})) == [
        Call("find", {}, id="a")
    ]


@pytest.mark.parametrize("id", [None, ""])
def test_an_id_that_says_nothing_is_none(id):
    assert calls_of(message(call({}, id=id))) == [Call("find", {})]


@pytest.mark.parametrize(
    "wrong",
    [
        "find",
        None,
        {"name": "find"},
        {"function": None},
        {"function": "find"},
        call({}, name=3),
        call(None),
        call("{x"),
        call(""),
        call("[1]"),
        call([1]),
        call({}, name=""),
        call('{"x": 1, "x": 2}'),  # one of them would be lost
    ],
)
def test_what_is_no_call_is_refused_and_shown(wrong):
    with pytest.raises(UserError) as caught:
        calls_of(message(call({}), wrong))
    form = '{"function": {"name": …, "arguments": an object or its JSON}}'
    assert str(caught.value) == f"its tool call {wrong!r}: expected {form}"


@pytest.mark.parametrize(
    "arguments",
    [
        '{"x": NaN}',
        {"x": float("inf")},
        {"x": {1, 2}},
        '{"x": ' + "[" * 200 + "]" * 200 + "}",
        "[" * 100_000,
    ],
)
def test_arguments_that_no_parser_would_read_are_refused(arguments):
    """A16: a model would be trained to write what is a malformed call."""
    with pytest.raises(UserError, match="^its tool call ") as caught:
        calls_of(message(call(arguments)))
    assert len(str(caught.value)) < 400


def test_calls_that_are_no_list_are_refused():
    with pytest.raises(UserError, match="its tool_calls 'find': expected a list of {"):
        calls_of({"role": "assistant", "tool_calls": "find"})


def test_what_is_read_is_what_was_written():
    for made in (Call("find", {"x": [1, None]}, id="a"), Call("find", {})):
        written = openai_call(made)
        assert calls_of(message(written)) == [made]
        assert written["type"] == "function" and ("id" in written) == bool(made.id)


# A row's messages

USER = {"role": "user", "content": "Go."}
SAYS = {"role": "assistant", "content": "Done."}


def read(*messages, is_prompt=False):
    return read_messages(list(messages), "messages", is_prompt)


def refused(*messages, is_prompt=False):
    with pytest.raises(UserError) as caught:
        read(*messages, is_prompt=is_prompt)
    return str(caught.value)


def test_a_developer_is_the_system():
    """A16: OpenAI's newer word for it."""
    system = {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}
    assert read(system, USER)[0] == {"role": "system", "content": "Be brief."}
    says = "message 2 is a system message: only the first may be one"
    assert refused({"role": "system", "content": "S"}, system, USER) == says
    assert refused(USER, {"role": "system", "content": "S"}, SAYS) == says


@pytest.mark.parametrize(
    "role, remedy",
    [
        ("human", ": write user"),
        ("User", ": write user"),
        ("ASSISTANT ", ": write assistant"),
        ("gpt", ": write assistant"),
        ("function", ": write tool"),
        ("observation", ": write tool"),
        ("critic", ""),
    ],
)
def test_a_role_of_others_is_refused_with_ours(role, remedy):
    """A16."""
    says = f"role {role!r}: expected one of system, user, assistant, tool{remedy}"
    assert refused({"role": role, "content": "x"}, SAYS) == says


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_is_one_thing_by_three_names(key):
    """A16."""
    message = SAYS | {key: "Hm."}
    expected = SAYS | {"reasoning_content": "Hm."}
    assert read(USER, message) == [USER, expected]
    assert read(USER, message | {"reasoning_content": "Hm."}) == [USER, expected]
    assert read(USER, SAYS | {key: None}) == read(USER, SAYS | {key: ""}) == [USER, SAYS]
    assert refused(USER, message | {"content": "<think>Hm.</think>"}).startswith("its thinking sta")
    assert refused(USER, SAYS | {key: ["Hm."]}) == f"its {key} ['Hm.']: expected text"
    assert "a message of the user has the key" in refused(USER | {key: "Hm."}, SAYS)
    if key != "reasoning_content":
        says = f"its {key} is another text than its reasoning_content: keep one of them"
        assert refused(USER, SAYS | {"reasoning_content": "Oh.", key: "Hm."}) == says


@pytest.mark.parametrize("flag", ["weight", "loss", "loss_mask", "loss_scale", "train"])
def test_a_flag_of_another_trainer_is_kept_or_refused(flag):
    """A16: what the assistant writes is trained, and nothing else."""
    for yes, no in ((1, 0), (True, False), (1.0, 0.0)):
        assert read(USER | {flag: no}, SAYS | {flag: yes}) == [USER, SAYS]
        shown = read(USER, SAYS | {flag: no}, USER, is_prompt=True)
        assert shown == [USER, SAYS, USER]
        ends = "of one message has no effect here, where it is trained: leave the row out, or"
        assert ends in refused(USER, SAYS | {flag: no})
        assert "where it is not trained" in refused(USER | {flag: yes}, SAYS)
    assert refused(USER, SAYS | {flag: 0.5}).startswith(f"{flag} = 0.5 of one message")
    assert refused(USER, SAYS | {flag: "yes"}).startswith(f'{flag} = "yes" of one message')


@pytest.mark.parametrize(
    "message, key",
    [
        (SAYS | {"refusal": "I cannot."}, "refusal"),
        (SAYS | {"masked": True}, "masked"),
        (USER | {"images": ["a.png"]}, "images"),
        (USER | {"tool_calls": [call({})]}, "tool_calls"),
        (SAYS | {"tool_call_id": "a"}, "tool_call_id"),
        (SAYS | {"timestamp": 0}, "timestamp"),
    ],
)
def test_a_key_that_would_not_be_seen_is_refused(message, key):
    """A16."""
    says = f"a message of the {message['role']} has the key {key!r}, which would not be seen: "
    assert refused(USER, message, SAYS).startswith(says)
    assert read(USER, message | {key: None}, SAYS)[0] == USER  # an empty one says nothing


def test_a_message_without_content_is_refused_unless_it_calls_or_is_a_result():
    """A16."""
    for role in ("user", "system"):
        says = f"a message of the {role} has no content: expected text"
        assert refused({"role": role}, SAYS) == refused({"role": role, "content": None}) == says
    calling = {"role": "assistant", "tool_calls": [call({})]}
    silent = {"role": "tool", "content": None}
    contents = [made["content"] for made in read(USER, calling, silent)]
    assert contents == ["Go.", "", ""]


def result(content, **keys):
    return {"role": "tool", "content": content, **keys}


def results_of(*results, names=("find", "look")):
    asked = message(*[call({}, name) for name in names])
    said = read_messages([{"role": "user", "content": "?"}, asked, *results], "messages", False)
    return [(each["name"], each["content"]) for each in said[2:]]


def test_results_without_ids_stand_by_their_names():
    """A16: in another order than their calls, each was taken for the other's."""
    in_order = [("find", "1"), ("look", "2")]
    assert results_of(result("2", name="look"), result("1", name="find")) == in_order
    assert results_of(result("1", name="find"), result("2", name="look")) == in_order
    assert results_of(result("1"), result("2")) == in_order
    assert results_of(result("1", name="find"), result("2")) == in_order
    both = results_of(result("1", name="find"), result("2", name="find"), names=("find", "find"))
    assert both == [("find", "1"), ("find", "2")]


@pytest.mark.parametrize(
    "results",
    [
        (result("2", name="look"), result("1", name="other")),
        (result("2", name="look"), result("1")),
        (result("1", name="find"), result("2", name="find")),
    ],
)
def test_a_result_of_another_call_of_the_turn_is_refused(results):
    """A16."""
    with pytest.raises(UserError, match="stands where one of '(find|look)' is expected"):
        results_of(*results)

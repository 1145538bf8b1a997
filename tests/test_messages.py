"""Pins formats/messages.py: the one reader of the calls of an OpenAI chat message.

pytest tests/test_messages.py
"""

import pytest

from formats import Call
from formats.messages import calls_of, openai_call
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
    ],
)
def test_what_is_no_call_is_refused_and_shown(wrong):
    with pytest.raises(UserError) as caught:
        calls_of(message(call({}), wrong))
    form = '{"function": {"name": …, "arguments": an object or its JSON}}'
    assert str(caught.value) == f"its tool call {wrong!r}: expected {form}"


def test_calls_that_are_no_list_are_refused():
    with pytest.raises(UserError, match="its tool_calls 'find': expected a list of {"):
        calls_of({"role": "assistant", "tool_calls": "find"})


def test_what_is_read_is_what_was_written():
    for made in (Call("find", {"x": [1, None]}, id="a"), Call("find", {})):
        written = openai_call(made)
        assert calls_of(message(written)) == [made]
        assert written["type"] == "function" and ("id" in written) == bool(made.id)

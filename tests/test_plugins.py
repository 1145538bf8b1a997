"""Pins plugins.py: files of a user, found and run, and options bound to typed parameters.

pytest tests/test_plugins.py
"""

import sys

import pytest

from run import config
from run.config import UserError
from run.plugins import bind, find_file, load, names_in, parse_options


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, text):
    with open(name, "w") as file:
        file.write(text)
    return find_file(name)


def test_a_file_is_looked_for_here_then_beside_our_own(tmp_path, monkeypatch):
    ours = tmp_path / "ours"
    ours.mkdir()
    monkeypatch.setattr(config, "HERE", ours)
    assert find_file("mine.py") is None
    (ours / "mine.py").write_text("")
    assert find_file("mine.py") == ours / "mine.py"
    (tmp_path / "mine.py").write_text("")
    assert find_file("mine.py") == tmp_path / "mine.py"
    assert find_file(str(ours / "mine.py")) == ours / "mine.py"
    monkeypatch.setenv("HOME", str(ours))
    assert find_file("~/mine.py") == ours / "mine.py"


def test_names_are_read_without_running_the_file():
    text = "import os\n1 / 0\ndef one(): pass\nasync def two(): pass\nclass Three:\n"
    text += "    def inner(self): pass\ndef _private(): pass\n"
    assert names_in(write("mine.py", text)) == ["one", "two", "Three"]


def test_two_names_of_a_file_share_its_module_and_a_changed_file_is_run_again():
    path = write("mine.py", "seen = []\ndef a(): return seen\ndef b(): return seen\n")
    modules = {}
    a, b = (load(path, name, "tool", modules) for name in "ab")
    assert a() is b()
    write("mine.py", "def a(): return 'new'\n")
    assert load(path, "a", "tool", {})() == "new"


@pytest.mark.parametrize(
    "text, why",
    [
        ("x = 1\ndef f(): return 1 / 0\nf()\n", "ZeroDivisionError: division by zero (line 2)"),
        ("def f(:\n", "SyntaxError: invalid syntax (mine.py, line 1)"),
        ("import nowhere_at_all\n", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
    ],
)
def test_a_file_that_fails_is_told_with_its_line(text, why):
    path = write("mine.py", text)
    with pytest.raises(UserError) as caught:
        load(path, "f", "tool 'mine.py:f'", {})
    assert str(caught.value).startswith(f"importing {path} for the tool 'mine.py:f' failed: {why}")
    assert str(path) not in sys.modules


def test_options_are_read_and_a_comma_in_a_value_is_no_end_of_it():
    texts = ["a.one=1", "b.two=x=y", "a.three=p", "q", "r.s"]
    assert parse_options(texts, "key") == {
        "a": {"one": "1", "three": "p,q,r.s"},
        "b": {"two": "x=y"},
    }
    assert parse_options([], "key") == {}


@pytest.mark.parametrize(
    "texts, says",
    [
        (["a"], "key: cannot read 'a': write name.option=value"),
        (["a.b"], "key: cannot read 'a.b': write name.option=value"),
        ([".b=1"], "key: cannot read '.b=1': write name.option=value"),
        (["a.b=1", "a.b=1"], "key: a.b is given twice: keep one of them"),
    ],
)
def test_what_is_no_option_is_refused(texts, says):
    with pytest.raises(UserError) as caught:
        parse_options(texts, "key")
    assert str(caught.value) == says


def function(trajectory, example: dict, untyped, *, k: int, names: tuple[str, ...] = (), x=1):
    pass


class Thing:
    def __init__(self, example: dict, k: int, names: tuple[str, ...] = (), *rest: int):
        pass


@pytest.mark.parametrize("target", [function, Thing])
def test_options_are_cast_to_the_types_of_the_parameters(target):
    assert bind(target, {"k": "3", "names": "a,b"}, "key: t") == {"k": 3, "names": ("a", "b")}


@pytest.mark.parametrize("target", [function, Thing])
@pytest.mark.parametrize(
    "texts, says",
    [
        ({}, "key: t.k is missing: write t.k=…"),
        ({"k": "many"}, "key: t.k = 'many': expected int"),
        ({"k": "1", "name": "a"}, "key: t has no option 'name': did you mean names?"),
        ({"k": "1", "zzz": "a"}, "key: t has no option 'zzz' (options: k, names)"),
        ({"k": "1", "example": "a"}, "key: t has no option 'example' (options: k, names)"),
        ({"k": "1", "untyped": "a"}, "key: t has no option 'untyped' (options: k, names)"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(target, texts, says):
    with pytest.raises(UserError) as caught:
        bind(target, texts, "key: t")
    assert str(caught.value) == says


def test_parameters_that_are_skipped_have_no_option():
    def scored(played: int, row: int, by: int = 1):
        pass

    assert bind(scored, {"by": "2"}, "key: s", skip=["played", "row"]) == {"by": 2}
    with pytest.raises(UserError, match="has no option 'row'"):
        bind(scored, {"row": "2"}, "key: s", skip=["played", "row"])


def test_a_type_that_no_option_can_have_is_refused():
    def odd(d: dict):
        pass

    with pytest.raises(UserError, match="^key: odd.d cannot be given as an option: .*dict"):
        bind(odd, {"d": "1"}, "key: odd")

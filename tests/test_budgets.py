"""Sizes that keep the code readable, and rules that a reader relies on, checked on the source.

pytest tests/test_budgets.py
"""

import ast
import re
import tokenize
from pathlib import Path

import pytest

import config
import rollout
import train_grpo
import train_sft
from train_grpo import Config

ROOT = Path(config.HERE)
SCRIPTS = sorted(ROOT.glob("*.py"))
SHIPPED = SCRIPTS + sorted(
    path
    for folder in ("tools", "tasks", "configs", "bench", "notebooks")
    for path in (ROOT / folder).rglob("*.py")
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
ALL = SHIPPED + sorted((ROOT / "tests").rglob("*.py"))
LONGEST = 60  # lines of a function; `train` reads top to bottom and may have 120


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.end_lineno - node.lineno + 1


def test_the_core_script_has_at_most_400_lines():
    assert len((ROOT / "train_grpo.py").read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", SHIPPED, ids=names(SHIPPED))
def test_no_function_is_longer_than_a_screen_but_train(path):
    limits = {"train": 120}
    long = {name: lines for name, lines in functions(path) if lines > limits.get(name, LONGEST)}
    assert long == {}


@pytest.mark.parametrize("path", ALL, ids=names(ALL))
def test_lines_have_at_most_100_columns(path):
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    assert [number for number, line in lines if len(line) > 100] == []


@pytest.mark.parametrize("path", SHIPPED, ids=names(SHIPPED))
def test_shipped_code_has_no_bare_except_no_global_and_nothing_left_to_do(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Global), f"global in line {node.lineno}"
        bare = isinstance(node, ast.ExceptHandler) and node.type is None
        assert not bare, f"bare except in line {node.lineno}"
    assert re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b", path.read_text()) == []


@pytest.mark.parametrize("script", [train_grpo, train_sft])
def test_every_key_says_in_a_trailing_comment_what_it_is(script):
    """--help prints this source and nothing else."""
    path = Path(script.__file__)
    with open(path, "rb") as file:
        comments = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.tokenize(file.readline)
            if token.type == tokenize.COMMENT and token.line.strip() != token.string
        }
    for node in class_of(path).body:
        if isinstance(node, ast.AnnAssign):
            lines = range(node.lineno, node.end_lineno + 1)  # a long default has it inside
            said = [comments[line] for line in lines if line in comments]
            assert said and len(said[0]) >= 3, f"{node.target.id} has no comment"


@pytest.mark.parametrize("script", [train_grpo, train_sft])
def test_every_key_is_used_somewhere(script):
    """Pitfall 55: by name, `cfg.key`, or in the settings of a rollout, which are taken by name."""
    keys = set(script.Config.__dataclass_fields__)
    tree = ast.parse(Path(script.__file__).read_text())
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "cfg"
    }
    for file in ("checkpoint.py", "engine.py", "evaluate.py", "loss.py", "rollout.py"):
        read |= set(re.findall(r"\bcfg\.(\w+)", (ROOT / file).read_text()))
    if script is train_grpo:
        read |= set(rollout.Settings.__dataclass_fields__)
    # A key with one allowed value says what there will be a choice of.
    single = {key for key in keys if len(getattr(kind(script, key), "__args__", (1, 2))) == 1}
    assert keys - read - single == set()


def kind(script, key):
    return script.Config.__dataclass_fields__[key].type


def class_of(path):
    (node,) = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "Config"
    ]
    return node


def test_the_keys_of_a_rollout_and_its_settings_are_keys_of_the_training_config():
    """Pitfall 55: what rollout.py and evaluate.py accept is there to be set."""
    fields = set(Config.__dataclass_fields__)
    assert set(rollout.KEYS) <= fields and len(set(rollout.KEYS)) == len(rollout.KEYS)
    assert set(rollout.Settings.__dataclass_fields__) <= fields
    assert set(rollout.Settings.__dataclass_fields__) <= set(rollout.KEYS)
    defaults = rollout.Settings()
    assert rollout.Settings.of(Config()) == defaults  # nothing is set differently in two places


def test_every_config_file_fits_the_script_that_its_first_line_is_for():
    """Its first comment says the hardware; SFT's are those with sft in their name."""
    for path in sorted((ROOT / "configs").glob("*.py")):
        script = train_sft if {"sft"} & set(path.stem.split("_")) else train_grpo
        cfg = config.parse(script.Config, ["--config", str(path)], script.check)
        assert cfg.out_dir.startswith("out/")
        assert path.read_text().startswith("# "), (
            f"{path.name}: what hardware, how long, what number?"
        )
        assert 5 <= len(path.read_text().splitlines()) <= 40

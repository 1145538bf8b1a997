"""Rules of the source that a reader relies on: where things are, and what imports what.

pytest tests/test_house.py
"""

import ast
import re
import tokenize
from pathlib import Path

import pytest

import rollout
import train_grpo
import train_sft
from run import config
from train_grpo import Config

ROOT = Path(config.HERE)
# The rooms, from the ground up: a file imports from its own room and from those above it here.
ROOMS = """
    trajectory run images loss formats tasks learning engines tools grading chat data rewards
    rollout player train_grpo train_sft evaluate suite play report push demo serve
""".split()
OTHERS = ("configs", "bench", "notebooks", "dev")  # folders that no file of a room imports from
SHIPPED = sorted(
    path
    for path in ROOT.rglob("*.py")
    if path.relative_to(ROOT).parts[0] in {*ROOMS, *OTHERS} or path.parent == ROOT
)
ALL = SHIPPED + sorted((ROOT / "tests").rglob("*.py"))


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SHIPPED if room_of(path) in ROOMS}


def imported(path):
    """[(module of ours, line, whether it is imported inside of a function)]."""
    tree = ast.parse(path.read_text())
    at_the_top = set()
    for node in tree.body:
        inner = node.body if isinstance(node, ast.If) else [node]  # below answer_help
        at_the_top |= set(map(id, inner))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            wanted = [f"{node.module}.{alias.name}" for alias in node.names]
            wanted = [name if name in MODULES else node.module for name in wanted]
        else:
            continue
        inside = id(node) not in at_the_top
        found += [(name, node.lineno, inside) for name in wanted if name in MODULES]
    return found


def test_the_root_holds_the_story_and_the_entry_points():
    assert len(list(ROOT.glob("*.py"))) <= 15
    assert {path.stem for path in ROOT.glob("*.py")} <= set(ROOMS)


@pytest.mark.parametrize("path", MODULES.values(), ids=names(MODULES.values()))
def test_arrows_point_down(path):
    """From a script to what it uses, never back: so there is no circle of rooms."""
    height = ROOMS.index(room_of(path))
    for module, line, _ in imported(path):
        room = module.partition(".")[0]
        assert ROOMS.index(room) <= height, f"line {line}: {room_of(path)} imports {module}"


def test_no_file_imports_itself_by_way_of_others():
    arrows = {}
    for module, path in MODULES.items():
        arrows[module] = {name for name, *_ in imported(path)} - {module}
    while arrows:
        free = [module for module, wanted in arrows.items() if not wanted & arrows.keys()]
        assert free, f"these import each other in a circle: {', '.join(sorted(arrows))}"
        for module in free:
            del arrows[module]


@pytest.mark.parametrize("path", ALL, ids=names(ALL))
def test_nothing_is_imported_by_a_star(path):
    for node in ast.walk(ast.parse(path.read_text())):
        stars = isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
        assert not stars, f"line {node.lineno}"


def defined_in(path):
    """The names that a file has: what it defines, sets or imports, also below an if or a try."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return found


@pytest.mark.parametrize("path", ALL, ids=names(ALL))
def test_what_is_imported_from_a_file_of_ours_is_there(path):
    """Also what is imported in a script that no test starts."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module not in MODULES:
            continue
        there = defined_in(MODULES[node.module])
        for alias in node.names:
            is_file = f"{node.module}.{alias.name}" in MODULES
            assert is_file or alias.name in there, f"line {node.lineno}: {alias.name}"


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


# Of these no docstring begins with a verb, though they end like one.
NO_VERBS = """
    As Boxes Columns Files Functions Its Lines Medians Messages Options Passages Pixels Rewards Rows
    Threads Tokens Tools Trajectories Values Vectors Weights This
""".split()


def begins_with_a_verb(docstring):
    """Says whether it is in the third person: "Reads …", "Says whether …", "Reduce-scatters …"."""
    first = re.match(r"[A-Z][a-z-]*s(?=[\s,;:.])", docstring)
    return first is not None and first[0] not in NO_VERBS


def may_begin_otherwise(path, function, docstring):
    """Says whether a function's docstring is for others, or of what is no deed.

    A tool's is a prompt: it explains its arguments to a model. That of an `__init__` explains
    arguments too, and a property is a thing.
    """
    is_prompt = room_of(path) in ("tools", "tasks") and "\nArgs:\n" in docstring
    is_property = any(ast.unparse(one).endswith("property") for one in function.decorator_list)
    return is_prompt or is_property or function.name == "__init__"


@pytest.mark.parametrize("path", SHIPPED, ids=names(SHIPPED))
def test_docstrings_of_functions_begin_with_a_verb(path):
    wrong = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None or may_begin_otherwise(path, node, docstring):
            continue
        if not begins_with_a_verb(docstring):
            wrong.append(f"line {node.lineno}: {docstring.splitlines()[0]}")
    assert wrong == [], 'expected "Reads …", "Says whether …", "Refuses, with UserError, …"'


@pytest.mark.parametrize(
    "docstring",
    [
        "The rows of a split.",
        "Rows of a split.",
        "Whether it may.",
        "UserError where it may not.",
        "read the rows.",
        "{name: value} of the rows.",
        "Levenshtein's distance.",
        "",
    ],
)
def test_the_rule_for_docstrings_refuses_what_begins_otherwise(docstring):
    assert not begins_with_a_verb(docstring)


def test_what_is_said_on_stderr_goes_through_one_function():
    """C6: it may quote a model, a tool or a server, so it is printed escaped."""
    places = []
    for module, path in MODULES.items():
        for line in path.read_text(encoding="utf-8").splitlines():
            if "file=sys.stderr" in line or "sys.stderr.write" in line:
                places.append((module, line.strip()))
    interrupted = 'print("interrupted", file=sys.stderr)'
    tell = 'print(f"{escaped(line)}\\n", end="", file=sys.stderr, flush=True)'
    assert sorted(places) == [("run.config", interrupted), ("run.config", tell)]


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
    """Pitfall 55: by name, `cfg.key`, or in settings that are taken from a config by name."""
    keys = set(script.Config.__dataclass_fields__)
    read = set()
    if script is train_grpo:
        read |= set(rollout.Settings.__dataclass_fields__)
        read |= set(train_grpo.LearnSettings.__dataclass_fields__)
    for path in MODULES.values():
        read |= set(re.findall(r"\bcfg\.(\w+)", path.read_text()))
    assert keys - read == set()


def class_of(path):
    (node,) = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "Config"
    ]
    return node


def test_the_keys_of_a_rollout_and_its_settings_are_keys_of_the_training_config():
    """Pitfall 55: what play.py and evaluate.py accept is there to be set."""
    fields = set(Config.__dataclass_fields__)
    keys = config.ROLLOUT_KEYS
    assert set(keys) <= fields and len(set(keys)) == len(keys)
    settings = set(rollout.Settings.__dataclass_fields__)
    assert settings <= fields and settings <= set(keys)
    assert rollout.Settings.of(Config()) == rollout.Settings()  # no two defaults of one thing


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

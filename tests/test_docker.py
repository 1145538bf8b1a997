"""The Dockerfile, where there is no docker: that all it copies, makes, installs and runs is there.

pytest tests/test_docker.py
"""

import fnmatch
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from run import config

ROOT = Path(config.HERE)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def steps() -> list[tuple[str, str]]:
    """[(RUN, its command), …], with lines that go on joined."""
    text = (ROOT / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in joined.splitlines()]


def commands() -> list[list[str]]:
    """Each command of a RUN, in words."""
    found = []
    for kind, what in steps():
        if kind == "RUN":
            found += [shlex.split(part) for part in what.split("&&")]
    return found


def ignored() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_it_has_only_instructions_that_there_are():
    kinds = [kind for kind, _ in steps()]
    assert kinds[0] == "FROM" and kinds.count("CMD") == 1
    assert set(kinds) <= {"FROM", "RUN", "WORKDIR", "ARG", "COPY", "EXPOSE", "CMD", "ENV"}


def test_its_python_is_one_that_the_project_takes():
    image = next(what for kind, what in steps() if kind == "FROM")
    least = re.fullmatch(r">=(\d+\.\d+)", PROJECT["requires-python"])[1]
    version = re.fullmatch(r"python:(\d+\.\d+)-slim", image)[1]
    assert tuple(map(int, version.split("."))) >= tuple(map(int, least.split(".")))


def test_its_pins_are_those_of_the_project():
    (torch,) = [name for name in PROJECT["dependencies"] if name.startswith("torch>")]
    words = [word for command in commands() for word in command]
    assert [word for word in words if word.startswith("torch")] == [torch]
    for extras in re.findall(r"\.\[(.*)\]", " ".join(words)):
        assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()


def test_what_it_copies_is_there_and_not_ignored():
    for kind, what in steps():
        if kind != "COPY":
            continue
        *sources, target = what.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            if source != ".":
                assert not any(fnmatch.fnmatch(source, pattern) for pattern in ignored()), source


def test_what_the_first_layers_make_needs_nothing_that_is_copied_later(tmp_path):
    """The install of the packages, as make would do it, in a folder with those files alone."""
    first = next(what.split()[:-1] for kind, what in steps() if kind == "COPY")
    for name in first:
        shutil.copy(ROOT / name, tmp_path)
    made = [command[1] for command in commands() if command[0] == "make"]
    assert made
    for target in made:
        done = subprocess.run(
            ["make", "--dry-run", target], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0 and "pip install" in done.stdout, done.stderr
    # what setuptools reads, to install the project itself
    names = [PROJECT["readme"], *PROJECT["license-files"]]
    assert all((tmp_path / name).is_file() for name in names)


def test_what_it_runs_is_there():
    command = json.loads(next(what for kind, what in steps() if kind == "CMD"))
    assert command[0] == "make"
    done = subprocess.run(
        ["make", "--dry-run", *command[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "demo.py" in done.stdout, done.stderr


def test_what_its_head_tells_to_run_is_there():
    """The endpoint that a user starts in the image, with its flags."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n#", "")
    module, flags = re.search(r"python -m (\S+) (.*)", text).groups()
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not there")
    said = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert said.returncode == 0
    for flag in re.findall(r"--([a-z_]+)=", flags):
        assert re.search(rf"\b{flag}\b", said.stdout), flag


def test_nothing_secret_or_large_is_sent_to_docker():
    assert {".git", ".venv", "out"} <= set(ignored())

"""What README.md and the notebook tell people to do works, and the log keys they explain exist.

pytest tests/test_readme.py
"""

import asyncio
import os
import re
from pathlib import Path

import pytest

import rewards as reward_functions
from tools import Toolbox

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def block(name):
    return next(code for code in BLOCKS if f"def {name}(" in code)


def test_the_tool_of_the_readme_is_a_tool(tmp_path):
    (tmp_path / "my_tools.py").write_text(block("weather"))

    async def call():
        session = Toolbox([f"{tmp_path}/my_tools.py:weather"]).open()
        return await session.call("weather", {"city": "Rome"})

    content, error, _ = asyncio.run(call())
    assert (content, error) == ("It rains in Rome.", None)
    assert len(block("weather").strip().splitlines()) <= 8


def test_the_reward_of_the_readme_is_a_reward(tmp_path):
    (tmp_path / "my_rewards.py").write_text(block("brief"))
    selected = reward_functions.select(("correct", f"{tmp_path}/my_rewards.py:brief:0.1"))
    assert selected["brief"][1] == 0.1
    assert len(block("brief").strip().splitlines()) <= 6


def test_the_mcp_server_of_the_readme_is_a_set_of_tools(tmp_path, monkeypatch):
    servers = ROOT / ".venv" / "mcp-servers" / "bin"
    if not (servers / "mcp-server-time").exists():
        pytest.skip("mcp-server-time is not installed: `make test` does that")
    monkeypatch.setenv("PATH", f"{servers}:{os.environ['PATH']}")
    (text,) = re.findall(r"```json\n(.*?)```", README, re.S)
    assert len(text.strip().splitlines()) == 3
    (tmp_path / "servers.json").write_text(text)

    async def call():
        box = Toolbox([f"mcp:{tmp_path}/servers.json"], timeout=20.0)
        try:
            return await box.open().call("get_current_time", {"timezone": "UTC"})
        finally:
            await box.close()

    content, error, _ = asyncio.run(call())
    assert error is None and "UTC" in content


def test_every_file_that_the_readme_names_is_there():
    folders = "configs|tools|tests|notebooks|evidence"
    named = set(re.findall(rf"(?<![\w./])((?:{folders})/[\w./]+)", README))
    named |= set(re.findall(r"^(\w+\.py)  ", README, re.M))
    missing = [name for name in named if not (ROOT / name.rstrip(".")).exists()]
    assert named and not missing


def test_every_config_is_in_the_table_of_the_readme():
    configs = [path.name for path in (ROOT / "configs").glob("*.py")]
    assert [name for name in configs if f"| `{name}` |" not in README] == []


def test_the_readme_explains_every_key_of_the_log():
    """The keys of the committed evidence are those of a real run."""
    from run import page as run_page

    explained = set(re.findall(r"`([\w<>]+)`", README.split("## Reading the log")[1]))
    keys = set(run_page.read(next((ROOT / "evidence" / "calc").glob("*grpo*.jsonl")))[-1])
    families = [name.split("<")[0] for name in explained if "<" in name] + ["reward_"]
    known = explained | {"step", "rollouts"}
    assert [key for key in keys - known if not key.startswith(tuple(families))] == []


def test_the_notebook_runs():
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "notebooks" / "01_one_rollout.ipynb", as_version=4)
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()
    printed = "".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    assert "mask 1" in printed and "answered, 2 turns" in printed

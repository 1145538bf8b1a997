"""The bash tool: what the model sees. Hostile commands: tests/test_hostile.py.

pytest tests/test_bash.py
"""

import asyncio
import sys
from pathlib import Path

import pytest
from until import PATIENCE, until

from run.config import UserError
from tools import Tool, Toolbox
from tools.bash import bash
from tools.sandbox import caller as sandbox


@pytest.fixture(scope="module")
def tool():
    if sys.platform != "linux" or not sandbox.layers("shell")["pid_namespace"]:
        pytest.skip("this system does not allow the layer pid_namespace, which bash needs")
    return bash()


def run(tool, command, timeout=PATIENCE):
    async def call():
        schema = {"function": {"parameters": {"properties": {"command": {"type": "string"}}}}}
        box = Toolbox([Tool("bash", schema, tool.__call__, True)], 8, timeout, cache="none")
        return (await box.open().call("bash", {"command": command}))[:2]

    return asyncio.run(call())


@pytest.mark.parametrize(
    "command, shown",
    [
        ("echo hello", "hello"),
        ("echo out; echo err >&2; echo end", "out\nerr\nend"),
        ("true", "(no output)"),
        ("false", "(exit code 1)"),
        ("echo a; exit 101", "a\n(exit code 101)"),
        ("no_such_program_", "command not found\n(exit code 127)"),
        ("seq 10 | awk '{s += $1} END {print s}'", "55"),
        ("printf 'b\\na\\n' > f; sort f; cat < f | wc -l", "a\nb\n2"),
        ("yes | head -n 2", "y\ny"),
        ("cat <<< text; x=$((6 * 7)); echo $x", "text\n42"),
        ("python3 -c 'print(6 * 7)'", "42"),
        ("cat", "(no output)"),
        ("echo 'Grüße'", "Grüße"),
    ],
)
def test_output_and_exit_code_are_shown(tool, command, shown):
    text, error = run(tool, command)
    assert error is None and text.endswith(shown)


def test_a_mistake_is_shown_in_the_shells_words(tool):
    text, error = run(tool, "if")
    assert error is None and "syntax error" in text and text.endswith("(exit code 2)")


def test_python_in_bash_has_numpy(tool):
    if not sandbox.layers("shell")["private_root"]:
        pytest.skip("this system does not allow the layer private_root")
    assert run(tool, "python3 -c 'import numpy; print(numpy.arange(3))'") == ("[0 1 2]", None)


def test_calls_share_nothing_and_see_nothing_of_ours(tool, monkeypatch, tmp_path):
    """Pitfalls 39 and 40."""
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    (tmp_path / "secret").write_text("hunter2")
    assert run(tool, "echo x > mark; export MARK=1")[1] is None
    text = run(tool, "ls -A; echo mark: $MARK; env | grep SECRET")[0]
    assert text == "mark:\n(exit code 1)"
    if sandbox.layers("shell")["private_root"]:
        text, _ = run(tool, f"cat {tmp_path}/secret; ls /home /proc /etc/passwd /root/.bashrc")
        assert text.count("No such file") == 5


def test_a_time_out_ends_everything(tool):
    text, error = run(tool, "sleep 60 & sleep 60", timeout=0.5)
    assert (text, error) == ("error: bash took longer than 0.5 s and was stopped", "timeout")
    server = sandbox._servers["shell"].process.pid
    tasks = Path(f"/proc/{server}/task")
    assert until(lambda: not any(file.read_text() for file in tasks.glob("*/children")))


def test_where_nothing_confines_it_the_run_does_not_start(monkeypatch):
    """Not at the first call: the user is told before anything is trained."""
    monkeypatch.setattr(sandbox, "has_fork_server", lambda: False)
    with pytest.raises(UserError, match="bash tool cannot confine a command here.*seccomp"):
        bash()


def test_the_tool_can_be_described_and_is_made_at_the_start(tool):
    box = Toolbox(["bash"])
    parameters = box.schemas[0]["function"]["parameters"]
    assert box.schemas[0]["function"]["name"] == "bash" and parameters["required"] == ["command"]

"""The bash_session tool: what stays between calls, what ends it, and what it cannot reach.

pytest tests/test_bash_session.py

Hostile sessions: tests/test_hostile.py.
"""

import asyncio
import sys
from pathlib import Path

import pytest
from until import PATIENCE, until

from run.config import UserError
from tools import Tool, Toolbox
from tools import bash_session as module
from tools.bash_session import bash_session
from tools.sandbox import caller as sandbox
from tools.sandbox.session import ENDED, LOST

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not sandbox.layers("shell")["pid_namespace"],
    reason="this system does not allow the layer pid_namespace, which bash needs",
)
NONE = ("(no output)", None)


def toolbox(timeout=PATIENCE):
    """Toolbox(["bash_session"]), without the seconds that transformers takes for the schema."""
    parameters = {"properties": {"command": {"type": "string"}}, "required": ["command"]}
    schema = {"function": {"parameters": parameters}}
    tool = Tool("bash_session", schema, bash_session.__call__, True, lambda _: bash_session())
    return Toolbox([tool], 64, timeout, cache="none")


async def play(session, *commands):
    return [(await session.call("bash_session", {"command": one}))[:2] for one in commands]


def run(*commands, timeout=PATIENCE):
    """-> (observation, error kind) of each call of one trajectory"""

    async def scene():
        session = toolbox(timeout).open()
        results = await play(session, *commands)
        await session.close()
        return results

    return asyncio.run(scene())


def nothing_left():
    """Whether no session's process runs: they are children of the fork server."""
    server = sandbox._servers["shell"].process.pid
    tasks = Path(f"/proc/{server}/task")
    return until(lambda: not any(file.read_text() for file in tasks.glob("*/children")))


def test_directory_variables_functions_and_files_stay():
    results = run(
        'mkdir -p a/b; cd a/b; x=20; export Y=2; list=(7 8 9); f() { echo "f $1"; }',
        "pwd; echo $x $Y ${list[1]}; f 3; python3 -c 'import os; print(os.environ[\"Y\"])'",
        "echo kept > file; shopt -s nullglob; umask 077",
        "cat file; cd ..; ls; echo none*; umask",
        "cd - > /dev/null; pwd",
    )
    assert results[0] == NONE and results[2] == NONE
    assert results[1] == ("/tmp/a/b\n20 2 8\nf 3\n2", None)
    assert results[3] == ("kept\nb\n\n0077", None)
    assert results[4] == ("/tmp/a/b", None)
    assert nothing_left()


@pytest.mark.parametrize(
    "command, shown",
    [
        ("echo out; echo err >&2; echo end", "out\nerr\nend"),
        ("true", "(no output)"),
        ("echo a; false", "a\n(exit code 1)"),
        ("(exit 101)", "(exit code 101)"),
        ("printf abc", "abc"),
        ("cat; read line; echo \"read: '$line'\"", "read: ''"),
        ("if", "syntax error: unexpected end of file\n(exit code 2)"),
        ("echo 'not closed", "looking for matching `''\n(exit code 2)"),
        ("break; continue; echo on", "on"),
        ("return 3; echo on", "on"),
        ("no_such_program_", "command not found\n(exit code 127)"),
        ("# nothing", "(no output)"),
        ("", "(no output)"),
        ("exec > log; echo hidden", "(no output)"),
        ("exec 0<&- 1>&- 2>&-", "(no output)"),
        ("exec 10>a 11>b 12>c 13>d; echo x >&10; cat a", "x"),
        ('for fd in $(seq 3 63); do eval "echo 0 >&$fd"; done 2> /dev/null; echo end', "end"),
        ("for i in 1 2; do\n  echo $i\ndone", "1\n2"),
        ("echo 'Grüße' \\\\ '$x' \"\\\"\"", 'Grüße \\ $x "'),
        ("yes | head -n 2", "y\ny"),
        ("head -c 100000 /dev/zero | wc -c; x=$(printf '%090000d' 1); echo ${#x}", "100000\n90000"),
        (": " + "x" * 99_000, "(no output)"),
        ("set -u; (echo $undefined); set +u", "undefined: unbound variable"),
    ],
)
def test_output_and_exit_code_are_shown_and_the_shell_goes_on(command, shown):
    results = run("y=5", command, "echo $y")
    text, error = results[1]
    assert text.endswith(shown)
    assert error is None and results[2] == ("5", None)


def test_what_runs_in_the_background_goes_on_and_can_be_waited_for():
    results = run(
        "sleep 300 & first=$!; (until [ -e go ]; do sleep 0.01; done; echo went > done) &",
        "jobs -p | wc -l; kill -0 $first && echo alive",
        "touch go; wait %2; cat done",
        "kill $first; wait $first; echo $?; jobs",
    )
    assert results[0] == NONE
    assert results[1] == ("2\nalive", None)
    assert results[2] == ("went", None)
    assert results[3][0].startswith("143")
    assert nothing_left()


def test_what_the_background_says_is_heard_in_the_next_call_and_not_lost():
    results = run(
        "(until [ -e go ]; do sleep 0.01; done; echo late; touch said) & echo at once",
        "touch go; until [ -e said ]; do sleep 0.01; done",
        "(head -c 300000 /dev/zero | tr '\\0' x; touch said2) & true",
        "until [ -e said2 ]; do sleep 0.01; done; echo the end",
    )
    assert results[:2] == [("at once", None), ("late", None)]
    assert results[3][0].endswith("xthe end") and results[3][1] is None  # and it was not stopped


@pytest.mark.parametrize(
    "command, code",
    [
        ("echo last; exit 7", "last\n(exit code 7)"),
        ("set -e; false; echo no", "(exit code 1)"),
        ("exec python3 -c 'print(1); exit(4)'", "1\n(exit code 4)"),
        ("kill -9 $$", "(exit code 137)"),
        ("(sleep 300 &); exit 3", "(exit code 3)"),
    ],
)
def test_what_ends_the_shell_ends_the_session_and_is_said(command, code):
    results = run("x=1", command, "echo x=$x; ls", "echo again")
    assert results[1] == (f"{code}\n{ENDED}", None)
    assert results[2] == (f"{LOST}\nx=", None)
    assert results[3] == ("again", None)
    assert nothing_left()


def test_a_shell_that_ends_between_calls_is_missed_in_the_next():
    async def scene():
        session = toolbox().open()
        first = await play(
            session, "x=1; (until [ -e go ]; do sleep 0.01; done; kill -9 $$) & true"
        )
        second = await play(session, "touch go")
        assert await asyncio.to_thread(nothing_left)
        after = await play(session, "echo x=$x")
        await session.close()
        return first + second + after

    first, second, after = asyncio.run(scene())
    assert first == NONE and second[1] is None
    assert after[0].endswith("x=") and LOST in after[0]


def test_a_time_out_kills_what_runs_and_the_next_call_has_a_new_session():
    async def scene():
        box = toolbox()
        session = box.open()
        await play(session, "x=1; sleep 300 &")
        box.tools["bash_session"].timeout = 0.5
        stopped = await play(session, "trap '' TERM INT HUP; sleep 300 | sleep 300")
        gone = nothing_left()
        box.tools["bash_session"].timeout = PATIENCE
        after = await play(session, "echo x=$x; jobs")
        await session.close()
        return stopped + after, gone

    (stopped, after), gone = asyncio.run(scene())
    assert stopped == ("error: bash_session took longer than 0.5 s and was stopped", "timeout")
    assert gone and after == (f"{LOST}\nx=", None)
    assert nothing_left()


def test_too_much_output_ends_the_session():
    results = run("x=1", "yes", "echo x=$x")
    assert results[1][1] == "oversized" and results[1][0].endswith(ENDED)
    assert results[2] == (f"{LOST}\nx=", None)


def test_trajectories_share_nothing():
    """Pitfall 40."""

    async def scene():
        box = toolbox()
        sessions = [box.open() for _ in range(6)]
        first = [play(s, f"x={i}; echo {i} > f; mkdir d{i}") for i, s in enumerate(sessions)]
        await asyncio.gather(*first)
        results = await asyncio.gather(*(play(s, "echo $x; cat f; ls -d d*") for s in sessions))
        await asyncio.gather(*(session.close() for session in sessions))
        return results

    results = asyncio.run(scene())
    assert results == [[(f"{i}\n{i}\nd{i}", None)] for i in range(6)]
    assert nothing_left()


def test_it_sees_nothing_of_ours_and_reaches_nobody(monkeypatch, tmp_path):
    """Pitfalls 39 and 40."""
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    (tmp_path / "secret").write_text("hunter2")
    results = run(
        "env | grep -c SECRET",
        "kill -9 1; kill -9 -1; echo still",
        "(echo > /dev/tcp/127.0.0.1/80) 2>&1 | grep -c .",
        "echo x 2> /dev/null > /usr/mark; echo $?",
    )
    assert results[0] == ("0\n(exit code 1)", None)
    assert "still" in results[1][0] or results[1][0].endswith(ENDED)
    assert results[3][0].endswith("1")
    if sandbox.layers("shell")["private_root"]:
        ((text, _),) = run(f"cat {tmp_path}/secret; ls /home /proc /etc/passwd /root/.bashrc")
        assert text.count("No such file") == 5


def test_close_waits_for_the_end_and_may_come_twice():
    async def scene():
        session = bash_session()
        await session("echo x > f; sleep 300 & disown")
        await session.close()
        gone = nothing_left()
        await session.close()
        assert await session("ls; echo new") == "new"  # and starts anew, with nothing lost
        await session.close()
        return gone

    assert asyncio.run(scene())


def test_a_null_byte_is_refused_and_changes_nothing():
    results = run("x=1", "echo a\0b", "echo $x")
    assert results[1] == ("error: a command cannot contain a null byte", "bad_arguments")
    assert results[2] == ("1", None)


def test_where_it_cannot_run_the_run_does_not_start(monkeypatch):
    """Not at the first call: the user is told before anything is trained."""
    monkeypatch.setattr(module.os.path, "exists", lambda path: path != "/bin/bash")
    with pytest.raises(UserError, match="bash_session needs /bin/bash"):
        bash_session.prepare()
    monkeypatch.setattr(sandbox, "has_fork_server", lambda: False)
    with pytest.raises(UserError, match="cannot confine a command here.*seccomp"):
        bash_session.prepare()


def test_the_tool_can_be_described():
    box = Toolbox(["bash_session"])
    function = box.schemas[0]["function"]
    assert function["name"] == "bash_session" and "stay for the next calls" in str(function)

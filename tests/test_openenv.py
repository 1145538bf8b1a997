"""Environments that a server of OpenEnv plays: --tools=openenv:http://….

    pytest tests/test_openenv.py

The server is the package's own, with an environment of its own classes, on 127.0.0.1. It runs in
.venv/openenv (`make test` makes it), since its package lowers pillow.
"""

import asyncio
import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from ports import free_port
from until import until

import rewards as reward_functions
import train_grpo
from chat import Chat
from engines.scripted import ScriptedEngine
from learning import model as models
from rollout import Settings, rollouts
from run.config import HERE, UserError
from tasks import tiny as tiny_model
from tools import Toolbox

PYTHON = HERE / ".venv/openenv/bin/python"
REASON = "needs openenv-core, in an environment of its own: make .venv/installed-test"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=REASON)

STOP = "<|im_end|>"

SERVER = """
import sys
import time
from pathlib import Path

import uvicorn
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class Guess(Action):
    '''Guess the number.'''

    number: int


class Seen(Observation):
    text: str = ""


class ToolCall(Action):
    tool_name: str


class Hidden(Environment):
    '''A number from 0 to 2 is to be guessed; each wrong guess costs 0.1.'''

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        super().__init__()
        self.hidden = None
        note("made")

    def reset(self, seed=None, episode_id=None, start=0, **others):
        self.hidden = (seed + start) % 3
        return Seen(text="Which number is it?")

    def step(self, action, timeout_s=None, **others):
        if action.number > 9:
            raise ValueError("only digits")
        if action.number == 8:
            while not Path("go").exists():
                time.sleep(0.05)
            return Seen(text="late", reward=5.0)
        if action.number == self.hidden:
            return Seen(text="right", reward=1.0, done=True)
        return Seen(text=f"not {action.number}", reward=-0.1)

    @property
    def state(self):
        return State()

    def close(self):
        note("closed")


def note(what):
    with open("notes.txt", "a") as file:
        file.write(what + "\\n")


port, sessions, action = sys.argv[1:]
classes = {"Guess": Guess, "ToolCall": ToolCall}
app = create_fastapi_app(Hidden, classes[action], Seen, max_concurrent_envs=int(sessions))
uvicorn.run(app, port=int(port), log_level="error")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the servers run."""
    made = tmp_path_factory.mktemp("openenv")
    (made / "server.py").write_text(SERVER)
    return made


@pytest.fixture(scope="module")
def serve(folder):
    """serve(sessions, action): the address of a server of theirs."""
    servers = []

    def start(sessions, action="Guess"):
        url = f"http://127.0.0.1:{free_port()}"
        command = [str(PYTHON), "server.py", url.rpartition(":")[2], str(sessions), action]
        servers.append(subprocess.Popen(command, cwd=folder))
        assert until(lambda: answers(url), seconds=120)
        return url

    yield start
    for server in servers:
        server.terminate()
        server.wait()


def answers(url):
    try:
        return urllib.request.urlopen(f"{url}/schema").status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def url(serve):
    return serve(64)


def say(number):
    call = json.dumps({"name": "step", "arguments": {"number": number}})
    return f"<tool_call>\n{call}\n</tool_call>{STOP}"


def play(tokenizer, url, script, examples, options=()):
    box = Toolbox([f"openenv:{url}"], timeout=60, options=options)
    chat = Chat(tokenizer, "hermes", box.schemas)
    turns = [tokenizer.encode(turn, add_special_tokens=False) for turn in script]
    engine = ScriptedEngine(turns, tokenizer)
    rewards = reward_functions.select(("environment",))
    reward_functions.check_environments(box, rewards)
    playing = rollouts(examples, chat, engine, box, Settings(), samples=1, rewards=rewards)
    return asyncio.run(playing)


def row(number, **others):
    return {"id": number, "messages": [{"role": "user", "content": "Play."}], "answer": ""} | others


def test_reset_opens_step_is_the_tool_rewards_add_up_and_done_ends(tokenizer, url, folder):
    (t,) = play(tokenizer, url, [say(0), say(99), say(1), "never"], [row(1)])
    assert t.messages[0]["content"].endswith("Which number is it?")
    assert [call.result for call in t.calls][0] == "not 0"
    assert "only digits" in t.calls[1].result and t.calls[1].error == "refused"
    assert (t.calls[2].result, t.answer, t.stop) == ("right", "right", "answered")
    assert t.rewards == {"environment": pytest.approx(0.9)}
    notes = folder / "notes.txt"  # all sessions are closed
    assert until(lambda: notes.read_text().count("made") == notes.read_text().count("closed"))


def test_a_row_says_what_the_reset_is_given(tokenizer, url):
    (t,) = play(tokenizer, url, [say(2)], [row(1, reset={"start": 1})])
    assert t.rewards == {"environment": 1.0}
    (t,) = play(tokenizer, url, [say(2)], [row(1, reset={"seed": 2})])
    assert t.rewards == {"environment": 1.0}


def test_the_tool_has_the_schema_of_the_action(url):
    (schema,) = Toolbox([f"openenv:{url}"], timeout=60).schemas
    assert schema["function"]["description"] == "Guess the number."
    parameters = schema["function"]["parameters"]
    assert list(parameters["properties"]) == ["number"] and parameters["required"] == ["number"]


def test_what_cannot_be_honoured_is_refused(serve, url, monkeypatch):
    for address, says in [
        ("127.0.0.1:1", "is no address"),
        ("http://127.0.0.1:1", "no server of OpenEnv answers there"),
        (serve(1), "two episodes cannot be played at a time: start it with max_concurrent_envs"),
        (serve(2, "ToolCall"), "its action is a call of an MCP tool"),
    ]:
        with pytest.raises(UserError, match=re.escape(says)):
            Toolbox([f"openenv:{address}"], timeout=60)
    with pytest.raises(UserError, match="openenv has no option 'speed'"):
        Toolbox([f"openenv:{url}"], options=["openenv.speed=3"])
    monkeypatch.setitem(sys.modules, "websockets.asyncio.client", None)
    with pytest.raises(UserError, match=re.escape('pip install -e ".[openenv]"')):
        Toolbox([f"openenv:{url}"])


def test_an_episode_that_is_lost_costs_its_trajectory_and_no_more(tokenizer, url, folder):
    """A step past its time: what comes next on that connection would be its answer."""
    options = ["openenv.timeout=1"]
    (t,) = play(tokenizer, url, [say(8), say(1), f"Lost.{STOP}"], [row(1)], options)
    (folder / "go").touch()
    assert [call.error for call in t.calls] == ["timeout", "lost"]
    assert t.rewards == {"environment": None}


def test_five_steps_of_grpo(tokenizer, url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models.save(tiny_model.tiny(tokenizer, layers=1, hidden_size=32), tokenizer, "base")
    Path("rows.jsonl").write_text('{"prompt": "Play."}\n{"prompt": "Play again."}\n')
    argv = [
        "--data=rows.jsonl", f"--tools=openenv:{url}", "--rewards=environment,length",
        "--reward_options=length.limit=16,length.buffer=16", "--model=base", "--out_dir=out",
        "--steps=5", "--prompts_per_step=2", "--group_size=2", "--max_tokens=512",
        "--max_new_tokens=16", "--format=hermes", "--tool_timeout=60",
    ]  # fmt: skip
    train_grpo.main(argv)
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward_environment" in row]
    assert [row["step"] for row in steps] == [0, 1, 2, 3, 4]
    assert all(row["reward_environment"] == 0.0 for row in steps)  # it knows nothing
    assert not any(row.get("environment_failures") for row in steps)

"""Environments of the package verifiers, as load_environment() returns them: data, tools, rubric.

    --data=verifiers:NAME --tools=verifiers:NAME --rewards=environment

NAME is its module, installed beside verifiers or in this folder; `?name=value&…` are arguments of
load_environment(). It is played by verifiers' own loop, in a process of a python that has the
package (tools/calling/verifiers_worker.py): all calls of a turn go there at once, its user speaks
behind an answer, its rubric's reward is the reward `environment`, and what the rubric's functions
gave is logged as environment_<function>.
"""

import asyncio
import contextlib
import functools
import importlib.util
import itertools
import json
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

from run import config, plugins
from run.config import UserError
from tools.calling.base import TURN, Environment, Result, Tool, ToolError
from tools.calling.environment import hooks_of

PREFIX = "verifiers:"  # begins the name of such data and tools
WORKER = Path(__file__).with_name("verifiers_worker.py")
BESIDE = config.HERE / ".venv/verifiers/bin/python"  # where it is installed apart from all else
INSTALL = "python -m venv .venv/verifiers; .venv/verifiers/bin/pip install 'verifiers>=0.3,<0.4'"
_numbers = itertools.count(1)  # of requests and episodes


def rows(source: str, split: str, limit: int | None) -> list[dict]:
    """Reads the first rows of its data set: prompt, answer, and, for a rollout, `of_verifiers`."""
    if split not in ("train", "test"):
        raise UserError(f"split = {split!r}: {PREFIX}{source} has train and test")
    made = []
    asked = _process(source).ask("rows", source=source, split=split, limit=limit)
    try:
        found = asked.result()
    except RuntimeError as error:  # a download, say
        raise UserError(f"{PREFIX}{source}: its rows cannot be read: {error}") from None
    for row in found:
        if "tool_defs" in (row.get("info") or ()):
            raise UserError(f"{PREFIX}{source}: its rows have tools of their own (info.tool_defs)")
        prompt = [_without_none(message) for message in row["prompt"]]
        if any(isinstance(message.get("content"), list) for message in prompt):
            raise UserError(f"{PREFIX}{source}: its prompts have images or other parts than text")
        of_verifiers = {"source": source, "row": {**row, "prompt": prompt}}
        made.append({"prompt": prompt, "answer": row.get("answer"), "of_verifiers": of_verifiers})
    if not made:
        which = "eval_dataset" if split == "test" else "dataset"
        raise UserError(f"{PREFIX}{source} has no {which}, so no split {split!r}")
    return made


def load(source: str) -> tuple[Environment, list[Tool]]:
    """Describes the environment and its tools. UserError if there is none, or it cannot be used."""
    make = functools.partial(Episode, source)
    environment = Environment("verifiers", make, hooks_of(Episode))
    tools = []
    for offered in _process(source).tools[source]:
        function = {key: offered[key] for key in ("name", "description", "parameters")}
        tool = Tool(
            name=offered["name"],
            schema={"type": "function", "function": function},
            function=functools.partial(_call, offered["name"]),
            is_async=True,
            make=make,
            environment=environment,
            gives_result=True,
        )
        tools.append(tool)
    return environment, tools


async def _call(name, episode, /, **arguments):
    return await episode._result_of(name, arguments)


class Episode:
    """One rollout in the process."""

    def __init__(self, source: str, example: dict):
        if example.get("of_verifiers", {}).get("source") != source:
            raise UserError(f"{PREFIX}{source}: the rows are of other data: give --data the same")
        self.name = f"{PREFIX}{source}"
        self.process = _process(source)
        self.number = next(_numbers)
        self.row = example["of_verifiers"]["row"]
        self.told = 0  # turns of the model, of which it knows
        self.results = {}  # what the calls of the last of them gave, by their ids
        self.has_ended = False
        self.last_words = ""  # of the environment, where a call ended the episode
        self.failure = ""  # how it failed: nothing can be asked of it then
        self.measured = {}  # what the rubric's functions gave

    async def opening(self):
        source = self.name.removeprefix(PREFIX)
        reply = await self._ask("begin", source=source, row=self.row)
        if reply["ended"] or _plain(reply["messages"]) != _plain(self.row["prompt"]):
            raise UserError(f"{self.name}: its setup changes the prompt, or ends the rollout")

    async def user(self, trajectory):
        reply = await self._tell(trajectory)
        return None if reply["ended"] else _joined(reply["messages"])

    async def reward(self, trajectory):
        if _count_turns(trajectory) > self.told and not self.has_ended:
            await self._tell(trajectory)  # the last turn, which a limit of ours ended
        if self.failure:
            raise RuntimeError(self.failure)
        scored = await self._ask("score")
        self.measured = scored["metrics"]
        return scored["reward"]

    def metrics(self):
        return self.measured

    def close(self):
        self.process.ask("close", episode=self.number)

    async def _result_of(self, name, arguments):
        trajectory, calls = TURN.get()
        if _count_turns(trajectory) > self.told:
            reply = await self._tell(trajectory, calls)
            if reply["ended"]:
                self.last_words = _joined(reply["messages"]) or "the episode has ended"
            elif any(message["role"] != "tool" for message in reply["messages"]):
                raise UserError(f"{self.name}: it answers calls with more than results")
            self.results = {m["tool_call_id"]: m["content"] for m in reply["messages"]}
        if self.has_ended:
            return Result(self.last_words, ends=True)
        for index, call in enumerate(calls):
            of_this = (call.name, call.arguments) == (name, arguments)
            if of_this and f"call-{index}" in self.results:
                return Result(self.results.pop(f"call-{index}"))
        raise UserError(f"{self.name}: it gave a call of {name} no result")

    async def _tell(self, trajectory, calls=()):
        """Gives it the turns of which it does not know; returns what it replies to the last one.
        calls: those of the last one, where they are about to run."""
        turns = _turns(trajectory, calls)[self.told :]
        self.told += len(turns)
        reply = await self._ask("say", turns=turns)
        self.has_ended = reply["ended"]
        return reply

    async def _ask(self, what, **of_it):
        if self.failure:
            raise ToolError("lost", f"error: {self.failure}")
        self.failure = "the environment did not answer in time"  # if this is cancelled
        try:
            asked = self.process.ask(what, episode=self.number, **of_it)
            answer = await asyncio.wrap_future(asked)
        except RuntimeError as error:
            self.failure = str(error)
            raise
        self.failure = ""
        return answer


def _count_turns(trajectory):
    return len(_assistants(trajectory))


def _assistants(trajectory):
    """Picks the model's messages."""
    messages = trajectory.messages[len(trajectory.example["messages"]) :]
    return [message for message in messages if message["role"] == "assistant"]


def _turns(trajectory, calls):
    """Describes the model's turns as the process is told them."""
    turns = []
    assistants = _assistants(trajectory)
    for number, message in enumerate(assistants):
        run = [call for call in trajectory.calls if call.turn == number]
        if number == len(assistants) - 1:
            run = run or calls
        named = []
        for index, call in enumerate(run):
            arguments = json.dumps(call.arguments) if call.arguments is not None else ""
            named.append({"id": f"call-{index}", "name": call.name or "", "arguments": arguments})
        turns.append({"content": message["content"], "tool_calls": named, "was_cut": False})
    if trajectory.stop == "length":
        turns[-1]["was_cut"] = True
    return turns


def _joined(messages):
    return "\n\n".join(message["content"] for message in messages)


def _plain(messages):
    return [(message["role"], message.get("content") or "") for message in messages]


def _without_none(message):
    """Restores a message as it was before a table of messages gave it the fields of all others."""
    return {key: value for key, value in message.items() if value is not None}


# ---- the process


class Process:
    """A python that has verifiers, with its environments. Any thread may ask it."""

    def __init__(self):
        self.running = subprocess.Popen(
            [_python(), "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for this program alone
        )
        self.asked = {}  # the number of a request -> its Future
        self.tools = {}  # source -> what its environment offers
        self.lock = threading.Lock()
        threading.Thread(target=self._read, daemon=True).start()

    def load(self, source: str) -> None:
        """Loads an environment. UserError if that fails, or if it cannot be honoured."""
        name, arguments = plugins.parse_source(source)
        asked = self.ask("load", source=source, name=name, arguments=arguments)
        try:
            loaded = asked.result()
        except RuntimeError as error:
            raise UserError(f"{PREFIX}{source} cannot be loaded: {error}") from None
        if loaded["refused"]:
            raise UserError(f"{PREFIX}{source} cannot be honoured: {loaded['refused']}")
        self.tools[source] = loaded["tools"]

    def ask(self, what: str, **request) -> Future:
        """Asks something of the worker; the Future has its answer, or raises RuntimeError."""
        future = Future()
        with self.lock:
            number = next(_numbers)
            self.asked[number] = future
            with contextlib.suppress(OSError):  # it has ended, as _read finds out
                self.running.stdin.write(json.dumps([number, what, request]).encode() + b"\n")
                self.running.stdin.flush()
        if self.running.poll() is not None:
            self._fail_all()
        return future

    def _read(self):
        for line in self.running.stdout:
            reply = json.loads(line)
            future = self.asked.pop(reply["number"])
            if not future.set_running_or_notify_cancel():
                continue  # its deadline has passed
            if "error" in reply:
                future.set_exception(RuntimeError(reply["error"]))
            else:
                future.set_result(reply["result"])
        self.running.wait()
        self._fail_all()

    def _fail_all(self):
        while self.asked:
            _, future = self.asked.popitem()
            if future.set_running_or_notify_cancel():
                future.set_exception(RuntimeError("the process of verifiers ended"))


_processes = []  # the one that runs
_starting = threading.Lock()  # held while it is started


def _process(source: str) -> Process:
    """Gives the process, with this environment loaded; starts another where that has ended."""
    with _starting:
        if not _processes or _processes[-1].running.poll() is not None:
            _processes[:] = [Process()]
        if source not in _processes[-1].tools:
            _processes[-1].load(source)
        return _processes[-1]


def _python():
    """Finds the python that has verifiers: this one, or that of .venv/verifiers."""
    if importlib.util.find_spec("verifiers"):
        return sys.executable
    if not BESIDE.exists():
        raise UserError(f"{PREFIX}… needs verifiers, in an environment of its own: {INSTALL}")
    return str(BESIDE)

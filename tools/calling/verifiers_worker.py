"""What runs where the package verifiers is installed: its environments, played by its own loop.

tools/calling/verifiers.py is the other side: a line of JSON on stdin asks something, a line on
stdout answers it, and many episodes go on at once. An episode is verifiers' own rollout(), with its
stop conditions, limits and cleanup; the client that it asks for the model's next turn is us. This
file has nothing of this repository to import.
"""

import asyncio
import json
import logging
import os
import sys
from contextvars import ContextVar

import verifiers as vf
from verifiers.clients import Client
from verifiers.types import Response, ResponseMessage

# Classes of environments and rubrics that need what is not here, and why.
REFUSED = {
    "SandboxEnv": "its tools run in a sandbox of a service, with a key",
    "CliAgentEnv": "it runs an agent of its own in a container",
    "BrowserEnv": "it drives a browser of a service, with a key",
    "EnvGroup": "it is a group of environments: give each of them, in a mix",
    "JudgeRubric": "it asks a model of its own, with a key: use the reward judge",
}
failures = ContextVar("failures")  # of reward functions, while an episode is scored
environments = {}  # source -> what was loaded
episodes = {}  # number -> Episode


class Episode(Client):
    """One rollout, whose model is asked through us."""

    def __init__(self, environment, row: dict):
        super().__init__(None)
        self.environment = environment
        self.known = []  # the messages so far
        self.turns = asyncio.Queue()  # of the model, for the rollout; None: there are no more
        self.replies = asyncio.Queue()  # of the environment, to them
        self.rollout = asyncio.ensure_future(self.play(row))

    async def play(self, row):
        reply = {"messages": [], "ended": True}
        try:
            state = await self.environment.rollout(row, self, "policy", {})
            if state.get("error") is not None:
                raise RuntimeError(f"the environment failed: {state['error']!r}")
            messages = [*state["prompt"], *state["completion"]]
            reply["messages"] = texts_of(messages[len(self.known) :])  # its last words, if any
            return state
        except Exception as error:
            reply["error"] = shown(error)
        finally:
            self.replies.put_nowait(reply)

    async def get_response(self, prompt, **others):
        if said(prompt[: len(self.known)]) != said(self.known):
            raise NotImplementedError("it changes messages that the model has read")
        reply = {"messages": texts_of(prompt[len(self.known) :]), "ended": False}
        self.replies.put_nowait(reply)
        turn = await self.turns.get()
        if turn is None:
            raise vf.OverlongPromptError("a limit of the run ended the episode")
        reason = "length" if turn["was_cut"] else "stop"
        message = ResponseMessage(
            content=turn["content"],
            tool_calls=turn["tool_calls"] or None,
            finish_reason=reason,
            is_truncated=turn["was_cut"],
        )
        self.known = [*prompt, message]
        return Response(id="", created=0, model="policy", message=message)

    async def say(self, turns: list[dict]) -> dict:
        """Gives it the model's next turns; returns what it replies to the last of them."""
        reply = await self.replies.get() if not turns else None
        for turn in turns:
            self.turns.put_nowait(turn)
            reply = await self.replies.get()
            if reply["ended"]:
                break
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply

    async def score(self) -> dict:
        """Ends the rollout; gives the rubric's reward for its final state, and all metrics."""
        self.turns.put_nowait(None)  # where a limit of ours ended it
        state = await self.rollout
        failures.set([])
        await self.environment.rubric.score_rollout(state)
        await self.environment.rubric.cleanup(state)
        if failures.get():  # verifiers makes 0.0 of it
            raise RuntimeError(failures.get()[0])
        return {"reward": state["reward"], "metrics": state["metrics"]}


# only get_response is asked of it, and no API is behind it
Episode.__abstractmethods__ = frozenset()


class Failures(logging.Handler):
    """Keeps what verifiers logs where it makes a 0.0 of a failure."""

    def emit(self, record):
        if failures.get(None) is not None:
            failures.get().append(record.getMessage())


def said(messages):
    return [(message.role, message.content) for message in messages]


def texts_of(messages):
    """Reads messages as [{role, content, tool_call_id}]. NotImplementedError for images, sound."""
    texts = []
    for message in messages:
        content = message.content
        if isinstance(content, list):
            if any(part["type"] != "text" for part in content):
                raise NotImplementedError("its messages have images or sound")
            content = "".join(part["text"] for part in content)
        call = message.get("tool_call_id")
        texts.append({"role": message.role, "content": content, "tool_call_id": call})
    return texts


def shown(error):
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def why_refused(environment) -> str:
    """Says why it cannot be honoured; "" if it can."""
    for part in (environment, *rubrics_in(environment.rubric)):
        for base in type(part).__mro__:
            if base.__name__ in REFUSED:
                return f"{type(part).__name__}: {REFUSED[base.__name__]}"
    if environment.requires_group_rollouts or environment.provides_advantages:
        return "its rubric scores a group at once"
    if environment.message_type != "chat":
        return "its prompts are no chat messages"
    return ""


def rubrics_in(rubric) -> list:
    """Lists the rubric, and those of which it is a group."""
    found = [rubric]
    for part in getattr(rubric, "rubrics", []):
        found += rubrics_in(part)
    return found


def load(source: str, name: str, arguments: dict) -> dict:
    """Loads an environment; returns its tools, and why it is refused, if it is."""
    environment = vf.load_environment(name, **arguments)
    environments[source] = environment
    tools = [tool.model_dump() for tool in environment.tool_defs or []]
    return {"tools": tools, "refused": why_refused(environment)}


def rows(environment, split: str, limit: int | None) -> list[dict]:
    """Reads the first rows of the data set (train) or the evaluation's (test); [] without one."""
    count = limit or -1
    if split == "test":
        has_rows = environment.eval_dataset_source is not None
        return list(environment.get_eval_dataset(count)) if has_rows else []
    has_rows = environment.dataset_source is not None
    return list(environment.get_dataset(count)) if has_rows else []


async def answer(what: str, request: dict):
    """Gives the result of one request."""
    if what == "load":
        return load(**request)
    if what == "rows":
        return rows(environments[request.pop("source")], **request)
    number = request["episode"]
    if what == "begin":
        episodes[number] = Episode(environments[request["source"]], request["row"])
        return await episodes[number].say([])
    if what == "say":
        return await episodes[number].say(request["turns"])
    if what == "score":
        return await episodes[number].score()
    if number in episodes:  # close
        episodes.pop(number).rollout.cancel()
    return None


async def serve(asked, answers) -> None:
    """Answers requests until stdin ends. asked, answers: binary files."""
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(limit=1 << 30)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), asked)
    tasks = set()

    async def reply_to(number, what, request):
        reply = {"number": number}
        try:
            reply["result"] = await answer(what, request)
        except Exception as error:
            reply["error"] = shown(error)
        answers.write(json.dumps(reply, default=str).encode() + b"\n")
        answers.flush()

    while line := await lines.readline():
        task = asyncio.ensure_future(reply_to(*json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what an environment prints is no answer
    sys.path.append(os.getcwd())
    logging.getLogger("verifiers").addHandler(Failures(level=logging.ERROR))
    asyncio.run(serve(sys.stdin.buffer, answers))

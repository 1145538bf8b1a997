"""An environment that a server of OpenEnv plays: --tools=openenv:http://127.0.0.1:8000.

Each trajectory has a session of its own there, a WebSocket. The observation of its reset goes on
with the prompt; its action is the tool `step`, whose schema is the server's; the rewards of all
steps, added up, are the reward `environment`; `done` ends the episode. The reset is given seed, the
number of the row, so that a group plays one problem, and what the row's column `reset` has, {name:
value}, in front of that.
"""

import asyncio
import functools
import json

from run.config import UserError
from run.http import HttpClient, HttpError
from run.loop import run_blocking
from tools.calling.base import Environment, Result, Tool, ToolError
from tools.calling.environment import hooks_of
from tools.calling.http import check_address

PREFIX = "openenv:"  # begins the name of such an environment
LARGEST = 100 << 20  # bytes of a message, as in OpenEnv's own client


def load(url: str, timeout: float) -> tuple[Environment, Tool]:
    """Describes the environment of a server, and its one tool. timeout: seconds that the server has
    to say what its action is. UserError where there is none, or it cannot be honoured."""
    check_address(url)
    schema = run_blocking(_schema_of_action(url, timeout))
    run_blocking(_refuse_one_session(url, timeout))
    make = functools.partial(Session, url)
    environment = Environment("openenv", make, hooks_of(Session))
    function = {"name": "step", "description": schema.pop("description", ""), "parameters": schema}
    tool = Tool(
        name="step",
        schema={"type": "function", "function": function},
        function=Session._step,
        is_async=True,
        make=make,
        environment=environment,
        gives_result=True,
    )
    return environment, tool


async def _schema_of_action(url, timeout):
    """Fetches the JSON schema of the server's action, without what is not the model's to say."""
    http = HttpClient()
    try:
        request = http.request("GET", f"{url.rstrip('/')}/schema")
        schemas = await asyncio.wait_for(request, timeout)
    except (HttpError, TimeoutError) as error:
        raise UserError(f"{PREFIX}{url}: no server of OpenEnv answers there: {error}") from None
    finally:
        await http.close()
    schema = schemas.get("action") if isinstance(schemas, dict) else None
    if not isinstance(schema, dict) or not isinstance(schema.get("properties"), dict):
        raise UserError(f"{PREFIX}{url}: its /schema describes no action with fields")
    if "tool_name" in schema["properties"]:
        raise UserError(
            f"{PREFIX}{url}: its action is a call of an MCP tool, which has no schema here: give "
            f"{url.rstrip('/')}/mcp to --tools=mcp:servers.json, without its reward"
        )
    properties = {name: of for name, of in schema["properties"].items() if name != "metadata"}
    return {**schema, "properties": properties}


async def _refuse_one_session(url, timeout):
    """Refuses a server that plays one episode at a time: a group is played at once."""
    sessions = [Session(url, {"id": 0}) for _ in range(2)]
    try:
        for session in sessions:
            await asyncio.wait_for(session.opening(), timeout)
    except UserError:
        raise
    except Exception as error:
        remedy = "start it with max_concurrent_envs for all that are played at once"
        raise UserError(
            f"{PREFIX}{url}: two episodes cannot be played at a time: {remedy} ({error})"
        ) from None
    finally:
        for session in sessions:
            await session.close()


class Session:
    """One episode on the server."""

    def __init__(self, url: str, example: dict):
        self.address = "ws" + url.removeprefix("http").rstrip("/") + "/ws"
        self.reset = {"seed": example["id"], **(example.get("reset") or {})}
        self.socket = None
        self.total = 0.0  # of the rewards that came
        self.is_lost = False  # whether what state it is in is no longer known

    async def opening(self):
        try:
            from websockets.asyncio.client import connect
        except ModuleNotFoundError as error:
            needed = f"{PREFIX}… needs websockets ({error})"
            raise UserError(f'{needed}: pip install -e ".[openenv]"') from None
        self.socket = await connect(self.address, max_size=LARGEST, proxy=None)
        began = await self._ask("reset", self.reset)
        if began["done"]:
            raise RuntimeError("the episode had ended when it was reset")
        return _text(began["observation"])

    async def _ask(self, kind, data):
        """Sends a message; returns the reply. RuntimeError with its word if the server refuses."""
        await self.socket.send(json.dumps({"type": kind, "data": data}))
        reply = json.loads(await self.socket.recv())
        if reply["type"] == "error":
            raise RuntimeError(reply["data"]["message"])
        return reply["data"]

    async def _step(self, **action):
        if self.is_lost:
            raise ToolError("lost", "error: the environment no longer answers")
        try:
            done = await self._ask("step", action)
        except RuntimeError as error:  # the server's word that it does not take this action
            raise ToolError("refused", f"error: {error}") from None
        except BaseException:  # also at the deadline: the next answer would be that of this step
            self.is_lost = True
            raise
        self.total += float(done["reward"] or 0.0)
        return Result(_text(done["observation"]), ends=bool(done["done"]))

    def reward(self, trajectory):
        return None if self.is_lost else self.total

    async def close(self):
        if self.socket is not None:
            await self.socket.close()


def _text(observation):
    """Writes an observation as the model reads it: its one field if that is text, else JSON."""
    values = list(observation.values())
    if len(values) == 1 and isinstance(values[0], str):
        return values[0]
    return json.dumps(observation, ensure_ascii=False)

"""An environment that a server of OpenEnv plays: --tools=openenv:http://127.0.0.1:8000.

Each trajectory has a session of its own there (openenv-core's GenericEnvClient, a WebSocket). The
observation of its reset goes on with the prompt; its action is the tool `step`, whose schema is the
server's; the rewards of all steps, added up, are the reward `environment`; `done` ends the episode.
The reset is given seed, the number of the row, so that a group plays one problem, and what the
row's column `reset` has, {name: value}, in front of that.
"""

import asyncio
import functools
import json
from concurrent.futures import ThreadPoolExecutor

from run.config import UserError
from run.http import HttpClient, HttpError
from tools.calling.base import Environment, Result, Tool, ToolError
from tools.calling.environment import hooks_of
from tools.calling.http import check_address

PREFIX = "openenv:"  # begins the name of such an environment
INSTALL = "pip install 'openenv-core>=0.3,<0.4'"


def load(url: str, timeout: float) -> tuple[Environment, Tool]:
    """The environment of a server, and its one tool. timeout: seconds that the server has to say
    what its action is. UserError where there is none, or it cannot be honoured."""
    check_address(url)
    client = _client_class()
    with ThreadPoolExecutor(1) as thread:  # a notebook's own has a loop that runs
        schema = thread.submit(asyncio.run, _schema_of_action(url, timeout)).result()
        thread.submit(asyncio.run, _refuse_one_session(client, url, timeout)).result()
    make = functools.partial(Session, client, url.rstrip("/"))
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


def _client_class():
    try:
        from openenv.core.generic_client import GenericEnvClient
    except ModuleNotFoundError as error:
        raise UserError(f"{PREFIX}… needs openenv-core ({error}): {INSTALL}") from None
    return GenericEnvClient


async def _schema_of_action(url, timeout):
    """The JSON schema of the server's action, without what is not the model's to say."""
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


async def _refuse_one_session(client, url, timeout):
    """UserError where the server plays one episode at a time: a group is played at once."""
    sessions = [client(url, mode="simulation", message_timeout_s=timeout) for _ in range(2)]
    try:
        for session in sessions:
            await session.reset(seed=0)
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

    def __init__(self, client, url: str, example: dict):
        self.client = client(url, mode="simulation")
        self.reset = {"seed": example["id"], **(example.get("reset") or {})}
        self.total = 0.0  # of the rewards that came
        self.is_lost = False  # whether what state it is in is no longer known

    async def opening(self):
        began = await self.client.reset(**self.reset)
        if began.done:
            raise RuntimeError("the episode had ended when it was reset")
        return _text(began.observation)

    async def _step(self, **action):
        if self.is_lost:
            raise ToolError("lost", "error: the environment no longer answers")
        try:
            result = await self.client.step(action)
        except RuntimeError as error:  # the server's word that it does not take this action
            raise ToolError("refused", f"error: {error}") from None
        except BaseException:  # also at the deadline: the next answer would be that of this step
            self.is_lost = True
            raise
        self.total += float(result.reward or 0.0)
        return Result(_text(result.observation), ends=bool(result.done))

    def reward(self, trajectory):
        return None if self.is_lost else self.total

    async def close(self):
        await self.client.close()


def _text(observation):
    """An observation as the model reads it: its one field if that is text, else JSON."""
    values = list(observation.values())
    if len(values) == 1 and isinstance(values[0], str):
        return values[0]
    return json.dumps(observation, ensure_ascii=False)

"""Functions that a row, or a client, brings along: shown to the model, called by it, run by nobody.

    example = {"messages": […], "tools": [{"type": "function", "function": {…}}]}

A call that fits its schema ends the rollout with its turn, all of whose calls are recorded; one
that does not is an observation, like one of any other tool. What was called is the answer, which a
reward compares (call_match), or which goes out to the client (serve/agent.py).
"""

import json
from dataclasses import replace
from functools import partial

from engines.chat_api import NAME
from formats.base import too_deep
from run.config import UserError
from tools.calling.base import Tool
from tools.calling.possible import impossible

FORM = '{"type": "function", "function": {"name": …, "parameters": …}}'
NO_PARAMETERS = {"type": "object", "properties": {}}


def with_own(tools: dict[str, Tool], schemas: list[dict], timeout: float) -> dict[str, Tool]:
    """Makes the tools of a trajectory, by their names: of `tools` those whose schemas are there;
    every other schema is of a function of its own. timeout: seconds of a call."""
    chosen = {}
    for schema in schemas:
        name = schema["function"]["name"]
        chosen[name] = tools.get(name) or replace(own_function(schema), timeout=timeout)
    return chosen


def own_function(schema: dict) -> Tool:
    """Makes the tool that stands for a function which nobody here runs."""
    name = schema["function"]["name"]
    return Tool(name, schema, partial(hand_out, name), is_async=True, ends=True)


async def hand_out(name: str, /, **arguments) -> str:
    """Gives the call itself: those of a turn are the answer of the trajectory."""
    return json.dumps({name: arguments}, ensure_ascii=False)


def read_function(tool) -> dict:
    """Reads the schema of a row's function, also without the wrapping, into the one form that
    templates and APIs are shown. UserError if it is none, or no call could fit it."""
    wrapped = tool.get("function") if isinstance(tool, dict) else None
    function = tool if wrapped is None else wrapped
    if not isinstance(function, dict):
        raise UserError(f"{tool!r:.80} is no function: expected {FORM}")
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(
            f"the name of its function is {name!r:.80}: expected 1 to 64 letters, digits, _ and -, "
            "which all APIs take: write _ for anything else"
        )
    description = function.get("description") or ""
    if not isinstance(description, str):
        raise UserError(f"its function {name}: its description is {description!r:.80}, no text")
    parameters = function.get("parameters") or NO_PARAMETERS
    if too_deep(parameters):
        raise UserError(f"its function {name}: its parameters are deeper than 100 levels")
    is_object = isinstance(parameters, dict) and parameters.get("type", "object") == "object"
    if not is_object:
        raise UserError(
            f"its function {name}: its parameters are {parameters!r:.80}: expected a JSON schema "
            'of an object, {"type": "object", "properties": {…}}'
        )
    problem = impossible(parameters)
    if problem:
        raise UserError(f"its function {name}: no call could fit its parameters: {problem}")
    parameters = NO_PARAMETERS | parameters
    described = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": described}

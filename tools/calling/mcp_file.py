"""An mcpServers file: read and checked, before any of its servers is started.

What a file may hold is in the docstring of mcp.py. Every mistake is a UserError of one sentence
that says where it is, and never shows what a variable stands for.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from run.config import UserError, near

KINDS = {"stdio": "stdio", "http": "http", "streamable-http": "http", "sse": "sse"}
KEYS = {  # what a server can have, and what a value has to be, in words
    "command": "a text",
    "args": "a list of texts",
    "env": "texts by name",
    "cwd": "a text",
    "url": "a text",
    "headers": "texts by name",
    "type": "a text",
    "transport": "a text",
    "disabled": "true or false",
    "tools": "a list of texts",
    "session": "a text",
    "start_timeout": "a number above 0",
}
LEAST_START = 10.0  # seconds that a server has to start, where its file does not say


@dataclass
class Server:
    name: str
    where: str  # for messages
    given: dict  # as in the file, for messages: with ${TOKEN}, not with what it stands for
    kind: str  # "stdio" "http" "sse"
    values: dict  # the same with the environment's values
    start_timeout: float  # seconds
    has_warned: bool = False  # of tools that are left out
    newest: bool = False  # it was found to refuse the handshake of the older protocols


def read(path: str, name: str | None, timeout: float) -> list[Server]:
    """Reads the servers of the file, or the one of that name; those that are disabled are left out.
    timeout: seconds of a call, which a server has to start at least. Raises UserError."""
    servers = _servers(path)
    if name is not None:
        if name not in servers:
            hint = near(name, servers) or f" (it has: {', '.join(servers)})"
            raise UserError(f"{path} has no server {name!r}{hint}")
        servers = {name: servers[name]}
    checked = []
    for each, given in servers.items():
        checked.append(_server(each, f"MCP server {each!r} of {path}", given, timeout))
    enabled = [server for server in checked if not server.values.get("disabled")]
    if not enabled:
        raise UserError(f"{path}: every server that is asked for is disabled: remove `disabled`")
    return enabled


def _servers(path):
    """Reads what the file says of each server, by name."""
    try:
        whole = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the MCP servers of {path!r}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): expected an mcpServers file") from None
    expected = 'expected {"mcpServers": {"a_name": {"command": …}}}'
    if not isinstance(whole, dict):
        raise UserError(f"no server in {path}: {expected}")
    for key in whole:
        if key != "mcpServers":
            raise UserError(f"unknown key {key!r} in {path}: {expected}")
    servers = whole.get("mcpServers")
    if not isinstance(servers, dict) or not servers:
        raise UserError(f"no server in {path}: {expected}")
    return servers


def _server(name, where, given, timeout):
    """Checks one server of the file, and makes it."""
    kind = _checked_kind(where, given)
    start_timeout = given.get("start_timeout", max(timeout, LEAST_START))
    if given.get("disabled"):  # its variables need not be there
        return Server(name, where, given, kind, given, start_timeout)
    values = _expanded(given, where)
    if "headers" in values:  # a variable of a file with CRLF ends in a CR
        values["headers"] = {key: text.strip() for key, text in values["headers"].items()}
    if "cwd" in values and not Path(values["cwd"]).is_dir():
        raise UserError(f"{where}: cwd = {given['cwd']!r} is no folder: give one that exists")
    if "url" in values and not values["url"].startswith(("http://", "https://")):
        raise UserError(f"{where}: url = {given['url']!r}: expected http:// or https://")
    return Server(name, where, given, kind, values, start_timeout)


def _checked_kind(where, given):
    """Checks keys and values, and which of them go together. -> "stdio", "http" or "sse" """
    if not isinstance(given, dict):
        raise UserError(f'{where}: expected {{"command": …}} or {{"url": …}}')
    for key, value in given.items():
        if key not in KEYS:
            hint = near(key, KEYS) or f" (keys: {', '.join(KEYS)})"
            raise UserError(f"{where}: unknown key {key!r}{hint}")
        if not _fits(value, KEYS[key]):
            raise UserError(f"{where}: {key} = {json.dumps(value)}: expected {KEYS[key]}")
    if ("command" in given) == ("url" in given):
        raise UserError(f"{where}: expected one of command and url")
    if "command" in given:
        way = "command"
        expected = ["stdio"]
        useless = ["url", "headers"]
    else:
        way = "url"
        expected = ["http", "sse"]
        useless = ["args", "env", "cwd"]
    written = given.get("type", given.get("transport", expected[0]))
    kind = KINDS.get(written)
    if kind not in expected:
        raise UserError(f"{where}: type = {written!r}: expected {' or '.join(expected)}")
    session = given.get("session", "run")
    if session not in ("run", "trajectory"):
        raise UserError(f"{where}: session = {session!r}: expected run or trajectory")
    for key in useless:
        if key in given:
            raise UserError(f"{where}: {key} has no effect beside {way}: drop it")
    return kind


def _fits(value, expected):
    """Says whether a value is what KEYS says."""
    if expected == "a text":
        return isinstance(value, str) and value != ""
    if expected == "a list of texts":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if expected == "texts by name":
        return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
    if expected == "true or false":
        return isinstance(value, bool)
    return type(value) in (int, float) and value > 0  # a number; true is none


def _expanded(value, where):
    """Puts the environment's variables in place of ${NAME} and ${NAME:-default}."""
    if isinstance(value, list):
        return [_expanded(item, where) for item in value]
    if isinstance(value, dict):
        return {key: _expanded(item, where) for key, item in value.items()}
    if not isinstance(value, str):
        return value

    def variable(match):
        text = os.environ.get(match[1], match[2])
        if text is None:
            raise UserError(f"{where}: the environment has no variable {match[1]!r}: set it")
        return text

    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", variable, value)

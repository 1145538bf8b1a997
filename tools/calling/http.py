"""Requests to a server, for tools: what goes wrong becomes an error that the model can read."""

from run.config import UserError
from run.http import HttpClient, HttpError, address_problem
from tools.calling.base import NetworkError, ToolError


class ToolClient:
    """Asks one server for a tool. Its connections are kept until close()."""

    def __init__(self, server: str, url: str):
        """server: what messages call it. UserError if the address is none."""
        check_address(url)
        self.server = server
        self.url = url
        self.http = HttpClient()

    async def fetch(self, method: str, **content) -> dict | list | str | int | float | bool | None:
        """Sends a request; returns the server's answer, from JSON. content: headers, params and
        json of the request. NetworkError if trying again may help, else ToolError."""
        try:
            return await self.http.request(method, self.url, **content)
        except HttpError as error:
            raise tool_error(self.server, error) from None

    async def close(self) -> None:
        await self.http.close()


def check_address(url: str) -> None:
    """Refuses, with UserError, a `url` that is no address of a server."""
    problem = address_problem(url)
    if problem:
        raise UserError(f"{url!r} is no address: {problem}")


def tool_error(server: str, error: HttpError) -> ToolError:
    """Says what a failed request is to the model: a NetworkError if trying again may help."""
    if error.kind == "unreachable":
        return NetworkError(f"error: {server} does not answer ({error.detail})")
    if error.kind == "busy":
        return NetworkError(f"error: {server} is busy ({error.detail})")
    if error.kind == "key_unsendable":
        return ToolError("network", f"error: {server} cannot be asked with the key as it is")
    if error.kind == "key_refused":
        return ToolError("network", f"error: {server} refuses the key ({error.detail})")
    if error.kind == "nonsense":
        return not_understood(server, error.text)
    return ToolError("network", f"error: {server} refuses the request ({error.detail})")


def not_understood(server: str, text: str) -> ToolError:
    return ToolError("network", f"error: the answer of {server} makes no sense: {text[:200]}")


def plain(text: str) -> str:
    """Makes a text sendable: a lone surrogate, which JSON can hold, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()

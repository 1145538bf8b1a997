"""Evaluation of a model behind an OpenAI-compatible chat endpoint, with the same tools, limits and
rewards: so that API models serve as baselines.

    export OPENAI_API_KEY=…
    python evaluate.py --config gsm8k.py --endpoint=http://127.0.0.1:8000/v1 --model=name

Calls are native tool calls. An endpoint gives text and no token ids, so nothing here can be trained
on. Tokens are counted as the endpoint says.
"""

import asyncio
import json
import os
import random

import httpx2 as httpx

from engines.base import Sampling
from formats import Call, too_deep
from run.config import UserError

ATTEMPTS = 6  # for one answer; the waits between them double, from a second on
AGAIN = 408, 409, 429, 500, 502, 503, 504, 529  # worth asking again: busy, or for a moment away


class Endpoint:
    """Asks one model for the next message. It stands where rollouts() takes a chat and an engine:
    there are no token ids, so a prompt has none."""

    version, tokenizer = 0, None

    def __init__(self, url: str, model: str, tools: list[dict], key: str = "", pause: float = 1.0):
        if not url.startswith(("http://", "https://")):
            raise UserError(f"endpoint = {url!r}: expected http(s)://host/v1")
        self.url, self.model, self.tools, self.pause = url.rstrip("/"), model, tools, pause
        self.limit_name = "max_tokens"  # newer endpoints want max_completion_tokens
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = self._loop = None  # connections belong to one event loop

    @property
    def http(self) -> httpx.AsyncClient:
        if self._loop is not asyncio.get_running_loop():
            self._loop = asyncio.get_running_loop()
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
            patience = httpx.Timeout(600.0, connect=10.0)
            headers = self.headers
            self._http = httpx.AsyncClient(headers=headers, timeout=patience, limits=limits)
        return self._http

    def prompt(self, messages: list[dict]) -> list[int]:
        return []

    def join(self) -> None:
        """Nobody waits for anybody."""

    def leave(self) -> None:
        """Nobody waits for anybody."""

    async def close(self) -> None:
        await self.http.aclose()

    async def ask(self, messages: list[dict], sampling: Sampling, tools: bool) -> dict | None:
        """The endpoint's answer to a conversation; None if that is longer than its context.
        UserError if it refuses, or does not answer after several attempts."""
        body = {"model": self.model, "messages": messages, "temperature": sampling.temperature}
        body |= {"seed": sampling.seed % 2**31, self.limit_name: sampling.max_new_tokens}
        if tools and self.tools:
            body["tools"] = self.tools
        why, after = "", 0.0
        for attempt in range(ATTEMPTS):
            if attempt:  # spread out, or all would come back at the same moment
                wait = self.pause * 2 ** (attempt - 1) * (0.5 + random.random())
                await asyncio.sleep(max(wait, after))
            after = 0.0
            try:
                answer = await self.http.post(self.url + "/chat/completions", json=body)
            except httpx.LocalProtocolError:  # its text quotes the key
                raise UserError(f"{self.url}: the key cannot be sent: see --key_env") from None
            except httpx.TransportError as error:
                why = f"{type(error).__name__} {error}".strip()
                continue
            if answer.status_code == 200:
                if (said := _answer(answer)) is not None:
                    return said
                why = f"an answer without a message: {' '.join(answer.text.split())[:300]}"
                continue
            why = f"HTTP {answer.status_code}: {' '.join(answer.text.split())[:300]}"
            if "context length" in answer.text or "context_length" in answer.text:
                return None
            if "max_completion_tokens" in answer.text and self.limit_name in body:
                self.limit_name = "max_completion_tokens"
                body["max_completion_tokens"] = body.pop("max_tokens", sampling.max_new_tokens)
            elif answer.status_code in (401, 403):
                raise UserError(f"{self.url} wants a key ({why}): see --key_env")
            elif answer.status_code not in AGAIN:
                raise UserError(f"{self.url} refuses: {why}")
            given = answer.headers.get("retry-after", "")
            after = min(60.0, float(given)) if given.replace(".", "", 1).isdigit() else 0.0
        raise UserError(f"{self.url} has not answered in {ATTEMPTS} attempts: {why}")


def _answer(answer) -> dict | None:
    """The JSON of an answer with a message in it; None for what an endpoint may send instead."""
    try:
        said = answer.json()
        message = said["choices"][0]["message"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return said if isinstance(message, dict) else None


def key_of(name: str) -> str:
    """The key in the environment variable `name`, "" for none."""
    return os.environ.get(name, "").strip() if name else ""  # of a file with CRLF, a CR stays


def read_call(function: dict) -> Call:
    """A native tool call, its arguments read from JSON."""
    name, text = function["name"], function.get("arguments") or "{}"
    try:
        arguments = json.loads(text) if isinstance(text, str) else text
        if not isinstance(arguments, dict):
            raise ValueError(f"an object is expected, not {str(text)[:40]}")
        if too_deep(arguments):
            raise ValueError("it is too deep")
    except (ValueError, RecursionError) as error:
        message = f"malformed call of {name}: its arguments are not JSON ({error})"
        return Call(name, None, "bad_json", message, str(text))
    return Call(name, arguments, raw=str(text))

"""The one client of OpenAI-compatible chat APIs. Evaluation, the ask tool and the judge use it.

    api = ChatApi("http://127.0.0.1:8000/v1", "name", key)
    reply = await api.ask([{"role": "user", "content": "2 and 2?"}], 0.0, 256)

An API gives text and no token ids, so nothing here can be trained on. Tokens are counted as the API
says. All calls come from one event loop (run/loop.py).
"""

import asyncio
import random
from dataclasses import dataclass

import httpx2 as httpx

from engines.base import Engine, Sampling
from run.config import UserError
from run.http import HttpClient, HttpError, address_problem, bearer, failures_explained, one_line

ATTEMPTS = 6  # for one reply; the waits between them double
WORTH_ASKING_AGAIN = ("unreachable", "busy", "nonsense")
LIMIT = "max_tokens"
NEWER_LIMIT = "max_completion_tokens"  # how newer models of some APIs want it named


@dataclass
class Reply:
    """A message of the model."""

    text: str
    tool_calls: list[dict]  # as the API gave them: they go back to it like that
    was_cut: bool  # at the limit on new tokens
    new_tokens: int  # 0 if the API does not say
    all_tokens: int  # the conversation and this message


class ChatApi:
    """One model behind a chat API."""

    def __init__(
        self, url: str, model: str, key: str = "", attempts: int = ATTEMPTS, pause: float = 1.0
    ):
        """url: http(s)://host/v1, which the caller has checked. pause: seconds before the second
        attempt, which then double."""
        self.url = url.rstrip("/")
        self.model = model
        self.attempts = attempts
        self.pause = pause
        self.limit_name = LIMIT
        self.http = HttpClient(bearer(key))

    def check_reachable(self) -> None:
        """Checks, in ordinary code, that somebody is there and takes the key. Any other answer will
        do: not every API lists its models. HttpError if not."""
        with failures_explained():
            answer = httpx.get(f"{self.url}/models", headers=self.http.headers, timeout=10.0)
        if answer.status_code in (401, 403):
            raise HttpError("key_refused", f"HTTP {answer.status_code}")

    async def ask(
        self,
        messages: list[dict],
        temperature: float,
        max_new_tokens: int,
        seed: int | None = None,
        tools: list[dict] | None = None,
    ) -> Reply:
        """The model's next message. tools: schemas.

        HttpError if the API refuses or has not answered after several attempts; its kind is
        "too_long" if the conversation is longer than the model's context.
        """
        body = {"model": self.model, "messages": messages, "temperature": temperature}
        if seed is not None:
            body["seed"] = seed % 2**31
        if tools:
            body["tools"] = tools
        pause = self.pause
        for _ in range(self.attempts - 1):
            try:
                return await self._ask_once(body, max_new_tokens)
            except HttpError as error:
                if error.kind not in WORTH_ASKING_AGAIN:
                    raise
                # spread out, or all would come back at the same moment
                wait = max(pause * (0.5 + random.random()), error.retry_after)
            await asyncio.sleep(wait)
            pause *= 2
        return await self._ask_once(body, max_new_tokens)

    async def _ask_once(self, body: dict, max_new_tokens: int) -> Reply:
        limit_name = self.limit_name  # a question beside this one may change it
        try:
            return await self._post(body | {limit_name: max_new_tokens})
        except HttpError as error:
            is_about_name = NEWER_LIMIT in error.text and error.kind not in ("nonsense", "too_long")
            if not is_about_name or limit_name == NEWER_LIMIT:
                raise
        self.limit_name = NEWER_LIMIT
        return await self._post(body | {NEWER_LIMIT: max_new_tokens})

    async def _post(self, body: dict) -> Reply:
        try:
            answer = await self.http.request("POST", f"{self.url}/chat/completions", json=body)
        except HttpError as error:
            if error.kind != "nonsense" and _says_too_long(error.text):
                error.kind = "too_long"
            raise
        return _read(answer)

    def refusal(self, error: HttpError, key_option: str) -> UserError:
        """What a failed `ask` is to the user. key_option: where the name of the key is given."""
        if error.kind == "key_unsendable":
            return UserError(f"{self.url}: the key cannot be sent: see {key_option}")
        if error.kind == "key_refused":
            return UserError(f"{self.url} wants a key ({error.detail}): see {key_option}")
        if error.kind in WORTH_ASKING_AGAIN:
            return UserError(
                f"{self.url} has not answered in {self.attempts} attempts: {error.detail}"
            )
        return UserError(f"{self.url} refuses: {error.detail}")

    async def close(self) -> None:
        await self.http.close()


def _says_too_long(text: str) -> bool:
    return "context length" in text or "context_length" in text


def _read(answer) -> Reply:
    """The Reply in an answer's JSON. HttpError, nonsense, if there is no message in it: what some
    APIs send, with status 200, when they are busy."""
    try:
        choice = answer["choices"][0]
        message = choice["message"]
    except (KeyError, IndexError, TypeError):
        message = None
    if not isinstance(message, dict):
        detail = f"an answer without a message: {one_line(str(answer))}"
        raise HttpError("nonsense", detail, str(answer))
    usage = answer.get("usage") or {}
    return Reply(
        text=message.get("content") or "",
        tool_calls=message.get("tool_calls") or [],
        was_cut=choice.get("finish_reason") == "length",
        new_tokens=usage.get("completion_tokens") or 0,
        all_tokens=usage.get("total_tokens") or 0,
    )


class Endpoint(Engine):
    """A chat API to be evaluated: it stands where rollouts() takes a chat and an engine. There are
    no token ids, so a prompt has none."""

    tokenizer = None

    def __init__(self, url: str, model: str, tools: list[dict], key: str = "", pause: float = 1.0):
        """tools: schemas. UserError if the address is none."""
        problem = address_problem(url, "http(s)://host/v1")
        if problem:
            raise UserError(f"endpoint = {url!r}: {problem}")
        self.api = ChatApi(url, model, key, pause=pause)
        self.tools = tools

    def prompt(self, messages: list[dict]) -> list[int]:
        return []

    async def ask(self, messages: list[dict], sampling: Sampling, with_tools: bool) -> Reply | None:
        """The next message; None if the conversation is longer than the model's context. UserError
        if the API refuses, or does not answer after several attempts."""
        try:
            return await self.api.ask(
                messages,
                sampling.temperature,
                sampling.max_new_tokens,
                seed=sampling.seed,
                tools=self.tools if with_tools else None,
            )
        except HttpError as error:
            if error.kind == "too_long":
                return None
            # not `from error`: a key must not be in what is shown of it
            raise self.api.refusal(error, "--key_env") from None

    async def close(self) -> None:
        await self.api.close()

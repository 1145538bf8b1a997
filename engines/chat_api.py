"""The one client of OpenAI-compatible chat APIs. Evaluation, the ask tool and the judge use it.

    api = ChatApi("http://127.0.0.1:8000/v1", "name", key)
    reply = await api.ask([{"role": "user", "content": "2 and 2?"}], 0.0, 256)

An API gives text and no token ids, so nothing here can be trained on. Tokens are counted as the API
says. All calls come from one event loop (run/loop.py).
"""

import asyncio
import hashlib
import json
import random
import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field

import httpx2 as httpx

from engines.base import Engine, Sampling
from formats import too_deep
from formats.base import tools_of_row
from images import Picture, open_image, to_data_uri
from run.config import UserError, tell
from run.http import (
    HttpClient,
    HttpError,
    address_problem,
    bearer,
    failures_explained,
    one_line,
    required_key,
)

ATTEMPTS = 6  # for one reply; the waits between them double
WORTH_ASKING_AGAIN = ("unreachable", "busy", "nonsense")
READ = 20_000  # characters of a refusal that are read
LIMIT = "max_tokens"
NEWER_LIMIT = "max_completion_tokens"  # how newer models of some APIs want it named
# Parameters without which a request still asks the same; some models take none of their values.
DISPENSABLE = ("temperature", "seed")
# Keys of the model's own messages that some APIs need back (DeepSeek its thoughts between calls,
# OpenRouter what signs them), and others refuse.
THOUGHTS = ("reasoning_content", "reasoning", "reasoning_details")
# Not one request but all of them are refused: the key, the credit, the address, the rate.
OF_EVERYTHING = (401, 402, 404, 405, 410, 429)
NOT_KNOWN = re.compile(r"unsupported|not supported|unknown|unrecognized|not permitted", re.I)
FILTERED = re.compile(r"content_filter|content management policy|content policy|moderation", re.I)
# How vLLM, llama.cpp, TGI, SGLang, OpenAI, Anthropic, Gemini, DeepSeek and Mistral say that a
# conversation and the tokens asked for do not fit.
TOO_LONG = re.compile(
    r"""context[ _-]?(length|size|window|limit)
      | (prompt|inputs?|conversation|messages?|sequence)\b[^.]{0,60}\btoo\ (long|large)
      | (request|entity)\b[^.]{0,20}\btoo\ (long|large)
      | \btoo\ many\ (input\ )?tokens | \btoken\ (count|limit) | maximum[^.]{0,40}\btokens
      | tokens?[^.]{0,60}((must|should)\ be\ (<|less|at\ most)|exceed|is\ too\ large|>\ ?\d)
      | less\ than\ \d+\ tokens | range\ of\ max_tokens
      | exceeds?\b[^.]{0,60}\b(tokens|context|length)
      | \btokens,\ too\ large
      | longer\ than[^.]{0,60}\b(context|tokens|model) | reduce\ the\ (length|prompt)
    """,
    re.I | re.X,
)
NAMES_LIMIT = re.compile(r"max_(new_|completion_)?tokens|completion", re.I)
NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+|\d{1,9}")
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # of a function, as APIs take it back


@dataclass
class Reply:
    """A message of the model."""

    text: str
    tool_calls: list[dict]  # each with an id, and a function with name and arguments, all text
    was_cut: bool  # at the limit on new tokens
    new_tokens: int  # 0 if the API does not say
    all_tokens: int  # the conversation and this message
    thoughts: dict = field(default_factory=dict)  # keys of the message that have to go back


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
        self.not_taken: set[str] = set()  # parameters and keys that it refuses: they are not sent
        self.has_replied = False
        self.notes: set[str] = set()  # what was said of it already
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
        """Asks for the model's next message. tools: schemas.

        HttpError if the API refuses or has not answered after several attempts; its kind is
        "too_long" if the conversation is longer than the model's context, "filtered" if the API
        will not answer it. Where max_new_tokens alone is too much, fewer are asked for.
        """
        body = self._body(messages, temperature, seed, tools)
        try:
            return await self._ask_again(body, max_new_tokens)
        except HttpError as error:
            if error.kind != "too_long":
                raise
            refusal = error
        for limit in smaller_limits(refusal.text, max_new_tokens):
            try:
                reply = await self._ask_again(body, limit)
            except HttpError as error:
                if error.kind != "too_long":
                    raise
                continue
            self._note(
                f"has no room for {max_new_tokens} new tokens behind every conversation, and was "
                f"asked for what is left ({refusal.detail})"
            )
            return reply
        self._note(f"says that a conversation is longer than its context ({refusal.detail})")
        refusal.detail += f" (asked for {max_new_tokens} new tokens)"
        raise refusal

    def _body(
        self, messages: list[dict], temperature: float, seed: int | None, tools: list[dict] | None
    ) -> dict:
        """Makes a request, but for its limit."""
        body = {"model": self.model, "messages": messages, "temperature": temperature}
        if seed is not None:
            body["seed"] = seed % 2**31
        if tools:
            body["tools"] = tools
        return body

    async def _ask_again(self, body: dict, max_new_tokens: int) -> Reply:
        """Asks until there is a reply, several times where that may help."""
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
        """Asks, and again without a parameter that the API refuses by name. What it answered only
        without, it is not sent any more."""
        limit_name = self.limit_name
        dropped = set(self.not_taken)
        while True:
            request = _without(body, dropped) | {limit_name: max_new_tokens}
            try:
                reply = await self._post(request)
                break
            except HttpError as error:
                refused = _refused_parameter(error, request)
                if not refused:
                    raise
            if refused == LIMIT:
                limit_name = NEWER_LIMIT
            else:
                dropped.add(refused)
        self.limit_name = limit_name
        for name in sorted(dropped - self.not_taken):
            self._note(f"takes no {name}: it is not sent, and what the API does instead holds")
        self.not_taken |= dropped
        self.has_replied = True
        return reply

    async def _post(self, body: dict) -> Reply:
        try:
            answer = await self.http.request("POST", f"{self.url}/chat/completions", json=body)
        except HttpError as error:
            may_be_long = error.kind in ("refused", "busy") and error.status != 429
            if may_be_long and TOO_LONG.search(error.text[:READ]):
                error.kind = "too_long"
            elif 400 <= error.status < 500 and FILTERED.search(error.text[:READ]):
                error.kind = "filtered"
            raise
        turn = sum(message["role"] == "assistant" for message in body["messages"])
        return _read(answer, turn)

    async def answers_others(
        self,
        error: HttpError,
        temperature: float,
        max_new_tokens: int,
        seed: int | None = None,
        tools: list[dict] | None = None,
    ) -> bool:
        """Says whether an `ask` that failed is the matter of its conversation alone, which is so if
        a plain question, asked once and in the same way, does not fail."""
        if error.kind == "filtered" or (error.kind == "too_long" and self.has_replied):
            return True
        if error.kind == "key_unsendable" or error.status in OF_EVERYTHING:
            return False
        plain_question = [{"role": "user", "content": "Hello!"}]
        try:
            await self._ask_once(
                self._body(plain_question, temperature, seed, tools), max_new_tokens
            )
        except HttpError as other:
            is_refused = other.kind not in WORTH_ASKING_AGAIN
            return error.kind not in WORTH_ASKING_AGAIN and not is_refused
        return True

    def _note(self, text: str) -> None:
        """Tells the user once what was odd about the API."""
        subject = text.partition("(")[0]
        if subject not in self.notes:
            self.notes.add(subject)
            tell(f"{self.url} {text}")

    def refusal(self, error: HttpError, key_option: str) -> UserError:
        """Says what a failed `ask` is to the user. key_option: which option names the key."""
        if error.kind == "key_unsendable":
            return UserError(f"{self.url}: the key cannot be sent: see {key_option}")
        if error.kind == "key_refused":
            return UserError(f"{self.url} wants a key ({error.detail}): see {key_option}")
        if error.kind == "too_long":
            return UserError(
                f"{self.url} has no room for the answer to any question: {error.detail}: give a "
                "smaller max_new_tokens"
            )
        if error.kind in WORTH_ASKING_AGAIN:
            return UserError(
                f"{self.url} has not answered in {self.attempts} attempts: {error.detail}"
            )
        return UserError(f"{self.url} refuses: {error.detail}")

    async def close(self) -> None:
        await self.http.close()


def _without(body: dict, names: set[str]) -> dict:
    """Drops these parameters from the body of a request, and these keys from its messages."""
    kept = {name: value for name, value in body.items() if name not in names}
    if names.intersection(THOUGHTS):
        messages = []
        for message in body["messages"]:
            messages.append({key: value for key, value in message.items() if key not in names})
        kept["messages"] = messages
    return kept


def _refused_parameter(error: HttpError, request: dict) -> str:
    """Finds the parameter, or the key of a message, that a refusal names; "" if it names none that
    a request can do without. LIMIT if the limit wants its newer name."""
    if error.kind not in ("refused", "busy"):
        return ""
    if LIMIT in request:
        is_unknown = re.search(rf"\b{LIMIT}\b", error.text) and NOT_KNOWN.search(error.text)
        if NEWER_LIMIT in error.text or is_unknown:
            return LIMIT
    if error.kind == "busy":
        return ""
    names = [name for name in DISPENSABLE if name in request]
    for message in request["messages"]:
        names += [name for name in THOUGHTS if name in message]
    for name in names:
        if re.search(rf"\b{name}\b", error.text):
            return name
    return ""


def smaller_limits(text: str, wanted: int) -> list[int]:
    """Guesses numbers of new tokens, the largest first, that may fit where `wanted` did not, by the
    numbers in the refusal: the context, the prompt, what an answer may have, and their differences.
    [] if it is the conversation that does not fit."""
    text = re.sub(r'"(code|status)": ?\d+', "", text)
    numbers = {int(number.replace(",", "")) for number in NUMBER.findall(text)[:12]}
    names_limit = NAMES_LIMIT.search(text) is not None
    if len(numbers) < 2 and not names_limit:
        return []
    limits = set(numbers)
    for number in numbers:
        limits.update(number - other for other in numbers)
    fitting = sorted((limit for limit in limits if 0 < limit < wanted), reverse=True)[:8]
    if fitting and names_limit:
        # the context is told, and the prompt is not
        fitting += [fitting[0] // 2, fitting[0] // 4, fitting[0] // 8]
    return [limit for limit in fitting if limit > 0]


# ---- an answer as it comes


def _read(answer, turn: int) -> Reply:
    """Reads the Reply in an answer's JSON. HttpError: nonsense, if there is no message in it, as
    some APIs send with status 200 when they are busy; filtered, if the API gave the message up.
    turn: how many messages of the model there are already."""
    try:
        choice = answer["choices"][0]
        message = choice["message"]
    except (KeyError, IndexError, TypeError):
        message = None
    if not isinstance(message, dict):
        detail = f"an answer without a message: {one_line(str(answer))}"
        raise HttpError("nonsense", detail, str(answer))
    finish = str(choice.get("finish_reason")).lower()
    if finish == "content_filter":
        raise HttpError("filtered", "it ended a message with content_filter", str(answer))
    if finish == "error":
        raise HttpError("nonsense", f"a message that failed: {one_line(str(answer))}", str(answer))
    usage = answer.get("usage")
    return Reply(
        text=_text(message.get("content")),
        tool_calls=_tool_calls(message, turn),
        was_cut=finish in ("length", "max_tokens"),
        new_tokens=_count(usage, "completion_tokens"),
        all_tokens=_count(usage, "total_tokens"),
        thoughts=_thoughts(message),
    )


def _count(usage, name: str) -> int:
    """Reads a number of tokens; 0 where the API says none."""
    count = usage.get(name) if isinstance(usage, dict) else None
    is_number = isinstance(count, int | float) and not isinstance(count, bool)
    return int(count) if is_number and 0 <= count < 2**53 else 0


def _text(content) -> str:
    """Reads the text of a message's content, which may be a list of parts, or what is no text at
    all. Lone surrogates, which JSON can spell, become question marks."""
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        if isinstance(part, dict):
            part = part.get("text")
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, int | float) and not isinstance(part, bool):
            texts.append(str(part))
    return "".join(texts).encode("utf-8", "replace").decode()


def _thoughts(message: dict) -> dict:
    """Picks the keys of a message that have to go back as they came."""
    thoughts = {}
    for key in THOUGHTS:
        value = message.get(key)
        if value and not too_deep(value):  # what is too deep cannot be written again
            thoughts[key] = value
    return thoughts


def _tool_calls(message: dict, turn: int) -> list[dict]:
    """Reads the calls of a message, in the one form that goes back: what is missing in them is "",
    and each has an id of its own."""
    entries = message.get("tool_calls")
    if not entries and isinstance(message.get("function_call"), dict):  # as before tools
        entries = [{"function": message["function_call"]}]
    if not isinstance(entries, list):
        return []
    calls = []
    ids = set()
    for index, entry in enumerate(entries):
        if entry is None:
            continue
        entry = entry if isinstance(entry, dict) and not too_deep(entry) else {}
        function = entry.get("function") or entry.get("custom")
        function = function if isinstance(function, dict) else {}
        name = function.get("name")
        call_id = entry.get("id")
        if not isinstance(call_id, str) or not call_id or call_id in ids:
            call_id = f"call{turn:02}{index:03}"  # nine signs: Mistral takes no other
        ids.add(call_id)
        call = {key: value for key, value in entry.items() if key != "custom"}
        call |= {"id": _text(call_id), "type": "function"}
        call["function"] = {
            "name": _text(name) if isinstance(name, str) else "",
            "arguments": _arguments(function),
        }
        calls.append(call)
    return calls


def _arguments(function: dict) -> str:
    arguments = function.get("arguments", function.get("input"))
    if arguments is None or arguments == "":
        return "{}"
    if isinstance(arguments, str):
        return _text(arguments)
    return json.dumps(arguments)


def sendable_call(tool_call: dict, is_readable: bool) -> dict:
    """Mends a call of the model so that it may go back. APIs, and the templates behind them, refuse
    the whole conversation for arguments that are no JSON object, or an odd name: what was wrong the
    model reads in the result."""
    function = tool_call["function"]
    name = function["name"]
    if not NAME.fullmatch(name):
        name = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:64] or "unnamed"
    arguments = function["arguments"] if is_readable else "{}"
    return tool_call | {"function": {"name": name, "arguments": arguments}}


def with_images(messages: list[dict], pictures: Sequence[Picture]) -> list[dict]:
    """Writes messages as APIs take images: as data URIs, in the place of `{"type": "image"}`."""
    waiting = iter(pictures)
    written = []
    for message in messages:
        if isinstance(message.get("content"), list):
            parts = []
            for part in message["content"]:
                if part["type"] == "image":
                    url = to_data_uri(next(waiting).shown)
                    part = {"type": "image_url", "image_url": {"url": url}}
                parts.append(part)
            message = message | {"content": parts}
        written.append(message)
    return written


def api_of_options(owner: str, url: str, model: str, key_env: str, **attempts) -> ChatApi:
    """Makes the API of the options url, model and key_env, which the judge and the ask tool have.
    owner: which of them, for messages. UserError if the address is none or the key is missing."""
    problem = address_problem(url, "http(s)://host/v1")
    if problem:
        raise UserError(f"{owner}.url = {url!r}: {problem}")
    key = required_key(url, key_env, owner)
    return ChatApi(url, model, key, **attempts)


class Endpoint(Engine):
    """A chat API to be evaluated: it stands where rollouts() takes a chat and an engine. There are
    no token ids, so a prompt has none. It is sent images whole: what it makes of them is its own
    matter."""

    tokenizer = None
    vision = None  # nothing here makes pixels of images
    sees = True

    def __init__(self, url: str, model: str, tools: list[dict], key: str = "", pause: float = 1.0):
        """tools: schemas. UserError if the address is none."""
        problem = address_problem(url, "http(s)://host/v1")
        if problem:
            raise UserError(f"endpoint = {url!r}: {problem}")
        self.api = ChatApi(url, model, key, pause=pause)
        self.tools = tools
        self.refused: list[str] = []  # why, for each conversation that the API refused alone

    def prompt(self, messages: list[dict], pictures: list = ()) -> list[int]:
        return []

    def for_row(self, example: dict) -> "Endpoint":
        """Gives the same API, told of the tools that a row names or brings along; this one where it
        says nothing of tools."""
        if example.get("tools") is None:
            return self
        other = copy(self)
        other.tools = tools_of_row(example["tools"], self.tools)
        return other

    def reply(self, content, ids: list[int], prompt: list[dict], pictures: list) -> list[int]:
        return []

    def pictures(self, example: dict) -> list[Picture]:
        """Opens the images of a data row's messages."""
        folder = example.get("image_folder")
        return [self.picture(source, folder) for source in example.get("images") or ()]

    def picture(self, source, folder: str | None = None) -> Picture:
        """Opens an image of a row, or takes one of PIL that a tool returned."""
        image = open_image(source, folder)
        digest = hashlib.blake2b(repr(image.size).encode(), digest_size=8)
        digest.update(image.tobytes())
        return Picture(image, key=int.from_bytes(digest.digest(), "big"))

    async def ask(
        self,
        messages: list[dict],
        sampling: Sampling,
        with_tools: bool,
        pictures: Sequence[Picture] = (),
    ) -> Reply | str:
        """Asks for the next message, or why there is none: "length" if the conversation is longer
        than the model's context, "error" if the API refuses this conversation and answers others.
        UserError if it refuses all, or does not answer after several attempts. pictures: of the
        images in messages, in order."""
        if pictures:
            messages = await asyncio.to_thread(with_images, messages, pictures)
        question = {
            "temperature": sampling.temperature,
            "max_new_tokens": sampling.max_new_tokens,
            "seed": sampling.seed,
            "tools": self.tools if with_tools else None,
        }
        try:
            return await self.api.ask(messages, **question)
        except HttpError as error:
            if not await self.api.answers_others(error, **question):
                # not `from error`: a key must not be in what is shown of it
                raise self.api.refusal(error, "--key_env") from None
            if error.kind == "too_long":
                return "length"
            self.refused.append(error.detail)
        return "error"

    def report(self) -> dict:
        """Lists what the numbers of an evaluation have to say of the API."""
        lines = {}
        if self.refused:
            lines["refused"] = len(self.refused)
            lines["refused_first"] = self.refused[0]
        if self.api.not_taken:
            lines["not_sent"] = ", ".join(sorted(self.api.not_taken))
        return lines

    async def close(self) -> None:
        await self.api.close()

"""The agent of a run behind an OpenAI-compatible API: its model with its tools, for many at once.

    python -m serve.agent --run=out/calc
    NANOTOOL_TOKEN=secret python -m serve.agent --run=out/calc --port=8080 --temperature=0.7
    python -m serve.agent --model=Qwen/Qwen2.5-0.5B-Instruct --config gsm8k.py --engine=vllm

    POST /v1/chat/completions  plays a rollout of the conversation, tools and all; stream too
    GET  /v1/models            the one model, by the name of its run
    GET  /v1/traces/ID         the rollout of that answer, token by token, as a page or as JSON
         /mcp                  the same tools, for any MCP client
    GET  /health, /metrics     what was done so far; the same for Prometheus

The keys that shape a rollout (max_tokens, max_turns, tools, engine, …) are those of the run, of
--config and of the command line, as evaluate.py takes them. The tools of the run are called here;
`tools` of a request are the client's: calls of them go out as tool_calls, and the conversation goes
on with the client's next request. docs/agent.md says what of a request is honoured.

What is covered: only this machine is served, and no web page of another origin (DNS rebinding,
Origin), unless --host and a token say otherwise; requests that do not come to their end, are too
large, ask for too much, take longer than --timeout, or are more than can wait (429: come again). A
client that goes away ends its rollout, whose tools are closed. What is not: TLS (put a proxy in
front), users of different rights: who has the token runs the tools, and reads all traces.
"""

import asyncio
import contextlib
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from run import config
from run.config import UserError

if __name__ == "__main__":
    # the keys of train_grpo.py that shape a rollout can be given here too
    config.answer_help(__file__, "train_grpo.py", keys=config.ROLLOUT_KEYS)

import data
import evaluate
from chat import Chat, flat_text
from engines.base import Engine
from images import Picture
from player import Player
from rollout import Settings, play, play_turn
from run.http import key_from
from tools import Toolbox
from trajectory import Trajectory

try:
    from starlette.requests import Request as HttpRequest
    from starlette.responses import RedirectResponse

    from serve import mcp_server, web
    from serve.web import Refused
except ImportError as error:
    raise UserError(f'serve.agent needs a package ({error}): pip install -e ".[mcp]"') from None

from serve import chat_replies as replies
from serve.chat_requests import Request, read_request
from serve.traces import Traces

MOST_BYTES = 4 * 2**20  # of a request
MOST_BYTES_WITH_IMAGES = 24 * 2**20  # to a model that sees
MOST_SAMPLES = 128  # n of a request
MOST_CHARACTERS = 64  # of a token, on average: few are so long
ENGINE_OPTIONS = ("deterministic=false", "patience=0.05")  # of transformers, unless told otherwise
CHATS = 64  # sets of clients' tools whose prompts are known
ALIVE = 10.0  # seconds of silence after which a stream says that it is there


@dataclass
class Config:
    run: str = ""  # the out_dir of a training run: its model and its config
    name: str = ""  # of the model, as clients ask for it; "" = the name of its folder
    temperature: float = 0.0  # where a request does not say; 0 = greedy
    host: str = "127.0.0.1"  # 0.0.0.0 = for other machines too: needs a token
    port: int = 8000  # 0 = any free one; it is printed
    token_env: str = "NANOTOOL_TOKEN"  # the environment variable that holds the bearer token
    timeout: float = 600.0  # seconds that a request may take, the wait for its turn included
    most_waiting: int = 1024  # requests that may be here at once; the others get 429: come again
    traces: int = 256  # answers whose rollouts are kept, in memory


def check(cfg: Config) -> None:
    """Checks the rules across keys."""
    config.require_positive(cfg, "timeout most_waiting traces")
    if not 0 <= cfg.temperature <= 2:
        raise UserError(f"temperature = {cfg.temperature}: expected a number from 0 to 2")
    if not 0 <= cfg.port < 65536:
        raise UserError(f"port = {cfg.port}: expected 0 to 65535")
    web.require_token(cfg.host, cfg.token_env)


def load_player(cfg: Config, argv: list[str]) -> Player:
    """Makes what plays: the config and the model of evaluate.py. argv: the keys of train_grpo.py.
    UserError."""
    given = evaluate.Config(run=cfg.run, temperature=cfg.temperature)
    rollout_cfg = evaluate.load_config(argv, given)
    options = rollout_cfg.engine_options
    is_said = any(option.startswith("deterministic=") for option in options)
    if "deterministic=true" in options:
        raise UserError(
            "engine_options: with deterministic=true all clients wait for the slowest: give false"
        )
    if rollout_cfg.engine == "transformers" and not is_said:
        # else a slow tool of one client holds up all the others
        options = (*options, *ENGINE_OPTIONS)
        rollout_cfg = replace(rollout_cfg, engine_options=options)
    player = Player.for_questions(rollout_cfg)
    check_tools(player.toolbox)
    return player


def check_tools(box: Toolbox) -> None:
    """Refuses an environment that speaks in the place of the client."""
    for environment in box.environments:
        if "user" in environment.hooks:
            raise UserError(
                f"{environment.name} has a user of its own, who would speak in the place of the "
                "client: serve a run whose tools have none"
            )


# -- playing


@dataclass
class Metrics:
    """What a server did so far; /health and /metrics tell it."""

    requests: int = 0  # that were answered with a completion
    completions: int = 0  # of them: n each
    prompt_tokens: int = 0
    completion_tokens: int = 0  # sampled, in all turns
    tool_calls: int = 0  # of the agent's own tools
    tool_errors: int = 0  # of these
    seconds: float = 0.0  # that answered requests took, together
    refused: int = 0  # requests with a status of 4xx
    busy: int = 0  # with 429: too many were here
    failed: int = 0  # with 5xx
    gone: int = 0  # whose client went away
    waiting: int = 0  # requests, at this moment
    playing: int = 0  # rollouts, at this moment


COUNTERS = """
    requests completions prompt_tokens completion_tokens tool_calls tool_errors seconds refused busy
    failed gone
""".split()


class Expected:
    """A request that is being read: a batch that is about to start waits a moment for its first
    turn."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.is_here = False
        engine.join()

    def end(self) -> None:
        if not self.is_here:
            self.is_here = True
            self.engine.leave()


@dataclass
class Asked:
    """A request that is ready to be played."""

    id: str
    created: int  # seconds since 1970
    request: Request
    example: dict
    chat: Chat  # with the client's tools
    settings: Settings
    pictures: list[Picture]
    prompt: list[int]  # ids
    expected: Expected

    @property
    def own_tools(self) -> list[str]:
        """The names of the client's tools."""
        return [tool["function"]["name"] for tool in self.request.tools]

    def reply(self, trajectory: Trajectory) -> replies.Reply:
        name = self.call_name(trajectory.sample)
        return replies.reply_of(trajectory, self.chat, self.own_tools, self.request.stop, name)

    def call_name(self, sample: int) -> str:
        """Says what the ids of a sample's calls begin with."""
        return f"call_{self.id[-12:]}_{sample}"


class Agent:
    """Answers requests by a Player that is entered. All of it runs on the one event loop."""

    def __init__(self, player: Player, cfg: Config, name: str):
        self.player = player
        self.cfg = cfg
        self.name = name
        self.started = int(time.time())
        self.metrics = Metrics()
        self.traces = Traces(cfg.traces)
        self._slots = asyncio.Semaphore(player.settings.max_concurrent)
        self._chats: OrderedDict[str, Chat] = OrderedDict()  # by the client's tools, as JSON

    @property
    def most_bytes(self) -> int:
        return MOST_BYTES_WITH_IMAGES if self.player.chat.sees else MOST_BYTES

    async def prepare(self, request: Request, expected: Expected) -> Asked:
        """Makes all that is needed to play a request. Raises Refused."""
        # 1. is it for this model?
        if request.model != self.name:
            why = f"there is no model {request.model[:80]!r}: this server has {self.name!r}"
            raise Refused(404, why, "model", "model_not_found")
        if request.images and not self.player.chat.sees:
            raise Refused(400, "messages: this model sees no images", "messages")

        # 2. the prompt, with the tools of both
        settings = self._settings(request)
        self._check_length(request, settings)
        try:
            chat = await self._chat_with(request.tools if request.may_call else [])
            example = self.player.question(request.messages, request.images)
            if not chat.tools:  # then its template is not proved for calls
                data.check_calls(example["messages"], [], remedy="give them as tools")
            pictures = []
            if request.images:
                pictures = await asyncio.to_thread(chat.pictures, example)
                example.pop("images")  # as they came: megabytes that nobody needs any more
            prompt = chat.prompt(example["messages"], pictures)
        except UserError as error:
            raise Refused(400, str(error), "messages") from None

        if len(prompt) >= settings.max_tokens:
            raise too_long(f"{len(prompt)} tokens", settings)

        # 3. what plays it
        if request.tools and request.may_call:
            example["tools"] = [*self.player.toolbox.tools, *request.tools]
        return Asked(
            id=f"chatcmpl-{secrets.token_hex(12)}",
            created=int(time.time()),
            request=request,
            example=example,
            chat=chat,
            settings=settings,
            pictures=pictures,
            prompt=prompt,
            expected=expected,
        )

    def _check_length(self, request: Request, settings: Settings) -> None:
        """Refuses what is too long by far: a megabyte takes a second to encode, in which nobody
        is answered."""
        length = 0
        for message in request.messages:
            length += len(flat_text(message["content"])) + len(str(message.get("tool_calls", "")))
        if length > MOST_CHARACTERS * settings.max_tokens:
            raise too_long(f"{length} characters", settings)

    def _settings(self, request: Request) -> Settings:
        temperature = request.temperature
        if temperature is None:
            temperature = self.cfg.temperature
        is_vllm = self.player.cfg is not None and self.player.cfg.engine != "transformers"
        if is_vllm and 0 < temperature < 0.01:
            why = f"temperature = {temperature}: vLLM has 0, or 0.01 and more"
            raise Refused(400, why, "temperature")
        seed = secrets.randbits(62) if request.seed is None else request.seed
        return replace(self.player.settings, temperature=temperature, seed=seed)

    async def _chat_with(self, tools: list[dict]) -> Chat:
        """Gives the chat with the client's tools behind the agent's own. UserError, Refused."""
        if not tools:
            return self.player.chat
        for tool in tools:
            name = tool["function"]["name"]
            if name in self.player.toolbox.tools:
                why = f"tools: the agent has a tool {name!r} of its own: rename yours"
                raise Refused(400, why, "tools")
        key = json.dumps(tools)
        if key not in self._chats:
            schemas = self.player.toolbox.schemas + tools
            # its proof takes tens of milliseconds
            made = await asyncio.to_thread(self.player.chat.with_tools, schemas)
            self._chats[key] = made
            while len(self._chats) > CHATS:
                self._chats.popitem(last=False)
        return self._chats[key]

    async def play(self, asked: Asked, on_turn: Callable) -> list[Trajectory]:
        """Plays the samples of a request. on_turn(trajectory) is called behind each turn that is
        not the last one. Raises Refused where one could not be played."""
        start = time.perf_counter()
        samples = range(asked.request.n)
        try:
            async with asyncio.TaskGroup() as tasks:
                playing = [
                    tasks.create_task(self._play_sample(asked, sample, on_turn))
                    for sample in samples
                ]
        except ExceptionGroup as group:
            first = group.exceptions[0]
            raise first from first.__cause__
        played = [task.result() for task in playing]
        self.traces.keep(asked.id, played, asked.chat.tokenizer)
        self._count(asked, played, time.perf_counter() - start)
        return played

    async def _play_sample(self, asked: Asked, sample: int, on_turn: Callable) -> Trajectory:
        limit = asked.request.max_new_tokens

        async def turn(trajectory, chat, engine, session, toolbox, settings, step) -> None:
            if limit is not None:
                left = limit - trajectory.new_tokens
                if left <= 0:
                    trajectory.stop = "length"
                    return
                settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, left))
            asked.expected.end()
            await play_turn(trajectory, chat, engine, session, toolbox, settings, step)
            if not trajectory.stop:
                on_turn(trajectory)

        trajectory = Trajectory(asked.example, 0, sample)
        engine = self.player.engine
        if self._slots.locked():
            asked.expected.end()  # no batch is to wait for who waits here
        async with self._slots:
            engine.join()
            self.metrics.playing += 1
            try:
                await play(
                    trajectory,
                    asked.prompt,
                    asked.chat,
                    engine,
                    self.player.toolbox,
                    asked.settings,
                    turn=turn,
                    pictures=asked.pictures,
                )
            finally:
                self.metrics.playing -= 1
                engine.leave()
        if trajectory.stop == "error":
            why = trajectory.failure or trajectory.calls[-1].result
            raise Refused(500, f"the agent's tools failed: {why}"[:500])
        return trajectory

    def _count(self, asked: Asked, played: list[Trajectory], seconds: float) -> None:
        metrics = self.metrics
        metrics.requests += 1
        metrics.completions += len(played)
        metrics.prompt_tokens += len(asked.prompt)
        metrics.seconds += seconds
        for trajectory in played:
            calls = [call for call in trajectory.calls if call.name not in asked.own_tools]
            metrics.completion_tokens += trajectory.new_tokens
            metrics.tool_calls += len(calls)
            metrics.tool_errors += sum(call.error is not None for call in calls)


def too_long(length: str, settings: Settings) -> Refused:
    why = f"the conversation has {length}, and with its answer may have {settings.max_tokens}"
    return Refused(400, f"messages: {why} tokens", "messages", "context_length_exceeded")


# -- HTTP

COMPLETIONS = "/v1/chat/completions"
MODELS = "/v1/models"
TRACES = "/v1/traces/"
METHODS = {COMPLETIONS: "POST", MODELS: "GET", "/health": "GET", "/metrics": "GET"}
# The page has its script and its style in it, and asks nobody for anything.
PAGE_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        b"script-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_of(refused: Refused) -> dict:
    """Writes an error as OpenAI's API does."""
    kind = KINDS.get(refused.status, "invalid_request_error")
    if refused.status >= 500:
        kind = "server_error"
    error = {"message": refused.why, "type": kind, "param": refused.param, "code": refused.code}
    return {"error": error}


def application(cfg: Config, player: Player, name: str):
    """Makes the ASGI application of an entered Player, whose event loop it shares."""
    server = Server(cfg, Agent(player, cfg, name))

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            await server.live(receive, send)
        elif scope["type"] == "http":  # a web socket: uvicorn refuses it
            await server.respond(scope, receive, send)

    return app


class Server:
    """Speaks HTTP for an Agent."""

    def __init__(self, cfg: Config, agent: Agent):
        self.cfg = cfg
        self.agent = agent
        self.metrics = agent.metrics
        self.token = key_from(cfg.token_env)
        self.mcp = None
        box = agent.player.toolbox
        if box.tools and not any(environment.hooks for environment in box.environments):
            self.mcp = mcp_server.at_mcp(box, cfg.host, mcp_server.Health())

    async def live(self, receive, send) -> None:
        async with contextlib.AsyncExitStack() as stack:
            if self.mcp:
                lifespan = self.mcp.router.lifespan_context(self.mcp)
                await stack.enter_async_context(lifespan)
            await web.live(receive, send)

    async def respond(self, scope, receive, send) -> None:
        """Answers a request, whatever it is."""
        has_begun = False  # to answer

        async def send_on(message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._answer(scope, receive, send_on)
            return
        except Refused as error:
            refused = error
        except UserError as error:  # of the engine, or of a tool
            refused = Refused(500, str(error))
        except asyncio.CancelledError:  # the server ends, and waited for its requests for a while
            refused = Refused(503, "the server ends: ask again when it is back")
        except Exception as error:  # whatever it is: who asked is told, and the server goes on
            refused = Refused(500, f"{type(error).__name__}: {error}"[:300])
        self._count(refused)
        if has_begun:
            is_stream = scope["path"] == COMPLETIONS  # one of MCP has events of another kind
            event = sse(error_of(refused)) + DONE if is_stream else b""
            await send({"type": "http.response.body", "body": event})
            return
        headers = []
        if refused.status in (429, 503):
            headers = [(b"retry-after", b"1")]
        elif refused.status == 401:
            headers = [(b"www-authenticate", b"Bearer")]
        await web.answer(send, refused.status, error_of(refused), headers)

    def _count(self, refused: Refused) -> None:
        if refused.status == 429:
            self.metrics.busy += 1
        elif refused.status >= 500:
            self.metrics.failed += 1
        else:
            self.metrics.refused += 1

    async def _answer(self, scope, receive, send) -> None:
        # 1. is it for us?
        headers = scope["headers"]
        path = scope["path"]
        if not web.has_token(headers, self.token) and not self._is_known_browser(scope):
            why = "a bearer token is missing or wrong"
            if path.startswith(TRACES):
                why += "; a browser that has no cookie of it yet opens this with ?token=… once"
            raise Refused(401, why, code="invalid_api_key")
        if web.is_loopback(self.cfg.host) and not web.names_loopback(headers):
            raise Refused(421, "this server is for this machine: ask for http://127.0.0.1")
        if web.is_of_other_origin(headers):
            raise Refused(403, "requests of web pages from elsewhere are not answered")
        if path == "/mcp" and self.mcp:
            await self.mcp(scope, receive, send)
            return
        is_of_one = path.startswith((TRACES, f"{MODELS}/"))
        if path not in METHODS and not is_of_one:
            paths = f"{', '.join(METHODS)}, {TRACES}ID{', /mcp' if self.mcp else ''}"
            raise Refused(404, f"there is no {path[:80]}; there are {paths}")
        method = METHODS.get(path, "GET")
        if scope["method"] != method and (scope["method"], method) != ("HEAD", "GET"):
            why = f"{path[:80]} is asked by {method}, not {scope['method'][:20]}"
            raise Refused(405, why)

        # 2. answer it
        if path == COMPLETIONS:
            await self._complete(scope, receive, send)
        elif path == "/health":
            await self._tell_health(send)
        elif path == "/metrics":
            text = web.prometheus("nanotool_agent", self.metrics, COUNTERS)
            await web.answer(send, 200, text)
        elif path == MODELS:
            await web.answer(send, 200, {"object": "list", "data": [self._model()]})
        elif path.startswith(TRACES):
            await self._trace(scope, receive, send)
        elif path == f"{MODELS}/{self.agent.name}":
            await web.answer(send, 200, self._model())
        else:
            wanted = path.removeprefix(f"{MODELS}/")[:80]
            why = f"there is no model {wanted!r}: this server has {self.agent.name!r}"
            raise Refused(404, why, "model", "model_not_found")

    async def _tell_health(self, send) -> None:
        """Answers whether it can answer, for whoever would start it again."""
        if self.agent.player.engine.has_died:
            why = "the engine has died: start the server again"
            await web.answer(send, 503, {"status": why, **vars(self.metrics)})
            return
        await web.answer(send, 200, {"status": "healthy", **vars(self.metrics)})

    def _is_known_browser(self, scope) -> bool:
        """Says whether a browser, which sends no Authorization, may see a trace."""
        if scope["method"] not in ("GET", "HEAD") or not scope["path"].startswith(TRACES):
            return False
        cookie = web.cookie_name(scope, "agent")
        return web.has_token_of_browser(HttpRequest(scope), cookie, self.token, in_link=True)

    def _model(self) -> dict:
        return {
            "id": self.agent.name,
            "object": "model",
            "created": self.agent.started,
            "owned_by": "nanotool",
        }

    async def _trace(self, scope, receive, send) -> None:
        """Answers with the rollouts of an answer: JSON for who accepts it, else a page. A link with
        the token leads to one without, which need not be kept secret; a cookie has it then."""
        path = scope["path"]
        if self.token and "token" in HttpRequest(scope).query_params:
            response = RedirectResponse(quote(path), 303, {"cache-control": "no-store"})
            web.set_token(response, web.cookie_name(scope, "agent"), self.token, path=TRACES)
            await response(scope, receive, send)
            return
        id = path.removeprefix(TRACES)
        accept = dict(scope["headers"]).get(b"accept", b"")
        traces = self.agent.traces
        try:
            if b"application/json" in accept and b"text/html" not in accept:
                rows = await asyncio.to_thread(traces.rows, id)
                await web.answer(send, 200, {"id": id, "rollouts": rows})
            else:
                page = await asyncio.to_thread(traces.page, id)
                await web.answer(send, 200, page, PAGE_HEADERS, b"text/html; charset=utf-8")
        except KeyError:
            why = f"there is no trace {id[:80]!r}: the newest {traces.most} are kept"
            raise Refused(404, why) from None

    # -- completions

    async def _complete(self, scope, receive, send) -> None:
        """Answers a completion, or ends it when its client goes away."""
        kind = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise Refused(415, "expected Content-Type: application/json")
        if self.metrics.waiting >= self.cfg.most_waiting:
            raise Refused(429, f"{self.cfg.most_waiting} requests are here already: come again")
        self.metrics.waiting += 1
        expected = Expected(self.agent.player.engine)
        try:
            body = await web.read_body(scope, receive, self.agent.most_bytes)
            asked = await self.agent.prepare(read_request(body, MOST_SAMPLES), expected)
            working = asyncio.create_task(self._work(asked, send))
            leaving = asyncio.create_task(disconnected(receive))
            try:
                await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
            finally:  # also where the server ends
                leaving.cancel()
                if not working.done():
                    self.metrics.gone += 1
                    working.cancel()
                    await asyncio.wait((working,))
            if not working.cancelled():
                working.result()
        finally:
            expected.end()
            self.metrics.waiting -= 1

    async def _work(self, asked: Asked, send) -> None:
        try:
            async with asyncio.timeout(self.cfg.timeout) as deadline:
                if asked.request.is_streamed:
                    await self._stream(asked, send)
                else:
                    await self._answer_whole(asked, send)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise Refused(504, f"it took longer than {self.cfg.timeout:g} s") from None

    async def _answer_whole(self, asked: Asked, send) -> None:
        played = await self.agent.play(asked, on_turn=lambda trajectory: None)
        choices = []
        for trajectory in played:
            choices.append(replies.choice_of(asked.reply(trajectory), trajectory.sample))
        answer = {
            "id": asked.id,
            "object": "chat.completion",
            "created": asked.created,
            "model": self.agent.name,
            "choices": choices,
            "usage": replies.usage_of(len(asked.prompt), played),
        }
        await web.answer(send, 200, answer)

    async def _stream(self, asked: Asked, send) -> None:
        """Answers as server-sent events: what a turn says comes when the turn has ended."""
        # 1. the head, and that there is an assistant
        events = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": events})
        stream = Stream(asked, self.agent.name)
        for sample in range(asked.request.n):
            stream.delta(sample, {"role": "assistant", "content": ""})

        # 2. the turns, while they are played
        playing = asyncio.create_task(self.agent.play(asked, stream.on_turn))
        playing.add_done_callback(lambda done: stream.events.put_nowait(b""))
        try:
            while True:
                event = await stream.next()
                if not event:
                    break
                await send_part(send, event)
        finally:  # also when the client goes away, or it takes too long
            if not playing.done():
                playing.cancel()
                await asyncio.wait((playing,))
        played = playing.result()

        # 3. the replies, and the end
        for trajectory in played:
            stream.reply(trajectory)
        if asked.request.with_usage:
            stream.event([], usage=replies.usage_of(len(asked.prompt), played))
        while not stream.events.empty():
            await send_part(send, stream.events.get_nowait())
        await send({"type": "http.response.body", "body": DONE})


DONE = b"data: [DONE]\n\n"


def sse(value: dict) -> bytes:
    """Writes a server-sent event."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


async def send_part(send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def disconnected(receive) -> None:
    """Returns when the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Stream:
    """The events of one streamed answer, in order."""

    def __init__(self, asked: Asked, model: str):
        self.asked = asked
        self.model = model
        self.events: asyncio.Queue[bytes] = asyncio.Queue()  # b"" is the end of playing
        self.told = [0] * asked.request.n  # earlier turns that are out, of each sample

    async def next(self) -> bytes:
        """Waits for the next event; says that it is there if that takes long."""
        try:
            return await asyncio.wait_for(self.events.get(), ALIVE)
        except TimeoutError:
            return b": playing\n\n"

    def event(self, choices: list[dict], **more) -> None:
        chunk = {
            "id": self.asked.id,
            "object": "chat.completion.chunk",
            "created": self.asked.created,
            "model": self.model,
            "choices": choices,
        }
        if self.asked.request.with_usage:
            chunk["usage"] = None
        self.events.put_nowait(sse(chunk | more))

    def delta(self, sample: int, delta: dict, finish: str | None = None, **more) -> None:
        choice = {"index": sample, "delta": delta, "logprobs": None, "finish_reason": finish}
        self.event([choice | more])

    def on_turn(self, trajectory: Trajectory) -> None:
        """Tells the turns that are over, calls and results."""
        sample = trajectory.sample
        turns = replies.openai_form(trajectory, self.asked.call_name(sample))
        if turns[self.told[sample] :]:
            self.delta(sample, replies.delta_of_turns(turns, self.told[sample]))
            self.told[sample] = len(turns)

    def reply(self, trajectory: Trajectory) -> None:
        """Tells all that is not told yet, and how it ended."""
        sample = trajectory.sample
        reply = self.asked.reply(trajectory)
        for delta in replies.deltas_of(reply, self.told[sample]):
            self.delta(sample, delta)
        self.delta(sample, {}, reply.finish, agent_stop=reply.stop)


def main(argv: list[str]) -> None:
    mine, others = config.split(argv, Config.__dataclass_fields__)
    cfg = config.parse(Config, mine, check)
    listening = web.listen(cfg.host, cfg.port)  # before the model is loaded: it may be taken
    player = load_player(cfg, others)
    name = cfg.name or Path(player.cfg.model).name
    with player:
        where = f"{web.address(listening)}/v1"
        tools = ", ".join(player.toolbox.tools) or "none"
        print(f"serving {name} at {where}, its tools: {tools}", flush=True)
        web.serve_on_loop(application(cfg, player, name), listening)


if __name__ == "__main__":
    config.main(main)

"""vLLM servers, one or several, over HTTP: token ids in and out. On other GPUs or machines than the
trainer's, and for evaluation.

    export VLLM_ALLOW_RUNTIME_LORA_UPDATING=1
    vllm serve out/calc_sft --port 8000 --enable-lora --max-lora-rank 32 --max-loras 2 \
        --logprobs-mode processed_logprobs --generation-config vllm
    python train_grpo.py --config calc_lora.py --engine=server --urls=http://127.0.0.1:8000

Trained are adapters: each version is written to a folder that the servers can read as well, loaded
by all of them under a new name, and the one before it is dropped.

A turn whose server dies is sampled again by another, from the same ids and with the same seed: what
a trajectory has is whole turns only, so nothing is lost or counted twice. A server that comes back
is given the adapter in use before it is asked again.
"""

import asyncio
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx2 as httpx

from engines.base import Completion, Sampling, ended
from learning import model as models
from run.config import UserError

EVERY = 1.0  # seconds between looks at each server's health
PATIENCE = 20.0  # seconds in which a server has to say that it is well, however busy it is
# All of these are off. What is not sent, a server may take from the model's generation_config.json,
# and it would sample from another distribution than the trainer's.
OFF = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
OFF |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=None)


class _Lost(Exception):
    """A server that does not answer, or answers that it cannot go on."""


class Server:
    """One `vllm serve`: where it is, and what is known of it."""

    def __init__(self, url: str):
        self.url, self.alive, self.busy = url.rstrip("/"), False, 0
        self.base, self.adapter = "", ""  # names: of the model it serves, of the adapter it has
        self.room = None  # its max_model_len
        self.proved = False  # that its logprobs are those at the temperature of the sampling
        self.gone = asyncio.Event()  # whoever waits for an answer asks another


class ServerEngine:
    """Several servers as one engine; made by `start`. events: what befell them, a line each."""

    def __init__(self, urls: tuple[str, ...], timeout: float):
        self.servers, self.timeout = [Server(url) for url in urls], timeout
        self.version, self.name, self.folder = 0, "", ""  # of the adapter in use, "": none
        self.trains, self.ready = False, asyncio.Event()  # clear while adapters are exchanged
        self.ready.set()
        self.homes: dict[int, Server] = {}  # by session: who has its beginning cached
        self.flying, self.events, self.watcher = Counter(), [], None
        self.memory = Path(tempfile.mkdtemp(prefix="nanotool-"))
        # an answer may take as long as a turn; that nobody is there is known soon
        patience = httpx.Timeout(None, connect=5.0)
        self.http = httpx.AsyncClient(timeout=patience, limits=LIMITS, trust_env=False)

    def join(self) -> None:
        """Nobody waits for anybody: the servers batch whatever is there."""

    def leave(self) -> None:
        """Nobody waits for anybody."""

    async def generate(self, ids: list[int], images: list, sampling: Sampling) -> Completion:
        if images:
            raise ValueError("images were given to a text-only engine: use a vision model")
        asked = {
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": list(sampling.stop_ids),
            "stop": list(sampling.stop_strings),
            "ignore_eos": True,  # only what the format says ends a turn
            "logprobs": 0,  # of the sampled token alone
        }
        choice = await self._ask(ids, asked, sampling.session)
        finish = ended(choice["finish_reason"], choice["stop_reason"])
        return Completion(choice["token_ids"], choice["logprobs"]["token_logprobs"], finish)

    async def score(self, ids: list[int]) -> list[list[float]]:
        """The logprob of each of ids[1:], at temperature 1, as each server says."""
        body, scores = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0}, []
        while not scores:  # _anyone ends it when nobody comes back in time
            for server in await self._anyone():
                try:
                    choice = await self._complete(server, ids, body, self.version)
                except _Lost:
                    continue
                pairs = zip(ids[1:], choice["prompt_logprobs"][1:], strict=True)
                scores.append([seen[str(token)]["logprob"] for token, seen in pairs])
        return scores

    async def _ask(self, ids: list[int], asked: dict, session: int) -> dict:
        """The one choice of a completion; if a server dies meanwhile, another one's."""
        await self.ready.wait()
        version = self.version
        self.flying[version] += 1
        try:
            while True:
                server = await self._pick(session)
                try:
                    return await self._complete(server, ids, asked, version)
                except _Lost:
                    continue
        finally:
            self.flying[version] -= 1

    async def _complete(self, server: Server, ids: list[int], asked: dict, version: int) -> dict:
        body = {"model": server.adapter or server.base, "prompt": ids, "return_token_ids": True}
        # salted: whatever another version has left in the prefix cache is never used
        body |= OFF | asked | {"skip_special_tokens": False, "cache_salt": f"version {version}"}
        server.busy += 1
        try:
            (choice,) = (await self._post(server, "/v1/completions", body))["choices"]
        finally:
            server.busy -= 1
        if choice["prompt_token_ids"] != ids:
            raise RuntimeError(f"{server.url} confirms other token ids than it was given")
        return choice

    async def _pick(self, session: int) -> Server:
        """The server that has the beginning of the session cached, else the least busy one."""
        alive = await self._anyone()
        if self.homes.get(session) not in alive:
            self.homes[session] = min(alive, key=lambda server: server.busy)
        return self.homes[session]

    async def _anyone(self) -> list[Server]:
        """All servers that are alive, waiting for one; UserError if none is for `timeout` s."""
        since = time.monotonic()
        while not (alive := [server for server in self.servers if server.alive]):
            if time.monotonic() - since > self.timeout:
                urls = ", ".join(server.url for server in self.servers)
                raise UserError(
                    f"none of the servers ({urls}) has answered for {self.timeout:g} s: what was "
                    "saved is whole, so start one and go on with --resume=true"
                )
            await asyncio.sleep(0.1)
        return alive

    async def _post(self, server: Server, path: str, body: dict):
        """The JSON (or text) of an answer. _Lost if the server dies, UserError if it refuses."""
        post = asyncio.ensure_future(self.http.post(server.url + path, json=body))
        gone = asyncio.ensure_future(server.gone.wait())
        try:
            await asyncio.wait((post, gone), return_when=asyncio.FIRST_COMPLETED)
            if not post.done():
                raise _Lost
            answer = post.result()
        except httpx.TransportError as error:
            self._lose(server, f"{type(error).__name__} {error}".strip())
            raise _Lost from None
        finally:
            for task in (post, gone):
                task.cancel()
        if answer.status_code >= 500:
            self._lose(server, f"HTTP {answer.status_code}: {answer.text[:200]}")
            raise _Lost
        if answer.status_code >= 400:
            why = " ".join(answer.text.split())[:300]
            raise UserError(f"{server.url}{path} refuses (HTTP {answer.status_code}): {why}")
        return answer.json() if "json" in answer.headers.get("content-type", "") else answer.text

    def _lose(self, server: Server, why: str) -> None:
        if server.alive:
            server.alive, server.adapter, server.proved = False, "", False
            server.gone.set()
            self._tell(f"{server.url} was lost ({why}): its turns are sampled again by the others")

    def _tell(self, line: str) -> None:
        self.events.append(line)
        print(line, file=sys.stderr, flush=True)

    async def _watch(self) -> None:
        """Looks after the health of all servers until the engine is closed."""
        while True:
            await asyncio.gather(*(self._look(server) for server in self.servers))
            await asyncio.sleep(EVERY)

    async def _look(self, server: Server) -> None:
        try:
            health = await self.http.get(server.url + "/health", timeout=PATIENCE)
        except httpx.TransportError as error:
            self._lose(server, f"{type(error).__name__} {error}".strip())
            return
        if health.status_code != 200:
            self._lose(server, f"/health says HTTP {health.status_code}")
        elif not server.alive:
            try:
                await self._admit(server)
            except _Lost:
                return
            except UserError as error:  # started anew, in another way: the others go on
                if (line := f"{server.url} cannot be used: {error}") not in self.events:
                    self._tell(line)
                return
            self._tell(f"{server.url} is back")

    async def _admit(self, server: Server) -> None:
        """Learns what the server serves, and gives it the adapter in use."""
        server.gone.clear()
        try:
            listed = (await self.http.get(server.url + "/v1/models", timeout=PATIENCE)).json()
        except (httpx.TransportError, ValueError):
            raise _Lost from None
        server.base = next(card["id"] for card in listed["data"] if not card.get("parent"))
        server.room = next((card.get("max_model_len") for card in listed["data"]), None)
        if self.name in (card["id"] for card in listed["data"]):
            server.adapter = self.name  # it was away, and has not been started anew
        elif self.folder:
            await self._load(server, self.name, self.folder)
        if self.trains and not server.proved:
            await self._prove(server)
        server.alive = True

    async def _load(self, server: Server, name: str, folder: str) -> None:
        try:
            body = {"lora_name": name, "lora_path": folder}
            await self._post(server, "/v1/load_lora_adapter", body)
        except UserError as error:
            raise UserError(
                f"{error}. Start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora "
                f"--max-lora-rank=…, where it can read {folder}"
            ) from None
        server.adapter = name

    async def _prove(self, server: Server) -> None:
        """UserError if its logprobs are not of the distribution that it samples from: at half the
        temperature the difference of two logprobs is twice as large."""
        gaps = []
        for temperature in (1.0, 0.5):
            asked = {"temperature": temperature, "max_tokens": 1, "logprobs": 2, "seed": 0}
            choice = await self._complete(server, [1, 2, 3], asked, self.version)
            best = sorted(choice["logprobs"]["top_logprobs"][0].values(), reverse=True)
            gaps.append(best[0] - best[1])
        if abs(gaps[1] - 2 * gaps[0]) > 0.1 * gaps[0] + 1e-4:
            raise UserError(
                f"{server.url} gives logprobs before the temperature: start it with "
                "--logprobs-mode processed_logprobs"
            )
        server.proved = True

    async def sync(self, model, version: int) -> None:
        """From now on, sample from this adapter. Turns that are being sampled keep theirs, others
        wait until all servers have it."""
        if not models.adapters_of(model):
            raise UserError("engine = 'server' takes adapters only: use --tune=lora or qlora")
        folder = self.memory / f"version-{version}"
        model.save_pretrained(folder, selected_adapters=["default"])
        self.trains = True
        self.ready.clear()
        try:
            await self._adopt(str(folder), version)
        finally:
            self.ready.set()

    async def _adopt(self, folder: str, version: int) -> None:
        old, before, old_folder = self.version, self.name, self.folder
        self.name, self.folder, self.version = f"{self.memory.name}-{version}", folder, version
        self.homes.clear()  # their caches are salted with another version
        await self._anyone()

        async def adopt(server: Server) -> None:
            try:
                await self._load(server, self.name, folder)
                if not server.proved:
                    await self._prove(server)
            except _Lost:
                return  # who comes back gets it then

        await asyncio.gather(*(adopt(server) for server in self.servers if server.alive))
        while self.flying[old] and old != version:
            await asyncio.sleep(0.01)
        for server in self.servers:
            if before and before != self.name and server.alive:
                try:
                    await self._post(server, "/v1/unload_lora_adapter", {"lora_name": before})
                except (_Lost, UserError):
                    continue  # it has come back meanwhile, and never had it
        if old_folder.startswith(str(self.memory)) and old_folder != folder:
            shutil.rmtree(old_folder, ignore_errors=True)

    async def sleep(self) -> None:
        """The servers have GPUs of their own."""

    async def wake(self) -> None:
        """The servers have GPUs of their own."""

    async def close(self) -> None:
        if self.watcher:
            self.watcher.cancel()
        await self.http.aclose()
        shutil.rmtree(self.memory, ignore_errors=True)


async def start(
    urls: tuple[str, ...], name: str, tokenizer, timeout: float = 60.0, max_tokens: int = 0
) -> ServerEngine:
    """An engine over the servers at `urls`, which serve the model `name`, or the base of that
    adapter. UserError if none of them answers, or one has another tokenizer or less room."""
    engine = ServerEngine(urls, timeout)
    try:
        if models.is_adapter(name):
            engine.name, engine.folder = engine.memory.name, models.find(name)
        await asyncio.gather(*(_first_look(engine, server) for server in engine.servers))
        engine.watcher = asyncio.create_task(engine._watch())
        await engine._anyone()
        for server in engine.servers:
            if server.alive:
                await _check(engine, server, tokenizer, max_tokens)
    except BaseException:
        await engine.close()
        raise
    return engine


async def _first_look(engine: ServerEngine, server: Server) -> None:
    try:
        await engine._admit(server)
    except _Lost:
        engine._tell(f"{server.url} does not answer yet")


async def _check(engine: ServerEngine, server: Server, tokenizer, max_tokens: int) -> None:
    text = "What is 17 * 23?\n\tdef f(x): return 'ä' # <tool_call>"
    body = {"model": server.base, "prompt": text, "add_special_tokens": False}
    theirs = (await engine._post(server, "/tokenize", body))["tokens"]
    if theirs != tokenizer.encode(text, add_special_tokens=False):
        raise UserError(f"{server.url} serves {server.base!r}, which has another tokenizer")
    if server.room and server.room < max_tokens:
        raise UserError(
            f"{server.url} has max_model_len = {server.room}, less than max_tokens = {max_tokens}: "
            f"start it with --max-model-len={max_tokens}"
        )

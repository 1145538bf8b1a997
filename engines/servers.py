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

from engines.base import Completion, Engine, Sampling, refuse_images, turn_end
from learning import model as models
from run.config import UserError
from run.http import UNLIMITED, one_line

EVERY = 1.0  # seconds between looks at each server's health
PATIENCE = 20.0  # seconds in which a server has to say that it is well, however busy it is
# All of these are off. What is not sent, a server may take from the model's generation_config.json,
# and it would sample from another distribution than the trainer's.
OFF = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
TOKENIZER_PROBE = "What is 17 * 23?\n\tdef f(x): return 'ä' # <tool_call>"


class _Lost(Exception):
    """A server that does not answer, or answers that it cannot go on."""


class Server:
    """One `vllm serve`: where it is, and what is known of it."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.alive = False
        self.busy = 0  # turns that it is sampling for us
        self.base = ""  # the name of the model it serves
        self.adapter = ""  # the name of the adapter it has; "" for none
        self.room = None  # its max_model_len, if it says so
        self.proved = False  # that its logprobs are those at the temperature of the sampling
        self.gone = asyncio.Event()  # set when it is lost: whoever waits for an answer asks another


class ServerEngine(Engine):
    """Several servers as one engine; made by `start`. events: what befell them, a line each."""

    def __init__(self, urls: tuple[str, ...], timeout: float):
        self.servers = [Server(url) for url in urls]
        self.timeout = timeout  # seconds without any server, after which the run ends
        self.name = ""  # of the adapter in use; "" for none
        self.folder = ""  # of that adapter
        self.memory = Path(tempfile.mkdtemp(prefix="nanotool-"))  # where synced adapters are
        self.trains = False  # whether there was a sync
        self.ready = asyncio.Event()  # clear while adapters are exchanged
        self.ready.set()
        self.homes: dict[int, Server] = {}  # by session: who has its beginning cached
        self.flying = Counter()  # turns that are being sampled, by version
        self.events = []
        self.watcher = None  # the task that looks after their health
        # an answer may take as long as a turn; that nobody is there is known soon
        patience = httpx.Timeout(None, connect=5.0)
        self.http = httpx.AsyncClient(timeout=patience, limits=UNLIMITED, trust_env=False)

    async def begin(self, tokenizer, max_tokens: int) -> None:
        """Waits for a server, and checks those that are there. UserError if one will not do."""
        await asyncio.gather(*(self._first_look(server) for server in self.servers))
        self.watcher = asyncio.create_task(self._watch())
        await self._living()
        for server in self.servers:
            if server.alive:
                await self._check(server, tokenizer, max_tokens)

    async def generate(self, ids: list[int], images: list, sampling: Sampling) -> Completion:
        refuse_images(images)
        options = {
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": list(sampling.stop_ids),
            "stop": list(sampling.stop_strings),
            "ignore_eos": True,  # only what the format says ends a turn
            "logprobs": 0,  # of the sampled token alone
        }
        choice = await self._ask(ids, options, sampling.session)
        finish = turn_end(choice["finish_reason"], choice["stop_reason"])
        return Completion(choice["token_ids"], choice["logprobs"]["token_logprobs"], finish)

    async def prompt_logprobs(self, ids: list[int]) -> list[list[float]]:
        options = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0}
        scores = []
        while not scores:  # _living ends it when no server comes back in time
            for server in await self._living():
                try:
                    choice = await self._complete(server, ids, options, self.version)
                except _Lost:
                    continue
                by_position = choice["prompt_logprobs"][1:]
                pairs = zip(ids[1:], by_position, strict=True)
                scores.append([logprobs[str(token)]["logprob"] for token, logprobs in pairs])
        return scores

    async def _ask(self, ids: list[int], options: dict, session: int) -> dict:
        """The one choice of a completion; if a server dies meanwhile, another one's."""
        await self.ready.wait()
        version = self.version
        self.flying[version] += 1
        try:
            while True:
                server = await self._pick(session)
                try:
                    return await self._complete(server, ids, options, version)
                except _Lost:
                    continue
        finally:
            self.flying[version] -= 1

    async def _complete(self, server: Server, ids: list[int], options: dict, version: int) -> dict:
        body = {
            "model": server.adapter or server.base,
            "prompt": ids,
            "return_token_ids": True,
            **OFF,
            **options,
            "skip_special_tokens": False,
            # salted: whatever another version has left in the prefix cache is never used
            "cache_salt": f"version {version}",
        }
        server.busy += 1
        try:
            answer = await self._post(server, "/v1/completions", body)
        finally:
            server.busy -= 1
        (choice,) = answer["choices"]
        if choice["prompt_token_ids"] != ids:
            raise RuntimeError(f"{server.url} confirms other token ids than it was given")
        return choice

    async def _pick(self, session: int) -> Server:
        """The server that has the beginning of the session cached, else the least busy one."""
        living = await self._living()
        if self.homes.get(session) not in living:
            self.homes[session] = min(living, key=lambda server: server.busy)
        return self.homes[session]

    async def _living(self) -> list[Server]:
        """All servers that are alive, waiting for one; UserError if none is for `timeout` s."""
        since = time.monotonic()
        while True:
            living = [server for server in self.servers if server.alive]
            if living:
                return living
            if time.monotonic() - since > self.timeout:
                urls = ", ".join(server.url for server in self.servers)
                raise UserError(
                    f"none of the servers ({urls}) has answered for {self.timeout:g} s: what was "
                    "saved is whole, so start one and go on with --resume=true"
                )
            await asyncio.sleep(0.1)

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
            self._lose(server, _reason(error))
            raise _Lost from None
        finally:
            post.cancel()
            gone.cancel()
        if answer.status_code >= 500:
            self._lose(server, f"HTTP {answer.status_code}: {answer.text[:200]}")
            raise _Lost
        if answer.status_code >= 400:
            why = f"refuses (HTTP {answer.status_code}): {one_line(answer.text)}"
            raise UserError(f"{server.url}{path} {why}")
        if "json" in answer.headers.get("content-type", ""):
            return answer.json()
        return answer.text

    # Their health

    def _lose(self, server: Server, why: str) -> None:
        if not server.alive:
            return
        server.alive = False
        server.adapter = ""
        server.proved = False
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
            self._lose(server, _reason(error))
            return
        if health.status_code != 200:
            self._lose(server, f"/health says HTTP {health.status_code}")
        elif not server.alive:
            await self._take_back(server)

    async def _take_back(self, server: Server) -> None:
        try:
            await self._admit(server)
        except _Lost:
            return
        except UserError as error:  # started anew, in another way: the others go on
            line = f"{server.url} cannot be used: {error}"
            if line not in self.events:
                self._tell(line)
            return
        self._tell(f"{server.url} is back")

    async def _admit(self, server: Server) -> None:
        """Learns what the server serves, and gives it the adapter in use."""
        server.gone.clear()
        try:
            answer = await self.http.get(server.url + "/v1/models", timeout=PATIENCE)
            cards = answer.json()["data"]
        except (httpx.TransportError, ValueError):
            raise _Lost from None
        server.base = next(card["id"] for card in cards if not card.get("parent"))
        server.room = cards[0].get("max_model_len")
        if self.name in [card["id"] for card in cards]:
            server.adapter = self.name  # it was away, and has not been started anew
        elif self.folder:
            await self._load(server, self.name, self.folder)
        if self.trains and not server.proved:
            await self._prove(server)
        server.alive = True

    async def _first_look(self, server: Server) -> None:
        """Admits the server if it is there already."""
        try:
            await self._admit(server)
        except _Lost:
            self._tell(f"{server.url} does not answer yet")

    async def _check(self, server: Server, tokenizer, max_tokens: int) -> None:
        """UserError if the server has another tokenizer, or less room than max_tokens."""
        body = {"model": server.base, "prompt": TOKENIZER_PROBE, "add_special_tokens": False}
        answer = await self._post(server, "/tokenize", body)
        if answer["tokens"] != tokenizer.encode(TOKENIZER_PROBE, add_special_tokens=False):
            raise UserError(f"{server.url} serves {server.base!r}, which has another tokenizer")
        if server.room and server.room < max_tokens:
            raise UserError(
                f"{server.url} has max_model_len = {server.room}, less than max_tokens = "
                f"{max_tokens}: start it with --max-model-len={max_tokens}"
            )

    async def _prove(self, server: Server) -> None:
        """UserError if its logprobs are not of the distribution that it samples from: at half the
        temperature the difference of two logprobs is twice as large."""
        at_one = await self._gap(server, temperature=1.0)
        at_half = await self._gap(server, temperature=0.5)
        if abs(at_half - 2 * at_one) > 0.1 * at_one + 1e-4:
            raise UserError(
                f"{server.url} gives logprobs before the temperature: start it with "
                "--logprobs-mode processed_logprobs"
            )
        server.proved = True

    async def _gap(self, server: Server, temperature: float) -> float:
        """The difference of the two best logprobs behind a fixed prompt."""
        options = {"temperature": temperature, "max_tokens": 1, "logprobs": 2, "seed": 0}
        choice = await self._complete(server, [1, 2, 3], options, self.version)
        logprobs = choice["logprobs"]["top_logprobs"][0].values()
        best = sorted(logprobs, reverse=True)
        return best[0] - best[1]

    # Their adapters

    async def sync(self, model, version: int) -> None:
        """From now on, sample from this adapter. Turns that are being sampled keep theirs, others
        wait until all servers have it."""
        if not models.adapters_of(model):
            raise UserError("engine = 'server' takes adapters only: use --tune=lora or qlora")
        folder = self.memory / f"version-{version}"
        models.save_adapter(model, folder)
        self.trains = True
        self.ready.clear()
        try:
            await self._adopt(str(folder), version)
        finally:
            self.ready.set()

    async def _adopt(self, folder: str, version: int) -> None:
        old_version = self.version
        old_name = self.name
        old_folder = self.folder
        self.version = version
        self.name = f"{self.memory.name}-{version}"
        self.folder = folder
        self.homes.clear()  # their caches are salted with another version

        # 1. all servers load it
        living = await self._living()
        await asyncio.gather(*(self._give(server) for server in living))

        # 2. turns that began with the one before end with it
        while self.flying[old_version] and old_version != version:
            await asyncio.sleep(0.01)

        # 3. the one before is dropped
        if old_name and old_name != self.name:
            await self._unload(old_name)
        if old_folder.startswith(str(self.memory)) and old_folder != folder:
            shutil.rmtree(old_folder, ignore_errors=True)

    async def _give(self, server: Server) -> None:
        """Loads the adapter in use."""
        try:
            await self._load(server, self.name, self.folder)
            if not server.proved:
                await self._prove(server)
        except _Lost:
            return  # when it comes back it gets the adapter

    async def _load(self, server: Server, name: str, folder: str) -> None:
        body = {"lora_name": name, "lora_path": folder}
        try:
            await self._post(server, "/v1/load_lora_adapter", body)
        except UserError as error:
            raise UserError(
                f"{error}. Start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora "
                f"--max-lora-rank=…, where it can read {folder}"
            ) from None
        server.adapter = name

    async def _unload(self, name: str) -> None:
        for server in self.servers:
            if not server.alive:
                continue
            try:
                await self._post(server, "/v1/unload_lora_adapter", {"lora_name": name})
            except (_Lost, UserError):
                continue  # it has come back meanwhile, and never had it

    async def close(self) -> None:
        if self.watcher:
            self.watcher.cancel()
        await self.http.aclose()
        shutil.rmtree(self.memory, ignore_errors=True)


async def start(
    urls: tuple[str, ...], name: str, tokenizer, timeout: float = 60.0, max_tokens: int = 0
) -> ServerEngine:
    """Makes an engine over the servers at `urls`, which serve the model `name`, or the base of that
    adapter. UserError if none of them answers, or one has another tokenizer or less room."""
    engine = ServerEngine(urls, timeout)
    try:
        if models.is_adapter(name):
            models.check_usable_alone(name)
            engine.name = engine.memory.name
            engine.folder = models.find(name)
        await engine.begin(tokenizer, max_tokens)
    except BaseException:
        await engine.close()
        raise
    return engine


def _reason(error: httpx.TransportError) -> str:
    return f"{type(error).__name__} {error}".strip()

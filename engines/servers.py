"""vLLM servers, one or several, over HTTP: token ids in and out. On other GPUs or machines than the
trainer's, and for evaluation.

    export VLLM_ALLOW_RUNTIME_LORA_UPDATING=1
    vllm serve out/calc_sft --port 8000 --enable-lora --max-lora-rank 32 --max-loras 2 \
        --logprobs-mode processed_logprobs --generation-config vllm
    python train_grpo.py --config calc_lora.py --engine=server --urls=http://127.0.0.1:8000

Each version is written where the servers can read it as well. Adapters are loaded by all of them
under a new name, and the one before is dropped. Full weights take the place of those before, when
all turns have ended, by a method that engines/worker.py adds to vLLM's workers; with transport=gloo
or nccl they are sent, not written. Several ranks share the servers: the first writes or sends, all
of them see to it that each server has it.

A turn whose server dies is sampled again by another, from the same ids and with the same seed: what
a trajectory has is whole turns only, so nothing is lost or counted twice. A server that comes back
is given the weights in use before it is asked again. Prompts with images go to vLLM's
/inference/v1/generate, which --enable-scale-out opens: completions are shown none.

All that servers say is checked (engines/server_answers.py): one that says what cannot be true, or
answers no completions, is lost too, and given up if that happens again and again.
"""

import asyncio
import contextlib
import functools
import json
import secrets
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx2 as httpx
import torch

from engines import sending, server_answers
from engines.base import Completion, Engine, Sampling
from engines.serving import start_command
from images import Picture, to_data_uri
from learning import model as models
from learning import parallel, whole
from learning.vision import Vision, collapse
from run.config import UserError, tell
from run.http import TEMPORARY, UNLIMITED, Answer, HttpError, one_line, read_answer

EVERY = 1.0  # seconds between looks at each server's health
PATIENCE = 20.0  # seconds in which a server has to say that it is well, however busy it is
LOADING = 600.0  # seconds in which it has to have loaded weights
STRIKES = 3  # times that a server is lost without a good answer in between; then it is given up
TRIES = 5  # answers to one turn that cannot be used, whoever gave them; then the run ends
ONE_TOKEN = {"temperature": 1.0, "max_tokens": 1, "logprobs": 0, "seed": 0}
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
COMPLETIONS = "/v1/completions"
WITH_IMAGES = "/inference/v1/generate"
WORKERS = "/collective_rpc"  # calls a method of engines/worker.py
WEIGHTS = "weights"  # of an out_dir: the folder of full weights on their way
# How a server is started that shows images; docs/engines.md has the whole command.
SHOWING = "start it with --enable-scale-out (vLLM 0.32 or newer)"
TOKENIZER_PROBE = "What is 17 * 23?\n\tdef f(x): return 'ä' # <tool_call>"


class _Lost(Exception):
    """A server that does not answer, or answers that it cannot go on."""


class _Useless(_Lost):
    """The answer, or the silence, by which a server was lost: it may be this question's fault."""


class Server:
    """One `vllm serve`: where it is, and what is known of it."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.alive = False
        self.busy = 0  # turns that it is sampling for us
        self.heard = 0.0  # when it last gave a good answer, or was first asked for one
        self.strikes = 0  # how often it was lost since its last good answer
        self.why = ""  # it was lost
        self.base = ""  # the name of the model it serves
        self.has = ""  # the name of the adapter, or of the full weights, that it was given
        self.workers = 0  # processes that share its model, as far as it takes full weights
        self.room = None  # its max_model_len, if it says so
        self.proved = False  # that its logprobs are those at the temperature of the sampling
        self.shows = False  # that images become with it what they are to the trainer
        self.gone = asyncio.Event()  # set when it is lost: whoever waits for an answer asks another

    @property
    def is_given_up(self) -> bool:
        return self.strikes >= STRIKES


class ServerEngine(Engine):
    """Several servers as one engine; made by `start`. events: what befell them, a line each."""

    def __init__(
        self,
        urls: tuple[str, ...],
        timeout: float,
        memory: Path,
        full: str = "",
        transport: str = "file",
    ):
        self.servers = [Server(url) for url in urls]
        self.timeout = timeout  # seconds without any server, after which the run ends
        self.memory = memory  # the folder that the servers read
        self.full = full  # the trainer's dtype where full weights go over; "" for adapters
        self.run = memory.name  # in all names of this run: the servers may know those of others
        self.name = ""  # of the adapter, or the full weights, in use; "" for what they began with
        self.path = ""  # of these: a folder, or a file
        self.transport = transport
        self.weights = []  # those in use, on the CPU: of the first rank, where they are sent
        self.advice = ""  # how a server is started
        self.syncs = 0  # so far; of the ranks that share the servers, all have as many
        self.ready = asyncio.Event()  # clear while weights are exchanged
        self.ready.set()
        self.homes: dict[int, Server] = {}  # by session: who has its beginning cached
        self.flying = Counter()  # turns that are being sampled, by version
        self.events = []
        self.watchers = []  # the tasks that look after their health, one each
        self.tokenizer = None  # the trainer's; of `begin`, as the next two
        self.max_tokens = 0
        self.vocabulary = 0  # ids are below it
        self.probe = None  # a Picture, by which it is proved that a server shows images
        self.has_images = False  # some will come: proved when a server is admitted, not later
        # an answer may take as long as a turn; that nobody is there is known soon
        patience = httpx.Timeout(None, connect=5.0)
        self.http = httpx.AsyncClient(timeout=patience, limits=UNLIMITED, trust_env=False)

    async def begin(
        self,
        tokenizer,
        max_tokens: int,
        vocabulary: int,
        vision: Vision | None = None,
        has_images: bool = False,
    ) -> None:
        """Waits for a server. vision: of a model that may be shown images; has_images: will be.
        UserError if a server that is there will not do."""
        if vision is not None:
            self.probe = probe_of(vision)
        self.has_images = has_images
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.vocabulary = vocabulary
        await asyncio.gather(*(self._first_look(server) for server in self.servers))
        self.watchers = [asyncio.create_task(self._watch(server)) for server in self.servers]
        await self._living()

    async def generate(self, ids: list[int], images: list, sampling: Sampling) -> Completion:
        options = {
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": list(sampling.stop_ids),
            "stop": list(sampling.stop_strings),
            "ignore_eos": True,  # only what the format says ends a turn
            "logprobs": 0,  # of the sampled token alone
        }
        read = functools.partial(
            server_answers.completion, sampling=sampling, vocabulary=self.vocabulary
        )
        return await self._ask(ids, images, options, sampling.session, read)

    async def prompt_logprobs(self, ids: list[int], images: list = ()) -> list[list[float]]:
        options = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0}
        read = functools.partial(server_answers.prompt_logprobs, prompt=ids)
        scores = []
        while not scores:  # _living ends it when no server comes back in time
            for server in await self._living():
                try:
                    scores.append(
                        await self._complete(server, ids, images, options, self.version, read)
                    )
                except _Lost:
                    continue
        return scores

    async def _ask(
        self, ids: list[int], images: list, options: dict, session: int, read: Callable
    ) -> Completion:
        """Asks for a completion; if a server is lost meanwhile, asks another. UserError if this
        turn has had several answers that cannot be used."""
        await self.ready.wait()
        version = self.version
        self.flying[version] += 1
        try:
            for _ in range(TRIES):
                server, outcome = await self._ask_one(ids, images, options, session, version, read)
                if isinstance(outcome, Completion):
                    return outcome
        finally:
            self.flying[version] -= 1
        raise UserError(
            f"one turn has had {TRIES} answers that cannot be used, the last from {server.url} "
            f"({outcome}): look at its log"
        )

    async def _ask_one(
        self,
        ids: list[int],
        images: list,
        options: dict,
        session: int,
        version: int,
        read: Callable,
    ) -> tuple[Server, Completion | _Useless]:
        """Asks a server: (which, what came of it); the next one where other turns lose it."""
        while True:
            server = await self._pick(session)
            try:
                return server, await self._complete(server, ids, images, options, version, read)
            except _Useless as error:
                return server, error
            except _Lost:
                continue

    async def _complete(
        self,
        server: Server,
        ids: list[int],
        images: list,
        options: dict,
        version: int,
        read: Callable,
        within: float | None = None,
    ):
        """Asks a server; gives what `read` makes of the one choice of its completion. _Lost if
        there is none, or if it says ValueError to it. within: seconds, None for as long as it
        takes."""
        if images and not server.shows:
            await self._prove_images(server)
        path = COMPLETIONS
        body = {
            "model": server.base if self.full else server.has or server.base,
            "return_token_ids": True,
            # salted: whatever another version has left in the prefix cache is never used
            "cache_salt": f"{self.name} version {version}",
        }
        sampling = {**OFF, **options, "skip_special_tokens": False}
        if images:
            path = WITH_IMAGES
            body["token_ids"] = collapse(ids, images)
            body["content_parts"] = await asyncio.to_thread(content_parts, images)
            body["sampling_params"] = sampling
        else:
            body["prompt"] = ids
            body |= sampling
        if not server.busy:
            server.heard = time.monotonic()
        server.busy += 1
        try:
            answer = await self._post(server, path, body, within)
        finally:
            server.busy -= 1

        def read_choice(said):
            said = server_answers.with_images(said) if images else said
            return read(server_answers.only_choice(said, ids))

        value = self._read(server, answer, read_choice)
        server.heard = time.monotonic()
        server.strikes = 0
        return value

    def _read(self, server: Server, answer: Answer, read: Callable):
        """Returns what `read` makes of an answer's JSON; loses the server where it makes
        nothing."""
        try:
            return read(answer.json())
        except (HttpError, ValueError, OverflowError, RecursionError) as error:
            raise self._lose(server, str(error)) from None

    async def _pick(self, session: int) -> Server:
        """Picks the server that has the session's beginning cached, else the least busy one."""
        living = await self._living()
        if self.homes.get(session) not in living:
            self.homes[session] = min(living, key=lambda server: server.busy)
        return self.homes[session]

    async def _living(self) -> list[Server]:
        """Lists all servers that are alive; waits for one, UserError if none is for `timeout` s."""
        since = time.monotonic()
        while True:
            living = [server for server in self.servers if server.alive]
            if living:
                return living
            if all(server.is_given_up for server in self.servers):
                raise UserError(
                    f"no server is left that can be used ({self._names()}): what was saved is "
                    "whole, so start one and go on with --resume=true"
                )
            if time.monotonic() - since > self.timeout:
                raise UserError(
                    f"none of the servers ({self._names()}) has answered for {self.timeout:g} s: "
                    "what was saved is whole, so start one and go on with --resume=true"
                )
            await asyncio.sleep(0.1)

    def _names(self) -> str:
        """Names all servers, and why those were lost that answered something."""
        names = [
            f"{server.url}: {server.why}" if server.why else server.url for server in self.servers
        ]
        return ", ".join(names)

    async def _post(
        self, server: Server, path: str, body: dict, within: float | None = None
    ) -> Answer:
        """Posts a request; returns an answer of status 200. _Lost if the server dies or is late,
        UserError if it refuses."""
        asking = read_answer(self.http, "POST", server.url + path, json=body)
        post = asyncio.ensure_future(asking)
        gone = asyncio.ensure_future(server.gone.wait())
        try:
            await asyncio.wait((post, gone), timeout=within, return_when=asyncio.FIRST_COMPLETED)
            if gone.done() and not post.done():
                raise _Lost
            if not post.done():
                raise self._lose(server, f"{path} has not answered in {within:g} s")
            answer = post.result()
        except (httpx.RequestError, HttpError) as error:
            raise self._lose(server, _reason(error)) from None
        finally:
            post.cancel()
            gone.cancel()
        status = answer.status
        # 404: started anew, it has not the adapter yet, unless it never had the path
        has_path = path == COMPLETIONS or (path == WITH_IMAGES and server.shows)
        is_away = status == 404 and has_path
        if status in TEMPORARY or status >= 500 or is_away or 200 != status < 400:
            raise self._lose(server, f"HTTP {status}: {one_line(answer.text, 200)}")
        if status >= 400:
            why = f"refuses (HTTP {status}): {one_line(answer.text)}"
            raise UserError(f"{server.url}{path} {why}")
        return answer

    # Their health

    def _lose(self, server: Server, why: str) -> _Useless:
        """Counts a server as lost. Returns what is to be raised by who asked it."""
        if server.alive:
            server.alive = False
            server.has = ""
            server.proved = False
            server.shows = False
            server.gone.set()
            self._tell(f"{server.url} was lost ({why}): its turns are sampled again by the others")
            self._strike(server, why)
        return _Useless(why)

    def _strike(self, server: Server, why: str) -> None:
        server.why = why
        server.strikes += 1
        if server.strikes == STRIKES:
            self._tell(
                f"{server.url} is given up until it is started anew: lost {STRIKES} times without "
                f"a good answer ({why})"
            )

    def _tell(self, line: str) -> None:
        self.events.append(line)
        tell(line)

    async def _watch(self, server: Server) -> None:
        """Looks after the health of a server until the engine is closed."""
        while True:
            await self._look(server)
            await asyncio.sleep(EVERY)

    async def _look(self, server: Server) -> None:
        why = ""
        try:
            health = await self._get(server, "/health")
            if health.status != 200:
                why = f"/health says HTTP {health.status}"
        except (httpx.RequestError, HttpError) as error:
            why = _reason(error)
        except TimeoutError:
            why = f"/health has not answered in {PATIENCE:g} s"
        if why:
            self._lose(server, why)
            server.strikes = 0  # it is down: what comes back is another one
        elif not server.alive and not server.is_given_up:
            await self._take_back(server)
        elif server.alive and server.busy and time.monotonic() - server.heard > PATIENCE:
            await self._ask_for_one_token(server)

    async def _get(self, server: Server, path: str) -> Answer:
        async with asyncio.timeout(PATIENCE):
            return await read_answer(self.http, "GET", server.url + path)

    async def _ask_for_one_token(self, server: Server) -> None:
        """Loses a server that says to be well and samples nothing: a turn may take long, one token
        does not."""
        sampling = Sampling(max_new_tokens=1)
        read = functools.partial(
            server_answers.completion, sampling=sampling, vocabulary=self.vocabulary
        )
        try:
            await self._complete(server, [1, 2, 3], [], ONE_TOKEN, self.version, read, PATIENCE)
        except (_Lost, UserError):
            return

    async def _take_back(self, server: Server) -> None:
        try:
            await self._admit(server)
        except _Useless as error:
            self._strike(server, str(error))
            return
        except _Lost:
            return
        except UserError as error:  # started anew, in another way: the others go on
            line = f"{server.url} cannot be used: {error}"
            if line not in self.events:
                self._tell(line)
            return
        self._tell(f"{server.url} is back")

    async def _admit(self, server: Server) -> None:
        """Learns what the server serves, checks it, and gives it the weights in use."""
        server.gone.clear()
        try:
            answer = await self._get(server, "/v1/models")
        except (httpx.RequestError, HttpError, TimeoutError):
            raise _Lost from None
        if answer.status != 200:
            raise _Useless(f"/v1/models says HTTP {answer.status}")
        served = self._read(server, answer, server_answers.models_served)
        server.base, server.room, adapters = served
        await self._check(server)
        server.has = ""
        known = adapters
        if self.full:
            known = [await self._weights_of(server)]
        else:
            await self._check_own_weights(server)
        if self.name in known:
            server.has = self.name  # it was away, and has not been started anew
        await self._bring_up_to_date(server)
        strikes = server.strikes
        if strikes:  # does it sample at all?
            await self._complete(
                server, [1, 2, 3], [], ONE_TOKEN, self.version, lambda choice: None, PATIENCE
            )
            server.strikes = strikes  # only a turn shows that it samples well
        if self.syncs and not server.proved:
            await self._prove(server)
            server.strikes = strikes
        await self._bring_up_to_date(server)  # there may have been a sync meanwhile
        server.alive = True

    async def _first_look(self, server: Server) -> None:
        """Admits the server if it is there already."""
        try:
            await self._admit(server)
        except _Useless as error:
            self._strike(server, str(error))
            self._tell(f"{server.url} cannot be used yet ({error})")
        except _Lost:
            self._tell(f"{server.url} does not answer yet")

    async def _check(self, server: Server) -> None:
        """Refuses a server with another tokenizer than the trainer's, or too little room."""
        body = {"model": server.base, "prompt": TOKENIZER_PROBE, "add_special_tokens": False}
        answer = await self._post(server, "/tokenize", body, PATIENCE)
        ids = self._read(server, answer, server_answers.tokens)
        if ids != self.tokenizer.encode(TOKENIZER_PROBE, add_special_tokens=False):
            raise UserError(f"{server.url} serves {server.base!r}, which has another tokenizer")
        if server.room and server.room < self.max_tokens:
            raise UserError(
                f"{server.url} has max_model_len = {server.room}, less than max_tokens = "
                f"{self.max_tokens}: start it with --max-model-len={self.max_tokens}"
            )
        if self.has_images:
            await self._prove_images(server)

    async def _prove_images(self, server: Server) -> None:
        """Refuses a server that shows no images, or has other tokens for one than the trainer."""
        picture = self.probe
        if picture is None:
            raise UserError("engine = 'server' was started without the model's images")
        body = {
            "model": server.base,
            "token_ids": [picture.placeholder],
            "content_parts": content_parts([picture]),
            "sampling_params": ONE_TOKEN,
            "return_token_ids": True,
        }
        try:
            answer = await self._post(server, WITH_IMAGES, body, PATIENCE)
        except UserError as error:
            raise UserError(f"{error}. To show images, {SHOWING}") from None
        ids = self._read(server, answer, server_answers.prompt_ids)
        if ids != picture.ids:
            raise UserError(
                f"{server.url} has {len(ids)} tokens for an image that the trainer has "
                f"{len(picture.ids)} for: {SHOWING}, with the files of the same model"
            )
        server.shows = True

    async def _prove(self, server: Server) -> None:
        """Refuses a server whose logprobs are not of the distribution that it samples from: at half
        the temperature the difference of two logprobs is twice as large."""
        at_one = await self._gap(server, temperature=1.0)
        at_half = await self._gap(server, temperature=0.5)
        if abs(at_half - 2 * at_one) > 0.1 * at_one + 1e-4:
            raise UserError(
                f"{server.url} gives logprobs before the temperature: start it with "
                "--logprobs-mode processed_logprobs"
            )
        server.proved = True

    async def _gap(self, server: Server, temperature: float) -> float:
        """Measures the difference of the two best logprobs behind a fixed prompt."""
        options = {"temperature": temperature, "max_tokens": 1, "logprobs": 2, "seed": 0}
        return await self._complete(
            server, [1, 2, 3], [], options, self.version, server_answers.gap_of_best, PATIENCE
        )

    # Their weights

    async def sync(self, model, version: int) -> None:
        """Makes the servers sample, from now on, from these weights. With adapters, turns that are
        being sampled keep theirs, and others wait until all servers have it. Full weights wait
        until all turns have ended."""
        if not self.full and not models.adapters_of(model):
            raise UserError("engine = 'server' was started for adapters, and got full weights")
        old_version = self.version
        old_name = self.name
        old_path = self.path
        self.syncs += 1
        label = f"{version}-{self.syncs}"  # a name never stands for two weights
        self.ready.clear()
        try:
            # 1. the first rank writes it for all, or keeps a copy: who comes back gets that
            path = self.memory / f"version-{label}"
            weights = []
            if self.transport == "file":
                await asyncio.to_thread(parallel.by_first, self._write, model, path)
            elif parallel.is_first():
                weights = await asyncio.to_thread(_copies, model, self.full)
            if self.full:
                await self._drain(old_version)

            # 2. all servers load it
            self.version = version
            self.name = f"{self.run}-{label}"
            self.path = str(path)
            self.weights = weights
            self.homes.clear()  # their caches are salted with another version
            if self.transport != "file":  # the other ranks then find it there
                loop = asyncio.get_running_loop()

                def give():
                    asyncio.run_coroutine_threadsafe(self._give_all(), loop).result()

                await asyncio.to_thread(parallel.by_first, give)
            await self._give_all()

            # 3. turns that began with the adapter before end with it
            if old_version != version:
                await self._drain(old_version)
        finally:
            self.ready.set()

        # 4. the one before goes
        if parallel.is_first():
            if old_name and not self.full:
                await self._unload(old_name)
            if old_path.startswith(str(self.memory)):
                _remove(old_path)

    async def _drain(self, version: int) -> None:
        """Waits until nobody is sampled from this version any more."""
        while self.flying[version]:
            await asyncio.sleep(0.01)

    def _write(self, model, path: Path) -> None:
        """Writes an adapter as a folder, full weights as a file. UserError if they do not fit."""
        try:
            if self.full:
                _save_weights(model, self.full, path)
            else:
                models.save_adapter(model, path)
        except Exception as error:  # each writer has one of its own for a full disk
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"cannot write what the servers need to {path} ({reason}): make room, or give "
                "another folder with --engine_options=folder=…"
            ) from error

    async def _give_all(self) -> None:
        living = await self._living()
        await asyncio.gather(*(self._give(server) for server in living))

    async def _give(self, server: Server) -> None:
        """Brings a server that is alive up to date."""
        try:
            await self._bring_up_to_date(server)
            if not server.proved:
                await self._prove(server)
        except _Lost:
            return  # when it comes back it gets the weights

    async def _bring_up_to_date(self, server: Server) -> None:
        """Loads what is in use, and once more if there was a sync meanwhile."""
        while server.has != self.name:
            name = self.name
            if self.full:
                if self.transport == "file":
                    await self._call_workers(server, "take_weights", [self.path, name])
                else:
                    await self._send(server, name)
                if self.probe is not None:  # what the old tower made of an image is known there
                    await self._post(server, "/reset_encoder_cache", {}, PATIENCE)
            else:
                await self._load_adapter(server, name, self.path)
            server.has = name

    async def _send(self, server: Server, name: str) -> None:
        """Sends a server the weights in use; only the first rank does, the others look. _Lost where
        it has not got them."""
        if not parallel.is_first():
            if await self._weights_of(server) != name:
                self._lose(server, "it has not the weights in use yet")
                raise _Lost
            return
        try:
            sender = await asyncio.to_thread(
                sending.Sender, self.transport, server.url, server.workers, self.weights
            )
        except OSError as error:
            raise self._lose(server, _reason(error)) from None
        task = asyncio.ensure_future(asyncio.to_thread(sender.send))
        # where the server is lost that is the reason, and what the thread raises then is not
        task.add_done_callback(lambda done: done.exception())
        try:
            arguments = [self.transport, sender.address, str(sender.port), name]
            await self._call_workers(server, "receive_weights", arguments)
            await task
        finally:
            sender.close()

    async def _call_workers(self, server: Server, method: str, arguments: list[str]) -> list:
        """Calls a method of engines/worker.py on all workers of a server; returns their results."""
        body = {"method": method, "args": arguments}
        answer = await self._post(server, WORKERS, body, LOADING)
        return self._read(server, answer, server_answers.results_of_workers)

    async def _weights_of(self, server: Server) -> str:
        """Asks for the name of the full weights that a server has. UserError if it was started in a
        way in which it cannot take any, or cannot read them."""
        try:
            results = await self._call_workers(server, "what_it_has", [str(self.memory)])
            has = [server_answers.weights_held(result) for result in results]
        except (_Useless, UserError, ValueError) as error:
            raise UserError(
                f"{server.url} cannot take full weights ({error}): start it in nanotool's folder "
                f"by {self.advice}"
            ) from None
        server.workers = len(results)
        if self.transport == "file" and not all(reads for _, reads in has):
            raise UserError(
                f"{server.url} cannot read {self.memory}: give a folder that it shares with this "
                "machine, with --engine_options=folder=…"
            )
        names = {name for name, _ in has}
        return names.pop() if len(names) == 1 else ""

    async def _check_own_weights(self, server: Server) -> None:
        """Refuses a server with full weights of a training run: it is asked for the model that
        it was started with, or for adapters over that."""
        try:
            results = await self._call_workers(server, "what_it_has", [str(self.memory)])
            names = [server_answers.weights_held(result)[0] for result in results]
        except (_Useless, UserError, ValueError):
            return  # it cannot take any, so it has none
        if any(names):
            raise UserError(
                f"{server.url} has full weights of a training run ({names[0]}), not those of its "
                "model: start it anew"
            )

    async def _load_adapter(self, server: Server, name: str, folder: str) -> None:
        body = {"lora_name": name, "lora_path": folder}
        try:
            await self._post(server, "/v1/load_lora_adapter", body, LOADING)
        except UserError as error:
            if name in await self._adapters_on(server):
                return  # another rank was sooner
            raise UserError(
                f"{error}. Start it where it can read {folder}, by {self.advice}"
            ) from None

    async def _adapters_on(self, server: Server) -> list[str]:
        """Lists the names of the adapters that a server has."""
        try:
            answer = await self._get(server, "/v1/models")
        except (httpx.RequestError, HttpError, TimeoutError) as error:
            raise self._lose(server, _reason(error)) from None
        return self._read(server, answer, server_answers.models_served)[2]

    async def _unload(self, name: str) -> None:
        for server in self.servers:
            if not server.alive:
                continue
            try:
                body = {"lora_name": name}
                await self._post(server, "/v1/unload_lora_adapter", body, LOADING)
            except (_Lost, UserError):
                continue  # it has come back meanwhile, and never had it

    async def close(self) -> None:
        for watcher in self.watchers:
            watcher.cancel()
        await self.http.aclose()
        if parallel.is_first():
            shutil.rmtree(self.memory, ignore_errors=True)
            if self.memory.parent.name == WEIGHTS:  # made for it, of an out_dir
                with contextlib.suppress(OSError):
                    self.memory.parent.rmdir()


async def start(
    urls: tuple[str, ...],
    name: str,
    tokenizer,
    timeout: float = 60.0,
    max_tokens: int = 0,
    vision: Vision | None = None,
    has_images: bool = False,
    folder: str = "",
    full: str = "",
    out_dir: str = "",
    lora_r: int = 0,
    transport: str = "file",
) -> ServerEngine:
    """Makes an engine over the servers at `urls`, which serve the model `name`, or the base of that
    adapter.

    vision: of a model that may be shown images; has_images: will be. folder: in which what is
    synced is written; "": in out_dir, or without one where this machine has temporary files. full:
    the trainer's dtype where full weights will be synced, "" where adapters will; lora_r: of this
    rank. transport: how full weights go over. UserError if none of the servers answers, or one has
    another tokenizer or less room, or shows no images where some will come, or cannot take or read
    what is synced.
    """
    if lora_r and transport != "file":
        raise UserError(
            f"engine_options: server.transport = {transport!r} has no effect with adapters, which "
            "servers read from a folder: drop it"
        )
    if full:
        try:
            sending.check(transport)
        except ValueError as error:
            reason = f"engine_options: server.transport = {transport!r}: {error}"
            raise UserError(reason) from None
    if full and vision is not None and parallel.HERE.size > 1:
        raise UserError(
            "engine = 'server' with tune=full, images and several processes is not there: one may "
            "ask while another exchanges what a server knows of an image; use --tune=lora"
        )
    memory = await asyncio.to_thread(parallel.by_first, _make_folder, folder, out_dir)
    engine = ServerEngine(urls, timeout, memory, full, transport if full else "file")
    engine.advice = start_command(name, full, lora_r, max_tokens, vision is not None)
    try:
        if models.is_adapter(name):
            models.check_usable_alone(name)
            if vision is not None and whole.is_of_tower(models.find(name)):
                raise UserError(
                    f"model = {name!r} has adapters in its tower, which a server may leave out "
                    "without a word: use engine=vllm, or merge it (python -m learning.merge)"
                )
            engine.name = engine.run
            engine.path = models.find(name)
        vocabulary = vocabulary_of(name, tokenizer)
        await engine.begin(tokenizer, max_tokens, vocabulary, vision, has_images)
    except BaseException:
        await engine.close()
        raise
    return engine


def _make_folder(folder: str, out_dir: str) -> Path:
    """Makes the folder for what is synced in this run. UserError if that cannot be."""
    try:
        if out_dir and not folder:
            place = Path(out_dir).resolve() / WEIGHTS
            shutil.rmtree(place, ignore_errors=True)  # a run that was killed has left it
            memory = place / f"nanotool-{secrets.token_hex(4)}"
            memory.mkdir(parents=True)
            return memory
        if folder:
            folder = str(Path(folder).resolve())  # a server may run in another one
        memory = Path(tempfile.mkdtemp(prefix="nanotool-", dir=folder or None))
        memory.chmod(0o755)  # a server may be another user's
        return memory
    except OSError as error:
        raise UserError(
            f"cannot write what the servers need to {folder or out_dir!r} ({error.strerror}): give "
            "a folder that they share, with --engine_options=folder=…"
        ) from error


def _remove(path: str) -> None:
    """Removes an adapter's folder, or a file."""
    if Path(path).is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        Path(path).unlink(missing_ok=True)


def _save_weights(model, dtype: str, path: Path) -> None:
    """Writes all weights of a model, in the dtype that products are made in."""
    from safetensors.torch import save_file

    kind = _sent_dtype(dtype)
    weights = {name: weight.to(kind).contiguous() for name, weight in models.weights_of(model)}
    size = sum(weight.nbytes for weight in weights.values())
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(f"{size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free")
    save_file(weights, path)


def _copies(model, dtype: str) -> list[tuple[str, torch.Tensor]]:
    """Copies all weights of a model to the CPU, in the dtype that products are made in."""
    kind = _sent_dtype(dtype)
    copies = []
    for name, weight in models.weights_of(model):
        copies.append((name, weight.detach().to("cpu", kind, copy=True).contiguous()))
    return copies


def _sent_dtype(dtype: str) -> torch.dtype:
    return torch.float32 if dtype == "float32" else torch.bfloat16


def content_parts(pictures: list[Picture]) -> list[dict]:
    """Makes of pictures what a server takes, as they were shown: PNG loses nothing."""
    return [{"type": "image_url", "url": to_data_uri(picture.shown)} for picture in pictures]


def probe_of(vision: Vision) -> Picture:
    """Makes a picture that is larger than one square, and no square. UserError if a server would
    resize what is shown once more: it cannot be told not to at each request."""
    from PIL import Image

    # grey levels that are not alike, so that resizing would be seen
    picture = vision.prepare(Image.radial_gradient("L").convert("RGB").resize((512, 384)))
    if vision.prepare(picture.shown).key != picture.key:
        raise UserError(
            "engine = 'server': a server would resize images once more than the trainer does, as "
            "preprocessor_config.json says (do_image_splitting = false): use engine=vllm"
        )
    return picture


def vocabulary_of(name: str, tokenizer) -> int:
    """Counts the ids of the model `name`: more than its tokenizer where its embedding is padded.
    What is on this machine is asked, no hub."""
    from transformers import AutoConfig

    if models.is_adapter(name):
        settings = Path(models.find(name)) / "adapter_config.json"
        name = json.loads(settings.read_text(encoding="utf-8"))["base_model_name_or_path"]
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        size = config.get_text_config().vocab_size
    except (OSError, ValueError, KeyError, AttributeError):
        return len(tokenizer)
    return max(len(tokenizer), size)


def _reason(error: Exception) -> str:
    if isinstance(error, HttpError):
        return error.detail
    return f"{type(error).__name__} {error}".strip()

"""How tokens are sampled. One small interface, several engines:

    completion = await engine.generate(ids, images, sampling)    # token ids in, token ids out

`TransformersEngine` needs no extra install: a decode loop over the trajectories that wait. It is
the default on a CPU and for the tiny tasks. engine_vllm.py has vLLM beside the trainer, and
engine_server.py vLLM servers elsewhere. `ScriptedEngine` says what a test tells it to, so that
loop, masks and loss are testable in milliseconds. `start` makes the one that a config names, and
`Canary` proves after every sync that it samples from the trainer's weights.

Shapes: B rows in the batch, T tokens, V vocabulary.
"""

import asyncio
import concurrent.futures
import importlib.util
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from config import UserError
from logprobs import token_logprobs


@dataclass(frozen=True)
class Sampling:
    """How one turn is sampled. The whole distribution is sampled from: there is no top_p, top_k or
    penalty, because the logprobs of a cut distribution are not those that the loss computes."""

    temperature: float = 1.0  # 0 = greedy; its logprobs are those at temperature 1
    max_new_tokens: int = 256
    seed: int = 0  # of this one turn; nobody else's noise depends on it, nor it on theirs
    stop_ids: tuple[int, ...] = ()  # a sampled stop token ends the turn and is part of it
    stop_strings: tuple[str, ...] = ()  # text formats; the ids that made the string stay as sampled
    session: int = 0  # the same for all turns of a group: which server has their beginning cached


@dataclass
class Completion:
    ids: list[int]  # as sampled, the stop token included
    logprobs: list[float]  # of each, at the temperature used
    finish: str  # "stop" (a stop token), "stop_string", or "length"


class Engine(Protocol):
    version: int  # of the weights it samples from

    def join(self) -> None: ...  # a trajectory starts: it will call generate
    def leave(self) -> None: ...  # and ends: nobody needs to wait for it any more
    async def generate(self, ids: list[int], images: list, sampling: Sampling) -> Completion: ...
    # logprobs of ids[1:] at temperature 1, from each copy of the weights: several servers have some
    async def score(self, ids: list[int]) -> list[list[float]]: ...
    async def sync(self, model, version: int) -> None: ...  # from now on, sample from these weights
    async def sleep(self) -> None: ...  # give the GPU's memory to the trainer
    async def wake(self) -> None: ...  # take it back
    async def close(self) -> None: ...


@dataclass
class _Request:
    ids: list[int]
    sampling: Sampling
    future: asyncio.Future
    rng: random.Random
    new: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class TransformersEngine:
    """Samples with the trainer's own model object, so a sync copies nothing.

    The trajectories that wait are gathered into one batch, left-padded, and decoded with a KV
    cache; when a row finishes, its trajectory goes on (runs its tools) at once, and when a quarter
    of the rows have, they leave the batch. Equal prompts (a group) are prefilled once. One event
    loop at a time.

    deterministic=True: a batch is formed only when every unfinished trajectory waits, and in an
    order that does not depend on who came first, so equal seeds give equal bits. False lets fast
    ones go ahead while others wait for a slow tool.
    """

    def __init__(self, model, tokenizer, deterministic: bool = True, max_batch: int = 256):
        self.model, self.tokenizer = model, tokenizer
        self.deterministic, self.max_batch = deterministic, max_batch
        self.version, self.unfinished = 0, 0
        self.waiting: list[_Request] = []
        self.loop = None  # the event loop that hears when the running batch is done
        self.thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="decode")

    def join(self) -> None:
        self.unfinished += 1

    def leave(self) -> None:
        self.unfinished -= 1
        self._start()  # the others may have waited only for this one

    async def sync(self, model, version: int) -> None:
        self.model, self.version = model, version

    async def sleep(self) -> None:
        """Nothing to give back: the cache of a batch is freed at its end."""

    async def wake(self) -> None:
        """Nothing to take back."""

    async def close(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)
        _fail(self.waiting, RuntimeError("the engine was closed while a turn waited"))

    async def generate(self, ids: list[int], images: list, sampling: Sampling) -> Completion:
        if images:
            raise ValueError("images were given to a text-only engine: use a vision model")
        future = asyncio.get_running_loop().create_future()
        self.waiting.append(_Request(ids, sampling, future, random.Random(sampling.seed)))
        self._start()
        return await future

    async def score(self, ids: list[int]) -> list[list[float]]:
        """The logprob of each of ids[1:], at temperature 1, with the weights in use."""
        return [await asyncio.get_running_loop().run_in_executor(self.thread, self._score, ids)]

    @torch.inference_mode()
    def _score(self, ids: list[int]) -> list[float]:
        tokens = torch.tensor([ids], device=self.model.device)
        attention_mask, positions = torch.ones_like(tokens), torch.arange(len(ids))[None]
        cache = roomy_cache(self.model.config)
        positions = positions.to(tokens.device)
        logits = self._forward(tokens, attention_mask, positions, cache, keep=0).logits[0, :-1]
        return logits.float().log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].tolist()

    def _start(self) -> None:
        self.waiting = [r for r in self.waiting if not r.future.done()]  # a deadline may cancel one
        if not self.waiting or (self.deterministic and len(self.waiting) < self.unfinished):
            return
        if self.loop and not self.loop.is_closed():  # a closed one never hears that its batch ended
            return
        # equal prompts become neighbours, and lengths that differ little share a batch
        batch = sorted(self.waiting, key=lambda r: (len(r.ids), r.ids, r.sampling.seed))
        loop = asyncio.get_running_loop()
        done = loop.run_in_executor(self.thread, self._run, batch)  # raises if the engine is closed
        self.loop, self.waiting = loop, []
        done.add_done_callback(lambda done: self._finished(done, batch))

    def _finished(self, done: asyncio.Future, batch: list[_Request]) -> None:
        self.loop = None
        closed = RuntimeError("the engine was closed before a turn was sampled")
        if error := closed if done.cancelled() else done.exception():
            _fail(batch, error)
        self._start()

    def _run(self, batch: list[_Request]) -> None:
        self.model.eval()  # dropout would make other logprobs than the trainer's
        for start in range(0, len(batch), self.max_batch):
            self._decode(batch[start : start + self.max_batch])

    @torch.inference_mode()
    def _decode(self, rows: list[_Request]) -> None:
        device = self.model.device
        prompts = sorted({tuple(r.ids) for r in rows}, key=lambda ids: (len(ids), ids))
        longest = len(prompts[-1])
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)  # (B, T), padded on the left
        attention_mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            attention_mask[i, longest - len(prompt) :] = 1
        ids, attention_mask = ids.to(device), attention_mask.to(device)
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # the first real token is at 0
        cache = roomy_cache(self.model.config)
        out = self._forward(ids, attention_mask, positions, cache)

        which = {prompt: i for i, prompt in enumerate(prompts)}
        take = torch.tensor([which[tuple(r.ids)] for r in rows], device=device)
        cache.batch_select_indices(take)
        logits, attention_mask = out.logits[take, -1], attention_mask[take]  # (B, V)
        positions = positions[take, -1:]
        keep = list(range(len(rows)))  # the rows that have not ended
        while True:
            take = torch.tensor(keep, device=device)
            tokens = take.new_zeros(len(rows))
            tokens[take] = self._sample(logits[take], [rows[i] for i in keep])
            keep = [i for i in keep if not self._ended(rows[i])]
            if not keep:
                return
            if len(keep) <= 0.75 * len(rows):  # leaving copies the cache, so not one by one
                rows, take = [rows[i] for i in keep], torch.tensor(keep, device=device)
                cache.batch_select_indices(take)
                tokens, attention_mask = tokens[take], attention_mask[take]
                positions, keep = positions[take], list(range(len(rows)))
            positions = positions + 1
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], 1)
            logits = self._forward(tokens[:, None], attention_mask, positions, cache).logits[:, -1]

    def _forward(self, ids, attention_mask, positions, cache, keep=1):
        return self.model(
            input_ids=ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,  # 0: of all positions
        )

    def _sample(self, logits: torch.Tensor, rows: list[_Request]) -> torch.Tensor:
        """Next tokens (B,): each row draws one uniform number and inverts its own distribution, so
        its noise is the same whoever else is in the batch."""
        heat = torch.tensor([r.sampling.temperature for r in rows], device=logits.device)
        greedy = heat == 0
        logits = logits.float() / torch.where(greedy, 1.0, heat)[:, None]
        logprobs = logits.log_softmax(-1)  # (B, V)
        # in double precision: in single, the tail of a large vocabulary is lost in the sum
        cumulative = logprobs.double().exp().cumsum(-1)
        uniform = torch.tensor([r.rng.random() for r in rows], dtype=torch.double)
        uniform = uniform.to(logits.device)[:, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, uniform, right=True)[:, 0]
        tokens = torch.where(greedy, logits.argmax(-1), drawn.clamp(max=logits.shape[-1] - 1))
        chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
        if chosen.isnan().any():  # else every next token would be the last of the vocabulary
            raise UserError("the model's logits are NaN: its weights have diverged or are broken")
        for row, token, logprob in zip(rows, tokens.tolist(), chosen.tolist(), strict=True):
            row.new.append(token)
            row.logprobs.append(logprob)
        return tokens

    def _ended(self, row: _Request) -> bool:
        """Whether the row has just ended; if so, its trajectory goes on now."""
        finish = finished(row.new, row.sampling, self.tokenizer)
        if finish:
            completion = Completion(row.new, row.logprobs, finish)
            row.future.get_loop().call_soon_threadsafe(_resolve, row.future, completion)
        return bool(finish) or row.future.cancelled()


def _resolve(future: asyncio.Future, completion: Completion) -> None:
    if not future.done():  # its trajectory may have met a deadline
        future.set_result(completion)


def _fail(requests: list[_Request], error: BaseException) -> None:
    for request in requests:
        if not request.future.done():
            request.future.set_exception(error)


def roomy_cache(model_config, block: int = 128):
    """transformers' DynamicCache, growing `block` tokens at a time.

    The original makes a new copy of all keys and values for every token: two thirds of the time for
    50 rows of 250 tokens (dev/log.md). Layers of other kinds (sliding windows) stay as they are.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class RoomyLayer(DynamicLayer):
        stores = (None, None)  # self.keys and self.values are views of the beginning of these

        def update(self, key_states, value_states, *args, **kwargs):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            key_store, value_store = self.stores
            key_store, self.keys = self._append(key_store, self.keys, key_states)
            value_store, self.values = self._append(value_store, self.values, value_states)
            self.stores = key_store, value_store
            return self.keys, self.values

        def _append(self, store, old, new):
            used = old.shape[-2] if old.numel() else 0
            total = used + new.shape[-2]
            # after a row has left the batch, `old` is a tensor of its own and no view of the store
            if store is None or store.data_ptr() != old.data_ptr() or total > store.shape[-2]:
                store = new.new_empty(*new.shape[:-2], total + block, new.shape[-1])
                if used:
                    store[..., :used, :] = old
            store[..., used:total, :] = new
            return store, store[..., :total, :]

    cache = DynamicCache(config=model_config.get_text_config())
    cache.layers = [RoomyLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


def finished(new: list[int], sampling: Sampling, tokenizer) -> str:
    """Why a turn ends after the tokens `new`, or "" if it goes on."""
    if new and new[-1] in sampling.stop_ids:
        return "stop"
    if sampling.stop_strings and new:
        # A token is at least a byte, so the string cannot have begun before this window.
        window = 4 * max(map(len, sampling.stop_strings))
        tail = tokenizer.decode(new[-window:], skip_special_tokens=False)
        if any(string in tail for string in sampling.stop_strings):
            return "stop_string"
    return "length" if len(new) >= sampling.max_new_tokens else ""


def ended(finish_reason: str, stop_reason: int | str | None) -> str:
    """The `finish` of a Completion, of what vLLM says of a turn; RuntimeError if it gave it up."""
    if finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a turn with {finish_reason!r}")
    return "stop_string" if isinstance(stop_reason, str) else finish_reason


class ScriptedEngine:
    """Says what it is told: for tests, and to try a config without a model.

    script: a list of turns, said one after the other whoever asks, or a function (ids, sampling) ->
    turn, for many trajectories at once; it may be async, to be slow. A turn is a list of token ids
    (each with logprob -1), or a Completion. A list is cut where a model would have been stopped.
    `requests` keeps the (ids, sampling) of every call, in order.
    """

    def __init__(self, script: Sequence | Callable, tokenizer=None):
        self.script, self.tokenizer = script, tokenizer
        self.version, self.requests = 0, []

    def join(self) -> None:
        """Nobody waits for anybody here."""

    def leave(self) -> None:
        """Nobody waits for anybody here."""

    async def generate(self, ids: list[int], images: list, sampling: Sampling) -> Completion:
        self.requests.append((list(ids), sampling))
        if callable(self.script):
            turn = self.script(ids, sampling)
            turn = await turn if asyncio.iscoroutine(turn) else turn
        elif len(self.requests) > len(self.script):
            raise IndexError(f"the script has {len(self.script)} turns and one more was asked for")
        else:
            turn = self.script[len(self.requests) - 1]
        if isinstance(turn, Completion):
            return turn
        new, finish = [], ""
        for token in turn:
            new.append(token)
            if finish := finished(new, sampling, self.tokenizer):
                break
        return Completion(new, [-1.0] * len(new), finish or "stop")

    async def score(self, ids: list[int]) -> list[list[float]]:
        return [[-1.0] * (len(ids) - 1)]

    async def sync(self, model, version: int) -> None:
        self.version = version

    async def sleep(self) -> None:
        """It holds no memory."""

    async def wake(self) -> None:
        """It holds no memory."""

    async def close(self) -> None:
        """It holds nothing."""


class Canary:
    """Proves after a sync that the engine samples from the trainer's weights: both score the same
    fixed ids. A sync that was skipped, is half done or has an old adapter ends the run; otherwise
    it would go on, and learn from samples of a policy that is not the one it trains."""

    def __init__(self, ids: list[int], dtype: str):
        self.ids = ids[:512]
        # of means over the ids: float32 rounds by 1e-6, two implementations in bfloat16 by 1e-2
        self.limit = 1e-4 if dtype == "float32" else 0.1
        self.noise, self.before = 1e-6, None  # seen at most; the trainer's own at the last sync

    async def check(self, engine: Engine, model) -> float:
        """The mean difference of their logprobs; UserError if it says that the engine has other
        weights."""
        ids = torch.tensor([self.ids], device=model.device)
        with torch.no_grad():
            mask = torch.ones_like(ids)
            ours = token_logprobs(model, ids, mask, mask)[0][0, 1:].cpu()
        theirs = torch.tensor(await engine.score(self.ids))  # (copies, T - 1)
        theirs = theirs[(theirs - ours).abs().mean(1).nan_to_num(math.inf).argmax()]  # the worst
        difference = (theirs - ours).abs().mean().item()
        advice = "so nothing was learnt from it; canary=false would go on regardless"
        if not difference <= self.limit:  # NaN too
            raise UserError(
                f"sync {engine.version}: the engine's logprobs differ from the trainer's by "
                f"{difference:.2g} on average (rounding makes {self.limit:g} at most): it samples "
                f"from other weights, {advice}"
            )
        if self.before is not None:
            # within the limit, yet far more than rounding, and towards where it was before
            moved = (ours - self.before).abs().mean().item()
            behind = (theirs - self.before).abs().mean().item()
            if moved > 10 * self.noise and behind < difference:
                raise UserError(
                    f"sync {engine.version}: the engine still has the weights before the last "
                    f"update (its logprobs differ by {behind:.2g} from theirs, by "
                    f"{difference:.2g} from the trainer's), {advice}"
                )
        self.noise, self.before = max(self.noise, difference), ours
        return difference


async def synced(engine: Engine, model, version: int, canary: Canary | None) -> dict[str, float]:
    """Syncs, wakes the engine and asks the canary; returns their metrics."""
    started = time.monotonic()
    await engine.sync(model, version)
    await engine.wake()
    seen = {"canary": await canary.check(engine, model)} if canary else {}
    return seen | {"sync_seconds": time.monotonic() - started}


def check(name: str, urls: tuple[str, ...], tune: str) -> None:
    """UserError if an engine cannot be started, as far as that is known in no time. tune: what will
    be synced, "none" for nothing."""
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "engine = 'vllm' needs vLLM: pip install -e \".[vllm]\" on a machine with a GPU; "
            "`make test-vllm` installs the build for CPUs"
        )
    if name == "server" and tune == "full":
        raise UserError("engine = 'server' takes adapters only: use --tune=lora or qlora")
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"urls = {url!r}: expected http://host:port")


async def start(cfg, model, tokenizer) -> Engine:
    """The engine that train_grpo's Config (or one like it) names, before its first sync. model: the
    policy; only the transformers engine and a rounded base (qlora) need it, else it may be None."""
    if cfg.engine == "transformers":
        return TransformersEngine(model, tokenizer, cfg.deterministic)
    if cfg.engine == "server":
        import engine_server

        how = cfg.server_timeout, cfg.max_tokens
        return await engine_server.start(cfg.urls, cfg.model, tokenizer, *how)
    import engine_vllm

    trained = model is not None and any(p.requires_grad for p in model.parameters())
    return await engine_vllm.start(
        cfg.model,
        model,
        cfg.dtype,
        full=trained and cfg.tune == "full",
        lora_r=cfg.lora_r if trained and cfg.tune != "full" else 0,
        sleeps=cfg.sleep and trained,
        tensor_parallel_size=cfg.tensor_parallel_size,
        kv_cache_gib=cfg.kv_cache_gib,
        max_model_len=cfg.max_tokens,
        max_num_seqs=cfg.max_concurrent,
        gpu_memory_utilization=cfg.gpu_memory_utilization,
        enforce_eager=cfg.enforce_eager,
        seed=cfg.seed % 2**32,
    )

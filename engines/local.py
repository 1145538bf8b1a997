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
import random
from dataclasses import dataclass, field

import torch

from engines.base import Completion, Sampling, finished
from run.config import UserError


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
        cache = growing_cache(self.model.config)
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
        cache = growing_cache(self.model.config)
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


def growing_cache(model_config, block: int = 128):
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

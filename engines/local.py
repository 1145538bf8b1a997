"""Samples with the trainer's own model object: a decode loop over the trajectories that wait.

Shapes: B rows in the batch, P distinct prompts of theirs, T tokens, V vocabulary.
"""

import asyncio
import concurrent.futures
import itertools
import random
from dataclasses import dataclass, field

import torch

from engines.base import Completion, Engine, Sampling, finish_reason
from engines.cache import cache_of, may_pad, new_cache, read, select_rows
from learning.batches import pad
from learning.vision import batch_positions, identities, tower_inputs
from run.config import UserError


@dataclass
class _Request:
    """A turn that is asked for: a row of a batch."""

    ids: list[int]  # the prompt
    sampling: Sampling
    future: asyncio.Future  # of its Completion
    rng: random.Random  # its own noise
    images: list = field(default_factory=list)  # the Pictures of its placeholders
    prompt: tuple[int, ...] = ()  # ids with different images told apart: equal ones go as one
    new: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of new


class TransformersEngine(Engine):
    """Samples with the trainer's own model object, so a sync copies nothing.

    The trajectories that wait are gathered into one batch, left-padded, and decoded with a KV
    cache; when a row finishes, its trajectory goes on (runs its tools) at once, and when a quarter
    of the rows have, they leave the batch. Equal prompts (a group) are prefilled once. All calls
    come from one event loop (run/loop.py).

    deterministic=True: a batch is formed only when every unfinished trajectory waits, and in an
    order that does not depend on who came first, so equal seeds give equal bits. False lets fast
    ones go ahead while others wait for a slow tool.
    """

    def __init__(self, model, tokenizer, deterministic: bool = True, max_batch: int = 256):
        self.model = model
        self.tokenizer = tokenizer
        self.deterministic = deterministic
        self.max_batch = max_batch
        self.may_pad = may_pad(model)
        self.unfinished = 0  # trajectories that have joined and not left
        self.waiting: list[_Request] = []
        self.is_decoding = False
        self.thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="decode")

    def join(self) -> None:
        self.unfinished += 1

    def leave(self) -> None:
        self.unfinished -= 1
        self._start_batch()  # the others may have waited only for this one

    async def sync(self, model, version: int) -> None:
        self.model = model
        self.version = version

    async def close(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)
        _fail(self.waiting, RuntimeError("the engine was closed while a turn waited"))

    async def generate(self, ids: list[int], images: list, sampling: Sampling) -> Completion:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        rng = random.Random(sampling.seed)
        prompt = tuple(identities(ids, images))
        request = _Request(ids, sampling, future, rng, images, prompt)
        self.waiting.append(request)
        self._start_batch()
        return await future

    async def prompt_logprobs(self, ids: list[int], images: list = ()) -> list[list[float]]:
        loop = asyncio.get_running_loop()
        logprobs = await loop.run_in_executor(self.thread, self._logprobs_of_prompt, ids, images)
        return [logprobs]  # of the only copy

    @torch.inference_mode()
    def _logprobs_of_prompt(self, ids: list[int], images: list) -> list[float]:
        out, *_ = self._prefill([ids], [images], logits_to_keep=0)
        tokens = torch.tensor([ids], device=self.model.device)  # (1, T)
        logits = out.logits[0, :-1].float()  # (T - 1, V)
        logprobs = logits.log_softmax(-1)
        next_tokens = tokens[0, 1:, None]
        logprobs = logprobs.gather(-1, next_tokens)  # (T - 1, 1)
        return logprobs[:, 0].tolist()

    def _start_batch(self) -> None:
        """Decodes those who wait, unless a batch is running or somebody has to be waited for."""
        # a deadline may have cancelled one
        self.waiting = [request for request in self.waiting if not request.future.done()]
        if self.is_decoding or not self.waiting:
            return
        if self.deterministic and len(self.waiting) < self.unfinished:
            return
        # equal prompts become neighbours, and lengths that differ little share a batch
        batch = sorted(self.waiting, key=lambda row: (len(row.ids), row.prompt, row.sampling.seed))
        loop = asyncio.get_running_loop()
        done = loop.run_in_executor(self.thread, self._run, batch)  # raises if the engine is closed
        self.is_decoding = True
        self.waiting = []
        done.add_done_callback(lambda done: self._batch_done(done, batch))

    def _batch_done(self, done: asyncio.Future, batch: list[_Request]) -> None:
        self.is_decoding = False
        if done.cancelled():
            _fail(batch, RuntimeError("the engine was closed before a turn was sampled"))
        elif done.exception():
            _fail(batch, done.exception())
        self._start_batch()

    def _run(self, batch: list[_Request]) -> None:
        self.model.eval()  # dropout would make other logprobs than the trainer's
        for start in range(0, len(batch), self.max_batch):
            rows = batch[start : start + self.max_batch]
            if self.may_pad:
                self._decode(rows)
                continue
            # of equal lengths: they are sorted
            for _, equal in itertools.groupby(rows, key=lambda row: len(row.ids)):
                self._decode(list(equal))

    @torch.inference_mode()
    def _decode(self, rows: list[_Request]) -> None:
        """Samples all rows to their ends."""
        device = self.model.device

        # 1. prefill each distinct prompt once
        distinct = {row.prompt: row for row in rows}
        prompts = sorted(distinct, key=lambda prompt: (len(prompt), prompt))
        ids = [distinct[prompt].ids for prompt in prompts]
        images = [distinct[prompt].images for prompt in prompts]
        out, attention_mask, positions = self._prefill(ids, images)

        # 2. from a row for each prompt to a row for each request
        prompt_numbers = {prompt: number for number, prompt in enumerate(prompts)}
        of_rows = [prompt_numbers[row.prompt] for row in rows]
        of_rows = torch.tensor(of_rows, device=device)  # (B,)
        cache = select_rows(cache_of(self.model, out), of_rows, len(prompts))
        logits = out.logits[of_rows, -1]  # (B, V)
        attention_mask = attention_mask[of_rows]  # (B, T)
        positions = positions[..., of_rows, -1:]  # (B, 1), or (3, B, 1) where images have a grid

        going_on = list(range(len(rows)))  # the rows that have not ended
        while True:
            # 3. sample the next token of each; rows that have ended, and are still here, get a 0
            index = torch.tensor(going_on, device=device)
            tokens = index.new_zeros(len(rows))  # (B,)
            drawing = [rows[i] for i in going_on]
            tokens[index] = self._sample(logits[index], drawing)

            # 4. where a turn has ended, its trajectory goes on now
            drawn = going_on
            going_on = []
            for i in drawn:
                row = rows[i]
                finish = finish_reason(row.new, row.sampling, self.tokenizer)
                if finish:
                    completion = Completion(row.new, row.logprobs, finish)
                    loop = row.future.get_loop()
                    loop.call_soon_threadsafe(_resolve, row.future, completion)
                elif not row.future.cancelled():
                    going_on.append(i)
            if not going_on:
                return

            # 5. rows that have ended leave: many at a time, because leaving copies the cache
            if len(going_on) <= 0.75 * len(rows):
                index = torch.tensor(going_on, device=device)
                cache = select_rows(cache, index, len(rows))
                tokens = tokens[index]
                attention_mask = attention_mask[index]
                positions = positions[..., index, :]
                rows = [rows[i] for i in going_on]
                going_on = list(range(len(rows)))

            # 6. one more forward
            positions = positions + 1
            column = attention_mask.new_ones(len(rows), 1)
            attention_mask = torch.cat([attention_mask, column], dim=1)
            out = self._forward(tokens[:, None], attention_mask, positions, cache)
            cache = cache_of(self.model, out)
            logits = out.logits[:, -1]  # (B, V)

    def _prefill(self, prompts: list[list[int]], images: list, logits_to_keep: int = 1):
        """Runs P prompts with their Pictures, padded on the left, into a new cache; returns what
        the model gives, the attention mask (P, T) and the positions (P, T) or (3, P, T)."""
        device = self.model.device
        ids = pad(prompts, device=device, on_left=True)  # (P, T)
        ones = [[1] * len(prompt) for prompt in prompts]
        attention_mask = pad(ones, device=device, on_left=True)  # (P, T)
        positions = batch_positions(prompts, images, on_left=True)  # (3, P, T), or None
        if positions is None:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # the first real token is at 0
        positions = positions.to(device)
        cache = new_cache(self.model)
        pixels = tower_inputs([p for pictures in images for p in pictures], device)
        out = self._forward(ids, attention_mask, positions, cache, logits_to_keep, pixels)
        return out, attention_mask, positions

    def _forward(self, ids, attention_mask, positions, cache, logits_to_keep=1, pixels=None):
        return read(self.model, ids, attention_mask, positions, cache, logits_to_keep, pixels)

    def _sample(self, logits: torch.Tensor, rows: list[_Request]) -> torch.Tensor:
        """Draws the next tokens (B,) and appends them to the rows. Each row draws one uniform
        number and inverts its own distribution, so its noise is the same whoever else is in the
        batch. UserError if logits (B, V) are NaN."""
        device = logits.device
        temperatures = [row.sampling.temperature for row in rows]
        temperatures = torch.tensor(temperatures, device=device)
        is_greedy = temperatures == 0
        divisors = torch.where(is_greedy, 1.0, temperatures)
        logits = logits.float() / divisors[:, None]
        logprobs = logits.log_softmax(-1)  # (B, V)

        # in double precision: in single, the tail of a large vocabulary is lost in the sum
        cumulative = logprobs.double().exp().cumsum(-1)
        noise = [row.rng.random() for row in rows]
        noise = torch.tensor(noise, dtype=torch.double, device=device)
        total = cumulative[:, -1]  # not quite 1
        targets = noise * total
        drawn = torch.searchsorted(cumulative, targets[:, None], right=True)
        last_token = logits.shape[-1] - 1
        drawn = drawn[:, 0].clamp(max=last_token)
        greedy = logits.argmax(-1)
        tokens = torch.where(is_greedy, greedy, drawn)

        chosen = logprobs.gather(-1, tokens[:, None])
        chosen = chosen[:, 0]
        if chosen.isnan().any():  # else every next token would be the last of the vocabulary
            raise UserError("the model's logits are NaN: its weights have diverged or are broken")
        samples = zip(rows, tokens.tolist(), chosen.tolist(), strict=True)
        for row, token, logprob in samples:
            row.new.append(token)
            row.logprobs.append(logprob)
        return tokens


def _resolve(future: asyncio.Future, completion: Completion) -> None:
    if not future.done():  # its trajectory may have met a deadline
        future.set_result(completion)


def _fail(requests: list[_Request], error: BaseException) -> None:
    for request in requests:
        if not request.future.done():
            request.future.set_exception(error)

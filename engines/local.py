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
from engines.kept import Beginning, KeptTurns, behind, fill, may_keep
from learning.batches import pad
from learning.vision import batch_positions, identities, image_inputs
from run.config import UserError

BLOCK = 256  # tokens of the vocabulary
LONGEST_WAIT = 10  # times the patience


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
    of the rows have, they leave the batch. Equal prompts (a group) are prefilled once, and a turn
    goes on from the keys and values of the turn before (engines/kept.py), where a cache has them.
    All calls come from one event loop (run/loop.py).

    deterministic=True: a batch is formed only when every unfinished trajectory waits, and in an
    order that does not depend on who came first, so equal seeds give equal bits. False lets fast
    ones go ahead while others wait for a slow tool, when nobody has come for `patience` seconds.
    """

    def __init__(
        self,
        model,
        tokenizer,
        deterministic: bool = True,
        max_batch: int = 256,
        patience: float = 0.0,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.deterministic = deterministic
        self.max_batch = max_batch
        self.patience = patience
        self.timer = None  # of the patience, while a batch waits for others
        self.waits_until = 0.0  # by the loop's clock: no longer than that
        self.may_pad = may_pad(model)
        self.may_keep = self.may_pad and may_keep(model)
        self.unfinished = 0  # trajectories that have joined and not left
        self.waiting: list[_Request] = []
        self.is_decoding = False
        self.kept = KeptTurns(max_batch)
        self.thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="decode")
        share_key_heads()

    def join(self) -> None:
        self.unfinished += 1

    def leave(self) -> None:
        self.unfinished -= 1
        if not self.unfinished:
            self.kept.clear()
        self._start_batch()  # the others may have waited only for this one

    async def sync(self, model, version: int) -> None:
        self.model = model
        self.version = version
        self.kept.clear()  # other weights have other keys and values

    async def settle(self) -> None:
        # what is asked of the thread now comes behind the batch that it decodes, and that one ends
        # with its next token
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self.thread, lambda: None)

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
        *_, logits = self._prefill([ids], [images], logits_to_keep=0)
        tokens = torch.tensor([ids], device=self.model.device)  # (1, T)
        logits = logits[0, :-1].float()  # (T - 1, V)
        logprobs = logits.log_softmax(-1)
        next_tokens = tokens[0, 1:, None]
        logprobs = logprobs.gather(-1, next_tokens)  # (T - 1, 1)
        return logprobs[:, 0].tolist()

    def _start_batch(self, is_late: bool = False) -> None:
        """Decodes those who wait, unless a batch is running or somebody has to be waited for.
        is_late: those who are elsewhere were waited for."""
        # a deadline may have cancelled one
        self.waiting = [request for request in self.waiting if not request.future.done()]
        if self.is_decoding or not self.waiting:
            return
        if len(self.waiting) < self.unfinished and not is_late:
            if self.deterministic or self._waits_for_others():
                return
        # equal prompts become neighbours, and lengths that differ little share a batch
        batch = sorted(self.waiting, key=lambda row: (len(row.ids), row.prompt, row.sampling.seed))
        loop = asyncio.get_running_loop()
        done = loop.run_in_executor(self.thread, self._run, batch)  # raises if the engine is closed
        self.is_decoding = True
        self.waiting = []
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        done.add_done_callback(lambda done: self._batch_done(done, batch))

    def _waits_for_others(self) -> bool:
        """Says whether those who are elsewhere may still come in time: until nobody has come for
        `patience` seconds, or for LONGEST_WAIT times as long. A batch of many takes hardly longer
        than one of few, and who comes too late waits for all of it."""
        if not self.patience:
            return False
        loop = asyncio.get_running_loop()
        if self.timer is None:
            self.waits_until = loop.time() + LONGEST_WAIT * self.patience
        else:
            self.timer.cancel()
        soon = min(loop.time() + self.patience, self.waits_until)
        self.timer = loop.call_at(soon, self._lose_patience)
        return True

    def _lose_patience(self) -> None:
        self.timer = None
        self._start_batch(is_late=True)

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

        # 1. read each distinct prompt once; those that go on from a kept turn apart, because they
        # have little left to read
        distinct = {row.prompt: row for row in rows}
        fresh = []
        kept = []
        beginnings = []
        for prompt in sorted(distinct, key=lambda prompt: (len(prompt), prompt)):
            beginning = self.kept.take(prompt) if self.may_keep else None
            if beginning:
                kept.append(prompt)
                beginnings.append(beginning)
            else:
                fresh.append(prompt)
        readings = []
        if fresh:
            ids = [distinct[prompt].ids for prompt in fresh]
            images = [distinct[prompt].images for prompt in fresh]
            readings.append(self._prefill(ids, images))
        if kept:
            readings.append(self._go_on(kept, beginnings))
        cache, attention_mask, positions, logits = self._join(readings)
        logits = logits[:, -1]  # (P, V)
        positions = positions[..., -1:]  # (P, 1), or (3, P, 1) where images have a grid

        # 2. from a row for each prompt to a row for each request
        prompts = fresh + kept
        prompt_numbers = {prompt: number for number, prompt in enumerate(prompts)}
        of_rows = [prompt_numbers[row.prompt] for row in rows]
        of_rows = torch.tensor(of_rows, device=device)  # (B,)
        cache = select_rows(cache, of_rows, len(prompts))
        logits = logits[of_rows]  # (B, V)
        attention_mask = attention_mask[of_rows]  # (B, T)
        positions = positions[..., of_rows, :]  # (B, 1), or (3, B, 1)
        is_kept = self.may_keep and self.unfinished > 0  # else nobody says when all have ended

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
                    if is_kept and finish != "length" and not row.images:
                        # the last token was sampled, but not read
                        self.kept.keep(row.ids + row.new[:-1], cache, i, attention_mask[i])
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

    def _prefill(self, prompts: list[list[int]], images: list, logits_to_keep: int = 1) -> tuple:
        """Reads P prompts with their Pictures, padded on the left. Returns the cache, the attention
        mask (P, T), the positions (P, T) or (3, P, T), and the logits (P, 1 or all, V)."""
        device = self.model.device
        ids = pad(prompts, device=device, on_left=True)  # (P, T)
        ones = [[1] * len(prompt) for prompt in prompts]
        attention_mask = pad(ones, device=device, on_left=True)  # (P, T)
        positions = batch_positions(prompts, images, on_left=True)  # (3, P, T), or None
        if positions is None:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # the first real token is at 0
        positions = positions.to(device)
        cache = new_cache(self.model)
        pixels = image_inputs(self.model, [p for pictures in images for p in pictures], device)
        out = self._forward(ids, attention_mask, positions, cache, logits_to_keep, pixels)
        return cache_of(self.model, out), attention_mask, positions, out.logits

    def _go_on(self, prompts: list[tuple[int, ...]], beginnings: list[Beginning]) -> tuple:
        """Reads what P prompts have behind their beginnings; returns what `_prefill` does."""
        new = []
        for prompt, beginning in zip(prompts, beginnings, strict=True):
            new.append(prompt[beginning.length :])
        lengths = [beginning.length for beginning in beginnings]
        ids, attention_mask, positions = behind(lengths, new, self.model.device)
        cache = fill(new_cache(self.model), [beginning.layers for beginning in beginnings])
        out = self._forward(ids, attention_mask, positions, cache)
        return cache_of(self.model, out), attention_mask, positions, out.logits

    def _join(self, readings: list[tuple]) -> tuple:
        """Makes one batch of those that were read apart, at most two."""
        if len(readings) == 1:
            return readings[0]
        parts = []
        masks = []
        for cache, attention_mask, _, _ in readings:
            parts.append([(layer.keys, layer.values) for layer in cache.layers])
            masks += attention_mask.tolist()
        cache = fill(new_cache(self.model), parts)
        attention_mask = pad(masks, device=self.model.device, on_left=True)
        last = [positions[..., -1:] for _, _, positions, _ in readings]
        if last[0].dim() == 3:  # those that go on have no images: all three are the same
            last[1] = last[1].expand(3, -1, 1)
        logits = torch.cat([logits[:, -1:] for _, _, _, logits in readings])
        return cache, attention_mask, torch.cat(last, dim=-2), logits

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
        top, greedy = logits.max(-1)
        exponentials = (logits - top[:, None]).exp_()

        # in double precision: in single, the tail of a large vocabulary is lost in the sum. First
        # to a block of tokens, then to a token of it, which spares most of that
        blocks = torch.nn.functional.pad(exponentials, (0, -logits.shape[-1] % BLOCK))
        blocks = blocks.unflatten(-1, (-1, BLOCK))  # (B, V / BLOCK, BLOCK)
        cumulative = blocks.sum(-1, dtype=torch.double).cumsum(-1)  # (B, V / BLOCK)
        noise = [row.rng.random() for row in rows]
        noise = torch.tensor(noise, dtype=torch.double, device=device)
        total = cumulative[:, -1]
        if total.isnan().any():
            raise UserError("the model's logits are NaN: its weights have diverged or are broken")
        targets = (noise * total)[:, None]
        block = torch.searchsorted(cumulative, targets, right=True)
        block = block.clamp(max=cumulative.shape[-1] - 1)  # (B, 1)
        every = torch.arange(len(rows), device=device)
        block_sums = blocks[every, block[:, 0]].double().cumsum(-1)  # (B, BLOCK)
        block_total = block_sums[:, -1:]
        targets = targets - (cumulative.gather(-1, block) - block_total)
        # rounding must not lead outside of the block, to a token without probability
        targets = targets.clamp(min=0).minimum(block_total * (1 - 1e-12))
        offset = torch.searchsorted(block_sums, targets, right=True)
        drawn = (block * BLOCK + offset)[:, 0]
        tokens = torch.where(is_greedy, greedy, drawn)

        chosen = logits.gather(-1, tokens[:, None])[:, 0]
        chosen = chosen - top - total.log().float()
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


def share_key_heads() -> None:
    """Has transformers' "sdpa" attention read the keys of several query heads in place, on a CPU.

    Where there is padding it copies them for every query head first, for every token that is
    sampled: a third of the time for 32 rows of 140 tokens. The products are the same to the bit. On
    a GPU that copy is right, as the quick kernel wants it.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attention(module, query, key, value, attention_mask, scaling=None, **options):
        shares_heads = key.shape[1] < query.shape[1] and attention_mask is not None
        is_plain = not any(options.get(name) for name in ("dropout", "cache"))
        is_plain = is_plain and options.get("position_bias") is None
        # in training, theirs: its gradient is what the tests compare with TRL's
        is_sampling = query.device.type == "cpu" and not torch.is_grad_enabled()
        if not (shares_heads and is_plain and is_sampling):
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, **options
            )
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attention_mask, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("sdpa", attention)

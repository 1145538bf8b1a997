"""An engine that says what it is told: for tests, and to try a config without a model."""

import asyncio
from collections.abc import Callable, Sequence

from engines.base import Completion, Engine, Sampling, finish_reason


class ScriptedEngine(Engine):
    """Says what it is told.

    script: a list of turns, said one after the other whoever asks, or a function (ids, sampling) ->
    turn, for many trajectories at once; it may be async, to be slow. A turn is a list of token ids
    (each with logprob -1), or a Completion. A list is cut where a model would have been stopped.
    `requests` keeps the (ids, sampling) of every call, in order.
    """

    def __init__(self, script: Sequence | Callable, tokenizer=None):
        self.script = script
        self.tokenizer = tokenizer
        self.requests = []

    async def generate(self, ids: list[int], images: list, sampling: Sampling) -> Completion:
        self.requests.append((list(ids), sampling))
        turn = await self._next_turn(ids, sampling)
        if isinstance(turn, Completion):
            return turn
        new = []
        finish = ""
        for token in turn:
            new.append(token)
            finish = finish_reason(new, sampling, self.tokenizer)
            if finish:
                break
        return Completion(new, [-1.0] * len(new), finish or "stop")

    async def _next_turn(self, ids: list[int], sampling: Sampling):
        if callable(self.script):
            turn = self.script(ids, sampling)
            if asyncio.iscoroutine(turn):
                turn = await turn
            return turn
        if len(self.requests) > len(self.script):
            raise IndexError(f"the script has {len(self.script)} turns and one more was asked for")
        return self.script[len(self.requests) - 1]

    async def prompt_logprobs(self, ids: list[int], images: list = ()) -> list[list[float]]:
        return [[-1.0] * (len(ids) - 1)]

    async def sync(self, model, version: int) -> None:
        self.version = version

"""An engine that says what it is told: for tests, and to try a config without a model."""

import asyncio
from collections.abc import Callable, Sequence

from engines.base import Completion, Sampling, finished


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

"""What every engine is: token ids in, token ids out."""

from dataclasses import dataclass
from typing import Protocol


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

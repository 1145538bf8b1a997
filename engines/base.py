"""What every engine is: token ids in, token ids out.

    completion = await engine.generate(ids, images, sampling)

`engines.local` needs no extra install: a decode loop over the trajectories that wait. It is the
default on a CPU and for the tiny tasks. `engines.vllm` has vLLM beside the trainer,
`engines.servers` vLLM servers elsewhere. `engines.scripted` says what a test tells it to, so that
loop, masks and loss are testable in milliseconds. `engines.canary` proves after every sync that an
engine samples from the trainer's weights.
"""

import importlib.util
from dataclasses import dataclass

from run.config import UserError


@dataclass(frozen=True)
class Sampling:
    """How one turn is sampled. The whole distribution is sampled from: there is no top_p, top_k or
    penalty, because the logprobs of a cut distribution are not those that the loss computes."""

    temperature: float = 1.0  # 0 = greedy; its logprobs are those at temperature 1
    max_new_tokens: int = 256
    seed: int = 0  # of this one turn; no other turn's noise depends on it, nor it on theirs
    stop_ids: tuple[int, ...] = ()  # a sampled stop token ends the turn and is part of it
    stop_strings: tuple[str, ...] = ()  # text formats; the ids that made the string stay as sampled
    session: int = 0  # the same for all turns of a group: which server has their beginning cached


@dataclass
class Completion:
    """One sampled turn."""

    ids: list[int]  # as sampled, the stop token included
    logprobs: list[float]  # of each, at the temperature used
    finish: str  # "stop" (a stop token), "stop_string", or "length"


class Engine:
    """Samples turns. An engine gives generate, prompt_logprobs and sync; the rest of it does
    nothing by default."""

    version: int = 0  # of the weights it samples from

    async def generate(self, ids: list[int], images: list, sampling: Sampling) -> Completion:
        """Samples the turn that follows the prompt `ids`."""
        raise NotImplementedError(f"{type(self).__name__} cannot sample")

    async def prompt_logprobs(self, ids: list[int], images: list = ()) -> list[list[float]]:
        """Computes the logprobs of ids[1:] at temperature 1, once for each copy of the weights:
        several servers have several, so the result is (copies, T - 1). images: the Pictures of the
        placeholders in ids."""
        raise NotImplementedError(f"{type(self).__name__} cannot compute logprobs")

    async def sync(self, model, version: int) -> None:
        """Takes over the weights of `model`: from now on, it samples from them."""
        raise NotImplementedError(f"{type(self).__name__} cannot take weights")

    @property
    def has_died(self) -> bool:
        """Says whether it can answer nothing any more, as its process is gone."""
        return False

    def join(self) -> None:
        """Hears that a trajectory starts, which will call generate."""

    def leave(self) -> None:
        """Hears that a trajectory has ended: no batch needs to wait for it any more."""

    async def settle(self) -> None:
        """Waits until nothing is sampled any more, where trajectories were given up."""

    async def sleep(self) -> None:
        """Gives the GPU's memory to the trainer."""

    async def wake(self) -> None:
        """Takes it back."""

    async def close(self) -> None:
        """Gives back all it holds."""


def check_engine(name: str, urls: tuple[str, ...]) -> None:
    """Checks, before anything slow, that the engine can be started, as far as that is known then.
    UserError if it cannot."""
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "engine = 'vllm' needs vLLM: pip install -e \".[vllm]\" on a machine with a GPU; "
            "`make test-vllm` installs the build for CPUs"
        )
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"urls = {url!r}: expected http://host:port")


def finish_reason(new: list[int], sampling: Sampling, tokenizer) -> str:
    """Says why a turn ends after the tokens `new`; "" if it goes on."""
    if new and new[-1] in sampling.stop_ids:
        return "stop"
    if new and sampling.stop_strings:
        # A token is at least a byte, so the string cannot have begun before this window.
        window = 4 * max(len(string) for string in sampling.stop_strings)
        tail = tokenizer.decode(new[-window:], skip_special_tokens=False)
        if any(string in tail for string in sampling.stop_strings):
            return "stop_string"
    if len(new) >= sampling.max_new_tokens:
        return "length"
    return ""


def turn_end(vllm_finish: str, vllm_stop: int | str | None) -> str:
    """Turns what vLLM says of the end of a turn (its finish_reason and stop_reason) into
    Completion.finish. RuntimeError if it gave the turn up."""
    if vllm_finish not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a turn with {vllm_finish!r}")
    if isinstance(vllm_stop, str):
        return "stop_string"
    return vllm_finish

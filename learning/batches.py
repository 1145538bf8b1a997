"""Trajectories to micro-batches: little padding, a repeated prompt only once."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile

import torch


def pad(sequences: list[list], value=0, dtype=torch.long, device="cpu") -> torch.Tensor:
    """(B, T), padded on the right."""
    width = max(map(len, sequences), default=0)
    rows = [list(s) + [value] * (width - len(s)) for s in sequences]
    return torch.tensor(rows, dtype=dtype, device=device).reshape(len(rows), width)


def micro_batches(
    lengths: list[int], token_budget: int, prompts: list[tuple] | None = None
) -> list[list[int]]:
    """Indices in batches of at most token_budget tokens, padding counted. A sequence longer than
    the budget is a batch of its own. prompts: what the sequences begin with; a batch may need to
    hold equal ones only once (see hidden_states).

    Sorted by what follows the prompt, so that little is padded, or else prompt by prompt, the
    longest sequence first: whatever is fewer tokens in all.
    """
    prompts = prompts or [()] * len(lengths)
    longest: dict[tuple, int] = {}  # of the sequences of each prompt
    for length, prompt in zip(lengths, prompts, strict=True):
        longest[prompt] = max(length, longest.get(prompt, 0))
    names = {prompt: i for i, prompt in enumerate(longest)}  # compared sooner than long tuples
    rows = [(n, len(p), names[p]) for n, p in zip(lengths, prompts, strict=True)]
    by_rest = sorted(range(len(rows)), key=lambda i: (len(prompts[i]) - lengths[i], i))
    by_prompt = sorted(by_rest, key=lambda i: (-longest[prompts[i]], prompts[i]))
    ways = [_filled(order, rows, token_budget) for order in (by_rest, by_prompt)]
    return min(ways, key=lambda way: way[0])[1]


def _filled(order: list[int], rows: list[tuple], token_budget: int) -> tuple[int, list[list[int]]]:
    """(tokens in all, batches): each takes rows in this order for as long as there is room."""
    total, batches = 0, []
    while order:
        counts = (count for count, _ in tokens_through_layers(rows[i] for i in order))
        fits = list(takewhile(lambda count: count <= token_budget, counts)) or [rows[order[0]][0]]
        batches.append(order[: len(fits)])
        total, order = total + fits[-1], order[len(fits) :]
    return total, batches


def tokens_through_layers(rows: Iterable[tuple]) -> Iterator[tuple[int, bool]]:
    """Of the first 1, 2, ... rows as one batch: how many tokens go through the layers, padding
    counted, and whether prompts that repeat go through them once. They do where that spares a fifth
    of the tokens: else it is not worth its copies. rows: (length, length of its prompt, prompt)."""
    seen, longest, rest, width, real, spared = set(), 0, 0, 0, 0, 0
    for count, (length, start, prompt) in enumerate(rows, 1):
        longest, width, rest = max(longest, length), max(width, start), max(rest, length - start)
        real, spared = real + length, spared + (start if prompt in seen else 0)
        seen.add(prompt)
        apart, shared = count * longest, len(seen) * width + count * rest
        shares = 5 * spared >= real and shared < apart
        yield (shared if shares else apart), shares


@dataclass
class Batch:
    """Trajectories of one forward pass as tensors, padded on the right with zeros: B trajectories,
    T tokens of the longest."""

    ids: torch.Tensor  # (B, T)
    attention_mask: torch.Tensor  # (B, T) 1: a token, 0: padding
    mask: torch.Tensor  # (B, T) 1: sampled by the policy
    sampled_logprobs: torch.Tensor  # (B, T) of the engine that sampled
    advantages: torch.Tensor  # (B, T) of the turn that a token is of
    weights: torch.Tensor  # (B,) what each token of a trajectory counts in the loss
    old_logprobs: torch.Tensor | None  # (B, T) before the first update; None: this is that update
    ref_logprobs: torch.Tensor | None  # (B, T) of the reference; None without one

    @classmethod
    def of(cls, trajectories: list, device="cpu") -> "Batch":
        """Makes the tensors. trajectories: with their advantages and weights."""
        lengths = [[1] * len(t.ids) for t in trajectories]
        advantages = [token_advantages(t) for t in trajectories]
        return cls(
            ids=pad([t.ids for t in trajectories], device=device),
            attention_mask=pad(lengths, device=device),
            mask=pad([t.mask for t in trajectories], device=device),
            sampled_logprobs=pad([t.logprobs for t in trajectories], 0.0, torch.float32, device),
            advantages=pad(advantages, 0.0, torch.float32, device),
            weights=torch.tensor([t.weight for t in trajectories], device=device),
            old_logprobs=stack([t.old_logprobs for t in trajectories]),
            ref_logprobs=stack([t.ref_logprobs for t in trajectories]),
        )


def token_advantages(trajectory) -> list[float]:
    """Spreads the advantages of the turns over the (T,) tokens: those of a turn and of the results
    of its calls have the turn's, those of the prompt 0."""
    ends = [*trajectory.turn_starts[1:], len(trajectory.ids)]
    prompt_length = trajectory.turn_starts[0] if trajectory.turn_starts else len(trajectory.ids)
    spread = [0.0] * prompt_length
    for advantage, start, end in zip(
        trajectory.advantages, trajectory.turn_starts, ends, strict=False
    ):
        spread += [advantage] * (end - start)
    return spread


def stack(rows: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Stacks (T,) tensors as (B, T), padded on the right with 0; None if there are none."""
    if any(row is None for row in rows):
        return None
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

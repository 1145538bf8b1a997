"""Trajectories to micro-batches: little padding, a repeated prompt only once."""

from collections.abc import Iterable, Iterator
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

"""Trajectories to micro-batches: little padding, a repeated prompt only once."""

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from learning.vision import batch_positions, identities


class Sequence(NamedTuple):
    """What is asked of a sequence to find its micro-batch. Lengths are in tokens."""

    length: int  # of all, its prompt included
    prompt_length: int
    prompt: Hashable  # equal where sequences begin alike
    patches: int = 0  # of all its images: they go through the tower
    prompt_patches: int = 0  # of those in its prompt


def pad(
    sequences: list, value=0, dtype=torch.long, device="cpu", on_left: bool = False
) -> torch.Tensor:
    """Makes one tensor (B, T) of B sequences, padded with `value` on the right, or on the left: so
    that what follows them is adjacent."""
    width = max(map(len, sequences), default=0)
    rows = []
    for sequence in sequences:
        padding = [value] * (width - len(sequence))
        if on_left:
            rows.append([*padding, *sequence])
        else:
            rows.append([*sequence, *padding])
    # of no rows torch would make the shape (0,)
    return torch.tensor(rows, dtype=dtype, device=device).reshape(len(rows), width)


def micro_batches(
    lengths: list[int],
    token_budget: int,
    prompts: list[tuple] | None = None,
    patches: list[tuple[int, int]] | None = None,
) -> list[list[int]]:
    """Cuts sequences into batches of at most token_budget tokens, padding counted; returns the
    indices of each. A sequence longer than the budget is a batch of its own. prompts: what the
    sequences begin with; a batch may need to hold equal ones only once (see hidden_states).
    patches: of the images of each sequence, all and those in its prompt: a patch that goes through
    the tower counts as a token.

    Sorted by what follows the prompt, so that little is padded, or else prompt by prompt, the
    longest sequence first: whatever is fewer tokens in all.
    """
    if prompts is None:
        prompts = [()] * len(lengths)
    if patches is None:
        patches = [(0, 0)] * len(lengths)
    longest: dict[tuple, int] = {}  # prompt: tokens of the longest sequence that begins with it
    for length, prompt in zip(lengths, prompts, strict=True):
        longest[prompt] = max(length, longest.get(prompt, 0))

    # numbers stand for the prompts: they are compared sooner than long tuples
    number_of = {prompt: number for number, prompt in enumerate(longest)}
    sequences = []
    for length, prompt, of_images in zip(lengths, prompts, patches, strict=True):
        sequences.append(Sequence(length, len(prompt), number_of[prompt], *of_images))

    # the longest continuation first
    by_continuation = sorted(range(len(lengths)), key=lambda i: len(prompts[i]) - lengths[i])
    # the prompt of the longest sequence first
    by_prompt = sorted(by_continuation, key=lambda i: (-longest[prompts[i]], prompts[i]))
    tokens_apart, batches_apart = _fill(by_continuation, sequences, token_budget)
    tokens_by_prompt, batches_by_prompt = _fill(by_prompt, sequences, token_budget)
    if tokens_by_prompt < tokens_apart:
        return batches_by_prompt
    return batches_apart


def _fill(
    order: list[int], sequences: list[Sequence], token_budget: int
) -> tuple[int, list[list[int]]]:
    """Cuts `order` into batches, each as long as there is room; returns how many tokens they are
    in all, and the batches."""
    total_tokens = 0
    batches = []
    while order:
        # the first fits in any case: one that is longer than the budget is alone
        size = 1
        tokens = sequences[order[0]].length + sequences[order[0]].patches
        counts = tokens_through_layers(sequences[i] for i in order)
        for next_size, (next_tokens, _) in enumerate(counts, 1):
            if next_tokens > token_budget:
                break
            size = next_size
            tokens = next_tokens
        batches.append(order[:size])
        order = order[size:]
        total_tokens += tokens
    return total_tokens, batches


def tokens_through_layers(sequences: Iterable[Sequence]) -> Iterator[tuple[int, bool]]:
    """Counts, of the first 1, 2, ... sequences as one batch, the tokens that go through the layers,
    padding and patches of images included; and says whether prompts that repeat go through them
    once. They do where that spares a fifth of the tokens: else it is not worth its copies."""
    prompts = set()  # the different ones so far
    longest_sequence = 0  # tokens
    longest_prompt = 0  # tokens
    longest_continuation = 0  # tokens of a sequence behind its prompt
    real_tokens = 0  # of all sequences, without padding
    repeated_tokens = 0  # of those: in prompts that were there before
    patches = 0  # of all images
    repeated_patches = 0  # of those: in prompts that were there before
    for count, sequence in enumerate(sequences, 1):
        continuation = sequence.length - sequence.prompt_length
        longest_sequence = max(longest_sequence, sequence.length)
        longest_prompt = max(longest_prompt, sequence.prompt_length)
        longest_continuation = max(longest_continuation, continuation)
        real_tokens += sequence.length
        patches += sequence.patches
        if sequence.prompt in prompts:
            repeated_tokens += sequence.prompt_length
            repeated_patches += sequence.prompt_patches
        prompts.add(sequence.prompt)

        # padded to the longest: whole sequences, or each prompt once and all continuations
        tokens_apart = count * longest_sequence + patches
        tokens_shared = len(prompts) * longest_prompt + count * longest_continuation
        tokens_shared += patches - repeated_patches
        spares_a_fifth = 5 * (repeated_tokens + repeated_patches) >= real_tokens + patches
        if spares_a_fifth and tokens_shared < tokens_apart:
            yield tokens_shared, True
        else:
            yield tokens_apart, False


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
    images: list | None  # the Pictures of each row, in the order of ids; None: there are none
    position_ids: torch.Tensor | None  # (3, B, T) where images have rows and columns; else None

    @classmethod
    def of(cls, trajectories: list, device="cpu") -> "Batch":
        """Makes the tensors. trajectories: with their advantages and weights."""
        lengths = [[1] * len(t.ids) for t in trajectories]
        advantages = [token_advantages(t) for t in trajectories]
        images = images_of(trajectories)
        return cls(
            ids=pad([t.ids for t in trajectories], device=device),
            attention_mask=pad(lengths, device=device),
            mask=pad([t.mask for t in trajectories], device=device),
            sampled_logprobs=pad([t.logprobs for t in trajectories], 0.0, torch.float32, device),
            advantages=pad(advantages, 0.0, torch.float32, device),
            weights=torch.tensor([t.weight for t in trajectories], device=device),
            old_logprobs=stack([t.old_logprobs for t in trajectories]),
            ref_logprobs=stack([t.ref_logprobs for t in trajectories]),
            images=images,
            position_ids=position_ids([t.ids for t in trajectories], images, device),
        )


def images_of(rows: list) -> list | None:
    """Lists the Pictures of each row (a trajectory or a demonstration); None if there are none."""
    if not any(row.images for row in rows):
        return None
    return [row.images for row in rows]


def position_ids(ids: list[list[int]], images: list | None, device) -> torch.Tensor | None:
    """Computes the (3, B, T) positions of rows padded on the right; None where those of text do:
    whoever takes them makes these from the attention mask."""
    if images is None:
        return None
    positions = batch_positions(ids, images)
    return None if positions is None else positions.to(device)


def told_apart(rows: list) -> list[list[int]]:
    """Returns the ids of each row with the placeholders of different images told apart."""
    return [identities(row.ids, row.images) for row in rows]


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

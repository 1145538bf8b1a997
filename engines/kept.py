"""What is kept of a trajectory from one turn to the next: the keys and values of all it has read.

Its next turn then reads only what is new, the result of a call, and not the whole context again.

Shapes: B rows of a batch, T tokens, H heads of keys, D numbers a head.
"""

from dataclasses import dataclass

import torch

from engines.cache import cache_of, new_cache, probe_ids, read, relative_difference, tolerance
from learning.batches import pad


@dataclass
class Beginning:
    """The tokens that a context begins with, as the layers have read them."""

    length: int  # in tokens
    layers: list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each layer, (1, H, T, D)


class KeptTurns:
    """The contexts of turns that have ended, by their ids.

    most: so many at a time, then the oldest goes. One that a turn goes on from is given away, as
    its own end will be kept.
    """

    def __init__(self, most: int):
        self.most = most
        self.beginnings: dict[tuple[int, ...], Beginning] = {}

    def keep(self, ids: list[int], cache, row: int, attention_mask: torch.Tensor) -> None:
        """Keeps a row of a cache, that has read `ids`. attention_mask: of that row, (T,)."""
        columns = attention_mask.nonzero()[:, 0]  # without the padding
        layers = []
        for layer in cache.layers:
            keys = layer.keys[row : row + 1].index_select(2, columns)
            values = layer.values[row : row + 1].index_select(2, columns)
            layers.append((keys, values))
        self.beginnings.pop(tuple(ids), None)
        if len(self.beginnings) >= self.most:
            oldest = next(iter(self.beginnings))
            del self.beginnings[oldest]
        self.beginnings[tuple(ids)] = Beginning(len(ids), layers)

    def take(self, ids: tuple[int, ...]) -> Beginning | None:
        """Gives away the longest context that `ids` begin with, and go on from by at least one
        token; None if there is none."""
        lengths = {len(known) for known in self.beginnings}
        for length in sorted(lengths, reverse=True):
            if length < len(ids) and ids[:length] in self.beginnings:
                return self.beginnings.pop(ids[:length])
        return None

    def clear(self) -> None:
        self.beginnings = {}


def may_keep(model) -> bool:
    """Finds out, on a few tokens, whether turns can go on from what is kept.

    False where a cache holds a window or a state instead of all keys and values, and where the
    holes between what a row had and what is new to it are not hidden: some models count columns
    instead of positions."""
    from transformers.cache_utils import DynamicCache

    cache = new_cache(model)
    if not isinstance(cache, DynamicCache):
        return False
    if not all(type(layer).__name__ == "GrowingLayer" for layer in cache.layers):
        return False
    try:
        return _difference(model, cache) <= tolerance(model)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of whatever kind: a family's own code may not be made for this
        return False


@torch.inference_mode()
def _difference(model, cache) -> float:
    """Compares the logits of two rows that go on by 1 and by 5 tokens with those that each has
    alone, without a cache; see engines.cache.relative_difference."""
    known = [probe_ids(model, 4, seed=0), probe_ids(model, 9, seed=1)]
    new = [probe_ids(model, 1, seed=2), probe_ids(model, 5, seed=3)]
    device = model.device

    # 1. as a batch
    known_mask = pad([[1] * len(ids) for ids in known], device=device, on_left=True)
    positions = (known_mask.cumsum(1) - 1).clamp(min=0)
    out = read(model, pad(known, device=device, on_left=True), known_mask, positions, cache)
    ids, attention_mask, positions = behind([len(ids) for ids in known], new, device)
    out = read(model, ids, attention_mask, positions, cache_of(model, out))

    # 2. each alone
    largest = 0.0
    for known_ids, new_ids, together in zip(known, new, out.logits, strict=True):
        ids = torch.tensor([known_ids + new_ids], device=device)
        alone = model(input_ids=ids, use_cache=False).logits[0, -1:]
        largest = max(largest, relative_difference(together[-1:], alone))
    return largest


def behind(lengths: list[int], new: list, device) -> tuple:
    """Makes the inputs of rows that go on: the new ids (P, N), the mask (P, known + N) and the
    positions (P, N). lengths: how many tokens of each are known.

    Padded on the left is both what is known and what is new: between them are holes, which the mask
    hides."""
    known_mask = pad([[1] * length for length in lengths], device=device, on_left=True)
    new_mask = pad([[1] * len(ids) for ids in new], device=device, on_left=True)
    attention_mask = torch.cat([known_mask, new_mask], dim=1)
    positions = known_mask.sum(1, keepdim=True) + new_mask.cumsum(1) - 1
    positions = positions.clamp(min=0)
    return pad(new, device=device, on_left=True), attention_mask, positions


def fill(cache, parts: list[list[tuple[torch.Tensor, torch.Tensor]]]):
    """Fills an empty cache with the rows of all parts, one below the other, and returns it. Their
    last columns are side by side; what a short one lacks on the left is 0. parts: of each the keys
    and values of every layer, (B, H, T, D)."""
    for number in range(len(parts[0])):
        keys = _below([part[number][0] for part in parts])
        values = _below([part[number][1] for part in parts])
        cache.update(keys, values, number)
    return cache


def _below(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Puts tensors (B, H, T, D) one below the other, T padded on the left."""
    width = max(tensor.shape[2] for tensor in tensors)
    rows = sum(len(tensor) for tensor in tensors)
    _, heads, _, size = tensors[0].shape
    whole = tensors[0].new_zeros(rows, heads, width, size)
    first = 0
    for tensor in tensors:
        whole[first : first + len(tensor), :, width - tensor.shape[2] :] = tensor
        first += len(tensor)
    return whole

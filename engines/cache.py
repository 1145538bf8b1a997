"""Caches: what a model keeps of the tokens that it has read, with one part for each row.

Keys and values, windows, recurrent and convolutional states: whatever class of transformers holds
them, a cache is an object whose tensors have a row for each row of the batch in front.

Shapes: B rows, T tokens, V vocabulary.
"""

import functools
import inspect

import torch

from learning.batches import pad
from run.config import UserError

# What models call the cache that they take and return.
CACHE_NAMES = ("past_key_values", "cache_params", "state")
# How much logits may differ from those of a row alone: root mean square, in parts of how much they
# differ among themselves. Seen: 1e-6 in float32, 0.02 in bfloat16; 0.2 and more if padding leaks
# into a state, 0.5 and more if a cache does not hold what it should.
EXACT = 1e-4
ROUNDED = 0.1
WRONG = 0.3


def plain_model(model):
    """Returns the model below an adapter, or the model itself."""
    return model.get_base_model() if getattr(model, "peft_config", None) else model


def cache_name(model) -> str:
    """Returns the argument by which a model takes its cache. UserError if it takes none."""
    return _cache_name(type(plain_model(model)))


@functools.cache
def _cache_name(model_class: type) -> str:
    arguments = inspect.signature(model_class.forward).parameters
    for name in CACHE_NAMES:
        if name in arguments:
            return name
    raise UserError(
        f"engine = 'transformers' cannot sample from a {model_class.__name__}, which keeps nothing "
        "of the tokens that it has read: use engine=vllm, or give a model of another family"
    )


def new_cache(model):
    """Makes an empty cache; None where the model makes its own in its first forward pass."""
    base = plain_model(model)
    if not base._supports_default_dynamic_cache():
        return None
    return growing_cache(base.config)


def growing_cache(model_config, block: int = 128):
    """Makes transformers' DynamicCache, but growing `block` tokens at a time.

    The original makes a new copy of all keys and values for every token: two thirds of the time for
    50 rows of 250 tokens (dev/log.md). Layers of other kinds (sliding windows) stay as they are.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class GrowingLayer(DynamicLayer):
        # with room at the end; self.keys and self.values are views of the beginning of these
        key_store = None
        value_store = None

        def update(self, key_states, value_states, *args, **kwargs):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.key_store = self._append(self.key_store, self.keys, key_states)
            self.value_store = self._append(self.value_store, self.values, value_states)
            total = self.get_seq_length() + key_states.shape[-2]
            self.keys = self.key_store[..., :total, :]
            self.values = self.value_store[..., :total, :]
            return self.keys, self.values

        def _append(self, store, old, new):
            """Puts `new` behind `old` into the store, or into a larger one; returns that."""
            used = old.shape[-2] if old.numel() else 0
            total = used + new.shape[-2]
            # after a row has left the batch, `old` is a tensor of its own and no view of the store
            is_view = store is not None and store.data_ptr() == old.data_ptr()
            if not is_view or total > store.shape[-2]:
                shape = list(new.shape)
                shape[-2] = total + block
                store = new.new_empty(shape)
                if used:
                    store[..., :used, :] = old
            store[..., used:total, :] = new
            return store

        def batch_select_indices(self, indices):
            # else select_rows would copy the room, too
            self.key_store = None
            self.value_store = None
            super().batch_select_indices(indices)

    cache = DynamicCache(config=model_config.get_text_config())
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = GrowingLayer()
    return cache


def select_rows(part, index: torch.Tensor, rows: int):
    """Returns a cache, or a part of one, with the rows of `index` (B,) only; those of an object
    are changed in place. rows: how many it has now.

    transformers' own batch_select_indices is missing where a layer holds a state. Here every
    tensor that is found is indexed, whatever it is called: one without rows in front is an error.
    """
    if isinstance(part, torch.Tensor):
        if part.dim() == 0 or part.numel() == 0:  # a setting, or not filled yet
            return part
        assert part.shape[0] == rows, f"a cache with a tensor {tuple(part.shape)} of {rows} rows"
        return part.index_select(0, index)
    if isinstance(part, dict):
        return {name: select_rows(value, index, rows) for name, value in part.items()}
    if isinstance(part, list | tuple):
        return type(part)(select_rows(value, index, rows) for value in part)
    if type(part).__name__ == "GrowingLayer":
        part.batch_select_indices(index)
    elif _is_of_a_cache(part):
        for name, value in vars(part).items():
            setattr(part, name, select_rows(value, index, rows))
    return part


def _is_of_a_cache(part) -> bool:
    """Says whether an object is a cache or a layer of one, and no setting of it."""
    from transformers import PreTrainedConfig

    is_theirs = type(part).__module__.startswith(("transformers.", __name__))
    return is_theirs and not isinstance(part, PreTrainedConfig)


def read(
    model,
    ids,
    attention_mask,
    positions,
    cache,
    logits_to_keep: int = 1,
    pixels: dict | None = None,
):
    """Runs one forward pass of ids (B, T) behind what the cache holds. Returns the model's output:
    its logits (B, T, V) of the last `logits_to_keep` tokens (0: of all), and cache_of(model, it).
    attention_mask: (B, past + T). pixels: the tower's inputs, where there are images in ids."""
    inputs = {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "position_ids": positions,
        "use_cache": True,
        "logits_to_keep": logits_to_keep,
        **(pixels or {}),
    }
    name = cache_name(model)
    inputs[name] = cache
    has_attention = name == "past_key_values"
    if not has_attention and attention_mask.shape[1] > ids.shape[1]:
        # Mamba would take it for a mask of the new tokens; none of these is padding
        inputs["attention_mask"] = None
    return model(**inputs)


def cache_of(model, out):
    """Returns the cache in a model's output."""
    cache = out.get(cache_name(model))
    assert cache is not None, "it keeps its states in its layers"  # RecurrentGemma
    return cache


# -- may rows be padded?


def may_pad(model) -> bool:
    """Finds out, on a few tokens, whether rows of different lengths can be read as one batch.

    True: padded on the left they have the logits that each has alone. False: padding leaks into a
    state, so only rows of equal length are read together. UserError where not even these have,
    after rows have left, the logits that each has alone. In bfloat16 a small leak is not seen:
    docs/models.md has what each family does in float32.
    """
    model.eval()  # dropout would make other logits each time
    cache_name(model)
    ids = [probe_ids(model, 14, seed) for seed in range(3)]
    different = [ids[0][:4], ids[1], ids[2][:9]]
    equal = [row[:9] for row in ids]

    try:
        if _difference(model, different) <= tolerance(model):
            return True
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of whatever kind: a family's own code may not be made for this
        pass
    why = "with its cache a row of a batch has other logits than alone"
    try:
        if _difference(model, equal) <= (EXACT if is_exact(model) else WRONG):
            return False
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        message = " ".join(str(error).split())[:100]
        why = f"it cannot go on from its cache ({message})"
    family = type(plain_model(model)).__name__
    raise UserError(
        f"engine = 'transformers' cannot sample from a {family}: {why}; use engine=vllm, or give "
        "a model of another family"
    )


def is_exact(model) -> bool:
    """Says whether a model rounds to no less than float32."""
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_mixed", False):
        return False
    return model.dtype == torch.float32


def tolerance(model) -> float:
    """Returns how much logits of a batch may differ from those of a row alone: see EXACT."""
    return EXACT if is_exact(model) else ROUNDED


def probe_ids(model, count: int, seed: int) -> list[int]:
    """Draws ids of ordinary tokens: below them are control tokens, such as one for an image."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first = min(100, vocabulary // 2)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(first, min(vocabulary, 1000), (count,), generator=generator).tolist()


def relative_difference(logits: torch.Tensor, alone: torch.Tensor) -> float:
    """Compares logits (N, V) with those of a row alone: see EXACT."""
    alone = alone.float()
    if alone.isnan().any():  # of broken weights: who samples says so
        return 0.0
    difference = (logits.float() - alone).square().mean().sqrt()
    return (difference / alone.std()).item()


@torch.inference_mode()
def _difference(model, prompts: list[list[int]]) -> float:
    """Compares the logits of three rows, of which one leaves, with those that each has alone,
    without a cache, in up to three positions from the last of the prompt on: see EXACT."""
    device = model.device
    token = prompts[0][0]  # what each prompt goes on with, twice

    # 1. as a batch: the order is changed, then the first row leaves
    ids = pad(prompts, device=device, on_left=True)
    attention_mask = pad([[1] * len(prompt) for prompt in prompts], device=device, on_left=True)
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    out = read(model, ids, attention_mask, positions, new_cache(model))
    positions = positions[:, -1:]
    rows = list(range(len(prompts)))
    together = [[row_logits[-1]] for row_logits in out.logits]
    for kept in ([2, 0, 1], [1, 2]):
        index = torch.tensor(kept, device=device)
        cache = select_rows(cache_of(model, out), index, len(rows))
        rows = [rows[i] for i in kept]
        column = attention_mask.new_ones(len(rows), 1)
        attention_mask = torch.cat([attention_mask[index], column], dim=1)
        positions = positions[index] + 1
        out = read(model, column * token, attention_mask, positions, cache)
        for row, row_logits in zip(rows, out.logits, strict=True):
            together[row].append(row_logits[-1])

    # 2. each alone
    largest = 0.0
    for prompt, of_batch in zip(prompts, together, strict=True):
        ids = torch.tensor([prompt + [token] * (len(of_batch) - 1)], device=device)
        alone = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
        largest = max(largest, relative_difference(torch.stack(of_batch), alone))
    return largest

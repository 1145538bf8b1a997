"""Logprobs of tokens: never all logits at once, a repeated prompt only once, little padding.

    logprobs, entropy = token_logprobs(policy, ids, attention_mask, mask, temperature=1.0)
    for part in micro_batches([len(t.ids) for t in trajectories], token_budget=8192): ...

Shapes: B sequences, T tokens, H hidden size, V vocabulary, N tokens that are trained; where prompts
are shared, P different prompts of at most W tokens, and at most R tokens of a row behind them.
"""

import torch
import torch.utils.checkpoint

from learning.batches import Sequence, pad, tokens_through_layers
from learning.vision import (
    batch_positions,
    count_inside,
    count_patches,
    identities,
    image_inputs,
    keeps_pictures,
)

# Of one chunk of logits, in float32: large enough for full speed, small beside a model's weights.
LOGITS_BYTES = 2**29


# -- from hidden states to logprobs: the head


class _LinearHead(torch.autograd.Function):
    """Logprobs of targets and entropies under a torch.nn.Linear head, `chunk` tokens at a time.

    Autograd on each chunk (`_any_head`) gives every chunk a (V, H) gradient of the weight of its
    own, and up to four tensors (chunk, V). Here all of it happens in the memory of one chunk of
    logits, and the weight's gradient is added to in place: bench/logprobs.py has the difference.
    Kept for the backward pass are two numbers a token: p = exp(logits - top) / total, and the
    gradient of the logits is (1 at the target - p) x that of the logprob.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, targets, temperature, chunk):
        """Returns the logprobs of the targets and the entropies, (N,) each, in float32.

        hidden: (N, H); weight: (V, H) and bias: (V,) or None, given apart from the head so that
        autograd sees them; targets: (N,); chunk: how many tokens have logits at once.
        """
        # of each token, (N, 1): the highest logit
        top = hidden.new_empty(len(hidden), 1, dtype=torch.float32)
        total = torch.empty_like(top)  # sum of exp(logits - top) over the vocabulary
        target_logits = torch.empty_like(top)  # that of the target, less top
        entropy_sums = torch.empty_like(top)  # sum of -e log e, e = exp(logits - top)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = head(hidden[part]).float().div_(temperature)  # (chunk, V)
            top[part] = logits.amax(-1, keepdim=True)
            logits.sub_(top[part])
            target_logits[part] = logits.gather(-1, targets[part, None])
            # in place: there is memory for one (chunk, V), and it has held the logits
            exponentials = logits.exp_()
            total[part] = exponentials.sum(-1, keepdim=True)
            # entr(e) = -e log e, which is 0 where a logit is -inf
            terms = torch.special.entr(exponentials, out=exponentials)
            entropy_sums[part] = terms.sum(-1, keepdim=True)
            # or two chunks would be alive at the top of the loop
            del logits, exponentials, terms

        # p = e / total, so log p = log e - log total, and the entropy is - sum p log p
        logprobs = (target_logits - total.log())[:, 0]
        entropy = (entropy_sums / total + total.log())[:, 0]
        ctx.save_for_backward(hidden, weight, targets, top, total)
        ctx.head = head
        ctx.temperature = temperature
        ctx.chunk = chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, logprobs_gradient, entropy_gradient):
        """Returns the gradients of hidden (N, H), weight (V, H) and bias (V,); None where it is not
        asked for: under LoRA the head is frozen. logprobs_gradient: (N,)."""
        hidden, weight, targets, top, total = ctx.saved_tensors
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = None
        bias_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = torch.zeros_like(weight)
        if ctx.needs_input_grad[2]:
            bias_gradient = weight.new_zeros(len(weight))

        gradient = logprobs_gradient[:, None] / ctx.temperature  # (N, 1)
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)

            # 1. the logits again, (chunk, V)
            logits = ctx.head(hidden[part])
            dtype = logits.dtype  # the weight's, or that of an autocast around the head
            logits = logits.float().div_(ctx.temperature)

            # 2. in their memory their gradient: -p everywhere, and 1 more at the target
            minus_p_per_e = -gradient[part] / total[part]  # (chunk, 1)
            logits.sub_(top[part]).exp_().mul_(minus_p_per_e)
            logits.scatter_add_(-1, targets[part, None], gradient[part])
            logits_gradient = logits.to(dtype)

            # 3. from there through the head
            hidden_gradient[part] = logits_gradient @ weight.to(dtype)
            if weight_gradient is not None:
                if dtype == weight.dtype:
                    weight_gradient.addmm_(logits_gradient.T, hidden[part])
                else:  # each product in bfloat16, their sum in float32
                    weight_gradient += logits_gradient.T @ hidden[part].to(dtype)
            if bias_gradient is not None:
                bias_gradient += logits_gradient.sum(0)
            del logits, logits_gradient
        return hidden_gradient, weight_gradient, bias_gradient, None, None, None, None


def _any_head(hidden, head, softcap, targets, temperature, chunk):
    """Does the same by autograd, for every other head: adapters, 4 bits, soft-capped, under
    autocast. softcap: None, or the number that logits stay below."""

    def chunk_logprobs(hidden, targets):
        logits = head(hidden).float()  # (chunk, V)
        if softcap:
            logits = torch.tanh(logits / softcap) * softcap
        table = (logits / temperature).log_softmax(-1)  # (chunk, V)
        logprobs = table.gather(-1, targets[:, None])[:, 0]
        # Last, because checkpoint recomputes no further than to what the backward pass needs.
        with torch.no_grad():
            p = table.exp()
            entropy = torch.special.entr(p, out=p).sum(-1)
        return logprobs, entropy

    logprobs = []
    entropies = []
    chunks = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    for hidden_chunk, target_chunk in chunks:
        chunk_values, chunk_entropies = torch.utils.checkpoint.checkpoint(
            chunk_logprobs, hidden_chunk, target_chunk, use_reentrant=False
        )
        logprobs.append(chunk_values)
        entropies.append(chunk_entropies)
    return torch.cat(logprobs), torch.cat(entropies)


def logits_factor(model) -> float:
    """Returns what a model multiplies with whatever its head gives: 1 for most. Each family has a
    setting of another name for it; learning.model.check_head proves that none is missed."""
    config = model.config.get_text_config()
    family = config.model_type
    if family.startswith("cohere"):
        return config.logit_scale
    if family.startswith(("granite", "minicpm3")):
        return 1 / config.logits_scaling
    if family == "hyperclovax":
        return config.logits_scaling
    if family == "falcon_h1":
        return config.lm_head_multiplier
    return 1.0


def has_plain_head(model) -> bool:
    """Says whether the head is a linear layer and nothing more."""
    head = model.get_output_embeddings()
    # the very classes: adapters, 4 bits and sharding bring their own
    return type(head) is torch.nn.Linear and type(head.weight) is torch.nn.Parameter


def head_logprobs(
    model,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
    is_plain: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the log-probabilities of targets (N,) and the entropies, (N,) each, under the model's
    head on the hidden states (N, H) before them; see token_logprobs. is_plain: what has_plain_head
    says, if it is known."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    temperature = temperature / logits_factor(model)
    if chunk is None:
        chunk = max(1, LOGITS_BYTES // (4 * config.vocab_size))
    if is_plain is None:
        is_plain = has_plain_head(model)
    is_autocast = torch.is_autocast_enabled(hidden.device.type)
    if is_plain and not softcap and not is_autocast:
        return _LinearHead.apply(hidden, head.weight, head.bias, head, targets, temperature, chunk)
    return _any_head(hidden, head, softcap, targets, temperature, chunk)


# -- from ids to hidden states: the layers


def decoder_of(model):
    """Returns the layers below the head. transformers' get_decoder takes the whole of Llama 4 for
    them, and ModernBERT's head."""
    decoder = model.get_decoder()
    head = model.get_output_embeddings()
    if any(module is head for module in decoder.modules()):
        base = model.get_base_model() if getattr(model, "peft_config", None) else model
        return base.model
    return decoder


def shares_prompts(model) -> bool:
    """Says whether hidden_states can go on from a cache: not from one that holds a state or a
    window instead of all keys and values, which are written over in place while autograd needs
    them, and not where layers are recomputed in the backward pass."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    # RWKV, xLSTM: their config does not say that their layers hold states
    if model.is_gradient_checkpointing or model._is_stateful:
        return False
    layers = DynamicCache(config=model.config.get_text_config()).layers
    return all(type(layer) is DynamicLayer for layer in layers)


def shared_prefixes(ids: list[list[int]], mask: list[list[int]]) -> list[tuple]:
    """Returns what rows may share: all before the last token of the prompt. That one stays with
    each row, whose first sampled token it predicts. ids: with different images told apart."""
    prefixes = []
    for row, row_mask in zip(ids, mask, strict=True):
        prompt_length = row_mask.index(1) if 1 in row_mask else len(row)
        prefixes.append(tuple(row[: max(0, prompt_length - 1)]))
    return prefixes


def layers_of(model, with_tower: bool):
    """Returns what is below the head. Of a model that sees, get_decoder() gives the layers of the
    text alone, which would take a placeholder's own embedding: images need the tower too."""
    if not with_tower:
        return decoder_of(model)
    if getattr(model, "peft_config", None):  # adapters: peft has a base_model of its own
        model = model.get_base_model()
    return model.base_model


def hidden_states(model, ids, attention_mask, mask, position_ids, images=None):
    """Runs the layers; returns what the head is applied to, (B, R, H), and how many columns on the
    left of each row are left out of it, (B,). Without sharing R = T, and none are.

    The samples of a group begin with one prompt, often longer than all that follows: system, tool
    schemas, question. Each prompt that repeats goes through the layers once, forward and backward:
    its keys and values are kept, with their graph, in a cache that all its rows go on from. The
    function is the same and so is its gradient, for fewer tokens. images: the Pictures of each row.
    """
    layers = layers_of(model, with_tower=images is not None)
    prefixes = _prefixes_worth_sharing(model, ids, attention_mask, mask, images)
    if not prefixes:
        pictures = [] if images is None else [p for row_images in images for p in row_images]
        output = layers(
            input_ids=ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            **image_inputs(layers, pictures, ids.device),
        )
        return output.last_hidden_state, ids.new_zeros(len(ids))

    from transformers.cache_utils import DynamicCache

    # 1. every different prompt once, into a cache
    row_of = {}  # prompt: the first row that begins with it
    for row, prefix in enumerate(prefixes):
        row_of.setdefault(prefix, row)
    prompts = sorted(row_of)
    prompt_ids = [ids[row_of[prompt], : len(prompt)].tolist() for prompt in prompts]
    prompt_images, row_images = _divide_images(prompts, prompt_ids, prefixes, row_of, images)
    ones = [[1] * len(prompt) for prompt in prompts]
    prompt_mask = pad(ones, device=ids.device, on_left=True)  # (P, W)
    prompt_positions = batch_positions(prompt_ids, prompt_images, on_left=True)
    if prompt_positions is None:
        prompt_positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config.get_text_config())
    layers(
        input_ids=pad(prompt_ids, device=ids.device, on_left=True),
        attention_mask=prompt_mask,
        position_ids=prompt_positions.to(ids.device),
        past_key_values=cache,
        use_cache=True,
        **image_inputs(layers, [p for pictures in prompt_images for p in pictures], ids.device),
    )

    # 2. each row gets the keys and values of its prompt
    number_of = {prompt: number for number, prompt in enumerate(prompts)}
    prompt_of_row = ids.new_tensor([number_of[prefix] for prefix in prefixes])  # (B,)
    prompt_mask = prompt_mask[prompt_of_row]  # (B, W)
    for layer in cache.layers:
        # not cache.batch_select_indices: it writes keys[prompt_of_row], whose gradient two threads
        # add up in the order in which they come, so that equal runs had other last bits
        layer.keys = layer.keys.index_select(0, prompt_of_row)
        layer.values = layer.values.index_select(0, prompt_of_row)

    # 3. the rows go on from it
    prompt_lengths = prompt_mask.sum(1)  # (B,)
    lengths = attention_mask.sum(1) - prompt_lengths  # (B,), of what follows
    offsets = torch.arange(int(lengths.max()), device=ids.device)  # (R,)
    is_token = (offsets < lengths[:, None]).long()  # (B, R), 0 = padding
    columns = prompt_lengths[:, None] + offsets  # (B, R)
    # what a short row has there is padding, but it has to exist
    columns = columns.clamp(max=ids.shape[1] - 1)
    output = layers(
        input_ids=ids.gather(1, columns) * is_token,
        attention_mask=torch.cat([prompt_mask, is_token], 1),
        position_ids=position_ids.gather(-1, columns.expand(*position_ids.shape[:-1], -1)),
        past_key_values=cache,
        use_cache=True,
        **image_inputs(layers, [p for pictures in row_images for p in pictures], ids.device),
    )
    return output.last_hidden_state, prompt_lengths


def _divide_images(prompts, prompt_ids, prefixes, row_of, images) -> tuple[list, list]:
    """Divides the Pictures of the rows: (those of each prompt, those of each row behind it)."""
    if images is None:
        return [[] for _ in prompts], [[] for _ in prefixes]
    inside = {}  # prompt: how many
    prompt_images = []
    for prompt, its_ids in zip(prompts, prompt_ids, strict=True):
        row = row_of[prompt]
        inside[prompt] = count_inside(its_ids, images[row])
        prompt_images.append(images[row][: inside[prompt]])
    row_images = []
    for row, prefix in enumerate(prefixes):
        row_images.append(images[row][inside[prefix] :])
    return prompt_images, row_images


def _prefixes_worth_sharing(model, ids, attention_mask, mask, images) -> list[tuple]:
    """Returns what each of the B rows begins with, or [] where none of it is to be shared."""
    if attention_mask is None or len(ids) < 2:  # packed rows, or only one
        return []
    if not attention_mask[:, 0].all():  # rows that are padded on the left
        return []
    rows = ids.tolist()
    are_kept = True  # what the tower makes of them; of text there is none
    if images is None:
        images = [()] * len(rows)
    else:
        are_kept = keeps_pictures(model)
    told_apart = [identities(row, pictures) for row, pictures in zip(rows, images, strict=True)]
    prefixes = shared_prefixes(told_apart, mask.long().tolist())
    lengths = attention_mask.sum(1).tolist()
    sequences = []
    for row, pictures, length, prefix in zip(rows, images, lengths, prefixes, strict=True):
        patches = count_patches(row[: len(prefix)], pictures, are_kept)
        sequences.append(Sequence(length, len(prefix), prefix, *patches))
    *_, (_, are_shared) = tokens_through_layers(sequences)  # of all rows as one batch
    if not are_shared or not shares_prompts(model):
        return []
    return prefixes


# -- both


def token_logprobs(
    model,
    ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    mask: torch.Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
    position_ids: torch.Tensor | None = None,
    images: list | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the log-probability of each token given those before it, and the entropy of its
    distribution.

    ids, attention_mask (1 = not padding), mask (1 = wanted): (B, T). Returns two float32 tensors
    (B, T), 0 where the mask is 0; only logprobs carries gradient. A token at position 0 has nothing
    before it, so its mask must be 0. The distribution is that of logits / temperature.

    Packed samples: position_ids (1, T) that begin again at 0 with every sample, and attention_mask
    None; transformers then keeps them from attending to each other.

    Images: the Pictures of each row, in the order of their placeholders in ids, and position_ids
    (3, B, T) where they have rows and columns (batches.position_ids).

    Logits are made for `chunk` wanted tokens at a time (None: as many as LOGITS_BYTES hold) and
    again in the backward pass, so that memory holds chunk x V numbers and never T x V. The head
    multiplies in the model's dtype, or autocast's; from there on all is float32.
    """
    if position_ids is None:
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    first_axis = position_ids if position_ids.dim() == 2 else position_ids.amax(0)
    wanted = mask.bool() & (first_axis > 0)  # (B, T)
    rows, columns = wanted.nonzero(as_tuple=True)  # (N,), (N,)
    hidden, left_out = hidden_states(model, ids, attention_mask, wanted, position_ids, images)
    # the hidden state at t - 1 predicts the token at t, unless a sample begins there
    hidden = hidden[rows, columns - 1 - left_out[rows]]  # (N, H)
    targets = ids[rows, columns]  # (N,)

    logprobs, entropy = head_logprobs(model, hidden, targets, temperature, chunk)

    zeros = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
    logprobs = zeros.masked_scatter(wanted, logprobs)
    entropy = zeros.masked_scatter(wanted, entropy)
    return logprobs, entropy

"""Logprobs of tokens: never all logits at once, a repeated prompt only once, little padding.

    logprobs, entropy = token_logprobs(policy, ids, attention_mask, mask, temperature=1.0)
    for part in micro_batches([len(t.ids) for t in trajectories], token_budget=8192): ...

Shapes: B sequences, T tokens, H hidden size, V vocabulary, N tokens that are trained.
"""

import torch
import torch.utils.checkpoint

from learning.batches import tokens_through_layers

# Of one chunk of logits, in float32: large enough for full speed, small beside a model's weights.
LOGITS_BYTES = 2**29


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
        # weight and bias are given apart from the head so that autograd sees them
        logprobs, entropy, top, total = torch.empty(4, len(hidden), 1, device=hidden.device)
        for part in _slices(len(hidden), chunk):
            logits = head(hidden[part]).float().div_(temperature)  # (chunk, V)
            top[part] = logits.amax(-1, keepdim=True)
            logits.sub_(top[part])
            logprobs[part] = logits.gather(-1, targets[part, None])
            p = logits.exp_()  # x total
            total[part] = p.sum(-1, keepdim=True)
            # entr(p) = -p log p, which is 0 where a logit is -inf
            entropy[part] = torch.special.entr(p, out=p).sum(-1, keepdim=True)
            del logits, p  # or two chunks would be alive at the top of the loop
        logprobs = (logprobs - total.log())[:, 0]
        entropy = (entropy / total + total.log())[:, 0]
        ctx.save_for_backward(hidden, weight, targets, top, total)
        ctx.head, ctx.temperature, ctx.chunk = head, temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, _):
        hidden, weight, targets, top, total = ctx.saved_tensors
        wants_weight, wants_bias = ctx.needs_input_grad[1:3]  # frozen under LoRA
        to_hidden = torch.empty_like(hidden)
        to_weight = torch.zeros_like(weight) if wants_weight else None
        to_bias = weight.new_zeros(len(weight)) if wants_bias else None
        gradient = gradient[:, None] / ctx.temperature
        for part in _slices(len(hidden), ctx.chunk):
            logits = ctx.head(hidden[part])
            dtype = logits.dtype  # the weight's, or that of an autocast around the head
            logits = logits.float().div_(ctx.temperature)
            logits.sub_(top[part]).exp_().mul_(-gradient[part] / total[part])
            logits.scatter_add_(-1, targets[part, None], gradient[part])
            to_logits = logits.to(dtype)
            to_hidden[part] = to_logits @ weight.to(dtype)
            if wants_weight and dtype == weight.dtype:
                to_weight.addmm_(to_logits.T, hidden[part])
            elif wants_weight:  # each product in bfloat16, their sum in float32
                to_weight += to_logits.T @ hidden[part].to(dtype)
            if wants_bias:
                to_bias += to_logits.sum(0)
            del logits, to_logits
        return to_hidden, to_weight, to_bias, None, None, None, None


def _slices(count: int, chunk: int) -> list[slice]:
    return [slice(i, i + chunk) for i in range(0, count, chunk)]


def _any_head(hidden, head, softcap, targets, temperature, chunk):
    """The same by autograd, for every other head: adapters, 4 bits, soft-capped, under autocast."""

    def piece(hidden, targets):
        logits = head(hidden).float()
        if softcap:
            logits = torch.tanh(logits / softcap) * softcap
        table = (logits / temperature).log_softmax(-1)  # (chunk, V)
        logprobs = table.gather(-1, targets[:, None])[:, 0]
        # Last, because checkpoint recomputes no further than to what the backward pass needs.
        with torch.no_grad():
            p = table.exp()
            entropy = torch.special.entr(p, out=p).sum(-1)
        return logprobs, entropy

    pieces = [
        torch.utils.checkpoint.checkpoint(piece, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return (torch.cat(p) for p in zip(*pieces, strict=True))


def shares_prompts(model) -> bool:
    """Whether hidden_states can go on from a cache: not from one that holds a state or a window
    instead of all keys and values, and not where layers are recomputed in the backward pass."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    layers = DynamicCache(config=model.config.get_text_config()).layers
    return all(type(layer) is DynamicLayer for layer in layers) and not (
        model.is_gradient_checkpointing
    )


def shared_prefixes(ids: list[list[int]], mask: list[list[int]]) -> list[tuple]:
    """What rows may share: all before the last token of the prompt. That one stays with each row,
    whose first sampled token it predicts."""
    firsts = [row.index(1) if 1 in row else len(row) for row in mask]
    return [tuple(row[: max(0, n - 1)]) for row, n in zip(ids, firsts, strict=True)]


def hidden_states(model, ids, attention_mask, mask, position_ids):
    """((B, R, H), (B,)): what the head is applied to, and how many columns on the left of each row
    are left out of it.

    The samples of a group begin with one prompt, often longer than all that follows: system, tool
    schemas, question. Each prompt that repeats goes through the layers once, forward and backward:
    its keys and values are kept, with their graph, in a cache that all its rows go on from. The
    function is the same and so is its gradient, for fewer tokens.
    """
    from transformers.cache_utils import DynamicCache

    decoder, skipped = model.get_decoder(), ids.new_zeros(len(ids))
    plain = {"input_ids": ids, "attention_mask": attention_mask, "position_ids": position_ids}
    # packed rows and rows padded on the left are not shared
    if attention_mask is None or len(ids) < 2 or not bool(attention_mask[:, 0].all()):
        return decoder(**plain, use_cache=False).last_hidden_state, skipped
    begins = shared_prefixes(ids.tolist(), mask.long().tolist())
    rows = zip(attention_mask.sum(1).tolist(), map(len, begins), begins, strict=True)
    *_, (_, shares) = tokens_through_layers(rows)
    if not shares or not shares_prompts(model):
        return decoder(**plain, use_cache=False).last_hidden_state, skipped

    prompts = sorted(set(begins))
    width = max(map(len, prompts))
    left = [[0] * (width - len(prompt)) for prompt in prompts]  # so that what follows is adjacent
    pairs = list(zip(left, prompts, strict=True))
    seen = ids.new_tensor([pad + [1] * len(prompt) for pad, prompt in pairs])  # (U, W): U prompts
    cache = DynamicCache(config=model.config.get_text_config())
    decoder(
        input_ids=ids.new_tensor([pad + list(prompt) for pad, prompt in pairs]),
        attention_mask=seen,
        position_ids=(seen.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    which = {prompt: i for i, prompt in enumerate(prompts)}
    of_row = ids.new_tensor([which[begin] for begin in begins])
    cache.batch_select_indices(of_row)
    skipped = seen.sum(1)[of_row]
    own = attention_mask.sum(1) - skipped  # tokens of each row that are left
    columns = torch.arange(int(own.max()), device=ids.device)
    real = (columns < own[:, None]).long()  # (B, R)
    columns = (skipped[:, None] + columns).clamp(max=ids.shape[1] - 1)
    hidden = decoder(
        input_ids=ids.gather(1, columns),
        attention_mask=torch.cat([seen[of_row], real], 1),
        position_ids=position_ids.gather(1, columns),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return hidden, skipped


def token_logprobs(
    model,
    ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    mask: torch.Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
    position_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token given those before it, and the entropy of its distribution.

    ids, attention_mask (1 = not padding), mask (1 = wanted): (B, T). Returns two float32 tensors
    (B, T), 0 where the mask is 0; only logprobs carries gradient. A token at position 0 has nothing
    before it, so its mask must be 0. The distribution is that of logits / temperature.

    Packed samples: position_ids (1, T) that begin again at 0 with every sample, and attention_mask
    None; transformers then keeps them from attending to each other.

    Logits are made for `chunk` wanted tokens at a time (None: as many as LOGITS_BYTES hold) and
    again in the backward pass, so that memory holds chunk x V numbers and never T x V. The head
    multiplies in the model's dtype, or autocast's; from there on all is float32.
    """
    if position_ids is None:
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    wanted = mask.bool() & (position_ids > 0)
    rows, columns = wanted.nonzero(as_tuple=True)  # (N,), (N,)
    hidden, skipped = hidden_states(model, ids, attention_mask, wanted, position_ids)
    # the hidden state at t - 1 predicts the token at t, unless a sample begins there
    hidden, targets = hidden[rows, columns - 1 - skipped[rows]], ids[rows, columns]  # (N, H), (N,)
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    chunk = chunk or max(1, LOGITS_BYTES // (4 * config.vocab_size))
    # the very classes: adapters, 4 bits and sharding bring their own
    linear = type(head) is torch.nn.Linear and type(head.weight) is torch.nn.Parameter
    if linear and not softcap and not torch.is_autocast_enabled(hidden.device.type):
        found = _LinearHead.apply(hidden, head.weight, head.bias, head, targets, temperature, chunk)
    else:
        found = _any_head(hidden, head, softcap, targets, temperature, chunk)
    zeros = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
    logprobs, entropy = (zeros.masked_scatter(wanted, values) for values in found)
    return logprobs, entropy

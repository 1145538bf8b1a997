"""logprobs.token_logprobs under every way that it is called: what it holds, keeps and sends back.

    pytest tests/test_logprobs.py

Pinned here: values and gradients do not depend on the chunk, memory does not depend on T, and both
ways through the head (torch.nn.Linear in place, any other by autograd) agree, also with gradient
checkpointing, accumulated or packed batches, bfloat16, and logits of -inf. test_loss.py has the
rest: temperature, padding, shifts, kinds of heads.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from test_loss import MODELS, VOCABULARY, backward, distance, full_logprobs, qwen, sequences
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from learning import model as models
from learning.logprobs import token_logprobs


class Wrapped(torch.nn.Linear):
    """Not the very class torch.nn.Linear, so it goes the way of any other head."""


HEADS = [torch.nn.Linear, Wrapped]


def stub(head_class, vocabulary=VOCABULARY, tokens=20, hidden=8, bias=True):
    """A model that is nothing but a head: its decoder gives the same hidden states each time."""
    torch.manual_seed(0)
    head = head_class(hidden, vocabulary, bias)
    states = torch.randn(1, tokens, hidden, requires_grad=True)
    config = SimpleNamespace(vocab_size=vocabulary, model_type="")
    decoder = torch.nn.Module()
    decoder.forward = lambda **_: SimpleNamespace(last_hidden_state=states)
    model = SimpleNamespace(
        get_decoder=lambda: decoder,
        get_output_embeddings=lambda: head,
        config=SimpleNamespace(get_text_config=lambda: config),
    )
    return model, states, torch.randint(vocabulary, (1, tokens)), torch.ones(1, tokens).long()


def weights(like):
    """Every token has its own, as in a policy's loss."""
    return torch.linspace(-1, 2, like.numel()).view_as(like)


# Values and gradients


@pytest.mark.parametrize("name", MODELS)
def test_the_chunk_changes_neither_values_nor_gradients(name, monkeypatch):
    """Pitfall 18: 1 and 7 of 10 tokens, and what None makes of a small LOGITS_BYTES."""
    monkeypatch.setattr("learning.logprobs.LOGITS_BYTES", 4 * 4 * VOCABULARY)  # 4 tokens
    model, batch = MODELS[name]().eval(), sequences()
    expected, expected_entropy = full_logprobs(model, *batch, 0.7)
    gradient = backward(model, expected)
    for chunk in (1, 7, None):
        logprobs, entropy = token_logprobs(model, *batch, 0.7, chunk)
        assert torch.allclose(logprobs, expected, atol=2e-6)
        assert torch.allclose(entropy, expected_entropy, atol=1e-5)
        assert distance(backward(model, logprobs), gradient) <= 2e-6


def test_without_a_chunk_as_many_logits_are_made_at_once_as_the_limit_holds(monkeypatch):
    """And a vocabulary beyond the limit goes by single tokens."""
    model, _, ids, mask = stub(torch.nn.Linear)
    made = []

    def count_rows(module, inputs, output):
        made.append(len(output))

    model.get_output_embeddings().register_forward_hook(count_rows)
    for numbers, expected in ((8 * VOCABULARY, [8, 8, 3]), (5, [1] * 19), (10**9, [19])):
        monkeypatch.setattr("learning.logprobs.LOGITS_BYTES", 4 * numbers)
        made.clear()
        token_logprobs(model, ids, mask, mask)
        assert made == expected


@pytest.mark.parametrize("bias", [True, False])
def test_both_ways_through_the_head_agree_and_either_part_may_be_frozen(bias):
    """Pitfalls 18, 34: under LoRA the head is frozen and only hidden states get a gradient."""
    for trained in (("states", "weight", "bias"), ("states",), ("weight",), ("states", "bias")):
        linear, wrapped = (logprobs_and_gradients(kind, bias, trained) for kind in HEADS)
        for a, b in zip(linear, wrapped, strict=True):
            assert distance(a, b) < 2e-6 and b.norm() > 0


def logprobs_and_gradients(kind, bias, trained) -> list:
    """With these parts trained: the logprobs, and the gradient of each."""
    model, states, ids, mask = stub(kind, bias=bias)
    head = model.get_output_embeddings()
    parts = {"states": states, "weight": head.weight}
    if bias:
        parts["bias"] = head.bias
    for name, part in parts.items():
        part.requires_grad_(name in trained)
    logprobs, _ = token_logprobs(model, ids, mask, mask, 1.3, 7)
    (logprobs * weights(logprobs)).sum().backward()
    for name, part in parts.items():
        assert (part.grad is not None) == (name in trained)
    gradients = [part.grad for part in parts.values() if part.grad is not None]
    return [logprobs, *gradients]


@pytest.mark.parametrize("kind", HEADS)
def test_autograd_grad_gives_what_backward_gives_and_gives_it_twice(kind):
    """Gradients are made in place, but not in place of anything that is needed again."""
    model, states, ids, mask = stub(kind)
    head = model.get_output_embeddings()
    logprobs, _ = token_logprobs(model, ids, mask, mask, chunk=7)
    loss = (logprobs * weights(logprobs)).sum()
    parts = (states, head.weight, head.bias)
    first = torch.autograd.grad(loss, parts, retain_graph=True)
    second = torch.autograd.grad(loss, parts, retain_graph=True)
    loss.backward()
    for a, b, p in zip(first, second, parts, strict=True):
        assert torch.equal(a, b) and torch.equal(a, p.grad) and a.norm() > 0
    only = torch.autograd.grad(token_logprobs(model, ids, mask, mask)[0].sum(), head.weight)
    assert only[0].shape == head.weight.shape


@pytest.mark.parametrize("name", ["tied", "untied", "head with bias", "lora on the head"])
def test_two_calls_add_up_to_the_gradient_of_one(name):
    """Pitfall 21: micro-batches of one row and of two."""
    model, (ids, attention_mask, mask) = MODELS[name]().eval(), sequences()
    scale = weights(mask)
    whole = backward(model, token_logprobs(model, ids, attention_mask, mask)[0]).clone()
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 3)):
        part = ids[rows], attention_mask[rows], mask[rows]
        (token_logprobs(model, *part, chunk=3)[0] * scale[rows]).sum().backward()
    parts = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert distance(parts, whole) < 1e-6


@pytest.mark.parametrize("name", ["tied", "untied", "lora on the head"])
def test_recomputed_layers_give_the_same_gradient(name):
    """Pitfall 34: each layer runs again in the backward pass, by transformers' own switch."""
    model, batch = MODELS[name]().eval(), sequences()
    logprobs, _ = token_logprobs(model, *batch, chunk=7)
    expected = backward(model, logprobs).clone()
    models.recompute_layers(model)
    models.without_dropout(model)
    runs = []
    model.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    again, _ = token_logprobs(model, *batch, chunk=7)
    assert torch.equal(again, logprobs) and len(runs) == 1
    assert distance(backward(model, again), expected) < 1e-6 and len(runs) == 2


# Memory


class Alive(TorchDispatchMode):
    """Counts the numbers in all tensors that are made, are alive and hold at least `size` of them;
    `inputs` were there before."""

    def __init__(self, size, *inputs):
        super().__init__()
        self.size = size
        self.seen = {}  # a storage: (a weak reference to it, how many numbers it holds)
        self.peak = 0  # numbers
        self.inputs = {x.untyped_storage().data_ptr() for x in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage.data_ptr() not in self.inputs:
                    reference = StorageWeakRef(storage)
                    self.seen[reference.cdata] = reference, storage.nbytes() // x.element_size()
        self.peak = max(self.peak, self.now())
        return out

    def now(self):
        self.seen = {k: (ref, n) for k, (ref, n) in self.seen.items() if not ref.expired()}
        return sum(n for _, n in self.seen.values() if n >= self.size)


@pytest.mark.parametrize("kind", HEADS)
def test_memory_depends_on_the_chunk_and_not_on_the_number_of_tokens(kind):
    """Pitfalls 18, 19: and between forward and backward nothing as long as the vocabulary lives."""
    vocabulary = 4096
    hidden = 4
    peaks = {}  # (tokens, chunk): numbers
    for tokens in (60, 240):
        for chunk in (8, 16):
            model, states, ids, mask = stub(kind, vocabulary, tokens, hidden, bias=False)
            weight = model.get_output_embeddings().weight
            with Alive(vocabulary, weight) as alive:
                logprobs, entropy = token_logprobs(model, ids, mask, mask, chunk=chunk)
                assert alive.peak >= chunk * vocabulary and logprobs.requires_grad
                assert alive.now() == 0
                logprobs.sum().backward()
            assert weight.grad is not None and states.grad is not None
            peaks[tokens, chunk] = alive.peak
    for chunk in (8, 16):
        assert peaks[60, chunk] == peaks[240, chunk]
        rows = chunk + hidden
        if kind is not torch.nn.Linear:
            rows *= 4
        assert peaks[240, chunk] <= rows * vocabulary


def test_no_memory_is_taken_for_the_gradient_of_a_frozen_head():
    """Under LoRA: the chunk of logits is all."""
    model, _, ids, mask = stub(torch.nn.Linear, 4096, 60, hidden=4)
    head = model.get_output_embeddings().requires_grad_(False)
    with Alive(4096, head.weight, head.bias) as alive:
        token_logprobs(model, ids, mask, mask, chunk=8)[0].sum().backward()
    assert alive.peak == 8 * 4096


@pytest.mark.parametrize("kind", HEADS)
def test_entropies_and_a_call_without_gradient_have_no_graph(kind):
    """Pitfall 19."""
    model, _, ids, mask = stub(kind)
    assert not token_logprobs(model, ids, mask, mask)[1].requires_grad
    with torch.no_grad():
        assert not token_logprobs(model, ids, mask, mask)[0].requires_grad


# Numbers


@pytest.mark.parametrize("kind", HEADS)
def test_a_logit_of_minus_infinity_leaves_all_else_finite(kind):
    """0 x -inf is NaN: a head that forbids tokens has the entropy of the others."""
    model, states, ids, mask = stub(kind)
    head = model.get_output_embeddings()
    allowed = VOCABULARY - 9
    ids %= allowed
    with torch.no_grad():
        head.bias[allowed:] = -torch.inf
    logprobs, entropy = token_logprobs(model, ids, mask, mask, chunk=7)
    (logprobs * weights(logprobs)).sum().backward()
    table = (states[0, :-1] @ head.weight[:allowed].T + head.bias[:allowed]).log_softmax(-1)
    expected = table.gather(-1, ids[0, 1:, None])[:, 0]
    (gradient,) = torch.autograd.grad((expected * weights(logprobs)[0, 1:]).sum(), states)
    assert torch.allclose(logprobs[0, 1:], expected, atol=2e-6)
    assert torch.allclose(entropy[0, 1:], -(table.exp() * table).sum(-1), atol=2e-6)
    assert distance(states.grad, gradient) < 2e-6
    assert (head.weight.grad[allowed:] == 0).all() and head.weight.grad.isfinite().all()


@pytest.mark.parametrize("kind", HEADS)
def test_large_logits_lose_no_more_than_float32_has_to(kind):
    """Logits of thousands: the highest is taken off before anything is added up."""
    model, states, ids, mask = stub(kind)
    with torch.no_grad():
        model.get_output_embeddings().bias += 5000
    logprobs, entropy = token_logprobs(model, ids, mask, mask)
    head = model.get_output_embeddings()
    table = head(states[0, :-1]).double().log_softmax(-1)
    expected = table.gather(-1, ids[0, 1:, None])[:, 0].float()
    assert torch.allclose(logprobs[0, 1:], expected, atol=2e-6)
    assert torch.allclose(entropy[0, 1:], -(table.exp() * table).sum(-1).float(), atol=1e-5)


class Products(TorchDispatchMode):
    """Collects the dtypes of the matrices in all products that have to do with the vocabulary."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            if any(VOCABULARY in x.shape for x in tensors):
                self.dtypes |= {x.dtype for x in tensors}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["untied", "head with bias", "lora on the head", "softcap"])
@pytest.mark.parametrize("how", ["bfloat16", "autocast", "mixed"])
def test_the_head_multiplies_in_bfloat16_and_the_softmax_is_in_float32(name, how):
    """Pitfall 17: the same logprobs as of the model's own logits, in float32 from there on."""
    model, batch = MODELS[name]().eval(), sequences()
    around = contextlib.nullcontext()
    if how == "autocast":
        around = torch.autocast("cpu", torch.bfloat16)
    else:
        model = models.in_dtype(model, how)
    with around:
        logprobs, entropy = token_logprobs(model, *batch, chunk=3)
        with torch.no_grad():
            hidden = model.get_decoder()(input_ids=batch[0], use_cache=False).last_hidden_state
            logits = model.get_output_embeddings()(hidden[0])
    assert logits.dtype == torch.bfloat16 and logprobs.dtype == entropy.dtype == torch.float32
    if name == "softcap":
        logits = 2.0 * torch.tanh(logits.float() / 2.0)
    table = logits[:-1].float().log_softmax(-1)  # of the first sequence: it has no padding
    expected = table.gather(-1, batch[0][0, 1:, None])[:, 0] * batch[2][0, 1:]
    assert torch.allclose(logprobs[0, 1:], expected, atol=2e-6)
    with Products() as products:
        backward(model, logprobs)
    assert products.dtypes == {torch.bfloat16}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize("how", ["bfloat16", "mixed"])
def test_gradients_in_bfloat16_are_those_of_float32_up_to_its_rounding(how):
    """Also when many chunks add up to the gradient of the head."""
    gradients = []
    for dtype in ("float32", how):
        model = models.in_dtype(MODELS["untied"]().eval(), dtype)
        logprobs, _ = token_logprobs(model, *sequences(), chunk=1)
        gradients.append(backward(model, logprobs).float())
    assert 1e-4 < distance(gradients[1], gradients[0]) < 0.04


# Packed samples


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_samples_have_the_logprobs_and_gradients_that_they_have_alone(attention):
    """Pitfall 50: one row, positions that begin again; also samples of one and two tokens."""
    model = qwen(tie_word_embeddings=True).eval()
    model.set_attn_implementation(attention)
    rng = torch.Generator().manual_seed(2)
    samples = [torch.randint(VOCABULARY, (1, n), generator=rng) for n in (7, 1, 5, 2, 9)]
    ids = torch.cat(samples, 1)
    position_ids = torch.cat([torch.arange(s.shape[1]) for s in samples])[None]
    every = torch.ones_like(ids)
    packed, entropy = token_logprobs(model, ids, None, every, position_ids=position_ids)
    assert (packed[position_ids == 0] == 0).all()  # though the mask is 1 there
    gradient = backward(model, packed).clone()
    alone = [token_logprobs(model, s, torch.ones_like(s), torch.ones_like(s)) for s in samples]
    expected, expected_entropy = (torch.cat(x, 1) for x in zip(*alone, strict=True))
    assert torch.allclose(packed, expected, rtol=1e-6, atol=2e-6)
    assert torch.allclose(entropy, expected_entropy, rtol=1e-6, atol=2e-6)
    assert distance(gradient, backward(model, expected)) < 2e-6


def test_the_first_token_of_a_sequence_has_no_logprob_whatever_the_mask_says():
    """Pitfall 17: also where padding stands on the left of it."""
    model = MODELS["tied"]().eval()
    for side in ("left", "right"):
        ids, attention_mask, _ = sequences(side)
        logprobs, _ = token_logprobs(model, ids, attention_mask, attention_mask)
        first = attention_mask.argmax(1)
        assert (logprobs[torch.arange(3), first] == 0).all()
        assert ((logprobs != 0).sum(1) == attention_mask.sum(1) - 1).all()

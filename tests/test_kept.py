"""A turn goes on from the keys and values of the turn before: less is read, and nothing changes.

    pytest tests/test_kept.py

Models are random and have two layers; one shares the heads of its keys, as most of today's do.
"""

import asyncio
import copy

import pytest
import torch

from engines.base import Sampling
from engines.cache import growing_cache
from engines.kept import KeptTurns
from engines.local import TransformersEngine
from learning.batches import pad
from learning.logprobs import token_logprobs
from run.loop import run_blocking

GUARD = 60  # seconds, after which a test is said to hang
PROMPTS = [[7], [9, 30, 41, 7, 55, 60], [9, 30, 41], [88, 12, 12, 5, 200, 31, 3, 77, 120, 11, 6]]
RESULT = [33, 21, 90, 14]  # what a tool says, in these tests
STOP = tuple(range(5, 4000, 9))  # one token in nine ends a turn


@pytest.fixture(scope="module")
def policy(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    vocabulary = {"vocab_size": len(tokenizer), "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**vocabulary, **shape, **heads, **ids)).eval()


@pytest.fixture
def engine(policy, tokenizer):
    made = TransformersEngine(policy, tokenizer)
    yield made
    run_blocking(made.close())


def sampling(number, turn, temperature=1.0):
    return Sampling(temperature, 40, seed=100 * number + turn, stop_ids=STOP)


async def play(engine, number, prompt, turns):
    """Plays turns, with a result between them; returns the ids and the logprobs of each turn."""
    ids = list(prompt)
    played = []
    try:
        for turn in range(turns):
            done = await engine.generate(ids, [], sampling(number, turn))
            played.append((list(ids), done))
            ids = ids + done.ids + RESULT
    finally:
        engine.leave()
    return played


def play_all(engine, turns, copies=2, joined=True):
    """Plays `copies` trajectories of each prompt side by side."""

    async def main():
        players = [(number, prompt) for number, prompt in enumerate(PROMPTS * copies)]
        for _ in players:
            engine.join()
        return await asyncio.gather(
            *(play(engine, number, prompt, turns) for number, prompt in players)
        )

    return run_blocking(asyncio.wait_for(main(), GUARD))


def spy_on(engine, monkeypatch):
    """Records the shape of the ids of every forward pass."""
    shapes = []
    forward = engine._forward

    def spy(ids, *args):
        shapes.append(tuple(ids.shape))
        return forward(ids, *args)

    monkeypatch.setattr(engine, "_forward", spy)
    return shapes


def assert_trainers(policy, ids, completion):
    """To 3e-5, the engine's logprobs are those of the trainer for the whole context."""
    row = ids + completion.ids
    mask = [0] * len(ids) + [1] * len(completion.ids)
    with torch.no_grad():
        logprobs, _ = token_logprobs(policy, pad([row]), pad([[1] * len(row)]), pad([mask]))
    expected = logprobs[0, len(ids) :].tolist()
    assert completion.logprobs == pytest.approx(expected, abs=3e-5)


def test_a_turn_reads_only_what_is_new(engine, monkeypatch):
    """The last sampled token, which nobody has read, and the result: five tokens a row, not the
    whole context."""
    shapes = spy_on(engine, monkeypatch)
    played = play_all(engine, turns=2)
    wide = [shape for shape in shapes if shape[1] > 1]
    assert wide[0] == (4, 11)  # each prompt once, the longest has 11 tokens
    assert {turns[0][1].finish for turns in played} == {"stop"}  # what was cut is not kept
    assert wide[1:] == [(8, 1 + len(RESULT))]


def test_logprobs_of_later_turns_are_the_trainers(engine, policy):
    """Pitfall 17, in the third turn of rows of many lengths; a group's turns differ in length."""
    played = play_all(engine, turns=3)
    lengths = {len(ids) for turns in played for ids, _ in turns}
    assert len(lengths) > 10
    for turns in played:
        for ids, completion in turns:
            assert_trainers(policy, ids, completion)


def test_a_turn_is_sampled_as_if_nothing_had_been_kept(engine, policy, tokenizer):
    """The tokens of each turn, alone in a new engine that reads the whole context."""
    fresh = TransformersEngine(policy, tokenizer)
    for number, turns in enumerate(play_all(engine, turns=3)):
        for turn, (ids, completion) in enumerate(turns):
            alone = run_blocking(fresh.generate(ids, [], sampling(number, turn)))
            assert alone.ids == completion.ids
            assert alone.logprobs == pytest.approx(completion.logprobs, abs=3e-5)
    run_blocking(fresh.close())


def test_equal_seeds_give_equal_bits(engine, policy, tokenizer):
    again = TransformersEngine(policy, tokenizer)
    assert play_all(engine, turns=3) == play_all(again, turns=3)
    run_blocking(again.close())


def test_new_and_going_on_share_a_batch(engine, policy, monkeypatch):
    """Some are in their second turn when others begin: two readings, then one decode loop."""
    shapes = spy_on(engine, monkeypatch)

    async def late(number, prompt, first):
        await first.wait()
        return await play(engine, number, prompt, 2)

    async def main():
        first = asyncio.Event()
        engine.deterministic = False
        for _ in range(4):
            engine.join()
        early = [asyncio.ensure_future(play(engine, n, PROMPTS[n], 1)) for n in (0, 1)]
        turns = await asyncio.gather(*early)
        engine.join()
        engine.join()
        engine.deterministic = True
        # two go on from what is kept, two are new, and all four wait for each other
        following = [(ids + done.ids + RESULT) for ((ids, done),) in turns]
        first.set()
        shapes.clear()
        goes_on = [play(engine, n, following[n], 1) for n in (0, 1)]
        begins = [late(n, PROMPTS[n], first) for n in (2, 3)]
        return await asyncio.gather(*goes_on, *begins)

    played = run_blocking(asyncio.wait_for(main(), GUARD))
    assert shapes[0] == (2, 11) and shapes[1] == (2, 5) and shapes[2] == (4, 1)
    for turns in played:
        for ids, completion in turns:
            assert_trainers(policy, ids, completion)


def test_other_weights_read_everything_again(policy, tokenizer, monkeypatch):
    """Between two turns the weights change: what was kept is of the old ones."""
    model = copy.deepcopy(policy)
    engine = TransformersEngine(model, tokenizer)

    async def main():
        engine.join()
        first = await engine.generate(PROMPTS[3], [], sampling(0, 0))
        assert engine.kept.beginnings
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        await engine.sync(model, 1)
        ids = PROMPTS[3] + first.ids + RESULT
        shapes = spy_on(engine, monkeypatch)
        second = await engine.generate(ids, [], sampling(0, 1))
        assert shapes[0] == (1, len(ids))
        engine.leave()
        return ids, second

    ids, second = run_blocking(asyncio.wait_for(main(), GUARD))
    assert_trainers(model, ids, second)
    run_blocking(engine.close())


def test_nothing_is_kept_when_all_have_left(engine):
    play_all(engine, turns=2)
    assert engine.kept.beginnings == {}
    run_blocking(engine.generate(PROMPTS[0], [], sampling(0, 0)))  # who has not joined never leaves
    assert engine.kept.beginnings == {}


def test_of_too_many_the_oldest_go(policy):
    kept = KeptTurns(most=2)
    cache = growing_cache(policy.config)
    ids = [1, 2, 3]
    mask = torch.ones(1, 3, dtype=torch.long)
    policy(torch.tensor([ids]), attention_mask=mask, past_key_values=cache, use_cache=True)
    for first in (10, 20, 30):
        kept.keep([first, 2, 3], cache, 0, mask[0])
    assert kept.take((10, 2, 3, 4)) is None
    assert kept.take((20, 2, 3)) is None  # at least one token has to be read
    assert kept.take((20, 2, 3, 4)).length == 3
    assert kept.take((20, 2, 3, 4)) is None  # it was given away
    assert kept.take((30, 2, 3, 4)).length == 3


@pytest.mark.parametrize("rows", [1, 3])
def test_shared_key_heads_give_the_same_bits_as_copies(policy, tokenizer, rows):
    """The attention that the engine puts in place of transformers' own, with padding."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    TransformersEngine(policy, tokenizer)
    shared = AttentionInterface._global_mapping["sdpa"]
    assert shared is not sdpa_attention_forward
    layer = policy.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, 4, 2, 8, generator=generator)
    key = torch.randn(rows, 2, 9, 8, generator=generator)
    value = torch.randn(rows, 2, 9, 8, generator=generator)
    mask = torch.ones(rows, 1, 2, 9, dtype=torch.bool)
    mask[0, :, :, :4] = False
    with torch.no_grad():
        theirs, _ = sdpa_attention_forward(layer, query, key, value, mask, scaling=0.5)
        ours, _ = shared(layer, query, key, value, mask, scaling=0.5)
    assert torch.equal(ours, theirs)

"""How tokens are sampled: exactly from the model's own distribution, whoever else is in the batch.

    pytest tests/test_engine.py

Pinned here: greedy decoding is transformers' own, logprobs are the trainer's, padding and company
change nothing, a row leaves when it is done, nobody waits for who has left, and a crash, a deadline
or a closed loop stops no other. Models are random and have two layers.
"""

import asyncio
import copy
import random
import threading
from collections import Counter

import pytest
import torch

from engines.base import Completion, Engine, Sampling
from engines.canary import Canary, sync_and_check
from engines.local import TransformersEngine, _Request
from engines.scripted import ScriptedEngine
from learning.batches import pad
from learning.logprobs import token_logprobs
from run.config import UserError
from run.loop import run_blocking
from tasks import tiny as tiny_model

GUARD = 60  # seconds, after which a test is said to hang
PROMPTS = [[7], [9, 30, 41, 7, 55, 60], [9, 30, 41], [88, 12, 12, 5, 200, 31, 3, 77, 120, 11, 6]]


@pytest.fixture(scope="module")
def policy(tokenizer):
    """Qwen3-shaped; its weights are larger than at birth, so that it has preferences."""
    made = tiny_model.tiny(tokenizer, hidden_size=32, layers=2, heads=2).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return made


def others(tokenizer, kind):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config, cls = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[kind]
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}  # shared keys and values
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    made = cls(config(vocab_size=len(tokenizer), initializer_range=0.3, **shape, **heads, **ids))
    return made.eval()


@pytest.fixture
def engine(policy, tokenizer):
    made = TransformersEngine(policy, tokenizer)
    yield made
    run_blocking(made.close())


def sample(engine, requests):
    """Completions of [(ids, Sampling)], all asked for at once."""

    async def main():
        for _ in requests:
            engine.join()
        try:
            return await asyncio.gather(*(engine.generate(ids, [], s) for ids, s in requests))
        finally:
            for _ in requests:
                engine.leave()

    return run_blocking(asyncio.wait_for(main(), GUARD))


def greedy(n, **settings):
    return Sampling(temperature=0, max_new_tokens=n, **settings)


def gate(engine, monkeypatch, calls):
    """The model waits, from its n-th forward on, until the event that this returns is set. Its
    attribute `reached` is set when the model waits."""
    forward = engine._forward
    opened = threading.Event()
    opened.reached = threading.Event()
    count = []

    def slow(*args):
        count.append(1)
        if len(count) > calls:
            opened.reached.set()
            assert opened.wait(GUARD)
        return forward(*args)

    monkeypatch.setattr(engine, "_forward", slow)
    return opened


async def until(is_true):
    """Lets the others of the loop go on until is_true()."""
    while not is_true():
        await asyncio.sleep(0.01)


# The distribution


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_greedy_tokens_are_those_of_transformers_own_generate(tokenizer, policy, kind):
    """Prompts of four lengths in one batch, each against `generate` on its own."""
    made = policy if kind == "qwen3" else others(tokenizer, kind)
    engine = TransformersEngine(made, tokenizer)
    done = sample(engine, [(ids, greedy(24)) for ids in PROMPTS])
    for ids, completion in zip(PROMPTS, done, strict=True):
        theirs = made.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert completion.ids == theirs[0, len(ids) :].tolist()
        assert (completion.finish, len(completion.logprobs)) == ("length", 24)
    run_blocking(engine.close())


def test_the_cache_grows_past_its_block_while_rows_leave(engine, policy):
    """150 tokens cross the block of 128 that it grows by; other rows leave before and after."""
    lengths = (150, 100, 131, 2)
    requests = [(ids, greedy(n)) for ids, n in zip(PROMPTS, lengths, strict=True)]
    for (ids, _), n, done in zip(requests, lengths, sample(engine, requests), strict=True):
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([ids + done.ids])).logits[0]
        predicted = logits.log_softmax(-1)[len(ids) - 1 : -1]
        chosen = predicted.gather(-1, torch.tensor(done.ids)[:, None])[:, 0]
        assert len(done.ids) == n
        torch.testing.assert_close(chosen, torch.tensor(done.logprobs), atol=1e-4, rtol=0)
        torch.testing.assert_close(chosen, predicted.amax(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_logprobs_are_the_trainers_at_the_same_temperature(engine, policy, temperature):
    """Pitfalls 14, 17, 26: in float32 to 1e-5, padded on the other side and in another batch."""
    sampling = [Sampling(temperature, 30 - 5 * i, seed=i) for i in range(len(PROMPTS))]
    done = sample(engine, list(zip(PROMPTS, sampling, strict=True)))
    rows = [ids + c.ids for ids, c in zip(PROMPTS, done, strict=True)]
    mask = [[0] * len(i) + [1] * len(c.ids) for i, c in zip(PROMPTS, done, strict=True)]
    attention = pad([[1] * len(row) for row in rows])
    got, _ = token_logprobs(policy, pad(rows), attention, pad(mask), temperature)
    for row, ids, completion in zip(got, PROMPTS, done, strict=True):
        ours = row[len(ids) : len(ids) + len(completion.ids)]
        assert torch.allclose(ours, torch.tensor(completion.logprobs), atol=1e-5, rtol=0)


def test_left_padding_changes_nothing(engine):
    """Pitfall 17: a short prompt beside one of 300 tokens, and alone."""
    long = [random.Random(0).randrange(300) for _ in range(300)]
    request = (PROMPTS[0], Sampling(1.0, 20, seed=3))
    alone, (beside, _) = sample(engine, [request])[0], sample(engine, [request, (long, greedy(3))])
    assert beside.ids == alone.ids
    assert beside.logprobs == pytest.approx(alone.logprobs, abs=1e-5)


def test_company_changes_no_sampled_token(engine):
    """Each (trajectory, turn) has its own noise, whoever else is in the batch and how long."""
    requests = [(PROMPTS[i % 4], Sampling(1.0, 3 + 4 * i, seed=i)) for i in range(10)]
    together = sample(engine, requests)
    for i in (0, 3, 8, 9):
        assert sample(engine, [requests[i]])[0].ids == together[i].ids
    back = sample(engine, requests[::-1])[::-1]
    assert [c.ids for c in back] == [c.ids for c in together]
    assert [c.logprobs for c in back] == [c.logprobs for c in together]  # to the last bit


def test_members_of_a_group_differ_and_equal_seeds_do_not(engine):
    """Pitfall 54: nor does greedy decoding depend on a seed."""
    group = [(PROMPTS[1], Sampling(1.0, 12, seed=i)) for i in range(8)]
    first, again = sample(engine, group), sample(engine, group)
    assert [c.ids for c in first] == [c.ids for c in again]
    assert len({tuple(c.ids) for c in first}) == 8
    same = sample(engine, [(PROMPTS[1], greedy(12, seed=i)) for i in range(4)])
    assert len({tuple(c.ids) for c in same}) == 1


def test_equal_prompts_are_prefilled_once_and_sample_as_if_apart(engine, monkeypatch):
    """Three distinct prompts of ten rows go through the model, and ten rows come out."""
    shapes, forward = [], engine._forward

    def spy(ids, *args):
        shapes.append(tuple(ids.shape))
        return forward(ids, *args)

    monkeypatch.setattr(engine, "_forward", spy)
    requests = [(PROMPTS[i % 3], Sampling(1.0, 9, seed=i)) for i in range(10)]
    together = sample(engine, requests)
    assert shapes[:2] == [(3, 6), (10, 1)] and len(shapes) == 9
    for request, completion in zip(requests, together, strict=True):
        assert sample(engine, [request])[0].ids == completion.ids


def test_a_row_at_temperature_zero_beside_one_at_one(engine, policy):
    """The greedy one is greedy, and its logprobs are those at temperature 1."""
    warm, cold = (PROMPTS[1], Sampling(1.0, 9, seed=1)), (PROMPTS[1], greedy(9))
    drawn, best = sample(engine, [warm, cold])
    assert drawn.ids == sample(engine, [warm])[0].ids != best.ids
    assert best.ids == sample(engine, [cold])[0].ids
    ids = torch.tensor([PROMPTS[1] + best.ids])
    with torch.no_grad():
        logprobs = policy(ids).logits[0].log_softmax(-1)[len(PROMPTS[1]) - 1 : -1]
    assert logprobs.argmax(-1).tolist() == best.ids
    assert best.logprobs == pytest.approx(logprobs.max(-1).values.tolist(), abs=1e-5)


def draw(engine, logits, temperature, n=10_000):
    """How often each token is drawn from the same logits by n rows with the seeds 0 .. n - 1."""
    rows = [_Request([], Sampling(temperature), None, random.Random(seed)) for seed in range(n)]
    tokens = engine._sample(logits.expand(n, -1), rows)
    logprobs = (logits.double() / temperature).log_softmax(-1).float()
    assert [r.new[0] for r in rows] == tokens.tolist()
    assert torch.allclose(torch.tensor([r.logprobs[0] for r in rows]), logprobs[tokens])
    return Counter(tokens.tolist()), logprobs.exp()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_their_probability_says(engine, temperature):
    """Chi-square with 7 degrees of freedom: below 24.3 but once in a thousand seeds."""
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0, -3.0, 1.5, 1.0, -0.5])
    counts, p = draw(engine, logits, temperature)
    expected = p * sum(counts.values())
    assert sum((counts[i] - e) ** 2 / e for i, e in enumerate(expected.tolist())) < 24.3


def test_a_token_of_probability_zero_is_never_drawn(engine):
    """At the start, in the middle and at the end, where rounding would be seen first."""
    inf = float("inf")
    counts, _ = draw(engine, torch.tensor([-inf, 0.0, -inf, 0.0, -inf, -inf]), 1.0)
    assert set(counts) == {1, 3}


def test_the_tail_of_a_large_vocabulary_is_sampled(engine):
    """Fifty thousand tokens of 1e-5 each share a half, the last ones as well as the first."""
    logits = torch.full((50_001,), -20.0)
    logits[0] = -20.0 + torch.tensor(50_000.0).log()
    counts, _ = draw(engine, logits, 1.0, n=300)
    tail = [token for token in counts if token]
    assert 110 < sum(counts[t] for t in tail) < 190
    assert min(tail) < 5_000 and max(tail) > 45_000


# The end of a turn


def test_a_stop_token_ends_the_turn_and_is_part_of_it(engine):
    """Pitfall 13: it has its logprob like any other; what it stops depends on nobody else."""
    (free,) = sample(engine, [(PROMPTS[1], Sampling(1.0, 12, seed=4))])
    stop = free.ids[5]
    at = free.ids.index(stop) + 1
    stopping = Sampling(1.0, 12, seed=4, stop_ids=(stop, 399_999))
    done, other = sample(engine, [(PROMPTS[1], stopping), (PROMPTS[2], greedy(12))])
    assert (done.ids, done.finish) == (free.ids[:at], "stop")
    assert done.logprobs == pytest.approx(free.logprobs[:at], abs=1e-5)
    assert len(other.ids) == 12


@pytest.mark.parametrize(
    ("text", "string"),
    [
        ("So:\n```python\n1\n```\nmore", "\n```\n"),  # and not at the opening "\n```"
        ("<search>ham</search> and on", "</search>"),
        ("the sum 漢字 is", "漢字"),  # each character is three tokens
    ],
)
def test_a_stop_string_over_several_tokens_ends_the_turn_and_keeps_its_ids(
    engine, tokenizer, monkeypatch, text, string
):
    """Pitfalls 1, 11: as sampled, even where the last token goes on behind the string."""
    ids, forward, said = tokenizer.encode(text, add_special_tokens=False), engine._forward, []

    def says(*args):
        out = forward(*args)
        out.logits.fill_(-100.0)[..., ids[len(said)]] = 100.0
        said.append(1)
        return out

    monkeypatch.setattr(engine, "_forward", says)
    stopping = Sampling(1.0, len(ids), seed=1, stop_strings=("no such thing", string))
    (done,) = sample(engine, [(PROMPTS[0], stopping)])
    n = len(done.ids)
    assert done.finish == "stop_string" and done.ids == ids[:n] and n < len(ids)
    assert string in tokenizer.decode(ids[:n]) and string not in tokenizer.decode(ids[: n - 1])
    assert all(string not in tokenizer.decode([i]) for i in ids)


def test_a_turn_that_ends_at_its_limit_says_how_it_ended(engine, tokenizer):
    """Length is the last reason: a stop token or string in the last place counts as such."""
    (free,) = sample(engine, [(PROMPTS[3], greedy(6))])
    last = free.ids[-1]
    at = free.ids.index(last) + 1
    (done,) = sample(engine, [(PROMPTS[3], greedy(at, stop_ids=(last,)))])
    assert (done.ids, done.finish) == (free.ids[:at], "stop")
    (done,) = sample(engine, [(PROMPTS[3], greedy(1))])
    assert (done.ids, done.finish) == (free.ids[:1], "length")


# The batch


def test_a_finished_row_goes_on_while_the_others_are_sampled(engine, monkeypatch):
    """Its future resolves at its last token, not at the end of the batch."""

    async def main():
        opened = gate(engine, monkeypatch, calls=2)
        long = asyncio.create_task(engine.generate(PROMPTS[1], [], greedy(40)))
        short = asyncio.create_task(engine.generate(PROMPTS[2], [], greedy(2)))
        engine.join(), engine.join()
        done = await asyncio.wait_for(short, GUARD)
        assert not long.done()
        opened.set()
        return done, await long

    short, long = run_blocking(main())
    assert len(short.ids) == 2 and len(long.ids) == 40
    monkeypatch.undo()
    engine.unfinished = 0
    assert [long.ids] == [c.ids for c in sample(engine, [(PROMPTS[1], greedy(40))])]


def test_finished_rows_cost_nothing(engine, monkeypatch):
    """The batch gets smaller as rows end."""
    sizes, forward = [], engine._forward

    def spy(ids, *args):
        sizes.append(len(ids))
        return forward(ids, *args)

    monkeypatch.setattr(engine, "_forward", spy)
    sample(engine, [(ids, greedy(2 + 2 * i)) for i, ids in enumerate(PROMPTS)])
    assert sizes == [4, 4, 3, 3, 2, 2, 1, 1]


def test_more_rows_than_max_batch_are_sampled_in_parts(policy, tokenizer):
    """The same tokens, at most two rows at a time."""
    requests = [(PROMPTS[i % 4], Sampling(1.0, 6 + i, seed=i)) for i in range(5)]
    engines = [TransformersEngine(policy, tokenizer, max_batch=n) for n in (2, 256)]
    small, large = (sample(engine, requests) for engine in engines)
    assert [c.ids for c in small] == [c.ids for c in large]
    for engine in engines:
        run_blocking(engine.close())


def test_deterministic_waits_for_all_who_have_joined(engine):
    """And for nobody who has left."""

    async def main():
        for _ in range(3):
            engine.join()
        first = asyncio.create_task(engine.generate(PROMPTS[0], [], greedy(2)))
        await asyncio.sleep(0.1)
        second = asyncio.create_task(engine.generate(PROMPTS[1], [], greedy(2)))
        await asyncio.sleep(0.1)
        assert not first.done() and not second.done() and len(engine.waiting) == 2
        engine.leave()  # the third one has ended without another turn
        await asyncio.wait_for(asyncio.gather(first, second), GUARD)
        engine.leave()
        (again,) = await asyncio.wait_for(
            asyncio.gather(engine.generate(PROMPTS[2], [], greedy(2))), GUARD
        )
        engine.leave()
        assert engine.unfinished == 0 and len(again.ids) == 2

    run_blocking(main())


def test_without_deterministic_nobody_waits(policy, tokenizer):
    """A trajectory goes ahead while others wait for their tools."""

    async def main():
        for _ in range(3):
            engine.join()
        await asyncio.wait_for(engine.generate(PROMPTS[0], [], greedy(2)), GUARD)
        await engine.close()

    engine = TransformersEngine(policy, tokenizer, deterministic=False)
    run_blocking(main())


def test_with_patience_a_batch_waits_for_quick_ones_and_not_for_slow_ones(policy, tokenizer):
    sizes = []

    def spied(rows):
        sizes.append(len(rows))
        decode(rows)

    async def main():
        # 1. the other comes soon: both are one batch, long before the patience is over
        engine.join(), engine.join()
        first = asyncio.create_task(engine.generate(PROMPTS[0], [], greedy(2)))
        await asyncio.sleep(0)
        other = asyncio.create_task(engine.generate(PROMPTS[1], [], greedy(2)))
        await asyncio.wait_for(asyncio.gather(first, other), GUARD)
        # 2. the other never comes: the batch starts without it
        engine.patience = 0.05
        await asyncio.wait_for(engine.generate(PROMPTS[0], [], greedy(2)), GUARD)
        # 3. nobody else is there: it starts at once
        engine.leave()
        engine.patience = 10 * GUARD
        await asyncio.wait_for(engine.generate(PROMPTS[0], [], greedy(2)), GUARD)
        await engine.close()

    engine = TransformersEngine(policy, tokenizer, deterministic=False, patience=10 * GUARD)
    decode = engine._decode
    engine._decode = spied
    run_blocking(main())
    assert sizes == [2, 1, 1]


def test_turns_asked_for_during_a_batch_are_sampled_after_it(engine, monkeypatch):
    """They wait in line, and the end of the batch starts the next."""

    async def main():
        opened = gate(engine, monkeypatch, calls=1)
        first = asyncio.create_task(engine.generate(PROMPTS[0], [], greedy(2)))
        await until(opened.reached.is_set)
        late = [asyncio.create_task(engine.generate(p, [], greedy(2))) for p in PROMPTS]
        await until(lambda: len(engine.waiting) == 4)
        opened.set()
        return await asyncio.wait_for(asyncio.gather(first, *late), GUARD)

    first, *late = run_blocking(main())
    assert late[0].ids == first.ids and all(len(c.ids) == 2 for c in late)


# When something goes wrong


def test_a_deadline_takes_its_row_out_of_the_batch_and_blocks_nobody(engine):
    """Pitfall 37's like in the engine: the row is dropped at its next token."""

    async def main():
        engine.join(), engine.join()
        endless = asyncio.create_task(engine.generate(PROMPTS[0], [], greedy(10**9)))
        other = engine.generate(PROMPTS[1], [], greedy(8))
        done = await asyncio.wait_for(other, GUARD)
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
        engine.leave()
        again = await asyncio.wait_for(engine.generate(PROMPTS[1], [], greedy(8)), GUARD)
        engine.leave()
        return done, again

    done, again = run_blocking(main())
    assert done.ids == again.ids and len(done.ids) == 8


def test_a_deadline_while_waiting_leaves_the_line(engine):
    """Whoever gave up is not sampled, and is not waited for once it has left."""

    async def main():
        engine.join(), engine.join(), engine.join()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.generate(PROMPTS[0], [], greedy(2)), 0.05)
        others = [asyncio.create_task(engine.generate(p, [], greedy(2))) for p in PROMPTS[1:3]]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in others)
        engine.leave()
        await asyncio.wait_for(asyncio.gather(*others), GUARD)
        engine.leave(), engine.leave()

    run_blocking(main())
    assert engine.unfinished == 0 and engine.waiting == []


def test_an_error_in_the_model_reaches_all_who_wait_and_the_next_turn_works(engine, monkeypatch):
    """Out of memory, say: every row of the batch that is not done gets it."""
    forward, calls = engine._forward, []

    def breaks(*args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return forward(*args)

    async def main():
        turns = [engine.generate(p, [], greedy(2 if i else 9)) for i, p in enumerate(PROMPTS)]
        turns += [engine.generate(PROMPTS[0], [], greedy(7))]
        engine.unfinished = 5
        return await asyncio.wait_for(asyncio.gather(*turns, return_exceptions=True), GUARD)

    monkeypatch.setattr(engine, "_forward", breaks)
    failed, *early, failed_too = run_blocking(main())
    assert str(failed) == str(failed_too) == "out of memory"
    assert [len(c.ids) for c in early] == [2, 2, 2]  # they were done before
    engine.unfinished = 0
    assert len(sample(engine, [(PROMPTS[0], greedy(5))])[0].ids) == 5


def test_a_batch_that_everybody_gave_up_blocks_nobody(engine, monkeypatch):
    """It is in the middle of a forward, and whoever comes then is sampled after it."""

    async def main():
        opened = gate(engine, monkeypatch, calls=1)
        given_up = asyncio.create_task(engine.generate(PROMPTS[0], [], greedy(9)))
        await until(opened.reached.is_set)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        turn = asyncio.create_task(engine.generate(PROMPTS[1], [], greedy(4)))
        await until(lambda: engine.waiting)
        opened.set()
        return await asyncio.wait_for(turn, GUARD)

    assert len(run_blocking(main()).ids) == 4


def test_a_closed_engine_says_so_and_leaves_nobody_waiting(engine, monkeypatch):
    """A batch that runs is finished; who waits behind it, and who comes later, gets an error."""

    async def main():
        opened = gate(engine, monkeypatch, calls=1)
        running = asyncio.create_task(engine.generate(PROMPTS[0], [], greedy(3)))
        await until(opened.reached.is_set)
        waiting = asyncio.create_task(engine.generate(PROMPTS[1], [], greedy(3)))
        await until(lambda: engine.waiting)
        await engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            await asyncio.wait_for(waiting, GUARD)
        opened.set()
        assert len((await asyncio.wait_for(running, 10)).ids) == 3
        await until(lambda: not engine.is_decoding)
        with pytest.raises(RuntimeError, match="shutdown"):
            await asyncio.wait_for(engine.generate(PROMPTS[1], [], greedy(3)), GUARD)

    run_blocking(main())


def test_a_batch_that_had_not_begun_when_the_engine_was_closed_is_told(engine):
    """Its thread is busy with the rest of an older batch."""

    async def main():
        blocked = threading.Event()
        engine.thread.submit(blocked.wait, GUARD)
        turn = asyncio.create_task(engine.generate(PROMPTS[0], [], greedy(3)))
        await until(lambda: engine.is_decoding)
        await engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            await asyncio.wait_for(turn, GUARD)
        blocked.set()

    run_blocking(main())


def test_sync_samples_from_the_new_weights_and_in_eval_mode(engine, tokenizer):
    """Pitfalls 28, 35: the next turn is the new model's own; dropout is off."""
    other = others(tokenizer, "llama")
    before = sample(engine, [(PROMPTS[1], greedy(8))])
    other.train()
    run_blocking(engine.sync(other, 3))
    after = sample(engine, [(PROMPTS[1], greedy(8))])
    assert engine.version == 3 and not other.training and after[0].ids != before[0].ids


def test_an_engine_that_holds_nothing_and_waits_for_nobody_need_not_say_so(tokenizer):
    """What a new one has to give is generate, prompt_logprobs and sync; what it lacks it names."""

    class Bare(Engine):
        async def generate(self, ids, images, sampling):
            return Completion([5], [-1.0], "stop")

    bare = Bare()
    bare.join()
    bare.leave()
    for nothing in (bare.sleep, bare.wake, bare.close):
        run_blocking(nothing())
    assert bare.version == 0 and run_blocking(bare.generate([1], [], Sampling())).ids == [5]
    for missing in (
        bare.prompt_logprobs([1]),
        bare.sync(None, 1),
        Engine().generate([1], [], Sampling()),
    ):
        with pytest.raises(NotImplementedError, match="cannot"):
            run_blocking(missing)


# The scripted engine


def run(engine, *settings, ids=(1, 2)):
    return [run_blocking(engine.generate(list(ids), [], s)) for s in settings]


def test_a_script_is_said_turn_by_turn_and_its_end_is_an_error():
    engine = ScriptedEngine([[5, 6], Completion([7], [-0.5], "length")])
    first, second = run(engine, Sampling(seed=1), Sampling(seed=2))
    assert first == Completion([5, 6], [-1.0, -1.0], "stop")
    assert second == Completion([7], [-0.5], "length")
    assert [(ids, s.seed) for ids, s in engine.requests] == [([1, 2], 1), ([1, 2], 2)]
    with pytest.raises(IndexError, match="2 turns and one more"):
        run(engine, Sampling())


def test_a_script_is_cut_where_a_model_would_have_been_stopped(tokenizer):
    """By length, at a stop token, at a stop string: the same function decides in both engines."""
    text = tokenizer.encode("print(1 + 2) def return", add_special_tokens=False)
    engine = ScriptedEngine(lambda ids, sampling: text, tokenizer)
    whole, short, stopped, string = run(
        engine,
        Sampling(),
        Sampling(max_new_tokens=2),
        Sampling(stop_ids=(text[2],)),
        Sampling(stop_strings=("2)",)),
    )
    assert (whole.ids, whole.finish) == (text, "stop")
    assert (short.ids, short.finish) == (text[:2], "length")
    assert (stopped.ids, stopped.finish) == (text[:3], "stop")
    assert string.finish == "stop_string" and "def" not in tokenizer.decode(string.ids)


def test_a_script_may_be_a_function_of_what_is_asked_and_slow():
    all_ask = asyncio.Event()

    async def script(ids, sampling):
        if len(engine.requests) == 20:
            all_ask.set()
        await all_ask.wait()  # which none would pass if one waited for the other
        return [*ids, sampling.seed]

    engine = ScriptedEngine(script)

    async def main():
        turns = [engine.generate([i], [], Sampling(seed=9)) for i in range(20)]
        done = await asyncio.wait_for(asyncio.gather(*turns), GUARD)
        await engine.sync(None, 4)
        await engine.sleep()
        await engine.wake()
        await engine.close()
        return done

    assert [c.ids for c in run_blocking(main())] == [[i, 9] for i in range(20)]
    assert engine.version == 4


def test_logits_that_are_nan_end_the_run_in_a_sentence(engine):
    """Else a diverged model would say the last token of its vocabulary until the limit."""
    rows = [_Request([1], Sampling(), None, random.Random(0))]
    with pytest.raises(UserError, match="logits are NaN"):
        engine._sample(torch.full((1, 8), float("nan")), rows)


# Canary


def drifted(model, size, seed=0):
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return other


def test_the_canary_is_silent_while_both_have_the_same_weights(policy, tokenizer):
    """Pitfall 28, for the engine that samples with the trainer's own model: updates of any size."""
    engine, canary = TransformersEngine(policy, tokenizer), Canary(PROMPTS[3], "float32")
    model = policy
    for version, size in enumerate((0.0, 1e-6, 1e-4, 0.1)):
        model = drifted(model, size, version)
        seen = run_blocking(sync_and_check(engine, model, version, canary))
        assert seen["canary"] < 1e-5 and engine.version == version
    unchecked = run_blocking(sync_and_check(engine, model, 9, None))  # canary = false
    assert list(unchecked) == ["sync_seconds"]
    run_blocking(engine.close())


@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.3])
def test_the_canary_sees_weights_that_stayed_behind(policy, tokenizer, size):
    """Also an update so small that the difference is below the limit."""
    engine, canary = TransformersEngine(policy, tokenizer), Canary(PROMPTS[3], "float32")
    run_blocking(sync_and_check(engine, policy, 0, canary))
    with pytest.raises(UserError, match="sync 0: the engine"):
        run_blocking(canary.check(engine, drifted(policy, size)))
    run_blocking(engine.close())


def test_the_canary_sees_nan_and_one_odd_copy_among_several(policy, tokenizer):
    engine, canary = TransformersEngine(policy, tokenizer), Canary(PROMPTS[3], "float32")
    (right,) = run_blocking(engine.prompt_logprobs(PROMPTS[3]))

    class Copies(ScriptedEngine):
        scores = [right, right]

        async def prompt_logprobs(self, ids):
            return self.scores

    copies = Copies([])
    assert run_blocking(canary.check(copies, policy)) < 1e-5
    for wrong in ([x - 1 for x in right], [float("nan")] * len(right)):
        copies.scores = [right, wrong, right]
        with pytest.raises(UserError, match="differ"):
            run_blocking(canary.check(copies, policy))
    run_blocking(engine.close())


def test_scores_are_the_trainers_logprobs(engine, policy):
    ids = PROMPTS[3]
    (scores,) = run_blocking(engine.prompt_logprobs(ids))
    whole = torch.tensor([ids])
    ones = torch.ones_like(whole)
    with torch.no_grad():
        ours = token_logprobs(policy, whole, ones, ones)[0][0, 1:]
    assert torch.allclose(torch.tensor(scores), ours, atol=1e-5)

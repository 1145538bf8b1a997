"""The tool loop: what ends up in ids, mask and logprobs, whatever the model and the tools do.

    pytest tests/test_rollout.py

Pinned here: ids are never re-encoded, the four lists stay parallel, observations come in call
order, limits in their declared order, every kind of tool error, seeds, state, and that nothing goes
on behind a crash, a time-out or a Ctrl-C. The engine says what the test wrote.
"""

import asyncio
import os
import signal
import threading
import time
from collections import Counter

import pytest
from until import PATIENCE, until

import trajectory
from chat import Chat
from engines.base import Completion
from engines.scripted import ScriptedEngine
from player import Player
from rollout import Settings, play, rollouts, seed_of, shorten_tokens
from run.config import UserError
from run.loop import run_blocking
from tools import Toolbox
from tools.calling import toolbox as toolboxes
from train_grpo import next_prompts, sample_groups
from trajectory import ToolCall, Trajectory, spans, stats

EXAMPLE = {"id": 0, "messages": [{"role": "user", "content": "What is 2+3?"}], "answer": "5"}
STOP = "<|im_end|>"


def call(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


SHORT = 1.0  # seconds that a trajectory may take: what comes before its end has time on any machine
ADD = call("add", '{"a": 2, "b": 3}') + STOP
ANSWER = "It is 5." + STOP


def add(a: int, b: int) -> str:
    """Adds.

    Args:
        a: One number.
        b: The other.
    """
    return str(a + b)


def say(text: str) -> str:
    """Gives the text back.

    Args:
        text: What to say.
    """
    return text


def fail(text: str) -> str:
    """Raises.

    Args:
        text: What to say.
    """
    raise ValueError(f"no {text} here")


async def wait_for(seconds: float) -> str:
    """Waits.

    Args:
        seconds: How long.
    """
    await asyncio.sleep(seconds)
    return f"waited {seconds}"


class Counting(ScriptedEngine):
    """Knows how many trajectories have joined and not left."""

    playing = 0

    def join(self):
        self.playing += 1

    def leave(self):
        self.playing -= 1


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def stage(tokenizer, script, functions=(add, say, fail, wait_for), format="hermes", options=()):
    """(chat, engine, toolbox); a script's texts become ids."""
    box = Toolbox(functions, concurrency=128, timeout=PATIENCE, options=options)
    if not callable(script):
        script = [encode(tokenizer, turn) if isinstance(turn, str) else turn for turn in script]
    return Chat(tokenizer, format, box.schemas), Counting(script, tokenizer), box


def episode(tokenizer, script, format="hermes", functions=(add, say, fail, wait_for), **settings):
    """One trajectory, its engine and its toolbox, with what must hold for every trajectory."""
    options = settings.pop("tool_options", ())
    chat, engine, box = stage(tokenizer, script, functions, format, options)
    (t,) = asyncio.run(rollouts([EXAMPLE], chat, engine, box, Settings(**settings)))
    assert len(t.ids) == len(t.mask) == len(t.logprobs)
    for (ids, _), start in zip(engine.requests, t.turn_starts, strict=False):
        assert ids == t.ids[:start] and t.mask[start - 1] == 0
    assert [lp for lp, bit in zip(t.logprobs, t.mask, strict=True) if not bit] == [0.0] * (
        len(t.ids) - t.new_tokens
    )
    assert engine.playing == 0
    return t, engine, box


def sampled(t):
    return [i for i, bit in zip(t.ids, t.mask, strict=True) if bit]


def context(t, tokenizer):
    """The text behind the first turn that nobody sampled."""
    first = t.mask.index(1)
    return tokenizer.decode(
        [i for i, m in zip(t.ids[first:], t.mask[first:], strict=True) if not m]
    )


# Ids, mask, logprobs


def test_trained_ids_are_those_sent_to_and_returned_by_the_engine(tokenizer):
    """Pitfall 1: element by element, with pieces ("he", "llo") that no tokenizer would choose."""
    odd = [i for c in ADD.removesuffix(STOP) for i in encode(tokenizer, c)]
    odd += encode(tokenizer, STOP)
    assert odd != encode(tokenizer, ADD)
    last = [i for piece in ("he", "llo", STOP) for i in encode(tokenizer, piece)]
    t, engine, _ = episode(tokenizer, [odd, last])
    (first, _), (second, _) = engine.requests
    start, again = t.turn_starts
    assert first == t.ids[:start] and t.ids[start : start + len(odd)] == odd
    assert second == t.ids[:again] and t.ids[again:] == last
    assert sampled(t) == odd + last and t.calls[0].result == "5"


def test_mask_is_one_on_sampled_tokens_and_their_stop_token_and_on_nothing_else(tokenizer):
    """Pitfalls 3, 12, 13: prompt, glue, observation, generation prompt are 0, <|im_end|> is 1."""
    t, engine, _ = episode(tokenizer, [ADD, ANSWER])
    turns = encode(tokenizer, ADD), encode(tokenizer, ANSWER)
    expected = [0] * len(t.ids)
    for start, turn in zip(t.turn_starts, turns, strict=True):
        expected[start : start + len(turn)] = [1] * len(turn)
    assert t.mask == expected and t.mask[-1] == 1 and t.ids[-1] == tokenizer.eos_token_id
    assert sampled(t) == turns[0] + turns[1] and t.new_tokens == len(sampled(t))


def test_logprobs_are_the_engines_where_sampled_and_zero_elsewhere(tokenizer):
    """Pitfall 15: not even an engine that gives odd numbers can put one on an observation."""
    turn = encode(tokenizer, ADD)
    numbers = [-0.5 - i for i in range(len(turn))]
    script = [Completion(turn, numbers, "stop"), ANSWER]
    t, _, _ = episode(tokenizer, script)
    start = t.turn_starts[0]
    assert t.logprobs[start : start + len(turn)] == numbers
    assert {lp for lp, bit in zip(t.logprobs, t.mask, strict=True) if not bit} == {0.0}


def test_lists_are_parallel_after_every_turn(tokenizer):
    """Pitfall 2: also behind a turn of nothing but the stop token, and an empty result."""
    texts = [ADD, call("say", '{"text": ""}') + STOP, call("nope", "{}") + STOP, STOP]
    t = Trajectory(EXAMPLE)

    def script(ids, sampling):
        assert len(t.ids) == len(t.mask) == len(t.logprobs) and ids == t.ids
        return encode(tokenizer, texts[len(t.turn_starts)])

    chat, engine, box = stage(tokenizer, script)
    asyncio.run(play(t, chat.prompt(EXAMPLE["messages"]), chat, engine, box, Settings()))
    assert (t.stop, len(t.turn_starts)) == ("answered", 4)
    assert len(t.ids) == len(t.mask) == len(t.logprobs)


def test_ids_are_added_with_as_many_logprobs_or_not_at_all():
    """Pitfall 2: what does not fit together is refused and leaves the lists as they were."""
    t = Trajectory(EXAMPLE)
    for wrong in (([1, 2], 1, [0.5]), ([1], 1, None), ([1], 0, [0.5]), ([1], 2, None)):
        with pytest.raises(AssertionError):
            t.add(*wrong)
    assert t.ids == t.mask == t.logprobs == []


def test_line_break_between_a_turn_and_the_next_header_is_there_once(tokenizer):
    """Pitfall 5: ChatML's newline behind <|im_end|>."""
    t, _, _ = episode(tokenizer, [ADD, ANSWER])
    text = tokenizer.decode(t.ids)
    assert f"{ADD}\n<|im_start|>user\n<tool_response>\n5\n</tool_response>{STOP}\n" in text
    assert text.endswith(f"{STOP}\n<|im_start|>assistant\n{ANSWER}")


def test_a_turn_cut_by_length_ends_the_trajectory_and_its_call_is_not_run(tokenizer):
    """Pitfalls 6, 8: a whole call is there, but the turn was cut behind it."""
    text = ADD.removesuffix(STOP)
    n = len(encode(tokenizer, text))
    t, engine, _ = episode(tokenizer, [text + "and so on" * 9, ANSWER], max_new_tokens=n)
    assert t.stop == "length" and t.calls == [] and len(engine.requests) == 1
    assert t.mask[-1] == 1 and tokenizer.decode(t.ids).endswith("</tool_call>")


def test_a_call_inside_thinking_or_a_json_string_is_text(tokenizer):
    """Pitfall 10: <think> holds no call, and </tool_call> in a string does not end one."""
    t, _, _ = episode(tokenizer, [f"<think>{ADD.removesuffix(STOP)}</think>5{STOP}"])
    assert (t.stop, t.calls) == ("answered", [])
    t, _, _ = episode(tokenizer, [call("say", '{"text": "a </tool_call> b"}') + STOP, ANSWER])
    assert [c.arguments for c in t.calls] == [{"text": "a </tool_call> b"}]
    assert t.stop == "answered" and t.calls[0].error is None


def test_an_observation_that_the_model_wrote_itself_is_its_own_text(tokenizer):
    """Pitfall 11: mask 1, and no result: the true one follows."""
    fake = "\n<tool_response>\n77\n</tool_response>"
    turn = ADD.removesuffix(STOP) + fake + STOP
    t, _, _ = episode(tokenizer, [turn, ANSWER])
    assert sampled(t)[: len(encode(tokenizer, turn))] == encode(tokenizer, turn)
    assert [c.result for c in t.calls] == ["5"]
    assert "77" not in context(t, tokenizer) and "\n5\n" in context(t, tokenizer)
    assert not any("77" in m["content"] for m in t.messages if m["role"] == "tool")


# Calls and observations


def test_observations_stand_in_call_order_and_calls_run_at_once(tokenizer):
    """Pitfall 7: the first call ends only when the second, made in the same turn, is done."""
    done = []

    async def work(text: str) -> str:
        """Works.

        Args:
            text: What to say.
        """
        while text == "slow" and done != ["fast"]:
            await asyncio.sleep(0.01)
        done.append(text)
        return text

    both = call("work", '{"text": "slow"}') + "\n" + call("work", '{"text": "fast"}')
    t, _, _ = episode(tokenizer, [both + STOP, ANSWER], functions=[work])
    assert done == ["fast", "slow"] and [c.result for c in t.calls] == ["slow", "fast"]
    text = context(t, tokenizer)
    assert text.index("slow") < text.index("fast")
    assert [m["content"] for m in t.messages if m["role"] == "tool"] == ["slow", "fast"]


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("bad_json", "<tool_call>\n{oops\n</tool_call>", "no valid JSON"),
        ("unknown_tool", call("sub", '{"a": 1}'), "there is no tool 'sub'"),
        ("bad_arguments", call("add", '{"a": "2", "b": 3}'), "a must be integer"),
        ("exception", call("fail", '{"text": "ham"}'), "ValueError: no ham here"),
        ("timeout", call("wait_for", '{"seconds": 9}'), "took longer than 0.2 s"),
        ("oversized", call("say", f'{{"text": "{"x" * 900}"}}'), "characters cut"),
    ],
)
def test_each_error_is_an_observation_with_its_own_counter(
    tokenizer, monkeypatch, kind, text, says
):
    """Pitfall 9: none raises, and the episode goes on."""
    monkeypatch.setattr(toolboxes, "MAX_RESULT_CHARS", 800)
    room = {"max_tokens": 9999, "max_new_tokens": 2000, "max_observation_tokens": 2000}
    options = ("wait_for.timeout=0.2",)
    t, _, box = episode(tokenizer, [text + STOP, ADD, ANSWER], tool_options=options, **room)
    assert t.stop == "answered" and [c.error for c in t.calls] == [kind, None]
    assert box.errors == Counter({kind: 1})
    assert says in t.calls[0].result and t.calls[0].result in context(t, tokenizer)
    assert [m["role"] for m in t.messages][-4:] == ["tool", "assistant", "tool", "assistant"]


def test_a_malformed_call_beside_a_good_one_keeps_its_place(tokenizer):
    """Pitfalls 7, 9: one observation each, in call order."""
    turn = "<tool_call>\n{oops\n</tool_call>\n" + ADD
    t, _, _ = episode(tokenizer, [turn, ANSWER])
    assert [c.error for c in t.calls] == ["bad_json", None]
    assert context(t, tokenizer).count("<tool_response>") == 2


def test_a_lone_surrogate_that_an_error_quotes_becomes_text(tokenizer):
    """Pitfall 9: JSON can spell half a character, which no tokenizer encodes."""
    turn = call("add", '{"a": "\\ud800", "b": 3}') + STOP
    t, _, box = episode(tokenizer, [turn, ANSWER])
    assert t.stop == "answered" and box.errors == {"bad_arguments": 1}
    assert 'not "?"' in t.calls[0].result


def test_a_hung_tool_is_cut_at_its_deadline_and_counted_as_leaked(tokenizer):
    """Pitfall 37: a thread cannot be ended, so it is counted; the episode goes on."""
    release = threading.Event()

    def hang(text: str) -> str:
        """Hangs.

        Args:
            text: What to say.
        """
        release.wait(PATIENCE)

    turn = call("hang", '{"text": "x"}') + STOP
    options = ("hang.timeout=0.2",)
    t, _, box = episode(tokenizer, [turn, ANSWER], functions=[hang], tool_options=options)
    assert t.calls[0].error == "timeout" and t.stop == "answered"
    assert box.leaked == 1  # the episode is over, and the thread still waits
    release.set()


def test_tool_latency_is_shared_by_all_trajectories(tokenizer):
    """Pitfall 38: each of 64 calls, one a trajectory, ends when all of them have begun."""
    all_have_begun = threading.Barrier(64, timeout=PATIENCE)

    def meet(text: str) -> str:
        """Meets.

        Args:
            text: What to say.
        """
        all_have_begun.wait()
        return text

    called = encode(tokenizer, call("meet", '{"text": "x"}') + STOP)
    answer = encode(tokenizer, ANSWER)
    prompts = {}

    def script(ids, sampling):
        return answer if len(ids) > prompts["length"] else called

    chat, engine, box = stage(tokenizer, script, [meet])
    prompts["length"] = len(chat.prompt(EXAMPLE["messages"]))
    done = asyncio.run(rollouts([EXAMPLE], chat, engine, box, Settings(), samples=64))
    assert [t.stop for t in done] == ["answered"] * 64
    assert [[c.error for c in t.calls] for t in done] == [[None]] * 64


def test_a_slow_tool_delays_only_its_own_trajectory(tokenizer):
    """Others are done, scored and reported while one waits; results come in the order asked for."""
    order = []

    def script(ids, sampling):
        return encode(tokenizer, ANSWER)

    async def late(ids, sampling):
        if len(engine.requests) == 1:  # it waits for the three others
            async with asyncio.timeout(PATIENCE):
                while len(order) < 3:
                    await asyncio.sleep(0.01)
        return script(ids, sampling)

    chat, engine, box = stage(tokenizer, late)
    done = asyncio.run(
        rollouts(
            [EXAMPLE, EXAMPLE | {"id": 1}],
            chat,
            engine,
            box,
            Settings(),
            samples=2,
            rewards={"one": (lambda t, e: 1.0, 1.0)},
            on_done=lambda t: order.append((t.group, t.sample, t.reward)),
        )
    )
    assert [(t.group, t.sample) for t in done] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert order[-1] == (0, 0, 1.0) and len(order) == 4
    assert [t.example["id"] for t in done] == [0, 0, 1, 1]


def test_members_of_a_group_never_share_a_tools_state(tokenizer):
    """Pitfall 40: each trajectory counts from one, keeps its count between turns, and closes it."""
    closed = []

    class counter:
        def __init__(self):
            self.n = 0

        def __call__(self, text: str) -> str:
            """Counts its calls.

            Args:
                text: What to say.
            """
            self.n += 1
            return f"call {self.n}"

        def close(self):
            closed.append(self.n)

    called, answer = encode(tokenizer, call("counter", '{"text": "x"}') + STOP), ANSWER

    def script(ids, sampling):
        seen = tokenizer.decode(ids).count("call 1") + tokenizer.decode(ids).count("call 2")
        return called if seen < 2 else encode(tokenizer, answer)

    chat, engine, box = stage(tokenizer, script, [counter])
    done = asyncio.run(rollouts([EXAMPLE], chat, engine, box, Settings(), samples=4))
    assert [[c.result for c in t.calls] for t in done] == [["call 1", "call 2"]] * 4
    assert closed == [2] * 4


def test_an_image_is_text_to_a_model_that_sees_none(tokenizer):
    """A tool result of an unexpected kind is an observation, never the end of the episode."""
    from PIL import Image

    def draw(text: str) -> str:
        """Draws.

        Args:
            text: What to draw.
        """
        return [text, Image.new("RGB", (2, 2))]

    turn = call("draw", '{"text": "a dot"}') + STOP
    t, _, _ = episode(tokenizer, [turn, ANSWER], functions=[draw])
    assert t.stop == "answered" and t.images == []
    assert t.calls[0].result == "a dot\n(an image, which this model cannot see)"


# Limits


@pytest.mark.parametrize(
    ("stop", "script", "settings"),
    [
        ("answered", [ADD, ANSWER], {}),
        ("length", [ADD, "on and on" * 20], {"max_new_tokens": 60}),
        ("max_turns", [ADD, ADD], {"max_turns": 2}),
        ("max_tool_calls", [ADD, ADD], {"max_tool_calls": 1}),
        ("timeout", [call("wait_for", '{"seconds": 99}') + STOP], {"trajectory_timeout": SHORT}),
    ],
)
def test_answered_is_said_only_of_a_trajectory_that_ended_by_its_own_choice(
    tokenizer, stop, script, settings
):
    """Pitfall 24: every other end has its own name, and the last turn stays trained."""
    t, engine, _ = episode(tokenizer, script, **settings)
    assert t.stop == stop and len(engine.requests) == len(script) == len(t.turn_starts)
    assert t.mask[-1] == 1


def test_a_toolbox_that_does_not_open_ends_this_trajectory_as_error(tokenizer, monkeypatch):
    """Pitfall 24: not the run; the prompt is there, nothing was sampled."""
    chat, engine, box = stage(tokenizer, [])
    monkeypatch.setattr(box, "open", lambda: 1 / 0)
    (t,) = asyncio.run(rollouts([EXAMPLE], chat, engine, box, Settings()))
    assert (t.stop, t.new_tokens, box.errors["open"], engine.playing) == ("error", 0, 1, 0)
    assert t.calls[0].error == "exception" and engine.requests == []


def test_limits_are_checked_in_their_declared_order(tokenizer):
    """Tokens, turns, tool calls: of two that are met at once the earlier one is named."""
    n = len(encode(tokenizer, ADD))
    everything = {"max_turns": 1, "max_tool_calls": 0}
    assert episode(tokenizer, [ADD + "!"], max_new_tokens=n - 1, **everything)[0].stop == "length"
    assert episode(tokenizer, [ADD], **everything)[0].stop == "max_turns"
    assert episode(tokenizer, [ADD], max_tool_calls=0)[0].stop == "max_tool_calls"


def test_calls_over_the_limit_are_not_run_in_part(tokenizer):
    """Two calls where one is left: neither runs."""
    turn = ADD.removesuffix(STOP) + "\n" + ADD
    t, _, _ = episode(tokenizer, [turn], max_tool_calls=1)
    assert (t.stop, t.calls) == ("max_tool_calls", [])


def test_the_final_turn_is_announced_and_runs_no_tool(tokenizer):
    """final_turn: one more turn behind max_turns, told so in the observation."""
    t, _, _ = episode(tokenizer, [ADD, ANSWER], max_turns=1, final_turn=True)
    assert t.stop == "answered" and "answer now, without tools" in context(t, tokenizer)
    assert t.calls[0].result == "5"
    t, engine, _ = episode(tokenizer, [ADD, ADD], max_turns=1, final_turn=True)
    assert (t.stop, len(t.calls), len(engine.requests)) == ("max_turns", 1, 2)
    t, _, _ = episode(tokenizer, [ADD, ADD, ANSWER], max_turns=2, final_turn=True)
    assert context(t, tokenizer).count("answer now") == 1


@pytest.mark.parametrize("over", [0, 1, 100])
def test_a_prompt_that_fills_the_context_gives_a_trajectory_without_sampled_tokens(tokenizer, over):
    """Pitfall 27: the engine is not asked, and rewards, numbers and colours go on."""
    chat, engine, box = stage(tokenizer, [])
    room = len(chat.prompt(EXAMPLE["messages"])) - over
    reward = {"correct": (lambda t, e: float(t.stop == "answered"), 1.0)}
    args = [EXAMPLE], chat, engine, box, Settings(max_tokens=room)
    (t,) = asyncio.run(rollouts(*args, rewards=reward))
    assert (t.stop, t.new_tokens, t.turn_starts, engine.requests) == ("length", 0, [], [])
    assert t.reward == 0.0 and stats([t], "correct")["new_tokens"] == 0
    assert [kind for kind, _ in spans(t, tokenizer)] == ["c"]


def test_a_turn_never_passes_the_room_that_is_left(tokenizer):
    """max_tokens counts prompt and observations."""
    chat, engine, box = stage(tokenizer, ["on and on" * 30])
    room = len(chat.prompt(EXAMPLE["messages"])) + 7
    (t,) = asyncio.run(rollouts([EXAMPLE], chat, engine, box, Settings(max_tokens=room)))
    assert engine.requests[0][1].max_new_tokens == 7
    assert (t.stop, len(t.ids), t.new_tokens) == ("length", room, 7)


def test_an_observation_that_does_not_fit_is_not_half_added(tokenizer):
    """Pitfalls 2, 45: neither its ids nor its message; the call itself is on record."""
    chat, _, _ = stage(tokenizer, [])
    used = len(chat.prompt(EXAMPLE["messages"])) + len(encode(tokenizer, ADD))
    fits = len(episode(tokenizer, [ADD, ANSWER])[0].ids) - len(encode(tokenizer, ANSWER))
    for room in (used, used + 3, fits):  # at `fits` no token could follow it
        t, engine, _ = episode(tokenizer, [ADD], max_tokens=room)
        assert (t.stop, len(t.ids), len(engine.requests)) == ("length", used, 1)
        assert t.mask[-1] == 1 and t.messages[-1]["role"] == "assistant"
        assert [c.result for c in t.calls] == ["5"]
    t, engine, _ = episode(tokenizer, [ADD, ANSWER], max_tokens=fits + 1)
    assert (t.stop, len(t.ids)) == ("length", fits + 1)


def test_a_long_observation_is_cut_in_its_middle_and_the_prompt_never(tokenizer):
    """Head and tail stay, the cut is marked; the system prompt is over the limit and whole."""
    long = "BEGIN " + "what is the sum " * 60 + "END"
    system = {"role": "system", "content": "Be brief. " * 50}
    example = EXAMPLE | {"messages": [system, *EXAMPLE["messages"]]}
    turn = call("say", f'{{"text": "{long}"}}') + STOP
    chat, engine, box = stage(tokenizer, [turn, ANSWER])
    settings = Settings(max_observation_tokens=40, max_new_tokens=2000, max_tokens=4000)
    (t,) = asyncio.run(rollouts([example], chat, engine, box, settings))
    (result,) = [c.result for c in t.calls]
    assert (
        result.startswith("BEGIN ") and result.endswith("END") and "characters cut ...]" in result
    )
    assert result in context(t, tokenizer) and len(encode(tokenizer, result)) < 40 + 30
    prompt = chat.prompt(example["messages"])
    assert len(prompt) > 200
    assert all(ids[: len(prompt)] == prompt for ids, _ in engine.requests)


def test_results_of_one_turn_share_the_observations_limit(tokenizer):
    """Ten calls do not fill the context ten times."""
    one = call("say", '{"text": "' + "what is the sum " * 20 + '"}')
    t, _, _ = episode(tokenizer, ["\n".join([one] * 4) + STOP, ANSWER], max_observation_tokens=80)
    assert len(t.calls) == 4
    assert all(len(encode(tokenizer, c.result)) < 20 + 30 for c in t.calls)


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("text", ["漢字" * 200, "x" * 5000, "a b\n" * 300])
def test_cut_text_has_about_as_many_tokens_as_were_allowed(tokenizer, limit, text):
    """Also where one character takes several tokens."""
    short = shorten_tokens(text, limit, tokenizer)
    mark = short[short.index("\n[...") : short.index("cut ...]\n") + 9]
    slack = len(encode(tokenizer, mark)) + 12  # half characters at the cut are spelt in bytes
    assert len(encode(tokenizer, short)) <= limit + slack
    assert len(short.split("\n[...")[0]) <= limit


def test_text_that_fits_is_not_touched(tokenizer):
    assert shorten_tokens("x y z", 100, tokenizer) == "x y z"
    text = "what is the sum " * 20
    assert shorten_tokens(text, len(encode(tokenizer, text)), tokenizer) == text
    assert shorten_tokens(text, len(encode(tokenizer, text)) - 1, tokenizer) != text


def test_a_megabyte_is_cut_without_holding_up_the_others(tokenizer):
    """Only the ends are encoded: encoding it all takes a second on the event loop."""
    encoded = []

    class Watched:
        decode = staticmethod(tokenizer.decode)

        def encode(self, text, **options):
            encoded.append(len(text))
            return tokenizer.encode(text, **options)

    short = shorten_tokens("x" * 1_000_000, 512, Watched())
    assert "characters cut" in short and sum(encoded) < 20_000


@pytest.mark.parametrize("slow", ["engine", "tool"])
def test_a_trajectory_over_its_time_keeps_its_whole_turns(tokenizer, slow):
    """Pitfalls 2, 24: it ends as "timeout" with the lists parallel, whatever it waited for."""
    turns = [ADD, call("wait_for", '{"seconds": 99}') + STOP]

    async def script(ids, sampling):
        if slow == "engine" and len(engine.requests) == 2:
            await asyncio.sleep(99)
        return encode(tokenizer, turns[len(engine.requests) - 1])

    chat, engine, box = stage(tokenizer, script)
    settings = Settings(trajectory_timeout=SHORT)
    (t,) = asyncio.run(rollouts([EXAMPLE], chat, engine, box, settings))
    assert t.stop == "timeout" and SHORT <= t.seconds < PATIENCE
    assert len(t.ids) == len(t.mask) == len(t.logprobs) and engine.playing == 0
    whole = turns[: 1 if slow == "engine" else 2]
    assert sampled(t) == [i for turn in whole for i in encode(tokenizer, turn)]
    assert len(t.turn_starts) == len(whole) and [c.result for c in t.calls] == ["5"]


def test_an_engine_that_times_out_itself_is_a_crash_and_no_slow_trajectory(tokenizer):
    """Pitfall 24: "timeout" is this trajectory's wall time and nobody else's."""

    async def script(ids, sampling):
        raise TimeoutError("the server does not answer")

    with pytest.raises(TimeoutError, match="the server does not answer"):
        episode(tokenizer, script)


# Text formats


def test_a_fenced_result_stands_in_the_open_turn(tokenizer):
    """Pitfalls 1, 11: stopped at the closing fence, before an output of its own; ids as sampled."""
    code = "So:\n```python\nhi\n```\n"
    turn = code + "```output\n99\n```\n"
    t, engine, _ = episode(tokenizer, [turn, ANSWER], "fence", functions=[say])
    first = sampled(t)[: -len(encode(tokenizer, ANSWER))]
    assert first == encode(tokenizer, turn)[: len(first)]  # what the last token wrote more, stays
    assert "99" not in tokenizer.decode(t.ids) and [c.result for c in t.calls] == ["hi"]
    assert context(t, tokenizer) == "```output\nhi\n```\n"
    assert t.stop == "answered" and engine.requests[0][1].stop_strings == ("\n```\n",)
    assert sampled(t).count(tokenizer.eos_token_id) == 1


def test_a_tagged_result_stands_in_the_open_turn_and_an_answer_ends_it(tokenizer):
    """Pitfalls 11, 12, 24: </search> and </answer> both stop; only the latter is an answer."""
    script = ["I look. <say>ham</say><information>99", "So <answer>5</answer> and on"]
    t, _, _ = episode(tokenizer, script, "tags", functions=[say])
    assert context(t, tokenizer) == "\n<information>ham</information>\n"
    assert "99" not in tokenizer.decode(t.ids) and t.stop == "answered"
    assert len(t.turn_starts) == 2 and t.mask[-1] == 1
    assert tokenizer.decode(t.ids).rstrip(" a").endswith("</answer>")


def test_a_fence_closed_by_its_stop_token_is_answered_in_a_new_message(tokenizer):
    """Pitfalls 5, 6: no result inside a turn that is closed."""
    t, _, _ = episode(tokenizer, [f"```python\nhi\n```{STOP}", ANSWER], "fence", functions=[say])
    expected = "\n<|im_start|>user\n```output\nhi\n```\n" + STOP
    assert context(t, tokenizer).startswith(expected) and t.stop == "answered"


# Seeds and rewards


def test_no_two_turns_share_a_seed_and_nobodys_seed_depends_on_who_is_first(tokenizer):
    """Pitfall 54: over steps, prompts, samples and turns; a slow trajectory changes nothing."""

    def play_all(delays, step=0, seed=0):
        async def script(ids, sampling):
            await asyncio.sleep(delays[len(engine.requests) % len(delays)])
            turns = tokenizer.decode(ids).count("<|im_start|>assistant")
            noise = encode(tokenizer, str(sampling.seed % 1000))
            return noise + encode(tokenizer, ADD if turns < 3 else ANSWER)

        chat, engine, box = stage(tokenizer, script)
        examples = [EXAMPLE, EXAMPLE | {"id": 1}]
        settings = Settings(seed=seed, temperature=0.7, max_new_tokens=99)
        done = asyncio.run(rollouts(examples, chat, engine, box, settings, step, samples=3))
        seeds = [sampling.seed for _, sampling in engine.requests]
        # all turns are sampled alike, but for their seed
        assert {(s.temperature, s.max_new_tokens) for _, s in engine.requests} == {(0.7, 99)}
        return [t.ids for t in done], seeds

    ids, seeds = play_all([0])
    again, other_order = play_all([0.02, 0, 0.01])
    assert ids == again and sorted(seeds) == sorted(other_order) and seeds != other_order
    assert len(seeds) == 2 * 3 * 3
    seeds += play_all([0], step=1)[1] + play_all([0], seed=1)[1]
    assert len(set(seeds)) == len(seeds) == 54 and 0 <= min(seeds) <= max(seeds) < 2**63


def test_a_seed_is_the_same_in_every_process():
    """Pitfall 52: not Python's salted hash."""
    assert seed_of(0, 1, 2, 3, 4) == 5002988805816502467


def test_each_trajectory_is_scored_on_its_own_and_none_is_not_zero(tokenizer):
    """Pitfall 23: a reward that weighs something and is None makes the sum None."""

    def script(ids, sampling):
        return encode(tokenizer, "abcd"[len(engine.requests) % 4] + STOP)

    def letter(t, example):
        return {"a": 0.0, "b": 1.0, "c": None, "d": float("nan")}[t.messages[-1]["content"]]

    def rare(t, example):
        return None

    chat, engine, box = stage(tokenizer, script)
    rewards = {"letter": (letter, 2.0), "rare": (rare, 0.0)}
    args = [EXAMPLE], chat, engine, box, Settings()
    done = asyncio.run(rollouts(*args, samples=4, rewards=rewards))
    assert [t.reward for t in done] == [2.0, None, None, 0.0]
    assert [t.rewards["letter"] for t in done] == [1.0, None, None, 0.0]
    assert all(t.rewards["rare"] is None for t in done)


def test_a_reward_that_sees_its_group_is_asked_when_all_of_that_have_ended(tokenizer):
    def script(ids, sampling):
        return encode(tokenizer, "abcdefgh"[len(engine.requests) - 1] + STOP)

    seen = []

    def own(t, e):
        return 1.0

    def better(t, e, group):
        assert all(member.rewards["own"] == 1.0 for member in group)  # these are known by then
        seen.append((t.group, [member.sample for member in group]))
        return [2.0 * t.sample]

    def all_of_it(group, e):
        return [0.5 if member.sample else None for member in group]

    done = []
    chat, engine, box = stage(tokenizer, script)
    rewards = {"own": (own, 1.0), "better": (better, 0.1), "all": (all_of_it, 0.0)}
    args = [EXAMPLE, EXAMPLE], chat, engine, box, Settings()
    played = asyncio.run(rollouts(*args, samples=3, rewards=rewards, on_done=done.append))
    assert [(t.group, t.sample) for t in played] == [(g, s) for g in (0, 1) for s in (0, 1, 2)]
    assert [t.reward for t in played] == [1.0, 1.2, 1.4] * 2
    assert [t.turn_rewards for t in played] == [[0.0], [0.2], [0.4]] * 2
    assert played[1].rewards == {"own": 1.0, "better": 2.0, "all": 0.5}
    assert played[0].rewards == {"own": 1.0, "better": 0.0, "all": None}
    assert sorted(seen) == [(g, [0, 1, 2]) for g in (0, 0, 0, 1, 1, 1)]
    assert sorted(id(t) for t in done) == sorted(
        id(t) for t in played
    )  # each once, with its reward


# Crashes, cancellation


@pytest.mark.parametrize("who", ["engine", "reward", "on_done"])
def test_a_crash_reaches_the_caller_and_leaves_no_task_behind(tokenizer, who):
    """The others are cancelled, their tools closed, and the engine waits for none of them."""

    async def script(ids, sampling):
        if len(engine.requests) != 3:
            await asyncio.Event().wait()  # for ever, if nobody cancels it
        await asyncio.sleep(0.1)
        if who == "engine":
            raise RuntimeError("engine broke")
        return encode(tokenizer, ANSWER)

    def broken(*_):
        raise RuntimeError(f"{who} broke")

    async def main():
        rewards = {"r": (broken if who == "reward" else lambda t, e: 1.0, 1.0)}
        on_done = broken if who == "on_done" else None
        args = [EXAMPLE], chat, engine, box, Settings(), 0, 5, rewards, on_done
        with pytest.raises((RuntimeError, UserError), match=f"{who} "):
            await asyncio.wait_for(rollouts(*args), PATIENCE)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    chat, engine, box = stage(tokenizer, script)
    asyncio.run(main())
    assert engine.playing == 0


def test_trajectories_that_are_cancelled_leave_the_engine_too(tokenizer):
    """Otherwise a deterministic engine would wait for them for ever."""

    async def forever(ids, sampling):
        await asyncio.sleep(1000)

    async def main():
        task = asyncio.create_task(rollouts([EXAMPLE], *parts, Settings(), samples=4))
        await asyncio.sleep(0)  # it has made its tasks, and none has begun
        assert parts[1].playing == 4 and parts[1].requests == []
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    parts = stage(tokenizer, forever)
    asyncio.run(main())
    assert parts[1].playing == 0
    parts = stage(tokenizer, [])  # the first one raises at once
    with pytest.raises(IndexError):
        asyncio.run(rollouts([EXAMPLE], *parts, Settings(), samples=4))
    assert parts[1].playing == 0


def test_wait_gives_the_result_or_the_error_also_under_a_running_loop():
    """From ordinary code, and from a notebook's cell."""

    async def three():
        await asyncio.sleep(0)
        return 3, asyncio.get_running_loop()

    async def broken():
        raise ValueError("no")

    async def cell():
        return run_blocking(three())

    value, loop = run_blocking(three())
    assert value == 3 and run_blocking(three())[1] is loop  # one loop: connections stay open
    assert asyncio.run(cell()) == (3, loop)
    with pytest.raises(ValueError, match="no"):
        run_blocking(broken())


def test_ctrl_c_ends_what_is_waited_for_and_its_tools_before_it_is_seen(tokenizer):
    """Nothing goes on behind the caller's back; a tool's close() has run."""
    closed = []

    class lab:
        def __call__(self, text: str) -> str:
            """Works.

            Args:
                text: What to say.
            """
            return text

        def close(self):
            time.sleep(0.1)
            closed.append(True)

    async def script(ids, sampling):
        if len(engine.requests) > 1:
            timer.start()
            await asyncio.sleep(PATIENCE)
            slept_on.append(True)
        return encode(tokenizer, call("lab", '{"text": "x"}') + STOP)

    slept_on = []
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    chat, engine, box = stage(tokenizer, script, [lab])
    with pytest.raises(KeyboardInterrupt):
        run_blocking(rollouts([EXAMPLE], chat, engine, box, Settings()))
    assert closed == [True] and engine.playing == 0 and not slept_on
    assert run_blocking(asyncio.sleep(0, "alive")) == "alive"


# For people


@pytest.mark.parametrize("text", ["ham", "", "BEGIN " + "what is the sum " * 60 + "END"])
def test_spans_are_the_whole_text_in_pieces(tokenizer, text):
    """trained where the mask is 1, tool where a tool spoke, an empty or a cut result included."""
    turn = call("say", f'{{"text": "{text}"}}') + STOP
    script = [turn, ADD, ANSWER]
    t, _, _ = episode(tokenizer, script, max_observation_tokens=60, max_new_tokens=999)
    pieces = spans(t, tokenizer)
    assert "".join(piece for _, piece in pieces) == tokenizer.decode(t.ids)
    assert [piece for kind, piece in pieces if kind == "t"] == script
    results = [c.result for c in t.calls if c.result]
    assert [piece for kind, piece in pieces if kind == "o"] == results


def test_spans_take_nothing_in_the_prompt_for_a_result(tokenizer):
    """The prompt says 5 as well, and two results are the same."""
    example = EXAMPLE | {"messages": [{"role": "user", "content": "Is 5 = 5?"}]}
    chat, engine, box = stage(tokenizer, [ADD.replace(STOP, "\n") + ADD, ANSWER])
    (t,) = asyncio.run(rollouts([example], chat, engine, box, Settings()))
    kinds = [kind for kind, _ in spans(t, tokenizer)]
    assert kinds == ["c", "t", *["c", "o"] * 2, "c", "t"]


def test_show_prints_a_trajectory_with_brackets_in_it(tokenizer, capsys):
    """rich reads [red] as markup: what a model or a tool wrote is shown as it is."""
    turn = call("say", '{"text": "[red] [/x]"}') + STOP
    t, _, _ = episode(tokenizer, [turn, ANSWER])
    trajectory.show(t, tokenizer)
    printed = capsys.readouterr().out
    assert printed.count("[red] [/x]") == 3 and "answered, 2 turns" in printed


def test_stats_of_a_set_made_by_hand():
    """Pitfall 23: None counts in no mean; a group with one reward left has nothing to compare."""

    def made(group, reward, calls=(), stop="answered", new=2, turns=1):
        t = Trajectory({}, group, calls=list(calls), stop=stop, reward=reward)
        t.rewards = {"correct": reward, "brief": None}
        t.add([1, 2], 0)
        t.add([3] * new, 1, [-1.0] * new)
        t.turn_starts = list(range(turns))
        return t

    good = ToolCall(0, "add", {}, "5", None, 0.5)
    empty = ToolCall(0, "add", {}, "", None, 0.0)  # the cache knew it
    silent = ToolCall(0, "python", {}, "(no output: use print)", None, 1.5)
    bad = ToolCall(1, "add", None, "malformed", "bad_json", 0.0)
    out = stats(
        [
            made(0, 1.0, [good, empty], turns=2),
            made(0, 0.0, stop="length", new=6),
            made(1, 1.0, [silent, bad], turns=3),
            made(1, None, stop="timeout", new=0, turns=0),
        ],
        "correct",
    )
    assert out == {
        "rollouts": 4,
        "reward": pytest.approx(2 / 3),
        "reward_none": 1,
        "reward_correct": pytest.approx(2 / 3),
        "reward_brief": 0.0,
        "accuracy": pytest.approx(2 / 3),
        "equal_groups": 0.5,
        "tool_call_rate": 0.5,
        "tool_calls": 1.0,
        "tool_error_rate": 0.25,
        "empty_observation_rate": 0.5,
        "tool_errors_bad_json": 1,
        "tool_seconds": 0.5,
        "calls_add": 2,
        "errors_add": 0,
        "seconds_p50_add": 0.5,
        "seconds_p95_add": 0.5,
        "calls_python": 1,
        "errors_python": 0,
        "seconds_p50_python": 1.5,
        "seconds_p95_python": 1.5,
        "turns": 1.5,
        "new_tokens": 2.5,
        "tokens": 4.5,
        "stop_answered": 0.5,
        "stop_length": 0.25,
        "stop_timeout": 0.25,
    }


# A tool that gives the answer


def give(answer: str) -> str:
    """Gives the answer.

    Args:
        answer: It.
    """
    if answer == "?":
        raise ValueError("no answer")
    return answer


give.ends = True
GIVE = call("give", '{"answer": "5"}') + STOP


def test_a_call_that_gives_the_answer_ends_the_episode_with_its_stop_token(tokenizer):
    """Pitfall 13: nothing follows the turn; its stop token is trained."""
    t, engine, box = episode(tokenizer, [ADD, GIVE], functions=(add, give))
    assert (t.stop, t.answer, len(engine.requests)) == ("answered", "5", 2)
    assert t.mask[-1] == 1 and t.messages[-1]["role"] == "assistant"
    assert [c.name for c in t.calls] == ["add", "give"] and not box.errors


def test_the_answer_counts_behind_the_limits_too_but_a_failed_one_does_not(tokenizer):
    limits = {"max_turns": 1, "max_tool_calls": 0, "functions": (add, give)}
    t, _, _ = episode(tokenizer, [GIVE], **limits)
    assert (t.stop, t.answer) == ("answered", "5")
    wrong = call("give", '{"answer": "?"}') + STOP
    t, _, _ = episode(tokenizer, [wrong], **limits)
    assert (t.stop, t.answer) == ("max_turns", None)
    t, _, _ = episode(tokenizer, [wrong, GIVE], functions=(add, give))
    assert (t.stop, t.answer, t.calls[0].error) == ("answered", "5", "exception")


# Many at once


class Slow(ScriptedEngine):
    """Counts how many trajectories it has at once, and lets a short turn of the loop pass."""

    now = most = 0

    async def generate(self, ids, images, sampling):
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.01)
        self.now -= 1
        return await super().generate(ids, images, sampling)


def many(tokenizer, engine, examples, on_done=None, tool=None, **more):
    settings = Settings(**{k: v for k, v in more.items() if k in Settings.__dataclass_fields__})
    rest = {k: v for k, v in more.items() if k not in Settings.__dataclass_fields__}
    box = Toolbox([tool] if tool else [])
    chat = Chat(tokenizer, "hermes", box.schemas)
    return asyncio.run(rollouts(examples, chat, engine, box, settings, on_done=on_done, **rest))


def numbered(count):
    return [EXAMPLE | {"id": n} for n in range(count)]


def test_at_most_max_concurrent_trajectories_are_played_at_once(tokenizer):
    """Pitfall 38, for engines; all are played, in order."""
    engine = Slow(lambda ids, sampling: encode(tokenizer, ANSWER), tokenizer)
    played = many(tokenizer, engine, numbered(10), max_concurrent=3, samples=2)
    assert engine.most == 3
    assert [(t.group, t.sample) for t in played] == [(g, s) for g in range(10) for s in range(2)]


def test_rewards_are_given_while_others_are_still_sampled(tokenizer):
    """In threads, at once, and they hold no place of those who play."""
    all_are_scored = threading.Barrier(4, timeout=PATIENCE)

    def slow(trajectory, example):
        all_were_sampled = until(lambda: len(engine.requests) == 4)
        all_are_scored.wait()
        return float(all_were_sampled)

    engine = Slow(lambda ids, sampling: encode(tokenizer, ANSWER), tokenizer)
    played = many(tokenizer, engine, numbered(4), max_concurrent=1, rewards={"slow": (slow, 1.0)})
    assert [t.reward for t in played] == [1.0] * 4 and engine.most == 1


class Expected(list):
    """As a log: how many rollouts each round announced."""

    def expect(self, count):
        self.append(count)


@pytest.mark.parametrize(
    "dynamic, rounds, kept",
    [
        (("right",), [4, 2, 2], [0, 3]),
        (("right", 1), [4, 2], [0, 1]),
        (("other", 1), [4], [0, 1]),
        ((), [4], [0, 1]),
    ],
)
def test_groups_that_agree_on_the_named_reward_are_replaced(tokenizer, dynamic, rounds, kept):
    """Pitfall 22: the named reward decides, not the total; a None is no other outcome. Further
    prompts are tried for so many rounds, then what is missing is filled up with the first equal
    groups. kept: by their place behind the cursor."""
    rows, cursor = numbered(8), 2
    coming = [row["id"] for row in next_prompts(cursor, rows, 4, seed=3)]
    right = dict(zip(coming, ((1.0, 0.0), (1.0, None), (0.0, 0.0), (0.0, 1.0)), strict=True))

    def other(trajectory, example):
        """Makes all totals of groups equal that differ, and those differ that are equal."""
        one, two = right[example["id"]]
        value = right[example["id"]][trajectory.sample]
        return 1.0 - value if None not in (one, two) and one != two else float(trajectory.sample)

    rewards = {
        "right": (lambda trajectory, example: right[example["id"]][trajectory.sample], 1.0),
        "other": (other, 1.0),
    }
    engine = ScriptedEngine(lambda ids, sampling: encode(tokenizer, ANSWER), tokenizer)
    chat, log = Chat(tokenizer, "hermes", []), Expected()
    player = Player(chat, engine, Toolbox([]), rewards, Settings(seed=3), examples=rows)
    taken, played, after = sample_groups(player, cursor, 2, 2, 3, 0, *dynamic, expect=log.expect)
    assert log == rounds and len(played) == sum(rounds)
    groups = sum(rounds) // 2
    assert after == cursor + groups  # the next step goes on behind all that were tried
    assert [t.example["id"] for t in played] == [n for n in coming[:groups] for _ in range(2)]
    assert [(t.group, t.sample) for t in taken] == [(g, s) for g in kept for s in range(2)]
    seeds = [sampling.seed for _, sampling in engine.requests]
    assert len(set(seeds)) == len(seeds) == len(played)  # rounds share none


def test_async_tools_of_all_trajectories_run_at_once(tokenizer):
    """Pitfall 38: each of 40 calls, one a trajectory, ends when all of them have begun."""
    begun = []

    async def meet() -> str:
        """Meets."""
        begun.append(True)
        while len(begun) < 40:
            await asyncio.sleep(0.01)
        return "met"

    def script(ids, sampling):
        is_second = "met" in tokenizer.decode(ids[-20:])
        return encode(tokenizer, ANSWER if is_second else call("meet", "{}") + STOP)

    engine = ScriptedEngine(script, tokenizer)
    box = Toolbox([meet], 64, PATIENCE)
    chat = Chat(tokenizer, "hermes", box.schemas)
    played = asyncio.run(rollouts(numbered(40), chat, engine, box, Settings()))
    assert [[c.error for c in t.calls] for t in played] == [[None]] * 40


def test_two_versions_of_the_weights_in_one_trajectory_are_an_error(tokenizer):
    """Pitfall 32: nobody may sync while a trajectory is played."""

    def script(ids, sampling):
        engine.version += 1
        return encode(tokenizer, ANSWER)

    engine = ScriptedEngine(script, tokenizer)
    with pytest.raises(AssertionError, match="weights changed inside"):
        many(tokenizer, engine, numbered(1))

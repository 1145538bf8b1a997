"""The multi-turn tool loop: a prompt becomes a trajectory of token ids with an exact loss mask.

    python rollout.py --config calc.py                 # plays one episode and prints it in colour
    python rollout.py --config calc.py --temperature=0 --seed=3

    trajectories = await rollouts(examples, chat, engine, toolbox, Settings(temperature=1.0))

Every trajectory is its own asyncio task, so a slow tool delays only the trajectory that called it.
What the engine sampled is appended as it came (mask 1); what the template and the tools add is
tokenised once and appended (mask 0). No text is ever turned back into sampled ids.
"""

import asyncio
import hashlib
import time
from collections import Counter
from dataclasses import dataclass, fields

import rewards as reward_functions
from chat import Chat
from engines.base import Engine, Sampling
from tools import Toolbox
from tools.calling.base import shorten
from trajectory import ToolCall, Trajectory


@dataclass(frozen=True)
class Settings:
    """How a trajectory is played. All turns of it are sampled alike. Limits are checked in the
    order in which they stand here."""

    temperature: float = 1.0
    max_tokens: int = 2048  # of the whole trajectory, prompt and observations included
    max_new_tokens: int = 512  # of one turn
    max_turns: int = 4
    max_tool_calls: int = 8
    trajectory_timeout: float = 300.0  # seconds
    max_observation_tokens: int = 512  # of one turn's results; longer ones are cut in the middle
    final_turn: bool = False  # at max_turns, one more turn without tools
    max_concurrent: int = 256  # trajectories that are played at once
    seed: int = 0

    @classmethod
    def of(cls, cfg) -> "Settings":
        """From any config that has the same names."""
        return cls(**{f.name: getattr(cfg, f.name) for f in fields(cls)})


def seed_of(*parts: int) -> int:
    """A 63-bit seed from (run seed, step, prompt, sample, turn): who finishes first changes
    nothing, and no two turns share their noise."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class _Enough(Exception):
    """As many groups are complete as were asked for."""


async def rollouts(
    examples: list[dict],
    chat: Chat,
    engine: Engine,
    toolbox: Toolbox,
    settings: Settings,
    step: int = 0,
    samples: int = 1,
    rewards: dict | None = None,
    on_done=None,
    first_group: int = 0,
    need: int | None = None,
    turn=None,
) -> list[Trajectory]:
    """Plays `samples` trajectories for each example, settings.max_concurrent at once.

    rewards: of rewards.select(); each trajectory is scored as soon as it ends, while others are
    still played. on_done(trajectory) is called then too. first_group: the number of the first
    example, where a long list is played in parts; seeds depend on it. need: the first so many
    groups that are complete are returned and the others dropped, which favours short trajectories.
    turn: plays one turn, `_turn` if None. Returns them in the order of the examples, the samples of
    one side by side.
    """
    queue = _trajectories(examples, chat, samples, first_group)
    workers = min(settings.max_concurrent, len(examples) * samples)
    finished, counts, complete = [], Counter(), []

    async def worker() -> None:
        try:
            for trajectory, prompt in queue:
                await play(trajectory, prompt, chat, engine, toolbox, settings, step, turn)
                tasks.create_task(finish(trajectory))
        finally:
            engine.leave()

    async def finish(trajectory: Trajectory) -> None:
        if rewards:
            await _score(trajectory, rewards)
        if on_done:
            on_done(trajectory)
        finished.append(trajectory)
        counts[trajectory.group] += 1
        if counts[trajectory.group] == samples:
            complete.append(trajectory.group)
            if len(complete) == need:
                raise _Enough

    for _ in range(workers):
        engine.join()  # all of them before the first starts: the engine knows whom to wait for
    try:
        async with asyncio.TaskGroup() as tasks:  # if one raises, none goes on in the background
            for _ in range(workers):
                tasks.create_task(worker())
    except ExceptionGroup as group:
        if errors := [error for error in group.exceptions if not isinstance(error, _Enough)]:
            raise errors[0] from errors[0].__cause__
    kept = set(complete[:need])
    return sorted((t for t in finished if t.group in kept), key=lambda t: (t.group, t.sample))


def _trajectories(examples: list[dict], chat: Chat, samples: int, first_group: int):
    """(trajectory, prompt) for each sample of each example; a prompt is made once for its group."""
    for group, example in enumerate(examples, first_group):
        prompt = chat.prompt(example["messages"])
        for sample in range(samples):
            yield Trajectory(example, group, sample), prompt


async def _score(trajectory: Trajectory, rewards: dict) -> None:
    """Sets its rewards."""
    scores = await reward_functions.score(trajectory, trajectory.example, rewards)
    trajectory.turn_rewards = reward_functions.by_turn(scores, rewards)
    trajectory.rewards = reward_functions.summed(scores)
    trajectory.reward = reward_functions.total(trajectory.rewards, rewards)


async def play(
    trajectory: Trajectory,
    prompt: list[int],
    chat: Chat,
    engine: Engine,
    toolbox: Toolbox,
    settings: Settings,
    step: int = 0,
    turn=None,
) -> Trajectory:
    """Plays one trajectory to its end, whatever the model and the tools do; sets `stop`."""
    turn, started = turn or _turn, time.monotonic()
    trajectory.version = engine.version
    trajectory.add(prompt, 0)
    trajectory.messages = list(trajectory.example["messages"])
    try:
        session = toolbox.open(trajectory.example)
    except Exception as error:  # a tool whose state cannot be made: this trajectory, not the run
        toolbox.errors["open"] += 1
        trajectory.calls.append(ToolCall(0, "", None, f"{error}", "exception", 0.0))
        trajectory.stop = "error"
        return trajectory
    try:
        async with asyncio.timeout(settings.trajectory_timeout) as deadline:
            while not trajectory.stop:
                await turn(trajectory, chat, engine, session, toolbox, settings, step)
    except TimeoutError:
        if not deadline.expired():  # somebody else's: an engine that does not answer
            raise
        trajectory.stop = "timeout"  # whole turns and observations only: add() is all or nothing
    finally:
        await session.close()
    trajectory.seconds = time.monotonic() - started
    return trajectory


async def _turn(trajectory, chat, engine, session, toolbox, settings, step) -> None:
    """One assistant turn and the results of its calls. Sets trajectory.stop if it was the last."""
    room = settings.max_tokens - len(trajectory.ids)
    if room <= 0:
        trajectory.stop = "length"
        return
    turn = len(trajectory.turn_starts)
    sampling = Sampling(
        temperature=settings.temperature,
        max_new_tokens=min(settings.max_new_tokens, room),
        seed=seed_of(settings.seed, step, trajectory.group, trajectory.sample, turn),
        stop_ids=chat.stop_ids,
        stop_strings=chat.stop_strings,
        session=seed_of(settings.seed, step, trajectory.group),
    )
    out = await engine.generate(trajectory.ids, trajectory.images, sampling)
    assert engine.version == trajectory.version, "weights changed inside of a trajectory"
    trajectory.turn_starts.append(len(trajectory.ids))
    trajectory.add(out.ids, 1, out.logprobs)
    text, calls = chat.parse(out.ids)
    trajectory.messages.append(chat.message(text, calls, trajectory.goes_on))
    if ends(trajectory, calls, out.finish == "length", toolbox, settings):
        return
    results = await run(trajectory, calls, session, toolbox, settings, chat.tokenizer)
    if trajectory.stop:
        return  # with its last token: nobody reads the result of a finish
    ids = chat.observation(results, closed=out.finish == "stop")
    if len(trajectory.ids) + len(ids) >= settings.max_tokens:
        trajectory.stop = "length"  # not even one token could follow: stop without it
        return
    trajectory.add(ids, 0)
    trajectory.goes_on = chat.format.in_place and out.finish != "stop"
    for call, result in results:
        trajectory.messages.append({"role": "tool", "name": call.name, "content": result})


def ends(trajectory: Trajectory, calls: list, was_cut: bool, toolbox, settings: Settings) -> bool:
    """Whether the turn that was just added is the last one, and its calls are not to be run; sets
    trajectory.stop if so. A call that gives the answer is run also behind the limits."""
    turns = len(trajectory.turn_starts)
    rest = [call for call in calls if not _finishes(call, toolbox)]
    finishes = len(rest) < len(calls)
    if was_cut:
        trajectory.stop = "length"  # a call in a turn that was cut is never executed
    elif not calls:
        trajectory.stop = "answered"
    elif not finishes and turns >= settings.max_turns + settings.final_turn:
        trajectory.stop = "max_turns"  # nobody would read the results
    elif rest and len(trajectory.calls) + len(rest) > settings.max_tool_calls:
        trajectory.stop = "max_tool_calls"
    return bool(trajectory.stop)


def _finishes(call, toolbox) -> bool:
    tool = toolbox.tools.get(call.name)
    return tool is not None and tool.ends and not call.error


async def run(trajectory, calls: list, session, toolbox, settings, tokenizer) -> list[tuple]:
    """(call, result) of each call of the turn that was just added, for the model to read. All run
    at once; what happened is added to trajectory.calls. If one of them gave the answer, sets
    trajectory.answer and stop; behind the limits a turn is the last one anyhow."""
    turns = len(trajectory.turn_starts)
    tasks = [asyncio.ensure_future(_call(c, turns - 1, session, toolbox)) for c in calls]
    try:
        done = await asyncio.gather(*tasks)
    finally:
        for task in tasks:  # beside one that ended the run
            task.cancel()
    trajectory.calls += done  # in call order, whatever finished first
    for ran in done:
        if ran.ends:
            trajectory.stop, trajectory.answer = "answered", ran.result
    if not trajectory.stop and turns >= settings.max_turns + settings.final_turn:
        trajectory.stop = "max_turns"  # its finish failed
    last = settings.final_turn and turns == settings.max_turns
    note = "\n(This was the last call: answer now, without tools.)" if last else ""
    limit = settings.max_observation_tokens // len(calls)
    for ran in done:
        ran.result = cut(ran.result, limit, tokenizer)
    return [(call, ran.result + note) for call, ran in zip(calls, done, strict=True)]


async def _call(call, turn, session, toolbox) -> ToolCall:
    """Runs one parsed call; whatever goes wrong is its result."""
    if call.error:
        toolbox.errors[call.error] += 1
        content, error, seconds = call.message, call.error, 0.0
    else:
        content, error, seconds = await session.call(call.name, call.arguments)
    parts = content if isinstance(content, list) else [content]
    # A text-only model cannot see an image: it is told so, and the episode goes on.
    texts = [p if isinstance(p, str) else "(an image, which this model cannot see)" for p in parts]
    # A lone surrogate, which JSON can spell and an error message then quotes, crashes tokenizers.
    text = "\n".join(texts).encode("utf-8", "replace").decode()
    ends = error is None and toolbox.tools[call.name].ends
    return ToolCall(turn, call.name, call.arguments, text, error, seconds, ends)


def cut(text: str, limit: int, tokenizer) -> str:
    """`text` with its middle taken out so that it has about `limit` tokens; the cut is marked."""
    if len(text.encode()) <= limit:  # a token is at least one byte
        return text
    if tokenizer is None:  # another's model: four characters a token, about
        return shorten(text, 4 * limit)
    # Only the ends of a long text are encoded: a megabyte takes a second, in which nobody plays.
    reach = max(16 * limit, 256)  # characters
    long = len(text) > 2 * reach
    head = tokenizer.encode(text[:reach] if long else text, add_special_tokens=False)
    tail = tokenizer.encode(text[-reach:], add_special_tokens=False) if long else head
    if not long and len(head) <= limit:
        return text
    half = limit // 2
    head = tokenizer.decode(head[:half])
    tail = tokenizer.decode(tail[max(0, len(tail) - limit + half) :])
    return f"{head}\n[... {len(text) - len(head) - len(tail)} characters cut ...]\n{tail}"

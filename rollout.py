"""The multi-turn tool loop: a prompt becomes a trajectory of token ids with an exact loss mask.

    trajectories = await rollouts(examples, chat, engine, toolbox, Settings(temperature=1.0))

Every trajectory is its own asyncio task, so a slow tool delays only the trajectory that called it.
What the engine sampled is appended as it came (mask 1); what the template and the tools add is
tokenised once and appended (mask 0). No text is ever turned back into sampled ids. An image that a
tool returns goes into the trajectory with the tokens that stand for it, or neither does.

An environment may open the trajectory with more of a prompt, speak as the user behind an answer
(mask 0), and say at the end what its final state is worth (tools/calling/environment.py).

`rollouts` plays many trajectories, `play` one, `play_turn` one turn of it. `python play.py` shows a
rollout in colour.
"""

import asyncio
import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, fields

import rewards as reward_functions
from chat import Chat
from engines.base import Engine, Sampling
from images import Picture
from run.config import UserError
from tools import Session, Toolbox
from tools.calling.base import TURN, shorten
from tools.calling.toolbox import add_up
from trajectory import ToolCall, Trajectory, UserTurn

LAST_CALL = "\n(This was the last call: answer now, without tools.)"
LAST_TURN = "\n(One turn left: answer in it.)"
NO_IMAGE = "(an image, which this model cannot see)"


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
    turns_left: bool = False  # each turn's results end with how many turns are left
    max_concurrent: int = 256  # trajectories that are played at once
    seed: int = 0

    @classmethod
    def of(cls, cfg) -> "Settings":
        """Takes them from any config that has the same names."""
        return cls(**{field.name: getattr(cfg, field.name) for field in fields(cls)})


def seed_of(*parts: int) -> int:
    """Makes a 63-bit seed of (run seed, step, prompt, sample, turn): who finishes first changes
    nothing, and no two turns share their noise."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


async def rollouts(
    examples: list[dict],
    chat: Chat,
    engine: Engine,
    toolbox: Toolbox,
    settings: Settings,
    step: int = 0,
    samples: int = 1,
    rewards: dict | None = None,
    on_done: Callable[[Trajectory], None] | None = None,
    groups: Sequence[int] | None = None,
    turn: Callable | None = None,
    skip: Container[tuple[int, int]] = (),
) -> list[Trajectory]:
    """Plays `samples` trajectories for each example, settings.max_concurrent at once.

    rewards: of rewards.select(); each trajectory is scored as soon as it ends, while others are
    still played, and by those that see its group when all of that have ended.
    on_done(trajectory) is called then too. groups: the number of each
    example, where a long list is played in parts; seeds depend on it; None: 0, 1, … turn: plays
    one turn in the place of `play_turn`. skip: (group, sample) of those that were played before; of
    a group that is compared, all or none. Returns them in the order of the examples, the samples of
    one side by side. What raises in any of them ends all.
    """
    if groups is None:
        groups = range(len(examples))
    waiting = unplayed(examples, groups, chat, samples, skip)
    finished: list[Trajectory] = []
    ended = defaultdict(list)  # group -> those of its trajectories that have their own scores
    see_groups = reward_functions.see_groups(rewards or {})

    async def work() -> None:
        # one worker plays one trajectory after the other; the next begins before this is scored
        try:
            for trajectory, prompt, pictures, chat_of_row in waiting:
                await play(
                    trajectory, prompt, chat_of_row, engine, toolbox, settings, step, turn, pictures
                )
                tasks.create_task(finish(trajectory))
        finally:
            engine.leave()  # also where it failed: a deterministic engine waits for all who joined

    async def finish(trajectory: Trajectory) -> None:
        # a task of its own: a slow reward holds up no worker
        complete = [trajectory]
        if rewards:
            await score(trajectory, rewards)
        if see_groups:
            group = ended[trajectory.group]
            group.append(trajectory)
            if len(group) < samples:
                return  # the last one of them does what follows
            complete = sorted(group, key=lambda member: member.sample)
            await score_group(complete, rewards)
        for scored in complete:
            if on_done:
                on_done(scored)
            finished.append(scored)

    # 1. all workers join before the first starts: the engine then knows whom to wait for
    workers = min(settings.max_concurrent, len(examples) * samples)
    for _ in range(workers):
        engine.join()

    # 2. play; if one raises, the group cancels the others, and none goes on in the background
    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(workers):
                tasks.create_task(work())
    except ExceptionGroup as group:
        first = group.exceptions[0]
        raise first from first.__cause__

    # 3. whoever ended first, the order is that of the examples
    return sorted(finished, key=lambda trajectory: (trajectory.group, trajectory.sample))


def unplayed(
    examples: list[dict],
    groups: Sequence[int],
    chat: Chat,
    samples: int,
    skip: Container[tuple[int, int]] = (),
) -> Iterator[tuple[Trajectory, list[int], list[Picture], Chat]]:
    """Yields (trajectory, prompt ids, their Pictures, the chat with the row's tools) for each
    sample of each example. A prompt is rendered once for its group, and its images opened, when its
    first trajectory is about to be played."""
    for group, example in zip(groups, examples, strict=True):
        wanted = [sample for sample in range(samples) if (group, sample) not in skip]
        if not wanted:
            continue
        chat_of_row = chat.for_row(example)
        pictures = chat_of_row.pictures(example)
        prompt = chat_of_row.prompt(example["messages"], pictures)
        for sample in wanted:
            yield Trajectory(example, group, sample), prompt, pictures, chat_of_row


async def score(trajectory: Trajectory, rewards: dict) -> None:
    """Asks the rewards that look at one trajectory alone, and sets what it earned by them. A row
    may name those that it has."""
    reward_functions.refuse_unasked(trajectory, rewards)
    rewards = reward_functions.for_row(rewards, trajectory.example)
    trajectory.scores = await reward_functions.score(trajectory, trajectory.example, rewards)
    set_reward(trajectory, rewards)


async def score_group(group: list[Trajectory], rewards: dict) -> None:
    """Asks the rewards that see a group, all samples of one prompt, when each has its own scores;
    sets what each earned by all rewards together."""
    rewards = reward_functions.for_row(rewards, group[0].example)
    scores_of_all = await reward_functions.score_group(group, rewards)
    for trajectory, scores in zip(group, scores_of_all, strict=True):
        trajectory.scores |= scores
        set_reward(trajectory, rewards)


def set_reward(trajectory: Trajectory, rewards: dict) -> None:
    """Sets the trajectory's rewards of its scores: each by its name, by turn where one says so, and
    the weighted sum."""
    scores = {name: trajectory.scores.get(name) for name in rewards}
    trajectory.turn_rewards = reward_functions.by_turn(scores, rewards)
    trajectory.rewards = reward_functions.summed(scores)
    trajectory.reward = reward_functions.total(trajectory.rewards, rewards)
    if trajectory.stop == "placeholder":  # what it sampled last is not there to be learnt from
        trajectory.reward = None
    if trajectory.failure:  # not the model's
        trajectory.reward = None


async def play(
    trajectory: Trajectory,
    prompt: list[int],
    chat: Chat,
    engine: Engine,
    toolbox: Toolbox,
    settings: Settings,
    step: int = 0,
    turn: Callable | None = None,
    pictures: Sequence[Picture] = (),
) -> Trajectory:
    """Plays one trajectory to its end, whatever the model and the tools do; sets `stop`. pictures:
    those of the prompt."""
    started = time.monotonic()
    trajectory.version = engine.version

    # 1. what is asked, and tools with a state of this trajectory's own
    trajectory.messages = list(trajectory.example["messages"])
    trajectory.add([], mask=0, images=pictures)  # tools see them from the start
    try:
        session = toolbox.open(trajectory.example, trajectory.images)
    except Exception as error:  # a state that cannot be made ends this trajectory, not the run
        toolbox.errors["open"] += 1
        trajectory.add(prompt, mask=0)
        trajectory.calls.append(ToolCall(0, "", None, f"{error}", "exception", 0.0))
        trajectory.stop = "error"
        return trajectory

    # 2. turn after turn; then environments are asked what it was worth, however it ended
    try:
        await play_turns(trajectory, prompt, chat, engine, session, toolbox, settings, step, turn)
        trajectory.final_reward, measured = await session.settle(trajectory)
        add_up(trajectory.metrics, measured)
        trajectory.failure = session.failure
    finally:
        await session.close()
    trajectory.seconds = time.monotonic() - started
    return trajectory


async def play_turns(
    trajectory: Trajectory,
    prompt: list[int],
    chat: Chat,
    engine: Engine,
    session,
    toolbox: Toolbox,
    settings: Settings,
    step: int,
    turn: Callable | None,
) -> None:
    """Plays the prompt and turn after turn, until one of them says why it was the last."""
    play_one_turn = turn or play_turn
    try:
        async with asyncio.timeout(settings.trajectory_timeout) as deadline:
            await open_prompt(trajectory, prompt, chat, session)
            while not trajectory.stop:
                await play_one_turn(trajectory, chat, engine, session, toolbox, settings, step)
                if trajectory.stop == "answered" and trajectory.answer is None:
                    await hear_user(trajectory, chat, session, settings)
    except TimeoutError:
        # not our deadline: the engine timed out, and that ends the run
        if not deadline.expired():
            raise
        # what is there are whole turns and observations: add() takes all of one or nothing
        trajectory.stop = "timeout"
        if not trajectory.ids:  # it ended while environments were made
            trajectory.add(prompt, mask=0)


async def open_prompt(trajectory: Trajectory, prompt: list[int], chat: Chat, session) -> None:
    """Adds the prompt: the one rendered for the group, or, where environments open the trajectory
    with texts or images, one of its own with them at its end."""
    parts = await session.begin()
    if session.failure:
        trajectory.stop = "error"
    if not parts or session.failure:
        trajectory.add(prompt, mask=0)
        return
    asked = trajectory.messages[-1]
    if asked["role"] != "user":
        where = f"row {trajectory.example['id'] + 1}"
        raise UserError(f"{where}: opening() goes on with the prompt, which has to end in a user's")
    content, pictures, _ = await readable(parts, chat, len(trajectory.images) + 1)
    trajectory.messages[-1] = asked | {"content": joined(asked["content"], content)}
    ids = chat.prompt(trajectory.messages, [*trajectory.images, *pictures])
    trajectory.add(ids, mask=0, images=pictures)


async def hear_user(trajectory: Trajectory, chat: Chat, session, settings: Settings) -> None:
    """Asks the user of an environment, if there is one, what it says behind an answer. What it says
    is appended (mask 0), and the trajectory goes on, unless a limit says that no turn may follow:
    that one is then its end."""
    # 1. nobody, or no more to say: the answer was the end
    parts = await session.reply(trajectory)
    if session.failure:
        trajectory.stop = "error"
        return
    if parts is None:
        return

    # 2. is there a turn left that reads it?
    turns = len(trajectory.turn_starts)
    if turns >= settings.max_turns + settings.final_turn:
        trajectory.stop = "max_turns"
        return
    number = len(trajectory.images) + 1
    content, pictures, _ = await readable(parts, chat, number, settings.max_observation_tokens)
    ids = chat.reply(content, trajectory.ids, asked_last(trajectory), pictures)
    if len(trajectory.ids) + len(ids) >= settings.max_tokens:
        trajectory.stop = "length"
        return

    # 3. go on
    trajectory.add(ids, mask=0, images=pictures)
    trajectory.messages.append({"role": "user", "content": content})
    shown = list(range(number, number + len(pictures)))
    trajectory.user_turns.append(UserTurn(turns - 1, text_of(content), shown))
    trajectory.stop = ""


def asked_last(trajectory: Trajectory) -> list[dict]:
    """Picks the messages that the next turns answer, in which a template may look for a flag: the
    row's prompt, or, where a user has spoken since, the system prompt and the user's last words."""
    prompt = trajectory.example["messages"]
    if not trajectory.user_turns:
        return prompt
    last = [message for message in trajectory.messages if message["role"] == "user"][-1]
    return [message for message in prompt[:1] if message["role"] == "system"] + [last]


def joined(content: str | list, more: str | list) -> str | list:
    """Joins two contents: a text, or a list of parts if one of them is one."""
    if isinstance(content, str) and isinstance(more, str):
        return f"{content}\n\n{more}"
    parts = []
    for part in (content, [{"type": "text", "text": "\n\n"}], more):
        parts += [{"type": "text", "text": part}] if isinstance(part, str) else part
    return parts


async def play_turn(
    trajectory: Trajectory,
    chat: Chat,
    engine: Engine,
    session,
    toolbox: Toolbox,
    settings: Settings,
    step: int,
) -> None:
    """Plays one assistant turn and runs its calls; sets trajectory.stop if it was the last."""
    # 1. is there room for even one token, and does each image stand where its tokens are?
    room = settings.max_tokens - len(trajectory.ids)
    if room <= 0:
        trajectory.stop = "length"
        return
    if not chat.fits(trajectory.ids, trajectory.images):
        trajectory.stop = "placeholder"
        return

    # 2. sample; the ids go into the trajectory as they came
    turn = len(trajectory.turn_starts)
    where = (settings.seed, step, trajectory.group, trajectory.sample, turn)
    sampling = Sampling(
        temperature=settings.temperature,
        max_new_tokens=min(settings.max_new_tokens, room),
        seed=seed_of(*where),  # nobody's noise depends on who else is played
        stop_ids=chat.stop_ids,
        stop_strings=chat.stop_strings,
        # which of several servers has the beginning of this group in its cache
        session=seed_of(settings.seed, step, trajectory.group),
    )
    opening = chat.opening_behind(trajectory.ids)
    completion = await engine.generate(trajectory.ids, trajectory.images, sampling)
    assert engine.version == trajectory.version, "weights changed inside of a trajectory"
    if not chat.fits(completion.ids, ()):
        # it wrote what stands for an image that is not there: to the tower it would be an error, to
        # an engine another trajectory; this turn is left out, and that ends this one alone
        trajectory.stop = "placeholder"
        return
    trajectory.turn_starts.append(len(trajectory.ids))
    trajectory.add(completion.ids, mask=1, logprobs=completion.logprobs)

    # 3. which calls did it write, and are they to be run?
    text, calls = chat.parse(completion.ids, opening)
    trajectory.messages.append(chat.message(text, calls, opening))
    was_cut = completion.finish == "length"
    trajectory.stop = stop_before_calls(trajectory, calls, was_cut, session, settings)
    if trajectory.stop:
        return

    # 4. run them; a finish ends the episode with its last token, as nobody reads its result
    results, pictures = await run_calls(trajectory, calls, session, toolbox, settings, chat)
    if trajectory.stop:
        return

    # 5. append what they said, images and all, unless no token could follow it
    was_closed = completion.finish == "stop" and chat.is_closed(completion.ids)
    observation = chat.observation(results, was_closed, asked_last(trajectory), pictures)
    if len(trajectory.ids) + len(observation) >= settings.max_tokens:
        trajectory.stop = "length"
        return
    trajectory.add(observation, mask=0, images=pictures)
    for call, result in results:
        trajectory.messages.append({"role": "tool", "name": call.name, "content": result})


def stop_before_calls(
    trajectory: Trajectory, calls: list, was_cut: bool, session: Session, settings: Settings
) -> str:
    """Says why the turn that was just added is the last one, so that its calls are not run; "" if
    they are. A call that gives the answer is run also behind the limits."""
    turns = len(trajectory.turn_starts)
    plain_calls = [call for call in calls if not gives_answer(call, session)]
    has_answer = len(plain_calls) < len(calls)
    if was_cut:
        return "length"  # the call may be half of one: never executed
    if not calls:
        return "answered"
    if turns >= settings.max_turns + settings.final_turn and not has_answer:
        return "max_turns"  # nobody would read the results
    if plain_calls and len(trajectory.calls) + len(plain_calls) > settings.max_tool_calls:
        return "max_tool_calls"
    return ""


def gives_answer(call, session: Session) -> bool:
    """Says whether the call is of a tool that ends the episode: tools/finish.py, or a function of
    the row's own."""
    tool = session.tools.get(call.name)
    return tool is not None and tool.ends and not call.error


async def run_calls(
    trajectory: Trajectory,
    calls: list,
    session,
    toolbox: Toolbox,
    settings: Settings,
    chat: Chat | None,
) -> tuple[list[tuple], list[Picture]]:
    """Runs all calls of the turn that was just added at once; returns (call, content) of each, in
    call order, for the model to read, and the Pictures of the images in them.

    What happened is added to trajectory.calls. If one of them gave the answer, sets
    trajectory.answer and stop; behind the limits the turn is the last one anyhow. chat: None for
    another's model, which is told text.
    """
    turns = len(trajectory.turn_starts)
    TURN.set((trajectory, calls))
    tasks = [asyncio.ensure_future(run_call(c, turns - 1, session, toolbox)) for c in calls]
    try:
        done = await asyncio.gather(*tasks)  # in call order, whatever finished first
    finally:
        for task in tasks:  # those that still run beside one that ended the run
            task.cancel()
    trajectory.calls += [tool_call for tool_call, _, _ in done]
    for _, _, measured in done:
        add_up(trajectory.metrics, measured)

    # did one of them end the episode?
    ending = [tool_call for tool_call, _, _ in done if tool_call.ends]
    if ending:
        trajectory.stop = "answered"
        own = [tool_call.result for tool_call in ending if trajectory.is_own(tool_call)]
        trajectory.answer = "\n".join(own) or ending[-1].result
    if session.failure:
        trajectory.stop = "error"
    if not trajectory.stop and turns >= settings.max_turns + settings.final_turn:
        trajectory.stop = "max_turns"  # it was run for its finish, which failed

    # the turn's observation has one budget, shared by the texts of its results
    limit = settings.max_observation_tokens // len(calls)
    note = reminder(turns, settings)
    results = []
    pictures = []
    for call, (tool_call, parts, _) in zip(calls, done, strict=True):
        number = len(trajectory.images) + len(pictures) + 1
        content, shown, problem = await readable(parts, chat, number, limit)
        tool_call.result = text_of(content)
        tool_call.images = list(range(number, number + len(shown)))
        if problem:
            tool_call.error = tool_call.error or "exception"
        pictures += shown
        if note and isinstance(content, str):
            content += note
        elif note:
            content = [*content, {"type": "text", "text": note}]
        results.append((call, content))
    return results, pictures


def reminder(turns: int, settings: Settings) -> str:
    """Writes what the results of that turn, from 1, end with: whether it was the last one with
    tools, and how many are left, where the settings say so."""
    left = settings.max_turns + settings.final_turn - turns
    if settings.final_turn and left == 1:
        return LAST_CALL
    if settings.turns_left and left == 1:
        return LAST_TURN
    if settings.turns_left and left > 1:
        return f"\n({left} turns left.)"
    return ""


async def run_call(call, turn: int, session, toolbox: Toolbox) -> tuple[ToolCall, list, dict]:
    """Runs one parsed call; whatever goes wrong is its result. Returns also the parts of what the
    tool gave, texts and PIL images, and what it measured."""
    if call.error:  # it could not be read: the format says why
        toolbox.errors[call.error] += 1
        text = plain_text(call.message)
        return ToolCall(turn, call.name, call.arguments, text, call.error, 0.0), [text], {}
    outcome = await session.run(call.name, call.arguments)
    ends = outcome.error is None and (session.tools[call.name].ends or outcome.result.ends)
    tool_call = ToolCall(
        turn,
        call.name,
        call.arguments,
        plain_text(outcome.content),
        outcome.error,
        outcome.seconds,
        ends,
        reward=outcome.result.reward,
    )
    content = outcome.content
    parts = content if isinstance(content, list) else [content]
    return tool_call, parts, outcome.result.metrics


async def readable(
    parts: list, chat: Chat | None, number: int, limit: int | None = None
) -> tuple[str | list[dict], list[Picture], str]:
    """Makes content for the model of texts and PIL images: a text, or, if there are images and it
    sees them, content parts; returns it, the Pictures, and what is wrong with an image or "".

    In front of each image stands "image 3:", its place in the trajectory from `number` on: by that,
    tools and model name it. The texts are cut to `limit` tokens in all. chat: None for another's
    model, which is told text.
    """
    # 1. text alone
    sees = chat is not None and chat.sees
    if not sees or all(isinstance(part, str) for part in parts):
        text = plain_text(parts)
        if limit is not None:
            text = shorten_tokens(text, limit, chat.tokenizer if chat else None)
        return text, [], ""

    # 2. what the model sees of each; in a thread, as it takes some milliseconds
    shown = []  # texts and Pictures
    problem = ""
    for part in parts:
        if not isinstance(part, str):
            try:
                part = await asyncio.to_thread(chat.picture, part)
            except UserError as error:  # such as 2000 x 4 pixels
                part = problem = f"error: {error}"
        shown.append(part)

    # 3. if the texts are too long, they are cut as one, and the images follow
    texts = [part for part in shown if isinstance(part, str)]
    pictures = [part for part in shown if not isinstance(part, str)]
    text = plain_text(texts)
    short = text if limit is None else shorten_tokens(text, limit, chat.tokenizer)
    if short != text:
        shown = [short, *pictures]

    # 4. line by line
    content = []
    lines = ""
    for part in shown:
        break_before = "\n" if content or lines else ""
        if isinstance(part, str):
            lines += break_before + plain_text(part)
            continue
        lines += f"{break_before}image {number}:"
        number += 1
        content += [{"type": "text", "text": lines}, {"type": "image"}]
        lines = ""
    if lines:
        content.append({"type": "text", "text": lines})
    return content, pictures, problem


def text_of(content: str | list[dict]) -> str:
    """Reads the text of a content, without its images."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def plain_text(content: str | list) -> str:
    """Makes text of what a tool returned, for a model that reads only text."""
    parts = content if isinstance(content, list) else [content]
    texts = [part if isinstance(part, str) else NO_IMAGE for part in parts]
    # A lone surrogate, which JSON can spell and an error message then quotes, crashes tokenizers.
    return "\n".join(texts).encode("utf-8", "replace").decode()


def shorten_tokens(text: str, limit: int, tokenizer) -> str:
    """Takes the middle out of `text`, so that about `limit` tokens stay; the cut is marked."""
    if len(text.encode()) <= limit:  # a token is at least one byte
        return text
    if tokenizer is None:  # another's model: four characters a token, about
        return shorten(text, 4 * limit)

    # Only the ends of a long text are encoded: a megabyte takes a second, in which nobody plays.
    reach = max(16 * limit, 256)  # characters
    if len(text) > 2 * reach:
        head = tokenizer.encode(text[:reach], add_special_tokens=False)
        tail = tokenizer.encode(text[-reach:], add_special_tokens=False)
    else:
        head = tail = tokenizer.encode(text, add_special_tokens=False)
        if len(head) <= limit:
            return text

    half = limit // 2
    head_text = tokenizer.decode(head[:half])
    tail_text = tokenizer.decode(tail[max(0, len(tail) - (limit - half)) :])
    dropped = len(text) - len(head_text) - len(tail_text)
    return f"{head_text}\n[... {dropped} characters cut ...]\n{tail_text}"


if __name__ == "__main__":
    raise SystemExit("error: this plays nothing by itself: python play.py --config calc.py does")

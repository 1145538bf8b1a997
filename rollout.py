"""The multi-turn tool loop: a prompt becomes a trajectory of token ids with an exact loss mask.

    python rollout.py --config calc.py                 # plays one episode and prints it in colour
    python rollout.py --config calc.py --temperature=0 --seed=3

    trajectories = await rollouts(examples, chat, engine, toolbox, Settings(temperature=1.0))

Every trajectory is its own asyncio task, so a slow tool delays only the trajectory that called it.
What the engine sampled is appended as it came (mask 1); what the template and the tools add is
tokenised once and appended (mask 0). No text is ever turned back into sampled ids.
"""

import asyncio
import contextlib
import functools
import hashlib
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, fields, replace

import config

if __name__ == "__main__":
    config.answer_help(__file__, "train_grpo.py", keys=config.ROLLOUT_KEYS)

import data
import engine as engines
import model as models
import rewards as reward_functions
from chat import Chat
from config import UserError
from engine import Engine, Sampling
from tools import Toolbox, ToolCall, shortened

KEYS = config.ROLLOUT_KEYS
VALIDATION_SEED = 2_000_000  # of a task's rows: neither those of training nor evaluate.py's


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


@dataclass
class Trajectory:
    """One rollout, as four parallel lists and what happened on the way. T = len(ids)."""

    example: dict  # the data row
    group: int = 0  # which prompt of the step: all samples of one prompt share it
    sample: int = 0  # which sample of the group
    ids: list[int] = field(default_factory=list)  # every token as the engine saw and returned it
    mask: list[int] = field(default_factory=list)  # 1 = sampled by the policy, stop token included
    logprobs: list[float] = field(
        default_factory=list
    )  # of sampled tokens, from the engine; else 0.0
    images: list = field(default_factory=list)  # in the order of their placeholders in ids
    messages: list[dict] = field(
        default_factory=list
    )  # for rewards, logs and people; never for ids
    calls: list[ToolCall] = field(default_factory=list)
    turn_starts: list[int] = field(default_factory=list)  # index of each turn's first sampled token
    goes_on: bool = False  # its next turn goes on behind a result, in the same message
    unseen_tokens: int = 0  # sampled behind an endpoint that gives text only (evaluate.py)
    stop: str = ""  # "answered" "length" "max_turns" "max_tool_calls" "timeout" "error"
    answer: str | None = None  # what it gave to a tool that ends the episode (tools/finish.py)
    rewards: dict[str, float | None] = field(default_factory=dict)  # each under its own name
    reward: float | None = None  # their weighted sum; None = not to be learnt from
    reward_timeouts: list[str] = field(default_factory=list)  # rewards that took too long: None
    turn_rewards: list[float] | None = None  # what of it each turn earned, if a reward says so
    advantages: list[float] = field(default_factory=list)  # of each turn, once it is learnt from
    version: int = 0  # of the weights that sampled it
    seconds: float = 0.0

    def add(self, ids: list[int], mask: int, logprobs: list[float] | None = None) -> None:
        """The only way to append: `mask` is 1 with logprobs (sampled), 0 without (all the rest)."""
        assert mask in (0, 1), f"mask {mask}: expected 0 or 1"
        assert (logprobs is not None) == bool(mask), "sampled ids, and only they, have logprobs"
        logprobs = [0.0] * len(ids) if logprobs is None else logprobs
        assert len(ids) == len(logprobs), f"{len(ids)} ids but {len(logprobs)} logprobs"
        self.ids += ids
        self.mask += [mask] * len(ids)
        self.logprobs += logprobs

    @property
    def new_tokens(self) -> int:
        return sum(self.mask) + self.unseen_tokens


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
        return shortened(text, 4 * limit)
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


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rollouts", daemon=True).start()
    return loop


def wait(coroutine):
    """The result of a coroutine, from ordinary code. It runs on one event loop in a thread of its
    own: engines and tools keep their connections between calls, and it works in notebooks too,
    whose own loop is already running."""
    ended = threading.Event()

    async def run():
        try:
            return await coroutine
        finally:
            ended.set()

    future = asyncio.run_coroutine_threadsafe(run(), _loop())
    try:
        return future.result()
    except BaseException:  # Ctrl-C too: nothing goes on behind the caller's back
        future.cancel()
        ended.wait(10)  # tools close their sandboxes; the process may end right after this
        raise


def spans(trajectory: Trajectory, tokenizer) -> list[tuple[str, str]]:
    """The trajectory as (kind, text) pieces, for people: kind is "trained", "context" or "tool"."""
    pieces, start = [], 0
    results = [call.result for call in trajectory.calls if call.result]
    for end in range(1, len(trajectory.ids) + 1):
        if end < len(trajectory.ids) and trajectory.mask[end] == trajectory.mask[start]:
            continue
        text = tokenizer.decode(trajectory.ids[start:end], skip_special_tokens=False)
        if trajectory.mask[start]:
            pieces.append(("trained", text))
        else:
            while start > 0 and results and results[0] in text:
                before, _, text = text.partition(results[0])
                pieces += [("context", before), ("tool", results.pop(0))]
            pieces.append(("context", text))
        start = end
    return [(kind, text) for kind, text in pieces if text]


def show(trajectory: Trajectory, tokenizer, console=None) -> None:
    """Prints it: green is trained, grey is context, yellow is what a tool said. console: rich's."""
    from rich.console import Console
    from rich.text import Text

    colours = {"trained": "green", "context": "bright_black", "tool": "yellow"}
    console = console or Console(highlight=False, soft_wrap=True)
    text = Text()
    for kind, piece in spans(trajectory, tokenizer):
        text.append(piece, style=colours[kind])
    console.print(text)
    console.rule(style="bright_black")
    for call in trajectory.calls:
        line = Text(f"call     turn {call.turn}: {call.name}({call.arguments}) ")
        line.append(call.error or "ok", style="red" if call.error else "")
        console.print(line.append(f" in {1000 * call.seconds:.0f} ms"))
    rewards = ", ".join(f"{name} {value}" for name, value in trajectory.rewards.items())
    answer = trajectory.example.get("answer")
    console.print(Text(f"reward   {trajectory.reward} ({rewards}); the answer is {answer!r}"))
    line = Text(f"stop     {trajectory.stop}, {len(trajectory.turn_starts)} turns, ")
    line.append(f"{len(trajectory.ids)} tokens of which ")
    console.print(line.append(f"{trajectory.new_tokens} trained", style="green"))


def stats(trajectories: list[Trajectory], outcome: str) -> dict:
    """The metrics of a set of trajectories. accuracy is the mean of the reward named `outcome`."""
    n, calls = len(trajectories), [call for t in trajectories for call in t.calls]
    errors = Counter(call.error for call in calls if call.error)
    rewards = [t.reward for t in trajectories if t.reward is not None]
    out = {"rollouts": n, "reward": _mean(rewards), "reward_none": n - len(rewards)}
    for name in trajectories[0].rewards:
        values = [t.rewards[name] for t in trajectories if t.rewards[name] is not None]
        out[f"reward_{name}"] = _mean(values)
    out["accuracy"] = out[f"reward_{outcome}"]
    if late := sum(len(t.reward_timeouts) for t in trajectories):
        out["reward_timeouts"] = late
    groups = {t.group: set() for t in trajectories}
    for t in trajectories:
        groups[t.group] |= set() if t.reward is None else {t.reward}
    out["equal_groups"] = _mean([len(seen) < 2 for seen in groups.values()])  # nothing to learn
    out["tool_call_rate"] = _mean([any(not call.ends for call in t.calls) for t in trajectories])
    out["tool_calls"] = len(calls) / n
    out["tool_error_rate"] = sum(errors.values()) / max(1, len(calls))
    out["empty_observation_rate"] = _mean([not c.result or "(no output" in c.result for c in calls])
    out |= {f"tool_errors_{kind}": count for kind, count in sorted(errors.items())}
    out["tool_seconds"] = _mean([call.seconds for call in calls])
    out |= _by_tool(calls)
    out["turns"] = _mean([len(t.turn_starts) for t in trajectories])
    out["new_tokens"] = _mean([t.new_tokens for t in trajectories])
    out["tokens"] = _mean([len(t.ids) for t in trajectories])
    stops = Counter(t.stop for t in trajectories)
    return out | {f"stop_{stop}": count / n for stop, count in sorted(stops.items())}


def _by_tool(calls: list[ToolCall]) -> dict:
    """Of each tool: calls, errors, percentiles of the seconds of those that were run. How many were
    known is not told: a run that goes on begins without them, and its metrics must be the same."""
    ran, out = [call for call in calls if call.error not in reward_functions.MALFORMED], {}
    for name in sorted({call.name for call in ran}):
        own = [call for call in ran if call.name == name]
        seconds = sorted(call.seconds for call in own if call.seconds)  # 0: see ToolCall
        out[f"calls_{name}"] = len(own)
        out[f"errors_{name}"] = sum(bool(call.error) for call in own)
        for percent in (50, 95):
            at = -(-(len(seconds) - 1) * percent // 100)
            out[f"seconds_p{percent}_{name}"] = seconds[at] if seconds else 0.0
    return out


def _mean(values: list) -> float:
    return sum(values) / len(values) if values else 0.0


def task(cfg, limit: int | None = None):
    """(toolbox, rewards, examples) of train_grpo's Config or one like it: all that does not depend
    on a model. limit: use the first so many rows, instead of cfg.limit."""
    selected = reward_functions.select(cfg.rewards, cfg.reward_options, cfg.reward_timeout)
    instant = all(reward.instant for reward, _ in selected.values())
    config.useless(cfg, [(instant, "reward_timeout", "with these rewards: they never wait")])
    if cfg.dynamic_sampling not in ("", *selected):
        names = ", ".join(selected)
        raise UserError(f"dynamic_sampling = {cfg.dynamic_sampling!r}: expected one of {names}")
    options = cfg.tool_options, cfg.tool_cache
    toolbox = Toolbox(cfg.tools, cfg.tool_concurrency, cfg.tool_timeout, *options)
    return toolbox, selected, _rows(cfg, cfg.data, cfg.split, limit or cfg.limit, cfg.seed)


def _rows(cfg, source: str, split: str, limit: int | None, seed: int) -> list[dict]:
    columns = (cfg.prompt_column, cfg.answer_column, cfg.answer_after)
    prompts = (cfg.system_prompt, cfg.prompt_template, limit, seed)
    return data.load(source, split, *columns, *prompts, database=cfg.database)


def setup(cfg, tune: str, limit: int | None = None):
    """(model, tokenizer, chat, toolbox, rewards, examples); what is cheap to check comes first. The
    model is None if only an engine elsewhere has to have it."""
    engines.check(cfg.engine, cfg.urls, tune)
    models.find(cfg.model)
    toolbox, selected, rows = task(cfg, limit)
    tokenizer = models.load_tokenizer(cfg.model)
    # proved before any weights are loaded
    chat = Chat(tokenizer, cfg.format, toolbox.schemas, cfg.template_options)
    check_prompt(chat, rows[0], cfg.max_tokens)
    lora = (cfg.lora_r, cfg.lora_alpha, cfg.lora_targets, cfg.seed)
    if tune == "none" and cfg.tune == "qlora" and models.is_adapter(cfg.model):
        tune = "none4bit"  # what was trained was an adapter on the rounded base
    model = None
    if cfg.engine == "transformers" or tune != "none":
        model, _ = models.load(cfg.model, tune, cfg.dtype, "auto", *lora)
    return model, tokenizer, chat, toolbox, selected, rows


def held_out(cfg) -> list[dict]:
    """The rows that train_grpo's eval_every is about; [] without it."""
    if not cfg.eval_every:
        return []
    if data.is_file(cfg.data) and not cfg.eval_data:
        why = f"data = {cfg.data!r} is a file and has no split of its own for eval_every"
        raise UserError(f"eval_data is missing: {why}")
    source = cfg.eval_data or cfg.data
    config.useless(cfg, [(data.is_file(source), "eval_split", f"on {source!r}: a file has none")])
    return _rows(cfg, source, cfg.eval_split, cfg.eval_rows, VALIDATION_SEED)


def validate(rows: list[dict], cfg, chat, engine, toolbox, selected, log) -> dict:
    """The metrics of playing `rows` greedily, once each; printed too."""
    started, settings = time.monotonic(), replace(Settings.of(cfg), temperature=0.0)
    played = rollouts(rows, chat, engine, toolbox, settings, rewards=selected)
    found = stats(wait(played), next(iter(selected)))
    metrics = {f"val_{key}": found[key] for key in ("accuracy", "reward", "tool_call_rate")}
    log.print("           " + "  ".join(f"{key} {value:.4f}" for key, value in metrics.items()))
    return metrics | {"val_seconds": time.monotonic() - started}


def check_prompt(chat: Chat, example: dict, max_tokens: int) -> None:
    """UserError if there is no room to answer it."""
    if (length := len(chat.prompt(example["messages"]))) >= max_tokens:
        raise UserError(f"max_tokens = {max_tokens}: the first prompt alone has {length}")


@contextlib.contextmanager
def running(cfg, model, tokenizer, toolbox):
    """The engine that the config names. It and the tools are closed in the end, however it ends."""
    try:
        engine = wait(engines.start(cfg, model, tokenizer))
        try:
            yield engine
        finally:
            wait(engine.close())
    finally:
        wait(toolbox.close())


def prompts_of(cursor: int, rows: list[dict], count: int, seed: int) -> list[dict]:
    """The next `count` rows after `cursor` were taken: every row once in a random order, then all
    again in another."""
    picked = []
    for i in range(cursor, cursor + count):
        epoch, at = divmod(i, len(rows))
        if not picked or at == 0:
            order = random.Random(f"{seed} {epoch}").sample(range(len(rows)), len(rows))
        picked.append(rows[order[at]])
    return picked


def batch_of_groups(rows, cursor: int, cfg, chat, engine, toolbox, selected, step: int, log):
    """(trajectories to learn from, all that were played to the end, the cursor after them): of a
    step of train_grpo. With oversample, so many groups more are begun and the last ones dropped.
    With dynamic_sampling, groups whose outcomes are all equal are replaced by those of the next
    prompts; what is still missing after dynamic_attempts rounds is filled up with them."""
    size, kept, equal, played, started = cfg.group_size, [], [], [], 0
    for _ in range(1 + (cfg.dynamic_attempts if cfg.dynamic_sampling else 0)):
        missing = cfg.prompts_per_step - len(kept)
        prompts = prompts_of(cursor + started, rows, missing + cfg.oversample, cfg.seed)
        new = wait(
            rollouts(
                prompts,
                chat,
                engine,
                toolbox,
                Settings.of(cfg),
                step=step,
                samples=size,
                rewards=selected,
                on_done=log.expect(len(prompts) * size),
                first_group=started,  # so that no two share a seed
                need=missing,
            )
        )
        started += len(prompts)
        played += new
        for group in (new[i : i + size] for i in range(0, len(new), size)):
            outcomes = {t.rewards[cfg.dynamic_sampling] for t in group if cfg.dynamic_sampling}
            differ = not cfg.dynamic_sampling or len(outcomes - {None}) > 1
            (kept if differ else equal).append(group)
        if len(kept) == cfg.prompts_per_step:
            break
    kept += equal[: cfg.prompts_per_step - len(kept)]
    return [t for group in kept for t in group], played, cursor + started


def main(argv: list[str]) -> None:
    import train_grpo

    cfg = config.parse(train_grpo.Config, argv, train_grpo.check, keys=KEYS)
    policy, tokenizer, chat, toolbox, selected, rows = setup(cfg, "none", limit=1)
    with running(cfg, policy, tokenizer, toolbox) as engine:
        played = rollouts(rows, chat, engine, toolbox, Settings.of(cfg), rewards=selected)
        show(wait(played)[0], tokenizer)


if __name__ == "__main__":
    config.main(main)

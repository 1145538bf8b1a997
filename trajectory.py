"""One rollout: token ids with an exact loss mask, and what happened on the way.

A trajectory only grows, by `add`: what the engine sampled with mask 1, all the rest with mask 0.

Shapes: T tokens.
"""

from collections import Counter
from dataclasses import dataclass, field

MALFORMED = {"bad_json", "unknown_tool", "bad_arguments"}  # ToolCall.error of calls that never ran


@dataclass
class ToolCall:
    turn: int  # which turn of the trajectory, from 0
    name: str
    arguments: dict | None  # None if the call could not be read
    result: str  # what the model was told
    error: str | None  # one of the kinds above
    seconds: float  # without the wait for a free slot; 0.0 if it was not run: refused, or known
    ends: bool = False  # it gave the answer, and nothing was done after it


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
    # what each token is: "t" trained, "c" context, "o" output of a tool, "e" error of a tool
    kinds: list[str] = field(default_factory=list)
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
    ran, out = [call for call in calls if call.error not in MALFORMED], {}
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

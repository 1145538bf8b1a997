"""One rollout: token ids with an exact loss mask, and what happened on the way.

    trajectory = Trajectory(example)
    trajectory.add(prompt_ids, mask=0)
    trajectory.add(completion.ids, mask=1, logprobs=completion.logprobs)

A trajectory only grows, by `add`: what the policy sampled with mask 1, its stop tokens included,
and all the rest (prompt, template, what tools said) with mask 0. SFT conversations, rollouts and
evaluations are all of this one type.

Shapes: T tokens, K turns.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for a name in two annotations; what only prints must not wait for torch
    import torch

MALFORMED = {"bad_json", "unknown_tool", "bad_arguments"}  # ToolCall.error of calls that never ran
# What a terminal obeys: C0 but tab and line break, DEL and C1, what turns the direction of writing,
# separators of lines and paragraphs, and half of a character.
CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
COLOURS = {  # of kinds
    "t": "green",
    "c": "bright_black",
    "o": "yellow",
    "e": "yellow",
    "i": "cyan",
    "u": "magenta",
}


@dataclass
class ToolCall:
    """One call of a tool, and what came of it."""

    turn: int  # which turn of the trajectory, from 0
    name: str
    arguments: dict | None  # None if the call could not be read
    result: str  # what the model was told
    error: str | None  # its kind, as tools/__init__.py lists them
    seconds: float  # without the wait for a free slot; 0.0 if it was not run: refused, or known
    ends: bool = False  # it gave the answer, and nothing was done after it
    images: list[int] = field(default_factory=list)  # numbers of those it showed, from 1
    reward: float | None = None  # that its Result carried


@dataclass
class UserTurn:
    """What the user of an environment said behind an answer."""

    turn: int  # which turn of the trajectory was the answer, from 0
    text: str
    images: list[int] = field(default_factory=list)  # numbers of those it showed, from 1


@dataclass
class Trajectory:
    """One rollout, as parallel lists of its T tokens and what happened on the way."""

    example: dict  # the data row
    group: int = 0  # which prompt of the step: all samples of one prompt share it
    sample: int = 0  # which sample of the group

    # the tokens
    ids: list[int] = field(default_factory=list)  # (T) each as the engine saw and returned it
    mask: list[int] = field(default_factory=list)  # (T) 1: sampled by the policy, 0: all the rest
    logprobs: list[float] = field(default_factory=list)  # (T) the engine's, of what was sampled
    images: list = field(default_factory=list)  # Pictures, in the order of their placeholders
    turn_starts: list[int] = field(default_factory=list)  # (K) index of each first sampled token
    unseen_tokens: int = 0  # sampled behind an API that gives text only (evaluate.py)

    # what was said and done
    messages: list[dict] = field(default_factory=list)  # for rewards and people, never for ids
    calls: list[ToolCall] = field(default_factory=list)
    stop: str = ""  # "answered" "length" "max_turns" "max_tool_calls" "timeout" "error", and
    # "placeholder": it wrote what only an image may stand for, so nothing is learnt from it
    answer: str | None = None  # what it gave to a tool that ends the episode (tools/finish.py)
    user_turns: list[UserTurn] = field(default_factory=list)  # of an environment's user
    failure: str = ""  # how an environment failed, which ended it: nothing is learnt from it
    version: int = 0  # of the weights that sampled it
    seconds: float = 0.0

    # what it earned
    scores: dict = field(default_factory=dict)  # what each reward gave: a number, or one a turn
    rewards: dict[str, float | None] = field(default_factory=dict)  # each as one number
    reward: float | None = None  # their weighted sum; None: not to be learnt from
    turn_rewards: list[float] | None = None  # (K) what of it each turn earned, if a reward says so
    reward_timeouts: list[str] = field(default_factory=list)  # rewards that took too long: None
    final_reward: float | None = None  # what environments give their final states
    metrics: dict[str, float] = field(default_factory=dict)  # of environments and Results

    # what is learnt from it
    advantages: list[float] = field(default_factory=list)  # (K) of each turn
    teaches: bool = False  # whether anything can be learnt from it
    weight: float = 0.0  # what each of its tokens counts in the loss of an update
    old_logprobs: "torch.Tensor | None" = None  # (T,) the trainer's, before the first update
    ref_logprobs: "torch.Tensor | None" = None  # (T,) those of the reference model

    def add(
        self,
        ids: list[int],
        mask: int,
        logprobs: list[float] | None = None,
        images: Sequence = (),
    ) -> None:
        """Appends tokens: sampled ones with mask 1 and their logprobs, all others with mask 0, and
        the Pictures whose placeholders are among them. This is the only way to append."""
        assert mask in (0, 1), f"mask {mask}: expected 0 or 1"
        assert (logprobs is not None) == bool(mask), "sampled ids, and only they, have logprobs"
        assert not (mask and images), "nobody samples an image"
        if logprobs is None:
            logprobs = [0.0] * len(ids)
        assert len(ids) == len(logprobs), f"{len(ids)} ids but {len(logprobs)} logprobs"
        self.ids += ids
        self.mask += [mask] * len(ids)
        self.logprobs += logprobs
        self.images += images  # in place: tools hold this very list

    @classmethod
    def of_demonstration(cls, example: dict, ids: list[int], mask: list[int]) -> "Trajectory":
        """Makes one of a conversation that nobody sampled here, as SFT is trained on it: mask is 1
        on its trained tokens, which have the logprob 0."""
        trajectory = cls(example, messages=example.get("messages") or [], stop="answered")
        before = 0
        for token, trained in zip(ids, mask, strict=True):
            if trained and not before:
                trajectory.turn_starts.append(len(trajectory.ids))
            trajectory.add([token], trained, [0.0] if trained else None)
            before = trained
        return trajectory

    def plain(self) -> dict:
        """Returns what was played as plain values; its example and its images are not in them."""
        values = dict(vars(self))
        for name in ("example", "images", "old_logprobs", "ref_logprobs"):
            del values[name]
        values["calls"] = [vars(call) for call in self.calls]
        values["user_turns"] = [vars(user_turn) for user_turn in self.user_turns]
        return values

    @classmethod
    def of_plain(cls, values: dict, example: dict, images: list) -> "Trajectory":
        """Makes one of what `plain` returned."""
        calls = [ToolCall(**call) for call in values["calls"]]
        user_turns = [UserTurn(**user_turn) for user_turn in values["user_turns"]]
        played = {"calls": calls, "user_turns": user_turns}
        return cls(**values | played | {"example": example, "images": images})

    @property
    def outcome(self) -> float | None:
        """What says right or wrong: the first of its rewards; None where that graded nothing."""
        return next(iter(self.rewards.values()), None)

    def is_own(self, call: ToolCall) -> bool:
        """Says whether a call is of a function that its row brought along, which nobody runs."""
        own = [tool for tool in self.example.get("tools") or () if isinstance(tool, dict)]
        return any(tool["function"]["name"] == call.name for tool in own)

    @property
    def new_tokens(self) -> int:
        """How many tokens the policy sampled."""
        return sum(self.mask) + self.unseen_tokens


# ---- for people: what each token is, the trajectory in colour


LONGEST_GARBAGE = 32  # tokens that are no text, such as stray bytes: more are cut off in front


def token_texts(ids: list[int], tokenizer) -> list[str]:
    """Decodes each token; joined, the texts are the text of all.

    A character whose bytes are spread over several tokens belongs to the last of them, the others
    have "" (or what is before it).
    """
    texts = []
    start = 0  # first token of what is decoded together
    shown = 0  # characters of ids[start:] that are out
    waiting = 0  # tokens since the last whole character
    whole_until = 0  # tokens up to the end of the last whole character
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        whole = text.rstrip("\ufffd")  # that stands for bytes which the next token may complete
        if whole == text:
            waiting = 0
        elif len(whole) > shown:
            waiting = 1
        else:
            waiting += 1
        if waiting > 3:  # no character has more bytes: at most the last may still become one
            whole = text[:-1]
        if end == len(ids):
            whole = text
        texts.append(whole[shown:])
        shown = max(shown, len(whole))
        # What is decoded again and again must stay short. Something stays as context: some
        # tokenizers strip the space of the first.
        new_start = start
        if waiting == 0:
            alone = tokenizer.decode(ids[end - 1 : end], skip_special_tokens=False)
            new_start = whole_until if "\ufffd" in alone else end - 1  # the last character
            whole_until = end
        elif end - start > LONGEST_GARBAGE:
            new_start = end - LONGEST_GARBAGE // 2
        if new_start > start:
            context = tokenizer.decode(ids[new_start:end], skip_special_tokens=False)
            not_out = len(text) - shown
            if len(context) >= not_out and context.endswith(text[shown:]):
                start = new_start
                shown = len(context) - not_out
    return texts


def image_spans(ids: list[int], pictures: Sequence) -> list[tuple[int, int]]:
    """Finds where in ids the tokens of each Picture are: (first, end). [] where ids do not hold
    them all, such as those of an API's rollout, which has none."""
    found = []
    at = 0
    for picture in pictures:
        if picture.placeholder not in ids[at:]:
            return []
        # a picture may begin with other tokens than its placeholder
        first = ids.index(picture.placeholder, at) - picture.ids.index(picture.placeholder)
        at = first + len(picture.ids)
        if ids[first:at] != picture.ids:
            return []
        found.append((first, at))
    return found


def token_kinds(trajectory: Trajectory, texts: list[str]) -> str:
    """Names what each token is, by a letter: t trained, c context (prompt and template), o what a
    tool said (its output), e what it said of an error, u what a user said behind an answer, i an
    image. texts: those of token_texts."""
    kinds = ["t" if trained else "c" for trained in trajectory.mask]
    starts = [0]  # where each token's text begins in the whole text
    for text in texts:
        starts.append(starts[-1] + len(text))
    whole = "".join(texts)
    turn_ends = [*trajectory.turn_starts[1:], len(kinds)]
    searched_to = 0
    said = []  # (turn, letter, texts) of what stands behind turns: results, or a user's reply
    for call in trajectory.calls:
        letter = "e" if call.error else "o"
        said.append((call.turn, letter, texts_around(call.result, call.images)))
    for user_turn in trajectory.user_turns:
        said.append((user_turn.turn, "u", texts_around(user_turn.text, user_turn.images)))
    said.sort(key=lambda said_of: said_of[0])  # those of one turn keep their order
    for turn, letter, parts in said:
        if turn >= len(trajectory.turn_starts):
            continue
        # results stand behind what the turn sampled, and before the next turn
        turn_start = trajectory.turn_starts[turn]
        turn_end = turn_ends[turn]
        first = turn_start + sum(trajectory.mask[turn_start:turn_end])
        for part in parts:
            found = whole.find(part, max(searched_to, starts[first]), starts[turn_end])
            if found < 0:  # it did not fit, or the template changed it
                continue
            searched_to = found + len(part)
            for i in range(first, turn_end):
                begins_inside = found <= starts[i] < searched_to
                reaches_inside = starts[i] < searched_to and starts[i + 1] > found
                if begins_inside or reaches_inside:
                    kinds[i] = letter
    for first, end in image_spans(trajectory.ids, trajectory.images):
        kinds[first:end] = "i" * (end - first)
    return "".join(kinds)


def texts_around(text: str, images: list[int]) -> list[str]:
    """Splits what the model was told behind each "image 3:", where the image stands."""
    parts = []
    rest = text
    for number in images:
        before, label, rest = rest.partition(f"image {number}:")
        parts.append(before + label)
    parts.append(rest)
    return [part for part in parts if part]


def spans(trajectory: Trajectory, tokenizer, start: int = 0) -> list[tuple[str, str]]:
    """Joins neighbouring tokens of one kind: [(letter of token_kinds, text)], from token `start`
    on. An image stands for itself, in words."""
    texts = token_texts(trajectory.ids, tokenizer)
    kinds = token_kinds(trajectory, texts)
    firsts = [first for first, _ in image_spans(trajectory.ids, trajectory.images)]
    joined: list[tuple[str, str]] = []
    for i, (kind, text) in enumerate(zip(kinds, texts, strict=True)):
        if i < start:
            continue
        if i in firsts:
            joined.append((kind, in_words(trajectory, firsts.index(i) + 1)))
        elif kind == "i":
            continue  # the rest of its tokens
        elif joined and joined[-1][0] == kind:
            joined[-1] = (kind, joined[-1][1] + text)
        else:
            joined.append((kind, text))
    return [(kind, text) for kind, text in joined if text]


def in_words(trajectory: Trajectory, number: int) -> str:
    """Describes an image by its number, from 1: image 3: 448 x 308 pixels, 176 tokens."""
    picture = trajectory.images[number - 1]
    width, height = picture.shown.size
    return f"image {number}: {width} x {height} pixels, {len(picture.ids)} tokens"


def escaped(text: str) -> str:
    """Shows control characters as python writes them, \\x1b and \\u202e: printed raw, what a model
    says could clear the terminal, fill its clipboard or turn its lines around. Line breaks and tabs
    stay, and so do all other characters."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def show(trajectory: Trajectory, tokenizer, console=None, draw: Callable | None = None) -> None:
    """Prints it: green is trained, grey is context, yellow is what a tool said, magenta what a user
    said behind an answer, cyan an image.
    console: rich's. draw(number): what is printed behind the words of an image, as rich's Text."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False, soft_wrap=True)
    conversation = Text()
    number = 0  # of the image
    for kind, text in spans(trajectory, tokenizer):
        if kind != "i":
            conversation.append(escaped(text), style=COLOURS[kind])
            continue
        number += 1
        conversation.append(f"\n[{text}", style=COLOURS[kind])
        if draw:
            conversation.append_text(draw(number))
        conversation.append("]\n", style=COLOURS[kind])
    console.print(conversation)
    console.rule(style="bright_black")

    for call in trajectory.calls:
        line = Text(escaped(f"call     turn {call.turn}: {call.name}({call.arguments}) "))
        line.append(call.error or "ok", style="red" if call.error else "")
        line.append(f" in {1000 * call.seconds:.0f} ms")
        console.print(line)

    if trajectory.rewards:  # a demonstration has none
        rewards = ", ".join(f"{name} {value}" for name, value in trajectory.rewards.items())
        answer = trajectory.example.get("answer")
        line = escaped(f"reward   {trajectory.reward} ({rewards}); the answer is {answer!r}")
        console.print(Text(line))
    for name, value in trajectory.metrics.items():
        console.print(Text(escaped(f"metric   {name} {value:g}")))
    if trajectory.failure:
        console.print(Text(escaped(f"failure  {trajectory.failure}"), style="red"))
    line = Text(f"stop     {trajectory.stop}, {len(trajectory.turn_starts)} turns, ")
    line.append(f"{len(trajectory.ids)} tokens of which ")
    line.append(f"{trajectory.new_tokens} trained", style="green")
    console.print(line)


# ---- the metrics of many


def stats(trajectories: list[Trajectory]) -> dict:
    """Measures a set of trajectories; docs/log.md explains each key. accuracy is the mean outcome;
    that of a reward is over the trajectories that have it."""
    count = len(trajectories)
    metrics = {"rollouts": count}

    # rewards
    rewards = [t.reward for t in trajectories if t.reward is not None]
    metrics["reward"] = mean(rewards)
    metrics["reward_none"] = count - len(rewards)
    for name in dict.fromkeys(name for t in trajectories for name in t.rewards):
        values = [t.rewards.get(name) for t in trajectories]
        metrics[f"reward_{name}"] = mean([value for value in values if value is not None])
    metrics["accuracy"] = mean([t.outcome for t in trajectories if t.outcome is not None])
    late = sum(len(t.reward_timeouts) for t in trajectories)
    if late:
        metrics["reward_timeouts"] = late
    rewards_of_group: dict[int, set] = {t.group: set() for t in trajectories}
    for t in trajectories:
        if t.reward is not None:
            rewards_of_group[t.group].add(t.reward)
    # the share of groups from which nothing can be learnt
    metrics["equal_groups"] = mean([len(values) < 2 for values in rewards_of_group.values()])

    # environments
    measured = [name for t in trajectories for name in t.metrics]
    for name in sorted(set(measured)):
        values = [t.metrics[name] for t in trajectories if name in t.metrics]
        metrics[f"environment_{name}"] = mean(values)
    failures = sum(bool(t.failure) for t in trajectories)
    if failures:
        metrics["environment_failures"] = failures

    # calls
    calls = [call for t in trajectories for call in t.calls]
    errors = Counter(call.error for call in calls if call.error)
    callers = [any(not call.ends or t.is_own(call) for call in t.calls) for t in trajectories]
    empty = [not call.result or "(no output" in call.result for call in calls]
    metrics["tool_call_rate"] = mean(callers)
    metrics["tool_calls"] = len(calls) / count
    metrics["tool_error_rate"] = sum(errors.values()) / max(1, len(calls))
    metrics["empty_observation_rate"] = mean(empty)
    for kind, number in sorted(errors.items()):
        metrics[f"tool_errors_{kind}"] = number
    metrics["tool_seconds"] = mean([call.seconds for call in calls])
    # each row has other functions of its own: of these, no counts by name
    metrics |= stats_by_tool([call for t in trajectories for call in t.calls if not t.is_own(call)])

    # lengths and ends
    metrics["turns"] = mean([len(t.turn_starts) for t in trajectories])
    metrics["new_tokens"] = mean([t.new_tokens for t in trajectories])
    metrics["tokens"] = mean([len(t.ids) for t in trajectories])
    if any(t.images for t in trajectories):
        metrics["images"] = mean([len(t.images) for t in trajectories])
    if any(t.user_turns for t in trajectories):
        metrics["user_turns"] = mean([len(t.user_turns) for t in trajectories])
    stops = Counter(t.stop for t in trajectories)
    for stop, number in sorted(stops.items()):
        metrics[f"stop_{stop}"] = number / count
    return metrics


def stats_of_sources(trajectories: list[Trajectory]) -> dict:
    """Measures each source of a mix (run/mix.py) by itself: {"calc/accuracy": …}; {} without."""
    by_source: dict[str, list[Trajectory]] = {}
    for t in trajectories:
        if "mix" in t.example:
            by_source.setdefault(t.example["mix"], []).append(t)
    metrics = {}
    for source, played in sorted(by_source.items()):
        metrics |= {f"{source}/{name}": value for name, value in stats(played).items()}
    return metrics


def stats_by_tool(calls: list[ToolCall]) -> dict:
    """Counts calls and errors of each tool, with percentiles of the seconds of those that were run.
    How many results were known is left out: a run that goes on begins without them, and its metrics
    must be the same."""
    metrics = {}
    ran = [call for call in calls if call.error not in MALFORMED]
    for name in sorted({call.name for call in ran}):
        calls_of_it = [call for call in ran if call.name == name]
        seconds = sorted(call.seconds for call in calls_of_it if call.seconds)  # 0.0: not run
        metrics[f"calls_{name}"] = len(calls_of_it)
        metrics[f"errors_{name}"] = sum(bool(call.error) for call in calls_of_it)
        for percent in (50, 95):
            at = -(-(len(seconds) - 1) * percent // 100)  # rounded up
            metrics[f"seconds_p{percent}_{name}"] = seconds[at] if seconds else 0.0
    return metrics


def mean(values: list) -> float:
    """Averages; 0.0 for nothing."""
    return sum(values) / len(values) if values else 0.0

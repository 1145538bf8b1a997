"""Simulates seconds a step on 1 to 64 GPUs, for 0.6B, 7B and 32B with slow tools.

    python bench/scale.py                                   # measures this host, then simulates
    python bench/scale.py --tool_seconds=0.2                # with quick tools

Nothing here ran on a GPU. What is what:

- Measured, on this machine's CPU: what all ranks do alike for all trajectories of a step (pickling
  and reading them, advantages, micro-batches), in seconds and bytes a trajectory.
- From datasheets: an H100 SXM's products (989 TFLOP/s in bfloat16, dense), memory (3.35 TB/s) and
  NVLink (450 GB/s in each direction); 400 Gb/s for each GPU between machines of 8.
- Assumed: the rest of the constants below, and the workload. Change them, and run it again.

The play of each rank is simulated event by event: its trajectories decode together, each token step
as long as weights and cache take to be read (or the products, where that is longer); a call waits
for a free place of tool_concurrency, then for as long as it takes. Lengths and latencies are
log-normal. A step: sync, play until the last rank's last trajectory, gather, passes of the
micro-batches that a rank has, all-reduce, step.
"""

import heapq
import json
import math
import pickle
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)

from run.config import UserError

# -- datasheets: NVIDIA H100 SXM, ConnectX-7
PRODUCTS = 989e12  # a second
MEMORY_BANDWIDTH = 3.35e12  # bytes a second
NVLINK = 450e9  # bytes a second, in one direction
NETWORK = 50e9  # bytes a second for each GPU: 400 Gb/s
GPUS_OF_A_MACHINE = 8
# -- assumed: the shares of them that are reached, and what is not on a datasheet
PRODUCTS_SHARE = 0.35  # while the policy learns, and when prompts are read
BANDWIDTH_SHARE = 0.6  # while it decodes
LINK_SHARE = 0.7
TOKEN_OVERHEAD = 0.004  # seconds of a token step: scheduler, sampling, launches
SYNC_SECONDS = 1.0  # weights or adapters to the engine, and the canary
SLEEP_SECONDS = 4.0  # vLLM sleeps and wakes, where it shares the GPU
TCP = 1.25e9  # bytes a second, of the gathered trajectories: gloo over 10 Gb/s
DISK = 1e9  # bytes a second
SAVE_EVERY = 50  # steps


@dataclass(frozen=True)
class Model:
    """A model, and how it is trained."""

    numbers: float  # parameters
    trained: float  # of these, or of adapters
    cache: float  # bytes of keys and values of a token, bfloat16
    token_products: float  # of a trained token, for each parameter
    servers: bool = False  # half of the GPUs sample, in pairs; else each does both


MODELS = {
    # Qwen3-0.6B in full: 2 forward, 4 backward
    "0.6B": Model(0.6e9, 0.6e9, 28 * 2 * 8 * 128 * 2, 6),
    # Qwen2.5-7B, adapters of rank 32, layers recomputed: 2 forward, 2 again, 2 backward
    "7B": Model(7.6e9, 81e6, 28 * 2 * 4 * 128 * 2, 6),
    # Qwen2.5-32B, adapters on 4 bits; its bfloat16 weights are sampled from by pairs of GPUs
    "32B": Model(32.8e9, 268e6, 64 * 2 * 8 * 128 * 2, 6, servers=True),
}


@dataclass
class Config:
    models: tuple[str, ...] = tuple(MODELS)
    gpus: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    prompts_per_step: int = 64
    group_size: int = 16
    turns: int = 3  # of a trajectory; between two of them a call
    turn_tokens: float = 300.0  # median of a turn
    prompt_tokens: int = 1000
    result_tokens: int = 200  # of a call
    tool_seconds: float = 3.0  # median of a call
    tool_concurrency: int = 64  # calls at once, of each rank
    token_budget: int = 8192
    seed: int = 0
    save_to: str = ""  # a .json for inputs and results


def check(cfg: Config) -> None:
    wrong = set(cfg.models) - set(MODELS)
    if wrong:
        raise UserError(f"models: there is no {min(wrong)!r}; there are {', '.join(MODELS)}")
    config.require_positive(cfg, "prompts_per_step group_size turns turn_tokens token_budget")
    config.require_positive(cfg, "tool_seconds tool_concurrency")


# -- the workload


@dataclass
class Episode:
    """What a trajectory will take, whoever plays it."""

    turns: list[int] = field(default_factory=list)  # tokens to sample
    calls: list[float] = field(default_factory=list)  # seconds, between the turns

    def tokens(self, cfg: Config) -> int:
        return cfg.prompt_tokens + sum(self.turns) + cfg.result_tokens * len(self.calls)


def episodes(cfg: Config) -> list[list[Episode]]:
    """Draws the groups of a step: the same for any number of GPUs."""
    rng = random.Random(cfg.seed)
    groups = []
    for _ in range(cfg.prompts_per_step):
        group = []
        for _ in range(cfg.group_size):
            episode = Episode()
            for turn in range(cfg.turns):
                tokens = cfg.turn_tokens * math.exp(rng.gauss(0, 0.6))
                episode.turns.append(max(1, min(2048, round(tokens))))
                if turn + 1 < cfg.turns:
                    seconds = cfg.tool_seconds * math.exp(rng.gauss(0, 0.8))
                    episode.calls.append(min(60.0, seconds))
            group.append(episode)
        groups.append(group)
    return groups


# -- playing


def token_seconds(model: Model, rows: int, tokens: float, gpus: int) -> float:
    """Returns how long a token step of so many rows takes, that have read `tokens` each."""
    read = 2 * model.numbers + rows * tokens * model.cache  # bytes
    reading = read / (gpus * MEMORY_BANDWIDTH * BANDWIDTH_SHARE)
    multiplying = 2 * model.numbers * rows / (gpus * PRODUCTS * PRODUCTS_SHARE)
    return max(reading, multiplying) + TOKEN_OVERHEAD


def play(model: Model, mine: list[Episode], cfg: Config, gpus: int) -> float:
    """Simulates one engine on `gpus` GPUs; returns the seconds until its last trajectory ends."""
    if not mine:
        return 0.0
    mean_tokens = sum(episode.tokens(cfg) for episode in mine) / len(mine) / 2
    # a prompt is read once for its group, a result once for each of its rows
    read = cfg.prompt_tokens * len(mine) / cfg.group_size
    read += cfg.result_tokens * sum(len(episode.calls) for episode in mine)
    now = 2 * model.numbers * read / (gpus * PRODUCTS * PRODUCTS_SHARE)

    # a row decodes until `done`, counted in token steps from the start
    steps = 0.0
    decoding = [(float(episode.turns[0]), number, 0) for number, episode in enumerate(mine)]
    heapq.heapify(decoding)
    calling = []  # (the second in which it ends, number, its turn)
    waiting = []  # for a free place: (number, turn)
    while decoding or calling:
        step = token_seconds(model, len(decoding), mean_tokens, gpus) if decoding else math.inf
        turn_ends = now + (decoding[0][0] - steps) * step if decoding else math.inf
        call_ends = calling[0][0] if calling else math.inf
        if turn_ends <= call_ends:
            # 1. a turn ends: its call runs, or waits
            now = turn_ends
            steps, number, turn = heapq.heappop(decoding)
            if turn < len(mine[number].calls):
                waiting.append((number, turn))
        else:
            # 2. a call ends: the next turn decodes
            if decoding:
                steps += (call_ends - now) / step
            now = call_ends
            _, number, turn = heapq.heappop(calling)
            tokens = mine[number].turns[turn + 1]
            heapq.heappush(decoding, (steps + tokens, number, turn + 1))
        while waiting and len(calling) < cfg.tool_concurrency:
            number, turn = waiting.pop(0)
            heapq.heappush(calling, (now + mine[number].calls[turn], number, turn))
    return now


# -- a step


def reduce_bytes(model: Model, ranks: int) -> float:
    """Returns what each GPU sends in the all-reduce of the gradients, in float32."""
    return 2 * (ranks - 1) / ranks * 4 * model.trained


def divided(model: Model, gpus: int) -> tuple[int, int, int]:
    """Returns how many ranks train, how many engines sample, and how many GPUs an engine has."""
    if model.servers:
        return gpus // 2, gpus // 4, 2
    return gpus, gpus, 1


def travels(name: str, gpus: int, host: dict, cfg: Config) -> dict[str, float]:
    """Returns the bytes that a GPU sends in a step, by what they are."""
    model = MODELS[name]
    ranks, engines, _ = divided(model, gpus)
    trajectories = cfg.prompts_per_step * cfg.group_size
    sent = {"gradients": reduce_bytes(model, ranks)}
    # its own trajectories, to each of the others
    sent["trajectories"] = trajectories / ranks * host["bytes"] * (ranks - 1)
    if model.servers:  # each rank gives the adapter to the servers, by a file that all see
        sent["adapter"] = 4 * model.trained * engines
    return sent


def simulate(name: str, gpus: int, groups: list, host: dict, cfg: Config) -> dict | None:
    """Simulates a step; returns its seconds by part, None where the model has not enough GPUs."""
    model = MODELS[name]
    ranks, engines, gpus_of_engine = divided(model, gpus)
    if not engines:
        return None
    everything = [episode for group in groups for episode in group]
    parts = {"sync": SYNC_SECONDS + (0.0 if model.servers else SLEEP_SECONDS)}

    # 1. each engine plays its groups; all wait for the last
    ends = []
    for engine in range(engines):
        mine = [episode for group in groups[engine::engines] for episode in group]
        ends.append(play(model, mine, cfg, gpus_of_engine))
    parts["play"] = max(ends)

    # 2. everybody is told everything, and computes alike
    parts["gather"] = 0.0
    if ranks > 1:
        parts["gather"] = len(everything) * host["bytes"] / TCP
        parts["gather"] += len(everything) * host["pickle_seconds"]
    parts["host"] = len(everything) * host["plan_seconds"]

    # 3. passes: some ranks have one micro-batch more than others
    tokens = sum(episode.tokens(cfg) for episode in everything)
    batches = math.ceil(tokens / cfg.token_budget)
    products = model.token_products * model.numbers * cfg.token_budget
    parts["passes"] = math.ceil(batches / ranks) * products / (PRODUCTS * PRODUCTS_SHARE)

    # 4. gradients are summed; with several machines at the speed of the network
    link = NVLINK if ranks <= GPUS_OF_A_MACHINE else NETWORK
    parts["reduce"] = reduce_bytes(model, ranks) / (link * LINK_SHARE)

    # 5. weights and two moments, by the first rank
    parts["save"] = 12 * model.trained / DISK / SAVE_EVERY
    return parts


# -- what is measured here


def measure_host(cfg: Config, runs: int = 5) -> dict:
    """Measures what is done for each trajectory on each rank, in seconds of this CPU: medians."""
    import train_grpo
    from loss import set_advantages
    from trajectory import Trajectory

    made = []
    for group_number, group in enumerate(episodes(cfg)):
        for number, episode in enumerate(group):
            t = Trajectory({}, group=group_number, sample=number, stop="answered")
            t.reward = float(number % 2)
            t.add([group_number] * cfg.prompt_tokens, 0)
            for turn, tokens in enumerate(episode.turns):
                t.turn_starts.append(len(t.ids))
                t.add([5 + turn] * tokens, 1, [-1.0] * tokens)
                if turn < len(episode.calls):
                    t.add([7] * cfg.result_tokens, 0)
            made.append(t)

    class NoSharing:
        """As a model whose layers are recomputed: prompts are not shared."""

        is_gradient_checkpointing = True

    pickled = pickle.dumps(made)
    pickling = []
    planning = []
    for _ in range(runs):
        started = time.process_time()
        pickle.loads(pickle.dumps(made))
        pickling.append(time.process_time() - started)
        started = time.process_time()
        set_advantages(made, "group", False, "keep")
        train_grpo.batches(NoSharing(), made, cfg.token_budget)
        planning.append(time.process_time() - started)
    return {
        "bytes": len(pickled) / len(made),
        "pickle_seconds": statistics.median(pickling) / len(made),
        "plan_seconds": statistics.median(planning) / len(made),
    }


# -- the table


def rows_of(host: dict, cfg: Config) -> list[dict]:
    """Simulates all models on all numbers of GPUs."""
    groups = episodes(cfg)
    rows = []
    for name in cfg.models:
        for gpus in cfg.gpus:
            parts = simulate(name, gpus, groups, host, cfg)
            if parts is None:
                continue
            total = sum(parts.values())
            rows.append({"model": name, "gpus": gpus, "seconds": total} | parts)
    return rows


def main(argv: list[str]) -> None:
    cfg = config.parse(Config, argv, check)
    host = measure_host(cfg)
    print("measured here, for each trajectory:", {k: f"{v:.3g}" for k, v in host.items()})
    groups = episodes(cfg)
    calls = [sum(episode.calls) for group in groups for episode in group]
    tokens = [episode.tokens(cfg) for group in groups for episode in group]
    print(
        f"{len(calls)} trajectories, {sum(tokens):,} tokens; the slowest waits {max(calls):.0f} s"
    )
    rows = rows_of(host, cfg)
    names = list(rows[0])
    print(" ".join(f"{name:>8}" for name in names))
    for row in rows:
        cells = [f"{v:8.2f}" if isinstance(v, float) else f"{v:>8}" for v in row.values()]
        print(" ".join(cells))
    if cfg.save_to:
        saved = {"config": asdict(cfg), "host": host, "rows": rows}
        Path(cfg.save_to).write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    config.main(main)

"""Evaluation with tools: avg@k, pass@k, maj@k, tool calls, errors and stop reasons, with intervals.

    python evaluate.py --run=out/calc                                   # a run, by its own config
    python evaluate.py --run=out/calc --n=8 --k=1,4,8 --temperature=1
    python evaluate.py --model=Qwen/Qwen2.5-0.5B-Instruct --config gsm8k.py --limit=200
    python evaluate.py --config gsm8k.py --run=out/calc --data=gsm8k_test.jsonl --limit=50
    python evaluate.py --run=out/calc_lora --engine=server --urls=http://127.0.0.1:8000
    python evaluate.py --run=out/calc --endpoint=http://127.0.0.1:8000/v1 --model=gpt  # a baseline

Three layers, each over the one before: the run's config.py, --config, --key=value. With --run the
model is the run's, whatever the other config says; --model on the command line wins over all. By
default it is greedy (temperature 0) with one sample a problem, on the "test" split where the data
has splits.
"""

import contextlib
import json
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from run import config

if __name__ == "__main__":
    # the keys of train_grpo.py that shape a rollout can be given here too
    config.answer_help(__file__, "train_grpo.py", keys=config.ROLLOUT_KEYS)

import data
import rewards as reward_functions
import train_grpo
from engines.base import Sampling
from engines.chat_api import Endpoint
from formats import Call, too_deep
from player import running, setup, task
from rollout import Settings, ends, rollouts, run, seed_of
from run import log as run_log
from run.config import ROLLOUT_KEYS, UserError
from run.http import key_from
from run.loop import run_blocking
from trajectory import Trajectory, stats


@dataclass
class Config:
    run: str = ""  # the out_dir of a training run: its model and its config
    n: int = 1  # samples per problem; more than 1 needs a temperature above 0
    k: tuple[int, ...] = (1,)  # pass@k and maj@k for each of these, n at most
    limit: int | None = None  # the first so many problems
    split: str = "test"  # of a task or a hub data set; a file has no splits
    temperature: float = 0.0  # 0 = greedy
    seed: int = 1_000_000  # of sampling (another stream than training's) and of a task's problems
    batch: int = 256  # problems that are played at once
    endpoint: str = ""  # an OpenAI-compatible API, http(s)://host/v1, whose --model is evaluated
    key_env: str = "OPENAI_API_KEY"  # the environment variable that holds its key
    save_to: str = ""  # folder of eval.json and rollouts.jsonl; "" = eval/ in the run, or out/eval


def check(cfg: Config) -> None:
    """Rules across keys."""
    if cfg.n < 1 or cfg.batch < 1:
        raise UserError(f"n = {cfg.n}, batch = {cfg.batch}: expected at least 1")
    if cfg.temperature < 0:
        raise UserError(f"temperature = {cfg.temperature}: expected 0 or more")
    if cfg.limit is not None and cfg.limit < 1:
        raise UserError(f"limit = {cfg.limit}: expected at least 1, or none for all")
    if cfg.n > 1 and cfg.temperature == 0:
        raise UserError(f"n = {cfg.n} samples at temperature 0 are all alike: use --temperature=1")
    if not cfg.endpoint and cfg.key_env != Config.key_env:
        raise UserError("key_env has no effect without --endpoint: drop it")
    if not cfg.k or min(cfg.k) < 1 or max(cfg.k) > cfg.n:
        raise UserError(f"k = {cfg.k}: expected numbers from 1 to n = {cfg.n}")


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that at least one of k samples, drawn from the n without putting back, is right:
    1 - C(n - right, k) / C(n, k), unbiased (Chen et al. 2021, arXiv:2107.03374). Needs n >= k."""
    if k > n:
        raise ValueError(f"pass@{k} needs at least {k} samples, got {n}")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean of one value per problem: Wilson's where all are 0 or 1, which
    stays inside [0, 1] and is right for small n too, else the normal one."""
    n, mean, z = len(values), sum(values) / len(values), 1.96
    if all(v in (0, 1) for v in values):
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)
    variance = sum((v - mean) ** 2 for v in values) / max(1, n - 1)
    half = z * math.sqrt(variance / n)
    low, high = (0.0, 1.0) if 0 <= min(values) and max(values) <= 1 else (-math.inf, math.inf)
    return max(low, mean - half), min(high, mean + half)


def majority(answers: list[str | None], scores: list[float]) -> float:
    """The score of the answer given most often, the earlier one in a tie; None has no vote."""
    votes = []  # [answer, its score, how many gave it or one that equals it]
    for answer, score in zip(answers, scores, strict=True):
        same = [v for v in votes if answer is not None and reward_functions.equal(answer, v[0])]
        if same:
            same[0][2] += 1
        elif answer is not None:
            votes.append([answer, score, 1])
    return max(votes, key=lambda vote: vote[2])[1] if votes else 0.0


def summarize(trajectories: list[Trajectory], outcome: str, ks: tuple[int, ...]) -> dict:
    """All numbers of an evaluation. `outcome` names the reward that says right or wrong."""
    by_problem = defaultdict(list)
    for t in trajectories:
        by_problem[t.group].append(t)
    scores = [[t.rewards[outcome] or 0.0 for t in ts] for ts in by_problem.values()]
    n = len(scores[0])
    means = [sum(s) / n for s in scores]
    low, high = interval(means)
    out = {"problems": len(scores), "samples": n, f"avg@{n}": sum(means) / len(means)}
    out |= {"ci95_low": low, "ci95_high": high}
    for k in ks:
        values = [pass_at_k(n, sum(x >= 1 for x in s), k) for s in scores]
        out[f"pass@{k}"] = sum(values) / len(values)
        if k > 1:
            answers = [
                [reward_functions.answer(t, t.example) for t in ts[:k]]
                for ts in by_problem.values()
            ]
            votes = [majority(a, s[:k]) for a, s in zip(answers, scores, strict=True)]
            out[f"maj@{k}"] = sum(votes) / len(votes)
    metrics = stats(trajectories, outcome)
    dropped = ("rollouts", "equal_groups", "tool_seconds")
    return out | {key: value for key, value in metrics.items() if key not in dropped}


def load_config(argv: list[str], own: Config) -> train_grpo.Config:
    """The training config that describes the rollouts: the run's, --config, then --key=value."""
    layers = []
    if own.run:
        file = Path(own.run) / "config.py"
        if not file.is_file():
            raise UserError(f"run = {own.run!r}: no config.py in it: give the out_dir of a run")
        layers = ["--config", str(file)]
    try:
        base = config.parse(train_grpo.Config, layers)
    except UserError as error:
        advice = f"for another's model use --model={own.run} --config …"
        raise UserError(
            f"run = {own.run!r} is no run of train_grpo.py ({error}); {advice}"
        ) from None
    cfg = config.parse(train_grpo.Config, argv, keys=ROLLOUT_KEYS, base=base)
    given = "model" in _keys(argv)
    if own.endpoint and not given:
        raise UserError("model is missing: --endpoint needs --model=<its name there>")
    ours = "format template_options dtype deterministic engine urls server_timeout"
    if own.endpoint and (vain := sorted(_keys(argv) & {*ours.split(), *train_grpo.VLLM.split()})):
        raise UserError(f"{vain[0]} has no effect with --endpoint: drop it")
    cfg = _without_idle(cfg, base, argv)
    if own.split != Config.split and data.is_file(cfg.data):
        raise UserError(f"split has no effect on {cfg.data!r}: a file has no splits, so drop it")
    cfg = over(cfg, own, own.run if own.run and not given else cfg.model)
    train_grpo.check(cfg)
    return cfg


def _without_idle(cfg: train_grpo.Config, base: train_grpo.Config, argv: list[str]):
    """`cfg` without what has no effect beside the keys given here: the options of the run's engine
    where another is asked for, of tools where there are none."""
    given, idle = _keys(argv), "warmup"
    if cfg.engine != base.engine:
        idle += f" {train_grpo.VLLM} urls server_timeout deterministic oversample is_level is_cap"
    if not cfg.tools:
        idle += " tool_timeout tool_concurrency tool_cache"
    if "rewards" in given:
        idle += " reward_timeout"
    plain = train_grpo.Config()
    return replace(cfg, **{key: getattr(plain, key) for key in idle.split() if key not in given})


def _keys(argv: list[str]) -> set[str]:
    """What is given on the command line."""
    return {item[2:].partition("=")[0] for item in argv}


def over(cfg: train_grpo.Config, own: Config, model: str) -> train_grpo.Config:
    """`cfg` for evaluating `model`: its problems and its sampling are `own`'s."""
    split = train_grpo.Config.split if data.is_file(cfg.data) else own.split
    sampling = {"temperature": own.temperature, "seed": own.seed}
    return replace(cfg, model=model, split=split, limit=own.limit, **sampling)


def evaluate(cfg: train_grpo.Config, own: Config) -> dict:
    """Plays the problems of cfg, writes eval.json and rollouts.jsonl, returns the numbers."""
    folder = config.fresh_dir(own.save_to, key="save_to") if own.save_to else None
    with player(cfg, own) as (chat, engine, turn, toolbox, selected, rows):
        folder = folder or _numbered(Path(own.run) / "eval" if own.run else Path("out/eval"))
        trajectories = play_all(cfg, own, chat, engine, turn, toolbox, selected, rows, folder)
    outcome = next(iter(selected))
    numbers = {"model": cfg.model, "data": cfg.data, "split": cfg.split, "seed": own.seed}
    numbers |= {"temperature": own.temperature, **summarize(trajectories, outcome, own.k)}
    (folder / "eval.json").write_text(json.dumps(numbers, indent=2) + "\n")
    return numbers | {"saved": str(folder)}


@contextlib.contextmanager
def player(cfg: train_grpo.Config, own: Config):
    """(chat, engine, turn, toolbox, rewards, examples) to play with; turn=None is rollout.py's."""
    if not own.endpoint:
        model, tokenizer, chat, toolbox, *rest = setup(cfg, "none", limit=own.limit)
        with running(cfg, model, tokenizer, toolbox) as engine:
            yield chat, engine, None, toolbox, *rest
        return
    toolbox, selected, rows = task(cfg, own.limit)
    asked = Endpoint(own.endpoint, cfg.model, toolbox.schemas, key_from(own.key_env))
    try:
        yield asked, asked, play_api_turn, toolbox, selected, rows
    finally:
        run_blocking(asked.close())
        run_blocking(toolbox.close())


def play_all(cfg, own: Config, chat, engine, turn, toolbox, selected, rows, folder: Path) -> list:
    """Plays all examples, own.batch at a time, and writes rollouts.jsonl as they are done."""
    trajectories = []
    with run_log.progress() as bars:
        done = run_log.counter(bars, bars.add_task("rollouts", total=len(rows) * own.n, note=""))
        for start in range(0, len(rows), own.batch):
            part = rows[start : start + own.batch]
            played = run_blocking(
                rollouts(
                    part,
                    chat,
                    engine,
                    toolbox,
                    Settings.of(cfg),
                    samples=own.n,
                    first_group=start,
                    rewards=selected,
                    on_done=done,
                    turn=turn,
                )
            )
            trajectories += played
            run_log.write_rollouts(folder / "rollouts.jsonl", played, chat.tokenizer)
    return trajectories


def _numbered(folder: Path) -> Path:
    """`folder`, or folder-2, folder-3, …: an earlier evaluation is never overwritten."""
    names = [folder] + [folder.with_name(f"{folder.name}-{i}") for i in range(2, 1000)]
    return config.fresh_dir(next(name for name in names if not name.exists()))


def table(numbers: dict) -> None:
    """Prints the numbers as a table."""
    from rich.console import Console
    from rich.table import Table

    out = Table(title=f"{numbers['model']} on {numbers['data']}", title_justify="left")
    out.add_column("metric")
    out.add_column("value", justify="right")
    for key, value in numbers.items():
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        out.add_row(key, shown)
    Console(highlight=False).print(out)


async def play_api_turn(
    trajectory: Trajectory,
    chat,
    endpoint: Endpoint,
    session,
    toolbox,
    settings: Settings,
    step: int,
) -> None:
    """Plays one message of the model behind an API, and its calls. Sets trajectory.stop if it was
    the last."""
    turn = len(trajectory.turn_starts)
    where = (settings.seed, step, trajectory.group, trajectory.sample, turn)
    sampling = Sampling(settings.temperature, settings.max_new_tokens, seed_of(*where))
    is_final = settings.final_turn and turn == settings.max_turns
    reply = await endpoint.ask(trajectory.messages, sampling, with_tools=not is_final)
    if reply is None:
        trajectory.stop = "length"
        return
    trajectory.turn_starts.append(0)  # of ids that nobody here sees
    trajectory.unseen_tokens += reply.new_tokens
    message = {"role": "assistant", "content": reply.text}
    if reply.tool_calls:
        message["tool_calls"] = reply.tool_calls
    trajectory.messages.append(message)
    calls = [_api_call(tool_call["function"]) for tool_call in reply.tool_calls]
    if ends(trajectory, calls, reply.was_cut, toolbox, settings):
        return
    results = await run(trajectory, calls, session, toolbox, settings, None)
    if trajectory.stop:
        return
    for tool_call, (call, result) in zip(reply.tool_calls, results, strict=True):
        trajectory.messages.append(
            {
                "role": "tool",
                "tool_call_id": tool_call.get("id", ""),
                "name": call.name,
                "content": result,
            }
        )
    if reply.all_tokens >= settings.max_tokens:
        trajectory.stop = "length"


def _api_call(function: dict) -> Call:
    """A native tool call, its arguments read from JSON."""
    name = function["name"]
    text = function.get("arguments") or "{}"
    try:
        arguments = json.loads(text) if isinstance(text, str) else text
        if not isinstance(arguments, dict):
            raise ValueError(f"an object is expected, not {str(text)[:40]}")
        if too_deep(arguments):
            raise ValueError("it is too deep")
    except (ValueError, RecursionError) as error:
        message = f"malformed call of {name}: its arguments are not JSON ({error})"
        return Call(name, None, "bad_json", message, str(text))
    return Call(name, arguments, raw=str(text))


def main(argv: list[str]) -> None:
    mine, rest = config.split(argv, Config.__dataclass_fields__)
    own = config.parse(Config, mine, check)
    table(evaluate(load_config(rest, own), own))


if __name__ == "__main__":
    config.main(main)

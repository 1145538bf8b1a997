"""Evaluation with tools: avg@k, pass@k, maj@k, tool calls, errors and stop reasons, with intervals.

    python evaluate.py --run=out/calc                                   # a run, by its own config
    python evaluate.py --run=out/calc --n=8 --k=1,4,8 --temperature=1
    python evaluate.py --model=Qwen/Qwen2.5-0.5B-Instruct --config gsm8k.py --limit=200
    python evaluate.py --config gsm8k.py --run=out/calc --data=gsm8k_test.jsonl --limit=50
    python evaluate.py --run=out/calc_lora --engine=server --urls=http://127.0.0.1:8000
    python evaluate.py --run=out/calc --endpoint=http://127.0.0.1:8000/v1 --model=gpt  # a baseline

Three layers, each over the one before: the run's config.py, --config, --key=value. With --run the
model is the run's, whatever the other config says; --model on the command line wins over all. By
default it is greedy (temperature 0) with one sample a problem, on the rows that the config holds
out (eval_data), else on the "test" split where the data has splits. Samples that the outcome reward
did not grade (None) are in no mean; not_graded says how many they are.
"""

import contextlib
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from run import config, mix

if __name__ == "__main__":
    # the keys of train_grpo.py that shape a rollout can be given here too
    config.answer_help(__file__, "train_grpo.py", keys=config.ROLLOUT_KEYS)

import data
import rewards as reward_functions
import train_grpo
from chat import images_as_user
from engines.base import Sampling
from engines.chat_api import Endpoint, sendable_call
from formats import Call, too_deep
from player import Player, prepare_task
from rollout import Settings, run_calls, seed_of, stop_before_calls
from run import log as run_log
from run.config import UserError
from run.http import key_from
from trajectory import Trajectory, escaped, mean, stats


@dataclass
class Config:
    run: str = ""  # the out_dir of a training run: its model and its config
    n: int = 1  # samples per problem; more than 1 needs a temperature above 0
    k: tuple[int, ...] = (1,)  # pass@k and maj@k for each of these, n at most
    pass_at: float = 1.0  # the outcome reward from which a sample counts as right in pass@k
    limit: int | None = None  # the first so many problems
    split: str = "test"  # of a task or a hub data set; a file has no splits
    temperature: float = 0.0  # 0 = greedy
    seed: int = 1_000_000  # of sampling (another stream than training's) and of a task's problems
    batch: int = 256  # problems that are played at once
    endpoint: str = ""  # an OpenAI-compatible API, http(s)://host/v1, whose --model is evaluated
    key_env: str = "OPENAI_API_KEY"  # the environment variable that holds its key
    save_to: str = ""  # folder of eval.json and rollouts.jsonl; "" = eval/ in the run, or out/eval


def check(cfg: Config) -> None:
    """Checks the rules across keys."""
    if cfg.n < 1 or cfg.batch < 1:
        raise UserError(f"n = {cfg.n}, batch = {cfg.batch}: expected at least 1")
    if cfg.temperature < 0:
        raise UserError(f"temperature = {cfg.temperature}: expected 0 or more")
    if cfg.limit is not None and cfg.limit < 1:
        raise UserError(f"limit = {cfg.limit}: expected at least 1, or none for all")
    if cfg.n > 1 and cfg.temperature == 0:
        raise UserError(f"n = {cfg.n} samples at temperature 0 are all alike: use --temperature=1")
    if not math.isfinite(cfg.pass_at):
        raise UserError(f"pass_at = {cfg.pass_at}: expected a number, such as 1 or 0.5")
    if not cfg.endpoint and cfg.key_env != Config.key_env:
        raise UserError("key_env has no effect without --endpoint: drop it")
    if not cfg.k or min(cfg.k) < 1 or max(cfg.k) > cfg.n:
        raise UserError(f"k = {cfg.k}: expected numbers from 1 to n = {cfg.n}")


# ---- what is measured


def pass_at_k(n: int, right: int, k: int) -> float:
    """Estimates the probability that at least one of k samples, drawn from the n without putting
    back, is right: 1 - C(n - right, k) / C(n, k), unbiased (Chen et al. 2021, arXiv:2107.03374).
    ValueError if k > n."""
    if k > n:
        raise ValueError(f"pass@{k} needs at least {k} samples, got {n}")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def interval(values: list[float]) -> tuple[float, float]:
    """Gives the 95 % interval of the mean of one value per problem: Wilson's where all are 0 or 1,
    which stays inside [0, 1] and is right for small n too, else the normal one."""
    n = len(values)
    average = sum(values) / n
    z = 1.96  # standard deviations on each side that hold 95 %
    if all(value in (0, 1) for value in values):
        shrink = 1 + z * z / n
        centre = (average + z * z / (2 * n)) / shrink
        half = z / shrink * math.sqrt(average * (1 - average) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)
    variance = sum((value - average) ** 2 for value in values) / max(1, n - 1)
    half = z * math.sqrt(variance / n)
    if 0 <= min(values) and max(values) <= 1:
        return max(0.0, average - half), min(1.0, average + half)
    return average - half, average + half


def majority(answers: list[str | None], scores: list[float]) -> float:
    """Finds the score of the answer given most often, the earlier one in a tie; None has no
    vote."""
    votes: list[list] = []  # [answer, its score, how many gave it or one that equals it]
    for answer, score in zip(answers, scores, strict=True):
        if answer is None:
            continue
        same = [vote for vote in votes if reward_functions.equal(answer, vote[0])]
        if same:
            same[0][2] += 1
        else:
            votes.append([answer, score, 1])
    if not votes:
        return 0.0
    return max(votes, key=lambda vote: vote[2])[1]


def summarize(
    trajectories: list[Trajectory], outcome: str, ks: tuple[int, ...], pass_at: float = 1.0
) -> dict:
    """Makes all numbers of an evaluation. outcome: the reward that says right or wrong. pass_at:
    from which value of it a sample is right in pass@k.

    What that reward did not grade is in no mean: a problem has its graded samples, and one without
    any is left out. A mean of nothing is None.
    """
    # 1. the graded samples of each problem
    by_problem: dict[int, list[Trajectory]] = {}
    for trajectory in trajectories:
        by_problem.setdefault(trajectory.group, []).append(trajectory)
    n = len(next(iter(by_problem.values())))
    graded = {}
    for problem, samples in by_problem.items():
        graded[problem] = [t.outcome for t in samples if t.outcome is not None]
    not_graded = len(trajectories) - sum(len(values) for values in graded.values())

    # 2. the average, one value for each problem
    means = [mean(values) for values in graded.values() if values]
    low, high = interval(means) if means else (None, None)
    numbers = {
        "problems": len(by_problem),
        "samples": n,
        "outcome": outcome,
        "not_graded": not_graded,
        f"avg@{n}": mean_or_none(means),
        "ci95_low": low,
        "ci95_high": high,
        "pass_at": pass_at,
    }

    # 3. the best and the most frequent of k
    for k in ks:
        passed = []
        for values in graded.values():
            right = sum(value >= pass_at for value in values)
            if values:  # fewer than k, where some were not graded: all of them
                passed.append(pass_at_k(len(values), right, min(k, len(values))))
        numbers[f"pass@{k}"] = mean_or_none(passed)
        if k > 1:
            votes = [vote_of(samples[:k]) for samples in by_problem.values()]
            numbers[f"maj@{k}"] = mean_or_none([vote for vote in votes if vote is not None])

    # 4. what training logs too
    of_training = ("rollouts", "equal_groups", "tool_seconds")
    metrics = stats(trajectories)
    for name in dict.fromkeys(name for t in trajectories for name in t.rewards):
        if all(t.rewards.get(name) is None for t in trajectories):
            metrics[f"reward_{name}"] = None
    if metrics.get("reward_none") == len(trajectories):
        metrics["reward"] = None
    if "accuracy" in metrics:  # one number, also where problems have unlike many graded samples
        metrics["accuracy"] = numbers[f"avg@{n}"]
    if not any(trajectory.ids for trajectory in trajectories):
        metrics.pop("tokens")  # behind an API nobody here sees them
    return numbers | {name: metrics[name] for name in metrics if name not in of_training}


def vote_of(samples: list[Trajectory]) -> float | None:
    """Finds the score of the answer that most of the graded samples of a problem give; None if
    none of them is graded."""
    graded = [t for t in samples if t.outcome is not None]
    if not graded:
        return None
    answers = [reward_functions.answer(t, t.example) for t in graded]
    return majority(answers, [t.outcome for t in graded])


def mean_or_none(values: list[float]) -> float | None:
    """Averages; None for nothing, which is not 0."""
    return mean(values) if values else None


# ---- which model plays which problems


def load_config(argv: list[str], given: Config) -> train_grpo.Config:
    """Reads the training config that describes the rollouts: the run's, --config, then
    --key=value. given: the keys of this script."""
    # 1. the run's own config is the base of the others
    run_config = []
    if given.run:
        file = Path(given.run) / "config.py"
        if not file.is_file():
            raise UserError(f"run = {given.run!r}: no config.py in it: give the out_dir of a run")
        run_config = ["--config", str(file)]
    try:
        base = config.parse(train_grpo.Config, run_config)
    except UserError as error:
        advice = f"for another's model use --model={given.run} --config …"
        raise UserError(
            f"run = {given.run!r} is no run of train_grpo.py ({error}); {advice}"
        ) from None
    cfg = config.parse(train_grpo.Config, argv, keys=config.ROLLOUT_KEYS, base=base)
    typed = {item[2:].partition("=")[0] for item in argv}
    if "data" not in typed:
        cfg = replace(cfg, data=rows_to_play(cfg, base))

    # 2. what would have no effect here is refused, or left out where only the run gives it
    if given.endpoint and "model" not in typed:
        raise UserError("model is missing: --endpoint needs --model=<its name there>")
    of_our_engines = {"format", "template_options", "chat_template", "dtype", "engine", "urls"}
    of_our_engines |= {"engine_options", "gpu_memory_utilization", "min_pixels", "max_pixels"}
    useless = sorted(typed & of_our_engines)
    if given.endpoint and useless:
        raise UserError(f"{useless[0]} has no effect with --endpoint: drop it")
    if given.split != Config.split and data.is_file(cfg.data):
        raise UserError(f"split has no effect on {cfg.data!r}: a file has no splits, so drop it")
    cfg = without_idle_keys(cfg, base, typed)

    # 3. the model and the sampling of this evaluation
    model = given.run if given.run and "model" not in typed else cfg.model
    cfg = for_evaluation(cfg, given, model)
    train_grpo.check(cfg)
    return cfg


def rows_to_play(cfg: train_grpo.Config, base: train_grpo.Config) -> str:
    """Chooses the data of an evaluation: what cfg holds out, else what it trains on. The run's
    held-out rows (base) do not stand for those of another config's data."""
    is_of_other_data = cfg.data != base.data and cfg.eval_data == base.eval_data
    if not cfg.eval_data or is_of_other_data:
        return cfg.data
    return cfg.eval_data


def training_of(model: str) -> train_grpo.Config | None:
    """Reads the config by which train_grpo.py made a model; None if it did not, or not here."""
    file = Path(model) / "config.py"
    if not file.is_file():
        return None
    try:
        return config.parse(train_grpo.Config, ["--config", str(file)])
    except UserError:  # train_sft.py's, or of another version
        return None


def origin_of_rows(cfg: train_grpo.Config) -> str:
    """Says what the rows of an evaluation were to the run that made its model; "" if that is not
    known, or if it has nothing to do with them."""
    trained = training_of(cfg.model)
    if trained is None or cfg.mix or trained.mix:
        return ""
    if data.is_file(cfg.data):
        place = Path(cfg.data).expanduser().resolve()
        if place == Path(trained.data).expanduser().resolve():
            return "those it was trained on"
    elif (cfg.data, cfg.split) == (trained.data, trained.split):
        if not data.is_made_up(cfg.data) or cfg.seed == trained.seed:
            return "those it was trained on"
    return "held out by its run" if cfg.data == trained.eval_data else ""


def without_idle_keys(
    cfg: train_grpo.Config, base: train_grpo.Config, typed: set[str]
) -> train_grpo.Config:
    """Resets the run's keys that have no effect beside those typed here: what its engine was told
    where another is asked for, what tools were told where there are none."""
    idle = ["warmup"]
    if cfg.engine != base.engine:
        idle += ["engine_options", "gpu_memory_utilization", "urls"]
    if not cfg.tools:
        idle += ["tool_timeout", "tool_concurrency"]
    plain = train_grpo.Config()
    reset = {name: getattr(plain, name) for name in idle if name not in typed}
    return replace(cfg, **reset)


def for_evaluation(cfg: train_grpo.Config, given: Config, model: str) -> train_grpo.Config:
    """Makes of a training config one for evaluating `model`: its problems and its sampling are
    those `given`."""
    is_file = data.is_file(cfg.data)
    # a run saved its template with its model, and the file may be gone
    is_saved = bool(given.run) and model == given.run
    return replace(
        cfg,
        model=model,
        chat_template="" if is_saved else cfg.chat_template,
        split=train_grpo.Config.split if is_file else given.split,
        limit=given.limit,
        temperature=given.temperature,
        seed=given.seed,
    )


def open_player(cfg: train_grpo.Config, given: Config) -> Player:
    """Makes what plays: the config's model by its engine, or a model behind an API."""
    if not given.endpoint:
        return Player.of(cfg, limit=given.limit)
    if cfg.mix:
        raise UserError(
            "endpoint has no effect on a mix: evaluate one source after the other, such as "
            f"--config {cfg.mix[0].partition('.py:')[0].removesuffix('.py')}.py"
        )
    toolbox, rewards, examples = prepare_task(cfg, given.limit)
    key = key_from(given.key_env)
    api = Endpoint(given.endpoint, cfg.model, toolbox.schemas, key)
    settings = Settings.of(cfg)
    return Player(api, api, toolbox, rewards, settings, play_api_turn, examples=examples)


async def play_api_turn(
    trajectory: Trajectory,
    chat,
    endpoint: Endpoint,
    session,
    toolbox,
    settings: Settings,
    step: int,
) -> None:
    """Plays one message of a model behind an API and runs its calls; sets trajectory.stop if it was
    the last. There are no token ids: tokens are counted as the API says."""
    # 1. ask for the next message; without tools where the turn is for the answer alone
    turn = len(trajectory.turn_starts)
    where = (settings.seed, step, trajectory.group, trajectory.sample, turn)
    sampling = Sampling(settings.temperature, settings.max_new_tokens, seed_of(*where))
    is_final = settings.final_turn and turn == settings.max_turns
    # where APIs show images: in a user's message behind the results
    messages = images_as_user(trajectory.messages)
    reply = await endpoint.ask(messages, sampling, not is_final, trajectory.images)
    if isinstance(reply, str):  # why there is none
        trajectory.stop = reply
        return
    trajectory.turn_starts.append(0)  # of ids that nobody here sees
    trajectory.unseen_tokens += reply.new_tokens

    # 2. which calls did it make, and are they to be run?
    calls = [read_api_call(tool_call["function"]) for tool_call in reply.tool_calls]
    message = {"role": "assistant", "content": reply.text} | reply.thoughts
    if calls:
        message["tool_calls"] = [
            sendable_call(tool_call, is_readable=call.arguments is not None)
            for tool_call, call in zip(reply.tool_calls, calls, strict=True)
        ]
    trajectory.messages.append(message)
    trajectory.stop = stop_before_calls(trajectory, calls, reply.was_cut, toolbox, settings)
    is_full = reply.all_tokens >= settings.max_tokens
    if trajectory.stop == "answered" and is_full and toolbox.has_user:
        trajectory.stop = "length"  # no room for the user of an environment
    if trajectory.stop:
        return

    # 3. run them, and tell their results
    results, pictures = await run_calls(trajectory, calls, session, toolbox, settings, endpoint)
    if trajectory.stop:
        return
    trajectory.add([], mask=0, images=pictures)
    for tool_call, (_, result) in zip(message["tool_calls"], results, strict=True):
        told = {"role": "tool", "tool_call_id": tool_call["id"]}
        told["name"] = tool_call["function"]["name"]
        trajectory.messages.append(told | {"content": result})
    if is_full:
        trajectory.stop = "length"


def read_api_call(function: dict) -> Call:
    """Reads the function of a Reply's tool call; what is wrong with it is for the model to be told,
    not for the user."""
    name = function["name"]
    text = function["arguments"]
    if not name:
        return Call("", None, "bad_json", "malformed call: it names no function", text)
    try:
        arguments = json.loads(text, parse_constant=refuse_constant)
        if not isinstance(arguments, dict):
            raise ValueError(f"an object is expected, not {text[:40]}")
        if too_deep(arguments):
            raise ValueError("it is too deep")
    except (ValueError, RecursionError) as error:
        message = f"malformed call of {name}: its arguments are not JSON ({error})"
        return Call(name, None, "bad_json", message, text)
    return Call(name, arguments, raw=text)


def refuse_constant(name: str) -> None:
    """ValueError for NaN and Infinity, which only python takes for JSON."""
    raise ValueError(f"{name} is no number of JSON")


# ---- the evaluation


def evaluate(cfg: train_grpo.Config, given: Config) -> dict:
    """Plays the problems of cfg, writes eval.json and rollouts.jsonl, returns the numbers. If the
    disk did not take the files, "not_saved" in them is the sentence that says so."""
    folder = None
    if given.save_to:  # before the model is loaded: it may hold something
        folder = config.fresh_dir(given.save_to, key="save_to")
    with open_player(cfg, given) as player:
        if folder is None:
            beside = Path(given.run) / "eval" if given.run else Path("out/eval")
            folder = config.next_folder(beside)
        trajectories, problem = play_all(player, given.n, given.batch, folder)
    numbers = {
        "model": cfg.model,
        "data": ", ".join(cfg.mix) or cfg.data,
        "split": cfg.split,
        "seed": given.seed,
        "temperature": given.temperature,
    }
    origin = origin_of_rows(cfg)
    if origin:
        numbers["rows"] = origin
    numbers |= summarize(trajectories, player.outcome, given.k, given.pass_at)
    if cfg.mix:
        numbers["sources"] = {}
        for name, of_source in player.players.items():
            played = [t for t in trajectories if t.example[mix.KEY] == name]
            summary = summarize(played, of_source.outcome, given.k, given.pass_at)
            numbers["sources"][name] = summary
    if given.endpoint:
        numbers |= player.engine.report()
    try:
        save_whole(folder / "eval.json", json.dumps(numbers, indent=2) + "\n")
    except OSError as error:
        problem = f"eval.json could not be written to {folder} ({error.strerror or error})"
    numbers["saved"] = str(folder)
    if problem:
        numbers["not_saved"] = (
            f"{problem}: the numbers are whole as printed; make room, or give another folder with "
            "--save_to=…, and evaluate again for the files"
        )
    return numbers


def play_all(
    player: Player, samples: int, batch: int, folder: Path
) -> tuple[list[Trajectory], str]:
    """Plays all examples, `batch` at a time, and writes rollouts.jsonl as they are done. Returns
    (trajectories, what is wrong with that file). A full disk ends nothing: what it did not take is
    tried again with the next batch. What was played before an error is written too."""
    trajectories = []
    unsaved = []
    problem = ""
    file = folder / "rollouts.jsonl"
    tokenizer = player.chat.tokenizer
    total = len(player.examples) * samples
    with run_log.progress() as bars:
        count = run_log.counter(bars, bars.add_task("rollouts", total=total, note=""))

        def on_done(trajectory: Trajectory) -> None:
            done.append(trajectory)
            count(trajectory)

        for start in range(0, len(player.examples), batch):
            done: list[Trajectory] = []  # of this batch, whoever ended first
            part = player.examples[start : start + batch]
            try:
                played = player.play(part, samples, first_group=start, on_done=on_done)
            except BaseException:
                append_rollouts(file, unsaved + done, tokenizer)
                raise
            trajectories += played
            unsaved += played
            problem = append_rollouts(file, unsaved, tokenizer)
            if not problem:
                unsaved = []
    if unsaved:
        problem = f"{len(unsaved)} of {total} rollouts could not be written to {folder} ({problem})"
    return trajectories, problem


def append_rollouts(file: Path, trajectories: list[Trajectory], tokenizer) -> str:
    """Appends all of the trajectories or none. Returns why it was none, or ""."""
    size = file.stat().st_size if file.exists() else 0
    try:
        run_log.write_rollouts(file, trajectories, tokenizer)
    except OSError as error:
        with contextlib.suppress(OSError):  # no file at all
            os.truncate(file, size)
        return error.strerror or str(error)
    return ""


def save_whole(file: Path, text: str) -> None:
    """Writes a file so that it is whole or not there. OSError if the disk does not take it."""
    aside = file.with_name(file.name + ".new")
    try:
        with open(aside, "w", encoding="utf-8") as written:
            written.write(text)
            written.flush()
            os.fsync(written.fileno())  # some disks say only now that they are full
        aside.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def repeats_of_average(numbers: dict) -> set[str]:
    """Finds what is avg@n under another name, where it is: the table has it once, eval.json all."""
    if "samples" not in numbers:
        return set()
    average = numbers[f"avg@{numbers['samples']}"]
    names = {"accuracy", "reward", "pass@1", f"reward_{numbers['outcome']}"}
    return {name for name in names if name in numbers and numbers[name] == average}


def cell(value):
    """Makes the text of a number, without markup: a model's name may look like it."""
    from rich.text import Text

    if value is None:
        return Text("nothing graded")
    if isinstance(value, float):
        return Text(f"{value:.4f}")
    return Text(escaped(str(value)))


def table(numbers: dict) -> None:
    """Prints the numbers as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = Text(escaped(f"{numbers['model']} on {numbers['data']}"))
    out = Table(title=title, title_justify="left")
    out.add_column("metric")
    sources = numbers.get("sources", {})
    for name in ("all" if sources else "value", *sources):
        out.add_column(name, justify="right")
    repeated = repeats_of_average(numbers)
    for key, value in numbers.items():
        if key in ("pass_at", "not_saved", "sources") or key in repeated:
            continue
        name = f"{key} (reward >= {numbers['pass_at']:g})" if key.startswith("pass@") else key
        cells = [cell(value)]
        cells += [
            cell(of_source[key]) if key in of_source else "" for of_source in sources.values()
        ]
        out.add_row(name, *cells)
    Console(highlight=False).print(out)


def main(argv: list[str]) -> None:
    mine, others = config.split(argv, Config.__dataclass_fields__)
    given = config.parse(Config, mine, check)
    numbers = evaluate(load_config(others, given), given)
    table(numbers)
    if "not_saved" in numbers:
        raise UserError(numbers["not_saved"])


if __name__ == "__main__":
    config.main(main)

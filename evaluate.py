"""Evaluation with tools: avg@k, pass@k, maj@k, tool calls, errors and stop reasons, with intervals.

    python evaluate.py --run=out/calc                                   # a run, by its own config
    python evaluate.py --run=out/calc --n=8 --k=1,4,8 --temperature=1
    python evaluate.py --run=out/calc --resume=true                     # what a kill left to play
    python evaluate.py --model=Qwen/Qwen2.5-0.5B-Instruct --config gsm8k.py --limit=200
    python evaluate.py --config gsm8k.py --run=out/calc --data=gsm8k_test.jsonl --limit=50
    python evaluate.py --run=out/calc_lora --engine=server --urls=http://127.0.0.1:8000
    python evaluate.py --run=out/calc --endpoint=http://127.0.0.1:8000/v1 --model=gpt  # a baseline
    python evaluate.py --config suites/tiny.py                          # several models x data sets

Three layers, each over the one before: the run's config.py, --config, --key=value. With --run the
model is the run's, whatever the other config says; --model on the command line wins over all. By
default it is greedy (temperature 0) with one sample a problem, on the rows that the config holds
out (eval_data), else on the "test" split where the data has splits. Samples that the outcome reward
did not grade (None) are in no mean; not_graded says how many they are.
"""

import json
import math
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
from grading.comparing import repeats_of_average
from grading.statistics import interval, majority, pass_at_k
from player import Mixture, Player, load_examples, prepare_task
from rollout import Settings, run_calls, seed_of, stop_before_calls
from run import evaluation
from run import log as run_log
from run.config import UserError
from run.evaluation import Record, fault_of
from run.http import key_from
from trajectory import Trajectory, escaped, mean, stats

MOST_CATEGORIES = 100


@dataclass
class Config:
    run: str = ""  # the out_dir of a training run: its model and its config
    resume: bool = False  # go on with an evaluation of these settings; without one, begin
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
    category_column: str = ""  # of the rows, such as level: the average by its values too


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
    of_machine = "seconds_p"  # of calls: no two evaluations have the same
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
    for name, value in metrics.items():
        if name not in of_training and not name.startswith(of_machine):
            numbers[name] = value
    return numbers


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
    if given.endpoint:
        refuse_keys_of_engines(typed)
    if given.split != Config.split and data.is_file(cfg.data):
        raise UserError(f"split has no effect on {cfg.data!r}: a file has no splits, so drop it")
    cfg = without_idle_keys(cfg, base, typed)

    # 3. the model and the sampling of this evaluation
    model = given.run if given.run and "model" not in typed else cfg.model
    cfg = for_evaluation(cfg, given, model)
    train_grpo.check(cfg)
    return cfg


def refuse_keys_of_engines(typed: set[str]) -> None:
    """Raises UserError for a key of our engines that was typed for a model behind an API."""
    of_our_engines = {"format", "template_options", "chat_template", "dtype", "engine", "urls"}
    of_our_engines |= {"engine_options", "gpu_memory_utilization", "min_pixels", "max_pixels"}
    useless = sorted(typed & of_our_engines)
    if useless:
        raise UserError(f"{useless[0]} has no effect with --endpoint: drop it")


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
    chat: Endpoint,
    endpoint: Endpoint,
    session,
    toolbox,
    settings: Settings,
    step: int,
) -> None:
    """Plays one message of a model behind an API and runs its calls; sets trajectory.stop if it was
    the last. There are no token ids: tokens are counted as the API says. chat: the endpoint, told
    of the tools that this row has."""
    # 1. ask for the next message; without tools where the turn is for the answer alone
    turn = len(trajectory.turn_starts)
    where = (settings.seed, step, trajectory.group, trajectory.sample, turn)
    sampling = Sampling(settings.temperature, settings.max_new_tokens, seed_of(*where))
    is_final = settings.final_turn and turn == settings.max_turns
    # where APIs show images: in a user's message behind the results
    messages = images_as_user(trajectory.messages)
    reply = await chat.ask(messages, sampling, not is_final, trajectory.images)
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
    trajectory.stop = stop_before_calls(trajectory, calls, reply.was_cut, session, settings)
    is_full = reply.all_tokens >= settings.max_tokens
    if trajectory.stop == "answered" and is_full and toolbox.has_user:
        trajectory.stop = "length"  # no room for the user of an environment
    if trajectory.stop:
        return

    # 3. run them, and tell their results
    results, pictures = await run_calls(trajectory, calls, session, toolbox, settings, chat)
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
    """Refuses, with ValueError, NaN and Infinity, which only python takes for JSON."""
    raise ValueError(f"{name} is no number of JSON")


# ---- the evaluation


def evaluate(cfg: train_grpo.Config, given: Config) -> dict:
    """Plays the problems of cfg, writes eval.json and rollouts.jsonl, returns the numbers. If the
    disk did not take the files, "not_saved" in them is the sentence that says so."""
    # 1. what was played before; if that is all, no model is needed
    record = find_record(cfg, given)
    if record and not missing_of(record, given):
        return finish(cfg, given, record, record.there)

    # 2. the rest
    with open_player(cfg, given) as player:
        return evaluate_with(player, cfg, given, record)


def evaluate_with(
    player: Player, cfg: train_grpo.Config, given: Config, record: Record | None
) -> dict:
    """Plays what a player that has been entered is still to play. record: of `find_record`."""
    if given.category_column:
        check_category(given.category_column, player.examples)
    if record is None:
        folder = Path(given.save_to)
        if not given.save_to:
            folder = config.next_folder(default_folder(given))
        record = Record(folder, begun_of(cfg, given, player.examples, outcomes_of(player)))
    trajectories = play_all(player, record, given.n, given.batch)
    return finish(cfg, given, record, trajectories, player)


def finish(
    cfg: train_grpo.Config,
    given: Config,
    record: Record,
    trajectories: list[Trajectory],
    player: Player | None = None,
) -> dict:
    """Makes the numbers of all trajectories and writes them. player: None if none was needed."""
    numbers = numbers_of(cfg, given, record.begun["outcomes"], trajectories)
    if given.endpoint:
        numbers |= player.engine.report() if player else {}
        not_sent = record.not_sent()  # also before a kill
        if not_sent:
            numbers["not_sent"] = ", ".join(sorted(not_sent))
    record.put_in_order(trajectories)
    problem = record.save_numbers(numbers)
    record.close()
    if record.unsaved:
        lost = f"{len(record.unsaved)} of {len(trajectories)} rollouts"
        problem = f"{lost} could not be written to {record.folder} ({record.problem})"
    numbers["saved"] = str(record.folder)
    if problem:
        remedy = "make room and go on with --resume=true for the files"
        if not record.can_go_on:
            remedy = "make room, or give another folder with --save_to=…, and evaluate again"
        numbers["not_saved"] = f"{problem}: the numbers are whole as printed; {remedy}"
    return numbers


def numbers_of(
    cfg: train_grpo.Config, given: Config, outcomes: dict, trajectories: list[Trajectory]
) -> dict:
    """Makes what eval.json holds. outcomes: the reward that says right or wrong, of each source of
    a mix, and of all ("")."""
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
    numbers |= summarize(trajectories, outcomes[""], given.k, given.pass_at)
    faults = sum(bool(fault_of(trajectory)) for trajectory in trajectories)
    if faults:
        numbers["faults"] = faults
    if cfg.mix:
        numbers["sources"] = {}
        for source in mix.sources(cfg):
            played = [t for t in trajectories if t.example[mix.KEY] == source.name]
            summary = summarize(played, outcomes[source.name], given.k, given.pass_at)
            numbers["sources"][source.name] = summary
    if given.category_column:
        numbers["category_column"] = given.category_column
        numbers["categories"] = summarize_categories(trajectories, given.category_column)
    return numbers


def summarize_categories(trajectories: list[Trajectory], column: str) -> dict[str, dict]:
    """Averages the outcome by the values of a column of the rows."""
    by_value: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        by_value.setdefault(str(trajectory.example[column]), []).append(trajectory)
    categories = {}
    for value, played in sorted(by_value.items()):
        summary = summarize(played, "", ())
        average = summary[f"avg@{summary['samples']}"]
        categories[value] = {"problems": summary["problems"], "average": average}
        for name in ("ci95_low", "ci95_high", "not_graded"):
            categories[value][name] = summary[name]
    return categories


def check_category(column: str, examples: list[dict]) -> None:
    """Checks that every row has the column, and that it says of what kind a row is."""
    for example in examples:
        if example.get(column) is None:
            columns = ", ".join(name for name in example if name not in ("id", "messages"))
            raise UserError(
                f"category_column = {column!r}: row {example['id'] + 1} has none, it has {columns}"
            )
    values = {str(example[column]) for example in examples}
    if len(values) > MOST_CATEGORIES:
        raise UserError(
            f"category_column = {column!r} has {len(values)} values in {len(examples)} rows: "
            f"expected at most {MOST_CATEGORIES} kinds of rows"
        )


# ---- what was begun before


def default_folder(given: Config) -> Path:
    """Says where an evaluation is written that is not told where."""
    return Path(given.run) / "eval" if given.run else Path("out/eval")


def find_record(
    cfg: train_grpo.Config, given: Config, remedy: str = "begin another with --save_to=…"
) -> Record | None:
    """Finds the evaluation that goes on, with what is there of it; None if this one begins. Checks,
    before a model is loaded, that the folder is free, or holds an evaluation of these settings.
    remedy: where it does not."""
    # 1. it begins
    if not given.resume:
        if given.save_to:
            config.fresh_dir(given.save_to, "go on with --resume=true", key="save_to")
        return None

    # 2. which folders may hold it, the newest first
    if given.save_to:
        folder = Path(given.save_to)
        if not folder.is_dir() or evaluation.holds_only_a_start(folder):
            for left in folder.glob("*"):
                left.unlink()
            config.fresh_dir(folder, key="save_to")
            return None
        folders = [folder]
    else:
        folders = config.numbered_folders(default_folder(given))[::-1]
    begun = [(folder, evaluation.begun_in(folder)) for folder in folders]
    begun = [(folder, old) for folder, old in begun if old]
    if not begun and given.save_to:
        raise UserError(
            f"save_to '{folder}' holds no evaluation to go on with (no "
            f"{evaluation.SETTINGS} that can be read): {remedy}"
        )

    # 3. the newest that has these settings
    if not begun:
        return None
    examples = examples_of(cfg, given.limit)
    if given.category_column:
        check_category(given.category_column, examples)
    wanted = evaluation.plain(begun_of(cfg, given, examples, {}))
    for folder, old in begun:
        if not evaluation.difference(old, wanted):
            record = Record.open(folder)
            record.there = record.read(examples, given.n)
            count = len(examples) * given.n
            config.tell(f"{folder}: {len(record.there)} of {count} trajectories are there")
            return record
    folder, old = begun[0]
    raise UserError(
        f"{folder} cannot go on: {evaluation.difference(old, wanted)}; give that, or {remedy}"
    )


def missing_of(record: Record, given: Config) -> list[int]:
    """Lists the problems of which a sample is still to be played."""
    places = {(trajectory.group, trajectory.sample) for trajectory in record.there}
    return evaluation.missing(places, record.begun["problems"], given.n)


def begun_of(
    cfg: train_grpo.Config, given: Config, examples: list[dict], outcomes: dict[str, str]
) -> dict:
    """Makes what settings.json holds: all by which an evaluation is known when it goes on."""
    return {
        "settings": settings_of(cfg, given),
        "problems": len(examples),
        "rows": evaluation.digest_of_rows(examples),
        "weights": "" if given.endpoint else evaluation.digest_of_weights(cfg.model),
        "outcomes": outcomes,
    }


def settings_of(cfg: train_grpo.Config, given: Config) -> dict:
    """Lists the keys of an evaluation, those of the sources of a mix too."""
    settings = {name: getattr(given, name) for name in Config.__dataclass_fields__}
    settings |= {name: getattr(cfg, name) for name in config.ROLLOUT_KEYS}
    settings["tune"] = cfg.tune  # an adapter on a rounded base is loaded on that
    if cfg.mix:
        for source in mix.sources(cfg):
            for name in mix.OF_A_SOURCE:
                if name in config.ROLLOUT_KEYS:
                    settings[f"{source.name}: {name}"] = getattr(source.cfg, name)
    return settings


def outcomes_of(player: Player) -> dict[str, str]:
    """Names the reward that says right or wrong: of all (""), and of each source of a mix."""
    outcomes = {"": player.outcome}
    for name, of_source in sources_of(player).items():
        outcomes[name] = of_source.outcome
    return outcomes


def sources_of(player: Player) -> dict[str, Player]:
    """Finds the players of a mix by its sources; {} of a player that is none."""
    return player.players if isinstance(player, Mixture) else {}


def examples_of(cfg: train_grpo.Config, limit: int | None) -> list[dict]:
    """Reads the rows that a player of cfg has, without a model."""
    if not cfg.mix:
        return load_examples(cfg, cfg.data, cfg.split, limit or cfg.limit, cfg.seed)
    examples = []
    for source in mix.sources(cfg):
        with mix.told_by(source.name):
            for example in examples_of(source.cfg, limit):
                examples.append(example | {mix.KEY: source.name})
    return examples


def play_all(player: Player, record: Record, samples: int, batch: int) -> list[Trajectory]:
    """Plays what is missing, `batch` problems at a time, and writes each trajectory as it ends.
    Returns all, also those that were there. A full disk ends nothing: what it did not take is tried
    again with the next batch."""
    # 1. what is there; rewards that compare samples compare all of a group or none
    there = record.there
    players = sources_of(player).values() or [player]
    if any(reward_functions.see_groups(one.rewards) for one in players):
        there = evaluation.whole_groups(there, samples)
    places = {(trajectory.group, trajectory.sample) for trajectory in there}
    groups = evaluation.missing(places, len(player.examples), samples)
    total = len(player.examples) * samples
    trajectories = list(there)

    # 2. the rest
    tokenizer = player.chat.tokenizer
    with run_log.progress() as bars:
        bar = bars.add_task("rollouts", total=total, completed=len(there), note="")
        count = run_log.counter(bars, bar)

        def on_done(trajectory: Trajectory) -> None:
            columns = {}
            if isinstance(player.engine, Endpoint) and player.engine.api.not_taken:
                columns["not_sent"] = sorted(player.engine.api.not_taken)
            record.append(trajectory, tokenizer, **columns)
            count(trajectory)

        try:
            for start in range(0, len(groups), batch):
                part = groups[start : start + batch]
                first = part[0]
                examples = player.examples[first : part[-1] + 1]
                trajectories += player.play(
                    examples, samples, first_group=first, on_done=on_done, skip=places
                )
                record.flush(tokenizer)
        except BaseException:
            if record.can_go_on:
                config.tell(f"what was played is in {record.folder}: go on with --resume=true")
            record.close()
            raise
    return sorted(trajectories, key=lambda trajectory: (trajectory.group, trajectory.sample))


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
        if key in ("pass_at", "not_saved", "sources", "categories") or key in repeated:
            continue
        name = f"{key} (reward >= {numbers['pass_at']:g})" if key.startswith("pass@") else key
        cells = [cell(value)]
        cells += [
            cell(of_source[key]) if key in of_source else "" for of_source in sources.values()
        ]
        out.add_row(name, *cells)
    Console(highlight=False).print(out)


def is_suite(argv: list[str]) -> bool:
    """Says whether the config file of a command line is a suite: it names models."""
    file = ""
    for place, item in enumerate(argv):
        if item == "--config":
            file = " ".join(argv[place + 1 : place + 2])
        elif item.startswith("--config="):
            file = item.removeprefix("--config=")
    return "models" in config.names_in(file) if file else False


def main(argv: list[str]) -> None:
    if is_suite(argv):
        config.run_script("suite/play.py", argv)
        return
    mine, others = config.split(argv, Config.__dataclass_fields__)
    given = config.parse(Config, mine, check)
    numbers = evaluate(load_config(others, given), given)
    table(numbers)
    if "not_saved" in numbers:
        raise UserError(numbers["not_saved"])


if __name__ == "__main__":
    config.main(main)

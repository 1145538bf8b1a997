"""The calc task from sampling to update: train_grpo.py beside TRL's GRPOTrainer.

    python bench/against_trl.py                    # makes the warm start; 15 minutes on two cores
    python bench/against_trl.py --model=out/calc_sft --save_to=evidence/against_trl.json
    python bench/against_trl.py --model=out/calc_sft --steps=6 --seeds=0 --batches=192  # to try it

Equal: the model that training starts with (train_sft.py --config calc_sft.py), the prompts and
their order, chat template, tool schema, sandbox of the tool, reward function, 24 prompts x 8, at
most three turns of 32 tokens, temperature 1, loss (dapo, no KL), clip, AdamW and its rate, one
update a step, float32, threads. That prompts and tool results have the same ids on both sides is
checked before TRL starts. The random numbers are not the same, so neither are the samples.

Not equal, since it is what is measured. TRL samples with transformers' generate, a turn of all
trajectories after the other, runs the calls of one trajectory after those of another, and trains on
all rows in one shape. How many rows it takes at once in the update is tried out first (`batches`).
Ours is train_grpo.py --config calc.py as it is, with its log of metrics and rollouts; TRL's log is
off. Checkpoints are off on both sides. Ours knows the results of calls that were made before, as
the samples of a group often make the same; "all calls" is ours without that (python.cache=false).

Each run is a process of its own, ours and TRL's by turns. A step is timed from its end to that of
the next, so with tools, reward and update, and whatever else is done between; the first two are not
counted. Seconds to a mean reward of 0.9 over five steps count from the beginning of the first step,
without loading.
"""

import dataclasses
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from run import config, mix

if __name__ == "__main__":
    config.answer_help(__file__)

from trl_side import arguments, in_subprocess, save

import rewards
import train_grpo
import train_sft
from formats import Call
from player import Player
from run import log as run_log
from run import page as run_page
from run.config import UserError
from trajectory import Trajectory

WARM_UP = 2  # steps that are not counted
GOAL = 0.9  # mean reward over WINDOW steps
WINDOW = 5


@dataclass
class Config:
    model: str = ""  # the folder to start with; without one it is made, in two minutes
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 60
    batches: tuple[int, ...] = (192, 96, 48, 24)  # rows TRL updates at once: the fastest counts
    save_to: str = ""  # a .json for the results
    part: str = ""  # for the subprocesses: ours, all, or trl:192


SIDES = {"ours": "ours", "all": "all calls", "trl": "TRL"}  # and how they are called in the table


def check(cfg: Config) -> None:
    config.require_positive(cfg, "steps")
    if cfg.steps < WARM_UP + 2:
        raise UserError(f"steps = {cfg.steps}: expected at least {WARM_UP + 2}, for a median")


def settings(cfg: Config, out_dir: str) -> train_grpo.Config:
    """Returns those of both sides: configs/calc.py."""
    items = [
        "--config",
        "calc.py",
        "--save_every=0",
        f"--model={cfg.model}",
        f"--out_dir={out_dir}",
        f"--steps={cfg.steps}",
        f"--seed={cfg.seeds[0]}",
    ]
    return config.parse(train_grpo.Config, items, train_grpo.check)


# -- the two sides: each returns the times at which steps ended, the first being their beginning,
# -- and a row of metrics for each step


def ours(cfg: Config, folder: str) -> tuple[list[float], list[dict]]:
    times = []

    class Log(run_log.Log):
        def __enter__(self):
            times.append(time.perf_counter())
            return super().__enter__()

        def step(self, metrics):
            super().step(metrics)
            times.append(time.perf_counter())

    train_grpo.Log = Log
    run = settings(cfg, f"{folder}/run")
    if cfg.part == "all":
        run = dataclasses.replace(run, tool_options=("python.cache=false",))
    train_grpo.train(run)
    rows = run_page.read(f"{folder}/run/metrics.jsonl")
    return times, [{"reward": row["reward"], "tool_calls": row["tool_calls"]} for row in rows]


def trls(cfg: Config, folder: str, batch: int) -> tuple[list[float], list[dict]]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer
    from trl.chat_template_utils import qwen3_template

    from tools.python import python

    run = settings(cfg, folder)
    times = []
    rows = []
    player = Player.of(run, "full")
    model, chat, examples = player.model, player.chat, player.examples
    tokenizer = chat.tokenizer
    tokenizer.response_template = qwen3_template  # how calls are written; our template is like it
    count = run.prompts_per_step
    prompts = mix.next_rows(0, examples, cfg.steps * count, run.seed)
    room = run.max_tokens - max(len(chat.prompt(row["messages"])) for row in prompts)

    def correct(prompts, completions, completion_ids, example, **_):
        scores = []
        calls = 0
        for messages, ids, row in zip(completions, completion_ids, example, strict=True):
            ended = ids[-1] == tokenizer.eos_token_id and not messages[-1].get("tool_calls")
            trajectory = Trajectory(row, messages=row["messages"] + messages)
            trajectory.stop = "answered" if ended else "length"
            scores.append(rewards.correct(trajectory, row))
            calls += len([message for message in messages if message["role"] == "tool"])
        rows.append(
            {
                "reward": statistics.mean(scores),
                "tool_calls": calls / len(scores),
                "sample": tokenizer.decode(completion_ids[0]),
            }
        )
        return scores

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            times.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    data = Dataset.from_list([{"prompt": row["messages"], "example": row} for row in prompts])
    trainer = GRPOTrainer(
        model,
        correct,
        args=arguments(
            folder,
            cfg.steps,
            batch,
            count * run.group_size,
            run.learning_rate,
            seed=run.seed,
            max_completion_length=room,
            generation_kwargs={"max_new_tokens": run.max_new_tokens},  # of one turn
            max_tool_calling_iterations=run.max_turns - 1,  # after the last it answers
        ),
        train_dataset=data,
        processing_class=tokenizer,
        tools=[python],
        callbacks=[Clock()],
    )
    same_ids(trainer, chat, prompts[0]["messages"])
    trainer.train()
    return times, rows


def same_ids(trainer, chat, messages: list[dict]) -> None:
    """Checks that a prompt and a tool's result are the same tokens on both sides: else there is no
    comparison."""
    (prompt,), *_ = trainer._tokenize_prompts([messages])
    message = {"role": "tool", "name": "python", "content": "12"}
    result = chat.observation([(Call("python", {"code": "6 + 6"}), "12")], closed=True)
    if prompt != chat.prompt(messages) or trainer._get_tool_suffix_ids([message]) != result:
        raise UserError("TRL does not read this chat template as ours does")


# -- what is measured


def part(cfg: Config) -> dict:
    """Makes, in a subprocess, one run of one side."""
    side, _, batch = cfg.part.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        times, rows = trls(cfg, folder, int(batch)) if batch else ours(cfg, folder)
    seconds = [after - before for before, after in itertools.pairwise(times)]
    steps_to_goal = None
    seconds_to_goal = None
    last_reward = rows[-1]["reward"]  # the mean of the last steps, if there are so many
    for done in range(WINDOW, len(rows) + 1):
        last_reward = statistics.mean(row["reward"] for row in rows[done - WINDOW : done])
        if last_reward >= GOAL and steps_to_goal is None:
            steps_to_goal = done
            seconds_to_goal = times[done] - times[0]
    return {
        "seconds_per_step": statistics.median(seconds[WARM_UP:]),
        "steps_to_goal": steps_to_goal,
        "seconds_to_goal": seconds_to_goal,
        "last_reward": last_reward,
        "tool_calls": statistics.mean(row["tool_calls"] for row in rows[WARM_UP:]),
        "seconds": [round(value, 3) for value in seconds],
        "rewards": [round(row["reward"], 4) for row in rows],
        "sample": rows[-1].get("sample"),
    }


def measure(cfg: Config) -> dict:
    """Measures both sides; returns {a side: [a result for each seed], "tried": {rows at once:
    seconds per step of TRL}, "batch": the fastest of these}."""

    def run(part, seed, steps):
        items = [f"--model={cfg.model}", f"--part={part}", f"--seeds={seed}", f"--steps={steps}"]
        return in_subprocess(__file__, items)

    # 1. how many rows at once is TRL's best?
    batch = cfg.batches[0]
    tried = {}
    if len(cfg.batches) > 1:
        for rows in cfg.batches:
            result = run(f"trl:{rows}", cfg.seeds[0], min(cfg.steps, 8))
            tried[rows] = result["seconds_per_step"]
            print(f"TRL with {rows} rows at once: {tried[rows]:.2f} s a step")
        batch = min(tried, key=tried.get)

    # 2. the sides by turns
    results = {"tried": tried, "batch": batch}
    for side in SIDES:
        results[side] = []
    for seed in cfg.seeds:
        for side in SIDES:
            part = f"trl:{batch}" if side == "trl" else side
            results[side].append(run(part, seed, cfg.steps))
    return results


def table(results: dict, cfg: Config) -> None:
    """Prints a line for each run, then medians and ratios; adds the medians to the results."""
    keys = ("seconds_per_step", "seconds_to_goal", "steps_to_goal", "last_reward", "tool_calls")
    heads = ("s/step", f"s to {GOAL}", f"steps to {GOAL}", "last reward", "calls/rollout")
    print(f"\n{'':17}" + "".join(f"{head:>14}" for head in heads))
    medians = {}
    for name, label in SIDES.items():
        for seed, result in zip(cfg.seeds, results[name], strict=True):
            cells = [_cell(result[key]) for key in keys]
            print(f"{f'{label}, seed {seed}':17}" + "".join(cells))
        medians[name] = {}
        for key in keys:
            values = [result[key] for result in results[name] if result[key] is not None]
            medians[name][key] = statistics.median(values) if values else None
        cells = [_cell(medians[name][key]) for key in keys]
        print(f"{f'{label}, median':17}" + "".join(cells))
    for key, title in (("seconds_per_step", "seconds per step"), ("seconds_to_goal", "to 0.9")):
        for name in ("ours", "all"):
            our_seconds = medians[name][key]
            trl_seconds = medians["trl"][key]
            ratio = "not reached"
            if our_seconds and trl_seconds:
                ratio = f"{our_seconds / trl_seconds:.2f}"
            print(f"{title}: {SIDES[name]} / TRL = {ratio}")
    results["medians"] = medians
    print(f"\nTRL's first completion of its last step:\n{results['trl'][0]['sample']}")


def _cell(value) -> str:
    return f"{'-':>14}" if value is None else f"{value:14.2f}"


def main(cfg: Config) -> None:
    if cfg.part:
        print(json.dumps(part(cfg)))
        return
    sys.stdout.reconfigure(line_buffering=True)
    with tempfile.TemporaryDirectory() as folder:
        if not cfg.model:
            print("making the warm start: train_sft.py --config calc_sft.py")
            cfg.model = os.path.join(folder, "calc_sft")
            items = ["--config", "calc_sft.py", f"--out_dir={cfg.model}"]
            train_sft.train(config.parse(train_sft.Config, items, train_sft.check))
        results = measure(cfg)
    table(results, cfg)
    if cfg.save_to:
        save(cfg.save_to, {"bench": "against_trl", "config": dataclasses.asdict(cfg)} | results)


if __name__ == "__main__":
    config.main(lambda argv: main(config.parse(Config, argv, check)))

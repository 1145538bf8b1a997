"""The whole of it in a few minutes on a CPU: a tiny model from scratch learns to use tools.

    make demo                                   # or: python demo.py; it learns to call python
    python demo.py --seed=1 --out_dir=out/seed1
    python demo.py --task=facts                 # to search;  shop: SQL;  multi: which of the three
    python demo.py --task=chart                 # to zoom into a picture
    python demo.py --task=desk                  # to help a customer who has to be asked
    python demo.py --task=mix                   # three of them at once, each with its own tools

SFT on imperfect demonstrations (train_sft.py), evaluation, GRPO (train_grpo.py), evaluation again,
both on the same 512 held-out problems, greedy and sampled at temperature 1. The runs are
out/calc_sft and out/calc, as the configs of these names say. The last lines are `key: value`, for
people and for grep.
"""

import os
import time
from dataclasses import dataclass
from typing import Literal

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)
    config.say_at_once("loading torch, then data and model: some seconds until the first step")

import evaluate
import play
import train_grpo
import train_sft
from learning.checkpoint import holds_only_a_start
from run import log as run_log
from tools.sandbox import caller

EVAL_EVERY = 8  # steps between the held-out points in the curves
SAMPLED_AND_GREEDY = """\
The lines of a step, and the lines in curves.png, are of training rollouts, which are sampled:
they try things out. Below, and at the points in curves.png, the model answers greedily, on
problems that were held out; `sampled_accuracy` is of the same problems, answered as in training."""


@dataclass
class Config:
    task: Literal["calc", "facts", "shop", "multi", "chart", "desk", "mix"] = "calc"  # configs/
    out_dir: str = "out"  # where calc_sft/ and calc/ are made; they must not be there yet
    seed: int = 0  # of everything


def run(cfg: Config) -> dict:
    """Trains and evaluates; returns what it prints at the end."""
    started = time.monotonic()
    # this model, made here, can write nothing but sums: let it run where a container forbids layers
    os.environ.setdefault(caller.UNCONFINED, "true")
    sft_dir = f"{cfg.out_dir}/{cfg.task}_sft"
    grpo_dir = f"{cfg.out_dir}/{cfg.task}"
    seed = f"--seed={cfg.seed}"
    sft_argv = ["--config", f"{cfg.task}_sft.py", f"--out_dir={sft_dir}", seed]
    grpo_argv = ["--config", f"{cfg.task}.py", f"--out_dir={grpo_dir}", f"--model={sft_dir}", seed]
    grpo_argv.append(f"--eval_every={EVAL_EVERY}")
    sft_cfg = config.parse(train_sft.Config, sft_argv, train_sft.check)
    grpo_cfg = config.parse(train_grpo.Config, grpo_argv, train_grpo.check)
    for training in (sft_cfg, grpo_cfg):  # both, before the first minute is spent
        if not holds_only_a_start(training):
            config.fresh_dir(training.out_dir)

    print("\n1. SFT: the form of a tool call, from demonstrations that are often wrong\n")
    train_sft.train(sft_cfg)
    before = evaluate_at(0, grpo_cfg, sft_dir)
    sampled_before = evaluate_at(1, grpo_cfg, sft_dir)

    print("\n2. GRPO: from trying, with the tools in the loop\n")
    train_grpo.train(grpo_cfg)
    after = evaluate_at(0, grpo_cfg, grpo_dir)
    sampled_after = evaluate_at(1, grpo_cfg, grpo_dir)

    print("\n3. One rollout: green is trained, grey is context, yellow is what a tool said\n")
    shown = ["--config", f"{cfg.task}.py", f"--model={grpo_dir}"]
    play.main([*shown, "--split=test", "--temperature=0"])

    results = {"problems": after["problems"], "curves": f"{grpo_dir}/curves.png"}
    logged = [name for name in after if name.startswith("reward_right")]
    for name in ("accuracy", "tool_call_rate", *logged):
        results[f"{name}_before"] = before[name]
        results[f"{name}_after"] = after[name]
    for source, of_source in after.get("sources", {}).items():
        results[f"accuracy_{source}_before"] = before["sources"][source]["accuracy"]
        results[f"accuracy_{source}_after"] = of_source["accuracy"]
    results["sampled_accuracy_before"] = sampled_before["accuracy"]
    results["sampled_accuracy_after"] = sampled_after["accuracy"]
    print(f"\n{SAMPLED_AND_GREEDY}")
    results["minutes"] = (time.monotonic() - started) / 60
    return results


def evaluate_at(temperature: float, cfg: train_grpo.Config, model: str) -> dict:
    """Evaluates the model on all held-out problems. temperature: 0 is greedy, 1 as in training."""
    folder = f"{model}/eval_sampled" if temperature else f"{model}/eval"
    given = evaluate.Config(temperature=temperature, save_to=folder)
    return evaluate.evaluate(evaluate.for_evaluation(cfg, given, model), given)


def main(argv: list[str]) -> None:
    results = run(config.parse(Config, argv))
    print("---")
    run_log.print_summary(results)


if __name__ == "__main__":
    config.main(main)

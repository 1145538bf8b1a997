"""The cells of a suite: each model on each data set, with the settings of both.

A data set's config says the rows, prompts, tools, rewards and limits; the run of a model says what
belongs to the model; and what is typed in their entries wins over both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import data
import train_grpo
import train_sft
from evaluate import (
    Config,
    check,
    for_evaluation,
    refuse_keys_of_engines,
    training_of,
    without_idle_keys,
)
from run import config, mix
from run.config import UserError
from run.evaluation import Record
from suite import plan as plans

# What belongs to a model, as it is loaded once for all data sets: of a run its own, else what its
# entry says.
OF_LOADING = (
    "dtype tune lora_r lora_alpha lora_targets engine urls engine_options gpu_memory_utilization "
    "max_concurrent"
).split()
# What belongs to a run that it was trained with; of another model, what the data set's config says.
OF_PROMPTS = ("format", "template_options", "min_pixels", "max_pixels")


@dataclass
class Cell:
    """One model on one data set."""

    model: plans.Entry
    data: plans.Entry
    cfg: train_grpo.Config
    given: Config
    record: Record | None = None  # what was played before
    numbers: dict | None = None
    missing: str = "not played yet"  # why there are no numbers


def cells_of(plan: plans.Config) -> list[Cell]:
    """Reads all configs of a suite: model after model, each with all data sets."""
    cells = []
    for model in plans.entries(plan.models, "models"):
        for source in plans.chosen(plan):
            with mix.told_by(f"{model.name} on {source.name}"):
                cells.append(cell_of(plan, model, source))
    return cells


def cell_of(plan: plans.Config, model: plans.Entry, source: plans.Entry) -> Cell:
    """Makes a cell: the rows, prompts, tools, rewards and limits of the data set's config; what
    belongs to the model from its run; and over both what is typed in the entries."""
    # 1. the keys of this script
    names = Config.__dataclass_fields__
    of_model, model_options = config.split(model.options, names)
    of_source, source_options = config.split(source.options, names)
    typed_of_model = keys_of(of_model)
    of_source = [item for item in of_source if keys_of([item]) - typed_of_model]
    for_all = plans.options_for_all(plan, model.options, source.options)
    given = config.parse(Config, [*for_all, *of_source, *of_model], check)
    save_to = Path(plan.out_dir) / model.name / source.name
    given = replace(given, save_to=str(save_to), resume=plan.resume)
    if given.run or "--config" in model.options:
        raise UserError("models are named first of all, without --run and --config")

    # 2. the data set's config, and what of it belongs to the model
    misplaced = sorted(keys_of(source_options) & {*OF_LOADING, "model"})
    if misplaced:
        raise UserError(f"{misplaced[0]} belongs to a model: write it behind one")
    source_argv = ["--config", source.what, *source_options]
    cfg = config.parse(train_grpo.Config, source_argv, keys=config.ROLLOUT_KEYS)
    if cfg.mix:
        raise UserError(f"{source.what} is a mix: name its sources as data sets of their own")
    if "data" not in keys_of(source_options):
        cfg = replace(cfg, data=cfg.eval_data or cfg.data)
    trained = any_training_of(model.what)
    plain = train_grpo.Config()
    changes = {name: getattr(trained, name, getattr(plain, name)) for name in OF_LOADING}
    if trained:
        of_prompts = {name: getattr(trained, name, getattr(plain, name)) for name in OF_PROMPTS}
        changes |= of_prompts | {"chat_template": ""}  # which is saved with the model
    base = replace(cfg, **changes)

    # 3. what is typed for the model
    typed = keys_of(model_options)
    if given.endpoint:
        refuse_keys_of_engines(typed)
    cfg = config.parse(train_grpo.Config, model_options, keys=config.ROLLOUT_KEYS, base=base)
    if given.split != Config.split and data.is_file(cfg.data):
        raise UserError(f"split has no effect on {cfg.data!r}: a file has no splits, so drop it")
    cfg = without_idle_keys(cfg, base, typed)
    cfg = for_evaluation(cfg, given, model.what)
    train_grpo.check(cfg)
    return Cell(model, source, cfg, given)


def keys_of(options: Sequence[str]) -> set[str]:
    """Names the keys of `--key=value`s."""
    return {item.removeprefix("--").partition("=")[0] for item in options}


def any_training_of(model: str):
    """Reads the config by which train_grpo.py or train_sft.py made a model; None if neither did."""
    trained = training_of(model)
    file = Path(model) / "config.py"
    if trained or not file.is_file():
        return trained
    try:
        return config.parse(train_sft.Config, ["--config", str(file)])
    except UserError:
        return None

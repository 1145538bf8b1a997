"""Plays a suite: several models on several data sets in one call, each model loaded once.

python evaluate.py --config suites/tiny.py                # hands it over to this script
python evaluate.py --config suites/tiny.py --resume=true  # what is missing
"""

import contextlib
import gc
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from engines.chat_api import Endpoint
from evaluate import evaluate_with, find_record, finish, missing_of, open_player, settings_of
from grading import comparing
from learning import model as models
from player import Mixture, Player
from run import config, evaluation
from run.config import UserError
from run.http import HttpError
from suite import plan as plans
from suite.cells import Cell, cell_of, cells_of
from suite.show import evaluations_of, print_suite, save_suite
from trajectory import escaped


def main(argv: list[str]) -> None:
    """Plays a suite; with --dry_run=true it only plays a made-up rollout of each data set.
    UserError, when all is written, if cells are missing."""
    is_dry, argv = config.take_flag(argv, "dry_run")
    plan = config.parse(plans.Config, argv, plans.check)
    if is_dry:
        dry_run(plan)
        return
    cells = play_suite(plan)
    missing = [cell for cell in cells if cell.numbers is None]
    if missing:
        names = ", ".join(f"{cell.model.name} on {cell.data.name}" for cell in missing)
        raise UserError(
            f"{len(missing)} of {len(cells)} cells are missing ({names}): --resume=true plays them"
        )
    for cell in cells:
        if "not_saved" in cell.numbers:
            raise UserError(cell.numbers["not_saved"])


def play_suite(plan: plans.Config) -> list[Cell]:
    """Plays all cells of a suite that are not there, model after model, each loaded once; writes
    suite.json and suite.html and prints them, also when it is interrupted. What fails is said, and
    its cells have no numbers; the others go on."""
    # 1. all mistakes that can be seen at once
    cells = cells_of(plan)
    others = []
    if plan.resume:
        for cell in cells:
            refuse_other_settings(cell)
        others = left_out(plan)
        Path(plan.out_dir).mkdir(parents=True, exist_ok=True)
    else:
        config.fresh_dir(plan.out_dir, "go on with --resume=true")

    # 2. model after model
    try:
        for _, of_model in itertools.groupby(cells, key=lambda cell: cell.model.name):
            play_cells(list(of_model))
    finally:
        everything = in_order(plan, cells + others)
        shown = comparing.data_of_evaluations(evaluations_of(everything))
        save_suite(plan, everything, shown)
        print_suite(plan, shown)
    return cells


def refuse_other_settings(cell: Cell) -> None:
    """Checks that what was begun of a cell may go on with its settings."""
    folder = Path(cell.given.save_to)
    begun = evaluation.begun_in(folder)
    if begun is None:
        return
    now = evaluation.plain(settings_of(cell.cfg, cell.given))
    problem = evaluation.difference_of_settings(begun["settings"], now)
    if problem:
        raise UserError(
            f"{folder} cannot go on: {problem}; give that, or begin another suite with --out_dir=…"
        )


def left_out(plan: plans.Config) -> list[Cell]:
    """Finds the cells that are not asked for (`only`), but were played before with these settings:
    they stay in the tables."""
    cells = []
    names = [source.name for source in plans.chosen(plan)]
    for model in plans.entries(plan.models, "models"):
        for source in plans.entries(plan.data, "data"):
            folder = Path(plan.out_dir) / model.name / source.name
            if source.name in names or not (folder / evaluation.NUMBERS).is_file():
                continue
            try:
                cell = cell_of(plan, model, source)
                refuse_other_settings(cell)
                cell.numbers = comparing.evaluated(folder).numbers
            except UserError as error:
                config.tell(f"{model.name} on {source.name} is left out of the tables: {error}")
                continue
            cells.append(cell)
    return cells


def in_order(plan: plans.Config, cells: list[Cell]) -> list[Cell]:
    """Puts cells in the order of the suite."""
    names = [entry.name for entry in plans.entries(plan.models, "models")]
    sources = [entry.name for entry in plans.entries(plan.data, "data")]
    return sorted(
        cells, key=lambda cell: (names.index(cell.model.name), sources.index(cell.data.name))
    )


@contextlib.contextmanager
def noted(cells: list[Cell]):
    """Notes for cells why they have no numbers, says it once, and lets the others go on."""
    try:
        yield
    except Exception as error:  # whatever a model, an engine or a data set may raise
        why = " ".join(str(error).split())[:500]
        if not isinstance(error, UserError):
            why = f"{type(error).__name__}: {why}"
        for cell in cells:
            if cell.numbers is None:
                cell.missing = why
        names = ", ".join(f"{cell.model.name} on {cell.data.name}" for cell in cells)
        config.tell(f"{names}: {why}")


def play_cells(cells: list[Cell]) -> None:
    """Plays the cells of one model."""
    # 1. what was played before needs no model
    waiting = []
    for cell in cells:
        with noted([cell]):
            remedy = "begin another suite with --out_dir=…"
            cell.record = find_record(cell.cfg, cell.given, remedy)
            if cell.record and not missing_of(cell.record, cell.given):
                cell.numbers = finish(cell.cfg, cell.given, cell.record, cell.record.there)
            else:
                waiting.append(cell)

    # 2. the rest; one that is loaded shows images in one way
    local = []
    for cell in waiting:
        if cell.given.endpoint:
            with noted([cell]), open_player(cell.cfg, cell.given) as player:
                require_endpoint(player.engine)
                print_cell(cell)
                cell.numbers = evaluate_with(player, cell.cfg, cell.given, cell.record)
        else:
            local.append(cell)
    for _, alike in itertools.groupby(local, key=lambda c: (c.cfg.min_pixels, c.cfg.max_pixels)):
        alike = list(alike)
        with noted(alike):
            play_with_one_model(alike)
        gc.collect()  # its weights, before the next are loaded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def require_endpoint(endpoint: Endpoint) -> None:
    """Checks that an API is there, which its first question would wait half a minute for."""
    try:
        endpoint.api.check_reachable()
    except HttpError as error:
        raise endpoint.api.refusal(error, "--key_env") from None


def play_with_one_model(cells: list[Cell]) -> None:
    """Plays cells of one model, which is loaded once, and whose engine is started once."""
    # 1. a player for each data set; the first one loads the model
    players = {}
    model = None
    for cell in cells:
        with noted([cell]):
            player = Player.of(cell.cfg, limit=cell.given.limit, model=model)
            model = player.model
            players[cell.data.name] = player
    if not players:
        return

    # 2. the engine, with room for the longest
    first = next(iter(players.values()))
    longest = max(player.settings.max_tokens for player in players.values())
    cfg = replace(first.cfg, max_tokens=longest)
    everything = Mixture.of_players(players, model, cfg)
    with everything:
        for cell in cells:
            player = players.get(cell.data.name)
            if player is None:
                continue
            player.engine = everything.engine
            with noted([cell]):
                if model is not None:
                    models.check_positions(model, cell.cfg.model, cell.cfg.max_tokens)
                print_cell(cell)
                cell.numbers = evaluate_with(player, cell.cfg, cell.given, cell.record)


def print_cell(cell: Cell) -> None:
    """Says what is played next."""
    print(escaped(f"{cell.model.name} on {cell.data.name}"), flush=True)


def dry_run(plan: plans.Config) -> None:
    """Plays a made-up rollout of each data set (play.py), for the first model."""
    cells = cells_of(plan)
    for cell in cells:
        if cell.model == cells[0].model:
            print_cell(cell)
            with tempfile.TemporaryDirectory() as folder:
                file = f"{folder}/{cell.data.name}.py"
                config.save(cell.cfg, file)
                config.run_script("play.py", ["--made_up=true", "--config", file])


if __name__ == "__main__":
    config.main(main)

"""What is written and printed of a suite: suite.json, suite.html and the tables."""

import json
from pathlib import Path

from grading import comparing
from grading.comparing import Evaluated
from run import evaluation
from suite import plan as plans
from suite.cells import Cell
from trajectory import escaped


def save_suite(plan: plans.Config, cells: list[Cell], shown: dict) -> None:
    """Writes suite.json, with all numbers, and suite.html. shown: of grading/comparing.py."""
    entries = []
    for one in evaluations_of(cells):
        entry = {"model": one.model, "data": one.data, "folder": str(one.folder)}
        entry |= {"numbers": one.numbers} if one.numbers else {"missing": one.missing}
        entries.append(entry)
    written = {
        "models": dict(zip(names_of(plan.models, "models"), plan.models, strict=True)),
        "data": dict(zip(names_of(plan.data, "data"), plan.data, strict=True)),
        "cells": entries,
        "compared": shown["pairs"],
    }
    folder = Path(plan.out_dir)
    evaluation.save_whole(folder / "suite.json", json.dumps(written, indent=2) + "\n")
    page = comparing.page(f"{plan.out_dir}: suite", shown)
    evaluation.save_whole(folder / "suite.html", page)


def names_of(texts: tuple[str, ...], key: str) -> list[str]:
    """Names the entries of a key."""
    return [entry.name for entry in plans.entries(texts, key)]


def evaluations_of(cells: list[Cell]) -> list[Evaluated]:
    """Makes what is shown of cells: by the names of the plans."""
    evaluations = []
    for cell in cells:
        numbers = cell.numbers
        if numbers is not None:
            numbers = {name: value for name, value in numbers.items() if name != "saved"}
        missing = "" if numbers else cell.missing
        folder = Path(cell.given.save_to)
        one = Evaluated(cell.model.name, cell.data.name, folder, numbers, missing)
        evaluations.append(one)
    return evaluations


def print_suite(plan: plans.Config, shown: dict) -> None:
    """Prints a table of each data set, the averages of all, and the differences."""
    for table_of_data in shown["tables"]:
        print_table(table_of_data)
    print_table(shown["overview"])
    if shown["differences"]:
        print_table(shown["differences"])
    print(f"saved: {plan.out_dir}/suite.json, suite.html")


def print_table(shown: dict) -> None:
    """Prints a table of grading/comparing.py; its texts without markup: a name may look like it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Table()
    for place, name in enumerate(shown["columns"]):
        out.add_column(Text(escaped(name)), justify="right" if place else "left")
    for row in shown["rows"]:
        out.add_row(*(Text(escaped(text)) for text in row))
    console = Console(highlight=False)
    console.print(Text(escaped(shown["title"]), style="bold"))
    console.print(out)
    if shown["caption"]:
        console.print(Text(escaped(shown["caption"]), style="bright_black"))

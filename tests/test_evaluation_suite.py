"""Pins suites: several models on several data sets in one call, each model loaded once; what is
missing is said, and only that is played again.

    pytest tests/test_evaluation_suite.py
"""

import http.server
import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest

import evaluate
import player
from learning import model as models
from run import config, evaluation
from run.config import UserError
from suite import plan as plans
from suite import play as suites
from suite.cells import cells_of
from tasks import tiny as tiny_model

REWARDS = """
def spread(trajectory, example):
    return sum(trajectory.ids) % 11 / 10

def even(trajectory, example):
    return float(sum(trajectory.ids) % 2 == 0)
"""
DATA = {
    "sums": 'rewards = ("mine.py:spread",)\nsystem_prompt = "Add."\n',
    "kinds": 'rewards = ("mine.py:even",)\nmax_turns = 2\n',
    "long": 'rewards = ("mine.py:even", "mine.py:spread:0")\n',
}


@pytest.fixture
def here(tmp_path, tokenizer, monkeypatch):
    """Three models of nothing, three data sets, and the suite of them."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("one", "two", "three")):
        folder = tmp_path / "out" / name
        models.save(tiny_model.tiny(tokenizer, seed, 16, layers=1), tokenizer, folder)
    (tmp_path / "mine.py").write_text(REWARDS)
    for start, (name, text) in enumerate(DATA.items()):
        rows = [
            {"prompt": f"{n} + {start}?", "answer": "4", "kind": ("low", "high")[n % 2]}
            for n in range(6)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
        head = f'data = "{name}.jsonl"\ntools = ()\nmax_tokens = 200\nmax_new_tokens = 4\n'
        (tmp_path / f"{name}.py").write_text(head + text)
    (tmp_path / "suite.py").write_text(
        'models = ("out/one", "out/two", "out/three")\n'
        'data = ("sums.py", "kinds.py --category_column=kind", "long.py --n=2 --temperature=1")\n'
        'out_dir = "out/suite"\n'
    )
    return tmp_path


@pytest.fixture
def loads(monkeypatch):
    """The models that are loaded."""
    loaded = []
    load = player.load_policy

    def noted(cfg, *arguments):
        loaded.append(cfg.model)
        return load(cfg, *arguments)

    monkeypatch.setattr(player, "load_policy", noted)
    return loaded


def run(*argv) -> dict:
    suites.main(["--config", "suite.py", *argv])
    return json.loads(Path("out/suite/suite.json").read_text())


def table_of(written) -> dict:
    return {(c["model"], c["data"]): c.get("numbers") for c in written["cells"]}


def test_three_models_on_three_data_sets_in_one_call(here, loads, capsys):
    """Evaluation 1: and each cell has the numbers of an evaluation of its own."""
    written = run()
    assert loads == ["out/one", "out/two", "out/three"]
    cells = table_of(written)
    assert list(cells) == [
        (m, d) for m in ("one", "two", "three") for d in ("sums", "kinds", "long")
    ]
    said = capsys.readouterr().out
    for name in ("sums", "kinds by kind", "all averages", "the same problems", "two - one"):
        assert name in said
    assert said.count("problems 6") == 3  # equal for all: once in each caption

    # alone, by the command line
    alone = ["--model=out/two", "--config", "long.py", "--n=2", "--temperature=1"]
    evaluate.main([*alone, "--save_to=alone"])
    assert json.loads(Path("alone/eval.json").read_text()) == cells["two", "long"]
    assert set(cells["one", "kinds"]["categories"]) == {"low", "high"}
    assert cells["one", "sums"]["outcome"] == "spread"

    # compared: all pairs of three models on three data sets
    assert len(written["compared"]) == 9
    pair = next(p for p in written["compared"] if (p["data"], p["second"]) == ("kinds", "two"))
    averages = [cells[name, "kinds"]["avg@1"] for name in ("one", "two")]
    assert pair["difference"] == pytest.approx(averages[1] - averages[0])
    assert pair["better"] - pair["worse"] == round(6 * pair["difference"])
    assert pair["ci95_low"] <= pair["difference"] <= pair["ci95_high"]
    assert len(pair["which_better"]) == pair["better"] and "Newcombe" in pair["method"]
    page = Path("out/suite/suite.html").read_text()
    assert "{{data}}" not in page and "Evaluations" in page


def test_killed_in_a_cell_the_cells_before_are_not_played_again(here, loads, monkeypatch):
    whole = table_of(run("--out_dir=out/suite"))
    Path("out/suite").rename("whole")
    loads.clear()
    append = evaluation.Record.append
    written = []

    def stop(record, trajectory, *arguments, **columns):
        append(record, trajectory, *arguments, **columns)
        written.append(record.folder)
        if len(written) == 6 + 6 + 12 + 4:  # in the fourth cell
            os.kill(os.getpid(), signal.SIGINT)  # to the thread that waits

    monkeypatch.setattr(evaluation.Record, "append", stop)
    with pytest.raises(KeyboardInterrupt):
        run()
    stopped = json.loads(Path("out/suite/suite.json").read_text())
    assert [("numbers" in cell) for cell in stopped["cells"]] == [True] * 3 + [False] * 6
    assert stopped["cells"][5]["missing"] == "not played yet"
    loads.clear()
    cells = table_of(run("--resume=true"))
    assert cells == whole and loads == ["out/two", "out/three"]
    assert len(written) == 3 * 24  # each trajectory once

    # all is there: nothing is loaded
    loads.clear()
    assert table_of(run("--resume=true")) == whole and loads == []


def test_a_model_that_is_not_there_leaves_its_cells_missing(here, loads, capsys):
    text = Path("suite.py").read_text().replace("out/two", "out/no")
    text = text.replace('"sums.py",', '"sums.py", "none: sums.py --data=nowhere.jsonl",')
    Path("suite.py").write_text(text)
    with pytest.raises(UserError, match=r"6 of 12 cells are missing \(one on none, no on sums"):
        run()
    written = json.loads(Path("out/suite/suite.json").read_text())
    cells = table_of(written)
    assert [key for key, numbers in cells.items() if numbers] == [
        (m, d) for m in ("one", "three") for d in ("sums", "kinds", "long")
    ]
    missing = [cell["missing"] for cell in written["cells"] if "missing" in cell]
    assert "no file 'nowhere.jsonl'" in missing[0] and "out/no" in missing[1]
    said = capsys.readouterr()
    assert "missing" in said.out and "no on kinds: " in said.err

    # it comes: only its cells are played
    Path("out/two").rename("out/no")
    Path("sums.jsonl").rename("nowhere.jsonl")
    Path("sums.jsonl").write_text(Path("nowhere.jsonl").read_text())
    loads.clear()
    assert all(table_of(run("--resume=true")).values())
    assert sorted(loads) == ["out/no", "out/one", "out/three"]


def test_with_only_a_suite_goes_on_and_keeps_what_was_played_of_the_others(here, loads, capsys):
    whole = table_of(run())
    shutil.rmtree("out/suite/two/kinds")
    loads.clear()
    assert table_of(run("--resume=true", "--only=kinds")) == whole
    assert loads == ["out/two"] and list(whole)[4] == ("two", "kinds")
    numbers = Path("out/suite/three/long/eval.json")
    whole_numbers = numbers.read_text()
    numbers.write_text("{")  # as an editor may leave it
    assert ("three", "long") not in table_of(run("--resume=true", "--only=kinds"))
    assert "three on long is left out of the tables" in capsys.readouterr().err
    numbers.write_text(whole_numbers)
    text = Path("suite.py").read_text()
    Path("suite.py").write_text(text.replace("--n=2", "--n=3").replace("sums.py", "sums: no.py"))
    kept = table_of(run("--resume=true", "--only=kinds"))
    assert kept == {key: whole[key] for key in whole if key[1] == "kinds"}
    said = capsys.readouterr().err
    assert "one on long is left out of the tables" in said and "one on sums" in said


class Api(http.server.BaseHTTPRequestHandler):
    """Says 4 to everything."""

    def do_GET(self):
        self.answer({"data": []})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": "\\boxed{4}"}
        usage = {"completion_tokens": 3, "total_tokens": 9}
        choice = {"message": message, "finish_reason": "stop"}
        self.answer({"choices": [choice], "usage": usage})

    def answer(self, value):
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        """Quiet."""


def test_an_endpoint_is_a_model_too_and_one_that_is_away_is_missing(here):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    Path("suite.py").write_text(
        f'models = ("gpt: gpt-9 --endpoint={url}", "gone --endpoint=http://127.0.0.1:9/v1")\n'
        'data = ("sums.py --rewards=correct",)\n'
    )
    with pytest.raises(UserError, match=r"1 of 2 cells are missing \(gone on sums\)"):
        run()
    server.shutdown()
    cells = table_of(json.loads(Path("out/suite/suite.json").read_text()))
    assert cells["gpt", "sums"]["avg@1"] == 1.0 and cells["gpt", "sums"]["model"] == "gpt-9"
    assert cells["gone", "sums"] is None


@pytest.mark.parametrize(
    "text, says",
    [
        ('models = ()\ndata = ("sums.py",)', "a suite needs models"),
        ('models = ("out/one",)\ndata = ("no.py",)', "one on no: no config file 'no.py'"),
        ('models = ("out/one", "x/one")\ndata = ("sums.py",)', "one is there twice"),
        ('models = ("out/one",)\ndata = ("sums.py --learn=1",)', "one on sums: unknown key"),
        ('models = ("out/one",)\ndata = ("sums.py --dtype=bfloat16",)', "dtype belongs to a model"),
        ('models = ("out/one --n=2",)\ndata = ("sums.py",)', "samples at temperature 0 are all"),
        ('models = ("out/one",)\ndatas = ("sums.py",)', "unknown key 'datas'.*did you mean data"),
        ('models = ("out/one",)\ndata = ("--n=2",)', "cannot read '--n=2'"),
        ('models = ("out/one",)\ndata = ("../: sums.py",)', "is no name of a folder"),
        (
            'models = ("m --endpoint=http://a/v1 --dtype=float32",)\ndata = ("sums.py",)',
            "no effect",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(text, says, here, loads):
    Path("suite.py").write_text(text + "\n")
    with pytest.raises(UserError, match=says):
        run()
    assert loads == [] and not Path("out/suite").exists()


def test_which_config_is_a_suite(here):
    for argv in (
        ["--config", "suite.py"],
        ["--config=suite.py"],
        ["--n=2", "--config", "suite.py"],
    ):
        assert evaluate.is_suite(argv)
    for argv in ([], ["--config"], ["--config", "sums.py"], ["--config", "no.py"], ["--config="]):
        assert not evaluate.is_suite(argv)


def test_evaluate_hands_a_suite_over(here, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [])
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["--config", "suite.py", "--only=summs"])
    assert ended.value.code == 2
    assert "error: only = 'summs': expected one of" in capsys.readouterr().err


def test_a_suite_that_goes_on_has_the_same_settings(here):
    run("--only=sums")
    with pytest.raises(UserError, match="one/sums cannot go on: seed = 3, but it was begun with"):
        run("--only=sums", "--seed=3", "--resume=true")
    with pytest.raises(UserError, match="'out/suite' is not empty.*go on with --resume=true"):
        run("--only=sums")
    with pytest.raises(UserError, match="only = 'summs': expected one of sums, kinds, long"):
        run("--only=summs")


def test_a_model_brings_its_format_and_a_data_set_its_tools_and_limits(here):
    """A run is asked as it was trained; what the data set needs is the data set's."""
    import train_grpo
    import train_sft

    cfg = train_grpo.Config(format="fence", max_turns=9, tools=("search",), dtype="bfloat16")
    config.save(cfg, "out/one/config.py")
    config.save(train_sft.Config(format="tags", tools=("python",)), "out/two/config.py")
    plan = plans.Config(
        models=("out/one", "out/two", "out/three --max_turns=7"), data=("kinds.py", "sums.py")
    )
    made = {(c.model.name, c.data.name): c.cfg for c in cells_of(plan)}
    assert [made[name, "kinds"].format for name in ("one", "two", "three")] == [
        "fence",
        "tags",
        "hermes",
    ]
    assert [made[name, "kinds"].max_turns for name in ("one", "two", "three")] == [2, 2, 7]
    assert made["one", "sums"].tools == () and made["one", "sums"].dtype == "bfloat16"
    assert made["one", "sums"].system_prompt == "Add." != made["one", "kinds"].system_prompt
    assert made["one", "kinds"].max_new_tokens == 4

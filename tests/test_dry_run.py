"""--dry_run=true: every config is played once, without its model, a GPU or a download.

pytest tests/test_dry_run.py
"""

import http.server
import json
import runpy
import sys
import threading
from pathlib import Path

import pytest

import play
import train_grpo
import train_sft
from run import config
from run.config import UserError

ROOT = Path(config.HERE)
SHARED = ROOT.parent / "shared" / "data"
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.py"))
# What the real rows in ../shared/data are for, and where they differ from the hub's.
REAL = {
    "aime.py": ("aime24.jsonl", "--prompt_column=problem", "--answer_column=answer"),
    "math_tir.py": ("aime24.jsonl", "--prompt_column=problem", "--answer_column=answer"),
    "gsm8k.py": ("gsm8k_train.jsonl",),
    "nq_search.py": ("nq_open_dev.jsonl", "--answer_column=answer"),
}


class Retriever(http.server.BaseHTTPRequestHandler):
    """A Search-R1 server that finds the same passage for everything."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        found = {"document": {"id": "1", "contents": '"Basel"\nThe Rhine flows.'}, "score": 1.0}
        text = json.dumps({"result": [[found] for _ in asked["queries"]]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture(scope="module")
def retriever():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Retriever)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/retrieve"
    server.shutdown()


@pytest.fixture(autouse=True)
def no_download(monkeypatch, tmp_path):
    """In an empty folder, so that no run of ours is found, and with a hub that refuses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


def played(name, url, *argv):
    script = train_sft if "sft" in Path(name).stem.split("_") else train_grpo
    argv = ["--config", name, *argv]
    if name == "nq_search.py":
        argv.append(f"--tool_options=search.url={url}")
    cfg = config.parse(script.Config, argv, script.check)
    return play.show_demonstration(cfg) if script is train_sft else play.play_made_up(cfg)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_played_and_its_right_answer_is_rewarded(name, retriever, capsys, tmp_path):
    """Pitfalls 3 and 13: with an exact mask, the stop token trained."""
    trajectory = played(name, retriever)
    said = capsys.readouterr().out
    assert trajectory.mask[0] == 0 and sum(trajectory.mask) > 5 and trajectory.stop == "answered"
    assert len(trajectory.ids) == len(trajectory.mask) == len(trajectory.logprobs)
    if "sft" not in Path(name).stem.split("_"):
        outcome = next(iter(trajectory.rewards))
        assert trajectory.rewards[outcome] == 1.0, said
        assert [call.error for call in trajectory.calls] == [None] * len(trajectory.calls), said
        assert trajectory.calls, said
    assert not list(tmp_path.glob("out*")), "a dry run writes nothing"


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data here: real rows are not tried")
@pytest.mark.parametrize("name", REAL)
def test_real_rows_are_played_too(name, retriever, capsys):
    file, *argv = REAL[name]
    trajectory = played(name, retriever, f"--data={SHARED / file}", *argv)
    assert next(iter(trajectory.rewards.values())) == 1.0, capsys.readouterr().out
    assert trajectory.stop == "answered"


def test_a_tool_that_does_not_work_is_told_and_does_not_end_the_dry_run(capsys):
    trajectory = played("nq_search.py", "http://127.0.0.1:9/retrieve", "--tool_timeout=5")
    assert [call.error for call in trajectory.calls] == ["network"]
    assert "tool: search failed (network)" in capsys.readouterr().out


def test_rows_that_would_have_to_be_downloaded_are_asked_for():
    with pytest.raises(UserError, match="a dry run downloads nothing: give a file"):
        played("gsm8k.py", "", "--data=somebody/else")


def test_what_the_config_gets_wrong_is_an_error():
    with pytest.raises(UserError, match="no column 'problem'"):
        played("gsm8k.py", "", "--prompt_column=problem")
    with pytest.raises(UserError, match="unknown tool 'pythn': did you mean python"):
        played("gsm8k.py", "", "--tools=pythn")


def test_what_could_not_be_checked_and_what_looks_wrong_is_said(capsys):
    trajectory = played("gsm8k.py", "", "--max_turns=2", "--rewards=correct,format", "--seed=3")
    said = capsys.readouterr().out
    assert "data: the row is our own, with the columns of openai/gsm8k:main" in said
    assert "model: Qwen/Qwen2.5-0.5B-Instruct is not on this machine" in said
    assert trajectory.rewards == {"correct": 1.0, "format": 1.0}
    played("gsm8k.py", "", "--max_new_tokens=5")
    assert "stop: length, not answered: raise that limit" in capsys.readouterr().out


def test_a_tool_that_ends_the_episode_is_given_the_answer(capsys):
    trajectory = played("gsm8k.py", "", "--tools=python,finish")
    assert [call.name for call in trajectory.calls] == ["python", "finish"]
    assert trajectory.answer == "19" and trajectory.rewards["correct"] == 1.0


@pytest.mark.parametrize(
    "script, config_file, says",
    [("train_grpo.py", "calc.py", "of max_new_tokens"), ("train_sft.py", "calc_sft.py", "trained")],
)
def test_the_training_scripts_only_call_it(
    script, config_file, says, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", [script, "--config", config_file, "--dry_run=true"])
    runpy.run_path(str(ROOT / script), run_name="__main__")
    assert says in capsys.readouterr().out
    assert not list(tmp_path.glob("out*"))


def test_a_made_up_rollout_and_a_demonstration_are_two_things(capsys):
    with pytest.raises(UserError, match="expected one of them"):
        play.main(["--made_up=true", "--demonstration=true", "--config", "calc.py"])
    play.main(["--made_up=true", "--config", "calc.py"])
    assert "reward   1.0" in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot read '--dry_run=yes': write --dry_run=true"):
        train_grpo.main(["--config", "calc.py", "--dry_run=yes"])

"""--dry_run=true: every config is played once, without its model, a GPU or a download.

pytest tests/test_dry_run.py
"""

import http.server
import json
import runpy
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

import evaluate
import play
import train_grpo
import train_sft
from run import config
from run.config import UserError
from suite import play as suites

ROOT = Path(config.HERE)
SHARED = ROOT.parent / "shared" / "data"
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.py"))
SUITES = sorted(path.name for path in (ROOT / "configs" / "suites").glob("*.py"))
OF_MODELS = [name for name in SUITES if evaluate.is_suite(["--config", f"suites/{name}"])]
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


@pytest.mark.parametrize("name", OF_MODELS)
def test_a_suite_of_models_is_played_and_each_right_answer_is_rewarded(
    name, retriever, monkeypatch, capsys
):
    """AIME 24 and 25, MATH-500, GSM8K, HumanEval, MBPP, NQ, HotpotQA, Spider, ChartQA."""
    played = []

    def noted(script, argv):
        assert (script, argv[0]) == ("play.py", "--made_up=true")
        cfg = config.parse(train_grpo.Config, argv[1:], train_grpo.check)
        if "search" in cfg.tools:
            cfg = replace(cfg, tool_options=(f"search.url={retriever}",))
        played.append(play.play_made_up(cfg))

    monkeypatch.setattr(config, "run_script", noted)
    suites.main(["--config", f"suites/{name}", "--dry_run=true"])
    said = capsys.readouterr().out
    assert [t.outcome for t in played] == [1.0] * len(played), said
    assert all(call.error is None for t in played for call in t.calls), said
    assert len(played) == {"benchmarks.py": 9, "charts.py": 3, "tiny.py": 3}[name]


@pytest.mark.parametrize("name", [name for name in SUITES if name not in OF_MODELS])
def test_a_suite_has_rows_and_rewards_and_all_else_is_the_runs(name, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.py").write_text((ROOT / "configs" / "chartgemma.py").read_text())
    given = evaluate.Config(run=str(run_dir), split="validation")
    if name == "chartgemma.py":  # a file, which has no splits
        given = evaluate.Config(run=str(run_dir))
    cfg = evaluate.load_config(["--config", f"suites/{name}"], given)
    assert cfg.tools == ("zoom", "subfigure", "draw_horizontal", "draw_vertical")
    assert (cfg.rewards, cfg.model, cfg.max_turns) == (("relaxed",), str(run_dir), 4)
    trajectory = play.play_made_up(cfg)
    assert trajectory.rewards == {"relaxed": 1.0} and len(trajectory.images) == 2


def test_a_dry_run_shows_a_stand_in_the_images_of_rows_and_tools(capsys):
    trajectory = played("textvqa_rotate.py", "")
    ours, turned = [picture.original.size for picture in trajectory.images]
    assert ours == (96, 48) and turned[0] > 96 and turned[1] > 48  # by a degree, whole
    assert "image 2:\n[image 2: " in capsys.readouterr().out
    played("sft_chart.py", "")
    out = capsys.readouterr().out
    assert "[image 1: " in out and "[image 2: " in out


def test_a_tool_that_does_not_work_is_told_and_does_not_end_the_dry_run(capsys):
    trajectory = played("nq_search.py", "http://127.0.0.1:9/retrieve", "--tool_timeout=600")
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


# A23: rewards of the user's own, rows that are held out, rows behind the first

OWN = """
def is_gold(trajectory, example):
    return float(trajectory.messages[-1]["content"] == example["answer"])

def has_gold(trajectory, example):
    return float(example["answer"] in trajectory.messages[-1]["content"])

def in_tag(trajectory, example):
    return float(f"<answer>{example['answer']}</answer>" in trajectory.messages[-1]["content"])

def never(trajectory, example):
    return 0.0
"""


def rows_file(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def own(tmp_path, reward, *argv, answer="17"):
    (tmp_path / "mine.py").write_text(OWN)
    file = rows_file(tmp_path / "rows.jsonl", {"prompt": "What is 8 + 9?", "answer": answer})
    if not any(text.startswith("--system_prompt") for text in argv):
        argv = ("--system_prompt=Be brief.", *argv)  # calc's own asks for \\boxed{}
    argv = ["--config", "calc.py", f"--data={file}", f"--rewards=mine.py:{reward}", *argv]
    return play.play_made_up(config.parse(train_grpo.Config, argv, train_grpo.check))


@pytest.mark.parametrize(
    "reward, options, says",
    [
        ("is_gold", (), "17"),
        ("has_gold", ("--prompt_template={prompt} Put it into \\boxed{}.",), "\\boxed{17}"),
        ("in_tag", ("--system_prompt=Answer in <answer> tags.",), "<answer>17</answer>"),
    ],
)
def test_a_reward_of_ones_own_is_given_the_gold_answer(reward, options, says, tmp_path, capsys):
    """A23: in the way that the prompt asks for."""
    trajectory = own(tmp_path, reward, *options)
    assert trajectory.messages[-1]["content"] == says and trajectory.reward == 1.0
    assert "reward: " not in capsys.readouterr().out


def test_what_a_reward_of_ones_own_does_not_pay_for_is_shown(tmp_path, capsys):
    """A23: with what was said, not with a right answer that nobody gave."""
    own(tmp_path, "never", answer=["17", "seventeen"])
    said = capsys.readouterr().out
    assert "reward: never gives 0.0 to what should be a right answer, '17'" in said
    own(tmp_path, "never", "--tools=python,finish")
    assert "to what should be a right answer, '17'" in capsys.readouterr().out


def test_rows_that_are_held_out_are_read_too(tmp_path, capsys):
    """A23: as the run does, before its first step."""
    row = {"prompt": "What is 8 + 9?", "answer": "17"}
    held_out = rows_file(tmp_path / "held.jsonl", row, {"prompt": "What?"})
    argv = ("--eval_every=2", "--eval_rows=2")
    with pytest.raises(UserError, match="held.jsonl, row 2: no column 'answer'"):
        own(tmp_path, "is_gold", *argv, f"--eval_data={held_out}")
    with pytest.raises(UserError, match="no file 'hold.jsonl': did you mean held.jsonl?"):
        own(tmp_path, "is_gold", *argv, "--eval_data=hold.jsonl")
    with pytest.raises(UserError, match="eval_data is missing: data = .* is a file and has no spl"):
        own(tmp_path, "is_gold", *argv)
    capsys.readouterr()
    own(tmp_path, "is_gold", *argv, "--eval_data=somebody/else")
    says = "eval_data: the held-out rows of somebody/else are not on this machine: not checked"
    assert says in capsys.readouterr().out
    held_out = rows_file(tmp_path / "held.jsonl", row)
    assert own(tmp_path, "is_gold", *argv, f"--eval_data={held_out}").reward == 1.0


def test_all_rows_are_read_and_not_only_the_first(tmp_path):
    """A23: for GRPO and for SFT."""
    row = {"prompt": "What is 8 + 9?", "answer": "17"}
    file = rows_file(tmp_path / "x.jsonl", *[row] * 70, {"prompt": "What?"})
    with pytest.raises(UserError, match="x.jsonl, row 71: no column 'answer'"):
        played("calc.py", "", f"--data={file}")
    assert played("calc.py", "", f"--data={file}", "--limit=70").reward is not None
    talk = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Done."}]
    file = rows_file(tmp_path / "y.jsonl", *[{"messages": talk}] * 70, {"messages": talk[:1]})
    with pytest.raises(UserError, match="y.jsonl, row 71: no assistant message"):
        played("calc_sft.py", "", f"--data={file}")


def test_a_demonstration_has_no_reward_to_show(tmp_path, capsys):
    """D7."""
    for argv in ([], ["--rows=3"]):
        played("calc_sft.py", "", *argv)
        said = capsys.readouterr().out
        assert "reward" not in said and "None" not in said and "trained" in said

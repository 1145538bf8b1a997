"""play.py: a talk, a question of your own, a group side by side; and the server of the same run.

    pytest tests/test_play.py

The model's weights are tiny, and a script says what it would sample (tests/agents.py).
"""

import io
import json
import sys

import pytest
import torch
from agents import Script
from PIL import Image

import evaluate
import play
import player as player_module
from engines.scripted import ScriptedEngine
from learning import model as models
from loss import advantages
from run.config import UserError

ADD = '''
def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: one
        b: another
    """
    return a + b


def even(trajectory, example):
    return float(trajectory.messages[-1]["content"][-1] in "02468")
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A run, a model that is none, a row and a tool."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("play")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    models.save(Qwen3ForCausalLM(Qwen3Config(**shape)), tokenizer, folder / "run")
    rows = [{"prompt": "noise", "answer": "5"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text(ADD)
    lines = ["model = 'base'", "data = 'rows.jsonl'", "tools = ('mine.py:add',)"]
    lines += ["system_prompt = 'be brief'", "prompt_template = 'Q: {prompt}'"]
    lines += ["rewards = ('mine.py:even',)", "format = 'hermes'"]
    (folder / "run" / "config.py").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def script(folder, tokenizer, monkeypatch):
    """The script in the place of the engine; the folder is where the test runs."""
    monkeypatch.chdir(folder)
    made = Script(tokenizer)
    turn = made.turn

    async def turn_of_question(last, sampling):
        return await turn(last.replace("Q: ", ""), sampling)

    made.turn = turn_of_question

    async def start_engine(*_):
        return ScriptedEngine(made, tokenizer)

    monkeypatch.setattr(player_module, "start_engine", start_engine)
    return made


def typed(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))


def test_a_talk_goes_on_with_all_that_was_said_tool_calls_included(script, monkeypatch, capsys):
    typed(monkeypatch, b"sum 2 3\n\nsay [bold]x\xff\x1b[2J[/bold]\n/reset\nsay bye")
    play.main(["--run=run", "--chat=true"])
    printed = capsys.readouterr().out
    assert "the result is 5." in printed and "answered, 1 calls, 0 failed" in printed
    assert "[bold]x\ufffd\\x1b[2J[/bold]" in printed  # neither markup nor what a terminal obeys
    first, second, third, last = script.prompts
    assert first.startswith("<|im_start|>system\nbe brief")
    assert "<|im_start|>user\nQ: sum 2 3<|im_end|>" in first  # in the run's template
    assert third.startswith(second + "the result is 5.<|im_end|>\n<|im_start|>user\nsay [bold]x")
    assert "sum" not in last.partition("<|im_end|>")[2] and "Q: say bye" in last
    assert "> " not in printed.splitlines()[0]  # through a pipe nobody is asked


@pytest.mark.parametrize("ending", [EOFError, KeyboardInterrupt])
def test_ctrl_d_and_ctrl_c_end_a_talk(script, monkeypatch, ending):
    typed(monkeypatch, b"")

    def asked(prompt):
        raise ending

    monkeypatch.setattr("builtins.input", asked)
    play.main(["--run=run", "--chat=true"])
    assert script.prompts == []


def test_a_talk_whose_turns_ran_out_can_go_on(script, monkeypatch, capsys):
    """The calls that were not run are left out."""
    typed(monkeypatch, b"sum 2 3\nsay hello")
    play.main(["--run=run", "--chat=true", "--max_turns=1"])
    assert "max_turns, 0 calls" in capsys.readouterr().out
    assert '<tool_call>\n{"name": "add"' not in script.prompts[1]
    assert script.prompts[1].endswith("user\nsay hello<|im_end|>\n<|im_start|>assistant\n")


def test_a_question_without_room_for_an_answer_is_as_if_it_was_not_asked(script, monkeypatch):
    typed(monkeypatch, b"say hello\n" + b"x " * 3000 + b"\nsay bye")
    play.main(["--run=run", "--chat=true"])
    assert len(script.prompts) == 2
    assert "user\nQ: say hello<|im_end|>" in script.prompts[1] and "x x" not in script.prompts[1]


def test_a_question_of_your_own_is_asked_as_the_runs_rows_are(script, capsys):
    play.main(["--run=run", "--prompt=sum 2 3"])
    printed = capsys.readouterr().out
    assert "the result is 5." in printed and "reward" not in printed
    assert "user\nQ: sum 2 3<|im_end|>" in script.prompts[0]
    assert {sampling.temperature for sampling in script.samplings} == {0.0}


def test_a_group_shows_what_each_earned_and_its_advantage(script, capsys):
    play.main(["--run=run", "--group=6", "--seed=1"])
    printed = capsys.readouterr().out
    assert len(script.prompts) == 6 and {s.temperature for s in script.samplings} == {1.0}
    earned = [float(str(sampling.seed)[-1] in "02468") for sampling in script.samplings]
    assert len(set(earned)) == 2
    values, _ = advantages(earned, [0] * 6)
    for value in set(values.tolist()):
        assert printed.count(f"{value:+.2f}") == earned.count(float(value > 0))
    assert "the answer is '5'" in printed


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--chat=true", "--prompt=x"], "chat asks for the questions itself"),
        (["--group=1"], "group = 1: expected at least 2"),
        (["--group=2", "--prompt=x"], "group compares rewards"),
        (["--run=run", "--made_up=true"], "run has no effect with made_up"),
        (["--run=run", "--group=2", "--temperature=0"], "would be all alike"),
        (["--run=nothing"], "run = 'nothing': no config.py in it"),
        (["--run=run", "--prompt="], "prompt is empty: write a question"),
        (["--run=run", f"--prompt={'x ' * 3000}"], "tokens, and max_tokens = 2048 with its answer"),
        (["--run=run", "--prompt=x", "--image=dot.png"], "run sees no images, drop it"),
    ],
)
def test_what_has_no_effect_is_refused(script, arguments, says):
    Image.new("RGB", (8, 8)).save("dot.png")
    with pytest.raises(UserError, match=says):
        play.main(arguments)


def test_a_server_takes_run_and_keys_as_evaluate_does(script, monkeypatch):
    pytest.importorskip("mcp", reason='no MCP here: pip install -e ".[mcp]"')
    from serve import agent

    monkeypatch.delenv("NANOTOOL_TOKEN", raising=False)
    cfg = agent.Config(run="run")
    player = agent.load_player(cfg, ["--max_turns=2"])
    evaluated = evaluate.load_config(["--max_turns=2"], evaluate.Config(run="run"))
    assert player.settings.max_turns == evaluated.max_turns == 2
    assert player.cfg.engine_options == agent.ENGINE_OPTIONS and player.cfg.model == "run"
    example = player.question([{"role": "user", "content": "hello"}])
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Q: hello"}]
    assert example["messages"] == asked
    with pytest.raises(UserError, match="no column 'schema', there are prompt, answer"):
        agent.load_player(cfg, ["--prompt_template={schema} {prompt}"])

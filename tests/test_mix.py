"""Pins mixes: whose turn it is, what a source has of its own, what is refused.

pytest tests/test_mix.py     (that a killed one goes on bit by bit: test_resume.py)
"""

import random
from fractions import Fraction

import pytest

import train_grpo
import train_sft
from engines.scripted import ScriptedEngine
from learning import model as models
from player import Mixture, Player
from run import config, mix
from run.config import UserError
from tasks import tiny as tiny_model

WEIGHTS = [
    {"a": Fraction(1)},
    {"a": Fraction(1), "b": Fraction(1)},
    {"a": Fraction(2), "b": Fraction(1), "c": Fraction(1)},
    {"a": Fraction("0.1"), "b": Fraction("2.5"), "c": Fraction(3), "d": Fraction("0.4")},
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_each_source_has_its_share_at_any_time(weights):
    order = mix.order_of_sources(tuple(weights.items()))
    assert set(order) == set(weights)
    total = sum(weights.values())
    taken = dict.fromkeys(weights, 0)
    for number, name in enumerate(3 * order, 1):
        taken[name] += 1
        for source, weight in weights.items():
            assert abs(taken[source] - number * weight / total) < 1


def test_what_is_drawn_depends_on_the_cursor_alone_and_takes_every_row_once():
    rows = {"a": [f"a{i}" for i in range(7)], "b": [f"b{i}" for i in range(3)]}
    weights = {"a": Fraction(2), "b": Fraction(1)}
    whole = mix.next_of_sources(0, rows, weights, 60, seed=4)
    in_parts = []
    rng = random.Random(0)
    while len(in_parts) < 60:
        count = min(rng.randint(1, 9), 60 - len(in_parts))
        in_parts += mix.next_of_sources(len(in_parts), rows, weights, count, seed=4)
    assert in_parts == whole
    of_a = [row for row in whole if row[0] == "a"]
    of_b = [row for row in whole if row[0] == "b"]
    assert (len(of_a), len(of_b)) == (40, 20)
    for epoch in range(5):
        assert sorted(of_a[7 * epoch : 7 * epoch + 7]) == rows["a"]
        assert sorted(of_b[3 * epoch : 3 * epoch + 3]) == rows["b"]
    assert of_a[:7] != of_a[7:14]  # in another order
    assert whole != mix.next_of_sources(0, rows, weights, 60, seed=5)


# What a source has of its own


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    """The folder of a model that knows nothing."""
    folder = tmp_path_factory.mktemp("base")
    models.save(tiny_model.tiny(tokenizer, 0, 16, layers=1), tokenizer, folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"q": "1 and 1?", "a": "2"}\n{"q": "2?", "a": "3"}\n')
    (tmp_path / "calm.py").write_text(
        'data = "rows.jsonl"\nprompt_column = "q"\nanswer_column = "a"\ntools = ()\n'
        'max_turns = 1\nsteps = 7\nmodel = "not/this"\nlearning_rate = 3.0\n'
    )
    (tmp_path / "keen.py").write_text(
        'data = "task:calc"\nlimit = 5\nsystem_prompt = "Go."\n'
        'rewards = ("correct", "format:0.1")\n'
    )
    return tmp_path


def test_a_source_has_its_own_keys_and_the_mix_all_others(folder):
    cfg = train_grpo.Config(mix=("calm.py:2", "keen.py"), steps=3, model="mine", max_tokens=99)
    calm, keen = mix.sources(cfg)
    assert (calm.name, calm.weight, keen.name, keen.weight) == ("calm", 2, "keen", 1)
    assert (calm.cfg.data, calm.cfg.prompt_column, calm.cfg.tools) == ("rows.jsonl", "q", ())
    assert (calm.cfg.max_turns, keen.cfg.max_turns) == (1, train_grpo.Config.max_turns)
    assert (keen.cfg.system_prompt, keen.cfg.rewards) == ("Go.", ("correct", "format:0.1"))
    for source in (calm, keen):
        assert (source.cfg.mix, source.cfg.steps, source.cfg.model) == ((), 3, "mine")
        assert (source.cfg.max_tokens, source.cfg.learning_rate) == (99, 1e-6)
    # the first rows, and the split, of all of them, where the mix says so
    assert [source.cfg.limit for source in mix.sources(cfg)] == [None, 5]
    cfg = train_grpo.Config(mix=("calm.py", "keen.py"), limit=3, split="test")
    assert [source.cfg.limit for source in mix.sources(cfg)] == [3, 3]
    assert [source.cfg.split for source in mix.sources(cfg)] == ["train", "test"]  # a file has none


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--mix=calm.py,calm.py:2"], "mix: calm is given twice: keep one, with their weights"),
        (
            ["--mix=calm.py:much"],
            "mix: cannot read the weight of 'calm.py:much': expected a number",
        ),
        (["--mix=calm.py:0"], "mix: cannot read the weight of 'calm.py:0'"),
        (["--mix=calm.py:-1"], "mix: cannot read the weight of 'calm.py:-1'"),
        (["--mix=calm.py:0.00007,keen.py:9.1"], "mix: the weights have too many digits"),
        (["--mix=nowhere.py"], "nowhere.py"),
        (["--mix=both.py"], "mix: both.py is a mix itself: name its sources"),
        (["--mix=calm.py", "--tools=sql"], "tools has no effect with a mix: each source has its"),
        (["--mix=calm.py", "--data=task:shop"], "data has no effect with a mix"),
        (["--mix=calm.py", "--max_turns=9"], "max_turns has no effect with a mix"),
        (["--mix=demos.py"], "unknown key 'rows' in demos.py"),
    ],
)
def test_a_mix_that_cannot_be_meant_is_told_in_a_sentence(folder, argv, says):
    (folder / "both.py").write_text('mix = ("calm.py", "keen.py")\n')
    (folder / "demos.py").write_text("rows = 5\n")
    with pytest.raises(UserError) as caught:
        config.parse(train_grpo.Config, argv, train_grpo.check)
    assert says in str(caught.value)


def test_keys_of_sft_that_a_mix_leaves_without_effect(folder):
    (folder / "demos.py").write_text('data = "task:calc"\n')
    with pytest.raises(UserError, match="shuffle has no effect with a mix"):
        config.parse(train_sft.Config, ["--mix=demos.py", "--shuffle=false"], train_sft.check)


# Played


def test_each_source_is_asked_played_and_scored_in_its_own_way(folder, base):
    cfg = train_grpo.Config(mix=("calm.py", "keen.py"), model=base, max_tokens=600)
    player = Player.of(cfg)
    assert isinstance(player, Mixture) and len(player.examples) == 7
    said = player.chat.encode("\\boxed{2}<|im_end|>")
    player.engine = ScriptedEngine(lambda ids, sampling: said, player.chat.tokenizer)
    drawn = player.next_prompts(0, 4, seed=0)
    assert [example["mix"] for example in drawn] == ["calm", "keen", "calm", "keen"]
    with player:
        played = player.play(drawn, samples=2, step=3)
    assert [(t.group, t.sample) for t in played] == [(g, s) for g in range(4) for s in range(2)]
    for t in played:
        text = player.chat.tokenizer.decode(t.ids)
        is_keen = t.example["mix"] == "keen"
        assert ("Go." in text, '"python"' in text) == (is_keen, is_keen)
        assert list(t.rewards) == (["correct", "format"] if is_keen else ["correct"])
    metrics = train_grpo.stats_of_sources(played)
    assert metrics["calm/rollouts"] == metrics["keen/rollouts"] == 4
    assert (
        metrics["calm/accuracy"] == sum(t.outcome for t in played if t.example["mix"] == "calm") / 4
    )
    assert "keen/reward_format" in metrics and "calm/reward_format" not in metrics


def test_an_error_of_a_source_says_of_which(folder, base):
    (folder / "broken.py").write_text('data = "rows.jsonl"\n')
    cfg = train_grpo.Config(mix=("keen.py", "broken.py"), model=base)
    with pytest.raises(UserError, match="^broken: rows.jsonl, row 1: "):
        Player.of(cfg)


def test_a_reward_that_raises_in_one_source_ends_the_run_with_its_sentence(folder, base):
    (folder / "mine.py").write_text("def bad(trajectory, example):\n    raise ValueError('no')\n")
    (folder / "bad.py").write_text('data = "task:calc"\nlimit = 2\nrewards = ("mine.py:bad",)\n')
    cfg = train_grpo.Config(mix=("keen.py", "bad.py"), model=base)
    player = Player.of(cfg)
    said = player.chat.encode("5<|im_end|>")
    player.engine = ScriptedEngine(lambda ids, sampling: said, player.chat.tokenizer)
    with player, pytest.raises(UserError, match="reward bad failed on row"):
        player.play(player.examples)

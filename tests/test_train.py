"""Whole runs of a few steps: what they leave behind, that they repeat, and what evaluation counts.

    pytest tests/test_train.py

Pinned here: SFT and RL mask alike, runs load in other libraries, equal seeds give equal bits, and
evaluation has a random stream of its own. The model is made here and knows nothing, so the reward
is one that differs whatever it says.
"""

import errno
import itertools
import json
import math
import random
import resource
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

import evaluate
import player
import train_grpo
import train_sft
from chat import Chat
from engines.scripted import ScriptedEngine
from learning import model as models
from learning import optim
from rollout import Settings, rollouts
from run import config, evaluation, mix
from run import log as run_log
from run import page as run_page
from run.config import UserError
from run.loop import run_blocking
from tools import Toolbox
from train_sft import Sample
from trajectory import Trajectory

SYSTEM = "Solve the problem. You can run python. Give the answer in \\boxed{}."
REWARD = '''
def spread(trajectory, example):
    """Differs between the samples of a group, and says nothing about them."""
    return sum(trajectory.ids) % 11 / 10

def same(trajectory, example):
    return 0.1
'''
TIMES = ("seconds", "rollout_seconds", "sync_seconds", "tool_seconds", "val_seconds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("runs")
    (made / "my_rewards.py").write_text(REWARD)
    return made


@pytest.fixture(scope="module")
def sft_run(folder):
    """(out_dir, config, last metrics) of three steps from scratch."""
    cfg = train_sft.Config(
        out_dir=str(folder / "sft"),
        model="tiny",
        rows=48,
        batch_size=16,
        system_prompt=SYSTEM,
        optimizer="muon",
        learning_rate=1e-2,
        warmup=1,
    )
    return folder / "sft", cfg, train_sft.train(cfg)


def grpo_config(folder, name, **options):
    values = {
        "out_dir": str(folder / name),
        "model": str(folder / "sft"),
        "steps": 2,
        "limit": 5,
        "system_prompt": SYSTEM,
        "prompts_per_step": 3,
        "group_size": 3,
        "max_tokens": 200,
        "max_new_tokens": 6,
        "max_turns": 2,
        "rewards": (f"{folder / 'my_rewards.py'}:spread",),
        "learning_rate": 1e-2,
        "token_budget": 200,
    }
    return train_grpo.Config(**values | options)


@pytest.fixture(scope="module")
def full_run(folder, sft_run):
    cfg = grpo_config(folder, "full", updates_per_batch=2)
    return folder / "full", cfg, train_grpo.train(cfg)


@pytest.fixture(scope="module")
def lora_run(folder, sft_run):
    cfg = grpo_config(folder, "lora", tune="lora", lora_r=4, lora_alpha=8)
    return folder / "lora", cfg, train_grpo.train(cfg)


def weights(folder):
    from safetensors.torch import load_file

    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def untimed(rows):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def logprobs_of(model, tokenizer):
    ids = torch.tensor([tokenizer.encode("Ana has 12 apples and buys 30 more.")])
    with torch.no_grad():
        return model.eval()(ids).logits.log_softmax(-1)


# SFT


def test_sft_trains_the_tokens_that_rl_would_train_in_the_same_conversation(sft_run):
    """Pitfall 49: a rollout's messages, rendered for SFT, are its ids and its mask."""

    def python(code: str) -> str:
        """Runs code.

        Args:
            code: Python.
        """
        return "42"

    _, tokenizer = models.load(str(sft_run[0]), device="cpu")
    box = Toolbox([python])
    chat = Chat(tokenizer, "hermes", box.schemas)
    turns = (
        '<tool_call>\n{"name": "python", "arguments": {"code": "print(6 * 7)"}}\n</tool_call>',
        "The answer is \\boxed{42}.",
    )
    turns = [tokenizer.encode(turn + "<|im_end|>", add_special_tokens=False) for turn in turns]
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "6 * 7?"}]
    example = {"id": 0, "messages": messages, "answer": "42"}
    (t,) = run_blocking(
        rollouts([example], chat, ScriptedEngine(turns, tokenizer), box, Settings())
    )
    assert t.stop == "answered" and [m["role"] for m in t.messages][2:] == [
        "assistant",
        "tool",
        "assistant",
    ]
    ids, mask = chat.render(t.messages)
    end = len(t.ids)  # a conversation that goes on has the template's line break behind it
    assert (ids[:end], mask[:end]) == (t.ids, t.mask) and not any(mask[end:])
    assert sum(mask) == sum(map(len, turns))
    # cut in the middle of the first assistant turn: what is left of it is still trained
    cut = t.turn_starts[0] + 3
    left = Sample(ids[:cut], mask[:cut])
    assert train_sft.fit([Sample(ids, mask)], cut) == ([left], 1, 0)
    assert sum(mask[:cut]) == 3
    with pytest.raises(UserError, match="max_tokens = 4: in none of the 1 conversations"):
        train_sft.fit([Sample(ids, mask)], 4)


def test_the_sft_loss_does_not_depend_on_micro_batches(sft_run):
    """Pitfall 21: the mean over all trained tokens of the batch."""
    policy, tokenizer = models.load(str(sft_run[0]), "full", device="cpu")
    rng = random.Random(1)
    batch = []
    for length in (9, 5, 12, 3):
        ids = [rng.randrange(len(tokenizer)) for _ in range(length)]
        batch.append(Sample(ids, [0, 1] + [rng.randint(0, 1) for _ in range(length - 2)]))
    found = []
    for budget in (10**6, 1, 20):
        policy.zero_grad()
        metrics = train_sft.accumulate(policy, batch, budget)
        found.append((metrics, torch.cat([p.grad.flatten() for p in policy.parameters()])))
    for metrics, gradient in found[1:]:
        assert metrics == pytest.approx(found[0][0], rel=1e-5)
        assert (gradient - found[0][1]).norm() <= 1e-6 * found[0][1].norm()
    assert metrics["trained_tokens"] == sum(sum(sample.mask) for sample in batch)


def test_an_sft_run_leaves_a_config_metrics_curves_and_a_model_that_transformers_loads(sft_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out_dir, cfg, last = sft_run
    assert config.parse(train_sft.Config, ["--config", str(out_dir / "config.py")]) == cfg
    rows = run_page.read(out_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[-1]["loss"] < rows[0]["loss"]
    keys = {"step", "learning_rate", "loss", "entropy", "trained_tokens", "grad_norm", "seconds"}
    assert all(set(row) == keys for row in rows) and set(last) == keys
    assert rows[-1]["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert (out_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    tokenizer = AutoTokenizer.from_pretrained(out_dir)
    model = AutoModelForCausalLM.from_pretrained(out_dir)
    assert model.config.vocab_size == len(tokenizer) and tokenizer.eos_token == "<|im_end|>"
    assert [tokenizer.decode(i) for i in tokenizer.encode("42")] == ["4", "2"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


# GRPO


@pytest.mark.parametrize("run", ["full_run", "lora_run"])
def test_a_grpo_run_leaves_its_config_metrics_curves_and_rollouts(run, request):
    """Pitfall 2: ids, mask and logprobs of what is written are parallel."""
    out_dir, cfg, last = request.getfixturevalue(run)
    assert config.parse(train_grpo.Config, ["--config", str(out_dir / "config.py")]) == cfg
    assert (out_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = run_page.read(out_dir / "metrics.jsonl")
    expected = "step rollouts reward reward_none reward_spread accuracy equal_groups tool_call_rate"
    expected += " tool_calls tool_error_rate empty_observation_rate tool_seconds turns new_tokens"
    expected += " tokens loss grad_norm trained_share entropy clip_frac sampler_logprob_diff"
    expected += " learning_rate rollout_seconds sync_seconds seconds canary"
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert set(expected.split()) <= set(row)
        assert row["rollouts"] == 9 and row["learning_rate"] == 1e-2 and row["grad_norm"] > 0
        assert row["sampler_logprob_diff"] < 1e-5  # the weights that sample are those that train
        assert row["accuracy"] == row["reward_spread"] == row["reward"]
        assert sum(v for k, v in row.items() if k.startswith("stop_")) == pytest.approx(1)
        assert 0 <= row["rollout_seconds"] <= row["seconds"]
    assert rows[1]["reward"] == pytest.approx(last["reward"], rel=1e-5)
    written = [json.loads(line) for line in open(out_dir / "rollouts.jsonl")]
    assert [(r["step"], r["group"], r["sample"]) for r in written] == [
        (step, 0, sample) for step in (0, 1) for sample in (0, 1)
    ]
    for row in written:
        assert len(row["ids"]) == len(row["mask"]) == len(row["logprobs"]) and 1 in row["mask"]
        assert set(row["mask"]) == {0, 1} and row["mask"][row["turn_starts"][0]] == 1
        assert {"stop", "reward", "rewards", "answer", "messages", "calls", "text"} <= set(row)
        assert row["messages"][0] == {"role": "system", "content": SYSTEM}
    assert (rows[1]["clip_frac"] > 0) == (run == "full_run")  # its second update has a ratio


def test_full_weights_that_were_trained_load_and_differ_from_those_they_began_with(
    full_run, sft_run
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before, after = weights(sft_run[0]), weights(full_run[0])
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    tokenizer = AutoTokenizer.from_pretrained(full_run[0])
    pair = [AutoModelForCausalLM.from_pretrained(run[0]) for run in (full_run, sft_run)]
    assert not torch.allclose(*(logprobs_of(model, tokenizer) for model in pair), atol=1e-3)


def test_a_saved_adapter_is_loaded_by_peft_and_differs_from_its_base(lora_run, sft_run):
    """Pitfall 31: the adapter alone is saved, and the base is as it was."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out_dir = lora_run[0]
    settings = json.loads((out_dir / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(sft_run[0])
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    assert [file.name for file in out_dir.glob("*.safetensors")] == ["adapter_model.safetensors"]
    tokenizer = AutoTokenizer.from_pretrained(out_dir)
    base = AutoModelForCausalLM.from_pretrained(sft_run[0])
    plain = logprobs_of(base, tokenizer)
    adapted = PeftModel.from_pretrained(base, out_dir)
    trained = logprobs_of(adapted, tokenizer)
    assert not torch.allclose(trained, plain, atol=1e-3)
    with adapted.disable_adapter():
        assert torch.equal(logprobs_of(adapted, tokenizer), plain)
    ours, _ = models.load(str(out_dir), device="cpu")
    assert torch.equal(logprobs_of(ours, tokenizer), trained)


@pytest.mark.parametrize("run", ["full_run", "lora_run"])
def test_two_runs_of_one_seed_give_the_same_metrics_and_bits(run, request, folder):
    """Pitfall 52: whatever else has used torch's and python's generators before."""
    out_dir, cfg, _ = request.getfixturevalue(run)
    torch.manual_seed(99)
    random.seed(99)
    again = config.dataclasses.replace(cfg, out_dir=str(folder / f"again_{run}"))
    train_grpo.train(again)
    first, second = (run_page.read(d / "metrics.jsonl") for d in (out_dir, folder / f"again_{run}"))
    assert untimed(first) == untimed(second)
    one, other = weights(out_dir), weights(folder / f"again_{run}")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_another_seed_gives_other_rollouts(full_run, folder):
    """Pitfall 54."""
    _, cfg, _ = full_run
    other = config.dataclasses.replace(cfg, out_dir=str(folder / "seed1"), seed=1, steps=1)
    train_grpo.train(other)

    def ids(run):
        return [json.loads(line)["ids"] for line in open(run / "rollouts.jsonl")][:2]

    first, second = ids(full_run[0])
    assert first != second  # two samples of one prompt
    assert not {tuple(first), tuple(second)} & set(map(tuple, ids(folder / "seed1")))


def test_an_adapter_is_trained_on_from_where_it_stopped(lora_run, folder):
    """Pitfalls 25, 55: and not another one beside it, nor with a size that it has not."""
    cfg = grpo_config(folder, "more", tune="lora", model=str(lora_run[0]), steps=1)
    with pytest.raises(UserError, match="has lora_r = 4 and lora_alpha = 8, and training it"):
        train_grpo.train(cfg)  # 32 and 64, the defaults, would be in its config.py and not be true
    train_grpo.train(config.dataclasses.replace(cfg, lora_r=4, lora_alpha=8))
    before, after = weights(lora_run[0]), weights(folder / "more")
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    far = sum((after[k] - before[k]).norm() for k in before)
    assert 0 < far < sum(v.norm() for v in before.values())


def test_a_run_whose_rewards_are_all_equal_leaves_the_weights_as_they_were(folder, sft_run):
    """Pitfall 22: no optimizer step, not even one of momentum or decay."""
    rewards = (f"{folder / 'my_rewards.py'}:same",)
    cfg = grpo_config(folder, "equal", rewards=rewards)
    metrics = train_grpo.train(cfg)
    assert metrics["equal_groups"] == 1 and metrics["trained_share"] == metrics["grad_norm"] == 0
    before, after = weights(sft_run[0]), weights(folder / "equal")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_held_out_rows_are_played_on_the_way_and_change_nothing_that_is_learnt(
    full_run, folder, capsys
):
    """Before the first step, every eval_every steps and at the end; greedily, so twice the same."""
    plain = untimed(run_page.read(full_run[0] / "metrics.jsonl"))
    cfg = grpo_config(folder, "held out", updates_per_batch=2, eval_every=1, eval_rows=4)
    train_grpo.train(cfg)
    rows = untimed(run_page.read(folder / "held out" / "metrics.jsonl"))
    found = [{k: row.pop(k) for k in list(row) if k.startswith("val_")} for row in rows]
    assert rows == plain
    bits = [weights(path) for path in (full_run[0], folder / "held out")]
    assert all(torch.equal(bits[0][name], bits[1][name]) for name in bits[0])
    keys = {"val_accuracy", "val_reward", "val_tool_call_rate"}
    assert len(found) == 2 and all(set(row) == keys for row in found)
    said = capsys.readouterr().out
    assert said.count("val_accuracy 0.") == 3 and "val_accuracy:            0." in said
    own = evaluate.Config(seed=player.VALIDATION_SEED, limit=4, save_to=str(folder / "again"))
    first = evaluate.evaluate(evaluate.for_evaluation(cfg, own, cfg.model), own)
    assert first["avg@1"] == pytest.approx(found[0]["val_accuracy"])


def test_what_is_to_be_held_out_has_to_be_there(folder, sft_run, tmp_path):
    """Pitfall 55: a file has no split "test", and without eval_every nothing is played."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2+3?", "answer": 5}\n')
    data = {"data": str(tmp_path / "rows.jsonl"), "limit": None}
    with pytest.raises(UserError, match="eval_data is missing: data = .* is a file"):
        train_grpo.train(grpo_config(folder, "no split", **data, eval_every=1))
    with pytest.raises(UserError, match="eval_rows has no effect without eval_every"):
        train_grpo.train(grpo_config(folder, "no rows", eval_rows=3))


def test_every_row_is_a_prompt_once_an_epoch_in_an_order_of_the_seed():
    """Pitfall 52: also where a step reaches over the end of an epoch, or over several."""
    rows = [{"id": i} for i in range(7)]

    def ids(count, seed, steps):
        made = [mix.next_rows(step * count, rows, count, seed) for step in range(steps)]
        assert all(len(step) == count for step in made)
        return [row["id"] for step in made for row in step]

    for count in (1, 3, 7, 10, 20):
        seen = ids(count, 0, 42)
        epochs = [seen[i : i + 7] for i in range(0, len(seen) - 6, 7)]
        assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
        assert len(set(map(tuple, epochs))) > 1
        assert seen == ids(1, 0, 42 * count)  # the size of a step changes nothing
    assert ids(3, 0, 14) != ids(3, 1, 14)


@pytest.mark.parametrize("script", [train_grpo, train_sft])
def test_an_out_dir_that_holds_something_is_refused_at_once(script, tmp_path):
    (tmp_path / "model.safetensors").write_text("months of work")
    cfg = script.Config(out_dir=str(tmp_path), model="no/model")
    with pytest.raises(UserError, match="is not empty: give another with --out_dir="):
        script.train(cfg)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


# Evaluation


def evaluated(run, **options):
    own = evaluate.Config(**{"run": str(run), "limit": 4, **options})
    evaluate.check(own)
    return evaluate.evaluate(evaluate.load_config([], own), own)


@pytest.mark.parametrize("run", ["full_run", "lora_run"])
def test_a_run_is_evaluated_by_its_own_config_without_touching_other_generators(run, request):
    """Pitfall 51: n, seed and interval are reported; training's random numbers do not move."""
    out_dir, cfg, _ = request.getfixturevalue(run)
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    numbers = evaluated(out_dir, n=2, k=(1, 2), temperature=1.0, batch=3)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert numpy.array_equal(numpy.random.get_state()[1], states[2][1])

    saved = json.loads((out_dir / "eval" / "eval.json").read_text())
    assert saved == {k: v for k, v in numbers.items() if k != "saved"}
    assert numbers["saved"] == str(out_dir / "eval") and numbers["model"] == str(out_dir)
    assert (numbers["problems"], numbers["samples"], numbers["seed"]) == (4, 2, 1_000_000)
    assert {"avg@2", "pass@1", "pass@2", "maj@2", "ci95_low", "ci95_high"} <= set(numbers)
    written = [json.loads(line) for line in open(out_dir / "eval" / "rollouts.jsonl")]
    assert [(row["group"], row["sample"]) for row in written] == [
        (group, sample) for group in range(4) for sample in range(2)
    ]
    rewards = [row["rewards"]["spread"] for row in written]
    assert numbers["avg@2"] == pytest.approx(sum(rewards) / 8)
    right = [sum(x >= 1 for x in rewards[i : i + 2]) for i in range(0, 8, 2)]
    assert numbers["pass@2"] == pytest.approx(sum(x > 0 for x in right) / 4)
    assert numbers["ci95_low"] <= numbers["avg@2"] <= numbers["ci95_high"]


def test_evaluations_are_numbered_and_repeat(folder, sft_run):
    """Pitfall 51: the same problems, samples and numbers; nothing is overwritten."""
    cfg = grpo_config(folder, "numbered", steps=1)
    train_grpo.train(cfg)
    options = {"n": 2, "temperature": 1.0, "limit": 2}
    first, second = (evaluated(folder / "numbered", **options) for _ in range(2))
    third = evaluated(folder / "numbered", **options, seed=7)
    assert [r["saved"] for r in (first, second, third)] == [
        str(folder / "numbered" / name) for name in ("eval", "eval-2", "eval-3")
    ]

    def ids(numbers):
        return [json.loads(line)["ids"] for line in open(f"{numbers['saved']}/rollouts.jsonl")]

    assert ids(first) == ids(second) != ids(third) and ids(first)[0] != ids(first)[1]
    assert {**first, "saved": ""} == {**second, "saved": ""}


def test_what_the_runs_config_has_without_effect_here_is_no_obstacle(full_run, tmp_path):
    """As tool_timeout where a run is evaluated without its tools, for a baseline."""
    _, cfg, _ = full_run
    (tmp_path / "config.py").touch()
    given = {"tool_timeout": 3.0, "tool_concurrency": 4, "warmup": 2}
    config.save(replace(cfg, **given), tmp_path / "config.py")
    own = evaluate.Config(run=str(tmp_path))
    without = evaluate.load_config(["--tools=", "--model=x"], own)
    assert (without.tools, without.tool_timeout) == ((), 10.0)
    assert evaluate.load_config(["--model=x"], own).tool_timeout == 3.0
    with pytest.raises(UserError, match="tool_timeout has no effect with tools=()"):
        evaluate.load_config(["--tools=", "--tool_timeout=5", "--model=x"], own)


def test_an_evaluation_that_cannot_start_leaves_no_folder(full_run, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = config.dataclasses.replace(full_run[1], model=str(folder / "nowhere"))
    with pytest.raises(UserError, match="no such folder"):
        evaluate.evaluate(cfg, evaluate.Config())
    assert not any(tmp_path.iterdir())


def test_evaluation_can_be_saved_elsewhere_but_not_over_something(full_run, tmp_path):
    place = tmp_path / "here"
    assert evaluated(full_run[0], save_to=str(place), limit=1)["saved"] == str(place)
    names = ["eval.json", "rollouts.jsonl", "settings.json"]
    assert sorted(f.name for f in place.iterdir()) == names
    with pytest.raises(UserError, match="is not empty"):
        evaluated(full_run[0], save_to=str(place), limit=1)


def test_a_config_is_the_runs_then_the_files_then_the_command_lines(full_run, lora_run, tmp_path):
    (tmp_path / "other.py").write_text("max_turns = 7\nmodel = 'some/model'\nlimit = 3\n")
    own = evaluate.Config(run=str(full_run[0]), split="test")
    cfg = evaluate.load_config(["--config", str(tmp_path / "other.py"), "--max_tokens=99"], own)
    assert (cfg.max_turns, cfg.max_tokens, cfg.max_new_tokens) == (7, 99, 6)
    assert (cfg.model, cfg.split) == (str(full_run[0]), "test")
    assert evaluate.load_config(["--model=a/b"], own).model == "a/b"
    assert (cfg.temperature, cfg.seed) == (0.0, 1_000_000)
    own = evaluate.Config(run=str(lora_run[0]))
    assert evaluate.load_config([], own).model == str(lora_run[0])
    with pytest.raises(UserError, match="give the out_dir of a run"):
        evaluate.load_config([], evaluate.Config(run=str(tmp_path)))


def test_main_prints_a_table(full_run, tmp_path, capsys):
    argv = [
        f"--run={full_run[0]}",
        "--limit=2",
        f"--save_to={tmp_path / 'x'}",
        "--max_new_tokens=3",
    ]
    evaluate.main(argv)
    printed = capsys.readouterr().out
    assert "avg@1" in printed and "ci95_low" in printed and "max_new_tokens" not in printed
    row = json.loads(open(tmp_path / "x" / "rollouts.jsonl").readline())
    assert sum(row["mask"]) <= 3 * len(row["turn_starts"])


def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_sample():
    """Pitfall 51: by counting every choice of k of the n; fewer samples than k are refused."""
    for n in range(1, 8):
        for right in range(n + 1):
            samples = [1] * right + [0] * (n - right)
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(samples, k))
                share = sum(map(any, subsets)) / len(subsets)
                assert evaluate.pass_at_k(n, right, k) == pytest.approx(share, abs=1e-12)
    with pytest.raises(ValueError, match="pass@3 needs at least 3 samples, got 2"):
        evaluate.pass_at_k(2, 1, 3)


def test_the_interval_is_wilsons_for_right_and_wrong_and_the_normal_one_else():
    low, high = evaluate.interval([1.0] * 8 + [0.0] * 2)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert evaluate.interval([1.0] * 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert evaluate.interval([0.0] * 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    low, high = evaluate.interval([0.5, 1.0, 0.0, 0.5])
    half = 1.96 * math.sqrt((0.25 + 0.25) / 3 / 4)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half))
    low, high = evaluate.interval([-3.0, -1.0, -2.0, 2.5])  # a reward that is no probability
    assert low < -0.875 < high
    assert evaluate.interval([0.25]) == (0.25, 0.25)


def test_right_shares_fall_into_their_wilson_interval_about_95_times_in_100():
    for p, n in ((0.5, 40), (0.9, 40), (0.98, 100)):
        covered = 0.0
        for right in range(n + 1):
            low, high = evaluate.interval([1.0] * right + [0.0] * (n - right))
            chance = math.comb(n, right) * p**right * (1 - p) ** (n - right)
            covered += chance * (low <= p <= high)
        assert 0.92 < covered < 0.99


def test_the_majority_is_of_equal_answers_and_a_tie_goes_to_the_earlier():
    """Pitfall 51: 0.5 and 1/2 are one answer; who gives none has no vote."""
    assert evaluate.majority(["7", "0.5", "1/2"], [0.0, 1.0, 1.0]) == 1.0
    assert evaluate.majority(["7", "8", "8", "7"], [0.0, 1.0, 1.0, 0.0]) == 0.0
    assert evaluate.majority([None, None, None, "8"], [0.0, 0.0, 0.0, 1.0]) == 1.0
    assert evaluate.majority([None, None], [0.0, 0.0]) == 0.0


def test_a_summary_of_a_set_made_by_hand(monkeypatch):
    """Pitfall 51: avg, pass and maj at k, per problem."""
    monkeypatch.setattr(evaluate, "stats", lambda trajectories: {"turns": 1.0})
    monkeypatch.setattr(evaluate.reward_functions, "answer", lambda t, example: t.said)
    table = {
        0: [("7", 0.0), ("8", 1.0), ("8", 1.0)],
        1: [("7", 0.0), ("7", 0.0), ("9", 1.0)],
        2: [(None, 0.0), (None, None), ("3", 0.0)],
    }
    trajectories = [
        SimpleNamespace(
            group=g, said=said, rewards={"correct": value}, outcome=value, example={}, ids=[1]
        )
        for g, samples in table.items()
        for said, value in samples
    ]
    out = evaluate.summarize(trajectories, "correct", (1, 2, 3))
    counts = Counter({0: 2, 1: 1})
    assert (out["problems"], out["samples"], out["turns"]) == (3, 3, 1.0)
    assert out["avg@3"] == pytest.approx(3 / 9) and out["pass@1"] == pytest.approx(3 / 9)
    assert out["pass@2"] == pytest.approx((1 + (1 - 1 / 3) + 0) / 3)
    assert out["pass@3"] == pytest.approx(len(counts) / 3)
    assert out["maj@3"] == pytest.approx(1 / 3) and "maj@1" not in out
    assert out["maj@2"] == 0.0  # of the first two: 7 before 8, 7, and none


def summary(scores, ks=(1,), **options):
    """The numbers of {problem: values of the reward `correct`}; nobody called a tool."""
    trajectories = []
    for group, values in scores.items():
        for value in values:
            made = Trajectory({"messages": [], "answer": "7"}, group, stop="answered")
            made.rewards = {"correct": value}
            made.reward = value
            trajectories.append(made)
    return evaluate.summarize(trajectories, "correct", ks, **options)


@pytest.mark.parametrize(
    "scores, average, passed, not_graded",
    [
        ({0: [1.0], 1: [None], 2: [1.0], 3: [None]}, 1.0, 1.0, 2),
        ({0: [1.0], 1: [0.0], 2: [None]}, 0.5, 0.5, 1),
        ({0: [None, 1.0], 1: [0.0, 0.0], 2: [None, None]}, 0.5, 0.5, 3),
        ({0: [None, 1.0], 1: [0.0, 1.0], 2: [1.0, 1.0]}, 2.5 / 3, 2.5 / 3, 1),
        ({0: [-1.0], 1: [None]}, -1.0, 0.0, 1),
        ({0: [None], 1: [None]}, None, None, 2),
    ],
)
def test_what_was_not_graded_is_in_no_mean(scores, average, passed, not_graded):
    """A12: a None is no 0, in none of the numbers, and how many there are is said."""
    numbers = summary(scores)
    samples = len(scores[0])
    assert numbers[f"avg@{samples}"] == numbers["accuracy"] == pytest.approx(average)
    assert numbers["pass@1"] == pytest.approx(passed)
    assert (numbers["not_graded"], numbers["problems"]) == (not_graded, len(scores))
    if average is None:
        assert numbers["ci95_low"] is numbers["reward"] is numbers["reward_correct"] is None
        evaluate.table(numbers | {"model": "m", "data": "d"})
    else:
        assert numbers["ci95_low"] <= average <= numbers["ci95_high"]


def test_the_majority_is_of_what_was_graded(monkeypatch):
    """A12."""
    monkeypatch.setattr(evaluate.reward_functions, "answer", lambda t, example: "7")
    scores = {0: [None, 1.0], 1: [None, None], 2: [1.0, 1.0], 3: [0.0, 0.0]}
    assert summary(scores, (2,))["maj@2"] == pytest.approx(2 / 3)


def test_from_which_reward_a_sample_passes_is_named(capsys):
    """A13: 0.95 of a judge is right for some, wrong for others."""
    scores = {0: [0.95], 1: [0.5], 2: [1.0]}
    assert summary(scores)["pass@1"] == pytest.approx(1 / 3)
    assert summary(scores, pass_at=0.95)["pass@1"] == pytest.approx(2 / 3)
    assert summary(scores, pass_at=0.5)["pass@1"] == 1.0
    numbers = summary({0: [0.5, 1.0], 1: [0.2, 0.95]}, (1, 2), pass_at=0.9)
    assert (numbers["pass@1"], numbers["pass@2"], numbers["pass_at"]) == (0.5, 1.0, 0.9)
    evaluate.table(numbers | {"model": "m", "data": "d"})
    assert "pass@2 (reward >= 0.9)" in capsys.readouterr().out
    with pytest.raises(UserError, match="pass_at = nan: expected a number"):
        evaluate.check(evaluate.Config(pass_at=math.nan))


def test_a_run_is_evaluated_on_the_rows_that_it_holds_out(tmp_path):
    """A21: not on those it was trained on, unless they are asked for; then that is said."""
    for name in ("train", "held_out", "else"):
        (tmp_path / f"{name}.jsonl").touch()
    rows = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "held_out", "else")}
    run = tmp_path / "run"
    run.mkdir()

    def evaluated_rows(argv, **options):
        cfg = train_grpo.Config(data=rows["train"], **options)
        (run / "config.py").unlink(missing_ok=True)
        config.save(cfg, run / "config.py")
        cfg = evaluate.load_config(argv, evaluate.Config(run=str(run)))
        return Path(cfg.data).stem, evaluate.origin_of_rows(cfg)

    held_out = {"eval_every": 5, "eval_data": rows["held_out"]}
    assert evaluated_rows([], **held_out) == ("held_out", "held out by its run")
    assert evaluated_rows(["--model=x/y"], **held_out) == ("held_out", "")
    asked_for = [f"--data={rows['train']}"]
    assert evaluated_rows(asked_for, **held_out) == ("train", "those it was trained on")
    assert evaluated_rows([f"--data={rows['else']}"], **held_out) == ("else", "")
    assert evaluated_rows([]) == ("train", "those it was trained on")
    (tmp_path / "else.py").write_text(f"data = {rows['else']!r}\n")
    other = ["--config", str(tmp_path / "else.py")]
    assert evaluated_rows(other, **held_out) == ("else", "")
    text = f"data = {rows['else']!r}\neval_every = 2\neval_data = {rows['train']!r}\n"
    (tmp_path / "else.py").write_text(text)
    assert evaluated_rows(other, **held_out) == ("train", "those it was trained on")


def test_a_tasks_and_a_hub_sets_training_rows_are_named_too(tmp_path):
    """A21."""
    config.save(train_grpo.Config(data="a/b"), tmp_path / "config.py")
    cfg = train_grpo.Config(data="a/b", model=str(tmp_path))
    assert evaluate.origin_of_rows(replace(cfg, split="test")) == ""
    assert evaluate.origin_of_rows(replace(cfg, split="train")) == "those it was trained on"
    (tmp_path / "config.py").unlink()
    config.save(train_grpo.Config(data="task:calc"), tmp_path / "config.py")
    cfg = replace(cfg, data="task:calc", split="train", seed=0)
    assert evaluate.origin_of_rows(cfg) == "those it was trained on"
    assert evaluate.origin_of_rows(replace(cfg, seed=1)) == ""  # they are other ones


def test_the_table_names_the_rows_it_was_trained_on(full_run, tmp_path, capsys):
    """A21."""
    cfg = replace(full_run[1], model=str(full_run[0]), temperature=0.0, limit=1)
    evaluate.table(evaluate.evaluate(cfg, evaluate.Config(limit=1, save_to=str(tmp_path / "x"))))
    assert "those it was trained on" in capsys.readouterr().out


def no_room(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("what", ["fsync", "replace", "write_rollouts", "torn", "large"])
def test_a_full_disk_ends_no_evaluation_and_leaves_no_half_file(
    full_run, tmp_path, capsys, monkeypatch, what
):
    """B9: the numbers are printed, one sentence says what is missing, no file is of 0 bytes."""
    place = tmp_path / "x"
    whole = run_log.write_rollouts

    def torn(path, trajectories, *rest, **columns):
        whole(path, trajectories, *rest, **columns)
        raise OSError(errno.ENOSPC, "No space left on device")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if what == "fsync":
        monkeypatch.setattr(evaluation.os, "fsync", no_room)
    elif what == "replace":
        monkeypatch.setattr(evaluation.Path, "replace", no_room)
    elif what == "large":  # a real one: no file may have more than 100 bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    else:
        monkeypatch.setattr(run_log, "write_rollouts", torn if what == "torn" else no_room)
    try:
        with pytest.raises(UserError, match="could not be written.*whole as printed") as caught:
            evaluate.main([f"--run={full_run[0]}", "--limit=2", f"--save_to={place}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    can_go_on = "--resume=true" in str(caught.value)
    assert can_go_on == (place / "settings.json").exists()
    assert can_go_on == (what in ("write_rollouts", "torn"))
    assert "avg@1" in capsys.readouterr().out
    for file in place.iterdir():
        lines = file.read_text()
        if file.name == "eval.json":
            assert json.loads(lines)["problems"] == 2
        elif file.name == "settings.json":
            assert json.loads(lines)["problems"] == 2
        else:
            assert file.name == "rollouts.jsonl"
            assert len([json.loads(line) for line in lines.splitlines()]) in (0, 2)


def test_what_a_full_disk_did_not_take_is_written_when_there_is_room(
    full_run, tmp_path, monkeypatch
):
    """B9: as when an evaluation ends in its middle, all that was played is there."""
    place = tmp_path / "x"
    whole = run_log.write_rollouts
    batches = []

    def at_first_full(path, trajectories, *rest, **columns):
        batches.append(len(trajectories))
        if len(batches) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(path, trajectories, *rest, **columns)

    monkeypatch.setattr(run_log, "write_rollouts", at_first_full)
    numbers = evaluated(full_run[0], limit=3, batch=1, save_to=str(place))
    assert batches == [1, 1, 1, 1] and "not_saved" not in numbers
    rows = [json.loads(line) for line in open(place / "rollouts.jsonl")]
    assert [row["group"] for row in rows] == [0, 1, 2]


def graded(rewards, ids=(1,), group=0):
    t = Trajectory({"answer": "1"}, group=group, stop="answered")
    t.add(list(ids), 0)
    t.rewards = dict(rewards)
    t.reward = sum(rewards.values())
    return t


def rows_of(table: str) -> list[str]:
    """The names in the first column."""
    lines = [line.split() for line in table.splitlines() if line.startswith(("│", "|"))]
    return [words[1] for words in lines]


@pytest.mark.parametrize(
    "rewards, gone",
    [
        ({"correct": 1.0}, {"accuracy", "reward", "pass@1", "reward_correct"}),
        ({"correct": 1.0, "format": 1.0}, {"accuracy", "pass@1", "reward_correct"}),
        ({"correct": 0.5}, {"accuracy", "reward", "reward_correct"}),
        ({"correct": 0.5, "format": 0.5}, {"accuracy", "reward_correct"}),
    ],
)
def test_the_table_says_a_number_once_and_the_file_has_all_names(rewards, gone, capsys):
    """D6: it was there under five names."""
    numbers = evaluate.summarize([graded(rewards)], "correct", (1,))
    evaluate.table({"model": "m", "data": "d"} | numbers)
    shown = rows_of(capsys.readouterr().out)
    assert "avg@1" in shown and "outcome" in shown
    assert set(numbers) - set(shown) == gone | {"pass_at"}
    assert numbers["accuracy"] == numbers["avg@1"] == rewards["correct"]


def test_tokens_that_nobody_sees_are_no_number(capsys):
    """D6: an API's rollouts had `tokens 0`."""
    numbers = evaluate.summarize([graded({"correct": 1.0}, ids=())], "correct", (1,))
    assert "tokens" not in numbers and "new_tokens" in numbers
    assert "tokens" in evaluate.summarize([graded({"correct": 1.0})], "correct", (1,))


def test_memory_of_the_gpu_is_logged_for_each_phase(monkeypatch):
    """Pitfall 33: what all processes have, and this one's peak on top; nothing without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert optim.gpu_gib("rollout") == {}
    gib, resets = 2**30, []
    fakes = {"is_available": True, "mem_get_info": (6 * gib, 16 * gib)}
    fakes |= {"max_memory_reserved": 5 * gib, "memory_reserved": 2 * gib}
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(1))
    assert optim.gpu_gib("learn") == {"gpu_gib_learn": 13.0} and resets == [1]

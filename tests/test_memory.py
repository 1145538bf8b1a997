"""What --fits=80 says of a GPU's memory is what a run takes.

    pytest tests/test_memory.py

Measured is the memory of a process of its own (bench/memory.py), which does not depend on how busy
the machine is. What only a GPU has is not: see bench/gpu.py.
"""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import train_grpo
import train_sft
from learning import memory
from learning.memory import GIB, Setup
from run import config
from run.config import UserError
from tasks import tiny as tiny_model


def loaded(path):
    """bench/memory.py and dev/memory.py, which have one name."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), Path(config.HERE) / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


bench = loaded("bench/memory.py")
table = loaded("dev/memory.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("shape")
    bench.write_config("2m", made)
    return made


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    made = tmp_path_factory.mktemp("7B")
    table.write_config("7B", made)
    return made


def setup_of(folder, **values):
    return Setup.of(train_grpo.Config(model=str(folder), **values), engine_options=object())


def learning(setup):
    return memory.needs(setup, 0.0, on_gpu=False)["learn"]


# ---- against what is measured, and what is published


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured by Linux's /proc")
@pytest.mark.parametrize("setting", ["full", "lora, recomputed"])
def test_what_is_computed_is_within_15_percent_of_what_a_process_takes(setting):
    computed, measured = bench.case("2m", setting, bench.Config())
    assert abs(computed / measured - 1) < 0.15
    assert computed > 50 * 2**20  # large beside what else a process does


def test_the_evidence_has_five_sizes_and_is_within_15_percent():
    text = (Path(config.HERE) / "evidence" / "bench" / "memory.txt").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith(tuple(bench.SIZES))]
    sizes_of = {}  # setting: sizes
    for row in rows:
        sizes_of.setdefault(row[7:28].strip(), set()).add(row.split()[0])
    assert sizes_of["full"] == sizes_of["lora"] == set(bench.SIZES)
    assert set(sizes_of) == set(bench.SETTINGS)
    assert min(map(len, sizes_of.values())) >= 3
    offs = [abs(float(row.split()[-1].rstrip("%"))) for row in rows]
    assert max(offs) < 15
    page = (Path(config.HERE) / "docs" / "memory.md").read_text(encoding="utf-8")
    assert f"{len(rows)} cases, at most {max(offs):.1f} % off" in page


@pytest.mark.parametrize(
    "name, billions",
    [("0.5B", 0.49), ("1.5B", 1.54), ("3B", 3.09), ("7B", 7.61), ("14B", 14.7), ("32B", 32.5)],
)
def test_there_are_as_many_parameters_as_qwens_model_cards_say(name, billions, tmp_path):
    table.write_config(name, tmp_path)
    counted = memory.count(setup_of(tmp_path))
    assert counted.base_numbers / 1e9 == pytest.approx(billions, rel=0.01)


def test_weights_gradients_and_moments_are_those_of_the_zero_paper(folder):
    """arXiv:1910.02054, section 3 and figure 1: 16 bytes a parameter, of which ZeRO-1 on 64 GPUs
    shares out 12: 120 GB and 31.4 GB for 7.5 B parameters."""
    bytes_each = 16
    parts = learning(setup_of(folder, dtype="mixed"))
    numbers = memory.count(setup_of(folder)).base_numbers
    states = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert states == bytes_each * numbers

    sharded = replace(setup_of(folder, dtype="bfloat16"), parallel="deepspeed", gpus=64)
    parts = learning(sharded)
    states = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert states / numbers * 7.5 == pytest.approx(31.4, abs=0.05)


# ---- what is counted


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"gradient_checkpointing": True, "dtype": "mixed"},
        {"tune": "lora", "dtype": "bfloat16"},
    ],
    ids=["full", "recomputed, mixed", "lora"],
)
def test_a_few_layers_say_what_all_of_them_hold(folder, values, monkeypatch):
    setup = setup_of(folder, max_tokens=128, token_budget=512, **values)
    assert memory._depths(setup.model) == [4, 2, 3]
    quick = memory.count_pass(setup), memory.cache_bytes(setup.model, setup.dtype, 64)
    monkeypatch.setattr(memory, "_depths", lambda model: [4, 4])
    memory.cache_bytes.cache_clear()
    assert quick == (memory.count_pass(setup), memory.cache_bytes(setup.model, setup.dtype, 64))


def test_keys_and_values_of_a_trajectory(folder):
    """2m: 4 layers with 2 heads of 64 numbers, float32."""
    assert memory.cache_bytes(str(folder), "float32", 100) == 100 * 4 * 2 * 2 * 64 * 4


def test_each_setting_that_saves_memory_is_seen_to(folder):
    base = setup_of(folder, max_tokens=512, token_budget=4096)
    total = sum(learning(base).values())
    for values in (
        {"token_budget": 2048},
        {"gradient_checkpointing": True},
        {"tune": "lora"},
        {"dtype": "bfloat16"},
        {"optimizer": "adamw8bit"},
    ):
        assert sum(learning(replace(base, **values)).values()) < total, values


def test_shards(folder):
    one = learning(setup_of(folder))
    eight = learning(replace(setup_of(folder), parallel="fsdp", gpus=8))
    assert eight["optimizer"] == one["optimizer"] / 8
    # whole while passes are made, with its share beside it
    assert eight["weights"] == pytest.approx(one["weights"] * 9 / 8)
    assert learning(replace(setup_of(folder), parallel="ddp", gpus=8)) == one


def test_the_largest_micro_batch(folder):
    """As long as trajectories may be; a longer one than the budget is alone."""
    setup = setup_of(folder, max_tokens=1000, token_budget=4096)
    assert setup.batch_shape == (5, 819)
    assert replace(setup, max_tokens=8192).batch_shape == (1, 8192)


def test_vllm_takes_its_share_and_sleeps_while_the_policy_learns(folder):
    setup = setup_of(folder, gpu_memory_utilization=0.4)
    setup = replace(setup, engine="vllm", sleeps=True)
    phases = memory.needs(setup, 10)
    assert phases["rollout"][memory.ENGINE] == pytest.approx(4 * GIB)
    assert phases["learn"][memory.ENGINE] == memory.ASLEEP
    awake = memory.needs(replace(setup, sleeps=False), 10)
    assert awake["learn"][memory.ENGINE] == pytest.approx(4 * GIB)


def family(name):
    """The config of a tiny model of another make."""
    import transformers

    if name == "mamba":
        return transformers.MambaConfig(
            vocab_size=512,
            hidden_size=64,
            num_hidden_layers=4,
            state_size=8,
            architectures=["MambaForCausalLM"],
        )
    if name == "sees":
        words = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 8
        return tiny_model.config_that_sees(tiny_model.tiny_tokenizer(words, [], sees=True))
    return transformers.Gemma3TextConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=7,  # the sixth sees all
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=32,
        architectures=["Gemma3ForCausalLM"],
    )


@pytest.mark.parametrize("name, layers", [("mamba", 4), ("sees", 3), ("gemma3", 7)])
def test_other_families_are_counted(name, layers, tmp_path):
    """States, a tower, layers of two kinds: those are counted with all of them."""
    family(name).save_pretrained(tmp_path)
    setup = setup_of(tmp_path, tune="lora", max_tokens=64, token_budget=256)
    parts = learning(setup)
    assert min(parts["weights"], parts["adapters"], parts["activations"]) > 0
    assert memory.cache_bytes(str(tmp_path), "float32", 64) > 0
    if name == "gemma3":
        assert memory._depths(str(tmp_path)) == [layers, layers]


# ---- what is said


def test_a_config_is_told_what_to_change_until_it_fits(seven, capsys):
    """aime.py is for 80 GiB; with 16,384 tokens of a pass kept, and not recomputed, it is not."""
    keys = ["--config", "aime.py", f"--model={seven}", "--fits=80"]
    train_grpo.main([*keys, "--gradient_checkpointing=false"])
    said = capsys.readouterr().out
    assert "it does not fit: learn takes" in said
    assert "--gradient_checkpointing=true" in said
    assert "with all of these it fits 80 GiB" in said
    train_grpo.main([*keys, "--gradient_checkpointing=true"])
    assert "it fits: " in capsys.readouterr().out


def test_sft_is_asked_alike(folder, capsys):
    """And a card on which CUDA itself has no room is told so."""
    train_sft.main(["--config", "sft_gsm8k.py", f"--model={folder}", "--fits=0.5"])
    said = capsys.readouterr().out
    assert "no setting that is known here fits 0.5 GiB" in said
    assert "rollout" not in said.splitlines()[2]


@pytest.mark.parametrize("value", ["", "0", "-1", "big"])
def test_a_card_of_no_size_is_refused(value):
    with pytest.raises(UserError, match="write --fits=80"):
        train_grpo.main([f"--fits={value}"])


def test_a_model_that_is_not_at_hand_is_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        train_grpo.main([f"--model={tmp_path}/none", "--fits=80"])


# ---- the page


def test_the_rows_of_the_page_are_what_is_computed_today():
    page = (Path(config.HERE) / "docs" / "memory.md").read_text(encoding="utf-8")
    written = [line for line in page.splitlines() if line.startswith("| 1.5B | ")]
    assert written == table.rows_of("1.5B")

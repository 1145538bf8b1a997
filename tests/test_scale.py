"""The simulation of docs/scale.md, and the commands of that page for several machines.

    pytest tests/test_scale.py

bench/scale.py simulates from what was measured on a CPU and what stands in datasheets; its figures
in the page are those of evidence/bench/scale.json, and are simulated again here.
"""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import train_grpo
import train_sft
from run import config

ROOT = Path(config.HERE)
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
EVIDENCE = json.loads((ROOT / "evidence" / "bench" / "scale.json").read_text(encoding="utf-8"))

spec = importlib.util.spec_from_file_location("bench_scale", ROOT / "bench" / "scale.py")
scale = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = scale
spec.loader.exec_module(scale)

HOST = EVIDENCE["host"]
CONFIG = EVIDENCE["config"]
SMALL = scale.Config(prompts_per_step=16, group_size=4)


def seconds(name, gpus, cfg=SMALL):
    return scale.simulate(name, gpus, scale.episodes(cfg), HOST, cfg)


# ---- the simulation


def test_one_trajectory_takes_its_tokens_and_its_calls():
    cfg = scale.Config(prompts_per_step=1, group_size=1)
    episode = scale.Episode(turns=[10, 20], calls=[2.0])
    model = scale.MODELS["0.6B"]
    mean = episode.tokens(cfg) / 2
    prompts = 2 * model.numbers * (cfg.prompt_tokens + cfg.result_tokens)
    read = prompts / (scale.PRODUCTS * scale.PRODUCTS_SHARE)
    expected = read + 30 * scale.token_seconds(model, 1, mean, 1) + 2.0
    assert scale.play(model, [episode], cfg, 1) == pytest.approx(expected)


def test_calls_wait_for_a_free_place():
    """Four calls of a second, one at a time: the last ends four seconds after the first began."""
    group = [scale.Episode(turns=[1, 1], calls=[1.0]) for _ in range(4)]
    model = scale.MODELS["0.6B"]
    apart = scale.play(model, group, scale.Config(tool_concurrency=1, group_size=4), 1)
    together = scale.play(model, group, scale.Config(tool_concurrency=4, group_size=4), 1)
    assert apart - together == pytest.approx(3.0, abs=0.05)


def test_a_call_does_not_slow_down_who_decodes_meanwhile():
    """A long turn and a long call beside it end when the longer one does."""
    group = [
        scale.Episode(turns=[2000]),
        scale.Episode(turns=[1, 1], calls=[1.0]),
    ]
    model = scale.MODELS["0.6B"]
    alone = scale.play(model, group[:1], scale.Config(group_size=1), 1)
    both = scale.play(model, group, scale.Config(group_size=1), 1)
    assert both == pytest.approx(alone, rel=0.05)


def test_more_gpus_are_never_slower_to_play_and_never_quicker_than_the_slowest_trajectory():
    slowest = max(sum(e.calls) for group in scale.episodes(SMALL) for e in group)
    before = None
    for gpus in (1, 2, 4, 8, 16):
        parts = seconds("7B", gpus)
        assert parts["play"] > slowest
        if before:
            assert parts["play"] <= before["play"] * 1.01
            assert parts["passes"] < before["passes"]
        before = parts


def test_gradients_go_over_the_network_when_there_is_a_second_machine():
    assert seconds("0.6B", 16)["reduce"] > 5 * seconds("0.6B", 8)["reduce"]
    assert seconds("0.6B", 1)["reduce"] == 0


def test_a_model_that_needs_servers_has_none_on_two_gpus():
    assert seconds("32B", 2) is None and seconds("32B", 4) is not None


def test_what_is_measured_on_this_host():
    cfg = scale.Config(prompts_per_step=2, group_size=2)
    host = scale.measure_host(cfg, runs=1)
    tokens = sum(e.tokens(cfg) for group in scale.episodes(cfg) for e in group) / 4
    assert host["bytes"] > 2 * tokens  # ids, a mask and logprobs
    assert host["plan_seconds"] >= 0 and host["pickle_seconds"] >= 0


# ---- the page


def test_the_evidence_is_what_is_simulated_today():
    cfg = scale.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in CONFIG.items()})
    assert scale.rows_of(HOST, cfg) == [
        {key: pytest.approx(value) for key, value in row.items()} for row in EVIDENCE["rows"]
    ]


def row_of_page(begins):
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {begins} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize("name", scale.MODELS)
def test_the_figures_of_the_page_are_those_of_the_evidence(name):
    rows = {row["gpus"]: row for row in EVIDENCE["rows"] if row["model"] == name}
    _, how, *cells = row_of_page(name)
    assert len(cells) == len(CONFIG["gpus"]) and how
    for gpus, cell in zip(CONFIG["gpus"], cells, strict=True):
        if gpus not in rows:
            assert cell == "-"
            continue
        row = rows[gpus]
        assert cell == f"{row['seconds']:.0f} ({row['play']:.0f})"


def test_more_trajectories_beside_the_slowest_one():
    cfg = scale.Config(prompts_per_step=512)
    groups = scale.episodes(cfg)
    totals = []
    for gpus in (8, 64):
        totals.append(sum(scale.simulate("0.6B", gpus, groups, HOST, cfg).values()))
    assert f"0.6B goes from {totals[0]:.0f} s on 8 GPUs to {totals[1]:.0f} s on 64" in PAGE


@pytest.mark.parametrize("name", scale.MODELS)
def test_what_travels_is_computed(name):
    cfg = scale.Config()
    _, *cells = row_of_page(f"{name}, 64 GPUs")
    sent = scale.travels(name, 64, HOST, cfg)
    expected = [f"{value / 1e9:.2g} GB" for value in sent.values()]
    assert [cell for cell in cells if cell != "-"] == expected


def torchruns():
    """The arguments of every torchrun of the page."""
    fenced = "\n".join(re.findall(r"^```bash\n(.*?)^```", PAGE, re.S | re.M))
    found = []
    for line in fenced.replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r"\$\(.*?\)", "node0", line), comments=True)
        if "torchrun" in words:
            found.append(words[words.index("torchrun") + 1 :])
    return found


@pytest.mark.parametrize("words", torchruns(), ids=" ".join)
def test_a_command_for_several_machines_is_well_formed(words, monkeypatch):
    monkeypatch.setenv("RANK", "0")  # as each of its processes has
    asked = get_args_parser().parse_args(words)
    script = {"train_grpo.py": train_grpo, "train_sft.py": train_sft}[asked.training_script]
    cfg = config.parse(script.Config, asked.training_script_args, script.check)
    assert cfg.parallel != "none" and cfg.gpus == 1


def test_there_are_commands_for_two_and_for_eight_machines():
    machines = {words[words.index("--nnodes") + 1] for words in torchruns()}
    assert {"2", "8"} <= machines

"""What only a GPU can show: vLLM's sleep gives its memory back, weights go over by CUDA IPC.

    pytest tests/test_gpu.py        # on a machine with a GPU and pip install -e ".[vllm]"

The measuring is that of bench/gpu.py, which prints the same as a table. Where there is no GPU its
rehearsal is tested: the code that will run there, with tiny shapes.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch

import train_grpo
from learning import memory
from run import config
from run.config import UserError

sys.path.insert(0, str(Path(config.HERE) / "bench"))

import gpu

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("vllm") is None,
    reason="needs a GPU and vLLM: not run on a CPU",
)


@needs_gpu
@pytest.mark.vllm
@pytest.mark.parametrize("tune", ["full", "lora", "qlora"])
def test_sleep_gives_the_memory_back_and_each_version_arrives(tune, tmp_path):
    """Pitfalls 28, 30 and 33: versions 0, 1 and 2 with a sleep before each."""
    name = gpu.random_model(tmp_path)
    row = gpu.measure(name, tune, gpu.Config(dtype="bfloat16"))
    assert max(row[f"differs, {version}"] for version in range(3)) < 0.1
    assert row["asleep"] < row["awake"] - 1
    assert abs(row["awake again"] - row["awake"]) < 1


def test_without_a_gpu_the_bench_says_so(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here, and the bench would run on it")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(config.HERE) / "bench" / "gpu.py"), run_name="__main__")
    assert ended.value.code == 2 and "there is no GPU here" in capsys.readouterr().err


# ---- the rehearsal


REHEARSAL = gpu.Config(cpu=True, parts=("parity", "learn"))


def test_parity_and_an_update_are_measured():
    row = gpu.one_case("parity", REHEARSAL)
    assert row["device"] == "cpu" and row["logprob differs"] == row["gradient differs"] == 0
    row = gpu.one_case("learn:tiny:lora, bfloat16, recomputed", REHEARSAL)
    assert row["GiB computed"] > row["of tensors"] > 0
    assert row["tokens/s"] > 0 and row["grad_norm"] > 0


def test_a_part_that_fails_is_reported_and_the_others_go_on(monkeypatch, capsys, tmp_path):
    """As main runs them, with parts that end as processes do."""
    endings = {
        "parity": "raise SystemExit('error: no kernel for this card')",
        "learn:tiny:full, bfloat16": 'print(\'{"shape": "tiny", "tokens/s": 12.345}\')',
        "learn:tiny:full": 'print(\'{"skipped": "larger than the card"}\')',
    }
    monkeypatch.setattr(gpu, "cases", lambda cfg: list(endings))
    monkeypatch.setattr(gpu, "command_of", lambda case, cfg: [sys.executable, "-c", endings[case]])
    page = tmp_path / "result.md"
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--cpu=true", "--parts=parity,learn", f"--save_to={page}"])
    assert ended.value.code == 1
    text = page.read_text()
    assert text in capsys.readouterr().out
    assert "- parity: failed: error: no kernel for this card" in text
    assert "- learn:tiny:full: skipped: larger than the card" in text
    assert "| shape | tokens/s |\n|---|---|\n| tiny | 12.3 |" in text
    assert "a rehearsal on a CPU" in text


def test_a_part_that_does_not_end_is_ended(monkeypatch):
    forever = [sys.executable, "-c", "import time; time.sleep(3600)"]
    monkeypatch.setattr(gpu, "command_of", lambda case, cfg: forever)
    monkeypatch.setattr(gpu, "PATIENCE", 0.1)
    assert gpu.run_case("parity", REHEARSAL, 60.0) == {"failed": "took more than 0 s"}


def test_what_has_not_begun_in_time_is_skipped(monkeypatch):
    monkeypatch.setattr(gpu, "command_of", lambda case, cfg: pytest.fail("it is not run"))
    row = gpu.run_case("vllm:full", REHEARSAL, -1.0)
    assert row == {"skipped": "the 15 minutes were over: --parts=… runs some of them"}


def test_its_cases_are_those_of_the_parts_that_are_asked_for():
    every = gpu.cases(gpu.Config())
    assert len(every) == 1 + 2 * len(gpu.SETTINGS) + 3 + 2
    assert gpu.cases(gpu.Config(parts=("ranks",))) == ["ranks:ddp", "ranks:fsdp"]
    with pytest.raises(UserError, match="there is no 'speed'"):
        gpu.check(gpu.Config(cpu=True, parts=("speed",)))


@pytest.mark.parametrize("shape, billions", [("Qwen3-0.6B", 0.6), ("Qwen3-4B", 4.0)])
def test_the_shapes_are_those_of_the_model_cards(shape, billions, tmp_path):
    gpu.write_shape(shape, tmp_path)
    setup = memory.Setup.of(train_grpo.Config(model=str(tmp_path)), engine_options=object())
    assert memory.count(setup).base_numbers / 1e9 == pytest.approx(billions, rel=0.02)

"""What only a GPU can show: vLLM's sleep gives its memory back, weights go over by CUDA IPC.

    pytest tests/test_gpu.py        # on a machine with a GPU and pip install -e ".[vllm]"

The measuring is that of bench/gpu.py, which prints the same as a table.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch

from run import config

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

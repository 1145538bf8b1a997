"""What only a GPU can show, in one table: vLLM's sleep, weights handed over by CUDA IPC, bfloat16.

    python bench/gpu.py                                        # a random model of 100 M parameters
    python bench/gpu.py --model=Qwen/Qwen2.5-0.5B-Instruct

For adapters and for full weights: the memory of the GPU while vLLM samples, sleeps and is awake
again; seconds of a sync; by how much its logprobs differ from the trainer's after versions 0, 1 and
2, with the sleep in between; tokens per second. tests/test_gpu.py asserts the same. Where there is
no GPU it says so and ends with exit code 2.
"""

import asyncio
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)

import torch

from engines import vllm as vllm_engine
from engines.base import Sampling
from engines.canary import Canary, sync_and_check
from learning import model as models
from run.config import UserError
from run.loop import run_blocking
from tasks import tiny as tiny_model


@dataclass
class Config:
    model: str = ""  # a folder or hub id; "" makes a random one of about 100 M parameters
    dtype: str = "bfloat16"  # or float32
    gpu_memory_utilization: float = 0.4  # what vLLM takes of the GPU
    requests: int = 256  # turns of 128 tokens, for tokens per second


def random_model(folder: Path) -> str:
    """Writes a Qwen3-shaped model of 100 M parameters, with the tokenizer of the tiny tasks."""
    conversation = [
        {"role": "user", "content": "what is 1 + 2?"},
        {"role": "assistant", "content": "3"},
    ]
    tokenizer = tiny_model.tiny_tokenizer([conversation] * 64, [])
    model = tiny_model.tiny(tokenizer, 0, hidden_size=1024, layers=8, heads=16)
    models.save(model, tokenizer, folder)
    return str(folder)


def used_gib() -> float:
    """Returns what is used of the whole GPU, by all processes."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def nudge(model, seed: int) -> None:
    """Moves every trained weight by about a hundredth of its size, as an update would."""
    generator = torch.Generator(model.device).manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                noise = torch.randn(weight.shape, generator=generator, device=weight.device)
                weight.add_((0.01 * weight.abs().mean() + 1e-3) * noise.to(weight.dtype))


def measure(name: str, tune: str, cfg: Config) -> dict:
    """Measures one row of the table; raises if an engine has other weights than the trainer."""
    model, tokenizer = models.load(name, tune, cfg.dtype, lora_r=16, lora_alpha=32)
    row = {"tune": tune, "before vLLM": used_gib()}
    starting = vllm_engine.start(
        name,
        model,
        cfg.dtype,
        full=tune == "full",
        lora_r=0 if tune == "full" else 16,
        max_model_len=1024,
        max_num_seqs=256,
        gpu_memory_utilization=cfg.gpu_memory_utilization,
    )
    engine = run_blocking(starting)
    canary = Canary(list(range(5, 205)), cfg.dtype)
    try:
        for version in range(3):
            if version:
                nudge(model, version)
            begin = time.perf_counter()
            metrics = run_blocking(sync_and_check(engine, model, version, canary))
            row[f"differs, {version}"] = metrics["canary"]
            row["sync s"] = time.perf_counter() - begin
            if version == 0:
                row["awake"] = used_gib()
            run_blocking(engine.sleep())
            row["asleep"] = used_gib()
        run_blocking(sync_and_check(engine, model, 3, canary))
        row["awake again"] = used_gib()
        row["tokens/s"] = speed(engine, cfg.requests)
    finally:
        run_blocking(engine.close())
        del model
        torch.cuda.empty_cache()
    return row


def speed(engine, requests: int) -> float:
    """Returns tokens per second of so many turns at once."""

    async def sample_all() -> int:
        turns = []
        for seed in range(requests):
            sampling = Sampling(max_new_tokens=128, seed=seed)
            turns.append(engine.generate([5 + seed % 200, 6, 7], [], sampling))
        outputs = await asyncio.gather(*turns)
        return sum(len(output.ids) for output in outputs)

    begin = time.perf_counter()
    tokens = run_blocking(sample_all())
    return tokens / (time.perf_counter() - begin)


def main(argv: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    cfg = config.parse(Config, argv)
    if not torch.cuda.is_available():
        raise UserError("there is no GPU here: run it where torch.cuda.is_available()")
    with tempfile.TemporaryDirectory() as folder:
        name = cfg.model or random_model(Path(folder))
        rows = [measure(name, tune, cfg) for tune in ("full", "lora", "qlora")]
    table = Table(title=f"{torch.cuda.get_device_name()}, {cfg.dtype}; memory in GiB")
    for key in rows[0]:
        table.add_column(key, justify="right")
    for row in rows:
        cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()]
        table.add_row(*cells)
    Console().print(table)


if __name__ == "__main__":
    config.main(main)

"""Compares what learning/memory.py computes with what processes take, on a CPU.

    python bench/memory.py                                 # five sizes, six settings, 15 minutes
    python bench/memory.py --sizes=2m,5m --settings=full   # seconds

Each case is a process of its own that makes a random model (Qwen3-shaped) and learns twice with
train_grpo.learn: from a few tokens, and from two micro-batches of the largest shape. Measured is
the highest resident size during the second update, over that before the model was made: so weights,
gradients, moments and all that a pass holds. The allocator is told to give back every block of more
than 64 KiB, else it keeps some for later, as many as chance has it. "rollout" samples with the
transformers engine instead.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)

import torch

import train_grpo
from engines.base import Sampling
from engines.local import TransformersEngine
from learning import memory, optim
from learning import model as models
from run.config import UserError
from run.loop import run_blocking
from trajectory import Trajectory

SIZES = {  # hidden size, layers, vocabulary, heads of 64, heads of keys
    "2m": (128, 4, 8192, 2, 2),
    "5m": (256, 4, 8192, 4, 2),
    "15m": (384, 6, 16384, 6, 2),
    "30m": (512, 8, 24576, 8, 4),
    "60m": (512, 14, 32768, 8, 8),
}
SETTINGS = {
    "full": {},
    "full, recomputed": {"gradient_checkpointing": True},
    "full, bfloat16": {"dtype": "bfloat16"},
    "full, mixed": {"dtype": "mixed"},
    "lora": {"tune": "lora"},
    "lora, recomputed": {"tune": "lora", "gradient_checkpointing": True},
    "rollout": {},
}


@dataclass
class Config:
    sizes: tuple[str, ...] = tuple(SIZES)
    settings: tuple[str, ...] = tuple(SETTINGS)
    max_tokens: int = 512  # of a trajectory
    token_budget: int = 2048  # tokens of a micro-batch
    save_to: str = ""  # a .txt for the table
    part: str = ""  # for the subprocesses: a size and a setting


def check(cfg: Config) -> None:
    for name, known in (("sizes", SIZES), ("settings", SETTINGS)):
        wrong = set(getattr(cfg, name)) - set(known)
        if wrong:
            raise UserError(f"{name}: there is no {min(wrong)!r}; there are {', '.join(known)}")


def write_config(size: str, folder) -> None:
    """Writes the config.json of a size."""
    from transformers import Qwen3Config

    hidden, layers, vocabulary, heads, key_heads = SIZES[size]
    shape = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=64,
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
    )
    shape.save_pretrained(folder)


def setup_of(folder, setting: str, cfg: Config) -> memory.Setup:
    """Makes what memory.needs is asked with."""
    values = {
        "model": str(folder),
        "tune": "full",
        "dtype": "float32",
        "max_tokens": cfg.max_tokens,
        "token_budget": cfg.token_budget,
        "prompts_per_step": 4,
        "group_size": 8,
    }
    values |= SETTINGS[setting]
    return memory.Setup.of(train_grpo.Config(**values), engine_options=object())


def predicted(setup: memory.Setup, setting: str) -> float:
    """Computes the bytes that are measured: without what CUDA takes, as there is none."""
    phases = memory.needs(setup, 0.0, on_gpu=False)
    if setting == "rollout":
        return sum(phases["rollout"].values()) - phases["rollout"]["optimizer"]
    return sum(phases["learn"].values())


# -- what is measured


def resident(key: str) -> int:
    """Reads a number of bytes of this process: VmRSS now, VmHWM the highest since `forget`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {key} in /proc/self/status")


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far


def trajectories(setup: memory.Setup) -> list[Trajectory]:
    """Makes those of two micro-batches of the largest shape; all but their first token is trained,
    and no two of them begin alike."""
    rows, tokens = setup.batch_shape
    made = []
    for number in range(2 * rows):
        t = Trajectory({}, group=number // 2, sample=number % 2, stop="answered")
        t.reward = float(number % 2)
        t.add([3 + number], 0)
        t.turn_starts.append(1)
        t.add([5] * (tokens - 1), 1, [-1.0] * (tokens - 1))
        made.append(t)
    return made


def measure(folder, setup: memory.Setup, setting: str) -> float:
    """Measures in this process."""
    _warm_up(folder, setup, setting)
    gc.collect()
    before = resident("VmRSS")
    policy = model_of(folder, setup)
    if setting == "rollout":
        forget()
        _sample(policy, setup)
        return resident("VmHWM") - before
    optimizers = optim.optimizers(policy, "adamw", 1e-4)
    cfg = train_grpo.Config(token_budget=setup.token_budget)
    settings = train_grpo.LearnSettings.of(cfg)
    # the moments are made by a small update, which is quick; the second one is measured
    small = replace(setup, token_budget=64, max_tokens=32)
    train_grpo.learn(policy, optimizers, trajectories(small), 1e-4, settings)
    forget()
    train_grpo.learn(policy, optimizers, trajectories(setup), 1e-4, settings)
    return resident("VmHWM") - before


def _warm_up(folder, setup: memory.Setup, setting: str) -> None:
    """Has all code loaded, and the threads started, that the measured part needs."""
    small = replace(setup, token_budget=64, max_tokens=32, trajectories=2)
    policy = model_of(folder, small, layers=1)
    if setting == "rollout":
        _sample(policy, small)
        return
    settings = train_grpo.LearnSettings.of(train_grpo.Config(token_budget=64))
    optimizers = optim.optimizers(policy, "adamw", 1e-4)
    train_grpo.learn(policy, optimizers, trajectories(small), 1e-4, settings)


def model_of(folder, setup: memory.Setup, layers: int = 0, device: str = "cpu"):
    """Makes a random model of a config.json, as it is trained; with so many layers, 0: all."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.from_pretrained(folder)
    if layers:
        shape.num_hidden_layers = layers
        shape.layer_types = shape.layer_types[:layers]
    dtype = torch.bfloat16 if setup.dtype == "bfloat16" else torch.float32
    with torch.device(device):
        policy = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    if setup.tune == "lora":
        policy = models.add_adapter(
            policy, setup.lora_r, setup.lora_alpha, setup.lora_targets, 0, False
        )
    if setup.dtype == "mixed":
        models.in_dtype(policy, "mixed")
    if setup.gradient_checkpointing:
        models.recompute_layers(policy)
    return policy


class NoEnd:
    """A tokenizer of which the engine is asked nothing: no turn ends before its last token."""

    eos_token_id = None


def _sample(policy, setup: memory.Setup) -> None:
    """Samples as many turns as a step has trajectories, each of max_tokens."""
    engine = TransformersEngine(policy, NoEnd())

    async def all_turns():
        import asyncio

        turns = []
        for number in range(setup.rows):
            sampling = Sampling(max_new_tokens=setup.max_tokens - 8, seed=number)
            turns.append(engine.generate([5 + number] * 8, [], sampling))
        await asyncio.gather(*turns)

    run_blocking(all_turns())
    run_blocking(engine.close())


# -- the table


def case(size: str, setting: str, cfg: Config) -> tuple[float, float]:
    """Measures one case in a process of its own; returns (computed, measured) bytes."""
    words = [f"--part={size}:{setting}", f"--max_tokens={cfg.max_tokens}"]
    words.append(f"--token_budget={cfg.token_budget}")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }
    command = [sys.executable, __file__, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{size}, {setting} failed:\n{done.stderr[-2000:]}")
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def part(cfg: Config) -> None:
    """Measures and computes one case, and prints both as JSON."""
    size, setting = cfg.part.split(":")
    with tempfile.TemporaryDirectory() as folder:
        write_config(size, folder)
        setup = setup_of(folder, setting, cfg)
        measured = measure(folder, setup, setting)
        print(json.dumps([predicted(setup, setting), measured]))


def main(argv: list[str]) -> None:
    cfg = config.parse(Config, argv, check)
    if cfg.part:
        part(cfg)
        return
    started = time.monotonic()
    lines = [f"{'size':6} {'setting':20} {'computed MiB':>13} {'measured MiB':>13} {'off':>7}"]
    print(lines[0], flush=True)
    offs = []
    for size in cfg.sizes:
        for setting in cfg.settings:
            computed, measured = case(size, setting, cfg)
            off = computed / measured - 1
            offs.append(abs(off))
            line = f"{size:6} {setting:20} {computed / 2**20:13,.0f} {measured / 2**20:13,.0f}"
            lines.append(f"{line} {off:+7.1%}")
            print(lines[-1], flush=True)
    minutes = (time.monotonic() - started) / 60
    lines.append(
        f"{len(offs)} cases, {minutes:.0f} minutes: at most {max(offs):.1%} off, "
        f"median {statistics.median(offs):.1%}"
    )
    print(lines[-1])
    if cfg.save_to:
        heading = f"python bench/memory.py: torch {torch.__version__}, on a CPU"
        Path(cfg.save_to).write_text("\n".join([heading, *lines]) + "\n")


if __name__ == "__main__":
    config.main(main)

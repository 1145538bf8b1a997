"""Writes the table of docs/memory.md that says which settings fit which card.

    python dev/memory.py             # all rows, some minutes
    python dev/memory.py 0.5B 7B     # prints the rows of some

Every cell is the first of LADDER that fits, by learning/memory.py, as `--fits=24` would say it:
nothing is measured. The shapes are those of Qwen2.5; GRPO with vLLM, trajectories of 4,096 tokens.
tests/test_memory.py computes rows again and compares them with the page.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_grpo
from learning import memory
from learning.memory import GIB, Setup

PAGE = ROOT / "docs" / "memory.md"
HEAD = "| model | card | 1 GPU | 8 GPUs |"
CARDS = (16, 24, 48, 80)  # GiB
# hidden, intermediate, layers, heads, heads of keys, vocabulary, is the head the embedding?
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "14B": (5120, 13824, 48, 40, 8, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
}
# what one would like best comes first
FULL = {"tune": "full", "dtype": "mixed", "gradient_checkpointing": True}
LORA = {"tune": "lora", "dtype": "bfloat16", "gradient_checkpointing": True}
ROLLOUTS_HERE = {"engine": "transformers", "max_concurrent": 16}
LADDER = {
    1: (
        ("full", FULL),
        ("full, adamw8bit", FULL | {"optimizer": "adamw8bit"}),
        ("lora", LORA),
        ("qlora", LORA | {"tune": "qlora"}),
        ("qlora", LORA | {"tune": "qlora"} | ROLLOUTS_HERE),
    ),
    8: (
        ("full, ddp", FULL | {"parallel": "ddp"}),
        ("full, fsdp", FULL | {"parallel": "fsdp"}),
        ("lora, ddp", LORA | {"parallel": "ddp"}),
        ("qlora, ddp", LORA | {"tune": "qlora", "parallel": "ddp"}),
        ("qlora, ddp", LORA | {"tune": "qlora", "parallel": "ddp"} | ROLLOUTS_HERE),
    ),
}


def write_config(name: str, folder) -> None:
    """Writes the config.json of a shape."""
    from transformers import Qwen2Config

    hidden, intermediate, layers, heads, key_heads, vocabulary, is_tied = SHAPES[name]
    shape = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=is_tied,
        max_position_embeddings=32768,
        architectures=["Qwen2ForCausalLM"],
    )
    shape.save_pretrained(folder)


def base_setup(folder) -> Setup:
    """Makes the config that all rows share."""
    cfg = train_grpo.Config(
        model=str(folder),
        engine="vllm",
        max_tokens=4096,
        token_budget=8192,
        prompts_per_step=64,
        group_size=8,
    )
    options = train_grpo.read_options(cfg.engine, cfg.engine_options)
    return Setup.of(cfg, options)


def cell(setup: Setup, gpus: int, card: int) -> str:
    """Returns the first settings that fit, and what they take while the policy learns."""
    for name, keys in LADDER[gpus]:
        for budget in (8192, 4096):
            tried = replace(setup, gpus=gpus, token_budget=budget, **keys)
            engine = "16 rows at once"
            if tried.engine == "vllm":
                share = memory.share_for_vllm(tried, card)
                tried = replace(tried, gpu_memory_utilization=share)
                engine = f"vLLM {share:g}"
            if memory.fits(tried, card):
                learn = sum(memory.needs(tried, card)["learn"].values()) / GIB
                return f"{name}, {budget:,}, {engine}: {learn:.0f}"
    return "-"


def rows_of(name: str) -> list[str]:
    """Computes the rows of a model."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_config(name, folder)
        setup = base_setup(folder)
        for card in CARDS:
            cells = [cell(setup, gpus, card) for gpus in LADDER]
            rows.append(f"| {name} | {card} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    names = sys.argv[1:] or list(SHAPES)
    rows = []
    for name in names:
        rows += rows_of(name)
        print("\n".join(rows[-len(CARDS) :]), flush=True)
    if sys.argv[1:]:
        return
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    first = lines.index(HEAD) + 2  # behind the line of dashes
    end = first
    while lines[end].startswith("|"):
        end += 1
    lines[first:end] = rows
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

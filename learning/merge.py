"""Merges an adapter into the model it was trained on: a plain model that needs no peft.

    python -m learning.merge --adapter=out/calc_lora --out_dir=out/merged --dtype=float32
    python evaluate.py --run=out/calc_lora --model=out/merged

Adapters of tune=lora and qlora alike. The base is loaded again, never with 4 bits a weight: adding
to rounded weights and rounding the sum would lose a part of what was learnt. After qlora the merged
model is still another one than the one trained, whose base was rounded: evaluate it.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)

from learning import model as models
from run.config import UserError


@dataclass
class Config:
    adapter: str = ""  # the folder that train_grpo.py or train_sft.py wrote with tune=lora, qlora
    out_dir: str = "out/merged"  # must be new or empty
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the merged weights


def merge(cfg: Config) -> Path:
    """Writes the merged model and its tokenizer to out_dir, and returns that. Raises UserError
    where there is no adapter."""
    if not cfg.adapter:
        raise UserError("adapter is missing: write --adapter=<folder of a run with tune=lora>")
    method = models.quantization_of(models.base_of(cfg.adapter))
    if method:
        base = models.base_of(cfg.adapter)
        raise UserError(
            f"adapter = {cfg.adapter!r}: its base {base!r} has weights that are rounded "
            f"({method}), and so would be the sum: write the model that is not rounded as "
            "base_model_name_or_path into its adapter_config.json"
        )
    model, tokenizer = models.load(cfg.adapter, "none", cfg.dtype, "cpu")
    if not models.adapters_of(model):
        raise UserError(f"adapter = {cfg.adapter!r} is a whole model: there is nothing to merge")
    models.set_stop_ids(model, models.eos_ids(cfg.adapter))
    out_dir = config.fresh_dir(cfg.out_dir)
    merged = model.merge_and_unload()
    models.mend_generation_config(merged, cfg.adapter)
    models.save(merged, tokenizer, out_dir)
    return out_dir


def main(argv: list[str]) -> None:
    out_dir = merge(config.parse(Config, argv))
    print(f"saved: {out_dir}")
    # a GGUF file is not written here: llama.cpp's converter knows what its reader reads
    print(f"gguf, by llama.cpp: python convert_hf_to_gguf.py {shlex.quote(str(out_dir))}")


if __name__ == "__main__":
    config.main(main)

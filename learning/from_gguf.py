"""Writes the model in a GGUF file as a plain folder, which every script here can train.

    python -m learning.from_gguf --file=SmolLM2-135M-Instruct.Q4_1.gguf --out_dir=out/smollm2

For whoever has no hub: a GGUF file holds weights, tokenizer and chat template. Which architectures
are read is transformers' business (its "GGUF and interaction with Transformers" lists them).
Rounded weights (Q4_1 and the like) become float32 numbers again, 4 bytes each, and stay as rounded
as they were. Needs the package gguf: pip install -e ".[gguf]".
"""

from dataclasses import dataclass
from pathlib import Path

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)

from learning import model as models
from run.config import UserError


@dataclass
class Config:
    file: str = ""  # the .gguf file
    out_dir: str = "out/from_gguf"  # must be new or empty


def convert(cfg: Config) -> None:
    """Writes the model and its tokenizer to out_dir, in float32. Raises UserError where the file is
    missing or is not read."""
    if not cfg.file:
        raise UserError("file is missing: write --file=<a .gguf file>")
    file = Path(cfg.file).expanduser()
    if not file.is_file():
        raise UserError(f"file = {cfg.file!r}: there is no such file")
    _require_gguf()
    try:
        model, tokenizer = _read(file)
    except Exception as error:  # no GGUF, broken, or an architecture that transformers cannot read
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"file = {cfg.file!r} cannot be read: {reason}") from error
    out_dir = config.fresh_dir(cfg.out_dir)
    models.save(model, tokenizer, out_dir)
    print(f"saved: {out_dir}")


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError('the package gguf is missing: pip install -e ".[gguf]"') from None


def _read(file: Path):
    """Reads (model, tokenizer) of a GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    read = AutoModelForCausalLM.from_pretrained(**place, dtype="float32")

    # what was read calls itself quantized and refuses to be saved, so the class is made anew
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    plain = type(read)(type(read.config)(**settings))
    plain.load_state_dict(read.state_dict())
    if plain.config.tie_word_embeddings:
        plain.tie_weights()
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    plain.generation_config.pad_token_id = tokenizer.pad_token_id
    return plain, tokenizer


def main(argv: list[str]) -> None:
    convert(config.parse(Config, argv))


if __name__ == "__main__":
    config.main(main)

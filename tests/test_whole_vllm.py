"""vLLM for real, on a CPU, with models that also have a tower for images.

    make test-vllm      # which has torchvision on its path: most of vLLM's classes want it

Pinned here: vLLM has the trainer's weights under the names of the whole model, as adapters and in
full; an adapter that lacks "language_model" in its names stops at the canary. And, for each family,
the names by vLLM's own mapping. Models are random, with two layers.
"""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_vllm import moved, pytestmark, start, three_versions  # noqa: F401  (the marker)
from whole_shapes import SHAPES, publish

from engines.canary import Canary, sync_and_check
from learning import model as models
from learning import whole
from learning.logprobs import token_logprobs
from run.config import UserError
from run.loop import run_blocking

LORA = {"lora_r": 4, "lora_alpha": 8}
IDS = [5, 6, 7, 8, 9, 30, 41, 7, 55, 60, 88, 12, 12, 5, 200]
# vLLM's module and class, and what that calls the language model
CLASSES = {
    "qwen3_5": ("qwen3_5", "Qwen3_5ForConditionalGeneration", "language_model.model."),
    "gemma3": ("gemma3_mm", "Gemma3ForConditionalGeneration", "language_model.model."),
    "gemma4": ("gemma4_mm", "Gemma4ForConditionalGeneration", "language_model.model."),
    "mistral3": ("mistral3", "Mistral3ForConditionalGeneration", "language_model.model."),
    "ministral3": ("mistral3", "Mistral3ForConditionalGeneration", "language_model.model."),
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "language_model.model."),
    "qwen3_vl": ("qwen3_vl", "Qwen3VLForConditionalGeneration", "language_model.model."),
    "smolvlm": ("smolvlm", "SmolVLMForConditionalGeneration", "model.text_model."),
    "idefics3": ("idefics3", "Idefics3ForConditionalGeneration", "model.text_model."),
}
# Qwen3.5's class adds to this one's mapping that "mtp." goes nowhere
MAPPED_AS = {"qwen3_5": "qwen3_vl"}
# Where the names of an adapter of the language model alone mean nothing to vLLM
NOTHING = {"qwen3_5", "gemma3", "qwen3_vl", "smolvlm", "idefics3"}


@pytest.fixture(scope="module")
def published(tokenizer, tmp_path_factory):
    made = {}
    for family in SHAPES:
        made[family] = publish(family, tokenizer, tmp_path_factory.mktemp(family))
    return made


def mapper_of(family):
    """vLLM's own mapping of names, read from its source: the modules want torchvision, and what is
    read is only where a prefix goes. None: its names are those of transformers."""
    from vllm.model_executor.models.utils import WeightsMapper

    module, name, _ = CLASSES[MAPPED_AS.get(family, family)]
    folder = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
    source = (folder / "model_executor" / "models" / f"{module}.py").read_text()
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    for node in classes[name].body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "hf_to_vllm_mapper":
            for word in node.value.keywords:
                if word.arg == "orig_to_new_prefix":
                    return WeightsMapper(orig_to_new_prefix=ast.literal_eval(word.value))
    return None


@pytest.mark.parametrize("family", SHAPES)
def test_the_names_that_we_write_are_those_of_the_language_model_in_vllm(
    published, family, tokenizer, tmp_path
):
    """Each adapter tensor, and each weight of a full sync; where there are none for it, what lacks
    the part's name is refused before vLLM sees it."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = mapper_of(family)
    begins = CLASSES[family][2]
    model, _ = models.load(published[family], "lora", **LORA)
    models.save_adapter(model, tmp_path)
    path = whole.language_model_path(model.get_base_model())
    meant_nothing = False
    for name in whole.adapter_names(tmp_path):
        theirs, _ = parse_fine_tuned_lora_name(name, mapper)
        assert theirs.startswith(begins), name
        alone = name.replace(f"{path}.", "model.")
        theirs, _ = parse_fine_tuned_lora_name(alone, mapper)
        meant_nothing = meant_nothing or not theirs.startswith(begins)
    assert meant_nothing == (family in NOTHING)

    full, _ = models.load(published[family], "full")
    names = dict(models.weights_of(full))
    of_language_model = 0
    for name in names:
        theirs = mapper.map_name(name) if mapper else name
        of_language_model += theirs.startswith(begins)
    assert of_language_model == len(list(full.get_decoder().state_dict()))


# For real


def can_start(family):
    """Skips a family whose class vLLM cannot import on this machine."""
    module, _, _ = CLASSES[family]
    try:
        importlib.import_module(f"vllm.model_executor.models.{module}")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"vLLM's {family} cannot be imported here: {error}")


LIVE = ["gemma3", "mistral3", "qwen3_vl", "smolvlm", "gemma4"]
SEEING = ("qwen3_vl", "smolvlm")  # their full weights are test_vision_vllm.py's, with images


def check_that_the_canary_misses_the_part(engine, model, dtype):
    """The fact that this is about (vllm#49354): named as those of the language model alone, vLLM
    takes an adapter and changes nothing."""
    path = whole.language_model_path(model.get_base_model())
    save = models.save_adapter

    def without_part(model, folder):
        save(model, folder)
        file = Path(folder) / "adapter_model.safetensors"
        tensors = load_file(file)
        save_file({n.replace(f"{path}.", "model."): t for n, t in tensors.items()}, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "save_adapter", without_part)
        with pytest.raises(UserError, match="it samples from other weights"):
            run_blocking(sync_and_check(engine, model, 3, Canary(IDS, dtype)))


@pytest.mark.parametrize("family", LIVE)
def test_adapters_of_a_whole_model_are_the_trainers_in_vllm(published, family, tokenizer):
    """Pitfall 28."""
    can_start(family)
    model, _ = models.load(published[family], "lora", **LORA)
    moved(model, 7)
    engine = start(published[family], lora_r=4)
    try:
        three_versions(engine, model, tokenizer, 5e-5)
        if family in NOTHING:
            moved(model, 8)
            check_that_the_canary_misses_the_part(engine, model, "float32")
    finally:
        run_blocking(engine.close())


def test_adapters_of_qwen3_5_are_the_trainers_in_vllm(published, monkeypatch):
    """Pitfall 28. On a CPU its linear attention is in bfloat16 only, and wants prompts in chunks
    for a prefix cache, which our CPU options do not have: it is started without that cache here.
    So what an adapter changes is compared with what two roundings differ by."""
    can_start("qwen3_5")
    from engines import vllm as vllm_engine

    options = vllm_engine._fixed_options

    def without_prefix_cache(*arguments):
        return options(*arguments) | {"enable_prefix_caching": False}

    monkeypatch.setattr(vllm_engine, "_fixed_options", without_prefix_cache)
    model, _ = models.load(published["qwen3_5"], "lora", "bfloat16", **LORA)
    moved(model, 7, 0.2)
    ids = torch.tensor([IDS])
    ones = torch.ones_like(ids)
    with torch.no_grad():
        ours, _ = token_logprobs(model, ids, ones, ones)
        with model.disable_adapter():
            base, _ = token_logprobs(model, ids, ones, ones)
    effect = (ours - base).abs().mean().item()
    engine = start(published["qwen3_5"], dtype="bfloat16", lora_r=4)
    try:
        canary = Canary(IDS, "bfloat16")
        difference = run_blocking(sync_and_check(engine, model, 0, canary))["canary"]
        assert difference < 0.2 * effect and effect > 0.2
        check_that_the_canary_misses_the_part(engine, model, "bfloat16")
    finally:
        run_blocking(engine.close())


@pytest.mark.parametrize("family", [name for name in LIVE if name not in SEEING])
def test_full_weights_of_a_whole_model_are_the_trainers_in_vllm(published, family, tokenizer):
    can_start(family)
    model, _ = models.load(published[family], "full")
    engine = start(published[family], full=True)
    try:
        three_versions(engine, model, tokenizer, 5e-5)
    finally:
        run_blocking(engine.close())

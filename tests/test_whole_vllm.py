"""vLLM for real, on a CPU, with models that also have a tower for images.

    make test-vllm      # those whose class vLLM can import there; most want torchvision

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
from run.config import UserError
from run.loop import run_blocking

LORA = {"lora_r": 4, "lora_alpha": 8}
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
    if family == "qwen3_5" and not torch.cuda.is_available():
        pytest.skip("vLLM's prefix cache of linear attention wants prompts in chunks: no CPU's")


LIVE = ["gemma3", "mistral3", "qwen3_vl", "smolvlm", "gemma4", "qwen3_5"]


@pytest.mark.parametrize("family", LIVE)
def test_adapters_of_a_whole_model_are_the_trainers_in_vllm(published, family, tokenizer, tmp_path):
    """Pitfall 28. And the fact that this is about (vllm#49354): named as the language model alone,
    vLLM takes an adapter and changes nothing; the canary stops it."""
    can_start(family)
    model, _ = models.load(published[family], "lora", **LORA)
    moved(model, 7)
    engine = start(published[family], lora_r=4)
    try:
        three_versions(engine, model, tokenizer, 5e-5)
        if family in NOTHING:
            path = whole.language_model_path(model.get_base_model())
            save = models.save_adapter

            def without_part(model, folder):
                save(model, folder)
                file = Path(folder) / "adapter_model.safetensors"
                tensors = load_file(file)
                save_file({n.replace(f"{path}.", "model."): t for n, t in tensors.items()}, file)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(models, "save_adapter", without_part)
                moved(model, 8)
                canary = Canary([5, 6, 7, 8, 9, 30, 41], "float32")
                with pytest.raises(UserError, match="it samples from other weights"):
                    run_blocking(sync_and_check(engine, model, 3, canary))
    finally:
        run_blocking(engine.close())


@pytest.mark.parametrize("family", LIVE)
def test_full_weights_of_a_whole_model_are_the_trainers_in_vllm(published, family, tokenizer):
    can_start(family)
    model, _ = models.load(published[family], "full")
    engine = start(published[family], full=True)
    try:
        three_versions(engine, model, tokenizer, 5e-5)
    finally:
        run_blocking(engine.close())

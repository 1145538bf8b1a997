"""Whole checkpoints: a language model, and in the same files the tower that sees images for it.

Qwen3.5, Gemma 3 and 4, Mistral 3 and most of what is published today are made like this. Loaded is
all of it, in the class that its config names (`auto_class` decides), so that what is saved has
every tensor and file of the original, under the same names. Trained is the language model alone:
the layers below `get_decoder()`, and the head.

The names are transformers' own ("model.language_model.layers.0. ..."), which vLLM's classes map to
theirs. An adapter whose names lack the part's own ("language_model") would be taken by vLLM without
a word, and change nothing.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from run.config import UserError

# What a processor is made of, beside the tokenizer's own files, which the tokenizer writes.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
# Buffers of old files, which are computed today: a class drops them without naming them.
COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
# What PEFT calls a layer begins like this in an adapter's files.
PEFT_PREFIX = "base_model.model."
# Between the path of the language model and the names of layers in a pattern of ours.
ANY_LAYER = r"\.(?:.*\.)?(?:"


@dataclass
class Origin:
    """Where a model was loaded from, and what of it no class of transformers has a place for."""

    base: str  # a hub id, or a whole path
    unused_names: list[str]  # of tensors: Qwen3.5's "mtp.*", the drafts of several tokens


# -- how it is loaded, and what its parts are


def auto_class(base: str):
    """Returns the Auto class of transformers that loads a model with all its parts, or the one of
    language models where it is nothing else."""
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    if config.is_encoder_decoder:  # refused by the class that comes back
        return AutoModelForCausalLM
    if _has_parts(config) and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _has_parts(config) -> bool:
    return config.get_text_config() is not config


def is_whole(model) -> bool:
    """Says whether a model has other parts than its language model."""
    return _has_parts(model.config)


def has_tower(base: str) -> bool:
    """Says, before it is loaded, whether a model has other parts than its language model."""
    from transformers import AutoModelForImageTextToText

    return auto_class(base) is AutoModelForImageTextToText


def skeleton(base: str):
    """Makes the model without weights, to learn the names of its layers."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    with torch.device("meta"):
        return auto_class(base).from_config(config)


def language_model_path(model) -> str:
    """Returns what the layers of the language model are called before their numbers:
    "model.language_model", Idefics' "model.text_model"; "model" where it is the only part."""
    return _path_of(model, model.get_decoder())


def _path_of(model, part) -> str:
    for path, module in model.named_modules():
        if module is part:
            return path
    raise AssertionError(f"a {type(model).__name__} does not have its own {type(part).__name__}")


def head_path(model) -> str:
    """Returns what the head is called: "lm_head", for the most part."""
    return _path_of(model, model.get_output_embeddings())


def other_parts(model) -> list[str]:
    """Lists the parts that are neither language model nor head, as high up as each is one part:
    ["model.vision_tower", "model.multi_modal_projector"]."""
    language_model = language_model_path(model)
    parents = [""]  # of the language model, from the outside in
    for name in language_model.split(".")[:-1]:
        parents.append(f"{parents[-1]}.{name}".removeprefix("."))
    its_own = {language_model, head_path(model), *parents}
    parts = []
    for path, _ in model.named_modules():
        parent = path.rpartition(".")[0]
        if parent in parents and path not in its_own:
            parts.append(path)
    return parts


def freeze_other_parts(model) -> None:
    """Leaves what is trained to the language model and the head. A tower that no image goes through
    gets no gradient, but weight decay and the optimizer's memory."""
    of_language_model = set()
    for part in (model.get_decoder(), model.get_output_embeddings()):
        of_language_model.update(id(parameter) for parameter in part.parameters())
    for parameter in model.parameters():
        if id(parameter) not in of_language_model:
            parameter.requires_grad_(False)


# -- adapters


def lora_pattern(model, layer_names: tuple[str, ...]) -> str:
    """Returns PEFT's target_modules for the layers of these names in the language model, or for all
    its linear ones. By names alone the tower would have some: its layers are called q_proj, too."""
    if layer_names == ("all-linear",):
        found = set()
        for path, module in model.get_decoder().named_modules():
            if isinstance(module, torch.nn.Linear):
                found.add(path.rpartition(".")[-1])
        layer_names = tuple(sorted(found))
    path = re.escape(language_model_path(model))
    names = "|".join(re.escape(name) for name in layer_names)
    pattern = f"{path}{ANY_LAYER}{names})"
    head = head_path(model)
    if head in layer_names:
        pattern += "|" + re.escape(head)
    return pattern


def tower_pattern(model, layer_names: tuple[str, ...]) -> str:
    """Returns PEFT's target_modules for the layers of these names beside the language model, in the
    tower and what joins the two, or for all their linear ones. UserError if it has none of them."""
    head = _path_of(model, model.get_output_embeddings())
    found = []
    for part in other_parts(model):
        for path, module in model.get_submodule(part).named_modules(prefix=part):
            is_wanted = layer_names == ("all-linear",) or path.rpartition(".")[-1] in layer_names
            if isinstance(module, torch.nn.Linear) and is_wanted and path != head:
                found.append(re.escape(path))
    if not found:
        raise UserError(
            f"train_vision with lora_targets = {','.join(layer_names)}: the tower has none of these"
        )
    return "|".join(found)


def layer_names_of(target_modules: list[str] | str) -> set[str]:
    """Returns the names that an adapter_config.json has as its target_modules: the list, or those
    of a pattern of ours; of another pattern, itself."""
    if not isinstance(target_modules, str):
        return set(target_modules)
    _, between, rest = target_modules.partition(ANY_LAYER)
    names = rest.partition(")")[0]
    if not between:
        return {target_modules}
    return {name.replace("\\.", ".") for name in names.split("|")}


def adapter_names(folder: str) -> list[str]:
    """Lists the tensors in the files of an adapter; none where they are missing, which PEFT says
    better."""
    from safetensors import safe_open

    file = Path(folder).expanduser() / "adapter_model.safetensors"
    if file.is_file():
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    file = file.with_suffix(".bin")
    if file.is_file():
        return list(torch.load(file, map_location="meta", weights_only=True))
    return []


def is_of_tower(folder: str) -> bool:
    """Says whether an adapter has layers of the tower, by the names of its tensors."""
    from peft import PeftConfig

    base = skeleton(PeftConfig.from_pretrained(folder).base_model_name_or_path)
    parts = (language_model_path(base), head_path(base))
    begins = tuple(f"{PEFT_PREFIX}{part}." for part in parts)
    return any(not name.startswith(begins) for name in adapter_names(folder))


def lacks_part(names: list[str], language_model: str) -> bool:
    """Says whether an adapter, by the names of its tensors, was trained on the language model as a
    model of its own: "model.layers" and not "model.language_model.layers".

    language_model: what `language_model_path` says of the model that it is for.
    """
    outer, _, inner = language_model.rpartition(".")
    if not outer:
        return False
    begins = f"{PEFT_PREFIX}{outer}."
    return any(name.startswith(begins) for name in names) and not any(
        f".{inner}." in name for name in names
    )


def fit_adapter(model, folder: str):
    """Returns (PeftConfig, key_mapping) with which PEFT puts the adapter of a folder where it was:
    in the language model, whether it was trained on the whole model or on that alone."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(folder)
    if not is_whole(model) or config.peft_type != "LORA":
        return config, None
    path = language_model_path(model)
    outer, _, inner = path.rpartition(".")
    head = head_path(model)
    names = adapter_names(folder)
    key_mapping = None
    if lacks_part(names, path):
        key_mapping = {rf"^{re.escape(outer)}\.": f"{path}."}
    else:
        for name in names:
            if f".{inner}." not in name and not name.startswith(f"{PEFT_PREFIX}{head}."):
                return config, None  # the tower has some too, where the names say
    if not isinstance(config.target_modules, str):
        config.target_modules = lora_pattern(model, tuple(sorted(config.target_modules)))
    return config, key_mapping


def check_adapter_fits(folder: str, load_result) -> None:
    """Checks that each tensor of an adapter has found its layer, and each layer its tensor: PEFT
    would go on with what is there, an adapter of nothing if need be. load_result: what its
    load_adapter returns."""
    lost = load_result.unexpected_keys
    empty = load_result.missing_keys
    if not lost and not empty:
        return
    what = f"{len(lost)} of its tensors are of layers that the base has not" if lost else ""
    if empty:
        what = f"{len(empty)} tensors of its layers are not in its files"
    raise UserError(
        f"model = {folder!r}: the adapter does not fit its base: {what} (the first: "
        f"{(empty or lost)[0]}); it was trained on another class of the model, so give the base "
        "that it was trained on as base_model_name_or_path in its adapter_config.json"
    )


def check_names_for_vllm(folder: str, base: str | None) -> None:
    """Checks that the layers of an adapter are called as in the whole model, which vLLM serves.
    base: what it was trained on; where that is not on this machine, nobody can tell."""
    from transformers import AutoConfig

    names = adapter_names(folder)
    if not base:
        return
    try:
        AutoConfig.from_pretrained(base, local_files_only=True)
        if not has_tower(base):
            return
        language_model = language_model_path(skeleton(base))
    except (OSError, ValueError):
        return
    if lacks_part(names, language_model):
        raise UserError(
            f"model = {folder!r}: this adapter was trained on the language model alone, whose "
            f"layers are {language_model!r} in {base!r}: vLLM would take it and change nothing, so "
            f"use engine=transformers, or merge it (python -m learning.merge --adapter={folder})"
        )


# -- what is saved beside what was loaded


def remember_origin(model, base: str, loading_info: dict) -> None:
    """Notes which tensors of a model's files its class has no place for, and fetches the files that
    go with it, while the hub may be asked."""
    # what a class drops on purpose is not in loading_info; such a pattern may also fit other names
    dropped = [*(model._keys_to_ignore_on_load_unexpected or ()), *COMPUTED]
    may_be_dropped = []
    unused = []
    for name in _weight_files(base):
        if name in loading_info["unexpected_keys"]:
            unused.append(name)
        elif any(re.search(pattern, name) for pattern in dropped):
            may_be_dropped.append(name)
    if may_be_dropped:
        saved_names = _saved_names(model)
        unused += [name for name in may_be_dropped if name not in saved_names]
    processor_files(base, may_ask_hub=True)
    model.origin = Origin(base, unused)


def _saved_names(model) -> set[str]:
    """Returns what the tensors of a model will be called in its files."""
    from transformers.core_model_loading import revert_weight_conversion

    state = {name: weight.to("meta") for name, weight in model.state_dict().items()}
    return set(revert_weight_conversion(model, state))


def unused_tensors(model) -> dict[str, torch.Tensor]:
    """Reads the tensors that were in the model's files and are not in the model, as they are."""
    from safetensors import safe_open

    origin = getattr(model, "origin", None)
    if origin is None:
        return {}
    tensors = {}
    files = _weight_files(origin.base)
    for name in origin.unused_names:
        with safe_open(files[name], "pt") as opened:
            tensors[name] = opened.get_tensor(name)
    return tensors


def _weight_files(base: str) -> dict[str, str]:
    """Returns {tensor: file} of a model's safetensors; {} where it has none, or is not here."""
    from safetensors import safe_open

    file = _file(base, "model.safetensors")
    if file:
        with safe_open(file, "pt") as opened:
            return dict.fromkeys(opened.keys(), file)
    index = _file(base, "model.safetensors.index.json")
    if not index:
        return {}
    names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    return {name: str(Path(index).parent / file) for name, file in names.items()}


def files_of_processor(model) -> list[str]:
    """Lists the files that are saved with a model as they were beside it."""
    origin = getattr(model, "origin", None)
    return processor_files(origin.base) if origin else []


def processor_template(base: str) -> str | None:
    """Returns the chat template that some models have in a file of their processor's alone
    (chat_template.json); None without one."""
    file = _file(base, "chat_template.json", may_ask_hub=True)
    if not file:
        return None
    return json.loads(Path(file).read_text(encoding="utf-8"))["chat_template"]


def processor_files(base: str, may_ask_hub: bool = False) -> list[str]:
    """Lists the files of a model's processor: how its images are cut and scaled."""
    files = [_file(base, name, may_ask_hub) for name in PROCESSOR_FILES]
    return [file for file in files if file]


def _file(base: str, name: str, may_ask_hub: bool = False) -> str | None:
    from transformers.utils import cached_file

    return cached_file(
        base,
        name,
        local_files_only=not may_ask_hub,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )

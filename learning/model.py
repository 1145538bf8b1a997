"""Models: found, loaded (full, LoRA, QLoRA), changed for training, saved.

policy, tokenizer = load("Qwen/Qwen2.5-0.5B-Instruct", tune="lora")
"""

import contextlib
import json
import logging
import re
import shutil
from pathlib import Path

import torch

from learning import parallel, whole, zero
from learning.logprobs import decoder_of, layers_of, token_logprobs
from run.config import UserError

# Kinds of adapters (peft_type) that put virtual tokens before the prompt.
PROMPT_ADAPTERS = {
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
}
TEMPLATES = Path(__file__).resolve().parent.parent / "configs" / "templates"
# Models (model_type) with blocks whose out_proj peft puts no adapter on.
MAMBA_TYPES = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
BASE_CHANGERS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # of init_lora_weights
# README.md of an adapter: the hub shows it, and finds the base by it.
CARD = """\
---
base_model: {base}
library_name: peft
tags: [lora, tool-use, nanotool]
---

A LoRA adapter of rank {rank} to `{base}`, trained with nanotool to use tools.

    from peft import PeftModel
    from transformers import {auto_class}
    base = {auto_class}.from_pretrained("{base}")
    model = PeftModel.from_pretrained(base, "this folder")
"""

# -- where a model is


def find(name: str) -> str:
    """Returns `name` if it is a folder that holds a model, or a hub id that answers; raises
    UserError if it is neither."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file() or is_adapter(name):
            return str(folder)
        raise UserError(f"model = {name!r}: that folder has no config.json: give one that has")

    looks_like_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)
    # what begins with a folder that exists here was meant as a path: no network is asked
    begins_like_a_path = "/" in name and (folder.parent.is_dir() or name.startswith("out/"))
    if not looks_like_hub_id or begins_like_a_path:
        raise UserError(
            f"model = {name!r}: no such folder; train it first (`make demo` makes "
            "out/calc_sft and out/calc), or give another folder or hub id"
        )
    _ask_hub(name)
    return name


def _ask_hub(name: str) -> None:
    """Raises UserError where a hub id is neither in the cache nor known to the hub."""
    from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache

    for file in ("config.json", "adapter_config.json"):
        # it may also return a marker that is no path: known not to exist
        if isinstance(try_to_load_from_cache(name, file), str):
            return
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"model = {name!r}: no such folder, and not in the hub's cache (offline)")
    try:
        HfApi().model_info(name, timeout=2)
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"model = {name!r}: no such folder and no such model on the hub (or it is private)"
        ) from None
    except Exception as error:  # whatever stands between here and the hub
        reason = type(error).__name__
        raise UserError(
            f"model = {name!r}: no such folder, and the hub does not answer ({reason})"
        ) from None


def is_adapter(name: str) -> bool:
    """Says whether `name` is the folder of an adapter."""
    return (Path(name).expanduser() / "adapter_config.json").is_file()


def adapter_settings(name: str) -> dict:
    """Reads the adapter_config.json of a folder; {} where it holds a whole model."""
    if not is_adapter(name):
        return {}
    file = Path(name).expanduser() / "adapter_config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file} ({error}): mend it") from None
    if not isinstance(settings, dict):
        raise UserError(f"{file} holds no settings, but {str(settings)[:40]!r}: mend it")
    return settings


def base_of(name: str) -> str:
    """Returns the model below an adapter; a whole model is its own. UserError where an adapter does
    not say what it was trained on."""
    if not is_adapter(name):
        return find(name)
    base = adapter_settings(name).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(
            f"model = {name!r}: its adapter_config.json has base_model_name_or_path = {base!r}: "
            "write the hub id or folder of the model that it was trained on"
        )
    return find(base)


def lasting_name(base: str) -> str:
    """Returns a name that is good in any folder and on another day: a hub id, or a whole path."""
    folder = Path(base).expanduser()
    return str(folder.resolve()) if folder.is_dir() else base


def eos_ids(name: str) -> list[int]:
    """Reads which ids end a turn of a model, from its generation_config.json, or where it has none
    from its config.json. Those of an adapter stand in its own folder, or else in its base's."""
    from transformers.utils import cached_file

    for place in dict.fromkeys((find(name), base_of(name))):
        for file in ("generation_config.json", "config.json"):
            try:
                path = cached_file(place, file)
            except OSError:
                continue
            if path is None:  # it has none
                continue
            settings = json.loads(Path(path).read_text())
            ids = settings.get("eos_token_id")
            if ids is None:  # of a whole model, which says it of the part that writes
                ids = settings.get("text_config", {}).get("eos_token_id")
            if ids is not None:
                return ids if isinstance(ids, list) else [ids]
    return []


def set_stop_ids(model, stop_ids) -> None:
    """Sets the ids that end a turn, for whoever samples from the model when it is saved. Without
    them a base model that learnt to end its turns by ChatML's token would go on behind it."""
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, list) else [known]
    if stop_ids and set(known) != set(stop_ids):
        model.generation_config.eos_token_id = list(stop_ids)


# -- loading


def load_tokenizer(name: str, chat_template: str = ""):
    """Loads the tokenizer of a folder or hub id. That takes a moment, so a template is judged
    before weights are loaded. chat_template: a file that takes the place of its own."""
    from transformers import AutoTokenizer

    try:
        # else a folder with code of its own asks, and waits for an answer
        tokenizer = AutoTokenizer.from_pretrained(find(name), trust_remote_code=False)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = whole.processor_template(find(name))
    except UserError:
        raise
    except Exception as error:  # a file is missing or broken, each in its own way
        raise _cannot_load(name, error) from None
    set_chat_template(tokenizer, chat_template)
    return tokenizer


def set_chat_template(tokenizer, file: str) -> None:
    """Gives a tokenizer the chat template of a file, with which it is saved; "": keeps its own.

    UserError for a file that is not there or is no template."""
    if not file:
        return
    path = Path(file)
    if not path.is_file():
        path = TEMPLATES / file
    if not path.is_file():
        looked = f"looked for {file} and configs/templates/{file}"
        raise UserError(f"chat_template = {file!r}: no such file; {looked}")
    try:
        # what is wrong in it, the proof says: it renders
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template = {file!r} cannot be read as text: {error}") from None


def load(
    name: str,
    tune: str = "none",
    dtype: str = "float32",
    device: str = "auto",
    lora_r: int = 32,
    lora_alpha: int = 64,
    lora_targets: tuple[str, ...] = ("all-linear",),
    seed: int = 0,
    train_vision: bool = False,
):
    """Loads (model, tokenizer) of a folder or hub id, in eval mode.

    tune: "none" freezes all, "full" trains all, "lora" adds adapters to `lora_targets` and trains
    only them; "qlora" too, over a base of 4 bits a weight (NF4 with double quantisation, Dettmers
    et al. 2023, arXiv:2305.14314). "none4bit" is that base, frozen. Of a model that also has a
    tower for images only the language model is trained, by each of them; train_vision: the tower
    too. A folder that holds an adapter is loaded with its base model; with lora and qlora that
    adapter is trained on. dtype: of the weights; "mixed" keeps them in float32 and multiplies in
    bfloat16. Raises UserError where a part is missing.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of the shards: it would tear our own bar
    # peft imports it, and on a CPU it then warns that a quicker kernel is not installed
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    name = find(name)
    trains_adapter = tune in ("lora", "qlora")
    weights_dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"

    # 1. what the folder says, before any weights are read
    settings = adapter_settings(name)
    base = base_of(name)
    if settings:
        _check_adapter(name, settings, tune)
    if settings and trains_adapter:
        _check_same_lora(name, settings, lora_r, lora_alpha, lora_targets)
    _check_quantization(base, tune)

    # 2. the weights: of a whole model, or of the one below an adapter
    tokenizer = load_tokenizer(name)
    try:
        model = _load_weights(base, weights_dtype, device, tune in ("qlora", "none4bit"))
        if settings:
            model = _load_adapter(model, name, trains_adapter)
    except UserError:
        raise
    except Exception as error:  # missing, broken, unknown, or of a package that is not there
        raise _cannot_load(name, error) from error
    _check_vocabulary(model, tokenizer, name)

    # 3. what of it is trained
    if trains_adapter and not settings:
        model = add_adapter(model, lora_r, lora_alpha, lora_targets, seed, train_vision)
    if trains_adapter:
        # it is saved with this name, and found by it from other folders than this one
        model.peft_config["default"].base_model_name_or_path = lasting_name(base)
    if not trains_adapter:
        model.requires_grad_(tune == "full")
    if whole.is_whole(model) and not train_vision:
        whole.freeze_other_parts(model)
    model.eval()
    if trains_adapter or tune == "full":
        mend_generation_config(model, name)  # before the first step: it is saved behind the last
        check_head(model, name)
    if dtype == "mixed":
        in_dtype(model, dtype)
    return model, tokenizer


def _cannot_load(name: str, error: Exception) -> UserError:
    message = " ".join(str(error).split())[:300]
    if "size mismatch" in message and is_adapter(name):
        return UserError(
            f"model = {name!r}: the adapter does not fit its base, whose vocabulary was resized or "
            f"which is another model than it was trained on ({message}): merge it with the program "
            "that trained it, and give the whole model"
        )
    return UserError(f"model = {name!r}: {message or type(error).__name__}")


def _check_adapter(name: str, settings: dict, tune: str) -> None:
    """Checks that an adapter is of a kind that is computed here as where it was trained, and, if it
    is to be trained on, that it is plain LoRA. settings: its adapter_config.json."""
    kind = settings.get("peft_type")
    merged = f"merge it (python -m learning.merge --adapter={name}) and give the whole model"
    if tune == "full":
        raise UserError(f"model = {name!r} is an adapter: use tune=lora, or give a whole model")
    if kind in PROMPT_ADAPTERS:  # made of virtual tokens, which no trajectory has
        raise UserError(
            f"model = {name!r} is a {kind} adapter, which cannot be used here: expected LoRA, "
            "or another kind that changes the model's layers"
        )
    if tune not in ("lora", "qlora"):
        return
    if kind != "LORA":
        raise UserError(
            f"model = {name!r} is a {kind} adapter: only LoRA can be trained on; {merged}"
        )
    if changes_base(settings):
        raise UserError(
            f"model = {name!r} has init_lora_weights = {settings['init_lora_weights']!r}, which "
            f"changes its base too: training on it would lose that; {merged}"
        )


def check_usable_alone(name: str) -> None:
    """Checks that an adapter can be put on its plain base by an engine that knows only LoRA."""
    settings = adapter_settings(name)
    kind = settings.get("peft_type")
    if kind == "LORA" and not changes_base(settings):
        whole.check_names_for_vllm(find(name), settings.get("base_model_name_or_path"))
        return
    how = settings["init_lora_weights"] if kind == "LORA" else kind
    raise UserError(
        f"model = {name!r} is a {how} adapter, which vLLM cannot put on its base: use "
        f"engine=transformers, or merge it (python -m learning.merge --adapter={name})"
    )


def changes_base(settings: dict) -> bool:
    """Says whether an adapter (its adapter_config.json) is one to a base that was changed when it
    was made, as PiSSA does: on the plain base it is another model."""
    return str(settings.get("init_lora_weights", True)).startswith(BASE_CHANGERS)


def quantization_of(base: str) -> str:
    """Returns how the weights of a whole model are rounded in its files ("awq", "gptq", ...), with
    "bitsandbytes" that of its 4-bit kind only; "" where they are not."""
    from transformers import PretrainedConfig

    try:
        settings = PretrainedConfig.get_config_dict(base)[0].get("quantization_config")
    except Exception as error:
        raise _cannot_load(base, error) from error
    if not settings:
        return ""
    method = str(settings.get("quant_method", "bitsandbytes"))
    if method == "bitsandbytes" and not settings.get("load_in_4bit"):
        return "bitsandbytes with 8 bits"
    return method


def _check_quantization(base: str, tune: str) -> None:
    """Checks that weights which are rounded in the model's files are not trained themselves, and
    not rounded again."""
    method = quantization_of(base)
    if method and tune == "full":
        raise UserError(
            f"model = {base!r} has weights that are rounded ({method}): they cannot be trained, so "
            "use tune=lora, or give the model that is not rounded"
        )
    if method not in ("", "bitsandbytes") and tune in ("qlora", "none4bit"):
        raise UserError(
            f"model = {base!r} has weights that are rounded already ({method}): use tune=lora, or "
            "give the model that is not rounded"
        )


def _check_vocabulary(model, tokenizer, name: str) -> None:
    """Checks that the model has an embedding for each token that can be met. What is not: a special
    token that neither the template nor an end has (Gemma 3's for an image, or one to pad with)."""
    rows = model.get_input_embeddings().weight.shape[0]
    template = str(tokenizer.chat_template)
    ends = (tokenizer.eos_token, tokenizer.bos_token)
    special = set(tokenizer.all_special_ids)
    for token, number in tokenizer.added_tokens_decoder.items():
        if number.special:
            special.add(token)
    for token, number in tokenizer.get_vocab().items():
        is_met = number not in special or token in ends or token in template
        if number >= rows and is_met:
            raise UserError(
                f"model = {name!r}: its tokenizer has {token!r} as token {number}, but the model "
                f"has embeddings of {rows} only: give it the tokenizer that it was trained with, "
                "or resize the embeddings and train those of the new tokens"
            )


def check_positions(model, name: str, max_tokens: int) -> None:
    """Checks that all positions of a trajectory of max_tokens are computed alike, whoever stands
    beside it in a batch; UserError if not. Beyond a length some models (Phi-3.5: longrope; dynamic
    scaling) take other factors for all rows of a forward pass, short ones too: then sampler and
    trainer are not one function."""
    settings = model.config.get_text_config()
    positions = getattr(settings, "max_position_embeddings", None)
    why = f"the model has {positions} positions"
    rope = getattr(settings, "rope_parameters", None) or {}
    by_layer = [value for value in rope.values() if isinstance(value, dict)]
    for part in (rope, *by_layer):  # of all layers, or by their type
        original = part.get("original_max_position_embeddings")
        if part.get("rope_type") == "longrope" and original:
            positions = original
            why = f"beyond {original} tokens its positions are others, for all of a batch"
        elif part.get("rope_type") == "dynamic":
            why = f"beyond {positions} tokens its positions are others, for all of a batch"
    if positions and max_tokens > positions:
        raise UserError(
            f"max_tokens = {max_tokens} with model = {name!r}: {why}, so use "
            f"--max_tokens={positions} or less"
        )


def mend_generation_config(model, name: str) -> None:
    """Makes generation_config one that transformers agrees to save: it loads a temperature without
    do_sample, and refuses to write it when all is trained."""
    generation = getattr(model, "generation_config", None)
    if generation is None or _is_valid(generation):
        return
    if generation.pad_token_id is not None and generation.pad_token_id < 0:
        generation.pad_token_id = None
    if not _is_valid(generation):
        generation.do_sample = True  # what a temperature, top_p or top_k is for
    try:
        generation.validate(strict=True)
    except ValueError as error:
        message = " ".join(str(error).split())[:300]
        raise UserError(
            f"model = {name!r}: its generation_config.json could not be saved with what is "
            f"trained ({message}): mend or remove it"
        ) from None


def _is_valid(generation) -> bool:
    try:
        generation.validate(strict=True)
    except ValueError:
        return False
    return True


def _check_same_lora(
    name: str, settings: dict, lora_r: int, lora_alpha: int, lora_targets: tuple[str, ...]
) -> None:
    """Checks that an adapter can be trained on with these keys: they cannot change it. settings:
    its adapter_config.json."""
    r = settings.get("r")
    alpha = settings.get("lora_alpha")
    targets = whole.layer_names_of(settings.get("target_modules") or [])
    if (r, alpha) != (lora_r, lora_alpha):
        raise UserError(
            f"model = {name!r} has lora_r = {r} and lora_alpha = {alpha}, and training it cannot "
            "change them: give the same"
        )
    if lora_targets != ("all-linear",) and set(lora_targets) != targets:
        raise UserError(
            f"model = {name!r} has lora_targets = {','.join(sorted(targets))}, and training it "
            "cannot change them: give the same, or drop it"
        )


def _load_weights(base: str, dtype: torch.dtype, device: str, four_bits: bool):
    """Loads a whole model. four_bits: its linear layers are quantised, the head and norms stay, and
    `dtype` is what they multiply in. Those of a tower for images stay, too."""
    method = quantization_of(base)
    auto_class = whole.auto_class(base)
    options = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
    if not four_bits and not method:
        model, report = auto_class.from_pretrained(base, **options)
        _check_complete(report, base)
        whole.remember_origin(model, lasting_name(base), report)
        return model.to(device)

    if four_bits or method.startswith("bitsandbytes"):
        # transformers' own message names another way to get it
        import_bitsandbytes("tune = qlora" if four_bits else f"model = {base!r}")
    if four_bits and not method:  # else its files say how it is rounded
        from transformers import BitsAndBytesConfig

        kept_layers = None  # the head, which transformers finds by itself
        if whole.has_tower(base):
            skeleton = whole.skeleton(base)
            kept_layers = [*whole.other_parts(skeleton), whole.head_path(skeleton)]
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=kept_layers,
        )
    model, report = auto_class.from_pretrained(base, device_map={"": device}, **options)
    _check_complete(report, base)
    if is_quantized(model):
        _never_repack(model)
    return model


def _check_complete(report: dict, base: str) -> None:
    """Checks that the files had all weights: transformers makes up those that are missing, and says
    so in a table among its other lines."""
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"model = {base!r}: its files have no weights for {missing[0]}{more}, so that these "
            "would be random: get the whole model, or one for text generation"
        )


def import_bitsandbytes(user: str):
    """Imports and returns the package; raises UserError that says who needs it (`user`, a key and
    its value), and how to get it."""
    try:
        import bitsandbytes
    except ImportError:
        raise UserError(f'{user} needs bitsandbytes: pip install -e ".[qlora]"') from None
    return bitsandbytes


def _never_repack(model) -> None:
    """Switches off bitsandbytes' quick way on CPUs: it packs the weights in place when it first
    samples and rounds their scales, so that the sampler would not be the model that is trained."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _load_adapter(model, folder: str, is_trainable: bool):
    """Puts the adapter of a folder on its base model."""
    from peft import PeftModel

    # what changes the base is computed from weights that are there, so it is made in full; else
    # random weights would be drawn first
    is_quick = not changes_base(adapter_settings(folder))
    config, key_mapping = whole.fit_adapter(model, folder)
    with torch.random.fork_rng():  # torch's generator stays where it was in any case
        adapted = PeftModel.from_pretrained(
            model,
            folder,
            config=config,
            is_trainable=is_trainable,
            low_cpu_mem_usage=is_quick,
            key_mapping=key_mapping,
        )
    if config.peft_type == "LORA":  # once more, for what the first time does not say
        options = {"is_trainable": is_trainable, "torch_device": str(model.device)}
        result = adapted.load_adapter(folder, "default", key_mapping=key_mapping, **options)
        whole.check_adapter_fits(folder, result)
    return adapted


def add_adapter(
    model,
    lora_r: int,
    lora_alpha: int,
    lora_targets: tuple[str, ...],
    seed: int,
    train_vision: bool,
):
    """Puts a new adapter on a model."""
    from peft import LoraConfig, get_peft_model

    excluded = None
    if whole.is_whole(model):
        targets = whole.lora_pattern(model, lora_targets)
        if train_vision:
            targets = f"{targets}|{whole.tower_pattern(model, lora_targets)}"
    elif lora_targets == ("all-linear",):
        targets = "all-linear"
        excluded = _without_adapter(model) or None
    else:
        targets = list(lora_targets)
    lora = LoraConfig(
        r=lora_r,
        lora_alpha=lora_alpha,
        target_modules=targets,
        exclude_modules=excluded,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)  # of the A matrices
    try:
        return get_peft_model(model, lora)
    except ValueError as error:  # no module of that name
        raise UserError(f"lora_targets = {lora_targets}: {error}") from None
    except ImportError as error:  # for layers that are rounded in a way of their own
        raise UserError(f"tune = lora on this model: {error}") from None


def _without_adapter(model) -> list[str]:
    """Names the linear layers that all-linear leaves alone, because an adapter would have no effect
    there, or the wrong one."""
    names = set()
    for path, module in model.named_modules():
        name = path.split(".")[-1]
        if not isinstance(module, torch.nn.Linear):
            continue
        # Mamba's dt_proj: its weight is multiplied past the layer, and so past the adapter. A
        # block's out_proj: the fused kernels read its weight, and peft refuses it.
        if name == "dt_proj" or (name == "out_proj" and model.config.model_type in MAMBA_TYPES):
            names.add(name)
        # they return more than a product: a router of experts (Llama 4, Phi-3.5 MoE), or several
        # products (DeepSeek-V4)
        if type(module).__name__.endswith(("Router", "GroupedLinear")):
            names.add(path)
    return sorted(names)


def check_head(model, name: str) -> None:
    """Checks, on eight tokens, that token_logprobs are those of the model's own logits; raises
    UserError if not: some models do with what their head gives what is not known here."""
    ids = torch.arange(8, device=model.device)[None]  # (1, 8)
    attention_mask = torch.ones_like(ids)
    mask = (ids > 0).long()
    try:
        with torch.no_grad():
            ours, _ = token_logprobs(model, ids, attention_mask, mask)
            logits = model(input_ids=ids, attention_mask=attention_mask).logits[:, :-1]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of whatever kind: of a class, or an adapter, of another build
        message = " ".join(str(error).split())[:200]
        has_adapter = bool(adapters_of(model))
        remedy = "name other --lora_targets" if has_adapter else "give a model of another family"
        raise UserError(
            f"model = {name!r} cannot be trained here ({type(error).__name__}: {message}): {remedy}"
        ) from error
    table = logits.float().log_softmax(-1)  # (1, 7, V)
    theirs = table.gather(-1, ids[:, 1:, None])[..., 0]
    if not ours.isfinite().all():
        raise UserError(
            f"model = {name!r}: its logprobs are no numbers, so its files are damaged: get it again"
        )
    difference = (ours[:, 1:] - theirs).abs().mean().item()
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1  # ten times what rounding makes
    if difference > tolerance:
        raise UserError(
            f"model = {name!r}: its logprobs differ by {difference:.2g} from those that the loss "
            "would train on, so it cannot be trained here: give a model of another family"
        )


# -- how it computes


def in_dtype(model, dtype: str):
    """Returns the model with its weights in `dtype`. "mixed": in float32, but whoever calls the
    model, its decoder or its head, to sample or to train, does so under autocast to bfloat16:
    sampler and trainer must be one function."""
    if dtype != "mixed":
        return model.to(getattr(torch, dtype))
    parts = [model, decoder_of(model), model.get_output_embeddings()]
    # one autocast each: they nest, and one that is entered twice is never left
    if whole.is_whole(model):
        layers = layers_of(model, with_tower=True)
        parts.append(layers)
        autocast = torch.autocast(model.device.type, torch.bfloat16)
        layers.get_image_features = autocast(layers.get_image_features)
    for part in parts:
        autocast = torch.autocast(model.device.type, torch.bfloat16)
        part.forward = autocast(part.forward)
    model.is_mixed = True  # for engines/cache.py: its weights are float32, but it rounds to less
    return model


def recompute_layers(model) -> None:
    """Switches gradient checkpointing on: it keeps the input of each layer and makes the rest again
    in the backward pass: a third more time, a fraction of the memory."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def set_image_size(model, vision) -> None:
    """Has the image processor saved beside the model if it is not as in the model's own files:
    whoever loads the model then shows it images of the size that it was trained with. vision: of
    learning/vision.py, or None."""
    if vision is not None and vision.is_resized:
        model.image_processor = vision.processor


def without_dropout(model) -> None:
    """Sets eval mode, so that old, new and the engine's logprobs are of one function. But
    transformers recomputes only layers that are in train mode: these alone, not what is inside of
    them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.eval()
    if model.is_gradient_checkpointing:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True


def is_quantized(model) -> bool:
    """Says whether it was loaded with 4 bits a weight."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


# -- the reference that `beta` compares with


def load_reference(name: str, model, tune: str, dtype: str):
    """Returns the model that `beta` holds the policy to: what it was when training began. A frozen
    copy, or the same model object where its adapters can be switched off or to those it began
    with."""
    if tune == "full":
        reference, _ = load(name, "none", dtype, str(model.device))
        return reference
    if is_adapter(name):
        bias = adapter_settings(name).get("bias", "none")
        if bias != "none":  # the biases are the base's own: there are no two sets of them
            raise UserError(
                f"beta > 0 with model = {name!r}, an adapter with bias = {bias!r}: its biases "
                "cannot be switched back, so use beta=0, or merge it and give the whole model"
            )
        base = model.get_base_model()
        config, key_mapping = whole.fit_adapter(base, find(name))
        config.inference_mode = True
        try:
            model.add_adapter("reference", config)
            model.load_adapter(find(name), "reference", key_mapping=key_mapping)
        except Exception as error:
            raise _cannot_load(name, error) from error
    return model


@contextlib.contextmanager
def with_initial_weights(model):
    """Makes a model with adapters the one that training began with, inside."""
    adapters = adapters_of(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if "reference" in adapters:
        model.set_adapter("reference")
        try:
            yield
        finally:
            model.set_adapter("default")  # which also makes it trainable again, a tower's too
            model.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
    elif adapters:
        with model.disable_adapter():
            yield
    else:
        yield


def adapters_of(model) -> list[str]:
    """Returns the names of a model's LoRA adapters; [] for a plain model, which has no such
    attribute (asking peft itself would import it, in two seconds)."""
    return list(getattr(model, "peft_config", ()))


def frozen_parts(model) -> str:
    """Names the parts beside a language model, which are not trained, for the first lines of a run;
    "" where there are none."""
    base = model.get_base_model() if adapters_of(model) else model
    if not whole.is_whole(base):
        return ""
    frozen = []
    for name in whole.other_parts(base):
        if not any(weight.requires_grad for weight in base.get_submodule(name).parameters()):
            frozen.append(name)
    return ", ".join(frozen)


# -- what is written, or handed to an engine


def save(model, tokenizer, folder, state: dict | None = None) -> None:
    """Writes the model, or only its adapter, as `from_pretrained` and `PeftModel` load it. state:
    what to write in the place of its state_dict(), whose weights are in shards."""
    from transformers import GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    zero.find_no_gpu_quietly()
    if "default" in adapters_of(model):
        save_adapter(model, folder, state)
        ids = model.generation_config.eos_token_id  # what ends a turn may be learnt, too
        GenerationConfig(eos_token_id=ids).save_pretrained(folder)
    else:
        unused = whole.unused_tensors(model)
        if unused:
            state = (state or model.state_dict()) | unused
        model.save_pretrained(folder, state_dict=state)
        for file in whole.files_of_processor(model):
            shutil.copy(file, folder)
        if getattr(model, "image_processor", None):
            model.image_processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_adapter(model, folder, state: dict | None = None) -> None:
    """Writes the adapter that is trained, without a word to the hub: left alone, peft asks it at
    each save whether the vocabulary was resized, and none is here."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    if state is None:  # an engine is given it
        state = parallel.whole_weights(model)
    model.save_pretrained(
        folder,
        # beside it there may be the adapter that `beta` compares with
        selected_adapters=["default"],
        state_dict=state,
        save_embedding_layers=any(isinstance(layer, BaseTunerLayer) for layer in embeddings),
    )
    settings = model.peft_config["default"]
    auto_class = "AutoModelForCausalLM"
    if whole.is_whole(model):
        auto_class = "AutoModelForImageTextToText"
    base = settings.base_model_name_or_path
    card = CARD.format(base=base, rank=settings.r, auto_class=auto_class)
    (Path(folder) / "README.md").write_text(card, encoding="utf-8")


def save_dequantized(model, name: str, dtype: str, folder) -> None:
    """Writes the base of a model that was loaded from `name` with 4 bits a weight as a plain model:
    the very numbers that it multiplies with, in `dtype`, without the adapter."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    if quantization_of(base_of(name)):
        raise UserError(
            f"model = {base_of(name)!r} is rounded to 4 bits in its own files, which engine = "
            "'vllm' cannot have as they are trained: give the model that is not rounded"
        )
    plain, tokenizer = load(base_of(name), "none", dtype, "cpu")
    base = model.get_base_model() if adapters_of(model) else model
    for path, layer in base.named_modules():
        if isinstance(layer, Linear4bit):
            weights = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            # peft puts a layer with an adapter one level down
            target = plain.get_submodule(path.removesuffix(".base_layer"))
            target.weight.data.copy_(weights.reshape(target.weight.shape))
    mend_generation_config(plain, name)
    save(plain, tokenizer, folder)


def weights_of(model) -> list[tuple[str, torch.Tensor]]:
    """Returns all weights of a whole model, under the names that its files have; tied ones once."""
    from transformers.core_model_loading import revert_weight_conversion

    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    # not by state_dict(): of weights in shards (learning/parallel.py) it would be that of shards
    not_saved = set()
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            not_saved.add(f"{path}.{name}" if path else name)
    for name, buffer in model.named_buffers():
        if name not in not_saved:
            weights[name] = buffer
    return list(revert_weight_conversion(model, weights).items())

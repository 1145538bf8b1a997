"""Models: made from scratch, loaded (full, LoRA, QLoRA), saved; and the steps of their optimizers.

policy, tokenizer = load("Qwen/Qwen2.5-0.5B-Instruct", tune="lora")
optimizer, = optimizers(policy, "adamw", learning_rate=1e-5)
"""

import contextlib
import json
import logging
import re
from pathlib import Path

import torch

from learning.logprobs import token_logprobs
from run.config import UserError


def find(name: str) -> str:
    """`name` if it is a folder that holds a model, or a hub id that answers; else UserError."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if any((folder / f).is_file() for f in ("config.json", "adapter_config.json")):
            return str(folder)
        raise UserError(f"model = {name!r}: that folder has no config.json: give one that has")
    # What begins with a folder that exists here was meant as a path: nobody waits for a network.
    looks_like_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)
    if not looks_like_hub_id or ("/" in name and (folder.parent.is_dir() or name[:4] == "out/")):
        raise UserError(
            f"model = {name!r}: no such folder; train it first (`make demo` makes "
            "out/calc_sft and out/calc), or give another folder or hub id"
        )
    from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache

    cached = [try_to_load_from_cache(name, f) for f in ("config.json", "adapter_config.json")]
    if any(isinstance(path, str) for path in cached):
        return name
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"model = {name!r}: no such folder, and not in the hub's cache (offline)")
    try:
        HfApi().model_info(name, timeout=2)
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"model = {name!r}: no such folder and no such model on the hub (or it is private)"
        ) from None
    except Exception as error:  # whatever stands between here and the hub
        why = type(error).__name__
        raise UserError(
            f"model = {name!r}: no such folder, and the hub does not answer ({why})"
        ) from None
    return name


def is_adapter(name: str) -> bool:
    """Whether `name` is the folder of an adapter."""
    return (Path(name).expanduser() / "adapter_config.json").is_file()


def adapter_settings(name: str) -> dict:
    """The adapter_config.json of a folder, {} where it holds a whole model."""
    file = Path(name).expanduser() / "adapter_config.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def base_of(name: str) -> str:
    """The model below an adapter; a whole model is its own."""
    return find(adapter_settings(name).get("base_model_name_or_path", name))


def load_tokenizer(name: str):
    """The tokenizer of a folder or hub id; takes a moment, so a template is judged before weights
    are loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(find(name))
    except (OSError, ValueError, KeyError) as error:  # a file is missing or broken
        raise UserError(f"model = {name!r}: {' '.join(str(error).split())[:300]}") from None


def load(
    name: str,
    tune: str = "none",
    dtype: str = "float32",
    device: str = "auto",
    lora_r: int = 32,
    lora_alpha: int = 64,
    lora_targets: tuple[str, ...] = ("all-linear",),
    seed: int = 0,
):
    """(model, tokenizer) of a folder or hub id, in eval mode.

    tune: "none" freezes all, "full" trains all, "lora" adds adapters to `lora_targets` and trains
    only them; "qlora" too, over a base of 4 bits a weight (NF4 with double quantisation, Dettmers
    et al. 2023, arXiv:2305.14314). "none4bit" is that base, frozen. A folder that holds an adapter
    is loaded with its base model; with lora and qlora that adapter is trained on. dtype: of the
    weights; "mixed" keeps them in float32 and multiplies in bfloat16. Raises UserError where a part
    is missing.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of the shards: it would tear our own bar
    # peft imports it, and on a CPU it then warns that a quicker kernel is not installed
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    name, lora = find(name), (lora_r, lora_alpha, lora_targets)
    adapted, quantised = tune in ("lora", "qlora"), tune in ("qlora", "none4bit")
    weights = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        settings = adapter_settings(name)
        base = _base(name, settings, tune, lora) if settings else name
        tokenizer = load_tokenizer(name)
        more = _four_bits(weights, device) if quantised else {}
        model = AutoModelForCausalLM.from_pretrained(base, dtype=weights, **more)
        model = _one_function(model) if quantised else model.to(device)
        if settings:
            from peft import PeftModel

            # without low_cpu_mem_usage random weights are drawn first: torch's generator moves
            trained = {"is_trainable": adapted, "low_cpu_mem_usage": True}
            model = PeftModel.from_pretrained(model, name, **trained)
    except (OSError, ValueError, KeyError, SafetensorError) as error:  # missing, broken, unknown
        raise UserError(f"model = {name!r}: {' '.join(str(error).split())[:300]}") from None
    if adapted and not settings:
        model = _with_adapter(model, lora_r, lora_alpha, lora_targets, seed)
    if not adapted:
        model.requires_grad_(tune == "full")
    model.eval()
    if dtype == "mixed":
        in_dtype(model, dtype)
    if adapted or tune == "full":
        check_head(model, name)
    return model, tokenizer


def _base(name: str, settings: dict, tune: str, lora: tuple[int, int, tuple[str, ...]]) -> str:
    """The model below an adapter; UserError if the adapter cannot be trained in this way."""
    if tune == "full":
        raise UserError(f"model = {name!r} is an adapter: use tune=lora, or give a whole model")
    r, alpha, targets = settings["r"], settings["lora_alpha"], settings["target_modules"]
    if tune in ("lora", "qlora") and (r, alpha) != lora[:2]:
        raise UserError(
            f"model = {name!r} has lora_r = {r} and lora_alpha = {alpha}, and training it cannot "
            "change them: give the same"
        )
    targets = {targets} if isinstance(targets, str) else set(targets)  # a pattern, or names
    if tune in ("lora", "qlora") and lora[2] != ("all-linear",) and set(lora[2]) != targets:
        raise UserError(
            f"model = {name!r} has lora_targets = {','.join(sorted(targets))}, and training it "
            "cannot change them: give the same, or drop it"
        )
    return find(settings["base_model_name_or_path"])


def _four_bits(compute: torch.dtype, device: str) -> dict:
    """What from_pretrained needs to quantise the linear layers; the head and norms stay."""
    _bitsandbytes("tune = qlora")  # transformers' own message names another way to get it
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": quantised, "device_map": {"": device}}


def _bitsandbytes(what: str):
    """The package; UserError that says what needs it, and how to get it."""
    try:
        import bitsandbytes
    except ImportError:
        raise UserError(f'{what} needs bitsandbytes: pip install -e ".[qlora]"') from None
    return bitsandbytes


def _one_function(model):
    """Switches off bitsandbytes' quick way on CPUs: it packs the weights in place when it first
    samples and rounds their scales, so that the sampler would not be the model that is trained."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def in_dtype(model, dtype: str):
    """The model, its weights in `dtype`. "mixed": in float32, but whoever calls the model, its
    decoder or its head, to sample or to train, does so under autocast to bfloat16: sampler and
    trainer must be one function."""
    if dtype != "mixed":
        return model.to(getattr(torch, dtype))
    for part in (model, model.get_decoder(), model.get_output_embeddings()):
        # one autocast each: they nest, and one that is entered twice is never left
        part.forward = torch.autocast(model.device.type, torch.bfloat16)(part.forward)
    return model


def recompute_layers(model) -> None:
    """Gradient checkpointing: keeps the input of each layer and makes the rest again in the
    backward pass: a third more time, a fraction of the memory."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def without_dropout(model) -> None:
    """Eval mode, so that old, new and the engine's logprobs are of one function. But transformers
    recomputes only layers that are in train mode: these alone, not what is inside of them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.eval()
    if model.is_gradient_checkpointing:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True


def is_quantized(model) -> bool:
    """Whether it was loaded with 4 bits a weight."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def save_dequantized(model, name: str, dtype: str, folder) -> None:
    """Writes the base of a model that was loaded from `name` with 4 bits a weight as a plain model:
    the very numbers that it multiplies with, in `dtype`, without the adapter."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    plain, tokenizer = load(base_of(name), "none", dtype, "cpu")
    base = model.get_base_model() if adapters_of(model) else model
    for path, layer in base.named_modules():
        if isinstance(layer, Linear4bit):
            numbers = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            target = plain.get_submodule(path.removesuffix(".base_layer"))
            target.weight.data.copy_(numbers.reshape(target.weight.shape))
    save(plain, tokenizer, folder)


def weights_of(model) -> list[tuple[str, torch.Tensor]]:
    """All weights of a whole model, under the names that its files have; tied ones once."""
    from transformers.core_model_loading import revert_weight_conversion

    kept = {name: w.detach() for name, w in model.named_parameters()}
    kept |= {name: w for name, w in model.named_buffers() if name in model.state_dict()}
    return list(revert_weight_conversion(model, kept).items())


def load_reference(name: str, model, tune: str, dtype: str):
    """The model that `beta` holds the policy to: what it was when training began. A frozen copy, or
    the same model object where its adapters can be switched off or to those it began with."""
    if tune == "full":
        return load(name, "none", dtype, str(model.device))[0]
    if is_adapter(name):
        model.load_adapter(find(name), adapter_name="reference")
    return model


@contextlib.contextmanager
def with_initial_weights(model):
    """Inside, a model with adapters is the one that training began with."""
    adapters = adapters_of(model)
    if "reference" in adapters:
        model.set_adapter("reference")
        try:
            yield
        finally:
            model.set_adapter("default")  # which also makes it trainable again
    elif adapters:
        with model.disable_adapter():
            yield
    else:
        yield


def _with_adapter(model, r: int, alpha: int, targets: tuple[str, ...], seed: int):
    from peft import LoraConfig, get_peft_model

    chosen = "all-linear" if targets == ("all-linear",) else list(targets)
    lora = LoraConfig(r=r, lora_alpha=alpha, target_modules=chosen, task_type="CAUSAL_LM")
    torch.manual_seed(seed)  # of the A matrices
    try:
        return get_peft_model(model, lora)
    except ValueError as error:  # no module of that name
        raise UserError(f"lora_targets = {targets}: {error}") from None


def check_head(model, name: str) -> None:
    """UserError if token_logprobs are not those of the model's own logits, on eight tokens: some
    models (Granite, Cohere) scale what their head gives, each by a setting of another name."""
    ids = torch.arange(8, device=model.device)[None]
    mask = (ids > 0).long()
    with torch.no_grad():
        ours, _ = token_logprobs(model, ids, torch.ones_like(ids), mask)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
    theirs = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    difference = (ours[:, 1:] - theirs).abs().mean().item()
    if difference > 0.1:  # bfloat16 alone makes a tenth of that
        raise UserError(
            f"model = {name!r}: its logprobs differ by {difference:.2g} from those that the loss "
            "would train on, so it cannot be trained here: give a model of another family"
        )


def adapters_of(model) -> list[str]:
    """The names of a model's LoRA adapters; [] for a plain model, which has no such attribute
    (asking peft itself would import it, in two seconds)."""
    return list(getattr(model, "peft_config", ()))


def save(model, tokenizer, folder) -> None:
    """Writes the model, or only its adapter, as `from_pretrained` and `PeftModel` load it."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # beside "default" there may be the adapter that `beta` compares with
    only = {"selected_adapters": ["default"]} if "default" in adapters_of(model) else {}
    model.save_pretrained(folder, **only)
    tokenizer.save_pretrained(folder)

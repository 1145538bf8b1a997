"""Models: made from scratch, loaded (full, LoRA, QLoRA), saved; and the steps of their optimizers.

policy, tokenizer = load("Qwen/Qwen2.5-0.5B-Instruct", tune="lora")
optimizer, = optimizers(policy, "adamw", learning_rate=1e-5)
"""

import contextlib
import json
import logging
import math
import re
from pathlib import Path

import torch

from config import UserError
from logprobs import token_logprobs

# ChatML with tools, as Qwen writes it, for models that are made here.
TEMPLATE = """\
{%- if tools or messages[0].role == 'system' -%}
  {{- '<|im_start|>system\\n' -}}
  {{- messages[0].content if messages[0].role == 'system' -}}
  {%- if tools -%}
    {{- '\\nTools: ' + (tools | tojson) -}}
    {{- ' Call one as <tool_call>{"name": ..., "arguments": ...}</tool_call>' -}}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' -}}
  {%- elif message.role == 'assistant' -%}
    {{- '<|im_start|>assistant\\n' + message.content -}}
    {%- for call in message.tool_calls or [] -%}
      {{- '\\n' if message.content or not loop.first -}}
      {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
      {{- (call.function.arguments | tojson) + '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
  {%- elif message.role == 'tool' -%}
    {{- '<|im_start|>user' if loop.previtem.role != 'tool' -}}
    {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
    {{- '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' -}}
  {%- endif -%}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt -}}
"""
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def tiny_tokenizer(conversations: list[list[dict]], tools: list[dict], whole_names: bool = False):
    """A byte-level BPE tokenizer trained on the conversations, with TEMPLATE as its chat template.

    Digits are single tokens, so numbers are copied digit by digit, and a line break ends a token,
    as the roles of the template do. All else may merge, across words too, so the parts of a task
    that never change take few tokens. whole_names: a word with a capital is a token of its own, so
    that names are copied whole; and the system prompt with its tool schemas, which never changes in
    a task, is one token: with several tools it would be most of what a model reads.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def wrap(inner, more=()):
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=inner,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            additional_special_tokens=["<|im_start|>"],
            chat_template=TEMPLATE,
        )
        plain = (*MARKERS, *more)
        wrapped.add_tokens([AddedToken(m, special=False, normalized=False) for m in plain])
        return wrapped

    alone = r"\d|[A-Z][a-z]+" if whole_names else r"\d"
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(alone), "isolated"),
            pre_tokenizers.Split("\n", "merged_with_previous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    untrained = wrap(Tokenizer.from_str(inner.to_str()))
    between = re.compile("|".join(map(re.escape, CONTROL + MARKERS)))
    texts = [
        between.split(untrained.apply_chat_template(talk, tools=tools or None, tokenize=False))
        for talk in conversations
    ]
    # what stands behind the first <|im_start|>, if it is the same in all of them
    first = texts[0][1]
    is_one = first.startswith("system\n") and all(parts[1] == first for parts in texts)
    system = [first] if whole_names and is_one else []
    trainer = trainers.BpeTrainer(
        vocab_size=(2048 if whole_names else 768) - len(MARKERS) - len(system),
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator((p for parts in texts for p in parts if p not in system), trainer)
    return wrap(inner, system)


def tiny(tokenizer, seed: int = 0, hidden_size: int = 96, layers: int = 4, heads: int = 2):
    """A Qwen3-shaped model from scratch, about 0.55 M parameters with a vocabulary of 768.

    Qwen3 and not Qwen2: with its normalised queries and keys, copying is learnt in half the steps.
    The same goes for the initial weights, which at this width are larger than the usual 0.02.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=hidden_size // heads,
            max_position_embeddings=4096,
            initializer_range=0.07,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


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
        prove_head(model, name)
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


def rounded(model) -> bool:
    """Whether it was loaded with 4 bits a weight."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def save_rounded(model, name: str, dtype: str, folder) -> None:
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
def as_it_began(model):
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


def prove_head(model, name: str) -> None:
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


def count(model) -> tuple[int, int]:
    """(parameters that are trained, all parameters)."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def gpu_gib(phase: str) -> dict[str, float]:
    """{"gpu_gib_<phase>": what was taken of the GPU}: by all processes now, and by this one at its
    peak since the last call. {} without a GPU."""
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    more = torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return {f"gpu_gib_{phase}": (total - free + more) / 2**30}


def optimizers(model, kind: str, learning_rate: float, weight_decay: float = 0.0) -> list:
    """What to step and zero after each backward pass: AdamW over all that is trained, "adamw8bit",
    whose two moments take a byte each instead of four (Dettmers et al. 2021, arXiv:2110.02861), or
    "muon".

    Muon (Jordan et al. 2024) takes the matrices inside the layers, AdamW the rest; its update is
    scaled to the size of AdamW's, so both take the same learning rate. Norms and biases do not
    decay.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inner = [p for name, p in named if p.ndim == 2 and ".layers." in name] if kind == "muon" else []
    taken = {id(p) for p in inner}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    if kind == "adamw8bit":
        eight_bits = _bitsandbytes("optimizer = adamw8bit").optim.AdamW8bit
        return [eight_bits(groups, lr=learning_rate, betas=(0.9, 0.95))]
    made = [torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)]
    if inner:
        made.append(
            torch.optim.Muon(inner, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    return made


@contextlib.contextmanager
def memory_advice(*knobs: str):
    """Turns "out of memory" into a sentence that names what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"out of memory: lower {', '.join(knobs)} ({what})") from None


def step(model, optimizers: list, learning_rate: float, max_grad_norm: float) -> float:
    """One step of all optimizers on the gradient, clipped to max_grad_norm; returns its norm."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if not math.isfinite(norm):  # a step with it would make every weight NaN
        raise UserError(f"grad_norm = {norm}: training has diverged; lower learning_rate")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
    return norm


def schedule(step: int, steps: int, kind: str, warmup: int) -> float:
    """The share of the peak learning rate in step 0 .. steps - 1."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
    }[kind]

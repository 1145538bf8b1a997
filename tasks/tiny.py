"""Tiny models, made from scratch: their chat template, tokenizer and weights; one of them sees."""

import re
from collections.abc import Sequence

import torch

# ChatML with tools, as Qwen writes it, for models that are made here.
TEMPLATE = """\
{%- macro said(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for part in content -%}
      {{- '<image>' if part.type == 'image' else part.text -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
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
    {{- '<|im_start|>user\\n' + said(message.content) + '<|im_end|>\\n' -}}
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
    {{- '\\n<tool_response>\\n' + said(message.content) + '\\n</tool_response>' -}}
    {{- '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' -}}
  {%- endif -%}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt -}}
"""


CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# What stands for an image, as SmolVLM writes it.
FOR_IMAGES = ("<image>", "<fake_token_around_image>", "<global-img>")
# The tiny model is shown a square of so many pixels a side, in patches; four patches are a token.
SIDE = 32
PATCH = 8
INITIAL_RANGE = 0.07  # of weights: at these widths, larger than the usual 0.02


def tiny_tokenizer(
    conversations: list[list[dict]],
    tools: list[dict],
    whole_names: bool = False,
    sees: bool = False,
    more: Sequence[tuple[list[list[dict]], list[dict]]] = (),
):
    """Trains a byte-level BPE tokenizer on the conversations, with TEMPLATE as its chat template.

    Digits are single tokens, so numbers are copied digit by digit, and a line break ends a token,
    as the roles of the template do. All else may merge, across words too, so the parts of a task
    that never change take few tokens. whole_names: a word with a capital is a token of its own, so
    that names are copied whole; and the system prompt with its tool schemas, which never changes in
    a task, is one token: with several tools it would be most of what a model reads. sees: with the
    tokens that stand for images. more: (conversations, their tools) of the other sources of a mix.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

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

    # 1. what the template makes of the conversations, without its control tokens and markers
    markers = MARKERS + FOR_IMAGES if sees else MARKERS
    untrained = _with_template(Tokenizer.from_str(inner.to_str()), markers)
    between = re.compile("|".join(map(re.escape, CONTROL + markers)))
    texts = []
    whole = []
    for talks, schemas in ((conversations, tools), *more):
        split = []
        for talk in talks:
            text = untrained.apply_chat_template(talk, tools=schemas or None, tokenize=False)
            split.append(between.split(text))
        texts += split

        # 2. the system prompt as one token: what stands behind the first <|im_start|>, if it is the
        # same in all of them
        first = split[0][1]
        is_the_same = all(parts[1] == first for parts in split)
        if whole_names and first.startswith("system\n") and is_the_same and first not in whole:
            whole.append(first)

    # 3. the merges of all the rest
    vocabulary = 2048 if whole_names else 768
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(markers) - len(whole),
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = [part for parts in texts for part in parts if part not in whole]
    inner.train_from_iterator(pieces, trainer)
    return _with_template(inner, (*markers, *whole))


def _with_template(inner, added):
    """Makes a tokenizer of transformers with TEMPLATE; added: texts of one token each."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
    )
    tokens = [AddedToken(text, special=False, normalized=False) for text in added]
    wrapped.add_tokens(tokens)
    return wrapped


def tiny(tokenizer, seed: int = 0, hidden_size: int = 96, layers: int = 4, heads: int = 2):
    """Makes a Qwen3-shaped model from scratch, about 0.55 M parameters with a vocabulary of 768.

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
            initializer_range=INITIAL_RANGE,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tiny_that_sees(tokenizer, seed: int = 0):
    """Makes a SmolVLM-shaped model from scratch, about 0.5 M parameters: the language model of
    `tiny`, a layer less, and a tower of two layers for images of SIDE x SIDE pixels (4 tokens)."""
    from transformers import SmolVLMForConditionalGeneration

    torch.manual_seed(seed)
    return SmolVLMForConditionalGeneration(config_that_sees(tokenizer))


def config_that_sees(tokenizer):
    """Describes the shape of `tiny_that_sees`."""
    from transformers import SmolVLMConfig

    text = {
        "model_type": "qwen3",
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 48,
        "max_position_embeddings": 4096,
        "initializer_range": INITIAL_RANGE,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    tower = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "initializer_range": INITIAL_RANGE,
    }
    return SmolVLMConfig(
        text_config=text,
        vision_config=tower,
        scale_factor=2,  # patches of a token, in each direction
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        initializer_range=INITIAL_RANGE,
    )


def image_processor():
    """Shows an image to `tiny_that_sees` whole, as SIDE x SIDE pixels, each the mean of those that
    it stands for."""
    from PIL import Image
    from transformers import SmolVLMImageProcessorPil

    return SmolVLMImageProcessorPil(
        size={"longest_edge": SIDE},
        max_image_size={"longest_edge": SIDE},
        do_image_splitting=False,
        resample=Image.Resampling.BOX,
    )

"""Fixtures for every test: `tokenizer`, made here, with a ChatML template that has tools."""

import os
import signal

import pytest

# A script that starts the tests in its background has them ignore Ctrl-C, and some are about it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# nohup has them, and what they start, ignore the end of the terminal; some are about that too.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tiny tensors: a second thread gains nothing, and on a busy machine waiting costs 100 times.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Our own programs run wherever the tests do; what is refused has tests of its own.
os.environ.setdefault("NANOTOOL_UNCONFINED", "true")

# What `pytest -m quick` runs: pure and fast, for whoever edits the loop, the mask, the loss, a
# format, a reward or a key. No process, no network, no training run.
QUICK = {
    "test_chat.py",
    "test_config.py",
    "test_deadline.py",
    "test_formats.py",
    "test_house.py",
    "test_loss.py",
    "test_messages.py",
    "test_rewards.py",
    "test_rollout.py",
    "test_schema.py",
}


def pytest_ignore_collect(collection_path, config):
    """Leaves the other files alone for `-m quick`: what they import takes longer than its tests."""
    if config.option.markexpr == "quick" and collection_path.suffix == ".py":
        return collection_path.name not in QUICK
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in QUICK:
            item.add_marker("quick")


# A ChatML template in the manner of Qwen2.5: schemas in the system prompt, calls in <tool_call>,
# consecutive results in one user turn, a line break after every <|im_end|>.
CHATML = """\
{%- set system = messages[0].content if messages[0].role == 'system' else 'You help.' -%}
{{- '<|im_start|>system\\n' + system -}}
{%- if tools -%}
    {{- '\\n\\nTools, one JSON schema a line:' -}}
    {%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
    {{- '\\nCall one as <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- for m in messages -%}
    {%- if m.role == 'user' -%}
        {{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' -}}
    {%- elif m.role == 'assistant' -%}
        {{- '<|im_start|>assistant\\n' + m.content -}}
        {%- for call in m.tool_calls or [] -%}
            {{- '\\n' if m.content or not loop.first -}}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- elif m.role == 'tool' -%}
        {{- '<|im_start|>user' if loop.previtem.role != 'tool' -}}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' -}}
        {{- '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' -}}
    {%- endif -%}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt -}}
"""

TEXT = """\
hello world, the user asks and the assistant answers. system tool_call tool_response name arguments
{"name": "add", "arguments": {"a": 2, "b": 3}} print(1 + 2) def return python code output search
0 1 2 3 4 5 6 7 8 9 what is the sum of two numbers? think about it, then call the tool.
"""


def make_tokenizer(template, special, plain=(), eos="<|im_end|>", bos=None):
    """A byte-level BPE tokenizer; special: control tokens; plain: added ones that are not."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([TEXT], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=eos,
        bos_token=bos,
        pad_token="<|endoftext|>",
        additional_special_tokens=list(special),
        chat_template=template,
    )
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return made


@pytest.fixture(scope="session")
def tokenizer():
    """About 400 byte-level BPE tokens and ChatML's; <|im_end|> is eos. Do not change it."""
    special = ["<|im_start|>", "<|im_end|>"]
    plain = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    return make_tokenizer(CHATML, special, [*plain, "<think>", "</think>"])

"""Every family of models of docs/models.md: sampled, trained, saved and loaded, or refused.

    pytest tests/test_architectures.py

Pitfalls 17 and 28: a row of a batch is the row alone is transformers' generate is the trainer. The
trials are those of dev/models.py, which writes the page; each runs again here, and the page has to
say what it gives. Models are random and have two layers.
"""

import copy
import sys

import pytest
import torch

from dev.models import (
    BY_TYPE,
    FAMILIES,
    PAGE,
    calls_of,
    make,
    make_prompts,
    make_tokenizer,
    refusals_of,
    row_logprobs,
    row_of,
    sample,
    try_family,
    vllm_registry,
)
from engines.base import Sampling
from engines.cache import may_pad, new_cache, select_rows
from engines.local import TransformersEngine
from learning import model as models
from run.config import UserError
from run.loop import run_blocking

# What people train most: these are never refused.
NEVER_REFUSED = (
    "qwen2 qwen3 qwen3_moe qwen3_5 qwen3_5_text lfm2 nemotron_h granitemoehybrid gpt_oss gemma3 "
    "gemma3_text gemma4 gemma4_text ministral3 smollm3 llama mistral mixtral phi3 olmo2 olmo3 glm4 "
    "deepseek_v3 cohere falcon gpt2 gpt_neox bloom opt mpt stablelm starcoder2"
).split()
PAGE_ROWS = {}
for line in PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else ():
    if line.startswith("| "):
        PAGE_ROWS[line.split(" | ")[1]] = line
REMEDY = "run `python dev/models.py`, and read what changed"


@pytest.mark.parametrize("model_type", BY_TYPE)
def test_a_family_is_sampled_and_trained_as_the_page_says(model_type, tmp_path):
    """Pitfalls 17, 28, 34."""
    family = BY_TYPE[model_type]
    seen = try_family(family, tmp_path)
    registry = vllm_registry()
    row = row_of(family, seen, registry)
    on_page = PAGE_ROWS.get(model_type, "")
    if not registry:  # what vLLM has is not known here
        row, on_page = row.rsplit(" | ", 1)[0], on_page.rsplit(" | ", 1)[0]
    # the calls are compared below, for all families at once
    assert without_calls(row) == without_calls(on_page), REMEDY
    for line in refusals_of(family, seen):
        assert line in PAGE.read_text(encoding="utf-8").splitlines(), REMEDY
    if model_type in NEVER_REFUSED:
        assert (seen.sampled, seen.full, seen.lora) == ("yes", "yes", "yes")
        assert seen.padded


def without_calls(row: str) -> list[str]:
    cells = row.split(" | ")
    return cells[:2] + cells[3:]


def test_the_page_has_every_family_and_what_its_template_writes():
    """And at least 45 of them are sampled and trained in both ways."""
    assert list(PAGE_ROWS) == ["model_type", *BY_TYPE], REMEDY
    written = {name: row.split(" | ")[2] for name, row in PAGE_ROWS.items()}
    expected = {family.model_type: calls_of(family) for family in FAMILIES}
    assert {name: written[name] for name in expected} == expected, REMEDY
    whole = [row for row in PAGE_ROWS.values() if row.split(" | ")[3:6] == ["yes"] * 3]
    assert len(whole) >= 45


# What the trials would not see if it were broken


@pytest.fixture
def lfm2():
    return make(BY_TYPE["lfm2"])


def completions(model, lengths=(4, 9, 18)):
    """What is sampled behind the four prompts, as one batch and each alone."""
    engine = TransformersEngine(model, make_tokenizer())
    requests = []
    for prompt in make_prompts():
        requests += [(prompt, Sampling(max_new_tokens=n, seed=n)) for n in lengths]
    try:
        together = sample(engine, requests)
        alone = [sample(engine, [request])[0] for request in requests]
    finally:
        run_blocking(engine.close())
    return engine, requests, together, alone


def test_where_padding_leaks_into_a_state_only_equal_lengths_are_read_together(lfm2, monkeypatch):
    """Pitfall 17: a model that does not mask its padding is found out, and is sampled exactly."""
    assert may_pad(lfm2)
    module = sys.modules[type(lfm2).__module__]
    monkeypatch.setattr(module, "apply_mask_to_padding_states", lambda states, mask: states)
    engine, requests, together, alone = completions(lfm2)
    assert not engine.may_pad
    assert [one.ids for one in together] == [one.ids for one in alone]
    with torch.no_grad():
        for (prompt, _), done in zip(requests, together, strict=True):
            row = row_logprobs(lfm2, [prompt + done.ids], [len(prompt)])[0]
            expected = torch.tensor(done.logprobs)
            assert torch.allclose(row[len(prompt) :], expected, rtol=0, atol=3e-5)

    # and without the proof, rows would have been others
    monkeypatch.setattr("engines.local.may_pad", lambda model: True)
    _, _, together, alone = completions(lfm2)
    pairs = zip(together, alone, strict=True)
    assert any(one.logprobs[:1] != other.logprobs[:1] for one, other in pairs)


def test_a_cache_whose_rows_are_mixed_up_is_refused_in_a_sentence(lfm2, monkeypatch):
    """Pitfall 17: not sampled from a state of another row."""

    def mixes_up_the_states(part, index, rows):
        cache = select_rows(part, index, rows)
        # it calls itself for every part: only the whole has layers
        for layer in getattr(cache, "layers", ()):
            for name, state in getattr(layer, "conv_states", {}).items():
                layer.conv_states[name] = state.flip(0)
        return cache

    monkeypatch.setattr("engines.cache.select_rows", mixes_up_the_states)
    with pytest.raises(UserError, match="cannot sample from a Lfm2ForCausalLM: with its cache a"):
        TransformersEngine(lfm2, make_tokenizer())


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "nemotron_h", "gemma3_text", "kimi_linear"])
def test_every_tensor_of_a_cache_is_selected_by_row(model_type):
    """Rows may be repeated and change places; a tensor without rows in front is an error."""
    model = make(BY_TYPE[model_type])
    ids = torch.tensor([prompt[:11] for prompt in make_prompts()[2:]])
    with torch.inference_mode():
        cache = model(input_ids=ids, past_key_values=new_cache(model), use_cache=True)
        cache = cache.past_key_values
        before = tensors(copy.deepcopy(cache))
        after = tensors(select_rows(cache, torch.tensor([1, 0, 1]), 2))
    assert before and before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor[[1, 0, 1]]), name
    with pytest.raises(AssertionError, match=r"a cache with a tensor \(3, .* of 2 rows"):
        select_rows(cache, torch.tensor([0]), 2)


def tensors(cache) -> dict[str, torch.Tensor]:
    """The states, keys and values that a cache holds, by layer and name."""
    found = {}
    for number, layer in enumerate(cache.layers):
        for name in ("keys", "values"):
            if getattr(layer, name, None) is not None:
                found[f"{number} {name}"] = getattr(layer, name)
        for name in ("conv_states", "recurrent_states"):
            for key, value in getattr(layer, name, {}).items():
                if value is not None:
                    found[f"{number} {name} {key}"] = value
    return found


def test_an_engine_in_bfloat16_is_not_refused_for_its_rounding():
    """The limits are those of the type that a model multiplies in."""
    for model_type in ("qwen3", "qwen3_moe", "qwen3_5_text", "lfm2", "granitemoehybrid"):
        assert may_pad(make(BY_TYPE[model_type]).to(torch.bfloat16)), model_type


@pytest.mark.parametrize(
    ("model_type", "left_out"),
    [("nemotron_h", "mixer.out_proj"), ("jamba", "dt_proj"), ("phimoe", "router")],
)
def test_all_linear_leaves_out_where_an_adapter_has_no_effect(model_type, left_out, tmp_path):
    """Pitfall 34: what is trained has a gradient. Routers, Mamba's dt_proj, peft's own list."""
    models.save(make(BY_TYPE[model_type]), make_tokenizer(), tmp_path)
    model, _ = models.load(str(tmp_path), "lora", device="cpu", lora_r=4, lora_alpha=8)
    adapted = [name for name, _ in model.named_parameters() if "lora_B" in name]
    assert adapted and not [name for name in adapted if f"{left_out}.lora_B" in name]

"""Pins how models that also have a tower for images are trained on text: nothing of them is lost.

    pytest tests/test_whole_models.py

They are loaded whole; only the language model is trained, by full weights or adapters; what is
saved has the names of the original. Tiny random ones of each family, in folders as published.
"""

import json
import random
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from whole_shapes import SHAPES, publish

import train_grpo
import train_sft
from engines.base import Sampling
from engines.local import TransformersEngine
from learning import merge, optim, whole
from learning import model as models
from run import config
from run.config import UserError
from run.loop import run_blocking
from train_grpo import Config, LearnSettings, learn, policy_logprobs
from trajectory import Trajectory

FAMILIES = list(SHAPES)
# one of each kind of names: what all families need not repeat
FEW = ["qwen3_5", "gemma3", "gemma4", "mistral3", "smolvlm"]
LORA = {"lora_r": 4, "lora_alpha": 8}
TARGETS = ("q_proj", "v_proj")


@pytest.fixture(scope="module")
def published(tokenizer, tmp_path_factory):
    made = {}
    for family in FAMILIES:
        made[family] = publish(family, tokenizer, tmp_path_factory.mktemp(family))
    return made


def load(folder, tune="none", dtype="float32", **options):
    return models.load(str(folder), tune, dtype, "cpu", **(LORA | options))[0]


def trajectories(seed=1):
    rng = random.Random(seed)
    made = []
    for number in range(4):
        t = Trajectory({}, number // 2, reward=float(number % 2), stop="answered")
        t.add([rng.randrange(250) for _ in range(5)], 0)
        t.turn_starts.append(5)
        new = 3 + 2 * number
        t.add([rng.randrange(250) for _ in range(new)], 1, [-2.0] * new)
        made.append(t)
    return made


def logprobs(model):
    return torch.cat(policy_logprobs(model, trajectories(), 1.0, 16384)).detach()


def taught(model, steps=2):
    optimizers = optim.optimizers(model, "adamw", 0.02)
    for step in range(steps):
        learn(model, optimizers, trajectories(), 0.02, LearnSettings.of(Config()), step)


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def is_of_language_model(name):
    return not re.search("visual|vision|multi_modal|connector|embed_vision|mtp", name)


# What is saved


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_a_whole_model_is_lost_when_it_is_trained_and_saved(tokenizer, tmp_path, family):
    """Each tensor, under the name it had; the tower's bit for bit; the files of the processor."""
    base = publish(family, tokenizer, tmp_path / "base", torch.bfloat16)
    model, loaded_tokenizer = models.load(base, "full", "bfloat16", "cpu")
    taught(model)
    models.save(model, loaded_tokenizer, tmp_path / "saved")
    before = weights(base)
    after = weights(tmp_path / "saved")
    assert after.keys() == before.keys()
    of_tower = [name for name in before if not is_of_language_model(name)]
    assert of_tower
    for name in of_tower:
        assert after[name].dtype == torch.bfloat16 and torch.equal(after[name], before[name]), name
    changed = [name for name in before if not torch.equal(after[name], before[name])]
    assert any("q_proj" in name for name in changed) and len(changed) > 10
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (Path(base) / name).read_bytes()
    old = json.loads((Path(base) / "config.json").read_text())
    new = json.loads((tmp_path / "saved" / "config.json").read_text())
    for part in (old, new, *old.values(), *new.values()):
        if isinstance(part, dict):  # what was said of the whole is now said of each part
            part.pop("dtype", None)
            part.pop("transformers_version", None)
    assert new == old
    again = load(tmp_path / "saved", dtype="bfloat16")
    assert torch.equal(logprobs(again), logprobs(model))


def test_tensors_that_no_class_has_are_found_in_several_files(published, tmp_path, tokenizer):
    """As large models are published."""
    base = tmp_path / "base"
    model, _ = models.load(published["qwen3_5"], "none", "float32", "cpu")
    model.save_pretrained(base, max_shard_size="100KB")
    tokenizer.save_pretrained(base)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    save_file({"mtp.fc.weight": torch.ones(3)}, base / "extra.safetensors", {"format": "pt"})
    index["weight_map"]["mtp.fc.weight"] = "extra.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    model, _ = models.load(str(base), "full", "float32", "cpu")
    models.save(model, tokenizer, tmp_path / "saved")
    assert weights(tmp_path / "saved").keys() == index["weight_map"].keys()


def test_files_that_lack_the_tower_are_refused(tmp_path, tokenizer):
    """It would be random numbers, and be saved as if it were something."""
    base = publish("qwen3_vl", tokenizer, tmp_path)
    kept = {name: w for name, w in weights(base).items() if "visual.blocks.0." not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"its files have no weights for \S+ and 11 more"):
        load(base)


# What it computes


def text_only(model):
    """The class for the language model alone, with the same weights."""
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

    settings = model.config.get_text_config().to_dict()
    kind = settings.pop("model_type")
    rotary = {"rope_type": "default", "rope_theta": 10000.0}
    if kind == "qwen2_5_vl_text":
        made = Qwen2Config(**settings | {"rope_parameters": rotary})
    elif kind == "qwen3_vl_text":
        made = Qwen3Config(**settings | {"rope_parameters": rotary})
    else:
        made = model.config.get_text_config()
    made.tie_word_embeddings = False
    alone = AutoModelForCausalLM.from_config(made).eval()
    alone.get_decoder().load_state_dict(model.get_decoder().state_dict())
    alone.get_output_embeddings().load_state_dict(model.get_output_embeddings().state_dict())
    return alone


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_computed_as_by_the_class_for_text_alone(published, family):
    model = load(published[family])
    alone = text_only(model)
    assert type(alone) is not type(model)
    assert (logprobs(model) - logprobs(alone)).abs().max() <= 1e-6


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "mistral3", "qwen3_vl"])
def test_the_sampler_is_the_model_that_is_trained(published, family):
    """Pitfall 28: two prompts of different length in one batch, beside the trainer's logprobs."""
    model = load(published[family], "lora")
    taught(model, 1)
    engine = TransformersEngine(model, None)
    prompts = [[5, 6, 7, 8, 9, 10], [30, 31]]

    async def sample():
        import asyncio

        for _ in prompts:
            engine.join()
        asked = []
        for seed, ids in enumerate(prompts):
            asked.append(engine.generate(ids, [], Sampling(1.0, 12, seed, stop_ids=())))
        return await asyncio.gather(*asked)

    for ids, out in zip(prompts, run_blocking(sample()), strict=True):
        t = Trajectory({})
        t.add(ids, 0)
        t.add(out.ids, 1, out.logprobs)
        (scored,) = policy_logprobs(model, [t], 1.0, 16384)
        assert (scored[len(ids) :] - torch.tensor(out.logprobs)).abs().max() < 3e-5


# What is trained


@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_language_model_is_trained(published, family, tune):
    """No layer of the tower has an adapter, or a gradient, though some have the same names."""
    model = load(published[family], tune)
    before = {name: p.clone() for name, p in model.named_parameters()}
    taught(model)
    path = whole.language_model_path(model.get_base_model() if tune == "lora" else model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    for name, parameter in model.named_parameters():
        is_inside = f"{path}." in name or "lm_head" in name
        if not is_inside:
            assert "lora_" not in name and not parameter.requires_grad, name
            assert parameter.grad is None and torch.equal(parameter, before[name]), name
    if tune == "lora":
        assert trained and all(f".{path}." in name and "lora_" in name for name in trained)
        layers = {name.split(".lora_")[0].rpartition(".")[-1] for name in trained}
        assert {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"} <= layers
    parts = models.frozen_parts(model).split(", ")
    assert parts and all(re.search("visual|vision|multi_modal|connector", part) for part in parts)


def test_a_text_model_has_no_frozen_parts(published):
    model = text_only(load(published["gemma3"]))
    assert models.frozen_parts(model) == "" and not whole.is_whole(model)
    assert whole.language_model_path(model) == "model" and whole.unused_tensors(model) == {}


def test_lora_targets_are_looked_for_in_the_language_model_alone(published, tmp_path, tokenizer):
    """Gemma 3's tower has q_proj and v_proj as well. The head may be named; the tower may not."""
    model = load(published["gemma3"], "lora", lora_targets=("self_attn.q_proj", "v_proj"))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2 and all("model.language_model." in name for name in trained)
    models.save(model, tokenizer, tmp_path)
    same = load(tmp_path, "lora", lora_targets=("v_proj", "self_attn.q_proj"))
    assert [name for name, p in same.named_parameters() if p.requires_grad] == trained
    with pytest.raises(UserError, match=r"has lora_targets = self_attn\.q_proj,v_proj, and train"):
        load(tmp_path, "lora", lora_targets=TARGETS)
    head = load(published["mistral3"], "lora", lora_targets=("q_proj", "lm_head"))
    trained = [name for name, p in head.named_parameters() if p.requires_grad]
    assert [name for name in trained if ".lm_head.lora_" in name] and len(trained) == 2 * 2 + 2
    with pytest.raises(UserError, match=r"^lora_targets = \('linear_fc1',\): Target modules"):
        load(published["qwen3_vl"], "lora", lora_targets=("linear_fc1",))


def test_qlora_rounds_the_language_model_and_leaves_the_tower(published, tmp_path, tokenizer):
    """And its base, written out for vLLM, is whole again."""
    from bitsandbytes.nn import Linear4bit

    for family in ("gemma3", "qwen3_vl"):
        model = load(published[family], "qlora")
        path = whole.language_model_path(model.get_base_model())
        rounded = [n for n, m in model.named_modules() if isinstance(m, Linear4bit)]
        assert len(rounded) == 2 * 7 and all(f"{path}." in name for name in rounded)
        taught(model)
        models.save(model, tokenizer, tmp_path / family)
        again = load(tmp_path / family, "none4bit")
        assert torch.allclose(logprobs(again), logprobs(model), atol=1e-6)
        models.save_dequantized(model, published[family], "float32", tmp_path / f"{family}-plain")
        before = weights(published[family])
        plain = weights(tmp_path / f"{family}-plain")
        assert plain.keys() == before.keys()
        for name in before:
            if not is_of_language_model(name):
                assert torch.equal(plain[name], before[name]), name
        with model.disable_adapter():
            base = load(tmp_path / f"{family}-plain")
            assert torch.allclose(logprobs(base), logprobs(model), atol=1e-5)


# Adapters


@pytest.mark.parametrize("family", FEW)
def test_a_merged_folder_is_whole_and_says_what_the_adapter_says(
    published, tmp_path, tokenizer, family
):
    model = load(published[family], "lora")
    taught(model)
    models.save(model, tokenizer, tmp_path / "adapter")
    names = whole.adapter_names(tmp_path / "adapter")
    path = whole.language_model_path(model.get_base_model())
    assert names and all(name.startswith(f"base_model.model.{path}.") for name in names)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card
    merge.merge(merge.Config(f"{tmp_path}/adapter", f"{tmp_path}/merged", "float32"))
    adapted = load(tmp_path / "adapter")
    assert torch.equal(logprobs(adapted), logprobs(model))
    assert torch.allclose(logprobs(load(tmp_path / "merged")), logprobs(adapted), atol=1e-4)
    assert not torch.allclose(logprobs(adapted), logprobs(load(published[family])), atol=1e-2)
    before = weights(published[family])
    merged = weights(tmp_path / "merged")
    assert merged.keys() == before.keys()
    for name in before:
        if not is_of_language_model(name):
            assert torch.equal(merged[name], before[name]), name
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()


def foreign(model, targets, folder, base, seed=3):
    """An adapter as another program makes it, with weights that matter."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2, generator=generator)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    models.load_tokenizer(str(base)).save_pretrained(folder)
    return adapted


@pytest.mark.parametrize("family", FEW)
def test_an_adapter_of_the_class_for_text_alone_is_put_where_it_was(
    published, tmp_path, tokenizer, family
):
    """Its names lack the part: PEFT would load none of it, with a warning; vLLM, without one
    (vllm#49354). Here it is loaded, trained on, and saved under the whole model's names."""
    alone = foreign(text_only(load(published[family])), list(TARGETS), tmp_path, published[family])
    assert not any("language_model" in name for name in whole.adapter_names(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(tmp_path)
    assert torch.allclose(logprobs(model), logprobs(alone), atol=1e-6)
    assert not torch.allclose(logprobs(model), logprobs(load(published[family])), atol=1e-2)
    with pytest.raises(UserError, match="trained on the language model alone, .* merge it"):
        models.check_usable_alone(str(tmp_path))

    model = load(tmp_path, "lora", lora_targets=TARGETS)
    reference = models.load_reference(str(tmp_path), model, "lora", "float32")
    taught(model)
    with models.with_initial_weights(reference):
        assert torch.allclose(logprobs(model), logprobs(alone), atol=1e-6)
    models.save(model, tokenizer, tmp_path / "again")
    models.check_usable_alone(str(tmp_path / "again"))
    assert torch.equal(logprobs(load(tmp_path / "again")), logprobs(model))
    merge.merge(merge.Config(str(tmp_path), f"{tmp_path}/merged", "float32"))
    assert weights(tmp_path / "merged").keys() == weights(published[family]).keys()


def test_an_adapter_that_has_the_tower_too_keeps_it_as_it_is(published, tmp_path, tokenizer):
    """Made elsewhere, by names alone. Its part in the language model is trained on."""
    adapted = foreign(load(published["gemma3"]), list(TARGETS), tmp_path, published["gemma3"])
    assert any("vision_tower" in name for name in whole.adapter_names(tmp_path))
    model = load(tmp_path, "lora")
    assert torch.equal(logprobs(model), logprobs(adapted))
    reference = models.load_reference(str(tmp_path), model, "lora", "float32")
    with models.with_initial_weights(reference):
        pass
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("model.language_model." in name for name in trained)
    taught(model)
    models.save(model, tokenizer, tmp_path / "again")
    before = load_file(tmp_path / "adapter_model.safetensors")
    after = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    for name in before:
        assert torch.equal(after[name], before[name]) == ("vision_tower" in name), name


def test_an_adapter_that_fits_nowhere_is_refused(published, tmp_path, tokenizer):
    """One of the whole model on the language model alone, and one of another family."""
    alone = text_only(load(published["gemma3"]))
    models.save(alone, tokenizer, tmp_path / "alone")
    model = load(published["gemma3"], "lora")
    models.save(model, tokenizer, tmp_path / "adapter")
    for base, targets in ((tmp_path / "alone", ["q_proj"]), (published["smolvlm"], ["q_proj"])):
        settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        settings |= {"base_model_name_or_path": str(base), "target_modules": targets}
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match="the adapter does not fit its base"):
            load(tmp_path / "adapter")


# What goes with it


def test_ends_templates_and_positions_are_found_where_whole_models_have_them(
    published, tmp_path, tokenizer
):
    """The part that writes has its own settings, and a processor its own file."""
    base = Path(publish("smolvlm", tokenizer, tmp_path))
    (base / "generation_config.json").unlink()
    settings = json.loads((base / "config.json").read_text())
    settings["text_config"]["eos_token_id"] = [3, 5]
    settings.pop("eos_token_id", None)
    (base / "config.json").write_text(json.dumps(settings))
    assert models.eos_ids(str(base)) == [3, 5]

    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    (base / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert models.load_tokenizer(str(base)).chat_template == template
    models.check_positions(load(base), "m", 2048)
    with pytest.raises(UserError, match="the model has 2048 positions"):
        models.check_positions(load(base), "m", 2049)


def options(base, out_dir, tmp_path, *more):
    (tmp_path / "mine.py").write_text("def spread(t, e): return sum(t.ids) % 7\n")
    return [
        f"--model={base}",
        f"--out_dir={out_dir}",
        "--prompts_per_step=2",
        "--group_size=3",
        "--max_new_tokens=4",
        f"--rewards={tmp_path}/mine.py:spread",
        "--max_tokens=1200",
        "--learning_rate=1e-2",
        "--format=fence",
        "--tools=",
        "--save_every=1",
        *more,
    ]


def test_a_run_that_goes_on_is_bit_for_bit_the_one_that_was_not_stopped(
    published, tmp_path, capsys, monkeypatch
):
    """Pitfall 52, with the tower in every checkpoint; the run says what it does not train."""
    base = published["gemma3"]

    def train(out_dir, *more):
        argv = options(base, out_dir, tmp_path, "--tune=full", "--steps=2", *more)
        train_grpo.train(config.parse(Config, argv, train_grpo.check))

    def stopped_in_the_second_step(*arguments):
        if arguments[5] == 1:
            raise KeyboardInterrupt
        return learn(*arguments)

    train(tmp_path / "through")
    printed = capsys.readouterr().out
    assert "not trained: model.vision_tower, model.multi_modal_projector" in printed
    with monkeypatch.context() as patch:
        patch.setattr(train_grpo, "learn", stopped_in_the_second_step)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped")
    train(tmp_path / "stopped", "--resume=true")
    one = weights(tmp_path / "through")
    other = weights(tmp_path / "stopped")
    assert one.keys() == other.keys() == weights(base).keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "stopped" / "preprocessor_config.json").is_file()


def test_sft_trains_gemma_3_which_wants_to_know_what_is_an_image_while_it_trains(
    published, tmp_path
):
    argv = [
        f"--model={published['gemma3']}",
        f"--out_dir={tmp_path}/sft",
        "--format=fence",
        "--rows=8",
        "--batch_size=4",
        "--tune=full",
    ]
    train_sft.train(config.parse(train_sft.Config, argv, train_sft.check))
    assert weights(tmp_path / "sft").keys() == weights(published["gemma3"]).keys()

"""Pins what becomes of models and adapters that people bring (B5), and how ours are left (C8, D3).

    pytest tests/test_foreign_models.py

Each is loaded where peft and transformers load it, or refused in one sentence before the first
step; what cannot be saved behind the last step is not trained. Adapters name their base for good,
and saving one asks no network. A tiny model from scratch, in folders changed as people's are.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import train_grpo
import train_sft
from learning import checkpoint, merge
from learning import model as models
from run import config
from run.config import UserError
from tasks import tiny as tiny_model
from train_grpo import Config, policy_logprobs
from trajectory import Trajectory

LORA = {"lora_r": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    made = tmp_path_factory.mktemp("base")
    words = [[{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d e f"}]]
    tokenizer = tiny_model.tiny_tokenizer(words, [])
    models.save(tiny_model.tiny(tokenizer, layers=2), tokenizer, made)
    return made


@pytest.fixture
def brought(base, tmp_path):
    """A copy of the model, to be changed."""
    return Path(shutil.copytree(base, tmp_path / "brought"))


def load(folder, tune):
    return models.load(str(folder), tune, "float32", "cpu", **LORA)[0]


def refusal(folder, tune):
    """The one sentence."""
    with pytest.raises(UserError) as caught:
        load(folder, tune)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 700
    return said


def change(file, **values):
    settings = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(settings | values))


def logprobs(model):
    t = Trajectory({})
    t.add([5, 6, 7, 8], 0)
    t.add([9, 10, 11, 12, 13], 1, [-2.0] * 5)
    return policy_logprobs(model, [t], 1.0, 16384)[0]


def adapter(base, folder, **options):
    """An adapter as peft alone writes it, with weights that are not all 0."""
    import peft
    from transformers import AutoModelForCausalLM

    kind = options.pop("kind", peft.LoraConfig)
    model = AutoModelForCausalLM.from_pretrained(base)
    if kind is peft.LoraConfig:
        options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | options
    torch.manual_seed(0)
    model = peft.get_peft_model(model, kind(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(folder)
    models.load_tokenizer(str(base)).save_pretrained(folder)
    return model


# What is saved behind the last step


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.6},
        {"top_p": 0.9, "top_k": 20},
        {"do_sample": False, "temperature": 0.6, "min_p": 0.1},
        {"pad_token_id": -1},
    ],
)
def test_a_generation_config_that_transformers_would_not_save_is_mended(brought, tmp_path, values):
    """B5: it loads, trains and then cannot be saved: everything was lost."""
    change(brought / "generation_config.json", **values)
    for tune in ("full", "lora"):
        model = load(brought, tune)
        models.save(model, models.load_tokenizer(str(brought)), tmp_path / tune)
    written = json.loads((tmp_path / "full" / "generation_config.json").read_text())
    assert written.get("temperature") == values.get("temperature")
    assert written.get("do_sample") is True or "pad_token_id" in values
    load(tmp_path / "full", "none")


def test_a_generation_config_that_cannot_be_mended_is_refused(brought):
    """B5."""
    change(brought / "generation_config.json", length_penalty=2.0, num_beams=1)
    says = refusal(brought, "full")
    assert "generation_config.json could not be saved" in says and says.endswith(
        "mend or remove it"
    )
    load(brought, "none")  # what is only played is not saved


def test_a_merged_model_is_saved_though_its_base_was_not_savable(brought, tmp_path):
    """B5."""
    adapter(brought, tmp_path / "adapter")
    change(brought / "generation_config.json", temperature=0.6)
    cfg = merge.Config(adapter=f"{tmp_path}/adapter", out_dir=f"{tmp_path}/merged")
    merge.merge(cfg)
    load(tmp_path / "merged", "none")


def test_a_run_saves_once_before_its_first_step(brought, tmp_path, monkeypatch):
    """B5: whatever cannot be saved is told at the start, and leaves the folder as it was."""
    argv = [f"--model={brought}", f"--out_dir={tmp_path}/out", "--steps=2", "--max_tokens=1200"]
    argv += ["--tools=", "--format=fence", "--prompts_per_step=2", "--group_size=2"]
    cfg = config.parse(Config, [*argv, "--max_new_tokens=4"], train_grpo.check)
    saved = []

    def fails(model, tokenizer, folder, state=None):
        saved.append(folder)
        raise ValueError("a writer's\nown words")

    monkeypatch.setattr(checkpoint.models, "save", fails)
    monkeypatch.setattr(train_grpo, "sample_groups", lambda *_, **__: pytest.fail("a step"))
    with pytest.raises(UserError, match=r"could not be saved in .* \(a writer's own words\): make"):
        train_grpo.train(cfg)
    assert saved == [tmp_path / "out" / "checkpoints" / "aside"]
    assert not any((tmp_path / "out" / "checkpoints").iterdir())
    monkeypatch.undo()
    resumed = config.parse(Config, [*argv, "--max_new_tokens=4", "--resume=true"], train_grpo.check)
    train_grpo.train(resumed)  # mended, it begins


# Folders that are not whole


def weights(change_them):
    def damage(folder):
        from safetensors.torch import load_file, save_file

        table = load_file(folder / "model.safetensors")
        change_them(table)
        save_file(table, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def setting(**values):
    return lambda folder: change(folder / "config.json", **values)


def text(name, written):
    return lambda folder: (folder / name).write_text(written)


def without(name):
    return lambda folder: (folder / name).unlink()


MLP = "model.layers.0.mlp.down_proj.weight"
GIT_LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
CODE = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
BROKEN = {  # what people bring -> a part of the one sentence
    "no config": (without("config.json"), "has no config.json"),
    "no weights": (without("model.safetensors"), "no file named model.safetensors"),
    "no tokenizer": (without("tokenizer.json"), "tokenizer"),
    "a pointer of git-lfs": (text("model.safetensors", GIT_LFS), "header"),
    "no bytes": (text("model.safetensors", ""), "header"),
    "a config that is a list": (text("config.json", "[]"), "model = "),
    "a torn config": (text("config.json", '{"model_type"'), "not a valid JSON"),
    "a torn tokenizer": (text("tokenizer.json", "{"), "model = "),
    "a tokenizer's config that is a list": (text("tokenizer_config.json", "[]"), "model = "),
    "a weight is missing": (weights(lambda table: table.pop(MLP)), f"no weights for {MLP}, so"),
    "weights of another shape": (
        weights(lambda table: table.update({MLP: torch.ones(3, 3)})),
        "model = ",
    ),
    "weights that are no numbers": (weights(lambda table: table[MLP].fill_(torch.nan)), "damaged"),
    "no head": (setting(tie_word_embeddings=False), "no weights for lm_head.weight"),
    "an unknown kind": (setting(model_type="foo"), "`foo`"),
    "code of its own": (setting(model_type="foo", auto_map=CODE), "model = "),
    "no kind": (setting(model_type=None), "model = "),
    "an encoder": (setting(model_type="bert"), "no weights for"),
    "another vocabulary": (setting(vocab_size=3), "model = "),
    "no layers": (setting(num_hidden_layers=0), "num_hidden_layers"),
    "a half of the shards": (
        lambda folder: (
            (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors"),
            change(folder / "model.safetensors.index.json", metadata={}, weight_map={"x": "y"}),
        ),
        "model = ",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_is_not_whole_is_refused_in_one_sentence(name, brought, monkeypatch):
    """B5: weights that are missing were made up, and trained; a folder with code of its own waited
    for an answer of who may be asleep."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    damage, part = BROKEN[name]
    damage(brought)
    assert part in refusal(brought, "full")


def test_there_are_at_least_twenty_of_them():
    assert len(BROKEN) >= 20


# Adapters of others


@pytest.mark.parametrize("name", [None, "", 3])
def test_an_adapter_that_does_not_name_its_base_is_refused(base, tmp_path, name):
    """B5."""
    adapter(base, tmp_path)
    change(tmp_path / "adapter_config.json", base_model_name_or_path=name)
    for tune in ("none", "lora", "qlora"):
        assert f"has base_model_name_or_path = {name!r}: write" in refusal(tmp_path, tune)


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_adapter_settings_that_are_none_are_refused(base, tmp_path, text):
    """B5."""
    adapter(base, tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    says = refusal(tmp_path, "lora")
    assert "adapter_config.json" in says and says.endswith("mend it")


def test_an_adapter_with_biases_is_trained_on_but_not_with_beta(base, tmp_path):
    """B5: the biases are the base's own, so there is no reference without them."""
    theirs = adapter(base, tmp_path, bias="lora_only")
    model = models.load(str(tmp_path), "lora", "float32", "cpu", **LORA)[0]
    assert torch.allclose(logprobs(model), logprobs(theirs), atol=1e-5)
    with pytest.raises(UserError, match=r"beta > 0 .* bias = 'lora_only': .* use beta=0"):
        models.load_reference(str(tmp_path), model, "lora", "float32")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changed_its_base_is_played_and_merged_but_not_trained_on(
    base, tmp_path, init
):
    """B5: on the plain base, as vLLM and the reference have it, it is another model."""
    theirs = adapter(base, tmp_path / "a", init_lora_weights=init)
    played = load(tmp_path / "a", "none")
    assert torch.allclose(logprobs(played), logprobs(theirs), atol=1e-3)
    says = refusal(tmp_path / "a", "lora")
    assert f"init_lora_weights = '{init}'" in says and "python -m learning.merge" in says
    with pytest.raises(UserError, match=f"is a {init} adapter, which vLLM cannot"):
        models.check_usable_alone(str(tmp_path / "a"))
    out_dir = tmp_path / "merged"
    merge.merge(merge.Config(f"{tmp_path}/a", str(out_dir), "float32"))
    assert torch.allclose(logprobs(load(out_dir, "lora")), logprobs(theirs), atol=1e-3)


def test_an_adapter_of_another_kind_is_played_and_merged_but_not_trained_on(base, tmp_path):
    """B5: IA3."""
    import peft

    targets = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    theirs = adapter(base, tmp_path / "a", kind=peft.IA3Config, **targets)
    assert torch.allclose(logprobs(load(tmp_path / "a", "none")), logprobs(theirs), atol=1e-5)
    assert "is a IA3 adapter: only LoRA can be trained on" in refusal(tmp_path / "a", "lora")
    with pytest.raises(UserError, match="is a IA3 adapter, which vLLM cannot"):
        models.check_usable_alone(str(tmp_path / "a"))
    out_dir = tmp_path / "merged"
    merge.merge(merge.Config(f"{tmp_path}/a", str(out_dir), "float32"))
    assert torch.allclose(logprobs(load(out_dir, "none")), logprobs(theirs), atol=1e-5)


def test_an_adapter_of_virtual_tokens_is_refused(base, tmp_path):
    """B5: a trajectory has no such tokens: it was played without them, silently."""
    import peft

    adapter(base, tmp_path, kind=peft.PromptTuningConfig, num_virtual_tokens=4)
    for tune in ("none", "lora"):
        assert "is a PROMPT_TUNING adapter, which cannot be used" in refusal(tmp_path, tune)


def test_an_adapter_with_a_resized_vocabulary_is_refused_in_one_sentence(base, tmp_path):
    """B5: peft loads it onto a base that was resized alike."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    models.load_tokenizer(str(base)).save_pretrained(tmp_path)
    for tune in ("none", "lora"):
        assert "does not fit its base, whose vocabulary was resized" in refusal(tmp_path, tune)


# Whole models of others


@pytest.mark.parametrize("tune", ["none", "full", "lora"])
def test_a_tokenizer_larger_than_the_embedding_is_refused(brought, tune):
    """B5: the first such token ends a run, on a GPU without a word of why."""
    tokenizer = models.load_tokenizer(str(brought))
    tokenizer.add_tokens(["<tool_call>x", "<answer>"])
    tokenizer.save_pretrained(brought)
    assert "its tokenizer has '<" in refusal(brought, tune)


def test_a_special_token_beyond_the_embedding_that_nobody_meets_is_none_of_our_business(brought):
    """Gemma 3 has one, for an image, in its text-only models too."""
    tokenizer = models.load_tokenizer(str(brought))
    rows = load(brought, "none").get_input_embeddings().num_embeddings
    while len(tokenizer) < rows:
        tokenizer.add_special_tokens({"additional_special_tokens": [f"<pad{len(tokenizer)}>"]})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(brought)
    load(brought, "full")


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors"])
def test_weights_that_are_rounded_in_the_files_are_refused_in_one_sentence(brought, method):
    """B5: to train them needs packages that may not be there, or is impossible."""
    rounding = {"quant_method": method, "bits": 4, "group_size": 32}
    change(brought / "config.json", quantization_config=rounding)
    for tune in ("full", "qlora"):
        assert f"({method})" in refusal(brought, tune)
    for tune in ("lora", "none"):
        assert f"model = '{brought}'" in refusal(brought, tune)


@pytest.fixture(scope="module")
def four_bits(base, tmp_path_factory):
    """The model as bitsandbytes users save it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    made = tmp_path_factory.mktemp("four_bits")
    rounding = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    options = {"quantization_config": rounding, "device_map": {"": "cpu"}}
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options).save_pretrained(made)
    models.load_tokenizer(str(base)).save_pretrained(made)
    return made


def test_a_folder_of_four_bits_is_trained_with_adapters_only(four_bits, tmp_path):
    """B5."""
    assert "(bitsandbytes): they cannot be trained, so use tune=lora" in refusal(four_bits, "full")
    played = load(four_bits, "none")
    for tune in ("lora", "qlora"):
        model = load(four_bits, tune)
        assert models.is_quantized(model)
        assert torch.equal(logprobs(model), logprobs(played))
    with pytest.raises(UserError, match="is rounded to 4 bits in its own files"):
        models.save_dequantized(model, str(four_bits), "float32", tmp_path)


def test_an_adapter_on_a_folder_of_four_bits_is_not_merged(four_bits, tmp_path):
    """B5: adding to rounded weights and rounding the sum would lose a part of what was learnt."""
    model = load(four_bits, "lora")
    models.save(model, models.load_tokenizer(str(four_bits)), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"its base .* has weights that are rounded \(bitsandbytes"):
        merge.merge(merge.Config(f"{tmp_path}/adapter", f"{tmp_path}/merged"))
    assert not (tmp_path / "merged").exists()


def rope(kind, **values):
    return {"rope_type": kind, "rope_theta": 10000.0, **values}


@pytest.mark.parametrize(
    "parameters, most",
    [
        (rope("default"), 4096),
        (rope("longrope", original_max_position_embeddings=1024), 1024),
        (rope("dynamic", factor=2.0), 4096),
        (rope("yarn", factor=4.0, original_max_position_embeddings=1024), 4096),
        ({"full_attention": rope("longrope", original_max_position_embeddings=512)}, 512),
    ],
)
def test_more_tokens_than_a_model_has_positions_are_refused(base, parameters, most):
    """A15: beyond a length, longrope and dynamic scaling change the rows beside a long one too."""
    model = load(base, "none")
    model.config.max_position_embeddings = 4096
    model.config.rope_parameters = parameters
    models.check_positions(model, "m", most)
    with pytest.raises(UserError, match=f"^max_tokens = {most + 1} .* use --max_tokens={most} or"):
        models.check_positions(model, "m", most + 1)


def test_a_run_beyond_its_models_positions_is_refused(brought, tmp_path):
    """A15: of both trainers, before the first step."""
    change(brought / "config.json", max_position_embeddings=600)
    common = [f"--model={brought}", "--format=fence"]
    grpo = [*common, f"--out_dir={tmp_path}/grpo", "--max_tokens=700", "--tools="]
    cfg = config.parse(Config, grpo, train_grpo.check)
    with pytest.raises(UserError, match="^max_tokens = 700 .*: the model has 600 positions"):
        train_grpo.train(cfg)
    change(brought / "config.json", max_position_embeddings=20)
    sft = [*common, f"--out_dir={tmp_path}/sft", "--rows=40"]
    cfg = config.parse(train_sft.Config, sft, train_sft.check)
    with pytest.raises(UserError, match="^max_tokens = .*: the model has 20 positions"):
        train_sft.train(cfg)


# Ours


def test_saving_an_adapter_asks_no_network(brought, tmp_path, monkeypatch):
    """C8: peft asks the hub for the base's config.json, 10 seconds where nothing answers; and a
    name of a hub is what the base is called on most days."""
    import peft.utils.other
    import peft.utils.save_and_load

    asked = []
    for module in (peft.utils.other, peft.utils.save_and_load):
        monkeypatch.setattr(module, "file_exists", lambda *a, **_: asked.append(a) or True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **_: asked.append(a))
    for number, targets in enumerate((("all-linear",), ("q_proj",), ("q_proj", "embed_tokens"))):
        options = LORA | {"lora_targets": targets}
        model, tokenizer = models.load(str(brought), "lora", "float32", "cpu", **options)
        model.peft_config["default"].base_model_name_or_path = "somebody/some-model"
        models.save(model, tokenizer, tmp_path / str(number))
        models.save_adapter(model, tmp_path / f"synced-{number}")
        for folder in (str(number), f"synced-{number}"):
            change(tmp_path / folder / "adapter_config.json", base_model_name_or_path=str(brought))
        again = load(tmp_path / str(number), "none")
        assert torch.equal(logprobs(again), logprobs(model))
    assert not asked


def test_an_adapter_names_its_base_for_good(brought, tmp_path, monkeypatch):
    """D3: it is found from any folder; and its card is one."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = models.load("brought", "lora", "float32", "cpu", **LORA)
    models.save(model, tokenizer, "adapter")
    monkeypatch.chdir("/")
    load(tmp_path / "adapter", "lora")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(brought)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"base_model: {brought}\n" in card and "More Information Needed" not in card
    assert models.lasting_name("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    assert models.lasting_name(".") == "/"

"""How a model is tuned: LoRA, QLoRA, references, recomputed layers, precision, merging.

    pytest tests/test_tune.py

Pinned here: what is trained and what stays bit for bit as it was, that the sampler is the model
that is trained, and what KL compares with. A tiny model from scratch, in a folder.
"""

import copy
import random
import sys

import pytest
import torch

import train_grpo
from engines.base import Sampling
from engines.local import TransformersEngine
from learning import merge, optim
from learning import model as models
from run import config
from run.config import UserError
from run.loop import run_blocking
from tasks import tiny as tiny_model
from train_grpo import Config, LearnSettings, learn, policy_logprobs
from trajectory import Trajectory

LORA = {"lora_r": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """96 wide, no multiple of the 64 that the quick way of bitsandbytes needs."""
    made = tmp_path_factory.mktemp("base")
    words = [[{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d e f"}]]
    tokenizer = tiny_model.tiny_tokenizer(words, [])
    model = tiny_model.tiny(tokenizer, hidden_size=96, layers=2)
    models.save(model, tokenizer, made)
    return made


def load(folder, tune, dtype="float32", targets=("all-linear",)):
    model, _ = models.load(str(folder), tune, dtype, "cpu", lora_targets=targets, **LORA)
    return model


def trajectories(count=6):
    rng = random.Random(1)
    trajectories = []
    for i in range(count):
        new_tokens = 3 + i
        t = Trajectory({}, i // 3, reward=float(i % 3), stop="answered")
        t.add([rng.randrange(250) for _ in range(4)], 0)
        t.turn_starts.append(4)
        t.add([rng.randrange(250) for _ in range(new_tokens)], 1, [-2.0] * new_tokens)
        trajectories.append(t)
    return trajectories


def logprobs(model, rows=None):
    return torch.cat(policy_logprobs(model, rows or trajectories(), 1.0, 16384))


def taught(model, steps=2, reference=None, **options):
    """Trains the model for some steps; returns the metrics of the last one."""
    cfg = Config(learning_rate=0.02, **options)
    settings = LearnSettings.of(cfg)
    optimizers = optim.optimizers(model, cfg.optimizer, cfg.learning_rate)
    for step in range(steps):
        metrics = learn(model, optimizers, trajectories(), 0.02, settings, step, reference)
    return metrics


def frozen_part(model):
    return {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("tune", ["lora", "qlora"])
def test_only_adapters_are_trained_and_the_base_stays_bit_for_bit(folder, tune):
    """Pitfalls 31, 34: through learning, switching adapters off for the KL, saving and sampling."""
    model = load(folder, tune)
    base = frozen_part(model)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names and all("lora_" in name for name in names)
    before = logprobs(model)
    metrics = taught(model, 3, beta=0.1, reference=model)
    assert metrics["kl"] > 0 and not torch.equal(logprobs(model), before)
    after = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    assert after.keys() == base.keys()
    assert all(torch.equal(base[name], p) for name, p in after.items())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    with models.with_initial_weights(model):
        assert torch.equal(logprobs(model), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names


def test_all_linear_means_every_linear_layer_but_the_head(folder):
    model = load(folder, "lora")
    adapted = {n.split(".lora_A")[0].split(".")[-1] for n, _ in model.named_parameters()}
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} <= adapted
    only = load(folder, "lora", targets=("q_proj",))
    assert all("q_proj" in n for n, p in only.named_parameters() if p.requires_grad)


def test_qlora_holds_its_linear_layers_in_four_bits_twice_quantised(folder):
    from bitsandbytes.nn import Linear4bit

    model = load(folder, "qlora")
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 2 * 7
    for layer in layers:
        state = layer.weight.quant_state
        assert layer.weight.dtype == torch.uint8 and state.quant_type == "nf4" and state.nested
        assert layer.weight.numel() == layer.in_features * layer.out_features / 2
    assert model.get_output_embeddings().weight.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "tune, dtype", [("qlora", "float32"), ("full", "mixed"), ("lora", "mixed")]
)
def test_the_sampler_is_the_model_that_is_trained(folder, tune, dtype):
    """Pitfall 28, and bitsandbytes' quick CPU path, which would round when sampling begins."""
    model = load(folder, tune, dtype)
    before = {n: p.clone() for n, p in model.named_parameters()}
    engine = TransformersEngine(model, None)
    engine.join()
    prompt = [5, 6, 7, 8]
    out = run_blocking(engine.generate(prompt, [], Sampling(1.0, 12, 3, stop_ids=())))
    engine.leave()
    t = Trajectory({})
    t.add(prompt, 0)
    t.add(out.ids, 1, out.logprobs)
    (scored,) = policy_logprobs(model, [t], 1.0, 16384)
    off = (scored[4:] - torch.tensor(out.logprobs)).abs().mean()
    assert off < (1e-5 if dtype == "float32" else 0.05)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    if dtype == "mixed":  # the products are rounded, the weights are not
        exact = load(folder, "none")
        difference = (logprobs(model) - logprobs(exact)).abs().max()
        assert 1e-6 < difference < 0.1
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert not torch.is_autocast_enabled("cpu")


def test_bfloat16_weights_are_bfloat16_and_logprobs_are_float32(folder):
    model = load(folder, "full", "bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logprobs(model).dtype == torch.float32
    taught(model)


def test_the_reference_of_full_weights_is_a_frozen_copy(folder):
    """Pitfall 25: the KL begins at exactly 0 and rises as the policy leaves."""
    model = load(folder, "full")
    reference = models.load_reference(str(folder), model, "full", "float32")
    assert reference is not model and not any(p.requires_grad for p in reference.parameters())
    before = logprobs(model)
    assert taught(model, 1, reference, beta=0.1)["kl"] == 0
    assert taught(model, 1, reference, beta=0.1)["kl"] > 0
    assert torch.equal(logprobs(reference), before) and not torch.equal(logprobs(model), before)


@pytest.mark.parametrize("tune", ["lora", "qlora"])
def test_the_reference_of_an_adapter_that_is_trained_on_is_that_adapter(folder, tmp_path, tune):
    """Pitfall 25: not the base without it."""
    model, tokenizer = models.load(str(folder), tune, "float32", "cpu", **LORA)
    base = logprobs(model)
    taught(model)
    models.save(model, tokenizer, tmp_path / "first")
    began = logprobs(model)

    again = load(tmp_path / "first", tune)
    reference = models.load_reference(str(tmp_path / "first"), again, tune, "float32")
    assert reference is again and torch.equal(logprobs(again), began)
    names = {n for n, p in again.named_parameters() if p.requires_grad}
    assert names and all(".default." in name for name in names)
    assert taught(again, 1, reference, beta=0.1)["kl"] == 0
    assert taught(again, 1, reference, beta=0.1)["kl"] > 0
    with models.with_initial_weights(again):
        assert torch.equal(logprobs(again), began)
    assert not torch.equal(began, base) and not torch.equal(logprobs(again), began)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == names
    models.save(again, tokenizer, tmp_path / "second")
    files = sorted(path.name for path in (tmp_path / "second").iterdir())
    assert "adapter_model.safetensors" in files and "reference" not in files


@pytest.mark.parametrize("tune", ["lora", "qlora"])
def test_an_adapter_is_trained_on_with_its_own_layers_or_refused(folder, tmp_path, tune):
    """Pitfalls 25, 55: other lora_targets would have no effect. Their order is no difference."""
    own = ("q_proj", "v_proj")
    model, tokenizer = models.load(str(folder), tune, "float32", "cpu", lora_targets=own, **LORA)
    models.save(model, tokenizer, tmp_path)
    for targets in (("all-linear",), ("v_proj", "q_proj")):
        load(tmp_path, tune, targets=targets)
    load(tmp_path, "none", targets=("k_proj",))  # nothing is trained
    for targets in (("q_proj",), ("q_proj", "v_proj", "k_proj")):
        with pytest.raises(UserError, match="has lora_targets = q_proj,v_proj, and training it"):
            load(tmp_path, tune, targets=targets)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_recomputed_layers_give_the_same_gradient_and_no_dropout(folder, tune):
    """Pitfalls 34, 35: they are really recomputed, though the model is in eval mode."""
    plain = load(folder, tune)
    for layer in plain.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.5
    other = copy.deepcopy(plain)
    models.recompute_layers(other)
    calls = []
    other.get_decoder().layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    cfg = Config(max_grad_norm=1e9)
    for model in (plain, other):
        learn(model, [], trajectories(), 0.0, LearnSettings.of(cfg))
    assert len(calls) == 2  # once forward, once again in the backward pass
    assert not other.training and not any(m.training for m in other.modules())
    theirs = dict(other.named_parameters())
    trained = [(n, p) for n, p in plain.named_parameters() if p.grad is not None]
    assert trained
    for name, p in trained:
        assert torch.allclose(p.grad, theirs[name].grad, rtol=1e-5, atol=1e-7), name


def test_adamw8bit_keeps_its_moments_in_a_byte_each_and_learns(folder):
    model = load(folder, "full")
    before = logprobs(model)
    optimizers = optim.optimizers(model, "adamw8bit", 0.01)
    for step in range(2):
        learn(model, optimizers, trajectories(), 0.01, LearnSettings.of(Config()), step)
    (optimizer,) = optimizers
    states = [state for p, state in optimizer.state.items() if p.numel() >= 4096]
    assert states and all(s["state1"].dtype == s["state2"].dtype == torch.uint8 for s in states)
    assert not torch.equal(logprobs(model), before)


def test_without_bitsandbytes_the_message_has_the_pip_line(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r'^tune = qlora needs .*: pip install -e "\.\[qlora\]"$'):
        load(folder, "qlora")
    with pytest.raises(UserError, match=r'^optimizer = adamw8bit needs .*"\.\[qlora\]"$'):
        optim.optimizers(load(folder, "full"), "adamw8bit", 0.1)


# Merging


@pytest.mark.parametrize("tune", ["lora", "qlora"])
def test_a_merged_model_is_plain_and_says_what_base_and_adapter_say(folder, tmp_path, tune):
    """Pitfall 31: never into four bits: the base is loaded again as it was saved."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = models.load(str(folder), tune, "float32", "cpu", **LORA)
    taught(model)
    models.save(model, tokenizer, tmp_path / "adapter")
    cfg = config.parse(
        merge.Config,
        [f"--adapter={tmp_path}/adapter", f"--out_dir={tmp_path}/merged", "--dtype=float32"],
    )
    merge.merge(cfg)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert "lora" not in str(merged) and "4bit" not in str(merged)
    adapted = load(tmp_path / "adapter", "none")
    assert torch.allclose(logprobs(merged), logprobs(adapted), atol=1e-4)
    assert not torch.allclose(logprobs(merged), logprobs(load(folder, "none")), atol=1e-2)
    base = dict(load(folder, "none").named_parameters())
    layer = "base_model.model.model.layers.0.mlp.up_proj"
    a = model.state_dict()[f"{layer}.lora_A.default.weight"]
    b = model.state_dict()[f"{layer}.lora_B.default.weight"]
    name = "model.layers.0.mlp.up_proj.weight"
    expected = base[name] + LORA["lora_alpha"] / LORA["lora_r"] * b @ a
    assert torch.allclose(dict(merged.named_parameters())[name], expected, atol=1e-6)


def test_merging_is_bfloat16_unless_asked_and_refuses_what_is_no_adapter(folder, tmp_path):
    model, tokenizer = models.load(str(folder), "lora", "float32", "cpu", **LORA)
    models.save(model, tokenizer, tmp_path / "adapter")
    merge.merge(merge.Config(adapter=f"{tmp_path}/adapter", out_dir=f"{tmp_path}/merged"))
    merged = load(tmp_path / "merged", "none", "bfloat16")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert load(tmp_path / "merged", "none").config.dtype is not None
    with pytest.raises(UserError, match="is a whole model: there is nothing to merge"):
        merge.merge(merge.Config(adapter=str(folder), out_dir=f"{tmp_path}/none"))
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="^adapter is missing: write --adapter="):
        merge.merge(merge.Config())
    with pytest.raises(UserError, match="is not empty"):
        merge.merge(merge.Config(adapter=f"{tmp_path}/adapter", out_dir=f"{tmp_path}/merged"))


def test_a_run_of_each_kind_of_tuning_trains_and_saves_what_it_trained(folder, tmp_path):
    """qlora, gradient_checkpointing, adamw8bit, mixed and beta together, from the command line."""
    (tmp_path / "mine.py").write_text("def spread(t, e): return sum(t.ids) % 7\n")
    common = [
        f"--model={folder}",
        "--steps=2",
        "--prompts_per_step=2",
        "--group_size=3",
        "--max_new_tokens=4",
        f"--rewards={tmp_path}/mine.py:spread",
        "--max_tokens=1200",
        "--learning_rate=1e-2",
        "--format=fence",
        "--tools=",
        "--beta=0.01",
    ]
    kinds = {
        "qlora": ["--tune=qlora", "--lora_r=4", "--optimizer=adamw8bit"],
        "mixed": ["--dtype=mixed", "--gradient_checkpointing=true"],
    }
    for name, options in kinds.items():
        out_dir = tmp_path / name
        argv = [*common, *options, f"--out_dir={out_dir}"]
        metrics = train_grpo.train(config.parse(Config, argv, train_grpo.check))
        assert metrics["kl"] > 0 and metrics["grad_norm"] > 0
        assert not torch.equal(logprobs(load(out_dir, "none")), logprobs(load(folder, "none")))

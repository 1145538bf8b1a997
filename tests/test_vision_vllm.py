"""Models that see, in vLLM on a CPU: what it samples behind images is what the trainer says of it.

    make test-vllm      # which also lays torchvision aside for it

Pinned here, for a tiny model of each family: logprobs of trajectories with images in their prompt
and from tools; equal ids with other pictures; images that vLLM has seen before, after new weights
and new adapters, those of the tower too; prompts that are not what they should be. And a server,
which is sent images over HTTP. Models are random, with two layers; vLLM's CPU build wants heads of
32 numbers.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import eyes
import pytest
import torch
from test_vision import Forced, asked, call_text, zoom
from test_vllm import free_port, healthy, kill, moved
from transformers import AutoTokenizer

import train_grpo
from chat import Chat
from engines import servers as server_engine
from engines import vllm as vllm_engine
from engines.base import Sampling
from engines.canary import Canary, sync_and_check
from learning import model as models
from learning.vision import FAMILIES, find_vision
from rollout import Settings, rollouts
from run import config
from run.config import UserError
from run.loop import run_blocking
from tools import Toolbox

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None or importlib.util.find_spec("torchvision") is None,
        reason="vLLM or torchvision is not there: make test-vllm",
    ),
]
FORMATS = {"qwen3_vl": "hermes"}  # the others' templates have no tools
PROVED = [name for name, family in FAMILIES.items() if family.in_vllm]
ROOM = {"max_model_len": 1024, "max_num_seqs": 16, "kv_cache_gib": 0.25, "enforce_eager": True}
LORA = {"lora_r": 4, "lora_alpha": 8}
MADE = {}


def made(name, tmp_path_factory):
    """A family's folder, tokenizer, vision, and a chat with the tool zoom."""
    if name not in MADE:
        folder = eyes.folder_of(name, tmp_path_factory.mktemp(name), head=32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        vision = find_vision(folder, tokenizer)
        schemas = Toolbox([zoom]).schemas
        chat = Chat(tokenizer, FORMATS.get(name, "json_actions"), schemas, vision=vision)
        MADE[name] = SimpleNamespace(
            name=name, folder=folder, tokenizer=tokenizer, vision=vision, chat=chat
        )
    return MADE[name]


class ForcedInVllm(Forced):
    """Says given texts in the first turns, with the engine's logprobs of them."""

    def __init__(self, family, turns, engine):
        self.family = family
        self.turns = turns
        self.engine = engine

    def join(self):
        """Nobody waits for anybody."""

    leave = join

    async def generate(self, ids, images, sampling):
        headers = self.family.tokenizer.decode(ids).count("ssistant")
        if headers <= len(self.turns):
            text = self.turns[headers - 1]
            new = self.family.tokenizer.encode(text, add_special_tokens=False)
            (logprobs,) = await self.engine.prompt_logprobs(ids + new, images)
            return vllm_engine.Completion(new, logprobs[-len(new) :], "stop")
        return await self.engine.generate(ids, images, sampling)


def play(family, engine, examples, turns, samples=1, **settings):
    """Plays examples: `turns`, then what the engine samples."""
    if turns:
        # with adapters, vLLM scores a prompt only when nobody else is sampled (0.32): so does the
        # canary
        settings |= {"max_concurrent": 1}
    settings = {"max_new_tokens": 12, "seed": 3, "max_tokens": 1024} | settings
    forced = ForcedInVllm(family, turns, engine)
    settings = Settings(**settings)
    playing = rollouts(examples, family.chat, forced, Toolbox([zoom]), settings, samples=samples)
    return run_blocking(playing)


def largest_difference(model, trajectories, temperature=1.0):
    """Of the logprobs of sampled tokens, between the engine and the trainer. Those of a forced turn
    are at temperature 1: at another one, only the last turn counts."""
    worst = 0.0
    scored = train_grpo.policy_logprobs(model, trajectories, temperature, 10**6)
    for t, logprobs in zip(trajectories, scored, strict=True):
        difference = (logprobs - torch.tensor(t.logprobs)) * torch.tensor(t.mask)
        if temperature != 1 and t.turn_starts:
            difference = difference[t.turn_starts[-1] :]
        worst = max(worst, difference.abs().max().item())
    return worst


def check_trajectories(family, engine, model):
    """Three turns with images from a tool in the first two, beside rows of text; returns the
    largest difference."""
    turns = [call_text(family, (0, 0, 40, 30)), call_text(family, (5, 5, 30, 25))]
    two = [asked(eyes.picture(1), text="first"), asked(eyes.picture(2, 70, 90), text="another")]
    worst = 0.0
    for temperature in (1.0, 0.7):
        settings = {"temperature": temperature}
        seen = play(family, engine, two, turns, samples=2, **settings)
        text = play(family, engine, [asked(text="no picture")], [], samples=2, **settings)
        for t in seen:
            is_whole = len(t.images) == 3 and len(t.turn_starts) == 3
            assert is_whole or t.stop == "placeholder"
            assert family.vision.fits(t.ids, t.images)
        assert any(len(t.turn_starts) == 3 for t in seen)
        difference = largest_difference(model, [*seen, *text], temperature)
        assert difference < 1e-4, (family.name, temperature)
        worst = max(worst, difference)
    return worst


def check_that_pictures_are_told_apart(family, engine, model):
    """Equal ids, one after the other and both at once: each has its own picture's logprobs."""
    examples = [asked(eyes.picture(seed), text="What is it? " * 9) for seed in (1, 2)]
    played = play(family, engine, examples, [], samples=3)
    assert len({tuple(t.ids[: t.turn_starts[0]]) for t in played if t.turn_starts}) == 1
    assert largest_difference(model, played) < 1e-4
    one, other = (next(t for t in played if t.group == group) for group in (0, 1))
    (right,) = run_blocking(engine.prompt_logprobs(one.ids, one.images))
    (wrong,) = run_blocking(engine.prompt_logprobs(one.ids, other.images))
    assert max(abs(a - b) for a, b in zip(right, wrong, strict=True)) > 1e-3


def check_what_is_refused(family, engine):
    """Images that have other tokens in vLLM end the run with a sentence; the engine goes on."""
    picture = family.vision.prepare(eyes.picture(1, 64, 32))
    ids = family.chat.prompt(asked(picture.original)["messages"], [picture])
    larger = eyes.picture(1, 64, 64)
    how = Sampling(max_new_tokens=4)
    with pytest.raises(UserError, match="other token ids|refuses a prompt"):
        run_blocking(engine.generate(ids, [replace(picture, shown=larger)], how))
    assert run_blocking(engine.generate(ids, [picture], how)).ids


def make_it_write_placeholders(model, vision):
    """Has the head prefer what stands for an image."""
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[vision.placeholder] = 4 * head[300]
        head[vision.placeholder - 1 if vision.placeholder > 301 else 302] = -4 * head[300]


@pytest.mark.parametrize("name", PROVED)
def test_full_weights_of_a_model_that_sees_are_the_trainers(name, tmp_path_factory):
    """Pitfalls 28, 44 to 48."""
    family = made(name, tmp_path_factory)
    model, _ = models.load(family.folder, "full", device="cpu", train_vision=True)
    starting = vllm_engine.start(family.folder, full=True, vision=family.vision, **ROOM)
    engine = run_blocking(starting)
    try:
        prompt = asked(eyes.picture(5), text="known")
        pictures = family.chat.pictures(prompt)
        canary = Canary(family.chat.prompt(prompt["messages"], pictures), "float32", pictures)
        assert run_blocking(sync_and_check(engine, model, 0, canary))["canary"] < 1e-4
        worst = check_trajectories(family, engine, model)
        print(f"{name}: {worst:.1e}")
        check_that_pictures_are_told_apart(family, engine, model)
        check_what_is_refused(family, engine)

        # the tower moves too: what vLLM knew of a picture is of no use any more
        for version in (1, 2):
            moved(model, version)
            assert run_blocking(sync_and_check(engine, model, version, canary))["canary"] < 1e-4
        check_trajectories(family, engine, model)
        make_it_write_placeholders(model, family.vision)
        run_blocking(sync_and_check(engine, model, 3, canary))
        played = play(family, engine, [prompt], [], samples=8)
        assert any(t.stop == "placeholder" for t in played)
        assert all(family.vision.fits(t.ids, t.images) for t in played)
    finally:
        run_blocking(engine.close())


@pytest.mark.parametrize("name", PROVED)
def test_adapters_of_a_model_that_sees_are_the_trainers(name, tmp_path_factory):
    """Pitfalls 28 and 32: those of the language model, and those of the tower too."""
    family = made(name, tmp_path_factory)
    model, _ = models.load(family.folder, "lora", device="cpu", train_vision=True, **LORA)
    starting = vllm_engine.start(
        family.folder, lora_r=4, vision=family.vision, trains_tower=True, **ROOM
    )
    engine = run_blocking(starting)
    try:
        prompt = asked(eyes.picture(5), text="known")
        pictures = family.chat.pictures(prompt)
        canary = Canary(family.chat.prompt(prompt["messages"], pictures), "float32", pictures)
        for version in range(3):
            moved(model, version)
            assert run_blocking(sync_and_check(engine, model, version, canary))["canary"] < 1e-4
        worst = check_trajectories(family, engine, model)
        print(f"{name}: {worst:.1e}")
    finally:
        run_blocking(engine.close())


TUNES = {  # what a server is started with
    "lora": "--enable-lora --max-lora-rank 8 --max-loras 2",
    "full": "--worker-extension-cls engines.worker.Worker",
}


def serve(folder, port, tune):
    options = f"{TUNES[tune]} --enforce-eager --dtype float32"
    options += " --logprobs-mode processed_logprobs --generation-config vllm --max-num-seqs 16"
    options += " --kv-cache-memory-bytes 268435456 --no-enable-chunked-prefill"
    options += " --max-model-len 1024 --served-model-name base --host 127.0.0.1"
    options += " --enable-scale-out"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment["VLLM_SERVER_DEV_MODE"] = "1"
    return subprocess.Popen(
        [*command, *options.split(), "--port", str(port)],
        cwd=config.HERE,
        env={**os.environ, **environment},
        stdout=open(f"{folder}-{port}.log", "w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@pytest.mark.parametrize("tune", TUNES)
def test_a_server_is_shown_images(tmp_path_factory, tune):
    """With full weights the tower moves too: what a server knew of a picture is of no use then."""
    family = made("qwen3_vl", tmp_path_factory)
    options = LORA if tune == "lora" else {"train_vision": True}
    model, _ = models.load(family.folder, tune, device="cpu", **options)
    port = free_port()
    server = serve(family.folder, port, tune)
    try:
        assert healthy(port, server), open(f"{family.folder}-{port}.log").read()[-3000:]
        urls = (f"http://127.0.0.1:{port}",)
        starting = server_engine.start(
            urls,
            family.folder,
            family.tokenizer,
            60.0,
            1024,
            family.vision,
            has_images=True,
            full="float32" if tune == "full" else "",
        )
        engine = run_blocking(starting)
        try:
            prompt = asked(eyes.picture(5), text="known")
            pictures = family.chat.pictures(prompt)
            canary = Canary(family.chat.prompt(prompt["messages"], pictures), "float32", pictures)
            for version in range(3):
                moved(model, version)
                metrics = run_blocking(sync_and_check(engine, model, version, canary))
                assert metrics["canary"] < 1e-4
            worst = check_trajectories(family, engine, model)
            print(f"server, {tune}: {worst:.1e}")
            check_that_pictures_are_told_apart(family, engine, model)
        finally:
            run_blocking(engine.close())
    finally:
        with contextlib.suppress(ProcessLookupError):
            kill(server)

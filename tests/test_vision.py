"""Models that see: what is sampled is what is trained, images included.

    pytest tests/test_vision.py

Pinned here, for a tiny model with random weights of each proved family: engine, trainer in any
micro-batch and a plain forward pass give one set of logprobs; problems that differ only in their
picture are never merged; an image enters a trajectory with its tokens or not at all (pitfalls
44-48); the tower learns exactly when it is asked to. tests/eyes.py makes the models.
"""

import gc
import json
import random
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import eyes
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

import player
import train_grpo
import train_sft
from chat import Chat
from engines import servers
from engines.base import Completion, Engine
from engines.canary import Canary, sync_and_check
from engines.local import TransformersEngine
from engines.scripted import ScriptedEngine
from learning import model as models
from learning import vision as seeing
from learning import whole
from learning.batches import Batch, micro_batches
from learning.logprobs import token_logprobs
from learning.vision import FAMILIES, Vision, collapse, find_vision, tower_inputs, whole_beginning
from player import Player
from rollout import Settings, rollouts
from run import config
from run.config import UserError
from run.evaluation import Record
from run.loop import run_blocking
from tools import Toolbox
from trajectory import stats

FORMATS = {"qwen3_vl": "hermes", "qwen3_5": "qwen_xml"}  # the others' templates have no tools


class zoom:
    """Holds what the tools of a trajectory see."""

    def __init__(self, example):
        self.images = example["images"]

    def __call__(self, image: int, box: list[int]):
        """Zooms into an image.

        Args:
            image: its number, from 1
            box: left, top, right, bottom
        """
        return ["Here:", self.images[image - 1].original.crop(box)]


def blank():
    """Gives nothing to see."""
    from PIL import Image

    return Image.new("RGB", (2000, 4))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return made(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return made("qwen3_vl", tmp_path_factory)


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    return made("smolvlm", tmp_path_factory)


MADE = {}


def made(name, tmp_path_factory):
    """A family's folder, model, tokenizer, vision, and a chat with the tool zoom."""
    if name not in MADE:
        folder = eyes.folder_of(name, tmp_path_factory.mktemp(name))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        vision = find_vision(folder, tokenizer)
        box = Toolbox([zoom])
        chat = Chat(tokenizer, FORMATS.get(name, "json_actions"), box.schemas, vision=vision)
        model, _ = models.load(folder, "full", device="cpu", train_vision=True)
        MADE[name] = SimpleNamespace(
            name=name, folder=folder, tokenizer=tokenizer, vision=vision, chat=chat, model=model
        )
    return MADE[name]


def asked(*pictures, text="What is it?"):
    """A data row."""
    parts = [{"type": "image"} for _ in pictures]
    content = [*parts, {"type": "text", "text": text}] if parts else text
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "images": list(pictures), "answer": "7"}


def call_text(family, *boxes, image=1):
    """A turn that zooms, with its stop token."""
    from formats import Call

    calls = [Call("zoom", {"image": image, "box": list(box)}) for box in boxes]
    return said(family, family.chat.format.write("", calls))


def said(family, text):
    """A turn as the template writes it."""
    lead = family.chat.facts.lead if family.chat.format.inline else ""
    return lead + text + family.chat.facts.close


class Forced(Engine):
    """Says given texts in the first turns, with the local engine's logprobs of them; what follows
    is sampled by it."""

    def __init__(self, family, turns):
        self.family = family
        self.turns = turns
        self.local = TransformersEngine(family.model, family.tokenizer)
        self.prefilled = []  # of each prefill: how many prompts

    def join(self):
        self.local.join()

    def leave(self):
        self.local.leave()

    async def generate(self, ids, images, sampling):
        headers = self.family.tokenizer.decode(ids).count("ssistant")
        if headers <= len(self.turns):
            new = self.family.tokenizer.encode(self.turns[headers - 1], add_special_tokens=False)
            self.local.unfinished -= 1  # the others need not wait for this one
            (logprobs,) = await self.local.prompt_logprobs(ids + new, images)
            self.local.unfinished += 1
            return Completion(new, logprobs[-len(new) :], "stop")
        return await self.local.generate(ids, images, sampling)


def play(family, examples, turns, samples=1, **settings):
    """Plays examples with the tool zoom: `turns`, then what the model samples."""
    settings = {"max_new_tokens": 6, "seed": 3} | settings
    box = Toolbox([zoom])
    engine = Forced(family, turns)
    played = rollouts(examples, family.chat, engine, box, Settings(**settings), samples=samples)
    return run_blocking(played)


def three_turns(family):
    """Six trajectories of three turns: with none, one and two pictures in the prompt, and one or
    none from a tool."""
    turns = [call_text(family, (0, 0, 40, 30)), call_text(family, (5, 5, 30, 25), image=1)]
    one = play(
        family,
        [
            asked(eyes.picture(1), text="first"),
            asked(eyes.picture(2, 70, 90), eyes.picture(3, 20, 30), text="the second one"),
        ],
        turns[:1],
        samples=1,
    )
    two = play(family, [asked(eyes.picture(4), text="another of them")], turns, samples=2)
    none = play(family, [asked(text="no picture"), asked(text="nor here, but longer")], [])
    trajectories = [*one, *two, *none]
    for number, trajectory in enumerate(trajectories):
        trajectory.group = number // 2
    return trajectories


def plain_logprobs(family, trajectory):
    """(T - 1,) of the whole trajectory by one forward pass, as transformers would be used."""
    ids = torch.tensor([trajectory.ids])
    inputs = tower_inputs(trajectory.images, "cpu")
    if family.vision.family.has_grid and inputs:
        inputs["mm_token_type_ids"] = (ids == family.vision.placeholder).int()
    family.model.base_model.rope_deltas = None  # left behind by another batch
    logits = family.model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits
    table = logits[0, :-1].float().log_softmax(-1)
    return table.gather(-1, ids[0, 1:, None])[:, 0]


# One set of logprobs


def test_engine_trainer_and_a_plain_forward_pass_give_one_set_of_logprobs(family):
    """Pitfalls 15, 46, 48: one by one, three at once, all at once, in any order, with rows of text
    among them."""
    trajectories = three_turns(family)
    assert [len(t.images) for t in trajectories] == [2, 3, 3, 3, 0, 0]
    assert [len(t.turn_starts) for t in trajectories] == [2, 2, 3, 3, 1, 1]
    for t in trajectories:
        assert family.vision.fits(t.ids, t.images)
        with torch.no_grad():
            plain = plain_logprobs(family, t)
        sampled = torch.tensor(t.mask[1:]).bool()
        engine = torch.tensor(t.logprobs[1:])
        assert sampled.sum() > 5 and engine[sampled].std() > 0.1
        assert (engine - plain)[sampled].abs().max() < 1e-4
    rng = random.Random(0)
    longest = max(len(t.ids) + sum(picture.patches for picture in t.images) for t in trajectories)
    parts = train_grpo.batches(family.model, trajectories, 3 * longest)
    assert 1 < len(parts) < len(trajectories)
    for budget in (1, 3 * longest, 10**6):
        for _ in range(2):
            rng.shuffle(trajectories)
            scored = train_grpo.policy_logprobs(family.model, trajectories, 1.0, budget)
            for t, logprobs in zip(trajectories, scored, strict=True):
                difference = (logprobs - torch.tensor(t.logprobs)) * torch.tensor(t.mask)
                assert difference.abs().max() < 1e-4


def test_another_picture_is_another_answer(family):
    """Without it all of the above could hold of a model that sees nothing."""
    one, other = asked(eyes.picture(1)), asked(eyes.picture(2))
    (t, other_t) = play(family, [one, other], [])
    assert t.ids[: t.turn_starts[0]] == other_t.ids[: t.turn_starts[0]]
    with torch.no_grad():
        right = plain_logprobs(family, t)
        wrong = plain_logprobs(family, replace(t, images=other_t.images))
    assert (right - wrong)[t.turn_starts[0] - 1 :].abs().max() > 1e-3


def test_problems_that_differ_only_in_their_picture_are_never_merged(family):
    """Equal ids are not equal prompts: in the trainer's shared prompts, its micro-batches, and the
    engine's prefill."""
    examples = [asked(eyes.picture(seed), text="What is it? " * 9) for seed in (1, 2)]
    pushed = []
    local = TransformersEngine.__dict__["_prefill"]

    def prefill(self, prompts, images, logits_to_keep=1):
        pushed.append((len(prompts), len({tuple(ids) for ids in prompts})))
        return local(self, prompts, images, logits_to_keep)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersEngine, "_prefill", prefill)
        trajectories = play(family, examples, [], samples=3)
    assert pushed == [(2, 1)]  # six rows, two prompts, one sequence of ids
    starts = {tuple(t.ids[: t.turn_starts[0]]) for t in trajectories}
    assert len(starts) == 1 and len({t.images[0].key for t in trajectories}) == 2
    for t in trajectories:
        with torch.no_grad():
            plain = plain_logprobs(family, t)
        sampled = torch.tensor(t.mask[1:]).bool()
        assert (torch.tensor(t.logprobs[1:]) - plain)[sampled].abs().max() < 1e-4

    batch = Batch.of([replace(t, advantages=[1.0]) for t in trajectories])
    with torch.no_grad():
        logprobs, _ = token_logprobs(
            family.model,
            batch.ids,
            batch.attention_mask,
            batch.mask,
            position_ids=batch.position_ids,
            images=batch.images,
        )
    assert ((logprobs - batch.sampled_logprobs) * batch.mask).abs().max() < 1e-4


def test_a_shared_prompt_with_its_picture_goes_through_the_tower_once(qwen):
    """... and its gradient is that of rows apart."""
    examples = [asked(eyes.picture(seed), text="What is it? " * 9) for seed in (1, 2)]
    trajectories = play(qwen, examples, [], samples=3)
    seen = []
    hook = qwen.model.base_model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0])), with_kwargs=True
    )
    gradients = []
    for budget in (10**6, 1):
        for t in trajectories:
            t.advantages, t.weight = [1.0 - t.sample], 0.1
        qwen.model.zero_grad()
        train_grpo.accumulate(qwen.model, trajectories, settings(budget))
        gradients.append(flat_gradient(qwen.model))
    hook.remove()
    patches = sum({t.group: t.images[0].patches for t in trajectories}.values())
    assert seen[0] == patches and sum(seen[1:]) == 3 * patches
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


# Gradients


def settings(budget=10**6, **changed):
    cfg = train_grpo.Config(token_budget=budget, **changed)
    return train_grpo.LearnSettings.of(cfg)


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_a_step_of_grpo_has_the_gradient_of_a_plain_loop(family):
    """A forward pass for each trajectory, nothing shared, padded or cut."""
    trajectories = three_turns(family)
    for number, t in enumerate(trajectories):
        t.reward = [1.0, 0.0, 0.0, 1.0, 0.5, 0.0][number]
    family.model.zero_grad()
    for group in range(3):
        pair = [t for t in trajectories if t.group == group]
        rewards = torch.tensor([t.reward for t in pair])
        advantages = (rewards - rewards.mean()) / rewards.std()
        for t, advantage in zip(pair, advantages, strict=True):
            sampled = torch.tensor(t.mask[1:])
            (-advantage * (plain_logprobs(family, t) * sampled).sum()).backward()
    tokens = sum(t.new_tokens for t in trajectories)
    expected = flat_gradient(family.model) / tokens

    for budget in (10**6, 3000, 1):
        family.model.zero_grad()
        train_grpo.set_advantages(trajectories, "group", False, "keep")
        for t in trajectories:
            t.weight = 1 / tokens
        train_grpo.accumulate(family.model, trajectories, settings(budget))
        gradient = flat_gradient(family.model)
        assert expected.norm() > 0
        assert (gradient - expected).norm() < 1e-5 * expected.norm()
    family.model.zero_grad()


def test_recomputed_layers_and_low_precision_are_one_function_for_engine_and_trainer(family):
    """gradient_checkpointing changes no gradient, dtype=mixed rounds both sides alike."""
    trajectories = three_turns(family)
    gradients = []
    for recomputes in (False, True):
        model, _ = models.load(family.folder, "full", device="cpu", train_vision=True)
        if recomputes:
            models.recompute_layers(model)
        models.without_dropout(model)
        for t in trajectories:
            t.advantages, t.weight = [1.0 - t.sample] * len(t.turn_starts), 0.1
        train_grpo.accumulate(model, trajectories, settings())
        gradients.append(flat_gradient(model))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()

    mixed, _ = models.load(family.folder, "full", "mixed", device="cpu")
    rough = SimpleNamespace(**{**vars(family), "model": mixed})
    trajectories = three_turns(rough)
    for t, logprobs in zip(
        trajectories, train_grpo.policy_logprobs(mixed, trajectories, 1.0, 1), strict=True
    ):
        difference = (logprobs - torch.tensor(t.logprobs)) * torch.tensor(t.mask)
        assert difference.abs().max() < 0.1


def frozen(family, **options):
    """The family with a tower that does not learn."""
    model, _ = models.load(family.folder, "full", device="cpu", **options)
    return SimpleNamespace(**vars(family) | {"model": model})


def test_what_a_frozen_tower_made_of_a_picture_is_kept_and_its_pixels_are_freed(family):
    """Each picture goes through it once in a step; logprobs and gradient are those of pixels."""
    family = frozen(family)
    sizes = []  # of what goes through the tower: how many pictures
    let_see = seeing._let_see

    def counted(whole, pictures, *arguments):
        sizes.append(len(pictures))
        return let_see(whole, pictures, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeing, "_let_see", counted)
        trajectories = three_turns(family)
        different = {id(picture): picture for t in trajectories for picture in t.images}.values()
        # what a tool showed in the turn that was called last was not sampled from
        assert sum(sizes) == sum(picture.seen is not None for picture in different)
        for number, t in enumerate(trajectories):
            t.reward = float(number % 2)
        train_grpo.set_advantages(trajectories, "group")
        for t in trajectories:
            t.weight = 1.0
            t.old_logprobs = None
        learner = settings(150)
        train_grpo.accumulate(family.model, trajectories, learner)
        assert sum(sizes) == len(different)
    kept_gradient = flat_gradient(family.model)
    assert all(picture.seen and not picture.pixels for picture in different)

    scored = train_grpo.policy_logprobs(family.model, trajectories, 1.0, 10**6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeing, "keeps_pictures", lambda model: False)
        by_pixels = train_grpo.policy_logprobs(family.model, trajectories, 1.0, 10**6)
        family.model.zero_grad()
        train_grpo.accumulate(family.model, trajectories, learner)
    for one, other in zip(scored, by_pixels, strict=True):
        assert (one - other).abs().max() < 2e-5
    gradient = flat_gradient(family.model)
    assert (gradient - kept_gradient).abs().max() < 1e-5 * gradient.abs().max()


def test_what_is_kept_of_a_picture_is_of_one_model_alone(qwen):
    """Else a reference, or the next run's model, would be shown what another saw."""
    one = frozen(qwen)
    other = frozen(qwen)
    with torch.no_grad():
        for parameter in other.model.base_model.visual.parameters():
            parameter.mul_(1.5)
    (picture,) = qwen.chat.pictures(asked(eyes.picture(1)))
    device = torch.device("cpu")
    seen = []
    for family in (one, other, one):
        inputs = seeing.image_inputs(family.model, [picture], device)
        seen.append(inputs["mm_encoder_outputs"]["image"].pooler_output[0])
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    assert "pixel_values" in seeing.image_inputs(qwen.model, [picture], device)  # its tower learns


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_the_tower_learns_exactly_when_it_is_asked_to(family, tune):
    trajectories = three_turns(family)
    for number, t in enumerate(trajectories):
        t.advantages, t.weight = [1.0 - number] * len(t.turn_starts), 0.1
    for train_vision in (False, True):
        options = {"lora_r": 4} if tune == "lora" else {}
        model, _ = models.load(
            family.folder, tune, device="cpu", train_vision=train_vision, **options
        )
        train_grpo.accumulate(model, trajectories, settings())
        parameters = dict(model.named_parameters())
        trained = {name for name, p in parameters.items() if p.requires_grad}
        learnt = {name for name in trained if parameters[name].grad is not None}
        learnt = {name for name in learnt if parameters[name].grad.any()}
        in_tower = {name for name in learnt if "visual" in name or "vision_" in name}
        in_text = {name for name in learnt if "language_model" in name or "text_model" in name}
        assert in_text and learnt <= trained
        assert bool(in_tower) == train_vision
        if not train_vision:
            beside = {name for name in trained if "language_model" not in name}
            beside = {name for name in beside if "text_model" not in name and "lm_head" not in name}
            assert beside == set()


# An image becomes pixels and tokens


@pytest.mark.parametrize("size", [(50, 40), (1, 1), (300, 200), (16, 400), (64, 64)])
def test_pixels_are_those_of_the_processor_and_resized_only_once(family, size):
    """Pitfall 44 and trap 1: bit for bit; what was shown is shown again as it is."""
    image = eyes.picture(5, *size)
    processor = eyes.processor_of(family.name)
    picture = family.vision.prepare(image)
    kind = family.vision.family
    if kind.has_tiles:
        theirs = processor(images=[image], crop_to_patches=True, return_tensors="pt")
        tiles = theirs["pixel_values"]
        if len(tiles) > 1:  # the last is the whole, of what is shown: resized twice
            assert (picture.pixels["pixel_values"][-1] - tiles[-1]).abs().mean() < 0.05
            small = processor(images=[picture.shown], return_tensors="pt")["pixel_values"]
            tiles[-1] = small[0]
    elif kind.has_grid:
        theirs = processor(images=[image], return_tensors="pt")
    else:
        theirs = processor(images=[[image]], return_tensors="pt")
        theirs = {name: theirs[name][0] for name in picture.pixels}
    for name, tensor in picture.pixels.items():
        assert torch.equal(tensor, theirs[name])
    assert picture.original is image
    again = family.vision.prepare(picture.shown, is_resized=True)
    assert again.key == picture.key and again.ids == picture.ids
    assert family.vision.prepare(eyes.picture(6, *size)).key != picture.key


def test_the_processors_need_no_torchvision(family):
    assert family.vision.processor.backend == "pil"


def test_tokens_are_those_of_the_whole_processor(tmp_path_factory):
    """Idefics3's, the one that can be made without a video processor: with squares and without."""
    from transformers import Idefics3Processor

    idefics = made("idefics3", tmp_path_factory)
    for splits in (True, False):
        processor = eyes.processor_of("idefics3")
        processor.do_image_splitting = splits
        vision = Vision(idefics.model.config, FAMILIES["idefics3"], processor, idefics.tokenizer)
        whole = Idefics3Processor(processor, idefics.tokenizer, image_seq_len=4)
        image = eyes.picture(1, 90, 50)
        theirs = whole(text="See <image> here", images=[image], return_tensors="pt")
        short = idefics.tokenizer.encode("See <image> here", add_special_tokens=False)
        picture = vision.prepare(image)
        assert vision.expand(short, [picture]) == theirs["input_ids"][0].tolist()
        assert torch.equal(picture.pixels["pixel_values"], theirs["pixel_values"][0])


def test_positions_are_those_of_the_models_own_function(family):
    """Pitfall 48."""
    if not family.vision.family.has_grid:
        assert seeing.batch_positions([[1]], [[SimpleNamespace(grid=None)]]) is None
        return
    pictures = [family.vision.prepare(eyes.picture(n, 30 * n, 40)) for n in (1, 2, 3)]
    pad = family.vision.placeholder
    short = [pad, 9, 9, pad, 9, pad, 9, 9]
    ids = torch.tensor([family.vision.expand(short, pictures)])
    theirs, _ = family.model.model.get_rope_index(
        ids, (ids == pad).int(), image_grid_thw=tower_inputs(pictures, "cpu")["image_grid_thw"]
    )
    assert torch.equal(seeing.positions(ids[0].tolist(), pictures), theirs[:, 0])


def test_collapsing_undoes_expanding_and_a_cut_leaves_no_half_picture(family):
    """Pitfall 47."""
    pictures = [family.vision.prepare(eyes.picture(n, 30 * n, 40)) for n in (1, 2)]
    pad = family.vision.placeholder
    short = [5, pad, 6, 7, pad, 8]
    ids = family.vision.expand(short, pictures)
    assert collapse(ids, pictures) == short
    assert family.vision.fits(ids, pictures) and not family.vision.fits(ids, pictures[:1])
    first = 1 + len(pictures[0].ids)
    assert whole_beginning(ids, pictures, len(ids)) == (len(ids), pictures)
    assert whole_beginning(ids, pictures, first) == (first, pictures[:1])
    assert whole_beginning(ids, pictures, first - 1) == (1, [])
    assert whole_beginning(ids, pictures, first + 3) == (first + 2, pictures[:1])


def test_min_and_max_pixels_are_what_an_image_is_shown_with(qwen, tmp_path):
    big = eyes.picture(1, 300, 200)
    for options, wanted in (
        ({}, 12 * 256),
        ({"max_pixels": 6 * 256}, 6 * 256),
        ({"max_pixels": 99 * 256}, 99 * 256),
    ):
        vision = find_vision(qwen.folder, qwen.tokenizer, **options)
        width, height = vision.prepare(big).shown.size
        assert wanted / 2 < width * height <= wanted
    model, tokenizer = models.load(qwen.folder, "full", device="cpu")
    models.set_image_size(model, vision)
    models.save(model, tokenizer, tmp_path)
    again = find_vision(str(tmp_path), tokenizer)
    assert again.prepare(big).key == vision.prepare(big).key
    with pytest.raises(UserError, match="min_pixels = 999999: expected at most max_pixels = 3072"):
        find_vision(qwen.folder, qwen.tokenizer, min_pixels=999999)


def test_keys_that_have_no_effect_and_models_that_are_not_proved_are_refused(smol, tmp_path):
    from transformers import Gemma3Config, Qwen3Config

    with pytest.raises(UserError, match="no effect on a model that cuts images into squares"):
        find_vision(smol.folder, smol.tokenizer, max_pixels=100)
    Gemma3Config().save_pretrained(tmp_path / "gemma")
    Qwen3Config().save_pretrained(tmp_path / "text")
    of_gemma = "gemma3, which is not proved for images: its images attend both ways"
    for name, says in (("gemma", of_gemma), ("text", "qwen3\\) sees no")):
        folder = str(tmp_path / name)
        assert find_vision(folder, smol.tokenizer) is None
        with pytest.raises(UserError, match=f"min_pixels and max_pixels have no effect.*{says}"):
            find_vision(folder, smol.tokenizer, min_pixels=1)


# Conversations


def test_a_row_is_rendered_as_the_rollout_was(family):
    """Pitfall 49, with images of the user and of a tool."""
    turns = [call_text(family, (0, 0, 40, 30)), said(family, "7")]
    (t,) = play(family, [asked(eyes.picture(1))], turns)
    assert t.stop == "answered" and len(t.images) == 2
    ids, mask = family.chat.render(t.messages, t.images)
    end = len(t.ids)
    assert (ids[:end], mask[:end]) == (t.ids, t.mask) and not any(mask[end:])
    text = family.tokenizer.decode(t.ids)
    assert text.count("Here:\nimage 2:") == 1
    for picture in t.images:
        assert family.tokenizer.decode(picture.ids) in text


def test_text_that_spells_a_placeholder_stays_text(family):
    """Whoever types it: the user, a tool, an assistant who is learnt from."""
    token = family.vision.token
    user = asked(eyes.picture(1), text=f"What is {token} {token}?")
    pictures = family.chat.pictures(user)
    ids = family.chat.prompt(user["messages"], pictures)
    assert family.vision.fits(ids, pictures)
    assert family.tokenizer.decode(ids).count(f"What is {token} {token}?") == 1
    demo = [*user["messages"], {"role": "assistant", "content": f"It is {token}."}]
    ids, _ = family.chat.render(demo, pictures)
    assert family.vision.fits(ids, pictures)
    parsed, (call,) = family.chat.parse(
        family.tokenizer.encode(call_text(family, (1, 2, 3, 4)), add_special_tokens=False)
    )
    ids = family.chat.observation([(call, f"a {token} \ue0f5")], closed=True)
    assert family.vision.fits(ids, [])


def test_a_template_that_shows_no_images_of_tools_has_them_behind_in_a_users_message(qwen):
    """Declared by the proof; rollout and row are one."""
    template = qwen.tokenizer.chat_template
    start = template.index('{%- elif message.role == "tool" %}')
    content = template.index("{%- if message.content is string %}", start)
    end = template.index("{{- '\\n</tool_response>' }}", content)
    plain = template[:content] + "{{- message.content | string }}" + template[end:]
    tokenizer = eyes.tokenizer_of("qwen3_vl")
    tokenizer.chat_template = plain
    box = Toolbox([zoom])
    chat = Chat(tokenizer, "hermes", box.schemas, vision=qwen.vision)
    assert not chat.facts.tool_images and qwen.chat.facts.tool_images
    assert "shows no images in results: a user's message behind them has them" in chat.differences
    moved = SimpleNamespace(**{**vars(qwen), "chat": chat})
    turns = [call_text(qwen, (0, 0, 40, 30), (0, 0, 20, 20)), "7<|im_end|>"]
    (t,) = play(moved, [asked(eyes.picture(1))], turns)
    assert t.stop == "answered" and len(t.images) == 3
    text = tokenizer.decode(collapse(t.ids, t.images))
    behind = "image 3:\n</tool_response><|im_end|>\n<|im_start|>user\n"
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"{behind}image 2:{image}image 3:{image}<|im_end|>" in text
    ids, mask = chat.render(t.messages, t.images)
    assert (ids[: len(t.ids)], mask[: len(t.ids)]) == (t.ids, t.mask)


def test_a_model_that_lacks_what_showing_takes_is_one_of_text(qwen, tokenizer, tmp_path):
    """No processor, no token, a template that shows none: text goes on as before."""
    import shutil

    assert find_vision(qwen.folder, tokenizer) is None  # to which the placeholder is another word
    folder = tmp_path / "bare"
    shutil.copytree(qwen.folder, folder)
    (folder / "preprocessor_config.json").unlink()
    assert find_vision(str(folder), qwen.tokenizer) is None
    assert "has no image processor" in seeing.why_blind(str(folder))
    plain = eyes.tokenizer_of("qwen3_vl")
    plain.chat_template = tokenizer.chat_template
    chat = Chat(plain, "hermes", Toolbox([zoom]).schemas, vision=qwen.vision)
    assert chat.vision is None
    assert "shows no images, so the model is shown none" in chat.differences
    assert chat.prompt(asked()["messages"])
    with pytest.raises(UserError, match="this model sees no images"):
        chat.prompt(asked(eyes.picture(1))["messages"])


def test_a_chat_that_sees_nothing_refuses_images(tokenizer):
    chat = Chat(tokenizer, "hermes")
    example = asked(eyes.picture(1))
    with pytest.raises(UserError, match="this model sees no images"):
        chat.pictures(example)
    with pytest.raises(UserError, match="this model sees no images"):
        chat.prompt(example["messages"])


def test_images_and_messages_have_to_agree(qwen):
    pictures = qwen.chat.pictures(asked(eyes.picture(1)))
    with pytest.raises(UserError, match="its messages have 0 images, but 1 are given"):
        qwen.chat.prompt(asked()["messages"], pictures)


# Rollouts


def test_images_of_tools_have_their_numbers_in_the_order_of_the_calls(qwen):
    """Pitfalls 44, 46: also of calls at once, and of an image that a tool made."""
    turns = [
        call_text(qwen, (0, 0, 40, 30), (0, 0, 20, 20)),
        call_text(qwen, (0, 0, 10, 10), image=3),
        "7<|im_end|>",
    ]
    (t,) = play(qwen, [asked(eyes.picture(1))], turns)
    assert [call.result for call in t.calls] == [f"Here:\nimage {n}:" for n in (2, 3, 4)]
    sizes = [picture.original.size for picture in t.images]
    assert sizes == [(50, 40), (40, 30), (20, 20), (10, 10)]
    assert [m["content"][1] for m in t.messages if m["role"] == "tool"] == 3 * [{"type": "image"}]
    json.dumps(t.messages)  # as rollouts.jsonl has them


def test_an_observation_that_does_not_fit_leaves_its_images_behind_too(qwen):
    """Pitfall 45."""
    turns = [call_text(qwen, (0, 0, 40, 30)), "7<|im_end|>"]
    (whole,) = play(qwen, [asked(eyes.picture(1))], turns)
    room = whole.turn_starts[1]
    (t,) = play(qwen, [asked(eyes.picture(1))], turns, max_tokens=room)
    assert t.stop == "length" and len(t.images) == 1
    assert t.ids == whole.ids[: len(t.ids)] and sum(t.mask) == len(turns_ids(qwen, turns[:1]))
    assert qwen.vision.fits(t.ids, t.images)


def turns_ids(family, turns):
    return family.tokenizer.encode("".join(turns), add_special_tokens=False)


def test_a_sampled_placeholder_ends_that_trajectory_alone(qwen):
    """Trap 5: it is counted, scored as what stands, and not learnt from."""
    bad = call_text(qwen, (0, 0, 40, 30)).replace("zoom", "<|image_pad|>")
    texts = {"good": "\\boxed{7}<|im_end|>", "bad": bad}

    def says(ids, sampling):
        text = qwen.tokenizer.decode(ids)
        return turns_ids(qwen, [texts["bad" if "bad" in text else "good"]])

    engine = ScriptedEngine(says, qwen.tokenizer)
    examples = [asked(eyes.picture(1), text=word) for word in ("good", "bad", "good")]
    rewards = {"correct": reward_of("correct")}
    played = run_blocking(
        rollouts(examples, qwen.chat, engine, Toolbox([zoom]), Settings(), rewards=rewards)
    )
    assert [t.stop for t in played] == ["answered", "placeholder", "answered"]
    assert [t.reward for t in played] == [1.0, None, 1.0]
    for t in played:
        assert qwen.vision.fits(t.ids, t.images) and len(t.images) == 1
    metrics = stats(played)
    assert metrics["stop_placeholder"] == 1 / 3 and metrics["accuracy"] == 2 / 3
    assert metrics["images"] == 1


def reward_of(name):
    import rewards

    return rewards.select((name,), ())[name]


def test_an_image_that_no_processor_takes_is_a_sentence(qwen):
    box = Toolbox([blank, zoom])
    chat = Chat(qwen.tokenizer, "hermes", box.schemas, vision=qwen.vision)
    call = '<tool_call>\n{"name": "blank", "arguments": {}}\n</tool_call><|im_end|>'
    engine = ScriptedEngine([turns_ids(qwen, [turn]) for turn in (call, "7<|im_end|>")])
    (t,) = run_blocking(rollouts([asked(eyes.picture(1))], chat, engine, box, Settings()))
    assert t.stop == "answered" and len(t.images) == 1
    assert t.calls[0].error == "exception"
    assert t.calls[0].result.startswith("error: the image has 2000 x 4 pixels: expected")


@pytest.mark.parametrize("format", ["tags", "fence"])
def test_an_image_in_an_open_turn_stands_where_the_result_does(smol, qwen, format):
    """Inline formats go on in the assistant's turn: no template writes the image there."""
    from formats import Call

    def look(what: str):
        """Looks.

        Args:
            what: at what
        """
        return ["Here: \ue0f5", eyes.picture(1), "Seen."]

    # SmolVLM's template begins a turn with a blank, and a fence begins a line
    families = (smol, qwen) if format == "tags" else (qwen,)
    for family in families:
        box = Toolbox([look])
        chat = Chat(family.tokenizer, format, box.schemas, vision=family.vision)
        call = chat.facts.lead + chat.format.write("", [Call("look", {"what": "it"})])
        call = chat._with_stop_string(call)
        turns = [turns_ids(family, [turn]) for turn in (call, "7" + chat.facts.close)]
        engine = ScriptedEngine(turns, family.tokenizer)
        (t,) = run_blocking(rollouts([asked()], chat, engine, box, Settings()))
        assert t.stop == "answered" and len(t.images) == 1 and len(t.turn_starts) == 2
        assert family.vision.fits(t.ids, t.images)
        text = family.tokenizer.decode(collapse(t.ids, t.images))
        assert f"Here: \nimage 1:{chat.facts.image}\nSeen." in text
        ids, mask = chat.render(t.messages, t.images)
        assert (ids[: len(t.ids)], mask[: len(t.ids)]) == (t.ids, t.mask)


def test_images_of_any_mode_are_shown_in_colour(qwen):
    """A tool may return grey, a palette, or what is transparent."""
    image = eyes.picture(1)
    for mode in ("L", "P", "RGBA", "1"):
        picture = qwen.chat.picture(image.convert(mode))
        assert picture.original.mode == picture.shown.mode == "RGB"
    assert qwen.chat.picture(image.convert("RGBA")).key == qwen.chat.picture(image).key


def test_long_texts_are_cut_around_their_images(qwen):
    def chatty():
        """Says a lot."""
        return ["word " * 500, eyes.picture(1), "more " * 500]

    box = Toolbox([chatty])
    chat = Chat(qwen.tokenizer, "hermes", box.schemas, vision=qwen.vision)
    call = '<tool_call>\n{"name": "chatty", "arguments": {}}\n</tool_call><|im_end|>'
    engine = ScriptedEngine([turns_ids(qwen, [turn]) for turn in (call, "7<|im_end|>")])
    limits = Settings(max_observation_tokens=40, max_tokens=4000)
    (t,) = run_blocking(rollouts([asked()], chat, engine, box, limits))
    assert len(t.images) == 1 and t.calls[0].result.endswith("\nimage 1:")
    assert "characters cut" in t.calls[0].result and len(t.calls[0].result) < 400


def test_micro_batches_count_the_patches_of_images():
    lengths = [10, 10, 10, 10]
    assert len(micro_batches(lengths, 20)) == 2
    assert len(micro_batches(lengths, 20, patches=[(5, 0)] * 4)) == 4
    assert len(micro_batches(lengths, 30, patches=[(5, 0)] * 4)) == 2
    # a prompt that repeats has its patches once
    prompts = [(1,) * 8] * 4
    assert len(micro_batches(lengths, 30, prompts, [(14, 14)] * 4)) == 1
    assert len(micro_batches(lengths, 30, prompts, [(14, 0)] * 4)) == 4


def test_the_canary_sees_the_picture(qwen):
    (t,) = play(qwen, [asked(eyes.picture(1))], [])
    engine = TransformersEngine(qwen.model, qwen.tokenizer)
    canary = Canary(t.ids, "float32", t.images)
    assert run_blocking(sync_and_check(engine, qwen.model, 1, canary))["canary"] < 1e-5
    blind, _ = models.load(qwen.folder, "full", device="cpu")
    with torch.no_grad():
        for name, parameter in blind.named_parameters():
            if "visual" in name:
                parameter.mul_(1.2)
    with pytest.raises(UserError, match="samples from other weights"):
        run_blocking(canary.check(TransformersEngine(blind, qwen.tokenizer), qwen.model))


# Runs


TOOLS = '''
class zoom:
    def __init__(self, example):
        self.images = example["images"]

    def __call__(self, image: int):
        """Shows the left half of an image.

        Args:
            image: its number, from 1
        """
        picture = self.images[image - 1].original
        return picture.crop((0, 0, picture.width // 2, picture.height))


def even(trajectory, example):
    return sum(trajectory.ids) % 7 / 7 + len(trajectory.images)
'''


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with eight rows and demonstrations with pictures, a tool and a reward."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(TOOLS)
    rows, demos = [], []
    for number in range(8):
        eyes.picture(number, 40 + number, 40).save(f"{number}.png")
        rows.append({"prompt": "What is <image>?", "images": [f"{number}.png"], "answer": "7"})
        call = {"function": {"name": "zoom", "arguments": {"image": 1}}}
        parts = [{"type": "image_url", "image_url": {"url": f"{number}.png"}}]
        seen = [{"type": "text", "text": "image 2:"}, {"type": "image", "path": f"{number}.png"}]
        demos.append(
            {
                "messages": [
                    {"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]},
                    {"role": "assistant", "content": "", "tool_calls": [call]},
                    {"role": "tool", "content": seen},
                    {"role": "assistant", "content": f"It is {number}."},
                ]
            }
        )
    rows.append({"prompt": "And without?", "answer": "7"})
    demos.append({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant"}]})
    demos[-1]["messages"][1]["content"] = "Hello."
    for name, lines in (("rows.jsonl", rows), ("demos.jsonl", demos)):
        Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def sft(family, out_dir, **changed):
    options = {
        "model": family.folder,
        "data": "demos.jsonl",
        "tools": "mine.py:zoom",
        "format": FORMATS.get(family.name, "json_actions"),
        "epochs": 4,
        "batch_size": 4,
        "val_rows": 2,
        "learning_rate": 3e-3,
        "save_every": 0,
        "out_dir": out_dir,
    }
    argv = [f"--{key}={value}" for key, value in (options | changed).items()]
    return train_sft.train(config.parse(train_sft.Config, argv, train_sft.check))


def grpo(family, out_dir, **changed):
    options = {
        "model": family.folder,
        "data": "rows.jsonl",
        "tools": "mine.py:zoom",
        "rewards": "mine.py:even",
        "format": FORMATS.get(family.name, "json_actions"),
        "steps": 3,
        "prompts_per_step": 3,
        "group_size": 2,
        "max_new_tokens": 12,
        "learning_rate": 1e-3,
        "eval_every": 2,
        "eval_data": "rows.jsonl",
        "eval_rows": 2,
        "out_dir": out_dir,
    }
    argv = [f"--{key}={value}" for key, value in (options | changed).items()]
    return train_grpo.train(config.parse(train_grpo.Config, argv, train_grpo.check))


def same_weights(one, other):
    from safetensors.torch import load_file

    first, second = (load_file(Path(folder, "model.safetensors")) for folder in (one, other))
    return first.keys() == second.keys() and all(map(torch.equal, first.values(), second.values()))


@pytest.mark.parametrize("name", ["qwen3_vl", "smolvlm"])
def test_sft_and_grpo_run_on_images_and_leave_a_model_that_sees(name, workplace, tmp_path_factory):
    """A model that train_sft.py wrote is trained on by train_grpo.py, its rollouts by SFT again."""
    family = made(name, tmp_path_factory)
    metrics = sft(family, "sft", train_vision="true")
    assert metrics["val_loss"] > 0
    lines = [json.loads(line) for line in Path("sft/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    taught = SimpleNamespace(name=name, folder="sft")
    options = {"tune": "lora", "lora_r": 4, "beta": 0.01} if name == "qwen3_vl" else {}
    metrics = grpo(taught, "rl", **options)
    assert metrics["images"] > 0.5 and metrics["sampler_logprob_diff_max"] < 1e-4

    rows = [json.loads(line) for line in Path("rl/rollouts.jsonl").read_text().splitlines()]
    with_images = [row for row in rows if row.get("images")]
    assert with_images and all(
        Path("rl", file).exists() for row in with_images for file in row["images"]
    )
    metrics = sft(taught, "again", data="rl/rollouts.jsonl", val_rows=0, **RECORDED)
    assert metrics["loss"] > 0
    vision = find_vision("again", family.tokenizer)
    assert vision.prepare(eyes.picture(1)).key == family.vision.prepare(eyes.picture(1)).key


RECORDED = {"format": "hermes", "tools": "python", "batch_size": 2}


def test_runs_with_images_go_on_bit_for_bit(smol, workplace, monkeypatch):
    """Pitfall 52."""
    taught = SimpleNamespace(name="smolvlm", folder=smol.folder)
    grpo(taught, "whole")
    grpo(taught, "half", steps=2)
    text = Path("half/config.py").read_text().replace("steps = 2", "steps = 3")
    Path("half/config.py").write_text(text)
    grpo(taught, "half", resume="true")
    assert same_weights("whole", "half")


@pytest.mark.parametrize("kept_bytes", [0, 2**30])
def test_a_row_is_cut_in_front_of_an_image_that_would_be_half(
    smol, workplace, monkeypatch, kept_bytes
):
    """Whether its images are kept, or opened again."""
    import data

    monkeypatch.setattr(train_sft, "KEPT_BYTES", kept_bytes)
    rows = data.conversations("demos.jsonl")[:1]
    box = Toolbox(["mine.py:zoom"], describe_only=True)
    render = (rows, smol.tokenizer, "json_actions", box.schemas, "x")
    (sample,) = train_sft.render(*render, vision=smol.vision)
    assert len(sample.images) == 2 and bool(sample.images[0].pixels) == (kept_bytes > 0)
    (_, first), (start, end) = seeing.image_spans(sample.ids, sample.images)
    (kept,), cut, _ = train_sft.fit([sample], end - 1)
    assert len(kept.ids) == start and len(kept.images) == cut == 1
    assert [picture.key for picture in kept.pictures()] == [sample.images[0].key]


def test_play_shows_a_picture_and_a_question_of_your_own(qwen, workplace, capsys):
    import play

    keys = [f"--model={qwen.folder}", "--data=rows.jsonl", "--tools=mine.py:zoom"]
    keys += ["--rewards=correct", "--max_new_tokens=4", "--prompt_template=Q: {prompt}"]
    asked_for = ["--prompt=What is red?", "--image=3.png,4.png"]
    play.main([*keys, *asked_for])
    printed = capsys.readouterr().out
    assert "Q: What is red?" in printed and "reward" not in printed
    for number in (1, 2):
        assert f" tokens → out/play/image_{number}.png]" in printed
        shown = qwen.vision.prepare(eyes.picture(number + 2, 42 + number, 40)).shown
        with Image.open(f"out/play/image_{number}.png") as saved:
            assert list(saved.get_flattened_data()) == list(shown.get_flattened_data())
    play.main(keys)
    assert "What is " in capsys.readouterr().out and Path("out/play-2/image_1.png").exists()
    for wrong, says in (
        (["--image=3.png"], "image has no effect without a question: give --prompt=…"),
        ([*asked_for, "--made_up=true"], "prompt has no effect with made_up and demonstration"),
        (["--prompt=What?", "--image=no.png"], "the image 'no.png' is no file in the folder"),
    ):
        with pytest.raises(UserError, match=says):
            play.main([*keys, *wrong])


def test_a_teachers_rollouts_with_live_tools_are_learnt_from(qwen, smol, workplace):
    """Only the right ones; token by token by its own tokenizer, as conversations by any."""
    import data
    import evaluate

    # 1. the teacher calls the tool, and says 7: right for half of the rows
    lines = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()[:6]]
    for number, line in enumerate(lines):
        line["answer"] = str(7 + number % 2)
    Path("rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    turns = [call_text(qwen, (0, 0, 40, 30)), said(qwen, "It is \\boxed{7}")]
    teacher = Player(
        qwen.chat,
        Forced(qwen, turns),
        Toolbox([zoom]),
        {"correct": reward_of("correct")},
        Settings(),
        examples=data.load("rows.jsonl"),
    )
    Path("teacher").mkdir()
    record = Record(Path("teacher"), {})
    played = evaluate.play_all(teacher, record, 1, 4)
    assert not record.problem and [t.reward for t in played] == [1.0, 0.0] * 3
    right = [t for t in played if t.reward]

    # 2. a student with its tokenizer
    def samples(family, name, **options):
        cfg = train_sft.Config(
            model=family.folder, data=name, min_reward=1, batch_size=2, out_dir="student", **options
        )
        train_sft.check(cfg)
        return train_sft.setup(cfg)[2]

    recorded = samples(qwen, "teacher/rollouts.jsonl")
    assert [(sample.ids, sample.mask) for sample in recorded] == [(t.ids, t.mask) for t in right]
    for sample, t in zip(recorded, right, strict=True):
        keys = [picture.key for picture in sample.pictures()]
        assert keys == [picture.key for picture in t.images] and len(keys) == 2

    # 3. as conversations: the same tokens, and other ones for another family
    rows = [json.loads(line) for line in Path("teacher/rollouts.jsonl").read_text().splitlines()]
    talks = [{name: row[name] for name in ("messages", "images", "reward")} for row in rows]
    Path("teacher/talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    tools = {"tools": ("mine.py:zoom",)}
    Path("mine.py").write_text(BOXES)
    told = samples(qwen, "teacher/talks.jsonl", format="hermes", **tools)
    for sample, t in zip(told, right, strict=True):
        assert (sample.ids[: len(t.ids)], sample.mask[: len(t.ids)]) == (t.ids, t.mask)
    others = samples(smol, "teacher/talks.jsonl", format="json_actions", **tools)
    assert [len(sample.images) for sample in others] == [2, 2, 2]
    with pytest.raises(UserError, match="or learn its messages, with --recorded=false"):
        samples(smol, "teacher/rollouts.jsonl")


def test_turns_that_spell_their_actions_are_trained_on_as_the_format_writes_calls(smol, workplace):
    """OpenThinkIMG's rows: JSON by the assistant, results by the user, images of both."""
    import data

    call = call_text(smol, (0, 0, 40, 30)).removesuffix(smol.chat.facts.close).strip()
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": call},
        {"from": "human", "value": "OBSERVATION: <image>"},
        {"from": "gpt", "value": '{"thought": "I see.", "actions": []}'},
    ]
    row = {"conversations": turns, "images": ["0.png", "1.png"]}
    Path("talk.jsonl").write_text(json.dumps(row) + "\n")
    rows = data.conversations("talk.jsonl")
    render = (rows, smol.tokenizer, "json_actions", smol.chat.tools, "talk.jsonl")
    (sample,) = train_sft.render(*render, vision=smol.vision)
    assert len(sample.images) == 2 and smol.vision.fits(sample.ids, sample.images)
    trained = [token for token, mask in zip(sample.ids, sample.mask, strict=True) if mask]
    text = smol.tokenizer.decode(trained)
    assert text == call_text(smol, (0, 0, 40, 30)) + said(smol, turns[3]["value"])
    assert smol.chat.parse(turns_ids(smol, [call]))[1][0].name == "zoom"


BOXES = '''
class zoom:
    def __init__(self, example):
        self.images = example["images"]

    def __call__(self, image: int, box: list[int]):
        """Zooms into an image.

        Args:
            image: its number, from 1
            box: left, top, right, bottom
        """
        return ["Here:", self.images[image - 1].original.crop(box)]
'''


def test_no_image_of_a_step_is_held_while_the_next_one_is_sampled(smol, workplace, monkeypatch):
    taught = SimpleNamespace(name="smolvlm", folder=smol.folder)
    alive = []  # at the beginning of each step, of all that were made in those before
    made_before = []
    sample_groups = train_grpo.sample_groups

    def counted(player, *arguments, **options):
        gc.collect()
        alive.append(sum(reference() is not None for reference in made_before))
        trajectories, played, cursor = sample_groups(player, *arguments, **options)
        made_before.extend(map(weakref.ref, played))
        return trajectories, played, cursor

    monkeypatch.setattr(train_grpo, "sample_groups", counted)
    grpo(taught, "freed")
    assert alive == [0, 0, 0]


def test_images_are_refused_where_they_would_not_be_seen(qwen, workplace, tokenizer, tmp_path):
    with pytest.raises(UserError, match="packing = true with images"):
        sft(qwen, "packed", packing="true")
    from tasks import tiny

    folder = tmp_path / "text"
    models.save(tiny.tiny(tokenizer, 0), tokenizer, folder)
    blind = SimpleNamespace(name="qwen3_vl", folder=str(folder))
    with pytest.raises(UserError, match="demos.jsonl, row 1, has images.*sees no images: take"):
        sft(blind, "blind")
    with pytest.raises(UserError, match="row 1 has images.*sees no images: take one of qwen2_vl"):
        grpo(blind, "blind")
    Path("rows.jsonl").write_text(json.dumps({"prompt": "What?", "answer": "7"}))
    with pytest.raises(UserError, match="train_vision has no effect.*sees no images"):
        grpo(blind, "blind", train_vision="true")


def test_which_engine_shows_images_is_said_before_anything_slow(tmp_path_factory):
    """vLLM is for the families that are proved there; its tower can be left out."""
    examples = [{"id": 0, "images": ["a.png"]}]
    for name, engine, options, says in (
        ("qwen3_5", "vllm", (), "row 1 has images: .* is not proved for images in vLLM"),
        ("qwen3_5", "server", (), "is not proved for images in vLLM, use engine=transformers"),
        ("smolvlm", "vllm", ("images=false",), "row 1 has images: engine_options has images=false"),
        ("smolvlm", "vllm", (), ""),
        ("smolvlm", "server", (), ""),
        ("qwen3_5", "transformers", (), ""),
    ):
        family = made(name, tmp_path_factory)
        cfg = train_grpo.Config(model=family.folder, engine=engine, engine_options=options)
        if says:
            with pytest.raises(UserError, match=says):
                player.load_vision(cfg, family.tokenizer, examples)
            assert player.load_vision(cfg, family.tokenizer, [{"id": 0}]) is None
        else:
            vision = player.load_vision(cfg, family.tokenizer, examples)
            assert vision.placeholder == family.vision.placeholder
    smol = made("smolvlm", tmp_path_factory)
    cfg = train_grpo.Config(model=smol.folder, engine="server", train_vision=True, tune="lora")
    with pytest.raises(UserError, match="a server may leave .*, so use engine=vllm"):
        player.load_vision(cfg, smol.tokenizer, [])
    cfg.tune = "full"  # all weights go over, the tower's among them
    assert player.load_vision(cfg, smol.tokenizer, []).placeholder == smol.vision.placeholder


def test_an_adapter_says_whether_it_has_layers_of_the_tower(smol, tmp_path):
    for train_vision in (False, True):
        model, _ = models.load(smol.folder, "lora", device="cpu", train_vision=train_vision)
        folder = tmp_path / f"{train_vision}"
        models.save_adapter(model, folder)
        assert whole.is_of_tower(str(folder)) is train_vision
        assert ("model.vision_model" in models.frozen_parts(model)) is not train_vision
    urls = ("http://127.0.0.1:9",)
    with pytest.raises(UserError, match="has adapters in its tower.*use engine=vllm"):
        run_blocking(servers.start(urls, str(folder), smol.tokenizer, vision=smol.vision))

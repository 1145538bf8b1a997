"""The tiny task with pictures: that what is asked cannot be read without the zoom tool, that an
oracle is right, and that a model from scratch can be trained on it.

    pytest tests/test_chart.py
"""

import asyncio
import io
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import play
import rewards
import train_grpo
import train_sft
from images import Picture
from learning import optim
from learning.vision import tiny_vision
from run import config
from run.config import UserError
from tasks import chart, tiny
from tools import Toolbox

OPTIONS = ("zoom.side=32",)


@pytest.fixture(scope="module")
def rows():
    return chart.rows("test", 0, 24)


@pytest.fixture(scope="module")
def vision():
    row = chart.rows("train", 0, 1)[0]
    talk = [{"role": "user", "content": row["prompt"]}]
    return tiny_vision(tiny.tiny_tokenizer([talk], [], sees=True))


def opened(png):
    return Image.open(io.BytesIO(png)).convert("RGB")


def other_numbers(row):
    """The picture of a row, with another number on each of its tiles."""
    tiles = {}
    for place, (colour, number) in row["tiles"].items():
        tiles[place] = (colour, 10 + (number + 27) % 90)
    return chart.draw(tiles)


def call_zoom(image, box, tool="zoom"):
    async def call():
        toolbox = Toolbox((tool,), options=OPTIONS)
        session = toolbox.open({}, [Picture(image)])
        content, error, _ = await session.call("zoom", {"image": 1, "box": box})
        await session.close()
        await toolbox.close()
        assert error is None, content
        return content[0]

    return asyncio.run(call())


# ---- the problems


def test_rows_are_always_the_same_for_a_seed_and_others_for_another():
    assert chart.rows("test", 0, 20) == chart.rows("test", 0, 20)
    assert chart.rows("test", 0, 20) != chart.rows("test", 1, 20)
    assert chart.demos(20, 0) == chart.demos(20, 0) != chart.demos(20, 1)
    assert len(chart.rows("test")) == 512
    with pytest.raises(UserError, match="has train and test"):
        chart.rows("tset")


def test_no_held_out_problem_is_trained_on():
    problems = {}
    for split in ("train", "test"):
        made = chart.rows(split, 0, 400)
        problems[split] = {(row["colour"], row["place"], row["answer"]) for row in made}
    assert problems["train"].isdisjoint(problems["test"])
    # the demonstrations that are right are on problems of train, too
    asked = [talk for talk in chart.demos(400) if any(said["role"] == "tool" for said in talk)]
    assert len(asked) > 20
    for talk in asked:
        picture = np.asarray(opened(talk[0]["content"][0]["image"]))
        colour = talk[0]["content"][1]["text"].removesuffix("?").split()[-1]
        answer = int("".join(filter(str.isdigit, talk[-1]["content"])))
        for place in range(chart.PLACES**2):
            row, column = divmod(place, chart.PLACES)
            top = row * chart.SIDE
            left = column * chart.SIDE
            tile = picture[top : top + chart.SIDE, left : left + chart.SIDE]
            if np.array_equal(tile, chart.draw_tile(colour, answer)):
                assert not chart.held_out(colour, place, answer)


# ---- what is seen


def test_what_the_model_is_shown_is_the_same_whatever_the_numbers_are(rows, vision):
    """The answer is not in the small view, not even in part: so the tool's image is necessary."""
    for row in rows:
        picture = vision.prepare(opened(row["image"]))
        other = vision.prepare(other_numbers(row))
        assert picture.original.tobytes() != other.original.tobytes()
        assert picture.shown.size == (32, 32)
        assert picture.shown.tobytes() == other.shown.tobytes()
        assert picture.key == other.key


def test_the_colours_of_the_tiles_are_seen(rows, vision):
    row = rows[0]
    shown = np.asarray(vision.prepare(opened(row["image"])).shown)
    for place, (colour, _) in row["tiles"].items():
        down, across = divmod(place, chart.PLACES)
        centre = shown[down * 16 + 8, across * 16 + 8]
        assert tuple(centre.tolist()) == chart.COLOURS[colour]


def test_the_zoom_shows_the_tile_as_it_is_and_the_model_sees_all_of_it(rows, vision):
    for row in rows[:6]:
        tile = call_zoom(opened(row["image"]), chart.box_of(row["place"]))
        drawn = chart.draw_tile(row["colour"], int(row["answer"]))
        assert np.array_equal(np.asarray(tile), drawn)
        assert np.array_equal(np.asarray(vision.prepare(tile).shown), drawn)


def test_a_zoom_into_more_than_a_tile_shows_no_number(rows, vision):
    for row in rows[:6]:
        seen = []
        for image in (opened(row["image"]), other_numbers(row)):
            seen.append(vision.prepare(call_zoom(image, [0, 0, 1000, 500])).shown.tobytes())
        assert seen[0] == seen[1]


def test_no_two_numbers_look_alike():
    looks = {chart.ink(number).tobytes() for number in range(10, 100)}
    assert len(looks) == 90


def test_the_blank_zoom_is_described_alike_and_shows_nothing(rows):
    tools = {}
    for name in ("zoom", "bench/blank.py:zoom"):
        toolbox = Toolbox((name,), options=OPTIONS)
        tools[name] = toolbox.schemas
    assert tools["zoom"] == tools["bench/blank.py:zoom"]
    box = chart.box_of(rows[0]["place"])
    tile = call_zoom(opened(rows[0]["image"]), box, "bench/blank.py:zoom")
    assert tile.size == (32, 32) and tile.getextrema() == ((255, 255),) * 3


# ---- what is said


def test_the_oracle_is_right_and_demonstrations_are_written_as_they_are_played(capsys):
    cfg = config.parse(train_grpo.Config, ["--config", "chart.py"], train_grpo.check)
    trajectory = play.play_made_up(cfg)
    assert trajectory.reward == 1.0 and trajectory.stop == "answered", capsys.readouterr().out
    assert [call.error for call in trajectory.calls] == [None]
    assert len(trajectory.images) == 2

    # the same conversation as a demonstration has the same ids, mask and pixels
    row = chart.rows("train", cfg.seed, 1)[0]
    number = int(row["answer"])
    look, answer = chart.oracle(row)
    system = {"role": "system", "content": cfg.system_prompt}
    talk = [
        system,
        chart.question(row["prompt"], row["image"]),
        look,
        chart.seen(row["colour"], number),
        answer,
    ]
    rows = [{"row": 1, "messages": talk, "tools": None}]
    tokenizer, _ = play.local_tokenizer(cfg, [], Toolbox(("zoom",)).schemas, [])
    samples = rendered(rows, tokenizer)
    assert samples[0].ids == trajectory.ids
    assert samples[0].mask == trajectory.mask
    keys = [picture.key for picture in trajectory.images]
    assert [picture.key for picture in samples[0].images] == keys
    placeholder = tokenizer.convert_tokens_to_ids("<image>")
    trained = [token for token, bit in zip(samples[0].ids, samples[0].mask, strict=True) if bit]
    assert samples[0].ids.count(placeholder) == 8 and placeholder not in trained


def rendered(rows, tokenizer):
    """What SFT makes of demonstrations."""
    import data

    made = []
    for row in rows:
        row, messages = data._with_images(row, row["messages"], None)
        made.append(row | {"messages": messages})
    schemas = Toolbox(("zoom",), describe_only=True).schemas
    vision = tiny_vision(tokenizer)
    return train_sft.render(made, tokenizer, "hermes", schemas, "chart", vision=vision)


def test_episodes_are_imperfect():
    rng = random.Random(0)
    episodes = [chart.episode(rng) for _ in range(300)]
    looked = sum(len(talk) == 4 for talk in episodes)
    right = sum(is_right(talk) for talk in episodes)
    assert 0.55 < looked / 300 < 0.75
    assert 0.45 < right / 300 < 0.65


def test_lessons_are_right_and_come_first():
    talks = chart.demos(400)
    asked = [talk[0]["content"][1]["text"] for talk in talks]
    assert any(talk[-1]["content"].startswith("I think") for talk in talks[280:])
    assert not any(talk[-1]["content"].startswith("I think") for talk in talks[:280])
    counts = set()
    for talk, text in zip(talks, asked, strict=True):
        if text != "Where is what?":
            continue
        picture = np.asarray(opened(talk[0]["content"][0]["image"]))
        lines = talk[1]["content"].splitlines()
        counts.add(len(lines))
        for line in lines:
            colour, where = line.removesuffix(".").split(" ", 1)
            down, across = divmod(chart.WORDS.index(where), chart.PLACES)
            below = picture[down * chart.SIDE + 20, across * chart.SIDE + 20]  # its digits
            assert tuple(below.tolist()) == chart.COLOURS[colour]
    assert counts == {1, 2, 3, 4}


def is_right(talk):
    """Whether the last message says the number on the tile that was asked for."""
    picture = np.asarray(opened(talk[0]["content"][0]["image"]))
    colour = talk[0]["content"][1]["text"].removesuffix("?").split()[-1]
    for place in range(chart.PLACES**2):
        row, column = divmod(place, chart.PLACES)
        top = row * chart.SIDE
        left = column * chart.SIDE
        tile = picture[top : top + chart.SIDE, left : left + chart.SIDE]
        if tuple(tile[20, 20].tolist()) != chart.COLOURS[colour]:  # below its digits
            continue
        for number in range(10, 100):
            if np.array_equal(tile, chart.draw_tile(colour, number)):
                ended = SimpleNamespace(messages=talk, stop="answered", answer=None)
                return rewards.correct(ended, {"messages": talk[:1], "answer": str(number)})
    raise AssertionError(f"no {colour} tile in the picture")


def test_images_are_kept_or_opened_again_with_the_same_pixels(monkeypatch):
    talks = chart.demos(8)
    rows = [{"row": number, "messages": talk, "tools": None} for number, talk in enumerate(talks)]
    tokenizer = tiny.tiny_tokenizer(talks, Toolbox(("zoom",)).schemas, sees=True)
    kept = rendered(rows, tokenizer)
    monkeypatch.setattr(train_sft, "KEPT_BYTES", 80_000)  # of two or three of them
    partly = rendered(rows, tokenizer)
    assert partly[0].reopen is None and partly[-1].reopen is not None
    assert partly[-1].images[0].pixels == {}
    for first, second in zip(kept, partly, strict=True):
        assert first.ids == second.ids and first.pictures()
        for one, other in zip(first.pictures(), second.pictures(), strict=True):
            assert one.key == other.key
            assert torch.equal(one.pixels["pixel_values"], other.pixels["pixel_values"])


# ---- the model


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chart") / "sft"
    argv = ["--config", "chart_sft.py", f"--out_dir={folder}", "--rows=40", "--batch_size=8"]
    argv += ["--epochs=1", "--warmup=0"]
    cfg = config.parse(train_sft.Config, argv, train_sft.check)
    return folder, cfg, train_sft.train(cfg)


def test_sft_makes_a_model_that_sees_and_saves_its_processor(sft_run):
    from transformers import AutoModelForImageTextToText

    folder, cfg, metrics = sft_run
    assert metrics["loss"] > 0 and metrics["grad_norm"] > 0
    saved = json.loads((folder / "preprocessor_config.json").read_text())
    assert saved["size"] == {"longest_edge": 32}
    trained = AutoModelForImageTextToText.from_pretrained(folder)
    tokenizer = train_sft.models.load_tokenizer(str(folder))
    untrained = tiny.tiny_that_sees(tokenizer, cfg.seed).state_dict()
    trained_weights = trained.state_dict().items()
    moved = [name for name, weight in trained_weights if weight.ne(untrained[name]).any()]
    assert any("vision_model" in name for name in moved)
    assert any("text_model" in name for name in moved)
    assert train_sft.models.frozen_parts(trained) == ""


def test_what_adamw_has_of_the_tower_takes_its_share_of_the_learning_rate(vision):
    model = tiny.tiny_that_sees(vision.tokenizer)
    adamw, muon = optimizers = optim.optimizers(model, "muon", 0.1, tower_share=0.5)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optim.step(model, optimizers, 0.01, max_grad_norm=1.0)
    assert [group["lr"] for group in adamw.param_groups] == [0.01, 0.01, 0.005]
    assert [group["lr"] for group in muon.param_groups] == [0.01]
    # the first step of Adam is as long as its learning rate
    steps = {"model.connector.modality_projection.proj.weight": 0.005}
    steps["model.vision_model.embeddings.patch_embedding.weight"] = 0.005
    steps["model.text_model.embed_tokens.weight"] = 0.01
    weights = dict(model.named_parameters())
    for name, step in steps.items():
        moved = before[name] - weights[name].detach()
        assert torch.allclose(moved, torch.full_like(moved, step), rtol=0.01), name


def test_a_step_of_grpo_and_an_evaluation_run(sft_run, tmp_path):
    argv = ["--config", "chart.py", f"--model={sft_run[0]}", f"--out_dir={tmp_path / 'grpo'}"]
    argv += ["--steps=1", "--prompts_per_step=2", "--group_size=2", "--limit=2"]
    metrics = train_grpo.train(config.parse(train_grpo.Config, argv, train_grpo.check))
    assert metrics["rollouts"] == 4 and metrics["images"] >= 1

    given = evaluate.Config(run=str(tmp_path / "grpo"), limit=2)
    cfg = evaluate.load_config(["--tools=bench/blank.py:zoom"], given)
    numbers = evaluate.evaluate(cfg, given)
    assert numbers["problems"] == 2 and numbers["accuracy"] == 0.0

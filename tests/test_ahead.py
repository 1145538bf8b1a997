"""--ahead=1: the next batch is played while this one is learnt from.

    pytest tests/test_ahead.py

Pinned here, with dev/stand_in.py as the server: which weights play which batch; a run that is
killed, stopped or meets a broken reward goes on, bit for bit where its batches were saved; ranks
that share a server, ahead or not, with adapters or full weights; what cannot be is refused.
"""

import contextlib
import dataclasses
import io
import json
import os
import signal
import sys
import threading
import time
import urllib.request

import eyes
import pytest
import torch
from ports import free_port
from test_parallel import alone, assert_learnt_alike, begin, ranks  # fixtures, by their names
from test_resume import (
    HANGS,
    STEPS,
    UPDATES,
    assert_same,
    configured,
    left_by,
    lines,
    nursery,
    place,
    run,
    start,
    wait_for,
)

import train_grpo
from images import Picture
from run.config import UserError
from run.loop import Running
from trajectory import ToolCall, Trajectory

KILLS = [  # (where, at which call): each life begins where the one before was killed
    ("between two updates", 2 * UPDATES + 2),
    ("as a state is written", 1),
    ("after a checkpoint was renamed", 1),
    ("in a line of metrics", 1),
    ("as logprobs are computed", 3),
]


def healthy(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=60).status == 200
    except OSError:
        return False


def stand_in(folder: str, port: int) -> None:
    """A server which samples one turn at a time, as a process of its own."""
    from dev.stand_in import main

    sys.argv = ["stand_in.py", f"--model={folder}", f"--port={port}"]
    main()


@contextlib.contextmanager
def serving(nursery, folder):
    """The address of such a server."""
    port = free_port()
    server = nursery.Process(target=stand_in, args=(str(folder), port))
    server.start()
    address = f"http://127.0.0.1:{port}"
    end = time.monotonic() + HANGS
    try:
        while not healthy(address):
            assert server.is_alive() and time.monotonic() < end
            time.sleep(0.05)
        yield address
    finally:
        server.kill()
        server.join()


@pytest.fixture(scope="module")
def url(nursery, place):
    """Of a server of place/base, which has the weights of the last run with full ones."""
    with serving(nursery, place / "base") as address:
        yield address


@pytest.fixture(scope="module")
def ahead(url):
    """The options of a run that plays ahead."""
    return {"ahead": 1, "engine": "server", "urls": (url,)}


@pytest.fixture(scope="module")
def undisturbed(run, place, ahead):
    """What such a run leaves."""
    exitcode, log = run("grpo", place / "ahead", resume=False, **ahead)
    assert exitcode == 0, log
    return left_by(place / "ahead")


@pytest.fixture(scope="module")
def not_ahead(run, place, url):
    """What a run leaves that does not."""
    out_dir = place / "not_ahead"
    exitcode, log = run("grpo", out_dir, resume=False, engine="server", urls=(url,))
    assert exitcode == 0, log
    return left_by(out_dir)


def test_each_batch_is_played_by_the_weights_before_the_last_update(undisturbed, not_ahead):
    rows = undisturbed["metrics"]
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert [row["lag"] for row in rows] == [0] + [1] * (STEPS - 1)
    assert all(row["canary"] < 1e-4 and row["grad_norm"] > 0 for row in rows)
    # the engine's logprobs are those of the policy before: that is in the correction
    assert all(row["sampler_logprob_diff"] > 1e-4 for row in rows[1:])
    assert rows[0]["sampler_logprob_diff"] < 1e-4
    others = not_ahead["metrics"]
    assert all("lag" not in row and row["sampler_logprob_diff"] < 1e-4 for row in others)
    assert rows[0]["reward"] == others[0]["reward"]  # the first batch is the same


def test_weights_that_are_sent_make_the_run_of_those_in_a_file(run, place, url, not_ahead):
    """Bit for bit, and without a file."""
    out_dir = place / "sent"
    options = {"engine": "server", "urls": (url,), "engine_options": ("transport=gloo",)}
    exitcode, log = run("grpo", out_dir, resume=False, **options)
    assert exitcode == 0, log
    assert_same(left_by(out_dir), not_ahead)


def test_a_run_killed_again_and_again_is_the_run_that_nobody_disturbed(
    undisturbed, run, place, ahead
):
    """Pitfall 52: the batch that waits is saved beside the state."""
    out_dir = place / "killed_ahead"
    for point, call in KILLS:
        exitcode, log = run("grpo", out_dir, point, call, **ahead)
        assert exitcode == -signal.SIGKILL, f"{point}: {log}"
    exitcode, log = run("grpo", out_dir, **ahead)
    assert exitcode == 0, log
    assert_same(undisturbed, left_by(out_dir))


def test_a_run_that_is_told_to_stop_finishes_its_step_and_saves(
    undisturbed, start, run, place, ahead
):
    number = signal.SIGTERM
    out_dir = place / "stopped_ahead"
    child = start("grpo", out_dir, "halt", 2, save_every=0, **ahead)
    wait_for(place / "log", "halted")
    os.kill(child.pid, number)
    wait_for(place / "log", "finishing this step, then saving")
    (place / "go").touch()
    child.join(HANGS)
    assert child.exitcode == 128 + number
    assert "Traceback" not in (place / "log").read_text()
    exitcode, log = run("grpo", out_dir, **ahead)
    assert exitcode == 0, log
    assert_same(undisturbed, left_by(out_dir))


def test_a_run_that_is_told_twice_ends_at_once(start, place, ahead):
    """What is played ahead ends with it."""
    child = start("grpo", place / "twice_ahead", "halt", 2 * UPDATES + 2, **ahead)
    wait_for(place / "log", "halted")
    for said in ("finishing this step, then saving", "interrupted"):
        os.kill(child.pid, signal.SIGINT)
        wait_for(place / "log", said)
    child.join(HANGS)
    assert child.exitcode == 130 and "Traceback" not in (place / "log").read_text()


def test_a_reward_that_raises_ahead_costs_nothing_that_was_learnt(run, place, ahead):
    """The step that was being learnt from is saved, and its line is in the log."""
    (place / "late_reward.py").write_text(
        "def coin(trajectory, example):\n    if trajectory.version == 2:\n"
        "        raise KeyError('unit')\n    return float(sum(trajectory.ids) % 3 == 0)\n"
    )
    options = ahead | {"rewards": ("late_reward.py:coin",), "save_every": 0, "eval_every": 0}
    options |= {"eval_data": "", "eval_rows": 128}
    exitcode, log = run("grpo", place / "late", **options)
    assert exitcode != 0 and "KeyError" in log
    (saved,) = (place / "late" / "checkpoints").iterdir()
    assert saved.name == "step-000003"  # batch 3 is the first that version 2 plays
    assert [row["step"] for row in lines(place / "late" / "metrics.jsonl")] == [0, 1, 2]
    (place / "late_reward.py").write_text(
        "def coin(trajectory, example):\n    return float(sum(trajectory.ids) % 3 == 0)\n"
    )
    exitcode, log = run("grpo", place / "late", **options)
    assert exitcode == 0, log
    lags = [row["lag"] for row in lines(place / "late" / "metrics.jsonl")]
    assert lags == [0, 1, 1, 0] + [1] * (STEPS - 4)


# -- several ranks, one server


def test_ranks_play_ahead_as_one_process_does(ranks, alone, place, ahead):
    codes, said = ranks("grpo", 2, "fsdp", "ranks-ahead", **ahead)
    assert codes == [0, 0], said
    ours = lines(place / "ranks-ahead" / "metrics.jsonl")
    theirs = lines(alone("grpo", **ahead) / "metrics.jsonl")
    for mine, other in zip(ours, theirs, strict=True):
        del mine["canary"], other["canary"]  # roundings
        assert mine == pytest.approx(other, rel=1e-3, abs=5e-5)


def test_ranks_share_a_server(ranks, alone, place, url):
    """Full weights: each takes care that the server has what the first one wrote."""
    options = {"engine": "server", "urls": (url,)}
    codes, said = ranks("grpo", 2, "fsdp", "ranks-full", **options)
    assert codes == [0, 0], said
    assert_learnt_alike(place / "ranks-full", alone("grpo", **options))
    assert not (place / "ranks-full" / "weights").exists()


def test_ranks_share_an_adapter(nursery, ranks, alone, place):
    """It is loaded once, under one name, so that two have room in the server."""
    with serving(nursery, place / "base") as url:
        options = {"engine": "server", "urls": (url,)}
        codes, said = ranks("grpo_lora", 2, "ddp", "ranks-lora", **options)
        assert codes == [0, 0], said
        served = json.load(urllib.request.urlopen(f"{url}/v1/models"))
        assert len([card for card in served["data"] if card["parent"]]) == 1  # the last version
        assert_learnt_alike(place / "ranks-lora", alone("grpo_lora", **options))


# -- what is saved of a batch


def test_a_trajectory_is_saved_as_plain_values():
    """Of all fields that are there when it is played, those of a call and of an image too."""
    picture = Picture(eyes.picture(3), key=77)
    trajectory = Trajectory({"id": 0}, group=2, sample=1)
    trajectory.add([1, 2], mask=0, images=[picture])
    trajectory.add([3], mask=1, logprobs=[-0.25])
    trajectory.turn_starts = [2]
    trajectory.calls = [ToolCall(0, "look", {"at": [1, {"x": None}]}, "seen", None, 0.5)]
    trajectory.messages = [{"role": "user", "content": [{"type": "image"}]}]
    trajectory.rewards, trajectory.reward = {"correct": None, "style": 0.5}, 0.5
    trajectory.turn_rewards, trajectory.answer = [0.5], "ä"
    file = io.BytesIO()
    torch.save([trajectory.plain(), picture.saved()], file)
    file.seek(0)
    values, image = torch.load(file, weights_only=True)
    again = Trajectory.of_plain(values, trajectory.example, [Picture.of_saved(*image)])
    assert again.images[0].key == 77
    assert again.images[0].shown.tobytes() == picture.shown.tobytes()
    again.images = trajectory.images
    assert dataclasses.asdict(again) == dataclasses.asdict(trajectory)


# -- what runs beside


def test_what_runs_beside_is_ended_when_nobody_waits_for_it():
    import asyncio

    begun, ended = threading.Event(), threading.Event()

    async def sleeps():
        begun.set()
        try:
            await asyncio.sleep(HANGS)
        finally:
            ended.set()

    running = Running(sleeps())
    assert begun.wait(60)
    running.cancel()
    assert ended.is_set()


@pytest.mark.parametrize(
    "options, why",
    [
        ({"ahead": 2, "engine": "server"}, "ahead = 2: expected 0, or 1 batch"),
        (
            {"ahead": 1},
            "ahead = 1 with engine=transformers: it samples with the memory and the cores that "
            "learn, so nothing would be gained; use engine=server",
        ),
        (
            {"ahead": 1, "engine": "server", "is_correction": "none"},
            "ahead = 1 with is_correction=none: its batches are of the policy before the last "
            "update, so leave is_correction=auto",
        ),
    ],
)
def test_what_cannot_help_is_refused(options, why):
    urls = ("http://127.0.0.1:1",) if options.get("engine") else ()
    with pytest.raises(UserError) as caught:
        train_grpo.check(configured("grpo", "refused", urls=urls, **options))
    assert str(caught.value) == why

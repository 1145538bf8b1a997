"""Runs that are killed, stopped, run out of disk or meet a broken reward, and then go on.

    pytest tests/test_resume.py

Pinned here: SIGKILL anywhere, also in the middle of a checkpoint, changes no bit of metrics.jsonl,
rollouts.jsonl, weights or optimizer; Ctrl-C and SIGTERM save; a damaged checkpoint is not used; a
full disk or a reward that raises costs nothing that was saved. Killed runs are processes of their
own, forked from one that has imported everything: the signals are real, and start-up costs little.
The model has 16 dimensions and knows nothing, so the reward is one that differs whatever it says.
"""

import errno
import itertools
import json
import math
import multiprocessing
import os
import pkgutil
import random
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
import typing
from dataclasses import replace
from pathlib import Path

import eyes
import numpy
import pytest
import torch

import train_grpo
import train_sft
from engines import local
from learning import checkpoint, optim
from learning import model as models
from learning.checkpoint import FREE, Run
from run import config, mix
from run import page as run_page
from run.config import UserError
from tasks import tiny as tiny_model

STEPS = 8
HANGS = 600  # seconds that no process takes on however busy a machine, unless it hangs
REWARD = """
def coin(trajectory, example):
    return float(sum(trajectory.ids) % 3 == 0)
"""
GRPO = {  # all that has a state: groups that are replaced, a reference, moments, a schedule
    "steps": STEPS,
    "save_every": 2,
    "data": "rows.jsonl",
    "tools": (),
    "prompts_per_step": 2,
    "group_size": 3,
    "max_tokens": 100,
    "max_new_tokens": 3,
    "dynamic_sampling": "coin",
    "updates_per_batch": 2,
    "minibatches": 2,
    "beta": 0.02,
    "learning_rate": 1e-2,
    "schedule": "cosine",
    "warmup": 2,
    "eval_every": 2,
    "eval_data": "held.jsonl",
    "eval_rows": 2,
}
UPDATES = GRPO["updates_per_batch"] * GRPO["minibatches"]  # of a step
SFT = {  # 8 steps of 4 of 22 rows, over the end of an epoch
    "save_every": 2,
    "data": "demos.jsonl",
    "val_rows": 4,
    "val_every": 2,
    "tools": (),
    "epochs": 1.45,
    "batch_size": 4,
    "optimizer": "muon",
    "learning_rate": 1e-2,
    "warmup": 2,
}
LORA = {"tune": "lora", "lora_r": 4, "lora_alpha": 8}
RUNS = {
    "grpo": (train_grpo, GRPO),
    "grpo_lora": (train_grpo, GRPO | LORA),
    "sft": (train_sft, SFT),
}
IMAGES = {"model": "sees", "tools": ("look.py:look",)}
GRPO_IMAGES = {  # pictures in prompts and from a tool
    "data": "pictures.jsonl",
    "eval_data": "pictures.jsonl",
    "max_tokens": 1200,
    "max_new_tokens": 24,
    "max_turns": 2,
    "learning_rate": 1e-3,
    # what text has shown above is not shown again
    "dynamic_sampling": "",
    "updates_per_batch": 1,
    "beta": 0.0,
    "eval_every": 4,
}
SFT_IMAGES = {"data": "seen.jsonl", "val_rows": 2, "epochs": 3.2}
SEEING = {
    "grpo_images": (train_grpo, GRPO | IMAGES | GRPO_IMAGES),
    "sft_images": (train_sft, SFT | IMAGES | SFT_IMAGES),
}
# Two sources each, with limits, rewards and prompts of their own.
OF_THE_SOURCES = ("data", "tools", "max_new_tokens", "eval_data")
MIXED = {
    "grpo_mix": (
        train_grpo,
        {key: value for key, value in GRPO.items() if key not in OF_THE_SOURCES}
        | {"mix": ("one.py", "two.py:0.5")},
    ),
    "sft_mix": (
        train_sft,
        {key: value for key, value in SFT.items() if key not in OF_THE_SOURCES}
        | {"mix": ("three.py:3", "four.py"), "epochs": 0.95},
    ),
}
MIXED["grpo_curriculum"] = (train_grpo, GRPO | {"curriculum": (0.2, 0.8)})
EVERY_RUN = RUNS | SEEING | MIXED
SOURCES = {
    "one": 'data = "rows.jsonl"\neval_data = "held.jsonl"\ntools = ()\nmax_new_tokens = 3\n'
    'rewards = ("my_rewards.py:coin",)\n',
    "two": 'data = "held.jsonl"\neval_data = "rows.jsonl"\ntools = ()\nmax_new_tokens = 2\n'
    'rewards = ("my_rewards.py:coin:2", "format:0")\nsystem_prompt = "Hi"\n',
    "three": 'data = "demos.jsonl"\ntools = ()\nrows = 12\n',
    "four": 'data = "demos.jsonl"\ntools = ()\nsystem_prompt = "Hi"\n',
}
LOOK = '''
class look:
    def __init__(self, example):
        self.images = example["images"]

    def __call__(self):
        """Shows the left half of the image."""
        picture = self.images[-1].original
        return picture.crop((0, 0, (picture.width + 1) // 2, picture.height))
'''

# What a process does to itself at a point that it reaches.


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_a_line(log, metrics) -> None:
    """In the middle of it."""
    log.metrics.write(json.dumps(metrics)[:40])
    log.metrics.flush()
    die()


def die_removing(path) -> None:
    next(Path(path).iterdir()).unlink()
    die()


def halt(*_) -> None:
    """Until there is a file `go`."""
    print("halted", file=sys.stderr)
    while not Path("go").exists():
        time.sleep(0.01)


def fill_the_disk(*_) -> None:
    """As far as any file is concerned that is larger than the number in the file `limit`."""
    limit = int(Path("limit").read_text())
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def any_call(*_, **__) -> bool:
    return True


def of_config(old, new) -> bool:
    return Path(new).name == "config.py"


def of_an_image(old, new) -> bool:
    return Path(new).suffix == ".png"


def of_a_checkpoint(path, **_) -> bool:
    return Path(path).is_dir() and Path(path).name.startswith("step-")


POINTS = {  # name: (function, before or after it, what happens, which of its calls count)
    "as config.py is written": ("os.replace", "before", die, of_config),
    "as a turn is sampled": ("engines.local.TransformersEngine._decode", "before", die, any_call),
    "as logprobs are computed": ("learning.logprobs.token_logprobs", "before", die, any_call),
    "between two updates": ("learning.optim.step", "after", die, any_call),
    "as a model is written": ("learning.model.save", "before", die, any_call),
    "as a state is written": ("torch.save", "before", die, any_call),
    "before a checkpoint is renamed": ("os.rename", "before", die, any_call),
    "after a checkpoint was renamed": ("os.rename", "after", die, any_call),
    "as an old one is removed": ("shutil.rmtree", "before", die_removing, of_a_checkpoint),
    "in a line of metrics": ("run.log.Log.step", "before", die_in_a_line, any_call),
    "as an image is written": ("pathlib.Path.replace", "before", die, of_an_image),
    "before rollouts are written": ("run.log.Log.rollouts", "before", die, any_call),
    "before a checkpoint": ("learning.checkpoint.Run.after", "before", die, any_call),
    "as lines are dropped": ("run.log._drop", "after", die, any_call),
    "halt": ("learning.optim.step", "before", halt, any_call),
    "full disk": ("learning.checkpoint.Run.save", "before", fill_the_disk, any_call),
}


def command(script: str, argv: list[str], folder: str, point: str, call: int) -> None:
    """`python script argv >> log` in the folder. At that call of the point, something happens."""
    os.chdir(folder)
    output = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    run_page.curves = lambda out_dir: None  # drawing takes longer than all else
    if point:
        lay_in_wait(point, call)
    sys.argv = [f"{script}.py", *argv]
    runpy.run_path(str(config.HERE / sys.argv[0]), run_name="__main__")


def lay_in_wait(point: str, call: int) -> None:
    """Wraps the function of a point, so that something happens at that call of it."""
    function, when, act, counts = POINTS[point]
    owner_name, _, name = function.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    real = getattr(owner, name)
    numbers = itertools.count(1)  # of the calls that count

    def wrapped(*args, **kwargs):
        is_now = counts(*args, **kwargs) and next(numbers) == call
        if is_now and when == "before":
            act(*args)
        result = real(*args, **kwargs)
        if is_now and when == "after":
            act(*args)
        return result

    setattr(owner, name, wrapped)


@pytest.fixture(scope="module")
def nursery():
    """Where processes are forked from: it has imported everything, and made no thread."""
    context = multiprocessing.get_context("forkserver")
    modules = ["light", "train_grpo", "train_sft", "peft"]
    modules += ["transformers.models.qwen3.modeling_qwen3"]
    modules += ["transformers.models.qwen3_vl.modeling_qwen3_vl"]
    modules += ["deepspeed", "deepspeed.ops.op_builder.all_ops", "torch.distributed.fsdp"]
    modules += ["deepspeed.module_inject.auto_ep_layer", "jinja2.sandbox", "rich.console"]
    context.set_forkserver_preload([*modules, Path(__file__).stem, "nursery"])
    paths = [str(config.HERE), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))  # the server has no other way to know
        patch.setenv("DS_ACCELERATOR", "cpu")  # else deepspeed warns that it found no GPU
        yield context


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """The folder where runs start: models, data, a reward. It is in memory where there is such a
    place: each checkpoint waits for the disk, and what is killed here is a process, not a disk."""
    in_memory = None
    if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 2**30:
        in_memory = Path(tempfile.mkdtemp(prefix="nanotool-test-", dir="/dev/shm"))
    folder = in_memory or tmp_path_factory.mktemp("resume")
    fill(folder, tokenizer)
    yield folder
    if in_memory:
        shutil.rmtree(in_memory, ignore_errors=True)


def fill(folder, tokenizer):
    (folder / "my_rewards.py").write_text(REWARD)
    for name, size in (("base", 16), ("wider", 32)):
        models.save(tiny_model.tiny(tokenizer, 0, size, layers=1), tokenizer, folder / name)
    prompts = [f"{a} + {b}?" for a, b in itertools.product(range(2, 8), range(2, 7))]
    rows = [{"prompt": prompt, "answer": "4"} for prompt in prompts[:5]]
    held_out = [{"prompt": prompt, "answer": "4"} for prompt in prompts[28:]]
    demos = []
    for prompt in prompts[:26]:
        question = {"role": "user", "content": prompt}
        answer = {"role": "assistant", "content": prompt[::-1]}
        demos.append({"messages": [question, answer]})
    for name, examples in (("rows", rows), ("demos", demos), ("held", held_out)):
        text = "".join(json.dumps(example) + "\n" for example in examples)
        (folder / f"{name}.jsonl").write_text(text)
    for name, text in SOURCES.items():
        (folder / f"{name}.py").write_text(text)


@pytest.fixture
def here(place, monkeypatch):
    """The same folder, for runs in this process."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(run_page, "curves", lambda out_dir: None)
    return place


def configured(name, out_dir, **options):
    script, values = EVERY_RUN[name]
    values = {"model": "base", **values, "out_dir": str(out_dir)}
    if script is train_grpo and "mix" not in values:
        values["rewards"] = ("my_rewards.py:coin",)
    return script.Config(**values | options)


@pytest.fixture(scope="module")
def start(nursery, place):
    """start(run, out_dir, point, call, key=value, …): a process that is running."""
    children = []

    def begin(name, out_dir, point="", call=1, **options):
        cfg = configured(name, out_dir, **{"resume": True, **options})
        config.save(cfg, f"{out_dir}.py")
        argv = ["--config", f"{out_dir}.py"]
        (place / "log").unlink(missing_ok=True)
        (place / "go").unlink(missing_ok=True)
        script = EVERY_RUN[name][0].__name__
        child = nursery.Process(target=command, args=(script, argv, str(place), point, call))
        child.start()
        children.append(child)
        return child

    yield begin
    for child in children:  # where a test failed, one may still wait
        child.kill()
        child.join()


@pytest.fixture(scope="module")
def run(start, place):
    """run(…) as start(…), to its end: (exit code, what it printed)."""

    def to_the_end(*args, **options):
        child = start(*args, **options)
        child.join(HANGS)
        return child.exitcode, (place / "log").read_text()

    return to_the_end


# What is compared


def untimed(value):
    """A nested value without its times."""
    if isinstance(value, dict):
        return {key: untimed(inner) for key, inner in value.items() if "seconds" not in key}
    if isinstance(value, list):
        return [untimed(inner) for inner in value]
    return value


def lines(path) -> list[dict]:
    """The rows of a .jsonl without times; every line has to be whole."""
    return [untimed(json.loads(line)) for line in path.read_text().splitlines()]


def flat(value, name="") -> dict:
    """Everything in a nested state under its own name, as bytes."""
    if isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        result = {}
        for key, inner in pairs:
            result |= flat(inner, f"{name}.{key}")
        return result
    if isinstance(value, torch.Tensor):
        raw = value.reshape(-1).view(torch.uint8).numpy().tobytes()
        return {name: (value.dtype, value.shape, raw)}
    return {name: value}


def newest(out_dir) -> Path:
    return max((out_dir / "checkpoints").glob("step-*"))


def left_by(out_dir) -> dict:
    """Metrics, rollouts and their images, the bytes of the weights, and all that is in the last
    checkpoint."""
    (weights,) = out_dir.glob("*.safetensors")
    left = {"metrics": lines(out_dir / "metrics.jsonl"), "weights": weights.read_bytes()}
    if (out_dir / "rollouts.jsonl").exists():
        left["rollouts"] = lines(out_dir / "rollouts.jsonl")
    for image in (out_dir / "images").glob("*"):
        left[f"images/{image.name}"] = image.read_bytes()
    state = torch.load(newest(out_dir) / "state.pt")
    state["metrics"] = untimed(state["metrics"])
    return left | flat(state, "state")


def assert_same(first, second) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


@pytest.fixture(scope="module")
def whole(run, place):
    """whole(run): what it leaves if nobody disturbs it."""
    made = {}

    def left(name):
        if name not in made:
            exitcode, log = run(name, place / f"whole_{name}", resume=False)
            assert exitcode == 0, log
            made[name] = left_by(place / f"whole_{name}")
            assert len(made[name]["metrics"]) == STEPS
        return made[name]

    return left


# Killed


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_again_and_again_is_the_run_that_nobody_disturbed(name, run, whole, place):
    """Pitfalls 52, 53: each life begins where the last one was killed."""
    lives = [
        ("as config.py is written", 1),
        ("as a turn is sampled", 2),
        ("between two updates", 2 * UPDATES + 2),  # so in the third step
        ("as a model is written", 1),
        ("as a state is written", 1),
        ("before a checkpoint is renamed", 1),
        ("after a checkpoint was renamed", 1),
        ("in a line of metrics", 1),
        ("before rollouts are written", 2),
        ("before a checkpoint", 2),
        ("as lines are dropped", 1),
        ("as an old one is removed", 1),
        ("as logprobs are computed", 3),
        ("as a model is written", 2),  # at the end: the first is the last checkpoint's
    ]
    if name == "sft":  # one update a step, and no rollouts
        lives = [life for life in lives if "turn" not in life[0] and "rollouts" not in life[0]]
        lives[1] = ("between two updates", 3)
    if name == "grpo_lora":
        lives = lives[1::2]  # what is written has other names, but is written alike
    out_dir, expected = place / f"killed_{name}", whole(name)
    for point, call in lives:
        exitcode, log = run(name, out_dir, point, call)
        assert exitcode == -signal.SIGKILL, f"{point}: {log}"
    exitcode, log = run(name, out_dir)
    assert exitcode == 0, log
    assert_same(expected, left_by(out_dir))


@pytest.mark.parametrize("name", RUNS)
def test_the_run_that_is_compared_with_has_moved_all_that_has_a_state(name, whole, place):
    """Pitfall 52: else the test above would compare little."""
    left, script = whole(name), RUNS[name][0]
    assert all(row["grad_norm"] > 0 for row in left["metrics"])
    assert len({row["learning_rate"] for row in left["metrics"]}) > STEPS / 2
    moments = [v for k, v in left.items() if ".exp_avg" in k or ".momentum_buffer" in k]
    assert moments and all(any(raw) for _, _, raw in moments)
    if script is train_grpo:
        assert left["state.cursor"] > STEPS * GRPO["prompts_per_step"]  # groups were replaced
        assert left["metrics"][-1]["kl"] > 0 and len(left["rollouts"]) == 2 * STEPS


@pytest.fixture(scope="module")
def pictures(place):
    """In the same folder: a tiny model that has learnt to call a tool which shows an image, and
    rows with images."""
    (place / "look.py").write_text(LOOK)
    rows, demos = [], []
    for number in range(8):
        eyes.picture(number, 40 + number, 40).save(place / f"{number}.png")
        question = {"role": "user", "content": "What is <image>?"}
        call = {"function": {"name": "look", "arguments": {}}}
        turns = [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "image 2:<image>"},
            {"role": "assistant", "content": f"It is {number}."},
        ]
        rows.append({"prompt": [question], "images": [f"{number}.png"], "answer": "4"})
        demos.append({"messages": [question, *turns], "images": 2 * [f"{number}.png"]})
    # a row without a picture among them
    rows.append({"prompt": "What?", "answer": "4"})
    for _ in range(4):
        answer = {"role": "assistant", "content": "Nothing."}
        demos.append({"messages": [{"role": "user", "content": "What?"}, answer]})
    for name, examples in (("pictures", rows), ("seen", demos)):
        text = "".join(json.dumps(example) + "\n" for example in examples)
        (place / f"{name}.jsonl").write_text(text)

    eyes.folder_of("qwen3_vl", place / "random_eyes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(run_page, "curves", lambda out_dir: None)
        warm = {"data": "seen.jsonl", "epochs": 20, "batch_size": 4, "warmup": 2, "save_every": 0}
        warm |= IMAGES | {"model": "random_eyes", "optimizer": "muon", "learning_rate": 1e-2}
        train_sft.train(train_sft.Config(**warm, out_dir="sees"))
    return place


@pytest.mark.parametrize("name", MIXED)
def test_a_run_of_a_mix_killed_again_and_again_is_the_run_that_nobody_disturbed(
    name, run, whole, place
):
    """Each source goes on where it was, by weight and in its own order; a curriculum with the pass
    rates that it had."""
    lives = [("between two updates", 3), ("as a state is written", 1), ("in a line of metrics", 2)]
    if name != "sft_mix":
        lives = [("as a turn is sampled", 3), *lives, ("before rollouts are written", 2)]
    out_dir, expected = place / f"killed_{name}", whole(name)
    for point, call in lives:
        exitcode, log = run(name, out_dir, point, call)
        assert exitcode == -signal.SIGKILL, f"{point}: {log}"
    exitcode, log = run(name, out_dir)
    assert exitcode == 0, log
    assert_same(expected, left_by(out_dir))

    # what was compared is of both sources
    last = expected["metrics"][-1]
    if name == "grpo_mix":
        assert {"one/accuracy", "two/accuracy", "two/reward_format"} <= last.keys()
        assert "val_one/accuracy" in expected["metrics"][0]
        assert all(
            row["one/rollouts"] + row["two/rollouts"] == 6 for row in expected["metrics"][:1]
        )
    elif name == "sft_mix":
        assert {"three/val_loss", "four/val_loss"} <= last.keys()
    else:
        shares = [row["rows_new"] for row in expected["metrics"]]
        assert shares[0] > 0.0 and shares[-1] == 0.0
        assert last["rows_hard"] + last["rows_fit"] + last["rows_easy"] == pytest.approx(1.0)


@pytest.mark.parametrize("name", SEEING)
def test_a_run_with_images_killed_five_times_is_the_run_that_nobody_disturbed(
    name, run, whole, pictures
):
    """Pitfall 52: of the prompt and of a tool, in rollouts, micro-batches and the folder."""
    lives = {
        "grpo_images": [
            ("as a turn is sampled", 3),
            ("as an image is written", 2),
            ("between two updates", 3),
            ("as a state is written", 1),
            ("before rollouts are written", 2),
        ],
        "sft_images": [
            ("as an image is written", 1),
            ("between two updates", 3),
            ("as a state is written", 1),
            ("in a line of metrics", 2),
            ("as logprobs are computed", 3),
        ],
    }
    out_dir, expected = pictures / f"killed_{name}", whole(name)
    for point, call in lives[name]:
        exitcode, log = run(name, out_dir, point, call)
        assert exitcode == -signal.SIGKILL, f"{point}: {log}"
    exitcode, log = run(name, out_dir)
    assert exitcode == 0, log
    assert_same(expected, left_by(out_dir))

    # what was compared has images, of a tool too, and learnt from them
    written = [image for row in expected["rollouts"] for image in row.get("images", ())]
    assert {f"images/{Path(image).name}" for image in written} <= expected.keys()
    assert any(len(row.get("images", ())) == 2 for row in expected["rollouts"])
    learnt = [row for row in expected["metrics"] if row["grad_norm"] > 0]
    assert len(learnt) > STEPS / 2


@pytest.mark.parametrize("name", [name for name in RUNS if "lora" not in name])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_that_is_told_to_stop_finishes_its_step_and_saves(
    name, number, start, run, whole, place
):
    """Pitfall 52: and ends with the exit code of the signal. B6: SIGHUP is a closed ssh."""
    out_dir = place / f"stopped_{name}_{number}"
    child = start(name, out_dir, "halt", 2, save_every=0)
    wait_for(place / "log", "halted")
    os.kill(child.pid, number)
    wait_for(place / "log", "finishing this step, then saving")
    (place / "go").touch()
    child.join(HANGS)
    assert child.exitcode == 128 + number
    done = len(lines(out_dir / "metrics.jsonl"))
    said = " ".join((place / "log").read_text().split())
    assert f"stopped after {done} of {STEPS} steps; go on with python " in said
    assert "Traceback" not in (place / "log").read_text()
    assert [path.name for path in (out_dir / "checkpoints").iterdir()] == [f"step-{done:06d}"]
    exitcode, log = run(name, out_dir)
    assert exitcode == 0 and f"going on with step {done}" in log
    assert_same(whole(name), left_by(out_dir))


def test_a_second_process_in_the_same_folder_is_refused(start, run, whole, place):
    """Pitfall 52: each would remove what the other writes. Whoever died holds no lock."""
    out_dir = place / "twice"
    child = start("grpo", out_dir, "halt", 2 * UPDATES + 2)
    wait_for(place / "log", "halted")
    before = (out_dir / "config.py").read_text()
    exitcode, log = run("grpo", out_dir, save_every=5)
    assert exitcode == 2 and f"out_dir '{out_dir}' is in use by another process: wait" in log
    assert (out_dir / "config.py").read_text() == before  # it is the other's
    os.kill(child.pid, signal.SIGKILL)
    child.join(HANGS)
    assert run("grpo", out_dir)[0] == 0
    assert_same(whole("grpo"), left_by(out_dir))


def test_a_run_that_is_told_twice_ends_at_once(start, run, whole, place):
    out_dir = place / "told_twice"
    child = start("grpo", out_dir, "halt", 2 * UPDATES + 2)
    wait_for(place / "log", "halted")
    for said in ("finishing this step, then saving", "interrupted"):
        os.kill(child.pid, signal.SIGINT)
        wait_for(place / "log", said)
    child.join(HANGS)
    assert child.exitcode == 130 and "Traceback" not in (place / "log").read_text()
    assert newest(out_dir).name == "step-000002"
    assert run("grpo", out_dir)[0] == 0
    assert_same(whole("grpo"), left_by(out_dir))


def wait_for(path, text: str) -> None:
    end = time.monotonic() + HANGS
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < end, f"nobody said {text!r}: {path.read_text()}"
        time.sleep(0.01)


def test_a_signal_between_saving_and_stopping_does_not_stop_an_unsaved_run(laid, monkeypatch):
    """One that comes after the question whether to save is for the next step."""
    run, parts = laid(save_every=100)
    run.restore(parts[0], parts[2])

    told = iter([None, signal.SIGTERM, signal.SIGTERM])  # what is read, one after the other

    class Late(Run):
        signal = property(lambda self: next(told))

    run.__class__ = Late
    run.after(1, 5, *parts)
    assert run.saved is None  # neither saved nor stopped
    with pytest.raises(SystemExit) as stopped:
        run.after(2, 5, *parts)
    assert run.saved == 2 and stopped.value.code == 128 + signal.SIGTERM


def test_a_signal_that_nohup_ignores_stays_ignored(laid):
    """B6: such a run is to outlive its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with laid()[0]:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_is_noted_though_its_terminal_is_gone(laid, monkeypatch):
    """B6: to write to it raises OSError, which would end the run unsaved."""

    class Gone:
        def write(self, text):
            raise OSError(5, "Input/output error")

    run, parts = laid(save_every=100)
    run.restore(parts[0], parts[2])
    monkeypatch.setattr(sys, "stderr", Gone())
    with run:
        os.kill(os.getpid(), signal.SIGHUP)
        assert run.signal == signal.SIGHUP
        with pytest.raises(SystemExit) as stopped:
            run.after(1, 5, *parts)
    assert run.saved == 1 and stopped.value.code == 128 + signal.SIGHUP


def test_the_command_that_goes_on_is_whole(here, tmp_path, monkeypatch):
    """D4: with all keys, out_dir among them, whatever the run was begun with."""
    out_dir = tmp_path / "a folder with 'quotes'"
    cfg = configured("grpo", out_dir)
    run = Run(cfg)
    config.save(cfg, out_dir / "config.py")
    python, script, *argv = shlex.split(run.command())
    assert python == "python" and Path(script).resolve() == Path(train_grpo.__file__)
    assert config.parse(train_grpo.Config, argv, train_grpo.check) == replace(cfg, resume=True)
    Run(replace(cfg, resume=True))  # nothing differs
    monkeypatch.chdir(Path(train_grpo.__file__).parent)
    assert run.command().startswith("python train_grpo.py --config ")
    (tmp_path / "sft").mkdir()
    sft = train_sft.Config(out_dir=f"{tmp_path}/sft")
    assert Run(sft).command().startswith("python train_sft.py --config ")


def test_of_the_engine_options_only_what_changes_the_samples_must_stay(tmp_path):
    """A timeout or the size of a cache may differ when a run goes on."""
    kinds = {"server": ("timeout=5",), "vllm": ("kv_cache_gib=2", "enforce_eager=true")}
    kinds["transformers"] = ("canary=false", "deterministic=true")
    for number, (engine, options) in enumerate(kinds.items()):
        out_dir = tmp_path / str(number)
        out_dir.mkdir()
        cfg = train_grpo.Config(out_dir=str(out_dir), engine=engine)
        config.save(cfg, out_dir / "config.py")
        Run(replace(cfg, engine_options=options, resume=True))
    with pytest.raises(UserError, match=r"^engine_options = .*, but the run in .* has \(\): give"):
        Run(replace(cfg, engine_options=("deterministic=false",), resume=True))


# Checkpoints: whole or not at all


def nudge(model, optimizers) -> None:
    """An update whose gradient comes from torch's generator."""
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)
    optim.step(model, optimizers, 1e-2, 1.0)


@pytest.fixture
def laid(here, tmp_path):
    """laid(key=value, …): (run, (model, tokenizer, optimizers, log)), nothing restored yet."""

    def lay(optimizer="adamw", keep_last=2, **options):
        cfg = replace(configured("grpo", tmp_path / "out"), **options)
        model, tokenizer = models.load(
            cfg.model,
            cfg.tune,
            cfg.dtype,
            "cpu",
            lora_r=cfg.lora_r,
            lora_alpha=cfg.lora_alpha,
            lora_targets=cfg.lora_targets,
        )
        optimizers = optim.optimizers(model, optimizer, cfg.learning_rate, 0.1)
        log = types.SimpleNamespace(sync=lambda: None, print=print)
        return Run(cfg, keep_last), (model, tokenizer, optimizers, log)

    return lay


def saved(laid, steps, **options):
    """(run, parts, the weights after each step) of a run that has saved these steps."""
    run, parts = laid(**options)
    run.restore(parts[0], parts[2])
    weights = {}
    for step in steps:
        nudge(parts[0], parts[2])
        run.save(step, *parts, cursor=10 * step)
        weights[step] = {k: v.clone() for k, v in parts[0].state_dict().items()}
    return run, parts, weights


def truncated(path) -> None:
    file = path / "state.pt"
    file.write_bytes(file.read_bytes()[:-100])


def flipped(path) -> None:
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def without_a_file(path) -> None:
    (path / "config.json").unlink()


def without_digests(path) -> None:
    (path / "digests.json").unlink()


def with_torn_digests(path) -> None:
    (path / "digests.json").write_text('{"state.pt": "')


def with_other_digests(path) -> None:
    (path / "digests.json").write_text("[]")


def with_empty_digests(path) -> None:
    (path / "digests.json").write_text("{}")
    (path / "state.pt").write_bytes(b"")


def with_digests_of_others(path) -> None:
    (path / "digests.json").write_text('{"config.json": null}')


def with_deep_digests(path) -> None:
    (path / "digests.json").write_text("[" * 100_000)


def with_a_text_as_digests(path) -> None:
    (path / "digests.json").write_text('"state.pt"')


DAMAGES = [with_empty_digests, with_digests_of_others, with_deep_digests, with_a_text_as_digests]
DAMAGES += [truncated, flipped, without_a_file, without_digests, with_torn_digests]
DAMAGES += [with_other_digests]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_checkpoint_is_used_where_later_ones_are_torn(damage, laid, capsys):
    """Pitfall 53, B9."""
    run, _, weights = saved(laid, (2, 4, 6), keep_last=3)
    for step in (4, 6):
        damage(run.folder / f"step-{step:06d}")
    run, (model, _, optimizers, _) = laid(resume=True)
    state = run.restore(model, optimizers)
    assert state == {"step": 2, "cursor": 20}
    assert all(torch.equal(v, weights[2][k]) for k, v in model.state_dict().items())
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("is damaged (" in line for line in said)
    assert "step-000006" in said[0] and "step-000004" in said[1]


def test_a_run_none_of_whose_checkpoints_is_whole_says_so(laid):
    """Pitfall 53: it does not begin again on its own, over what is there."""
    run, _, _ = saved(laid, (2, 4))
    for path in run.folder.iterdir():
        truncated(path)
    run, (model, _, optimizers, _) = laid(resume=True)
    with pytest.raises(UserError, match="none of the checkpoints in .* is whole: remove them"):
        run.restore(model, optimizers)


def test_what_was_being_written_is_removed_and_never_read(laid):
    """Pitfall 53: not even if it is complete but for its name."""
    run, _, _ = saved(laid, (2, 4))
    os.rename(run.folder / "step-000004", run.folder / "aside")
    run, (model, _, optimizers, _) = laid(resume=True)
    assert run.restore(model, optimizers)["step"] == 2
    assert [path.name for path in run.folder.iterdir()] == ["step-000002"]


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_last_few_checkpoints_are_kept(keep_last, laid):
    run, _, _ = saved(laid, (2, 4, 6, 8), keep_last=keep_last)
    kept = [f"step-{step:06d}" for step in (2, 4, 6, 8)][-keep_last:]
    assert sorted(path.name for path in run.folder.iterdir()) == kept


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_damaged_checkpoint_is_not_kept_in_place_of_a_whole_one(keep_last, laid):
    """Pitfall 53: after a fall back the next one may be older than those that are damaged."""
    run, _, _ = saved(laid, (2, 4, 6), keep_last=3)
    for step in (4, 6):
        truncated(run.folder / f"step-{step:06d}")
    run, parts = laid(resume=True, keep_last=keep_last)
    run.restore(parts[0], parts[2])
    run.save(3, *parts, cursor=30)
    kept = ["step-000002", "step-000003"][-keep_last:]
    assert sorted(path.name for path in run.folder.iterdir()) == kept
    run, (model, _, optimizers, _) = laid(resume=True)
    assert run.restore(model, optimizers)["step"] == 3


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_what_a_kill_did_not_remove_is_removed_when_the_run_goes_on(keep_last, laid, monkeypatch):
    """B9: killed between saving and removing, again and again, it kept them all."""
    with monkeypatch.context() as patched:
        patched.setattr(Run, "_remove_older", lambda run: None)
        saved(laid, (2, 4, 6, 8))
    run, parts = laid(resume=True, keep_last=keep_last)
    truncated(run.folder / "step-000008")
    assert run.restore(parts[0], parts[2])["step"] == 6
    kept = [f"step-{step:06d}" for step in (2, 4, 6)][-keep_last:]
    kept.append("step-000008")  # damaged: its owner may want to look at it
    assert sorted(path.name for path in run.folder.iterdir()) == kept
    run.save(7, *parts)
    assert "step-000008" not in [path.name for path in run.folder.iterdir()]


STARTS = {  # what a run leaves that ends before its first step is over
    "killed at once": (),
    "killed while it saved": ("checkpoints/aside/state.pt",),
    "an engine that failed": ("metrics.jsonl", "rollouts.jsonl", "report.html", "checkpoints/"),
    "with loggers": ("metrics.jsonl", "wandb_id.txt", "wandb/run/x", "tensorboard/events"),
}


def lay_out(folder, files) -> None:
    for name in files:
        place = folder / name
        if name.endswith("/"):
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text("" if name == "metrics.jsonl" else "x")


@pytest.mark.parametrize("script", [train_grpo, train_sft], ids=lambda script: script.__name__)
@pytest.mark.parametrize("name", STARTS)
def test_a_run_that_ended_before_its_first_step_does_not_block_its_folder(name, script, tmp_path):
    """B9: the same command begins again, and so does one with another key."""
    cfg = script.Config(out_dir=str(tmp_path / "out"))
    Run(cfg)
    config.save(cfg, tmp_path / "out" / "config.py")
    lay_out(tmp_path / "out", STARTS[name])
    Run(cfg)
    Run(replace(cfg, seed=3))


LEARNT = {  # what is not to be written over
    "a step": {"metrics.jsonl": '{"step": 0}\n'},
    "half a step": {"metrics.jsonl": '{"ste'},
    "a checkpoint": {"checkpoints/step-000002/state.pt": "x"},
    "a copy of one": {"checkpoints/good/state.pt": "x"},
    "a model": {"model.safetensors": "x"},
    "notes": {"notes.txt": "x"},
    "another script's": {"config.py": "seed = 1\n"},
    "no config of ours": {"config.py": "raise SystemExit('it was run')\n"},
    "a torn config": {"config.py": "seed = "},
}


@pytest.mark.parametrize("name", LEARNT)
def test_a_folder_with_more_than_a_start_is_refused_as_before(name, tmp_path):
    """B9: and no foreign file is executed to find that out."""
    cfg = train_grpo.Config(out_dir=str(tmp_path / "out"))
    Run(cfg)
    config.save(cfg, tmp_path / "out" / "config.py")
    for file, text in LEARNT[name].items():
        (tmp_path / "out" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / file).write_text(text)
    with pytest.raises(UserError, match="is not empty: give another with --out_dir="):
        Run(cfg)


@pytest.mark.parametrize(
    "name, file, old, new, says",
    [
        ("grpo_mix", "two.py", "tokens = 2", "tokens = 3", "two: max_new_tokens = 3, but .* has 2"),
        ("grpo_mix", "one.py", "coin", "coin:2", r"one: rewards = .*coin:2',\), but the run in"),
        ("grpo_mix", "rows.jsonl", "2 + 2", "2 + 9", "one: the file of its data has changed since"),
        ("sft_mix", "four.py", '"Hi"', '"Ho"', "four: system_prompt = 'Ho', but the run in .* has"),
        ("sft_mix", "three.py", "rows = 12", "rows = 14", "three: rows = 14, but the run in .* 12"),
    ],
)
def test_a_source_of_a_mix_that_has_changed_is_refused_at_a_resume(
    here, tmp_path, monkeypatch, name, file, old, new, says
):
    folder = tmp_path / "copy"
    shutil.copytree(here, folder, ignore=shutil.ignore_patterns("out*"))
    monkeypatch.chdir(folder)
    script = EVERY_RUN[name][0]
    steps = {} if name.startswith("sft") else {"steps": 2, "warmup": 1}
    cfg = configured(name, "again", save_every=2, **steps)
    script.train(cfg)
    path = folder / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=f"^{says}"):
        script.train(replace(cfg, resume=True))
    path.write_text(text)
    script.train(replace(cfg, resume=True))  # as it was, it goes on


def test_two_runs_that_begin_in_one_folder_do_not_mix(laid):
    """B9: the second has looked before the first was done, and is refused when it has its turn."""
    second, (model, _, optimizers, _) = laid()
    first, parts, _ = saved(laid, (2,))
    first.lock.close()
    with pytest.raises(UserError, match="was used by another run meanwhile"):
        second.restore(model, optimizers)
    assert [path.name for path in first.folder.iterdir()] == ["step-000002"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("what", ["open", "replace"])
def test_a_disk_that_takes_nothing_is_a_sentence_before_the_first_step(
    what, number, laid, monkeypatch
):
    """B9: a read-only disk was a traceback."""
    run, (model, _, optimizers, _) = laid()

    def refused(*_, **__):
        raise OSError(number, os.strerror(number))

    if what == "open":
        monkeypatch.setattr(checkpoint, "open", refused, raising=False)
    else:
        monkeypatch.setattr(config.os, "replace", refused)
    with pytest.raises(UserError, match=rf"cannot write to out_dir .*{os.strerror(number)}.*give"):
        run.restore(model, optimizers)


def test_a_copy_that_somebody_made_of_a_checkpoint_is_neither_read_nor_removed(laid):
    run, parts, _ = saved(laid, (2, 4))
    shutil.copytree(run.folder / "step-000002", run.folder / "step-000004.good")
    for step in (1_000_000, 1_000_001):  # a seventh digit changes no order
        run.save(step, *parts)
    kept = ["step-000004.good", "step-1000000", "step-1000001"]
    assert sorted(path.name for path in run.folder.iterdir()) == kept
    run, (model, _, optimizers, _) = laid(resume=True)
    assert run.restore(model, optimizers)["step"] == 1_000_001


@pytest.mark.parametrize(
    "tune, optimizer, dtype",
    [
        ("full", "adamw", "float32"),
        ("full", "adamw", "bfloat16"),
        ("full", "adamw8bit", "float32"),
        ("full", "muon", "float32"),
        ("lora", "adamw", "bfloat16"),
        ("qlora", "adamw8bit", "bfloat16"),
    ],
)
def test_every_optimizer_goes_on_bit_for_bit(tune, optimizer, dtype, laid):
    """Pitfall 52: full weights and adapters; the gradients come from torch's generator."""
    if "8bit" in optimizer or tune == "qlora":
        pytest.importorskip("bitsandbytes")
    options = {"tune": tune, "dtype": dtype}
    if tune != "full":
        options |= {"lora_r": 4, "lora_alpha": 8}
    run, (model, tokenizer, optimizers, log), _ = saved(laid, (2,), optimizer=optimizer, **options)
    for _ in range(3):
        nudge(model, optimizers)
    expected = flat([o.state_dict() for o in optimizers]) | flat(dict(model.named_parameters()))

    torch.manual_seed(99)
    run, (model, _, optimizers, _) = laid(optimizer=optimizer, resume=True, **options)
    run.restore(model, optimizers)
    for _ in range(3):
        nudge(model, optimizers)
    found = flat([o.state_dict() for o in optimizers]) | flat(dict(model.named_parameters()))
    assert_same(expected, found)


def drawn() -> list:
    return [
        random.random(),
        random.gauss(0, 1),
        numpy.random.rand(),
        numpy.random.randn(),
        torch.rand(2).tolist(),
        torch.randn(3).tolist(),
    ]


def test_the_generators_go_on_where_they_were(laid):
    """Pitfall 52: python's, numpy's and torch's; the half of a pair that is left over, too."""
    run, parts = laid()
    run.restore(parts[0], parts[2])
    first = drawn()
    run.save(1, *parts)
    then = drawn()
    run, (model, _, optimizers, _) = laid(resume=True)
    run.restore(model, optimizers)
    assert drawn() == then != first


def test_a_run_that_begins_again_begins_with_the_same_generators(laid, tmp_path):
    """Pitfall 52: it may have been killed before its first checkpoint. Another seed has others."""
    states = []
    for seed in (0, 0, 1):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        run, (model, _, optimizers, _) = laid(seed=seed)
        assert run.restore(model, optimizers) == {}
        states.append(drawn())
    assert states[0] == states[1] != states[2]


@pytest.mark.parametrize("name", [name for name in RUNS if "grpo" in name])
def test_a_checkpoint_is_a_model_that_loads_with_the_weights_it_was_saved_with(
    name, whole, here, tmp_path
):
    """It can be evaluated, and trained on, as the model that a run saves at its end."""
    whole(name)
    path = here / f"whole_{name}" / "checkpoints" / "step-000006"
    trained = torch.load(path / "state.pt")["weights"]
    size = {"lora_r": LORA["lora_r"], "lora_alpha": LORA["lora_alpha"]}
    model, tokenizer = models.load(str(path), "lora" if "lora" in name else "full", **size)
    found = {k: v for k, v in model.named_parameters() if v.requires_grad}
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[k], trained[k]) for k in found)
    last = torch.load(newest(here / f"whole_{name}") / "state.pt")["weights"]
    assert not any(torch.equal(last[k], trained[k]) for k in found)
    assert tokenizer.chat_template


# A full disk


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt"])
def test_a_full_disk_ends_a_run_in_a_sentence_and_nothing_saved_is_lost(file, run, whole, place):
    """Pitfall 53: whichever file is the one that does not fit."""
    expected = whole("grpo")
    size = (newest(place / "whole_grpo") / file).stat().st_size
    (place / "limit").write_text(str(size - 1))
    out_dir = place / f"full_{file}"
    exitcode, log = run("grpo", out_dir, "full disk", 2)
    assert exitcode == 2 and "Traceback" not in log, log
    (error,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert f"error: cannot save step 4 in {out_dir}/checkpoints (" in error
    assert error.endswith("make room and go on with --resume=true")
    assert [path.name for path in (out_dir / "checkpoints").iterdir()] == ["step-000002"]
    exitcode, log = run("grpo", out_dir)
    assert exitcode == 0 and "damaged" not in log
    assert_same(expected, left_by(out_dir))


def test_a_disk_that_is_really_full_does_so_too(run, whole, place, tmp_path):
    """Pitfall 53: where root may mount one of a megabyte."""
    expected = whole("grpo")
    size = sum(file.stat().st_size for file in newest(place / "whole_grpo").iterdir())
    disk = ["mount", "-t", "tmpfs", "-o"]
    mounted = os.getuid() == 0 and subprocess.run(
        [*disk, f"size={int(2.5 * size) + 100_000}", "tmpfs", tmp_path], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("this system lets us mount no disk")
    try:
        exitcode, log = run("grpo", tmp_path / "out")  # two fit, and a half of the third
        assert exitcode == 2 and "Traceback" not in log, log
        assert "error: cannot save step 6 in " in log and "No space left" in log
        names = [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()]
        assert sorted(names) == ["step-000002", "step-000004"]
        subprocess.run([*disk, "remount,size=100m", "tmpfs", tmp_path], check=True)
        exitcode, log = run("grpo", tmp_path / "out")
        assert exitcode == 0 and "going on with step 4" in log and "damaged" not in log
        assert_same(expected, left_by(tmp_path / "out"))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("writer", ["torch.save", "learning.model.save", "os.fsync", "os.rename"])
def test_whatever_fails_in_a_checkpoint_the_older_ones_stay(writer, laid, monkeypatch):
    """Pitfall 53: and once there is room, the same run can save."""
    run, parts, _ = saved(laid, (2, 4))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, _, name = writer.rpartition(".")
    with monkeypatch.context() as patch:
        patch.setattr(pkgutil.resolve_name(owner), name, full)
        with pytest.raises(UserError, match="cannot save step 6 in .*No space left on device"):
            run.save(6, *parts, cursor=60)
    assert sorted(path.name for path in run.folder.iterdir()) == ["step-000002", "step-000004"]
    assert not any(checkpoint.damage_of(path) for path in run.folder.iterdir())
    run.save(6, *parts, cursor=60)
    assert newest(run.out_dir).name == "step-000006"
    assert not checkpoint.damage_of(newest(run.out_dir))


def test_a_model_that_cannot_be_written_at_the_end_is_in_the_last_checkpoint(laid, monkeypatch):
    run, parts, _ = saved(laid, (2,))

    def full(*_, **__):
        raise RuntimeError("No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(models, "save", full)
        with pytest.raises(UserError, match="cannot save the model in .*No space left on device"):
            run.finish(*parts[:2])
    run, _ = laid(resume=True)
    run.finish(*parts[:2])
    assert_same(weights_in(run.out_dir), weights_in(newest(run.out_dir)))


def weights_in(folder) -> dict:
    model, _ = models.load(str(folder))
    return flat(dict(model.named_parameters()))


# What may be gone on with


def test_a_checkpoint_of_another_model_is_refused(here, laid):
    """Where the folder of the model now holds another one."""
    run, _, _ = saved(laid, (2,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "find", lambda name: "wider")
        run, (model, _, optimizers, _) = laid(resume=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    told = r"step-000002 is of another model: \S+ is \(\S+ \S+\) in this one and \(\S+ \S+\) there"
    with pytest.raises(UserError, match=told):
        run.restore(model, optimizers)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def other(value, kind):
    """Another value of a key's type."""
    if typing.get_origin(kind) is typing.Literal:
        return next(option for option in typing.get_args(kind) if option != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if value is None:
        return 3
    if isinstance(value, tuple):
        return (*value, "x")
    return f"{value}x"


@pytest.mark.parametrize("script", [train_grpo, train_sft], ids=lambda script: script.__name__)
def test_only_keys_that_change_nothing_that_is_learnt_may_change(script, tmp_path):
    """Pitfall 55: a run that went on with another learning rate would be neither the one nor the
    other. Every key there is."""
    cfg = script.Config(out_dir=str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    config.save(cfg, tmp_path / "out" / "config.py")
    free = set()
    for key, kind in typing.get_type_hints(script.Config).items():
        if key == "out_dir":
            continue
        value = other(getattr(cfg, key), kind)
        if key == "engine_options":  # of which the others may change: they are tested above
            value = ("deterministic=false",)
        changed = replace(cfg, **{"resume": True, key: value})
        if key in FREE:
            free.add(key)
            Run(replace(changed, resume=True))
            continue
        with pytest.raises(UserError, match=f"^{key} = .*, but the run in .* has .*: give that, "):
            Run(changed)
    assert {"resume", "save_every", "logger"} <= free
    assert not {"learning_rate", "seed", "data", "model", "tune", "dtype"} & free


def test_a_folder_that_was_moved_goes_on_where_it_is(here, laid, tmp_path):
    saved(laid, (2,))
    os.rename(tmp_path / "out", tmp_path / "moved")
    run, (model, _, optimizers, _) = laid(resume=True, out_dir=str(tmp_path / "moved"))
    assert run.restore(model, optimizers)["step"] == 2


def test_a_run_goes_on_for_more_steps_than_it_began_with(here, whole):
    """Pitfall 52: as if it had been begun with them, where the schedule does not depend on them."""
    options = {"schedule": "constant", "save_every": 0, "warmup": 1}
    short = configured("grpo", here / "extended", **options, steps=2)
    train_grpo.train(short)
    with pytest.raises(UserError, match="is not empty: .*, or go on with --resume=true"):
        train_grpo.train(replace(short, steps=4))
    train_grpo.train(replace(short, steps=4, resume=True))
    long = configured("grpo", here / "long", **options, steps=4)
    train_grpo.train(long)
    assert_same(left_by(here / "long"), left_by(here / "extended"))
    saved_as = config.parse(train_grpo.Config, ["--config", str(here / "extended" / "config.py")])
    assert saved_as == replace(long, out_dir=str(here / "extended"))


def test_a_run_that_is_finished_stays_as_it_is(here, whole):
    whole("grpo")
    shutil.copytree(here / "whole_grpo", here / "finished")

    def files():
        found = [p for p in (here / "finished").rglob("*") if p.is_file() and p.suffix != ".html"]
        return {str(path): path.read_bytes() for path in found}

    cfg = configured("grpo", here / "finished", resume=True)
    config.save(replace(cfg, resume=False), here / "finished" / "config.py")
    before = files()
    for _ in range(2):
        assert train_grpo.train(cfg)["step"] == STEPS - 1
        assert files() == before


def test_a_finished_run_without_its_checkpoints_is_not_begun_again(here, whole):
    """Nothing is left to go on from, and its metrics and weights would be written over."""
    whole("grpo")
    shutil.copytree(here / "whole_grpo", here / "cleared")
    shutil.rmtree(here / "cleared" / "checkpoints")
    before = (here / "cleared" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="cleared.* no checkpoint"):
        train_grpo.train(configured("grpo", here / "cleared", resume=True))
    assert (here / "cleared" / "metrics.jsonl").read_bytes() == before


def test_a_folder_of_something_else_is_not_gone_on_with(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty: give another") as error:
        Run(train_grpo.Config(out_dir=str(tmp_path), resume=True))
    assert "resume" not in str(error.value)  # it was given


# Rewards that break


def test_a_reward_that_raises_costs_nothing_and_repaired_the_run_is_the_same(here, whole):
    """Pitfall 42: the steps that were done are saved, whatever save_every says."""
    expected = whole("grpo")
    file = here / "broken_rewards.py"
    cfg = configured("grpo", here / "raised", resume=True, save_every=0)
    rewards = ("broken_rewards.py:coin",)
    row = mix.next_rows(4, [{"id": i} for i in range(5)], 1, cfg.seed)[0]["id"]
    prompt = lines(here / "rows.jsonl")[row]["prompt"]
    file.write_text(REWARD.replace("return", f"assert example['prompt'] != {prompt!r}\n    return"))
    with pytest.raises(UserError, match=f"^reward coin failed on row {row + 1}: AssertionError"):
        train_grpo.train(replace(cfg, rewards=rewards))
    done = len(lines(here / "raised" / "metrics.jsonl"))
    assert 0 < done < STEPS
    assert [p.name for p in (here / "raised" / "checkpoints").iterdir()] == [f"step-{done:06d}"]
    file.write_text(REWARD)
    train_grpo.train(replace(cfg, rewards=rewards))
    assert_same(expected, left_by(here / "raised"))


@pytest.mark.parametrize("value", ["None", "float('nan')", "float('inf')"])
def test_a_run_goes_on_with_rewards_that_are_missing(value, here):
    """Pitfall 23: some of a group, all of one, or all there are; they are counted."""
    file = here / f"missing_{value[-5:-2]}.py"
    text = "def coin(t, example):\n    {}\n    return float(sum(t.ids) % 3 == 0)\n"
    found = {}
    for name, test in (("some", "t.sample == 0"), ("one", "t.group == 0"), ("all", "True")):
        file.write_text(text.format(f"if {test}: return {value}"))
        out_dir = here / f"missing_{value[-5:-2]}_{name}"
        options = {
            "rewards": (f"{file}:coin",),
            "steps": 2,
            "warmup": 1,
            "beta": 0.0,
        }
        last = train_grpo.train(configured("grpo", out_dir, **options))
        model, _ = models.load(str(out_dir))
        assert all(p.isfinite().all() for p in model.parameters())
        assert all(map(math.isfinite, (v for v in last.values() if isinstance(v, float))))
        found[name] = last
    assert 0 < found["some"]["reward_none"] < found["some"]["rollouts"]
    assert found["all"]["reward_none"] == found["all"]["rollouts"]
    assert found["all"]["trained_share"] == found["all"]["grad_norm"] == 0


def test_a_run_goes_on_with_completions_that_are_empty(here, monkeypatch):
    """Pitfall 27: nothing was sampled, or nothing but the end of the turn."""
    real = local.TransformersEngine.generate

    async def some(self, ids, images, sampling):
        out = await real(self, ids, images, sampling)
        if sampling.seed % 3 < 2:  # an empty one, or one with the stop token alone
            size = sampling.seed % 3
            out = replace(out, ids=[2][:size], logprobs=[-6.0][:size], finish="stop")
        return out

    monkeypatch.setattr(local.TransformersEngine, "generate", some)
    last = train_grpo.train(configured("grpo", here / "empty", steps=3))
    rows = lines(here / "empty" / "rollouts.jsonl")
    assert {0, 1} <= {sum(row["mask"]) for row in rows}
    assert last["grad_norm"] > 0 and last["new_tokens"] < 2
    model, _ = models.load(str(here / "empty"))
    assert all(p.isfinite().all() for p in model.parameters())


# Rescue


def test_what_raises_between_updates_saves_the_steps_that_are_done(laid, capsys):
    run, parts, _ = saved(laid, (2, 4), keep_last=2)
    nudge(parts[0], parts[2])
    with pytest.raises(UserError, match="the judge is ill"):
        with run.rescue(5, *parts, cursor=50):
            raise UserError("the judge is ill")
    names = ["step-000002", "step-000004", "step-000005"]  # more than keep_last: none is removed
    assert sorted(path.name for path in run.folder.iterdir()) == names
    said = capsys.readouterr().out
    assert "saved 5 steps; go on with python " in said and "--resume=true" in said
    run, (model, _, optimizers, _) = laid(resume=True)
    assert run.restore(model, optimizers) == {"step": 5, "cursor": 50}
    assert_same(flat(parts[0].state_dict()), flat(model.state_dict()))


def test_a_step_that_is_saved_is_not_written_again(laid):
    """Not even if the run that goes on from it meets the same error at once."""
    saved(laid, (2, 4))
    run, parts = laid(resume=True)
    run.restore(parts[0], parts[2])
    before = newest(run.out_dir).stat().st_ino
    with pytest.raises(UserError, match="the judge is ill"):
        with run.rescue(4, *parts, cursor=40):
            raise UserError("the judge is ill")
    run.after(4, 8, *parts, cursor=40)
    assert newest(run.out_dir).stat().st_ino == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_numbers_are_not_saved(value, laid):
    run, parts, _ = saved(laid, (2, 4))
    with torch.no_grad():
        next(parts[0].parameters())[0, 0] = value
    with pytest.raises(RuntimeError, match="logits are NaN"):
        with run.rescue(5, *parts):
            raise RuntimeError("logits are NaN")
    assert sorted(path.name for path in run.folder.iterdir()) == ["step-000002", "step-000004"]


def test_nothing_is_saved_before_the_first_step_nor_when_all_goes_well(laid):
    run, parts = laid()
    run.restore(parts[0], parts[2])
    with pytest.raises(ValueError, match="at once"):
        with run.rescue(0, *parts):
            raise ValueError("at once")
    with run.rescue(1, *parts):
        pass
    assert not run.folder.exists()

"""Several processes learn what one learns (learning/parallel.py): on this machine's CPU, by gloo.

    pytest tests/test_parallel.py

Pinned here: metrics to the digits that are printed and weights to 2e-6 with 2 and 4 ranks of ddp,
fsdp and deepspeed, with a reference, off-policy updates, groups that are replaced, adapters, 4
bits, held-out rows; a kill and a resume change no bit; a checkpoint of 2 ranks goes on with 4, 1 or
none; what fails on one rank ends all, with one sentence; what is wrong in silence (tests/ways.py).
Ranks are forked from a process that has imported everything.
"""

import importlib.util
import itertools
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from multiprocessing import forkserver
from types import SimpleNamespace

import pytest
import torch
import ways
from safetensors.torch import load_file
from test_resume import (  # fixtures are found by their names
    EVERY_RUN,
    HANGS,
    LOOK,
    UPDATES,
    assert_same,
    command,
    configured,
    left_by,
    lines,
    newest,
    nursery,
    pictures,
    place,
    wait_for,
)
from until import until

import train_grpo
from images import Picture
from learning import logprobs, parallel
from run import config
from run.config import UserError

FAR = 2e-6  # how far weights may be from those of one process: they are sums in another order
BUDGET = {"token_budget": 60}  # small, so that there are more micro-batches than ranks
SHORT = {"steps": 5, "save_every": 0}  # where nothing is killed; each checkpoint takes its time
KINDS = ["ddp", "fsdp", "deepspeed"]
WITHOUT_HELD_OUT = {"eval_every": 0, "eval_data": "", "eval_rows": 128}
ADAMW = {"optimizer": "adamw", "learning_rate": 1e-3, "save_every": 0}
# of roundings alone: rows are sampled and learnt from beside other ones
NOISE = {"sampler_logprob_diff", "sampler_logprob_diff_p95", "sampler_logprob_diff_max"}
NOISE |= {"mismatch_kl", "canary"}
NAMES = itertools.count()
KILLS = [  # (where, at which call, of which rank): each begins where the one before was killed
    ("as a turn is sampled", 2, 1),
    ("between two updates", 2 * UPDATES + 2, 0),
    ("as a state is written", 1, 0),
    ("before a checkpoint is renamed", 1, 0),
    ("after a checkpoint was renamed", 1, 0),
    ("in a line of metrics", 1, 0),
    ("before a checkpoint", 2, 1),
    ("between two updates", 3, 1),
    ("as an old one is removed", 1, 0),
    ("as logprobs are computed", 3, 1),
]
FEW = KILLS[1:3] + KILLS[6:7]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ranks_of(size: int) -> list[dict]:
    """The environments of so many ranks on this machine."""
    port = str(free_port())
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def as_rank(environment: dict, script, argv, folder, point, call) -> None:
    """What test_resume.command does, as one of several ranks."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    if point == "no sum":
        parallel._all_reduce = lambda parameters: None
        point = ""
    if point == "no memory":
        logprobs.token_logprobs = no_memory
        point = ""
    command(script, argv, folder, point, call)


def no_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.fixture(scope="module")
def begin(nursery, place):
    """begin(run, size, kind, out_dir, point, call, rank, …): the processes of the ranks, running.
    At that call of the point something happens to that rank."""
    children = []

    def start(name, size, kind, out_dir, point="", call=1, rank=0, every_rank=False, **options):
        cfg = configured(name, out_dir, resume=True, **BUDGET | options)
        if size > 1:
            cfg = replace(cfg, parallel=kind)
        config.save(cfg, f"{place}/{out_dir}.py")
        argv = ["--config", f"{place}/{out_dir}.py"]
        (place / "log").unlink(missing_ok=True)
        mine = []
        for number, environment in enumerate(ranks_of(size) if size > 1 else [{}]):
            what = (point, call) if every_rank or number == rank else ("", 1)
            script = EVERY_RUN[name][0].__name__
            arguments = (environment, script, argv, str(place), *what)
            child = nursery.Process(target=as_rank, args=arguments)
            child.start()
            mine.append(child)
        children.extend(mine)
        return mine

    yield start
    for child in children:
        child.kill()
        child.join()


@pytest.fixture(scope="module")
def ranks(begin, place):
    """ranks(…) as begin(…), to their end: (exit codes, what was printed)."""

    def to_the_end(*args, **options):
        started = begin(*args, **options)
        for child in started:
            child.join(HANGS)
        return [child.exitcode for child in started], (place / "log").read_text()

    return to_the_end


@pytest.fixture(scope="module")
def alone(ranks, place):
    """alone(run): the out_dir of one process."""
    made = {}

    def out_dir(name, **options):
        key = (name, *sorted(options.items()))
        if key not in made:
            folder = f"alone{len(made)}"
            codes, said = ranks(name, 1, "none", folder, **options)
            assert codes == [0], said
            made[key] = place / folder
        return made[key]

    return out_dir


def weights(out_dir) -> dict:
    (file,) = out_dir.glob("*.safetensors")
    return load_file(file)


def assert_learnt_alike(first, second, far=FAR, relative=2e-4, noise=5e-5) -> None:
    """Metrics to `relative` or a rounding, weights to `far`."""
    ours = lines(first / "metrics.jsonl")
    theirs = lines(second / "metrics.jsonl")
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for name in NOISE & mine.keys():
            assert max(mine.pop(name), other.pop(name)) < noise, name
        assert mine == pytest.approx(other, rel=relative, abs=2e-6)
    ours = weights(first)
    theirs = weights(second)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= far, name


# -- --gpus=N: interpreters, first of all, while a process to fork from imports everything


@pytest.fixture(scope="module", autouse=True)
def begun(nursery):
    forkserver.ensure_running()


# What a launcher sees of a script, without the seconds in which three of them import it.
RANK = """
import sys
import time

sys.path.insert(0, sys.argv[1])
from learning import parallel
from run import config


def train(_):
    if parallel.must_launch(2):
        parallel.launch(2)
    with parallel.started("ddp"):
        while True:
            parallel.total({"steps": 1})
            if parallel.is_first():
                with open(sys.argv[2], "a") as file:
                    print("one more", file=file)
            time.sleep(0.01)


config.main(train)
"""


def launch_ranks(place, file):
    """Two ranks that do nothing but wait for each other, and write to the file."""
    (place / "rank.py").write_text(RANK)
    return started(place, "rank.py", str(config.HERE), file)


def started(place, *command):
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # or Ctrl-C would be these tests' too
        text=True,
    )


def children_of(pid: int) -> list[int]:
    """The processes that one has started: the ranks, in order."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def is_there(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def has_lines(file, count: int) -> bool:
    return file.exists() and len(file.read_text().splitlines()) >= count


@pytest.fixture
def launched(place):
    """launched(launch, …): a process that a user starts, whose ranks end with it."""
    processes = []

    def start(launch, *args, **options):
        process = launch(place, *args, **options)
        processes.append(process)
        return process

    yield start
    for process in processes:  # where a test failed
        process.kill()
        process.wait()
        process.stdout.close()


def ranks_at_work(launched, out_dir, lines):
    """Starts a launcher, and waits until its ranks have written so many lines of metrics. Returns
    its process, and the pids of its ranks."""
    process = launched(launch_ranks, out_dir.name)
    assert until(lambda: has_lines(out_dir, lines) or process.poll(), HANGS)
    assert process.poll() is None, process.stdout.read()
    return process, children_of(process.pid)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc here")
def test_a_rank_that_is_killed_is_named_and_none_is_left(launched, place):
    process, ranks = ranks_at_work(launched, place / "gone", 2)
    os.kill(ranks[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=HANGS)
    assert process.returncode == 128 + signal.SIGKILL
    assert errors_in(said) == {"error: rank 1 of 2 was ended by SIGKILL; the others are ended"}
    assert not any(is_there(pid) for pid in ranks)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc here")
def test_a_launcher_that_is_killed_leaves_nobody(launched, place):
    process, ranks = ranks_at_work(launched, place / "left", 1)
    process.kill()
    process.wait()
    assert until(lambda: not any(is_there(pid) for pid in ranks))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc here")
def test_ctrl_c_is_passed_on_to_all_ranks(launched, place):
    """By a command line, each rank an interpreter of its own."""
    process, children = ranks_at_work(launched, place / "interrupted", 2)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=HANGS)
    assert process.returncode == 130, said
    assert "Traceback" not in said and said.count("interrupted") == 1, said
    assert len(children) == 2 and not any(is_there(pid) for pid in children)


# -- ranks that learn what one process learns


@pytest.fixture(scope="module")
def two_ranks(ranks, place):
    """two_ranks(kind): the out_dir of "grpo" on 2 ranks, and what was printed."""
    made = {}

    def out_dir(kind):
        if kind not in made:
            codes, said = ranks("grpo", 2, kind, f"{kind}2")
            assert codes == [0, 0], said
            made[kind] = said
        return place / f"{kind}2", made[kind]

    return out_dir


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_learn_what_one_learns(two_ranks, alone, kind):
    out_dir, said = two_ranks(kind)
    assert said.count("step    7") == 1, "one of them prints"
    assert_learnt_alike(out_dir, alone("grpo"))
    recorded = lines(out_dir / "rollouts.jsonl")
    others = lines(alone("grpo") / "rollouts.jsonl")
    assert [row["ids"] for row in recorded] == [row["ids"] for row in others]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, size, options", [("grpo_lora", 2, SHORT), ("sft", 4, ADAMW)])
def test_adapters_and_demonstrations(ranks, alone, place, name, size, options, kind):
    codes, said = ranks(name, size, kind, f"{kind}-{name}", **options)
    assert codes == [0] * size, said
    assert_learnt_alike(place / f"{kind}-{name}", alone(name, **options))


BY_TURN = """
def by_turn(trajectory, example):
    return [float(sum(trajectory.ids) % 2)] * len(trajectory.turn_starts)
"""
CHECKPOINTING = {"gradient_checkpointing": True, "turn_credit": True, "steps": 3, "save_every": 0}
CHECKPOINTING |= {"rewards": ("my_rewards.py:coin", "by_turn.py:by_turn")}
QLORA = {"tune": "qlora", "dtype": "bfloat16"}
MIXED = ("grpo", {"dtype": "mixed"} | CHECKPOINTING, 5e-3)
BFLOAT16 = ("sft", {"dtype": "bfloat16"} | ADAMW, 8e-3)
FOUR_BITS = ("grpo_lora", QLORA | CHECKPOINTING, 1e-6)


@pytest.mark.parametrize(
    "kind, variant, only",
    [
        ("fsdp", MIXED, {}),
        ("deepspeed", MIXED, {}),
        ("ddp", BFLOAT16, {}),
        ("fsdp", BFLOAT16, {"offload": True}),
        ("deepspeed", BFLOAT16, {}),
        ("fsdp", FOUR_BITS, {"offload": True}),
        ("deepspeed", FOUR_BITS, {}),
    ],
)
def test_other_dtypes(ranks, alone, place, kind, variant, only):
    """Behind the first update weights differ by 1e-8, which bfloat16 rounds to 0.4 % now and then;
    of adapters in float32 on 4 bits, roundings are those of float32."""
    (place / "by_turn.py").write_text(BY_TURN)
    name, options, far = variant
    out_dir = f"{kind}-{next(NAMES)}"
    codes, said = ranks(name, 2, kind, out_dir, **options | only)
    assert codes == [0, 0], said
    assert_learnt_alike(place / out_dir, alone(name, **options), far, relative=1e-2, noise=0.05)


def test_the_gradient_of_one_rank_alone_would_be_seen(ranks, alone, place):
    """That these tests can fail: without the sum each rank goes its own way."""
    codes, said = ranks("sft", 2, "ddp", "unsummed", "no sum", every_rank=True, **ADAMW)
    assert codes == [0, 0], said
    with pytest.raises(AssertionError):
        assert_learnt_alike(place / "unsummed", alone("sft", **ADAMW))


@pytest.mark.parametrize("name, options", [("grpo_mix", {}), ("sft_mix", ADAMW)])
def test_a_mix_draws_on_two_ranks_the_rows_that_one_process_draws(
    ranks, alone, place, name, options
):
    folder = place / f"two_{name}"
    codes, said = ranks(name, 2, "ddp", folder.name, **options)
    assert codes == [0, 0], said
    assert_learnt_alike(alone(name, **options), folder)
    drawn = []
    for out_dir in (alone(name, **options), folder):
        rows = lines(out_dir / "rollouts.jsonl")
        drawn.append([(row["step"], row.get("source"), row["ids"]) for row in rows])
    assert drawn[0] == drawn[1] and len(drawn[0]) > 2
    if name == "grpo_mix":
        assert {source for _, source, _ in drawn[0]} == {"one", "two"}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_with_muon_several_processes_learn_the_very_bits_of_one(ranks, alone, place, kind):
    """It multiplies in bfloat16, where a last bit of the gradient would become 0.4 % of an update:
    so gradients are added up in float64, and rounded behind the last rank's."""
    codes, said = ranks("sft", 2, kind, f"{kind}-muon")
    assert codes == [0, 0], said
    assert_learnt_alike(place / f"{kind}-muon", alone("sft"), far=0.0)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("grpo_images", "ddp"),
        ("grpo_images", "fsdp"),
        ("sft_images", "fsdp"),
        ("sft_images", "deepspeed"),
    ],
)
def test_several_processes_learn_from_images_what_one_learns(
    ranks,
    alone,
    pictures,
    name,
    kind,
):
    """Each rank makes the pixels of the others' images anew."""
    options = {"optimizer": "adamw", "token_budget": 400, "save_every": 0}
    if name == "grpo_images":
        options |= SHORT
    codes, said = ranks(name, 2, kind, f"{kind}-{name}", **options)
    assert codes == [0, 0], said
    one = alone(name, **options)
    assert_learnt_alike(pictures / f"{kind}-{name}", one)
    recorded = lines(one / "rollouts.jsonl")
    others = lines(pictures / f"{kind}-{name}" / "rollouts.jsonl")
    for mine, other in zip(recorded, others, strict=True):
        assert mine["ids"] == other["ids"]
        assert mine.get("images") == other.get("images")
    assert any(len(row.get("images", ())) == 2 for row in recorded)


@pytest.mark.parametrize("are_kept", [True, False])
def test_a_batch_is_cut_alike_whoever_has_seen_which_images(monkeypatch, are_kept):
    """Else one rank would learn from what another learns from too, and none from something else;
    and one process, which has seen all of them, would compute with other micro-batches."""
    monkeypatch.setattr(train_grpo, "shares_prompts", lambda model: False)
    monkeypatch.setattr(train_grpo, "keeps_pictures", lambda model: are_kept)
    trajectories = []
    for number in range(4):
        picture = Picture(None, placeholder=5, tokens=2, patches=8, key=number + 1)
        rows = {"ids": [1, 5, 5, 7, 8, 9], "mask": [0, 0, 0, 1, 1, 1], "images": [picture]}
        trajectories.append(SimpleNamespace(**rows))
    before = train_grpo.batches(None, trajectories, 40)
    assert len(before) == (1 if are_kept else 2), "what is kept takes no room"
    trajectories[0].images[0].seen = "by this rank"
    assert train_grpo.batches(None, trajectories, 40) == before


# -- ways that are wrong, and nobody is told


@pytest.fixture(scope="module")
def found(nursery, place):
    """What came out of each way in tests/ways.py."""
    children = []
    for environment in ranks_of(ways.RANKS):
        child = nursery.Process(target=ways.as_rank, args=(environment, str(place)))
        child.start()
        children.append(child)
    for child in children:
        child.join(HANGS)
    assert [child.exitcode for child in children] == [0, 0]
    return json.loads((place / "found.json").read_text())


@pytest.mark.parametrize("name", ["ddp", "fsdp", "deepspeed"])
def test_ours_is_the_update_of_one_process(found, name):
    assert found[name] < 1e-6


@pytest.mark.parametrize(
    "name, least",
    [
        ("decoder and head as two roots", 0.1),
        ("optimizer made while together", 0.99),
    ],
)
def test_other_ways_are_wrong_without_an_error(found, name, least):
    assert found[name] > least


def test_deepspeeds_own_loop_is_the_update_of_one_process(found):
    """That what is compared with it is set up rightly."""
    assert found["stage 1 as documented"] < 1e-6


@pytest.mark.parametrize(
    "name, error",
    [
        ("stage 2 in our loop", "has already been reduced"),
        ("stage 3", "size mismatch"),
        ("scored in shards", "mixed torch.Tensor and DTensor"),
    ],
)
def test_other_ways_are_wrong_with_an_error(found, name, error):
    """In loops that let them pass they are wrong in silence; here they are not gone at all."""
    assert error in found[name]


def test_deepspeed_tells_of_a_gradient_that_is_not_finite(found):
    """optim.step then ends the run before a step: DeepSpeed's own goes on without one."""
    assert found["norm of nan"] == float("inf")


def test_deepspeed_goes_on_from_one_process_whose_weights_had_not_all_a_gradient(found):
    assert found["without a gradient"] == 0.0


def test_fsdp_cuts_weights_of_four_bits_and_offload_takes_them_to_the_cpu(found):
    assert found["four bits"]["share"] == 1 / ways.RANKS
    assert all(found["four bits"]["offloaded"])


# -- killed, stopped, gone on


@pytest.mark.parametrize("kind, kills", [("ddp", KILLS), ("fsdp", FEW), ("deepspeed", FEW)])
def test_a_killed_run_goes_on_bit_for_bit(ranks, two_ranks, place, kind, kills):
    """Pitfall 52: ten kills, of either rank; the other one then ends by itself. What the kinds have
    of their own is how a state is put together and cut."""
    undisturbed, _ = two_ranks(kind)
    out_dir = f"killed-{kind}"
    for point, call, rank in kills:
        codes, said = ranks("grpo", 2, kind, out_dir, point, call, rank)
        assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, parallel.LOST), said
        assert f"rank {1 - rank} has lost the others" in said
    codes, said = ranks("grpo", 2, kind, out_dir)
    assert codes == [0, 0], said
    assert_same(left_by(place / out_dir), left_by(undisturbed))


@pytest.mark.parametrize("kind, kind_then", [("fsdp", "fsdp"), ("ddp", "deepspeed")])
def test_another_number_of_ranks_goes_on(ranks, alone, place, kind, kind_then):
    """2 -> 4 -> 1, each killed behind a checkpoint of its own."""
    out_dir = f"{kind}-2-4-1"
    for size, kind_now in ((2, kind), (4, kind_then)):
        codes, said = ranks("grpo", size, kind_now, out_dir, "before a checkpoint", 3)
        assert -signal.SIGKILL in codes, said
    assert "going on with step 2" in said and newest(place / out_dir).name == "step-000004"
    codes, said = ranks("grpo", 1, "none", out_dir)
    assert codes == [0] and "going on with step 4" in said, said
    assert_learnt_alike(place / out_dir, alone("grpo"))


# -- what fails on one of them


def errors_in(said: str) -> set[str]:
    """The sentences of all ranks, each once."""
    assert "Traceback" not in said, said
    return {line for line in said.splitlines() if line.startswith("error: ")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_that_raises_on_one_rank_ends_all_and_what_was_learnt_is_saved(ranks, place, kind):
    broken = (
        "import os\n\ncalls = []\n\ndef coin(trajectory, example):\n    calls.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(calls) > 12:\n"
        "        raise KeyError('unit')\n    return float(sum(trajectory.ids) % 3 == 0)\n"
    )
    (place / "broken.py").write_text(broken)
    options = {"rewards": ("broken.py:coin",), "save_every": 0} | WITHOUT_HELD_OUT
    out_dir = f"raises-{kind}"
    codes, said = ranks("grpo", 2, kind, out_dir, **options)
    assert 0 not in codes
    assert "rank 1: " in said and "KeyError" in said, said
    (saved,) = (place / out_dir / "checkpoints").iterdir()
    steps = len(lines(place / out_dir / "metrics.jsonl"))
    assert steps >= 1
    assert saved.name == f"step-{steps:06d}"


BROKEN_LOOK = LOOK.replace(
    "        picture = self",
    "        if os.environ['RANK'] == '1' and os.path.getsize(METRICS):\n"
    "            raise ERROR('the lens is dirty')\n"
    "        picture = self",
)


def with_broken_look(place, out_dir: str, error: str) -> dict:
    """Options of a run whose tool raises, on rank 1 and behind the first step."""
    file = f"{error}_{out_dir.replace('-', '_')}.py"
    head = f"import os\n\nfrom run.config import UserError\n\nERROR = {error}\n"
    (place / file).write_text(f"{head}METRICS = '{out_dir}/metrics.jsonl'\n{BROKEN_LOOK}")
    options = {"tools": (f"{file}:look",), "token_budget": 400}
    return options | {"steps": 3, "save_every": 0} | WITHOUT_HELD_OUT


def test_a_tool_that_raises_on_one_rank_tells_the_model_so(ranks, pictures):
    """As with one process: that is an observation, and the run goes on."""
    options = with_broken_look(pictures, "tool-raises", "ValueError")
    codes, said = ranks("grpo_images", 2, "ddp", "tool-raises", **options)
    assert codes == [0, 0], said
    metrics = lines(pictures / "tool-raises" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2]
    errors = [row.get("tool_errors_exception", 0) for row in metrics]
    # not every row has an image to look at, so in one step rank 1 may call nothing
    assert errors[0] == 0 and sum(errors) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_tool_that_says_the_run_is_wrong_ends_all_ranks(ranks, pictures, kind):
    """A UserError of a tool is one of the run's configuration, whichever rank meets it."""
    out_dir = f"tool-ends-{kind}"
    options = with_broken_look(pictures, out_dir, "UserError")
    codes, said = ranks("grpo_images", 2, kind, out_dir, **options)
    assert codes == [2, 2], said
    assert errors_in(said) == {"error: rank 1: the lens is dirty", "error: the lens is dirty"}
    (saved,) = (pictures / out_dir / "checkpoints").iterdir()
    assert saved.name == f"step-{len(lines(pictures / out_dir / 'metrics.jsonl')):06d}"


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_without_memory_ends_all_with_what_to_lower(ranks, kind):
    codes, said = ranks("grpo", 2, kind, f"memory-{kind}", "no memory", rank=1)
    assert codes == [2, 2]
    for error in errors_in(said):
        assert error.startswith("error: out of memory: lower token_budget, max_tokens, group_size")
    assert "rank 1: CUDA out of memory." in said


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_ends_all_ranks_and_nothing_saved_is_lost(ranks, alone, place, kind):
    (place / "limit").write_text("30000")
    out_dir = f"full-{kind}"
    codes, said = ranks("grpo", 2, kind, out_dir, "full disk", 2)
    assert codes == [2, 2], said
    (error,) = errors_in(said)
    assert error.startswith(f"error: cannot save step 4 in {out_dir}/checkpoints (")
    names = [path.name for path in (place / out_dir / "checkpoints").iterdir()]
    assert names == ["step-000002"]
    if kind != "ddp":  # to go on with it is the same for all
        return
    codes, said = ranks("grpo", 2, kind, out_dir)
    assert codes == [0, 0], said
    assert_learnt_alike(place / out_dir, alone("grpo"))


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_are_told_to_stop_stop_at_the_same_step(begin, ranks, alone, place, kind):
    """A signal reaches one rank a step sooner than another, or one alone."""
    (place / "go").unlink(missing_ok=True)
    out_dir = f"stopped-{kind}"
    halt = ("halt", 2 * UPDATES + 1)
    started = begin("grpo", 2, kind, out_dir, *halt, rank=1, save_every=0)
    wait_for(place / "log", "halted")
    os.kill(started[1].pid, signal.SIGTERM)
    wait_for(place / "log", "finishing this step, then saving")
    (place / "go").touch()
    for child in started:
        child.join(HANGS)
    assert [child.exitcode for child in started] == [128 + signal.SIGTERM] * 2
    (saved,) = (place / out_dir / "checkpoints").iterdir()
    assert saved.name == f"step-{len(lines(place / out_dir / 'metrics.jsonl')):06d}"
    if kind != "ddp":  # to go on with it is the same for all
        return
    codes, said = ranks("grpo", 2, kind, out_dir)
    assert codes == [0, 0], said
    assert_learnt_alike(place / out_dir, alone("grpo"))


# -- --gpus=N, forked


class Forked:
    """Stands for subprocess.Popen in a launcher: its ranks are forked from it, which has imported
    everything, and are not interpreters that take seconds to do so."""

    def __init__(self, command, env, pass_fds, stdout, stderr, start_new_session):
        assert start_new_session
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                as_launched(env, *pass_fds, stdout, stderr)
                code = 0
            except SystemExit as end:
                code = end.code
            finally:
                sys.stdout.flush()
                os._exit(code)

    def poll(self):
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def as_launched(environment, pipe, stdout, stderr) -> None:
    """What an interpreter does that a launcher starts: the same script once more, as a rank."""
    os.setsid()
    if stdout == subprocess.DEVNULL:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if stderr is not None:
        os.dup2(stderr.fileno(), 2)
    os.closerange(3, pipe)  # the launcher's end of the pipe among them
    os.closerange(pipe + 1, 1024)
    os.environ.update(environment)
    torch.set_num_threads(1)
    runpy.run_path(sys.argv[0], run_name="__main__")


def as_launcher(script, argv, folder) -> None:
    """What a user starts with --gpus=2, in a process group of its own, as a shell's are."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.pop("RANK", None)
    parallel.subprocess = SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL)
    command(script, argv, folder, "", 1)


@pytest.fixture
def launch_forked(nursery, place):
    """launch_forked(kind, out_dir): a launcher that is running, with two ranks for very long."""
    launchers = []

    def start(kind, out_dir, **options):
        cfg = configured("grpo", out_dir, resume=True, parallel=kind, gpus=2, **BUDGET | options)
        config.save(cfg, f"{place}/{out_dir}.py")
        (place / "log").unlink(missing_ok=True)
        arguments = ("train_grpo", ["--config", f"{out_dir}.py"], str(place))
        launcher = nursery.Process(target=as_launcher, args=arguments)
        launcher.start()
        launchers.append(launcher)
        return launcher

    yield start
    for launcher in launchers:  # where a test failed; its ranks end with it
        launcher.kill()
        launcher.join()


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc here")
@pytest.mark.parametrize("kind", KINDS)
def test_a_launched_run_survives_a_killed_rank_and_ctrl_c_saves_on_all_ranks(
    launch_forked, ranks, place, kind
):
    out_dir = f"launched-{kind}"
    metrics = place / out_dir / "metrics.jsonl"
    options = {"steps": 100_000, "save_every": 2}

    # 1. a rank is killed: it is named, nobody is left
    launcher = launch_forked(kind, out_dir, **options)
    assert until(lambda: has_lines(metrics, 3) or not launcher.is_alive(), HANGS)
    children = children_of(launcher.pid)
    os.kill(children[1], signal.SIGKILL)
    launcher.join(HANGS)
    said = (place / "log").read_text()
    assert launcher.exitcode == 128 + signal.SIGKILL, said
    assert errors_in(said) == {"error: rank 1 of 2 was ended by SIGKILL; the others are ended"}
    assert len(children) == 2 and not any(is_there(pid) for pid in children)

    # 2. it goes on from its last checkpoint; Ctrl-C reaches the whole group of the launcher
    done = len(lines(metrics))
    launcher = launch_forked(kind, out_dir, **options)
    assert until(lambda: has_lines(metrics, done + 2) or not launcher.is_alive(), HANGS)
    children = children_of(launcher.pid)
    os.killpg(launcher.pid, signal.SIGINT)
    launcher.join(HANGS)
    said = (place / "log").read_text()
    assert launcher.exitcode == 128 + signal.SIGINT, said
    assert re.search(r"stopped after \d+ of 100000 steps; go on with ", said), said
    assert "Traceback" not in said and "going on with step" in said
    assert len(children) == 2 and not any(is_there(pid) for pid in children)
    steps = len(lines(metrics))
    saved = max(path.name for path in (place / out_dir / "checkpoints").iterdir())
    assert saved == f"step-{steps:06d}"

    # 3. and from what Ctrl-C has saved
    codes, said = ranks("grpo", 2, kind, out_dir, steps=steps + 1, save_every=0)
    assert codes == [0, 0] and f"going on with step {steps}" in said, said


@pytest.mark.parametrize(
    "options, why",
    [
        ({"gpus": 2}, "gpus = 2 with parallel=none: use --parallel=ddp, fsdp or deepspeed"),
        ({"gpus": 0}, "gpus = 0: expected at least 1"),
        ({"parallel": "ddp"}, "parallel = 'ddp' in one process: give --gpus=8, or use torchrun"),
        (
            {"parallel": "fsdp", "gpus": 2, "optimizer": "adamw8bit"},
            "optimizer = 'adamw8bit' cannot be cut into shards (fsdp): use adamw",
        ),
        (
            {"parallel": "deepspeed", "gpus": 2, "optimizer": "adamw8bit"},
            "optimizer = 'adamw8bit' cannot be cut into shards (deepspeed): use adamw",
        ),
        (
            {"parallel": "deepspeed", "gpus": 2, "optimizer": "muon"},
            "optimizer = 'muon' has to see whole matrices, and deepspeed cuts them: use adamw, or "
            "--parallel=ddp",
        ),
        (
            {"parallel": "ddp", "gpus": 2, "offload": True},
            "offload has no effect with parallel=ddp: use --parallel=fsdp",
        ),
    ],
)
@pytest.mark.parametrize("name", ["grpo", "sft"])
def test_what_has_no_effect_is_refused(name, options, why):
    script = EVERY_RUN[name][0]
    options = {"optimizer": "adamw"} | options
    with pytest.raises(UserError) as caught:
        script.check(configured(name, "refused", **options))
    assert str(caught.value) == why


def test_deepspeed_that_is_not_installed_is_said_at_once(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'needs deepspeed: pip install -e "\.\[deepspeed\]"$'):
        parallel.check("deepspeed", 2, "adamw", False)


@pytest.mark.parametrize(
    "environment, says",
    [({}, True), ({"RANK": "0"}, True), ({"RANK": "3"}, False), ({parallel.PIPE: "3"}, False)],
)
def test_that_it_loads_is_said_once(monkeypatch, capsys, environment, says):
    """By a launcher, or by the first process of torchrun."""
    for name in ("RANK", parallel.PIPE):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config.say_at_once("loading")
    assert capsys.readouterr().out == ("loading\n" if says else "")


def test_gpus_beside_torchrun_are_refused(monkeypatch):
    """Else it would say eight, and two would run."""
    monkeypatch.setenv("RANK", "0")
    parallel.check("ddp", 1, "adamw", False)
    with pytest.raises(UserError, match="gpus = 8 beside torchrun, .*: give --gpus=1$"):
        parallel.check("ddp", 8, "adamw", False)
    monkeypatch.setenv(parallel.PIPE, "3")  # a rank of our own launcher has the same command line
    parallel.check("ddp", 8, "adamw", False)


def test_a_rank_that_lacks_what_torchrun_sets_is_told(monkeypatch):
    for name in parallel.OF_A_RANK:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="^RANK is set, LOCAL_RANK, WORLD_SIZE, .* not: unset it"):
        with parallel.started("ddp"):
            pass


def test_far_more_processes_than_cores_are_not_started(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^gpus = 100000: without a GPU at most \d+ here"):
        parallel.launch(100_000)


def test_a_notebook_is_told_who_starts_the_processes(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="'ddp' in one process: the scripts start several"):
        with parallel.started("ddp"):
            pass


def test_processes_that_nobody_asked_for_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="4 processes with parallel=none"):
        with parallel.started("none"):
            pass

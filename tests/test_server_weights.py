"""Full weights in real `vllm serve` processes, on a CPU.

    make test-vllm      # installs vLLM's CPU build first

Pinned here: two servers have versions 0, 1 and 2 of all weights, a tied head among them, from a
file and over the network; one that was killed while the others went on gets the weights in use
before it is asked; a whole run by the command line; a server that cannot take weights, or cannot
read them, is told what to do.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from test_vllm import PROMPTS, compare, free_port, healthy, kill, moved, shape
from until import until

from engines import servers as server_engine
from engines.canary import Canary, sync_and_check
from learning import model as models
from run import config
from run.config import UserError
from run.loop import run_blocking

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not there: make test-vllm"
    ),
]
HANGS = 600  # seconds: what takes so long hangs, however busy the machine is
TAKES = {"VLLM_SERVER_DEV_MODE": "1"}
EXTENSION = ["--worker-extension-cls", "engines.worker.Worker"]


def serve(folder, port, environment=TAKES, extension=EXTENSION):
    """A server for training full weights, as engines.serving.start_command says it, small."""
    options = "--enforce-eager --dtype float32 --max-model-len 512 --max-num-seqs 64"
    options += " --logprobs-mode processed_logprobs --generation-config vllm"
    options += " --kv-cache-memory-bytes 268435456 --no-enable-chunked-prefill"
    options += f" --served-model-name base --host 127.0.0.1 --port {port}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    return subprocess.Popen(
        [*command, *options.split(), *extension],
        cwd=config.HERE,
        env=os.environ | {"VLLM_NO_USAGE_STATS": "1"} | environment,
        stdout=open(f"{folder}-{port}.log", "w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    made = str(tmp_path_factory.mktemp("tied"))
    models.save(shape("tied", tokenizer), tokenizer, made)
    return made


@pytest.fixture(scope="module")
def running(folder):
    """{port: process} of two servers of one model, which take weights."""
    started = {port: serve(folder, port) for port in (free_port(), free_port())}
    yield started
    for server in started.values():
        with contextlib.suppress(ProcessLookupError):
            kill(server)


def check_healthy(folder, running):
    for port, server in running.items():
        assert healthy(port, server), open(f"{folder}-{port}.log").read()[-3000:]


@contextlib.contextmanager
def engine_of(ports, folder, tokenizer, weights_folder, full="float32", transport="file"):
    urls = tuple(f"http://127.0.0.1:{port}" for port in ports)
    starting = server_engine.start(
        urls,
        folder,
        tokenizer,
        60.0,
        512,
        folder=str(weights_folder),
        full=full,
        transport=transport,
    )
    engine = run_blocking(starting)
    try:
        yield engine
    finally:
        run_blocking(engine.close())


@pytest.mark.parametrize("transport", ["file", "gloo"])
def test_two_servers_have_all_versions_and_one_that_was_killed_comes_back_with_the_last(
    running, folder, tokenizer, tmp_path, transport
):
    """Pitfalls 28 to 30. Over the network by gloo; NCCL is another name for the same."""
    check_healthy(folder, running)
    model, _ = models.load(folder, "full")
    canary = Canary(PROMPTS[2], "float32")
    with engine_of(running, folder, tokenizer, tmp_path, transport=transport) as engine:
        for version in range(2):
            moved(model, version)  # version 0 too has not the weights that they began with
            metrics = run_blocking(sync_and_check(engine, model, version, canary))
            assert metrics["canary"] < 1e-4
            for temperature in (0.0, 0.7):
                compare(engine, model, tokenizer, temperature, 1e-4)

        port = next(iter(running))
        kill(running[port])
        assert until(lambda: not engine.servers[0].alive, HANGS)
        moved(model, 2)
        assert run_blocking(sync_and_check(engine, model, 2, canary))["canary"] < 1e-4
        assert len(run_blocking(engine.prompt_logprobs(PROMPTS[1]))) == 1

        running[port] = serve(folder, port)
        assert until(lambda: engine.servers[0].alive, HANGS), engine.events
        assert len(run_blocking(engine.prompt_logprobs(PROMPTS[1]))) == 2
        assert run_blocking(canary.check(engine, model)) < 1e-4
        print(f"versions 0, 1, 2 and back: {canary.noise:.1e}")
        (made,) = tmp_path.iterdir()
        written = [file.name for file in made.iterdir()]  # older ones are gone
        assert written == (["version-2-3"] if transport == "file" else [])
    assert list(tmp_path.iterdir()) == []


def test_the_canary_sees_half_of_the_weights(running, folder, tokenizer, tmp_path, monkeypatch):
    check_healthy(folder, running)
    model, _ = models.load(folder, "full")
    canary = Canary(PROMPTS[2], "float32")
    with engine_of(running, folder, tokenizer, tmp_path) as engine:
        run_blocking(sync_and_check(engine, model, 0, canary))
        moved(model, 5)
        weights_of = models.weights_of
        monkeypatch.setattr(models, "weights_of", lambda m: weights_of(m)[::2])
        # what was not given is whatever lay in that memory: other logprobs, or none that JSON has
        with pytest.raises(UserError, match="sync 1: the engine|not JSON compliant"):
            run_blocking(sync_and_check(engine, model, 1, canary))
        monkeypatch.undo()
        assert run_blocking(sync_and_check(engine, model, 2, canary))["canary"] < 1e-4


def test_a_whole_run_and_one_that_goes_on(running, folder, tmp_path):
    """By the command line: weights by way of out_dir, of which nothing is left. Then by two ranks,
    which share the servers, and the first of which sends them."""
    check_healthy(folder, running)
    (tmp_path / "even.py").write_text(
        "def even(trajectory, example):\n    return float(trajectory.ids[-1] % 2)\n"
    )
    urls = ",".join(f"http://127.0.0.1:{port}" for port in running)
    argv = [f"--model={folder}", "--engine=server", f"--urls={urls}", "--data=task:calc"]
    argv += ["--prompts_per_step=4", "--group_size=4", "--max_tokens=448", "--max_new_tokens=8"]
    argv += [f"--rewards={tmp_path / 'even.py'}:even", "--learning_rate=1e-2", "--max_turns=2"]
    argv += [f"--out_dir={tmp_path / 'run'}", "--save_every=1"]
    for steps in (2, 4):
        command = [sys.executable, "train_grpo.py", *argv, f"--steps={steps}"]
        if steps == 4:
            command += ["--resume=true", "--parallel=ddp", "--gpus=2"]
            command += ["--engine_options=transport=gloo"]
        done = subprocess.run(command, cwd=config.HERE, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["canary"] < 1e-4 and row["grad_norm"] > 0 for row in rows)
    assert not (tmp_path / "run" / server_engine.WEIGHTS).exists()


@pytest.mark.parametrize(
    "environment, extension", [({}, EXTENSION), (TAKES, [])], ids=["no dev mode", "no extension"]
)
def test_a_server_that_cannot_take_weights_is_told_how_to_start(
    folder, tokenizer, tmp_path, environment, extension
):
    port = free_port()
    server = serve(folder, port, environment, extension)
    try:
        assert healthy(port, server), open(f"{folder}-{port}.log").read()[-3000:]
        sentence = "cannot take full weights .*: start it in nanotool's folder by "
        sentence += f"VLLM_SERVER_DEV_MODE=1 PYTHONPATH=. vllm serve {folder} .*engines.worker.W"
        with pytest.raises(UserError, match=sentence) as caught:
            with engine_of([port], folder, tokenizer, tmp_path):
                pass
        print(caught.value)
    finally:
        kill(server)


def test_mixed_weights_go_over_as_bfloat16(folder, tmp_path):
    from safetensors.torch import load_file

    model, _ = models.load(folder, "full")
    server_engine._save_weights(model, "mixed", tmp_path / "file")
    assert {weight.dtype for weight in load_file(tmp_path / "file").values()} == {torch.bfloat16}

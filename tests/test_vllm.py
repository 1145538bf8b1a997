"""vLLM for real, on a CPU: what it is given and gives back, and that it has the trainer's weights.

    make test-vllm      # installs vLLM's CPU build first; on a machine with a GPU its usual one

Pinned here: token ids of whole trajectories, logprobs of versions 0, 1 and 2 for adapters, 4-bit
bases and full weights, the canary against a sabotaged sync, and that nothing is left behind.
Models are random, with two layers.
"""

import asyncio
import contextlib
import importlib.util
import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from chat import Chat
from engines.base import Sampling
from engines.canary import Canary, sync_and_check
from engines.local import TransformersEngine
from formats import Call
from learning import model as models
from learning.logprobs import token_logprobs
from rollout import Settings, rollouts
from run import config
from run.config import UserError
from run.loop import run_blocking
from tasks import tiny as tiny_model
from tools import Toolbox

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not there: make test-vllm"
    ),
]
# The last is longer than a block of vLLM's prefix cache: 128 tokens on a CPU.
HANGS = 600  # seconds: what takes so long hangs, however busy the machine is
PROMPTS = [[7], [9, 30, 41, 7, 55, 60], [88, 12, 12, 5, 200, 31, 3, 77, 120, 11, 6] * 15]
EXAMPLES = [
    {"messages": [{"role": "user", "content": f"what is {n} and {n}?"}], "answer": "x", "id": n}
    for n in range(4)
]


def shape(kind, tokenizer):
    """A random model: "tied" is Qwen3-shaped, "untied" Qwen2-shaped with biases and a head."""
    torch.manual_seed(0)
    if kind == "tied":
        made = tiny_model.tiny(tokenizer, hidden_size=64, layers=2)
    else:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
        ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
        made = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **sizes, **heads, **ids))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)  # so that it has preferences
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    return made


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    made = {}
    for kind in ("tied", "untied"):
        made[kind] = str(tmp_path_factory.mktemp(kind))
        models.save(shape(kind, tokenizer), tokenizer, made[kind])
    return made


def moved(model, seed, size=0.05):
    """As an update would: every trained weight moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def start(name, policy=None, **options):
    from engines import vllm as vllm_engine

    more = {"max_model_len": 512, "max_num_seqs": 64, "kv_cache_gib": 0.25, "enforce_eager": True}
    return run_blocking(vllm_engine.start(name, policy, **(more | options)))


def compare(engine, model, tokenizer, temperature, tolerance):
    """What the engine samples, beside what the trainer says of the same ids; greedy tokens are the
    trainer's own too."""
    reference = TransformersEngine(model, tokenizer)
    for seed, ids in enumerate(PROMPTS):
        how = Sampling(temperature=temperature, max_new_tokens=12, seed=seed, stop_ids=(2,))
        out = run_blocking(engine.generate(ids, [], how))
        assert out.ids and len(out.ids) == len(out.logprobs)
        whole = torch.tensor([ids + out.ids])
        ones = torch.ones_like(whole)
        with torch.no_grad():
            said, _ = token_logprobs(model, whole, ones, ones, temperature or 1.0)
        ours = said[0, len(ids) :]
        assert (ours - torch.tensor(out.logprobs)).abs().max() < tolerance
        if temperature == 0:
            reference.join()
            greedy = run_blocking(reference.generate(ids, [], how))
            reference.leave()
            check_same_choice(greedy.ids, out.ids, len(tokenizer))


def check_same_choice(ids, other_ids, known):
    """Equal tokens, up to one that no tokenizer knows: Gemma 4's stand for images and sounds, in
    whose place its whole class reads padding, and trainer and vLLM read themselves."""
    for end, token in enumerate(ids, 1):
        if token >= known:
            assert ids[:end] == other_ids[:end]
            return
    assert ids == other_ids


def three_versions(engine, model, tokenizer, tolerance):
    """Versions 0, 1 and 2, far enough apart that each would be seen in the place of another."""
    canary = Canary(PROMPTS[2], "float32")
    for version in range(3):
        if version:
            moved(model, version)
        differs = run_blocking(sync_and_check(engine, model, version, canary))
        assert engine.version == version and differs["canary"] < tolerance
        for temperature in (0.0, 0.7):
            compare(engine, model, tokenizer, temperature, tolerance)


# Sync: adapters


@pytest.fixture(scope="module")
def lora(folders, tokenizer):
    model, _ = models.load(folders["tied"], "lora", lora_r=4, lora_alpha=8)
    engine = start(folders["tied"], lora_r=4)
    yield engine, model
    run_blocking(engine.close())


def test_versions_of_an_adapter_are_the_trainers(lora, tokenizer):
    """Pitfalls 28 and 32: greedy tokens, and logprobs to 1e-4, in float32."""
    three_versions(*lora, tokenizer, 1e-4)
    engine, _ = lora
    assert len(run_blocking(engine.llm.list_loras())) == 1  # the old ones are gone


def test_a_request_keeps_the_adapter_it_began_with(lora, tokenizer):
    """Pitfall 32: synced while it is being sampled, by one that makes it say other things."""
    engine, model = lora
    moved(model, 10)
    run_blocking(engine.sync(model, 10))
    how = Sampling(temperature=0, max_new_tokens=200)
    alone = run_blocking(engine.generate(PROMPTS[1], [], how))

    async def both():
        early = asyncio.create_task(engine.generate(PROMPTS[1], [], how))
        while not engine.flying[10]:
            await asyncio.sleep(0.001)
        moved(model, 11)
        await engine.sync(model, 11)
        assert early.done()  # the old adapter is taken away when nobody uses it
        return await early, await engine.generate(PROMPTS[1], [], how)

    early, late = run_blocking(both())
    assert early.ids == alone.ids and late.ids != alone.ids
    assert early.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


@pytest.mark.parametrize("size", [0.05, 0.002], ids=["large", "small"])
def test_the_canary_sees_an_adapter_that_was_not_taken(lora, monkeypatch, size):
    """A skipped sync, by an update of any size: also one that is smaller than the limit."""
    engine, model = lora
    canary = Canary(PROMPTS[2], "float32")
    run_blocking(sync_and_check(engine, model, 20, canary))

    async def skipped(model, version):
        engine.version = version

    moved(model, 21, size)
    monkeypatch.setattr(engine, "sync", skipped)
    with pytest.raises(UserError, match="the engine"):
        run_blocking(sync_and_check(engine, model, 21, canary))


def test_the_canary_sees_an_old_adapter_and_half_of_one(lora, tmp_path):
    engine, model = lora
    model.save_pretrained(tmp_path / "old", selected_adapters=["default"])
    moved(model, 30)
    canary = Canary(PROMPTS[2], "float32")
    run_blocking(sync_and_check(engine, model, 30, canary))
    moved(model, 31)
    run_blocking(engine._adopt(str(tmp_path / "old"), 31))
    with pytest.raises(UserError, match="sync 31: the engine's logprobs differ"):
        run_blocking(canary.check(engine, model))

    from safetensors.torch import load_file, save_file

    model.save_pretrained(tmp_path / "half", selected_adapters=["default"])
    file = tmp_path / "half" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({k: w for k, w in weights.items() if "layers.0." in k}, file)
    run_blocking(engine._adopt(str(tmp_path / "half"), 32))
    with pytest.raises(UserError, match="sync 32: the engine's logprobs differ"):
        run_blocking(canary.check(engine, model))
    run_blocking(sync_and_check(engine, model, 33, canary))  # and goes on when it is right again


def test_stop_strings_end_a_turn_and_its_ids_stay_as_sampled(lora, tokenizer):
    """Pitfall 11, for formats whose calls end with text."""
    engine, model = lora
    run_blocking(engine.sync(model, 40))
    free = Sampling(temperature=1.0, max_new_tokens=40, seed=3)
    whole = run_blocking(engine.generate(PROMPTS[1], [], free))
    text = tokenizer.decode(whole.ids)
    string = text[len(text) // 2 : len(text) // 2 + 2]
    how = Sampling(temperature=1.0, max_new_tokens=40, seed=3, stop_strings=(string,))
    out = run_blocking(engine.generate(PROMPTS[1], [], how))
    assert out.finish == "stop_string" and out.ids == whole.ids[: len(out.ids)]
    assert string in tokenizer.decode(out.ids) and string not in tokenizer.decode(out.ids[:-1])


# Trajectories


def test_ids_of_a_whole_trajectory_are_what_vllm_was_given_and_gave(lora, tokenizer, monkeypatch):
    """Pitfalls 1 to 3: two tool turns, then a last one; each request is the beginning of the ids of
    the trajectory, and what vLLM sampled stands behind it, with mask 1 there alone."""
    engine, model = lora
    run_blocking(engine.sync(model, 50))
    requests, generate = [], engine.llm.generate

    async def watched(prompt, params, *args, **more):
        async for answer in generate(prompt, params, *args, **more):
            done = answer.outputs[0]
            requests.append((list(answer.prompt_token_ids), list(done.token_ids)))
            assert answer.prompt_token_ids == prompt["prompt_token_ids"]
            yield answer

    monkeypatch.setattr(engine.llm, "generate", watched)
    chat = Chat(tokenizer, "hermes", Toolbox([add]).schemas)
    talks = {}

    def parse(
        ids, opening=None
    ):  # a random model writes no calls: its first two turns are taken for some
        talks[len(talks)] = ids
        return tokenizer.decode(ids), [Call("add", {"a": 1, "b": 2})] if len(talks) % 3 else []

    monkeypatch.setattr(chat, "parse", parse)
    settings = Settings(max_new_tokens=24, max_tokens=512, max_turns=5)
    for example in EXAMPLES:
        requests.clear()
        (t,) = run_blocking(rollouts([example], chat, engine, Toolbox([add]), settings))
        assert len(t.turn_starts) == 3 == len(requests) or t.stop == "length"
        ends = [start + len(new) for start, (_, new) in zip(t.turn_starts, requests, strict=True)]
        mask = [0] * len(t.ids)
        for start, end, (given, new) in zip(t.turn_starts, ends, requests, strict=True):
            assert t.ids[:start] == given and t.ids[start:end] == new
            mask[start:end] = [1] * len(new)
        assert t.mask == mask and t.version == 50


def test_groups_and_turns_have_noise_of_their_own_and_seeds_repeat_it(lora, tokenizer):
    """Pitfall 54, and who samples beside it changes nothing but the last bits."""
    engine, _ = lora
    chat = Chat(tokenizer, "hermes", [])
    settings = Settings(max_new_tokens=16, max_tokens=256, max_turns=1, seed=5)
    play = [
        run_blocking(rollouts(EXAMPLES[:n], chat, engine, Toolbox([]), settings, samples=4))
        for n in (4, 4, 2)
    ]
    texts = [[tuple(t.ids) for t in played] for played in play]
    assert texts[0] == texts[1] and texts[0][:8] == texts[2]
    assert len(set(texts[0][:4])) > 1


def test_more_prompt_than_fits_one_step_of_vllm(lora):
    """On a CPU, a prompt that is cut into chunks would end vLLM's process."""
    engine, _ = lora
    how = [Sampling(max_new_tokens=4, seed=seed) for seed in range(32)]
    long = [[seed + 10, *PROMPTS[2], *PROMPTS[2]] for seed in range(32)]

    async def all_at_once():
        turns = (engine.generate(ids, [], s) for ids, s in zip(long, how, strict=True))
        return await asyncio.gather(*turns)

    assert all(len(out.ids) == 4 for out in run_blocking(all_at_once()))


# Sync: full weights and four bits


def in_between(engine, model):
    """Pitfall 32: a request before a sync is sampled to its end with the weights it began with, one
    that is asked for meanwhile begins with the new ones."""
    how = Sampling(temperature=0, max_new_tokens=100)
    alone = run_blocking(engine.generate(PROMPTS[1], [], how))

    async def three():
        early = asyncio.create_task(engine.generate(PROMPTS[1], [], how))
        while not engine.flying[engine.version]:
            await asyncio.sleep(0.001)
        moved(model, 99)
        sync = asyncio.create_task(engine.sync(model, 99))
        await asyncio.sleep(0.01)
        late = asyncio.create_task(engine.generate(PROMPTS[1], [], how))
        await sync
        assert early.done() and not late.done()
        return await early, await late, await engine.generate(PROMPTS[1], [], how)

    early, late, after = run_blocking(three())
    assert early.ids == alone.ids and late.ids == after.ids != alone.ids


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_versions_of_full_weights_are_the_trainers(folders, tokenizer, kind, monkeypatch):
    """Pitfalls 28 to 30, with a tied head too, of which vLLM has a packed copy on a CPU. Old keys
    and values are kept out of a new version twice: the prefix cache is emptied, and salted. Then
    the sync is skipped, and takes only half of the tensors."""
    model, _ = models.load(folders[kind], "full")
    engine = start(folders[kind], full=True)
    try:
        three_versions(engine, model, tokenizer, 1e-4)
        in_between(engine, model)
        canary = Canary(PROMPTS[2], "float32")
        run_blocking(sync_and_check(engine, model, 3, canary))
        weights_of = models.weights_of
        for version, half in enumerate(([0, 2], [1, 2]), 4):
            moved(model, version)
            part = slice(half[0], None, half[1])
            monkeypatch.setattr(models, "weights_of", lambda m, p=part: weights_of(m)[p])
            with pytest.raises(UserError, match=f"sync {version}: the engine"):
                run_blocking(sync_and_check(engine, model, version, canary))
            monkeypatch.undo()
            run_blocking(sync_and_check(engine, model, version, canary))  # and whole again
        moved(model, 9, 0.001)
        engine.version = 9
        with pytest.raises(UserError, match="sync 9: the engine"):
            run_blocking(canary.check(engine, model))
    finally:
        run_blocking(engine.close())


def test_versions_over_a_base_of_four_bits_are_the_trainers(folders, tokenizer):
    """Pitfalls 28 and 31: vLLM has the rounded base in float32, the very numbers that the trainer
    multiplies with, so the tolerance is that of the others. The folder with it is gone."""
    model, _ = models.load(folders["untied"], "qlora", lora_r=4, lora_alpha=8)
    engine = start(folders["untied"], model, lora_r=4)
    try:
        three_versions(engine, model, tokenizer, 1e-4)
    finally:
        run_blocking(engine.close())
    plain, _ = models.load(folders["untied"], "none")
    canary = Canary(PROMPTS[2], "float32")
    with pytest.raises(UserError, match="differ"):  # while the base that was not rounded is another
        run_blocking(canary.check(TransformersEngine(plain, tokenizer), model))


# Servers


def add(a: int, b: int):  # a chat endpoint would drop what a schema says it returns
    """Adds.

    Args:
        a: one
        b: another
    """
    time.sleep(0.05)
    return a + b


@pytest.fixture(scope="module")
def caller(tokenizer, tmp_path_factory):
    """A model that has learnt by heart to call `add`, and to say what it gave."""
    import train_sft

    folder = tmp_path_factory.mktemp("caller")
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
    messages = [
        {"role": "user", "content": "add 2 and 3"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "5"},
        {"role": "assistant", "content": "The answer is \\boxed{5}."},
    ]
    (folder / "data.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (folder / "add.py").write_text(f"import time\n\n\n{inspect.getsource(add)}")
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": "add 2 and 3", "answer": "5"}) + "\n" for _ in range(8))
    )
    untrained = tiny_model.tiny(tokenizer, hidden_size=64, layers=2)
    models.save(untrained, tokenizer, folder / "begin")
    argv = [f"--model={folder / 'begin'}", f"--out_dir={folder / 'model'}", "--epochs=60"]
    argv += [f"--data={folder / 'data.jsonl'}", f"--tools={folder / 'add.py'}:add"]
    argv += ["--batch_size=1", "--learning_rate=3e-3"]
    train_sft.train(config.parse(train_sft.Config, argv, train_sft.check))
    return folder


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(folder, port):
    options = "--enforce-eager --enable-lora --max-lora-rank 8 --max-loras 2 --dtype float32"
    options += " --logprobs-mode processed_logprobs --generation-config vllm --max-num-seqs 64"
    options += " --kv-cache-memory-bytes 268435456 --enable-auto-tool-choice"
    options += " --no-enable-chunked-prefill --max-model-len 512"  # see engines/vllm.py
    options += " --tool-call-parser hermes --served-model-name base --host 127.0.0.1"
    # what `vllm serve` runs; that command itself asks for its version under a name that the package
    # of the CPU build does not have
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = open(f"{folder}-{port}.log", "w")
    return subprocess.Popen(
        [*command, *options.split(), "--port", str(port)],
        env={**os.environ, **environment},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def healthy(port, server):
    deadline = time.monotonic() + HANGS
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError):
            if urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200:
                return True
        time.sleep(0.5)
    return False


def kill(server):
    """With all its processes, as when its machine is gone."""
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.fixture(scope="module")
def servers(caller):
    """{port: process} of two servers of one model."""
    ports = free_port(), free_port()
    running = {port: serve(caller / "model", port) for port in ports}
    for port, server in running.items():
        assert healthy(port, server), open(f"{caller / 'model'}-{port}.log").read()[-3000:]
    yield running
    for server in running.values():
        with contextlib.suppress(ProcessLookupError):
            kill(server)


def of_caller(caller, servers):
    """What train_grpo.py and evaluate.py are told."""
    urls = ",".join(f"http://127.0.0.1:{port}" for port in servers)
    argv = [f"--model={caller / 'model'}", f"--data={caller / 'rows.jsonl'}"]
    argv += [f"--tools={caller / 'add.py'}:add", "--engine=server", f"--urls={urls}"]
    return [*argv, "--max_tokens=512", "--max_new_tokens=64", "--max_turns=3"]


def test_servers_are_evaluated_with_native_calls_and_with_ours(caller, servers, tmp_path):
    """The same model, behind token ids and behind a chat endpoint: it calls the tool and is right,
    here and there."""
    import evaluate

    argv = of_caller(caller, servers)
    evaluate.main([*argv, f"--save_to={tmp_path / 'ids'}"])
    url = f"http://127.0.0.1:{next(iter(servers))}/v1"
    argv = [a for a in argv if not a.startswith(("--model", "--engine", "--urls"))]
    evaluate.main([*argv, "--model=base", f"--endpoint={url}", f"--save_to={tmp_path / 'chat'}"])
    for kind in ("ids", "chat"):
        numbers = json.loads((tmp_path / kind / "eval.json").read_text())
        assert numbers["avg@1"] == 1.0 and numbers["tool_calls"] == 1 and numbers["turns"] == 2
        assert numbers["new_tokens"] > 10
    row = json.loads((tmp_path / "chat" / "rollouts.jsonl").read_text().splitlines()[0])
    assert [m["role"] for m in row["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert row["calls"][0]["arguments"] == {"a": 2, "b": 3} and row["ids"] == []


def test_one_of_two_servers_is_killed_and_all_trajectories_finish(caller, servers, capsys):
    """64 trajectories with adapters of version 1 in both: none is lost, none counted twice, the
    log says what happened, and each is what the trainer would have sampled."""
    from engines import servers as server_engine

    model, tokenizer = models.load(str(caller / "model"), "lora", lora_r=4, lora_alpha=8)
    moved(model, 1, 0.02)
    urls = tuple(f"http://127.0.0.1:{port}" for port in servers)
    engine = run_blocking(server_engine.start(urls, str(caller / "model"), tokenizer, 20.0, 512))
    chat = Chat(tokenizer, "hermes", Toolbox([add]).schemas)
    example = {"messages": [{"role": "user", "content": "add 2 and 3"}], "answer": "5", "id": 0}
    port, done = next(iter(servers)), []

    def on_done(trajectory):
        done.append((trajectory.group, trajectory.sample))
        if len(done) == 5:
            kill(servers[port])

    canary = Canary(chat.prompt(example["messages"]), "float32")
    try:
        run_blocking(sync_and_check(engine, model, 1, canary))
        how = Settings(temperature=1.0, max_tokens=512, max_new_tokens=64, max_turns=3)
        box = Toolbox([add])
        played = run_blocking(
            rollouts([example] * 8, chat, engine, box, how, 1, 8, on_done=on_done)
        )
        assert any(f":{port} was lost" in line for line in engine.events)
        assert f":{port} was lost" in capsys.readouterr().err
    finally:
        run_blocking(engine.close())
    assert len(played) == len(done) == len(set(done)) == 64
    assert any(t.calls for t in played) and {t.version for t in played} == {1}
    for t in played[:8]:
        ids, ones = torch.tensor([t.ids]), torch.ones(1, len(t.ids), dtype=torch.long)
        with torch.no_grad():
            said, _ = token_logprobs(model, ids, ones, torch.tensor([t.mask]))
        differs = (said[0] - torch.tensor(t.logprobs)).abs() * torch.tensor(t.mask)
        assert differs.max() < 1e-4


def test_without_servers_the_run_stops_and_goes_on_when_one_is_back(caller, servers, tmp_path):
    """After the test above one of the two is gone; the run begins with the other, which is killed
    too: one sentence, which names the time limit, and the checkpoint is whole."""
    argv = [*of_caller(caller, servers), "--engine_options=timeout=5", "--tune=lora", "--lora_r=4"]
    argv += ["--lora_alpha=8", "--steps=40", "--save_every=2", "--prompts_per_step=4"]
    argv += ["--group_size=4", f"--out_dir={tmp_path / 'run'}", "--learning_rate=1e-3"]
    command = [sys.executable, "train_grpo.py", *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    run = subprocess.Popen(command, cwd=config.HERE, text=True, **pipes)
    until(lambda: len(rows(tmp_path)) >= 3, run)
    (port,) = [port for port, server in servers.items() if server.poll() is None]
    kill(servers[port])
    out = run.communicate(timeout=HANGS)[0]
    assert run.returncode == 2, out
    assert "none of the servers" in out and "for 5 s" in out and "Traceback" not in out, out
    done = len(rows(tmp_path))
    servers[port] = serve(caller / "model", port)
    assert healthy(port, servers[port])
    command = [c.replace("--steps=40", f"--steps={done + 3}") for c in command]
    again = subprocess.run([*command, "--resume=true"], cwd=config.HERE, text=True, **pipes)
    assert again.returncode == 0, again.stdout
    assert [row["step"] for row in rows(tmp_path)] == list(range(done + 3))
    assert rows(tmp_path)[-1]["canary"] < 1e-4


# Runs


def processes():
    """Of vLLM, that run now: their pids."""
    out = subprocess.run(["ps", "-ewwo", "pid=,stat=,args="], capture_output=True, text=True).stdout
    lines = [line.split(maxsplit=2) for line in out.splitlines() if "VLLM::" in line]
    return {int(pid) for pid, state, _ in lines if state[0] != "Z"}  # Z: ended, nobody has asked


@pytest.fixture
def gone():
    """Whether all of vLLM's processes that were not there before have ended, or do soon."""
    before = processes()

    def check():
        deadline = time.monotonic() + HANGS
        while processes() - before and time.monotonic() < deadline:
            time.sleep(0.2)
        if left := processes() - before:
            print(subprocess.run(["ps", "-eo", "pid,ppid,stat,etime,args"]), left)
        return not left

    return check


def settings_of(folders, tmp_path, tune, steps):
    lines = f"""
        out_dir = {str(tmp_path / "run")!r}
        model = {folders["tied"]!r}
        tune = {tune!r}
        engine = "vllm"
        engine_options = ("kv_cache_gib=0.25", "enforce_eager=true")
        data = "task:calc"
        steps = {steps}
        save_every = 1
        prompts_per_step = 4
        group_size = 4
        max_tokens = 448
        max_new_tokens = 8
        max_turns = 2
        rewards = ({str(tmp_path / "r.py") + ":another"!r},)
        learning_rate = 1e-2
    """
    # no two trajectories get the same: a group in which all did would not be learnt from
    (tmp_path / "r.py").write_text(
        "import itertools\n\ncount = itertools.count()\n\n\n"
        "def another(trajectory, example):\n    return float(next(count))\n"
    )
    file = tmp_path / "run_config.py"
    file.write_text("\n".join(line.strip() for line in lines.splitlines()))
    return file


def launch(file, *more):
    command = [sys.executable, "train_grpo.py", "--config", str(file), *more]
    return subprocess.Popen(
        command,
        cwd=config.HERE,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a group of its own, as the shell of a terminal gives it
    )


def rows(tmp_path):
    file = tmp_path / "run" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def until(condition, run):
    deadline = time.monotonic() + HANGS
    while not condition():
        assert run.poll() is None, run.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def engine_core(run):
    """The pid of vLLM's process below a run."""
    for pid in processes():
        if f"PPid:\t{run.pid}\n" in Path(f"/proc/{pid}/status").read_text():
            return pid
    raise AssertionError(f"none of {processes()} is a child of {run.pid}")


def test_a_run_goes_on_after_the_death_of_vllm_its_own_and_ctrl_c(folders, tmp_path, gone):
    """vLLM's process is killed: one sentence, an exit code, a whole checkpoint. The trainer is
    killed. Ctrl-C, which all processes of the terminal get, vLLM's too: the step is finished with
    it, and saved. Nothing is left behind by any of them, and each time --resume=true goes on."""
    file = settings_of(folders, tmp_path, "full", 50)
    run = launch(file)
    until(lambda: len(rows(tmp_path)) >= 2, run)
    os.kill(engine_core(run), signal.SIGKILL)
    out = run.communicate(timeout=HANGS)[0]
    assert run.returncode == 2, out
    assert "vLLM's process has died" in out and "Traceback" not in out, out
    assert gone()

    had = len(rows(tmp_path))
    run = launch(file, "--resume=true")
    until(lambda: len(rows(tmp_path)) > had, run)
    run.kill()
    run.wait()
    assert gone()

    had = len(rows(tmp_path))
    run = launch(file, "--resume=true")
    until(lambda: len(rows(tmp_path)) > had + 1, run)
    os.killpg(run.pid, signal.SIGINT)
    out = run.communicate(timeout=HANGS)[0]
    assert run.returncode == 128 + signal.SIGINT, out
    assert "go on with python" in out and "--resume=true" in out and gone()

    done = rows(tmp_path)
    assert [row["step"] for row in done] == list(range(len(done)))
    for row in done:
        assert row["canary"] < 1e-4 and row["sampler_logprob_diff"] < 1e-4
        assert row["sampler_logprob_diff"] <= row["sampler_logprob_diff_p95"]
        assert abs(row["is_weight"] - 1) < 1e-3 and row["is_outside"] == 0 <= row["mismatch_kl"]


def test_an_evaluation_loads_the_model_into_vllm_only(folders, tmp_path, monkeypatch, gone):
    import evaluate

    loaded = []
    monkeypatch.setattr(models, "load", lambda *a, **k: loaded.append(a))
    argv = [f"--model={folders['tied']}", "--data=task:calc", "--engine=vllm", "--limit=8"]
    argv += [
        "--engine_options=kv_cache_gib=0.25,enforce_eager=true",
        "--max_tokens=448",
        "--max_new_tokens=8",
    ]
    evaluate.main([*argv, f"--save_to={tmp_path / 'eval'}"])
    numbers = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert numbers["problems"] == 8 and loaded == [] and gone()


def test_a_model_that_vllm_does_not_have_is_one_sentence(folders, tmp_path, gone):
    there = tmp_path / "model"
    shutil.copytree(folders["tied"], there)
    settings = json.loads((there / "config.json").read_text())
    settings |= {"architectures": ["NobodysForCausalLM"], "max_position_embeddings": 64}
    (there / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="vLLM did not start on"):
        start(str(there))
    assert gone()

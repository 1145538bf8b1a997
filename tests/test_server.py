"""Servers over HTTP: who is asked, what happens when one dies, comes back or refuses.

    pytest tests/test_server.py

The servers here are fakes on 127.0.0.1 that answer as `vllm serve` does; tests/test_vllm.py has the
same with real ones. Their model says next what the ids and the seed make of it, so that who answers
changes nothing.
"""

import asyncio
import contextlib
import itertools
import json
import threading
import time
import types
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import eyes
import pytest
import torch
import transformers
from safetensors.torch import load_file
from until import PATIENCE, until

from chat import Chat
from engines import sending
from engines import servers as server_engine
from engines.base import Sampling
from engines.options import read_options
from engines.worker import received
from images import open_image
from learning import model as models
from learning import parallel
from learning.vision import FAMILIES, Vision
from rollout import Settings, rollouts
from run import http
from run.config import UserError
from run.loop import run_blocking
from tools import Toolbox

EXAMPLES = [
    {"messages": [{"role": "user", "content": f"what is {n} and {n}?"}], "answer": "x", "id": n}
    for n in range(8)
]


class Fake:
    """A server. delay: seconds per answer; broken: what it answers to everything; deaf: answers
    nothing. seen counts its requests by path, and adapters has the names that it was given."""

    def __init__(self, tokenizer, port=0, processed=True, room=4096, delay=0.0):
        self.tokenizer, self.processed, self.room, self.delay = tokenizer, processed, room, delay
        self.seen, self.adapters, self.models, self.bodies = Counter(), [], [], []
        self.broken, self.deaf, self.runtime = 0, threading.Event(), True
        self.vision = None  # of a server that shows images
        # of one that takes full weights: their names, and whether it reads what the trainer writes
        self.weights, self.reads, self.encoder_resets = [], True, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                """Says nothing."""

            def do_GET(self):
                self.answer({})

            def do_POST(self):
                length = int(self.headers.get("content-length", 0))
                self.answer(json.loads(self.rfile.read(length)))

            def answer(self, body):
                code, said = outer.said(self.path, body)
                if outer.deaf.is_set():
                    self.close_connection = True
                    return
                text = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(code)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # more than is ever read
                    self.wfile.write(text)

        class Server(ThreadingHTTPServer):
            request_queue_size, daemon_threads = 128, True  # as many connect at once

        self.server = Server(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def die(self):
        """As a process that is killed: open connections break, new ones are refused."""
        self.deaf.set()
        self.server.shutdown()
        self.server.server_close()

    def said(self, path, body):
        self.seen[path] += 1
        if self.broken:
            return self.broken, {"error": "broken"}
        if path == "/v1/models":
            cards = [{"id": "base", "parent": None, "max_model_len": self.room}]
            return 200, {"data": cards + [{"id": a, "parent": "base"} for a in self.adapters]}
        if path == "/tokenize":
            ids = self.tokenizer.encode(body["prompt"], add_special_tokens=False)
            return 200, {"tokens": ids}
        if path.endswith("lora_adapter"):
            if not self.runtime:
                return 404, {"detail": "Not Found"}
            if path.startswith("/v1/load"):
                self.adapters.append(body["lora_name"])
            else:
                self.adapters.remove(body["lora_name"])
            return 200, "Success"
        if path == "/collective_rpc":
            return self.workers(body)
        if path == "/v1/completions":
            return self.completion(body)
        if path == "/inference/v1/generate":
            return self.with_images(body)
        return 200, {}

    def workers(self, body):
        """As engines/worker.py does it, of two workers."""
        if body["method"] == "what_it_has":
            (folder,) = body["args"]
            name = self.weights[-1] if self.weights else ""
            said = {"name": name, "reads": self.reads and Path(folder).is_dir()}
            return 200, {"results": [said, said]}
        if body["method"] == "receive_weights":
            return self.receive(*body["args"])
        assert body["method"] == "take_weights"
        file, name = body["args"]
        if self.weights[-1:] != [name]:
            self.held = load_file(file)
            self.weights.append(name)
        return 200, {"results": [None, None]}

    def receive(self, transport, address, port, name):
        """Both workers get all weights."""
        with ThreadPoolExecutor(2) as workers:
            asked = [
                workers.submit(lambda: dict(received(transport, address, int(port), "cpu")))
                for _ in range(2)
            ]
        self.held, same = (worker.result() for worker in asked)
        assert self.held.keys() == same.keys()
        assert all(torch.equal(self.held[name], same[name]) for name in same)
        self.weights.append(name)
        return 200, {"results": [None, None]}

    def with_images(self, body):
        """As vLLM does it: its own tokens in the place of each placeholder, and other names for the
        rest."""
        if self.vision is None:
            return 403, {"message": "Scale-out endpoints are disabled."}
        self.pictures = [
            self.vision.prepare(open_image(part["url"])) for part in body["content_parts"]
        ]
        prompt = self.vision.expand(body["token_ids"], self.pictures)
        asked = body["sampling_params"] | {"prompt": prompt, "model": body["model"]}
        code, said = self.completion(asked)
        (choice,) = said["choices"]
        beside = {key: choice.pop(key, None) for key in ("prompt_token_ids", "prompt_logprobs")}
        pairs = zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True)
        choice["logprobs"] = {"content": [{"token_id": t, "logprob": p} for t, p in pairs]}
        if "logprobs" not in body["sampling_params"]:
            choice["logprobs"] = None
        return code, {"choices": [choice], **beside}

    def completion(self, body):
        if body["model"] not in ("base", *self.adapters):
            return 404, {"message": f"The model `{body['model']}` does not exist."}
        self.models.append(body["model"])
        self.bodies.append(body)
        time.sleep(self.delay)
        choice = {"prompt_token_ids": body["prompt"], "stop_reason": None}
        if body.get("prompt_logprobs") is not None:
            scores = [{str(i): {"logprob": -float(i)}} for i in body["prompt"]]
            choice["prompt_logprobs"] = [None, *scores[1:]]
        heat = body["temperature"] if self.processed else 1.0
        best = {"a": -0.1 / (heat or 1), "b": -1.1 / (heat or 1)}
        first = hash((tuple(body["prompt"]), body.get("seed"))) % 200 + 10
        new = [(first + i) % 200 + 10 for i in range(min(3, body["max_tokens"]))]
        choice |= {"token_ids": new, "finish_reason": "length"}
        choice["logprobs"] = {"token_logprobs": [-0.5] * len(new), "top_logprobs": [best]}
        return 200, {"choices": [choice]}


@pytest.fixture
def fakes(tokenizer):
    """Makes servers; they are gone at the end."""
    with contextlib.ExitStack() as stack:

        def make(count=2, **how):
            made = [Fake(tokenizer, **how) for _ in range(count)]
            for one in made:
                stack.callback(one.server.server_close)
                stack.callback(one.server.shutdown)
            return made

        yield make


@contextlib.contextmanager
def engine_of(servers, tokenizer, timeout=PATIENCE, max_tokens=512, name="nowhere", **options):
    urls = tuple(server.url for server in servers)
    starting = server_engine.start(urls, name, tokenizer, timeout, max_tokens, **options)
    engine = run_blocking(starting)
    try:
        yield engine
    finally:
        run_blocking(engine.close())


def play(engine, tokenizer, samples=8, on_done=None, examples=EXAMPLES):
    chat = Chat(tokenizer, "hermes", [])
    settings = Settings(max_turns=1, max_new_tokens=4, seed=1)
    played = rollouts(examples, chat, engine, Toolbox([]), settings, 0, samples, on_done=on_done)
    return run_blocking(played)


def wait_for_line(engine, text):
    """Until one of the engine's events has the text in it."""
    assert until(lambda: any(text in line for line in engine.events)), f"no event says {text!r}"


class Adapted:
    """What a sync needs of a model with adapters: it writes nothing but its version."""

    peft_config = {"default": types.SimpleNamespace(base_model_name_or_path="base", r=4)}
    config = transformers.Qwen2Config()

    def get_input_embeddings(self):
        return None

    def get_output_embeddings(self):
        return None

    def save_pretrained(self, folder, **_):
        folder.mkdir(parents=True)


def test_turns_are_spread_and_a_group_stays_where_its_beginning_is_cached(fakes, tokenizer):
    one, two = fakes(delay=0.01)
    with engine_of((one, two), tokenizer) as engine:
        played = play(engine, tokenizer)
        assert len(engine.homes) == 8
        assert one.seen["/v1/completions"] + two.seen["/v1/completions"] == 64
        assert min(one.seen["/v1/completions"], two.seen["/v1/completions"]) >= 16
    assert all(t.mask[-3:] == [1, 1, 1] and t.logprobs[-1] == -0.5 for t in played)


def test_what_shapes_a_distribution_is_sent_and_not_left_to_the_server(fakes, tokenizer):
    """Pitfall 14: what a request leaves out vllm serve takes from the model's generation_config,
    where it was started without --generation-config vllm. Also where its logprobs are proved."""
    (one,) = fakes(1)
    off = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    off |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    with engine_of([one], tokenizer) as engine:
        run_blocking(
            engine.generate([5, 6], [], Sampling(temperature=0.7, max_new_tokens=2, seed=3))
        )
        run_blocking(engine.sync(Adapted(), 1))
        run_blocking(engine.prompt_logprobs([5, 6, 7]))
    first = one.bodies[0]
    assert (first["temperature"], first["seed"], first["ignore_eos"]) == (0.7, 3, True)
    assert len(one.bodies) == 4 and all(off.items() <= body.items() for body in one.bodies)


def test_what_a_dying_server_had_is_sampled_again_by_the_other(fakes, tokenizer, capsys):
    """64 trajectories, none lost, none twice, and each as if nothing had happened."""
    with engine_of(fakes(), tokenizer) as engine:
        undisturbed = play(engine, tokenizer)
    one, two = fakes()
    answered = one.completion
    one.completion = lambda body: (one.deaf.wait(60), answered(body))[1]  # not before it dies
    done = []

    def on_done(trajectory):
        done.append((trajectory.group, trajectory.sample))
        if len(done) == 10:
            one.die()

    with engine_of((one, two), tokenizer) as engine:
        played = play(engine, tokenizer, on_done=on_done)
        events = list(engine.events)
    assert len(done) == len(set(done)) == len(played) == 64
    assert [t.ids for t in played] == [t.ids for t in undisturbed]
    assert [line for line in events if f"{one.url} was lost" in line]
    assert f"{one.url} was lost" in capsys.readouterr().err


def test_a_server_that_comes_back_is_given_the_adapter_before_it_is_asked(fakes, tokenizer):
    one, two = fakes()
    with engine_of((one, two), tokenizer) as engine:
        run_blocking(engine.sync(Adapted(), 1))
        one.die()
        wait_for_line(engine, "was lost")
        run_blocking(engine.sync(Adapted(), 2))  # while it is away
        back = Fake(tokenizer, port=one.port)
        wait_for_line(engine, "is back")
        play(engine, tokenizer)
        name = engine.name
        assert back.adapters == [name] and set(back.models) <= {name} and back.models
        assert two.adapters == [name]  # the one before it was dropped
        back.die()


def test_without_any_server_the_run_stops_in_time_with_one_sentence(fakes, tokenizer):
    (one,) = fakes(1)
    answered = one.completion
    numbers = itertools.count()

    def first_alone(body):
        if next(numbers) > 0:
            one.deaf.wait(PATIENCE)  # not before it dies, which is when the first turn is done
        return answered(body)

    with engine_of([one], tokenizer, timeout=1.0) as engine:
        one.completion = first_alone
        with pytest.raises(UserError, match="none of the servers .* has answered for 1 s.*resume"):
            play(engine, tokenizer, on_done=lambda t: one.deaf.is_set() or one.die())


def test_one_that_never_answers_is_named_at_the_start(tokenizer):
    starting = server_engine.start(("http://127.0.0.1:9",), "x", tokenizer, 0.5)
    with pytest.raises(UserError, match="none of the servers \\(http://127.0.0.1:9\\)"):
        run_blocking(asyncio.wait_for(starting, PATIENCE))


def test_a_server_error_counts_as_lost_and_a_refusal_ends_the_run(fakes, tokenizer):
    one, two = fakes()
    with engine_of((one, two), tokenizer) as engine:
        one.broken = 500
        assert len(play(engine, tokenizer)) == 64
        assert any("HTTP 500" in line for line in engine.events)
        two.broken = 400
        with pytest.raises(UserError, match="refuses .HTTP 400"):
            play(engine, tokenizer)


def test_a_server_that_hangs_is_lost_by_its_health(fakes, tokenizer, monkeypatch):
    """Its turns do not wait for an answer that never comes."""
    monkeypatch.setattr(server_engine, "PATIENCE", 2.0)
    one, two = fakes()
    with engine_of((one, two), tokenizer) as engine:
        said = one.said
        woken = threading.Event()
        one.said = lambda path, body: (woken.wait(120), said(path, body))[1]
        assert len(play(engine, tokenizer)) == 64
        assert any(f"{one.url} was lost" in line for line in engine.events)
        woken.set()


def test_servers_that_would_train_wrongly_are_refused(fakes, tokenizer):
    """Another tokenizer, too little room, adapters that it cannot take, logprobs that are of
    another distribution than the one sampled from: each says what to do."""
    (other,) = fakes(1)
    other.tokenizer = _Reversed()
    with pytest.raises(UserError, match="another tokenizer"):
        run_blocking(server_engine.start((other.url,), "x", tokenizer, PATIENCE))
    (small,) = fakes(1, room=100)
    with pytest.raises(UserError, match="max_model_len = 100.*--max-model-len=512"):
        run_blocking(server_engine.start((small.url,), "x", tokenizer, PATIENCE, 512))
    (fixed,) = fakes(1)
    fixed.runtime = False
    with engine_of([fixed], tokenizer, lora_r=4) as engine:
        with pytest.raises(UserError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
            run_blocking(engine.sync(Adapted(), 1))
    (raw,) = fakes(1, processed=False)
    with engine_of([raw], tokenizer) as engine:
        with pytest.raises(UserError, match="--logprobs-mode processed_logprobs"):
            run_blocking(engine.sync(Adapted(), 1))


class _Reversed:
    def encode(self, text, **_):
        return [1, 2, 3]


# Full weights


class Whole(torch.nn.Linear):
    """A model whose weights are its version, and that is saved as transformers would."""

    def __init__(self, version):
        super().__init__(2, 2)
        with torch.no_grad():
            self.weight.fill_(version)


@pytest.fixture
def plain(monkeypatch):
    """What transformers says of a model's names is not needed for Whole."""
    monkeypatch.setattr(models, "weights_of", lambda model: list(model.named_parameters()))


FULL = {"full": "float32"}
SENT = FULL | {"transport": "gloo"}


def test_full_weights_and_adapters_are_not_mistaken(fakes, tokenizer):
    with engine_of(fakes(), tokenizer) as engine:
        with pytest.raises(UserError, match="was started for adapters, and got full weights"):
            run_blocking(engine.sync(Whole(1), 1))


def test_all_servers_take_full_weights_and_the_file_before_goes(fakes, tokenizer, plain, tmp_path):
    one, two = fakes()
    one.weights.append("of another run")
    with engine_of((one, two), tokenizer, **FULL, folder=str(tmp_path)) as engine:
        assert one.weights == ["of another run"]  # nothing to give yet
        one.weights.clear()
        for version in range(3):
            run_blocking(engine.sync(Whole(version), version))
            play(engine, tokenizer, samples=1)
        names = [f"{engine.run}-{version}-{version + 1}" for version in range(3)]
        assert one.weights == two.weights == names
        assert [path.name for path in engine.memory.iterdir()] == ["version-2-3"]
        assert set(one.models) == {"base"}
        salts = {body["cache_salt"] for body in one.bodies + two.bodies}
        # nor may a cache be mistaken for that of another run with the same servers
        assert salts == {f"{name} version {version}" for version, name in enumerate(names)}
        assert one.held["weight"].tolist() == [[2.0, 2.0], [2.0, 2.0]]
        run_blocking(engine.sync(Whole(5), 2))  # a version again, with other weights
        assert two.held["weight"].tolist() == [[5.0, 5.0], [5.0, 5.0]]
    assert list(tmp_path.iterdir()) == []


def test_a_server_with_weights_of_a_training_run_is_not_taken_for_its_model(fakes, tokenizer):
    """An evaluation, or adapters, would be over the last weights that it was given."""
    (one,) = fakes(1)
    one.weights.append("nanotool-1-40")
    with pytest.raises(UserError, match="has full weights of a training run .nanotool-1-40.*anew"):
        with engine_of([one], tokenizer):
            pass


def test_full_weights_wait_until_all_turns_have_ended(fakes, tokenizer, plain, tmp_path):
    """Pitfall 32: and what is asked for meanwhile waits for them."""
    (one,) = fakes(1)
    begun, go = threading.Event(), threading.Event()
    answered = one.completion

    def held(body):
        begun.set()
        assert go.wait(PATIENCE)
        order.append(("turn", len(one.weights)))
        return answered(body)

    with engine_of([one], tokenizer, **FULL, folder=str(tmp_path)) as engine:
        run_blocking(engine.sync(Whole(0), 0))
        one.completion = held
        order = []

        async def both():
            how = Sampling(max_new_tokens=2)
            early = asyncio.create_task(engine.generate([5, 6], [], how))
            assert await asyncio.to_thread(begun.wait, PATIENCE)
            sync = asyncio.create_task(engine.sync(Whole(1), 1))
            await asyncio.sleep(0.2)
            late = asyncio.create_task(engine.generate([5, 6], [], how))
            await asyncio.sleep(0.2)
            assert len(one.weights) == 1 and not sync.done()
            go.set()
            await asyncio.gather(early, sync, late)

        run_blocking(both())
        assert order == [("turn", 1), ("turn", 2)]


@pytest.mark.parametrize("options", [FULL, SENT], ids=["file", "sent"])
def test_a_server_that_comes_back_is_given_the_weights_before_it_is_asked(
    fakes, tokenizer, plain, tmp_path, options
):
    """One that was only away is not given them again."""
    one, two = fakes()
    with engine_of((one, two), tokenizer, **options, folder=str(tmp_path)) as engine:
        run_blocking(engine.sync(Whole(1), 1))
        one.die()
        wait_for_line(engine, "was lost")
        run_blocking(engine.sync(Whole(2), 2))  # while it is away
        back = Fake(tokenizer, port=one.port)
        honest = back.completion
        back.completion = lambda body: honest(body) if back.weights else pytest.fail("too early")
        wait_for_line(engine, "is back")
        play(engine, tokenizer)
        assert back.weights == [engine.name] and back.models
        assert back.held["weight"].tolist() == [[2.0, 2.0], [2.0, 2.0]]
        back.broken = 503
        assert until(lambda: not engine.servers[0].alive)
        back.broken = 0
        assert until(lambda: engine.servers[0].alive)
        assert back.weights == [engine.name]
        back.die()


@pytest.mark.parametrize("options", [FULL, SENT, {}], ids=["full", "sent", "adapters"])
def test_a_server_that_comes_back_during_a_sync_has_the_new_weights(
    fakes, tokenizer, plain, tmp_path, options
):
    """It is loading those before, when they are exchanged: then it loads once more."""
    made = Whole if options else lambda version: Adapted()
    path = "/collective_rpc" if options else "/v1/load_lora_adapter"
    one, two = fakes()
    with engine_of((one, two), tokenizer, **options, folder=str(tmp_path)) as engine:
        run_blocking(engine.sync(made(1), 1))
        one.die()
        wait_for_line(engine, "was lost")
        back = Fake(tokenizer, port=one.port)
        honest, loading, go = back.said, threading.Event(), threading.Event()

        def said(asked, body):
            answer = honest(asked, body)
            if asked == path and "what_it_has" not in body.values():
                loading.set()
                assert go.wait(PATIENCE)
            return answer

        back.said = said
        assert loading.wait(PATIENCE)
        run_blocking(engine.sync(made(2), 2))
        assert two.weights[-1:] == [engine.name] or two.adapters == [engine.name]
        go.set()
        wait_for_line(engine, "is back")
        assert engine.servers[0].has == engine.name
        assert engine.name in (back.weights or back.adapters)
        back.die()


@pytest.mark.parametrize("answer", [(404, {"detail": "Not Found"}), (500, {"error": "no method"})])
def test_a_server_that_takes_no_weights_is_told_how_to_start(fakes, tokenizer, answer, tmp_path):
    (one,) = fakes(1)
    one.workers = lambda body: answer
    sentence = "cannot take full weights .*engines.worker.Worker"
    with pytest.raises(UserError, match=sentence):
        with engine_of([one], tokenizer, **FULL, folder=str(tmp_path)):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_cannot_read_the_folder_is_known_at_the_start(fakes, tokenizer, tmp_path):
    (far,) = fakes(1)
    far.reads = False
    with pytest.raises(UserError, match=f"{far.url} cannot read {tmp_path}/.*folder=…"):
        with engine_of([far], tokenizer, **FULL, folder=str(tmp_path)):
            pass


def test_a_folder_without_room_or_that_is_none_is_one_sentence(
    fakes, tokenizer, plain, tmp_path, monkeypatch
):
    with engine_of(fakes(1), tokenizer, **FULL, folder=str(tmp_path)) as engine:
        full = types.SimpleNamespace(free=10)
        monkeypatch.setattr(server_engine.shutil, "disk_usage", lambda path: full)
        with pytest.raises(UserError, match="0.0 GiB are free.*make room, or give another folder"):
            run_blocking(engine.sync(Whole(1), 1))
    with pytest.raises(UserError, match="cannot write what the servers need to '.*/none'"):
        with engine_of(fakes(1), tokenizer, **FULL, folder=f"{tmp_path}/none"):
            pass


def test_weights_are_sent_to_all_workers_and_no_file_is_written(
    fakes, tokenizer, plain, tmp_path, monkeypatch
):
    """By gloo here; NCCL is another name in engines.worker.join."""
    one, two = fakes()
    matrix = torch.arange(6, dtype=torch.float32).view(2, 3)
    with engine_of((one, two), tokenizer, **SENT, folder=str(tmp_path)) as engine:
        one.reads = two.reads = False  # they see no folder of the trainer's
        for version in range(3):
            weights = [("turned", matrix.T * version), ("one", torch.tensor(7.5))]
            monkeypatch.setattr(models, "weights_of", lambda model, made=weights: made)
            run_blocking(engine.sync(Whole(version), version))
            for server in (one, two):
                assert server.held["turned"].tolist() == (matrix.T * version).tolist()
                assert server.held["one"].tolist() == 7.5
            play(engine, tokenizer, samples=1)
            assert list(engine.memory.iterdir()) == []
        assert one.weights == two.weights and len(one.weights) == 3
        engine.full = "mixed"
        run_blocking(engine.sync(Whole(3), 3))
        assert two.held["turned"].dtype == torch.bfloat16
        assert two.held["turned"].tolist() == (matrix.T * 2).tolist()


def test_what_is_sent_is_of_the_sync_and_not_of_the_training_since(
    fakes, tokenizer, plain, tmp_path
):
    one, two = fakes()
    with engine_of((one, two), tokenizer, **SENT, folder=str(tmp_path)) as engine:
        model = Whole(1)
        run_blocking(engine.sync(model, 1))
        one.die()
        wait_for_line(engine, "was lost")
        with torch.no_grad():
            model.weight.fill_(9)  # an update, behind which no sync was yet
        back = Fake(tokenizer, port=one.port)
        wait_for_line(engine, "is back")
        assert back.held["weight"].tolist() == [[1.0, 1.0], [1.0, 1.0]]
        back.die()


@pytest.mark.parametrize("joins", [False, True])
def test_a_server_that_dies_while_it_is_sent_weights_is_lost_and_the_others_go_on(
    fakes, tokenizer, plain, tmp_path, joins
):
    one, two = fakes()

    def dying(transport, address, port, name):
        if joins:  # to the first tensor
            one.workers_of_it = received(transport, address, int(port), "cpu")
            other = received(transport, address, int(port), "cpu")
            with ThreadPoolExecutor(2) as workers:
                list(workers.map(next, (one.workers_of_it, other)))
        one.deaf.set()
        return 200, {}

    with engine_of((one, two), tokenizer, **SENT, folder=str(tmp_path)) as engine:
        one.receive = dying
        run_blocking(engine.sync(Whole(1), 1))
        assert [server.alive for server in engine.servers] == [False, True]
        assert len(play(engine, tokenizer)) == 64 and not one.models
        del one.receive
        one.deaf.clear()
        wait_for_line(engine, "is back")
        assert one.weights == two.weights == [engine.name]


def test_another_rank_finds_what_the_first_has_sent(fakes, tokenizer, plain, tmp_path, monkeypatch):
    one, two = fakes()
    with engine_of((one, two), tokenizer, **SENT, folder=str(tmp_path)) as first:
        run_blocking(first.sync(Whole(1), 1))
        monkeypatch.setattr(parallel.HERE, "rank", 1)
        urls = (one.url, two.url)
        second = server_engine.ServerEngine(urls, PATIENCE, first.memory, **SENT)
        monkeypatch.setattr(sending, "Sender", None)
        run_blocking(second.begin(tokenizer, 512, len(tokenizer)))
        run_blocking(second.sync(Whole(1), 1))
        assert [server.has for server in second.servers] == [first.name] * 2
        two.weights.append("")  # started anew, and the first rank has not seen it yet
        second.servers[1].has = ""
        run_blocking(second._give_all())
        assert [server.alive for server in second.servers] == [True, False]
        two.weights.pop()
        assert until(lambda: second.servers[1].alive)
        monkeypatch.undo()
        run_blocking(second.close())


@pytest.mark.parametrize(
    "options, why",
    [
        ({"full": "float32", "transport": "nccl"}, "there is no GPU here that NCCL could send"),
        ({"lora_r": 8, "transport": "gloo"}, "has no effect with adapters"),
    ],
)
def test_a_transport_that_cannot_be_is_refused(tokenizer, monkeypatch, options, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    starting = server_engine.start(("http://127.0.0.1:9",), "x", tokenizer, **options)
    with pytest.raises(UserError, match=f"server.transport = '.*{why}"):
        run_blocking(starting)


def test_a_folder_is_refused_where_nothing_is_written():
    sent = ("transport=gloo", "folder=shared")
    with pytest.raises(UserError, match="server.folder has no effect with transport=gloo"):
        read_options("server", sent)
    with pytest.raises(UserError, match="server.transport = 'ipc': expected one of file, gloo"):
        read_options("server", ("transport=ipc",))


def test_what_a_killed_run_left_in_its_out_dir_goes(fakes, tokenizer, plain, tmp_path):
    left = tmp_path / server_engine.WEIGHTS / "nanotool-old"
    left.mkdir(parents=True)
    with engine_of(fakes(1), tokenizer, **FULL, out_dir=str(tmp_path)) as engine:
        run_blocking(engine.sync(Whole(1), 1))
        assert not left.exists() and engine.memory.parent == left.parent
    assert not left.parent.exists()


def test_ranks_that_share_a_server_load_once(fakes, tokenizer, plain, tmp_path):
    """The first writes; a second engine of the same run finds all there."""
    (one,) = fakes(1)
    with engine_of([one], tokenizer, folder=str(tmp_path)) as first:
        run_blocking(first.sync(Adapted(), 1))
        honest = one.said

        def said(path, body):
            if path.startswith("/v1/load") and body["lora_name"] in one.adapters:
                return 400, {"message": "has already been loaded"}
            return honest(path, body)

        one.said = said
        urls = (one.url,)
        second = server_engine.ServerEngine(urls, PATIENCE, first.memory)
        run_blocking(second.begin(tokenizer, 512, len(tokenizer)))
        second._write = lambda model, path: None  # the first rank has
        run_blocking(second.sync(Adapted(), 1))
        assert second.servers[0].has == first.name and one.adapters == [first.name]
        run_blocking(second.http.aclose())
        for watcher in second.watchers:
            watcher.cancel()


def changed(**keys):
    """An answer whose choice has other values for these keys."""
    return lambda body: (200, {"choices": [body["choices"][0] | keys]})


def with_logprob(value):
    return changed(logprobs={"token_logprobs": [-0.5, value, -0.5]})


def with_token(value):
    return changed(token_ids=[11, value, 12])


# What a server makes of a good answer; three tokens are asked for.
ODD = {
    "a logprob not a number": with_logprob(float("nan")),
    "a logprob of -inf": with_logprob(float("-inf")),
    "a logprob of inf": with_logprob(float("inf")),
    "a logprob above 0": with_logprob(0.5),
    "a logprob null": with_logprob(None),
    "a logprob a text": with_logprob("-0.5"),
    "a logprob true": with_logprob(True),
    "a logprob a list": with_logprob([-0.5]),
    "a logprob that cannot be": with_logprob(-9999.0),
    "a logprob of 400 digits": with_logprob(-(10**400)),
    "too few logprobs": changed(logprobs={"token_logprobs": [-0.5]}),
    "too many logprobs": changed(logprobs={"token_logprobs": [-0.5] * 4}),
    "no logprobs": changed(logprobs=None),
    "logprobs a list": changed(logprobs=[-0.5] * 3),
    "a token beyond the vocabulary": with_token(1_000_000),
    "a token below 0": with_token(-1),
    "a token a text": with_token("12"),
    "a token a float": with_token(12.0),
    "a token true": with_token(True),
    "a token null": with_token(None),
    "more tokens than asked": changed(token_ids=[11] * 5, logprobs={"token_logprobs": [-0.5] * 5}),
    "no token": changed(token_ids=[], logprobs={"token_logprobs": []}),
    "tokens a text": changed(token_ids="abc"),
    "tokens null": changed(token_ids=None),
    "another prompt": changed(prompt_token_ids=[1, 2]),
    "no prompt": changed(prompt_token_ids=None),
    "an end by abort": changed(finish_reason="abort"),
    "no end": changed(finish_reason=None),
    "an end a list": changed(finish_reason=["stop"]),
    "a stop at no stop token": changed(finish_reason="stop"),
    "a stop at no stop text": changed(finish_reason="stop", stop_reason="###"),
    "no choice": lambda body: (200, {"choices": []}),
    "two choices": lambda body: (200, {"choices": body["choices"] * 2}),
    "choices null": lambda body: (200, {"choices": None}),
    "a choice a text": lambda body: (200, {"choices": ["hello"]}),
    "an error in the body": lambda body: (200, {"error": {"message": "out of memory"}}),
    "a list": lambda body: (200, [1, 2]),
    "null": lambda body: (200, None),
    "a page": lambda body: (200, b"<html>nginx</html>"),
    "half of its JSON": lambda body: (200, b'{"choices": [{"token_ids": [1'),
    "JSON without end": lambda body: (200, b"[" * 100_000),
    "nothing": lambda body: (200, b""),
    "no content": lambda body: (204, b""),
    "moved": lambda body: (307, b""),
    "busy": lambda body: (429, {"error": "busy"}),
    "broken": lambda body: (500, b"\xff"),
    "another model": lambda body: (404, {"error": "no such model"}),
    "too large": lambda body: (200, b" " * 300_000),
}


@pytest.mark.parametrize("way", ODD)
def test_what_a_server_says_of_tokens_is_checked(fakes, tokenizer, monkeypatch, way):
    """B4: the odd one is lost by its URL, and the good one beside it samples its turns; alone, it
    ends the run with one sentence that names it."""
    monkeypatch.setattr(server_engine, "EVERY", 0.02)
    monkeypatch.setattr(http, "BIGGEST", 200_000)
    odd, good = fakes()
    honest = odd.completion
    odd.completion = lambda body: ODD[way](honest(body)[1])
    few = EXAMPLES[:4]
    with engine_of((odd, good), tokenizer, timeout=20) as engine:
        played = play(engine, tokenizer, samples=2, examples=few)
        lost = [line for line in engine.events if f"{odd.url} was lost" in line]
    with engine_of((good,), tokenizer, timeout=20) as engine:
        assert [t.ids for t in played] == [
            t.ids for t in play(engine, tokenizer, samples=2, examples=few)
        ]
    assert lost and len(played) == 8
    with engine_of((odd,), tokenizer, timeout=20) as engine:
        with pytest.raises(UserError, match=f"{odd.url}") as caught:
            play(engine, tokenizer, samples=2, examples=few)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_turn_that_no_server_can_answer_ends_the_run(fakes, tokenizer, monkeypatch):
    """B4: not a server each time it comes back, for ever, though all other turns are well."""
    monkeypatch.setattr(server_engine, "EVERY", 0.02)
    one, two = fakes()
    for server in (one, two):
        server.completion = _odd_at(server.completion, [5, 6])
    with engine_of((one, two), tokenizer, timeout=20) as engine:

        async def turns():
            others = asyncio.create_task(_ask_often(engine, [7, 8]))
            try:
                await engine.generate([5, 6], [], Sampling(max_new_tokens=3))
            finally:
                others.cancel()

        with pytest.raises(UserError, match="no server is left|one turn has had 5 answers"):
            run_blocking(turns())


def _odd_at(honest, prompt):
    def completion(body):
        code, said = honest(body)
        return with_logprob(None)(said) if body["prompt"] == prompt else (code, said)

    return completion


async def _ask_often(engine, ids):
    while True:
        await engine.generate(ids, [], Sampling(max_new_tokens=3))
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("how", ["completions", "everything else"])
def test_a_server_that_is_well_and_samples_nothing_is_lost(fakes, tokenizer, monkeypatch, how):
    """B4: its turns go to the other, and do not end as late."""
    monkeypatch.setattr(server_engine, "EVERY", 0.02)
    monkeypatch.setattr(server_engine, "PATIENCE", 1.0)
    odd, good = fakes()
    woken = threading.Event()
    said = odd.said

    def hanging(path, body):
        if path == "/v1/completions" or (how != "completions" and path != "/health"):
            woken.wait(120)
        return said(path, body)

    with engine_of((odd, good), tokenizer, timeout=60) as engine:
        odd.said = hanging
        assert len(play(engine, tokenizer)) == 64
        assert any(f"{odd.url} was lost" in line for line in engine.events)
    with engine_of((good,), tokenizer, timeout=60) as engine:
        good.said = lambda path, body: (
            (woken.wait(120), {}) if path == "/v1/completions" else (200, {"tokens": 3, "data": 4})
        )
        with pytest.raises(UserError, match=f"no server is left that can be used .{good.url}"):
            play(engine, tokenizer)
    woken.set()


@pytest.mark.parametrize(
    "path, answer",
    [
        ("/v1/models", {"data": []}),
        ("/v1/models", {"data": [{"id": 3}]}),
        ("/v1/models", {"data": [{"id": "a", "parent": "b"}]}),
        ("/v1/models", {"data": [{"id": "a", "max_model_len": "many"}]}),
        ("/v1/models", b"<html>"),
        ("/tokenize", {"tokens": None}),
        ("/tokenize", {"tokens": ["a"]}),
        ("/tokenize", b"{"),
    ],
)
def test_what_a_server_says_of_itself_is_checked(fakes, tokenizer, monkeypatch, path, answer):
    """B4: at the start, and when it comes back."""
    monkeypatch.setattr(server_engine, "EVERY", 0.02)
    odd, good = fakes()
    said = odd.said
    odd.said = lambda asked, body: (200, answer) if asked == path else said(asked, body)
    with engine_of((odd, good), tokenizer, timeout=20) as engine:
        assert len(play(engine, tokenizer)) == 64
        assert any(f"{odd.url} cannot be used yet" in line for line in engine.events)
    with pytest.raises(UserError, match=f"no server is left that can be used .{odd.url}: "):
        run_blocking(server_engine.start((odd.url,), "x", tokenizer, 20.0))


@pytest.mark.parametrize(
    "odd",
    [
        None,
        [None, {"6": {"logprob": -1.0}}],
        [None, {"9": {"logprob": -1.0}}, {"7": {"logprob": -1.0}}],
        [None, {"6": {"logprob": float("nan")}}, {"7": {"logprob": -1.0}}],
        [None, {"6": {"logprob": 2.0}}, {"7": {"logprob": -1.0}}],
        [None, {"6": None}, {"7": {"logprob": -1.0}}],
    ],
)
def test_the_logprobs_of_a_prompt_are_checked(fakes, tokenizer, odd):
    """B4."""
    one, two = fakes()
    honest = one.completion
    one.completion = lambda body: changed(prompt_logprobs=odd)(honest(body)[1])
    with engine_of((one, two), tokenizer) as engine:
        assert run_blocking(engine.prompt_logprobs([5, 6, 7])) == [[-6.0, -7.0]]
        assert any(f"{one.url} was lost" in line for line in engine.events)


def test_a_server_that_was_given_up_is_asked_again_when_it_was_started_anew(
    fakes, tokenizer, monkeypatch
):
    """B4."""
    monkeypatch.setattr(server_engine, "EVERY", 0.02)
    odd, good = fakes()
    honest = odd.completion
    odd.completion = lambda body: with_logprob(None)(honest(body)[1])
    with engine_of((odd, good), tokenizer, timeout=20) as engine:
        for _ in range(server_engine.STRIKES):
            until(lambda: engine.servers[0].alive)
            engine.homes.clear()  # or all turns stay with the good one
            play(engine, tokenizer, samples=1)
        assert any("is given up" in line for line in engine.events)
        odd.broken = 503
        until(lambda: engine.servers[0].strikes == 0)
        odd.broken = 0
        odd.completion = honest
        wait_for_line(engine, "is back")


def test_each_server_is_scored_so_that_an_odd_one_is_seen(fakes, tokenizer):
    one, two = fakes()
    with engine_of((one, two), tokenizer) as engine:
        assert run_blocking(engine.prompt_logprobs([5, 6, 7])) == [[-6.0, -7.0]] * 2
        honest = two.completion
        two.completion = lambda body: _louder(honest(body))
        assert run_blocking(engine.prompt_logprobs([5, 6, 7])) == [[-6.0, -7.0], [-12.0, -14.0]]


def _louder(answer):
    code, said = answer
    for seen in said["choices"][0].get("prompt_logprobs", [None])[1:]:
        for value in seen.values():
            value["logprob"] *= 2
    return code, said


def test_a_turn_keeps_its_adapter_while_the_next_one_is_loaded(fakes, tokenizer):
    """Pitfall 32."""
    (one,) = fakes(1)
    with engine_of([one], tokenizer) as engine:
        run_blocking(engine.sync(Adapted(), 1))
        first = engine.name
        answered, begun = one.completion, threading.Event()

        def held(body):
            begun.set()
            if body["model"] == first:
                assert until(lambda: len(one.adapters) == 2)  # the next one has been loaded
            return answered(body)

        one.completion = held

        async def both():
            turn = asyncio.create_task(engine.generate([5, 6], [], Sampling(max_new_tokens=2)))
            assert await asyncio.to_thread(begun.wait, PATIENCE)
            await engine.sync(Adapted(), 2)
            assert turn.done()  # before its adapter is dropped
            await engine.generate([5, 6], [], Sampling(max_new_tokens=2))

        run_blocking(both())
        assert first != engine.name and one.adapters == [engine.name]
        assert one.models[-1] == engine.name and first in one.models


def test_nobody_samples_before_all_servers_have_the_adapter(fakes, tokenizer):
    """Pitfall 36: the first to have it waits for the last."""
    one, two = fakes()
    quick, go = two.said, threading.Event()
    two.said = lambda path, body: (
        not path.startswith("/v1/load") or go.wait(60),
        quick(path, body),
    )[1]
    with engine_of((one, two), tokenizer) as engine:

        async def both():
            sync = asyncio.create_task(engine.sync(Adapted(), 1))
            while not one.adapters:
                assert not sync.done(), sync.exception()
                await asyncio.sleep(0.01)
            how = [Sampling(max_new_tokens=2, session=n) for n in range(8)]
            turns = [asyncio.create_task(engine.generate([5, 6], [], h)) for h in how]
            await asyncio.sleep(0.2)
            assert not any(turn.done() for turn in turns) and not two.adapters
            go.set()
            await asyncio.gather(sync, *turns)

        run_blocking(both())
        assert one.adapters == two.adapters == [engine.name]
        assert set(one.models) == set(two.models) == {engine.name}


# Images


@pytest.fixture(params=["qwen3_vl", "smolvlm"])
def vision(request):
    tokenizer = eyes.tokenizer_of(request.param)
    config = eyes.config_of(request.param, tokenizer)
    family = FAMILIES[request.param]
    return Vision(config, family, eyes.processor_of(request.param), tokenizer)


@contextlib.contextmanager
def seeing(servers, vision, has_images=True):
    urls = tuple(server.url for server in servers)
    starting = server_engine.start(
        urls, "nowhere", vision.tokenizer, PATIENCE, 512, vision, has_images
    )
    engine = run_blocking(starting)
    try:
        yield engine
    finally:
        run_blocking(engine.close())


def shown_two(vision):
    """The ids of a prompt with two pictures, and these."""
    pictures = [vision.prepare(eyes.picture(1)), vision.prepare(eyes.picture(2, 70, 90))]
    text = vision.tokenizer.encode("look: ")
    one = [vision.placeholder]
    return vision.expand(text + one + text + one + text, pictures), pictures


def test_images_are_sent_as_they_were_shown_and_their_ids_confirmed(vision):
    """Pitfall 44: one placeholder each goes out, the trainer's own ids come back."""
    (server,) = [Fake(vision.tokenizer)]
    server.vision = vision
    ids, pictures = shown_two(vision)
    with seeing([server], vision) as engine:
        how = Sampling(temperature=0.7, max_new_tokens=3, seed=5, stop_ids=(2,))
        out = run_blocking(engine.generate(ids, pictures, how))
        assert len(out.ids) == 3 and out.logprobs == [-0.5] * 3 and out.finish == "length"
        assert [p.key for p in server.pictures] == [p.key for p in pictures]
        body = server.bodies[-1]
        assert body["temperature"] == 0.7 and body["top_k"] == 0 and body["stop_token_ids"] == [2]
        (scores,) = run_blocking(engine.prompt_logprobs(ids, pictures))
        assert scores == [-float(token) for token in ids[1:]]
        text = run_blocking(engine.generate([1, 2, 3], [], how))
        assert text.ids and server.seen["/v1/completions"] == 1
    server.die()


def test_servers_that_show_no_images_are_refused(vision):
    """At the start where rows have some, else when the first one comes; text goes on."""
    server = Fake(vision.tokenizer)
    ids, pictures = shown_two(vision)
    with pytest.raises(UserError, match="disabled.*start it with --enable-scale-out"):
        with seeing([server], vision):
            pass
    with seeing([server], vision, has_images=False) as engine:
        assert run_blocking(engine.generate([1, 2, 3], [], Sampling(max_new_tokens=2))).ids
        with pytest.raises(UserError, match="start it with --enable-scale-out"):
            run_blocking(engine.generate(ids, pictures, Sampling(max_new_tokens=2)))
    server.die()


def test_a_server_with_other_tokens_for_an_image_is_refused(vision):
    """Its processor is set otherwise: known at the start, and at each request."""
    server = Fake(vision.tokenizer)
    honest = vision
    server.vision = types.SimpleNamespace(
        prepare=honest.prepare, expand=lambda ids, pictures: honest.expand(ids, pictures)[1:]
    )
    with pytest.raises(UserError, match="tokens for an image that the trainer has"):
        with seeing([server], vision):
            pass
    server.vision = honest
    ids, pictures = shown_two(vision)
    with seeing([server], vision) as engine:
        server.vision = types.SimpleNamespace(
            prepare=honest.prepare, expand=lambda ids, pictures: ids
        )
        engine.timeout = 3.0  # it does not come back
        with pytest.raises(UserError, match="confirms other token ids"):
            run_blocking(engine.generate(ids, pictures, Sampling(max_new_tokens=2)))
    server.die()


def test_what_servers_would_resize_once_more_is_refused():
    tokenizer = eyes.tokenizer_of("smolvlm")
    processor = eyes.processor_of("smolvlm")
    processor.do_image_splitting = False
    config = eyes.config_of("smolvlm", tokenizer)
    vision = Vision(config, FAMILIES["smolvlm"], processor, tokenizer)
    with pytest.raises(UserError, match="resize images once more.*use engine=vllm"):
        server_engine.probe_of(vision)

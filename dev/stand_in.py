"""Answers what engines/servers.py asks of `vllm serve`, with transformers: for tests and benches,
where vLLM is not installed, or takes too long to start.

    python dev/stand_in.py --model=out/calc_sft --port=8000
    python train_grpo.py --config calc.py --engine=server --urls=http://127.0.0.1:8000

Weights and adapters are taken as vLLM takes them. One turn is sampled at a time, so equal requests
get equal bits whoever else asks; with --batched=true many at once, which is quicker.
"""

import argparse
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from engines.base import Sampling  # noqa: E402
from engines.local import TransformersEngine  # noqa: E402
from engines.worker import received  # noqa: E402
from learning import model as models  # noqa: E402
from run.loop import run_blocking  # noqa: E402

BASE = "base"


class Served:
    """The model, and what it was given."""

    def __init__(self, folder: str, is_batched: bool):
        self.base, self.tokenizer = models.load(folder, "none", device="cpu")
        self.engine = TransformersEngine(self.base, self.tokenizer, deterministic=False)
        # sampling one by one, and never while weights are exchanged
        self.one_by_one = threading.Lock() if not is_batched else None
        self.exchange = threading.Lock()
        self.adapters = {}  # name: a model that multiplies with it
        self.weights_name = ""
        self.folder = folder

    def answer(self, path: str, body: dict) -> tuple[int, dict | str]:
        """Answers a request: (status, JSON)."""
        if path == "/v1/models":
            cards = [{"id": BASE, "parent": None, "max_model_len": 4096}]
            cards += [{"id": name, "parent": BASE} for name in self.adapters]
            return 200, {"data": cards}
        if path == "/tokenize":
            ids = self.tokenizer.encode(body["prompt"], add_special_tokens=False)
            return 200, {"tokens": ids}
        if path == "/collective_rpc":
            return 200, {"results": [self.call_worker(body["method"], body["args"])]}
        if path == "/v1/load_lora_adapter":
            return self.load_adapter(body["lora_name"], body["lora_path"])
        if path == "/v1/unload_lora_adapter":
            self.adapters.pop(body["lora_name"])
            return 200, "Success"
        if path == "/v1/completions":
            return self.complete(body)
        return 200, {}

    def call_worker(self, method: str, arguments: list[str]):
        """Does what engines/worker.py does."""
        if method == "what_it_has":
            return {"name": self.weights_name, "reads": Path(arguments[0]).exists()}
        name = arguments[-1]
        with self.exchange:
            if name != self.weights_name:
                if method == "receive_weights":
                    transport, address, port, _ = arguments
                    weights = dict(received(transport, address, int(port), "cpu"))
                else:
                    weights = load_file(arguments[0])
                missing, unknown = self.base.load_state_dict(weights, strict=False)
                assert not unknown, unknown
                self.base.tie_weights()
                self.weights_name = name
        return None

    def load_adapter(self, name: str, folder: str) -> tuple[int, dict | str]:
        from peft import PeftModel

        with self.exchange:
            if name in self.adapters:
                return 400, {"message": f"The lora adapter '{name}' has already been loaded."}
            base, _ = models.load(self.folder, "none", device="cpu")
            self.adapters[name] = PeftModel.from_pretrained(base, folder)
        return 200, "Success"

    def complete(self, body: dict) -> tuple[int, dict]:
        if body["model"] != BASE and body["model"] not in self.adapters:
            return 404, {"message": f"The model `{body['model']}` does not exist."}
        model = self.adapters.get(body["model"], self.base)
        if self.one_by_one is None and model is self.engine.model:
            return 200, {"choices": [self.choice(body)]}
        with self.one_by_one or self.exchange:
            if model is not self.engine.model:
                run_blocking(self.engine.sync(model, 0))
            return 200, {"choices": [self.choice(body)]}

    def choice(self, body: dict) -> dict:
        """Samples the one choice of a completion."""
        ids = body["prompt"]
        sampling = Sampling(
            temperature=body["temperature"],
            max_new_tokens=body["max_tokens"],
            seed=body.get("seed", 0),
            stop_ids=tuple(body.get("stop_token_ids", ())),
            stop_strings=tuple(body.get("stop", ())),
        )
        done = run_blocking(self.engine.generate(ids, [], sampling))
        choice = {"prompt_token_ids": ids, "token_ids": done.ids, "finish_reason": "length"}
        choice["stop_reason"] = None
        if done.finish != "length":
            choice["finish_reason"] = "stop"
        if done.finish == "stop_string":
            text = self.tokenizer.decode(done.ids)
            choice["stop_reason"] = next(s for s in sampling.stop_strings if s in text)
        choice["logprobs"] = {"token_logprobs": done.logprobs}
        if body.get("logprobs"):
            choice["logprobs"]["top_logprobs"] = [self.best(ids, sampling.temperature)]
        if body.get("prompt_logprobs") is not None:
            [scores] = run_blocking(self.engine.prompt_logprobs(ids))
            scored = zip(ids[1:], scores, strict=True)
            by_token = [{str(token): {"logprob": score}} for token, score in scored]
            choice["prompt_logprobs"] = [None, *by_token]
        return choice

    @torch.inference_mode()
    def best(self, ids: list[int], temperature: float) -> dict[str, float]:
        """Computes the logprobs of the two best tokens behind a prompt."""
        logits = self.engine.model(input_ids=torch.tensor([ids])).logits[0, -1]
        logprobs, tokens = (logits / temperature).log_softmax(-1).topk(2)
        pairs = zip(tokens.tolist(), logprobs.tolist(), strict=True)
        return {str(token): score for token, score in pairs}


def handler_of(served: Served) -> type:
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
            status, said = served.answer(self.path, body)
            text = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    return Handler


class Server(ThreadingHTTPServer):
    request_queue_size = 512
    daemon_threads = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--batched", choices=("true", "false"), default="false")
    arguments = parser.parse_args()
    served = Served(arguments.model, arguments.batched == "true")
    Server(("127.0.0.1", arguments.port), handler_of(served)).serve_forever()


if __name__ == "__main__":
    main()

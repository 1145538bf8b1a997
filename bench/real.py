"""Tokens per second of a real language model on this machine: our default engine, beside
transformers' own `generate` and vLLM.

    make real                                          # makes out/smollm2, among other things
    python bench/real.py                               # some minutes on two cores
    python bench/real.py --engines=ours,generate       # without vLLM
    python bench/real.py --save_to=evidence/bench/real.json

All sample the same number of new tokens behind the same prompts, problems of task:calc with the
python tool described, from the whole distribution at temperature 1, in float32; the time is that of
the prompts too. Once all rows have different prompts, and once they are groups of 8 samples of a
prompt, as in training: ours reads the prompt of a group once. Each engine is a process of its own,
one of them works at a time, and they take turns: what else the machine does meets all alike. The
medians count.
"""

import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)

import torch

from chat import Chat
from engines import vllm as vllm_engine
from engines.base import Sampling
from engines.local import TransformersEngine
from learning import model as models
from learning.batches import pad
from run.config import UserError
from run.loop import run_blocking
from tasks import calc
from tools import Toolbox
from tools.python import python

LEAST_RATIO = 1.3  # ours, of generate's tokens per second, with the most rows
ENGINES = ("ours", "generate", "vllm")


@dataclass
class Config:
    model: str = "out/smollm2"  # a folder or hub id
    engines: tuple[str, ...] = ENGINES
    rows: tuple[int, ...] = (8, 32)  # that are sampled at once
    groups: tuple[int, ...] = (1, 8)  # samples of each prompt
    new_tokens: int = 128  # of a row
    runs: int = 5  # of each engine with each number of rows
    save_to: str = ""  # a .json for the results
    part: str = ""  # for the subprocesses: one of the engines


def check(cfg: Config) -> None:
    """Checks the rules across keys."""
    for engine in (*cfg.engines, cfg.part):
        if engine not in (*ENGINES, ""):
            raise UserError(f"engines = {engine!r}: expected some of {', '.join(ENGINES)}")
    for rows in cfg.rows:
        for group in cfg.groups:
            if rows < 1 or group < 1 or rows % group:
                raise UserError(f"rows = {rows} cannot be divided into groups of {group}")
    config.require_positive(cfg, "new_tokens runs")


def prompts_of(chat: Chat, rows: int, group: int, seed: int) -> list[list[int]]:
    """Encodes the problems of so many rows, each `group` times."""
    prompts = []
    for row in calc.rows("test", seed, rows // group):
        system = {"role": "system", "content": "Give the answer in \\boxed{}."}
        prompt = chat.prompt([system, {"role": "user", "content": row["prompt"]}])
        prompts += [prompt] * group
    return prompts


# ---- the engines: each a function of (prompts, new_tokens, seed) that samples


def through_engine(engine):
    """Samples as a rollout does: all rows ask at once."""

    async def sample_all(prompts, new_tokens, seed):
        for _ in prompts:
            engine.join()
        requests = []
        for number, ids in enumerate(prompts):
            sampling = Sampling(1.0, new_tokens, seed=1000 * seed + number)
            requests.append(engine.generate(ids, [], sampling))
        completions = await asyncio.gather(*requests)
        for _ in prompts:
            engine.leave()
        return [len(completion.ids) for completion in completions]

    return lambda *arguments: run_blocking(sample_all(*arguments))


def through_generate(model):
    """Samples by transformers' generate, padded on the left."""

    def sample_all(prompts, new_tokens, seed):
        torch.manual_seed(seed)
        out = model.generate(
            pad(prompts, on_left=True),
            attention_mask=pad([[1] * len(prompt) for prompt in prompts], on_left=True),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        width = max(map(len, prompts))
        return [len(row) - width for row in out]

    return sample_all


def serve(cfg: Config) -> None:
    """Measures what each line of the standard input asks for: rows, their groups and a seed."""
    if cfg.part == "vllm":
        tokenizer = models.load_tokenizer(cfg.model)
        engine = run_blocking(vllm_engine.start(cfg.model, max_model_len=512))
        sample_all = through_engine(engine)
    else:
        model, tokenizer = models.load(cfg.model)
        engine = TransformersEngine(model, tokenizer) if cfg.part == "ours" else None
        sample_all = through_engine(engine) if engine else through_generate(model)
    chat = Chat(tokenizer, "fence", Toolbox([python]).schemas)
    tell({"ready": cfg.part})
    for line in sys.stdin:
        rows, group, seed = json.loads(line)
        prompts = prompts_of(chat, rows, group, seed)
        started = time.perf_counter()
        lengths = sample_all(prompts, cfg.new_tokens, seed)
        seconds = time.perf_counter() - started
        if lengths != [cfg.new_tokens] * rows:
            raise RuntimeError(f"expected {cfg.new_tokens} new tokens of each row, got {lengths}")
        tell({"seconds": seconds})
    if engine:
        run_blocking(engine.close())


def tell(result: dict) -> None:
    """Writes a line for the parent, which knows it by its first letters: vLLM prints, too."""
    print("RESULT " + json.dumps(result), flush=True)


# ---- the parent


class Part:
    """An engine in a process of its own."""

    def __init__(self, engine: str, argv: list[str]):
        command = [sys.executable, __file__, *argv, f"--part={engine}"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.engine = engine
        self.process = subprocess.Popen(command, **pipes)
        self.read()  # it is ready

    def ask(self, rows: int, group: int, seed: int) -> float:
        """Returns the seconds that it took."""
        self.process.stdin.write(json.dumps([rows, group, seed]) + "\n")
        self.process.stdin.flush()
        return self.read()["seconds"]

    def read(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise UserError(f"{self.engine} ended with exit code {self.process.wait()}: see above")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(cfg: Config, argv: list[str]) -> list[dict]:
    """Measures all engines by turns; prints and returns the tokens per second of each run."""
    print(f"tokens per second, medians of {cfg.runs}, {cfg.new_tokens} new tokens a row")
    parts = []
    results = []
    try:
        for engine in cfg.engines:
            parts.append(Part(engine, argv))
        for rows, group in itertools.product(cfg.rows, cfg.groups):
            speeds = {engine: [] for engine in cfg.engines}
            for seed in range(cfg.runs + 1):  # other prompts every time: no cache has them
                for part in parts:
                    seconds = part.ask(rows, group, seed)
                    if seed:  # the first is for warming up
                        speeds[part.engine].append(round(rows * cfg.new_tokens / seconds, 1))
            results.append({"rows": rows, "group": group, "tokens_per_second": speeds})
            report(cfg, results[-1])
    finally:
        for part in parts:
            part.close()
    return results


def report(cfg: Config, result: dict) -> None:
    """Prints a line for all engines."""
    line = f"{result['rows']:>4} rows, groups of {result['group']}:"
    medians = {}
    for engine, runs in result["tokens_per_second"].items():
        medians[engine] = statistics.median(runs)
        line += f"  {engine} {medians[engine]:.1f} ({min(runs):.1f} - {max(runs):.1f})"
    if "ours" in medians and "generate" in medians:
        line += f"  ours / generate {medians['ours'] / medians['generate']:.2f}"
        if result["rows"] == max(cfg.rows):
            line += f" (aim: {LEAST_RATIO})"
    print(line, flush=True)


def main(argv: list[str]) -> None:
    cfg = config.parse(Config, argv, check)
    if cfg.part:
        serve(cfg)
        return
    results = compare(cfg, argv)
    if cfg.save_to:
        about = {"cores": os.cpu_count(), "torch": torch.__version__, "model": cfg.model}
        about |= {"new_tokens": cfg.new_tokens, "results": results}
        Path(cfg.save_to).parent.mkdir(parents=True, exist_ok=True)
        Path(cfg.save_to).write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    config.main(main)

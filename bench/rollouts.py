"""Rollouts on vLLM: what the loop costs, and what slow tools cost, beside TRL.

    python bench/rollouts.py                      # ten minutes on two cores, half of it TRL
    python bench/rollouts.py --trl=false          # without that
    python bench/rollouts.py --save_to=evidence/bench/rollouts.json

The model is tiny and random (on a GPU: give one with --model=...). A parser that takes every turn
for a call of the tool `wait` stands in for a model that calls tools; all else is what training
runs: vLLM, the template, the loop, the tool box.

(a) No tools: trained tokens per second through rollouts(), and of vLLM itself on the same prompts,
    asked for by a plain asyncio.gather with the same seeds. By turns, medians.
(b) 64 trajectories with two tool turns, each call taking 0.2 to 2 s (uniform, drawn from what the
    turn says, so that a trajectory has the same calls when it is alone): wall time of all, beside
    the slowest of them alone.
(c) The same through TRL's GRPOTrainer (its own generation, with transformers), with the tool
    synchronous and asynchronous.
(d) (b) for more and more trajectories, also as a curve.
"""

import asyncio
import hashlib
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)

from trl_side import arguments, in_subprocess, save

from chat import Chat
from engines import vllm as vllm_engine
from engines.base import Sampling
from formats import Call
from learning import model as models
from rollout import Settings, rollouts, seed_of
from run.config import UserError
from run.loop import run_blocking
from tasks import tiny as tiny_model
from tools import Toolbox

LEAST_LOOP_RATIO = 0.9  # (a): tokens per second through rollouts(), of vLLM's own
MOST_WALL_RATIO = 1.25  # (b): wall time of all, of the slowest alone


@dataclass
class Config:
    model: str = ""  # a folder or hub id; "" makes a random one of 4 M parameters
    trajectories: int = 64  # of (b) and (c), in groups of 8
    counts: tuple[int, ...] = (8, 16, 32, 64, 128, 256)  # trajectories of (d)
    prompts: int = 256  # of (a)
    new_tokens: int = 100  # of a turn in (a); with tools it has 32 on average, in TRL just 32
    runs: int = 5  # of (a)
    enforce_eager: bool = False
    trl: bool = True  # (c) takes some minutes
    save_to: str = ""  # a .json for the results; (d) is drawn beside it
    part: str = ""  # for the subprocesses: sync or async


def seconds_of(text: str) -> float:
    """Draws 0.2 to 2, the same for the same text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return 0.2 + 1.8 * int.from_bytes(digest, "big") / 2**64


async def wait_a_while(seconds: float) -> str:
    """Waits.

    Args:
        seconds: how long
    """
    await asyncio.sleep(seconds)
    return "done"


class Caller(Chat):
    """Takes every turn for a call of the tool. One token in 32 ends a turn: a random model would
    say none of the usual ones, and a turn that is cut by its limit calls nothing."""

    def __init__(self, tokenizer, format_name, schemas):
        super().__init__(tokenizer, format_name, schemas)
        self.stop_ids = tuple(range(7, len(tokenizer), 32))

    def parse(self, ids):
        text, _ = super().parse(ids)
        return text, [Call("wait_a_while", {"seconds": seconds_of(f"{ids}")})]


def examples(count: int) -> list[dict]:
    rows = []
    for n in range(count):
        question = (
            f"Look up what is asked, then answer. Question {n}: "
            f"what is known about the number {7 * n}?"
        )
        message = {"role": "user", "content": question}
        rows.append({"messages": [message], "answer": "", "id": n})
    return rows


def plain_model(folder: Path) -> str:
    """Writes a random model of 4 M parameters, Qwen3-shaped, with the tokenizer of the tiny
    tasks."""
    box = Toolbox([wait_a_while])
    answer = {"role": "assistant", "content": "ok"}
    conversations = [[*example["messages"], answer] for example in examples(64)]
    tokenizer = tiny_model.tiny_tokenizer(conversations, box.schemas)
    model = tiny_model.tiny(tokenizer, 0, hidden_size=256, layers=4, heads=4)
    models.save(model, tokenizer, folder)
    return str(folder)


# -- (a)


def loop_cost(cfg: Config, engine, tokenizer) -> dict:
    """Measures (a); returns medians of tokens per second, their ratio, and all of them."""
    chat = Chat(tokenizer, "hermes", [])
    rows = examples(cfg.prompts)
    settings = Settings(max_new_tokens=cfg.new_tokens, max_tokens=2048, max_turns=1)

    def ours() -> int:
        played = run_blocking(rollouts(rows, chat, engine, Toolbox([]), settings))
        return sum(t.new_tokens for t in played)

    def raw() -> int:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        async def sample(i: int, prompt: list[int]) -> int:
            params = SamplingParams(
                temperature=1.0,
                seed=seed_of(settings.seed, 0, i, 0, 0),
                max_tokens=cfg.new_tokens,
                stop_token_ids=list(chat.stop_ids),
                ignore_eos=True,
                detokenize=False,
                logprobs=0,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            request = {"prompt_token_ids": prompt}
            request_id = f"raw {time.monotonic_ns()} {i}"
            async for output in engine.llm.generate(request, params, request_id):
                last = output
            return len(last.outputs[0].token_ids)

        async def sample_all() -> int:
            prompts = [chat.prompt(row["messages"]) for row in rows]
            turns = [sample(i, prompt) for i, prompt in enumerate(prompts)]
            return sum(await asyncio.gather(*turns))

        return run_blocking(sample_all())

    speeds = {"ours": [], "raw": []}  # tokens per second
    counts = set()  # tokens of a run
    for run in range(cfg.runs + 1):
        for name, way in (("raw", raw), ("ours", ours)):
            run_blocking(engine.llm.reset_prefix_cache())
            started = time.perf_counter()
            count = way()
            counts.add(count)
            if run > 0:  # the first warms up
                speeds[name].append(count / (time.perf_counter() - started))
    if len(counts) != 1:
        raise UserError(f"the two ways sampled different numbers of tokens: {counts}")
    ours_median = statistics.median(speeds["ours"])
    raw_median = statistics.median(speeds["raw"])
    return {
        "ours": ours_median,
        "raw": raw_median,
        "ratio": ours_median / raw_median,
        "tokens": counts.pop(),
        "all": speeds,
    }


# -- (b) and (d)


def play(engine, tokenizer, count: int) -> tuple[float, list]:
    """Plays `count` trajectories, in groups of 8; returns the seconds and the trajectories."""
    box = Toolbox([wait_a_while], 1024, 60.0)
    chat = Caller(tokenizer, "hermes", box.schemas)
    rows = examples(count // 8)
    started = time.perf_counter()
    played = run_blocking(rollouts(rows, chat, engine, box, settings(count), samples=8))
    assert all(len(t.calls) == 2 for t in played), "every trajectory has two calls"
    return time.perf_counter() - started, played


def settings(count: int) -> Settings:
    """Returns those of (b) and (d), for so many trajectories at once."""
    return Settings(
        max_new_tokens=512,
        max_tokens=2048,
        max_turns=2,
        final_turn=True,
        max_concurrent=count,
    )


def alone(engine, tokenizer, trajectory) -> float:
    """Plays one of them again while nothing else runs, with the same prompt, seeds and calls;
    returns the seconds."""
    from rollout import play as play_one
    from trajectory import Trajectory

    box = Toolbox([wait_a_while], 1024, 60.0)
    chat = Caller(tokenizer, "hermes", box.schemas)
    again = Trajectory(trajectory.example, trajectory.group, trajectory.sample)
    prompt = chat.prompt(trajectory.example["messages"])
    started = time.perf_counter()
    run_blocking(play_one(again, prompt, chat, engine, box, settings(1)))
    if again.ids != trajectory.ids:
        raise UserError("a trajectory alone is not what it was among others")
    return time.perf_counter() - started


def slow_tools(cfg: Config, engine, tokenizer) -> dict:
    """Measures (b); returns medians of three runs, their ratio, and all of them."""
    play(engine, tokenizer, 8)  # warms up
    walls = []  # seconds of all
    slowest = []  # seconds of the slowest, alone
    for _ in range(3):
        wall, played = play(engine, tokenizer, cfg.trajectories)
        walls.append(wall)
        longest = max(played, key=lambda t: sum(call.seconds for call in t.calls))
        slowest.append(alone(engine, tokenizer, longest))
    wall = statistics.median(walls)
    slowest_alone = statistics.median(slowest)
    return {
        "wall": wall,
        "slowest_alone": slowest_alone,
        "waited_in_all": sum(call.seconds for t in played for call in t.calls),
        "ratio": wall / slowest_alone,
        "walls": walls,
        "alone": slowest,
    }


def growth(cfg: Config, engine, tokenizer) -> list[dict]:
    """Measures (d); returns a row for each number of trajectories."""
    rows = []
    for count in cfg.counts:
        walls = [play(engine, tokenizer, count)[0] for _ in range(3)]
        rows.append({"trajectories": count, "seconds": statistics.median(walls), "all": walls})
    return rows


# -- (c)


def trls(cfg: Config) -> dict:
    """Runs, in a subprocess, TRL's own generation of the same trajectories, once."""
    import trl.trainer.grpo_trainer as theirs
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.chat_template_utils import qwen3_template

    def synchronous(seconds: float) -> str:
        """Waits.

        Args:
            seconds: how long
        """
        time.sleep(seconds)
        return "done"

    tool = wait_a_while if cfg.part == "async" else synchronous
    tool.__name__ = "wait_a_while"

    def parse(tokenizer, ids, *_, **__):
        function = {"name": "wait_a_while", "arguments": {"seconds": seconds_of(f"{ids}")}}
        call = {"type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}

    theirs.parse_response = parse
    tokenizer = AutoTokenizer.from_pretrained(cfg.model)
    tokenizer.response_template = qwen3_template
    rows = [{"prompt": row["messages"]} for row in examples(cfg.trajectories // 8)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = theirs.GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(cfg.model, dtype="float32"),
            lambda completions, **_: [0.0] * len(completions),
            args=arguments(
                folder,
                1,
                cfg.trajectories,
                cfg.trajectories,
                1e-6,
                max_completion_length=1024,
                generation_kwargs={"max_new_tokens": 32},
                max_tool_calling_iterations=2,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            tools=[tool],
        )
        prompts = [list(row["prompt"]) for row in rows for _ in range(8)]
        # which its training step sets, for each rollout, before it generates
        synchronous_tools = {}
        asynchronous_tools = {}
        if cfg.part == "async":
            asynchronous_tools["wait_a_while"] = tool
        else:
            synchronous_tools["wait_a_while"] = tool
        trainer._sync_tool_dicts = [synchronous_tools] * len(prompts)
        trainer._async_tool_dicts = [asynchronous_tools] * len(prompts)
        started = time.perf_counter()
        trainer._generate(prompts)
    return {"seconds": time.perf_counter() - started}


def beside_trl(cfg: Config, model: str, wall: float) -> dict:
    """Measures (c). wall: seconds of ours."""
    measured = {}
    for kind in ("sync", "async"):
        options = [f"--part={kind}", f"--model={model}", f"--trajectories={cfg.trajectories}"]
        seconds = in_subprocess(__file__, options)["seconds"]
        measured[kind] = seconds
        measured[f"{kind}_ratio"] = seconds / wall
    return measured


def draw(rows: list[dict], file: Path) -> None:
    """Draws (d)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    counts = [row["trajectories"] for row in rows]
    seconds = [row["seconds"] for row in rows]
    axes.plot(counts, seconds, marker="o", label="all at once")
    one_by_one = [seconds[0] * count / counts[0] for count in counts]
    axes.plot(counts, one_by_one, linestyle=":", color="grey", label="if each 8 waited")
    axes.set(xlabel="trajectories, two calls of 0.2 to 2 s each", ylabel="seconds", ylim=(0, None))
    axes.set_ylim(0, 4 * max(seconds))
    axes.legend()
    figure.savefig(file, dpi=150)


def main(argv: list[str]) -> None:
    cfg = config.parse(Config, argv)
    if cfg.part:
        print(json.dumps(trls(cfg)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = cfg.model or plain_model(Path(folder))
        tokenizer = models.load_tokenizer(model)
        starting = vllm_engine.start(
            model,
            enforce_eager=cfg.enforce_eager,
            max_model_len=2048,
            max_num_seqs=256,
            gpu_memory_utilization=0.5,
        )
        engine = run_blocking(starting)
        try:
            run_blocking(engine.generate([5, 6, 7], [], Sampling(max_new_tokens=4)))
            measured = measure(cfg, engine, tokenizer)
        finally:
            run_blocking(engine.close())
        if cfg.trl:
            c = beside_trl(cfg, model, measured["b"]["wall"])
            measured["c"] = c
            print(f"(c) TRL, synchronous tool: {c['sync']:.1f} s, {c['sync_ratio']:.1f} times ours")
            print(f"    asynchronous: {c['async']:.1f} s, {c['async_ratio']:.1f} times ours")
    if cfg.save_to:
        save(cfg.save_to, measured)
        draw(measured["d"], Path(cfg.save_to).with_suffix(".png"))
    loop_is_slow = measured["a"]["ratio"] < LEAST_LOOP_RATIO
    if loop_is_slow or measured["b"]["ratio"] > MOST_WALL_RATIO:
        raise SystemExit(1)


def measure(cfg: Config, engine, tokenizer) -> dict:
    """Measures (a), (b) and (d), and prints them as they are known."""
    a = loop_cost(cfg, engine, tokenizer)
    print(
        f"(a) {a['ours']:,.0f} tokens/s through rollouts(), {a['raw']:,.0f} of vLLM itself: "
        f"{a['ratio']:.3f} (at least {LEAST_LOOP_RATIO}); {a['tokens']:,} tokens each, "
        f"medians of {cfg.runs}"
    )
    b = slow_tools(cfg, engine, tokenizer)
    print(
        f"(b) {cfg.trajectories} trajectories: {b['wall']:.2f} s; the slowest alone: "
        f"{b['slowest_alone']:.2f} s; {b['ratio']:.3f} (at most {MOST_WALL_RATIO}); "
        f"their tools waited for \n    {b['waited_in_all']:.1f} s in all",
        flush=True,
    )
    d = growth(cfg, engine, tokenizer)
    print("(d) trajectories  seconds")
    for row in d:
        print(f"    {row['trajectories']:12d}  {row['seconds']:7.2f}", flush=True)
    return {"a": a, "b": b, "d": d}


if __name__ == "__main__":
    config.main(main)

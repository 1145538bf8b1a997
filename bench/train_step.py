"""One GRPO update on the same trajectories: ours beside that of TRL's GRPOTrainer.

    python bench/train_step.py                                        # three hours on two cores
    python bench/train_step.py --sizes=5m --batches=64,16,8           # 15 minutes
    python bench/train_step.py --sizes=60m --batches=2                # 40 minutes; 24 GB
    python bench/train_step.py --sizes=tiny --trajectories=16 --runs=1  # seconds, to try it

Equal: model (Qwen3-shaped, random weights, tied embeddings), optimizer (fused AdamW, betas 0.9 and
0.95), float32, threads, ids, masks and advantages; and so loss and gradient, which are compared.
64 trajectories in 8 groups, none of which is skipped; their lengths are log-normal (median 256)
within 64 to 1,024. A sixth of each is its prompt, a third a tool's result between two sampled
turns, half is trained on.

Not equal, since it is what is measured: ours fills micro-batches by a token budget, from
trajectories sorted by length, and makes logits of the trained tokens only. TRL pads all prompts on
the left and all completions on the right to the longest of the update, and makes logits of every
completion's tokens. How many rows it takes at once is tried out (`batches`), and the fastest is
compared with.

Ours is train_grpo.learn. TRL's is everything that GRPOTrainer.train does between on_step_begin and
on_step_end: only what it would have sampled and scored is put in its place. Each setting runs in a
process of its own: an update that is not timed, then `runs`; medians. Memory: the highest resident
size since the first update began, over the size then, so with gradients and optimizer states.
"""

import dataclasses
import json
import math
import random
import resource
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

import torch
from trl_side import arguments, in_subprocess, save

import train_grpo
from learning import optim
from learning.batches import pad
from loss import advantages
from run.config import UserError
from tasks import tiny as tiny_model
from trajectory import Trajectory

SIZES = {  # hidden size, layers, vocabulary, heads of 64
    "tiny": (64, 2, 512, 1),  # 0.14 M parameters
    "5m": (256, 4, 8192, 4),  # 5.5 M
    "60m": (512, 14, 32768, 8),  # 64.5 M
}
GROUP = 8
RATE = 1e-4


@dataclass
class Config:
    sizes: tuple[str, ...] = ("5m", "60m")  # of tiny, 5m, 60m
    trajectories: int = 64  # of an update; a multiple of 8
    runs: int = 5  # updates that are timed, after one that is not
    batches: tuple[int, ...] = (64, 16, 8, 4, 2)  # rows that TRL takes at once: the fastest counts
    token_budget: int = 2048  # tokens that ours takes at once, padding counted
    save_to: str = ""  # a .json for the results
    part: str = ""  # for the subprocesses: ours, trl:16, or check


def check(cfg: Config) -> None:
    if wrong := set(cfg.sizes) - set(SIZES):
        raise UserError(f"sizes: there is no {min(wrong)!r}; there are {', '.join(SIZES)}")
    config.require_positive(cfg, "trajectories runs token_budget")
    for name, divisor in [("trajectories", GROUP), *(("batches", b) for b in cfg.batches)]:
        if cfg.trajectories % divisor:
            raise UserError(
                f"{name}: {cfg.trajectories} trajectories cannot be divided by {divisor}"
            )


def model_of(size: str):
    """Random weights, the same each time."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, layers, vocabulary, heads = SIZES[size]
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=64,
            tie_word_embeddings=True,
        )
    )


def trajectories_of(size: str, count: int) -> list[Trajectory]:
    """Random tokens and rewards; a prompt, a turn, a tool's result, a turn."""
    rng, vocabulary = random.Random(0), SIZES[size][2]
    made = []
    for i in range(count):
        length = min(1024, max(64, round(math.exp(rng.gauss(math.log(256), 0.7)))))
        prompt, result = length // 6, length // 3
        first = (length - prompt - result) // 2
        second = length - prompt - first - result
        t = Trajectory({}, group=i // GROUP, sample=i % GROUP, stop="answered", reward=rng.random())
        for tokens, mask in ((prompt, 0), (first, 1), (result, 0), (second, 1)):
            if mask:
                t.turn_starts.append(len(t.ids))
            ids = [rng.randrange(3, vocabulary) for _ in range(tokens)]
            t.add(ids, mask, [-1.0] * tokens if mask else None)
        made.append(t)
    return made


# -- the two sides: a number of updates, told to a Watch


def ours(size: str, cfg: Config, updates: int, watch) -> None:
    """train_grpo.learn."""
    model, trajectories = model_of(size), trajectories_of(size, cfg.trajectories)
    settings = train_grpo.Config(learning_rate=RATE, token_budget=cfg.token_budget)
    optimizers = optim.optimizers(model, "adamw", RATE)
    optimizers[0].register_step_pre_hook(lambda *_: watch.gradient_of(model))
    for _ in range(updates):
        watch.begin()
        metrics = train_grpo.learn(model, optimizers, trajectories, RATE, settings)
        watch.end(metrics["loss"])


def trls(size: str, cfg: Config, updates: int, watch, batch: int) -> None:
    """GRPOTrainer.train, with the trajectories in place of what it would sample and score."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    trajectories, losses = trajectories_of(size, cfg.trajectories), []

    class Trainer(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return trl_batch(trajectories)

        def _compute_loss(self, model, inputs):
            losses.append(super()._compute_loss(model, inputs))
            return losses[-1]

    class Callback(TrainerCallback):
        def on_step_begin(self, *_, **__):
            watch.begin()

        def on_pre_optimizer_step(self, *_, model, **__):
            watch.gradient_of(model)

        def on_step_end(self, *_, **__):
            watch.end(sum(loss.item() for loss in losses))
            losses.clear()

    prompts = Dataset.from_list([{"prompt": "0"}] * (cfg.trajectories // GROUP))
    with tempfile.TemporaryDirectory() as folder:
        settings = arguments(folder, updates, batch, cfg.trajectories, RATE)
        tokenizer = tiny_model.tiny_tokenizer([[{"role": "user", "content": "0"}]], [])
        parts = {"args": settings, "train_dataset": prompts, "processing_class": tokenizer}
        no_reward = [lambda prompts, **_: [0.0] * len(prompts)]
        Trainer(model_of(size), no_reward, callbacks=[Callback()], **parts).train()


def trl_batch(trajectories: list[Trajectory]) -> dict[str, torch.Tensor]:
    """The tensors that GRPOTrainer makes of what it sampled, with our advantages."""
    starts = [t.turn_starts[0] for t in trajectories]
    both = list(zip(trajectories, starts, strict=True))
    backwards = pad([t.ids[:start][::-1] for t, start in both])
    prompt_mask = pad([[1] * start for start in starts]).flip(1)
    rewards, groups = [t.reward for t in trajectories], [t.group for t in trajectories]
    return {
        "prompt_ids": backwards.flip(1),  # padded on the left
        "prompt_mask": prompt_mask,
        "completion_ids": pad([t.ids[start:] for t, start in both]),
        "completion_mask": pad([[1] * (len(t.ids) - start) for t, start in both]),
        "tool_mask": pad([t.mask[start:] for t, start in both], 1),
        "advantages": advantages(rewards, groups)[0],
        "num_items_in_batch": torch.tensor(sum(t.new_tokens for t in trajectories)),
    }


# -- what is measured


class Watch:
    """Seconds and losses of the updates, and the memory that they took at most."""

    def __init__(self, keep_gradient: bool = False):
        self.seconds, self.losses, self.keep, self.gradient = [], [], keep_gradient, None

    def begin(self) -> None:
        if not self.losses:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the highest so far
            self.level = memory("VmRSS")
        self.started = time.perf_counter()

    def end(self, loss: float) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        self.losses.append(loss)

    def gradient_of(self, model) -> None:
        if self.keep and self.gradient is None:
            self.gradient = torch.cat([p.grad.flatten() for p in model.parameters()])

    def result(self) -> dict:
        peak = (memory("VmHWM") - self.level) / 2**20
        return {"seconds": self.seconds[1:], "loss": self.losses[0], "peak_mib": peak}


def memory(key: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def part(cfg: Config) -> dict:
    """In a subprocess: measures one setting; or compares the gradients of an update of a group."""
    available = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]
    limit = int(0.9 * 1024 * int(available))  # too large a batch ends itself and nobody else
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    side, _, batch = cfg.part.partition(":")
    watch, (size,) = Watch(side == "check"), cfg.sizes
    if side == "trl":
        try:
            trls(size, cfg, 1 + cfg.runs, watch, int(batch))
        except (RuntimeError, MemoryError) as error:
            if "memory" not in str(error):
                raise
            return {"failed": "out of memory"}
        return watch.result()
    if side == "ours":
        ours(size, cfg, 1 + cfg.runs, watch)
        return watch.result()
    few, other = dataclasses.replace(cfg, trajectories=GROUP), Watch(True)
    ours(size, few, 1, watch)
    trls(size, few, 1, other, GROUP)
    difference = (watch.gradient - other.gradient).abs().max() / other.gradient.abs().max()
    return {"gradient": difference.item()}


def measure(size: str, cfg: Config) -> dict:
    """All settings of one size: {setting: result}, ours and TRL's fastest with all the runs."""
    batches = ",".join(map(str, cfg.batches))
    common = [f"--sizes={size}", f"--batches={batches}", f"--token_budget={cfg.token_budget}"]
    common.append(f"--trajectories={cfg.trajectories}")

    def run(part, runs):
        return in_subprocess(__file__, [*common, f"--part={part}", f"--runs={runs}"])

    gradient = run("check", 1)["gradient"]
    found, names, tried = {"ours": run("ours", cfg.runs)}, [f"trl:{b}" for b in cfg.batches], {}
    if len(names) > 1:  # which is the fastest?
        tried = {name: run(name, 1) for name in names}
        done = [name for name in names if "seconds" in tried[name]]
        names = sorted(done, key=lambda name: tried[name]["seconds"])
    fast = run(names[0], cfg.runs) if names else {"failed": True}
    if "failed" in fast:
        raise UserError(f"batches = {batches}: TRL runs out of memory with each: give smaller ones")
    found |= {names[0]: fast} | {k: v for k, v in tried.items() if k != names[0]}
    losses = [
        found[name]["loss"] / found["ours"]["loss"] for name in found if "loss" in found[name]
    ]
    loss = max(abs(ratio - 1) for ratio in losses)
    print(
        f"first update: losses differ by {loss:.0e}, gradients (of 8) by {gradient:.0e} of the max"
    )
    if max(loss, gradient) > 1e-4:
        raise UserError("the two sides do not make the same update: there is nothing to compare")
    return found


def table(found: dict, trained: int) -> None:
    """Prints the results of `measure`; the first two rows are what is compared."""
    print(f"{'':24} {'s/update':>9} {'trained tokens/s':>17} {'peak MiB':>9} {'runs':>5}")
    for name, result in found.items():
        side, _, batch = name.partition(":")
        label = f"TRL, {batch} rows at once" if batch else "ours"
        if "failed" in result:
            print(f"{label:24} {result['failed']:>9}")
            continue
        seconds, peak = statistics.median(result["seconds"]), result["peak_mib"]
        runs = len(result["seconds"])
        print(f"{label:24} {seconds:9.2f} {trained / seconds:17,.0f} {peak:9,.0f} {runs:5d}")
    ours, trl = (result for result in list(found.values())[:2])
    speed = statistics.median(trl["seconds"]) / statistics.median(ours["seconds"])
    share = ours["peak_mib"] / trl["peak_mib"]
    print(f"ours: {speed:.2f} times as many trained tokens/s, {share:.2f} of the peak memory")


def main(cfg: Config) -> None:
    if cfg.part:
        print(json.dumps(part(cfg)))
        return
    sys.stdout.reconfigure(line_buffering=True)
    results = {}
    for size in cfg.sizes:
        trajectories = trajectories_of(size, cfg.trajectories)
        total, trained = map(
            sum, zip(*((len(t.ids), t.new_tokens) for t in trajectories), strict=True)
        )
        parameters = optim.count(model_of(size))[1]
        print(f"\n{size}: {parameters / 1e6:.1f} M parameters, vocabulary {SIZES[size][2]:,}")
        print(f"{cfg.trajectories} trajectories: {total:,} tokens, {trained:,} of them trained on")
        found = measure(size, cfg)
        table(found, trained)
        results[size] = {"parameters": parameters, "trained_tokens": trained, "settings": found}
    if cfg.save_to:
        save(cfg.save_to, {"bench": "train_step", "config": dataclasses.asdict(cfg)} | results)


if __name__ == "__main__":
    config.main(lambda argv: main(config.parse(Config, argv, check)))

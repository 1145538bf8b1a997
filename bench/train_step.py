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
GROUP_SIZE = 8
LEARNING_RATE = 1e-4


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
    divisors = [("trajectories", GROUP_SIZE)]
    divisors += [("batches", batch) for batch in cfg.batches]
    for name, divisor in divisors:
        if cfg.trajectories % divisor:
            raise UserError(
                f"{name}: {cfg.trajectories} trajectories cannot be divided by {divisor}"
            )


def model_of(size: str):
    """Makes a model of random weights, the same each time."""
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
    """Makes random tokens and rewards: a prompt, a turn, a tool's result, a turn."""
    rng = random.Random(0)
    vocabulary = SIZES[size][2]
    trajectories = []
    for i in range(count):
        length = min(1024, max(64, round(math.exp(rng.gauss(math.log(256), 0.7)))))
        prompt = length // 6  # tokens of each part
        result = length // 3
        first_turn = (length - prompt - result) // 2
        second_turn = length - prompt - first_turn - result
        t = Trajectory({}, group=i // GROUP_SIZE, sample=i % GROUP_SIZE, stop="answered")
        t.reward = rng.random()
        for tokens, mask in ((prompt, 0), (first_turn, 1), (result, 0), (second_turn, 1)):
            ids = [rng.randrange(3, vocabulary) for _ in range(tokens)]
            if mask:
                t.turn_starts.append(len(t.ids))
                t.add(ids, 1, [-1.0] * tokens)
            else:
                t.add(ids, 0)
        trajectories.append(t)
    return trajectories


# -- the two sides: a number of updates, told to a Watch


def ours(size: str, cfg: Config, updates: int, watch) -> None:
    """Runs train_grpo.learn."""
    model = model_of(size)
    trajectories = trajectories_of(size, cfg.trajectories)
    train_cfg = train_grpo.Config(learning_rate=LEARNING_RATE, token_budget=cfg.token_budget)
    settings = train_grpo.LearnSettings.of(train_cfg)
    optimizers = optim.optimizers(model, "adamw", LEARNING_RATE)
    optimizers[0].register_step_pre_hook(lambda *_: watch.gradient_of(model))
    for _ in range(updates):
        watch.begin()
        metrics = train_grpo.learn(model, optimizers, trajectories, LEARNING_RATE, settings)
        watch.end(metrics["loss"])


def trls(size: str, cfg: Config, updates: int, watch, batch: int) -> None:
    """Runs GRPOTrainer.train, with the trajectories in place of what it would sample and score."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    trajectories = trajectories_of(size, cfg.trajectories)
    losses = []  # of the micro-batches of one update

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

    prompts = Dataset.from_list([{"prompt": "0"}] * (cfg.trajectories // GROUP_SIZE))
    with tempfile.TemporaryDirectory() as folder:
        settings = arguments(folder, updates, batch, cfg.trajectories, LEARNING_RATE)
        tokenizer = tiny_model.tiny_tokenizer([[{"role": "user", "content": "0"}]], [])
        trainer = Trainer(
            model_of(size),
            lambda prompts, **_: [0.0] * len(prompts),  # they have their rewards
            args=settings,
            train_dataset=prompts,
            processing_class=tokenizer,
            callbacks=[Callback()],
        )
        trainer.train()


def trl_batch(trajectories: list[Trajectory]) -> dict[str, torch.Tensor]:
    """Makes the tensors that GRPOTrainer makes of what it sampled, with our advantages."""
    backwards = []
    prompt_mask = []
    completions = []
    completion_mask = []
    tool_mask = []
    for t in trajectories:
        start = t.turn_starts[0]
        backwards.append(t.ids[:start][::-1])
        prompt_mask.append([1] * start)
        completions.append(t.ids[start:])
        completion_mask.append([1] * (len(t.ids) - start))
        tool_mask.append(t.mask[start:])
    rewards = [t.reward for t in trajectories]
    groups = [t.group for t in trajectories]
    trajectory_advantages, _ = advantages(rewards, groups)
    return {
        "prompt_ids": pad(backwards).flip(1),  # padded on the left
        "prompt_mask": pad(prompt_mask).flip(1),
        "completion_ids": pad(completions),
        "completion_mask": pad(completion_mask),
        "tool_mask": pad(tool_mask, 1),
        "advantages": trajectory_advantages,
        "num_items_in_batch": torch.tensor(sum(t.new_tokens for t in trajectories)),
    }


# -- what is measured


class Watch:
    """Seconds and losses of the updates, and the memory that they took at most."""

    def __init__(self, keep_gradient: bool = False):
        self.seconds = []  # of each update
        self.losses = []
        self.keep_gradient = keep_gradient
        self.gradient = None  # of the first update, flat

    def begin(self) -> None:
        if not self.losses:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the highest so far
            self.level = memory("VmRSS")
        self.started = time.perf_counter()

    def end(self, loss: float) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        self.losses.append(loss)

    def gradient_of(self, model) -> None:
        if self.keep_gradient and self.gradient is None:
            self.gradient = torch.cat([p.grad.flatten() for p in model.parameters()])

    def result(self) -> dict:
        peak = (memory("VmHWM") - self.level) / 2**20
        return {"seconds": self.seconds[1:], "loss": self.losses[0], "peak_mib": peak}


def memory(key: str) -> int:
    """Reads a number of bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def part(cfg: Config) -> dict:
    """Measures one setting, in a subprocess; or compares the gradients of an update of a group."""
    available = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]
    limit = int(0.9 * 1024 * int(available))  # too large a batch ends itself and nobody else
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    side, _, batch = cfg.part.partition(":")
    (size,) = cfg.sizes
    watch = Watch(keep_gradient=side == "check")
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
    one_group = dataclasses.replace(cfg, trajectories=GROUP_SIZE)
    trl_watch = Watch(keep_gradient=True)
    ours(size, one_group, 1, watch)
    trls(size, one_group, 1, trl_watch, GROUP_SIZE)
    difference = (watch.gradient - trl_watch.gradient).abs().max()
    return {"gradient": (difference / trl_watch.gradient.abs().max()).item()}


def measure(size: str, cfg: Config) -> dict:
    """Measures all settings of one size; returns {setting: result}, first ours and TRL's fastest,
    with all the runs."""
    batches = ",".join(map(str, cfg.batches))
    common = [f"--sizes={size}", f"--batches={batches}", f"--token_budget={cfg.token_budget}"]
    common.append(f"--trajectories={cfg.trajectories}")

    def run(part, runs):
        return in_subprocess(__file__, [*common, f"--part={part}", f"--runs={runs}"])

    gradient = run("check", 1)["gradient"]
    results = {"ours": run("ours", cfg.runs)}

    # 1. which of TRL's settings is the fastest?
    names = [f"trl:{batch}" for batch in cfg.batches]
    tried = {}
    if len(names) > 1:
        tried = {name: run(name, 1) for name in names}
        names = [name for name in names if "seconds" in tried[name]]
        names.sort(key=lambda name: tried[name]["seconds"])
    fastest = run(names[0], cfg.runs) if names else {"failed": True}
    if "failed" in fastest:
        raise UserError(f"batches = {batches}: TRL runs out of memory with each: give smaller ones")
    results[names[0]] = fastest
    for name, result in tried.items():
        results.setdefault(name, result)

    # 2. do all make the same update?
    loss = 0.0  # the largest difference
    for result in results.values():
        if "loss" in result:
            loss = max(loss, abs(result["loss"] / results["ours"]["loss"] - 1))
    print(
        f"first update: losses differ by {loss:.0e}, gradients (of 8) by {gradient:.0e} of the max"
    )
    if max(loss, gradient) > 1e-4:
        raise UserError("the two sides do not make the same update: there is nothing to compare")
    return results


def table(results: dict, trained: int) -> None:
    """Prints the results of `measure`; the first two rows are what is compared. trained: tokens of
    an update."""
    print(f"{'':24} {'s/update':>9} {'trained tokens/s':>17} {'peak MiB':>9} {'runs':>5}")
    for name, result in results.items():
        side, _, batch = name.partition(":")
        label = f"TRL, {batch} rows at once" if batch else "ours"
        if "failed" in result:
            print(f"{label:24} {result['failed']:>9}")
            continue
        seconds = statistics.median(result["seconds"])
        peak = result["peak_mib"]
        runs = len(result["seconds"])
        print(f"{label:24} {seconds:9.2f} {trained / seconds:17,.0f} {peak:9,.0f} {runs:5d}")
    ours, trl, *_ = results.values()
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
        total = sum(len(t.ids) for t in trajectories)
        trained = sum(t.new_tokens for t in trajectories)
        _, parameters = optim.count(model_of(size))
        print(f"\n{size}: {parameters / 1e6:.1f} M parameters, vocabulary {SIZES[size][2]:,}")
        print(f"{cfg.trajectories} trajectories: {total:,} tokens, {trained:,} of them trained on")
        settings = measure(size, cfg)
        table(settings, trained)
        results[size] = {"parameters": parameters, "trained_tokens": trained, "settings": settings}
    if cfg.save_to:
        save(cfg.save_to, {"bench": "train_step", "config": dataclasses.asdict(cfg)} | results)


if __name__ == "__main__":
    config.main(lambda argv: main(config.parse(Config, argv, check)))

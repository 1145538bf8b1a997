"""GRPO: teach a model to use tools by trying, over many turns, with an exact loss mask.

    python train_grpo.py --config calc.py                # a minute on a CPU, after calc_sft.py
    python train_grpo.py --config calc_lora.py           # only adapters are trained
    python train_grpo.py --config calc.py --resume=true  # goes on where it was stopped or killed
    python train_grpo.py --config gsm8k.py --dry_run=true  # one made-up rollout: no model needed
    python train_grpo.py --config aime.py --fits=80      # does it fit a GPU of 80 GiB?
    python train_grpo.py --help                          # every knob: the Config below

A step: take P prompts; play G rollouts of each, with tools (rollout.py); reward them (rewards.py);
compare each with its group (loss.py, set_advantages); raise the probability of the sampled tokens
of the better ones (loss.py, grpo_loss).

How this differs from the paper (DeepSeekMath, arXiv:2402.03300), and the key that restores it:
1. No KL term: the reward is checked by code, so there is no reward model to overfit to; it would
   need a second forward pass. beta=0.04.
2. One mean over all tokens of the batch, as in DAPO, so that a token counts the same in a short
   and in a long answer. loss=grpo is the paper's mean of means; loss.py lists the other kinds.
3. clip_high is above clip_low, as in DAPO: a rare token that turned out well may gain.
   clip_high=0.2.
4. One update per batch: then the ratio is 1 and nothing is clipped. updates_per_batch and
   minibatches above 1 are off-policy.
5. Groups whose rewards are all equal are left out of the backward pass. They still count in the
   denominators: leaving them out changes nothing but the time.

Shapes: P prompts, G group size, B = P x G trajectories, T tokens.
"""

import functools
import random
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields
from typing import Literal

from run import config, mix

if __name__ == "__main__":
    config.answer_help(__file__)  # before torch takes its second to load
    config.say_at_once("loading torch, then data and model: some seconds until the first step")

import torch

import data
from engines.canary import Canary, sync_and_check
from engines.options import read_options
from engines.serving import serve_command
from learning import curriculum, memory, optim, parallel
from learning import model as models
from learning.batches import Batch, micro_batches, told_apart
from learning.checkpoint import Run
from learning.logprobs import shared_prefixes, shares_prompts, token_logprobs
from learning.vision import count_patches, keeps_pictures
from loss import (
    correction_sums,
    grpo_loss,
    importance,
    sampler_mismatch,
    sequence_weights,
    set_advantages,
)
from player import Player, validation_examples
from run.config import UserError
from run.log import Log, NoLog, check_logger
from run.loop import run_blocking
from trajectory import Trajectory, stats, stats_of_sources

# what the line of a step shows, and how
COLUMNS = {
    "reward": "6.3f",
    "accuracy": "5.3f",
    "tool_call_rate": "5.3f",
    "new_tokens": "6.1f",
    "loss": "8.4f",
    "grad_norm": "6.2f",
    "seconds": "5.2f",
}
ROLLOUTS_PER_STEP = 2  # trajectories written to rollouts.jsonl


@dataclass
class Config:
    # run
    out_dir: str = "out/grpo"  # must be new or empty
    resume: bool = False  # go on from out_dir's last checkpoint; without one, begin
    seed: int = 0  # of the order of the prompts, and of every turn that is sampled
    steps: int = 100  # batches of rollouts
    save_every: int = 50  # steps between checkpoints; 0: only when it ends or is stopped
    eval_every: int = 0  # steps between greedy evaluations on rows held out; 0: none
    eval_data: str = ""  # which rows, as in `data`; "": of that itself, the split "test"
    eval_rows: int = 128  # the first so many of them
    # model
    model: str = "Qwen/Qwen2.5-0.5B-Instruct"  # hub id, or a folder that train_sft.py wrote
    tune: Literal["full", "lora", "qlora"] = "full"  # lora: small optimizer; qlora: 4-bit base too
    lora_r: int = 32  # rank of the adapters
    lora_alpha: int = 64  # their scale is lora_alpha / lora_r
    lora_targets: tuple[str, ...] = ("all-linear",)  # names of linear layers, or all of them
    dtype: Literal["float32", "bfloat16", "mixed"] = "float32"  # weights; mixed: products bfloat16
    gradient_checkpointing: bool = False  # a third slower, and long trajectories fit
    train_vision: bool = False  # of a model that sees: its tower too, not its language model alone
    min_pixels: int = 0  # an image is shown with so many at least; 0: as its processor says
    max_pixels: int = 0  # and with so many at most: 784 of Qwen2-VL's are a token
    # engine
    engine: Literal["transformers", "vllm", "server"] = "transformers"  # vllm: on a GPU
    urls: tuple[str, ...] = ()  # server: of `vllm serve` processes, such as http://127.0.0.1:8000
    gpu_memory_utilization: float = 0.5  # vllm: share of the GPU's memory; not used on a CPU
    engine_options: tuple[str, ...] = ()  # such as enforce_eager=true; engines/options.py has all
    ahead: int = 0  # server: 1 plays the next batch while this one is learnt from, for slow tools
    # several processes
    parallel: Literal["none", "ddp", "fsdp", "deepspeed"] = "none"  # ddp: all weights on each;
    # fsdp: in shards; deepspeed: ZeRO-1, the optimizer alone in shards
    gpus: int = 1  # processes to start on this machine, one a GPU, or as many on its CPU
    offload: bool = False  # fsdp: shards and moments in the CPU's memory, where a GPU's is small
    # data
    mix: tuple[str, ...] = ()  # in the place of data: configs, each file.py[:weight]; run/mix.py
    data: str = "task:calc"  # task:name, gym:name, .jsonl, .parquet, hub id like openai/gsm8k:main
    split: str = "train"  # of a task or a hub data set; a file has none
    limit: int | None = None  # use the first n rows
    prompt_column: str = "prompt"  # text, or a list of chat messages
    answer_column: str = "answer"  # text, a number, or a list of accepted ones
    answer_after: str = ""  # "####": only what follows it is the answer (GSM8K)
    system_prompt: str = ""  # put in front of prompts that have none
    prompt_template: str = "{prompt}"  # of the user message; {other_column} works too
    database: str = ""  # of sql: a row's SQLite file, such as dbs/{db_id}.sqlite; see {schema}
    curriculum: tuple[float, ...] = ()  # 0.2,0.8: rows with such a pass rate are drawn more often
    curriculum_from: str = ""  # rollouts.jsonl of an evaluation on them, which says their first one
    # tools
    format: Literal[
        "auto",
        "hermes",
        "llama3",
        "mistral",
        "qwen_xml",
        "harmony",
        "gemma4",
        "functiongemma",
        "glm",
        "pythonic",
        "atem",
        "fence",
        "tags",
        "json_actions",
    ] = "hermes"  # how calls are written; auto: as the model's template does
    template_options: tuple[str, ...] = ()  # of the chat template, such as enable_thinking=false
    chat_template: str = ""  # a .jinja file in the place of the model's own; saved with the model
    tools: tuple[str, ...] = ("python",)  # tools/<name>.py, my_file.py:name, mcp:servers.json
    tool_options: tuple[str, ...] = ()  # of a tool, such as search.k=5 or python.timeout=2
    tool_timeout: float = 10.0  # seconds a call may take
    tool_concurrency: int = 16  # calls that run at once, over all trajectories
    # rollout
    prompts_per_step: int = 24  # P: each step plays P groups
    group_size: int = 8  # G: more find rarer successes, and cost as much more
    temperature: float = 1.0  # 0.7..1.0; at 0 all of a group would be alike
    max_tokens: int = 2048  # of a whole trajectory, prompt and tool results included
    max_new_tokens: int = 512  # of one turn
    max_turns: int = 4  # assistant turns
    max_tool_calls: int = 8  # in a trajectory
    max_observation_tokens: int = 512  # of one turn's results; longer ones are cut in the middle
    trajectory_timeout: float = 300.0  # seconds
    final_turn: bool = False  # at max_turns, one more turn to answer without tools
    turns_left: bool = False  # each turn's results end with how many turns are left
    max_concurrent: int = 256  # trajectories that are played at once
    # rewards
    rewards: tuple[str, ...] = ("correct",)  # name or file.py:name, each [:weight]; 1st = accuracy
    reward_options: tuple[str, ...] = ()  # of a reward, such as judge.model=gpt
    overlong: Literal["keep", "mask", "penalise"] = "keep"  # what a limit cut short; mask: unlearnt
    turn_credit: bool = False  # rewards that are lists count for their turn and those before it
    dynamic_sampling: str = ""  # a reward, such as correct: groups that agree on it are replaced
    # loss
    loss: Literal["dapo", "grpo", "dr_grpo", "gspo", "cispo"] = "dapo"  # see above
    adv_norm: Literal["group", "batch", "none", "rloo"] = "group"  # advantages: divided by a std of
    # the group or the batch, or by nothing; rloo: compared with the mean of the others, not divided
    updates_per_batch: int = 1  # passes over each batch of rollouts
    minibatches: int = 1  # updates in each pass, each on a part of the batch
    clip_low: float = 0.2  # the ratio is clipped at 1 - clip_low; gspo: 3e-4
    clip_high: float = 0.28  # and at 1 + clip_high; gspo: 4e-4, cispo: 1 and more
    beta: float = 0.0  # weight of the KL to the model that training began with, 0.001..0.04
    is_correction: Literal[
        "auto", "none", "truncate", "mask", "sequence_truncate", "sequence_mask"
    ] = "auto"  # trainer's probability over the engine's, of a token or of all: at most 2, or 0
    # outside of 0.5 .. 2; auto: truncate where the engine is not the trainer's own model, else none
    # optimisation
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit: a quarter of its memory
    learning_rate: float = 1e-6  # 1e-6 full, 1e-5..1e-4 LoRA, 3e-4..1e-3 tiny
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up
    warmup: int = 0  # steps
    max_grad_norm: float = 1.0  # the gradient is scaled down to this norm
    token_budget: int = 16384  # tokens per forward pass, padding counted; halve it if out of memory
    # log
    logger: Literal["none", "wandb", "tensorboard"] = "none"  # beside metrics.jsonl


@dataclass(frozen=True)
class LearnSettings:
    """How a batch of trajectories is learnt from: keys of the Config, the same for all of a run."""

    loss: str
    adv_norm: str
    turn_credit: bool
    overlong: str
    updates_per_batch: int
    minibatches: int
    clip_low: float
    clip_high: float
    beta: float
    is_correction: str  # "none", "truncate", …, never "auto"
    temperature: float  # that of the sampling
    max_new_tokens: int  # dr_grpo's constant
    max_grad_norm: float
    token_budget: int
    seed: int

    @classmethod
    def of(cls, cfg: Config) -> "LearnSettings":
        """Takes them from a config."""
        values = {field.name: getattr(cfg, field.name) for field in fields(cls)}
        if cfg.is_correction == "auto":
            is_trainers_own = cfg.engine == "transformers"
            values["is_correction"] = "none" if is_trainers_own else "truncate"
        return cls(**values)


def check(cfg: Config) -> None:
    """Checks the rules across keys. A key that would have no effect is an error, not a surprise."""
    mix.check(cfg)
    curriculum.check(cfg.curriculum, cfg.curriculum_from, bool(cfg.mix))
    on_policy = cfg.updates_per_batch == 1 and cfg.minibatches == 1
    options = read_options(cfg.engine, cfg.engine_options)
    has_cache_size = getattr(options, "kv_cache_gib", 0) > 0
    config.refuse_unused_keys(
        cfg,
        (
            (
                cfg.tune == "full",
                "lora_r lora_alpha lora_targets",
                "with tune=full: use --tune=lora",
            ),
            (
                on_policy,
                "clip_low clip_high",
                "with updates_per_batch=1 and minibatches=1: ratio = 1",
            ),
            (cfg.loss == "cispo", "clip_low", "with loss=cispo: it bounds the ratio only above"),
            (not cfg.eval_every, "eval_data eval_rows", "without eval_every=<steps>"),
            (not cfg.tools, "tool_timeout tool_concurrency", "with tools=(): no call runs"),
            (cfg.engine != "vllm", "gpu_memory_utilization", f"with engine={cfg.engine}"),
            (has_cache_size, "gpu_memory_utilization", "with kv_cache_gib, which says it all"),
            (cfg.engine != "server", "urls", f"with engine={cfg.engine}"),
            (data.is_file(cfg.data), "split", f"on {cfg.data!r}: a file has no splits, so drop it"),
        ),
    )
    config.require_positive(
        cfg,
        "steps prompts_per_step max_tokens max_new_tokens max_turns max_observation_tokens lora_r "
        "lora_alpha updates_per_batch minibatches token_budget tool_concurrency learning_rate "
        "max_grad_norm tool_timeout trajectory_timeout clip_low clip_high gpu_memory_utilization "
        "max_concurrent eval_rows",
    )
    config.require_not_negative(
        cfg,
        "temperature max_tool_calls warmup seed beta save_every eval_every min_pixels max_pixels",
    )
    if cfg.model == "tiny":
        raise UserError("model = 'tiny' is made by train_sft.py: give the folder that it wrote")
    if cfg.tune == "qlora" and cfg.dtype == "mixed":
        raise UserError("dtype = 'mixed' with tune=qlora: its base is not trained, use bfloat16")
    if cfg.engine == "server" and not cfg.urls:
        raise UserError("urls is missing: engine = 'server' needs --urls=http://host:port,…")
    if cfg.ahead not in (0, 1):
        raise UserError(f"ahead = {cfg.ahead}: expected 0, or 1 batch")
    if cfg.ahead and cfg.engine != "server":
        raise UserError(
            f"ahead = 1 with engine={cfg.engine}: it samples with the memory and the cores that "
            "learn, so nothing would be gained; use engine=server"
        )
    if cfg.ahead and cfg.is_correction == "none":
        raise UserError(
            "ahead = 1 with is_correction=none: its batches are of the policy before the last "
            "update, so leave is_correction=auto"
        )
    if cfg.engine != "transformers" and 0 < cfg.temperature < 0.01:
        raise UserError(f"temperature = {cfg.temperature}: vLLM has 0, or 0.01 and more")
    if cfg.gpu_memory_utilization > 1:
        raise UserError(f"gpu_memory_utilization = {cfg.gpu_memory_utilization}: at most 1")
    parallel.check(cfg.parallel, cfg.gpus, cfg.optimizer, cfg.offload)
    if cfg.seed >= 2**63:
        raise UserError(f"seed = {cfg.seed}: expected less than 2**63")
    if cfg.group_size < 2:
        raise UserError(f"group_size = {cfg.group_size}: one has nothing to compare with")
    if cfg.warmup >= cfg.steps:
        raise UserError(f"warmup = {cfg.warmup}: expected less than steps = {cfg.steps}")
    trajectories = cfg.prompts_per_step * cfg.group_size
    if cfg.minibatches > trajectories:
        raise UserError(
            f"minibatches = {cfg.minibatches}: there are {trajectories} trajectories to split"
        )


# ---- learning from trajectories


def batches(model, trajectories: list[Trajectory], token_budget: int) -> list[list[Trajectory]]:
    """Divides trajectories into micro-batches of at most token_budget tokens, padding counted, and
    patches of images where the tower learns."""
    lengths = [len(t.ids) for t in trajectories]
    prompts = [()] * len(trajectories)
    if shares_prompts(model):  # then a prompt that repeats counts once
        # not t.ids: problems that differ only in their picture have equal ones
        prompts = shared_prefixes(told_apart(trajectories), [t.mask for t in trajectories])
    patches = None
    if any(trajectory.images for trajectory in trajectories):
        are_kept = keeps_pictures(model)
        patches = []
        for trajectory, prompt in zip(trajectories, prompts, strict=True):
            beginning = trajectory.ids[: len(prompt)]
            patches.append(count_patches(beginning, trajectory.images, are_kept))
    parts = micro_batches(lengths, token_budget, prompts, patches)
    return [[trajectories[i] for i in part] for part in parts]


@torch.no_grad()
def policy_logprobs(
    model, trajectories: list[Trajectory], temperature: float, token_budget: int
) -> list[torch.Tensor]:
    """Computes the (T,) logprobs of each trajectory under the model as it is now."""
    place_of = {id(trajectory): place for place, trajectory in enumerate(trajectories)}
    scored = []  # (place, logprobs): they come in the order of their micro-batches
    with parallel.whole(model), parallel.together():
        for part in parallel.share(batches(model, trajectories, token_budget)):
            batch = Batch.of(part, model.device)
            logprobs, _ = token_logprobs(
                model,
                batch.ids,
                batch.attention_mask,
                batch.mask,
                temperature,
                position_ids=batch.position_ids,
                images=batch.images,
            )
            for row, trajectory in enumerate(part):
                own = logprobs[row, : len(trajectory.ids)]
                scored.append((place_of[id(trajectory)], own.cpu()))
    logprobs_at = dict(parallel.gathered(scored))
    return [logprobs_at[place].to(model.device) for place in range(len(trajectories))]


def accumulate(model, trajectories: list[Trajectory], settings: LearnSettings) -> dict:
    """Adds the gradient of one update to what is there; returns its metrics.

    trajectories: with their advantages and weights. Their old_logprobs are the trainer's before the
    first update, or None if this is that update; the trainer's own are taken and not the engine's,
    whose rounding then is not in the ratio. With beta they have ref_logprobs.
    """
    total = sum(t.new_tokens for t in trajectories)
    sums = Counter(loss=0.0, entropy=0.0, clip_frac=0.0)
    gaps = []  # of the engine from the trainer, for each sampled token
    parts = batches(model, trajectories, settings.token_budget)  # as many as memory holds
    with parallel.together():
        for part in parallel.share(parts):
            # 1. what the policy gives to the sampled tokens, with gradient
            batch = Batch.of(part, model.device)
            logprobs, entropy = token_logprobs(
                model,
                batch.ids,
                batch.attention_mask,
                batch.mask,
                settings.temperature,
                position_ids=batch.position_ids,
                images=batch.images,
            )
            # in the first update the policy is the one that sampled: a ratio of 1, with gradient
            old_logprobs = batch.old_logprobs
            if old_logprobs is None:
                old_logprobs = logprobs.detach()

            # 2. the engine may have sampled with other probabilities than the trainer's
            correction = None
            if settings.is_correction != "none":
                correction = importance(
                    old_logprobs, batch.sampled_logprobs, batch.mask, settings.is_correction
                )

            # 3. the share of this part in the loss of the update, and its gradient
            loss, logged = grpo_loss(
                logprobs,
                old_logprobs,
                batch.mask,
                batch.advantages,
                batch.weights,
                settings.loss,
                settings.clip_low,
                settings.clip_high,
                settings.beta,
                batch.ref_logprobs,
                correction,
            )
            loss.backward()

            # 4. metrics: means over the tokens of the update
            sums["loss"] += loss.item()
            sums["entropy"] += entropy.sum().item() / total
            sums["clip_frac"] += logged["clipped"].sum().item() / total
            if settings.beta:
                sums["kl"] += logged["kl"].sum().item() / total
            if correction is not None:
                turns = [len(t.turn_starts) for t in part]
                for name, value in correction_sums(correction, batch.mask, turns).items():
                    sums[name] += value / total
            gap = old_logprobs - batch.sampled_logprobs
            gaps.append(gap[batch.mask.bool()].cpu())

    # 5. of all ranks together
    parallel.sum_gradients(model)
    sums = parallel.total(sums)
    gaps = parallel.gathered(gaps)
    return sums | sampler_mismatch(torch.cat(gaps))


def learn(
    model,
    optimizers: list,
    trajectories: list[Trajectory],
    learning_rate: float,
    settings: LearnSettings,
    step: int = 0,
    reference=None,
) -> dict:
    """Makes all updates of one step; returns the mean of their metrics.

    reference: the model that beta holds the policy to. No update is made on a batch that has
    nothing to teach: Adam would still move the weights.
    """
    # 1. compare each with its group; what has no reward is in no denominator
    is_counted = set_advantages(
        trajectories, settings.adv_norm, settings.turn_credit, settings.overlong
    )
    new_tokens = torch.tensor([t.new_tokens for t in trajectories]) * is_counted

    # 2. leave out what teaches nothing: equal rewards do not, though the KL is of every token
    teaching = []
    for trajectory, tokens in zip(trajectories, new_tokens.tolist(), strict=True):
        trajectory.old_logprobs = None
        trajectory.ref_logprobs = None
        trajectory.teaches = tokens > 0 and (any(trajectory.advantages) or settings.beta > 0)
        if trajectory.teaches:
            teaching.append(trajectory)

    # 3. logprobs before the first update (where there is only one, they are its own) and those
    # of the reference
    models.without_dropout(model)  # else old and new logprobs would be of two functions
    is_off_policy = settings.updates_per_batch * settings.minibatches > 1
    if is_off_policy:
        scored = policy_logprobs(model, teaching, settings.temperature, settings.token_budget)
        for trajectory, logprobs in zip(teaching, scored, strict=True):
            trajectory.old_logprobs = logprobs
    if settings.beta:
        with parallel.whole(model), models.with_initial_weights(reference):
            scored = policy_logprobs(
                reference, teaching, settings.temperature, settings.token_budget
            )
        for trajectory, logprobs in zip(teaching, scored, strict=True):
            trajectory.ref_logprobs = logprobs

    # 4. the updates, each on a part of the batch
    metrics = []
    order = list(range(len(trajectories)))
    for update in range(settings.updates_per_batch):
        if settings.minibatches > 1:
            random.Random(f"{settings.seed} {step} {update}").shuffle(order)
        for first in range(settings.minibatches):
            part = order[first :: settings.minibatches]
            # made once for the whole part, also of those that teach nothing: how it is then cut
            # into micro-batches changes nothing
            weights = sequence_weights(new_tokens[part], settings.loss, settings.max_new_tokens)
            learnt = []
            for i, weight in zip(part, weights.tolist(), strict=True):
                trajectories[i].weight = weight
                if trajectories[i].teaches:
                    learnt.append(trajectories[i])
            if not learnt:
                continue
            with parallel.whole(model):
                update_metrics = accumulate(model, learnt, settings)
            update_metrics["grad_norm"] = optim.step(
                model, optimizers, learning_rate, settings.max_grad_norm
            )
            metrics.append(update_metrics)
    model.eval()

    # 5. what is logged: means over the updates
    return mean_metrics(metrics) | {"trained_share": len(teaching) / len(trajectories)}


def mean_metrics(metrics: list[dict]) -> dict:
    """Averages the metrics of several updates; of the largest differences, takes the largest."""
    names = dict.fromkeys(["loss", "grad_norm"])  # also where no update was made
    for update in metrics:
        names |= dict.fromkeys(update)
    means = {}
    for name in names:
        values = [update.get(name, 0.0) for update in metrics]
        if name == "sampler_logprob_diff_max":
            means[name] = max(values)
        else:
            means[name] = sum(values) / max(1, len(metrics))
    return means


# ---- the run


def begin_groups(
    player: Player,
    cursor: int,
    count: int,
    group_size: int,
    seed: int,
    step: int,
    first_group: int = 0,
    expect=None,
) -> None:
    """Begins to play the groups of the next `count` prompts; the player's `take` waits for them.
    first_group: their numbers go on, so that no two groups of a step share a seed."""
    prompts = player.next_prompts(cursor, count, seed, is_new_step=first_group == 0)
    # the bar is of this rank's share
    on_done = expect(len(parallel.share(prompts)) * group_size) if expect else None
    player.begin(prompts, group_size, step, first_group=first_group, on_done=on_done)


def sample_groups(
    player: Player,
    cursor: int,
    prompts_per_step: int,
    group_size: int,
    seed: int,
    step: int,
    dynamic_sampling: str = "",
    dynamic_attempts: int = 3,
    expect=None,
) -> tuple[list[Trajectory], list[Trajectory], int]:
    """Plays the groups of a step; returns (trajectories to learn from, all that were played, the
    cursor after their prompts).

    dynamic_sampling: a reward; groups that agree on it are replaced by those of the next prompts,
    in at most dynamic_attempts further rounds (DAPO, arXiv:2503.14476); what is still missing then
    is filled up with them. expect(count): is told how many rollouts come, returns what to call as
    each is done. What `begin_groups` has begun with the same arguments is the first round.
    """
    kept: list[list[Trajectory]] = []
    equal: list[list[Trajectory]] = []  # groups that agree
    played: list[Trajectory] = []
    started = 0  # prompts
    rounds = 1 + dynamic_attempts if dynamic_sampling else 1
    for _ in range(rounds):
        missing = prompts_per_step - len(kept)
        if player.begun is None:
            begin_groups(player, cursor + started, missing, group_size, seed, step, started, expect)
        new = player.take()
        started += missing
        played += new
        for first in range(0, len(new), group_size):
            group = new[first : first + group_size]
            # a row that has other rewards is compared by its outcome
            outcomes = {t.rewards.get(dynamic_sampling, t.outcome) for t in group} - {None}
            agrees = dynamic_sampling and len(outcomes) < 2
            if agrees:
                equal.append(group)
            else:
                kept.append(group)
        if len(kept) == prompts_per_step:
            break
    kept += equal[: prompts_per_step - len(kept)]
    trajectories = [trajectory for group in kept for trajectory in group]
    return trajectories, played, cursor + started


def saved_groups(groups: tuple | None, player: Player) -> dict | None:
    """Makes plain values of what `sample_groups` returned, for a checkpoint."""
    if groups is None:
        return None
    trajectories, played, cursor = groups
    places = {id(trajectory): place for place, trajectory in enumerate(played)}
    learnt = [places[id(trajectory)] for trajectory in trajectories]
    return {"played": player.as_saved(played), "learnt": learnt, "cursor": cursor}


def saved_beside(groups: tuple | None, player: Player) -> dict:
    """Names what a checkpoint of train_grpo.py holds beside weights, optimizers and counters."""
    waiting = functools.partial(saved_groups, groups, player)  # long lists, if it is saved at all
    return {"waiting": waiting, "pass_rates": player.pass_rates}


def groups_of_saved(saved: dict | None, player: Player) -> tuple | None:
    """Makes what `sample_groups` returned of what `saved_groups` made of it."""
    if saved is None:
        return None
    played = player.of_saved(saved["played"])
    return [played[place] for place in saved["learnt"]], played, saved["cursor"]


def validate(player: Player, examples: list[dict], log: Log) -> dict:
    """Plays held-out examples greedily, once each; prints and returns the metrics."""
    started = time.monotonic()
    played = player.play(examples, temperature=0.0)
    measured = stats(played)
    metrics = {f"val_{name}": measured[name] for name in ("accuracy", "reward", "tool_call_rate")}
    for name, value in stats_of_sources(played).items():
        if name.endswith("/accuracy"):
            metrics[f"val_{name}"] = value
    log.print("           " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    metrics["val_seconds"] = time.monotonic() - started
    return metrics


def train(cfg: Config) -> dict:
    """Trains, saves the model or adapter to out_dir, and returns the last step's metrics."""
    check(cfg)  # also of a config that was made in a notebook, not by config.parse
    with parallel.started(cfg.parallel):
        return train_here(cfg)


def train_here(cfg: Config) -> dict:
    """Trains in this process, which may be one of several."""
    # 1. all checks, the cheap ones first: a mistake must not wait for weights to be loaded
    if cfg.temperature == 0:
        raise UserError("temperature = 0: all of a group would be alike, so give 0.7 to 1.0")
    check_logger(cfg.logger)
    run = Run(cfg)
    held_out = validation_examples(cfg)
    player = Player.of(cfg, cfg.tune)
    player.check_names(held_out)
    if cfg.curriculum:
        player.curriculum = curriculum.make(cfg.curriculum, cfg.curriculum_from, player.examples)
    model = player.model
    tokenizer = player.chat.tokenizer
    reference = None
    if cfg.beta:
        reference = models.load_reference(cfg.model, model, cfg.tune, cfg.dtype)
    if cfg.gradient_checkpointing:
        models.recompute_layers(model)
    parallel.split(model, cfg.offload)
    optimizers = optim.optimizers(model, cfg.optimizer, cfg.learning_rate)

    # 2. where it goes on: weights, optimizers and random generators of the last checkpoint
    state = run.restore(model, optimizers) or {"step": 0, "cursor": 0, "metrics": {}}
    run.try_saving(model, tokenizer)
    first_step = state["step"]
    cursor = state["cursor"]
    metrics = state["metrics"]
    if state.get("pass_rates"):
        player.curriculum.rates = state["pass_rates"]
    # ahead: the groups of the next step, played already by the weights before the last update
    waiting = groups_of_saved(state.get("waiting"), player)
    waited = 0.0  # seconds for them, behind the line of the step before
    settings = LearnSettings.of(cfg)
    canary = None  # scores one fixed prompt after each sync
    if read_options(cfg.engine, cfg.engine_options).canary:
        # with its images, if it has any: weights of the tower may be wrong too
        example = player.examples[0]
        pictures = player.chat.pictures(example)
        prompt = player.chat.prompt(example["messages"], pictures)
        canary = Canary(prompt, cfg.dtype, pictures)

    if parallel.is_first():
        log = Log(run.out_dir, cfg.steps, COLUMNS, first_step, cfg.logger, asdict(cfg))
    else:
        log = NoLog()
    advice = optim.memory_advice("token_budget", "max_tokens", "group_size")
    with log, advice, run, player:
        trained, total = optim.count(model)
        log.print(
            f"{len(player.examples)} prompts, {cfg.steps} steps, {trained:,} of {total:,} trained"
        )
        frozen = models.frozen_parts(model)
        if frozen:
            log.print(f"not trained: {frozen}")
        if cfg.resume:
            log.print(f"going on with step {first_step}")

        # sample(cursor, step) plays the groups of a step; begin does not wait for them
        options = {"group_size": cfg.group_size, "seed": cfg.seed, "expect": log.expect}
        begin = functools.partial(begin_groups, player, count=cfg.prompts_per_step, **options)
        sample = functools.partial(
            sample_groups,
            player,
            prompts_per_step=cfg.prompts_per_step,
            dynamic_sampling=cfg.dynamic_sampling,
            **options,
        )

        for step in range(first_step, cfg.steps):
            started = time.monotonic()
            learning_rate = cfg.learning_rate * optim.schedule(
                step, cfg.steps, cfg.schedule, cfg.warmup
            )
            # what is saved if this step fails: the state behind the step before
            kept = (model, tokenizer, optimizers, log)
            last_metrics = metrics
            metrics = {"step": step}
            # what raises in here (a reward, an engine) is raised when the steps done are saved
            saved = saved_beside(waiting, player)
            rescue = run.rescue(step, *kept, cursor=cursor, metrics=last_metrics, **saved)
            with rescue, parallel.whole(model):
                # 3. sample from the weights of the last update; the canary proves that the engine
                # has them
                with parallel.together():
                    metrics |= run_blocking(sync_and_check(player.engine, model, step, canary))
                if held_out and step % cfg.eval_every == 0:
                    metrics |= validate(player, held_out, log)
                sampling_started = time.monotonic()
                if waiting is None:
                    waiting = sample(cursor=cursor, step=step)
                trajectories, played, cursor = waiting
                waiting = None
                metrics["rollout_seconds"] = waited + time.monotonic() - sampling_started
                metrics |= optim.gpu_gib("rollout")
                with parallel.together():
                    run_blocking(player.engine.sleep())
            metrics |= stats(played)
            metrics |= stats_of_sources(played)
            if player.curriculum:
                player.curriculum.record(played)
                metrics |= player.curriculum.metrics()
            metrics["tools_leaked"] = sum(toolbox.leaked for toolbox in player.toolboxes)
            if cfg.ahead:  # the next groups are played while these are learnt from
                metrics["lag"] = step - trajectories[0].version
                if step + 1 < cfg.steps:
                    begin(cursor=cursor, step=step + 1)

            # 4. compare each with its group, one masked update (or several)
            metrics |= learn(
                model, optimizers, trajectories, learning_rate, settings, step, reference
            )
            metrics |= optim.gpu_gib("learn")

            # 5. log, save; a stop signal waits for this line, so that what was learnt is kept
            metrics["learning_rate"] = learning_rate
            metrics["seconds"] = waited + time.monotonic() - started
            log.step(metrics)
            log.rollouts(trajectories[:ROLLOUTS_PER_STEP], tokenizer, step=step)
            # or their images, megabytes each, would stay while the next ones are sampled
            trajectories = played = None
            if player.begun:  # if they fail, this step is saved without them
                waiting_started = time.monotonic()
                saved = saved_beside(None, player)
                with run.rescue(step + 1, *kept, cursor=cursor, metrics=metrics, **saved):
                    waiting = sample(cursor=cursor, step=step + 1)
                waited = time.monotonic() - waiting_started
            saved = saved_beside(waiting, player)
            run.after(step + 1, cfg.steps, *kept, cursor=cursor, metrics=metrics, **saved)

        # 6. the model as from_pretrained loads it, and the last lines for people and for grep
        run.finish(model, tokenizer)
        summary = {"saved": str(run.out_dir), "reward": metrics["reward"]}
        summary["serve"] = serve_command(run.out_dir, player.chat)
        if held_out:
            with parallel.whole(model):
                run_blocking(sync_and_check(player.engine, model, cfg.steps, canary))
                summary |= validate(player, held_out, log)
        known = sum(toolbox.cache.hits for toolbox in player.toolboxes)
        log.summary(summary | {"known_results": known})
    return metrics


def main(argv: list[str]) -> None:
    """Trains as the command line says; --dry_run=true only plays a made-up rollout (play.py), and
    --fits=80 only says what it would need of a GPU's memory (learning/memory.py)."""
    is_dry, argv = config.take_flag(argv, "dry_run")
    gpu_gib, argv = memory.take_card(argv)
    if is_dry:
        config.run_script("play.py", ["--made_up=true", *argv])
        return
    cfg = config.parse(Config, argv, check)
    if gpu_gib:
        memory.say(memory.Setup.of(cfg, read_options(cfg.engine, cfg.engine_options)), gpu_gib)
        return
    if parallel.must_launch(cfg.gpus):
        parallel.launch(cfg.gpus)
    train(cfg)


if __name__ == "__main__":
    config.main(main)

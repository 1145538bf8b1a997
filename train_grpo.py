"""GRPO: teach a model to use tools by trying, over many turns, with an exact loss mask.

    python train_grpo.py --config calc.py               # a minute on a CPU, after calc_sft.py
    python train_grpo.py --config calc.py --tune=lora --learning_rate=1e-3 --out_dir=out/lora
    python train_grpo.py --help                         # every knob: the Config below

A step: take P prompts; play G rollouts of each, with tools (rollout.py); reward them (rewards.py);
compare each with its group; raise the probability of the sampled tokens of the better ones. In
symbols

    loss = - sum_i w_i sum_t m_it min(r_it A_i, clip(r_it, 1 - clip_low, 1 + clip_high) A_i)
    r_it = pi(token_t) / pi_old(token_t),    A_i = (R_i - mean of the group) / (std of the group)

with m = 1 exactly on the tokens that the policy sampled, in all turns, stop tokens included.

How this differs from the paper (DeepSeekMath, arXiv:2402.03300), and the key that restores it:
1. No KL term: the reward is checked by code, so there is no reward model to overfit to; it would
   need a second forward pass.
2. w_i: one mean over all tokens of the batch, as in DAPO (arXiv:2503.14476), so that a token
   counts the same in a short and in a long answer. loss="grpo" is the paper's mean of means,
   "dr_grpo" divides by a constant (arXiv:2503.20783).
3. clip_high is above clip_low, as in DAPO: a rare token that turned out well may gain.
   clip_high=0.2.
4. One update per batch: then r = 1 and nothing is clipped. updates_per_batch=2 and more are
   off-policy.
5. Groups whose rewards are all equal have A = 0 and are left out of the backward pass. They still
   count in w: leaving them out changes nothing but the time.

Shapes: P prompts, G group size, B = P x G trajectories, T tokens.
"""

import random
import time
from dataclasses import dataclass
from typing import Literal

import config

if __name__ == "__main__":
    config.answer_help(__file__)  # before torch takes its second to load

import torch

import data
import model as models
import report
import rewards as reward_functions
from chat import Chat
from config import UserError
from engine import TransformersEngine
from rollout import Settings, rollouts, stats, wait
from tools import Toolbox


@dataclass
class Config:
    # run
    out_dir: str = "out/grpo"  # must be new or empty
    seed: int = 0  # of the order of the prompts, and of every turn that is sampled
    steps: int = 100  # updates of the sampler's weights
    # model
    model: str = "Qwen/Qwen2.5-0.5B-Instruct"  # hub id, or a folder that train_sft.py wrote
    tune: Literal["full", "lora"] = "full"  # lora: a tenth of the optimizer memory
    lora_r: int = 32  # rank of the adapters
    lora_alpha: int = 64  # their scale is lora_alpha / lora_r
    lora_targets: tuple[str, ...] = ("all-linear",)  # names of linear layers, or all of them
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; bfloat16 halves memory
    deterministic: bool = True  # equal seeds give equal bits; false: nobody waits for slow tools
    # data
    data: str = "task:calc"  # task:name, .jsonl, .parquet, or a hub id such as openai/gsm8k:main
    split: str = "train"  # of a task or a hub data set; a file has none
    limit: int | None = None  # use the first n rows
    prompt_column: str = "prompt"  # text, or a list of chat messages
    answer_column: str = "answer"  # text, a number, or a list of accepted ones
    answer_after: str = ""  # "####": only what follows it is the answer (GSM8K)
    system_prompt: str = ""  # put in front of prompts that have none
    prompt_template: str = "{prompt}"  # of the user message; {other_column} works too
    # tools
    format: Literal["hermes", "llama3", "fence", "tags"] = "hermes"  # how calls are written
    tools: tuple[str, ...] = ("python",)  # tools/<name>.py, or my_file.py:function
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
    # rewards
    rewards: tuple[str, ...] = ("correct",)  # name or file.py:name, each [:weight]; 1st = accuracy
    overlong: Literal["keep", "mask"] = "keep"  # mask: do not learn from what a limit cut short
    # loss
    loss: Literal["dapo", "grpo", "dr_grpo"] = "dapo"  # how tokens are averaged, see above
    adv_norm: Literal["group", "batch", "none"] = "group"  # what the advantage is divided by
    updates_per_batch: int = 1  # passes over each batch of rollouts
    clip_low: float = 0.2  # with updates_per_batch > 1: the ratio is clipped at 1 - clip_low
    clip_high: float = 0.28  # and at 1 + clip_high
    # optimisation
    learning_rate: float = 1e-6  # 1e-6 full, 1e-5..1e-4 LoRA, 3e-4..1e-3 tiny
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up
    warmup: int = 0  # steps
    weight_decay: float = 0.0  # of matrices only
    max_grad_norm: float = 1.0  # the gradient is scaled down to this norm
    token_budget: int = 16384  # tokens per forward pass, padding counted; halve it if out of memory
    # log
    rollouts_per_step: int = 2  # trajectories written to rollouts.jsonl


def check(cfg: Config) -> None:
    """Rules across keys. A key that would have no effect is an error, not a surprise."""
    changed = config.changed(cfg)
    if cfg.tune == "full" and (useless := {"lora_r", "lora_alpha", "lora_targets"} & changed):
        raise UserError(f"{min(useless)} has no effect with tune=full: use --tune=lora, or drop it")
    if cfg.updates_per_batch == 1 and (useless := {"clip_low", "clip_high"} & changed):
        raise UserError(f"{min(useless)} has no effect with updates_per_batch=1: the ratio is 1")
    if "split" in changed and data.is_file(cfg.data):
        raise UserError(f"split has no effect on {cfg.data!r}: a file has no splits, so drop it")
    if cfg.model == "tiny":
        raise UserError("model = 'tiny' is made by train_sft.py: give the folder that it wrote")
    positive = ("steps", "prompts_per_step", "max_tokens", "max_new_tokens", "max_turns", "lora_r")
    positive += ("max_observation_tokens", "updates_per_batch", "token_budget", "tool_concurrency")
    positive += ("learning_rate", "max_grad_norm", "tool_timeout", "trajectory_timeout")
    for name in positive + ("lora_alpha", "clip_low", "clip_high"):
        if getattr(cfg, name) <= 0:
            raise UserError(f"{name} = {getattr(cfg, name)}: expected more than 0")
    zero = ("temperature", "max_tool_calls", "warmup", "weight_decay", "rollouts_per_step", "seed")
    for name in zero:
        if getattr(cfg, name) < 0:
            raise UserError(f"{name} = {getattr(cfg, name)}: expected 0 or more")
    if cfg.seed >= 2**63:
        raise UserError(f"seed = {cfg.seed}: expected less than 2**63")
    if cfg.group_size < 2:
        raise UserError(
            f"group_size = {cfg.group_size}: a group of one has nothing to compare with"
        )


def advantages(
    rewards: list[float | None], groups: list[int], adv_norm: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) advantages, and (B,) bool: whether the trajectory has a reward at all.

    None and NaN are left out of every mean and get 0. A group whose rewards are all equal gets
    exactly 0: equality is tested on the rewards, since the std of equal floats need not be 0.
    """
    valid = [r is not None and r == r for r in rewards]
    advantage = torch.zeros(len(rewards))
    for group in set(groups):
        rows = [i for i, g in enumerate(groups) if g == group and valid[i]]
        if len({rewards[i] for i in rows}) < 2:
            continue
        values = torch.tensor([rewards[i] for i in rows], dtype=torch.float64)
        centred = values - values.mean()
        advantage[rows] = (centred / (values.std() if adv_norm == "group" else 1.0)).float()
    if adv_norm == "batch" and advantage.any():
        values = torch.tensor([r for r, v in zip(rewards, valid, strict=True) if v])
        advantage = advantage / values.std()
    return advantage, torch.tensor(valid)


def sequence_weights(new_tokens: torch.Tensor, loss: str, max_new_tokens: int) -> torch.Tensor:
    """(B,) w_i: what each trained token of sequence i counts in the loss of the whole batch.

    new_tokens: (B,) trained tokens, 0 for a sequence that is left out. Made once, before the batch
    is cut into micro-batches, so the cut changes nothing.
    """
    counted = (new_tokens > 0).float()
    sequences, tokens = counted.sum().clamp(min=1), new_tokens.sum().clamp(min=1)
    if loss == "grpo":  # mean over the tokens of a sequence, then over sequences
        return counted / (sequences * new_tokens.clamp(min=1))
    if loss == "dapo":  # mean over all tokens
        return counted / tokens
    return counted / (sequences * max_new_tokens)  # dr_grpo: a constant, so length is not rewarded


def grpo_loss(
    logprobs: torch.Tensor,  # (B, T) of the policy, with gradient
    old_logprobs: torch.Tensor,  # (B, T) of the policy that sampled
    mask: torch.Tensor,  # (B, T) 1 = sampled by the policy
    advantage: torch.Tensor,  # (B,)
    weights: torch.Tensor,  # (B,) of sequence_weights
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, to be summed over micro-batches, and (B, T): where the clip took the gradient."""
    # 0 where the mask is 0, before exp: what an engine says of other tokens cannot leak as NaN
    ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0.0).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = advantage[:, None]
    objective = torch.minimum(ratio * gain, clipped * gain)
    loss = -(weights[:, None] * mask * objective).sum()
    return loss, mask.bool() & (clipped * gain < ratio * gain)


def accumulate(model, batch: list[tuple], cfg: Config, old: list | None) -> tuple[dict, list]:
    """Adds the gradient of a batch of (trajectory, advantage, weight): metrics and logprobs.

    old: the logprobs that the first update of these rollouts returned; None in that update itself,
    whose ratio is 1. They are the trainer's own, so that the engine's rounding is not in the ratio.
    """
    device, total = model.device, sum(t.new_tokens for t, _, _ in batch)
    metrics = {"loss": 0.0, "entropy": 0.0, "clip_frac": 0.0, "sampler_logprob_diff": 0.0}
    seen = [None] * len(batch)
    for part in models.micro_batches([len(t.ids) for t, _, _ in batch], cfg.token_budget):
        rows = [batch[i][0] for i in part]
        ids = models.pad([t.ids for t in rows], device=device)  # (B, T)
        mask = models.pad([t.mask for t in rows], device=device)
        attention_mask = models.pad([[1] * len(t.ids) for t in rows], device=device)
        logprobs, entropy = models.token_logprobs(model, ids, attention_mask, mask, cfg.temperature)
        before = logprobs.detach()
        if old is not None:
            before = models.pad([old[i] for i in part], 0.0, torch.float32, device)
        gain, weight = (torch.tensor([batch[i][k] for i in part], device=device) for k in (1, 2))
        clip = cfg.clip_low, cfg.clip_high
        loss, clipped = grpo_loss(logprobs, before, mask, gain, weight, *clip)
        loss.backward()
        for row, i in enumerate(part):
            seen[i] = before[row, : len(batch[i][0].ids)].tolist()
        sampled = models.pad([t.logprobs for t in rows], 0.0, torch.float32, device)
        difference = torch.where(mask.bool(), before - sampled, 0.0).abs()  # of equal weights
        metrics["loss"] += loss.item()
        metrics["entropy"] += entropy.sum().item() / total
        metrics["clip_frac"] += clipped.sum().item() / total
        metrics["sampler_logprob_diff"] += difference.sum().item() / total
    return metrics, seen


def learn(model, optimizers: list, trajectories: list, rate: float, cfg: Config) -> dict:
    """All updates of one step; returns the metrics of the last. No step is taken on a batch that
    has nothing to teach: Adam would still move the weights."""
    kept = [cfg.overlong == "keep" or t.stop == "answered" for t in trajectories]
    rewards = [t.reward if keep else None for t, keep in zip(trajectories, kept, strict=True)]
    gain, valid = advantages(rewards, [t.group for t in trajectories], cfg.adv_norm)
    new_tokens = torch.tensor([t.new_tokens for t in trajectories]) * valid
    weights = sequence_weights(new_tokens, cfg.loss, cfg.max_new_tokens)
    batch = [
        (t, g, w)
        for t, g, w in zip(trajectories, gain.tolist(), weights.tolist(), strict=True)
        if g != 0 and w != 0
    ]
    metrics = {"loss": 0.0, "grad_norm": 0.0, "trained_share": len(batch) / len(trajectories)}
    old = None
    model.eval()  # no dropout: old and new logprobs, and the engine's, are of the same function
    for _ in range(cfg.updates_per_batch if batch else 0):
        update_metrics, seen = accumulate(model, batch, cfg, old)
        old = old or seen
        metrics |= update_metrics
        metrics["grad_norm"] = models.step(model, optimizers, rate, cfg.max_grad_norm)
    return metrics


def examples(cfg: Config, limit: int | None = None) -> list[dict]:
    """The data rows as the config says, the first `limit` of them."""
    columns = (cfg.prompt_column, cfg.answer_column, cfg.answer_after)
    prompts = (cfg.system_prompt, cfg.prompt_template)
    return data.load(cfg.data, cfg.split, *columns, *prompts, limit or cfg.limit, cfg.seed)


def setup(cfg: Config, tune: str, limit: int | None = None):
    """(model, tokenizer, chat, toolbox, rewards, examples); what is cheap to check comes first."""
    selected = reward_functions.select(cfg.rewards)
    toolbox = Toolbox(cfg.tools, cfg.tool_concurrency, cfg.tool_timeout)
    models.find(cfg.model)
    rows = examples(cfg, limit)
    tokenizer = models.load_tokenizer(cfg.model)
    chat = Chat(tokenizer, cfg.format, toolbox.schemas)  # proved before any weights are loaded
    if (length := len(chat.prompt(rows[0]["messages"]))) >= cfg.max_tokens:
        raise UserError(f"max_tokens = {cfg.max_tokens}: the first prompt alone has {length}")
    lora = (cfg.lora_r, cfg.lora_alpha, cfg.lora_targets, cfg.seed)
    model, _ = models.load(cfg.model, tune, cfg.dtype, "auto", *lora)
    return model, tokenizer, chat, toolbox, selected, rows


def prompts_of(step: int, rows: list[dict], count: int, seed: int) -> list[dict]:
    """The rows of a step: every row once in a random order, then all again in another."""
    picked = []
    for i in range(step * count, (step + 1) * count):
        epoch, at = divmod(i, len(rows))
        if not picked or at == 0:
            order = random.Random(f"{seed} {epoch}").sample(range(len(rows)), len(rows))
        picked.append(rows[order[at]])
    return picked


def train(cfg: Config) -> dict:
    """Trains, saves the model or adapter to out_dir, and returns the last step's metrics."""
    if cfg.temperature == 0:
        raise UserError("temperature = 0: all of a group would be alike, so give 0.7 to 1.0")
    out_dir = config.fresh_dir(cfg.out_dir)
    model, tokenizer, chat, toolbox, selected, rows = setup(cfg, cfg.tune)
    config.save(cfg, out_dir / "config.py")
    engine = TransformersEngine(model, tokenizer, cfg.deterministic)
    optimizers = models.optimizers(model, "adamw", cfg.learning_rate, cfg.weight_decay)

    trained, total = models.count(model)
    columns = {"reward": "6.3f", "accuracy": "5.3f", "tool_call_rate": "5.3f", "new_tokens": "6.1f"}
    columns |= {"loss": "8.4f", "grad_norm": "6.2f", "seconds": "5.2f"}
    knobs = "token_budget", "max_tokens", "group_size"
    with report.Log(out_dir, cfg.steps, columns) as log, models.memory_advice(*knobs):
        log.print(f"{len(rows)} prompts, {cfg.steps} steps, {trained:,} of {total:,} trained")
        for step in range(cfg.steps):
            started = time.monotonic()
            rate = cfg.learning_rate * models.schedule(step, cfg.steps, cfg.schedule, cfg.warmup)
            prompts = prompts_of(step, rows, cfg.prompts_per_step, cfg.seed)
            trajectories = wait(
                rollouts(
                    prompts,
                    chat,
                    engine,
                    toolbox,
                    Settings.of(cfg),
                    step=step,
                    samples=cfg.group_size,
                    rewards=selected,
                    on_done=log.expect(len(prompts) * cfg.group_size),
                )
            )
            rollout_seconds = time.monotonic() - started
            metrics = {"step": step, **stats(trajectories, next(iter(selected)))}
            metrics |= learn(model, optimizers, trajectories, rate, cfg) | {"learning_rate": rate}
            wait(engine.sync(model, step + 1))
            metrics |= {"rollout_seconds": rollout_seconds, "seconds": time.monotonic() - started}
            log.step(metrics)
            log.rollouts(trajectories[: cfg.rollouts_per_step], tokenizer, step=step)
        wait(engine.close())
        models.save(model, tokenizer, out_dir)
        log.summary({"saved": str(out_dir), "reward": metrics["reward"]})
    return metrics


if __name__ == "__main__":
    config.main(lambda argv: train(config.parse(Config, argv, check)))

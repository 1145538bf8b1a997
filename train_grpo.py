"""GRPO: teach a model to use tools by trying, over many turns, with an exact loss mask.

    python train_grpo.py --config calc.py                # a minute on a CPU, after calc_sft.py
    python train_grpo.py --config calc_lora.py           # only adapters are trained
    python train_grpo.py --config calc.py --resume=true  # goes on where it was stopped or killed
    python train_grpo.py --config gsm8k.py --dry_run=true  # one made-up rollout: no model needed
    python train_grpo.py --help                          # every knob: the Config below

A step: take P prompts; play G rollouts of each, with tools (rollout.py); reward them (rewards.py);
compare each with its group (loss.py, advantages); raise the probability of the sampled tokens of
the better ones (loss.py, grpo_loss).

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

import random
import time
from dataclasses import asdict, dataclass
from typing import Literal

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)  # before torch takes its second to load

import torch

import data
from engines.canary import Canary, sync_and_check
from learning import model as models
from learning import optim
from learning.batches import micro_batches, pad
from learning.checkpoint import Run
from learning.logprobs import shared_prefixes, shares_prompts, token_logprobs
from loss import grpo_loss, importance, sampler_mismatch, sequence_weights, set_advantages
from player import batch_of_groups, held_out, running, setup, validate
from run import log as run_log
from run.config import UserError
from run.loop import run_blocking
from trajectory import Trajectory, stats


@dataclass
class Config:
    # run
    out_dir: str = "out/grpo"  # must be new or empty
    resume: bool = False  # go on from out_dir's last checkpoint; without one, begin
    seed: int = 0  # of the order of the prompts, and of every turn that is sampled
    dry_run: bool = False  # plays one made-up rollout to check the config: no model, no download
    steps: int = 100  # batches of rollouts
    save_every: int = 50  # steps between checkpoints; 0: only when it ends or is stopped
    keep_last: int = 2  # checkpoints; each takes three times the memory of what is trained
    eval_every: int = 0  # steps between greedy evaluations on rows held out; 0: none
    eval_data: str = ""  # which rows, as in `data`; "": of that itself, another split
    eval_split: str = "test"  # of a task or a hub data set; a file has none
    eval_rows: int = 128  # the first so many of them
    # model
    model: str = "Qwen/Qwen2.5-0.5B-Instruct"  # hub id, or a folder that train_sft.py wrote
    tune: Literal["full", "lora", "qlora"] = "full"  # lora: small optimizer; qlora: 4-bit base too
    lora_r: int = 32  # rank of the adapters
    lora_alpha: int = 64  # their scale is lora_alpha / lora_r
    lora_targets: tuple[str, ...] = ("all-linear",)  # names of linear layers, or all of them
    dtype: Literal["float32", "bfloat16", "mixed"] = "float32"  # weights; mixed: products bfloat16
    gradient_checkpointing: bool = False  # a third slower, and long trajectories fit
    # engine
    engine: Literal["transformers", "vllm", "server"] = "transformers"  # vllm: on a GPU
    deterministic: bool = True  # equal seeds give equal bits; false: nobody waits for slow tools
    urls: tuple[str, ...] = ()  # server: of `vllm serve` processes, such as http://127.0.0.1:8000
    server_timeout: float = 60.0  # seconds without any server that answers, before the run stops
    gpu_memory_utilization: float = 0.5  # vllm: share of the GPU's memory; not used on a CPU
    kv_cache_gib: float = 0.0  # vllm: of its cache; 0: what that share leaves, on a CPU 1
    tensor_parallel_size: int = 1  # vllm: GPUs that share its weights
    enforce_eager: bool = False  # vllm: does not compile: starts sooner and samples slower
    sleep: bool = True  # vllm: leaves the GPU's memory to the trainer while it learns
    canary: bool = True  # stops the run when the engine has other weights than the trainer
    # data
    data: str = "task:calc"  # task:name, .jsonl, .parquet, or a hub id such as openai/gsm8k:main
    split: str = "train"  # of a task or a hub data set; a file has none
    limit: int | None = None  # use the first n rows
    prompt_column: str = "prompt"  # text, or a list of chat messages
    answer_column: str = "answer"  # text, a number, or a list of accepted ones
    answer_after: str = ""  # "####": only what follows it is the answer (GSM8K)
    system_prompt: str = ""  # put in front of prompts that have none
    prompt_template: str = "{prompt}"  # of the user message; {other_column} works too
    database: str = ""  # of sql: a row's SQLite file, such as dbs/{db_id}.sqlite; see {schema}
    # tools
    format: Literal[
        "auto", "hermes", "llama3", "mistral", "qwen_xml", "fence", "tags", "json_actions"
    ] = "hermes"  # how calls are written; auto: as the model's template does
    template_options: tuple[str, ...] = ()  # of the chat template, such as enable_thinking=false
    tools: tuple[str, ...] = ("python",)  # tools/<name>.py, my_file.py:name, mcp:servers.json
    tool_options: tuple[str, ...] = ()  # of a tool, such as search.k=5 or python.timeout=2
    tool_timeout: float = 10.0  # seconds a call may take
    tool_concurrency: int = 16  # calls that run at once, over all trajectories
    tool_cache: str = "memory"  # results of pure tools; none, or a file that is kept
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
    max_concurrent: int = 256  # trajectories that are played at once
    oversample: int = 0  # groups begun beyond P; the last are dropped: faster, but favours short
    # rewards
    rewards: tuple[str, ...] = ("correct",)  # name or file.py:name, each [:weight]; 1st = accuracy
    reward_options: tuple[str, ...] = ()  # of a reward, such as judge.model=gpt
    reward_timeout: float = 60.0  # seconds for each; what takes longer is not learnt from
    overlong: Literal["keep", "mask", "penalise"] = "keep"  # what a limit cut short; mask: unlearnt
    overlong_penalty: float = 1.0  # penalise: taken from its reward
    turn_credit: bool = False  # rewards that are lists count for their turn and those before it
    dynamic_sampling: str = ""  # a reward, such as correct: groups that agree on it are replaced
    dynamic_attempts: int = 3  # by at most so many rounds of further prompts
    # loss
    loss: Literal["dapo", "grpo", "dr_grpo", "gspo", "cispo"] = "dapo"  # see above
    adv_norm: Literal["group", "batch", "none"] = "group"  # what the advantage is divided by: a std
    rloo: bool = False  # compare with the mean of the others, without the trajectory itself
    updates_per_batch: int = 1  # passes over each batch of rollouts
    minibatches: int = 1  # updates in each pass, each on a part of the batch
    clip_low: float = 0.2  # the ratio is clipped at 1 - clip_low; gspo: 3e-4
    clip_high: float = 0.28  # and at 1 + clip_high; gspo: 4e-4, cispo: 1 and more
    beta: float = 0.0  # weight of the KL to the model that training began with, 0.001..0.04
    is_correction: Literal["auto", "none", "truncate", "mask"] = "auto"  # trainer over engine;
    # auto: truncate where the engine is not the trainer's own model, none where it is
    is_level: Literal["token", "sequence"] = "token"  # of whose probability that ratio is
    is_cap: float = 2.0  # truncate: it is at most this; mask: 0 where outside of 1 / cap .. cap
    # optimisation
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit: a quarter of its memory
    learning_rate: float = 1e-6  # 1e-6 full, 1e-5..1e-4 LoRA, 3e-4..1e-3 tiny
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up
    warmup: int = 0  # steps
    weight_decay: float = 0.0  # of matrices only
    max_grad_norm: float = 1.0  # the gradient is scaled down to this norm
    token_budget: int = 16384  # tokens per forward pass, padding counted; halve it if out of memory
    # log
    rollouts_per_step: int = 2  # trajectories written to rollouts.jsonl
    logger: Literal["none", "wandb", "tensorboard"] = "none"  # beside metrics.jsonl


VLLM = "gpu_memory_utilization kv_cache_gib tensor_parallel_size enforce_eager sleep"


def correction(cfg: Config) -> str:
    """The kind of is_correction that is used."""
    if cfg.is_correction != "auto":
        return cfg.is_correction
    return "none" if cfg.engine == "transformers" else "truncate"


def check(cfg: Config) -> None:
    """Rules across keys. A key that would have no effect is an error, not a surprise."""
    on_policy = cfg.updates_per_batch == cfg.minibatches == 1
    rules = (
        (cfg.tune == "full", "lora_r lora_alpha lora_targets", "with tune=full: use --tune=lora"),
        (on_policy, "clip_low clip_high", "with updates_per_batch=1 and minibatches=1: ratio = 1"),
        (cfg.loss == "cispo", "clip_low", "with loss=cispo: it bounds the ratio only above"),
        (cfg.overlong != "penalise", "overlong_penalty", f"with overlong={cfg.overlong}"),
        (not cfg.dynamic_sampling, "dynamic_attempts", "without dynamic_sampling=<a reward>"),
        (correction(cfg) == "none", "is_level is_cap", "with is_correction=none"),
        (not cfg.eval_every, "eval_data eval_split eval_rows", "without eval_every=<steps>"),
        (not cfg.tools, "tool_timeout tool_concurrency tool_cache", "with tools=(): no call runs"),
        (cfg.engine != "transformers", "deterministic", f"with engine={cfg.engine}"),
        (cfg.engine != "vllm", VLLM, f"with engine={cfg.engine}: use --engine=vllm, or drop it"),
        (cfg.engine != "server", "urls server_timeout", f"with engine={cfg.engine}"),
        (cfg.kv_cache_gib > 0, "gpu_memory_utilization", "with kv_cache_gib, which says it all"),
        (data.is_file(cfg.data), "split", f"on {cfg.data!r}: a file has no splits, so drop it"),
    )
    config.refuse_unused_keys(cfg, rules)
    if cfg.model == "tiny":
        raise UserError("model = 'tiny' is made by train_sft.py: give the folder that it wrote")
    if cfg.tune == "qlora" and cfg.dtype == "mixed":
        raise UserError("dtype = 'mixed' with tune=qlora: its base is not trained, use bfloat16")
    config.require_positive(
        cfg,
        "steps prompts_per_step max_tokens max_new_tokens max_turns max_observation_tokens lora_r "
        "lora_alpha updates_per_batch minibatches token_budget tool_concurrency learning_rate "
        "max_grad_norm tool_timeout reward_timeout trajectory_timeout clip_low clip_high keep_last "
        "is_cap dynamic_attempts overlong_penalty server_timeout gpu_memory_utilization "
        "max_concurrent tensor_parallel_size eval_rows",
    )
    zero = "temperature max_tool_calls warmup weight_decay rollouts_per_step seed beta save_every "
    config.require_not_negative(cfg, zero + "oversample kv_cache_gib eval_every")
    if cfg.engine == "server" and not cfg.urls:
        raise UserError("urls is missing: engine = 'server' needs --urls=http://host:port,…")
    if cfg.engine != "transformers" and 0 < cfg.temperature < 0.01:
        raise UserError(f"temperature = {cfg.temperature}: vLLM has 0, or 0.01 and more")
    if cfg.oversample and cfg.engine == "transformers" and cfg.deterministic:
        raise UserError("oversample takes who is first, by the clock: it needs deterministic=false")
    if cfg.gpu_memory_utilization > 1:
        raise UserError(f"gpu_memory_utilization = {cfg.gpu_memory_utilization}: at most 1")
    if cfg.seed >= 2**63:
        raise UserError(f"seed = {cfg.seed}: expected less than 2**63")
    if cfg.is_cap < 1:
        raise UserError(f"is_cap = {cfg.is_cap}: expected 1 or more, for the ratio should be 1")
    if cfg.group_size < 2:
        raise UserError(f"group_size = {cfg.group_size}: one has nothing to compare with")
    if cfg.warmup >= cfg.steps:
        raise UserError(f"warmup = {cfg.warmup}: expected less than steps = {cfg.steps}")
    if cfg.minibatches > (size := cfg.prompts_per_step * cfg.group_size):
        raise UserError(f"minibatches = {cfg.minibatches}: there are {size} trajectories to split")


def padded(rows: list[Trajectory], device) -> tuple[torch.Tensor, ...]:
    """(B, T) each: ids, attention_mask, mask, the engine's logprobs, each token's advantage."""
    spread = []
    for t in rows:
        ends = [*t.turn_starts, len(t.ids)]
        gains = [0.0] * ends[0]  # the prompt
        for k, gain in enumerate(t.advantages):  # a turn and the results of its calls
            gains += [gain] * (ends[k + 1] - ends[k])
        spread.append(gains)
    return (
        pad([t.ids for t in rows], device=device),
        pad([[1] * len(t.ids) for t in rows], device=device),
        pad([t.mask for t in rows], device=device),
        pad([t.logprobs for t in rows], 0.0, torch.float32, device),
        pad(spread, 0.0, torch.float32, device),
    )


def cut(model, rows: list[Trajectory], token_budget: int) -> list[list[int]]:
    """The indices of each micro-batch."""
    lengths, prompts = [len(t.ids) for t in rows], None
    if shares_prompts(model):
        prompts = shared_prefixes([t.ids for t in rows], [t.mask for t in rows])
    return micro_batches(lengths, token_budget, prompts)


@torch.no_grad()
def score(model, rows: list[Trajectory], cfg: Config) -> list[torch.Tensor]:
    """(T,) logprobs of each trajectory under the model as it is now."""
    scored = [None] * len(rows)
    for part in cut(model, rows, cfg.token_budget):
        ids, attention_mask, mask, *_ = padded([rows[i] for i in part], model.device)
        logprobs, _ = token_logprobs(model, ids, attention_mask, mask, cfg.temperature)
        for row, i in enumerate(part):
            scored[i] = logprobs[row, : len(rows[i].ids)]
    return scored


def accumulate(model, rows, weights, cfg: Config, old=None, ref=None) -> dict:
    """Adds the gradient of one update to what is there; returns its metrics.

    rows: trajectories with their advantages; weights: w_i of each. old, ref: their logprobs
    (`score`) before the first update and under the reference; old=None: this is that update. The
    trainer's own are taken and not the engine's, whose rounding then is not in the ratio.
    """
    device, total = model.device, sum(t.new_tokens for t in rows)
    sums, gaps, kind = dict.fromkeys(("loss", "entropy", "clip_frac"), 0.0), [], correction(cfg)
    for part in cut(model, rows, cfg.token_budget):
        ids, attention_mask, mask, sampled, gain = padded([rows[i] for i in part], device)
        logprobs, entropy = token_logprobs(model, ids, attention_mask, mask, cfg.temperature)
        before = logprobs.detach() if old is None else stack([old[i] for i in part])
        more, weight = {}, torch.tensor([weights[i] for i in part], device=device)
        if kind != "none":
            more["importance"] = importance(before, sampled, mask, kind, cfg.is_level, cfg.is_cap)
            weighed = torch.where(mask.bool(), more["importance"], 0.0).sum().item() / total
            sums["is_weight"] = sums.get("is_weight", 0.0) + weighed
            out = (more["importance"] == 0) | (more["importance"] == cfg.is_cap)
            for row, i in enumerate(part):  # long trajectories drift more: by number of turns
                count = (out[row] & mask[row].bool()).sum().item() / total
                for key in ("is_outside", f"is_outside_turns_{len(rows[i].turn_starts)}"):
                    sums[key] = sums.get(key, 0.0) + count
        if cfg.beta:
            more |= {"beta": cfg.beta, "ref_logprobs": stack([ref[i] for i in part])}
        clip = cfg.clip_low, cfg.clip_high
        loss, parts = grpo_loss(logprobs, before, mask, gain, weight, cfg.loss, *clip, **more)
        loss.backward()
        gaps.append((before - sampled)[mask.bool()].cpu())
        sums["loss"] += loss.item()
        sums["entropy"] += entropy.sum().item() / total
        sums["clip_frac"] += parts["clipped"].sum().item() / total
        if cfg.beta:
            sums["kl"] = sums.get("kl", 0.0) + parts["kl"].sum().item() / total
    return sums | sampler_mismatch(torch.cat(gaps))


def stack(rows: list[torch.Tensor]) -> torch.Tensor:
    """(B, T), padded on the right with 0."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def learn(model, optimizers, trajectories, rate, cfg: Config, step=0, reference=None) -> dict:
    """All updates of one step; returns the mean of their metrics. No step is taken on a batch that
    has nothing to teach: Adam would still move the weights."""
    valid = set_advantages(trajectories, cfg)
    new_tokens = torch.tensor([t.new_tokens for t in trajectories]) * valid
    taught = [  # equal rewards teach nothing; the KL, though, is of every token
        i for i, t in enumerate(trajectories) if new_tokens[i] and (any(t.advantages) or cfg.beta)
    ]
    models.without_dropout(model)
    learnt, old, ref = set(taught), {}, {}
    if cfg.updates_per_batch * cfg.minibatches > 1:
        old = dict(zip(taught, score(model, [trajectories[i] for i in taught], cfg), strict=True))
    if cfg.beta:
        with models.with_initial_weights(reference):
            rows = [trajectories[i] for i in taught]
            ref = dict(zip(taught, score(reference, rows, cfg), strict=True))
    seen, order = [], list(range(len(trajectories)))
    for update in range(cfg.updates_per_batch):
        if cfg.minibatches > 1:
            random.Random(f"{cfg.seed} {step} {update}").shuffle(order)
        for first in range(cfg.minibatches):
            part = order[first :: cfg.minibatches]
            weights = sequence_weights(new_tokens[part], cfg.loss, cfg.max_new_tokens).tolist()
            chosen = [(i, w) for i, w in zip(part, weights, strict=True) if i in learnt]
            if not chosen:
                continue
            rows, weights = [trajectories[i] for i, _ in chosen], [w for _, w in chosen]
            given = [[known[i] for i, _ in chosen] if known else None for known in (old, ref)]
            seen.append(accumulate(model, rows, weights, cfg, *given))
            seen[-1]["grad_norm"] = optim.step(model, optimizers, rate, cfg.max_grad_norm)
    model.eval()
    keys = dict.fromkeys(["loss", "grad_norm"] + [key for metrics in seen for key in metrics])
    mean = {key: sum(m.get(key, 0.0) for m in seen) / max(1, len(seen)) for key in keys}
    if (largest := "sampler_logprob_diff_max") in mean:
        mean[largest] = max(m[largest] for m in seen)
    return mean | {"trained_share": len(taught) / len(trajectories)}


def train(cfg: Config) -> dict:
    """Trains, saves the model or adapter to out_dir, and returns the last step's metrics."""
    check(cfg)  # also one that was made in a notebook, not by config.parse
    if cfg.dry_run:
        import play

        return {"reward": play.grpo(cfg).reward}
    if cfg.temperature == 0:
        raise UserError("temperature = 0: all of a group would be alike, so give 0.7 to 1.0")
    run_log.check_logger(cfg.logger)
    run = Run(cfg)
    val_rows = held_out(cfg)
    model, tokenizer, chat, toolbox, selected, rows = setup(cfg, cfg.tune)
    reference = models.load_reference(cfg.model, model, cfg.tune, cfg.dtype) if cfg.beta else None
    if cfg.gradient_checkpointing:
        models.recompute_layers(model)
    optimizers = optim.optimizers(model, cfg.optimizer, cfg.learning_rate, cfg.weight_decay)
    state = run.restore(model, optimizers) or {"step": 0, "cursor": 0, "metrics": {}}
    first, cursor, metrics = state["step"], state["cursor"], state["metrics"]

    trained, total = optim.count(model)
    columns = {"reward": "6.3f", "accuracy": "5.3f", "tool_call_rate": "5.3f", "new_tokens": "6.1f"}
    columns |= {"loss": "8.4f", "grad_norm": "6.2f", "seconds": "5.2f"}
    knobs = "token_budget", "max_tokens", "group_size"
    log = run_log.Log(run.out_dir, cfg.steps, columns, first, cfg.logger, asdict(cfg))
    canary = Canary(chat.prompt(rows[0]["messages"]), cfg.dtype) if cfg.canary else None
    with log, optim.memory_advice(*knobs), run, running(cfg, model, tokenizer, toolbox) as engine:
        log.print(f"{len(rows)} prompts, {cfg.steps} steps, {trained:,} of {total:,} trained")
        if cfg.resume:
            log.print(f"going on with step {first}")
        for step in range(first, cfg.steps):
            started, before, last = time.monotonic(), cursor, metrics
            rate = cfg.learning_rate * optim.schedule(step, cfg.steps, cfg.schedule, cfg.warmup)
            kept, metrics = (model, tokenizer, optimizers, log), {"step": step}
            with run.rescue(step, *kept, cursor=cursor, metrics=last):
                metrics |= run_blocking(sync_and_check(engine, model, step, canary))
                if val_rows and step % cfg.eval_every == 0:  # of the weights that `step` steps made
                    metrics |= validate(val_rows, cfg, chat, engine, toolbox, selected, log)
                trajectories, played, cursor = batch_of_groups(
                    rows, cursor, cfg, chat, engine, toolbox, selected, step, log
                )
                metrics |= optim.gpu_gib("rollout")
                run_blocking(engine.sleep())
            other = metrics["sync_seconds"] + metrics.get("val_seconds", 0.0)
            rollout_seconds = time.monotonic() - started - other
            metrics |= stats(played, next(iter(selected))) | {"tools_leaked": toolbox.leaked}
            if cfg.oversample:  # who was taken: the first to be complete, and so the shorter
                metrics["groups_dropped"] = cursor - before - len(played) // cfg.group_size
                metrics["groups_kept"] = sorted({t.group for t in played})
            metrics |= learn(model, optimizers, trajectories, rate, cfg, step, reference)
            metrics |= optim.gpu_gib("learn")
            metrics |= {"learning_rate": rate, "rollout_seconds": rollout_seconds}
            metrics["seconds"] = time.monotonic() - started
            log.step(metrics)
            log.rollouts(trajectories[: cfg.rollouts_per_step], tokenizer, step=step)
            run.after(step + 1, cfg.steps, *kept, cursor=cursor, metrics=metrics)
        run.finish(model, tokenizer)
        said = {"saved": str(run.out_dir), "reward": metrics["reward"]}
        if val_rows:
            run_blocking(sync_and_check(engine, model, cfg.steps, canary))
            said |= validate(val_rows, cfg, chat, engine, toolbox, selected, log)
        log.summary(said | {"known_results": toolbox.cache.hits})
    return metrics


if __name__ == "__main__":
    config.main(lambda argv: train(config.parse(Config, argv, check)))

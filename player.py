"""A config becomes what plays."""

import contextlib
import random
import time
from dataclasses import replace

import data
import rewards as reward_functions
from chat import Chat
from engines.base import Engine, check_engine
from engines.local import TransformersEngine
from learning import model as models
from rollout import Settings, rollouts
from run import config
from run.config import UserError
from run.loop import run_blocking
from tools import Toolbox
from trajectory import stats

VALIDATION_SEED = 2_000_000  # of a task's rows: neither those of training nor evaluate.py's


def task(cfg, limit: int | None = None):
    """(toolbox, rewards, examples) of train_grpo's Config or one like it: all that does not depend
    on a model. limit: use the first so many rows, instead of cfg.limit."""
    selected = reward_functions.select(cfg.rewards, cfg.reward_options, cfg.reward_timeout)
    instant = all(reward.instant for reward, _ in selected.values())
    config.refuse_unused_keys(
        cfg, [(instant, "reward_timeout", "with these rewards: they never wait")]
    )
    if cfg.dynamic_sampling not in ("", *selected):
        names = ", ".join(selected)
        raise UserError(f"dynamic_sampling = {cfg.dynamic_sampling!r}: expected one of {names}")
    options = cfg.tool_options, cfg.tool_cache
    toolbox = Toolbox(cfg.tools, cfg.tool_concurrency, cfg.tool_timeout, *options)
    return toolbox, selected, _rows(cfg, cfg.data, cfg.split, limit or cfg.limit, cfg.seed)


def _rows(cfg, source: str, split: str, limit: int | None, seed: int) -> list[dict]:
    columns = (cfg.prompt_column, cfg.answer_column, cfg.answer_after)
    prompts = (cfg.system_prompt, cfg.prompt_template, limit, seed)
    return data.load(source, split, *columns, *prompts, database=cfg.database)


def setup(cfg, tune: str, limit: int | None = None):
    """(model, tokenizer, chat, toolbox, rewards, examples); what is cheap to check comes first. The
    model is None if only an engine elsewhere has to have it."""
    check_engine(cfg.engine, cfg.urls, tune)
    models.find(cfg.model)
    toolbox, selected, rows = task(cfg, limit)
    tokenizer = models.load_tokenizer(cfg.model)
    # proved before any weights are loaded
    chat = Chat(tokenizer, cfg.format, toolbox.schemas, cfg.template_options)
    check_prompt(chat, rows[0], cfg.max_tokens)
    lora = (cfg.lora_r, cfg.lora_alpha, cfg.lora_targets, cfg.seed)
    if tune == "none" and cfg.tune == "qlora" and models.is_adapter(cfg.model):
        tune = "none4bit"  # what was trained was an adapter on the rounded base
    model = None
    if cfg.engine == "transformers" or tune != "none":
        model, _ = models.load(cfg.model, tune, cfg.dtype, "auto", *lora)
    return model, tokenizer, chat, toolbox, selected, rows


def held_out(cfg) -> list[dict]:
    """The rows that train_grpo's eval_every is about; [] without it."""
    if not cfg.eval_every:
        return []
    if data.is_file(cfg.data) and not cfg.eval_data:
        why = f"data = {cfg.data!r} is a file and has no split of its own for eval_every"
        raise UserError(f"eval_data is missing: {why}")
    source = cfg.eval_data or cfg.data
    config.refuse_unused_keys(
        cfg, [(data.is_file(source), "eval_split", f"on {source!r}: a file has none")]
    )
    return _rows(cfg, source, cfg.eval_split, cfg.eval_rows, VALIDATION_SEED)


def validate(rows: list[dict], cfg, chat, engine, toolbox, selected, log) -> dict:
    """The metrics of playing `rows` greedily, once each; printed too."""
    started, settings = time.monotonic(), replace(Settings.of(cfg), temperature=0.0)
    played = rollouts(rows, chat, engine, toolbox, settings, rewards=selected)
    found = stats(run_blocking(played), next(iter(selected)))
    metrics = {f"val_{key}": found[key] for key in ("accuracy", "reward", "tool_call_rate")}
    log.print("           " + "  ".join(f"{key} {value:.4f}" for key, value in metrics.items()))
    return metrics | {"val_seconds": time.monotonic() - started}


def check_prompt(chat: Chat, example: dict, max_tokens: int) -> None:
    """UserError if there is no room to answer it."""
    if (length := len(chat.prompt(example["messages"]))) >= max_tokens:
        raise UserError(f"max_tokens = {max_tokens}: the first prompt alone has {length}")


async def start_engine(cfg, model, tokenizer) -> Engine:
    """Starts the engine that train_grpo's Config, or one like it, names; its first sync is to come.

    model: the policy; only the transformers engine and a rounded base (qlora) need it, else it may
    be None. UserError if the engine does not start.
    """
    if cfg.engine == "transformers":
        return TransformersEngine(model, tokenizer, cfg.deterministic)
    if cfg.engine == "server":
        from engines import servers

        return await servers.start(
            cfg.urls, cfg.model, tokenizer, timeout=cfg.server_timeout, max_tokens=cfg.max_tokens
        )
    from engines import vllm as vllm_engine

    is_trained = model is not None and any(p.requires_grad for p in model.parameters())
    return await vllm_engine.start(
        cfg.model,
        model,
        cfg.dtype,
        full=is_trained and cfg.tune == "full",
        lora_r=cfg.lora_r if is_trained and cfg.tune != "full" else 0,
        sleeps=cfg.sleep and is_trained,
        tensor_parallel_size=cfg.tensor_parallel_size,
        kv_cache_gib=cfg.kv_cache_gib,
        max_model_len=cfg.max_tokens,
        max_num_seqs=cfg.max_concurrent,
        gpu_memory_utilization=cfg.gpu_memory_utilization,
        enforce_eager=cfg.enforce_eager,
        seed=cfg.seed % 2**32,
    )


@contextlib.contextmanager
def running(cfg, model, tokenizer, toolbox):
    """The engine that the config names. It and the tools are closed in the end, however it ends."""
    try:
        engine = run_blocking(start_engine(cfg, model, tokenizer))
        try:
            yield engine
        finally:
            run_blocking(engine.close())
    finally:
        run_blocking(toolbox.close())


def prompts_of(cursor: int, rows: list[dict], count: int, seed: int) -> list[dict]:
    """The next `count` rows after `cursor` were taken: every row once in a random order, then all
    again in another."""
    picked = []
    for i in range(cursor, cursor + count):
        epoch, at = divmod(i, len(rows))
        if not picked or at == 0:
            order = random.Random(f"{seed} {epoch}").sample(range(len(rows)), len(rows))
        picked.append(rows[order[at]])
    return picked


def batch_of_groups(rows, cursor: int, cfg, chat, engine, toolbox, selected, step: int, log):
    """(trajectories to learn from, all that were played to the end, the cursor after them): of a
    step of train_grpo. With oversample, so many groups more are begun and the last ones dropped.
    With dynamic_sampling, groups whose outcomes are all equal are replaced by those of the next
    prompts; what is still missing after dynamic_attempts rounds is filled up with them."""
    size, kept, equal, played, started = cfg.group_size, [], [], [], 0
    for _ in range(1 + (cfg.dynamic_attempts if cfg.dynamic_sampling else 0)):
        missing = cfg.prompts_per_step - len(kept)
        prompts = prompts_of(cursor + started, rows, missing + cfg.oversample, cfg.seed)
        new = run_blocking(
            rollouts(
                prompts,
                chat,
                engine,
                toolbox,
                Settings.of(cfg),
                step=step,
                samples=size,
                rewards=selected,
                on_done=log.expect(len(prompts) * size),
                first_group=started,  # so that no two share a seed
                need=missing,
            )
        )
        started += len(prompts)
        played += new
        for group in (new[i : i + size] for i in range(0, len(new), size)):
            outcomes = {t.rewards[cfg.dynamic_sampling] for t in group if cfg.dynamic_sampling}
            differ = not cfg.dynamic_sampling or len(outcomes - {None}) > 1
            (kept if differ else equal).append(group)
        if len(kept) == cfg.prompts_per_step:
            break
    kept += equal[: cfg.prompts_per_step - len(kept)]
    return [t for group in kept for t in group], played, cursor + started

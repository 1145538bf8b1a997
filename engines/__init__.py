"""How tokens are sampled: one small interface, several engines."""

import importlib.util

from engines.base import Engine
from engines.local import TransformersEngine
from run.config import UserError


def check(name: str, urls: tuple[str, ...], tune: str) -> None:
    """UserError if an engine cannot be started, as far as that is known in no time. tune: what will
    be synced, "none" for nothing."""
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "engine = 'vllm' needs vLLM: pip install -e \".[vllm]\" on a machine with a GPU; "
            "`make test-vllm` installs the build for CPUs"
        )
    if name == "server" and tune == "full":
        raise UserError("engine = 'server' takes adapters only: use --tune=lora or qlora")
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"urls = {url!r}: expected http://host:port")


async def start(cfg, model, tokenizer) -> Engine:
    """The engine that train_grpo's Config (or one like it) names, before its first sync. model: the
    policy; only the transformers engine and a rounded base (qlora) need it, else it may be None."""
    if cfg.engine == "transformers":
        return TransformersEngine(model, tokenizer, cfg.deterministic)
    if cfg.engine == "server":
        from engines import servers

        how = cfg.server_timeout, cfg.max_tokens
        return await servers.start(cfg.urls, cfg.model, tokenizer, *how)
    from engines import vllm as vllm_engine

    trained = model is not None and any(p.requires_grad for p in model.parameters())
    return await vllm_engine.start(
        cfg.model,
        model,
        cfg.dtype,
        full=trained and cfg.tune == "full",
        lora_r=cfg.lora_r if trained and cfg.tune != "full" else 0,
        sleeps=cfg.sleep and trained,
        tensor_parallel_size=cfg.tensor_parallel_size,
        kv_cache_gib=cfg.kv_cache_gib,
        max_model_len=cfg.max_tokens,
        max_num_seqs=cfg.max_concurrent,
        gpu_memory_utilization=cfg.gpu_memory_utilization,
        enforce_eager=cfg.enforce_eager,
        seed=cfg.seed % 2**32,
    )

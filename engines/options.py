"""What may be said of an engine beyond its name: engine_options=("enforce_eager=true",).

Each engine has its own; one that the chosen engine does not have is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from run import plugins
from run.config import UserError


@dataclass
class TransformersOptions:
    deterministic: bool = True  # equal seeds give equal bits; false: nobody waits for slow tools
    patience: float = 0.0  # deterministic=false: a batch starts so many seconds after a newcomer
    canary: bool = True  # false: a run goes on though the engine has other weights than the trainer


@dataclass
class VllmOptions:
    tensor_parallel_size: int = 1  # GPUs that share its weights
    kv_cache_gib: float = 0.0  # of its cache; 0: what gpu_memory_utilization leaves, on a CPU 1
    enforce_eager: bool = False  # does not compile: starts sooner and samples slower
    sleep: bool = True  # leaves the GPU's memory to the trainer while it learns
    images: bool = True  # false: vLLM leaves out a model's tower, for tools that return text alone
    canary: bool = True


@dataclass
class ServerOptions:
    timeout: float = 60.0  # seconds without any server that answers, before the run stops
    folder: str = ""  # where weights are laid for them; "": of this machine, in out_dir if full
    transport: Literal["file", "gloo", "nccl"] = "file"  # of full weights; gloo: over the network
    # without a folder that both see; nccl: so too, between GPUs
    canary: bool = True


KINDS = {"transformers": TransformersOptions, "vllm": VllmOptions, "server": ServerOptions}


def read_options(
    engine: str, options: Sequence[str]
) -> TransformersOptions | VllmOptions | ServerOptions:
    """Reads ("name=value", …) as the options of this engine. UserError for one that it has not, or
    that is no such value."""
    texts = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not (name and equals and text):
            raise UserError(f"engine_options: cannot read {option!r}: write name=value")
        if name in texts:
            raise UserError(f"engine_options: {name} is given twice: keep one of them")
        texts[name] = text
    kind = KINDS[engine]
    read = kind(**plugins.bind(kind, texts, f"engine_options: {engine}"))
    for name in ("tensor_parallel_size", "timeout"):
        if getattr(read, name, 1) <= 0:
            value = getattr(read, name)
            raise UserError(f"engine_options: {engine}.{name} = {value}: expected more than 0")
    if engine == "server" and read.folder and read.transport != "file":
        raise UserError(
            f"engine_options: server.folder has no effect with transport={read.transport}: "
            "no file is written"
        )
    if getattr(read, "patience", 0) < 0:
        raise UserError(f"engine_options: patience = {read.patience}: expected seconds, >= 0")
    if getattr(read, "patience", 0) and read.deterministic:
        raise UserError("engine_options: patience has no effect without deterministic=false")
    if getattr(read, "kv_cache_gib", 0) < 0:
        raise UserError(f"engine_options: vllm.kv_cache_gib = {read.kv_cache_gib}: expected >= 0")
    return read

"""What a run will hold in a GPU's memory, phase by phase, told before it is begun.

    python train_grpo.py --config aime.py --fits=80          # a card of 80 GiB
    python train_grpo.py --config aime.py --fits=80 --parallel=ddp --gpus=8
    python train_sft.py --config sft_aime.py --fits=24

Needed is the model's config.json: no weights, no GPU. Weights, gradients and moments are counted.
What a forward and a backward pass hold is counted too: the model's own code, with its adapters and
its recomputed layers, runs on tensors that have shapes but no numbers (torch's FakeTensorMode), and
each one is added up from when it is made to when it is freed. The head is logprobs.py's own.

bench/memory.py compares this with what processes took. Four things are assumed, because only a GPU
can show them: CUDA_BYTES, UNFILLED, ASLEEP and AWAKE.
"""

import contextlib
import copy
import functools
import logging
import weakref
from dataclasses import asdict, dataclass, replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from learning import model as models
from learning import whole
from learning.logprobs import decoder_of, has_plain_head, head_logprobs
from run import config
from run.config import UserError

GIB = 2**30
CUDA_BYTES = 0.75 * GIB  # of a process: CUDA's context, and what its libraries work in
UNFILLED = 0.05  # of all else: what the allocator holds and nobody uses
ASLEEP = 1.5 * GIB  # of vLLM while it sleeps: its context and its graphs
AWAKE = 2.5 * GIB  # of vLLM beside weights and cache: that, and a pass of its own
BATCH = 256  # rows that the transformers engine decodes at once
# A weight in 4 bits: half a byte, a byte for 64 of them, and 4 bytes for 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# AdamW8bit: two bytes, and 4 bytes of scale for 256 of either moment; small tensors stay whole.
ADAMW8BIT_BYTES = 2 + 2 * 4 / 256
ADAMW8BIT_LEAST = 4096  # numbers
ENGINE = "engine and its cache"
# What weights depend on, and what a pass does.
OF_WEIGHTS = "model tune lora_r lora_alpha lora_targets train_vision dtype"
OF_A_PASS = f"{OF_WEIGHTS} gradient_checkpointing token_budget max_tokens"
PHASES = ("start", "rollout", "learn", "save")


@dataclass(frozen=True)
class Setup:
    """All that the memory of one GPU depends on: keys of a Config."""

    model: str
    tune: str = "full"
    lora_r: int = 32
    lora_alpha: int = 64
    lora_targets: tuple[str, ...] = ("all-linear",)
    train_vision: bool = False
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    parallel: str = "none"
    gpus: int = 1
    token_budget: int = 16384
    max_tokens: int = 2048
    engine: str = "none"  # none: nothing is sampled, as in SFT
    gpu_memory_utilization: float = 0.5
    kv_cache_gib: float = 0.0
    tensor_parallel_size: int = 1
    sleeps: bool = True
    max_concurrent: int = 0
    trajectories: int = 0  # of a step, on all GPUs
    has_reference: bool = False

    @classmethod
    def of(cls, cfg, engine_options=None) -> "Setup":
        """Takes them from the Config of a training script. engine_options: of read_options."""
        values = asdict(cfg)
        taken = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        if engine_options is not None:
            taken["trajectories"] = cfg.prompts_per_step * cfg.group_size
            taken["has_reference"] = cfg.beta > 0 and cfg.tune == "full"
        if taken.get("engine") == "vllm":
            taken["kv_cache_gib"] = engine_options.kv_cache_gib
            taken["tensor_parallel_size"] = engine_options.tensor_parallel_size
            taken["sleeps"] = engine_options.sleep
        return cls(**taken)

    def only(self, keys: str) -> "Setup":
        """Returns one with these of its values alone, for what depends on nothing else: it is
        counted once for all that share them. keys: "key key"."""
        return Setup(**{key: getattr(self, key) for key in keys.split()})

    @property
    def batch_shape(self) -> tuple[int, int]:
        """The largest micro-batch: (rows, tokens of each), as long as the budget lets it be."""
        if self.max_tokens >= self.token_budget:
            return 1, self.max_tokens  # a longer one than the budget is a batch of its own
        rows = -(-self.token_budget // self.max_tokens)
        return rows, self.token_budget // rows

    @property
    def rows(self) -> int:
        """Trajectories that are sampled at once on a GPU, at most."""
        own = -(-self.trajectories // self.gpus)
        return min(own, self.max_concurrent)


# -- what is counted


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside, until each is freed.

    known: those that are there before, and not counted: views of them are made inside, too.
    """

    def __init__(self, known=()):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage) -> None:
        key = storage._cdata  # views share it
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@dataclass
class Counted:
    """Of one model, in bytes unless it says otherwise."""

    base: float  # its weights, without adapters
    base_numbers: int
    vocabulary: int  # tokens
    adapters: int
    trained: list[tuple[int, int, bool]]  # of each tensor: numbers, bytes, is it for Muon
    largest: int  # tensor


@dataclass
class Passed:
    """Of a forward and backward pass of the largest micro-batch, in bytes."""

    activations: float  # what the layers leave for the backward pass
    on_top: float  # at the peak: a chunk of logits, gradients and recomputed parts of a layer


def count(setup: Setup) -> Counted:
    """Counts the weights of a model as it is trained."""
    return _count(setup.only(OF_WEIGHTS))


@functools.lru_cache(maxsize=64)
def _count(setup: Setup) -> Counted:
    # 1. without adapters
    policy = _skeleton(setup.model, setup.dtype)
    base = 0.0
    numbers = 0
    for parameter in policy.parameters():
        base += parameter.nbytes
        numbers += parameter.numel()
    if setup.tune == "qlora":
        for weight in _four_bit_weights(policy):
            base += NF4_BYTES * weight.numel() - weight.nbytes

    # 2. with them
    policy = _tuned(policy, setup)
    trained = []
    adapters = 0
    largest = 0
    for name, parameter in policy.named_parameters():
        largest = max(largest, parameter.nbytes)
        if "lora_" in name:
            adapters += parameter.nbytes
        if parameter.requires_grad:
            is_matrix = parameter.ndim == 2 and ".layers." in name
            trained.append((parameter.numel(), parameter.nbytes, is_matrix))
    vocabulary = policy.config.get_text_config().vocab_size
    return Counted(base, numbers, vocabulary, adapters, trained, largest)


def count_pass(setup: Setup) -> Passed:
    """Counts what a pass of the largest micro-batch holds. Where all layers are alike, that is
    done with two and with three of them: each further one adds the same."""
    depth, *shallow = _depths(setup.model)
    counted = [_count_pass(setup.only(OF_A_PASS), layers) for layers in shallow]
    first, last = counted[0], counted[-1]
    activations = _at_depth(depth, shallow, first.activations, last.activations)
    return Passed(activations, _at_depth(depth, shallow, first.on_top, last.on_top))


def _at_depth(depth: int, counted_at: list[int], first: float, last: float) -> float:
    """Goes on in a straight line from what two depths have; of one, returns that."""
    if len(counted_at) == 1:
        return first
    shallow, deeper = counted_at
    return first + (depth - shallow) / (deeper - shallow) * (last - first)


def _depths(model: str) -> list[int]:
    """Returns how many layers a model has, and with how many it is counted: all of them, or where
    all are alike, with two and three."""
    depth = _config_of(model).get_text_config().num_hidden_layers
    if depth > 3 and _are_alike(model):
        return [depth, 2, 3]
    return [depth, depth]


@functools.lru_cache(maxsize=256)
def _count_pass(setup: Setup, layers: int) -> Passed:
    policy = _skeleton(setup.model, setup.dtype, layers)
    widest = 0  # bytes of the largest matrix that is made from 4 bits when it is needed
    if setup.tune == "qlora":
        widest = max(weight.nbytes for weight in _four_bit_weights(policy))
    policy = _tuned(policy, setup)
    if setup.gradient_checkpointing:
        models.recompute_layers(policy)
    is_plain = has_plain_head(policy)
    with _without_numbers(setup.model):
        _seem_on_cpu(policy)
        if setup.dtype == "mixed":
            models.in_dtype(policy, "mixed")
        for parameter in policy.parameters():
            if parameter.requires_grad:
                # in all but the first pass of an update the gradients are there already
                parameter.grad = torch.zeros_like(parameter)
        activations, peak = _pass_bytes(policy, *setup.batch_shape, is_plain)
    return Passed(activations, peak - activations + widest)


@functools.lru_cache(maxsize=64)
def cache_bytes(model: str, dtype: str, tokens: int) -> float:
    """Counts what a model keeps of a trajectory that it has read: keys and values, states."""
    depth, *shallow = _depths(model)
    counted = [_cache_bytes(model, dtype, tokens, layers) for layers in shallow]
    return _at_depth(depth, shallow, counted[0], counted[-1])


def _cache_bytes(model: str, dtype: str, tokens: int, layers: int) -> float:
    policy = _skeleton(model, dtype, layers)
    with _without_numbers(model):
        _seem_on_cpu(policy)
        if dtype == "mixed":
            models.in_dtype(policy, dtype)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        with torch.no_grad(), LiveBytes(_tensors_of(policy)) as live:
            output = decoder_of(policy)(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True
            )
            kept = [value for name, value in output.items() if name != "last_hidden_state"]
            del output
            assert kept, "a model that keeps nothing cannot be sampled from"
            return live.now


# -- models of shapes alone


@functools.lru_cache(maxsize=64)
def _config_of(model: str):
    from transformers import AutoConfig

    base = models.base_of(model)
    return AutoConfig.from_pretrained(base, trust_remote_code=False)


@functools.lru_cache(maxsize=64)
def _are_alike(model: str) -> bool:
    """Says whether all layers have weights of the same shapes, and are of one type."""
    text_config = _config_of(model).get_text_config()
    if len(set(getattr(text_config, "layer_types", None) or [])) > 1:
        return False
    decoder = decoder_of(_skeleton(model, "bfloat16"))
    shapes = set()
    for layer in decoder.layers:
        shapes.add(tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()))
    return len(shapes) == 1


def _skeleton(model: str, dtype: str, layers: int = 0):
    """Makes a model of its config.json, on "meta". layers: so many, 0: all of them."""
    try:
        model_config = copy.deepcopy(_config_of(model))
        auto_class = whole.auto_class(models.base_of(model))
        text_config = model_config.get_text_config()
        if layers:
            text_config.num_hidden_layers = layers
            if vars(text_config).get("layer_types"):  # where it is no property
                text_config.layer_types = text_config.layer_types[:layers]
        weights_dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        with torch.device("meta"):
            return auto_class.from_config(model_config, dtype=weights_dtype)
    except UserError:
        raise
    except Exception as error:  # missing, broken, unknown
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model = {model!r}: its config.json makes no model ({reason})") from None


def _four_bit_weights(policy) -> list:
    """Lists the weights that tune=qlora rounds: of the linear layers below the head."""
    weights = []
    for part in decoder_of(policy).modules():
        if isinstance(part, torch.nn.Linear):
            weights.append(part.weight)
    return weights


def _tuned(policy, setup: Setup):
    """Returns the model with what is trained of it."""
    if setup.tune == "full":
        policy.requires_grad_(True)
    else:
        with torch.device("meta"):  # else their matrices are drawn
            policy = models.add_adapter(
                policy,
                setup.lora_r,
                setup.lora_alpha,
                setup.lora_targets,
                seed=0,
                train_vision=setup.train_vision,
            )
    if whole.is_whole(policy) and not setup.train_vision:
        whole.freeze_other_parts(policy)
    return policy


@contextlib.contextmanager
def _without_numbers(model: str):
    """Lets code run on tensors that have shapes alone. UserError where it asks for numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    # else a screen full of torch's own lines stands before the sentence below
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    except Exception as error:  # of the model's own code
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model = {model!r}: its memory cannot be counted, because its code asks for numbers "
            f"where there are only shapes ({type(error).__name__}: {reason}): try the run itself"
        ) from error


def _tensors_of(policy) -> list:
    """Lists what a model is made of, with the gradients that are there."""
    tensors = [*policy.parameters(), *policy.buffers()]
    return tensors + [p.grad for p in policy.parameters() if p.grad is not None]


def _seem_on_cpu(policy) -> None:
    """Puts tensors that say they are on a CPU in the place of those on "meta", which take other
    ways through the code: autocast passes them by. To be called inside of a FakeTensorMode."""
    seeming = {}  # tensor: what takes its place; tied weights stay one
    for module in policy.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if tensor not in seeming:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, torch.nn.Parameter):
                        fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    seeming[tensor] = fake
                store[name] = seeming[tensor]


def _pass_bytes(policy, rows: int, tokens: int, is_plain: bool) -> tuple[float, float]:
    """Counts a pass of `rows` sequences, all of whose tokens are trained: what is held between the
    layers and the head, and at the peak."""
    models.without_dropout(policy)
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    attention_mask = torch.ones_like(ids)
    with LiveBytes([ids, attention_mask, *_tensors_of(policy)]) as live:
        output = decoder_of(policy)(
            input_ids=ids,
            attention_mask=attention_mask,
            position_ids=attention_mask.cumsum(1) - 1,
            use_cache=False,
        )
        hidden = output.last_hidden_state[:, :-1].flatten(0, 1)  # (N, H)
        del output
        activations = live.now
        logprobs, _ = head_logprobs(policy, hidden, ids[:, 1:].flatten(), is_plain=is_plain)
        del hidden
        logprobs.sum().backward()
        return activations, live.peak


# -- what a run needs of it


def needs(setup: Setup, gpu_gib: float, on_gpu: bool = True) -> dict[str, dict[str, float]]:
    """Computes {phase: {part: bytes}} of one GPU. on_gpu: with what CUDA takes for itself."""
    counted = count(setup)
    passed = count_pass(setup)
    ranks = setup.gpus
    is_cut = setup.parallel == "fsdp"
    share = 1 / ranks if is_cut else 0.0

    # 1. weights, gradients and moments
    adapters = counted.adapters * (1 + share)
    weights = counted.base * (1 + share)
    gradients = sum(size for _, size, _ in counted.trained) * (1 + share)
    if setup.optimizer == "muon":  # they are added up in float64
        gradients = sum(8 * numbers for numbers, _, _ in counted.trained) * (1 + share)
    optimizer = _optimizer_bytes(setup, counted.trained)
    reference = counted.base if setup.has_reference else 0.0
    always = {"weights": weights, "adapters": adapters, "reference": reference}

    # 2. the engine
    awake, asleep = _engine_bytes(setup, counted, gpu_gib)
    start = always | {ENGINE: awake if setup.engine == "vllm" else 0.0}
    rollout = always | {"optimizer": optimizer, ENGINE: awake}
    learn = always | {
        "gradients": gradients,
        "optimizer": optimizer,
        ENGINE: asleep,
        "activations": passed.activations,
        "logits, temporary": passed.on_top,
    }

    # 3. what is saved is put together a tensor at a time
    save = always | {"optimizer": optimizer, ENGINE: asleep}
    if is_cut:
        save["weights"] = counted.base / ranks
        save["adapters"] = counted.adapters / ranks
        save["logits, temporary"] = counted.largest
    phases = dict(zip(PHASES, (start, rollout, learn, save), strict=True))
    if setup.engine == "none":
        del phases["rollout"]
    if on_gpu:
        for parts in phases.values():
            others = sum(parts.values()) - parts[ENGINE]
            parts["CUDA, unfilled"] = CUDA_BYTES + UNFILLED * others
    return phases


def _optimizer_bytes(setup: Setup, trained: list[tuple[int, int, bool]]) -> float:
    """Counts what the optimizer keeps on one GPU."""
    total = 0.0
    for numbers, size, is_matrix in trained:
        if setup.optimizer == "muon" and is_matrix:
            # fsdp: with a whole copy of the matrix, not in shards
            total += 2 * size if setup.parallel == "fsdp" else size
        elif setup.optimizer == "adamw8bit" and numbers >= ADAMW8BIT_LEAST:
            total += ADAMW8BIT_BYTES * numbers
        elif setup.parallel == "fsdp":
            total += 2 * size / setup.gpus
        elif setup.parallel == "deepspeed":  # ZeRO-1: two moments and the master weights
            total += 3 * 4 * numbers / setup.gpus
        else:
            total += 2 * size
    return total


def _engine_bytes(setup: Setup, counted: Counted, gpu_gib: float) -> tuple[float, float]:
    """Returns what the engine takes of a GPU while it samples, and while the trainer learns."""
    if setup.engine == "transformers":
        # of the rows in a batch: their cache, and logits in float32 with three copies of them
        rows = min(setup.rows, BATCH)
        cache = cache_bytes(setup.model, setup.dtype, setup.max_tokens)
        return rows * cache + 4 * 4 * rows * counted.vocabulary, 0.0
    if setup.engine != "vllm":
        return 0.0, 0.0
    awake = setup.gpu_memory_utilization * gpu_gib * GIB
    if setup.kv_cache_gib:
        awake = setup.kv_cache_gib * GIB + AWAKE + _vllm_weights(setup, counted)
    return awake, min(ASLEEP, awake) if setup.sleeps else awake


def _vllm_weights(setup: Setup, counted: Counted) -> float:
    size = 4 if setup.dtype == "float32" else 2
    return counted.base_numbers * size / setup.tensor_parallel_size


def trajectories_in_vllm(setup: Setup, gpu_gib: float) -> float:
    """Returns for how many trajectories of max_tokens vLLM's cache has room."""
    counted = count(setup)
    room = setup.kv_cache_gib * GIB
    if not room:
        share = setup.gpu_memory_utilization * gpu_gib * GIB
        room = share - AWAKE - _vllm_weights(setup, counted)
    dtype = "float32" if setup.dtype == "float32" else "bfloat16"  # mixed: its products
    one = cache_bytes(setup.model, dtype, setup.max_tokens) / setup.tensor_parallel_size
    return max(0.0, room) / one


def peak_of(phases: dict) -> tuple[float, str]:
    """Returns the most bytes of any phase, and its name."""
    return max((sum(parts.values()), name) for name, parts in phases.items())


def fits(setup: Setup, gpu_gib: float) -> bool:
    """Says whether all phases have room, and vLLM for one trajectory at least."""
    if setup.engine == "vllm" and trajectories_in_vllm(setup, gpu_gib) < 1:
        return False
    return peak_of(needs(setup, gpu_gib))[0] <= gpu_gib * GIB


# -- what to change


def changes(setup: Setup, gpu_gib: float):
    """Yields (what to write, the Setup with it) until it fits, each going on from the one before.
    What costs least comes first; what would not help is left out."""
    while not fits(setup, gpu_gib):
        # vLLM takes what the others leave, if that is enough
        share = share_for_vllm(setup, gpu_gib)
        if share:
            keys = {"gpu_memory_utilization": share}
            yield _text(keys), replace(setup, **keys)
            return
        before = _without_engine(setup, gpu_gib)
        for keys in _candidates(setup):
            changed = replace(setup, **keys)
            if _without_engine(changed, gpu_gib) < 0.99 * before:
                break
        else:
            return
        setup = changed
        yield _text(keys), setup


def _candidates(setup: Setup):
    """Yields the keys that may be changed, in the order in which they are tried."""
    if setup.token_budget > max(4096, setup.max_tokens):
        yield {"token_budget": setup.token_budget // 2}
    if not setup.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    is_full = setup.tune == "full"
    if setup.parallel == "ddp" and is_full and setup.optimizer == "adamw":
        yield {"parallel": "fsdp"}
    if is_full and setup.optimizer == "adamw" and setup.parallel in ("none", "ddp"):
        yield {"optimizer": "adamw8bit"}
    if setup.engine == "transformers" and setup.rows > 16:
        yield {"max_concurrent": setup.rows // 2}
    if is_full:
        yield {"tune": "lora", "dtype": "bfloat16", "optimizer": "adamw"}
    elif setup.dtype != "bfloat16":
        yield {"dtype": "bfloat16"}
    if setup.tune == "lora" and setup.parallel == "fsdp":
        yield {"parallel": "ddp", "tune": "qlora"}
    elif setup.tune == "lora":
        yield {"tune": "qlora"}
    if setup.token_budget > 2048:
        yield {"token_budget": setup.token_budget // 2}
    if setup.max_tokens > 1024:
        yield {"max_tokens": setup.max_tokens // 2}


def _has_share(setup: Setup) -> bool:
    """Says whether gpu_memory_utilization decides what the engine takes."""
    return setup.engine == "vllm" and not setup.kv_cache_gib


def _without_engine(setup: Setup, gpu_gib: float) -> float:
    """Returns the most bytes of any phase; what vLLM's share is of the card does not count."""
    phases = needs(setup, gpu_gib)
    if _has_share(setup):
        for name in ("start", "rollout"):
            phases[name][ENGINE] = 0.0
    return peak_of(phases)[0]


def share_for_vllm(setup: Setup, gpu_gib: float) -> float:
    """Returns the largest gpu_memory_utilization with which all fits, at most 0.9; 0.0 if none."""
    if not _has_share(setup):
        return 0.0
    parts = needs(setup, gpu_gib)["rollout"]
    others = sum(parts.values()) - parts[ENGINE]
    left = 1 - others / (gpu_gib * GIB)
    share = min(0.9, int(left * 20) / 20)  # in steps of 0.05
    if share <= 0 or not fits(replace(setup, gpu_memory_utilization=share), gpu_gib):
        return 0.0
    return share


def _text(keys: dict) -> str:
    """Writes keys as a command line has them."""
    words = []
    for key, value in keys.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        words.append(f"--{key}={text}")
    return " ".join(words)


# -- what is printed


def take_card(argv: list[str]) -> tuple[float | None, list[str]]:
    """Takes --fits=80 out of argv: (the GiB of the card, all else); None where it is not there."""
    mine, others = config.split(argv, ("fits",))
    if not mine:
        return None, others
    try:
        gib = config.cast(float, mine[-1].partition("=")[2], typed=True)
    except ValueError:
        gib = 0.0
    if gib <= 0:
        raise UserError(f"cannot read {mine[-1]!r}: write --fits=80, the GiB of one card's memory")
    return gib, others


def say(setup: Setup, gpu_gib: float) -> None:
    """Prints what each phase needs, whether it fits, and what to change where it does not."""
    from rich.console import Console
    from rich.table import Table

    if setup.model == "tiny":  # of train_sft.py
        raise UserError("model = 'tiny' is made from scratch, of 10 MiB: it fits every card")
    console = Console(highlight=False)
    phases = needs(setup, gpu_gib)
    rows, tokens = setup.batch_shape
    card = f"{gpu_gib:g} GiB"
    table = Table(title=f"{setup.model}: GiB of each GPU, computed", title_justify="left")
    table.add_column("")
    for phase in phases:
        table.add_column(phase, justify="right")
    names = dict.fromkeys(name for parts in phases.values() for name in parts)
    for name in names:
        values = [parts.get(name, 0.0) / GIB for parts in phases.values()]
        if any(values):
            table.add_row(name, *[f"{value:.2f}" if value else "" for value in values])
    totals = [sum(parts.values()) / GIB for parts in phases.values()]
    table.add_row("all", *[f"{total:.2f}" for total in totals], style="bold")
    console.print(table)

    # what was computed with
    print(f"the largest micro-batch: {rows} x {tokens} tokens, all of them trained")
    if setup.engine == "transformers":
        print(f"sampled at once: at most {min(setup.rows, BATCH)} trajectories of max_tokens")
    if setup.engine == "vllm":
        room = trajectories_in_vllm(setup, gpu_gib)
        print(f"vLLM's cache has room for {room:.1f} trajectories of max_tokens at once")
    if whole.has_tower(models.base_of(setup.model)):
        print("images are not counted: each takes its patches through the tower")

    peak, phase = peak_of(phases)
    if fits(setup, gpu_gib):
        print(f"it fits: {phase} takes {peak / GIB:.1f} of {card}")
        return
    if setup.engine == "vllm" and trajectories_in_vllm(setup, gpu_gib) < 1:
        print("it does not fit: vLLM has no room for one trajectory")
    if peak > gpu_gib * GIB:
        print(f"it does not fit: {phase} takes {peak / GIB:.1f} of {card}")
    print("change, one after the other:")
    for text, changed in changes(setup, gpu_gib):
        peak, phase = peak_of(needs(changed, gpu_gib))
        print(f"  {text:45} then {phase} takes {peak / GIB:.1f} GiB")
        if fits(changed, gpu_gib):
            print(f"with all of these it fits {card}")
            return
    print(f"no setting that is known here fits {card}: take a smaller model, or a larger card")

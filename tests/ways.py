"""Ways to share a model between ranks, ours and some that are wrong without an error, for
test_parallel.py: how far the update of each is from that of one process.

The model's head is its embedding, and rows begin with one prompt. All ways are gone by the same
processes, one after another.
"""

import copy
import json
import os

import pytest
import torch

from learning import model as models
from learning import parallel, zero
from learning.logprobs import decoder_of, token_logprobs

RANKS = 2
MICRO_BATCHES = 2 * RANKS
PROMPT = [7, 8, 9, 10, 11, 12]
RATE = 0.1


def loss_of(model, number: int) -> torch.Tensor:
    """Of two rows that begin with the prompt, which passes through the layers once."""
    generator = torch.Generator().manual_seed(number)
    rows = torch.randint(20, 100, (2, 3), generator=generator)
    ids = torch.cat([torch.tensor([PROMPT, PROMPT]), rows], dim=1)
    mask = torch.ones_like(ids)
    mask[:, : len(PROMPT)] = 0
    logprobs, _ = token_logprobs(model, ids, torch.ones_like(ids), mask)
    return -(logprobs * mask).mean()


def weights_of(model) -> dict:
    weights = {}
    for name, value in model.state_dict().items():
        weights[name] = value.full_tensor() if parallel._is_cut(value) else value.clone()
    return weights


def distance(first: dict, second: dict, begin: dict) -> float:
    """How far two updates are apart, relative to the second."""
    square = 0.0
    whole = 0.0
    for name, start in begin.items():
        square += (first[name] - second[name]).square().sum().item()
        whole += (second[name] - start).square().sum().item()
    return (square / whole) ** 0.5


# -- the ways: each makes one update of the model


def sgd(model):
    """AdamW with an eps this large is SGD, and DeepSpeed knows it."""
    large = 1e6
    return torch.optim.AdamW(model.parameters(), lr=RATE * large, eps=large, weight_decay=0.0)


def one_process(model) -> None:
    for number in range(MICRO_BATCHES):
        loss_of(model, number).backward()
    sgd(model).step()


def ours(model) -> None:
    parallel.split(model)
    with parallel.whole(model):
        for number in parallel.share(list(range(MICRO_BATCHES))):
            loss_of(model, number).backward()
        parallel.sum_gradients(model)
    sgd(model).step()


def ours_by_deepspeed(model) -> None:
    parallel.HERE.zero = zero.Zero1(model, sgd(model))
    for number in parallel.share(list(range(MICRO_BATCHES))):
        loss_of(model, number).backward()
    parallel.sum_gradients(model)
    parallel.clip_gradients(model, 1e6)
    parallel.HERE.zero.step()


def two_roots(model) -> None:
    from torch.distributed.fsdp import fully_shard

    for part in (decoder_of(model), model.get_output_embeddings()):
        fully_shard(part)
        part.set_force_sum_reduction_for_comms(True)
        part.set_gradient_divide_factor(1.0)
    for number in parallel.share(list(range(MICRO_BATCHES))):
        loss_of(model, number).backward()
    sgd(model).step()


def optimizer_made_while_together(model) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "_reshard", lambda model: None)
        parallel.split(model)
    optimizer = sgd(model)
    parallel._reshard(model)
    with parallel.whole(model):
        for number in parallel.share(list(range(MICRO_BATCHES))):
            loss_of(model, number).backward()
        parallel.sum_gradients(model)
    optimizer.step()


def error_of(way, model) -> str:
    """Returns what a way that cannot be gone raises, "" if nothing."""
    try:
        way(model)
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return ""


def scored_in_shards(model) -> None:
    parallel.split(model)
    loss_of(model, 0)


def four_bits_in_shards() -> dict:
    """Returns how much of the 4-bit weights this rank has, and which are the CPU's."""
    model, _ = models.load("base", "qlora")
    whole = sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8)
    parallel.split(model, offload=True)
    here = sum(p.to_local().numel() for p in model.parameters() if p.dtype == torch.uint8)
    (group,) = parallel._units(model)[0]._get_fsdp_state()._fsdp_param_groups
    return {"share": here / whole, "offloaded": [p.offload_to_cpu for p in group.fsdp_params]}


def norm_of_nan(model) -> float:
    """Returns the norm of a gradient that is not finite on the last rank."""
    parallel.HERE.zero = zero.Zero1(model, sgd(model))
    loss = loss_of(model, 0)
    if not parallel.is_first():
        loss = loss * float("nan")
    loss.backward()
    parallel.sum_gradients(model)
    return parallel.clip_gradients(model, 1.0)


def state_without_a_gradient(model) -> float:
    """Returns how far moments are from those of one process, one of whose weights never had a
    gradient, when DeepSpeed goes on with them."""
    alone = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=RATE)
    loss_of(alone, 0).backward()
    without = 1
    list(alone.parameters())[without].grad = None
    optimizer.step()
    saved = optimizer.state_dict()
    assert without not in saved["state"]
    parallel.HERE.zero = zero.Zero1(model, torch.optim.AdamW(model.parameters(), lr=RATE))
    parallel.HERE.zero.load_state_dict(saved)
    state = parallel.HERE.zero.state_dict()["state"]
    if not parallel.is_first():
        return 0.0
    largest = 0.0
    for number, values in state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            right = saved["state"].get(number, {}).get(name, torch.zeros(1))
            largest = max(largest, (values[name] - right).abs().max().item())
    return largest


def by_stage(stage: int):
    """Returns the way that DeepSpeed documents: its own backward and step for each micro-batch."""

    def way(model) -> None:
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": MICRO_BATCHES // RANKS,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
        }
        engine, *_ = zero.import_deepspeed().initialize(
            model=model,
            optimizer=sgd(model),
            config=settings,
            dist_init_required=False,
        )
        for number in parallel.share(list(range(MICRO_BATCHES))):
            # it divides by the micro-batches and the ranks
            engine.backward(loss_of(model, number) * MICRO_BATCHES)
            engine.step()

    return way


def our_loop_with_stage_2(model) -> None:
    deepspeed = zero.import_deepspeed()
    initialize = deepspeed.initialize

    def with_stage_2(config, **arguments):
        config["zero_optimization"]["stage"] = 2
        return initialize(config=config, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed, "initialize", with_stage_2)
        ours_by_deepspeed(model)


WAYS = {  # name: (of which --parallel, the way)
    "ddp": ("ddp", ours),
    "fsdp": ("fsdp", ours),
    "deepspeed": ("deepspeed", ours_by_deepspeed),
    "stage 1 as documented": ("deepspeed", by_stage(1)),
    "decoder and head as two roots": ("fsdp", two_roots),
    "optimizer made while together": ("fsdp", optimizer_made_while_together),
}
WITH_AN_ERROR = {
    "stage 2 in our loop": ("deepspeed", our_loop_with_stage_2),
    "stage 3": ("deepspeed", by_stage(3)),
    "scored in shards": ("fsdp", scored_in_shards),
}


def as_rank(environment: dict, folder: str) -> None:
    """Goes all ways; the first rank writes what came out to found.json."""
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    base, _ = models.load("base", "full")
    begin = weights_of(base)
    model = copy.deepcopy(base)
    one_process(model)
    right = weights_of(model)
    found = {}
    with parallel.started("ddp"):
        for name, (kind, way) in WAYS.items():
            parallel.HERE.kind = kind
            model = copy.deepcopy(base)
            way(model)
            found[name] = distance(weights_of(model), right, begin)
        for name, (kind, way) in WITH_AN_ERROR.items():
            parallel.HERE.kind = kind
            found[name] = error_of(way, copy.deepcopy(base))
        parallel.HERE.kind = "deepspeed"
        found["norm of nan"] = norm_of_nan(copy.deepcopy(base))
        found["without a gradient"] = state_without_a_gradient(copy.deepcopy(base))
        parallel.HERE.kind = "fsdp"
        found["four bits"] = four_bits_in_shards()
    if environment["RANK"] == "0":
        with open("found.json", "w") as file:
            json.dump(found, file)

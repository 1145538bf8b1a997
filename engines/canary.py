"""Proves after every sync that the engine samples from the trainer's weights."""

import math
import time

import torch

from engines.base import Engine
from learning.batches import position_ids
from learning.logprobs import token_logprobs
from run.config import UserError

ADVICE = "so nothing was learnt from it; --engine_options=canary=false would go on regardless"


class Canary:
    """Proves after a sync that the engine samples from the trainer's weights: both score the same
    fixed ids. A sync that was skipped, is half done or has an old adapter ends the run; otherwise
    it would go on, and learn from samples of a policy that is not the one it trains.

    Differences are means of |difference of logprobs| over the ids.
    """

    def __init__(self, ids: list[int], dtype: str, images: list = ()):
        # a beginning is enough, but not one that ends inside of an image
        self.ids = list(ids) if images else ids[:512]
        self.images = list(images)
        # float32 rounds by 1e-6, two implementations in bfloat16 by 1e-2
        self.limit = 1e-4 if dtype == "float32" else 0.1
        self.noise = 1e-6  # the largest difference so far that was rounding
        self.before = None  # the trainer's logprobs (T - 1,) at the last sync

    async def check(self, engine: Engine, model) -> float:
        """Returns the difference; UserError if it says that the engine has other weights."""
        # 1. what the trainer gives to the ids
        ids = torch.tensor([self.ids], device=model.device)  # (1, T)
        ones = torch.ones_like(ids)
        images = [self.images] if self.images else None
        with torch.no_grad():
            logprobs, _ = token_logprobs(
                model,
                ids,
                attention_mask=ones,
                mask=ones,
                position_ids=position_ids([self.ids], images, ids.device),
                images=images,
            )
        ours = logprobs[0, 1:].cpu()  # (T - 1,)

        # 2. what the engine gives to them; of several copies, that which differs most
        if self.images:
            copies = await engine.prompt_logprobs(self.ids, self.images)
        else:
            copies = await engine.prompt_logprobs(self.ids)
        copies = torch.tensor(copies)  # (copies, T - 1)
        differences = (copies - ours).abs().mean(1).nan_to_num(math.inf)
        theirs = copies[differences.argmax()]  # (T - 1,)

        # 3. too far apart, or still where they were before
        difference = _distance(theirs, ours)
        if math.isnan(difference) or difference > self.limit:
            raise UserError(
                f"sync {engine.version}: the engine's logprobs differ from the trainer's by "
                f"{difference:.2g} on average (rounding makes {self.limit:g} at most): it samples "
                f"from other weights, {ADVICE}"
            )
        if self.before is not None:
            # within the limit, yet far more than rounding, and towards where it was before
            moved = _distance(ours, self.before)
            behind = _distance(theirs, self.before)
            if moved > 10 * self.noise and behind < difference:
                raise UserError(
                    f"sync {engine.version}: the engine still has the weights before the last "
                    f"update (its logprobs differ by {behind:.2g} from theirs, by "
                    f"{difference:.2g} from the trainer's), {ADVICE}"
                )
        self.noise = max(self.noise, difference)
        self.before = ours
        return difference


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().mean().item()


async def sync_and_check(
    engine: Engine, model, version: int, canary: Canary | None
) -> dict[str, float]:
    """Gives the engine the weights of `model`, wakes it and asks the canary; returns metrics."""
    started = time.monotonic()
    await engine.sync(model, version)
    await engine.wake()
    metrics = {}
    if canary:
        metrics["canary"] = await canary.check(engine, model)
    metrics["sync_seconds"] = time.monotonic() - started
    return metrics

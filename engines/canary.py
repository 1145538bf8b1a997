"""Proves after every sync that the engine samples from the trainer's weights."""

import math
import time

import torch

from engines.base import Engine
from learning.logprobs import token_logprobs
from run.config import UserError


class Canary:
    """Proves after a sync that the engine samples from the trainer's weights: both score the same
    fixed ids. A sync that was skipped, is half done or has an old adapter ends the run; otherwise
    it would go on, and learn from samples of a policy that is not the one it trains."""

    def __init__(self, ids: list[int], dtype: str):
        self.ids = ids[:512]
        # of means over the ids: float32 rounds by 1e-6, two implementations in bfloat16 by 1e-2
        self.limit = 1e-4 if dtype == "float32" else 0.1
        self.noise, self.before = 1e-6, None  # seen at most; the trainer's own at the last sync

    async def check(self, engine: Engine, model) -> float:
        """The mean difference of their logprobs; UserError if it says that the engine has other
        weights."""
        ids = torch.tensor([self.ids], device=model.device)
        with torch.no_grad():
            mask = torch.ones_like(ids)
            ours = token_logprobs(model, ids, mask, mask)[0][0, 1:].cpu()
        theirs = torch.tensor(await engine.score(self.ids))  # (copies, T - 1)
        theirs = theirs[(theirs - ours).abs().mean(1).nan_to_num(math.inf).argmax()]  # the worst
        difference = (theirs - ours).abs().mean().item()
        advice = "so nothing was learnt from it; canary=false would go on regardless"
        if not difference <= self.limit:  # NaN too
            raise UserError(
                f"sync {engine.version}: the engine's logprobs differ from the trainer's by "
                f"{difference:.2g} on average (rounding makes {self.limit:g} at most): it samples "
                f"from other weights, {advice}"
            )
        if self.before is not None:
            # within the limit, yet far more than rounding, and towards where it was before
            moved = (ours - self.before).abs().mean().item()
            behind = (theirs - self.before).abs().mean().item()
            if moved > 10 * self.noise and behind < difference:
                raise UserError(
                    f"sync {engine.version}: the engine still has the weights before the last "
                    f"update (its logprobs differ by {behind:.2g} from theirs, by "
                    f"{difference:.2g} from the trainer's), {advice}"
                )
        self.noise, self.before = max(self.noise, difference), ours
        return difference


async def synced(engine: Engine, model, version: int, canary: Canary | None) -> dict[str, float]:
    """Syncs, wakes the engine and asks the canary; returns their metrics."""
    started = time.monotonic()
    await engine.sync(model, version)
    await engine.wake()
    seen = {"canary": await canary.check(engine, model)} if canary else {}
    return seen | {"sync_seconds": time.monotonic() - started}

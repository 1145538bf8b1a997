"""logprobs.token_logprobs beside the plain way: all logits, log-softmax, gather.

    python bench/logprobs.py                            # a quarter of an hour on two cores, 16 GB
    python bench/logprobs.py --tokens=4096              # half the memory
    python bench/logprobs.py --vocabulary=4096 --runs=1 # seconds, to try it

Forward and backward, float32, from hidden states and the weight of an untied head: logprobs with a
gradient of its own for each token, as a policy's loss has it, and entropies without gradient. The
plain way keeps no tensor longer than it has to. "chunked" is what a plain Linear head gets, "any
head" what adapters or soft-capping on it make necessary. On a GPU one more row is liger-kernel's
fused linear cross entropy where that is installed; it makes no entropy.

Each run is a process of its own, the ways by turns; medians. A run makes a few tokens first, so
that libraries and threads are there. Memory: the highest resident size (on a GPU: of what torch has
allocated) over the size when the inputs were there, so with both gradients.

Compared with the plain way: norm of the difference over norm. Of logprobs and entropies it is the
plain way that is off, by ten times what ours is (torch's log-softmax on a CPU adds its exponentials
up one after another, in float32). Exit code 1 if ours differs by more than 1e-5, takes more than
1.3 times as long or more than a sixth of the memory.
"""

import dataclasses
import importlib.util
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)

import torch
from trl_side import in_subprocess

from learning.logprobs import token_logprobs
from run.config import UserError

TIME, MEMORY, DIFFERENCE = 1.3, 1 / 6, 1e-5  # what ours may take, of the plain way's


@dataclass
class Config:
    tokens: int = 8192
    vocabulary: int = 151936  # Qwen's
    hidden: int = 1024
    runs: int = 3
    save_to: str = ""  # a .json for the results
    part: str = ""  # for the subprocesses: one of WAYS
    keep: str = ""  # for the subprocesses: a file for values and gradients


def check(cfg: Config) -> None:
    config.require_positive(cfg, "tokens vocabulary hidden runs")


# -- the ways: hidden (1, T, H), ids (1, T) -> logprobs and entropies (T - 1,)


def plain(hidden, head, ids):
    logits = head(hidden[0, :-1])  # (T - 1, V)
    table = logits.log_softmax(-1)
    del logits
    logprobs = table.gather(-1, ids[0, 1:, None])[:, 0]
    with torch.no_grad():
        entropy = table.exp().mul_(table).sum(-1).neg()
    return logprobs, entropy


def chunked(hidden, head, ids):
    return ours(hidden, head, ids, head)


def any_head(hidden, head, ids):
    return ours(hidden, head, ids, head.forward)  # whatever is no Linear


def ours(hidden, head, ids, given):
    text = SimpleNamespace(vocab_size=head.out_features)
    model = SimpleNamespace(
        get_decoder=lambda: lambda **_: SimpleNamespace(last_hidden_state=hidden),
        get_output_embeddings=lambda: given,
        config=SimpleNamespace(get_text_config=lambda: text),
    )
    every = torch.ones_like(ids)
    logprobs, entropy = token_logprobs(model, ids, every, every)
    return logprobs[0, 1:], entropy[0, 1:]


def liger(hidden, head, ids):
    # Versions without pull request 1298 scale all gradients by the first token's, and the columns
    # of differences show it.
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return -loss(head.weight, hidden[0, :-1], ids[0, 1:]), None


WAYS = {"plain": plain, "chunked": chunked, "any head": any_head, "liger": liger}


# -- what is measured


def part(cfg: Config) -> dict:
    """In a subprocess: one run of one way."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:  # too large a run ends itself and nobody else
        limit = memory("/proc/meminfo", "MemAvailable") * 9 // 10
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_default_device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    head = torch.nn.Linear(cfg.hidden, cfg.vocabulary, bias=False)
    hidden = (5 * torch.randn(1, cfg.tokens, cfg.hidden)).requires_grad_()  # logits of about +-3
    ids = torch.randint(cfg.vocabulary, (1, cfg.tokens))
    gradient = torch.randn(cfg.tokens - 1)
    way = WAYS[cfg.part]
    way(hidden[:, :16], head, ids[:, :16])[0].sum().backward()
    hidden.grad = head.weight.grad = None
    level = taken(peak=False)
    seconds = [clock()]
    try:
        logprobs, entropy = way(hidden, head, ids)
        seconds.append(clock())
        logprobs.backward(gradient)
        seconds.append(clock())
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error):
            raise
        return {"failed": "out of memory"}
    peak = (taken(peak=True) - level) / 2**20
    if cfg.keep:
        found = {"logprobs": logprobs.detach(), "entropy": entropy}
        torch.save(found | {"hidden": hidden.grad, "weight": head.weight.grad}, cfg.keep)
    begin, middle, end = seconds
    times = {"forward": middle - begin, "backward": end - middle, "seconds": end - begin}
    return times | {"peak_mib": peak, "load": os.getloadavg()[0]}


def taken(peak: bool) -> int:
    """Bytes of this process, now or the most so far, on the GPU if there is one."""
    if not torch.cuda.is_available():
        return memory("/proc/self/status", "VmHWM" if peak else "VmRSS")
    if peak:
        return torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def memory(path: str, key: str) -> int:
    """Bytes, from one of the kernel's tables."""
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def differences(kept: Path, reference: Path) -> dict:
    """Norm of the difference over norm, of each tensor that was kept."""
    ours, plains = (torch.load(path, map_location="cpu", mmap=True) for path in (kept, reference))
    return {
        name: ((ours[name] - right).norm() / right.norm()).item()
        for name, right in plains.items()
        if ours[name] is not None
    }


def measure(cfg: Config, ways: list[str]) -> dict:
    """{way: medians, and differences from the plain way}."""
    shape = [f"--{k}={getattr(cfg, k)}" for k in ("tokens", "vocabulary", "hidden")]
    runs, result = {way: [] for way in ways}, {}
    with tempfile.TemporaryDirectory() as folder:
        files = {way: Path(folder, way) for way in ways}
        for i in range(cfg.runs):
            for way in ways:
                keep = [f"--keep={files[way]}"] if i == 0 else []
                runs[way].append(in_subprocess(__file__, [*shape, f"--part={way}", *keep]))
                if "failed" in runs[way][-1]:
                    raise UserError(
                        f"tokens = {cfg.tokens}: the {way} way runs out of memory: wait until more "
                        "is free, or give --tokens=4096; the ratios stay nearly the same"
                    )
        for way in ways:
            medians = {k: statistics.median(run[k] for run in runs[way]) for k in runs[way][0]}
            result[way] = medians | {"differs": differences(files[way], files["plain"])}
    return result


def table(found: dict) -> None:
    """Prints the results of `measure`."""
    columns, base = ("logprobs", "entropy", "hidden", "weight"), found["plain"]
    line = "{:8} {:>8} {:>9} {:>8} {:>5} {:>9} {:>6} {:>9} {:>9} {:>9} {:>9} {:>5}"
    print(f"{'':58} differs by (hidden and weight: their gradients)")
    heads = ("forward", "backward", "seconds", "x", "peak MiB", "x", *columns, "load")
    print(line.format("", *heads))
    for way, r in found.items():
        times = (f"{r[k]:.1f}" for k in ("forward", "backward", "seconds"))
        shares = (r[k] / base[k] for k in ("seconds", "peak_mib"))
        time_share, memory_share = (f"{share:.3f}" for share in shares)
        differs = (f"{r['differs'][k]:.1e}" if k in r["differs"] else "-" for k in columns)
        peak, load = f"{r['peak_mib']:,.0f}", f"{r['load']:.1f}"
        print(line.format(way, *times, time_share, peak, memory_share, *differs, load))


def main(cfg: Config) -> None:
    if cfg.part:
        print(json.dumps(part(cfg)))
        return
    ways = ["plain", "chunked", "any head"]
    if not torch.cuda.is_available():
        print("liger: left out, its kernels need a GPU")
    elif importlib.util.find_spec("liger_kernel") is None:
        print("liger: left out, it is not installed (pip install liger-kernel)")
    else:
        ways.append("liger")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"T = {cfg.tokens:,}, V = {cfg.vocabulary:,}, H = {cfg.hidden:,}, float32, {where}")
    found = measure(cfg, ways)
    table(found)
    result, base = found["chunked"], found["plain"]
    shares = result["seconds"] / base["seconds"], result["peak_mib"] / base["peak_mib"]
    differs = max(result["differs"].values())
    print(f"time: {shares[0]:.2f} of the plain way's (at most {TIME})")
    print(f"memory: 1/{1 / shares[1]:.1f} of the plain way's (at most 1/{1 / MEMORY:.0f})")
    print(f"largest difference: {differs:.1e} (at most {DIFFERENCE:.0e})")
    if cfg.save_to:
        Path(cfg.save_to).parent.mkdir(parents=True, exist_ok=True)
        about = {"cores": os.cpu_count(), "device": where, "torch": torch.__version__}
        about |= {"bench": "logprobs", "config": dataclasses.asdict(cfg)}
        Path(cfg.save_to).write_text(json.dumps(about | found, indent=1) + "\n")
    if shares[0] > TIME or shares[1] > MEMORY or differs > DIFFERENCE:
        raise SystemExit(1)


if __name__ == "__main__":
    config.main(lambda argv: main(config.parse(Config, argv, check)))

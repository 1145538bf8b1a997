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

# What ours may take, of the plain way's.
MOST_TIME = 1.3
MOST_MEMORY = 1 / 6
MOST_DIFFERENCE = 1e-5  # norm of the difference over norm


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
    return ours(hidden, ids, head, head.out_features)


def any_head(hidden, head, ids):
    return ours(hidden, ids, head.forward, head.out_features)  # whatever is no Linear


def ours(hidden, ids, head, vocabulary):
    """Calls token_logprobs on a model whose layers have run already."""
    text_config = SimpleNamespace(vocab_size=vocabulary)
    model = SimpleNamespace(
        get_decoder=lambda: lambda **_: SimpleNamespace(last_hidden_state=hidden),
        get_output_embeddings=lambda: head,
        config=SimpleNamespace(get_text_config=lambda: text_config),
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
    """Measures one run of one way, in a subprocess."""
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
    level = taken(peak=False)  # bytes
    started = clock()
    try:
        logprobs, entropy = way(hidden, head, ids)
        middle = clock()
        logprobs.backward(gradient)
        ended = clock()
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error):
            raise
        return {"failed": "out of memory"}
    peak = (taken(peak=True) - level) / 2**20
    if cfg.keep:
        tensors = {
            "logprobs": logprobs.detach(),
            "entropy": entropy,
            "hidden": hidden.grad,
            "weight": head.weight.grad,
        }
        torch.save(tensors, cfg.keep)
    return {
        "forward": middle - started,
        "backward": ended - middle,
        "seconds": ended - started,
        "peak_mib": peak,
        "load": os.getloadavg()[0],
    }


def taken(peak: bool) -> int:
    """Returns the bytes of this process, now or the most so far, on the GPU if there is one."""
    if not torch.cuda.is_available():
        return memory("/proc/self/status", "VmHWM" if peak else "VmRSS")
    if peak:
        return torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def memory(path: str, key: str) -> int:
    """Reads a number of bytes from one of the kernel's tables."""
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def differences(file: Path, plain_file: Path) -> dict:
    """Returns the norm of the difference over the norm, of each tensor in two files."""
    tensors = torch.load(file, map_location="cpu", mmap=True)
    plain_tensors = torch.load(plain_file, map_location="cpu", mmap=True)
    result = {}
    for name, expected in plain_tensors.items():
        if tensors[name] is not None:  # liger makes no entropy
            result[name] = ((tensors[name] - expected).norm() / expected.norm()).item()
    return result


def measure(cfg: Config, ways: list[str]) -> dict:
    """Returns {way: medians, and differences from the plain way}."""
    shape = [f"--{key}={getattr(cfg, key)}" for key in ("tokens", "vocabulary", "hidden")]
    runs = {way: [] for way in ways}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {way: Path(folder, way) for way in ways}
        for i in range(cfg.runs):
            for way in ways:
                arguments = [*shape, f"--part={way}"]
                if i == 0:
                    arguments.append(f"--keep={files[way]}")
                run = in_subprocess(__file__, arguments)
                if "failed" in run:
                    raise UserError(
                        f"tokens = {cfg.tokens}: the {way} way runs out of memory: wait until more "
                        "is free, or give --tokens=4096; the ratios stay nearly the same"
                    )
                runs[way].append(run)
        for way in ways:
            results[way] = {}
            for key in runs[way][0]:
                results[way][key] = statistics.median(run[key] for run in runs[way])
            results[way]["differs"] = differences(files[way], files["plain"])
    return results


def table(results: dict) -> None:
    """Prints the results of `measure`."""
    columns = ("logprobs", "entropy", "hidden", "weight")
    plain_result = results["plain"]
    line = "{:8} {:>8} {:>9} {:>8} {:>5} {:>9} {:>6} {:>9} {:>9} {:>9} {:>9} {:>5}"
    print(f"{'':58} differs by (hidden and weight: their gradients)")
    heads = ("forward", "backward", "seconds", "x", "peak MiB", "x", *columns, "load")
    print(line.format("", *heads))
    for way, result in results.items():
        cells = [way]
        for key in ("forward", "backward", "seconds"):
            cells.append(f"{result[key]:.1f}")
        cells.append(f"{result['seconds'] / plain_result['seconds']:.3f}")
        cells.append(f"{result['peak_mib']:,.0f}")
        cells.append(f"{result['peak_mib'] / plain_result['peak_mib']:.3f}")
        for key in columns:
            differs = result["differs"]
            cells.append(f"{differs[key]:.1e}" if key in differs else "-")
        cells.append(f"{result['load']:.1f}")
        print(line.format(*cells))


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
    results = measure(cfg, ways)
    table(results)
    chunked_result = results["chunked"]
    plain_result = results["plain"]
    time_share = chunked_result["seconds"] / plain_result["seconds"]
    memory_share = chunked_result["peak_mib"] / plain_result["peak_mib"]
    difference = max(chunked_result["differs"].values())
    print(f"time: {time_share:.2f} of the plain way's (at most {MOST_TIME})")
    print(f"memory: 1/{1 / memory_share:.1f} of the plain way's (at most 1/{1 / MOST_MEMORY:.0f})")
    print(f"largest difference: {difference:.1e} (at most {MOST_DIFFERENCE:.0e})")
    if cfg.save_to:
        Path(cfg.save_to).parent.mkdir(parents=True, exist_ok=True)
        about = {"cores": os.cpu_count(), "device": where, "torch": torch.__version__}
        about |= {"bench": "logprobs", "config": dataclasses.asdict(cfg)}
        Path(cfg.save_to).write_text(json.dumps(about | results, indent=1) + "\n")
    if time_share > MOST_TIME or memory_share > MOST_MEMORY or difference > MOST_DIFFERENCE:
        raise SystemExit(1)


if __name__ == "__main__":
    config.main(lambda argv: main(config.parse(Config, argv, check)))

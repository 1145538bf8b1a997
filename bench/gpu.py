"""What only a GPU can show, in fifteen minutes: whether all is right there, how fast, how large.

    python bench/gpu.py                          # all parts; prints a result to be pasted
    python bench/gpu.py --parts=learn,ranks      # some of them
    python bench/gpu.py --cpu=true               # a rehearsal with tiny shapes, on no GPU

Random weights in the shapes of Qwen3-0.6B and Qwen3-4B: nothing is downloaded. The parts:

- parity: logprobs and gradients of one batch, on the GPU and on the CPU
- learn: an update of each shape and setting; GiB as learning/memory.py computes them, and as
  they were; trained tokens a second
- vllm: for full weights, LoRA and QLoRA: how far vLLM's logprobs are from the trainer's at versions
  0, 1 and 2, with a sleep before each; memory awake, asleep and awake again; seconds of a sync (by
  CUDA IPC for full weights); tokens a second. tests/test_gpu.py asserts the same
- ranks: three steps of calc with ddp and fsdp on the GPUs that are there, beside one process

Each part is a process of its own: one that fails is reported, and the others go on. Without a GPU,
and without --cpu=true, it says so and ends with exit code 2.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)

import memory as bench_memory
import torch

import train_grpo
from engines import vllm as vllm_engine
from engines.base import Sampling
from engines.canary import Canary, sync_and_check
from learning import memory, optim
from learning import model as models
from run.config import UserError
from run.loop import run_blocking
from tasks import tiny as tiny_model

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("parity", "learn", "vllm", "ranks")
PATIENCE = 300.0  # seconds that a part may take
# hidden, intermediate, layers, heads of 128, heads of keys; the vocabulary is Qwen3's
SHAPES = {
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8),
    "Qwen3-4B": (2560, 9728, 36, 32, 8),
    "tiny": (64, 128, 2, 1, 1),
}
VOCABULARY = 151936
RECOMPUTED = {"gradient_checkpointing": True}
SETTINGS = {
    "full, mixed, recomputed": {"dtype": "mixed"} | RECOMPUTED,
    "full, bfloat16": {"dtype": "bfloat16"},
    "full, bfloat16, adamw8bit, recomputed": {
        "dtype": "bfloat16",
        "optimizer": "adamw8bit",
    }
    | RECOMPUTED,
    "lora, bfloat16, recomputed": {"dtype": "bfloat16", "tune": "lora"} | RECOMPUTED,
}


@dataclass
class Config:
    parts: tuple[str, ...] = PARTS
    cpu: bool = False  # a rehearsal: tiny shapes, on the CPU
    model: str = ""  # vllm: a folder or hub id; "" makes a random one of about 100 M parameters
    dtype: str = "bfloat16"  # vllm: or float32
    gpu_memory_utilization: float = 0.4  # vllm: what it takes of the GPU
    requests: int = 256  # vllm: turns of 128 tokens, for tokens per second
    minutes: float = 15.0  # for all of it; what has not begun by then is skipped
    save_to: str = ""  # a .md for the result
    part: str = ""  # for the subprocesses: learn:Qwen3-0.6B:lora, bfloat16, recomputed


def check(cfg: Config) -> None:
    wrong = set(cfg.parts) - set(PARTS)
    if wrong:
        raise UserError(f"parts: there is no {min(wrong)!r}; there are {', '.join(PARTS)}")
    config.require_positive(cfg, "minutes")
    if not cfg.cpu and not torch.cuda.is_available():
        raise UserError(
            "there is no GPU here: run it where torch.cuda.is_available(), or rehearse it with "
            "--cpu=true"
        )


# -- vllm


def random_model(folder: Path, hidden_size: int = 1024, layers: int = 8, heads: int = 16) -> str:
    """Writes a Qwen3-shaped model, by default of 100 M parameters, with the tokenizer of the tiny
    tasks."""
    conversation = [
        {"role": "user", "content": "what is 1 + 2?"},
        {"role": "assistant", "content": "3"},
    ]
    tokenizer = tiny_model.tiny_tokenizer([conversation] * 64, [])
    model = tiny_model.tiny(tokenizer, 0, hidden_size, layers, heads)
    models.save(model, tokenizer, folder)
    return str(folder)


def used_gib() -> float:
    """Returns what is used of the whole GPU, by all processes; 0 without one."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def nudge(model, seed: int) -> None:
    """Moves every trained weight by about a hundredth of its size, as an update would."""
    generator = torch.Generator(model.device).manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                noise = torch.randn(weight.shape, generator=generator, device=weight.device)
                weight.add_((0.01 * weight.abs().mean() + 1e-3) * noise.to(weight.dtype))


def measure(name: str, tune: str, cfg: Config) -> dict:
    """Measures one row of the table; raises if an engine has other weights than the trainer."""
    model, tokenizer = models.load(name, tune, cfg.dtype, lora_r=16, lora_alpha=32)
    row = {"tune": tune, "before vLLM": used_gib()}
    starting = vllm_engine.start(
        name,
        model,
        cfg.dtype,
        full=tune == "full",
        lora_r=0 if tune == "full" else 16,
        max_model_len=1024,
        max_num_seqs=256,
        gpu_memory_utilization=cfg.gpu_memory_utilization,
        enforce_eager=cfg.cpu,
    )
    engine = run_blocking(starting)
    canary = Canary(list(range(5, 205)), cfg.dtype)
    try:
        for version in range(3):
            if version:
                nudge(model, version)
            begin = time.perf_counter()
            metrics = run_blocking(sync_and_check(engine, model, version, canary))
            row[f"differs, {version}"] = metrics["canary"]
            row["sync s"] = time.perf_counter() - begin
            if version == 0:
                row["awake"] = used_gib()
            run_blocking(engine.sleep())
            row["asleep"] = used_gib()
        run_blocking(sync_and_check(engine, model, 3, canary))
        row["awake again"] = used_gib()
        row["tokens/s"] = speed(engine, cfg.requests)
    finally:
        run_blocking(engine.close())
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return row


def speed(engine, requests: int) -> float:
    """Returns tokens per second of so many turns at once."""

    async def sample_all() -> int:
        turns = []
        for seed in range(requests):
            sampling = Sampling(max_new_tokens=128, seed=seed)
            turns.append(engine.generate([5 + seed % 200, 6, 7], [], sampling))
        outputs = await asyncio.gather(*turns)
        return sum(len(output.ids) for output in outputs)

    begin = time.perf_counter()
    tokens = run_blocking(sample_all())
    return tokens / (time.perf_counter() - begin)


# -- parity


def parity(cfg: Config) -> dict:
    """Compares the GPU with the CPU, in float32: the largest difference of a logprob, and of a
    gradient in parts of the largest one."""
    from learning.logprobs import token_logprobs

    ids = torch.arange(5, 133).reshape(4, 32) % 100
    outcomes = {}
    for device in dict.fromkeys(("cpu", device_of(cfg))):
        with tempfile.TemporaryDirectory() as folder:
            name = random_model(Path(folder), hidden_size=128, layers=2, heads=2)
            policy, _ = models.load(name, "full", "float32", device)
        ones = torch.ones_like(ids).to(device)
        mask = ones.clone()
        mask[:, 0] = 0
        logprobs, _ = token_logprobs(policy, ids.to(device), ones, mask)
        logprobs.sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters()]).cpu()
        outcomes[device] = (logprobs.detach().cpu(), gradient)
    (logprobs, gradient), (others, other_gradient) = outcomes["cpu"], outcomes[device_of(cfg)]
    return {
        "device": device_of(cfg),
        "logprob differs": (logprobs - others).abs().max().item(),
        "gradient differs": ((gradient - other_gradient).abs().max() / gradient.abs().max()).item(),
    }


# -- learn


def device_of(cfg: Config) -> str:
    return "cpu" if cfg.cpu else "cuda"


def write_shape(shape: str, folder) -> None:
    """Writes the config.json of a shape."""
    from transformers import Qwen3Config

    hidden, intermediate, layers, heads, key_heads = SHAPES[shape]
    made = Qwen3Config(
        vocab_size=VOCABULARY if shape != "tiny" else 512,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=128,
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
    )
    made.save_pretrained(folder)


def learn(shape: str, setting: str, cfg: Config) -> dict:
    """Makes two updates of a shape, and returns what the second one took."""
    tokens = 64 if cfg.cpu else 2048
    row = {"shape": shape, "setting": setting}
    with tempfile.TemporaryDirectory() as folder:
        write_shape(shape, folder)
        keys = {"model": folder, "max_tokens": tokens, "token_budget": 4 * tokens}
        train_cfg = train_grpo.Config(**keys, **SETTINGS[setting])
        setup = memory.Setup.of(train_cfg, engine_options=object())
        setup = replace(setup, engine="none")
        parts = memory.needs(setup, 0.0)["learn"]
        row["GiB computed"] = sum(parts.values()) / memory.GIB
        tensors = sum(parts.values()) - parts["CUDA, unfilled"]
        row["of tensors"] = tensors / memory.GIB
        if not cfg.cpu:
            total = torch.cuda.get_device_properties(0).total_memory
            if sum(parts.values()) > total:
                return row | {"skipped": f"larger than the card, {total / memory.GIB:.0f} GiB"}
        policy = bench_memory.model_of(folder, setup, device=device_of(cfg))
        trajectories = bench_memory.trajectories(setup)
    optimizers = optim.optimizers(policy, setup.optimizer, 1e-5)
    settings = train_grpo.LearnSettings.of(train_cfg)
    for _ in range(2):
        optim.gpu_gib("learn")  # forgets the peak so far
        started = time.perf_counter()
        metrics = train_grpo.learn(policy, optimizers, trajectories, 1e-5, settings)
        seconds = time.perf_counter() - started
    if not cfg.cpu:
        row["tensors measured"] = torch.cuda.max_memory_allocated() / memory.GIB
        row["GiB measured"] = optim.gpu_gib("learn")["gpu_gib_learn"]
    row["tokens/s"] = sum(t.new_tokens for t in trajectories) / seconds
    row["grad_norm"] = metrics["grad_norm"]
    return row


# -- ranks


def ranks(kind: str, cfg: Config) -> dict:
    """Compares three steps of calc on several GPUs with those of one process."""
    count = 2 if cfg.cpu else torch.cuda.device_count()
    row = {"parallel": kind, "processes": count}
    if count < 2:
        return row | {"skipped": "one GPU"}
    import parallel as bench_parallel

    steps = 1 if cfg.cpu else 3
    with tempfile.TemporaryDirectory() as folder:
        start = f"{folder}/start"
        first = ["--config", "calc_sft.py", f"--out_dir={start}"]
        if cfg.cpu:  # too few for a model that is ever right: then nothing moves, here and there
            first.append("--rows=32")
        bench_parallel.run("train_sft.py", first)
        words = ["--config", "calc.py", f"--model={start}", f"--steps={steps}"]
        words += ["--token_budget=1024", "--save_every=0"]
        if cfg.cpu:
            words += ["--prompts_per_step=4", "--group_size=4", "--max_new_tokens=16"]
        one = Path(folder) / "one"
        several = Path(folder) / kind
        bench_parallel.run("train_grpo.py", [*words, f"--out_dir={one}"])
        started = time.perf_counter()
        more = [f"--parallel={kind}", f"--gpus={count}", f"--out_dir={several}"]
        bench_parallel.run("train_grpo.py", [*words, *more])
        row["seconds"] = time.perf_counter() - started
        return row | bench_parallel.compare("train_grpo.py", one, several)


# -- all of them


def cases(cfg: Config) -> list[str]:
    """Lists what is run, each in a process of its own."""
    listed = []
    for part in cfg.parts:
        if part == "parity":
            listed.append(part)
        elif part == "learn":
            shapes = ("tiny",) if cfg.cpu else ("Qwen3-0.6B", "Qwen3-4B")
            for shape in shapes:
                listed += [f"learn:{shape}:{setting}" for setting in SETTINGS]
        elif part == "vllm":
            listed += [f"vllm:{tune}" for tune in ("full", "lora", "qlora")]
        else:
            listed += [f"ranks:{kind}" for kind in ("ddp", "fsdp")]
    return listed


def one_case(case: str, cfg: Config) -> dict:
    """Runs one case in this process."""
    part, *what = case.split(":")
    if part == "parity":
        return parity(cfg)
    if part == "learn":
        return learn(*what, cfg)
    if part == "ranks":
        return ranks(*what, cfg)
    with tempfile.TemporaryDirectory() as folder:
        size = (64, 2, 2) if cfg.cpu else (1024, 8, 16)
        name = cfg.model or random_model(Path(folder), *size)
        return measure(name, *what, cfg)


def command_of(case: str, cfg: Config) -> list[str]:
    """Returns what runs one case."""
    words = [f"--part={case}", f"--cpu={str(cfg.cpu).lower()}", f"--model={cfg.model}"]
    words += [f"--dtype={cfg.dtype}", f"--requests={cfg.requests}"]
    words.append(f"--gpu_memory_utilization={cfg.gpu_memory_utilization}")
    return [sys.executable, __file__, *words]


def run_case(case: str, cfg: Config, seconds_left: float) -> dict:
    """Runs one case in a process of its own; what fails becomes a row that says so."""
    if seconds_left <= 0:
        return {"skipped": f"the {cfg.minutes:g} minutes were over: --parts=… runs some of them"}
    command = command_of(case, cfg)
    patience = min(PATIENCE, seconds_left)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {patience:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failed": lines[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def report(results: dict[str, dict], cfg: Config, seconds: float) -> str:
    """Writes the result in markdown: a table for each part, failures below it."""
    lines = [f"## bench/gpu.py: {machine(cfg)}", ""]
    failures = []
    for part in cfg.parts:
        rows = []
        for case, row in results.items():
            if not case.startswith(part):
                continue
            if "failed" in row or "skipped" in row:
                failures.append((case, row))
            else:
                rows.append(row)
        if rows:
            lines += [f"### {part}", "", *table(rows), ""]
    for case, row in failures:
        how = "failed" if "failed" in row else "skipped"
        computed = f" ({row['GiB computed']:.1f} GiB computed)" if "GiB computed" in row else ""
        lines.append(f"- {case}: {how}: {row[how]}{computed}")
    lines += ["", f"{seconds / 60:.1f} minutes"]
    return "\n".join(lines)


def machine(cfg: Config) -> str:
    """Names the machine and the versions."""
    import transformers

    name = "a rehearsal on a CPU: no figure of it is of a GPU"
    if not cfg.cpu:
        total = torch.cuda.get_device_properties(0).total_memory / memory.GIB
        name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {total:.1f} GiB"
    return f"{name}; torch {torch.__version__}, transformers {transformers.__version__}"


def table(rows: list[dict]) -> list[str]:
    """Writes rows as a markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = []
        for name in names:
            value = row.get(name, "")
            cells.append(f"{value:.3g}" if isinstance(value, float) else str(value))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(argv: list[str]) -> None:
    cfg = config.parse(Config, argv, check)
    if cfg.part:
        print(json.dumps(one_case(cfg.part, cfg)))
        return
    started = time.monotonic()
    results = {}
    for case in cases(cfg):
        print(f"{case} ...", flush=True)
        seconds_left = 60 * cfg.minutes - (time.monotonic() - started)
        results[case] = run_case(case, cfg, seconds_left)
    text = report(results, cfg, time.monotonic() - started)
    print(text)
    if cfg.save_to:
        Path(cfg.save_to).write_text(text + "\n", encoding="utf-8")
    if any("failed" in row for row in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    config.main(main)

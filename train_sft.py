"""SFT: teach a model the form of tool calls from demonstrations, with an exact role mask.

    python train_sft.py --config calc_sft.py            # a tiny model from scratch, on a CPU
    python train_sft.py --model=Qwen/Qwen2.5-0.5B-Instruct --data=demos.jsonl --tune=lora

A demonstration is a conversation in OpenAI chat form (`messages`, with `tool_calls` and `tool`
roles). chat.py renders it from the same pieces that a rollout is made of, so the mask is that of
RL: 1 on what the assistant writes, its stop token included, 0 on prompts, template and tool
results.

How this differs from the usual fine-tuning script:
1. The loss is the mean over all trained tokens of a batch, not a mean of means over micro-batches:
   how the batch is cut for memory changes nothing.
2. A template whose assistant spans cannot be proved is refused at the start, not trained on
   wrongly.
"""

import random
import time
from dataclasses import dataclass
from typing import Literal

import config

if __name__ == "__main__":
    config.answer_help(__file__)

import torch

import data
import model as models
import report
from chat import Chat
from config import UserError
from tools import Toolbox


@dataclass
class Config:
    # run
    out_dir: str = "out/sft"  # must be new or empty
    seed: int = 0  # of the weights made here, the demonstrations, and their order
    # model
    model: str = "Qwen/Qwen2.5-0.5B-Instruct"  # hub id, folder, or "tiny": made from scratch
    tune: Literal["full", "lora"] = "full"  # lora: a tenth of the optimizer memory
    lora_r: int = 32  # rank of the adapters
    lora_alpha: int = 64  # their scale is lora_alpha / lora_r
    lora_targets: tuple[str, ...] = ("all-linear",)  # names of linear layers, or all of them
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; bfloat16 halves memory
    # data
    data: str = "task:calc"  # a task's demonstrations, or .jsonl/.parquet/hub id with `messages`
    rows: int | None = None  # use the first n; for a task: make n (default 8192)
    system_prompt: str = ""  # put in front of conversations that have none
    format: Literal["hermes", "llama3", "fence", "tags"] = "hermes"  # how calls are written
    tools: tuple[str, ...] = ("python",)  # shown in the prompt: tools/<name>.py, or file.py:name
    max_tokens: int = 2048  # a longer conversation is cut on the right
    # optimisation
    epochs: float = 1.0  # passes over the rows
    batch_size: int = 32  # conversations per update
    token_budget: int = 8192  # tokens per forward pass, padding counted; halve it if out of memory
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: from scratch, in a third of the steps
    learning_rate: float = 2e-5  # 1e-5..5e-5 full, 1e-4..5e-4 LoRA, 1e-2 tiny from scratch
    schedule: Literal["constant", "linear", "cosine"] = "cosine"  # after the warm-up
    warmup: int = 20  # updates
    weight_decay: float = 0.01  # of matrices only
    max_grad_norm: float = 1.0  # the gradient is scaled down to this norm


def check(cfg: Config) -> None:
    """Rules across keys. A key that would have no effect is an error, not a surprise."""
    changed = config.changed(cfg)
    if cfg.tune == "full" and (useless := {"lora_r", "lora_alpha", "lora_targets"} & changed):
        raise UserError(f"{min(useless)} has no effect with tune=full: use --tune=lora, or drop it")
    if cfg.model == "tiny" and cfg.tune == "lora":
        raise UserError("tune = 'lora' on model = 'tiny': random weights need tune=full")
    for name in ("rows", "max_tokens", "batch_size", "token_budget", "lora_r"):
        if getattr(cfg, name) is not None and getattr(cfg, name) < 1:
            raise UserError(f"{name} = {getattr(cfg, name)}: expected at least 1")
    for name in ("learning_rate", "epochs", "max_grad_norm", "lora_alpha"):
        if getattr(cfg, name) <= 0:
            raise UserError(f"{name} = {getattr(cfg, name)}: expected more than 0")
    if cfg.seed >= 2**63:
        raise UserError(f"seed = {cfg.seed}: expected less than 2**63")
    for name in ("warmup", "weight_decay", "seed"):
        if getattr(cfg, name) < 0:
            raise UserError(f"{name} = {getattr(cfg, name)}: expected 0 or more")


def sft_loss(
    logprobs: torch.Tensor,  # (B, T)
    mask: torch.Tensor,  # (B, T) 1 = trained
    trained_tokens: int,  # of the whole batch, not of this micro-batch
) -> torch.Tensor:
    """Mean negative log-likelihood over the trained tokens of the batch, summed by micro-batch."""
    return -(logprobs * mask).sum() / trained_tokens


def render(chat: Chat, conversations: list[list[dict]], max_tokens: int) -> list[tuple[list, list]]:
    """(ids, mask) of each conversation, cut at max_tokens; those with nothing to train on are left
    out. UserError if that leaves none."""
    rendered = [chat.render(messages) for messages in conversations]
    rendered = [(ids[:max_tokens], mask[:max_tokens]) for ids, mask in rendered]
    kept = [(ids, mask) for ids, mask in rendered if any(mask)]
    if not kept:
        raise UserError(
            f"max_tokens = {max_tokens}: in none of the {len(rendered)} conversations does the "
            "assistant write anything before that; raise it"
        )
    return kept


def accumulate(model, batch: list[tuple[list, list]], token_budget: int) -> dict:
    """Adds the gradient of the loss of a batch of (ids, mask); returns its metrics."""
    trained_tokens = sum(sum(mask) for _, mask in batch)
    loss, entropy, device = 0.0, 0.0, model.device
    for part in models.micro_batches([len(ids) for ids, _ in batch], token_budget):
        ids = models.pad([batch[i][0] for i in part], device=device)  # (B, T)
        mask = models.pad([batch[i][1] for i in part], device=device)
        attention_mask = models.pad([[1] * len(batch[i][0]) for i in part], device=device)
        logprobs, entropies = models.token_logprobs(model, ids, attention_mask, mask)
        part_loss = sft_loss(logprobs, mask, trained_tokens)
        part_loss.backward()
        loss += part_loss.item()
        entropy += entropies.sum().item() / trained_tokens
    return {"loss": loss, "entropy": entropy, "new_tokens": trained_tokens}


def setup(cfg: Config):
    """(model, tokenizer, chat, conversations), the cheap checks first."""
    toolbox = Toolbox(cfg.tools)
    if cfg.model != "tiny":
        models.find(cfg.model)
    conversations = data.conversations(cfg.data, cfg.rows, cfg.seed, cfg.system_prompt)
    tiny = cfg.model == "tiny"
    if tiny:
        tokenizer = models.tiny_tokenizer(conversations[:4096], toolbox.schemas)
    else:
        tokenizer = models.load_tokenizer(cfg.model)
    chat = Chat(tokenizer, cfg.format, toolbox.schemas)  # proved before any weights are loaded
    if tiny:
        model = models.tiny(tokenizer, cfg.seed).to(getattr(torch, cfg.dtype))
    else:
        lora = (cfg.lora_r, cfg.lora_alpha, cfg.lora_targets, cfg.seed)
        model, _ = models.load(cfg.model, cfg.tune, cfg.dtype, "auto", *lora)
    return model, tokenizer, chat, conversations


def train(cfg: Config) -> dict:
    """Trains, saves the model to out_dir, and returns the last step's metrics."""
    out_dir = config.fresh_dir(cfg.out_dir)
    model, tokenizer, chat, conversations = setup(cfg)
    samples = render(chat, conversations, cfg.max_tokens)
    config.save(cfg, out_dir / "config.py")
    optimizers = models.optimizers(model, cfg.optimizer, cfg.learning_rate, cfg.weight_decay)
    steps = max(1, round(cfg.epochs * len(samples) / cfg.batch_size))
    order = []  # every row once, in a new order, then again
    shuffle = random.Random(cfg.seed)
    while len(order) < steps * cfg.batch_size:
        order += shuffle.sample(range(len(samples)), len(samples))

    trained, total = models.count(model)
    columns = {"loss": "7.4f", "entropy": "6.4f", "grad_norm": "6.2f", "seconds": "5.2f"}
    knobs = "token_budget", "max_tokens", "batch_size"
    with report.Log(out_dir, steps, columns) as log, models.memory_advice(*knobs):
        log.print(f"{len(samples)} conversations, {steps} steps, {trained:,} of {total:,} trained")
        model.train()
        for step in range(steps):
            started = time.monotonic()
            rate = cfg.learning_rate * models.schedule(step, steps, cfg.schedule, cfg.warmup)
            rows = order[step * cfg.batch_size : (step + 1) * cfg.batch_size]
            metrics = {"step": step, "learning_rate": rate}
            metrics |= accumulate(model, [samples[i] for i in rows], cfg.token_budget)
            metrics["grad_norm"] = models.step(model, optimizers, rate, cfg.max_grad_norm)
            metrics["seconds"] = time.monotonic() - started
            log.step(metrics)
        model.eval()
        models.save(model, tokenizer, out_dir)
        log.summary({"saved": str(out_dir), "loss": metrics["loss"]})
    return metrics


if __name__ == "__main__":
    config.main(lambda argv: train(config.parse(Config, argv, check)))

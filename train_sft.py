"""SFT: teach a model the form of tool calls from demonstrations, with an exact role mask.

    python train_sft.py --config calc_sft.py            # a tiny model from scratch, on a CPU
    python train_sft.py --model=Qwen/Qwen2.5-0.5B-Instruct --data=demos.jsonl --tune=lora
    python train_sft.py --model=out/calc --data=out/calc/rollouts.jsonl --min_reward=1
    python train_sft.py --config calc_sft.py --resume=true    # where it was stopped or killed

A demonstration is a conversation in OpenAI chat form (`messages`, with `tool_calls` and `tool`
roles, and maybe `tools` of its own). chat.py renders it from the same pieces that a rollout is made
of, so the mask is that of RL: 1 on what the assistant writes, its stop token included, 0 on
prompts, template and tool results. Or it is a trajectory that was recorded (`ids` and `mask`), and
is trained on token for token: rejection sampling, distillation.

How this differs from the usual fine-tuning script:
1. The loss is the mean over all trained tokens of a batch, not a mean of means over micro-batches:
   how the batch is cut for memory, or packed, changes nothing.
2. A template whose assistant spans cannot be proved is refused at the start, not trained on
   wrongly. So is packing with a model in which packed samples see each other.
"""

import json
import random
import time
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Literal

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)

import torch

import data
from chat import Chat
from learning import model as models
from learning import optim
from learning.batches import micro_batches, pad
from learning.checkpoint import Run
from learning.logprobs import token_logprobs
from run import log as run_log
from run.config import UserError
from tasks import tiny as tiny_model
from tools import Toolbox

VALIDATION = ("val_loss", "val_token_accuracy")


@dataclass
class Config:
    # run
    out_dir: str = "out/sft"  # must be new or empty
    resume: bool = False  # go on from out_dir's last checkpoint; without one, begin
    seed: int = 0  # of the weights made here, the demonstrations, and their order
    dry_run: bool = False  # prints the first row as it would be trained on: no model, no download
    save_every: int = 500  # updates between checkpoints; 0: only when it ends or is stopped
    keep_last: int = 2  # checkpoints; each takes three times the memory of what is trained
    logger: Literal["none", "wandb", "tensorboard"] = "none"  # beside metrics.jsonl
    # model
    model: str = "Qwen/Qwen2.5-0.5B-Instruct"  # hub id, folder, or "tiny": made from scratch
    whole_names: bool = False  # tiny: words with a capital, and the system prompt, are one token
    tune: Literal["full", "lora", "qlora"] = "full"  # lora: small optimizer; qlora: 4-bit base too
    lora_r: int = 32  # rank of the adapters
    lora_alpha: int = 64  # their scale is lora_alpha / lora_r
    lora_targets: tuple[str, ...] = ("all-linear",)  # names of linear layers, or all of them
    dtype: Literal["float32", "bfloat16", "mixed"] = "float32"  # weights; mixed: products bfloat16
    gradient_checkpointing: bool = False  # a third slower, and long conversations fit
    # data
    data: str = "task:calc"  # demonstrations of a task, or rows of .jsonl, .parquet or a hub id
    rows: int | None = None  # use the first n; for a task: make n (default 8192)
    min_reward: float | None = None  # of these, only rows whose `reward` is at least this
    val_rows: int = 0  # held out, chosen by the seed, to measure val_loss and val_token_accuracy on
    val_every: int = 50  # updates between two such measurements; there is one at the end too
    system_prompt: str = ""  # put in front of conversations that have none
    format: Literal[
        "auto", "hermes", "llama3", "mistral", "qwen_xml", "fence", "tags", "json_actions"
    ] = "hermes"  # how calls are written; auto: as the model's template does
    template_options: tuple[str, ...] = ()  # of the chat template, such as enable_thinking=false
    tools: tuple[str, ...] = ("python",)  # shown where a row has no `tools`: <name> or file.py:name
    max_tokens: int = 2048  # a longer conversation is cut on the right
    # optimisation
    epochs: float = 1.0  # passes over the rows
    batch_size: int = 32  # conversations per update
    token_budget: int = 8192  # tokens per forward pass, padding counted; halve it if out of memory
    packing: bool = False  # rows of several samples, no padding: for very uneven lengths
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"  # muon: from scratch, third of steps
    learning_rate: float = 2e-5  # 1e-5..5e-5 full, 1e-4..5e-4 LoRA, 1e-2 tiny from scratch
    schedule: Literal["constant", "linear", "cosine"] = "cosine"  # after the warm-up
    warmup: int = 20  # updates; a tenth where there are no more than that
    weight_decay: float = 0.01  # of matrices only
    max_grad_norm: float = 1.0  # the gradient is scaled down to this norm


def check(cfg: Config) -> None:
    """Rules across keys. A key that would have no effect is an error, not a surprise."""
    lora = "lora_r lora_alpha lora_targets"
    rules = (
        (cfg.tune == "full", lora, "with tune=full: use --tune=lora, or drop it"),
        (cfg.model != "tiny", "whole_names", f"with model={cfg.model}: it has a tokenizer"),
        (cfg.val_rows == 0, "val_every", "with val_rows=0: use --val_rows=64, or drop it"),
    )
    config.refuse_unused_keys(cfg, rules)
    if cfg.model == "tiny" and cfg.tune != "full":
        raise UserError(f"tune = {cfg.tune!r} on model = 'tiny': random weights need tune=full")
    if cfg.tune == "qlora" and cfg.dtype == "mixed":
        raise UserError("dtype = 'mixed' with tune=qlora: its base is not trained, use bfloat16")
    for name in "rows max_tokens batch_size token_budget lora_r val_every keep_last".split():
        if getattr(cfg, name) is not None and getattr(cfg, name) < 1:
            raise UserError(f"{name} = {getattr(cfg, name)}: expected at least 1")
    config.require_positive(cfg, "learning_rate epochs max_grad_norm lora_alpha")
    config.require_not_negative(cfg, "warmup weight_decay seed val_rows save_every")
    if cfg.seed >= 2**63:
        raise UserError(f"seed = {cfg.seed}: expected less than 2**63")


def sft_loss(
    logprobs: torch.Tensor,  # (B, T)
    mask: torch.Tensor,  # (B, T) 1 = trained
    trained_tokens: int,  # of the whole batch, not of this micro-batch
) -> torch.Tensor:
    """Mean negative log-likelihood over the trained tokens of the batch, summed by micro-batch."""
    return -(logprobs * mask).sum() / trained_tokens


def check_rows(cfg: Config, rows: list[dict]) -> None:
    """A key that would have no effect on these rows (of data.conversations) is an error too."""
    recorded = ["ids" in row for row in rows]
    own = all("ids" in row or row["tools"] is not None for row in rows)
    on, chat = f"on {cfg.data}, whose rows", "format tools template_options"
    rules = (
        (all(recorded), chat, f"{on} are recorded with their prompts: drop it"),
        (own, "tools", f"{on} have `tools` of their own: drop it"),
    )
    config.refuse_unused_keys(cfg, rules)
    if cfg.model == "tiny" and any(recorded):
        raise UserError("model = 'tiny' has a new tokenizer: recorded ids need their own model")


def render(
    rows: list[dict], tokenizer, format: str, tools: list[dict], name: str, options=()
) -> list[tuple]:
    """(ids, mask) of each row: recorded ones as they are; a conversation with the tools of its row,
    or else these, by one Chat for each set of tools. The first proves the template."""
    chats = {}
    if any("messages" in row and row["tools"] is None for row in rows):
        chats[json.dumps(tools)] = Chat(tokenizer, format, tools, options)
    samples = []
    for row in rows:
        try:
            if "ids" in row:
                data.check_ids(row, tokenizer)
                samples.append((row["ids"], row["mask"]))
                continue
            shown = tools if row["tools"] is None else row["tools"]
            data.check_calls(row["messages"], [tool["function"]["name"] for tool in shown])
            key = json.dumps(shown)
            if key not in chats:
                if known := next(iter(chats.values()), None):
                    chats[key] = known.with_tools(shown)
                else:
                    chats[key] = Chat(tokenizer, format, shown, options)
            samples.append(chats[key].render(row["messages"]))
        except UserError as error:
            raise UserError(f"{name}, row {row['row']}: {error}") from None
    return samples


def fit(samples: list[tuple], max_tokens: int) -> tuple[list[tuple], int, int]:
    """(samples cut at max_tokens, how many were cut, how many were left out because nothing in them
    is trained). UserError if that leaves none."""
    fitted = [(ids[:max_tokens], mask[:max_tokens]) for ids, mask in samples]
    kept = [sample for sample in fitted if any(sample[1])]
    if not kept:
        raise UserError(
            f"max_tokens = {max_tokens}: in none of the {len(samples)} conversations does the "
            "assistant write anything before that; raise it"
        )
    long = [len(ids) > max_tokens and any(mask[:max_tokens]) for ids, mask in samples]
    return kept, sum(long), len(samples) - len(kept)


def hold_out(samples: list, val_rows: int, seed: int) -> tuple[list, list]:
    """(the rest in its order, val_rows samples chosen by the seed). UserError if none is left."""
    if val_rows >= len(samples):
        raise UserError(f"val_rows = {val_rows}: of {len(samples)} rows none is left to train on")
    held = set(random.Random(f"held out {seed}").sample(range(len(samples)), val_rows))
    return [s for i, s in enumerate(samples) if i not in held], [samples[i] for i in sorted(held)]


def packs(lengths: list[int], token_budget: int) -> list[list[int]]:
    """Indices in rows of at most token_budget tokens, by first-fit decreasing, which takes at most
    11/9 of the fewest rows (Johnson 1973). What is longer than the budget is a row of its own."""
    found: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = next((at for at, free in enumerate(room) if lengths[i] <= free), len(room))
        if at == len(room):
            found.append([])
            room.append(token_budget)
        found[at].append(i)
        room[at] -= lengths[i]
    return found


def parts(samples: list[tuple], token_budget: int, packing: bool) -> list[list[tuple]]:
    """The samples of each forward pass."""
    divide = packs if packing else micro_batches
    indices = divide([len(ids) for ids, _ in samples], token_budget)
    return [[samples[i] for i in part] for part in indices]


def score(model, samples: list[tuple], packing: bool, temperature: float = 1.0):
    """(logprobs, entropy, mask) of one forward pass: (B, T) with padding, packed (1, T)."""
    ids, mask = zip(*samples, strict=True)
    attention_mask = positions = None
    if packing:
        positions = [list(chain(*(range(len(sample)) for sample in ids)))]
        positions = pad(positions, device=model.device)
        ids, mask = [list(chain(*ids))], [list(chain(*mask))]
    else:
        attention_mask = pad([[1] * len(sample) for sample in ids], device=model.device)
    ids, mask = (pad(rows, device=model.device) for rows in (ids, mask))
    logprobs, entropy = token_logprobs(
        model, ids, attention_mask, mask, temperature, position_ids=positions
    )
    return logprobs, entropy, mask


def prove_packing(model, name: str) -> None:
    """UserError if a sample has other logprobs behind another one in its row than alone: where a
    model ignores that positions begin again, or mixes tokens by other means than attention (Mamba),
    it sees what is before it."""
    rng, vocabulary = random.Random(0), model.get_input_embeddings().num_embeddings
    ids = [[rng.randrange(vocabulary) for _ in range(24)] for _ in range(2)]
    first, second = ((sample, [0] + [1] * 23) for sample in ids)
    with torch.no_grad():
        alone = score(model, [second], packing=False)[0][0]
        packed = score(model, [first, second], packing=True)[0][0, 24:]
        exact = model(torch.tensor(ids, device=model.device)).logits.dtype == torch.float32
    difference = (packed - alone).abs().mean().item()
    # Seen: 1e-7, in bfloat16 5e-4; 0.006 if random weights see the other sample, 0.3 if trained.
    if not difference <= (1e-3 if exact else 0.1):  # not: NaN is refused too
        raise UserError(
            f"model = {name!r} cannot be packed: behind another sample, logprobs differ by "
            f"{difference:.2g} from those alone; use packing=false"
        )


def accumulate(model, batch: list[tuple], token_budget: int, packing: bool = False) -> dict:
    """Adds the gradient of the loss of a batch of (ids, mask); returns its metrics."""
    trained_tokens = sum(sum(mask) for _, mask in batch)
    loss, entropy = 0.0, 0.0
    for part in parts(batch, token_budget, packing):
        logprobs, entropies, mask = score(model, part, packing)
        part_loss = sft_loss(logprobs, mask, trained_tokens)
        part_loss.backward()
        loss += part_loss.item()
        entropy += entropies.sum().item() / trained_tokens
    return {"loss": loss, "entropy": entropy, "trained_tokens": trained_tokens}


@torch.no_grad()
def validate(model, samples: list[tuple], token_budget: int, packing: bool = False) -> dict:
    """The loss on the samples, and the share of trained tokens that greedy decoding would choose
    given those before them: their probability at a temperature near 0, so a tie counts in part."""
    trained_tokens, loss, right = sum(sum(mask) for _, mask in samples), 0.0, 0.0
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for part in parts(samples, token_budget, packing):
        logprobs, _, mask = score(model, part, packing)
        loss += sft_loss(logprobs, mask, trained_tokens).item()
        greedy, _, _ = score(model, part, packing, temperature=1e-6)
        right += (greedy.exp() * mask).sum().item()
    for module, mode in modes:
        module.training = mode
    return dict(zip(VALIDATION, (loss, right / trained_tokens), strict=True))


def setup(cfg: Config):
    """(model, tokenizer, samples, held-out samples, a word on the data), the cheap checks first."""
    toolbox = Toolbox(cfg.tools, describe_only=True)
    if cfg.model != "tiny":
        models.find(cfg.model)
    rows = data.conversations(cfg.data, cfg.rows, cfg.seed, cfg.system_prompt)
    check_rows(cfg, rows)
    chosen = data.rewarded(rows, cfg.min_reward, cfg.data)
    tiny = cfg.model == "tiny"
    if tiny:
        conversations = [row["messages"] for row in chosen[:4096]]
        tokenizer = tiny_model.tiny_tokenizer(conversations, toolbox.schemas, cfg.whole_names)
    else:
        tokenizer = models.load_tokenizer(cfg.model)
    # rendered, and so proved, before any weights are loaded
    chat = cfg.format, toolbox.schemas, cfg.data, cfg.template_options
    samples = render(chosen, tokenizer, *chat)
    samples, cut, empty = fit(samples, cfg.max_tokens)
    samples, held_out = hold_out(samples, cfg.val_rows, cfg.seed)
    if cfg.batch_size > len(samples):
        few = f"there are {len(samples)} rows to train on, use --batch_size={len(samples)} or less"
        raise UserError(f"batch_size = {cfg.batch_size}: {few}")
    said = f"{len(samples)} rows to train on, {len(held_out)} held out, {cut} cut at max_tokens, "
    said += f"{empty} left out with nothing to train, {len(rows) - len(chosen)} below min_reward"
    if tiny:
        model = models.in_dtype(tiny_model.tiny(tokenizer, cfg.seed), cfg.dtype)
    else:
        lora = (cfg.lora_r, cfg.lora_alpha, cfg.lora_targets, cfg.seed)
        model, _ = models.load(cfg.model, cfg.tune, cfg.dtype, "auto", *lora)
    if cfg.packing:
        prove_packing(model, cfg.model)
    return model, tokenizer, samples, held_out, said


def train(cfg: Config) -> dict:
    """Trains, saves the model to out_dir, and returns the last step's metrics."""
    check(cfg)  # also one that was made in a notebook, not by config.parse
    if cfg.dry_run:
        import play

        play.sft(cfg)
        return {}
    run_log.check_logger(cfg.logger)
    run = Run(cfg)
    model, tokenizer, samples, held_out, said = setup(cfg)
    steps = max(1, round(cfg.epochs * len(samples) / cfg.batch_size))
    warmup = cfg.warmup
    if warmup >= steps and "warmup" in config.changed(cfg):
        few = f"{len(samples)} rows are {steps} updates: lower it, or train for more epochs"
        raise UserError(f"warmup = {warmup}: expected less than {steps}, since {few}")
    if warmup >= steps:  # nobody asked for it
        warmup = steps // 10
    if cfg.gradient_checkpointing:
        models.recompute_layers(model)
    optimizers = optim.optimizers(model, cfg.optimizer, cfg.learning_rate, cfg.weight_decay)
    state = run.restore(model, optimizers) or {"step": 0, "metrics": {}}
    first, metrics = state["step"], state["metrics"]
    order = []  # every row once, in a new order, then again
    shuffle = random.Random(cfg.seed)
    while len(order) < steps * cfg.batch_size:
        order += shuffle.sample(range(len(samples)), len(samples))

    trained, total = optim.count(model)
    columns = {"loss": "7.4f", "entropy": "6.4f", "grad_norm": "6.2f", "seconds": "5.2f"}
    knobs = "token_budget", "max_tokens", "batch_size"
    log = run_log.Log(run.out_dir, steps, columns, first, cfg.logger, asdict(cfg))
    with log, optim.memory_advice(*knobs), run:
        log.print(f"{said}; {steps} steps, {trained:,} of {total:,} parameters")
        if cfg.resume:
            log.print(f"going on with step {first}")
        model.train()
        for step in range(first, steps):
            started = time.monotonic()
            rate = cfg.learning_rate * optim.schedule(step, steps, cfg.schedule, warmup)
            rows = order[step * cfg.batch_size : (step + 1) * cfg.batch_size]
            batch = [samples[i] for i in rows]
            metrics = {"step": step, "learning_rate": rate}
            metrics |= accumulate(model, batch, cfg.token_budget, cfg.packing)
            metrics["grad_norm"] = optim.step(model, optimizers, rate, cfg.max_grad_norm)
            metrics["seconds"] = time.monotonic() - started
            if held_out and ((step + 1) % cfg.val_every == 0 or step + 1 == steps):
                metrics |= validate(model, held_out, cfg.token_budget, cfg.packing)
            log.step(metrics)
            if validation := {key: metrics[key] for key in VALIDATION if key in metrics}:
                log.print("           " + "  ".join(f"{k} {v:.4f}" for k, v in validation.items()))
            run.after(step + 1, steps, model, tokenizer, optimizers, log, metrics=metrics)
        model.eval()
        run.finish(model, tokenizer)
        kept = {key: metrics[key] for key in ("loss", *VALIDATION) if key in metrics}
        log.summary({"saved": str(run.out_dir), **kept})
    return metrics


if __name__ == "__main__":
    config.main(lambda argv: train(config.parse(Config, argv, check)))

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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Literal

from run import config, mix

if __name__ == "__main__":
    config.answer_help(__file__)
    config.say_at_once("loading torch, then data and model: some seconds until the first step")

import torch

import data
from chat import Chat
from engines.serving import serve_command
from images import Picture
from learning import memory, optim, parallel
from learning import model as models
from learning.batches import micro_batches, pad, position_ids
from learning.checkpoint import Run
from learning.logprobs import token_logprobs
from learning.vision import Vision, find_vision, tiny_vision, whole_beginning, why_blind
from run.config import UserError
from run.log import Log, NoLog, check_logger
from tasks import tiny
from tools import Toolbox
from trajectory import Trajectory

SHOWN = 3  # samples that stand in report.html
KEPT_BYTES = 2**30  # of images, which are opened once; those of further rows in every pass
VALIDATION = ("val_loss", "val_token_accuracy")
COLUMNS = {"loss": "7.4f", "entropy": "6.4f", "grad_norm": "6.2f", "seconds": "5.2f"}


@dataclass
class Config:
    # run
    out_dir: str = "out/sft"  # must be new or empty
    resume: bool = False  # go on from out_dir's last checkpoint; without one, begin
    seed: int = 0  # of the weights made here, the demonstrations, and their order
    save_every: int = 500  # updates between checkpoints; 0: only when it ends or is stopped
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
    train_vision: bool = False  # of a model that sees: its tower too, not its language model alone
    min_pixels: int = 0  # an image is shown with so many at least; 0: as its processor says
    max_pixels: int = 0  # and with so many at most: 784 of Qwen2-VL's are a token
    # several processes
    parallel: Literal["none", "ddp", "fsdp", "deepspeed"] = "none"  # ddp: all weights on each;
    # fsdp: in shards; deepspeed: ZeRO-1, the optimizer alone in shards
    gpus: int = 1  # processes to start on this machine, one a GPU, or as many on its CPU
    offload: bool = False  # fsdp: shards and moments in the CPU's memory, where a GPU's is small
    # data
    mix: tuple[str, ...] = ()  # in the place of data: configs, each file.py[:weight]; run/mix.py
    data: str = "task:calc"  # demonstrations of a task, or rows of .jsonl, .parquet or a hub id
    rows: int | None = None  # use the first n; for a task: make n (default 8192)
    min_reward: float | None = None  # of these, only rows whose `reward` is at least this
    recorded: bool = True  # false: of rollouts, their messages, for a model with another tokenizer
    val_rows: int = 0  # held out, chosen by the seed, to measure val_loss and val_token_accuracy on
    val_every: int = 50  # updates between two such measurements; there is one at the end too
    system_prompt: str = ""  # put in front of conversations that have none
    format: Literal[
        "auto",
        "hermes",
        "llama3",
        "mistral",
        "qwen_xml",
        "harmony",
        "gemma4",
        "functiongemma",
        "glm",
        "pythonic",
        "atem",
        "fence",
        "tags",
        "json_actions",
    ] = "hermes"  # how calls are written; auto: as the model's template does
    template_options: tuple[str, ...] = ()  # of the chat template, such as enable_thinking=false
    chat_template: str = ""  # a .jinja file in the place of the model's own; saved with the model
    tools: tuple[str, ...] = ("python",)  # shown where a row has no `tools`: <name> or file.py:name
    tool_options: tuple[str, ...] = ()  # that a schema tells, such as crop.coordinates=pixels
    max_tokens: int = 2048  # a longer conversation is cut on the right
    # optimisation
    epochs: float = 1.0  # passes over the rows
    shuffle: bool = True  # false: the rows in their order, for data that begin with what is easy
    batch_size: int = 32  # conversations per update
    token_budget: int = 8192  # tokens per forward pass, padding counted; halve it if out of memory
    packing: bool = False  # rows of several samples, no padding: for very uneven lengths
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"  # muon: from scratch, third of steps
    learning_rate: float = 2e-5  # 1e-5..5e-5 full, 1e-4..5e-4 LoRA, 1e-2 tiny from scratch
    tower_share: float = 1.0  # of it, for what of a tower Muon leaves to AdamW; from scratch 0.2
    schedule: Literal["constant", "linear", "cosine"] = "cosine"  # after the warm-up
    warmup: int = 20  # updates; a tenth where there are no more than that
    weight_decay: float = 0.01  # of matrices only
    max_grad_norm: float = 1.0  # the gradient is scaled down to this norm


def check(cfg: Config) -> None:
    """Checks the rules across keys. A key that would have no effect is an error, not a surprise."""
    mix.check(cfg)
    lora = "lora_r lora_alpha lora_targets"
    config.refuse_unused_keys(
        cfg,
        (
            (cfg.tune == "full", lora, "with tune=full: use --tune=lora, or drop it"),
            (cfg.model == "tiny", "chat_template", "with model=tiny: it has its own template"),
            (cfg.model != "tiny", "whole_names", f"with model={cfg.model}: it has a tokenizer"),
            (bool(cfg.mix), "shuffle", "with a mix: its rows are drawn by weight, so drop it"),
            (cfg.optimizer != "muon", "tower_share", "without optimizer=muon: drop it"),
            (cfg.val_rows == 0, "val_every", "with val_rows=0: use --val_rows=64, or drop it"),
            (
                cfg.model == "tiny",
                "train_vision min_pixels max_pixels",
                "with model=tiny: all of it learns, and its size of images is its own",
            ),
        ),
    )
    if cfg.model == "tiny" and cfg.tune != "full":
        raise UserError(f"tune = {cfg.tune!r} on model = 'tiny': random weights need tune=full")
    if cfg.tune == "qlora" and cfg.dtype == "mixed":
        raise UserError("dtype = 'mixed' with tune=qlora: its base is not trained, use bfloat16")
    for name in "rows max_tokens batch_size token_budget lora_r val_every".split():
        value = getattr(cfg, name)
        if value is not None and value < 1:
            raise UserError(f"{name} = {value}: expected at least 1")
    config.require_positive(cfg, "learning_rate tower_share epochs max_grad_norm lora_alpha")
    config.require_not_negative(
        cfg, "warmup weight_decay seed val_rows save_every min_pixels max_pixels"
    )
    parallel.check(cfg.parallel, cfg.gpus, cfg.optimizer, cfg.offload)
    if cfg.seed >= 2**63:
        raise UserError(f"seed = {cfg.seed}: expected less than 2**63")


@dataclass
class Sample:
    """What is trained on: a conversation as tokens."""

    ids: list[int]
    mask: list[int]  # 1 = trained
    images: list[Picture] = field(default_factory=list)
    # Where these are without their pixels: what opens them again, for a forward pass.
    reopen: Callable[[], list[Picture]] | None = None
    source: str = ""  # of a mix, that it is of

    def pictures(self) -> list[Picture]:
        """Gives its images with their pixels."""
        if self.reopen is None:
            return self.images
        return self.reopen()[: len(self.images)]


def sft_loss(
    logprobs: torch.Tensor,  # (B, T)
    mask: torch.Tensor,  # (B, T) 1 = trained
    trained_tokens: int,  # of the whole batch, not of this micro-batch
) -> torch.Tensor:
    """Computes the share of a micro-batch in the mean negative log-likelihood over all trained
    tokens of the batch."""
    return -(logprobs * mask).sum() / trained_tokens


# ---- rows to samples


def check_rows(cfg: Config, rows: list[dict]) -> None:
    """Checks that every key has an effect on these rows (of data.conversations)."""
    recorded = ["ids" in row for row in rows]
    have_tools = []  # and look at none of the run's
    for row in rows:
        tools = row.get("tools")
        is_named = tools is not None and any(isinstance(tool, str) for tool in tools)
        have_tools.append("ids" in row or (tools is not None and not is_named))
    on = f"on {cfg.data}, whose rows"
    config.refuse_unused_keys(
        cfg,
        (
            (
                all(recorded),
                "format tools template_options chat_template",
                f"{on} are recorded with their prompts: drop it",
            ),
            (all(have_tools), "tools", f"{on} have `tools` of their own: drop it"),
        ),
    )
    if cfg.model == "tiny" and any(recorded):
        raise UserError("model = 'tiny' has a new tokenizer: recorded ids need their own model")


def render(
    rows: list[dict],
    tokenizer,
    format: str,
    tools: list[dict],
    name: str,
    options=(),
    vision: Vision | None = None,
) -> list[Sample]:
    """Makes a Sample of each row: recorded ones as they are; a conversation with the tools of its
    row, or else these, by one Chat for each set of tools. The first proves the template. name: the
    data set's, for messages."""
    chats: dict[str, Chat] = {}  # by the JSON of the tools
    if any("messages" in row and row["tools"] is None for row in rows):
        chats[json.dumps(tools)] = Chat(tokenizer, format, tools, options, vision=vision)
    samples = []
    kept = 0  # bytes
    for row in rows:
        try:
            if "ids" in row:
                data.check_ids(row, tokenizer)
                samples.append(recorded_sample(row, vision))
                continue
            data.check_answers(row["messages"])
            shown = shown_tools(row, tools)
            data.check_calls(row["messages"], [tool["function"]["name"] for tool in shown])
            key = json.dumps(shown)
            if key not in chats and chats:
                first = next(iter(chats.values()))
                chats[key] = first.with_tools(shown)  # spares the proof
            elif key not in chats:
                chats[key] = Chat(tokenizer, format, shown, options, vision=vision)
            reopen = partial(chats[key].pictures, row)
            pictures = reopen()
            ids, mask = chats[key].render(row["messages"], pictures)
            kept += sum(bytes_of(picture) for picture in pictures)
            if kept <= KEPT_BYTES:
                samples.append(Sample(ids, mask, pictures))
            else:
                samples.append(Sample(ids, mask, without_pixels(pictures), reopen))
        except UserError as error:
            raise UserError(f"{name}, row {row['row']}: {error}") from None
    return samples


def shown_tools(row: dict, tools: list[dict]) -> list[dict]:
    """Picks the schemas that a row's prompt shows: its own, those of `tools` that it names, or all
    of these. UserError for a name that is not among them."""
    if row["tools"] is None:
        return tools
    by_name = {tool["function"]["name"]: tool for tool in tools}
    shown = []
    for tool in row["tools"]:
        if isinstance(tool, str) and tool not in by_name:
            there = ", ".join(by_name) or "none"
            raise UserError(
                f"its 'tools' names {tool!r}, the run has {there}: name it in --tools=…"
            )
        shown.append(by_name[tool] if isinstance(tool, str) else tool)
    return shown


def recorded_sample(row: dict, vision: Vision | None) -> Sample:
    """Makes the Sample of a recorded trajectory; its images are as they were shown. UserError if
    they are not those of its ids."""
    if not row.get("images"):
        return Sample(row["ids"], row["mask"])
    if vision is None:
        raise UserError("it has images, and this model sees none")
    reopen = partial(vision.reopen, row["images"], row["image_folder"])
    pictures = reopen()
    if not vision.fits(row["ids"], pictures):
        raise UserError(
            "its images are not those that its ids stand for, so it is of another model: take "
            "'ids' out of the rows, which makes conversations of them"
        )
    return Sample(row["ids"], row["mask"], without_pixels(pictures), reopen)


def bytes_of(picture: Picture) -> int:
    """Counts the memory of an image: as it was, as it is shown, and for the tower."""
    count = sum(tensor.nbytes for tensor in picture.pixels.values())
    for image in (picture.original, picture.shown):
        count += 3 * image.width * image.height
    return count


def without_pixels(pictures: list[Picture]) -> list[Picture]:
    """Keeps of Pictures what stands in ids."""
    return [
        replace(picture, original=None, shown=None, pixels={}, again=None) for picture in pictures
    ]


def chat_of(
    cfg: Config, rows: list[dict], tokenizer, tools: list[dict], eos_ids: Sequence[int]
) -> Chat | None:
    """Makes the chat that rendered the rows, whose stop tokens will end a turn of the trained
    model; None where all rows are recorded. eos_ids: of the model's generation_config."""
    for row in rows:
        if "messages" in row:
            shown = shown_tools(row, tools)
            return Chat(tokenizer, cfg.format, shown, cfg.template_options, eos_ids)
    return None


def fit(samples: list[Sample], max_tokens: int) -> tuple[list[Sample], int, int]:
    """Cuts samples at max_tokens; returns (those in which something is trained, how many were cut,
    how many were left out because nothing in them is trained). UserError if that leaves none."""
    fitted = []
    cut = 0
    for sample in samples:
        # an image of which only a part would be left goes, too
        end, images = whole_beginning(sample.ids, sample.images, max_tokens)
        if not any(sample.mask[:end]):
            continue
        kept = replace(sample, ids=sample.ids[:end], mask=sample.mask[:end], images=images)
        fitted.append(kept)
        if len(sample.ids) > max_tokens:
            cut += 1
    if not fitted:
        raise UserError(
            f"max_tokens = {max_tokens}: in none of the {len(samples)} conversations does the "
            "assistant write anything before that; raise it"
        )
    return fitted, cut, len(samples) - len(fitted)


def hold_out(samples: list, val_rows: int, seed: int) -> tuple[list, list]:
    """Divides samples into (the others in their order, val_rows chosen by the seed). UserError if
    none is left."""
    if val_rows >= len(samples):
        raise UserError(f"val_rows = {val_rows}: of {len(samples)} rows none is left to train on")
    rng = random.Random(f"held out {seed}")
    held_out = set(rng.sample(range(len(samples)), val_rows))
    others = [sample for i, sample in enumerate(samples) if i not in held_out]
    return others, [samples[i] for i in sorted(held_out)]


# ---- forward passes


def packs(lengths: list[int], token_budget: int) -> list[list[int]]:
    """Packs samples into rows of at most token_budget tokens; returns the indices of each. By
    first-fit decreasing, which takes at most 11/9 of the fewest rows (Johnson 1973). What is longer
    than the budget is a row of its own."""
    rows: list[list[int]] = []
    room: list[int] = []  # tokens that are left in each row
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for i in longest_first:
        at = next((at for at, free in enumerate(room) if lengths[i] <= free), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(token_budget)
        rows[at].append(i)
        room[at] -= lengths[i]
    return rows


def parts(samples: list[Sample], token_budget: int, packing: bool) -> list[list[Sample]]:
    """Divides samples into those of each forward pass."""
    lengths = [len(sample.ids) for sample in samples]
    if packing:
        indices = packs(lengths, token_budget)
    else:
        patches = [sum(image.patches for image in sample.images) for sample in samples]
        indices = micro_batches(lengths, token_budget, patches=[(count, 0) for count in patches])
    return [[samples[i] for i in part] for part in indices]


def batch_logprobs(model, samples: list[Sample], packing: bool, temperature: float = 1.0):
    """Computes (logprobs, entropy, mask) of one forward pass: (B, T) padded, (1, T) packed."""
    ids = [sample.ids for sample in samples]
    mask = [sample.mask for sample in samples]
    images = None
    if any(sample.images for sample in samples):
        images = [sample.pictures() for sample in samples]
    attention_mask = positions = None
    if packing:
        # one row; positions begin again at 0 with every sample, which keeps them apart
        positions = pad([list(chain(*(range(len(row)) for row in ids)))], device=model.device)
        ids = [list(chain(*ids))]
        mask = [list(chain(*mask))]
    else:
        attention_mask = pad([[1] * len(row) for row in ids], device=model.device)
        positions = position_ids(ids, images, model.device)
    mask = pad(mask, device=model.device)
    logprobs, entropy = token_logprobs(
        model,
        pad(ids, device=model.device),
        attention_mask,
        mask,
        temperature,
        position_ids=positions,
        images=images,
    )
    return logprobs, entropy, mask


def check_packing(model, name: str) -> None:
    """Checks that a sample has the same logprobs behind another one in its row as alone; else
    UserError. Where a model ignores that positions begin again, or mixes tokens by other means than
    attention (Mamba), it sees what is before it."""
    rng = random.Random(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = [[rng.randrange(vocabulary) for _ in range(24)] for _ in range(2)]
    mask = [0] + [1] * 23
    first = Sample(ids[0], mask)
    second = Sample(ids[1], mask)
    with torch.no_grad():
        alone = batch_logprobs(model, [second], packing=False)[0][0]
        packed = batch_logprobs(model, [first, second], packing=True)[0][0, 24:]
        logits = model(torch.tensor(ids, device=model.device)).logits
    difference = (packed - alone).abs().mean().item()
    # Seen: 1e-7, in bfloat16 5e-4; 0.006 if random weights see the other sample, 0.3 if trained.
    limit = 1e-3 if logits.dtype == torch.float32 else 0.1
    if not difference <= limit:  # not: NaN is refused too
        raise UserError(
            f"model = {name!r} cannot be packed: behind another sample, logprobs differ by "
            f"{difference:.2g} from those alone; use packing=false"
        )


def accumulate(model, batch: list[Sample], token_budget: int, packing: bool = False) -> dict:
    """Adds the gradient of the loss of a batch; returns its metrics."""
    # the denominator is that of the whole batch: how it is cut for memory changes nothing
    trained_tokens = sum(sum(sample.mask) for sample in batch)
    sums = {"loss": 0.0, "entropy": 0.0}
    with parallel.whole(model):
        with parallel.together():
            for part in parallel.share(parts(batch, token_budget, packing)):
                logprobs, entropy, mask = batch_logprobs(model, part, packing)
                loss = sft_loss(logprobs, mask, trained_tokens)
                loss.backward()

                sums["loss"] += loss.item()
                sums["entropy"] += entropy.sum().item() / trained_tokens
        parallel.sum_gradients(model)
    return parallel.total(sums) | {"trained_tokens": trained_tokens}


@torch.no_grad()
def validate(model, samples: list[Sample], token_budget: int, packing: bool = False) -> dict:
    """Measures the loss on the samples, and the share of trained tokens that greedy decoding would
    choose given those before them: their probability at a temperature near 0, so a tie counts in
    part."""
    trained_tokens = sum(sum(sample.mask) for sample in samples)
    sums = {"val_loss": 0.0, "right": 0.0}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with parallel.whole(model), parallel.together():
        for part in parallel.share(parts(samples, token_budget, packing)):
            logprobs, _, mask = batch_logprobs(model, part, packing)
            sums["val_loss"] += sft_loss(logprobs, mask, trained_tokens).item()
            greedy, _, _ = batch_logprobs(model, part, packing, temperature=1e-6)
            sums["right"] += (greedy.exp() * mask).sum().item()
    for module, mode in modes:
        module.training = mode
    sums = parallel.total(sums)
    return {"val_loss": sums["val_loss"], "val_token_accuracy": sums["right"] / trained_tokens}


def validate_sources(model, samples: list[Sample], cfg: Config) -> dict:
    """Measures the held-out samples of each source of a mix by themselves: {"calc/val_loss": …}."""
    metrics = {}
    for source in sorted({sample.source for sample in samples}):
        mine = [sample for sample in samples if sample.source == source]
        measured = validate(model, mine, cfg.token_budget, cfg.packing)
        metrics |= {f"{source}/{name}": value for name, value in measured.items()}
    return metrics


# ---- the run


@dataclass
class Part:
    """The rows of one source, or all of them where there is no mix."""

    source: str
    cfg: Config
    schemas: list[dict]  # of its tools
    rows: list[dict]
    left_out: int  # below min_reward


def read_part(source: str, cfg: Config) -> Part:
    """Reads the rows of one source, and checks that every key has an effect on them."""
    toolbox = Toolbox(cfg.tools, options=cfg.tool_options, describe_only=True)
    if cfg.model != "tiny":
        models.find(cfg.model)
    rows = data.conversations(cfg.data, cfg.rows, cfg.seed, cfg.system_prompt, cfg.recorded)
    check_rows(cfg, rows)
    chosen = data.rewarded(rows, cfg.min_reward, cfg.data)
    return Part(source, cfg, toolbox.schemas, chosen, len(rows) - len(chosen))


def read_parts(cfg: Config) -> list[Part]:
    """Reads the rows of a config, by source."""
    if not cfg.mix:
        return [read_part("", cfg)]
    parts = []
    for source in mix.sources(cfg):
        with mix.told_by(source.name):
            parts.append(read_part(source.name, source.cfg))
    return parts


def tiny_tokenizer(cfg: Config, parts: list[Part]):
    """Makes the tokenizer of the tiny model from the rows that it learns."""
    talks = []  # (conversations, tools) of each part
    sees = False
    for part in parts:
        # in their order, the last rows may say what the first do not
        learnt_from = part.rows[:4096] if cfg.shuffle else part.rows
        talks.append(([row["messages"] for row in learnt_from], part.schemas))
        sees = sees or any(row.get("images") for row in part.rows)
    conversations, schemas = talks[0]
    return tiny.tiny_tokenizer(conversations, schemas, cfg.whole_names, sees, more=talks[1:])


def setup(cfg: Config):
    """Makes (model, tokenizer, samples, held-out samples, the chat that rendered them or None, a
    word on the data), the cheap checks first."""
    # 1. the rows
    parts = read_parts(cfg)
    chosen = [row for part in parts for row in part.rows]

    # 2. the tokenizer, and samples: rendered, and so proved, before any weights are loaded
    if cfg.model == "tiny":
        tokenizer = tiny_tokenizer(cfg, parts)
    else:
        tokenizer = models.load_tokenizer(cfg.model, cfg.chat_template)
    vision = load_vision(cfg, tokenizer, chosen)
    samples = []
    for part in parts:
        rendered = render(
            part.rows,
            tokenizer,
            part.cfg.format,
            part.schemas,
            part.cfg.data,
            cfg.template_options,
            vision,
        )
        samples += [replace(sample, source=part.source) for sample in rendered]
    samples, cut, empty = fit(samples, cfg.max_tokens)
    samples, held_out = hold_out(samples, cfg.val_rows, cfg.seed)
    if cfg.batch_size > len(samples):
        few = f"there are {len(samples)} rows to train on, use --batch_size={len(samples)} or less"
        raise UserError(f"batch_size = {cfg.batch_size}: {few}")

    # 3. the model
    if cfg.model == "tiny":
        make = tiny.tiny_that_sees if vision else tiny.tiny
        model = models.in_dtype(make(tokenizer, cfg.seed), cfg.dtype)
    else:
        model, _ = models.load(
            cfg.model,
            cfg.tune,
            cfg.dtype,
            lora_r=cfg.lora_r,
            lora_alpha=cfg.lora_alpha,
            lora_targets=cfg.lora_targets,
            seed=cfg.seed,
            train_vision=cfg.train_vision,
        )
    models.set_image_size(model, vision)
    eos_ids = () if cfg.model == "tiny" else models.eos_ids(cfg.model)
    first = parts[0]
    chat = chat_of(first.cfg, first.rows, tokenizer, first.schemas, eos_ids)
    models.set_stop_ids(model, chat.stop_ids if chat else eos_ids)
    longest = max(len(sample.ids) for sample in (*samples, *held_out))
    models.check_positions(model, cfg.model, longest)
    if cfg.packing:
        check_packing(model, cfg.model)
    summary = (
        f"{len(samples)} rows to train on, {len(held_out)} held out, {cut} cut at max_tokens, "
        f"{empty} left out with nothing to train, {sum(part.left_out for part in parts)} below "
        "min_reward"
    )
    return model, tokenizer, samples, held_out, chat, summary


def load_vision(cfg: Config, tokenizer, rows: list[dict]) -> Vision | None:
    """Loads what shows images to the model. UserError where it sees none and there are some, or
    where a key of images has no effect."""
    with_images = [row for row in rows if row.get("images")]
    if with_images and cfg.packing:
        raise UserError("packing = true with images: their positions are not packed, so drop it")
    if cfg.model == "tiny":
        return tiny_vision(tokenizer) if with_images else None
    base = models.base_of(cfg.model)
    vision = find_vision(base, tokenizer, cfg.min_pixels, cfg.max_pixels)
    if vision is None and with_images:
        raise UserError(f"{cfg.data}, row {with_images[0]['row']}, has images: {why_blind(base)}")
    if vision is None and cfg.train_vision:
        raise UserError(f"train_vision has no effect: {why_blind(base)}")
    return vision


def warmup_steps(cfg: Config, steps: int, samples: int) -> int:
    """Gives the updates of the warm-up: those asked for, which must be fewer than all; of those
    that nobody asked for, a tenth of a run that has no more."""
    if cfg.warmup < steps:
        return cfg.warmup
    if "warmup" in config.changed(cfg):
        few = f"{samples} rows are {steps} updates: lower it, or train for more epochs"
        raise UserError(f"warmup = {cfg.warmup}: expected less than {steps}, since {few}")
    return steps // 10


def order_of(samples: list[Sample], needed: int, cfg: Config) -> list[int]:
    """Orders the samples of a run, as their numbers: of a mix by weight, else as row_order does."""
    if not cfg.mix:
        return row_order(len(samples), needed, cfg.seed, cfg.shuffle)
    numbers: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        numbers.setdefault(sample.source, []).append(number)
    weights = {source.name: source.weight for source in mix.sources(cfg)}
    for name in weights:
        if name not in numbers:
            raise UserError(f"{name}: max_tokens and val_rows leave none of its rows to train on")
    return mix.next_of_sources(0, numbers, weights, needed, cfg.seed)


def row_order(samples: int, needed: int, seed: int, shuffle: bool = True) -> list[int]:
    """Orders the rows of a run: every one once, then all again, shuffled each time."""
    order: list[int] = []
    rng = random.Random(seed)
    while len(order) < needed:
        order += rng.sample(range(samples), samples) if shuffle else range(samples)
    return order


def train(cfg: Config) -> dict:
    """Trains, saves the model to out_dir, and returns the last step's metrics."""
    check(cfg)  # also of a config that was made in a notebook, not by config.parse
    with parallel.started(cfg.parallel):
        return train_here(cfg)


def train_here(cfg: Config) -> dict:
    """Trains in this process, which may be one of several."""
    # 1. all checks, the cheap ones first; then the model
    check_logger(cfg.logger)
    run = Run(cfg)
    model, tokenizer, samples, held_out, chat, summary = setup(cfg)
    steps = max(1, round(cfg.epochs * len(samples) / cfg.batch_size))
    warmup = warmup_steps(cfg, steps, len(samples))
    if cfg.gradient_checkpointing:
        models.recompute_layers(model)
    parallel.split(model, cfg.offload)
    optimizers = optim.optimizers(
        model,
        cfg.optimizer,
        cfg.learning_rate,
        cfg.weight_decay,
        cfg.tower_share,
    )
    if cfg.optimizer == "muon":
        optim.add_up_in_float64(model)

    # 2. where it goes on: weights, optimizers and random generators of the last checkpoint
    state = run.restore(model, optimizers) or {"step": 0, "metrics": {}}
    run.try_saving(model, tokenizer)
    first_step = state["step"]
    metrics = state["metrics"]
    order = order_of(samples, steps * cfg.batch_size, cfg)

    if parallel.is_first():
        log = Log(run.out_dir, steps, COLUMNS, first_step, cfg.logger, asdict(cfg))
    else:
        log = NoLog()
    advice = optim.memory_advice("token_budget", "max_tokens", "batch_size")
    with log, advice, run:
        trained, total = optim.count(model)
        log.print(f"{summary}; {steps} steps, {trained:,} of {total:,} parameters")
        frozen = models.frozen_parts(model)
        if frozen:
            log.print(f"not trained: {frozen}")
        if cfg.resume:
            log.print(f"going on with step {first_step}")
        if first_step == 0:  # the first samples, for report.html: is the mask what was meant?
            shown = []
            for number, row in enumerate(order[:SHOWN]):
                sample = samples[row]
                demonstration = Trajectory.of_demonstration({}, sample.ids, sample.mask)
                demonstration.images = sample.pictures()
                demonstration.group = number
                shown.append(demonstration)
            log.rollouts(shown, tokenizer, step=0)
        model.train()

        for step in range(first_step, steps):
            # 3. the next rows, one update
            started = time.monotonic()
            share = optim.schedule(step, steps, cfg.schedule, warmup)
            learning_rate = cfg.learning_rate * share
            first = step * cfg.batch_size
            rows = order[first : first + cfg.batch_size]
            batch = [samples[row] for row in rows]
            metrics = {"step": step}
            metrics["learning_rate"] = learning_rate
            metrics |= accumulate(model, batch, cfg.token_budget, cfg.packing)
            metrics["grad_norm"] = optim.step(
                model,
                optimizers,
                learning_rate,
                cfg.max_grad_norm,
            )
            metrics["seconds"] = time.monotonic() - started

            # 4. the rows held out, now and then and at the end
            is_last = step + 1 == steps
            is_due = is_last or (step + 1) % cfg.val_every == 0
            if held_out and is_due:
                metrics |= validate(model, held_out, cfg.token_budget, cfg.packing)
                if cfg.mix:
                    metrics |= validate_sources(model, held_out, cfg)

            # 5. log, save; a stop signal waits for this line
            log.step(metrics)
            if held_out and is_due:
                cells = [f"{name} {metrics[name]:.4f}" for name in VALIDATION]
                log.print("           " + "  ".join(cells))
            run.after(
                step + 1,
                steps,
                model,
                tokenizer,
                optimizers,
                log,
                metrics=metrics,
            )

        # 6. the model as from_pretrained loads it, and the last lines for people and for grep
        model.eval()
        run.finish(model, tokenizer)
        last = {name: metrics[name] for name in ("loss", *VALIDATION) if name in metrics}
        if chat:
            last["serve"] = serve_command(run.out_dir, chat)
        log.summary({"saved": str(run.out_dir), **last})
    return metrics


def main(argv: list[str]) -> None:
    """Trains as the command line says; --dry_run=true only shows the first row (play.py), and
    --fits=80 only says what it would need of a GPU's memory (learning/memory.py)."""
    is_dry, argv = config.take_flag(argv, "dry_run")
    gpu_gib, argv = memory.take_card(argv)
    if is_dry:
        config.run_script("play.py", ["--demonstration=true", *argv])
        return
    cfg = config.parse(Config, argv, check)
    if gpu_gib:
        memory.say(memory.Setup.of(cfg), gpu_gib)
        return
    if parallel.must_launch(cfg.gpus):
        parallel.launch(cfg.gpus)
    train(cfg)


if __name__ == "__main__":
    config.main(main)

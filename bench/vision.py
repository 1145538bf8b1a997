"""Where the seconds of a GRPO step go in a model that sees; and TRL's GRPOTrainer beside it.

    python bench/vision.py                                  # 20 minutes of a core
    python bench/vision.py --steps=4 --sides=tools,ours --runs=1   # to try it

The model: Idefics3-shaped, random weights, a tower of 1.9 M parameters and a language model of
1.6 M; an image of 640 x 480 pixels is shown as 128 x 128, 64 patches, 16 tokens. The tower is
frozen, as train_grpo.py has it by default. 8 prompts x 8 samples, one update a step.

"tools": ours alone. Each trajectory zooms twice and then answers, so that it has three images, one
of its prompt and two of the tool. A random model calls no tools: what it samples in the first two
turns is thrown away, and the call takes its place. "ours" and "trl": the image is in the prompt,
one turn of 32 tokens, as TRL can do it too. There both sides have equal prompts (ids are compared),
model, reward, loss, optimizer and float32; the samples are not the same. TRL updates 64, 32, 16 or
8 rows at once, whatever is fastest. Each run is a process of its own, by turns.

Seconds are those of one core: processor time with one thread, which another process on the machine
changes little; "wall" is the clock's. Medians of the steps but the first: of the whole step; of
the engine, which samples; of image processing (resizing, normalising, hashing); of the tools; of
the update. The tower's are parts of those of engine and update. "processed" is how often an image
is processed, over all images that there are: 1.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from run import config, mix

if __name__ == "__main__":
    config.answer_help(__file__)

import torch
from trl_side import arguments, in_subprocess, save

import train_grpo
from engines.base import Completion
from engines.local import TransformersEngine
from learning import model as models
from learning import vision
from learning.logprobs import layers_of
from player import Player
from run import log as run_log
from run import page as run_page
from run.config import UserError
from tasks import tiny
from tools import Toolbox
from tools.zoom import zoom

WARM_UP = 1  # steps that are not counted
PROMPTS = 8
GROUP = 8
QUESTION = "How high is the bar in the middle?"
BOXES = ([0, 0, 500, 500], [0, 200, 900, 900])  # of the two calls; where they begin differs
NEW_TOKENS = 32
SIDE = 128  # pixels: what the tower takes
PATCH = 16
REWARD = '''
def even(trajectory, example):
    """Anything that differs within a group: the share of even ids among the sampled ones."""
    sampled = [token for token, bit in zip(trajectory.ids, trajectory.mask) if bit]
    return sum(token % 2 == 0 for token in sampled) / max(1, len(sampled))
'''


@dataclass
class Config:
    steps: int = 8
    runs: int = 3  # of each side
    sides: tuple[str, ...] = ("tools", "ours", "trl")
    batches: tuple[int, ...] = (64, 32, 16, 8)  # rows TRL updates at once: the fastest counts
    save_to: str = ""  # a .json for the results
    part: str = ""  # for the subprocesses: tools, ours, or trl:64


def check(cfg: Config) -> None:
    config.require_positive(cfg, "steps runs")
    if cfg.steps < WARM_UP + 2:
        raise UserError(f"steps = {cfg.steps}: expected at least {WARM_UP + 2}, for a median")


# -- a model and rows


def call_text(box: list[int]) -> str:
    """Writes a call of zoom."""
    call = {"name": "zoom", "arguments": {"image": 1, "box": box}}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def make(folder: Path) -> None:
    """Writes a model that sees, with tokenizer and image processor, rows with images, a reward."""
    import transformers
    from PIL import Image, ImageDraw

    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": call_text(BOXES[0])},
    ]
    tokenizer = tiny.tiny_tokenizer([talk], Toolbox(["zoom"]).schemas, whole_names=True, sees=True)
    text = {
        "model_type": "qwen3",
        "vocab_size": len(tokenizer),
        "hidden_size": 192,
        "intermediate_size": 576,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 48,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    tower = {
        "hidden_size": 192,
        "intermediate_size": 576,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    model_config = transformers.Idefics3Config(
        text_config=text,
        vision_config=tower,
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.Idefics3ForConditionalGeneration(model_config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": SIDE},
        max_image_size={"longest_edge": SIDE},
        do_image_splitting=False,
    ).save_pretrained(folder)
    lines = []
    for number in range(64):
        image = Image.new("RGB", (640, 480), "white")
        pen = ImageDraw.Draw(image)
        for bar in range(5):
            height = (number * 37 + bar * 91) % 400 + 20
            pen.rectangle((40 + 120 * bar, 460 - height, 120 + 120 * bar, 460), fill="navy")
        image.save(folder / f"{number}.png")
        row = {"prompt": QUESTION, "image": f"{number}.png", "answer": "42"}
        lines.append(json.dumps(row) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "reward.py").write_text(REWARD)


def settings(cfg: Config, folder: Path) -> train_grpo.Config:
    """Returns those of a run of ours."""
    items = [
        f"--model={folder}",
        f"--data={folder}/rows.jsonl",
        f"--rewards={folder}/reward.py:even",
        f"--out_dir={folder}/run",
        f"--steps={cfg.steps}",
        f"--prompts_per_step={PROMPTS}",
        f"--group_size={GROUP}",
        "--save_every=0",
        "--learning_rate=1e-4",
        f"--max_new_tokens={NEW_TOKENS}",
    ]
    if cfg.part == "tools":
        items += ["--tools=zoom", f"--tool_options=zoom.side={2 * SIDE}"]
        return config.parse(train_grpo.Config, items, train_grpo.check)
    return config.parse(train_grpo.Config, [*items, "--tools="], train_grpo.check)


# -- the seconds of ours


class Clock:
    """Adds up processor seconds and calls of functions, by name, over the steps of a run."""

    def __init__(self):
        self.seconds = {}
        self.calls = {}
        self.began = time.process_time()
        self.steps = []  # of each step: (seconds by name, calls by name)

    @contextlib.contextmanager
    def count(self, name: str):
        started = time.thread_time()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.thread_time() - started
            self.calls[name] = self.calls.get(name, 0) + 1

    def timed(self, name: str, function):
        """Returns the function, with its seconds counted."""

        @functools.wraps(function)
        def counted(*arguments, **options):
            with self.count(name):
                return function(*arguments, **options)

        return counted

    def end_step(self) -> None:
        now = time.process_time()
        self.seconds["step"] = now - self.began
        self.began = now
        self.steps.append((dict(self.seconds), dict(self.calls)))
        self.seconds.clear()
        self.calls.clear()


def watch(clock: Clock) -> None:
    """Has the parts of a step counted."""
    vision.Vision.prepare = clock.timed("images", vision.Vision.prepare)
    TransformersEngine._run = clock.timed("engine", TransformersEngine._run)
    train_grpo.learn = clock.timed("update", train_grpo.learn)
    zoom.__call__ = clock.timed("tools", zoom.__call__)
    load = models.load

    def loaded(*arguments, **options):
        model, tokenizer = load(*arguments, **options)
        tower = layers_of(model, with_tower=True).vision_model
        tower.forward = clock.timed("tower", tower.forward)
        return model, tokenizer

    models.load = loaded


def call_twice() -> None:
    """Puts a call of zoom in the place of what is sampled in the first two turns."""
    generate = TransformersEngine.generate

    async def calling(self, ids, images, sampling):
        completion = await generate(self, ids, images, sampling)
        if len(images) > len(BOXES):
            return completion
        left = sampling.seed % 400  # of each sample another part, else they would be read as one
        box = [left, *BOXES[len(images) - 1][1:]]
        text = call_text(box) + "<|im_end|>"
        new = self.tokenizer.encode(text, add_special_tokens=False)
        return Completion(new, [-1.0] * len(new), "stop")

    TransformersEngine.generate = calling


def ours(cfg: Config, folder: Path) -> dict:
    """Makes a run of ours; returns medians of its steps."""
    clock = Clock()
    watch(clock)
    if cfg.part == "tools":
        call_twice()
    pictures = []  # of each step: of how many trajectories, images in them, different ones

    class Log(run_log.Log):
        def step(self, metrics):
            super().step(metrics)
            clock.end_step()

        def rollouts(self, trajectories, *arguments, **options):
            """Writes none."""

    train_grpo.Log = Log
    learn = train_grpo.learn

    def counted(model, optimizers, trajectories, *arguments, **options):
        shown = [picture for t in trajectories for picture in t.images]
        pictures.append((len(trajectories), len(shown), len({id(p) for p in shown})))
        return learn(model, optimizers, trajectories, *arguments, **options)

    train_grpo.learn = counted
    train_grpo.train(settings(cfg, folder))
    rows = run_page.read(folder / "run" / "metrics.jsonl")[WARM_UP:]
    result = {"wall": statistics.median(row["seconds"] for row in rows)}
    for name in ("step", "engine", "images", "tools", "update", "tower"):
        values = [seconds.get(name, 0.0) for seconds, _ in clock.steps[WARM_UP:]]
        result[name] = statistics.median(values)
    _, calls = clock.steps[-1]
    trajectories, shown, different = pictures[-1]
    result["trajectories"] = trajectories
    result["images_per_trajectory"] = shown / trajectories
    result["processed"] = calls["images"] / different
    result["tower_calls"] = calls["tower"]
    result["new_tokens"] = statistics.mean(row["new_tokens"] for row in rows)
    return result


# -- TRL


def trls(cfg: Config, folder: Path, batch: int) -> dict:
    """Makes a run of TRL's; returns the median of its steps."""
    from datasets import Dataset
    from transformers import Idefics3Processor, TrainerCallback
    from trl import GRPOTrainer

    run = settings(cfg, folder)
    player = Player.of(run, "full")
    tokenizer = player.chat.tokenizer
    processor = Idefics3Processor(
        player.chat.vision.processor,
        tokenizer,
        image_seq_len=player.chat.vision.square_tokens,
        chat_template=tokenizer.chat_template,
    )
    times = []
    lengths = []
    picked = mix.next_rows(0, player.examples, cfg.steps * PROMPTS, run.seed)
    rows = []
    for example in picked:
        (picture,) = player.chat.pictures(example)
        message = {"role": "user", "content": QUESTION}
        rows.append({"prompt": [message], "image": picture.original})

    def even(completion_ids, **_):
        lengths.append(statistics.mean(map(len, completion_ids)))
        return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

    class Times(TrainerCallback):
        def on_train_begin(self, *_, **__):
            times.append((time.process_time(), time.perf_counter()))

        def on_step_end(self, *_, **__):
            times.append((time.process_time(), time.perf_counter()))

    trainer = GRPOTrainer(
        player.model,
        even,
        args=arguments(
            folder / "trl",
            cfg.steps,
            batch,
            PROMPTS * GROUP,
            run.learning_rate,
            seed=run.seed,
            max_completion_length=NEW_TOKENS,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        callbacks=[Times()],
    )
    same_ids(trainer, player, picked[0])
    trainer.train()
    pairs = list(itertools.pairwise(times))[WARM_UP:]
    return {
        "wall": statistics.median(after[1] - before[1] for before, after in pairs),
        "step": statistics.median(after[0] - before[0] for before, after in pairs),
        "new_tokens": statistics.mean(lengths[WARM_UP:]),
    }


def same_ids(trainer, player: Player, example: dict) -> None:
    """Checks that a prompt is the same tokens on both sides: else there is no comparison."""
    pictures = player.chat.pictures(example)
    parts = [{"type": "image", "image": pictures[0].original}, {"type": "text", "text": QUESTION}]
    (prompt,), *_ = trainer._tokenize_prompts([[{"role": "user", "content": parts}]])
    if prompt != player.chat.prompt(example["messages"], pictures):
        raise UserError("TRL does not read this chat template as ours does")


# -- what is measured


def part(cfg: Config) -> dict:
    """Makes, in a subprocess, one run of one side."""
    torch.set_num_threads(1)
    side, _, batch = cfg.part.partition(":")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        return trls(cfg, folder, int(batch)) if side == "trl" else ours(cfg, folder)


def main(cfg: Config) -> None:
    if cfg.part:
        print(json.dumps(part(cfg)))
        return
    sys.stdout.reconfigure(line_buffering=True)
    results = {}
    parts = dict.fromkeys(cfg.sides)

    # 1. how many rows at once is TRL's best?
    best = cfg.batches[0]
    if "trl" in parts and len(cfg.batches) > 1:
        results["tried"] = {}
        for rows in cfg.batches:
            tried = in_subprocess(__file__, [f"--part=trl:{rows}", "--steps=5"])
            results["tried"][rows] = tried["step"]
            print(f"TRL with {rows} rows at once: {tried['step']:.2f} s a step")
        best = min(results["tried"], key=results["tried"].get)

    # 2. the sides by turns
    for side in parts:
        results[side] = []
    for _ in range(cfg.runs):
        for side in parts:
            name = f"trl:{best}" if side == "trl" else side
            result = in_subprocess(__file__, [f"--part={name}", f"--steps={cfg.steps}"])
            results[side].append(result)
            numbers = "  ".join(f"{key} {value:.3g}" for key, value in result.items())
            print(f"{side:6} {numbers}")

    # 3. medians of the runs
    results["medians"] = {}
    for side in parts:
        median = {}
        for key in results[side][0]:
            median[key] = statistics.median(result[key] for result in results[side])
        results["medians"][side] = median
        print(f"{side:6} " + "  ".join(f"{key} {value:.3g}" for key, value in median.items()))
    if "ours" in parts and "trl" in parts:
        ratio = results["medians"]["ours"]["step"] / results["medians"]["trl"]["step"]
        print(f"seconds per step, image in the prompt: ours / TRL = {ratio:.2f}")
    if cfg.save_to:
        about = {"bench": "vision", "config": dataclasses.asdict(cfg)}
        save(cfg.save_to, about | {"results": results})  # which has TRL's version under "trl"


if __name__ == "__main__":
    config.main(lambda argv: main(config.parse(Config, argv, check)))

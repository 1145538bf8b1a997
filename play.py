"""Plays one rollout and prints it in colour: trained tokens green, context grey, what a tool said
yellow.

    python play.py --config calc.py --model=out/calc               # one episode of a real model
    python play.py --config calc.py --temperature=0 --seed=3
    python play.py --run=out/calc --prompt="What is 6 * 7?"        # your own question
    python play.py --run=out/sees --prompt="What is this?" --image=cat.jpg
    python play.py --run=out/calc --chat=true                      # a talk, tools and all
    python play.py --run=out/calc --group=8                        # rewards and advantages compared
    python play.py --config gsm8k.py --made_up=true                # without its model or a download
    python play.py --config sft_gsm8k.py --demonstration=true      # a row as SFT is trained on it

--run takes model and config as evaluate.py does: by default greedy, on a row held out. In a talk
each question is a rollout of its own, whose prompt is all that was said, tool calls included;
/reset begins anew, Ctrl-D ends it. Through a pipe a line is a question. A group is what GRPO
compares: samples of one row, by default at temperature 1.

--made_up=true checks a config (`--dry_run=true` on a training script calls it): all rows are read,
those held out too; the first one's prompt is rendered, and an oracle plays it through the scripted
engine: calls a tool, then says the right answer. Tools and rewards are the real ones. What is
printed is what training would see; below it stands what could not be checked here, and what looks
wrong.

Images are named where they stand, with their size and the tokens that they take; those of a model's
episode are saved as the model saw them, and a terminal has a rough view of each.

The row is the first of the data. Where that would have to be downloaded, it is the one that
configs/samples.jsonl has for the data set, written by us with the columns of the original. Where
the model is not on this machine, a stand-in tokenizer takes the place of its own.
"""

import contextlib
import dataclasses
import json
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from run import config, mix

if __name__ == "__main__":
    config.answer_help(__file__, "train_grpo.py", keys=config.ROLLOUT_KEYS)

import data
import evaluate
import rewards as reward_functions
import train_grpo
import train_sft
from chat import Chat
from engines.scripted import ScriptedEngine
from formats import FORMATS
from formats.base import tools_of_row
from formats.messages import calls_of, has_images
from grading.calls import COLUMN, right_calls
from images import open_image
from learning import model as models
from learning.vision import Vision, find_vision, tiny_vision
from loss import set_advantages
from player import Player, check_prompts, prepare_task, validation_examples
from rollout import Settings
from run.config import UserError
from tasks import bfcl, tiny
from tools import Toolbox
from trajectory import COLOURS, Trajectory, escaped, show, spans

SAMPLES = config.HERE / "configs" / "samples.jsonl"
# need the model's own template; hermes has one in the stand-in
OWN_FORMATS = [name for name, format in FORMATS.items() if not format.inline and name != "hermes"]
STAND_IN_FORMATS = ("auto", *OWN_FORMATS)
# what tools that see take in any image
SEEN = {"box": [0, 0, 16, 16], "point": [8, 8], "frames": [1]}
OF_EVALUATION = ("temperature", "seed", "split")  # keys that evaluate.py has itself
RESET = "/reset"
NO_ORACLE = "I do not know."  # the answer where neither a reward nor the row has a right one


@dataclass
class Config:
    run: str = ""  # the out_dir of a training run: its model and its config
    made_up: bool = False  # an oracle plays, not the model: to check a config of train_grpo.py
    demonstration: bool = False  # nothing is played: a row of a config of train_sft.py is shown
    prompt: str = ""  # a question of your own in the place of a row; its answer is not graded
    image: tuple[str, ...] = ()  # files of pictures that it is about
    chat: bool = False  # question after question, on the terminal or through a pipe
    group: int = 0  # samples of one row, side by side, with their rewards and advantages


def check(cfg: Config) -> None:
    """Checks the rules across keys."""
    if cfg.made_up and cfg.demonstration:
        raise UserError("made_up and demonstration: expected one of them")
    without_model = cfg.made_up or cfg.demonstration
    if cfg.prompt and without_model:
        raise UserError("prompt has no effect with made_up and demonstration, which show a row")
    for key in ("run", "chat", "group"):
        if getattr(cfg, key) and without_model:
            raise UserError(f"{key} has no effect with made_up and demonstration: drop it")
    if cfg.image and not cfg.prompt:
        raise UserError("image has no effect without a question: give --prompt=…")
    if cfg.chat and (cfg.prompt or cfg.group):
        raise UserError("chat asks for the questions itself: drop prompt and group")
    if cfg.group and cfg.prompt:
        raise UserError("group compares rewards, and a question of your own has none: drop one")
    if cfg.group and cfg.group < 2:
        raise UserError(f"group = {cfg.group}: expected at least 2, to be compared")


def load_config(argv: list[str], given: Config) -> train_grpo.Config:
    """Reads what is played, and by which model: with --run as evaluate.py does."""
    typed = {item.partition("=")[0] for item in argv}
    if given.group and given.run and "--temperature" not in typed:
        argv = [*argv, "--temperature=1"]  # greedy ones are all alike
    if given.run:
        mine, argv = config.split(argv, OF_EVALUATION)
        of_run = config.parse(evaluate.Config, [f"--run={given.run}", *mine], evaluate.check)
        cfg = evaluate.load_config(argv, of_run)
    else:
        cfg = config.parse(train_grpo.Config, argv, train_grpo.check, keys=config.ROLLOUT_KEYS)
    if given.group and cfg.temperature == 0:
        raise UserError("temperature = 0: the samples of a group would be all alike, write 1")
    return cfg


def play_model(cfg: train_grpo.Config, given: Config) -> Trajectory:
    """Plays and prints the first example of a config, or the question given, with its model."""
    if given.prompt:
        messages, images = own_question(given)
        with Player.for_questions(cfg) as player:
            if images and not player.chat.sees:
                raise UserError(f"image has no effect: {cfg.model} sees no images, drop it")
            trajectories = player.play([player.question(messages, images)])
        if not trajectories[0].turn_starts:
            raise UserError(
                f"prompt: with what stands before it, it has {len(trajectories[0].ids)} tokens, "
                f"and max_tokens = {cfg.max_tokens} with its answer: ask a shorter one"
            )
    else:
        with Player.of(cfg, limit=1) as player:
            trajectories = player.play(player.examples)  # of a mix, one of each source
    for trajectory in trajectories:
        show_rollout(trajectory, player.chat.tokenizer, save_images(trajectory))
    return trajectories[0]


def own_question(given: Config) -> tuple[list[dict], list]:
    """Makes messages of the question of the command line, and opens the images in them."""
    content = given.prompt
    images = []
    for source in given.image:
        path = Path(source).expanduser()
        images.append(open_image(path.name, folder=path.parent))
    if images:
        shown = [{"type": "image"}] * len(images)
        content = [*shown, {"type": "text", "text": given.prompt}]
    return [{"role": "user", "content": content}], images


# ---- a group, and a talk


def play_group(cfg: train_grpo.Config, given: Config) -> list[Trajectory]:
    """Plays samples of the first example, and prints them side by side: what each earned, and its
    advantage over the others, as train_grpo.py computes it."""
    with Player.of(cfg, limit=1) as player:
        trajectories = player.play(player.examples[:1], samples=given.group)
    set_advantages(trajectories, cfg.adv_norm, cfg.turn_credit, cfg.overlong)
    first = trajectories[0]
    tokenizer = player.chat.tokenizer
    console = Console(highlight=False)
    end = first.turn_starts[0] if first.turn_starts else len(first.ids)
    prompt = tokenizer.decode(first.ids[:end], skip_special_tokens=False)
    console.print(Text(escaped(prompt), style=COLOURS["c"]))
    table = Table(show_lines=True)
    table.add_column("rollout", ratio=1)
    for name in ("reward", "advantage", "calls", "stop"):
        table.add_column(name, justify="right")
    for trajectory in trajectories:
        table.add_row(
            coloured(trajectory, tokenizer),
            rewards_in_words(trajectory),
            advantages_in_words(trajectory),
            f"{len(trajectory.calls)}",
            trajectory.stop,
        )
    console.print(table)
    console.print(Text(escaped(f"the answer is {first.example.get('answer')!r}")))
    return trajectories


def rewards_in_words(trajectory: Trajectory) -> Text:
    """Writes the reward, and what it is the sum of, where that is more than one."""
    lines = [number_in_words(trajectory.reward)]
    if len(trajectory.rewards) > 1:
        for name, value in trajectory.rewards.items():
            lines.append(f"{name} {number_in_words(value)}")
    return Text(escaped("\n".join(lines)))


def number_in_words(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


def advantages_in_words(trajectory: Trajectory) -> Text:
    """Writes the advantage; of turns that have their own, each."""
    values = list(dict.fromkeys(trajectory.advantages)) or [0.0]
    text = Text()
    for place, value in enumerate(values):
        colour = "green" if value > 0 else "red" if value < 0 else ""
        text.append(f"{', ' if place else ''}{value:+.2f}", style=colour)
    return text


def coloured(trajectory: Trajectory, tokenizer) -> Text:
    """Writes what stands behind the prompt, each token in the colour of its kind."""
    text = Text()
    if not trajectory.turn_starts:
        return text
    for kind, part in spans(trajectory, tokenizer, start=trajectory.turn_starts[0]):
        text.append(escaped(f"[{part}]" if kind == "i" else part), style=COLOURS[kind])
    return text


def talk(cfg: train_grpo.Config) -> None:
    """Answers question after question of stdin, until it ends or Ctrl-C comes."""
    is_terminal = sys.stdin.isatty()
    sys.stdin.reconfigure(errors="replace")  # bytes that are no UTF-8
    console = Console(highlight=False, soft_wrap=True)
    with Player.for_questions(cfg) as player, contextlib.suppress(EOFError, KeyboardInterrupt):
        tools = ", ".join(player.toolbox.tools) or "none"
        console.print(Text(escaped(f"tools: {tools}. {RESET} begins anew, Ctrl-D ends it.")))
        messages: list[dict] = []
        images: list = []
        asked = 0  # questions so far: each is sampled with noise of its own
        while True:
            line = input("> " if is_terminal else "").strip()
            if line == RESET:
                messages = []
                images = []
                continue
            if not line:
                continue
            said = [*messages, {"role": "user", "content": line}]
            (trajectory,) = player.play([player.question(said, images)], step=asked)
            asked += 1
            show_answer(trajectory, player.chat.tokenizer, console)
            if not trajectory.turn_starts:
                continue  # there was no room for an answer: the question is as if it was not asked
            messages = said + to_go_on(trajectory)
            images = [picture.original for picture in trajectory.images]


def to_go_on(trajectory: Trajectory) -> list[dict]:
    """Copies the messages behind the prompt, so that a question can follow them: calls of the last
    turn were not run, or gave the answer."""
    messages = trajectory.messages[len(trajectory.example["messages"]) :]
    if messages and messages[-1].get("tool_calls"):
        words = trajectory.answer or messages[-1]["content"]
        messages[-1] = {"role": "assistant", "content": words}
    return messages


def show_answer(trajectory: Trajectory, tokenizer, console: Console) -> None:
    """Prints what stands behind the prompt, and in a line how it ended."""
    console.print(coloured(trajectory, tokenizer))
    failed = sum(bool(call.error) for call in trajectory.calls)
    line = f"{trajectory.stop}, {len(trajectory.calls)} calls, {failed} failed"
    line += f", {len(trajectory.ids)} tokens, {trajectory.seconds:.1f} s"
    if trajectory.stop == "length":
        line += f": raise max_tokens or max_new_tokens, or begin anew with {RESET}"
    console.print(Text(escaped(line), style=COLOURS["c"]))


def play_made_up(cfg: train_grpo.Config, show: Callable | None = None) -> Trajectory:
    """Plays one rollout of an oracle, of a mix one of each source, and prints it, or calls
    show(trajectory, tokenizer); UserError for what the config gets wrong."""
    if cfg.mix:
        return of_each_source(cfg, partial(play_made_up, show=show))
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        # 1. rows that are here, and what an oracle says to the first
        check_held_out(cfg, notes)
        cfg = with_local_data(cfg, folder, notes)
        toolbox, rewards, examples = prepare_task(cfg)
        example = examples[0]
        turns = oracle_turns(cfg, example, toolbox, list(rewards))

        # 2. the model's tokenizer, or a stand-in, and its proof
        conversation = example["messages"] + turns
        schemas = tools_of_row(example.get("tools"), toolbox.schemas)
        tokenizer, cfg = local_tokenizer(cfg, [conversation], schemas, notes)
        vision = local_vision(cfg, tokenizer)
        if vision is None:
            examples = [without_images(example, notes) for example in examples]
            example = examples[0]
        chat = Chat(tokenizer, cfg.format, toolbox.schemas, cfg.template_options, vision=vision)
        check_prompts(chat, examples, cfg.max_tokens)

        # 3. the oracle's words as a model would sample them
        said = sampled_turns(chat.for_row(example), example, turns)
        engine = ScriptedEngine(lambda ids, sampling: next_said(said), tokenizer)
        with Player(chat, engine, toolbox, rewards, Settings.of(cfg)) as player:
            (trajectory,) = player.play([example])
    (show or show_rollout)(trajectory, tokenizer)
    notes += doubts(trajectory, player.outcome)
    is_own_tokenizer = not any(note.startswith("model:") for note in notes)
    if cfg.data.startswith("task:") or is_own_tokenizer:
        notes.append(lengths(trajectory, cfg))
    tell_notes(notes)
    return trajectory


def show_demonstration(cfg: train_sft.Config, show: Callable | None = None) -> Trajectory:
    """Renders the first row of a config of train_sft.py, as it would be trained on, of a mix the
    first of each source, and prints it, or calls show(trajectory, tokenizer)."""
    if cfg.mix:
        return of_each_source(cfg, partial(show_demonstration, show=show))
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        cfg = with_local_data(cfg, folder, notes)
        few = min(cfg.rows or 64, 64) if cfg.data.startswith("task:") else cfg.rows
        rows = data.conversations(cfg.data, few, cfg.seed, cfg.system_prompt, cfg.recorded)
    toolbox = Toolbox(cfg.tools, options=cfg.tool_options, describe_only=True)
    rows = data.rewarded(rows, cfg.min_reward, cfg.data)
    conversations = [row["messages"] for row in rows if "messages" in row]
    tokenizer, cfg = local_tokenizer(cfg, conversations[:64], toolbox.schemas, notes)
    if not conversations and notes:
        raise UserError(f"the rows of {cfg.data} are token ids of {cfg.model}, which is not here")
    row = rows[0]
    vision = local_vision(cfg, tokenizer)
    if vision is None:
        row = without_images(row, notes)
    samples = train_sft.render(
        [row], tokenizer, cfg.format, toolbox.schemas, cfg.data, cfg.template_options, vision
    )
    ids = samples[0].ids
    mask = samples[0].mask
    trajectory = Trajectory.of_demonstration(row, ids, mask)
    trajectory.images = samples[0].pictures()
    (show or show_rollout)(trajectory, tokenizer)
    if len(ids) > cfg.max_tokens:
        what = f"this row has {len(ids)} tokens and would be cut"
        notes.append(f"max_tokens = {cfg.max_tokens}: {what}")
    tell_notes(notes)
    return trajectory


# ---- a rollout on the terminal


def of_each_source(cfg, show_one: Callable) -> Trajectory:
    """Shows each source of a mix; returns the first one's trajectory."""
    trajectories = []
    for source in mix.sources(cfg):
        print(f"\n{source.name}, weight {float(source.weight):g}\n")
        with mix.told_by(source.name):
            trajectories.append(show_one(source.cfg))
    return trajectories[0]


def save_images(trajectory: Trajectory) -> list[Path]:
    """Writes the images of a trajectory, as the model saw them, to a new folder out/play…; returns
    their files."""
    if not trajectory.images:
        return []
    folder = config.next_folder(Path("out/play"))
    files = []
    for number, picture in enumerate(trajectory.images, 1):
        files.append(folder / f"image_{number}.png")
        picture.shown.save(files[-1])
    return files


def show_rollout(trajectory: Trajectory, tokenizer, files: Sequence[Path] = ()) -> None:
    """Prints a trajectory; behind each image its file, and on a terminal a view of it."""
    console = Console(highlight=False, soft_wrap=True)

    def draw(number: int) -> Text:
        text = Text()
        if files:
            text.append(f" → {files[number - 1]}")
        if console.is_terminal:
            text.append("\n").append_text(half_blocks(trajectory.images[number - 1].shown))
        return text

    show(trajectory, tokenizer, console, draw)


def half_blocks(image, columns: int = 48, most_rows: int = 16) -> Text:
    """Draws an image with characters of which the upper half has one colour, the lower another."""
    scale = min(columns / image.width, 2 * most_rows / image.height)
    width = max(1, round(scale * image.width))
    height = 2 * max(1, round(scale * image.height / 2))
    pixels = image.resize((width, height)).load()
    text = Text()
    for y in range(0, height, 2):
        for x in range(width):
            upper = Color.from_rgb(*pixels[x, y])
            lower = Color.from_rgb(*pixels[x, y + 1])
            text.append("▀", Style(color=upper, bgcolor=lower))
        text.append("\n")
    return text


# ---- what stands in for data and model that are not here


def is_here(source: str) -> bool:
    """Says whether the rows of `source` are on this machine."""
    if source.startswith(bfcl.PREFIX):
        return bfcl.is_here(source.removeprefix(bfcl.PREFIX))
    return data.is_made_up(source) or Path(source).expanduser().exists()


def check_held_out(cfg: train_grpo.Config, notes: list[str]) -> None:
    """Reads the rows that training would measure itself on; UserError as there."""
    source = cfg.eval_data or cfg.data
    looks_like_file = source[:1] in "./~" or Path(source).suffix in data.SUFFIXES
    if is_here(source) or looks_like_file:
        validation_examples(cfg)
    elif cfg.eval_every:
        key = "eval_data" if cfg.eval_data else "data"
        notes.append(f"{key}: the held-out rows of {source} are not on this machine: not checked")


def with_local_data(cfg, folder: str, notes: list[str]):
    """Gives the config rows that are on this machine: its own, or our sample of its data set."""
    if is_here(cfg.data):
        return cfg
    samples = [json.loads(line) for line in SAMPLES.read_text(encoding="utf-8").splitlines()]
    sample = next((sample for sample in samples if sample["data"] == cfg.data), None)
    if sample is None:
        raise UserError(
            f"data = {cfg.data!r} is not on this machine, and a dry run downloads nothing: give a "
            "file with the same columns, --data=rows.jsonl"
        )
    notes.append(f"data: the row is our own, with the columns of {cfg.data}")
    path = Path(folder) / "row.jsonl"
    path.write_text(json.dumps(sample["row"]) + "\n", encoding="utf-8")
    changes = {"data": str(path)}
    if "tables" in sample:
        changes["database"] = str(Path(folder) / "sample.sqlite")
        with sqlite3.connect(changes["database"]) as database:
            database.executescript(sample["tables"])
        database.close()
    return dataclasses.replace(cfg, **changes)


def local_tokenizer(cfg, conversations: list, schemas: list[dict], notes: list[str]):
    """Returns (the model's tokenizer if it is on this machine, else one made here, the config for
    it)."""
    from transformers import AutoTokenizer

    # 1. the model's own
    if cfg.model != "tiny":
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                cfg.model, local_files_only=True, trust_remote_code=False
            )
            models.set_chat_template(tokenizer, cfg.chat_template)
            return tokenizer, cfg
        except (OSError, ValueError):
            what = "a stand-in tokenizer is used, and its chat template was not proved"
            notes.append(f"model: {cfg.model} is not on this machine: {what}")

    # 2. what belongs to that model's template has no effect on a stand-in
    if cfg.template_options:
        notes.append("template_options: not checked, they are of the model's own template")
        cfg = dataclasses.replace(cfg, template_options=())
    if cfg.chat_template:
        notes.append("chat_template: not checked, it goes with the model's own tokens")
        cfg = dataclasses.replace(cfg, chat_template="")
    if cfg.format in STAND_IN_FORMATS:
        notes.append(f"format: {cfg.format} needs the model's own template: hermes is shown")
        cfg = dataclasses.replace(cfg, format="hermes")

    # 3. a tokenizer trained on these conversations, or on a task's as train_sft.py makes it
    if cfg.data.startswith("task:"):
        rows = data.conversations(cfg.data, 2048, 0, cfg.system_prompt)
        conversations = [row["messages"] for row in rows]
        sees = any(row.get("images") for row in rows)
        # with whole names, as most tasks have them: here it is only to be short
        return tiny.tiny_tokenizer(conversations, schemas, whole_names=True, sees=sees), cfg
    plain = [[plain_message(message) for message in talk] for talk in conversations]
    return tiny.tiny_tokenizer(plain, schemas, sees=any(map(has_images, conversations))), cfg


def local_vision(cfg, tokenizer) -> Vision | None:
    """Loads what shows images to the model, if that is on this machine, or to the tiny model that a
    task with images is for."""
    if tokenizer.name_or_path != cfg.model:  # a stand-in
        sees = tiny.FOR_IMAGES[0] in tokenizer.get_added_vocab()
        return tiny_vision(tokenizer) if sees else None
    return find_vision(models.base_of(cfg.model), tokenizer, cfg.min_pixels, cfg.max_pixels)


def without_images(row: dict, notes: list[str]) -> dict:
    """Writes words in the place of a row's images, for a model that is not here or sees none."""
    if not row.get("images"):
        return row
    note = "images: shown as words, as the model is not on this machine or sees none"
    if note not in notes:
        notes.append(note)
    row = {name: value for name, value in row.items() if name != "images"}
    messages = []
    for message in row.get("messages", ()):
        content = message["content"]
        if isinstance(content, list):
            content = "".join(part.get("text", "(an image)") for part in content)
        messages.append(message | {"content": content})
    return row | {"messages": messages} if messages else row


def plain_message(message: dict) -> dict:
    """Makes a message as the stand-in's template takes it."""
    text = message.get("content") or ""
    if isinstance(text, list):
        text = "".join(part.get("text", "") for part in text)
    return {"role": message["role"], "content": text}


# ---- the oracle


def oracle_turns(cfg, example: dict, toolbox: Toolbox, rewards: list[str]) -> list[dict]:
    """Makes the assistant turns of a rollout that does it right, as far as can be known here."""
    if cfg.data.startswith("task:"):
        turns = data.oracle(cfg.data, example)
        if turns:
            return turns
    turns = []
    if "call_match" in rewards and COLUMN in example:
        calls = right_calls(example)
        if calls:
            return [calling_turn(calls)]
    callable_tools = [tool for tool in toolbox.tools.values() if not tool.ends]
    if callable_tools and cfg.max_turns > 1:
        tool = callable_tools[0]
        turns.append(assistant_turn("", tool.name, guess_arguments(tool, example)))
    ending_tools = [tool for tool in toolbox.tools.values() if tool.ends]
    if ending_tools:
        tool = ending_tools[0]
        arguments = guess_arguments(tool, example)
        gold = example["answer"]
        gold = gold[0] if isinstance(gold, list) else gold
        for name in list(arguments)[:1]:
            arguments[name] = gold
        turns.append(assistant_turn("", tool.name, arguments))
    # behind an answer by a call it is not asked for
    return [*turns, assistant_turn(right_answer(cfg, rewards, example))]


def right_answer(cfg, rewards: list[str], example: dict) -> str:
    """Writes a last message that the first reward which knows one finds right. To rewards of the
    user's own it is the gold answer, in the way that the prompt asks for."""
    prompt = cfg.system_prompt + cfg.prompt_template
    for name in rewards:
        text = reward_functions.oracle(name, example)
        if text and "<answer>" in prompt and text.startswith("\\boxed{"):
            text = text.removeprefix("\\boxed{").removesuffix("}")
            return f"<answer>{text}</answer>"
        if text:
            return text
    gold = example["answer"]
    gold = gold[0] if isinstance(gold, list) else gold
    if not gold or rewards[0] == "code_tests":  # whose answer is the tests
        return NO_ORACLE
    if "<answer>" in prompt:
        return f"<answer>{gold}</answer>"
    return f"\\boxed{{{gold}}}" if "\\boxed" in prompt else gold


def assistant_turn(text: str, tool: str = "", arguments: dict | None = None) -> dict:
    """Writes an assistant message, with a call if a tool is named."""
    if tool:
        return calling_turn([{tool: arguments}], text)
    return {"role": "assistant", "content": text}


def calling_turn(calls: list[dict], text: str = "") -> dict:
    """Writes an assistant message with calls, each {name: arguments}."""
    tool_calls = []
    for call in calls:
        for name, arguments in call.items():
            function = {"name": name, "arguments": arguments}
            tool_calls.append({"type": "function", "function": function})
    return {"role": "assistant", "content": text, "tool_calls": tool_calls}


def guess_arguments(tool, example: dict) -> dict:
    """Makes up what the tool needs to be called."""
    schema = tool.schema["function"]["parameters"]
    properties = schema["properties"]
    required = schema.get("required", [])
    return {name: guess_value(name, properties.get(name, {}), example) for name in required}


def guess_value(name: str, schema: dict, example: dict):
    """Makes up a value for an argument of a call that is only there to be seen."""
    if name in SEEN:
        return SEEN[name]
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0]
    by_type = {"integer": 1, "number": 1.0, "boolean": True, "array": [], "object": {}}
    if kind in by_type:
        return by_type[kind]
    if name == "code":
        return "print(6 * 7)"
    if name == "command":
        return "echo 42"
    if name == "query" and "database" in example:
        return example["answer"]
    questions = [m["content"] for m in example["messages"] if m["role"] == "user"]
    return questions[-1] if questions else ""


def next_said(said: list[list[int]]) -> list[int]:
    """Takes the next turn; the last one is said again and again, where an environment's user goes
    on asking."""
    return said.pop(0) if len(said) > 1 else said[0]


def sampled_turns(chat: Chat, example: dict, turns: list[dict]) -> list[list[int]]:
    """Encodes each turn as the token ids that a model would sample."""
    messages = list(example["messages"])
    for number, turn in enumerate(turns, 1):
        messages.append(turn)
        calls = calls_of(turn)
        for call in calls:
            messages.append({"role": "tool", "name": call.name, "content": "…"})
        if not calls and number < len(turns):  # an environment's user speaks in between
            messages.append({"role": "user", "content": "…"})
    ids, mask = chat.render(messages, chat.pictures(example))
    starts = turn_starts(mask)
    ends = [*starts[1:], len(ids)]
    sampled = []
    for start, end in zip(starts, ends, strict=True):
        sampled.append([ids[i] for i in range(start, end) if mask[i]])
    return sampled


def turn_starts(mask: list[int]) -> list[int]:
    """Finds where the turns begin."""
    return [i for i, is_trained in enumerate(mask) if is_trained and not mask[i - 1]]


# ---- what stands below the rollout


def doubts(trajectory: Trajectory, outcome: str) -> list[str]:
    """Lists what a reader of the rollout should not miss."""
    notes = []
    for call in trajectory.calls:
        if call.error:
            notes.append(f"tool: {call.name} failed ({call.error}): {call.result[:200]}")
    if trajectory.stop != "answered":
        notes.append(f"stop: {trajectory.stop}, not answered: raise that limit")
    value = trajectory.rewards.get(outcome)
    text = trajectory.answer or trajectory.messages[-1].get("content")
    if text == NO_ORACLE:
        notes.append(f"reward: {outcome} gives {value} to {text!r}: the row has no right answer")
    elif value is None or value < 1:
        notes.append(f"reward: {outcome} gives {value} to what should be a right answer, {text!r}")
    return notes


def tell_notes(notes: list[str]) -> None:
    """Prints them, without what a terminal obeys: they quote tools and rows."""
    for note in notes:
        print(escaped(note))


def lengths(trajectory: Trajectory, cfg) -> str:
    """Compares lengths with their limits, in tokens of the model's own tokenizer or one that is
    made as the tiny model's is."""
    ends = [*trajectory.turn_starts[1:], len(trajectory.ids)]
    turns = zip(trajectory.turn_starts, ends, strict=True)
    longest = max(sum(trajectory.mask[start:end]) for start, end in turns)
    return (
        f"length: prompt {trajectory.turn_starts[0]}, longest turn {longest} of max_new_tokens = "
        f"{cfg.max_new_tokens}, all {len(trajectory.ids)} of max_tokens = {cfg.max_tokens}"
    )


def main(argv: list[str]) -> None:
    mine, others = config.split(argv, Config.__dataclass_fields__)
    given = config.parse(Config, mine, check)
    if "--prompt=" in mine:  # as a shell writes an empty variable: a row would be played
        raise UserError("prompt is empty: write a question, or drop it to play a row")
    if given.demonstration:
        show_demonstration(config.parse(train_sft.Config, others, train_sft.check))
    elif given.made_up:
        play_made_up(config.parse(train_grpo.Config, others, train_grpo.check))
    else:
        cfg = load_config(others, given)
        if given.chat:
            talk(cfg)
        elif given.group:
            play_group(cfg, given)
        else:
            play_model(cfg, given)


if __name__ == "__main__":
    config.main(main)

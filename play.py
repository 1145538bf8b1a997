"""What --dry_run=true does: plays one made-up rollout of a config, without its model or a download.

    python train_grpo.py --config gsm8k.py --dry_run=true
    python train_grpo.py --config nq_search.py --dry_run=true --data=nq.jsonl --answer_column=answer
    python train_sft.py --config calc_sft.py --dry_run=true

A row is loaded, its prompt rendered, and an oracle plays it through the scripted engine: calls a
tool, then says the right answer. Tools and rewards are the real ones. What is printed is what
training would see: trained tokens green, context grey, what a tool said yellow. Below it stands
what could not be checked here, and what looks wrong.

The row is the first of the data. Where that would have to be downloaded, it is the one that
configs/samples.jsonl has for the data set, written by us with the columns of the original. Where
the model is not on this machine, a stand-in tokenizer takes the place of its own.
"""

import dataclasses
import json
import sqlite3
import tempfile
from pathlib import Path

from run import config

if __name__ == "__main__":
    config.answer_help(__file__, "train_grpo.py", keys=config.ROLLOUT_KEYS)

import data
import rewards as reward_functions
from chat import Chat
from engines.scripted import ScriptedEngine
from formats.messages import calls_of
from player import check_prompt, running, setup, task
from rollout import Settings, rollouts
from run import config
from run.config import UserError
from run.loop import run_blocking
from tasks import tiny as tiny_model
from tools import Toolbox
from trajectory import Trajectory, show

SAMPLES = config.HERE / "configs" / "samples.jsonl"
STAND_IN_FORMATS = ("auto", "llama3", "mistral", "qwen_xml")  # need the model's own template
NO_ORACLE = "I do not know."  # the answer where no reward says what a right one is


def grpo(cfg) -> Trajectory:
    """Plays and prints one rollout of train_grpo's Config; UserError for what the config gets
    wrong."""
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        cfg = _with_data(cfg, folder, notes)
        toolbox, selected, rows = task(cfg, limit=1)
        example, turns = rows[0], _oracle(cfg, rows[0], toolbox, list(selected))
        conversation = example["messages"] + turns
        tokenizer, cfg = _tokenizer(cfg, [conversation], toolbox.schemas, notes)
        chat = Chat(tokenizer, cfg.format, toolbox.schemas, cfg.template_options)
        check_prompt(chat, example, cfg.max_tokens)
        engine = ScriptedEngine(_sampled(chat, example["messages"], turns), tokenizer)
        trajectory = run_blocking(_play(example, chat, engine, toolbox, Settings.of(cfg), selected))
    show(trajectory, tokenizer)
    notes += _doubts(trajectory, list(selected))
    if cfg.data.startswith("task:") or not any(note.startswith("model:") for note in notes):
        notes.append(_length(trajectory, cfg))
    print(*notes, sep="\n")
    return trajectory


async def _play(example, chat, engine, toolbox, settings, selected) -> Trajectory:
    try:
        return (await rollouts([example], chat, engine, toolbox, settings, rewards=selected))[0]
    finally:
        await toolbox.close()


def sft(cfg) -> Trajectory:
    """Renders and prints the first row of train_sft's Config, as it would be trained on."""
    import train_sft

    notes = []
    with tempfile.TemporaryDirectory() as folder:
        cfg = _with_data(cfg, folder, notes)
        rows = data.conversations(cfg.data, min(cfg.rows or 64, 64), cfg.seed, cfg.system_prompt)
    toolbox = Toolbox(cfg.tools, describe_only=True)
    rows = data.rewarded(rows, cfg.min_reward, cfg.data)
    talks = [row["messages"] for row in rows if "messages" in row]
    tokenizer, cfg = _tokenizer(cfg, talks, toolbox.schemas, notes)
    if not talks and notes:
        raise UserError(f"the rows of {cfg.data} are token ids of {cfg.model}, which is not here")
    row = rows[:1]
    chat = cfg.format, toolbox.schemas, cfg.data, cfg.template_options
    ids, mask = train_sft.render(row, tokenizer, *chat)[0]
    trajectory = Trajectory(row[0], messages=row[0].get("messages", []), stop="answered")
    for i, bit in enumerate(mask):
        trajectory.add(ids[i : i + 1], bit, [0.0] if bit else None)
    trajectory.turn_starts = _starts(mask)
    show(trajectory, tokenizer)
    cut = f"max_tokens = {cfg.max_tokens}: this row has {len(ids)} tokens and would be cut"
    notes += [cut] * (len(ids) > cfg.max_tokens)
    print(*notes, sep="\n")
    return trajectory


def _with_data(cfg, folder: str, notes: list[str]):
    """The config with rows that are on this machine."""
    here = cfg.data.startswith("task:") or Path(cfg.data).expanduser().exists()
    if here:
        return cfg
    samples = [json.loads(line) for line in SAMPLES.read_text(encoding="utf-8").splitlines()]
    found = [sample for sample in samples if sample["data"] == cfg.data]
    if not found:
        raise UserError(
            f"data = {cfg.data!r} is not on this machine, and a dry run downloads nothing: give a "
            "file with the same columns, --data=rows.jsonl"
        )
    notes.append(f"data: the row is our own, with the columns of {cfg.data}")
    path = Path(folder) / "row.jsonl"
    path.write_text(json.dumps(found[0]["row"]) + "\n", encoding="utf-8")
    changed = {"data": str(path)}
    if "tables" in found[0]:
        changed["database"] = str(Path(folder) / "sample.sqlite")
        with sqlite3.connect(changed["database"]) as file:
            file.executescript(found[0]["tables"])
        file.close()
    return dataclasses.replace(cfg, **changed)


def _tokenizer(cfg, conversations: list, schemas: list[dict], notes: list[str]):
    """(the model's tokenizer if it is on this machine, else one made here, the config for it)."""
    from transformers import AutoTokenizer

    if cfg.model != "tiny":
        try:
            return AutoTokenizer.from_pretrained(cfg.model, local_files_only=True), cfg
        except (OSError, ValueError):
            what = "a stand-in tokenizer is used, and its chat template was not proved"
            notes.append(f"model: {cfg.model} is not on this machine: {what}")
    if cfg.template_options:
        notes.append("template_options: not checked, they are of the model's own template")
        cfg = dataclasses.replace(cfg, template_options=())
    if cfg.format in STAND_IN_FORMATS:
        notes.append(f"format: {cfg.format} needs the model's own template: hermes is shown")
        cfg = dataclasses.replace(cfg, format="hermes")
    if cfg.data.startswith("task:"):  # as train_sft.py makes that of a tiny model
        rows = data.conversations(cfg.data, 2048, 0, cfg.system_prompt)
        conversations = [row["messages"] for row in rows]
        # with whole names, as most tasks have them: here it is only to be short
        return tiny_model.tiny_tokenizer(conversations, schemas, whole_names=True), cfg
    plain = [[_plain(message) for message in talk] for talk in conversations]
    return tiny_model.tiny_tokenizer(plain, schemas), cfg


def _plain(message: dict) -> dict:
    """A message as the stand-in's template takes it."""
    text = message.get("content") or ""
    if isinstance(text, list):
        text = "".join(part.get("text", "") for part in text)
    return {"role": message["role"], "content": text}


def _oracle(cfg, example: dict, toolbox: Toolbox, names: list[str]) -> list[dict]:
    """The assistant turns of a rollout that does it right, as far as anybody here can know."""
    if cfg.data.startswith("task:") and (turns := data.oracle(cfg.data, example)):
        return turns
    answer = next((text for name in names if (text := _answer(cfg, name, example))), NO_ORACLE)
    turns = []
    callable_ = [tool for tool in toolbox.tools.values() if not tool.ends]
    if callable_ and cfg.max_turns > 1:
        turns = [_say("", callable_[0].name, _arguments(callable_[0], example))]
    if enders := [tool for tool in toolbox.tools.values() if tool.ends]:
        arguments = _arguments(enders[0], example)
        gold = example["answer"]
        gold = gold[0] if isinstance(gold, list) else gold
        arguments |= dict.fromkeys(list(arguments)[:1], gold)
        turns.append(_say("", enders[0].name, arguments))
    return [*turns, _say(answer)]  # behind an answer by a call it is not asked for


def _answer(cfg, name: str, example: dict) -> str | None:
    """A last message that the reward of this name is to find right."""
    text = reward_functions.oracle(name, example)
    prompt = cfg.system_prompt + cfg.prompt_template
    boxed = "\\boxed{"
    if text and "<answer>" in prompt and text.startswith(boxed):
        return "<answer>" + text.removeprefix(boxed).removesuffix("}") + "</answer>"
    return text


def _say(text: str, name: str = "", arguments: dict | None = None) -> dict:
    message = {"role": "assistant", "content": text}
    if name:
        function = {"name": name, "arguments": arguments}
        message["tool_calls"] = [{"type": "function", "function": function}]
    return message


def _arguments(tool, example: dict) -> dict:
    """What the tool needs to be called."""
    schema = tool.schema["function"]["parameters"]
    needed = schema.get("required", [])
    return {name: _guess(name, schema["properties"].get(name, {}), example) for name in needed}


def _guess(name: str, schema: dict, example: dict):
    """A value for an argument of a call that is only there to be seen."""
    users = [message["content"] for message in example["messages"] if message["role"] == "user"]
    kind, said = schema.get("type"), (users or [""])[-1]
    kind = kind[0] if isinstance(kind, list) else kind
    known = {"code": "print(6 * 7)", "command": "echo 42", "query": said}
    if "database" in example and name == "query":
        known["query"] = example["answer"]
    if "enum" in schema:
        return schema["enum"][0]
    plain = {"integer": 1, "number": 1.0, "boolean": True, "array": [], "object": {}}
    return plain.get(kind, known.get(name, said))


def _sampled(chat: Chat, prompt: list[dict], turns: list[dict]) -> list[list[int]]:
    """The token ids of each turn, as a model would sample them."""
    messages = list(prompt)
    for turn in turns:
        called = [call.name for call in calls_of(turn)]
        messages += [turn, *({"role": "tool", "name": name, "content": "…"} for name in called)]
    ids, mask = chat.render(messages)
    starts = _starts(mask)
    parts = zip(starts, [*starts[1:], len(ids)], strict=True)
    return [[ids[i] for i in range(first, end) if mask[i]] for first, end in parts]


def _starts(mask: list[int]) -> list[int]:
    """Where the turns begin."""
    return [i for i, bit in enumerate(mask) if bit and not mask[i - 1]]


def _doubts(trajectory: Trajectory, names: list[str]) -> list[str]:
    """What a reader of the rollout should not miss."""
    found = [
        f"tool: {call.name} failed ({call.error}): {call.result[:200]}"
        for call in trajectory.calls
        if call.error
    ]
    if trajectory.stop != "answered":
        found.append(f"stop: {trajectory.stop}, not answered: raise that limit")
    value = trajectory.rewards.get(names[0])
    if value is None or value < 1:
        found.append(f"reward: {names[0]} gives {value} to what should be a right answer")
    return found


def _length(trajectory: Trajectory, cfg) -> str:
    """Tokens, by the model's own tokenizer or one that is made as the tiny model's is."""
    ends = [*trajectory.turn_starts[1:], len(trajectory.ids)]
    turns = zip(trajectory.turn_starts, ends, strict=True)
    longest = max(sum(trajectory.mask[start:end]) for start, end in turns)
    return (
        f"length: prompt {trajectory.turn_starts[0]}, longest turn {longest} of max_new_tokens = "
        f"{cfg.max_new_tokens}, all {len(trajectory.ids)} of max_tokens = {cfg.max_tokens}"
    )


def main(argv: list[str]) -> None:
    import train_grpo

    cfg = config.parse(train_grpo.Config, argv, train_grpo.check, keys=config.ROLLOUT_KEYS)
    policy, tokenizer, chat, toolbox, selected, rows = setup(cfg, "none", limit=1)
    with running(cfg, policy, tokenizer, toolbox) as engine:
        played = rollouts(rows, chat, engine, toolbox, Settings.of(cfg), rewards=selected)
        show(run_blocking(played)[0], tokenizer)


if __name__ == "__main__":
    config.main(main)

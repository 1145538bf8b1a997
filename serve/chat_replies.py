"""Writes what a trajectory says as answers of /v1/chat/completions, whole or as a stream.

A reply is the agent's last turn: its words, its thinking apart (reasoning_content), and the calls
of the client's own tools, which are for the client to run. The turns before it, with the calls of
the agent's tools and what they gave, stand beside it under `agent_turns`. A client that sends its
messages back as they came gives the model all of the conversation; one that leaves this key out
gives it the words alone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from chat import Chat, flat_text, words_before
from formats import Call
from formats.base import split_thought
from formats.messages import assistant_message
from images import to_data_uri
from serve.chat_requests import TURNS
from trajectory import ToolCall, Trajectory


@dataclass
class Reply:
    """What a trajectory says to the client."""

    content: str
    thought: str
    tool_calls: list[dict]  # of the client's tools, in OpenAI form
    earlier: list[dict]  # the turns before, in OpenAI form
    finish: str  # "stop" "length" "tool_calls"
    stop: str  # how the trajectory ended, in the words of trajectory.py


def reply_of(
    trajectory: Trajectory, chat: Chat, own_tools: Sequence[str], stop: list[str], name: str
) -> Reply:
    """Makes the reply. own_tools: names of the client's. stop: texts before which its words end.
    name: what the ids of calls begin with, of this trajectory alone."""
    # 1. the last turn, and what was before it
    messages = openai_form(trajectory, name)
    last = None
    if messages and messages[-1]["role"] == "assistant":
        last = messages.pop()
    text = flat_text(last["content"]) if last else ""

    # 2. the calls that are for the client; others of that turn were answered here
    calls = []
    if trajectory.stop == "answered":
        calls = calls_of_last_turn(trajectory)
    handed_out = [call for call in calls if call.ends and call.name in own_tools]
    if handed_out:
        if not last.get("tool_calls"):  # they stand in the text of the turn
            text = words_before(text, chat.format.parse(text))
        others = [call for call in calls if call not in handed_out and call.arguments is not None]
        messages += as_turn(others, f"{name}_x")
    elif trajectory.answer is not None:  # given to a tool that ends the episode
        text = trajectory.answer

    # 3. its words
    thought, words = split_thought(text)
    content, was_cut = cut_at(words, stop)
    if was_cut:
        handed_out = []  # they stand behind the words
    finish = "length"
    if handed_out:
        finish = "tool_calls"
    elif was_cut or trajectory.stop == "answered":
        finish = "stop"
    tool_calls = [
        openai_call(call.name, call.arguments, f"{name}_{number}")
        for number, call in enumerate(handed_out)
    ]
    return Reply(content, thought or "", tool_calls, messages, finish, trajectory.stop)


def calls_of_last_turn(trajectory: Trajectory) -> list[ToolCall]:
    last = len(trajectory.turn_starts) - 1
    return [call for call in trajectory.calls if call.turn == last]


def cut_at(text: str, stop: list[str]) -> tuple[str, bool]:
    """Cuts a text before the first of the `stop` texts -> it, and whether there was one."""
    found = [text.find(each) for each in stop if each in text]
    return (text[: min(found)], True) if found else (text, False)


# ---- messages in OpenAI form


def openai_form(trajectory: Trajectory, name: str) -> list[dict]:
    """Writes the messages behind the prompt: calls and results have ids, arguments are JSON, an
    image is a data URI."""
    prompt = len(trajectory.example["messages"])
    pictures = list(trajectory.images)
    for message in trajectory.messages[:prompt]:
        del pictures[: images_in(message)]
    written = []
    number = 0  # of the call
    waiting = []  # ids of the calls that have no result yet
    for message in trajectory.messages[prompt:]:
        new = dict(message)
        if message.get("tool_calls"):
            new["tool_calls"] = []
            waiting = []
            for entry in message["tool_calls"]:
                function = entry["function"]
                waiting.append(f"{name}_t{number}")
                call = openai_call(function["name"], function["arguments"], waiting[-1])
                new["tool_calls"].append(call)
                number += 1
        elif message["role"] == "tool" and waiting:
            new["tool_call_id"] = waiting.pop(0)
        if isinstance(message["content"], list):
            new["content"] = [as_url(part, pictures) for part in message["content"]]
        written.append(new)
    return written


def images_in(message: dict) -> int:
    content = message["content"]
    return sum(part["type"] == "image" for part in content) if isinstance(content, list) else 0


def as_url(part: dict, pictures: list) -> dict:
    """Writes a content part; an image, which is the next of the pictures, as the model saw it."""
    if part["type"] != "image":
        return part
    return {"type": "image_url", "image_url": {"url": to_data_uri(pictures.pop(0).shown)}}


def openai_call(name: str, arguments: dict, id: str) -> dict:
    text = json.dumps(arguments, ensure_ascii=False)
    return {"id": id, "type": "function", "function": {"name": name, "arguments": text}}


def as_turn(calls: list[ToolCall], name: str) -> list[dict]:
    """Writes calls that were answered as a turn of their own, and their results."""
    if not calls:
        return []
    turn = assistant_message("", [Call(call.name, call.arguments) for call in calls])
    turn["tool_calls"] = []
    results = []
    for number, call in enumerate(calls):
        id = f"{name}{number}"
        turn["tool_calls"].append(openai_call(call.name, call.arguments, id))
        result = {"role": "tool", "name": call.name, "tool_call_id": id, "content": call.result}
        results.append(result)
    return [turn, *results]


# ---- answers


def usage_of(prompt: int, trajectories: list[Trajectory]) -> dict:
    """Counts tokens: those of the prompt, and those that were sampled, in all turns of all."""
    sampled = sum(trajectory.new_tokens for trajectory in trajectories)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
    }


def choice_of(reply: Reply, index: int) -> dict:
    """Writes a choice of a whole answer."""
    message = {"role": "assistant", "content": reply.content, "refusal": None}
    if reply.tool_calls:
        message["content"] = reply.content or None
        message["tool_calls"] = reply.tool_calls
    if reply.thought:
        message["reasoning_content"] = reply.thought
    if reply.earlier:
        message[TURNS] = reply.earlier
    return {
        "index": index,
        "message": message,
        "logprobs": None,
        "finish_reason": reply.finish,
        "agent_stop": reply.stop,
    }


def deltas_of(reply: Reply, told: int) -> list[dict]:
    """Writes what a stream still has to say of a reply; `told` of the turns before it are out."""
    deltas = []
    if reply.earlier[told:]:
        deltas.append(delta_of_turns(reply.earlier, told))
    if reply.thought:
        deltas.append({"reasoning_content": reply.thought})
    if reply.content:
        deltas.append({"content": reply.content})
    if reply.tool_calls:
        calls = [{"index": i, **call} for i, call in enumerate(reply.tool_calls)]
        deltas.append({"tool_calls": calls})
    return deltas


def delta_of_turns(turns: list[dict], told: int) -> dict:
    """Writes the turns that are not told yet, each with its place, as clients join them by."""
    new = [{"index": told + i, **turn} for i, turn in enumerate(turns[told:])]
    return {TURNS: new}

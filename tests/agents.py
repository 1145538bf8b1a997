"""An agent whose model is a script, served on 127.0.0.1: for the tests of serve/agent.py."""

import asyncio
import json
import re
from contextlib import contextmanager

import uvicorn

from chat import Chat
from engines.scripted import ScriptedEngine
from player import ASKED, Player
from rollout import Settings
from run.loop import Running
from serve import agent, web
from tools import Toolbox

SYSTEM = {"role": "system", "content": "the user asks"}
FRAME = {
    "id": 0,
    "messages": [SYSTEM, {"role": "user", "content": ASKED}],
    "answer": "not known",
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: one
        b: another
    """
    return a + b


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Script:
    """What the model says: a function of the last message that it reads."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.prompts = []  # whole contexts that were read, as text
        self.samplings = []
        self.may_go_on = asyncio.Event()  # of the user's "wait"
        self.waiting = 0  # turns that wait for it

    async def __call__(self, ids, sampling):
        text = self.tokenizer.decode(ids)
        self.prompts.append(text)
        self.samplings.append(sampling)
        last = text.split("<|im_start|>")[-2].removesuffix("\n").removesuffix("<|im_end|>")
        said = await self.turn(last, sampling)
        ids = self.tokenizer.encode(said, add_special_tokens=False)
        return [*ids, self.tokenizer.eos_token_id]

    async def turn(self, last, sampling):
        if "<tool_response>" in last:
            results = re.findall("<tool_response>\n(.*?)\n</tool_response>", last, re.DOTALL)
            return f"the result is {' and '.join(results)}."
        asked = last.removeprefix("user\n")
        word, _, rest = asked.partition(" ")
        if word == "wait":
            self.waiting += 1
            try:
                await self.may_go_on.wait()
            finally:
                self.waiting -= 1
            return "done"
        if word == "sum":
            a, b = map(int, rest.split())
            return call("add", a=a, b=b)
        if word == "weather":
            return "let me look.\n" + call("get_weather", city=rest)
        if word == "both":
            return call("add", a=1, b=2) + "\n" + call("get_weather", city=rest)
        if word == "odd":
            return call("get_weather", town=rest)
        if word == "noise":
            return str(sampling.seed)
        if word == "think":
            return f"<think>\nso so\n</think>\n\n{rest}"
        return rest or "hello"


def scripted_player(tokenizer, tools=(add,), vision=None, **settings):
    """A Player that is asked, and its Script."""
    box = Toolbox(list(tools))
    chat = Chat(tokenizer, "hermes", box.schemas, vision=vision)
    script = Script(tokenizer)
    engine = ScriptedEngine(script, tokenizer)
    settings = Settings(**{"temperature": 0.0, "max_tokens": 2048} | settings)
    player = Player(chat, engine, box, {}, settings, examples=[FRAME], is_asked=True)
    return player, script


@contextmanager
def serving(player, **keys):
    """The address of a server of that player."""
    cfg = agent.Config(port=0, **keys)
    listening = web.listen(cfg.host, 0)
    with player:
        server = uvicorn.Server(web.settings(agent.application(cfg, player, "calc")))
        running = Running(server.serve(sockets=[listening]))
        try:
            yield web.address(listening)
        finally:
            server.should_exit = True
            running.result()

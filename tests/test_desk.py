"""The help desk: its customer tells what is asked, its reward is the final database.

    pytest tests/test_desk.py

tests/test_tasks.py has what holds for the other tasks.
"""

import asyncio
import threading

import pytest
from ports import free_port

import rewards as reward_functions
import train_grpo
from chat import Chat
from dev.stand_in import Served, Server, handler_of
from engines.scripted import ScriptedEngine
from learning import model as models
from play import sampled_turns
from player import Player
from rollout import Settings, rollouts
from run.config import UserError
from tasks import desk, tiny
from tasks.desk import Desk, Said, words
from tools import Toolbox

REWARDS = reward_functions.select(("environment",))


def example(row, number=0):
    prompt = {"role": "user", "content": row["prompt"]}
    return {**row, "id": number, "messages": [prompt], "answer": ""}


@pytest.fixture(scope="module")
def chat():
    schemas = Toolbox([Desk]).schemas
    tokenizer = tiny.tiny_tokenizer(desk.demos(256), schemas, whole_names=True)
    return Chat(tokenizer, "hermes", schemas)


def play(chat, rows, turns_of):
    """A trajectory of each row, in which the model says turns_of(row)."""
    examples = [example(row, number) for number, row in enumerate(rows)]
    scripts = {}
    for number, given in enumerate(examples):
        scripts[number] = sampled_turns(chat, given, turns_of(given))

    async def one(given):
        engine = ScriptedEngine(scripts[given["id"]], chat.tokenizer)
        played = await rollouts(
            [given], chat, engine, Toolbox([Desk]), Settings(max_turns=8), rewards=REWARDS
        )
        return played[0]

    async def every():
        return await asyncio.gather(*map(one, examples))

    return asyncio.run(every())


def test_rows_are_always_the_same_for_a_seed_and_others_for_another():
    assert desk.rows("test", 0, 50) == desk.rows("test", 0, 50) != desk.rows("test", 1, 50)
    assert desk.demos(50, 0) == desk.demos(50, 0) != desk.demos(50, 1)
    assert len(desk.rows("test")) == 512
    with pytest.raises(UserError, match="has train and test"):
        desk.rows("tset")


def test_no_held_out_customer_calls_or_is_named_in_training():
    held_out = {row["customer"] for row in desk.rows("test")}
    assert held_out.isdisjoint(row["customer"] for row in desk.rows("train"))
    asked = [demo for demo in desk.demos(2000) if not demo[0]["content"].startswith("Repeat")]
    shown = "\n".join(message["content"] for demo in asked for message in demo)
    assert not [name for name in held_out if name in shown]


def test_the_oracle_is_right_and_no_clerk_who_does_nothing_is(chat):
    rows = desk.rows("test", 0, 40)
    for t in play(chat, rows, desk.oracle):
        assert (t.stop, t.reward, t.metrics) == ("answered", 1.0, {"changed": 1.0})
        assert [call.error for call in t.calls] == [None, None] and len(t.user_turns) == 2
    for t in play(chat, rows, lambda row: [words(desk.DONE)]):
        assert (t.stop, t.reward, t.metrics) == ("answered", 0.0, {"changed": 0.0})


def test_what_else_is_changed_costs_the_reward(chat):
    def too_much(row):
        *turns, last = desk.oracle(row)
        other = next(code for code in desk.orders() if code != desk.code_of(row["customer"]))
        return [*turns, desk.action("cancel", other, ""), last]

    for t in play(chat, desk.rows("test", 0, 10), too_much):
        assert (t.reward, t.metrics) == (0.0, {"changed": 2.0})


def test_the_customer_tells_a_name_and_a_wish_only_when_asked():
    row = desk.rows("test", 0, 1)[0]
    customer = Desk(row)

    def says(text):
        return customer.user(Said([words(text)]))

    assert row["customer"] not in row["prompt"]
    assert says("Which order is it?") == "Please help me."
    assert says("May I have your name?") == f"I am {row['customer']}."
    assert says("What shall I do?") == row["said"]
    assert says("Hm.") == "Please help me." and says("Hm.") is None  # there is an end to patience
    assert Desk(row).user(Said([words(desk.DONE)])) is None


def test_demonstrations_show_what_the_desk_says_and_are_often_wrong(chat):
    rewards = []
    for number in range(120):
        row = desk.problem(desk.random.Random(number), "train")
        turns = desk.clerk(desk.random.Random(number), row)
        (t,) = play(chat, [row], lambda _, turns=turns: turns)
        assert t.messages == desk.talk(row, turns)
        rewards.append(t.reward)
    assert 0.2 < sum(rewards) / len(rewards) < 0.6


def test_the_database_of_a_trajectory_is_its_own():
    before = desk.fresh()
    one = Desk(desk.rows("test", 0, 1)[0])
    code = next(iter(before))
    assert one.cancel(code) == f"Order {code} has state cancelled."
    assert desk.fresh() == before == Desk(desk.rows("test", 0, 1)[0]).orders != one.orders
    assert one.cancel("Heron") == "There is no order Heron."
    assert one.find("Nobody") == "Nobody has no order."


def test_over_http_the_user_speaks_and_masks_are_those_of_an_engine_here(chat, tmp_path):
    """engine=server, against dev/stand_in.py, whose model says what the oracle says."""
    row = desk.rows("test")[0]
    given = example(row)
    turns = sampled_turns(chat, given, desk.oracle(given))

    def next_turn(ids, sampling):
        return turns[chat.tokenizer.decode(ids).count("<|im_start|>assistant") - 1]

    folder = str(tmp_path / "model")
    models.save(tiny.tiny(chat.tokenizer, layers=1, hidden_size=32), chat.tokenizer, folder)
    served = Served(folder, is_batched=True)
    served.engine.generate = ScriptedEngine(next_turn, chat.tokenizer).generate
    server = Server(("127.0.0.1", free_port()), handler_of(served))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    cfg = train_grpo.Config(
        data="task:desk",
        split="test",
        limit=1,
        tools=("tasks/desk.py:Desk",),
        rewards=("environment",),
        model=folder,
        engine="server",
        urls=(address,),
        max_turns=8,
        max_tokens=384,
    )
    with Player.of(cfg) as player:
        played = player.play(player.examples, samples=3)
    server.shutdown()
    server.server_close()
    (expected,) = play(chat, [row], desk.oracle)
    for t in played:
        assert (t.stop, t.reward, t.images) == ("answered", 1.0, [])
        assert (t.ids, t.mask, t.messages) == (expected.ids, expected.mask, expected.messages)
        assert len(t.user_turns) == 2 and sum(t.mask) == sum(map(len, turns))

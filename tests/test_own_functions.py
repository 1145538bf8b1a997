"""Rows that bring functions of their own: shown, called, recorded, and run by nobody.

    pytest tests/test_own_functions.py

Pinned here: whose functions a prompt shows; that the turn which calls them is the last one, with
all its calls and an exact mask; what does not fit or is not there is told; the same behind an API
and in SFT; and which schemas are refused when the rows are read.
"""

import asyncio
import json
import random
from pathlib import Path

import pytest
from test_endpoint import api, say  # noqa: F401
from test_formats import chat_of
from test_rollout import EXAMPLE, STOP, add, call, encode, sampled, stage

import data
import rewards
import train_grpo
import train_sft
from chat import Chat
from engines.chat_api import Endpoint
from evaluate import play_api_turn
from formats import Call
from formats.messages import assistant_message
from grading.statistics import majority
from learning import model as models
from player import chats_of_rows, check_prompts
from rewards import answer
from rollout import Settings, rollouts
from run.config import UserError
from run.log import write_rollouts
from run.loop import run_blocking
from tasks import tiny
from tools import Toolbox


def function(name, required=("city",), **properties):
    """A schema; properties: name=type."""
    properties = properties or {"city": "string"}
    parameters = {
        "type": "object",
        "properties": {name: {"type": kind} for name, kind in properties.items()},
        "required": list(required),
    }
    described = {"name": name, "description": f"Does {name}.", "parameters": parameters}
    return {"type": "function", "function": described}


WEATHER = function("weather")
LAMP = function("lamp", ["room", "on"], room="string", on="boolean", level="integer")
ROW = EXAMPLE | {
    "tools": [WEATHER, LAMP],
    "ground_truth": [{"lamp": {"room": ["hall"], "on": [True], "level": ["", 5]}}],
}
TWO = [{"weather": {"city": ["Bern"]}}, {"weather": {"city": ["Basel"]}}]
BERN = call("weather", '{"city": "Bern"}')
BASEL = call("weather", '{"city": "Basel"}')
HALL = call("lamp", '{"room": "hall", "on": true}')
WRONG = call("lamp", '{"room": "hall", "on": "yes"}')


def played(tokenizer, turns, row=ROW, functions=(), samples=1, **settings):
    chat, engine, box = stage(tokenizer, turns, functions=functions)
    selected = rewards.select(("call_match",))
    how = Settings(**settings)
    return asyncio.run(
        rollouts([row], chat, engine, box, how, rewards=selected, samples=samples)
    ), box


def prompt_of(t, tokenizer):
    return tokenizer.decode(t.ids[: t.turn_starts[0]])


def test_a_call_ends_the_rollout_with_its_turn_and_an_exact_mask(tokenizer):
    """Pitfalls 1, 3 and 13: nothing stands behind what was sampled, its stop token included."""
    said = encode(tokenizer, HALL + STOP)
    (t,), box = played(tokenizer, [said])
    assert (t.stop, t.reward) == ("answered", 1.0)
    assert t.ids[t.turn_starts[0] :] == said and sampled(t) == said
    assert [(c.name, c.arguments, c.error, c.ends) for c in t.calls] == [
        ("lamp", {"room": "hall", "on": True}, None, True)
    ]
    assert json.loads(t.answer) == {"lamp": {"room": "hall", "on": True}}
    assert not box.errors
    prompt = prompt_of(t, tokenizer)
    assert json.dumps(WEATHER) in prompt and json.dumps(LAMP) in prompt


def test_all_calls_of_the_turn_are_recorded_and_no_turn_follows(tokenizer):
    row = ROW | {"ground_truth": TWO}
    (t,), _ = played(tokenizer, [BASEL + "\n" + BERN + STOP], row)
    assert [c.arguments["city"] for c in t.calls] == ["Basel", "Bern"]
    assert (t.stop, t.reward, len(t.turn_starts)) == ("answered", 1.0, 1)
    assert t.answer == '{"weather": {"city": "Basel"}}\n{"weather": {"city": "Bern"}}'


def test_a_call_that_does_not_fit_is_told_and_may_be_made_again(tokenizer):
    (t,), box = played(tokenizer, [WRONG + STOP, HALL + STOP])
    assert [c.error for c in t.calls] == ["bad_arguments", None]
    assert "on must be boolean" in t.calls[0].result
    assert (t.stop, t.reward) == ("answered", 1.0) and box.errors == {"bad_arguments": 1}
    assert sum(t.mask) == len(encode(tokenizer, WRONG + STOP)) + len(encode(tokenizer, HALL + STOP))


def test_in_the_only_turn_a_call_that_does_not_fit_is_recorded_all_the_same(tokenizer):
    (t,), _ = played(tokenizer, [WRONG + STOP], max_turns=1)
    assert (t.stop, t.reward) == ("max_turns", 0.0)
    # or is right, where what is accepted is not what the schema says
    row = ROW | {"ground_truth": [{"lamp": {"room": ["hall"], "on": ["yes"]}}]}
    both = [WRONG + "\n" + HALL + STOP]
    (t,), _ = played(tokenizer, both, row, max_turns=1)
    assert [c.error for c in t.calls] == ["bad_arguments", None] and t.reward == 0.0
    (t,), _ = played(tokenizer, [WRONG + STOP], row, max_turns=1)
    assert (t.reward, [c.error for c in t.calls]) == (1.0, ["bad_arguments"])


def test_a_function_that_the_row_does_not_have_is_unknown(tokenizer):
    (t,), box = played(tokenizer, [call("sun", "{}") + STOP, HALL + STOP])
    assert t.calls[0].error == "unknown_tool" and box.errors == {"unknown_tool": 1}
    told = "error: there is no tool 'sun'; the tools are: weather(city: string), lamp("
    assert t.calls[0].result.startswith(told)
    assert t.reward == 1.0
    (t,), _ = played(tokenizer, [call("sun", "{}") + STOP], max_turns=1)
    assert (t.stop, t.reward) == ("max_turns", 0.0)


def test_whoever_calls_nothing_is_right_only_where_no_call_is(tokenizer):
    for ground_truth, reward in (([], 1.0), ("any", 0.0), (TWO, 0.0)):
        (t,), _ = played(tokenizer, ["I cannot." + STOP], ROW | {"ground_truth": ground_truth})
        assert (t.stop, t.reward) == ("answered", reward)
    (t,), _ = played(tokenizer, [HALL + STOP], ROW | {"ground_truth": []})
    assert t.reward == 0.0
    (t,), _ = played(tokenizer, [HALL + STOP], ROW | {"ground_truth": "any"})
    assert t.reward == 1.0


def test_tools_of_the_run_are_called_before_if_the_row_names_them(tokenizer):
    turns = [call("add", '{"a": 2, "b": 3}') + STOP, HALL + STOP]
    (t,), _ = played(tokenizer, turns, ROW | {"tools": ["add", LAMP]}, functions=(add,))
    assert [(c.name, c.result) for c in t.calls][0] == ("add", "5")
    assert (t.stop, t.reward, len(t.turn_starts)) == ("answered", 1.0, 2)
    prompt = prompt_of(t, tokenizer)
    assert '"add"' in prompt and json.dumps(LAMP) in prompt and '"weather"' not in prompt
    (t,), _ = played(tokenizer, turns, ROW, functions=(add,))
    assert t.calls[0].error == "unknown_tool"  # only what the row has


def test_each_group_has_the_prompt_of_its_row(tokenizer):
    rows = [ROW | {"tools": [WEATHER]}, ROW | {"tools": [LAMP]}, EXAMPLE, ROW | {"tools": []}]
    chat, engine, box = stage(tokenizer, lambda *_: encode(tokenizer, "no" + STOP), functions=())
    done = asyncio.run(rollouts(rows, chat, engine, box, Settings(), samples=2))
    prompts = [prompt_of(t, tokenizer) for t in done]
    assert prompts[::2] == prompts[1::2]
    shown = [["weather" in prompt, "lamp" in prompt] for prompt in prompts[::2]]
    assert shown == [[True, False], [False, True], [False, False], [False, False]]


def test_votes_go_to_calls(tokenizer):
    """maj@k: two samples that make the same calls give the same answer."""
    texts = [HALL, BERN, HALL]
    answers = [answer(played(tokenizer, [text + STOP])[0][0], ROW) for text in texts]
    assert majority(answers, [1.0, 0.0, 1.0]) == 1.0
    assert majority([answers[1], *answers[1:]], [0.0, 0.0, 1.0]) == 0.0


# ---- templates


def test_a_template_is_proved_once_for_all_rows(tokenizer, monkeypatch):
    made = []

    class Counted(Chat):
        def __init__(self, tokenizer, format, tools=(), *others, **named):
            made.append(len(tools))
            super().__init__(tokenizer, format, tools, *others, **named)

    monkeypatch.setattr("chat.Chat", Counted)
    chat = Counted(tokenizer, "auto")
    rows = [ROW | {"id": i, "tools": [function(f"f{i}")]} for i in range(300)]
    check_prompts(chat, rows, 4096)
    assert made == [0, 1] and len(chat._for_rows) <= 256
    assert chat.for_row(rows[7]) is chat.for_row(rows[7])
    own = Chat(tokenizer, "hermes", rows[7]["tools"])
    assert chat.for_row(rows[7]).prompt(ROW["messages"]) == own.prompt(ROW["messages"])


@pytest.mark.parametrize("name", ["chatml", "llama", "qwen3_8", "mistral_v11"])
def test_format_auto_is_found_where_only_rows_have_tools(name):
    """Without tools nothing is known of how a template writes calls."""
    chat = chat_of(name, []).for_row(ROW)
    own = chat_of(name, ROW["tools"])
    assert chat.format_name == own.format_name and chat.stop_ids == own.stop_ids
    assert chat.prompt(ROW["messages"]) == own.prompt(ROW["messages"])


def test_turns_end_as_the_rows_template_says(tokenizer):
    chat = Chat(tokenizer, "auto")
    assert chats_of_rows(chat, [EXAMPLE]) == []
    (other,) = chats_of_rows(chat, [EXAMPLE, ROW, ROW])
    assert other.tools == ROW["tools"]
    assert chats_of_rows(Chat(tokenizer, "hermes", [WEATHER]), [ROW]) == []


# ---- behind an API


def asked_of(api, script, row=ROW, **settings):  # noqa: F811
    api.script = script
    box = Toolbox([])
    endpoint = Endpoint(api.url, "gpt", box.schemas, pause=0.01)
    selected = rewards.select(("call_match",))
    how = Settings(**settings)
    try:
        playing = rollouts(
            [row], endpoint, endpoint, box, how, rewards=selected, turn=play_api_turn
        )
        return run_blocking(playing)[0]
    finally:
        run_blocking(endpoint.close())


def test_an_api_is_told_of_the_functions_and_its_calls_end_the_rollout(api):  # noqa: F811
    calls = ("weather", '{"city": "Basel"}'), ("weather", '{"city": "Bern"}')
    t = asked_of(api, [say("", *calls)], ROW | {"ground_truth": TWO}, max_turns=1)
    assert (t.stop, t.reward, len(t.calls)) == ("answered", 1.0, 2)
    assert api.requests[0]["tools"] == ROW["tools"] and len(api.requests) == 1
    wrong = ("lamp", '{"room": "hall"}')
    right = ("lamp", '{"room": "hall", "on": true}')
    t = asked_of(api, [say("", wrong), say("", right)])
    assert [c.error for c in t.calls] == ["bad_arguments", None]
    assert (t.stop, t.reward) == ("answered", 1.0)
    t = asked_of(api, [say("", wrong)], max_turns=1)
    assert (t.stop, t.reward, t.calls[0].error) == ("max_turns", 0.0, "bad_arguments")


# ---- SFT


def test_sft_learns_from_such_rollouts_what_the_policy_wrote(tokenizer, tmp_path):
    """Pitfall 49: rendered again, without the ids, the prompt and the mask are the same."""
    both = BERN + "\n" + BASEL + STOP
    (t,), _ = played(tokenizer, [both], ROW | {"ground_truth": TWO})
    path = tmp_path / "rollouts.jsonl"
    write_rollouts(path, [t], tokenizer)
    for recorded in (True, False):
        rows = data.conversations(str(path), recorded=recorded)
        (sample,) = train_sft.render(rows, tokenizer, "hermes", [], "x")
        end = len(t.ids)  # a template writes a line break behind the stop token
        assert (sample.ids[:end], sample.mask[:end]) == (t.ids, t.mask)
        assert not any(sample.mask[end:])


# ---- what is refused when rows are read


def rows_of(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data.load(str(path), require_answer=False)


def test_functions_are_read_as_lists_or_text_with_or_without_their_wrapping(tmp_path):
    bare = WEATHER["function"]
    made = [[WEATHER], json.dumps([WEATHER]), [bare], ["add", bare]]
    rows = rows_of(tmp_path, *({"prompt": "x", "tools": tools} for tools in made))
    assert [row["tools"] for row in rows] == [[WEATHER]] * 3 + [["add", WEATHER]]
    (plain,) = rows_of(tmp_path, {"prompt": "x", "tools": [{"name": "now"}]})
    assert plain["tools"][0]["function"] == {
        "name": "now", "description": "", "parameters": {"type": "object", "properties": {}}
    }  # fmt: skip
    data.check_names(rows[:3], [], ["r"])


def with_parameters(**parameters):
    return {"name": "f", "parameters": parameters}


IMPOSSIBLE = [
    ({"name": "a.b"}, "the name of its function is 'a.b': expected 1 to 64 letters"),
    ({"name": ""}, "the name of its function is ''"),
    ({"description": "f"}, "the name of its function is None"),
    (5, "its 'tools' holds [{'type': 'function', "),
    ({"type": "function", "function": "f"}, "is no function: expected {\"type\": \"function\""),
    ({"name": "f", "description": 5}, "its function f: its description is 5, no text"),
    ({"name": "f", "parameters": [1]}, "f: its parameters are [1]: expected a JSON schema of an"),
    (with_parameters(type="string"), "its parameters are {'type': 'string'}: expected a JSON"),
    (with_parameters(type="dict"), "its parameters are {'type': 'dict'}: expected a JSON schema"),
    (with_parameters(properties=[]), "its parameters: 'properties' is []: expected an"),
    (with_parameters(required="x"), "its parameters: 'required' is 'x': expected a list"),
    (with_parameters(required=["x"]), "its parameters: 'required' names 'x', which is none of the"),
    (with_parameters(properties={"x": 5}), "f: x is 5: expected a JSON schema"),
    (with_parameters(properties={"x": False}), "x takes no value at all"),
    (with_parameters(properties={"x": {"type": "float"}}), "x has the type 'float', which JSON "
     "Schema does not have: write number"),
    (with_parameters(properties={"x": {"type": "STRING"}}), "write string"),
    (with_parameters(properties={"x": {"type": "any"}}), "leave the type out"),
    (with_parameters(properties={"x": {"type": "date"}}), "expected one of string, integer"),
    (with_parameters(properties={"x": {"type": []}}), "x has the type []"),
    (with_parameters(properties={"x": {"type": 5}}), "x has the type 5"),
    (with_parameters(properties={"x": {"enum": []}}), "its enum is []: expected a list of values"),
    (with_parameters(properties={"x": {"type": "integer", "enum": ["a"]}}), "x is integer, and no "
     "value of its enum is"),
    (with_parameters(properties={"x": {"minimum": 5, "maximum": 1}}), "its minimum is 5, above"),
    (with_parameters(properties={"x": {"type": "array", "items": {"type": "list"}}}), "x[] has the "
     "type 'list', which JSON Schema does not have: write array"),
    (with_parameters(properties={"x": {"anyOf": []}}), "its anyOf is []: expected a list"),
    (with_parameters(properties={"x": {"properties": {"y": {"type": "int"}}}}), "y has the type "
     "'int', which JSON Schema does not have: write integer"),
]  # fmt: skip


@pytest.mark.parametrize("tool, words", IMPOSSIBLE)
def test_an_impossible_schema_is_refused_with_its_row(tmp_path, tool, words):
    good = {"prompt": "x", "tools": [WEATHER]}
    with pytest.raises(UserError) as refused:
        rows_of(tmp_path, good, {"prompt": "x", "tools": [WEATHER, tool]})
    said = str(refused.value)
    assert "rows.jsonl, row 2: " in said and words in said and "\n" not in said


def test_schemas_that_say_what_is_not_known_here_pass(tmp_path):
    odd = {
        "a": {"$ref": "#/$defs/x"}, "b": {"type": ["string", "null"]}, "c": True, "d": {},
        "e": {"type": "string", "pattern": "^a", "format": "date", "enum": ["a", 5]},
        "f": {"anyOf": [{"type": "integer"}, {"const": "all"}]},
        "g": {"type": "object", "required": ["z"]},
    }  # fmt: skip
    tool = with_parameters(type="object", properties=odd, required=["a"])
    (row,) = rows_of(tmp_path, {"prompt": "x", "tools": [tool]})
    assert row["tools"][0]["function"]["parameters"]["properties"] == odd


def test_functions_of_one_name_are_refused_with_their_row():
    rows = [ROW, ROW | {"id": 1, "tools": [WEATHER, WEATHER]}]
    with pytest.raises(UserError, match="row 2: its 'tools' has two functions weather: rename"):
        data.check_names(rows, [], ["r"])
    with pytest.raises(UserError, match="row 1: its 'tools' has a function lamp, which is also a"):
        data.check_names(rows, ["lamp"], ["r"])


def test_a_function_that_a_format_cannot_write_is_refused_with_its_row(tokenizer):
    """Before anything is played."""
    rows = [ROW | {"tools": [WEATHER]}, ROW | {"id": 1, "tools": [LAMP]}]
    with pytest.raises(UserError, match="row 2: format tags passes one string, but lamp needs"):
        check_prompts(Chat(tokenizer, "tags"), rows, 4096)
    asks = [*ROW["messages"], {"role": "assistant", "content": "", "tool_calls": [
        {"function": {"name": "sun", "arguments": {}}}]},
        {"role": "tool", "name": "sun", "content": "5"}]  # fmt: skip
    with pytest.raises(UserError, match="row 1: it calls sun, the tools of its prompt are weather"):
        check_prompts(Chat(tokenizer, "hermes"), [ROW | {"messages": asks}], 4096)


# ---- it can be learnt

NAMES = ("lamp", "door", "fan", "bell")


def made_rows(count, seed):
    """Each row has two of four functions, and its question names the right one."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        names = rng.sample(NAMES, 2)
        right, level = rng.choice(names), rng.randint(1, 4)
        tools = [function(name, ["level"], level="integer") for name in names]
        ground_truth = [{right: {"level": [level]}}]
        rows.append({"prompt": f"{right} {level}", "tools": tools, "ground_truth": ground_truth})
    return rows


def demonstration(row, rng):
    """Calls the right function in six of ten, else the other one."""
    ((right, arguments),) = row["ground_truth"][0].items()
    names = [tool["function"]["name"] for tool in row["tools"]]
    name = right if rng.random() < 0.2 else rng.choice(names)
    called = Call(name, {"level": arguments["level"][0]})
    asked = {"role": "user", "content": row["prompt"]}
    return {"messages": [asked, assistant_message("", [called])], "tools": row["tools"]}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--data={path}"


def test_a_tiny_model_learns_which_function_to_call(tmp_path, monkeypatch):
    """SFT on imperfect demonstrations, then GRPO; both on rows with functions of their own."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(1)
    demos = [demonstration(row, rng) for row in made_rows(1024, seed=0)]
    some = [(demo["messages"], demo["tools"]) for demo in demos[:40]]
    talks = [([messages], tools) for messages, tools in some]
    tokenizer = tiny.tiny_tokenizer(*talks[0], more=talks[1:])
    models.save(tiny.tiny(tokenizer, layers=2, hidden_size=64), tokenizer, "base")
    common = ["--format=hermes", "--max_tokens=256"]
    learning = ["--optimizer=muon", "--learning_rate=1e-2", "--schedule=linear", "--batch_size=32"]
    data_of_sft = write_rows(tmp_path / "demos.jsonl", demos)
    train_sft.main(["--model=base", data_of_sft, "--out_dir=sft", *learning, *common])
    train_grpo.main([
        "--model=sft", write_rows(tmp_path / "rows.jsonl", made_rows(512, seed=2)), "--tools=",
        "--rewards=call_match", "--max_turns=1", "--steps=20", "--prompts_per_step=8",
        "--group_size=8", "--max_new_tokens=40", "--learning_rate=1e-3", "--out_dir=grpo", *common,
    ])  # fmt: skip
    lines = [json.loads(line) for line in Path("grpo/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward_call_match" in line]
    right = [step["reward_call_match"] for step in steps]
    assert sum(right[:4]) / 4 < 0.75 and sum(right[-4:]) / 4 > 0.85, right
    assert steps[-1]["tool_call_rate"] > 0.9
    assert not any(name.startswith("calls_") for name in steps[-1])  # rows have hundreds of names

"""BFCL's 800 questions with one call or several, in every format that its functions fit.

    pytest tests/test_bfcl.py

Pinned here: the prompt shows every schema, the gold calls are read back exactly as they are
written, as text and through tokens, and 10,000 broken calls are counted under the right kind of
error. The data are Berkeley's, of ../shared/data/bfcl.
"""

import asyncio
import json
import random
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from test_formats import (
    QUOTED,
    RESPONSE_TEMPLATES,
    WRITERS,
    assistant,
    chat_of,
    closed,
    exact,
    last_place,
)
from transformers.utils.chat_parsing import parse_response

from chat import Call, Chat
from formats import FORMATS
from rollout import Settings, run_calls
from run.config import UserError
from tools import Tool, Toolbox
from tools.calling.schema import wrong_arguments
from trajectory import Trajectory

BFCL = Path(__file__).parent.parent.parent / "shared" / "data" / "bfcl"
needs_bfcl = pytest.mark.skipif(not BFCL.is_dir(), reason=f"no BFCL data in {BFCL}")
JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array"}
# Template -> format. The text formats of one string argument have a test of their own.
PAIRS = WRITERS | {"chatml, json_actions": "json_actions"}
WHOLE = ("chatml", "llama", "mistral_v11", "qwen3_8", "chatml, json_actions")
# In these a string is written as it is, and a value's type is known by the schema alone.
RAW = ("qwen_xml", "glm", "atem")


def as_schema(given: dict) -> dict:
    """BFCL names its types as Python does; "any" is no type in JSON Schema: it says nothing."""
    made = {key: value for key, value in given.items() if (key, value) != ("type", "any")}
    if "type" in made:
        made["type"] = JSON_TYPES.get(made["type"], made["type"])
    if "properties" in made:
        made["properties"] = {key: as_schema(value) for key, value in made["properties"].items()}
    if "items" in made:
        made["items"] = as_schema(made["items"])
    return made


def gold(accepted):
    """The first of the accepted values; "" among them means that it may be left out. Values in an
    object have such lists too."""
    value = next(value for value in accepted if value != "")
    return _plain(value)


def _plain(value):
    if isinstance(value, dict):
        return {key: gold(accepted) for key, accepted in value.items() if accepted != [""]}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def gold_call(answer, tools) -> Call:
    """Its arguments: the required ones, and those that may not be left out."""
    [(name, given)] = answer.items()
    parameters = next(tool["function"]["parameters"] for tool in tools if named(tool) == name)
    kept = {k: v for k, v in given.items() if k in parameters["required"] or "" not in v}
    return Call(name, {key: gold(accepted) for key, accepted in kept.items()})


def named(tool) -> str:
    return tool["function"]["name"]


@cache
def questions() -> list[tuple[list[dict], list[dict], list[Call]]]:
    """(messages, tools, gold calls) of each question."""
    found = []
    for name in ("simple_python", "multiple", "parallel"):
        rows = map(json.loads, (BFCL / f"{name}.jsonl").read_text().splitlines())
        answers = (BFCL / "possible_answer" / f"{name}.jsonl").read_text().splitlines()
        for row, answer in zip(rows, map(json.loads, answers), strict=True):
            assert row["id"] == answer["id"] and len(row["question"]) == 1
            tools = [
                {"type": "function", "function": f | {"parameters": as_schema(f["parameters"])}}
                for f in row["function"]
            ]
            calls = [gold_call(call, tools) for call in answer["ground_truth"]]
            found.append((row["question"][0], tools, calls))
    return found


@cache
def proved(pair) -> Chat:
    """A chat that is proved for the first question's tools; the others' take its proof over."""
    template, _, format = pair.partition(", ")
    return chat_of(template, questions()[0][1], format or "auto")


def turns_of(chat, calls) -> list[list[Call]]:
    """llama3 has one call in a turn, by its template: there parallel calls are successive turns."""
    return [calls] if chat.format.parallel else [[call] for call in calls]


def shown(pair, tool) -> list[str]:
    """What a prompt has to hold of a tool: all of its schema, where the template writes JSON."""
    function = tool["function"]
    if pair == "llama3_1":
        return [json.dumps(tool, ensure_ascii=False, indent=4)]
    if pair == "nemotron_3_nano":  # in tags of its own; descriptions without blanks around them
        about = [function, *function["parameters"]["properties"].values()]
        return [f"<name>{named(tool)}</name>"] + [a.get("description", "").strip() for a in about]
    if pair == "gptoss":  # as TypeScript, where every parameter has a line
        return [f"type {named(tool)} = ", *function["parameters"]["properties"]]
    if pair.startswith("gemma4"):
        return [f"declaration:{named(tool)}{{", *function["parameters"]["properties"]]
    if pair in ("functiongemma", "muse_glimmer"):
        return [json.dumps(function, ensure_ascii=False)]
    whole = function if PAIRS[pair] == "json_actions" else tool
    return [json.dumps(whole, ensure_ascii=False)]


@needs_bfcl
def test_the_questions_are_all_there_and_their_gold_calls_fit_their_schemas():
    """800 questions, 200 of them with several calls; else nothing below would say much."""
    assert len(questions()) == 800
    assert sum(len(calls) > 1 for _, _, calls in questions()) == 200
    calls = [(tools, call) for _, tools, calls in questions() for call in calls]
    assert len(calls) == 1140
    for tools, call in calls:
        parameters = {named(tool): tool["function"]["parameters"] for tool in tools}
        assert wrong_arguments(call.name, parameters[call.name], call.arguments) is None


@needs_bfcl
@pytest.mark.parametrize("pair", PAIRS)
def test_every_gold_call_is_read_back_exactly(pair):
    """As text, in every format and style: names, and arguments with their types, 5 apart from 5.0;
    and as the message that a rollout keeps."""
    chat = proved(pair)
    for _, tools, calls in questions():
        format = type(chat.format)(tools)
        format.style = chat.format.style
        for turn in turns_of(chat, calls):
            assert exact(format.parse(format.write("", turn))) == exact(turn)


@needs_bfcl
@pytest.mark.parametrize("pair", PAIRS)
def test_every_schema_is_shown_and_every_gold_call_survives_the_tokens(pair):
    """Data rendered to ids, and what is to be sampled of it parsed again. All 800 questions for one
    template of each format, every tenth for the others: encoding the prompts takes the time."""
    for messages, tools, calls in questions()[:: 1 if pair in WHOLE else 10]:
        chat = proved(pair).with_tools(tools)
        for turn in turns_of(chat, calls):
            ids, mask = chat.render([*messages, assistant(*turn)])
            start = mask.index(1)
            assert all(mask[start:])
            text, found = chat.parse(ids[start:])
            assert exact(found) == exact(turn) and not any(call.error for call in found)
            if "tool_calls" in (message := chat.message(text, found)):
                kept = [call["function"] for call in message["tool_calls"]]
                assert exact([Call(**function) for function in kept]) == exact(turn)
            else:
                assert chat.format.inline
        prompt = chat.tokenizer.decode(ids[:start])
        for tool in tools:
            assert all(part in prompt for part in shown(pair, tool)), (named(tool), prompt)


@needs_bfcl
@pytest.mark.parametrize("pair", PAIRS)
def test_a_chat_that_took_its_proof_over_is_the_same_as_one_with_its_own(pair):
    """What the test above relies on."""
    for messages, tools, _ in questions()[::200]:
        own = chat_of(pair.partition(",")[0], tools, PAIRS[pair])
        assert own.prompt(messages) == proved(pair).with_tools(tools).prompt(messages)


@needs_bfcl
@pytest.mark.parametrize("name", RESPONSE_TEMPLATES)
def test_transformers_own_parser_reads_the_same_calls(name):
    """A reader that is not ours, where one of its rules covers the format."""
    for _, tools, calls in questions():
        text = FORMATS[name](tools).write("", calls)
        message = parse_response(text, RESPONSE_TEMPLATES[name], prefix="", tools=tools)
        theirs = [Call(**call["function"]) for call in message["tool_calls"]]
        assert exact(theirs) == exact(calls)


@needs_bfcl
@pytest.mark.parametrize("name", ["fence", "tags"])
def test_functions_that_do_not_fit_a_text_format_are_refused(name):
    """Those formats pass one string. Few functions of BFCL need just that: the calls of those are
    exact, and all others are refused with a sentence that names the function, or counts them."""
    counts = Counter()
    for _, tools, calls in questions():
        try:
            format = FORMATS[name](tools)
        except UserError as error:
            said = str(error)
            assert "\n" not in said
            many = said.startswith("format fence has one tool, got ") and len(tools) > 1
            unfit = f"format {name} passes one string, but " in said
            assert many or (unfit and "use a format with JSON arguments" in said)
            counts["refused"] += 1
            continue
        for call in calls:
            if len(call.arguments) > 1:
                counts["gold calls with an optional argument"] += 1
            else:
                text = format.write("", [call])
                assert exact(format.parse(text)) == exact([call])
                counts["exact"] += 1
                for seed in range(20):  # and broken ones never raise
                    for found in format.parse(scrambled(text, 0, random.Random(seed))):
                        assert found.error == "bad_json" or [*found.arguments] == [*call.arguments]
    print(name, dict(counts))
    assert counts == FITTING[name]


# Of 800 questions and 1140 calls.
FITTING = {
    "fence": {"refused": 738, "exact": 39, "gold calls with an optional argument": 55},
    "tags": {"refused": 730, "exact": 44, "gold calls with an optional argument": 58},
}

# Broken calls. Each function makes (text, the kinds of error that must come of it) of a chat, its
# tools and a good call, or None where it cannot break that call in that way.

LETTERS = list("{}[]:,\"'\\ <>/=.-0123456789aeiou\n") + ["é", "漢", "😀", "\u200b", "\x00", "null"]
WRONG = {"string": 5, "integer": [1], "number": [1], "boolean": {"a": 1}, "array": 7, "object": [1]}
BEGINS = {"hermes": 11, "llama3": 7, "mistral": 12, "qwen_xml": 11, "json_actions": 1}
BEGINS |= {"harmony": 5, "gemma4": 12, "functiongemma": 21, "glm": 11, "atem": 5}
# Tags around names and values, of which one is left out.
TAGS = {
    "qwen_xml": ["<function=", "</function>", "<parameter=", "</parameter>"],
    "glm": ["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>"],
    "atem": ["<atem:invoke name=", "</atem:invoke>", "<atem:parameter name=", "</atem:parameter>"],
    "pythonic": [")"],
}


def parameters_of(chat, call) -> dict:
    return next(t["function"]["parameters"] for t in chat.tools if named(t) == call.name)


def written(chat, call, **changes) -> str:
    return chat.format.write("", [Call(call.name, call.arguments | changes)])


def truncated(chat, call, rng):
    text = written(chat, call)
    begin = BEGINS.get(chat.format_name) or text.index("(") + 1
    return text[: rng.randint(begin, last_place(chat, text))], ["bad_json"]


def renamed(chat, call, rng):
    name = call.name + rng.choice(["x", "_2", ".get", "-"])
    if chat.format_name == "pythonic" and name.endswith("-"):  # no name there
        # where nothing but a list marks a call, it is an answer
        expected = ["bad_json"] if chat.format.style.start else []
        return written(chat, Call(name, call.arguments)), expected
    return written(chat, Call(name, call.arguments)), ["unknown_tool"]


def without_an_argument(chat, call, rng):
    if needed := parameters_of(chat, call)["required"]:
        left_out = rng.choice(needed)
        kept = {key: value for key, value in call.arguments.items() if key != left_out}
        return written(chat, Call(call.name, kept)), ["bad_arguments"]


def with_one_too_many(chat, call, rng):
    return written(chat, call, **{rng.choice(["zz", "Ä", "self"]): 1}), ["bad_arguments"]


def of_a_wrong_type(chat, call, rng):
    """In qwen_xml whatever is written for a string is one."""
    typed = _typed_arguments(chat, call)
    if typed:
        key, kind = rng.choice(typed)
        return written(chat, call, **{key: WRONG[kind]}), ["bad_arguments"]


def too_large_or_too_deep(chat, call, rng):
    if typed := _typed_arguments(chat, call):
        text = written(chat, call, **{rng.choice(typed)[0]: "@@"})
        huge = rng.choice(["9" * 5000, "[" * 5000, '{"a":' * 5000])
        return QUOTED.sub(huge, text), ["bad_json"]


def _typed_arguments(chat, call) -> list[tuple[str, str]]:
    schemas = parameters_of(chat, call)["properties"]
    kinds = [(key, schemas[key].get("type")) for key in call.arguments]
    is_raw = chat.format_name in RAW
    return [(key, kind) for key, kind in kinds if kind and not (is_raw and kind == "string")]


def not_an_object(chat, call, rng):
    text, whole = written(chat, call), json.dumps(call.arguments, ensure_ascii=False)
    other = rng.choice(["[1]", '"x"', "null", "5"])
    if chat.format_name == "qwen_xml":
        return f"{text.partition('<function')[0]}{whole}\n</tool_call>", ["bad_json"]
    if chat.format_name == "glm":
        return f"<tool_call>{whole}\n</tool_call>", ["bad_json"]
    if chat.format_name == "atem":
        return f"{text.partition('<atem')[0]}{whole}", ["bad_json"]
    if chat.format_name == "pythonic":
        head, _, tail = text.partition("(")
        return f"{head}({other}{tail[tail.rindex(')') :]}", ["bad_json"]
    if "gemma" in chat.format_name:
        head, _, tail = text.partition("{")
        return f"{head}{other}{tail[tail.rindex('}') + 1 :]}", ["bad_json"]
    return text.replace(whole, other), ["bad_json"]


def in_other_quotes(chat, call, rng):
    text = written(chat, call)
    if chat.format_name in RAW:
        # a message for a tool is a call whatever it holds
        return text.replace("<", "&lt;"), ["bad_json"] if chat.format_name == "atem" else []
    if "gemma" in chat.format_name or chat.format_name == "pythonic":
        changed = text.replace(getattr(chat.format, "quote", "'"), "`")
        changed = changed.replace('"', "`") if chat.format_name == "pythonic" else changed
        return None if changed == text else (changed, ["bad_json"])
    # "{'name'" does not begin like a call to llama3, whose calls have no marker
    return text.replace('"', "'"), [] if chat.format_name == "llama3" else ["bad_json"]


def without_a_tag(chat, call, rng):
    """The last brace, or one of the tags around a name or a value."""
    text, tag = written(chat, call), rng.choice(TAGS.get(chat.format_name, ["}"]))
    if tag in text:
        head, _, tail = text.rpartition(tag)
        return head + tail, ["bad_json"]


def scrambled(text, first, rng) -> str:
    """One to four letters behind the first ones deleted, inserted, doubled, swapped, replaced."""
    letters = list(text)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(first, len(letters) - 1), len(letters))
        change = rng.randrange(5)
        if change == 0:
            del letters[at]
        elif change == 1:
            letters[at] += rng.choice(LETTERS)
        elif change == 2:
            letters[at] *= 2
        elif change == 3:
            letters[at], letters[at - 1] = letters[at - 1], letters[at]
        else:
            letters[at] = rng.choice(LETTERS)
        if len(letters) < 3:
            break
    return "".join(letters)


def noise(chat, call, rng):
    """Random letters changed. What has to come of it says json.loads, on the whole body: where a
    call begins and ends is left alone, so there is no parser in between."""
    text = written(chat, call)
    first = {"hermes": 12, "mistral": 12}.get(chat.format_name, 0)
    if named_style := chat.format_name == "mistral" and "[ARGS]" in text:
        first = text.index("[ARGS]") + 6
    if chat.format_name == "harmony":
        first = text.index("<|message|>") + 11
    if chat.format_name in RAW or "gemma" in chat.format_name or chat.format_name == "pythonic":
        return scrambled(text, 12, rng), None
    last = text.rindex("}") + 1 + text.rstrip().endswith("]") if first else len(text)
    body = scrambled(text[first:last], 12, rng)
    text = text[:first] + body + text[last:]
    has_name = named_style or chat.format_name == "harmony"
    return text, _kinds(chat, body, call.name if has_name else "")


def _kinds(chat, body, name) -> list[str | None]:
    """What a body of JSON must come to, read as a whole."""
    try:
        value = json.loads(body)
    except ValueError:
        return ["bad_json"]
    if chat.format_name == "json_actions":
        value = value.get("actions")
    if name:
        value = {"name": name, "arguments": value}
    if chat.format_name in ("json_actions", "mistral") and not name:
        if not isinstance(value, list) or (not value and chat.format_name == "mistral"):
            return ["bad_json"]
    else:
        value = [value]
    return [_kind(chat, item) for item in value]


def _kind(chat, item) -> str | None:
    keys = ("parameters", "arguments") if chat.format_name == "llama3" else ("arguments",)
    if not isinstance(item, dict) or not any(isinstance(item.get(key), dict) for key in keys):
        return "bad_json"
    if not isinstance(item.get("name"), str) or not item["name"]:
        return "bad_json"
    tool = next((tool for tool in chat.tools if named(tool) == item["name"]), None)
    if tool is None:
        return "unknown_tool"
    arguments = next(item[key] for key in keys if key in item)
    wrong = wrong_arguments(item["name"], tool["function"]["parameters"], arguments)
    return "bad_arguments" if wrong else None


BREAK = [truncated, renamed, without_an_argument, with_one_too_many, of_a_wrong_type]
BREAK += [without_a_tag, too_large_or_too_deep, not_an_object, in_other_quotes, *[noise] * 4]


@cache
def chat_for(pair, number) -> Chat:
    return proved(pair).with_tools(questions()[number][1])


def toolbox_of(tools) -> Toolbox:
    async def work(**arguments):
        return "done"

    return Toolbox([Tool(named(tool), tool, work, is_async=True) for tool in tools], cache="none")


async def kinds_of(chat, box, text) -> list[str | None]:
    """Parsed and run as in a rollout -> the error of each call."""
    calls = chat.format.parse(text)
    chat.message(text, calls)
    if not calls:
        return []
    trajectory, session = Trajectory({}, turn_starts=[0]), box.open({})
    await run_calls(trajectory, calls, session, box, Settings(), None)
    await session.close()
    return [call.error for call in trajectory.calls]


@needs_bfcl
def test_ten_thousand_broken_calls_are_counted_under_the_right_kind():
    """Pitfall 9: none raises, each becomes what it must by construction."""

    async def all_of_them():
        rng, seen, errors, done = random.Random(0), Counter(), Counter(), 0
        boxes = [toolbox_of(tools) for _, tools, _ in questions()[::4]]
        while done < 10_000:
            number = rng.randrange(len(boxes))
            chat, calls = chat_for(rng.choice(list(PAIRS)), 4 * number), questions()[4 * number][2]
            how = rng.choice(BREAK)
            if (broken := how(chat, rng.choice(calls), rng)) is None:
                continue
            text, expected = broken
            kinds = await kinds_of(chat, boxes[number], text)
            if expected is None:
                assert {*kinds} <= {None, "bad_json", "unknown_tool", "bad_arguments"}
            else:
                assert kinds == expected, (how.__name__, chat.format_name, text[:500])
            again = exact(chat.format.parse(chat.facts.opening + text))
            if done % 20 == 0 and len(text) < 2000:  # through tokens it is the same
                assert exact(chat.parse(closed(chat, text))[1]) == again
            seen.update(kinds or ["no call"])
            errors.update(filter(None, kinds))
            done += 1
        return seen, errors, sum((box.errors for box in boxes), Counter())

    seen, errors, counted = asyncio.run(all_of_them())
    print(dict(seen))
    assert counted == errors
    kinds = ("bad_json", "unknown_tool", "bad_arguments", None, "no call")
    assert min(seen[kind] for kind in kinds) > 150

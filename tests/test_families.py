"""What is particular to each family's format: harmony, gemma4, functiongemma, glm, pythonic, atem.

    pytest tests/test_families.py

Pinned here: how a turn ends and how its result follows, channels and thoughts, what is malformed
and what the model is told, that code in a call is never run, that no mutated text is read as a
call that it is not, and that a parser's time is linear. tests/test_formats.py has what all share.
"""

import asyncio
import random
import time
from types import SimpleNamespace

import pytest
from family_templates import FAMILIES
from test_bfcl import needs_bfcl, questions, scrambled
from test_chat import ADD, SYSTEM, USER, encode, run
from test_formats import ANY, WRITERS, chat_of, closed, exact
from transformers.utils.chat_parsing import parse_response
from trl import chat_template_utils as of_trl

from chat import Call, Chat
from engines.scripted import ScriptedEngine
from formats import FORMATS
from formats.messages import assistant_message
from formats.pythonic import Pythonic
from grading.answers import answer
from rollout import Settings, rollouts
from run.config import UserError
from tools import Toolbox

NEW = ("harmony", "gemma4", "functiongemma", "glm", "pythonic", "atem")
NEW_WRITERS = [name for name, format in WRITERS.items() if format in NEW]
CALL = Call("add", {"a": 2, "b": 3})


def tokens(chat, ids) -> list[str]:
    return chat.tokenizer.convert_ids_to_tokens(list(ids))


def shown(chat, ids) -> str:
    return chat.tokenizer.decode(ids)


# How a turn ends, and how its result follows


@pytest.mark.parametrize(
    ("name", "ends_answer", "ends_call", "result"),
    [
        (
            "gptoss",
            "<|return|>",
            "<|call|>",
            '<|start|>functions.add to=assistant<|channel|>commentary<|message|>"5"<|end|>'
            "<|start|>assistant",
        ),
        (
            "gemma4_v5",
            "<turn|>",
            "<|tool_response>",
            'response:add{value:<|"|>5<|"|>}<tool_response|>',
        ),
        (
            "functiongemma",
            "<end_of_turn>",
            "<start_function_response>",
            "response:add{value:<escape>5<escape>}<end_function_response>",
        ),
        (
            "glm4moe",
            "<|user|>",
            "<|observation|>",
            "\n<tool_response>\n5\n</tool_response><|assistant|>",
        ),
        ("glm4_7", "<|user|>", "<|observation|>", "<tool_response>5</tool_response><|assistant|>"),
        ("muse_glimmer", "<|eot|>", "<|eot|>", "<|start|>tool add<|message|><tool_output name="),
        ("lfm2_v2", "<|im_end|>", "<|im_end|>", "\n<|im_start|>tool\n<|tool_response_start|>5"),
    ],
)
def test_a_turn_ends_and_its_result_follows_as_the_template_has_it(
    name, ends_answer, ends_call, result
):
    """Pitfalls 5, 6: both tokens stop a turn; the result is what the template writes behind it."""
    chat = chat_of(name, [ADD])
    stops = tokens(chat, chat.stop_ids)
    assert stops[0] == ends_answer and ends_call in stops
    after = shown(chat, chat.observation([(CALL, "5")], closed=True))
    assert after.startswith(result)
    cut = shown(chat, chat.observation([(CALL, "5")], closed=False))
    assert cut == ends_call + after
    # an answer, and a user who goes on
    talk = [USER, assistant_message("So."), {"role": "user", "content": "And?"}]
    pieces = chat.pieces([*talk, assistant_message("So.")])
    assert pieces[1][0].endswith(ends_answer) and pieces[3][0].endswith(ends_answer)
    assert not pieces[2][0].startswith(ends_answer)


@pytest.mark.parametrize("name", ["gemma4_v5", "functiongemma", "glm4moe", "glm4_7"])
def test_a_result_has_its_opening_token_whatever_ended_the_turn(name):
    """Pitfall 6: there a call's stop token begins the result; a model may end by another one."""
    chat = chat_of(name, [ADD])
    call = encode(chat, chat.format.write("", [CALL]))
    opening = chat.facts.call_close
    by_call, by_answer = (
        [*call, chat.tokenizer.convert_tokens_to_ids(stop)] for stop in (opening, chat.facts.close)
    )
    assert chat.is_closed(by_call) and not chat.is_closed(by_answer) and not chat.is_closed(call)
    result = chat.observation([(CALL, "5")], closed=chat.is_closed(by_answer))
    assert tokens(chat, result)[0] == opening
    other = chat_of("gptoss", [ADD])
    assert other.is_closed([*call, other.tokenizer.convert_tokens_to_ids("<|return|>")])


@pytest.mark.parametrize("name", NEW_WRITERS)
def test_a_control_token_in_a_result_stays_text(name):
    """A tool cannot close its own result, or open a turn."""
    chat = chat_of(name, [ADD])
    plain = chat.observation([(CALL, "5")], closed=True)
    for token in chat.added_tokens:
        ids = chat.observation([(CALL, f"5{token}")], closed=True)
        added = set(chat.tokenizer.added_tokens_decoder)
        assert [i for i in ids if i in added] == [i for i in plain if i in added], token


@pytest.mark.parametrize("name", NEW_WRITERS)
def test_a_thought_is_kept_as_it_was_sampled(name):
    """Pitfall 49: it is <think> in the message, whatever the family writes; a call in it is none,
    and the answer is what stands behind it."""
    chat = chat_of(name, [ADD])
    opening = chat.facts.opening
    lead = "" if opening else chat.facts.lead
    inner = chat.format.write("", [CALL]) if WRITERS[name] in ("glm", "gemma4") else "hm"
    said = chat.format.write(chat.format.with_thought(inner, "\\boxed{5}"), [])
    said = lead + said.removeprefix(opening)
    sampled = [*encode(chat, said), chat.stop_ids[0]]
    text, calls = chat.parse(sampled)
    assert calls == []
    message = chat.message(text, calls)
    assert "<think>" in message["content"] and "\\boxed{5}" in message["content"]
    ids = chat.prompt([SYSTEM, USER]) + sampled
    assert chat.render([SYSTEM, USER, message])[0] == ids
    trajectory = SimpleNamespace(messages=[message], answer=None, stop="answered")
    assert answer(trajectory, {"messages": []}) == "5"


@pytest.mark.parametrize("name", NEW_WRITERS)
def test_thinking_words_and_a_call_in_one_turn(name):
    """And a row in OpenAI's form, with reasoning_content, is written in the family's own way."""
    chat = chat_of(name, [ADD])
    row = {**assistant_message("", [CALL]), "reasoning_content": "hm"}
    ids, mask = chat.render([USER, row])
    sampled = [i for i, bit in zip(ids, mask, strict=True) if bit]
    text, calls = chat.parse(sampled)
    has_words = "hm" in chat.format.write("hm", [CALL])
    assert exact(calls) == exact([CALL]) and ("hm" in text) == has_words
    message = chat.message(text, calls)
    assert chat.render([USER, message]) == (ids, mask)
    native = {
        "gptoss": "<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.add",
        "gemma4_v5": "<|channel>thought\nhm\n<channel|><|tool_call>",
        "glm4moe": "\n<think>hm</think>\n<tool_call>add\n",
        "muse_glimmer": " to=self<|message|>hm<|eom|><|start|>assistant to=add<|message|>",
    }
    assert text.startswith(native.get(name, ""))


def add(a: int, b: int) -> str:
    """Adds.

    Args:
        a: A number.
        b: A number.
    """
    return str(a + b)


@pytest.mark.parametrize("name", NEW_WRITERS)
def test_a_whole_rollout_calls_and_answers(name):
    """Thought, call, result, answer, by the loop itself; its messages render as it was sampled."""
    box = Toolbox([add])
    chat = chat_of(name, box.schemas)
    opening = chat.facts.opening
    call_lead = "" if opening else chat.facts.call_lead
    says = chat.format.write(chat.format.with_thought("hm", ""), [CALL])
    if name in ("llama4", "toolace"):  # a turn is a call and has no thought
        says = chat.format.write("", [CALL])
    answers = chat.format.write(chat.format.with_thought("so", "\\boxed{5}"), [])
    lead = "" if opening else chat.facts.lead
    turns = [
        closed(chat, call_lead + says.removeprefix(opening)),
        closed(chat, lead + answers.removeprefix(opening)),
    ]
    engine = ScriptedEngine(turns, chat.tokenizer)
    played = rollouts([{"messages": [USER], "answer": "5"}], chat, engine, box, Settings())
    (trajectory,) = asyncio.run(played)
    assert [call.error for call in trajectory.calls] == [None], trajectory.messages
    assert (trajectory.stop, answer(trajectory, {"messages": [USER]})) == ("answered", "5")
    assert chat.render(trajectory.messages) == (trajectory.ids, trajectory.mask)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("gemma4_v5", "enable_thinking=true"),
        ("gemma4", "enable_thinking=true"),
        ("diffusion_gemma", "enable_thinking=true"),
        ("glm4moe", "enable_thinking=false"),
        ("gptoss", "reasoning_effort=high"),
        ("lfm2_2_5", "preserve_thinking=true"),
        ("muse_glimmer", "reasoning_strength=low"),
    ],
)
def test_templates_are_proved_with_their_options_too(name, option):
    """Each changes the prompt; Gemma's opens a thought behind a result, but not at the start."""
    plain = chat_of(name, [ADD])
    chat = Chat(plain.tokenizer, "auto", [ADD], [option])
    assert chat.format_name == plain.format_name
    prompts = [one.prompt([SYSTEM, USER]) for one in (plain, chat)]
    results = [one.observation([(CALL, "5")], closed=True) for one in (plain, chat)]
    assert (prompts[0] != prompts[1]) == (name != "lfm2_2_5")  # there it is about history
    opened = name in ("gemma4_v5", "diffusion_gemma")
    assert shown(chat, results[1]).endswith("<|channel>thought\n") == opened
    if opened:
        context = chat.prompt([SYSTEM, USER]) + results[1]
        opening = chat.opening_behind(context)
        inner = chat.format.write("", [CALL])
        sampled = encode(chat, f"I could {inner}\n<channel|>{inner}")
        text, calls = chat.parse(sampled, opening)
        assert exact(calls) == exact([CALL])
        assert chat.message(text, calls, opening)["content"].startswith("<think>\nI could ")


# harmony


def test_harmony_reads_a_call_as_templates_and_as_models_write_it():
    """The recipient in front of the channel, or behind it; both are one call, kept as sampled."""
    chat = chat_of("gptoss", [ADD])
    body = '<|message|>{"a": 2, "b": 3}'
    for header in (
        " to=functions.add<|channel|>commentary json",
        "<|channel|>commentary to=functions.add <|constrain|>json",
        "<|channel|>analysis to=functions.add code",
    ):
        for thought in ("", "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"):
            turns = [(closed(chat, thought + header + body), ["5"])]
            turns.append((closed(chat, "<|channel|>final<|message|>So."), []))
            ids, mask, messages = run(chat, turns)
            assert exact(chat.parse(turns[0][0])[1]) == exact([CALL])
            assert chat.render(messages) == (ids, mask)


def test_harmony_has_one_call_in_a_turn():
    """A template writes one; rows with two and a model that goes on behind one are told so."""
    format = FORMATS["harmony"]([])
    one = format.write("", [CALL])
    [call] = format.parse(one + format.next_message + one)
    assert call.error == "bad_json" and "more than one call in a turn" in call.message
    with pytest.raises(UserError, match="one call in a turn, got 2"):
        chat_of("gptoss", [ADD]).render([USER, assistant_message("", [CALL, CALL])])


def test_the_answer_of_a_turn_with_several_channels_is_the_final_one():
    """Also where no message says exactly the same, so that the turn stays as it was sampled."""
    chat = chat_of("gptoss", [ADD])
    thought = "<|channel|>analysis<|message|>\\boxed{1}<|end|><|start|>assistant"
    final = "<|channel|>final<|message|>\\boxed{5}"
    for text in (thought + final, thought + thought + final):
        _, calls = chat.parse(encode(chat, text))
        message = chat.message(text, calls)
        trajectory = SimpleNamespace(messages=[message], answer=None, stop="answered")
        assert answer(trajectory, {"messages": []}) == "5"
        assert chat.render([USER, message])[0][:-1][-len(encode(chat, text)) :] == encode(
            chat, text
        )
    trajectory.messages = [chat.message(thought.partition("<|end|>")[0], [])]
    assert answer(trajectory, {"messages": []}) is None


# What is malformed, and what the model is told

MALFORMED = {
    "harmony": [
        (' to=functions.add<|channel|>commentary json<|message|>{"a": 2', "no valid JSON"),
        (" to=functions.add<|channel|>commentary json<|message|>[2]", "must be an object"),
        (" to=functions.add<|message|>{} please", "'please' follows the object"),
        (" to=functions.add<|channel|>comm", "no valid JSON"),
    ],
    "gemma4": [
        ("<|tool_call>add{a:2}<tool_call|>", "no call:<tool>{ follows"),
        ("<|tool_call>call:add{a:two}<tool_call|>", "no value at 'two}"),
        ('<|tool_call>call:add{a:"2"}<tool_call|>', 'text stands between two <|"|>'),
        ('<|tool_call>call:add{a:<|"|>2}<tool_call|>', 'a second <|"|> is missing'),
        ("<|tool_call>call:add{a:2 b:3}<tool_call|>", "no comma or } follows a"),
        ("<|tool_call>call:add{a:2,a:3}<tool_call|>", "a is given twice"),
        ("<|tool_call>call:add{a:2,}<tool_call|>", "expected <key>:"),
        ("<|tool_call>call:add{a:2} please<tool_call|>", "'please' follows the call"),
        ("<|tool_call>call:add{a:2}<|tool_call>call:add{a:2}<tool_call|>", "is missing"),
    ],
    "functiongemma": [
        ("<start_function_call>call:add{a:<escape>2}<end_function_call>", "a second <escape>"),
    ],
    "glm": [
        ("<tool_call></tool_call>", "no name follows"),
        ('<tool_call>{"name": "add"}</tool_call>', "no name follows"),
        ("<tool_call>add\n<arg_key>a</arg_key>\n2\n</tool_call>", "has no end, or no <arg_value>"),
        ("<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>2\n</tool_call>", "is missing after a"),
        (
            "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>two</arg_value>\n</tool_call>",
            "a = 'two' is no integer",
        ),
        ("<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>2</arg_value>", "</tool_call> is miss"),
    ],
    "pythonic": [
        ("<|tool_call_start|>[add(a=2<|tool_call_end|>", "no valid Python"),
        ("<|tool_call_start|>[]<|tool_call_end|>", "expected a list of calls"),
        ("<|tool_call_start|>add(a=2)<|tool_call_end|>", "expected a list of calls"),
        ("<|tool_call_start|>[2]<|tool_call_end|>", "expected a call such as"),
        ("<|tool_call_start|>[add(2, 3)]<|tool_call_end|>", "have no keys"),
        ("<|tool_call_start|>[add(**{'a': 2})]<|tool_call_end|>", "have no keys"),
        ("<|tool_call_start|>[add(a=2, a=3)]<|tool_call_end|>", "a is given twice"),
        ("<|tool_call_start|>[add(a=b)]<|tool_call_end|>", "a value is no literal"),
        ("<|tool_call_start|>[add(a='it's')]<|tool_call_end|>", "no valid Python"),
        ("<|tool_call_start|>[add(a={1: 2})]<|tool_call_end|>", "a key of an object is no text"),
        ("<|tool_call_start|>[add()(a=2)]<|tool_call_end|>", "a call has no name"),
    ],
    "atem": [
        (' to=add<|message|>{"a": 2}', "no <atem:function_calls>"),
        (
            ' to=add<|message|><atem:function_calls>\n<atem:invoke name="sub">\n</atem:invoke>\n'
            "</atem:function_calls>",
            "the message is for add, but it invokes sub",
        ),
        (
            ' to=add<|message|><atem:function_calls>\n<atem:invoke name="add">\n',
            "</atem:invoke> and </atem:function_calls> are missing",
        ),
    ],
}
CASES = [(format, *case) for format, cases in MALFORMED.items() for case in cases]


@pytest.mark.parametrize(("name", "text", "says"), CASES)
def test_a_malformed_call_says_what_is_wrong_and_what_is_right(name, text, says):
    """Pitfall 9: one bad_json with a reason and an example; where several calls can be told apart,
    the good one behind it is still found."""
    format = FORMATS[name]([ADD])
    first, *others = format.parse(text)
    assert first.error == "bad_json" and first.arguments is None
    assert says in first.message and first.message.endswith(format.example)
    assert len(first.message) < 330 and first.raw and first.raw in text
    if name in ("gemma4", "functiongemma", "glm", "pythonic") and not others:
        _, good = format.parse(text + "\n" + format.write("", [CALL]))
        assert exact([good]) == exact([CALL]) and not good.error


@pytest.mark.parametrize(
    "value",
    [
        "__import__('os').system('touch /tmp/owned')",
        "open('/etc/passwd')",
        "[x for x in (1, 2)]",
        "lambda: 5",
        "1 + 1",
        "f'{1}'",
        "b'5'",
        "5j",
        "...",
        "(1, 2)",
        "{1, 2}",
        "not True",
        "-'5'",
        "a.b",
        "[*[1]]",
        "{**{}}",
        "(y := 5)",
    ],
)
def test_code_in_a_pythonic_call_is_never_run(value):
    """Only literals that JSON has are values; all else is malformed."""
    [call] = Pythonic([]).parse(f"<|tool_call_start|>[add(a={value})]<|tool_call_end|>")
    assert call.error == "bad_json", call.arguments


TEXTS = ["it's", '"', "\\", "\\n", "a\nb", "a\r\nb", "\\d+\\", "'''", "#", "\x00", "ü ✓ 漢", "\t"]
TEXTS += ["[f(x=1)]", ")]", "<|tool_call_end|>", "</function_calls>", "{}", "\u2028", "\ud800", ""]


@pytest.mark.parametrize("style", Pythonic.styles)
def test_a_pythonic_text_is_read_back_whatever_is_in_it(style):
    """Quotes, backslashes, line breaks, the format's own tags, and half a character."""
    format = Pythonic([ANY])
    format.style = style
    for text in TEXTS:
        calls = [Call("any", {"x": text, "n": -5, "f": 1e22, "o": {text: [text, None, True]}})] * 2
        assert exact(format.parse(format.write("", calls))) == exact(calls), text


def test_pythonic_texts_are_read_as_models_write_them():
    """Line breaks that nobody escaped, backslashes of a regular expression, JSON's words."""
    for written, value in {
        "'a\nb'": "a\nb",
        '"it\'s"': "it's",
        r"'\d+\.\w'": r"\d+\.\w",
        r"'\u00fc\x41'": "üA",
        "'a\\\nb'": "a\\\nb",
        "true": True,
        "[null, -5, 1_000]": [None, -5, 1000],
        "'a' 'b'": "ab",
        "'''a\nb'''": "a\nb",
    }.items():
        [call] = Pythonic([]).parse(f"<|tool_call_start|>[f(x={written})]<|tool_call_end|>")
        assert (call.arguments, call.error) == ({"x": value}, "")


@pytest.mark.parametrize("name", NEW_WRITERS)
def test_half_a_character_never_crashes(name):
    """JSON can hold a lone surrogate; a row with one is written and read back, or refused."""
    chat = chat_of(name, [ANY])
    call = Call("any", {"x": "a\ud800b"})
    text = chat.format.write("", [call])
    for found in chat.format.parse(text):
        assert found.error or exact([found]) == exact([call])


# Against other readers

THEIRS = {
    "gptoss": of_trl.gptoss_template,
    "glm4moe": of_trl.glm4moe_template,
    "gemma4_v5": of_trl.gemma4_template,
    "lfm2_2_5": of_trl.lfm2_2_5_template,
}
# Of 1,140 gold calls: those that the reader of transformers reads as we do. For Gemma and LFM with
# _ for the dots in names, which it takes for their ends; of LFM it reads True as a text.
SAME = {"gptoss": 1140, "glm4moe": 1140, "gemma4_v5": 1140, "lfm2_2_5": 1088}
WITHOUT_DOTS = ("gemma4_v5", "lfm2_2_5")


@needs_bfcl
@pytest.mark.parametrize("name", THEIRS)
def test_transformers_own_parser_reads_the_same_calls(name):
    """A reader that is not ours: with the response_template that trl has for the family."""
    chat = chat_of(name, [ADD])
    same = 0
    for _, tools, calls in questions():
        format = type(chat.format)(tools)
        format.style = chat.format.style
        for call in calls:
            if name in WITHOUT_DOTS:
                call = Call(call.name.replace(".", "_"), call.arguments)
            text = format.write("", [call]) + chat.facts.call_close
            message = parse_response(text, THEIRS[name], prefix="", tools=tools)
            theirs = [Call(**found["function"]) for found in message.get("tool_calls", [])]
            same += exact(theirs) == exact([call])
    assert same == SAME[name]


# Mutated texts, deep and long ones


@pytest.mark.parametrize("name", NEW)
def test_ten_thousand_mutated_texts_are_read_without_a_crash(name):
    """Pitfall 9: whatever comes out is malformed and says so, or is a call that is written and read
    back as itself; and never is anything called that stands nowhere in the text."""
    chats = [chat_of(writer, [ANY]) for writer in NEW_WRITERS if WRITERS[writer] == name]
    rng = random.Random(0)
    calls = [
        Call("any", {"x": "a 'b' \"c\"", "n": 5, "f": 1.5, "b": True}),
        Call("any", {"o": {"k": [1, "ü"]}, "a": [None, "x"], "maybe": None}),
    ]
    good = 0
    for place in range(10_000):
        chat = rng.choice(chats)
        call = calls[place % 2]
        text = scrambled(chat.format.write("", [call]), 1, rng)
        for found in chat.format.parse(text):
            if found.error:
                assert found.error == "bad_json" and found.message.endswith(chat.format.example)
                continue
            good += 1
            assert found.name in text
            written = chat.format.write("", [found])
            assert exact(chat.format.parse(written)) == exact([found])
    assert 100 < good < 9_000


LONG = {
    "a long text": lambda write, n: write("x" * n),
    "many blanks": lambda write, n: write(" " * n),
    "many quotes": lambda write, n: write("'\"" * (n // 2)),
    "many backslashes": lambda write, n: write("\\" * n),
    "a text without an end": lambda write, n: write("1").partition("1")[0] + "\\'\\\"" * (n // 4),
    "a long name": lambda write, n: write("1").replace("any", "a" * n),
    "a long key": lambda write, n: write("1").replace("x", "y" * n),
    "blanks behind": lambda write, n: write("1") + " " * n,
    "a cut text": lambda write, n: write("x" * n)[: n // 2],
    "many calls": lambda write, n: write("1") * (n // 100),
    "many beginnings": lambda write, n: write("1")[:30] * (n // 30),
    "many ends": lambda write, n: write("1")[-15:] * (n // 15),
    "minus signs": lambda write, n: write("1").replace("1", "-" * n),
    "brackets": lambda write, n: write("1").replace("1", "[" * n),
    "no call": lambda write, n: "a b " * (n // 4),
}


@pytest.mark.parametrize("name", NEW_WRITERS)
def test_the_time_of_a_parser_is_linear(name):
    """100,000 characters of what could be looked at again and again: a quadratic reader takes
    minutes of the processor for them."""
    format = chat_of(name, [ANY]).format

    def write(text):
        return format.write("", [Call("any", {"x": text})])

    for what, make in LONG.items():
        text = make(write, 100_000)
        start = time.process_time()  # of the processor: a busy machine changes nothing
        format.parse(text)
        assert time.process_time() - start < 3.0, what  # 0.3 in truth


def test_every_family_has_its_tests():
    """No new format is left out of the tests above."""
    assert {WRITERS[name] for name in NEW_WRITERS} == set(NEW)
    assert set(MALFORMED) == set(NEW) and set(FAMILIES) <= set(NEW_WRITERS)

"""The call formats: what is written is read back exactly, in every template that writes it.

    pytest tests/test_formats.py

Pinned here: mistral in its three syntaxes, qwen_xml in its three spellings, json_actions; that what
a parser could read in two ways is refused; and that format=auto finds the template's own format.
"""

import json
import re
from pathlib import Path

import pytest
import trl
from conftest import CHATML, make_tokenizer
from family_templates import FAMILIES
from test_chat import ADD, LLAMA, PYTHON, SYSTEM, USER, encode, run, schema
from test_templates import TOKEN, UNSAID
from transformers.utils.chat_parsing import parse_response

from chat import Call, Chat
from formats import FORMATS
from formats.fence import Fence
from formats.json_actions import JsonActions
from formats.mistral import Mistral
from formats.qwen_xml import QwenXml
from formats.tags import Tags
from run.config import UserError

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# Mistral's, after its public documentation, which calls them v7, v11 and v13.
MISTRAL_TEMPLATE = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
    {{- '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' -}}
{%- endif -%}
{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' if tools -}}
{%- for m in messages -%}
    {%- if m.role == 'user' -%}
        {{- '[INST]' + m.content + '[/INST]' -}}
    {%- elif m.role == 'assistant' -%}
        {{- m.content -}}
        CALLS
        {{- eos_token -}}
    {%- elif m.role == 'tool' -%}
        RESULT
    {%- endif -%}
{%- endfor -%}
"""
LISTED = """\
{%- for call in m.tool_calls or [] -%}
    {{- '[TOOL_CALLS][' if loop.first -}}
    {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' -}}
    {{- ']' if loop.last else ', ' -}}
{%- endfor -%}"""
NAMED = """\
{%- for call in m.tool_calls or [] -%}
    {{- '[TOOL_CALLS]' + call.function.name ID + '[ARGS]' + (call.function.arguments | tojson) -}}
{%- endfor -%}"""
WITH_ID = (
    "{{- '[TOOL_RESULTS]' + m.tool_call_id + '[TOOL_CONTENT]' + m.content + '[/TOOL_RESULTS]' -}}"
)
WITHOUT_ID = "{{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' -}}"
MISTRAL = {
    "mistral_v7": MISTRAL_TEMPLATE.replace("CALLS", LISTED).replace("RESULT", WITH_ID),
    "mistral_v11": MISTRAL_TEMPLATE.replace(
        "CALLS", NAMED.replace("ID", "+ '[CALL_ID]' + call.id")
    ).replace("RESULT", WITH_ID),
    "mistral_v13": MISTRAL_TEMPLATE.replace("CALLS", NAMED.replace("ID", "")).replace(
        "RESULT", WITHOUT_ID
    ),
}
MISTRAL_TOKENS = [f"[{slash}{name}]" for name in ("INST", "AVAILABLE_TOOLS") for slash in ("", "/")]
MISTRAL_TOKENS += ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
MISTRAL_TOKENS += ["[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[TOOL_CONTENT]", "</s>", "<s>"]
# Every template that the tests here take, and the format in which it writes calls.
WRITERS = {
    "chatml": "hermes",
    "qwen3": "hermes",
    "llama": "llama3",
    "llama3_1": "llama3",
    **dict.fromkeys(MISTRAL, "mistral"),
    "qwen3_5_think": "qwen_xml",  # True as in Python
    "qwen3_8": "qwen_xml",  # true as in JSON
    "nemotron_3_nano": "qwen_xml",  # a line break behind a call
    "gptoss": "harmony",
    "gemma4_v5": "gemma4",
    "gemma4_v2": "gemma4",  # results in a turn of their own, None as in Python
    "functiongemma": "functiongemma",
    "glm4moe": "glm",
    "glm4moe_training": "glm",
    "glm4_7": "glm",  # no line breaks between tags
    "lfm2": "pythonic",  # calls in the content
    "lfm2_v2": "pythonic",
    "lfm2_2_5": "pythonic",  # lists as in Python
    "olmo3": "pythonic",  # a line each, values as in JSON
    "llama4": "pythonic",  # nothing but a list
    "toolace": "pythonic",
    "muse_glimmer": "atem",
}
# What such templates' repositories may carry for transformers' own parser.
_BLOCK = {
    "hermes": {"open_pattern": r"<tool_call>\s*", "content": "json"},
    "qwen_xml": {
        "open_pattern": r"<tool_call>\s*<function=(?P<name>[^\n>]+)>",
        "content": "xml-inline",
        "content_args": {
            "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>",
            "value_parser": {"name": "text"},
        },
    },
}
_FUNCTION = {"hermes": "{content}", "qwen_xml": {"name": "{name}", "arguments": "{content}"}}
RESPONSE_TEMPLATES = {
    name: {
        "start_anchor": "assistant\n",
        "fields": {
            "tool_calls": block
            | {"close_pattern": r"\s*</tool_call>\s*", "repeats": True}
            | {"transform": {"type": "function", "function": _FUNCTION[name]}},
            "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
        },
    }
    for name, block in _BLOCK.items()
}
ANY = schema("any", x="string", n="integer", f="number", b="boolean", o="object", a="array")
ANY["function"]["parameters"]["properties"] |= {"free": {}, "maybe": {"type": ["string", "null"]}}


def tokenizer_of(name):
    """A fresh tokenizer with the template of that name and its control tokens."""
    if name == "chatml":
        return make_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"])
    if name == "llama":
        special = ["<|head|>", "<|/head|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"]
        return make_tokenizer(LLAMA, special, eos="<|eot_id|>")
    if name in MISTRAL:
        return make_tokenizer(MISTRAL[name], MISTRAL_TOKENS, eos="</s>", bos="<s>")
    if name in FAMILIES:
        template, special, eos = FAMILIES[name]
        return make_tokenizer(template, special, eos=eos, bos="<s>")
    template = (TEMPLATES / f"{name}.jinja").read_text()
    special = sorted({*TOKEN.findall(template), *UNSAID.get(name, ())})
    return make_tokenizer(template, special, eos="</s>", bos="<s>")


_TOKENIZERS = {}


def chat_of(name, tools, format="auto") -> Chat:
    if name not in _TOKENIZERS:
        _TOKENIZERS[name] = tokenizer_of(name)
    return Chat(_TOKENIZERS[name], format, tools)


def closed(chat, text):
    """A sampled turn, ended as the template ends a call or an answer."""
    calls = chat.parse(encode(chat, text))[1]
    stop = chat.facts.call_close if calls and not chat.format.inline else chat.facts.close
    return [*encode(chat, text), chat.tokenizer.convert_tokens_to_ids(stop)]


def exact(calls):
    """Names and arguments, 5 apart from 5.0 and True from 1; some formats sort the keys."""
    return [(call.name, json.dumps(call.arguments, sort_keys=True)) for call in calls]


# "@@" as any format writes it.
QUOTED = re.compile(r"""(["']|<\|"\|>|<escape>|)@@\1""")
# What a call has to be cut behind to be whole: only tags of its end follow.
LAST = {
    "qwen_xml": "</function>",
    "glm": "</tool_call>",
    "pythonic": ")",
    "atem": "</atem:function_calls>",
}


def last_place(chat, text) -> int:
    """Where the last letter stands that a call cannot do without."""
    last = LAST.get(chat.format_name, "}")
    return text.rindex(last) + len(last) - 1


def assistant(*calls, text=""):
    functions = [{"function": {"name": c.name, "arguments": c.arguments}} for c in calls]
    return {"role": "assistant", "content": text, "tool_calls": functions}


# Every format


@pytest.mark.parametrize("name", WRITERS)
def test_auto_finds_the_format_of_a_template(name):
    """By having the template write a call, which is stronger than any marker in its text."""
    chat = chat_of(name, [ADD])
    assert chat.format_name == WRITERS[name] and isinstance(chat.format, FORMATS[WRITERS[name]])
    named = chat_of(name, [ADD], WRITERS[name])
    assert named.prompt([SYSTEM, USER]) == chat.prompt([SYSTEM, USER])
    assert (named.format.style, named.stop_ids) == (chat.format.style, chat.stop_ids)
    assert chat_of(name, []).format_name == WRITERS[name]  # rows without tools, too


def test_auto_says_what_would_do_where_a_template_has_no_format_of_ours():
    """One that writes calls in a way of its own, and one that shows no tools."""
    own = CHATML.replace("<tool_call>\\n", "<<").replace("\\n</tool_call>", ">>")
    tokenizer = make_tokenizer(own, ["<|im_start|>", "<|im_end|>"])
    with pytest.raises(
        UserError, match="writes a call as .*use format=json_actions, fence or tags"
    ):
        Chat(tokenizer, "auto", [ADD])
    with pytest.raises(UserError, match="use format=json_actions, fence or tags"):
        chat_of("qwen2_5_vl", [ADD])
    assert chat_of("qwen2_5_vl", []).format_name == "hermes"  # nothing to call


@pytest.mark.parametrize("name", WRITERS)
def test_a_rollout_renders_again_as_it_was_sampled(name):
    """Pitfalls 4, 49: two calls where the format has them, words, results, an answer."""
    chat = chat_of(name, [ADD])
    calls = [Call("add", {"a": 2, "b": 3}), Call("add", {"a": 7, "b": 3})]
    calls = calls if chat.format.parallel else calls[:1]
    calls = [Call(c.name, c.arguments, id=f"idOfCall{n}") for n, c in enumerate(calls)]
    think = "hm\n</think>\n\n" if chat.facts.opening else ""
    lead = "" if chat.facts.opening else chat.facts.lead
    call_lead = "" if chat.facts.opening else chat.facts.call_lead
    has_words = "I add." in chat.format.write("I add.", calls)
    for words in ("", "I add.") if has_words else ("",):
        before = think + (lead if words else call_lead)
        said = before + chat.format.write(words, calls)
        turns = [(closed(chat, said), ["5", "10"][: len(calls)])]
        turns.append((closed(chat, think + lead + chat.format.write("So.", [])), []))
        ids, mask, messages = run(chat, turns)
        assert chat.render(messages) == (ids, mask)
        assert [m["role"] for m in messages[2:]] == ["assistant"] + ["tool"] * len(calls) + [
            "assistant"
        ]
        assert exact(calls) == exact(chat.parse(turns[0][0])[1])
        assert len(messages[2].get("tool_calls", [])) == len(calls)


@pytest.mark.parametrize("name", WRITERS)
def test_a_malformed_turn_renders_again_as_it_was_sampled(name):
    """Pitfall 49: such a turn stays text; its results have the ids and names that they had."""
    chat = chat_of(name, [ADD])
    think = "hm\n</think>\n\n" if chat.facts.opening else ""
    lead = "" if chat.facts.opening else chat.facts.lead
    call_lead = "" if chat.facts.opening else chat.facts.call_lead
    good = chat.format.write("", [Call("add", {"a": 2, "b": 3}, id="abcdefghi")])
    for tag in ("}", "</function>", "name"):
        head, found, tail = good.rpartition(tag)
        bad = head + tail + (good if chat.format.parallel and found else "")
        calls = chat.format.parse(bad)
        if not calls:  # llama3 without its "name": no call
            continue
        turns = [(closed(chat, think + call_lead + bad), ["no", "5"][: len(calls)])]
        turns.append((closed(chat, think + lead + chat.format.write("So.", [])), []))
        ids, mask, messages = run(chat, turns)
        assert chat.render(messages) == (ids, mask)


@pytest.mark.parametrize("name", WRITERS)
def test_what_a_template_writes_is_read_back(name):
    """The template's own text of the whole conversation holds the call as the format writes it."""
    chat = chat_of(name, [ANY])
    text = ' "5"' if "escapes nothing in the text of a call" in chat.differences else ' "5"\n'
    arguments = {"x": text, "n": 5, "f": 5.0, "b": True, "o": {"k": [1, "ü"]}, "a": [None]}
    calls = [Call("any", arguments)] * (2 if chat.format.parallel else 1)
    messages = [USER, assistant(*calls)]
    ids, mask = chat.render(messages)
    sampled = [i for i, bit in zip(ids, mask, strict=True) if bit]
    assert exact(chat.parse(sampled)[1]) == exact(calls)
    whole = chat.tokenizer.apply_chat_template(
        chat.to_template_form(messages), tools=[ANY], tokenize=False
    )
    assert chat.format.write("", calls) in whole


@pytest.mark.parametrize("name", WRITERS)
def test_tags_in_a_string_neither_end_nor_start_a_call(name):
    """Pitfall 10."""
    chat = chat_of(name, [PYTHON])
    for code in (
        "</tool_call>",
        "<tool_call>",
        "<think>",
        "[TOOL_CALLS] [",
        "[ARGS]{",
        "<think>\n",
    ):
        calls = [Call("python", {"code": f"a {code} b\n{code}"})]
        assert exact(chat.format.parse(chat.format.write("", calls))) == exact(calls)
    if WRITERS[name] != "llama3":
        thought = f"<think>\nI could say {chat.format.write('', calls)}"
        assert chat.format.parse(thought) == []
        assert chat.format.parse(f"{thought}\n</think>\n\nNo.") == []


@pytest.mark.parametrize("name", WRITERS)
def test_a_call_that_was_cut_is_no_whole_call(name):
    """Pitfall 8: at no place but the last can it be cut and still run."""
    chat = chat_of(name, [ADD])
    text = chat.format.write("", [Call("add", {"a": 2, "b": 3})])
    last = last_place(chat, text)
    for cut in range(len(text)):
        calls = chat.format.parse(text[:cut])
        assert all(call.error == "bad_json" for call in calls) or cut > last


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("depth", [90, 110, 500, 970, 985, 990, 2000])
def test_a_deep_value_is_a_malformed_call_and_never_a_crash(name, depth):
    """Pitfall 9: near Python's recursion limit what can be read can often not be written again."""
    chat = chat_of(name, [ANY])
    text = chat.format.write("", [Call("any", {"a": "@@"})])
    text = QUOTED.sub("[" * depth + "]" * depth, text)
    if chat.facts.opening:
        text = "hm\n</think>\n\n" + text
    text, [call] = chat.parse(closed(chat, text))
    assert call.error == ("bad_json" if depth > 100 else "")
    ids, mask = chat.render([USER, chat.message(text, [call])])
    assert sum(mask) > depth


def test_the_proof_is_not_repeated_for_other_tools():
    """Rows that bring their own tools: the same ids as from a chat that was proved for them."""
    for name in ("chatml", "qwen3_8", "mistral_v11"):
        chat = chat_of(name, [ADD]).with_tools([PYTHON, ANY])
        whole = chat_of(name, [PYTHON, ANY])
        row = [USER, assistant(Call("any", {"n": 5}))]
        assert chat.render(row) == whole.render(row)
        assert chat.with_tools([]).prompt([USER]) == chat_of(name, []).prompt([USER])
    tags = chat_of("chatml", [PYTHON], "tags").with_tools([schema("search", query="string")])
    assert tags.stop_strings == ("</search>", "</answer>")


# mistral


@pytest.mark.parametrize("name", MISTRAL)
def test_a_result_has_the_id_of_its_call(name):
    """What the model chose, or, for data that has none or another's, the place of the call."""
    chat = chat_of(name, [ADD])
    calls = [Call("add", {"a": n, "b": 3}, id=f"abcdefgh{n}") for n in range(2)]
    text, parsed = chat.parse(closed(chat, chat.format.write("", calls)))
    assert [call.error for call in parsed] == ["", ""]
    shown = chat.tokenizer.decode(chat.observation([(c, "5") for c in parsed], closed=True))
    ids = ["abcdefgh0", "abcdefgh1"] if name != "mistral_v13" else []
    assert [id for id in ("abcdefgh0", "abcdefgh1") if id in shown] == ids
    row = assistant(*calls)
    for call, id in zip(row["tool_calls"], ("call_x", "call_y"), strict=True):
        call["id"] = id
    results = [{"role": "tool", "tool_call_id": f"call_{c}", "content": c} for c in "yx"]
    text = chat.tokenizer.decode(chat.render([USER, row, *results])[0])
    if name != "mistral_v13":
        assert "call00001[TOOL_CONTENT]y[" in text and "call00000[TOOL_CONTENT]x[" in text


def test_mistral_reads_every_syntax_that_can_be_told_apart():
    """Whatever the template's own is."""
    call = ("add", '{"a": 2}')
    for text, ids in {
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2}, "id": "123456789"}]': ["123456789"],
        'So.[TOOL_CALLS][{"arguments": {"a": 2}, "name": "add"}]': [""],
        '[TOOL_CALLS]add[CALL_ID]123456789[ARGS]{"a": 2}': ["123456789"],
        '[TOOL_CALLS]add[ARGS]{"a": 2}\n[TOOL_CALLS]add[ARGS] {"a": 2}': ["", ""],
        '[THINK][TOOL_CALLS]add[ARGS]{}[/THINK]So:[TOOL_CALLS]add[ARGS]{"a": 2}': [""],
    }.items():
        calls = Mistral([]).parse(text)
        assert exact(calls) == [call] * len(ids) and [c.id for c in calls] == ids
        assert not any(c.error for c in calls)
    assert Mistral([]).parse("[THINK][TOOL_CALLS]add[ARGS]{}") == []
    assert Mistral([]).parse('[{"name": "add", "arguments": {}}]') == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2}', "no valid JSON"),
        ('[TOOL_CALLS] [{"name": "add", "arguments": {}}] please', "'please' follows the call"),
        ('[TOOL_CALLS] {"name": "add", "arguments": {}}', "expected a list of calls"),
        ("[TOOL_CALLS] []", "expected a list of calls"),
        ("[TOOL_CALLS] [5]", "expected an object, got 5"),
        ('[TOOL_CALLS][{"name": "add"}]', 'the object has no "arguments"'),
        ('[TOOL_CALLS]add{"a": 2}', "no list and no name[ARGS] follows"),
        ("[TOOL_CALLS]add[ARGS]5", "the arguments must be an object, got 5"),
        ("[TOOL_CALLS]add[ARGS]{", "no valid JSON"),
        ("[TOOL_CALLS]add[ARGS]{}{}", "'{}' follows the call"),
        ("[TOOL_CALLS]", "no list and no name[ARGS] follows"),
    ],
)
def test_a_malformed_mistral_call_says_what_is_wrong(text, says):
    """Pitfall 9; and what a good one looks like, in the template's syntax."""
    for style in Mistral.styles:
        format = Mistral([])
        format.style = style
        [call] = format.parse(text)
        assert call.error == "bad_json" and call.arguments is None and says in call.message
        shown = Mistral.listed if style == "list" else Mistral.named
        assert call.message.endswith(shown)


@pytest.mark.parametrize("name", MISTRAL)
def test_nothing_is_to_be_declared_of_a_mistral_template(name):
    """Its rendering of a conversation is the concatenation to the letter."""
    assert chat_of(name, [ADD]).differences == ()


def test_a_template_whose_tools_move_with_the_last_question_is_refused():
    """Pitfall 4: Mistral's first ones write them in front of the last user's message only, so that
    a second question moves what a model has already read."""
    tools = "{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' if tools -}}"
    question = "{{- '[INST]' + m.content + '[/INST]' -}}"
    last = "(messages | selectattr('role', 'equalto', 'user') | list | last)"
    moving = f"{{%- if m == {last} -%}}{tools}{{%- endif -%}}"
    template = MISTRAL["mistral_v7"]
    assert tools in template and question in template
    template = template.replace(tools, "").replace(question, moving + question)
    with pytest.raises(UserError, match="AVAILABLE_TOOLS.* in the pieces"):
        Chat(make_tokenizer(template, MISTRAL_TOKENS, eos="</s>", bos="<s>"), "mistral", [ADD])


# qwen_xml

STRINGS = ["", " ", "\n", "\n\n", "5", "true", "None", "null", '"q"', "{}", "ünï ✓ 漢 \u2028"]
STRINGS += ["  two\n\tlines \n", "a\r\nb", "<parameter>", "</ parameter>", "</function>", "<think>"]
STRINGS += ["</tool_call>", "<tool_call>\n<function=any>", "\\n", "</function>\n</function>"]
VALUES = [("n", 5), ("n", -(10**30)), ("f", 5), ("f", 5.0), ("f", 1e-300), ("f", 1e22), ("b", True)]
VALUES += [("b", False), ("o", {}), ("o", {"a": {"b": [1.0, None, "</function>\n"]}}), ("a", [])]
VALUES += [("free", 5), ("free", [True]), ("free", None), ("free", "words"), ("maybe", None)]
VALUES += [("maybe", "5"), ("maybe", "words")]


@pytest.mark.parametrize("style", QwenXml.styles)
def test_values_are_read_back_as_their_schema_says(style):
    """A string is raw whatever it looks like; all else keeps its type, 5 apart from 5.0."""
    format = QwenXml([ANY])
    format.style = style
    for key, value in [("x", text) for text in STRINGS] + VALUES:
        calls = [Call("any", {key: value, "b": True}), Call("any", {"b": False, key: value})]
        assert exact(format.parse(format.write("So:", calls))) == exact(calls), (key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("x", "a </parameter> b"),
        ("x", "<parameter=n>"),
        ("o", {"a": "</parameter>"}),
        ("x", "</function>\n</tool_call>"),
        ("x", 5),
        ("n", "5"),
        ("free", "5"),
        ("free", "null"),
        ("maybe", "None"),
        ("nobody", 5),
        ("b>", True),
    ],
)
def test_a_row_that_would_be_read_in_another_way_is_refused(key, value):
    """Nobody is taught a call that does not mean what the row says."""
    chat = chat_of("qwen3_8", [ANY])
    with pytest.raises(UserError, match="format qwen_xml cannot write any"):
        chat.render([USER, assistant(Call("any", {key: value}))])


@pytest.mark.parametrize(
    ("text", "value"),
    [("\n5\n", 5), ("5", 5), (" 5 ", 5), ("True", True), ("\ntrue\n", True), ("None", None)],
)
def test_values_are_read_as_models_write_them(text, value):
    """With or without line breaks, and literals as Python or JSON has them."""
    body = f"<tool_call><function=any><parameter=free>{text}</parameter></function></tool_call>"
    assert exact(QwenXml([ANY]).parse(body)) == exact([Call("any", {"free": value})])


def test_a_function_may_have_no_parameters_and_a_schema_keys_that_are_none():
    """As OpenAI's form allows, and as the rows of a table with tools in it are."""
    absent = {"type": None, "enum": None, "anyOf": None, "oneOf": None, "nullable": None}
    bare = [{"function": {"name": "any"}}, {"function": {"name": "any", "parameters": None}}]
    for tool in bare + [{"function": {"name": "any", "parameters": {"properties": None}}}]:
        assert exact(QwenXml([tool]).parse(CALL_OF_ANY)) == exact([Call("any", {"free": "5"})])
        for format in (Tags, Fence):
            with pytest.raises(UserError, match=r"passes one string, but any needs \(\)"):
                format([tool])
    for given, value in [(absent, 5), (None, 5), (absent | {"type": "string"}, "5")]:
        parameters = {"properties": {"free": given}, "required": None}
        tool = {"function": {"name": "any", "description": None, "parameters": parameters}}
        assert exact(QwenXml([tool]).parse(CALL_OF_ANY)) == exact([Call("any", {"free": value})])
    assert "python. \n" in Fence([tool]).describe()


CALL_OF_ANY = "<tool_call><function=any><parameter=free>5</parameter></function></tool_call>"
X = "<parameter=x>\n1\n</parameter>"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("", "no <function=...> follows"),
        ('{"name": "any", "arguments": {}}', "no <function=...> follows"),
        ("<function=>\n</function>", "no <function=...> follows"),
        ("<function=any>", "</function> is missing"),
        (f"<function=any>\n{X}", "</function> is missing"),
        ("<function=any>\nx = 1\n</function>", "</function> is missing"),
        ("<function=any>\n<parameter=x>\n1\n</function>", "</parameter> is missing after x"),
        ("<function=any>\n<parameter=x>\n1" + X + "\n</function>", "is missing after x"),
        (f"<function=any>\n{X}\nx>\n1\n</parameter>\n</function>", "</function> is missing"),
        (f"<function=any>\n{X}\n{X}\n</function>", "parameter x is given twice"),
        (f"<function=any>\n{X}\n</function> please", "'please' follows the function"),
        ("<function=any><parameter=n>five</parameter></function>", "n = 'five' is no integer"),
        ("<function=any><parameter=f>NaN</parameter></function>", "f = 'NaN' is no number"),
        ("<function=any><parameter=o>{'a': 1}</parameter></function>", "is no object"),
        (f"<function=any><parameter=n>{'9' * 5000}</parameter></function>", "is no integer"),
        (f"<function=any><parameter=a>{'[' * 5000}</parameter></function>", "is no array"),
    ],
)
def test_a_malformed_xml_call_says_what_is_wrong(body, says):
    """Pitfall 9: one bad_json with a reason, and the good call behind it is still found."""
    good = "<tool_call>\n<function=any>\n<parameter=n>\n5\n</parameter>\n</function>\n</tool_call>"
    bad, fine = QwenXml([ANY]).parse(f"<tool_call>\n{body}\n</tool_call>\n{good}")
    assert bad.error == "bad_json" and says in bad.message and len(bad.message) < 250
    assert bad.message.endswith(QwenXml.example)
    assert exact([fine]) == exact([Call("any", {"n": 5})]) and not fine.error


def test_transformers_parse_response_is_less_exact_than_the_format():
    """Why auto does not read with it: values lose their blanks, a wrong type is not reported."""

    def theirs(text):
        message = parse_response(text, RESPONSE_TEMPLATES["qwen_xml"], prefix="", tools=[ANY])
        return [call["function"] for call in message["tool_calls"]]

    written = QwenXml([ANY]).write("", [Call("any", {"x": "  a\n"})])
    assert theirs(written) == [{"name": "any", "arguments": {"x": "a"}}]
    wrong = written.replace("=x>", "=n>")
    assert theirs(wrong) == [{"name": "any", "arguments": {"n": "a"}}]
    assert QwenXml([ANY]).parse(wrong)[0].error == "bad_json"


# json_actions


def test_one_object_is_a_thought_and_its_actions():
    """Several actions are parallel calls; their results are one message of the user."""
    chat = chat_of("chatml", [ADD], "json_actions")
    assert chat.stop_strings == ()
    prompt = chat.tokenizer.decode(chat.prompt([SYSTEM, USER]))
    assert "Be brief.\n\n" in prompt and json.dumps(ADD["function"]) in prompt
    calls = [Call("add", {"a": n, "b": 3}) for n in (2, 7)]
    text = chat.format.write("I add.", calls)
    thought = json.loads(text)
    assert thought["thought"] == "I add." and len(thought["actions"]) == 2
    turns = [(closed(chat, text), ["5", "10"]), (closed(chat, "5 and 10."), [])]
    ids, mask, messages = run(chat, turns)
    assert exact(chat.parse(turns[0][0])[1]) == exact(calls)
    assert chat.render(messages) == (ids, mask)
    shown = "<|im_start|>user\nResult of add:\n5\nResult of add:\n10\n<|im_end|>"
    assert shown in chat.tokenizer.decode(ids)
    row = messages[:2] + [assistant(*calls, text="I add.")] + messages[3:]  # OpenAI's form
    assert chat.render(row) == (ids, mask)


def test_a_result_in_json_actions_cannot_close_its_turn():
    """A control token that a tool prints stays text."""
    chat = chat_of("chatml", [ADD], "json_actions")
    ids = chat.observation([(Call("add", {}), "<|im_end|>")], closed=True)
    assert "<|im_end|>" in chat.tokenizer.decode(ids).partition("Result of add:\n")[2]
    assert ids.count(chat.stop_ids[0]) == 1


@pytest.mark.parametrize(
    "text",
    [
        "It is 5.",
        '{"thought": "It is 5.", "actions": []}',
        "",
        "<think>\n{",
        '<think>\n{"thought": "", "actions": [{"name": "add", "arguments": {}}]}\n</think>\n\nNo.',
    ],
)
def test_plain_text_and_an_empty_list_are_answers(text):
    """Pitfall 10: nothing in <think> is a call, closed or not."""
    assert JsonActions([ADD]).parse(text) == []


ACTION = '{"name": "add", "arguments": {"a": 2}}'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"thought": "x", "actions": [', "no valid JSON"),
        ('{"thought": "x"}', 'no list "actions"'),
        ('{"thought": "x", "actions": ' + ACTION + "}", 'no list "actions"'),
        (ACTION, 'no list "actions"'),
        ('{"actions": [5]}', "expected an object, got 5"),
        ('{"actions": [{"name": "add"}]}', 'the object has no "arguments"'),
        ('{"actions": [' + ACTION + "]} please", "'please' follows the object"),
        ('Well: {"actions": [' + ACTION + "]}", "'Well: ' stands before the object"),
        ('```json\n{"thought": "", "actions": []}\n```', "stands before the object"),
        ("{'thought': 'x'}", "no valid JSON"),
    ],
)
def test_a_malformed_action_says_what_is_wrong(text, says):
    """Pitfall 9: what is meant as an object of actions is never taken for an answer."""
    [call] = JsonActions([ADD]).parse(text)
    assert call.error == "bad_json" and says in call.message
    assert call.message.endswith("and nothing else")


def test_a_bad_action_does_not_take_the_good_one_with_it():
    """Each action is a call of its own; thinking in front of the object is no fault."""
    text = (
        '<think>\nhm\n</think>\n\n{"thought": "<think>x</think>", "actions": [5, ' + ACTION + "]}"
    )
    bad, good = JsonActions([ADD]).parse(text)
    assert bad.error == "bad_json" and good.arguments == {"a": 2} and not good.error

"""Every chat template that trl carries, with every format: proved, or refused for a reason.

    pytest tests/test_templates.py

The table says what is true of each template today. A template is somebody else's text: when a
refusal turns into a proof, or the other way round, this test says which.
"""

import re
from functools import cache
from pathlib import Path

import pytest
import trl
from conftest import make_tokenizer

from chat import Chat
from formats import FORMATS, Call
from run.config import UserError

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
PYTHON = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "Runs code.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The code."}},
            "required": ["code"],
        },
    },
}
# What control tokens look like: <|x|> <｜x｜> <|x> <x|> [INST] [gMASK] <end_of_turn> <image> ...
TOKEN = re.compile(
    r"<\|[^|<>\s]+\|>|<｜[^｜]+｜>|<\|[a-z_]+>|<[a-z_]+\|>|\[/?[A-Za-z]*(?:INST|MASK)\]"
    r"|<(?:start|end)_of_\w+>|<image>|<sop>|</s>"
)
# What a family's tokenizer has, though its template does not write it.
LFM2 = ("<|tool_call_start|>", "<|tool_call_end|>")
UNSAID = {"lfm2": LFM2, "lfm2_training": LFM2}

DIFFERENCES = {
    "strips the thinking of earlier turns": "s",
    "adds an empty <think></think>": "e",
    "writes other whitespace around thinking": "w",
    "trims the assistant's text": "t",
    "no system role: its text is put at the head of the first user message": "u",
    "the date in prompts is always 26 Jul 2024": "d",
    "drops words in front of a call": "x",
    "moves words in front of a call behind it": "m",
    "ends answers that are not the last by <|end|>": "r",
    "repeats the header behind a result, as its generation prompt does not": "h",
    "writes no calls: they are put into the text of their turn": "c",
    "escapes nothing in the text of a call": "q",
}
REFUSALS = {
    "it ignores tool calls": "no-calls",
    "it ignores tools": "no-tools",
    "it writes a call as": "other",
    "stands between generation prompt and answer": "header",  # the model writes its own header
}
OWN = [name for name, format in FORMATS.items() if not format.inline]
# Of each template the format in which it writes calls, which is what format=auto finds, and what is
# proved with fence. "hermes-se": with the differences s and e. Else why it is refused.
# No template of trl is a Mistral one, Olmo's or FunctionGemma's: tests/test_formats.py has those.
TABLE = """
template                         own            fence
cohere                           no-tools       fence-t
cohere2                          no-tools       fence
cohere2_training                 no-tools       fence
cohere_training                  no-tools       fence-t
deepseek_r1_distill              no-tools       fence-sw
deepseek_r1_distill_training     no-tools       fence-w
deepseekv3                       no-tools       fence-sw
deepseekv3_training              no-tools       fence-sw
diffusion_gemma                  gemma4-hmst    fence-t
diffusion_gemma_training         gemma4-hmst    fence-t
gemma                            no-tools       fence-tu
gemma3                           no-tools       fence-t
gemma3_training                  no-tools       fence-t
gemma4                           gemma4-mst     fence-t
gemma4_v2                        gemma4-mst     fence-t
gemma4_v3                        gemma4-mst     fence-t
gemma4_v4                        gemma4-mst     fence-t
gemma4_v5                        gemma4-mst     fence-t
gemma_training                   no-tools       fence-tu
glm4moe                          glm-est        fence-estw
glm4moe_training                 glm-est        fence-estw
gptoss                           harmony-drs    header
gptoss_training                  harmony-drs    header
idefics3                         no-tools       fence
idefics3_training                no-tools       fence
lfm2                             pythonic-c     fence
lfm2_2_5                         pythonic-qs    fence-s
lfm2_2_5_v2                      pythonic-qs    fence-s
lfm2_2_5_vl                      pythonic-s     fence-s
lfm2_training                    pythonic-c     fence
lfm2_v2                          pythonic       fence
lfm2_v2_training                 pythonic       fence
llama3                           no-tools       fence-t
llama3_1                         llama3-t       fence-t
llama3_2                         llama3-dt      fence-dt
llama3_training                  no-tools       fence-t
llava_next                       no-tools       fence
llava_next_training              no-tools       fence
muse_glimmer                     atem-dx        header
muse_glimmer_training            atem-dx        header
nemotron_3_5_lightning           qwen_xml-stw   fence-stw
nemotron_3_5_lightning_training  qwen_xml-stw   fence-stw
nemotron_3_nano                  qwen_xml-stw   fence-stw
nemotron_3_nano_training         qwen_xml-stw   fence-stw
nemotron_3_super                 qwen_xml-stw   fence-stw
nemotron_3_super_training        qwen_xml-stw   fence-stw
nemotron_3_ultra                 qwen_xml-stw   fence-stw
nemotron_3_ultra_training        qwen_xml-stw   fence-stw
phi3                             no-tools       fence
phi3_5                           no-tools       fence
phi3_5_training                  no-tools       fence
phi3_training                    no-tools       fence
qwen2_5                          hermes         fence
qwen2_5_training                 hermes         fence
qwen2_5_vl                       no-tools       fence
qwen2_5_vl_training              no-tools       fence
qwen3                            hermes-es      fence-es
qwen3_5_nothink                  qwen_xml-stw   fence-stw
qwen3_5_nothink_training         qwen_xml-tw    fence-tw
qwen3_5_think                    qwen_xml-stw   fence-stw
qwen3_5_think_training           qwen_xml-t     fence-t
qwen3_6                          qwen_xml-stw   fence-stw
qwen3_6_training                 qwen_xml-t     fence-t
qwen3_8                          qwen_xml-et    fence-et
qwen3_8_training                 qwen_xml-et    fence-et
qwen3_instruct_2507              hermes         fence
qwen3_instruct_2507_training     hermes         fence
qwen3_training                   hermes-e       fence-e
qwen3_vl                         hermes         fence
qwen3_vl_training                hermes         fence
smolvlm                          no-tools       fence
smolvlm_training                 no-tools       fence
"""
LINES = [line.split() for line in TABLE.strip().split("\n")]
ROWS = {name: dict(zip(LINES[0][1:], row, strict=True)) for name, *row in LINES[1:]}


@cache
def tokenizer_of(name):
    template = (TEMPLATES / f"{name}.jinja").read_text()
    special = sorted({*TOKEN.findall(template), *UNSAID.get(name, ())})
    tokenizer = make_tokenizer(template, special, eos="</s>", bos="<s>")
    tokenizer.name_or_path = name
    return tokenizer


def outcome(name, format) -> str:
    try:
        chat = Chat(tokenizer_of(name), format, [PYTHON])
    except UserError as error:
        said = str(error)
        # auto becomes the one format that writes a turn's header, before it is judged
        assert re.match(
            f"the chat template of {name} cannot be used with format=[a-z0-9_]+: ", said
        )
        assert "\n" not in said and len(said) < 400, f"not one readable sentence: {said}"
        return next((word for words, word in REFUSALS.items() if words in said), said)
    found = "".join(sorted(map(DIFFERENCES.get, chat.differences)))
    return "-".join([chat.format_name, found]).rstrip("-")


def test_the_table_has_every_template():
    """Pitfall 4: no template of trl is left out."""
    assert sorted(ROWS) == sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def test_nearly_all_templates_with_tools_are_proved_with_their_own_calls():
    """46 of 72; the other 26 show no tools, and so are refused by name."""
    proved = [name for name, row in ROWS.items() if row["own"].partition("-")[0] in OWN]
    refused = {row["own"] for name, row in ROWS.items() if name not in proved}
    assert len(proved) == 46 and refused == {"no-tools"}


@pytest.mark.parametrize("name", ROWS)
def test_a_template_is_proved_or_refused_as_the_table_says(name):
    """Pitfall 4: rendering the whole equals the concatenation, or the difference is declared."""
    row = ROWS[name]
    assert {"own": outcome(name, "auto"), "fence": outcome(name, "fence")} == row
    for inline in ("tags", "json_actions"):
        found = outcome(name, inline)
        # in json_actions no result goes on in a turn: less whitespace differs
        assert found.replace(inline, "fence") in (row["fence"], row["fence"].removesuffix("w"))


@pytest.mark.parametrize("name", ROWS)
def test_no_other_format_is_proved_than_the_one_that_auto_finds(name):
    """Each of the others is refused: the template writes another syntax, or none."""
    own = ROWS[name]["own"].partition("-")[0]
    for format in OWN:
        if format == own:
            assert outcome(name, format) == ROWS[name]["own"]
        else:
            reasons = {ROWS[name]["own"]} if own not in OWN else {"other", "header", "no-calls"}
            assert outcome(name, format) in reasons, format


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507"])
def test_qwen_is_proved_with_its_own_calls(name):
    """Whatever else the table may come to say."""
    assert ROWS[name]["own"].startswith("hermes") and ROWS[name]["fence"].startswith("fence")


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2"])
def test_llama_is_proved_with_its_own_calls(name):
    """Whatever else the table may come to say."""
    assert ROWS[name]["own"].startswith("llama3") and ROWS[name]["fence"].startswith("fence")


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_6", "qwen3_8", "nemotron_3_nano"])
def test_newer_qwen_and_nemotron_are_proved_with_their_own_calls(name):
    """Whatever else the table may come to say."""
    assert ROWS[name]["own"].startswith("qwen_xml")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3", {"close": "<|im_end|>", "header": "<|im_start|>assistant", "opening": ""}),
        ("qwen3_5_think", {"opening": "<think>\n", "lead": "\n", "call_lead": "\n"}),
        ("gemma", {"has_system": False, "header": "<start_of_turn>model"}),
        ("llava_next", {"as_parts": True, "lead": " ", "close": "</s>", "stop_tokens": ("</s>",)}),
        ("gptoss", {"close": "<|return|>", "inner_close": "<|end|>", "call_close": "<|call|>"}),
        ("gptoss", {"thinking_key": "thinking", "header": "<|start|>assistant", "lead": ""}),
        ("gemma4_v5", {"close": "<turn|>", "call_close": "<|tool_response>"}),
        ("gemma4_v5", {"thinking_key": "reasoning_content", "drops_words": True}),
        ("glm4moe", {"close": "<|user|>", "call_close": "<|observation|>", "lead": "\n"}),
        ("lfm2", {"calls_in_text": True}),
        ("llama3_2", {"drops_words": True, "stop_tokens": ("<|eot_id|>", "</s>")}),
    ],
)
def test_the_facts_of_a_template_are_found_by_asking_it(name, expected):
    """What is found decides every id of a rollout: one template for each fact."""
    format = "auto" if ROWS[name]["own"] != "no-tools" else "fence"
    chat = Chat(tokenizer_of(name), format, [PYTHON])
    assert {fact: getattr(chat.facts, fact) for fact in expected} == expected
    assert chat.tokenizer.convert_ids_to_tokens(chat.stop_ids) == [*chat.facts.stop_tokens]


def test_a_turn_that_a_template_closes_by_two_tokens_ends_at_the_first():
    """Pitfalls 3, 5: the second, Cohere's eos, is glue; a model may end by that one alone."""
    tokenizer = tokenizer_of("cohere2")
    tokenizer.eos_token = "<|END_OF_TURN_TOKEN|>"
    chat = Chat(tokenizer, "json_actions", [PYTHON])
    assert chat.facts.stop_tokens == ("<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>")
    ids, mask = chat.render(
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    )
    assert ids[-1] == chat.stop_ids[0] and mask[-1] == 1
    glue = chat.observation([(Call("python", {"code": "1"}), "5")], closed=True)
    assert glue[0] == chat.stop_ids[1]


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8"])
def test_thinking_can_be_switched_off_where_the_template_lets(name):
    """Pitfall 4: proved like any other; each generation prompt then holds a closed thought."""
    without = Chat(tokenizer_of(name), "auto", [PYTHON], ["enable_thinking=false"])
    plain = Chat(tokenizer_of(name), "auto", [PYTHON])
    question, result = [{"role": "user", "content": "x"}], [(Call("python", {"code": "1"}), "5")]
    for chat, is_off in ((without, True), (without.with_tools([PYTHON]), True), (plain, False)):
        pieces = chat.prompt(question), chat.observation(result, closed=True)
        for text in map(chat.tokenizer.decode, pieces):
            assert text.endswith("<think>\n\n</think>\n\n") == is_off


@pytest.mark.parametrize(
    "option, why",
    [
        ("enable_thinking", "cannot read 'enable_thinking': write name=value"),
        ("enable_thought=false", "enable_thought is no option of this chat template: drop it"),
        ("tools=none", "tools is no option of this chat template: drop it"),
    ],
)
def test_an_option_that_the_template_does_not_have_is_refused(option, why):
    """Pitfall 55: jinja would ignore it."""
    with pytest.raises(UserError) as error:
        Chat(tokenizer_of("qwen3"), "hermes", [PYTHON], [option])
    assert why in str(error.value)

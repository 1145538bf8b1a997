"""Every chat template that trl carries, with every format: proved, or refused for a reason.

    pytest tests/test_templates.py

The table says what is true of each template today. A template is somebody else's text: when a
refusal turns into a proof, or the other way round, this test says which.
"""

import re
from pathlib import Path

import pytest
import trl
from conftest import make_tokenizer

from chat import Chat
from formats import Call
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
}
REFUSALS = {
    "it ignores tool calls": "no-calls",
    "it ignores tools": "no-tools",
    "it writes a call as": "other",
    "stands between generation prompt and answer": "header",  # the model writes its own header
    "no token closes the assistant's turn": "unclosed",
}
# "proved-se": proved, with the differences s and e. Under auto: the format that it finds.
# No template of trl is a Mistral one: tests/test_formats.py has those.
TABLE = """
template                         hermes     llama3     mistral   qwen_xml    fence        auto
cohere                           no-tools   no-tools   no-tools  no-tools    proved-t     no-tools
cohere2                          no-tools   no-tools   no-tools  no-tools    proved       no-tools
cohere2_training                 no-tools   no-tools   no-tools  no-tools    proved       no-tools
cohere_training                  no-tools   no-tools   no-tools  no-tools    proved-t     no-tools
deepseek_r1_distill              no-tools   no-tools   no-tools  no-tools    proved-sw    no-tools
deepseek_r1_distill_training     no-tools   no-tools   no-tools  no-tools    proved-w     no-tools
deepseekv3                       no-tools   no-tools   no-tools  no-tools    proved-sw    no-tools
deepseekv3_training              no-tools   no-tools   no-tools  no-tools    proved-sw    no-tools
diffusion_gemma                  other      other      other     other       proved-t     other
diffusion_gemma_training         other      other      other     other       proved-t     other
gemma                            no-tools   no-tools   no-tools  no-tools    proved-tu    no-tools
gemma3                           no-tools   no-tools   no-tools  no-tools    proved-t     no-tools
gemma3_training                  no-tools   no-tools   no-tools  no-tools    proved-t     no-tools
gemma4                           other      other      other     other       proved-t     other
gemma4_v2                        other      other      other     other       proved-t     other
gemma4_v3                        other      other      other     other       proved-t     other
gemma4_v4                        other      other      other     other       proved-t     other
gemma4_v5                        other      other      other     other       proved-t     other
gemma_training                   no-tools   no-tools   no-tools  no-tools    proved-tu    no-tools
glm4moe                          unclosed   unclosed   unclosed  unclosed    unclosed     unclosed
glm4moe_training                 other      other      other     other       proved-estw  other
gptoss                           header     header     header    header      header       header
gptoss_training                  header     header     header    header      header       header
idefics3                         no-tools   no-tools   no-tools  no-tools    proved       no-tools
idefics3_training                no-tools   no-tools   no-tools  no-tools    proved       no-tools
lfm2                             no-calls   no-calls   no-calls  no-calls    proved       no-calls
lfm2_2_5                         other      other      other     other       proved-s     other
lfm2_2_5_v2                      other      other      other     other       proved-s     other
lfm2_2_5_vl                      other      other      other     other       proved-s     other
lfm2_training                    no-calls   no-calls   no-calls  no-calls    proved       no-calls
lfm2_v2                          other      other      other     other       proved       other
lfm2_v2_training                 other      other      other     other       proved       other
llama3                           no-tools   no-tools   no-tools  no-tools    proved-t     no-tools
llama3_1                         other      proved-t   other     other       proved-t     llama3
llama3_2                         other      proved-dt  other     other       proved-dt    llama3
llama3_training                  no-tools   no-tools   no-tools  no-tools    proved-t     no-tools
llava_next                       no-tools   no-tools   no-tools  no-tools    proved       no-tools
llava_next_training              no-tools   no-tools   no-tools  no-tools    proved       no-tools
muse_glimmer                     header     header     header    header      header       header
muse_glimmer_training            header     header     header    header      header       header
nemotron_3_5_lightning           other      other      other     proved-stw  proved-stw   qwen_xml
nemotron_3_5_lightning_training  other      other      other     proved-stw  proved-stw   qwen_xml
nemotron_3_nano                  other      other      other     proved-stw  proved-stw   qwen_xml
nemotron_3_nano_training         other      other      other     proved-stw  proved-stw   qwen_xml
nemotron_3_super                 other      other      other     proved-stw  proved-stw   qwen_xml
nemotron_3_super_training        other      other      other     proved-stw  proved-stw   qwen_xml
nemotron_3_ultra                 other      other      other     proved-stw  proved-stw   qwen_xml
nemotron_3_ultra_training        other      other      other     proved-stw  proved-stw   qwen_xml
phi3                             no-tools   no-tools   no-tools  no-tools    proved       no-tools
phi3_5                           no-tools   no-tools   no-tools  no-tools    proved       no-tools
phi3_5_training                  no-tools   no-tools   no-tools  no-tools    proved       no-tools
phi3_training                    no-tools   no-tools   no-tools  no-tools    proved       no-tools
qwen2_5                          proved     other      other     other       proved       hermes
qwen2_5_training                 proved     other      other     other       proved       hermes
qwen2_5_vl                       no-tools   no-tools   no-tools  no-tools    proved       no-tools
qwen2_5_vl_training              no-tools   no-tools   no-tools  no-tools    proved       no-tools
qwen3                            proved-es  other      other     other       proved-es    hermes
qwen3_5_nothink                  other      other      other     proved-stw  proved-stw   qwen_xml
qwen3_5_nothink_training         other      other      other     proved-tw   proved-tw    qwen_xml
qwen3_5_think                    other      other      other     proved-stw  proved-stw   qwen_xml
qwen3_5_think_training           other      other      other     proved-t    proved-t     qwen_xml
qwen3_6                          other      other      other     proved-stw  proved-stw   qwen_xml
qwen3_6_training                 other      other      other     proved-t    proved-t     qwen_xml
qwen3_8                          other      other      other     proved-et   proved-et    qwen_xml
qwen3_8_training                 other      other      other     proved-et   proved-et    qwen_xml
qwen3_instruct_2507              proved     other      other     other       proved       hermes
qwen3_instruct_2507_training     proved     other      other     other       proved       hermes
qwen3_training                   proved-e   other      other     other       proved-e     hermes
qwen3_vl                         proved     other      other     other       proved       hermes
qwen3_vl_training                proved     other      other     other       proved       hermes
smolvlm                          no-tools   no-tools   no-tools  no-tools    proved       no-tools
smolvlm_training                 no-tools   no-tools   no-tools  no-tools    proved       no-tools
"""
LINES = [line.split() for line in TABLE.strip().split("\n")]
ROWS = {name: dict(zip(LINES[0][1:], row, strict=True)) for name, *row in LINES[1:]}


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
        assert said.startswith(f"the chat template of {name} cannot be used with format={format}: ")
        assert "\n" not in said and len(said) < 350, f"not one readable sentence: {said}"
        return next((word for words, word in REFUSALS.items() if words in said), said)
    if format == "auto":
        return chat.format_name
    found = "".join(sorted(map(DIFFERENCES.get, chat.differences)))
    return "-".join(["proved", found]).rstrip("-")


def test_the_table_has_every_template():
    """Pitfall 4: no template of trl is left out."""
    assert sorted(ROWS) == sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


@pytest.mark.parametrize("name", ROWS)
def test_a_template_is_proved_or_refused_as_the_table_says(name):
    """Pitfall 4: rendering the whole equals the concatenation, or the difference is declared."""
    assert {format: outcome(name, format) for format in ROWS[name]} == ROWS[name]
    assert outcome(name, "tags") == ROWS[name]["fence"]
    actions = outcome(name, "json_actions")  # no result goes on in a turn: less whitespace differs
    assert actions in (ROWS[name]["fence"], ROWS[name]["fence"].removesuffix("w"))


@pytest.mark.parametrize("name", ROWS)
def test_auto_finds_the_one_format_that_is_proved(name):
    """Or gives the reason that every other format is given."""
    row = ROWS[name]
    own = [row[format] for format in ("hermes", "llama3", "mistral", "qwen_xml")]
    proved = [format for format in row if format != "fence" and row[format].startswith("proved")]
    assert [row["auto"]] == (proved or own[:1]) and len(proved) <= 1
    assert proved or len(set(own)) == 1


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507"])
def test_qwen_is_proved_with_its_own_calls(name):
    """Whatever else the table may come to say."""
    assert ROWS[name]["hermes"].startswith("proved") and ROWS[name]["fence"].startswith("proved")


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2"])
def test_llama_is_proved_with_its_own_calls(name):
    """Whatever else the table may come to say."""
    assert ROWS[name]["llama3"].startswith("proved") and ROWS[name]["fence"].startswith("proved")


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_6", "qwen3_8", "nemotron_3_nano"])
def test_newer_qwen_and_nemotron_are_proved_with_their_own_calls(name):
    """Whatever else the table may come to say."""
    assert ROWS[name]["qwen_xml"].startswith("proved") and ROWS[name]["auto"] == "qwen_xml"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3", {"close": "<|im_end|>", "header": "<|im_start|>assistant", "opening": ""}),
        ("qwen3_5_think", {"opening": "<think>\n", "lead": "\n", "call_lead": "\n"}),
        ("gemma", {"has_system": False, "header": "<start_of_turn>model"}),
        ("llava_next", {"as_parts": True, "lead": " ", "close": "</s>", "stop_tokens": ("</s>",)}),
        ("llama3_2", {"drops_words": True, "stop_tokens": ("<|eot_id|>", "</s>")}),
    ],
)
def test_the_facts_of_a_template_are_found_by_asking_it(name, expected):
    """What is found decides every id of a rollout: one template for each fact."""
    format = ROWS[name]["auto"] if ROWS[name]["auto"] != "no-tools" else "fence"
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

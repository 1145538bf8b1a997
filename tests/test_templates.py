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
from config import UserError

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
    "it writes a call as": "other-calls",
    "stands between generation prompt and answer": "header",  # the model writes its own header
    "no token closes the assistant's turn": "unclosed",
}
# "proved-se": proved, with the differences s and e.
TABLE = """
template                         hermes       llama3       fence
cohere                           no-tools     no-tools     proved-t
cohere2                          no-tools     no-tools     proved
cohere2_training                 no-tools     no-tools     proved
cohere_training                  no-tools     no-tools     proved-t
deepseek_r1_distill              no-tools     no-tools     proved-sw
deepseek_r1_distill_training     no-tools     no-tools     proved-w
deepseekv3                       no-tools     no-tools     proved-sw
deepseekv3_training              no-tools     no-tools     proved-sw
diffusion_gemma                  other-calls  other-calls  proved-t
diffusion_gemma_training         other-calls  other-calls  proved-t
gemma                            no-tools     no-tools     proved-tu
gemma3                           no-tools     no-tools     proved-t
gemma3_training                  no-tools     no-tools     proved-t
gemma4                           other-calls  other-calls  proved-t
gemma4_v2                        other-calls  other-calls  proved-t
gemma4_v3                        other-calls  other-calls  proved-t
gemma4_v4                        other-calls  other-calls  proved-t
gemma4_v5                        other-calls  other-calls  proved-t
gemma_training                   no-tools     no-tools     proved-tu
glm4moe                          unclosed     unclosed     unclosed
glm4moe_training                 other-calls  other-calls  proved-estw
gptoss                           header       header       header
gptoss_training                  header       header       header
idefics3                         no-tools     no-tools     proved
idefics3_training                no-tools     no-tools     proved
lfm2                             no-calls     no-calls     proved
lfm2_2_5                         other-calls  other-calls  proved-s
lfm2_2_5_v2                      other-calls  other-calls  proved-s
lfm2_2_5_vl                      other-calls  other-calls  proved-s
lfm2_training                    no-calls     no-calls     proved
lfm2_v2                          other-calls  other-calls  proved
lfm2_v2_training                 other-calls  other-calls  proved
llama3                           no-tools     no-tools     proved-t
llama3_1                         other-calls  proved-t     proved-t
llama3_2                         other-calls  proved-dt    proved-dt
llama3_training                  no-tools     no-tools     proved-t
llava_next                       no-tools     no-tools     proved
llava_next_training              no-tools     no-tools     proved
muse_glimmer                     header       header       header
muse_glimmer_training            header       header       header
nemotron_3_5_lightning           other-calls  other-calls  proved-stw
nemotron_3_5_lightning_training  other-calls  other-calls  proved-stw
nemotron_3_nano                  other-calls  other-calls  proved-stw
nemotron_3_nano_training         other-calls  other-calls  proved-stw
nemotron_3_super                 other-calls  other-calls  proved-stw
nemotron_3_super_training        other-calls  other-calls  proved-stw
nemotron_3_ultra                 other-calls  other-calls  proved-stw
nemotron_3_ultra_training        other-calls  other-calls  proved-stw
phi3                             no-tools     no-tools     proved
phi3_5                           no-tools     no-tools     proved
phi3_5_training                  no-tools     no-tools     proved
phi3_training                    no-tools     no-tools     proved
qwen2_5                          proved       other-calls  proved
qwen2_5_training                 proved       other-calls  proved
qwen2_5_vl                       no-tools     no-tools     proved
qwen2_5_vl_training              no-tools     no-tools     proved
qwen3                            proved-es    other-calls  proved-es
qwen3_5_nothink                  other-calls  other-calls  proved-stw
qwen3_5_nothink_training         other-calls  other-calls  proved-tw
qwen3_5_think                    other-calls  other-calls  proved-stw
qwen3_5_think_training           other-calls  other-calls  proved-t
qwen3_6                          other-calls  other-calls  proved-stw
qwen3_6_training                 other-calls  other-calls  proved-t
qwen3_8                          other-calls  other-calls  proved-et
qwen3_8_training                 other-calls  other-calls  proved-et
qwen3_instruct_2507              proved       other-calls  proved
qwen3_instruct_2507_training     proved       other-calls  proved
qwen3_training                   proved-e     other-calls  proved-e
qwen3_vl                         proved       other-calls  proved
qwen3_vl_training                proved       other-calls  proved
smolvlm                          no-tools     no-tools     proved
smolvlm_training                 no-tools     no-tools     proved
"""
LINES = [line.split() for line in TABLE.strip().split("\n")]
ROWS = {name: dict(zip(LINES[0][1:], row, strict=True)) for name, *row in LINES[1:]}


def outcome(name, format) -> str:
    template = (TEMPLATES / f"{name}.jinja").read_text()
    special = sorted(set(TOKEN.findall(template)))
    tokenizer = make_tokenizer(template, special, eos="</s>", bos="<s>")
    tokenizer.name_or_path = name
    try:
        differences = Chat(tokenizer, format, [PYTHON]).differences
    except UserError as error:
        said = str(error)
        assert said.startswith(f"the chat template of {name} cannot be used with format={format}: ")
        assert "\n" not in said and len(said) < 350, f"not one readable sentence: {said}"
        return next((word for words, word in REFUSALS.items() if words in said), said)
    return "-".join(["proved", "".join(sorted(map(DIFFERENCES.get, differences)))]).rstrip("-")


def test_the_table_has_every_template():
    """Pitfall 4: no template of trl is left out."""
    assert sorted(ROWS) == sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


@pytest.mark.parametrize("name", ROWS)
def test_a_template_is_proved_or_refused_as_the_table_says(name):
    """Pitfall 4: rendering the whole equals the concatenation, or the difference is declared."""
    assert {format: outcome(name, format) for format in ROWS[name]} == ROWS[name]
    assert outcome(name, "tags") == ROWS[name]["fence"]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507"])
def test_qwen_is_proved_with_its_own_calls(name):
    """Whatever else the table may come to say."""
    assert ROWS[name]["hermes"].startswith("proved") and ROWS[name]["fence"].startswith("proved")


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2"])
def test_llama_is_proved_with_its_own_calls(name):
    """Whatever else the table may come to say."""
    assert ROWS[name]["llama3"].startswith("proved") and ROWS[name]["fence"].startswith("proved")

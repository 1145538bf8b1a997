"""How a model writes a tool call: one class a format, one file a class, used by chat.py.

    write(text, calls) -> the text of a turn;  parse(text) -> its calls

Most are a template's own and are refused on a template that writes another syntax. The last three
are `inline`: a call is text to the template, and the system prompt describes the tools. They suit
almost any template.

    hermes        <tool_call>{"name": ..., "arguments": {...}}</tool_call>    Qwen2.5, Qwen3, ...
    llama3        the whole turn is {"name": ..., "parameters": {...}}        Llama 3.1, 3.2
    mistral       [TOOL_CALLS][{"name": ..., "arguments": {...}, "id": ...}], or
                  [TOOL_CALLS]name[CALL_ID]id[ARGS]{...}, [TOOL_CALLS]name[ARGS]{...}
    qwen_xml      <tool_call><function=name><parameter=key>value</parameter></function></tool_call>
                  Qwen3-Coder, Qwen3.5 and later, Nemotron 3
    harmony        to=functions.name<|channel|>commentary json<|message|>{...}    gpt-oss
    gemma4        <|tool_call>call:name{key:<|"|>text<|"|>}<tool_call|>           Gemma 4
    functiongemma  the same, with other tokens                                   FunctionGemma
    glm           <tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>
                  GLM 4.5 to 5
    pythonic      <|tool_call_start|>[name(key='text')]<|tool_call_end|>    LFM2; other tags, or
                  none: Olmo 3, Llama 4, ToolACE
    atem           to=name<|message|><atem:function_calls>...                 Muse Glimmer
    fence         ```python ... ```, answered in place by ```output ... ```   one tool
    tags          <search> ... </search>, answered by <information> ... </information>
    json_actions  the whole turn is {"thought": ..., "actions": [{"name": ..., "arguments": {...}}]}

In fence and tags the turn stays open, the result is written right behind the call, and a stop
string keeps the model from writing the result itself.

A call that servers' parsers would not accept is not guessed at: it is an error that says why.

A new format: a subclass of base.Format in a file of its own, and a line in FORMATS. What a template
writes, and whether that is one of these formats, proof.py finds out.
"""

from formats.atem import Atem
from formats.base import Call, Format, too_deep
from formats.fence import Fence
from formats.functiongemma import FunctionGemma
from formats.gemma4 import Gemma4
from formats.glm import Glm
from formats.harmony import Harmony
from formats.hermes import Hermes
from formats.json_actions import JsonActions
from formats.llama3 import Llama3
from formats.mistral import Mistral
from formats.pythonic import Pythonic
from formats.qwen_xml import QwenXml
from formats.tags import Tags

__all__ = ["FORMATS", "Call", "Format", "too_deep"]

FORMATS: dict[str, type[Format]] = {
    "hermes": Hermes,
    "llama3": Llama3,
    "mistral": Mistral,
    "qwen_xml": QwenXml,
    "harmony": Harmony,
    "gemma4": Gemma4,
    "functiongemma": FunctionGemma,
    "glm": Glm,
    "pythonic": Pythonic,
    "atem": Atem,
    "fence": Fence,
    "tags": Tags,
    "json_actions": JsonActions,
}

"""Chat templates in the manner of families that no package here carries, for the tests of formats.

Written after the families' public documentation; only what the tests need of them.
"""

# FunctionGemma: the tools in a turn of the developer, results inside of the model's turn.
FUNCTIONGEMMA = """\
{%- macro value(v) -%}
    {%- if v is string -%}{{ '<escape>' + v + '<escape>' }}
    {%- elif v is boolean -%}{{ 'true' if v else 'false' }}
    {%- elif v is mapping -%}{{ '{' }}
        {%- for k, x in v | dictsort -%}{{ k + ':' + value(x) }}{{ ',' if not loop.last }}
        {%- endfor -%}{{ '}' }}
    {%- elif v is sequence -%}{{ '[' }}
        {%- for x in v -%}{{ value(x) }}{{ ',' if not loop.last }}{%- endfor -%}{{ ']' }}
    {%- else -%}{{ v }}{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set has_system = messages[0].role in ('system', 'developer') -%}
{%- if has_system or tools -%}
    {{- '<start_of_turn>developer\\n' -}}
    {{- messages[0].content | trim if has_system -}}
    {%- for tool in tools or [] -%}
        {{- '<start_function_declaration>declaration:' + tool.function.name -}}
        {{- (tool.function | tojson) + '<end_function_declaration>' -}}
    {%- endfor -%}
    {{- '<end_of_turn>\\n' -}}
{%- endif -%}
{%- set state = namespace(open=false) -%}
{%- for m in messages if m.role not in ('system', 'developer') -%}
    {%- if m.role == 'tool' -%}
        {{- 'response:' + m.name + '{value:' + value(m.content) + '}' -}}
        {{- '<end_function_response>' -}}
        {%- set next = loop.nextitem.role if loop.nextitem is defined else '' -%}
        {{- '<start_function_response>' if next == 'tool' -}}
        {%- set state.open = true -%}
    {%- else -%}
        {%- set role = 'model' if m.role == 'assistant' else m.role -%}
        {{- '<start_of_turn>' + role + '\\n' if not state.open -}}
        {{- m.content | trim -}}
        {%- for call in m.tool_calls or [] -%}
            {{- '<start_function_call>call:' + call.function.name -}}
            {{- value(call.function.arguments) + '<end_function_call>' -}}
        {%- endfor -%}
        {{- '<start_function_response>' if m.tool_calls else '<end_of_turn>\\n' -}}
        {%- set state.open = false -%}
    {%- endif -%}
{%- endfor -%}
{{- '<start_of_turn>model\\n' if add_generation_prompt and not state.open -}}
"""
FUNCTIONGEMMA_TOKENS = ["<start_of_turn>", "<end_of_turn>", "<escape>", "<bos>"]
for part in ("declaration", "call", "response"):
    FUNCTIONGEMMA_TOKENS += [f"<start_function_{part}>", f"<end_function_{part}>"]

# Olmo 3: ChatML with calls on lines and results in a turn of the environment.
OLMO3 = """\
{%- for m in messages -%}
    {%- set role = 'environment' if m.role == 'tool' else m.role -%}
    {{- '<|im_start|>' + role + '\\n' + m.content -}}
    {{- '\\n<functions>' + (tools | tojson) + '</functions>' if loop.first and tools -}}
    {%- for call in m.tool_calls or [] -%}
        {{- '<function_calls>' if loop.first else '\\n' -}}
        {{- call.function.name + '(' -}}
        {%- for key, value in call.function.arguments.items() -%}
            {{- key + '=' + (value | tojson) + (', ' if not loop.last else '') -}}
        {%- endfor -%}
        {{- ')' + ('</function_calls>' if loop.last else '') -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt -}}
"""

# Llama 4 and ToolACE: the whole turn is a list of calls.
LISTED_CALLS = """\
{{- bos_token -}}
{%- for m in messages -%}
    {%- set role = 'ipython' if m.role == 'tool' else m.role -%}
    {{- '<|header_start|>' + role + '<|header_end|>\\n\\n' -}}
    {{- (tools | tojson) + '\\n' if loop.first and tools -}}
    {%- for call in m.tool_calls or [] -%}
        {{- '[' if loop.first -}}
        {{- call.function.name + '(' -}}
        {%- for key, value in call.function.arguments.items() -%}
            {{- key + '=' + VALUE + (', ' if not loop.last else '') -}}
        {%- endfor -%}
        {{- ')' + (']' if loop.last else ', ') -}}
    {%- else -%}
        {{- m.content -}}
    {%- endfor -%}
    {{- '<|eot|>' -}}
{%- endfor -%}
{{- '<|header_start|>assistant<|header_end|>\\n\\n' if add_generation_prompt -}}
"""
LISTED_TOKENS = ["<|header_start|>", "<|header_end|>", "<|eot|>", "<|python_start|>"]
LLAMA4 = LISTED_CALLS.replace("VALUE", "(value | tojson)")
# as Python writes True, None and a list; texts without quotes in them
TOOLACE = LISTED_CALLS.replace(
    "VALUE", '("\'" + value + "\'" if value is string else value | string)'
)

# GLM 4.7 and 5: the thought is opened by the prompt, and no line breaks stand between tags.
GLM47 = """\
{{- '[gMASK]<sop>' -}}
{{- '<|system|>' + (tools | tojson) if tools -}}
{%- for m in messages -%}
    {%- if m.role == 'tool' -%}
        {{- '<|observation|>' if loop.previtem.role != 'tool' -}}
        {{- '<tool_response>' + m.content + '</tool_response>' -}}
    {%- elif m.role == 'assistant' -%}
        {{- '<|assistant|>' + ('' if '<think>' in m.content else '<think></think>') -}}
        {{- m.content -}}
        {%- for call in m.tool_calls or [] -%}
            {{- '\\n' if m.content or not loop.first -}}
            {{- '<tool_call>' + call.function.name -}}
            {%- for key, value in call.function.arguments.items() -%}
                {{- '<arg_key>' + key + '</arg_key><arg_value>' -}}
                {{- value if value is string else value | tojson -}}
                {{- '</arg_value>' -}}
            {%- endfor -%}
            {{- '</tool_call>' -}}
        {%- endfor -%}
    {%- else -%}
        {{- '<|' + m.role + '|>' + m.content -}}
    {%- endif -%}
{%- endfor -%}
{{- '<|assistant|><think>' if add_generation_prompt -}}
"""
GLM_TOKENS = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
GLM_TOKENS += ["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>"]
GLM_TOKENS += ["</arg_value>", "<tool_response>", "</tool_response>", "<think>", "</think>"]

# name -> (template, control tokens, the token that is eos)
FAMILIES = {
    "functiongemma": (FUNCTIONGEMMA, FUNCTIONGEMMA_TOKENS, "<end_of_turn>"),
    "olmo3": (OLMO3, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "llama4": (LLAMA4, LISTED_TOKENS, "<|eot|>"),
    "toolace": (TOOLACE, LISTED_TOKENS, "<|eot|>"),
    "glm4_7": (GLM47, GLM_TOKENS, "<|user|>"),
}

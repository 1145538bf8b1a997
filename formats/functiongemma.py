"""functiongemma: Gemma 4's syntax with the tokens of FunctionGemma."""

from formats.gemma4 import Gemma4


class FunctionGemma(Gemma4):
    """As gemma4, between <start_function_call> and <end_function_call>, quoted by <escape>."""

    styles = ("None", "null")
    style = styles[0]
    call_start = "<start_function_call>"
    call_end = "<end_function_call>"
    quote = "<escape>"
    example = (
        "<start_function_call>call:<tool>{<key>:<escape><text><escape>,<key>:<number>}"
        "<end_function_call>"
    )

"""How vLLM serves what was trained: the command, with the parser that reads the model's calls.

print(serve_command("out/calc", chat))
"""

import shlex
from pathlib import Path

from learning import model as models

# Format -> the name of vLLM's parser for it, as in --tool-call-parser. An inline format has none.
PARSERS = {
    "hermes": "hermes",
    "llama3": "llama3_json",
    "mistral": "mistral",
    "qwen_xml": "qwen3_coder",
    "harmony": "openai",
    "gemma4": "gemma4",
    "functiongemma": "functiongemma",
    "atem": "muse_glimmer",
}
# Of formats that have one for each spelling.
GLM_PARSERS = {"\n": "glm45", "": "glm47"}
PYTHONIC_PARSERS = {
    "<|tool_call_start|>": "lfm2",
    "<function_calls>": "olmo3",
    "": "pythonic",
}
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM takes as --max-lora-rank


def parser_of(chat) -> str:
    """Names vLLM's parser for the calls of a chat's format; "" where it has none."""
    if chat.format_name == "glm":
        return GLM_PARSERS[chat.format.style]
    if chat.format_name == "pythonic":
        return PYTHONIC_PARSERS[chat.format.style.start]
    return PARSERS.get(chat.format_name, "")


def serve_command(folder: str, chat) -> str:
    """Writes the command that serves a trained model, or an adapter over its base, with its calls
    read; says so where its calls stay text."""
    folder = str(folder)
    words = ["vllm", "serve", models.base_of(folder)]
    settings = models.adapter_settings(folder)
    if settings:
        rank = next((rank for rank in LORA_RANKS if rank >= settings["r"]), settings["r"])
        words += ["--enable-lora", "--max-lora-rank", str(rank)]
        words += ["--lora-modules", f"{Path(folder).name}={folder}"]
        template = Path(folder) / "chat_template.jinja"
        if template.is_file():  # the base may have another one
            words += ["--chat-template", str(template)]
    parser = parser_of(chat)
    if chat.tools and parser:
        words += ["--enable-auto-tool-choice", "--tool-call-parser", parser]
    command = shlex.join(words)
    if chat.tools and not parser:
        command += f"   # vLLM has no parser for format={chat.format_name}: calls stay in the text"
    return command

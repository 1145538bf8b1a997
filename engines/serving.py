"""How vLLM serves: what was trained, with the parser that reads the model's calls; and to whom
trains, with what training needs of a server.

print(serve_command("out/calc", chat))
print(start_command("out/calc_sft", full="float32", max_tokens=256))
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


def start_command(
    name: str, full: str = "", lora_r: int = 0, max_tokens: int = 0, has_images: bool = False
) -> str:
    """Writes the command that starts a server for training.

    name: the model, or an adapter over it. full: the trainer's dtype where full weights will go
    over; lora_r: the rank where adapters will. Other options, such as the port, are the user's.
    """
    environment = []
    base = models.base_of(name) if models.is_adapter(name) else name
    words = ["vllm", "serve", base]
    words += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    if max_tokens:
        words += ["--max-model-len", str(max_tokens)]
    if full:
        environment = ["VLLM_SERVER_DEV_MODE=1", "PYTHONPATH=."]
        words += ["--dtype", "float32" if full == "float32" else "bfloat16"]
        words += ["--worker-extension-cls", "engines.worker.Worker"]
    elif lora_r:
        environment = ["VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"]
        # two: turns that are being sampled keep the one that they began with
        words += ["--enable-lora", "--max-lora-rank", str(_room_for(lora_r)), "--max-loras", "2"]
    if has_images:
        words += ["--enable-scale-out"]
    return " ".join([*environment, shlex.join(words)])


def _room_for(rank: int) -> int:
    """Picks the --max-lora-rank for adapters of this rank."""
    return next((room for room in LORA_RANKS if room >= rank), rank)


def serve_command(folder: str, chat) -> str:
    """Writes the command that serves a trained model, or an adapter over its base, with its calls
    read; says so where its calls stay text."""
    folder = str(folder)
    settings = models.adapter_settings(folder)
    template = Path(folder) / "chat_template.jinja"
    return command_for(
        models.base_of(folder),
        chat,
        has_calls=bool(chat.tools),
        adapter=folder if settings else "",
        lora_r=settings.get("r", 0),
        template=str(template) if template.is_file() else "",  # the base may have another one
    )


def command_for(
    model: str,
    chat,
    has_calls: bool,
    adapter: str = "",
    lora_r: int = 0,
    template: str = "",
) -> str:
    """Writes the command that serves a model, with an adapter and the template of that over it."""
    words = ["vllm", "serve", model]
    if adapter:
        words += ["--enable-lora", "--max-lora-rank", str(_room_for(lora_r))]
        words += ["--lora-modules", f"{Path(adapter).name}={adapter}"]
        if template:
            words += ["--chat-template", template]
    parser = parser_of(chat)
    if has_calls and parser:
        words += ["--enable-auto-tool-choice", "--tool-call-parser", parser]
    command = shlex.join(words)
    if has_calls and not parser:
        command += f"   # vLLM has no parser for format={chat.format_name}: calls stay in the text"
    return command

"""The line that says how to serve what was trained: its parser is vLLM's, and reads these calls.

    pytest tests/test_serving.py

Pinned here: each parser that is named exists in vLLM's registry, read from its source where it is
installed; an adapter is served over its base; where there is no parser, that is said.
"""

import ast
import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from test_chat import ADD, PYTHON, schema
from test_formats import WRITERS, chat_of

from engines.serving import (
    GLM_PARSERS,
    PARSERS,
    PYTHONIC_PARSERS,
    parser_of,
    serve_command,
    start_command,
)
from formats import FORMATS
from formats.glm import Glm
from formats.pythonic import Pythonic
from learning import model as models
from tasks import tiny as tiny_model

NAMED = {*PARSERS.values(), *GLM_PARSERS.values(), *PYTHONIC_PARSERS.values()}


def registered() -> set[str]:
    """The names in vLLM's table of parsers, without importing it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None:
        pytest.skip("vllm is not installed")
    source = Path(spec.submodule_search_locations[0]) / "tool_parsers" / "__init__.py"
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.Assign) and "PARSERS" in ast.unparse(node.targets[0]):
            return {ast.literal_eval(key) for key in node.value.keys}
    raise AssertionError(f"no table of parsers in {source}")


def test_each_parser_is_in_the_registry_of_vllm():
    """vLLM refuses to start with a name that it does not know."""
    assert NAMED <= registered()


def test_every_native_format_has_a_parser_and_no_inline_one():
    """A new format has to say which it is; so does a new spelling."""
    own = {name for name, format in FORMATS.items() if not format.inline}
    assert own == {*PARSERS, "glm", "pythonic"}
    assert set(GLM_PARSERS) == set(Glm.styles)
    assert set(PYTHONIC_PARSERS) == {style.start for style in Pythonic.styles}
    for name in WRITERS:
        assert parser_of(chat_of(name, [ADD])) in NAMED
    assert parser_of(chat_of("glm4_7", [ADD])) == "glm47"
    assert parser_of(chat_of("olmo3", [ADD])) == "olmo3"
    assert parser_of(chat_of("chatml", [PYTHON], "fence")) == ""


@pytest.fixture
def folder(tmp_path):
    """A whole model."""
    made = tmp_path / "a model"
    tokenizer = tiny_model.tiny_tokenizer([[{"role": "user", "content": "a b"}]], [])
    models.save(tiny_model.tiny(tokenizer, layers=1), tokenizer, made)
    return made


def test_a_whole_model_is_served_with_its_parser(folder):
    """The folder is quoted; without tools there is nothing to parse."""
    command = serve_command(folder, chat_of("chatml", [ADD]))
    parsed = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    assert shlex.split(command) == ["vllm", "serve", str(folder), *parsed]
    bare = serve_command(folder, chat_of("chatml", []))
    assert shlex.split(bare) == ["vllm", "serve", str(folder)]
    inline = serve_command(folder, chat_of("chatml", [PYTHON], "fence"))
    assert inline.endswith("# vLLM has no parser for format=fence: calls stay in the text")
    assert shlex.split(inline, comments=True) == ["vllm", "serve", str(folder)]


@pytest.mark.parametrize(("rank", "shown"), [(4, "8"), (32, "32"), (48, "64")])
def test_an_adapter_is_served_over_its_base(folder, tmp_path, rank, shown):
    """With room for its rank, its name, and the template that it was trained with."""
    adapter = tmp_path / "adapter"
    model, tokenizer = models.load(str(folder), "lora", "float32", "cpu", lora_r=rank)
    models.save(model, tokenizer, adapter)
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == rank
    words = shlex.split(serve_command(adapter, chat_of("qwen3_8", [ADD])))
    assert words[:3] == ["vllm", "serve", str(folder)]
    options = dict(zip(words[4::2], words[5::2], strict=False))
    assert words[3] == "--enable-lora" and options["--max-lora-rank"] == shown
    assert options["--lora-modules"] == f"adapter={adapter}"
    assert options["--chat-template"] == str(adapter / "chat_template.jinja")
    assert words[-3:] == ["--enable-auto-tool-choice", "--tool-call-parser", "qwen3_coder"]


def test_a_server_for_training_is_started_for_what_will_go_over(folder):
    """Full weights: by the class that is there; adapters: with room for their rank."""
    words = shlex.split(start_command(str(folder), full="mixed", max_tokens=256))
    assert words[:5] == [
        "VLLM_SERVER_DEV_MODE=1",
        "PYTHONPATH=.",
        "vllm",
        "serve",
        str(folder),
    ]
    options = dict(zip(words[5::2], words[6::2], strict=True))
    assert options["--dtype"] == "bfloat16" and options["--max-model-len"] == "256"
    module, _, name = options["--worker-extension-cls"].rpartition(".")
    assert callable(getattr(importlib.import_module(module), name).take_weights)
    words = shlex.split(start_command(str(folder), lora_r=48, has_images=True))
    assert words[0] == "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" and words[-1] == "--enable-scale-out"
    assert "--worker-extension-cls" not in words
    assert words[words.index("--max-lora-rank") + 1] == "64"


def rows_of_the_docs() -> list[list[str]]:
    """The table of docs/formats.md -> [format, families, call, parsers] of each."""
    text = (Path(__file__).parent.parent / "docs" / "formats.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| `") and "--" not in line]
    return [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
    ]


def test_the_docs_have_a_row_for_each_format():
    """None is forgotten, and its parsers are those that the line after training names."""
    rows = rows_of_the_docs()
    assert {row[0].strip("`") for row in rows} == set(FORMATS)
    several = {"glm": GLM_PARSERS.values(), "pythonic": PYTHONIC_PARSERS.values()}
    for name, _, _, parsers in rows:
        name = name.strip("`")
        named = set(several.get(name, [PARSERS.get(name, "none")]))
        assert set(parsers.split(", ")) == named, name


WEATHER = schema("weather", city="string")


@pytest.mark.parametrize("row", rows_of_the_docs(), ids=lambda row: row[0])
def test_the_call_of_each_row_is_read(row):
    """It is what that format reads as a call of weather(city="Paris")."""
    name = row[0].strip("`")
    if name == "fence":  # shown in two halves, and its tool is another
        assert "```python" in row[2] and "```output" in row[2]
        return
    [call] = FORMATS[name]([WEATHER]).parse(row[2].removeprefix("`").removesuffix("`"))
    assert (call.name, call.arguments, call.error) == ("weather", {"city": "Paris"}, "")

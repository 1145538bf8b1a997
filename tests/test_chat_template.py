"""--chat_template=file.jinja: tools for models whose own template shows none.

    pytest tests/test_chat_template.py

Pinned here: the shipped template is proved for SmolLM2 and Qwen2.5-VL, whose own are refused; a
model is saved with it, so that the next program needs no key; and what is no template is said.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import trl
from conftest import make_tokenizer
from test_chat import ADD, PYTHON, SYSTEM, USER

import train_grpo
import train_sft
from chat import Call, Chat
from evaluate import Config as EvaluationConfig
from evaluate import for_evaluation
from formats.messages import assistant_message
from learning import model as models
from player import Player
from run.config import UserError
from tasks import tiny as tiny_model

SHIPPED = "chatml_tools.jinja"
# As SmolLM2's own: ChatML, a system prompt of its own where there is none, no tools.
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are SmolLM.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_VL = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5_vl.jinja").read_text()
VISION = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
OWN = {
    "smollm2": (SMOLLM2, ["<|im_start|>", "<|im_end|>"]),
    "qwen2_5_vl": (QWEN_VL, ["<|im_start|>", "<|im_end|>", *VISION]),
}
REAL = Path(__file__).parent.parent / "out" / "smollm2"


def tokenizer_of(name):
    template, special = OWN[name]
    return make_tokenizer(template, special)


@pytest.mark.parametrize("name", OWN)
def test_the_shipped_template_is_proved_where_the_own_one_is_refused(name):
    """With native calls, to the letter: nothing is to be declared."""
    tokenizer = tokenizer_of(name)
    with pytest.raises(UserError, match="it ignores tools; use format=json_actions, fence or tags"):
        Chat(tokenizer, "auto", [ADD])
    models.set_chat_template(tokenizer, SHIPPED)
    chat = Chat(tokenizer, "auto", [ADD])
    assert (chat.format_name, chat.differences) == ("hermes", ())
    shown = tokenizer.decode(chat.prompt([SYSTEM, USER]))
    assert json.dumps(ADD) in shown and "system\nBe brief.\n\n# Tools" in shown
    calls = [Call("add", {"a": 2, "b": 3}), Call("add", {"a": 7, "b": 3})]
    results = [{"role": "tool", "name": "add", "content": text} for text in ("5", "10")]
    talk = [SYSTEM, USER, assistant_message("I add.", calls), *results, assistant_message("So.")]
    ids, mask = chat.render(talk)
    whole = tokenizer.apply_chat_template(talk, tools=[ADD], tokenize=False)
    assert tokenizer.decode(ids) == whole.removesuffix("\n") and 0 < sum(mask) < len(mask)


def test_the_shipped_template_takes_images_as_qwen2_5_vl_does():
    """The same tokens in the place of an image as its own template writes."""
    tokenizer = tokenizer_of("qwen2_5_vl")
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    talk = [{"role": "user", "content": parts}]
    own = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    models.set_chat_template(tokenizer, SHIPPED)
    assert own == tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)


def test_the_shipped_template_is_short():
    """The docs say that it can be read and changed."""
    text = (models.TEMPLATES / SHIPPED).read_text()
    assert len(text.splitlines()) <= 36


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no model in {REAL}: make real puts it there")
def test_smollm2_itself_is_proved_with_the_shipped_template():
    """The real tokenizer, where it is on this machine."""
    chat = Chat(models.load_tokenizer(str(REAL), SHIPPED), "auto", [PYTHON])
    assert (chat.format_name, chat.differences) == ("hermes", ())


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory):
    """A tiny model whose template shows no tools."""
    folder = tmp_path_factory.mktemp("plain")
    talk = [[USER, assistant_message("It is 5.")]]
    tokenizer = tiny_model.tiny_tokenizer(talk, [])
    tokenizer.chat_template = SMOLLM2
    models.save(tiny_model.tiny(tokenizer, layers=1), tokenizer, folder)
    return folder


def test_a_model_is_saved_with_its_template_and_the_next_program_finds_it(plain_model, tmp_path):
    """train_sft.py gets the key, train_grpo.py and evaluate.py need none."""
    rows = tmp_path / "rows.jsonl"
    call = [Call("python", {"code": "print(5)"})]
    result = {"role": "tool", "name": "python", "content": "5"}
    talk = [USER, assistant_message("", call), result, assistant_message("5")]
    rows.write_text(json.dumps({"messages": talk}) + "\n")
    made = tmp_path / "made"
    cfg = train_sft.Config(
        model=str(plain_model), data=str(rows), out_dir=str(made), batch_size=1, save_every=0
    )
    with pytest.raises(UserError, match="it ignores tools"):
        train_sft.train(cfg)
    train_sft.train(replace(cfg, chat_template=SHIPPED))
    wanted = (models.TEMPLATES / SHIPPED).read_text()
    assert models.load_tokenizer(str(made)).chat_template == wanted

    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps({"prompt": "2+3?", "answer": "5"}) + "\n")
    playing = train_grpo.Config(model=str(made), data=str(task), max_tokens=1024)
    player = Player.of(playing)
    assert player.chat.format_name == "hermes" and "# Tools" in player.chat.tokenizer.decode(
        player.chat.prompt([USER])
    )
    with pytest.raises(UserError, match="it ignores tools"):
        Player.of(replace(playing, model=str(plain_model)))
    assert Player.of(replace(playing, model=str(plain_model), chat_template=SHIPPED)).chat


def test_a_run_that_is_evaluated_does_not_look_for_the_file_again():
    """It saved the template with its model; the file may be gone, or of another folder."""
    cfg = train_grpo.Config(chat_template="gone.jinja")
    assert for_evaluation(cfg, EvaluationConfig(run="out/x"), "out/x").chat_template == ""
    other = for_evaluation(cfg, EvaluationConfig(run="out/x"), "out/other")
    assert other.chat_template == "gone.jinja"


def test_what_is_no_template_is_said(plain_model, tmp_path):
    """One sentence each: no file, no text, no Jinja."""
    with pytest.raises(UserError, match="chat_template = 'nope.jinja': no such file; looked for"):
        models.load_tokenizer(str(plain_model), "nope.jinja")
    odd = tmp_path / "odd.jinja"
    odd.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="odd.jinja' cannot be read as text"):
        models.load_tokenizer(str(plain_model), str(odd))
    odd.write_text("{% for m in messages %}")
    with pytest.raises(UserError, match="cannot be used with format=auto: it raises .Unexpected"):
        Chat(models.load_tokenizer(str(plain_model), str(odd)), "auto", [ADD])

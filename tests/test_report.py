"""Pins what a run leaves behind and draws: metrics.jsonl and rollouts.jsonl over a resume, the
loggers, and report.html, whose data must survive whatever a model writes.

    python -m pytest -q tests/test_report.py
"""

import base64
import html.parser
import io
import json
import random
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from images import Picture
from run import config
from run import log as run_log
from run import page as run_page
from run.log import Log
from trajectory import ToolCall, Trajectory, escaped, show, token_kinds, token_texts

ROOT = Path(__file__).parent.parent
HOSTILE = "</script><img src=x onerror=alert(1)><!-- <script>&lt;{{data}} \u2028 \u202e 😀 汉字"


def trajectory(tokenizer, result="3", error=None, said="It is 3.") -> Trajectory:
    """One call in turn 0, the answer in turn 1; what each token is, is found out."""
    t = Trajectory({"answer": "3"}, group=1, sample=2)
    kinds = []

    def add(text, kind):
        ids = tokenizer.encode(text, add_special_tokens=False)
        kinds.extend(kind * len(ids))
        if kind == "t":
            t.add(ids, 1, [-0.5] * len(ids))
        else:
            t.add(ids, 0)

    add("<|im_start|>user\nwhat is the sum of 1 and 2? 3<|im_end|>\n<|im_start|>assistant\n", "c")
    t.turn_starts.append(len(t.ids))
    add('<tool_call>\n{"name": "add"}\n</tool_call><|im_end|>', "t")
    t.calls.append(ToolCall(0, "add", {"a": 1, "b": 2}, result, error, 0.25))
    add("\n<|im_start|>user\n<tool_response>\n", "c")
    add(result, "e" if error else "o")
    add("\n</tool_response><|im_end|>\n", "c")
    add("<|im_start|>assistant\n", "c")
    t.turn_starts.append(len(t.ids))
    add(f"{said}<|im_end|>", "t")
    t.stop, t.rewards, t.reward = "answered", {"correct": 1.0}, 1.0
    assert token_kinds(t, token_texts(t.ids, tokenizer)) == "".join(kinds)
    return t


def a_log(out_dir, **more) -> run_log.Log:
    return run_log.Log(out_dir, steps=10, columns={"loss": "6.3f"}, **more)


def run(out_dir, steps, **more) -> None:
    """A run that logs these steps, and ends."""
    with a_log(out_dir, **more) as log:
        for step in steps:
            log.step({"step": step, "loss": step / 10})


class Scripts(html.parser.HTMLParser):
    """The script elements of a page, as an HTML parser (not a pattern) sees them, and all tags."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += data


def data_of(out_dir) -> dict:
    """The data in a report.html, read as strictly as a browser reads JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    page = Scripts((out_dir / "report.html").read_text(encoding="utf-8"))
    assert len(page.scripts) == 2, "the data, and the script that draws it"
    return json.loads(page.scripts[0], parse_constant=refuse)


# Resume


def test_a_resumed_run_drops_the_rows_of_the_steps_that_it_will_play_again(tmp_path, tokenizer):
    """Pitfall 52: the log goes on where the checkpoint was, whatever came after it."""
    with a_log(tmp_path) as log:
        for step in range(6):
            log.step({"step": step, "loss": step / 3})
            log.rollouts([trajectory(tokenizer)] * 2, tokenizer, step=step)
    names = ("metrics.jsonl", "rollouts.jsonl")
    before = [(tmp_path / name).read_bytes().splitlines(keepends=True) for name in names]
    for name in names:
        with open(tmp_path / name, "ab") as file:
            file.write(b'{"step": 6, "loss": 0.')  # the process was killed here
    log = a_log(tmp_path, start=4)
    kept = [(tmp_path / name).read_bytes().splitlines(keepends=True) for name in names]
    assert kept == [before[0][:4], before[1][:8]]
    assert log.progress.tasks[log.bar].completed == 4


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_with_empty_files(tmp_path):
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        (tmp_path / name).write_text('{"step": 0}\n{"step": 1}\n{"st')
    a_log(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert (tmp_path / "rollouts.jsonl").read_text() == ""


def test_a_kill_while_rows_are_dropped_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    """Pitfall 53, for the log: the new file is whole before it takes the old one's name."""
    run(tmp_path, range(4))
    before = (tmp_path / "metrics.jsonl").read_text()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_log.os, "fsync", full)
    with pytest.raises(OSError):
        a_log(tmp_path, start=2)
    assert (tmp_path / "metrics.jsonl").read_text() == before


DAMAGED = {  # lines that a run did not write
    "no JSON": b'{"step": 1, "loss"\n',
    "another object": b'{"name": "somebody else"}\n',
    "no object": b"[1, 2]\n",
    "bytes": b"\xff\x00\xfe\n",
    "a step that is none": b'{"step": "one"}\n',
    "nothing": b"\n",
    "too deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_lines_stay_and_are_told_when_a_run_goes_on(damage, name, tmp_path, capsys):
    """B9: they were deleted without a word; all rows that can be read are there still, too."""
    line = DAMAGED[damage]
    rows = [b'{"step": %d, "loss": 0.5}\n' % step for step in range(4)]
    (tmp_path / name).write_bytes(b"".join([*rows[:2], line, *rows[2:], b'{"step": 4, "lo']))
    a_log(tmp_path, start=3)
    assert (tmp_path / name).read_bytes() == b"".join([*rows[:2], line, rows[2]])
    said = capsys.readouterr().err
    assert f"{name} is damaged, line 3 of it is no row of a step: left as it is" in said
    assert said.count("\n") == 1
    run(tmp_path, (3,), start=3)  # and the page is drawn
    assert data_of(tmp_path)["steps"] == (4 if name == "metrics.jsonl" else 1)


def test_a_whole_row_without_its_line_break_is_kept(tmp_path, capsys):
    """B9."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n{"step": 1}')
    a_log(tmp_path, start=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 0}\n{"step": 1}\n'
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("what", ["step", "rollouts", "sync"])
def test_a_disk_that_is_full_ends_a_run_in_a_sentence(what, tmp_path, tokenizer, monkeypatch):
    """B9: whatever of its log is written."""

    def full(*_):
        raise OSError(28, "No space left on device")

    told = "cannot write the log in .* \\(No space left on device\\): .*--resume=true"
    with pytest.raises(config.UserError, match=told), a_log(tmp_path) as log:
        if what == "step":
            log.metrics.close()
            log.metrics = types.SimpleNamespace(write=full, close=full)
            log.step({"step": 0, "loss": 1.0})
        elif what == "sync":
            monkeypatch.setattr(run_log.os, "fsync", full)
            log.sync()
        else:
            monkeypatch.setattr(run_log, "write_rollouts", full)
            log.rollouts([], tokenizer)


def test_a_terminal_that_is_gone_does_not_end_a_run(tmp_path):
    """B6: also where the line of a step is printed, which comes before it is saved."""

    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    with a_log(tmp_path) as log:
        log.progress.console.file = Gone()
        log.step({"step": 0, "loss": 1.0})
        log.print("saved")
    assert data_of(tmp_path)["steps"] == 1


def test_sync_puts_the_metrics_on_disk(tmp_path, monkeypatch):
    synced = []
    with a_log(tmp_path) as log:
        log.step({"step": 0, "loss": 0.5})
        monkeypatch.setattr(run_log.os, "fsync", synced.append)
        log.sync()
        assert synced == [log.metrics.fileno()]
    assert run_page.read(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 0.5}]


def test_reading_leaves_out_a_torn_last_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "loss": 1.5}\n{"step": 1, "lo\xf0\x9f')
    assert run_page.read(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 1.5}]


# Loggers


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for wandb that keeps what it is told; the real one would open connections."""
    told = types.SimpleNamespace(inits=[], logged=[], ends=[])

    def init(**how):
        told.inits.append(how)
        return types.SimpleNamespace(
            log=lambda numbers, step: told.logged.append((step, numbers)), finish=told.ends.append
        )

    module = types.ModuleType("wandb")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_logger_that_is_not_installed_is_refused_before_anything_is_touched(
    name, tmp_path, monkeypatch
):
    run(tmp_path, range(3))
    monkeypatch.setitem(sys.modules, run_log.LOGGERS[name], None)  # importing it fails
    for refused in (lambda: run_log.check_logger(name), lambda: a_log(tmp_path, logger=name)):
        with pytest.raises(config.UserError, match=re.escape('pip install -e ".[log]"')):
            refused()
    assert len(run_page.read(tmp_path / "metrics.jsonl")) == 3


def test_an_unknown_logger_is_refused_with_the_names_of_the_known():
    with pytest.raises(
        config.UserError, match="'wandbb': expected one of none, wandb, tensorboard"
    ):
        run_log.check_logger("wandbb")
    assert run_log.check_logger("none") is None


def test_wandb_gets_the_settings_and_the_finite_numbers_of_each_step(tmp_path, wandb):
    with a_log(tmp_path, logger="wandb", settings={"seed": 3}) as log:
        log.step({"step": 0, "loss": 0.5, "kl": float("nan"), "accuracy": None, "note": "x"})
    (how,) = wandb.inits
    assert how["project"] == "nanotool" and how["dir"] == str(tmp_path)
    assert how["config"] == {"seed": 3}
    assert wandb.logged == [(0, {"step": 0, "loss": 0.5})]
    assert wandb.ends == [0]


def test_a_resumed_run_goes_on_in_the_same_wandb_run_and_a_new_one_in_another(tmp_path, wandb):
    run(tmp_path, range(3), logger="wandb")
    run(tmp_path, range(2, 4), logger="wandb", start=2)
    run(tmp_path, range(1), logger="wandb")
    first, resumed, fresh = wandb.inits
    assert first["id"] == resumed["id"] != fresh["id"]
    assert resumed["resume"] == "allow"


def test_a_run_that_fails_ends_as_failed_in_wandb(tmp_path, wandb):
    with pytest.raises(ZeroDivisionError), a_log(tmp_path, logger="wandb"):
        raise ZeroDivisionError
    assert wandb.ends == [1]


def test_tensorboard_reads_one_value_for_each_step_of_a_resumed_run(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with a_log(tmp_path, logger="tensorboard") as log:
        for step in range(5):
            log.step({"step": step, "loss": 1.0, "accuracy": None})
    with a_log(tmp_path, logger="tensorboard", start=3) as log:
        for step in range(3, 6):
            log.step({"step": step, "loss": 2.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"step", "loss"}
    seen = [(event.step, event.value) for event in events.Scalars("loss")]
    assert seen == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


# Rollouts


def test_a_row_has_one_advantage_for_each_turn_or_none(tmp_path, tokenizer):
    played = [trajectory(tokenizer) for _ in range(3)]
    with a_log(tmp_path) as log:
        played[0].advantages, played[1].advantages = [0.5, 0.5], [-1.1234567, 2.0]
        log.rollouts(played, tokenizer, step=7)
        log.rollouts(played[2:], tokenizer, step=8)
    rows = [json.loads(line) for line in open(tmp_path / "rollouts.jsonl")]
    assert [row["advantages"] for row in rows] == [[0.5, 0.5], [-1.12346, 2.0], None, None]
    assert [row["step"] for row in rows] == [7, 7, 7, 8]
    assert "".join(rows[0]["pieces"]) == rows[0]["text"]
    assert len(rows[0]["pieces"]) == len(rows[0]["ids"])


@pytest.mark.parametrize(
    "text", ["hello 😀😀 é", "汉字汉字", "a\ufffdb", " 👩‍👩‍👧 the", "😀" * 30, ""]
)
def test_a_character_split_over_tokens_is_shown_once_and_whole(text, tokenizer):
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = token_texts(ids, tokenizer)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert ("😀" in pieces) == ("😀" in text)


def test_bytes_that_are_no_text_do_not_stop_or_shift_the_pieces(tokenizer):
    for seed in range(50):
        ids = random.Random(seed).choices(range(len(tokenizer)), k=40)
        assert "".join(token_texts(ids, tokenizer)) == tokenizer.decode(ids)
    emoji = tokenizer.encode("😀", add_special_tokens=False)
    stray = [emoji[1]] * 3  # then come the bytes of a whole character
    assert token_texts(stray + emoji, tokenizer)[-1] == "😀"


class ByteTokenizer:
    """Each byte is a token; counts what it decodes."""

    decoded = 0

    def decode(self, ids, skip_special_tokens):
        self.decoded += len(ids)
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize(
    "data",
    [
        "😀".encode() * 1000,
        "é".encode() * 2000,
        "汉\ufffd".encode() * 700,
        "a\ufffd".encode() * 1000,
        b"\xff" * 4000,
        b"\xf0" * 4000,
        b"\x80" * 4000,
        b"\xf0\x9f" * 2000,
        b"\xff" * 2000 + "😀".encode() * 500,
        random.Random(0).randbytes(4000),
    ],
)
def test_tokens_that_are_bytes_take_a_time_that_is_linear(data):
    """C4: it was quadratic."""
    tokenizer = ByteTokenizer()
    pieces = token_texts(list(data), tokenizer)
    assert tokenizer.decoded <= 60 * len(data)
    assert len(pieces) == len(data)
    assert "".join(pieces) == data.decode("utf-8", "replace")
    assert ("😀" in pieces) == ("😀" in "".join(pieces))


def test_a_tokenizer_that_strips_the_first_space_keeps_those_between_words():
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b"]
    model = models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True)
    inner = Tokenizer(model)  # as in Llama 2
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    strip = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), *strip])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    pieces = token_texts(tokenizer.encode("a b 😀😀 a"), tokenizer)
    assert [piece for piece in pieces if piece] == ["a", " ", "b", " ", "😀", "😀", " ", "a"]


def on_the_page(tmp_path, tokenizer, t) -> dict:
    """What the page holds of a rollout."""
    run_log.write_rollouts(tmp_path / "rollouts.jsonl", [t], tokenizer, step=0)
    run_page.page(tmp_path)
    (row,) = data_of(tmp_path)["rollouts"]
    return row


def text_of(row, kind) -> str:
    pairs = zip(row["pieces"], row["kinds"], strict=True)
    return "".join(piece for piece, letter in pairs if letter == kind)


@pytest.mark.parametrize("result", ["3", "two\nlines 😀", "assistant", "😀", ""])
def test_the_page_marks_trained_context_and_tool_as_the_trajectory_recorded_them(
    result, tmp_path, tokenizer
):
    row = on_the_page(tmp_path, tokenizer, trajectory(tokenizer, result))
    assert text_of(row, "o") == result
    call = '<tool_call>\n{"name": "add"}\n</tool_call><|im_end|>'
    assert text_of(row, "t") == call + "It is 3.<|im_end|>"
    assert text_of(row, "c").startswith("<|im_start|>user\nwhat is the sum of 1 and 2? 3")
    assert "e" not in row["kinds"]
    trained = [int(kind == "t") for kind in row["kinds"]]
    written = json.loads((tmp_path / "rollouts.jsonl").read_text())
    assert trained == written["mask"] and written["kinds"] == row["kinds"]


def test_the_result_of_a_call_that_failed_is_marked_as_an_error(tmp_path, tokenizer):
    row = on_the_page(tmp_path, tokenizer, trajectory(tokenizer, "no such tool", "unknown_tool"))
    assert text_of(row, "e") == "no such tool"
    assert "o" not in row["kinds"]


@pytest.mark.parametrize("old", ["without kinds", "with none"])
def test_a_row_without_kinds_is_marked_by_its_mask(old, tmp_path, tokenizer):
    run_log.write_rollouts(tmp_path / "rollouts.jsonl", [trajectory(tokenizer)], tokenizer)
    row = json.loads((tmp_path / "rollouts.jsonl").read_text())
    if old == "with none":
        row["kinds"] = ""
    else:
        del row["kinds"]
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(row) + "\n")
    run_page.page(tmp_path)
    (shown,) = data_of(tmp_path)["rollouts"]
    assert shown["kinds"] == "".join("ct"[bit] for bit in row["mask"])


# The page


def test_the_page_loads_nothing(tmp_path):
    """The template has no address to load from, and forbids it to whatever might get in. The one
    link is to a file in `images`, the one picture a copy in the data."""
    run(tmp_path, range(3))
    page = Scripts((tmp_path / "report.html").read_text(encoding="utf-8"))
    parts = [(ROOT / "run" / f"page.{kind}") for kind in ("html", "css", "js")]
    text = "".join(part.read_text(encoding="utf-8") for part in parts)
    assert text.count("href: place ?? name") == text.count("href") == 1
    assert text.count('setAttribute("src", copy)') == text.count('"src"') == 1
    assert not re.search(r"https?:|\bsrc *=|\.src\b|@import|url\(|innerHTML|document\.write", text)
    assert re.search(r"img-src data:\W", text)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "default-src 'none'" in text
    assert "{{data}}" not in page.scripts[1] and text.count("{{data}}") == 1


def test_nothing_that_a_model_or_a_tool_writes_gets_out_of_the_data(tmp_path, tokenizer):
    t = trajectory(tokenizer, result=HOSTILE, error="exception", said=HOSTILE)
    t.calls[0].name, t.calls[0].arguments = HOSTILE, {HOSTILE: [HOSTILE, "\ud800 alone"]}
    t.example["answer"], t.rewards, t.stop = HOSTILE, {HOSTILE: 1.0}, HOSTILE
    with a_log(tmp_path) as log:
        log.step({"step": 0, "loss": 0.1, HOSTILE: 1.0})
        t.advantages = [1.0, -1.0]
        log.rollouts([t], tokenizer, step=0)
    (tmp_path / "config.py").write_text(f"system_prompt = {HOSTILE!r}\n", encoding="utf-8")
    run_page.page(tmp_path)
    blank = tmp_path / "blank"
    blank.mkdir()
    run_page.page(blank)
    tags = [Scripts((d / "report.html").read_text("utf-8")).tags for d in (tmp_path, blank)]
    assert tags[0] == tags[1]
    data = data_of(tmp_path)
    (row,) = data["rollouts"]
    assert HOSTILE in "".join(row["pieces"]) and row["answer"] == HOSTILE
    assert row["calls"][0]["arguments"] == {HOSTILE: [HOSTILE, "\ud800 alone"]}
    assert data["metrics"][HOSTILE] == [1.0]
    assert data["settings"][0][1] == repr(HOSTILE)


# Images


def seen(sizes, tokenizer, tool_shows=1):
    """A trajectory with pictures of these sizes, of which the last few are of a call."""
    mark = tokenizer.convert_tokens_to_ids("<think>")
    pictures = []
    for number, size in enumerate(sizes, 1):
        ids = [5, *[mark] * (number + 1), 6]
        image = Image.effect_noise(size, 80).convert("RGB")
        picture = Picture(image, ids=ids, placeholder=mark, tokens=number + 1, key=number)
        pictures.append(picture)
    of_tool = pictures[len(pictures) - tool_shows :]
    t = Trajectory({"answer": "3"})

    def text(words):
        return tokenizer.encode(words, add_special_tokens=False)

    for picture in pictures[: len(pictures) - tool_shows]:
        t.add(text("user ") + picture.ids, 0, images=[picture])
    t.turn_starts.append(len(t.ids))
    t.add(text("zoom<|im_end|>"), 1, [-0.5] * len(text("zoom<|im_end|>")))
    call = ToolCall(0, "zoom", {}, "", None, 0.25)
    for picture in of_tool:
        call.images.append(picture.key)
        label = f"image {picture.key}:"
        call.result += label
        t.add(text(label) + picture.ids, 0, images=[picture])
    call.result += " seen"
    t.calls.append(call)
    t.add(text(" seen"), 0)
    t.turn_starts.append(len(t.ids))
    t.add(text("3<|im_end|>"), 1, [-0.5] * len(text("3<|im_end|>")))
    t.stop, t.rewards, t.reward = "answered", {"correct": 1.0}, 1.0
    return t


def test_a_rollout_is_written_and_drawn_with_its_images_in_their_places(tmp_path, tokenizer):
    """Each with its number, size and tokens, and which tool drew it; its copy is small."""
    t = seen([(40, 30), (900, 600), (20, 20), (30, 50)], tokenizer, tool_shows=2)
    row = on_the_page(tmp_path, tokenizer, t)
    written = json.loads((tmp_path / "rollouts.jsonl").read_text())
    assert row["images"] == written["images"] and row["image_spans"] == written["image_spans"]
    for (first, end), picture in zip(row["image_spans"], t.images, strict=True):
        assert t.ids[first:end] == picture.ids
        assert row["kinds"][first:end] == "i" * len(picture.ids)
        assert row["pieces"][first:end] == [""] * len(picture.ids)
    assert row["kinds"].count("i") == sum(len(picture.ids) for picture in t.images)
    assert text_of(row, "o") == "image 3:image 4: seen" and row["calls"][0]["images"] == [3, 4]
    images = data_of(tmp_path)["images"]
    for name, picture in zip(row["images"], t.images, strict=True):
        with Image.open(tmp_path / name) as whole:
            assert whole.size == picture.shown.size
        assert (images[name]["width"], images[name]["height"]) == picture.shown.size
        copy = base64.b64decode(images[name]["copy"].partition(",")[2])
        assert max(Image.open(io.BytesIO(copy)).size) <= run_page.THUMBNAIL


@pytest.mark.parametrize("broken", ["no ids", "one picture too many", "other ids"])
def test_a_trajectory_whose_ids_do_not_hold_its_images_is_written_all_the_same(
    broken, tmp_path, tokenizer, capsys
):
    """Such as an API's; and one that is dropped for it must not end the run when it is logged."""
    t = seen([(40, 30), (20, 20)], tokenizer)
    if broken == "no ids":
        t.ids, t.mask, t.logprobs, t.turn_starts = [], [], [], [0, 0]
        tokenizer = None
    elif broken == "one picture too many":
        t.images.append(t.images[0])
    else:
        t.ids[t.ids.index(5) + 2] = 7
    row = on_the_page(tmp_path, tokenizer, t)
    assert row["image_spans"] == [] and len(row["images"]) == len(t.images)
    assert "i" not in row["kinds"]
    if tokenizer:
        show(t, tokenizer)
        assert "<think>" in capsys.readouterr().out


def test_copies_of_images_are_bounded_and_those_beyond_are_links(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(run_page, "THUMBNAIL_BYTES", 200_000)
    ts = [seen([(300, 300)], tokenizer, tool_shows=0) for _ in range(8)]
    for number, t in enumerate(ts, 1):
        t.images[0].key = number
    run_log.write_rollouts(tmp_path / "rollouts.jsonl", ts, tokenizer)
    run_page.page(tmp_path)
    images = data_of(tmp_path)["images"].values()
    copies = [image["copy"] for image in images if "copy" in image]
    assert 0 < len(copies) < 8 and sum(map(len, copies)) <= 200_000
    assert [image["width"] for image in images] == [300] * 8


def test_only_images_of_the_run_are_opened_and_those_that_are_gone_are_told(tmp_path, tokenizer):
    """A file of rollouts may be anybody's."""
    t = seen([(40, 30), (30, 30), (20, 30)], tokenizer)
    run_log.write_rollouts(tmp_path / "rollouts.jsonl", [t], tokenizer)
    row = json.loads((tmp_path / "rollouts.jsonl").read_text())
    t.images[0].shown.save(tmp_path / "secret.png")
    (tmp_path / row["images"][1]).unlink()
    (tmp_path / row["images"][2]).write_bytes(b"\x89PNG broken")
    row["images"][0] = "images/../secret.png"
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(row) + "\n")
    run_page.page(tmp_path)
    data = data_of(tmp_path)
    assert data["rollouts"][0]["images"] == ["", *row["images"][1:]]
    assert set(data["images"].values()) == {None}


@pytest.mark.parametrize("spans", [None, [], [[0, 9999]], [[5, 2]], ["ab"], [[1, 2], [0, 3]], 7])
def test_images_whose_places_are_not_known_are_shown_below(spans, tmp_path, tokenizer):
    """Of an older run, or of an API, which tells no tokens."""
    t = seen([(40, 30)], tokenizer, tool_shows=0)
    run_log.write_rollouts(tmp_path / "rollouts.jsonl", [t], tokenizer)
    row = json.loads((tmp_path / "rollouts.jsonl").read_text())
    row["image_spans"] = spans
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(row) + "\n")
    run_page.page(tmp_path)
    (shown,) = data_of(tmp_path)["rollouts"]
    assert shown["image_spans"] == [] and len(shown["images"]) == 1


def test_a_terminal_names_images_where_they_stand(tokenizer, capsys, tmp_path, monkeypatch):
    """In the place of a thousand placeholders; play.py saves them, and has a rough view."""
    import play

    monkeypatch.chdir(tmp_path)
    t = seen([(40, 30), (20, 20)], tokenizer)
    show(t, tokenizer)
    said = capsys.readouterr().out
    assert (
        "user \n[image 1: 40 x 30 pixels, 4 tokens]\nzoom<|im_end|>image 2:\n[image 2: 20" in said
    )
    assert "<think>" not in said
    for name in ("play", "play-2"):
        play.show_rollout(t, tokenizer, play.save_images(t))
        said = capsys.readouterr().out
        assert f"[image 2: 20 x 20 pixels, 5 tokens → out/{name}/image_2.png]" in said
        assert Image.open(f"out/{name}/image_2.png").size == (20, 20)
    view = play.half_blocks(Image.new("RGB", (400, 100), "red"))
    assert view.plain == ("▀" * 48 + "\n") * 6
    assert str(view.spans[0].style) == "#ff0000 on #ff0000"


def test_of_many_rollouts_the_page_shows_some_of_all_steps_and_says_how_many_there_are(
    tmp_path, tokenizer
):
    for step in range(500):
        run_log.write_rollouts(
            tmp_path / "rollouts.jsonl", [trajectory(tokenizer)], tokenizer, step=step
        )
    run_page.page(tmp_path)
    data = data_of(tmp_path)
    steps = [row["step"] for row in data["rollouts"]]
    assert data["written"] == 500 and len(steps) == run_page.ROLLOUTS
    assert steps[0] == 0 and steps[-1] == 499
    assert {b - a for a, b in zip(steps, steps[1:], strict=False)} == {2, 3}


def test_of_long_rollouts_the_page_shows_fewer(tmp_path, tokenizer, monkeypatch):
    played = [trajectory(tokenizer)] * 20
    run_log.write_rollouts(tmp_path / "rollouts.jsonl", played, tokenizer, step=0)
    size = (tmp_path / "rollouts.jsonl").stat().st_size
    monkeypatch.setattr(run_page, "ROLLOUT_BYTES", size // 4)
    run_page.page(tmp_path)
    assert len(data_of(tmp_path)["rollouts"]) == 5


def test_of_thousands_of_steps_the_page_shows_means_and_loses_no_rare_metric(tmp_path):
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(3500):
            row = {"step": step, "loss": float(step)} | ({"rare": 7.0} if step % 500 == 3 else {})
            file.write(json.dumps(row) + "\n")
    run_page.page(tmp_path)
    data = data_of(tmp_path)
    metrics = data["metrics"]
    assert data["steps"] == 3500 and data["thinned"] == 4
    assert len(metrics["step"]) <= run_page.POINTS
    assert metrics["step"][:2] == [3, 7] and metrics["loss"][:2] == [1.5, 5.5]
    assert [value for value in metrics["rare"] if value is not None] == [7.0] * 7


def test_what_is_no_finite_number_is_a_gap(tmp_path, tokenizer):
    t = trajectory(tokenizer)
    t.reward, t.logprobs[-1] = float("nan"), float("-inf")
    t.calls[0].arguments = {"a": float("inf")}  # python's json reads it from a model's text
    with a_log(tmp_path) as log:
        log.step({"step": 0, "loss": float("nan"), "kl": None, "note": "text"})
        log.step({"step": 1, "loss": 2.0, "kl": float("inf")})
        t.advantages = [float("nan"), 1.0]
        log.rollouts([t], tokenizer, step=0)
    data = data_of(tmp_path)
    assert data["metrics"] == {"step": [0, 1], "loss": [None, 2.0]}
    assert data["rollouts"][0]["reward"] == "NaN"
    assert data["rollouts"][0]["calls"][0]["arguments"] == {"a": "Infinity"}


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_without_rollouts_or_metrics_has_a_page_too(steps, tmp_path):
    run(tmp_path, range(steps))
    data = data_of(tmp_path)
    assert data["steps"] == steps and data["rollouts"] == [] and data["settings"] == []
    assert (tmp_path / "curves.png").exists() == (steps > 0)


def test_rows_without_pieces_are_shown_as_ids(tmp_path, tokenizer):
    run_log.write_rollouts(tmp_path / "rollouts.jsonl", [trajectory(tokenizer)], tokenizer)
    row = json.loads((tmp_path / "rollouts.jsonl").read_text())
    del row["pieces"], row["advantages"]
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(row) + "\n")
    run_page.page(tmp_path)
    (shown,) = data_of(tmp_path)["rollouts"]
    assert shown["pieces"] == [f"{token} " for token in row["ids"]]
    assert shown["advantages"] is None


def test_the_page_says_which_settings_differ_from_the_defaults_of_their_script(tmp_path):
    import train_grpo
    import train_sft

    for script in (train_grpo, train_sft):
        cfg = config.parse(script.Config, ["--out_dir=x", "--seed=11"])
        config.save(cfg, tmp_path / "config.py")
        run_page.page(tmp_path)
        settings = data_of(tmp_path)["settings"]
        changed = {name for name, value, default in settings if value != default}
        assert changed == config.changed(cfg) == {"out_dir", "seed"}
        assert ["seed", "11", "0"] in settings


# The end of a run


def test_a_run_that_ends_by_an_exception_is_drawn(tmp_path):
    with pytest.raises(ZeroDivisionError), a_log(tmp_path) as log:
        log.step({"step": 0, "loss": 0.5})
        raise ZeroDivisionError
    assert (tmp_path / "curves.png").exists()
    assert data_of(tmp_path)["steps"] == 1


def test_a_failure_to_draw_neither_hides_what_ended_a_run_nor_ends_a_good_one(
    tmp_path, monkeypatch, capsys
):
    def curves(out_dir):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_page, "curves", curves)
    with pytest.raises(ZeroDivisionError), a_log(tmp_path) as log:
        log.step({"step": 0, "loss": 0.5})
        raise ZeroDivisionError
    run(tmp_path, [0])
    assert capsys.readouterr().out.count("curves failed: OSError: [Errno 28] No space left") == 2
    assert data_of(tmp_path)["steps"] == 1  # the page was drawn all the same


def test_the_command_draws_both_again_and_says_where(tmp_path):
    run(tmp_path, range(2))
    (tmp_path / "curves.png").unlink()
    (tmp_path / "report.html").unlink()
    command = [sys.executable, "-m", "run.page"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "curves.png").exists() and data_of(tmp_path)["steps"] == 2


@pytest.mark.parametrize("argv", [[], ["nowhere"], ["--run=out/calc"], ["a", "b"]])
def test_the_command_says_what_it_expects(argv):
    with pytest.raises(config.UserError, match=r"run\.page out/calc|metrics\.jsonl"):
        run_page.main(argv)


def test_help_prints_how_to_draw_a_run():
    command = [sys.executable, "-m", "run.page", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "python -m run.page out/calc" in done.stdout


def test_what_is_measured_seldom_is_drawn_as_it_is():
    """The running mean is over steps, not over points, as in report.html."""
    assert run_page._running_mean([0, 5, 10], [0.0, 1.0, 0.5], 5) == [0.0, 1.0, 0.5]
    assert run_page._running_mean([0, 1, 2, 3], [0.0, 1.0, 2.0, 6.0], 2) == [
        0.0,
        0.5,
        1.5,
        4.0,
    ]


def panel(rows, *keys):
    """({label: line}, the texts of the legend) of what is drawn in a panel."""
    axes = Figure().add_subplot()
    run_page._draw_panel(axes, "accuracy", list(keys), rows)
    lines = {line.get_label(): line for line in axes.get_lines()}
    legend = axes.get_legend()
    texts = [text.get_text() for text in legend.get_texts()] if legend else []
    return lines, texts


def test_held_out_points_are_markers_with_a_line_and_say_that_they_are_greedy():
    rows = [{"step": step, "accuracy": step / 10} for step in range(6)]
    rows[0]["val_accuracy"] = 0.3
    rows[5]["val_accuracy"] = 0.9
    lines, legend = panel(rows, "accuracy", "val_accuracy")
    assert legend == ["sampled", "held out, greedy"]
    held_out = lines["held out, greedy"]
    assert held_out.get_marker() == "o" and held_out.get_linestyle() == "-"
    assert list(held_out.get_xdata()) == [0, 5] and list(held_out.get_ydata()) == [0.3, 0.9]
    assert lines["sampled"].get_marker() == "None"  # the running mean; its points have no label
    _, legend = panel(rows, "accuracy")
    assert legend == []


CONTROLS = {
    "clears the screen": ("\x1b[2J\x1b[H", "\\x1b[2J\\x1b[H"),
    "fills the clipboard": ("\x1b]52;c;aGk=\x07", "\\x1b]52;c;aGk=\\x07"),
    "is C1": ("\x9b31m\x90q\x9c", "\\x9b31m\\x90q\\x9c"),
    "turns the line around": ("\u202eabc\u2066x\u2069", "\\u202eabc\\u2066x\\u2069"),
    "writes over the line": ("right\rwrong\b\b", "right\\rwrong\\x08\\x08"),
    "is no character": ("\x00\x7f", "\\x00\\x7f"),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_what_a_model_says_cannot_act_on_the_terminal(name, tokenizer, capsys, tmp_path):
    """C6: in the conversation, in a call, in the answer and in a line of the log."""
    raw, shown = CONTROLS[name]
    ids = tokenizer.encode(f"Look: {raw}.", add_special_tokens=False)
    trajectory = Trajectory({"answer": raw}, stop="answered")
    trajectory.add(ids, 1, [-1.0] * len(ids))
    trajectory.turn_starts = [0]
    trajectory.calls = [ToolCall(0, f"find{raw}", {"x": raw}, "ok", None, 0.1)]
    show(trajectory, tokenizer)
    said = capsys.readouterr().out
    assert f"Look: {shown}." in said and f"find{shown}(" in said
    assert not any(character in said for character in set(raw) if not character.isprintable())
    with Log(tmp_path, 1, {}) as log:
        log.print(f"reward failed on {raw}")
    assert f"reward failed on {shown}\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", CONTROLS)
def test_what_servers_and_tools_say_cannot_act_on_the_terminal(name, capsys, monkeypatch):
    """C6: what an engine's server, a chat API or a tool of a made-up rollout says."""
    import evaluate
    import play
    from engines.chat_api import ChatApi
    from engines.servers import ServerEngine

    raw, shown = CONTROLS[name]
    engine = types.SimpleNamespace(events=[])
    ServerEngine._tell(engine, f"http://a was lost ({raw})")
    ChatApi("http://127.0.0.1:1/v1", "m")._note(f"says ({raw})")
    said = capsys.readouterr().err
    assert said == f"http://a was lost ({shown})\nhttp://127.0.0.1:1/v1 says ({shown})\n"
    evaluate.table({"model": f"m{raw}[/red]", "data": "d[bold]", "a": raw, "b": 0.5, "c": None})
    said = capsys.readouterr().out
    assert "[/red]" in said and "[bold]" in said  # no markup
    t = Trajectory({"answer": raw}, messages=[{"role": "assistant", "content": raw}])
    t.stop = "answered"
    t.calls = [ToolCall(0, f"find{raw}", {}, f"failed: {raw}", "exception", 0.1)]
    play.tell_notes(play.doubts(t, "correct"))
    said += capsys.readouterr().out
    assert f"tool: find{shown} failed (exception): failed: {shown}\n" in said
    assert not any(character in said for character in set(raw) if not character.isprintable())


def test_what_people_write_is_shown_as_it_is():
    """C6: line breaks, tabs, other scripts, joined emoji."""
    for text in ("a\n\tb", "naïve 数学 ١٢", "👩‍🔬 ﷺ ñ", "\u3000\xa0"):
        assert escaped(text) == text


@pytest.mark.parametrize(
    "width, names",
    [
        (200, "reward accuracy tool_call_rate new_tokens loss grad_norm seconds"),
        (111, "reward accuracy tool_call_rate new_tokens loss seconds"),
        (100, "reward accuracy tool_call_rate new_tokens loss"),
        (80, "reward accuracy tool_call_rate loss"),
        (40, "reward accuracy"),
        (10, ""),
        (0, "reward accuracy tool_call_rate new_tokens loss grad_norm seconds"),  # a file
    ],
)
def test_the_line_of_a_step_has_the_columns_that_the_terminal_has_room_for(width, names, tmp_path):
    """D5: it wrapped at 100."""
    import train_grpo

    out = io.StringIO()
    with run_log.Log(tmp_path, 1, train_grpo.COLUMNS) as log:
        log.progress.console.file = out
        log.progress.console._force_terminal = width > 0
        log.progress.console.width = width or 10
        log.step({"step": 0} | dict.fromkeys(train_grpo.COLUMNS, 0.5))
    (line,) = [line for line in out.getvalue().splitlines() if line.startswith("step ")]
    assert not width or len(line) <= width
    assert re.findall(r"[a-z_]+", line) == ["step", *names.split()]


FOREIGN = {
    "an object": {"name": "somebody else"},
    "no ids": {"ids": None},
    "ids that are none": {"ids": "abc"},
    "fewer pieces": {"pieces": ["a"]},
    "pieces that are none": {"pieces": [1, 2, 3]},
    "no mask": {"kinds": None, "mask": None},
    "a mask of another length": {"kinds": None, "mask": [1]},
    "no calls": {"calls": None},
    "calls that are texts": {"calls": ["add"]},
    "arguments that are none": {"calls": [{"name": "add", "arguments": "1, 2"}]},
    "turns that are none": {"turn_starts": [None]},
    "logprobs that are none": {"logprobs": 0.5},
    "rewards that are none": {"rewards": [1.0]},
    "images that are none": {"images": "abc"},
    "numbers of images that are none": {"calls": [{"name": "add", "images": ["1"]}]},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_rows_are_left_out_of_the_page_and_told(name, tmp_path, tokenizer, capsys):
    """B9: rows of another program, or of a damaged file, were a traceback."""
    run_log.write_rollouts(tmp_path / "rollouts.jsonl", [trajectory(tokenizer)] * 2, tokenizer)
    text = (tmp_path / "rollouts.jsonl").read_text()
    row = json.loads(text.splitlines()[0])
    foreign = FOREIGN[name] if name == "an object" else row | FOREIGN[name]
    (tmp_path / "rollouts.jsonl").write_text(f"{json.dumps(foreign)}\n{text}[]\n\n")
    metrics = [{"step": 0, "loss": 0.5}, {"loss": 1}, {"step": None}, {"step": 1, "loss": "high"}]
    metrics += [{"step": 2, "loss": 10**400}, {"step": 3, "loss": 1e308}, "row", None]
    lines = [json.dumps(row) for row in metrics]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "config.py").write_text("import os\nseed = 1\na, b = 1, 2\nx += 1\n")
    run_page.main([str(tmp_path)])
    data = data_of(tmp_path)
    assert len(data["rollouts"]) == 2 and data["steps"] == 4
    assert data["settings"][0][:2] == ["seed", "1"]
    assert (tmp_path / "curves.png").exists()
    said = capsys.readouterr().err
    assert "metrics.jsonl: 4 lines are no rows of a run and are left out" in said
    assert "rollouts.jsonl: 3 lines are no rows of a run and are left out" in said


@pytest.mark.parametrize("text", ["seed = ", "\0", "(" * 1000, "1 + 1\n"])
def test_a_config_that_is_none_has_no_settings_on_the_page(text, tmp_path):
    """B9."""
    (tmp_path / "config.py").write_text(text)
    run(tmp_path, (0,))
    assert data_of(tmp_path)["settings"] == []

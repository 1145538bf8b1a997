"""Pins config.py: what is read from where, and the sentence for everything that can be mistyped.

pytest tests/test_config.py
"""

import errno
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

import train_grpo
import train_sft
from run import config, names
from run.config import UserError, parse, split

ROOT = str(config.HERE)


@dataclass
class Config:
    model: str = "Qwen/Qwen3-0.6B"
    system_prompt: str = ""
    steps: int = 100
    learning_rate: float = 2e-5
    clip_low: float = 0.2
    loss: Literal["dapo", "grpo", "dr_grpo", "gspo", "cispo"] = "dapo"
    resume: bool = False
    tools: tuple[str, ...] = ("python",)
    lengths: tuple[int, ...] = ()
    beta: float | None = None
    suffix: str | None = None


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(text, name="calc.py"):
    with open(name, "w") as file:
        file.write(text)
    return ["--config", name]


def complaint(argv, **options):
    with pytest.raises(UserError) as caught:
        parse(Config, argv, **options)
    return str(caught.value)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults():
    argv = write("steps = 7\nlearning_rate = 1e-4\n")
    cfg = parse(Config, argv + ["--steps=9"])
    assert (cfg.steps, cfg.learning_rate, cfg.clip_low) == (9, 1e-4, 0.2)
    assert parse(Config, ["--steps=9"] + argv) == cfg  # also before --config
    assert parse(Config, ["--config=calc.py", "--steps=9"]) == cfg
    assert parse(Config, []) == Config()


def test_values_of_the_command_line_are_read_as_their_type():
    texts = "--steps=1e3 --learning_rate=1 --resume=true --tools=a,b.py:c --lengths=1,2 --beta=.5"
    cfg = parse(Config, texts.split())
    assert cfg == Config(
        steps=1000, learning_rate=1.0, resume=True, tools=("a", "b.py:c"), lengths=(1, 2), beta=0.5
    )
    assert type(cfg.steps) is int and type(cfg.learning_rate) is float
    assert parse(Config, ["--tools="]).tools == ()
    assert parse(Config, ["--steps=12345678901234567891"]).steps == 12345678901234567891
    assert parse(Config, ["--beta=none", "--suffix=none"]) == Config()
    assert parse(Config, ["--model=none"]).model == "none"
    assert parse(Config, ["--system_prompt=a=b --c"]).system_prompt == "a=b --c"


def test_values_of_a_file_are_fitted_to_their_type():
    cfg = parse(Config, write("steps = 1e3\nlearning_rate = 1\ntools = ['a']\nbeta = None"))
    assert cfg == Config(steps=1000, learning_rate=1.0, tools=("a",))
    assert type(cfg.steps) is int and type(cfg.learning_rate) is float


BAD_VALUES = [
    ("clip_low", "'big'", "expected float"),
    ("clip_low", "nan", "expected float"),
    ("clip_low", "inf", "expected float"),
    ("steps", "1.5", "expected int"),
    ("resume", "1", "expected true or false"),
    ("beta", "'big'", "expected float or none"),
    ("lengths", "1.5,2", "expected a tuple of int"),
    ("tools", "a,,b", "expected a tuple of str"),
    ("loss", "'dapoo'", "expected one of dapo, grpo, dr_grpo, gspo, cispo"),
    ("loss", "''", "expected one of dapo, grpo, dr_grpo, gspo, cispo"),
]


@pytest.mark.parametrize("key, value, expected", BAD_VALUES)
def test_a_value_of_the_wrong_type_on_the_command_line_names_the_expected_one(key, value, expected):
    text = value.strip("'")
    assert complaint([f"--{key}={text}"]) == f"{key} = {text!r}: {expected}"


@pytest.mark.parametrize(
    "key, value, expected",
    BAD_VALUES[:1]
    + [
        ("steps", "True", "expected int"),
        ("steps", "1.5", "expected int"),
        ("steps", "'5'", "expected int"),
        ("learning_rate", "True", "expected float"),
        ("resume", "1", "expected true or false"),
        ("tools", "'python'", "expected a tuple of str"),
        ("tools", "None", "expected a tuple of str"),
        ("tools", "(1,)", "expected a tuple of str"),
        ("model", "3", "expected str"),
        ("loss", "'dapoo'", "expected one of dapo, grpo, dr_grpo, gspo, cispo"),
        ("loss", "[]", "expected one of dapo, grpo, dr_grpo, gspo, cispo"),
    ],
)
def test_a_value_of_the_wrong_type_in_a_file_names_the_file_too(key, value, expected):
    argv = write(f"{key} = {value}")
    assert complaint(argv) == f"{key} = {eval(value)!r} in calc.py: {expected}"


def test_a_float_that_is_not_finite_is_refused_in_a_file():
    assert (
        complaint(write("beta = float('nan')")) == "beta = nan in calc.py: expected float or none"
    )
    assert complaint(write("steps = 10**400 * 1.0")).startswith("calc.py, line 1: OverflowError")


def test_an_unknown_key_names_the_nearest():
    hint = "did you mean learning_rate?"
    assert complaint(write("learnig_rate = 1")) == f"unknown key 'learnig_rate' in calc.py: {hint}"
    assert complaint(["--learnig_rate=1"]) == f"unknown key 'learnig_rate': {hint}"
    assert complaint(["--learning-rate=1"]) == f"unknown key 'learning-rate': {hint}"
    assert complaint(["--zzz=1"]) == "unknown key 'zzz': --help lists the keys"
    says = (
        "unknown key 'zzz' in calc.py: --help lists the keys, and a name of your own starts with _"
    )
    assert complaint(write("zzz = 1")) == says


@pytest.mark.parametrize(
    "key, ours",
    [
        ("max_steps", "steps; SFT: epochs"),
        ("scale_rewards", "adv_norm: group, batch, none"),
        ("num_generations", "group_size"),
        ("Num-Generations", "group_size"),
        ("n", "group_size"),
        ("actor_rollout_ref.rollout.n", "group_size"),
        ("algorithm.kl_coef", "beta (k3, verl's low_var_kl)"),
        ("epsilon_high", "clip_low, clip_high; of cispo TRL's bound is ours plus one"),
        ("max_seq_length", "max_tokens, of the whole trajectory; a prompt is never cut"),
        ("importance_sampling_level", "loss=gspo"),
        ("use_vllm", "engine=vllm"),
        ("warmup_ratio", "warmup, in steps"),
        ("save_total_limit", "save_every; two checkpoints stay"),
        ("top_p", "none: training on a distribution that was cut is biased"),
        ("canary", "--engine_options=canary=false"),
        ("sleep", "--engine_options=sleep=false, of engine=vllm"),
        ("rloo", "--adv_norm=rloo"),
    ],
)
def test_a_name_of_another_trainer_or_an_old_key_is_translated(key, ours):
    """D2: by spelling, max_steps is near max_tokens and scale_rewards near rewards."""
    says = f"in nanotool, {ours} (docs/coming_from_trl.md)"
    assert complaint([f"--{key}=1"]) == f"unknown key {key!r}: {says}"
    if key.isidentifier():
        assert complaint(write(f"{key} = 1")) == f"unknown key {key!r} in calc.py: {says}"


def test_a_key_of_the_other_script_is_translated():
    """D2: epochs are SFT's, steps are GRPO's."""
    for cls, key in ((train_grpo.Config, "epochs"), (train_sft.Config, "steps")):
        with pytest.raises(UserError, match=f"^unknown key '{key}': in nanotool, .*SFT: epochs"):
            parse(cls, [f"--{key}=3"])
        assert key not in cls.__dataclass_fields__


def test_the_table_of_names_is_one_and_says_what_there_is():
    """D2: each key that it answers with is one of a script's Config, or an option of an engine."""
    table = names._read()
    assert len(table) > 100
    classes = (train_grpo.Config, train_sft.Config)
    keys = {name for cls in classes for name in cls.__dataclass_fields__}
    assert not [name for name in table if name in keys and name not in table[name]]
    for line in names.TABLE.read_text().splitlines():
        cells = line.strip("|").split(" | ")
        if not line.startswith("|") or len(cells) != 2:
            continue
        for key in re.findall(r"`-{0,2}(\w+)[=`]", cells[1]):
            assert key in keys | WORDS, f"{key} in {line}"


# What the right column has beside keys.
WORDS = set("token-mean dapo grpo low_var_kl cispo token_truncate token_mask WANDB_PROJECT".split())
WORDS |= {"entropy", "sequence_mask", "messages", "Config", "async"}


@pytest.mark.parametrize(
    "argv, instead",
    [
        ("--learning_rate", "--learning_rate=2e-5"),
        ("--learning_rate 1e-4", "--learning_rate=1e-4"),
        ("--learning_rate --steps=3", "--learning_rate=2e-5"),
        ("--resume", "--resume=true"),
        ("--tools", "--tools=python"),
        ("--beta", "--beta=none"),
        ("--system_prompt", "--system_prompt=…"),
        ("lr=3", "--lr=3"),
        ("-steps=3", "--steps=3"),
        ("aime.py", "--config aime.py"),
        ("--config", "--config calc.py"),
        ("--config=", "--config calc.py"),
        ("--config --steps=3", "--config calc.py"),
        ("hello", "--key=value or --config file.py"),
    ],
)
def test_what_cannot_be_read_is_answered_with_what_to_write(argv, instead):
    item = argv.split()[0]
    assert complaint(argv.split()) == f"cannot read {item!r}: write {instead}"


def test_a_key_given_twice_is_refused():
    assert complaint(["--steps=1", "--steps=1"]) == "--steps is given twice: keep one of them"
    argv = write("") * 2
    assert complaint(argv) == "--config is given twice: keep one of them"


def test_a_config_file_is_looked_for_here_then_in_configs(tmp_path, monkeypatch):
    looked = "looked for nope.py and configs/nope.py"
    assert complaint(["--config", "nope.py"]) == f"no config file 'nope.py'; {looked}"
    assert complaint(["--config", "/no/nope.py"]) == "no config file '/no/nope.py'"
    monkeypatch.setattr(config, "HERE", tmp_path / "project")
    (tmp_path / "project" / "configs").mkdir(parents=True)
    (tmp_path / "project" / "configs" / "calc.py").write_text("steps = 1")
    assert parse(Config, ["--config", "calc.py"]).steps == 1
    write("steps = 2")
    assert parse(Config, ["--config", "calc.py"]).steps == 2
    assert parse(Config, ["--config", str(tmp_path / "calc.py")]).steps == 2


def test_a_config_file_may_import_and_calculate_and_have_private_names():
    text = """
import math, os.path
from pathlib import Path
from math import sqrt, pi
_third = 1 / 3
steps: int = int(sqrt(16)) * 2
beta = _third
"""
    assert parse(Config, write(text)) == Config(steps=8, beta=1 / 3)


@pytest.mark.parametrize(
    "text, says",
    [
        ("steps = 3\nsteps = = 4\n", "calc.py, line 2: invalid syntax"),
        ("steps = 3\nsteps = x\n", "calc.py, line 2: NameError: name 'x' is not defined"),
        ("\nsteps = int('a')", "calc.py, line 2: ValueError: invalid literal for int()"),
        ("import nowhere", "calc.py, line 1: ModuleNotFoundError: No module named 'nowhere'"),
        ("def steps_of(x): pass", "steps_of in calc.py is code: a config file holds plain values"),
        ("class A: pass", "A in calc.py is code: a config file holds plain values"),
        ("steps = 1\0", "calc.py, line 1: source code string cannot contain null bytes"),
    ],
)
def test_a_config_file_that_fails_is_told_with_its_line(text, says):
    assert complaint(write(text)).startswith(says)


def test_rules_across_keys_are_checked_last():
    def check(cfg):
        if cfg.resume and cfg.steps < 9:
            raise UserError("too few")

    assert complaint(["--resume=true", "--steps=8"], check=check) == "too few"
    assert parse(Config, ["--resume=true"], check).resume


def test_a_key_without_effect_in_this_script_is_refused_but_may_be_in_the_file(monkeypatch):
    """Pitfall 55: a config key which has no effect in the chosen mode is an error."""
    monkeypatch.setattr(sys, "argv", ["/a/rollout.py"])
    argv, keys = write("learning_rate = 1"), iter(["model", "tools"])
    says = "learning_rate has no effect in rollout.py: drop it"
    assert complaint(argv + ["--learning_rate=2"], keys=keys) == says
    assert parse(Config, argv + ["--model=a"], keys=["model"]).model == "a"


def test_types_may_be_strings_as_under_annotations_from_the_future():
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    text += "@dataclass\nclass C:\n    a: float | None = None\n    b: tuple[int, ...] = ()\n"
    with open("later.py", "w") as file:
        file.write(text)
    code = "import later; from run import config; print(config.parse(later.C, ['--a=1', '--b=2']))"
    assert run("-c", code, path=os.getcwd())[1] == "C(a=1.0, b=(2,))\n"


def test_a_default_of_the_wrong_type_is_our_own_mistake():
    @dataclass
    class Wrong:
        steps: int = None

    with pytest.raises(AssertionError, match="the default of steps is not int"):
        parse(Wrong, [])


def test_split_takes_the_keys_of_a_script_and_leaves_the_rest_to_be_complained_about():
    argv = ["--config", "calc.py", "--k=4", "--steps=3", "k=4", "--kk=4", "--k"]
    mine, rest = split(argv, ["k", "n"])
    assert mine == ["--k=4", "--k"]
    assert rest == ["--config", "calc.py", "--steps=3", "k=4", "--kk=4"]


def test_a_saved_config_loads_again_as_an_equal_one():
    cfg = Config(
        model='it\'s "quoted"\nand\\split\té',
        learning_rate=1 / 3,
        resume=True,
        tools=("one",),
        lengths=(1, 2),
        beta=1e-300,
        suffix="none",
        loss="gspo",
    )
    config.save(cfg, "saved.py")
    assert parse(Config, ["--config", "saved.py"]) == cfg
    config.save(Config(), "default.py")
    assert parse(Config, ["--config", "default.py"]) == Config()


def test_changed_names_the_fields_that_are_not_default():
    assert config.changed(Config()) == set()
    assert config.changed(Config(steps=3, beta=0.0, tools=("python",))) == {"steps", "beta"}


def test_an_out_dir_is_created_or_refused_with_the_way_out(tmp_path):
    assert config.fresh_dir("out/calc").is_dir()
    assert config.fresh_dir("out/calc").is_dir()  # an empty one is as good as a new one
    (tmp_path / "out" / "calc" / "x").write_text("")
    with pytest.raises(UserError) as caught:
        config.fresh_dir("out/calc")
    says = "out_dir 'out/calc' is not empty: give another with --out_dir=…, or remove it"
    assert str(caught.value) == says
    with pytest.raises(UserError, match="or go on with --resume=true$"):
        config.fresh_dir("out/calc", "go on with --resume=true")
    for path in ("out/calc/x", "out/calc/x/y"):  # a file in its place, or in that of a parent
        with pytest.raises(UserError, match=f"^cannot use out_dir '{path}' .*--out_dir=…$"):
            config.fresh_dir(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_out_dir_without_permission_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="^cannot write to out_dir"):
        config.fresh_dir("locked")
    with pytest.raises(UserError, match="^cannot use out_dir"):
        config.fresh_dir("locked/in")


SCRIPT = '''"""What it does.

python script.py
"""

from __future__ import annotations

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)

from dataclasses import dataclass


@dataclass
class Config:
    steps: int = 3  # updates
    # size
    rate: float = 0.5  # of what, and
    #                    when to change it


def train(cfg):
    if cfg.steps == 4:
        raise ValueError("a bug")
    if cfg.steps == 5:
        raise KeyboardInterrupt
    print(cfg.steps)


if __name__ == "__main__":
    config.main(lambda argv: train(config.parse(Config, argv)))
'''


def run(*argv, path=""):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([ROOT, path])}
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=env)
    return done.returncode, done.stdout, done.stderr


def test_a_script_ends_a_mistake_with_one_line_and_a_bug_with_its_traceback():
    write(SCRIPT, "script.py")
    assert run("script.py", "--steps=6") == (0, "6\n", "")
    assert run("script.py", "--step=6") == (
        2,
        "",
        "error: unknown key 'step': did you mean steps?\n",
    )
    assert run("script.py", "--steps=5") == (130, "", "interrupted\n")
    code, _, err = run("script.py", "--steps=4")
    assert code == 1 and "Traceback" in err and "ValueError: a bug" in err


def test_ctrl_c_while_a_script_imports_is_one_word_and_a_bug_there_is_not():
    head, tail = SCRIPT.split("from dataclasses")
    write(head + "raise KeyboardInterrupt\nfrom dataclasses" + tail, "script.py")
    assert run("script.py") == (-signal.SIGINT, "", "interrupted\n")
    write(head + "raise ValueError('a bug')\nfrom dataclasses" + tail, "script.py")
    code, _, err = run("script.py")
    assert code == 1 and "Traceback" in err and "ValueError: a bug" in err


def test_help_prints_the_docstring_and_the_source_of_the_config_without_running_the_script():
    head, tail = SCRIPT.split("from dataclasses")
    write(head + "raise SystemExit('not reached')\nfrom dataclasses" + tail, "script.py")
    fields = SCRIPT[SCRIPT.index("class Config") : SCRIPT.index("\n\n\ndef train")]
    for flag in ("-h", "--help"):
        says = (0, "What it does.\n\npython script.py\n\n" + fields + "\n\n", "")
        assert run("script.py", "--steps=6", flag) == says


def test_help_shows_the_keys_of_a_second_script_that_are_taken(monkeypatch, capsys, tmp_path):
    """And those alone: any other would be refused."""
    write(SCRIPT, "script.py")
    write(
        """'Other words.'
class Config:
    # one
    k: int = 1  # tries
    # two
    m: Literal[
        "a", "b"
    ] = "a"  # dropped
    # of m too
    # three
    rate: float = 1.0  # that of script.py is shown
    n: int = 2  # samples
    # four
    o: int = 2  # dropped
""",
        "other.py",
    )
    monkeypatch.setattr(sys, "argv", ["script.py", "-h"])
    with pytest.raises(SystemExit) as caught:
        config.answer_help(tmp_path / "script.py", tmp_path / "other.py", ("k", "n", "rate"))
    out = capsys.readouterr().out
    left = "    # one\n    k: int = 1  # tries\n    # three\n    n: int = 2  # samples\n\n"
    assert caught.value.code == 0 and out.endswith(f"and these of {tmp_path}/other.py:\n{left}")
    assert out.count("rate: float") == 1 and "Other words" not in out


@pytest.mark.parametrize("script", ["train_grpo.py", "train_sft.py", "evaluate.py", "demo.py"])
def test_help_may_be_cut_short(script):
    """`--help | head -1` ended in a traceback."""
    read, write_end = os.pipe()
    os.close(read)  # nobody reads on
    command = [sys.executable, f"{ROOT}/{script}", "--help"]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", ["train_grpo.py", "train_sft.py", "demo.py"])
def test_a_line_is_said_before_anything_slow_is_loaded(script):
    """D1: the first seconds were silent. Here torch cannot even be imported."""
    write("raise ImportError('no torch here')", "torch.py")
    code, out, err = run(f"{ROOT}/{script}", path=os.getcwd())
    assert code == 1 and "no torch here" in err
    assert out == "loading torch, then data and model: some seconds until the first step\n"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("\x1b]52;c;aGk=\x07", "\\x1b]52;c;aGk=\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("a\u202eb", "a\\u202eb"),
        ("\ud800", "\\ud800"),
        ("wörter, 数, 👍\nline", "wörter, 数, 👍\nline"),
    ],
)
def test_a_mistake_that_quotes_control_characters_shows_them_escaped(text, shown, capsys):
    """C6: what a model, a server or a data set says may be a part of the message."""

    def fails(argv):
        raise UserError(text)

    with pytest.raises(SystemExit):
        config.main(fails)
    assert capsys.readouterr().err == f"error: {shown}\n"


def test_help_is_not_answered_unasked(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--steps=3"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # it sets another one
    config.answer_help("no_such_file.py")


@pytest.mark.parametrize(
    "number, file, said",
    [
        (errno.ENOSPC, None, "cannot use the disk (No space left on device): make room"),
        (errno.ENOSPC, "a/b", "cannot use 'a/b' (No space left on device): make room"),
        (errno.EROFS, "a/b", "(Read-only file system): give a folder that can be written"),
        (errno.EACCES, "a/\x1bb", "cannot use 'a/\\x1bb' (Permission denied): give a place that"),
        (errno.EIO, "a", "cannot use 'a' (Input/output error): look after the disk"),
    ],
)
def test_what_a_disk_refuses_is_one_line(number, file, said, capsys):
    """B9: whatever script writes there."""

    def refused(argv):
        raise OSError(number, os.strerror(number), file)

    with pytest.raises(SystemExit, match="2"):
        config.main(refused)
    line = capsys.readouterr().err
    assert line.startswith("error: ") and said in line and line.count("\n") == 1


def test_any_other_fault_of_the_system_keeps_its_traceback():
    def other(argv):
        raise OSError(errno.EBADF, "Bad file descriptor")

    with pytest.raises(OSError, match="Bad file"):
        config.main(other)

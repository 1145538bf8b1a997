"""Every mistake on the command line ends within seconds in one sentence, exit code 2, no traceback.

    pytest tests/test_cli.py -s      # -s: see the seconds of the real processes

Pinned here: wrong keys, values, files, models, tools, rewards, data, columns, formats and folders
of all four scripts, keys that would have no effect, what an import costs, and --help. A few run as
real processes, side by side; the others run the same `__main__` lines here.
"""

import ast
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import evaluate
from learning import model as models
from player import prepare_task
from run import config
from run.config import ROLLOUT_KEYS

ROOT = Path(config.HERE)
SECONDS = 10  # 1.5 to 4.5 where nothing else runs, most of it the import of torch
SCRIPTS = ["train_grpo.py", "train_sft.py", "evaluate.py", "play.py"]
HEAVY = ["vllm", "peft", "bitsandbytes", "datasets", "deepspeed"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """Where all runs start: models, data, configs and tools, whole and broken."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    model = Qwen3ForCausalLM(Qwen3Config(**shape))
    for name in ("model", "torn"):
        models.save(model, tokenizer, folder / name)
    os.truncate(folder / "torn" / "model.safetensors", 500)
    (folder / "empty").mkdir()
    (folder / "used").mkdir()
    (folder / "used" / "model.safetensors").write_text("months of work")
    (folder / "run").mkdir()
    (folder / "run" / "config.py").write_text("model = 'model'\ndata = 'good.jsonl'\n")
    (folder / "sft").mkdir()
    (folder / "sft" / "config.py").write_text("model = 'tiny'\nrows = 3\n")
    row = {"prompt": "2 + 3?", "answer": "5"}
    chat = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]
    (folder / "good.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "torn.jsonl").write_text('\n{"prompt": "2 +')
    (folder / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (folder / "silent.jsonl").write_text(json.dumps({"messages": chat[:1]}) + "\n")
    (folder / "nolist.jsonl").write_text('{"messages": "hello"}\n')
    (folder / "norows.jsonl").write_text("\n")
    (folder / "unknown.py").write_text("learnig_rate = 1\n")
    (folder / "wrong.py").write_text("steps = 'many'\n")
    (folder / "torn.py").write_text("steps = (\n")
    (folder / "my.py").write_text("def untyped(x):\n    return x\n")
    return folder


def command(script, *argv):
    """The command line of a run that would work, but for argv."""
    usual = {
        "train_grpo.py": ["--model=model", "--data=good.jsonl"],
        "train_sft.py": ["--model=model", "--data=chats.jsonl", "--batch_size=1"],
        "evaluate.py": ["--model=model", "--data=good.jsonl"],
        "play.py": ["--model=model", "--data=good.jsonl"],
    }[script]
    given = {item.partition("=")[0] for item in argv}
    return [script, *(item for item in usual if item.partition("=")[0] not in given), *argv]


def one_line(stderr):
    """The error's text, after what must hold for every mistake."""
    lines = stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    assert "Traceback" not in stderr and len(lines[0]) < 500
    return lines[0].removeprefix("error: ")


def complaint(place, monkeypatch, capsys, script, *argv):
    """What the script says, run here by its own `__main__` lines."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", command(script, *argv))
    capsys.readouterr()
    began = time.process_time()  # a busy machine fails no test
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert ended.value.code == 2 and time.process_time() - began < SECONDS
    return one_line(capsys.readouterr().err)


# Of any script that trains or plays: what is given, and what is said.
SHARED = [
    ("--learnig_rate=1", "unknown key 'learnig_rate'"),
    ("--max_tokns=1", "unknown key 'max_tokns': did you mean max_tokens?"),
    ("--max_tokens", "cannot read '--max_tokens': write --max_tokens=2048"),
    ("max_tokens=3", "cannot read 'max_tokens=3': write --max_tokens=3"),
    ("calc.py", "cannot read 'calc.py': write --config calc.py"),
    ("--max_tokens=many", "max_tokens = 'many': expected int"),
    ("--max_tokens=0", "max_tokens = 0: expected"),
    ("--format=hermez", "format = 'hermez': expected one of auto, hermes, "),
    ("--config=nope.py", "no config file 'nope.py'; looked for nope.py and configs/nope.py"),
    (
        "--config=unknown.py",
        "unknown key 'learnig_rate' in unknown.py: did you mean learning_rate?",
    ),
    ("--config=torn.py", "torn.py, line 1: "),
    ("--model=out/nowhere", "model = 'out/nowhere': no such folder"),
    ("--model=./nowhere", "model = './nowhere': no such folder"),
    ("--model=empty", "model = 'empty': that folder has no config.json"),
    ("--model=some/model", "model = 'some/model': no such folder, and not in the hub's cache"),
    ("--model=torn", "model = 'torn': "),
    ("--tools=pyton", "unknown tool 'pyton': did you mean python?"),
    ("--tools=nowhere.py:f", "nowhere.py for the tool 'nowhere.py:f'"),
    ("--tools=my.py:other", "no function 'other' in "),
    ("--tools=my.py:untyped", "untyped"),
    ("--data=nowhere.jsonl", "no file 'nowhere.jsonl'"),
    ("--data=nonsense", "data = 'nonsense': expected a .jsonl, .json or .parquet file, a task"),
    ("--data=some/rows", "cannot load 'some/rows': "),
    ("--data=task:cal", "no task 'cal'; there are calc"),
    ("--data=torn.jsonl", "torn.jsonl:2: broken JSON"),
    ("--format=llama3", "llama3"),
]
PLAYED = [  # train_grpo.py, evaluate.py, rollout.py
    ("--rewards=corect", "unknown reward 'corect' in 'corect': did you mean correct?"),
    ("--rewards=nowhere.py:f", "no reward file 'nowhere.py'"),
    ("--rewards=correct:much", "cannot read the weight of 'correct:much'"),
    ("--rewards=", "rewards is empty"),
    ("--prompt_column=question", "no column 'question', there are prompt, answer"),
    ("--answer_column=solution", "no column 'solution', there are prompt, answer"),
    ("--answer_after=####", "no '####' in its 'answer'"),
    ("--prompt_template=hello", "prompt_template = 'hello' names no column"),
    ("--max_turns=0", "max_turns = 0: expected more than 0"),
    ("--tool_timeout=0", "tool_timeout = 0.0: expected more than 0"),
    ("--temperature=-1", "temperature = -1.0: expected 0 or more"),
    ("--max_tokens=5", "max_tokens = 5: the first prompt alone has "),
    ("--seed=1e30", "expected less than 2**63"),
]
OWN = {
    "train_grpo.py": [
        ("--rows=3", "unknown key 'rows'"),
        ("--config=wrong.py", "steps = 'many' in wrong.py: expected int"),
        ("--steps=0", "steps = 0: expected more than 0"),
        ("--minibatches=1000", "minibatches = 1000: there are 192 trajectories to split"),
        ("--beta=-1", "beta = -1.0: expected 0 or more"),
        ("--dynamic_sampling=wrong", "dynamic_sampling = 'wrong': expected one of correct"),
        ("--group_size=1", "group_size = 1: one has nothing to compare with"),
        ("--temperature=0", "temperature = 0: all of a group would be alike"),
        ("--loss=dapoo", "loss = 'dapoo': expected one of dapo, grpo, dr_grpo, gspo"),
        ("--learning_rate=0", "learning_rate = 0.0: expected more than 0"),
        ("--warmup=-1", "warmup = -1: expected 0 or more"),
        ("--limit=0", "limit = 0: expected at least 1"),
        ("--model=tiny", "model = 'tiny' is made by train_sft.py"),
        ("--out_dir=used", "out_dir 'used' is not empty: give another with --out_dir="),
        ("--out_dir=good.jsonl", "cannot use out_dir 'good.jsonl'"),
        ("--data=task:calc --split=tset", "split = 'tset': task:calc has train and test"),
        ("--tune=lora --lora_targets=nothing", "lora_targets = ('nothing',): "),
    ],
    "train_sft.py": [
        ("--steps=3", "unknown key 'steps'"),
        ("--optimizer=sgd", "optimizer = 'sgd': expected one of adamw, adamw8bit, muon"),
        ("--learning_rate=-1", "learning_rate = -1.0: expected more than 0"),
        ("--epochs=0", "epochs = 0.0: expected more than 0"),
        ("--weight_decay=-1", "weight_decay = -1.0: expected 0 or more"),
        ("--warmup=-1", "warmup = -1: expected 0 or more"),
        ("--rows=0", "rows = 0: expected at least 1"),
        ("--max_tokens=3", "max_tokens = 3: in none of the 1 conversations"),
        ("--data=good.jsonl", "no column 'messages', there are prompt, answer: SFT takes whole"),
        ("--data=nolist.jsonl", "nolist.jsonl, row 1: 'messages' is not a list of chat messages"),
        ("--data=norows.jsonl", "norows.jsonl has no rows"),
        ("--data=silent.jsonl", "silent.jsonl, row 1: no assistant message"),
        ("--out_dir=used", "out_dir 'used' is not empty: give another with --out_dir="),
    ],
    "evaluate.py": [
        ("--k=2", "k = (2,): expected numbers from 1 to n = 1"),
        ("--n=0", "n = 0"),
        ("--n=4", "n = 4 samples at temperature 0 are all alike: use --temperature=1"),
        ("--limit=0", "limit = 0: expected at least 1"),
        ("--run=nowhere", "run = 'nowhere': no config.py in it"),
        ("--run=empty", "run = 'empty': no config.py in it"),
        ("--data=task:calc --split=tset", "split = 'tset': task:calc has train and test"),
        ("--save_to=used", "save_to 'used' is not empty: give another with --save_to="),
        ("--run=sft", "run = 'sft' is no run of train_grpo.py (unknown key 'rows'"),
    ],
    "play.py": [
        ("--n=4", "unknown key 'n'"),
        ("--data=task:calc --split=tset", "split = 'tset': task:calc has train and test"),
    ],
}
ENGINES = [
    (
        "train_grpo.py",
        "--engine_options=canary",
        "engine_options: cannot read 'canary': write name",
    ),
    ("train_grpo.py", "--engine_options=canary=maybe", "canary = 'maybe': expected true or false"),
    ("train_grpo.py", "--engine_options=canary=true,canary=true", "canary is given twice"),
    (
        "train_grpo.py",
        "--engine=vllm --engine_options=kv_cache_gib=-1",
        "kv_cache_gib = -1.0: expec",
    ),
    (
        "train_grpo.py",
        "--engine=server --urls=http://x --tune=lora --engine_options=timeout=0",
        "timeout = 0.0: expected more than 0",
    ),
    ("train_grpo.py", "--engine=server", "urls is missing: engine = 'server' needs --urls="),
    ("play.py", "--engine=server --urls=localhost:80", "urls = 'localhost:80': expected http"),
    ("play.py", "--engine=vllm --temperature=0.001", "vLLM has 0, or 0.01 and more"),
    ("train_grpo.py", "--engine=vllm --gpu_memory_utilization=90", "at most 1"),
]
WITHOUT_EFFECT = [
    ("train_grpo.py", "--tools= --tool_timeout=5", "tool_timeout has no effect with tools=()"),
    ("train_grpo.py", "--steps=5 --warmup=5", "warmup = 5: expected less than steps = 5"),
    ("train_grpo.py", "--lora_r=8", "lora_r has no effect with tune=full"),
    ("train_grpo.py", "--lora_targets=q_proj", "lora_targets has no effect with tune=full"),
    ("train_grpo.py", "--clip_high=0.3", "clip_high has no effect with updates_per_batch=1"),
    (
        "train_grpo.py",
        "--loss=cispo --updates_per_batch=2 --clip_low=0.1",
        "clip_low has no effect with loss=cispo",
    ),
    ("train_grpo.py", "--engine_options=sleep=false", "transformers has no option 'sleep'"),
    ("play.py", "--engine_options=kv_cache_gib=2", "transformers has no option 'kv_cache_gib'"),
    ("play.py", "--gpu_memory_utilization=0.8", "gpu_memory_utilization has no effect"),
    ("evaluate.py", "--urls=http://x", "urls has no effect with engine=transformers"),
    ("train_grpo.py", "--engine=vllm --engine_options=deterministic=false",
     "vllm has no option 'deterministic'"),
    ("train_grpo.py",
     "--engine=vllm --engine_options=kv_cache_gib=2 --gpu_memory_utilization=0.8",
     "gpu_memory_utilization has no effect with kv_cache_gib"),
    ("evaluate.py", "--key_env=X", "key_env has no effect without --endpoint"),
    *(
        ("evaluate.py", f"--endpoint=http://127.0.0.1:9/v1 --model=gpt --{given}",
         f"{given.partition('=')[0]} has no effect with --endpoint: drop it")
        for given in ("format=llama3", "template_options=x=1", "dtype=bfloat16", "engine=vllm",
                      "engine_options=deterministic=false", "urls=http://x")
    ),
    ("train_grpo.py", "--tune=qlora --dtype=mixed", "dtype = 'mixed' with tune=qlora"),
    ("train_sft.py", "--tune=qlora --dtype=mixed", "dtype = 'mixed' with tune=qlora"),
    ("train_sft.py", "--val_every=5", "val_every has no effect with val_rows=0"),
    ("train_grpo.py", "--prompt_template=Q:{prompt} --data=chats.jsonl --prompt_column=messages "
     "--answer_column=messages", "prompt_template has no effect"),
    ("train_grpo.py", "--split=test", "split has no effect on 'good.jsonl'"),
    ("evaluate.py", "--split=train", "split has no effect on 'good.jsonl'"),
    ("play.py", "--split=test", "split has no effect on 'good.jsonl'"),
    ("train_sft.py", "--lora_alpha=8", "lora_alpha has no effect with tune=full"),
    ("train_sft.py", "--model=tiny --tune=lora", "tune = 'lora' on model = 'tiny'"),
    ("evaluate.py", "--learning_rate=1", "learning_rate has no effect in evaluate.py"),
    ("evaluate.py", "--group_size=4", "group_size has no effect in evaluate.py"),
    ("evaluate.py", "--out_dir=x", "out_dir has no effect in evaluate.py"),
    ("play.py", "--steps=4", "steps has no effect in play.py"),
    ("play.py", "--tune=lora", "tune has no effect in play.py"),
]  # fmt: skip
CASES = [
    (script, argv, says)
    for script in SCRIPTS
    for argv, says in SHARED + (PLAYED if script != "train_sft.py" else []) + OWN[script]
]


@pytest.mark.parametrize("script, argv, says", CASES, ids=lambda value: value[:40])
def test_a_mistake_is_one_line_on_stderr_that_names_it(
    place, monkeypatch, capsys, script, argv, says
):
    said = complaint(place, monkeypatch, capsys, script, *argv.split(" "))
    assert says in said


@pytest.mark.parametrize("script, argv, says", ENGINES, ids=lambda value: value[:40])
def test_a_mistake_with_engines_is_one_line_too(place, monkeypatch, capsys, script, argv, says):
    assert says in complaint(place, monkeypatch, capsys, script, *argv.split(" "))


def test_an_engine_that_is_not_installed_is_named_before_anything_is_loaded(
    place, monkeypatch, capsys
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    said = complaint(place, monkeypatch, capsys, "train_grpo.py", "--engine=vllm")
    assert "engine = 'vllm' needs vLLM" in said and 'pip install -e ".[vllm]"' in said


@pytest.mark.parametrize("script, argv, says", WITHOUT_EFFECT, ids=lambda value: value[:40])
def test_a_key_that_would_have_no_effect_is_refused(place, monkeypatch, capsys, script, argv, says):
    """Pitfall 55."""
    assert says in complaint(place, monkeypatch, capsys, script, *argv.split(" "))


def test_an_evaluation_of_a_run_that_was_limited_takes_all_problems(tmp_path):
    """Unless it has a limit of its own: that of training is of other rows."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2 + 3?", "answer": "5"}\n' * 4)
    text = f"data = {str(tmp_path / 'rows.jsonl')!r}\nlimit = 1\n"
    (tmp_path / "config.py").write_text(text)
    for limit, count in ((None, 4), (3, 3)):
        own = evaluate.Config(run=str(tmp_path), limit=limit)
        cfg = evaluate.load_config([], own)
        _, _, rows = prepare_task(cfg, own.limit)
        assert cfg.limit == limit and len(rows) == count


def test_a_refused_run_has_written_nothing(place):
    """After all of the above: an evaluation leaves no folder, training at most an empty one."""
    found = [p for p in place.glob("out/**/*") if p.is_file()]
    assert found == [] and [p.name for p in (place / "used").iterdir()] == ["model.safetensors"]
    assert [p.name for p in (place / "run").iterdir()] == ["config.py"]


# Real processes


def start(place, *argv):
    """(exit code, stdout, stderr, seconds) of python with these arguments, offline, in `place`. The
    seconds are those of the processor, so that a busy machine fails no test."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(
            [sys.executable, *argv], stdout=out, stderr=err, cwd=place, env=env
        )
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        return child.returncode, out.read(), err.read(), used.ru_utime + used.ru_stime


def side_by_side(place, commands):
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda argv: start(place, *argv), commands))


def test_real_processes_end_in_one_line_and_exit_code_2(place):
    """Also those whose model was loaded: no library adds a line of its own."""
    mistakes = [
        ("train_grpo.py", "--model=some/model", "not in the hub's cache"),
        ("train_grpo.py", "--format=llama3", "llama3"),
        ("train_sft.py", "--out_dir=used", "is not empty"),
        ("evaluate.py", "--rewards=corect", "did you mean correct?"),
        ("play.py", "--tools=pyton", "did you mean python?"),
    ]
    commands = [command(script, argv) for script, argv, _ in mistakes]
    ended = side_by_side(place, [[str(ROOT / script), *argv] for script, *argv in commands])
    for (script, argv, says), (code, _, stderr, seconds) in zip(mistakes, ended, strict=True):
        print(f"{seconds:5.1f} s  {script} {argv}")
        assert says in one_line(stderr) and code == 2
        assert seconds < SECONDS


def test_an_import_is_silent_quick_and_light(place):
    code = "import train_grpo, train_sft, evaluate, rollout, sys; "
    code += f"assert not (heavy := set({HEAVY}) & set(sys.modules)), heavy"
    for _ in range(3):  # neighbours cost processor time too: one that is quick is enough
        *ended, seconds = start(place, "-c", code)
        print(f"{seconds:5.1f} s  import train_grpo, train_sft, evaluate, rollout")
        assert ended == [0, "", ""]
        if seconds < 3:
            break
    assert seconds < 3


def test_help_is_the_source_of_the_config_and_comes_at_once(place):
    scripts = [ROOT / name for name in [*SCRIPTS, "demo.py"] if (ROOT / name).is_file()]
    answers = side_by_side(place, [[str(script), "--help"] for script in scripts])
    for script, (code, stdout, stderr, seconds) in zip(scripts, answers, strict=True):
        print(f"{seconds:5.2f} s  {script.name} --help")
        assert (code, stderr) == (0, "") and seconds < 1
        owner = ROOT / "train_grpo.py" if script.name == "play.py" else script
        (node,) = [
            node
            for node in ast.parse(owner.read_text()).body
            if isinstance(node, ast.ClassDef) and node.name == "Config"
        ]
        lines = owner.read_text().splitlines()[node.lineno - 1 : node.end_lineno]
        if script.name == "play.py":  # what it takes of that
            fields = [field for field in node.body if field.target.id in ROLLOUT_KEYS]
            lines = [line.rstrip() for line in lines]
            shown = [lines[field.lineno - node.lineno] for field in fields]
            assert all(line in stdout for line in shown) and "    beta: float" not in stdout
        else:
            assert "\n".join(lines) in stdout
        assert len(lines) > 2
        assert stdout.startswith(ast.get_docstring(ast.parse(script.read_text())))


@pytest.mark.parametrize("task", ["calc", "facts", "shop", "multi"])
def test_the_demo_draws_held_out_points_and_says_what_is_sampled(
    task, tmp_path, monkeypatch, capsys
):
    """D11: the picture began at 0.40 (sampled) and the text at 0.32 (greedy), unexplained.

    B9: what a demo left that ended before its first step does not block it."""
    import demo

    monkeypatch.setenv("NANOTOOL_UNCONFINED", "true")  # the demo sets it for good
    trained = []
    measured = {"problems": 2, "accuracy": 0.5, "tool_call_rate": 1.0}
    monkeypatch.setattr(demo.train_sft, "train", trained.append)
    monkeypatch.setattr(demo.train_grpo, "train", trained.append)
    monkeypatch.setattr(demo, "evaluate_at", lambda temperature, cfg, model: measured)
    monkeypatch.setattr(demo.play, "main", trained.append)
    argv = [f"--task={task}", f"--out_dir={tmp_path}/out"]
    demo.main(argv)
    said = capsys.readouterr().out
    assert "which are sampled" in said and "greedily" in said
    sft, grpo, _ = trained
    assert 0 < grpo.eval_every < grpo.steps / 2
    for cfg in (sft, grpo):
        config.save(cfg, f"{cfg.out_dir}/config.py")
    demo.main(argv)
    (tmp_path / "out" / f"{task}_sft" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(
        config.UserError, match="is not empty: give another with --out_dir=…, or rem"
    ):
        demo.main(argv)

"""What README.md and docs/ tell people to do works, and what they name is there.

pytest tests/test_readme.py
"""

import ast
import asyncio
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from until import PATIENCE

import demo
import evaluate
import play
import rewards as reward_functions
import train_grpo
import train_sft
from engines import options as engine_options
from learning import checkpoint, memory
from run import config
from run import page as run_page
from suite import plan as plans
from tasks.tiny import tiny, tiny_tokenizer
from tools import Toolbox

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md"))}
PAGES["README.md"] = README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(page, language):
    """The fenced blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.S | re.M)


def block(page, text, language="python"):
    """The one block with this text in it."""
    (found,) = [code for code in blocks(page, language) if text in code]
    return found


def lines_of(code):
    return [line for line in code.splitlines() if line.strip()]


# ---- what a reader sees


def test_the_readme_is_short_and_its_first_screen_sells():
    assert len(README.splitlines()) <= 250
    first_screen = README.split("## ")[0]
    for part in ("TRL", "docs/pictures/", "**Status:**", "git clone", "make demo", "def weather("):
        assert part in first_screen, part


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_short_and_linked(page):
    if page != "README.md":
        assert len(PAGES[page].splitlines()) < 200
        assert f"(docs/{page})" in README
    assert max(map(len, PAGES[page].splitlines())) < 400
    assert PAGES[page].startswith("# ")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    links = re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", PAGES[page], flags=re.S | re.M)
    )
    for link in links:
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = folder / target
        assert path.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in slugs, link


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_is_there(page):
    folders = "configs|tools|tests|notebooks|evidence|learning|tasks|bench|dev|serve|grading"
    named = set(re.findall(rf"(?<![\w./])((?:{folders})/[\w./-]+)", PAGES[page]))
    named |= set(re.findall(r"`(\w+\.(?:py|cff))`", PAGES[page]))
    named |= set(re.findall(r"^(\w+\.py)  ", PAGES[page], re.M))
    written = {"mine.py", "my_tools.py", "my_rewards.py", "tasks/dice.py"}  # by the reader
    names = {name.rstrip(".") for name in named} - written
    places = (ROOT, ROOT / "configs")
    missing = [name for name in names if not any((place / name).exists() for place in places)]
    missing = [name for name in missing if name != "config.py"]  # of an out_dir
    assert missing == []


def test_every_picture_is_small_and_shown():
    pictures = list((ROOT / "docs" / "pictures").iterdir())
    assert pictures
    for picture in pictures:
        assert picture.stat().st_size < 100_000
        assert any(f"pictures/{picture.name})" in text for text in PAGES.values())


def test_the_citation_names_what_it_has_to():
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])


# ---- figures


# (page, what it says, the file of evidence/, a pattern that is in that file)
FIGURES = (
    ("README", "0.96 s a step against 2.17 s", "bench/against_trl", "ours, median +0.96 "),
    ("README", "0.96 s a step against 2.17 s", "bench/against_trl", "TRL, median +2.17 "),
    ("README", "1.15 s where every call is run", "bench/against_trl", "calls, median +1.15 "),
    ("README", "19 s to a mean reward of 0.9", "bench/against_trl", "ours, median +0.96 +19.04 "),
    ("README", "of 0.9 against 40 s", "bench/against_trl", "TRL, median +2.17 +40.12 "),
    ("README", "4.6 - 4.9 times as many", "bench/train_step_5m", "ours: 4.87 times as many"),
    ("README", "4.6 - 4.9 times as many", "bench/train_step_5m", "ours +8.19 +1,212 +546 "),
    ("README", "an eighth to a tenth of the", "bench/train_step_5m", "0.10 of the peak memory"),
    ("README", "an eighth to a tenth of the", "bench/train_step_5m", "8 rows .+ 265 +4,332 "),
    ("README", "take 4.9 s, TRL's", "bench/rollouts", "64 trajectories: 4.85 s"),
    ("README", "own generation 150 s", "bench/rollouts", "synchronous tool: 150.0 s"),
    ("README", "killed by SIGKILL twenty times", "bench/resume_grpo", "20 kills"),
    ("README", "killed by SIGKILL twenty times", "bench/resume_lora", "20 kills"),
    ("README", "killed by SIGKILL twenty times", "bench/resume_sft", "20 kills"),
    ("results", "0.316 (0.278 - 0.358) -> 0.990", "calc/seed0-summary", "after: +0.9902"),
    ("results", "0.318 (0.279 - 0.360) -> 0.998", "tasks/facts-seed0-summary", "after: +0.9980"),
    ("results", "0.314 (0.276 - 0.356) -> 1.000", "tasks/shop-seed0-summary", "after: +1.0000"),
    ("results", "0.281 (0.244 - 0.322) -> 0.996", "tasks/multi-seed0-summary", "after: +0.9961"),
    ("results", "memory on calc is 0.90 GB", "calc/seed0-peak", "peak_memory_gb: +0.8974"),
    ("memory", "1,212 trained tokens/s, 0.53 GiB", "bench/train_step_5m", "1,212 +546 "),
    ("memory", "249, and 265 trained tokens/s", "bench/train_step_5m", "16 rows .+ 249 +5,646 "),
    ("memory", "5.5, and 4.2 GiB", "bench/train_step_5m", "8 rows .+ 265 +4,332 "),
    ("memory", "159 trained tokens/s, 3.3 GiB", "bench/train_step_60m", "159 +3,359 "),
    ("memory", "41 trained tokens/s, 15.7 GiB", "bench/train_step_60m", "41 +16,094 "),
    ("memory", "19.0 s; 20.2 s", "bench/against_trl", "all calls, median +1.15 +20.24 "),
    ("memory", "1.18 GiB, 80.8 s", "bench/logprobs", "80.8 .+ 1,209 "),
    ("memory", "13.9 GiB, 74.2 s", "bench/logprobs", "74.2 .+ 14,269 "),
    ("memory", "the slowest alone takes 4.2 s", "bench/rollouts", "slowest alone: 4.20 s"),
    ("memory", "147 s (asynchronous)", "bench/rollouts", "asynchronous: 147.0 s"),
    ("memory", "4.4, 4.9, 8.8, 15.2 s", "bench/rollouts", "128 +8.75"),
    ("memory", "with numpy 309, with sympy 328", "bench/tools", "328.4"),
    ("memory", "passages indexed in 6.1 s", "bench/tools", "index_seconds: 6.1"),
    ("memory", "3,463 tokens/s", "bench/rollouts", "3,463 tokens/s"),
    ("memory", "`print(6*7)` 458 calls/s", "bench/tools", "458.2"),
    ("memory", "2,375 queries/s", "bench/tools", "queries_per_second: 2375"),
)


@pytest.mark.parametrize("page, said, file, measured", FIGURES)
def test_figures_are_those_of_a_file(page, said, file, measured):
    text = " ".join(PAGES[f"{page}.md"].split())
    assert said in text
    evidence = (ROOT / "evidence" / f"{file}.txt").read_text(encoding="utf-8")
    assert re.search(measured, evidence), file


def interval_of(file):
    """What a page says of an evaluation: its accuracy (and 95 % interval)."""
    measured = json.loads((ROOT / "evidence" / file).read_text(encoding="utf-8"))
    low, high = measured["ci95_low"], measured["ci95_high"]
    return f"{measured['accuracy']:.3f}", f"({low:.3f} - {high:.3f})"


@pytest.mark.parametrize("seed", (0, 1, 2))
@pytest.mark.parametrize("task", ("calc", "facts", "shop", "multi"))
def test_before_and_after_are_those_of_the_evidence(task, seed):
    """With an interval where the row has the minutes of the run too, else on a busy machine."""
    prefix = f"calc/seed{seed}" if task == "calc" else f"tasks/{task}-seed{seed}"
    before, interval_before = interval_of(f"{prefix}-before.json")
    after, interval_after = interval_of(f"{prefix}-after.json")
    rows = [row for row in PAGES["results.md"].splitlines() if row.startswith(f"| {task} |")]
    summary = ROOT / "evidence" / f"{prefix}-summary.txt"
    if not summary.exists():
        (row,) = [row for row in rows if row.endswith("| 1, 2 |")]
        assert re.search(rf"{before} -> {after}", row)
        return
    (row,) = [row for row in rows if row.endswith(f"| {seed} |")]
    assert f"{before} {interval_before} -> {after} {interval_after}" in row
    minutes = float(re.search(r"minutes: +([\d.]+)", summary.read_text()).group(1))
    assert f"| {minutes:.2f} |" in row


@pytest.mark.parametrize("seed", (0, 1, 2))
def test_the_desks_figures_are_those_of_the_evidence(seed):
    before, interval_before = interval_of(f"desk/seed{seed}-before.json")
    after, interval_after = interval_of(f"desk/seed{seed}-after.json")
    row = row_of_results(f"desk | `desk_sft.py`, `desk.py` | seed {seed} |")
    assert f"{before} {interval_before} -> {after} {interval_after}" in row
    summary = (ROOT / "evidence" / "desk" / f"seed{seed}-summary.txt").read_text()
    minutes = float(re.search(r"minutes: +([0-9.]+)", summary).group(1))
    assert f"| {minutes:.1f} |" in row
    sampled = [
        interval_of(f"desk/seed{seed}-{when}-sampled.json")[0] for when in ("before", "after")
    ]
    assert f"| {sampled[0]} -> {sampled[1]} |" in row


def minutes_of(file):
    rows = run_page.read(ROOT / "evidence" / file)
    return sum(row["seconds"] for row in rows) / 60


def row_of_results(begins):
    (row,) = [row for row in PAGES["results.md"].splitlines() if row.startswith(f"| {begins}")]
    return row


def test_the_losses_are_those_of_the_evidence():
    table = json.loads((ROOT / "evidence" / "losses" / "table.json").read_text(encoding="utf-8"))
    after = {measured["row"]: f"{measured['after']:.3f}" for measured in table}
    names = ("dapo", "grpo", "dr_grpo", "gspo", "cispo")
    groups = {
        "the five losses": (names, names),
        "the same with four updates": (
            [f"{name}:off" for name in names],
            [f"{name}_off" for name in names],
        ),
    }
    for begins, (keys, files) in groups.items():
        row = row_of_results(begins)
        assert "0.316 -> " + ", ".join(after[key] for key in keys) in row
        minutes = [minutes_of(f"losses/{file}.jsonl") for file in files]
        assert f"| {min(minutes):.1f} - {max(minutes):.1f} (the steps alone) |" in row
    row = row_of_results("LoRA, QLoRA")
    assert f"-> {after['calc_lora.py']}, {after['calc_qlora.py']} |" in row
    both = [minutes_of(f"losses/{name}.jsonl") for name in ("calc_lora", "calc_qlora")]
    assert f"| {both[0]:.1f}, {both[1]:.1f} (the steps alone) |" in row


def test_vllms_row_is_that_of_the_evidence():
    row = row_of_results("calc through vLLM")
    full = " ".join(interval_of("vllm/calc_full.eval.json"))
    lora = " ".join(interval_of("vllm/calc_lora.eval.json"))
    assert f"0.316 -> {full}, {lora} |" in row
    both = [minutes_of(f"vllm/calc_{name}.metrics.jsonl") for name in ("full", "lora")]
    assert f"| {both[0]:.1f}, {both[1]:.1f} (the steps alone) |" in row


def test_no_resumed_run_of_the_evidence_differs():
    for file in (ROOT / "evidence" / "bench").glob("resume_*.txt"):
        table = [line for line in file.read_text().splitlines() if line.startswith("| ")][1:]
        assert table and all(line.split("|")[-2].strip() == "yes" for line in table), file


@pytest.mark.skipif(sys.platform != "linux", reason="test_hostile.py is for Linux")
def test_there_are_as_many_hostile_programs_as_it_says():
    from test_hostile import CORPUS

    assert f"all {len(CORPUS)} hostile" in " ".join(README.split())
    assert f"runs {len(CORPUS)} of them" in PAGES["results.md"]


# ---- commands


def commands():
    """(page, command) of every line that begins with python, make or pip: in fenced bash, and in
    the text between backticks. What stands for something else, …, is left out."""
    found = []
    for page, text in PAGES.items():
        fenced = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
        prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
        inline = re.findall(r"`((?:python|make|pip) [^`]+)`", prose)
        for line in [*fenced.splitlines(), *inline]:
            for command in line.split(" && "):
                if re.match(r"(python|make|pip) ", command):
                    found.append((page, command))
    return found


def keys_of(path):
    """The keys that a script takes, by its Config or its argparse; nothing is imported."""
    text = path.read_text(encoding="utf-8")
    keys = set(re.findall(r'add_argument\(\s*"--([\w-]+)"', text)) | {"config", "help"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            keys |= {field.target.id for field in node.body if isinstance(field, ast.AnnAssign)}
    return keys


def parsed(script, arguments):
    """Reads the arguments as the script itself would, and runs nothing. UserError if it cannot."""
    arguments = [argument for argument in arguments if argument != "--help"]
    if script in ("train_grpo.py", "train_sft.py"):
        module = train_grpo if script == "train_grpo.py" else train_sft
        _, arguments = config.take_flag(arguments, "dry_run")
        _, arguments = memory.take_card(arguments)
        config.parse(module.Config, arguments, module.check)
    elif script == "evaluate.py" and evaluate.is_suite(arguments):
        _, arguments = config.take_flag(arguments, "dry_run")
        config.parse(plans.Config, arguments, plans.check)
    elif script == "evaluate.py":
        own, others = config.split(arguments, evaluate.Config.__dataclass_fields__)
        config.parse(evaluate.Config, own, evaluate.check)
        config.parse(train_grpo.Config, others, keys=config.ROLLOUT_KEYS)
    elif script == "play.py":
        own, others = config.split(arguments, play.Config.__dataclass_fields__)
        if config.parse(play.Config, own).demonstration:
            config.parse(train_sft.Config, others, train_sft.check)
        else:
            config.parse(train_grpo.Config, others, train_grpo.check, keys=config.ROLLOUT_KEYS)
    elif script == "demo.py":
        config.parse(demo.Config, arguments)
    else:
        known = keys_of(ROOT / script)
        for argument in arguments:
            key, equals, _ = argument.removeprefix("--").partition("=")
            assert not argument.startswith("--") or key in known, argument


def file_of(module):
    return module.replace(".", "/") + ".py"


@pytest.mark.parametrize("page, command", commands(), ids=lambda text: text[:70])
def test_a_command_is_well_formed(page, command):
    """The script is there and takes these keys with these values."""
    words = [word for word in shlex.split(command, comments=True) if "…" not in word]
    program, *words = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words) <= set(targets)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        named = re.findall(r"\.\[([\w,]+)\]", " ".join(words))
        asked = {extra for names in named for extra in names.split(",")}
        assert asked <= set(extras["optional-dependencies"])
    elif words[0] == "-c":
        compile(" ".join(words[1:]), command, "exec")
    elif words[0] == "-m":
        if words[1] != "pytest" and not words[1].startswith("vllm."):
            parsed(file_of(words[1]), words[2:])
    else:
        assert (ROOT / words[0]).is_file()
        parsed(words[0], words[1:])


def test_there_are_commands_of_every_script():
    text = "\n".join(command for _, command in commands())
    for script in ("train_grpo.py", "train_sft.py", "evaluate.py", "play.py", "demo.py", "push.py"):
        assert f"python {script}" in text
    for module in (
        "run.page",
        "learning.merge",
        "serve.mcp_server",
        "serve.retrieve",
        "serve.agent",
    ):
        assert f"python -m {module}" in text


def test_names_on_the_right_of_coming_from_trl_are_ours():
    """Whatever looks like a key there is one, and there are forty names at least."""
    rows = re.findall(r"^\| ([^|]*) \| ([^|]*) \|$", PAGES["coming_from_trl.md"], re.M)
    rows = [row for row in rows if "`" in row[0]]
    assert len(rows) >= 40
    keys = keys_of(ROOT / "train_grpo.py") | keys_of(ROOT / "train_sft.py")
    others = {"metrics.jsonl", "report.html", "rollouts.jsonl", "Config", "cispo", "async"}
    others |= {"token-mean", "dapo", "seq-mean-token-mean", "grpo", "low_var_kl"}  # values
    others |= {"token_truncate", "token_mask"}  # theirs
    others |= {"entropy", "messages", "sequence_mask"}  # a metric, a column, a value
    for _, ours in rows:
        for name in re.findall(r"`([^`]+)`", ours):
            if name.startswith(("python ", "train(", "reward(", "hf ")) or name in others:
                continue
            assert name.lstrip("-").partition("=")[0] in keys, name


# ---- configs, keys and the log


def keys_in(text):
    """Of every --key= in a text."""
    return set(re.findall(r"--([A-Za-z_]\w*)=", text.replace("--key=value", "")))


@pytest.mark.parametrize("page", PAGES)
def test_every_key_with_a_value_is_a_key(page):
    """Also in the text, where it stands beside no command."""
    scripts = [*ROOT.glob("*.py"), ROOT / "serve/mcp_server.py", *ROOT.glob("learning/*.py")]
    scripts += [ROOT / "serve/retrieve.py", ROOT / "serve/agent.py", ROOT / "suite/plan.py"]
    scripts += [ROOT / "tasks/worked.py", ROOT / "dev/pictures.py", *ROOT.glob("bench/*.py")]
    keys = {"dry_run", "fits"}.union(*(keys_of(script) for script in scripts))
    assert keys_in(PAGES[page]) - keys == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_option_of_an_engine_a_tool_or_a_reward_is_one(page):
    """--engine_options=sleep=false, --tool_options=python.cache=false: as a run would read them."""
    for text in re.findall(r"\bengine_options=([\w=.,]+)", PAGES[page]):
        for option in text.split(","):
            name = option.partition("=")[0]
            kinds = engine_options.KINDS.values()
            (kind, *_) = [kind for kind in kinds if name in kind.__dataclass_fields__]
            engine = next(key for key, value in engine_options.KINDS.items() if value is kind)
            engine_options.read_options(engine, (option,))
    for option in re.findall(r"\b(\w+\.cache=\w+)", PAGES[page]):
        Toolbox([option.partition(".")[0]], options=[option])


def test_the_table_of_engines_md_has_every_option_and_its_default():
    table = PAGES["engines.md"].split("## Options of an engine")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?:`(\w+)`|all) \| `(\w+)` \| (\S+) \|", table, re.M)
    said = {(engine, name): default for engine, name, default in rows}
    real = {}
    for engine, kind in engine_options.KINDS.items():
        for name, value in vars(kind()).items():
            place = "" if name == "canary" else engine  # all have that one
            shown = f"{value:g}" if isinstance(value, float) else str(value).lower()
            real[place, name] = shown or '""'
    assert said == real


def test_the_keys_that_may_change_when_a_run_goes_on_are_all_named():
    line = PAGES["runs.md"].split("- A key that would change what is learnt")[1].split("\n\n")[0]
    of_engines = {"engine_options", "deterministic"}  # all of the first but the second
    assert set(re.findall(r"`(\w+)`", line)) == checkpoint.FREE - {"resume"} | of_engines


def test_every_config_is_in_the_table_of_recipes():
    configs = [path.name for path in (ROOT / "configs").glob("*.py")]
    assert [name for name in configs if f"| `{name}` |" not in PAGES["recipes.md"]] == []


def test_every_key_of_the_log_is_explained():
    """The keys of the committed evidence are those of a real run."""
    explained = set(re.findall(r"`([\w<>]+)`", PAGES["log.md"].split("## Every key")[1]))
    keys = set()
    for file in (ROOT / "evidence").rglob("*grpo*.jsonl"):
        # of a mix, `<source>/<key>`: what is said of the key holds
        keys |= {key.rpartition("/")[2] for key in run_page.read(file)[-1]}
    families = [name.split("<")[0] for name in explained if "<" in name] + ["reward_"]
    known = explained | {"step", "rollouts"}
    assert keys
    assert [key for key in keys - known if not key.startswith(tuple(families))] == []


# ---- twelve lines


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder with what the twelve lines say, ten rows of that kind, and a tiny model."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text(block("README.md", "def weather("))
    rows = [json.loads(line) for line in block("README.md", "sunny", "json").splitlines()]
    for city in ("Bern", "Cork", "Graz", "Kiel", "Lund", "Nice", "Pisa", "York"):
        rows.append({"prompt": f"How is the weather in {city}?", "answer": "rainy"})
    assert len(rows) == 10
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    schemas = Toolbox([f"{folder}/mine.py:weather"]).schemas
    tokenizer = tiny_tokenizer(
        [[{"role": "user", "content": row["prompt"]}] for row in rows], schemas
    )
    tokenizer.save_pretrained(folder / "model")
    tiny(tokenizer, layers=1).save_pretrained(folder / "model")
    return folder


def test_twelve_lines_are_twelve():
    code, rows = block("README.md", "def weather("), block("README.md", "sunny", "json")
    command = block("README.md", "mine.py:names_it", "bash")
    assert sum(len(lines_of(text)) for text in (code, rows, command)) == 12


def test_twelve_lines_train(mine):
    """An own tool, an own reward, own rows, one step: by the command of the README, but with a tiny
    model and a small batch."""
    program, script, *arguments = shlex.split(block("README.md", "mine.py:names_it", "bash"))
    assert (program, script) == ("python", "train_grpo.py")
    small = "--steps=1 --prompts_per_step=2 --group_size=2 --max_new_tokens=8 --model=model"
    command = [sys.executable, str(ROOT / script), *arguments, *small.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=mine, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = run_page.read(mine / "out" / "mine" / "metrics.jsonl")
    assert row["rollouts"] == 4 and "reward_names_it" in row


def test_twelve_lines_are_played_without_a_model(mine):
    """As the lines below them say: the same keys, and --made_up=true."""
    arguments = shlex.split(block("README.md", "mine.py:names_it", "bash"))[2:]
    arguments = [argument for argument in arguments if not argument.startswith("--out_dir")]
    command = [sys.executable, str(ROOT / "play.py"), *arguments, "--made_up=true"]
    done = subprocess.run(command, cwd=mine, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "How is the weather in Rome?" in done.stdout and "turn 0: weather(" in done.stdout


def test_the_tool_of_the_twelve_lines_is_a_tool(mine):
    assert called(mine / "mine.py", "weather", {"city": "Rome"}) == ("sunny", None)


def test_the_reward_of_the_twelve_lines_reads_the_answer_and_not_the_tools_result(mine):
    selected = reward_functions.select((f"{mine}/mine.py:names_it",))
    reward, _ = selected["names_it"]
    say = {"role": "assistant", "content": "It is sunny."}
    result = {"role": "tool", "name": "weather", "content": "sunny"}
    for last, value in ((say, 1.0), (result, 0.0)):
        trajectory = type("Trajectory", (), {"messages": [last]})()
        assert reward(trajectory, {"answer": "sunny"}) == value


def test_the_lines_for_a_notebook_train_what_they_say(monkeypatch):
    seen = []
    monkeypatch.setattr(train_grpo, "train", seen.append)
    exec(block("README.md", "train(cfg)"), {})
    (cfg,) = seen
    assert (cfg.steps, cfg.out_dir, cfg.data) == (10, "out/try", "task:calc")


def test_player_plays_as_the_readme_says(mine, monkeypatch):
    monkeypatch.chdir(mine)
    keys = ["--data=rows.jsonl", "--tools=mine.py:weather", "--rewards=mine.py:names_it"]
    keys += ["--model=model", "--max_new_tokens=8"]
    cfg = config.parse(train_grpo.Config, keys, train_grpo.check)
    names = {"cfg": cfg}
    exec(block("README.md", "Player.of(cfg)"), names)
    assert len(names["trajectories"]) == 4 * 8
    assert all("names_it" in trajectory.rewards for trajectory in names["trajectories"])


# ---- other blocks


def called(file, name, arguments, session_calls=1, options=()):
    """(content, error) of the last of some calls of a tool in a file."""

    async def call():
        box = Toolbox([f"{file}:{name}"], options=options)
        session = box.open({"answer": "42"})
        try:
            for _ in range(session_calls):
                content, error, _ = await session.call(name, arguments)
        finally:
            await session.close()
            await box.close()
        return content, error

    return asyncio.run(call())


def test_the_tools_of_tools_md_are_tools(tmp_path):
    file = tmp_path / "my_tools.py"
    file.write_text(block("tools.md", "def opening_hours(") + block("tools.md", "class notebook:"))
    content, error = called(file, "opening_hours", {"shop": "Corner Shop", "day": "Sunday"})
    assert error is None and json.loads(content)["hours"] == "closed"
    content, error = called(file, "opening_hours", {"shop": "None"})
    assert error == "no_shop" and "Corner Shop" in content
    content, error = called(file, "notebook", {"line": "a"}, 3, ("notebook.size=2",))
    assert (content, error) == ("a\na", None)


def test_the_reward_of_rewards_md_is_a_reward(tmp_path):
    (tmp_path / "my_rewards.py").write_text(block("rewards.md", "def brief("))
    selected = reward_functions.select(("correct", f"{tmp_path}/my_rewards.py:brief:0.1"))
    assert selected["brief"][1] == 0.1


def test_the_fields_of_rewards_md_are_those_of_a_trajectory():
    from trajectory import ToolCall, Trajectory

    table = PAGES["rewards.md"].split("| field |")[1].split("\n\n")[0]
    names = [name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in row.split(", ")]
    known = {*Trajectory.__dataclass_fields__, "new_tokens"}
    assert len(names) >= 12 and {name.strip("`") for name in names} <= known
    calls = re.search(r"each call: (.*?) \|", table).group(1)
    fields = set(re.findall(r"`(\w+)`", calls))
    assert fields == set(ToolCall.__dataclass_fields__)


def test_the_task_of_task_md_was_learnt_as_it_says():
    rows = run_page.read(ROOT / "evidence" / "tasks" / "dice-seed0-grpo.jsonl")
    assert len(rows) == 40
    first, last = rows[0]["accuracy"], rows[-1]["accuracy"]
    assert f"went from {first:.2f} to {last:.2f}\n" in PAGES["task.md"]


def test_the_task_of_task_md_is_a_task(tmp_path):
    code = block("task.md", "def demos(")
    assert max(map(len, code.splitlines())) <= 100
    (tmp_path / "dice.py").write_text(code)
    spec = importlib.util.spec_from_file_location("dice", tmp_path / "dice.py")
    dice = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dice)
    train, test = dice.rows("train", n=200), dice.rows("test", n=200)
    assert train == dice.rows("train", n=200)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert train[0]["answer"] in dice.oracle(train[0])[-1]["content"]
    demos = dice.demos(20)
    with_call = [conversation for conversation in demos if len(conversation) == 4]
    assert 0 < len(with_call) < len(demos)  # something is left to be found
    assert all(conversation[0]["role"] == "user" for conversation in demos)
    for _, _, result, answer in with_call:
        assert result["content"] in answer["content"]


def test_the_mcp_server_of_tools_md_is_a_set_of_tools(tmp_path, monkeypatch):
    servers = ROOT / ".venv" / "mcp-servers" / "bin"
    if not (servers / "mcp-server-time").exists():
        pytest.skip("mcp-server-time is not installed: `make test` does that")
    monkeypatch.setenv("PATH", f"{servers}:{os.environ['PATH']}")
    text = block("tools.md", "mcpServers", "json")
    assert len(lines_of(text)) == 3
    (tmp_path / "servers.json").write_text(text)

    async def call():
        box = Toolbox([f"mcp:{tmp_path}/servers.json"], timeout=PATIENCE)
        try:
            return await box.open().call("get_current_time", {"timezone": "UTC"})
        finally:
            await box.close()

    content, error, _ = asyncio.run(call())
    assert error is None and "UTC" in content

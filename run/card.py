"""The README.md of a model that is taken away (push.py): what it was made of and what it can do, as
the files of its run say, and nothing that the run was told in confidence.

    stages = stages_of("out/calc", classes)      # what trained it, the last one first
    text = card(About(name="calc", stages=stages, …))
"""

import dataclasses
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from run import config

# Keys that say how a run was run, and that may name servers, files or accounts: their values stay
# where they are. So does every other value that looks like an address, a path or a key.
PRIVATE = {"urls", "engine_options", "tool_options", "reward_options", "curriculum_from"}
PRIVATE |= {"database", "chat_template"}
NOT_TOLD = {"out_dir", "resume", "logger", "save_every"}  # they are no part of what was learnt
LOOKS_PRIVATE = re.compile(
    r"://|^[~/]|[\s,:'\"(=][~/][\w/]|\b(hf|sk|gh[pousr]|xox[bp])[-_]\w{8,}|AKIA\w{12}"
    r"|(key|token|secret|password)\w*\s*[=:]",
    re.I,
)
LONG = 200  # characters of a value; a longer one is left out
# Of the last line of metrics.jsonl and of eval.json, what a reader looks for.
OF_A_STEP = ("reward", "accuracy", "tool_call_rate", "loss", "entropy", "val_loss", "val_accuracy")
NOT_MEASURED = {"model", "data", "split", "seed", "temperature", "rows", "saved", "sources"}


@dataclass
class Stage:
    """One training run."""

    script: str  # train_grpo.py
    cfg: object  # its Config
    place: Path  # where it was run, as far as its out_dir says: its paths begin there


@dataclass
class About:
    """All that a card says."""

    name: str
    stages: list[Stage]  # of which the last one is the first
    last_step: dict  # of metrics.jsonl
    evaluation: dict  # eval.json; {} where there is none of this model
    is_adapter: bool
    is_merged: bool
    sees: bool  # it takes images
    license: str
    serve: str  # the command by which vLLM serves it
    versions: dict[str, str]


def stages_of(model: str, classes: dict[str, type]) -> list[Stage]:
    """Finds the runs that led to a model: its own, then that of the model it began with, …
    classes: the Config of each script, by the script's name."""
    stages = []
    seen = set()
    while True:
        folder = home_of(model)
        file = folder / "config.py"
        script = None
        for name, kind in classes.items():
            if config.is_saved(kind, file, is_older=True):
                script = name
        if script is None or folder in seen:
            return stages
        seen.add(folder)
        # what was saved holds values alone, so nothing is run by reading it
        cfg = config.parse(classes[script], ["--config", str(file)])
        stages.append(Stage(script, cfg, place_of(folder, cfg.out_dir)))
        model = str(stages[-1].place / cfg.model)


def home_of(model: str) -> Path:
    """Returns the out_dir that a model's folder is, or lies in as a checkpoint."""
    folder = Path(model).expanduser().resolve()
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def place_of(folder: Path, out_dir: str) -> Path:
    """Returns the folder in which a run was begun whose out_dir is now `folder`."""
    parts = Path(out_dir).parts
    if not Path(out_dir).is_absolute() and folder.parts[-len(parts) :] == parts:
        return folder.parents[len(parts) - 1]
    return Path.cwd()


def is_hub_id(name: str, place: Path) -> bool:
    """Says whether a name is one of the hub's, and no path that began in `place`."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or name.startswith("out/"):
        return False
    is_file = name.endswith((".jsonl", ".json", ".parquet"))
    return not is_file and not (place / name).parent.is_dir()


def root_of(stages: list[Stage]) -> str:
    """Returns the hub id of the model that all began with; "" if it was made from scratch, or is a
    folder that others have not."""
    first = stages[-1]
    return first.cfg.model if is_hub_id(first.cfg.model, first.place) else ""


def settings(cfg) -> tuple[dict, list[str]]:
    """Returns (what was set and may be told, the names of what was set and may not)."""
    told = {}
    untold = []
    changed = config.changed(cfg)
    for field in dataclasses.fields(cfg):
        name = field.name
        if name not in changed or name in NOT_TOLD:
            continue
        value = getattr(cfg, name)
        text = str(value)
        if isinstance(value, tuple):
            text = ",".join(map(str, value))
        if isinstance(value, bool):
            text = text.lower()
        if name in PRIVATE or LOOKS_PRIVATE.search(text) or len(text) > LONG:
            untold.append(name)
        else:
            told[name] = text
    return told, untold


def command(stage: Stage) -> str:
    """Writes the command line that gives what was set and may be told."""
    told, _ = settings(stage.cfg)
    return shlex.join(["python", stage.script, *(f"--{key}={text}" for key, text in told.items())])


def card(about: About) -> str:
    """Writes the card: YAML that the hub reads, then markdown."""
    parts = [
        f"---\n{front_matter(about)}\n---",
        f"# {about.name}",
        what_it_is(about),
        how_to_use(about),
        how_it_was_made(about),
        numbers(about),
        "## Versions\n\nWhere this card was written: "
        + ", ".join(f"{name} {version}" for name, version in about.versions.items())
        + ".",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(about: About) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    root = root_of(about.stages)
    datasets = []
    for stage in about.stages:
        name = stage.cfg.data.partition(":")[0]
        if is_hub_id(name, stage.place):
            datasets.append(name)
    results = []
    for name, value in measured(about.evaluation).items():
        if name == "accuracy" or name.startswith(("avg@", "pass@", "maj@")):
            result = EvalResult(
                task_type="text-generation",
                dataset_type=public(about.evaluation["data"]),
                dataset_name=public(about.evaluation["data"]),
                dataset_split=about.evaluation.get("split"),
                metric_type=name,
                metric_value=round(value, 4),
            )
            results.append(result)
    method = "grpo" if "grpo" in about.stages[0].script else "sft"
    data = ModelCardData(
        base_model=root or None,
        base_model_relation=("adapter" if about.is_adapter else "finetune") if root else None,
        datasets=list(dict.fromkeys(datasets)) or None,
        license=about.license or None,
        library_name="peft" if about.is_adapter else "transformers",
        pipeline_tag="image-text-to-text" if about.sees else "text-generation",
        tags=["nanotool", "tool-use", method, *(["lora"] if about.is_adapter else [])],
        model_name=about.name,
        eval_results=results or None,
    )
    return data.to_yaml()


def public(text: str) -> str:
    """Returns a text that may be told, or the last part of a path."""
    if not LOOKS_PRIVATE.search(text):
        return text
    return "" if "://" in text else Path(text).name


def what_it_is(about: About) -> str:
    last = about.stages[0]
    method = "GRPO" if "grpo" in last.script else "SFT"
    kind = "A whole model"
    if about.is_adapter:
        kind = f"A LoRA adapter of rank {last.cfg.lora_r}, not a whole model"
    elif about.is_merged:
        kind = "A whole model, an adapter merged into its base"
    tools = ", ".join(public(tool) for tool in last.cfg.tools) or "none"
    lines = [f"{kind}, trained by {method} with nanotool. Tools: {tools}."]
    root = root_of(about.stages)
    if root:
        lines.append(f"It began with `{root}`.")
    elif about.stages[-1].cfg.model == "tiny":
        lines.append("It was made from scratch, small, for its task alone.")
    else:
        lines.append("It began with a model in a folder of the machine where it was trained.")
    if not about.license:
        lines.append("Its license is not known here: that of its base and its data holds.")
    return " ".join(lines)


def how_to_use(about: About) -> str:
    auto = "AutoModelForImageTextToText" if about.sees else "AutoModelForCausalLM"
    lines = ["## Use", "", "```python"]
    if about.is_adapter:
        base = root_of(about.stages) or "the folder of its base"
        lines += ["from peft import PeftModel"]
        lines += [f"from transformers import AutoTokenizer, {auto}", ""]
        lines += [f'base = {auto}.from_pretrained("{base}", dtype="auto")']
        lines += [f'model = PeftModel.from_pretrained(base, "{about.name}")']
    else:
        lines += [f"from transformers import AutoTokenizer, {auto}", ""]
        lines += [f'model = {auto}.from_pretrained("{about.name}", dtype="auto")']
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{about.name}")', "```", ""]
    lines += [
        f"(`{about.name}` is the folder of these files, or the name of this repository.) Tools go "
        "into the prompt by the tokenizer's chat template: `apply_chat_template(messages, "
        "tools=…)`. With calls read, as an endpoint:",
        "",
        f"```bash\n{download(about.name)}{about.serve}\n```",
        "",
        "As a GGUF file, by [llama.cpp](https://github.com/ggml-org/llama.cpp):",
        "",
        f"```bash\n{download(about.name)}{gguf_command(about)}\n```",
    ]
    return "\n".join(lines)


def folder_of(name: str) -> str:
    """Returns the folder in which the files of a repository, or those of that folder, lie."""
    return name.rpartition("/")[2]


def download(name: str) -> str:
    """Writes the line that fetches a repository; "" for a folder."""
    return f"hf download {name} --local-dir {folder_of(name)}\n" if "/" in name else ""


def gguf_command(about: About) -> str:
    """Writes llama.cpp's command that converts these files."""
    folder = folder_of(about.name)
    if about.is_adapter:
        base = root_of(about.stages)
        of_base = f"--base-model-id {base}" if base else "--base FOLDER_OF_ITS_BASE"
        return f"python convert_lora_to_gguf.py {folder} {of_base} --outfile adapter.gguf"
    convert = f"python convert_hf_to_gguf.py {folder} --outtype bf16"
    lines = [f"{convert} --outfile model.gguf"]
    if about.sees:
        lines.append(f"{convert} --outfile mmproj.gguf --mmproj")
    return "\n".join(lines)


def how_it_was_made(about: About) -> str:
    lines = ["## How it was made", ""]
    for number, stage in enumerate(reversed(about.stages), 1):
        _, untold = settings(stage.cfg)
        lines += [f"{number}. `{stage.script}`", "", f"   ```bash\n   {command(stage)}\n   ```", ""]
        if untold:
            lines += [f"   Set too, and not told here: {', '.join(untold)}.", ""]
    return "\n".join(lines).rstrip()


def measured(evaluation: dict) -> dict:
    """Returns the numbers of an eval.json."""
    found = {}
    for name, value in evaluation.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and name not in NOT_MEASURED:
            found[name] = value
    return found


def numbers(about: About) -> str:
    """Writes what the last step of training and the evaluation gave."""
    lines = []
    if about.evaluation:
        of = about.evaluation
        lines += ["## Evaluation", ""]
        about_it = f"{of['problems']} problems of `{public(of['data'])}` ({of['split']})"
        lines += [f"{about_it}, {of['samples']} each, temperature {of['temperature']:g}.", ""]
        if about.is_merged:
            lines += ["They were played with the adapter, before it was merged.", ""]
        lines += ["| | |", "|---|---|"]
        for name, value in measured(of).items():
            if name in ("problems", "samples") or name.startswith("seconds"):
                continue
            lines.append(f"| {name} | {value:.4g} |")
        lines.append("")
    rows = [(name, about.last_step[name]) for name in OF_A_STEP if name in about.last_step]
    if rows:
        lines += [f"## Training, step {about.last_step['step'] + 1}", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in rows if value is not None]
    return "\n".join(lines).rstrip()


def last_line(file: Path) -> dict:
    """Reads the last whole line of a metrics.jsonl; {} where there is none."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return json.loads(lines[-1])
    except (OSError, ValueError, IndexError):
        return {}

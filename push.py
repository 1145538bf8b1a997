"""Takes a trained model or adapter away, with a card: to a folder, or to a repository on the hub.

    python push.py --run=out/calc --to=shared/calc             # a folder: nothing is sent
    python push.py --run=out/calc_lora --to=hub:you/calc-lora  # a new repository, private
    python push.py --run=out/calc_lora --to=hub:you/calc --merge=true   # whole weights
    python push.py --help

What goes: weights, tokenizer, chat template, and a README.md that is made of what the run's files
say (run/card.py): base, data, settings, command lines, its last step and its evaluation. What never
goes: rollouts, metrics, logs, config.py, states of optimizers. Values of keys that may name
servers, files or accounts are not in the card either.

Only `hub:` sends anything. A run that is not finished, or whose files are torn, is refused, and so
is a target that holds something.
"""

import contextlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from run import config

if __name__ == "__main__":
    config.answer_help(__file__)

import httpx2 as httpx

import train_grpo
import train_sft
from chat import Chat
from engines.serving import command_for
from learning import checkpoint, merge
from learning import model as models
from run import card
from run.config import UserError

CLASSES = {"train_grpo.py": train_grpo.Config, "train_sft.py": train_sft.Config}
# All that is taken of a folder; whatever else lies there stays.
TAKEN = """
    *.safetensors *.safetensors.index.json config.json generation_config.json adapter_config.json
    tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json added_tokens.json
    vocab.json vocab.txt merges.txt chat_template.jinja preprocessor_config.json
    processor_config.json video_preprocessor_config.json
""".split()
NO_HUB = (KeyError, ValueError, TypeError)  # what the client raises where something else answers
PACKAGES = ("torch", "transformers", "peft")


@dataclass
class Config:
    run: str = ""  # the out_dir of train_grpo.py or train_sft.py, or one of its checkpoints
    to: str = ""  # a folder that is not there yet, or hub:user/name
    merge: bool = False  # of an adapter: whole weights, which need no peft and no base
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of merged weights
    license: str = ""  # by the hub's names, such as apache-2.0; "": the base's, if its files say it
    private: bool = True  # hub: a new repository is seen by you alone
    replace: bool = False  # hub: takes the place of what is in the repository, in one commit


def check(cfg: Config) -> None:
    """Checks the rules across keys."""
    if not cfg.run:
        raise UserError("run is missing: write --run=<the out_dir of a training run>")
    if not cfg.to:
        raise UserError("to is missing: write --to=<a new folder>, or --to=hub:user/name")
    is_hub = cfg.to.startswith("hub:")
    rules = (
        (not cfg.merge, "dtype", "without merge=true: weights go as they are"),
        (not is_hub, "private replace", "with a folder: only --to=hub:… has a repository"),
    )
    config.refuse_unused_keys(cfg, rules)
    if is_hub and not re.fullmatch(r"hub:[\w-][\w.-]*/[\w-][\w.-]*", cfg.to):
        raise UserError(f"to = {cfg.to!r}: expected hub:user/name, or a folder")
    if not is_hub and Path(cfg.to).name in ("", ".."):  # the model is called by its last part
        raise UserError(f"to = {cfg.to!r}: expected a new folder, called as the model is to be")
    if not is_hub and not re.fullmatch(r"\w[\w.-]*", Path(cfg.to).name):
        raise UserError(
            f"to = {cfg.to!r}: the model is called by its last part, in the commands of its card "
            "too: expected letters, digits, ., _ and - there"
        )
    if cfg.license and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", cfg.license):
        raise UserError(f"license = {cfg.license!r}: expected a name such as apache-2.0 or mit")


# -- what is there


def trained(run: str) -> tuple[Path, Path]:
    """Finds (the folder of a run's model, its out_dir). UserError where it is not whole."""
    folder = Path(run).expanduser()
    home = card.home_of(run)
    if not (home / "config.py").is_file():
        raise UserError(
            f"run = {run!r}: expected the out_dir of a training run, with its config.py"
        )
    if home != folder.resolve():  # a checkpoint, which is whole or not at all
        damage = checkpoint.damage_of(folder)
    else:
        damage = checkpoint.unfinished(folder)
    if damage:
        raise UserError(f"run = {run!r} is not whole: {damage}")
    if not models.is_adapter(run) and not (folder / "config.json").is_file():
        raise UserError(f"run = {run!r} holds no model: give the out_dir of a training run")
    return folder, home


def files_of(folder: Path) -> dict[str, Path | bytes]:
    """Lists what goes of a model's folder, by name; of settings that name a folder of this machine,
    a copy without it."""
    found = {}
    for pattern in TAKEN:
        for path in sorted(folder.glob(pattern)):
            found[path.name] = path
    for name in ("config.json", "tokenizer_config.json"):
        if name not in found:
            continue
        values = json.loads(found[name].read_text(encoding="utf-8"))
        kept = {k: v for k, v in values.items() if k not in ("_name_or_path", "name_or_path")}
        if kept != values:
            found[name] = (json.dumps(kept, indent=2) + "\n").encode()
    return found


def evaluation_of(home: Path, folder: Path) -> dict:
    """Reads the newest eval.json of a run; {} where there is none, or the model is newer."""
    files = [*home.glob("eval/eval.json"), *home.glob("eval-*/eval.json")]
    if home.resolve() != folder.resolve() or not files:  # it is of the finished model
        return {}
    newest = max(files, key=lambda file: file.stat().st_mtime)  # of several evaluations
    weights = max(path.stat().st_mtime for path in folder.glob("*.safetensors"))
    if newest.stat().st_mtime < weights:
        config.tell(f"{newest} is older than the model, and is not told in its card")
        return {}
    try:
        numbers = json.loads(newest.read_text(encoding="utf-8"))
        is_whole = {"data", "split", "problems", "samples", "temperature"} <= numbers.keys()
    except (ValueError, AttributeError) as error:
        raise UserError(f"cannot read {newest} ({error}): evaluate again") from None
    # with --model, or of an API, it is of another model than the run's
    name = str(numbers.get("model"))
    is_of_this = Path(name).expanduser().resolve() == home or Path(name).name == home.name
    return numbers if is_whole and is_of_this else {}


def license_of(stages: list[card.Stage]) -> str:
    """Reads the license of the base from the card in its files here; "" if they say none."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    root = card.root_of(stages)
    file = stages[-1].place / stages[-1].cfg.model / "README.md"
    if root:  # a marker that is no path: known not to exist
        cached = try_to_load_from_cache(root, "README.md")
        file = Path(cached) if isinstance(cached, str) else file
    if not file.is_file():
        return ""
    try:
        return str(ModelCard.load(file, ignore_metadata_errors=True).data.get("license") or "")
    except (OSError, ValueError):
        return ""


def versions() -> dict[str, str]:
    """Names what is installed, and the commit of nanotool where it is a repository."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, cwd=config.HERE, capture_output=True, text=True)
    except OSError:  # there is no git
        return found
    if done.returncode == 0:
        found["nanotool"] = done.stdout.strip()
    return found


def make_card(name: str, folder: Path, home: Path, cfg: Config) -> str:
    """Writes the card of what is in `folder`, as `name` is what others call it."""
    stages = card.stages_of(str(home), CLASSES)
    if not stages:
        raise UserError(f"{home / 'config.py'} is of another version: its card cannot be written")
    last = stages[0].cfg
    is_adapter = models.is_adapter(str(folder)) and not cfg.merge
    chat = Chat(models.load_tokenizer(str(folder)), last.format, [], last.template_options)
    root = card.root_of(stages)
    here = card.folder_of(name)
    serve = command_for(
        root or "FOLDER_OF_ITS_BASE" if is_adapter else here,
        chat,
        has_calls=bool(last.tools),
        adapter=here if is_adapter else "",
        lora_r=last.lora_r,
        template=f"{here}/chat_template.jinja",
    )
    about = card.About(
        name=name,
        stages=stages,
        last_step=card.last_line(home / "metrics.jsonl") if home == folder.resolve() else {},
        evaluation=evaluation_of(home, folder),
        is_adapter=is_adapter,
        is_merged=cfg.merge,
        sees=(folder / "preprocessor_config.json").is_file(),
        license=cfg.license or license_of(stages),
        serve=serve,
        versions=versions(),
    )
    return card.card(about)


# -- where it goes


def to_folder(files: dict[str, Path | bytes], target: Path) -> None:
    """Writes files to a new folder, whole or not at all."""
    aside = target.with_name(f".{target.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        for name, content in files.items():
            if isinstance(content, bytes):
                (aside / name).write_bytes(content)
            else:
                shutil.copyfile(content, aside / name)
        aside.replace(target)  # which is empty, or not there
    except OSError as error:
        raise UserError(
            f"cannot write to to = '{target}' ({error.strerror}): make room, or give another folder"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_hub(name: str, replace: bool):
    """Checks that a repository can be written, before anything slow; returns (what talks to the
    hub, whether it is there)."""
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise UserError(
            "no token of the hub is here: make one that may write at huggingface.co/settings/tokens"
            ", and give it by `hf auth login` or in HF_TOKEN"
        )
    hub = HfApi(library_name="nanotool")
    with hub_problem(name):
        there = hub.repo_exists(name)
        holds = set(hub.list_repo_files(name)) - {".gitattributes"} if there else set()
    if holds and not replace:  # an empty one is what a push leaves that the hub refused
        raise UserError(f"to = 'hub:{name}' is there: give another name, or --replace=true")
    return hub, there


@contextlib.contextmanager
def hub_problem(name: str):
    """Surrounds what asks the hub: what it, or the way to it, refuses becomes one sentence."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError, *NO_HUB) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"the hub did not take {name} ({reason})") from None


def to_hub(hub, files: dict[str, Path | bytes], name: str, cfg: Config, there: bool) -> str:
    """Sends files as one commit; returns the repository's address."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations = []
    for path, content in files.items():
        source = content if isinstance(content, bytes) else str(content)
        operations.append(CommitOperationAdd(path_in_repo=path, path_or_fileobj=source))
    with hub_problem(name):
        if there:  # else an adapter would lie beside whole weights
            for path in hub.list_repo_files(name):
                if path not in files and path != ".gitattributes":
                    operations.append(CommitOperationDelete(path_in_repo=path))
        else:
            hub.create_repo(name, private=cfg.private)
        hub.create_commit(name, operations, commit_message="A model trained with nanotool")
    return f"{hub.endpoint}/{name}"


def push(cfg: Config) -> str:
    """Takes a model away; returns where it is."""
    # 1. all checks, before weights are read
    check(cfg)
    folder, home = trained(cfg.run)
    is_adapter = models.is_adapter(str(folder))
    if cfg.merge and not is_adapter:
        raise UserError(f"merge = True, but run = {cfg.run!r} is a whole model: drop it")
    hub = None
    there = False
    if cfg.to.startswith("hub:"):
        name = cfg.to.removeprefix("hub:")
        if is_adapter and not cfg.merge:
            base = models.adapter_settings(str(folder))["base_model_name_or_path"]
            if Path(base).expanduser().exists():
                raise UserError(
                    f"run = {cfg.run!r} is an adapter over {base}, a folder that others have not: "
                    "give --merge=true"
                )
        hub, there = check_hub(name, cfg.replace)
    else:
        target = config.fresh_dir(Path(cfg.to).expanduser(), key="to")
        name = target.name

    # 2. what goes
    text = make_card(name, folder, home, cfg)
    with tempfile.TemporaryDirectory() as scratch:
        source = folder
        if cfg.merge:
            source = Path(scratch) / "merged"
            merge.merge(merge.Config(adapter=str(folder), out_dir=str(source), dtype=cfg.dtype))
        files = files_of(source) | {"README.md": text.encode()}

        # 3. there
        if hub:
            return to_hub(hub, files, name, cfg, there)
        to_folder(files, target)
        return str(target)


def main(argv: list[str]) -> None:
    cfg = config.parse(Config, argv, check)
    print(f"pushed: {push(cfg)}")


if __name__ == "__main__":
    config.main(main)

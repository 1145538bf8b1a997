"""A model that is taken away: what goes, what its card says, and what is refused.

    pytest tests/test_push.py

The runs are real, of a model with 16 dimensions. The hub is a server on 127.0.0.1 that answers as
huggingface.co does where small files are sent; the client is the real one.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from test_resume import configured, place  # fixtures are found by their names

import push
import train_grpo
import train_sft
from learning import model as models
from run import card, config
from run import page as run_page
from run.config import UserError

IDS = torch.tensor([[5, 6, 7, 8, 9]])
SECRET = "sk-abcdefgh12345678"
CONFIDENTIAL = {
    "system_prompt": f"the key is {SECRET}",
    "engine_options": ("canary=false",),
    "reward_options": (),
}
SHORT = {"steps": 2, "eval_every": 0, "eval_data": "", "eval_rows": 128, "warmup": 1}


@pytest.fixture(scope="module")
def runs(place):
    """The folder with three finished runs: sft, grpo (which goes on from it) and lora."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(run_page, "curves", lambda out_dir: None)
        train_sft.train(configured("sft", "sft", epochs=0.4, warmup=0, optimizer="adamw"))
        train_grpo.train(configured("grpo", "grpo", model="sft", **SHORT | CONFIDENTIAL))
        train_grpo.train(configured("grpo_lora", "lora", model="sft", **SHORT))
        evaluation = {
            "model": "grpo",
            "data": str(place / "held.jsonl"),
            "split": "test",
            "problems": 2,
            "samples": 1,
            "temperature": 0.0,
            "accuracy": 0.75,
            "avg@1": 0.75,
            "ci95_low": 0.5,
        }
        (place / "grpo" / "eval").mkdir()
        (place / "grpo" / "eval" / "eval.json").write_text(json.dumps(evaluation))
        (place / "grpo" / "eval" / "rollouts.jsonl").write_text('{"private": "rollout"}')
        yield place


@pytest.fixture
def here(runs, monkeypatch):
    monkeypatch.chdir(runs)
    return runs


def pushed(**keys):
    cfg = push.Config(**keys)
    push.check(cfg)
    return Path(push.push(cfg))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def front_matter(folder):
    _, head, _ = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head)


def test_a_whole_model_in_a_folder_has_the_same_logits(here, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = pushed(run="grpo", to=f"{tmp_path}/calc", license="apache-2.0")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ours, _ = models.load("grpo", "none", device="cpu")
    assert torch.equal(logits(loaded), logits(ours))
    assert AutoTokenizer.from_pretrained(folder).chat_template
    names = {path.name for path in folder.iterdir()}
    assert "README.md" in names and "model.safetensors" in names
    left = {"config.py", "metrics.jsonl", "rollouts.jsonl", "checkpoints", "eval", "report.html"}
    assert not names & left
    assert not any(name.startswith(".") for name in names)


def test_its_card_says_what_the_run_says_and_nothing_confidential(here, tmp_path):
    folder = pushed(run="grpo", to=f"{tmp_path}/calc", license="apache-2.0")
    text = (folder / "README.md").read_text()
    head = front_matter(folder)
    assert head["license"] == "apache-2.0" and head["library_name"] == "transformers"
    assert set(head["tags"]) == {"nanotool", "tool-use", "grpo"}
    assert "base_model" not in head  # it was made from a folder that others have not
    (result,) = head["model-index"][0]["results"]
    assert {m["type"]: m["value"] for m in result["metrics"]} == {"accuracy": 0.75, "avg@1": 0.75}
    assert result["dataset"]["name"] == "held.jsonl"
    # both runs, each with its command, the first one first
    sft, grpo = re.findall(r"python train_(sft|grpo)\.py (.*)", text)
    assert sft[0] == "sft" and "--data=demos.jsonl" in sft[1]
    assert grpo[0] == "grpo" and "--learning_rate=0.01" in grpo[1] and "--model=sft" in grpo[1]
    assert "not told here: engine_options, system_prompt." in text.replace(
        "system_prompt, engine_options", "engine_options, system_prompt"
    )
    assert "canary=false" not in text
    metrics = [json.loads(line) for line in open("grpo/metrics.jsonl")]
    assert f"| reward | {metrics[-1]['reward']:.4g} |" in text and "step 2" in text
    assert "| accuracy | 0.75 |" in text
    assert "python convert_hf_to_gguf.py calc --outtype bf16 --outfile model.gguf" in text
    assert f"torch {torch.__version__}" in text
    for path in folder.iterdir():
        content = path.read_bytes()
        assert SECRET.encode() not in content, path
        assert str(here).encode() not in content, path


@pytest.mark.parametrize("why", ["older than the model", "of another model"])
def test_an_evaluation_that_is_not_of_this_model_is_not_told(copy, tmp_path, why, capsys):
    file = copy / "eval" / "eval.json"
    numbers = json.loads(file.read_text()) | {"model": "copy"}
    if why == "of another model":
        numbers["model"] = "gpt"
    file.write_text(json.dumps(numbers))
    assert "0.75" in (pushed(run=str(copy), to=f"{tmp_path}/a") / "README.md").read_text() or (
        numbers["model"] == "gpt"
    )
    if why == "older than the model":
        os.utime(file, (0, 0))
    text = (pushed(run=str(copy), to=f"{tmp_path}/b") / "README.md").read_text()
    assert "0.75" not in text and "## Evaluation" not in text
    assert ("is older than the model" in capsys.readouterr().err) == (numbers["model"] == "copy")


def test_the_commands_of_a_card_are_read_by_the_scripts(here, tmp_path):
    stages = card.stages_of("lora", push.CLASSES)
    assert [stage.script for stage in stages] == ["train_grpo.py", "train_sft.py"]
    for stage in stages:
        _, script, *argv = card.command(stage).split(" ")
        cfg = config.parse(push.CLASSES[script], argv)
        told, _ = card.settings(stage.cfg)
        assert told
        assert all(getattr(cfg, name) == getattr(stage.cfg, name) for name in told)


def test_paths_are_those_of_the_place_where_it_was_trained(here, tmp_path, monkeypatch):
    """Seen from elsewhere, out/calc_sft would look like a name of the hub."""
    ours = (pushed(run="grpo", to=f"{tmp_path}/calc") / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    theirs = pushed(run=str(here / "grpo"), to=f"{tmp_path}/other/calc") / "README.md"
    assert theirs.read_text() == ours and "python train_sft.py" in ours
    for name in ("out/calc_sft", "rows/x.jsonl", f"{here.name}/base"):
        assert not card.is_hub_id(name, here.parent)
    assert card.is_hub_id("Qwen/Qwen2.5-0.5B-Instruct", here.parent)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_base_and_data_of_the_hub_are_named(here, tmp_path, method):
    """And their license is that which the base's card here says, if it is here."""
    values = {"model": "Qwen/Qwen2.5-0.5B-Instruct", "data": "openai/gsm8k:main", "lora_r": 8}
    cfg = train_grpo.Config(**values)
    stage = card.Stage("train_grpo.py", cfg, here)
    about = card.About(
        name="you/calc",
        stages=[stage],
        last_step={},
        evaluation={},
        is_adapter=method == "lora",
        is_merged=False,
        sees=False,
        license="",
        serve="vllm serve",
        versions={},
    )
    text = card.card(about)
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["base_model"] == values["model"] and head["datasets"] == ["openai/gsm8k"]
    assert head["base_model_relation"] == ("adapter" if method == "lora" else "finetune")
    assert "license" not in head and "Its license is not known here" in text
    if method == "lora":
        assert f"calc --base-model-id {values['model']} --outfile adapter.gguf" in text


def test_an_adapter_is_loaded_by_peft_and_merged_weights_need_none(here, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ours, _ = models.load("lora", "none", device="cpu")
    folder = pushed(run="lora", to=f"{tmp_path}/adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("sft"), folder)
    assert torch.equal(logits(loaded), logits(ours))
    assert front_matter(folder)["library_name"] == "peft"
    assert "convert_lora_to_gguf.py adapter --base FOLDER_OF_ITS_BASE" in (
        (folder / "README.md").read_text()
    )

    whole = pushed(run="lora", to=f"{tmp_path}/whole", merge=True, dtype="float32")
    assert not (whole / "adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(whole)
    assert (logits(merged) - logits(ours)).abs().max() < 1e-5
    assert "an adapter merged into its base" in (whole / "README.md").read_text()
    assert str(here) not in (whole / "config.json").read_text()


def test_a_checkpoint_goes_too_without_its_states(here, tmp_path):
    (path, *_) = sorted(Path("grpo/checkpoints").iterdir())
    folder = pushed(run=str(path), to=f"{tmp_path}/at_two")
    assert (folder / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    assert not {"state.pt", "digests.json"} & {file.name for file in folder.iterdir()}
    assert "0.75" not in (folder / "README.md").read_text()  # that is of the finished model


# -- refused


@pytest.fixture
def copy(here, tmp_path):
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree("grpo", tmp_path / "copy"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def refusal(**keys) -> str:
    with pytest.raises(UserError) as caught:
        pushed(**keys)
    return str(caught.value)


def test_an_unfinished_or_torn_run_is_refused_and_nothing_is_written(copy, tmp_path):
    to = tmp_path / "there"
    keys = {"run": str(copy), "to": str(to)}
    checkpoints = copy / "checkpoints"
    step = sorted(checkpoints.iterdir())[-1]

    code = f"import fcntl; file = open({str(copy / config.LOCK)!r}, 'w')"
    code += "; fcntl.lockf(file, fcntl.LOCK_EX); print(1, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        other.stdout.readline()
        assert "in use by another process" in refusal(**keys)
        other.stdin.close()

    whole = (copy / "model.safetensors").read_bytes()
    cut(copy / "model.safetensors")
    assert f"is not that of {step}: go on with --resume=true" in refusal(**keys)
    (copy / "model.safetensors").unlink()
    assert "has not ended: go on with --resume=true" in refusal(**keys)
    (copy / "model.safetensors").write_bytes(whole)
    cut(step / "state.pt")
    assert "state.pt has other bytes than were written" in refusal(**keys)
    assert "state.pt has other bytes" in refusal(run=str(step), to=str(to))
    shutil.rmtree(checkpoints)  # somebody needed the room
    cut(copy / "model.safetensors")
    assert "model.safetensors cannot be read" in refusal(**keys)
    (copy / "config.py").unlink()
    assert "with its config.py" in refusal(**keys)
    assert not to.exists()


@pytest.mark.parametrize(
    "keys, why",
    [
        ({}, "run is missing"),
        ({"run": "grpo"}, "to is missing"),
        ({"run": "grpo", "to": "hub:alone"}, "expected hub:user/name"),
        ({"run": "grpo", "to": "hub:a/../b"}, "expected hub:user/name"),
        ({"run": "grpo", "to": "."}, "a new folder, called as the model is to be"),
        ({"run": "grpo", "to": "a/x y"}, "expected letters, digits, ., _ and - there"),
        ({"run": "grpo", "to": 'x"<b>'}, "expected letters, digits, ., _ and - there"),
        ({"run": "grpo", "to": "--x"}, "expected letters, digits, ., _ and - there"),
        ({"run": "grpo", "to": "x", "dtype": "float32"}, "dtype has no effect without merge=true"),
        ({"run": "grpo", "to": "x", "private": False}, "private has no effect with a folder"),
        ({"run": "grpo", "to": "x", "license": "My License"}, "expected a name such as apache-2.0"),
        ({"run": "grpo", "to": "x", "merge": True}, "is a whole model: drop it"),
        ({"run": "nowhere", "to": "x"}, "expected the out_dir of a training run"),
        ({"run": "grpo", "to": "sft"}, "to 'sft' is not empty"),
        ({"run": "lora", "to": "hub:you/calc"}, "a folder that others have not: give --merge=true"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(here, keys, why):
    assert why in refusal(**keys)
    assert not Path("x").exists()


def test_a_full_disk_leaves_nothing_half_written(here, tmp_path, monkeypatch):
    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", no_room)
    assert "No space left on device" in refusal(run="grpo", to=f"{tmp_path}/calc")
    assert [list(path.iterdir()) for path in tmp_path.iterdir() if path.is_dir()] in ([], [[]])


def test_values_that_look_like_addresses_paths_or_keys_are_not_told():
    told, untold = card.settings(
        train_grpo.Config(
            model="/home/me/models/x",
            data="openai/gsm8k:main",
            urls=("http://10.0.0.7:8000",),
            tools=("python", "mcp:~/servers.json"),
            rewards=("correct", "judge:0.5"),
            reward_options=("judge.key=OTHER",),
            tool_options=("search.url=x",),
            system_prompt="hf_abcdefghijklmnop",
            answer_after="api_key: 7",
            prompt_template="{prompt} " + 300 * "x",
            learning_rate=1e-5,
            out_dir="out/mine",
        )
    )
    assert told == {
        "data": "openai/gsm8k:main",
        "rewards": "correct,judge:0.5",
        "learning_rate": "1e-05",
    }
    hidden = {"model", "urls", "tools", "reward_options", "tool_options", "system_prompt"}
    hidden |= {"answer_after"}
    assert set(untold) == hidden | {"prompt_template"}


# -- the hub


class Hub:
    """As much of huggingface.co as a push of small files asks for. refuses: status of a commit."""

    def __init__(self):
        self.repositories = {}  # name: {path: bytes}
        self.created = []
        self.tokens = set()
        self.refuses = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                """Says nothing."""

            def do_GET(self):
                self.answer(b"")

            def do_POST(self):
                self.answer(self.rfile.read(int(self.headers["content-length"])))

            def answer(self, body):
                outer.tokens.add(self.headers.get("authorization"))
                status, said = outer.said(self.path.partition("?")[0], body)
                text = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(text)))
                if status == 404:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.end_headers()
                self.wfile.write(text)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def said(self, path, body):
        if path == "/api/validate-yaml":  # of the card
            head = json.loads(body)["content"].split("---\n")[1]
            errors = [] if yaml.safe_load(head)["tags"] else [{"message": "no tags"}]
            return 200, {"errors": errors, "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.created.append(asked)
            self.repositories[name] = {}
            return 200, {"url": f"{self.url}/{name}", "name": name, "id": name}
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        files = self.repositories[name]
        if "/preupload/" in path:
            asked = json.loads(body)["files"]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{"path": file["path"], **how} for file in asked]}
        if "/commit/" in path:
            if self.refuses:
                return self.refuses, {"error": "You are out of storage"}
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            oid = 40 * "a"
            return 200, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid}
        if "/tree/" in path:
            return 200, [{"type": "file", "path": f, "size": 1, "oid": "a"} for f in files]
        siblings = [{"rfilename": file} for file in files]
        return 200, {"id": name, "sha": 40 * "a", "siblings": siblings}


@pytest.fixture
def hub():
    made = Hub()
    yield made
    made.server.shutdown()
    made.server.server_close()


def by_command(hub, *argv):
    """python push.py, whose hub is ours."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_HOME": "nowhere", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_of_a_test"}
    command = [sys.executable, f"{config.HERE}/push.py", *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_repository_is_made_private_and_gets_one_commit(here, hub, tmp_path):
    done = by_command(hub, "--run=grpo", "--to=hub:you/calc")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"pushed: {hub.url}/you/calc"
    (created,) = hub.created
    assert created.get("visibility", created.get("private")) in ("private", True)
    assert "Bearer hf_of_a_test" in hub.tokens
    files = hub.repositories["you/calc"]
    folder = pushed(run="grpo", to=f"{tmp_path}/calc")
    assert b'from_pretrained("you/calc"' in files["README.md"]
    assert b"hf download you/calc --local-dir calc\nvllm serve calc" in files["README.md"]
    same = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files == same | {"README.md": files["README.md"]}


@pytest.fixture
def asked_here(hub, monkeypatch):
    """Has the client in this process ask that hub."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    return hub


def test_what_is_there_is_replaced_only_where_that_is_asked_for(here, asked_here):
    push.push(push.Config(run="grpo", to="hub:you/calc", private=False))
    (created,) = asked_here.created
    assert created.get("visibility", created.get("private")) in ("public", False)
    files = asked_here.repositories["you/calc"]
    files["adapter_config.json"] = b"{}"
    before = dict(files)
    keys = {"run": "lora", "to": "hub:you/calc", "merge": True}
    assert "'hub:you/calc' is there" in refusal(**keys)
    assert files == before
    push.push(push.Config(**keys, replace=True))
    assert "adapter_config.json" not in files and files["README.md"] != before["README.md"]


def test_what_the_hub_refuses_is_one_sentence(here, asked_here, monkeypatch):
    keys = {"run": "grpo", "to": "hub:you/calc"}
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "no token of the hub is here" in refusal(**keys)
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", asked_here.url)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    assert not asked_here.created
    asked_here.refuses = 403
    assert "the hub did not take you/calc (" in refusal(**keys)
    asked_here.refuses = 0  # the repository is there by now, and empty
    push.push(push.Config(**keys))
    assert "README.md" in asked_here.repositories["you/calc"]
    asked_here.said = lambda path, body: (200, "a page")
    assert "the hub did not take you/other (" in refusal(run="grpo", to="hub:you/other")


def test_a_run_of_an_older_version_is_pushed(here):
    """Its config.py has fewer keys than today's."""
    file = Path("sft/config.py")
    now = file.read_text()
    older = [line for line in now.splitlines() if not line.startswith("recorded")]
    file.write_text("\n".join(older) + "\n")
    try:
        pushed(run="sft", to="older")
    finally:
        file.write_text(now)
    assert "train_sft.py" in Path("older/README.md").read_text()

"""serve.page as a process of its own, for tests of both sides of it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from until import until

from serve import runs

ROOT = Path(__file__).resolve().parent.parent


class Served:
    """The page of a folder, until `end`. ask(…) is what its own scripts send."""

    def __init__(self, folder: Path, port: int = 0, **popen):
        self.out = folder / "out"
        self.said = folder / "page.log"
        command = [sys.executable, "-m", "serve.page", f"--out_dir={self.out}", f"--port={port}"]
        environment = {k: v for k, v in os.environ.items() if k != "NANOTOOL_PAGE_TOKEN"}
        with open(self.said, "wb") as said:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=said, stderr=said, **popen
            )
        assert until(self._link), self.said.read_text()
        self.link = self._link()
        self.url, self.token = re.fullmatch(r"(http://\S+)/\?token=(\S+)", self.link).groups()
        self.client = httpx2.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self.token}"}, timeout=120
        )

    def _link(self):
        found = re.search(r"http://\S+token=\S+", self.said.read_text())
        return found[0] if found else None

    def read(self, name: str, /, **values) -> dict:
        return self.client.get(f"/api/{name}", params=values).json()

    def act(self, name: str, /, **asked) -> dict:
        return self.client.post(f"/api/{name}", json=asked).json()

    def state(self, run: str) -> dict:
        return self.read("run", run=run)["state"]

    def end(self, number=signal.SIGTERM) -> None:
        """Ends the page, not what it has started."""
        self.client.close()
        self.process.send_signal(number)
        self.process.wait(60)

    def end_runs(self) -> None:
        """Ends what was started from here and runs still."""
        for file in self.out.rglob("process.json"):
            pid = runs.record_of(file.parent).get("pid", 0)
            if pid and pid == runs.pid_of(file.parent):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)


HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>\'"&lt;'


def hostile_run(out: Path, name: str) -> Path:
    """Writes a run into whose every text somebody has put markup."""
    folder = out / name
    folder.mkdir(parents=True)
    rows = [{"step": step, "loss": 1 - step / 10, HOSTILE: step / 3} for step in range(4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"step": 4, "lo')  # torn
    values = {"steps": 4, "group_size": 8, "model": HOSTILE, "data": HOSTILE}
    values["system_prompt"] = HOSTILE
    lines = [f"{key} = {value!r}\n" for key, value in values.items()]
    (folder / "config.py").write_text("".join(lines))
    pieces = ["What", HOSTILE, "call", HOSTILE]
    call = {"turn": 0, "name": HOSTILE, "arguments": {HOSTILE: HOSTILE}, "result": HOSTILE}
    row = {
        "step": 3,
        "group": 0,
        "sample": 0,
        "stop": HOSTILE,
        "reward": 1.0,
        "rewards": {HOSTILE: 1.0},
        "answer": HOSTILE,
        "advantages": [0.5],
        "seconds": 0.1,
        "turn_starts": [1],
        "calls": [call | {"error": HOSTILE, "seconds": 0.1}],
        "ids": [1, 2, 3, 4],
        "pieces": pieces,
        "kinds": "ctto",
        "logprobs": [0.0, -1.0, -0.5, 0.0],
        "metrics": {HOSTILE: float("nan"), "half": "\ud800"},
        "failure": HOSTILE,
        "images": ["../../secret.png"],
    }
    whole = json.dumps(row) + "\n"
    (folder / "rollouts.jsonl").write_text(whole * 3 + whole[:100])  # torn
    (folder / "log.txt").write_text(f"going on\n{HOSTILE}\nerror: {HOSTILE}\n")
    numbers = {"avg@1": 0.5, HOSTILE: HOSTILE, "none": float("inf"), "half": "\ud800"}
    (folder / "eval.json").write_text(json.dumps(numbers))
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("page"))
    yield served
    served.end_runs()
    served.end()

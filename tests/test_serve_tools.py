"""serve/tools.py: tool servers with models that see, killed and started again during a rollout.

    pytest tests/test_serve_tools.py

The models are Grounding DINO and SAM 2 as they are, tiny, with random weights; no traffic but to
127.0.0.1.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("mcp", reason='no MCP here: pip install -e ".[mcp]"')

from PIL import Image
from ports import free_port
from tiny_eyes import save_detector, save_segmenter

from images import Picture
from run.config import UserError
from serve import tools as launcher
from tools import Toolbox

ROOT = Path(__file__).parent.parent


def services(tmp_path, **written):
    file = tmp_path / "services.json"
    file.write_text(json.dumps(written))
    return str(file)


@pytest.mark.parametrize(
    "service, why",
    [
        ({}, "expected"),
        ({"tools": []}, "at least one"),
        ({"tools": ["ocr"], "gpu": [0]}, "did you mean gpus"),
        ({"tools": ["ocr"], "gpus": "0"}, "a list of whole numbers"),
        ({"tools": ["ocr"], "timeout": -1}, "a number above 0"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(tmp_path, service, why):
    with pytest.raises(UserError, match=why):
        launcher.read(services(tmp_path, a=service), 8801)


def test_each_service_has_a_port(tmp_path):
    file = services(tmp_path, a={"tools": ["crop"]}, b={"tools": ["zoom"], "port": 8801})
    assert [each.port for each in launcher.read(file, 8801)] == [8802, 8801]
    file = services(tmp_path, a={"tools": ["x"], "port": 9}, b={"tools": ["y"], "port": 9})
    with pytest.raises(UserError, match="the same port"):
        launcher.read(file, 8801)


def children_of(pid):
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def is_running(pid):
    try:
        os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return False
    return True


def wait_for(condition):
    """However busy the machine is: the launcher itself gives up on what does not start."""
    while not condition():
        time.sleep(0.1)


def start(file, tmp_path, *options):
    command = [sys.executable, "-m", "serve.tools", file, f"--port={free_port()}"]
    command += [f"--save_to={tmp_path}/tools.json", *options]
    log = open(tmp_path / "log", "w")
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_server_is_killed_and_restarted_under_32_trajectories(tmp_path):
    """Issue 14, 4: no call is lost, all end with Ctrl-C."""
    save_detector(tmp_path / "detector")
    save_segmenter(tmp_path / "segmenter")
    file = services(
        tmp_path,
        detect={
            "tools": ["detect"],
            "gpus": [],
            "options": [f"detect.model={tmp_path}/detector", "detect.threshold=0"],
        },
        segment={"tools": ["segment"], "options": [f"segment.model={tmp_path}/segmenter"]},
    )
    process = start(file, tmp_path)
    try:
        written = tmp_path / "tools.json"
        wait_for(lambda: written.exists() or process.poll() is not None)
        assert written.exists(), (tmp_path / "log").read_text()
        servers = children_of(process.pid)
        assert len(servers) == 2
        box = Toolbox([f"mcp:{written}"], concurrency=8)

        async def trajectory(number):
            picture = Picture(Image.effect_noise((120 + number, 80), 60).convert("RGB"))
            session = box.open({}, [picture])
            calls = [
                ("detect", {"image": 1, "labels": ["a car"]}),
                ("segment", {"image": 1, "point": [500, 500]}),
                ("segment", {"image": 2, "point": [500, 500]}),
                ("detect", {"image": 1, "labels": ["a dog", "cat"]}),
            ]
            outcomes = []
            for turn, (name, arguments) in enumerate(calls):
                if number == 16 and turn == 1:  # in the middle of it all
                    os.kill(servers[0], signal.SIGKILL)
                _, error, _ = await session.call(name, arguments)
                outcomes.append(error)
            await session.close()
            return outcomes

        async def rollout():
            outcomes = await asyncio.gather(*map(trajectory, range(32)))
            await box.close()
            return outcomes

        assert asyncio.run(rollout()) == [[None, None, "no_image", None]] * 32
        servers += children_of(process.pid)
        assert len(set(servers)) == 3  # the third in the place of the first
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0
        assert not any(is_running(pid) for pid in servers)
        assert "ended with code -9" in (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_service_that_does_not_come_up_ends_all_with_what_it_said(tmp_path):
    file = services(tmp_path, good={"tools": ["crop"]}, bad={"tools": ["krop"]})
    process = start(file, tmp_path)
    wait_for(lambda: process.poll() is not None)
    said = (tmp_path / "log").read_text()
    assert process.returncode == 2
    assert "service 'bad' ended with code 2" in said and "unknown tool 'krop'" in said

"""What this machine does: cores, memory, disk, GPUs."""

import contextlib
import subprocess
import time
from pathlib import Path

import psutil

cards_seen = {"at": 0.0, "cards": []}  # of nvidia-smi, which takes a while


def machine(root: Path) -> dict:
    """What this machine does: cores, memory, disk, GPUs."""
    memory = psutil.virtual_memory()
    answer = {
        "cores": psutil.cpu_count(),
        "cpu": psutil.cpu_percent(),  # since it was asked last
        "memory_used": memory.total - memory.available,
        "memory": memory.total,
        "gpus": gpus(),
    }
    with contextlib.suppress(OSError):
        answer["disk_free"] = psutil.disk_usage(str(root)).free
    return answer


def gpus() -> list[dict]:
    """What nvidia-smi says of each GPU; [] where there is none."""
    if time.monotonic() - cards_seen["at"] < 2 and cards_seen["at"]:
        return cards_seen["cards"]
    wanted = "name,utilization.gpu,memory.used,memory.total"
    command = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader,nounits"]
    cards = []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
        for line in done.stdout.splitlines():
            name, busy, used, total = [cell.strip() for cell in line.split(",")]
            cards.append({"name": name, "busy": busy, "used": used, "total": total})  # %, MiB
    except (OSError, ValueError, subprocess.SubprocessError):
        cards = []
    cards_seen.update(at=time.monotonic(), cards=cards)
    return cards

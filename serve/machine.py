"""What this machine does: cores, memory, disk, GPUs."""

import contextlib
import subprocess
import time
from pathlib import Path

import psutil

cpu_seen = {"times": psutil.cpu_times()}  # psutil itself would remember them for each thread
cards_seen = {"at": 0.0, "cards": []}  # of nvidia-smi, which takes a while


def machine(root: Path) -> dict:
    """Measures what this machine does: cores, memory, disk, GPUs."""
    memory = psutil.virtual_memory()
    answer = {
        "cores": psutil.cpu_count(),
        "cpu": cpu_percent(),
        "memory_used": memory.total - memory.available,
        "memory": memory.total,
        "gpus": gpus(),
    }
    with contextlib.suppress(OSError):
        answer["disk_free"] = psutil.disk_usage(str(root)).free
    return answer


def cpu_percent() -> float:
    """Measures the share of all cores that was busy since this was asked last, in percent."""
    before = cpu_seen["times"]
    now = psutil.cpu_times()
    cpu_seen["times"] = now
    passed = sum(now) - sum(before)
    idle = now.idle - before.idle + getattr(now, "iowait", 0) - getattr(before, "iowait", 0)
    return round(100 * max(0.0, 1 - idle / passed), 1) if passed > 0 else 0.0


def gpus() -> list[dict]:
    """Reads what nvidia-smi says of each GPU; [] where there is none."""
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

"""The runs below a folder, as they stand on the disk: listed, started, stopped.

    for run in runs.listed(Path("out")): print(run["name"], run["status"])
    runs.start(Path("out"), Path("out/calc"), command, script="train_grpo.py")
    runs.stop(Path("out/calc"))                       # as Ctrl-C: the step is finished and saved

Who runs in a folder is known from its lock, which every training holds (an evaluation that of its
settings.json), and from process.json, which `start` writes: the pid, and when the process of that
pid began, so that another one which has got the same number later is not taken for it. All of it
outlives whoever started the run, and nobody has to be asked. Lines that a kill left torn are left
out.
"""

import ast
import contextlib
import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil

from run import config
from run import page as run_page
from run.config import UserError
from run.evaluation import SETTINGS

PROCESS = "process.json"
SAID = "log.txt"  # what a started run prints
FILES = ("metrics.jsonl", "rollouts.jsonl", "eval.json", PROCESS, "config.py", SAID)  # of a run
SCRIPTS = {"train_grpo.py": "GRPO", "train_sft.py": "SFT", "evaluate.py": "evaluation"}
MOST = 1000  # folders that are listed
DEPTH = 4  # of a run below the folder
INNER = {"checkpoints", "images", "weights", "wandb", "tensorboard", "__pycache__"}
TAIL = 2**16  # bytes
DYING = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
children: dict[int, subprocess.Popen] = {}  # those of this process, to be waited for
known_values: dict[Path, tuple] = {}  # of each config.py: what it was like, what it says


# ---- which folders


def folder_of(root: Path, name: str) -> Path:
    """Finds the folder of a run by its name below root, "calc/eval". UserError for whatever would
    lead out of root, links too."""
    folder = root / name if is_inner(name) else None
    is_inside = False
    if folder is not None:
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # a circle of links, say
            is_inside = folder.resolve().is_relative_to(root.resolve())
    if not is_inside:
        raise UserError(f"run = {name[:200]!r}: expected a folder below {root}")
    return folder


def is_inner(name: str) -> bool:
    """Says whether this is a plain path to below where it begins."""
    parts = name.split("/")
    if "\0" in name or "\\" in name or len(name) > 1000:
        return False
    if any(part in ("", ".", "..") for part in parts):
        return False
    try:
        return all(len(part.encode()) <= 255 for part in parts)  # as a disk takes it
    except UnicodeEncodeError:  # half a character
        return False


def below(root: Path, name: str, key: str = "out_dir") -> Path:
    """Finds the folder that a run is to write to, which has to be below root to be seen. UserError
    if it is not."""
    folder = Path(name)
    is_inside = False
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        inside = folder.resolve().relative_to(root.resolve())
        is_inside = 1 <= len(inside.parts) <= DEPTH and not any(map(is_hidden, inside.parts))
    if not is_inside or ".." in folder.parts:
        raise UserError(
            f"{key} = {name!r}: this page shows the runs below {root}: give --{key}={root}/a_name"
        )
    return folder


def leads_out(root: Path, folder: Path) -> bool:
    """Says whether a file of a run is a link to something that is not below root, or is no file:
    who opens a pipe waits for ever."""
    for name in (*FILES, "images"):
        file = folder / name
        if file.is_symlink() and not file.resolve().is_relative_to(root.resolve()):
            return True
        if name in FILES and file.exists() and not file.is_file():
            return True
    return False


def found(root: Path) -> list[Path]:
    """Lists the folders of runs below root, the one that was written to last first."""
    folders = []
    for place, inner, files in os.walk(root):
        folder = Path(place)
        depth = len(folder.relative_to(root).parts)
        inner[:] = [name for name in inner if not is_hidden(name)]
        if depth == DEPTH:
            inner.clear()
        if depth and is_run(files) and not leads_out(root, folder):
            folders.append(folder)
    folders.sort(key=changed, reverse=True)
    return folders[:MOST]


def is_hidden(name: str) -> bool:
    """Says whether runs are not looked for in a folder of this name."""
    return name in INNER or name.startswith(".")


def is_run(files: list[str]) -> bool:
    """Says whether these are of a run, or of one that was begun."""
    return bool({"metrics.jsonl", "rollouts.jsonl", "eval.json", PROCESS, config.LOCK} & set(files))


def changed(folder: Path) -> float:
    """Says when a run last wrote, in seconds since 1970."""
    times = [0.0]
    for name in FILES:
        with contextlib.suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return max(times)


# ---- who runs there


def beginning_of(pid: int) -> str:
    """Says when the process of this number began, as a text that no other process will have; "" if
    there is none, or only its remains."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = stat.rpartition(")")[2].split()  # its name may hold blanks and brackets
        is_dead = fields[0] in "ZXx"
        return "" if is_dead else f"{boot} {fields[19]}"
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():  # a system that says it all there
        return ""
    try:
        process = psutil.Process(pid)
        return "" if process.status() in DYING else str(process.create_time())
    except (psutil.Error, ValueError):
        return ""


def record_of(folder: Path) -> dict:
    """Reads what process.json says; {} where there is none that can be read."""
    try:
        record = json.loads((folder / PROCESS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(record, dict) or type(record.get("pid")) is not int:
        return {}
    return record


def write_record(folder: Path, record: dict) -> None:
    aside = folder / f"{PROCESS}.aside"
    aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    aside.replace(folder / PROCESS)


def holder_of(folder: Path) -> int:
    """Finds the pid of the process that holds the lock of an out_dir, 0 if none does. Asking takes
    no lock: a run that begins at this moment is not disturbed."""
    is_mac = sys.platform == "darwin"
    form = "qqihh" if is_mac else "hhqqi"
    wanted = (0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET) if is_mac else (fcntl.F_WRLCK, 0, 0, 0, 0)
    try:
        with open(folder / config.LOCK, "rb") as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(form, *wanted))
    except OSError:  # no file, or a file system without locks
        return 0
    values = struct.unpack(form, answer)
    kind = values[3] if is_mac else values[0]
    pid = values[2] if is_mac else values[4]
    return 0 if kind == fcntl.F_UNLCK else pid


def evaluator_of(folder: Path) -> int:
    """Finds the pid of the process that evaluates in a folder: it holds the lock of settings.json,
    and Linux lists who does. 0 if none does, or where there is no such list."""
    try:
        stat = (folder / SETTINGS).stat()
        locks = Path("/proc/locks").read_text()
    except OSError:
        return 0
    place = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
    for line in locks.splitlines():
        words = line.split()  # number, kind, advisory, for what, pid, file, from, to
        if len(words) == 8 and words[1] == "FLOCK" and words[5] == place:
            return max(0, int(words[4]))
    return 0


def pid_of(folder: Path) -> int:
    """Finds the pid of the process that runs in a folder, 0 if none does."""
    for process in list(children.values()):
        process.poll()  # or its remains would stay
    record = record_of(folder)
    if record and record.get("began") and beginning_of(record["pid"]) == record["began"]:
        return record["pid"]
    return holder_of(folder) or evaluator_of(folder)


# ---- what is known of a run


def last_row(path: Path) -> dict:
    """Reads the last whole row of a .jsonl that is of a step, {} if there is none near its end."""
    for line in reversed(tail_of(path).splitlines()):
        row = run_page.row_of(line)
        if row is not None and run_page.is_of_step(row):
            return row
    return {}


def tail_of(path: Path, size: int = TAIL) -> bytes:
    """Reads the last bytes of a file; none if it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            return file.read()
    except OSError:
        return b""


def values_of(folder: Path) -> dict[str, str]:
    """Reads {key: python text} of a run's config.py, again when that has changed."""
    file = folder / "config.py"
    try:
        stat = file.stat()
    except OSError:
        return {}
    stamp = (stat.st_mtime_ns, stat.st_size)
    if known_values.get(file, (None, None))[0] != stamp:
        known_values[file] = (stamp, run_page.values_of(file))
    return known_values[file][1]


def plain(text: str | None):
    """Reads the value of a python text, None where it is none."""
    try:
        return ast.literal_eval(text or "None")
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def kind_of(folder: Path, values: dict) -> str:
    """Says what a run is: "GRPO", "SFT", "training" or "evaluation"."""
    script = record_of(folder).get("script")
    if script in SCRIPTS:
        return SCRIPTS[script]
    if values:
        return "GRPO" if "group_size" in values else "SFT"
    is_of_steps = (folder / "metrics.jsonl").exists()
    return "training" if is_of_steps else "evaluation"


def newest_checkpoint(folder: Path) -> int:
    """Finds the step of the newest checkpoint, 0 if there is none."""
    steps = [0]
    for path in (folder / "checkpoints").glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdecimal():
            steps.append(int(number))
    return max(steps)


def is_finished(folder: Path) -> bool:
    """Says whether a training wrote its model, that of its last checkpoint."""
    models = [folder / "config.json", folder / "adapter_config.json"]
    there = [path.stat().st_mtime_ns for path in models if path.is_file()]
    if not there:
        return False
    checkpoint = folder / "checkpoints" / f"step-{newest_checkpoint(folder):06d}"
    if not checkpoint.exists() or max(there) >= checkpoint.stat().st_mtime_ns:
        return True
    return has_weights_of(folder, checkpoint)  # of a run that was copied, times say nothing


def has_weights_of(folder: Path, checkpoint: Path) -> bool:
    """Says whether the model of a run is that of a checkpoint, as far as some bytes of both say."""
    files = list(checkpoint.glob("*.safetensors"))
    return bool(files) and all(sample_of(folder / file.name) == sample_of(file) for file in files)


def sample_of(path: Path) -> list:
    """Reads the size of a file, and bytes from all over it; [] if it cannot be read."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            places = [size * part // 16 for part in range(16)]
            return [size, *(os.pread(file.fileno(), 4096, place) for place in places)]
    except OSError:
        return []


def said_steps(folder: Path) -> int | None:
    """Reads the number of updates of an SFT, which follow from its rows: it prints them when it has
    read them."""
    with contextlib.suppress(OSError), open(folder / SAID, "rb") as file:
        said = re.findall(
            rb"; (\d{1,12}) steps, [\d,]+ of ", file.read(TAIL) + tail_of(folder / SAID)
        )
        return int(said[-1]) if said else None
    return None


def last_words(folder: Path) -> str:
    """Reads the last line that a started run printed; "" where it went on since, without us."""
    with contextlib.suppress(OSError):
        logged = (folder / "metrics.jsonl").stat().st_mtime
        if logged > (folder / SAID).stat().st_mtime + 60:
            return ""
    lines = tail_of(folder / SAID).decode("utf-8", "replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    return lines[-1][:500] if lines else ""


def state_of(root: Path, folder: Path) -> dict:
    """Collects what is shown of a run in the list."""
    values = values_of(folder)
    kind = kind_of(folder, values)
    record = record_of(folder)
    row = last_row(folder / "metrics.jsonl")
    pid = pid_of(folder)
    steps = plain(values.get("steps")) if kind != "SFT" else said_steps(folder)
    state = {
        "name": folder.relative_to(root).as_posix(),
        "kind": kind,
        "pid": pid,
        "step": row["step"] + 1 if row else 0,  # that are done
        "steps": steps if isinstance(steps, int) else None,
        "model": plain(values.get("model")),
        "data": ", ".join(plain(values.get("mix")) or ()) or plain(values.get("data")),
        "changed": changed(folder),
        "command": record.get("command"),
        "told_to_stop": bool(record.get("told_to_stop")) and record["pid"] == pid,
        "checkpoint": newest_checkpoint(folder),
        "numbers": numbers_of(folder, row),
    }
    state["status"], state["why"] = status_of(folder, state)
    return state


def numbers_of(folder: Path, row: dict) -> dict:
    """Picks the few numbers that say how a run does: of its last step, and of an evaluation."""
    numbers = {}
    for name in ("reward", "accuracy", "val_accuracy", "loss", "val_loss"):
        if isinstance(row.get(name), int | float):
            numbers[name] = row[name]
    measured = evaluation_of(folder)
    for name, value in measured.items():
        if name.startswith(("avg@", "pass@")) and isinstance(value, int | float):
            numbers[name] = value
    if isinstance(measured.get("problems"), int):
        numbers["problems"] = measured["problems"]
    return run_page.finite_numbers(numbers)


def evaluation_of(folder: Path) -> dict:
    """Reads what eval.json says; {} where there is none that can be read."""
    try:
        numbers = json.loads((folder / "eval.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return numbers if isinstance(numbers, dict) else {}


def status_of(folder: Path, state: dict) -> tuple[str, str]:
    """Says (running, stopping, ended, stopped or crashed, why)."""
    if state["pid"]:
        return ("stopping", "") if state["told_to_stop"] else ("running", "")
    words = last_words(folder)
    if state["kind"] == "evaluation":
        is_done = (folder / "eval.json").is_file()
    else:
        is_short = state["steps"] is not None and state["step"] < state["steps"]  # made longer
        is_done = is_finished(folder) and not is_short
    if is_done:  # what was refused later, to go on with it say, is told
        return "ended", words if words.startswith("error:") else ""
    if words.startswith("stopped after") or words == "interrupted":
        return "stopped", words
    if words.startswith("step "):
        return "crashed", f"it was killed, or the power was gone; its last line: {words}"
    if words:  # that of a started run, which ended otherwise
        return "crashed", words
    if state["kind"] == "evaluation" and (folder / SETTINGS).is_file():
        return "stopped", "not all is played: python evaluate.py --resume=true goes on"
    is_saved = state["step"] and state["checkpoint"] == state["step"]
    if is_saved:
        return "stopped", f"saved after {state['step']} steps"
    return "crashed", "it ended without a word" if state["step"] else "no step was done"


def listed(root: Path) -> list[dict]:
    """Lists the states of all runs below root, the newest first."""
    states = []
    for folder in found(root):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            states.append(state_of(root, folder))
    return states


# ---- start and stop


@contextlib.contextmanager
def alone(root: Path):
    """Lets one start at a time happen below root, of all pages that there are."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".page.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def start(root: Path, folder: Path, command: list[str], script: str, cwd=None) -> dict:
    """Starts a command that runs in the folder, in a session of its own: it ends neither with this
    process nor with its terminal. UserError if something runs there already."""
    with alone(root):
        pid = pid_of(folder)
        if pid:
            raise UserError(
                f"'{folder}' is in use by process {pid}: wait for it, stop it, or give another "
                "folder"
            )
        if leads_out(root, folder):
            raise UserError(f"'{folder}' has links that lead out of {root}: give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        environment.pop("NANOTOOL_PAGE_TOKEN", None)  # it is not for what a model writes
        with open(folder / SAID, "ab") as said:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        children[process.pid] = process
        record = {
            "pid": process.pid,
            "began": beginning_of(process.pid),
            "script": script,
            "command": command,
            "at": time.time(),
        }
        write_record(folder, record)
    return record


def stop(folder: Path, now: bool = False) -> str:
    """Tells what runs in a folder to stop, as Ctrl-C does: a training finishes its step and saves.
    now: once more, which ends it at once. Returns what was done; UserError if there is nothing to
    do."""
    pid = pid_of(folder)
    if not pid:
        raise UserError(f"nothing runs in '{folder}'")
    record = record_of(folder)
    is_ours = record.get("pid") == pid
    if record.get("told_to_stop") and is_ours and not now:
        raise UserError(
            f"process {pid} was told to stop and finishes its step: wait, or end it at once, which "
            "loses that step"
        )
    number = signal.SIGINT
    if ignores(pid, number):  # as nohup and & of a script have it; a training takes both alike
        number = signal.SIGTERM
    try:
        if is_ours and os.getpgid(pid) == pid:
            os.killpg(pid, number)  # as a terminal does
        else:
            os.kill(pid, number)
    except ProcessLookupError:
        raise UserError(f"nothing runs in '{folder}'") from None
    except PermissionError:
        raise UserError(f"process {pid} in '{folder}' is another user's") from None
    if is_ours:
        write_record(folder, record | {"told_to_stop": time.time()})
    if now:
        return f"process {pid} was told to end at once"
    return f"process {pid} was told to stop: it finishes its step and saves"


def ignores(pid: int, number: int) -> bool:
    """Says whether a process ignores a signal; False where that is not known."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigIgn:"):
                return bool(int(line.split()[1], 16) & (1 << (number - 1)))
    except (OSError, ValueError, IndexError):
        pass
    return False

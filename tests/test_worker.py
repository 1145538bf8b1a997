"""run/worker.py: one request, one reply; the deadline, crashes, forks, its end with the program.

pytest tests/test_worker.py
"""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from until import until

from run.worker import Worker, WorkerDied, Workers

ROOT = Path(__file__).parent.parent
INSIDE = """
import os, re, sys, time
count = 0

def prepare():
    globals()["prepared"] = True

def answer(request):
    global count
    count += 1
    what = request["do"]
    if what == "die":
        os._exit(3)
    if what == "raise":
        raise ValueError
    if what == "hang":  # inside of one function of C
        re.match("(a+)+$", "a" * 60 + "b")
    if what == "sleep":
        time.sleep(request["for"])
    if what == "environment":
        return {"names": sorted(os.environ), "descriptors": os.listdir("/proc/self/fd")}
    return {"pid": os.getpid(), "count": count, "prepared": prepared, "same": request}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "inside.py"
    path.write_text(INSIDE)
    return path


@pytest.fixture
def worker(file):
    worker = Worker(file)
    yield worker
    worker.stop()


def test_a_process_is_used_again_and_values_and_bytes_come_back_as_they_were(worker):
    request = {"do": "", "x": [1, 2.5, "é\ud800", None, True, b"\0\xff", {"bytes": 1, "y": b""}]}
    first = worker.ask(request, 60)
    again = worker.ask(request, 60)
    assert first["same"] == request and first["prepared"]
    assert (first["count"], again["count"]) == (1, 2) and first["pid"] == again["pid"]


def test_what_does_not_end_is_ended_and_the_next_request_has_a_new_process(worker):
    """Inside of a function of C, where no thread and no signal handler of python comes in."""
    pid = worker.ask({"do": ""}, 60)["pid"]
    begun = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with pytest.raises(TimeoutError):
        worker.ask({"do": "hang"}, 0.3)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - begun < 2
    reply = worker.ask({"do": ""}, 60)
    assert reply["pid"] != pid and reply["count"] == 1


def test_the_time_of_a_request_is_not_that_of_the_one_before(worker):
    worker.ask({"do": ""}, 0.5)
    time.sleep(0.6)
    assert worker.ask({"do": ""}, 60)["count"] == 2


@pytest.mark.parametrize("how", ["die", "raise"])
def test_a_request_that_ends_the_process_is_tried_in_a_new_one_and_then_an_error(worker, how):
    pid = worker.ask({"do": ""}, 60)["pid"]
    with pytest.raises(WorkerDied):
        worker.ask({"do": how}, 60)
    assert worker.process is None
    assert worker.ask({"do": ""}, 60)["pid"] != pid


def test_a_process_that_was_killed_meanwhile_is_replaced(worker):
    pid = worker.ask({"do": ""}, 60)["pid"]
    os.kill(pid, signal.SIGKILL)
    assert worker.ask({"do": ""}, 60)["pid"] != pid


def test_what_cannot_be_loaded_is_an_error_each_time(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import no_such_package_")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the worker .*broken.py does not start"):
            Worker(path).ask({}, 1)


def test_it_has_no_environment_of_ours_and_no_descriptor(worker, monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc on this system")
    with open(tmp_path / "held", "w") as held:
        os.set_inheritable(held.fileno(), True)
        seen = worker.ask({"do": "environment"}, 60)
    assert set(seen["names"]) <= {"LC_CTYPE", "LD_LIBRARY_PATH", "PYTHONPATH"}
    assert len(seen["descriptors"]) == 5  # three, the socket, and that of listing them


def test_only_who_asks_for_packages_has_them(tmp_path):
    path = tmp_path / "inside.py"
    path.write_text("import sys\nimport numpy\ndef prepare(): pass\ndef answer(_): return {}")
    worker = Worker(path, packages=True)
    assert worker.ask({}, 60) == {}
    worker.stop()
    with pytest.raises(RuntimeError, match="does not start"):
        Worker(path).ask({}, 60)


def test_threads_wait_for_each_other_and_get_their_own_reply(worker):
    replies = {}

    def ask(number):
        replies[number] = worker.ask({"do": "", "number": number}, 60)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(replies[number]["same"]["number"] == number for number in range(20))
    assert len({reply["pid"] for reply in replies.values()}) == 1


def test_after_ctrl_c_the_reply_is_not_taken_for_that_of_the_next_request(worker):
    worker.ask({"do": ""}, 60)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        worker.ask({"do": "sleep", "for": 60}, 90)
    assert worker.ask({"do": "", "number": 2}, 60)["same"]["number"] == 2


def test_a_fork_gets_its_own_process_and_all_end_with_the_program(file):
    """Also when the program is killed: its end of the socket closes."""
    code = f"""
import os
from run.worker import Worker
worker = Worker({str(file)!r})
print(worker.ask({{"do": ""}}, 60)["pid"], flush=True)
pid = os.fork()
if pid == 0:
    print(worker.ask({{"do": ""}}, 60)["pid"], flush=True)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert worker.ask({{"do": ""}}, 60)["count"] == 2
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    pids = {int(word) for word in done.stdout.split()}
    assert len(pids) == 2 and done.returncode == -signal.SIGKILL, done.stderr
    assert until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids))


def test_a_few_workers_answer_at_once_and_one_is_enough_for_one_at_a_time(file):
    """B7: what takes long does not keep the others waiting."""
    workers = Workers(file, 2)
    assert len({workers.ask({"do": ""}, 60)["pid"] for _ in range(5)}) == 1
    ended = threading.Event()

    def hang():
        with pytest.raises(TimeoutError):
            workers.ask({"do": "sleep", "for": 600}, 3)
        ended.set()

    thread = threading.Thread(target=hang)
    thread.start()
    until(lambda: workers._free.qsize() == 1)
    assert workers.ask({"do": ""}, 60)["count"] >= 1  # by the other one
    thread.join()
    assert ended.is_set()
    assert workers.ask({"do": ""}, 60)["count"] >= 1
    workers.stop()


def test_a_child_of_a_fork_has_all_workers_free(file):
    """B7."""
    workers = Workers(file, 1)
    busy = workers._free.get()
    child = os.fork()
    if child == 0:
        answered = False
        try:
            answered = workers.ask({"do": ""}, 60)["count"] == 1
            workers.stop()
        finally:
            os._exit(0 if answered else 1)
    assert os.waitpid(child, 0)[1] == 0
    workers._free.put(busy)
    workers.stop()

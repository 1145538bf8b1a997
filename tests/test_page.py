"""serve.page over HTTP: who may ask, which paths, what is on the disk, start, stop, resume.

pytest tests/test_page.py
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from pages import HOSTILE, ROOT, Served, hostile_run, served
from until import until

from run import config
from run.config import UserError
from run.evaluation import Record

pytest.importorskip("mcp", reason="starlette comes with mcp")

from serve import page as serve_page
from serve import runs
from serve.index import Index

SFT = {"script": "train_sft.py", "config": "calc_sft.py"}
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def asleep(tmp_path):
    """(the root, a folder in which a process runs that does nothing)."""
    root = tmp_path / "out"
    folder = root / "calc"
    record = runs.start(root, folder, SLEEP, "train_sft.py")
    yield root, folder
    runs.children[record["pid"]].kill()
    runs.children[record["pid"]].wait()


# ---- who may ask


@pytest.mark.parametrize(
    "path", ["/", "/?token=wrong", "/api/runs", "/static/app.js", "/compare", "/image", "/nothing"]
)
def test_nothing_is_served_without_the_token(served, path):
    client = served.client
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": "nanotool_page_1=x"}):
        headers = {"Authorization": "", **headers}
        answer = client.get(path, headers=headers)
        assert answer.status_code == 401 and "token" in answer.json()["error"]


def test_the_link_gives_a_cookie_that_no_script_and_no_other_site_gets(served):
    answer = served.client.get("/", params={"token": served.token}, headers={"Authorization": ""})
    assert answer.status_code == 200
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert answer.headers["referrer-policy"] == "no-referrer"
    served.client.cookies.clear()  # the other tests begin without it
    pair = answer.headers["set-cookie"].partition(";")[0]
    answer = served.client.get("/api/runs", headers={"Authorization": "", "Cookie": pair})
    assert answer.json()["root"] == str(served.out)
    # a link with the token is for the page alone: an address that does something takes none
    answer = served.client.get(f"/api/runs?token={served.token}", headers={"Authorization": ""})
    assert answer.status_code == 401


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({}, 403),  # a form of an old browser
        ({"Sec-Fetch-Site": "same-origin", "Content-Type": "text/plain"}, 415),
        ({"Sec-Fetch-Site": "same-origin", "Content-Type": "application/json"}, 200),
    ],
)
def test_only_the_page_itself_may_change_something(served, headers, status):
    cookie = f"nanotool_page_{served.url.rpartition(':')[2]}={served.token}"
    headers = {"Authorization": "", "Cookie": cookie, **headers}
    answer = served.client.post("/api/stop", content=b'{"run": "none"}', headers=headers)
    assert answer.status_code == status
    if status == 200:
        assert answer.json() == {"error": f"nothing runs in '{served.out}/none'"}


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[::1", "10.0.0.1"])
def test_a_name_that_leads_here_is_refused(served, host):
    """DNS rebinding: a web page's own name, sent to 127.0.0.1."""
    answer = served.client.get("/api/runs", headers={"Host": host})
    assert answer.status_code in (400, 403)
    assert served.client.get("/api/runs", headers={"Host": "localhost"}).status_code == 200


def test_the_token_is_the_users_alone_and_stays(tmp_path):
    token = serve_page.token_for(tmp_path)
    file = tmp_path / serve_page.TOKEN_FILE
    assert file.stat().st_mode & 0o777 == 0o600 and len(token) >= 32
    assert serve_page.token_for(tmp_path) == token
    file.write_text("short\n")
    assert serve_page.token_for(tmp_path) not in (token, "short")


# ---- which paths

OUTSIDE = [
    "..",
    "../secret",
    "calc/../../secret",
    "/etc",
    "//etc",
    ".",
    "",
    "calc/",
    "calc//eval",
    "a\0b",
    "..\\secret",
    "%2e%2e/secret",
    "link",
    "link/inner",
    "x" * 5000,
    "\ud800",
]


@pytest.mark.parametrize("name", OUTSIDE, ids=[f"{name[:12]!a}" for name in OUTSIDE])
def test_no_path_leads_outside(tmp_path, name):
    root = tmp_path / "out"
    (root / "calc").mkdir(parents=True)
    (tmp_path / "secret" / "inner").mkdir(parents=True)
    (root / "link").symlink_to(tmp_path / "secret")
    try:
        folder = runs.folder_of(root, name)
    except UserError as error:
        assert "expected a folder below" in str(error)
    else:
        assert folder.resolve().is_relative_to(root.resolve()) and not folder.exists()


def test_no_request_leads_outside(served, tmp_path):
    secret = served.out.parent / "secret.txt"
    secret.write_text("the secret")
    run = hostile_run(served.out, "paths")
    (run / "images").mkdir()
    (run / "images" / f"{0:016x}.png").symlink_to(secret)
    for name in ("log.txt", "images"):
        linked = served.out / f"linked_{name[:3]}"
        linked.mkdir()
        (linked / "metrics.jsonl").write_text('{"step": 0, "loss": 1}\n')
        (linked / name).symlink_to(secret if name == "log.txt" else secret.parent)
    (served.out / "way").symlink_to("/etc")
    paths = [
        "/static/../page.py",
        "/static/%2e%2e/page.py",
        "/static/..%2fpage.py",
        "/../../etc/passwd",
        "/image?run=paths&name=../../secret.txt",
        f"/image?run=paths&name=images/{0:016x}.png",
        "/image?run=..&name=secret.txt",
        "/api/log?run=linked_log",
        "/api/run?run=linked_ima",
        "/image?run=way&name=passwd",
        "/api/log?run=../out",
        "/api/run?run=way",
        "/api/run?run=%2e%2e",
        "/api/rollout?run=paths&number=-1",
        "/api/rollout?run=paths&number=99999999999999999999",
        "/api/rollout?run=paths&number=%C2%B2",
        "/compare?run=way&run=paths",
        "/compare?run=paths",
    ]
    for path in paths:
        # byte for byte: a client would make /static/../x another path itself
        with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as raw:
            head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            raw.sendall(f"{head}Authorization: Bearer {served.token}\r\n\r\n".encode())
            answer = b"".join(iter(lambda: raw.recv(65536), b""))  # noqa: B023
        assert b"the secret" not in answer and b"root:" not in answer, path
        assert answer.split()[1] in (b"404", b"400"), path


@pytest.mark.parametrize(
    "body, told",
    [
        (b"", "no JSON"),
        (b"[]", "no JSON object"),
        (b"[" * 100_000, "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b'{"a": "' + b"x" * 2**21 + b'"}', "send less"),
        (b"{}", "script = ''"),
        (b'{"script": ["train_sft.py"]}', "script: expected text"),
        (b'{"script": "../evil.py"}', "script = '../evil.py'"),
        (b'{"script": "train_sft.py", "config": "/etc/passwd"}', "one of configs/"),
        (b'{"script": "train_sft.py", "config": "../x.py"}', "one of configs/"),
        (b'{"script": "train_sft.py", "config": "run:../x"}', "expected a folder below"),
        (b'{"script": "train_sft.py", "values": []}', "expected an object"),
        (b'{"script": "train_sft.py", "values": {"seed": 1}}', "its value as text"),
        (b'{"script": "train_sft.py", "values": {"--x y": "1"}}', "the name of a key"),
        (b'{"script": "train_sft.py", "values": {"resume": "true"}}', "choose it above"),
        (b'{"script": "train_sft.py", "values": {"data": "a\\u0000b"}}', "no command line"),
        (b'{"script": "train_sft.py", "values": {"data": "\\ud800"}}', "half a character"),
        (b'{"script": "train_sft.py", "values": {"seed": "x"}}', "seed = 'x': expected int"),
        (b'{"script": "train_sft.py", "values": {"sed": "1"}}', "did you mean seed"),
        (b'{"script": "train_sft.py", "values": {"tune": "lora", "model": "tiny"}}', "tune=full"),
        (b'{"script": "evaluate.py", "evaluate": "nothing"}', "no config.py in it"),
    ],
)
def test_what_a_form_gets_wrong_is_told_in_a_sentence(served, body, told):
    """And the sentences about keys are those of the command line."""
    headers = {"Content-Type": "application/json"}
    answer = served.client.post("/api/start", content=body, headers=headers)
    assert answer.status_code == 200 and told in answer.json()["error"], answer.text
    assert served.client.get("/api/machine").json()["cores"] >= 1  # unharmed


def test_a_run_is_started_below_the_folder_alone(served, tmp_path):
    for out_dir in ("/tmp/elsewhere", str(tmp_path), str(served.out), f"{served.out}/../x", "x"):
        answer = served.act("start", **SFT, values={"out_dir": out_dir})
        assert "this page shows the runs below" in answer["error"], out_dir
    assert not (ROOT / "x").exists()


@pytest.mark.parametrize("name", [".aside", "checkpoints", "a/images", "a/.b/c"])
def test_a_run_is_not_started_where_none_is_looked_for(tmp_path, name):
    with pytest.raises(UserError, match="this page shows the runs below"):
        runs.below(tmp_path, f"{tmp_path}/{name}")


def test_what_a_question_has_started_ends_with_it(served, tmp_path):
    """Also what made a session of its own, and whose parent is gone."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork():\n"
        "        os._exit(0)\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}}\\n')\n"
        "    time.sleep(600)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        f"while not os.path.exists({str(tmp_path / 'pid')!r}):\n"
        "    time.sleep(0.01)\n"
        "def look(x: str) -> str:\n    'Looks.\\n\\n    Args:\\n        x: where\\n    '\n"
    )
    answer = served.act("tools", names=[f"{file}:look"])
    assert [tool["name"] for tool in answer["tools"]] == ["look"]
    assert until((tmp_path / "pid").read_text)
    pid = int((tmp_path / "pid").read_text())
    assert until(lambda: not runs.beginning_of(pid))
    assert "RuntimeWarning" not in served.said.read_text()


@pytest.mark.parametrize("question", ["rows", "made_up"])
def test_only_a_training_is_asked_for_its_rows(served, question):
    assert "a script that trains" in served.act(question, script="evaluate.py")["error"]


def test_a_config_that_ends_or_hangs_the_check_harms_nothing(served):
    evil = served.out / "evil"
    evil.mkdir(parents=True)
    for text, told in (("import os\nos._exit(3)\n", "exit code"), ("raise SystemExit(4)", "ends")):
        (evil / "config.py").write_text(text)
        answer = served.act("check", script="train_sft.py", config="run:evil", values={})
        assert told in answer["error"]
    from serve import asking

    asking.prepare()
    (evil / "config.py").write_text("import time\ntime.sleep(600)\n")
    given = {"script": "train_sft.py", "argv": [f"--config={evil}/config.py"], "root": "out"}
    assert "hangs" in asking.ask("check", given, seconds=10)["error"]


# ---- what is on the disk


def test_torn_and_foreign_files_are_read_as_far_as_they_are_whole(served):
    hostile_run(served.out, "torn")
    state = served.state("torn")
    assert (state["step"], state["steps"], state["kind"]) == (4, 4, "GRPO")
    assert state["status"] == "crashed" and state["why"] == f"error: {HOSTILE}"
    answer = served.read("run", run="torn")
    assert answer["curves"]["metrics"]["step"] == [0, 1, 2, 3] and answer["written"] == 3
    again = served.read("run", run="torn", seen=answer["stamp"])
    assert "curves" not in again  # nothing has changed
    row = served.read("rollout", run="torn", number=2)["row"]
    assert "".join(row["pieces"]).count(HOSTILE) == 2 and row["images"] == [""]
    foreign = served.out / "foreign"
    foreign.mkdir()
    for name in ("metrics.jsonl", "rollouts.jsonl", "config.py", "eval.json", "process.json"):
        (foreign / name).write_bytes(b"\xff\x00[[[{" * 50)
    (foreign / "log.txt").write_bytes(b"\xff\xfe half \xc3")
    assert served.state("foreign")["status"] in ("crashed", "ended")
    assert served.read("log", run="foreign")["is_there"]
    deep = served.out / "deep"
    deep.mkdir()
    (deep / "eval.json").write_text('{"a": ' + "[" * 900 + "]" * 900 + "}")
    assert served.read("run", run="deep").keys() & {"state", "error"}
    os.mkdir(os.fsencode(served.out) + b"/half\xff")  # no name that UTF-8 has
    (served.out / os.fsdecode(b"half\xff") / "eval.json").write_text("{}")
    names = {run["name"] for run in served.read("runs")["runs"]}
    assert {"torn", "foreign", "deep"} <= names


def test_a_pipe_in_the_place_of_a_file_is_not_opened(served):
    pipes = served.out / "pipes"
    pipes.mkdir()
    (pipes / "eval.json").write_text("{}")
    os.mkfifo(pipes / "metrics.jsonl")
    assert "pipes" not in {run["name"] for run in served.read("runs")["runs"]}
    assert "no run" in served.read("run", run="pipes")["error"]


def test_a_run_that_ended_and_was_copied_has_ended(tmp_path):
    """Times of a copy say nothing: its model is that of its last checkpoint, or an older one."""
    run = tmp_path / "run"
    inner = run / "checkpoints" / "step-000002"
    inner.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 0, "loss": 1}\n{"step": 1, "loss": 1}\n')
    (run / "config.py").write_text("steps = 2\ngroup_size = 8\n")
    for folder in (run, inner):
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(range(256)) * 400)
    os.utime(run / "config.json", (1, 1))
    assert runs.state_of(tmp_path, run)["status"] == "ended"
    weights = bytearray((run / "model.safetensors").read_bytes())
    weights[51_200] += 1
    (run / "model.safetensors").write_bytes(weights)
    assert runs.state_of(tmp_path, run)["status"] == "stopped"


def test_a_rollout_that_is_appended_or_replaced_is_seen(tmp_path):
    file = hostile_run(tmp_path, "run") / "rollouts.jsonl"
    index = Index(file)
    index.read()
    assert index.facts()[1] == 3 and index.row(3) is None
    whole = file.read_bytes().split(b"\n")[0] + b"\n"
    file.write_bytes(whole * 3 + whole[:200])
    index.read()
    assert index.facts()[1] == 3
    with open(file, "ab") as opened:
        opened.write(whole[200:])
    index.read()
    assert index.facts()[1] == 4 and index.row(3)["reward"] == 1.0
    aside = file.with_name("aside")
    aside.write_bytes(whole)
    aside.replace(file)
    index.read()
    assert index.facts()[1] == 1 and index.row(1) is None


# ---- who runs


def test_a_run_is_known_by_its_process_and_not_by_the_number_of_it(asleep):
    """A pid that another process has got since is not taken for the run, and not ended."""
    root, folder = asleep
    pid = runs.pid_of(folder)
    assert pid and runs.state_of(root, folder)["status"] == "running"
    record = runs.record_of(folder)
    assert os.getpgid(pid) == pid != os.getpgid(0)  # a session of its own
    runs.write_record(folder, record | {"began": "another boot 17"})
    assert runs.pid_of(folder) == 0
    with pytest.raises(UserError, match="nothing runs"):
        runs.stop(folder)
    assert runs.children[pid].poll() is None


def test_the_lock_of_a_training_says_who_runs_there_and_asking_takes_none(tmp_path):
    folder = tmp_path / "out" / "calc"
    folder.mkdir(parents=True)
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX);"
        "print('locked', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(folder / config.LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert runs.pid_of(folder) == process.pid
        with pytest.raises(UserError, match=f"in use by process {process.pid}"):
            runs.start(tmp_path / "out", folder, SLEEP, "train_sft.py")
        process.kill()
    assert runs.pid_of(folder) == 0


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="this system lists no locks")
def test_an_evaluation_of_a_terminal_runs_as_long_as_it_holds_its_settings(tmp_path):
    """One that was not started from here has neither process.json nor the lock of a training."""
    folder = tmp_path / "calc" / "eval"
    folder.mkdir(parents=True)
    (folder / "rollouts.jsonl").write_text("")
    record = Record(folder, {"settings": {}})
    state = runs.state_of(tmp_path, folder)
    assert (state["pid"], state["status"]) == (os.getpid(), "running")
    record.close()
    state = runs.state_of(tmp_path, folder)
    assert (state["pid"], state["status"]) == (0, "stopped") and "--resume=true" in state["why"]


def test_a_second_start_is_refused_and_so_is_a_second_stop(asleep):
    root, folder = asleep
    pid = runs.pid_of(folder)
    with pytest.raises(UserError, match=f"in use by process {pid}"):
        runs.start(root, folder, SLEEP, "train_sft.py")
    # as a training that finishes its step: the signal is noted
    runs.write_record(folder, runs.record_of(folder) | {"told_to_stop": time.time()})
    with pytest.raises(UserError, match="was told to stop and finishes its step"):
        runs.stop(folder)
    assert runs.children[pid].poll() is None
    assert "at once" in runs.stop(folder, now=True)
    runs.children[pid].wait(60)
    with pytest.raises(UserError, match="nothing runs"):
        runs.stop(folder, now=True)


def test_two_starts_at_once_in_one_folder_start_one(tmp_path):
    root = tmp_path / "out"
    outcomes = []

    def begin():
        try:
            outcomes.append(runs.start(root, root / "calc", SLEEP, "train_sft.py")["pid"])
        except UserError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (pid,) = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert sum("in use" in str(outcome) for outcome in outcomes) == 3
    runs.children[pid].kill()
    runs.children[pid].wait()


def test_a_run_that_ignores_ctrl_c_is_told_otherwise(tmp_path):
    code = "import signal, time; signal.signal(2, signal.SIG_IGN); print(1, flush=True)"
    command = [sys.executable, "-c", f"{code}; time.sleep(600)"]
    folder = tmp_path / "out" / "calc"
    record = runs.start(tmp_path / "out", folder, command, "train_sft.py")
    assert until(lambda: (folder / "log.txt").read_text())
    runs.stop(folder)
    assert runs.children[record["pid"]].wait(60) == -signal.SIGTERM


# ---- a whole life


def test_a_run_outlives_its_page_is_found_again_and_goes_on_when_it_is_made_longer(tmp_path):
    """The page is started so that it ignores Ctrl-C, as & of a script has it: its runs do not."""
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    served = Served(tmp_path, **ignore)
    try:
        values = {"rows": "32", "epochs": "300", "out_dir": f"{served.out}/calc", "seed": "3"}
        # 1. two clicks at once start one run
        answers = []

        def begin():
            answers.append(served.act("start", **SFT, values=values))

        clicks = [threading.Thread(target=begin) for _ in range(2)]
        for click in clicks:
            click.start()
        for click in clicks:
            click.join()
        refused = [answer["error"] for answer in answers if "error" in answer]
        assert len(refused) == 1 and "calc' is in use by" in refused[0], answers
        (started,) = [answer for answer in answers if "error" not in answer]
        assert started["run"] == "calc" and "--seed=3" in started["command"]
        pid = served.state("calc")["pid"]
        assert not runs.ignores(pid, signal.SIGINT)
        environment = open(f"/proc/{pid}/environ", "rb").read()
        assert served.token.encode() not in environment

        # 2. the page ends, and the next one finds the run
        port = int(served.url.rpartition(":")[2])
        token = served.token
        served.end()
        served = Served(tmp_path, port=port)
        assert served.token == token
        assert until(lambda: served.state("calc")["step"] >= 2)
        assert served.state("calc")["pid"] == pid

        # 3. stopped, as by Ctrl-C
        assert "finishes its step" in served.act("stop", run="calc")["told"]
        assert until(lambda: served.state("calc")["status"] == "stopped")
        state = served.state("calc")
        assert state["checkpoint"] == state["step"] >= 2
        assert served.act("stop", run="calc") == {"error": f"nothing runs in '{served.out}/calc'"}

        # 4. a new run is refused there, with the sentence of the command line
        answer = served.act("start", **SFT, values=values)
        assert "is not empty" in answer["error"] and "--resume=true" in answer["error"]

        # 5. it goes on to a nearer end, and then has nothing left to do
        near = {"epochs": str(state["step"] + 2)}
        again = {"script": "train_sft.py", "resume": "calc"}
        assert "error" not in served.act("start", **again, values=near)
        assert until(lambda: served.state("calc")["status"] == "ended"), served.read(
            "log", run="calc"
        )
        answer = served.act("start", **again, values={})
        assert "has done all of its epochs" in answer["error"], answer
        answer = served.act("start", **again, values={"learning_rate": "0.5"})
        assert "learning_rate = 0.5, but the run in" in answer["error"]
    finally:
        served.end_runs()
        served.end()


def test_the_form_has_every_key_with_its_comment(served):
    """In the words of --help, and with the values of the config."""
    import train_grpo
    import train_sft

    for script, module in (("train_grpo.py", train_grpo), ("train_sft.py", train_sft)):
        form = served.act("form", script=script, config="", values={})
        names = [field["name"] for field in form["fields"]]
        assert names == [name for name in module.Config.__dataclass_fields__ if name != "resume"]
        assert all(field["help"] and field["group"] for field in form["fields"])
    by_name = {field["name"]: field for field in form["fields"]}
    assert by_name["parallel"]["help"].endswith("ZeRO-1, the optimizer alone in shards")
    assert by_name["offload"]["group"] == "several processes"
    assert by_name["tune"]["choices"] == ["full", "lora", "qlora"]
    form = served.act("form", script="train_grpo.py", config="calc.py", values={})
    by_name = {field["name"]: field for field in form["fields"]}
    assert by_name["group_size"]["value"] == "8" and by_name["tools"]["value"] == "python"
    assert form["suggested"] == {"out_dir": f"{served.out}/calc"}
    assert "python" in [tool["name"] for tool in form["tools"]]
    assert all(tool["help"] for tool in form["tools"])


def test_an_evaluation_of_a_run_is_set_up(served):
    """Its form is that of evaluate.py, its folder is chosen so that it can be watched."""
    import train_grpo

    run = served.out / "grpo"
    (run / "eval").mkdir(parents=True)
    config.save(train_grpo.Config(out_dir=str(run)), run / "config.py")
    asked = {"script": "evaluate.py", "evaluate": "grpo"}
    names = [field["name"] for field in served.act("form", **asked, values={})["fields"]]
    assert {"n", "k", "limit", "temperature"} <= set(names) and "run" not in names
    answer = served.act("check", **asked, values={"limit": "7"})
    command = f"python evaluate.py --run={run} --limit=7 --save_to={run}/eval-2"
    assert answer["command"] == command and "error" not in answer
    answer = served.act("check", **asked, values={"n": "4"})
    assert answer["error"] == "n = 4 samples at temperature 0 are all alike: use --temperature=1"
    answer = served.act("start", **asked, values={"save_to": "/tmp/elsewhere"})
    assert "save_to = '/tmp/elsewhere': this page shows" in answer["error"]
    answer = served.act("start", **asked, values={"endpoint": "http://127.0.0.1:9/v1"})
    assert "model is missing" in answer["error"] and not (run / "eval-2").exists()


def test_an_mcp_server_is_asked_for_its_tools_or_says_why_not(served):
    command = f"{sys.executable} -m serve.mcp_server python --stdio"
    written = served.act("server", name="ours", where=command)
    answer = served.act("tools", names=[written["tool"]])
    assert [tool["name"] for tool in answer["tools"]] == ["python"]
    written = served.act("server", name="gone", where="http://127.0.0.1:9/mcp")
    assert "gone" in served.act("tools", names=[written["tool"]])["error"]
    other = served.act("server", name="gone", where="http://127.0.0.1:10/mcp")
    assert other["tool"] != written["tool"], "a run may go on with the first one"
    assert served.act("server", name="gone", where="http://127.0.0.1:9/mcp") == written
    for name in ("", "../x", "a b", HOSTILE, "x" * 300):
        answer = served.act("server", name=name, where=command)
        assert "error" in answer, name
    assert "expected the URL" in served.act("server", name="x", where=" ")["error"]
    assert "cannot read the command" in served.act("server", name="x", where="a 'b")["error"]
    assert "unknown tool" in served.act("tools", names=["pyhton"])["error"]

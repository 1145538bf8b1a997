"""A page to see, set up, start and stop runs.

    python -m serve.page                     # prints a link; open it in a browser on this machine
    python -m serve.page --out_dir=elsewhere --port=9000
    ssh -L 8799:127.0.0.1:8799 gpu-box       # for a page of another machine, then the same link

It shows the runs below out_dir (training, SFT, evaluations) while they run and afterwards: curves,
rollouts token by token, what they print, and what this machine does. It makes a form of a script's
Config, with its comments as help, checks it with the script's own sentences, shows the first rows,
the tools and a made-up rollout, and starts the very command that one would type. A run that was
started lives in a session of its own: it does not end with the page, and a page that is started
again finds it.

What is covered: only this machine is served unless --host says otherwise, and never without the
token; requests of other web pages (Origin, Sec-Fetch-Site, SameSite) and of names that lead here
(DNS rebinding); paths and links that lead out of out_dir; requests that are large or slow; markup
in whatever a model, a tool or a config writes, which stays text. What is not: TLS (use ssh -L, or
put a proxy in front); users of different rights. Starting a run runs code, by design: who has the
token can do what you can.
"""

import contextlib
import hmac
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from run import config
from run import page as run_page
from run.config import UserError
from run.http import key_from

if __name__ == "__main__":
    config.answer_help(__file__)

import psutil

from serve import asking, runs

try:
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Route

    from serve import web
except ImportError as error:
    raise UserError(f'serve.page needs a package ({error}): pip install -e ".[mcp]"') from None

TOKEN_ENV = "NANOTOOL_PAGE_TOKEN"
TOKEN_FILE = ".page_token"  # in out_dir: the link of before is good after a restart
MOST_BYTES = 2**20  # of a request
MOST_RUNS = 8  # that are compared
MOST_LOG = 2**16  # bytes of log.txt that are shown
SECONDS = {"form": 60, "check": 60, "rows": 120, "tools": 60, "made_up": 300}
STATIC = {  # all files that are served, by their names in a URL
    "page.css": ("run/page.css", "text/css"),
    "page.js": ("run/page.js", "text/javascript"),
    "app.css": ("serve/static/app.css", "text/css"),
    "app.js": ("serve/static/app.js", "text/javascript"),
    "form.js": ("serve/static/form.js", "text/javascript"),
}
# No script and no style but those files; nothing is loaded from elsewhere or sent there.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; frame-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
# A report has its script in it, beside what models wrote: it may draw, and reach nothing of ours.
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'self'"
)


@dataclass
class Config:
    out_dir: str = "out"  # the folder whose runs are shown, and below which runs are started
    host: str = "127.0.0.1"  # 0.0.0.0 = for other machines too, who know the token
    port: int = 8799  # 0 = any free one; it is printed


def check(cfg: Config) -> None:
    """Rules across keys."""
    if not 0 <= cfg.port < 65536:
        raise UserError(f"port = {cfg.port}: expected 0 to 65535")
    if not cfg.out_dir:
        raise UserError("out_dir is empty: expected a folder, such as out")
    if Path(cfg.out_dir).exists() and not Path(cfg.out_dir).is_dir():
        raise UserError(f"out_dir = {cfg.out_dir!r} is no folder")


def token_for(root: Path) -> str:
    """The token of this page: that of the environment, or one that stays with the folder, so that a
    browser which has it goes on after a restart. Only this user can read it."""
    token = key_from(TOKEN_ENV)
    if token:
        return token
    root.mkdir(parents=True, exist_ok=True)
    file = root / TOKEN_FILE
    with contextlib.suppress(OSError):
        token = file.read_text(encoding="ascii").strip()
    if len(token) < 32:
        token = secrets.token_urlsafe(32)
        file.unlink(missing_ok=True)  # its rights may be others
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as written:
            written.write(token + "\n")
    return token


# ---- who may ask


class Guard:
    """Lets requests through that come from our own page, or from who knows the token."""

    def __init__(self, app, token: str, host: str):
        self.app = app
        self.token = token
        self.is_local = web.is_loopback(host)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, sentence = self.refusal(Request(scope))
        if status:
            return await refusal(status, sentence)(scope, receive, send)
        await self.app(scope, receive, with_headers(send))

    def refusal(self, request: Request) -> tuple[int, str]:
        """(status, why) of a request that is not answered; (0, "") for one that is."""
        # 1. who says another name to this machine was sent here by a name server (DNS rebinding)
        if self.is_local and not web.names_loopback(request.scope["headers"]):
            return 403, "this page is served to 127.0.0.1 and localhost alone"

        # 2. the token, of a link, a cookie or a script
        by_header = request.headers.get("authorization", "").startswith("Bearer ")
        if by_header:
            is_known = web.has_token(request.scope["headers"], self.token)
        else:
            in_link = request.query_params.get("token", "") if request.url.path == "/" else ""
            given = in_link or request.cookies.get(cookie_name(request), "")
            is_known = hmac.compare_digest(given.encode(), self.token.encode())
        if not is_known:
            return 401, "the token is missing or wrong: open the link that serve.page printed"

        # 3. what changes something is asked by our own page, never by another one in this browser
        if request.method not in ("GET", "HEAD"):
            return self.foreign(request, by_header)
        return 0, ""

    def foreign(self, request: Request, by_header: bool) -> tuple[int, str]:
        """(status, why) of a request to change something that another page made."""
        origin = request.headers.get("origin")
        site = request.headers.get("sec-fetch-site")
        host = request.headers.get("host", "")
        is_other = origin is not None and urlsplit(origin).netloc != host
        if is_other or site not in (None, "same-origin"):
            return 403, "only the page itself may ask for this"
        if origin is None and site is None and not by_header:
            return 403, "only the page itself may ask for this"
        if not request.headers.get("content-type", "").startswith("application/json"):
            return 415, "expected JSON"
        return 0, ""


def cookie_name(request: Request) -> str:
    """Cookies do not know ports: each page of this machine has its own."""
    return f"nanotool_page_{request.url.port or 80}"


def with_headers(send):
    """Adds to each answer what a browser may not do with it."""

    async def wrapped(message):
        if message["type"] == "http.response.start":
            headers = list(message["headers"])
            there = {name.lower() for name, _ in headers}
            if b"content-security-policy" not in there:
                headers.append((b"content-security-policy", POLICY.encode()))
            if b"cache-control" not in there:
                headers.append((b"cache-control", b"no-store"))
            headers += [
                (b"x-content-type-options", b"nosniff"),
                (b"referrer-policy", b"no-referrer"),
                (b"cross-origin-resource-policy", b"same-origin"),
                (b"cross-origin-opener-policy", b"same-origin"),
            ]
            message = message | {"headers": headers}
        await send(message)

    return wrapped


def refusal(status: int, sentence: str) -> Response:
    return JSONResponse({"error": sentence}, status, {"cache-control": "no-store"})


# ---- what is asked with GET


class Page:
    """What is served of one folder."""

    def __init__(self, root: Path, token: str):
        self.root = root
        self.token = token
        self.indices: dict[Path, Index] = {}
        self.lock = threading.Lock()  # of the indices

    def routes(self) -> list[Route]:
        routes = [
            Route("/", self.home),
            Route("/static/{name}", self.static),
            Route("/image", self.image),
            Route("/compare", self.compare),
        ]
        readers = {
            "runs": self.runs,
            "run": self.run,
            "rollout": self.rollout,
            "log": self.log,
            "machine": self.machine,
            "configs": self.configs,
        }
        for name, reader in readers.items():
            routes.append(Route(f"/api/{name}", answering(reader)))
        actions = {
            "form": self.form,
            "check": self.check,
            "rows": self.rows,
            "tools": self.tools,
            "made_up": self.made_up,
            "server": self.server,
            "start": self.start,
            "stop": self.stop,
        }
        for name, action in actions.items():
            routes.append(Route(f"/api/{name}", acting(action), methods=["POST"]))
        return routes

    def home(self, request: Request) -> Response:
        """The page itself; who comes with the link has the token in a cookie from here on."""
        response = FileResponse(config.HERE / "serve" / "static" / "app.html")
        if "token" in request.query_params:
            response.set_cookie(
                cookie_name(request), self.token, httponly=True, samesite="strict", path="/"
            )
        return response

    def static(self, request: Request) -> Response:
        file, kind = STATIC.get(request.path_params["name"], (None, None))
        if file is None:
            return refusal(404, "no such file")
        return FileResponse(config.HERE / file, media_type=kind)

    def image(self, request: Request) -> Response:
        """An image of a rollout, which run/log.py wrote."""
        name = request.query_params.get("name", "")
        try:
            folder = self.folder(request)
        except UserError as error:
            return refusal(404, str(error))
        file = folder / name
        if not run_page.IMAGE_NAME.fullmatch(name) or file.is_symlink() or not file.is_file():
            return refusal(404, "no such image")
        return FileResponse(file, media_type="image/png")

    def compare(self, request: Request) -> Response:
        """The page of report.py about several runs."""
        names = request.query_params.getlist("run")
        try:
            if not 2 <= len(names) <= MOST_RUNS:
                raise UserError(f"expected 2 to {MOST_RUNS} runs to compare")
            folders = [runs.folder_of(self.root, name) for name in names]
            try:
                import report
            except ImportError:
                raise UserError("report.py is not here: it draws the comparison") from None
            text = report.page_of(folders)
        except UserError as error:
            return refusal(400, str(error))
        headers = {"content-security-policy": REPORT_POLICY}
        return Response(text, media_type="text/html; charset=utf-8", headers=headers)

    def folder(self, request: Request) -> Path:
        """The folder of the run that a request is about."""
        folder = runs.folder_of(self.root, request.query_params.get("run", ""))
        if not folder.is_dir():
            raise UserError(f"no run '{folder}'")
        return folder

    def runs(self, request: Request) -> dict:
        return {"root": str(self.root), "runs": runs.listed(self.root)}

    def run(self, request: Request) -> dict:
        """All of a run but its rollouts. seen: what the asker has of its curves, so that they are
        read and sent only when there is more."""
        folder = self.folder(request)
        answer = {"state": runs.state_of(self.root, folder)}
        answer["evaluations"] = evaluations_in(self.root, folder)
        metrics = folder / "metrics.jsonl"
        stamp = stamp_of(metrics)
        answer["stamp"] = stamp
        if request.query_params.get("seen") != stamp:
            answer["curves"] = run_page.points_of(metrics)
            answer["settings"] = run_page.settings_of(folder / "config.py")
            answer["evaluation"] = runs.evaluation_of(folder)
        rollouts = folder / "rollouts.jsonl"
        answer["rollouts_stamp"] = stamp_of(rollouts)
        if request.query_params.get("rollouts_seen") != answer["rollouts_stamp"]:
            answer["rollouts"], answer["written"] = self.index(rollouts).facts()
        return answer

    def index(self, file: Path) -> "Index":
        with self.lock:
            if file not in self.indices:
                self.indices[file] = Index(file)
            index = self.indices[file]
        index.read()
        return index

    def rollout(self, request: Request) -> dict:
        """One rollout, by the number of its line."""
        folder = self.folder(request)
        number = request.query_params.get("number", "")
        row = None
        if number.isascii() and number.isdecimal() and len(number) < 10:
            row = self.index(folder / "rollouts.jsonl").row(int(number))
        if row is None:
            raise UserError(f"no rollout {number!r} in '{folder}'")
        shown = run_page.shown(row)
        images = run_page.images_of(folder, [shown])
        name = folder.relative_to(self.root).as_posix()
        for image, about in images.items():
            if about:
                about["place"] = f"/image?{query(run=name, name=image)}"
        return {"row": finite(shown), "images": images}

    def log(self, request: Request) -> dict:
        """The end of what a run printed."""
        folder = self.folder(request)
        text = runs.tail_of(folder / runs.SAID, MOST_LOG).decode("utf-8", "replace")
        return {"text": run_page_text(text), "is_there": (folder / runs.SAID).is_file()}

    def machine(self, request: Request) -> dict:
        return machine(self.root)

    def configs(self, request: Request) -> dict:
        """The files of configs/ by the script that they are for."""
        files = {"train_grpo.py": [], "train_sft.py": []}
        for file in sorted((config.HERE / "configs").glob("*.py")):
            script = "train_sft.py" if "sft" in file.stem.split("_") else "train_grpo.py"
            first = file.read_text(encoding="utf-8").split("\n")[0]
            files[script].append({"name": file.name, "help": first.removeprefix("# ")})
        return {"configs": files}

    # ---- what is asked with POST

    def form(self, asked: dict) -> dict:
        """The fields of a script; a folder that is free is suggested."""
        answer = self.ask("form", asked)
        for field in answer.get("fields", ()):
            if field["name"] == "out_dir":
                answer["suggested"] = {"out_dir": self.free_folder(field["value"])}
        return answer

    def free_folder(self, out_dir: str) -> str:
        """The folder that a config names, or the first behind it that no run is in; below ours."""
        name = Path(out_dir).name or "run"
        names = [name, *(f"{name}-{number}" for number in range(2, 1000))]
        return str(next(self.root / name for name in names if not (self.root / name).exists()))

    def check(self, asked: dict) -> dict:
        answer = self.ask("check", asked)
        return answer | {"command": shlex.join(self.command(asked))}

    def rows(self, asked: dict) -> dict:
        return self.ask("rows", asked)

    def made_up(self, asked: dict) -> dict:
        return self.ask("made_up", asked)

    def tools(self, asked: dict) -> dict:
        given = {"names": texts(asked, "names"), "options": texts(asked, "options")}
        return asking.ask("tools", given, SECONDS["tools"])

    def server(self, asked: dict) -> dict:
        """Writes an mcpServers file of one server, for a run to name; tools of it are listed by the
        same question as all others."""
        name = word(asked, "name")
        if not name or not name.replace("-", "_").isidentifier() or not name.isascii():
            raise UserError(f"name = {name!r}: expected letters, digits and _, such as time")
        where = word(asked, "where").strip()
        if not where:
            raise UserError("expected the URL of an MCP server, or the command that starts one")
        if where.startswith(("http://", "https://")):
            server = {"url": where}
        else:
            try:
                command, *arguments = shlex.split(where)
            except ValueError as error:
                raise UserError(f"cannot read the command {where!r}: {error}") from None
            server = {"command": command, "args": arguments}
        variable = word(asked, "token_env").strip()
        if variable:
            if "url" not in server or not variable.isidentifier():
                raise UserError(
                    f"token_env = {variable!r}: expected the name of a variable, for a URL"
                )
            server["headers"] = {"Authorization": f"Bearer ${{{variable}}}"}
        folder = self.root / ".servers"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.json"
        file.write_text(json.dumps({"mcpServers": {name: server}}, indent=1) + "\n")
        return {"tool": f"mcp:{file}"}

    def start(self, asked: dict) -> dict:
        """Checks a command line and starts it."""
        script, argv = script_of(asked), self.argv(asked)
        if script == "evaluate.py":
            argv, folder = self.of_evaluation(asked, argv)
        answer = asking.ask(
            "check", {"script": script, "argv": argv, "is_start": True}, SECONDS["check"]
        )
        if "error" in answer:
            return answer
        if script != "evaluate.py":
            folder = self.below_root(answer["folder"])
        command = [sys.executable, path_of(script), *argv]
        runs.start(self.root, folder, command, script)
        name = folder.resolve().relative_to(self.root.resolve()).as_posix()
        return {"run": name, "command": shlex.join(["python", *command[1:]])}

    def stop(self, asked: dict) -> dict:
        folder = runs.folder_of(self.root, word(asked, "run"))
        return {"told": runs.stop(folder, now=asked.get("now") is True)}

    # ---- command lines

    def ask(self, question: str, asked: dict) -> dict:
        arguments = {"script": script_of(asked), "argv": self.argv(asked)}
        return asking.ask(question, arguments, SECONDS[question])

    def argv(self, asked: dict) -> list[str]:
        """The command line of a form: what its config file and its values say."""
        argv = []
        resumed = word(asked, "resume")
        evaluated = word(asked, "evaluate")
        name = word(asked, "config")
        if resumed:
            file = runs.folder_of(self.root, resumed) / "config.py"
            argv += ["--config", str(file), "--resume=true"]
        elif evaluated:
            argv.append(f"--run={runs.folder_of(self.root, evaluated)}")
        elif name:
            argv += ["--config", self.config_file(name)]
        values = asked.get("values", {})
        if not isinstance(values, dict):
            raise UserError("values: expected an object of texts")
        for key, value in values.items():
            if not isinstance(value, str) or not key.isidentifier() or len(key) > 100:
                raise UserError(f"{key!r}: expected the name of a key, and its value as text")
            if key in ("config", "resume"):
                raise UserError(f"{key}: choose it above the form")
            argv.append(f"--{key}={value}")
        for item in argv:
            require_sendable(item)
        return argv

    def config_file(self, name: str) -> str:
        """The config file of this name: one of configs/, or "run:calc", that of a run."""
        if name.startswith("run:"):
            return str(runs.folder_of(self.root, name.removeprefix("run:")) / "config.py")
        known = {file.name for file in (config.HERE / "configs").glob("*.py")}
        if name not in known:
            raise UserError(f"config = {name!r}: expected one of configs/")
        return name

    def command(self, asked: dict) -> list[str]:
        script = script_of(asked)
        argv = self.argv(asked)
        if script == "evaluate.py":
            argv, _ = self.of_evaluation(asked, argv)
        return ["python", path_of(script), *argv]

    def of_evaluation(self, asked: dict, argv: list[str]) -> tuple[list[str], Path]:
        """(the command line of an evaluation with the folder that it writes to, that folder)."""
        given = [item for item in argv if item.startswith("--save_to=")]
        if given and given[-1] != "--save_to=":
            return argv, self.below_root(given[-1].removeprefix("--save_to="))
        argv = [item for item in argv if item != "--save_to="]
        of_run = word(asked, "evaluate")
        beside = runs.folder_of(self.root, of_run) if of_run else self.root
        names = ["eval", *(f"eval-{number}" for number in range(2, 1000))]
        folder = next(beside / name for name in names if not (beside / name).exists())
        return [*argv, f"--save_to={folder}"], folder

    def below_root(self, out_dir: str) -> Path:
        """The folder that a run writes to, which has to be below ours to be seen."""
        folder = Path(out_dir)
        is_inside = False
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            inside = folder.resolve().relative_to(self.root.resolve())
            is_inside = 1 <= len(inside.parts) <= runs.DEPTH
        if not is_inside or ".." in folder.parts:
            raise UserError(
                f"out_dir = {out_dir!r}: this page shows the runs below {self.root}: give "
                f"--out_dir={self.root}/a_name"
            )
        return folder


def script_of(asked: dict) -> str:
    script = word(asked, "script")
    if script not in runs.SCRIPTS:
        raise UserError(f"script = {script!r}: expected one of {', '.join(runs.SCRIPTS)}")
    return script


def path_of(script: str) -> str:
    """A script as one would type it here."""
    return script if Path.cwd() == config.HERE else str(config.HERE / script)


def word(asked: dict, name: str) -> str:
    """A text of a request, "" where it has none."""
    value = asked.get(name) or ""
    if not isinstance(value, str):
        raise UserError(f"{name}: expected text")
    require_sendable(value)
    return value


def texts(asked: dict, name: str) -> list[str]:
    values = asked.get(name) or []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UserError(f"{name}: expected a list of texts")
    return values


def require_sendable(text: str) -> None:
    """Refuses what no command line can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{text[:60]!a} holds half a character: write all of it") from None
    if "\0" in text or len(text) > 100_000:
        raise UserError(f"{text[:60]!a}: no command line holds that")


# ---- the parts


def answering(reader):
    """The endpoint of a reader, which gets the request and runs in a thread."""

    def endpoint(request: Request) -> Response:
        try:
            return JSONResponse(reader(request))
        except UserError as error:
            return refusal(404, str(error))

    return endpoint


def acting(action):
    """The endpoint of an action, which gets the request's JSON and runs in a thread."""

    async def endpoint(request: Request) -> Response:
        try:
            asked = await body_of(request)
            answer = await run_in_threadpool(action, asked)
        except UserError as error:
            return JSONResponse({"error": str(error)})
        except OSError as error:
            return JSONResponse({"error": config.disk_problem(error)})
        return JSONResponse(answer)

    return endpoint


async def body_of(request: Request) -> dict:
    """The JSON object of a request. UserError for anything else."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise UserError(f"a request of more than {MOST_BYTES} bytes: send less")
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise UserError("the request is no JSON") from None
    if not isinstance(asked, dict):
        raise UserError("the request is no JSON object")
    return asked


class Index:
    """Where each rollout of a rollouts.jsonl begins, and the few facts that a list shows of it.
    What is appended is read when it is asked for; a file that was replaced is read anew."""

    def __init__(self, file: Path):
        self.file = file
        self.lock = threading.Lock()
        self._forget(0)

    def _forget(self, inode: int) -> None:
        self.inode = inode
        self.end = 0  # bytes that are read
        self.places: list[int] = []  # where the lines of rollouts begin
        self.all: list[dict] = []  # their facts

    def read(self) -> None:
        """Reads what is new."""
        with self.lock:
            try:
                file = open(self.file, "rb")
            except OSError:
                return self._forget(0)
            with file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self.inode or stat.st_size < self.end:
                    self._forget(stat.st_ino)
                file.seek(self.end)
                for line in file:
                    if not line.endswith(b"\n"):  # it is being written
                        break
                    row = run_page.row_of(line, constant=str)
                    if row is not None and run_page.is_rollout(row):
                        self.all.append(facts_of(row, len(self.places)))
                        self.places.append(self.end)
                    self.end += len(line)

    def facts(self) -> tuple[list[dict], int]:
        """(those of the rollouts that are listed, how many there are)."""
        with self.lock:
            chosen = run_page.spread(len(self.all), run_page.POINTS)
            return [self.all[number] for number in chosen], len(self.all)

    def row(self, number: int) -> dict | None:
        """A whole rollout; None if there is none of this number."""
        with self.lock:
            if number >= len(self.places):
                return None
            place = self.places[number]
        try:
            with open(self.file, "rb") as file:
                file.seek(place)
                row = run_page.row_of(file.readline(), constant=str)
        except OSError:
            return None
        is_whole = row is not None and run_page.is_rollout(row)  # else it was replaced meanwhile
        return row if is_whole else None


def facts_of(row: dict, number: int) -> dict:
    """What the pager needs to know of a rollout before it is looked at."""
    advantages = run_page.finite_numbers(dict(enumerate(row.get("advantages") or ())))
    reward = row.get("reward")
    return {
        "number": number,
        "step": row["step"] if run_page.is_of_step(row) else None,
        "reward": reward if isinstance(reward, int | float) else None,
        "stop": str(row.get("stop")),
        "failed": any(call.get("error") for call in row["calls"]),
        "strongest": max([abs(value) for value in advantages.values()], default=0.0),
    }


def finite(value):
    """A value without the numbers that JSON has not: they become texts."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value


def run_page_text(text: str) -> str:
    """What a run printed, as one reads it: of a line that is written over, the last version."""
    lines = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]
    return "\n".join(lines)


def evaluations_in(root: Path, folder: Path) -> list[dict]:
    """The evaluations in the folder of a run."""
    states = []
    for inner in sorted(folder.glob("eval*")):
        if inner.is_dir() and not inner.is_symlink() and any(inner.iterdir()):
            states.append(runs.state_of(root, inner))
    return states


def stamp_of(file: Path) -> str:
    """Another text whenever a file has changed."""
    try:
        stat = file.stat()
    except OSError:
        return "none"
    return f"{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}"


def query(**values: str) -> str:
    from urllib.parse import urlencode

    return urlencode(values)


# ---- the machine


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


# ---- the command


def application(root: Path, token: str, host: str):
    """The ASGI application."""
    return Guard(Starlette(routes=Page(root, token).routes()), token, host)


def main(argv: list[str]) -> None:
    cfg = config.parse(Config, argv, check)
    root = Path(cfg.out_dir)
    # what is started from here must not ignore Ctrl-C, however this was started: with & of a script
    # it does
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    listening = web.listen(cfg.host, cfg.port)
    token = token_for(root)
    asking.prepare()
    print(f"the page: {web.address(listening)}/?token={token}", flush=True)
    print("who has this link can start programs here; Ctrl-C ends the page, not its runs")
    web.serve(application(root, token, cfg.host), listening)


if __name__ == "__main__":
    config.main(main)

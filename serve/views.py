"""What the page (page.py) answers: readers, which look at the disk, and actions, which ask about a
config, or start and stop a run. Each runs in a thread, and what it refuses is a sentence."""

import json
import shlex
import sys
import threading
from pathlib import Path
from urllib.parse import urlencode

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from run import config
from run import page as run_page
from run.config import UserError
from serve import asking, runs, web
from serve.guard import body_of, refusal, reply
from serve.index import Index
from serve.machine import machine

MOST_RUNS = 8  # that are compared
MOST_LOG = 2**16  # bytes of log.txt that are shown
SECONDS = {"form": 60, "check": 60, "rows": 120, "tools": 60, "made_up": 300, "compare": 120}
STATIC = {  # all files that are served, by their names in a URL
    "page.css": ("run/page.css", "text/css"),
    "page.js": ("run/page.js", "text/javascript"),
    "app.css": ("serve/static/app.css", "text/css"),
    "app.js": ("serve/static/app.js", "text/javascript"),
    "form.js": ("serve/static/form.js", "text/javascript"),
}
# A report has its script in it, beside what models wrote: it may draw, and reach nothing of ours.
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'self'"
)


class Views:
    """What is served of one folder."""

    def __init__(self, root: Path, token: str):
        self.root = root
        self.token = token
        self.indices: dict[Path, Index] = {}
        self.lock = threading.Lock()  # of the indices

    def routes(self) -> list[Route]:
        routes = [
            Route("/", self.home),
            Route("/favicon.ico", self.favicon),
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
        """Gives the page itself; who comes with the link has the token in a cookie from here on."""
        response = FileResponse(config.HERE / "serve" / "static" / "app.html")
        if "token" in request.query_params:
            cookie = web.cookie_name(request.scope, "page")
            web.set_token(response, cookie, self.token, path="/")
        return response

    def static(self, request: Request) -> Response:
        file, kind = STATIC.get(request.path_params["name"], (None, None))
        if file is None:
            return refusal(404, "no such file")
        return FileResponse(config.HERE / file, media_type=kind)

    def favicon(self, request: Request) -> Response:
        """Answers with no icon: a browser asks for one of itself, and would log an error."""
        return Response(status_code=204)

    def image(self, request: Request) -> Response:
        """Gives an image of a rollout, which run/log.py wrote."""
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
        """Gives the page of report.py about several runs, or the sentence why there is none."""
        names = request.query_params.getlist("run")
        headers = {"content-security-policy": REPORT_POLICY}
        try:
            if not 2 <= len(names) <= MOST_RUNS:
                raise UserError(f"expected 2 to {MOST_RUNS} runs to compare")
            folders = [str(runs.folder_of(self.root, name)) for name in names]
            answer = asking.ask("compare", {"folders": folders}, SECONDS["compare"])
            if "error" in answer:
                raise UserError(answer["error"])
        except UserError as error:
            return Response(str(error), 400, headers, media_type="text/plain; charset=utf-8")
        return Response(answer["html"], 200, headers, media_type="text/html; charset=utf-8")

    def folder(self, request: Request) -> Path:
        """Finds the folder of the run that a request is about."""
        folder = runs.folder_of(self.root, request.query_params.get("run", ""))
        if not folder.is_dir() or runs.leads_out(self.root, folder):
            raise UserError(f"no run '{folder}'")
        return folder

    def runs(self, request: Request) -> dict:
        return {"root": str(self.root), "runs": runs.listed(self.root)}

    def run(self, request: Request) -> dict:
        """Gives all of a run but its rollouts. seen: what the asker has of its curves, so that they
        are read and sent only when there is more."""
        folder = self.folder(request)
        answer = {"state": runs.state_of(self.root, folder)}
        answer["evaluations"] = evaluations_in(self.root, folder)
        metrics = folder / "metrics.jsonl"
        stamp = stamp_of(metrics)
        answer["stamp"] = stamp
        if request.query_params.get("seen") != stamp:
            answer["curves"] = run_page.curves_of(metrics)
            answer["settings"] = run_page.settings_of(folder / "config.py")
            answer["evaluation"] = runs.evaluation_of(folder)
        rollouts = folder / "rollouts.jsonl"
        answer["rollouts_stamp"] = stamp_of(rollouts)
        if request.query_params.get("rollouts_seen") != answer["rollouts_stamp"]:
            answer["rollouts"], answer["written"] = self.index(rollouts).facts()
        return answer

    def index(self, file: Path) -> Index:
        with self.lock:
            if file not in self.indices:
                self.indices[file] = Index(file)
            index = self.indices[file]
        index.read()
        return index

    def rollout(self, request: Request) -> dict:
        """Gives one rollout, by the number of its line."""
        folder = self.folder(request)
        number = request.query_params.get("number", "")
        row = None
        if number.isascii() and number.isdecimal() and len(number) < 10:
            row = self.index(folder / "rollouts.jsonl").row(int(number))
        if row is None:
            raise UserError(f"no rollout {number!r} in '{folder}'")
        shown = run_page.shown_of(row)
        images = run_page.images_of(folder, [shown])
        name = folder.relative_to(self.root).as_posix()
        for image, about in images.items():
            if about:
                about["place"] = f"/image?{query(run=name, name=image)}"
        return {"row": shown, "images": images}

    def log(self, request: Request) -> dict:
        """Gives the end of what a run printed."""
        folder = self.folder(request)
        text = runs.tail_of(folder / runs.SAID, MOST_LOG).decode("utf-8", "replace")
        return {"text": as_read(text), "is_there": (folder / runs.SAID).is_file()}

    def machine(self, request: Request) -> dict:
        return machine(self.root)

    def configs(self, request: Request) -> dict:
        """Lists the files of configs/ by the script that they are for."""
        files = {"train_grpo.py": [], "train_sft.py": []}
        for file in sorted((config.HERE / "configs").glob("*.py")):
            script = "train_sft.py" if "sft" in file.stem.split("_") else "train_grpo.py"
            first = file.read_text(encoding="utf-8").split("\n")[0]
            files[script].append({"name": file.name, "help": first.removeprefix("# ")})
        return {"configs": files}

    # ---- what is asked with POST

    def form(self, asked: dict) -> dict:
        """Lists the fields of a script; suggests a folder that is free."""
        answer = self.ask("form", asked)
        for field in answer.get("fields", ()):
            if field["name"] == "out_dir":
                answer["suggested"] = {"out_dir": self.free_folder(field["value"])}
        return answer

    def free_folder(self, out_dir: str) -> str:
        """Finds the folder, below ours, that a config names, or the first free one behind it."""
        name = Path(out_dir).name or "run"
        names = [name, *(f"{name}-{number}" for number in range(2, 1000))]
        return str(next(self.root / name for name in names if not (self.root / name).exists()))

    def check(self, asked: dict) -> dict:
        given = {"script": script_of(asked), "argv": self.argv(asked), "root": str(self.root)}
        answer = asking.ask("check", given, SECONDS["check"])
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
        written = json.dumps({"mcpServers": {name: server}}, indent=1) + "\n"
        file = folder / f"{name}.json"
        number = 1
        while file.exists() and file.read_text(encoding="utf-8") != written:
            number += 1  # a run may name that one, and go on with it
            file = folder / f"{name}-{number}.json"
        file.write_text(written, encoding="utf-8")
        return {"tool": f"mcp:{file}"}

    def start(self, asked: dict) -> dict:
        """Checks a command line and starts it."""
        script, argv = script_of(asked), self.argv(asked)
        if script == "evaluate.py":
            argv, folder = self.of_evaluation(asked, argv)
        given = {"script": script, "argv": argv, "root": str(self.root), "is_start": True}
        answer = asking.ask("check", given, SECONDS["check"])
        if "error" in answer:
            return answer
        if script != "evaluate.py":
            folder = Path(answer["folder"])
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
        if question != "form" and arguments["script"] == "evaluate.py":
            raise UserError(f"{question}: expected a script that trains")
        return asking.ask(question, arguments, SECONDS[question])

    def argv(self, asked: dict) -> list[str]:
        """Makes the command line of a form: what its config file and its values say."""
        argv = []
        resumed = word(asked, "resume")
        evaluated = word(asked, "evaluate")
        name = word(asked, "config")
        if resumed and script_of(asked) == "evaluate.py":
            argv += self.recorded(resumed)
        elif resumed:
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

    def recorded(self, name: str) -> list[str]:
        """Reads the command line of an evaluation that was started from here, to go on with it."""
        record = runs.record_of(runs.folder_of(self.root, name))
        command = record.get("command")
        if record.get("script") != "evaluate.py" or not isinstance(command, list):
            raise UserError(f"'{name}' was not started from here: evaluate again")
        options = [str(word) for word in command if str(word).startswith("--")]
        return [*(word for word in options if word != "--resume=true"), "--resume=true"]

    def config_file(self, name: str) -> str:
        """Finds the config file of this name: one of configs/, or "run:calc", that of a run."""
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
        """Makes (an evaluation's command line with the folder that it writes to, that folder)."""
        given = [item for item in argv if item.startswith("--save_to=")]
        if given and given[-1] != "--save_to=":
            return argv, runs.below(self.root, given[-1].removeprefix("--save_to="), "save_to")
        argv = [item for item in argv if item != "--save_to="]
        of_run = word(asked, "evaluate")
        beside = runs.folder_of(self.root, of_run) if of_run else self.root
        names = ["eval", *(f"eval-{number}" for number in range(2, 1000))]
        folder = next(beside / name for name in names if not (beside / name).exists())
        return [*argv, f"--save_to={folder}"], folder


def script_of(asked: dict) -> str:
    script = word(asked, "script")
    if script not in runs.SCRIPTS:
        raise UserError(f"script = {script!r}: expected one of {', '.join(runs.SCRIPTS)}")
    return script


def path_of(script: str) -> str:
    """Writes a script as one would type it here."""
    return script if Path.cwd() == config.HERE else str(config.HERE / script)


def word(asked: dict, name: str) -> str:
    """Reads a text of a request, "" where it has none."""
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
    """Makes the endpoint of a reader, which gets the request and runs in a thread."""

    def endpoint(request: Request) -> Response:
        try:
            return reply(reader(request))
        except UserError as error:
            return refusal(404, str(error))
        except OSError as error:  # it was removed meanwhile, say
            return refusal(404, config.disk_problem(error))
        except RecursionError:
            return refusal(404, "what is on the disk there is nested too deeply to be shown")

    return endpoint


def acting(action):
    """Makes the endpoint of an action, which gets the request's JSON and runs in a thread."""

    async def endpoint(request: Request) -> Response:
        try:
            asked = await body_of(request)
            answer = await run_in_threadpool(action, asked)
        except UserError as error:
            return reply({"error": str(error)})
        except OSError as error:
            return reply({"error": config.disk_problem(error)})
        return reply(answer)

    return endpoint


def as_read(text: str) -> str:
    """Writes what a run printed as one reads it: a line that is written over, as it was last."""
    lines = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]
    return "\n".join(lines)


def evaluations_in(root: Path, folder: Path) -> list[dict]:
    """Lists the evaluations in the folder of a run."""
    states = []
    for inner in sorted(folder.glob("eval*")):
        if inner.is_dir() and not inner.is_symlink() and any(inner.iterdir()):
            states.append(runs.state_of(root, inner))
    return states


def stamp_of(file: Path) -> str:
    """Stamps a file: another text whenever it has changed."""
    try:
        stat = file.stat()
    except OSError:
        return "none"
    return f"{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}"


def query(**values: str) -> str:
    return urlencode(values)

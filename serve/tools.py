"""Launches many tool servers, on chosen GPUs, watches them, and restarts those that end or hang.

    python -m serve.tools services.json
    {"detect": {"tools": ["detect"], "options": ["detect.model=google/owlv2-base-patch16-ensemble"],
                "gpus": [0]},
     "read":   {"tools": ["ocr", "subfigure"], "concurrency": 4}}

    --tools=mcp:out/tools.json           # in a training run: all of them, as one file of servers

Each service is a process of its own (serve/mcp_server.py) with these keys:

    tools            as in a config: names of ours, or my_tools.py:weather
    options          as tool_options in a config: ["detect.threshold=0.2"]
    gpus             which of them it sees, [0, 1]; [] for none. Without the key: those that we see
    port             where it listens; without it, the next one from --port on
    concurrency      calls at once (16)          timeout          seconds of a call (60)
    start_timeout    seconds until it has to serve (300): models are loaded before

When all serve, the file of --save_to is written for `--tools=mcp:…`; a token in the environment
variable of --token_env is asked of each call, and named there. A service that does not come up the
first time ends all, with what it said. Later, one that ends, or does not answer for HANGING
seconds, is started again, at the same port, after a pause that doubles up to LONGEST_PAUSE; calls
that it was in the middle of are asked again by our client, for a minute. Ctrl-C or SIGTERM ends
all; so does the end of this program in any other way.

What is not covered: several servers for one tool; other machines. Start one launcher on each, and
join the files it writes.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from run import config
from run.config import UserError, near

if __name__ == "__main__":
    config.answer_help(__file__)

from run.http import HttpClient, HttpError

LOOK_EVERY = 2.0  # seconds between two looks at a service
HANGING = 60.0  # seconds without an answer: it is killed, and started again
FIRST_PAUSE = 1.0  # seconds before a service is started again
LONGEST_PAUSE = 60.0
STEADY = 120.0  # seconds that a service has to serve for its pause to begin anew
TO_END = 10.0  # seconds that it has to end in, before it is killed
WORDS = 30  # lines of what a service says, kept for messages


@dataclass
class Config:
    host: str = "127.0.0.1"  # 0.0.0.0 = for other machines too: needs a token
    port: int = 8801  # of the first service that names none; the others follow
    token_env: str = "NANOTOOL_TOKEN"  # the environment variable that holds the bearer token
    save_to: str = "out/tools.json"  # the servers, for --tools=mcp:out/tools.json
    report_every: float = 60.0  # seconds between two tables of how they do; 0 = none


def check(cfg: Config) -> None:
    """Checks the rules across keys."""
    if not 1 <= cfg.port < 65536:
        raise UserError(f"port = {cfg.port}: expected 1 to 65535")
    if cfg.report_every < 0:
        raise UserError(f"report_every = {cfg.report_every}: expected 0 or more")


# -- the file


@dataclass
class Service:
    """A tool server, as the file describes it."""

    name: str
    tools: list[str]
    options: list[str] = field(default_factory=list)
    gpus: list[int] | None = None  # None: those that we see
    port: int = 0  # 0 is none given
    concurrency: int = 16
    timeout: float = 60.0  # seconds of a call
    start_timeout: float = 300.0  # seconds

    def url(self, host: str, path: str) -> str:
        host = "127.0.0.1" if host == "0.0.0.0" else host
        return f"http://{host}:{self.port}/{path}"


KINDS = {  # what a value has to be
    "tools": "a list of texts",
    "options": "a list of texts",
    "gpus": "a list of whole numbers",
    "port": "a whole number above 0",
    "concurrency": "a whole number above 0",
    "timeout": "a number above 0",
    "start_timeout": "a number above 0",
}


def read(path: str, first_port: int) -> list[Service]:
    """Reads the services of the file, each with a port. Raises UserError."""
    try:
        whole = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the services of {path!r}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error})") from None
    if not isinstance(whole, dict) or not whole:
        expected = 'expected {"a_name": {"tools": ["ocr"]}}'
        raise UserError(f"no service in {path}: {expected}")
    services = [_service(name, f"service {name!r} of {path}", whole[name]) for name in whole]

    taken = {service.port: service.name for service in services if service.port}
    if len(taken) < sum(service.port > 0 for service in services):
        raise UserError(f"{path}: two services have the same port: give each its own, or none")
    port = first_port
    for service in services:
        if service.port:
            continue
        while port in taken:
            port += 1
        service.port = port
        taken[port] = service.name
    return services


def _service(name, where, given):
    if not isinstance(given, dict) or "tools" not in given:
        raise UserError(f'{where}: expected {{"tools": ["ocr"]}} and more')
    for key, value in given.items():
        if key not in KINDS:
            raise UserError(f"{where}: unknown key {key!r}{near(key, KINDS) or _keys()}")
        if not _fits(value, KINDS[key]):
            raise UserError(f"{where}: {key} = {json.dumps(value)}: expected {KINDS[key]}")
    if not given["tools"]:
        raise UserError(f"{where}: tools = []: expected at least one")
    return Service(name, **given)


def _keys():
    return f" (keys: {', '.join(KINDS)})"


def _fits(value, expected):
    if expected == "a list of texts":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if expected == "a list of whole numbers":
        return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
    if expected == "a whole number above 0":
        return type(value) is int and value > 0
    return type(value) in (int, float) and value > 0


def servers_file(services: list[Service], cfg: Config) -> dict:
    """Makes what --tools=mcp:file.json reads."""
    servers = {}
    for service in services:
        # a call may have to wait until the service is there again
        wait = service.timeout + service.start_timeout
        entry = {"url": service.url(cfg.host, "mcp"), "start_timeout": wait}
        if os.environ.get(cfg.token_env, "").strip():
            entry["headers"] = {"Authorization": f"Bearer ${{{cfg.token_env}}}"}
        servers[service.name] = entry
    return {"mcpServers": servers}


# -- a service that runs


class Running:
    """The process of a service: started, watched, started again."""

    def __init__(self, service: Service, cfg: Config):
        self.service = service
        self.cfg = cfg
        self.process = None
        self.state = "starting"  # "serving" "waiting" "ended"
        self.restarts = 0
        self.health = {}  # what it said last
        self.speed = 0.0  # calls per second, between the last two reports
        self.lines = deque(maxlen=WORDS)  # the last that it said
        self.is_up = asyncio.Event()  # it has served once
        self._reported = (time.monotonic(), 0)  # when, and how many calls there were
        token = os.environ.get(cfg.token_env, "").strip()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = HttpClient(headers)

    async def watch(self) -> None:
        """Keeps it running until this is cancelled. Raises UserError if it never comes up."""
        pause = FIRST_PAUSE
        try:
            while True:
                # 1. start it, and see it serve
                started = time.monotonic()
                await self._start()
                why = await self._come_up()
                if why is None:
                    self._set("serving")
                    self.is_up.set()
                    why = await self._serve()
                elif not self.is_up.is_set():
                    raise UserError(f"service {self.service.name!r} {why}{self._last_words()}")

                # 2. it has ended, or has to: again, later and later
                await self._stop()
                if time.monotonic() - started > STEADY:
                    pause = FIRST_PAUSE
                self.restarts += 1
                self._set("waiting", f"{why}{self._last_words()}; starts again in {pause:g} s")
                await asyncio.sleep(pause)
                pause = min(LONGEST_PAUSE, 2 * pause)
        finally:
            await self._stop()
            await self._http.close()
            self._set("ended")

    async def _start(self):
        service = self.service
        self.state = "starting"
        self.lines.clear()
        environment = dict(os.environ)
        if service.gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, service.gpus))
        command = [
            sys.executable,
            *("-m", "serve.mcp_server", *service.tools, "--http", "--with_stdin=true"),
            f"--host={self.cfg.host}",
            f"--port={service.port}",
            f"--token_env={self.cfg.token_env}",
            f"--tool_timeout={service.timeout}",
            f"--tool_concurrency={service.concurrency}",
        ]
        if service.options:
            command.append(f"--tool_options={','.join(service.options)}")
        self.process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,  # it ends with us, however we end
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is for us: we end it in its time
        )
        self._reading = asyncio.create_task(self._read(self.process.stdout))

    async def _read(self, stream):
        """Keeps its last lines. A full pipe would stop it."""
        while chunk := await stream.read(65536):
            self.lines.extend(chunk.decode("utf-8", "replace").splitlines())

    async def _come_up(self):
        """Waits until it serves: None, or why it does not."""
        end = time.monotonic() + self.service.start_timeout
        while time.monotonic() < end:
            if self.process.returncode is not None:
                return f"ended with code {self.process.returncode}"
            if await self._ask(5.0):
                return None
            await asyncio.sleep(0.2)
        return f"did not serve within start_timeout = {self.service.start_timeout:g} s"

    async def _serve(self):
        """Looks at it again and again -> why it serves no more."""
        last_answer = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), LOOK_EVERY)
                return f"ended with code {self.process.returncode}"
            if await self._ask(HANGING):
                last_answer = time.monotonic()
            elif time.monotonic() - last_answer > HANGING:
                return f"did not answer for {HANGING:g} s"

    async def _ask(self, seconds):
        """Asks for its health; says whether it tells it."""
        try:
            async with asyncio.timeout(seconds):
                url = self.service.url(self.cfg.host, "health")
                self.health = await self._http.request("GET", url)
            return True
        except (HttpError, TimeoutError):
            return False

    async def _stop(self):
        process = self.process
        if process is None:
            return
        self.process = None
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), TO_END)
            except TimeoutError:
                pass
            finally:  # also when we are cancelled once more
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        # what it started itself, if anything is left of it
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await asyncio.wait({self._reading}, timeout=1.0)
        self._reading.cancel()

    def _set(self, state, why=""):
        if state != self.state:
            self.state = state
            print(f"{self.service.name}: {state}{f': {why}' if why else ''}", flush=True)

    def _last_words(self):
        lines = [line.strip() for line in self.lines if line.strip()]
        return f", saying {' | '.join(lines)[-600:]!r}" if lines else ""

    def row(self) -> list[str]:
        """Says how it does, for the table; speed is since the last one."""
        now = time.monotonic()
        calls = self.health.get("calls", 0)
        before, calls_before = self._reported
        if calls < calls_before:  # it was started again, and counts anew
            calls_before = 0
        self._reported = (now, calls)
        seconds = self.health.get("seconds", 0.0)
        gpu = self.health.get("gpu_bytes")
        return [
            self.service.name,
            self.state,
            str(calls),
            f"{(calls - calls_before) / max(1e-9, now - before):.1f}",
            f"{1000 * seconds / calls:.0f}" if calls else "-",
            str(self.health.get("running", 0)),
            str(self.health.get("errors", 0)),
            str(self.restarts),
            f"{gpu / 2**30:.1f}" if gpu is not None else "-",
        ]


COLUMNS = "service state calls calls/s ms running errors restarts GPU_GiB".split()


def table(running: list[Running]) -> str:
    """Writes how all of them do, in columns."""
    rows = [COLUMNS, *(each.row() for each in running)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


# -- all of them


async def serve(services: list[Service], cfg: Config) -> None:
    """Runs all until SIGTERM or Ctrl-C. Raises UserError if one does not come up."""
    running = [Running(service, cfg) for service in services]
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    tasks = [asyncio.create_task(each.watch()) for each in running]
    tasks.append(asyncio.create_task(_tell(running, cfg)))
    stopping = asyncio.create_task(ended.wait())
    try:
        done, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # of a watcher it is a UserError
    finally:
        stopping.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _tell(running, cfg):
    """Writes the file when all serve; then tells how they do."""
    for each in running:
        await each.is_up.wait()
    path = Path(cfg.save_to).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    written = json.dumps(servers_file([each.service for each in running], cfg), indent=2)
    path.write_text(written + "\n", encoding="utf-8")
    print(f"all serve: --tools=mcp:{path}", flush=True)
    while True:
        await asyncio.sleep(cfg.report_every or 3600.0)
        if cfg.report_every:
            print(table(running), flush=True)


def main(argv: list[str]) -> None:
    """Serves, as the command line says: the file of the services, then the options."""
    if not argv or argv[0].startswith("-"):
        raise UserError("no file is named: write python -m serve.tools services.json")
    cfg = config.parse(Config, argv[1:], check)
    services = read(argv[0], cfg.port)
    asyncio.run(serve(services, cfg))


if __name__ == "__main__":
    config.main(main)

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
import os
import secrets
import signal
from dataclasses import dataclass
from pathlib import Path

from run import config
from run.config import UserError
from run.http import key_from

if __name__ == "__main__":
    config.answer_help(__file__)

from serve import asking

try:
    from starlette.applications import Starlette

    from serve import web
    from serve.guard import Guard
    from serve.views import Views
except ImportError as error:
    raise UserError(f'serve.page needs a package ({error}): pip install -e ".[mcp]"') from None

TOKEN_ENV = "NANOTOOL_PAGE_TOKEN"
TOKEN_FILE = ".page_token"  # in out_dir: the link of before is good after a restart


@dataclass
class Config:
    out_dir: str = "out"  # the folder whose runs are shown, and below which runs are started
    host: str = "127.0.0.1"  # 0.0.0.0 = for other machines too, who know the token
    port: int = 8799  # 0 = any free one; it is printed


def check(cfg: Config) -> None:
    """Checks the rules across keys."""
    if not 0 <= cfg.port < 65536:
        raise UserError(f"port = {cfg.port}: expected 0 to 65535")
    if not cfg.out_dir:
        raise UserError("out_dir is empty: expected a folder, such as out")
    if Path(cfg.out_dir).exists() and not Path(cfg.out_dir).is_dir():
        raise UserError(f"out_dir = {cfg.out_dir!r} is no folder")


def token_for(root: Path) -> str:
    """Gives the token of this page: that of the environment, or one that stays with the folder, so
    that a browser which has it goes on after a restart. Only this user can read it."""
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


def application(root: Path, token: str, host: str):
    """Makes the ASGI application."""
    return Guard(Starlette(routes=Views(root, token).routes()), token, host)


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
    print("who has this link can start programs here; Ctrl-C ends the page, not its runs")
    print(f"the page: {web.address(listening)}/?token={token}", flush=True)
    web.serve(application(root, token, cfg.host), listening)


if __name__ == "__main__":
    config.main(main)

"""The open_page tool: the readable text of what is at a URL, page by page; HTML, PDF or text.

    --tools=search,open_page --tool_options=open_page.chars=4000  # pip install -e ".[pages]"

Menus, banners and footers are left out (trafilatura); PDFs are read by pypdf. What was read is kept
for the run, so the other parts of a text, and the other samples of a group, fetch nothing again.

What is covered: only addresses of the internet are asked, also behind a redirect or a name, unless
`private` allows all (run/http.py); `megabytes` of an answer, and the call's deadline, are the most
that is read. The libraries run in a process of their own, confined (sandbox/reading.py). What is
not: pages that need JavaScript, a login or a cookie; and the web changes from day to day, so a run
with this tool cannot be repeated.
"""

import importlib.util
import threading
from collections import OrderedDict
from pathlib import Path

from run.config import UserError
from run.http import FETCHING, HttpError, fetch_public, is_public
from run.worker import WorkerDied, Workers
from tools import ToolError
from tools.calling.base import DEADLINE
from tools.calling.http import plain, tool_error
from tools.sandbox import caller

READING = 20.0  # seconds, at most, that a text may take to be read
# layers around them, where there are such
WANTED = ("network_namespace", "no_capabilities", "no_new_privileges", "seccomp")
KEPT = 32_000_000  # characters of texts that are kept; what was not used for longest goes
READERS = 2  # processes
READER = Path(__file__).parent / "sandbox" / "reading.py"  # what they run


class open_page:
    shared = True  # what was read is there for all trajectories
    pure = True
    network = True

    def __init__(
        self,
        chars: int = 2000,
        megabytes: float = 10.0,
        links: bool = False,
        private: bool = False,
    ):
        """chars: of a text that one call shows. megabytes: that are fetched, at most. links: keeps
        the addresses of links in the text. private: also this machine and its network may be
        asked. UserError if a package is missing."""
        if chars < 100 or megabytes <= 0:
            raise UserError(
                f"open_page.chars = {chars}, open_page.megabytes = {megabytes}: "
                "expected 100 or more, and more than 0"
            )
        self.chars = chars
        self.limit = int(megabytes * 2**20)
        self.links = links
        self.private = private
        for package in ("trafilatura", "pypdf"):
            if importlib.util.find_spec(package) is None:
                raise UserError(f'open_page needs {package}: pip install -e ".[pages]"')
        self.readers = Workers(READER, READERS, packages=True)
        self.is_reported = False  # whether the user was told which layers are not around them
        self.texts = OrderedDict()  # URL -> (title, parts); the one used last at the end
        self.size = 0  # characters of them
        self.lock = threading.Lock()

    def __call__(self, url: str, part: int = 1) -> str:
        """Open a web page or a PDF and read its text.

        Args:
            url: Its address, beginning with http:// or https://.
            part: Which part of a long text, from 1.
        """
        url = plain(url).strip().partition("#")[0]
        title, parts = self._known(url) or self._read(url)
        if not 1 <= part <= len(parts):
            raise ToolError("no_part", f"error: there is no part {part}; it has {len(parts)}")
        shown = parts[part - 1]
        if title and part == 1:
            shown = f"{title}\n\n{shown}"
        if len(parts) > 1:
            shown += f"\n\n(part {part} of {len(parts)})"
        return shown

    def _known(self, url):
        with self.lock:
            if url in self.texts:
                self.texts.move_to_end(url)
            return self.texts.get(url)

    def _read(self, url):
        """Fetches it, reads it in a process, keeps what came of it -> (title, parts)."""
        # 1. fetch
        seconds = min(FETCHING, DEADLINE.get() or FETCHING)
        allowed = _anywhere if self.private else is_public
        try:
            body = fetch_public(url, self.limit, allowed, seconds)
        except HttpError as error:
            if error.kind in ("refused", "nonsense") and not error.status:  # by us
                raise ToolError("refused", f"error: {error.detail}") from None
            raise tool_error("the page's server", error) from None

        # 2. read
        if not self.is_reported:
            self.is_reported = True
            layers = self.readers.ask({"layers": True}, READING)["layers"]
            caller.report([name for name in WANTED if not layers[name]], "open_page")
        request = {"body": body, "url": url, "with_links": self.links}
        try:
            reply = self.readers.ask(request, min(READING, DEADLINE.get() or READING))
        except (TimeoutError, WorkerDied):
            raise ToolError("unreadable", "error: it takes too much to read it") from None
        if "error" in reply:
            raise ToolError("unreadable", f"error: {reply['error']}")

        # 3. keep
        found = reply["title"], split(reply["text"], self.chars)
        with self.lock:
            if url not in self.texts:
                self.texts[url] = found
                self.size += _size(found)
            while self.size > KEPT and len(self.texts) > 1:
                _, oldest = self.texts.popitem(last=False)
                self.size -= _size(oldest)
        return found

    def close(self) -> None:
        self.readers.stop()


def _anywhere(address: str) -> bool:
    return True


def _size(found):
    title, parts = found
    return len(title) + sum(map(len, parts))


def split(text: str, chars: int) -> list[str]:
    """Splits a text into parts of at most so many characters, cut at the end of a line or a word
    where there is one in the second half."""
    parts = []
    while len(text) > chars:
        for mark in ("\n", " "):
            cut = text.rfind(mark, chars // 2, chars + 1)
            if cut > 0:
                break
        else:
            cut = chars
        parts.append(text[:cut].rstrip())
        text = text[cut:].lstrip()
    if text:
        parts.append(text)
    return parts

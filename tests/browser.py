"""A real browser, driven by the DevTools protocol: headless Chromium, as Debian has it.

with Browser(tmp_path) as browser:
    page = browser.open("http://127.0.0.1:8799/")
    page.until("document.querySelector('h1')?.textContent === 'Runs'")
    page.click("a.primary")
"""

import base64
import contextlib
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

from until import until
from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # of root, in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
SECONDS = 90.0  # that an answer may take: generous, as only a test that fails waits for so long


def find() -> str | None:
    """The browser's program, None if there is none."""
    return next((found for found in map(shutil.which, NAMES) if found), None)


class Browser:
    """One browser with a profile of its own. It ends with the `with`."""

    def __init__(self, folder: Path):
        self.folder = folder / "profile"
        self.said = folder / "browser.log"

    def __enter__(self) -> "Browser":
        with open(self.said, "wb") as said:
            command = [find(), *FLAGS, f"--user-data-dir={self.folder}", "about:blank"]
            self.process = subprocess.Popen(
                command, stdout=said, stderr=said, stdin=subprocess.DEVNULL
            )
        assert until(self._address, SECONDS), self.said.read_text(errors="replace")
        self.connection = connect(self._address(), max_size=None, proxy=None)
        self.socket = self.connection.__enter__()
        self.numbers = itertools.count(1)
        self.events: list[dict] = []
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(Exception):
            self.connection.__exit__(None, None, None)
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _address(self) -> str:
        found = re.search(r"ws://\S+", self.said.read_text(errors="replace"))
        return found[0] if found else ""

    def ask(self, method: str, session: str = "", **parameters) -> dict:
        """What the browser answers; an error of its own is an AssertionError."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        self.socket.send(json.dumps(message))
        while True:
            answer = json.loads(self.socket.recv(timeout=SECONDS))
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            if "method" in answer:
                self.events.append(answer)

    def open(self, url: str = "about:blank") -> "Page":
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        page = Page(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log"):
            page.ask(f"{domain}.enable")
        if url != "about:blank":
            page.go(url)
        return page


class Page:
    def __init__(self, browser: Browser, session: str):
        self.browser = browser
        self.session = session

    def ask(self, method: str, **parameters) -> dict:
        return self.browser.ask(method, self.session, **parameters)

    def go(self, url: str) -> None:
        self.ask("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, expression: str):
        """What a line of javascript gives, awaited."""
        answer = self.ask(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, (expression, answer["exceptionDetails"])
        return answer["result"].get("value")

    def until(self, expression: str, seconds: float = SECONDS) -> None:
        """Waits until a line of javascript gives something that counts as true there."""

        def is_true() -> bool:
            with contextlib.suppress(AssertionError):  # the page is loading
                return self.value(f"!!({expression})")
            return False

        is_there = until(is_true, seconds)
        assert is_there, f"{expression}\n{self.value('document.body.innerText')[:3000]}"

    def click(self, selector: str) -> None:
        """Clicks with the mouse, in the middle of the element."""
        quoted = json.dumps(selector)
        self.until(f"!!document.querySelector({quoted})")
        place = self.value(
            f"(() => {{ const one = document.querySelector({quoted});"
            "one.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const box = one.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        at = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, **at)

    def fill(self, selector: str, text: str) -> None:
        """Puts the text into a field, as typing does."""
        quoted = json.dumps(selector)
        self.until(f"!!document.querySelector({quoted})")
        self.value(
            f"(() => {{ const one = document.querySelector({quoted}); one.focus();"
            f"one.value = {json.dumps(text)};"
            "one.dispatchEvent(new Event('input', {bubbles: true}));"
            "one.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )

    def key(self, name: str) -> None:
        codes = {"Tab": 9, "Enter": 13, "ArrowRight": 39, "ArrowLeft": 37, " ": 32}
        key = {"key": name, "windowsVirtualKeyCode": codes[name], "code": name}
        if name == "Enter":
            key["text"] = "\r"
        self.ask("Input.dispatchKeyEvent", type="keyDown", **key)
        self.ask("Input.dispatchKeyEvent", type="keyUp", key=name, code=name)

    def size(self, width: int, height: int, is_phone: bool = False) -> None:
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=is_phone,
        )

    def dark(self, is_dark: bool = True) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[feature])

    def picture(self, file: Path, whole: bool = False) -> None:
        """Writes a screenshot, of a few colours: a page needs no more."""
        from io import BytesIO

        from PIL import Image

        data = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        with Image.open(BytesIO(base64.b64decode(data))) as image:
            image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)

    def problems(self) -> list[str]:
        """What the browser has logged of errors: of scripts, and of what the policy forbids."""
        self.value("1")  # all events until now have come
        found = []
        for event in self.browser.events:
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(event["params"])[:500])
            if event["method"] == "Log.entryAdded":
                entry = event["params"]["entry"]
                if entry["level"] == "error":
                    found.append(f"{entry['text']} {entry.get('url', '')}")
        return found

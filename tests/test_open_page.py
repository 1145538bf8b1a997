"""The open_page tool: what is read, what is refused, and pages that do harm.

    pytest tests/test_open_page.py

The pages come from a server on 127.0.0.1, which only a test's own permission lets the tool ask.
"""

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from until import PATIENCE

from run.config import UserError
from tools import NetworkError, Toolbox, ToolError
from tools import open_page as module
from tools.calling.base import DEADLINE
from tools.open_page import open_page, split

pytest.importorskip("trafilatura", reason='pip install -e ".[pages]"')
pytest.importorskip("pypdf", reason='pip install -e ".[pages]"')

ARTICLE = """<!doctype html><html><head><title> Oslo:
 a guide </title><script>alert(1)</script></head><body>
<nav><a href="/">Home</a> | <a href="/login">Login</a></nav>
<article><h1>Oslo</h1><p>Oslo is the capital of <a href="/norway">Norway</a>. It lies at the end of
a fjord and has about seven hundred thousand inhabitants, who like to ski.</p>
<p>The city was founded in the year 1040, and burnt down in 1624; after that it was built anew a
little to the west, under the name of Christiania.</p>
<table><tr><th>Year</th><th>People</th></tr><tr><td>1900</td><td>250000</td></tr></table></article>
<footer>Cookies, imprint, © all rights</footer></body></html>"""


def pdf(*texts):
    """A PDF with a page for each text, made by hand."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "", "<< /Type /Font /Subtype /Type1"]
    objects[2] += " /BaseFont /Helvetica >>"
    kids = []
    for text in texts:
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
        kids.append(f"{len(objects) + 1} 0 R")
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /Resources << /Font << /F1 3 0 R >> >> "
            f"/MediaBox [0 0 612 792] /Contents {len(objects) + 2} 0 R >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    body = b"%PDF-1.4\n"
    places = []
    for number, text in enumerate(objects, 1):
        places.append(len(body))
        body += f"{number} 0 obj\n{text}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    head = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    end = f"trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(body)}\n%%EOF\n"
    return body + (head + end).encode()


LONG = "<html><body><article>" + "".join(
    f"<p>Paragraph number {i} of a long text, which says nothing of note at all.</p>"
    for i in range(200)
)
PAGES = {
    "/oslo": ARTICLE.encode(),
    "/latin": "<html><head><meta charset='iso-8859-1'><title>Ä</title></head><body><p>Grüße aus "
    "Köln, der alten Stadt am Rhein, in der es viel zu sehen gibt.</p></body></html>".encode(
        "latin-1"
    ),
    "/long": LONG.encode(),
    "/short": b"<html><body><div>Forty-two</div></body></html>",
    "/paper.pdf": pdf("The first page.", "The second page."),
    "/notes.txt": b"Plain notes\n  with their lines,\nand 1 < 2.",
    "/data.json": b'{"answer": 42}',
    "/empty": b"",
    "/blank": b"<html><head></head><body><img src='x'></body></html>",
    "/picture": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(100),
    "/broken.pdf": b"%PDF-1.4\nnothing of it is there",
    "/nested": b"<html><body>" + b"<div><b><table><td>" * 100_000 + b"deep",
    "/entities": b'<?xml version="1.0"?><!DOCTYPE html [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "'
    + b"&a;" * 1000
    + b'"><!ENTITY c "'
    + b"&b;" * 1000
    + b'">]><html><body><p>&c;&c;&c;</p></body></html>',
    "/file": b'<!DOCTYPE html [<!ENTITY x SYSTEM "file:///etc/passwd">]><html><body><p>It says '
    b"&x; and nothing more than that.</p></body></html>",
}


@pytest.fixture(scope="module")
def server():
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            """Says nothing."""

        def do_GET(self):
            made.asked.append(self.path)
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("location", self.path.removeprefix("/to/"))
                self.send_header("content-length", "0")
                self.end_headers()
                return
            if self.path == "/endless":
                self.send_response(200)
                self.end_headers()
                try:
                    while True:
                        self.wfile.write(b"x" * 65536)
                except OSError:
                    return
            status = {"/busy": 503, "/secret": 403}.get(self.path, 200)
            body = PAGES.get(self.path, b"nothing here")
            if status == 200 and self.path not in PAGES:
                status = 404
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    made.asked = []
    made.here = f"http://127.0.0.1:{made.server_port}"
    threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(scope="module")
def tool():
    made = open_page(private=True)
    yield made
    made.close()


def failed(tool, url, **arguments):
    with pytest.raises(ToolError) as caught:
        tool(url, **arguments)
    return caught.value.kind, caught.value.text


# -- what is read


def test_the_article_is_read_and_the_rest_of_the_page_is_not(tool, server):
    text = tool(f"{server.here}/oslo")
    assert text.startswith("Oslo: a guide\n\n# Oslo\n\nOslo is the capital of Norway. It lies at")
    assert "1624" in text and "| 1900 | 250000 |" in text
    for other in ("Login", "imprint", "alert", "<", "http"):
        assert other not in text


def test_links_stay_if_they_are_wanted(server):
    tool = open_page(private=True, links=True)
    assert f"[Norway]({server.here}/norway)" in tool(f"{server.here}/oslo")
    tool.close()


@pytest.mark.parametrize(
    "path, text",
    [
        ("/paper.pdf", "The first page.\n\nThe second page."),
        ("/notes.txt", "Plain notes\n  with their lines,\nand 1 < 2."),
        ("/data.json", '{"answer": 42}'),
        ("/short", "Forty-two"),
        ("/to//notes.txt", "Plain notes\n  with their lines,\nand 1 < 2."),
    ],
)
def test_a_pdf_a_text_and_a_page_without_an_article_are_read(tool, server, path, text):
    assert tool(server.here + path) == text


def test_letters_are_read_as_the_page_says(tool, server):
    assert "Grüße aus Köln" in tool(f"{server.here}/latin")


def test_a_long_text_comes_in_parts_and_is_fetched_once(tool, server):
    url = f"{server.here}/long"
    before = len(server.asked)
    first = tool(url)
    count = int(first.rpartition(" of ")[2].rstrip(")"))
    assert count > 5 and first.endswith(f"(part 1 of {count})")
    whole = "\n".join(tool(url, part).rpartition("\n\n(part ")[0] for part in range(1, count + 1))
    for number in range(200):
        assert whole.count(f"Paragraph number {number} of") == 1
    assert len(first) <= 2000 + 30
    assert failed(tool, url, part=count + 1) == (
        "no_part",
        f"error: there is no part {count + 1}; it has {count}",
    )
    assert failed(tool, url, part=0)[0] == "no_part"
    assert tool(f"{url}#a_place_in_it") == first
    assert len(server.asked) == before + 1


@pytest.mark.parametrize(
    "text", ["", "a", "word " * 1000, "x" * 5001, "line\n" * 999, "ab c" * 800]
)
def test_parts_lose_nothing_but_spaces(text):
    parts = split(text, 100)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(0 < len(part) <= 100 for part in parts)


def test_what_was_not_used_for_longest_goes(server, monkeypatch):
    tool = open_page(private=True)
    monkeypatch.setattr(module, "KEPT", 60)
    for path in ("/notes.txt", "/data.json", "/short", "/notes.txt"):
        tool(server.here + path)
    assert [url.rpartition("/")[2] for url in tool.texts] == ["short", "notes.txt"]
    assert tool.size == sum(len("".join(parts)) for _, parts in tool.texts.values())
    tool.close()


def test_a_toolbox_calls_it_and_many_at_once(server):
    box = Toolbox(["open_page"], timeout=PATIENCE, options=["open_page.private=true"])
    paths = ["/oslo", "/notes.txt", "/short", "/nothing"] * 8

    async def scene():
        session = box.open()
        asked = [session.call("open_page", {"url": server.here + path}) for path in paths]
        outcomes = await asyncio.gather(*asked)
        await box.close()
        return outcomes

    for path, (content, error, _) in zip(paths, asyncio.run(scene()), strict=True):
        if path == "/nothing":
            assert error == "network" and "refuses the request (HTTP 404" in content
        else:
            assert error is None and any(word in content for word in ("Oslo", "Plain", "Forty"))


# -- what is refused

INSIDE = [
    "http://127.0.0.1/",
    "http://localhost:8000/",
    "http://127.1/",
    "http://0/",
    "http://0.0.0.0/",
    "http://2130706433/",  # 127.0.0.1 as one number
    "http://0x7f.1/",
    "http://[::1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://10.0.0.1/",
    "http://192.168.1.1/",
    "http://172.16.0.1/",
    "http://169.254.169.254/latest/meta-data/",  # where clouds tell keys
    "http://100.64.0.1/",
    "http://224.0.0.1/",
    "http://user:password@127.0.0.1/",
    "http://example.com@127.0.0.1/",
]


@pytest.mark.parametrize("url", INSIDE)
def test_this_machine_and_its_network_are_refused(url):
    kind, text = failed(open_page(), url)
    assert kind in ("refused", "network")
    assert "is an address of this machine" in text or "there is no host" in text


@pytest.mark.parametrize(
    "url",
    ["", "oslo", "file:///etc/passwd", "ftp://example.com/x", "http://", "http://[::1", "//x"],
)
def test_what_is_no_address_of_the_web_is_refused(tool, url):
    kind, text = failed(tool, url)
    assert kind in ("refused", "network") and text.startswith("error: ")


def test_a_redirect_into_our_network_is_refused(server, monkeypatch):
    """Each place on the way is looked at; the first one alone is allowed here."""
    monkeypatch.setattr(module, "is_public", lambda address: address == "127.0.0.1")
    tool = open_page()
    assert tool(f"{server.here}/to/{server.here}/short") == "Forty-two"
    before = len(server.asked)
    for target in (f"http://127.0.0.2:{server.server_port}/short", "http://[::1]/", "file:///etc"):
        assert failed(tool, f"{server.here}/to/{target}")[0] == "refused"
    assert failed(tool, f"{server.here}/to//to//to//to//to//to//to//short")[0] == "refused"
    assert all(path.startswith("/to/") for path in server.asked[before:])
    tool.close()


def test_a_name_is_asked_at_the_address_that_was_looked_at(monkeypatch):
    """DNS rebinding: a host of which one address is inside is refused whole."""
    monkeypatch.setattr(
        module.fetch_public.__globals__["socket"],
        "getaddrinfo",
        lambda *_, **__: [(0, 0, 0, "", (ip, 0)) for ip in ("93.184.216.34", "10.0.0.7")],
    )
    kind, text = failed(open_page(), "http://innocent.example/")
    assert kind == "refused" and "'innocent.example' is an address of this machine" in text


@pytest.mark.parametrize(
    "path, kind, words",
    [
        ("/empty", "unreadable", "there is no text in it"),
        ("/blank", "unreadable", "there is no text in it"),
        ("/picture", "unreadable", "neither a page nor a PDF nor text"),
        ("/broken.pdf", "unreadable", "it cannot be read ("),
        ("/nothing", "network", "refuses the request (HTTP 404"),
        ("/secret", "network", "refuses the key (HTTP 403"),
    ],
)
def test_what_cannot_be_read_is_said(tool, server, path, kind, words):
    got_kind, text = failed(tool, server.here + path)
    assert got_kind == kind and words in text


def test_a_server_that_is_busy_or_away_is_worth_asking_again(tool, server):
    for url in (f"{server.here}/busy", "http://127.0.0.1:9/"):
        with pytest.raises(NetworkError):
            tool(url)


@pytest.mark.parametrize("options", [{"chars": 99}, {"megabytes": 0}])
def test_options_that_cannot_work_are_refused(options):
    with pytest.raises(UserError, match="expected 100 or more, and more than 0"):
        open_page(**options)


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'needs trafilatura: pip install -e "\.\[pages\]"'):
        open_page()


# -- pages that do harm


def test_an_endless_page_is_cut_off(server):
    tool = open_page(private=True, megabytes=1)
    kind, text = failed(tool, f"{server.here}/endless")
    assert kind == "refused" and "more than 1,048,576 bytes" in text
    tool.close()


@pytest.mark.parametrize("path", ["/nested", "/entities"])
def test_a_page_that_blows_up_harms_nobody(tool, server, path):
    """Whatever comes of it, an error or some text, the next page is read."""
    try:
        assert len(tool(server.here + path)) < 3000
    except ToolError as error:
        assert error.kind == "unreadable"
    assert tool(f"{server.here}/short") == "Forty-two"


def test_a_page_reads_no_file_of_this_machine(tool, server):
    try:
        text = tool(f"{server.here}/file")
    except ToolError as error:
        text = error.text
    assert "root:" not in text


def test_the_readers_are_confined_and_what_lacks_is_said(tool, server, monkeypatch, capsys):
    layers = tool.readers.ask({"layers": True}, PATIENCE)["layers"]
    assert {"network_namespace", "own_user", "seccomp"} <= set(layers)
    monkeypatch.setattr(module, "WANTED", ("pid_namespace",))  # what a reader never has
    monkeypatch.setattr(module.caller, "_reported", set())
    monkeypatch.setattr(tool, "is_reported", False)
    monkeypatch.setattr(tool, "texts", module.OrderedDict())
    assert tool(f"{server.here}/short") == "Forty-two"
    assert "open_page: this system lacks pid_namespace" in capsys.readouterr().err


def test_a_text_that_takes_for_ever_is_given_up(server, monkeypatch):
    """By the process's own alarm; another one reads the next page."""
    tool = open_page(private=True)

    async def call():
        DEADLINE.set(0.001)
        return failed(tool, f"{server.here}/oslo")

    monkeypatch.setattr(module, "fetch_public", lambda *_: PAGES["/oslo"] * 50)
    assert asyncio.run(call()) == ("unreadable", "error: it takes too much to read it")
    monkeypatch.undo()
    assert tool(f"{server.here}/short") == "Forty-two"
    tool.close()

"""What runs inside of a worker process: the readable text of a page or a PDF.

tools/open_page.py is the other side. run/worker.py loads this file, calls prepare(), once, and
answer(). The libraries that read HTML and PDF get what anybody may have written: a page that takes
them for ever, or all memory, ends this process and not the trainer.

What is covered: an empty environment but for two paths of libraries; memory and time are limited;
no file can be written; on Linux there is no network, no new process and no way to another one, and
the user is another where that one may read python. What is not: files that python's user may read
can be read, as what is imported late has to be found.
"""

import io
import logging
import os
import resource
import sys

import pypdf
import trafilatura
from lxml import etree

if __package__:
    from tools.sandbox import confine
else:  # in the worker, with the folder of this file alone
    import confine

MEMORY = 2 << 30  # bytes of address space
TEXT_SIZE = 2_000_000  # characters of a page that are kept
# what a page has near its beginning, and a text has not
HTML = (b"<!doctype html", b"<html", b"<head", b"<body", b"<title", b"<div", b"<p>")


_layers = {}  # which are around this process


def prepare() -> None:
    """Limits this process, for good, after it has read one page: that loads what is needed."""
    logging.disable()
    _html(b"<html><title>t</title><body><p>One sentence of a page.</p></body></html>", "", False)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    _layers.update(confine.confine_forks([os.__file__, pypdf.__file__, trafilatura.__file__]))
    confine.refuse_to_act()


def answer(request: dict) -> dict:
    """Reads the `body` that was fetched from `url`: {"title", "text"}, or {"error"}. with_links:
    whether links stay in the text. Or {"layers"}."""
    if "layers" in request:
        return {"layers": _layers}
    body = request["body"]
    try:
        if b"%PDF-" in body[:1024]:
            title, text = _pdf(body)
        elif b"\0" in body[:4096]:
            return {"error": "it is neither a page nor a PDF nor text"}
        elif _is_html(body):
            title, text = _html(body, request["url"], request["with_links"])
        else:
            title, text = "", body.decode("utf-8", "replace")
    except MemoryError:
        return {"error": f"it takes more than {MEMORY >> 20} MB of memory to read"}
    except Exception as error:  # whatever a library raises at what is broken
        return {"error": f"it cannot be read ({type(error).__name__}: {str(error)[:200]})"}
    text = text.strip()
    if not text:
        return {"error": "there is no text in it"}
    return {"title": " ".join(title.split())[:300], "text": text[:TEXT_SIZE]}


def _is_html(body):
    start = body[:4096].lower()
    return any(mark in start for mark in HTML)


def _html(body, url, with_links):
    """Reads a page as (title, text): the article by trafilatura; if it finds none, all its text."""
    tree = trafilatura.load_html(body)
    if tree is None:
        raise ValueError("no HTML")
    title = tree.findtext(".//title") or ""
    text = trafilatura.extract(
        etree.tostring(tree, encoding="unicode"),
        url=url or None,
        output_format="markdown",
        include_links=with_links,
        include_comments=False,
        favor_recall=True,
    )
    return title, text or trafilatura.html2txt(tree)


def _pdf(body):
    """Reads a PDF as (title, text of its pages)."""
    reader = pypdf.PdfReader(io.BytesIO(body))
    if reader.is_encrypted and not reader.decrypt(""):
        raise ValueError("it asks for a password")
    texts = []
    size = 0
    for page in reader.pages:
        texts.append(page.extract_text())
        size += len(texts[-1])
        if size > TEXT_SIZE:
            break
    title = (reader.metadata and reader.metadata.title) or ""
    return str(title), "\n\n".join(texts)

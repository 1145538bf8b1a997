"""serve.page in a real browser: a run of calc_sft is set up, started, watched, stopped and resumed,
rollouts are opened, runs compared; and no text of a model or a person becomes an element.

pytest tests/test_page_browser.py      # NANOTOOL_PICTURES=folder: screenshots too
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest
from pages import HOSTILE, Served, hostile_run, served

from run import page as run_page

browsers = pytest.importorskip("browser", reason="the package websockets is not installed")
pytest.importorskip("mcp", reason="starlette comes with mcp")
pytestmark = pytest.mark.skipif(browsers.find() is None, reason="no Chromium on this machine")
PICTURES = os.environ.get("NANOTOOL_PICTURES")
# what a page may hold of elements that load or run something: its own
ELEMENTS = "document.querySelectorAll('img, script, iframe, object, embed, base').length"
SAFE = "window.hacked === undefined"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsers.Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def page(served, browser):
    browser.events.clear()
    page = browser.open()
    page.size(1280, 860)
    page.go(served.link)
    yield page
    assert page.problems() == []


def picture(page, name):
    if PICTURES:
        page.picture(Path(PICTURES) / f"{name}.png")


def test_a_run_is_set_up_started_watched_stopped_and_resumed(page, served):
    page.until("document.querySelector('.empty')?.innerText.includes('No runs')")
    assert page.value("location.search") == ""  # the token is not in the history
    assert page.value("document.cookie") == ""  # nor where a script could read it

    # 1. set up: the config's own values come first, a mistake is told by the script's own sentence
    page.click(".empty a")
    page.until("document.querySelector('.verdict.good')")
    shown = page.value("[...document.querySelectorAll('#fields .field')].map(f=>f.dataset.field)")
    assert {"out_dir", "model", "rows", "optimizer", "learning_rate"} <= set(shown)
    assert "dtype" not in shown and page.value("!!document.querySelector('#field-dtype')")
    page.fill("#field-learning_rate", "fast")
    page.until("document.querySelector('.verdict.why')")
    said = page.value("document.querySelector('.verdict').innerText")
    assert said == "✕ learning_rate = 'fast': expected float"
    assert page.value("document.querySelector('.field.wrong').dataset.field") == "learning_rate"
    page.fill("#field-learning_rate", "1e-2")
    page.fill("#field-rows", "640")
    page.fill("#field-epochs", "200")
    page.until("document.querySelector('.command code')?.innerText.includes('--epochs=200')")
    page.until("document.querySelector('.verdict.good')")
    picture(page, "form")

    # 2. start, and watch three points arrive
    page.click("#start")
    page.until("location.hash.includes('/run?') && document.querySelector('.badge.running')")
    dots = "(document.querySelector('.dots')?.getAttribute('d').match(/M/g) ?? []).length"
    page.until(f"{dots} >= 3")
    before = page.value(dots)
    page.until(f"{dots} > {before}")

    # 3. stop: as Ctrl-C, so that the step is finished and saved
    page.click("[data-key=stop]")
    page.until("document.querySelector('.badge.stopped')")
    said = page.value("document.querySelector('.log').textContent")
    assert "finishing this step, then saving" in said and "stopped after" in said
    stopped_at = served.state("calc_sft")["step"]
    assert served.state("calc_sft")["checkpoint"] == stopped_at >= 3

    # 4. resume: it goes on where it was
    page.click("[data-key=resume]")
    page.until("document.querySelector('.badge.running')")
    page.until("document.querySelector('.log').textContent.includes('going on with step')")
    going_on = f"going on with step {stopped_at}"
    assert going_on in page.value("document.querySelector('.log').textContent")
    steps = "Number(document.querySelector('.about').innerText.match(/(\\d+) steps/)[1])"
    page.until(f"{steps} > {stopped_at}")

    # 5. a rollout is opened, by the keyboard too; SFT writes its first three samples
    page.until("document.querySelectorAll('#rollouts .tokens .t').length > 3")
    assert page.value("document.querySelector('#rollouts .bar').innerText").count("1 of 3")
    page.key("ArrowRight")
    page.until("document.querySelector('#rollouts .bar').innerText.includes('2 of 3')")
    picture(page, "run")
    page.click("[data-key=stop]")
    page.until("document.querySelector('.badge.stopped')")
    rows = [json.loads(line) for line in open(served.out / "calc_sft" / "metrics.jsonl")]
    assert [row["step"] for row in rows] == list(range(len(rows)))  # none lost, none twice


@pytest.fixture(scope="module")
def hostile(served):
    hostile_run(served.out, "a <b>bad</b> & <img src=x onerror=window.hacked=1> run")
    return "a <b>bad</b> & <img src=x onerror=window.hacked=1> run"


def test_what_a_model_writes_stays_text(page, served, hostile):
    """In the list, and of a run its head, settings, curves, rollouts, calls, log, evaluation."""
    own = page.value(ELEMENTS)
    page.until("document.querySelectorAll('.runs tbody tr').length > 0")
    assert hostile in page.value("document.querySelector('.runs').innerText")
    page.fill("input[type=search]", f"{HOSTILE} <b>nothing</b>")
    page.until("document.querySelector('.empty')")
    assert page.value(SAFE) and page.value(ELEMENTS) == own
    page.value(f"location.hash = toRun({json.dumps(hostile)})")
    page.until("document.querySelectorAll('#rollouts .tokens .t').length === 2")
    for section in ("curves", "rollouts", "log", "settings", "evaluation"):
        said = f"document.querySelector('#{section}').textContent"
        page.until(f"{said}.includes('<script>window.hacked=1</script>')")
    assert HOSTILE in page.value("document.querySelector('.runhead').textContent")
    assert page.value("document.title").startswith(hostile)
    page.value(
        "document.querySelector('#rollouts .tokens .t').dispatchEvent("
        "new MouseEvent('mouseover', {bubbles: true}))"
    )
    assert "<img" in page.value("document.querySelector('#tip').textContent")
    page.fill("[data-key=longer]", HOSTILE)
    page.click("[data-key=resume]")
    page.until("document.querySelector('.told').innerText.includes('expected int')")
    assert HOSTILE[:20] in page.value("document.querySelector('.told').innerText")
    assert page.value("document.querySelectorAll('main b b, main img, main script').length") == 0
    assert page.value(SAFE) and page.value(ELEMENTS) == own

    page.click("[data-key=evaluate]")
    page.until("document.querySelector('.verdict')?.innerText.length > 3")
    for field in ("n", "endpoint", "save_to"):
        page.fill(f"#field-{field}", HOSTILE)
    page.until("document.querySelector('.verdict.why')?.innerText.includes('= \\'<img')")
    assert hostile in page.value("document.querySelector('h1').innerText")
    assert page.value("document.querySelectorAll('main img, main script').length") == 0
    assert page.value(SAFE) and page.value(ELEMENTS) == own


def test_what_is_typed_stays_text(page, served, hostile):
    """In every text field of both forms, and what is said of it."""
    for script in ("train_sft.py", "train_grpo.py"):
        page.value(f"location.hash = place('new', {{script: '{script}'}})")
        page.until(f"document.querySelector('.command')?.innerText.includes('{script}')")
        own = page.value(ELEMENTS)
        fields = page.value(
            "[...document.querySelectorAll('.field > input, .field > textarea')].map(f => f.id)"
        )
        assert len(fields) > 15
        for field in fields:
            page.fill(f"#{field}", HOSTILE)
        page.fill(".tools > label input", HOSTILE)
        page.fill(".more > input", HOSTILE)
        count = "document.querySelector('.command code').innerText.split('<img').length"
        page.until(f"{count} > {len(fields)}")
        page.until("document.querySelector('.verdict.why')?.innerText.includes('<img')")
        page.fill("[aria-label='server name']", HOSTILE)
        page.fill("[aria-label='URL or command']", HOSTILE)
        page.value("document.querySelector('.server').open = true")
        page.click(".server button")
        page.until("document.querySelector('.server .why')?.innerText.includes('<img')")
        assert page.value(SAFE) and page.value(ELEMENTS) == own
        assert page.value("document.querySelectorAll('main img, main script').length") == 0


def test_rows_tools_and_a_made_up_rollout_are_shown(page, served):
    page.value("location.hash = place('new', {script: 'train_grpo.py', config: 'gsm8k.py'})")
    page.until("document.querySelector('.verdict')?.innerText.length > 3")
    press = "[...document.querySelectorAll('.buttons button')].find(b => b.innerText === '%s')"
    page.value(f"{press % 'Look at the rows'}.click()")
    page.until("document.querySelector('#result .message')")
    page.value(f"{press % 'Test the tools'}.click()")
    page.until("document.querySelector('#result .toollist dt')?.innerText === 'python(code)'")
    page.value(f"{press % 'Play one made-up rollout'}.click()")
    page.until("document.querySelectorAll('#result .tokens .t').length > 3")
    assert "stand-in" in page.value("document.querySelector('#result .log').innerText")
    picture(page, "made_up")
    page.click(".ours summary")
    page.click("input[type=checkbox][value=search]")
    page.until("document.querySelector('.command').innerText.includes('--tools=python,search')")


def test_a_phone_and_the_dark_see_all_of_it(page, served, hostile):
    page.dark()
    page.size(390, 844, is_phone=True)
    page.go(served.url + "/#/")
    page.until("document.querySelectorAll('.runs tbody tr').length > 0")
    background = page.value("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, background[4:-1].split(","))) < 60
    wide = "document.documentElement.scrollWidth <= innerWidth"
    assert page.value(wide)
    picture(page, "phone_dark")
    page.value(f"location.hash = toRun({json.dumps(hostile)})")
    page.until("document.querySelectorAll('#rollouts .tokens .t').length === 2")
    assert page.value(wide)
    page.value("location.hash = place('new', {script: 'train_grpo.py', config: 'calc.py'})")
    page.until("document.querySelector('.verdict')?.innerText.length > 3")
    assert page.value(wide)


def test_the_page_goes_on_when_its_server_comes_back(page, served, tmp_path):
    """The token stays with the folder, so the browser's cookie is good for the new server."""
    other = Served(tmp_path)
    port = int(other.url.rpartition(":")[2])
    page.go(other.link)
    page.until("document.querySelector('.empty')")
    other.end()
    page.until("document.querySelector('#connection').innerText.includes('does not answer')")
    hostile_run(tmp_path / "out", "later")
    again = Served(tmp_path, port=port)
    try:
        page.until("document.querySelector('.runs')?.innerText.includes('later')")
        page.until("document.querySelector('#connection').innerText === ''")
    finally:
        again.end()
    # the refused connections are logged by the browser, and are no problem here
    page.browser.events.clear()


def test_report_html_is_drawn_by_the_same_script(page, tmp_path):
    """The one page of a run that can be mailed: run/page.js stands in it."""
    run = hostile_run(tmp_path, "run")
    run_page.page(run)
    page.go(f"file://{run}/report.html#1")
    page.until("document.querySelectorAll('.tokens .t').length === 2")
    said = page.value("document.body.innerText")
    assert "2 of 3" in said and "Curves" in said and HOSTILE in said
    page.key("ArrowRight")
    page.until("document.body.innerText.includes('3 of 3')")
    assert page.value(SAFE) and page.value("document.querySelectorAll('img, iframe').length") == 0
    assert page.value("document.querySelectorAll('script').length") == 2


@pytest.mark.skipif(not importlib.util.find_spec("report"), reason="report.py is not there yet")
def test_two_runs_are_compared(page, served):
    for name in ("one", "two"):
        run = hostile_run(served.out, name)
        (run / "eval.json").unlink()
    page.go(served.url + "/#/")
    for name in ("one", "two"):
        page.click(f"[data-key='tick {name}']")
    picture(page, "runs")
    page.click("a.button[href^='#/compare']")
    page.until("document.querySelector('iframe.report')?.src.includes('run=one&run=two')")
    report = page.browser.open()
    report.size(1280, 860)
    report.go(f"{served.url}/compare?run=one&run=two")
    report.until("document.body.innerText.includes('loss')")
    assert HOSTILE in report.value("document.body.innerText")
    assert report.value(SAFE) and report.value("document.querySelector('img') === null")
    # in its sandbox it has no cookie, and reaches nothing of the page
    assert report.value("fetch('/api/runs').then(() => 'reached', () => 'refused')") == "refused"
    page.browser.events.clear()  # that was logged
    picture(report, "compare")

"""Takes the pictures of serve.page in evidence/page that show real runs, in headless Chromium.

    python dev/page_pictures.py /tmp/pictures evidence/page calc facts

/tmp/pictures/out has runs, such as those of `make demo`; the last two arguments are the runs that
are compared, the first of them is opened. The other pictures are taken by the test:

    NANOTOOL_PICTURES=evidence/page python -m pytest tests/test_page_browser.py
"""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser import Browser
from pages import Served


def main(folder: str, target: str, first: str, second: str) -> None:
    served = Served(Path(folder))
    pictures = Path(target)
    try:
        with Browser(Path(tempfile.mkdtemp())) as browser:
            page = browser.open()
            page.size(1280, 860)
            page.go(served.link)

            # 1. the list, and two of it compared
            for name in (first, second):
                page.click(f"[data-key='tick {name}']")
            page.until("document.querySelector('a.button').innerText === 'Compare 2'")
            page.picture(pictures / "runs.png")
            page.click("a.button[href^='#/compare']")
            drawn = "performance.getEntriesByType('resource').some(r => r.name.includes('/compare')"
            page.until(f"{drawn} && r.responseEnd > 0)")
            page.picture(pictures / "compare.png")

            # 2. a rollout in the dark
            page.dark()
            page.value(f"location.hash = toRun({json.dumps(first)})")
            page.until("document.querySelectorAll('.tokens .t').length > 3")
            page.value("document.querySelector('#rollouts').scrollIntoView()")
            page.picture(pictures / "rollout_dark.png")

            # 3. the list on a phone
            page.size(390, 844, is_phone=True)
            page.value("location.hash = '#/'")
            page.until("document.querySelectorAll('.runs tbody tr').length > 1")
            page.picture(pictures / "phone_dark.png")
            assert page.problems() == []
    finally:
        served.end()


if __name__ == "__main__":
    main(*sys.argv[1:])

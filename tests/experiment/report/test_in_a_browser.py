"""The report as Chromium shows it, where there is one."""

import html as escaping
import re
import shutil
import subprocess

import pytest
from matplotlib.figure import Figure
from report_page import content, hostile, rollouts
from runs import small_run

from dentropy.experiment.figures import FIGURES
from dentropy.experiment.report.page import html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_BROWSER = "no chromium, chromium-browser or google-chrome on the PATH"
pytestmark = pytest.mark.skipif(BROWSER is None, reason=NO_BROWSER)


@pytest.fixture(autouse=True)
def drawn():
    """Bars as they are: those of the other tests are blank."""


# Loads the report in a frame as wide as a phone and writes down how wide it became.
FRAME = """<!doctype html><body><iframe style="width:390px;height:800px;border:0" srcdoc="{page}"></iframe>
<script>onload = () => {{
  const root = document.querySelector("iframe").contentDocument.documentElement;
  document.body.textContent = `width ${{root.scrollWidth}} of ${{root.clientWidth}}`;
}}</script>"""


def in_chromium(text, folder):
    """(width of the page in a frame of 390 px, messages on the console)"""
    file = folder / "frame.html"
    file.write_text(FRAME.format(page=escaping.escape(text)), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}"]
    options += ["--hide-scrollbars", "--enable-logging=stderr", "--v=0", "--dump-dom", file.as_uri()]
    done = subprocess.run([BROWSER, *options], capture_output=True, text=True, timeout=60, check=True)
    width = re.search(r"width (\d+) of 390", done.stdout)
    assert width, done.stdout[-500:]
    return int(width[1]), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_chromium_shows_it_without_errors_requests_or_sideways_scrolling(tmp_path):
    run, shown = hostile(content(), rollouts())
    run["attribution"]["by_kind"][1]["name"] = "model.layers.self_attention." * 9
    shown[1] = shown[1] | {"prompt": "p" * 300, "tokens": [["t" * 300, 0.1], *shown[1]["tokens"]]}
    pictures = {name: draw(run, small_run().columns()) for name, draw in FIGURES.items()}
    assert in_chromium(html(run, shown, pictures=pictures), tmp_path) == (390, [])


@pytest.mark.parametrize(
    ("added", "width", "message"),
    [
        ("<script>alert(1)</script>", 390, "script"),
        ("<img src='https://example.org/a.png'>", 390, "example.org"),
        ("<p style='width:500px'>wide</p>", 516, None),
    ],
)
def test_chromium_would_notice(tmp_path, monkeypatch, added, width, message):
    monkeypatch.setattr("dentropy.experiment.report.tables.bars", lambda *_, **__: Figure(figsize=(1, 1)))
    text = html(content(), []).replace("</body>", f"{added}</body>")
    found, messages = in_chromium(text, tmp_path)
    assert found == width
    assert any(message in line for line in messages) if message else messages == []

"""The time until the first figures of a report are drawn, in a headless Chromium.

The page contains a part of plotly.js. The peer is the same page with the whole of it.
"""

from plotly.offline import get_plotlyjs
from selenium.webdriver.support.ui import WebDriverWait

import taskgroup as tg
from benchmarks.clocks import Measured
from benchmarks.record import Seconds
from benchmarks.test_many_tasks import groups_of, training_of
from taskgroup.lab.report.page import plotly_program
from tests.browser import chromium

BATCHES = 60
ROUNDS = 5
WHOLE = "the same page with the whole of plotly.js"
# Notes when all figures in the window are there.
PROBE = """<script>
const whenDrawn = () => {
  const shown = [...document.querySelectorAll(".plot")].filter(
      (plot) => plot.getBoundingClientRect().top < innerHeight);
  if (shown.length && shown.every((plot) => plot.querySelector(".main-svg"))) {
    window.drawn = performance.now();
  } else requestAnimationFrame(whenDrawn);
};
whenDrawn();
</script></body>"""


def seconds_to_draw(page):
    """Seconds from the start of a page until its first figures are drawn, in a new browser."""
    with chromium() as browser:
        browser.get("about:blank")
        browser.get(page.as_uri())
        WebDriverWait(browser, 60, 0.05).until(
            lambda _: browser.execute_script("return window.drawn")
        )
        return browser.execute_script("return window.drawn") / 1e3


def test_opening(record, device, tmp_path):
    training, labels = training_of(11, device)
    groups = groups_of([*labels])
    with tg.Recorder(groups, tmp_path / "run") as recorder:
        for _ in range(BATCHES):
            training.batch(groups)
        recorder.report(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8").replace("</body>", PROBE)
    part = plotly_program()
    assert part in text
    pages = {"ours": text, WHOLE: text.replace(part, get_plotlyjs())}
    rounds = {name: [] for name in pages}
    for _ in range(ROUNDS):
        for name, page in pages.items():
            path = tmp_path / "shown.html"
            path.write_text(page, "utf-8")
            rounds[name].append(Measured(seconds_to_draw(path)))
    ours, whole = (Seconds.of(rounds[name]) for name in pages)
    record.add("report opened", 11, ours, {WHOLE: whole}, goals={WHOLE: 2})
    sizes = [len(page.encode()) / 1e6 for page in pages.values()]
    record.remark(f"the pages have {sizes[0]:.1f} MB and {sizes[1]:.1f} MB")

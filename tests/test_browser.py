"""What a person sees in a real browser: the dashboard of a served study, and its report, from disk and offline."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
from expect import parametrize
from playwright.sync_api import Browser, Page, expect, sync_playwright
from test_serving import Dashboard, served
from tinystudy import HANGS, CommandLine, run, wait_until

pytestmark = pytest.mark.slow
LOCAL = ("file:", "data:", "blob:")
expect.set_options(timeout=1000 * HANGS)
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """CI has one; elsewhere a test that cannot run is skipped."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None and "CI" not in os.environ:
        pytest.skip("needs Chromium: apt-get install chromium")
    assert found, "no Chromium here"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, dashboard: Dashboard) -> Iterator[Page]:
    """A page of a screen's size; the test fails if anything is written to the console as an error."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(1000 * HANGS)
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()
    assert not errors


@pytest.fixture
def dashboard(done: Path) -> Iterator[Dashboard]:
    with served(done / "tiny.db") as dashboard:
        yield dashboard


def address(dashboard: Dashboard, path: str = "") -> str:
    return f"http://127.0.0.1:{dashboard.port}/dashboard/studies/{dashboard.studies()['tiny']}{path}"


def traces(page: Page, title: str) -> int:
    """Number of SVG traces in the figure of that title."""
    plot = page.locator(".js-plotly-plot", has_text=title)
    expect(plot).to_be_visible()
    return plot.locator("g.trace").count()


def test_an_open_page_follows_the_study(page: Page, dashboard: Dashboard, done: Path) -> None:
    """Nobody reloads it: the note and the figures change when the study has gone on."""
    page.goto(address(dashboard, "/note"))
    expect(page.get_by_text("6 of 6 trials are done.")).to_be_visible()
    run(done, "search.trials=8")
    expect(page.get_by_text("8 of 8 trials are done.")).to_be_visible()


def test_each_figure_is_drawn(page: Page, dashboard: Dashboard) -> None:
    figures = [json.loads(figure["graph_object"]) for figure in dashboard.study("tiny")["plotly_graph_objects"]]
    assert len(figures) == 4
    page.goto(address(dashboard))
    for figure in figures:
        drawn = [trace for trace in figure["data"] if trace.get("visible", True) is True]
        assert traces(page, figure["layout"]["title"]["text"]) >= len(drawn) > 0


def test_the_table_of_trials_has_columns_for_people(page: Page, dashboard: Dashboard) -> None:
    page.goto(address(dashboard, "/smartSelection"))
    header = page.locator("thead th", has_text="UserAttribute")
    expect(header).to_have_count(8)
    own = [words.splitlines()[0].removeprefix("UserAttribute ") for words in header.all_inner_texts()]
    assert own == ["± stderr", "zeros %", "packed MB", "time (s)", "peak GB", "device", "dtype", "host"]


def test_the_artifacts_download(page: Page, dashboard: Dashboard, done: Path) -> None:
    wait_until(lambda: len(dashboard.study("tiny")["artifacts"]) == 2)
    page.goto(address(dashboard))
    link = page.locator('a[download="best.json"]')
    expect(link).to_be_visible()
    with page.expect_download() as download:
        link.click()
    file = download.value.path()
    assert download.value.suggested_filename == "best.json"
    assert json.loads(file.read_text())["trial"] == json.loads((done / "tiny.best.json").read_text())["trial"]


@parametrize("width", [400, 1400])
@parametrize("scheme", ["light", "dark"])
def test_the_report_needs_no_network(
    browser: Browser, done: Path, command: CommandLine, width: int, scheme: Literal["light", "dark"]
) -> None:
    command.ok("report", "--study", done / "tiny.toml")
    with opened(browser, done / "tiny.report.html", width, scheme) as page:
        plots = page.locator(".js-plotly-plot")
        expect(plots).to_have_count(5)  # the four figures, and the history
        assert all(plot.locator("g.trace, g.bars path").count() > 0 for plot in plots.all())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert all((box := plot.bounding_box()) and box["x"] + box["width"] <= width for plot in plots.all())
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        shades = [int(number) for number in re.findall(r"\d+", background)[:3]]
        assert (sum(shades) > 600) == (scheme == "light"), background
        tick = page.locator(".xtick text").first
        ink = [int(number) for number in re.findall(r"\d+", tick.evaluate("e => getComputedStyle(e).fill"))[:3]]
        assert abs(sum(ink) - sum(shades)) > 150, (ink, shades)


@contextmanager
def opened(browser: Browser, file: Path, width: int, scheme: Literal["light", "dark"]) -> Iterator[Page]:
    """A report from disk with the network cut; whatever it asks the network for, or complains of, is an error."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    context.set_default_timeout(1000 * HANGS)
    page, errors = context.new_page(), list[str]()
    page.on("request", lambda request: errors.append(request.url) if not request.url.startswith(LOCAL) else None)
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(file.as_uri())
    yield page
    context.close()
    assert not errors

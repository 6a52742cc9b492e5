"""The site of docs/, built and looked at: with no network, on a phone and on a screen."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from time import monotonic

import pytest
from pages import REPO
from playwright.sync_api import Browser, expect
from test_browser import browser  # noqa: F401
from tinystudy import HANGS

pytestmark = pytest.mark.slow
PHONE, SCREEN = {"width": 400, "height": 800}, {"width": 1400, "height": 1000}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as a person builds it; on a machine without mkdocs the tests are skipped, but not in CI."""
    if importlib.util.find_spec("mkdocs") is None and "CI" not in os.environ:
        pytest.skip("needs mkdocs: pip install -e '.[docs]'")
    place = tmp_path_factory.mktemp("site")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    words, variables = [REPO / "scripts/site", place], {**os.environ, "PATH": path}
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return place


class Quiet(SimpleHTTPRequestHandler):
    """A server of files that says nothing."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_every_page_fits_a_phone_and_asks_no_other_host(site: Path, address: str, browser: Browser) -> None:  # noqa: F811
    page = browser.new_page(viewport=PHONE)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on(
        "request", lambda request: None if request.url.startswith((address, "data:")) else wrong.append(request.url)
    )
    found = sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))
    assert {"index.html", "reference/settings.html", "reference/commands.html", "reference/python.html"} <= set(found)
    for name in found:
        page.goto(address + name)
        if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
            wrong.append(f"{name} is wider than a phone")
        if page.evaluate("[...document.images].some(image => image.getBoundingClientRect().right > innerWidth)"):
            wrong.append(f"{name} has a picture that is cut off")
    page.goto(address + "index.html")
    first, second = (panel.bounding_box() for panel in page.locator(".panels img").all()[:2])
    assert first and second and second["y"] >= first["y"] + first["height"]
    page.close()
    assert wrong == []


def test_the_search_finds_a_key(address: str, browser: Browser) -> None:  # noqa: F811
    page = browser.new_page(viewport=SCREEN)
    page.goto(address + "index.html")
    page.set_default_timeout(1000 * HANGS)  # the index of all words is made in the browser
    field, link = page.get_by_label("Search").first, page.locator("a", has_text="texts.validation.nsamples").first
    began = monotonic()
    while not link.is_visible() and monotonic() - began < HANGS:  # what is typed before the page listens is lost
        field.fill("nsamples")
        field.press("End")
        page.wait_for_timeout(500)
    link.click()
    expect(page).to_have_url(
        f"{address}reference/settings.html?h=nsamples#texts.validation.nsamples", timeout=1000 * HANGS
    )
    page.close()

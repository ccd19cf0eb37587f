"""The built book as its readers get it: every page in a browser that reaches nothing but the book."""

import functools
import http.server
import re
import shutil
import threading
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_build" / "html"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [TOC["root"], *(entry["file"] for part in TOC["parts"] for entry in part["chapters"])]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
FAULTS = r"""() => ({
  "wider than the window": document.documentElement.scrollWidth > innerWidth + 1,
  "images without alternative text": [...document.querySelectorAll("main img")].filter(i => !i.alt.trim()).length,
  "figures hardly described":
      [...document.querySelectorAll("main .cell_output img")].filter(i => i.alt.length < 100).length,
  "broken images": [...document.querySelectorAll("main img")].filter(i => i.complete && !i.naturalWidth).length,
  "distorted images": [...document.querySelectorAll("main img")].filter(i => i.naturalWidth && i.height &&
      Math.abs(i.width / i.height / (i.naturalWidth / i.naturalHeight) - 1) > 0.02).length,
  "formulas left as text":
      [...document.querySelectorAll("main .math")].filter(m => !m.querySelector("mjx-container")).length,
  "directives left as text": /(^|\n)\s*(```\{|:::)/.test(document.querySelector("main").innerText),
  "explorables that did not start": document.querySelectorAll("main [data-explorable]:not([data-ready])").length,
  "cells with errors": document.querySelectorAll("main .stderr, main .traceback").length,
})"""
CAPTIONS = r"""() => [...document.querySelectorAll("main .cell_output img")].map(image => {
  const next = image.closest("div.cell").nextElementSibling;
  return next && next.matches("p") && next.querySelector("em") ? next.innerText : "";
})"""

pytestmark = [
    pytest.mark.skipif(not SITE.exists(), reason="the book is not built: run `make book`"),
    pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium: install Debian's package `chromium`"),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    """The built book, served on this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        yield browser
        browser.close()


def open_page(browser, url, base, width, theme):
    """The page, ready, and a list that collects script errors and requests that leave the book."""
    page, notes = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme), []

    def near_only(route):
        near = route.request.url.startswith((base, "data:", "blob:"))
        if not near:
            notes.append("far: " + route.request.url)
        route.continue_() if near else route.abort()

    page.route("**/*", near_only)
    page.on("console", lambda message: notes.append("console: " + message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: notes.append(f"script: {error}"))
    page.goto(url)
    page.wait_for_function("!document.querySelector('main .math') || document.querySelector('main mjx-container')")
    page.evaluate("document.querySelectorAll('main img').forEach(image => image.scrollIntoView())")
    page.wait_for_function("[...document.querySelectorAll('main img')].every(image => image.complete)")
    return page, notes


@pytest.mark.parametrize(("width", "theme"), [(360, "light"), (1440, "dark")])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_without_faults_and_without_the_network(browser, address, name, width, theme):
    page, notes = open_page(browser, f"{address}{name}.html", address, width, theme)
    faults = {what: found for what, found in page.evaluate(FAULTS).items() if found}
    page.close()
    assert not faults
    assert not notes


@pytest.mark.parametrize("name", PAGES)
def test_every_figure_is_followed_by_its_caption(browser, address, name):
    page, _ = open_page(browser, f"{address}{name}.html", address, 1440, "light")
    captions = page.evaluate(CAPTIONS)
    page.close()
    assert all(re.match(r"Figure (\d\.)?\d\. ", caption) for caption in captions), captions
    numbers = [caption.split()[1] for caption in captions]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("name", [page for page in PAGES if re.search(r"/\d\d-", page)])
def test_a_chapter_leads_to_its_notebook_on_colab(name):
    html = (SITE / f"{name}.html").read_text()
    assert re.search(rf'href="https://colab\.research\.google\.com/github/[^"]+/{name}\.ipynb"', html)
    assert (ROOT / f"{name}.ipynb").exists()

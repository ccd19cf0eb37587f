"""What every test shares: one hypothesis profile, a quiet bitsandbytes, and a browser to read the built book in."""

import logging
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_build" / "html"
sys.path[:0] = [str(ROOT / "book"), str(ROOT / "labs")]

from browser import chromium, serving  # noqa: E402

hypothesis.settings.register_profile("nf4lab", deadline=None, derandomize=True)
hypothesis.settings.load_profile("nf4lab")
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it asks for an optional kernel package


@pytest.fixture
def bitsandbytes():
    """The library's functional module, with its torch.compile fall-backs run plainly: they compile for a minute."""
    torch_dynamo = pytest.importorskip("torch._dynamo")
    functional = pytest.importorskip("bitsandbytes.functional")
    with torch_dynamo.config.patch(disable=True):
        yield functional


@pytest.fixture
def signals_of_a_terminal():
    """SIGINT, SIGTERM and SIGHUP as a terminal hands them down; to what runs in the background some are ignored."""
    handlers = (signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL)
    defaults = zip((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), handlers, strict=True)
    before = {number: signal.signal(number, handler) for number, handler in defaults}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def address():
    """The built book, served on this machine."""
    if not SITE.exists():
        pytest.skip("the book is not built: run `make book`")
    with serving(SITE) as address:
        yield address


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium without a window."""
    if not shutil.which("chromium"):
        pytest.skip("no Chromium: install Debian's package `chromium`")
    pytest.importorskip("playwright.sync_api")
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser, address):
    """`opening` for one test."""
    with opening(browser, address) as open_one:
        yield open_one


@contextmanager
def opening(browser, address):
    """A function from (name, width, theme) to the page, ready, and a list of what went wrong.

    That is: script errors, what is missing, and requests that leave the book, all of which are refused. Folds are
    open, so that what they hide is looked at too.
    """
    pages = []

    def open_one(name, width=1440, theme="light"):
        view = {"viewport": {"width": width, "height": 900}, "color_scheme": theme, "reduced_motion": "reduce"}
        page, notes = browser.new_page(**view), []
        pages.append(page)

        def near_only(route):
            near = route.request.url.startswith((address, "data:", "blob:"))
            if not near:
                notes.append("far: " + route.request.url)
            route.continue_() if near else route.abort()

        page.route("**/*", near_only)
        page.on("console", lambda event: notes.append("console: " + event.text) if event.type == "error" else None)
        page.on("pageerror", lambda error: notes.append(f"script: {error}"))
        page.on("response", lambda answer: notes.append(f"{answer.status}: {answer.url}") if not answer.ok else None)
        page.goto(address + name)
        page.wait_for_function("!document.querySelector('main .math') || document.querySelector('main mjx-container')")
        page.evaluate("document.querySelectorAll('main details').forEach(fold => fold.open = true)")
        page.evaluate("document.querySelectorAll('main img').forEach(image => image.scrollIntoView())")
        page.wait_for_function("[...document.querySelectorAll('main img')].every(image => image.complete)")
        page.evaluate("document.fonts.ready.then(() => true)")
        return page, notes

    yield open_one
    for page in pages:
        page.close()

"""The built book in a browser: a folder served on this machine, and a Chromium without a window to read it with."""

import functools
import http.server
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# No sandbox, since containers have none to give; and nothing that asks for addresses outside of what is read.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE_MS = 600_000  # for each step: a machine with other work is slow, not wrong


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *args):
        pass


@contextmanager
def serving(folder: Path | None = None, handler=Quiet) -> Iterator[str]:
    """The address, ending in a slash, at which a folder's files, or whatever a handler answers, can be had."""
    handler = handler if folder is None else functools.partial(handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


@contextmanager
def chromium() -> Iterator:
    """Debian's Chromium, under Playwright; its pages and contexts are patient."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS, timeout=PATIENCE_MS)
        browser.new_page, browser.new_context = patient(browser.new_page), patient(browser.new_context)
        try:
            yield browser
        finally:
            browser.close()


def patient(new: Callable) -> Callable:
    """The same maker of pages or contexts, with PATIENCE_MS for each step."""

    def made(**view):
        page = new(**view)
        page.set_default_timeout(PATIENCE_MS)
        return page

    return made

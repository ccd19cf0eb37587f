"""Everybody reads the book: what axe-core, which test_book.py asks about every page, can't see."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_build" / "html"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [f"{file}.html" for file in [TOC["root"], *(e["file"] for part in TOC["parts"] for e in part["chapters"])]]

pytestmark = pytest.mark.skipif(not SITE.exists(), reason="the book is not built: run `make book`")


def test_the_first_key_leads_past_the_navigation(browser, address):
    page = browser.new_page()
    page.goto(address + PAGES[1])
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to main content"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#main-content"
    page.close()


@pytest.mark.parametrize("name", [next(page for page in PAGES if "/01-" in page), "search.html"])
def test_every_icon_of_a_page_is_in_the_small_font(open_page, name):
    tt_font = pytest.importorskip("fontTools.ttLib").TTFont
    fonts = (SITE / "_static" / "vendor" / "fontawesome" / "webfonts").glob("*.ttf")
    glyphs = set().union(*(tt_font(font).getBestCmap() or {} for font in fonts))  # a font may have lost all
    page, _ = open_page(name)
    drawn = "i => [i.className, getComputedStyle(i, '::before').content]"
    icons = page.evaluate(f"[...document.querySelectorAll('i[class*=fa-]')].map({drawn})")
    assert len(icons) > 5
    assert not [(name, text) for name, text in icons if len(text) != 3 or ord(text[1]) not in glyphs]


def test_motion_stops_for_those_who_ask(browser, address):
    page = browser.new_page(reduced_motion="reduce")
    page.goto(address + PAGES[0])
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    page.close()

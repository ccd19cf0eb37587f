"""Everybody reads the book: WCAG 2.2 AA by axe-core on every page, in both themes, and what axe-core cannot see."""

import itertools
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_build" / "html"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [f"{file}.html" for file in [TOC["root"], *(e["file"] for part in TOC["parts"] for e in part["chapters"])]]
# The pages that the build adds: the index, the search, the package's source. index.html only leads to the first page.
ADDED = sorted({str(path.relative_to(SITE)) for path in SITE.rglob("*.html") if "_static" not in path.parts})
ADDED = [name for name in ADDED if name not in {*PAGES, "index.html"}]
RULES = {
    "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
    "rules": {"label-content-name-mismatch": {"enabled": True}},  # WCAG 2.5.3, which axe-core calls experimental
    "resultTypes": ["violations"],
}

pytestmark = pytest.mark.skipif(not SITE.exists(), reason="the book is not built: run `make book`")


def violations(page):
    """What axe-core finds: a line for each element, with the rule and what to do."""
    page.evaluate(pytest.importorskip("axe_playwright_python.base").AXE_SCRIPT)
    found = page.evaluate("rules => axe.run(document, rules)", RULES)["violations"]
    return [
        f"{rule['id']}: {node['target']} {' '.join(node['failureSummary'].split())}"
        for rule in found
        for node in rule["nodes"]
    ]


@pytest.mark.parametrize(("width", "theme"), [(1440, "light"), (360, "dark")])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing_on_a_page_in_either_theme(open_page, name, width, theme):
    page, _ = open_page(name, width, theme)
    assert not violations(page)


@pytest.mark.parametrize("name", ADDED)
def test_axe_finds_nothing_on_the_pages_that_the_build_adds(open_page, name):
    page, _ = open_page(name)
    assert not violations(page)


def test_axe_is_asked_about_what_it_can_find(open_page):
    page, _ = open_page(PAGES[0])
    page.evaluate("document.querySelector('main').insertAdjacentHTML('beforeend', '<p style=\"color:#999\">faint</p>')")
    assert any("color-contrast" in line for line in violations(page))


def test_the_first_key_leads_past_the_navigation(browser, address):
    page = browser.new_page()
    page.goto(address + PAGES[1])
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to main content"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#main-content"
    page.close()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_one_title_and_no_heading_is_left_out(open_page, name):
    page, _ = open_page(name)
    levels = page.evaluate("[...document.querySelectorAll('article :is(h1,h2,h3,h4,h5,h6)')].map(h => +h.tagName[1])")
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels)), levels


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

"""The built book as its readers get it: every page in a browser that reaches nothing but the book.

Everybody reads it: WCAG 2.2 AA by axe-core on every page, in both themes; what axe-core can't see is in test_access.py.
A page is opened once in each of two ways, and every test of a page looks at it there.
"""

import itertools
import re
from pathlib import Path

import pytest
import yaml
from conftest import opening

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_build" / "html"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [f"{file}.html" for file in [TOC["root"], *(e["file"] for part in TOC["parts"] for e in part["chapters"])]]
# The pages that the build adds: the index, the search, the package's source. index.html only leads to the first page.
ADDED = {str(path.relative_to(SITE)) for path in SITE.rglob("*.html") if "_static" not in path.parts}
ADDED = sorted(ADDED - {*PAGES, "index.html"})
WIDE, NARROW = ([(name, *how) for name in [*PAGES, *ADDED]] for how in ((1440, "light"), (360, "dark")))
VIEWS = WIDE + NARROW  # a test takes the first of them, so that pytest runs all tests of a view one after the other
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
  "fonts that did not load": [...document.fonts].filter(font => font.status === "error").map(font => font.family),
  "cells with errors": document.querySelectorAll("main .stderr, main .traceback").length,
})"""
CAPTIONS = r"""() => [...document.querySelectorAll("main .cell_output img")].map(image => {
  const next = image.closest("div.cell").nextElementSibling;
  return next && next.matches("p") && next.querySelector("em") ? next.innerText : "";
})"""
# Code and lists of names have thousands of words, and axe-core takes seconds to find the contrast of them all. Of those
# that look alike, letters and all that is behind them, the first stays in sight for it.
ALIKE = r"""() => {
  const seen = new Set();
  for (const word of document.querySelectorAll("main :is(span, a)")) {
    if (word.children.length) continue;
    const looks = [];
    for (let around = word; around; around = around.parentElement) {
      const style = getComputedStyle(around);
      looks.push(style.backgroundColor, style.backgroundImage, style.opacity);
      if (around === word) looks.push(style.color, style.fontSize, style.fontWeight, style.textShadow);
    }
    const key = looks.join("; ");
    word.style.visibility = seen.has(key) ? "hidden" : "visible";
    seen.add(key);
  }
}"""
RULES = {
    "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
    # WCAG 2.5.3, which axe-core calls experimental; contrast is asked for by itself
    "rules": {"label-content-name-mismatch": {"enabled": True}, "color-contrast": {"enabled": False}},
    "resultTypes": ["violations"],
}
CONTRAST = {"runOnly": ["color-contrast"], "resultTypes": ["violations"]}

pytestmark = pytest.mark.skipif(not SITE.exists(), reason="the book is not built: run `make book`")


@pytest.fixture(scope="module")
def view(request, browser, address):
    """A page as one of its readers sees it, and what went wrong when it was opened."""
    with opening(browser, address) as open_one:
        yield open_one(*request.param)


def of_views(views):
    return pytest.mark.parametrize("view", views, indirect=True, ids=["-".join(map(str, one)) for one in views])


@of_views(VIEWS)
def test_a_page_shows_without_faults_and_without_the_network(view):
    page, notes = view
    faults = {what: found for what, found in page.evaluate(FAULTS).items() if found not in (0, False, [])}
    assert not faults
    assert not notes


def violations(page):
    """What axe-core finds: a line for each element, with the rule and what to do."""
    page.evaluate(pytest.importorskip("axe_playwright_python.base").AXE_SCRIPT)
    run = "async rules => (await axe.run(document, rules)).violations"
    found = page.evaluate(run, RULES)
    page.evaluate(ALIKE)
    found += page.evaluate(run, CONTRAST)
    return [
        f"{rule['id']}: {node['target']} {' '.join(node['failureSummary'].split())}"
        for rule in found
        for node in rule["nodes"]
    ]


@of_views(VIEWS[: len(WIDE) + len(PAGES)])
def test_axe_finds_nothing_on_any_page_nor_on_a_chapter_in_the_other_theme(view):
    page, _ = view
    assert not violations(page)


@of_views(VIEWS[: len(PAGES)])
def test_a_page_has_one_title_and_no_heading_is_left_out(view):
    page, _ = view
    levels = page.evaluate("[...document.querySelectorAll('article :is(h1,h2,h3,h4,h5,h6)')].map(h => +h.tagName[1])")
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels)), levels


@of_views(VIEWS[: len(PAGES)])
def test_every_figure_is_followed_by_its_caption(view):
    page, _ = view
    captions = page.evaluate(CAPTIONS)
    assert all(re.match(r"Figure (\d+\.)?\d\. ", caption) for caption in captions), captions
    numbers = [caption.split()[1] for caption in captions]
    assert numbers == sorted(set(numbers))


def test_the_search_finds_the_chapter_on_a_word(open_page):
    page, notes = open_page(PAGES[1])
    page.keyboard.press("Control+k")
    page.keyboard.type("quantile")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results li a")
    page.wait_for_selector("#search-results p.context")
    found = page.inner_text("#search-results")
    assert "Levels from quantiles" in found
    assert "Contents" not in found  # it quotes the text, not the list beside it
    assert not notes


def test_what_goes_on_beyond_its_box_fades_until_it_is_scrolled_to_its_end(open_page):
    page, _ = open_page(PAGES[4], 360)
    page.wait_for_selector("pre.goes-on")
    wide = "[...document.querySelectorAll('main pre')].filter(e => e.scrollWidth > e.clientWidth + 1)"
    assert page.evaluate(f"{wide}.length === document.querySelectorAll('pre.goes-on').length")
    page.evaluate("document.querySelector('pre.goes-on').setAttribute('id', 'first')")
    page.evaluate("document.getElementById('first').scrollLeft = 10_000")
    page.wait_for_selector("#first:not(.goes-on)")


def test_a_table_that_a_cell_returns_fades_where_it_goes_on(open_page):
    page, _ = open_page("book/11-the-league.html", 360)
    page.wait_for_selector(".output.goes-on table")
    wide = "[...document.querySelectorAll('main .output:has(> table)')].filter(e => e.scrollWidth > e.clientWidth + 1)"
    assert page.evaluate(f"{wide}.every(e => e.classList.contains('goes-on') && e.tabIndex === 0)")


def test_42_characters_of_an_output_fit_a_phone(open_page):
    page, _ = open_page(PAGES[4], 360)
    beyond = """length => {
      const output = document.querySelector("main .cell_output pre");
      output.textContent = "0".repeat(length);
      return output.scrollWidth - output.clientWidth;
    }"""
    assert page.evaluate(beyond, 42) <= 0 < page.evaluate(beyond, 46)


def test_the_list_of_pages_fits_a_window_of_900_pixels(open_page):
    page, _ = open_page(PAGES[4])
    assert page.evaluate("document.querySelector('.bd-sidebar-primary').scrollHeight") <= 900


def test_axe_is_asked_about_what_it_can_find_and_about_one_word_of_those_that_look_alike(open_page):
    page, _ = open_page(PAGES[2])
    page.evaluate("document.querySelector('main').insertAdjacentHTML('beforeend', '<p style=\"color:#999\">faint</p>')")
    page.add_style_tag(content=".highlight pre .mf { color: #aaa !important }")  # numbers
    found = [line for line in violations(page) if line.startswith("color-contrast")]
    faint, numbers = (sum(colour in line for line in found) for colour in ("#999999", "#aaaaaa"))
    assert faint == 1 <= numbers == len(found) - 1 < page.locator(".highlight .mf").count() / 4

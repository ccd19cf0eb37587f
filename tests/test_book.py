"""The built book as its readers get it: every page in a browser that reaches nothing but the book."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_build" / "html"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [TOC["root"], *(entry["file"] for part in TOC["parts"] for entry in part["chapters"])]
# The pages that the build adds: the index, the search, the package's source. index.html only leads to the first page.
ADDED = {str(path.relative_to(SITE).with_suffix("")) for path in SITE.rglob("*.html") if "_static" not in path.parts}
ADDED = sorted(ADDED - {*PAGES, "index"})
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

pytestmark = pytest.mark.skipif(not SITE.exists(), reason="the book is not built: run `make book`")


@pytest.mark.parametrize(("width", "theme"), [(360, "light"), (1440, "dark")])
@pytest.mark.parametrize("name", [*PAGES, *ADDED])
def test_a_page_shows_without_faults_and_without_the_network(open_page, name, width, theme):
    page, notes = open_page(f"{name}.html", width, theme)
    faults = {what: found for what, found in page.evaluate(FAULTS).items() if found not in (0, False, [])}
    assert not faults
    assert not notes


def test_the_search_finds_the_chapter_on_a_word(open_page):
    page, notes = open_page(f"{PAGES[1]}.html")
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
    page, _ = open_page(f"{PAGES[4]}.html", 360)
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
    page, _ = open_page(f"{PAGES[4]}.html", 360)
    beyond = """length => {
      const output = document.querySelector("main .cell_output pre");
      output.textContent = "0".repeat(length);
      return output.scrollWidth - output.clientWidth;
    }"""
    assert page.evaluate(beyond, 42) <= 0 < page.evaluate(beyond, 46)


def test_the_list_of_pages_fits_a_window_of_900_pixels(open_page):
    page, _ = open_page(f"{PAGES[4]}.html")
    assert page.evaluate("document.querySelector('.bd-sidebar-primary').scrollHeight") <= 900


@pytest.mark.parametrize("name", PAGES)
def test_every_figure_is_followed_by_its_caption(open_page, name):
    page, _ = open_page(f"{name}.html")
    captions = page.evaluate(CAPTIONS)
    assert all(re.match(r"Figure (\d+\.)?\d\. ", caption) for caption in captions), captions
    numbers = [caption.split()[1] for caption in captions]
    assert numbers == sorted(set(numbers))

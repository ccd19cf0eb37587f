"""The book as one PDF: the pages in order, links that stay inside, and contents that name the right pages."""

import contextlib
import importlib.util
import os
import re
import time
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("make_pdf", ROOT / "book" / "make_pdf.py")
make_pdf = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_pdf)

built = pytest.mark.skipif(not make_pdf.SITE.exists(), reason="the book is not built: run `make book`")


class Contents:
    """A page in a browser, as far as its contents go: what they name each time that it is printed."""

    def __init__(self):
        self.named, self.printed = None, []

    def evaluate(self, script, numbers):
        assert script == make_pdf.NUMBER_CONTENTS
        self.named = numbers

    def pdf(self, **paper):
        self.printed.append(self.named)
        return b""


FOUND = {"a": 5, "b": 9, "b--anchor": 11}


@pytest.mark.parametrize(
    ("at_first", "prints"),
    [({"a": 5, "b": 9}, [{"a": 5, "b": 9}]), ({"a": 5, "b": 8}, [{"a": 5, "b": 8}, FOUND]), ({}, [{}, FOUND])],
)
def test_it_is_printed_again_only_where_the_contents_name_other_pages(monkeypatch, at_first, prints):
    page = Contents()
    monkeypatch.setattr(make_pdf, "chromium", contextlib.nullcontext)
    monkeypatch.setattr(make_pdf, "document", str)
    monkeypatch.setattr(make_pdf, "opened", lambda browser, address, text: page)
    monkeypatch.setattr(make_pdf, "pages", lambda: ["a", "b"])
    monkeypatch.setattr(make_pdf, "page_numbers", lambda pdf: FOUND)
    make_pdf.print_pdf(at_first)
    assert page.printed == prints


def test_the_contents_forget_the_numbers_that_they_had(browser):
    page = browser.new_page()
    page.set_content("<nav><ul><li><a href='#a'><span>A</span><span></span></a></li></ul></nav>")
    for numbers, named in [({"a": 5}, "A5"), ({"a": 7, "b": 8}, "A7"), ({}, "A")]:
        page.evaluate(make_pdf.NUMBER_CONTENTS, numbers)
        assert page.inner_text("nav").replace("\n", "") == named
    page.close()


def test_it_is_printed_where_a_page_or_its_style_is_newer(tmp_path, monkeypatch):
    monkeypatch.setattr(make_pdf, "pages", lambda: ["a"])
    for name, path in {"SITE": tmp_path, "PDF": tmp_path / "book.pdf", "PRINT_STYLE": tmp_path / "print.css"}.items():
        monkeypatch.setattr(make_pdf, name, path)
    (tmp_path / "a.html").touch()
    make_pdf.PRINT_STYLE.touch()
    assert not make_pdf.up_to_date()  # there is none
    make_pdf.PDF.touch()
    now = time.time() + 1
    os.utime(make_pdf.PDF, (now, now))
    assert make_pdf.up_to_date()
    for path in (tmp_path / "a.html", make_pdf.PRINT_STYLE):
        os.utime(path, (now + 1, now + 1))
        assert not make_pdf.up_to_date()
        os.utime(path, (0, 0))


@pytest.fixture(scope="module")
def soup():
    """All pages in one document."""
    return BeautifulSoup(make_pdf.document(), "lxml")


@built
def test_the_document_has_every_page_in_reading_order_and_its_links_lead_inside(soup):
    pages = [page for _, chapters in make_pdf.contents() for page in chapters]
    assert [section["id"] for section in soup.main.find_all("section", recursive=False)] == list(
        map(make_pdf.place, pages)
    )
    ids = [tag["id"] for tag in soup.find_all(id=True)]
    assert len(ids) == len(set(ids))
    links = [link["href"] for link in soup.find_all("a", href=True)]
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert not [link for link in links if not link.startswith(("#", "https://"))]  # nothing that is not on paper
    assert all((make_pdf.SITE / image["src"]).exists() for image in soup.find_all("img"))


@built
def test_tags_that_are_left_out_have_the_colour_of_the_text_around_them():
    style = (make_pdf.SITE / "_static" / "pygments.css").read_text()
    colour = dict(re.findall(r'\[data-theme="light"\] \.highlight *(?:\.(\w+) )?\{[^}]*?(?<!-)(color: #\w+)', style))
    names = re.search(r"\(\?:(.+?)\)", make_pdf.UNCOLOURED.pattern)[1].split("|")
    assert {colour[name] for name in names} == {colour[""]}
    assert colour["k"] != colour[""]


@pytest.fixture(scope="module")
def reader():
    if not make_pdf.PDF.exists():
        pytest.skip("no PDF: run `make pdf`, which needs a Chromium")
    return make_pdf.PdfReader(make_pdf.PDF)


def test_the_pdf_has_an_outline_and_tags_for_screen_readers(reader):
    titles = [entry.title for entry in reader.outline if not isinstance(entry, list)]
    assert any(re.search(r"\b1\. Sixteen numbers", title) for title in titles)
    assert "/StructTreeRoot" in reader.trailer["/Root"]


def test_every_line_of_the_contents_has_its_page_number(reader):
    numbers = make_pdf.page_numbers(make_pdf.PDF.read_bytes())
    chapters = [page for _, part in make_pdf.contents()[1:] for page in part]
    found = [numbers[make_pdf.place(page)] for page in chapters]
    assert found == sorted(set(found))
    assert found[0] > 3  # after the title, the contents and the landing page
    for page, number in zip(chapters, found, strict=True):
        title = make_pdf.article(page, set()).find(".//h1").text_content()
        assert squeezed(title) in squeezed(reader.pages[number - 1].extract_text())


def test_no_line_of_code_or_output_is_cut_off_on_paper(reader, soup):
    paper = squeezed("".join(re.sub(r"\s*\d+\s*$", "", page.extract_text()) for page in reader.pages))
    lines = [line for block in soup.find_all("pre") for line in block.get_text().splitlines()]
    assert len(lines) > 2000
    assert not [line for line in lines if squeezed(line) not in paper]


def squeezed(text):
    """The text without its spaces and line breaks: where a PDF has them says nothing."""
    return re.sub(r"\s", "", text)

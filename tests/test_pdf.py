"""The book as one PDF: the pages in order, links that stay inside, and contents that name the right pages."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("make_pdf", ROOT / "book" / "make_pdf.py")
make_pdf = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_pdf)

built = pytest.mark.skipif(not make_pdf.SITE.exists(), reason="the book is not built: run `make book`")


@built
def test_the_document_has_every_page_in_reading_order_and_its_links_lead_inside():
    soup = make_pdf.BeautifulSoup(make_pdf.document({}), "html.parser")
    pages = [page for _, chapters in make_pdf.contents() for page in chapters]
    assert [section["id"] for section in soup.main.find_all("section", recursive=False)] == list(
        map(make_pdf.place, pages)
    )
    ids = [tag["id"] for tag in soup.find_all(id=True)]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in soup.find_all("a", href=re.compile("^#."))} <= set(ids)
    assert all((make_pdf.SITE / image["src"]).exists() for image in soup.find_all("img"))


def test_page_numbers_are_read_as_chromium_writes_them():
    pdf = (
        b"1 0 obj\n<</Type /Page\n>>\nendobj\n5 0 obj\n<</Type /Page\n>>\nendobj\n"
        b"7 0 obj\n<</Type /Pages\n/Count 2\n/Kids [1 0 R 5 0 R]>>\n8 0 obj\n"
        b"<</a-b [5 0 R /XYZ 0 1 0]\n/c [1 0 R /XYZ 0 9 0]>>"
    )
    assert make_pdf.page_numbers(pdf) == {"a-b": 2, "c": 1}


@pytest.mark.skipif(not make_pdf.PDF.exists(), reason="no PDF: run `make pdf`, which needs a Chromium")
def test_the_pdf_has_its_outline_its_tags_and_a_page_number_for_every_line_of_the_contents():
    pdf = make_pdf.PDF.read_bytes()
    assert b"/Outlines" in pdf
    assert b"/StructTreeRoot" in pdf
    numbers = make_pdf.page_numbers(pdf)
    pages = [make_pdf.place(page) for _, chapters in make_pdf.contents()[1:] for page in chapters]
    found = [numbers[page] for page in pages]
    assert found == sorted(set(found))
    assert found[0] > 3  # after the title, the contents and the landing page

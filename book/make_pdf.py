"""Print the built book as one PDF, _build/html/nf4lab.pdf: `python book/make_pdf.py`, after `make book`.

The pages' articles, in reading order, become one document with a title page and a table of contents, which Chromium
prints with its own page numbers, outline and tags for screen readers. Answers and solutions are open on paper; code
that only plots is left out. The contents have the page numbers of the PDF that is there; where those turn out to be
others, they are put right and it is printed once more. Where no page has changed since, nothing is printed.
"""

import datetime
import functools
import io
import os
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import urljoin

import yaml
from browser import chromium, serving
from lxml import html
from pypdf import PdfReader

ROOT = Path(__file__).resolve().parents[1]
SITE, PRINT_STYLE = ROOT / "_build" / "html", ROOT / "book" / "print.css"
PDF = SITE / "nf4lab.pdf"
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "nf4lab" / "__init__.py").read_text(), re.MULTILINE)[1]
MATHJAX = {
    "loader": {"load": ["core", "input/tex", "output/chtml", "a11y/assistive-mml"]},
    "options": {"processHtmlClass": "math"},
}
# Names, signs and spaces of code have the colour of what is around them, and are most of the tags of the book.
UNCOLOURED = re.compile(r'<span class="(?:n|nn|p|w)">([^<]*)</span>')
PRINTS = 3  # at the most: the second time, the contents know the page numbers of the first
COLUMN_PX = round((210 - 2 * 20) / 25.4 * 96)  # A4 without its margins, at CSS's 96 pixels an inch
FOOTER = "<div style='font: 8px sans-serif; width: 100%; text-align: center'><span class=pageNumber></span></div>"
PAPER = {
    "format": "A4", "print_background": True, "outline": True, "tagged": True, "display_header_footer": True,
    "header_template": "<span></span>", "footer_template": FOOTER,
    "margin": {"top": "18mm", "bottom": "18mm", "left": "20mm", "right": "20mm"},
}  # fmt: skip
NUMBER_CONTENTS = """numbers => document.querySelectorAll("nav a").forEach(
    line => line.lastElementChild.textContent = numbers[decodeURIComponent(line.hash.slice(1))] ?? "")"""


def contents() -> list[tuple[str, list[str]]]:
    """[(part, its pages)], the landing page first, as _toc.yml has them."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    parts = [(part["caption"], [entry["file"] for entry in part["chapters"]]) for part in toc["parts"]]
    return [("", [toc["root"]]), *parts]


def place(page: str, anchor: str = "") -> str:
    """The id, in the one document, of a page or of a place on it."""
    slug = re.sub(r"\W+", "-", page)
    return f"{slug}--{anchor}" if anchor else slug


def article(page: str, pages: set[str]) -> html.HtmlElement:
    """A page's article, its ids and links made to fit the one document."""
    text = (SITE / f"{page}.html").read_text()
    text = text[text.index("<article") : text.index("</article>")]
    found = html.fragment_fromstring(UNCOLOURED.sub(r"\1", text))
    not_on_paper = [fold for cell in found.find_class("tag_hide-input") for fold in cell.find_class("hide")]
    for tag in sum(map(found.find_class, ("headerlink", "copybtn", "viewcode-link")), not_on_paper):
        tag.drop_tree()
    for tag in found.xpath("//*[@id]"):
        tag.set("id", place(page, tag.get("id")))
    for tag in found.iter("details"):
        tag.set("open", "")
    for tag in found.xpath("//*[@href]"):
        tag.set("href", inside(page, tag.get("href"), pages))
        if not tag.get("href").startswith(("#", "https:")):  # a page that is not on paper, such as the index
            tag.drop_tag()
    for tag in found.xpath("//*[@src]"):
        tag.set("src", urljoin(f"{page}.html", tag.get("src")))
    found.tag = "section"
    found.set("id", place(page))
    return found


def inside(page: str, href: str, pages: set[str]) -> str:
    """A link, to its place in the document where the document has it."""
    target, _, anchor = urljoin(f"{page}.html", href).partition("#")
    name = target.removesuffix(".html")
    return f"#{place(name, anchor)}" if name in pages else href


def pages() -> list[str]:
    """All pages in reading order."""
    return [page for _, chapters in contents() for page in chapters]


@functools.cache
def articles() -> dict[str, html.HtmlElement]:
    """{page: its article}, in reading order."""
    return {page: article(page, set(pages())) for page in pages()}


def document() -> str:
    """The whole book as HTML; its contents name no page numbers yet."""
    lines = []
    for part, chapters in contents()[1:]:
        rows = "".join(row(page) for page in chapters)
        lines.append(f"<h2>{part}</h2><ul>{rows}</ul>")
    body = "".join(html.tostring(found, encoding="unicode") for found in articles().values())
    return (
        f"<!DOCTYPE html><html lang=en data-theme=light><head><meta charset=utf-8><title>4-bit NormalFloat</title>"
        f"<link rel=stylesheet href=_static/pygments.css><style>{PRINT_STYLE.read_text()}</style>"
        f"<script>window.MathJax = {MATHJAX}</script><script defer src=_static/mathjax/startup.js></script></head>"
        f"<body><header><h1>4-bit NormalFloat</h1><p>The nf4lab authors</p>"
        f"<p>Version {VERSION}, {today()}</p>"
        f"<p class=licence>Text under CC BY 4.0, code under Apache 2.0</p></header>"
        f"<nav><h1>Contents</h1>{''.join(lines)}</nav><main>{body}</main></body></html>"
    )


def row(page: str) -> str:
    """A line of the contents."""
    title = articles()[page].find(".//h1").text_content().strip()
    return f"<li><a href='#{place(page)}'><span>{title}</span><span></span></a></li>"


def today() -> str:
    """The date of the build; SOURCE_DATE_EPOCH sets it."""
    stamp = os.environ.get("SOURCE_DATE_EPOCH")
    now = datetime.datetime.fromtimestamp(int(stamp), datetime.UTC) if stamp else datetime.datetime.now(datetime.UTC)
    return f"{now:%Y-%m-%d}"


def page_numbers(pdf: bytes) -> dict[str, int]:
    """{id: page, from 1} of the places in the document that something links to."""
    reader = PdfReader(io.BytesIO(pdf))
    places = reader.named_destinations.items()
    return {name.removeprefix("/"): reader.get_destination_page_number(place) + 1 for name, place in places}


def print_pdf(numbers: dict[str, int]) -> bytes:
    """The book's PDF, whose contents name first these page numbers, and then the PDF's own, until they are the same."""
    with serving(SITE) as address, chromium() as browser:
        page = opened(browser, address + "whole-book.html", document())
        for _ in range(PRINTS):
            page.evaluate(NUMBER_CONTENTS, numbers)
            pdf = page.pdf(**PAPER)
            before, numbers = numbers, page_numbers(pdf)
            if same_contents(before, numbers):
                break
    return pdf


def opened(browser, address: str, text: str):
    """A document that is served at this address, beside the book, as it is to be printed."""
    page = browser.new_page()
    page.route("**/whole-book.html", lambda route: route.fulfill(body=text, content_type="text/html"))
    page.emulate_media(media="print")
    page.set_viewport_size({"width": COLUMN_PX, "height": 900})  # what draws itself measures the column
    page.goto(address)
    page.evaluate("window.MathJax.startup.promise.then(() => document.fonts.ready).then(() => true)")
    return page


def same_contents(before: dict[str, int], after: dict[str, int]) -> bool:
    """Whether every page of the book begins where the contents say."""
    return all(before.get(place(page)) == after.get(place(page)) for page in pages())


def up_to_date() -> bool:
    """Whether the PDF is newer than all that it is made of."""
    sources = [PRINT_STYLE, Path(__file__), ROOT / "_toc.yml", *(SITE / f"{page}.html" for page in pages())]
    return PDF.exists() and PDF.stat().st_mtime > max(path.stat().st_mtime for path in sources)


def main() -> int:
    if not shutil.which("chromium"):
        print("no Chromium here (Debian's package `chromium`), so no PDF")
        return 0
    if not up_to_date():
        PDF.write_bytes(print_pdf(page_numbers(PDF.read_bytes()) if PDF.exists() else {}))
    print(f"{PDF.relative_to(ROOT)}: {PDF.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Slides for the four-week plan of the teaching page: `python book/make_slides.py`, after `make book`.

labs/slides has a Markdown file a week. A line `*Figure 4.2*` becomes that figure of the built book, with its caption
and its alternative text. sphinx-revealjs makes the decks, _build/slides/week1.html and so on, with all that they need
beside them; a Chromium, where there is one, prints each as PDF.
"""

import html
import re
import shutil
import sys
from pathlib import Path

from browser import chromium, serving
from bs4 import BeautifulSoup
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
SOURCES, SITE, SLIDES = ROOT / "labs" / "slides", ROOT / "_build" / "html", ROOT / "_build" / "slides"
FIGURE = re.compile(r"^\*Figure ((\d+)\.\d+)\*$", re.MULTILINE)
CONF = {
    "extensions": ["myst_parser", "sphinx_revealjs"],
    "project": "4-bit NormalFloat",
    "root_doc": "week1",
    "language": "en",
    "html_use_index": False,
    "html_copy_source": False,
    "revealjs_style_theme": "white",
    "revealjs_static_path": [str(SOURCES / "static")],
    "revealjs_css_files": ["slides.css"],
    "revealjs_script_conf": {"hash": True, "slideNumber": "c/t", "center": False, "transition": "none"},
}
ORPHAN = "---\norphan: true\n---\n"  # a deck stands for itself: no table of contents has it


def figures(chapter: int) -> dict[str, tuple[str, str, str]]:
    """{"4.2": (image under SITE, alternative text, caption)} of a chapter of the built book."""
    (page,) = (SITE / "book").glob(f"{chapter:02}-*.html")
    found, image = {}, None
    for tag in BeautifulSoup(page.read_text(), "html.parser").find("article").find_all(["img", "em"]):
        if tag.name == "img":
            image = tag
        elif number := re.match(rf"Figure ({chapter}\.\d+)\.", tag.get_text()):
            path = image["src"].removeprefix("../")
            found[number[1]] = path, image["alt"], " ".join(tag.get_text().split())
    return found


def named(text: str) -> list[tuple[int, str]]:
    """[(chapter, figure's number)] that a deck's source names, in its order."""
    return [(int(chapter), number) for number, chapter in FIGURE.findall(text)]


def filled(text: str) -> str:
    """A deck's source with its figures in place; ValueError where the book has no such figure."""
    have = {number: found for chapter, _ in named(text) for number, found in figures(chapter).items()}

    def figure(match: re.Match) -> str:
        if match[1] not in have:
            raise ValueError(f"no figure {match[1]} in the built book; chapter {match[2]} has {', '.join(have)}")
        path, alt, caption = have[match[1]]
        return (
            f'<figure>\n<img src="{path}" alt="{html.escape(alt)}">\n'
            f"<figcaption>{html.escape(caption)}</figcaption>\n</figure>"
        )

    return ORPHAN + FIGURE.sub(figure, text)


def make(folder: Path) -> list[Path]:
    """The decks, made in this folder, with the figures that they show."""
    shutil.rmtree(folder, ignore_errors=True)
    source = folder / "source"
    source.mkdir(parents=True)
    weeks = sorted(SOURCES.glob("*.md"))
    for week in weeks:
        text = filled(week.read_text())
        (source / week.name).write_text(text)
        for path in re.findall(r'<img src="([^"]+)"', text):
            (folder / path).parent.mkdir(exist_ok=True)
            shutil.copy(SITE / path, folder / path)
    app = Sphinx(source, None, folder, folder / ".doctrees", "revealjs", CONF, status=None, warningiserror=True)
    app.build()
    for made in (source, folder / ".doctrees"):
        shutil.rmtree(made)
    return [folder / f"{week.stem}.html" for week in weeks]


def print_deck(browser, address: str) -> bytes:
    """The PDF of the deck at this address, a page a slide."""
    page = browser.new_page()
    page.goto(f"{address}?print-pdf")
    page.wait_for_selector(".pdf-page")
    pdf = page.pdf(prefer_css_page_size=True, print_background=True, tagged=True, outline=True)
    page.close()
    return pdf


def main() -> int:
    if not SITE.exists():
        print("the slides take their figures from the built book: run `make book` first")
        return 1
    decks = make(SLIDES)
    if shutil.which("chromium"):
        with serving(SLIDES) as address, chromium() as browser:
            for deck in decks:
                deck.with_suffix(".pdf").write_bytes(print_deck(browser, address + deck.name))
    else:
        print("no Chromium here (Debian's package `chromium`), so no PDF")
    print(f"{SLIDES.relative_to(ROOT)}: {', '.join(path.name for path in sorted(SLIDES.glob('week*')))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

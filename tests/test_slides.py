"""The slides of the four-week plan: what they name exists, what they ask is answered, they open offline."""

import importlib.util
import io
import re
from pathlib import Path

import pytest
from pypdf import PdfReader

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("make_slides", ROOT / "book" / "make_slides.py")
make_slides = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_slides)

WEEKS = sorted(make_slides.SOURCES.glob("*.md"))
each_week = pytest.mark.parametrize("week", WEEKS, ids=lambda week: week.stem)
CHOICE = re.compile(r"^- \*\*([A-D])\.\*\*", re.MULTILINE)


def slides(week):
    """[(level, heading, body)] of a deck's source."""
    parts = re.split(r"^(#+) (.*)\n", week.read_text(), flags=re.MULTILINE)[1:]
    return list(zip(map(len, parts[0::3]), parts[1::3], map(str.strip, parts[2::3]), strict=True))


def chapter(number):
    (path,) = (ROOT / "book").glob(f"{number:02}-*.md")
    return path.read_text()


def plan(page):
    """[(chapters, labs)] of the four weeks, as a page's table has them."""
    (row,) = re.findall(r"^\| four \| (.*) \| (.*) \|$", (ROOT / page).read_text(), flags=re.MULTILINE)
    return list(zip(*(cell.split("; ") for cell in row), strict=True))


def numbers(chapters):
    """{1, 2, 3} of '1 to 3', {4, 5} of '4 and 5'."""
    first, last = map(int, re.findall(r"\d+", chapters))
    return set(range(first, last + 1))


@each_week
def test_a_deck_names_only_figures_that_the_chapters_have(week):
    named = make_slides.named(week.read_text())
    assert named
    for number, figure in named:
        assert f"\n*Figure {figure}. " in chapter(number)
    assert len(named) == len(set(named)) == week.read_text().count("*Figure")


@each_week
def test_a_deck_has_ten_to_sixteen_slides_beside_its_answers_and_none_is_empty(week):
    levels = [level for level, _, _ in slides(week)]
    assert levels[0] == 1 and set(levels[1:]) == {2, 3}
    assert 10 <= sum(level < 3 for level in levels) <= 16
    assert all(body for _, _, body in slides(week))


@each_week
def test_every_question_has_its_answer_one_step_down_among_its_choices(week):
    deck = slides(week)
    for (level, heading, body), after in zip(deck, [*deck[1:], None], strict=True):
        if level == 3:
            assert re.match("Answer: [A-D]", heading)
            continue
        asked = CHOICE.findall(body)
        assert bool(asked) == heading.startswith(("Predict", "Check")) == bool(after and after[0] == 3)
        assert not asked or re.match("Answer: ([A-D])", after[1])[1] in asked


@each_week
def test_the_answer_to_a_prediction_is_that_of_the_chapter_whose_figure_shows_it(week):
    deck = slides(week)
    predictions = [at for at, (_, heading, _) in enumerate(deck) if heading.startswith("Predict")]
    assert predictions
    for at in predictions:
        _, heading, body = deck[at + 1]
        ((number, _),) = make_slides.named(body)
        letter = heading.removeprefix("Answer: ")[0]
        found = re.findall(r"(?:answer is|It is|lowest MSE is) \*\*([A-D])\*\*", chapter(number))
        assert letter in found


def quick_checks(number):
    """[(question, letter of its right answer)] of a chapter's quick check."""
    quick = chapter(number).partition("## Quick check")[2].partition("## Exercises")[0]
    questions = re.split(r"^\*\*\d\.\*\* ", quick, flags=re.MULTILINE)[1:]
    right = r"<b>([A-D])\.</b>[^\n]*\n\n\*\*Right\.\*\*"
    return [(question.split("\n")[0], *re.findall(right, question)) for question in questions]


@each_week
def test_the_answer_to_a_check_is_that_of_the_quick_check_which_ends_in_the_same_question(week):
    chapters = numbers(plan("book/teaching.md")[WEEKS.index(week)][0])
    asked = [found for number in chapters for found in quick_checks(number)]
    deck = slides(week)
    checks = [at for at, (_, heading, _) in enumerate(deck) if heading.startswith("Check")]
    assert checks
    for at in checks:
        question = re.split(r"(?<=[.?]) ", deck[at][2].split("\n")[0])[-1]
        letters = [letter for text, letter in asked if text.endswith(question)]
        assert letters == [deck[at + 1][1].removeprefix("Answer: ")], question


@pytest.mark.parametrize("page", ["book/teaching.md", "labs/README.md"])
def test_the_decks_are_the_weeks_of_the_plan(page):
    assert len(plan(page)) == len(WEEKS)
    for number, (week, (chapters, labs)) in enumerate(zip(WEEKS, plan(page), strict=True), 1):
        _, title, first = slides(week)[0]
        assert title.startswith(f"Week {number}: ")
        assert first == f"Chapters {chapters}, then {labs}"
        assert {number for number, _ in make_slides.named(week.read_text())} == numbers(chapters)


def test_a_figure_comes_with_its_alternative_text_and_its_caption(monkeypatch):
    monkeypatch.setattr(make_slides, "figures", lambda chapter: {"4.2": ("_images/a.png", 'A "line" < 1.', "Falls.")})
    made = make_slides.filled("## Why?\n\n*Figure 4.2*\n")
    assert '<img src="_images/a.png" alt="A &quot;line&quot; &lt; 1.">' in made
    assert "<figcaption>Falls.</figcaption>" in made
    with pytest.raises(ValueError, match=r"no figure 4\.3 in the built book; chapter 4 has 4\.2"):
        make_slides.filled("*Figure 4.3*")


@pytest.fixture(scope="module")
def decks(tmp_path_factory):
    if not make_slides.SITE.exists():
        pytest.skip("the book is not built: run `make book`")
    return make_slides.make(tmp_path_factory.mktemp("slides"))


def test_every_figure_has_an_alternative_text(decks):
    for deck, week in zip(decks, WEEKS, strict=True):
        images = make_slides.BeautifulSoup(deck.read_text(), "html.parser").find_all("img")
        assert len(images) == len(make_slides.named(week.read_text()))
        assert all(len(image["alt"]) > 40 and (deck.parent / image["src"]).exists() for image in images)


@each_week
def test_a_deck_opens_from_its_file_without_network_and_shows_all_of_its_figures(decks, browser, week):
    page = browser.new_page()
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(decks[WEEKS.index(week)].as_uri())
    page.wait_for_function("Reveal.isReady()")
    assert page.evaluate("Reveal.getTotalSlides()") == len(slides(week))
    shown = page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 0)")
    assert shown == [True] * len(make_slides.named(week.read_text()))
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
    assert not errors
    page.close()


@each_week
def test_nothing_runs_over_a_slide_and_the_pdf_has_a_page_for_each(decks, browser, week):
    page = browser.new_page()
    page.goto(f"{decks[WEEKS.index(week)].as_uri()}?print-pdf")
    page.wait_for_selector(".pdf-page")
    heights = page.evaluate("[...document.querySelectorAll('.pdf-page > section')].map(slide => slide.scrollHeight)")
    assert len(heights) == len(slides(week))
    assert max(heights) <= page.evaluate("Reveal.getConfig().height")
    page.close()
    with make_slides.serving(decks[0].parent) as address:
        pdf = make_slides.print_deck(browser, address + decks[WEEKS.index(week)].name)
    pages = [paper.mediabox for paper in PdfReader(io.BytesIO(pdf)).pages]
    assert len(pages) == len(slides(week))
    assert all(paper.width > paper.height for paper in pages)

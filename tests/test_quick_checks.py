"""The quick checks: two or three questions a chapter, one right answer each, and a reason for every answer."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_build" / "html"
CHAPTERS = [path for path in sorted((ROOT / "book").glob("[0-9][0-9]-*.md")) if "## Quick check" in path.read_text()]
ANSWER = re.compile(r"<summary><b>([A-D])\.</b> (.+?)</summary>\n\n\*\*(Right|No)\.\*\* (.+?)\n\n</details>")


def questions(chapter):
    """[[(letter, answer, verdict, reason)]] of a chapter."""
    section = re.search(r"## Quick check\n(.*?)\n## ", chapter.read_text(), re.DOTALL)
    parts = re.split(r"^\*\*\d\.\*\* ", section[1], flags=re.MULTILINE)[1:]
    return [ANSWER.findall(part) for part in parts]


def test_chapters_have_quick_checks():
    assert len(CHAPTERS) >= 12


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_asks_two_or_three_questions_with_one_right_answer_each(chapter):
    asked = questions(chapter)
    assert len(asked) in (2, 3)
    for answers in asked:
        assert "".join(letter for letter, *_ in answers) in ("ABC", "ABCD")
        assert [verdict for _, _, verdict, _ in answers].count("Right") == 1
        assert all(len(reason) > 20 or verdict == "Right" for *_, verdict, reason in answers)
    assert chapter.read_text().count('<details class="check">') == sum(map(len, asked))


def test_no_letter_is_right_most_of_the_time():
    right = [
        letter for chapter in CHAPTERS for answers in questions(chapter) for letter, _, v, _ in answers if v == "Right"
    ]
    assert max(right.count(letter) for letter in "ABC") < 0.6 * len(right)


@pytest.mark.skipif(not SITE.exists(), reason="the book is not built: run `make book`")
@pytest.mark.parametrize("chapter", CHAPTERS[:1] + CHAPTERS[-1:], ids=lambda path: path.stem)
def test_an_answer_opens_by_keyboard_and_no_other_with_it(browser, address, chapter):
    page = browser.new_page(java_script_enabled=True)
    page.goto(f"{address}book/{chapter.stem}.html")
    folds = page.locator("details.check")
    assert folds.count() == sum(map(len, questions(chapter)))
    assert not page.locator("details.check[open]").count()
    assert not folds.nth(1).locator("p").first.is_visible()
    folds.nth(1).locator("summary").focus()
    page.keyboard.press("Enter")
    assert folds.nth(1).locator("p").first.is_visible()
    assert page.locator("details.check[open]").count() == 1
    page.close()

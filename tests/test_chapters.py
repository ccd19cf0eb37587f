"""The form of the chapters: code that fits, checks that are folded, goals at the head and their check at the end."""

import re
from pathlib import Path

import jupytext
import pytest

ROOT = Path(__file__).resolve().parents[1]
DONE = ("01", "02", "03", "04", "05", "06")  # those that have the form; the others follow
CHAPTERS = [path for path in sorted((ROOT / "book").glob("[0-9][0-9]-*.md")) if path.name[:2] in DONE]
FOLDED = {"hide-input", "hide-cell"}


def code(chapter, folded):
    """The sources of the cells whose code a reader sees, or of those that are folded away."""
    cells = [cell for cell in jupytext.read(chapter).cells if cell.cell_type == "code"]
    return [cell.source for cell in cells if bool(FOLDED & set(cell.metadata.get("tags", []))) == folded]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_no_line_of_code_in_sight_is_longer_than_72_columns(chapter):
    long = [line for source in code(chapter, folded=False) for line in source.split("\n") if len(line) > 72]
    assert not long


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_cell_in_sight_has_fewer_than_15_lines_and_at_most_one_assert(chapter):
    for source in code(chapter, folded=False):
        assert source.count("\n") + 1 < 15, source
        assert len(re.findall(r"^ *assert ", source, re.MULTILINE)) <= 1, source


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_checks_are_folded_under_one_title_and_print_nothing(chapter):
    cells = [cell for cell in jupytext.read(chapter).cells if "checks" in cell.metadata.get("tags", [])]
    assert cells
    for cell in cells:
        assert "hide-input" in cell.metadata["tags"]
        assert cell.source.startswith("# @title Checks\n")
        assert "assert " in cell.source and "print(" not in cell.source


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_says_what_one_learns_and_how_long_it_takes_and_asks_at_its_end(chapter):
    text = chapter.read_text()
    head = text.split("\n## ")[0]
    assert "**You will learn to**" in head and re.search(r"About \d0 minutes", head)
    goals = re.findall(r"^- .+$", head, re.MULTILINE)
    assert 2 <= len(goals) <= 4
    end = text.split("## Quick check\n")[1].split("\n## ")[0]
    assert "goals at the head" in end


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_solution_is_prose_and_then_code(chapter):
    exercises = chapter.read_text().split("## Exercises\n")[1]
    for exercise in re.split(r"^\*\*\d\. ", exercises, flags=re.MULTILINE)[1:]:
        solution = re.search(
            r'<details class="solution">\n<summary>Solution</summary>\n\n(.+?)\n\n</details>\n\n```{code-cell}(.+?)```',
            exercise, re.DOTALL,
        )  # fmt: skip
        assert solution, exercise[:60]
        assert ":tags: [hide-cell]" in solution[2]
        assert len(solution[1]) > 80

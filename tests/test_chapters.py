"""The form of the chapters: code that fits, checks that are folded, goals at the head and their check at the end."""

import ast
import re
from pathlib import Path

import jupytext
import pytest
from scipy.stats import norm

import nf4lab
from nf4lab import theory

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "book").glob("[0-9][0-9]-*.md"))
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
def test_every_table_of_a_chapter_is_shown(chapter):
    """A notebook shows the value of a cell's last expression, and nothing of one before it or inside an `if`."""
    for source in code(chapter, folded=False) + code(chapter, folded=True):
        tree = ast.parse(source)
        shown = list(ast.walk(tree.body[-1])) if isinstance(tree.body[-1], ast.Expr | ast.FunctionDef) else []
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "plots.table":
                assert node in shown, ast.unparse(node)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_the_answers_of_a_quick_check_have_no_formula_in_the_line_to_open(chapter):
    """It is HTML, where $x$ would stand as it is written."""
    assert not re.findall(r"<summary>.*\$.*", chapter.read_text())


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


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_the_minutes_are_by_the_rule_that_the_first_page_names(chapter):
    """130 words a minute, a minute for eight lines of code in sight, rounded up to tens, exercises left out."""
    text = chapter.read_text().split("---\n", 2)[2]
    prose = re.sub(r"```{code-cell}.*?```", "", text, flags=re.DOTALL).split("## Exercises")[0]
    lines = sum(source.count("\n") + 1 for source in code(chapter, folded=False))
    minutes = len(re.findall(r"\w+", prose)) / 130 + lines / 8
    assert int(re.search(r"^About (\d+) minutes\.", text, re.MULTILINE)[1]) == 10 * -(-minutes // 10)


SHEET = (ROOT / "book" / "cheat-sheet.md").read_text().replace("\N{MINUS SIGN}", "-")


def rows(heading):
    """The rows of the table under a heading of the cheat sheet, as lists of cells."""
    lines = SHEET.split(f"## {heading}\n")[1].split("\n## ")[0].split("\n")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return table[2:]


def test_the_cheat_sheet_has_the_levels_and_boundaries_to_the_last_bit():
    levels = nf4lab.codebooks.nf4()
    boundaries = (levels[1:] + levels[:-1]) / 2
    table = rows("The sixteen levels")
    assert [(row[0], row[1]) for row in table] == [(str(c), f"`{c:04b}`") for c in range(16)]
    assert [float(row[2]) for row in table] == levels.tolist()
    assert [levels.new_tensor(float(row[3])) for row in table[:15]] == list(boundaries)


def test_the_cheat_sheet_has_the_bits_and_errors_that_the_package_calculates():
    for size, bits, double, mse in rows("What it costs"):
        assert float(bits) == 4 + 32 / int(size)
        assert double == f"{4 + 8 / int(size) + 32 / (256 * int(size)):.4f}"
        assert mse == f"{theory.expected('nf4', int(size)).mse:.5f}"
    table = {row[0].split(" (")[0]: row for row in rows("Beside others, in blocks of 64")}
    for label, name in {
        "NF4": "nf4",
        "min-max uniform": "uniform",
        "int4": "int4",
        "FP4 of bitsandbytes": "fp4",
    }.items():
        assert float(table[label][1]) == (5 if name == "uniform" else 4.5)
        assert table[label][2] == f"{theory.expected(name, 64).mse:.5f}"
    lloyd = theory.known_scale(nf4lab.codebooks.lloyd_max()).mse
    assert table["Lloyd-Max, $\\sigma$ known, no constants"][2] == f"{lloyd:.5f}"
    assert table["Shannon limit"][2] == f"{nf4lab.shannon_limit(4.5):.5f}"


def test_the_cheat_sheet_has_the_bits_up_to_which_nf4_leads():
    said = r"fixed: ([\d.]+) or fewer with float32 constants, ([\d.]+) or fewer with double quantization"
    plain, double = re.search(said, SHEET).groups()
    mse = {(name, B): theory.expected(name, B).mse for name in ("nf4", "uniform", "int4") for B in nf4lab.BLOCK_SIZES}
    # Min-max has two constants, so blocks of twice the size, in either way of storing them.
    ahead = [B for B in nf4lab.BLOCK_SIZES[:-1] if mse["nf4", B] < min(mse["uniform", 2 * B], mse["int4", B])]
    assert ahead == list(nf4lab.BLOCK_SIZES[1:-1])
    assert float(plain) == 4 + 32 / ahead[0]
    assert double == f"{4 + 8 / ahead[0] + 32 / (256 * ahead[0]):.2f}"


def test_the_cheat_sheet_has_the_share_of_normal_weights_that_one_far_out_rounds_to_zero():
    levels = nf4lab.codebooks.nf4().double()
    below, above = ((levels[1:] + levels[:-1]) / 2)[6:8].tolist()  # around zero
    said = re.search(r"(\d+)% of normal weights with one at (\d+) sigma, (\d+)% with one at (\d+)", SHEET).groups()
    for percent, sigmas in (said[:2], said[2:]):
        zeros = norm.cdf(above * int(sigmas)) - norm.cdf(below * int(sigmas))
        assert percent == f"{100 * zeros:.0f}"

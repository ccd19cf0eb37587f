"""Answers that no check was written for: right ones earn all of their points, wrong ones lose theirs and no others.

The corpora are in tests/answers, a cell an answer: `# %% lab1 q2 what it is`. A wrong one is told a cause only where
its heading ends in `| words of it`.
"""

import functools
import re
from pathlib import Path

import lab_submissions
import masters
import numpy as np
import pytest

ANSWERS = Path(__file__).parent / "answers"


def corpus(name):
    """(lab, question, what it is, the cause that it may be told or None, code) of each answer."""
    cells = re.split(r"^# %% ", (ANSWERS / f"{name}.py").read_text(), flags=re.MULTILINE)[1:]
    found = [re.fullmatch(r"(lab\d) (q\d+) ([^\n|]*?)(?: \| ([^\n]*))?\n(.*)", cell, re.DOTALL) for cell in cells]
    return [match.groups() for match in found]


@functools.cache
def solved(lab):
    return masters.run(lab_submissions.solved(lab))


def outcome(lab, questions, code):
    """(points, messages) in these questions with this code's definitions in place of the master's."""
    env = {"np": np} | solved(lab)
    exec(code, env)
    return masters.outcome(lab, env, questions)


def label(row):
    return f"{row[0]} {row[1]} {row[2]}".replace(" ", "-")


def test_there_are_sixty_of_each_and_all_labs_have_some():
    for name in ("right", "wrong"):
        assert len(corpus(name)) >= 60
        assert {row[0] for row in corpus(name)} == {"lab1", "lab2", "lab3", "lab4", "lab5", "lab6"}


@pytest.mark.parametrize("row", corpus("right"), ids=label)
def test_a_right_but_unusual_answer_earns_all_of_its_points(row):
    lab, question, _, _, code = row
    assert outcome(lab, [question], code) == (masters.possible(lab, [question]), {})


@pytest.mark.parametrize("row", corpus("wrong"), ids=label)
def test_a_wrong_answer_loses_points_in_its_own_question_and_is_told_no_wrong_cause(row):
    lab, question, _, cause, code = row
    earned, told = outcome(lab, [question], code)
    assert earned < masters.possible(lab, [question])
    for text in told.values():
        found = re.search(r"Likely cause: (.*)", text, re.DOTALL)
        assert not found or (cause and re.search(cause, found[1])), text


@pytest.mark.parametrize("row", [row for row in corpus("wrong") if row[0] in ("lab1", "lab2", "lab3")], ids=label)
def test_a_wrong_answer_costs_no_other_question_a_point(row):
    lab, question, _, _, code = row
    others = sorted(masters.checks(lab).keys() - {question})
    assert outcome(lab, others, code) == (masters.possible(lab, others), {})

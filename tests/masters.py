"""The one way in which tests run a lab's notebook and grade it: here, in this process.

That shows which points a mistake costs and what its author is told. `lab_submissions` makes the notebooks, of the
lab's master; the whole way, from notebooks to a table, is in tests/test_grading.py.
"""

import ast
import contextlib
import functools
import os
import tempfile
import unittest.mock
from pathlib import Path

import make_labs
from otter.test_files.exception_test import ExceptionTestFile

from nf4lab.labs import feedback

SIMULATOR = os.environ.get("NUMBA_ENABLE_CUDASIM", "0")


@functools.cache
def made(lab):
    """What the maker gives: the student's notebook, and the files of all checks, without a seed."""
    with tempfile.TemporaryDirectory() as folder:
        notebook, _, checks = make_labs.assign(lab, Path(folder))
    return notebook, checks


@functools.cache
def checks(lab, seed=2026):
    """{question: its checks}, as the grader has them."""
    files = make_labs.check_files(lab, made(lab)[1], seed)
    return {Path(name).stem: ExceptionTestFile.from_string(text).test_cases for name, text in files.items()}


def possible(lab, questions=None, which=lambda check: True):
    """The points that a lab's checks give, or those of some of its questions, or some of its checks."""
    return sum(check.points for _, check in _chosen(lab, questions) if which(check))


def run(notebook, every_cell=False):
    """The variables that a notebook's cells leave behind.

    Unless `every_cell`, those that only measure and print are passed over. numba's simulator stays as it was: other
    tests of this process compile kernels.
    """
    env = {"__name__": "submission"}
    for cell in notebook.cells:
        if cell.cell_type == "code" and (every_cell or is_needed(cell)):
            with unittest.mock.patch.dict(os.environ, NUMBA_ENABLE_CUDASIM=SIMULATOR, MPLBACKEND="Agg"):
                exec(compile(cell.source, "<cell>", "exec"), env)
    return env


def is_needed(cell):
    """Whether answers or checks can need a cell: it answers a question, imports, or does nothing but define."""
    body = ast.parse(cell.source).body
    imports = any(isinstance(part, (ast.Import, ast.ImportFrom)) for part in body)
    defines = all(isinstance(part, (ast.Assign, ast.ClassDef, ast.FunctionDef)) for part in body)
    return bool(make_labs.question(cell)) or imports or defines


def outcome(lab, env, questions=None, seed=2026, which=lambda check: True):
    """(points, {check: message} of those that fail) of a namespace, in these questions and by these checks."""
    earned, told = 0.0, {}
    for question, check in filter(lambda chosen: which(chosen[1]), _chosen(lab, questions, seed)):
        try:
            with feedback.forgiving() if check.hidden else contextlib.nullcontext():
                check.body.call_func(env)
            earned += check.points
        except feedback.Mistake as mistake:
            told[f"{question} {check.body.test_func.__name__}"] = str(mistake)
    return earned, told


def _chosen(lab, questions, seed=2026):
    """(question, check) of these questions, or of all."""
    found = checks(lab, seed)
    return [(question, check) for question in questions or found for check in found[question]]

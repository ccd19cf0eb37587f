"""A lab's master taken apart for tests: its cells, its checks, and what a changed submission earns.

A submission is the master with some texts replaced. Its cells are run in one namespace and its checks called as the
grader calls them, in this process: that shows which points a mistake costs and what its author is told. The whole way,
notebook to table, is in tests/test_labs.py.
"""

import contextlib
import functools
import os
import re
import unittest.mock
from pathlib import Path

import jupytext
import torch

import nf4lab
from nf4lab import labs

SIMULATOR = os.environ.get("NUMBA_ENABLE_CUDASIM", "0")  # other tests of this process must not find it switched on
ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def cells(lab):
    """The master's code cells as (source, tags)."""
    notebook = jupytext.read(ROOT / "labs" / lab / "master.md")
    return [(c.source, tuple(c.metadata.get("tags", []))) for c in notebook.cells if c.cell_type == "code"]


def is_check(tags):
    return bool({"public", "hidden"} & set(tags))


def points(tags):
    return sum(float(found[1]) for tag in tags if (found := re.fullmatch(r"([\d.]+)-points?", tag)))


def total(lab, questions=None):
    """The points that a lab's checks give, or those of some of its questions."""
    return sum(points(tags) for _, tags in cells(lab) if is_check(tags) and (not questions or tags[0] in questions))


def run(lab, question=None, changes=(), every_cell=False):
    """The namespace of a submission: the master, with each (old, new) of `changes` replaced in a question's answers.

    Answers and what they need are run, and everything else too if `every_cell`. "handout" for the changes leaves every
    solution out.
    """
    env, left = {"__name__": "submission"}, {} if changes == "handout" else dict(changes)
    for source, tags in cells(lab):
        if is_check(tags):
            continue
        if changes == "handout":
            source = re.sub(r"# BEGIN SOLUTION.*?# END SOLUTION|[^\n ][^\n]*# SOLUTION", "...", source, flags=re.DOTALL)
        for old in [old for old in left if question in tags and old in source]:
            source = source.replace(old, left.pop(old))  # in the order given: a later change sees the earlier ones
        if every_cell or tags or source.startswith(("import torch", "import os\n\nimport", "boundaries")):
            with unittest.mock.patch.dict(os.environ, NUMBA_ENABLE_CUDASIM=SIMULATOR):
                exec(compile(source, f"<{lab}>", "exec"), env)
    assert not left, f"not in {question} of the master: {list(left)}"
    return env


def outcome(lab, env, questions=None, seed=2026):
    """(points, {check: message} of those that fail) of a namespace; other questions than those named are left out."""
    earned, told = 0.0, {}
    for source, tags in cells(lab):
        if not is_check(tags) or (questions and tags[0] not in questions):
            continue
        module = getattr(__import__(f"nf4lab.labs.{lab}").labs, lab)
        known = {"torch": torch, "nf4lab": nf4lab, "feedback": labs.feedback, lab: module, "SEED": seed}
        exec(source, known)
        name = re.search(r"^def (\w+)\(env\)", source, re.M)[1]
        try:
            with labs.feedback.forgiving() if "hidden" in tags else contextlib.nullcontext():
                known[name](env)
            earned += points(tags)
        except labs.feedback.Mistake as mistake:
            told[f"{tags[0]} {tags[1]} {name}"] = str(mistake)
    return earned, told

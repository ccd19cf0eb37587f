"""Submissions to grade: right, wrong and hostile ones, made from a lab's master."""

import json
import re
from pathlib import Path

import jupytext
import nbformat
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]


def solved(lab: str) -> nbformat.NotebookNode:
    """The master as a student who knows everything would hand it in: no checks, no tags."""
    master = jupytext.read(ROOT / "labs" / lab / "master.md")
    cells = [c for c in master.cells if not {"public", "hidden"} & set(c.metadata.get("tags", []))]
    for cell in cells:
        cell.source = re.sub(r" *# (BEGIN |END )?SOLUTION\n?", "\n", cell.source)
    return new_notebook(cells=cells)


def with_answer(lab: str, answer: str) -> nbformat.NotebookNode:
    """The solved notebook, with one more cell at the question of the function that `answer` defines: the last wins."""
    notebook, name = solved(lab), re.search(r"^def (\w+)", answer, re.MULTILINE)[1]
    at = next(i for i, cell in enumerate(notebook.cells) if re.search(rf"^def {name}\b", cell.source, re.MULTILINE))
    notebook.cells[at] = new_code_cell(notebook.cells[at].source + "\n\n\n" + answer)
    return notebook


def without(lab: str, name: str) -> nbformat.NotebookNode:
    """The solved notebook without the cell that defines the function."""
    notebook = solved(lab)
    notebook.cells = [c for c in notebook.cells if not re.search(rf"^def {name}\b", c.source, re.MULTILINE)]
    return notebook


def preceded(lab: str, source: str) -> nbformat.NotebookNode:
    """The solved notebook after a cell of somebody who has other plans."""
    notebook = solved(lab)
    notebook.cells.insert(0, new_code_cell(source))
    return notebook


def as_bytes(notebook: nbformat.NotebookNode) -> bytes:
    """The notebook as a file."""
    return nbformat.writes(notebook).encode()


def stripped(notebook: nbformat.NotebookNode) -> bytes:
    """The notebook as a careless tool leaves it: no metadata, no ids, sources as lists of lines."""
    cells = [{"cell_type": c.cell_type, "source": c.source.splitlines(keepends=True)} for c in notebook.cells]
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 0}).encode()

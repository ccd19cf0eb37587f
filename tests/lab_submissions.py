"""Submissions to grade: right, wrong and hostile ones, made from a lab's master."""

import importlib
import json
import re
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "labs"))
import make_labs  # noqa: E402
import selftest  # noqa: E402


def mistakes(lab: str) -> dict[str, tuple[str | tuple, float, str]]:
    """{what it is called: (the answer, the points that it costs, a pattern of what its author is told)}.

    The answer is a function's text, for `with_answer`, or a question and what is replaced there, for `changed`.
    """
    return importlib.import_module(f"mistakes.{lab}").MISTAKES


def solved(lab: str) -> nbformat.NotebookNode:
    """The master as a student who knows everything would hand it in: without its checks."""
    return nbformat.reads(selftest.solved(lab).decode(), as_version=4)


def with_answer(lab: str, answer: str) -> nbformat.NotebookNode:
    """The solved notebook, with `answer` below the function of the name that it defines: the last wins."""
    notebook, name = solved(lab), re.search(r"^def (\w+)", answer, re.MULTILINE)[1]
    cell = next(cell for cell in notebook.cells if re.search(rf"^def {name}\b", cell.source, re.MULTILINE))
    cell.source += "\n\n\n" + answer
    return notebook


def changed(lab: str, question: str, changes: dict[str, str]) -> nbformat.NotebookNode:
    """The solved notebook, with each old text replaced by the new in the first of the question's cells that has it."""
    notebook, left = solved(lab), dict(changes)
    for cell in (cell for cell in notebook.cells if make_labs.question(cell) == question):
        for old in [old for old in left if old in cell.source]:
            cell.source = cell.source.replace(old, left.pop(old))  # a later change sees the earlier ones
    if left:
        raise ValueError(f"not in {question} of {lab}'s master: {list(left)}")
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


STUBBORN = """
def forever():
    while True:
        try:
            try:
                while True:
                    pass
            except BaseException:  # a limit of the processor's time and one of the clock's can come at once
                while True:
                    pass
        except BaseException:
            pass
forever()
"""
READS_TESTS = """
import glob, os
found = []
for path in ("{root}/_build/labs/lab1.zip", "{root}/labs/lab1/master.md", "/root/.bashrc"):
    try:
        found.append(open(path, "rb").read())
    except OSError:
        pass
found += [open(path).read() for path in glob.glob("../**/*q1*", recursive=True)]
assert not found
"""
WRITES_OUTSIDE = """
import ctypes, os, shutil
open("inside.txt", "w").write("this is allowed")
for attempt in (
    lambda: open("{target}", "w").write("x"),
    lambda: os.rename("inside.txt", "{target}"),
    lambda: os.symlink("/etc/passwd", "{target}"),
):
    try:
        attempt()
    except OSError:
        pass
libc = ctypes.CDLL(None)
libc.open(b"{target}", os.O_CREAT | os.O_WRONLY, 0o644)  # past the interpreter: the kernel has to refuse
"""
NETWORK = """
import socket, urllib.request
for attempt in (
    lambda: urllib.request.urlopen("http://127.0.0.1:{port}/", timeout=5),
    lambda: socket.create_connection(("127.0.0.1", {port}), timeout=5),
):
    try:
        attempt()
    except OSError:
        pass
import ctypes
libc = ctypes.CDLL(None)
address = (2).to_bytes(2, "little") + ({port}).to_bytes(2, "big") + bytes([127, 0, 0, 1]) + bytes(8)
connected = libc.connect(libc.socket(2, 1, 0), address, 16)
assert connected != 0
"""
MEMORY = """
import torch
try:
    torch.zeros(2**36)
except RuntimeError:
    pass
hoard = [bytearray(2**24) for _ in range(4096)]
"""
FORK_BOMB = """
import ctypes, time
libc = ctypes.CDLL(None)
for _ in range(7):
    libc.fork()
time.sleep(600)
"""
PATCHES = """
from nf4lab.labs import feedback, lab1
import torch
feedback.same = feedback.close = lambda *_, **__: None
lab1.check_nf4 = lambda *_: None
torch.equal = lambda *_: True
"""
FORGES = """
import json, os
line = [{"ran": True}]
line += [{"question": f"q{q}", "check": 0, "hidden": False, "passed": True} for q in range(1, 7)]
for number in range(3, 64):
    try:
        os.write(number, b"".join(json.dumps(part).encode() + b"\\n" for part in line))
    except OSError:
        pass
"""
BAD_ERROR = """
class Bad(Exception):
    def __str__(self):
        raise SystemExit("no text")

raise Bad
"""
HTML = "raise ValueError('<script>alert(1)</script>')"


MISHAPS = {  # of the submissions below: what happens without any intent
    "endless cell", "endless function", "syntax error", "missing cell", "stripped", "duplicated", "renamed", "not json",
    "not a notebook", "empty", "exits", "asks", "shell",
}  # fmt: skip


def hostile(lab: str, target: Path, port: int) -> dict[str, tuple[bytes, float, str, str]]:
    """Submissions of every bad kind: file, points that it should get, pattern of the outcome and of the notes."""
    full = 20
    twice = json.dumps(solved(lab) | {"cells": [cell for cell in solved(lab).cells for _ in range(2)]}).encode()
    renamed = nbformat.writes(solved(lab)).replace("equal_shares", "equal_share").encode()
    return {
        "endless cell": (as_bytes(preceded(lab, "while True: pass")), full, "graded; 1 cell failed", "^$"),
        "endless function": (
            as_bytes(with_answer(lab, "def equal_shares(n):\n    while True: pass")), full - 2, "1 cell failed", "^$"
        ),
        "syntax error": (as_bytes(with_answer(lab, "def equal_shares(n) 1")), full - 2, "2 cells failed", "^$"),
        "missing cell": (as_bytes(without(lab, "equal_shares")), full - 2, "graded", "^$"),
        "stripped": (stripped(solved(lab)), full, "^graded$", "^$"),
        "duplicated": (twice, full, "^graded$", "twice"),
        "renamed": (renamed, full - 2, "^graded$", "^$"),
        "not json": (b'{"cells": [', 0, "unreadable", "^$"),
        "not a notebook": (b"[1, 2]", 0, "unreadable", "^$"),
        "deep": (b"[" * 200_000 + b"]" * 200_000, 0, "unreadable", "^$"),
        "empty": (b"", 0, "unreadable", "^$"),
        "reads tests": (
            as_bytes(preceded(lab, READS_TESTS.format(root=ROOT))), full, "^graded$", "tried to read .*lab1.zip"
        ),
        "writes outside": (
            as_bytes(preceded(lab, WRITES_OUTSIDE.format(target=target))), full, "^graded$", f"tried to write {target}"
        ),
        "network": (as_bytes(preceded(lab, NETWORK.format(port=port))), full, "^graded$", "tried to use the network"),
        "memory": (as_bytes(preceded(lab, MEMORY)), full, "1 cell failed|memory limit", "^$"),
        "fork bomb": (as_bytes(preceded(lab, FORK_BOMB)), 0, "more than 8 processes", "ctypes"),
        "leaves": (as_bytes(preceded(lab, "import os; os._exit(0)")), 0, "ended itself", "^$"),
        "exits": (as_bytes(preceded(lab, "import sys; sys.exit(3)")), full, "1 cell failed", "^$"),
        "patches the checks": (as_bytes(preceded("lab1", PATCHES)), full, "^graded$", "replaced torch.equal"),
        "forges": (as_bytes(preceded(lab, FORGES)), 0, "told the grader", "os.write: read"),
        "bad error": (as_bytes(preceded(lab, BAD_ERROR)), full, "1 cell failed", "^$"),
        "html": (as_bytes(preceded(lab, HTML)), full, "1 cell failed", "^$"),
        "asks": (as_bytes(preceded(lab, "input('your password?')")), full, "1 cell failed", "^$"),
        "shell": (as_bytes(preceded(lab, "!rm -rf /tmp/nowhere\n%pip install nothing-at-all")), full, "^graded$", "^$"),
        "prints": (as_bytes(preceded(lab, "print('x' * 10**8)")), full, "^graded$", "^$"),
        "=formula()": (as_bytes(solved(lab)), full, "^graded$", "^$"),
    }  # fmt: skip

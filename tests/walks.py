"""How far a call walks through the package: which functions it calls in turn, and how often the file changes."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nf4lab

PACKAGE = str(Path(nf4lab.__file__).parent) + "/"


class Walk(NamedTuple):
    """What was called, in turn, as (file, function)."""

    called: list[tuple[str, str]]

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many calls, in how many files, and how often one is in another file than the call before."""
        files = [file for file, _ in self.called]
        changes = sum(a != b for a, b in itertools.pairwise(files))
        return len(files), len(set(files)), changes


def walk(call: Callable[[], object]) -> Walk:
    """The functions of the package, generators and comprehensions among them, that a call runs in this thread."""
    called = []

    def note(frame, event, _):
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(PACKAGE):
            called.append((file.removeprefix(PACKAGE), frame.f_code.co_name))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Walk(called)

"""Run one submission, shut in, and tell the grader by lines of JSON what came out: not to be called by hand.

    python -B run_submission.py FOLDER LAB MEMORY_BYTES SECONDS CELL_SECONDS READABLE...

1. The process is confined (confine.py) and reads FOLDER/submission.ipynb.
2. Its cells run in order, in one IPython shell; a cell that fails or takes too long does not stop the next.
3. The grader sends the public checks; their messages go back to it.
4. Only then does it send the hidden checks: no file and no variable held them while the submission's cells ran.

The cells' metadata is not looked at, so notebooks that lost it are graded like any other.
"""

import ast
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from confine import SYSTEM, confine, watch

# what no lab needs and a forger does; its use is told, so that somebody reads the notebook
SUSPECT = re.compile(
    r"(?<!\w)(ctypes|os\.write|os\.fdopen|/proc/self|gc\.get_|sys\._getframe|sys\.settrace|addaudithook)"
)
CHECK_CELL = re.compile(r"\s*\w+\.check(_all)?\([^()]*\)\s*")
MOST_CHARACTERS = 2000  # of a message


class TimeLimit(BaseException):
    """Raised in a cell or a check that takes too long; not an Exception, so that `except Exception` lets it pass."""


def open_line():
    """The two ends of the line to the grader; what the submission prints goes nowhere, and it has no input."""
    read, write = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    return read, write


def read_notebook(path: Path):
    """The sources of the notebook's code cells. Raises ValueError where it is none."""
    import nbformat

    try:
        notebook = nbformat.reader.reads(path.read_text(encoding="utf-8-sig"))
        if "cells" not in notebook:
            notebook = nbformat.convert(notebook, 4)
        return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    except Exception as error:
        raise ValueError(f"not a notebook: {type(error).__name__}") from None


def run_cells(sources: list[str], shell, seconds: int, tell) -> None:
    """Run the cells, and tell of each that failed."""
    for number, source in enumerate(sources, 1):
        if CHECK_CELL.fullmatch(source):
            continue
        with time_limit(seconds):
            result = shell.run_cell(source)
            error = result.error_before_exec or result.error_in_exec
            if error is not None:
                tell(cell=number, error=short(error))


class time_limit:
    """Raise TimeLimit in the main thread once the seconds are over, and every 5 from then on."""

    def __init__(self, seconds: int):
        self.seconds = seconds

    def __enter__(self):
        def raise_it(*_):
            raise TimeLimit(f"took longer than {self.seconds} s")

        signal.signal(signal.SIGALRM, raise_it)
        signal.setitimer(signal.ITIMER_REAL, self.seconds, 5)

    def __exit__(self, kind, error, trace):
        signal.setitimer(signal.ITIMER_REAL, 0)
        return kind is not None


def short(error: BaseException) -> str:
    """An error in one line."""
    name = "" if type(error).__name__ in ("Mistake", "TimeLimit") else f"{type(error).__name__}: "
    try:
        return f"{name}{error}"[:MOST_CHARACTERS]
    except Exception:
        return f"{name}an error that cannot be printed"


def defined_twice(sources: list[str]) -> list[str]:
    """The functions that more than one cell defines."""
    counts: Counter[str] = Counter()
    for source in sources:
        try:
            counts.update({node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)})
        except (SyntaxError, ValueError, RecursionError):
            continue
    return [name for name, count in counts.items() if count > 1]


def run_checks(tests: dict[str, str], hidden: bool, env: dict, seconds: int, tell) -> None:
    """Run the checks of that kind in each test file, and tell how each ended."""
    from otter.test_files.exception_test import ExceptionTestFile

    for question, source in sorted(tests.items()):
        for number, case in enumerate(ExceptionTestFile.from_string(source).test_cases):
            if case.hidden is hidden:
                passed, message, start = False, f"took longer than {seconds} s", time.monotonic()
                with time_limit(seconds):
                    try:
                        case.body.call_func(env)
                        passed, message = True, ""
                    except BaseException as error:
                        message = short(error)
                tell(
                    question=question, check=number, hidden=hidden, passed=passed, message=message,
                    name=case.body.test_func.__name__.replace("_", " "), seconds=time.monotonic() - start,
                )  # fmt: skip


def remember(*modules) -> list[tuple]:
    """The functions and classes in those modules and classes, in nf4lab and in its classes, as they are now."""
    package = [module for name, module in sys.modules.items() if name.split(".")[0] == "nf4lab"]
    classes = {value for module in package for value in vars(module).values() if isinstance(value, type)}
    own = [value for value in classes if value.__module__.startswith("nf4lab")]
    return [
        (holder, {name: value for name, value in vars(holder).items() if callable(value)})
        for holder in (*modules, *package, *own)
    ]


def restore(remembered: list[tuple]) -> list[str]:
    """Undo what the submission has replaced in them; the names that were replaced."""
    changed = []
    for holder, before in remembered:
        for name, value in before.items():
            if vars(holder).get(name) is not value:
                changed.append(f"{holder.__name__}.{name}")
                setattr(holder, name, value)
    return changed


def main() -> None:
    folder, lab, readable = Path(sys.argv[1]), sys.argv[2], sys.argv[6:]
    memory_bytes, seconds, cell_seconds = map(int, sys.argv[3:6])
    line_in, line_out = open_line()
    layers = confine(folder, readable, memory_bytes, seconds + 10)  # of processor time: the grader's clock comes first
    sys.path[:] = [path for path in sys.path if path.startswith((*SYSTEM, *readable))]

    def tell(**what) -> None:
        line_out.write(json.dumps(what) + "\n")
        line_out.flush()

    tell(layers=layers)
    os.chdir(folder)
    import builtins
    import importlib

    import numpy as np
    import scipy.stats  # noqa: F401  loaded before the watch, which refuses the programs that libraries look for
    import torch
    from IPython.core.interactiveshell import InteractiveShell
    from otter.execute import Checker
    from otter.test_files.exception_test import ExceptionTestFile  # noqa: F401

    importlib.import_module("nf4lab.labs.feedback")
    if importlib.util.find_spec(f"nf4lab.labs.{lab}"):
        importlib.import_module(f"nf4lab.labs.{lab}")
    try:
        sources = read_notebook(folder / "submission.ipynb")
    except ValueError as error:
        tell(unreadable=str(error))
        return
    shell = InteractiveShell.instance()
    shell.system = shell.system_piped = shell.getoutput = lambda command, *_, **__: None  # `!command` does nothing
    shell.run_line_magic = quiet_pip(shell.run_line_magic)
    tell(loaded=True, twice=defined_twice(sources), suspect=sorted(set(SUSPECT.findall("\n".join(sources)))))
    remembered = remember(builtins, torch, torch.Tensor, np, json, time, signal, Checker)
    watch(folder, readable, lambda what: tell(refused=what))
    run_cells(sources, shell, cell_seconds, tell)
    tell(ran=True, replaced=restore(remembered))
    run_checks(json.loads(line_in.readline()), False, shell.user_ns, cell_seconds, tell)
    tell(public=True, replaced=restore(remembered))
    run_checks(json.loads(line_in.readline()), True, shell.user_ns, cell_seconds, tell)
    tell(done=True)


def quiet_pip(run_line_magic):
    """The shell's line magics without %pip and the like: nothing is installed while grading."""

    def run(name: str, *arguments, **keywords):
        if name not in ("pip", "conda", "mamba", "uv", "system", "sx"):
            return run_line_magic(name, *arguments, **keywords)
        return None

    return run


if __name__ == "__main__":
    main()

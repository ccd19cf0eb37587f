"""Run one submission, shut in, and tell the grader by lines of JSON what came out: not to be called by hand.

    python -B run_submission.py alone '{"folder": ..., "lab": ..., ...}'    this one
    python -B run_submission.py serve '{"lab": ..., "readable": ...}'       many, each in a fork of the loaded process

1. The process is confined (confine.py) and reads FOLDER/submission.ipynb.
2. Its cells run in order, in one IPython shell; a cell that fails or takes too long does not stop the next.
3. The grader sends the public checks; their messages go back to it.
4. Only then does it send the hidden checks: no file and no variable held them while the submission's cells ran.

The cells' metadata is not looked at, so notebooks that lost it are graded like any other.
"""

import ast
import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path

from confine import SYSTEM, confine, die_with_parent, watch

# what no lab needs and a forger does; its use is told, so that somebody reads the notebook
SUSPECT = re.compile(
    r"(?<!\w)(ctypes|os\.write|os\.fdopen|/proc/self|gc\.get_|sys\._getframe|sys\.settrace|addaudithook)"
)
CHECK_CELL = re.compile(r"\s*\w+\.check(_all)?\([^()]*\)\s*")
MOST_CHARACTERS = 2000  # of a message
# modules whose functions a submission must not have replaced when it is checked, and others that take time to load
WATCHED = ("builtins", "torch", "numpy", "json", "time", "signal", "otter.execute", "otter.test_files.exception_test")
LOADED = ("matplotlib.pyplot", "nbformat", "scipy.stats", "IPython.core.interactiveshell")


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
        notebook = json.loads(path.read_text(encoding="utf-8-sig"))
        if "cells" not in notebook:
            notebook = nbformat.convert(nbformat.from_dict(notebook), 4)  # the form before 2014
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
            names = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
        except (SyntaxError, ValueError, RecursionError):
            continue
        counts.update(dict.fromkeys(names, 1))
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
        for holder in (*modules, sys.modules["torch"].Tensor, *package, *own)
    ]


def restore(remembered: list[tuple]) -> list[str]:
    """Undo what the submission has replaced in them; the names that were replaced."""
    changed = []
    for holder, before in remembered:
        for name, value in before.items():
            found = vars(holder).get(name)
            if found is not value:
                setattr(holder, name, value)
                if getattr(found, "__module__", None) != getattr(
                    value, "__module__", None
                ):  # as when torch wraps its own
                    changed.append(f"{holder.__name__}.{name}")
    return changed


def load(lab: str, readable: list[str]) -> None:
    """Import what every submission needs; nothing else of this machine stays on the path."""
    sys.path[:] = [path for path in sys.path if path.startswith((*SYSTEM, *readable))]
    for name in (*WATCHED, *LOADED, "nf4lab.labs.feedback"):
        importlib.import_module(name)
    if importlib.util.find_spec(f"nf4lab.labs.{lab}"):
        importlib.import_module(f"nf4lab.labs.{lab}")


def grade(task: dict, line_in, line_out) -> None:
    """The whole of it, in a process that is already confined."""
    folder, seconds = Path(task["folder"]), task["cell_seconds"]

    def tell(**what) -> None:
        line_out.write(json.dumps(what) + "\n")
        line_out.flush()

    tell(layers=task["layers"])
    os.chdir(folder)
    try:
        sources = read_notebook(folder / "submission.ipynb")
    except ValueError as error:
        tell(unreadable=str(error))
        return
    tell(loaded=True, twice=defined_twice(sources), suspect=sorted(set(SUSPECT.findall("\n".join(sources)))))
    shell, remembered = quiet_shell(), remember(*map(sys.modules.get, WATCHED))
    watch(folder, task["readable"], lambda what: tell(refused=what))
    run_cells(sources, shell, seconds, tell)
    tell(ran=True, replaced=restore(remembered))
    run_checks(json.loads(line_in.readline()), False, shell.user_ns, seconds, tell)
    tell(public=True, replaced=restore(remembered))
    run_checks(json.loads(line_in.readline()), True, shell.user_ns, seconds, tell)
    tell(done=True)


def quiet_shell():
    """An IPython shell without history, in which `!command` and %pip do nothing."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    shell.system = shell.system_piped = shell.getoutput = lambda command, *_, **__: None
    shell.run_line_magic = quiet_pip(shell.run_line_magic)
    return shell


def quiet_pip(run_line_magic):
    """The shell's line magics without %pip and the like: nothing is installed while grading."""

    def run(name: str, *arguments, **keywords):
        if name not in ("pip", "conda", "mamba", "uv", "system", "sx"):
            return run_line_magic(name, *arguments, **keywords)
        return None

    return run


def alone(task: dict) -> None:
    """Run one submission in this process, with the line to the grader at its standard input and output."""
    line_in, line_out = open_line()
    with told_if_broken(line_out.fileno()):
        task["layers"] = confine(Path(task["folder"]), task["readable"], task["memory_bytes"], task["seconds"])
        load(task["lab"], task["readable"])
        grade(task, line_in, line_out)


@contextlib.contextmanager
def told_if_broken(line: int):
    """End the process, and first tell the grader of an error that is not the submission's."""
    try:
        yield
    except BaseException as error:
        os.write(line, json.dumps({"broken": short(error)}).encode() + b"\n")
    finally:
        os._exit(0)


def serve(task: dict) -> None:
    """Load everything once, then run each submission that the grader sends in a fork of this process.

    A message is a task and the two ends of its line; the answer is the number of the process that runs it.
    """
    grader = socket.socket(fileno=os.dup(0))
    open_line()
    load(task["lab"], task["readable"])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, ends, *_ = socket.recv_fds(grader, 2**16, 2)
        if not message:
            return
        child = os.fork()
        if not child:
            grader.close()
            run_in_fork(json.loads(message), *ends)
        for end in ends:
            os.close(end)
        grader.send(str(child).encode())


def run_in_fork(task: dict, read: int, write: int) -> None:
    """Run one submission and end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    die_with_parent()
    os.environ.clear()
    os.environ.update(task["environment"])
    with told_if_broken(write):
        task["layers"] = confine(Path(task["folder"]), task["readable"], task["memory_bytes"], task["seconds"])
        grade(task, os.fdopen(read, "r"), os.fdopen(write, "w", closefd=False))


if __name__ == "__main__":
    {"alone": alone, "serve": serve}[sys.argv[1]](json.loads(sys.argv[2]))

"""Run a submission's cells, then answer the grader's calls of its functions, each question in a process of its own.

1. The notebook comes as a message. Its cells run in order, in one IPython shell; a cell that fails or takes too long
   does not stop the next. What it replaced in torch, numpy and the like is put back, and the package's own solutions
   are taken away (`seal`).
2. The grader asks question by question. Each is answered in a fork, with a budget of processor time. What a fork was
   told, or did to itself, ends with it.

No check, no expected value and no seed ever come here: the grader asks for values, and compares them where no
student's code runs. The cells' metadata is not looked at, so notebooks that lost it are graded like any other.
"""

import ast
import contextlib
import functools
import gc
import importlib
import importlib.util
import inspect
import json
import os
import re
import resource
import signal
import socket
import sys
import types
from collections import Counter
from pathlib import Path

import numba.core.dispatcher
from confine import SYSTEM, watch
from wire import VALUE, Line

# what no lab needs and a forger does; its use is told, so that somebody reads the notebook
SUSPECT = re.compile(
    r"(?<!\w)(ctypes|socket|os\.write|os\.fdopen|/proc/self|gc\.get_|sys\._getframe|sys\.set(?:trace|profile)"
    r"|addaudithook|__file__|__code__|__globals__|tb_frame|sys\.modules|importlib|getsource"
    r"|nf4lab\.labs(?:\.| import )(?:calls|plain|run_\w+|lab\d)|(?<=import )runner|supervise)"
)
CHECK_CELL = re.compile(r"\s*\w+\.check(_all)?\([^()]*\)\s*")
MOST_CHARACTERS = 2000  # of a message
MOST_ANSWER = 2**24  # bytes of a call's value: the grader reads it; the largest that a lab asks for has not a tenth
# modules whose functions a submission must not have replaced when it is checked, and others that take time to load
WATCHED = ("builtins", "torch", "numpy", "json", "time", "signal")
LOADED = ("matplotlib.pyplot", "nbformat", "scipy.stats", "IPython.core.interactiveshell", "otter")
RUNS = {"lab4": "nf4lab.labs.run_kernels", "lab5": "nf4lab.labs.run_layers"}  # what finds things out beside an answer
KEPT = ("nf4lab.labs.calls", "nf4lab.labs.plain", "nf4lab.labs.run_", "nf4lab.labs.ships_log", "nf4lab.kernels.tracing")
WARM = ("lab2", "lab3", "lab5")  # whose notebooks call the package's kernels for the CPU
WEIGHTS = ("lab2", "lab3")  # whose notebooks read the weights of all-MiniLM-L6-v2
OWN = ("runner", "supervise", "confine", "wire")
SEALED = {"lab5": ("nf4lab.layers", "nf4lab.beyond", "nf4lab.checkpoints")}  # the others: all of nf4lab but KEPT
FUNCTIONS = (types.FunctionType, type, numba.core.dispatcher.Dispatcher, functools._lru_cache_wrapper)


class TimeLimit(BaseException):
    """Raised in a cell or a call that takes too long; not an Exception, so that `except Exception` lets it pass."""


def load(lab: str, readable: list[str]) -> None:
    """Import what every submission needs; nothing else of this machine stays on the path. No check is among it."""
    sys.path[:] = [path for path in sys.path if path.startswith((*SYSTEM, *readable))]
    for name in (
        *WATCHED,
        *LOADED,
        "nf4lab",
        "nf4lab.labs.calls",
        "nf4lab.models",
        *([RUNS[lab]] if lab in RUNS else []),
    ):
        importlib.import_module(name)
    for number in range(1, 10):
        if importlib.util.find_spec(f"nf4lab.labs.lab{number}"):
            empty = _without_checks(f"nf4lab.labs.lab{number}")
            sys.modules[empty.__name__] = empty
            setattr(sys.modules["nf4lab.labs"], f"lab{number}", empty)
    if lab == "lab4" and not list(Path("/dev").glob("nvidia*")):
        os.environ["NUMBA_ENABLE_CUDASIM"] = "1"  # as its notebook sets it where there is no GPU
        importlib.import_module("numba.cuda")
    if lab in WARM:
        warm_up()
    if lab in WEIGHTS:
        check_weights()
    sys.setswitchinterval(1e-4)  # of threads: the simulator's main one asks the others for as long as its turn lasts
    gc.collect()
    gc.freeze()  # what is loaded stays: no fork looks through it for garbage, or copies its pages for that


def _without_checks(name: str) -> types.ModuleType:
    """What stands for a module of checks: answers are not to be had from it."""
    module = types.ModuleType(name, "What the checks compare is not here while they are made.")
    if name.endswith("lab5"):  # notebooks of the first edition import the ship's log from it
        vars(module).update(vars(importlib.import_module("nf4lab.labs.ships_log")))
    return module


def warm_up() -> None:
    """Compile the package's kernels for the CPU once, before anything forks."""
    import torch

    import nf4lab

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for double_quant in (False, True):
            q = nf4lab.quantize(torch.ones(384, 384, dtype=dtype), "nf4", 64, double_quant=double_quant)
            q.dequantize()


def check_weights() -> None:
    """Check the weights' 90 MB once, before anything forks: every fork knows that they are the published ones."""
    from nf4lab.models import minilm_path

    with contextlib.suppress(Exception):  # where they can't be had, the notebook's own cell says so
        minilm_path()


def run_or_tell(task: dict, line: Line) -> None:
    """`run`, and a word on an error that is not the submission's."""
    try:
        run(task, line)
    except BaseException as error:
        from nf4lab.labs import plain

        line.send(VALUE, plain.dumps({"broken": short(error)}))


def run(task: dict, line: Line) -> None:
    """The whole of it, in a process that is confined already."""
    from nf4lab.labs import plain

    def tell(**what) -> None:
        line.send(VALUE, plain.dumps(what))

    os.chdir(task["folder"])
    try:
        sources = read_notebook(plain.loads(line.receive()[1]))
    except ValueError as error:
        tell(unreadable=str(error))
        return
    shell, remembered = quiet_shell(), remember(*map(sys.modules.get, WATCHED))
    unwatched = watch(Path(task["folder"]), task["readable"], lambda what: tell(refused=what))
    for name in OWN:  # so that a cell does not find what looks after it by its name
        sys.modules.pop(name, None)
    tell(ready=True)  # the first word: what goes wrong from here on is the submission's doing
    tell(twice=defined_twice(sources), suspect=sorted(set(SUSPECT.findall("\n".join(sources)))))
    run_cells(sources, shell, task["cell_seconds"], tell)
    told = {"ran": True, "replaced": restore(remembered), "names": inventory(shell.user_ns)}
    seal(task["lab"])
    tell(**told)  # upon which the grader ends all processes that the cells have started: they may hold the package open
    while message := line.receive():
        answer_question(plain.loads(message[1]), shell.user_ns, line, unwatched)


def read_notebook(text: str) -> list[str]:
    """The sources of the notebook's code cells. Raises ValueError where it is none."""
    import nbformat

    try:
        notebook = json.loads(text)
        if "cells" not in notebook:
            notebook = nbformat.convert(nbformat.from_dict(notebook), 4)  # the form before 2014
        cells = [cell for cell in notebook["cells"] if isinstance(cell, dict) and cell.get("cell_type") == "code"]
        return ["".join(cell.get("source") or []) for cell in cells]
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
    """Raise TimeLimit in the main thread after these seconds of processor time, or four times as many by the clock."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __enter__(self):
        def raise_it(*_):
            raise TimeLimit(f"took longer than {self.seconds:g} s")

        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, raise_it)
        signal.setitimer(signal.ITIMER_PROF, self.seconds, 5)
        signal.setitimer(signal.ITIMER_REAL, 4 * self.seconds, 5)

    def __exit__(self, kind, error, trace):
        signal.setitimer(signal.ITIMER_PROF, 0)
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
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        counts.update(dict.fromkeys(names, 1))
    return [name for name, count in counts.items() if count > 1]


def inventory(env: dict) -> dict:
    """The notebook's variables by name: what its functions have, and other values in words."""
    from nf4lab.labs.calls import describe

    found = {}
    for name, value in list(env.items()):
        if isinstance(name, str) and not name.startswith("_"):
            with time_limit(2), contextlib.suppress(Exception):  # a value's own words may never end
                is_function = callable(value)
                found[name] = {
                    "callable": is_function,
                    "has": [a for a in ("py_func",) if is_function and hasattr(value, a)],
                    "text": "" if is_function else describe(value),
                }
    return found


def answer_question(task: dict, env: dict, line: Line, unwatched) -> None:
    """Answer the calls of one question in a fork, and pass them on; what it can't answer any more is told.

    Each message down has one answer up. A fork that has been ended answers "gone" to all that is left.
    """
    mine, its = socket.socketpair()
    with unwatched():
        child = os.fork()
    if not child:
        mine.close()
        with contextlib.suppress(BaseException):
            answer_calls(task, env, Line(its.fileno(), its.fileno()))
        os._exit(0)
    its.close()
    fork = Line(mine.fileno(), mine.fileno())
    line.send(VALUE, _gone(started=True))
    while message := line.receive():
        if _is_end(message[1]):
            break
        try:
            fork.send(*message)
            answer = fork.receive()
        except OSError:
            answer = None
        line.send(VALUE, answer[1] if answer else _gone(gone=True))
    mine.close()
    with contextlib.suppress(OSError), unwatched():
        os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)
    line.send(VALUE, _gone(ended=True))


def _gone(**what) -> bytes:
    from nf4lab.labs import plain

    return plain.dumps(what)


def _is_end(body: bytes) -> bool:
    from nf4lab.labs import plain

    return len(body) < 100 and plain.loads(body) == {"end": True}


def answer_calls(task: dict, env: dict, line: Line) -> None:
    """The fork of one question: call what the grader asks for, within its budget of processor time."""
    from nf4lab.labs import calls, plain

    seconds = task["seconds"]
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    most = seconds + 2 if hard == resource.RLIM_INFINITY else min(seconds + 2, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (most, most))  # for what goes on when TimeLimit is raised
    with time_limit(seconds):
        while message := line.receive():
            asked = plain.loads(message[1])
            extra = {name: _from_source(name, text) for name, text in asked.get("extra", {}).items()}
            others = {name: _ask_back(name, n, line) for name, n in asked["others"].items()}
            signal.setitimer(signal.ITIMER_REAL, 4 * seconds, 5)
            try:
                given = {"value": calls.answer(asked["task"], env, others, extra)}
            except calls.Mistake as mistake:
                given = {"mistake": mistake.message}
            except TimeLimit as error:
                given = {"late": str(error)}
            except BaseException as error:
                given = {"mistake": short(error)}
            signal.setitimer(signal.ITIMER_REAL, 0)
            body = plain.dumps(given)
            if len(body) > MOST_ANSWER:
                text = f"the result takes {len(body) / 2**20:.0f} MB, more than any that is asked for"
                body = plain.dumps({"mistake": text})
            line.send(VALUE, body)


def _from_source(name: str, text: str):
    from nf4lab.labs.run_kernels import made

    return made(name.strip(), text)


def _ask_back(name: str, n_arguments: int, line: Line):
    """A function that the grader answers while a call is under way: a correct version of another question's."""
    from nf4lab.labs import plain

    def ask(*args):
        line.send(VALUE, plain.dumps({"other": name, "args": args}))
        answer = plain.loads(line.receive()[1])
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["value"]

    places = [inspect.Parameter(f"_{i}", inspect.Parameter.POSITIONAL_ONLY) for i in range(n_arguments)]
    ask.__signature__ = inspect.Signature(places)
    return ask


def quiet_shell():
    """An IPython shell without history, in which `!command` and %pip do nothing, and Colab's imports no harm."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    shell.system = shell.system_piped = shell.getoutput = lambda command, *_, **__: None
    shell.run_line_magic = quiet_pip(shell.run_line_magic)
    for name in (
        "google",
        "google.colab",
        *(f"google.colab.{part}" for part in ("drive", "files", "output", "userdata")),
    ):
        sys.modules.setdefault(name, _Nothing(name))
    return shell


class _Nothing(types.ModuleType):
    """A module in which every name is a function that does nothing: Colab's, elsewhere."""

    __path__ = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or (lambda *_, **__: None)


def quiet_pip(run_line_magic):
    """The shell's line magics without %pip and the like: nothing is installed while grading."""

    def run(name: str, *arguments, **keywords):
        if name not in ("pip", "conda", "mamba", "uv", "system", "sx"):
            return run_line_magic(name, *arguments, **keywords)
        return None

    return run


def remember(*modules) -> list[tuple]:
    """The functions and classes in those modules and classes, in nf4lab and in its classes, as they are now."""
    package = [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "nf4lab"]
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


def seal(lab: str) -> None:
    """Take the package's solutions away: a function of nf4lab that an answer might call refuses from now on.

    The function objects themselves are changed, so that a reference kept from before helps nobody.
    """
    closed = SEALED.get(lab, ("nf4lab",))
    for name, module in list(sys.modules.items()):
        if name.startswith(closed) and not name.startswith(KEPT):
            for value in list(vars(module).values()):
                if isinstance(value, FUNCTIONS) and getattr(value, "__module__", "") == name:
                    _seal(value)


def _seal(value) -> None:
    if isinstance(value, types.FunctionType):
        old = value.__code__
        value.__code__ = _refuse.__code__.replace(
            co_filename=old.co_filename, co_name=old.co_name, co_freevars=old.co_freevars
        )
    elif isinstance(value, type):
        for part in list(vars(value).values()):
            for function in (part, getattr(part, "__func__", None), getattr(part, "fget", None)):
                if isinstance(function, FUNCTIONS) and not isinstance(function, type):
                    _seal(function)
    elif isinstance(value, numba.core.dispatcher.Dispatcher):
        if value.overloads:
            value.disable_compile()
            value._clear()
            value.overloads.clear()
        _seal(value.py_func)
    if inner := getattr(value, "__wrapped__", None):  # functools.cache, contextlib.contextmanager
        _seal(inner)


def _refuse(*_, **__):
    raise PermissionError("nf4lab is not to be called while an answer is checked")

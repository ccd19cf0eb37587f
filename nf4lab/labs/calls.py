"""Call a student's function: here, or in the process that holds it while a notebook is graded.

    given    the student's function of a name
    call     what it returns
    beside   what a function of this package finds out about it, where it lives: a trace, a gradient

In a notebook all of it happens in one process. While grading, `given` finds a `Remote`, and nothing but plain data
(nf4lab.labs.plain) comes from the process that runs the student's code: what the checks compare with stays here.
"""

import contextlib
import difflib
import functools
import importlib
import inspect
import itertools
import os
import random
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PACKAGE = str(Path(__file__).parents[1]) + os.sep  # as imported: a code object's file name does not resolve links
SEED = 20_240_501  # what random numbers start from in each check


class Mistake(AssertionError):
    """A check's finding, in words for the student; `causes` are the mistakes that have been confirmed."""

    def __init__(self, message: str, causes: tuple[str, ...] = ()):
        super().__init__(message + (f"\nLikely cause: {'; or: '.join(causes)}." if causes else ""))
        self.message, self.causes = message, tuple(causes)


class Remote:
    """A student's function or class that lives in another process.

    ask: sends {"name", "method", "args", "kwargs", …} there and returns what came back, with the functions that may be
    called back meanwhile. Raises Mistake where the call ends in one.
    """

    def __init__(self, name: str, ask: Callable, attributes: tuple[str, ...] = ()):
        self.__name__, self._ask, self._attributes = name, ask, attributes

    def __call__(self, *args, **kwargs):
        return call(self, *args, **kwargs)

    def has(self, attribute: str) -> bool:
        """Whether the object there has the attribute."""
        return attribute in self._attributes


def has(function, attribute: str) -> bool:
    """Whether a student's object, here or there, has the attribute."""
    return function.has(attribute) if isinstance(function, Remote) else hasattr(function, attribute)


def given(env: Mapping[str, object], name: str) -> Callable:
    """The student's function of that name. Raises Mistake where there is none, with the name that is most like it."""
    found = env.get(name)
    if callable(found):
        return found
    if found is not None:
        raise Mistake(f"`{name}` should be a function; it is {describe(found)}")
    own = [key for key, value in env.items() if callable(value) and not key.startswith("_")]
    near = difflib.get_close_matches(name, own, n=1, cutoff=0.5)
    hint = f" There is `{near[0]}`: was it renamed?" if near else " Was its cell deleted, or did it end in an error?"
    raise Mistake(f"there is no function `{name}`.{hint}")


def call(function: Callable, *args, package: bool = False, others: Mapping[str, Callable] | None = None,
         method: str | None = None, name: str | None = None, **kwargs):  # fmt: skip
    """What the student's function returns for copies of the arguments.

    others: correct versions of what the other questions ask for, by name. The student's own are put aside during the
    call, so that a mistake costs the points of its own question and no more.
    method: call this attribute of it instead, as `py_func` of a device function.
    name: what messages call it, if not by its own.

    Raises Mistake where it ends in an error (naming it, and the function's line), where it returns nothing or `...`,
    and, unless `package`, where it calls nf4lab: the package is what the answer is compared with.
    """
    if isinstance(function, Remote):
        task = {"name": function.__name__, "args": args, "kwargs": kwargs, "package": package, "method": method}
        return function._ask(task, others or {})
    function = getattr(function, method) if method else function
    name = name or getattr(function, "__name__", "your function")
    return _call_here(name, function, copied(args), copied(kwargs), package, others or {})


def call_each(function: Callable, arguments: list[tuple]) -> list:
    """What the student's function, which lives here, returns for each of these arguments.

    It counts as one `call`: what that sets and puts back would take longer than a short answer.
    """

    @functools.wraps(function)
    def each():
        return [function(*one) for one in arguments]

    return call(each, name=getattr(function, "__name__", "your function"))


def beside(run: Callable, *args, **kwargs):
    """What `run`, a function of this package, returns for the student's objects among the arguments.

    It runs where the student's objects live, and returns plain data. Raises Mistake where it raises one.
    """
    remote = next((part for part in _parts(args) if isinstance(part, Remote)), None)
    if remote is None:
        return run(*args, **kwargs)
    args = [_named(part) for part in args]
    return remote._ask({"run": f"{run.__module__}:{run.__name__}", "args": args, "kwargs": kwargs}, {})


def _parts(values) -> list:
    return [part for value in values for part in (value.values() if isinstance(value, dict) else [value])]


def _named(value):
    """An argument of `beside` as it travels: a student's object by its name."""
    if isinstance(value, dict):
        return {key: _named(part) for key, part in value.items()}
    return {"student": value.__name__} if isinstance(value, Remote) else value


def answer(task: dict, env: Mapping[str, object], others: Mapping[str, Callable], extra: Mapping[str, object]):
    """What a task of `call` or `beside` asks for, in the process where the student's objects live.

    extra: functions that are no student's, by name: those that a check must not pass.
    """
    known = {**env, **extra}
    if "run" not in task:
        return call(known[task["name"]], *task["args"], package=task["package"], others=others,
                    method=task["method"], **task["kwargs"])  # fmt: skip

    def found(value):
        if isinstance(value, dict):
            return known[value["student"]] if "student" in value else {k: found(part) for k, part in value.items()}
        return value

    module, name = task["run"].split(":")
    return getattr(importlib.import_module(module), name)(*map(found, task["args"]), **task["kwargs"])


def _call_here(name: str, function: Callable, args: tuple, kwargs: dict, package: bool, others: Mapping[str, Callable]):
    borrowed = []

    def watch(frame, event, arg):
        filename = frame.f_code.co_filename
        if event == "call" and filename.startswith(PACKAGE) and filename != __file__:
            borrowed.append(frame.f_code.co_name)
            raise Mistake(_borrowed(name, borrowed[0]))

    before = sys.getprofile()
    try:
        with usual_state(), put_aside(function, others):
            if not package:
                threading.setprofile(watch)
                sys.setprofile(watch)
            result = function(*args, **kwargs)
    except Exception as error:
        sys.setprofile(before)
        if borrowed:
            raise Mistake(_borrowed(name, borrowed[0])) from None
        raise Mistake(
            f"`{name}` ended in {type(error).__name__}: {error_text(error)}{_line(error, function)}"
        ) from None
    finally:
        threading.setprofile(None)
        sys.setprofile(before)
    if borrowed:
        raise Mistake(_borrowed(name, borrowed[0]))
    if result is None or result is Ellipsis:
        raise Mistake(f"`{name}` returned {result}: it is not written yet, or a `return` is missing")
    return result


def copied(value):
    """The value with tensors, arrays and lists of its own: what a function does to its arguments stays with it."""
    if type(value) is Tensor:
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, np.ndarray):
        return value.copy()
    if type(value) in (list, tuple):
        return type(value)(map(copied, value))
    return {key: copied(part) for key, part in value.items()} if type(value) is dict else value


@contextlib.contextmanager
def usual_state():
    """Torch and the random numbers as they are at the start: float32, on the CPU, with gradients, from one seed.

    What was set before comes back at the end.
    """
    dtype, device, grad = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    numbers = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    exact, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    floats = np.geterr()
    try:
        torch.set_default_dtype(torch.float32)
        if device.type != "cpu":
            torch.set_default_device(None)
        if exact:  # the call itself loads a compiler, so not without need
            torch.use_deterministic_algorithms(False)
        torch.random.default_generator.manual_seed(SEED)
        np.random.seed(SEED)  # noqa: NPY002
        random.seed(SEED)
        np.seterr(divide="warn", over="warn", under="ignore", invalid="warn")
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)
        if device.type != "cpu":
            torch.set_default_device(device)
        torch.set_grad_enabled(grad)
        if exact or torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(exact, warn_only=warn)
        torch.set_rng_state(numbers[0])
        np.random.set_state(numbers[1])  # noqa: NPY002
        random.setstate(numbers[2])
        np.seterr(**floats)


def before(others: Mapping[str, Callable], name: str) -> dict[str, Callable]:
    """The functions that stand before this one: an answer stands on earlier questions, and is lent no later one."""
    return dict(itertools.takewhile(lambda item: item[0] != name, others.items()))


@contextlib.contextmanager
def put_aside(function: Callable, others: Mapping[str, Callable]):
    """Let the function find the others in place of the functions of those names, except for its own."""
    variables = getattr(inspect.unwrap(function) if callable(function) else function, "__globals__", {})
    names = [name for name in others if name != getattr(function, "__name__", None)]
    with standing_in(variables, **{name: _stand_in(others[name], variables.get(name)) for name in names}):
        try:
            yield
        finally:
            sys.setprofile(None)


def _stand_in(other: Callable, own: Callable | None) -> Callable:
    """The other function, called as the student's own is: by its parameters' names, whatever they are.

    It may call nf4lab: the watch on the student's code rests meanwhile. Where the student's own takes more arguments
    than asked for, and gets them, it is called itself.
    """

    @functools.wraps(other)
    def run(*args, **kwargs):
        if own and (kwargs or len(args) > _most_arguments(other)):
            bound = inspect.signature(own).bind(*args, **kwargs)
            if len(bound.args) > _most_arguments(other) or bound.kwargs:
                return own(*args, **kwargs)
            args = bound.args
        watch = sys.getprofile()
        sys.setprofile(None)
        try:
            return other(*args) if own else other(*args, **kwargs)
        finally:
            sys.setprofile(watch)

    return run


def _most_arguments(function: Callable) -> int:
    return len(inspect.signature(function).parameters)


@contextlib.contextmanager
def standing_in(names: dict, **objects):
    """The names of a notebook, or a function's globals, bound to other objects meanwhile: kernels and classes too."""
    before = {name: names[name] for name in objects if name in names}
    names.update(objects)
    try:
        yield
    finally:
        for name in objects:
            names.pop(name, None)
        names.update(before)


def describe(value) -> str:
    """A value in a few words: shape and dtype of a tensor, a short repr of anything else."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "a tensor" if isinstance(value, Tensor) else "a NumPy array"
        if value.size == 1 if isinstance(value, np.ndarray) else value.numel() == 1:
            return f"{value.item()} ({kind}, {dtype_name(value)})"
        return f"{kind} of shape {tuple(value.shape)}, {dtype_name(value)}"
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 80 else text[:77] + "..."


def dtype_name(value) -> str:
    """A tensor's or array's dtype, as `float32`."""
    return str(value.dtype).removeprefix("torch.")


def error_text(error: BaseException) -> str:
    """An error's own words, or that it has none that can be read."""
    try:
        return str(error)
    except Exception:
        return "(its text cannot be read)"


def _line(error: Exception, function: Callable) -> str:
    """Where in the student's function it happened: the last frame of the traceback in the function's own file."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    return f"\nIn the line: {own[-1].line}" if own and own[-1].line else ""


def _borrowed(name: str, called: str) -> str:
    return f"`{name}` calls nf4lab (`{called}`). Write it yourself: the package is what it is compared with"

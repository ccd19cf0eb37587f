"""Feedback that teaches: what was expected, what came, at which index, and the likely cause.

A check of a lab calls `given` for the student's function, `call` to run it and `same` or `close` to compare. A likely
mistake is named by what it would give: `causes` maps a sentence to the result of a submission that makes the mistake,
or to a function that recognises it. Public and hidden checks use the same helpers.
"""

import contextlib
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

PACKAGE = str(Path(__file__).parents[1]) + os.sep  # as imported: a code object's file name does not resolve links
LABS = str(Path(__file__).parent) + os.sep
Causes = Mapping[str, object]  # a likely cause -> what it would give, or a function from the result to True or False


class Mistake(AssertionError):
    """A check's finding, in words for the student."""


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


def call(function: Callable, *args, package: bool = False, others: Mapping[str, Callable] | None = None, **kwargs):
    """What the student's function returns.

    others: correct versions of what the other questions ask for, by name. The student's own are put aside during the
    call, so that a mistake costs the points of its own question and no more.

    Raises Mistake where it ends in an error (naming it, and the function's line), where it returns nothing or `...`,
    and, unless `package`, where it calls nf4lab: the package is what the answer is compared with.
    """
    name = getattr(function, "__name__", "your function")
    borrowed = []

    def watch(frame, event, arg):
        filename = frame.f_code.co_filename
        if event == "call" and filename.startswith(PACKAGE) and not filename.startswith(LABS):
            borrowed.append(frame.f_code.co_name)
            raise Mistake(_borrowed(name, borrowed[0]))

    before = sys.getprofile()
    try:
        with _put_aside(function, others or {}):
            sys.setprofile(before if package else watch)
            result = function(*args, **kwargs)
    except Exception as error:
        sys.setprofile(before)
        if borrowed:
            raise Mistake(_borrowed(name, borrowed[0])) from None
        raise Mistake(f"`{name}` ended in {type(error).__name__}: {error}{_line(error, function)}") from None
    finally:
        sys.setprofile(before)
    if borrowed:
        raise Mistake(_borrowed(name, borrowed[0]))
    if result is None or result is Ellipsis:
        raise Mistake(f"`{name}` returned {result}: it is not written yet, or a `return` is missing")
    return result


@contextlib.contextmanager
def _put_aside(function: Callable, others: Mapping[str, Callable]):
    """Let the function find the others in place of the functions of those names, except for its own."""
    variables, missing = getattr(function, "__globals__", {}), object()
    names = [name for name in others if name != getattr(function, "__name__", None)]
    before = {name: variables.get(name, missing) for name in names}
    variables.update({name: _unwatched(others[name]) for name in names})
    try:
        yield
    finally:
        sys.setprofile(None)
        for name, value in before.items():
            if value is missing:
                variables.pop(name, None)
            else:
                variables[name] = value


def _unwatched(other: Callable) -> Callable:
    """The function, which may call nf4lab: the watch on the student's code rests meanwhile."""

    def run(*args, **kwargs):
        watch = sys.getprofile()
        sys.setprofile(None)
        try:
            return other(*args, **kwargs)
        finally:
            sys.setprofile(watch)

    return run


@contextlib.contextmanager
def standing_in(names: dict, **objects):
    """The names of a notebook, or a function's globals, bound to other objects meanwhile: kernels and classes too."""
    before = {name: names[name] for name in objects if name in names}
    names.update(objects)
    try:
        yield
    finally:
        for name in objects:
            del names[name]
        names.update(before)


def same(got, expected, what: str, causes: Causes | None = None) -> None:
    """Pass where got equals expected to the bit: tensors of one shape and dtype, or numbers, strings, tuples.

    what: the result's name in messages, as `codes`. Raises Mistake otherwise.
    """
    if not isinstance(expected, Tensor):
        if type(got) is bool or isinstance(got, Tensor) or got != expected:
            raise Mistake(f"{what}: expected {expected}, got {describe(got)}{_likely(got, causes)}")
        return
    got = _tensor_like(got, expected, what, causes)
    if got.dtype != expected.dtype:
        raise Mistake(f"{what}: expected dtype {_dtype(expected)}, got {_dtype(got)}{_likely(got, causes)}")
    wrong = ~((got == expected) | (got.isnan() & expected.isnan()))
    if wrong.any():
        raise Mistake(_first_difference(got, expected, wrong, what) + _likely(got, causes))


def close(got, expected, what: str, tolerance: float, causes: Causes | None = None) -> None:
    """Pass where got lies within `tolerance` of expected, relative to the largest magnitude expected.

    tolerance: at most this share; the check that sets it says why. Raises Mistake otherwise, as `same` does.
    """
    number = not isinstance(expected, Tensor)
    expected = torch.as_tensor(expected, dtype=torch.float64 if number else None)
    if number and isinstance(got, int | float) and not isinstance(got, bool):
        got = torch.tensor(got, dtype=torch.float64)
    got = _tensor_like(got, expected, what, causes)
    if not number and got.dtype != expected.dtype:
        raise Mistake(f"{what}: expected dtype {_dtype(expected)}, got {_dtype(got)}{_likely(got, causes)}")
    wrong = ~((got.double() - expected.double()).abs() <= tolerance * expected.double().abs().max())
    if wrong.any():
        raise Mistake(_first_difference(got, expected, wrong, what) + _likely(got, causes))


def that(condition: bool, message: str, got=None, causes: Causes | None = None) -> None:
    """Pass where the condition holds. Raises Mistake with the message, and the likely cause, otherwise."""
    if not condition:
        raise Mistake(message + _likely(got, causes))


def describe(value) -> str:
    """A value in a few words: shape and dtype of a tensor, a short repr of anything else."""
    if isinstance(value, Tensor):
        if value.numel() == 1:
            return f"{value.item()} (a tensor, {_dtype(value)})"
        return f"a tensor of shape {tuple(value.shape)}, {_dtype(value)}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _tensor_like(got, expected: Tensor, what: str, causes: Causes | None) -> Tensor:
    if not isinstance(got, Tensor):
        raise Mistake(f"{what}: expected a torch.Tensor, got {describe(got)}")
    if got.shape != expected.shape:
        shapes = f"expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
        raise Mistake(f"{what}: {shapes}{_likely(got, causes)}")
    return got.detach().cpu()


def _first_difference(got: Tensor, expected: Tensor, wrong: Tensor, what: str) -> str:
    index = tuple(wrong.nonzero()[0].tolist())
    at = f"[{', '.join(map(str, index))}]" if index else ""
    share = f" ({int(wrong.sum())} of {wrong.numel()} differ)" if index else ""
    return f"{what}{at}: expected {_number(expected[index])}, got {_number(got[index])}{share}"


def _likely(got, causes: Causes | None) -> str:
    for cause, wrong in (causes or {}).items():
        if _recognised(got, wrong):
            return f"\nLikely cause: {cause}."
    return ""


def _recognised(got, wrong) -> bool:
    """Whether got is what a mistake gives. A recogniser that fails on an odd result has not recognised it."""
    try:
        if callable(wrong):
            return bool(wrong(got))
        if isinstance(wrong, Tensor):
            return got.shape == wrong.shape and torch.allclose(got.double(), wrong.double(), rtol=1e-5, atol=0)
        return bool(got == wrong)
    except Exception:
        return False


def _line(error: Exception, function: Callable) -> str:
    """Where in the student's function it happened: the last frame of the traceback in the function's own file."""
    code = getattr(function, "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    return f"\nIn the line: {own[-1].line}" if own and own[-1].line else ""


def _borrowed(name: str, called: str) -> str:
    return f"`{name}` calls nf4lab (`{called}`). Write it yourself: the package is what it is compared with"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _number(value: Tensor) -> str:
    return f"{value.item():.9g}" if value.dtype.is_floating_point else str(value.item())

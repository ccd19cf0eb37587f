"""Feedback that teaches: what was expected, what came, at which index, and the cause where it is certain.

A check of a lab calls `given` for the student's function, `call` to run it and `same` or `close` to compare. `causes`
maps a sentence to what a submission that makes the mistake gives: one value, or a list of them. A cause is told only
where the result is that value. With `Cases` it has to be so in each of several calls, since one number is soon equal
by chance.

A type or a dtype that is not the one asked for is told as that, where the values are right; hidden checks let it pass
(`forgiving`), so that it costs the points of the visible check and no more. Public and hidden checks are otherwise the
same.
"""

import contextlib
import contextvars
from collections.abc import Callable, Mapping

import numpy as np
import otter.test_files
import torch
from torch import Tensor

from nf4lab.labs.calls import (
    Mistake,
    before,
    beside,
    call,
    copied,
    describe,
    dtype_name,
    given,
    has,
    put_aside,
    standing_in,
    usual_state,
)  # fmt: skip

__all__ = [
    "Cases", "Mistake", "at_once", "before", "beside", "call", "close", "copied", "describe", "forgiving", "given",
    "has", "number", "pair", "plain", "put_aside", "same", "standing_in", "test_case", "that", "usual_state",
]  # fmt: skip
Causes = Mapping[
    str, object
]  # a likely cause -> what it gives, a list of such, or a function that tells it for certain
STRICT = contextvars.ContextVar("strict", default=True)
AT_ONCE = contextvars.ContextVar("at_once", default=False)


class test_case(otter.test_files.test_case):
    """A check as otter has it, run in torch's usual state, whatever the notebook has set."""

    def call_func(self, global_environment):
        with usual_state():
            super().call_func(global_environment)


@contextlib.contextmanager
def forgiving():
    """Compare values only: a list for a tensor, or int64 for uint8, passes."""
    token = STRICT.set(False)
    try:
        yield
    finally:
        STRICT.reset(token)


@contextlib.contextmanager
def at_once():
    """Let `Cases` raise at the first that differs, where nobody is told causes."""
    token = AT_ONCE.set(True)
    try:
        yield
    finally:
        AT_ONCE.reset(token)


class Cases:
    """Several calls of one function, compared together; the first that differs is told at the end.

    A cause is told only if it explains the result of every call, those included that came out right.
    of_few: the result is one of a few, which is soon found by chance; then a cause must also explain two that differ.
    """

    def __init__(self, of_few: bool = False):
        self._of_few, self._first, self._calls = of_few, None, []

    def __enter__(self):
        return self

    def same(self, got, expected, what: str, causes: Causes | None = None) -> None:
        """As the function `same`, at the end."""
        self._add(same, got, expected, what, (), causes or {})

    def close(self, got, expected, what: str, tolerance: float, causes: Causes | None = None) -> None:
        """As the function `close`, at the end."""
        self._add(close, got, expected, what, (tolerance,), causes or {})

    def _add(self, compare: Callable, got, expected, what: str, tolerance: tuple, causes: Causes) -> None:
        try:
            compare(got, expected, what, *tolerance)
        except Mistake as mistake:
            if AT_ONCE.get():
                raise
            self._first = self._first or mistake
        causes = {cause: expected if wrong is None else wrong for cause, wrong in causes.items()}
        self._calls.append((copied(plain(got)), expected, tolerance, causes))

    def __exit__(self, kind, error, trace):
        if kind is None and self._first:
            named = dict.fromkeys(cause for *_, causes in self._calls for cause in causes)
            raise Mistake(self._first.message, tuple(filter(self._certain, named)))

    def _certain(self, cause: str) -> bool:
        """Whether it explains every call that it was asked about, and at least one that it would have made wrong."""
        asked = [(got, expected, of, causes[cause]) for got, expected, of, causes in self._calls if cause in causes]
        explains = all(_recognised(got, wrong, *tolerance) for got, _, tolerance, wrong in asked)
        differs = any(not _recognised(expected, wrong, *tolerance) for _, expected, tolerance, wrong in asked)
        return explains and differs and (not self._of_few or len({repr(wrong) for *_, wrong in asked}) > 1)


def same(got, expected, what: str, causes: Causes | None = None) -> None:
    """Pass where got equals expected to the bit: tensors of one shape, or numbers, strings, tuples.

    what: the result's name in messages, as `codes`. Raises Mistake otherwise.
    """
    if isinstance(expected, Tensor):
        got, odd = _as_tensor(got, expected, what, causes)
        wrong = ~_equal(got, expected)
        if wrong.any():
            raise Mistake(_first_difference(got, expected, wrong, what) + odd, _likely(got, causes))
        _not_odd(odd, what)
        return
    number = plain(got.tolist() if isinstance(expected, tuple) and isinstance(got, Tensor | np.ndarray) else got)
    if type(number) is bool or isinstance(number, Tensor | np.ndarray) or not _is(number, expected):
        raise Mistake(f"{what}: expected {expected}, got {describe(got)}", _likely(number, causes))


def close(got, expected, what: str, tolerance: float, causes: Causes | None = None) -> None:
    """Pass where got lies within `tolerance` of expected, relative to the largest magnitude expected.

    tolerance: at most this share; the check that sets it says why. Raises Mistake otherwise, as `same` does.
    """
    odd = ""
    if isinstance(expected, Tensor):
        got, odd = _as_tensor(got, expected, what, causes)
        got_values = got
    else:
        number = plain(got)
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise Mistake(f"{what}: expected a number, {expected:.9g}; got {describe(got)}", _likely(number, causes))
        got_values, expected = (torch.tensor(float(v), dtype=torch.float64) for v in (number, expected))
    wrong = ~_near(got_values, expected, tolerance)
    if wrong.any():
        text = _first_difference(got_values, expected, wrong, what) + odd
        raise Mistake(text, _likely(got_values if odd or isinstance(got, Tensor) else number, causes, tolerance))
    _not_odd(odd, what)


def that(condition: bool, message: str, *causes: str) -> None:
    """Pass where the condition holds. Raises Mistake with the message, and causes that are certain, otherwise."""
    if not condition:
        raise Mistake(message, causes)


def pair(got, n: int, what: str) -> tuple:
    """The parts of a tuple or list of n. Raises Mistake with `what` where it is none."""
    that(isinstance(got, tuple | list) and len(got) == n, f"{what}; got {describe(got)}")
    return tuple(got)


def number(value, what: str) -> float:
    """A number that may come as a NumPy scalar or a tensor of one element. Raises Mistake where it is none."""
    value = plain(value)
    value = value.item() if isinstance(value, Tensor | np.ndarray) and value.size == 1 else value
    that(isinstance(value, int | float), f"{what}: expected a number, got {describe(value)}")
    return float(value)


def plain(value):
    """Numbers as Python has them, tuples for lists: what NumPy scalars, 0-d tensors and lists stand for."""
    if isinstance(value, np.generic) or (isinstance(value, Tensor | np.ndarray) and value.ndim == 0):
        return value.item()
    return tuple(map(plain, value)) if isinstance(value, list | tuple) else value


def _is(got, expected) -> bool:
    if isinstance(expected, tuple):
        return isinstance(got, tuple) and len(got) == len(expected) and all(map(_is, got, expected))
    if type(got) is bool and type(expected) is not bool:
        return False
    return isinstance(got, type(expected) | int | float) and got == expected


def _as_tensor(got, expected: Tensor, what: str, causes: Causes | None) -> tuple[Tensor, str]:
    """got as a tensor of expected's dtype, and what was odd about it: another type or dtype."""
    odd = ""
    if not isinstance(got, Tensor):
        try:
            found = torch.as_tensor(np.asarray(plain(got) if not isinstance(got, np.ndarray) else got))
        except (TypeError, ValueError, RuntimeError):
            raise Mistake(f"{what}: expected a torch.Tensor, got {describe(got)}") from None
        odd, got = f"expected a torch.Tensor, got {_kind(got)}", found
    got = got.detach().cpu()
    if got.shape != expected.shape and not got.numel() == expected.numel() == 1:
        shapes = f"expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
        raise Mistake(f"{what}: {shapes}", _likely(got, causes))
    if got.dtype != expected.dtype and not odd:
        odd = f"expected dtype {dtype_name(expected)}, got {dtype_name(got)}"
    return got.reshape(expected.shape), odd and f"; {odd}"


def _kind(value) -> str:
    name = type(value).__name__
    return {"ndarray": "a NumPy array", "int": "an int"}.get(name, f"a {name}")


def _not_odd(odd: str, what: str) -> None:
    if odd and STRICT.get():
        raise Mistake(f"{what}: the values are right{odd}")


def _equal(got: Tensor, expected: Tensor) -> Tensor:
    """Where they are the same number, NaN included, once got is rounded to expected's dtype if both are floats."""
    if got.is_floating_point() and expected.is_floating_point():
        got = got.to(expected.dtype)
    got, expected = got.double(), expected.double()
    return (got == expected) | (got.isnan() & expected.isnan())


def _near(got: Tensor, expected: Tensor, tolerance: float) -> Tensor:
    """Where got lies within that share of the largest magnitude expected."""
    got, expected = got.double(), expected.double()
    largest = expected.abs()[expected.isfinite()].max() if expected.isfinite().any() else 0.0
    return (got == expected) | ((got - expected).abs() <= tolerance * largest)


def _first_difference(got: Tensor, expected: Tensor, wrong: Tensor, what: str) -> str:
    index = tuple(wrong.nonzero()[0].tolist())
    at = f"[{', '.join(map(str, index))}]" if index else ""
    share = f" ({int(wrong.sum())} of {wrong.numel()} differ)" if index else ""
    return f"{what}{at}: expected {_number(expected[index])}, got {_number(got[index])}{share}"


def _likely(got, causes: Causes | None, tolerance: float = 0.0) -> tuple[str, ...]:
    """The causes that the result is certain to have; more than one where they give the same."""
    return tuple(cause for cause, wrong in (causes or {}).items() if _recognised(got, wrong, tolerance))


def _recognised(got, wrong, tolerance: float = 0.0) -> bool:
    """Whether got is what a mistake gives. A recogniser that fails on an odd result has not recognised it."""
    try:
        if wrong is None:
            return False
        if isinstance(wrong, list):
            return any(_recognised(got, one, tolerance) for one in wrong)
        if callable(wrong):
            return bool(wrong(got))
        if isinstance(wrong, Tensor):
            got = torch.as_tensor(got)
            if got.shape != wrong.shape:
                return False
            return bool((_near(got, wrong, tolerance) if tolerance else _equal(got, wrong)).all())
        if isinstance(wrong, float) and tolerance:
            return abs(float(got) - wrong) <= tolerance * abs(wrong)
        return _is(got, wrong)
    except Exception:
        return False


def _number(value: Tensor) -> str:
    return f"{value.item():.9g}" if value.dtype.is_floating_point else str(value.item())

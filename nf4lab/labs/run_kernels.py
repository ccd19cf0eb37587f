"""What lab 4 finds out about a kernel where the kernel lives: a trace as plain data, and what a launch gives.

Nothing here compares or knows an answer: that is nf4lab.labs.lab4.
"""

import contextlib
import functools
import inspect
import traceback
from collections.abc import Callable

import numpy as np

from nf4lab.kernels.tracing import KernelMistake, Trace, trace, trace_body
from nf4lab.labs.calls import Mistake, call, call_each, error_text, standing_in, usual_state

SIMULATED = 128  # each check of a kernel has a launch that is no larger
REMINDERS = {  # of what a question says, by the kind of mistake and the array's place among the arguments
    "dequantize": {
        ("bounds", 0): "some threads have no byte, and must do nothing",
        ("bounds", 1): "element j belongs to block j // 64",
        ("bounds", 3): "an odd n ends in a byte whose low nibble is no element",
        ("twice", 3): (
            "thread i takes byte i; in a kernel its number is cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x"
        ),
    },
    "quantize": {
        ("bounds", 0): "the last block may be short, and n may be odd",
        ("race", 2): "two codes share a byte, so one thread makes the whole byte",
        ("twice", 2): "two codes share a byte, so one thread makes the whole byte",
        ("twice", 3): "every thread of the block knows its absmax; let thread 0 write it",
    },
}  # fmt: skip


def traced(kernel: Callable, kind: str, blocks: int, threads: int, arrays: list, once=(), sources=None) -> dict:
    """The trace of kernel[blocks, threads](*arrays) as plain data. Raises Mistake in place of KernelMistake."""
    return _plain(_told(kernel, kind, lambda: trace(kernel, blocks, threads, *arrays, once=tuple(once)), sources))


def traced_body(body: Callable, kind: str, threads: int, arrays: list, block_size: int, once=()) -> dict:
    """The trace of body(thread, *arrays, block_size) for each thread, as plain data. Raises Mistake as `traced`."""
    return _plain(_told(body, kind, lambda: trace_body(body, threads, *arrays, block_size, once=tuple(once)), None))


def launched(kernel: Callable, blocks: int, threads: int, arrays: list, sources=None) -> dict | None:
    """{"where", "arrays"} after kernel[blocks, threads] in the simulator or on the GPU; None where there is neither.

    The simulator gets launches of at most SIMULATED threads: it takes three to eight times as long as the trace, which
    has found the numbers already.
    """
    from numba import cuda  # not at the top: the notebook decides first whether the simulator runs

    where = "the simulator" if "simulator" in cuda.jit.__module__ else "the GPU"
    if not cuda.is_available() or (where == "the simulator" and blocks * threads > SIMULATED):
        return None
    on_device = [cuda.to_device(array) for array in arrays]
    try:
        with _prepared(kernel, sources):
            kernel[blocks, threads](*on_device)
            return {"where": where, "arrays": [array.copy_to_host() for array in on_device]}
    except Exception as error:
        first = " ".join(error_text(error).split())[:300]
        text = f"thread by thread it is right, but {where} refuses it: {type(error).__name__}: {first}"
        raise Mistake(text) from None


def called(function: Callable, arguments: list, sources: dict[str, str]):
    """What a plain function returns, with the functions of these sources in place of the student's own."""
    with _prepared(function, sources), np.errstate(all="ignore"):
        return call(function, *arguments)


def places(place: Callable, rows: int, width: int) -> list[list]:
    """What place(row, word, width) returns for each word of a tile, row by row."""
    call(place, 0, 0, width)  # says whether it is written at all
    return [call_each(place, [(row, word, width) for word in range(width)]) for row in range(rows)]


@contextlib.contextmanager
def _prepared(function: Callable, sources: dict[str, str] | None):
    """Torch's usual state, and the functions of these sources in place of the student's own."""
    variables = getattr(getattr(function, "py_func", function), "__globals__", {})
    with usual_state(), standing_in(variables, **{name: made(name, text) for name, text in (sources or {}).items()}):
        yield


@functools.cache
def made(name: str, text: str) -> Callable:
    """The function or class of that name which a source text defines; it knows numpy, torch, numba.cuda and nf4lab."""
    import numba
    import torch
    from numba import cuda

    import nf4lab

    known = {"np": np, "torch": torch, "nn": torch.nn, "F": torch.nn.functional, "cuda": cuda, "float32": numba.float32,
             "nf4lab": nf4lab}  # fmt: skip
    exec(compile(text, "<cell>", "exec"), known)
    return known[name]


def _told(function: Callable, kind: str, run: Callable, sources: dict[str, str] | None) -> Trace:
    """What run() returns; a mistake or an error in the student's function in words."""
    name = getattr(function, "__name__", "your function")
    try:
        with _prepared(function, sources):
            return run()
    except KernelMistake as mistake:
        names = list(inspect.signature(getattr(function, "py_func", function)).parameters)[kind == "body" :]
        place = names.index(mistake.array) if mistake.array in names else None
        reminder = REMINDERS.get(kind, REMINDERS["dequantize"]).get((mistake.kind, place))
        raise Mistake(f"{name}: {mistake}" + (f"\nRemember: {reminder}." if reminder else "")) from None
    except Exception as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == name and frame.line]
        line = f"\nIn the line: {own[-1].line}" if own else ""
        raise Mistake(f"`{name}` ended in {type(error).__name__}: {error_text(error)}{line}") from None


def _plain(record: Trace) -> dict:
    """A trace as arrays of numbers: for each access its array, verb, index, block, thread, place and turn."""
    arrays = {name: i for i, name in enumerate(record.arrays)}
    rows = [
        (arrays[a.array], a.verb == "writes", a.index, a.block, a.thread, a.place, a.turn)
        for a in record.accesses if a.array in arrays
    ]  # fmt: skip
    return {
        "names": list(record.arrays), "arrays": list(record.arrays.values()), "blocks": record.blocks,
        "accesses": np.array(rows, np.int64).reshape(-1, 7),
    }  # fmt: skip

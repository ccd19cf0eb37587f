"""A numba.cuda kernel run one thread at a time, as plain Python, with a record of what it asks of memory.

    trace        a launch, thread by thread: what each reads and writes, and the mistakes that only a GPU punishes
    trace_body   the same for a plain function of a thread's number
    Trace        the record: bytes, requests of warps, sectors of 32 bytes
    KernelMistake  out of bounds, a race, a barrier that some threads miss, memory used endlessly, what no GPU takes

It needs neither a GPU nor the simulator. The kernel's own code runs, so the record says what that code asks for: a
compiler may merge two reads of one element, but not across a write that might have changed it. Races are found by the
order that barriers promise, not by luck: two threads that meet at an element, one of them writing, race unless a
barrier stands between them (as NVIDIA's compute-sanitizer racecheck has it). Two that write the same value don't.
"""

import dis
import inspect
import math
import operator
import sys
import threading
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

WARP = 32  # threads whose loads and stores go to memory together
SECTOR_BYTES = 32  # the least that memory moves
PATIENCE = 20_000  # accesses after which a thread is taken to be in an endless loop
DEVICE_ONLY = "is a plain Python function: a kernel can call only what is marked @cuda.jit(device=True)"


class KernelMistake(AssertionError):
    """Something that a GPU would answer with wrong numbers, or not at all. kind: one word; array: where, or None."""

    def __init__(self, kind: str, message: str, array: str | None = None):
        super().__init__(message)
        self.kind, self.array = kind, array


class Access(NamedTuple):
    """One read or write of one element: by whom, at which place in the source, and which of that thread's there."""

    array: str
    verb: str
    index: int
    block: int
    thread: int
    place: int
    turn: int


@dataclass
class Trace:
    """What a launch asked of memory. arrays: its arguments by name, as they were left; accesses: in order."""

    blocks: int
    arrays: dict[str, np.ndarray]
    accesses: list[Access] = field(default_factory=list)

    def times(self, array: str, verb: str) -> np.ndarray:
        """How often each element was read (verb "reads") or written ("writes"): int64, the array's length."""
        indices = [a.index for a in self.accesses if (a.array, a.verb) == (array, verb)]
        return np.bincount(np.array(indices, dtype=np.int64), minlength=self.arrays[array].size)

    def threads(self, array: str, verb: str, index: int) -> list[tuple[int, int]]:
        """The (block, thread) of each access to one element, in order."""
        return [(a.block, a.thread) for a in self.accesses if (a.array, a.verb, a.index) == (array, verb, index)]

    def bytes(self, array: str, verb: str) -> int:
        """Bytes that the threads asked for, an element counted as often as it was asked for."""
        return int(self.times(array, verb).sum()) * self.arrays[array].itemsize

    def requests(self, array: str, verb: str) -> list[list[int]]:
        """The indices that each warp asked for together: one list for each instruction that a warp executed."""
        together = defaultdict(list)
        for a in self.accesses:
            if (a.array, a.verb) == (array, verb):
                together[a.block, a.thread // WARP, a.place, a.turn].append(a.index)
        return list(together.values())

    def sectors(self, array: str, verb: str) -> int:
        """Sectors of 32 bytes that the requests touch, summed; the array is taken to begin at a sector."""
        width = self.arrays[array].itemsize
        return sum(len({i * width // SECTOR_BYTES for i in request}) for request in self.requests(array, verb))

    def share_used(self, array: str, verb: str) -> float:
        """Of the bytes in those sectors, the share that the warps asked for: 1.0 is perfectly coalesced.

        NaN where nothing was asked for.
        """
        wanted = sum(len(set(request)) for request in self.requests(array, verb)) * self.arrays[array].itemsize
        moved = SECTOR_BYTES * self.sectors(array, verb)
        return wanted / moved if moved else math.nan

    def __str__(self) -> str:
        lines = ["array                  bytes  requests  sectors   used"]
        for array in self.arrays:
            for verb in ("reads", "writes"):
                if self.times(array, verb).any():
                    name, n = f"{verb} {array}", len(self.requests(array, verb))
                    rest = f"{self.sectors(array, verb):8,} {self.share_used(array, verb):6.0%}"
                    lines.append(f"{name:18s} {self.bytes(array, verb):9,} {n:9,} {rest}")
        return "\n".join(lines)


def trace(kernel: Callable, blocks: int, threads: int, *arguments, once: tuple[int, ...] = ()) -> Trace:
    """The record of kernel[blocks, threads](*arguments), which leaves its results in the arguments, as a GPU would.

    kernel: marked @cuda.jit, in one dimension. NumPy arrays (1-D) among the arguments are watched, under the names
    that the kernel gives them. once: positions of arrays whose elements are to be written once; the second write ends
    the trace. Raises KernelMistake at the first mistake, TypeError where it is no kernel.
    """
    if not hasattr(kernel, "py_func"):
        raise TypeError(f"{getattr(kernel, '__name__', kernel)} is not a kernel: @cuda.jit must stand above it")
    blocks, threads = _whole(blocks, "blocks"), _whole(threads, "threads")
    launch = _Launch(blocks, threads, tuple(inspect.signature(kernel.py_func).parameters), arguments, once)
    made: dict[Callable, Callable] = {}
    body = _as_python(kernel, launch.cuda, made)
    has_barriers = any("syncthreads" in plain.__code__.co_names for plain in made)
    return launch.run(lambda: body(*launch.arguments), has_barriers)


def trace_body(body: Callable, threads: int, *arguments, once: tuple[int, ...] = ()) -> Trace:
    """The record of body(0, *arguments), body(1, *arguments), …: the loop that a GPU runs all at once.

    once, and KernelMistake: as in `trace`.
    """
    launch = _Launch(1, threads, tuple(inspect.signature(body).parameters)[1:], arguments, once)
    return launch.run(lambda: body(launch.thread, *launch.arguments), has_barriers=False)


class _Launch:
    """The threads of a launch, one of which runs at any time, and what they share."""

    def __init__(self, blocks: int, threads: int, names: tuple, arguments: tuple, once: tuple[int, ...] = ()):
        self.blocks, self.threads, self.block, self.thread, self.phase = blocks, threads, 0, 0, 0
        arrays = {name: a for name, a in zip(names, arguments, strict=False) if isinstance(a, np.ndarray)}
        if len(names) != len(arguments):
            raise TypeError(f"the kernel must take {len(arguments)} arguments; it has {', '.join(names) or 'none'}")
        self.trace, self.turns, self.patience = Trace(blocks, arrays), Counter(), Counter()
        self.arguments = [_Watched(n, a, self) if n in arrays else a for n, a in zip(names, arguments, strict=True)]
        self.once = {names[position] for position in once}
        self.shared: dict[int, _Watched] = {}
        self.places, self.places_at = {}, {}  # numbers by code and position, and by code and instruction
        self.race: KernelMistake | None = None
        self.cuda = _Cuda(self)

    def run(self, body: Callable, has_barriers: bool) -> Trace:
        threads = [(_Thread if has_barriers else _Loop)(body, number) for number in range(self.threads)]
        try:
            with np.errstate(all="ignore"):
                for block in range(self.blocks):
                    self.block, self.phase, self.shared = block, 0, {}
                    self._run_block(threads)
                    for array in self.shared.values():
                        array.check_unwritten_reads()
        finally:
            for thread in threads:
                thread.abandon()
        return self.trace

    def _run_block(self, running: list) -> None:
        """Each thread up to its next barrier, one after the other, until all have ended.

        A race waits until they have: if it then turns out that some of them missed the barrier, that is the reason.
        """
        while running:
            self._advance(running)
            if len({thread.barrier for thread in running}) > 1:
                raise self._missed_barrier(running)
            if self.race:
                raise self.race
            running = [thread for thread in running if thread.barrier]
            self.phase += 1

    def _advance(self, running: list) -> None:
        for thread in running:
            self.current, self.thread = thread, thread.number
            try:
                thread.advance()
            except Exception:
                if self.race:  # what went wrong since may be its doing
                    raise self.race from None
                raise

    def _missed_barrier(self, running: list) -> KernelMistake:
        waiting = next(thread for thread in running if thread.barrier)
        other = next(thread for thread in running if thread.barrier != waiting.barrier)
        what = "waits at another one" if other.barrier else "has ended without reaching it"
        return KernelMistake(
            "barrier",
            f"in block {self.block}, thread {waiting.number} waits at cuda.syncthreads() and thread {other.number} "
            f"{what}. A barrier must be reached by every thread of the block: keep it out of any `if`, and put it "
            "before any thread returns.",
        )  # fmt: skip

    def who(self, block: int, thread: int) -> str:
        return f"thread {thread}" + (f" of block {block}" if self.blocks > 1 else "")

    def place(self, frame) -> int:
        """A number, from 1 on, for where in the source a frame is.

        f_lasti alone won't do: a specialised instruction leaves it at its cache.
        """
        at = id(frame.f_code), frame.f_lasti
        if at not in self.places_at:
            position = list(frame.f_code.co_positions())[frame.f_lasti // 2]
            self.places_at[at] = self.places.setdefault((frame.f_code, position), len(self.places) + 1)
        return self.places_at[at]

    def record(self, array: "_Watched", verb: str, index: int, frame) -> None:
        me = self.block, self.thread
        self.patience[me] += 1
        if self.patience[me] > PATIENCE:
            raise KernelMistake(
                "endless", f"{self.who(*me)} has used memory {PATIENCE:,} times: does its loop ever end?"
            )
        if not array.is_shared:
            place = self.place(frame)
            turn = self.turns[me, verb, place]
            self.turns[me, verb, place] = turn + 1
            self.trace.accesses.append(Access(array.name, verb, index, *me, place, turn))


class _Loop:
    """One thread of a kernel without barriers: it runs from beginning to end."""

    barrier = None

    def __init__(self, body: Callable, number: int):
        self.advance, self.number = body, number

    def abandon(self) -> None:
        pass


class _Thread(threading.Thread):
    """One thread of a kernel with barriers, as a thread of the host: `advance` runs it to its next barrier or end.

    It serves block after block, since starting a thread takes longer than what most of a block's do.
    """

    def __init__(self, body: Callable, number: int):
        super().__init__(daemon=True)
        self.body, self.number, self.barrier, self.error, self.abandoned = body, number, None, None, False
        self.go, self.done = threading.Lock(), threading.Lock()  # whose turn it is: both are taken until then
        self.go.acquire()
        self.done.acquire()
        self.start()

    def run(self) -> None:
        while self._has_its_turn():
            try:
                self.body()
            except BaseException as error:
                self.error = error
            self.barrier = None
            self.done.release()

    def _has_its_turn(self) -> bool:
        """Wait for it; False where there is none any more."""
        if not self.abandoned:
            self.go.acquire()
        return not self.abandoned

    def advance(self) -> None:
        self.go.release()
        self.done.acquire()
        if self.error:
            raise self.error

    def wait(self, barrier: int) -> None:
        self.barrier = barrier
        self.done.release()
        if not self._has_its_turn():
            raise SystemExit

    def abandon(self) -> None:
        self.abandoned = True
        if self.go.locked():  # else its turn has just been given, and it ends by itself
            self.go.release()


class _Watched:
    """An array that knows who reads and writes it. Indexed by one whole number, from 0 to its length less 1."""

    ndim = 1

    def __init__(self, name: str, array: np.ndarray, launch: _Launch, is_shared: bool = False):
        if array.ndim != 1:
            raise TypeError(f"{name} must be 1-D; got shape {array.shape}")
        self.name, self.array, self.launch, self.is_shared = name, array, launch, is_shared
        self.size, self.shape, self.dtype = array.size, array.shape, array.dtype
        self.written = np.zeros(array.size, dtype=bool)
        self.writers, self.readers = defaultdict(dict), defaultdict(dict)  # index -> {(block, thread): (phase, …)}
        self.read_unwritten: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index):
        index, me = self._index(index, "reads"), (self.launch.block, self.launch.thread)
        self.launch.record(self, "reads", index, sys._getframe(1))
        if me not in self.writers[index]:
            for other, _ in self._unordered(self.writers[index], me):
                self._race(index, other, me, "reads")
        self.readers[index][me] = (self.launch.phase,)
        if self.is_shared and not self.written[index]:
            self.read_unwritten.setdefault(index, me)
        return self.array[index]

    def __setitem__(self, index, value) -> None:
        index, me = self._index(index, "writes"), (self.launch.block, self.launch.thread)
        self.launch.record(self, "writes", index, sys._getframe(1))
        value = self._as_stored(index, value)
        self._check_write(index, me, value, atomic=False)
        self._write(index, me, value, atomic=False)

    def update(self, index, value, rule: Callable):
        """An atomic read and write, for which order does not matter; returns what was there."""
        index, me = self._index(index, "writes"), (self.launch.block, self.launch.thread)
        self.launch.record(self, "writes", index, sys._getframe(2))
        old, value = self.array[index], self._as_stored(index, rule(self.array[index], value))
        self._check_write(index, me, value, atomic=True)
        self._write(index, me, value, atomic=True)
        return old

    def check_unwritten_reads(self) -> None:
        for index, (block, thread) in self.read_unwritten.items():
            if not self.written[index]:
                who = self.launch.who(block, thread)
                text = f"{who} reads {self.name}[{index}], which no thread has written: shared memory starts as noise"
                raise KernelMistake("unwritten", text, self.name)

    def _index(self, index, verb: str) -> int:
        try:
            i = operator.index(index)
        except TypeError:
            got = f"{index!r} ({type(index).__name__})"
            raise KernelMistake("index", f"{self.name}[…] takes one whole number; got {got}", self.name) from None
        if 0 <= i < self.size:
            return i
        raise KernelMistake(
            "bounds",
            f"{self.launch.who(self.launch.block, self.launch.thread)} {verb} {self.name}[{i}], but {self.name} has "
            f"{self.size} elements, 0 to {self.size - 1}. A GPU raises no IndexError: it {verb} whatever lies there.",
            self.name,
        )  # fmt: skip

    def _as_stored(self, index: int, value):
        try:
            return self.array.dtype.type(value)
        except OverflowError:
            limit = np.iinfo(self.dtype).max
            text = f"{self.name}[{index}] is {self.dtype} and holds 0 to {limit}; it is given {value}"
            raise KernelMistake("overflow", text, self.name) from None

    def _unordered(self, entries: dict, me: tuple) -> Iterator[tuple]:
        """Those of other threads that no barrier separates from this one, here and now."""
        for other, entry in entries.items():
            if other != me and (other[0] != me[0] or entry[0] == self.launch.phase):
                yield other, entry

    def _check_write(self, index: int, me: tuple, value, atomic: bool) -> None:
        if self.written[index] and self.name in self.launch.once and not self.is_shared:
            first, again = (self.launch.who(*one) for one in (next(iter(self.writers[index])), me))
            text = f"{self.name}[{index}] is written by {first} and again by {again}; once is enough"
            raise KernelMistake("twice", text, self.name)
        for other, (_, theirs, was_atomic) in self._unordered(self.writers[index], me):
            if not (atomic and was_atomic) and not _same(theirs, value):
                self._race(index, other, me, "writes")
        if not atomic and not _same(self.array[index], value):
            for other, _ in self._unordered(self.readers[index], me):
                self._race(index, me, other, "reads")

    def _write(self, index: int, me: tuple, value, atomic: bool) -> None:
        self.array[index] = value
        self.written[index] = True
        self.writers[index][me] = (self.launch.phase, value, atomic)

    def _race(self, index: int, writer: tuple, other: tuple, verb: str) -> None:
        """Keep the first race; it is raised when the threads have come to their next barrier."""
        a, b, what = self.launch.who(*writer), self.launch.who(*other), f"{self.name}[{index}]"
        if verb == "writes":
            text = f"{a} and {b} both write {what}, and nothing says whose value stays"
        else:
            text = f"{a} writes {what} and {b} reads it, and nothing says which comes first"
        remedy = "no cuda.syncthreads() stands between" if writer[0] == other[0] else "no barrier joins two blocks"
        self.launch.race = self.launch.race or KernelMistake("race", f"a race: {text}: {remedy}.", self.name)


class _Cuda:
    """The part of numba.cuda that a traced kernel may use; anything else is refused by name."""

    warpsize = WARP

    def __init__(self, launch: _Launch):
        self._launch = launch
        self.shared = types.SimpleNamespace(array=self._shared_array)
        self.local = types.SimpleNamespace(array=lambda shape, dtype: _noise(shape, dtype))
        self.atomic = types.SimpleNamespace(
            max=lambda a, i, v: a.update(i, v, max),
            min=lambda a, i, v: a.update(i, v, min),
            add=lambda a, i, v: a.update(i, v, operator.add),
        )

    def __getattr__(self, name: str):
        known = "threadIdx, blockIdx, blockDim, gridDim, grid, gridsize, syncthreads, shared, local, atomic"
        raise KernelMistake("unknown", f"cuda.{name} is not among what can be traced: {known}")

    threadIdx = property(lambda self: _Three(self._launch.thread))
    blockIdx = property(lambda self: _Three(self._launch.block))
    blockDim = property(lambda self: _Three(_FromLaunch(self._launch.threads), 1))
    gridDim = property(lambda self: _Three(_FromLaunch(self._launch.blocks), 1))
    laneid = property(lambda self: self._launch.thread % WARP)

    def grid(self, ndim: int) -> int:
        return self._launch.block * self._launch.threads + self._launch.thread

    def gridsize(self, ndim: int) -> int:
        return self._launch.blocks * self._launch.threads

    def syncthreads(self) -> None:
        self._launch.current.wait(self._launch.place(sys._getframe(1)))

    def _shared_array(self, shape, dtype) -> _Watched:
        frame = sys._getframe(1)
        place = self._launch.place(frame)
        if place not in self._launch.shared:
            name = _assigned_name(frame) or "shared memory"
            self._launch.shared[place] = _Watched(name, _noise(shape, dtype), self._launch, is_shared=True)
        return self._launch.shared[place]


@dataclass(frozen=True)
class _Three:
    x: int
    y: int = 0
    z: int = 0


class _FromLaunch(int):
    """A number that the compiler does not know: it comes with the launch."""


def _noise(shape, dtype) -> np.ndarray:
    """An array as a GPU hands it out: not zeros. Floats are NaN, integers 0x55…"""
    from numba.np.numpy_support import as_dtype

    if isinstance(shape, _FromLaunch) or not isinstance(shape, int):
        raise KernelMistake("shape", "the shape of a shared or local array must be a constant that the compiler knows")
    dtype = np.dtype(as_dtype(dtype) if hasattr(dtype, "bitwidth") else dtype)
    noise = np.full(shape * dtype.itemsize, 0x55, np.uint8).view(dtype)
    return np.full_like(noise, np.nan) if dtype.kind == "f" else noise


def _assigned_name(frame) -> str | None:
    """The variable that the call under way is assigned to."""
    later = [i for i in dis.get_instructions(frame.f_code) if i.offset > frame.f_lasti and i.opname != "CACHE"]
    return later[0].argval if later and later[0].opname.startswith("STORE_") else None


def _as_python(function: Callable, fake: _Cuda, made: dict) -> Callable:
    """A kernel or device function as plain Python, with `fake` for cuda there and in the device functions it calls."""
    import numba.cuda

    plain = function.py_func
    if plain not in made:
        names = dict(plain.__globals__)
        made[plain] = types.FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
        for name in plain.__code__.co_names:
            value = names.get(name)
            if value is numba.cuda:
                names[name] = fake
            elif hasattr(value, "py_func"):
                names[name] = _as_python(value, fake, made)
            elif isinstance(value, types.FunctionType):
                raise KernelMistake("device", f"{name} {DEVICE_ONLY}")
    return made[plain]


def _same(a, b) -> bool:
    return bool(a == b) or bool(a != a and b != b)


def _whole(count, name: str) -> int:
    try:
        count = operator.index(count)
    except TypeError:
        raise TypeError(f"a launch takes a whole number of {name}; got {count!r} ({type(count).__name__})") from None
    if count < 1:
        raise ValueError(f"a launch takes at least 1 of {name}; got {count}")
    return count

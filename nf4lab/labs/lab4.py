"""What the checks of lab 4 (kernels) compare and count, and the mistakes that they name.

A kernel is traced first, thread by thread (`nf4lab.kernels.tracing`): what would corrupt a GPU's memory never reaches
one. What is clean is then launched for real, in the simulator or on the GPU. Each `check_…` takes the student's
function and a seed for its data, and raises `feedback.Mistake`.
"""

import functools
import traceback
from collections.abc import Callable

import numpy as np
import torch

import nf4lab
from nf4lab.kernels.tracing import KernelMistake, Trace, trace, trace_body
from nf4lab.labs import feedback

BLOCK_SIZE = 64
LEVELS = nf4lab.FORMATS["nf4"].levels.numpy()
BOUNDARIES = nf4lab.FORMATS["nf4"].boundaries.numpy()
INDEX = "cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x"
BYTE_TWICE = "a byte holds two codes: one thread reads it once, into a variable, and takes both"
ABSMAX_TWICE = (
    "both elements of a byte lie in one block: read its absmax once, into a variable (a compiler can't do that for "
    "you, since a write to out might change absmax)"
)
TABLE_TWICE = (
    "16 threads copy one level each into shared memory; after the barrier all threads look there, never in levels"
)
VALUE_TWICE = "keep both values of a thread in variables: they serve for the absmax first, and then for the codes"
NEIGHBOURS = (
    "neighbouring threads must take neighbouring bytes at the same time; a thread's next byte lies a whole launch on"
)
ABSMAX_BY_ALL = "every thread of the block knows its absmax; let thread 0 write it"
HINTS = {
    ("bounds", "packed"): "a bounds guard is missing: some threads have no byte, and must do nothing",
    ("bounds", "out"): "an odd n ends in a byte whose low nibble is no element: the second write needs a guard",
    ("bounds", "absmax"): "the block's index is wrong: element j belongs to block j // 64",
    ("bounds", "x"): "a bounds guard is missing: the last block may be short, and n may be odd",
    ("race", "packed"): "two codes share a byte. Threads that set one nibble each undo each other's work: let one "
    "thread make the whole byte",
}


def weights(seed: int, n: int) -> np.ndarray:
    """Float32 (n,): normal, each block of 64 on a scale of its own, so that no block's absmax serves another.

    The largest magnitude of every other block is negative: of the first if the seed is even.
    """
    rng = np.random.default_rng(seed)
    n_blocks = -(-n // BLOCK_SIZE)
    scales = np.exp2(rng.permutation(n_blocks) % 8 - 4.0) * rng.uniform(1.1, 1.9, n_blocks)
    x = np.pad(rng.standard_normal(n), (0, -n % BLOCK_SIZE)).reshape(n_blocks, BLOCK_SIZE)
    x *= np.where(x.max(axis=1) == np.abs(x).max(axis=1), 1, -1)[:, None]  # the largest magnitude is positive
    x *= np.where((np.arange(n_blocks) + seed) % 2, scales, -scales)[:, None]
    return x.reshape(-1)[:n].astype(np.float32)


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(packed, absmax) of x by the package: uint8 ((n + 1) // 2,) and float32 (n_blocks,)."""
    q = nf4lab.quantize(torch.from_numpy(x), "nf4", BLOCK_SIZE, backend="torch")
    return q.packed.numpy(), q.absmax.numpy()


def beside_boundaries(seed: int) -> np.ndarray:
    """A block of 64 whose codes differ if it is divided by absmax, and if ties go up: float32 (64,)."""
    rng = np.random.default_rng(seed)
    while True:
        m = np.float32(rng.uniform(1, 8))
        near = [np.nextafter(m * BOUNDARIES, np.float32(end)) for end in (-9, 9)]
        x = np.resize(np.concatenate([[m], m * BOUNDARIES, *near]).astype(np.float32), BLOCK_SIZE)
        s = x * (1 / m)
        if ((x / m)[:, None] > BOUNDARIES).sum() != (s[:, None] > BOUNDARIES).sum() and (
            s[:, None] == BOUNDARIES
        ).any():
            return x


# Counting (questions 1, 2 and 4)


def check_sectors(sectors: Callable, seed: int) -> None:
    """The number of distinct sectors that a warp's request touches."""
    rng = np.random.default_rng(seed)
    cases = [(0, 1, 1), (0, 4, 2), (2, 4, 2), (16, 8, 4), (30, 8, 4), (0, 16, 16), (0, 0, 4), (0, 64, 1)]
    for width in (1, 2, 4, 8):
        cases += [(int(first), int(stride), width) for first, stride in rng.integers(0, 80, (3, 2))]
    for first, stride, width in cases:
        starts = [first + stride * t for t in range(32)]
        by_thread = [{(start + b) // 32 for b in range(width)} for start in starts]
        stretch = starts[-1] + width - first
        causes = {
            "that is what the wanted bytes would fill side by side; count where first and stride put them": width,
            "an access may lie across two sectors: every byte of it counts, not only its first": (
                len({start // 32 for start in starts})
            ),
            "threads that share a sector get it together: count each sector once": sum(map(len, by_thread)),
            "that is the stretch from the first byte to the last, in 32s; where it begins counts, and so do gaps": (
                lambda got, s=stretch: got in (s // 32, -(-s // 32), s / 32)
            ),
        }
        what = f"sectors(first={first}, stride={stride}, width={width})"
        feedback.same(feedback.call(sectors, first, stride, width), len(set().union(*by_thread)), what, causes)


def check_least_bytes(least_bytes: Callable, seed: int) -> None:
    """(read, written): what dequantizing n weights to float16 cannot avoid."""
    rng = np.random.default_rng(seed)
    for n in (128, 640, 999, *map(int, rng.integers(1, 10**6, 8))):
        half, n_blocks = (n + 1) // 2, -(-n // BLOCK_SIZE)
        causes = {
            "the absmax of each block is read too": (half, 2 * n),
            "an absmax is a float32: 4 bytes, not 1": (half + n_blocks, 2 * n),
            "two codes share a byte": (n + 4 * n_blocks, 2 * n),
            "a float16 has 2 bytes": lambda got, read=half + 4 * n_blocks: got[0] == read,
            "the last byte of an odd n is half used, and is read whole: round up": (n // 2 + 4 * n_blocks, 2 * n),
            "the short last block has an absmax like any other: round up": (half + 4 * (n // BLOCK_SIZE), 2 * n),
            "round up, both the bytes of an odd n and the blocks": (n // 2 + 4 * (n // BLOCK_SIZE), 2 * n),
            "bytes are whole numbers: // instead of /": lambda got, half=half: any(type(v) is float for v in got),
        }
        got = feedback.call(least_bytes, n, BLOCK_SIZE)
        feedback.same(got, (half + 4 * n_blocks, 2 * n), f"least_bytes({n}, {BLOCK_SIZE})", causes)


def check_blocks_for(blocks_for: Callable, seed: int) -> None:
    """The thread blocks that cover n_bytes."""
    rng = np.random.default_rng(seed)
    cases = [(1024, 32), (1000, 32), (1, 256), (257, 256)]
    cases += [(int(rng.integers(1, 10**7)), 2 ** int(rng.integers(5, 11))) for _ in range(10)]
    for n_bytes, threads in cases:
        got, expected = feedback.call(blocks_for, n_bytes, threads), -(-n_bytes // threads)
        causes = {
            f"rounded down: the last {n_bytes % threads} bytes have no thread": n_bytes // threads,
            "one more than needed where the threads divide the bytes": n_bytes // threads + 1,
            "a thread takes a byte, not an element": -(-2 * n_bytes // threads),
            "that is the number of threads, not of blocks": n_bytes,
        }
        what = f"blocks_for({n_bytes}, {threads})"
        feedback.that(type(got) is not float, f"{what}: a launch takes an int, got {got}. Divide with //, not with /")
        feedback.same(got, expected, what, causes)


# Dequantize (questions 3, 5, 6 and 7)


def check_body(body: Callable, seed: int, n: int, idle: int = 0) -> Trace:
    """A plain function of a thread's number, run for every byte of n weights and for `idle` threads more."""
    packed, absmax = quantized(weights(seed, n))
    out = np.full(n, np.nan, np.float16)
    record = _traced(body, lambda: trace_body(body, len(packed) + idle, packed, absmax, LEVELS, out, BLOCK_SIZE))
    _check_written_once(record, "out")
    _compare_out(out, packed, absmax, "out")
    return record


def check_kernel(kernel: Callable, seed: int, n: int, threads: int = 32, blocks: int | None = None) -> Trace:
    """A kernel on n weights, traced and launched: as many blocks as it takes, or as said."""
    packed, absmax = quantized(weights(seed, n))
    out = np.full(n, np.nan, np.float16)
    blocks = blocks or -(-len(packed) // threads)
    record = _traced(kernel, lambda: trace(kernel, blocks, threads, packed, absmax, LEVELS, out))
    _check_written_once(record, "out")
    _compare_out(out, packed, absmax, "out")
    if launched := _launched(kernel, blocks, threads, packed, absmax, LEVELS, np.full_like(out, np.nan)):
        _compare_out(launched[-1], packed, absmax, f"out, from {_where()},")
    return record


def check_body_traffic(body: Callable, seed: int) -> None:
    """Each byte of codes is read once and each absmax once a byte; a warp's threads lie side by side."""
    packed, absmax = quantized(weights(seed, 640))
    out = np.full(640, np.nan, np.float16)
    record = _traced(body, lambda: trace_body(body, len(packed), packed, absmax, LEVELS, out, BLOCK_SIZE))
    _check_dequantize_traffic(record)


def check_kernel_traffic(kernel: Callable, seed: int, blocks: int = 16, threads: int = 64, table: bool = False) -> None:
    """The same of a kernel. With `table`, levels are read 16 times a thread block and no more."""
    packed, absmax = quantized(weights(seed, 2048))
    out = np.full(2048, np.nan, np.float16)
    record = _traced(kernel, lambda: trace(kernel, blocks, threads, packed, absmax, LEVELS, out))
    _check_dequantize_traffic(record)
    if table:
        reads, enough = int(record.times("levels", "reads").sum()), 16 * blocks
        _no_more(reads, enough, f"levels is read {reads} times by {blocks} thread blocks", TABLE_TWICE)


def _check_dequantize_traffic(record: Trace) -> None:
    _check_written_once(record, "out")
    _check_read_once(record, "packed", BYTE_TWICE)
    reads, n_bytes = int(record.times("absmax", "reads").sum()), record.arrays["packed"].size
    _no_more(reads, n_bytes, f"absmax is read {reads} times for {n_bytes} bytes", ABSMAX_TWICE)
    _check_coalesced(record, "packed", "reads")
    _check_coalesced(record, "out", "writes")


def _compare_out(out: np.ndarray, packed: np.ndarray, absmax: np.ndarray, what: str) -> None:
    n = len(out)
    codes = np.stack([packed >> 4, packed & 15], axis=1)  # (n_bytes, 2)
    swapped, codes = codes[:, ::-1].reshape(-1)[:n], codes.reshape(-1)[:n]
    block = np.arange(n) // BLOCK_SIZE
    scales = absmax[block]

    def halves(codes, scales):
        return torch.from_numpy((LEVELS[codes] * scales).astype(np.float16))

    causes = {
        "the nibbles are swapped: the even element has the high one, byte >> 4": halves(swapped, scales),
        "the block was counted in bytes: byte i holds elements 2 * i and 2 * i + 1, and 64 elements make a block, so "
        "its index is 2 * i // 64": halves(codes, absmax[block // 2]),
        "the absmax is that of the next block": halves(codes, absmax[np.minimum(block + 1, len(absmax) - 1)]),
        "the absmax of block 0 was used for all": halves(codes, absmax[0]),
        "the level was not multiplied by its absmax": halves(codes, np.float32(1)),
        "the code was multiplied instead of its level": torch.from_numpy((codes * scales).astype(np.float16)),
        "that mask keeps three bits; & 15 keeps four": lambda got: (
            torch.equal(got, halves(codes & 7, scales))
            or torch.equal(got[1::2], halves(codes & 7, scales)[1::2])
            or torch.equal(got[0::2], halves(codes & 7, scales)[0::2])
        ),
        "rounded twice: multiply in float32 and let the array round": torch.from_numpy(
            LEVELS.astype(np.float16)[codes] * scales.astype(np.float16)
        ),
    }
    feedback.same(torch.from_numpy(out), halves(codes, scales), what, causes)


# Quantize (questions 8, 9 and 10)


def check_code_of(code_of: Callable, seed: int) -> None:
    """The number of boundaries strictly below s; code_of is a device function."""
    feedback.that(
        hasattr(code_of, "py_func"), "code_of is to be called by a kernel: put @cuda.jit(device=True) above it"
    )
    rng = np.random.default_rng(seed)
    inside = np.concatenate([LEVELS, rng.uniform(-1, 1, 50).astype(np.float32)])
    for s, note in [*((s, "") for s in inside), *((s, ", exactly at a boundary") for s in BOUNDARIES)]:
        causes = {
            "a tie goes to the lower level: count the boundaries strictly below s": int((s >= BOUNDARIES).sum()),
            "the boundaries above s were counted": int((s < BOUNDARIES).sum()),
            "a boundary was left out: there are 15": lambda got, s=s: (
                got in ((s > BOUNDARIES[1:]).sum(), (s > BOUNDARIES[:-1]).sum())
            ),
            "codes count from 0": int((s > BOUNDARIES).sum()) + 1,
        }
        got = feedback.call(code_of.py_func, s, BOUNDARIES)
        feedback.same(int(got), int((s > BOUNDARIES).sum()), f"code_of({s:.7f}, boundaries){note}", causes)


def check_quantize_block(quantize_block: Callable, x: np.ndarray) -> None:
    """A block of up to 64 values as plain Python: (list of bytes, absmax)."""
    with np.errstate(all="ignore"), _own_code_of_aside(quantize_block):
        got = feedback.call(quantize_block, x.copy(), BOUNDARIES)
    is_pair = isinstance(got, tuple) and len(got) == 2
    feedback.that(is_pair, f"quantize_block must return (list of bytes, absmax); got {feedback.describe(got)}")
    packed, expected = np.array([int(byte) for byte in got[0]]), quantized(x)
    _compare_absmax(np.array([got[1]], np.float32), expected[1], x, "absmax")
    message = f"{len(x)} values make {len(expected[0])} bytes; got {len(packed)}"
    feedback.that(len(packed) == len(expected[0]), message)
    wide = packed[(packed < 0) | (packed > 255)]
    feedback.that(not len(wide), f"a byte holds 0 to 255; got {wide[:1]}")
    _compare_codes(packed.astype(np.uint8), expected[0], x, "codes")


def blocks_with_edges(seed: int) -> list[np.ndarray]:
    """Blocks that go wrong first: zeros, one value, odd and even rests, weights beside boundaries."""
    short = [weights(seed + n, n) for n in (1, 17, 40, 63)]
    return [np.zeros(BLOCK_SIZE, np.float32), *short, beside_boundaries(seed)]


def check_quantize(kernel: Callable, x: np.ndarray) -> None:
    """A kernel of one thread block of 32 for each block of 64 values, traced and launched."""
    record, packed, absmax = _trace_quantize(kernel, x)
    for name in ("absmax", "packed"):
        _check_written(record, name)
    _compare_quantized(packed, absmax, x, "")
    fresh = np.full_like(packed, 0x5A), np.full_like(absmax, np.nan)
    with _own_code_of_aside(kernel):
        launched = _launched(kernel, len(absmax), 32, x, BOUNDARIES, *fresh)
    if launched:
        _compare_quantized(*launched[2:], x, f", from {_where()},")


def long_with_edges(seed: int) -> np.ndarray:
    """A block beside boundaries, one of zeros, whole ones, and a short one of odd length."""
    rest = 2 * int(np.random.default_rng(seed).integers(5, 25)) + 1
    zeros = np.zeros(BLOCK_SIZE, np.float32)
    return np.concatenate([beside_boundaries(seed), zeros, weights(seed, BLOCK_SIZE + rest)])


def check_quantize_traffic(kernel: Callable, seed: int) -> None:
    """Each value is read once; each byte and each absmax is written once, and never read."""
    record, _, _ = _trace_quantize(kernel, weights(seed, 5 * BLOCK_SIZE))
    _check_written_once(record, "packed")
    _check_written_once(record, "absmax", ABSMAX_BY_ALL)
    _check_read_once(record, "x", VALUE_TWICE)
    for name in ("packed", "absmax"):
        reads = int(record.times(name, "reads").sum())
        hint = "\nLikely cause: what threads tell each other goes through shared memory."
        feedback.that(not reads, f"{name} is read {reads} times; it is there to be written{hint}")
    _check_coalesced(record, "packed", "writes")


def _trace_quantize(kernel: Callable, x: np.ndarray) -> tuple[Trace, np.ndarray, np.ndarray]:
    packed = np.full((len(x) + 1) // 2, 0x5A, np.uint8)
    absmax = np.full(-(-len(x) // BLOCK_SIZE), np.nan, np.float32)
    with _own_code_of_aside(kernel):
        record = _traced(kernel, lambda: trace(kernel, len(absmax), 32, x, BOUNDARIES, packed, absmax))
    return record, packed, absmax


def _own_code_of_aside(kernel: Callable):
    """Whatever the student's code_of does, what calls it is checked with a correct one."""
    return feedback.standing_in(getattr(kernel, "py_func", kernel).__globals__, code_of=_code_of())


@functools.cache
def _code_of() -> Callable:
    """A correct device function, by bisection."""
    from numba import cuda

    @cuda.jit(device=True)
    def code_of(s, boundaries):
        below, half = 0, 8
        while half:
            if s > boundaries[below + half - 1]:
                below += half
            half //= 2
        return below

    return code_of


def _compare_quantized(packed: np.ndarray, absmax: np.ndarray, x: np.ndarray, note: str) -> None:
    expected = quantized(x)
    _compare_absmax(absmax, expected[1], x, f"absmax{note}")
    _compare_codes(packed, expected[0], x, f"codes{note}")


def _compare_absmax(absmax: np.ndarray, expected: np.ndarray, x: np.ndarray, what: str) -> None:
    blocks = torch.from_numpy(np.pad(x, (0, -len(x) % BLOCK_SIZE)).reshape(-1, BLOCK_SIZE))
    causes = {
        "the largest value; the largest magnitude needs abs": lambda got: (
            torch.equal(got.clamp(min=0), blocks.amax(1)) or (len(got) == 1 and got.item() == x.max())
        ),
        "the magnitude of the lowest value only": blocks.amin(1).abs(),
        "only the even elements count": blocks[:, 0::2].abs().amax(1),
        "only the odd elements count": blocks[:, 1::2].abs().amax(1),
        "only one thread's pair counts: all 32 must meet": blocks[:, :2].abs().amax(1),
        "half of the threads are left out: the first stride is 16, and the last is 1": lambda got: (
            torch.equal(got, blocks[:, :32].abs().amax(1)) or torch.equal(got, blocks[:, 0:64:4].abs().amax(1))
        ),
        "the largest of everything; each block of 64 has its own": blocks.abs().max().expand(len(blocks)),
    }
    feedback.same(torch.from_numpy(absmax), torch.from_numpy(expected), what, causes)


def _compare_codes(packed: np.ndarray, expected: np.ndarray, x: np.ndarray, what: str) -> None:
    n = len(x)
    blocks = np.pad(x, (0, -n % BLOCK_SIZE)).reshape(-1, BLOCK_SIZE)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    with np.errstate(all="ignore"):
        s = blocks * np.where(absmax > 0, 1 / absmax, 0).astype(np.float32)
        divided, unguarded = np.nan_to_num(blocks / absmax), blocks * (1 / absmax)

    def codes(s, compare=np.greater, left_over=7):
        found = compare(s[..., None], BOUNDARIES).sum(axis=-1).reshape(-1)[:n]
        return torch.from_numpy(np.append(found, left_over)[: n + n % 2])

    got, right = (torch.from_numpy(np.stack([p >> 4, p & 15], axis=1).reshape(-1)) for p in (packed, expected))
    causes = {
        "the nibbles are swapped: the even element has the high one": right.reshape(-1, 2).flip(1).reshape(-1),
        "a tie goes to the lower level: count the boundaries strictly below": codes(s, np.greater_equal),
        "divided by absmax; the rule multiplies by its reciprocal, and that rounds elsewhere": codes(divided),
        "1 / 0 is infinite, and 0 times that is not a number: in a block of zeros take 0 for the reciprocal": (
            codes(unguarded)
        ),
        "the nibble that an odd n leaves over holds the code of zero, 7": codes(s, left_over=0),
        "the values were not scaled by their absmax": codes(blocks),
    }
    feedback.same(got, right, what, causes)


# What all of them share


def _traced(function: Callable, run: Callable) -> Trace:
    """What run() returns; a mistake or an error in the student's function in words."""
    name = getattr(function, "__name__", "your function")
    try:
        return run()
    except KernelMistake as mistake:
        hint = HINTS.get((mistake.kind, mistake.array))
        raise feedback.Mistake(f"{name}: {mistake}" + (f"\nLikely cause: {hint}." if hint else "")) from None
    except Exception as error:
        own = [f for f in traceback.extract_tb(error.__traceback__) if f.name == name and f.line]
        line = f"\nIn the line: {own[-1].line}" if own else ""
        raise feedback.Mistake(f"`{name}` ended in {type(error).__name__}: {error}{line}") from None


def _launched(kernel: Callable, blocks: int, threads: int, *arrays: np.ndarray) -> list[np.ndarray] | None:
    """The arrays after kernel[blocks, threads] in the simulator or on the GPU; None where there is neither."""
    from numba import cuda  # not at the top: the notebook decides first whether the simulator runs

    if not cuda.is_available():
        return None
    on_device = [cuda.to_device(array) for array in arrays]
    try:
        kernel[blocks, threads](*on_device)
        return [array.copy_to_host() for array in on_device]
    except Exception as error:
        first = " ".join(str(error).split())[:300]
        text = f"thread by thread it is right, but {_where()} refuses it: {type(error).__name__}: {first}"
        raise feedback.Mistake(text) from None


def _where() -> str:
    from numba import cuda

    return "the simulator" if "simulator" in cuda.jit.__module__ else "the GPU"


def _check_written(record: Trace, name: str) -> None:
    times = record.times(name, "writes")
    never = np.flatnonzero(times == 0)
    if len(never):
        text = f"{name}[{never[0]}] is never written ({len(never)} of {len(times)} elements are not)"
        raise feedback.Mistake(f"{text}\nLikely cause: {_gap(never, len(times))}.")


def _gap(never: np.ndarray, n: int) -> str:
    if len(never) == n:
        return "it is not written yet, or no thread gets past its guard"
    if (never == n - 1).all():
        return "the last byte of an odd n still holds one element, in its high nibble"
    if (never % 2 == 1).all() and len(never) == n // 2:
        return "only the even element of each byte is written"
    if never[-1] == n - 1 and never[-1] - never[0] + 1 == len(never):
        return f"no thread takes the bytes from there on; a thread's number is {INDEX}"
    return f"the threads' numbers have gaps; a thread's number is {INDEX}"


def _check_written_once(record: Trace, name: str, cause: str = "") -> None:
    _check_written_most_once(record, name, cause)
    _check_written(record, name)


def _check_written_most_once(record: Trace, name: str, cause: str) -> None:
    times = record.times(name, "writes")
    many = np.flatnonzero(times > 1)
    if not len(many):
        return
    who = record.threads(name, "writes", many[0])
    blocks, threads = {block for block, _ in who}, {thread for _, thread in who}
    if len(set(who)) == 1:
        cause = cause or "one thread writes it again"
    elif len(blocks) > 1:
        cause = cause or f"thread blocks do each other's work; a thread's number is {INDEX}"
    else:
        cause = cause or f"threads do each other's work; a thread's number is {INDEX}"
    by = f"thread {_listed(threads)} of block {_listed(blocks)}" if record.blocks > 1 else f"thread {_listed(threads)}"
    text = f"{name}[{many[0]}] is written {times[many[0]]} times, by {by}; once is enough"
    raise feedback.Mistake(f"{text} ({len(many)} of {len(times)} are written more than once)\nLikely cause: {cause}.")


def _check_read_once(record: Trace, name: str, cause: str) -> None:
    times = record.times(name, "reads")
    many = np.flatnonzero(times > 1)
    if len(many):
        threads = {thread for _, thread in record.threads(name, "reads", many[0])}
        asked, enough = record.bytes(name, "reads"), record.arrays[name].nbytes
        text = f"{name}[{many[0]}] is read {times[many[0]]} times, by thread {_listed(threads)}"
        text += f": {asked:,} bytes are asked for where {enough:,} would do"
        raise feedback.Mistake(f"{text}\nLikely cause: {cause}.")


def _no_more(count: int, enough: int, text: str, cause: str) -> None:
    feedback.that(count <= enough, f"{text}; {enough} would do\nLikely cause: {cause}.")


def _check_coalesced(record: Trace, name: str, verb: str) -> None:
    """A request touches no more sectors than its elements and as many others side by side, and one for misalignment."""
    width = record.arrays[name].itemsize
    for request in record.requests(name, verb):
        touched = len({i * width // 32 for i in request})
        least = -(-len(request) * width // 32)
        text = f"a warp {verb} {name}[{request[0]}], [{request[1]}], …" if len(request) > 1 else ""
        text += f" together: {touched} sectors of 32 bytes for {len(request)} threads, where {least} would do"
        feedback.that(touched <= 2 * least + 1, f"{text}\nLikely cause: {NEIGHBOURS}.")


def _listed(numbers) -> str:
    numbers = sorted(numbers)
    return ", ".join(map(str, numbers[:3])) + (", …" if len(numbers) > 3 else "")

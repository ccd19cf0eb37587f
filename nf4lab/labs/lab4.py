"""What the checks of lab 4 (kernels) compare and count, and the mistakes that they name.

A kernel is traced first, thread by thread (`nf4lab.kernels.tracing`): what would corrupt a GPU's memory never reaches
one. What is clean is then launched for real, in the simulator or on the GPU. Both happen where the student's code runs
(`nf4lab.labs.run_kernels`); what they found out comes here as numbers. Each `check_…` takes the student's function and
a seed for its data, and raises `feedback.Mistake`.
"""

from collections.abc import Callable

import numpy as np
import torch

import nf4lab
from nf4lab.kernels.tracing import Access, Trace
from nf4lab.labs import feedback, run_kernels

BLOCK_SIZE = 64
LEVELS = nf4lab.FORMATS["nf4"].levels.numpy()
BOUNDARIES = nf4lab.FORMATS["nf4"].boundaries.numpy()
DEQUANTIZE = ("packed", "absmax", "levels", "out")  # what a kernel's arguments are, whatever it calls them
QUANTIZE = ("x", "boundaries", "packed", "absmax")
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
CODE_OF = """
@cuda.jit(device=True)
def code_of(s, boundaries):
    below, half = 0, 8
    while half:
        if s > boundaries[below + half - 1]:
            below += half
        half //= 2
    return below
"""  # whatever the student's code_of does, what calls it is checked with this one


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
    with feedback.Cases() as compared:
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
                "that is the stretch from the first byte to the last, in 32s; where it begins counts, and so do gaps": [
                    stretch // 32, -(-stretch // 32), stretch / 32
                ],
                "a sector is touched once for each thread of the 32": 32,
                "a warp has 32 threads: 0 to 31": len(set().union(*by_thread[:-1])),
            }  # fmt: skip
            got = feedback.call(sectors, first, stride, width)
            what = f"sectors(first={first}, stride={stride}, width={width})"
            compared.same(got, len(set().union(*by_thread)), what, causes)


def check_least_bytes(least_bytes: Callable, seed: int) -> None:
    """(read, written): what dequantizing n weights to float16 cannot avoid."""
    rng = np.random.default_rng(seed)
    with feedback.Cases() as compared:
        for n in (128, 640, 999, *map(int, rng.integers(1, 10**6, 8))):
            half, n_blocks = (n + 1) // 2, -(-n // BLOCK_SIZE)
            read = half + 4 * n_blocks
            causes = {
                "the absmax of each block is read too": (half, 2 * n),
                "an absmax is a float32: 4 bytes, not 1": (half + n_blocks, 2 * n),
                "an absmax is a float32: 4 bytes, not 2": (half + 2 * n_blocks, 2 * n),
                "two codes share a byte": (n + 4 * n_blocks, 2 * n),
                "a float16 has 2 bytes": [(read, 4 * n), (read, n)],
                "the last byte of an odd n is half used, and is read whole: round up": (n // 2 + 4 * n_blocks, 2 * n),
                "the short last block has an absmax like any other: round up": (half + 4 * (n // BLOCK_SIZE), 2 * n),
                "round up, both the bytes of an odd n and the blocks": (n // 2 + 4 * (n // BLOCK_SIZE), 2 * n),
                "bytes are whole numbers: // instead of /": [
                    (n / 2 + 4 * n_blocks, 2 * n), (n / 2 + 4 * n / BLOCK_SIZE, 2 * n),
                    (half + 4 * n / BLOCK_SIZE, 2 * n)
                ],
                "read comes first, then written": (2 * n, read),
            }  # fmt: skip
            got = feedback.call(least_bytes, n, BLOCK_SIZE)
            compared.same(got, (read, 2 * n), f"least_bytes({n}, {BLOCK_SIZE})", causes)


def check_blocks_for(blocks_for: Callable, seed: int) -> None:
    """The thread blocks that cover n_bytes."""
    rng = np.random.default_rng(seed)
    cases = [(1024, 32), (1000, 32), (1, 256), (257, 256)]
    cases += [(int(rng.integers(1, 10**7)), 2 ** int(rng.integers(5, 11))) for _ in range(10)]
    with feedback.Cases() as compared:
        for n_bytes, threads in cases:
            causes = {
                "rounded down: the last bytes have no thread": [n_bytes // threads, max(1, n_bytes // threads)],
                "one more than needed where the threads divide the bytes": n_bytes // threads + 1,
                "a launch takes a whole number: round up": n_bytes / threads,
                "rounded to the nearest: the last bytes may have no thread": round(n_bytes / threads),
                "a thread takes a byte, not an element": -(-2 * n_bytes // threads),
                "that is the number of threads, not of blocks": [n_bytes, -(-n_bytes // threads) * threads],
            }
            got = feedback.call(blocks_for, n_bytes, threads)
            compared.same(got, -(-n_bytes // threads), f"blocks_for({n_bytes}, {threads})", causes)


# Dequantize (questions 3, 5, 6 and 7)


def check_body(body: Callable, *cases: tuple[int, int, int]) -> None:
    """A plain function of a thread's number, run for each byte and for idle threads. cases: (seed, n, idle)."""
    with feedback.Cases() as compared:
        for seed, n, idle in cases:
            packed, absmax = quantized(weights(seed, n))
            arrays = [packed, absmax, LEVELS, np.full(n, np.nan, np.float16)]
            record = Record(
                feedback.beside(run_kernels.traced_body, body, "body", len(packed) + idle, arrays, BLOCK_SIZE, [3]),
                DEQUANTIZE,
            )
            _check_written(record, "out")
            _compare_out(compared, record["out"], packed, absmax, record.named("out"))


def check_kernel(kernel: Callable, *cases: tuple[int, int, int, int | None]) -> None:
    """A kernel on n weights, traced and launched: as many blocks as it takes, or as said.

    cases: (seed, n), with the number of threads (default 32) and of thread blocks after them.
    """
    with feedback.Cases() as compared:
        for seed, n, threads, blocks in ((*case, *(32, None)[len(case) - 2 :]) for case in cases):
            packed, absmax = quantized(weights(seed, n))
            arrays = [packed, absmax, LEVELS, np.full(n, np.nan, np.float16)]
            blocks = blocks or -(-len(packed) // threads)
            record = Record(
                feedback.beside(run_kernels.traced, kernel, "kernel", blocks, threads, arrays, [3]), DEQUANTIZE
            )
            _check_written(record, "out")
            _compare_out(compared, record["out"], packed, absmax, record.named("out"))
            if found := feedback.beside(run_kernels.launched, kernel, blocks, threads, arrays):
                what = f"{record.named('out')}, from {found['where']},"
                _compare_out(compared, found["arrays"][3], packed, absmax, what)


def check_body_traffic(body: Callable, seed: int) -> None:
    """Each byte of codes is read once and each absmax once a byte; a warp's threads lie side by side."""
    packed, absmax = quantized(weights(seed, 640))
    arrays = [packed, absmax, LEVELS, np.full(640, np.nan, np.float16)]
    record = feedback.beside(run_kernels.traced_body, body, "body", len(packed), arrays, BLOCK_SIZE, [3])
    _check_dequantize_traffic(Record(record, DEQUANTIZE))


def check_kernel_traffic(kernel: Callable, seed: int, blocks: int = 16, threads: int = 64, table: bool = False) -> None:
    """The same of a kernel. With `table`, levels are read 16 times a thread block and no more."""
    packed, absmax = quantized(weights(seed, 2048))
    arrays = [packed, absmax, LEVELS, np.full(2048, np.nan, np.float16)]
    found = feedback.beside(run_kernels.traced, kernel, "kernel", blocks, threads, arrays, [3])
    record = Record(found, DEQUANTIZE)
    _check_dequantize_traffic(record)
    if table:
        reads, enough = int(record.times("levels", "reads").sum()), 16 * blocks
        _no_more(
            reads, enough, f"{record.named('levels')} is read {reads} times by {blocks} thread blocks", TABLE_TWICE
        )


def _check_dequantize_traffic(record: "Record") -> None:
    _check_written(record, "out")
    _check_read_once(record, "packed", BYTE_TWICE)
    reads, n_bytes = int(record.times("absmax", "reads").sum()), record["packed"].size
    _no_more(reads, n_bytes, f"{record.named('absmax')} is read {reads} times for {n_bytes} bytes", ABSMAX_TWICE)
    _check_coalesced(record, "packed", "reads")
    _check_coalesced(record, "out", "writes")


def _compare_out(compared: feedback.Cases, out, packed: np.ndarray, absmax: np.ndarray, what: str) -> None:
    n = len(out)
    codes = np.stack([packed >> 4, packed & 15], axis=1)  # (n_bytes, 2)
    swapped, codes = codes[:, ::-1].reshape(-1)[:n], codes.reshape(-1)[:n]
    block, even = np.arange(n) // BLOCK_SIZE, np.arange(n) % 2 == 0
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
        "that mask keeps three bits; & 15 keeps four": [
            halves(np.where(where, codes & 7, codes), scales) for where in (even | True, ~even, even)
        ],
        "both elements have the high nibble": halves(np.where(even, codes, swapped), scales),
        "both elements have the low nibble": halves(np.where(even, swapped, codes), scales),
        "rounded twice: multiply in float32 and let the array round": torch.from_numpy(
            LEVELS.astype(np.float16)[codes] * scales.astype(np.float16)
        ),
    }
    compared.same(torch.from_numpy(out), halves(codes, scales), what, causes)


# Quantize (questions 8, 9 and 10)


def check_code_of(code_of: Callable, seed: int) -> None:
    """The number of boundaries strictly below s; code_of is a device function."""
    text = "code_of is to be called by a kernel: put @cuda.jit(device=True) above it"
    feedback.that(feedback.has(code_of, "py_func"), text)
    rng = np.random.default_rng(seed)
    inside = np.concatenate([LEVELS, rng.uniform(-1, 1, 50).astype(np.float32)])
    with feedback.Cases() as compared:
        for s, note in [*((s, "") for s in inside), *((s, ", exactly at a boundary") for s in BOUNDARIES)]:
            below = int((s > BOUNDARIES).sum())
            causes = {
                "a tie goes to the lower level: count the boundaries strictly below s": int((s >= BOUNDARIES).sum()),
                "the boundaries above s were counted": [int((s < BOUNDARIES).sum()), int((s <= BOUNDARIES).sum())],
                "the last boundary was left out: there are 15": int((s > BOUNDARIES[:-1]).sum()),
                "the first boundary was left out: there are 15": int((s > BOUNDARIES[1:]).sum()),
                "codes count from 0": below + 1,
            }
            got = feedback.call(code_of, s, BOUNDARIES, method="py_func")
            compared.same(got, below, f"code_of({s:.7f}, boundaries){note}", causes)


def check_quantize_block(quantize_block: Callable, *blocks: np.ndarray) -> None:
    """Blocks of up to 64 values as plain Python: (list of bytes, absmax)."""
    with feedback.Cases() as codes, feedback.Cases() as absmaxes:
        for x in blocks:
            got = feedback.beside(run_kernels.called, quantize_block, [x, BOUNDARIES], {"code_of": CODE_OF})
            packed, absmax = feedback.pair(got, 2, "quantize_block must return (list of bytes, absmax)")
            expected = quantized(x)
            try:
                packed = np.array([int(byte) for byte in packed])
            except (TypeError, ValueError):
                text = f"quantize_block must return (list of bytes, absmax); got {feedback.describe(packed)}"
                raise feedback.Mistake(text) from None
            _compare_absmax(
                absmaxes, np.array([feedback.number(absmax, "absmax")], np.float32), expected[1], x, "absmax"
            )
            message = f"{len(x)} values make {len(expected[0])} bytes; got {len(packed)}"
            feedback.that(len(packed) == len(expected[0]), message)
            wide = packed[(packed < 0) | (packed > 255)]
            feedback.that(not len(wide), f"a byte holds 0 to 255; got {wide[:1]}")
            _compare_codes(codes, packed.astype(np.uint8), expected[0], x, "codes")


def blocks_with_edges(seed: int) -> list[np.ndarray]:
    """Blocks that go wrong first: zeros, one value, odd and even rests, weights beside boundaries."""
    short = [weights(seed + n, n) for n in (1, 17, 40, 63)]
    return [np.zeros(BLOCK_SIZE, np.float32), *short, beside_boundaries(seed)]


def check_quantize(kernel: Callable, x: np.ndarray) -> None:
    """A kernel of one thread block of 32 for each block of 64 values, traced and launched."""
    arrays = _quantize_arrays(x)
    record = _trace_quantize(kernel, arrays)
    for name in ("absmax", "packed"):
        _check_written(record, name)
    _compare_quantized(record["packed"], record["absmax"], x, "")
    n_blocks = len(arrays[3])
    if found := feedback.beside(run_kernels.launched, kernel, n_blocks, 32, arrays, sources={"code_of": CODE_OF}):
        _compare_quantized(*found["arrays"][2:], x, f", from {found['where']},")


def long_with_edges(seed: int) -> np.ndarray:
    """A block beside boundaries, one of zeros, whole ones, and a short one of odd length."""
    rest = 2 * int(np.random.default_rng(seed).integers(5, 25)) + 1
    zeros = np.zeros(BLOCK_SIZE, np.float32)
    return np.concatenate([beside_boundaries(seed), zeros, weights(seed, BLOCK_SIZE + rest)])


def check_quantize_traffic(kernel: Callable, seed: int) -> None:
    """Each value is read once; each byte and each absmax is written once, and never read."""
    record = _trace_quantize(kernel, _quantize_arrays(weights(seed, 5 * BLOCK_SIZE)), once=[2, 3])
    _check_written(record, "packed")
    _check_written(record, "absmax")
    _check_read_once(record, "x", VALUE_TWICE)
    for name in ("packed", "absmax"):
        reads = int(record.times(name, "reads").sum())
        hint = "\nRemember: what threads tell each other goes through shared memory."
        feedback.that(not reads, f"{record.named(name)} is read {reads} times; it is there to be written{hint}")
    _check_coalesced(record, "packed", "writes")


def _quantize_arrays(x: np.ndarray) -> list[np.ndarray]:
    n_blocks = -(-len(x) // BLOCK_SIZE)
    return [x, BOUNDARIES, np.full((len(x) + 1) // 2, 0x5A, np.uint8), np.full(n_blocks, np.nan, np.float32)]


def _trace_quantize(kernel: Callable, arrays: list[np.ndarray], once=()) -> "Record":
    found = feedback.beside(
        run_kernels.traced, kernel, "quantize", len(arrays[3]), 32, arrays, list(once), sources={"code_of": CODE_OF}
    )
    return Record(found, QUANTIZE)


def _compare_quantized(packed: np.ndarray, absmax: np.ndarray, x: np.ndarray, note: str) -> None:
    expected = quantized(x)
    with feedback.Cases() as compared:
        _compare_absmax(compared, absmax, expected[1], x, f"absmax{note}")
    with feedback.Cases() as compared:
        _compare_codes(compared, packed, expected[0], x, f"codes{note}")


def _compare_absmax(compared: feedback.Cases, absmax, expected: np.ndarray, x: np.ndarray, what: str) -> None:
    blocks = torch.from_numpy(np.pad(x, (0, -len(x) % BLOCK_SIZE)).reshape(-1, BLOCK_SIZE))
    by_thread = blocks.abs().reshape(len(blocks), 32, 2).amax(dim=2)  # (n_blocks, 32)
    causes = {
        "the largest value; the largest magnitude needs abs": [
            blocks.amax(1), blocks.amax(1).clamp(min=0), torch.from_numpy(x).max().reshape(1)
        ],
        "the magnitude of the lowest value only": blocks.amin(1).abs(),
        "only the even elements count": blocks[:, 0::2].abs().amax(1),
        "only the odd elements count": blocks[:, 1::2].abs().amax(1),
        "only one thread's pair counts: all 32 must meet": by_thread[:, 0],
        "half of the threads are left out: the first stride is 16, and the last is 1": [
            by_thread[:, :16].amax(1), by_thread[:, 0::2].amax(1)
        ],
        "the largest of everything; each block of 64 has its own": blocks.abs().max().expand(len(blocks)),
    }  # fmt: skip
    compared.same(torch.from_numpy(absmax), torch.from_numpy(expected), what, causes)


def _compare_codes(compared: feedback.Cases, packed, expected: np.ndarray, x: np.ndarray, what: str) -> None:
    n = len(x)
    blocks = np.pad(x, (0, -n % BLOCK_SIZE)).reshape(-1, BLOCK_SIZE)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    with np.errstate(all="ignore"):
        s = blocks * np.where(absmax > 0, 1 / absmax, 0).astype(np.float32)
        divided, unguarded = np.nan_to_num(blocks / absmax), blocks * (1 / absmax)
        in_float64 = (np.nan_to_num(blocks.astype(np.float64) * (1 / absmax.astype(np.float64)))).astype(np.float64)

    def codes(s, compare=np.greater, left_over=7):
        found = compare(s[..., None], BOUNDARIES).sum(axis=-1).reshape(-1)[:n]
        return torch.from_numpy(np.append(found, left_over)[: n + n % 2])

    got, right = (torch.from_numpy(np.stack([p >> 4, p & 15], axis=1).reshape(-1)) for p in (packed, expected))
    causes = {
        "the nibbles are swapped: the even element has the high one": right.reshape(-1, 2).flip(1).reshape(-1),
        "a tie goes to the lower level: count the boundaries strictly below": codes(s, np.greater_equal),
        "divided by absmax; the rule multiplies by its reciprocal, and that rounds elsewhere": codes(divided),
        "the reciprocal is a float64: stay in float32, as x is": codes(in_float64),
        "1 / 0 is infinite, and 0 times that is not a number: in a block of zeros take 0 for the reciprocal": (
            codes(unguarded)
        ),
        "the nibble that an odd n leaves over holds the code of zero, 7": codes(s, left_over=0),
        "the values were not scaled by their absmax": codes(blocks),
    }
    compared.same(got, right, what, causes)


# A layout for shared memory (question 11)


def check_place(place: Callable, *tiles: tuple[int, int]) -> None:
    """Where a tile's words lie: none in another's place, and neither a warp's write nor its read takes two turns.

    tiles: (rows, width) of each, multiples of 8 and of 32. A write is 32 neighbouring words of a row, a read the
    fragment that begins at a multiple of 8 rows and 4 words.
    """
    tables = {tile: _table(place, *tile) for tile in tiles}
    causes = tuple(cause for cause, wrong in MISPLACED.items() if all(_is_placed(t, wrong) for t in tables.values()))
    for (rows, width), table in tables.items():
        _check_room(table, rows * (width + 4), width, causes)
        _check_distinct(table, width, causes)
        for row in range(rows):
            for word in range(0, width, 32):
                what = f"writing words {word} to {word + 31} of row {row}, in a tile {width} words wide,"
                _check_one_turn(table[row, word : word + 32], what, causes)
        for row in range(0, rows, 8):
            for word in range(0, width, 4):
                what = f"reading words {word} to {word + 3} of rows {row} to {row + 7}, in a tile {width} words wide,"
                _check_one_turn(table[row : row + 8, word : word + 4], what, causes)


MISPLACED = {  # cause -> where it puts the words of row (rows, 1), word (1, width): int64 (rows, width)
    "with the rows one behind the other, all of them begin in the same bank": (
        lambda row, word, rows, width: row * width + word
    ),
    "one word left free moves the next row by one bank, and a fragment takes four words of each row": (
        lambda row, word, rows, width: row * (width + 1) + word
    ),
    "with the columns one behind the other, the words of a row lie far apart, and they are written together": (
        lambda row, word, rows, width: word * rows + row
    ),
    "^ row exchanges single words, and a fragment takes four words of each row": (
        lambda row, word, rows, width: row * width + (word ^ row)
    ),
    "a place is the number of a word, not of a byte": lambda row, word, rows, width: 4 * (row * (width + 4) + word),
}  # fmt: skip


def _table(place: Callable, rows: int, width: int) -> np.ndarray:
    """What place gives for each word of a tile: int64 (rows, width), from 0 on."""
    found = feedback.plain(feedback.beside(run_kernels.places, place, rows, width))
    feedback.that(list(map(len, found)) == [width] * rows, "not every word has been asked for")
    for row, word in np.ndindex(rows, width):
        value, what = found[row][word], f"place({row}, {word}, {width})"
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        feedback.that(whole, f"{what}: expected a whole number, got {feedback.describe(value)}")
        feedback.that(0 <= value < 2**31, f"{what} is {value}: places count from 0, and end with the array")
    return np.array(found, np.int64)


def _is_placed(table: np.ndarray, wrong: Callable) -> bool:
    rows, width = table.shape
    return np.array_equal(table, wrong(np.arange(rows)[:, None], np.arange(width), rows, width))


def _check_room(table: np.ndarray, room: int, width: int, causes: tuple) -> None:
    beyond = np.argwhere(table >= room)
    if len(beyond):
        row, word = beyond[0].tolist()
        text = f"place({row}, {word}, {width}) is {table[row, word]}; a tile of {len(table)} rows has 0 to {room - 1}"
        raise feedback.Mistake(text, causes)


def _check_distinct(table: np.ndarray, width: int, causes: tuple) -> None:
    places, counts = np.unique(table, return_counts=True)
    if (counts > 1).any():
        taken = places[counts > 1][0]
        (row, word), (row_2, word_2) = np.argwhere(table == taken)[:2].tolist()
        text = f"place({row}, {word}, {width}) and place({row_2}, {word_2}, {width}) are both {taken}"
        raise feedback.Mistake(f"{text}: one word would overwrite the other", causes)


def _check_one_turn(places: np.ndarray, what: str, causes: tuple) -> None:
    """Different words of one bank are answered one after the other."""
    banks = places.reshape(-1) % 32
    counts = np.bincount(banks, minlength=32)
    asked = places.reshape(-1)[banks == counts.argmax()]
    text = f"{what} takes {counts.max()} turns: bank {counts.argmax()} is asked for the places {_listed(asked)}"
    feedback.that(counts.max() == 1, text, *causes)


# What all of them share


class Record(Trace):
    """A trace that came as plain data, under the names that the question gives the arguments."""

    def __init__(self, found: dict, roles: tuple[str, ...]):
        self.own = dict(zip(roles, found["names"], strict=True))
        accesses = [
            Access(roles[array], "writes" if writes else "reads", index, block, thread, place, turn)
            for array, writes, index, block, thread, place, turn in np.asarray(found["accesses"]).tolist()
        ]
        super().__init__(int(found["blocks"]), dict(zip(roles, found["arrays"], strict=True)), accesses)

    def __getitem__(self, role: str) -> np.ndarray:
        return self.arrays[role]

    def named(self, role: str) -> str:
        """What the kernel itself calls it."""
        return self.own[role]


def _check_written(record: Record, role: str) -> None:
    times = record.times(role, "writes")
    never = np.flatnonzero(times == 0)
    if len(never):
        text = f"{record.named(role)}[{never[0]}] is never written ({len(never)} of {len(times)} elements are not)"
        raise feedback.Mistake(f"{text}\n{_gap(never, len(times))}.")


def _gap(never: np.ndarray, n: int) -> str:
    """What is so about the elements that are never written: not a cause, a fact."""
    if len(never) == n:
        return "Nothing is written: it is not written yet, or no thread gets past its guard"
    if (never == n - 1).all():
        return "It is the last one: the last byte of an odd n still holds one element, in its high nibble"
    if (never % 2 == 1).all() and len(never) == n // 2:
        return "Only the even element of each byte is written"
    if never[-1] == n - 1 and never[-1] - never[0] + 1 == len(never):
        return "No thread takes the bytes from there on"
    return "Others before and after it are written: the threads' numbers have gaps"


def _check_read_once(record: Record, role: str, reminder: str) -> None:
    times = record.times(role, "reads")
    many = np.flatnonzero(times > 1)
    if len(many):
        threads = {thread for _, thread in record.threads(role, "reads", many[0])}
        asked, enough = record.bytes(role, "reads"), record.arrays[role].nbytes
        text = f"{record.named(role)}[{many[0]}] is read {times[many[0]]} times, by thread {_listed(threads)}"
        text += f": {asked:,} bytes are asked for where {enough:,} would do"
        raise feedback.Mistake(f"{text}\nRemember: {reminder}.")


def _no_more(count: int, enough: int, text: str, reminder: str) -> None:
    feedback.that(count <= enough, f"{text}; {enough} would do\nRemember: {reminder}.")


def _check_coalesced(record: Record, role: str, verb: str) -> None:
    """A request touches no more sectors than its elements and as many others side by side, and one for misalignment."""
    width = record.arrays[role].itemsize
    for request in record.requests(role, verb):
        touched = len({i * width // 32 for i in request})
        least = -(-len(request) * width // 32)
        name = record.named(role)
        text = f"a warp {verb} {name}[{request[0]}], [{request[1]}], …" if len(request) > 1 else ""
        text += f" together: {touched} sectors of 32 bytes for {len(request)} threads, where {least} would do"
        feedback.that(touched <= 2 * least + 1, f"{text}\nRemember: {NEIGHBOURS}.")


def _listed(numbers) -> str:
    numbers = sorted(numbers)
    return ", ".join(map(str, numbers[:3])) + (", …" if len(numbers) > 3 else "")


# Known to be wrong in every respect: where a check passes one of these while grading, something has tampered with it

_BODY = """
    if i < packed.size:
        out[2 * i] = levels[packed[i] & 15] * absmax[0]
        if 2 * i + 1 < out.size:
            out[2 * i + 1] = levels[packed[i] & 15] * absmax[0] + levels[0]
"""
_KERNEL = "\n@cuda.jit\ndef {name}(packed, absmax, levels, out):\n    i = cuda.grid(1)" + _BODY
_QUANTIZE = """
@cuda.jit
def quantize(x, boundaries, packed, absmax):
    j = 64 * cuda.blockIdx.x + 2 * cuda.threadIdx.x
    if j < x.size:
        packed[j // 2] = 16 * (x[j] > 0) + (x[j] > 1)
        absmax[cuda.blockIdx.x] = x[64 * cuda.blockIdx.x] - 1
"""
CANARIES = {
    "q3": {"dequantize_byte": "def dequantize_byte(i, packed, absmax, levels, out, block_size):" + _BODY},
    **{f"q{q}": {name: _KERNEL.format(name=name)} for q, name in ((5, "v1"), (6, "v2"), (7, "v3"))},
    "q10": {"quantize": _QUANTIZE},
}

"""The intrinsics as plain Python, for numba's CUDA simulator: same names, same results, no GPU.

Addresses are arrays here (the simulator knows no pointers); a lane is a thread of the simulator's block.
"""

import threading

import numpy as np


def float_bits(x):
    return np.float32(x).view(np.uint32)


def bits_float(bits):
    return np.uint32(bits).view(np.float32)


def multiply(a, b):
    return np.float32(a) * np.float32(b)


def quotient(a, b):
    with np.errstate(all="ignore"):
        return np.float32(a) / np.float32(b)


def reciprocal(x):
    return quotient(1, x)


def next_code(word, code, s, boundary):
    return np.uint32((int(word) << 4) + int(code) + bool(s > boundary) & 0xFFFFFFFF)


def load(x, i):
    value = x[i]
    if value.dtype == np.uint16:
        return np.uint32(int(value) << 16).view(np.float32)
    return np.float32(value)


def in_16_bytes(out):
    return 16 // out.dtype.itemsize


def load_codes(packed, i, out):
    count = in_16_bytes(out) // 2
    return int.from_bytes(bytes(int(packed[count * i + k]) for k in range(count)), "little")


def load8(x, i, raw):
    for k in range(8):
        raw[k] = float_bits(load(x, 8 * i + k))


def widen8(x, raw, values):
    for k in range(8):
        values[k] = bits_float(raw[k])


def store(out, i, value):
    if out.dtype == np.uint16:
        bits = int(np.float32(value).view(np.uint32))
        quiet = bits & 0x7FFFFFFF > 0x7F800000
        out[i] = 0x7FFF if quiet else (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    else:
        with np.errstate(over="ignore"):
            out[i] = out.dtype.type(value)


def store4(data, i, word):
    for k in range(4):
        data[4 * i + k] = int(word) >> (8 * k) & 255


def store16(out, i, values):
    count = in_16_bytes(out)
    for k in range(count):
        store(out, count * i + k, values[k])


def store_pair(out, i, low, high):
    store(out, 2 * i, low)
    store(out, 2 * i + 1, high)


def max_magnitude(bits, value):
    return max(int(bits), int(float_bits(value)) & 0x7FFFFFFF)


def load16(data, i, words, first):
    words[first : first + 4] = bytes_of(data)[16 * int(i) : 16 * int(i) + 16].view(np.uint32)


def bytes_of(array):
    """The memory of an array (or of the simulator's stand-in for one) as uint8."""
    array = getattr(array, "_item", array)  # what the simulator wraps a kernel's argument in
    return np.asarray(getattr(array, "_ary", array)).view(np.uint8)


def pack_half(low, high):
    return int(np.array([low, high], dtype=np.float16).view(np.uint32)[0])


def has_float16_range(x):
    return x.dtype == np.float16


def multiply_16x8x16(sums, first, *fragments):
    multiply_tile(np.empty(0, np.float16), sums, first, *fragments)


def store16_words(data, i, words, first):
    bytes_of(data)[16 * int(i) : 16 * int(i) + 16] = np.array(
        [int(word) for word in words[first : first + 4]], np.uint32
    ).view(np.uint8)


def max_magnitude8(x, raw):
    return max(int(word) & 0x7FFFFFFF for word in raw)


def _dtype(x):
    return np.asarray(getattr(getattr(x, "_item", x), "_ary", x)).dtype


def widen(x, raw, e):
    return load(np.asarray(raw, np.uint32).view(_dtype(x)), e)


def max_magnitude_64_bytes(x, raw):
    return max(int(float_bits(widen(x, raw, e))) & 0x7FFFFFFF for e in range(4 * in_16_bytes(x)))


def element_bits(x, i):
    return int(np.asarray(x[i]).reshape(1).view(np.uint32 if _dtype(x) == np.float32 else np.uint16)[0])


def store_codes(packed, i, x, words):
    count = in_16_bytes(x) // 2
    for k in range(count):
        store4(packed, count * int(i) + k, words[k])


def pair_at(shared, word, byte, lane_bytes):
    return shared[((int(word) >> 8 * byte & 255) * 256 + int(lane_bytes)) >> 2]


def pair_selected(shared, word, selector, lane_bytes):
    return pair_at(shared, word, int(selector) >> 4 & 3, lane_bytes)


def _exchange(value):
    """The values that the lanes of this warp bring, by thread number: call it from every lane."""
    thread = threading.current_thread()
    me, threads = thread.thread_id, int(np.prod(thread._manager._block_dim))
    warps = thread._manager.__dict__.setdefault("warps", {})
    barrier, box = warps.setdefault(me // 32, (threading.Barrier(min(32, threads - me // 32 * 32)), {}))
    barrier.wait(60)
    box[me] = value
    barrier.wait(60)
    return me, dict(box)


def max_across(value, lanes):
    me, seen = _exchange(value)
    first = me - me % lanes
    return max(seen[peer] for peer in range(first, first + lanes) if peer in seen)


def shared_start(shared):
    return 0


def copy16(shared, address, data, i):
    bytes_of(shared)[int(address) : int(address) + 16] = bytes_of(data)[16 * int(i) : 16 * int(i) + 16]


def load16_shared(shared, address, words, first):
    load16(shared, int(address) // 16, words, first)


def pinned(shared, number):
    return shared


def shifted(number, by):
    return int(number) >> int(by)


def copy16_or_zeros(shared, address, data, i, there):
    bytes_of(shared)[int(address) : int(address) + 16] = bytes_of(data)[16 * int(i) : 16 * int(i) + 16] if there else 0


def copies_go():
    """Copies are made at once here."""


def copies_done(under_way):
    """Copies are made at once here."""


def sync_warp():
    _exchange(None)


def kernel_before_done():
    """One kernel after another here."""


def next_kernel_may_start():
    """One kernel after another here."""


def sync_threads(number, count):
    barriers = threading.current_thread()._manager.__dict__.setdefault("named_barriers", {})
    barriers.setdefault(int(number), threading.Barrier(int(count))).wait(60)


def copies_seen():
    """Nobody looks at memory in another way here."""


class Barrier:
    """An mbarrier: after `count` arrivals its phase turns, from 0 to 1 and back."""

    def __init__(self, count):
        self.count = self.missing = count
        self.phase, self.turned = 0, threading.Condition()


def _barriers():
    return threading.current_thread()._manager.__dict__.setdefault("barriers", {})


def barrier_init(shared, i, number):
    _barriers()[int(i)] = Barrier(int(number))


def barriers_ready():
    """Initialised at once here."""


def barrier_arrive(shared, i, number):
    barrier = _barriers()[int(i)]
    with barrier.turned:
        barrier.missing -= int(number)
        if not barrier.missing:
            barrier.missing, barrier.phase = barrier.count, barrier.phase ^ 1
            barrier.turned.notify_all()


def barrier_wait(shared, i, number):
    barrier = _barriers()[int(i)]
    with barrier.turned:
        if not barrier.turned.wait_for(lambda: barrier.phase != int(number), timeout=60):
            raise RuntimeError(f"nobody arrives at the barrier in word {i}")


def copy_bulk(shared, to, data, i, count, barrier):
    source = bytes_of(data)[16 * int(i) : 16 * int(i) + int(count)]
    bytes_of(shared)[4 * int(to) : 4 * int(to) + int(count)] = source
    barrier_arrive(shared, barrier, 1)


def load_matrices(shared, address, words, first):
    me, rows = _exchange(int(address) // 4)
    lane, warp = me % 32, me - me % 32
    for k in range(4):
        words[first + k] = shared[rows[warp + 8 * k + lane // 4] + lane % 4]


def pack_like(x, low, high):
    if x.dtype == np.float16:
        return pack_half(low, high)
    halves = np.zeros(2, np.uint16)
    store(halves, 0, low)
    store(halves, 1, high)
    return int(halves.view(np.uint32)[0])


def pair_of(x, word):
    """The two elements of a uint32, of the type of x, as float32."""
    if x.dtype == np.float16:
        return np.array([word], np.uint32).view(np.float16).astype(np.float32)
    return np.array([word << 16 & 0xFFFF0000, word & 0xFFFF0000], np.uint32).view(np.float32)


def multiply_tile(x, sums, first, *fragments):
    """Lane (g, t) brings A[g, 2t:], A[g + 8, 2t:], A[g, 2t + 8:], A[g + 8, 2t + 8:], B[2t:, g], B[2t + 8:, g]: pairs.

    It gets C[g, 2t], C[g, 2t + 1], C[g + 8, 2t], C[g + 8, 2t + 1].
    """
    me, seen = _exchange([int(word) for word in fragments])
    a, b = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        pairs = [pair_of(x, word) for word in seen[me - me % 32 + lane]]
        for n, (row, column) in enumerate([(g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)]):
            a[row, column : column + 2] = pairs[n]
        b[2 * t : 2 * t + 2, g], b[2 * t + 8 : 2 * t + 10, g] = pairs[4], pairs[5]
    c, (g, t) = a @ b, divmod(me % 32, 4)
    for n, place in enumerate([(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)]):
        sums[first + n] += c[place]


def start_products(x, shared, products, a, b_at, eights):
    """Lane (g, t) of each warp brings A as four times for `multiply_tile`; B lies in shared memory.

    Row n of B: 128 bytes at b_at + 128 n, its piece of 16 bytes p at place p ^ (n & 7).
    """
    me, _ = _exchange(None)
    g, t = divmod(me % 32, 4)
    memory = bytes_of(shared)
    for eight in range(eights):
        row = memory[int(b_at) + 128 * (8 * eight + g) :][:128].reshape(8, 16)
        words = row[np.arange(8) ^ g].reshape(-1).view(np.uint32)
        products[4 * eight : 4 * eight + 4] = 0
        for step in range(4):
            b = words[8 * step + t], words[8 * step + 4 + t]
            multiply_tile(x, products, 4 * eight, *a[4 * step : 4 * step + 4], *b)


def products_there(products, eights):
    pass


def from_lane(value, lane):
    me, seen = _exchange(value)
    return seen[me - me % 32 + int(lane)]


def sum_across(value, lanes):
    me, seen = _exchange(value)
    offset = lanes >> 1
    while offset:
        seen = {peer: np.float32(seen[peer] + seen.get(peer ^ offset, np.float32(0))) for peer in seen}
        offset >>= 1
    return seen[me]

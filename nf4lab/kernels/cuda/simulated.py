"""The intrinsics as plain Python, for numba's CUDA simulator: same names, same results, no GPU.

Addresses are arrays here (the simulator knows no pointers); a lane is a thread of the simulator's block.
"""

import threading

import numpy as np

__all__ = [
    "bits_float",
    "float_bits",
    "has_float16_range",
    "in_16_bytes",
    "load",
    "load8",
    "load16",
    "load_codes",
    "max_across",
    "max_magnitude",
    "max_magnitude8",
    "multiply",
    "multiply_16x16x8",
    "pack_half",
    "pair_at",
    "quotient",
    "reciprocal",
    "store",
    "store4",
    "store16",
    "store16_words",
    "sum_across",
    "widen8",
]


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


def max_magnitude(bits, value):
    return max(int(bits), int(float_bits(value)) & 0x7FFFFFFF)


def load16(data, i, words, first):
    flat = np.asarray([int(data[16 * i + k]) for k in range(16)], dtype=np.uint8)
    words[first : first + 4] = flat.view(np.uint32)


def pack_half(low, high):
    return int(np.array([low, high], dtype=np.float16).view(np.uint32)[0])


def has_float16_range(x):
    return x.dtype == np.float16


def multiply_16x16x8(*_):
    raise NotImplementedError("the simulator has no tensor cores")


store16_words = multiply_16x16x8  # used by no other kernel


def max_magnitude8(x, raw):
    return max(int(word) & 0x7FFFFFFF for word in raw)


def pair_at(shared, word, byte, lane_bytes):
    return shared[((int(word) >> 8 * byte & 255) * 256 + int(lane_bytes)) >> 2]


def _exchange(value):
    """The values that all threads of the block bring, by thread number: two barriers, so call it from every thread."""
    thread = threading.current_thread()
    box = thread._manager.__dict__.setdefault("exchange", {})
    box[thread.thread_id] = value
    thread.syncthreads()
    seen = dict(box)
    thread.syncthreads()
    return thread.thread_id, seen


def max_across(value, lanes):
    me, seen = _exchange(value)
    first = me - me % lanes
    return max(seen[peer] for peer in range(first, first + lanes) if peer in seen)


def sum_across(value, lanes):
    me, seen = _exchange(value)
    offset = lanes >> 1
    while offset:
        seen = {peer: np.float32(seen[peer] + seen.get(peer ^ offset, np.float32(0))) for peer in seen}
        offset >>= 1
    return seen[me]

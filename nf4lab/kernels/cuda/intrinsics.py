"""What Python cannot say to a GPU in one word: wide loads and stores, casts, exact roundings, lanes of a warp.

`x`, `out` and `packed` are what a kernel got as an argument: a pointer on a GPU, a NumPy array in the simulator
(`simulated.py` has the same functions in plain Python). bfloat16 travels as the uint16 that holds its bits.

    load(x, i)               one element as float32
    store(out, i, value)     one float32, rounded to nearest even into out's dtype
    load8(x, i, raw)         elements 8i..8i+7 as they are into raw, uint32 (8,), 16 bytes a load    x on 16 bytes
    widen8(x, raw, values)   the same as float32 into values (8,): later, so that the loads need not be waited for
    in_16_bytes(out)         how many elements of out fill 16 bytes: 4 or 8, a constant when compiled
    load_codes(packed, i, out)  the bytes with the codes of the i-th 16 bytes of out, as one uint32: 2 or 4 bytes
    store16(out, i, values)  the i-th 16 bytes of out from 4 or 8 float32, rounded, in one store    out on 16 bytes
    store4(packed, i, word)  one uint32 into bytes 4i..4i+3    packed on 4 bytes
    float_bits(x)            the 32 bits of a float32; bits_float(bits) goes back
    max_magnitude(bits, x)   bits of the greater of two magnitudes, one given as its bits; NaN counts as greatest
    max_magnitude8(x, raw)   the same of eight elements as load8 left them, 16-bit ones two at a time
    pair_at(shared, word, b, lane_bytes)  the uint32 at byte 256 * (byte b of word) + lane_bytes of shared memory
    multiply(a, b)           a * b rounded by itself: never fused with a following addition
    quotient(a, b)           a / b, correctly rounded; reciprocal(x) is 1 / x
    load16(data, i, words, k)  bytes 16i..16i+15 into words[k:k + 4], one load    data on 16 bytes
    store16_words(data, i, words, k)  the other way
    pack_half(low, high)     two float32 rounded to float16, in one uint32
    has_float16_range(x)     whether x is float16, a constant when compiled
    multiply_16x8x16(sums, k, a0, a1, a2, a3, b0, b1)  a warp's tensor core step, sums[k:k + 4] += A B (PTX: mma.sync)
    max_across(v, lanes)     greatest uint32 among `lanes` neighbouring lanes (a power of two, at most 32)
    sum_across(v, lanes)     float32 sum over them
    pair_selected(shared, word, s, lane_bytes)  as pair_at, the byte chosen by bits 4 and 5 of s, which is 0x7604 else
    kernel_before_done()     waits until the kernels launched before have ended and what they wrote is seen
    next_kernel_may_start()  the next kernel may be launched, if it waits by itself (PTX: griddepcontrol)
    sync_threads(b, count)   `count` threads, whole warps, wait for each other at barrier b of 1 to 15
    copies_seen()            what this thread copied into shared memory is seen by the tensor cores' own reads of it
    start_products(x, shared, products, a, b_at, eights)  set under way: four warps' step over 64 columns (wgmma):
                             products (4 eights) = A B, A's 16 words a lane in a, B (8 eights rows of 128 bytes, pieces
                             swizzled) from byte b_at of shared memory on, a multiple of 1,024
    products_there(products, eights)  waits until they are there; nobody may touch a or products before
"""

from numba import config

if config.ENABLE_CUDASIM:
    from . import simulated as words
else:
    from . import ptx as words


def __getattr__(name):
    return getattr(words, name)

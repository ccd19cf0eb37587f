"""What Python cannot say to a GPU in one word: wide loads and stores, casts, exact roundings, lanes of a warp.

`x`, `out` and `data` are what a kernel got as an argument: a pointer on a GPU, a NumPy array in the simulator
(`simulated.py` has the same functions in plain Python). bfloat16 travels as the uint16 that holds its bits.

    load(x, i)             one element as float32
    load4(data, i)         bytes 4i..4i+3 as one uint32                  needs 4-byte alignment
    load8(x, i, values)    elements 8i..8i+7 as float32, 16 bytes a load  needs 16-byte alignment
    store(out, i, value)   one float32, rounded to nearest even into out's dtype
    store4(data, i, word)  one uint32 into bytes 4i..4i+3
    store8(out, i, values) eight float32, rounded, 16 bytes a store
    float_bits(x)          the 32 bits of a float32; bits_float(u) goes back
    multiply(a, b)         a * b rounded by itself: never fused with a following addition
    fused(a, b, c)         a * b + c, rounded once
    quotient(a, b)         a / b, correctly rounded; reciprocal(x) is 1 / x
    max_across(v, lanes)   greatest uint32 among `lanes` neighbouring lanes (a power of two, at most 32)
    sum_across(v, lanes)   float32 sum over them
"""

from numba import config

if config.ENABLE_CUDASIM:
    from .simulated import (  # noqa: F401
        bits_float,
        float_bits,
        fused,
        load,
        load4,
        load8,
        max_across,
        multiply,
        quotient,
        reciprocal,
        store,
        store4,
        store8,
        sum_across,
    )
else:
    from .ptx import (  # noqa: F401
        bits_float,
        float_bits,
        fused,
        load,
        load4,
        load8,
        max_across,
        multiply,
        quotient,
        reciprocal,
        store,
        store4,
        store8,
        sum_across,
    )

"""What 32 threads of a kernel ask memory for: plain Python bodies under `nf4lab.kernels.tracing`.

v1 to v3 are the package's kernels without their guards, the other two bodies are here to compare with. The output of
all is the package's, bit for bit.
"""

from collections import defaultdict

import numpy as np
import torch

from nf4lab.blockwise import QuantizedTensor, quantize
from nf4lab.kernels.tracing import SECTOR_BYTES, WARP, trace_body

BANKS = 32  # of shared memory, each 4 bytes wide
SHARED = ("table", "high", "low")  # the arrays that lie in shared memory
DOING = {"reads": "load", "writes": "store"}

__all__ = ["BANKS", "KERNELS", "SECTOR_BYTES", "trace"]


def v1(i, packed, absmax, levels, out):
    byte = packed[i]
    scale = absmax[2 * i // 64]
    out[2 * i] = levels[byte >> 4] * scale
    out[2 * i + 1] = levels[byte & 15] * scale


def v2(i, packed, absmax, table, out):
    byte = packed[i]
    scale = absmax[2 * i // 64]
    out[2 * i] = table[byte >> 4] * scale
    out[2 * i + 1] = table[byte & 15] * scale


def v3(i, packed, absmax, table, out):
    word = int(packed[i])  # four bytes in one load, the first lowest
    scale = absmax[8 * i // 64]
    values = []
    for k in range(4):
        byte = (word >> (8 * k)) & 255
        values.append(table[byte >> 4] * scale)
        values.append(table[byte & 15] * scale)
    out[i] = np.array(values, np.float16).tobytes()  # eight float16 in one store


def block_a_thread(i, packed, absmax, levels, out):
    scale = absmax[i]
    for k in range(32):
        byte = packed[32 * i + k]
        out[64 * i + 2 * k] = levels[byte >> 4] * scale
        out[64 * i + 2 * k + 1] = levels[byte & 15] * scale


def byte_table(i, packed, absmax, high, low, out):
    byte = packed[i]
    scale = absmax[2 * i // 64]
    out[2 * i] = high[byte] * scale
    out[2 * i + 1] = low[byte] * scale


# name -> body, weights a thread decodes in all, accesses shown, arrays that it takes in wider pieces
KERNELS = {
    "v1": (v1, 2, 6, {}),
    "v2": (v2, 2, 6, {}),
    "v3": (v3, 8, 11, {"packed": "<u4", "out": "V16"}),
    "block a thread": (block_a_thread, 64, 6, {}),  # the first of 32 rounds
    "byte table": (byte_table, 2, 6, {}),
}


def trace(name: str) -> tuple[list[dict], int, np.ndarray, QuantizedTensor]:
    """One warp of a kernel: its instructions, how many weights they decode, all that it wrote, and the tensor it read.

    Each instruction is {"doing", "space", "array", "width", "bytes": 32 byte addresses}, in the order of the threads.
    What it wrote is float16 (n,).
    """
    body, share, shown, wider = KERNELS[name]
    n = WARP * share
    q = quantize(torch.randn(n, generator=torch.Generator().manual_seed(7)).half(), "nf4", block_size=64)
    arrays = _arrays(q, np.zeros(n, np.float16))
    names = body.__code__.co_varnames[1 : body.__code__.co_argcount]
    record = trace_body(body, WARP, *(arrays[key].view(wider.get(key, arrays[key].dtype)) for key in names))
    threads = defaultdict(list)
    for access in record.accesses:
        threads[access.thread].append(access)
    steps = []
    for together in zip(*(threads[i][:shown] for i in range(WARP)), strict=True):
        ((verb, array),) = {(access.verb, access.array) for access in together}
        width = record.arrays[array].itemsize
        steps.append({
            "doing": DOING[verb], "space": "shared" if array in SHARED else "global", "array": array, "width": width,
            "bytes": [access.index * width for access in together],
        })  # fmt: skip
    decoded = sum(step["width"] // 2 for step in steps if step["doing"] == "store")
    return steps, WARP * decoded, arrays["out"], q


def _arrays(q: QuantizedTensor, out: np.ndarray) -> dict[str, np.ndarray]:
    """What kernels see, by name: packed, absmax, levels and out in global memory, three tables in shared memory."""
    levels, byte = q.format.levels.numpy(), np.arange(256)
    return {
        "packed": q.packed.numpy(), "absmax": q.absmax.numpy(), "levels": levels, "out": out,
        "table": levels, "high": levels[byte >> 4], "low": levels[byte & 15],
    }  # fmt: skip

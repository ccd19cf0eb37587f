"""What 32 threads of a kernel ask memory for: plain Python bodies of chapter 7, run on arrays that take notes.

The bodies are those of the package's kernels without their guards; their output is the package's, bit for bit.
"""

from dataclasses import dataclass

import numpy as np
import torch

from nf4lab.blockwise import QuantizedTensor, quantize

WARP = 32
SECTOR_BYTES = 32  # the least that memory moves
BANKS = 32  # of shared memory, each 4 bytes wide


class Noted:
    """An array that notes every access: (what is done, space, array, byte address, width in bytes)."""

    def __init__(self, name: str, values: np.ndarray, space: str, notes: list):
        self.name, self.values, self.space, self.notes = name, values, space, notes

    def note(self, doing: str, byte: int, width: int) -> None:
        self.notes.append((doing, self.space, self.name, byte, width))

    def __getitem__(self, i):
        self.note("load", int(i) * self.values.itemsize, self.values.itemsize)
        return self.values[i]

    def __setitem__(self, i, value):
        self.note("store", int(i) * self.values.itemsize, self.values.itemsize)
        self.values[i] = value

    def word(self, i) -> int:
        """Bytes 4i to 4i + 3 in one load, the first lowest."""
        self.note("load", 4 * i, 4)
        return int(self.values.view("<u4")[i])

    def store16(self, i, values) -> None:
        """Sixteen bytes in one store."""
        self.note("store", 16 * i, 16)
        count = 16 // self.values.itemsize
        self.values[count * i : count * (i + 1)] = values


@dataclass(frozen=True)
class Memory:
    """What a kernel sees: packed, absmax, levels and out in global memory, three tables in shared memory."""

    packed: Noted
    absmax: Noted
    levels: Noted
    out: Noted
    table: Noted
    high: Noted
    low: Noted


def v1(i: int, m: Memory) -> None:
    byte = m.packed[i]
    scale = m.absmax[2 * i // 64]
    m.out[2 * i] = m.levels[byte >> 4] * scale
    m.out[2 * i + 1] = m.levels[byte & 15] * scale


def v2(i: int, m: Memory) -> None:
    byte = m.packed[i]
    scale = m.absmax[2 * i // 64]
    m.out[2 * i] = m.table[byte >> 4] * scale
    m.out[2 * i + 1] = m.table[byte & 15] * scale


def v3(i: int, m: Memory) -> None:
    word = m.packed.word(i)
    scale = m.absmax[8 * i // 64]
    values = []
    for k in range(4):
        byte = (word >> (8 * k)) & 255
        values.append(m.table[byte >> 4] * scale)
        values.append(m.table[byte & 15] * scale)
    m.out.store16(i, values)


def block_a_thread(i: int, m: Memory) -> None:
    scale = m.absmax[i]
    for k in range(32):
        byte = m.packed[32 * i + k]
        m.out[64 * i + 2 * k] = m.levels[byte >> 4] * scale
        m.out[64 * i + 2 * k + 1] = m.levels[byte & 15] * scale


def byte_table(i: int, m: Memory) -> None:
    byte = m.packed[i]
    scale = m.absmax[2 * i // 64]
    m.out[2 * i] = m.high[byte] * scale
    m.out[2 * i + 1] = m.low[byte] * scale


# name -> body, weights a thread decodes in what is shown, accesses shown
KERNELS = {
    "v1": (v1, 2, 6),
    "v2": (v2, 2, 6),
    "v3": (v3, 8, 11),
    "block a thread": (block_a_thread, 2, 6),  # the first of 32 rounds
    "byte table": (byte_table, 2, 6),
}


def trace(name: str) -> tuple[list[dict], int, np.ndarray, QuantizedTensor]:
    """One warp of a kernel: its instructions, how many weights they decode, all that it wrote, and the tensor it read.

    Each instruction is {"doing", "space", "array", "width", "bytes": 32 byte addresses}, in the order of the threads.
    What it wrote is float16 (n,).
    """
    body, share, shown = KERNELS[name]
    n = WARP * (64 if body is block_a_thread else share)
    q = quantize(torch.randn(n, generator=torch.Generator().manual_seed(7)).half(), "nf4", block_size=64)
    notes, out = [], np.zeros(n, np.float16)
    memory = _memory(q, out, notes)
    threads = []
    for i in range(WARP):
        notes.clear()
        body(i, memory)
        threads.append(notes[:shown])
    steps = []
    for accesses in zip(*threads, strict=True):
        ((doing, space, array, width),) = {(d, s, a, w) for d, s, a, _, w in accesses}
        bytes = [access[3] for access in accesses]
        steps.append({"doing": doing, "space": space, "array": array, "width": width, "bytes": bytes})
    return steps, WARP * share, out, q


def _memory(q: QuantizedTensor, out: np.ndarray, notes: list) -> Memory:
    levels, byte = q.format.levels.numpy(), np.arange(256)
    in_memory = {"packed": q.packed.numpy(), "absmax": q.absmax.numpy(), "levels": levels, "out": out}
    shared = {"table": levels, "high": levels[byte >> 4], "low": levels[byte & 15]}
    return Memory(
        **{name: Noted(name, values, "global", notes) for name, values in in_memory.items()},
        **{name: Noted(name, values, "shared", notes) for name, values in shared.items()},
    )

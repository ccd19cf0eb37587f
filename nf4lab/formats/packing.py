"""Codes of 2, 3, 4 or 8 bits in bytes: one stream of bits, the first code in the highest bits of the first byte.

4 bits  aaaabbbb                    the even element in the high nibble, as bitsandbytes has it
3 bits  aaabbbcc cdddeeef ffggghhh  eight codes in three bytes, and no bit unused
2 bits  aabbccdd
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTHS = (2, 3, 4, 8)  # bits
WORD = (torch.int32, torch.int64)  # what holds a group of codes that fills up to 3 bytes, or more


def packed_bytes(n: int, bits: int = 4) -> int:
    """How many bytes n codes of that width take: the last may be used in part."""
    return -(-n * bits // 8)


def pack(codes: Tensor, pad: int = 0, bits: int = 4) -> Tensor:
    """Codes in bytes: uint8 (n,) of 0..2**bits - 1 to uint8 (ceil(n * bits / 8),). The last is completed with `pad`.

    >>> pack(torch.tensor([1, 2, 15], dtype=torch.uint8), pad=7)
    tensor([ 18, 247], dtype=torch.uint8)

    Raises TypeError unless the codes are uint8, ValueError where one is too large, or no code is so wide.
    """
    _check_width(bits)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8; got {codes.dtype}")
    if bits < 8 and codes.numel() and codes.max() >= 2**bits:
        raise ValueError(f"{bits}-bit codes lie in 0..{2**bits - 1}; got {codes.max().item()}")
    return pack_checked(codes.reshape(-1), pad, bits)


def pack_checked(codes: Tensor, pad: int, bits: int) -> Tensor:
    """`pack` for codes (n,) that are known to be right: it does not look at them, which on a GPU would wait."""
    if bits == 8:
        return codes
    count, nbytes = _group(bits)
    groups = F.pad(codes, (0, -len(codes) % count), value=pad).reshape(-1, count)
    if nbytes > 1:
        groups = groups.to(WORD[nbytes > 3])
    word = groups[:, 0] << bits * (count - 1)
    for i in range(1, count):
        word = word | groups[:, i] << bits * (count - 1 - i)
    if nbytes > 1:
        word = torch.stack([word >> 8 * i & 255 for i in reversed(range(nbytes))], dim=1).reshape(-1).to(torch.uint8)
    return word[: packed_bytes(len(codes), bits)]


def unpack(packed: Tensor, n: int, bits: int = 4) -> Tensor:
    """The first n codes of packed bytes: uint8 (ceil(n * bits / 8),) to uint8 (n,); the inverse of `pack`.

    Raises TypeError unless the bytes are uint8, ValueError where their number does not fit n, or no code is so wide.
    """
    _check_width(bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed bytes must be uint8; got {packed.dtype}")
    if packed.numel() != packed_bytes(n, bits):
        raise ValueError(f"{n} codes take {packed_bytes(n, bits)} bytes; got {packed.numel()}")
    count, nbytes = _group(bits)
    word = packed.reshape(-1)
    if nbytes > 1:
        groups = F.pad(word, (0, -len(word) % nbytes)).reshape(-1, nbytes).to(WORD[nbytes > 3])
        word = groups[:, 0] << 8 * (nbytes - 1)
        for i in range(1, nbytes):
            word = word | groups[:, i] << 8 * (nbytes - 1 - i)
    codes = torch.stack([word >> bits * i & 2**bits - 1 for i in reversed(range(count))], dim=1)
    return codes.reshape(-1)[:n].to(torch.uint8)


def _group(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and how many bytes."""
    shared = math.gcd(8, bits)
    return 8 // shared, bits // shared


def or_(numbers: Iterable[int]) -> str:
    """Numbers as a sentence has them: 2, 3, 4 or 8."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}"


def _check_width(bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"codes have {or_(WIDTHS)} bits; got {bits!r}")

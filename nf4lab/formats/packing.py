"""Two 4-bit codes in a byte: the even element in the high nibble, the odd one in the low nibble."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(codes: Tensor, pad: int = 0) -> Tensor:
    """Codes two to a byte: uint8 (n,) of 0..15 to uint8 ((n + 1) // 2,). An odd n is completed with `pad`.

    >>> pack(torch.tensor([1, 2, 15], dtype=torch.uint8), pad=7)
    tensor([ 18, 247], dtype=torch.uint8)

    Raises TypeError unless the codes are uint8, ValueError where one is above 15.
    """
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8; got {codes.dtype}")
    if codes.numel() and codes.max() > 15:
        raise ValueError(f"4-bit codes lie in 0..15; got {codes.max().item()}")
    pairs = F.pad(codes.reshape(-1), (0, codes.numel() % 2), value=pad).reshape(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


def unpack(packed: Tensor, n: int) -> Tensor:
    """The first n codes of packed bytes: uint8 ((n + 1) // 2,) to uint8 (n,); the inverse of `pack`.

    Raises TypeError unless the bytes are uint8, ValueError where their number does not fit n.
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed bytes must be uint8; got {packed.dtype}")
    if packed.numel() != (n + 1) // 2:
        raise ValueError(f"{n} codes take {(n + 1) // 2} bytes; got {packed.numel()}")
    packed = packed.reshape(-1)
    return torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:n]

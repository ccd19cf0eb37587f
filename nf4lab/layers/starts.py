"""Start where the error is: adapters that begin with what the 4-bit base lacks, or with the weight's own largest part.

LoftQ alternates: quantize what the adapter leaves, then let the adapter take the best rank-r part of what is missing.
PiSSA gives the adapter the r largest singular values of W and quantizes the rest.

Sources: LoftQ (arXiv:2310.08659), algorithm 1; PiSSA (arXiv:2404.02948).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nf4lab.blockwise import QuantizedTensor

LOFTQ_STEPS = 5
Start = tuple[QuantizedTensor, Tensor, Tensor]  # base, A (rank, in), B (out, rank)


def loftq(w: Tensor, rank: int, quantize: Callable[[Tensor], QuantizedTensor], steps: int = LOFTQ_STEPS) -> Start:
    """(base, A, B) with base + B A near w (out, in): the best of `steps` alternations, the plain base among them.

    A, B are float32. quantize: from weights to the base, such as nf4lab.quantize. The alternation need not get better
    with every step; the step of least error is returned. Raises ValueError for a rank that w does not have, weights
    that are not finite, and fewer steps than one.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    w, best, least = check_start(w, rank), None, torch.inf
    a, b = w.new_zeros(rank, w.shape[1]), w.new_zeros(w.shape[0], rank)
    for _ in range(steps):
        base = quantize(w - b @ a)
        a, b = low_rank(w - base.dequantize(torch.float32), rank)
        error = (w - base.dequantize(torch.float32) - b @ a).square().sum().item()
        if error < least:
            best, least = (base, a, b), error
    return best


def pissa(w: Tensor, rank: int, quantize: Callable[[Tensor], QuantizedTensor]) -> Start:
    """(base, A, B): the principal part of w (out, in) in A and B, the rest quantized.

    A, B are float32 and have the square roots of the r largest singular values each. Raises as `loftq` does.
    """
    w = check_start(w, rank)
    a, b = low_rank(w, rank)
    return quantize(w - b @ a), a, b


def low_rank(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with B A the best approximation of that rank to w (Eckart and Young, 1936)."""
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


STARTS = {"loftq": loftq, "pissa": pissa}


def check_start(w: Tensor, rank: int) -> Tensor:
    """w in float32, if adapters of that rank can start from it. Raises ValueError otherwise."""
    if w.dim() != 2 or not 1 <= rank <= min(w.shape):
        raise ValueError(f"rank must lie between 1 and the smaller side of a matrix; got {rank} for {tuple(w.shape)}")
    if not w.isfinite().all():
        raise ValueError("w must be finite to start an adapter from")
    return w.detach().float()

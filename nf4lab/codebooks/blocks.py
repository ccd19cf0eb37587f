"""Codebooks that know the block: AF4, BOF4, BOF4-S, and the best levels for any block size, density or weights.

Every function returns float32 levels, ascending, and derives them; `nf4lab.codebooks` passes them on.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nf4lab.codebooks import lloyd
from nf4lab.codebooks.closed import NORMAL


def optimal(
    block_size: int,
    metric: str = "mse",
    pinned: Sequence[float] | None = None,
    signed: bool = False,
    density=NORMAL,
    n_levels: int = 16,
) -> Tensor:
    """The levels of least expected error for blocks of independent draws of `density`, ascending: float32 (n_levels,).

    metric: "mse" or "mae", of the weights, not of the normalised ones. pinned: values that must be levels; by default
    (-1, 0, 1), or (0, 1) where signed, and () for none. signed: blocks are scaled by their element of largest
    magnitude with its sign, so that it becomes +1, and -1 is no longer special. The defaults are BOF4 and BOF4-S.

    >>> optimal(64)[:3]
    tensor([-1.0000, -0.7536, -0.5793])

    Raises ValueError for an unknown metric, a block of fewer than 2 weights, pinned values that repeat, lie outside
    -1..1 or are more than n_levels, and densities whose variance ("mse") or mean ("mae") is not finite, or that the
    quadrature can't follow. Source: BOF4 (arXiv:2505.06653), section 3.
    """
    pinned = _checked(block_size, metric, pinned, signed, n_levels)
    moment = density.var() if metric == "mse" else density.mean()
    if not np.isfinite(moment):
        raise ValueError(f"metric {metric!r} needs a density of finite {'variance' if metric == 'mse' else 'mean'}")
    spread = lloyd.of_density(block_size, lloyd.POWER[metric], signed, density)
    return torch.from_numpy(lloyd.least(spread, metric, pinned, n_levels)).float()


def fit(
    weights: Tensor,
    block_size: int = 64,
    metric: str = "mse",
    pinned: Sequence[float] | None = None,
    signed: bool = False,
    n_levels: int = 16,
) -> Tensor:
    """The levels of least error for these weights in blocks of block_size, ascending: float32 (n_levels,).

    The same as `optimal`, with the weights' own distribution in place of a density: Lloyd's algorithm from one start,
    so no other levels near these are better. weights: of any shape, read in row-major order as `nf4lab.quantize` reads
    them. Some millions are enough, and all of them are sorted.

    Raises ValueError as `optimal` does, and for fewer weights than levels, all zeros, or values that are not finite.
    """
    pinned = _checked(block_size, metric, pinned, signed, n_levels)
    x = weights.detach().reshape(-1).double().cpu().numpy()
    if not np.isfinite(x).all() or len(x) < n_levels or not x.any():
        raise ValueError(f"fit needs at least {n_levels} finite weights, not all of them zero; got {len(x)} values")
    spread = lloyd.of_weights(x, block_size, lloyd.POWER[metric], signed)
    return torch.from_numpy(lloyd.least(spread, metric, pinned, n_levels)).float()


def bof4(block_size: int = 64, metric: str = "mse") -> Tensor:
    """BOF4: the levels of least error for normal weights scaled by absmax, with -1, 0 and 1 kept: float32 (16,).

    The paper's levels from samples lie within 1.3e-4 (MSE) and 3.3e-4 (MAE) of these at block size 64, those from its
    integral (MSE) within 2e-6. Source: BOF4 (arXiv:2505.06653), tables 6 to 8.
    """
    return optimal(block_size, metric)


def bof4_s(block_size: int = 64, metric: str = "mse") -> Tensor:
    """BOF4-S: the same for signed absmax, with 0 and 1 kept, so that one more level is free: float32 (16,)."""
    return optimal(block_size, metric, signed=True)


def af4(block_size: int = 64) -> Tensor:
    """AF4, "abnormal float": float32 (16,), with -1, 0 and 1.

    Seven negative and eight positive levels, each but the two ends the median of its cell, for normal weights over
    their block's absmax, every block counting the same. Zero takes no part in that: either side is optimised as if its
    innermost cell reached to 0, and 0 is added as a level afterwards. Source: Yoshida 2023 (arXiv:2306.06965),
    section 4.
    """
    spread = lloyd.of_density(block_size, 0, signed=False)
    half = spread._replace(low=0.0, at_low=0.0)
    positive = lloyd.least(half, "mae", (1,), 8)
    negative = -lloyd.least(half, "mae", (1,), 7)[::-1]  # the density is symmetric
    return torch.from_numpy(np.concatenate([negative, [0.0], positive])).float()


def _checked(
    block_size: int, metric: str, pinned: Sequence[float] | None, signed: bool, n_levels: int
) -> tuple[float, ...]:
    if not block_size >= 2:
        raise ValueError(f"a block has 2 weights or more; got block_size {block_size}")
    if metric not in lloyd.POWER:
        raise ValueError(f"metric must be 'mse' or 'mae'; got {metric!r}")
    pinned = ((0.0, 1.0) if signed else (-1.0, 0.0, 1.0)) if pinned is None else tuple(map(float, pinned))
    if len(set(pinned)) < len(pinned) or not all(-1 <= level <= 1 for level in pinned) or len(pinned) > n_levels:
        raise ValueError(f"pinned must be at most {n_levels} different levels from -1 to 1; got {pinned}")
    return pinned

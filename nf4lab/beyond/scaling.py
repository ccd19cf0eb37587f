"""Scale by activations, a relative of error feedback without an inverse: columns that see large inputs get finer steps.

    W x = (W S)(S^-1 x)        S = diag(s), s_j = (mean x_j^2)^(alpha / 2)

With even levels a column times s_j > 1 is rounded with an error about s_j times smaller, seen from the input, while its
block's absmax stays in another column. NF4's levels lie further apart away from 0 and give less: 1.2 times at s_j = 2,
in chapter 14. The price is a larger absmax for blocks in which the column takes the lead. alpha is tried on a grid and
judged by the output error. S^-1 goes into whatever makes x, or into the layer.

Source: AWQ (arXiv:2306.00978), section 3.2, which takes the mean of |x| where this takes the root mean square.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nf4lab.backends.feedback import check_hessian

ALPHAS = tuple(k / 20 for k in range(21))
ROWS = 1536  # to judge an alpha by, at most: 21 products with the whole of a large hessian are the cost


def activation_scales(w: Tensor, hessian: Tensor, rounded: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
    """(s, alpha): the scales float32 (in,) of least output error on the grid, and the alpha that they come from.

    rounded: from weights to what they are decoded to, such as lambda w: nf4lab.quantize(w).dequantize().
    All rows of w judge, of more than 1,536 that many, evenly spaced. alpha = 0, no scaling, is tried too, so on the
    inputs that made the hessian the rows that judge lose nothing. s has a geometric mean of 1 over its range,
    sqrt(max s * min s). Raises as `check_hessian`, and ValueError where rounded changes the shape or no alpha gives an
    error that is a number.
    """
    hessian = check_hessian(hessian, w).float()
    mean_square = hessian.diagonal()
    mean_square = mean_square.clamp_min((1e-8 * mean_square.max()).clamp_min(torch.finfo(torch.float32).tiny))
    some = w[torch.linspace(0, len(w) - 1, min(len(w), ROWS), device=w.device).long()].float()
    best, least = None, torch.inf
    for alpha in ALPHAS:
        scales = mean_square ** (alpha / 2)
        scales = scales / (scales.max() * scales.min()).sqrt()
        decoded = rounded(some * scales)
        if decoded.shape != some.shape:
            raise ValueError(f"rounded must keep the shape {tuple(some.shape)}; it gave {tuple(decoded.shape)}")
        e = decoded / scales - some
        error = ((e @ hessian) * e).sum()
        if error < least:
            best, least = (scales, alpha), error
    if best is None:
        raise ValueError("rounded gives weights that are not finite, whatever the scales")
    return best

"""The extremes of a random block: how they are distributed, and what lies between them.

Normalisation divides by a block's extremes, so a normalised weight is not a draw from the density that its block was
drawn from. One fact makes everything computable: given its extremes, the other weights of a block are independent of
each other and follow the density cut off at the extremes. An expectation over a block is then an integral over the
extremes, done here as a sum over quadrature nodes, of integrals over a single weight.

`density` is a scipy.stats distribution, frozen or not, or any object with its pdf, cdf, sf, ppf, isf and support. The
pdf has to be smooth but for a kink at the median; one in steps, as a histogram's, is refused where the quadrature
misses it by a thousandth.
"""

from typing import NamedTuple

import numpy as np

from nf4lab.codebooks.closed import NORMAL

NODES, WEIGHTS = np.polynomial.legendre.leggauss(8)


class Extremes(NamedTuple):
    """Quadrature nodes: n cases of a block's extreme weights, each with its probability.

    probability: float64 (n,), summing to 1. elements: float64 (n, k), the k extreme weights of each case.
    low, high: float64 (n,), the interval that the other weights lie in. share: its probability under the density.
    """

    probability: np.ndarray
    elements: np.ndarray
    low: np.ndarray
    high: np.ndarray
    share: np.ndarray


def absmax_pdf(m, block_size: float = 64, density=NORMAL) -> np.ndarray:
    """The density of the largest magnitude of `block_size` draws, at m: B (f(m) + f(-m)) (F(m) - F(-m))^(B - 1)."""
    m = np.asarray(m, dtype=np.float64)
    one = density.pdf(m) + density.pdf(-m)
    return np.where(m < 0, 0.0, block_size * one * _all_within(np.abs(m), block_size - 1, density))


def absmax_cdf(m, block_size: float = 64, density=NORMAL) -> np.ndarray:
    """The probability that the largest magnitude of `block_size` draws is at most m: (F(m) - F(-m))^B."""
    m = np.asarray(m, dtype=np.float64)
    return np.where(m < 0, 0.0, _all_within(np.abs(m), block_size, density))


def absmax_mean(block_size: float = 64, density=NORMAL) -> float:
    """The expected largest magnitude of `block_size` draws."""
    nodes = of_magnitude(block_size, density)
    return float(nodes.probability @ nodes.high)


def of_magnitude(block_size: float, density=NORMAL, breaks=()) -> Extremes:
    """The one weight of largest magnitude, with its sign: Extremes with k = 1, over m > 0 and both signs.

    breaks: magnitudes where what will be integrated jumps; no panel of the quadrature crosses one.
    """
    m, width = _panels(magnitude_edges(block_size, density, breaks))
    rest = block_size * width * _all_within(m, block_size - 1, density)
    element = np.concatenate([m, -m])
    probability = np.concatenate([rest, rest]) * density.pdf(element)
    share = np.tile(1 - _beyond(m, density), 2)
    return _checked(Extremes(probability, element[:, None], -np.abs(element), np.abs(element), share))


def of_range(block_size: float, density=NORMAL) -> Extremes:
    """The least and the greatest weight of a block: Extremes with k = 2.

    Their joint density is B (B - 1) f(a) f(c) (F(c) - F(a))^(B - 2) for a < c.
    """
    tails = -np.expm1(-np.array([37, 8, 2, 0.3, 1e-2, 1e-5, 1e-9, 1e-14]) / block_size)
    a, a_width = _panels(np.unique(density.ppf(tails)))
    c, c_width = _panels(np.unique(density.isf(tails)))
    a, c = (side.reshape(-1) for side in np.meshgrid(a, c, indexing="ij"))
    width = np.multiply.outer(a_width, c_width).reshape(-1)
    keep = a < c
    a, c, width = a[keep], c[keep], width[keep]
    outside = np.minimum(density.cdf(a) + density.sf(c), 1)
    probability = block_size * (block_size - 1) * width * density.pdf(a) * density.pdf(c)
    probability = probability * np.exp((block_size - 2) * np.log1p(-outside))
    return _checked(Extremes(probability, np.stack([a, c], axis=1), a, c, 1 - outside))


def magnitude_edges(block_size: float, density=NORMAL, breaks=()) -> np.ndarray:
    """The ends of panels that cover the largest magnitude of a block: float64, ascending from 0.

    Beyond the last lie a probability and a share of the variance that no longer matter.
    """
    expected = [41, 10, 3, 1, 0.2, 1e-2, 1e-4, 1e-7, 1e-11, 1e-16]  # how many of the block lie beyond, on average
    edges = _largest(expected, block_size, density)
    typical = edges[3]
    while expected[-1] > 1e-250 and expected[-1] * edges[-1] ** 2 > 1e-9 * typical**2:
        expected.append(expected[-1] * 1e-8)
        edges = _largest(expected, block_size, density)
    inside = [b for b in breaks if edges[0] < b < edges[-1]]
    return np.unique(np.concatenate([[0.0], edges, inside]))


def _largest(expected, block_size: float, density) -> np.ndarray:
    tails = -np.expm1(-np.array(expected) / block_size) / 2
    return np.maximum(density.isf(tails), -density.ppf(tails))


def _panels(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on each interval between edges, spaced by ratio where an interval has one sign.

    A tail that falls like a power is smooth in the logarithm, and the tails of a bell lose nothing by it.
    """
    low, high = edges[:-1, None], edges[1:, None]
    by_ratio = low * high > 0
    a, b = (np.where(by_ratio, np.log(np.abs(np.where(by_ratio, end, 1.0))), end) for end in (low, high))
    t = (a + b) / 2 + (b - a) / 2 * NODES
    x = np.where(by_ratio, np.sign(low) * np.exp(np.where(by_ratio, t, 0.0)), t)
    width = np.abs(b - a) / 2 * WEIGHTS * np.where(by_ratio, np.abs(x), 1.0)
    return x.reshape(-1), width.reshape(-1)


def _beyond(m: np.ndarray, density) -> np.ndarray:
    """The probability of a magnitude above m, to full precision where it is small."""
    return np.minimum(density.sf(m) + density.cdf(-m), 1.0)


def _all_within(m: np.ndarray, count: float, density) -> np.ndarray:
    """(F(m) - F(-m))^count."""
    with np.errstate(divide="ignore"):
        return np.exp(count * np.log1p(-_beyond(m, density)))


def _checked(nodes: Extremes) -> Extremes:
    """The nodes that matter, with probabilities that sum to 1. Raises ValueError where they were far from it."""
    total = nodes.probability.sum()
    if not abs(total - 1) < 1e-3:
        raise ValueError(
            f"the quadrature over a block's extremes finds probability {total:.6g}, not 1: the density is not smooth, "
            "or the block too small"
        )
    part = nodes.probability * (nodes.high - nodes.low) ** 2
    likely = part > 1e-12 * part.max()
    return Extremes(*(column[likely] for column in nodes._replace(probability=nodes.probability / total)))

"""What a format costs on a density, by quadrature: expected errors and code usage, without a single sample.

The block's extremes are summed over (nf4lab.codebooks.extremes); between them every weight is an independent draw, and
its error is an integral over the cells of the levels. `density` is a scipy.stats distribution, frozen or not.
"""

from dataclasses import dataclass, replace

import numpy as np
import scipy
import torch
from torch import Tensor

from nf4lab.codebooks import extremes
from nf4lab.codebooks.closed import NORMAL
from nf4lab.codebooks.extremes import Extremes
from nf4lab.formats import Format, as_format

NODES, WEIGHTS = np.polynomial.legendre.leggauss(5)
# The density is integrated piece by piece between these quantiles, so that no piece is much wider than its bulk.
QUANTILES = np.array([1e-9, 1e-6, 1e-4, 3e-3, 0.03, 0.15, 0.5, 0.85, 0.97, 0.997, 1 - 1e-4, 1 - 1e-6, 1 - 1e-9])


@dataclass(frozen=True)
class Expected:
    """What quantizing draws of a density is expected to give.

    mse, mae: the mean squared and the mean absolute error of a weight. usage: float64 (n_levels,), the share of the
    weights that each code with a level takes, as `nf4lab.code_usage` counts it.
    """

    mse: float
    mae: float
    usage: Tensor


def expected(format: str | Format, block_size: float | None = None, density=NORMAL, numel: int = 2**20) -> Expected:
    """The errors and the code usage to expect of a format, on blocks of independent draws of `density`: Expected.

    block_size: by default the format's own; any number from 2 up, for the formulas hold between whole numbers too.
    numel: how many weights share the tensor's scale, in formats that have one; the largest is taken at its median.
    Every rule of `nf4lab.formats` takes any density of finite variance, but for `mean_std`: it takes normal ones
    only, whose normalised weights have a beta distribution (Thompson 1935). Constants of 8 bits are rounded as they
    are stored, wider ones count as exact: with up to 16 levels, on normal weights in blocks of 64, bfloat16 adds less
    than 5e-4 of a squared error and float16 less than 5e-5; in smaller blocks, and with 256 levels, they add more.
    Double quantization is left out.

    >>> round(expected("nf4").mse, 6)
    0.00846

    Raises ValueError for a density of infinite variance, and for what is left to sampling: a searched scale, which
    depends on all weights of a block at once, a normalisation of one's own, two constants of 8 bits each.
    """
    format = as_format(format)
    block_size = format.block_size if block_size is None else block_size
    _check(format, block_size, density)
    if format.constants_dtype.itemsize > 1:
        format = replace(format, constants_dtype=torch.float32)
    depends_on = format.normalization.depends_on
    if depends_on == "moments":
        return _studentized(format, block_size, density)
    largest = _median_largest(numel, density) if format.tensor_scale else np.inf
    if depends_on == "range":
        nodes = extremes.of_range(block_size, density)
    else:
        nodes = extremes.of_magnitude(block_size, density, _jumps(format, largest, block_size, density))
    return _expected(format, block_size, nodes, _constants(format, nodes.elements, largest), density)


def known_scale(levels: Tensor, density=NORMAL) -> Expected:
    """The errors and usage to expect of levels in the density's own units, its scale being known and not stored.

    >>> from nf4lab import codebooks
    >>> round(known_scale(codebooks.lloyd_max()).mse, 8)
    0.00950101
    """
    format = Format("known scale", levels)
    low, high = (np.array([float(end)]) for end in density.support())
    nodes = Extremes(np.ones(1), np.empty((1, 0)), low, high, np.ones(1))
    one, zero = np.ones(1), np.zeros(1)
    return _expected(format, 1, nodes, (one, zero, one, zero), density)


def crossing(
    first: str | Format, second: str | Format, low: float = 16, high: float = 4096, density=NORMAL,
    metric: str = "mse", ratio: float = 1,
) -> float:  # fmt: skip
    """The block size from `low` to `high` at which two formats have the same expected error, as a real number.

    metric: "mse" or "mae". ratio: of the second format's block size to the first's; 2 compares NF4 with min-max at
    equal bits. The block size returned is the first's.

    >>> round(crossing("nf4", "uniform"))
    82

    Raises ValueError where neither overtakes the other in that range, and for another metric.
    """
    if metric not in ("mse", "mae"):
        raise ValueError(f"metric must be 'mse' or 'mae'; got {metric!r}")

    def lead(log_size: float) -> float:
        size = np.exp(log_size)
        errors = (expected(f, b, density) for f, b in ((first, size), (second, ratio * size)))
        return np.subtract(*(np.log(getattr(e, metric)) for e in errors))

    ends = lead(np.log(low)), lead(np.log(high))
    if ends[0] * ends[1] > 0:
        names = [as_format(f).name for f in (first, second)]
        raise ValueError(f"{names[0]!r} and {names[1]!r} do not cross between block sizes {low} and {high}")
    return float(np.exp(scipy.optimize.brentq(lead, np.log(low), np.log(high), xtol=1e-6)))


def entropy_coded(bits: float, density=NORMAL) -> float:
    """The mean squared error of an endless even grid whose codes have an entropy of `bits`: one level is zero.

    It is what rounding one weight at a time can do with an ideal entropy coder behind it. At high rates it tends to
    step^2 / 12, which for a normal density is pi e / 6 = 1.423 times the Shannon limit. Source: Gish and Pierce 1968.

    >>> round(entropy_coded(4), 6)
    0.005591

    Raises ValueError unless bits is positive.
    """
    if not bits > 0:
        raise ValueError(f"bits must be positive: at 0 there is one level, whatever the step; got {bits}")
    high_rate = density.std() if bits < 1 else np.exp(density.entropy() - bits * np.log(2))
    low, high = np.log(high_rate / 8), np.log(high_rate * 8)
    log_step = scipy.optimize.brentq(lambda t: _even_grid(np.exp(t), density)[0] - bits, low, high, xtol=1e-12)
    return float(_even_grid(np.exp(log_step), density)[1])


def _even_grid(step: float, density) -> tuple[float, float]:
    """(entropy in bits, mean squared error) of rounding draws of `density` to the multiples of step."""
    first, last = np.floor(density.ppf(1e-16) / step), np.ceil(density.isf(1e-16) / step)
    halves = np.arange(2 * first - 1, 2 * last + 1)  # every cell in two halves, of which each may end at a kink
    x = (halves[:, None] + (NODES + 1) / 2) * step / 2
    p = WEIGHTS * step / 4 * density.pdf(x)
    k = np.floor(halves / 2 + 0.5)
    usage = np.bincount((k - k[0]).astype(int), p.sum(axis=1))
    return scipy.stats.entropy(usage, base=2), (p * (x - k[:, None] * step) ** 2).sum()


def _expected(format: Format, block_size: float, nodes: Extremes, constants: tuple, density) -> Expected:
    """The average over the nodes of k extreme weights and block_size - k weights between them."""
    k = nodes.elements.shape[1]
    at = nodes.elements[:, :, None], np.ones((*nodes.elements.shape, 1))  # each is a piece of one point
    weighted = ((1 / block_size, at), (1 - k / block_size, _between(format, nodes, constants, density)))
    sums = sum(share * _sums(format, *pieces, nodes.probability, constants) for share, pieces in weighted)
    return Expected(float(sums[0]), float(sums[1]), torch.from_numpy(sums[2:]))


def _between(format: Format, nodes: Extremes, constants: tuple, density) -> tuple[np.ndarray, np.ndarray]:
    """Values of a weight between the extremes, and their probabilities: float64 (n, n_pieces, n_points) each.

    Pieces end where the code changes, where the error is zero, and at quantiles of the density.
    """
    scale, location, decoded_scale, decoded_location = (part[:, None] for part in constants)
    ends = [
        location + scale * format.boundaries.double().numpy(),
        decoded_location + decoded_scale * np.unique(format.levels.double().numpy()),
        np.broadcast_to(density.ppf(QUANTILES), (len(scale), len(QUANTILES))),
        np.stack([nodes.low, nodes.high], axis=1),
    ]
    inside = np.maximum(nodes.low, density.ppf(1e-16))[:, None], np.minimum(nodes.high, density.isf(1e-16))[:, None]
    ends = np.sort(np.clip(np.concatenate(ends, axis=1), *inside), axis=1)  # (n, n_pieces + 1)
    half = np.diff(ends)[:, :, None] / 2
    x = ends[:, :-1, None] + half * (1 + NODES)
    return x, half / nodes.share[:, None, None] * WEIGHTS * density.pdf(x)


def _sums(format: Format, x: np.ndarray, weight: np.ndarray, probability: np.ndarray, constants: tuple) -> np.ndarray:
    """Squared error, absolute error and the usage of each code: float64 (2 + n_levels,). A piece has one code."""
    scale, location, decoded_scale, decoded_location = (part[:, None] for part in constants)
    rank = np.searchsorted(format.boundaries.double().numpy(), (x.mean(axis=2) - location) / scale)
    codes = format.ascending.numpy()[rank]  # (n, n_pieces)
    values = decoded_location + decoded_scale * format.levels.double().numpy()[codes]
    error = np.abs(x - values[:, :, None])
    mae = np.einsum("ijk,ijk,i", weight, error, probability)
    mse = np.einsum("ijk,ijk,ijk,i", weight, error, error, probability)
    usage = weight.sum(axis=2) * probability[:, None]
    return np.array([mse, mae, *np.bincount(codes.reshape(-1), usage.reshape(-1), format.levels.numel())])


def _constants(format: Format, elements: np.ndarray, largest: float) -> tuple:
    """Scale and location that codes are made with, then those that decode: four of float64 (n,)."""
    blocks = torch.from_numpy(np.clip(elements, -largest, largest)).float()
    tensor_scale = format.scale_of_tensor(torch.tensor([largest], dtype=torch.float32, device="cpu"))
    stored, decoded_location, scale, location = format.constants(blocks, tensor_scale)
    decoded_scale = stored if tensor_scale is None else stored * tensor_scale
    parts = scale, location, decoded_scale, decoded_location
    return tuple(np.zeros(len(blocks)) if part is None else part.double().numpy() for part in parts)


def _jumps(format: Format, largest: float, block_size: float, density) -> np.ndarray:
    """Where the error of an extreme weight has jumps and kinks in its magnitude: float64, ascending.

    That is where a scale of few values changes, and between those where the weight meets a boundary or a level.
    """
    if not format.normalization.in_steps and format.constants_dtype.itemsize > 1:
        return np.empty(0)
    edges = extremes.magnitude_edges(block_size, density)
    m = np.geomspace(edges[1], min(edges[-1], largest), 1024)

    def stored(m: np.ndarray) -> np.ndarray:
        return _constants(format, m[:, None], largest)[2]

    at = np.flatnonzero(np.diff(stored(m)))
    low, high, before = m[at], m[at + 1], stored(m[at])
    for _ in range(30):
        middle = (low + high) / 2
        same = stored(middle) == before
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    scales = stored(np.append(low, m[-1]))[:, None]
    kinks = np.abs(scales * torch.cat([format.levels, format.boundaries]).double().numpy())
    inside = (kinks > np.append(m[0], high)[:, None]) & (kinks < np.append(high, m[-1])[:, None])
    return np.concatenate([high, kinks[inside]])


def _median_largest(numel: int, density) -> float:
    """The median of the largest magnitude of numel draws."""
    tail = -np.expm1(np.log(0.5) / numel)
    bracket = extremes.magnitude_edges(numel, density)[[0, -1]]
    return scipy.optimize.brentq(lambda m: density.sf(m) + density.cdf(-m) - tail, *bracket)


def _studentized(format: Format, block_size: float, density) -> Expected:
    """Normal weights, less their block's mean and over its deviation: a beta distribution, whatever the deviation.

    For they are independent of it (Basu), so that expected errors are those in units of the deviation, times its mean.
    """
    if getattr(getattr(density, "dist", density), "name", "") != "norm":
        raise ValueError("expected errors by mean and deviation are known for a normal density only")
    half, widest = block_size / 2 - 1, np.sqrt(block_size - 1)
    normalized = scipy.stats.beta(half, half, loc=-widest, scale=2 * widest)
    error = known_scale(format.levels / format.extreme, normalized)
    mean = np.exp(scipy.special.gammaln(block_size / 2) - scipy.special.gammaln((block_size - 1) / 2))
    deviation = density.std() * np.sqrt(2 / block_size) * mean
    variance = density.var() * (block_size - 1) / block_size
    return Expected(float(error.mse * variance), float(error.mae * deviation), error.usage)


def _check(format: Format, block_size: float, density) -> None:
    rule = format.normalization
    if format.search or rule.depends_on == "all":
        how = "a searched scale" if format.search else f"normalisation {rule.name!r}"
        raise ValueError(f"no quadrature for {how} of format {format.name!r}: quantize a sample instead")
    if not np.isfinite(density.var()):
        raise ValueError(f"expected errors need a density of finite variance; got variance {density.var()}")
    if format.constants_dtype.itemsize == 1 and rule.has_location:
        raise ValueError(f"no quadrature for two constants in {format.constants_dtype}: quantize a sample instead")
    fewest = 4 if rule.depends_on == "moments" else 2
    if not block_size >= fewest:
        raise ValueError(f"a block of format {format.name!r} has {fewest} weights or more; got block_size {block_size}")

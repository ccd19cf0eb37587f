"""Where levels come from: quantiles, uniform grids, small floats, and the best levels for a density.

Every function returns float32 levels indexed by code. Nothing here is a pasted table but IQ4_NL's: the tests
hold each derivation against the published one. The density is NORMAL unless another is given.
"""

import numpy as np
import scipy
import torch
from torch import Tensor


class _Normal:
    """scipy.stats.norm, which takes longer to load than all the rest of nf4lab: SciPy does it at the first use.

    Its quantiles, all that quantizing needs, come from scipy.special, and are the same to the bit.
    """

    def ppf(self, p):
        """The quantile at p."""
        return scipy.special.ndtri(p)

    def __getattr__(self, name: str):
        return getattr(scipy.stats.norm, name)

    def __repr__(self) -> str:
        return "scipy.stats.norm"


NORMAL = _Normal()
# The outermost probability: half-way between the last midpoints of 15 and of 16 levels. It was published with seven
# digits, and that rounding is part of the format: without it 12 of the 16 float32 levels come out different.
TAIL = round((29 / 30 + 31 / 32) / 2, 7)
FLOAT32 = {"dtype": torch.float32, "device": torch.device("cpu")}  # said each time: torch's defaults can be changed


def nf4(tail: float = TAIL) -> Tensor:
    """The 16 levels of 4-bit NormalFloat, ascending: float32 (16,), from -1 to 1, with 0 at code 7.

    Quantiles of the standard normal at 8 evenly spaced probabilities above 0.5 and at 7 below, an exact zero
    between them, all divided by the largest. Equal to bitsandbytes' table bit for bit; that needs torch's float32
    `linspace`, since NumPy's moves one level by 4 units in the last place.

    >>> nf4()[:3]
    tensor([-1.0000, -0.6962, -0.5251])

    Raises ValueError unless 0.5 < tail < 1. Source: QLoRA (arXiv:2305.14314), section 3; bitsandbytes'
    `create_normal_map`.
    """
    return split_quantiles(tail)


def nf3(tail: float = TAIL) -> Tensor:
    """The 8 levels of 3-bit NormalFloat, ascending: float32 (8,), from -1 to 1, with 0 at code 3.

    NF4's rule with half of everything, and the same outermost probability: quantiles of the standard normal at 4
    evenly spaced probabilities above 0.5 and at 3 below, from `tail` inwards, an exact zero between them, all divided
    by the largest. The tail is that of 16 levels; those who published 3 and 2 bits kept it (LQ-LoRA, LoftQ).
    By the rule that gives NF4's digits, half-way between the last midpoints of 7 and 8 levels, it would be 0.9330357.

    >>> nf3()
    tensor([-1.0000, -0.4786, -0.2171,  0.0000,  0.1609,  0.3379,  0.5626,  1.0000])

    Raises ValueError unless 0.5 < tail < 1. Source: LQ-LoRA (arXiv:2311.12023), section 2.
    """
    return split_quantiles(tail, 8)


def nf2(tail: float = TAIL) -> Tensor:
    """The 4 levels of 2-bit NormalFloat, ascending: float32 (4,): -1, 0, a third and 1, nearly.

    NF4's rule for 2 levels above zero and 1 below, with NF4's tail, as `nf3`.

    >>> nf2()
    tensor([-1.0000,  0.0000,  0.3379,  1.0000])

    Raises ValueError unless 0.5 < tail < 1. Source: LoftQ (arXiv:2310.08659), `create_normal_map`.
    """
    return split_quantiles(tail, 4)


def split_quantiles(tail: float = TAIL, n_levels: int = 16, density=NORMAL) -> Tensor:
    """NF4's recipe for any symmetric density and number of levels, ascending: float32 (n_levels,), from -1 to 1.

    An exact zero, half of the levels above it and the rest below: quantiles at even steps of probability from 0.5 to
    `tail`, divided by the largest. With 16 levels and the normal this is NF4.

    >>> split_quantiles(n_levels=5)
    tensor([-1.0000, -0.3379,  0.0000,  0.3379,  1.0000])

    Raises ValueError unless 0.5 < tail < 1 and there are 3 levels or more.
    """
    if not 0.5 < tail < 1:
        raise ValueError(f"tail is a probability between 0.5 and 1; got {tail}")
    if n_levels < 3:
        raise ValueError(f"a zero and both ends take 3 levels; got {n_levels}")
    positive = side_quantiles(n_levels // 2, tail, density)
    negative = -side_quantiles((n_levels - 1) // 2, tail, density)
    levels = torch.cat([negative, torch.zeros(1, **FLOAT32), positive.flip(0)])
    return levels / levels.max()


def side_quantiles(n: int, tail: float = TAIL, density=NORMAL) -> Tensor:
    """Quantiles of `density` at n even steps of probability, from `tail` down to but for 0.5: float32 (n,)."""
    probabilities = torch.linspace(tail, 0.5, n + 1, **FLOAT32)[:-1]
    return torch.from_numpy(density.ppf(probabilities.numpy())).float()


def fp4() -> Tensor:
    """The 16 values of bitsandbytes' FP4 by code: float32 (16,), largest magnitude 1.

    A code is a sign bit, two exponent bits and one mantissa bit; the exponent counts down from 2**3, and exponent 0
    holds the subnormals 0 and 2**-4. So the codes are not in ascending order, and zero has two of them, 0 and 8.
    It is not the E2M1 of the OCP formats, whose exponent counts up. Source: bitsandbytes `get_4bit_type`.
    """
    exponent, mantissa = np.divmod(np.arange(8), 2)
    magnitude = np.where(exponent == 0, mantissa * 2.0**-4, (1 + mantissa / 2) * 2.0 ** (4 - exponent))
    by_code = np.concatenate([magnitude, 0 - magnitude])  # 0 - x keeps the second zero positive
    return torch.from_numpy(by_code / magnitude.max()).float()


def e2m1() -> Tensor:
    """The 16 values of OCP's E2M1 by code, in its own units: float32 (16,), 0 to 6, then -0.0 to -6.

    A sign bit, two exponent bits and one mantissa bit; exponent 0 holds the subnormals 0 and 0.5. Not bitsandbytes'
    FP4, whose least positive value is 1/192 of the greatest; here it is 1/12.

    >>> e2m1()[:8]
    tensor([0.0000, 0.5000, 1.0000, 1.5000, 2.0000, 3.0000, 4.0000, 6.0000])

    Source: OCP Microscaling Formats 1.0, section 5.3.3.
    """
    exponent, mantissa = np.divmod(np.arange(8), 2)
    magnitude = np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    return torch.from_numpy(np.concatenate([magnitude, -magnitude])).float()


def twos_complement(bits: int = 4) -> Tensor:
    """The integers -2**(bits - 1) to 2**(bits - 1) - 1, ascending: float32 (2**bits,). All codes are used.

    >>> twos_complement(3)
    tensor([-4., -3., -2., -1.,  0.,  1.,  2.,  3.])
    """
    return torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), **FLOAT32)


def iq4_nl() -> Tensor:
    """The 16 levels of llama.cpp's IQ4_NL, ascending integers from -127 to 113: float32 (16,), none of them zero.

    They are llama.cpp's table, and the only one in this file that is copied. A block's extreme goes to -127.
    Source: llama.cpp, `kvalues_iq4nl`, https://github.com/ggml-org/llama.cpp/pull/5590.
    """
    return torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], **FLOAT32)


def symmetric_int(bits: int = 4) -> Tensor:
    """The integers -m..m over m, with m = 2**(bits - 1) - 1, ascending: float32 (2m + 1,).

    One code of the 2**bits stays unused, the price of a zero in the middle.

    >>> symmetric_int(3)
    tensor([-1.0000, -0.6667, -0.3333,  0.0000,  0.3333,  0.6667,  1.0000])
    """
    largest = 2 ** (bits - 1) - 1
    return torch.arange(-largest, largest + 1, **FLOAT32) / largest


def uniform(n_levels: int = 16) -> Tensor:
    """Evenly spaced levels from 0 to 1, ascending: float32 (n_levels,); min-max scaling maps a block onto them."""
    return torch.arange(n_levels, **FLOAT32) / (n_levels - 1)


def quantile_midpoints(n_levels: int = 16, density=NORMAL) -> Tensor:
    """The quantiles of `density` at (i + 0.5)/n, ascending: float32 (n_levels,), in the density's own units.

    Each level stands for an equal share of the probability. Of an even number of levels none is the median.
    """
    return torch.from_numpy(density.ppf((np.arange(n_levels) + 0.5) / n_levels)).float()


def sf4(nu: float = 5) -> Tensor:
    """SF4, "student float": NF4's recipe with the quantiles of a Student t of nu degrees of freedom: float32 (16,).

    >>> sf4()[:3]
    tensor([-1.0000, -0.6278, -0.4547])

    Raises ValueError unless nu is positive. Source: Dotzel et al. 2024 (arXiv:2405.03103), section 4.
    """
    if not nu > 0:
        raise ValueError(f"nu is a positive number of degrees of freedom; got {nu}")
    tail = (29 / 30 + 31 / 32) / 2
    quantile = scipy.stats.t(nu).ppf
    positive, negative = (quantile(np.linspace(tail, 0.5, count)[:-1]) for count in (9, 8))
    return torch.from_numpy(np.concatenate([-negative, [0], positive[::-1]]) / positive[0]).float()


def cube_root(density=NORMAL, n_levels: int = 16) -> Tensor:
    """Levels spaced as the cube root of `density`, in its own units, ascending: float32 (n_levels,).

    They cut the integral of f^(1/3) into equal parts, and each lies in the middle of its part. With many levels no
    spacing has a lower squared error, in units in which the density's scale is known (Panter and Dite 1951). For a
    normal density they are the quantiles of one sqrt(3) times as wide. Of an even number of levels of a density that is
    symmetric about zero none is zero.

    Raises ValueError where f^(1/3) has no finite integral, as for a Student t of 2 degrees of freedom or fewer.
    """
    low, high = density.support()
    middle = density.median()

    def integral(to):
        found = scipy.integrate.tanhsinh(lambda x: np.cbrt(density.pdf(x)), middle, to)
        return found.integral, np.all(found.success)

    (below, above), finite = integral(np.array([low, high]))
    if not finite or not np.isfinite(above - below):
        raise ValueError("cube_root needs a density whose cube root has a finite integral")
    targets = below + (np.arange(n_levels) + 0.5) / n_levels * (above - below)
    levels = density.ppf((np.arange(n_levels) + 0.5) / n_levels)
    for _ in range(100):
        step = (targets - integral(levels)[0]) / np.cbrt(density.pdf(levels))
        levels = levels + step
        if np.abs(step).max() < 1e-10 * density.std():
            break
    return torch.from_numpy(levels).float()


def dynamic_map() -> Tensor:
    """The 256 levels of the signed dynamic map, ascending: float32 (256,), from -0.99296874 to 1, zero at code 127.

    For each i in 0..6 the midpoints of 2**i equal intervals of [0.1, 1], times 10**(i - 6), with both signs; then
    0 and 1. Half of the levels lie in the outermost decade, the rest reach down to 5.5e-7.

    Source: Dettmers 2015 (arXiv:1511.04561), section 2; bitsandbytes `create_dynamic_map`.
    """
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, **FLOAT32)
        midpoints = (edges[:-1] + edges[1:]) / 2
        decades.append(10.0 ** (i - 6) * midpoints)
    positive = torch.cat(decades)
    return torch.cat([-positive, positive, torch.tensor([0.0, 1.0], **FLOAT32)]).sort().values


def lloyd_max(density=NORMAL, n_levels: int = 16) -> Tensor:
    """The levels of least mean squared error for `density`, ascending: float32 (n_levels,), in its own units.

    `density` is a scipy.stats distribution, frozen or not. At the optimum each level is the mean of its cell and
    each boundary the midpoint of two levels (Lloyd 1982, Max 1960). Lloyd's iteration approaches that slowly, so a
    root finder finishes. Raises ValueError where no optimum is found, as for a density with infinite variance.

    >>> lloyd_max(scipy.stats.norm, 2)
    tensor([-0.7979,  0.7979])
    """
    if not np.isfinite(density.var()):
        raise ValueError(f"lloyd_max needs a density of finite variance; got variance {density.var()}")
    levels = density.ppf((np.arange(n_levels) + 0.5) / n_levels)
    for _ in range(50):
        levels = _cell_means(levels, density)
    solution = scipy.optimize.root(lambda trial: _cell_means(trial, density) - trial, levels, tol=1e-12)
    residual = np.abs(_cell_means(solution.x, density) - solution.x).max()
    if not residual < 1e-7 * density.std() or np.any(np.diff(solution.x) <= 0):
        raise ValueError(f"lloyd_max found no optimum with {n_levels} levels: {solution.message}")
    return torch.from_numpy(solution.x).float()


def _cell_means(levels: np.ndarray, density) -> np.ndarray:
    """The mean of `density` in each level's cell: float64 (n_levels,)."""
    low, high = density.support()
    edges = np.concatenate([[low], (levels[1:] + levels[:-1]) / 2, [high]])
    moments = scipy.integrate.tanhsinh(lambda x: x * density.pdf(x), edges[:-1], edges[1:]).integral
    return moments / np.diff(density.cdf(edges))

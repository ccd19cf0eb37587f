"""Figures to move: `explore.block()` and its siblings return what a notebook shows, with every number computed here.

levels    levels on a density: the tail, the family and the number of levels move; code usage and error follow
block     one block of 16 weights: drag them; absmax, codes, packed bytes and error follow
bits      block size and how constants are stored; bits a weight and the size of a model follow
who_wins  error against block size or bits for every format, on normal weights and on a trained model's
warp      32 threads of the dequantization kernel, one instruction at a time; sectors, banks and bytes follow
"""

from dataclasses import replace

import numpy as np
import scipy.stats
import torch

from nf4lab import codebooks, metrics
from nf4lab.blockwise import BLOCK_SIZES, quantize
from nf4lab.double_quant import MAPS, DoubleQuant
from nf4lab.explore.page import Explorable, float32_base64
from nf4lab.formats import FORMATS

__all__ = ["Explorable", "bits", "block", "levels"]


def seeded(seed: int) -> torch.Generator:
    """A generator of its own: the chapters' seeds go on as if no explorable had been called."""
    return torch.Generator().manual_seed(seed)


# Three shapes of weights, each of variance 1.
FAMILIES = {
    "normal": scipy.stats.norm(),
    "Student t": scipy.stats.t(5, scale=np.sqrt(3 / 5)),
    "uniform": scipy.stats.uniform(-np.sqrt(3), 2 * np.sqrt(3)),
}
TAILS = sorted({codebooks.TAIL, *scipy.stats.norm.cdf(np.delete(np.linspace(1.2, 3.4, 45), 13)).round(5).tolist()})
LARGEST = 8  # levels on one side: 16 make a 4-bit format


def levels() -> Explorable:
    """Levels by NF4's recipe on the weights that they meet: tail, families and number of levels to choose."""
    tables = {}
    for name, density in FAMILIES.items():
        sides = [codebooks.side_quantiles(n, tail, density) for tail in TAILS for n in range(1, LARGEST + 1)]
        share, power = normalized(density, block_size=64)
        tables[name] = {
            key: float32_base64(v) for key, v in (("sides", torch.cat(sides)), ("share", share), ("power", power))
        }
    data = {"tails": TAILS, "tail": codebooks.TAIL, "largest": LARGEST, "block_size": 64, "families": tables}
    return Explorable(
        "levels", data, "Levels from quantiles on normalised weights: codes used more equally do not mean less error."
    )


def normalized(density, block_size: int, n_points: int = 257) -> tuple[np.ndarray, np.ndarray]:
    """The density of weights divided by their block's absmax, at 0..1, and the same weighted by absmax squared.

    A block's largest weight becomes -1 or 1 and is left out, so that twice the integral of the first is
    1 - 1 / block_size. `density` is symmetric. Both are float64 (n_points,), summed over the absmax by quadrature.
    """
    x, dx = np.polynomial.legendre.leggauss(300)
    x, dx = (x + 1) / 2, dx / 2
    rest = (1 - x) ** 5  # P(absmax > a), with nodes dense towards 0
    beyond = -np.expm1(np.log1p(-rest) / block_size)  # P(|w| > a)
    a = density.isf(beyond / 2)
    weight = 5 * (1 - x) ** 4 * dx * (block_size - 1) / block_size * a / (1 - beyond)
    at = density.pdf(np.linspace(0, 1, n_points)[:, None] * a)  # (n_points, n_nodes)
    return at @ weight, at @ (weight * a**2)


def block() -> Explorable:
    """One NF4 block of 16 weights to drag: absmax, codes, packed bytes and error follow."""
    weights = (torch.randn(16, generator=seeded(11)) * 20).round() / 20  # steps of 0.05, as the handles move
    nf4 = FORMATS["nf4"]
    data = {
        "weights": [round(w, 2) for w in weights.tolist()],
        "levels": nf4.levels.tolist(),
        "boundaries": nf4.boundaries.tolist(),
        "absmax_bytes": nf4.constants_dtype.itemsize,
    }
    return Explorable(
        "block", data, "Sixteen weights share one absmax: move one far out, and the others fall onto fewer levels."
    )


# How a block's absmax is stored, from what one call of `quantize` takes to what the figure says: (name, label, long
# label, dtype of the constants, double quantization).
CONSTANTS = [
    ("float32", "32 (float32)", "float32 absmax", torch.float32, None),
    ("bfloat16", "16 (bfloat16)", "bfloat16 absmax", torch.bfloat16, None),
    ("e4m3", "8 (E4M3)", "8-bit float absmax", torch.float8_e4m3fn, None),
    ("dynamic8", "8 bits", "8-bit double quantization", torch.float32, DoubleQuant("dynamic8")),
    ("linear4", "4 bits", "4-bit double quantization", torch.float32, DoubleQuant("linear4")),
]


def bits() -> Explorable:
    """Block size and constants to choose: bits a weight, the size of a model, and the error they buy follow."""
    w = torch.randn(2**18, generator=seeded(5))
    schemes = []
    for name, label, long, dtype, twice in CONSTANTS:
        format = replace(FORMATS["nf4"], constants_dtype=dtype)
        tensors = [quantize(w, format, size, double_quant=twice or False) for size in BLOCK_SIZES]
        schemes.append(
            {
                "name": name, "label": label, "long": long,
                "bits": MAPS[twice.map].code_bits if twice else 8 * dtype.itemsize,
                "group": twice.group_size if twice else None,
                "mse": [metrics.mse(w, q.dequantize()) for q in tensors],
            }
        )  # fmt: skip
    data = {"sizes": BLOCK_SIZES, "schemes": schemes, "code_bits": FORMATS["nf4"].code_bits, "budget": 4.13}
    return Explorable(
        "bits", data, "What a block's constants cost in bits a weight and in gigabytes of a model, and what they buy."
    )

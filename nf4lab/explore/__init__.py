"""Figures to move: `explore.block()` and its siblings return what a notebook shows, with every number computed here.

levels    levels on a density: the tail, the family and the number of levels move; code usage and error follow
block     one block of 16 weights: drag them; absmax, codes, packed bytes and error follow
bits      block size and how constants are stored; bits per weight and the size of a model follow
who_wins  error against block size or bits for every format, on normal weights and on a trained model's
warp      32 threads of the dequantization kernel, one instruction at a time; sectors, banks and bytes follow
"""

from dataclasses import replace

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from nf4lab import codebooks, metrics, models, plots
from nf4lab.blockwise import BLOCK_SIZES, quantize
from nf4lab.codebooks import extremes
from nf4lab.explore import traces
from nf4lab.explore.page import Explorable, float32_base64
from nf4lab.formats import FORMATS
from nf4lab.formats.double_quant import MAPS, DoubleQuant

__all__ = ["Explorable", "bits", "block", "levels", "warp", "who_wins"]


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
    nodes = extremes.of_magnitude(block_size, density)
    a = nodes.high
    weight = (block_size - 1) / block_size * nodes.probability * a / nodes.share
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
    """Block size and constants to choose: bits per weight, the size of a model, and the error they buy follow."""
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
        "bits", data, "What a block's constants cost in bits per weight and in gigabytes of a model, and what they buy."
    )


PALETTE = {
    plots.BLUE: "blue", plots.VERMILION: "vermilion", plots.GREEN: "green", plots.ORANGE: "orange",
    plots.PURPLE: "purple", plots.SKY: "sky", plots.YELLOW: "yellow", plots.BLACK: "ink",
}  # fmt: skip
DASHES = {"-": "none", "--": "7 4", "-.": "8 3 2 3", ":": "2 3"}
LAYER = "encoder.layer.0."  # of all-MiniLM-L6-v2: its matrices, by what they do
MATRICES = {
    "attention.self.query": "query", "attention.self.key": "key", "attention.self.value": "value",
    "attention.output.dense": "attention output", "intermediate.dense": "intermediate", "output.dense": "output",
}  # fmt: skip

SHOWN = ("nf4", "uniform", "int4", "fp4", "naive-quantile")  # at first: the field of chapter 6


def who_wins(matrices: dict[str, Tensor] | None = None) -> Explorable:
    """Error against block size or bits for every 4-bit format, on normal weights and on a layer of a trained model.

    matrices: by name, the first 262,144 weights of each are used; by default the six of all-MiniLM-L6-v2's first
    layer. Errors are mean squared, over the variance of the weights.
    """
    if matrices is None:
        trained = models.minilm_matrices()
        matrices = {f"MiniLM, first layer: {text}": trained[LAYER + name] for name, text in MATRICES.items()}
    normal = torch.randn(2**18, generator=seeded(6))
    sources = [{"name": name, "formats": errors(w)} for name, w in {"normal weights": normal, **matrices}.items()]
    data = {
        "sizes": BLOCK_SIZES,
        "sources": sources,
        "looks": {name: look(i, name) for i, name in enumerate(sources[0]["formats"])},
        "shown": SHOWN,
    }
    return Explorable(
        "who_wins", data, "In blocks of 64 uniform beats NF4 on normal weights; at equal bits NF4 in 32 and up wins."
    )


def errors(w: Tensor) -> dict[str, dict[str, list[float]]]:
    """Bits per weight and relative mean squared error of each 4-bit format at each block size, by name."""
    x, found = w.reshape(-1)[: 2**18], {}
    for name in (name for name, format in FORMATS.items() if format.code_bits == 4):
        tensors = [quantize(x, name, size) for size in BLOCK_SIZES]
        mse = [metrics.mse(x, q.dequantize()) / x.var().item() for q in tensors]
        found[name] = {"bits": [q.bits_per_weight for q in tensors], "mse": [float(f"{e:.7g}") for e in mse]}
    return found


def look(i: int, name: str) -> dict[str, str]:
    """How a format is drawn: as on the book's other pages, or the i-th mix of colour, marker and dashes."""
    if name in plots.LOOK:
        color, marker, line = (plots.LOOK[name][key] for key in ("color", "marker", "linestyle"))
        dash = DASHES[line] if isinstance(line, str) else " ".join(map(str, line[1]))
        return {"color": PALETTE[color], "marker": marker, "dash": dash}
    colors, dashes = list(PALETTE.values()), list(DASHES.values())
    return {"color": colors[i % 8], "marker": "osD^v"[i % 5], "dash": dashes[i % 4]}


def warp() -> Explorable:
    """32 threads of five dequantization kernels, one instruction at a time: sectors, banks and bytes follow."""
    kernels = []
    for name in traces.KERNELS:
        steps, weights = traces.trace(name)[:2]
        kernels.append({"name": name, "weights": weights, "steps": steps})
    data = {"kernels": kernels, "sector_bytes": traces.SECTOR_BYTES, "banks": traces.BANKS}
    return Explorable(
        "warp", data, "Which bytes of memory 32 threads ask for at once, and which are moved though nobody wants them."
    )

"""The league: every 4-bit format at equal bits, on the same tensors; and every method, on two whole models.

What a format may spend is counted in bits per weight, constants included. A format enters a budget once for each way to
store its constants, which sets the block size: one float32 for 64 weights costs what one byte for 16 does. Formats
made for a block size (AF4, BOF4, BOF4-S) are derived for the one that they play at.

Methods of `nf4lab.beyond` need a model and texts, and minutes: `methods` reads what benchmarks/beyond.py has measured.
"""

import functools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nf4lab import models
from nf4lab.blockwise import QuantizedTensor, quantize
from nf4lab.formats import FORMATS, Format
from nf4lab.formats.table import FOR_BLOCK_SIZE
from nf4lab.metrics import mae, mse

BUDGETS = (4.0, 4.127, 4.25, 4.5, 5.0)  # bits per weight; 4.0 stands for the largest blocks, 4.002 to 4.016 bits
FLOAT32, FLOAT16, SHORT, SEARCHED, POWER = "float32", "float16", "short", "short, searched", "power of two"
# budget -> (dtype of a constant, weights that it serves, whether constants are quantized again)
STORAGE = {
    FLOAT32: {
        4.0: (torch.float32, 4096, False), 4.127: (torch.float32, 64, True), 4.25: (torch.float32, 128, False),
        4.5: (torch.float32, 64, False), 5.0: (torch.float32, 32, False),
    },
    FLOAT16: dict(zip(BUDGETS, ((torch.float16, size, False) for size in (4096, 128, 64, 32, 16)), strict=True)),
    # One byte and one float32 per tensor, as in NVFP4. At 5 bits there is no block small enough, and 16 bits take over.
    SHORT: dict(zip(BUDGETS, ((torch.float8_e4m3fn, size, False) for size in (4096, 64, 32, 16)), strict=False))
    | {5.0: (torch.bfloat16, 16, False)},
    POWER: dict(zip(BUDGETS, ((torch.float8_e8m0fnu, size, False) for size in (4096, 64, 32, 16)), strict=False)),
}  # fmt: skip
STORAGE[SEARCHED] = STORAGE[SHORT]
SHORTENED = ("nf4", "bof4-s", "iq4_nl")  # codebooks of wider constants that play with a byte as well
LEAST_WEIGHTS = 4096  # a tensor with fewer does not fill one of the largest blocks


@dataclass(frozen=True)
class Entry:
    """A format as it plays at one budget.

    name: its codebook's, from nf4lab.FORMATS. storage: one of STORAGE's. budget: bits per weight, from BUDGETS.
    format, block_size, double_quant: what `nf4lab.quantize` is given.
    """

    name: str
    storage: str
    budget: float
    format: Format
    block_size: int
    double_quant: bool

    def quantize(self, x: Tensor) -> QuantizedTensor:
        """The tensor in this format."""
        return quantize(x, self.format, self.block_size, self.double_quant)


@dataclass(frozen=True)
class Score:
    """How one entry did on one tensor. power: the mean square of the tensor, to which mse is relative."""

    tensor: str
    entry: Entry
    numel: int
    bits: float
    mse: float
    mae: float
    power: float

    @property
    def sqnr_db(self) -> float:
        """The signal-to-quantization-noise ratio: 10 log10(power / mse)."""
        return 10 * math.log10(self.power / self.mse) if self.mse else math.inf


@functools.cache
def players() -> dict[str, tuple[str, ...]]:
    """Who plays with constants of each storage: storage -> names. Every 4-bit format of nf4lab.FORMATS does somewhere.

    float32: all whose constants are no single bytes. The other storages: those whose own constants are of that type,
    and with short ones three of the rest.
    """
    dtypes = {name: format.constants_dtype for name, format in FORMATS.items() if format.code_bits == 4}

    def of(dtype: torch.dtype) -> tuple[str, ...]:
        return tuple(name for name, own in dtypes.items() if own == dtype)

    wide = tuple(name for name, own in dtypes.items() if own.itemsize > 1)
    short = (*of(torch.float8_e4m3fn), *SHORTENED)
    return {FLOAT32: wide, FLOAT16: of(torch.float16), POWER: of(torch.float8_e8m0fnu), SHORT: short, SEARCHED: short}


def __getattr__(name: str) -> tuple[str, ...]:
    if name == "ALL":  # who plays with float32: a constant to whoever reads it, made when it is first asked for
        return players()[FLOAT32]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def entry(name: str, storage: str, budget: float) -> Entry:
    """The entry of a format at a budget, its constants stored in one of STORAGE's ways.

    Two constants per block cost the same bits in blocks twice as long. Raises ValueError for a name, a storage or a
    budget that does not exist, and where they do not go together: MXFP4 and NVFP4 have constants of their own.

    >>> entry("nf4", "short", 4.5).block_size
    16
    """
    if not _can_play(name, storage, budget):
        raise ValueError(f"no entry of format {name!r} with constants {storage!r} at {budget} bits")
    dtype, block_size, double_quant = STORAGE[storage][budget]
    row = FORMATS[name]
    if row.normalization.has_location:
        block_size = min(2 * block_size, 4096)
    changes = {"constants_dtype": dtype, "tensor_scale": dtype == torch.float8_e4m3fn}
    if name in FOR_BLOCK_SIZE:
        changes["levels"] = FOR_BLOCK_SIZE[name](block_size)
    format = replace(row, exact_codes=row.exact_codes and storage == FLOAT16, **changes)
    return Entry(name, storage, budget, format.searched() if storage == SEARCHED else format, block_size, double_quant)


def _can_play(name: str, storage: str, budget: float) -> bool:
    """Whether all three exist, and the constants have the dtype that the format prescribes, if it is one byte."""
    if name not in FORMATS or budget not in STORAGE.get(storage, {}):
        return False
    dtype = FORMATS[name].constants_dtype
    return dtype.itemsize > 1 or dtype == STORAGE[storage][budget][0]


def entries(budgets: Iterable[float] = BUDGETS) -> list[Entry]:
    """Everybody who plays at these budgets, in the order of `players`."""
    return [
        entry(name, storage, budget)
        for storage, names in players().items()
        for name in names
        for budget in budgets
        if _can_play(name, storage, budget)
    ]


def play(
    tensors: Iterable[tuple[str, Tensor]], lineup: list[Entry], progress: Callable[[int], object] = lambda weights: None
) -> list[Score]:
    """The scores of every entry on every tensor.

    progress: called after each quantization with the number of weights. Raises ValueError, naming the tensor, for one
    that is all zeros or that `nf4lab.quantize` refuses.
    """
    scores = []
    for name, x in tensors:
        power = mse(x, torch.zeros_like(x))
        if not power:
            raise ValueError(f"tensor {name!r} is all zeros: there is no error relative to it")
        for one in lineup:
            try:
                q = one.quantize(x)
            except ValueError as error:
                raise ValueError(f"tensor {name!r}: {error}") from error
            x_hat = q.dequantize(torch.float32)
            scores.append(Score(name, one, x.numel(), q.bits_per_weight, mse(x, x_hat), mae(x, x_hat), power))
            progress(x.numel())
    return scores


def standings(scores: list[Score]) -> dict[tuple[str, str], dict[float, tuple[float, int]]]:
    """(format, storage) -> budget -> (mean SQNR in decibels, every tensor counting once; tensors won by MSE).

    The mean of decibels is that of the logarithms of relative errors. Of equal errors the first listed wins. Rows are
    in order of how far they are behind the best of each budget, on the average over theirs: the nearest first.
    """
    played, winner = {}, {}
    for score in scores:
        played.setdefault(score.entry, []).append(score)
        key = score.entry.budget, score.tensor
        if key not in winner or score.mse < winner[key].mse:
            winner[key] = score
    wins = Counter(score.entry for score in winner.values())
    table = {}
    for one, of_one in played.items():
        mean = sum(score.sqnr_db for score in of_one) / len(of_one)
        table.setdefault((one.name, one.storage), {})[one.budget] = mean, wins[one]
    best = best_at(table)
    behind = {key: sum(best[b] - mean for b, (mean, _) in row.items()) / len(row) for key, row in table.items()}
    return dict(sorted(table.items(), key=lambda pair: behind[pair[0]]))


def best_at(table: dict[tuple[str, str], dict[float, tuple[float, int]]]) -> dict[float, float]:
    """The highest mean SQNR of each budget in `standings`."""
    best = {}
    for row in table.values():
        for budget, (mean, _) in row.items():
            best[budget] = max(mean, best.get(budget, -math.inf))
    return dict(sorted(best.items()))


# --- methods

MANUALS = tuple(f"pages {i}" for i in range(4))
WORLDS = ("kitchen", "money", "space", "sport")
# model -> column -> what it has of a model made one way, from the damage that the record lists
JUDGED = {
    "encoder": {
        "manuals": lambda damage: 1000 * damage["manuals"],
        "everyday": lambda damage: 1000 * statistics.fmean(damage[world] for world in WORLDS),
    },
    "language model": {
        "manuals": lambda damage: 1000 * statistics.fmean(damage[group][0] for group in MANUALS),
        "Flask": lambda damage: 1000 * damage["flask"][0],
        "perplexity": lambda damage: 100 * math.expm1(statistics.fmean(damage[group][1] for group in MANUALS)),
    },
}
# first words of a method -> bits that it stores of a matrix (out, in) beside codes and constants
EXTRA_BITS = {
    "rotated": lambda rows, columns: columns,  # a sign a column
    "scaled": lambda rows, columns: 32 * columns,  # a float32 a column
    "learned, a table a layer": lambda rows, columns: 16 * 32,
    "learned, a table a row": lambda rows, columns: 16 * 16 * rows,
}


@dataclass(frozen=True)
class Method:
    """How one way to quantize a whole model did, made in two ways that are as good as one another.

    What the two ways differ by is noise. bits: per weight, with all that is stored for the layers. seconds: of one
    core's processor time, to make all layers, both ways. weights: squared errors over the weights' squares, both ways.
    outputs: for each layer the squared error of its outputs on text that the method has not seen, over that of
    "nearest", the mean of both ways. judged: column -> what the model says, both ways: for the encoder 1 - cosine of
    sentence vectors in thousandths, on sentences of manuals and everyday ones; for the language model the divergence in
    thousandths of a nat per token, on pages of manuals and of Flask's, and by how many per cent its perplexity on
    manuals rises.
    """

    name: str
    bits: float
    seconds: tuple[float, float]
    weights: tuple[float, float]
    outputs: tuple[float, ...]
    judged: dict[str, tuple[float, float]]

    @property
    def row(self) -> tuple[str, ...]:
        """As pages show it: name, bits, the lesser seconds, the weights' error in per cent, quartiles of outputs, what
        the model says.
        """
        quartiles = " ".join(f"{share:.2f}" for share in statistics.quantiles(self.outputs, n=4))
        weights = " / ".join(f"{100 * error:.2f}" for error in self.weights)
        judged = (" / ".join(f"{way:.1f}" for way in ways) for ways in self.judged.values())
        return (self.name, f"{self.bits:.3f}", f"{min(self.seconds):.2g}", weights, quartiles, *judged)


def methods(model: str, record: dict | None = None) -> dict[str, Method]:
    """name -> how it did: round to nearest, search, scale, learn, correct, rotate, in blocks of 64.

    model: "encoder" or "language model". record: as benchmarks/beyond.py writes it; by default what comes with the
    package. NF4's levels unless the name says otherwise. Raises ValueError for another model.

    >>> methods("encoder")["corrected"].bits
    4.5
    """
    if model not in JUDGED:
        raise ValueError(f"model must be one of {sorted(JUDGED)}; got {model!r}")
    found = (record or models.record("beyond"))[model]
    nearest, shapes = found["methods"]["nearest"]["layers"][0], list(found["shapes"].values())
    return {
        name: Method(
            name, bits_of_method(name, shapes), tuple(row["seconds"]), tuple(row["weights"]),
            tuple(sum(pair) / 2 / near for *pair, near in zip(*row["layers"], nearest, strict=True)),
            {column: tuple(map(of, row["damage"])) for column, of in JUDGED[model].items()},
        )
        for name, row in found["methods"].items()
    }  # fmt: skip


def bits_of_method(name: str, shapes: Iterable[tuple[int, int]]) -> float:
    """Bits per weight that a method stores of matrices (out, in): 4, a float32 for 64, and what EXTRA_BITS counts.

    Signs and scales of columns are counted in full. Where a seed gives the signs, or the layer before takes scales up,
    they take nothing.
    """
    extra = next((of for words, of in EXTRA_BITS.items() if name.startswith(words)), lambda rows, columns: 0)
    numel = sum(rows * columns for rows, columns in shapes)
    return 4 + 32 / 64 + sum(extra(*shape) for shape in shapes) / numel

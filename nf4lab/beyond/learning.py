"""Learn: levels made for one layer, or for each row of it, by k-means on its own weights.

Lloyd's algorithm on the weights as NF4 scales them, from NF4's levels (from even ones where there are not 16): each
level moves to the mean of what is rounded to it. Importance makes it a weighted mean: with the mean square of the
inputs, a weight counts for as much as its error does in the output.

Sources: Lloyd 1957/1982; any4 (arXiv:2507.04610), a table a row weighted by activations; SqueezeLLM (arXiv:2306.07629).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nf4lab import codebooks
from nf4lab.formats import Format

STEPS = 2000  # at most; on each matrix of the book's two models no level moves any more after 800


def learn_format(
    w: Tensor, block_size: int = 64, importance: Tensor | None = None, name: str = "learned", n_levels: int = 16
) -> Format:
    """An absmax format with the levels of least squared error that Lloyd's algorithm finds for w from where it starts.

    importance: float (in,) or of w's shape, what a squared error counts; None for 1. The levels are one table for the
    whole of w. Raises TypeError for what is no tensor, ValueError for weights or importance that are not finite or too
    large, importance that is negative or of another shape, a block_size that does not divide the weights, and n_levels
    not from 2 to 256.
    """
    normalized, weight, _ = _points(w, block_size, importance, n_levels)
    levels = k_means(normalized.reshape(1, -1), weight.reshape(1, -1), _start(n_levels, w.device))
    return Format(name, levels[0].cpu(), block_size=block_size)


@dataclass(frozen=True, eq=False)
class RowTables:
    """A matrix with a table of levels for each row.

    codes: uint8 (rows, columns). tables: float16 (rows, n_levels), ascending. absmax: float32 (rows, blocks a row).
    """

    codes: Tensor
    tables: Tensor
    absmax: Tensor

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each weight: codes, tables in 16 bits, absmax in 32."""
        n_levels = self.tables.shape[1]
        code_bits = (n_levels - 1).bit_length()
        return code_bits + (16 * self.tables.numel() + 32 * self.absmax.numel()) / self.codes.numel()

    def dequantize(self) -> Tensor:
        """The values: float32 (rows, columns)."""
        values = self.tables.float().gather(1, self.codes.long())
        return (values.unflatten(1, (self.absmax.shape[1], -1)) * self.absmax[:, :, None]).flatten(1)


def learn_rows(w: Tensor, block_size: int = 64, importance: Tensor | None = None, n_levels: int = 16) -> RowTables:
    """w (out, in) with a table per row: Lloyd's algorithm on each row's own weights.

    importance: as for `learn_format`. Raises as that, and ValueError where block_size does not divide the columns.
    """
    _check_learned(w, block_size, importance, n_levels)
    if w.dim() != 2 or block_size < 1 or w.shape[1] % block_size:
        raise ValueError(
            f"a table a row takes a matrix whose columns block_size divides; got {tuple(w.shape)}, {block_size}"
        )
    normalized, weight, absmax = _points(w, block_size, importance, n_levels)
    normalized, weight = normalized.reshape(w.shape), weight.reshape(w.shape)
    tables = k_means(normalized, weight, _start(n_levels, w.device).expand(len(w), -1)).half()
    boundaries = (tables.float()[:, 1:] + tables.float()[:, :-1]) / 2
    codes = torch.searchsorted(boundaries, normalized.contiguous()).byte()
    return RowTables(codes, tables, absmax.reshape(len(w), w.shape[1] // block_size))


def k_means(points: Tensor, weight: Tensor, levels: Tensor, steps: int = STEPS) -> Tensor:
    """Lloyd's algorithm for each row by itself: levels float32 (rows, n_levels), ascending, when none moves any
    more, or after so many steps.

    points, weight: (rows, n). levels: (rows, n_levels), ascending, the start. A level that nothing is rounded to stays.
    Sorting once makes a step cheap: the points of a level are a run, and its mean a difference of running sums.
    """
    order = points.argsort(dim=1)
    points, weight = points.gather(1, order).contiguous(), weight.gather(1, order).double()
    mass, moment = (torch.nn.functional.pad(total.cumsum(1), (1, 0)) for total in (weight, weight * points.double()))
    levels = levels.double().expand(len(points), -1).contiguous()
    for _ in range(steps):
        boundaries = ((levels[:, 1:] + levels[:, :-1]) / 2).to(points.dtype)
        inner = torch.searchsorted(points, boundaries.contiguous(), right=True)
        ends = torch.nn.functional.pad(inner, (1, 0)), torch.nn.functional.pad(inner, (0, 1), value=points.shape[1])
        counts = mass.gather(1, ends[1]) - mass.gather(1, ends[0])
        sums = moment.gather(1, ends[1]) - moment.gather(1, ends[0])
        moved = torch.where(counts > 0, sums / counts, levels)
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels.float()


def _start(n_levels: int, device: torch.device) -> Tensor:
    levels = codebooks.nf4() if n_levels == 16 else torch.linspace(-1, 1, n_levels)
    return levels.to(device)[None]


def _check_learned(w: Tensor, block_size: int, importance: Tensor | None, n_levels: int) -> None:
    for name, value in {"w": w, "importance": importance}.items():
        if not isinstance(value, Tensor) and (name == "w" or value is not None):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
    for name, value in {"block_size": block_size, "n_levels": n_levels}.items():
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an int; got {value!r}")
    if not 2 <= n_levels <= 256:
        raise ValueError(f"n_levels must be from 2 to 256, which a byte can number; got {n_levels}")


def _points(w: Tensor, block_size: int, importance: Tensor | None, n_levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised weights and what their squared errors count, (n_blocks, block_size) each, and absmax (n_blocks,)."""
    _check_learned(w, block_size, importance, n_levels)
    x = w.detach().float()
    if importance is not None and importance.shape not in (x.shape, x.shape[-1:]):
        raise ValueError(f"weights {tuple(x.shape)} take importance of that shape or of their last side; "
                         f"got {tuple(importance.shape)}")  # fmt: skip
    counts = torch.ones_like(x) if importance is None else importance.detach().float().to(x.device).expand_as(x)
    if not x.isfinite().all() or not counts.isfinite().all() or (counts < 0).any():
        raise ValueError("weights and importance must be finite, and importance not negative")
    if block_size < 1 or x.numel() % block_size:
        raise ValueError(f"block_size must divide the {x.numel()} weights; got {block_size}")
    blocks = x.reshape(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    normalized = torch.where(absmax[:, None] > 0, blocks / absmax[:, None], 0.0)
    weight = counts.reshape(-1, block_size) * absmax[:, None].square()
    if not weight.isfinite().all():
        raise ValueError("importance times the square of the largest weights is more than float32 has: scale it down")
    return normalized, weight, absmax


def vector_codebook(points: Tensor, n_words: int = 256, seed: int = 0, steps: int = 50) -> Tensor:
    """Code words for vectors, by scikit-learn's k-means: float32 (n_words, dim).

    points: float (n, dim). 256 words for pairs are 4 bits per weight. Raises TypeError for what is no tensor,
    ValueError for points that are not finite, no word, and fewer points than words.
    """
    from sklearn.cluster import KMeans

    if not isinstance(points, Tensor):
        raise TypeError(f"points must be a torch.Tensor; got {type(points).__name__}")
    if not points.isfinite().all() or n_words < 1:
        raise ValueError(f"words take finite points, and at least one word; got n_words = {n_words}")
    if points.dim() != 2 or len(points) < n_words:
        raise ValueError(f"{n_words} words take at least as many points (n, dim); got {tuple(points.shape)}")
    found = KMeans(n_words, n_init=1, max_iter=steps, random_state=seed).fit(points.double().cpu().numpy())
    return torch.from_numpy(found.cluster_centers_).float()


def nearest_words(points: Tensor, words: Tensor, at_once: int = 2**12) -> Tensor:
    """The number of the nearest word, point by point: int64 (n,) for points (n, dim) and words (n_words, dim).

    Raises ValueError for other shapes, no word, two dtypes, and points that are not finite.
    """
    if points.dim() != 2 or not len(words) or points.shape[1:] != words.shape[1:] or points.dtype != words.dtype:
        raise ValueError(
            f"points (n, dim) take words (n_words, dim) of their dtype; got {tuple(points.shape)} {points.dtype} and "
            f"{tuple(words.shape)} {words.dtype}"
        )
    if not points.isfinite().all():
        raise ValueError("points must be finite: what is not has no nearest word")
    half_squares = words.square().sum(dim=1) / 2  # |p - v|^2 = |p|^2 - 2 (p v - |v|^2 / 2), and |p| is the same for all
    return torch.cat([torch.addmm(-half_squares, some, words.T).argmax(dim=1) for some in points.split(at_once)])

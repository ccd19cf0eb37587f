"""Lloyd's algorithm for blocks: the levels of least error, on the exact distribution of normalised weights or on yours.

A weight that is normalised by a scale s and read back has an error s times that of the normalised one. So what counts
is not how often a normalised value u occurs, but how often times |s| (absolute error) or s^2 (squared error). With
that weight, Lloyd's two steps are the old ones: boundaries half-way between levels, and each level at the mean
(squared error) or the median (absolute error) of its cell. Levels that are pinned stay where they are.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import scipy

from nf4lab.codebooks import extremes
from nf4lab.codebooks.closed import NORMAL

POWER = {"mse": 2, "mae": 1}
GRID = np.sinh(np.linspace(-5, 5, 801)) / np.sinh(5)  # -1 to 1, dense about zero, where heavy tails have their peak


class Spread(NamedTuple):
    """A distribution on low..high: its mass from low to u, its moment (the integral of u), and the inverse of its mass.

    at_low, at_high: what mass sits on the ends besides. smooth: whether mass and moment are.
    """

    low: float
    high: float
    mass: Callable[[np.ndarray], np.ndarray]
    moment: Callable[[np.ndarray], np.ndarray]
    quantile: Callable[[np.ndarray], np.ndarray]
    at_low: float = 0.0
    at_high: float = 0.0
    smooth: bool = True


def of_density(block_size: float, power: int, signed: bool, density=NORMAL) -> Spread:
    """Weights of `density` over their block's absmax (signed: over its extreme), counted |scale|^power times.

    Given the extreme s, the others have density f(u s) |s| / P(|x| < |s|) at u = x / s, for -1 < u < 1.
    """
    nodes = extremes.of_magnitude(block_size, density)
    s = nodes.elements[:, 0] if signed else nodes.high
    at_ends = nodes.probability * nodes.high**power
    others = (block_size - 1) * at_ends * nodes.high / nodes.share
    height = density.pdf(np.multiply.outer(GRID, s)) @ others  # (801,)
    if not len(s) or not np.isfinite(height).all():
        raise ValueError("the quadrature needs a density that is finite everywhere, with tails that float64 can follow")
    at_high = at_ends.sum() if signed else at_ends[nodes.elements[:, 0] > 0].sum()
    slope, moment_slope = (scipy.interpolate.make_interp_spline(GRID, y, k=5) for y in (height, GRID * height))
    mass, moment = slope.antiderivative(), moment_slope.antiderivative()
    table = mass(GRID)

    def quantile(target: np.ndarray) -> np.ndarray:
        u = np.interp(target, table, GRID)
        return u - (mass(u) - target) / np.maximum(slope(u), 1e-12 * table[-1])  # one step of Newton's

    return Spread(-1.0, 1.0, mass, moment, quantile, at_ends.sum() - at_high, at_high)


def of_weights(x: np.ndarray, block_size: int, power: int, signed: bool) -> Spread:
    """The weights x (n,) over their block's absmax (signed: over its extreme), counted |scale|^power times."""
    blocks = np.pad(x.astype(np.float64), (0, -len(x) % block_size)).reshape(-1, block_size)
    scale = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    scale = scale if signed else np.abs(scale)  # (n_blocks, 1)
    u = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale != 0).reshape(-1)[: len(x)]
    weight = np.broadcast_to(np.abs(scale) ** power, blocks.shape).reshape(-1)[: len(x)]
    order = u.argsort()
    u, weight = u[order], weight[order]
    mass, moment = (np.concatenate([[0], np.cumsum(y)]) for y in (weight, weight * u))
    return Spread(
        np.nextafter(-1, -2), np.nextafter(1, 2),  # so that -1 and 1 themselves lie inside
        lambda at: mass[np.searchsorted(u, at)], lambda at: moment[np.searchsorted(u, at)],
        lambda target: u[np.minimum(np.searchsorted(mass[1:], target), len(u) - 1)],
        smooth=False,
    )  # fmt: skip


def least(spread: Spread, metric: str, pinned: Sequence[float], n_levels: int) -> np.ndarray:
    """The ascending levels of least error, the pinned ones among them: float64 (n_levels,).

    How many free levels lie between two pinned ones is tried out, from where the cube root of the density puts them
    on; where two ways are equally good, more levels go above zero, as in NF4.
    """
    pinned = np.sort(np.array(pinned, dtype=np.float64))
    grid = np.linspace(spread.low, spread.high, 513)
    share = np.concatenate([[0], np.cumsum(np.maximum(np.diff(spread.mass(grid)), 0) ** (1 / 3))])
    of_pinned = np.interp(pinned, grid, share / share[-1])

    @cache
    def settled(places: tuple[int, ...]) -> tuple[float, np.ndarray]:
        anchors = [-0.5, *places, n_levels - 0.5], [0, *of_pinned, 1]
        levels = np.interp(np.interp(np.arange(n_levels), *anchors), share / share[-1], grid)
        levels[list(places)] = pinned
        levels = settle(spread, metric, levels, list(places))
        return _error(spread, metric, levels), levels

    places = tuple(np.ceil(of_pinned * (n_levels - 1) - 0.5 - 1e-6).astype(int).tolist())
    while True:
        best = min(_neighbours(places, of_pinned, n_levels), key=lambda trial: settled(trial)[0])
        if settled(best)[0] >= settled(places)[0] - 1e-9 * abs(settled(places)[0]):
            return settled(places)[1]
        places = best


def _neighbours(places: tuple[int, ...], shares: np.ndarray, n_levels: int) -> list[tuple[int, ...]]:
    """The indices of pinned levels, and those with one moved by a place; a level at an end of the spread stays."""
    steps = [(0,) if share in (0, 1) else (0, -1, 1) for share in shares]
    moved = (tuple(map(sum, zip(places, step, strict=True))) for step in itertools.product(*steps))
    return [trial for trial in moved if all(a < b for a, b in itertools.pairwise([-1, *trial, n_levels]))]


def settle(spread: Spread, metric: str, levels: np.ndarray, places: list[int]) -> np.ndarray:
    """Lloyd's algorithm from `levels`, those at `places` fixed, until none moves by more than 1e-11: float64.

    The last steps are small and many, so a root finder takes them where the distribution is smooth. Raises ValueError
    where Lloyd's algorithm alone takes more than 20,000 steps.
    """
    for count in range(20_000):
        moved = step(spread, metric, levels, places)
        if np.abs(moved - levels).max() <= 1e-11:
            return moved
        levels = moved
        if spread.smooth and count == 20:
            levels = _finished(spread, metric, levels, places)
    raise ValueError(f"Lloyd's algorithm did not settle for {len(levels)} levels, pinned at {levels[places].tolist()}")


def _finished(spread: Spread, metric: str, levels: np.ndarray, places: list[int]) -> np.ndarray:
    """The levels that `step` leaves where they are, by a root finder; `levels` themselves where it fails."""
    trial = levels.copy()
    free = np.delete(np.arange(len(levels)), places)

    def movement(at: np.ndarray) -> np.ndarray:
        trial[free] = at
        return step(spread, metric, trial, places)[free] - at

    found = levels.copy()
    found[free] = scipy.optimize.root(movement, levels[free], tol=1e-13).x
    good = np.all(np.diff(found) > 0) and np.abs(step(spread, metric, found, places) - found).max() < 1e-8
    return found if good else levels


def step(spread: Spread, metric: str, levels: np.ndarray, places: list[int]) -> np.ndarray:
    """Each level moved to the mean or the median of its cell, but for those at `places`: float64 (n_levels,)."""
    mass, moment = _cells(spread, levels)
    if metric == "mse":
        cell = np.diff(mass)
        moved = np.divide(np.diff(moment), cell, out=levels.copy(), where=cell > 0)
    else:
        moved = np.clip(spread.quantile((mass[1:] + mass[:-1]) / 2), spread.low, spread.high)
    moved[places] = levels[places]
    return moved


def _cells(spread: Spread, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mass and moment up to each end of the cells, those that sit on the ends included: float64 (n_levels + 1,)."""
    edges = np.concatenate([[spread.low], (levels[1:] + levels[:-1]) / 2, [spread.high]])
    mass, moment = spread.mass(edges), spread.moment(edges)
    for at, sign, own in ((0, -1, spread.at_low), (-1, 1, spread.at_high)):
        mass[at] += sign * own
        moment[at] += sign * own * edges[at]
    return mass, moment


def _error(spread: Spread, metric: str, levels: np.ndarray) -> float:
    """The error of levels, up to a factor; the squared one less the mean square, which no level changes."""
    mass, moment = _cells(spread, levels)
    if metric == "mse":
        return np.sum(levels**2 * np.diff(mass) - 2 * levels * np.diff(moment))
    inner_mass, inner_moment = spread.mass(levels), spread.moment(levels)
    return np.sum(levels * (2 * inner_mass - mass[1:] - mass[:-1]) + moment[1:] + moment[:-1] - 2 * inner_moment)

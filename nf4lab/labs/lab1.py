"""What the checks of lab 1 (levels) compare, and the mistakes that they name."""

import math

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from nf4lab import codebooks
from nf4lab.labs import feedback

FLOAT32 = 1e-6  # of the largest level: a few float32 roundings, for formulas that are equal on paper
norm = scipy.stats.norm
OTHERS = {  # what a question may stand on
    "nearest": lambda w, levels: torch.bucketize(w, (levels[:-1] + levels[1:]) / 2).to(torch.uint8),
    "nf4": lambda tail=codebooks.TAIL: codebooks.nf4(tail),
}


def check_symmetric(f, absmax: float, bits: int) -> None:
    """Even levels -m..m over m, times absmax."""
    m = 2 ** (bits - 1) - 1
    got = feedback.call(f, absmax, bits, others=OTHERS)
    causes = {
        f"{2**bits} levels, with -{m + 1} among them: a zero in the middle leaves one code unused": _has(2**bits),
        f"only one side: the levels run from -absmax to absmax, {2 * m + 1} of them": _has(m + 1),
        "the levels are not multiplied by absmax": codebooks.symmetric_int(bits),
        "they are in descending order": _descending,
        f"the step is absmax/{m + 1}; m is 2**(bits - 1) - 1 = {m}": torch.arange(-m, m + 1) * (absmax / (m + 1)),
    }
    feedback.close(got, codebooks.symmetric_int(bits) * absmax, f"symmetric({absmax:g}, {bits})", FLOAT32, causes)


def check_min_max(f, low: float, high: float, n: int) -> None:
    """n even levels from low to high."""
    got, i = feedback.call(f, low, high, n, others=OTHERS), torch.arange(n)
    causes = {
        f"{n} gaps: {n} levels have {n - 1} gaps between them": low + i * ((high - low) / n),
        "the levels lie in the middle of n cells: the first is low and the last is high": (
            low + (i + 0.5) * ((high - low) / n)
        ),
        f"{n - 1} levels: n counts the levels, not the gaps": _has(n - 1),
        f"{n + 1} levels: n counts both ends": _has(n + 1),
        "they start at 0: add low": i * ((high - low) / (n - 1)),
        "they are in descending order": _descending,
    }
    feedback.close(got, low + (high - low) * codebooks.uniform(n), f"min_max({low:g}, {high:g}, {n})", FLOAT32, causes)


def dyadic(n: int, generator: torch.Generator) -> Tensor:
    """n weights that are multiples of 1/1024, so that every distance to a level of `dyadic_levels` is exact."""
    return torch.randint(-1200, 1201, (n,), generator=generator) / 1024


def dyadic_levels(generator: torch.Generator) -> Tensor:
    """16 levels that are multiples of 1/256, from -1 to 1, ascending."""
    inner = torch.randperm(511, generator=generator)[:14] - 255
    return torch.cat([torch.tensor([-256]), inner, torch.tensor([256])]).sort().values / 256


def check_nearest(f, w: Tensor, levels: Tensor) -> None:
    """The code of the nearest level; a weight half-way takes the lower code."""
    boundaries = (levels[:-1] + levels[1:]) / 2
    expected = torch.bucketize(w, boundaries).to(torch.uint8)
    got = feedback.call(f, w, levels, others=OTHERS)
    causes = {
        "these are the levels themselves; asked for are their codes": levels[expected.int()],
        "a tie went the wrong way: a weight half-way between two levels takes the lower code": (
            torch.bucketize(w, boundaries, right=True)
        ),
        "the level below was taken, not the nearest": _clamped(torch.bucketize(w, levels, right=True) - 1),
        "the level above was taken, not the nearest": _clamped(torch.bucketize(w, levels)),
        "codes count from 0, not from 1": expected.int() + 1,
        "this is the rounding of even levels; these levels are not even": (
            torch.round((w - levels[0]) / (levels[-1] - levels[0]) * 15).clamp(0, 15)
        ),
    }
    feedback.same(got, expected, "codes", causes)


def check_equal_shares(f, n: int) -> None:
    """The normal quantiles at (i + 0.5)/n."""
    got, i = feedback.call(f, n, others=OTHERS), np.arange(n)
    expected = codebooks.quantile_midpoints(n)
    causes = {
        "the quantile of 0 or of 1 is infinite: take the middle of each slice, (i + 1/2)/n": (
            lambda x: x.isinf().any()
        ),
        "the slices are not equal: their middles are at (i + 1/2)/n, not at (i + 1)/(n + 1)": (
            _float(norm.ppf((i + 1) / (n + 1)))
        ),
        "these are probabilities, or the distribution function: `norm.ppf` is its inverse": (
            lambda x: (x > 0).all() and (x < 1).all()
        ),
        "divided by the largest: here the levels stay in standard deviations": expected / expected.max(),
        "they are in descending order": _descending,
    }
    feedback.close(got, expected, f"equal_shares({n})", FLOAT32, causes)


def check_normal_float(f, tail: float) -> None:
    """Eight quantiles above zero, seven below, zero between them, over the largest."""
    got, expected = feedback.call(f, tail, others=OTHERS), codebooks.nf4(tail)
    feedback.close(got, expected, f"normal_float({tail:.7g})", FLOAT32, _normal_float_causes(tail, expected))


def _normal_float_causes(tail: float, expected: Tensor) -> dict:
    upper, lower = (norm.ppf(np.linspace(tail, 0.5, k)[:-1]) for k in (9, 8))
    even = norm.ppf(np.linspace(1 - tail, tail, 16))
    return {
        "eight levels below zero and seven above: NF4 has it the other way round": -expected.flip(0),
        "there is no zero: each side ends at 0.5, whose quantile is 0, and zero is written once": _float(
            even / even[-1]
        ),
        "not divided by the largest": _float(np.concatenate([-lower, [0.0], upper[::-1]])),
        "zero is there twice: leave the point 0.5 out on both sides": (
            lambda x: x.numel() > 15 and (x == 0).sum() >= 2
        ),
        "evenly spaced between 0 and the end: even are the probabilities, not the quantiles": (
            _float(np.concatenate([np.linspace(-1, 0, 8), np.linspace(0, 1, 9)[1:]]))
        ),
        "each side was divided by its own largest, or `tail` was used on one side only": (
            lambda x: x.numel() == 16 and x[0] != -1 and x[15] == 1
        ),
        "they are in descending order": _descending,
        "`tail` is not used: these are the levels of another tail": lambda x: torch.allclose(
            x.float(), codebooks.nf4()
        ),
    }


def check_nf4(f, tail: float) -> None:
    """NF4's levels for this tail, to the bit."""
    upper, lower = (torch.linspace(tail, 0.5, k)[:-1].double().numpy() for k in (9, 8))
    late = np.concatenate([-norm.ppf(lower), [0.0], norm.ppf(upper)[::-1]]) / norm.ppf(upper[0])
    got, expected = feedback.call(f, tail, others=OTHERS), codebooks.nf4(tail)
    causes = {
        "rounded to float32 after the division: round the quantiles first": _exactly(_float(late)),
        "NumPy's float32 `linspace`: its points are not torch's": _exactly(_by_numpy(tail, np.float32)),
        "the probabilities are in float64: they were float32, made by `torch.linspace`": _exactly(
            _by_numpy(tail, float)
        ),
        "all of it is in float64: three roundings to float32 belong to the table": _exactly(_all_in_float64(tail)),
        "`tail` is not used: this is the table itself": _exactly(codebooks.nf4()),
        "`tail` was replaced by the exact fraction (31/32 + 29/30)/2": _exactly(codebooks.nf4((31 / 32 + 29 / 30) / 2)),
        **_normal_float_causes(tail, expected),
    }
    feedback.same(got, expected, f"nf4({tail:.7g})", causes)


def _by_numpy(tail: float, dtype) -> Tensor:
    upper, lower = (_float(norm.ppf(np.linspace(tail, 0.5, k, dtype=dtype)[:-1])) for k in (9, 8))
    return torch.cat([-lower, torch.zeros(1), upper.flip(0)]) / upper[0]


def _all_in_float64(tail: float) -> Tensor:
    upper, lower = (norm.ppf(np.linspace(tail, 0.5, k)[:-1]) for k in (9, 8))
    return _float(np.concatenate([-lower, [0.0], upper[::-1]]) / upper[0])


def two_kinds(n_blocks: int, generator: torch.Generator) -> Tensor:
    """Blocks of 64 whose best tail depends on what is averaged: float32 (n_blocks * 64,).

    Every fourth block is large and normal; the others are a hundred times smaller and have a few far larger weights.
    """
    blocks = torch.randn(n_blocks, 64, generator=generator)
    heavy = torch.arange(n_blocks) % 4 != 0
    blocks[heavy] = blocks[heavy].sign() * blocks[heavy].abs() ** 3 / 100
    return blocks.reshape(-1)


def check_best_tail(f, w: Tensor, tails: list[float]) -> None:
    """The tail whose levels have the least squared error on w, in blocks of 64."""
    errors = {tail: _errors(w, codebooks.nf4(tail)) for tail in tails}
    whole = {tail: _errors(w, codebooks.nf4(tail), len(w))[0] for tail in tails}
    expected = min(tails, key=lambda tail: errors[tail][0])
    got = feedback.call(f, w, tails, others=OTHERS)
    got = got.item() if isinstance(got, Tensor) and got.numel() == 1 else got
    causes = {
        "the error was taken of the normalised weights: multiply back by each block's absmax first": (
            min(tails, key=lambda tail: errors[tail][1])
        ),
        "one absmax for all of w: each block of 64 has its own": min(tails, key=lambda tail: whole[tail]),
        "the mean of the magnitudes was compared, not of the squares": min(tails, key=lambda tail: errors[tail][2]),
        "this is the tail with the largest error": max(tails, key=lambda tail: errors[tail][0]),
        "this is a position in the list, or an error: asked for is the tail itself": lambda x: x not in tails,
    }
    feedback.same(got, expected, "best_tail", causes)


def _errors(w: Tensor, levels: Tensor, block_size: int = 64) -> tuple[float, float, float]:
    """Mean squared error, the same of the normalised weights, and mean absolute error."""
    blocks = w.reshape(-1, block_size)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    normalized = blocks / absmax
    e = (levels[torch.bucketize(normalized, (levels[:-1] + levels[1:]) / 2)] - normalized).double()
    return (e * absmax).square().mean().item(), e.square().mean().item(), (e * absmax).abs().mean().item()


def _has(n: int):
    return lambda x: x.numel() == n


def _descending(x: Tensor) -> bool:
    return x.numel() > 1 and bool((x.diff() < 0).all())


def _clamped(codes: Tensor) -> Tensor:
    return codes.clamp(0, 15)


def _exactly(levels: Tensor):
    return lambda x: torch.equal(x, levels)


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values)).float()


def draw_tails(generator: torch.Generator, n: int) -> list[float]:
    """n probabilities between 0.9 and 0.995, of seven digits as the published one."""
    return [math.floor(x * 1e7) / 1e7 for x in (0.9 + 0.095 * torch.rand(n, generator=generator)).tolist()]

"""What the checks of lab 1 (levels) compare, and the mistakes that they name."""

import functools
import math

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from nf4lab import codebooks
from nf4lab.labs import feedback

FLOAT32 = 1e-6  # of the largest level: a few float32 roundings, for formulas that are equal on paper
norm = scipy.stats.norm
OTHERS = {  # what later questions may stand on, in the questions' order
    "nearest": lambda w, levels: torch.bucketize(w, (levels[:-1] + levels[1:]) / 2).to(torch.uint8),
    "nf4": lambda tail=codebooks.TAIL: codebooks.nf4(tail),
}
DESCENDING = "they are in descending order"


def check_symmetric(f, *cases: tuple[float, int]) -> None:
    """Even levels -m..m over m, times absmax. cases: (absmax, bits)."""
    with feedback.Cases() as compared:
        for absmax, bits in cases:
            m = 2 ** (bits - 1) - 1
            unit, expected = codebooks.symmetric_int(bits), codebooks.symmetric_int(bits) * absmax
            causes = {
                "one level too many: with a zero in the middle, one code is left unused": [
                    torch.arange(-m - 1, m + 1) * (absmax / m),
                    torch.arange(-m - 1, m + 1) * (absmax / (m + 1)),
                    torch.linspace(-absmax, absmax, 2**bits),
                ],
                "only one side: the levels run from -absmax to absmax": torch.arange(m + 1) * (absmax / m),
                "the levels are not multiplied by absmax": unit,
                "these are the numbers -m to m: divide by m and multiply by absmax": torch.arange(-m, m + 1.0),
                DESCENDING: expected.flip(0),
                "divided by m + 1; m is 2**(bits - 1) - 1": torch.arange(-m, m + 1) * (absmax / (m + 1)),
            }
            got = feedback.call(f, absmax, bits, others=feedback.before(OTHERS, "nearest"))
            compared.close(got, expected, f"symmetric({absmax:g}, {bits})", FLOAT32, causes)


def check_min_max(f, *cases: tuple[float, float, int]) -> None:
    """n even levels from low to high. cases: (low, high, n)."""
    with feedback.Cases() as compared:
        for low, high, n in cases:
            i, expected = torch.arange(n), low + (high - low) * codebooks.uniform(n)
            causes = {
                "n gaps: n levels have n - 1 gaps between them": low + i * ((high - low) / n),
                "the levels lie in the middle of n cells: the first is low and the last is high": (
                    low + (i + 0.5) * ((high - low) / n)
                ),
                "one level too few: n counts the levels, not the gaps": torch.linspace(low, high, n - 1),
                "one level too many: n counts both ends": torch.linspace(low, high, n + 1),
                "they start at 0: add low": i * ((high - low) / (n - 1)),
                DESCENDING: expected.flip(0),
            }
            got = feedback.call(f, low, high, n, others=feedback.before(OTHERS, "nearest"))
            compared.close(got, expected, f"min_max({low:g}, {high:g}, {n})", FLOAT32, causes)


def dyadic(n: int, generator: torch.Generator) -> Tensor:
    """n weights that are multiples of 1/1024, so that every distance to a level of `dyadic_levels` is exact."""
    return torch.randint(-1200, 1201, (n,), generator=generator) / 1024


def dyadic_levels(generator: torch.Generator) -> Tensor:
    """16 levels that are multiples of 1/256, from -1 to 1, ascending."""
    inner = torch.randperm(511, generator=generator)[:14] - 255
    return torch.cat([torch.tensor([-256]), inner, torch.tensor([256])]).sort().values / 256


def check_nearest(f, w: Tensor, levels: Tensor) -> None:
    """The code of the nearest level; a weight half-way takes the lower code."""
    boundaries, last = (levels[:-1] + levels[1:]) / 2, len(levels) - 1
    expected = torch.bucketize(w, boundaries).to(torch.uint8)
    even = (w - levels[0]) / (levels[-1] - levels[0]) * last
    causes = {
        "these are the levels themselves; asked for are their codes": levels[expected.int()],
        "a tie went the wrong way: a weight half-way between two levels takes the lower code": (
            torch.bucketize(w, boundaries, right=True)
        ),
        "the level below was taken, not the nearest": (torch.bucketize(w, levels, right=True) - 1).clamp(0, last),
        "the level above was taken, not the nearest": torch.bucketize(w, levels).clamp(0, last),
        "codes count from 0, not from 1": expected.int() + 1,
        "this is the rounding of even levels; these levels are not even": even.round().clamp(0, last),
    }
    feedback.same(feedback.call(f, w, levels, others=feedback.before(OTHERS, "nearest")), expected, "codes", causes)


def check_equal_shares(f, *sizes: int) -> None:
    """The normal quantiles at (i + 0.5)/n."""
    with feedback.Cases() as compared:
        for n in sizes:
            i, expected = np.arange(n), codebooks.quantile_midpoints(n)
            causes = {
                "the quantile of 0 or of 1 is infinite: take the middle of each slice, (i + 1/2)/n": [
                    _float(norm.ppf(p)) for p in (np.linspace(0, 1, n), i / n, (i + 1) / n)
                ],
                "the slices are not equal: their middles are at (i + 1/2)/n, not at (i + 1)/(n + 1)": (
                    _float(norm.ppf((i + 1) / (n + 1)))
                ),
                "these are the probabilities: `norm.ppf` gives their quantiles": _float((i + 0.5) / n),
                "this is the distribution function: `norm.ppf` is its inverse": _float(norm.cdf((i + 0.5) / n)),
                "divided by the largest: here the levels stay in standard deviations": expected / expected.max(),
                DESCENDING: expected.flip(0),
            }
            got = feedback.call(f, n, others=feedback.before(OTHERS, "nf4"))
            compared.close(got, expected, f"equal_shares({n})", FLOAT32, causes)


def check_normal_float(f, *tails: float) -> None:
    """Eight quantiles above zero, seven below, zero between them, over the largest."""
    with feedback.Cases() as compared:
        for tail in tails:
            got, expected = feedback.call(f, tail, others=feedback.before(OTHERS, "nf4")), codebooks.nf4(tail)
            causes = _normal_float_causes(tail, expected)
            compared.close(got, expected, f"normal_float({tail:.7g})", FLOAT32, causes)


def _normal_float_causes(tail: float, expected: Tensor) -> dict:
    upper, lower = (norm.ppf(np.linspace(tail, 0.5, k)) for k in (9, 8))  # with the 0 at their ends
    even = norm.ppf(np.linspace(1 - tail, tail, 16))
    levels = _joined(upper[:-1], lower[:-1])
    twice = [_joined(a, b, zero=()) for a, b in ((upper, lower), (lower, lower))]
    return {
        "eight levels below zero and seven above: NF4 has it the other way round": -expected.flip(0),
        "there is no zero: each side ends at 0.5, whose quantile is 0, and zero is written once": [
            _float(even / even[-1]), _joined(upper[:-1], lower[:-1], zero=()), _joined(upper[:-1], upper[:-1], zero=()),
        ],
        "not divided by the largest": levels * upper[0],
        "zero is there twice: leave the point 0.5 out on both sides": twice,
        "evenly spaced between 0 and the end: even are the probabilities, not the quantiles": (
            _float(np.concatenate([np.linspace(-1, 0, 8), np.linspace(0, 1, 9)[1:]]))
        ),
        "the points are spread from `tail` to 0.5 without its end, so the steps are too short": (
            _joined(*(norm.ppf(np.linspace(tail, 0.5, k)) for k in (8, 7)))
        ),
        DESCENDING: expected.flip(0),
        "`tail` is not used: these are the levels of another tail": codebooks.nf4(),
    }  # fmt: skip


def _joined(upper: np.ndarray, lower: np.ndarray, zero=(0.0,)) -> Tensor:
    """Levels of two sides whose quantiles descend, over the largest: float32."""
    return _float(np.concatenate([-lower, zero, upper[::-1]]) / upper[0])


def check_nf4(f, *tails: float) -> None:
    """NF4's levels for each tail, to the bit."""
    with feedback.Cases() as compared:
        for tail in tails:
            upper, lower = (torch.linspace(tail, 0.5, k)[:-1].double().numpy() for k in (9, 8))
            late = np.concatenate([-norm.ppf(lower), [0.0], norm.ppf(upper)[::-1]]) / norm.ppf(upper[0])
            got, expected = feedback.call(f, tail, others=feedback.before(OTHERS, "nf4")), codebooks.nf4(tail)
            causes = {
                "rounded to float32 after the division: round the quantiles first": _float(late),
                "NumPy's float32 `linspace`: its points are not torch's": _by_numpy(tail, np.float32),
                "the probabilities are in float64: they were float32, made by `torch.linspace`": _by_numpy(tail, float),
                "all of it is in float64: three roundings to float32 belong to the table": _all_in_float64(tail),
                "`tail` was replaced by the exact fraction (31/32 + 29/30)/2": codebooks.nf4((31 / 32 + 29 / 30) / 2),
            }
            causes |= {text: _about(wrong) for text, wrong in _normal_float_causes(tail, expected).items()}
            compared.same(got, expected, f"nf4({tail:.7g})", causes)


def _about(wrong):
    """A recogniser of these levels, up to float32's rounding: a gross mistake comes with its own roundings."""
    return lambda got: any(
        got.shape == one.shape and torch.allclose(got.float(), one.float(), rtol=0, atol=FLOAT32)
        for one in (wrong if isinstance(wrong, list) else [wrong])
    )


def _by_numpy(tail: float, dtype) -> Tensor:
    upper, lower = (_float(norm.ppf(np.linspace(tail, 0.5, k, dtype=dtype)[:-1])) for k in (9, 8))
    return torch.cat([-lower, torch.zeros(1), upper.flip(0)]) / upper[0]


def _all_in_float64(tail: float) -> Tensor:
    return _joined(*(norm.ppf(np.linspace(tail, 0.5, k)[:-1]) for k in (9, 8)))


TAILS = (0.8, 0.92, 0.9677083, 0.995)


@functools.cache
def two_kinds(seed: int) -> tuple[Tensor, Tensor]:
    """Two times 48 blocks of 64 whose best tails differ, and from what each mistake takes for them: float32 (3072,).

    Some blocks are large, with their largest magnitude negative; the others are a hundred times smaller and have a few
    far larger weights. How many, and how much larger, is drawn until that is so.
    """
    generator, found = torch.Generator().manual_seed(seed), {}
    while len(found) < 2:
        share, power, bent, large = torch.rand(4, generator=generator).tolist()
        blocks = torch.randn(48, 64, generator=generator)
        heavy = torch.arange(48) % 12 >= 1 + int(6 * large)
        blocks[heavy] = blocks[heavy].sign() * blocks[heavy].abs() ** (2 + 2 * power) / 100
        drawn = blocks[~heavy].sign() * blocks[~heavy].abs() ** (0.3 + 1.5 * bent)
        blocks[~heavy] = drawn.where(drawn < 0, drawn * share)
        right, wrong = _best_tails(blocks.reshape(-1), TAILS)
        if right not in wrong.values():
            found.setdefault(right, blocks.reshape(-1))
    return tuple(found.values())


def check_best_tail(f, tails: tuple[float, ...], *weights: Tensor) -> None:
    """The tail whose levels have the least squared error on w, in blocks of 64."""
    with feedback.Cases(of_few=True) as compared:
        for w in weights:
            expected, wrong = _best_tails(w, tails)
            got = feedback.plain(feedback.call(f, w, list(tails), others=OTHERS))
            causes = wrong | {"this is a position in the list: asked for is the tail itself": tails.index(expected)}
            compared.same(got, expected, "best_tail", causes)


def _best_tails(w: Tensor, tails) -> tuple[float, dict[str, float]]:
    """The best tail, and what the likely mistakes take for it."""
    blocks = w.reshape(-1, 64)
    absmax, whole = blocks.abs().amax(dim=1, keepdim=True), w.abs().max()
    least = lambda measure: min(tails, key=lambda tail: measure(codebooks.nf4(tail)))  # noqa: E731
    return least(lambda levels: _mean_square(blocks, absmax, levels, absmax)), {
        "the error was taken of the normalised weights: multiply back by each block's absmax first": (
            least(lambda levels: _mean_square(blocks, absmax, levels, torch.ones(1)))
        ),
        "one absmax for all of w: each block of 64 has its own": (
            least(lambda levels: _mean_square(blocks, whole, levels, whole))
        ),
        "the mean of the magnitudes was compared, not of the squares": (
            least(lambda levels: (_error(blocks, absmax, levels) * absmax).abs().mean().item())
        ),
        "the largest value of a block was taken, not the largest magnitude": (
            least(lambda levels: _mean_square(blocks, blocks.amax(dim=1, keepdim=True), levels))
        ),
        "this is the tail with the largest error": (
            least(lambda levels: -_mean_square(blocks, absmax, levels, absmax))
        ),
    }


def _error(blocks: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    s = blocks / scale
    return (levels[torch.bucketize(s, (levels[:-1] + levels[1:]) / 2)] - s).double()


def _mean_square(blocks: Tensor, scale: Tensor, levels: Tensor, back: Tensor | None = None) -> float:
    return (_error(blocks, scale, levels) * (scale if back is None else back)).square().mean().item()


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values)).float()


def draw_tails(generator: torch.Generator, n: int) -> list[float]:
    """n probabilities between 0.9 and 0.995, of seven digits as the published one."""
    return [math.floor(x * 1e7) / 1e7 for x in (0.9 + 0.095 * torch.rand(n, generator=generator)).tolist()]

"""The distribution of a block's extremes, against closed forms and against sampling."""

import itertools

import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from nf4lab import extremes

DENSITIES = [scipy.stats.norm, scipy.stats.norm(0.7, 2), scipy.stats.laplace, scipy.stats.t(5), scipy.stats.expon]


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("block_size", [2, 64, 4096])
def test_the_density_of_the_absmax_is_the_derivative_of_its_distribution(density, block_size):
    m = extremes.magnitude_edges(block_size, density)[3:8]
    for low, high in itertools.pairwise(m):
        area = scipy.integrate.quad(extremes.absmax_pdf, low, high, (block_size, density), epsabs=1e-13)[0]
        expected = np.diff(extremes.absmax_cdf([low, high], block_size, density))[0]
        assert area == pytest.approx(expected, abs=1e-10)


def test_no_magnitude_is_negative():
    assert extremes.absmax_pdf(-1.0) == 0
    assert extremes.absmax_cdf(-1.0) == 0


@pytest.mark.parametrize("block_size", [2, 16, 64, 4096])
def test_the_mean_absmax_of_uniform_draws_is_n_over_n_plus_one(block_size):
    mean = extremes.absmax_mean(block_size, scipy.stats.uniform(-1, 2))
    assert mean == pytest.approx(block_size / (block_size + 1), abs=1e-7)


@pytest.mark.parametrize("block_size", [2, 16, 64, 4096])
def test_the_mean_absmax_of_laplace_draws_is_a_harmonic_number(block_size):
    harmonic = (1 / np.arange(1, block_size + 1)).sum()  # |x| is exponential, and the largest of n has mean H_n
    assert extremes.absmax_mean(block_size, scipy.stats.laplace) == pytest.approx(harmonic, rel=1e-6)


@pytest.mark.parametrize("block_size", [2, 16, 64, 4096])
def test_the_mean_square_of_the_absmax_has_its_closed_forms(block_size):
    k = np.arange(1, block_size + 1)
    laplace = (1 / k).sum() ** 2 + (1 / k**2).sum()
    for density, expected in ((scipy.stats.laplace, laplace), (scipy.stats.uniform(-1, 2), k[-1] / (k[-1] + 2))):
        nodes = extremes.of_magnitude(block_size, density)
        assert nodes.probability @ nodes.high**2 == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("density", [*DENSITIES, scipy.stats.uniform(-1, 2)])
@pytest.mark.parametrize("block_size", [16, 64, 4096])
def test_the_mean_range_of_a_block_is_the_integral_of_what_lies_within(density, block_size):
    # E max - E min = integral of 1 - F^B - (1 - F)^B (Tippett 1925)
    ends = density.ppf([1e-15, 1e-9, 1e-6, 1e-3, 0.5]), density.isf([1e-3, 1e-6, 1e-9, 1e-15])
    edges = np.unique(np.concatenate(ends))

    def within(x):
        return -np.expm1(block_size * density.logcdf(x)) - np.exp(block_size * density.logsf(x))

    expected = sum(scipy.integrate.quad(within, a, b, epsabs=1e-12, limit=200)[0] for a, b in itertools.pairwise(edges))
    nodes = extremes.of_range(block_size, density)
    assert nodes.probability @ (nodes.high - nodes.low) == pytest.approx(expected, rel=1e-4)


def test_extremes_of_both_signs_are_as_likely_as_the_density_says():
    nodes = extremes.of_magnitude(64, scipy.stats.expon)
    assert nodes.probability[nodes.elements[:, 0] > 0].sum() == pytest.approx(1, abs=1e-12)
    nodes = extremes.of_magnitude(64, scipy.stats.norm)
    assert nodes.probability[nodes.elements[:, 0] > 0].sum() == pytest.approx(0.5, abs=1e-12)


def test_what_the_quadrature_misses_is_refused():
    with pytest.raises(ValueError, match=r"finds probability 0\.99\d*, not 1: the density is not smooth, or the block"):
        extremes.of_range(2)  # two draws: the joint density ends in a step at a = c
    draws = np.random.default_rng(0).standard_normal(2**16)
    with pytest.raises(ValueError, match="the density is not smooth"):
        extremes.of_magnitude(64, scipy.stats.rv_histogram(np.histogram(draws, bins=2000), density=False))

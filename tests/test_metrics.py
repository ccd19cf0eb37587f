"""Metrics against their definitions."""

import math

import pytest
import torch

import nf4lab


def test_mse_and_mae_are_the_means_by_definition():
    x, x_hat = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 2.0])
    assert nf4lab.mse(x, x_hat) == 5 / 3
    assert nf4lab.mae(x, x_hat) == 1.0


def test_errors_are_summed_in_float64_over_every_chunk():
    x = torch.full((2**20 + 3,), 1e-3)
    assert nf4lab.mse(x, torch.zeros_like(x)) == pytest.approx(float(torch.tensor(1e-3)) ** 2, rel=1e-12)


def test_sqnr_counts_ten_decibels_for_a_tenth_of_the_error():
    x = torch.ones(100, dtype=torch.float64)
    assert nf4lab.sqnr_db(x, x + 0.1) == pytest.approx(20)
    assert nf4lab.sqnr_db(x, x) == math.inf
    assert nf4lab.sqnr_db(0 * x, x) == -math.inf


def test_shapes_that_differ_or_hold_nothing_are_refused():
    with pytest.raises(ValueError, match=r"got \(3,\) and \(4,\)"):
        nf4lab.mse(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match=r"at least one element; got \(0,\)"):
        nf4lab.mae(torch.zeros(0), torch.zeros(0))


def test_code_usage_is_the_share_of_each_code():
    q = nf4lab.quantize(torch.tensor([1.0, -1.0, 0.0, 0.0]))
    usage = nf4lab.code_usage(q)
    assert usage.tolist() == [0.25, 0, 0, 0, 0, 0, 0, 0.5, 0, 0, 0, 0, 0, 0, 0, 0.25]
    assert nf4lab.entropy_bits(usage) == 1.5


@pytest.mark.parametrize(("n_levels", "n_codes"), [(4, 4), (5, 8), (15, 16), (20, 256)])
def test_code_usage_has_a_share_for_every_code_of_that_width_used_or_not(n_levels, n_codes):
    q = nf4lab.quantize(torch.zeros(64), nf4lab.Format("even", torch.linspace(-1, 1, n_levels)))
    assert nf4lab.code_usage(q).shape == (n_codes,) and nf4lab.code_usage(q).sum() == 1


def test_of_a_tensor_without_elements_shares_and_ratio_are_no_numbers():
    q = nf4lab.quantize(torch.zeros(0))
    assert nf4lab.code_usage(q).isnan().all() and math.isnan(nf4lab.compression_ratio(q))


def test_nf4_codes_of_normal_weights_carry_3_885_bits():
    q = nf4lab.quantize(torch.randn(2**22, generator=torch.Generator().manual_seed(0)))
    assert nf4lab.entropy_bits(nf4lab.code_usage(q)) == pytest.approx(3.885, abs=0.001)


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float32, 32 / 4.5), (torch.float16, 16 / 4.5)])
def test_the_compression_ratio_compares_stored_bytes(dtype, ratio):
    assert nf4lab.compression_ratio(nf4lab.quantize(torch.ones(6400, dtype=dtype))) == pytest.approx(ratio)


def test_the_shannon_limit_falls_by_six_decibels_a_bit():
    assert nf4lab.shannon_limit(0) == 1
    assert 10 * math.log10(nf4lab.shannon_limit(4) / nf4lab.shannon_limit(5)) == pytest.approx(6.0206, abs=1e-4)
    assert nf4lab.shannon_limit(4.5) == pytest.approx(0.00195, rel=0.002)
    assert nf4lab.shannon_limit(2, variance=3) == 3 / 16

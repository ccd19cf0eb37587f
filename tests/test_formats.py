"""The table of formats, and formats of one's own: also those that only later chapters need."""

import pytest
import torch

import nf4lab
from nf4lab import codebooks, formats


@pytest.mark.parametrize(
    ("name", "near"), [("nf5", "'nf4'"), ("NF4", "'nf4'"), ("int8", "'int4'"), ("unifrom", "'uniform'"), ("?", "'nf4'")]
)
def test_an_unknown_format_is_refused_with_the_nearest_known(name, near):
    with pytest.raises(ValueError, match=f"unknown format '{name}'; did you mean .*{near}".replace("?'", r"\?'")):
        nf4lab.quantize(torch.zeros(4), name)


def test_a_format_that_is_neither_name_nor_format_is_refused():
    with pytest.raises(TypeError, match=r"name or a nf4lab\.Format; got int"):
        nf4lab.quantize(torch.zeros(4), 4)


@pytest.mark.parametrize("levels", [[0.0], [0.0, float("nan")], [[0.0, 1.0]], range(257)])
def test_levels_that_make_no_codebook_are_refused(levels):
    with pytest.raises(ValueError, match="2 to 256 finite numbers in one dimension"):
        nf4lab.Format("mine", list(levels))


def test_constants_are_stored_in_floating_point():
    with pytest.raises(ValueError, match=r"floating-point dtype; got torch\.int8"):
        nf4lab.Format("mine", [0.0, 1.0], constants_dtype=torch.int8)


def test_a_format_of_more_than_sixteen_levels_is_refused_by_quantize():
    with pytest.raises(ValueError, match="at most 16 levels; format 'wide' has 17"):
        nf4lab.quantize(torch.zeros(4), nf4lab.Format("wide", range(17)))


def test_a_tie_goes_to_the_lower_level():
    nf4 = nf4lab.FORMATS["nf4"]
    assert torch.equal(nf4.nearest(nf4.boundaries), torch.arange(15, dtype=torch.uint8))
    above = torch.nextafter(nf4.boundaries, torch.tensor(torch.inf))
    assert torch.equal(nf4.nearest(above), torch.arange(1, 16, dtype=torch.uint8))


def test_levels_may_stand_in_any_order_of_codes():
    levels = codebooks.nf4()
    shuffled = nf4lab.Format("shuffled", levels[torch.randperm(16, generator=torch.Generator().manual_seed(0))])
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(nf4lab.quantize(x, shuffled).dequantize(), nf4lab.quantize(x).dequantize())


def test_int4_uses_fifteen_codes_with_zero_in_the_middle():
    x = torch.randn(2**16, generator=torch.Generator().manual_seed(0))
    usage = nf4lab.code_usage(nf4lab.quantize(x, "int4"))
    assert usage[15] == 0
    assert (usage[:15] > 0).all()
    assert nf4lab.FORMATS["int4"].levels[7] == 0


def test_min_max_stores_the_extremes_of_a_block_and_two_constants():
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)) + 5
    q = nf4lab.quantize(x, "uniform")
    x_hat = q.dequantize()
    assert x_hat.min() == x.min()
    torch.testing.assert_close(x_hat.max(), x.max(), rtol=2**-23, atol=0)  # location + scale rounds twice
    assert q.bits_per_weight == 4 + 2 * 32 / 64


def test_the_naive_scheme_rounds_to_quantiles_about_the_mean():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 3 + 1
    q = nf4lab.quantize(x, "naive-quantile", block_size=4096)
    assert q.location.item() == pytest.approx(x.mean().item(), abs=1e-6)
    assert q.scale.item() == pytest.approx(x.std(correction=0).item(), abs=1e-6)


def signed_absmax(blocks):
    """The element of largest magnitude, with its sign: what it scales becomes +1."""
    return blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True)).squeeze(1), None


def test_signed_absmax_is_a_normalization_of_ones_own():
    signed = nf4lab.Format("signed", codebooks.nf4(), signed_absmax)
    x = torch.randn(640, generator=torch.Generator().manual_seed(0))
    q = nf4lab.quantize(x, signed)
    extremes = x.reshape(-1, 64).abs().argmax(dim=1)
    assert (q.codes.reshape(-1, 64).gather(1, extremes[:, None]) == 15).all()
    assert (nf4lab.mse(x, q.dequantize())) < 0.02


def power_of_two(blocks):
    """The OCP rule of MXFP4: 2**(floor(log2 absmax) - 2), the exponent of 4.0 taken off."""
    return torch.exp2(blocks.abs().amax(dim=1).log2().floor() - 2), None


def test_power_of_two_scales_fit_in_one_byte():
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    mxfp4 = nf4lab.Format("mxfp4", torch.cat([e2m1, 0 - e2m1]), power_of_two, torch.float8_e8m0fnu)
    x = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    q = nf4lab.quantize(x, mxfp4, block_size=32)
    assert q.bits_per_weight == 4.25
    # quadrature gives 0.01278 at block size 64 and 0.01270 at 128; the OCP block is 32
    assert nf4lab.mse(x, q.dequantize()) == pytest.approx(0.0128, rel=0.05)


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float16, 4.25), (torch.bfloat16, 4.25), (torch.float8_e4m3fn, 4.125)]
)
def test_constants_in_fewer_bits_are_used_as_they_are_stored(dtype, bits):
    short = nf4lab.Format("short", codebooks.nf4(), constants_dtype=dtype)
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    q = nf4lab.quantize(x, short)
    assert torch.equal(q.absmax, x.reshape(-1, 64).abs().amax(dim=1).to(dtype).float())
    assert q.bits_per_weight == bits


def test_mean_and_deviation_are_those_of_the_block():
    blocks = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    scale, location = formats.mean_std(blocks)
    torch.testing.assert_close(location, blocks.mean(dim=1))
    torch.testing.assert_close(scale, blocks.std(dim=1, correction=0))

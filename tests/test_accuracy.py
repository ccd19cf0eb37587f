"""The errors that the field has published for these formats, met on both sides."""

import pytest
import torch

import nf4lab

# block size: mean and standard deviation of the mean absolute error, then of the mean relative error, on
# randn(1024, 1024), as bitsandbytes' own tests assert them.
BITSANDBYTES = {
    "nf4": {
        32: (0.067746, 0.000069, 0.189726, 0.000304),
        64: (0.072798, 0.000074, 0.203339, 0.000340),
        128: (0.076831, 0.000091, 0.215237, 0.000391),
        256: (0.080337, 0.000102, 0.226105, 0.000398),
        512: (0.083547, 0.000143, 0.236079, 0.000544),
        1024: (0.086610, 0.000187, 0.245370, 0.000600),
        2048: (0.089592, 0.000251, 0.254163, 0.000747),
        4096: (0.092547, 0.000360, 0.262473, 0.000999),
    },
    "fp4": {
        32: (0.088925, 0.000091, 0.242443, 0.000330),
        64: (0.096543, 0.000111, 0.260125, 0.000379),
        128: (0.102969, 0.000134, 0.275817, 0.000433),
        256: (0.108684, 0.000182, 0.289831, 0.000497),
        512: (0.114115, 0.000234, 0.302881, 0.000583),
        1024: (0.119333, 0.000320, 0.315000, 0.000757),
        2048: (0.124556, 0.000455, 0.326607, 0.000955),
        4096: (0.129536, 0.000612, 0.337169, 0.001239),
    },
}
# Mean squared error on N(0, 1), by quadrature.
GAUSSIAN_MSE = {
    ("int4", 64): 0.011578,
    ("int4", 128): 0.013752,
    ("uniform", 64): 0.008031,
    ("uniform", 128): 0.009947,
    ("nf4", 32): 0.00762,
    ("nf4", 64): 0.008460,
    ("nf4", 128): 0.009136,
    ("fp4", 64): 0.01487,
    ("naive-quantile", 64): 0.0209,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", BITSANDBYTES["nf4"])
@pytest.mark.parametrize("format", BITSANDBYTES)
def test_mean_errors_lie_inside_the_thresholds_of_bitsandbytes(format, block_size, dtype):
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    error = (x.float() - nf4lab.quantize(x, format, block_size).dequantize().float()).abs()
    relative = (error / (x.float().abs() + 1e-8)).mean().item()
    absolute_mean, absolute_std, relative_mean, relative_std = BITSANDBYTES[format][block_size]
    assert abs(error.mean().item() - absolute_mean) < 7 * absolute_std
    assert abs(relative - relative_mean) < 7 * relative_std


@pytest.fixture(scope="module")
def normals():
    return torch.randn(2**24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("format", "block_size"), GAUSSIAN_MSE)
def test_mse_on_16_million_normals_is_within_half_a_percent_of_theory(normals, format, block_size):
    error = nf4lab.mse(normals, nf4lab.quantize(normals, format, block_size).dequantize())
    assert error == pytest.approx(GAUSSIAN_MSE[format, block_size], rel=0.005)

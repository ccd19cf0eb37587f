"""Each derived codebook against the published table that it must equal."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

import nf4lab
from nf4lab import codebooks

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
NF4_BOUNDARIES = [
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
    -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
    0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
]  # fmt: skip


def test_derived_nf4_equals_the_published_table_bit_for_bit():
    assert torch.equal(codebooks.nf4(), torch.tensor(NF4))


def test_nf4_boundaries_are_the_published_float32_midpoints():
    levels = codebooks.nf4()
    assert torch.equal((levels[:-1] + levels[1:]) / 2, torch.tensor(NF4_BOUNDARIES))


def test_the_unrounded_tail_would_change_twelve_levels():
    assert (codebooks.nf4((29 / 30 + 31 / 32) / 2) != torch.tensor(NF4)).sum() == 12


@pytest.mark.parametrize("tail", [0.5, 1.0, -1, 2])
def test_a_tail_outside_its_range_is_refused(tail):
    with pytest.raises(ValueError, match=f"tail is a probability between 0.5 and 1; got {tail}"):
        codebooks.nf4(tail)


@pytest.mark.parametrize(("name", "n_levels"), [("nf3", 8), ("nf2", 4)])
def test_nf3_and_nf2_are_the_quantiles_of_nf4s_rule_with_its_tail(name, n_levels):
    tail = torch.tensor(0.9677083)
    positive = scipy.stats.norm.ppf(torch.linspace(tail, 0.5, n_levels // 2 + 1)[:-1])
    negative = -scipy.stats.norm.ppf(torch.linspace(tail, 0.5, n_levels // 2)[:-1])
    expected = torch.tensor([*negative, 0, *positive[::-1]]).float() / positive[0]
    assert torch.allclose(getattr(codebooks, name)(), expected, rtol=0, atol=2e-7)
    assert nf4lab.FORMATS[name].code_bits == {"nf3": 3, "nf2": 2}[name]


def test_fp4_equals_the_table_of_bitsandbytes_by_code():
    magnitude = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=torch.float64)
    assert torch.equal(codebooks.fp4(), (torch.cat([magnitude, 0 - magnitude]) / 12).float())


def test_the_second_zero_of_fp4_is_positive():
    assert not codebooks.fp4()[8].signbit()


def test_the_dynamic_map_equals_the_one_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(codebooks.dynamic_map(), functional.create_dynamic_map())


def test_the_dynamic_map_has_its_published_landmarks():
    levels = codebooks.dynamic_map()
    assert levels.numel() == 256
    assert levels[127] == 0
    assert levels[0].item() == pytest.approx(-0.99296874, abs=1e-8)
    assert levels[-1] == 1
    assert levels[128].item() == pytest.approx(5.5e-7, rel=1e-6)


def test_half_of_the_dynamic_map_lies_in_the_outermost_decade():
    assert (codebooks.dynamic_map().abs() > 0.1).sum() == 129  # 64 a side, and 1.0


def test_symmetric_int4_is_minus_seven_to_seven_over_seven():
    assert torch.equal(codebooks.symmetric_int(4) * 7, torch.arange(-7.0, 8.0))


def test_uniform_levels_are_evenly_spaced_from_zero_to_one():
    assert torch.equal(codebooks.uniform(16), torch.arange(16) / 15)


def test_quantile_midpoints_cut_the_normal_into_equal_shares():
    shares = scipy.stats.norm.cdf(codebooks.quantile_midpoints(16).double())
    np.testing.assert_allclose(shares, (np.arange(16) + 0.5) / 16, atol=1e-7)


def expected_mse(levels, density):
    """The mean squared error of rounding to the nearest level, by adaptive quadrature."""
    levels = levels.double().numpy()
    edges = [density.support()[0], *(levels[1:] + levels[:-1]) / 2, density.support()[1]]
    return sum(
        scipy.integrate.quad(lambda x, c=c: (x - c) ** 2 * density.pdf(x), a, b, epsabs=1e-13)[0]
        for c, a, b in zip(levels, edges[:-1], edges[1:], strict=True)
    )


def test_lloyd_max_reaches_the_known_error_for_a_gaussian():
    error = expected_mse(codebooks.lloyd_max(scipy.stats.norm), scipy.stats.norm)
    assert error == pytest.approx(0.00950100801, abs=1e-10)


def test_lloyd_max_of_a_uniform_density_is_a_uniform_grid():
    levels = codebooks.lloyd_max(scipy.stats.uniform(-1, 2), 16)
    torch.testing.assert_close(levels, (torch.arange(16) - 7.5) / 8, atol=1e-6, rtol=0)


@pytest.mark.parametrize("density", [scipy.stats.laplace, scipy.stats.t(5), scipy.stats.norm(3, 0.01)])
def test_each_lloyd_max_level_is_the_mean_of_its_cell(density):
    levels = codebooks.lloyd_max(density, 8).double().numpy()
    edges = [-np.inf, *(levels[1:] + levels[:-1]) / 2, np.inf]
    means = [density.expect(lb=a, ub=b, conditional=True) for a, b in itertools.pairwise(edges)]
    np.testing.assert_allclose(levels, means, atol=1e-5 * density.std())


def test_a_density_of_infinite_variance_has_no_lloyd_max_levels():
    with pytest.raises(ValueError, match="finite variance; got variance inf"):
        codebooks.lloyd_max(scipy.stats.t(1.5))


EVERY_TABLE = """
import hashlib, torch, nf4lab
from nf4lab.formats.double_quant import MAPS
{before}
digest = hashlib.sha256()
for format in (*nf4lab.FORMATS.values(), *MAPS.values()):
    for table in (format.levels, format.boundaries, format.ascending):
        assert table.device.type == "cpu", (format.name, table.device)
        digest.update(table.numpy().tobytes())
x = torch.randn(100_000, generator=torch.Generator().manual_seed(1), dtype=torch.float32, device="cpu")
for name in nf4lab.FORMATS:
    for n in (1000, 70_000):
        twice = nf4lab.FORMATS[name].constants_dtype.itemsize > 1
        q = nf4lab.quantize(x[:n], name, double_quant=twice)
        digest.update(q.packed.numpy().tobytes() + q.scale.numpy().tobytes() + q.dequantize().numpy().tobytes())
print(digest.hexdigest())
"""
DEFAULTS = (
    "torch.set_default_dtype(torch.float16)", "torch.set_default_dtype(torch.bfloat16)",
    "torch.set_default_dtype(torch.float64)", "torch.set_default_device('meta')",
)  # fmt: skip
WRITES = """
for format in (*nf4lab.FORMATS.values(), *MAPS.values()):
    for table in (format.levels, format.boundaries, format.ascending):
        table.zero_()
mine = torch.tensor([-1.0, 0.0, 1.0])
format = nf4lab.Format("mine", mine)
mine.zero_()
assert format.levels.tolist() == [-1, 0, 1] and nf4lab.quantize(torch.ones(64), format).dequantize().eq(1).all()
layer = nf4lab.Linear4bit.from_linear(torch.nn.Linear(64, 2), double_quant=True)
for part in layer.state_dict().values():
    part.zero_()
"""


def test_no_default_of_torch_and_no_write_to_what_is_handed_out_moves_a_level():
    runs = [
        subprocess.Popen([sys.executable, "-c", EVERY_TABLE.format(before=before)], stdout=subprocess.PIPE, text=True)
        for before in ("", *DEFAULTS, WRITES)
    ]
    digests = [run.communicate()[0] for run in runs]
    assert digests[0] and set(digests) == {digests[0]}

"""The table of formats, and formats of one's own: also those that only later chapters need."""

import copy
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import nf4lab
from nf4lab import backends, codebooks, formats


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


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


@pytest.mark.parametrize(("n_levels", "bits"), [(2, 2), (4, 2), (5, 3), (8, 3), (9, 4), (16, 4), (17, 8), (256, 8)])
def test_codes_are_stored_in_the_fewest_bits_that_name_all_levels(n_levels, bits):
    format = nf4lab.Format("mine", torch.linspace(-1, 1, n_levels))
    q = nf4lab.quantize(torch.randn(4096, generator=torch.Generator().manual_seed(1)), format, 64)
    assert format.code_bits == bits
    assert q.bits_per_weight == bits + 32 / 64


def test_codes_can_be_stored_in_more_bits_and_not_in_fewer():
    assert nf4lab.Format("mine", range(8), stored_bits=4).code_bits == 4
    with pytest.raises(ValueError, match="name 4, 8, 16 or 256 levels; got stored_bits 3 for 9 levels"):
        nf4lab.Format("mine", range(9), stored_bits=3)


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


def largest_over_three(blocks):
    """Not one of the package's: a third of the largest magnitude."""
    return blocks.abs().amax(dim=1) / 3, None


def test_a_normalization_of_ones_own_is_taken():
    x = torch.randn(640, generator=torch.Generator().manual_seed(0))
    q = nf4lab.quantize(x, nf4lab.Format("mine", codebooks.nf4() * 3, largest_over_three))
    torch.testing.assert_close(q.dequantize(), nf4lab.quantize(x).dequantize())


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


# --- published formats


def test_e2m1_q4_0_and_iq4_nl_have_their_published_levels():
    published = {
        "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6],
        "q4_0": list(range(-8, 8)),
        "iq4_nl": [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
    }
    for name, levels in published.items():
        assert same_bits(nf4lab.FORMATS[name].levels, torch.tensor(levels).float())
    for name in ("mxfp4", "nvfp4"):
        assert same_bits(nf4lab.FORMATS[name].levels, torch.tensor(published["e2m1"]))


def same_bits(a, b):
    """Equality that tells -0.0 from 0.0."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def awkward_blocks(block_size, dtype):
    """Blocks of sizes 2**-20 to 2**20, of zeros of both signs, of ties, near a power of two, subnormal and huge."""
    generator = torch.Generator().manual_seed(block_size)
    x = torch.randn(3000, block_size, generator=generator)
    x *= torch.exp2(torch.randint(-20, 20, (3000, 1), generator=generator))
    x[1], x[2], x[3, ::2], x[4] = 0.0, -0.0, -0.0, torch.arange(block_size) / 4
    x[5] = torch.linspace(-7.9999995, 7.9999995, block_size)
    x[6], x[7], x[8] = x[6] * 1e-38, 1e-45, x[8] / x[8].abs().max() * 1.7e38
    x[9, :16] = torch.tensor(
        [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -1e-30]
    )
    x[9, 16:] = 0
    return x.to(dtype)


def e2m1_bits(x):
    """E2M1 patterns of float32 x by ml_dtypes, saturated: uint8 of the same shape."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    return np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_equals_an_independent_implementation_bit_for_bit(dtype, backend):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = awkward_blocks(32, dtype)
    q = nf4lab.quantize(x, "mxfp4", backend=backend)
    blocks = x.double().numpy()
    absmax = np.abs(blocks).max(axis=1)
    exponent = np.floor(np.log2(absmax, where=absmax > 0, out=np.full(3000, -1000.0))) - 2
    scale = np.exp2(np.maximum(exponent, -127))
    e8m0 = scale.astype(ml_dtypes.float8_e8m0fnu)
    assert np.array_equal(q.codes.numpy(), e2m1_bits(blocks / scale[:, None]).reshape(-1))
    assert np.array_equal(q.stored_scale.to(torch.float8_e8m0fnu).view(torch.uint8).numpy(), e8m0.view(np.uint8))
    decoded = e2m1_bits(blocks / scale[:, None]).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert same_bits(q.dequantize(torch.float32), torch.from_numpy(decoded * e8m0.astype(np.float32)[:, None]))
    assert q.bits_per_weight == 4 + 8 / 32


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_equals_an_independent_implementation_bit_for_bit(dtype, backend):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = awkward_blocks(16, dtype)[:, :16]
    x[6:9] = x[10:13]  # without the huge block, beside which all others are zero
    q = nf4lab.quantize(x, "nvfp4", backend=backend)
    blocks = x.float().numpy()
    of_tensor = np.abs(blocks).max() / np.float32(6 * 448)
    e4m3 = (np.abs(blocks).max(axis=1) / np.float32(6) / of_tensor).astype(ml_dtypes.float8_e4m3fn)
    scale = e4m3.astype(np.float32) * of_tensor
    assert 500 < (scale == 0).sum() < 2000  # blocks so small beside the largest that E4M3 has no scale for them
    with np.errstate(divide="ignore", invalid="ignore"):
        normalized = np.where(scale[:, None] > 0, blocks * (1 / scale)[:, None], np.sign(blocks) * np.float32(np.inf))
    zero = (scale[:, None] == 0) & (blocks == 0)
    patterns = e2m1_bits(np.where(zero, blocks, normalized))
    patterns[zero] = 0  # 0/0 counts as 0
    assert np.array_equal(q.codes.numpy(), patterns.reshape(-1))
    assert np.array_equal(q.stored_scale.to(torch.float8_e4m3fn).view(torch.uint8).numpy(), e4m3.view(np.uint8))
    assert q.tensor_scale.item() == of_tensor
    decoded = patterns.view(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale[:, None]
    assert same_bits(q.dequantize(torch.float32), torch.from_numpy(decoded))
    assert q.nbytes == x.numel() // 2 + 3000 + 4  # codes, one byte per block, one float32


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_q4_0_equals_the_arithmetic_of_llama_cpp(backend):
    x = awkward_blocks(32, torch.float32)
    x = x[(x.abs().amax(dim=1) < 8 * 65504) & (x.abs().amax(dim=1) > 1e-30)]  # within float16, and no block of zeros
    x[0] = torch.arange(-16, 16) / 2  # every tie
    q = nf4lab.quantize(x, "q4_0", backend=backend)
    blocks = x.numpy()
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    d = largest / np.float32(-8)
    codes = np.minimum(np.floor((blocks * (1 / d)).astype(np.float64) + 8.5), 15)
    assert np.array_equal(q.codes.numpy(), codes.reshape(-1))
    assert np.array_equal(q.stored_scale.numpy(), d.astype(np.float16).astype(np.float32)[:, 0])
    assert q.bits_per_weight == 4.5


@pytest.mark.parametrize("name", ["q4_0", "iq4_nl"])
def test_llama_cpps_formats_send_the_extreme_to_their_lowest_level(name):
    x = torch.randn(640, generator=torch.Generator().manual_seed(0))
    q = nf4lab.quantize(x, name)
    extremes = x.reshape(-1, 32).abs().argmax(dim=1)
    assert (q.codes.reshape(-1, 32).gather(1, extremes[:, None]) == 0).all()


# The MSE column of published comparisons: standard normal weights, blocks of 64 and of 128, by quadrature.
PUBLISHED_MSE = {
    "int4": (0.011578, 0.013752),
    "q4_0": (0.009003, 0.010633),
    "uniform": (0.008031, 0.009947),
    "nf4": (0.008460, 0.009136),
    "iq4_nl": (0.007491, 0.008511),
    "mxfp4": (0.012783, 0.012701),
    "nvfp4": (0.011237, 0.011890),
}


@pytest.mark.parametrize("name", PUBLISHED_MSE)
def test_a_sample_has_the_expected_error_of_every_format_within_its_standard_error(name):
    x = torch.randn(2**21, generator=torch.Generator().manual_seed(11))
    for block_size, expected in zip((64, 128), PUBLISHED_MSE[name], strict=True):
        error = (nf4lab.quantize(x, name, block_size).dequantize() - x).double().square()
        blocks = error.reshape(-1, block_size).mean(dim=1)
        standard_error = (blocks.std() / len(blocks) ** 0.5).item()
        # 4 standard errors, and what the printed sixth decimal and the scale of this one tensor leave open
        tolerance = 4 * standard_error + 1e-6 + (2e-5 if name == "nvfp4" else 0)
        assert blocks.mean().item() == pytest.approx(expected, abs=tolerance)


# --- the parts of a format


@pytest.mark.parametrize(("ties", "codes"), [("down", [0, 1, 2, 0]), ("up", [1, 2, 3, 0]), ("even", [0, 2, 2, 0])])
def test_ties_go_where_the_format_says(ties, codes):
    format = nf4lab.Format("mine", [0.0, 1.0, 2.0, 3.0], ties=ties)
    assert format.nearest(torch.tensor([0.5, 1.5, 2.5, 0.25])).tolist() == codes
    nearly = torch.tensor([0.5, 1.5, 2.5])
    below, above = (nearly.nextafter(torch.tensor(side)) for side in (-torch.inf, torch.inf))
    assert format.nearest(below).tolist() == [0, 1, 2]
    assert format.nearest(above).tolist() == [1, 2, 3]


def test_a_format_with_two_zeros_keeps_the_sign():
    e2m1 = nf4lab.FORMATS["e2m1"]
    assert e2m1.signed_zero
    assert e2m1.nearest(torch.tensor([0.0, -0.0, 1e-45, -1e-45, 0.25, -0.25])).tolist() == [0, 8, 0, 8, 0, 8]
    assert not nf4lab.FORMATS["nf4"].signed_zero
    assert not nf4lab.FORMATS["fp4"].signed_zero  # bitsandbytes' second zero is positive


def test_the_scale_of_signed_absmax_has_the_sign_of_the_first_largest_element():
    blocks = torch.tensor([[1.0, -3.0, 3.0], [2.0, -1.0, -2.0], [-0.0, -0.0, 0.0]])
    scale, location = formats.signed_absmax(blocks)
    assert same_bits(scale, torch.tensor([-3.0, 2.0, 0.0]))
    assert location is None


@given(exponent=st.integers(-149, 127), below=st.booleans())
def test_power_of_two_scales_are_exact_at_every_power(exponent, below):
    power = torch.tensor(2.0).double().pow(exponent).float()
    value = power.nextafter(torch.tensor(0.0)) if below else power
    expected = 0.0 if value == 0 else 2.0 ** (exponent - below) if exponent > -126 or not below else None
    scale = formats.power_of_two(torch.stack([value, -value / 2])[None])[0].item()
    assert scale == expected if expected is not None else scale <= value < 2 * scale


def test_scales_above_e4m3_are_refused_and_not_cut_off():
    short = nf4lab.Format("short", codebooks.nf4(), constants_dtype=torch.float8_e4m3fn)
    assert nf4lab.quantize(torch.tensor([464.0]), short).scale.item() == 448
    with pytest.raises(ValueError, match=r"a block's scale exceeds torch\.float8_e4m3fn, in which 'short' stores it"):
        nf4lab.quantize(torch.tensor([464.1]), short)


@pytest.mark.parametrize("normalize", [formats.signed_absmax, formats.min_max, formats.mean_std])
def test_constants_without_a_sign_are_refused_for_normalisations_that_need_one(normalize):
    with pytest.raises(ValueError, match=f"no negative numbers, which {normalize.__name__} stores"):
        nf4lab.Format("mine", codebooks.nf4(), normalize, torch.float8_e8m0fnu)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ties": "away"}, "ties go 'down', 'up' or to 'even'; got 'away'"),
        ({"extreme": 0}, "extreme must not be zero"),
        ({"exact_codes": True, "search": (1.0, 0.9)}, "exact_codes must be False"),
    ],
)
def test_parts_that_disagree_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        nf4lab.Format("mine", codebooks.nf4(), **change)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_constants_of_one_byte_are_not_quantized_again(name):
    with pytest.raises(ValueError, match=f"'{name}' has constants of one byte already; double_quant must be False"):
        nf4lab.quantize(torch.zeros(64), name, double_quant=True)


def test_the_scale_of_the_tensor_makes_the_greatest_block_scale_the_greatest_e4m3():
    x = torch.randn(1600, generator=torch.Generator().manual_seed(0)) * 1e-6
    q = nf4lab.quantize(x, "nvfp4")
    assert q.stored_scale.max() == 448
    assert q.tensor_scale == x.abs().max() / (6 * 448)
    assert torch.equal(q.scale, q.stored_scale * q.tensor_scale)
    assert nf4lab.quantize(torch.zeros(64), "nvfp4").dequantize().abs().sum() == 0


def test_each_format_has_the_block_size_of_its_specification():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    sizes = {name: nf4lab.quantize(x, name).block_size for name in ("nf4", "mxfp4", "nvfp4", "q4_0", "iq4_nl")}
    assert sizes == {"nf4": 64, "mxfp4": 32, "nvfp4": 16, "q4_0": 32, "iq4_nl": 32}


# --- searched scales


@pytest.mark.parametrize("name", [name for name, format in nf4lab.FORMATS.items() if not format.exact_codes])
def test_a_searched_scale_costs_no_bits_and_no_block_is_worse(name):
    x = torch.randn(64 * 300, generator=torch.Generator().manual_seed(3))
    plain, searched = (nf4lab.quantize(x, f) for f in (name, nf4lab.FORMATS[name].searched()))
    assert searched.bits_per_weight == plain.bits_per_weight
    cost = [(q.dequantize() - x).double().square().reshape(-1, q.block_size).sum(dim=1) for q in (plain, searched)]
    assert (cost[1] <= cost[0] * (1 + 1e-5)).all()  # the search sums in float32
    assert (cost[1] < 0.9 * cost[0]).any()


def test_the_searched_scale_is_the_best_of_its_trials_by_brute_force():
    format = nf4lab.Format("short", codebooks.nf4(), constants_dtype=torch.float16).searched((1.0, 0.9, 1.25, 1.1))
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(4))
    trials = (x.abs().amax(dim=1, keepdim=True) * torch.tensor(format.search)).half().double()  # (100, 4)
    levels = codebooks.nf4().double()
    nearest = (x[:, None, :, None] / trials[:, :, None, None] - levels).abs().argmin(dim=-1)  # (100, 4, 64)
    cost = (levels[nearest] * trials[:, :, None] - x[:, None]).square().sum(dim=-1)
    best = trials.gather(1, cost.argmin(dim=1, keepdim=True))[:, 0].float()
    assert torch.equal(nf4lab.quantize(x, format, 64).scale, best)
    assert len(best.unique()) > 50
    assert (cost.argmin(dim=1).bincount() > 0).all()


def test_a_search_does_not_overflow_in_blocks_as_large_as_float32_allows():
    x = torch.randn(64, generator=torch.Generator().manual_seed(5))
    x = x / x.abs().max()
    search = nf4lab.FORMATS["nf4"].searched((1.0, 0.875, 0.75))
    small, huge = nf4lab.quantize(x, search), nf4lab.quantize(x * 2.0**127, search)
    assert torch.equal(small.packed, huge.packed)
    assert huge.scale.item() == small.scale.item() * 2.0**127


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3fn", "float8_e8m0fnu"])
def test_constants_are_rounded_as_an_independent_implementation_rounds_them(name):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    format = nf4lab.Format("mine", codebooks.nf4(), constants_dtype=getattr(torch, name))
    x = torch.exp2(torch.rand(2**16, generator=torch.Generator().manual_seed(7)) * 22 - 14)  # to 256, in every range
    ties = torch.arange(1, 256) * 0.125 * torch.exp2(torch.arange(255) % 7 - 4.0)
    x = torch.cat([x, ties, torch.tensor([448.0, 464.0, 2.0**-10, 3 * 2.0**-10, 1.5, 0.75])])
    x = x if name == "float8_e8m0fnu" else torch.cat([x, -x, torch.zeros(1)])
    dtype = getattr(ml_dtypes, name, None) or np.float16
    assert np.array_equal(format.as_stored(x).numpy(), x.numpy().astype(dtype).astype(np.float32))


def test_formats_are_equal_by_value_and_copies_of_a_format_are_the_format():
    nf4 = nf4lab.FORMATS["nf4"]
    assert len(nf4.boundaries) == 15  # what is derived is no part of it
    for twin in (copy.deepcopy(nf4), pickle.loads(pickle.dumps(nf4)), nf4lab.Format("nf4", codebooks.nf4())):
        assert twin == nf4 and hash(twin) == hash(nf4) and twin is not nf4
    changed = (
        {"name": "mine"}, {"levels": nf4.levels.flip(0)}, {"normalize": formats.signed_absmax}, {"stored_bits": 8},
        {"constants_dtype": torch.float16}, {"search": formats.SEARCH}, {"ties": "up"}, {"block_size": 32},
    )  # fmt: skip
    for other in (*(replace(nf4, **change) for change in changed), None, "nf4"):
        assert other != nf4
    assert nf4lab.Format("zero", [-0.0, 1.0]) != nf4lab.Format("zero", [0.0, 1.0])


def test_a_copy_of_a_quantized_tensor_has_the_keys_of_bitsandbytes_in_a_file(tmp_path):
    q = nf4lab.quantize(normal(64, 64))
    for twin in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        nf4lab.save_quantized(tmp_path / "w.safetensors", {"w": twin})
        assert "w.quant_state.bitsandbytes__nf4" in safetensors.torch.load_file(tmp_path / "w.safetensors")


# What is left of blocks where only that is kept which a rule of a kind depends on.
KEPT = {
    "magnitude": lambda blocks: blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True)),
    "range": lambda blocks: torch.stack([blocks.amin(dim=1), blocks.amax(dim=1)], dim=1),
    "moments": lambda blocks: torch.stack([blocks.mean(dim=1) + sign * blocks.std(dim=1, correction=0)
                                           for sign in (-1, 1)], dim=1),
    "all": lambda blocks: blocks,
}  # fmt: skip


def depends_on(rule, blocks, kind):
    """Whether a rule makes of what a kind keeps of blocks the constants that it makes of the blocks."""
    found, expected = ([part for part in rule(values) if part is not None] for values in (KEPT[kind](blocks), blocks))
    near = {"rtol": 0, "atol": 1e-6 if kind == "moments" else 0}  # mean and deviation are rounded on the way
    return all(torch.allclose(*pair, **near) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", formats.NORMALIZATIONS)
def test_a_rule_depends_on_what_its_row_says_and_makes_the_constants_that_it_says(name):
    row, blocks = formats.NORMALIZATIONS[name], normal(200, 16)
    assert row.depends_on in KEPT, f"{name}: depends_on is one of {', '.join(KEPT)}"
    assert depends_on(row.rule, blocks, row.depends_on), f"{name}: {row.depends_on!r} keeps too little of a block"
    less = [kind for kind in KEPT if kind != "all" and depends_on(row.rule, blocks, kind)]
    assert row.depends_on != "all" or not less, f"{name}: its row may say depends_on={less[0]!r}, which theory can use"
    scale, location = row.rule(blocks)
    assert (location is not None) == row.has_location
    constants = [scale] if location is None else [scale, location]
    assert any((part < 0).any() for part in constants) == row.has_sign
    assert (len(scale.unique()) < 20) == row.in_steps


def test_a_rule_of_ones_own_is_found_to_have_a_location_or_none():
    def median(blocks):
        return blocks.abs().amax(dim=1), blocks.median(dim=1).values

    assert formats.normalization_of(median).has_location
    assert not formats.normalization_of(lambda blocks: (blocks.abs().amax(dim=1), None)).has_location
    x, own = normal(1000), nf4lab.Format("mine", range(8), median)
    assert (nf4lab.quantize(x, own).dequantize() - x).abs().max() < 4 and own.code_bits == 3


@pytest.mark.parametrize("name", ["nf3", "nf2"])
def test_three_and_two_bits_give_the_nearest_level_and_no_bit_is_wasted(name):
    x, format = normal(1000), nf4lab.FORMATS[name]
    q = nf4lab.quantize(x, name, 64)
    scale = q.absmax.repeat_interleave(64)[:1000]
    assert torch.equal(q.codes.long(), (x[:, None] / scale[:, None] - format.levels).abs().argmin(dim=1))
    assert torch.equal(q.dequantize(), format.levels[q.codes.long()] * scale)
    assert q.packed.numel() == math.ceil(1000 * format.code_bits / 8)


@pytest.mark.parametrize("name", ["nf3", "nf2", "wide"])
def test_kernels_refuse_widths_that_they_have_not(name):
    format = nf4lab.FORMATS[name] if name != "wide" else nf4lab.Format("wide", range(17))
    backend, device = ("cpu", "cpu") if name == "wide" else ("cuda", "cuda")
    with pytest.raises(ValueError, match=rf"takes codes of (up to )?4 bits; those of '{name}' have {format.code_bits}"):
        backends.choose(backend, torch.device(device), torch.float32, 64, format)

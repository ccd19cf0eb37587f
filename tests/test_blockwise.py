"""The public face: shapes and dtypes in and out, properties that hold for any input, bad input, memory."""

import dataclasses
import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import nf4lab
from nf4lab.blockwise import DTYPES

ABSMAX_FORMATS = ["nf4", "fp4", "int4"]
finite32 = st.floats(-(2.0**100), 2.0**100, width=32, allow_nan=False)
vectors = hnp.arrays(np.float32, st.integers(1, 200), elements=finite32).map(torch.from_numpy)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- shapes and dtypes


@pytest.mark.parametrize("shape", [(), (1,), (7,), (64,), (65,), (3, 5), (2, 3, 4, 5), (0,), (4, 0, 3), (130, 66)])
@pytest.mark.parametrize("format", nf4lab.FORMATS)
def test_any_shape_comes_back(shape, format):
    x = normal(*shape) if shape else normal(1)[0]
    q = nf4lab.quantize(x, format, double_quant=nf4lab.FORMATS[format].constants_dtype.itemsize > 1)
    assert q.dequantize().shape == x.shape
    assert q.packed.numel() == math.ceil(x.numel() * q.format.code_bits / 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_comes_back_unless_another_is_asked_for(dtype):
    q = nf4lab.quantize(normal(100).to(dtype))
    assert q.dequantize().dtype == dtype
    for other in DTYPES:
        assert nf4lab.dequantize(q, other).dtype == other


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_rounded_once_from_the_float32_result(dtype):
    q = nf4lab.quantize(normal(1000))
    assert torch.equal(q.dequantize(dtype), q.dequantize(torch.float32).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_input_gives_the_codes_of_its_float32_values(dtype):
    x = normal(5000).to(dtype)
    assert torch.equal(nf4lab.quantize(x).packed, nf4lab.quantize(x.float()).packed)


def test_non_contiguous_input_is_read_in_row_major_order():
    x = normal(70, 90)
    for view in (x.T, x[::2, 1::3], x.expand(2, 70, 90), x.flip(0)):
        q, contiguous = nf4lab.quantize(view), nf4lab.quantize(view.contiguous())
        assert torch.equal(q.packed, contiguous.packed)
        assert torch.equal(q.dequantize(), contiguous.dequantize())


def test_a_parameter_is_quantized_without_its_graph():
    weight = torch.nn.Parameter(normal(64))
    assert not nf4lab.quantize(weight).dequantize().requires_grad


@pytest.mark.parametrize("block_size", nf4lab.BLOCK_SIZES)
def test_every_block_has_its_own_absmax_the_short_last_one_too(block_size):
    x = normal(3 * 4096 + 5)
    q = nf4lab.quantize(x, block_size=block_size)
    expected = [part.abs().max() for part in x.split(block_size)]
    assert torch.equal(q.absmax, torch.stack(expected))


def test_chunks_leave_no_seam():
    x = normal(3 * 2**16 + 7)
    whole, parts = nf4lab.quantize(x), [nf4lab.quantize(part) for part in x.split(64 * 10)]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))


# --- values at the edge


@pytest.mark.parametrize("format", ABSMAX_FORMATS)
def test_a_zero_block_has_absmax_zero_and_decodes_to_positive_zeros(format):
    x = torch.cat([torch.zeros(64), normal(64), -torch.zeros(3)])
    q = nf4lab.quantize(x, format)
    zeros = torch.cat([q.dequantize()[:64], q.dequantize()[128:]])
    assert (zeros == 0).all()
    assert not zeros.signbit().any()
    assert q.absmax[0] == 0
    assert q.codes[0] == q.format.zero_code


def test_nf4_codes_of_a_zero_block_are_seven_and_so_is_the_padding():
    q = nf4lab.quantize(torch.zeros(3))
    assert q.packed.tolist() == [0x77, 0x77]


@pytest.mark.parametrize("format", [f.name for f in nf4lab.FORMATS.values() if f.constants_dtype == torch.float32])
def test_a_constant_block_decodes_to_itself_where_constants_are_float32(format):
    x = torch.full((64,), 0.1)
    torch.testing.assert_close(nf4lab.quantize(x, format).dequantize(), x)


@pytest.mark.parametrize("absmax", [1.4e-45, 1e-42, 2e-39, 1e-38, 3.4e38])
def test_subnormal_and_huge_blocks_keep_their_relative_error(absmax):
    x = normal(64) / normal(64).abs().max() * absmax
    ordinary = nf4lab.quantize(normal(64))
    q = nf4lab.quantize(x)
    assert q.absmax.item() == x.abs().max()
    if absmax > 1e-40:  # below, x itself has too few bits left for the same codes
        assert torch.equal(q.codes, ordinary.codes)
    error = (q.dequantize() - x).abs().max()
    assert error <= x.abs().max() * 0.16 + 1.4e-45


def test_float16_maxima_come_back_exactly():
    x = torch.tensor([65504.0, -65504.0, 0.0], dtype=torch.float16)
    assert torch.equal(nf4lab.quantize(x).dequantize(), x)


def test_an_empty_tensor_has_no_bits_a_weight():
    q = nf4lab.quantize(torch.empty(0, 5))
    assert math.isnan(q.bits_per_weight)
    assert q.nbytes == 0


# --- properties


def widest_gap(format):
    return nf4lab.FORMATS[format].levels.sort().values.diff().max().item()


@pytest.mark.parametrize("format", ABSMAX_FORMATS)
@given(x=vectors)
def test_the_round_trip_stays_within_half_the_widest_gap_times_absmax(format, x):
    q = nf4lab.quantize(x, format, block_size=16)
    bound = widest_gap(format) / 2 * q.absmax.double().repeat_interleave(16)[: x.numel()]
    # the reciprocal, the product with it and the product with absmax round: 4 half-units of 2**-23 in all
    error = (q.dequantize().double() - x.double()).abs()
    assert (error <= bound * (1 + 2**-20) + q.absmax.max().double() * 2**-21 + 1e-44).all()


@pytest.mark.parametrize("format", ABSMAX_FORMATS)
@given(x=vectors)
def test_quantizing_the_dequantized_changes_nothing(format, x):
    x[x.abs() < 1e-30] = 0  # a level times a subnormal absmax is no longer near the level
    once = nf4lab.quantize(x, format, block_size=16)
    again = nf4lab.quantize(once.dequantize(), format, block_size=16)
    assert torch.equal(again.absmax, once.absmax)
    assert torch.equal(again.dequantize(), once.dequantize())
    assert format == "fp4" or torch.equal(again.packed, once.packed)  # FP4 has two codes for zero


@pytest.mark.parametrize("format", ["nf4", "int4", "uniform", "naive-quantile"])
@given(x=vectors)
def test_codes_are_monotone_in_the_input(format, x):
    x, _ = x[:64].sort()
    codes = nf4lab.quantize(x, format).codes.int()
    assert (codes.diff() >= 0).all()


@given(x=vectors, power=st.integers(-20, 20))
def test_a_power_of_two_scales_absmax_and_leaves_the_codes(x, power):
    x[x.abs() < 1e-20] = 0
    x = x.clamp(-1e20, 1e20)
    q, scaled = nf4lab.quantize(x), nf4lab.quantize(x * 2.0**power)
    assert torch.equal(q.codes, scaled.codes)
    assert torch.equal(q.absmax * 2.0**power, scaled.absmax)


# --- bad input


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            [1.0, float("nan"), float("inf"), float("nan")],
            r"2 NaN and 1 infinite values, the first is nan at index \(1,\)",
        ),
        ([-float("inf"), 1.0], r"0 NaN and 1 infinite values, the first is -inf at index \(0,\)"),
    ],
)
@pytest.mark.parametrize("format", nf4lab.FORMATS)
def test_values_that_are_not_finite_are_counted_and_the_first_is_named(values, message, format):
    with pytest.raises(ValueError, match=message):
        nf4lab.quantize(torch.tensor(values), format)


def test_the_first_non_finite_value_is_named_by_its_own_index():
    x = normal(3, 100_000)
    x[1, 70_000] = x[2, 5] = float("inf")
    with pytest.raises(ValueError, match=r"0 NaN and 2 infinite values, the first is inf at index \(1, 70000\)"):
        nf4lab.quantize(x)


def test_float64_beyond_the_range_of_float32_is_refused():
    with pytest.raises(ValueError, match=r"finite in float32; .* the first is 1e\+300 at index \(1,\)"):
        nf4lab.quantize(torch.tensor([0.0, 1e300], dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda x: x.to_sparse(), r"x must be dense; got a tensor of layout torch\.sparse_coo"),
        (lambda x: x.to_sparse_csr(), r"x must be dense; got a tensor of layout torch\.sparse_csr"),
        (lambda x: x.to_mkldnn(), r"x must be dense; got a tensor of layout torch\._mkldnn"),
        (lambda x: torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged), r"layout torch\.jagged, nested"),
        (lambda x: x.to("meta"), r"x is on the meta device: its \(4, 64\) elements have no values"),
    ],
)
def test_tensors_without_values_of_their_own_in_row_major_order_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        nf4lab.quantize(make(torch.randn(4, 64)))


def test_constants_too_large_for_their_dtype_are_refused():
    with pytest.raises(ValueError, match=r"a block's scale exceeds torch\.float32, in which 'uniform' stores it"):
        nf4lab.quantize(torch.tensor([3e38, -3e38]), "uniform")
    short = nf4lab.Format("short", nf4lab.FORMATS["nf4"].levels, constants_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"a block's scale exceeds torch\.float16, in which 'short' stores it"):
        nf4lab.quantize(torch.tensor([70_000.0]), short)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tensors_of_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match=f"float32, float16, bfloat16 or float64; got {dtype}"):
        nf4lab.quantize(torch.zeros(4).to(dtype))


@pytest.mark.parametrize("x", [[1.0, 2.0], np.zeros(3), 1.0, None])
def test_what_is_no_tensor_is_refused(x):
    with pytest.raises(TypeError, match=f"x must be a torch.Tensor; got {type(x).__name__}"):
        nf4lab.quantize(x)


@pytest.mark.parametrize("block_size", [0, 48, -64, 1, 8, 8192])
def test_a_block_size_that_does_not_exist_is_refused(block_size):
    with pytest.raises(ValueError, match=f"block_size must be one of 16, 32, 64, …, 4096; got {block_size}"):
        nf4lab.quantize(torch.zeros(4), block_size=block_size)


@pytest.mark.parametrize("block_size", ["64", 64.0, True])
def test_a_block_size_that_is_no_int_is_refused(block_size):
    with pytest.raises(TypeError, match=f"block_size must be an int; got {block_size!r}"):
        nf4lab.quantize(torch.zeros(4), block_size=block_size)


def test_dequantize_refuses_what_is_not_quantized_and_dtypes_that_are_not_float():
    with pytest.raises(TypeError, match="takes a QuantizedTensor; got Tensor"):
        nf4lab.dequantize(torch.zeros(3))
    with pytest.raises(TypeError, match=r"got torch\.int8"):
        nf4lab.quantize(torch.zeros(3)).dequantize(torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(49, dtype=torch.uint8)}, r"shape \(100,\) takes 50 packed uint8; got 49"),
        ({"packed": torch.zeros(50)}, r"takes 50 packed uint8; got 50 torch\.float32"),
        ({"stored_scale": torch.zeros(3)}, "in blocks of 64 has 2 blocks; got 3 values of absmax or scale"),
        ({"stored_location": torch.zeros(1)}, "has 2 blocks; got 1 values of location"),
        ({"shape": torch.Size([10, 11])}, r"shape \(10, 11\) takes 55 packed uint8; got 50"),
        ({"block_size": 32}, "in blocks of 32 has 4 blocks; got 2"),
        ({"block_size": 48}, "block_size must be one of 16, 32, 64, …, 4096; got 48"),
    ],
)
def test_a_quantized_tensor_whose_parts_disagree_is_refused(change, message):
    q = nf4lab.quantize(normal(100))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(q, **change)


def test_a_format_without_absmax_says_what_it_has():
    with pytest.raises(ValueError, match=r"'uniform' is not normalised by absmax; use \.scale and \.location"):
        _ = nf4lab.quantize(normal(64), "uniform").absmax


def test_to_moves_every_part():
    for double_quant in (False, True):
        q = nf4lab.quantize(normal(100), "uniform", double_quant=double_quant).to("meta")
        assert q.packed.device.type == "meta"
        assert q.dequantize().device.type == "meta"


# --- memory


@pytest.mark.parametrize("source", ["torch.randn(2**25)", "torch.randn(2**26).half()", "torch.randn(5000, 6000).T"])
def test_quantizing_needs_at_most_twice_the_tensor_beside_it(source):
    script = f"""
        import resource, torch, nf4lab
        nf4lab.quantize(torch.randn(2**18), double_quant=True)  # what the libraries load on first use
        x = {source}
        high = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        now = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
        filler = torch.ones(high() - now + 2**20, dtype=torch.uint8)  # so that the peak so far is the present
        before = high()
        q = nf4lab.quantize(x, double_quant=True)
        print((high() - before) / x.nbytes)
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/statm")
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 2

"""nf4lab against bitsandbytes on the CPU: every byte, over more than 50 million values."""

import pytest
import torch

import nf4lab

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMATS = ["nf4", "fp4"]
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]  # 16 is ours alone
LENGTHS = [2**18 + 2 * 4096 + 17, 2**19 - 6]  # odd; even with a partial last block
COMPARED = len(DTYPES) * len(FORMATS) * len(BLOCK_SIZES) * 2 * sum(LENGTHS)


def values(n, dtype):
    """Normal values whose width changes from place to place, with exact zeros and, in 16 bits, many ties."""
    generator = torch.Generator().manual_seed(n)
    widths = torch.randn(n // 1000 + 1, generator=generator).mul(2).exp().repeat_interleave(1000)[:n]
    x = torch.randn(n, generator=generator) * widths
    x[::997] = 0
    return x.to(dtype)


def test_the_comparison_covers_more_than_50_million_values():
    assert COMPARED > 50_000_000


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_absmax_and_values_equal_bitsandbytes_byte_for_byte(bitsandbytes, dtype, format, block_size):
    for n in LENGTHS:
        x = values(n, dtype)
        packed, state = bitsandbytes.quantize_4bit(x, blocksize=block_size, quant_type=format)
        q = nf4lab.quantize(x, format, block_size)
        assert torch.equal(q.packed, packed.reshape(-1))
        assert torch.equal(q.absmax, state.absmax)
        assert torch.equal(q.dequantize(), bitsandbytes.dequantize_4bit(packed, state).reshape(-1))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_double_quantized_bytes_equal_but_for_the_lookup_of_bitsandbytes(bitsandbytes, dtype, format, block_size):
    different = total = 0
    for n in LENGTHS:
        x = values(n, dtype)
        packed, state = bitsandbytes.quantize_4bit(x, blocksize=block_size, quant_type=format, compress_statistics=True)
        q = nf4lab.quantize(x, format, block_size, double_quant=True)
        assert torch.equal(q.packed, packed.reshape(-1))
        assert torch.equal(q.stored_scale.offset, state.offset)
        assert torch.equal(q.stored_scale.group_absmax, state.state2.absmax)
        differ = q.stored_scale.codes != state.absmax.reshape(-1)
        assert_next_to_a_midpoint(q, nf4lab.quantize(x, format, block_size).absmax, state, differ)
        different, total = different + differ.sum().item(), total + differ.numel()
    assert different / total < 0.02  # few constants here; the share is measured below


def assert_next_to_a_midpoint(q, absmax, state, differ):
    """bitsandbytes looks the code up in 65,536 bins over [-1, 1]: it can only be wrong within a bin of a midpoint."""
    level = nf4lab.codebooks.dynamic_map().double()
    group = torch.arange(absmax.numel()) // 256
    scaled = (absmax - q.stored_scale.offset).double() / q.stored_scale.group_absmax.double()[group]
    ours, theirs = q.stored_scale.codes.long(), state.absmax.reshape(-1).long()
    midpoint = (level[ours] + level[theirs]) / 2
    assert ((scaled - midpoint).abs() <= 2.0**-15)[differ].all()
    assert ((scaled - level[ours]).abs() <= (scaled - level[theirs]).abs() + 2.0**-23)[differ].all()


def test_second_level_codes_differ_from_bitsandbytes_in_under_three_in_a_thousand(bitsandbytes):
    x = torch.randn(2**23, generator=torch.Generator().manual_seed(0))
    _, state = bitsandbytes.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
    differ = nf4lab.quantize(x, double_quant=True).stored_scale.codes != state.absmax.reshape(-1)
    assert 0 < differ.double().mean() < 0.003


def test_double_quantized_values_equal_those_of_bitsandbytes_from_the_same_bytes(bitsandbytes):
    x = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).half()
    q = nf4lab.quantize(x, double_quant=True)
    packed, state = bitsandbytes.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
    state.absmax = q.stored_scale.codes
    assert torch.equal(q.dequantize(), bitsandbytes.dequantize_4bit(packed, state).reshape(-1))


def test_below_1e_minus_38_bitsandbytes_clamps_and_nf4lab_does_not(bitsandbytes):
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 1e-39
    packed, _ = bitsandbytes.quantize_4bit(x, blocksize=64, quant_type="nf4")
    q = nf4lab.quantize(x)
    assert not torch.equal(q.packed, packed.reshape(-1))
    assert torch.equal(q.codes, nf4lab.quantize(x * 2.0**60).codes)


@pytest.mark.parametrize(("length", "differing"), [(64, 0), (16, 37)])
def test_with_weights_on_the_boundaries_full_blocks_agree_and_short_ones_do_not(bitsandbytes, length, differing):
    """m times each boundary beside an absmax of m. In a short block bitsandbytes divides, as the last check shows."""
    boundaries = nf4lab.FORMATS["nf4"].boundaries
    different = 0
    for m in range(1, 65):
        x = torch.zeros(length)
        x[:16] = m * torch.cat([torch.ones(1), boundaries])
        theirs = bitsandbytes.quantize_4bit(x, blocksize=64, quant_type="nf4")[0].reshape(-1)
        different += not torch.equal(theirs, nf4lab.quantize(x, block_size=64).packed)
        divided = torch.bucketize(x / m, boundaries).to(torch.uint8).reshape(-1, 2)
        if length < 64:
            assert torch.equal(theirs, divided[:, 0] << 4 | divided[:, 1])
    assert different == differing


def test_a_short_block_of_zeros_has_an_absmax_of_1e_minus_38_there_and_0_here(bitsandbytes):
    packed, state = bitsandbytes.quantize_4bit(torch.zeros(10), blocksize=64, quant_type="nf4")
    q = nf4lab.quantize(torch.zeros(10), block_size=64)
    assert state.absmax == 1e-38 and q.absmax == 0
    assert torch.equal(packed.reshape(-1), q.packed)
    full = bitsandbytes.quantize_4bit(torch.zeros(64), blocksize=64, quant_type="nf4")[1]
    assert full.absmax == 0
